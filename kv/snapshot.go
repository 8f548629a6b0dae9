package kv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// The snapshot file, version 1. Fixed numbers are little-endian.
//
//	8 bytes  magic
//	uint32   version
//	blocks   to the end of the file
//
// A block:
//
//	uint32   length of the payload, at most blockSize
//	uint32   CRC-32C, started from magic and version, over the length (uint32),
//	         the number of the block in the file (uint64, from 0), type, payload
//	byte     type: the section it belongs to
//	payload
//
// The number inside the checksum is what shows blocks that were dropped,
// repeated or swapped, each of them intact.
//
// The payloads of one section are one stream of bytes: what does not fit into a
// block goes on in the next. Sections come in ascending order of their type:
//
//	1    header      uvarint length, then the caller's bytes
//	2    replay      windows, ascending by node (window.append)
//	3    items       records, ascending by key (record.go)
//	4    time        the clock and the last lease id, where one is not 0
//	5    leases      ascending by id
//	6    history     events, ascending by revision and key
//	7    kept        results kept for idempotency keys, ascending by key
//	8    tombstones  uint64 each, oldest first
//	255  trailer     six uint64: entries, bytes, windows, revision, applied, hash
//
// sections.go has the encodings of 4 to 7. Header and trailer are always there,
// the others where they are not empty. The types between are room for what comes
// later; a reader that meets one it does not know refuses the file, as leaving a
// section out would make replicas differ.
//
// The newest revision whose events are gone is not in the file: it is the one
// before that of the first event, or where there is none, the store's.
const (
	snapshotMagic   = "PONTSNAP"
	snapshotVersion = 1

	blockSize     = 64 << 10
	blockHeadSize = 9

	sectionHeader     = 1
	sectionReplay     = 2
	sectionItems      = 3
	sectionTime       = 4
	sectionLeases     = 5
	sectionHistory    = 6
	sectionKept       = 7
	sectionTombstones = 8
	sectionTrailer    = 255

	trailerSize = 48
)

// MaxHeaderSize bounds the header of a snapshot, in bytes.
const MaxHeaderSize = 1 << 20

// trailer repeats the state's totals, so that a reader can compare what it read.
type trailer struct {
	entries, bytes, windows uint64
	revision                int64
	applied, hash           uint64
}

func (t trailer) append(dst []byte) []byte {
	for _, v := range [...]uint64{t.entries, t.bytes, t.windows, uint64(t.revision), t.applied, t.hash} {
		dst = binary.LittleEndian.AppendUint64(dst, v)
	}
	return dst
}

// decode reads what append wrote; b holds trailerSize bytes.
func (t *trailer) decode(b []byte) {
	u := binary.LittleEndian.Uint64
	*t = trailer{
		entries: u(b), bytes: u(b[8:]), windows: u(b[16:]),
		revision: int64(u(b[24:])), applied: u(b[32:]), hash: u(b[40:]),
	}
}

// snapshotPreamble returns the bytes in front of the first block.
func snapshotPreamble() []byte {
	return binary.LittleEndian.AppendUint32([]byte(snapshotMagic), snapshotVersion)
}

// blockSum is the checksum of a block.
func blockSum(seed uint32, number uint64, typ byte, payload []byte) uint32 {
	var front [13]byte
	binary.LittleEndian.PutUint32(front[:], uint32(len(payload)))
	binary.LittleEndian.PutUint64(front[4:], number)
	front[12] = typ
	return crc32.Update(crc32.Update(seed, castagnoli, front[:]), castagnoli, payload)
}

