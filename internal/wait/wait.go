// Package wait lets callers wait for a number that only grows, such as the
// applied index or the store revision.
//
// It is a package of its own because two owners use it (the applied index and
// the revision) and its rules need no raft: a callback runs exactly once, at
// once if the number is already there, else inside the Advance that reaches it.
//
//	var applied wait.Index
//	done := applied.Wait(42)
//	go applied.Advance(42)
//	<-done
//
// Caveats: callbacks run on the goroutine that calls Advance (or Call) and must
// not block. Who stops waiting must call what Call returned: the entry would stay
// until the number comes by, which may be never.
package wait

import (
	"container/heap"
	"sync"
)

// Index is a number that only grows. The zero value is ready and stands at 0.
type Index struct {
	mu struct {
		sync.Mutex
		at      uint64
		waiting calls
	}
}

// Call runs f once the number is at least target, unless cancel is called first.
func (x *Index) Call(target uint64, f func()) (cancel func()) {
	c := &call{target: target, f: f}
	x.mu.Lock()
	if x.mu.at < target {
		heap.Push(&x.mu.waiting, c)
		x.mu.Unlock()
		return func() { x.cancel(c) }
	}
	x.mu.Unlock()
	f()
	return func() {}
}

func (x *Index) cancel(c *call) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if c.place >= 0 {
		heap.Remove(&x.mu.waiting, c.place)
	}
}

// Wait returns a channel that is closed once the number is at least target. It
// is for callers that stay until then.
func (x *Index) Wait(target uint64) <-chan struct{} {
	done := make(chan struct{})
	x.Call(target, func() { close(done) })
	return done
}

// Waiting is how many callbacks are pending.
func (x *Index) Waiting() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.mu.waiting)
}

// Advance moves the number up to at and runs what waited for it, lowest target
// first. A smaller at changes nothing.
func (x *Index) Advance(at uint64) {
	x.mu.Lock()
	var due []func()
	if at > x.mu.at {
		x.mu.at = at
		for len(x.mu.waiting) > 0 && x.mu.waiting[0].target <= at {
			due = append(due, heap.Pop(&x.mu.waiting).(*call).f)
		}
	}
	x.mu.Unlock()
	for _, f := range due {
		f()
	}
}

// At is where the number stands.
func (x *Index) At() uint64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.mu.at
}

type call struct {
	target uint64
	f      func()
	place  int // in the heap; -1 once it has left
}

// calls is a heap by target.
type calls []*call

func (c calls) Len() int           { return len(c) }
func (c calls) Less(i, j int) bool { return c[i].target < c[j].target }
func (c calls) Swap(i, j int) {
	c[i], c[j] = c[j], c[i]
	c[i].place, c[j].place = i, j
}

func (c *calls) Push(v any) {
	x := v.(*call)
	x.place = len(*c)
	*c = append(*c, x)
}

func (c *calls) Pop() any {
	last := len(*c) - 1
	x := (*c)[last]
	(*c)[last] = nil
	*c = (*c)[:last]
	x.place = -1
	return x
}
