// long: one bench of a member without goroutines or network, and every hostile
// message of the list below is thrown at it.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	stats "go.etcd.io/etcd/server/v3/etcdserver/api/v2stats"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/protobuf/proto"

	"pontoon/kv"
)

var quietLog = zap.NewNop()

// benchNode is member 1 of three without goroutines, disk or network: a test
// steps it by hand and sees each effect at once.
type benchNode struct {
	*raftNode
	sent []*raftpb.Message // since the last settle
}

// memFiles answers for snapshot files that do not exist. Index i is of term
// i%3+1, so that some snapshots fit what a message says and some do not.
type memFiles struct{ members *membership }

func (f memFiles) openSnapshot(uint64) (snapFile, error) { return snapFile{}, os.ErrNotExist }
func (f memFiles) snapshotHeader(i uint64) (snapHeader, error) {
	return snapHeader{Index: i, Term: i%3 + 1, Members: f.members}, nil
}
func (f memFiles) receiveSnapshot(uint64, io.Reader, func(snapHeader) error) error {
	return errors.ErrUnsupported
}
func (f memFiles) verifySnapshot(i uint64) (snapHeader, error) { return f.snapshotHeader(i) }
func (f memFiles) forgetSnapshot(uint64) uint64                { return 0 }
func (f memFiles) freeBytes() (int64, error)                   { return 1 << 40, nil }
func (f memFiles) oldestKept() uint64                          { return 0 }

type memStore struct{}

func (memStore) save(*raftpb.HardState, []*raftpb.Entry) error { return nil }
func (memStore) install(*raftpb.SnapshotMetadata, *raftpb.HardState, []*raftpb.Entry) error {
	return nil
}
func (memStore) saveSnapshot(*raftpb.SnapshotMetadata) error { return nil }
func (memStore) release(uint64) error                        { return nil }
func (memStore) close() error                                { return nil }

func (b *benchNode) Send(ms []*raftpb.Message)          { b.sent = append(b.sent, ms...) }
func (b *benchNode) SendSnapshot(*snap.Message)         {}
func (b *benchNode) AddPeer(types.ID, []string)         {}
func (b *benchNode) RemovePeer(types.ID)                {}
func (b *benchNode) UpdatePeer(types.ID, []string)      {}
func (b *benchNode) ActiveSince(types.ID) (t time.Time) { return t }
func (b *benchNode) Stop()                              {}

func newBenchNode(t testing.TB) *benchNode {
	t.Helper()
	m := bootstrapMembership("x", []clusterURL{{1, testURL(1)}, {2, testURL(2)}, {3, testURL(3)}})
	r := &recovered{meta: walMetadata{Version: 1, ClusterID: m.ClusterID, MemberID: 1},
		hard: &raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(0)), Commit: new(uint64(1))},
		snap: snapHeader{Index: 1, Term: 1, Members: m}, state: kv.NewState()}
	n, err := newRaftNode(defaultConfig(), 1, r, memStore{}, memFiles{m}, quietLog, newNodeMetrics(prometheus.NewRegistry()))
	if err != nil {
		t.Fatal(err)
	}
	b := &benchNode{raftNode: n}
	n.tr = b
	b.settle(t)
	return b
}

// settle turns the loop until nothing is left to do.
func (b *benchNode) settle(t testing.TB) {
	t.Helper()
	for range 1000 {
		for _, f := range b.mail.take() {
			f()
		}
		b.propose()
		b.issueReads()
		if !b.raw.HasReady() {
			b.sendAcks()
			return
		}
		if err := b.ready(); err != nil {
			t.Fatalf("ready: %v", err)
		}
		for len(b.commitC) > 0 {
			<-b.commitC
		}
	}
	t.Fatal("the loop does not come to rest")
}

// receive does what Process and the loop do with a message.
func (b *benchNode) receive(m *raftpb.Message) error {
	if err := b.validateMessage(m); err != nil {
		return err
	}
	b.step(m)
	return nil
}

func message(typ raftpb.MessageType, from, term uint64) *raftpb.Message {
	return &raftpb.Message{Type: typ.Enum(), To: new(uint64(1)), From: new(from), Term: new(term)}
}

func entry(index, term uint64) *raftpb.Entry {
	return &raftpb.Entry{Type: raftpb.EntryNormal.Enum(), Index: new(index), Term: new(term), Data: testBatch("k", "v")}
}

func testBatch(key, value string) []byte {
	return kv.AppendBatch(nil, 0, 0, 0, kv.AppendCommand(nil, &kv.Command{Op: kv.OpPut, Key: key, Value: []byte(value)}))
}

// lead makes the bench node leader by the votes of the others.
func (b *benchNode) lead(t testing.TB) {
	t.Helper()
	for range 4 * b.cfg.ElectionTicks {
		b.tick()
		b.settle(t)
		st := b.raw.BasicStatus()
		typ, term := raftpb.MsgPreVoteResp, st.GetTerm()+1
		switch st.RaftState {
		case raft.StateLeader:
			return
		case raft.StateCandidate:
			typ, term = raftpb.MsgVoteResp, st.GetTerm()
		case raft.StateFollower:
			continue
		}
		if err := b.receive(message(typ, 2, term)); err != nil {
			t.Fatal(err)
		}
		b.settle(t)
	}
	t.Fatalf("no leader after all: %v", b.raw.BasicStatus())
}