// WriteSnapshot writes the state to w, with a header of at most MaxHeaderSize
// bytes that is opaque to this package. It needs the memory of one block, does
// not change s, and makes one call of w.Write a block. The same state gives the
// same bytes on every replica.
//
// It adds up what it writes. The error is ErrBroken, wrapped, where that is not
// what Hash is of: such a file would be refused, and the state must not be served.
//
// Give it a Clone where the state is written meanwhile.
func WriteSnapshot(w io.Writer, header []byte, s *State) error {
	if len(header) > MaxHeaderSize {
		return fmt.Errorf("kv: write snapshot: a header of %d bytes, at most %d", len(header), MaxHeaderSize)
	}
	bw := newBlockWriter(w)
	bw.section(sectionHeader)
	bw.write(binary.AppendUvarint(nil, uint64(len(header))))
	bw.write(header)
	bw.section(sectionReplay)
	var buf []byte
	for i := range s.windows {
		buf = s.windows[i].append(buf[:0])
		bw.write(buf)
	}
	bw.section(sectionItems)
	sum := uint64(0)
	s.items.ascend("", func(rec string, h head) bool {
		bw.write(bytesOf(rec))
		sum += recordHash(rec, h)
		return bw.err == nil
	})
	if x := bw.extras(s, buf); bw.err == nil && (sum != s.sum || x != s.extras()) {
		bw.err = ErrBroken
	}
	bw.section(sectionTrailer)
	bw.write(trailer{
		entries: uint64(s.Len()), bytes: uint64(s.bytes), windows: uint64(len(s.windows)),
		revision: s.revision, applied: s.applied, hash: s.Hash(),
	}.append(nil))
	bw.flush()
	if bw.err != nil {
		return fmt.Errorf("kv: write snapshot: %w", bw.err)
	}
	return nil
}

// blockWriter cuts sections into blocks. After the first error it does nothing.
type blockWriter struct {
	w      io.Writer
	seed   uint32
	number uint64 // of the next block
	typ    byte
	buf    []byte // room for the block's head, then its payload
	err    error
}

func newBlockWriter(w io.Writer) *blockWriter {
	preamble := snapshotPreamble()
	bw := &blockWriter{
		w: w, seed: crc32.Checksum(preamble, castagnoli),
		buf: make([]byte, blockHeadSize, blockHeadSize+blockSize),
	}
	_, bw.err = w.Write(preamble)
	return bw
}

// section starts a section; one that nothing is written to leaves no trace.
func (bw *blockWriter) section(typ byte) {
	bw.flush()
	bw.typ = typ
}

func (bw *blockWriter) write(p []byte) {
	for len(p) > 0 && bw.err == nil {
		if len(bw.buf) == cap(bw.buf) {
			bw.flush()
		}
		n := min(len(p), cap(bw.buf)-len(bw.buf))
		bw.buf = append(bw.buf, p[:n]...)
		p = p[n:]
	}
}

func (bw *blockWriter) flush() {
	payload := bw.buf[blockHeadSize:]
	if len(payload) == 0 || bw.err != nil {
		return
	}
	binary.LittleEndian.PutUint32(bw.buf, uint32(len(payload)))
	binary.LittleEndian.PutUint32(bw.buf[4:], blockSum(bw.seed, bw.number, bw.typ, payload))
	bw.buf[8] = bw.typ
	_, bw.err = bw.w.Write(bw.buf)
	bw.number++
	bw.buf = bw.buf[:blockHeadSize]
}

// ReadSnapshot reads what WriteSnapshot wrote, to the end of r. Anything that
// differs by a single bit, is cut short or goes on is ErrCorrupt or
// ErrUnknownVersion, wrapped; an error of r itself is passed on. It takes no
// more memory than in proportion to what it has read and found intact.
func ReadSnapshot(r io.Reader) (header []byte, s *State, err error) {
	s = NewState()
	header, err = scanSnapshot(r, s)
	if err != nil {
		return nil, nil, fmt.Errorf("kv: read snapshot: %w", err)
	}
	return header, s, nil
}

// VerifySnapshot checks all that ReadSnapshot would, in memory that depends only
// on the largest kept result, but for two things that cannot be seen without
// keeping what was read: whether the records of a key follow from each other in
// the history, and whether a tombstone comes twice. No damage is among them, as
// it breaks a checksum; only a writer with a broken state could do that.
func VerifySnapshot(r io.Reader) (header []byte, err error) {
	header, err = scanSnapshot(r, nil)
	if err != nil {
		return nil, fmt.Errorf("kv: verify snapshot: %w", err)
	}
	return header, nil
}

