package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

// damages are ways to lose what was synced, done to a member that is stopped.
var damages = map[string]func(t *testing.T, d *diskStore){
	"the end of the log": func(t *testing.T, d *diskStore) {
		names := segments(t, d.dir)
		rewrite(t, names[len(names)-1], func(b []byte) []byte {
			size := len(used(t, names[len(names)-1]))
			clear(b[size*2/3:])
			return b
		})
	},
	"a bit of the log": func(t *testing.T, d *diskStore) {
		names := segments(t, d.dir)
		rewrite(t, names[len(names)-1], func(b []byte) []byte {
			b[len(used(t, names[len(names)-1]))/2] ^= 4
			return b
		})
	},
	"all snapshots": func(t *testing.T, d *diskStore) {
		files, err := d.snapshotFiles()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			rewrite(t, d.snapPath(f), func(b []byte) []byte { return b[:len(b)/2] })
		}
	},
	"the whole log": func(t *testing.T, d *diskStore) {
		if err := os.RemoveAll(d.walDir()); err != nil {
			t.Fatal(err)
		}
	},
	"log and snapshots": func(t *testing.T, d *diskStore) {
		if err := errors.Join(os.RemoveAll(d.walDir()), os.RemoveAll(d.snapDir())); err != nil {
			t.Fatal(err)
		}
	},
}

// A member whose disk lost something heals by itself, under load, and nothing that
// was acknowledged is lost.
func TestStandAsideAndHeal(t *testing.T) {
	smallSegments(t, 1<<20)
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, 3, nil)
			l, f := c.leader(), c.follower()
			l.fill("before", 50)
			c.check()
			c.stop(f.id)
			damage(t, f.disk)
			acked := make(chan []string)
			healed := make(chan struct{})
			go func() { acked <- l.putUntil(healed) }()
			f = c.start(f.id)
			if !f.node.aside.stands() || f.store.readyAside() == nil {
				t.Fatal("it starts as if nothing had happened")
			}
			c.wait("it to vote again", func() bool { return !f.node.aside.stands() })
			close(healed)
			keys := <-acked
			c.check() // it has applied all
			for _, key := range append(keys, "before00049") {
				if _, _, err := f.store.get(c.ctx(), key, readOptions{stale: true}); err != nil {
					t.Errorf("get %q: %v", key, err)
				}
			}
			if got, want := f.stateHash(), c.leader().stateHash(); got != want {
				t.Error("the states differ")
			}
			if _, err := os.Stat(filepath.Join(f.cfg.DataDir, "aside")); err == nil {
				t.Error("the file is left")
			}
			c.stop(f.id)
			f = c.start(f.id) // as any other
			if f.node.aside.stands() {
				t.Error("it stands aside again after a restart")
			}
			c.check()
		})
	}
}

// putUntil writes until end is closed and returns what was acknowledged. While
// leadership moves a write may be refused.
func (n *testNode) putUntil(end <-chan struct{}) (acked []string) {
	for i := 0; ; i++ {
		select {
		case <-end:
			return acked
		default:
		}
		key := fmt.Sprint("during", i)
		_, err := n.store.put(n.c.ctx(), key, []byte(key))
		if err == nil {
			acked = append(acked, key)
		} else if !errors.Is(err, errNoLeader) && !errors.Is(err, errCommitTimeout) {
			n.c.t.Errorf("put: %v", err)
		}
	}
}

// readyAside is the check of /readyz that tells of it.
func (s *kvstore) readyAside() error {
	for _, c := range s.checks(context.Background()) {
		if c.name == "log whole" {
			return c.err
		}
	}
	return nil
}

