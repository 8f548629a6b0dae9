package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"pontoon/internal/wait"
	"pontoon/kv"
)

// transport carries messages to the other members. *rafthttp.Transport is the
// real one; it never blocks and may drop anything, which raft expects.
type transport interface {
	Send([]*raftpb.Message)
	SendSnapshot(*snap.Message)
	AddPeer(types.ID, []string)
	RemovePeer(types.ID)
	UpdatePeer(types.ID, []string)
	ActiveSince(types.ID) time.Time
	Stop()
}

// errRemoved ends a node whose member was removed from the cluster.
var errRemoved = errors.New("removed from the cluster")

// raftNode owns raft. One goroutine runs serveChannels and nothing else touches
// the fields below "loop": no locks. The loop repeats four steps:
//
//	collect   everything that waits: proposals, messages, ticks
//	propose   all waiting commands as one log entry; all waiting reads as one ReadIndex
//	ready     send, write to the log, publish commits
//	advance   tell raft that it is done
//
// While the log is being synced, the next proposals gather in their channels.
// That is the whole batching: no timer waits for company.
type raftNode struct {
	id   uint64
	boot uint64 // counts the starts of this member; names its batches (kv.Batch)
	cfg  Config
	log  *zap.Logger
	met  *nodeMetrics

	proposeC    chan *proposal       // full: proposers wait until their deadline
	confChangeC chan *confProposal   // unbuffered: membership changes wait their turn
	recvC       chan *raftpb.Message // full: the message is dropped and counted
	commitC     chan *commit         // full: the loop waits, back-pressure
	snapDoneC   chan snapDone        // unbuffered: the snapshot writer waits
	snapReqC    chan struct{}        // capacity 1: a snapshot is wanted; more requests add nothing
	stopC       chan struct{}        // closed by stop
	doneC       chan struct{}        // closed when serveChannels has returned
	mail        mailbox              // closures to run on the loop
	reads       readQueue            // see read.go
	applied     *wait.Index          // what the apply loop has applied
	inflight    inflight             // own batches between proposal and apply
	soft        atomic.Pointer[soft] // published: who leads, which term
	changed     broadcast            // tells that soft changed
	members     atomic.Pointer[membership]
	progress    struct{ committed, last, snapshot atomic.Uint64 } // published for status

	// loop
	raw           *raft.RawNode
	mem           *raftStorage
	store         logStore
	snaps         snapshotSource
	tr            transport
	ticks         uint64
	now           soft              // as of the last Ready
	stable        uint64            // last entry on this disk
	committedTerm uint64            // term of the last entry published
	queue         []*proposal       // collected, not yet proposed
	held          []*raftpb.Message // forwarded proposals parked while leadership moves
	dropped       bool              // raft dropped a proposal; wait for a tick, a commit or a leader
	seq           uint64            // of the last own batch
	lastSeen      map[uint64]uint64 // peer -> tick of its last message
	sending       map[uint64]uint64 // peer -> index of the snapshot on its way there
	leaving       map[uint64]uint64 // removed peer -> tick at which its connections go
	promoting     map[uint64]uint64 // learner -> tick of the last attempt
	confQueue     []*confProposal
	removed       error
}

// soft is what raft calls soft state, with the term it belongs to.
type soft struct {
	lead, term uint64
	state      raft.StateType
}

// proposal is one command on its way from a handler to raft and back.
//
// state decides what a handler that gives up may say. Only the loop moves
// queued → proposed, only the handler moves anything → abandoned; whichever
// swap comes first wins, so "queued" at the handler's swap proves that the
// command never reached raft and never will.
type proposal struct {
	command []byte
	since   uint64 // tick of arrival
	state   atomic.Int32
	result  kv.Result
	err     error
	done    chan struct{} // capacity 1, one send a use
}

const (
	queued int32 = iota
	proposed
	abandoned
)

func (p *proposal) finish(r kv.Result, err error) {
	p.result, p.err = r, err
	p.done <- struct{}{}
}

// confProposal is one membership change on its way. raft may drop it without a
// word (R5), so the loop proposes it again until ctx ends; applying it twice
// changes nothing.
type confProposal struct {
	ctx    context.Context
	change memberChange
	tried  uint64     // tick of the last attempt, 0: none
	done   chan error // capacity 1
}

// commit is what the loop publishes, in log order: first a snapshot to load,
// if any, then entries.
type commit struct {
	snapshot *snapHeader
	entries  []*raftpb.Entry
	confs    []confResult // for the membership entries among entries
}

type confResult struct {
	index   uint64
	change  memberChange
	members *membership // after it
	err     error       // refused: nothing changed
}

type snapDone struct {
	header snapHeader
	err    error
	purge  chan uint64 // the oldest snapshot to keep, 0: all
}

