package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// Fuzz targets for what no other file has: streams of peers, sequences of real
// messages with something wrong in them, membership changes, the small files of a
// data directory, and the options of a watch.

// readStream reads a peer's stream as rafthttp would, to its end.
func readStream(data io.Reader, appends bool) (out []byte, err error) {
	s := &peerStream{body: io.NopCloser(data), src: bufio.NewReader(data), peer: 2,
		known: func(id uint64) bool { return id == 3 }, refused: func(error) {}}
	s.next = s.messageFrame
	if appends {
		s.next = s.appendFrame
	}
	out, err = io.ReadAll(s)
	return out, err
}

// decodeStream is rafthttp's two decoders, which panic or allocate where this one
// returns an error.
func decodeStream(r *bytes.Reader, appends bool) (frames int, err error) {
	take := func(n uint64) ([]byte, error) {
		if n > uint64(r.Len()) {
			return nil, fmt.Errorf("%d bytes of %d", n, r.Len())
		}
		b := make([]byte, n)
		_, err := io.ReadFull(r, b)
		return b, err
	}
	sizedInto := func(m proto.Message) error {
		n, err := take(8)
		if err != nil {
			return err
		}
		b, err := take(binary.BigEndian.Uint64(n))
		if err != nil {
			return err
		}
		return proto.Unmarshal(b, m)
	}
	for ; r.Len() > 0 && err == nil; frames++ {
		if !appends {
			err = sizedInto(&raftpb.Message{})
			continue
		}
		switch typ, _ := r.ReadByte(); typ {
		case 0:
		case 1:
			var n []byte
			if n, err = take(8); err != nil {
				break
			}
			for count := binary.BigEndian.Uint64(n); count > 0 && err == nil; count-- {
				err = sizedInto(&raftpb.Entry{})
			}
			if err == nil {
				_, err = take(8)
			}
		case 2:
			err = sizedInto(&raftpb.Message{})
		default:
			err = fmt.Errorf("type %d", typ)
		}
	}
	return frames, err
}

// What passes the guard is a beginning of what came, less the messages of strangers,
// and rafthttp's decoders take all of it.
func FuzzPeerStream(f *testing.F) {
	appends, messages := hostileStreams(f)
	entry := marshal(f, &raftpb.Entry{Index: new(uint64(10)), Term: new(uint64(5)), Data: []byte("data")})
	app := marshal(f, &raftpb.Message{Type: raftpb.MsgApp.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(5)), Entries: []*raftpb.Entry{{Data: []byte("x")}}})
	good := slices.Concat([]byte{0, 1}, be64(2), sized(entry), sized(entry), be64(9), []byte{2}, sized(app), []byte{0})
	f.Add(true, good)
	f.Add(false, slices.Concat(sized(app), sized(app)))
	for _, s := range appends {
		if len(s) < 1<<10 {
			f.Add(true, []byte(s))
			f.Add(true, slices.Concat(good, []byte(s)))
		}
	}
	for _, s := range messages {
		if len(s) < 1<<10 {
			f.Add(false, []byte(s))
		}
	}
	f.Fuzz(func(t *testing.T, appends bool, data []byte) {
		out, err := readStream(bytes.NewReader(data), appends)
		if err != nil && !errors.Is(err, errBadFrame) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("ends with %v", err)
		}
		frames, bad := decodeStream(bytes.NewReader(out), appends)
		switch {
		case bad != nil && (appends || !isProtoError(out)):
			t.Fatalf("frame %d of what was let through: %v", frames, bad)
		case appends && !bytes.HasPrefix(data, out):
			t.Fatal("what was let through is not what came")
		case appends && err == nil && len(out) != len(data):
			t.Fatalf("%d of %d bytes were let through", len(out), len(data))
		}
		// The guard refuses nothing that the decoders take, but for strangers, messages
		// in messages, groups and more than fits.
		if all, bad := decodeStream(bytes.NewReader(data), appends); bad == nil && err == nil && frames > all {
			t.Fatalf("%d frames became %d", all, frames)
		}
	})
}

