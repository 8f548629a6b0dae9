package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"pontoon/internal/watch"
	"pontoon/kv"
)

// newFaultyCluster starts three founders, one of which can be given a fault: from
// then on change alters the commands that it applies.
func newFaultyCluster(t *testing.T, n int, change func(*kv.Command), cfg func(*Config)) (c *cluster, faulty *atomic.Uint64) {
	t.Helper()
	faulty = new(atomic.Uint64)
	c = makeCluster(t, cfg)
	c.differ = true
	c.tamper = func(id uint64, e *raftpb.Entry) *raftpb.Entry {
		var b kv.Batch
		if id != faulty.Load() || e.GetType() != raftpb.EntryNormal || kv.DecodeBatch(e.GetData(), &b) != nil {
			return e
		}
		var commands [][]byte
		for i := range b.Commands {
			change(&b.Commands[i])
			commands = append(commands, kv.AppendCommand(nil, &b.Commands[i]))
		}
		out := proto.Clone(e).(*raftpb.Entry)
		out.Data = kv.AppendBatch(nil, b.Node, b.Boot, b.Seq, commands...)
		return out
	}
	c.startAll(n)
	return c, faulty
}

// The faults: what a member makes of a command.
var (
	wrongValue = func(c *kv.Command) {
		if c.Op == kv.OpPut && c.Key == "wrong" {
			c.Value = []byte("wronged")
		}
	}
	// The state comes out the same; the answer does not.
	wrongAnswer = func(c *kv.Command) {
		if c.Op == kv.OpDelete && c.Key == "wrong" {
			c.If.Kind = kv.CheckExists
		}
	}
)

// flip changes a bit of a value in the member's memory.
func (n *testNode) flip(key string) {
	n.c.t.Helper()
	n.store.mu.Lock()
	defer n.store.mu.Unlock()
	e, ok := n.store.mu.state.Get(key)
	if !ok {
		n.c.t.Fatalf("no key %q", key)
	}
	e.Value[0] ^= 4
}

// compared waits until all members have compared all that there is.
func (c *cluster) compared() {
	c.t.Helper()
	c.wait("the last mark", func() bool {
		for _, n := range c.nodes {
			if w := n.node.testimony.Load(); w == nil || !w.mark.whole || w.wanted {
				return false
			}
		}
		return true
	})
}

func (n *testNode) awaitStanding(want standing) {
	n.c.t.Helper()
	n.c.wait(fmt.Sprintf("member %d that %v", n.id, want), func() bool { return n.store.standing() == want })
}

// refusesClients checks that nothing comes out of the member's state.
func (n *testNode) refusesClients(want error) {
	n.c.t.Helper()
	for _, o := range []readOptions{{}, {stale: true}, {minRevision: 1}, {stale: true, revision: 1}} {
		ctx, cancel := context.WithTimeout(n.c.ctx(), 100*time.Millisecond)
		if _, _, err := n.store.get(ctx, "good", o); !errors.Is(err, want) {
			n.c.t.Errorf("member %d, get with %+v: %v", n.id, o, err)
		}
		cancel()
	}
	ctx, cancel := context.WithTimeout(n.c.ctx(), 100*time.Millisecond)
	defer cancel()
	if err := n.store.read(ctx, readOptions{stale: true}, true, func(*kv.View) error { return nil }); !errors.Is(err, want) {
		n.c.t.Errorf("member %d, list: %v", n.id, err)
	}
	if _, err := n.store.history(ctx, readOptions{stale: true}); !errors.Is(err, want) {
		n.c.t.Errorf("member %d, history: %v", n.id, err)
	}
	if _, err := n.store.lease(ctx, 1, readOptions{stale: true}); !errors.Is(err, want) {
		n.c.t.Errorf("member %d, lease: %v", n.id, err)
	}
	if _, err := n.store.put(ctx, "refused", nil); !errors.Is(err, want) {
		n.c.t.Errorf("member %d, put: %v", n.id, err)
	}
	if _, _, _, err := n.store.subscribe(watch.Filter{Prefixes: []string{""}}, true); !errors.Is(err, want) {
		n.c.t.Errorf("member %d, watch: %v", n.id, err)
	}
}

