package wal

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Content is what a log holds, besides what was told to the Visitor.
type Content struct {
	Metadata []byte
	State    State  // the last one
	Frames   uint64 // number of the last frame
	Last     uint64 // index of the last entry or snapshot
	First    uint64 // index of the first entry that it may hold; those before were released, or are behind Skipped
	Skipped  error  // why the segments before the first were not read; nil: there are none
	Torn     bool   // something follows the last frame that is none: a write that a crash cut short, or damage

	segments []segment
	secret   uint64
	chain    uint32
	end      int64 // of the last frame, in the last segment
}

// Visitor is told what a log holds, in order. Data is valid during the call only.
// A nil function is not called.
type Visitor struct {
	Entry    func(kind uint8, term, index uint64, data []byte) error
	Snapshot func(index, term uint64) error
}

// Exists says whether dir holds a log.
func Exists(dir string) bool {
	names, err := segmentNames(dir)
	return err == nil && len(names) > 0
}

// segmentNames are the names in dir; dir itself is no pattern.
func segmentNames(dir string) ([]string, error) { return fs.Glob(os.DirFS(dir), "*.wal") }

// Settle is called before Read by whoever is going to Open the log: what Read then
// finds is on disk, whatever ended the process before. A write that it did not sync
// is synced, and so is the name of a segment. A write whose sync failed is forgotten: the kernel shows it to every
// reader and takes it for clean, so that another sync would succeed and write nothing,
// and on some file systems so would the same write once more. Only the newest segment
// can hold either.
func Settle(dir string) error {
	segs, err := list(dir)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(segs[len(segs)-1].path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(datasync(f), forget(f), f.Close(), syncDir(dir))
}

// Read reads a log without changing it. An error that is ErrDamaged says where the
// damage is.
func Read(dir string, v Visitor) (Content, error) {
	var c Content
	segs, err := list(dir)
	if err != nil {
		return c, err
	}
	heads := make([]head, len(segs))
	from := len(segs) - 1
	for i := from; i >= 0; i-- {
		b, err := readHead(segs[i].path)
		if err == nil {
			heads[i], err = decodeHead(b)
		}
		if err == nil && heads[i].segment(segs[i].path) != segs[i] {
			err = fmt.Errorf("%w: %s begins as another segment does", ErrDamaged, segs[i].path)
		}
		if err == nil && i < len(segs)-1 && segs[i].seq+1 != segs[i+1].seq {
			err = fmt.Errorf("%w: no segment %d before %s", ErrDamaged, segs[i+1].seq-1, segs[i+1].path)
		}
		// What is before a segment that cannot be used may have been released; if not,
		// the caller misses entries.
		if err != nil && (i == len(segs)-1 || !errors.Is(err, ErrDamaged)) {
			return c, err
		}
		if err != nil {
			c.Skipped = err
			break
		}
		from = i
	}
	c.segments, heads = segs[from:], heads[from:]
	h := heads[0]
	c.secret = h.secret
	c.Metadata, c.State, c.Frames, c.chain, c.First, c.Last = h.meta, h.state, h.number-1, h.chain, h.first, h.first-1
	for i, s := range c.segments {
		if h := heads[i]; h.number != c.Frames+1 || h.chain != c.chain || h.state != c.State {
			return c, fmt.Errorf("%w: frames are missing between number %d and %s", ErrDamaged, c.Frames, s.path)
		}
		if heads[i].secret != c.secret || !bytes.Equal(heads[i].meta, c.Metadata) {
			return c, fmt.Errorf("%w: %s belongs to another log", ErrDamaged, s.path)
		}
		if err := c.readSegment(s, v, i == len(c.segments)-1); err != nil {
			return c, err
		}
	}
	return c, nil
}

// list finds the segments by name, oldest first.
func list(dir string) ([]segment, error) {
	names, err := segmentNames(dir)
	if err != nil {
		return nil, err
	}
	var out []segment
	for _, n := range names {
		s := segment{path: filepath.Join(dir, n)}
		if _, err := fmt.Sscanf(n, "%016x-%016x.wal", &s.seq, &s.first); err == nil {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b segment) int { return strings.Compare(a.path, b.path) })
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: no segment in %s", ErrDamaged, dir)
	}
	return out, nil
}