// isProtoError: rafthttp's decoder of a message stream returns an error over a
// message that does not decode, so the guard may let it through.
func isProtoError(out []byte) bool {
	for len(out) >= 8 {
		n := binary.BigEndian.Uint64(out)
		if n > uint64(len(out)-8) {
			return false
		}
		if proto.Unmarshal(out[8:8+n], &raftpb.Message{}) != nil {
			return true
		}
		out = out[8+n:]
	}
	return false
}

var recordMessages = flag.Bool("record", false, "make "+recordedPath+" anew, from a cluster that runs")

const recordedPath = "testdata/peer-messages.bin"

// TestRecordedMessages holds the recording against what members accept now, or
// makes it: all kinds of messages that three members and a learner exchange while they
// write, read, hand over leadership and let a member in.
func TestRecordedMessages(t *testing.T) {
	if *recordMessages {
		writeRecording(t)
	}
	kinds := map[raftpb.MessageType]int{}
	for i, m := range readRecording(t) {
		kinds[m.GetType()]++
		b := newBenchNode(t)
		b.id = m.GetTo()
		if m.GetType() == raftpb.MsgSnap {
			continue // its file is not there
		}
		if err := b.validateMessage(m); err != nil {
			t.Errorf("message %d, %v: %v", i, m, err)
		}
	}
	for typ := range fromPeers {
		if kinds[typ] == 0 && typ != raftpb.MsgTransferLeader {
			t.Errorf("no %v was recorded; make the recording anew with -record", typ)
		}
	}
}

func readRecording(t testing.TB) (all []*raftpb.Message) {
	t.Helper()
	b, err := os.ReadFile(recordedPath)
	if err != nil {
		t.Fatal(err)
	}
	for len(b) > 0 {
		n, k := binary.Uvarint(b)
		m := &raftpb.Message{}
		if err := proto.Unmarshal(b[k:k+int(n)], m); err != nil {
			t.Fatal(err)
		}
		all, b = append(all, m), b[k+int(n):]
	}
	return all
}

func writeRecording(t *testing.T) {
	c := newCluster(t, 3, nil)
	var mu sync.Mutex
	var out []byte
	seen := map[string]int{}
	c.net.dropIf(func(m *raftpb.Message) bool {
		mu.Lock()
		defer mu.Unlock()
		kind := fmt.Sprint(m.GetType(), m.GetTo(), len(m.GetEntries()) > 0, len(m.GetContext()), m.GetReject())
		if b, err := proto.Marshal(m); err == nil && len(b) > 2 && len(b) < 400 && seen[kind] < 4 {
			seen[kind]++
			out = append(binary.AppendUvarint(out, uint64(len(b))), b...)
		}
		return false
	})
	for i := range 10 {
		for _, n := range c.nodes {
			n.mustPut(fmt.Sprint("k", i), "v")
			n.mustGet(fmt.Sprint("k", i), "v")
		}
	}
	for _, id := range []uint64{2, 3, 1} {
		if err := c.leader().store.transferLeader(c.ctx(), id); err != nil {
			t.Fatal(err)
		}
	}
	c.leader().node.requestSnapshot()
	if _, _, err := c.leader().store.addMember(c.ctx(), memberSpec{ID: 4, PeerURL: "http://127.0.0.1:10004"}); err != nil {
		t.Fatal(err)
	}
	c.start(4)
	c.wait("the new member to vote", func() bool {
		m, ok := c.leader().node.members.Load().get(4)
		return ok && !m.Learner
	})
	l := c.leader()
	c.isolate(l.id, true)
	var rest *testNode
	c.wait("another leader", func() bool {
		for id, n := range c.nodes {
			if id != l.id && n.store.leader() == id {
				rest = n
			}
		}
		return rest != nil
	})
	rest.mustPut("k", "w")
	c.isolate(l.id, false)
	c.check()
	c.net.dropIf(nil)
	mu.Lock()
	defer mu.Unlock()
	if err := errors.Join(os.MkdirAll(filepath.Dir(recordedPath), 0o755), os.WriteFile(recordedPath, out, 0o644)); err != nil {
		t.Fatal(err)
	}
}