// Any one member that differs is found out, whether it leads or not, and it alone stops.
func TestDivergedMemberStopsServing(t *testing.T) {
	for name, fault := range map[string]struct {
		change func(*kv.Command)
		inject func(n *testNode, others []*testNode)
	}{
		"value in memory": {func(*kv.Command) {}, func(n *testNode, _ []*testNode) { n.flip("good") }},
		"value in memory that is overwritten": {func(*kv.Command) {}, func(n *testNode, others []*testNode) {
			n.flip("good")
			others[0].mustPut("good", "1")
		}},
		"value applied": {wrongValue, func(_ *testNode, others []*testNode) { others[0].mustPut("wrong", "right") }},
		"answer": {wrongAnswer, func(_ *testNode, others []*testNode) {
			if _, err := others[0].store.delete(others[0].c.ctx(), "wrong"); err != nil {
				others[0].c.t.Error(err)
			}
		}},
	} {
		for _, leads := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, leader %v", name, leads), func(t *testing.T) {
				t.Parallel()
				c, faulty := newFaultyCluster(t, 3, fault.change, nil)
				bad := c.follower()
				if leads {
					bad = c.leader()
				}
				bad.mustPut("good", "1")
				var others []*testNode
				for _, id := range slices.Sorted(maps.Keys(c.nodes)) {
					if n := c.nodes[id]; n != bad {
						others = append(others, n)
						n.mustGet("good", "1")
					}
				}
				w, _, _, err := bad.store.subscribe(watch.Filter{Prefixes: []string{""}}, false)
				if err != nil {
					t.Fatal(err)
				}
				defer w.Close()
				c.compared() // so that answers count
				faulty.Store(bad.id)
				fault.inject(bad, others)
				bad.awaitStanding(diverged)
				bad.refusesClients(errDiverged)
				c.wait("the watch to be cut", func() bool { _, st := w.Take(make([]watch.Message, 8)); return st.Cut })
				c.wait("another leader", func() bool { l := others[0].store.leader(); return l != 0 && l != bad.id })
				for _, n := range others {
					n.mustPut("after", "2")
					n.mustGet("good", "1")
					n.mustGet("after", "2")
					if st := n.store.standing(); st != agrees {
						t.Errorf("member %d %v", n.id, st)
					}
				}
				// It still votes and acknowledges: with one of the others gone the last
				// one goes on.
				gone := others[0]
				c.stop(gone.id)
				others[1].mustPut("after", "3")
				others[1].mustGet("after", "3")
				c.start(gone.id)

				// A restart makes the state anew.
				faulty.Store(0)
				c.stop(bad.id)
				n := c.start(bad.id)
				n.mustGet("good", "1")
				n.mustGet("after", "3")
				c.check()
			})
		}
	}
}

// With the pace of a real member: the difference is known within two seconds, and the
// snapshot that was written in between is not what the next start begins with.
func TestDivergenceIsReportedInTime(t *testing.T) {
	t.Parallel()
	c, faulty := newFaultyCluster(t, 3, wrongValue, func(cfg *Config) { cfg.TickInterval = 100 * time.Millisecond })
	l, bad := c.leader(), c.follower()
	l.mustPut("good", "1")
	bad.mustGet("good", "1")
	c.compared()
	faulty.Store(bad.id)
	begin := time.Now()
	l.mustPut("wrong", "right")
	<-bad.store.applied.Wait(l.store.applied.At())
	bad.node.requestSnapshot()
	c.wait("a snapshot of the wrong state", func() bool { return bad.node.progress.snapshot.Load() > 1 })
	snapshot := bad.node.progress.snapshot.Load()
	bad.awaitStanding(diverged)
	took := time.Since(begin)
	t.Logf("found out after %v", took)
	if took > 2*time.Second {
		t.Errorf("found out after %v", took)
	}
	c.wait("the snapshot to be set aside", func() bool {
		_, err := os.Stat(bad.disk.snapPath(snapshot))
		return errors.Is(err, os.ErrNotExist)
	})
	if left, _ := filepath.Glob(filepath.Join(bad.disk.snapDir(), "*"+divergedSuffix)); len(left) != 1 {
		t.Errorf("set aside: %v", left)
	}
	if err := bad.node.do(c.ctx(), func() {
		if s, err := bad.node.mem.Snapshot(); err == nil {
			t.Errorf("it would send the snapshot of entry %d", s.GetMetadata().GetIndex())
		}
	}); err != nil {
		t.Fatal(err)
	}
	l.mustPut("more", "1")
	<-bad.store.applied.Wait(l.store.applied.At())
	faulty.Store(0)
	c.stop(bad.id)
	if got := bad.node.progress.snapshot.Load(); got != snapshot {
		t.Errorf("wrote another snapshot, of entry %d", got)
	}
	n := c.start(bad.id)
	if got := n.node.progress.snapshot.Load(); got != 1 {
		t.Errorf("began with the snapshot of entry %d", got)
	}
	n.mustGet("wrong", "right")
	c.check()
}

