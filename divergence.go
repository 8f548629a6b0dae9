package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/raft/v3"
	"go.uber.org/zap"

	"pontoon/kv"
)

// Replicas that applied the same log must be equal. Where they are not (a bug, a bit
// that flipped) they are to be found out, not served.
//
// They compare through the log. While the state changes the leader proposes a mark
// every five ticks: an entry at which every member takes the digest of its state
// (kv.State.Mark). The next mark carries the leader's digest at the one before,
// so that it is compared where nobody waits for it:
//
//	… mark 1 … mark 2 (leader: at mark 1 I had d1) … mark 3 (at mark 2 I had d2) …
//
// A member with another digest cannot know which of the two is wrong, and neither can
// the leader. So it says its own, in the log too, and then everybody does. The rule:
//
//	a member serves as long as nobody contradicts it,
//	or a majority of the voters has its digest.
//
// Contradicted, it is in doubt: reads and writes wait until it is settled, which is
// one round through the log, as long as a majority of the voters is healthy and
// there. A member whose digest is not that of the majority has diverged. Without
// any majority (two voters, or two of three with the third one down) all who doubt
// wait on: one of two is wrong, and to guess is to serve wrong data half of the time.
// The missing member that comes back settles it, and so does the removal of one.
// All of this follows from the log, so it comes out the same on all members.
//
// A flip in memory that nothing has touched yet is no difference in any digest. Each
// member looks for these in its own memory (kv.State.Scrub), and needs no one
// else to know who is wrong.
//
// A member that has diverged answers no clients, writes and sends no snapshots, and
// gives leadership away. It goes on to vote and to keep its log, which is as good as
// any: the cluster loses no quorum. A restart makes its state anew from a snapshot and
// the log; those snapshots that it wrote since the last mark at which nobody contradicted
// it are set aside before. A snapshot that a leader sends heals it at once.
//
// The first mark after a start is not compared: what was answered before the snapshot
// is not in it. A difference in the state itself shows at the next one.

// standing is what a member may think of its own state.
type standing int32

const (
	agrees   standing = iota // as far as it knows
	doubts                   // contradicted, and no majority has said which is right
	diverged                 // for good, but for a snapshot or a restart
)

func (s standing) String() string { return [...]string{"agrees", "doubts", "diverged"}[s] }

var (
	errDiverged = errors.New("the state of this member differs from that of the others")
	errDoubted  = errors.New("members differ in their state, and no majority has said yet which is right")
)

// Pace, in ticks. A difference is known after two marks and a round: 1.1 s by default.
const (
	markTicks    = 5
	doubtTicks   = 4 * markTicks  // between marks and repeated witnesses while in doubt
	markPatience = 10 * markTicks // for a mark that was proposed and has not come
)

// What is scrubbed at once: little, as it holds up the apply loop. It walks a million
// keys in seven minutes.
const (
	scrubEvery   = 100 * time.Millisecond
	scrubEntries = 256
	scrubBytes   = 64 << 10
)

// markDigest is a mark and the digest of this member there. whole is whether it can
// be compared.
type markDigest struct {
	index, digest uint64
	whole         bool
}

// divergence belongs to the apply loop. What it says follows from the log.
type divergence struct {
	mark  markDigest // the newest mark
	under markDigest // the one before, which is being compared; index 0: none is
	// claims are the digests at under, by member.
	claims map[uint64]uint64
	// agreed is the newest mark at which nobody contradicted this member, or the
	// snapshot that it began with: its snapshots up to there are good.
	agreed uint64
	// changed: the state may have, since the newest mark. open: it had at that one
	// since the last one that is compared, so the digest there is worth comparing.
	changed, open bool
	differs       map[uint64]bool // members that were reported to differ and have not agreed since
	waiting       []func(error)   // answers to writes that were applied in doubt; nil: give them
	said          testimony       // published last
}

// testimony is what the loop has to propose. The apply loop publishes it.
type testimony struct {
	standing    standing
	mark, under markDigest
	wanted      bool // a mark is, if this member leads
	said        bool // what this member has under is in the log
}

func (s *kvstore) standing() standing { return standing(s.node.standing.Load()) }

// fit waits while the state is in doubt. An error means: answer nothing from it.
func (s *kvstore) fit(ctx context.Context) error {
	for s.standing() != agrees {
		changed := s.settled.wait()
		switch s.standing() { // it may have changed just before
		case agrees:
			return nil
		case diverged:
			return errDiverged
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errDoubted
		case <-s.node.doneC:
			return errStopping
		}
	}
	return nil
}

// fitNow is fit without the wait.
func (s *kvstore) fitNow() error {
	switch s.standing() {
	case diverged:
		return errDiverged
	case doubts:
		return errDoubted
	}
	return nil
}