// An entry is acknowledged by A and B only, B loses it, and A is cut off. B and C
// are two of three: they must not elect a leader that never had the entry.
func TestNoLossWithTheOnlyCopyElsewhere(t *testing.T) {
	smallSegments(t, 1<<20)
	for _, name := range []string{"the end of the log", "the whole log"} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, 3, nil)
			a := c.leader()
			c.check()
			b, other := c.nodes[a.id%3+1], c.nodes[(a.id+1)%3+1]
			c.isolate(other.id, true)
			a.mustPut("only here", "v")
			c.stop(b.id)
			c.isolate(a.id, true)
			c.net.partition(a.id, b.id, true) // it is no member that runs
			damages[name](t, b.disk)
			b = c.start(b.id)
			c.net.partition(b.id, other.id, false)

			// They talk, and C campaigns again and again.
			campaigns := 0
			seen := make(chan struct{}, 1<<10)
			c.net.dropIf(func(m *raftpb.Message) bool {
				if m.GetFrom() == other.id && m.GetTo() == b.id && (m.GetType() == raftpb.MsgPreVote || m.GetType() == raftpb.MsgVote) {
					select {
					case seen <- struct{}{}:
					default:
					}
				}
				return false
			})
			for campaigns < 5 {
				<-seen
				campaigns++
				if err := other.node.do(c.ctx(), func() { other.node.warn("campaign", other.node.raw.Campaign()) }); err != nil {
					t.Fatal(err)
				}
				for _, n := range []*testNode{b, other} {
					if l := n.store.leader(); l == b.id || l == other.id {
						t.Fatalf("members %d and %d elected %d, which never had the entry", b.id, other.id, l)
					}
				}
			}
			c.net.dropIf(nil)
			c.isolate(a.id, false)
			c.leader()
			a.mustGet("only here", "v")
			c.wait("it to vote again", func() bool { return !b.node.aside.stands() })
			b.mustGet("only here", "v")
			c.check()
		})
	}
}

