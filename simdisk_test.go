package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"pontoon/internal/sim"
	"pontoon/kv"
)

// simDisk is the disk of one simulated member: what diskStore does with files,
// done with records and bytes, and what a crash leaves of them. Everything on it
// is encoded, so nothing that is changed in memory later changes the disk.
//
// It is as harsh as the real one may be: what a purge may delete is gone at
// once, a crash takes what was not synced, and it must not be used after an error.
type simDisk struct {
	m     *simMember
	keep  int
	meta  walMetadata
	log   sim.Log
	hard  *raftpb.HardState // as saved last
	snaps map[uint64][]byte // complete files
	boots uint64

	recorded []uint64 // snapshots that the log vouches for, oldest first
	failed   bool     // a write has failed: this incarnation must not come again
	full     bool

	fileFailed bool            // as failed, of a snapshot file: the loop goes on until it is told
	spoiled    map[uint64]bool // snapshots that rot has struck

	// One-shot faults, set by the world.
	failNext bool
	stall    bool
}

const (
	recFrame    = 'f' // hard state and entries of one save, in a message: all of it is there or nothing
	recSnapshot = 's'
)

var errSimDisk = errors.New("the simulated disk fails")

var _ logStore = (*simDisk)(nil)
var _ snapshotSource = (*simDisk)(nil)
var _ snapshotWriter = (*simDisk)(nil)

// receiveSnapshot is that of diskStore.
func (d *simDisk) receiveSnapshot(index uint64, body io.Reader, fits func(snapHeader) error) error {
	b, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	head, err := kv.VerifySnapshot(bytes.NewReader(b))
	if err != nil {
		return err
	}
	h, err := decodeSnapHeader(head)
	if err == nil {
		err = fits(h)
	}
	if err != nil {
		return err
	}
	if old, err := d.verifySnapshot(index); err == nil && fits(old) == nil {
		return nil
	}
	d.snaps[index] = b
	delete(d.spoiled, index)
	return nil
}

func (d *simDisk) forgetSnapshot(index uint64) (newest uint64) {
	d.recorded = slices.DeleteFunc(d.recorded, func(i uint64) bool { return i == index })
	if len(d.recorded) > 0 {
		newest = d.recorded[len(d.recorded)-1]
	}
	return newest
}

func (d *simDisk) setAsideSnapshots(good, applied uint64) (names []string, err error) {
	for _, i := range slices.Sorted(maps.Keys(d.snaps)) {
		if i > good && i <= applied {
			names = append(names, fmt.Sprint(i))
			delete(d.snaps, i)
		}
	}
	return names, nil
}

func encoded(m proto.Message) []byte {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}

func frameRecord(hs *raftpb.HardState, ents []*raftpb.Entry) sim.Record {
	return sim.Record{Kind: recFrame, Data: encoded(&raftpb.Message{Term: new(hs.GetTerm()), Vote: new(hs.GetVote()), Commit: new(hs.GetCommit()), Entries: ents})}
}

func frameOf(rec sim.Record) (*raftpb.HardState, []*raftpb.Entry) {
	m := decoded(rec.Data, &raftpb.Message{})
	return &raftpb.HardState{Term: new(m.GetTerm()), Vote: new(m.GetVote()), Commit: new(m.GetCommit())}, m.GetEntries()
}

func snapRecord(m *raftpb.SnapshotMetadata) sim.Record {
	return sim.Record{Kind: recSnapshot, Data: encoded(m)}
}

// bootstrap is diskStore.bootstrap.
func (d *simDisk) bootstrap(id uint64, table *membership, joined bool) {
	d.meta = walMetadata{Version: 1, ClusterID: table.ClusterID, MemberID: id, Joined: joined}
	if joined {
		return
	}
	state := kv.NewState()
	state.SetApplied(1)
	h := snapHeader{Index: 1, Term: 1, Members: table}
	d.snaps[1] = d.encodeSnapshot(h, state)
	d.log.Replace([]sim.Record{snapRecord(h.raftSnapshot().Metadata),
		frameRecord(&raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(0)), Commit: new(uint64(1))}, nil)})
}

