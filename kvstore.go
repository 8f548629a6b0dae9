package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"pontoon/api"
	"pontoon/internal/wait"
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

	applied  *wait.Index // shared with the loop, which makes reads wait for it
	revision wait.Index
	started  time.Time
	diskLow  atomic.Bool // set by the disk watcher
	stopping atomic.Bool // set once this member shuts down
	failC    chan error  // capacity 1: why nothing more can be applied

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
	snapped  chan int64  // capacity 1: the running snapshot is done; its size
	snapSize int64
}

// snapshotWriter is what the store needs of the disk.
type snapshotWriter interface {
	writeSnapshot(h snapHeader, state *kv.State) (int64, error)
	readSnapshot(index uint64) (snapHeader, *kv.State, error)
	purge(oldest uint64) error
	sizes() (walBytes, snapBytes int64)
}

func newKVStore(n *raftNode, r *recovered, disk snapshotWriter) *kvstore {
	s := &kvstore{node: n, disk: disk, cfg: n.cfg, log: n.log, met: n.met, applied: n.applied, started: time.Now(),
		failC: make(chan error, 1), snapped: make(chan int64, 1), table: n.members.Load(), term: r.snap.Term}
	s.mu.state = r.state
	s.applied.Advance(r.state.Applied())
	s.revision.Advance(uint64(r.state.Revision()))
	return s
}

// batch is one own log entry between proposal and apply.
type batch struct {
	seq       uint64
	data      []byte
	proposals []*proposal
	tried     uint64 // tick of the last attempt
	epoch     soft   // leadership at the last attempt
}

// awaited says that some handler still waits for the batch.
func (b *batch) awaited() bool {
	return slices.ContainsFunc(b.proposals, func(p *proposal) bool { return p.state.Load() == proposed })
}

// inflight holds the own batches that raft was given and that are not applied
// yet. The raft loop adds and the apply loop takes.
type inflight struct {
	wake func() // called when room appears after there was none
	mu   struct {
		sync.Mutex
		batches map[uint64]*batch
		full    bool
	}
}

func (f *inflight) init(wake func()) {
	f.wake = wake
	f.mu.batches = map[uint64]*batch{}
}

// room says whether a batch numbered seq may be proposed: there is a bound on
// their number, and the oldest open one must stay inside the replay window, or
// it could not be proposed again.
func (f *inflight) room(seq uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	ok := len(f.mu.batches) < maxBatchesInFlight
	if ok && len(f.mu.batches) > 0 && seq > kv.ReplayWindow/2 {
		for old := range f.mu.batches { // order: does not matter, any old one decides
			if old <= seq-kv.ReplayWindow/2 {
				ok = false
			}
		}
	}
	f.mu.full = !ok
	return ok
}

func (f *inflight) add(b *batch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.batches[b.seq] = b
}

// take removes a batch; nil if it is not there.
func (f *inflight) take(seq uint64) *batch {
	f.mu.Lock()
	b := f.mu.batches[seq]
	delete(f.mu.batches, seq)
	wake := f.mu.full
	f.mu.full = false
	f.mu.Unlock()
	if wake {
		f.wake()
	}
	return b
}

// open lists the batches, oldest first.
func (f *inflight) open() []*batch {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]*batch, 0, len(f.mu.batches))
	for _, b := range f.mu.batches { // order: sorted below
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b *batch) int { return compare(a.seq, b.seq) })
	return out
}

var proposals = sync.Pool{New: func() any { return &proposal{done: make(chan struct{}, 1)} }}

// put stores a value. It returns once the write is on disk at a majority,
// committed and applied here.
func (s *kvstore) put(ctx context.Context, key string, value []byte) (kv.Result, error) {
	return s.propose(ctx, kv.Command{Op: kv.OpPut, Key: key, Value: value})
}

// delete removes a key. Deleting an absent key succeeds and changes nothing.
func (s *kvstore) delete(ctx context.Context, key string) (kv.Result, error) {
	return s.propose(ctx, kv.Command{Op: kv.OpDelete, Key: key})
}

// propose gives one command to raft and waits for its result. An error other
// than errCommitTimeout means that the command did not and will never happen.
func (s *kvstore) propose(ctx context.Context, c kv.Command) (kv.Result, error) {
	if s.diskLow.Load() {
		return kv.Result{}, errDiskLow
	}
	s.met.proposals.Inc()
	p := proposals.Get().(*proposal)
	p.state.Store(queued)
	p.command = kv.AppendCommand(p.command[:0], c)
	select {
	case s.node.proposeC <- p:
	case <-ctx.Done():
		return kv.Result{}, s.notProposed()
	case <-s.node.doneC:
		return kv.Result{}, errStopping
	}
	select {
	case <-p.done:
		r, err := p.result, p.err
		p.result, p.err = kv.Result{}, nil
		proposals.Put(p)
		return r, err
	case <-ctx.Done():
	case <-s.node.doneC:
	}
	// p stays with the loop: it is not pooled again.
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
	return errOverloaded
}

