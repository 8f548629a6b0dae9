package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"pontoon/api"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/protobuf/proto"
)

// Changing the cluster while it runs: members come, go and move, and leadership
// is handed over. The rules are in member.go; here is what carries them out.

// confProposal is one membership change on its way. raft may drop it without a
// word, so the loop proposes it again until ctx ends; applying it twice
// changes nothing.
type confProposal struct {
	ctx    context.Context
	change memberChange
	tried  uint64      // tick of the last attempt, 0: none
	sent   atomic.Bool // given to raft, or about to be: its outcome is open
	done   chan error  // capacity 1
}

type confResult struct {
	index   uint64
	change  memberChange
	members *membership // after it
	err     error       // refused: nothing changed
}

// proposeConf proposes the oldest waiting membership change: one at a time.
func (n *raftNode) proposeConf() {
	for len(n.confQueue) > 0 && n.confQueue[0].ctx.Err() != nil {
		n.confQueue = n.confQueue[1:]
	}
	if len(n.confQueue) == 0 || !n.hasLeader() {
		return
	}
	c := n.confQueue[0]
	if c.tried != 0 && n.ticks-c.tried < 5 {
		return
	}
	if _, err := n.members.Load().apply(c.change); err != nil {
		n.finishConf(c.change, err)
		return
	}
	cc, err := c.change.confChange()
	if err != nil {
		n.finishConf(c.change, err)
		return
	}
	c.sent.Store(true)
	if c.ctx.Err() != nil {
		return // the caller may have looked at sent before
	}
	c.tried = max(n.ticks, 1)
	if err := n.raw.ProposeConfChange(cc); err != nil {
		n.dropped = true
	}
}

// finishConf answers the proposer of a membership change, if it is ours.
func (n *raftNode) finishConf(change memberChange, err error) {
	for i, c := range n.confQueue {
		if c.change.Request == change.Request {
			n.confQueue = slices.Delete(n.confQueue, i, i+1)
			c.done <- err
			return
		}
	}
}

// applyConf carries out a committed membership change, or refuses it, on every
// member alike. raft is told only of what the table accepted.
func (n *raftNode) applyConf(e *raftpb.Entry) confResult {
	res := confResult{index: e.GetIndex(), members: n.members.Load()}
	var cc raftpb.ConfChangeV2
	if e.GetType() != raftpb.EntryConfChangeV2 {
		res.err = fmt.Errorf("%w: entry type %v", errUnsupported, e.GetType())
	} else if err := proto.Unmarshal(e.GetData(), &cc); err != nil {
		res.err = fmt.Errorf("%w: membership change: %v", errBadRequest, err)
	} else if res.change, res.err = decodeConfChange(&cc); res.err == nil {
		var next *membership
		if next, res.err = n.members.Load().apply(res.change); res.err == nil {
			n.raw.ApplyConfChange(&cc)
			res.members = next
			n.setMembers(next)
			n.reconnect(e.GetIndex(), res.change)
			n.log.Log(n.newsLevel(e.GetIndex(), res.change), "membership changed", zap.String("change", string(res.change.Op)),
				zap.Uint64("changed_member", res.change.Member.ID), zap.Strings("url", res.change.Member.PeerURLs))
		}
	}
	if res.change.Node == n.id {
		n.mail.post(func() { n.finishConf(res.change, res.err) }) // after the apply loop has it queued
	}
	return res
}

func (n *raftNode) setMembers(m *membership) { n.members.Store(m) }

// newsLevel keeps housekeeping, and what a restart only replays, out of the log
// of a normal day.
func (n *raftNode) newsLevel(index uint64, c memberChange) zapcore.Level {
	if c.Op == opStarted || index <= n.replayed {
		return zapcore.DebugLevel
	}
	return zapcore.InfoLevel
}

