package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
)

// Of three, A and B have acknowledged a write. B loses its directory and founds itself
// anew while A is down: with its vote C would lead, which never had the write.
func TestFounderWithoutItsDataDoesNotVote(t *testing.T) {
	c := newCluster(t, 3, nil)
	a, b := c.leader(), c.follower()
	other := c.nodes[6-a.id-b.id]
	a.mustPut("k", "v")
	c.housekept()
	c.wait("C to know that B was started", func() bool {
		m, ok := other.node.members.Load().get(b.id)
		return ok && m.Started
	})
	for _, n := range []*testNode{other, a, b} {
		if n == a {
			a.mustPut("k", "acknowledged")
		}
		if err := c.stop(n.id); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(b.cfg.DataDir); err != nil {
		t.Fatal(err)
	}
	other = c.start(other.id)
	b = c.start(b.id)
	b.ends()
	if err := c.stop(b.id); !errors.Is(err, errRefuse) {
		t.Errorf("B ends with %v", err)
	}
	c.start(a.id)
	c.leader().mustGet("k", "acknowledged")
}

// What a candidate says of a member with a new log decides whether it votes.
func TestWhoIsNewVotes(t *testing.T) {
	ask := func(index uint64) *raftpb.Message {
		m := message(raftpb.MsgPreVote, 2, 2)
		m.Index, m.LogTerm = new(index), new(uint64(1))
		return m
	}
	b := newBenchNode(t)
	b.spawn = func(f func()) { f() }
	var started bool
	var failed error
	asked := 0
	b.raftNode.ask = func(context.Context, member, uint64) (*clusterInfo, error) {
		asked++
		m := *b.members.Load()
		m.Members = slices.Clone(m.Members)
		m.Members[0].Started = started
		return &clusterInfo{Member: 2, Members: &m}, failed
	}
	hear := func() {
		for _, f := range b.mail.take() {
			f()
		}
	}
	if b.withholds(ask(1)) || asked > 0 {
		t.Error("a vote for who has no more than this member waits")
	}
	failed = errors.New("no answer")
	for range 2 {
		if !b.withholds(ask(5)) || asked != 1 {
			t.Errorf("two requests for a vote: asked %d times", asked)
		}
	}
	hear()
	if failed = nil; !b.withholds(ask(5)) || asked != 2 {
		t.Errorf("without an answer: asked %d times", asked)
	}
	hear()
	if b.withholds(ask(5)) || asked != 2 || b.removed != nil {
		t.Errorf("a new member does not vote, or asks on (%d), or ends (%v)", asked, b.removed)
	}
	b.founder, started = founder{}, true
	if !b.withholds(ask(5)) {
		t.Error("the vote does not wait")
	}
	if hear(); !errors.Is(b.removed, errRefuse) {
		t.Errorf("a member that was started ends with %v", b.removed)
	}
	b.founder, b.removed, b.stable = founder{}, nil, 2
	if b.withholds(ask(5)) {
		t.Error("a member that has entries asks")
	}
}

// One peer that hangs does not hide what another one knows.
func TestFounderAsksAll(t *testing.T) {
	cfg := Config{ID: 3, ClusterToken: "x"}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		m := bootstrapMembership(cfg.ClusterToken, cfg.Cluster)
		m.Members[2].Started = true
		if err := json.NewEncoder(w).Encode(clusterInfo{Member: 2, Members: m}); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(srv.Close)
	cfg.Cluster = []clusterURL{{1, hungPeer(t)}, {2, srv.URL}, {3, testURL(3)}}
	if err := mayFound(t.Context(), cfg); !errors.Is(err, errRefuse) {
		t.Errorf("member 2 knows that this one has been running: %v", err)
	}
}
