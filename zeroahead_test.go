package main

import (
	"bytes"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
)

// Zeros written ahead never touch what the log holds: through appends of any
// size, segments that are full, snapshots, crashes and restarts.
func TestZerosStayAhead(t *testing.T) {
	smallSegments(t, 1<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	dir := t.TempDir()
	d := openTestDir(t, dir)
	if err := d.bootstrap(1, soleFounder(), false); err != nil {
		t.Fatal(err)
	}
	if _, err := d.load(); err != nil {
		t.Fatal(err)
	}
	var want [][]byte // want[i] is the data of entry i+2
	begun := map[string]bool{}
	inside, small := 0, 0
	for round := range 4 {
		for range 150 {
			var ents []*raftpb.Entry
			for range 1 + rng.IntN(3) {
				size := rng.IntN(4 << 10)
				if rng.IntN(10) == 0 {
					size = rng.IntN(200 << 10)
				}
				e := entry(uint64(len(want)+2), 1)
				e.Data = make([]byte, size)
				for i := range e.Data {
					e.Data[i] = byte(rng.Uint32() | 1) // no zeros
				}
				ents, want = append(ents, e), append(want, e.Data)
			}
			hs := &raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(ents[0].GetIndex() - 1)}
			if rng.IntN(5) == 0 { // stays in the wal package's buffer
				if err := d.save(hs, nil); err != nil {
					t.Fatal(err)
				}
			}
			before := d.ahead.done
			if err := d.save(hs, ents); err != nil {
				t.Fatal(err)
			}
			names := segments(t, dir)
			begun[filepath.Base(names[len(names)-1])] = true
			if entryBytes(ents) < zeroMargin/2 {
				if small++; d.ahead.done > before || d.ahead.end <= d.ahead.done {
					inside++
				}
			}
		}
		// A crash leaves the directory as it is; every other start is after one.
		if round%2 == 0 {
			dir = image(t, dir)
		}
		d.mustClose(t)
		d = openTestDir(t, dir)
		r, err := d.load()
		if err != nil {
			t.Fatalf("after %d entries: %v", len(want), err)
		}
		if len(r.entries) != len(want) {
			t.Fatalf("the log has %d entries, not %d", len(r.entries), len(want))
		}
		for i, e := range r.entries {
			if e.GetIndex() != uint64(i+2) || !bytes.Equal(e.Data, want[i]) {
				t.Fatalf("entry %d is another one", i+2)
			}
		}
	}
	if len(begun) < 4 {
		t.Errorf("only %d segments were begun", len(begun))
	}
	if inside < small*9/10 {
		t.Errorf("%d of %d small appends went into zeros", inside, small)
	}
	d.mustClose(t)
}

// What is ahead of the log reads as zeros and is written, so that a sync of the log
// changes no metadata.
func TestZerosAreWritten(t *testing.T) {
	smallSegments(t, 1<<20)
	w := writeLog(t, 20)
	d := openTestDir(t, w.dir)
	if _, err := d.load(); err != nil {
		t.Fatal(err)
	}
	e := entry(21, 1)
	e.Data = testBatch("key", "value")
	if err := d.save(&raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(uint64(20))}, []*raftpb.Entry{e}); err != nil {
		t.Fatal(err)
	}
	d.ahead.done = 8 << 10 // the log itself ends before
	if hole := d.ahead.written(); hole < zeroStretch {
		t.Errorf("the file is written up to %d only", hole)
	}
	if log := used(t, segments(t, w.dir)[0]); len(log) > 8<<10 {
		t.Errorf("%d bytes are no zeros", len(log))
	}
	d.mustClose(t)
}
