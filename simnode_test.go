package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"pontoon/internal/sim"
	"pontoon/kv"
)

const ms = time.Millisecond

// simMember is one member for good: its disk outlives its processes.
type simMember struct {
	w    *simWorld
	id   uint64
	disk *simDisk
	rate float64  // how fast its clocks run
	node *simNode // the running process; nil: it is down
	gone bool     // removed from the cluster: it never runs again
	lost bool     // its disk is damaged: it has to be replaced
}

// simNode is one process: a raftNode and a kvstore, run by the world instead of
// by goroutines of their own.
type simNode struct {
	m *simMember
	n *raftNode
	s *kvstore

	busy       time.Duration // the loop is in a call of the disk until then
	paused     time.Duration // all of the process stands still until then
	turning    bool          // a turn is in the queue
	applying   bool          // an apply is in the queue
	handing    bool          // a look of the dispatcher is in the queue
	next       uint64        // of the dispatcher
	peers      map[uint64]bool
	transfer   *simTransfer // the last one, until it has its callback
	waiting    []*simWait
	rest       []*commit // of commits that are applied in parts
	installing int       // snapshots on their way here
	diskFailed bool
}

// simWait is a handler that waits; poll says that it is done, end that its
// process is gone.
type simWait struct {
	poll func() bool
	end  func()
}

// at is the time for the loop of this process.
func (n *simNode) at() time.Duration { return max(n.m.w.q.Now(), n.busy) }

// clock is what the process reads: nothing in it may depend on when it was born.
func (n *simNode) clock() time.Time {
	return time.Unix(1_700_000_000, 0).Add(time.Duration(float64(n.at()) * n.m.rate))
}

// crashSignal unwinds the loop of a process that ends at this very place.
type crashSignal struct{ n *simNode }

// crashPoint is a place between two effects of the loop; a rare one is often times
// more dangerous than others.
func (w *simWorld) crashPoint(n *simNode, where string, often float64) {
	if !w.healed && w.faults.Chance(w.prof.crashAt*often) {
		w.mark("crash "+where, n.m)
		panic(crashSignal{n})
	}
}

// start runs a process on the member's disk.
func (w *simWorld) start(m *simMember) {
	r, err := m.disk.load()
	if err != nil {
		if !errors.Is(err, errRefuse) || len(m.disk.spoiled) == 0 {
			w.failf("member %d does not start: %v", m.id, err)
		}
		w.cover.Hit("load/refused")
		m.lost = true
		w.line(m.id, "refuses to start", 0, 0, 0, "")
		return
	}
	m.disk.boots++
	n := &simNode{m: m, peers: map[uint64]bool{}, busy: w.q.Now()}
	m.node = n
	n.n, err = newRaftNode(w.config(m.id), m.disk.boots, r, m.disk, m.disk, w.logger(m), newNodeMetrics(prometheus.NewRegistry()))
	if err != nil {
		w.failf("member %d: %v", m.id, err)
	}
	n.n.time, n.n.spawn, n.n.tr = n.clock, n.spawn, n
	n.n.ask = func(_ context.Context, to member, _ uint64) (*clusterInfo, error) {
		o := w.member(to.ID).node
		if o == nil || o.paused > w.q.Now() || w.net.IsCut(m.id, to.ID) || w.net.IsCut(to.ID, m.id) {
			return nil, errSimLost
		}
		w.cover.Hit("founder/asks")
		return &clusterInfo{Member: to.ID, Members: o.n.members.Load()}, nil
	}
	n.s = newKVStore(n.n, r, m.disk)
	n.s.write = func(h snapHeader, state *kv.State) { w.writeSnapshot(n, h, state) }
	if w.prof.watchQueue > 0 {
		n.s.hub.SetQueue(w.prof.watchQueue, 1<<20)
	}
	n.next = n.s.revision.At() + 1
	w.line(m.id, "start", r.snap.Index, r.hard.GetCommit(), m.disk.boots, "")
	w.checkHash(n)
	if r.snap.Index > 0 {
		w.checkTable(n, &r.snap)
	}
	if r.snap.Index == 0 { // a joiner knows its peers from whoever let it in
		for _, o := range w.members {
			n.peers[o.id] = true
		}
	}
	n.n.begin()
	w.history.eager(n)
	w.wake(n)
	interval := time.Duration(float64(n.n.cfg.TickInterval) / m.rate)
	w.q.After(w.faults.Between(0, interval), func() { w.tick(n, interval) })
	w.redial(n)
}