// ReadSnapshotHeader returns the header alone, reading no further than the
// blocks that hold it. It says nothing about the rest of the file.
func ReadSnapshotHeader(r io.Reader) (header []byte, err error) {
	br, err := newBlockReader(r)
	if err == nil {
		header, err = br.header()
	}
	if err != nil {
		return nil, fmt.Errorf("kv: read snapshot header: %w", err)
	}
	return header, nil
}

// scanSnapshot reads a whole file, into s unless that is nil.
func scanSnapshot(r io.Reader, s *State) ([]byte, error) {
	br, err := newBlockReader(r)
	if err != nil {
		return nil, err
	}
	header, err := br.header()
	if err != nil {
		return nil, err
	}
	var t tally
	if err := br.windows(&t, s); err != nil {
		return nil, err
	}
	if err := br.items(&t, s); err != nil {
		return nil, fmt.Errorf("entry %d: %w", t.count, err)
	}
	x, err := br.extras(&t, s)
	if err != nil {
		return nil, err
	}
	want, err := br.trailer()
	if err != nil {
		return nil, err
	}
	if err := t.compare(want, &x); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	if s == nil {
		return header, nil
	}
	s.revision, s.applied = want.revision, want.applied
	s.bytes, s.sum = int64(t.bytes), t.sum
	if err := s.loadHistory(x.events); err != nil {
		return nil, fmt.Errorf("history: %w: %w", err, ErrCorrupt)
	}
	return header, nil
}

// compare holds what was read against the trailer.
func (t *tally) compare(want trailer, x *readExtras) error {
	got := trailer{
		entries: t.count, bytes: t.bytes, windows: t.windows,
		revision: want.revision, applied: want.applied,
		hash: x.join(stateHash(t.sum, t.windowSum, want.revision)),
	}
	switch {
	case got != want || want.revision < t.maxMod:
		return fmt.Errorf("the trailer %+v does not fit the content %+v with revisions up to %d", want, got, t.maxMod)
	case t.events > 0 && t.lastEvent != want.revision:
		return fmt.Errorf("history ends with revision %d, the store with %d", t.lastEvent, want.revision)
	case x.index > want.applied:
		return fmt.Errorf("something of log index %d, applied up to %d", x.index, want.applied)
	case t.lastLease > x.lastLease:
		return fmt.Errorf("lease %d, where %d was given out last", t.lastLease, x.lastLease)
	case t.attachSum != 0:
		return errors.New("leases and items do not agree about which keys are attached")
	}
	return nil
}

// windows reads the replay section.
func (br *blockReader) windows(t *tally, s *State) error {
	for {
		b, err := br.peek(sectionReplay, windowSize)
		if err != nil || len(b) == 0 {
			return err
		}
		if len(b) < windowSize {
			return fmt.Errorf("replay section cut short: %w", ErrCorrupt)
		}
		var w window
		w.decode(b)
		br.discard(windowSize)
		if err := t.addWindow(&w); err != nil {
			return fmt.Errorf("%w: %w", err, ErrCorrupt)
		}
		if s != nil {
			s.windows = append(s.windows, w)
		}
	}
}

// items reads the item section.
func (br *blockReader) items(t *tally, s *State) error {
	build := newItemBuilder()
	for {
		b, err := br.peek(sectionItems, 1)
		if err != nil {
			return err
		}
		if len(b) == 0 {
			if s != nil {
				s.items = build.tree()
			}
			return nil
		}
		r, err := br.record(sectionItems, s != nil)
		if err != nil {
			return err
		}
		if err := t.add(r.key, r.head); err != nil {
			return fmt.Errorf("%w: %w", err, ErrCorrupt)
		}
		t.sum += r.hash
		if r.lease != 0 {
			t.attachSum += attachHash(r.lease)
		}
		if s != nil {
			build.add(r.rec)
			if r.lease != 0 {
				s.leases.loadAttachment(r.lease, keyOf(r.rec, r.head))
			}
		}
	}
}

