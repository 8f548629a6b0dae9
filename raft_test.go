package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"pontoon/kv"
)

func TestThreeNodesPutGet(t *testing.T) {
	c := newCluster(t, 3, nil)
	for i, w := range c.table {
		key, value := fmt.Sprintf("k%d", i), fmt.Sprintf("v%d", i)
		c.leader()
		c.nodes[w.ID].mustPut(key, value)
		for _, n := range c.nodes {
			n.mustGet(key, value) // a linearizable read sees it at once, anywhere
		}
	}
	c.check()
}

// Commands proposed from what was committed, on all members at once, must not
// block: a proposer that waits for its own commit inside the commit path would.
func TestProposeOnCommit(t *testing.T) {
	c := newCluster(t, 3, nil)
	c.leader()
	var wg sync.WaitGroup
	for _, n := range c.nodes {
		wg.Go(func() {
			next := 0
			for next < 100 {
				r, err := n.store.put(c.ctx(), fmt.Sprintf("member-%d", n.id), fmt.Append(nil, next))
				if err != nil {
					t.Errorf("member %d, commit %d: %v", n.id, next, err)
					return
				}
				if r.Entry.Version != int64(next+1) {
					t.Errorf("member %d: version %d after %d commits", n.id, r.Entry.Version, next+1)
					return
				}
				next++
			}
		})
	}
	wg.Wait()
	c.check()
}

// Every concurrent write gets its own result: revisions are never shared.
func TestEveryWriteItsOwnResult(t *testing.T) {
	c := newCluster(t, 3, nil)
	c.leader()
	var mu sync.Mutex
	seen := map[int64]string{}
	var wg sync.WaitGroup
	for _, n := range c.nodes {
		for w := range 20 {
			wg.Go(func() {
				for i := range 20 {
					key := fmt.Sprintf("%d/%d/%d", n.id, w, i)
					r, err := n.store.put(c.ctx(), key, []byte(key))
					if err != nil || r.Entry.Key != key || string(r.Entry.Value) != key || r.Entry.ModRevision != r.Revision {
						t.Errorf("put %s: %+v %v", key, r, err)
						return
					}
					mu.Lock()
					if other, taken := seen[r.Revision]; taken {
						t.Errorf("%s and %s both got revision %d", key, other, r.Revision)
					}
					seen[r.Revision] = key
					mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
	c.check()
}

func TestCloseWhileProposing(t *testing.T) {
	c := newCluster(t, 3, nil)
	n := c.leader()
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			for j := 0; ; j++ {
				_, err := n.store.put(c.ctx(), fmt.Sprint(i), fmt.Append(nil, j))
				if err != nil {
					if !errors.Is(err, errStopping) && !errors.Is(err, errCommitTimeout) {
						t.Errorf("put while closing: %v", err)
					}
					return
				}
			}
		})
	}
	<-n.store.revision.Wait(200)
	if err := c.stop(n.id); err != nil {
		t.Fatalf("stop: %v", err)
	}
	wg.Wait()
}

func TestCloseBeforeReplayEnds(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) { cfg.SnapshotEntries = 1 << 40 })
	for i := range 300 {
		c.leader().mustPut(fmt.Sprint(i), "x")
	}
	for range 3 { // the log is replayed from its beginning each time
		if err := c.stop(1); err != nil {
			t.Fatalf("stop: %v", err)
		}
		c.start(1)
	}
	c.leader().mustGet("299", "x")
}

func TestSingleNodeRestartLeadsAgain(t *testing.T) { // etcd#4474, #4478
	c := newCluster(t, 1, nil)
	for i := range 3 {
		n := c.leader()
		n.mustPut("k", fmt.Sprint(i))
		c.stop(1)
		c.start(1)
		c.leader().mustGet("k", fmt.Sprint(i))
	}
}

func TestKillLeaderNothingLost(t *testing.T) {
	c := newCluster(t, 3, nil)
	acked := map[string]string{}
	for round := range 4 {
		n := c.leader()
		for i := range 20 {
			k := fmt.Sprintf("%d-%d", round, i)
			n.mustPut(k, k)
			acked[k] = k
		}
		c.stop(n.id)
		for k, v := range acked {
			c.leader().mustGet(k, v)
		}
		c.start(n.id)
	}
	c.check()
}