// reconnect follows one membership change, the entry at index, with the transport.
func (n *raftNode) reconnect(index uint64, c memberChange) {
	id := c.Member.ID
	switch {
	case c.Op == opRemove && id == n.id:
		// Let what is under way leave first: the others learn of the commit
		// that removed us from our own message.
		at := n.ticks + 3
		n.mail.at(func() bool {
			if n.ticks < at {
				return false
			}
			n.removed = fmt.Errorf("%w: member %d was removed by a membership change", errRemoved, id)
			return true
		})
	case id == n.id:
		// A replay passes over former addresses; that the last is ours was seen at the start (checkCluster).
		if index > n.replayed && c.Op == opUpdate && len(c.Member.PeerURLs) > 0 && !slices.Contains(c.Member.PeerURLs, n.cfg.peerURL()) {
			n.log.Warn("this member was moved: restart it with its new URL in --cluster", zap.Strings("url", c.Member.PeerURLs), zap.String("now", n.cfg.peerURL()))
		}
	case c.Op == opAdd:
		n.tr.AddPeer(types.ID(id), c.Member.PeerURLs)
		n.tr.UpdatePeer(types.ID(id), c.Member.PeerURLs) // of a stranger, see meet
	case c.Op == opRemove:
		n.leaving[id] = n.ticks + 3 // time for the removed member to hear of it
		delete(n.lastSeen, id)
		delete(n.answered, id)
		delete(n.acked, id)
	case c.Op == opUpdate && len(c.Member.PeerURLs) > 0:
		n.tr.UpdatePeer(types.ID(id), c.Member.PeerURLs)
	}
}

// connectPeers makes the transport know the whole table: at start and after a
// snapshot.
func (n *raftNode) connectPeers() {
	for _, m := range n.members.Load().Members {
		if m.ID != n.id {
			n.tr.AddPeer(types.ID(m.ID), m.PeerURLs) // does nothing for a known peer
			n.tr.UpdatePeer(types.ID(m.ID), m.PeerURLs)
		}
	}
	for _, id := range n.members.Load().Removed {
		n.tr.RemovePeer(types.ID(id))
	}
}

// tendMembers is the leader's housekeeping of the table, at most one proposal a
// tick: learners that caught up become voters, and members that hold entries are
// marked as started.
func (n *raftNode) tendMembers() {
	if n.now.state != raft.StateLeader {
		return
	}
	for _, m := range n.members.Load().Members {
		op := opStarted
		switch {
		case n.tended[m.ID] != 0 && n.ticks-n.tended[m.ID] < 10: // give the last proposal time
			continue
		case m.Learner && m.Promote && n.caughtUp(m.ID):
			op = opPromote
		case m.Started || !n.holdsEntries(m.ID):
			continue
		}
		n.tended[m.ID] = n.ticks
		c := memberChange{Version: memberChangeVersion, Op: op, Member: member{ID: m.ID}}
		if cc, err := c.confChange(); err != nil {
			n.log.Error("tend members", zap.Error(err))
		} else if err := n.raw.ProposeConfChange(cc); err != nil {
			n.log.Debug("tend members", zap.Uint64("member", m.ID), zap.Error(err))
		}
		return
	}
}

// holdsEntries: the member has acknowledged something that it did not found
// itself with.
func (n *raftNode) holdsEntries(id uint64) (ok bool) {
	if id == n.id {
		return true
	}
	n.raw.WithProgress(func(p uint64, _ raft.ProgressType, pr tracker.Progress) {
		if p == id {
			ok = pr.Match > 1
		}
	})
	return ok
}

// caughtUp is the leader's opinion of a follower.
func (n *raftNode) caughtUp(id uint64) (ok bool) {
	committed := n.raw.BasicStatus().GetCommit()
	n.raw.WithProgress(func(p uint64, _ raft.ProgressType, pr tracker.Progress) {
		if p == id {
			ok = pr.RecentActive && pr.State == tracker.StateReplicate && pr.Match+promoteLag >= committed
		}
	})
	return ok
}