// Each of these is refused at the door.
func TestRefusedMessages(t *testing.T) {
	b := newBenchNode(t)
	removed := *b.members.Load()
	removed.Removed = []uint64{8}
	b.setMembers(&removed)
	cc, err := change(opAdd, member{ID: 4, PeerURLs: []string{testURL(4)}, Learner: true}).confChange()
	if err != nil {
		t.Fatal(err)
	}
	disagree := proto.Clone(cc).(*raftpb.ConfChangeV2)
	disagree.Changes[0].NodeId = new(uint64(1))
	marshal := func(m proto.Message) []byte {
		out, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	with := func(m *raftpb.Message, f func(*raftpb.Message)) *raftpb.Message { f(m); return m }
	prop := func(ents ...*raftpb.Entry) *raftpb.Message {
		return with(message(raftpb.MsgProp, 2, 0), func(m *raftpb.Message) { m.Term, m.Entries = nil, ents })
	}
	read := func(data ...[]byte) *raftpb.Message {
		return with(message(raftpb.MsgReadIndex, 2, 0), func(m *raftpb.Message) {
			m.Term = nil
			for _, d := range data {
				m.Entries = append(m.Entries, &raftpb.Entry{Data: d})
			}
		})
	}
	app := func(index, logTerm uint64, ents ...*raftpb.Entry) *raftpb.Message {
		return with(message(raftpb.MsgApp, 2, 5), func(m *raftpb.Message) {
			m.Index, m.LogTerm, m.Entries = new(index), new(logTerm), ents
		})
	}
	snapshot := func(s *raftpb.Snapshot) *raftpb.Message {
		return with(message(raftpb.MsgSnap, 2, 5), func(m *raftpb.Message) { m.Snapshot = s })
	}
	meta := func(index, term uint64, cs *raftpb.ConfState) *raftpb.Message {
		return snapshot(&raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(index), Term: new(term), ConfState: cs}})
	}
	own := b.members.Load().confState()
	conf := func(f func(*raftpb.ConfState)) *raftpb.ConfState {
		cs := proto.Clone(own).(*raftpb.ConfState)
		f(cs)
		return cs
	}
	typed := func(typ raftpb.EntryType, data []byte) *raftpb.Entry {
		return &raftpb.Entry{Type: typ.Enum(), Data: data}
	}
	bad := map[string]*raftpb.Message{
		"empty":                            {},
		"from nobody":                      message(raftpb.MsgHeartbeat, 0, 5),
		"from self":                        message(raftpb.MsgHeartbeat, 1, 5),
		"a vote from self":                 message(raftpb.MsgVoteResp, 1, 5),
		"from LocalAppendThread":           message(raftpb.MsgAppResp, 1<<64-1, 5),
		"from LocalApplyThread":            message(raftpb.MsgAppResp, 1<<64-2, 5),
		"from a removed member":            message(raftpb.MsgVote, 8, 5),
		"to another member":                with(message(raftpb.MsgHeartbeat, 2, 5), func(m *raftpb.Message) { m.To = new(uint64(3)) }),
		"to nobody":                        with(message(raftpb.MsgHeartbeat, 2, 5), func(m *raftpb.Message) { m.To = nil }),
		"proposal without entries":         prop(),
		"proposal with a nil entry":        prop(nil),
		"proposal with a good and a nil":   prop(entry(0, 0), nil),
		"proposal of no batch":             prop(typed(raftpb.EntryNormal, []byte("garbage"))),
		"proposal of an empty entry":       prop(typed(raftpb.EntryNormal, nil)),
		"proposal of a cut batch":          prop(typed(raftpb.EntryNormal, testBatch("k", "v")[:5])),
		"conf change of garbage":           prop(typed(raftpb.EntryConfChangeV2, []byte{0xff})),
		"conf change of nothing":           prop(typed(raftpb.EntryConfChangeV2, nil)),
		"conf change whose parts disagree": prop(typed(raftpb.EntryConfChangeV2, marshal(disagree))),
		"conf change of the first kind":    prop(typed(raftpb.EntryConfChange, marshal(&raftpb.ConfChange{NodeId: new(uint64(2))}))),
		"entry of an unknown type":         prop(typed(9, testBatch("k", "v"))),
		"proposal with a term":             with(prop(entry(0, 0)), func(m *raftpb.Message) { m.Term = new(uint64(5)) }),
		"read with a term":                 with(read([]byte("x")), func(m *raftpb.Message) { m.Term = new(uint64(5)) }),
		"read from nobody":                 with(read([]byte("x")), func(m *raftpb.Message) { m.From = nil }),
		"read without entries":             read(),
		"read with two entries":            read([]byte("x"), []byte("y")),
		"read with an empty context":       read(nil),
		"read with a long context":         read(make([]byte, 65)),
		"read with a nil entry":            with(read(), func(m *raftpb.Message) { m.Entries = []*raftpb.Entry{nil} }),
		"answer to a read, empty":          message(raftpb.MsgReadIndexResp, 2, 5),
		"append with a gap":                app(1, 1, entry(3, 5)),
		"append with a gap later":          app(1, 1, entry(2, 5), entry(4, 5)),
		"append that repeats an index":     app(1, 1, entry(2, 5), entry(2, 5)),
		"append with falling terms":        app(1, 1, entry(2, 5), entry(3, 4)),
		"append below its base":            app(1, 3, entry(2, 2)),
		"append beyond its own term":       app(1, 1, entry(2, 6)),
		"append with a nil entry":          app(1, 1, nil),
		"append with an unknown type":      app(1, 1, &raftpb.Entry{Type: raftpb.EntryType(9).Enum(), Index: new(uint64(2)), Term: new(uint64(5))}),
		"append with an old conf change":   app(1, 1, &raftpb.Entry{Type: raftpb.EntryConfChange.Enum(), Index: new(uint64(2)), Term: new(uint64(5))}),
		"append at the end of numbers":     app(1<<64-1, 1, entry(1, 5)),
		"nil snapshot":                     snapshot(nil),
		"nil metadata":                     snapshot(&raftpb.Snapshot{}),
		"snapshot at 0":                    meta(0, 1, own),
		"snapshot at the end of numbers":   meta(1<<64-1, 1, own),
		"snapshot of term 0":               meta(10, 0, own),
		"snapshot of the future":           meta(10, 6, own),
		"snapshot of another term":         meta(10, 3, own), // memFiles: 10 is of term 2
		"snapshot without a conf":          meta(10, 2, nil),
		"snapshot of other voters":         meta(10, 2, conf(func(c *raftpb.ConfState) { c.Voters = c.Voters[:2] })),
		"snapshot of a voter twice":        meta(10, 2, conf(func(c *raftpb.ConfState) { c.Voters = append(c.Voters, 3) })),
		"snapshot amid joint consensus":    meta(10, 2, conf(func(c *raftpb.ConfState) { c.VotersOutgoing = []uint64{1} })),
		"snapshot with a learner to be":    meta(10, 2, conf(func(c *raftpb.ConfState) { c.LearnersNext = []uint64{9} })),
		"snapshot that leaves by itself":   meta(10, 2, conf(func(c *raftpb.ConfState) { c.AutoLeave = new(true) })),
		// Raft counts on from there and would wrap around to 0, which it
		// panics over; the term is on disk by then, so it would for ever.
		"a vote in the last term":      message(raftpb.MsgVote, 2, 1<<64-1),
		"a vote in half the last term": message(raftpb.MsgVote, 2, 1<<63),
		"a heartbeat in the last term": message(raftpb.MsgHeartbeat, 2, 1<<64-1),
		"a vote with a snapshot":       with(message(raftpb.MsgVote, 2, 5), func(m *raftpb.Message) { m.Snapshot = &raftpb.Snapshot{} }),
		"a refusal in the last term":   with(message(raftpb.MsgAppResp, 2, 1<<64-2), func(m *raftpb.Message) { m.Reject = new(true) }),
	}
	for _, typ := range []raftpb.MessageType{raftpb.MsgHup, raftpb.MsgBeat, raftpb.MsgUnreachable, raftpb.MsgSnapStatus, raftpb.MsgCheckQuorum,
		raftpb.MsgStorageAppend, raftpb.MsgStorageAppendResp, raftpb.MsgStorageApply, raftpb.MsgStorageApplyResp, raftpb.MsgForgetLeader, 99, -1} {
		bad[fmt.Sprintf("local type %v", typ)] = message(typ, 2, 5)
	}
	for typ := range fromPeers {
		if typ != raftpb.MsgProp && typ != raftpb.MsgReadIndex {
			bad[fmt.Sprintf("%v without a term", typ)] = message(typ, 2, 0)
		}
	}
	for size := range 20 {
		for typ := range fromPeers {
			heartbeat := typ == raftpb.MsgHeartbeat || typ == raftpb.MsgHeartbeatResp
			if size != 0 && !(size == 8 && heartbeat) {
				bad[fmt.Sprintf("%v with %d bytes of context", typ, size)] = with(message(typ, 2, 5), func(m *raftpb.Message) { m.Context = make([]byte, size) })
			}
		}
	}
	for name, m := range bad {
		t.Run(name, func(t *testing.T) {
			before := proto.Clone(m)
			err := b.Process(context.Background(), m)
			var answer badMessage
			if !errors.As(err, &answer) {
				t.Fatalf("took it: %v", err)
			}
			rec := httptest.NewRecorder()
			answer.WriteTo(rec)
			if rec.Code != http.StatusBadRequest {
				t.Errorf("answers %d", rec.Code)
			}
			if !proto.Equal(before, m) {
				t.Error("changed the message")
			}
		})
	}
	if len(b.recvC) != 0 {
		t.Fatalf("%d refused messages reached the loop", len(b.recvC))
	}
	ownBatch := kv.AppendBatch(nil, 2, 1, 1, kv.AppendCommand(nil, &kv.Command{Op: kv.OpPut, Key: "k"}))
	good := map[string]*raftpb.Message{
		"proposal":                     prop(&raftpb.Entry{Type: raftpb.EntryNormal.Enum(), Data: ownBatch}),
		"change":                       prop(typed(raftpb.EntryConfChangeV2, marshal(cc))),
		"read":                         read([]byte("0123456789abcdef")),
		"append":                       app(1, 1, entry(2, 1), entry(3, 5)),
		"snapshot":                     meta(10, 2, own),
		"heartbeat":                    with(message(raftpb.MsgHeartbeat, 2, 5), func(m *raftpb.Message) { m.Context = make([]byte, 8) }),
		"transfer":                     message(raftpb.MsgTransferLeader, 1, 5), // names who shall lead
		"a new peer":                   message(raftpb.MsgVote, 77, 5),          // we may not have heard of it yet
		"a vote for the leader's heir": with(message(raftpb.MsgVote, 2, 5), func(m *raftpb.Message) { m.Context = []byte("CampaignTransfer") }),
	}
	for name, m := range good {
		if err := b.validateMessage(m); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A follower passes proposals, reads and transfers on to the leader in their
// sender's name, so one that has begun to lead gets its own back.
func TestOwnMessagesComeBack(t *testing.T) {
	b := newBenchNode(t)
	prop := message(raftpb.MsgProp, 1, 0)
	put := kv.AppendCommand(nil, &kv.Command{Op: kv.OpPut, Key: "k"})
	prop.Term, prop.Entries = nil, []*raftpb.Entry{{Data: kv.AppendBatch(nil, 1, 1, 1, put)}}
	read := message(raftpb.MsgReadIndex, 1, 0)
	read.Term, read.Entries = nil, []*raftpb.Entry{{Data: []byte("context")}}
	for _, m := range []*raftpb.Message{prop, read, message(raftpb.MsgTransferLeader, 1, 5)} {
		if err := b.validateMessage(m); err != nil {
			t.Errorf("%v: %v", m.GetType(), err)
		}
	}
	for _, typ := range []raftpb.MessageType{raftpb.MsgApp, raftpb.MsgAppResp, raftpb.MsgVote, raftpb.MsgHeartbeat, raftpb.MsgTimeoutNow} {
		if err := b.validateMessage(message(typ, 1, 5)); err == nil {
			t.Errorf("%v of its own is let in", typ)
		}
	}
}

// TestAnswersToAFormerLeader: what a leader had sent before its restart is still
// answered, to a follower by then. That is no sign of a log that lost something,
// unlike the same answers to a leader.
func TestAnswersToAFormerLeader(t *testing.T) {
	b := newBenchNode(t)
	complaints := 0
	b.log = zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zapcore.EncoderConfig{}), zapcore.AddSync(io.Discard), zapcore.ErrorLevel),
		zap.Hooks(func(zapcore.Entry) error { complaints++; return nil }))
	b.said = b.log
	answer := func() {
		t.Helper()
		term := b.raw.BasicStatus().GetTerm()
		ack, beat := message(raftpb.MsgAppResp, 2, term), message(raftpb.MsgHeartbeatResp, 2, term)
		ack.Index, beat.Context = new(uint64(99)), []byte{99, 0, 0, 0, 0, 0, 0, 0}
		for _, m := range []*raftpb.Message{ack, beat} {
			if err := b.receive(m); err != nil {
				t.Fatal(err)
			}
		}
		b.settle(t)
	}
	if answer(); complaints != 0 {
		t.Errorf("a follower complains %d times", complaints)
	}
	b.lead(t)
	if answer(); complaints != 2 {
		t.Errorf("a leader complains %d times, want 2", complaints)
	}
}