// A write that reaches a follower while the leader dies is neither lost nor
// refused nor done twice: the follower proposes it again to the next leader.
func TestWritesSurviveLeaderLoss(t *testing.T) {
	c := newCluster(t, 3, nil)
	l, f := c.leader(), c.follower()
	f.mustPut("counter", "0")
	// The proposal goes out, and nobody who leads hears of it.
	c.net.dropIf(func(m *raftpb.Message) bool { return m.GetType() == raftpb.MsgProp })
	type answer struct {
		r   kv.Result
		err error
	}
	done := make(chan answer, 1)
	go func() {
		r, err := f.store.put(c.ctx(), "counter", []byte("1"))
		done <- answer{r, err}
	}()
	c.wait("the proposal", func() bool { return len(f.node.inflight.open()) == 1 })
	c.isolate(l.id, true)
	c.net.dropIf(nil)
	a := <-done
	if a.err != nil || a.r.Entry.Version != 2 {
		t.Fatalf("put across a leader change: version %d, %v", a.r.Entry.Version, a.err)
	}
	c.isolate(l.id, false)
	c.check()
}

// A batch that is proposed twice is applied once.
func TestReproposedBatchAppliesOnce(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	l.mustPut("k", "0")
	err := l.node.do(c.ctx(), func() {
		l.node.seq++
		data := kv.AppendBatch(nil, l.id, l.node.boot, l.node.seq, kv.AppendCommand(nil, &kv.Command{Op: kv.OpPut, Key: "k", Value: []byte("1")}))
		for range 3 {
			if err := l.node.raw.Propose(data); err != nil {
				t.Error(err)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	l.mustPut("after", "x") // behind the three
	e, _, err := l.store.get(c.ctx(), "k", readOptions{})
	if err != nil || e.Version != 2 || string(e.Value) != "1" {
		t.Fatalf("got %+v %v, want version 2", e, err)
	}
	c.check()
}

func TestNoLeaderRefusesAfterElectionTimeout(t *testing.T) {
	c := newCluster(t, 3, nil)
	n := c.follower()
	c.isolate(n.id, true)
	c.wait("the member to notice", func() bool { return n.store.leader() == 0 })
	start := time.Now()
	_, err := n.store.put(c.ctx(), "k", []byte("v"))
	if !errors.Is(err, errNoLeader) {
		t.Fatalf("put without a leader: %v", err)
	}
	_, _, err = n.store.get(c.ctx(), "k", readOptions{})
	if !errors.Is(err, errNoLeader) {
		t.Fatalf("get without a leader: %v", err)
	}
	if _, _, err = n.store.get(c.ctx(), "k", readOptions{stale: true}); !errors.Is(err, errKeyNotFound) {
		t.Fatalf("stale get without a leader: %v", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Fatalf("refused after %v", took)
	}
	c.isolate(n.id, false)
	c.check()
	if _, _, err := n.store.get(c.ctx(), "k", readOptions{}); !errors.Is(err, errKeyNotFound) {
		t.Fatalf("a refused write took effect: %v", err)
	}
}

// A proposal that raft has is unknown at its deadline, not refused.
func TestDeadlineAfterProposalIsUnknown(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	c.isolate(l.id, true)
	ctx, cancel := context.WithTimeout(c.ctx(), 3*testTick)
	defer cancel()
	_, err := l.store.put(ctx, "k", []byte("v"))
	if !errors.Is(err, errCommitTimeout) {
		t.Fatalf("a leader without followers answered %v, want unknown", err)
	}
	c.isolate(l.id, false)
	c.check()
}

// An old leader that is cut off must not serve what a newer one has changed.
func TestIsolatedLeaderServesNoStaleRead(t *testing.T) {
	c := newCluster(t, 3, nil)
	old := c.leader()
	old.mustPut("k", "old")
	c.isolate(old.id, true)
	read := make(chan string, 1)
	var other *testNode
	for _, n := range c.nodes {
		if n != old {
			other = n
		}
	}
	other.mustPut("k", "new") // commits under a new leader
	go func() {
		e, _, err := old.store.get(c.ctx(), "k", readOptions{})
		if err != nil {
			read <- err.Error()
			return
		}
		read <- string(e.Value)
	}()
	if got := <-read; got == "old" {
		t.Fatal("a deposed leader served an overwritten value")
	}
	if e, _, err := old.store.get(c.ctx(), "k", readOptions{stale: true}); err != nil || string(e.Value) != "old" {
		t.Fatalf("stale read: %q %v", e.Value, err)
	}
	c.isolate(old.id, false)
	old.mustGet("k", "new")
}

// Reads get lost without a word. They are tried again and end in time.
func TestLostReadIndexIsRetried(t *testing.T) {
	c := newCluster(t, 3, nil)
	f := c.follower()
	f.mustPut("k", "v")
	var mu sync.Mutex
	lost := 0
	c.net.dropIf(func(m *raftpb.Message) bool {
		mu.Lock()
		defer mu.Unlock()
		if m.GetType() == raftpb.MsgReadIndex && lost < 3 {
			lost++
			return true
		}
		return false
	})
	f.mustGet("k", "v")
	mu.Lock()
	defer mu.Unlock()
	if lost != 3 {
		t.Fatalf("%d requests were lost, the test meant 3", lost)
	}
}

// A single voter that is started again serves what it acknowledged.
func TestSingleVoterServesAfterRestart(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.leader()
	n.mustPut("k", "v")
	for range 5 {
		c.stop(1)
		n = c.start(1)
		n.mustGet("k", "v") // waits for the first commit of the new term
	}
}

// The only voter leads at once, with a change of members in its log that is still to
// be applied: while there is one raft does not campaign.
func TestSingleVoterLeadsAtOnce(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) { cfg.ElectionTicks = 100_000 })
	c.housekept() // its own start is noted in the log
	c.stop(1)
	c.start(1).mustGet("k", "v")
}

func TestMinRevision(t *testing.T) {
	c := newCluster(t, 3, nil)
	l, f := c.leader(), c.follower()
	r, err := l.store.put(c.ctx(), "k", []byte("v"))
	if err != nil {
		t.Fatal(err)
	}
	e, _, err := f.store.get(c.ctx(), "k", readOptions{stale: true, minRevision: r.Revision})
	if err != nil || string(e.Value) != "v" {
		t.Fatalf("read your write: %q %v", e.Value, err)
	}
	ctx, cancel := context.WithTimeout(c.ctx(), 2*testTick)
	defer cancel()
	if _, _, err := f.store.get(ctx, "k", readOptions{stale: true, minRevision: r.Revision + 1000}); !errors.Is(err, errReadTimeout) {
		t.Fatalf("a revision that never comes: %v", err)
	}
	if n := f.store.revision.Waiting(); n != 0 {
		t.Fatalf("%d waiters are left behind", n)
	}
}

func TestTransferLeader(t *testing.T) {
	c := newCluster(t, 3, nil)
	for range 5 {
		l, f := c.leader(), c.follower()
		if err := l.store.transferLeader(c.ctx(), f.id); err != nil {
			t.Fatalf("transfer from the leader: %v", err)
		}
		if err := l.store.transferLeader(c.ctx(), l.id); err != nil { // l follows now
			t.Fatalf("transfer from a follower: %v", err)
		}
	}
	if err := c.leader().store.transferLeader(c.ctx(), 99); !errors.Is(err, errTransferRefused) {
		t.Fatalf("transfer to nobody: %v", err)
	}
}

// Writes on every member go on while leadership is handed around: none fails.
func TestWritesDuringTransfers(t *testing.T) {
	c := newCluster(t, 3, nil)
	c.leader()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for _, n := range c.nodes {
		for w := range 4 {
			wg.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					if _, err := n.store.put(c.ctx(), fmt.Sprintf("%d/%d", n.id, w), fmt.Append(nil, i)); err != nil {
						t.Errorf("member %d: put %d: %v", n.id, i, err)
						return
					}
				}
			})
		}
	}
	for range 10 {
		l := c.leader()
		ctx, cancel := context.WithTimeout(c.ctx(), 5*time.Second)
		l.store.handOver(ctx)
		cancel()
	}
	close(stop)
	wg.Wait()
	c.check()
}

