package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

func testURL(id uint64) string { return fmt.Sprintf("http://10.0.0.1:%d", 1000+id) }

// testTable has voters 1, 2 and 3, learner 4, and 9 was removed.
func testTable() *membership {
	m := &membership{ClusterID: 7, Removed: []uint64{9}}
	for id := uint64(1); id <= 4; id++ {
		m.Members = append(m.Members, member{ID: id, PeerURLs: []string{testURL(id)}, Learner: id == 4, Promote: id == 4})
	}
	return m
}

func change(op memberOp, m member) memberChange {
	return memberChange{Version: memberChangeVersion, Op: op, Member: m}
}

func TestMembershipApply(t *testing.T) {
	at := func(id, url uint64) member { return member{ID: id, PeerURLs: []string{testURL(url)}} }
	urls := func(id uint64, u ...string) member { return member{ID: id, PeerURLs: u} }
	for _, x := range []struct {
		name  string
		c     memberChange
		want  error // nil: accepted
		check func(*membership) bool
	}{
		{"add a learner", change(opAdd, member{ID: 5, PeerURLs: []string{testURL(5)}, Learner: true}), nil, func(m *membership) bool { x, ok := m.get(5); return ok && x.Learner }},
		{"add keeps the order of ids", change(opAdd, at(1<<64-3, 5)), nil, func(m *membership) bool { return m.Members[4].ID == 1<<64-3 }},
		{"add again, same id and URL", change(opAdd, at(2, 2)), errNoChange, nil},
		{"add a learner that is a voter already", change(opAdd, member{ID: 2, PeerURLs: []string{testURL(2)}, Learner: true}), errNoChange, nil},
		{"add a known id elsewhere", change(opAdd, at(2, 5)), errMemberExists, nil},
		{"add a taken URL", change(opAdd, at(5, 2)), errMemberExists, nil},
		{"add a taken URL as the second one", change(opAdd, urls(5, testURL(5), testURL(1))), errMemberExists, nil},
		{"add a removed id", change(opAdd, at(9, 9)), errMemberExists, nil},
		{"add id 0", change(opAdd, at(0, 5)), errBadRequest, nil},
		{"add raft's LocalApplyThread", change(opAdd, at(1<<64-2, 5)), errBadRequest, nil},
		{"add raft's LocalAppendThread", change(opAdd, at(1<<64-1, 5)), errBadRequest, nil},
		{"add without a URL", change(opAdd, urls(5)), errBadRequest, nil},
		{"add with https", change(opAdd, urls(5, "https://10.0.0.1:1")), errBadRequest, nil},
		{"add with a path", change(opAdd, urls(5, "http://10.0.0.1:1/x")), errBadRequest, nil},
		{"add with port 0", change(opAdd, urls(5, "http://10.0.0.1:0")), errBadRequest, nil},
		{"add with a spelling that compares unequal", change(opAdd, urls(5, "http://HOST:1")), errBadRequest, nil},
		{"add with a slash at the end", change(opAdd, urls(5, "http://h:1/")), errBadRequest, nil},
		{"add what is no URL", change(opAdd, urls(5, "\x00")), errBadRequest, nil},

		{"remove a voter", change(opRemove, member{ID: 2}), nil, func(m *membership) bool { return m.index(2) < 0 && slices.Equal(m.Removed, []uint64{2, 9}) }},
		{"remove a learner", change(opRemove, member{ID: 4}), nil, func(m *membership) bool { return m.isRemoved(4) }},
		{"remove nobody", change(opRemove, member{ID: 77}), errNoChange, nil},
		{"remove again", change(opRemove, member{ID: 9}), errNoChange, nil},
		{"remove id 0", change(opRemove, member{}), errNoChange, nil},

		{"promote", change(opPromote, member{ID: 4}), nil, func(m *membership) bool { x, _ := m.get(4); return !x.Learner && !x.Promote }},
		{"promote a voter", change(opPromote, member{ID: 1}), errNoChange, nil},
		{"promote nobody", change(opPromote, member{ID: 77}), errMemberUnknown, nil},
		{"promote a removed member", change(opPromote, member{ID: 9}), errMemberUnknown, nil},

		{"move", change(opUpdate, at(2, 8)), nil, func(m *membership) bool { x, _ := m.get(2); return x.PeerURLs[0] == testURL(8) }},
		{"move a learner keeps it one", change(opUpdate, at(4, 8)), nil, func(m *membership) bool { x, _ := m.get(4); return x.Learner && x.Promote }},
		{"a client URL alone keeps the peer URL", change(opUpdate, member{ID: 2, ClientURL: "http://c:1"}), nil, func(m *membership) bool {
			x, _ := m.get(2)
			return x.PeerURLs[0] == testURL(2) && x.ClientURL == "http://c:1"
		}},
		{"move to the same place", change(opUpdate, at(2, 2)), errNoChange, nil},
		{"an update of nothing", change(opUpdate, member{ID: 2}), errNoChange, nil},
		{"move to a taken URL", change(opUpdate, at(2, 1)), errMemberExists, nil},
		{"move nobody", change(opUpdate, at(77, 8)), errMemberUnknown, nil},
		{"move to no URL", change(opUpdate, urls(2, "nowhere")), errBadRequest, nil},

		{"started", change(opStarted, member{ID: 2}), nil, func(m *membership) bool { x, _ := m.get(2); return x.Started && x.PeerURLs[0] == testURL(2) }},
		{"started, a learner", change(opStarted, member{ID: 4}), nil, func(m *membership) bool { x, _ := m.get(4); return x.Started && x.Learner }},
		{"started, nobody", change(opStarted, member{ID: 77}), errMemberUnknown, nil},

		{"an unknown operation", change("demote", member{ID: 2}), errUnsupported, nil},
		{"a later version", memberChange{Version: 2, Op: opRemove, Member: member{ID: 2}}, errUnsupported, nil},
		{"no version", memberChange{Op: opRemove, Member: member{ID: 2}}, errUnsupported, nil},
	} {
		t.Run(x.name, func(t *testing.T) {
			before := testTable()
			after, err := before.apply(x.c)
			if !errors.Is(err, x.want) || (x.want == nil) != (err == nil) {
				t.Fatalf("apply: %v, want %v", err, x.want)
			}
			if err == nil && !x.check(after) {
				t.Fatalf("table afterwards: %+v", after)
			}
			if err != nil && after != nil {
				t.Fatal("a refusal came with a table")
			}
			// A published table is read without a lock.
			if want := testTable(); fmt.Sprintf("%+v", before) != fmt.Sprintf("%+v", want) {
				t.Fatalf("apply changed its receiver: %+v", before)
			}
		})
	}
}

