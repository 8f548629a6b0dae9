package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/raft/v3/raftpb"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// The wal package allocates its segments ahead, and the file system notes that
// nothing was written there yet. To change that note is a change of metadata:
// every sync of the log then waits for the file system's journal, twice as long
// as for the data alone, and behind whatever else the journal holds.
//
// So a stretch of zeros is written ahead of the log, and reaches the disk
// with the sync that comes next. The wal package takes zeros for the end of
// the log, as it takes unwritten space.

const (
	zeroStretch = 256 << 10
	zeroMargin  = 64 << 10 // the log stays this far inside; a larger append needs no help
	// Bounds of what the wal package adds to a record: its length, padding,
	// type and checksum; and of what one save writes besides entries.
	recordOverhead = 64
	saveOverhead   = 256
)

// zeroAhead follows the end of the newest segment. Only the raft loop uses it,
// as it does the log itself: nobody else writes to the file meanwhile.
type zeroAhead struct {
	dir  string
	f    *os.File
	end  int64 // the log ends here at the latest
	done int64 // zeros, or the log, reach to here
	size int64 // of the segment
	next int64 // where end makes it worth a look for a new segment
}

var zeroBytes [zeroStretch]byte

// attach begins at the newest segment, as it is. What the wal package still has in
// its buffer is written over zeros later, and not the other way round. Where the
// file system cannot tell what was written, the file is left alone.
func (z *zeroAhead) attach(dir string) error {
	err := z.close()
	z.dir = dir
	names, globErr := filepath.Glob(filepath.Join(dir, "*.wal"))
	if err = errors.Join(err, globErr); err != nil || len(names) == 0 {
		return err
	}
	f, err := os.OpenFile(slices.Max(names), os.O_WRONLY, 0) // the names begin with the sequence number
	if err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	z.f, z.size, z.done = f, size, 0
	z.end = z.written()
	z.done = z.end
	z.next = max(wal.SegmentSizeBytes, z.end+zeroMargin)
	return nil
}

// written is where the file's unwritten part begins, at or after done.
func (z *zeroAhead) written() int64 {
	at, err := z.f.Seek(z.done, unix.SEEK_HOLE)
	if err != nil {
		return z.size
	}
	return at
}

// prepare is called before a save of ents.
func (z *zeroAhead) prepare(ents []*raftpb.Entry) error {
	grows := int64(saveOverhead)
	for _, e := range ents {
		grows += int64(proto.Size(e)) + recordOverhead
	}
	if z.end += grows; z.f == nil || z.end+zeroMargin <= z.done {
		return nil
	}
	if grows > zeroMargin {
		return nil // such writes are few, and zeros would double them
	}
	start := max(z.written(), (z.end+4095)&^4095)
	n := min(zeroStretch, z.size-start)
	if n <= 0 {
		return nil
	}
	if _, err := z.f.WriteAt(zeroBytes[:n], start); err != nil {
		return fmt.Errorf("write ahead of the log: %w", err)
	}
	z.done = start + n
	return nil
}

// follow is called after a save: the wal package may have begun a new segment.
func (z *zeroAhead) follow() error {
	if z.end < z.next {
		return nil
	}
	return z.attach(z.dir)
}

func (z *zeroAhead) close() error {
	f := z.f
	if z.f = nil; f == nil {
		return nil
	}
	return f.Close()
}
