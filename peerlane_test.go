package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// slowWay is the transport behind lanes. It keeps what it is given.
type slowWay struct {
	transport // nil: what is not below is not called
	mu        sync.Mutex
	sent      []*raftpb.Message
	peers     []types.ID
}

func (s *slowWay) Send(ms []*raftpb.Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = append(s.sent, ms...)
}
func (s *slowWay) AddPeer(id types.ID, _ []string) { s.peers = append(s.peers, id) }
func (s *slowWay) UpdatePeer(types.ID, []string)   {}
func (s *slowWay) RemovePeer(id types.ID) {
	s.peers = slices.DeleteFunc(s.peers, func(p types.ID) bool { return p == id })
}
func (s *slowWay) Stop()                              {}
func (s *slowWay) count() int                         { s.mu.Lock(); defer s.mu.Unlock(); return len(s.sent) }
func (s *slowWay) ActiveSince(types.ID) (t time.Time) { return t }

// laneEnd is a member without a loop, whose peer port takes lanes.
type laneEnd struct {
	*raftNode
	lanes *lanes
	slow  *slowWay
	reg   *prometheus.Registry
	srv   *httptest.Server
}

func newLaneEnd(t *testing.T, id uint64) *laneEnd {
	t.Helper()
	e := &laneEnd{raftNode: newBenchNode(t).raftNode, slow: &slowWay{}, reg: prometheus.NewRegistry()}
	e.id, e.met = id, newNodeMetrics(e.reg)
	e.lanes = newLanes(e.raftNode, e.slow)
	e.tr = e.lanes
	l, err := listenPeer("127.0.0.1:0", 64)
	if err != nil {
		t.Fatal(err)
	}
	e.srv = httptest.NewUnstartedServer(e.peerHandler(e.lanes.handler(http.NotFoundHandler())))
	e.srv.Listener.Close()
	e.srv.Listener = l
	e.srv.Start()
	t.Cleanup(func() { e.lanes.Stop(); e.srv.Close() })
	return e
}

// lanePair are members 1 and 2 with a lane between them.
func lanePair(t *testing.T, silence time.Duration) (one, two *laneEnd) {
	t.Helper()
	one, two = newLaneEnd(t, 1), newLaneEnd(t, 2)
	one.lanes.silence, two.lanes.silence = silence, silence
	one.lanes.AddPeer(2, []string{two.srv.URL})
	two.lanes.AddPeer(1, []string{one.srv.URL})
	lanesStand(t, one, two)
	return one, two
}

func lanesStand(t *testing.T, ends ...*laneEnd) {
	t.Helper()
	waitFor(t, "a lane", func() bool {
		return !slices.ContainsFunc(ends, func(e *laneEnd) bool { return e.lanes.standing() != 1 })
	})
}

func (e *laneEnd) next(t *testing.T) *raftpb.Message {
	t.Helper()
	select {
	case r := <-e.recvC:
		return e.taken(r)
	case <-time.After(10 * time.Second):
		t.Fatal("no message comes")
		return nil
	}
}

// counted is the value of one of the member's counters.
func (e *laneEnd) counted(t *testing.T, name string) float64 {
	t.Helper()
	all, err := e.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if m.GetName() == name {
			return m.Metric[0].GetCounter().GetValue()
		}
	}
	t.Fatalf("no counter %s", name)
	return 0
}

// reported counts what the loop was told of unreachable peers.
func (e *laneEnd) reported() int { return len(e.mail.take()) }

func laneAppend(from, to, index uint64, size int) *raftpb.Message {
	return &raftpb.Message{Type: raftpb.MsgApp.Enum(), From: new(from), To: new(to), Term: new(uint64(1)), LogTerm: new(uint64(1)), Index: new(index), Commit: new(index),
		Entries: []*raftpb.Entry{{Type: raftpb.EntryNormal.Enum(), Term: new(uint64(1)), Index: new(index + 1), Data: bytes.Repeat([]byte{byte(index)}, size)}}}
}

