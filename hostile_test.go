package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	stats "go.etcd.io/etcd/server/v3/etcdserver/api/v2stats"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"pontoon/kv"
)

// Bytes that no healthy member sends: to the peer port, and in answer to what
// this member asks of a peer. There must be no end of the process, no change of
// term, commit or members, an answer that says so, and no more memory than is
// bounded. peer_test.go has the messages, one by one; here is the wire.

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func be64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// sized is b behind its length, as rafthttp frames it.
func sized(b []byte) []byte { return append(be64(uint64(len(b))), b...) }

// seriesOfPeers counts the time series that rafthttp has made of peers' names.
func seriesOfPeers(t *testing.T) (n int) {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "etcd_network") {
			n += len(f.GetMetric())
		}
	}
	return n
}

// postPeer sends one POST to a peer port, as a member of the cluster would.
func postPeer(t *testing.T, srv *httptest.Server, tr *rafthttp.Transport, path string, body io.Reader) (status int, text string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, srv.URL+path, body)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{"X-Etcd-Cluster-ID": tr.ClusterID.String(), "X-Server-Version": "3.7.0", "X-Min-Cluster-Version": "3.0.0", "X-Server-From": "2"} {
		req.Header.Set(k, v)
	}
	resp, err := srv.Client().Do(req)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 400))
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, strings.TrimSpace(string(b))
}

// housekept waits until the leader has nothing left to note in the member table.
func (c *cluster) housekept() {
	c.t.Helper()
	l := c.leader()
	l.mustPut("k", "v")
	c.wait("the leader to have seen all members hold entries", func() bool {
		return !slices.ContainsFunc(l.node.members.Load().Members, func(m member) bool { return !m.Started })
	})
	l.mustPut("k", "v")
	for _, n := range c.nodes {
		<-n.store.applied.Wait(l.store.applied.At())
	}
}

// Every type of message with each of its numbers at the ends of its range, from
// everybody and nobody, to a leader and to a follower that run. None has a term
// beyond theirs: such a one may change it.
func TestEveryMessageAtTheEdges(t *testing.T) {
	c := newCluster(t, 3, func(cfg *Config) { cfg.ElectionTicks = 50 })
	l, f := c.leader(), c.follower()
	term := l.node.soft.Load().term
	set := map[string]func(*raftpb.Message, uint64){
		"from":     func(m *raftpb.Message, x uint64) { m.From = new(x) },
		"to":       func(m *raftpb.Message, x uint64) { m.To = new(x) },
		"log term": func(m *raftpb.Message, x uint64) { m.LogTerm = new(x) },
		"index":    func(m *raftpb.Message, x uint64) { m.Index = new(x) },
		"commit":   func(m *raftpb.Message, x uint64) { m.Commit = new(x) },
		"vote":     func(m *raftpb.Message, x uint64) { m.Vote = new(x) },
		"hint":     func(m *raftpb.Message, x uint64) { m.RejectHint, m.Reject = new(x), new(true) },
		"no term":  func(m *raftpb.Message, _ uint64) { m.Term = nil },
		"old term": func(m *raftpb.Message, _ uint64) { m.Term = new(uint64(1)) },
		"context":  func(m *raftpb.Message, x uint64) { m.Context = make([]byte, x%9) },
		"entry":    func(m *raftpb.Message, x uint64) { m.Entries = []*raftpb.Entry{{Index: new(x), Data: []byte("x")}} },
		"conf": func(m *raftpb.Message, x uint64) {
			m.Entries = []*raftpb.Entry{{Type: raftpb.EntryConfChangeV2.Enum(), Data: be64(x)}}
		},
		"empty snap": func(m *raftpb.Message, _ uint64) { m.Snapshot = &raftpb.Snapshot{} },
		"snap": func(m *raftpb.Message, x uint64) {
			m.Snapshot = &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(x), Term: new(x)}}
		},
		"responses": func(m *raftpb.Message, _ uint64) { m.Responses = []*raftpb.Message{{}} },
	}
	for _, n := range []*testNode{l, f} {
		srv, tr := peerPort(t, n)
		from := l.id
		if n == l {
			from = f.id
		}
		c.housekept()
		c.quiet()
		before := seriesOfPeers(t)
		n.unhurt(t, func() {
			for typ := raftpb.MessageType(-1); typ < 30; typ++ {
				for name, f := range set {
					for _, x := range []uint64{0, 1, 4, 77, math.MaxInt64, math.MaxUint64 - 1, math.MaxUint64} {
						m := &raftpb.Message{Type: typ.Enum(), From: new(from), To: new(n.id), Term: new(term)}
						if f(m, x); typ == raftpb.MsgTimeoutNow || typ == raftpb.MsgTransferLeader {
							continue // these are asked for an election, and hold one
						}
						if status, text := postPeer(t, srv, tr, "/raft", bytes.NewReader(marshal(t, m))); status != 204 && status != 400 {
							t.Errorf("%v, %s %d: %d %s", typ, name, x, status, text)
						}
					}
				}
			}
			if err := n.node.do(c.ctx(), func() {}); err != nil {
				t.Fatal(err)
			}
		})
		if after := seriesOfPeers(t); after > before {
			t.Errorf("%d time series were made of what messages say", after-before)
		}
	}
	c.check()
}

