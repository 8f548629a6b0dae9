package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// A log that ends early looks the same whether a crash cut its last write short,
// which is harmless, or whether the disk has lost what was synced. The wal
// package takes every such end for the former: a flipped bit in a length, a
// zeroed sector or a changed record type silently drops entries that were
// acknowledged.
//
// So a small file beside the log says how far it was synced. It is written after
// each sync and not synced itself: it may lag behind the log after a power loss,
// but it is never ahead of it, so a log that ends before it is damaged and not
// torn. One write of 64 bytes costs about a hundredth of the sync before it.
//
// Its hard term does not lag either: where that or the vote is new, the file is
// synced, before anything leaves that this member could have promised in the new
// term. A member that stands aside rests on it (aside.go).

// syncMark is what is known to be on disk.
type syncMark struct {
	term, index    uint64 // of the last entry, or of the snapshot the log begins with
	hardTerm, vote uint64
}

// owner is whose log it is: of what the log's own metadata says, the part that is
// needed when the log is gone.
type owner struct{ cluster, member uint64 }

// Version 1 had no owner: 48 bytes in all.
const (
	syncMarkSize   = 64
	syncMarkMagic  = "PONTSYN2"
	syncMarkSize1  = 48
	syncMarkMagic1 = "PONTSYN1"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (m syncMark) encode(o owner) []byte {
	b := append(make([]byte, 0, syncMarkSize), syncMarkMagic...)
	for _, v := range []uint64{m.term, m.index, m.hardTerm, m.vote, o.cluster, o.member} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return append(b, 0, 0, 0, 0)
}

func decodeSyncMark(b []byte) (m syncMark, o owner, err error) {
	fields := []*uint64{&m.term, &m.index, &m.hardTerm, &m.vote, &o.cluster, &o.member}
	if len(b) == syncMarkSize1 && string(b[:8]) == syncMarkMagic1 {
		fields = fields[:4]
	} else if len(b) != syncMarkSize || string(b[:8]) != syncMarkMagic {
		return m, o, errNotOurs
	}
	end := len(b) - 8
	if crc32.Checksum(b[:end], castagnoli) != binary.LittleEndian.Uint32(b[end:]) || binary.LittleEndian.Uint32(b[end+4:]) != 0 {
		return m, o, errNotOurs
	}
	for i, v := range fields {
		*v = binary.LittleEndian.Uint64(b[8+8*i:])
	}
	return m, o, nil
}

// errNotOurs: the file was damaged or is another program's.
var errNotOurs = errors.New("it does not hold what this program writes there")

// covers says that a log which ends as m does has lost nothing that was synced
// when old was written. Terms come first: a newer leader may shorten a log.
func (m syncMark) covers(old syncMark) error {
	switch {
	case m.term < old.term || m.term == old.term && m.index < old.index:
		return fmt.Errorf("it ends with entry %d of term %d, but entry %d of term %d was on disk", m.index, m.term, old.index, old.term)
	case m.hardTerm < old.hardTerm || m.hardTerm == old.hardTerm && old.vote != 0 && m.vote != old.vote:
		return fmt.Errorf("it lost a vote: term %d for member %d, where term %d for member %d was on disk", m.hardTerm, m.vote, old.hardTerm, old.vote)
	}
	return nil
}

// openMark opens the file, creating it for a new log.
func (d *diskStore) openMark() (err error) {
	path := filepath.Join(d.dir, "synced")
	if d.mark, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	b, err := io.ReadAll(d.mark)
	if err != nil {
		return err
	}
	if len(b) == 0 {
		if _, err := d.mark.WriteAt(syncMark{}.encode(owner{}), 0); err != nil {
			return err
		}
		return errors.Join(d.mark.Sync(), syncDir(d.dir))
	}
	if d.marked, d.owner, err = decodeSyncMark(b); err != nil {
		return fmt.Errorf("%w: %s is damaged: %w; it only guards against a log that lost its end: if the disk is healthy, delete the file", errRefuse, path, err)
	}
	return nil
}

// own notes whose log it is, with a new file: one of version 1 was shorter.
func (d *diskStore) own(o owner) error {
	if o == d.owner {
		return nil
	}
	path := filepath.Join(d.dir, "synced")
	if err := errors.Join(d.mark.Close(), writeFileSync(path, string(d.marked.encode(o)))); err != nil {
		return err
	}
	d.owner = o
	var err error
	d.mark, err = os.OpenFile(path, os.O_RDWR, 0o600)
	return err
}

// setMark notes what has just been synced.
func (d *diskStore) setMark(m syncMark) error {
	if m == d.marked {
		return nil
	}
	promises := m.hardTerm != d.marked.hardTerm || m.vote != d.marked.vote
	d.marked = m
	_, err := d.mark.WriteAt(m.encode(d.owner), 0)
	if err == nil && promises {
		err = fileutil.Fdatasync(d.mark)
	}
	return err
}

// lowerMark takes the mark back before a write that shortens the log. It must
// reach the disk first: after a power loss a mark ahead of the log would refuse
// a healthy member.
func (d *diskStore) lowerMark() error {
	m := d.marked
	m.term, m.index = 0, 0
	return errors.Join(d.setMark(m), d.mark.Sync())
}

// logScan is what one reading of the whole log finds, without changing it.
type logScan struct {
	meta      []byte
	hard      *raftpb.HardState
	snapshots []*walpb.Snapshot // recorded and committed, oldest first
	end       syncMark
	torn      bool // the last record is incomplete
}

// scanLog reads every record before anything is repaired or opened for writing.
func (d *diskStore) scanLog() (s *logScan, err error) {
	names, err := filepath.Glob(filepath.Join(d.walDir(), "*.wal"))
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	names = lastRun(names)
	var readers []fileutil.FileReader
	for _, n := range names {
		f, err := os.Open(n)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		readers = append(readers, fileutil.NewFileReader(f))
	}
	err = unpanicked(func() (err error) { s, err = readLog(wal.NewDecoder(readers...)); return err })
	return s, err
}

// lastRun leaves out the segments before a gap in the numbers. A purge deletes
// the oldest first, but a power loss may undo any of its deletions. If a segment
// was lost that is needed, the log has no snapshot to start from.
func lastRun(names []string) []string {
	var next uint64
	begin := 0
	for i, n := range names {
		var seq, first uint64
		if _, err := fmt.Sscanf(filepath.Base(n), "%016x-%016x.wal", &seq, &first); err == nil && seq != next {
			begin = i
		} else if err != nil {
			continue // the wal package refuses it
		}
		next = seq + 1
	}
	return names[begin:]
}

func readLog(dec wal.Decoder) (*logScan, error) {
	s := &logScan{hard: &raftpb.HardState{}}
	var last *raftpb.Entry
	var rec walpb.Record
	var err error
	for err = dec.Decode(&rec); err == nil; err = dec.Decode(&rec) {
		switch rec.GetType() {
		case wal.MetadataType:
			if s.meta != nil && !bytes.Equal(s.meta, rec.Data) {
				return nil, errors.New("its segments are of different members")
			}
			s.meta = rec.Data
		case wal.EntryType:
			e := &raftpb.Entry{}
			if err := s.checkEntry(e, rec.Data, last); err != nil {
				return nil, err
			}
			last = e
		case wal.StateType:
			hs := &raftpb.HardState{}
			if err := s.checkState(hs, rec.Data); err != nil {
				return nil, err
			}
			s.hard = hs
		case wal.SnapshotType:
			sn := &walpb.Snapshot{}
			if err := unmarshalAll(rec.Data, sn); err != nil {
				return nil, err
			}
			s.snapshots = append(s.snapshots, sn)
		case wal.CrcType:
			if crc := dec.LastCRC(); crc != 0 && rec.Validate(crc) != nil {
				return nil, wal.ErrCRCMismatch
			}
			dec.UpdateCRC(rec.GetCrc())
		default:
			return nil, fmt.Errorf("record of type %d", rec.GetType())
		}
	}
	if s.torn = errors.Is(err, io.ErrUnexpectedEOF); !s.torn && !errors.Is(err, io.EOF) {
		return nil, err
	}
	s.snapshots = slices.DeleteFunc(s.snapshots, func(sn *walpb.Snapshot) bool { return sn.GetIndex() > s.hard.GetCommit() })
	s.end = syncMark{hardTerm: s.hard.GetTerm(), vote: s.hard.GetVote()}
	if last != nil {
		s.end.term, s.end.index = last.GetTerm(), last.GetIndex()
	}
	for _, sn := range s.snapshots {
		if sn.GetIndex() > s.end.index {
			s.end.term, s.end.index = sn.GetTerm(), sn.GetIndex()
		}
	}
	return s, nil
}

// The checksum of a record covers its data and not its type. One flipped bit
// makes an entry of a hard state: of an index that was committed, in the place of
// what was committed there. So what a record says has to make sense as what it
// claims to be; each of these rules is one that raft never breaks.

// checkEntry reads an entry. An entry is data of a client or a change of members,
// or else the empty one that a leader begins its term with. It replaces nothing
// that was committed, and leaves no gap.
func (s *logScan) checkEntry(e *raftpb.Entry, data []byte, last *raftpb.Entry) error {
	if err := unmarshalAll(data, e); err != nil {
		return err
	}
	i, t := e.GetIndex(), e.GetTerm()
	switch {
	case e.GetType() != raftpb.EntryNormal && (e.GetType() != raftpb.EntryConfChangeV2 || len(e.GetData()) == 0):
		return fmt.Errorf("entry %d is of type %d, with %d bytes", i, e.GetType(), len(e.GetData()))
	case i == 0 || t == 0:
		return fmt.Errorf("entry %d of term %d", i, t)
	case i <= s.hard.GetCommit():
		return fmt.Errorf("entry %d comes after it was committed", i)
	case last != nil && (i > last.GetIndex()+1 || i == last.GetIndex()+1 && t < last.GetTerm()): // a later leader may replace entries by older ones
		return fmt.Errorf("entry %d of term %d follows entry %d of term %d", i, t, last.GetIndex(), last.GetTerm())
	}
	return nil
}

// checkState reads a hard state: terms and commits never fall, and a vote stands
// for its term.
func (s *logScan) checkState(hs *raftpb.HardState, data []byte) error {
	if err := unmarshalAll(data, hs); err != nil {
		return err
	}
	old := s.hard
	switch {
	case hs.GetTerm() == 0 || hs.GetTerm() < old.GetTerm():
		return fmt.Errorf("term %d follows term %d", hs.GetTerm(), old.GetTerm())
	case hs.GetCommit() < old.GetCommit():
		return fmt.Errorf("commit %d follows commit %d", hs.GetCommit(), old.GetCommit())
	case hs.GetTerm() == old.GetTerm() && old.GetVote() != 0 && hs.GetVote() != old.GetVote():
		return fmt.Errorf("a vote for %d follows one for %d in term %d", hs.GetVote(), old.GetVote(), hs.GetTerm())
	}
	return nil
}

// unmarshalAll refuses what m has no field for: data of another kind of record.
func unmarshalAll(data []byte, m proto.Message) error {
	if err := proto.Unmarshal(data, m); err != nil {
		return err
	}
	if n := len(m.ProtoReflect().GetUnknown()); n > 0 {
		return fmt.Errorf("a record has %d bytes that no %T has", n, m)
	}
	return nil
}