// Two voters cannot tell which of them is wrong: neither serves, until the third is
// back, and nothing is answered meanwhile.
func TestDoubtEndsWithAMajority(t *testing.T) {
	c, faulty := newFaultyCluster(t, 3, wrongValue, nil)
	l := c.leader()
	l.mustPut("good", "1")
	var bad, third *testNode
	for _, n := range c.nodes {
		switch {
		case n == l:
		case bad == nil:
			bad = n
		default:
			third = n
		}
	}
	c.stop(third.id)
	c.compared()
	faulty.Store(bad.id)
	wrong := l.store.applied.At() + 1
	l.mustPut("wrong", "right")
	l.awaitStanding(doubts)
	bad.awaitStanding(doubts)
	l.refusesClients(errDoubted)
	bad.refusesClients(errDoubted)
	c.start(third.id)
	bad.awaitStanding(diverged)
	l.awaitStanding(agrees)
	c.nodes[third.id].mustGet("wrong", "right")
	l.mustPut("good", "2")
	l.mustGet("good", "2")
	c.stop(bad.id)
	if bad.store.div.agreed >= wrong {
		t.Errorf("snapshots up to entry %d count as good, and it differs since entry %d", bad.store.div.agreed, wrong)
	}
}

// The operator settles it where no third member comes back. Meanwhile no time passes
// in the state, and a write that was under way when the doubt arose is not answered.
func TestDoubtEndsWithARemoval(t *testing.T) {
	c, faulty := newFaultyCluster(t, 2, wrongValue, nil)
	l, bad := c.leader(), c.follower()
	if _, err := l.store.propose(c.ctx(), &kv.Command{Op: kv.OpGrant, TTL: time.Hour}); err != nil {
		t.Fatal(err)
	}
	faulty.Store(bad.id)
	l.mustPut("wrong", "right")
	l.awaitStanding(doubts)
	bad.awaitStanding(doubts)
	late := &proposal{command: kv.AppendCommand(nil, &kv.Command{Op: kv.OpPut, Key: "late"}), done: make(chan struct{}, 1)}
	l.node.proposeC <- late // past fit, as if it had come before
	clock := func() (clock, revision int64) {
		l.store.mu.RLock()
		defer l.store.mu.RUnlock()
		return l.store.mu.state.Clock(), l.store.mu.state.Revision()
	}
	c.wait("the write", func() bool { _, r := clock(); return r == 2 })
	before, _ := clock()
	tick := l.tick()
	c.wait("some ticks", func() bool { return l.tick() > tick+20 })
	if now, _ := clock(); now != before {
		t.Errorf("the clock went from %d to %d", before, now)
	}
	if len(late.done) != 0 {
		t.Error("answered in doubt")
	}
	if err := l.store.removeMember(c.ctx(), bad.id, false); err != nil {
		t.Fatal(err)
	}
	l.awaitStanding(agrees)
	l.mustGet("wrong", "right")
	if <-late.done; late.err != nil || late.result.Revision != 2 {
		t.Errorf("the write: %+v, %v", late.result, late.err)
	}
}

