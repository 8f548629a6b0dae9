package wal

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

var small = Options{SegmentBytes: 16 << 10}

type entry struct {
	kind        uint8
	term, index uint64
	data        string
}

// history is what a log tells.
type history struct {
	entries   []entry
	snapshots []uint64
	state     State
	first     uint64
	frames    uint64
}

func read(dir string) (history, Content, error) {
	var h history
	c, err := Read(dir, Visitor{
		Entry: func(kind uint8, term, index uint64, data []byte) error {
			h.entries = append(h.entries, entry{kind, term, index, string(data)})
			return nil
		},
		Snapshot: func(index, _ uint64) error { h.snapshots = append(h.snapshots, index); return nil },
	})
	h.state, h.first, h.frames = c.State, c.First, c.Frames
	return h, c, err
}

func mustOpen(t rapid.TB, dir string, opt Options) (*Log, history) {
	t.Helper()
	h, c, err := read(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Open(dir, c, opt)
	if err != nil {
		t.Fatal(err)
	}
	return l, h
}

func must(t rapid.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// What a log tells is what was synced, whatever was opened, closed, released and
// written over in between.
func TestAgainstList(t *testing.T) {
	root, n := t.TempDir(), 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		dir := filepath.Join(root, fmt.Sprint(n))
		defer os.RemoveAll(dir)
		l, err := Create(dir, []byte("who"), 0, small)
		must(t, err)
		var want history
		var pending history
		released, index := uint64(0), uint64(0)
		sync := func() {
			before := l.Frames()
			must(t, l.Sync())
			if l.Frames() > before {
				want.entries = append(want.entries, pending.entries...)
				want.snapshots = append(want.snapshots, pending.snapshots...)
			}
			pending.entries, pending.snapshots = nil, nil
		}
		t.Repeat(map[string]func(*rapid.T){
			"entry": func(t *rapid.T) {
				index++
				e := entry{rapid.Uint8().Draw(t, "kind"), rapid.Uint64().Draw(t, "term"), index, string(bytes.Repeat([]byte("d"), rapid.IntRange(0, 9000).Draw(t, "size")))}
				l.Entry(e.kind, e.term, e.index, []byte(e.data))
				pending.entries = append(pending.entries, e)
			},
			"state": func(t *rapid.T) {
				want.state = State{rapid.Uint64().Draw(t, "term"), rapid.Uint64().Draw(t, "vote"), rapid.Uint64().Draw(t, "commit")}
				l.State(want.state)
			},
			"snapshot": func(t *rapid.T) {
				l.Snapshot(index, 1)
				pending.snapshots = append(pending.snapshots, index)
			},
			"sync": func(*rapid.T) { sync() },
			"release": func(t *rapid.T) {
				if len(want.entries) > 0 {
					released = max(released, rapid.SampledFrom(want.entries).Draw(t, "released").index)
					must(t, l.Release(released))
				}
			},
			"reopen": func(t *rapid.T) {
				sync()
				frames := l.Frames()
				must(t, l.Close())
				var got history
				l, got = mustOpen(t, dir, small)
				if l.Frames() != frames || got.state != want.state {
					t.Fatalf("opened at frame %d with %v, want %d with %v", l.Frames(), got.state, frames, want.state)
				}
				after := slices.DeleteFunc(slices.Clone(want.entries), func(e entry) bool { return e.index <= released })
				if n := len(got.entries); n < len(after) || n > len(want.entries) || !slices.Equal(got.entries, want.entries[len(want.entries)-n:]) {
					t.Fatalf("%d entries are not the last of %d, or fewer than %d", n, len(want.entries), len(after))
				}
				if len(got.entries) > 0 && got.first > got.entries[0].index {
					t.Fatalf("begins at entry %d by its head, and with entry %d", got.first, got.entries[0].index)
				}
				if n := len(got.snapshots); !slices.Equal(got.snapshots, want.snapshots[len(want.snapshots)-n:]) {
					t.Fatalf("snapshots %v, want the end of %v", got.snapshots, want.snapshots)
				}
			},
			"": func(t *rapid.T) {
				if names, _ := filepath.Glob(filepath.Join(dir, "*.spare")); len(names) > maxSpares || len(names) != len(l.spares) {
					t.Fatalf("spare files %v, the log knows %v", names, l.spares)
				}
			},
		})
		must(t, l.Close())
	})
}

