// long: what a member may promise rests on the order of its writes, and the
// tests of that order share the directories, the damage and the recorder below.

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"pontoon/internal/wal"
	"pontoon/kv"
)

// smallSegments shortens the log's segments, which are 64 MB and allocated
// ahead. It is for tests that do not run in parallel.
func smallSegments(t *testing.T, size int64) {
	old := segmentBytes
	segmentBytes = size + 4096 // without its head
	t.Cleanup(func() { segmentBytes = old })
}

func openTestDir(t *testing.T, dir string) *diskStore {
	t.Helper()
	d, err := openDataDir(dir, 1, 2, quietLog)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if d.lock != nil {
			d.close()
		}
	})
	return d
}

func (d *diskStore) mustClose(t *testing.T) {
	t.Helper()
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	d.lock = nil
}

func soleFounder() *membership {
	return bootstrapMembership("x", []clusterURL{{1, testURL(1)}})
}

// written is a data directory and what its log says: hash[i] is the state after
// entry i.
type written struct {
	dir  string
	hash []uint64
}

// writeLog founds a member and gives it the entries 2..last, one synced write
// each, with snapshots after the entries in snaps.
func writeLog(t *testing.T, last uint64, snaps ...uint64) written {
	t.Helper()
	w := written{dir: t.TempDir(), hash: make([]uint64, last+1)}
	d := openTestDir(t, w.dir)
	if err := d.bootstrap(1, soleFounder(), false); err != nil {
		t.Fatal(err)
	}
	r, err := d.load()
	if err != nil {
		t.Fatal(err)
	}
	state := r.state
	w.hash[1] = state.Hash()
	for i := uint64(2); i <= last; i++ {
		e := entry(i, 1)
		e.Data = testBatch(fmt.Sprint("key", i%7), strings.Repeat(fmt.Sprint(i, ","), 20))
		hs := &raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(i - 1)}
		if err := d.save(hs, []*raftpb.Entry{e}); err != nil {
			t.Fatal(err)
		}
		applyTo(t, state, e)
		w.hash[i] = state.Hash()
		if slices.Contains(snaps, i) {
			h := snapHeader{Index: i, Term: 1, Members: soleFounder()}
			if err := errors.Join(d.save(&raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(i)}, nil),
				second(d.writeSnapshot(h, state)), d.saveSnapshot(h.raftSnapshot().Metadata)); err != nil {
				t.Fatal(err)
			}
		}
	}
	d.mustClose(t)
	return w
}

func applyTo(t *testing.T, state *kv.State, e *raftpb.Entry) {
	t.Helper()
	var b kv.Batch
	if err := kv.DecodeBatch(e.GetData(), &b); err != nil {
		t.Fatalf("entry %d: %v", e.GetIndex(), err)
	}
	state.Apply(e.GetIndex(), &b, nil)
}

// image copies a data directory as a crash of the process would leave it.
func image(t *testing.T, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "image")
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

// reload starts from dir and compares every state on the way with what was
// written. It returns the last entry; a refusal is an error, a panic a failure.
func (w written) reload(t *testing.T, dir string) (last uint64, err error) {
	t.Helper()
	defer func() {
		if p := recover(); p != nil {
			t.Errorf("load panics: %v", p)
			err = errRefuse
		}
	}()
	d := openTestDir(t, dir)
	defer d.mustClose(t)
	r, err := d.load()
	if err != nil {
		if !errors.Is(err, errRefuse) || !strings.Contains(err.Error(), dir) {
			t.Errorf("the refusal does not say where: %v", err)
		}
		return 0, err
	}
	last = r.state.Applied()
	if got := r.state.Hash(); got != w.hash[last] {
		t.Errorf("the snapshot at %d holds another state", last)
	}
	for _, e := range r.entries {
		if e.GetIndex() != last+1 || e.GetIndex() >= uint64(len(w.hash)) {
			t.Fatalf("entry %d follows %d", e.GetIndex(), last)
		}
		last = e.GetIndex()
		applyTo(t, r.state, e)
		if r.state.Hash() != w.hash[last] {
			t.Fatalf("the state after entry %d is another one", last)
		}
	}
	return last, nil
}

// segments are the log's files, oldest first, without those allocated ahead.
func segments(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "wal", "*.wal"))
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	slices.Sort(names)
	return names
}

// used is the part of a segment before the zeros that were allocated ahead.
func used(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.TrimRight(b, "\x00")
}