func TestMembershipKeepsOneVoter(t *testing.T) {
	m := &membership{Members: []member{{ID: 1, PeerURLs: []string{testURL(1)}}, {ID: 2, PeerURLs: []string{testURL(2)}, Learner: true}}}
	if _, err := m.apply(change(opRemove, member{ID: 1})); !errors.Is(err, errLastVoter) {
		t.Fatalf("remove the only voter: %v", err)
	}
	m, err := m.apply(change(opRemove, member{ID: 2}))
	if err != nil {
		t.Fatalf("remove the learner: %v", err)
	}
	for _, id := range []uint64{1, 2} { // for ever
		next, err := m.apply(change(opAdd, member{ID: 3, PeerURLs: []string{testURL(3)}}))
		if err == nil {
			next, err = next.apply(change(opRemove, member{ID: 3}))
		}
		if err != nil || !next.isRemoved(2) || !next.isRemoved(3) || id == 2 && next.nextID() != 4 {
			t.Fatalf("removed ids: %+v, next %d, %v", next, next.nextID(), err)
		}
	}
}

func TestMayRemove(t *testing.T) {
	for _, x := range []struct {
		name string
		id   uint64
		up   []uint64
		ok   bool
	}{
		{"all alive", 2, []uint64{1, 2, 3}, true},
		{"the dead one", 3, []uint64{1, 2}, true},
		{"a living one, and another is dead", 2, []uint64{1, 2}, false},
		{"a dead one, and another is dead", 3, []uint64{1}, false},
		{"a learner is never needed", 4, []uint64{1}, true},
		{"nobody", 77, []uint64{1}, true},
		{"a learner's life does not count", 3, []uint64{1, 4}, false},
	} {
		err := testTable().mayRemove(x.id, func(id uint64) bool { return slices.Contains(x.up, id) })
		if (err == nil) != x.ok || err != nil && !errors.Is(err, errQuorumAtRisk) {
			t.Errorf("%s: %v", x.name, err)
		}
	}
	one := &membership{Members: []member{{ID: 1}}}
	if err := one.mayRemove(1, func(uint64) bool { return true }); !errors.Is(err, errLastVoter) {
		t.Errorf("the only voter: %v", err)
	}
}

