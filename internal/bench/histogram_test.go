package bench

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// Each value is in a bucket whose top is at most 1/1024 above it, and buckets
// ascend without a gap.
func TestBuckets(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	values := []int64{0, 1, 1023, 1024, 2047, 2048, 2049, 4095, 4096, longest - 1, longest}
	for range 100_000 {
		values = append(values, rng.Int64N(longest)>>rng.IntN(topBits))
	}
	for _, v := range values {
		i := bucket(v)
		top := bucketTop(i)
		if i < 0 || i >= buckets || top < v || top-v > v/1024 {
			t.Fatalf("%d is in bucket %d, whose top is %d", v, i, top)
		}
		if i > 0 && bucketTop(i-1) >= v {
			t.Fatalf("%d is in bucket %d, and bucket %d reaches up to %d", v, i, i-1, bucketTop(i-1))
		}
	}
	if bucket(longest) != buckets-1 || bucketTop(buckets-1) != longest {
		t.Errorf("the last bucket is %d up to %d", bucket(longest), bucketTop(buckets-1))
	}
}

// The dumb twin is a sorted slice.
func TestHistogramAgainstSorted(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for _, n := range []int{1, 2, 3, 99, 100, 101, 20_000} {
		var h histogram
		var all []time.Duration
		sum := time.Duration(0)
		for range n {
			d := time.Duration(math.Exp(rng.NormFloat64()*2) * float64(time.Millisecond))
			h.record(d)
			all = append(all, d)
			sum += d
		}
		slices.Sort(all)
		if h.minimum() != all[0] || h.maximum() != all[n-1] || h.mean() != sum/time.Duration(n) {
			t.Fatalf("%d values: min %v, max %v, mean %v; want %v, %v, %v", n, h.minimum(), h.maximum(), h.mean(), all[0], all[n-1], sum/time.Duration(n))
		}
		for _, q := range []float64{0, 0.25, 0.5, 0.9, 0.99, 0.999, 1} {
			want := all[max(int(math.Ceil(q*float64(n))), 1)-1]
			if got := h.quantile(q); got < want || got-want > want/1024 {
				t.Errorf("quantile %v of %d values: %v, want %v", q, n, got, want)
			}
		}
	}
}

func TestHistogramEdges(t *testing.T) {
	var h histogram
	if h.minimum() != 0 || h.maximum() != 0 || h.mean() != 0 || h.quantile(0.5) != 0 {
		t.Error("an empty histogram has values")
	}
	h.record(-time.Second)
	if h.minimum() != 0 || h.maximum() != 0 || h.quantile(1) != 0 || h.count.Load() != 1 {
		t.Error("a negative duration does not count as 0")
	}
	h.record(1000 * time.Hour)
	if h.maximum() != longest || h.quantile(1) != longest {
		t.Errorf("an endless duration counts as %v", h.maximum())
	}
}

func TestHistogramConcurrent(t *testing.T) {
	var h histogram
	var wg sync.WaitGroup
	const each = 2000
	for i := range 8 {
		wg.Go(func() {
			for j := range each {
				h.record(time.Duration(i*each + j))
			}
		})
	}
	wg.Wait()
	if h.count.Load() != 8*each || h.minimum() != 0 || h.maximum() != 8*each-1 || h.mean() != (8*each-1)/2 {
		t.Errorf("%d values, %v to %v, mean %v", h.count.Load(), h.minimum(), h.maximum(), h.mean())
	}
}

// What happened between two moments is the difference of two snapshots.
func TestSnapshotDifference(t *testing.T) {
	var a, b histogram
	before, after := new(snapshot), new(snapshot)
	for range 100 {
		a.record(time.Millisecond)
	}
	before.add(&a)
	before.add(&b)
	for range 50 {
		b.record(time.Second)
	}
	after.add(&a)
	after.add(&b)
	if after.count != 150 || after.quantile(0.5) > 2*time.Millisecond {
		t.Errorf("all: %d, p50 %v", after.count, after.quantile(0.5))
	}
	after.sub(before)
	if after.count != 50 || after.quantile(0.01) < time.Second {
		t.Errorf("since: %d, p1 %v", after.count, after.quantile(0.01))
	}
}

func BenchmarkRecord(b *testing.B) {
	var h histogram
	b.RunParallel(func(pb *testing.PB) {
		for d := time.Duration(0); pb.Next(); d += 1013 {
			h.record(d)
		}
	})
}