func (d *simDisk) encodeSnapshot(h snapHeader, state *kv.State) []byte {
	head, err := json.Marshal(h)
	if err != nil {
		panic(err)
	}
	var b bytes.Buffer
	if err := kv.WriteSnapshot(&b, head, state); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// load is diskStore.load: the newest snapshot that the log vouches for and that
// is whole, then the log after it.
func (d *simDisk) load() (*recovered, error) {
	r := &recovered{meta: d.meta, hard: &raftpb.HardState{}, state: kv.NewState()}
	var marks []*raftpb.SnapshotMetadata
	var ents []*raftpb.Entry
	for _, rec := range d.log.Records() {
		switch rec.Kind {
		case recFrame:
			var es []*raftpb.Entry
			r.hard, es = frameOf(rec)
			ents = append(ents, es...)
		case recSnapshot:
			marks = append(marks, decoded(rec.Data, &raftpb.SnapshotMetadata{}))
		}
	}
	marks = slices.DeleteFunc(marks, func(s *raftpb.SnapshotMetadata) bool { return s.GetIndex() > r.hard.GetCommit() })
	d.recorded = nil
	for _, s := range marks {
		if d.snaps[s.GetIndex()] != nil {
			d.recorded = append(d.recorded, s.GetIndex())
		}
	}
	var damaged []error
	for _, s := range slices.Backward(marks) {
		h, state, err := d.readSnapshot(s.GetIndex())
		if err == nil && h.Term != s.GetTerm() {
			err = fmt.Errorf("snapshot %d is of term %d, the log expects %d", s.GetIndex(), h.Term, s.GetTerm())
		}
		if err != nil {
			damaged = append(damaged, err)
			d.recorded = slices.DeleteFunc(d.recorded, func(i uint64) bool { return i == s.GetIndex() })
			continue
		}
		r.snap, r.state = h, state
		break
	}
	if r.snap.Index == 0 && len(damaged) > 0 {
		return nil, fmt.Errorf("%w: no usable snapshot: %w", errRefuse, errors.Join(damaged...))
	}
	for _, e := range ents {
		if err := r.add(uint8(e.GetType()), e.GetTerm(), e.GetIndex(), e.GetData()); err != nil {
			return nil, fmt.Errorf("%w: %w", errRefuse, err)
		}
	}
	d.hard = r.hard
	if err := (&diskStore{dir: "sim"}).checkRecovered(r); err != nil {
		return nil, err
	}
	if len(damaged) > 0 {
		d.m.w.cover.Hit("load/older snapshot")
	}
	d.log.Sync()
	return r, nil
}

func decoded[M proto.Message](b []byte, m M) M {
	if err := proto.Unmarshal(b, m); err != nil {
		panic(err)
	}
	return m
}

// use says that the node calls the disk, which it must not after an error.
func (d *simDisk) use(what string) {
	if d.failed {
		d.m.w.failf("member %d: %s after the disk had failed", d.m.id, what)
	}
}

// maybeFail fails a write if it is to: some of what it wrote may be there.
func (d *simDisk) maybeFail() error {
	if !d.failNext {
		return nil
	}
	d.failNext, d.failed = false, true
	d.m.w.mark("disk fails", d.m)
	return fmt.Errorf("%w: %w", errDurability, errSimDisk)
}

func (d *simDisk) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	d.use("save")
	w, n := d.m.w, d.m.node
	w.crashPoint(n, "before a save", 2)
	must := !raft.IsEmptyHardState(hs) && raft.MustSync(hs, d.hard, len(ents)) || len(ents) > 0
	if must {
		w.beside(n) // the apply loop and the handlers go on while the disk works
	}
	if !raft.IsEmptyHardState(hs) {
		d.hard = proto.Clone(hs).(*raftpb.HardState)
	}
	if !raft.IsEmptyHardState(hs) || len(ents) > 0 {
		d.log.Append(recFrame, frameRecord(d.hard, ents).Data)
	}
	if err := d.maybeFail(); err != nil {
		return err
	}
	w.crashPoint(n, "before a sync", 2)
	if must {
		d.work()
		d.log.Sync()
	}
	w.crashPoint(n, "after a save", 2)
	w.trace.Add(sim.Line{At: n.at(), Who: n.m.id, What: "save", A: uint64(len(ents)), B: hs.GetTerm(), C: hs.GetCommit()})
	return nil
}