// redial: the transport tries again and again to reach its peers, and hears from
// them when its member was removed.
func (w *simWorld) redial(n *simNode) {
	w.q.After(w.faults.Between(100*ms, 2*time.Second), func() {
		if n.m.node != n {
			return
		}
		for _, o := range w.up() {
			if n.peers[o.id] && o.node.n.IsIDRemoved(n.m.id) && !w.net.IsCut(n.m.id, o.id) && o.node.paused <= w.q.Now() {
				w.tellRemoved(n, o.node)
			}
		}
		w.redial(n)
	})
}

// tick is the ticker of the loop: it holds one tick while the loop is busy and
// drops the others.
func (w *simWorld) tick(n *simNode, interval time.Duration) {
	if n.m.node != n {
		return
	}
	w.q.After(max(interval, n.until()-w.q.Now()), func() { w.tick(n, interval) })
	if n.until() > w.q.Now() {
		w.q.At(n.until(), func() { w.run(n, func() error { n.n.tick(); return n.n.turn() }) })
		return
	}
	w.run(n, func() error { n.n.tick(); return n.n.turn() })
}

func (n *simNode) until() time.Duration { return max(n.busy, n.paused) }

// wake has the loop turn soon.
func (w *simWorld) wake(n *simNode) {
	if n.turning || n.m.node != n {
		return
	}
	n.turning = true
	w.q.At(max(n.until(), w.q.Now()+w.faults.Between(0, ms/5)), func() { n.turning = false; w.run(n, n.n.turn) })
}

// run has the loop do f, unless it cannot now.
func (w *simWorld) run(n *simNode, f func() error) {
	switch {
	case n.m.node != n:
		return
	case n.until() > w.q.Now():
		w.q.At(n.until(), func() { w.run(n, f) })
		return
	case len(n.n.commitC) > commitQueue-4: // the loop would wait for the apply loop
		w.cover.Hit("apply/back-pressure")
		w.q.After(ms, func() { w.run(n, f) })
		return
	}
	defer func() {
		if p := recover(); p != nil {
			if c, ok := p.(crashSignal); ok && c.n == n {
				w.crash(n, w.faults.Chance(0.5))
				return
			}
			panic(p)
		}
	}()
	published := len(n.n.commitC)
	err := f()
	if err != nil {
		if !errors.Is(err, errDurability) || !n.diskEnded() && !n.m.disk.fileFailed {
			w.failf("member %d ends: %v", n.m.id, err)
		}
		w.line(n.m.id, "ends, its disk fails", 0, 0, 0, "")
		if len(n.n.commitC) > published && n.diskFailed {
			w.failf("member %d published commits after its disk had failed", n.m.id)
		}
		w.crash(n, true)
		if w.healed { // it was told late of what failed before
			w.restartAfterHeal(n.m)
		}
		return
	}
	if n.diskEnded() {
		w.failf("member %d goes on after its disk has failed", n.m.id)
	}
	w.checkLeader(n)
	if n.n.removed != nil {
		w.remove(n)
		return
	}
	if n.n.busy() || len(n.n.recvC) > 0 || len(n.n.proposeC) > 0 {
		w.wake(n)
	} else if d := n.n.wakeAfter(); d > 0 {
		w.cover.Hit("gather/others")
		w.q.After(time.Duration(float64(d)/n.m.rate)+1, func() { w.wake(n) })
	}
	w.applySoon(n)
	n.poll()
}

func (n *simNode) diskEnded() bool { return n.m.disk.failed }

// applySoon has the apply loop look at what was published.
func (w *simWorld) applySoon(n *simNode) {
	if n.applying || n.m.node != n || len(n.n.commitC)+len(n.rest)+len(n.n.snapReqC) == 0 {
		return
	}
	n.applying = true
	lag := w.prof.applyLag
	if w.sluggish(n) {
		lag = w.prof.sluggish
	}
	w.q.At(max(n.paused, w.q.Now())+w.faults.Between(0, lag), func() {
		n.applying = false
		if n.m.node != n {
			return
		}
		if n.paused <= w.q.Now() {
			w.apply(n)
		}
		w.applySoon(n)
	})
}

func (w *simWorld) sluggish(n *simNode) bool { return w.prof.sluggish > 0 && n.m.id%3 == 1 }