func rewrite(t *testing.T, name string, f func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err == nil {
		err = os.WriteFile(name, f(b), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestLockNamesItsHolder(t *testing.T) {
	t.Parallel() // it waits out a predecessor that shuts down
	dir := t.TempDir()
	openTestDir(t, dir)
	_, err := openDataDir(dir, 2, 2, quietLog)
	if !errors.Is(err, errRefuse) || !strings.Contains(err.Error(), fmt.Sprintf("process %d (member 1)", os.Getpid())) || !strings.Contains(err.Error(), dir) {
		t.Fatalf("a second process: %v", err)
	}
}

func TestBootsGrow(t *testing.T) {
	dir := t.TempDir()
	for want := uint64(1); want <= 3; want++ {
		d := openTestDir(t, dir)
		if got, err := d.nextBoot(); err != nil || got != want {
			t.Fatalf("boot %d, %v, want %d", got, err, want)
		}
		// The next one must see it even if this process ends here.
		if b, err := os.ReadFile(filepath.Join(dir, "boots")); err != nil || string(b) != seal(fmt.Sprint(want)) {
			t.Fatalf("boots file: %q %v", b, err)
		}
		d.mustClose(t)
	}
	for _, damage := range []string{"", "x\n", "-1\n", "1", "1 2\n", "99999999999999999999\n", "\x00\x00", seal("x"), strings.Replace(seal("7"), "7", "6", 1), seal("12")[1:]} {
		if err := os.WriteFile(filepath.Join(dir, "boots"), []byte(damage), 0o600); err != nil {
			t.Fatal(err)
		}
		d := openTestDir(t, dir)
		if _, err := d.nextBoot(); !errors.Is(err, errRefuse) || !strings.Contains(err.Error(), "boots") {
			t.Errorf("%q: %v", damage, err)
		}
		d.mustClose(t)
	}
}

// A crash at any step of the first start leaves a directory that starts.
func TestBootstrapInterrupted(t *testing.T) {
	smallSegments(t, 1<<16)
	done := writeLog(t, 1)
	for name, leave := range map[string]func(dir string) error{
		"nothing":  func(dir string) error { return nil },
		"the lock": func(dir string) error { return os.WriteFile(filepath.Join(dir, "LOCK"), []byte("process 1"), 0o600) },
		"half a snapshot": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "snap/0000000000000001.snap.db.tmp"), []byte("x"), 0o600)
		},
		"a snapshot, no log": func(dir string) error {
			return os.CopyFS(filepath.Join(dir, "snap"), os.DirFS(filepath.Join(done.dir, "snap")))
		},
		"a damaged snapshot": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "snap/0000000000000001.snap.db"), []byte("x"), 0o600)
		},
		"wal.new": func(dir string) error {
			return os.CopyFS(filepath.Join(dir, "wal.new"), os.DirFS(filepath.Join(done.dir, "wal")))
		},
		"an empty wal.new": func(dir string) error { return os.Mkdir(filepath.Join(dir, "wal.new"), 0o700) },
		"wal.new.tmp": func(dir string) error {
			return os.CopyFS(filepath.Join(dir, "wal.new.tmp"), os.DirFS(filepath.Join(done.dir, "wal")))
		},
		"snapshot and wal.new": func(dir string) error {
			return errors.Join(os.CopyFS(filepath.Join(dir, "snap"), os.DirFS(filepath.Join(done.dir, "snap"))),
				os.CopyFS(filepath.Join(dir, "wal.new"), os.DirFS(filepath.Join(done.dir, "wal"))))
		},
		"all but boots": func(dir string) error { return os.CopyFS(dir, os.DirFS(done.dir)) },
	} {
		t.Run(name, func(t *testing.T) {
			c := &cluster{t: t, dir: t.TempDir(), nodes: map[uint64]*testNode{}, net: newMemnet(), logger: quietLog, timeout: 20 * time.Second,
				table: []clusterURL{{1, testURL(1)}}}
			dir := c.config(1).DataDir
			if name != "all but boots" {
				if err := os.MkdirAll(filepath.Join(dir, "snap"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			// CopyFS does not overwrite, so an empty snap would be in its way.
			if strings.Contains(name, "snapshot, no") || strings.Contains(name, "snapshot and") {
				if err := os.Remove(filepath.Join(dir, "snap")); err != nil {
					t.Fatal(err)
				}
			}
			if err := leave(dir); err != nil {
				t.Fatal(err)
			}
			c.start(1)
			defer c.stop(1)
			c.leader().mustPut("k", "v")
			if left, err := filepath.Glob(filepath.Join(dir, "*.new*")); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v %v", left, err)
			}
		})
	}
}

func TestLeftoversAreCleared(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "wal.new"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "snap"), 0o700); err != nil {
		t.Fatal(err)
	}
	keep := []string{"snap/0000000000000005.snap.db", "other"}
	for _, name := range append([]string{"snap/tmp123", "snap/0000000000000007.snap.db.tmp", "boots.tmp", "removed.tmp", "wal.new/x"}, keep...) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	openTestDir(t, dir)
	var left []string
	if err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(dir, path); err == nil && !e.IsDir() && rel != "LOCK" {
			left = append(left, rel)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(left)
	slices.Sort(keep)
	if !slices.Equal(left, keep) {
		t.Fatalf("left: %v, want %v", left, keep)
	}
}

func TestRemovedMemberNeverStarts(t *testing.T) {
	smallSegments(t, 1<<16)
	w := writeLog(t, 3)
	d := openTestDir(t, w.dir)
	if err := d.markRemoved("member 1 was removed"); err != nil {
		t.Fatal(err)
	}
	d.mustClose(t)
	for range 2 {
		if _, err := openDataDir(w.dir, 1, 2, quietLog); !errors.Is(err, errRefuse) || !strings.Contains(err.Error(), "was removed") {
			t.Fatalf("a removed member: %v", err)
		}
	}
	// A file that cannot be read is no leave to start.
	path := filepath.Join(w.dir, "removed")
	if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := openDataDir(w.dir, 1, 2, quietLog); !errors.Is(err, errRefuse) || !strings.Contains(err.Error(), "may have been removed") {
		t.Fatalf("a file that cannot be read: %v", err)
	}
}

// The newest snapshot is damaged: the one before and the log make the same state.
func TestDamagedSnapshotFallsBack(t *testing.T) {
	smallSegments(t, 1<<16)
	w := writeLog(t, 60, 20, 40)
	file := func(dir string, i int) string { return filepath.Join(dir, "snap", fmt.Sprintf("%016x.snap.db", i)) }
	for name, damage := range map[string]func([]byte) []byte{
		"cut":     func(b []byte) []byte { return b[:len(b)/2] },
		"empty":   func(b []byte) []byte { return nil },
		"flipped": func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"longer":  func(b []byte) []byte { return append(b, 0) },
	} {
		dir := image(t, w.dir)
		rewrite(t, file(dir, 40), damage)
		if last, err := w.reload(t, dir); err != nil || last != 60 {
			t.Errorf("%s: starts with entry %d, %v", name, last, err)
		}
		rewrite(t, file(dir, 20), damage)
		if last, err := w.reload(t, dir); err != nil || last != 60 {
			t.Errorf("%s twice: starts with entry %d, %v", name, last, err) // there is one more, from the founding
		}
		rewrite(t, file(dir, 1), damage)
		if _, err := w.reload(t, dir); err == nil || !strings.Contains(err.Error(), file(dir, 40)) {
			t.Errorf("%s, all of them: %v", name, err)
		}
	}
	dir := image(t, w.dir)
	if err := os.Remove(file(dir, 40)); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file(dir, 20), file(dir, 40)); err != nil { // whole, and not what the log means
		t.Fatal(err)
	}
	if last, err := w.reload(t, dir); err != nil || last != 60 {
		t.Errorf("exchanged: %d, %v", last, err)
	}
}