// alive says whether a member was heard of lately and is connected. Only a
// leader hears from everybody, and a new one has not yet; connections notice at
// once when a process dies, but not when it hangs. What must not be wrong asks
// survives.
func (n *raftNode) alive(id uint64) bool {
	if id == n.id {
		return true
	}
	recent := uint64(2 * n.cfg.ElectionTicks)
	if n.now.state == raft.StateLeader && n.ticks-n.since > recent {
		if seen, ok := n.lastSeen[id]; !ok || n.ticks-seen > recent {
			return false
		}
	}
	return n.peerActive(id)
}

// survives says whether the voters that are left without member id could go on.
// Only a leader knows, and only of what it asks: it waits, for survivePatience at
// most, until enough of them have answered a heartbeat that left after the call.
func (n *raftNode) survives(ctx context.Context, id uint64) (leads bool, err error) {
	patience := time.NewTimer(n.cfg.survivePatience())
	defer patience.Stop()
	look := time.NewTicker(max(n.cfg.TickInterval/10, time.Millisecond))
	defer look.Stop()
	var term, asked uint64
	for {
		leads, risk := false, error(nil)
		if n.do(ctx, func() {
			if leads = n.now.state == raft.StateLeader; !leads {
				return
			}
			if term != n.now.term {
				term, asked = n.now.term, n.readSent
			}
			risk = n.members.Load().mayRemove(id, func(v uint64) bool { return v == n.id || n.answered[v] > asked })
		}) != nil {
			return false, errNotProposed // the closure may still run
		}
		if !leads || risk == nil {
			return leads, nil
		}
		n.reads.join() // its heartbeats are the question
		select {
		case <-look.C:
		case <-patience.C:
			return true, risk
		case <-ctx.Done():
			return true, risk
		case <-n.doneC:
			return false, errStopping
		}
	}
}

// survivePatience: a member that is silent for longer would not follow either. Ticks
// as short as those of tests do not make a busy machine faster.
func (c *Config) survivePatience() time.Duration {
	return max(c.electionTimeout(), 500*time.Millisecond)
}

// successor is the member that this leader would hand over to: the voter that
// is alive and furthest along. None if there is none or if we do not lead. It is
// not except, which may be 0.
func (n *raftNode) successor(except uint64) uint64 {
	if n.now.state != raft.StateLeader {
		return raft.None
	}
	best, match := raft.None, uint64(0)
	n.raw.WithProgress(func(id uint64, typ raft.ProgressType, pr tracker.Progress) {
		if id != n.id && id != except && typ == raft.ProgressTypePeer && n.alive(id) && n.peerActive(id) && (best == raft.None || pr.Match > match) {
			best, match = id, pr.Match
		}
	})
	return best
}

// nextRequest draws a number that names one membership change of this node.
func (n *raftNode) nextRequest() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return binary.LittleEndian.Uint64(b[:]) | 1
}

// peerActive says whether a connection to the peer stands.
func (n *raftNode) peerActive(id uint64) bool { return !n.tr.ActiveSince(types.ID(id)).IsZero() }

// changeMembers proposes a membership change and waits until this member has
// it. It first makes sure of an up-to-date table, so that a refusal is a fact.
func (s *kvstore) changeMembers(ctx context.Context, c memberChange, check func(*membership) error) error {
	if err := s.linearize(ctx); err != nil {
		return err
	}
	if check != nil {
		if err := check(s.node.members.Load()); err != nil {
			return err
		}
	}
	c.Version, c.Node, c.Request, c.Bounded = memberChangeVersion, s.node.id, s.node.nextRequest(), true
	p := &confProposal{ctx: ctx, change: c, done: make(chan error, 1)}
	select {
	case s.node.confChangeC <- p:
	case <-ctx.Done():
		return errMembershipInProgress
	case <-s.node.doneC:
		return errStopping
	}
	select {
	case err := <-p.done:
		return err
	case <-ctx.Done():
		if p.sent.Load() {
			return errCommitTimeout
		}
		return s.late()
	case <-s.node.doneC:
		return errCommitTimeout
	}
}