// A leader that counts what is lost is refused until another was elected without
// this member: A leads, B loses an entry that only they have, and C comes back.
// If B followed A in the same term, A would count B for what it does not have.
func TestOldLeaderIsNotFollowed(t *testing.T) {
	smallSegments(t, 1<<20)
	c := newCluster(t, 3, nil)
	a := c.leader()
	c.check()
	b, other := c.nodes[a.id%3+1], c.nodes[(a.id+1)%3+1]
	term := a.node.soft.Load().term
	c.isolate(other.id, true)
	a.mustPut("k", "v")
	c.stop(b.id)
	damages["the end of the log"](t, b.disk)
	b = c.start(b.id)
	if got := b.node.aside.term.Load(); got != term {
		t.Fatalf("stands aside up to term %d, its promises went up to %d", got, term)
	}
	c.isolate(other.id, false)
	c.wait("it to vote again", func() bool { return !b.node.aside.stands() })
	if err := b.node.do(c.ctx(), func() {
		last, err := b.node.mem.Term(b.node.stable)
		if err != nil || last <= term {
			t.Errorf("it votes again with a log that ends in term %d, %v", last, err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	b.mustGet("k", "v")
	c.check()
}

// It stands aside until it has caught up, over restarts and over more damage.
func TestStandsAsideOverRestarts(t *testing.T) {
	smallSegments(t, 1<<20)
	c := newCluster(t, 3, nil)
	c.leader().fill("k", 20)
	c.check()
	f := c.follower()
	c.stop(f.id)
	damages["the whole log"](t, f.disk)
	var term uint64
	for round := range 4 {
		f = c.startCut(f.id)
		got := f.node.aside.term.Load()
		if got == 0 {
			t.Fatalf("round %d: it votes", round)
		}
		if term != 0 && got < term {
			t.Fatalf("round %d: it stands aside up to term %d, before up to %d", round, got, term)
		}
		term = got
		c.stop(f.id)
		if round == 1 {
			damages["a bit of the log"](t, f.disk)
		}
	}
	dirs, err := filepath.Glob(filepath.Join(f.cfg.DataDir, "damaged-*"))
	if err != nil || len(dirs) != 1 {
		t.Errorf("of what was damaged is kept: %v, %v; want the newest", dirs, err)
	}
	c.isolate(f.id, false)
	f = c.start(f.id)
	c.wait("it to vote again", func() bool { return !f.node.aside.stands() })
	c.check()
}

// startCut starts a member that nobody can reach.
func (c *cluster) startCut(id uint64) *testNode {
	c.isolate(id, true)
	return c.start(id)
}

// With fewer than three voters nobody else has all that was committed.
func TestTooFewVotersStandAside(t *testing.T) {
	smallSegments(t, 1<<20)
	for _, voters := range []int{1, 2} {
		c := newCluster(t, voters, nil)
		c.leader().mustPut("k", "v")
		c.check()
		c.stop(uint64(voters))
		d := openTestDir2(t, c.config(uint64(voters)).DataDir, uint64(voters))
		damages["the end of the log"](t, d)
		d.mustClose(t)
		for range 2 {
			_, err := c.tryStart(uint64(voters), nil)
			if !errors.Is(err, errRefuse) || !strings.Contains(err.Error(), fmt.Sprintf("of %d voters", voters)) || !strings.Contains(err.Error(), "it takes 3") {
				t.Errorf("%d voters: %v", voters, err)
			}
		}
		if _, err := os.Stat(d.walDir()); err != nil {
			t.Errorf("%d voters: the log was touched: %v", voters, err)
		}
	}
}

func openTestDir2(t *testing.T, dir string, id uint64) *diskStore {
	t.Helper()
	d, err := openDataDir(dir, id, 2, quietLog)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// A crash at any step of standing aside leaves a member that stands aside.
func TestStandAsideInterrupted(t *testing.T) {
	smallSegments(t, 1<<16)
	w := writeLog(t, 30, 20)
	three := bootstrapMembership("x", []clusterURL{{1, testURL(1)}, {2, testURL(2)}, {3, testURL(3)}})
	three.ClusterID = soleFounder().ClusterID
	rewrite(t, segments(t, w.dir)[0], func(b []byte) []byte { clear(b[len(used(t, segments(t, w.dir)[0]))-600:]); return b })
	for steps := 0; ; steps++ {
		dir := image(t, w.dir)
		d := openTestDir(t, dir)
		if err := d.openMark(); err != nil {
			t.Fatal(err)
		}
		a := &asideFile{Term: d.marked.hardTerm, Cluster: d.owner.cluster, Member: d.owner.member, Number: 1}
		if err := d.writeAside(a); err != nil {
			t.Fatal(err)
		}
		all := d.asideSteps(a)
		if steps > len(all) {
			break
		}
		for _, step := range all[:steps] {
			if err := step(); err != nil {
				t.Fatal(err)
			}
		}
		dir = image(t, dir)
		d.mustClose(t)
		for range 2 {
			d := openTestDir(t, dir)
			r, err := d.loadOrStandAside(func() *membership { return three })
			if err != nil {
				t.Fatalf("after %d steps: %v", steps, err)
			}
			if r.aside == nil || r.aside.term != 1 || r.snap.Index != 0 || len(r.entries) > 0 || r.hard.GetTerm() != 2 || r.meta.ClusterID != three.ClusterID {
				t.Errorf("after %d steps: %+v, hard state %v, %d entries", steps, r.aside, r.hard, len(r.entries))
			}
			d.mustClose(t)
			for _, kept := range []string{"wal", "snap"} {
				if _, err := os.Stat(filepath.Join(dir, "damaged-1", kept)); err != nil {
					t.Errorf("after %d steps: %v", steps, err)
				}
			}
		}
	}
}

// Nobody hands leadership to the member that cannot take it, nor for a newer term.
func TestYieldTo(t *testing.T) {
	c := newCluster(t, 3, nil)
	c.check()
	c.wait("a decision", func() (decided bool) {
		l, f := c.leader(), c.follower()
		if err := l.node.do(c.ctx(), func() {
			term := l.node.now.term
			// Where the choice is free, both followers are as far.
			if l.node.now.state != raft.StateLeader || l.node.successor(raft.None) != f.id {
				return
			}
			decided = true
			for _, x := range []struct {
				req  asideRequest
				want uint64
			}{{asideRequest{f.id, term}, 6 - l.id - f.id}, {asideRequest{f.id, term + 1}, 6 - l.id - f.id}, {asideRequest{f.id, term - 1}, raft.None}, {asideRequest{l.id, term}, raft.None}} {
				if got := l.node.heir(x.req); got != x.want {
					t.Errorf("member %d leads in term %d, and for %+v it would hand over to %d, not %d", l.id, term, x.req, got, x.want)
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
		return decided
	})
	l := c.leader()
	term := l.node.soft.Load().term
	c.wait("a later term", func() bool {
		if err := l.node.do(c.ctx(), func() { l.node.yieldTo(asideRequest{l.id%3 + 1, term}) }); err != nil {
			t.Fatal(err)
		}
		return l.node.soft.Load().term > term
	})
	c.check()
}

// The rules one by one, on a loop without a disk: T is 5.
// Leadership moves for a member of this cluster that stands aside, and for nobody else.
func TestWhoMayAskToYield(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { cfg.ElectionTicks = 20 })
	l := c.leader()
	c.housekept()
	c.quiet()
	srv, tr := peerPort(t, l)
	f, term := l.id%3+1, l.node.soft.Load().term
	ask := func(cluster types.ID, version string, req asideRequest) int {
		r, err := http.NewRequest(http.MethodPost, srv.URL+asidePath, bytes.NewReader(marshalJSON(t, req)))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-Etcd-Cluster-ID", cluster.String())
		r.Header.Set("X-Server-Version", version)
		resp, err := srv.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	l.unhurt(t, func() {
		for _, x := range []struct {
			name    string
			cluster types.ID
			version string
			req     asideRequest
			want    int
		}{
			{"another cluster", tr.ClusterID + 1, peerVersion, asideRequest{f, term}, 412},
			{"no version", tr.ClusterID, "", asideRequest{f, term}, 412},
			{"no member", tr.ClusterID, peerVersion, asideRequest{77, term}, 400},
			{"a term that no election reaches", tr.ClusterID, peerVersion, asideRequest{f, term + maxTermJump + 1}, 400},
			{"no term", tr.ClusterID, peerVersion, asideRequest{f, 0}, 400},
			{"an older term", tr.ClusterID, peerVersion, asideRequest{f, term - 1}, 200},
		} {
			if status := ask(x.cluster, x.version, x.req); status != x.want {
				t.Errorf("%s: %d, want %d", x.name, status, x.want)
			}
		}
	})
	info, err := postAside(c.ctx(), srv.URL, uint64(tr.ClusterID), marshalJSON(t, asideRequest{f, term}))
	if err != nil || info.Member != l.id {
		t.Fatalf("%+v, %v", info, err)
	}
	c.wait("a later term", func() bool { return l.node.soft.Load().term > term })
	c.check()
}

func TestAsideRules(t *testing.T) {
	b := newBenchNode(t)
	ended := 0
	b.aside.init(&aside{5, func() error { ended++; return nil }})
	if err := b.raw.Step(message(raftpb.MsgHeartbeat, 2, 6)); err != nil { // the new log begins in term 6
		t.Fatal(err)
	}
	b.settle(t)
	b.sent = nil
	give := func(m *raftpb.Message) {
		t.Helper()
		if err := b.receive(m); err != nil {
			t.Fatal(err)
		}
		b.settle(t)
	}
	sent := func(typ raftpb.MessageType) (found *raftpb.Message) {
		for _, m := range b.sent {
			if m.GetType() == typ {
				found = m
			}
		}
		b.sent = nil
		return found
	}
	appends := func(from, term, index, logTerm uint64, ents ...*raftpb.Entry) *raftpb.Message {
		m := message(raftpb.MsgApp, from, term)
		m.Index, m.LogTerm, m.Commit, m.Entries = new(index), new(logTerm), new(uint64(1)), ents
		return m
	}
	stands := func(when string, want bool) {
		t.Helper()
		if b.aside.stands() != want || (ended == 0) != want {
			t.Fatalf("%s: it stands aside: %v, the file was removed %d times", when, b.aside.stands(), ended)
		}
	}

	// It gives no vote, to nobody, and does not campaign.
	for _, typ := range []raftpb.MessageType{raftpb.MsgPreVote, raftpb.MsgVote, raftpb.MsgTimeoutNow} {
		m := message(typ, 3, 9)
		m.Index, m.LogTerm = new(uint64(100)), new(uint64(8))
		give(m)
		if len(b.sent) > 0 {
			t.Errorf("%v is answered with %v", typ, b.sent[0].GetType())
		}
	}
	for range 20 * b.cfg.ElectionTicks {
		b.tick()
		b.settle(t)
	}
	if m := sent(raftpb.MsgPreVote); m != nil || b.now.state != raft.StateFollower || b.now.term != 6 {
		t.Errorf("it campaigns: %v, %v in term %d", m, b.now.state, b.now.term)
	}

	// An old leader is left alone for a while, also before the first tick, and then
	// told of the newer term.
	start := &asideState{}
	start.init(&aside{5, nil})
	for tick := range uint64(asidePatience) {
		if !start.drops(message(raftpb.MsgHeartbeat, 2, 5), tick) {
			t.Errorf("an old leader is answered at tick %d", tick)
		}
	}
	last := b.stable
	for _, m := range []*raftpb.Message{appends(2, 5, last, 1, entry(last+1, 5)), message(raftpb.MsgHeartbeat, 2, 4)} {
		b.aside.heard = 0
		give(m)
		if len(b.sent) > 0 {
			t.Errorf("an old leader is answered at once with %v", b.sent[0].GetType())
		}
		for range asidePatience {
			b.tick()
		}
		give(m)
		if r := sent(raftpb.MsgAppResp); r.GetTerm() != 6 || b.stable != last {
			t.Errorf("an old leader is answered with %v, and the log goes to entry %d", r, b.stable)
		}
	}

	// A new leader is followed, but its old entries prove nothing.
	give(appends(3, 7, last, 1, entry(last+1, 5)))
	if r := sent(raftpb.MsgAppResp); r.GetReject() || r.GetIndex() != last+1 {
		t.Fatalf("a new leader is answered with %v", r)
	}
	stands("with the entries of terms up to 5", true)
	give(appends(3, 7, last+1, 5, entry(last+2, 7)))
	stands("with an entry of term 7", false)
	m := message(raftpb.MsgVote, 2, 8)
	m.Index, m.LogTerm, m.Context = new(last+2), new(uint64(7)), []byte("CampaignTransfer")
	give(m)
	if r := sent(raftpb.MsgVoteResp); r == nil || r.GetReject() {
		t.Errorf("it does not vote again: %v", r)
	}
}

// A crash between the entry that ends it and the end: the next start makes up for it.
// And with entries of up to T only, it stands aside as before.
func TestAsideEndsAtStart(t *testing.T) {
	smallSegments(t, 1<<16)
	for _, x := range []struct {
		aside uint64 // the log ends in term 1
		want  bool
	}{{1, true}, {2, true}, {0, false}} {
		w := writeLog(t, 10)
		d := openTestDir(t, w.dir)
		if err := d.writeAside(&asideFile{Term: x.aside, Cluster: soleFounder().ClusterID, Member: 1, Number: 1, Moved: true}); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			r, err := d.load()
			if err != nil || (r.aside != nil) != x.want {
				t.Errorf("promises up to term %d: %+v, %v", x.aside, r.aside, err)
			}
			if a, err := d.readAside(); err != nil || (a != nil) != x.want {
				t.Errorf("promises up to term %d: the file is there: %v, %v", x.aside, a != nil, err)
			}
			d.mustClose(t)
			d = openTestDir(t, w.dir)
		}
		d.mustClose(t)
	}
}

// A file that is damaged is no leave to vote.
func TestDamagedAsideIsRefused(t *testing.T) {
	smallSegments(t, 1<<16)
	w := writeLog(t, 10)
	d := openTestDir(t, w.dir)
	if err := d.writeAside(&asideFile{Term: 9, Cluster: soleFounder().ClusterID, Member: 1, Number: 1, Moved: true}); err != nil {
		t.Fatal(err)
	}
	d.mustClose(t)
	good, err := os.ReadFile(filepath.Join(w.dir, "aside"))
	if err != nil {
		t.Fatal(err)
	}
	tried := 0
	for bit := range len(good) * 8 {
		bad := slices.Clone(good)
		bad[bit/8] ^= 1 << (bit % 8)
		for _, b := range [][]byte{bad, good[:bit/8]} {
			if err := os.WriteFile(filepath.Join(w.dir, "aside"), b, 0o600); err != nil {
				t.Fatal(err)
			}
			tried++
			if _, err := openDataDir(w.dir, 1, 2, quietLog); !errors.Is(err, errRefuse) || !strings.Contains(err.Error(), "aside") {
				t.Fatalf("%q: %v", b, err)
			}
		}
	}
	if tried < 1000 {
		t.Errorf("only %d were tried", tried)
	}
}

// Real processes, under load: the damaged member asks the leader to hand over, and
// once it has healed a majority stands with it.
func TestProcessStandAside(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	hurt := s.others(s.leader())[0]
	rest := s.others(hurt)
	l := s.load(rest...)
	said := func(what string) bool {
		return slices.ContainsFunc(rest, func(id int) bool { return strings.Contains(s.nodes[id].stderr.String(), what) })
	}
	// On a machine that is busy leadership may move by itself before anybody asks.
	for attempt := 0; attempt < 3 && !said("handing over leadership"); attempt++ {
		l.grow(100)
		s.nodes[hurt].crash()
		log, frames := logFrames(t, s.data(hurt))
		middle := frames[len(frames)/2]
		flipBit(t, log, middle.data+middle.size-1)
		began := time.Now()
		s.start(hurt)
		l.grow(100)
		t.Logf("healed after %v, no write for %v", time.Since(began).Round(time.Millisecond), l.gap(began).Round(time.Millisecond))
		for _, what := range []string{"stands aside", "votes again"} {
			if out := s.nodes[hurt].stderr.String(); !strings.Contains(out, what) || strings.Contains(out, replaceHint) {
				t.Fatalf("it does not say %q, or that it is to be removed:\n%s", what, tail(out, 10))
			}
		}
		if gap := l.gap(began); gap > maxWriteGap {
			t.Errorf("writes stopped for %v", gap)
		}
	}
	if !said("handing over leadership") {
		t.Error("no leader handed over")
	}
	l.stop()
	s.nodes[rest[0]].crash()
	delete(s.nodes, rest[0])
	s.leader()
	l.verify()
	s.nodes[hurt].put("my-key", "hello")
}
