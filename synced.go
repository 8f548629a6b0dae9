package main

import (
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
// torn. One write of 48 bytes costs about a hundredth of the sync before it.

// syncMark is what is known to be on disk.
type syncMark struct {
	term, index    uint64 // of the last entry, or of the snapshot the log begins with
	hardTerm, vote uint64
}

const (
	syncMarkSize  = 48
	syncMarkMagic = "PONTSYN1"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (m syncMark) encode() []byte {
	b := append(make([]byte, 0, syncMarkSize), syncMarkMagic...)
	for _, v := range []uint64{m.term, m.index, m.hardTerm, m.vote} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return append(b, 0, 0, 0, 0)
}

func decodeSyncMark(b []byte) (m syncMark, err error) {
	if len(b) != syncMarkSize || string(b[:8]) != syncMarkMagic || binary.LittleEndian.Uint32(b[44:]) != 0 ||
		crc32.Checksum(b[:40], castagnoli) != binary.LittleEndian.Uint32(b[40:]) {
		return m, errors.New("it does not hold what this program writes there")
	}
	for i, v := range []*uint64{&m.term, &m.index, &m.hardTerm, &m.vote} {
		*v = binary.LittleEndian.Uint64(b[8+8*i:])
	}
	return m, nil
}

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
		if _, err := d.mark.WriteAt(syncMark{}.encode(), 0); err != nil {
			return err
		}
		return errors.Join(d.mark.Sync(), syncDir(d.dir))
	}
	if d.marked, err = decodeSyncMark(b); err != nil {
		return fmt.Errorf("%w: %s is damaged: %w; it only guards against a log that lost its end: if the disk is healthy, delete the file", errRefuse, path, err)
	}
	return nil
}

// setMark notes what has just been synced.
func (d *diskStore) setMark(m syncMark) error {
	if m == d.marked {
		return nil
	}
	d.marked = m
	_, err := d.mark.WriteAt(m.encode(), 0)
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

func readLog(dec wal.Decoder) (*logScan, error) {
	s := &logScan{hard: &raftpb.HardState{}}
	var last []byte // the last entry, undecoded
	var rec walpb.Record
	var err error
	for err = dec.Decode(&rec); err == nil; err = dec.Decode(&rec) {
		switch rec.GetType() {
		case wal.MetadataType:
			s.meta = rec.Data
		case wal.EntryType:
			last = rec.Data
		case wal.StateType:
			s.hard = wal.MustUnmarshalState(rec.Data)
		case wal.SnapshotType:
			sn := &walpb.Snapshot{}
			if err := proto.Unmarshal(rec.Data, sn); err != nil {
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
		e := wal.MustUnmarshalEntry(last)
		s.end.term, s.end.index = e.GetTerm(), e.GetIndex()
	}
	for _, sn := range s.snapshots {
		if sn.GetIndex() > s.end.index {
			s.end.term, s.end.index = sn.GetTerm(), sn.GetIndex()
		}
	}
	return s, nil
}
