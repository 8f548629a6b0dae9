package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pontoon/api"
)

// fake is a server that answers as Pontoon does, or as a test has it.
type fake struct {
	*httptest.Server
	id      uint64
	cluster string
	calls   atomic.Int64                                      // of keys
	key     func(w http.ResponseWriter, r *http.Request) bool // false: go on as usual
	mu      sync.Mutex
	keys    map[string]int // size of the value
}

func newFake(t *testing.T, key func(w http.ResponseWriter, r *http.Request) bool) *fake {
	f := &fake{id: 1, cluster: "c1", key: key, keys: map[string]int{}}
	f.Server = httptest.NewServer(f)
	t.Cleanup(func() {
		f.CloseClientConnections()
		f.Close()
	})
	return f
}

// bodyKey has the body of a request in its context.
type bodyKey struct{}

func (f *fake) endpoint() string { return strings.TrimPrefix(f.URL, "http://") }

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/v1/status" {
		_ = json.NewEncoder(w).Encode(api.Status{ID: f.id, Leader: 1, Role: api.RoleLeader, Version: "9.9", ClusterID: f.cluster})
		return
	}
	f.calls.Add(1)
	b, err := io.ReadAll(r.Body)
	r = r.WithContext(context.WithValue(r.Context(), bodyKey{}, b))
	if err != nil || f.key != nil && f.key(w, r) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch size, ok := f.keys[r.URL.Path]; {
	case r.Method == http.MethodPut:
		f.keys[r.URL.Path] = len(b)
		w.WriteHeader(http.StatusNoContent)
	case !ok:
		refuse(w, api.CodeKeyNotFound)
	default:
		_, _ = w.Write(make([]byte, size))
	}
}

func refuse(w http.ResponseWriter, code api.Code) {
	w.Header().Set("Content-Type", api.ProblemType)
	w.WriteHeader(code.Status())
	_ = json.NewEncoder(w).Encode(api.Error{Code: code})
}

// bench runs Main for JSON.
func bench(ctx context.Context, args ...string) (res Result, code int, stderr string) {
	var out, err strings.Builder
	code = Main(ctx, append([]string{"--json", "--warmup", "50ms", "--duration", "300ms"}, args...), &out, &err)
	if out.Len() > 0 {
		if jerr := json.Unmarshal([]byte(out.String()), &res); jerr != nil {
			return res, code, fmt.Sprintf("%s\n%v: %s", err.String(), jerr, out.String())
		}
	}
	return res, code, err.String()
}

func TestRunClosed(t *testing.T) {
	t.Parallel()
	f := newFake(t, nil)
	for _, tt := range []struct {
		args string
		want []string // kinds
	}{
		{"--op put --value-size 10 --distribution sequential", []string{"put"}},
		{"--op get --keys 50 --value-size 1000 --consistency stale", []string{"get"}},
		{"--op mixed --keys 50 --reads 0.5 --distribution zipf", []string{"put", "get"}},
		{"--op mixed --keys 50 --distribution latest", []string{"put", "get"}},
	} {
		res, code, stderr := bench(t.Context(), append(strings.Fields(tt.args), "--clients", "4", "--endpoints", f.endpoint())...)
		if code != 0 || res.Ops < 20 || res.ErrorCount != 0 || len(res.Latency) != len(tt.want) || res.Interrupted || res.Loop != "closed" {
			t.Fatalf("%s: exit code %d, %+v\n%s", tt.args, code, res, stderr)
		}
		count := int64(0)
		for _, name := range tt.want {
			l := res.Latency[name]
			count += l.Count
			if !(0 < l.Min && l.Min <= l.P50*1.001 && l.P50 <= l.P90 && l.P90 <= l.P99 && l.P99 <= l.P999 && l.P999 <= l.Max) {
				t.Errorf("%s: %s %+v", tt.args, name, l)
			}
		}
		// The rate counts by the end of a request and latency by its beginning, and
		// there are 4 clients.
		if diff := count - res.Ops; diff < -4 || diff > 4 {
			t.Errorf("%s: %d latencies of %d requests", tt.args, count, res.Ops)
		}
		sum := int64(0)
		for _, n := range res.Throughput.Ops {
			sum += n
		}
		if sum != res.Ops || len(res.Throughput.Ops) != 3 || res.Throughput.IntervalSeconds != 0.1 {
			t.Errorf("%s: %+v of %d", tt.args, res.Throughput, res.Ops)
		}
		if size := float64(res.Options.ValueSize); res.BytesPerSecond < 0.99*size*res.OpsPerSecond || res.BytesPerSecond > 1.01*size*res.OpsPerSecond {
			t.Errorf("%s: %v bytes/s at %v requests/s", tt.args, res.BytesPerSecond, res.OpsPerSecond)
		}
		if !strings.Contains(stderr, "member 1, leader; pontoon 9.9") {
			t.Errorf("%s: does not say what it measures:\n%s", tt.args, stderr)
		}
	}
}