// work lets the time of a sync pass for the loop.
func (d *simDisk) work() {
	w, n := d.m.w, d.m.node
	took := w.faults.Between(w.prof.syncMin, w.prof.syncMax)
	if d.stall {
		d.stall = false
		took += w.faults.Between(300*ms, 4000*ms)
		w.mark("disk stalls", d.m)
	}
	n.busy = n.at() + took
}

func (d *simDisk) saveSnapshot(m *raftpb.SnapshotMetadata) error {
	d.use("saveSnapshot")
	if d.snaps[m.GetIndex()] == nil {
		d.m.w.failf("member %d: recorded snapshot %d, which is not on its disk", d.m.id, m.GetIndex())
	}
	d.m.w.crashPoint(d.m.node, "before a snapshot is recorded", 20)
	d.log.Append(recSnapshot, snapRecord(m).Data)
	if err := d.maybeFail(); err != nil {
		return err
	}
	d.log.Sync()
	d.recorded = append(d.recorded, m.GetIndex())
	d.m.w.crashPoint(d.m.node, "after a snapshot is recorded", 20)
	return nil
}

func (d *simDisk) install(m *raftpb.SnapshotMetadata, hs *raftpb.HardState, ents []*raftpb.Entry) error {
	d.use("install")
	d.m.w.crashPoint(d.m.node, "before an install", 30)
	if err := d.maybeFail(); err != nil {
		return err
	}
	d.work()
	d.log.Replace([]sim.Record{snapRecord(m), frameRecord(hs, ents)})
	d.hard = proto.Clone(hs).(*raftpb.HardState)
	d.recorded = []uint64{m.GetIndex()}
	d.m.w.mark("installs a snapshot", d.m)
	d.m.w.crashPoint(d.m.node, "after an install", 30)
	return nil
}

// release is where a segment may be deleted from on; purge does it.
func (d *simDisk) release(uint64) error { d.use("release"); return nil }

func (d *simDisk) oldestKept() uint64 {
	if len(d.recorded) <= d.keep {
		return 0
	}
	d.recorded = slices.Clone(d.recorded[len(d.recorded)-d.keep:])
	return d.recorded[0]
}

// purge leaves of the log no more than the oldest kept snapshot needs: the real
// one deletes whole segments, at worst just as much.
func (d *simDisk) purge(oldest uint64) error {
	maps.DeleteFunc(d.snaps, func(i uint64, _ []byte) bool { return i < oldest })
	all := d.log.Records()
	synced := len(all) - d.log.Unsynced()
	// A log loses its beginning, in order: what was written after entry oldest stays,
	// and so does what that replaces.
	from := 0
	for i, rec := range all[:synced] {
		if rec.Kind != recFrame {
			continue
		}
		if _, ents := frameOf(rec); slices.ContainsFunc(ents, func(e *raftpb.Entry) bool { return e.GetIndex() == oldest }) {
			from = i
		}
	}
	kept := slices.Clone(all[from:synced])
	tail := slices.Clone(all[synced:])
	d.log.Replace(kept)
	for _, rec := range tail {
		d.log.Append(rec.Kind, rec.Data)
	}
	return nil
}

