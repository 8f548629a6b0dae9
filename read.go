package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/raft/v3"

	"pontoon/kv"
)

// A linearizable read must see every write that was acknowledged before it
// began. The leader proves that it still leads by a round of heartbeats and
// names its commit index (thesis 6.4); once this member has applied that far,
// its own state is as good as the leader's.
//
// All reads that wait at the same moment share one such round:
//
//	handler → join the open batch → loop: ReadIndex(context) → ReadState(index)
//	        → applied ≥ index → batch done → every handler reads the state
//
// What goes wrong without care: a request is lost without a
// word, so each attempt has a deadline in ticks; a context that is used twice
// can be answered with an older index, so each attempt draws a new one; a
// leader's commit index is only known to be current after it has committed an
// entry of its own term, which raft does not check for a single voter, so
// issueReads does.

// readBatch is one group of reads that share a ReadIndex.
type readBatch struct {
	opened time.Time     // for the metric only
	since  uint64        // tick at which the loop first saw it
	err    error         // set before done is closed
	done   chan struct{} // closed when the state may be read, or with err
}

func (b *readBatch) finish(err error) {
	b.err = err
	close(b.done)
}

// readAttempt is one ReadIndex on its way.
type readAttempt struct {
	batch *readBatch
	tick  uint64
}

// While one ReadIndex is under way the next reads gather: fewer rounds measured
// faster than earlier ones, in throughput at any number of clients. Only where a
// round takes longer than a tick, as between distant sites, do more overlap.
const (
	maxReadAttempts = 4
	readRetryTicks  = 3
)

// readQueue hands batches from handlers to the loop.
type readQueue struct {
	wake chan struct{} // capacity 1
	mu   struct {
		sync.Mutex
		open   *readBatch // handlers join it; nil: none waits
		closed error
	}
	// loop
	waiting  []*readBatch // seen by the loop, no attempt under way
	attempts map[string]readAttempt
	issued   uint64 // tick of the last attempt
}

// room says whether another ReadIndex may be issued at tick now.
func (q *readQueue) room(now uint64) bool {
	return len(q.attempts) == 0 || len(q.attempts) < maxReadAttempts && now > q.issued
}

func (q *readQueue) init() {
	q.wake = make(chan struct{}, 1)
	q.attempts = map[string]readAttempt{}
}

// join adds the caller to the batch that the loop takes next.
func (q *readQueue) join() *readBatch {
	q.mu.Lock()
	defer q.mu.Unlock()
	b := q.mu.open
	if b == nil {
		b = &readBatch{opened: time.Now(), done: make(chan struct{})}
		if q.mu.closed != nil {
			b.finish(q.mu.closed)
			return b
		}
		q.mu.open = b
		select {
		case q.wake <- struct{}{}:
		default:
		}
	}
	return b
}

// pending says that a ReadIndex could be issued at tick now.
func (q *readQueue) pending(now uint64) bool {
	if !q.room(now) {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.waiting) > 0 || q.mu.open != nil
}

func (q *readQueue) take() *readBatch {
	q.mu.Lock()
	defer q.mu.Unlock()
	b := q.mu.open
	q.mu.open = nil
	return b
}

// issueReads starts a ReadIndex for the reads that wait, if one could succeed.
func (n *raftNode) issueReads() {
	q := &n.reads
	if n.mayRead() && q.room(n.ticks) || n.now.lead == raft.None {
		if b := q.take(); b != nil {
			b.since = n.ticks
			q.waiting = append(q.waiting, b)
		}
	}
	if !n.mayRead() {
		return
	}
	for len(q.waiting) > 0 && q.room(n.ticks) {
		b := q.waiting[0]
		q.waiting = q.waiting[1:]
		ctx := make([]byte, 16)
		rand.Read(ctx) // never fails (crypto/rand)
		q.attempts[string(ctx)], q.issued = readAttempt{b, n.ticks}, n.ticks
		n.met.readIndexes.Inc()
		n.raw.ReadIndex(ctx)
	}
}

// mayRead: nobody leads, or we lead and have not committed in this term yet:
// then any answer would be late or wrong.
func (n *raftNode) mayRead() bool {
	switch {
	case n.now.lead == raft.None:
		return false
	case n.now.state == raft.StateLeader:
		return n.committedTerm == n.now.term
	}
	return true
}

// finishReads releases the batches that raft answered, once this member has
// applied as far as the answer says.
func (n *raftNode) finishReads(states []raft.ReadState) {
	for _, s := range states {
		a, ok := n.reads.attempts[string(s.RequestCtx)]
		if !ok {
			continue // given up on, or not ours
		}
		delete(n.reads.attempts, string(s.RequestCtx))
		n.applied.Call(s.Index, func() {
			n.met.readWait.Observe(time.Since(a.batch.opened).Seconds())
			a.batch.finish(nil)
		})
	}
}

// retryReads starts anew the attempts that were lost: those that are old, or all
// of them once leadership moved, since whoever they went to leads no more.
func (n *raftNode) retryReads(all bool) {
	q := &n.reads
	for ctx, a := range q.attempts { // order: does not matter, they are equal
		if all || n.ticks-a.tick >= readRetryTicks {
			delete(q.attempts, ctx)
			q.waiting = append(q.waiting, a.batch)
			n.met.readRetries.Inc()
		}
	}
}

// expire ends the batches for which old holds.
func (q *readQueue) expire(old func(*readBatch) bool, err error) {
	kept := q.waiting[:0]
	for _, b := range q.waiting {
		if old(b) {
			b.finish(err)
		} else {
			kept = append(kept, b)
		}
	}
	q.waiting = kept
}

// close ends every batch, now and later.
func (q *readQueue) close(err error) {
	q.mu.Lock()
	q.mu.closed = err
	b := q.mu.open
	q.mu.open = nil
	q.mu.Unlock()
	if b != nil {
		b.finish(err)
	}
	q.expire(func(*readBatch) bool { return true }, err)
	for _, a := range q.attempts { // order: does not matter, all end alike
		a.batch.finish(err)
	}
	q.attempts = nil
}

// linearize returns once this member's state is at least as new as every write
// acknowledged before the call.
func (s *kvstore) linearize(ctx context.Context) error {
	b := s.node.reads.join()
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		if s.leader() == raft.None {
			return errNoLeader
		}
		return errReadTimeout
	case <-s.node.doneC:
		return errStopping
	}
}

// get reads one key (see readOptions for how fresh).
func (s *kvstore) get(ctx context.Context, key string, o readOptions) (kv.Entry, int64, error) {
	if !o.stale {
		if err := s.linearize(ctx); err != nil {
			return kv.Entry{}, 0, err
		}
	}
	if o.minRevision > 0 {
		if err := s.awaitRevision(ctx, o.minRevision); err != nil {
			return kv.Entry{}, 0, err
		}
	}
	s.mu.RLock()
	e, ok := s.mu.state.Get(key)
	rev := s.mu.state.Revision()
	s.mu.RUnlock()
	if !ok {
		return kv.Entry{}, rev, errKeyNotFound
	}
	return e, rev, nil
}

// awaitRevision returns once this member has applied revision.
func (s *kvstore) awaitRevision(ctx context.Context, revision int64) error {
	reached := make(chan struct{})
	defer s.revision.Call(uint64(revision), func() { close(reached) })()
	select {
	case <-reached:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: this member has applied revision %d, not yet %d", errReadTimeout, s.revision.At(), revision)
	case <-s.node.doneC:
		return errStopping
	}
}
