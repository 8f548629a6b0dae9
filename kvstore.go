package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"pontoon/internal/wait"
	"pontoon/internal/watch"
	"pontoon/kv"
)

// kvstore is the replicated store as a handler sees it: it proposes and waits,
// and its readCommits goroutine applies what raft committed.
//
// readCommits alone writes the state; handlers read it under the lock. Values
// in the state are never modified, so what a handler took out stays valid
// after the lock is gone.
type kvstore struct {
	node *raftNode
	disk snapshotWriter
	cfg  Config
	log  *zap.Logger
	met  *nodeMetrics

	applied   *wait.Index // shared with the loop, which makes reads wait for it
	revision  wait.Index
	started   time.Time
	diskLow   atomic.Bool // set by the disk watcher
	stopping  atomic.Bool // set once this member shuts down
	hub       watch.Hub
	published chan struct{}               // capacity 1: there may be changes to hand to the hub
	undoing   chan struct{}               // capacity maxUndoing: reads of an older revision; more wait
	failC     chan error                  // capacity 1: why nothing more can be applied
	write     func(snapHeader, *kv.State) // starts the snapshot-writer; set before anything runs

	mu struct {
		sync.RWMutex
		state *kv.State
	}

	// readCommits
	table *membership // as of the last applied entry
	term  uint64      // of the last applied entry
	since struct {
		entries uint64
		bytes   int64
	} // applied after the last snapshot
	snapping bool
	results  []kv.Result // scratch
	batch    kv.Batch    // scratch
	snapped  chan int64  // capacity 1: the running snapshot is done; its size, or snapPutOff
	snapSize int64
	broken   chan error // capacity 1: a snapshot writer found the state broken
	div      divergence
	settled  broadcast // tells that the standing changed
	snapNext time.Time // no snapshot before, see snapRetry
}

func newKVStore(n *raftNode, r *recovered, disk snapshotWriter) *kvstore {
	s := &kvstore{node: n, disk: disk, cfg: n.cfg, log: n.log, met: n.met, applied: n.applied, started: n.time(),
		failC: make(chan error, 1), broken: make(chan error, 1), snapped: make(chan int64, 1), published: make(chan struct{}, 1), undoing: make(chan struct{}, maxUndoing), table: n.members.Load(), term: r.snap.Term}
	// goroutine: snapshot-writer
	s.write = func(h snapHeader, state *kv.State) { go s.writeSnapshot(h, state) }
	s.mu.state = r.state
	s.div.agreed = r.snap.Index
	s.applied.Advance(r.state.Applied())
	s.revision.Advance(uint64(r.state.Revision()))
	s.hub.SetLimit(maxWatches)
	s.publishClock()
	return s
}

var proposals = sync.Pool{New: func() any { return &proposal{done: make(chan struct{}, 1)} }}

// propose gives one command to raft and waits for its result: it returns once
// the command is on disk at a majority, committed and applied here. An error
// other than errCommitTimeout means that the command did not and will never
// happen.
func (s *kvstore) propose(ctx context.Context, c *kv.Command) (kv.Result, error) {
	if s.diskLow.Load() {
		return kv.Result{}, errDiskLow
	}
	if err := s.fit(ctx); err != nil {
		return kv.Result{}, err
	}
	p := s.newProposal(c)
	size := int64(len(p.command))
	if s.node.offered.Add(size) > maxOffered {
		s.node.offered.Add(-size)
		return kv.Result{}, errOverloaded
	}
	select {
	case s.node.proposeC <- p:
	case <-ctx.Done():
		s.node.offered.Add(-size)
		return kv.Result{}, s.notProposed()
	case <-s.node.doneC:
		return kv.Result{}, errStopping
	}
	select {
	case <-p.done:
		return p.outcome()
	case <-ctx.Done():
	case <-s.node.doneC:
	}
	return s.abandon(p)
}

func (s *kvstore) newProposal(c *kv.Command) *proposal {
	s.met.proposals.Inc()
	p := proposals.Get().(*proposal)
	p.state.Store(queued)
	p.command = kv.AppendCommand(p.command[:0], c)
	return p
}

// outcome is for the handler that received from p.done; p is not its own any more.
func (p *proposal) outcome() (kv.Result, error) {
	r, err := p.result, p.err
	p.result, p.err = kv.Result{}, nil
	proposals.Put(p)
	return r, err
}

// abandon gives up on p and says what is known of it. p stays with the loop: it
// is not pooled again.
func (s *kvstore) abandon(p *proposal) (kv.Result, error) {
	switch p.state.Swap(abandoned) {
	case queued:
		return kv.Result{}, s.notProposed()
	case abandoned: // the loop refused it just now
		<-p.done
		return p.result, p.err
	}
	select {
	case <-p.done: // applied just now
		return p.result, p.err
	default:
		return kv.Result{}, errCommitTimeout
	}
}

