package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.etcd.io/raft/v3"

	"pontoon/internal/watch"
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
	seq   uint64 // counts the attempts
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
	seq      uint64 // of the last attempt
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
		q.seq++
		q.attempts[string(ctx)], q.issued = readAttempt{b, n.ticks, q.seq}, n.ticks
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
	var lost []readAttempt
	for ctx, a := range q.attempts { // order: sorted below
		if all || n.ticks-a.tick >= readRetryTicks {
			delete(q.attempts, ctx)
			lost = append(lost, a)
			n.met.readRetries.Inc()
		}
	}
	slices.SortFunc(lost, func(a, b readAttempt) int { return compare(a.seq, b.seq) })
	for _, a := range lost {
		q.waiting = append(q.waiting, a.batch)
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

// sync returns once the local state is as fresh as o asks for. A revision that
// no entry has made yet is refused; whether it is still known is for the View.
func (s *kvstore) sync(ctx context.Context, o readOptions) error {
	if !o.stale {
		if err := s.linearize(ctx); err != nil {
			return err
		}
	}
	if o.minRevision > 0 {
		if err := s.awaitRevision(ctx, o.minRevision); err != nil {
			return err
		}
	}
	return s.fit(ctx)
}

// get reads one key (see readOptions for how fresh).
func (s *kvstore) get(ctx context.Context, key string, o readOptions) (kv.Entry, int64, error) {
	if err := s.sync(ctx, o); err != nil {
		return kv.Entry{}, 0, err
	}
	if o.revision > 0 {
		return s.getAt(ctx, key, o.revision)
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

// getAt reads one key as it was. If it has changed since, what was there before is
// looked for in the history: without the lock, and in one of the places of mayUndo.
func (s *kvstore) getAt(ctx context.Context, key string, revision int64) (kv.Entry, int64, error) {
	e, _, ok, err := s.unchanged(key, revision)
	if ok || err != nil {
		return e, revision, err
	}
	done, err := s.mayUndo(ctx, revision)
	if err != nil {
		return kv.Entry{}, 0, err
	}
	defer done()
	e, h, ok, err := s.unchanged(key, revision) // again: a history that waits holds what the state drops
	if ok || err != nil {
		return e, revision, err
	}
	if e, ok = h.Before(key, revision); !ok {
		return kv.Entry{}, revision, errKeyNotFound
	}
	if e.Lease != 0 {
		s.mu.RLock()
		l, _ := s.mu.state.Lease(e.Lease) // one that has ended has no label
		s.mu.RUnlock()
		e.Expires = l.Expires
	}
	return e, revision, nil
}

// unchanged returns the entry under key if it has been there since revision, and
// else the history of the same moment.
func (s *kvstore) unchanged(key string, revision int64) (kv.Entry, kv.History, bool, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if _, err := s.view(s.mu.state, revision); err != nil {
		return kv.Entry{}, kv.History{}, false, err
	}
	e, ok := s.mu.state.Get(key)
	if !ok || e.ModRevision > revision {
		return kv.Entry{}, s.mu.state.History(), false, nil
	}
	return e, kv.History{}, true, nil
}

// view names the revisions that a refusal is about.
func (s *kvstore) view(st *kv.State, revision int64) (*kv.View, error) {
	v, err := st.View(revision)
	switch {
	case errors.Is(err, kv.ErrCompacted):
		return nil, &compactedError{st.History().Compacted()}
	case errors.Is(err, kv.ErrFuture):
		return nil, fmt.Errorf("%w: revision %d, the store is at %d", errFutureRevision, revision, st.Revision())
	}
	return v, err
}

// read calls f with the store as o asks for it. An older revision has to undo
// what came later, and whole says that f takes long: both work on a clone, so
// that the apply loop does not wait. The clone costs it a copy of the tree nodes
// that it writes next, so a page of the present state goes without. To undo takes a
// copy of all that came later, so only maxUndoing reads do it at once.
func (s *kvstore) read(ctx context.Context, o readOptions, whole bool, f func(*kv.View) error) error {
	if err := s.sync(ctx, o); err != nil {
		return err
	}
	if whole || o.revision > 0 {
		done, err := s.mayUndo(ctx, o.revision)
		if err != nil {
			return err
		}
		defer done()
		s.mu.Lock()
		st := s.mu.state.Clone()
		s.mu.Unlock()
		v, err := s.view(st, o.revision)
		if err != nil {
			return err
		}
		if err := v.Prepare(ctx.Err); err != nil {
			return errReadTimeout
		}
		if whole { // f takes its time; what it holds, the caller bounds
			done()
		}
		return f(v)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	v, err := s.view(s.mu.state, 0)
	if err != nil {
		return err
	}
	return f(v)
}

// mayUndo waits until this read may undo what came after revision, if anything did.
func (s *kvstore) mayUndo(ctx context.Context, revision int64) (done func(), err error) {
	s.mu.RLock()
	present := s.mu.state.Revision()
	s.mu.RUnlock()
	if revision == 0 || revision >= present {
		return func() {}, nil
	}
	select {
	case s.undoing <- struct{}{}:
		return sync.OnceFunc(func() { <-s.undoing }), nil
	case <-ctx.Done():
		return nil, errReadTimeout
	case <-s.node.doneC:
		return nil, errStopping
	}
}

// history returns the changes that are still known.
func (s *kvstore) history(ctx context.Context, o readOptions) (kv.History, error) {
	if err := s.sync(ctx, o); err != nil {
		return kv.History{}, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.mu.state.History(), nil
}

// lease tells about one lease. What remains is extrapolated from the last tick.
func (s *kvstore) lease(ctx context.Context, id int64, o readOptions) (leaseInfo, error) {
	if err := s.sync(ctx, o); err != nil {
		return leaseInfo{}, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	l, ok := s.mu.state.Lease(id)
	if !ok {
		return leaseInfo{}, errLeaseNotFound
	}
	v, err := s.view(s.mu.state, 0)
	if err != nil {
		return leaseInfo{}, err
	}
	info := leaseInfo{Lease: l, remaining: l.TTL, keys: v.LeaseKeys(id, maxLeaseKeys)}
	if c := s.node.clock.Load(); l.Deadline != 0 && c != nil {
		info.remaining = max(0, time.Duration(l.Deadline-c.read(s.node.time()))*time.Millisecond)
	}
	return info, nil
}

// subscribe begins a watch at the local state as it is. The hub may be busy for as
// long as a large revision takes, so it is asked without the lock that the apply loop
// wants. What is applied meanwhile is published later, or was published already:
// then the hub cuts the watcher, and the next one begins at a newer state. One that
// had no luck so often is handed out cut, and its client begins anew.
func (s *kvstore) subscribe(f watch.Filter, initial bool) (*watch.Watcher, kv.History, *kv.View, error) {
	const attempts = 10
	if err := s.fitNow(); err != nil {
		return nil, kv.History{}, nil, err
	}
	for attempt := 1; ; attempt++ {
		h, st := s.present(initial)
		w, err := s.hub.Add(f, h.Revision())
		if err != nil {
			return nil, h, nil, err
		}
		if attempt < attempts && w.IsCut() {
			w.Close()
			continue
		}
		if s.revision.At() > uint64(h.Revision()) {
			s.publishChanges() // apply saw no watcher
		}
		if !initial {
			return w, h, nil, nil
		}
		v, err := s.view(st, 0)
		return w, h, v, err
	}
}

// present returns the history and, if it is wanted, a clone of the state of that moment.
func (s *kvstore) present(clone bool) (kv.History, *kv.State) {
	if clone {
		s.mu.Lock() // Clone counts as a write
		defer s.mu.Unlock()
		return s.mu.state.History(), s.mu.state.Clone()
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.mu.state.History(), nil
}

// dispatch hands every change to the watchers, in order, from the history that
// the state keeps: it needs no queue of its own, and the apply loop never waits
// for it. If it should fall so far behind that changes are gone, the watchers
// are told.
func (s *kvstore) dispatch(ctx context.Context) {
	defer s.hub.Close()
	next := s.revision.At() + 1
	for {
		select {
		case <-s.published:
		case <-ctx.Done():
			return
		}
		switch s.standing() {
		case doubts:
			continue // there is a nudge when it is settled
		case diverged:
			s.hub.Lost()
			continue
		}
		next = s.fanOut(next)
	}
}

// fanOut publishes the history from revision next on, and returns where to go on.
func (s *kvstore) fanOut(next uint64) uint64 {
	s.mu.RLock()
	h := s.mu.state.History()
	s.mu.RUnlock()
	after := uint64(h.Revision()) + 1
	if s.hub.Skip(h.Revision()) {
		return after
	}
	next = max(next, uint64(s.hub.Published())+1) // nobody wants what came before the watchers that are here
	if uint64(h.Compacted()) >= next {
		for !s.hub.Skip(h.Revision()) { // who came since may have read an older state
			s.hub.Lost()
		}
		return after
	}
	var events []kv.Event
	h.Events(int64(next), func(e kv.Event) bool {
		if len(events) > 0 && events[0].Revision != e.Revision {
			s.hub.Publish(events[0].Revision, events)
			events = nil
		}
		events = append(events, e)
		return true
	})
	if len(events) > 0 {
		s.hub.Publish(events[0].Revision, events)
	}
	return after
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