// Whatever a flipped bit does, it never changes what an entry says, never
// panics, and a refusal names the directory. What came before it is there.
func TestFlippedBits(t *testing.T) {
	smallSegments(t, 1<<16)
	const last = 40
	w := writeLog(t, last, 20)
	seg := segments(t, w.dir)[0]
	size := len(used(t, seg))
	dir := image(t, w.dir)
	seg = segments(t, dir)[0]
	whole, err := os.ReadFile(seg)
	if err != nil {
		t.Fatal(err)
	}
	var silent []int
	for at := 0; at < size; at += 13 {
		broken := slices.Clone(whole)
		broken[at] ^= 1 << (at % 8)
		if err := os.WriteFile(seg, broken, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := w.reload(t, dir); err == nil && got < last {
			silent = append(silent, at)
		}
	}
	// All of this was synced, and nothing of it may go without a word.
	if len(silent) > 0 {
		t.Errorf("%d of %d flipped bits lost acknowledged entries silently, at offsets %v of %d", len(silent), size/13, silent, size)
	}
}

// The log ends anywhere. Where the mark says that more was synced it is refused;
// after a power loss that took the mark too, all that precedes the cut is there.
func TestCutLog(t *testing.T) {
	smallSegments(t, 1<<13)
	w := writeLog(t, 40, 20)
	whole := used(t, segments(t, w.dir)[0])
	before, starts := uint64(41), 0
	for at := len(whole); at > 0; at -= 67 {
		dir := image(t, w.dir)
		cut := func([]byte) []byte { return whole[:at] }
		rewrite(t, segments(t, dir)[0], cut)
		if last, err := w.reload(t, dir); err == nil && last < 40 {
			t.Fatalf("a cut at %d loses synced entries from %d on without a word", at, last+1)
		}
		dir = image(t, w.dir)
		rewrite(t, segments(t, dir)[0], cut)
		if err := os.Remove(filepath.Join(dir, "synced")); err != nil {
			t.Fatal(err)
		}
		last, err := w.reload(t, dir)
		switch {
		case err != nil:
			continue
		case last > before:
			t.Fatalf("a cut at %d leaves %d entries, a later one left %d", at, last, before)
		case last+2 < before && before <= 40:
			t.Fatalf("a cut at %d loses entries %d to %d at once", at, last+1, before)
		case last < before:
			starts++
		}
		before = last
	}
	if starts < 10 {
		t.Fatalf("only %d cuts could be started from", starts)
	}
}

// A write that a crash cut short is repaired, and the log goes on.
func TestTornTailIsRepaired(t *testing.T) {
	smallSegments(t, 1<<16)
	w := writeLog(t, 30)
	d := openTestDir(t, w.dir)
	if _, err := d.load(); err != nil {
		t.Fatal(err)
	}
	seg := segments(t, w.dir)[0]
	start := len(used(t, seg))
	mark, err := os.ReadFile(filepath.Join(w.dir, "synced")) // it is written after the sync, which a torn write never reached
	if err != nil {
		t.Fatal(err)
	}
	torn := entry(31, 1)
	torn.Data = testBatch("key", strings.Repeat("torn", 1000))
	if err := d.save(nil, []*raftpb.Entry{torn}); err != nil {
		t.Fatal(err)
	}
	d.mustClose(t)
	for name, tear := range map[string]func([]byte) []byte{
		"a sector that was not written":  func(b []byte) []byte { clear(b[(start/512+2)*512 : (start/512+3)*512]); return b },
		"only the beginning was written": func(b []byte) []byte { clear(b[(start/512+1)*512:]); return b },
		"the file ends within":           func(b []byte) []byte { return b[:start+100] },
		"the file ends in the length":    func(b []byte) []byte { return b[:start+11] },
	} {
		dir := image(t, w.dir)
		rewrite(t, segments(t, dir)[0], tear)
		if last, err := w.reload(t, image(t, dir)); err == nil {
			t.Errorf("%s, but it had been synced: starts with entry %d", name, last)
		}
		rewrite(t, filepath.Join(dir, "synced"), func([]byte) []byte { return mark })
		for range 2 { // again after the repair
			if last, err := w.reload(t, dir); err != nil || last != 30 {
				t.Errorf("%s: %d entries, %v", name, last, err)
			}
		}
		d := openTestDir(t, dir)
		if _, err := d.load(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		e := entry(31, 1)
		if err := d.save(&raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(uint64(31))}, []*raftpb.Entry{e}); err != nil {
			t.Fatalf("%s: write after the repair: %v", name, err)
		}
		d.mustClose(t)
		d = openTestDir(t, dir)
		if r, err := d.load(); err != nil || len(r.entries) != 30 || !bytes.Equal(r.entries[29].GetData(), e.GetData()) {
			t.Errorf("%s: after the next write: %v", name, err)
		}
		d.mustClose(t)
	}
}

func TestLogThatMissesEntriesIsRefused(t *testing.T) {
	smallSegments(t, 1<<16)
	refused := func(name string, dir string) {
		t.Helper()
		if last, err := (written{}).reload(t, dir); err == nil {
			t.Errorf("%s: starts with entry %d", name, last)
		}
	}
	add := func(commit uint64, ents ...*raftpb.Entry) string {
		w := writeLog(t, 5)
		d := openTestDir(t, w.dir)
		if _, err := d.load(); err != nil {
			t.Fatal(err)
		}
		if err := d.save(&raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(commit)}, ents); err != nil {
			t.Fatal(err)
		}
		d.mustClose(t)
		return w.dir
	}
	refused("commit 7 of 5 entries", add(7))
	refused("a gap", add(5, entry(8, 1)))

	smallSegments(t, 4096) // several
	w := writeLog(t, 100, 40, 80)
	for i := range segments(t, w.dir) {
		dir := image(t, w.dir)
		names := segments(t, dir)
		if err := os.Remove(names[i]); err != nil {
			t.Fatal(err)
		}
		needed := 0 // the segment that holds the newest snapshot's successor
		for j, n := range names {
			var seq, first uint64
			if _, err := fmt.Sscanf(filepath.Base(n), "%016x-%016x.wal", &seq, &first); err == nil && first <= 80 {
				needed = j
			}
		}
		last, err := w.reload(t, dir)
		switch {
		case err == nil && i >= needed:
			t.Errorf("without segment %d of %d: starts with entry %d of 100", i, len(names), last)
		case err == nil && last != 100:
			t.Errorf("without segment %d of %d, which is not needed: %d entries", i, len(names), last)
		}
	}
}

// Where the log is cut between two segments nothing looks torn.
func TestLogWithoutMetadataIsRefused(t *testing.T) {
	dir := t.TempDir()
	smallSegments(t, 1<<16)
	w, err := wal.Create(filepath.Join(dir, "wal"), []byte("of another program"), 0, wal.Options{SegmentBytes: segmentBytes})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	d := openTestDir(t, dir)
	if _, err := d.load(); !errors.Is(err, errRefuse) || !strings.Contains(err.Error(), "not written by this program") {
		t.Fatalf("another program's log: %v", err)
	}
}