// beside is what other goroutines of the process may do while its loop waits
// for the disk.
func (w *simWorld) beside(n *simNode) {
	if w.sluggish(n) {
		return
	}
	for range w.faults.IntN(3) {
		w.apply(n)
	}
}

// apply is one turn of readCommits.
func (w *simWorld) apply(n *simNode) {
	if len(n.rest) == 0 { // not one select: it would draw between the two
		switch {
		case len(n.n.snapReqC) > 0:
			<-n.n.snapReqC
			n.s.snapshot()
			return
		case len(n.n.commitC) > 0:
			n.rest = w.parts(<-n.n.commitC)
		default:
			return
		}
	}
	c := n.rest[0]
	n.rest = n.rest[1:]
	w.checkConfs(n, c)
	if c.snapshot != nil {
		w.checkTable(n, c.snapshot)
		w.line(n.m.id, "load snapshot", c.snapshot.Index, c.snapshot.Term, 0, "")
	}
	before := n.s.applied.At()
	for _, e := range c.entries {
		w.checkEntry(n, e, before)
		before = e.GetIndex()
	}
	if err := n.s.apply(c); err != nil {
		w.failf("member %d: apply: %v", n.m.id, err)
	}
	if n.s.snapshotDue() {
		n.s.snapshot()
	}
	w.line(n.m.id, "apply", n.s.applied.At(), n.s.revision.At(), uint64(len(c.entries)), "")
	w.checkHash(n)
	w.seeState(n)
	w.wake(n)
	w.handOut(n)
	n.poll()
}

// parts cuts a commit into single entries: the state after each of them can
// then be compared between members.
func (w *simWorld) parts(c *commit) []*commit {
	if !w.prof.applySingly || len(c.entries) < 2 {
		return []*commit{c}
	}
	var parts []*commit
	if c.snapshot != nil {
		parts = append(parts, &commit{snapshot: c.snapshot})
	}
	for _, e := range c.entries {
		parts = append(parts, &commit{entries: []*raftpb.Entry{e}, confs: c.confs})
	}
	return parts
}

// handOut is the watch-dispatcher.
func (w *simWorld) handOut(n *simNode) {
	if n.handing || len(n.s.published) == 0 {
		return
	}
	n.handing = true
	w.q.After(w.faults.Between(0, w.prof.applyLag), func() {
		n.handing = false
		if n.m.node != n {
			return
		}
		select {
		case <-n.s.published:
			n.next = n.s.fanOut(n.next)
		default:
		}
		n.poll()
	})
}

// wait has poll asked after everything that happens in the process.
func (n *simNode) wait(poll func() bool, end func()) {
	n.waiting = append(n.waiting, &simWait{poll, end})
}

// poll asks who waits. What they do may add others.
func (n *simNode) poll() {
	if n.paused > n.m.w.q.Now() {
		return
	}
	asked := n.waiting
	n.waiting = nil
	var kept []*simWait
	for _, x := range asked {
		if !x.poll() {
			kept = append(kept, x)
		}
	}
	n.waiting = append(kept, n.waiting...)
}

// writeSnapshot is the snapshot-writer, step by step.
func (w *simWorld) writeSnapshot(n *simNode, h snapHeader, state *kv.State) {
	w.line(n.m.id, "begins a snapshot", h.Index, h.Term, 0, "")
	w.q.After(w.faults.Between(ms, w.prof.snapshotTakes), func() {
		if n.m.node != n {
			return
		}
		d := n.s.fileSnapshot(h, state)
		w.q.After(w.faults.Between(0, ms), func() {
			w.run(n, func() error {
				err := n.n.snapshotDone(d)
				if err != nil {
					return err
				}
				w.q.After(w.faults.Between(0, 5*ms), func() {
					if n.m.node == n {
						n.s.purge(<-d.purge)
						n.s.snapshotEnded(d.size)
						w.applySoon(n)
					}
				})
				return n.n.turn()
			})
		})
	})
}

// crash ends the process where it is.
func (w *simWorld) crash(n *simNode, power bool) {
	if n.m.node != n {
		return
	}
	n.m.node = nil
	lost := n.m.disk.crash(w.faults, power)
	w.line(n.m.id, "crash", uint64(lost), n.n.stable, n.n.now.term, "")
	if lost > 0 {
		w.cover.Hit("crash/loses records")
	}
	n.endWaits()
	if !w.healed {
		w.q.After(w.faults.Between(50*ms, w.prof.downFor), func() { w.restart(n.m) })
	}
}

