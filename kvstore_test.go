package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"pontoon/kv"
)

func small(cfg *Config) {
	cfg.SnapshotEntries, cfg.CatchUpBytes = 50, 2<<10
}

func (n *testNode) fill(prefix string, count int) {
	n.c.t.Helper()
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := w; i < count; i += 8 {
				if _, err := n.store.put(n.c.ctx(), fmt.Sprintf("%s%05d", prefix, i), bytes.Repeat([]byte("x"), 100)); err != nil {
					n.c.t.Errorf("fill: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func (n *testNode) keys() int {
	n.store.mu.RLock()
	defer n.store.mu.RUnlock()
	return n.store.mu.state.Len()
}

func TestSnapshotAndRestart(t *testing.T) {
	c := newCluster(t, 1, small)
	n := c.leader()
	binary := "\x00\xff\xfe/\xc3\xa9"
	n.mustPut(binary, binary)
	n.fill("k", 2000)
	c.wait("a snapshot", func() bool { return n.node.progress.snapshot.Load() > 100 })
	c.stop(1)
	n = c.start(1)
	n.mustGet(binary, binary)
	if n.keys() != 2001 {
		t.Fatalf("%d keys after the restart, want 2001", n.keys())
	}
	c.check()
}

// A snapshot in the middle of a load, and a restart in the middle of that.
func TestSnapshotMidLoadRestartMidLoad(t *testing.T) {
	c := newCluster(t, 3, small)
	c.leader()
	done, writer := make(chan struct{}), c.nodes[1]
	go func() {
		defer close(done)
		writer.fill("k", 4000)
	}()
	victim := c.nodes[3]
	for range 3 {
		select {
		case <-victim.store.applied.Wait(victim.store.applied.At() + 100):
		case <-done: // the restarts took longer than the load
		}
		if err := c.stop(3); err != nil {
			t.Fatal(err)
		}
		victim = c.start(3)
	}
	<-done
	c.check()
	if got := c.nodes[3].keys(); got != 4001 {
		t.Fatalf("%d keys on the restarted member, want 4001", got)
	}
}

// A follower that was away while the log was compacted gets a snapshot, and a
// state that equals the others'.
func TestFollowerCatchesUpBySnapshot(t *testing.T) {
	c := newCluster(t, 3, small)
	l, f := c.leader(), c.follower()
	c.isolate(f.id, true)
	l.fill("k", 3000)
	c.wait("compaction", func() bool {
		first, err := l.node.mem.FirstIndex()
		return err == nil && first > f.store.applied.At()+1
	})
	c.isolate(f.id, false)
	<-f.store.applied.Wait(l.store.applied.At())
	c.check()
	if f.keys() != 3001 {
		t.Fatalf("%d keys, want 3001", f.keys())
	}
	// And the member starts from what it was sent.
	c.stop(f.id)
	f = c.start(f.id)
	f.mustGet("k02999", strings.Repeat("x", 100))
}

// What a Clone shows does not change while writes go on: the snapshot of a
// moment is of that moment.
func TestSnapshotIsOfOneMoment(t *testing.T) {
	c := newCluster(t, 1, small)
	n := c.leader()
	n.fill("k", 3000)
	c.wait("snapshots", func() bool { return n.node.progress.snapshot.Load() > 200 })
	files, err := n.disk.snapshotFiles()
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, i := range files {
		h, state, err := n.disk.readSnapshot(i)
		if errors.Is(err, os.ErrNotExist) {
			continue // purged meanwhile
		}
		if err != nil || h.Index != i || state.Applied() != i {
			t.Fatalf("snapshot %d: header %d, state %d, %v", i, h.Index, state.Applied(), err)
		}
		if err := state.Check(); err != nil {
			t.Fatalf("snapshot %d: %v", i, err)
		}
	}
}

func TestDiskLowRefusesWritesNotReads(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.leader()
	n.mustPut("k", "v")
	n.store.diskLow.Store(true)
	if _, err := n.store.put(c.ctx(), "k", []byte("w")); !errors.Is(err, errDiskLow) {
		t.Fatalf("put on a full disk: %v", err)
	}
	n.mustGet("k", "v")
	n.store.diskLow.Store(false)
	n.mustPut("k", "w")
}

func TestDeleteAnswersWhatWasThere(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.leader()
	n.mustPut("k", "v")
	r, err := n.store.delete(c.ctx(), "k")
	if err != nil || !r.Existed || r.Revision != 2 {
		t.Fatalf("delete: %+v %v", r, err)
	}
	r, err = n.store.delete(c.ctx(), "k")
	if err != nil || r.Existed || r.Revision != 2 {
		t.Fatalf("delete of an absent key: %+v %v", r, err)
	}
}

// A handler that gives up before raft has its command may promise that it
// never happens, and then it must not.
func TestAbandonedBeforeProposalNeverHappens(t *testing.T) {
	c := newCluster(t, 3, nil)
	n := c.follower()
	c.isolate(n.id, true)
	c.wait("the member to notice", func() bool { return n.store.leader() == 0 })
	ctx, cancel := context.WithCancel(c.ctx())
	done := make(chan error, 1)
	go func() {
		_, err := n.store.put(ctx, "k", []byte("v"))
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, errNoLeader) {
		t.Fatalf("abandoned: %v", err)
	}
	c.isolate(n.id, false)
	c.check()
	if _, _, err := n.store.get(c.ctx(), "k", readOptions{}); !errors.Is(err, errKeyNotFound) {
		t.Fatalf("it happened all the same: %v", err)
	}
}

func TestInflightBoundsTheReplayWindow(t *testing.T) {
	var f inflight
	woken := 0
	f.init(func() { woken++ })
	for seq := uint64(1); seq <= maxBatchesInFlight; seq++ {
		if !f.room(seq, maxBatchesInFlight) {
			t.Fatalf("no room for batch %d", seq)
		}
		f.add(&batch{seq: seq})
	}
	if f.room(maxBatchesInFlight+1, maxBatchesInFlight) {
		t.Fatal("room beyond the bound")
	}
	for seq := uint64(2); seq <= maxBatchesInFlight; seq++ {
		f.take(seq)
	}
	if woken != 1 {
		t.Fatalf("woken %d times, want once", woken)
	}
	// Batch 1 is still open: it must remain proposable.
	if !f.room(kv.ReplayWindow/2, maxBatchesInFlight) {
		t.Fatal("no room inside the window")
	}
	if f.room(kv.ReplayWindow/2+1, maxBatchesInFlight) {
		t.Fatal("room for a batch that would push the oldest open one out of the window")
	}
	if f.take(1) == nil || f.take(1) != nil {
		t.Fatal("take must give a batch exactly once")
	}
}

// Every answer names the revision that it shows, in lists and for single keys.
func TestReadOfTheRevisionNamesIt(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.leader()
	n.mustPut("k", "v1")
	n.mustPut("k", "v2")
	e, rev, err := n.store.get(c.ctx(), "k", readOptions{revision: 1})
	if err != nil || string(e.Value) != "v1" || rev != 1 {
		t.Errorf("%q, revision %d, %v; want v1 and revision 1", e.Value, rev, err)
	}
	if _, rev, err = n.store.get(c.ctx(), "other", readOptions{revision: 1}); !errors.Is(err, errKeyNotFound) || rev != 1 {
		t.Errorf("an absent key: revision %d, %v; want revision 1", rev, err)
	}
	err = n.store.read(c.ctx(), readOptions{revision: 1}, false, func(v *kv.View) error {
		rev = v.Revision()
		return nil
	})
	if err != nil || rev != 1 {
		t.Errorf("a list: revision %d, %v; want revision 1", rev, err)
	}
}

// What reads of older revisions undo is a copy of all that came later: few do it at
// once, the others wait until their deadline, and an export gives its place back
// before it streams.
func TestReadsOfThePastAreBounded(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.leader()
	n.mustPut("k", "old")
	n.mustPut("k", "new")
	past := readOptions{stale: true, revision: 1}
	read := func(ctx context.Context, o readOptions, whole bool) (value string, held int, err error) {
		err = n.store.read(ctx, o, whole, func(v *kv.View) error {
			held = len(n.store.undoing)
			e, _ := v.Get("k")
			value = string(e.Value)
			return nil
		})
		return value, held, err
	}
	for _, row := range []struct {
		revision int64
		whole    bool
		value    string
		held     int
	}{{1, false, "old", 1}, {1, true, "old", 0}, {2, false, "new", 0}, {0, false, "new", 0}, {0, true, "new", 0}} {
		value, held, err := read(c.ctx(), readOptions{stale: true, revision: row.revision}, row.whole)
		if value != row.value || held != row.held || err != nil || len(n.store.undoing) != 0 {
			t.Errorf("%+v: %q, %d places held, %d after it, %v", row, value, held, len(n.store.undoing), err)
		}
	}
	n.mustPut("later", "")
	left, leave := context.WithCancel(t.Context())
	leave()
	for range 20 { // whichever of two ready channels is looked at first
		if _, _, err := read(left, past, false); !errors.Is(err, errReadTimeout) {
			t.Fatalf("a read whose client has left: %v", err)
		}
	}
	for range maxUndoing {
		n.store.undoing <- struct{}{}
	}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, _, err := read(short, past, true); !errors.Is(err, errReadTimeout) || short.Err() == nil {
		t.Errorf("without a place: %v", err)
	}
	get := func(ctx context.Context, key string, revision int64) (string, error) {
		e, _, err := n.store.get(ctx, key, readOptions{stale: true, revision: revision})
		return string(e.Value), err
	}
	for _, key := range []string{"k", "later"} {
		if _, err := get(short, key, 1); !errors.Is(err, errReadTimeout) {
			t.Errorf("%s, changed since revision 1, without a place: %v", key, err)
		}
	}
	if value, err := get(left, "k", 2); value != "new" || err != nil {
		t.Errorf("a key that has not changed since, without a place: %q, %v", value, err)
	}
	if value, _, err := read(left, readOptions{stale: true}, false); value != "new" || err != nil {
		t.Errorf("the present without a place: %q, %v", value, err)
	}
	waiting := make(chan error)
	go func() { _, _, err := read(c.ctx(), past, false); waiting <- err }()
	<-n.store.undoing
	if err := <-waiting; err != nil {
		t.Errorf("once there is a place: %v", err)
	}
	if value, err := get(c.ctx(), "k", 1); value != "old" || err != nil || len(n.store.undoing) != maxUndoing-1 {
		t.Errorf("one key, once there is a place: %q, %v, %d places held", value, err, len(n.store.undoing))
	}
	if _, err := get(c.ctx(), "later", 1); !errors.Is(err, errKeyNotFound) {
		t.Errorf("a key that came later: %v", err)
	}
	for _, command := range []kv.Command{{Op: kv.OpGrant, TTL: time.Hour, Wall: 1}, {Op: kv.OpPut, Key: "l", Lease: 1}, put("l", "")} {
		if _, err := n.store.propose(c.ctx(), &command); err != nil {
			t.Fatal(err)
		}
	}
	e, _, err := n.store.get(c.ctx(), "l", readOptions{stale: true, revision: 4})
	if err != nil || e.Lease != 1 || e.Expires == 0 {
		t.Errorf("a key that had a lease: %+v, %v", e, err)
	}
}

// Where the raft loop hangs, health says so, and within the time that it has.
func TestHealthWithoutTheLoop(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.leader()
	hangs, goOn := make(chan struct{}), make(chan struct{})
	go n.node.do(c.ctx(), func() { close(hangs); <-goOn })
	<-hangs
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	start := time.Now()
	if live := n.store.live(ctx); live[0].err == nil {
		t.Error("the loop hangs, and /livez is fine")
	}
	checks := n.store.checks(ctx)
	if last := checks[len(checks)-1]; last.err == nil {
		t.Errorf("the loop hangs, and %q is fine", last.name)
	}
	if st := n.store.status(ctx); st.ID != 1 {
		t.Errorf("%+v", st)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("it took %v", took)
	}
	close(goOn)
}