// What passes the door and needs raft's own state to be judged: none of these
// ends the process, moves the commit index or makes raft count what is not there.
func TestMessagesThatNeedState(t *testing.T) {
	beat := func(from, term, commit uint64) *raftpb.Message {
		m := message(raftpb.MsgHeartbeat, from, term)
		m.Commit = new(commit)
		return m
	}
	appendTo := func(from, term, index, logTerm uint64, ents ...*raftpb.Entry) *raftpb.Message {
		m := message(raftpb.MsgApp, from, term)
		m.Index, m.LogTerm, m.Entries = new(index), new(logTerm), ents
		return m
	}
	follow := func(t *testing.T, b *benchNode) { // leader 2, entries 2..5 of term 2, none committed
		if err := b.receive(appendTo(2, 2, 1, 1, entry(2, 2), entry(3, 2), entry(4, 2), entry(5, 2))); err != nil {
			t.Fatal(err)
		}
		b.settle(t)
	}
	ack := func(from, index uint64) *raftpb.Message {
		m := message(raftpb.MsgAppResp, from, 2)
		m.Index = new(index)
		return m
	}
	commit := func(t *testing.T, b *benchNode, want uint64) {
		t.Helper()
		b.settle(t)
		if got := b.raw.BasicStatus().GetCommit(); got != want {
			t.Errorf("commit %d, want %d", got, want)
		}
	}
	for name, f := range map[string]func(*testing.T, *benchNode){
		"a heartbeat commits beyond the log": func(t *testing.T, b *benchNode) {
			follow(t, b)
			b.receive(beat(2, 2, 6))
			b.receive(beat(2, 2, 1<<64-1))
			b.receive(beat(3, 7, 6)) // of a later leader
			commit(t, b, 1)
		},
		"an append differs from what is committed": func(t *testing.T, b *benchNode) {
			follow(t, b)
			b.receive(beat(2, 2, 4))
			commit(t, b, 4)
			b.receive(appendTo(3, 5, 3, 4, entry(4, 5)))
			commit(t, b, 4)
			if term := b.raw.BasicStatus().GetTerm(); term != 2 {
				t.Errorf("raft heard of it, the term is %d", term)
			}
			b.receive(appendTo(3, 5, 3, 2, entry(4, 2), entry(5, 5))) // it is equal up to there
			if b.settle(t); b.stable != 5 || b.raw.BasicStatus().GetTerm() != 5 {
				t.Errorf("the log ends at %d, in term %d", b.stable, b.raw.BasicStatus().GetTerm())
			}
		},
		"a heartbeat commits what an append has just cut off": func(t *testing.T, b *benchNode) {
			follow(t, b)
			b.receive(appendTo(3, 3, 2, 2, entry(3, 3))) // the log ends at 3 now, the disk at 5
			b.receive(beat(3, 3, 5))
			b.settle(t)
			if got := b.raw.BasicStatus().GetCommit(); got > 3 {
				t.Errorf("commit %d", got)
			}
		},
		"a heartbeat commits what a snapshot has just cut off": func(t *testing.T, b *benchNode) {
			var ents []*raftpb.Entry
			for i := uint64(2); i <= 20; i++ {
				ents = append(ents, entry(i, 2))
			}
			if err := b.receive(appendTo(2, 2, 1, 1, ents...)); err != nil {
				t.Fatal(err)
			}
			b.settle(t)
			m := message(raftpb.MsgSnap, 3, 3) // replaces the log, which ends at 8 now, and the disk at 20
			m.Snapshot = &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(8)), Term: new(uint64(3)), ConfState: b.members.Load().confState()}}
			if err := b.receive(m); err != nil {
				t.Fatal(err)
			}
			b.receive(beat(3, 3, 20))
			commit(t, b, 8)
		},
		"a snapshot of a past leader holds up the present one": func(t *testing.T, b *benchNode) {
			follow(t, b)
			m := message(raftpb.MsgSnap, 3, 1)
			m.Snapshot = &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(9)), Term: new(uint64(1)), ConfState: b.members.Load().confState()}}
			if err := b.receive(m); err != nil { // raft ignores it without an answer
				t.Fatal(err)
			}
			b.settle(t)
			b.receive(beat(2, 2, 5))
			commit(t, b, 5)
		},
		"an append commits beyond itself": func(t *testing.T, b *benchNode) {
			m := appendTo(2, 2, 1, 1, entry(2, 2))
			m.Commit = new(uint64(1 << 60))
			b.receive(m)
			commit(t, b, 2)
		},
		"an append onto nothing": func(t *testing.T, b *benchNode) {
			b.receive(appendTo(2, 2, 1<<64-2, 1))
			b.receive(appendTo(2, 2, 100, 1, entry(101, 2)))
			commit(t, b, 1)
		},
		"a transfer by a follower": func(t *testing.T, b *benchNode) {
			follow(t, b)
			b.receive(message(raftpb.MsgTransferLeader, 3, 2))
			b.settle(t)
		},
		"a transfer right after a leader was deposed": func(t *testing.T, b *benchNode) {
			b.lead(t)
			b.receive(beat(2, 3, 1))
			b.receive(message(raftpb.MsgTransferLeader, 3, 3)) // raft would forward it, and panic over its term
			b.settle(t)
		},
		"an acknowledgement beyond the leader's log": func(t *testing.T, b *benchNode) {
			b.lead(t)
			b.receive(ack(2, 1000))
			b.settle(t)
			commit(t, b, 1) // 2 cannot have it: its word counts for nothing
			b.receive(ack(3, 2))
			commit(t, b, 2)
			if err := b.raw.Propose(testBatch("k", "v")); err != nil {
				t.Fatal(err)
			}
			commit(t, b, 2) // one voter of three has entry 3
		},
		"a refusal with a hint beyond the log": func(t *testing.T, b *benchNode) {
			b.lead(t)
			for _, hint := range []uint64{3, 1000, 1<<64 - 1} {
				m := ack(2, 1)
				m.Reject, m.RejectHint, m.LogTerm = new(true), new(hint), new(uint64(1))
				b.receive(m)
				b.settle(t)
			}
			commit(t, b, 1)
		},
		"heartbeat answers with contexts that nobody sent": func(t *testing.T, b *benchNode) {
			b.lead(t)
			b.receive(ack(2, 2))
			b.settle(t)
			for _, ctx := range []uint64{1, 7, 1<<64 - 1} {
				for _, from := range []uint64{2, 3} {
					m := message(raftpb.MsgHeartbeatResp, from, 2)
					m.Context = binary.LittleEndian.AppendUint64(nil, ctx)
					b.receive(m)
				}
				b.settle(t)
			}
			commit(t, b, 2)
		},
		"a snapshot that is behind": func(t *testing.T, b *benchNode) {
			follow(t, b)
			b.receive(beat(2, 2, 5))
			commit(t, b, 5)
			m := message(raftpb.MsgSnap, 2, 2)
			m.Snapshot = &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(4)), Term: new(uint64(2)), ConfState: b.members.Load().confState()}}
			b.receive(m)
			commit(t, b, 5)
		},
		"a read without a leader, and many at one without a commit": func(t *testing.T, b *benchNode) {
			m := message(raftpb.MsgReadIndex, 2, 0)
			m.Term, m.Entries = nil, []*raftpb.Entry{{Data: []byte("x")}}
			b.receive(proto.Clone(m).(*raftpb.Message))
			b.settle(t)
			b.lead(t)
			for range 100 {
				b.receive(proto.Clone(m).(*raftpb.Message))
			}
			b.settle(t)
			b.receive(ack(2, 2))
			commit(t, b, 2)
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBenchNode(t)
			defer func() {
				if r := recover(); r != nil {
					t.Errorf("the process would have ended: %v", r)
				}
			}()
			f(t, b)
			for range 100 { // whatever it left behind, elections still work
				b.tick()
				b.settle(t)
			}
		})
	}
}

