// Package wal is a write-ahead log: what a member must find again before it may
// promise anything. It knows entries, a hard state and snapshot marks, and nothing
// of raft.
//
// It is a package of its own, in place of a library's, for two properties:
//
//   - Damage is told from a crash. A frame is synced before the next one is written,
//     so a frame that cannot be read is a torn write only if no readable one comes
//     after it, in its segment or the next; the number of the last synced frame,
//     which the caller keeps elsewhere (Log.Frames), tells the rest.
//   - Segments are written over. To overwrite blocks that are allocated and cached
//     costs a quarter of writing new ones, and a sync of them waits for no journal.
//
// A segment is a file of a fixed size:
//
//	<number>-<first index>.wal, both 16 hex digits
//	0     8  "PONTWAL1"
//	8     8  number of the segment, counting up in the log's life
//	16    8  index of the first entry that it may hold
//	24    8  number of its first frame
//	32   24  hard state before that frame: term, vote, commit
//	56    4  checksum of the frame before, 0: none
//	60    4  size of the metadata
//	64    8  secret
//	72       metadata, then zeros
//	4092  4  checksum of all before
//	4096     frames, each at a multiple of 8 bytes; behind them zeros, or what the file held in a former life
//
// and a frame is what one sync makes durable:
//
//	0     4  size of the records
//	4     4  checksum of all but itself
//	8     8  number of the frame, counting up in the log's life, combined (xor) with the secret
//	16    4  checksum of the frame before
//	20    4  the size again, inverted
//	24       records
//
// Numbers are little-endian, checksums CRC-32C. Since numbers of frames never come
// again, no frame of a file's former life is taken for a new one. And since the secret
// is drawn at random for each log, nothing that a client stores is taken for a
// frame: a value that holds frames, of another log or made on purpose, would else
// look like damage once it stands behind the end, in a file that is written over.
package wal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	magic       = "PONTWAL1"
	headSize    = 4096
	frameHead   = 24
	maxMetadata = headSize - 72 - 4
	maxSpares   = 2
	keepBuffer  = 4 << 20
)

// ErrDamaged: the log holds something that no crash explains.
var ErrDamaged = errors.New("the log is damaged")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// State is raft's hard state.
type State struct{ Term, Vote, Commit uint64 }

// Options are the same at every opening of a log, except that SegmentBytes may change.
type Options struct {
	SegmentBytes int64               // of a new segment; a larger frame makes a larger one
	Synced       func(time.Duration) // told how long each sync of a frame took; may be nil
}

// Log is a log open for appending. Entry, State and Snapshot collect records, Sync
// writes them as one frame. After an error the log refuses everything: what reached
// the disk is not known, and a second sync could report success for lost pages.
//
// It is not for concurrent use.
type Log struct {
	dir    string
	opt    Options
	meta   []byte
	secret uint64
	broken error

	segments []segment // oldest first; the last is f
	spares   []string
	f        *os.File
	size     int64  // of the file
	at       int64  // where the next frame goes
	written  int64  // up to here the file's blocks were written before
	next     uint64 // number of the next frame
	chain    uint32 // checksum of the last one
	state    State  // as of the records collected so far
	saved    State  // as of the last frame
	last     uint64 // index of the last entry

	frame []byte // the next frame, with room for its head
}

type segment struct {
	path       string
	seq, first uint64
}