func TestConfChangeRoundTrip(t *testing.T) {
	types := map[raftpb.ConfChangeType]memberChange{
		raftpb.ConfChangeAddLearnerNode: change(opAdd, member{ID: 5, PeerURLs: []string{testURL(5)}, Learner: true}),
		raftpb.ConfChangeAddNode:        change(opPromote, member{ID: 4}),
		raftpb.ConfChangeRemoveNode:     change(opRemove, member{ID: 2}),
		raftpb.ConfChangeUpdateNode:     change(opUpdate, member{ID: 2, PeerURLs: []string{testURL(8)}}),
	}
	for typ, c := range types {
		c.Node, c.Request = 3, 1<<64-1
		cc, err := c.confChange()
		if err != nil || cc.Changes[0].GetType() != typ || cc.Changes[0].GetNodeId() != c.Member.ID {
			t.Fatalf("%s: %v %v", c.Op, cc, err)
		}
		if _, joint := cc.EnterJoint(); joint || cc.LeaveJoint() {
			t.Fatalf("%s would need joint consensus", c.Op)
		}
		got, err := decodeConfChange(cc)
		if err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", c) {
			t.Fatalf("%s: %+v %v, want %+v", c.Op, got, err, c)
		}
		// What raft would do and what the table would do must not differ.
		for name, spoil := range map[string]func(*raftpb.ConfChangeV2){
			"other id":     func(cc *raftpb.ConfChangeV2) { cc.Changes[0].NodeId = new(uint64(3)) },
			"other type":   func(cc *raftpb.ConfChangeV2) { cc.Changes[0].Type = ((typ + 1) % 4).Enum() },
			"two changes":  func(cc *raftpb.ConfChangeV2) { cc.Changes = append(cc.Changes, cc.Changes[0]) },
			"no change":    func(cc *raftpb.ConfChangeV2) { cc.Changes = nil },
			"nil change":   func(cc *raftpb.ConfChangeV2) { cc.Changes[0] = nil },
			"joint":        func(cc *raftpb.ConfChangeV2) { cc.Transition = raftpb.ConfChangeTransitionJointExplicit.Enum() },
			"no context":   func(cc *raftpb.ConfChangeV2) { cc.Context = nil },
			"half context": func(cc *raftpb.ConfChangeV2) { cc.Context = cc.Context[:len(cc.Context)/2] },
			"array":        func(cc *raftpb.ConfChangeV2) { cc.Context = []byte("[1]") },
		} {
			bad := proto.Clone(cc).(*raftpb.ConfChangeV2)
			spoil(bad)
			if _, err := decodeConfChange(bad); !errors.Is(err, errBadRequest) {
				t.Errorf("%s with %s: %v", c.Op, name, err)
			}
		}
	}
}

func TestBootstrapMembership(t *testing.T) {
	base := []clusterURL{{1, testURL(1)}, {2, testURL(2)}, {3, testURL(3)}}
	id := bootstrapMembership("token", base).ClusterID
	reversed := slices.Clone(base)
	slices.Reverse(reversed)
	if got := bootstrapMembership("token", reversed); got.ClusterID != id || got.Members[0].ID != 1 {
		t.Errorf("the order of --cluster matters: %+v", got)
	}
	seen := map[uint64]string{id: "base"}
	for name, m := range map[string]*membership{
		"token":      bootstrapMembership("token2", base),
		"no token":   bootstrapMembership("", base),
		"ids":        bootstrapMembership("token", []clusterURL{{1, testURL(1)}, {2, testURL(2)}, {4, testURL(3)}}),
		"URL":        bootstrapMembership("token", []clusterURL{{1, testURL(1)}, {2, testURL(2)}, {3, testURL(4)}}),
		"swapped":    bootstrapMembership("token", []clusterURL{{1, testURL(2)}, {2, testURL(1)}, {3, testURL(3)}}),
		"fewer":      bootstrapMembership("token", base[:2]),
		"in token":   bootstrapMembership("token\"\n1 [\""+testURL(1)+"\"]\n", base[1:]),
		"one member": bootstrapMembership("token", base[:1]),
	} {
		if other, taken := seen[m.ClusterID]; taken || m.ClusterID == 0 {
			t.Errorf("%s and %s have the same cluster id", name, other)
		}
		seen[m.ClusterID] = name
	}
}

