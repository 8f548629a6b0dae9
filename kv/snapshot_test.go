package kv

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// goldenState has replay windows, replaced and deleted keys, odd bytes, and
// numbers of several bytes.
func goldenState() *State {
	s := NewState()
	b := goldenBatch()
	s.Apply(1<<40, &b, nil)
	s.Apply(1<<40+1, &Batch{Node: 2, Boot: 7, Seq: 1 << 20, Commands: []Command{put("sky", "grey"), put("sky", "black")}}, nil)
	s.SetApplied(1<<40 + 2)
	return s
}

func snapshot(t testing.TB, header []byte, s *State) []byte {
	t.Helper()
	var file bytes.Buffer
	if err := WriteSnapshot(&file, header, s); err != nil {
		t.Fatal(err)
	}
	return file.Bytes()
}

// restore reads a snapshot in every way there is.
func restore(t testing.TB, file []byte) ([]byte, *State) {
	t.Helper()
	header, s, err := ReadSnapshot(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	verified, err := VerifySnapshot(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	alone, err := ReadSnapshotHeader(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(header, verified) || !bytes.Equal(header, alone) {
		t.Error("the three readers disagree about the header")
	}
	check(t, s)
	return header, s
}

// The first golden file is of before there was a history: what it holds is read
// as a state that has compacted all of it, and is written as it was.
func TestGoldenSnapshot(t *testing.T) {
	want := goldenState()
	forgetHistory(want)
	file := golden(t, "snapshot-v1.hex", snapshot(t, []byte("a header"), want))
	header, s := restore(t, file)
	if string(header) != "a header" || dumpAll(s) != dumpAll(want) {
		t.Errorf("header %q\n got %s\nwant %s", header, dumpAll(s), dumpAll(want))
	}
	if s.History().Compacted() != 7 {
		t.Errorf("compacted up to %d", s.History().Compacted())
	}
	// It goes on like any other.
	apply(t, s, put("sky", "red"), del("sky"), del("empty"))
	if _, err := s.View(7); err != nil {
		t.Error(err)
	}
	if _, err := s.View(6); !errors.Is(err, ErrCompacted) {
		t.Error(err)
	}
	_, again := restore(t, snapshot(t, nil, s))
	if dumpAll(again) != dumpAll(s) {
		t.Errorf("got %s\nwant %s", dumpAll(again), dumpAll(s))
	}
}

func TestSnapshotRoundTrip(t *testing.T) {
	many := NewState()
	for i := range 5000 {
		many.Apply(uint64(i+1), &Batch{Node: uint64(i%5 + 1), Boot: 1, Seq: uint64(i + 1), Commands: []Command{
			put(fmt.Sprintf("%x", mix(uint64(i))), strings.Repeat("v", i%300)), del(fmt.Sprintf("%x", mix(uint64(i/2)))),
		}}, nil)
	}
	large := NewState()
	apply(t, large, put("\x00/\xff\xfe", "\x00/\xff\xfe"), put("large", strings.Repeat("\xff\x00", 1<<19)),
		put("last", ""), put(strings.Repeat("k", MaxKeySize), ""), put(strings.Repeat("l", MaxKeySize), strings.Repeat("v", 3*blockSize)))
	emptied := NewState()
	apply(t, emptied, put("a", "1"), del("a"))

	states := map[string]*State{
		"new": NewState(), "emptied": emptied, "golden": goldenState(), "many": many, "large": large,
		"full": fullState(t), "wide": wideState(t),
	}
	headers := map[string][]byte{"none": nil, "short": []byte("h"), "a block": make([]byte, blockSize-3), "full": bytes.Repeat([]byte("m"), MaxHeaderSize)}
	for name, s := range states {
		for size, header := range headers {
			t.Run(name+"/header "+size, func(t *testing.T) {
				file := snapshot(t, header, s)
				gotHeader, got := restore(t, file)
				if !bytes.Equal(gotHeader, header) {
					t.Error("another header")
				}
				if dumpAll(got) != dumpAll(s) {
					t.Error("another state")
				}
				if !bytes.Equal(snapshot(t, header, got), file) {
					t.Error("the restored state writes another file")
				}
			})
		}
	}
}

// A restored state goes on like the one it was taken from.
func TestRestoredStateGoesOn(t *testing.T) {
	a := NewState()
	for i := range 1000 {
		a.Apply(uint64(i+1), &Batch{Node: 1, Boot: 1, Seq: uint64(2*i + 1), Commands: []Command{put(fmt.Sprintf("k%d", i), "v")}}, nil)
	}
	_, b := restore(t, snapshot(t, nil, a))
	for i := range 1000 {
		batch := Batch{Node: 1, Boot: 1, Seq: uint64(i + 1000), Commands: []Command{put(fmt.Sprintf("k%d", i/2), "w"), del(fmt.Sprintf("k%d", 3*i))}}
		ra := a.Apply(uint64(2000+i), &batch, nil)
		rb := b.Apply(uint64(2000+i), &batch, nil)
		if fmt.Sprint(ra) != fmt.Sprint(rb) {
			t.Fatalf("step %d: %v and %v", i, ra, rb)
		}
	}
	check(t, a)
	check(t, b)
	if dumpAll(a) != dumpAll(b) {
		t.Error("the two have diverged")
	}
}

// Records that end at, just before and just after the end of a block.
func TestSnapshotBlockEdges(t *testing.T) {
	for size := blockSize - 12; size <= blockSize+4; size++ {
		s := NewState()
		apply(t, s, put("a", strings.Repeat("1", size)), put("b", strings.Repeat("2", size)), put("c", "3"))
		_, got := restore(t, snapshot(t, nil, s))
		if dumpAll(got) != dumpAll(s) {
			t.Fatalf("values of %d bytes: another state", size)
		}
	}
}

func TestSnapshotReaders(t *testing.T) {
	want := goldenState()
	file := snapshot(t, bytes.Repeat([]byte("h"), 100_000), want)
	for name, wrap := range map[string]func(io.Reader) io.Reader{
		"one byte at a time":    iotest.OneByteReader,
		"half of what is asked": iotest.HalfReader,
		"data with the error":   iotest.DataErrReader,
	} {
		t.Run(name, func(t *testing.T) {
			header, s, err := ReadSnapshot(wrap(bytes.NewReader(file)))
			if err != nil || len(header) != 100_000 || dumpAll(s) != dumpAll(want) {
				t.Error(err)
			}
		})
	}
}

func TestReadSnapshotHeaderReadsNoFurther(t *testing.T) {
	file := snapshot(t, []byte("h"), goldenState())
	r := bytes.NewReader(file)
	header, err := ReadSnapshotHeader(r)
	if err != nil || string(header) != "h" {
		t.Fatal(header, err)
	}
	if read := len(file) - r.Len(); read != 12+blockHeadSize+2 {
		t.Errorf("%d bytes read", read)
	}
}

// ReadSnapshotHeader judges what it reads as the others do.
func TestReadSnapshotHeaderRefuses(t *testing.T) {
	file := snapshot(t, []byte("a header"), NewState())
	for i := range 12 + blockHeadSize + 9 {
		if _, err := ReadSnapshotHeader(bytes.NewReader(file[:i])); !errors.Is(err, ErrCorrupt) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
		file[i] ^= 4
		if _, err := ReadSnapshotHeader(bytes.NewReader(file)); !refused(err) {
			t.Errorf("byte %d: %v", i, err)
		}
		file[i] ^= 4
	}
	for name, payload := range map[string][]byte{
		"shorter than said": {2, 'h'},
		"longer than said":  {1, 'h', 'h'},
		"beyond the limit":  binary.AppendUvarint(nil, MaxHeaderSize+1),
	} {
		if _, err := ReadSnapshotHeader(bytes.NewReader(forge(section{1, payload}))); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An error of the reader or the writer is neither lost nor called corruption.
func TestSnapshotPassesErrorsOn(t *testing.T) {
	broken := errors.New("broken disk")
	file := snapshot(t, []byte("header"), goldenState())
	for n := 0; n <= len(file); n++ {
		r := io.MultiReader(bytes.NewReader(file[:n]), iotest.ErrReader(broken))
		_, s, err := ReadSnapshot(r)
		if s != nil || !errors.Is(err, broken) || refused(err) {
			t.Fatalf("read error after %d bytes: %v", n, err)
		}
		if n == len(file) {
			break
		}
		if err := WriteSnapshot(&limitedWriter{left: n, err: broken}, []byte("header"), goldenState()); !errors.Is(err, broken) {
			t.Fatalf("write error after %d bytes: %v", n, err)
		}
	}
	if err := WriteSnapshot(io.Discard, make([]byte, MaxHeaderSize+1), NewState()); err == nil {
		t.Error("a header beyond the limit was written")
	}
}

type limitedWriter struct {
	left int
	err  error
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	n := min(len(p), w.left)
	w.left -= n
	if n < len(p) {
		return n, w.err
	}
	return n, nil
}

// bothRefuse checks that the two readers that judge a whole file refuse it with
// an error of the kind given, or of either kind where that is nil.
func bothRefuse(t *testing.T, file []byte, kind error) bool {
	t.Helper()
	header, s, err := ReadSnapshot(bytes.NewReader(file))
	verified, verr := VerifySnapshot(bytes.NewReader(file))
	if header != nil || s != nil || verified != nil {
		t.Error("an error came with a result")
		return false
	}
	fits := func(err error) bool { return kind == nil && refused(err) || kind != nil && errors.Is(err, kind) }
	if !fits(err) || !fits(verr) {
		t.Errorf("read: %v; verify: %v", err, verr)
		return false
	}
	return true
}

func TestSnapshotEveryFlipAndCut(t *testing.T) {
	for name, s := range map[string]*State{"golden": goldenState(), "full": fullState(t)} {
		t.Run(name, func(t *testing.T) {
			snapshotEveryFlipAndCut(t, snapshot(t, []byte("a header"), s))
		})
	}
}

func snapshotEveryFlipAndCut(t *testing.T, file []byte) {
	t.Logf("%d bytes", len(file))
	for i := range file {
		if !bothRefuse(t, file[:i], ErrCorrupt) {
			t.Fatalf("cut to %d bytes", i)
		}
		for bit := range 8 {
			file[i] ^= 1 << bit
			if !bothRefuse(t, file, nil) {
				t.Fatalf("byte %d, bit %d", i, bit)
			}
			file[i] ^= 1 << bit
		}
	}
	for b := range 256 {
		if !bothRefuse(t, append(bytes.Clone(file), byte(b)), ErrCorrupt) {
			t.Fatalf("a byte %#x too many", b)
		}
	}
	if !bothRefuse(t, append(bytes.Clone(file), file...), ErrCorrupt) {
		t.Error("twice the file")
	}
}

// rawBlock is a block as it stands in a file, checksum and all.
type rawBlock []byte

func splitBlocks(t testing.TB, file []byte) (preamble []byte, blocks []rawBlock) {
	t.Helper()
	preamble, rest := file[:12], file[12:]
	for len(rest) > 0 {
		n := blockHeadSize + int(binary.LittleEndian.Uint32(rest))
		blocks = append(blocks, rest[:n])
		rest = rest[n:]
	}
	return preamble, blocks
}

func joinBlocks(preamble []byte, blocks ...rawBlock) []byte {
	file := bytes.Clone(preamble)
	for _, b := range blocks {
		file = append(file, b...)
	}
	return file
}

// multiBlockState takes several item blocks.
func multiBlockState(t testing.TB) *State {
	s := NewState()
	for i := range 6 {
		apply(t, s, put(fmt.Sprintf("k%d", i), strings.Repeat(fmt.Sprint(i), blockSize-100)))
	}
	return s
}

// Every block is intact here; that is what its number is in the checksum for.
func TestSnapshotBlocksMoved(t *testing.T) {
	for name, s := range map[string]*State{"items": multiBlockState(t), "wide": wideState(t), "full": fullState(t)} {
		t.Run(name, func(t *testing.T) {
			blocksMoved(t, snapshot(t, bytes.Repeat([]byte("h"), 3*blockSize), s))
		})
	}
}

func blocksMoved(t *testing.T, file []byte) {
	preamble, blocks := splitBlocks(t, file)
	if len(blocks) < 9 {
		t.Fatalf("only %d blocks", len(blocks))
	}
	for i := range blocks {
		without := append(append([]rawBlock{}, blocks[:i]...), blocks[i+1:]...)
		if !bothRefuse(t, joinBlocks(preamble, without...), ErrCorrupt) {
			t.Errorf("without block %d", i)
		}
		twice := append(append([]rawBlock{}, blocks[:i+1]...), blocks[i:]...)
		if !bothRefuse(t, joinBlocks(preamble, twice...), ErrCorrupt) {
			t.Errorf("block %d twice", i)
		}
		for j := range i {
			swapped := append([]rawBlock{}, blocks...)
			swapped[i], swapped[j] = swapped[j], swapped[i]
			if !bothRefuse(t, joinBlocks(preamble, swapped...), ErrCorrupt) {
				t.Errorf("blocks %d and %d swapped", i, j)
			}
		}
		if !bothRefuse(t, joinBlocks(preamble, blocks[:i]...), ErrCorrupt) {
			t.Errorf("cut before block %d", i)
		}
	}
}

// The number alone must do it: nothing else tells two header blocks apart, as
// the header is not part of the state's hash.
func TestSnapshotHeaderBlocksSwapped(t *testing.T) {
	header := append(bytes.Repeat([]byte("1"), blockSize-3), bytes.Repeat([]byte("2"), blockSize)...)
	header = append(header, bytes.Repeat([]byte("3"), blockSize)...)
	preamble, blocks := splitBlocks(t, snapshot(t, header, NewState()))
	blocks[1], blocks[2] = blocks[2], blocks[1]
	file := joinBlocks(preamble, blocks...)
	bothRefuse(t, file, ErrCorrupt)
	if _, err := ReadSnapshotHeader(bytes.NewReader(file)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("got %v", err)
	}
}

// section is the payload of one block to be.
type section struct {
	typ     byte
	payload []byte
}

// forge builds a file with good checksums out of any blocks.
func forge(sections ...section) []byte {
	file := snapshotPreamble()
	seed := crc32.Checksum(file, castagnoli)
	for i, s := range sections {
		file = binary.LittleEndian.AppendUint32(file, uint32(len(s.payload)))
		file = binary.LittleEndian.AppendUint32(file, blockSum(seed, uint64(i), s.typ, s.payload))
		file = append(append(file, s.typ), s.payload...)
	}
	return file
}

// What good checksums do not excuse.
func TestReadSnapshotRefuses(t *testing.T) {
	rec := func(key, value string, create, mod, version int64) []byte {
		h := newHead(create, mod, version, 0, len(key), len(value))
		return []byte(newRecord(h, key, []byte(value)))
	}
	good := NewState()
	good.Apply(3, &Batch{Node: 1, Boot: 1, Seq: 1, Commands: []Command{put("a", "1"), put("b", "22")}}, nil)
	forgetHistory(good)
	total := trailer{entries: 2, bytes: 5, windows: 1, revision: 2, applied: 3, hash: good.Hash()}
	end := func(change func(*trailer)) section {
		t := total
		if change != nil {
			change(&t)
		}
		return section{255, t.append(nil)}
	}
	head := section{1, []byte{0}}
	replay := section{2, good.windows[0].append(nil)}
	a, b := rec("a", "1", 1, 1, 1), rec("b", "22", 2, 2, 1)
	items := section{3, append(bytes.Clone(a), b...)}
	changed := func(change func(*window)) section {
		w := good.windows[0]
		change(&w)
		return section{2, w.append(nil)}
	}
	huge := binary.AppendUvarint([]byte{0, 1, 1, 1, 1}, 1<<39)

	if _, _, err := ReadSnapshot(bytes.NewReader(forge(head, replay, items, end(nil)))); err != nil {
		t.Fatalf("the file that the others differ from: %v", err)
	}
	if _, _, err := ReadSnapshot(bytes.NewReader(forge(head, replay, section{3, a}, section{3, b}, end(nil)))); err != nil {
		t.Fatalf("cut into other blocks: %v", err)
	}
	tests := []struct {
		name string
		file []byte
		want error
	}{
		{"another magic", append([]byte("PONTSNAQ"), forge(head, replay, items, end(nil))[8:]...), ErrCorrupt},
		{"version 2", append([]byte("PONTSNAP\x02\x00\x00\x00"), forge(head, end(nil))[12:]...), ErrUnknownVersion},
		{"no blocks", forge(), ErrCorrupt},
		{"no header", forge(replay, items, end(nil)), ErrCorrupt},
		{"no trailer", forge(head, replay, items), ErrCorrupt},
		{"two trailers", forge(head, replay, items, end(nil), end(nil)), ErrCorrupt},
		{"something after the trailer", forge(head, replay, items, end(nil), section{7, []byte{1}}), ErrCorrupt},
		{"unknown section before the items", forge(head, replay, section{9, []byte{1}}, items, end(nil)), ErrUnknownVersion},
		{"unknown section after the items", forge(head, replay, items, section{9, []byte{1}}, end(nil)), ErrUnknownVersion},
		{"unknown section first", forge(section{0, []byte{1}}, head, replay, items, end(nil)), ErrCorrupt},
		{"header twice", forge(head, head, replay, items, end(nil)), ErrCorrupt},
		{"replay after the items", forge(head, items, replay, end(nil)), ErrCorrupt},
		{"header at the end", forge(head, replay, items, head, end(nil)), ErrCorrupt},
		{"empty block", forge(head, replay, section{3, nil}, items, end(nil)), ErrCorrupt},
		{"block too long", forge(section{1, append([]byte{0x80, 0x80, 0x04}, make([]byte, blockSize)...)}, replay, items, end(nil)), ErrCorrupt},
		{"header shorter than said", forge(section{1, []byte{2, 'h'}}, replay, items, end(nil)), ErrCorrupt},
		{"header longer than said", forge(section{1, []byte{1, 'h', 'h'}}, replay, items, end(nil)), ErrCorrupt},
		{"header beyond the limit", forge(section{1, binary.AppendUvarint(nil, MaxHeaderSize+1)}, replay, items, end(nil)), ErrCorrupt},
		{"header length in a longer form", forge(section{1, []byte{0x80, 0}}, replay, items, end(nil)), ErrCorrupt},
		{"half a window", forge(head, section{2, replay.payload[:80]}, items, end(nil)), ErrCorrupt},
		{"windows out of order", forge(head, changed(func(w *window) { w.node = 2 }), replay, items, end(nil)), ErrCorrupt},
		{"window twice", forge(head, replay, replay, items, end(nil)), ErrCorrupt},
		{"window without its highest", forge(head, changed(func(w *window) { w.high = 2 }), items, end(nil)), ErrCorrupt},
		{"another boot", forge(head, changed(func(w *window) { w.boot = 2 }), items, end(nil)), ErrCorrupt},
		{"no window", forge(head, items, end(nil)), ErrCorrupt},
		{"items out of order", forge(head, replay, section{3, append(bytes.Clone(b), a...)}, end(nil)), ErrCorrupt},
		{"item twice", forge(head, replay, section{3, append(bytes.Clone(a), a...)}, end(nil)), ErrCorrupt},
		{"item twice, and counted twice", forge(head, replay, section{3, append(bytes.Clone(a), a...)}, end(func(t *trailer) {
			sum := 2 * recordHash(stringOf(a), headOf(stringOf(a)))
			t.bytes, t.hash = 4, stateHash(sum, good.windows[0].hash(), 2)
		})), ErrCorrupt},
		{"item missing", forge(head, replay, section{3, a}, end(nil)), ErrCorrupt},
		{"item with unknown fields", forge(head, replay, section{3, append([]byte{2}, a[1:]...)}, end(nil)), ErrUnknownVersion},
		{"item cut in its head", forge(head, replay, section{3, items.payload[:len(a)+3]}, end(nil)), ErrCorrupt},
		{"item cut in its key", forge(head, replay, section{3, items.payload[:len(a)+6]}, end(nil)), ErrCorrupt},
		{"item cut in its value", forge(head, replay, section{3, items.payload[:len(a)+8]}, end(nil)), ErrCorrupt},
		{"item without a key", forge(head, replay, section{3, rec("", "1", 1, 1, 1)}, end(nil)), ErrCorrupt},
		{"item of revision 0", forge(head, replay, section{3, append(rec("a", "1", 0, 0, 1), b...)}, end(nil)), ErrCorrupt},
		{"create above mod", forge(head, replay, section{3, append(rec("a", "1", 2, 1, 1), b...)}, end(nil)), ErrCorrupt},
		{"version too high", forge(head, replay, section{3, append(rec("a", "1", 1, 1, 2), b...)}, end(nil)), ErrCorrupt},
		{"negative revision", forge(head, replay, section{3, rec("a", "1", -1, -1, 1)}, end(nil)), ErrCorrupt},
		{"another value", forge(head, replay, section{3, append(rec("a", "2", 1, 1, 1), b...)}, end(nil)), ErrCorrupt},
		{"key beyond the limit", forge(head, replay, section{3, binary.AppendUvarint([]byte{0, 1, 1, 1}, MaxKeySize+1)}, end(nil)), ErrCorrupt},
		{"value beyond the file", forge(head, replay, section{3, append(huge, "key"...)}, end(nil)), ErrCorrupt},
		{"value beyond belief", forge(head, replay, section{3, append([]byte{0, 1, 1, 1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1}, 'a')}, end(nil)), ErrCorrupt},
		{"trailer: entries", forge(head, replay, items, end(func(t *trailer) { t.entries++ })), ErrCorrupt},
		{"trailer: bytes", forge(head, replay, items, end(func(t *trailer) { t.bytes++ })), ErrCorrupt},
		{"trailer: windows", forge(head, replay, items, end(func(t *trailer) { t.windows++ })), ErrCorrupt},
		{"trailer: revision", forge(head, replay, items, end(func(t *trailer) { t.revision++ })), ErrCorrupt},
		{"trailer: hash", forge(head, replay, items, end(func(t *trailer) { t.hash++ })), ErrCorrupt},
		{"trailer: revision below an entry", forge(head, replay, items, end(func(t *trailer) {
			t.revision, t.hash = 1, stateHash(good.sum, good.windows[0].hash(), 1)
		})), ErrCorrupt},
		{"trailer too short", forge(head, replay, items, section{255, make([]byte, trailerSize-1)}), ErrCorrupt},
		{"trailer too long", forge(head, replay, items, section{255, append(total.append(nil), 0)}), ErrCorrupt},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if bothRefuse(t, tt.file, tt.want) {
				_, err := VerifySnapshot(bytes.NewReader(tt.file))
				t.Log(err)
			}
			if n := allocated(func() { ReadSnapshot(bytes.NewReader(tt.file)) }); n > 1<<20 {
				t.Errorf("%d bytes allocated for a file of %d", n, len(tt.file))
			}
		})
	}
}

func TestSnapshotMemory(t *testing.T) {
	s := NewState()
	for i := range 16 {
		apply(t, s, put(fmt.Sprintf("k%d", i), strings.Repeat("v", 1<<20)))
	}
	apply(t, s, put(strings.Repeat("k", MaxKeySize), strings.Repeat("v", 1<<20)))
	file := snapshot(t, nil, s)
	if n := allocated(func() { VerifySnapshot(bytes.NewReader(file)) }); n > 1<<20 {
		t.Errorf("VerifySnapshot: %d bytes for a file of %d", n, len(file))
	}
	if n := allocated(func() { WriteSnapshot(io.Discard, nil, s) }); n > 256<<10 {
		t.Errorf("WriteSnapshot: %d bytes for a file of %d", n, len(file))
	}
	if n := allocated(func() { ReadSnapshot(bytes.NewReader(file)) }); n > uint64(3*len(file)/2) {
		t.Errorf("ReadSnapshot: %d bytes for a file of %d", n, len(file))
	}
}

// reseal gives every block of a file a good checksum, as far as there are blocks.
func reseal(data []byte) []byte {
	if len(data) < 12 {
		return data
	}
	var sections []section
	rest := data[12:]
	for len(rest) > blockHeadSize {
		n := min(int(binary.LittleEndian.Uint32(rest)), len(rest)-blockHeadSize)
		sections = append(sections, section{rest[8], rest[blockHeadSize : blockHeadSize+n]})
		rest = rest[blockHeadSize+n:]
	}
	return forge(sections...)
}

func FuzzReadSnapshot(f *testing.F) {
	f.Add(snapshot(f, []byte("a header"), goldenState()))
	f.Add(snapshot(f, nil, NewState()))
	f.Add(snapshot(f, nil, fullState(f)))
	for _, file := range refusedSections(f) {
		if len(file.data) < blockSize { // larger ones slow the search down
			f.Add(file.data)
		}
	}
	f.Add(forge(section{1, []byte{0}}, section{3, []byte{0, 1, 1, 1, 1, 0xff, 0xff, 0xff, 0xff, 0x0f, 'a'}}))
	f.Fuzz(func(t *testing.T, data []byte) {
		readEither(t, data)
		readEither(t, reseal(data)) // past the checksums
	})
}

// readEither checks that a file is refused by both readers, or means the same to
// both and can be written again.
func readEither(t *testing.T, file []byte) {
	var header []byte
	var s *State
	var err error
	// The constant is the buffers; the factor is for what takes a few bytes.
	if n := allocated(func() { header, s, err = ReadSnapshot(bytes.NewReader(file)) }); n > uint64(120*len(file))+1<<20 {
		t.Errorf("%d bytes allocated for %d", n, len(file))
	}
	verified, verr := VerifySnapshot(bytes.NewReader(file))
	if err == nil && verr != nil || err == nil && !bytes.Equal(header, verified) {
		t.Fatalf("read: %v; verify: %v", err, verr)
	}
	if err != nil {
		if verr == nil && !unseenByVerify(err) {
			t.Fatalf("verify says nothing; read: %v", err)
		}
		if !refused(err) || verr != nil && !refused(verr) {
			t.Fatalf("error without a kind: %v; %v", err, verr)
		}
		return
	}
	gotHeader, got := restore(t, snapshot(t, header, s))
	if !bytes.Equal(gotHeader, header) || dumpAll(got) != dumpAll(s) {
		t.Error("written again it is another")
	}
}