func (w *simWorld) restart(m *simMember) {
	if m.node != nil || m.gone || m.lost {
		return
	}
	if len(m.disk.snaps) == 0 { // a joiner that was stopped before its first snapshot asks again (server.recover)
		for _, o := range w.up() {
			if err := mayJoin(o.node.n.members.Load(), w.config(m.id), simURL(o.id)); errors.Is(err, errRefuse) {
				w.cover.Hit("join/refused")
				m.gone = true
				return
			}
		}
	}
	w.start(m)
	if m.node != nil {
		w.mark("restart", m)
	}
}

// stop ends the process in good order.
func (w *simWorld) stop(n *simNode) {
	n.n.end()
	n.m.node = nil
	for c := range n.n.commitC {
		n.rest = append(n.rest, c)
	}
	for _, c := range n.rest {
		if err := n.s.apply(c); err != nil {
			w.failf("member %d: apply: %v", n.m.id, err)
		}
	}
	w.line(n.m.id, "stop", n.s.applied.At(), n.n.stable, n.n.now.term, "")
	n.paused = 0
	n.poll() // who got an answer has it
	n.endWaits()
}

func (n *simNode) endWaits() {
	waiting := n.waiting
	n.waiting = nil
	for _, x := range waiting {
		x.end()
	}
}

// remove ends the process of a member that is out of the cluster.
func (w *simWorld) remove(n *simNode) {
	n.m.gone = true
	w.cover.Hit("removed")
	w.stop(n)
}

// The transport.

var _ transport = (*simNode)(nil)

func (n *simNode) AddPeer(id types.ID, _ []string) { n.peers[uint64(id)] = true }
func (n *simNode) RemovePeer(id types.ID)          { delete(n.peers, uint64(id)) }
func (n *simNode) UpdatePeer(types.ID, []string)   {}
func (n *simNode) Stop()                           {}

func (n *simNode) ActiveSince(id types.ID) time.Time {
	o := n.m.w.member(uint64(id))
	if o == nil || o.node == nil || !n.peers[uint64(id)] || n.m.w.net.IsCut(n.m.id, o.id) || n.m.w.net.IsCut(o.id, n.m.id) {
		return time.Time{}
	}
	return time.Unix(1, 0)
}

func (n *simNode) Send(msgs []*raftpb.Message) {
	w := n.m.w
	if n.diskEnded() {
		w.failf("member %d sends after its disk has failed", n.m.id)
	}
	for _, m := range msgs {
		w.crashPoint(n, "between messages", 1)
		to := m.GetTo()
		if !n.peers[to] {
			continue
		}
		fate := w.net.Route(n.at(), n.m.id, to)
		w.trace.Add(sim.Line{At: n.at(), Who: n.m.id, What: m.GetType().String(), A: to, B: m.GetTerm(), C: m.GetIndex(), Text: w.describe(m, fate)})
		w.markFate(n, fate)
		if len(fate.Arrivals) == 0 && w.faults.Chance(0.5) {
			n.n.ReportUnreachable(to)
		}
		for _, at := range fate.Arrivals {
			copied := proto.Clone(m).(*raftpb.Message) // the wire copies; sharing would hide a write after send
			w.q.At(at, func() { w.deliver(n, to, copied) })
		}
	}
}

func (w *simWorld) markFate(n *simNode, f sim.Fate) {
	switch {
	case f.Dropped:
		w.mark("drop", n.m)
	case f.Duplicated:
		w.mark("duplicate", n.m)
	case f.Overtakes:
		w.mark("reorder", n.m)
	}
}

// describe is the part of a message that its numbers do not tell. Formatting
// costs more than all the rest of a run, so only the full trace has it.
func (w *simWorld) describe(m *raftpb.Message, f sim.Fate) string {
	if w.trace.All == nil {
		return ""
	}
	return fmt.Sprintf("%d entries from %d, commit %d, reject %v, context %x, arrives %v", len(m.GetEntries()), m.GetIndex()+1, m.GetCommit(), m.GetReject(), m.GetContext(), f.Arrivals)
}