// FuzzRecordedMessages sends a member, in each role, what a real cluster sent, in
// another order and with some numbers changed. script says how: see play.
// Nothing panics; the term grows no further than a message says or by one for an
// own campaign; the commit index never falls, nor exceeds what is on disk; the
// members change by committed changes and snapshots only, and stay valid.
func FuzzRecordedMessages(f *testing.F) {
	all := readRecording(f)
	for i := range all {
		f.Add([]byte{3, byte(i), 2})             // as it was, to a follower
		f.Add([]byte{1, 2, 4, byte(i), 2})       // in the present term, to a leader
		f.Add([]byte{0, 11, 4, byte(i), 0, 30})  // to whoever campaigns
		f.Add([]byte{4, byte(i), 4, byte(i), 2}) // twice
	}
	f.Add(bytes.Repeat([]byte{5, 7, 0, 3, 6, 9, 1, 1, 4, 2}, 10))
	f.Fuzz(func(t *testing.T, script []byte) {
		b := newBenchNode(t)
		first := b.members.Load()
		r := bytes.NewReader(script)
		for range 100 {
			if !b.play(t, r, all) {
				break
			}
			if m := b.members.Load(); m != first && (m.check() != nil || m.ClusterID != first.ClusterID) {
				t.Fatalf("the member table became %+v: %v", m, m.check())
			}
		}
		b.settle(t)
		b.checkCommitted(t, first)
	})
}

// play does one step of a script, and is false at its end.
func (b *benchNode) play(t *testing.T, r *bytes.Reader, all []*raftpb.Message) bool {
	t.Helper()
	next := func() int { x, _ := r.ReadByte(); return int(x) } // zeros after the end
	op, err := r.ReadByte()
	if err != nil {
		return false
	}
	before := b.raw.BasicStatus()
	term := before.GetTerm()
	switch op % 8 {
	case 0:
		for range next() % 32 {
			b.tick()
			b.settle(t)
		}
		term = b.raw.BasicStatus().GetTerm() // nobody else spoke
		if term > before.GetTerm()+32 {
			t.Fatalf("term %d after a while at %d", term, before.GetTerm())
		}
	case 1:
		b.lead(t)
		term = b.raw.BasicStatus().GetTerm()
	case 2:
		b.settle(t)
		term++ // what waited may have made it campaign
	default:
		m := proto.Clone(all[next()%len(all)]).(*raftpb.Message)
		if m.To = new(uint64(1)); m.GetFrom() == 1 && m.GetType() != raftpb.MsgTransferLeader {
			m.From = new(uint64(2))
		}
		if op%8 >= 4 && m.GetTerm() != 0 {
			m.Term = new(term)
		}
		for range op % 8 / 2 * (op >> 3 % 4) {
			b.mutate(m, next(), next())
		}
		if b.receive(m) != nil {
			term = before.GetTerm() // refused: nothing may change
		} else {
			term = max(term, m.GetTerm()) + 1
		}
		if op&128 != 0 {
			b.settle(t)
		}
	}
	after := b.raw.BasicStatus()
	switch {
	case after.GetTerm() > term || after.GetTerm() < before.GetTerm():
		t.Fatalf("term %d became %d, at most %d was due", before.GetTerm(), after.GetTerm(), term)
	case after.GetCommit() < before.GetCommit():
		t.Fatalf("commit fell from %d to %d", before.GetCommit(), after.GetCommit())
	}
	return true
}