// snapshotSource opens snapshot files to send and tells which survive a purge.
type snapshotSource interface {
	openSnapshot(index uint64) (snapFile, error)
	snapshotHeader(index uint64) (snapHeader, error)
	verifySnapshot(index uint64) (snapHeader, error)
	discardSnapshot(index uint64) error
	freeBytes() (int64, error)
	oldestKept(newest uint64) (uint64, error)
}

// raftStorage is raft's view of the log. Its snapshot is the newest file, not
// a copy of the state: MemoryStorage deep-copies what it holds, on the raft
// goroutine (R8).
type raftStorage struct {
	*raft.MemoryStorage
	members func() *membership
	request func()
}

// Snapshot offers the newest file if a follower could use it. A file older than
// the newest membership change would be refused by a member it does not list
// (etcd#12473), so another one is asked for; raft tries again at the next heartbeat.
func (s *raftStorage) Snapshot() (*raftpb.Snapshot, error) {
	sn, err := s.MemoryStorage.Snapshot()
	if err == nil && sn.GetMetadata().GetIndex() > 0 && sameConf(sn.GetMetadata().GetConfState(), s.members().confState()) {
		return sn, nil
	}
	s.request()
	return nil, raft.ErrSnapshotTemporarilyUnavailable
}

// newRaftNode prepares raft from what the disk says. Nothing runs yet.
func newRaftNode(cfg Config, boot uint64, r *recovered, store logStore, snaps snapshotSource, log *zap.Logger, met *nodeMetrics) (*raftNode, error) {
	n := &raftNode{
		id: cfg.ID, boot: boot, cfg: cfg, log: log, met: met, store: store, snaps: snaps, applied: &wait.Index{},
		proposeC:    make(chan *proposal, proposeQueue),
		confChangeC: make(chan *confProposal),
		recvC:       make(chan *raftpb.Message, recvQueue),
		commitC:     make(chan *commit, commitQueue),
		snapDoneC:   make(chan snapDone),
		snapReqC:    make(chan struct{}, 1),
		stopC:       make(chan struct{}),
		doneC:       make(chan struct{}),
		lastSeen:    map[uint64]uint64{},
		sending:     map[uint64]uint64{},
		leaving:     map[uint64]uint64{},
		promoting:   map[uint64]uint64{},
	}
	n.mail.wake = make(chan struct{}, 1)
	n.reads.init()
	n.inflight.init(n.mail.nudge)
	n.soft.Store(&soft{term: r.hard.GetTerm()})
	n.now.term = r.hard.GetTerm()
	members := r.snap.Members
	if members == nil { // a joiner that waits for its first snapshot
		members = &membership{ClusterID: r.meta.ClusterID}
	}
	n.members.Store(members)
	n.mem = &raftStorage{MemoryStorage: raft.NewMemoryStorage(), members: n.members.Load, request: n.requestSnapshot}
	if r.snap.Index > 0 {
		if err := n.mem.ApplySnapshot(r.snap.raftSnapshot()); err != nil {
			return nil, fmt.Errorf("restore snapshot: %w", err)
		}
	}
	if err := errors.Join(n.mem.SetHardState(r.hard), n.mem.Append(r.entries)); err != nil {
		return nil, fmt.Errorf("restore log: %w", err)
	}
	n.stable = r.snap.Index + uint64(len(r.entries))
	n.committedTerm = r.snap.Term
	n.progress.snapshot.Store(r.snap.Index)
	n.progress.last.Store(n.stable)
	n.progress.committed.Store(r.hard.GetCommit())
	raw, err := raft.NewRawNode(&raft.Config{
		ID:                        cfg.ID,
		ElectionTick:              cfg.ElectionTicks,
		HeartbeatTick:             1,
		Storage:                   n.mem,
		Applied:                   r.snap.Index,
		MaxSizePerMsg:             maxMessageBytes,
		MaxCommittedSizePerReady:  16 * maxMessageBytes,
		MaxUncommittedEntriesSize: maxUncommitted,
		MaxInflightMsgs:           maxInflightAppends,
		MaxInflightBytes:          16 * maxMessageBytes,
		CheckQuorum:               true,
		PreVote:                   true,
		StepDownOnRemoval:         true,
		Logger:                    raftLogger{log},
	})
	if err != nil {
		return nil, fmt.Errorf("start raft: %w", err)
	}
	n.raw = raw
	return n, nil
}

func (h *snapHeader) raftSnapshot() *raftpb.Snapshot {
	return &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{
		Index: new(h.Index), Term: new(h.Term), ConfState: h.Members.confState(),
	}}
}

