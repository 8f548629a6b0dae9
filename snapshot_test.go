package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

// memoryLog returns the first entry of a member's log in memory and the bytes of all.
func (n *testNode) memoryLog() (first uint64, held int64) {
	n.c.t.Helper()
	ctx, cancel := context.WithTimeout(n.c.ctx(), 10*time.Second)
	defer cancel()
	err := n.node.do(ctx, func() {
		first, _ = n.node.mem.FirstIndex()
		last, _ := n.node.mem.LastIndex()
		ents, _ := n.node.mem.Entries(first, last+1, noLimit)
		for _, e := range ents {
			held += logBytes(e)
		}
	})
	if err != nil {
		n.c.t.Fatal(err)
	}
	return first, held
}

// Between two snapshots that are far apart the log in memory stays short, and a
// member that needs more of it than is left gets a snapshot that is made for it.
func TestMemoryLogIsBounded(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) {
		cfg.SnapshotEntries, cfg.SnapshotBytes, cfg.CatchUpBytes = 1<<40, 1<<40, 64<<10
	})
	l, f := c.leader(), c.follower()
	c.isolate(f.id, true)
	large := strings.Repeat("x", 100<<10)
	for i := range 100 {
		l.mustPut(fmt.Sprintf("k%d", i%10), large)
	}
	at := f.store.applied.At()
	c.wait("the log that the follower lacks to go", func() bool {
		first, _ := l.memoryLog()
		return first > at+1
	})
	const limit = trimEvery + 5*64<<10 + 1<<20 // what gathers between two looks, what lags, and an entry
	for _, n := range c.nodes {                // each looks by itself, and may be held up
		c.wait("a short log", func() bool { _, held := n.memoryLog(); return held <= limit })
	}
	if got := l.node.progress.snapshot.Load(); got != 1 {
		t.Fatalf("a snapshot at %d, where none was due", got)
	}
	c.isolate(f.id, false)
	c.wait("the snapshot for the follower", func() bool { return f.node.progress.snapshot.Load() > 1 })
	f.mustGet("k9", large)
	l.mustPut("after", "1")
	f.mustGet("after", "1")
	c.check()
}

// A follower that lags is not sent a snapshot for log that goes under it: up to
// four times the usual is kept while it is heard of.
func TestMemoryLogWaitsForConnectedFollower(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) {
		cfg.SnapshotEntries, cfg.SnapshotBytes, cfg.CatchUpBytes = 1<<40, 1<<40, 2<<20
	})
	l, f := c.leader(), c.follower()
	// Its appends are lost; all else, heartbeats among it, arrives.
	c.net.dropIf(func(m *raftpb.Message) bool { return m.GetType() == raftpb.MsgApp && m.GetTo() == f.id })
	large := strings.Repeat("x", 100<<10)
	for i := range 60 { // 6 MiB: trimmed once, and more than CatchUpBytes
		l.mustPut(fmt.Sprint("k", i%10), large)
	}
	if first, _ := l.memoryLog(); first > f.node.progress.last.Load()+1 {
		t.Errorf("the log begins at %d, and a connected follower is at %d", first, f.node.progress.last.Load())
	}
	c.net.dropIf(nil)
	f.mustGet("k9", large)
	if got := f.node.progress.snapshot.Load(); got != 1 {
		t.Errorf("it was sent a snapshot at %d", got)
	}
	c.check()
}

// The disk damages a snapshot while the member runs, and a follower needs it: the
// leader notices and writes another, also where nothing was written since, so
// that the new one has the index of the old.
func TestDamagedSnapshotIsWrittenAgain(t *testing.T) {
	smallSegments(t, 1<<20)
	for name, harm := range map[string]func(t *testing.T, path string){
		"flipped": func(t *testing.T, path string) {
			rewrite(t, path, func(b []byte) []byte { b[len(b)*2/3] ^= 1; return b })
		},
		"cut": func(t *testing.T, path string) { rewrite(t, path, func(b []byte) []byte { return b[:len(b)/2] }) },
		"gone": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, 3, func(cfg *Config) { cfg.SnapshotEntries, cfg.CatchUpBytes = 1<<40, 1<<10 })
			l, f := c.leader(), c.follower()
			c.check()
			c.isolate(f.id, true)
			l.fill("k", 300)
			at := l.store.applied.At()
			l.node.requestSnapshot()
			c.wait("a snapshot of the last entry", func() bool { return l.node.progress.snapshot.Load() >= at })
			if err := l.node.do(c.ctx(), l.node.trimLog); err != nil {
				t.Fatal(err)
			}
			index := l.node.progress.snapshot.Load()
			harm(t, l.disk.snapPath(index))
			c.isolate(f.id, false)
			c.wait("the follower", func() bool { return f.store.applied.At() >= at })
			if _, err := l.disk.verifySnapshot(l.node.progress.snapshot.Load()); err != nil {
				t.Errorf("the newest snapshot: %v", err)
			}
			c.check()
			c.stop(l.id) // and starts from what it wrote
			c.start(l.id)
			c.check()
		})
	}
}