// Every change that the table accepts is one that raft accepts, whatever came
// before: raft panics over any other. And the two always agree.
func TestTableAndRaftAgree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := bootstrapMembership("x", []clusterURL{{1, testURL(1)}, {2, testURL(2)}})
		storage := raft.NewMemoryStorage()
		if err := storage.ApplySnapshot((&snapHeader{Index: 1, Term: 1, Members: m}).raftSnapshot()); err != nil {
			t.Fatal(err)
		}
		raw, err := raft.NewRawNode(&raft.Config{ID: 1, ElectionTick: 5, HeartbeatTick: 1, Storage: storage, Applied: 1,
			MaxInflightMsgs: 4, StepDownOnRemoval: true, Logger: raftLogger{quietLog}})
		if err != nil {
			t.Fatal(err)
		}
		removed := map[uint64]bool{}
		for range rapid.IntRange(1, 40).Draw(t, "changes") {
			id := rapid.OneOf(rapid.Uint64Range(0, 6), rapid.SampledFrom([]uint64{1<<64 - 3, 1<<64 - 2, 1<<64 - 1})).Draw(t, "id")
			c := change(rapid.SampledFrom([]memberOp{opAdd, opAdd, opRemove, opPromote, opUpdate, opStarted}).Draw(t, "op"), member{ID: id})
			if rapid.Bool().Draw(t, "with URL") {
				c.Member.PeerURLs = []string{testURL(rapid.Uint64Range(1, 9).Draw(t, "URL"))}
			}
			c.Member.Learner, c.Member.Promote = rapid.Bool().Draw(t, "learner"), rapid.Bool().Draw(t, "promote")
			cc, err := c.confChange()
			if err != nil {
				t.Fatal(err)
			}
			decoded, err := decodeConfChange(cc)
			if err != nil {
				t.Fatalf("own change %+v: %v", c, err)
			}
			next, err := m.apply(decoded)
			if err != nil {
				continue
			}
			m = next
			cs := raw.ApplyConfChange(cc)
			if !sameConf(cs, m.confState()) || len(cs.VotersOutgoing)+len(cs.LearnersNext) > 0 || cs.GetAutoLeave() {
				t.Fatalf("after %+v raft has %v and the table %v", c, cs, m.confState())
			}
			if c.Op == opRemove {
				removed[id] = true
			}
			checkTable(t, m, removed)
		}
	})
}

func checkTable(t *rapid.T, m *membership, removed map[uint64]bool) {
	if len(m.voters()) == 0 || !slices.IsSortedFunc(m.Members, func(a, b member) int { return compare(a.ID, b.ID) }) {
		t.Fatalf("members %+v", m.Members)
	}
	if !slices.Equal(m.Removed, slices.Sorted(maps.Keys(removed))) {
		t.Fatalf("removed %v, want %v", m.Removed, removed)
	}
	urls := map[string]bool{}
	for _, x := range m.Members {
		if removed[x.ID] || x.ID == 0 || raft.IsLocalMsgTarget(x.ID) {
			t.Fatalf("member %d", x.ID)
		}
		for _, u := range x.PeerURLs {
			if urls[u] {
				t.Fatalf("%s twice", u)
			}
			urls[u] = true
		}
	}
}

// join adds a member and starts it.
func (c *cluster) join(id uint64) *testNode {
	c.t.Helper()
	_, added, err := c.leader().store.addMember(c.ctx(), memberSpec{ID: id, PeerURL: testURL(id)})
	if err != nil || !added {
		c.t.Fatalf("add member %d: %v %v", id, added, err)
	}
	return c.start(id)
}