// plainMessage is m with all its numbers set, as a lane leaves them.
func plainMessage(m *raftpb.Message) *raftpb.Message {
	out := &raftpb.Message{Type: m.GetType().Enum(), To: new(m.GetTo()), From: new(m.GetFrom()), Term: new(m.GetTerm()), LogTerm: new(m.GetLogTerm()),
		Index: new(m.GetIndex()), Commit: new(m.GetCommit()), Reject: new(m.GetReject()), RejectHint: new(m.GetRejectHint())}
	if c := m.GetContext(); len(c) > 0 {
		out.Context = c
	}
	for _, e := range m.GetEntries() {
		p := &raftpb.Entry{Type: e.GetType().Enum(), Term: new(e.GetTerm()), Index: new(e.GetIndex())}
		if d := e.GetData(); len(d) > 0 {
			p.Data = d
		}
		out.Entries = append(out.Entries, p)
	}
	return out
}

// Every kind of message that a cluster has exchanged is the same behind a lane.
func TestLaneMessages(t *testing.T) {
	kinds := map[raftpb.MessageType]bool{}
	for i, m := range readRecording(t) {
		if m.GetType() == raftpb.MsgSnap {
			if fitsLane(m) {
				t.Error("a snapshot would take a lane")
			}
			continue
		}
		if !fitsLane(m) {
			t.Fatalf("message %d does not fit: %v", i, m)
		}
		kinds[m.GetType()] = true
		got, err := readMessage(appendMessage(nil, m), m.GetTo())
		if err != nil || !proto.Equal(got, plainMessage(m)) {
			t.Fatalf("message %d: %v\n%v became\n%v", i, err, m, got)
		}
	}
	if len(kinds) < len(fromPeers)-2 { // snapshots, and MsgTransferLeader is not recorded
		t.Errorf("only %d kinds of messages were tried", len(kinds))
	}
	reject := &raftpb.Message{Type: raftpb.MsgAppResp.Enum(), To: new(uint64(1)), From: new(uint64(2)), Reject: new(true), RejectHint: new(uint64(1<<63 + 5)), Term: new(^uint64(0) >> 1)}
	if got, err := readMessage(appendMessage(nil, reject), 1); err != nil || !proto.Equal(got, plainMessage(reject)) {
		t.Errorf("%v became %v (%v)", reject, got, err)
	}
	for what, m := range map[string]*raftpb.Message{
		"a snapshot in another message": {Type: raftpb.MsgApp.Enum(), Snapshot: &raftpb.Snapshot{}},
		"messages in a message":         {Type: raftpb.MsgApp.Enum(), Responses: []*raftpb.Message{{}}},
		"a vote of its own":             {Type: raftpb.MsgApp.Enum(), Vote: new(uint64(0))},
	} {
		if fitsLane(m) {
			t.Errorf("%s would be lost on a lane", what)
		}
	}
	m := laneAppend(2, 1, 7, 100)
	b := appendMessage(nil, m)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := readMessage(b, 1); err != nil {
			t.Error(err)
		}
	}); n > 3 {
		t.Errorf("a message of one entry takes %v allocations to read", n)
	}
}

// badLaneFrames are no messages, each for another reason.
func badLaneFrames() map[string][]byte {
	m := appendMessage(nil, laneAppend(2, 1, 7, 10))
	count := func(n uint64) []byte { // of entries, and then nothing
		return binary.AppendUvarint(append([]byte{byte(raftpb.MsgApp), 0, 2, 1, 1, 7, 7, 0, 0}, nil...), n)
	}
	return map[string][]byte{
		"one byte":                {0},
		"a flag that is none":     {byte(raftpb.MsgApp), 2, 0, 0, 0, 0, 0, 0, 0, 0},
		"cut short":               m[:len(m)-1],
		"too long":                append(slices.Clone(m), 0),
		"a number without an end": append([]byte{3, 0}, bytes.Repeat([]byte{0xff}, 12)...),
		"a context that is not":   {byte(raftpb.MsgApp), 0, 2, 1, 1, 7, 7, 0, 100, 1},
		"entries that are not":    append(count(1000), make([]byte, 100)...),
		"entries without number":  append(count(^uint64(0)), make([]byte, 100)...),
	}
}