// On a terminal a line tells of each second of the window.
func TestProgressLine(t *testing.T) {
	t.Parallel()
	f := newFake(t, nil)
	o, err := parse([]string{"--endpoints", f.endpoint(), "--warmup", "200ms", "--duration", "1300ms", "--clients", "2"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var line strings.Builder
	if _, err := measure(t.Context(), &o, io.Discard, &line); err != nil {
		t.Fatal(err)
	}
	shown := strings.Split(line.String(), "\r\x1b[K")
	if last := len(shown) - 1; last < 3 || shown[1] != "  warming up" || !strings.HasPrefix(shown[last-1], "     1 s ") ||
		!strings.Contains(shown[last-1], "p99") || shown[last] != "" {
		t.Errorf("%q", shown)
	}
}

// A stall of half a second is one slow request to the closed loop, and hundreds
// to the open one: all that were due meanwhile (coordinated omission).
func TestStallOpenAndClosed(t *testing.T) {
	t.Parallel()
	const stall = 500 * time.Millisecond
	measureStall := func(args ...string) (slow int64, res Result) {
		var once sync.Once
		var gate sync.RWMutex
		var calls atomic.Int64
		f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
			if calls.Add(1) > 50 {
				once.Do(func() {
					gate.Lock()
					<-time.After(stall)
					gate.Unlock()
				})
			}
			gate.RLock()
			defer gate.RUnlock()
			return false
		})
		o, err := parse(append(args, "--endpoints", f.endpoint(), "--warmup", "0s", "--duration", "1500ms"), nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := measure(t.Context(), &o, io.Discard, nil)
		if err != nil {
			t.Fatal(err)
		}
		got.rec.kinds[kindPut].latency.each(func(d time.Duration, n int64) {
			if d > stall/2 {
				slow += n
			}
		})
		return slow, *got
	}
	slow, res := measureStall("--rate", "400", "--clients", "8")
	// Half of the 200 requests of the stall wait for more than half of it.
	if l := res.Latency["put"]; slow < 90 || l.P90 < 200e3 || l.P999 < 450e3 || l.Max < 450e3 {
		t.Errorf("open loop: %d slow requests, %+v", slow, l)
	}
	if o := res.Open; o == nil || o.Scheduled != 600 || o.MostBacklog < 50 || res.Loop != "open" {
		t.Errorf("open loop: %+v", o)
	}
	slow, res = measureStall("--clients", "1")
	if l := res.Latency["put"]; slow < 1 || slow > 3 || l.P90 > 200e3 || l.Max < 450e3 {
		t.Errorf("closed loop: %d slow requests, %+v", slow, l)
	}
}

// each calls f with the top of each bucket that has something.
func (h *histogram) each(f func(d time.Duration, n int64)) {
	for i := range h.counts {
		if n := h.counts[i].Load(); n > 0 {
			f(time.Duration(bucketTop(i)), int64(n))
		}
	}
}

// A server that cannot follow the schedule is told apart from one that can.
func TestRunOpenBehind(t *testing.T) {
	t.Parallel()
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		<-time.After(20 * time.Millisecond)
		return false
	})
	res, code, stderr := bench(t.Context(), "--rate", "2000", "--clients", "4", "--endpoints", f.endpoint())
	if o := res.Open; code != 0 || o == nil || o.Followed || o.Scheduled != 600 || o.Unsent < 400 || o.MostBacklog < 300 || o.Achieved > 300 {
		t.Fatalf("exit code %d, %+v\n%s", code, res.Open, stderr)
	}
	var table strings.Builder
	if code := Main(t.Context(), []string{"--warmup", "0s", "--duration", "200ms", "--rate", "2000", "--clients", "4", "--endpoints", f.endpoint()}, &table, io.Discard); code != 0 || !strings.Contains(table.String(), "DID NOT FOLLOW") {
		t.Errorf("exit code %d\n%s", code, table.String())
	}
	quick := newFake(t, nil)
	if res, code, stderr := bench(t.Context(), "--rate", "50", "--clients", "8", "--endpoints", quick.endpoint()); code != 0 || !res.Open.Followed {
		t.Errorf("exit code %d, %+v\n%s", code, res.Open, stderr)
	}
}

