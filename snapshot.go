package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"pontoon/kv"
)

// The way of a snapshot: the apply loop clones the state and a writer streams it
// to a file; the loop records it in the log, forgets what came before, and sends
// the file to followers that need it; a follower installs what it was sent.

type snapDone struct {
	header snapHeader
	size   int64 // bytes of the file
	err    error
	purge  chan uint64 // the oldest snapshot to keep, 0: all
}

// snapshotSource opens snapshot files to send and tells which survive a purge.
type snapshotSource interface {
	openSnapshot(index uint64) (snapFile, error)
	snapshotHeader(index uint64) (snapHeader, error)
	receiveSnapshot(index uint64, body io.Reader, fits func(snapHeader) error) error
	verifySnapshot(index uint64) (snapHeader, error)
	forgetSnapshot(index uint64) (newest uint64)
	freeBytes() (int64, error)
	oldestKept() uint64
}

// raftStorage is raft's view of the log. Its snapshot is the newest file, not
// a copy of the state: MemoryStorage deep-copies what it holds, on the raft
// goroutine.
//
// The log in memory is what followers are sent from, and no more: it may begin
// behind the newest snapshot (compactTo). MemoryStorage's own snapshot is the
// one that the log began with, so CreateSnapshot must not be called.
type raftStorage struct {
	*raft.MemoryStorage
	newest   *raftpb.Snapshot // metadata of the newest file; nil: none
	appended int64            // bytes, by logBytes, since the log was last looked at for what can go
	members  func() *membership
	request  func()
}

// logBytes is what an entry costs in memory: its data, and about as much for the
// entry itself and the numbers that it points to.
func logBytes(e *raftpb.Entry) int64 { return int64(len(e.GetData())) + 128 }

func (s *raftStorage) Append(ents []*raftpb.Entry) error {
	for _, e := range ents {
		s.appended += logBytes(e)
	}
	return s.MemoryStorage.Append(ents)
}

// Snapshot offers the newest file if a follower could use it. A file older than
// the newest membership change would be refused by a member it does not list
// (etcd#12473), and one older than the log cannot be continued. Then another one
// is asked for; raft tries again at the next heartbeat.
func (s *raftStorage) Snapshot() (*raftpb.Snapshot, error) {
	first, err := s.FirstIndex()
	if m := s.newest.GetMetadata(); err == nil && m.GetIndex() > 0 && m.GetIndex()+1 >= first && sameConf(m.GetConfState(), s.members().confState()) {
		return proto.Clone(s.newest).(*raftpb.Snapshot), nil
	}
	s.request()
	return nil, raft.ErrSnapshotTemporarilyUnavailable
}

// ApplySnapshot begins the log anew after a snapshot.
func (s *raftStorage) ApplySnapshot(sn *raftpb.Snapshot) error {
	if sn.GetMetadata().GetIndex() > s.newest.GetMetadata().GetIndex() {
		s.newest = sn
	}
	return s.MemoryStorage.ApplySnapshot(sn)
}

func (h *snapHeader) raftSnapshot() *raftpb.Snapshot {
	return &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{
		Index: new(h.Index), Term: new(h.Term), ConfState: h.Members.confState(),
	}}
}

// wantSnapshot is called by raft when a follower needs a snapshot that is not there.
func (n *raftNode) wantSnapshot() {
	n.wanted = n.ticks
	n.requestSnapshot()
}

func (n *raftNode) requestSnapshot() {
	select {
	case n.snapReqC <- struct{}{}:
	default: // one is wanted already
	}
}

// sendSnapshot streams the file of a MsgSnap beside the message.
func (n *raftNode) sendSnapshot(m *raftpb.Message) {
	to, index := m.GetTo(), m.GetSnapshot().GetMetadata().GetIndex()
	f, err := n.snaps.openSnapshot(index)
	if err != nil {
		n.dropSnapshot(index, err)
		n.ReportSnapshot(to, raft.SnapshotFailure)
		return
	}
	n.log.Info("sending a snapshot", zap.Uint64("to", to), zap.Uint64("index", index), zap.Int64("bytes", f.size))
	n.sending[to] = index
	sm := snap.NewMessage(m, f, f.size)
	n.tr.SendSnapshot(sm)
	// goroutine: snapshot-sent
	n.spawn(func() {
		ok := false
		select {
		case ok = <-sm.CloseNotify():
		case <-n.doneC:
			return
		}
		var damage error
		if !ok {
			// The receiver may have refused what this disk has done to the file
			// since it was written, and would refuse it for ever.
			_, damage = n.snaps.verifySnapshot(index)
		}
		n.mail.post(func() {
			delete(n.sending, to)
			if damage != nil {
				n.dropSnapshot(index, damage)
			}
			if !ok {
				n.raw.ReportSnapshot(to, raft.SnapshotFailure)
			}
		})
	})
}