// A member that was lied to about terms can still be elected: whatever it takes
// from one message leaves room for more elections than there will be. The term
// is on disk by then, and with the majority soon.
func TestTermJumpIsSurvived(t *testing.T) {
	for _, term := range []uint64{1 << 20, 1 << 40, 1 << 61, 1<<62 - 1, 1 << 62, 1<<62 + 1, 1 << 63, 1<<64 - 1} {
		for _, typ := range []raftpb.MessageType{raftpb.MsgVote, raftpb.MsgHeartbeat, raftpb.MsgAppResp} {
			b := newBenchNode(t)
			if err := b.receive(message(typ, 2, term)); err != nil {
				continue // refused: as good
			}
			b.settle(t)
			for range 3 {
				st := b.raw.BasicStatus()
				if err := b.receive(message(raftpb.MsgVote, 3, st.GetTerm()+1)); err != nil {
					t.Errorf("after %v of term %d nobody can be elected any more: %v", typ, term, err)
					break
				}
				b.settle(t)
			}
		}
	}
}

// peerPort is the peer port of a running member, as newServer builds it.
func peerPort(t *testing.T, n *testNode) (*httptest.Server, *rafthttp.Transport) {
	t.Helper()
	own, err := types.NewURLs([]string{testURL(n.id)})
	if err != nil {
		t.Fatal(err)
	}
	tr := &rafthttp.Transport{Logger: quietLog, DialTimeout: time.Second, ID: types.ID(n.id), URLs: own,
		ClusterID: types.ID(n.node.members.Load().ClusterID), Raft: n.node, Snapshotter: snap.New(quietLog, n.disk.snapDir()),
		ServerStats: stats.NewServerStats("x", "x"), LeaderStats: stats.NewLeaderStats(quietLog, "x"), ErrorC: make(chan error, 1)}
	if err := tr.Start(); err != nil {
		t.Fatal(err)
	}
	closeIdle, err := guardAnswers(tr, n.node.isMember, n.node.refusedAnswer)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.Stop(); closeIdle() })
	srv := httptest.NewUnstartedServer(n.node.peerHandler(tr.Handler()))
	srv.Config.ErrorLog = zap.NewStdLog(quietLog)
	srv.Start()
	t.Cleanup(srv.Close)
	return srv, tr
}