type head struct {
	seq, first, number uint64
	state              State
	chain              uint32
	secret             uint64
	meta               []byte
}

func (h head) segment(path string) segment { return segment{path, h.seq, h.first} }

func readHead(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, headSize)
	if n, err := f.ReadAt(b, 0); err != nil && n < headSize {
		if info, serr := f.Stat(); serr == nil && info.Size() < headSize {
			err = fmt.Errorf("%w: %s is cut off", ErrDamaged, path)
		}
		return nil, err
	}
	if string(b[:8]) != magic {
		return nil, fmt.Errorf("%w: %s does not begin with %s", ErrDamaged, path, magic)
	}
	if crc32.Checksum(b[:headSize-4], castagnoli) != binary.LittleEndian.Uint32(b[headSize-4:]) {
		return nil, fmt.Errorf("%w: the head of %s fails its checksum", ErrDamaged, path)
	}
	return b, nil
}

func decodeHead(b []byte) (head, error) {
	var h head
	for i, v := range []*uint64{&h.seq, &h.first, &h.number, &h.state.Term, &h.state.Vote, &h.state.Commit} {
		*v = binary.LittleEndian.Uint64(b[8+8*i:])
	}
	h.chain = binary.LittleEndian.Uint32(b[56:])
	n := binary.LittleEndian.Uint32(b[60:])
	if n > maxMetadata || h.number == 0 || h.first == 0 {
		return h, fmt.Errorf("%w: a head that no log writes", ErrDamaged)
	}
	h.secret = binary.LittleEndian.Uint64(b[64:])
	h.meta = slices.Clone(b[72 : 72+n])
	return h, nil
}

// readSegment reads one frame after the other, in the memory that the largest needs.
func (c *Content) readSegment(s segment, v Visitor, newest bool) error {
	f, err := os.Open(s.path)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	at := int64(headSize)
	r := bufio.NewReaderSize(io.NewSectionReader(f, at, size), scanWindow)
	var frame []byte
	for {
		h, err := r.Peek(frameHead)
		if err != nil && err != io.EOF {
			return err
		}
		records, ok := frameRecords(h, size-at)
		if !ok || c.frameNumber(h) != c.Frames+1 || frameChain(h) != c.chain {
			break
		}
		frame = slices.Grow(frame[:0], frameHead+records)[:frameHead+records]
		if _, err := io.ReadFull(r, frame); err != nil {
			return err
		}
		sum := frameSum(frame)
		if sum != binary.LittleEndian.Uint32(frame[4:]) {
			break
		}
		if err := visitRecords(frame[frameHead:], c.visitor(v)); err != nil {
			return fmt.Errorf("%s, frame %d: %w", s.path, c.Frames+1, err)
		}
		c.Frames++
		c.chain = sum
		padding := -len(frame) & 7
		at += int64(len(frame) + padding)
		if _, err := r.Discard(padding); err != nil && err != io.EOF {
			return err
		}
	}
	c.end = at
	if !newest {
		return nil // the next segment says which frame it begins with
	}
	later, err := c.laterFrame(f, at, size)
	if err == nil && later > 0 {
		err = fmt.Errorf("%w: frame %d of %s, at byte %d, cannot be read, and a whole one follows at byte %d", ErrDamaged, c.Frames+1, s.path, at, later)
	}
	return err
}

func (c *Content) visitor(v Visitor) recordVisitor {
	return recordVisitor{
		entry: func(kind uint8, term, index uint64, data []byte) error {
			c.Last = index
			if v.Entry == nil {
				return nil
			}
			return v.Entry(kind, term, index, data)
		},
		state: func(s State) { c.State = s },
		snapshot: func(index, term uint64) error {
			c.Last = max(c.Last, index)
			if v.Snapshot == nil {
				return nil
			}
			return v.Snapshot(index, term)
		},
	}
}