func TestBadLaneFrames(t *testing.T) {
	for what, b := range badLaneFrames() {
		if m, err := readMessage(b, 1); err == nil {
			t.Errorf("%s was read as %v", what, m)
		}
	}
	whole := appendMessage(nil, laneAppend(2, 1, 7, 10))
	for i := range whole {
		if m, err := readMessage(whole[:i], 1); err == nil {
			t.Errorf("the first %d bytes were read as %v", i, m)
		}
	}
}

// FuzzLaneFrame: what is read is what would be written, to the byte, or was spelled
// in a longer way; and no more memory than the bytes bought.
func FuzzLaneFrame(f *testing.F) {
	for _, b := range badLaneFrames() {
		if len(b) < 1<<10 {
			f.Add(b)
		}
	}
	for i, m := range readRecording(f) {
		if i%10 == 0 && fitsLane(m) && proto.Size(m) < 1<<10 {
			f.Add(appendMessage(nil, m))
		}
	}
	b := newBenchNode(f)
	f.Fuzz(func(t *testing.T, frame []byte) {
		m, err := readMessage(frame, 1)
		if err != nil {
			return
		}
		if len(m.GetEntries())*minEntry > len(frame) {
			t.Fatalf("%d entries in %d bytes", len(m.GetEntries()), len(frame))
		}
		again, err := readMessage(appendMessage(nil, m), 1)
		if err != nil || !proto.Equal(again, m) {
			t.Fatalf("%v became %v: %v", m, again, err)
		}
		_ = b.validateMessage(m) // must not panic
	})
}

func TestLanesCarry(t *testing.T) {
	one, two := lanePair(t, laneSilence)
	sizes := []int{0, 1, 1000, laneBuffer, maxLaneMessage - 200, 10, maxLaneMessage - 150, 1}
	idle := func(e *laneEnd, peer uint64) {
		waitFor(t, "a lane that is not busy", func() bool {
			e.lanes.mu.Lock()
			defer e.lanes.mu.Unlock()
			return !e.lanes.mu.peers[peer].lane.isBusy()
		})
	}
	for i, size := range sizes {
		idle(one, 2)
		idle(two, 1)
		one.lanes.Send([]*raftpb.Message{laneAppend(1, 2, uint64(i+1), size)})
		two.lanes.Send([]*raftpb.Message{laneAppend(2, 1, uint64(i+1), size), message(raftpb.MsgHeartbeatResp, 2, 1)})
	}
	for i, size := range sizes {
		want := laneAppend(1, 2, uint64(i+1), size)
		if got := two.next(t); !proto.Equal(got, plainMessage(want)) {
			t.Fatalf("message %d of %d bytes differs: index %d, %d bytes", i, size, got.GetIndex(), entryBytes(got.GetEntries()))
		}
		want = laneAppend(2, 1, uint64(i+1), size)
		if got := one.next(t); !proto.Equal(got, plainMessage(want)) {
			t.Fatalf("message %d of %d bytes back differs: index %d, %d bytes", i, size, got.GetIndex(), entryBytes(got.GetEntries()))
		}
		if got := one.next(t); got.GetType() != raftpb.MsgHeartbeatResp {
			t.Fatalf("behind message %d comes %v", i, got)
		}
	}
	if one.received.Load() != 0 || two.received.Load() != 0 {
		t.Errorf("%d and %d bytes count as received after all was taken", one.received.Load(), two.received.Load())
	}
	if one.slow.count()+two.slow.count() > 0 {
		t.Error("some of it went the slow way")
	}

	// What a lane does not take, and whom none leads to.
	one.lanes.Send([]*raftpb.Message{{Type: raftpb.MsgApp.Enum(), To: new(uint64(2)), Snapshot: &raftpb.Snapshot{}}, laneAppend(1, 2, 97, maxLaneMessage), laneAppend(1, 2, 98, maxMessageBytes),
		laneAppend(1, 3, 1, 1), laneAppend(1, 2, 99, 1)})
	if got := two.next(t); got.GetIndex() != 99 || one.slow.count() != 4 {
		t.Errorf("index %d came, and %d messages went the slow way", got.GetIndex(), one.slow.count())
	}

	// A peer that goes: its lane as well, and raft hears of it.
	one.lanes.RemovePeer(2)
	waitFor(t, "the end of the lane", func() bool { return two.lanes.standing() == 0 })
	two.lanes.Send([]*raftpb.Message{laneAppend(2, 1, 100, 1)})
	if two.slow.count() != 1 {
		t.Error("a message for which there is no lane went nowhere")
	}
	waitFor(t, "a report", func() bool { return two.reported() > 0 })
	if len(one.slow.peers) != 0 {
		t.Errorf("peers that remain: %v", one.slow.peers)
	}
}

