package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"pontoon/internal/sim"
)

// simProfile is what one seed makes of the world: which faults there are, and
// how strong. Each seed switches a random part of them on (swarm testing): a
// fault that is rare among many others is found where it is alone.
type simProfile struct {
	members int
	clients int
	faulty  time.Duration // virtual time until all heals

	drop, duplicate, reorder float64
	delay                    time.Duration
	partition, isolate       float64 // each 100 ms
	cutFor                   time.Duration

	crashAt          float64 // at each crash point
	crash, stop      float64 // each 100 ms
	blackout         float64 // all members at once
	downFor          time.Duration
	pause            float64
	rates            float64 // clocks run at 1 ± rates
	syncMin, syncMax time.Duration
	stall, failWrite float64
	full, spoil      float64
	spoilSent        float64 // each snapshot sent
	change, transfer float64

	applyLag      time.Duration
	sluggish      time.Duration // the same, of every third member; 0: as the others
	applySingly   bool
	snapshotTakes time.Duration
	transferTakes time.Duration
	snapEntries   uint64
	catchUp       int64
	watchQueue    int
}

func drawProfile(r *sim.Rand) simProfile {
	p := simProfile{members: sim.Pick(r, []int{1, 1, 2, 3, 3, 3, 3, 3, 5, 5}), clients: 2 + r.IntN(4), faulty: r.Between(8*time.Second, 20*time.Second),
		delay: 2 * ms, syncMin: 100 * time.Microsecond, syncMax: r.Between(200*time.Microsecond, 8*ms), applyLag: r.Between(100*time.Microsecond, 3*ms),
		applySingly: r.Chance(0.7), snapshotTakes: r.Between(2*ms, 300*ms), transferTakes: r.Between(2*ms, 600*ms),
		snapEntries: uint64(5 + r.IntN(60)), catchUp: int64(r.IntN(6000)), downFor: r.Between(200*ms, 4*time.Second), cutFor: r.Between(300*ms, 5*time.Second)}
	some := func(p float64, on func()) {
		if r.Chance(p) {
			on()
		}
	}
	some(0.4, func() { p.drop = r.Float(0, 0.15) })
	some(0.4, func() { p.duplicate = r.Float(0, 0.15) })
	some(0.4, func() { p.reorder = r.Float(0, 0.3) })
	some(0.3, func() { p.delay = r.Between(2*ms, 120*ms) })
	some(0.4, func() { p.partition = r.Float(0, 0.08) })
	some(0.4, func() { p.isolate = r.Float(0, 0.06) })
	some(0.4, func() { p.crashAt = r.Float(0, 0.008) })
	some(0.4, func() { p.crash = r.Float(0, 0.05) })
	some(0.3, func() { p.stop = r.Float(0, 0.04) })
	some(0.2, func() { p.blackout = r.Float(0, 0.015) })
	some(0.3, func() { p.pause = r.Float(0, 0.04) })
	some(0.5, func() { p.rates = r.Float(0, 0.1) })
	some(0.3, func() { p.stall = r.Float(0, 0.04) })
	some(0.25, func() { p.failWrite = r.Float(0, 0.02) })
	some(0.2, func() { p.full = r.Float(0, 0.03) })
	some(0.25, func() { p.spoil = r.Float(0, 0.03) })
	some(0.2, func() { p.spoilSent = r.Float(0, 0.3) })
	some(0.5, func() { p.change = r.Float(0, 0.05) })
	some(0.35, func() { p.transfer = r.Float(0, 0.08) })
	some(0.3, func() { p.watchQueue = 1 + r.IntN(8) })
	some(0.2, func() { p.applyLag = r.Between(3*ms, 60*ms) })
	some(0.2, func() { p.snapEntries = 150 + r.Uint64N(500) }) // what needs a snapshot cannot wait for the next
	some(0.1, func() { p.sluggish = r.Between(300*ms, 2*time.Second) })
	return p
}

