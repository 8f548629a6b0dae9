package bench

import (
	"bytes"
	"compress/flate"
	"math"
	"math/rand/v2"
	"net/url"
	"slices"
	"testing"
	"time"
)

func keyspaceFor(t *testing.T, args ...string) *keyspace {
	t.Helper()
	o, err := parse(args, nil)
	if err != nil {
		t.Fatal(err)
	}
	return newKeyspace(&o)
}

func TestKeyPaths(t *testing.T) {
	for _, tt := range []struct {
		args []string
		key  int64
		want string
	}{
		{nil, 0, "bench/0000000000"},
		{nil, 9_999, "bench/0000009999"},
		{[]string{"--keys", "10", "--prefix", "", "--key-size", "1"}, 7, "7"},
		{[]string{"--prefix", "a b?/é%", "--key-size", "12"}, 42, "a%20b%3F/%C3%A9%250042"},
	} {
		k := keyspaceFor(t, tt.args...)
		got := string(k.appendPath(nil, tt.key))
		if got != tt.want {
			t.Errorf("%v: key %d is %q, want %q", tt.args, tt.key, got, tt.want)
		}
		if raw, err := url.PathUnescape(got); err != nil || len(raw) != len(k.prefix)+k.digits {
			t.Errorf("%v: the raw key %q has %d bytes, want %d (%v)", tt.args, raw, len(raw), len(k.prefix)+k.digits, err)
		}
	}
}

// Draws stay inside the keys for every number of them, small ones too.
func TestDistributionsInBounds(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for _, kind := range []string{uniform, zipf, sequential, latest} {
		for _, n := range []string{"1", "2", "3", "7", "64", "10000", "5000000"} {
			k := keyspaceFor(t, "--distribution", kind, "--keys", n)
			seen := map[int64]bool{}
			for range 2000 {
				for _, key := range []int64{k.read(rng), k.write(rng)} {
					if key < 0 || key >= k.n {
						t.Fatalf("%s of %s keys draws %d", kind, n, key)
					}
					seen[key] = true
				}
			}
			if k.n <= 7 && len(seen) != int(k.n) {
				t.Errorf("%s of %s keys draws only %d of them", kind, n, len(seen))
			}
		}
	}
}

// The frequency of each of the first ranks is what the distribution says.
func TestZipfFrequencies(t *testing.T) {
	const n, draws = 1000, 400_000
	z := newZipfian(n, zipfSkew)
	rng := rand.New(rand.NewPCG(7, 8))
	counts := make([]int, n)
	for range draws {
		counts[z.draw(rng.Float64())]++
	}
	for _, rank := range []int{0, 1} { // these two are exact, the others approximate
		want := draws / math.Pow(float64(rank+1), zipfSkew) / z.zeta
		if got := float64(counts[rank]); math.Abs(got-want) > 5*math.Sqrt(want) {
			t.Errorf("rank %d is drawn %v times, want about %.0f", rank, got, want)
		}
	}
	head, want := 0, 0.0
	for rank := range 100 {
		head += counts[rank]
		want += draws / math.Pow(float64(rank+1), zipfSkew) / z.zeta
	}
	if got := float64(head); math.Abs(got-want) > 0.03*want {
		t.Errorf("the first 100 ranks are drawn %v times, want about %.0f", got, want)
	}
	if got, want := zeta(3_000_000, zipfSkew), plainZeta(3_000_000, zipfSkew); math.Abs(got-want) > 1e-6*want {
		t.Errorf("zeta is %v, added up it is %v", got, want)
	}
}

func plainZeta(n int, theta float64) (sum float64) {
	for i := n; i > 0; i-- {
		sum += math.Pow(float64(i), -theta)
	}
	return sum
}

// Hot keys are scattered, and no two ranks share a key.
func TestZipfScatter(t *testing.T) {
	for _, n := range []string{"10", "1000", "4096", "9973"} {
		k := keyspaceFor(t, "--distribution", zipf, "--keys", n)
		seen := make([]bool, k.n)
		for rank := range k.n {
			key := rank * k.step % k.n
			if seen[key] {
				t.Fatalf("%s keys: two ranks have key %d", n, key)
			}
			seen[key] = true
		}
	}
}

func TestSequentialAndLatest(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 10))
	k := keyspaceFor(t, "--distribution", sequential, "--keys", "4")
	var got []int64
	for range 3 {
		got = append(got, k.write(rng), k.read(rng))
	}
	if !slices.Equal(got, []int64{0, 1, 2, 3, 0, 1}) {
		t.Errorf("sequential draws %v", got)
	}
	k = keyspaceFor(t, "--distribution", latest, "--keys", "1000")
	for range 300 {
		k.write(rng)
	}
	near := 0
	for range 1000 {
		if age := (299 - k.read(rng) + k.n) % k.n; age < 100 {
			near++
		}
	}
	if near < 500 || near > 900 { // zipf: 69 % are among the first tenth
		t.Errorf("%d of 1000 reads are of the newest 100 keys", near)
	}
}

func TestValues(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 12))
	v := newValues(128, false, 1)
	var all []byte
	for range 200 {
		b := v.draw(rng)
		if len(b) != 128 {
			t.Fatalf("a value of %d bytes", len(b))
		}
		all = append(all, b...)
	}
	var packed bytes.Buffer
	w, err := flate.NewWriter(&packed, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = w.Write(all[:4096]); err == nil {
		err = w.Close()
	}
	if err != nil || packed.Len() < 4000 {
		t.Errorf("4096 bytes of values are compressed to %d (%v)", packed.Len(), err)
	}
	if again := newValues(128, false, 1); !bytes.Equal(v.pool, again.pool) {
		t.Error("the same seed gives other values")
	}
	if other := newValues(128, false, 2); bytes.Equal(v.pool, other.pool) {
		t.Error("another seed gives the same values")
	}
	if empty := newValues(0, false, 1); len(empty.draw(rng)) != 0 {
		t.Error("a value of 0 bytes has some")
	}
}

func TestSchedule(t *testing.T) {
	for _, rate := range []float64{0.5, 1, 3, 1000, 12_345.678, 1e6} {
		s := schedule{rate: rate}
		last := time.Duration(-1)
		for i := range int64(5000) {
			at := s.take()
			if at < last {
				t.Fatalf("%v/s: request %d is due %v, the one before %v", rate, i, at, last)
			}
			last = at
			// due counts what is before a time, so it has i at the time of request i.
			if got := s.due(at); s.at(got) < at || got > 0 && s.at(got-1) >= at {
				t.Fatalf("%v/s: %d requests are due before %v", rate, got, at)
			}
		}
		if want := time.Duration(4999 / rate * float64(time.Second)); (last - want).Abs() > time.Microsecond {
			t.Errorf("%v/s: request 4999 is due %v, want %v", rate, last, want)
		}
		if got := s.backlog(s.at(6000)); got != 1000 {
			t.Errorf("%v/s: the backlog is %d, want 1000", rate, got)
		}
	}
	s := schedule{rate: 100}
	if s.due(0) != 0 || s.due(time.Nanosecond) != 1 || s.due(10*time.Millisecond) != 1 || s.due(time.Second) != 100 || s.due(-1) != 0 {
		t.Errorf("due: %d, %d, %d, %d, %d", s.due(0), s.due(1), s.due(10*time.Millisecond), s.due(time.Second), s.due(-1))
	}
	if closed := (&schedule{}); closed.backlog(time.Hour) != 0 {
		t.Error("a closed loop has a backlog")
	}
}