// notProposed says why a command never reached raft.
func (s *kvstore) notProposed() error {
	select {
	case <-s.node.doneC:
		return errStopping
	default:
	}
	if s.leader() == raft.None {
		return errNoLeader
	}
	return errNotProposed
}

// late says why a membership change was not done in time.
func (s *kvstore) late() error {
	if s.leader() == raft.None {
		return errNoLeader
	}
	return errCommitTimeout
}

func (s *kvstore) leader() uint64 { return s.node.soft.Load().lead }

// readCommits applies what raft committed, in order, until commitC is closed.
// It is the only goroutine that changes the state.
func (s *kvstore) readCommits(commitC <-chan *commit) {
	scrub := time.NewTicker(scrubEvery)
	defer scrub.Stop()
	for {
		select {
		case c, ok := <-commitC:
			if !ok {
				return
			}
			if err := s.apply(c); err != nil {
				s.failC <- err
				for range commitC { // the loop must not block on us; nothing is applied any more
				}
				return
			}
			if s.snapshotDue() {
				s.snapshot()
			}
		case <-s.node.snapReqC:
			s.snapshot()
		case size := <-s.snapped:
			s.snapshotEnded(size)
		case <-scrub.C:
			s.scrub()
			s.publishTestimony()
		case err := <-s.broken:
			s.diverge(err.Error())
			s.publishTestimony()
		}
	}
}

// apply carries out one commit. Everybody who waits for its results or for its
// index is released only after the state shows it.
func (s *kvstore) apply(c *commit) error {
	if c.snapshot != nil {
		if err := s.restore(c.snapshot); err != nil {
			return err
		}
	}
	for _, e := range c.entries {
		if err := s.applyEntry(e, c.confs); err != nil {
			return err
		}
		s.since.entries++
		s.since.bytes += int64(len(e.GetData()))
		s.term = e.GetTerm()
	}
	s.mu.RLock()
	index, rev := s.mu.state.Applied(), s.mu.state.Revision()
	s.mu.RUnlock()
	s.publishClock()
	s.publishTestimony()
	s.applied.Advance(index)
	if s.revision.Advance(uint64(rev)); s.hub.Len() > 0 {
		s.publishChanges()
	}
	return nil
}

// publishChanges wakes the dispatcher.
func (s *kvstore) publishChanges() {
	select {
	case s.published <- struct{}{}:
	default: // it will look anyway
	}
}

func (s *kvstore) applyEntry(e *raftpb.Entry, confs []confResult) error {
	index := e.GetIndex()
	if e.GetType() != raftpb.EntryNormal || len(e.GetData()) == 0 {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.mu.state.SetApplied(index)
		for _, c := range confs {
			if c.index == index && c.err == nil {
				s.table = c.members
				if c.change.Op == opRemove {
					s.mu.state.ForgetNode(c.change.Member.ID)
					s.div.changed = true
				}
			}
		}
		return nil
	}
	if err := kv.DecodeBatch(e.GetData(), &s.batch); err != nil {
		return fmt.Errorf("%w: log entry %d: %w", errDurability, index, err)
	}
	if w, ok := s.batch.Witness(); ok {
		s.applyWitness(index, w)
		return nil
	}
	if s.table != nil && s.table.isRemoved(s.batch.Node) || !mayTick(&s.batch, e.GetTerm()) {
		// The replay window of a removed member is gone (ForgetNode), so a batch
		// that it proposed twice could apply twice. Nobody waits for it any more.
		s.mu.Lock()
		s.mu.state.SetApplied(index)
		s.mu.Unlock()
		return nil
	}
	s.mu.Lock()
	s.results = s.mu.state.Apply(index, &s.batch, s.results[:0])
	s.mu.Unlock()
	s.div.changed = true
	if s.batch.Node == s.node.id && s.batch.Boot == s.node.boot {
		s.answer(s.batch.Seq)
	}
	clear(s.results) // pins no values
	return nil
}

// answer hands each command of an own batch its result.
func (s *kvstore) answer(seq uint64) {
	b := s.node.inflight.take(seq)
	if b == nil {
		return // answered at its first application
	}
	for i, p := range b.proposals {
		r := s.results[i]
		if r.Duplicate {
			// It took effect inside a snapshot that we installed, and its
			// result with it.
			p.finish(kv.Result{}, errCommitTimeout)
			continue
		}
		switch s.standing() {
		case agrees:
			p.finish(r, nil)
		case doubts:
			s.answerLater(func(err error) { p.finish(r, err) })
		case diverged:
			p.finish(kv.Result{}, errCommitTimeout)
		}
	}
}
