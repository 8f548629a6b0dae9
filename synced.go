package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"pontoon/internal/wal"
)

// A log that ends early looks the same whether a crash cut its last write short,
// which is harmless, or whether the disk has lost the last of what was synced.
//
// So a small file beside the log says how far it was synced. It is written after
// each sync and not synced itself: it may lag behind the log after a power loss,
// but it is never ahead of it, so a log that ends before it is damaged and not
// torn. One write of 48 bytes costs about a hundredth of the sync before it.
//
// Its hard term does not lag either: where that or the vote is new, the file is
// synced, before anything leaves that this member could have promised in the new
// term. A member that stands aside rests on it (aside.go).

// syncMark is what is known to be on disk.
type syncMark struct {
	frames   uint64 // number of the log's last frame; it never comes again in the life of a directory's log
	hardTerm uint64
}

// owner is whose log it is: of what the log's own metadata says, the part that is
// needed when the log is gone.
type owner struct{ cluster, member uint64 }

const (
	syncMarkSize  = 48
	syncMarkMagic = "PONTSYN2"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (m syncMark) encode(o owner) []byte {
	b := append(make([]byte, 0, syncMarkSize), syncMarkMagic...)
	for _, v := range []uint64{m.frames, m.hardTerm, o.cluster, o.member} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return append(b, 0, 0, 0, 0)
}

func decodeSyncMark(b []byte) (m syncMark, o owner, err error) {
	const sum = syncMarkSize - 8
	if len(b) != syncMarkSize || string(b[:8]) != syncMarkMagic || binary.LittleEndian.Uint32(b[sum+4:]) != 0 ||
		crc32.Checksum(b[:sum], castagnoli) != binary.LittleEndian.Uint32(b[sum:]) {
		return m, o, errNotOurs
	}
	for i, v := range []*uint64{&m.frames, &m.hardTerm, &o.cluster, &o.member} {
		*v = binary.LittleEndian.Uint64(b[8+8*i:])
	}
	return m, o, nil
}

// errNotOurs: the file was damaged or is another program's.
var errNotOurs = errors.New("it does not hold what this program writes there")

// covered says whether a log holds all that was synced when m was written.
func (m syncMark) covered(c wal.Content) error {
	switch {
	case c.Frames < m.frames:
		return fmt.Errorf("it ends after write %d, and write %d was on disk", c.Frames, m.frames)
	case c.State.Term < m.hardTerm:
		return fmt.Errorf("it ends in term %d, and term %d was on disk", c.State.Term, m.hardTerm)
	}
	return nil
}

// openMark opens the file, creating it for a new log.
func (d *diskStore) openMark() (err error) {
	path := filepath.Join(d.dir, "synced")
	defer func() {
		if err != nil && !errors.Is(err, errRefuse) {
			err = fmt.Errorf("%w: open %s: %w", errDurability, path, err)
		}
	}()
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

// setMark notes what has just been synced.
func (d *diskStore) setMark(m syncMark, promises bool) error {
	if m == d.marked && !promises {
		return nil
	}
	d.marked = m
	if _, err := d.mark.WriteAt(m.encode(d.owner), 0); err != nil || !promises {
		return err
	}
	return d.mark.Sync()
}