// A snapshot of the leader replaces a state that has diverged.
func TestDivergedMemberTakesOverASnapshot(t *testing.T) {
	c, faulty := newFaultyCluster(t, 3, wrongValue, func(cfg *Config) { cfg.SnapshotEntries, cfg.CatchUpBytes = 50, 2<<10 })
	l, bad := c.leader(), c.follower()
	faulty.Store(bad.id)
	l.mustPut("wrong", "right")
	bad.awaitStanding(diverged)
	faulty.Store(0)
	c.wait("a healthy leader", func() bool { l = c.leader(); return l != bad })
	c.isolate(bad.id, true)
	for i := range 200 {
		l.mustPut(fmt.Sprint("k", i%10), strings.Repeat("x", 200))
	}
	c.isolate(bad.id, false)
	bad.awaitStanding(agrees)
	bad.mustGet("wrong", "right")
	bad.mustPut("wrong", "written by it")
	c.check()
}

// The writer of a snapshot finds what no command has touched, and the process lives on.
func TestSnapshotOfBrokenStateIsNotWritten(t *testing.T) {
	c, _ := newFaultyCluster(t, 1, wrongValue, nil)
	n := c.leader()
	n.mustPut("good", "1")
	n.node.requestSnapshot()
	c.wait("a snapshot", func() bool { return n.node.progress.snapshot.Load() > 1 })
	good := n.node.progress.snapshot.Load()
	n.flip("good")
	n.store.mu.Lock()
	state := n.store.mu.state.Clone()
	n.store.mu.Unlock()
	if _, err := n.disk.writeSnapshot(snapHeader{Index: 99, Term: 1, Members: n.node.members.Load()}, state); !errors.Is(err, kv.ErrBroken) {
		t.Fatalf("got %v", err)
	}
	n.node.requestSnapshot()
	n.awaitStanding(diverged)
	if got := n.node.progress.snapshot.Load(); got != good {
		t.Errorf("there is a snapshot of entry %d", got)
	}
	if err := n.node.do(c.ctx(), func() {}); err != nil {
		t.Fatal(err)
	}
	if names, _ := filepath.Glob(filepath.Join(n.disk.snapDir(), "*")); len(names) != 2 {
		t.Errorf("files: %v", names)
	}
	c.stop(1)
	n = c.start(1)
	n.mustGet("good", "1")
	if got := n.node.progress.snapshot.Load(); got != good {
		t.Errorf("it began with the snapshot of entry %d, not %d, which is whole", got, good)
	}
}

// Marks end where nothing changes any more.
func TestIdleClusterWritesNoMarks(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { cfg.ElectionTicks = 20 }) // an election makes an entry
	l := c.leader()
	l.mustPut("a", "1")
	c.wait("the leader to have seen all members hold entries", func() bool {
		return !slices.ContainsFunc(l.node.members.Load().Members, func(m member) bool { return !m.Started })
	})
	c.compared()
	c.quiet()
	at, tick := l.node.progress.last.Load(), l.tick()
	c.wait("some more ticks", func() bool { return l.tick() > tick+4*markTicks })
	if got := l.node.progress.last.Load(); got != at {
		t.Errorf("the log went from entry %d to %d", at, got)
	}
}

func (n *testNode) tick() (ticks uint64) {
	n.c.t.Helper()
	if err := n.node.do(n.c.ctx(), func() { ticks = n.node.ticks }); err != nil {
		n.c.t.Fatal(err)
	}
	return ticks
}

// A version that knows of no witnesses skips them as ticks of another term. So it
// applies them as nothing, and forwards what a follower has to say.
func TestWitnessesPassOlderVersions(t *testing.T) {
	entry := func(w kv.Witness) []*raftpb.Entry {
		return []*raftpb.Entry{{Type: raftpb.EntryNormal.Enum(), Data: kv.AppendWitness(nil, w)}}
	}
	mark, claim := kv.Witness{Member: 2, Mark: true, Index: 7, Digest: 8}, kv.Witness{Member: 2, Index: 7, Digest: 8}
	for _, w := range []kv.Witness{mark, claim} {
		var b kv.Batch
		if err := kv.DecodeBatch(kv.AppendWitness(nil, w), &b); err != nil {
			t.Fatal(err)
		}
		for _, term := range []uint64{1, 2, 1 << 40} {
			if mayTick(&b, term) {
				t.Errorf("%+v is a tick of term %d", w, term)
			}
		}
	}
	if err := validateProposal(entry(mark)); err == nil {
		t.Error("a peer may propose a mark")
	}
	if err := validateProposal(entry(claim)); err != nil {
		t.Error(err)
	}
}