// voters waits until every running member sees exactly these.
func (c *cluster) wantVoters(ids ...uint64) {
	c.t.Helper()
	c.wait(fmt.Sprintf("voters %v", ids), func() bool {
		for _, n := range c.nodes {
			if !slices.Equal(n.node.members.Load().voters(), ids) {
				return false
			}
		}
		return true
	})
}

// agree holds what raft thinks of the cluster against the table, on each member.
func (c *cluster) agree() {
	c.t.Helper()
	for id, n := range c.nodes {
		var cs *raftpb.ConfState
		var table *membership
		if err := n.node.do(c.ctx(), func() {
			cs, table = raftConf(n.node.raw), n.node.members.Load()
		}); err != nil {
			c.t.Fatal(err)
		}
		if !sameConf(cs, table.confState()) {
			c.t.Fatalf("member %d: raft has %v, the table %v", id, cs, table.confState())
		}
	}
}

func raftConf(raw *raft.RawNode) *raftpb.ConfState {
	cfg := raw.Status().Config
	cs := &raftpb.ConfState{}
	for id := range cfg.Voters.IDs() {
		cs.Voters = append(cs.Voters, id)
	}
	for id := range cfg.Learners {
		cs.Learners = append(cs.Learners, id)
	}
	return cs
}

func TestAddMemberLearnerFirst(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	l.mustPut("before", "x")
	m, added, err := l.store.addMember(c.ctx(), memberSpec{PeerURL: testURL(4)}) // it chooses the id
	if err != nil || !added || m.ID != 4 {
		t.Fatalf("add: %+v %v %v", m, added, err)
	}
	x, ok := l.node.members.Load().get(4)
	if !ok || !x.Learner || !x.Promote {
		t.Fatalf("a new member without data is %+v, not a learner", x)
	}
	if _, added, err := c.follower().store.addMember(c.ctx(), memberSpec{ID: 4, PeerURL: testURL(4)}); err != nil || added {
		t.Fatalf("add again: %v %v", added, err)
	}
	n := c.start(4)
	c.wantVoters(1, 2, 3, 4)
	n.mustGet("before", "x")
	n.mustPut("after", "y")
	c.agree()
	c.check()
}

// A joiner whose log the others have compacted away starts from a snapshot that
// lists it (etcd#12473, #13741).
func TestAddMemberAfterCompaction(t *testing.T) {
	c := newCluster(t, 3, small)
	l := c.leader()
	l.fill("k", 2000)
	c.wait("compaction", func() bool {
		first, err := l.node.mem.FirstIndex()
		return err == nil && first > 2
	})
	n := c.join(4)
	c.wantVoters(1, 2, 3, 4)
	n.mustGet("k01999", strings.Repeat("x", 100))
	c.agree()
	c.check()
	// It has the table from the snapshot alone.
	c.stop(4)
	n = c.start(4)
	if got := n.node.members.Load().index(4); got < 0 {
		t.Fatal("the joiner forgot that it is a member")
	}
	n.mustGet("k00000", strings.Repeat("x", 100))
	c.check()
}

func TestRemoveFollower(t *testing.T) {
	c := newCluster(t, 3, nil)
	l, f := c.leader(), c.follower()
	if err := l.store.removeMember(c.ctx(), f.id, false); err != nil {
		t.Fatal(err)
	}
	if err := l.store.removeMember(c.ctx(), f.id, false); err != nil {
		t.Fatalf("remove again: %v", err)
	}
	c.wantRemoved(f.id)
	l.mustPut("k", "v")
	c.agree()
	c.check()
	if _, _, err := l.store.addMember(c.ctx(), memberSpec{ID: f.id, PeerURL: testURL(50)}); !errors.Is(err, errMemberExists) {
		t.Fatalf("a removed id came back: %v", err)
	}
}

// ends waits until a member's loop has ended by itself.
func (n *testNode) ends() {
	n.c.t.Helper()
	select {
	case <-n.node.doneC:
	case <-time.After(n.c.timeout):
		n.c.t.Fatalf("member %d goes on", n.id)
	}
}