// unhurt runs f against member n and shows that n is what it was before.
func (n *testNode) unhurt(t *testing.T, f func()) {
	t.Helper()
	type view struct {
		soft    soft
		members *membership
		commit  uint64
	}
	look := func() (v view) {
		if err := n.node.do(n.c.ctx(), func() {
			v = view{n.node.now, n.node.members.Load(), n.node.raw.BasicStatus().GetCommit()}
		}); err != nil {
			t.Fatalf("the loop has ended: %v", err)
		}
		return v
	}
	before := look()
	f()
	if after := look(); after != before {
		t.Errorf("it changed %+v into %+v", before, after)
	}
}

func TestPeerPortRefuses(t *testing.T) {
	// Seldom elections: the term is compared before and after.
	c := newCluster(t, 3, func(cfg *Config) { cfg.ElectionTicks = 20 })
	l := c.leader()
	if err := l.store.removeMember(c.ctx(), c.follower().id, false); err != nil {
		t.Fatal(err)
	}
	var gone *testNode
	c.wait("the removed member's end", func() bool {
		for id, n := range c.nodes {
			if l.node.IsIDRemoved(id) {
				gone = n
			}
		}
		return gone != nil
	})
	c.wantRemoved(gone.id)
	l = c.leader()
	var other uint64
	for id := range c.nodes {
		if id != l.id {
			other = id
		}
	}
	l.mustPut("k", "v")
	waitFor(t, "the leader to have seen all members hold entries", func() bool {
		return !slices.ContainsFunc(l.node.members.Load().Members, func(m member) bool { return !m.Started })
	})
	c.quiet()
	srv, tr := peerPort(t, l)
	cluster := tr.ClusterID.String()
	client := srv.Client()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	client.Timeout = 10 * time.Second

	type head map[string]string
	ok := head{"X-Etcd-Cluster-Id": cluster, "X-Server-Version": "3.7.0", "X-Min-Cluster-Version": "3.0.0", "X-Server-From": types.ID(other).String(), "X-Raft-To": tr.ID.String()}
	but := func(k, v string) head {
		h := head{}
		for key, value := range ok {
			h[key] = value
		}
		h[k] = v
		return h
	}
	frame := func(m *raftpb.Message, body string) io.Reader { // as rafthttp streams a snapshot
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return io.MultiReader(bytes.NewReader(binary.BigEndian.AppendUint64(nil, uint64(len(b)))), bytes.NewReader(b), strings.NewReader(body))
	}
	snapMsg := func(s *raftpb.Snapshot) *raftpb.Message {
		return &raftpb.Message{Type: raftpb.MsgSnap.Enum(), From: new(other), To: new(l.id), Term: new(uint64(50)), Snapshot: s}
	}
	at := func(index uint64) *raftpb.Snapshot {
		return &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(index), Term: new(uint64(1)), ConfState: l.node.members.Load().confState()}}
	}
	garbage := strings.Repeat("\xff\x00garbage", 100)
	stream := func(id uint64) string { return "/raft/stream/msgapp/" + types.ID(id).String() }
	for _, x := range []struct {
		name, method, path string
		head               head
		body               io.Reader
		want               int
	}{
		{"garbage", "POST", "/raft", ok, strings.NewReader(garbage), 400},
		{"nothing", "POST", "/raft", ok, nil, 400},
		{"wrong method", "GET", "/raft", ok, nil, 405},
		{"wrong cluster", "POST", "/raft", but("X-Etcd-Cluster-Id", "1234"), strings.NewReader(garbage), 412},
		{"wrong cluster, stream", "GET", stream(other), but("X-Etcd-Cluster-Id", "1234"), nil, 412},
		{"wrong cluster, snapshot", "POST", "/raft/snapshot", but("X-Etcd-Cluster-Id", "1234"), strings.NewReader(garbage), 412},
		{"no cluster", "POST", "/raft", head{}, strings.NewReader(garbage), 412},
		{"version of letters", "POST", "/raft", but("X-Server-Version", "abc"), strings.NewReader(garbage), 400},
		{"version of two numbers", "GET", stream(other), but("X-Server-Version", "3.7"), nil, 400},
		{"least version of letters", "POST", "/raft/snapshot", but("X-Min-Cluster-Version", "a.b.c"), nil, 400},
		{"version from long ago", "POST", "/raft", but("X-Server-Version", "2.0.0"), strings.NewReader(garbage), 412},
		{"huge", "POST", "/raft", ok, bytes.NewReader(make([]byte, 70<<20)), 400},
		{"huge, without a length", "POST", "/raft", ok, io.LimitReader(zeros{}, 70<<20), 400},
		{"stream of nobody", "GET", stream(77), ok, nil, 404},
		{"stream of no id", "GET", "/raft/stream/msgapp/xyz", ok, nil, 404},
		{"stream of no kind", "GET", "/raft/stream/xyz/2", ok, nil, 404},
		{"stream by POST", "POST", stream(other), ok, strings.NewReader(garbage), 405},
		{"stream of a removed member", "GET", stream(gone.id), ok, nil, 410},
		{"snapshot of garbage", "POST", "/raft/snapshot", ok, strings.NewReader(garbage), 400},
		{"snapshot of nothing", "POST", "/raft/snapshot", ok, nil, 400},
		{"snapshot that claims 2^63 bytes", "POST", "/raft/snapshot", ok, strings.NewReader("\x80\x00\x00\x00\x00\x00\x00\x00x"), 400},
		{"snapshot that is none", "POST", "/raft/snapshot", ok, frame(message(raftpb.MsgHeartbeat, other, 5), ""), 400},
		{"nil snapshot", "POST", "/raft/snapshot", ok, frame(snapMsg(nil), garbage), 400},
		{"nil metadata", "POST", "/raft/snapshot", ok, frame(snapMsg(&raftpb.Snapshot{}), garbage), 400},
		{"snapshot file of garbage", "POST", "/raft/snapshot", ok, frame(snapMsg(at(1<<40)), garbage), 400},
		{"snapshot file of garbage, from a removed member", "POST", "/raft/snapshot", ok, frame(func() *raftpb.Message {
			m := snapMsg(at(1 << 41))
			m.From = new(gone.id)
			return m
		}(), garbage), 400},
		{"unknown path", "GET", "/raft/xyz", ok, nil, 404},
		{"root", "GET", "/", ok, nil, 404},
		{"path that is not clean", "POST", "//raft/../raft", ok, strings.NewReader(garbage), 0},
	} {
		t.Run(x.name, func(t *testing.T) {
			l.unhurt(t, func() {
				req, err := http.NewRequest(x.method, srv.URL+x.path, x.body)
				if err != nil {
					t.Fatal(err)
				}
				for k, v := range x.head {
					req.Header.Set(k, v)
				}
				resp, err := client.Do(req)
				if err != nil {
					t.Fatalf("no answer: %v", err)
				}
				defer resp.Body.Close()
				if x.want != 0 && resp.StatusCode != x.want {
					body, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
					t.Errorf("answers %d %q, want %d", resp.StatusCode, body, x.want)
				}
				// To rafthttp on the other side these say "you were removed".
				if x.want != 410 && (resp.StatusCode == 403 || resp.StatusCode == 410) {
					t.Errorf("answers %d", resp.StatusCode)
				}
			})
		})
	}
	// Nothing stays of refused snapshots.
	for _, pattern := range []string{"tmp*", "0000[0-9a-f]*[1-9a-f]0000000000.snap.db"} {
		if left, err := filepath.Glob(filepath.Join(l.disk.snapDir(), pattern)); err != nil || len(left) > 0 {
			t.Errorf("the refused files %v stay, %v", left, err)
		}
	}
	l.mustPut("k", "w")
	l.mustGet("k", "w")
	c.check()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A caller that knows the cluster id must not make us send to its address.