// Errors are counted by status and code, and a server that refuses is not asked
// again at once.
func TestRunErrors(t *testing.T) {
	t.Parallel()
	var n atomic.Int64
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		if n.Add(1)%2 == 0 {
			refuse(w, api.CodeOverloaded)
			return true
		}
		return false
	})
	res, code, stderr := bench(t.Context(), "--clients", "2", "--endpoints", f.endpoint())
	if code != 0 || res.ErrorCount == 0 || res.Errors["429 overloaded"] != res.ErrorCount || res.Ops == 0 {
		t.Fatalf("exit code %d, %d answers, errors %v\n%s", code, res.Ops, res.Errors, stderr)
	}
	if calls := f.calls.Load(); calls > 300 {
		t.Errorf("%d calls of a server that refuses each second one", calls)
	}

	for _, tt := range []struct {
		name string
		key  func(w http.ResponseWriter, r *http.Request) bool
		args string
		want string // counted
		says string
	}{
		{"no leader", func(w http.ResponseWriter, r *http.Request) bool { refuse(w, api.CodeNoLeader); return true }, "", "503 no_leader", "readyz"},
		{"no code", func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(502); return true }, "", "502", "502"},
		{"absent keys", nil, "--op get --fill=false", "404 key_not_found", "--fill=false"},
		{"cut", func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }, "", errorLost, "EOF"},
		{"silent", func(w http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true }, "--timeout 50ms", errorTimeout, "i/o timeout"},
	} {
		f := newFake(t, tt.key)
		res, code, stderr := bench(t.Context(), append(strings.Fields(tt.args), "--clients", "2", "--endpoints", f.endpoint())...)
		if code != 1 || res.Ops != 0 || res.Errors[tt.want] == 0 || !strings.Contains(stderr, tt.says) || !strings.Contains(stderr, f.endpoint()) {
			t.Errorf("%s: exit code %d, %d answers, errors %v\n%s", tt.name, code, res.Ops, res.Errors, stderr)
		}
	}
}