// simWorld is one run: a cluster, its clients, what happens to them, and what
// was seen from outside.
type simWorld struct {
	seed    uint64
	prof    simProfile
	q       sim.Queue
	net     *sim.Net
	faults  *sim.Rand // chance of the world and the faults
	trace   *sim.Trace
	cover   sim.Cover
	members []*simMember // all that ever were, by id
	founded []clusterURL
	changes int           // membership changes under way
	removal time.Duration // when one was last proposed; 0: never
	healed  bool
	healAt  time.Duration
	rate    float64 // of the fastest clock

	leaders map[uint64]uint64    // term → who led
	entries map[uint64][2]uint64 // index → term, checksum
	hashes  map[uint64]uint64    // index → state
	removed map[uint64]uint64    // member → index at which it was out
	tables  map[uint64]string    // index of a membership change → the table after it
	history *simHistory
}

// simFailure is what failf panics with.
type simFailure string

func (w *simWorld) failf(format string, a ...any) { panic(simFailure(fmt.Sprintf(format, a...))) }

func newSimWorld(seed uint64, all io.Writer) *simWorld {
	r := sim.NewRand(seed)
	w := &simWorld{seed: seed, prof: drawProfile(r.Fork()), net: sim.NewNet(r.Fork()), faults: r.Fork(), trace: sim.NewTrace(200), cover: sim.Cover{},
		leaders: map[uint64]uint64{}, entries: map[uint64][2]uint64{}, hashes: map[uint64]uint64{}, removed: map[uint64]uint64{}, tables: map[uint64]string{}, rate: 1}
	w.trace.All = all
	w.history = newSimHistory(w, r.Fork())
	w.net.Drop, w.net.Duplicate, w.net.Reorder, w.net.Max = w.prof.drop, w.prof.duplicate, w.prof.reorder, w.prof.delay
	for i := range w.prof.members {
		w.founded = append(w.founded, clusterURL{uint64(i + 1), simURL(uint64(i + 1))})
	}
	table := bootstrapMembership("sim", w.founded)
	w.tables[1] = tableText(table)
	for _, c := range w.founded {
		w.addMember(c.ID).disk.bootstrap(c.ID, table, false)
	}
	return w
}

func simURL(id uint64) string { return fmt.Sprintf("http://10.0.0.%d:1", id) }

func (w *simWorld) addMember(id uint64) *simMember {
	m := &simMember{w: w, id: id, rate: 1 + w.faults.Float(-w.prof.rates, w.prof.rates)}
	w.rate = max(w.rate, m.rate)
	m.disk = &simDisk{m: m, keep: 2, snaps: map[uint64][]byte{}, spoiled: map[uint64]bool{}}
	w.members = append(w.members, m)
	return m
}

func (w *simWorld) member(id uint64) *simMember {
	if id == 0 || id > uint64(len(w.members)) {
		return nil
	}
	return w.members[id-1]
}

func (w *simWorld) config(id uint64) Config {
	cfg := defaultConfig()
	cfg.ID = id
	cfg.Cluster = append(slices.Clone(w.founded), clusterURL{id, simURL(id)})
	cfg.SnapshotEntries, cfg.CatchUpBytes = w.prof.snapEntries, w.prof.catchUp
	return cfg
}

func (w *simWorld) line(who uint64, what string, a, b, c uint64, text string) {
	w.trace.Add(sim.Line{At: w.q.Now(), Who: who, What: what, A: a, B: b, C: c, Text: text})
}

// logger makes a failure of what a node logs as an error, unless a fault explains it.
func (w *simWorld) logger(m *simMember) *zap.Logger {
	core := zapcore.NewCore(zapcore.NewJSONEncoder(zapcore.EncoderConfig{}), zapcore.AddSync(io.Discard), zapcore.ErrorLevel)
	return zap.New(core, zap.Hooks(func(e zapcore.Entry) error {
		w.line(m.id, "logs: "+e.Message, 0, 0, 0, "")
		switch {
		case e.Message == "refused a snapshot" && w.prof.spoilSent+w.prof.spoil > 0:
			return nil
		case strings.HasPrefix(e.Message, "a snapshot on this disk is damaged") && w.prof.spoil > 0:
			w.mark("snapshot written again", m)
			return nil
		}
		w.failf("member %d logs: %s", m.id, e.Message)
		return nil
	}))
}

// up are the members that run.
func (w *simWorld) up() (up []*simMember) {
	for _, m := range w.members {
		if m.node != nil {
			up = append(up, m)
		}
	}
	return up
}

// leader is a member that thinks it leads.
func (w *simWorld) leader() *simMember {
	for _, m := range w.members {
		if m.node != nil && m.node.n.now.state == raft.StateLeader {
			return m
		}
	}
	return nil
}

