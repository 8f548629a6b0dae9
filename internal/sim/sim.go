// Package sim is what a deterministic simulation needs and what can be said
// without raft: virtual time, chance, a network and a disk that fail, and a
// record of what happened.
//
// It is a package of its own because the rules of the faults (what a network may
// do to a message, what a crash may leave of a log) must not know what they are
// done to. The clusters that are simulated with it are in sim_test.go of the root.
//
// Its nouns: a [Queue] is virtual time, the events in it run one after the
// other; a [Rand] is all the chance of one run, from its seed; a [Net] says
// when a message arrives, if it does; a [Log] is what a crash leaves of records
// that were written and synced; a [Trace] hashes all that happened, so that two
// runs can be told to be the same, and keeps the end of it for people; a
// [Cover] counts which situations a run was in; a [Ledger] is the list of runs
// in a file.
//
//	var q sim.Queue
//	r := sim.NewRand(seed)
//	net := sim.NewNet(r.Fork())
//	for _, delay := range net.Route(1, 2) {
//		q.After(delay, func() { receive(message) })
//	}
//	for q.Now() < time.Minute && q.Step() {
//	}
//
// Caveats: nothing here is safe for more than one goroutine: a simulation has
// but one. Chance must be drawn in an order that follows from the seed alone, so
// never while ranging over a map.
package sim

import (
	"container/heap"
	"math/rand/v2"
	"time"
)

// Rand is a stream of chance.
type Rand struct{ *rand.Rand }

// NewRand returns the stream of a seed.
func NewRand(seed uint64) *Rand { return &Rand{rand.New(rand.NewPCG(seed, 0x706f6e746f6f6e))} }

// Fork returns a stream of its own, so that a part of the simulation that draws
// more often does not change what the other parts draw.
func (r *Rand) Fork() *Rand { return NewRand(r.Uint64()) }

// Chance is true with probability p.
func (r *Rand) Chance(p float64) bool { return p > 0 && r.Float64() < p }

// Between is evenly distributed over [lo, hi).
func (r *Rand) Between(lo, hi time.Duration) time.Duration {
	if hi <= lo {
		return lo
	}
	return lo + time.Duration(r.Int64N(int64(hi-lo)))
}

// Float is evenly distributed over [lo, hi).
func (r *Rand) Float(lo, hi float64) float64 { return lo + r.Float64()*(hi-lo) }

// Pick is one of a list that is not empty.
func Pick[T any](r *Rand, of []T) T { return of[r.IntN(len(of))] }

// Queue is virtual time. The zero Queue stands at 0.
type Queue struct {
	now    time.Duration
	seq    uint64
	events events
}

// Now is the time of the event that runs.
func (q *Queue) Now() time.Duration { return q.now }

// After runs f when d has passed.
func (q *Queue) After(d time.Duration, f func()) { q.At(q.now+d, f) }

// At runs f at the time t, or now if that has passed. Events of one time run in
// the order in which they were asked for.
func (q *Queue) At(t time.Duration, f func()) {
	q.seq++
	heap.Push(&q.events, event{max(t, q.now), q.seq, f})
}

// Step runs the next event; false: there is none.
func (q *Queue) Step() bool {
	if len(q.events) == 0 {
		return false
	}
	e := heap.Pop(&q.events).(event)
	q.now = e.at
	e.f()
	return true
}

type event struct {
	at  time.Duration
	seq uint64
	f   func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].seq < e[j].seq
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(v any)   { *e = append(*e, v.(event)) }
func (e *events) Pop() any {
	last := len(*e) - 1
	v := (*e)[last]
	(*e)[last] = event{}
	*e = (*e)[:last]
	return v
}