// wantRemoved waits until a removed member has ended and takes it off the list.
func (c *cluster) wantRemoved(id uint64) {
	c.t.Helper()
	told := c.nodes[id].told
	select {
	case <-c.nodes[id].node.doneC:
	case <-told: // a server would ask for the table and end
		told = nil
	case <-time.After(c.timeout):
		c.t.Fatalf("member %d goes on", id)
	}
	if err := c.stop(id); !errors.Is(err, errRemoved) && (told != nil || err != nil) {
		c.t.Fatalf("the removed member ended with %v", err)
	}
}

func TestRemoveLeader(t *testing.T) {
	c := newCluster(t, 3, nil)
	old := c.leader()
	old.mustPut("k", "v")
	if err := old.store.removeMember(c.ctx(), old.id, false); err != nil {
		t.Fatal(err)
	}
	c.wantRemoved(old.id)
	l := c.leader()
	l.mustGet("k", "v")
	l.mustPut("k", "w")
	c.agree()
	c.check()
}

// Down to one voter, which goes on alone and cannot be removed, not even by force.
func TestRemoveDownToOne(t *testing.T) {
	c := newCluster(t, 3, nil)
	for len(c.nodes) > 1 {
		l := c.leader()
		if err := l.store.removeMember(c.ctx(), l.id, false); err != nil {
			t.Fatal(err)
		}
		c.wantRemoved(l.id)
	}
	l := c.leader()
	l.mustPut("alone", "x")
	for _, force := range []bool{false, true} {
		if err := l.store.removeMember(c.ctx(), l.id, force); !errors.Is(err, errLastVoter) {
			t.Fatalf("remove the only voter (force %v): %v", force, err)
		}
	}
	l.mustGet("alone", "x")
}

func TestRemoveAtQuorumRisk(t *testing.T) {
	c := newCluster(t, 3, nil)
	l, f := c.leader(), c.follower()
	l.mustPut("k", "v")
	c.stop(f.id)
	var other *testNode
	for _, n := range c.nodes {
		if n != l {
			other = n
		}
	}
	// The leader notices that f is silent after a while.
	c.wait("the refusal", func() bool {
		err := error(nil)
		if derr := l.node.do(c.ctx(), func() { err = l.node.members.Load().mayRemove(other.id, l.node.alive) }); derr != nil {
			t.Fatal(derr)
		}
		return err != nil
	})
	if err := l.store.removeMember(c.ctx(), other.id, false); !errors.Is(err, errQuorumAtRisk) {
		t.Fatalf("remove a living member while another is dead: %v", err)
	}
	if got := len(l.node.members.Load().Members); got != 3 {
		t.Fatalf("%d members after a refusal", got)
	}
	if err := l.store.removeMember(c.ctx(), f.id, false); err != nil { // the dead one may go
		t.Fatalf("remove the dead member: %v", err)
	}
	// Now two voters are left. By force one may go even though the other is cut off.
	if err := l.store.removeMember(c.ctx(), other.id, true); err != nil {
		t.Fatalf("force: %v", err)
	}
	l = c.nodes[l.id]
	l.mustPut("k", "w")
}

// Whoever names no id gets one, however many ask at once.
func TestConcurrentAddsWithoutID(t *testing.T) {
	c := newCluster(t, 3, nil)
	c.leader()
	const adds = 6
	type answer struct {
		id  uint64
		err error
	}
	answers := make(chan answer, adds)
	for i := range uint64(adds) {
		go func() {
			m, _, err := c.nodes[i%3+1].store.addMember(c.ctx(), memberSpec{PeerURL: testURL(50 + i), Learner: true})
			answers <- answer{m.ID, err}
		}()
	}
	ids := map[uint64]bool{}
	for range adds {
		a := <-answers
		if a.err != nil || ids[a.id] {
			t.Errorf("member %d: %v; others got %v", a.id, a.err, ids)
		}
		ids[a.id] = true
	}
	// A URL that is taken is no matter of ids.
	if _, _, err := c.leader().store.addMember(c.ctx(), memberSpec{PeerURL: testURL(50)}); !errors.Is(err, errMemberExists) {
		t.Errorf("a URL twice: %v", err)
	}
	c.agree()
}