// dropSnapshot stops counting on a file that cannot be read any more, and has
// another one written: of a later index, or of the same in the place of this one.
func (n *raftNode) dropSnapshot(index uint64, why error) {
	newest := n.snaps.forgetSnapshot(index)
	if n.mem.newest.GetMetadata().GetIndex() != index {
		return // nobody is offered it any more; it may have been purged
	}
	n.log.Error("a snapshot on this disk is damaged and is written again; check the disk", zap.Uint64("index", index), zap.Error(why))
	n.mem.newest = nil
	n.progress.snapshot.Store(newest)
	n.wantSnapshot()
}

// install takes over a snapshot that a leader sent: its file was verified when
// it arrived. The store loads the very same file.
func (n *raftNode) install(rd raft.Ready) error {
	s := rd.Snapshot
	h, err := n.snaps.snapshotHeader(s.GetMetadata().GetIndex())
	if err != nil {
		return fmt.Errorf("%w: install snapshot: %w", errDurability, err)
	}
	hs := rd.HardState // never empty: the commit index moved
	if raft.IsEmptyHardState(hs) || hs.GetCommit() < h.Index {
		return fmt.Errorf("install snapshot %d: hard state %v does not commit it", h.Index, hs)
	}
	if err := n.store.install(s.Metadata, hs, rd.Entries); err != nil {
		return err
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

// snapshotDone records a finished snapshot file and lets go of the log before it.
func (n *raftNode) snapshotDone(d snapDone) error {
	if d.err != nil {
		return d.err
	}
	sn := d.header.raftSnapshot()
	index := d.header.Index
	if index <= n.progress.snapshot.Load() {
		d.purge <- 0 // a leader's snapshot overtook it
		return nil
	}
	if err := n.store.saveSnapshot(sn.Metadata); err != nil {
		return err
	}
	n.mem.newest, n.stateBytes = sn, d.size
	n.progress.snapshot.Store(index)
	n.trimLog()
	oldest := n.snaps.oldestKept()
	if oldest > 0 {
		if err := n.store.release(oldest); err != nil {
			return err
		}
	}
	d.purge <- oldest
	return nil
}

// trimEvery is how many bytes the log in memory grows by, at least, between two
// looks at what of it can go.
const trimEvery = 4 << 20

// trimPause is how many ticks later log is looked at again that a follower lacked.
const trimPause = 10

// trimDue is asked at every tick.
func (n *raftNode) trimDue() bool {
	return n.mem.appended >= trimEvery || n.trimAgain > 0 && n.ticks >= n.trimAgain
}

// trimLog forgets log in memory that nobody will need.
func (n *raftNode) trimLog() {
	to, more := n.compactTo()
	if to > 0 {
		n.warn("forget old log in memory", n.mem.Compact(to))
	}
	n.mem.appended, n.trimAgain = 0, 0
	if more {
		n.trimAgain = n.ticks + trimPause
	}
}

// compactTo is the last entry that the log in memory can do without; 0: none.
// more: it could do without later ones but for what followers lack now.
//
// It keeps the newest part, for followers that lag a little or are being
// restarted: CatchUpBytes, or an eighth of the state, as a follower that is sent
// a snapshot instead costs all of it. What a follower lacks that was heard of
// lately is kept up to four times that, and all that follows a snapshot on its
// way, or one that is being written for a follower, up to maxLogBytesHeld. Whoever
// needs more gets a snapshot. How old the newest one is does not matter here.
func (n *raftNode) compactTo() (to uint64, more bool) {
	first, errFirst := n.mem.FirstIndex()
	last, errLast := n.mem.LastIndex()
	ents, err := n.mem.Entries(first, last+1, noLimit)
	if errors.Join(errFirst, errLast, err) != nil {
		return 0, false // it is empty
	}
	applied := n.raw.BasicStatus().Applied // raft may still hand out what is not
	snapshots, lag := n.needed()
	keep := max(n.cfg.CatchUpBytes, n.stateBytes/8)
	var held int64
	for _, e := range slices.Backward(ents) {
		held += logBytes(e)
		i := e.GetIndex()
		if held <= keep || i > applied {
			continue
		}
		if held > maxLogBytesHeld || i <= snapshots && (held > 4*keep || i <= lag) {
			return i, more
		}
		more = true
	}
	return 0, more
}

// needed returns the oldest snapshot that a follower is being sent or waits for,
// and the last entry that all followers have that were heard of lately.
func (n *raftNode) needed() (snapshots, lag uint64) {
	snapshots, lag = math.MaxUint64, math.MaxUint64
	for _, sent := range n.sending {
		snapshots = min(snapshots, sent)
	}
	if n.wanted > 0 && n.ticks-n.wanted <= followerPatience {
		snapshots = min(snapshots, n.mem.newest.GetMetadata().GetIndex())
	}
	if n.now.state == raft.StateLeader {
		n.raw.WithProgress(func(id uint64, _ raft.ProgressType, p tracker.Progress) {
			// Not p.RecentActive: raft clears that at each of its own checks.
			seen, ok := n.lastSeen[id]
			switch {
			case !ok || n.ticks-seen > followerPatience: // this member itself is never seen
			case p.State == tracker.StateSnapshot:
				snapshots = min(snapshots, p.PendingSnapshot)
			default:
				lag = min(lag, p.Match)
			}
		})
	}
	return snapshots, lag
}

// followerPatience is for how many ticks log is kept for a follower that was heard
// of, or that asked for a snapshot: it does so with each heartbeat that reaches it.
const followerPatience = 50

const noLimit = 1<<64 - 1

// snapshotWriter is what the store needs of the disk.
type snapshotWriter interface {
	writeSnapshot(h snapHeader, state *kv.State) (int64, error)
	readSnapshot(index uint64) (snapHeader, *kv.State, error)
	purge(oldest uint64) error
	setAsideSnapshots(good, applied uint64) ([]string, error)
	sizes() (walBytes, snapBytes int64)
}

// snapRetry is how long to wait after a snapshot that found no room. Until there is
// some the log grows instead, inside the space that it has allocated.
const snapRetry = 2 * time.Second

// snapPutOff is sent to snapped instead of a size.
const snapPutOff = -1

// snapshotEnded lets the next snapshot begin.
func (s *kvstore) snapshotEnded(size int64) {
	s.snapping = false
	if size == snapPutOff {
		s.snapNext = time.Now().Add(snapRetry)
		s.since.entries = max(s.since.entries, s.cfg.SnapshotEntries) // still due
		return
	}
	s.snapSize = size
}

// snapshotDue: often enough that a restart replays little, seldom enough that
// snapshots of a large state do not cost more than the log they replace.
func (s *kvstore) snapshotDue() bool {
	return s.since.entries >= s.cfg.SnapshotEntries || s.since.bytes >= max(s.cfg.SnapshotBytes, s.snapSize)
}

// snapshot starts writing the state as it is now, while writes go on: the copy
// costs nothing (kv.State.Clone). One at a time.
func (s *kvstore) snapshot() {
	if s.snapping || s.standing() != agrees || s.table == nil || len(s.table.Members) == 0 || time.Now().Before(s.snapNext) {
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
	s.write(h, state)
}

// writeSnapshot is the snapshot-writer: a file, its record in the log, and the
// end of what both replace.
func (s *kvstore) writeSnapshot(h snapHeader, state *kv.State) {
	start := time.Now()
	d := s.fileSnapshot(h, state)
	switch {
	case noRoom(d.err): // nothing is lost but time: the log has it all
		s.log.Error("no room for a snapshot: it is put off, and the log grows; free some space", zap.Uint64("index", h.Index), zap.Error(d.err))
		s.snapped <- snapPutOff
		return
	case errors.Is(d.err, kv.ErrBroken):
		s.broken <- d.err
		fallthrough
	case d.err == nil && s.standing() == diverged:
		s.snapped <- 0 // a file that the log does not vouch for is not loaded
		return
	}
	select {
	case s.node.snapDoneC <- d:
	case <-s.node.doneC:
		return
	}
	select {
	case oldest := <-d.purge:
		s.purge(oldest)
	case <-s.node.doneC:
		return
	}
	s.met.snapshotSeconds.Observe(time.Since(start).Seconds())
	s.log.Info("snapshot written", zap.Uint64("index", h.Index), zap.Int64("bytes", d.size), zap.Duration("took", time.Since(start).Round(time.Millisecond)))
	s.snapped <- d.size
}

func (s *kvstore) fileSnapshot(h snapHeader, state *kv.State) snapDone {
	size, err := s.disk.writeSnapshot(h, state)
	return snapDone{header: h, size: size, err: err, purge: make(chan uint64, 1)}
}

// purge deletes what only snapshots before oldest needed; 0: nothing is to go.
// What is left behind costs space, nothing else.
func (s *kvstore) purge(oldest uint64) {
	if oldest == 0 {
		return
	}
	if err := s.disk.purge(oldest); err != nil {
		s.log.Error("could not delete old snapshots and log; is the data directory writable?", zap.Error(err))
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
	s.rejoin(h.Index)
	return nil
}