// mutate changes one number of a message to one near those that matter.
func (b *benchNode) mutate(m *raftpb.Message, field, how int) {
	st := b.raw.BasicStatus()
	bases := []uint64{0, st.GetTerm(), st.GetCommit(), b.stable, m.GetIndex(), 1 << 63}
	x := bases[how%len(bases)] + uint64(how/len(bases)%8) - 3
	ents := m.GetEntries()
	switch field % 14 {
	case 0:
		m.From = new(x)
	case 1:
		m.Term = new(x)
	case 2:
		m.LogTerm = new(x)
	case 3:
		m.Index = new(x)
	case 4:
		m.Commit = new(x)
	case 5:
		m.Reject, m.RejectHint = new(true), new(x)
	case 6:
		m.Context = binary.LittleEndian.AppendUint64(nil, x)[:how%9]
	case 7:
		m.Type = raftpb.MessageType(how % 24).Enum()
	case 8: // entries that follow, whatever they say
		for i, e := range ents {
			e.Index, e.Term = new(m.GetIndex()+1+uint64(i)), new(max(m.GetLogTerm(), min(e.GetTerm(), m.GetTerm())))
		}
	case 9:
		if len(ents) > 0 {
			m.Entries = append(ents, ents[how%len(ents)])
		}
	case 10:
		if len(ents) > 0 {
			m.Entries = ents[how%len(ents):]
		}
	case 11:
		if len(ents) > 0 {
			e := ents[how%len(ents)]
			e.Data = e.Data[:how%(len(e.Data)+1)]
		}
	case 12:
		if len(ents) > 0 {
			ents[how%len(ents)].Type = raftpb.EntryType(how % 4).Enum()
		}
	case 13:
		h, _ := b.snaps.snapshotHeader(x)
		m.Snapshot = h.raftSnapshot()
	}
}

// checkCommitted: what is committed is on disk, and the member table is what the
// committed changes made of it.
func (b *benchNode) checkCommitted(t *testing.T, first *membership) {
	t.Helper()
	commit := b.raw.BasicStatus().GetCommit()
	if last, err := b.mem.LastIndex(); err != nil || last < commit || b.stable < commit {
		t.Fatalf("commit is %d, the log ends at %d, the disk at %d, %v", commit, last, b.stable, err)
	}
	begin, err := b.mem.FirstIndex()
	if err != nil {
		t.Fatal(err)
	}
	var ents []*raftpb.Entry
	if begin <= commit {
		if ents, err = b.mem.Entries(begin, commit+1, noLimit); err != nil {
			t.Fatal(err)
		}
	}
	// Every snapshot of this bench has the first table.
	r := recovered{hard: &raftpb.HardState{Commit: new(commit)}, entries: ents, snap: snapHeader{Members: first}}
	if got, want := marshalJSON(t, b.members.Load()), marshalJSON(t, r.table()); !bytes.Equal(got, want) {
		t.Fatalf("members %s, the committed changes make them %s", got, want)
	}
}

// FuzzMemberChange: a membership change from the wire or the log is refused, or
// leaves a table that is as valid as before and that raft agrees with.
func FuzzMemberChange(f *testing.F) {
	for _, op := range []memberOp{opAdd, opRemove, opPromote, opUpdate, opStarted, "?"} {
		for _, id := range []uint64{0, 1, 3, 4, 1<<64 - 1} {
			for _, url := range []string{testURL(4), "http://h", "", testURL(1)} {
				cc, err := change(op, member{ID: id, PeerURLs: []string{url}, ClientURL: url, Learner: true}).confChange()
				if err != nil {
					f.Fatal(err)
				}
				f.Add(marshal(f, cc))
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newBenchNode(t)
		table := *b.members.Load()
		table.Members = slices.Clone(table.Members)
		table.Members[2].Learner = true
		b.setMembers(&table)
		// Twice, as raft may commit a change twice.
		for i := range 2 {
			b.applyConf(&raftpb.Entry{Type: raftpb.EntryConfChangeV2.Enum(), Index: new(uint64(2 + i)), Term: new(uint64(1)), Data: data})
			m := b.members.Load()
			if err := m.check(); err != nil {
				t.Fatalf("%v: %+v", err, m)
			}
			if m.ClusterID != table.ClusterID || len(m.Members)+len(m.Removed) > 4 {
				t.Fatalf("one change made %+v", m)
			}
		}
		for range 3 {
			b.tick()
		}
	})
}

// FuzzSmallFiles: the header of a snapshot, the count of starts and a peer's answer
// to a joiner are refused with words, or are fit for use.
func FuzzSmallFiles(f *testing.F) {
	table := bootstrapMembership("x", []clusterURL{{1, testURL(1)}, {2, testURL(2)}})
	good := marshalJSON(f, snapHeader{5, 2, table})
	f.Add(good)
	f.Add(marshalJSON(f, clusterInfo{Member: 1, Members: table}))
	homeless := &membership{ClusterID: 1, Members: []member{{ID: 1, Started: true}, {ID: 2}}}
	f.Add(marshalJSON(f, clusterInfo{Member: 1, Members: homeless}))
	f.Add(marshalJSON(f, snapHeader{5, 2, homeless}))
	for _, s := range []string{"", "7\n", "-1", "18446744073709551615", "99999999999999999999", "null", "{}", "[]", `{"index":1,"term":1,"members":null}`,
		`{"index":1,"term":1,"members":{"cluster_id":"1","members":[null]}}`, `{"index":1,"term":1,"members":{"cluster_id":"1","members":[{"id":1}]}}`} {
		f.Add([]byte(s))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		if h, err := decodeSnapHeader(data); err == nil {
			if err := h.Members.check(); err != nil || h.Index == 0 {
				t.Fatalf("took %s: %v", data, err)
			}
			useTable(h.Members)
		}
		srv := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(data) })
		client := &http.Client{Transport: handlerTransport{srv}}
		if info, err := askPeer(context.Background(), client, "http://peer"); err == nil {
			useTable(info.Members)
			cfg := defaultConfig()
			_ = mayJoin(info.Members, cfg, "http://peer") // most tables do not list it
		}
		d := &diskStore{dir: dir}
		if err := os.WriteFile(filepath.Join(dir, "boots"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		first, err := d.nextBoot()
		if err != nil {
			if !errors.Is(err, errRefuse) || !strings.Contains(err.Error(), "write a number there") {
				t.Fatalf("boots %q: %v", data, err)
			}
			return
		}
		if second, err := d.nextBoot(); err != nil || second != first+1 || first == 0 {
			t.Fatalf("boots %q: %d, then %d, %v", data, first, second, err)
		}
	})
}

