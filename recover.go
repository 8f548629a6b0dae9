package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"pontoon/internal/wal"
	"pontoon/kv"
)

// recovered is what the disk says after a start.
type recovered struct {
	meta    walMetadata
	hard    *raftpb.HardState
	entries []*raftpb.Entry
	snap    snapHeader // Index 0: none yet, a joiner that waits for its first
	state   *kv.State
	aside   *aside // nil: this member votes
}

// table is the member table after everything this log knows to be committed. It
// is for decisions at start; raft replays the same changes by itself.
func (r *recovered) table() *membership {
	table := r.snap.Members
	for _, e := range r.entries {
		if e.GetIndex() > r.hard.GetCommit() || e.GetType() != raftpb.EntryConfChangeV2 {
			continue
		}
		var cc raftpb.ConfChangeV2
		if proto.Unmarshal(e.GetData(), &cc) != nil {
			continue // refused at apply as well
		}
		if c, err := decodeConfChange(&cc); err == nil {
			if next, err := table.apply(c); err == nil {
				table = next
			}
		}
	}
	return table
}

// load reads the newest snapshot that the log vouches for and that is whole,
// then the log after it, and opens the log for appending.
func (d *diskStore) load() (*recovered, error) {
	if err := d.openMark(); err != nil {
		return nil, err
	}
	if err := wal.Settle(d.walDir()); err != nil && !errors.Is(err, wal.ErrDamaged) { // Read has more to say about that
		return nil, fmt.Errorf("%w: sync log: %w", errDurability, err)
	}
	type mark struct{ index, term uint64 }
	var marks []mark
	c, err := wal.Read(d.walDir(), wal.Visitor{Snapshot: func(index, term uint64) error {
		marks = append(marks, mark{index, term})
		return nil
	}})
	if err == nil {
		err = d.marked.covered(c)
	}
	if err != nil {
		return nil, damaged("the log in %s is damaged: %w", d.walDir(), err)
	}
	if c.Torn {
		d.log.Warn("the log ended in a write that a crash cut short, and goes on before it", zap.String("dir", d.walDir()))
	}
	marks = slices.DeleteFunc(marks, func(m mark) bool { return m.index > c.State.Commit })
	d.meta, d.hard, d.recorded = c.Metadata, c.State, nil
	r := &recovered{state: kv.NewState(), hard: &raftpb.HardState{Term: new(c.State.Term), Vote: new(c.State.Vote), Commit: new(c.State.Commit)}}
	if err := json.Unmarshal(c.Metadata, &r.meta); err != nil || r.meta.Version != 1 {
		return nil, fmt.Errorf("%w: the log in %s was not written by this program or by a newer one (metadata %.80q)", errRefuse, d.walDir(), c.Metadata)
	}
	for _, m := range marks {
		if _, err := os.Stat(d.snapPath(m.index)); err == nil && !slices.Contains(d.recorded, m.index) { // else it was purged
			d.recorded = append(d.recorded, m.index)
		}
	}
	var unusable []error
	for _, m := range slices.Backward(marks) {
		h, state, err := d.readSnapshot(m.index)
		if err == nil && (h.Index != m.index || h.Term != m.term) {
			err = fmt.Errorf("%s holds index %d term %d, the log expects term %d", d.snapPath(m.index), h.Index, h.Term, m.term)
		}
		if err != nil {
			unusable = append(unusable, err)
			d.recorded = slices.DeleteFunc(d.recorded, func(i uint64) bool { return i == m.index })
			d.log.Error("snapshot unusable, trying the one before", zap.Uint64("index", m.index), zap.Error(err))
			continue
		}
		r.snap, r.state = h, state
		break
	}
	if r.snap.Index == 0 && len(unusable) > 0 {
		return nil, damaged("no usable snapshot: %w", errors.Join(unusable...))
	}
	if c.First > r.snap.Index+1 {
		return nil, damaged("the log in %s begins with entry %d, and entry %d is needed (%v)", d.walDir(), c.First, r.snap.Index+1, c.Skipped)
	}
	if err := d.readEntries(r); err != nil {
		return nil, err
	}
	if err := d.checkRecovered(r); err != nil {
		return nil, err
	}
	if d.wal, err = wal.Open(d.walDir(), c, d.walOptions()); err != nil {
		return nil, fmt.Errorf("%w: open log: %w", errDurability, err)
	}
	d.owner = owner{r.meta.ClusterID, r.meta.MemberID}
	if err := d.setMark(syncMark{c.Frames, c.State.Term}, true); err != nil {
		return nil, fmt.Errorf("%w: write %s: %w", errDurability, filepath.Join(d.dir, "synced"), err)
	}
	r.aside, err = d.loadAside(r)
	return r, err
}

const replaceHint = "if the other members are healthy, remove this member (DELETE /<id>) and add a new one with a new id and an empty data directory"

// readEntries reads the log after r's snapshot.
func (d *diskStore) readEntries(r *recovered) error {
	if _, err := wal.Read(d.walDir(), wal.Visitor{Entry: r.add}); err != nil {
		return damaged("the log in %s is damaged: %w", d.walDir(), err)
	}
	return nil
}

// add takes the next entry of the log. It replaces all from its index on, as a later
// leader may shorten a log: also those after the snapshot where it is itself in it.
func (r *recovered) add(kind uint8, term, index uint64, data []byte) error {
	if index <= r.snap.Index {
		r.entries = r.entries[:0]
		return nil
	}
	at := index - r.snap.Index - 1
	if at > uint64(len(r.entries)) {
		return fmt.Errorf("entry %d follows entry %d", index, r.snap.Index+uint64(len(r.entries)))
	}
	e := &raftpb.Entry{Type: raftpb.EntryType(kind).Enum(), Term: new(term), Index: new(index)}
	if len(data) > 0 {
		e.Data = bytes.Clone(data)
	}
	r.entries = append(r.entries[:at], e)
	return nil
}

// checkRecovered turns into an error what would be a panic inside raft.
func (d *diskStore) checkRecovered(r *recovered) error {
	last, term := r.snap.Index, r.snap.Term
	for _, e := range r.entries {
		switch {
		case e.GetIndex() != last+1:
			return damaged("the log in %s misses entry %d", d.walDir(), last+1)
		case e.GetTerm() < term || e.GetTerm() > r.hard.GetTerm():
			return damaged("the log in %s has entry %d of term %d after one of term %d, in term %d", d.walDir(), e.GetIndex(), e.GetTerm(), term, r.hard.GetTerm())
		}
		last, term = e.GetIndex(), e.GetTerm()
	}
	if c := r.hard.GetCommit(); c > last || (c < r.snap.Index && r.snap.Index > 0) {
		return damaged("the log in %s ends at entry %d, but entry %d was committed", d.walDir(), last, c)
	}
	if r.snap.Index == 0 && !r.meta.Joined {
		return damaged("the log in %s has no snapshot to start from", d.walDir())
	}
	return nil
}
