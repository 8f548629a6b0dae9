package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"google.golang.org/protobuf/proto"

	"pontoon/kv"
)

// A cluster of real nodes on real disks, joined by a network in memory: what
// differs from production is the transport and the length of a tick.

// testTick makes elections quick. -race on two busy cores still keeps up.
const testTick = 10 * time.Millisecond

type cluster struct {
	t       *testing.T
	dir     string
	table   []clusterURL
	nodes   map[uint64]*testNode
	change  func(*Config)
	net     *memnet
	logger  *zap.Logger
	timeout time.Duration

	// tamper stands for a fault in one member: what its apply loop gets of an entry
	// is what tamper returns. nil: none. Then members must never differ.
	tamper func(id uint64, e *raftpb.Entry) *raftpb.Entry
	differ bool // a test of members that do
}

type testNode struct {
	id    uint64
	c     *cluster
	cfg   Config
	disk  *diskStore
	node  *raftNode
	store *kvstore
	loop  chan error    // what serveChannels returned
	apply chan struct{} // closed when readCommits returned
	told  chan struct{} // holds one once a peer said that this member was removed

	stopWatches func()
}

// newCluster starts n founding members.
func newCluster(t *testing.T, n int, change func(*Config)) *cluster {
	t.Helper()
	c := makeCluster(t, change)
	c.startAll(n)
	return c
}

// makeCluster is newCluster before anything runs.
func makeCluster(t *testing.T, change func(*Config)) *cluster {
	return &cluster{t: t, dir: t.TempDir(), nodes: map[uint64]*testNode{}, change: change, net: newMemnet(),
		logger: zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel)), timeout: 20 * time.Second}
}

func (c *cluster) startAll(n int) {
	c.t.Helper()
	for i := range n {
		c.table = append(c.table, clusterURL{uint64(i + 1), fmt.Sprintf("http://127.0.0.1:%d", 10001+i)})
	}
	for _, m := range c.table {
		c.start(m.ID)
	}
	c.campaign()
	c.t.Cleanup(func() {
		for _, id := range slices.Sorted(maps.Keys(c.nodes)) {
			c.stop(id)
		}
	})
}

// campaign lets any member stand for the first election at once. All later ones
// come as they do in production, once a leader is missed.
func (c *cluster) campaign() {
	c.t.Helper()
	n := c.nodes[c.table[rand.IntN(len(c.table))].ID]
	if err := n.node.do(c.ctx(), func() { n.node.warn("campaign", n.node.raw.Campaign()) }); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) config(id uint64) Config {
	cfg := defaultConfig()
	cfg.ID, cfg.Cluster, cfg.TickInterval = id, c.table, testTick
	cfg.DataDir = filepath.Join(c.dir, fmt.Sprint(id))
	if c.change != nil {
		c.change(&cfg)
	}
	return cfg
}

// start runs member id from its data directory, which it founds if it is empty.
func (c *cluster) start(id uint64) *testNode { return c.startWith(id, nil) }

// startWith lets a test put something between the node and its disk.
func (c *cluster) startWith(id uint64, wrap func(*diskStore) logStore) *testNode {
	c.t.Helper()
	n, err := c.tryStart(id, wrap)
	if err != nil {
		c.t.Fatalf("start member %d: %v", id, err)
	}
	return n
}

func (c *cluster) tryStart(id uint64, wrap func(*diskStore) logStore) (*testNode, error) {
	n := &testNode{id: id, c: c, cfg: c.config(id), loop: make(chan error, 1), apply: make(chan struct{}), told: make(chan struct{}, 1)}
	disk, err := openDataDir(n.cfg.DataDir, id, n.cfg.KeepSnapshots, c.logger)
	if err != nil {
		return nil, err
	}
	n.disk = disk
	founders := bootstrapMembership("test", c.table)
	if !disk.exists() {
		table, joined := founders, false
		if other := c.any(); other != nil && other.node.members.Load().index(id) >= 0 && founders.index(id) < 0 {
			table, joined = other.node.members.Load(), true
		}
		if err := disk.bootstrap(id, table, joined); err != nil {
			return nil, errors.Join(err, disk.close())
		}
	}
	r, err := disk.loadOrStandAside(func() *membership {
		if other := c.any(); other != nil {
			return other.node.members.Load()
		}
		return disk.salvageTable()
	})
	if err != nil {
		return nil, errors.Join(err, disk.close())
	}
	boot, err := disk.nextBoot()
	if err != nil {
		return nil, errors.Join(err, disk.close())
	}
	var store logStore = disk
	if wrap != nil {
		store = wrap(disk)
	}
	if n.node, err = newRaftNode(n.cfg, boot, r, store, disk, c.logger, newNodeMetrics(prometheus.NewRegistry())); err != nil {
		return nil, errors.Join(err, disk.close())
	}
	n.node.tr = c.net.attach(n)
	n.node.ask = func(ctx context.Context, m member, without uint64) (*clusterInfo, error) {
		end := c.net.route(id, m.ID, &raftpb.Message{})
		if end == nil {
			return nil, errors.New("unreachable")
		}
		return end.n.node.clusterInfo(ctx, without), nil
	}
	n.store = newKVStore(n.node, r, disk)
	if r.snap.Index == 0 { // a joiner knows its peers from whoever let it in
		peers := founders
		if other := c.any(); other != nil {
			peers = other.node.members.Load()
		}
		for _, m := range peers.Members {
			n.node.tr.AddPeer(types.ID(m.ID), m.PeerURLs)
		}
	}
	go func() { n.loop <- n.node.serveChannels() }()
	go func() { n.store.readCommits(c.commits(n)); close(n.apply) }()
	ctx, cancel := context.WithCancel(context.Background())
	n.stopWatches = cancel
	go n.store.dispatch(ctx)
	c.nodes[id] = n
	return n, nil
}

