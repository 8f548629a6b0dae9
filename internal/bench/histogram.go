package bench

import (
	"math"
	"math/bits"
	"sync/atomic"
	"time"
)

// histogram counts durations of up to 73 minutes at a relative error of at most
// 1/1024, three significant digits, as HDR histograms do: below 2048 ns each
// nanosecond has a bucket of its own, and each doubling above has 1024 of one width.
//
// Any number of goroutines may record and read at once; 272 KB serve a thousand
// clients. The well-kept library of this kind wants one histogram per recording
// goroutine, or a lock, and brings a log format, encoders and (in go.sum) a
// plotting library's arithmetic for what are these hundred lines.
//
// The zero value is ready.
type histogram struct {
	counts [buckets]atomic.Uint64
	count  atomic.Uint64
	sum    atomic.Int64 // ns
	least  atomic.Int64 // 1 + the least recorded value; 0: none yet
	most   atomic.Int64
}

const (
	subBits = 10                                 // 1024 buckets a doubling
	topBits = 42                                 // longer durations count as 2^42-1 ns
	buckets = (topBits - subBits + 1) << subBits // the first 2048 are 1 ns wide
	longest = 1<<topBits - 1
)

// bucket is the place of v, 0 to longest.
func bucket(v int64) int {
	shift := max(bits.Len64(uint64(v))-subBits-1, 0)
	return shift<<subBits + int(v>>shift)
}

// bucketTop is the largest value of bucket i.
func bucketTop(i int) int64 {
	shift := max(i>>subBits-1, 0)
	return (int64(i-shift<<subBits)+1)<<shift - 1
}

// record adds one duration. A negative one, which a clock that went back would
// make, counts as 0.
func (h *histogram) record(d time.Duration) {
	v := min(max(int64(d), 0), longest)
	h.counts[bucket(v)].Add(1)
	h.sum.Add(v)
	for {
		old := h.least.Load()
		if old != 0 && old <= v+1 || h.least.CompareAndSwap(old, v+1) {
			break
		}
	}
	for {
		old := h.most.Load()
		if old >= v || h.most.CompareAndSwap(old, v) {
			break
		}
	}
	h.count.Add(1)
}

// minimum and maximum are exact; both are 0 while nothing is recorded.
func (h *histogram) minimum() time.Duration { return time.Duration(max(h.least.Load()-1, 0)) }
func (h *histogram) maximum() time.Duration { return time.Duration(h.most.Load()) }

func (h *histogram) mean() time.Duration {
	n := h.count.Load()
	if n == 0 {
		return 0
	}
	return time.Duration(h.sum.Load() / int64(n))
}

// quantile is the least duration that at least the fraction q of all does not
// exceed: quantile(0.99) is the p99. It is at most 1/1024 above the true one.
func (h *histogram) quantile(q float64) time.Duration {
	var s snapshot
	s.add(h)
	return min(max(s.quantile(q), h.minimum()), h.maximum())
}

// snapshot is the counts of histograms at one moment, for what happened between
// two moments. One goroutine uses it.
type snapshot struct {
	counts [buckets]uint64
	count  uint64
}

// add adds what h holds now. Durations that are recorded meanwhile are in it or
// are not; count is the sum of what is.
func (s *snapshot) add(h *histogram) {
	for i := range h.counts {
		n := h.counts[i].Load()
		s.counts[i] += n
		s.count += n
	}
}

// sub takes an earlier snapshot of the same histograms away.
func (s *snapshot) sub(earlier *snapshot) {
	for i, n := range earlier.counts {
		s.counts[i] -= n
	}
	s.count -= earlier.count
}

func (s *snapshot) quantile(q float64) time.Duration {
	if s.count == 0 {
		return 0
	}
	rank := max(uint64(math.Ceil(q*float64(s.count))), 1)
	seen := uint64(0)
	for i, n := range s.counts {
		if seen += n; seen >= rank {
			return time.Duration(bucketTop(i))
		}
	}
	return longest
}
