package main

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"pontoon/kv"
)

// The way of a snapshot: the apply loop clones the state and a writer streams it
// to a file; the loop records it in the log, forgets what came before, and sends
// the file to followers that need it; a follower installs what it was sent.

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
	oldestKept() uint64
}

// raftStorage is raft's view of the log. Its snapshot is the newest file, not
// a copy of the state: MemoryStorage deep-copies what it holds, on the raft
// goroutine.
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

func (h *snapHeader) raftSnapshot() *raftpb.Snapshot {
	return &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{
		Index: new(h.Index), Term: new(h.Term), ConfState: h.Members.confState(),
	}}
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
	if _, err := n.mem.CreateSnapshot(index, sn.Metadata.ConfState, nil); err != nil {
		return fmt.Errorf("snapshot %d: %w", index, err)
	}
	n.progress.snapshot.Store(index)
	if to := n.compactTo(index); to > 0 {
		if err := n.mem.Compact(to); err != nil && !errors.Is(err, raft.ErrCompacted) {
			return fmt.Errorf("compact to %d: %w", to, err)
		}
	}
	oldest := n.snaps.oldestKept()
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

// snapshotWriter is what the store needs of the disk.
type snapshotWriter interface {
	writeSnapshot(h snapHeader, state *kv.State) (int64, error)
	readSnapshot(index uint64) (snapHeader, *kv.State, error)
	purge(oldest uint64) error
	sizes() (walBytes, snapBytes int64)
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
