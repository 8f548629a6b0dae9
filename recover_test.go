package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	"go.etcd.io/raft/v3/raftpb"
)

func hardState(term, vote, commit uint64) *raftpb.HardState {
	return &raftpb.HardState{Term: new(term), Vote: new(vote), Commit: new(commit)}
}

// founded is the directory of member 1 of three, with an open log.
func founded(t *testing.T) (*diskStore, *recovered) {
	t.Helper()
	d := openTestDir(t, filepath.Join(t.TempDir(), "data"))
	if err := d.bootstrap(1, bootstrapMembership("x", []clusterURL{{1, testURL(1)}, {2, testURL(2)}, {3, testURL(3)}}), false); err != nil {
		t.Fatal(err)
	}
	r, err := d.load()
	if err != nil {
		t.Fatal(err)
	}
	return d, r
}

// Entries of an old leader that a later one has replaced by a shorter log stay gone,
// also where the newest snapshot ends among them: with them this member would vote for
// a member that lacks what it has acknowledged since.
func TestReplacedEntriesStayGone(t *testing.T) {
	d, r := founded(t)
	table := r.snap.Members
	write := func(term, commit uint64, entries ...*raftpb.Entry) {
		t.Helper()
		if err := d.save(hardState(term, term, commit), entries); err != nil {
			t.Fatal(err)
		}
	}
	for i := uint64(2); i <= 10; i++ {
		write(2, min(i, 5), crashEntry(i, 2))
	}
	write(3, 6, crashEntry(6, 3))
	for i := uint64(2); i <= 6; i++ {
		applyTo(t, r.state, crashEntry(i, map[bool]uint64{true: 2, false: 3}[i < 6]))
	}
	h := snapHeader{Index: 6, Term: 3, Members: table}
	if err := errors.Join(second(d.writeSnapshot(h, r.state)), d.saveSnapshot(h.raftSnapshot().Metadata)); err != nil {
		t.Fatal(err)
	}
	dir := d.dir
	d.mustClose(t)
	d = openTestDir(t, dir)
	r, err := d.load()
	if err != nil {
		t.Fatal(err)
	}
	if r.snap.Index != 6 || len(r.entries) != 0 {
		t.Errorf("after the snapshot at %d come %v", r.snap.Index, r.entries)
	}
}

// A log whose entries go back in term, or are ahead of the hard state, is not one that
// this program has written.
func TestTermsOfALog(t *testing.T) {
	for _, terms := range [][]uint64{{2, 3, 2}, {2, 9}} {
		d, _ := founded(t)
		for i, term := range terms {
			if err := d.save(hardState(3, 0, 1), []*raftpb.Entry{crashEntry(uint64(i)+2, term)}); err != nil {
				t.Fatal(err)
			}
		}
		dir := d.dir
		d.mustClose(t)
		if _, err := openTestDir(t, dir).load(); !errors.Is(err, errDamaged) {
			t.Errorf("entries of the terms %v in term 3: %v", terms, err)
		}
	}
}