// What is larger than anything a member sends is refused before it is held.
func TestPeerPortBoundsMemory(t *testing.T) {
	c := newCluster(t, 1, nil)
	l := c.leader()
	srv, tr := peerPort(t, l)
	allocated := func(f func()) int64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		return int64(after.TotalAlloc - before.TotalAlloc)
	}
	tiny := bytes.Repeat([]byte{7<<3 | 2, 0}, maxPeerEntries+1) // entries of two bytes
	for _, x := range []struct {
		name, path string
		body       []byte
		most       int64
	}{
		{"more entries than fit", "/raft", tiny, int64(16 * len(tiny))},
		{"messages in messages", "/raft", bytes.Repeat([]byte{14<<3 | 2, 0}, 1<<20), 32 << 20},
		{"a snapshot's message of 2^63 bytes", "/raft/snapshot", be64(1 << 63), 2 << 20},
		{"a snapshot's message of 60 MiB", "/raft/snapshot", be64(60 << 20), 2 << 20},
		{"a snapshot's message that is shorter than it says", "/raft/snapshot", append(be64(1<<20), 1), 4 << 20},
	} {
		if used := allocated(func() {
			if status, text := postPeer(t, srv, tr, x.path, bytes.NewReader(x.body)); status != 400 {
				t.Errorf("%s: %d %s", x.name, status, text)
			}
		}); used > x.most {
			t.Errorf("%s: %d bytes were allocated", x.name, used)
		}
	}
	// Only so many large messages are held at once; small ones go on.
	var held sync.WaitGroup
	stop := make(chan struct{})
	for range largeMessages {
		r, w := io.Pipe()
		held.Go(func() { postPeer(t, srv, tr, "/raft", r) })
		if _, err := w.Write(make([]byte, smallMessage+1)); err != nil {
			t.Fatal(err)
		}
		go func() { <-stop; w.Close() }()
	}
	waitFor(t, "places to be full", func() bool {
		status, _ := postPeer(t, srv, tr, "/raft", bytes.NewReader(make([]byte, smallMessage+1)))
		return status == 503
	})
	small := &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(1))}
	if status, text := postPeer(t, srv, tr, "/raft", bytes.NewReader(marshal(t, small))); status != 204 {
		t.Errorf("a small message beside large ones: %d %s", status, text)
	}
	close(stop)
	held.Wait()
	if status, text := postPeer(t, srv, tr, "/raft", bytes.NewReader(make([]byte, smallMessage+1))); status != 400 {
		t.Errorf("a large message after them: %d %s", status, text)
	}
}