// installed writes what a follower writes that had uncommitted entries of an
// old term, 2 to 20, when it was sent a snapshot at 10 of a later one.
func installed(t *testing.T, dir string, tailTerm uint64, look func(*diskStore)) {
	t.Helper()
	d := openTestDir(t, dir)
	if err := d.bootstrap(1, soleFounder(), false); err != nil {
		t.Fatal(err)
	}
	if _, err := d.load(); err != nil {
		t.Fatal(err)
	}
	var stale []*raftpb.Entry
	for i := uint64(2); i <= 20; i++ {
		e := entry(i, tailTerm)
		e.Data = testBatch("stale", fmt.Sprint(i))
		stale = append(stale, e)
	}
	state := kv.NewState()
	for i := uint64(2); i <= 10; i++ {
		applyTo(t, state, entry(i, 3))
	}
	h := snapHeader{Index: 10, Term: 3, Members: soleFounder()}
	if err := errors.Join(
		d.save(&raftpb.HardState{Term: new(tailTerm), Vote: new(uint64(1)), Commit: new(uint64(1))}, stale),
		second(d.writeSnapshot(h, state)),
		d.install(h.raftSnapshot().Metadata, &raftpb.HardState{Term: new(uint64(5)), Vote: new(uint64(0)), Commit: new(uint64(10))}, nil)); err != nil {
		t.Fatal(err)
	}
	if look != nil {
		look(d)
	}
	d.mustClose(t)
}

// An installed snapshot replaces the whole log. What the log held beyond it must
// not be there again after a restart: with entries of a dead term at its end,
// this member would vote for a candidate that misses what the snapshot holds.
func TestInstalledSnapshotCutsTheLog(t *testing.T) {
	smallSegments(t, 1<<16)
	for _, tailTerm := range []uint64{2, 4} { // below the snapshot's and above it
		dir := t.TempDir()
		installed(t, dir, tailTerm, nil)
		d := openTestDir(t, dir)
		r, err := d.load()
		if err != nil {
			t.Fatal(err)
		}
		if r.snap.Index != 10 || len(r.entries) > 0 {
			t.Errorf("after snapshot %d of term %d the log begins with entry %d of term %d", r.snap.Index, r.snap.Term, r.entries[0].GetIndex(), r.entries[0].GetTerm())
		}
		d.mustClose(t)
	}
}

// The same, and then the installed file is damaged. The log before it is no way
// around: its entries never were committed.
func TestNoWayAroundAnInstalledSnapshot(t *testing.T) {
	smallSegments(t, 1<<16)
	dir := t.TempDir()
	installed(t, dir, 2, nil)
	d := openTestDir(t, dir)
	rewrite(t, d.snapPath(10), func(b []byte) []byte { return b[:len(b)/2] })
	if r, err := d.load(); err == nil {
		t.Errorf("starts from snapshot %d, commit %d, with %q as a committed entry", r.snap.Index, r.hard.GetCommit(), r.entries[0].GetData())
	} else if !errors.Is(err, errRefuse) {
		t.Error(err)
	}
}

// The same with a real cluster: an old leader that is cut off collects entries
// that never commit, the others go on and compact, it gets their snapshot and
// restarts.
func TestOldLeaderRestartsFromInstalledSnapshot(t *testing.T) {
	smallSegments(t, 1<<20)
	c := newCluster(t, 3, small)
	old := c.leader()
	old.mustPut("k", "v")
	c.isolate(old.id, true)
	err := old.node.do(c.ctx(), func() { // at once, while it still leads
		for i := range 150 {
			if err := old.node.raw.Propose(testBatch("lost", fmt.Sprint(i))); err != nil {
				t.Errorf("entry %d: %v", i, err)
			}
		}
		old.node.mail.nudge()
	})
	if err != nil {
		t.Fatal(err)
	}
	var next *testNode
	c.wait("another leader", func() bool {
		for _, n := range c.nodes {
			if l := c.nodes[n.store.leader()]; n != old && l != nil && l != old {
				next = l
			}
		}
		return next != nil
	})
	for i := range 60 {
		next.mustPut(fmt.Sprint("k", i), strings.Repeat("x", 200))
	}
	c.wait("compaction", func() bool {
		first, err := next.node.mem.FirstIndex()
		return err == nil && first > 10
	})
	ours, theirs := uint64(0), next.node.progress.last.Load()
	if err := old.node.do(c.ctx(), func() { ours = old.node.stable }); err != nil {
		t.Fatal(err)
	}
	if ours <= theirs {
		t.Fatalf("the old leader has %d entries, the others %d: the test needs it the other way round", ours, theirs)
	}
	// Let it have the snapshot and not one entry after it.
	c.net.dropIf(func(m *raftpb.Message) bool {
		return m.GetType() == raftpb.MsgApp && m.GetTo() == old.id && len(m.GetEntries()) > 0
	})
	c.isolate(old.id, false)
	c.wait("the snapshot", func() bool { return old.node.progress.snapshot.Load() > 10 })
	c.stop(old.id)
	d := openTestDir(t, c.config(old.id).DataDir)
	r, err := d.load()
	if err != nil {
		t.Fatal(err)
	}
	d.mustClose(t)
	if n := len(r.entries); n > 0 {
		t.Errorf("after snapshot %d of term %d come %d entries, the first of term %d", r.snap.Index, r.snap.Term, n, r.entries[0].GetTerm())
	}
	c.net.dropIf(nil)
	c.start(old.id)
	c.check()
}

// A snapshot file that the log does not vouch for, because a crash came between
// the two or because raft had no use for it, is no snapshot to fall back to: it
// must not push one out that is.
func TestUnrecordedSnapshotDoesNotCount(t *testing.T) {
	smallSegments(t, 4096)
	w := writeLog(t, 100, 40)
	d := openTestDir(t, w.dir)
	r, err := d.load()
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range r.entries {
		applyTo(t, r.state, e)
		if i == 20 { // written, and the process ends before it is recorded
			if _, err := d.writeSnapshot(snapHeader{Index: e.GetIndex(), Term: 1, Members: soleFounder()}, r.state); err != nil {
				t.Fatal(err)
			}
		}
	}
	d.mustClose(t)
	d = openTestDir(t, w.dir)
	if _, err := d.load(); err != nil {
		t.Fatal(err)
	}
	h := snapHeader{Index: 100, Term: 1, Members: soleFounder()}
	if err := errors.Join(d.save(&raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(uint64(100))}, nil),
		second(d.writeSnapshot(h, r.state)), d.saveSnapshot(h.raftSnapshot().Metadata)); err != nil {
		t.Fatal(err)
	}
	if oldest := d.oldestKept(); oldest > 0 {
		if err := errors.Join(d.release(oldest), d.purge(oldest)); err != nil {
			t.Fatal(err)
		}
	}
	rewrite(t, d.snapPath(100), func(b []byte) []byte { return b[:10] })
	d.mustClose(t)
	if last, err := w.reload(t, w.dir); err != nil || last != 100 {
		t.Errorf("%d snapshots are kept, the newest is damaged, and the member does not start: %d, %v", d.keep, last, err)
	}
}