func TestMajority(t *testing.T) {
	for _, tt := range []struct {
		voters []uint64
		claims map[uint64]uint64
		want   uint64 // 0: none
	}{
		{[]uint64{1}, map[uint64]uint64{1: 9}, 9},
		{[]uint64{1, 2}, map[uint64]uint64{1: 9}, 0},
		{[]uint64{1, 2}, map[uint64]uint64{1: 9, 2: 8}, 0},
		{[]uint64{1, 2}, map[uint64]uint64{1: 9, 2: 9}, 9},
		{[]uint64{1, 2, 3}, map[uint64]uint64{1: 9, 2: 8, 3: 8}, 8},
		{[]uint64{1, 2, 3}, map[uint64]uint64{1: 9, 2: 8, 3: 7}, 0},
		{[]uint64{1, 2, 3}, map[uint64]uint64{1: 9, 4: 9, 5: 9}, 0}, // learners do not count
		{[]uint64{1, 2, 3, 4}, map[uint64]uint64{1: 9, 2: 9, 3: 8, 4: 8}, 0},
		{nil, map[uint64]uint64{1: 9}, 0},
	} {
		if got, found := majority(tt.voters, tt.claims); got != tt.want || found != (tt.want != 0) {
			t.Errorf("%v of %v: %d, %v", tt.claims, tt.voters, got, found)
		}
	}
}

// What clients, load balancers and monitoring see.
func TestDivergedMemberOverHTTP(t *testing.T) {
	c, _ := newFaultyCluster(t, 3, wrongValue, nil)
	n := c.follower()
	n.mustPut("good", "1")
	reg := prometheus.NewRegistry()
	n.store.registerGauges(reg)
	api := newHTTPAPI(n.store, testLimits(), newHTTPMetrics(reg), reg, c.logger)
	ask := func(method, path string) (int, string) {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(method, path, strings.NewReader("x"))
		r.Header.Set("Accept", "application/json")
		api.ServeHTTP(w, r)
		body, err := io.ReadAll(w.Result().Body)
		if err != nil {
			t.Fatal(err)
		}
		return w.Code, string(body)
	}
	for _, path := range []string{"/livez", "/readyz"} {
		if status, body := ask(http.MethodGet, path); status != http.StatusOK {
			t.Errorf("%s of a healthy member: %d %s", path, status, body)
		}
	}
	if _, body := ask(http.MethodGet, "/metrics"); !strings.Contains(body, "\npontoon_diverged 0\n") {
		t.Error("pontoon_diverged is not 0")
	}
	n.flip("good")
	n.awaitStanding(diverged)
	for _, call := range [][2]string{
		{"GET", "/good"}, {"PUT", "/good"}, {"GET", "/v1/kv/good?consistency=stale"}, {"PUT", "/v1/kv/good"}, {"DELETE", "/v1/kv/good"},
		{"GET", "/v1/kv?prefix=g"}, {"GET", "/v1/watch?prefix=g"}, {"GET", "/v1/kv/good?history=3"},
	} {
		status, body := ask(call[0], call[1])
		if status != http.StatusServiceUnavailable || !strings.Contains(body, `"code":"stopping"`) || !strings.Contains(body, `"outcome":"not_applied"`) {
			t.Errorf("%s %s: %d %s", call[0], call[1], status, body)
		}
	}
	for _, path := range []string{"/livez?verbose", "/readyz?verbose"} {
		if status, body := ask(http.MethodGet, path); status != http.StatusServiceUnavailable || !strings.Contains(body, errDiverged.Error()) {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	if _, body := ask(http.MethodGet, "/metrics"); !strings.Contains(body, "\npontoon_diverged 1\n") {
		t.Error("pontoon_diverged is not 1")
	}
	if status, _ := ask(http.MethodGet, "/v1/members"); status != http.StatusOK {
		t.Errorf("members: %d", status)
	}
	if status, body := ask(http.MethodGet, "/v1/status"); status != http.StatusOK || !strings.Contains(body, `"diverged":true`) {
		t.Errorf("status: %d %s", status, body)
	}
}