// serveChannels is the one goroutine that owns raft. It returns nil after
// stop, errRemoved once this member is out of the cluster, or the error after
// which nothing more may be acknowledged.
func (n *raftNode) serveChannels() (err error) {
	ticker := time.NewTicker(n.cfg.TickInterval)
	defer ticker.Stop()
	defer func() {
		n.refuseAll()
		close(n.commitC)
		close(n.doneC)
	}()
	n.connectPeers()
	if m := n.members.Load().voters(); len(m) == 1 && m[0] == n.id {
		n.warn("campaign", n.raw.Campaign()) // nobody else could lead: no need to sit out the election time-out
	}
	for n.removed == nil {
		if n.busy() {
			// Never let a steady load keep the clock out.
			select {
			case <-ticker.C:
				n.tick()
			case <-n.stopC:
				return nil
			default:
			}
		} else {
			select {
			case <-ticker.C:
				n.tick()
			case p := <-n.proposeC:
				n.enqueue(p)
			case m := <-n.recvC:
				n.step(m)
			case <-n.reads.wake:
			case c := <-n.confChangeC:
				n.confQueue = append(n.confQueue, c)
			case <-n.mail.wake:
			case d := <-n.snapDoneC:
				if err := n.snapshotDone(d); err != nil {
					return err
				}
			case <-n.stopC:
				return nil
			}
		}
		n.collect()
		n.propose()
		n.proposeConf()
		n.issueReads()
		if n.raw.HasReady() {
			if err := n.ready(); err != nil {
				return err
			}
		}
	}
	return n.removed
}

// busy says that there is work which no channel will announce.
func (n *raftNode) busy() bool {
	return n.raw.HasReady() ||
		n.mayPropose() && (len(n.held) > 0 || len(n.queue) > 0 && n.inflight.room(n.seq+1)) ||
		n.mayRead() && n.reads.pending()
}

// collect takes everything that waits now, and not what arrives meanwhile, so
// that one turn of the loop is bounded by the channels' capacities.
func (n *raftNode) collect() {
	for _, f := range n.mail.take() {
		f()
	}
	for range len(n.recvC) {
		n.step(<-n.recvC)
	}
	for range len(n.proposeC) {
		n.enqueue(<-n.proposeC)
	}
}

func (n *raftNode) enqueue(p *proposal) {
	p.since = n.ticks
	n.queue = append(n.queue, p)
}

// mayPropose: raft drops proposals that have nowhere to go. Keep them instead:
// most gaps in leadership are a few milliseconds.
func (n *raftNode) mayPropose() bool { return n.now.lead != raft.None && !n.dropped }

// propose packs what waits into log entries, one as a rule. On a follower,
// raft forwards them to the leader.
func (n *raftNode) propose() {
	if !n.mayPropose() {
		return
	}
	for len(n.held) > 0 && n.mayPropose() {
		m := n.held[0]
		n.held = n.held[1:]
		n.step(m)
	}
	for len(n.queue) > 0 && n.mayPropose() && n.inflight.room(n.seq+1) {
		b := n.nextBatch()
		if b == nil {
			return
		}
		n.inflight.add(b)
		if err := n.proposeBatch(b); err != nil {
			n.inflight.take(b.seq)
			n.requeue(b)
			n.dropped = true
		}
	}
}

func (n *raftNode) proposeBatch(b *batch) error {
	b.tried, b.epoch = n.ticks, n.now
	err := n.raw.Propose(b.data)
	if err == nil {
		n.met.batchCommands.Observe(float64(len(b.proposals)))
	}
	return err
}

// nextBatch claims commands from the queue until the batch is full. Commands
// whose handler has given up are dropped: it has already said so.
func (n *raftNode) nextBatch() *batch {
	b := &batch{}
	var commands [][]byte
	size, i := 0, 0
	for ; i < len(n.queue) && len(commands) < maxBatchCommands; i++ {
		p := n.queue[i]
		if len(commands) > 0 && size+len(p.command) > maxBatchBytes {
			break
		}
		if p.state.CompareAndSwap(queued, proposed) {
			commands = append(commands, p.command)
			b.proposals = append(b.proposals, p)
			size += len(p.command)
		}
	}
	n.queue = slices.Delete(n.queue, 0, i)
	if len(commands) == 0 {
		return nil
	}
	n.seq++
	b.seq = n.seq
	b.data = kv.AppendBatch(make([]byte, 0, size+64), n.id, n.boot, b.seq, commands...)
	return b
}

// requeue puts commands back that raft did not take.
func (n *raftNode) requeue(b *batch) {
	var back []*proposal
	for _, p := range b.proposals {
		if p.state.CompareAndSwap(proposed, queued) {
			back = append(back, p)
		}
	}
	n.queue = append(back, n.queue...)
}