// The queue before the loop is bounded in bytes as well.
func TestReceivedBytesAreBounded(t *testing.T) {
	b := newBenchNode(t)
	const rest = 64 << 10
	b.received.Store(maxReceived - rest) // by others
	big := func() *raftpb.Message {
		m := message(raftpb.MsgApp, 2, 5)
		m.Index, m.LogTerm = new(uint64(1)), new(uint64(1))
		m.Entries = []*raftpb.Entry{{Type: raftpb.EntryNormal.Enum(), Index: new(uint64(2)), Term: new(uint64(5)), Data: make([]byte, rest/4)}}
		return m
	}
	for range 8 {
		if err := b.Process(context.Background(), big()); err != nil {
			t.Fatal(err)
		}
	}
	if len(b.recvC) != 3 { // of a quarter of the room and somewhat more
		t.Fatalf("%d messages of a quarter of the room wait", len(b.recvC))
	}
	for len(b.recvC) > 0 {
		b.taken(<-b.recvC)
	}
	if err := b.Process(context.Background(), big()); err != nil || len(b.recvC) != 1 || b.received.Load() != maxReceived-rest+messageBytes(big()) {
		t.Fatalf("%v; %d messages of %d bytes wait after the queue was emptied", err, len(b.recvC), b.received.Load())
	}
	// All that a message holds counts, whatever field it is in.
	b.taken(<-b.recvC)
	empty := message(raftpb.MsgApp, 2, 5)
	empty.Index, empty.LogTerm = new(uint64(1)), new(uint64(1))
	for i := range uint64(1000) {
		empty.Entries = append(empty.Entries, &raftpb.Entry{Index: new(2 + i), Term: new(uint64(5))})
	}
	unknown := message(raftpb.MsgVote, 2, 5)
	unknown.ProtoReflect().SetUnknown(protowire.AppendBytes(protowire.AppendTag(nil, 100, protowire.BytesType), make([]byte, rest)))
	inEntry := message(raftpb.MsgApp, 2, 5)
	inEntry.Index, inEntry.LogTerm = new(uint64(1)), new(uint64(1))
	inEntry.Entries = []*raftpb.Entry{{Index: new(uint64(2)), Term: new(uint64(5))}}
	inEntry.Entries[0].ProtoReflect().SetUnknown(unknown.ProtoReflect().GetUnknown())
	for name, m := range map[string]*raftpb.Message{"entries without data": empty, "a field that nobody knows": unknown, "the same in an entry": inEntry} {
		if err := b.Process(context.Background(), m); err != nil || len(b.recvC) != 0 || b.received.Load() != maxReceived-rest {
			t.Errorf("%s: %v; %d wait", name, err, len(b.recvC))
		}
	}
	prop := message(raftpb.MsgProp, 2, 0)
	prop.Entries = []*raftpb.Entry{{Data: make([]byte, rest/4)}}
	b.heldBytes = maxUncommitted - rest
	for range 8 {
		b.hold(prop)
	}
	if len(b.held) != 4 {
		t.Fatalf("%d proposals of a quarter of the room are held", len(b.held))
	}
}