func (d *simDisk) writeSnapshot(h snapHeader, state *kv.State) (int64, error) {
	d.use("writeSnapshot")
	if err := d.maybeFail(); err != nil {
		d.failed, d.fileFailed = false, true // the loop has yet to hear of it
		return 0, err
	}
	b := d.encodeSnapshot(h, state)
	d.snaps[h.Index] = b
	delete(d.spoiled, h.Index)
	d.m.w.trace.Add(sim.Line{At: d.m.w.q.Now(), Who: d.m.id, What: "snapshot file", A: h.Index, B: h.Term, C: uint64(len(b))})
	return int64(len(b)), nil
}

func (d *simDisk) file(index uint64) ([]byte, error) {
	if b := d.snaps[index]; b != nil {
		return b, nil
	}
	return nil, fmt.Errorf("snapshot %d: %w", index, os.ErrNotExist)
}

func (d *simDisk) readSnapshot(index uint64) (snapHeader, *kv.State, error) {
	var h snapHeader
	b, err := d.file(index)
	if err != nil {
		return h, nil, err
	}
	head, state, err := kv.ReadSnapshot(bytes.NewReader(b))
	if err != nil {
		return h, nil, err
	}
	if h, err = decodeSnapHeader(head); err != nil {
		return h, nil, err
	}
	if h.Index != index || state.Applied() != index {
		return h, nil, fmt.Errorf("snapshot %d: the state is of entry %d, the header says %d", index, state.Applied(), h.Index)
	}
	return h, state, nil
}

func (d *simDisk) openSnapshot(index uint64) (snapFile, error) {
	b, err := d.file(index)
	if err != nil {
		return snapFile{}, err
	}
	return snapFile{io.NopCloser(bytes.NewReader(b)), int64(len(b))}, nil
}

func (d *simDisk) snapshotHeader(index uint64) (snapHeader, error) {
	b, err := d.file(index)
	if err != nil {
		return snapHeader{}, err
	}
	head, err := kv.ReadSnapshotHeader(bytes.NewReader(b))
	if err != nil {
		return snapHeader{}, err
	}
	return decodeSnapHeader(head)
}

func (d *simDisk) verifySnapshot(index uint64) (snapHeader, error) {
	b, err := d.file(index)
	if err != nil {
		return snapHeader{}, err
	}
	head, err := kv.VerifySnapshot(bytes.NewReader(b))
	if err != nil {
		return snapHeader{}, err
	}
	h, err := decodeSnapHeader(head)
	if err == nil && h.Index != index {
		err = fmt.Errorf("snapshot %d holds entry %d", index, h.Index)
	}
	return h, err
}

func (d *simDisk) freeBytes() (int64, error) {
	if d.full {
		return 0, nil
	}
	return 1 << 40, nil
}

func (d *simDisk) sizes() (walBytes, snapBytes int64) { return 0, 0 }
func (d *simDisk) close() error                       { return nil }

// spoil flips a bit of the newest snapshot, or of all that there are: then the
// member has to be replaced.
func (d *simDisk) spoil(r *sim.Rand, all bool) bool {
	if len(d.recorded) < 2 || len(d.spoiled) > 0 {
		return false
	}
	which := d.recorded[len(d.recorded)-1:]
	if all {
		which = d.recorded
	}
	for _, i := range which {
		if d.snaps[i] == nil {
			d.m.w.failf("member %d: snapshot %d, which the log vouches for, is gone", d.m.id, i)
		}
		b := slices.Clone(d.snaps[i])
		b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		d.snaps[i] = b
		d.spoiled[i] = true
	}
	return true
}

// crash leaves what a loss of power, or only the end of the process, leaves.
func (d *simDisk) crash(r *sim.Rand, power bool) (lost int) {
	d.failed, d.fileFailed, d.failNext, d.stall = false, false, false, false
	if power {
		lost = d.log.Crash(r)
	}
	return lost
}