// repropose sends batches again whose fate is open: the leader they went to is
// gone, or has been silent about them for ten ticks. kv's replay window makes
// a batch that did survive apply once (see kv.Batch).
func (n *raftNode) repropose() {
	if !n.mayPropose() {
		return
	}
	for _, b := range n.inflight.open() {
		sameLeader := b.epoch.lead == n.now.lead && b.epoch.term == n.now.term
		if sameLeader && (n.now.lead == n.id || n.ticks-b.tried < 10) {
			continue
		}
		if !b.awaited() {
			n.inflight.take(b.seq)
			continue
		}
		n.met.reproposed.Inc()
		if err := n.proposeBatch(b); err != nil {
			n.dropped = true
			return
		}
	}
}

// proposeConf proposes the oldest waiting membership change: one at a time (R5).
func (n *raftNode) proposeConf() {
	for len(n.confQueue) > 0 && n.confQueue[0].ctx.Err() != nil {
		n.confQueue = n.confQueue[1:]
	}
	if len(n.confQueue) == 0 || !n.mayPropose() {
		return
	}
	c := n.confQueue[0]
	if c.tried != 0 && n.ticks-c.tried < 5 {
		return
	}
	if _, err := n.members.Load().apply(c.change); err != nil {
		n.finishConf(c.change, err)
		return
	}
	cc, err := c.change.confChange()
	if err != nil {
		n.finishConf(c.change, err)
		return
	}
	c.tried = max(n.ticks, 1)
	if err := n.raw.ProposeConfChange(cc); err != nil {
		n.dropped = true
	}
}

// finishConf answers the proposer of a membership change, if it is ours.
func (n *raftNode) finishConf(change memberChange, err error) {
	for i, c := range n.confQueue {
		if c.change.Request == change.Request {
			n.confQueue = slices.Delete(n.confQueue, i, i+1)
			c.done <- err
			return
		}
	}
}

// step hands a peer's message to raft. What reaches it has passed
// validateMessage; the checks here are those that need raft's own state.
func (n *raftNode) step(m *raftpb.Message) {
	n.lastSeen[m.GetFrom()] = n.ticks
	switch m.GetType() {
	case raftpb.MsgProp:
		if !n.mayPropose() {
			n.hold(m)
			return
		}
	case raftpb.MsgTransferLeader:
		// raft would forward it once more and panic over its term.
		if n.now.state != raft.StateLeader {
			return
		}
	case raftpb.MsgHeartbeat:
		// A leader never commits past what we acknowledged, and that is on
		// disk. raft panics over such a message (R9); it is hostile or this
		// log lost something.
		if m.GetCommit() > n.stable && m.GetTerm() >= n.now.term {
			n.log.Error("ignored a heartbeat that commits more than this log holds",
				zap.Uint64("from", m.GetFrom()), zap.Uint64("commit", m.GetCommit()), zap.Uint64("last", n.stable))
			n.met.refusedMessages.Inc()
			return
		}
	}
	err := n.raw.Step(m)
	switch {
	case err == nil:
	case errors.Is(err, raft.ErrProposalDropped):
		n.dropped = true
		n.hold(m)
	default:
		n.log.Debug("raft refused a message", zap.String("type", m.GetType().String()), zap.Uint64("from", m.GetFrom()), zap.Error(err))
	}
}

// hold parks a forwarded proposal: its proposer would hear nothing (R4). Beyond
// the bound it is dropped, and proposed again by its node after ten ticks.
func (n *raftNode) hold(m *raftpb.Message) {
	if len(n.held) < maxHeldProposals {
		n.held = append(n.held, m)
	} else {
		n.met.droppedMessages.Inc()
	}
}

// tick is 100 ms of raft time.
func (n *raftNode) tick() {
	n.ticks++
	n.dropped = false
	n.raw.Tick()
	n.expire()
	n.repropose()
	n.retryReads()
	n.promoteLearners()
	for id, at := range n.leaving {
		if n.ticks >= at {
			n.tr.RemovePeer(types.ID(id))
			delete(n.leaving, id)
		}
	}
}

// expire refuses what has waited one election time-out without a leader. It
// never reached raft, so the answer is certain.
func (n *raftNode) expire() {
	if n.now.lead != raft.None {
		return
	}
	old := func(since uint64) bool { return n.ticks-since > uint64(2*n.cfg.ElectionTicks) }
	n.queue = slices.DeleteFunc(n.queue, func(p *proposal) bool {
		if !old(p.since) {
			return false
		}
		if p.state.CompareAndSwap(queued, abandoned) {
			p.finish(kv.Result{}, errNoLeader)
		}
		return true
	})
	n.reads.expire(func(b *readBatch) bool { return old(b.since) }, errNoLeader)
}

