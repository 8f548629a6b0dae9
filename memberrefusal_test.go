package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
)

// What a change of the member table is refused for: evidence that the leader has not,
// and bounds.

// A process that hangs keeps its connections, and was heard of a moment ago: only an
// answer to what is asked now counts. A refusal leaves the leader where it is.
func TestRemovalRestsOnAnswers(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { cfg.ElectionTicks = 20 })
	l, f := c.leader(), c.follower()
	c.housekept()
	hung := 6 - l.id - f.id
	c.wait("an answer from before", func() (ok bool) {
		l.mustGet("k", "v")
		if err := l.node.do(c.ctx(), func() { ok = l.node.answered[hung] > 0 }); err != nil {
			t.Fatal(err)
		}
		return ok
	})
	term := l.node.soft.Load().term
	c.net.dropIf(func(m *raftpb.Message) bool { return m.GetFrom() == hung })
	ctx := c.ctx()
	var all sync.WaitGroup
	for _, x := range []struct {
		asked *testNode
		id    uint64
	}{{l, f.id}, {l, l.id}, {f, l.id}, {f, f.id}} {
		all.Go(func() {
			if err := x.asked.store.removeMember(ctx, x.id, false); !errors.Is(err, errQuorumAtRisk) {
				t.Errorf("member %d is asked to remove member %d while member %d hangs: %v", x.asked.id, x.id, hung, err)
			}
		})
	}
	all.Wait()
	if s := l.node.soft.Load(); s.lead != l.id || s.term != term || len(l.node.members.Load().Members) != 3 {
		t.Fatalf("refused, and the leader was %d in term %d and now is %d in term %d, members %v", l.id, term, s.lead, s.term, l.node.members.Load())
	}
	if _, err := f.store.put(c.ctx(), "k", nil); err != nil {
		t.Fatal(err)
	}
	if err := f.store.removeMember(c.ctx(), hung, false); err != nil { // it may go itself
		t.Fatalf("remove the member that hangs: %v", err)
	}
	c.net.dropIf(nil)
	c.wantRemoved(hung)
	c.check()
}

// Answers count for what was asked in the same term, and of members only.
func TestAnswersCountInTheirTerm(t *testing.T) {
	b := newBenchNode(t)
	b.lead(t)
	term := b.now.term
	b.readSent = 9
	for _, x := range []struct{ from, term, read uint64 }{{2, term, 5}, {2, term, 3}, {3, term - 1, 7}, {77, term, 7}} {
		m := message(raftpb.MsgHeartbeatResp, x.from, x.term)
		m.Context = binary.LittleEndian.AppendUint64(nil, x.read)
		b.step(m)
	}
	if want := map[uint64]uint64{2: 5}; !maps.Equal(b.answered, want) {
		t.Fatalf("answered %v, want %v", b.answered, want)
	}
	b.step(message(raftpb.MsgHeartbeat, 3, term+1))
	b.settle(t)
	if len(b.answered) != 0 {
		t.Fatalf("answers %v of term %d count in term %d", b.answered, term, b.now.term)
	}
}

// What is asked of a leader before a removal costs heartbeats: members alone may ask.
func TestLeaderIsAskedWhoIsAlive(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { cfg.ElectionTicks = 20 })
	l, f := c.leader(), c.follower()
	srv, _ := peerPort(t, l)
	at := member{ID: l.id, PeerURLs: []string{srv.URL}}
	for _, x := range []struct{ without, said uint64 }{{0, 0}, {f.id, f.id}, {l.id, l.id}, {77, 77}} {
		if info, err := f.node.askMember(c.ctx(), at, x.without); err != nil || info.Without != x.said || info.AtRisk != "" {
			t.Errorf("without member %d: %+v, %v", x.without, info, err)
		}
	}
	hung := 6 - l.id - f.id
	c.net.dropIf(func(m *raftpb.Message) bool { return m.GetFrom() == hung })
	if info, err := f.node.askMember(c.ctx(), at, f.id); err != nil || info.Without != f.id || !strings.HasPrefix(info.AtRisk, "without member") {
		t.Errorf("without member %d while member %d hangs: %+v, %v", f.id, hung, info, err)
	}
	follower, _ := peerPort(t, f)
	at.PeerURLs = []string{follower.URL}
	if info, err := f.node.askMember(c.ctx(), at, l.id); err != nil || info.Without != 0 {
		t.Errorf("a follower says %+v, %v", info, err)
	}
	for query, want := range map[string]int{"?without=2": 412, "?without=x": 412, "": 200, "?without=": 200} {
		resp, err := http.Get(srv.URL + clusterInfoPath + query)
		if err != nil {
			t.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != want {
			t.Errorf("%q from a stranger: %d, want %d", query, resp.StatusCode, want)
		}
	}
}