// scanWindow is how much of a segment is looked at at once.
const scanWindow = 1 << 20

// frameRecords is the size of the records behind the head h, of which room bytes are
// left in the file.
func frameRecords(h []byte, room int64) (size int, ok bool) {
	if len(h) < frameHead {
		return 0, false
	}
	n := binary.LittleEndian.Uint32(h)
	return int(n), n > 0 && ^n == binary.LittleEndian.Uint32(h[20:]) && int64(n) <= room-frameHead
}

func (c *Content) frameNumber(h []byte) uint64 { return binary.LittleEndian.Uint64(h[8:]) ^ c.secret }
func frameChain(h []byte) uint32               { return binary.LittleEndian.Uint32(h[16:]) }

// laterFrame finds a whole frame behind at that is not of a former life, where the
// next frame cannot be read; 0: none. It also says whether somebody began to write there.
func (c *Content) laterFrame(f *os.File, at, size int64) (int64, error) {
	most := c.Frames + 1 + uint64(size/frameHead)
	window := make([]byte, scanWindow+frameHead)
	for base := at; base < size; base += scanWindow {
		if base = max(base, nextData(f, base, size)&^7); base >= size {
			break // nobody wrote there, in this life or a former one
		}
		n, err := f.ReadAt(window, base)
		if err != nil && err != io.EOF {
			return 0, err
		}
		for p := 0; p < scanWindow && p+frameHead <= n; p += 8 {
			if end := p + 4096; p%4096 == 0 && end <= n && bytes.Equal(window[p:end], zeros[:4096]) {
				p = end - 8 // the size of a frame is not zero
				continue
			}
			h, place := window[p:p+frameHead], base+int64(p)
			number := c.frameNumber(h)
			if number <= c.Frames || number > most {
				continue
			}
			if place == at && number == c.Frames+1 {
				c.Torn = true
				continue
			}
			records, ok := frameRecords(h, size-place)
			if !ok {
				continue
			}
			frame := make([]byte, frameHead+records)
			if _, err := f.ReadAt(frame, place); err != nil {
				return 0, err
			}
			if frameSum(frame) == binary.LittleEndian.Uint32(h[4:]) {
				return place, nil
			}
		}
	}
	return 0, nil
}

// Records.
const (
	recordEntry    = 1
	recordState    = 2
	recordSnapshot = 3
)

type recordVisitor struct {
	entry    func(kind uint8, term, index uint64, data []byte) error
	state    func(State)
	snapshot func(index, term uint64) error
}

func appendState(b []byte, s State) []byte {
	b = append(b, recordState)
	for _, v := range []uint64{s.Term, s.Vote, s.Commit} {
		b = binary.AppendUvarint(b, v)
	}
	return b
}

var errRecord = fmt.Errorf("%w: a record that no log writes", ErrDamaged)

func visitRecords(b []byte, v recordVisitor) error {
	ok := true
	number := func() uint64 {
		x, n := binary.Uvarint(b)
		if n <= 0 {
			ok = false
			return 0
		}
		b = b[n:]
		return x
	}
	for len(b) > 0 {
		var err error
		kind := b[0]
		b = b[1:]
		switch kind {
		case recordEntry:
			if len(b) == 0 {
				return errRecord
			}
			t := b[0]
			b = b[1:]
			term, index, size := number(), number(), number()
			if !ok || index == 0 || size > uint64(len(b)) {
				return errRecord
			}
			data := b[:size:size]
			b = b[size:]
			if v.entry != nil {
				err = v.entry(t, term, index, data)
			}
		case recordState:
			s := State{number(), number(), number()}
			if ok && v.state != nil {
				v.state(s)
			}
		case recordSnapshot:
			index, term := number(), number()
			if ok && v.snapshot != nil {
				err = v.snapshot(index, term)
			}
		default:
			return errRecord
		}
		if !ok {
			return errRecord
		}
		if err != nil {
			return err
		}
	}
	return nil
}