// applyWitness takes in what a member says, and takes this member's own digest where
// the entry is a mark.
func (s *kvstore) applyWitness(index uint64, w kv.Witness) {
	d := &s.div
	if !w.Mark {
		s.mu.Lock()
		s.mu.state.SetApplied(index)
		s.mu.Unlock()
		d.open = true // whoever leads goes on with marks until it is settled
		if w.Index == d.under.index {
			s.hear(w)
		}
		return
	}
	if s.standing() == agrees && d.under.index > 0 {
		d.agreed = d.under.index
	}
	d.under, d.claims = markDigest{}, nil
	if d.mark.whole && w.Index == d.mark.index {
		d.under, d.claims = d.mark, map[uint64]uint64{}
		s.hear(w)
	}
	s.mu.Lock()
	digest, whole := s.mu.state.Mark(index)
	s.mu.Unlock()
	d.open, d.changed = d.changed || d.open && !d.mark.whole, false
	d.mark = markDigest{index, digest, whole}
}

// hear counts one claim about the mark under comparison.
func (s *kvstore) hear(w kv.Witness) {
	d := &s.div
	if d.under.index == 0 || s.table == nil || s.table.index(w.Member) < 0 {
		return
	}
	d.claims[w.Member] = w.Digest
	s.judge()
}

// judge is the rule, asked at every claim. Where the members change the next mark brings
// the next claim, also while nothing else is written.
func (s *kvstore) judge() {
	d := &s.div
	if d.under.index == 0 || s.standing() == diverged {
		return
	}
	right, found := majority(s.table.voters(), d.claims)
	switch {
	case found && right != d.under.digest:
		if s.diverge(fmt.Sprintf("at entry %d a majority of the voters has digest %016x, this member %016x", d.under.index, right, d.under.digest)) {
			s.setAside()
		}
	case found:
		s.nameDissenters()
		s.settle(agrees)
	case d.contradicted():
		s.settle(doubts)
	}
}

// majority returns the digest that more than half of the voters claim.
func majority(voters []uint64, claims map[uint64]uint64) (digest uint64, found bool) {
	count := map[uint64]int{}
	for _, id := range voters {
		if c, ok := claims[id]; ok {
			if count[c]++; count[c] > len(voters)/2 {
				return c, true
			}
		}
	}
	return 0, false
}

func (d *divergence) contradicted() bool {
	for _, c := range d.claims { // order: does not matter, any other digest will do
		if c != d.under.digest {
			return true
		}
	}
	return false
}

// nameDissenters tells the operator of a healthy member which others are not, once each.
func (s *kvstore) nameDissenters() {
	d := &s.div
	for id, c := range d.claims { // order: does not matter, a line each
		switch {
		case c == d.under.digest:
			delete(d.differs, id)
		case !d.differs[id]:
			if d.differs == nil {
				d.differs = map[uint64]bool{}
			}
			d.differs[id] = true
			s.log.Error(fmt.Sprintf("the state of member %d differs from that of a majority: it stops serving; restart it, and replace it if that happens again (DELETE /%d, then add a new member under a new id)", id, id),
				zap.Uint64("differs", id), zap.Uint64("at_entry", d.under.index))
		}
	}
}

// settle notes a standing short of diverged, and lets go of who waits for it.
func (s *kvstore) settle(to standing) {
	from := s.standing()
	if from == to {
		return
	}
	s.node.standing.Store(int32(to))
	if to == doubts {
		s.log.Warn("members differ in their state: reads and writes wait here until a majority of the voters has said which is right",
			zap.Uint64("at_entry", s.div.under.index), zap.Any("digests", s.div.claims))
		return
	}
	s.answerWaiting(nil)
	s.settled.notify()
	s.publishChanges()
	s.log.Warn("a majority of the voters has the state of this member: it serves on", zap.Uint64("at_entry", s.div.under.index))
}

// diverge ends service; false: it had before. Nothing but a snapshot or a restart undoes it.
func (s *kvstore) diverge(why string) bool {
	if s.standing() == diverged {
		return false
	}
	s.node.standing.Store(int32(diverged))
	s.answerWaiting(errCommitTimeout) // they were applied; what came of it is not known here
	s.settled.notify()
	s.publishChanges()
	s.node.mail.post(func() { s.node.mem.newest = nil }) // nor is it sent
	s.log.Error(fmt.Sprintf("the state of this member differs from what it should be: %s. It serves no clients any more, and still votes and keeps the log. "+
		"Restart it: it then makes its state anew from its last good snapshot and the log. If that happens again, check this machine's memory and replace the member "+
		"(DELETE /%d on another one, then add a new member under a new id with an empty data directory)", why, s.node.id))
	return true
}

// setAside keeps the next start from the snapshots of a state that others contradict.
// Those of a member whose memory is broken stay: each was added up as it was written.
func (s *kvstore) setAside() {
	files, err := s.disk.setAsideSnapshots(s.div.agreed, s.applied.At())
	if err != nil {
		s.log.Error("could not set aside snapshots of a state that differs; delete them before the next start: "+strings.Join(files, ", "), zap.Error(err))
	} else if len(files) > 0 {
		s.log.Warn("snapshots of a state that differs are set aside, and may be deleted", zap.Strings("files", files), zap.Uint64("good_until", s.div.agreed))
	}
}