func TestPeerURLHeaderRegistersNobody(t *testing.T) {
	c := newCluster(t, 1, nil)
	l := c.leader()
	srv, tr := peerPort(t, l)
	heard := make(chan string, 16)
	listen := func(name string) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			heard <- name
			w.WriteHeader(http.StatusNoContent)
		}))
		t.Cleanup(s.Close)
		return s.URL
	}
	trap := listen("the address of the header")
	for _, path := range []string{"/raft", "/raft/snapshot", "/raft/stream/message/4d"} {
		method := "POST"
		if strings.Contains(path, "stream") {
			method = "GET"
		}
		req, err := http.NewRequest(method, srv.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Etcd-Cluster-ID", tr.ClusterID.String())
		req.Header.Set("X-Server-Version", "3.7.0")
		req.Header.Set("X-Min-Cluster-Version", "3.0.0")
		req.Header.Set("X-Server-From", "4d") // 77
		req.Header.Set("X-PeerURLs", trap)
		resp, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	// The transport does not list such addresses; a message shows where it goes.
	tr.AddRemote(77, []string{listen("the table's address")})
	tr.Send([]*raftpb.Message{{Type: raftpb.MsgHeartbeat.Enum(), From: new(uint64(1)), To: new(uint64(77))}})
	if name := <-heard; name != "the table's address" {
		t.Errorf("the message went to %s", name)
	}
	l.mustPut("k", "v")
}

// A member that is not in this one's table yet is answered on the connection
// that it has opened; and with the table comes its address.
func TestStrangerIsAnswered(t *testing.T) {
	b := newBenchNode(t)
	cluster := types.ID(b.raftNode.members.Load().ClusterID)
	tr := &rafthttp.Transport{Logger: quietLog, DialTimeout: time.Second, ID: types.ID(b.raftNode.id), ClusterID: cluster, Raft: b.raftNode,
		Snapshotter: snap.New(quietLog, t.TempDir()), ServerStats: stats.NewServerStats("x", "x"), LeaderStats: stats.NewLeaderStats(quietLog, "x"), ErrorC: make(chan error, 1)}
	if err := tr.Start(); err != nil {
		t.Fatal(err)
	}
	b.raftNode.tr = tr
	srv := httptest.NewUnstartedServer(b.raftNode.peerHandler(tr.Handler()))
	srv.Config.ErrorLog = zap.NewStdLog(quietLog)
	srv.Start()
	t.Cleanup(func() { tr.Stop(); srv.Close() }) // in this order: streams end with the transport
	dial := func(id uint64, cluster types.ID) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "GET", srv.URL+"/raft/stream/message/"+types.ID(id).String(), nil)
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range map[string]string{"X-Etcd-Cluster-ID": cluster.String(), "X-Server-Version": "3.7.0", "X-Min-Cluster-Version": "3.0.0",
			"X-Server-From": types.ID(id).String(), "X-Raft-To": types.ID(b.raftNode.id).String()} {
			req.Header.Set(k, v)
		}
		resp, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	if got := dial(77, cluster+2).StatusCode; got != http.StatusPreconditionFailed {
		t.Errorf("a stranger of another cluster got %d", got)
	}
	if len(b.raftNode.strangers.ids) != 0 {
		t.Errorf("strangers %v", b.raftNode.strangers.ids)
	}
	resp := dial(77, cluster)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("a stranger got %s", resp.Status)
	}
	got := make(chan raftpb.MessageType, 1)
	go func() {
		for { // rafthttp sends empty heartbeats between
			var size [8]byte
			if _, err := io.ReadFull(resp.Body, size[:]); err != nil {
				return
			}
			body := make([]byte, binary.BigEndian.Uint64(size[:]))
			var m raftpb.Message
			if _, err := io.ReadFull(resp.Body, body); err != nil || proto.Unmarshal(body, &m) != nil {
				return
			}
			if m.GetTo() == 77 {
				got <- m.GetType()
				return
			}
		}
	}()
	waitFor(t, "an answer on the stranger's connection", func() bool {
		tr.Send([]*raftpb.Message{{Type: raftpb.MsgAppResp.Enum(), From: new(b.raftNode.id), To: new(uint64(77)), Term: new(uint64(3))}})
		return len(got) > 0
	})
	if typ := <-got; typ != raftpb.MsgAppResp {
		t.Errorf("got %v", typ)
	}
	for id := range uint64(2 * maxStrangers) {
		dial(100+id, cluster)
	}
	if n := len(b.raftNode.strangers.ids); n != maxStrangers {
		t.Errorf("%d strangers, the limit is %d", n, maxStrangers)
	}
	// The table names 77: it makes room for another.
	m := *b.raftNode.members.Load()
	m.Members = append(slices.Clone(m.Members), member{ID: 77, PeerURLs: []string{testURL(9)}, Learner: true})
	b.raftNode.members.Store(&m)
	if got := dial(200, cluster).StatusCode; got != http.StatusOK {
		t.Errorf("a stranger for whom there is room got %d", got)
	}
}

// A joiner that waits for its first snapshot knows no table; that it was removed
// meanwhile it hears from those that --cluster names.
func TestJoinerConfirmsRemoval(t *testing.T) {
	table := &membership{ClusterID: 7, Members: []member{{ID: 1, PeerURLs: []string{testURL(1)}}}, Removed: []uint64{4}}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := json.NewEncoder(w).Encode(clusterInfo{Member: 1, Members: table}); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(srv.Close)
	s := &server{cfg: Config{ID: 4, Cluster: []clusterURL{{1, srv.URL}, {4, testURL(4)}}}, node: &raftNode{}, tr: &rafthttp.Transport{ClusterID: 7}}
	s.node.members.Store(&membership{ClusterID: 7})
	if err := s.confirmRemoval(t.Context()); !errors.Is(err, errRemoved) {
		t.Errorf("removed: %v", err)
	}
	s.cfg.Cluster = slices.Insert(s.cfg.Cluster, 0, clusterURL{2, hungPeer(t)})
	start := time.Now()
	if err := s.confirmRemoval(t.Context()); !errors.Is(err, errRemoved) || time.Since(start) > time.Second {
		t.Errorf("removed, beside a peer that hangs: %v after %v", err, time.Since(start))
	}
	s.cfg.Cluster = s.cfg.Cluster[1:]
	table = &membership{ClusterID: 7, Members: table.Members}
	if err := s.confirmRemoval(t.Context()); err != nil {
		t.Errorf("not removed: %v", err)
	}
}