// addMember lets a new member in, as a learner that the leader promotes once it
// has caught up: a voter without data would only weaken the quorum.
func (s *kvstore) addMember(ctx context.Context, spec memberSpec) (api.Member, bool, error) {
	url, err := parseHTTPURL(spec.PeerURL)
	if err != nil {
		return api.Member{}, false, fmt.Errorf("%w: peer URL: %v", errBadRequest, err)
	}
	m := member{ID: spec.ID, PeerURLs: []string{url}, Learner: true, Promote: !spec.Learner}
	if m.ID == 0 {
		if err := s.linearize(ctx); err != nil {
			return api.Member{}, false, err
		}
		m.ID = s.node.members.Load().nextID()
	}
	err = s.changeMembers(ctx, memberChange{Op: opAdd, Member: m}, nil)
	for errors.Is(err, errMemberExists) && spec.ID == 0 {
		next := s.node.members.Load().nextID()
		if next == m.ID {
			break // it is not the id that is taken
		}
		m.ID = next
		err = s.changeMembers(ctx, memberChange{Op: opAdd, Member: m}, nil)
	}
	if errors.Is(err, errNoChange) {
		old, _ := s.node.members.Load().get(m.ID)
		return s.describe(old), false, nil
	}
	return s.describe(m), err == nil, err
}

// removeMember takes a member out. An absent id is no error: the caller's wish
// is fulfilled.
func (s *kvstore) removeMember(ctx context.Context, id uint64, force bool) error {
	check := func(*membership) error {
		if force {
			return nil
		}
		return s.mayRemove(ctx, id)
	}
	remove := memberChange{Op: opRemove, Member: member{ID: id}}
	if s.leader() == id {
		if err := check(nil); err != nil { // a refusal leaves the leader where it is
			return err
		}
		s.moveLeaderFrom(ctx, id)
	}
	return ignoreNoChange(s.changeMembers(ctx, remove, check))
}

// mayRemove refuses a removal that could cost the quorum, as the leader sees it.
func (s *kvstore) mayRemove(ctx context.Context, id uint64) error {
	for {
		changed := s.node.leaderChange()
		if leads, err := s.node.survives(ctx, id); leads || err != nil {
			return err
		}
		leader, ok := s.node.members.Load().get(s.leader())
		if ok && leader.ID != s.node.id {
			info, err := s.node.ask(ctx, leader, id)
			switch {
			case err == nil && info.Without == id && info.AtRisk != "":
				return fmt.Errorf("%w: %s", errQuorumAtRisk, info.AtRisk)
			case err == nil && info.Without == id:
				return nil
			case s.leader() == leader.ID:
				if err == nil {
					err = errors.New("it does not say; do all members run the same version?")
				}
				return fmt.Errorf("%w: the leader, member %d, cannot be asked who is alive: %v; send it the request", errQuorumAtRisk, leader.ID, err)
			}
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errNoLeader
		case <-s.node.doneC:
			return errStopping
		}
	}
}

// moveLeaderFrom spares the cluster the election that the removal of its leader
// would cost. It is a favour: the removal goes on without it.
func (s *kvstore) moveLeaderFrom(ctx context.Context, id uint64) {
	members := s.node.members.Load()
	if len(members.voters()) < 2 {
		return
	}
	if id == s.node.id {
		ctx, cancel := context.WithTimeout(ctx, s.cfg.electionTimeout())
		defer cancel()
		s.handOver(ctx)
	} else if self, ok := members.get(s.node.id); ok && !self.Learner {
		if err := s.transferLeader(ctx, s.node.id); err != nil {
			s.log.Debug("could not take leadership from the member to remove", zap.Error(err))
		}
	}
}

// updateMember moves a member to another peer URL.
func (s *kvstore) updateMember(ctx context.Context, id uint64, peerURL string) error {
	url, err := parseHTTPURL(peerURL)
	if err != nil {
		return fmt.Errorf("%w: peer URL: %v", errBadRequest, err)
	}
	return ignoreNoChange(s.changeMembers(ctx, memberChange{Op: opUpdate, Member: member{ID: id, PeerURLs: []string{url}}}, nil))
}