// Two members are added at once on different members. Each answer is true.
func TestConcurrentAdds(t *testing.T) {
	c := newCluster(t, 3, nil)
	c.leader()
	type answer struct {
		id  uint64
		err error
	}
	answers := make(chan answer, 6)
	for i := range uint64(6) {
		n := c.nodes[i%3+1]
		go func() {
			id := 10 + i/2 // each id is asked for on two members
			_, _, err := n.store.addMember(c.ctx(), memberSpec{ID: id, PeerURL: testURL(id), Learner: true})
			answers <- answer{id, err}
		}()
	}
	ok := map[uint64]bool{}
	for range 6 {
		a := <-answers
		if a.err != nil && !errors.Is(a.err, errCommitTimeout) && !errors.Is(a.err, errMembershipInProgress) {
			t.Errorf("add %d: %v", a.id, a.err)
		}
		ok[a.id] = ok[a.id] || a.err == nil
	}
	c.check() // all have applied as far as the leader
	for id, sure := range ok {
		if _, there := c.leader().node.members.Load().get(id); sure && !there {
			t.Errorf("member %d was added, said the answer, and it is not there", id)
		}
	}
	c.agree()
}

// Two adds that cannot both happen: the same URL under two ids.
func TestConcurrentAddsOfOneURL(t *testing.T) {
	c := newCluster(t, 3, nil)
	c.leader()
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i := range uint64(3) {
		wg.Go(func() {
			_, _, err := c.nodes[i+1].store.addMember(c.ctx(), memberSpec{ID: 20 + i, PeerURL: testURL(20), Learner: true})
			if err != nil && !errors.Is(err, errMemberExists) {
				t.Errorf("add %d: %v", 20+i, err)
			}
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			}
		})
	}
	wg.Wait()
	if won != 1 || len(c.leader().node.members.Load().Members) != 4 {
		t.Fatalf("%d adds won: %+v", won, c.leader().node.members.Load())
	}
	c.agree()
}