// late says why a read or a membership change was not done in time.
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
		case <-s.node.snapReqC:
			s.snapshot()
			continue
		case size := <-s.snapped:
			s.snapping, s.snapSize = false, size
			continue
		}
		if s.snapshotDue() {
			s.snapshot()
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
	s.applied.Advance(index)
	s.revision.Advance(uint64(rev))
	return nil
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
				}
			}
		}
		return nil
	}
	if err := kv.DecodeBatch(e.GetData(), &s.batch); err != nil {
		return fmt.Errorf("%w: log entry %d: %w", errDurability, index, err)
	}
	if s.table != nil && s.table.isRemoved(s.batch.Node) {
		// Its replay window is gone (ForgetNode), so a batch that it proposed
		// twice could apply twice. Nobody waits for it any more.
		s.mu.Lock()
		s.mu.state.SetApplied(index)
		s.mu.Unlock()
		return nil
	}
	s.mu.Lock()
	s.results = s.mu.state.Apply(index, &s.batch, s.results[:0])
	s.mu.Unlock()
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
		p.finish(r, nil)
	}
}

// restore replaces the state with that of an installed snapshot file.
func (s *kvstore) restore(h *snapHeader) error {
	got, state, err := s.disk.readSnapshot(h.Index)
	if err != nil {
		return fmt.Errorf("%w: load snapshot: %w", errDurability, err)
	}
	s.mu.Lock()
	s.mu.state = state
	s.mu.Unlock()
	s.table, s.term = got.Members, got.Term
	s.since.entries, s.since.bytes = 0, 0
	return nil
}

// snapshotDue: often enough that a restart replays little, seldom enough that
// snapshots of a large state do not cost more than the log they replace.
func (s *kvstore) snapshotDue() bool {
	return s.since.entries >= s.cfg.SnapshotEntries || s.since.bytes >= max(s.cfg.SnapshotBytes, s.snapSize)
}

// snapshot starts writing the state as it is now, while writes go on: the copy
// costs nothing (kv.State.Clone). One at a time.
func (s *kvstore) snapshot() {
	if s.snapping || s.table == nil || len(s.table.Members) == 0 {
		return
	}
	s.mu.Lock()
	state := s.mu.state.Clone()
	s.mu.Unlock()
	h := snapHeader{Index: state.Applied(), Term: s.term, Members: s.table}
	if h.Index == 0 {
		return
	}
	s.snapping = true
	s.since.entries, s.since.bytes = 0, 0
	// goroutine: snapshot-writer
	go s.writeSnapshot(h, state)
}

func (s *kvstore) writeSnapshot(h snapHeader, state *kv.State) {
	start := time.Now()
	size, err := s.disk.writeSnapshot(h, state)
	d := snapDone{header: h, err: err, purge: make(chan uint64, 1)}
	select {
	case s.node.snapDoneC <- d:
	case <-s.node.doneC:
		return
	}
	select {
	case oldest := <-d.purge:
		if oldest > 0 {
			// What is left behind costs space, nothing else.
			if err := s.disk.purge(oldest); err != nil {
				s.log.Error("could not delete old snapshots and log; is the data directory writable?", zap.Error(err))
			}
		}
	case <-s.node.doneC:
		return
	}
	s.met.snapshotSeconds.Observe(time.Since(start).Seconds())
	s.log.Info("snapshot written", zap.Uint64("index", h.Index), zap.Int64("bytes", size), zap.Duration("took", time.Since(start).Round(time.Millisecond)))
	s.snapped <- size
}

// changeMembers proposes a membership change and waits until this member has
// it. It first makes sure of an up-to-date table, so that a refusal is a fact.
func (s *kvstore) changeMembers(ctx context.Context, c memberChange, check func(*membership) error) error {
	if err := s.linearize(ctx); err != nil {
		return err
	}
	if check != nil {
		if err := check(s.node.members.Load()); err != nil {
			return err
		}
	}
	c.Version, c.Node, c.Request = memberChangeVersion, s.node.id, s.node.nextRequest()
	p := &confProposal{ctx: ctx, change: c, done: make(chan error, 1)}
	select {
	case s.node.confChangeC <- p:
	case <-ctx.Done():
		return errMembershipInProgress
	case <-s.node.doneC:
		return errStopping
	}
	select {
	case err := <-p.done:
		return err
	case <-ctx.Done():
		return s.late()
	case <-s.node.doneC:
		return errCommitTimeout
	}
}