// readRecord is a record out of a section.
type readRecord struct {
	head
	key  []byte // valid until the next record is read
	hash uint64
	rec  string // if it was to be kept
}

// record reads a record; keep says whether as a whole. It does not judge the
// numbers; head.valid does.
func (br *blockReader) record(section byte, keep bool) (r readRecord, err error) {
	b, err := br.peek(section, maxHeadSize)
	if err != nil {
		return r, err
	}
	if r.head, err = parseHead(b); err != nil {
		return r, err
	}
	if b, err = br.peek(section, r.prefix()); err != nil {
		return r, err
	}
	if len(b) < r.prefix() {
		return r, fmt.Errorf("cut short in its key: %w", ErrCorrupt)
	}
	// A copy, as reading on moves the buffer.
	br.key = append(br.key[:0], b[r.size:r.prefix()]...)
	r.key = br.key
	if r.recordSize() > uint64(len(b)) {
		return r, br.longRecord(section, keep, &r)
	}
	b = b[:r.recordSize()]
	if keep {
		r.rec = keepRecord(r.head, b)
	}
	br.discard(len(b))
	r.hash = recordHash(stringOf(b), r.head)
	return r, nil
}

// longRecord goes on where the value does in later blocks. Its length is not
// believed: scratch grows with what has arrived.
func (br *blockReader) longRecord(section byte, keep bool, r *readRecord) error {
	front := br.unread()[:r.prefix()]
	frontSum, valueSum := crc32.Checksum(front, castagnoli), uint32(0)
	br.scratch = append(br.scratch[:0], front...)
	br.discard(len(front))
	for left := r.valueLen; left > 0; {
		b, err := br.peek(section, 1)
		if err != nil {
			return err
		}
		if len(b) == 0 {
			return fmt.Errorf("cut short in its value: %w", ErrCorrupt)
		}
		b = b[:min(left, len(b))]
		valueSum = crc32.Update(valueSum, castagnoli, b)
		if keep {
			br.scratch = append(br.scratch, b...)
		}
		left -= len(b)
		br.discard(len(b))
	}
	if keep {
		r.rec = keepRecord(r.head, br.scratch)
	}
	r.hash = joinHash(frontSum, valueSum)
	return nil
}

// trailer reads the last section and makes sure that nothing follows it.
func (br *blockReader) trailer() (t trailer, err error) {
	b, err := br.peek(sectionTrailer, trailerSize+1)
	if err != nil {
		return t, err
	}
	if len(b) == 0 {
		return t, fmt.Errorf("section %d out of order: %w", br.typ, br.unexpected())
	}
	if len(b) != trailerSize {
		return t, fmt.Errorf("a trailer of %d bytes: %w", len(b), ErrCorrupt)
	}
	t.decode(b)
	br.discard(trailerSize)
	return t, nil
}

// header reads the header section, which nothing else may share blocks with.
func (br *blockReader) header() ([]byte, error) {
	b, err := br.peek(sectionHeader, 1) // more would read past a short header
	if err != nil {
		return nil, err
	}
	size, n := uvarint(b)
	if n <= 0 || size > MaxHeaderSize {
		return nil, fmt.Errorf("no valid header: %w", ErrCorrupt)
	}
	br.discard(n)
	var header []byte
	for uint64(len(header)) < size {
		b, err := br.peek(sectionHeader, 1)
		if err != nil {
			return nil, err
		}
		if len(b) == 0 {
			return nil, fmt.Errorf("header cut short: %w", ErrCorrupt)
		}
		b = b[:min(size-uint64(len(header)), uint64(len(b)))]
		header = append(header, b...)
		br.discard(len(b))
	}
	if len(br.unread()) > 0 {
		return nil, fmt.Errorf("header goes on after its end: %w", ErrCorrupt)
	}
	return header, nil
}