// ready carries out what raft decided, in the order that durability asks for.
func (n *raftNode) ready() error {
	rd := n.raw.Ready()
	if rd.SoftState != nil || !raft.IsEmptyHardState(rd.HardState) {
		n.observe(rd)
	}
	// Appends and heartbeats may leave while the disk works (thesis 10.2.1).
	// Votes and acknowledgements of appends promise that the disk is done.
	early, late := n.sort(rd.Messages)
	n.send(early)

	// What is on this disk already need not wait for the sync below.
	onDisk, fresh := n.splitCommitted(rd.CommittedEntries)
	n.publish(onDisk)
	if err := n.persist(rd); err != nil {
		return err
	}
	n.send(late)
	n.publish(fresh)
	n.raw.Advance(rd)
	n.finishReads(rd.ReadStates)
	return nil
}

// observe notes who leads. On a change everything that waits for a leader moves.
func (n *raftNode) observe(rd raft.Ready) {
	before := n.now
	if rd.SoftState != nil {
		n.now.lead, n.now.state = rd.SoftState.Lead, rd.SoftState.RaftState
	}
	if !raft.IsEmptyHardState(rd.HardState) {
		n.now.term = rd.HardState.GetTerm()
		n.progress.committed.Store(rd.HardState.GetCommit())
	}
	if n.now == before {
		return
	}
	s := n.now
	n.soft.Store(&s)
	n.changed.notify()
	n.dropped = false
	if n.now.lead != before.lead {
		n.met.leaderChanges.Inc()
		n.log.Info("leader changed", zap.Uint64("leader", n.now.lead), zap.Uint64("term", n.now.term))
	}
	if n.now.lead != raft.None {
		n.mail.post(func() { n.repropose(); n.restartReads() }) // after this Ready
	}
}

// sort splits the messages of a Ready, and keeps only the last of several
// acknowledgements to the same leader: it covers the others.
func (n *raftNode) sort(ms []*raftpb.Message) (early, late []*raftpb.Message) {
	for i, m := range ms {
		switch m.GetType() {
		case raftpb.MsgAppResp:
			if !m.GetReject() && slices.ContainsFunc(ms[i+1:], func(o *raftpb.Message) bool {
				return o.GetType() == raftpb.MsgAppResp && o.GetTo() == m.GetTo() && o.GetTerm() == m.GetTerm() && !o.GetReject() && o.GetIndex() >= m.GetIndex()
			}) {
				continue
			}
			late = append(late, m)
		case raftpb.MsgVoteResp, raftpb.MsgPreVoteResp:
			late = append(late, m)
		default:
			early = append(early, m)
		}
	}
	return early, late
}

func (n *raftNode) send(ms []*raftpb.Message) {
	if len(ms) == 0 {
		return
	}
	plain := ms[:0]
	for _, m := range ms {
		if m.GetType() == raftpb.MsgSnap {
			n.sendSnapshot(m)
		} else {
			plain = append(plain, m)
		}
	}
	n.tr.Send(plain)
}

// splitCommitted separates entries that this disk holds from those that rd
// only brings: without asynchronous storage raft hands out both (R11).
func (n *raftNode) splitCommitted(ents []*raftpb.Entry) (onDisk, fresh []*raftpb.Entry) {
	i := len(ents)
	for i > 0 && ents[i-1].GetIndex() > n.stable {
		i--
	}
	return ents[:i], ents[i:]
}

// persist makes rd durable: snapshot record, then entries and hard state, one
// sync (W6), then the same in memory.
func (n *raftNode) persist(rd raft.Ready) error {
	installed := !raft.IsEmptySnap(rd.Snapshot)
	if installed {
		if err := n.store.saveSnapshot(rd.Snapshot.Metadata); err != nil {
			return err
		}
	}
	// wal.Save does not sync a mere new commit index. After an installed
	// snapshot that index is what makes the snapshot count at a restart.
	if installed || len(rd.Entries) > 0 || !raft.IsEmptyHardState(rd.HardState) {
		if err := n.store.save(rd.HardState, rd.Entries, installed); err != nil {
			return err
		}
	}
	if installed {
		if err := n.install(rd.Snapshot); err != nil {
			return err
		}
	}
	if !raft.IsEmptyHardState(rd.HardState) {
		if err := n.mem.SetHardState(rd.HardState); err != nil {
			return err
		}
	}
	if len(rd.Entries) > 0 {
		if err := n.mem.Append(rd.Entries); err != nil {
			return err
		}
		n.stable = rd.Entries[len(rd.Entries)-1].GetIndex()
		n.progress.last.Store(n.stable)
	}
	return nil
}