// mark counts a fault with the role of the member that it strikes, and with what
// the cluster was doing.
func (w *simWorld) mark(fault string, m *simMember) {
	role := "down"
	if m.node != nil {
		switch now := m.node.n.now; {
		case now.state == raft.StateLeader:
			role = "leader"
		case now.state != raft.StateFollower:
			role = "candidate"
		default:
			role = "follower"
			if x, ok := m.node.n.members.Load().get(m.id); !ok || x.Learner {
				role = "learner"
			}
		}
	}
	w.cover.Hit(fault + "/" + role + "/" + w.phase())
	w.line(m.id, fault, 0, 0, 0, "")
}

// phase is what the cluster is doing.
func (w *simWorld) phase() string {
	l := w.leader()
	if l == nil {
		return "electing"
	}
	for _, m := range w.members {
		if m.node != nil && m.node.installing > 0 {
			return "installing"
		}
	}
	for _, m := range l.node.n.members.Load().Members {
		if m.Learner || w.changes > 0 {
			return "changing"
		}
	}
	return "steady"
}

// live is the whole of a seed.
func (w *simWorld) live() {
	for _, m := range w.members {
		w.q.After(w.faults.Between(0, 300*ms), func() { w.restart(m) })
	}
	w.history.begin()
	w.q.After(100*ms, w.nemesis)
	w.until(w.prof.faulty)
	w.heal()
	w.until(w.q.Now() + healthyFor)
	w.history.late()
	w.settle()
	w.history.check()
}

func (w *simWorld) until(t time.Duration) {
	for w.q.Now() < t && w.q.Step() {
	}
}

// nemesis draws the faults of the next 100 ms.
func (w *simWorld) nemesis() {
	if w.healed {
		return
	}
	w.q.After(100*ms, w.nemesis)
	p, r := &w.prof, w.faults
	up := w.up()
	if len(up) == 0 {
		return
	}
	haste := 1.0
	if p := w.phase(); p == "installing" || p == "changing" {
		haste = 3 // what is rare should meet what is rare
	}
	one := func(chance float64, f func(*simMember)) {
		if r.Chance(chance * haste) {
			m := sim.Pick(r, up)
			if l := w.leader(); l != nil && r.Chance(0.4) {
				m = l
			}
			if m.node != nil {
				f(m)
			}
		}
	}
	one(p.partition, w.cutOneWay)
	one(p.isolate, w.isolate)
	one(p.crash, func(m *simMember) {
		power := r.Chance(0.7)
		w.mark(map[bool]string{true: "power loss", false: "kill"}[power], m)
		w.crash(m.node, power)
	})
	one(p.stop, func(m *simMember) {
		w.mark("stop", m)
		w.handOver(m.node)
		w.q.After(r.Between(ms, 500*ms), func() {
			if m.node != nil {
				w.stop(m.node)
				w.q.After(r.Between(50*ms, p.downFor), func() { w.restart(m) })
			}
		})
	})
	one(p.blackout, func(m *simMember) {
		w.mark("blackout", m)
		for _, m := range up {
			if m.node != nil {
				w.crash(m.node, true)
			}
		}
	})
	one(p.pause, func(m *simMember) {
		w.mark("pause", m)
		m.node.paused = w.q.Now() + r.Between(50*ms, 4*time.Second)
		n := m.node
		w.q.At(n.paused, func() { w.wake(n); w.applySoon(n) })
	})
	one(p.stall, func(m *simMember) { m.disk.stall = true })
	one(p.failWrite, func(m *simMember) { m.disk.failNext = true })
	one(p.full, func(m *simMember) {
		if !m.disk.full {
			w.mark("disk full", m)
			w.setFull(m, true)
			w.q.After(r.Between(100*ms, 3*time.Second), func() { w.setFull(m, false) })
		}
	})
	one(p.spoil, func(m *simMember) {
		// Its own table may be behind: others may have left, or be about to.
		leaving := w.removal > 0 && w.q.Now()-w.removal < 3*time.Second
		three := !leaving && len(m.node.n.members.Load().voters()) > 2 && len(slices.DeleteFunc(slices.Clone(w.members), func(x *simMember) bool { return x.gone })) > 2
		if w.intact() && m.disk.spoil(r, r.Chance(0.4) && three) {
			w.mark("rot", m)
		}
	})
	one(p.change, w.changeMembers)
	one(p.transfer, w.moveLeader)
	for _, m := range w.members {
		if m.lost && !m.gone {
			w.replace(m)
		}
	}
}

