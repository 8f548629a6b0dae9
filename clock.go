package main

import (
	"time"

	"go.etcd.io/raft/v3"
	"go.uber.org/zap"

	"pontoon/kv"
)

// Leases need a time that all members agree on and that never runs too fast. It
// is a number in the state, in milliseconds, which only entries of the log move:
// ticks, proposed by the leader while something can expire.
//
//	first tick of a term = clock of the last tick applied here + time since it was applied
//	tick after it        = clock of the leader's last tick + time since it made that
//
// The elapsed time is measured by the monotonic clock of one process, so no
// jump of a wall clock matters. It begins when the older tick was applied, or was
// made by this process itself, never before it was made; so each tick is at most as
// far ahead of the one before as real time is, and by induction of every tick before.
// While one member leads, its ticks are the time that it measures, whether or not they
// are applied yet, or ever: nothing is lost to the time that they take to commit, and
// a later one never reads less.
// The two other rules that make it so:
//
//   - a leader ticks only after it has applied an entry of its own term: then
//     every older tick is applied, or its own;
//   - a tick counts only in an entry of the term it was made in: a late one of
//     a former leader, forwarded to the present one, could be ahead.
//
// A lease begins to run at the first tick that was made after its grant was applied
// by the leader that made the tick (kv.Tick.Seen): a TTL is never early counted from
// when the leader had the write, and so from when it was sent. It gives a follower some
// time to apply the grant and to answer (seenAfter), and as that is all it gives, an
// answer that comes later than that, through a follower or a network that stood still,
// may find the TTL partly or wholly over. Every member measures from when it applied
// the last tick, so a new leader goes on where the old one was, and as a rule the time
// of an election is not lost: only what its own last tick was late by, or a restart.

// clock is what the loop must know to tick. The apply loop publishes it.
type clock struct {
	term      uint64    // of the last entry applied
	applied   uint64    // its index
	reads     int64     // kv.State.Clock
	at        time.Time // when it was set
	unstarted bool      // something waits for its first tick
	next      int64     // the earliest deadline known, 0: none
	active    bool      // something can expire
}

// read is the clock extrapolated to the time now.
func (c *clock) read(now time.Time) int64 { return c.reads + now.Sub(c.at).Milliseconds() }

// ownTick is a tick that this member has proposed.
type ownTick struct {
	term  uint64
	reads int64     // what it sets the clock to
	made  time.Time // when
}

// readClock is what the next tick of this leader sets the clock to.
func (n *raftNode) readClock(c *clock, now time.Time) int64 {
	if own := &n.ownTick; own.term == n.now.term {
		return max(c.read(now), own.reads+now.Sub(own.made).Milliseconds())
	}
	return c.read(now)
}

// publishClock tells the loop what the state's clock is needed for. It runs
// on the apply loop, before anybody learns that the entries are applied.
func (s *kvstore) publishClock() {
	s.mu.RLock()
	st := s.mu.state
	c := clock{term: s.term, applied: st.Applied(), reads: st.Clock(), active: st.Leases()+st.Kept() > 0}
	if c.active {
		c.unstarted, c.next = st.Pending()
	}
	s.mu.RUnlock()
	old := s.node.clock.Load()
	if old != nil && !old.active && !c.active && old.term == c.term && old.reads == c.reads {
		return // a store without leases pays nothing
	}
	c.at = s.node.time()
	if old != nil && old.reads == c.reads {
		c.at = old.at
	}
	s.node.clock.Store(&c)
	if c.next != 0 && c.next <= c.reads { // one tick ends a bounded number of keys; there are more
		s.node.mail.post(s.node.proposeTick)
	}
}

// proposeTick proposes to move the clock if this member leads and something
// asks for it. Nobody waits for the outcome: a tick that is lost is late, and
// the next one makes up for it.
func (n *raftNode) proposeTick() {
	c := n.clock.Load()
	if c == nil || !c.active || standing(n.standing.Load()) != agrees || n.now.state != raft.StateLeader || c.term != n.now.term || !n.hasLeader() {
		return
	}
	at := n.time()
	now, since := n.readClock(c, at), at.Sub(n.tickSent)
	switch {
	case c.next != 0 && c.next <= now && (c.next <= c.reads || since >= n.cfg.TickInterval):
	case c.unstarted && since >= 2*n.cfg.TickInterval:
	case since >= 5*n.cfg.TickInterval:
	default:
		return
	}
	if !n.stillLeads() {
		return
	}
	n.tickSent = at
	n.ownTick = ownTick{n.now.term, now, at}
	tick := kv.AppendCommand(nil, &kv.Command{Op: kv.OpTick,
		Tick: kv.Tick{Clock: now, Wall: n.tickSent.UnixMilli(), Seen: n.seen[0], Term: n.now.term}})
	// Without an identity: it is never proposed again, and applies at once.
	if err := n.raw.Propose(kv.AppendBatch(nil, 0, 0, 0, tick)); err != nil {
		n.log.Debug("tick not proposed", zap.Error(err))
	}
}

// stillLeads says whether this member leads at this moment. n.now is of the last Ready: a
// message since then may have ended it, and what only a leader proposes would be
// forwarded to its successor, which refuses it.
func (n *raftNode) stillLeads() bool { return n.raw.BasicStatus().RaftState == raft.StateLeader }

// noteSeen keeps what was applied seenAfter ago and more, as a rule one tick of raft:
// by then a follower that is not held up has applied it too, and answered its client.
func (n *raftNode) noteSeen() {
	now := n.time()
	if c := n.clock.Load(); c != nil && now.Sub(n.seenAt) >= n.seenAfter() {
		n.seen[0], n.seen[1], n.seenAt = n.seen[1], c.applied, now
	}
}

// seenAfter is shorter than a tick of raft, which may come somewhat early, and holds
// where the loop was held up: then the next tick follows at once.
func (n *raftNode) seenAfter() time.Duration { return n.cfg.TickInterval * 3 / 4 }

// mayTick refuses a batch with a tick that was made in another term than the
// entry it arrived in, on every member alike.
func mayTick(b *kv.Batch, term uint64) bool {
	for i := range b.Commands {
		if c := &b.Commands[i]; c.Op == kv.OpTick && c.Tick.Term != term {
			return false
		}
	}
	return true
}