// Snapshots that are none, too long, too many, twice, or where the disk is low.
func TestHostileSnapshots(t *testing.T) {
	c := newCluster(t, 1, nil)
	l := c.leader()
	c.housekept()
	srv, tr := peerPort(t, l)
	table := l.node.members.Load()
	file := func(h snapHeader, applied uint64) []byte {
		state := kv.NewState()
		state.SetApplied(applied)
		var b bytes.Buffer
		if err := kv.WriteSnapshot(&b, marshalJSON(t, h), state); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	term := l.node.soft.Load().term
	envelope := func(index uint64) []byte {
		return sized(marshal(t, &raftpb.Message{Type: raftpb.MsgSnap.Enum(), From: new(uint64(2)), To: new(l.id), Term: new(term),
			Snapshot: &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(index), Term: new(term), ConfState: table.confState()}}}))
	}
	const at = 1 << 40
	good := file(snapHeader{at, term, table}, at)
	foreign := *table
	foreign.ClusterID++
	unparsable := *table
	unparsable.Members = []member{{ID: 1, PeerURLs: []string{"no URL"}}}
	homeless := *table
	homeless.Members = []member{{ID: 1}}
	flipped := slices.Clone(good)
	flipped[len(flipped)/2] ^= 1
	refuse := func(name string, want int, body io.Reader) {
		t.Helper()
		l.unhurt(t, func() {
			if status, text := postPeer(t, srv, tr, "/raft/snapshot", body); status != want {
				t.Errorf("%s: %d %s, want %d", name, status, text, want)
			}
		})
		if left, err := os.ReadDir(l.disk.snapDir()); err != nil || len(left) != 1 {
			t.Errorf("%s: left %v, %v", name, left, err)
		}
	}
	for name, body := range map[string][]byte{
		"of another cluster": file(snapHeader{at, term, &foreign}, at),
		"of another index":   file(snapHeader{at + 1, term, table}, at+1),
		"whose members have URLs that rafthttp panics over": file(snapHeader{at, term, &unparsable}, at),
		"whose members have no URL":                         file(snapHeader{at, term, &homeless}, at),
		"with a flipped bit":                                flipped,
		"cut short":                                         good[:len(good)-1],
		"with more behind it":                               append(slices.Clone(good), 0),
		"empty":                                             nil,
	} {
		refuse(name, 400, io.MultiReader(bytes.NewReader(envelope(at)), bytes.NewReader(body)))
	}
	endless := &counted{Reader: zeros{}}
	refuse("without end", 400, io.MultiReader(bytes.NewReader(envelope(at)), endless))
	if n := endless.n.Load(); n > 64<<20 {
		t.Errorf("%d bytes were read of what is no snapshot", n)
	}
	refuse("behind no snapshot message", 400, io.MultiReader(bytes.NewReader(sized(marshal(t, message(raftpb.MsgApp, 2, term)))), bytes.NewReader(good)))
	refuse("by name only", 400, bytes.NewReader(envelope(at)[8:]))

	// So many at once, and one more.
	var held sync.WaitGroup
	var ends []*io.PipeWriter
	for range snapshotsAtOnce {
		r, w := io.Pipe()
		held.Go(func() { postPeer(t, srv, tr, "/raft/snapshot", r) })
		if _, err := w.Write(envelope(at)); err != nil {
			t.Fatal(err)
		}
		ends = append(ends, w)
	}
	waitFor(t, "all places to be taken", func() bool {
		status, _ := postPeer(t, srv, tr, "/raft/snapshot", strings.NewReader("x"))
		return status == 503
	})
	for _, w := range ends {
		w.Close()
	}
	held.Wait()
	refuse("after the others", 400, strings.NewReader("x"))

	// The same twice at once, while a third one with other content comes.
	body := &snapBody{Reader: zeros{}, room: func() error { return errDiskLow }}
	if err := l.disk.receiveSnapshot(at, body, func(snapHeader) error { return nil }); !errors.Is(err, errDiskLow) {
		t.Errorf("with the disk low: %v", err)
	}
	fits := func(h snapHeader) error { return nil }
	if err := l.disk.receiveSnapshot(at, bytes.NewReader(good), fits); err != nil {
		t.Fatal(err)
	}
	other := kv.NewState()
	other.SetApplied(at)
	var b bytes.Buffer
	if err := kv.WriteSnapshot(&b, marshalJSON(t, snapHeader{at, term + 1, table}), other); err != nil {
		t.Fatal(err)
	}
	if err := l.disk.receiveSnapshot(at, bytes.NewReader(b.Bytes()), fits); err != nil {
		t.Fatal(err)
	}
	if h, err := l.disk.verifySnapshot(at); err != nil || h.Term != term {
		t.Errorf("the file that raft was told of was replaced: %+v %v", h, err)
	}
	if err := os.WriteFile(l.disk.snapPath(at), []byte("rotten"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.disk.receiveSnapshot(at, bytes.NewReader(good), fits); err != nil {
		t.Fatal(err)
	}
	if _, err := l.disk.verifySnapshot(at); err != nil {
		t.Errorf("a rotten file kept its place: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(l.disk.snapDir(), "tmp*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

type counted struct {
	io.Reader
	n atomic.Int64 // the HTTP client may read on when the answer is there
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// A snapshot may take long, if it moves.
func TestSnapshotHasToMove(t *testing.T) {
	room := func() error { return nil }
	slow := &snapBody{Reader: zeros{}, room: room, since: time.Now().Add(-2 * snapshotProgress)}
	if _, err := slow.Read(make([]byte, 100)); err == nil {
		t.Error("100 bytes in a minute are progress")
	}
	steady := &snapBody{Reader: zeros{}, room: room, since: time.Now().Add(-2 * snapshotProgress), came: snapshotPiece}
	if _, err := steady.Read(make([]byte, 100)); err != nil {
		t.Error(err)
	}
	if steady.came != 0 || time.Since(steady.since) > time.Minute/2 {
		t.Error("the next piece has no time of its own")
	}
}

// heardRaft is the raft of a transport that has no node.
type heardRaft struct{ heard chan *raftpb.Message }

func (r heardRaft) Process(_ context.Context, m *raftpb.Message) error {
	select {
	case r.heard <- m:
	default:
	}
	return nil
}
func (heardRaft) IsIDRemoved(uint64) bool                         { return false }
func (heardRaft) ReportUnreachable(uint64)                        {}
func (heardRaft) ReportSnapshot(id uint64, s raft.SnapshotStatus) {}

// dialer is member 1's transport alone, with peer 2 at an address of the test's.
func dialer(t *testing.T, answer func(path string, c net.Conn)) (heard chan *raftpb.Message, refused chan error, tr *rafthttp.Transport) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				req, err := http.ReadRequest(bufio.NewReader(c))
				if err != nil {
					return
				}
				answer(req.URL.Path, c)
			}()
		}
	}()
	heard, refused = make(chan *raftpb.Message, 64), make(chan error, 1024)
	own, err := types.NewURLs([]string{testURL(1)})
	if err != nil {
		t.Fatal(err)
	}
	tr = &rafthttp.Transport{Logger: quietLog, DialTimeout: time.Second, DialRetryFrequency: 500, ID: 1, URLs: own, ClusterID: 7,
		Raft: heardRaft{heard}, Snapshotter: snap.New(quietLog, t.TempDir()),
		ServerStats: stats.NewServerStats("x", "x"), LeaderStats: stats.NewLeaderStats(quietLog, "x"), ErrorC: make(chan error, 1)}
	if err := tr.Start(); err != nil {
		t.Fatal(err)
	}
	closeIdle, err := guardAnswers(tr, func(id uint64) bool { return id == 3 }, func(err error) {
		select {
		case refused <- err:
		default:
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.Stop(); closeIdle() })
	tr.AddPeer(2, []string{"http://" + l.Addr().String()})
	return heard, refused, tr
}

const streamHead = "HTTP/1.1 200 OK\r\nX-Server-Version: 3.7.0\r\n\r\n"

// hostileStreams is what a broken or hostile peer answers to a stream of each
// kind. Without a guard most of them end the process or take all memory.
func hostileStreams(t testing.TB) (appends, messages []string) {
	entry := func(b string) string { return "\x01" + string(be64(1)) + string(sized([]byte(b))) + string(be64(1)) }
	msg := func(f func(*raftpb.Message)) string {
		m := &raftpb.Message{Type: raftpb.MsgApp.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(2))}
		f(m)
		return string(sized(marshal(t, m)))
	}
	appends = []string{
		"\x01" + string(be64(math.MaxUint64)), // entries: make panics
		"\x01" + string(be64(math.MaxInt64)),
		"\x01" + string(be64(1<<40)),
		"\x01" + string(be64(maxPeerEntries+1)) + strings.Repeat(string(be64(0)), maxPeerEntries+2), // whole, but it would take a hundred times that
		"\x01" + string(be64(2)) + string(be64(math.MaxUint64)),                                     // bytes of an entry
		"\x01" + string(be64(2)) + string(be64(1<<62)),
		"\x01" + string(be64(2)) + string(be64(1<<40)),
		"\x01" + string(be64(2)) + string(be64(maxPeerFrame)),
		"\x01" + string(be64(2)) + string(sized([]byte{})), // and no more
		entry("\xff"),                     // a tag without an end
		entry("\x00\x01"),                 // field 0
		entry("\x08"),                     // a number that is not there
		entry("\x22\x05abc"),              // bytes that are cut short
		entry("\x0b\x0c"),                 // a group
		entry("\x0c"),                     // the end of one
		entry("\x0f\x01"),                 // wire type 7
		entry("\xf8\xff\xff\xff\x7f\x01"), // a field beyond all
		entry(strings.Repeat("\xff", 11)), // a varint too long
		entry("\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"), // a number of more than 64 bits
		"\x02" + string(be64(math.MaxUint64)),
		"\x02" + string(be64(1<<62)),
		"\x02" + string(be64(600<<20)),
		"\x02" + string(sized([]byte("garbage"))),
		"\x02" + string(sized([]byte{0x4a, 2, 0x12, 9})), // a snapshot that is cut short within
		"\x02" + string(sized(bytes.Repeat([]byte{7<<3 | 2, 0}, maxPeerEntries+1))),
		"\x02" + msg(func(m *raftpb.Message) { m.From = new(uint64(3)) }),
		"\x02" + msg(func(m *raftpb.Message) { m.From = nil }),
		"\x02" + msg(func(m *raftpb.Message) { m.Responses = []*raftpb.Message{{}} }),
		"\x03", "\xff", strings.Repeat("\xfe", 1<<16),
	}
	messages = []string{
		string(be64(math.MaxUint64)),
		string(be64(500 << 20)), // rafthttp would allow that much, at once
		string(be64(maxPeerFrame + 1)),
		string(be64(100)) + "short",
		string(sized([]byte("garbage"))),
		string(sized(bytes.Repeat([]byte{7<<3 | 2, 0}, maxPeerEntries+1))),
		msg(func(m *raftpb.Message) { m.Responses = []*raftpb.Message{{}} }),
	}
	return appends, messages
}

// Nothing of such a stream gets through, and all of an honest one does.
func TestHostileStreams(t *testing.T) {
	appends, messages := hostileStreams(t)
	for i, s := range slices.Concat(appends, messages) {
		if out, err := readStream(strings.NewReader(s), i < len(appends)); len(out) > 0 || err == nil {
			if string(out) == s && i == len(appends)+4 {
				continue // a whole message of garbage: rafthttp refuses it without harm
			}
			t.Errorf("of %.60q %d bytes got through, %v", s, len(out), err)
		}
	}
	large := marshal(t, &raftpb.Entry{Data: make([]byte, maxMessageBytes)})
	frame := func(n int) io.Reader {
		parts := []io.Reader{strings.NewReader("\x01"), bytes.NewReader(be64(uint64(n)))}
		for range n {
			parts = append(parts, bytes.NewReader(be64(uint64(len(large)))), bytes.NewReader(large))
		}
		return io.MultiReader(append(parts, bytes.NewReader(be64(9)))...)
	}
	if out, err := readStream(frame(4), true); err != nil || len(out) != 1+8+4*(8+len(large))+8 {
		t.Errorf("four large entries: %d bytes, %v", len(out), err)
	}
	if out, err := readStream(frame(maxPeerFrame/maxMessageBytes), true); !errors.Is(err, errBadFrame) || len(out) > 0 {
		t.Errorf("entries that are too large together: %d bytes, %v", len(out), err)
	}
}

func TestHostileAnswers(t *testing.T) {
	appends, messages := hostileStreams(t)
	var plain []string
	for _, v := range []string{"abc", "3.7", "3.7.x", "-1.0.0", "99999999999999999999.0.0", "3.7.0.0", "1e9", "\x7f"} {
		plain = append(plain, "HTTP/1.1 200 OK\r\nX-Server-Version: "+v+"\r\n\r\n")
	}
	plain = append(plain, "HTTP/1.1 404 no\r\nX-Server-Version: x\r\n\r\n", "HTTP/1.1 410 Gone\r\nX-Server-Version: x\r\n\r\n",
		"garbage\r\n\r\n", "HTTP/1.1 999999 x\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: x\r\n\r\n",
		"HTTP/1.1 200 OK\r\nX-Server-Version: 3.7.0\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nxx",
		"HTTP/1.1 200 OK\r\nX-Server-Version: 1.0.0\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", "",
		"HTTP/1.1 200 OK\r\nX: "+strings.Repeat("x", 1<<20)+"\r\n\r\n",
		strings.Repeat("HTTP/1.1 103 Early\r\n\r\n", 1000))
	for i := range appends {
		appends[i] = streamHead + appends[i]
	}
	for i := range messages {
		messages[i] = streamHead + messages[i]
	}
	beat := &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(5))}
	forwarded := &raftpb.Message{Type: raftpb.MsgProp.Enum(), From: new(uint64(3)), To: new(uint64(1)), Entries: []*raftpb.Entry{{Data: []byte("x")}}}
	stranger := func(id uint64) []byte {
		return sized(marshal(t, &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), From: new(id), To: new(uint64(1)), Term: new(uint64(5))}))
	}
	app := &raftpb.Message{Type: raftpb.MsgApp.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(5)), LogTerm: new(uint64(5)), Index: new(uint64(9))}
	one := &raftpb.Entry{Index: new(uint64(10)), Term: new(uint64(5)), Data: []byte("data")}
	honestAppends := streamHead + "\x00\x02" + string(sized(marshal(t, app))) + "\x01" + string(be64(1)) + string(sized(marshal(t, one))) + string(be64(9)) + "\x00"
	honestMessages := streamHead + string(sized(marshal(t, &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum()})))
	for id := range uint64(500) {
		honestMessages += string(stranger(1000 + id))
	}
	honestMessages += string(sized(marshal(t, beat))) + string(sized(marshal(t, forwarded)))

	var mu sync.Mutex
	scripts := map[string][]string{
		"/raft/stream/msgapp/1":  append(slices.Concat(plain, appends), honestAppends),
		"/raft/stream/message/1": append(slices.Concat(plain, messages), honestMessages),
	}
	hostile := len(scripts["/raft/stream/msgapp/1"]) + len(scripts["/raft/stream/message/1"]) - 2
	hold := make(chan struct{})
	t.Cleanup(func() { close(hold) })
	before := seriesOfPeers(t)
	var mem, after runtime.MemStats
	runtime.ReadMemStats(&mem)
	heard, refused, _ := dialer(t, func(path string, c net.Conn) {
		mu.Lock()
		s := scripts[path]
		if len(s) > 0 {
			scripts[path] = s[1:]
		}
		mu.Unlock()
		if len(s) == 0 {
			return
		}
		if _, err := io.WriteString(c, s[0]); err == nil && len(s) == 1 {
			<-hold
		}
	})
	var got []string
	for len(got) < 4 {
		select {
		case m := <-heard:
			if m.GetType() != raftpb.MsgApp || len(m.Entries) > 0 || m.GetIndex() == 9 { // else half of a hostile one
				got = append(got, fmt.Sprintf("%v from %d: %d entries", m.GetType(), m.GetFrom(), len(m.Entries)))
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("heard only %q; left %d and %d", got, len(scripts["/raft/stream/msgapp/1"]), len(scripts["/raft/stream/message/1"]))
		}
	}
	slices.Sort(got)
	if want := []string{"MsgApp from 2: 0 entries", "MsgApp from 2: 1 entries", "MsgHeartbeat from 2: 0 entries", "MsgProp from 3: 1 entries"}; !slices.Equal(got, want) {
		t.Errorf("heard %q after %d hostile answers, want %q", got, hostile, want)
	}
	if len(refused) < len(appends) {
		t.Errorf("only %d answers were refused", len(refused))
	}
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - mem.TotalAlloc; used > 512<<20 {
		t.Errorf("%d MiB were allocated for answers of %d", used>>20, hostile)
	}
	if n := seriesOfPeers(t) - before; n > 40 {
		t.Errorf("%d time series were made for peers that only messages name", n)
	}
}

