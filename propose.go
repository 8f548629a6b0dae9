package main

import (
	"slices"
	"sync"
	"sync/atomic"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"pontoon/kv"
)

// The loop's side of a write: commands gather in a queue, leave as batches, and
// are proposed again if leadership moves before their fate is known. The
// handler's side is kvstore.propose.

// proposal is one command on its way from a handler to raft and back.
//
// state decides what a handler that gives up may say. Only the loop moves
// queued → proposed, and back if raft did not take it. The handler moves either
// to abandoned, the loop only what is queued; whichever swap comes first wins, so
// "queued" at the handler's swap proves that the command never reached raft and
// never will.
type proposal struct {
	command []byte
	since   uint64 // tick of arrival
	state   atomic.Int32
	result  kv.Result
	err     error
	done    chan struct{} // capacity 1, one send a use
}

const (
	queued int32 = iota
	proposed
	abandoned
)

func (p *proposal) finish(r kv.Result, err error) {
	p.result, p.err = r, err
	p.done <- struct{}{}
}

func (n *raftNode) enqueue(p *proposal) {
	p.since = n.ticks
	n.offered.Add(-int64(len(p.command)))
	n.queue = append(n.queue, p)
}

// mayPropose says that what waits may go to raft now.
func (n *raftNode) mayPropose() bool { return n.hasLeader() && !n.gathers() }

// hasLeader: raft drops proposals that have nowhere to go. Keep them instead:
// most gaps in leadership are a few milliseconds.
func (n *raftNode) hasLeader() bool { return n.now.lead != raft.None && !n.dropped }

// propose packs what waits into log entries, one as a rule. On a follower,
// raft forwards them to the leader.
func (n *raftNode) propose() {
	if !n.mayPropose() {
		return
	}
	for len(n.held) > 0 && n.hasLeader() {
		n.proposedAt = n.ticks
		m := n.held[0]
		n.held = n.held[1:]
		n.heldBytes -= entryBytes(m.GetEntries())
		n.give(m)
	}
	for len(n.queue) > 0 && n.hasLeader() && n.mayHaveInFlight() {
		b := n.nextBatch()
		if b == nil {
			return
		}
		n.proposedAt = n.ticks
		n.inflight.add(b)
		n.appended = false
		if err := n.proposeBatch(b); err != nil {
			n.inflight.take(b.seq)
			n.requeue(b)
			n.dropped = true
		}
	}
}

func (n *raftNode) proposeBatch(b *batch) error {
	b.tried, b.epoch = n.ticks, n.now
	err := n.raw.Propose(b.data)
	if err == nil {
		n.met.batchCommands.Observe(float64(len(b.proposals)))
	}
	return err
}

// nextBatch claims commands from the queue until the batch is full. Commands
// whose handler has given up are dropped: it has already said so.
func (n *raftNode) nextBatch() *batch {
	b := &batch{}
	var commands [][]byte
	size, i := 0, 0
	for ; i < len(n.queue) && len(commands) < maxBatchCommands; i++ {
		p := n.queue[i]
		if len(commands) > 0 && size+len(p.command) > maxBatchBytes {
			break
		}
		if p.state.CompareAndSwap(queued, proposed) {
			commands = append(commands, p.command)
			b.proposals = append(b.proposals, p)
			size += len(p.command)
		}
	}
	n.queue = slices.Delete(n.queue, 0, i)
	if len(commands) == 0 {
		return nil
	}
	n.seq++
	b.seq = n.seq
	b.data = kv.AppendBatch(make([]byte, 0, size+64), n.id, n.boot, b.seq, commands...)
	return b
}

// requeue puts commands back that raft did not take.
func (n *raftNode) requeue(b *batch) {
	var back []*proposal
	for _, p := range b.proposals {
		if p.state.CompareAndSwap(proposed, queued) {
			back = append(back, p)
		}
	}
	n.queue = append(back, n.queue...)
}

// repropose sends batches again whose fate is open: the leader they went to is
// gone, or has been silent about them for ten ticks. kv's replay window makes
// a batch that did survive apply once (see kv.Batch).
func (n *raftNode) repropose() {
	if !n.hasLeader() {
		return
	}
	for _, b := range n.inflight.open() {
		sameLeader := b.epoch.lead == n.now.lead && b.epoch.term == n.now.term
		if sameLeader && (n.now.lead == n.id || n.ticks-b.tried < 10) {
			continue
		}
		if !b.awaited() {
			n.inflight.take(b.seq)
			continue
		}
		n.met.reproposed.Inc()
		if err := n.proposeBatch(b); err != nil {
			n.dropped = true
			return
		}
	}
}