// A term that could not be written is not in the mark of what was: the next start
// would miss it in the log, and take that for damage.
func TestFailedWriteLeavesNoMark(t *testing.T) {
	smallSegments(t, 512)
	w := writeLog(t, 10, 5)
	d := openTestDir(t, w.dir)
	if _, err := d.load(); err != nil {
		t.Fatal(err)
	}
	block := filepath.Join(d.walDir(), "new.tmp") // no new segment can be made
	if err := os.Mkdir(block, 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	for term := uint64(2); err == nil; term++ {
		err = d.save(hardState(term, 1, 10), nil)
	}
	if !errors.Is(err, errDurability) {
		t.Fatal(err)
	}
	if err := errors.Join(d.close(), os.Remove(block)); err != nil {
		t.Fatal(err)
	}
	if last, err := w.reload(t, w.dir); err != nil || last != 10 {
		t.Errorf("the next start: %d, %v", last, err)
	}
}

// The name of a data directory is not a pattern.
func TestDirectoryNamedLikeAPattern(t *testing.T) {
	base := t.TempDir()
	mine, other := filepath.Join(base, "node[1]"), filepath.Join(base, "node1")
	w := writeLog(t, 10, 5)
	if err := os.Rename(w.dir, mine); err != nil {
		t.Fatal(err)
	}
	files := []string{"wal.old/x", "wal.new/x", "snap/spare.tmp", "boots.tmp"}
	for _, f := range files {
		f = filepath.Join(other, f)
		if err := errors.Join(os.MkdirAll(filepath.Dir(f), 0o700), os.WriteFile(f, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if last, err := w.reload(t, mine); err != nil || last != 10 {
		t.Errorf("%d, %v", last, err)
	}
	for _, f := range files {
		if _, err := os.Stat(filepath.Join(other, f)); err != nil {
			t.Errorf("opening %s changed %s: %v", mine, other, err)
		}
	}
}

// What this process may not read is not what the disk has lost.
func TestRefusedIsNotDamaged(t *testing.T) {
	for _, cause := range []error{fs.ErrPermission, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM} {
		err := damaged("the log is damaged: %w", &fs.PathError{Op: "open", Path: "x", Err: cause})
		if !errors.Is(err, errRefuse) || errors.Is(err, errDamaged) || strings.Contains(err.Error(), "remove this member") {
			t.Errorf("%v: %v", cause, err)
		}
	}
	if err := damaged("the log is damaged: %w", syscall.EIO); !errors.Is(err, errDamaged) || !strings.HasSuffix(err.Error(), replaceHint) {
		t.Error(err)
	}
}

// The only voter left does not stand aside, though its newest snapshot is of a time
// when there were three: the log tells of the removals, committed or not.
func TestLastVoterDoesNotStandAside(t *testing.T) {
	for _, commit := range []uint64{1, 19} {
		d, _ := founded(t)
		for i := uint64(2); i < 20; i++ {
			e := crashEntry(i, 2)
			if i == 3 || i == 4 {
				cc, err := memberChange{Version: memberChangeVersion, Op: opRemove, Member: member{ID: i - 1}}.confChange()
				if err != nil {
					t.Fatal(err)
				}
				e.Type, e.Data = raftpb.EntryConfChangeV2.Enum(), encoded(cc)
			}
			if err := d.save(hardState(2, 1, min(i-1, commit)), []*raftpb.Entry{e}); err != nil {
				t.Fatal(err)
			}
		}
		dir := d.dir
		d.mustClose(t)
		segment := segments(t, dir)[0]
		end := len(used(t, segment))
		rewrite(t, segment, func(b []byte) []byte { b[end-8] ^= 1; return b })
		d = openTestDir(t, dir)
		if r, err := d.loadOrStandAside(d.salvageTable); !errors.Is(err, errDamaged) || !strings.Contains(err.Error(), "of 1 voters") {
			t.Errorf("%v, %v", r, err)
		}
	}
}

// Two snapshots are kept, and either will do: the record of the older one stays in the
// log even where it is the last of its segment.
func TestEitherKeptSnapshotWillDo(t *testing.T) {
	smallSegments(t, 4096)
	w := written{dir: t.TempDir(), hash: make([]uint64, 21)}
	d := openTestDir(t, w.dir)
	if err := d.bootstrap(1, soleFounder(), false); err != nil {
		t.Fatal(err)
	}
	r, err := d.load()
	if err != nil {
		t.Fatal(err)
	}
	w.hash[1] = r.state.Hash()
	for i := uint64(2); i <= 20; i++ {
		e, size := entry(i, 1), 10
		if i == 11 { // does not fit behind the snapshot at 10
			size = 3800
		}
		e.Data = testBatch("k", fmt.Sprint(i, strings.Repeat("x", size)))
		if err := d.save(hardState(1, 1, i), []*raftpb.Entry{e}); err != nil {
			t.Fatal(err)
		}
		applyTo(t, r.state, e)
		w.hash[i] = r.state.Hash()
		if i%10 > 0 {
			continue
		}
		h := snapHeader{Index: i, Term: 1, Members: soleFounder()}
		if err := errors.Join(second(d.writeSnapshot(h, r.state)), d.saveSnapshot(h.raftSnapshot().Metadata)); err != nil {
			t.Fatal(err)
		}
		if oldest := d.oldestKept(); oldest > 0 {
			if err := errors.Join(d.release(oldest), d.purge(oldest)); err != nil {
				t.Fatal(err)
			}
		}
	}
	rewrite(t, d.snapPath(20), func(b []byte) []byte { return b[:10] })
	d.mustClose(t)
	if last, err := w.reload(t, w.dir); err != nil || last != 20 {
		t.Errorf("with the snapshot at 10: %d, %v", last, err)
	}
}

// A snapshot that arrived counts as sent: its file is closed twice on the way.
func TestSentSnapshotIsReportedSent(t *testing.T) {
	d := openTestDir(t, writeLog(t, 10, 5).dir)
	f, err := d.openSnapshot(5)
	if err != nil {
		t.Fatal(err)
	}
	m := snap.NewMessage(&raftpb.Message{Type: raftpb.MsgSnap.Enum()}, f, f.size)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			t.Error(err)
		}
	}))
	defer s.Close()
	resp, err := http.Post(s.URL, "", struct{ io.Reader }{struct{ io.ReadCloser }{m.ReadCloser}})
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	m.ReadCloser.Close() // as net/http does with a body that it was given as one
	m.CloseWithError(nil)
	if sent := <-m.CloseNotify(); !sent || d.mu.sent != 0 {
		t.Errorf("reported as sent: %v; still being sent: %d", sent, d.mu.sent)
	}
}

// The snapshot that heals a member whose state differs came while it found that out:
// it is not one of its own, and stays.
func TestSnapshotThatHealsStays(t *testing.T) {
	d, r := founded(t)
	table := r.snap.Members
	for i := uint64(2); i <= 10; i++ {
		applyTo(t, r.state, crashEntry(i, 3))
		if i == 6 || i == 10 {
			if _, err := d.writeSnapshot(snapHeader{Index: i, Term: 3, Members: table}, r.state); err != nil {
				t.Fatal(err)
			}
		}
	}
	files, err := d.setAsideSnapshots(3, 8)
	if err != nil || len(files) != 1 || files[0] != d.snapPath(6) {
		t.Errorf("set aside: %v, %v", files, err)
	}
	if _, _, err := d.readSnapshot(10); err != nil {
		t.Error(err)
	}
}