// What a peer that answered says of a joiner is not hidden by one that is down, and
// says what to do.
func TestJoinerIsTold(t *testing.T) {
	var said any
	status := http.StatusOK
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		if err := json.NewEncoder(w).Encode(said); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(srv.Close)
	down := "http://127.0.0.1:1"
	cfg := Config{ID: 4, Cluster: []clusterURL{{1, srv.URL}, {2, down}, {4, testURL(4)}}}
	founder := member{ID: 1, PeerURLs: []string{testURL(1)}}
	table := func(ms ...member) clusterInfo {
		return clusterInfo{Member: 1, Members: &membership{ClusterID: 7, Members: append([]member{founder}, ms...)}}
	}
	for _, tt := range []struct {
		said   any
		status int
		cfg    Config
		want   string
		ends   error
	}{
		{table(), 200, cfg, "curl -X POST -d " + testURL(4), nil},
		{table(member{ID: 20, PeerURLs: []string{testURL(4)}, Learner: true}), 200, cfg, "start it with --id 20", nil},
		{table(member{ID: 4, PeerURLs: []string{testURL(5)}, Learner: true}), 200, cfg, `/v1/members/4 -d '{"peer_url":"` + testURL(4) + `"}'`, errRefuse},
		{"not found", 404, cfg, "--cluster takes the peer URLs", nil},
		{nil, 200, Config{ID: 4, Cluster: []clusterURL{{2, down}, {4, testURL(4)}}}, "no answer from " + down, errNoAnswer},
		{nil, 200, Config{ID: 4, Cluster: []clusterURL{{4, testURL(4)}}}, "--join needs", errUsage},
	} {
		said, status = tt.said, tt.status
		_, err := askCluster(t.Context(), tt.cfg)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want %q", err, tt.want)
		}
		for _, end := range []error{errRefuse, errUsage, errNoAnswer} {
			if errors.Is(err, end) != (tt.ends == end) {
				t.Errorf("%v: is it %v? %v", err, end, errors.Is(err, end))
			}
		}
	}
}

// A member that was moved replays its former addresses without a word, and tells of a
// move that is new.
func TestMoveIsToldOnce(t *testing.T) {
	b := newBenchNode(t)
	core, logs := observer.New(zapcore.WarnLevel)
	b.log, b.replayed = zap.New(core), 10
	move := memberChange{Op: opUpdate, Member: member{ID: b.raftNode.id, PeerURLs: []string{testURL(9)}}}
	if b.reconnect(10, move); logs.Len() != 0 {
		t.Errorf("a replay says %v", logs.All())
	}
	if b.reconnect(11, move); logs.FilterMessageSnippet("was moved").Len() != 1 {
		t.Errorf("a move says %v", logs.All())
	}
}

// An election is one change of leader: to have none in between is not another.
func TestLeaderChangesAreCounted(t *testing.T) {
	b, reg := newBenchNode(t), prometheus.NewRegistry()
	b.met = newNodeMetrics(reg)
	for _, lead := range []uint64{2, raft.None, 3, 3, raft.None} {
		b.observe(raft.Ready{SoftState: &raft.SoftState{Lead: lead, RaftState: raft.StateFollower}})
	}
	all, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if m.GetName() == "pontoon_leader_changes_total" && m.Metric[0].Counter.GetValue() != 2 {
			t.Errorf("%v changes of leader, there were 2", m.Metric[0].Counter.GetValue())
		}
	}
}

// hungPeer is the URL of a process that stands still: its kernel accepts.
func hungPeer(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return "http://" + l.Addr().String()
}

// A member that considers standing aside rests on the table with the fewest voters,
// and on the one that says it was removed, whoever answers first.
func TestAskTable(t *testing.T) {
	members := func(n uint64) (m []member) {
		for id := range n {
			m = append(m, member{ID: id + 1, PeerURLs: []string{testURL(id + 1)}})
		}
		return m
	}
	old := &membership{ClusterID: 7, Members: members(5)}
	small := &membership{ClusterID: 7, Members: members(2), Removed: []uint64{3, 4, 5}}
	gone := &membership{ClusterID: 7, Members: members(4)[1:], Removed: []uint64{1}}
	for i, tt := range []struct {
		said []*membership
		want *membership
	}{
		{[]*membership{old, small}, small},
		{[]*membership{small, old}, small},
		{[]*membership{small, gone, old}, gone},
		{[]*membership{gone, small}, gone},
		{nil, nil},
	} {
		cfg := Config{ID: 1, Cluster: []clusterURL{{1, testURL(1)}, {2, "http://127.0.0.1:1"}}} // 2 is down
		for at, m := range tt.said {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if err := json.NewEncoder(w).Encode(clusterInfo{Member: 2, Members: m}); err != nil {
					t.Error(err)
				}
			}))
			t.Cleanup(srv.Close)
			cfg.Cluster = append(cfg.Cluster, clusterURL{uint64(at + 3), srv.URL})
		}
		if got := askTable(t.Context(), cfg); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%d: got %+v, want %+v", i, got, tt.want)
		}
	}
}

// Hostile messages through Process against a running leader and follower.
func TestProcessLeavesClusterAlone(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { cfg.ElectionTicks = 20 })
	l, f := c.leader(), c.follower()
	l.mustPut("k", "v")
	for _, n := range c.nodes {
		<-n.store.applied.Wait(l.store.applied.At())
	}
	term := l.node.soft.Load().term
	for _, n := range []*testNode{l, f} {
		from := l.id
		if n == l {
			from = f.id
		}
		to := func(m *raftpb.Message) *raftpb.Message { m.To = new(n.id); return m }
		far := to(message(raftpb.MsgHeartbeat, from, term))
		far.Commit = new(uint64(1 << 40))
		old := to(message(raftpb.MsgApp, from, 1))
		prop := to(message(raftpb.MsgProp, from, 0))
		prop.Entries = []*raftpb.Entry{{Type: raftpb.EntryConfChangeV2.Enum(), Data: []byte{0xff}}}
		hint := to(message(raftpb.MsgAppResp, from, term))
		hint.Reject, hint.RejectHint, hint.Index = new(true), new(uint64(1<<40)), new(uint64(1<<40))
		for _, m := range []*raftpb.Message{far, old, prop, hint, to(message(raftpb.MsgVoteResp, from, term)), to(message(raftpb.MsgHup, from, term)),
			to(message(raftpb.MsgPreVoteResp, from, term)), to(message(raftpb.MsgTransferLeader, n.id, term)), to(message(raftpb.MsgHeartbeatResp, from, term))} {
			n.unhurt(t, func() {
				if err := n.node.Process(c.ctx(), m); err != nil {
					t.Logf("%v: %v", m.GetType(), err)
				}
				if err := n.node.do(c.ctx(), func() {}); err != nil { // it has been stepped
					t.Fatal(err)
				}
			})
		}
		n.mustPut("k", fmt.Sprint(n.id))
		for _, o := range c.nodes {
			<-o.store.applied.Wait(n.store.applied.At())
		}
	}
	c.check()
}

// A peer's message queue that overflows drops and counts; nothing blocks.
func TestFullQueueDrops(t *testing.T) {
	b := newBenchNode(t)
	for range recvQueue + 10 {
		if err := b.Process(context.Background(), message(raftpb.MsgHeartbeat, 2, 5)); err != nil {
			t.Fatal(err)
		}
	}
	if len(b.recvC) != recvQueue {
		t.Fatalf("%d messages wait", len(b.recvC))
	}
}