// blockReader joins blocks to sections.
type blockReader struct {
	r      io.Reader
	seed   uint32
	number uint64 // of the next block to read

	// buf[off:] is what is left of the section being read.
	buf []byte
	off int

	// One block is read ahead, to see where a section ends. It is intact.
	held    bool
	typ     byte
	payload []byte // its backing array is reused
	eof     bool   // there is no block after the trailer

	scratch []byte // what spans blocks
	key     []byte // of what was read last
}

func newBlockReader(r io.Reader) (*blockReader, error) {
	want := snapshotPreamble()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil {
		return nil, fmt.Errorf("magic and version: %w", cutShort(err))
	}
	if string(got[:len(snapshotMagic)]) != snapshotMagic {
		return nil, fmt.Errorf("not a snapshot: %w", ErrCorrupt)
	}
	if v := binary.LittleEndian.Uint32(got[len(snapshotMagic):]); v != snapshotVersion {
		return nil, fmt.Errorf("version %d: %w", v, ErrUnknownVersion)
	}
	return &blockReader{r: r, seed: crc32.Checksum(got, castagnoli), payload: make([]byte, 0, blockSize)}, nil
}

// cutShort turns the end of the file where it must not end into ErrCorrupt, and
// leaves errors of the reader as they are.
func cutShort(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the file ends early: %w", ErrCorrupt)
	}
	return err
}

func (br *blockReader) unread() []byte { return br.buf[br.off:] }

func (br *blockReader) discard(n int) { br.off += n }

// peek returns what is left of the section, reading on until that is at least n
// bytes, or fewer where the section ends. It is valid until the next peek.
func (br *blockReader) peek(section byte, n int) ([]byte, error) {
	for len(br.unread()) < n {
		more, err := br.more(section)
		if err != nil {
			return nil, err
		}
		if !more {
			break
		}
	}
	return br.unread(), nil
}

// more appends the next block to buf if it belongs to the section.
func (br *blockReader) more(section byte) (bool, error) {
	if !br.held && !br.eof {
		if err := br.hold(); err != nil {
			return false, fmt.Errorf("block %d: %w", br.number, err)
		}
	}
	if br.eof || br.typ != section {
		return false, nil
	}
	// What is left over is at most a key and a head, so buf stays small.
	br.buf = append(br.buf[:0], br.unread()...)
	br.buf = append(br.buf, br.payload...)
	br.off = 0
	br.held = false
	if section == sectionTrailer {
		return true, br.end()
	}
	return true, nil
}

// hold reads the next block and checks it.
func (br *blockReader) hold() error {
	var front [blockHeadSize]byte
	if _, err := io.ReadFull(br.r, front[:]); err != nil {
		return cutShort(err)
	}
	size := binary.LittleEndian.Uint32(front[:])
	if size < 1 || size > blockSize {
		return fmt.Errorf("a length of %d: %w", size, ErrCorrupt)
	}
	br.payload = br.payload[:size]
	if _, err := io.ReadFull(br.r, br.payload); err != nil {
		return cutShort(err)
	}
	br.typ = front[8]
	if blockSum(br.seed, br.number, br.typ, br.payload) != binary.LittleEndian.Uint32(front[4:]) {
		return fmt.Errorf("checksum mismatch: %w", ErrCorrupt)
	}
	br.held = true
	br.number++
	return nil
}

// end checks that the file ends with the trailer's block.
func (br *blockReader) end() error {
	br.eof = true
	switch _, err := io.ReadFull(br.r, make([]byte, 1)); {
	case err == nil:
		return fmt.Errorf("the file goes on after its trailer: %w", ErrCorrupt)
	case err == io.EOF:
		return nil
	default:
		return err
	}
}

// unexpected says what a block that no section wants means: an intact one of an
// unknown type was written by a newer version.
func (br *blockReader) unexpected() error {
	if br.typ >= sectionHeader && br.typ <= sectionTombstones || br.typ == sectionTrailer {
		return ErrCorrupt
	}
	return ErrUnknownVersion
}