// A lane that nobody uses stands; one that has ended comes back; one that a newer one
// replaces ends.
func TestLanesStand(t *testing.T) {
	const silence = 200 * time.Millisecond
	one, two := lanePair(t, silence)
	lane := func(e *laneEnd, peer uint64) *lane {
		e.lanes.mu.Lock()
		defer e.lanes.mu.Unlock()
		return e.lanes.mu.peers[peer].lane
	}
	first := lane(one, 2)
	idle := time.NewTimer(5 * silence)
	select {
	case <-first.ended:
		t.Fatal("an idle lane has ended")
	case <-idle.C:
	}
	first.end()
	waitFor(t, "another lane", func() bool { l := lane(one, 2); return l != nil && l != first })
	lanesStand(t, one, two)
	second := lane(one, 2)
	two.lanes.UpdatePeer(1, []string{"http://127.0.0.1:1"})
	waitFor(t, "its end", func() bool { return lane(one, 2) == nil })
	two.lanes.UpdatePeer(1, []string{one.srv.URL})
	waitFor(t, "a third lane", func() bool { l := lane(one, 2); return l != nil && l != second })
	third := lane(one, 2)
	conn, _ := openLane(t, one, "", laneHead(one, 2, 1))
	defer conn.Close()
	<-third.ended
}

// laneHead is the head of a request to e for a lane.
func laneHead(e *laneEnd, from, to uint64) map[string]string {
	return map[string]string{"X-Etcd-Cluster-Id": types.ID(e.members.Load().ClusterID).String(), "X-Server-Version": peerVersion,
		"X-Server-From": types.ID(from).String(), "X-Raft-To": types.ID(to).String(), "Connection": "Upgrade", "Upgrade": laneProtocol}
}

// openLane asks for a lane and returns the status line of the answer; behind is sent
// with the request.
func openLane(t *testing.T, e *laneEnd, method string, head map[string]string, behind ...byte) (net.Conn, string) {
	t.Helper()
	c, err := net.Dial("tcp", e.srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if method == "" {
		method = http.MethodGet
	}
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: x\r\n", method, lanePath)
	for k, v := range head { // order: does not matter
		fmt.Fprintf(&b, "%s: %s\r\n", k, v)
	}
	b.WriteString("\r\n" + string(behind))
	if _, err := io.WriteString(c, b.String()); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for one := make([]byte, 1); !bytes.HasSuffix(got, []byte("\r\n\r\n")); got = append(got, one...) {
		if _, err := c.Read(one); err != nil {
			t.Fatalf("%q, then %v", got, err)
		}
	}
	status, _, _ := strings.Cut(string(got), "\r\n")
	return c, status
}

func TestLaneRequests(t *testing.T) {
	e := newLaneEnd(t, 1)
	e.lanes.AddPeer(2, []string{testURL(2)})
	for what, c := range map[string]struct {
		method, field, value string
		status               int
	}{
		"another method":        {http.MethodPost, "", "", 400},
		"another protocol":      {"", "Upgrade", "pontoon-lane/2", 400},
		"another cluster":       {"", "X-Etcd-Cluster-Id", "7", 412},
		"no cluster":            {"", "X-Etcd-Cluster-Id", "", 412},
		"an old version":        {"", "X-Server-Version", "2.3.0", 412},
		"a malformed version":   {"", "X-Server-Version", "x", 400},
		"nobody":                {"", "X-Server-From", "", 412},
		"a stranger":            {"", "X-Server-From", "9", 412},
		"itself":                {"", "X-Server-From", "1", 412},
		"a number that is none": {"", "X-Server-From", "zz", 412},
		"somebody else's lane":  {"", "X-Raft-To", "3", 412},
		"a lane to nobody":      {"", "X-Raft-To", "", 412},
		"all that has to be":    {"", "", "", 101},
	} {
		head := laneHead(e, 2, 1)
		if c.field != "" {
			if head[c.field] = c.value; c.value == "" {
				delete(head, c.field)
			}
		}
		conn, status := openLane(t, e, c.method, head)
		if !strings.HasPrefix(status, fmt.Sprintf("HTTP/1.1 %d ", c.status)) {
			t.Errorf("%s: %s, not %d", what, status, c.status)
		}
		conn.Close()
		waitFor(t, "no lane", func() bool { return e.lanes.standing() == 0 })
	}
	// A member of whom the transport was not told, and then one after the end.
	conn, _ := openLane(t, e, "", laneHead(e, 3, 1))
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a lane of a peer that the transport does not know: %v", err)
	}
	e.lanes.Stop()
	conn, _ = openLane(t, e, "", laneHead(e, 2, 1))
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a lane after the end: %v", err)
	}
}

