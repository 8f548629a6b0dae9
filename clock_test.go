package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"pontoon/kv"
)

// ttlWitness is one key with a TTL, and what was seen of it.
type ttlWitness struct {
	key      string
	ttl      time.Duration
	sent     time.Time     // the put
	answered time.Time     // the same
	alive    time.Time     // start of the last read that found it
	gone     time.Time     // end of the first read that did not
	margin   time.Duration // how late it may be
}

func (w *ttlWitness) check(t *testing.T) {
	t.Helper()
	if lived := w.gone.Sub(w.sent); lived < w.ttl {
		t.Errorf("%s: gone %v after it was sent, its TTL is %v", w.key, lived, w.ttl)
	}
	// On a busy machine an answer may be held up for longer than a lease waits for it (seenAfter).
	if lived := w.gone.Sub(w.answered); lived < w.ttl && w.answered.Sub(w.sent) <= testTick*3/4 {
		t.Errorf("%s: gone %v after the answer, its TTL is %v", w.key, lived, w.ttl)
	}
	if late := w.alive.Sub(w.answered) - w.ttl; late > w.margin {
		t.Errorf("%s: still there %v after its time", w.key, late)
	}
}

// watchKey reads the key on changing members until it is gone.
func (w *ttlWitness) watchKey(pick func() *testNode, limit time.Duration) error {
	deadline := time.Now().Add(w.ttl + limit)
	for time.Now().Before(deadline) {
		start := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_, _, err := pick().store.get(ctx, w.key, readOptions{})
		cancel()
		switch {
		case errors.Is(err, errKeyNotFound):
			w.gone = time.Now()
			return nil
		case err == nil:
			w.alive = start
		}
	}
	return fmt.Errorf("%s is still there %v after its TTL", w.key, limit)
}

func (w *ttlWitness) put(n *testNode) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	w.sent = time.Now()
	_, err := n.store.propose(ctx, &kv.Command{Op: kv.OpPut, Key: w.key, Value: []byte("x"), TTL: w.ttl, Wall: w.sent.UnixMilli()})
	w.answered = time.Now()
	w.alive = w.answered
	return err
}

// TestTTL: keys end when they should, never before, while the leader is cut
// off, restarted and replaced; on a cluster that takes snapshots all the time.
func TestTTL(t *testing.T) {
	c := newCluster(t, 3, small)
	c.leader()
	up := newMembersUp(c)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() { // entries for shakeLeader to see progress by
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				_, _ = up.pick().store.put(ctx, fmt.Sprintf("load-%d", i%10), nil) // its outcome is of no interest
				cancel()
			}
		}
	})
	var mu sync.Mutex
	var seen []*ttlWitness
	for id := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				w := &ttlWitness{key: fmt.Sprintf("ttl-%d-%d", id, i), ttl: time.Duration(100+150*id) * time.Millisecond, margin: 2 * time.Second}
				if err := w.put(up.pick()); err != nil {
					continue
				}
				if err := w.watchKey(up.pick, 10*time.Second); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				seen = append(seen, w)
				mu.Unlock()
			}
		})
	}
	for round := range 6 {
		shakeLeader(t, c, up, round)
	}
	close(stop)
	wg.Wait()
	for _, w := range seen {
		w.check(t)
	}
	t.Logf("%d keys ended in time", len(seen))
	if len(seen) < 4 { // one for each witness
		t.Errorf("only %d keys were seen to end", len(seen))
	}
	c.check()
}