// Addresses and removed ids live in the snapshot, not only in the log.
func TestTableSurvivesSnapshotAndRestart(t *testing.T) {
	c := newCluster(t, 3, small)
	l := c.leader()
	c.join(4)
	c.wantVoters(1, 2, 3, 4)
	if err := l.store.removeMember(c.ctx(), 4, false); err != nil {
		t.Fatal(err)
	}
	c.wantRemoved(4)
	if err := l.store.updateMember(c.ctx(), 2, testURL(60)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := l.store.addMember(c.ctx(), memberSpec{ID: 5, PeerURL: testURL(5), Learner: true}); err != nil {
		t.Fatal(err)
	}
	c.wait("all marked as started", func() bool { // the leader does that by itself
		for _, m := range l.node.members.Load().Members {
			if m.ID <= 3 && !m.Started {
				return false
			}
		}
		return true
	})
	want := fmt.Sprintf("%+v", l.node.members.Load())
	changed := l.store.applied.At()
	l.fill("k", 2000)
	c.wait("snapshots past the changes", func() bool {
		for _, n := range c.nodes {
			if files, err := n.disk.snapshotFiles(); err != nil || files[0] < changed {
				return false
			}
		}
		return true
	})
	for id := range maps.Clone(c.nodes) {
		c.stop(id)
	}
	for id := uint64(1); id <= 3; id++ {
		n := c.start(id)
		if got := fmt.Sprintf("%+v", n.node.members.Load()); got != want {
			t.Errorf("member %d starts with %s, want %s", id, got, want)
		}
	}
	if _, _, err := c.leader().store.addMember(c.ctx(), memberSpec{ID: 4, PeerURL: testURL(4)}); !errors.Is(err, errMemberExists) {
		t.Fatalf("a removed id came back: %v", err)
	}
	c.agree()
	c.check()
}

func TestPromoteLaggingLearnerRefused(t *testing.T) {
	c := newCluster(t, 3, nil)
	l := c.leader()
	spec := memberSpec{ID: 4, PeerURL: testURL(4), Learner: true} // a learner that stays one
	if _, _, err := l.store.addMember(c.ctx(), spec); err != nil {
		t.Fatal(err)
	}
	if err := l.store.promoteMember(c.ctx(), 4); !errors.Is(err, errLearnerBehind) {
		t.Fatalf("promote a learner that never started: %v", err)
	}
	n := c.start(4)
	<-n.store.applied.Wait(l.store.applied.At())
	c.isolate(4, true)
	for i := range 3 * promoteLag {
		l.mustPut(fmt.Sprint(i), "x")
	}
	if err := l.store.promoteMember(c.ctx(), 4); !errors.Is(err, errLearnerBehind) {
		t.Fatalf("promote a learner that lags: %v", err)
	}
	if x, _ := l.node.members.Load().get(4); !x.Learner {
		t.Fatal("promoted all the same")
	}
	c.isolate(4, false)
	<-n.store.applied.Wait(l.store.applied.At())
	c.wait("the promotion", func() bool {
		err := c.leader().store.promoteMember(c.ctx(), 4)
		if err != nil && !errors.Is(err, errLearnerBehind) {
			t.Fatal(err)
		}
		return err == nil
	})
	c.wantVoters(1, 2, 3, 4)
	for id, want := range map[uint64]error{1: nil, 99: errMemberUnknown} { // a voter is one already
		if err := c.leader().store.promoteMember(c.ctx(), id); !errors.Is(err, want) {
			t.Errorf("promote %d: %v, want %v", id, err, want)
		}
	}
	c.agree()
}

// The leader dies while it changes the membership: the change happened or not,
// an answer of success is true, and the cluster can be changed further.
func TestMembershipChangeWhileLeaderDies(t *testing.T) {
	for _, op := range []memberOp{opAdd, opRemove} {
		t.Run(string(op), func(t *testing.T) {
			c := newCluster(t, 5, nil)
			old := c.leader()
			asked := c.follower()
			victim := uint64(0)
			for id := range c.nodes {
				if id != old.id && id != asked.id {
					victim = id
				}
			}
			// The change reaches the leader's log and the leader dies with it.
			c.net.dropIf(func(m *raftpb.Message) bool {
				return m.GetType() == raftpb.MsgApp && m.GetFrom() == old.id && slices.ContainsFunc(m.GetEntries(), func(e *raftpb.Entry) bool {
					return e.GetType() == raftpb.EntryConfChangeV2
				})
			})
			done := make(chan error, 1)
			go func() {
				if op == opAdd {
					_, _, err := asked.store.addMember(c.ctx(), memberSpec{ID: 10, PeerURL: testURL(10), Learner: true})
					done <- err
				} else {
					done <- asked.store.removeMember(c.ctx(), victim, false)
				}
			}()
			c.wait("the change in the leader's log", func() bool {
				found := false
				err := old.node.do(c.ctx(), func() {
					first, _ := old.node.mem.FirstIndex()
					last, _ := old.node.mem.LastIndex()
					ents, err := old.node.mem.Entries(first, last+1, noLimit)
					found = err == nil && slices.ContainsFunc(ents, func(e *raftpb.Entry) bool { return e.GetType() == raftpb.EntryConfChangeV2 })
				})
				return err == nil && found
			})
			c.stop(old.id)
			c.net.dropIf(nil)
			if err := <-done; err != nil {
				t.Fatalf("the member that was asked proposes again: %v", err)
			}
			c.start(old.id) // its log holds a change that nobody else has
			if op == opRemove {
				// It need not hear of it: connections to it go soon after, and
				// what a real peer port then answers is missing here.
				if err := c.stop(victim); err != nil && !errors.Is(err, errRemoved) {
					t.Fatal(err)
				}
			}
			c.check()
			m := c.leader().node.members.Load()
			if op == opAdd && m.index(10) < 0 || op == opRemove && !m.isRemoved(victim) {
				t.Fatalf("%s was answered with success, and the table is %+v", op, m)
			}
			c.agree()
		})
	}
}

// A change that is not done in time says so, and does not block the next one.
func TestMembershipChangeTimesOut(t *testing.T) {
	c := newCluster(t, 3, nil)
	f := c.follower()
	c.isolate(f.id, true)
	c.wait("the member to notice", func() bool { return f.store.leader() == 0 })
	ctx, cancel := context.WithTimeout(c.ctx(), 5*testTick)
	defer cancel()
	if err := f.store.removeMember(ctx, 1, true); !errors.Is(err, errNoLeader) {
		t.Fatalf("a change without a leader: %v", err)
	}
	c.isolate(f.id, false)
	if err := f.store.updateMember(c.ctx(), f.id, testURL(70)); err != nil {
		t.Fatalf("the next change: %v", err)
	}
	c.check()
}