// What is no message ends the lane, and what no member sends is passed over. Both change
// nothing, and are counted.
func TestHostileLane(t *testing.T) {
	frame := func(b []byte) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...) }
	hostile := map[string][]byte{
		"a local message":       frame(appendMessage(nil, &raftpb.Message{Type: raftpb.MsgHup.Enum(), From: new(uint64(2))})),
		"a snapshot":            frame(appendMessage(nil, &raftpb.Message{Type: raftpb.MsgSnap.Enum(), From: new(uint64(2)), Term: new(uint64(1))})),
		"a type that is none":   frame(appendMessage(nil, &raftpb.Message{Type: raftpb.MessageType(99).Enum(), From: new(uint64(2)), Term: new(uint64(1))})),
		"an append with a gap":  frame(appendMessage(nil, func() *raftpb.Message { m := laneAppend(2, 1, 7, 1); m.Index = new(uint64(3)); return m }())),
		"a far term":            frame(appendMessage(nil, func() *raftpb.Message { m := laneAppend(2, 1, 7, 1); m.Term = new(uint64(1 << 60)); return m }())),
		"a proposal of nothing": frame(appendMessage(nil, &raftpb.Message{Type: raftpb.MsgProp.Enum(), From: new(uint64(2))})),
	}
	ends := map[string][]byte{
		"a length without end": {0xff, 0xff, 0xff, 0xff},
		"a length beyond most": binary.BigEndian.AppendUint32(nil, maxLaneMessage+1),
	}
	for what, b := range badLaneFrames() {
		ends[what] = frame(b)
	}
	e := newLaneEnd(t, 1)
	e.lanes.AddPeer(2, []string{testURL(2)})
	for what, b := range ends {
		conn, _ := openLane(t, e, "", laneHead(e, 2, 1))
		before := e.counted(t, "pontoon_refused_messages_total")
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, conn); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s: the lane stands: %v", what, err)
		}
		conn.Close()
		if len(e.recvC) > 0 || e.received.Load() != 0 {
			t.Errorf("%s reached the loop", what)
		}
		if e.counted(t, "pontoon_refused_messages_total") == before {
			t.Errorf("%s was not counted", what)
		}
	}
	passed := frame(appendMessage(nil, laneAppend(2, 1, 3, 1)))
	for what, b := range hostile {
		conn, _ := openLane(t, e, "", laneHead(e, 2, 1))
		before := e.counted(t, "pontoon_refused_messages_total")
		if _, err := conn.Write(append(b, passed...)); err != nil {
			t.Fatal(err)
		}
		if got := e.next(t); got.GetIndex() != 3 {
			t.Errorf("%s reached the loop: %v", what, got)
		}
		if e.counted(t, "pontoon_refused_messages_total") == before {
			t.Errorf("%s was not counted", what)
		}
		conn.Close()
	}
	// Signs of life, and one of whom this member does not know.
	conn, _ := openLane(t, e, "", laneHead(e, 2, 1), frame(appendMessage(nil, laneAppend(2, 1, 4, 1)))...)
	defer conn.Close()
	if got := e.next(t); got.GetIndex() != 4 {
		t.Errorf("the message with the request has index %d", got.GetIndex())
	}
	stranger := laneAppend(9, 1, 5, 1)
	for _, b := range [][]byte{make([]byte, 8), frame(appendMessage(nil, stranger)), frame(appendMessage(nil, laneAppend(2, 1, 6, 1)))} {
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if got := e.next(t); got.GetIndex() != 6 {
		t.Errorf("the message behind has index %d", got.GetIndex())
	}
}