// useTable does with a table what a member does that starts with it.
func useTable(m *membership) {
	describeMembers(m)
	m.confState()
	m.nextID()
	for _, x := range m.Members {
		_, _ = m.apply(change(opRemove, x)) // the last voter is refused
	}
}

type handlerTransport struct{ http.Handler }

func (h handlerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, r)
	return rec.Result(), nil
}

// FuzzWatchRequest: whatever the query and the headers of a watch or a long poll
// say, it is refused with a 4xx or served.
func FuzzWatchRequest(f *testing.F) {
	for _, q := range []string{"prefix=a", "key=a&from=1", "start=a&end=b&initial=true", "from=-1", "from=9223372036854775807&prefix=", "progress=1s&prev=true&prefix=a",
		"key=%ff%00&events=put,delete", "events=&key=a", "progress=1ns&key=a", "prefix=a&prefix=b&key=c"} {
		for _, id := range []string{"", "1", "2", "3", "999", "-1", "x", "9223372036854775807", "01", "1.5", "\x00"} {
			f.Add(q, id, "text/event-stream", "wait=1")
		}
	}
	f.Fuzz(func(t *testing.T, query, lastID, accept, prefer string) {
		h, b := newTwinAPI(t, testLimits())
		b.do(put("a", "1"), put("b", "2"))
		b.hub.Close() // streams end when all that there is was sent
		for _, target := range []string{"/v1/watch", "/v1/kv/a"} {
			r := httptest.NewRequest(http.MethodGet, target, nil)
			r.URL.RawQuery, r.RequestURI = query, target+"?"+query
			ctx, cancel := context.WithCancel(context.Background())
			cancel() // and nothing is waited for
			r = r.WithContext(ctx)
			r.Header["Last-Event-Id"], r.Header["Accept"], r.Header["Prefer"] = []string{lastID}, []string{accept}, []string{prefer}
			r.Header["If-None-Match"] = []string{`"1"`}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code == 500 || w.Code < 200 {
				t.Errorf("%s?%s with id %q: %d %s", target, query, lastID, w.Code, w.Body)
			}
			for line := range strings.Lines(w.Body.String()) {
				if data, ok := strings.CutPrefix(line, "data: "); ok && !json.Valid([]byte(data)) {
					t.Errorf("%s?%s sends %q", target, query, line)
				}
			}
		}
		if n := h.m.inFlight.Load(); n != 0 {
			t.Errorf("%d slots stay taken", n)
		}
	})
}