// An entry that takes the place of another is not on this disk yet.
func TestSplitCommitted(t *testing.T) {
	b := newBenchNode(t)
	b.stable = 8
	committed := []*raftpb.Entry{entry(3, 1), entry(4, 1), entry(5, 2), entry(6, 2)}
	for _, x := range []struct {
		brings []*raftpb.Entry
		onDisk int
	}{{nil, 4}, {[]*raftpb.Entry{entry(9, 2)}, 4}, {[]*raftpb.Entry{entry(5, 2), entry(6, 2)}, 2}, {[]*raftpb.Entry{entry(3, 2)}, 0}} {
		onDisk, fresh := b.splitCommitted(raft.Ready{Entries: x.brings, CommittedEntries: committed})
		if len(onDisk) != x.onDisk || len(fresh) != 4-x.onDisk {
			t.Errorf("with %v: %d are on this disk, %d come", x.brings, len(onDisk), len(fresh))
		}
	}
}

func TestClusterInfo(t *testing.T) {
	c := newCluster(t, 1, nil)
	l := c.leader()
	srv, _ := peerPort(t, l)
	for _, body := range []string{"", "garbage", strings.Repeat("x", 1<<20)} {
		resp, err := http.Post(srv.URL+clusterInfoPath, "x/y", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		var info clusterInfo
		err = json.NewDecoder(resp.Body).Decode(&info)
		resp.Body.Close()
		if err != nil || info.Member != 1 || info.Members.ClusterID != l.node.members.Load().ClusterID {
			t.Fatalf("%+v %v", info, err)
		}
	}
	// A joiner that waits for its own table has none to give.
	empty := newBenchNode(t)
	empty.setMembers(&membership{ClusterID: 7})
	rec := httptest.NewRecorder()
	empty.peerHandler(http.NotFoundHandler()).ServeHTTP(rec, httptest.NewRequest("GET", clusterInfoPath, nil))
	if rec.Code != http.StatusServiceUnavailable {
		t.Fatalf("a joiner answers %d", rec.Code)
	}
}

// FuzzPeerMessage feeds what one peer, or several, might send to a member that
// is stepped by hand. data is a script: see fuzzMessage. Nothing may panic, the
// commit index never falls, and what is committed is in the log.
func FuzzPeerMessage(f *testing.F) {
	for _, m := range []*raftpb.Message{message(raftpb.MsgHeartbeat, 2, 2), message(raftpb.MsgProp, 2, 0), message(raftpb.MsgSnap, 3, 1<<63)} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(append([]byte{3, byte(len(b))}, b...))
	}
	f.Add([]byte{0, 1, 2})
	f.Add(bytes.Repeat([]byte{1, 0, 1, 4, 0, 4, 2, 3, 1, 0}, 8))
	f.Add(bytes.Repeat([]byte{1, 1, 3, 2, 0, 0, 4, 4, 9, 9, 0, 2, 0}, 8))
	f.Add(append(bytes.Repeat([]byte{0, 9}, 6), bytes.Repeat([]byte{1, 8, 0, 2, 7, 0, 1, 0, 0, 2}, 6)...))
	f.Add([]byte{4, 1, 9, 2, 1, 0, 0, 0, 7, 3, 0, 2, 1, 9, 3, 1, 0, 0, 0, 7, 3, 0, 2})
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newBenchNode(t)
		r := bytes.NewReader(data)
		var commit uint64
		for range 200 {
			op, err := r.ReadByte()
			if err != nil {
				break
			}
			switch op % 5 {
			case 0:
				n, _ := r.ReadByte()
				for range n % 12 {
					b.tick()
					b.settle(t)
				}
			case 1:
				if m := fuzzMessage(b, r); b.receive(m) == nil && op&64 == 0 {
					b.settle(t) // else the next one comes in the same turn
				}
			case 2:
				b.settle(t)
			case 3:
				n, _ := r.ReadByte()
				raw := make([]byte, n)
				k, _ := r.Read(raw)
				m := &raftpb.Message{}
				if proto.Unmarshal(raw[:k], m) == nil {
					m.To = new(uint64(1))
					_ = b.receive(m) // most are refused
				}
			case 4:
				b.lead(t)
				b.settle(t)
			}
			st := b.raw.BasicStatus()
			if st.GetCommit() < commit {
				t.Fatalf("commit fell from %d to %d", commit, st.GetCommit())
			}
			commit = st.GetCommit()
		}
		b.settle(t)
		if last, err := b.mem.LastIndex(); err != nil || last < commit {
			t.Fatalf("the log ends at %d, commit is %d, %v", last, commit, err)
		}
	})
}

// fuzzMessage draws a message whose numbers lie near those that matter: the
// term, the end of the log, the commit index, the ends of the number range.
func fuzzMessage(b *benchNode, r *bytes.Reader) *raftpb.Message {
	next := func() uint64 {
		x, _ := r.ReadByte()
		return uint64(x)
	}
	st := b.raw.BasicStatus()
	near := func(base uint64) uint64 {
		switch x := next(); {
		case x < 16:
			return base + x%8 - x/8*4 // base-4 … base+7
		case x == 16:
			return 1<<64 - 1
		case x == 17:
			return 1 << 62
		default:
			return x % 16
		}
	}
	kinds := []raftpb.MessageType{raftpb.MsgApp, raftpb.MsgHeartbeat, raftpb.MsgSnap, raftpb.MsgProp, raftpb.MsgAppResp, raftpb.MsgVote, raftpb.MsgVoteResp,
		raftpb.MsgPreVote, raftpb.MsgPreVoteResp, raftpb.MsgHeartbeatResp, raftpb.MsgReadIndex, raftpb.MsgReadIndexResp, raftpb.MsgTransferLeader, raftpb.MsgTimeoutNow}
	typ := kinds[next()%uint64(len(kinds))]
	m := message(typ, next()%5+1, near(st.GetTerm()))
	m.Index, m.LogTerm, m.Commit = new(near(b.stable)), new(near(st.GetTerm())), new(near(st.GetCommit()))
	flags := next()
	m.Reject, m.RejectHint = new(flags&1 != 0), new(near(b.stable))
	if flags&2 != 0 {
		m.Context = binary.LittleEndian.AppendUint64(nil, near(1))
	} else if flags&4 != 0 {
		m.Context = []byte("CampaignTransfer")
	}
	switch typ {
	case raftpb.MsgProp, raftpb.MsgReadIndex, raftpb.MsgReadIndexResp:
		if typ != raftpb.MsgReadIndexResp {
			m.Term = nil
		}
		e := &raftpb.Entry{Data: testBatch("k", "v")}
		if typ == raftpb.MsgProp && flags&8 != 0 {
			op := []memberOp{opAdd, opRemove, opPromote, opUpdate}[next()%4]
			id := next() % 6
			if cc, err := change(op, member{ID: id, PeerURLs: []string{testURL(id + next()%2)}, Learner: flags&16 != 0}).confChange(); err == nil {
				data, err := proto.Marshal(cc)
				if err == nil {
					e = &raftpb.Entry{Type: raftpb.EntryConfChangeV2.Enum(), Data: data}
				}
			}
		}
		m.Entries = []*raftpb.Entry{e}
	case raftpb.MsgApp:
		term := m.GetLogTerm()
		for i := range next() % 4 {
			term = max(term, near(st.GetTerm()))
			m.Entries = append(m.Entries, entry(m.GetIndex()+1+i, min(term, m.GetTerm())))
		}
	case raftpb.MsgSnap:
		h, _ := b.snaps.snapshotHeader(m.GetIndex())
		m.Snapshot = h.raftSnapshot()
		if flags&32 != 0 {
			m.Snapshot.Metadata.ConfState.LearnersNext = []uint64{next()}
		}
	}
	return m
}