// install takes over a snapshot that a leader sent: its file was verified when
// it arrived. The store loads the very same file.
func (n *raftNode) install(s *raftpb.Snapshot) error {
	h, err := n.snaps.snapshotHeader(s.GetMetadata().GetIndex())
	if err != nil {
		return fmt.Errorf("%w: install snapshot: %w", errDurability, err)
	}
	if err := n.mem.ApplySnapshot(s); err != nil && !errors.Is(err, raft.ErrSnapOutOfDate) {
		return fmt.Errorf("install snapshot: %w", err)
	}
	n.stable = h.Index
	n.committedTerm = h.Term
	n.progress.last.Store(h.Index)
	n.progress.snapshot.Store(h.Index)
	n.setMembers(h.Members)
	n.connectPeers()
	n.deliver(&commit{snapshot: &h})
	n.log.Info("took over a snapshot", zap.Uint64("index", h.Index))
	return nil
}

// publish hands committed entries to the apply loop. Membership changes take
// effect here, on the goroutine that owns raft.
func (n *raftNode) publish(ents []*raftpb.Entry) {
	if len(ents) == 0 {
		return
	}
	c := &commit{entries: ents}
	for _, e := range ents {
		if e.GetType() != raftpb.EntryNormal {
			c.confs = append(c.confs, n.applyConf(e))
		}
	}
	last := ents[len(ents)-1]
	n.committedTerm = last.GetTerm()
	n.dropped = false
	n.deliver(c)
}

// deliver waits for the apply loop: back-pressure, never loss. A node that is
// being stopped needs no answer from it any more.
func (n *raftNode) deliver(c *commit) {
	select {
	case n.commitC <- c:
	case <-n.stopC:
	}
}

// applyConf carries out a committed membership change, or refuses it, on every
// member alike. raft is told only of what the table accepted.
func (n *raftNode) applyConf(e *raftpb.Entry) confResult {
	res := confResult{index: e.GetIndex(), members: n.members.Load()}
	var cc raftpb.ConfChangeV2
	if e.GetType() != raftpb.EntryConfChangeV2 {
		res.err = fmt.Errorf("%w: entry type %v", errUnsupported, e.GetType())
	} else if err := proto.Unmarshal(e.GetData(), &cc); err != nil {
		res.err = fmt.Errorf("%w: membership change: %v", errBadRequest, err)
	} else if res.change, res.err = decodeConfChange(&cc); res.err == nil {
		var next *membership
		if next, res.err = n.members.Load().apply(res.change); res.err == nil {
			n.raw.ApplyConfChange(&cc)
			res.members = next
			n.setMembers(next)
			n.reconnect(res.change)
			n.log.Info("membership changed", zap.String("change", string(res.change.Op)),
				zap.Uint64("member", res.change.Member.ID), zap.Strings("url", res.change.Member.PeerURLs))
		}
	}
	if res.change.Node == n.id {
		n.mail.post(func() { n.finishConf(res.change, res.err) }) // after the apply loop has it queued
	}
	return res
}

func (n *raftNode) setMembers(m *membership) { n.members.Store(m) }

// reconnect follows one membership change with the transport.
func (n *raftNode) reconnect(c memberChange) {
	id := c.Member.ID
	switch {
	case c.Op == opRemove && id == n.id:
		// Let what is under way leave first: the others learn of the commit
		// that removed us from our own message.
		at := n.ticks + 3
		n.mail.at(func() bool {
			if n.ticks < at {
				return false
			}
			n.removed = fmt.Errorf("%w: member %d was removed by a membership change", errRemoved, id)
			return true
		})
	case id == n.id:
	case c.Op == opAdd:
		n.tr.AddPeer(types.ID(id), c.Member.PeerURLs)
	case c.Op == opRemove:
		n.leaving[id] = n.ticks + 3 // time for the removed member to hear of it
		delete(n.lastSeen, id)
	case c.Op == opUpdate && len(c.Member.PeerURLs) > 0:
		n.tr.UpdatePeer(types.ID(id), c.Member.PeerURLs)
	}
}

// connectPeers makes the transport know the whole table: at start and after a
// snapshot.
func (n *raftNode) connectPeers() {
	for _, m := range n.members.Load().Members {
		if m.ID != n.id {
			n.tr.AddPeer(types.ID(m.ID), m.PeerURLs) // does nothing for a known peer
			n.tr.UpdatePeer(types.ID(m.ID), m.PeerURLs)
		}
	}
	for _, id := range n.members.Load().Removed {
		n.tr.RemovePeer(types.ID(id))
	}
}