// Answers without end, to a message that was posted and to a stream, end here.
func TestAnswersWithoutEnd(t *testing.T) {
	sent := make(chan int, 16)
	_, _, tr := dialer(t, func(path string, c net.Conn) {
		head := "HTTP/1.1 412 x\r\nX-Server-Version: 3.7.0\r\n\r\n"
		if path == "/raft" {
			head = "HTTP/1.1 200 OK\r\n\r\n"
		}
		n, err := io.WriteString(c, head)
		for piece := make([]byte, 4<<10); err == nil && n < 256<<20; {
			var k int
			k, err = c.Write(piece)
			n += k
		}
		select {
		case sent <- n:
		default:
		}
	})
	tr.Send([]*raftpb.Message{{Type: raftpb.MsgHeartbeat.Enum(), From: new(uint64(1)), To: new(uint64(2))}})
	for range 4 { // what is on the way in the kernel is megabytes
		select {
		case n := <-sent:
			if n > 32<<20 {
				t.Errorf("%d bytes of an answer were taken", n)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("an answer goes on")
		}
	}
}

// A peer that falls silent without a word, as a machine that lost its power does,
// is asked again, and does not wait until TCP gives up.
func TestSilentPeerIsAskedAgain(t *testing.T) {
	before := rafthttp.ConnReadTimeout
	t.Cleanup(func() { rafthttp.ConnReadTimeout = before }) // after dialer's own clean-up
	rafthttp.ConnReadTimeout = 100 * time.Millisecond
	asked := make(chan string, 64)
	quit := make(chan struct{})
	t.Cleanup(func() { close(quit) })
	dialer(t, func(path string, c net.Conn) {
		asked <- path
		if _, err := io.WriteString(c, streamHead); err == nil {
			<-quit
		}
	})
	count := map[string]int{}
	for count["/raft/stream/msgapp/1"] < 2 || count["/raft/stream/message/1"] < 2 {
		select {
		case p := <-asked:
			count[p]++
		case <-time.After(20 * time.Second):
			t.Fatalf("asked %v", count)
		}
	}
}

func marshalJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