// rejoin begins to compare anew, with the state of a snapshot.
func (s *kvstore) rejoin(index uint64) {
	was := s.standing()
	s.answerWaiting(errCommitTimeout)
	s.div = divergence{agreed: index}
	s.node.standing.Store(int32(agrees))
	if was != agrees {
		s.settled.notify()
		s.publishChanges()
		s.log.Warn("took over the state of another member: it serves again", zap.Uint64("index", index))
	}
}

// answerLater keeps the results of one own batch until the doubt is settled.
func (s *kvstore) answerLater(give func(error)) {
	s.div.waiting = append(s.div.waiting, give)
}

func (s *kvstore) answerWaiting(err error) {
	for _, give := range s.div.waiting {
		give(err)
	}
	s.div.waiting = nil
}

// scrub checks a little of the memory that the state is in.
func (s *kvstore) scrub() {
	if s.standing() == diverged {
		return
	}
	s.mu.Lock()
	err := s.mu.state.Scrub(scrubEntries, scrubBytes)
	s.mu.Unlock()
	if err != nil {
		s.diverge(err.Error())
	}
}

// publishTestimony tells the loop what there is to propose. It runs after each commit.
func (s *kvstore) publishTestimony() {
	d := &s.div
	t := testimony{standing: s.standing(), mark: d.mark, under: d.under}
	t.wanted = d.changed || d.open || t.standing == doubts
	if c, ok := d.claims[s.node.id]; ok {
		t.said = c == d.under.digest
	}
	if t == d.said {
		return
	}
	urgent := t.standing != agrees && (t.standing != d.said.standing || t.under != d.said.under)
	d.said = t
	s.node.testimony.Store(&t)
	if urgent {
		s.node.mail.post(s.node.testify)
	}
}

// testify proposes the mark that is due, or what this member has at a mark where
// somebody has something else. Nobody waits for the outcome: what is lost comes again.
func (n *raftNode) testify() {
	t := n.testimony.Load()
	if t == nil || !n.hasLeader() {
		return
	}
	leads := n.now.state == raft.StateLeader
	if t.standing == diverged {
		if to := n.successor(raft.None); leads && to != raft.None {
			n.raw.TransferLeader(to)
		}
		return
	}
	v := &n.testified
	first, again := !t.said && v.under != t.under.index, n.ticks-v.at >= doubtTicks
	if t.standing == doubts && t.under.index > 0 && (first || again) {
		v.under, v.at = t.under.index, n.ticks
		n.proposeWitness(kv.Witness{Member: n.id, Index: t.under.index, Digest: t.under.digest})
	}
	pace := uint64(markTicks)
	if t.standing == doubts {
		pace = doubtTicks
	} else if len(n.members.Load().Members) < 2 {
		return // nobody to compare with
	}
	due := t.wanted && n.ticks-v.marked >= pace && (v.marked == 0 || t.mark.index != v.mark || n.ticks-v.marked >= markPatience)
	if !leads || !due || n.committedTerm != n.now.term || !n.stillLeads() {
		return
	}
	v.mark, v.marked = t.mark.index, n.ticks
	w := kv.Witness{Member: n.id, Mark: true}
	if t.mark.whole {
		w.Index, w.Digest = t.mark.index, t.mark.digest
	}
	n.proposeWitness(w)
}

// testified is what the loop has proposed last, and when.
type testified struct {
	under, at    uint64 // own witness: about which mark, at which tick
	mark, marked uint64 // mark: which was the newest one then, at which tick
}

func (n *raftNode) proposeWitness(w kv.Witness) {
	// Never proposed again by itself, and no part of a window: it changes no state.
	if err := n.raw.Propose(kv.AppendWitness(nil, w)); err != nil {
		n.log.Debug("witness not proposed", zap.Error(err))
	}
}

// divergedSuffix ends the name of a snapshot file that must not be loaded, and is
// kept for whoever wants to see what differs.
const divergedSuffix = ".diverged"

// setAsideSnapshots renames the snapshots of entries after good, up to the one that
// this member has applied: a later one came from another member, to heal this one. It
// returns the files, of which an error may have left some in place. A start then finds
// them missing, and takes the one before. What an earlier occurrence set aside goes.
func (d *diskStore) setAsideSnapshots(good, applied uint64) (files []string, err error) {
	snaps := os.DirFS(d.snapDir())
	names, err := fs.Glob(snaps, "*.snap.db")
	if err != nil {
		return nil, err
	}
	old, err := fs.Glob(snaps, "*"+divergedSuffix)
	for _, name := range old {
		err = errors.Join(err, os.Remove(filepath.Join(d.snapDir(), name))) // one occurrence is enough to look at
	}
	for _, name := range names {
		index, perr := strconv.ParseUint(strings.TrimSuffix(name, ".snap.db"), 16, 64)
		if perr != nil || index <= good || index > applied {
			continue
		}
		name = filepath.Join(d.snapDir(), name)
		files = append(files, name)
		err = errors.Join(err, os.Rename(name, name+divergedSuffix))
	}
	slices.Sort(files)
	return files, errors.Join(err, syncDir(d.snapDir()))
}