// A lane whose peer goes on sending nothing, or a byte now and then, ends.
func TestSlowLane(t *testing.T) {
	e := newLaneEnd(t, 1)
	e.lanes.silence = 200 * time.Millisecond
	e.lanes.AddPeer(2, []string{testURL(2)})
	for what, begin := range map[string][]byte{
		"nothing":          nil,
		"half a length":    {0, 0},
		"a small message":  {0, 0, 0, 200, 3},
		"a large message":  binary.BigEndian.AppendUint32(nil, maxLaneMessage),
		"of that, a piece": append(binary.BigEndian.AppendUint32(nil, maxLaneMessage), make([]byte, 100_000)...),
	} {
		conn, _ := openLane(t, e, "", laneHead(e, 2, 1))
		if _, err := conn.Write(begin); err != nil {
			t.Fatal(err)
		}
		gone := make(chan struct{})
		go func() {
			_, _ = io.Copy(io.Discard, conn) // until the end, of whatever kind
			close(gone)
		}()
		drip := time.NewTicker(20 * time.Millisecond)
		late := time.After(10 * time.Second)
	dripping:
		for {
			select {
			case <-drip.C:
				if len(begin) > 4 { // else it would be the rest of a length
					_, _ = conn.Write([]byte{0})
				}
			case <-gone:
				break dripping
			case <-late:
				t.Errorf("%s: the lane goes on for ever", what)
				break dripping
			}
		}
		drip.Stop()
		conn.Close()
	}
}

// A peer that takes nothing holds neither the loop nor memory: what it does not take
// goes the other way, and the lane ends.
func TestPeerThatDoesNotRead(t *testing.T) {
	e := newLaneEnd(t, 1)
	e.lanes.silence = 300 * time.Millisecond
	e.lanes.AddPeer(2, []string{testURL(2)})
	conn, _ := openLane(t, e, "", laneHead(e, 2, 1))
	defer conn.Close()
	lanesStand(t, e)
	e.lanes.mu.Lock()
	ln := e.lanes.mu.peers[2].lane
	e.lanes.mu.Unlock()
	sent := 0
	for ; e.slow.count() == 0 && sent < 200; sent++ {
		if _, err := conn.Write(make([]byte, 4)); err != nil { // it lives
			t.Fatal(err)
		}
		start := time.Now()
		e.lanes.Send([]*raftpb.Message{laneAppend(1, 2, 1, maxLaneMessage-200)})
		if took := time.Since(start); took > 200*time.Millisecond {
			t.Fatalf("a Send took %v", took)
		}
	}
	if sent == 200 || !ln.isBusy() {
		t.Fatalf("all of %d messages went to a peer that does not read", sent)
	}
	ln.mu.Lock()
	if len(ln.mu.behind) > maxLaneMessage+4 {
		t.Errorf("%d bytes wait", len(ln.mu.behind))
	}
	ln.mu.Unlock()
	beat := message(raftpb.MsgHeartbeat, 1, 1)
	beat.To = new(uint64(2))
	if e.lanes.Send([]*raftpb.Message{beat}); e.slow.count() != 2 {
		t.Error("a heartbeat waits behind appends")
	}
	waitFor(t, "the end of the lane", func() bool {
		_, _ = conn.Write(make([]byte, 4)) // it lives, to the last
		return e.lanes.standing() == 0
	})
	waitFor(t, "a report", func() bool { return e.reported() > 0 })
}