// intact: no disk is damaged. A second one could take the majority's data.
func (w *simWorld) intact() bool {
	return !slices.ContainsFunc(w.members, func(m *simMember) bool { return !m.gone && (m.lost || len(m.disk.spoiled) > 0) })
}

func (w *simWorld) cutOneWay(m *simMember) {
	o := sim.Pick(w.faults, w.members)
	if o == m || w.net.IsCut(m.id, o.id) {
		return
	}
	w.mark("one-way cut", m)
	w.net.Cut(m.id, o.id, true)
	w.q.After(w.faults.Between(100*ms, w.prof.cutFor), func() { w.net.Cut(m.id, o.id, false) })
}

func (w *simWorld) isolate(m *simMember) {
	w.mark("isolate", m)
	set := func(cut bool) {
		for _, o := range w.members {
			if o != m {
				w.net.Cut(m.id, o.id, cut)
				w.net.Cut(o.id, m.id, cut)
			}
		}
	}
	set(true)
	w.q.After(w.faults.Between(100*ms, w.prof.cutFor), func() { set(false) })
}

// setFull is what the disk-watcher does.
func (w *simWorld) setFull(m *simMember, full bool) {
	m.disk.full = full
	if m.node != nil {
		m.node.s.diskLow.Store(full)
	}
}

// do is raftNode.do without the wait.
func (w *simWorld) do(n *simNode, f func()) {
	n.n.mail.post(f)
	w.wake(n)
}

// handOver is kvstore.handOver without the wait.
func (w *simWorld) handOver(n *simNode) {
	w.do(n, func() {
		if to := n.n.successor(raft.None); to != raft.None {
			n.n.raw.TransferLeader(to)
		}
	})
}

func (w *simWorld) moveLeader(m *simMember) {
	n := m.node
	voters := n.n.members.Load().voters()
	if len(voters) == 0 {
		return // a joiner that waits for its first snapshot
	}
	to := sim.Pick(w.faults, voters)
	w.mark("transfer", m)
	w.do(n, func() { // as tryTransfer does
		if n.n.now.state != raft.StateLeader || to == n.n.id || n.n.alive(to) {
			n.n.raw.TransferLeader(to)
		}
	})
}

// changeMembers lets a member in or out.
func (w *simWorld) changeMembers(m *simMember) {
	if w.changes > 0 || m.node == nil {
		return
	}
	table := m.node.n.members.Load()
	voters := table.voters()
	if len(voters) == 0 {
		return
	}
	if len(table.Removed) > 0 && w.faults.Chance(0.2) { // an id never comes back
		id := sim.Pick(w.faults, table.Removed)
		w.proposeChange(m.node, memberChange{Op: opAdd, Member: member{ID: id, PeerURLs: []string{simURL(id)}, Learner: true, Promote: true}})
		w.cover.Hit("removed/asks to come back")
		return
	}
	if len(w.members) < 9 && (len(voters) < 3 || w.faults.Chance(0.5)) {
		w.join(m)
		return
	}
	if len(voters) < 3 || !w.intact() { // two voters cannot spare the one whose disk is damaged
		return
	}
	w.mark("leave", m)
	w.proposeRemoval(m.node, sim.Pick(w.faults, table.Members).ID)
}

func (w *simWorld) join(m *simMember) {
	id := uint64(len(w.members) + 1)
	w.addMember(id)
	w.mark("join", m)
	w.proposeChange(m.node, memberChange{Op: opAdd, Member: member{ID: id, PeerURLs: []string{simURL(id)}, Learner: true, Promote: true}})
}

// replace lets go of a member whose disk is damaged, and takes a new one in.
func (w *simWorld) replace(m *simMember) {
	up := w.up()
	if w.changes > 0 || len(up) == 0 {
		return
	}
	by := sim.Pick(w.faults, up)
	if by.node.n.members.Load().isRemoved(m.id) {
		m.gone = true
		w.cover.Hit("replaced")
		w.join(by)
		return
	}
	w.proposeRemoval(by.node, m.id)
}