// The same for one that was found damaged: it must not count as one of two.
func TestDamagedSnapshotDoesNotCount(t *testing.T) {
	smallSegments(t, 4096)
	w := writeLog(t, 100, 40, 60)
	d := openTestDir(t, w.dir)
	rewrite(t, d.snapPath(60), func(b []byte) []byte { return b[:10] })
	r, err := d.load()
	if err != nil || r.snap.Index != 40 {
		t.Fatal(r.snap.Index, err)
	}
	for _, e := range r.entries {
		applyTo(t, r.state, e)
	}
	h := snapHeader{Index: 100, Term: 1, Members: soleFounder()}
	if err := errors.Join(d.save(&raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(uint64(100))}, nil),
		second(d.writeSnapshot(h, r.state)), d.saveSnapshot(h.raftSnapshot().Metadata)); err != nil {
		t.Fatal(err)
	}
	if oldest := d.oldestKept(); oldest > 40 {
		t.Errorf("the snapshots from %d on are kept: one of the %d is damaged", oldest, d.keep)
	}
}

// Once the directory is closed another process may hold its LOCK and be reading:
// a purge that comes late leaves everything where it is.
func TestPurgeAfterCloseTouchesNothing(t *testing.T) {
	smallSegments(t, 4096)
	w := writeLog(t, 100, 40, 80)
	d := openTestDir(t, w.dir)
	if _, err := d.load(); err != nil {
		t.Fatal(err)
	}
	d.mustClose(t)
	before := segments(t, w.dir)
	if err := d.purge(80); err != nil {
		t.Fatal(err)
	}
	files, err := d.snapshotFiles()
	if after := segments(t, w.dir); err != nil || !slices.Equal(before, after) || !slices.Contains(files, 40) {
		t.Errorf("of %d segments %d are left, of the snapshots %v, %v", len(before), len(after), files, err)
	}
}

// What an installed snapshot counts by is in the file, not in a buffer.
func TestInstallReachesTheFile(t *testing.T) {
	smallSegments(t, 1<<16)
	dir := t.TempDir()
	installed(t, dir, 2, func(d *diskStore) {
		got, err := wal.Read(filepath.Join(image(t, dir), "wal"), wal.Visitor{})
		if err != nil || got.State.Commit != 10 || got.State.Term != 5 || got.Last != 10 {
			t.Fatalf("the file says %+v, %v", got, err)
		}
	})
}

// install replaces the log by two renames. A crash at any point leaves the old
// log or the new one.
func TestInstallInterrupted(t *testing.T) {
	smallSegments(t, 1<<16)
	before, after := t.TempDir(), t.TempDir()
	installed(t, after, 2, nil)
	d := openTestDir(t, before)
	if err := d.bootstrap(1, soleFounder(), false); err != nil {
		t.Fatal(err)
	}
	if _, err := d.load(); err != nil {
		t.Fatal(err)
	}
	d.mustClose(t)
	for name, x := range map[string]struct {
		wal, fresh, old bool
		want            uint64
	}{
		"being built":            {wal: true, fresh: true, want: 1},
		"between the renames":    {fresh: true, old: true, want: 10},
		"after the second":       {wal: true, old: true, want: 10},
		"with wal.old half gone": {wal: true, old: true, want: 10},
	} {
		dir := filepath.Join(t.TempDir(), "x")
		steps := []error{os.CopyFS(filepath.Join(dir, "snap"), os.DirFS(filepath.Join(after, "snap")))}
		newLog, oldLog := os.DirFS(filepath.Join(after, "wal")), os.DirFS(filepath.Join(before, "wal"))
		if x.wal && x.want == 10 {
			steps = append(steps, os.CopyFS(filepath.Join(dir, "wal"), newLog))
		} else if x.wal {
			steps = append(steps, os.CopyFS(filepath.Join(dir, "wal"), oldLog))
		}
		if x.fresh {
			steps = append(steps, os.CopyFS(filepath.Join(dir, "wal.new"), newLog))
		}
		if x.old {
			steps = append(steps, os.CopyFS(filepath.Join(dir, "wal.old"), oldLog))
		}
		if strings.Contains(name, "half") {
			steps = append(steps, os.RemoveAll(filepath.Join(dir, "wal.old")), os.Mkdir(filepath.Join(dir, "wal.old"), 0o700))
		}
		if err := errors.Join(steps...); err != nil {
			t.Fatal(err)
		}
		d := openTestDir(t, dir)
		r, err := d.load()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if r.snap.Index != x.want {
			t.Errorf("%s: starts from snapshot %d, want %d", name, r.snap.Index, x.want)
		}
		d.mustClose(t)
		for _, left := range []string{"wal.new", "wal.old"} {
			if _, err := os.Stat(filepath.Join(dir, left)); err == nil {
				t.Errorf("%s: %s is left", name, left)
			}
		}
	}
}

// recorder stands between a node and its disk and remembers what was saved. It
// fails the test when the node does a thing before the one it rests on.
type recorder struct {
	*diskStore
	t  *testing.T
	id uint64
	mu struct {
		sync.Mutex
		hard     *raftpb.HardState // as of the last save that returned
		last     uint64            // last entry of the log on disk
		recorded map[uint64]bool
		installs int
		releases int
		answers  int
	}
	fail func(op string) error // nil: never
	late bool                  // fail after the write instead of before it
}

func newRecorder(t *testing.T, d *diskStore) *recorder {
	t.Helper()
	r := &recorder{diskStore: d, t: t}
	r.mu.hard, r.mu.recorded = &raftpb.HardState{}, map[uint64]bool{}
	return r
}

// trip runs write, with the failure that the test wants.
func (r *recorder) trip(op string, write func() error) error {
	if r.fail == nil {
		return write()
	}
	err := r.fail(op)
	if err == nil || r.late {
		err = errors.Join(write(), err)
	}
	return err
}

func (r *recorder) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	if err := r.trip("save", func() error { return r.diskStore.save(hs, ents) }); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if hs.GetTerm() > 0 {
		r.mu.hard = hs
	}
	if len(ents) > 0 {
		r.mu.last = ents[len(ents)-1].GetIndex()
	}
	return nil
}

func (r *recorder) saveSnapshot(m *raftpb.SnapshotMetadata) error {
	index := m.GetIndex()
	if h, err := r.verifySnapshot(index); err != nil || h.Term != m.GetTerm() || !sameConf(h.Members.confState(), m.GetConfState()) {
		r.t.Errorf("member %d: snapshot %d is recorded, and its file says %+v, %v", r.id, index, h, err)
	}
	if err := r.trip("saveSnapshot", func() error { return r.diskStore.saveSnapshot(m) }); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.recorded[index] = true
	return nil
}