// promoteMember makes a voter of a learner that has caught up.
func (s *kvstore) promoteMember(ctx context.Context, id uint64) error {
	check := func(m *membership) error {
		x, ok := m.get(id)
		if !ok || !x.Learner {
			return nil // apply has the right error
		}
		ready, err := s.learnerReady(ctx, id)
		if err != nil {
			return err
		}
		if !ready {
			return fmt.Errorf("%w: member %d", errLearnerBehind, id)
		}
		return nil
	}
	return ignoreNoChange(s.changeMembers(ctx, memberChange{Op: opPromote, Member: member{ID: id}}, check))
}

// learnerReady asks the leader whether a learner has caught up: only it knows.
func (s *kvstore) learnerReady(ctx context.Context, id uint64) (ready bool, err error) {
	leads := false
	if err := s.node.do(ctx, func() {
		leads = s.node.now.state == raft.StateLeader
		ready = leads && s.node.caughtUp(id)
	}); err != nil || leads {
		return ready, err
	}
	leader, ok := s.node.members.Load().get(s.leader())
	if !ok {
		return false, errNoLeader
	}
	info, err := s.node.ask(ctx, leader, 0)
	if err != nil {
		return false, fmt.Errorf("%w: member %d: the leader cannot be asked: %v", errLearnerBehind, id, err)
	}
	return slices.Contains(info.CaughtUp, id), nil
}

func ignoreNoChange(err error) error {
	if errors.Is(err, errNoChange) {
		return nil
	}
	return err
}

// transferLeader moves leadership and returns once this member knows the new leader.
func (s *kvstore) transferLeader(ctx context.Context, to uint64) error {
	m, ok := s.node.members.Load().get(to)
	if !ok || m.Learner {
		return fmt.Errorf("%w: member %d is no voter", errTransferRefused, to)
	}
	if err := s.linearize(ctx); err != nil {
		return err
	}
	// raft takes no proposals while it waits for the target, so a target that
	// does not answer costs everybody an election time-out. A second attempt is
	// for one that still had a membership change to apply and could not campaign.
	for range 2 {
		if err := s.tryTransfer(ctx, to); !errors.Is(err, errTransferTimeout) || ctx.Err() != nil {
			return err
		}
	}
	return errTransferTimeout
}

func (s *kvstore) tryTransfer(ctx context.Context, to uint64) error {
	refused := false
	if err := s.node.do(ctx, func() {
		if refused = s.node.now.state == raft.StateLeader && to != s.node.id && !s.node.alive(to); !refused {
			s.node.raw.TransferLeader(to)
		}
	}); err != nil {
		return err
	}
	if refused {
		return fmt.Errorf("%w: member %d has not been heard of lately", errTransferRefused, to)
	}
	giveUp := time.NewTimer(time.Duration(s.cfg.ElectionTicks+1) * s.cfg.TickInterval)
	defer giveUp.Stop()
	for {
		changed := s.node.leaderChange()
		if s.leader() == to {
			return nil
		}
		select {
		case <-changed:
		case <-giveUp.C:
			return errTransferTimeout
		case <-ctx.Done():
			return errTransferTimeout
		case <-s.node.doneC:
			return errStopping
		}
	}
}

// handOver moves leadership away before this member stops, to the member that
// is furthest along, and returns once another leads. It tries once: a stop must
// not hang on a cluster that is going down as a whole.
func (s *kvstore) handOver(ctx context.Context) {
	for {
		changed := s.node.leaderChange()
		led := false
		err := s.node.do(ctx, func() {
			if to := s.node.successor(raft.None); to != raft.None {
				led = true
				s.node.raw.TransferLeader(to)
			}
		})
		if err != nil || !led {
			return
		}
		select {
		case <-changed:
			if l := s.leader(); l != raft.None && l != s.node.id {
				return
			}
		case <-ctx.Done():
			return
		case <-s.node.doneC:
			return
		}
	}
}