func (w *simWorld) proposeRemoval(n *simNode, id uint64) {
	w.changes++
	w.removal = w.q.Now()
	w.do(n, func() { // removeMember asks more, of the leader; the world may harm itself, and heals
		w.changes--
		if n.n.members.Load().mayRemove(id, n.n.alive) == nil {
			w.proposeChange(n, memberChange{Op: opRemove, Member: member{ID: id}})
		}
	})
	w.q.After(time.Second, func() { // the process may have ended before
		if w.changes > 0 && n.m.node != n {
			w.changes = 0
		}
	})
}

// proposeChange is kvstore.changeMembers; its waiting is done by the world. It
// makes sure of an up-to-date table first, as that does.
func (w *simWorld) proposeChange(n *simNode, c memberChange) {
	w.changes++
	b := n.n.reads.join()
	w.wake(n)
	over := false
	end := func() {
		if !over {
			over = true
			w.changes = max(0, w.changes-1)
		}
	}
	ctx := &simContext{}
	n.wait(func() bool {
		select {
		case <-b.done:
		default:
			return over
		}
		if over || b.err != nil {
			end()
			return true
		}
		c.Version, c.Node, c.Request = memberChangeVersion, n.n.id, n.n.nextRequest()
		p := &confProposal{ctx: ctx, change: c, done: make(chan error, 1)}
		w.do(n, func() { n.n.confQueue = append(n.n.confQueue, p) })
		n.wait(func() bool {
			select {
			case err := <-p.done:
				w.line(n.m.id, "membership change", c.Member.ID, 0, 0, fmt.Sprint(c.Op, err))
				if err == nil {
					w.cover.Hit("changed/" + string(c.Op))
				}
				end()
				return true
			default:
				return over
			}
		}, end)
		return true
	}, end)
	w.q.After(5*time.Second, func() { ctx.over = true; end() })
}

// simContext is a context that the world ends.
type simContext struct {
	over bool
	noContext
}

type noContext struct{}

func (noContext) Deadline() (time.Time, bool) { return time.Time{}, false }
func (noContext) Done() <-chan struct{}       { return nil }
func (noContext) Value(any) any               { return nil }

var errSimOver = errors.New("over")

func (c *simContext) Err() error {
	if c.over {
		return errSimOver
	}
	return nil
}

// What is checked all the time.

func (w *simWorld) checkLeader(n *simNode) {
	now := n.n.now
	if now.state != raft.StateLeader {
		return
	}
	switch other, ok := w.leaders[now.term]; {
	case !ok:
		w.leaders[now.term] = n.m.id
		w.line(n.m.id, "leads", now.term, 0, 0, "")
		w.q.After(0, func() { w.history.eager(n) })
	case other != n.m.id:
		w.failf("members %d and %d both lead term %d", other, n.m.id, now.term)
	}
}

// checkEntry: what is committed at an index never changes, and is applied in order.
func (w *simWorld) checkEntry(n *simNode, e *raftpb.Entry, applied uint64) {
	if e.GetIndex() != applied+1 {
		w.failf("member %d applies entry %d after entry %d", n.m.id, e.GetIndex(), applied)
	}
	is := [2]uint64{e.GetTerm(), crc(e.GetData())}
	switch was, ok := w.entries[e.GetIndex()]; {
	case !ok:
		w.entries[e.GetIndex()] = is
	case was != is:
		w.failf("member %d applies entry %d of term %d, another one applied one of term %d", n.m.id, e.GetIndex(), is[0], was[0])
	}
}