func (r *recorder) install(m *raftpb.SnapshotMetadata, hs *raftpb.HardState, ents []*raftpb.Entry) error {
	index := m.GetIndex()
	if h, err := r.verifySnapshot(index); err != nil || h.Term != m.GetTerm() || !sameConf(h.Members.confState(), m.GetConfState()) {
		r.t.Errorf("member %d: snapshot %d is installed, and its file says %+v, %v", r.id, index, h, err)
	}
	if hs.GetCommit() < index {
		r.t.Errorf("member %d: snapshot %d is installed with commit %d", r.id, index, hs.GetCommit())
	}
	if err := r.trip("install", func() error { return r.diskStore.install(m, hs, ents) }); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.hard, r.mu.last = hs, index+uint64(len(ents))
	r.mu.recorded[index] = true
	r.mu.installs++
	return nil
}

func (r *recorder) release(index uint64) error {
	files, err := r.snapshotFiles()
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.mu.releases++
	kept := 0
	for _, i := range files {
		if i >= index && r.mu.recorded[i] {
			kept++
		}
	}
	if kept < r.keep && files[0] < index {
		r.t.Errorf("member %d: releases the log before %d with only %d recorded snapshots from there on, of %v", r.id, index, kept, files)
	}
	if files[0] >= index {
		r.t.Errorf("member %d: the snapshots before %d were purged before their log was released", r.id, index)
	}
	r.mu.Unlock()
	return r.trip("release", func() error { return r.diskStore.release(index) })
}

// sees checks a message that leaves this member against what it has saved.
func (r *recorder) sees(m *raftpb.Message) {
	r.mu.Lock()
	defer r.mu.Unlock()
	saved := r.mu.hard
	switch m.GetType() {
	case raftpb.MsgAppResp:
		r.mu.answers++
		if !m.GetReject() && m.GetIndex() > r.mu.last {
			r.t.Errorf("member %d acknowledges entry %d, and its disk holds %d", r.id, m.GetIndex(), r.mu.last)
		}
		if m.GetTerm() > saved.GetTerm() {
			r.t.Errorf("member %d acknowledges in term %d, and its disk says %d", r.id, m.GetTerm(), saved.GetTerm())
		}
	case raftpb.MsgVoteResp:
		r.mu.answers++
		if m.GetTerm() > saved.GetTerm() || !m.GetReject() && (m.GetTerm() != saved.GetTerm() || m.GetTo() != saved.GetVote()) {
			r.t.Errorf("member %d votes for %d in term %d, and its disk says %v", r.id, m.GetTo(), m.GetTerm(), saved)
		}
	case raftpb.MsgPreVoteResp:
		r.mu.answers++
		if m.GetReject() && m.GetTerm() > saved.GetTerm() {
			r.t.Errorf("member %d refuses a vote in term %d, and its disk says %v", r.id, m.GetTerm(), saved)
		}
	}
}

// record restarts every member with a recorder.
func (c *cluster) record() map[uint64]*recorder {
	c.t.Helper()
	out := map[uint64]*recorder{}
	for id := range uint64(len(c.table)) {
		id++
		c.stop(id)
		r, err := func() (*recovered, error) { // what is there already
			d := openTestDir(c.t, c.config(id).DataDir)
			defer d.mustClose(c.t)
			return d.load()
		}()
		if err != nil {
			c.t.Fatal(err)
		}
		c.startWith(id, func(d *diskStore) logStore {
			rec := newRecorder(c.t, d)
			rec.id, rec.mu.hard, rec.mu.last = id, r.hard, r.snap.Index+uint64(len(r.entries))
			files, err := d.snapshotFiles()
			if err != nil {
				c.t.Fatal(err)
			}
			for _, i := range files {
				rec.mu.recorded[i] = true
			}
			out[id] = rec
			return rec
		})
	}
	return out
}

// Nothing that promises leaves a member before what it promises is on its disk:
// through elections, transfers, appends, local and installed snapshots.
func TestOrderOfDurability(t *testing.T) {
	smallSegments(t, 1<<20)
	c := newCluster(t, 3, small)
	recs := c.record()
	c.net.dropIf(func(m *raftpb.Message) bool {
		if r := recs[m.GetFrom()]; r != nil { // an empty message asks for a connection
			r.sees(m) // on the sender's loop, at the moment of sending
		}
		return false
	})
	c.leader()
	for round := range 3 {
		l, f := c.leader(), c.follower()
		c.isolate(f.id, true)
		l.fill(fmt.Sprint(round, "-"), 1200)
		c.wait("compaction", func() bool {
			first, err := l.node.mem.FirstIndex()
			return err == nil && first > f.store.applied.At()+1
		})
		c.isolate(f.id, false)
		<-f.store.applied.Wait(l.store.applied.At())
		if err := c.leader().store.transferLeader(c.ctx(), f.id); err != nil && !errors.Is(err, errTransferTimeout) && !errors.Is(err, errTransferRefused) {
			t.Fatal(err)
		}
	}
	c.check()
	installs, releases, answers := 0, 0, 0
	for _, r := range recs {
		r.mu.Lock()
		installs, releases, answers = installs+r.mu.installs, releases+r.mu.releases, answers+r.mu.answers
		r.mu.Unlock()
	}
	if installs == 0 || releases == 0 || answers < 10 {
		t.Fatalf("the test saw %d installs, %d releases and %d answers: it proved nothing", installs, releases, answers)
	}
}

// A write that fails ends the loop at once. Nobody who waits is told that his
// write happened, and who is told that it did not is told the truth.
func TestFailingDisk(t *testing.T) {
	broken := fmt.Errorf("%w: injected", errDurability)
	for _, op := range []string{"save", "saveSnapshot", "release"} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s late=%v", op, late), func(t *testing.T) {
				smallSegments(t, 1<<20)
				c := newCluster(t, 1, small)
				c.leader().mustPut("before", "x")
				c.stop(1)
				var armed atomic.Bool
				calls := 0
				n := c.startWith(1, func(d *diskStore) logStore {
					r := newRecorder(t, d)
					r.late = late
					r.mu.last = 1 << 62 // this test is not about the order
					for i := range uint64(10000) {
						r.mu.recorded[i] = true
					}
					r.fail = func(o string) error {
						if calls++; armed.Load() && o == op && (op != "save" || calls > 20) {
							return broken
						}
						return nil
					}
					return r
				})
				c.leader().mustPut("healthy", "x")
				armed.Store(true)
				type answer struct {
					key string
					err error
				}
				answers := make(chan answer, 1<<16)
				var wg sync.WaitGroup
				for w := range 8 {
					wg.Go(func() {
						for i := 0; ; i++ {
							key := fmt.Sprint(w, "/", i)
							_, err := n.store.put(c.ctx(), key, []byte("v"))
							answers <- answer{key, err}
							if err != nil {
								return
							}
						}
					})
				}
				n.ends()
				ended := time.Now()
				wg.Wait()
				close(answers)
				if took := time.Since(ended); took > time.Second {
					t.Errorf("those who wait were answered after %v", took)
				}
				if err := c.stop(1); !errors.Is(err, errDurability) {
					t.Fatalf("the loop ended with %v", err)
				}
				n = c.start(1)
				c.leader()
				n.mustGet("healthy", "x")
				for a := range answers {
					_, _, err := n.store.get(c.ctx(), a.key, readOptions{})
					switch {
					case a.err == nil && err != nil:
						t.Errorf("%s was acknowledged and is gone: %v", a.key, err)
					case a.err != nil && !errors.Is(a.err, errCommitTimeout) && err == nil:
						t.Errorf("%s was refused (%v) and is there", a.key, a.err)
					}
				}
			})
		}
	}
}