// deliver hands a message to the process that runs there now.
func (w *simWorld) deliver(from *simNode, to uint64, m *raftpb.Message) {
	o := w.member(to)
	if o == nil || o.node == nil {
		return
	}
	n := o.node
	if n.paused > w.q.Now() {
		w.q.At(n.paused+w.faults.Between(0, ms), func() { w.deliver(from, to, m) })
		return
	}
	if !n.peers[from.m.id] && !w.net.IsCut(to, from.m.id) { // it has opened a connection for the answers
		n.n.meet(types.ID(from.m.id).String(), types.ID(n.n.members.Load().ClusterID).String())
	}
	if err := n.n.Process(context.Background(), m); err != nil {
		if n.n.IsIDRemoved(m.GetFrom()) {
			w.cover.Hit("removed/refused")
			if from.m.id == m.GetFrom() { // else it was passed on in the name of the removed one
				w.tellRemoved(from, n)
			}
			return
		}
		w.failf("member %d refuses %v of member %d: %v", to, m.GetType(), from.m.id, err)
	}
	w.wake(n)
}

// tellRemoved: the transport of the removed member learns of it and looks at a
// member table before it ends (server.confirmRemoval).
func (w *simWorld) tellRemoved(from, by *simNode) {
	if from.m.node != from || w.net.IsCut(by.m.id, from.m.id) || !by.n.members.Load().isRemoved(from.m.id) {
		return
	}
	w.q.After(w.faults.Between(ms, 20*ms), func() {
		if from.m.node == from {
			w.remove(from)
		}
	})
}

// simTransfer is a snapshot file on its way.
type simTransfer struct {
	m    *snap.Message
	sent func() // the snapshot-sent goroutine of the sender
}

func (n *simNode) spawn(f func()) {
	if n.transfer != nil {
		n.transfer.sent, n.transfer = f, nil
		return
	}
	f()
}

func (n *simNode) SendSnapshot(m *snap.Message) {
	w := n.m.w
	b, err := io.ReadAll(m.ReadCloser)
	if err != nil {
		w.failf("member %d: read a snapshot to send: %v", n.m.id, err)
	}
	t := &simTransfer{m: m}
	n.transfer = t
	to, index := m.GetTo(), m.GetSnapshot().GetMetadata().GetIndex()
	w.line(n.m.id, "sends a snapshot", to, index, uint64(len(b)), "")
	w.mark("sends a snapshot", n.m)
	if w.prof.spoilSent > 0 && !w.healed && w.faults.Chance(w.prof.spoilSent) {
		w.mark("snapshot spoiled on its way", n.m)
		b[w.faults.IntN(len(b))] ^= 1
	}
	if o := w.member(to); o != nil && o.node != nil {
		o.node.installing++
		there := o.node
		w.q.After(5*time.Second, func() { there.installing-- })
	}
	msg := proto.Clone(m.Message).(*raftpb.Message)
	w.q.At(n.at()+w.faults.Between(ms, w.prof.transferTakes), func() {
		err := w.receiveSnapshot(n, to, index, b, msg)
		if n.m.node != n {
			return
		}
		m.CloseWithError(err)
		t.sent()
		status := raft.SnapshotFinish
		if err != nil {
			status = raft.SnapshotFailure
			n.n.ReportUnreachable(to)
		}
		n.n.ReportSnapshot(to, status)
		w.wake(n)
	})
}

var errSimUnreachable = errors.New("unreachable")

// receiveSnapshot is what rafthttp does at the other end.
func (w *simWorld) receiveSnapshot(from *simNode, to, index uint64, b []byte, m *raftpb.Message) error {
	o := w.member(to)
	if o == nil || o.node == nil || w.net.IsCut(from.m.id, to) || !from.peers[to] {
		return errSimUnreachable
	}
	if free, _ := o.disk.freeBytes(); free < o.node.n.cfg.DiskReserve { // peerHandler
		w.mark("no room for a snapshot", o)
		return errDiskLow
	}
	if err := o.disk.receiveSnapshot(index, bytes.NewReader(b), func(h snapHeader) error { return o.node.n.snapshotFits(m, h) }); err != nil {
		w.mark("snapshot refused", o)
		return err
	}
	w.line(to, "receives a snapshot", from.m.id, index, 0, "")
	err := o.node.n.Process(context.Background(), m)
	w.wake(o.node)
	return err
}

// crc tells entries apart.
func crc(b []byte) uint64 { return uint64(crc32.Checksum(b, castagnoli)) }