// sendSnapshot streams the file of a MsgSnap beside the message.
func (n *raftNode) sendSnapshot(m *raftpb.Message) {
	to, index := m.GetTo(), m.GetSnapshot().GetMetadata().GetIndex()
	f, err := n.snaps.openSnapshot(index)
	if err != nil {
		n.log.Error("cannot send a snapshot", zap.Uint64("to", to), zap.Uint64("index", index), zap.Error(err))
		n.ReportSnapshot(to, raft.SnapshotFailure)
		return
	}
	n.log.Info("sending a snapshot", zap.Uint64("to", to), zap.Uint64("index", index), zap.Int64("bytes", f.size))
	n.sending[to] = index
	sm := snap.NewMessage(m, f, f.size)
	n.tr.SendSnapshot(sm)
	// goroutine: snapshot-sent
	go func() {
		ok := false
		select {
		case ok = <-sm.CloseNotify():
		case <-n.doneC:
		}
		n.mail.post(func() {
			delete(n.sending, to)
			if !ok {
				n.raw.ReportSnapshot(to, raft.SnapshotFailure)
			}
		})
	}()
}

func (n *raftNode) requestSnapshot() {
	select {
	case n.snapReqC <- struct{}{}:
	default: // one is wanted already
	}
}

// snapshotDone records a finished snapshot file and lets go of the log before it.
func (n *raftNode) snapshotDone(d snapDone) error {
	if d.err != nil {
		return d.err
	}
	sn := d.header.raftSnapshot()
	index := d.header.Index
	if err := n.store.saveSnapshot(sn.Metadata); err != nil {
		return err
	}
	switch _, err := n.mem.CreateSnapshot(index, sn.Metadata.ConfState, nil); {
	case errors.Is(err, raft.ErrSnapOutOfDate): // a leader's snapshot overtook it
	case err != nil:
		return fmt.Errorf("snapshot %d: %w", index, err)
	default:
		n.progress.snapshot.Store(index)
		if to := n.compactTo(index); to > 0 {
			if err := n.mem.Compact(to); err != nil && !errors.Is(err, raft.ErrCompacted) {
				return fmt.Errorf("compact to %d: %w", to, err)
			}
		}
	}
	oldest, err := n.snaps.oldestKept(index)
	if err != nil {
		return fmt.Errorf("%w: list snapshots: %w", errDurability, err)
	}
	if oldest > 0 {
		if err := n.store.release(oldest); err != nil {
			return err
		}
	}
	d.purge <- oldest
	return nil
}

// compactTo is how far the log in memory may be forgotten after a snapshot at
// index: some is kept for followers that lag a little, and all of it that a
// follower needs who is receiving a snapshot right now, up to a bound.
func (n *raftNode) compactTo(index uint64) uint64 {
	first, err := n.mem.FirstIndex()
	if err != nil || index < first {
		return 0
	}
	keepFrom := index
	for _, sent := range n.sending {
		keepFrom = min(keepFrom, sent)
	}
	ents, err := n.mem.Entries(first, index+1, noLimit)
	if err != nil {
		return 0
	}
	var held int64
	for _, e := range slices.Backward(ents) {
		held += int64(len(e.GetData()))
		if i := e.GetIndex(); held > maxLogBytesHeld || (held > n.cfg.CatchUpBytes && i <= keepFrom) {
			return i
		}
	}
	return 0
}

const noLimit = 1<<64 - 1

// promoteLearners lets the leader turn learners that caught up into voters.
// raft has no such check (R6).
func (n *raftNode) promoteLearners() {
	if n.now.state != raft.StateLeader {
		return
	}
	for _, m := range n.members.Load().Members {
		if !m.Learner || !m.Promote || n.ticks-n.promoting[m.ID] < 10 || !n.caughtUp(m.ID) {
			continue
		}
		n.promoting[m.ID] = n.ticks
		c := memberChange{Version: memberChangeVersion, Op: opPromote, Member: member{ID: m.ID}}
		if cc, err := c.confChange(); err != nil {
			n.log.Error("promote", zap.Error(err))
		} else if err := n.raw.ProposeConfChange(cc); err != nil {
			n.log.Debug("promote", zap.Uint64("member", m.ID), zap.Error(err))
		}
	}
}

// caughtUp is the leader's opinion of a follower.
func (n *raftNode) caughtUp(id uint64) (ok bool) {
	committed := n.raw.BasicStatus().GetCommit()
	n.raw.WithProgress(func(p uint64, _ raft.ProgressType, pr tracker.Progress) {
		if p == id {
			ok = pr.RecentActive && pr.State == tracker.StateReplicate && pr.Match+promoteLag >= committed
		}
	})
	return ok
}

// alive says whether a member was heard of lately. Only the leader hears from
// everybody; a follower asks its connections.
func (n *raftNode) alive(id uint64) bool {
	if id == n.id {
		return true
	}
	if n.now.state == raft.StateLeader {
		seen, ok := n.lastSeen[id]
		return ok && n.ticks-seen <= uint64(2*n.cfg.ElectionTicks)
	}
	return !n.tr.ActiveSince(types.ID(id)).IsZero()
}