// addMember lets a new member in, as a learner that the leader promotes once it
// has caught up: a voter without data would only weaken the quorum.
func (s *kvstore) addMember(ctx context.Context, spec memberSpec) (api.Member, bool, error) {
	url, err := parseHTTPURL(spec.PeerURL)
	if err != nil {
		return api.Member{}, false, fmt.Errorf("%w: peer URL: %v", errBadRequest, err)
	}
	m := member{ID: spec.ID, PeerURLs: []string{url}, Learner: true, Promote: !spec.Learner}
	if m.ID == 0 {
		if err := s.linearize(ctx); err != nil {
			return api.Member{}, false, err
		}
		m.ID = s.node.members.Load().nextID()
	}
	err = s.changeMembers(ctx, memberChange{Op: opAdd, Member: m}, nil)
	if errors.Is(err, errNoChange) {
		old, _ := s.node.members.Load().get(m.ID)
		return s.describe(old), false, nil
	}
	return s.describe(m), err == nil, err
}

// removeMember takes a member out. An absent id is no error: the caller's wish
// is fulfilled.
func (s *kvstore) removeMember(ctx context.Context, id uint64, force bool) error {
	check := func(m *membership) error {
		if force {
			return nil
		}
		var err error
		if derr := s.node.do(ctx, func() { err = m.mayRemove(id, s.node.alive) }); derr != nil {
			return derr
		}
		return err
	}
	return ignoreNoChange(s.changeMembers(ctx, memberChange{Op: opRemove, Member: member{ID: id}}, check))
}

// updateMember moves a member to another peer URL.
func (s *kvstore) updateMember(ctx context.Context, id uint64, peerURL string) error {
	url, err := parseHTTPURL(peerURL)
	if err != nil {
		return fmt.Errorf("%w: peer URL: %v", errBadRequest, err)
	}
	return ignoreNoChange(s.changeMembers(ctx, memberChange{Op: opUpdate, Member: member{ID: id, PeerURLs: []string{url}}}, nil))
}

// promoteMember makes a voter of a learner that has caught up.
func (s *kvstore) promoteMember(ctx context.Context, id uint64) error {
	check := func(m *membership) error {
		x, ok := m.get(id)
		if !ok || !x.Learner {
			return nil // apply has the right error
		}
		ready := false
		if err := s.node.do(ctx, func() {
			// Only the leader knows how far a learner is.
			ready = s.node.now.state == raft.StateLeader && s.node.caughtUp(id)
		}); err != nil {
			return err
		}
		if !ready {
			return fmt.Errorf("%w: member %d, as far as member %d can tell (ask the leader, member %d)", errLearnerBehind, id, s.node.id, s.leader())
		}
		return nil
	}
	return ignoreNoChange(s.changeMembers(ctx, memberChange{Op: opPromote, Member: member{ID: id}}, check))
}

func ignoreNoChange(err error) error {
	if errors.Is(err, errNoChange) {
		return nil
	}
	return err
}

// transferLeader moves leadership and returns once this member knows the new leader.
func (s *kvstore) transferLeader(ctx context.Context, to uint64) error {
	m, ok := s.node.members.Load().get(to)
	if !ok || m.Learner {
		return fmt.Errorf("%w: member %d is no voter", errTransferRefused, to)
	}
	if err := s.linearize(ctx); err != nil {
		return err
	}
	// raft takes no proposals while it waits for the target, so a target that
	// does not answer costs everybody an election time-out: ask only once.
	refused := false
	if err := s.node.do(ctx, func() {
		if refused = s.node.now.state == raft.StateLeader && !s.node.alive(to); !refused {
			s.node.raw.TransferLeader(to)
		}
	}); err != nil {
		return err
	}
	if refused {
		return fmt.Errorf("%w: member %d has not been heard of lately", errTransferRefused, to)
	}
	giveUp := time.NewTimer(s.cfg.electionTimeout())
	defer giveUp.Stop()
	for {
		changed := s.node.leaderChange()
		if s.leader() == to {
			return nil
		}
		select {
		case <-changed:
		case <-giveUp.C:
			return errTransferTimeout
		case <-ctx.Done():
			return errTransferTimeout
		case <-s.node.doneC:
			return errStopping
		}
	}
}

// handOver moves leadership away before this member stops, to the member that
// is furthest along, and returns once another leads. It tries once: a stop must
// not hang on a cluster that is going down as a whole.
func (s *kvstore) handOver(ctx context.Context) {
	for {
		changed := s.node.leaderChange()
		led := false
		err := s.node.do(ctx, func() {
			if to := s.node.successor(); to != raft.None {
				led = true
				s.node.raw.TransferLeader(to)
			}
		})
		if err != nil || !led {
			return
		}
		select {
		case <-changed:
			if l := s.leader(); l != raft.None && l != s.node.id {
				return
			}
		case <-ctx.Done():
			return
		case <-s.node.doneC:
			return
		}
	}
}

// peerActive says whether a connection to the peer stands.
func (n *raftNode) peerActive(id uint64) bool { return !n.tr.ActiveSince(types.ID(id)).IsZero() }