// Create makes dir with a log of one empty segment, whose frames count on from the
// number frames. A crash may leave the directory without one.
func Create(dir string, meta []byte, frames uint64, opt Options) (*Log, error) {
	if len(meta) > maxMetadata {
		return nil, fmt.Errorf("wal: metadata of %d bytes, at most %d fit", len(meta), maxMetadata)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	l := &Log{dir: dir, opt: opt, meta: slices.Clone(meta), secret: rand.Uint64(), next: frames + 1}
	l.reset()
	if err := l.cut(0); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Open gets a log ready for appending, as Read found it. What a crash cut short is
// written over.
func Open(dir string, c Content, opt Options) (*Log, error) {
	l := &Log{dir: dir, opt: opt, meta: c.Metadata, secret: c.secret, segments: c.segments, next: c.Frames + 1, chain: c.chain,
		state: c.State, saved: c.State, last: c.Last, at: c.end}
	l.reset()
	err := l.clean()
	if err == nil {
		l.f, err = os.OpenFile(l.segments[len(l.segments)-1].path, os.O_RDWR, 0)
	}
	if err == nil {
		if l.size, err = l.f.Seek(0, io.SeekEnd); err == nil {
			l.written = writtenTo(l.f, l.at, l.size)
			err = datasync(l.f)
		}
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// clean removes what a crash left and takes stock of the spare files.
func (l *Log) clean() error {
	names, err := os.ReadDir(l.dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		path := filepath.Join(l.dir, n.Name())
		known := slices.ContainsFunc(l.segments, func(s segment) bool { return s.path == path })
		switch {
		case known:
		case strings.HasSuffix(path, ".spare") && len(l.spares) < maxSpares:
			l.spares = append(l.spares, path)
		case strings.HasSuffix(path, ".spare"), strings.HasSuffix(path, ".tmp"), strings.HasSuffix(path, ".wal"): // the last: released before
			err = errors.Join(err, os.Remove(path))
		}
	}
	return err
}

// Entry adds an entry. The caller keeps indexes in raft's order: an entry replaces
// those from its index on.
func (l *Log) Entry(kind uint8, term, index uint64, data []byte) {
	l.frame = append(l.frame, recordEntry, kind)
	l.frame = binary.AppendUvarint(l.frame, term)
	l.frame = binary.AppendUvarint(l.frame, index)
	l.frame = binary.AppendUvarint(l.frame, uint64(len(data)))
	l.frame = append(l.frame, data...)
	l.last = index
}

// State sets the hard state. Where only the commit index moves it may wait for the
// next Sync.
func (l *Log) State(s State) { l.state = s }

// Snapshot notes that the snapshot of the entries up to index is complete.
func (l *Log) Snapshot(index, term uint64) {
	l.frame = append(l.frame, recordSnapshot)
	l.frame = binary.AppendUvarint(l.frame, index)
	l.frame = binary.AppendUvarint(l.frame, term)
	l.last = max(l.last, index)
}

// Frames is the number of the last frame that is on disk. It only grows.
func (l *Log) Frames() uint64 { return l.next - 1 }

// Sync writes what was collected and returns once it is on disk.
func (l *Log) Sync() error {
	if l.broken != nil {
		return l.broken
	}
	if l.broken = l.sync(); l.broken != nil {
		l.broken = fmt.Errorf("wal: %w", l.broken)
	}
	return l.broken
}

func (l *Log) sync() error {
	if l.state != l.saved {
		l.frame = appendState(l.frame, l.state)
	}
	records := len(l.frame) - frameHead
	if records == 0 {
		return nil
	}
	l.frame = append(l.frame, make([]byte, -len(l.frame)&7)...)
	size := int64(len(l.frame))
	if l.at+size > l.size {
		if err := l.cut(size); err != nil {
			return err
		}
	}
	sum := l.seal(records)
	if err := l.writeAhead(size); err != nil {
		return err
	}
	start := time.Now()
	if _, err := l.f.WriteAt(l.frame, l.at); err != nil {
		return err
	}
	if err := datasync(l.f); err != nil {
		return err
	}
	if l.opt.Synced != nil {
		l.opt.Synced(time.Since(start))
	}
	l.at += size
	l.chain, l.saved = sum, l.state
	l.next++
	l.reset()
	return nil
}

// seal fills in the head of the frame and returns its checksum.
func (l *Log) seal(records int) uint32 {
	h := l.frame
	binary.LittleEndian.PutUint32(h, uint32(records))
	binary.LittleEndian.PutUint64(h[8:], l.next^l.secret)
	binary.LittleEndian.PutUint32(h[16:], l.chain)
	binary.LittleEndian.PutUint32(h[20:], ^uint32(records))
	sum := frameSum(h[:frameHead+records])
	binary.LittleEndian.PutUint32(h[4:], sum)
	return sum
}

// frameSum is the checksum of a frame without its padding.
func frameSum(frame []byte) uint32 {
	sum := crc32.Checksum(frame[:4], castagnoli)
	return crc32.Update(sum, castagnoli, frame[8:])
}

func (l *Log) reset() {
	if cap(l.frame) > keepBuffer {
		l.frame = nil
	}
	l.frame = append(l.frame[:0], make([]byte, frameHead)...)
}

const (
	zeroStretch = 256 << 10
	zeroMargin  = 64 << 10 // a larger frame needs no help, and zeros would double it
)

var zeros [zeroStretch]byte

// writeAhead keeps a stretch of zeros ahead of a new segment's end. Blocks that are
// allocated and were never written change the file's metadata when they are, and a
// sync then waits for the file system's journal, twice as long as for data alone.
func (l *Log) writeAhead(size int64) error {
	if l.at+size+zeroMargin <= l.written || size > zeroMargin {
		return nil
	}
	start := max(l.written, (l.at+size+4095)&^4095)
	n := min(zeroStretch, l.size-start)
	if n <= 0 {
		return nil
	}
	l.written = start + n
	_, err := l.f.WriteAt(zeros[:n], start)
	return err
}

// cut begins a new segment, with room for a frame of size bytes: complete under
// another name, then renamed.
func (l *Log) cut(size int64) error {
	var seq uint64
	if n := len(l.segments); n > 0 {
		seq = l.segments[n-1].seq + 1
	}
	s := segment{seq: seq, first: l.first()}
	s.path = filepath.Join(l.dir, fmt.Sprintf("%016x-%016x.wal", s.seq, s.first))
	tmp := filepath.Join(l.dir, "new.tmp")
	size = max(l.opt.SegmentBytes, headSize+size)
	fresh := len(l.spares) == 0
	if !fresh {
		if err := os.Rename(l.spares[0], tmp); err != nil {
			return err
		}
		l.spares = slices.Delete(l.spares, 0, 1)
	}
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if had, serr := f.Seek(0, io.SeekEnd); serr != nil || had < size {
		err = errors.Join(serr, allocate(f, size))
	} else {
		size = had
	}
	if err == nil {
		_, err = f.WriteAt(l.head(s), 0)
	}
	if err = errors.Join(err, f.Sync()); err == nil {
		err = errors.Join(os.Rename(tmp, s.path), syncDir(l.dir))
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if l.f != nil {
		if err := l.f.Close(); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	l.f, l.size, l.at = f, size, headSize
	l.written = writtenTo(f, headSize, size)
	l.segments = append(l.segments, s)
	return nil
}

// first is the index of the first entry that a new segment may hold. Entries that
// were collected for its first frame are not in a segment yet.
func (l *Log) first() uint64 {
	first := l.last + 1
	visitRecords(l.frame[frameHead:], recordVisitor{entry: func(_ uint8, _, index uint64, _ []byte) error {
		first = min(first, index)
		return nil
	}})
	return first
}

func (l *Log) head(s segment) []byte {
	b := make([]byte, 0, headSize)
	b = append(b, magic...)
	for _, v := range []uint64{s.seq, s.first, l.next, l.saved.Term, l.saved.Vote, l.saved.Commit} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	b = binary.LittleEndian.AppendUint32(b, l.chain)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(l.meta)))
	b = binary.LittleEndian.AppendUint64(b, l.secret)
	b = append(b, l.meta...)
	b = b[:headSize-4]
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// Release lets go of the segments that hold no entry from index on, and no record of
// a snapshot of index, which comes after that entry. Two of their files are kept to
// be written over.
func (l *Log) Release(index uint64) error {
	if l.broken != nil {
		return l.broken
	}
	for len(l.segments) > 1 && l.segments[1].first <= index {
		old := l.segments[0]
		l.segments = slices.Delete(l.segments, 0, 1)
		if len(l.spares) >= maxSpares {
			if err := os.Remove(old.path); err != nil {
				return err
			}
			continue
		}
		spare := strings.TrimSuffix(old.path, ".wal") + ".spare"
		if err := os.Rename(old.path, spare); err != nil {
			return err
		}
		l.spares = append(l.spares, spare)
	}
	return nil
}

// Close writes a commit index that waited, and closes the file.
func (l *Log) Close() error {
	var err error
	if l.f != nil && l.broken == nil {
		err = l.Sync()
	}
	l.broken = errors.New("wal: closed")
	if l.f != nil {
		err = errors.Join(err, l.f.Close())
		l.f = nil
	}
	return err
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