// refuseAll answers everyone who still waits when the loop ends.
func (n *raftNode) refuseAll() {
	n.collectForRefusal()
	for _, p := range n.queue {
		if p.state.CompareAndSwap(queued, abandoned) {
			p.finish(kv.Result{}, errStopping)
		}
	}
	for _, c := range n.confQueue {
		c.done <- errStopping
	}
	n.reads.close(errStopping)
}

func (n *raftNode) collectForRefusal() {
	for range len(n.proposeC) {
		n.queue = append(n.queue, <-n.proposeC)
	}
}

// Process takes a message from a peer (rafthttp.Raft). It is called on the
// transport's goroutines.
func (n *raftNode) Process(ctx context.Context, m *raftpb.Message) error {
	if err := n.validateMessage(m); err != nil {
		n.met.refusedMessages.Inc()
		return badMessage{err}
	}
	select {
	case n.recvC <- m:
	default:
		n.met.droppedMessages.Inc()
	}
	return nil
}

// IsIDRemoved is asked by the transport before it answers a peer (rafthttp.Raft).
func (n *raftNode) IsIDRemoved(id uint64) bool { return n.members.Load().isRemoved(id) }

// ReportUnreachable and ReportSnapshot come from the transport, at times on
// the loop's own goroutine in the middle of a send: they must not wait for it.
func (n *raftNode) ReportUnreachable(id uint64) {
	n.mail.post(func() { n.raw.ReportUnreachable(id) })
}

func (n *raftNode) ReportSnapshot(id uint64, status raft.SnapshotStatus) {
	n.mail.post(func() { n.raw.ReportSnapshot(id, status) })
}

// do runs f on the loop and waits for it, or for ctx or the loop to end.
func (n *raftNode) do(ctx context.Context, f func()) error {
	done := make(chan struct{})
	n.mail.post(func() { f(); close(done) })
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return errCommitTimeout
	case <-n.doneC:
		return errStopping
	}
}

// stop ends serveChannels and waits for it.
func (n *raftNode) stop() {
	select {
	case <-n.stopC:
	default:
		close(n.stopC)
	}
	<-n.doneC
}

func (n *raftNode) warn(op string, err error) {
	if err != nil {
		n.log.Warn(op, zap.Error(err))
	}
}

// leaderChange returns a channel that is closed when leadership or the term
// next changes.
func (n *raftNode) leaderChange() <-chan struct{} { return n.changed.wait() }

// nextRequest draws a number that names one membership change of this node.
func (n *raftNode) nextRequest() uint64 { return rand.Uint64() | 1 }

// successor is the member that this leader would hand over to: the voter that
// is alive and furthest along. None if there is none or if we do not lead.
func (n *raftNode) successor() uint64 {
	if n.now.state != raft.StateLeader {
		return raft.None
	}
	best, match := raft.None, uint64(0)
	n.raw.WithProgress(func(id uint64, typ raft.ProgressType, pr tracker.Progress) {
		if id != n.id && typ == raft.ProgressTypePeer && n.alive(id) && n.peerActive(id) && (best == raft.None || pr.Match > match) {
			best, match = id, pr.Match
		}
	})
	return best
}

// broadcast wakes everybody who waits for something to change.
type broadcast struct {
	mu struct {
		sync.Mutex
		c chan struct{}
	}
}

func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.c == nil {
		b.mu.c = make(chan struct{})
	}
	return b.mu.c
}

func (b *broadcast) notify() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.c != nil {
		close(b.mu.c)
		b.mu.c = nil
	}
}

// mailbox holds closures for the loop. It is unbounded in principle and small
// in practice: each entry is a report about one peer or one caller that waits.
type mailbox struct {
	wake chan struct{} // capacity 1
	mu   struct {
		sync.Mutex
		box []func()
	}
}

func (b *mailbox) post(f func()) {
	b.mu.Lock()
	b.mu.box = append(b.mu.box, f)
	b.mu.Unlock()
	b.nudge()
}

// nudge makes the loop turn once.
func (b *mailbox) nudge() {
	select {
	case b.wake <- struct{}{}:
	default: // it will turn anyway
	}
}

// at posts f again and again until it says that it is done.
func (b *mailbox) at(f func() bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var again func()
	again = func() {
		if !f() {
			b.mu.Lock()
			b.mu.box = append(b.mu.box, again) // no wake: the next turn is soon enough
			b.mu.Unlock()
		}
	}
	b.mu.box = append(b.mu.box, again)
}

func (b *mailbox) take() []func() {
	b.mu.Lock()
	defer b.mu.Unlock()
	box := b.mu.box
	b.mu.box = nil
	return box
}