// hold parks a forwarded proposal: its proposer would hear nothing. Beyond
// the bound it is dropped, and proposed again by its node after ten ticks.
func (n *raftNode) hold(m *raftpb.Message) {
	if size := entryBytes(m.GetEntries()); len(n.held) < maxHeldProposals && n.heldBytes+size <= maxUncommitted {
		n.held = append(n.held, m)
		n.heldBytes += size
	} else {
		n.met.droppedMessages.Inc()
	}
}

// expire refuses what has waited one election time-out without a leader. It
// never reached raft, so the answer is certain.
func (n *raftNode) expire() {
	n.queue = slices.DeleteFunc(n.queue, func(p *proposal) bool { return p.state.Load() == abandoned }) // its handler has left
	if n.now.lead != raft.None {
		return
	}
	old := func(since uint64) bool { return n.ticks-since > uint64(2*n.cfg.ElectionTicks) }
	n.queue = slices.DeleteFunc(n.queue, func(p *proposal) bool {
		if !old(p.since) {
			return false
		}
		if p.state.CompareAndSwap(queued, abandoned) {
			p.finish(kv.Result{}, errNoLeader)
		}
		return true
	})
	n.reads.expire(func(b *readBatch) bool { return old(b.since) }, errNoLeader)
}

// batch is one own log entry between proposal and apply.
type batch struct {
	seq       uint64
	data      []byte
	proposals []*proposal
	tried     uint64 // tick of the last attempt
	epoch     soft   // leadership at the last attempt
}

// awaited says that some handler still waits for the batch.
func (b *batch) awaited() bool {
	return slices.ContainsFunc(b.proposals, func(p *proposal) bool { return p.state.Load() == proposed })
}

// inflight holds the own batches that raft was given and that are not applied
// yet. The raft loop adds and the apply loop takes.
type inflight struct {
	wake func() // called when room appears after there was none
	mu   struct {
		sync.Mutex
		batches map[uint64]*batch
		full    bool
	}
}

func (f *inflight) init(wake func()) {
	f.wake = wake
	f.mu.batches = map[uint64]*batch{}
}

// mayHaveInFlight says whether one more own batch may be proposed. A follower
// keeps to one, and to a second when an append has come since: that is when the
// leader takes the next. What is forwarded in between waits there anyway, and one
// larger batch costs all members less than many small ones.
func (n *raftNode) mayHaveInFlight() bool {
	limit := maxBatchesInFlight
	if n.now.state != raft.StateLeader {
		if limit = 1; n.appended {
			limit = maxForwardedBatches
		}
	}
	return n.inflight.room(n.seq+1, limit)
}

// room says whether a batch numbered seq may be proposed: there is a limit on
// their number, and the oldest open one must stay inside the replay window, or
// it could not be proposed again.
func (f *inflight) room(seq uint64, limit int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	ok := len(f.mu.batches) < limit
	if ok && len(f.mu.batches) > 0 && seq > kv.ReplayWindow/2 {
		for old := range f.mu.batches { // order: does not matter, any old one decides
			if old <= seq-kv.ReplayWindow/2 {
				ok = false
			}
		}
	}
	f.mu.full = !ok
	return ok
}

func (f *inflight) add(b *batch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.batches[b.seq] = b
}

// take removes a batch; nil if it is not there.
func (f *inflight) take(seq uint64) *batch {
	f.mu.Lock()
	b := f.mu.batches[seq]
	delete(f.mu.batches, seq)
	wake := f.mu.full
	f.mu.full = false
	f.mu.Unlock()
	if wake {
		f.wake()
	}
	return b
}

// open lists the batches, oldest first.
func (f *inflight) open() []*batch {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]*batch, 0, len(f.mu.batches))
	for _, b := range f.mu.batches { // order: sorted below
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b *batch) int { return compare(a.seq, b.seq) })
	return out
}

// campaignAlone has the only voter lead at once: nobody else could, so there is no
// election time-out to sit out. raft refuses, without a word, while a committed
// change of members waits to be applied.
func (n *raftNode) campaignAlone() {
	if m := n.members.Load().voters(); len(m) == 1 && m[0] == n.id && n.raw.BasicStatus().RaftState == raft.StateFollower {
		n.warn("campaign", n.raw.Campaign())
	}
}