// fill writes frames of one entry each until the log has n segments. They are of one
// size, so that in a file that is written over those of its former life lie in place.
func fill(t *testing.T, l *Log, n int) {
	t.Helper()
	for len(l.segments) < n {
		l.Entry(0, 1, l.last+1, bytes.Repeat([]byte{byte(l.last)}, 700))
		l.State(State{1, 1, l.last - 1})
		must(t, l.Sync())
	}
}

// A file is written over, and nothing of its former life comes back.
func TestSegmentsAreWrittenOver(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, err := Create(dir, nil, 0, small)
	must(t, err)
	fill(t, l, 3)
	oldest, err := os.Stat(l.segments[0].path)
	must(t, err)
	must(t, l.Release(l.last))
	fill(t, l, 2)
	newest, err := os.Stat(l.segments[1].path)
	must(t, err)
	if !os.SameFile(oldest, newest) {
		t.Error("the released segment's file is not that of the new one")
	}
	last, frames := l.last, l.Frames()
	must(t, l.Close())
	l, h := mustOpen(t, dir, small)
	if l.last != last || l.Frames() != frames || h.entries[len(h.entries)-1].index != last {
		t.Fatalf("opened at entry %d, frame %d; want %d, %d", l.last, l.Frames(), last, frames)
	}
	must(t, l.Close())
}

// copyLog writes the files of one log into a new directory, one of them changed.
func copyLog(t *testing.T, files map[string][]byte, name string, content []byte) string {
	t.Helper()
	dir := t.TempDir()
	for n, b := range files {
		if n == name {
			b = content
		}
		must(t, os.WriteFile(filepath.Join(dir, n), b, 0o600))
	}
	return dir
}

func contents(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	names, err := os.ReadDir(dir)
	must(t, err)
	for _, n := range names {
		out[n.Name()], err = os.ReadFile(filepath.Join(dir, n.Name()))
		must(t, err)
	}
	return out
}

// recycled is a log of two segments, the files of which had a former life.
func recycled(t *testing.T) (files map[string][]byte, newest string, want history, end int64) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "wal")
	l, err := Create(dir, []byte("member 1"), 0, small)
	must(t, err)
	fill(t, l, 3)
	must(t, l.Release(l.last))
	fill(t, l, 3)
	must(t, l.Release(l.segments[1].first))
	for range 5 {
		l.Entry(0, 1, l.last+1, []byte("some data"))
		must(t, l.Sync())
	}
	newest = filepath.Base(l.segments[len(l.segments)-1].path)
	must(t, l.Close())
	want, c, err := read(dir)
	must(t, err)
	if len(c.segments) != 2 {
		t.Fatalf("%d segments, want 2", len(c.segments))
	}
	return contents(t, dir), newest, want, c.end
}

// verdict of a damaged copy: noticed, harmless, or silent, which must not be. A log
// that ends before the last synced frame, or begins after an entry that is needed, is
// noticed by who knows these numbers.
func verdict(dir string, want history) (string, history) {
	got, _, err := read(dir)
	switch {
	case err != nil:
		return "noticed", got
	case got.frames < want.frames || got.first > want.first:
		return "noticed", got
	case !reflect.DeepEqual(got, want):
		return "silent", got
	}
	return "harmless", got
}