// Once one commit was not delivered, no later one may be: the apply loop would
// skip what lies between.
func TestStopLeavesNoHole(t *testing.T) {
	n := &raftNode{commitC: make(chan *commit, 64), stopC: make(chan struct{})}
	close(n.stopC)
	for i := range 64 {
		n.deliver(&commit{entries: []*raftpb.Entry{{Index: new(uint64(i + 1))}}})
	}
	close(n.commitC)
	last := uint64(0)
	for c := range n.commitC {
		if i := c.entries[0].GetIndex(); i != last+1 {
			t.Fatalf("entry %d would be applied after entry %d", i, last)
		} else {
			last = i
		}
	}
}

// A membership change that raft was given is unknown at its deadline, even if
// the leader is gone by then: the next one may commit it.
func TestProposedMembershipChangeIsUnknown(t *testing.T) {
	for _, end := range []string{"deadline", "stop"} {
		t.Run(end, func(t *testing.T) {
			c := newCluster(t, 3, nil)
			l := c.leader()
			c.check()
			c.net.dropIf(func(m *raftpb.Message) bool { return m.GetType() == raftpb.MsgAppResp && m.GetTo() == l.id })
			ctx, cancel := context.WithTimeout(c.ctx(), 100*testTick)
			defer cancel()
			last := l.node.progress.last.Load()
			errC := make(chan error, 1)
			go func() {
				_, _, err := l.store.addMember(ctx, memberSpec{ID: 9, PeerURL: "http://127.0.0.1:10009", Learner: true})
				errC <- err
			}()
			c.wait("the proposal", func() bool { return l.node.progress.last.Load() > last })
			if end == "stop" {
				if err := c.stop(l.id); err != nil {
					t.Error(err)
				}
			} else {
				c.isolate(l.id, true)
			}
			if err := <-errC; !errors.Is(err, errCommitTimeout) {
				t.Errorf("answered %v, want unknown", err)
			}
			c.net.dropIf(nil)
			if end != "stop" {
				c.isolate(l.id, false)
			}
			c.check()
		})
	}
}