// The keys are written through refusals that pass, and an error that does not
// pass ends the run.
func TestRunFill(t *testing.T) {
	t.Parallel()
	var n atomic.Int64
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		if n.Add(1)%10 == 0 && r.Method == http.MethodPut {
			refuse(w, api.CodeNoLeader)
			return true
		}
		return false
	})
	res, code, stderr := bench(t.Context(), "--op", "get", "--keys", "100", "--endpoints", f.endpoint())
	if code != 0 || res.ErrorCount != 0 || len(f.keys) != 100 || !strings.Contains(stderr, "100 keys written") {
		t.Errorf("exit code %d, %d keys, errors %v\n%s", code, len(f.keys), res.Errors, stderr)
	}
	f = newFake(t, func(w http.ResponseWriter, r *http.Request) bool { refuse(w, api.CodeTooLarge); return true })
	if _, code, stderr = bench(t.Context(), "--op", "get", "--endpoints", f.endpoint()); code != 1 || !strings.Contains(stderr, "413 too_large") {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

// What is measured is looked at first.
func TestRunServers(t *testing.T) {
	t.Parallel()
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	gone := nobody.Addr().String()
	f, other := newFake(t, nil), newFake(t, nil)
	stranger := httptest.NewServer(http.NotFoundHandler())
	defer stranger.Close()

	if _, code, stderr := bench(t.Context(), "--endpoints", gone); code != 1 || !strings.Contains(stderr, gone+": ") || !strings.Contains(stderr, "start a node") {
		t.Errorf("nobody there: exit code %d\n%s", code, stderr)
	}
	if _, code, stderr := bench(t.Context(), "--endpoints", stranger.URL); code != 1 || !strings.Contains(stderr, "404") || !strings.Contains(stderr, "no Pontoon server") {
		t.Errorf("a stranger: exit code %d\n%s", code, stderr)
	}
	res, code, stderr := bench(t.Context(), "--clients", "4", "--endpoints", gone+","+f.URL)
	if code != 0 || len(res.Servers) != 2 || res.Servers[0].Error == "" || res.Servers[1].ID != 1 || !strings.Contains(stderr, "unreachable") || res.Ops == 0 {
		t.Errorf("one of two: exit code %d, %+v\n%s", code, res.Servers, stderr)
	}
	other.cluster = "c2"
	if _, code, stderr := bench(t.Context(), "--endpoints", f.URL+","+other.URL); code != 1 || !strings.Contains(stderr, "different clusters") {
		t.Errorf("two clusters: exit code %d\n%s", code, stderr)
	}
	other.cluster = "c1"
	f.calls.Store(0)
	if _, code, stderr := bench(t.Context(), "--endpoints", f.URL+","+other.URL, "--only", "2"); code != 0 || f.calls.Load() != 0 || other.calls.Load() == 0 {
		t.Errorf("only the second: exit code %d, %d and %d calls\n%s", code, f.calls.Load(), other.calls.Load(), stderr)
	}
	if _, code, stderr := bench(t.Context(), "--endpoints", f.URL+","+other.URL, "--clients", "2"); code != 0 || f.calls.Load() == 0 {
		t.Errorf("both: exit code %d, %d calls\n%s", code, f.calls.Load(), stderr)
	}
}

// Ctrl-C ends a run at once, with the result so far; whatever it waits for.
func TestRunInterrupted(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	var n atomic.Int64
	f := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		if n.Add(1) == 50 {
			cancel()
		}
		return false
	})
	var table, stderr strings.Builder
	code := Main(ctx, []string{"--duration", "1h", "--warmup", "0s", "--clients", "2", "--endpoints", f.endpoint()}, &table, &stderr)
	if code != 0 || !strings.Contains(table.String(), "interrupted") || !strings.Contains(table.String(), "p99.9") {
		t.Errorf("exit code %d\n%s\n%s", code, table.String(), stderr.String())
	}
	if res, code, stderr := bench(ctx, "--endpoints", f.endpoint()); code != 1 || res.Ops != 0 || !strings.Contains(stderr, "interrupted") {
		t.Errorf("before the run: exit code %d\n%s", code, stderr)
	}
	ctx, cancel = context.WithCancel(t.Context())
	stuck := newFake(t, func(w http.ResponseWriter, r *http.Request) bool {
		cancel()
		<-r.Context().Done()
		return true
	})
	res, code, text := bench(ctx, "--duration", "1h", "--warmup", "0s", "--timeout", "1h", "--clients", "2", "--endpoints", stuck.endpoint())
	if code != 1 || res.Errors[errorUnsettled] == 0 {
		t.Errorf("a server that is stuck: exit code %d, errors %v\n%s", code, res.Errors, text)
	}
	for _, args := range [][]string{{"--duration", "1h", "--rate", "0.001"}, {"--op", "get", "--duration", "1h", "--keys", "1000000"}} {
		ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
		if _, code, text := bench(ctx, append(args, "--endpoints", f.endpoint())...); code != 1 && args[0] == "--op" {
			t.Errorf("%v: exit code %d\n%s", args, code, text)
		}
		cancel()
	}
}

// Wrong flags: exit code 2, one line.
func TestMainUsage(t *testing.T) {
	var out, err strings.Builder
	if code := Main(t.Context(), []string{"--op", "x"}, &out, &err); code != 2 || out.Len() > 0 || !strings.HasPrefix(err.String(), "pontoon bench: --op") || strings.Count(err.String(), "\n") != 1 {
		t.Errorf("exit code %d, %q, %q", code, out.String(), err.String())
	}
	err.Reset()
	if code := Main(t.Context(), []string{"-h"}, &out, &err); code != 0 || err.Len() > 0 || !strings.Contains(out.String(), "Usage:") {
		t.Errorf("help: exit code %d, %q, %q", code, out.String(), err.String())
	}
}