// No flipped bit, lost page, or cut changes what a log tells without a word.
func TestDamageIsNoticed(t *testing.T) {
	files, newest, want, end := recycled(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	count := map[string]int{}
	check := func(what, name string, change func([]byte) []byte) {
		t.Helper()
		b := change(slices.Clone(files[name]))
		v, got := verdict(copyLog(t, files, name, b), want)
		count[v]++
		if v == "silent" {
			t.Errorf("%s of %s: reads %d frames and %d entries up to %v", what, name, got.frames, len(got.entries), got.state)
		}
	}
	for name, b := range files {
		if filepath.Ext(name) != ".wal" {
			continue
		}
		used := len(b)
		if name == newest {
			used = int(end)
		}
		for range 300 {
			at, bit := rnd.IntN(used), rnd.IntN(8)
			check(fmt.Sprintf("bit %d of byte %d", bit, at), name, func(b []byte) []byte { b[at] ^= 1 << bit; return b })
		}
		for _, size := range []int{512, 4096} {
			for at := 0; at < len(b); at += size {
				check(fmt.Sprintf("%d zeros at %d", size, at), name, func(b []byte) []byte { clear(b[at:min(at+size, len(b))]); return b })
			}
			for range 20 {
				x, y := rnd.IntN(len(b)/size)*size, rnd.IntN(len(b)/size)*size
				check(fmt.Sprintf("%d bytes at %d and %d swapped", size, x, y), name, func(b []byte) []byte {
					old := slices.Clone(b[x : x+size])
					copy(b[x:x+size], b[y:y+size])
					copy(b[y:y+size], old)
					return b
				})
			}
		}
		for range 100 {
			n := rnd.IntN(used)
			check(fmt.Sprintf("cut to %d bytes", n), name, func(b []byte) []byte { return b[:n] })
		}
	}
	t.Log(count)
	if count["noticed"] < 500 {
		t.Errorf("only %d changes were noticed", count["noticed"])
	}
}

// A frame that cannot be read is damage, and not a write that a crash cut short, if
// another comes after it: also for somebody who does not know how many there were.
func TestDamageIsNotTorn(t *testing.T) {
	files, newest, want, end := recycled(t)
	for at := headSize; at < int(end)-8*frameHead; at += 97 { // the last frames are shorter than that
		b := slices.Clone(files[newest])
		b[at] ^= 4
		if got, _, err := read(copyLog(t, files, newest, b)); !errors.Is(err, ErrDamaged) && !reflect.DeepEqual(got, want) {
			t.Fatalf("byte %d: %d of %d frames, %v", at, got.frames, want.frames, err)
		}
	}
}

// Whatever part of the last write reached the disk, the log ends with the frame
// before it, or with it if it is whole; and it goes on from there.
func TestTornWrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, err := Create(dir, nil, 0, small)
	must(t, err)
	fill(t, l, 3)
	must(t, l.Release(l.last))
	fill(t, l, 2) // a file with a former life
	before := contents(t, dir)
	frames, from := l.Frames(), l.at
	l.Entry(0, 1, l.last+1, bytes.Repeat([]byte("torn"), 500))
	must(t, l.Sync())
	newest := filepath.Base(l.segments[1].path)
	to := l.at
	after := contents(t, dir)[newest]
	must(t, l.Close())

	const sector = 512
	first, last := from/sector, (to-1)/sector
	for mask := range 1 << (last - first + 1) {
		b := slices.Clone(before[newest])
		for i := first; i <= last; i++ {
			if mask>>(i-first)&1 == 1 {
				copy(b[i*sector:(i+1)*sector], after[i*sector:])
			}
		}
		dir := copyLog(t, before, newest, b)
		l, h := mustOpen(t, dir, small)
		if whole := bytes.Equal(b, after); !whole && h.frames != frames || whole && h.frames != frames+1 {
			t.Fatalf("sectors %b: %d frames, want %d", mask, h.frames, frames)
		}
		l.Entry(0, 2, l.last+1, []byte("next"))
		must(t, l.Sync())
		must(t, l.Close())
		if again, _, err := read(dir); err != nil || again.frames != h.frames+1 {
			t.Fatalf("sectors %b: after one more frame %d, %v", mask, again.frames, err)
		}
	}
}