// The table stays far smaller than what holds it, whoever asks for what. What was
// decided before there was a bound stays decided.
func TestTableIsBounded(t *testing.T) {
	long := func(id uint64, i int) string { return fmt.Sprintf("http://%0*d.%d:1", maxPeerURLBytes-40, id, i) }
	add := func(m *membership, id uint64, urls ...string) (*membership, error) {
		c := change(opAdd, member{ID: id, PeerURLs: urls, Learner: true})
		c.Bounded = true
		return m.apply(c)
	}
	var err error
	m := testTable()
	for id := uint64(10); len(m.Members) < maxMembers; id++ {
		if m, err = add(m, id, long(id, 0)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := add(m, 99, testURL(99)); !errors.Is(err, errBadRequest) {
		t.Errorf("%d members and one more: %v", maxMembers, err)
	}
	// Sixteen URLs a member are too many bytes long before.
	m = testTable()
	id := uint64(10)
	for next := m; err == nil; id++ {
		m = next
		var urls []string
		for i := range maxPeerURLs {
			urls = append(urls, long(id, i))
		}
		next, err = add(m, id, urls...)
	}
	if size := len(marshalJSON(t, m)); !errors.Is(err, errBadRequest) || size > maxTableBytes || size < maxTableBytes-maxPeerURLs*maxPeerURLBytes {
		t.Errorf("at %d bytes: %v", size, err)
	}
	for _, longer := range []memberChange{
		{Op: opAdd, Member: member{ID: id, PeerURLs: []string{testURL(id)}, ClientURL: long(id, 0), Learner: true}},
		{Op: opUpdate, Member: member{ID: 1, ClientURL: long(1, 0)}},
	} {
		full := *m
		for r := uint64(1 << 60); len(marshalJSON(t, full)) < maxTableBytes-100; r += 50 {
			for i := range min(uint64(50), uint64(maxTableBytes-100-len(marshalJSON(t, full)))/20+1) {
				full.Removed = append(full.Removed, r+i)
			}
		}
		longer.Version, longer.Bounded = memberChangeVersion, true
		if _, err := full.apply(longer); !errors.Is(err, errBadRequest) {
			t.Errorf("%s beside %d removed ids: %v", longer.Op, len(full.Removed), err)
		}
		for _, shorter := range []memberChange{change(opRemove, member{ID: 2}), change(opPromote, member{ID: 4}), change(opStarted, member{ID: 3})} {
			shorter.Bounded = true
			if _, err := full.apply(shorter); err != nil {
				t.Errorf("%s in a full table: %v", shorter.Op, err)
			}
		}
		longer.Bounded = false
		if next, err := full.apply(longer); err != nil || next.check() != nil {
			t.Errorf("%s from an older log: %v, %v", longer.Op, err, next.check())
		}
	}
}

// What this member proposes is bounded.
func TestProposedChangesAreBounded(t *testing.T) {
	c := newCluster(t, 1, nil)
	l := c.leader()
	full := *l.node.members.Load()
	for id := uint64(2); id <= maxMembers; id++ {
		full.Members = append(full.Members, member{ID: id, PeerURLs: []string{testURL(id)}, Learner: true, Started: true})
	}
	if err := l.node.do(c.ctx(), func() { l.node.setMembers(&full) }); err != nil {
		t.Fatal(err)
	}
	if _, _, err := l.store.addMember(c.ctx(), memberSpec{PeerURL: testURL(99)}); !errors.Is(err, errBadRequest) {
		t.Errorf("one member more than may be: %v", err)
	}
}
