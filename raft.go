package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

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
	said *zap.Logger // log, but of each kind of line one in ten seconds: for what peers can cause at will
	met  *nodeMetrics

	// The ways in which a node touches what a simulation (sim_test.go) or a cluster
	// in one process has to own: set before anything runs, never changed.
	time  func() time.Time // the clock; only differences of it decide anything
	spawn func(func())     // runs what may wait for others, beside the loop
	ask   func(ctx context.Context, m member, without uint64) (*clusterInfo, error)

	proposeC    chan *proposal       // full: proposers wait until their deadline
	confChangeC chan *confProposal   // unbuffered: membership changes wait their turn
	recvC       chan received        // full: the message is dropped and counted
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
	offered     atomic.Int64         // bytes of commands in proposeC; they stay there while the disk hangs, whether their callers wait or not
	received    atomic.Int64         // bytes of messages in recvC, see messageBytes
	members     atomic.Pointer[membership]
	strangers   struct {
		sync.Mutex
		ids []uint64 // peers of the transport that no table has named yet, see meet
	}
	clock     atomic.Pointer[clock]                             // published by the apply loop, see clock.go
	testimony atomic.Pointer[testimony]                         // published by the apply loop, see divergence.go
	standing  atomic.Int32                                      // a standing, likewise
	progress  struct{ committed, last, snapshot atomic.Uint64 } // published for status

	// loop
	raw           *raft.RawNode
	mem           *raftStorage
	store         logStore
	snaps         snapshotSource
	tr            transport
	ticks         uint64
	since         uint64            // tick of the last change of leader
	now           soft              // as of the last Ready
	stable        uint64            // last entry on this disk
	committedTerm uint64            // term of the last entry published
	appended      bool              // by a leader, since the last own batch was forwarded
	gathering                       // see gather.go
	unsaved       bool              // an append or a snapshot was stepped and is not on disk yet
	later         []*raftpb.Message // heartbeats that wait for that
	acks          []*raftpb.Message // may be sent, and leave with what the next turn has to send
	readSent      uint64            // highest read context sent in this term
	queue         []*proposal       // collected, not yet proposed
	tickSent      time.Time         // of the last kv.Tick
	ownTick       ownTick           // the last one
	seen          [2]uint64         // index applied when noteSeen last looked but one, and when it last looked
	seenAt        time.Time         // when that was
	held          []*raftpb.Message // forwarded proposals parked while leadership moves
	heldBytes     int               // of their entries, at most maxUncommitted
	dropped       bool              // raft dropped a proposal; wait for a tick, a commit or a leader
	seq           uint64            // of the last own batch
	lastSeen      map[uint64]uint64 // peer -> tick of its last message
	answered      map[uint64]uint64 // member -> highest read context that it confirmed to this leader in this term
	sending       map[uint64]uint64 // peer -> index of the snapshot on its way there
	wanted        uint64            // tick at which a follower last waited for a snapshot
	trimAgain     uint64            // tick at which to look again for log that can go, 0: none
	stateBytes    int64             // size of the state in the newest own snapshot
	leaving       map[uint64]uint64 // removed peer -> tick at which its connections go
	tended        map[uint64]uint64 // member -> tick of the last housekeeping proposal
	confQueue     []*confProposal
	founder       founder
	removed       error // ends the loop: this member is out of the cluster, or must not be in it
	testified     testified
	cut           bool   // a commit was not delivered: no later one may be
	replayed      uint64 // last entry that was committed before this start
	aside         asideState
}

// soft is what raft calls soft state, with the term it belongs to.
type soft struct {
	lead, term uint64
	state      raft.StateType
}

// commit is what the loop publishes, in log order: first a snapshot to load,
// if any, then entries.
type commit struct {
	snapshot *snapHeader
	entries  []*raftpb.Entry
	confs    []confResult // for the membership entries among entries
}

