package bench

import (
	"math"
	"sync/atomic"
	"time"
)

// schedule is the open loop's: request i begins i/rate after the beginning,
// whatever has become of the requests before it. Clients take the requests in
// order; one that is taken late has been waiting since its time, and its
// latency begins there. So a server that stalls for a second is charged with all
// the requests of that second and not with the few that had room to be
// sent (coordinated omission).
type schedule struct {
	rate  float64 // requests per second; 0: there is no schedule
	taken atomic.Int64
}

// take returns when the next request is to begin, from the beginning on.
func (s *schedule) take() time.Duration {
	return s.at(s.taken.Add(1) - 1)
}

func (s *schedule) at(i int64) time.Duration {
	return time.Duration(float64(i) * float64(time.Second) / s.rate)
}

// due counts the requests that are to begin before the given time.
func (s *schedule) due(t time.Duration) int64 {
	if t <= 0 {
		return 0
	}
	n := int64(math.Ceil(t.Seconds() * s.rate))
	for n > 0 && s.at(n-1) >= t { // rounding
		n--
	}
	for s.at(n) < t {
		n++
	}
	return n
}

// backlog counts the requests that should have begun by now and were not taken.
func (s *schedule) backlog(now time.Duration) int64 {
	if s.rate == 0 {
		return 0
	}
	return max(s.due(now)-s.taken.Load(), 0)
}