// A value that holds whole frames of the numbers to come, as a client may store who
// knows the format, is no frame behind the end of the log. It gets there in a file
// that is written over.
func TestForgedFrames(t *testing.T) {
	var forged []byte
	for number := uint64(1); len(forged) < 6<<10; number++ {
		l := &Log{next: number}
		l.reset()
		l.Entry(0, 1, number, []byte("forged"))
		l.frame = append(l.frame, make([]byte, -len(l.frame)&7)...)
		l.seal(len(l.frame) - frameHead)
		forged = append(forged, l.frame...)
	}
	for shift := range 8 { // a frame begins at a multiple of 8
		dir := filepath.Join(t.TempDir(), "wal")
		l, err := Create(dir, nil, 0, small)
		must(t, err)
		for len(l.segments) < 3 {
			l.Entry(0, 1, l.last+1, append(make([]byte, shift), forged...))
			must(t, l.Sync())
		}
		must(t, l.Release(l.last))
		l.Entry(0, 1, l.last+1, make([]byte, 14<<10)) // fills the newest segment
		must(t, l.Sync())
		l.Entry(0, 1, l.last+1, []byte("in the oldest file"))
		must(t, l.Sync())
		h, _, err := read(dir)
		if err != nil || h.frames != l.Frames() {
			t.Fatalf("shifted by %d: %d of %d frames, %v", shift, h.frames, l.Frames(), err)
		}
		must(t, l.Close())
	}
}

// A new segment is complete or absent.
func TestCrashWhileCutting(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, err := Create(dir, nil, 0, small)
	must(t, err)
	fill(t, l, 2)
	must(t, l.Close())
	for _, leftover := range [][]byte{nil, make([]byte, headSize), []byte(magic)} {
		must(t, os.WriteFile(filepath.Join(dir, "new.tmp"), leftover, 0o600))
		l, h := mustOpen(t, dir, small)
		if h.frames != l.Frames() {
			t.Fatal("opened elsewhere")
		}
		fill(t, l, len(l.segments)+1)
		must(t, l.Close())
	}
}

// After an error nothing is promised any more.
func TestNoSyncAfterAnError(t *testing.T) {
	l, err := Create(filepath.Join(t.TempDir(), "wal"), nil, 0, small)
	must(t, err)
	l.Entry(0, 1, 1, []byte("x"))
	must(t, l.Sync())
	must(t, l.f.Close())
	l.Entry(0, 1, 2, []byte("y"))
	if err := l.Sync(); err == nil {
		t.Fatal("synced a closed file")
	}
	if l.f, err = os.OpenFile(l.segments[0].path, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	if l.Sync() == nil || l.Release(1) == nil || l.Frames() != 1 {
		t.Error("went on after an error")
	}
	must(t, l.Close())
}

// A commit index alone waits for the next frame, or for the end.
func TestCommitWaits(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, err := Create(dir, nil, 0, small)
	must(t, err)
	l.State(State{1, 1, 7})
	if h, _, err := read(dir); err != nil || h.frames != 0 {
		t.Fatalf("%+v, %v", h, err)
	}
	must(t, l.Close())
	if h, _, err := read(dir); err != nil || h.state.Commit != 7 {
		t.Fatalf("%+v, %v", h, err)
	}
}

// Bytes that no log wrote are refused, not run into.
func FuzzRead(f *testing.F) {
	dir := f.TempDir()
	l, err := Create(filepath.Join(dir, "wal"), []byte("m"), 0, Options{SegmentBytes: 8 << 10})
	if err != nil {
		f.Fatal(err)
	}
	l.Entry(2, 3, 1, []byte("data"))
	l.Snapshot(1, 3)
	l.State(State{3, 1, 1})
	if err := l.Close(); err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(l.segments[0].path)
	if err != nil {
		f.Fatal(err)
	}
	name := filepath.Base(l.segments[0].path)
	f.Add(b, b[headSize+frameHead:headSize+frameHead+20])
	f.Fuzz(func(t *testing.T, file, records []byte) {
		if err := visitRecords(records, recordVisitor{}); err != nil && !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, name), file, 0o600))
		if _, err := Read(dir, Visitor{}); err != nil && !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
	})
}

func BenchmarkSync(b *testing.B) {
	for _, size := range []int{200, 4 << 10, 100 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			l, err := Create(filepath.Join(b.TempDir(), "wal"), nil, 0, Options{SegmentBytes: 64 << 20})
			if err != nil {
				b.Fatal(err)
			}
			data := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				l.Entry(0, 1, l.last+1, data)
				if err := errors.Join(l.Sync(), l.Release(max(l.last, 1000)-1000)); err != nil {
					b.Fatal(err)
				}
			}
			if err := l.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