// stop ends a member in good order; crash leaves its log as it is.
func (c *cluster) stop(id uint64) error {
	n := c.nodes[id]
	if n == nil {
		return nil
	}
	delete(c.nodes, id)
	c.net.detach(id)
	n.stopWatches()
	n.node.stop()
	<-n.apply
	if st := n.store.standing(); st != agrees && !c.differ {
		c.t.Errorf("member %d thinks that its state differs: %v", id, st)
	}
	err := <-n.loop
	if cerr := n.disk.close(); cerr != nil && err == nil {
		err = cerr
	}
	return err
}

// commits is what the member's apply loop reads.
func (c *cluster) commits(n *testNode) <-chan *commit {
	if c.tamper == nil {
		return n.node.commitC
	}
	out := make(chan *commit)
	go func() {
		defer close(out)
		for in := range n.node.commitC {
			changed := *in
			changed.entries = nil
			for _, e := range in.entries {
				changed.entries = append(changed.entries, c.tamper(n.id, e))
			}
			out <- &changed
		}
	}()
	return out
}

// any is some running member, nil if there is none.
func (c *cluster) any() *testNode {
	for _, id := range slices.Sorted(maps.Keys(c.nodes)) {
		return c.nodes[id]
	}
	return nil
}

func (c *cluster) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	c.t.Cleanup(cancel)
	return ctx
}

// leader waits until a running member leads that all running members follow.
func (c *cluster) leader() *testNode {
	c.t.Helper()
	var found *testNode
	c.wait("a leader", func() bool {
		found = nil
		for _, n := range c.nodes {
			l := c.nodes[n.store.leader()]
			if l == nil || found != nil && l != found {
				return false
			}
			found = l
		}
		return found != nil
	})
	return found
}

func (c *cluster) follower() *testNode {
	l := c.leader()
	for _, id := range slices.Sorted(maps.Keys(c.nodes)) {
		if id != l.id {
			return c.nodes[id]
		}
	}
	c.t.Fatal("no follower")
	return nil
}

// quiet waits until nothing is committed any more, as nobody writes: the last marks
// are, and all members have applied them.
func (c *cluster) quiet() {
	c.t.Helper()
	c.wait("silence in the log", func() bool {
		at := c.leader().node.progress.committed.Load()
		for _, n := range c.nodes {
			// In this order: what n has to propose is published before what it has applied.
			if n.store.applied.At() != at {
				return false
			}
			if t := n.node.testimony.Load(); t != nil && t.wanted {
				return false
			}
		}
		return true
	})
}