// TestTTLQuietCluster: without any other traffic the leader ticks by itself, and
// stops once nothing can expire any more.
func TestTTLQuietCluster(t *testing.T) {
	c := newCluster(t, 3, nil)
	c.leader()
	f := c.follower()
	w := &ttlWitness{key: "k", ttl: 200 * time.Millisecond, margin: time.Second}
	if err := w.put(f); err != nil {
		t.Fatal(err)
	}
	if err := w.watchKey(func() *testNode { return f }, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	w.check(t)
	l := c.leader()
	// With nothing left to expire the log stands still.
	waitFor(t, "a log that stands still", func() bool {
		at := l.node.progress.last.Load()
		<-time.After(20 * testTick)
		return l.node.progress.last.Load() == at
	})
}

// TestTTLRestart: a lease outlives the restart of everybody, and ends in time
// counted from then on at the latest.
func TestTTLRestart(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	w := &ttlWitness{key: "k", ttl: 600 * time.Millisecond, margin: 3 * time.Second}
	if err := w.put(l); err != nil {
		t.Fatal(err)
	}
	for id := range c.table {
		if err := c.stop(uint64(id + 1)); err != nil {
			t.Fatal(err)
		}
	}
	for id := range c.table {
		c.start(uint64(id + 1))
	}
	if err := w.watchKey(func() *testNode { return c.nodes[2] }, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	w.check(t)
	c.check()
}

// TestLateTick: a tick in an entry of another term than its own changes nothing,
// and a peer's proposal must not contain one at all.
func TestLateTick(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.leader()
	if err := (&ttlWitness{key: "k", ttl: time.Hour}).put(n); err != nil {
		t.Fatal(err)
	}
	tick := kv.AppendCommand(nil, &kv.Command{Op: kv.OpTick, Tick: kv.Tick{Clock: 1 << 40, Seen: 1 << 40, Term: 7}})
	data := kv.AppendBatch(nil, 0, 0, 0, tick)
	if err := validateProposal([]*raftpb.Entry{{Type: raftpb.EntryNormal.Enum(), Data: data}}); err == nil {
		t.Error("a forwarded tick is accepted")
	}
	if err := n.node.do(c.ctx(), func() {
		if err := n.node.raw.Propose(data); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	n.mustPut("after", "x")
	n.store.mu.RLock()
	defer n.store.mu.RUnlock()
	if at := n.store.mu.state.Clock(); at >= 1<<40 {
		t.Errorf("the clock moved to %d by a tick of another term", at)
	}
}

// What ticks take to commit is not lost, and a later tick never reads less: a lease
// that it starts would be measured from a time before its grant.
func TestTicksOfOneLeader(t *testing.T) {
	b := newBenchNode(t)
	b.lead(t)
	start := time.Now()
	var at time.Duration
	b.time = func() time.Time { return start.Add(at) }
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	applied := func(reads int64, when time.Duration) {
		b.clock.Store(&clock{term: b.now.term, applied: 2, reads: reads, at: start.Add(when), active: true, next: 1})
	}
	applied(5000, 0)
	for _, x := range []struct {
		at      time.Duration
		applied int64 // what the newest tick applied by then reads
		when    time.Duration
		want    int64
	}{
		{ms(500), 5000, 0, 5500},
		{ms(1000), 5000, 0, 6000},                 // none is applied yet
		{ms(1500), 5500, ms(1400), 6500},          // 900 ms after it was made
		{ms(2000), 6500, ms(1900), 7000},          // two at once
		{ms(9000), 7000, ms(2001), 14000},         // nothing to expire for a while
		{ms(9500), 20000, ms(9400), 20100},        // never: but a tick goes on from what is applied
		{ms(10000), 20100, ms(9999), 20100 + 500}, // and from there by its own time
	} {
		applied(x.applied, x.when)
		at = x.at
		b.proposeTick()
		if got := b.ownTick; got.reads != x.want || !got.made.Equal(start.Add(at)) {
			t.Errorf("the tick at %v reads %d, want %d", x.at, got.reads, x.want)
		}
	}
	b.ownTick.term-- // what it measured as a leader of before says nothing
	applied(100, ms(10400))
	at = ms(10500)
	if b.proposeTick(); b.ownTick.reads != 200 {
		t.Errorf("the first tick of a term reads %d", b.ownTick.reads)
	}
}

// A loop that was held up ticks twice at once: followers get their time all the same.
func TestSeenTakesItsTime(t *testing.T) {
	b := newBenchNode(t)
	now := time.Unix(1000, 0)
	b.time = func() time.Time { return now }
	applied := uint64(10)
	for _, x := range []struct {
		after time.Duration // of a tick
		want  uint64
	}{{b.cfg.TickInterval, 0}, {b.cfg.TickInterval, 11}, {0, 11}, {b.cfg.TickInterval / 8, 11}, {b.cfg.TickInterval * 7 / 8, 12}, {b.cfg.TickInterval * 9 / 10, 15}} {
		now = now.Add(x.after)
		applied++
		b.clock.Store(&clock{applied: applied})
		if b.noteSeen(); b.seen[0] != x.want {
			t.Errorf("after %v more, with %d applied, seen is %d, want %d", x.after, applied, b.seen[0], x.want)
		}
	}
}

// TestTickRules: a leader ticks only once it has applied an entry of its own
// term, and says that it has seen only what it had applied a raft tick before.
func TestTickRules(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.leader()
	n.mustPut("k", "v")
	err := n.node.do(c.ctx(), func() {
		real := n.node.clock.Load()
		defer n.node.clock.Store(real)
		overdue := clock{term: n.node.now.term, applied: real.applied, at: time.Now(), active: true, next: 1, reads: 2}
		former := overdue
		former.term--
		n.node.clock.Store(&former)
		before := n.node.raw.HasReady()
		if n.node.proposeTick(); n.node.raw.HasReady() != before {
			t.Error("a tick before anything of the own term is applied")
		}
		n.node.clock.Store(&overdue)
		if n.node.proposeTick(); !n.node.raw.HasReady() {
			t.Error("no tick although a deadline has passed")
		}
		n.node.seen, n.node.seenAt = [2]uint64{1, 1 << 40}, time.Time{}
		if n.node.noteSeen(); n.node.seen != [2]uint64{1 << 40, real.applied} {
			t.Errorf("seen %v, want what was applied one tick ago first", n.node.seen)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}