// One member's disk fails under load: the others go on, and it comes back.
func TestFailingDiskOfOneMember(t *testing.T) {
	smallSegments(t, 1<<20)
	c := newCluster(t, 3, nil)
	for _, leads := range []bool{true, false} {
		n := c.follower()
		if leads {
			n = c.leader()
		}
		c.stop(n.id)
		var armed atomic.Bool
		n = c.startWith(n.id, func(d *diskStore) logStore { return &failingStore{d, &armed} })
		for leads && c.leader() != n {
			if err := c.leader().store.transferLeader(c.ctx(), n.id); err != nil && !errors.Is(err, errTransferTimeout) && !errors.Is(err, errTransferRefused) {
				t.Fatal(err)
			}
		}
		c.leader()
		armed.Store(true)
		key := fmt.Sprint("at the failure ", leads)
		put := make(chan error, 1)
		go func() {
			_, err := n.store.put(c.ctx(), key, []byte("v"))
			put <- err
		}()
		n.ends()
		err := <-put
		if cerr := c.stop(n.id); !errors.Is(cerr, errDurability) {
			t.Fatalf("ended with %v", cerr)
		}
		c.leader().mustPut("after", fmt.Sprint(leads))
		c.start(n.id)
		c.check()
		if _, _, gerr := c.leader().store.get(c.ctx(), key, readOptions{}); err == nil && gerr != nil {
			t.Fatalf("acknowledged and gone: %v", gerr)
		} else if err != nil && !errors.Is(err, errCommitTimeout) && gerr == nil {
			t.Fatalf("refused with %v and there", err)
		}
	}
}

// failingStore writes nothing more once it is armed.
type failingStore struct {
	*diskStore
	armed *atomic.Bool
}

func (f *failingStore) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	if f.armed.Load() && len(ents) > 0 {
		return fmt.Errorf("%w: injected", errDurability)
	}
	return f.diskStore.save(hs, ents)
}

func TestSnapshotWriteFailureEndsTheNode(t *testing.T) {
	smallSegments(t, 1<<20)
	c := newCluster(t, 1, small)
	n := c.leader()
	n.mustPut("k", "v")
	if err := os.Rename(n.disk.snapDir(), n.disk.snapDir()+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.disk.snapDir(), []byte("no directory"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		if _, err := n.store.put(c.ctx(), fmt.Sprint(i), []byte("v")); err != nil {
			break
		}
		if i > 5000 {
			t.Fatal("no snapshot was tried")
		}
	}
	n.ends()
	if err := c.stop(1); !errors.Is(err, errDurability) || !strings.Contains(err.Error(), "write snapshot") {
		t.Fatalf("ended with %v", err)
	}
	if err := errors.Join(os.Remove(n.disk.snapDir()), os.Rename(n.disk.snapDir()+".away", n.disk.snapDir())); err != nil {
		t.Fatal(err)
	}
	c.start(1)
	c.leader().mustGet("k", "v")
}

// After many snapshots two are left, with the log from the older one on and no
// more, and the older one is enough to start from.
func TestPurge(t *testing.T) {
	smallSegments(t, 16<<10)
	c := newCluster(t, 1, small)
	n := c.leader()
	n.fill("k", 4000)
	n.mustPut("last", "x")
	want := n.stateHash()
	var files []uint64
	c.wait("two snapshots, and one segment that begins at or before the older one", func() bool {
		var err error
		if files, err = n.disk.snapshotFiles(); err != nil || len(files) != n.cfg.KeepSnapshots || files[0] < 100 {
			return false
		}
		before := 0
		for _, s := range segments(t, n.cfg.DataDir) {
			var seq, first uint64
			if _, err := fmt.Sscanf(filepath.Base(s), "%016x-%016x.wal", &seq, &first); err != nil {
				t.Fatal(err)
			}
			if first <= files[0]+1 {
				before++
			}
		}
		return before == 1
	})
	c.stop(1)
	for _, f := range files[1:] {
		rewrite(t, n.disk.snapPath(f), func(b []byte) []byte { return b[:len(b)-1] })
	}
	n = c.start(1)
	c.leader().mustGet("last", "x")
	if got := n.stateHash(); got != want {
		t.Error("the state from the older snapshot is another one")
	}
}

// A purged snapshot becomes the file of the next one, which may be shorter.
func TestPurgedSnapshotIsWrittenOver(t *testing.T) {
	d := openTestDir(t, t.TempDir())
	state := kv.NewState()
	write := func(index uint64, state *kv.State) {
		t.Helper()
		e := entry(index, 1)
		e.Data = testBatch("key", "value")
		applyTo(t, state, e)
		if _, err := d.writeSnapshot(snapHeader{Index: index, Term: 1, Members: soleFounder()}, state); err != nil {
			t.Fatal(err)
		}
	}
	long := kv.NewState()
	e := entry(1, 1)
	e.Data = testBatch("long", strings.Repeat("x", 10_000))
	applyTo(t, long, e)
	write(2, long)
	before, err := os.Stat(d.snapPath(2))
	if err != nil {
		t.Fatal(err)
	}
	write(3, state)
	if err := d.purge(3); err != nil {
		t.Fatal(err)
	}
	write(4, state)
	after, err := os.Stat(d.snapPath(4))
	if err != nil || !os.SameFile(before, after) || after.Size() >= before.Size() {
		t.Fatalf("snapshot 4 is not the purged file, cut to its length: %v, %v", after, err)
	}
	f, err := d.openSnapshot(3)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.purge(4); err != nil {
		t.Fatal(err)
	}
	write(5, state)
	head, err := kv.VerifySnapshot(f)
	if h, herr := decodeSnapHeader(head); err != nil || herr != nil || h.Index != 3 {
		t.Errorf("a purged snapshot was written over while it was sent: %+v, %v, %v", h, err, herr)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if h, got, err := d.readSnapshot(4); err != nil || h.Index != 4 || got.Applied() != 4 {
		t.Fatalf("snapshot 4 reads %+v, %v", h, err)
	}
}

func (n *testNode) stateHash() uint64 {
	n.store.mu.RLock()
	defer n.store.mu.RUnlock()
	return n.store.mu.state.Hash()
}

// What follows went wrong in the example that this kind of program grows from.

// A joiner must accept the appends of a leader it has no table of (etcd#4018).
func TestJoinerAcceptsAppends(t *testing.T) {
	c := newCluster(t, 1, nil)
	c.leader().mustPut("k", "v")
	n := c.join(2)
	n.mustGet("k", "v")
	n.mustPut("k", "w")
	c.wantVoters(1, 2)
	c.check()
}

// The log is opened at the snapshot that the state was loaded from (etcd#7056).
func TestLogOpensAtItsSnapshot(t *testing.T) {
	smallSegments(t, 16<<10)
	c := newCluster(t, 1, small)
	c.leader().fill("k", 1500)
	c.stop(1)
	d := openTestDir(t, c.config(1).DataDir)
	r, err := d.load()
	if err != nil || r.snap.Index < 100 || r.state.Applied() != r.snap.Index {
		t.Fatalf("snapshot %d, state %d, %v", r.snap.Index, r.state.Applied(), err)
	}
	if len(r.entries) > 0 && r.entries[0].GetIndex() != r.snap.Index+1 {
		t.Fatalf("the log begins with entry %d", r.entries[0].GetIndex())
	}
	d.mustClose(t)
	for range 3 { // a start writes nothing that the next one cannot read
		c.start(1)
		c.leader().mustGet("k01499", strings.Repeat("x", 100))
		c.stop(1)
	}
}

// A member serves after a start from a snapshot with no log behind it (etcd#7098).
func TestServesAfterStartFromSnapshot(t *testing.T) {
	c := newCluster(t, 1, small)
	n := c.leader()
	n.mustPut("k", "v")
	before := n.node.progress.snapshot.Load()
	n.node.requestSnapshot()
	c.wait("the snapshot", func() bool { return n.node.progress.snapshot.Load() > before })
	c.stop(1)
	n = c.start(1)
	if at := n.store.applied.At(); at < 2 {
		t.Fatalf("starts at entry %d", at)
	}
	n.mustPut("k", "w")
	n.mustGet("k", "w")
}

// The hard state never counts on a snapshot that the log does not have yet
// (etcd#10219, #13929): a crash before and after leaves a member that starts.
func TestCrashWhileInstalling(t *testing.T) {
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprintf("late=%v", late), func(t *testing.T) {
			smallSegments(t, 1<<20)
			c := newCluster(t, 3, small)
			l, f := c.leader(), c.follower()
			l.mustPut("k", "v")
			c.stop(f.id)
			f = c.startWith(f.id, func(d *diskStore) logStore { return &crashing{d, late} })
			c.leader()
			c.isolate(f.id, true)
			l.fill("k", 2000)
			c.wait("compaction", func() bool {
				first, err := l.node.mem.FirstIndex()
				return err == nil && first > f.store.applied.At()+1
			})
			c.isolate(f.id, false)
			f.ends()
			if err := c.stop(f.id); !errors.Is(err, errDurability) {
				t.Fatalf("ended with %v", err)
			}
			f = c.start(f.id)
			c.leader()
			f.mustGet("k01999", strings.Repeat("x", 100))
			c.check()
		})
	}
}