// wait polls for a condition that no channel announces.
func (c *cluster) wait(what string, ok func() bool) {
	c.t.Helper()
	waitFor(c.t, what, ok)
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	poll := time.NewTicker(2 * time.Millisecond)
	defer poll.Stop()
	for !ok() {
		select {
		case <-poll.C:
		case <-deadline.C:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

func (s *kvstore) put(ctx context.Context, key string, value []byte) (kv.Result, error) {
	return s.propose(ctx, &kv.Command{Op: kv.OpPut, Key: key, Value: value})
}

func (s *kvstore) delete(ctx context.Context, key string) (kv.Result, error) {
	return s.propose(ctx, &kv.Command{Op: kv.OpDelete, Key: key})
}

func (n *testNode) mustPut(key, value string) {
	n.c.t.Helper()
	if _, err := n.store.put(n.c.ctx(), key, []byte(value)); err != nil {
		n.c.t.Fatalf("put %q on member %d: %v", key, n.id, err)
	}
}

func (n *testNode) mustGet(key, want string) {
	n.c.t.Helper()
	e, _, err := n.store.get(n.c.ctx(), key, readOptions{})
	if err != nil || string(e.Value) != want {
		n.c.t.Fatalf("get %q on member %d: %q, %v; want %q", key, n.id, e.Value, err, want)
	}
}

// check holds the state of every running member against its own rules, and the
// members against each other once they have applied the same entry.
func (c *cluster) check() {
	c.t.Helper()
	l := c.leader()
	l.mustPut("check", "check")
	target := l.store.applied.At()
	var hash uint64
	for _, id := range slices.Sorted(maps.Keys(c.nodes)) {
		n := c.nodes[id]
		<-n.store.applied.Wait(target)
		n.store.mu.RLock()
		err, at, h := n.store.mu.state.Check(), n.store.mu.state.Applied(), n.store.mu.state.Hash()
		n.store.mu.RUnlock()
		if err != nil {
			c.t.Fatalf("member %d: %v", id, err)
		}
		if at != target {
			continue // something else was committed meanwhile
		}
		if hash != 0 && h != hash {
			c.t.Fatalf("member %d differs from the others at entry %d", id, at)
		}
		hash = h
	}
}

// memnet delivers messages between the members of one test. Each member has
// one queue in and one goroutine that empties it; a full queue drops, like the
// real transport.
type memnet struct {
	mu struct {
		sync.Mutex
		ends map[uint64]*memEnd
		cut  map[[2]uint64]bool
		drop func(*raftpb.Message) bool
	}
}

type memEnd struct {
	net   *memnet
	n     *testNode
	in    chan *raftpb.Message
	peers sync.Map // id → true
	quit  chan struct{}
	done  chan struct{}
}

func newMemnet() *memnet {
	m := &memnet{}
	m.mu.ends, m.mu.cut = map[uint64]*memEnd{}, map[[2]uint64]bool{}
	return m
}

func (m *memnet) attach(n *testNode) *memEnd {
	e := &memEnd{net: m, n: n, in: make(chan *raftpb.Message, 4096), quit: make(chan struct{}), done: make(chan struct{})}
	m.mu.Lock()
	m.mu.ends[n.id] = e
	m.mu.Unlock()
	go func() {
		defer close(e.done)
		for {
			select {
			case msg := <-e.in:
				if err := n.node.Process(context.Background(), msg); err != nil {
					n.c.logger.Warn("refused", zap.Error(err))
				}
				if n.node.IsIDRemoved(msg.GetFrom()) {
					m.tellRemoved(msg.GetFrom())
				}
			case <-e.quit:
				return
			}
		}
	}()
	return e
}

// tellRemoved is what status 410 of the peer port says to a member that did not
// get its own removal before its connections went.
func (m *memnet) tellRemoved(id uint64) {
	m.mu.Lock()
	e := m.mu.ends[id]
	m.mu.Unlock()
	if e == nil {
		return
	}
	select {
	case e.n.told <- struct{}{}:
	default:
	}
}

func (m *memnet) detach(id uint64) {
	m.mu.Lock()
	e := m.mu.ends[id]
	delete(m.mu.ends, id)
	m.mu.Unlock()
	if e != nil {
		close(e.quit)
		<-e.done
	}
}

// partition cuts, or joins again, both directions between two members.
func (m *memnet) partition(a, b uint64, cut bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.cut[[2]uint64{a, b}], m.mu.cut[[2]uint64{b, a}] = cut, cut
}

// isolate cuts a member off from all others.
func (c *cluster) isolate(id uint64, cut bool) {
	for other := range c.nodes {
		if other != id {
			c.net.partition(id, other, cut)
		}
	}
}

// dropIf loses every message for which f holds; nil loses none.
func (m *memnet) dropIf(f func(*raftpb.Message) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.drop = f
}

func (m *memnet) route(from, to uint64, msg *raftpb.Message) *memEnd {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.cut[[2]uint64{from, to}] || m.mu.drop != nil && m.mu.drop(msg) {
		return nil
	}
	return m.mu.ends[to]
}

func (e *memEnd) Send(ms []*raftpb.Message) {
	for _, msg := range ms {
		to := msg.GetTo()
		if _, known := e.peers.Load(to); !known {
			continue
		}
		end := e.net.route(e.n.id, to, msg)
		if end == nil {
			e.n.node.ReportUnreachable(to)
			continue
		}
		// The wire copies; sharing would hide a write after send.
		select {
		case end.in <- proto.Clone(msg).(*raftpb.Message):
		default:
			e.n.node.ReportUnreachable(to)
		}
	}
}

func (e *memEnd) SendSnapshot(m *snap.Message) {
	to := m.GetTo()
	end := e.net.route(e.n.id, to, m.Message)
	go func() {
		err := errors.New("unreachable")
		if end != nil {
			err = end.n.disk.receiveSnapshot(m.Snapshot.GetMetadata().GetIndex(), m.ReadCloser, func(h snapHeader) error { return end.n.node.snapshotFits(m.Message, h) })
			if err == nil {
				err = end.n.node.Process(context.Background(), proto.Clone(m.Message).(*raftpb.Message))
			}
		}
		m.CloseWithError(err)
		status := raft.SnapshotFinish
		if err != nil {
			status = raft.SnapshotFailure
		}
		e.n.node.ReportSnapshot(to, status)
	}()
}

func (e *memEnd) AddPeer(id types.ID, _ []string)    { e.peers.Store(uint64(id), true) }
func (e *memEnd) RemovePeer(id types.ID)             { e.peers.Delete(uint64(id)) }
func (e *memEnd) UpdatePeer(id types.ID, _ []string) {}
func (e *memEnd) Stop()                              {}
func (e *memEnd) ActiveSince(id types.ID) time.Time {
	if e.net.route(e.n.id, uint64(id), &raftpb.Message{}) != nil {
		return time.Unix(1, 0)
	}
	return time.Time{}
}