func tableText(m *membership) string {
	b, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// checkConfs: a membership change has the same outcome everywhere.
func (w *simWorld) checkConfs(n *simNode, c *commit) {
	for _, conf := range c.confs {
		is := tableText(conf.members)
		if was, ok := w.tables[conf.index]; ok && was != is {
			w.failf("member %d has the table %s after entry %d, another one %s", n.m.id, is, conf.index, was)
		}
		w.tables[conf.index] = is
	}
}

// checkTable: a snapshot has the table of its entry, not an older or newer one.
func (w *simWorld) checkTable(n *simNode, h *snapHeader) {
	newest := uint64(0)
	for index := range w.tables { // order: the largest is wanted
		if index <= h.Index {
			newest = max(newest, index)
		}
	}
	if is := tableText(h.Members); newest > 0 && is != w.tables[newest] {
		w.failf("member %d loads snapshot %d with the table %s, after entry %d it was %s", n.m.id, h.Index, is, newest, w.tables[newest])
	}
}

// checkHash: members that have applied the same entries hold the same.
func (w *simWorld) checkHash(n *simNode) {
	st := n.s.mu.state
	at := st.Applied()
	is := st.Hash()
	switch was, ok := w.hashes[at]; {
	case !ok:
		w.hashes[at] = is
	case was != is:
		w.failf("member %d has another state at entry %d than those before", n.m.id, at)
	}
	for _, id := range n.s.table.Removed {
		if was, ok := w.removed[id]; !ok || at < was {
			w.removed[id] = at
		}
	}
	for _, m := range n.s.table.Members {
		if was, ok := w.removed[m.ID]; ok && at >= was {
			w.failf("member %d: member %d was removed by entry %d, and is in the table at entry %d", n.m.id, m.ID, was, at)
		}
	}
}

// seeState looks at what the apply loop shows, right after it did.
func (w *simWorld) seeState(n *simNode) {
	w.history.see(n)
	// A member that was let in is started once somebody has it in the table.
	table := n.n.members.Load()
	for _, m := range table.Members {
		x := w.member(m.ID)
		if x.node == nil && x.disk.boots == 0 && !x.gone && !x.disk.meta.Joined && m.ID > uint64(w.prof.members) {
			w.admit(x, table)
		}
	}
}

// admit starts a member that the table has, with an empty disk.
func (w *simWorld) admit(m *simMember, table *membership) {
	if err := mayJoin(table, w.config(m.id), simURL(1)); err != nil {
		w.failf("member %d may not join: %v", m.id, err)
	}
	m.disk.bootstrap(m.id, table, true)
	w.q.After(w.faults.Between(ms, 500*ms), func() { w.restart(m) })
}

// heal ends all faults and starts what is down.
func (w *simWorld) heal() {
	w.healed, w.healAt = true, w.q.Now()
	w.net.Heal()
	w.prof.applyLag, w.prof.sluggish = min(w.prof.applyLag, 3*ms), 0
	w.line(0, "heal", 0, 0, 0, "")
	for _, m := range w.members {
		w.setFull(m, false)
		m.disk.failNext, m.disk.stall = false, false
		if m.node != nil { // what has begun goes on: a pause, a stalled disk
			w.healAt = max(w.healAt, m.node.until())
		}
		w.restartAfterHeal(m)
	}
}

func (w *simWorld) restartAfterHeal(m *simMember) {
	if m.node == nil && m.disk.meta.Version != 0 {
		w.q.After(w.faults.Between(0, 100*ms), func() { w.restart(m) })
	}
}

// healthyFor is how long the clients go on once all has healed.
const healthyFor = 5 * time.Second

// settleIn is the virtual time in which a healed cluster has to be whole again.
const settleIn = 40 * time.Second

// settle waits until every member writes, reads and agrees with the others.
func (w *simWorld) settle() {
	deadline := w.q.Now() + settleIn
	w.history.stop()
	for {
		why := w.unsettled()
		if why == "" {
			w.line(0, "settled", 0, 0, 0, "")
			return
		}
		if w.q.Now() > deadline || !w.q.Step() {
			w.failf("%v after all faults have ended: %s", settleIn, why)
		}
	}
}

// unsettled says what keeps the cluster from being whole.
func (w *simWorld) unsettled() string {
	if why := w.history.unsettled(); why != "" {
		return why
	}
	l := w.leader()
	if l == nil {
		return "nobody leads"
	}
	table := l.node.n.members.Load()
	at, hash := l.node.s.applied.At(), l.node.s.mu.state.Hash()
	for _, m := range table.Members {
		x := w.member(m.ID)
		switch {
		case x.lost:
			continue // it is for the operator to replace
		case x.node == nil:
			return fmt.Sprintf("member %d does not run", m.ID)
		case m.Learner && m.Promote:
			return fmt.Sprintf("member %d is a learner still", m.ID)
		case x.node.s.applied.At() != at:
			return fmt.Sprintf("member %d has applied entry %d, the leader %d", m.ID, x.node.s.applied.At(), at)
		case x.node.s.mu.state.Hash() != hash:
			return fmt.Sprintf("member %d differs from the leader at entry %d", m.ID, at)
		}
	}
	return ""
}