// crashing ends its node around the installation of a snapshot.
type crashing struct {
	*diskStore
	late bool
}

func (s *crashing) install(m *raftpb.SnapshotMetadata, hs *raftpb.HardState, ents []*raftpb.Entry) error {
	var err error
	if s.late {
		err = s.diskStore.install(m, hs, ents)
	}
	return errors.Join(err, fmt.Errorf("%w: injected", errDurability))
}

// A follower far behind, while the leader compacts again and again (the panic on
// ErrCompacted).
func TestFollowerFarBehindWhileLeaderCompacts(t *testing.T) {
	smallSegments(t, 1<<20)
	c := newCluster(t, 3, func(cfg *Config) { cfg.SnapshotEntries, cfg.CatchUpBytes = 5, 0 })
	l, f := c.leader(), c.follower()
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.fill("k", 1500)
	}()
	for cut := true; ; cut = !cut {
		c.isolate(f.id, cut)
		at := l.store.applied.At()
		select {
		case <-l.store.applied.Wait(at + 20):
			continue
		case <-done:
		}
		break
	}
	c.isolate(f.id, false)
	c.check()
	if got := f.keys(); got != 1501 {
		t.Fatalf("%d keys, want 1501", got)
	}
}

// Kill -9 in the middle of a load with snapshots, again and again: every image
// starts, and with it the writes that were acknowledged before it was taken.
func TestImagesMidLoadStart(t *testing.T) {
	smallSegments(t, 32<<10)
	c := newCluster(t, 1, small)
	c.leader()
	c.stop(1)
	m := &midLoad{to: t.TempDir()}
	n := c.startWith(1, func(d *diskStore) logStore { m.diskStore = d; return m })
	c.leader()
	for i := range int64(500) {
		n.mustPut(fmt.Sprintf("k%06d", i), strings.Repeat("x", 300))
		m.acked.Store(i)
	}
	c.stop(1)
	if len(m.images) < 5 {
		t.Fatalf("only %d images", len(m.images))
	}
	for dir, sure := range m.images {
		d := openTestDir(t, dir)
		r, err := d.load()
		if err != nil {
			t.Fatalf("an image with %d acknowledged writes: %v", sure, err)
		}
		for _, e := range r.entries {
			if e.GetType() == raftpb.EntryNormal && len(e.GetData()) > 0 {
				applyTo(t, r.state, e)
			}
		}
		if _, ok := r.state.Get(fmt.Sprintf("k%06d", sure)); !ok {
			t.Errorf("write %d was acknowledged and is not in the image", sure)
		}
		d.mustClose(t)
	}
}

// midLoad copies the data directory at every 40th save: on the raft loop, so
// that the log stands still. Snapshots and the purge go on beside it.
type midLoad struct {
	*diskStore
	to     string
	saves  int
	acked  atomic.Int64
	images map[string]int64 // → the last acknowledged write
}

func (m *midLoad) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	if m.saves++; m.saves%40 == 0 {
		sure, to := m.acked.Load(), filepath.Join(m.to, fmt.Sprint(m.saves))
		// An error is a file that was purged under the copy.
		if err := os.CopyFS(to, os.DirFS(m.dir)); err == nil {
			if m.images == nil {
				m.images = map[string]int64{}
			}
			m.images[to] = sure
		}
	}
	return m.diskStore.save(hs, ents)
}