// A single voter that loads its disk heavily still takes snapshots and
// membership changes: with one voter raft is never without a Ready.
func TestBusySingleVoterServesAll(t *testing.T) {
	c := newCluster(t, 1, small)
	if err := c.stop(1); err != nil {
		t.Fatal(err)
	}
	n := c.startWith(1, func(d *diskStore) logStore { return busyLog{d} })
	c.leader()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 64 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := n.store.put(c.ctx(), fmt.Sprint(w), []byte("v")); err != nil {
					t.Errorf("put: %v", err)
					return
				}
			}
		})
	}
	defer wg.Wait()
	defer close(stop)
	c.wait("snapshots under load", func() bool { return n.node.progress.snapshot.Load() > 100 })
	for i := range 3 {
		if err := n.store.updateMember(c.ctx(), 1, fmt.Sprintf("http://127.0.0.1:%d", 20000+i)); err != nil {
			t.Errorf("membership change under load: %v", err)
		}
	}
}

// busyLog has a slow disk, so that more commands always wait when a sync ends.
type busyLog struct{ *diskStore }

func (l busyLog) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	err := l.diskStore.save(hs, ents)
	if len(ents) > 0 {
		pause := time.NewTimer(3 * time.Millisecond)
		<-pause.C
	}
	return err
}

// newLeader is a single voter that was restarted, leads, and has committed nothing in
// its term yet. Nothing runs: the test turns its loop.
func newLeader(t *testing.T) *raftNode {
	t.Helper()
	c := newCluster(t, 1, nil)
	l := c.leader()
	if _, _, err := l.store.addMember(c.ctx(), memberSpec{ID: 2, PeerURL: "http://127.0.0.1:10002", Learner: true}); err != nil {
		t.Fatal(err)
	}
	if err := c.stop(1); err != nil {
		t.Fatal(err)
	}
	disk, err := openDataDir(l.cfg.DataDir, 1, 2, c.logger)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { disk.close() })
	r, err := disk.load()
	if err != nil {
		t.Fatal(err)
	}
	n, err := newRaftNode(l.cfg, 9, r, disk, disk, c.logger, l.node.met)
	if err != nil {
		t.Fatal(err)
	}
	n.tr = &memEnd{net: newMemnet(), n: l}
	n.commitC = make(chan *commit, 100) // nobody applies
	if err := n.ready(); err != nil {   // replay
		t.Fatal(err)
	}
	if err := n.raw.Campaign(); err != nil {
		t.Fatal(err)
	}
	for n.raw.BasicStatus().RaftState != raft.StateLeader {
		if err := n.ready(); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// raft lets a single voter answer ReadIndex before it has committed in its term:
// after a crash its commit index may lag behind what it acknowledged. So its own
// reads wait, and are asked for once the term has a commit.
func TestOwnReadWaitsForTheTerm(t *testing.T) {
	n := newLeader(t)
	n.now = soft{lead: 1, term: n.raw.BasicStatus().GetTerm(), state: raft.StateLeader} // as the next Ready will say
	n.reads.join()
	if n.issueReads(); len(n.reads.attempts) != 0 {
		t.Fatal("asked raft for an index before an entry of this term was committed")
	}
	for n.committedTerm != n.now.term {
		if err := n.ready(); err != nil {
			t.Fatal(err)
		}
	}
	if n.issueReads(); len(n.reads.attempts) != 1 {
		t.Error("the read was not asked for when the term had a commit")
	}
}

// The read of a learner reaches a single voter that leads and has committed
// nothing in its term yet. raft would answer with a commit index that may lag
// behind what was acknowledged before a crash.
func TestForwardedReadWaitsForTheTerm(t *testing.T) {
	n := newLeader(t)
	n.step(&raftpb.Message{Type: raftpb.MsgReadIndex.Enum(), From: new(uint64(2)), To: new(uint64(1)),
		Entries: []*raftpb.Entry{{Data: []byte("0123456789abcdef")}}})
	for _, m := range n.raw.Ready().Messages {
		if m.GetType() == raftpb.MsgReadIndexResp {
			t.Fatalf("told member 2 that entry %d is enough before an entry of this term was committed", m.GetIndex())
		}
	}
}