// newRaftNode prepares raft from what the disk says. Nothing runs yet.
func newRaftNode(cfg Config, boot uint64, r *recovered, store logStore, snaps snapshotSource, log *zap.Logger, met *nodeMetrics) (*raftNode, error) {
	n := &raftNode{
		id: cfg.ID, boot: boot, cfg: cfg, log: log, said: quiet(log), met: met, store: store, snaps: snaps, applied: &wait.Index{},
		time: time.Now,
		// goroutine: snapshot-sent or peer-remover, whatever its caller says
		spawn:       func(f func()) { go f() },
		proposeC:    make(chan *proposal, proposeQueue),
		confChangeC: make(chan *confProposal),
		recvC:       make(chan received, recvQueue),
		commitC:     make(chan *commit, commitQueue),
		snapDoneC:   make(chan snapDone),
		snapReqC:    make(chan struct{}, 1),
		stopC:       make(chan struct{}),
		doneC:       make(chan struct{}),
		lastSeen:    map[uint64]uint64{},
		answered:    map[uint64]uint64{},
		sending:     map[uint64]uint64{},
		leaving:     map[uint64]uint64{},
		gathering:   gathering{acked: map[uint64]uint64{}},
		tended:      map[uint64]uint64{},
	}
	n.ask = n.askMember
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
	n.mem = &raftStorage{MemoryStorage: raft.NewMemoryStorage(), members: n.members.Load, request: n.wantSnapshot}
	if r.snap.Index > 0 {
		if err := n.mem.ApplySnapshot(r.snap.raftSnapshot()); err != nil {
			return nil, fmt.Errorf("restore snapshot: %w", err)
		}
	}
	if err := errors.Join(n.mem.SetHardState(r.hard), n.mem.Append(r.entries)); err != nil {
		return nil, fmt.Errorf("restore log: %w", err)
	}
	if r.state != nil {
		n.stateBytes = r.state.Bytes()
	}
	n.stable = r.snap.Index + uint64(len(r.entries))
	n.replayed = r.hard.GetCommit()
	n.aside.init(r.aside)
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

// serveChannels is the one goroutine that owns raft. It returns nil after
// stop, errRemoved once this member is out of the cluster, or the error after
// which nothing more may be acknowledged.
func (n *raftNode) serveChannels() (err error) {
	ticker := time.NewTicker(n.cfg.TickInterval)
	defer ticker.Stop()
	look := time.NewTimer(time.Hour) // reset where it is waited for
	defer look.Stop()
	defer n.end()
	n.begin()
	for n.removed == nil {
		if n.busy() {
			// Never let a steady load keep the clock out.
			select {
			case <-ticker.C:
				n.tick()
			case c := <-n.confChangeC:
				n.confQueue = append(n.confQueue, c)
			case d := <-n.snapDoneC:
				if err := n.snapshotDone(d); err != nil {
					return err
				}
			case <-n.stopC:
				return nil
			default:
			}
		} else {
			var late <-chan time.Time
			if d := n.wakeAfter(); d > 0 {
				look.Reset(d)
				late = look.C
			}
			select {
			case <-late:
			case <-ticker.C:
				n.tick()
			case p := <-n.proposeC:
				n.enqueue(p)
			case m := <-n.recvC:
				n.step(n.taken(m))
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
		if err := n.turn(); err != nil {
			return err
		}
	}
	return n.removed
}

// begin is what the loop does before its first turn.
func (n *raftNode) begin() {
	n.connectPeers()
	n.campaignAlone()
}

// turn is one round of the loop, after whatever woke it.
func (n *raftNode) turn() error {
	n.collect()
	n.propose()
	n.proposeConf()
	n.issueReads()
	if !n.raw.HasReady() {
		n.sendAcks()
		return nil
	}
	err := n.ready()
	if err == nil && n.now.lead == raft.None {
		n.campaignAlone()
	}
	return err
}

// sendAcks sends what the last ready has left to go with the next messages.
func (n *raftNode) sendAcks() {
	n.send(n.acks)
	n.acks = nil
}

// busy says that there is work which no channel will announce.
func (n *raftNode) busy() bool {
	return n.raw.HasReady() || len(n.acks) > 0 ||
		n.mayPropose() && (len(n.held) > 0 || len(n.queue) > 0 && n.mayHaveInFlight()) ||
		n.mayRead() && n.reads.pending(n.ticks)
}

// collect takes everything that waits now, and not what arrives meanwhile, so
// that one turn of the loop is bounded by the channels' capacities.
func (n *raftNode) collect() {
	for _, f := range n.mail.take() {
		f()
	}
	for range len(n.recvC) {
		n.step(n.taken(<-n.recvC))
	}
	for range len(n.proposeC) {
		n.enqueue(<-n.proposeC)
	}
}

// step hands a peer's message to raft. What reaches it has passed
// validateMessage; the checks here are those that need raft's own state.
func (n *raftNode) step(m *raftpb.Message) {
	if _, known := n.lastSeen[m.GetFrom()]; known || n.members.Load().index(m.GetFrom()) >= 0 {
		n.lastSeen[m.GetFrom()] = n.ticks
	}
	if n.aside.drops(m, n.ticks) || n.withholds(m) {
		return
	}
	switch m.GetType() {
	case raftpb.MsgProp:
		if !n.mayPropose() {
			n.hold(m)
			return
		}
	case raftpb.MsgReadIndex:
		// raft answers for a single voter without a look at its term
		// (see mayRead); the follower asks again.
		if st := n.raw.BasicStatus(); st.RaftState == raft.StateLeader && n.committedTerm != st.GetTerm() {
			return
		}
	case raftpb.MsgTransferLeader:
		// raft would forward it once more and panic over its term. What the
		// last Ready said may be out of date by now.
		if n.raw.BasicStatus().RaftState != raft.StateLeader {
			return
		}
	case raftpb.MsgApp:
		// raft takes what is committed here for equal, and says so to the leader:
		// nothing would be applied here any more, and nobody would know why.
		if m.GetIndex() <= n.progress.committed.Load() && m.GetTerm() >= n.now.term {
			if t, err := n.mem.Term(m.GetIndex()); err == nil && t != m.GetLogTerm() {
				n.refuse(m, fmt.Sprintf("its log has term %d where an entry of term %d is committed here: one of the two has lost its data. If a majority agrees with the other one, "+
					"remove this member (DELETE /%d on another one) and add a new one with a new id and an empty data directory", m.GetLogTerm(), t, n.id))
				return
			}
		}
		n.unsaved = true
	case raftpb.MsgSnap:
		n.unsaved = true
	case raftpb.MsgHeartbeat:
		if n.unsaved && n.raw.HasReady() {
			// An append or a snapshot before it may have cut the log;
			// look again when stable is exact.
			n.later = append(n.later, m)
			return
		}
		// A leader never commits past what we acknowledged, and that is on
		// disk. raft panics over more.
		if m.GetCommit() > n.stable && m.GetTerm() >= n.now.term {
			n.refuse(m, "it commits more than this log holds")
			return
		}
	case raftpb.MsgAppResp:
		// What a follower acknowledges was sent, and is on this disk since.
		if m.GetIndex() > n.stable && !m.GetReject() && n.leads(m) {
			n.refuse(m, "it acknowledges more than this log holds")
			return
		}
		if !m.GetReject() && n.leads(m) {
			n.noteAck(m)
		}
	case raftpb.MsgHeartbeatResp:
		c := m.GetContext()
		if len(c) != 8 {
			break
		}
		// raft would count past the reads that it knows.
		read := binary.LittleEndian.Uint64(c)
		if read > n.readSent && n.leads(m) {
			n.refuse(m, "it confirms a read that was not asked")
			return
		}
		if _, known := n.lastSeen[m.GetFrom()]; known && n.now.state == raft.StateLeader && n.now.term == m.GetTerm() {
			n.answered[m.GetFrom()] = max(n.answered[m.GetFrom()], read)
		}
	}
	n.give(m)
}

// leads says that m answers this leader. raft passes over what else comes: a
// leader that was restarted hears answers to what it has forgotten.
func (n *raftNode) leads(m *raftpb.Message) bool {
	st := n.raw.BasicStatus()
	return st.RaftState == raft.StateLeader && st.GetTerm() == m.GetTerm()
}

// give is step without the checks.
func (n *raftNode) give(m *raftpb.Message) {
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

// refuse drops a message that would break raft's invariants: it is hostile, or
// one of the two logs has lost something.
func (n *raftNode) refuse(m *raftpb.Message, why string) {
	n.met.refusedMessages.Inc()
	n.said.Error("ignored a peer's message: "+why, zap.String("type", m.GetType().String()), zap.Uint64("from", m.GetFrom()),
		zap.Uint64("term", m.GetTerm()), zap.Uint64("index", m.GetIndex()), zap.Uint64("commit", m.GetCommit()), zap.Uint64("last", n.stable))
}

// tick is 100 ms of raft time.
func (n *raftNode) tick() {
	n.ticks++
	n.dropped = false
	if !n.aside.stands() {
		n.raw.Tick()
	}
	if n.trimDue() {
		n.trimLog()
	}
	n.expire()
	n.repropose()
	n.retryReads(false)
	n.noteSeen()
	n.proposeTick()
	n.testify()
	n.tendMembers()
	n.complain()
	for id, at := range n.leaving { // order: does not matter, each goes by itself
		if n.ticks >= at {
			delete(n.leaving, id)
			// goroutine: peer-remover
			n.spawn(func() { n.tr.RemovePeer(types.ID(id)) }) // waits for a write that hangs
		}
	}
}

// complain says at long intervals that there is no leader, and who is missing.
func (n *raftNode) complain() {
	silent := n.ticks - n.since
	if n.now.lead != raft.None || silent%600 != uint64(4*n.cfg.ElectionTicks) {
		return
	}
	var missing []string
	for _, m := range n.members.Load().Members {
		if m.ID != n.id && !n.peerActive(m.ID) {
			missing = append(missing, fmt.Sprintf("%d at %s", m.ID, m.PeerURLs[0]))
		}
	}
	n.log.Warn("no leader: writes and linearizable reads are refused until a majority of the voters is connected",
		zap.Duration("for", time.Duration(silent)*n.cfg.TickInterval), zap.Strings("not_connected", missing))
}

// ready carries out what raft decided, in the order that durability asks for.
func (n *raftNode) ready() error {
	rd := n.raw.Ready()
	if rd.SoftState != nil || !raft.IsEmptyHardState(rd.HardState) {
		n.observe(rd)
	}
	// Appends and heartbeats may leave while the disk works (thesis 10.2.1).
	// Votes and acknowledgements of appends promise that the disk is done.
	if len(rd.Entries) > 0 {
		n.noteAppend()
	}
	early, late := n.sort(rd.Messages)
	n.send(append(n.acks, early...))

	// What is on this disk already need not wait for the sync below.
	onDisk, fresh := n.splitCommitted(rd)
	n.publish(onDisk)
	if err := n.persist(rd); err != nil {
		return err
	}
	n.acks = late
	if len(fresh) > 0 { // that may wait for the apply loop
		n.sendAcks()
		n.publish(fresh)
	}
	n.raw.Advance(rd)
	n.finishReads(rd.ReadStates)
	n.unsaved = false
	for _, m := range n.later {
		n.step(m)
	}
	n.later = n.later[:0]
	return nil
}

// observe notes who leads. On a change everything that waits for a leader moves.
func (n *raftNode) observe(rd raft.Ready) {
	before := n.now
	if rd.SoftState != nil {
		n.now.lead, n.now.state = rd.SoftState.Lead, rd.SoftState.RaftState
	}
	if !raft.IsEmptyHardState(rd.HardState) {
		if t := rd.HardState.GetTerm(); t != n.now.term {
			n.now.term, n.readSent = t, 0
			clear(n.answered)
			clear(n.acked)
		}
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
		n.since = n.ticks
		if n.now.lead != raft.None {
			n.met.leaderChanges.Inc()
		}
		n.log.Info("leader changed", zap.Uint64("leader", n.now.lead), zap.Uint64("term", n.now.term))
	}
	if n.now.lead != raft.None {
		n.mail.post(func() { n.repropose(); n.retryReads(true) }) // after this Ready
	}
}

// sort splits the messages of a Ready, and joins what one turn of the loop has to
// say to the same peer: each message costs both ends a system call or two, and
// raft makes one for every proposal, commit and read.
func (n *raftNode) sort(ms []*raftpb.Message) (early, late []*raftpb.Message) {
	for _, m := range ms {
		switch m.GetType() {
		case raftpb.MsgAppResp:
			late = joinAcks(late, m)
		case raftpb.MsgVoteResp, raftpb.MsgPreVoteResp:
			late = append(late, m)
		case raftpb.MsgHeartbeat:
			if c := m.GetContext(); len(c) == 8 {
				n.readSent = max(n.readSent, binary.LittleEndian.Uint64(c))
			}
			early = joinHeartbeats(early, m)
		case raftpb.MsgHeartbeatResp:
			early = joinHeartbeats(early, m)
		case raftpb.MsgApp:
			early = joinAppends(early, m)
		default:
			early = append(early, m)
		}
	}
	return early, late
}

// lastTo finds the last message of m's type to m's receiver, in m's term; -1: none.
func lastTo(ms []*raftpb.Message, m *raftpb.Message) int {
	for i := len(ms) - 1; i >= 0; i-- {
		if ms[i].GetTo() == m.GetTo() && ms[i].GetType() == m.GetType() && ms[i].GetTerm() == m.GetTerm() {
			return i
		}
	}
	return -1
}

// joinAcks: the acknowledgement of a later entry covers those of earlier ones.
func joinAcks(ms []*raftpb.Message, m *raftpb.Message) []*raftpb.Message {
	if i := lastTo(ms, m); i >= 0 && !m.GetReject() && !ms[i].GetReject() && ms[i].GetIndex() <= m.GetIndex() {
		ms[i] = m
		return ms
	}
	return append(ms, m)
}

// joinHeartbeats: contexts count up, and the answer to a later one confirms all
// reads before it.
func joinHeartbeats(ms []*raftpb.Message, m *raftpb.Message) []*raftpb.Message {
	if i := lastTo(ms, m); i >= 0 && (len(m.GetContext()) != 0 || len(ms[i].GetContext()) == 0) {
		ms[i] = m
		return ms
	}
	return append(ms, m)
}

// joinAppends puts m's entries behind those of the append before it, if they
// follow without a gap.
func joinAppends(ms []*raftpb.Message, m *raftpb.Message) []*raftpb.Message {
	i := lastTo(ms, m)
	if i < 0 {
		return append(ms, m)
	}
	before := ms[i]
	ents := before.GetEntries()
	if before.GetIndex()+uint64(len(ents)) != m.GetIndex() || len(ents) > 0 && len(m.GetEntries()) > 0 && entryBytes(ents)+entryBytes(m.GetEntries()) > maxMessageBytes {
		return append(ms, m)
	}
	if len(ents) == 0 {
		ms[i] = m
	} else {
		before.Entries = slices.Concat(ents, m.GetEntries()) // raft's own slice is not ours to extend
		before.Commit = m.Commit
	}
	return ms
}

func entryBytes(ents []*raftpb.Entry) (size int) {
	for _, e := range ents {
		size += len(e.GetData())
	}
	return size
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

// splitCommitted separates committed entries that this disk holds from those that
// rd only brings, some in the place of others: without asynchronous storage raft
// hands out both.
func (n *raftNode) splitCommitted(rd raft.Ready) (onDisk, fresh []*raftpb.Entry) {
	ents, held := rd.CommittedEntries, n.stable
	if len(rd.Entries) > 0 {
		held = min(held, rd.Entries[0].GetIndex()-1)
	}
	i := len(ents)
	for i > 0 && ents[i-1].GetIndex() > held {
		i--
	}
	return ents[:i], ents[i:]
}

// persist makes rd durable, with one sync, and then the same in memory.
func (n *raftNode) persist(rd raft.Ready) error {
	if !raft.IsEmptySnap(rd.Snapshot) {
		if err := n.install(rd); err != nil {
			return err
		}
	} else if len(rd.Entries) > 0 || !raft.IsEmptyHardState(rd.HardState) {
		if err := n.store.save(rd.HardState, rd.Entries); err != nil {
			return err
		}
	}
	if !raft.IsEmptyHardState(rd.HardState) {
		if err := n.mem.SetHardState(rd.HardState); err != nil {
			return err
		}
	}
	if len(rd.Entries) > 0 {
		n.appended = true
		if err := n.mem.Append(rd.Entries); err != nil {
			return err
		}
		n.stable = rd.Entries[len(rd.Entries)-1].GetIndex()
		n.progress.last.Store(n.stable)
	}
	return n.leaveAside()
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
	if n.cut { // what comes after a gap must not be applied
		return
	}
	select {
	case n.commitC <- c:
	case <-n.stopC:
		n.cut = true
	}
}

// end is what the loop does after its last turn.
func (n *raftNode) end() {
	n.refuseAll()
	close(n.commitC)
	close(n.doneC)
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
		if c.sent.Load() {
			c.done <- errCommitTimeout
		} else {
			c.done <- errStopping
		}
	}
	n.reads.close(errStopping)
}

func (n *raftNode) collectForRefusal() {
	for range len(n.proposeC) {
		n.queue = append(n.queue, <-n.proposeC)
	}
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