// A lane with signs of life stands, however they come; one on which a message stops in
// its middle does not.
func TestLaneSilence(t *testing.T) {
	const silence = 400 * time.Millisecond
	e := newLaneEnd(t, 1)
	e.lanes.silence = silence
	e.lanes.AddPeer(2, []string{testURL(2)})
	conn, _ := openLane(t, e, "", laneHead(e, 2, 1))
	defer conn.Close()
	lanesStand(t, e)
	for i := range 8 {
		pause := time.NewTimer([]time.Duration{silence * 4 / 10, silence * 6 / 10}[i%2])
		<-pause.C
		if _, err := conn.Write(make([]byte, 4)); err != nil || e.lanes.standing() != 1 {
			t.Fatalf("the lane has ended after %d signs of life: %v", i, err)
		}
	}
	start := time.Now()
	if _, err := conn.Write(binary.BigEndian.AppendUint32(nil, maxLaneMessage)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the end of the lane", func() bool { return e.lanes.standing() == 0 })
	if took := time.Since(start); took > 5*silence {
		t.Errorf("a message that stops keeps its lane for %v", took)
	}
}

// The dialer does not take any answer for a lane, nor wait for one for ever.
func TestLaneAnswers(t *testing.T) {
	for what, c := range map[string]struct {
		answer string
		ok     bool
	}{
		"another status": {"HTTP/1.1 404 Not Found\r\n\r\n", false},
		"no HTTP":        {"PONG\r\n\r\n", false},
		"no end":         {"HTTP/1.1 101 x\r\n" + strings.Repeat("a: b\r\n", 2*laneHeadMax/6), false},
		"a long line":    {"HTTP/1.1 101 x\r\n" + strings.Repeat("a", 1<<20), false},
		"cut short":      {"HTTP/1.1 101 x\r\n", false},
		"as it should":   {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", true},
	} {
		if err := readSwitch(bufio.NewReader(strings.NewReader(c.answer))); (err == nil) != c.ok {
			t.Errorf("%s: %v", what, err)
		}
	}
	two := newLaneEnd(t, 2)
	two.lanes.silence = 100 * time.Millisecond
	two.lanes.AddPeer(1, []string{hungPeer(t)})
	if _, _, err := two.lanes.open(t.Context(), 1, hungPeer(t)); err == nil {
		t.Error("a peer that hangs gave a lane")
	}
	for _, bad := range []string{"https://127.0.0.1:1", "http://127.0.0.1:1", "http://%zz"} {
		if _, _, err := two.lanes.open(t.Context(), 1, bad); err == nil {
			t.Errorf("%s gave a lane", bad)
		}
	}
}

// Real members have a lane to each other one, also after one of them was frozen or
// killed, and work on without.
func TestProcessLanes(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	have := func(id, lanes int) {
		t.Helper()
		want := fmt.Sprintf("\npontoon_peer_lanes %d\n", lanes)
		waitFor(t, fmt.Sprintf("%d lanes of member %d", lanes, id), func() bool {
			a, err := s.nodes[id].try(http.MethodGet, "/metrics", "")
			return err == nil && strings.Contains(a.body, want)
		})
	}
	all := func() {
		t.Helper()
		for id := range s.nodes {
			have(id, 2)
		}
	}
	all()
	s.nodes[3].signal(syscall.SIGSTOP)
	have(1, 1)
	have(2, 1)
	s.nodes[1].put("key", "without")
	s.nodes[3].signal(syscall.SIGCONT)
	all()
	s.nodes[3].get("key", "without")
	for _, id := range []int{1, 3} { // one that is dialled, and one that dials
		s.nodes[id].crash()
		have(2, 1)
		s.start(id)
		all()
		s.nodes[id].put("key", fmt.Sprint(id))
	}
	s.nodes[2].get("key", "3")
}
