package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"pontoon/internal/sim"
	"pontoon/internal/watch"
	"pontoon/kv"
)

// simHistory is what the clients of a run asked and were told. Every value is
// written once, so that the history which the store keeps of itself can be held
// against it: each event has exactly one request behind it, and each answer
// must be true of the revision that it names. Since revisions count all changes
// one by one, that and the order of revisions in real time is linearizability
// of the whole store; porcupine says the same of the plain registers, by its own way.
type simHistory struct {
	w        *simWorld
	rand     *sim.Rand
	ops      []*simOp
	values   int
	stopped  bool
	open     int // requests whose outcome is not known yet, and watches that are not there yet
	watchers []*simWatcher
	leases   []*simLease
	finals   map[uint64]int // member → what it still has to do after all has healed
	lastRev  int64
	shown    map[int64]time.Duration // revision → when the first member had applied it
	newest   int64                   // of them
}

// simOutcome is what a client knows of a request.
type simOutcome int

const (
	simOpen simOutcome = iota // not yet known, or never
	simDone
	simNever // the answer promised that it has not happened
)

// simOp is one request, with all attempts of it.
type simOp struct {
	client    int
	kind      string
	cmd       *kv.Command // nil: a read
	key       string
	call, ret time.Duration // ret: when the answer came
	outcome   simOutcome
	res       kv.Result
	revision  int64      // of the answer
	changed   bool       // it says that it changed something
	stale     bool       // a read that need not see the newest
	entries   []kv.Entry // that a read found
	span      kv.Span    // that it looked at
}

func newSimHistory(w *simWorld, r *sim.Rand) *simHistory {
	return &simHistory{w: w, rand: r, finals: map[uint64]int{}, shown: map[int64]time.Duration{}}
}

func (h *simHistory) begin() {
	for c := range h.w.prof.clients {
		h.w.q.After(h.rand.Between(0, 500*ms), func() { h.client(c) })
	}
	for i, prefix := range []string{"", sim.Pick(h.rand, []string{"p/", "k/", "t/"})} {
		x := &simWatcher{h: h, id: i, filter: watch.Filter{Prefixes: []string{prefix}}}
		h.watchers = append(h.watchers, x)
		h.w.q.After(h.rand.Between(0, time.Second), x.begin)
	}
}

// stop ends the clients, and has every member write and read once more.
func (h *simHistory) stop() {
	h.stopped = true
	for _, m := range h.w.members {
		h.final(m)
	}
}

// final asks member m to write and read until it does, unless it is no member
// in the end.
func (h *simHistory) final(m *simMember) {
	if m.gone || m.lost || h.forgotten(m) {
		delete(h.finals, m.id)
		return
	}
	if _, ok := h.finals[m.id]; !ok {
		h.finals[m.id] = 2
	}
	again := func() { h.w.q.After(100*ms, func() { h.final(m) }) }
	if m.node == nil {
		if m.disk.meta.Version == 0 && !h.isMember(m.id) {
			delete(h.finals, m.id) // its admission was lost with somebody's process
			return
		}
		again()
		return
	}
	if h.finals[m.id] == 2 {
		op := h.write(-1, "final", "f/x", &kv.Command{Op: kv.OpPut, Key: "f/x", Value: h.value()})
		h.propose(m.node, op, 2*time.Second, func(err error) {
			if err == nil {
				h.finals[m.id] = 1
			}
			again()
		})
		return
	}
	h.read(m.node, -1, "final read", kv.SingleKey("f/x"), readOptions{}, 2*time.Second, func(err error) {
		if err == nil {
			delete(h.finals, m.id)
			return
		}
		again()
	})
}

// forgotten: it was removed, and whomever it could hear that from has left since.
func (h *simHistory) forgotten(m *simMember) bool {
	return m.node != nil && !slices.ContainsFunc(h.w.up(), func(o *simMember) bool {
		return o != m && (o.node.n.members.Load().index(m.id) >= 0 || m.node.n.members.Load().index(o.id) >= 0)
	}) && len(h.w.up()) > 1
}

// isMember says that some member that runs has id in its table.
func (h *simHistory) isMember(id uint64) bool {
	return slices.ContainsFunc(h.w.up(), func(m *simMember) bool { return m.node.n.members.Load().index(id) >= 0 })
}

// unsettled says what the clients still wait for.
func (h *simHistory) unsettled() string {
	for _, m := range h.w.members {
		if n, ok := h.finals[m.id]; ok {
			return fmt.Sprintf("member %d has not %s", m.id, []string{"", "read", "written"}[n])
		}
	}
	if h.open > 0 {
		return fmt.Sprintf("%d requests are open", h.open)
	}
	for _, l := range h.leases {
		if !l.gone && l.known {
			return fmt.Sprintf("%s, which was to end %v after %v, is still there", l.key, l.ttl, l.from)
		}
	}
	up := h.w.up()
	if len(up) == 0 {
		return "nobody runs"
	}
	top := up[0].node.s.revision.At()
	for _, x := range h.watchers {
		if x.delivered < int64(top) {
			return fmt.Sprintf("watch %d has come to revision %d of %d", x.id, x.delivered, top)
		}
	}
	return ""
}

func (h *simHistory) value() []byte {
	h.values++
	return []byte(fmt.Sprintf("v%d", h.values))
}

// client sends one request after the other.
func (h *simHistory) client(c int) {
	if h.stopped {
		return
	}
	next := func() { h.w.q.After(h.rand.Between(ms, 250*ms), func() { h.client(c) }) }
	up := h.w.up()
	if len(up) == 0 {
		next()
		return
	}
	m := sim.Pick(h.rand, up)
	timeout := 5 * time.Second
	switch h.rand.IntN(6) {
	case 0:
		timeout = h.rand.Between(0, 30*ms) // many of them are given up in the middle
	case 1:
		timeout = h.rand.Between(100*ms, time.Second)
	}
	done := func(error) { next() }
	key := func(prefix string) string { return prefix + string(rune('a'+h.rand.IntN(3))) }
	put := func(kind, key string, change func(*kv.Command)) {
		c := h.write(c, kind, key, &kv.Command{Op: kv.OpPut, Key: key, Value: h.value()})
		if change != nil {
			change(c.cmd)
		}
		h.propose(m.node, c, timeout, done)
	}
	switch h.rand.IntN(20) {
	case 0, 1, 2:
		put("put", key("p/"), nil)
	case 3, 4, 5:
		h.read(m.node, c, "get", kv.SingleKey(key("p/")), readOptions{}, timeout, done)
	case 6:
		k := key("p/")
		h.propose(m.node, h.write(c, "delete", k, &kv.Command{Op: kv.OpDelete, Key: k}), timeout, done)
	case 7, 8:
		put("conditional put", key("k/"), func(c *kv.Command) {
			c.If.Kind = kv.Check(1 + h.rand.IntN(4))
			if c.If.Kind >= kv.CheckAnyOf {
				c.If.Revisions = []int64{max(1, h.lastRev-int64(h.rand.IntN(3)))}
			}
		})
	case 9, 10:
		h.transact(m.node, c, key, timeout, done)
	case 11, 12:
		h.once(c, 0, h.write(c, "once", key("k/"), nil), next)
	case 13, 14:
		h.putTTL(m.node, c, timeout, done)
	case 15:
		h.grant(m.node, c, next)
	case 16:
		h.bulk(m.node, c, timeout, done)
	case 17:
		h.read(m.node, c, "list", kv.Prefix(sim.Pick(h.rand, []string{"", "k/", "r/"})), readOptions{}, timeout, done)
	case 18:
		h.read(m.node, c, "stale", kv.SingleKey(key("k/")), readOptions{stale: true}, timeout, done)
	case 19:
		h.read(m.node, c, "past", kv.Prefix("k/"), readOptions{revision: max(1, h.lastRev-int64(h.rand.IntN(20)))}, timeout, done)
	}
}

// eager is a client that has waited for just this: a process that begins, or
// begins to lead, is asked before it may know enough to answer.
func (h *simHistory) eager(n *simNode) {
	if h.stopped || n.m.node != n || h.rand.Chance(0.3) {
		return
	}
	h.read(n, h.w.prof.clients, "get", kv.SingleKey("p/"+string(rune('a'+h.rand.IntN(3)))), readOptions{}, time.Second, func(error) {})
}

func (h *simHistory) write(client int, kind, key string, cmd *kv.Command) *simOp {
	op := &simOp{client: client, kind: kind, key: key, cmd: cmd, call: h.w.q.Now()}
	h.ops = append(h.ops, op)
	return op
}

// transact: if one key has the value that was seen last, put two, else one.
func (h *simHistory) transact(n *simNode, client int, key func(string) string, timeout time.Duration, done func(error)) {
	a := key("k/")
	value := h.value()
	cmp := kv.Compare{Key: a, Target: kv.TargetModRevision, Op: kv.Less, Number: 1 + h.rand.Int64N(h.lastRev+1)}
	t := &kv.Txn{If: []kv.Compare{cmp},
		Then: []kv.TxnOp{{Op: kv.OpPut, Key: "k/a", Value: value}, {Op: kv.OpPut, Key: "k/b", Value: value}},
		Else: []kv.TxnOp{{Op: kv.OpDeleteRange, Span: kv.SingleKey("k/b")}, {Op: kv.OpPut, Key: "k/c", Value: value}}}
	h.propose(n, h.write(client, "txn", a, &kv.Command{Op: kv.OpTxn, Txn: t}), timeout, done)
}

// bulk is an import of many keys, or the end of all of them.
func (h *simHistory) bulk(n *simNode, client int, timeout time.Duration, done func(error)) {
	if h.rand.Chance(0.3) {
		h.propose(n, h.write(client, "delete range", "r/", &kv.Command{Op: kv.OpDeleteRange, Span: kv.Prefix("r/")}), timeout, done)
		return
	}
	t := &kv.Txn{Each: true, Brief: true}
	value := h.value()
	for i := range 2 + h.rand.IntN(8) {
		t.Then = append(t.Then, kv.TxnOp{Op: kv.OpPut, Key: fmt.Sprintf("r/%d", i), Value: value})
	}
	h.propose(n, h.write(client, "import", "r/", &kv.Command{Op: kv.OpTxn, Txn: t}), timeout, done)
}

// once repeats a put under an idempotency key, on changing members, until its
// outcome is known.
func (h *simHistory) once(client, try int, op *simOp, next func()) {
	if op.cmd == nil {
		value := h.value()
		op.cmd = &kv.Command{Op: kv.OpPut, Key: op.key, Value: value, Once: &kv.Once{Key: "once-" + string(value)}}
		h.open++
	}
	again := func() { h.w.q.After(h.rand.Between(0, 100*ms), func() { h.once(client, try+1, op, next) }) }
	up := h.w.up()
	if len(up) == 0 {
		again()
		return
	}
	timeout := h.rand.Between(0, 20*ms)
	if try > 2 {
		timeout = time.Second
	}
	h.propose(sim.Pick(h.rand, up).node, op, timeout, func(err error) {
		if err != nil {
			op.outcome = simOpen // an earlier attempt may still come to be
			again()
			return
		}
		if try > 0 {
			h.w.cover.Hit("once/retried")
		}
		if op.res.Replayed {
			h.w.cover.Hit("once/replayed")
		}
		h.open--
		next()
	})
}

var errSimLost = errors.New("the connection was lost")

// propose is kvstore.propose, with its waits done by the world. It notes what
// the client learns, then calls done.
func (h *simHistory) propose(n *simNode, op *simOp, timeout time.Duration, done func(error)) {
	s := n.s
	over := false
	end := func(r kv.Result, err error) {
		if over {
			return
		}
		over = true
		op.ret = h.w.q.Now()
		h.settle(op, r, err)
		h.w.trace.Add(sim.Line{At: op.ret, Who: n.m.id, What: op.kind, A: uint64(op.client + 1), B: uint64(op.revision), C: uint64(op.outcome), Text: op.key})
		done(err)
	}
	if s.diskLow.Load() {
		end(kv.Result{}, errDiskLow)
		return
	}
	if op.cmd.TTL > 0 {
		op.cmd.Wall = n.clock().UnixMilli()
	}
	p := s.newProposal(op.cmd)
	select {
	case n.n.proposeC <- p:
	default:
		end(kv.Result{}, s.notProposed())
		return
	}
	h.w.wake(n)
	n.wait(func() bool {
		if over {
			return true
		}
		select {
		case <-p.done:
			end(p.outcome())
			return true
		default:
			return false
		}
	}, func() { end(kv.Result{}, errSimLost) })
	h.later(n, timeout, func() {
		if !over {
			end(s.abandon(p))
		}
	})
}

// later runs f in the process after d, if it is still there.
func (h *simHistory) later(n *simNode, d time.Duration, f func()) {
	h.w.q.After(d, func() {
		switch {
		case n.m.node != n:
		case n.paused > h.w.q.Now():
			h.later(n, n.paused-h.w.q.Now(), f)
		default:
			f()
		}
	})
}

// settle notes the answer of a write: as errors.go has it, every error but one
// promises that nothing has happened.
func (h *simHistory) settle(op *simOp, r kv.Result, err error) {
	switch {
	case err == nil:
		if r.Duplicate {
			h.w.failf("%s: answered with the result of a batch that was skipped", op.kind)
		}
		op.outcome, op.res, op.revision = simDone, r, r.Revision
		op.changed = r.Refused == kv.NotRefused && (op.cmd.Op == kv.OpPut || op.cmd.Op == kv.OpTxn || r.Deleted > 0)
		h.lastRev = max(h.lastRev, r.Revision)
		h.w.cover.Hit("write/done")
	case errors.Is(err, errCommitTimeout), errors.Is(err, errSimLost):
		op.outcome = simOpen
		h.w.cover.Hit("write/unknown")
	default:
		op.outcome = simNever
		h.w.cover.Hit("write/" + err.Error())
	}
}

// linearize is kvstore.linearize without the wait.
func (h *simHistory) linearize(n *simNode, timeout time.Duration, done func(error)) {
	b := n.n.reads.join()
	h.w.wake(n)
	over := false
	end := func(err error) {
		if !over {
			over = true
			done(err)
		}
	}
	n.wait(func() bool {
		if over {
			return true
		}
		select {
		case <-b.done:
			end(b.err)
			return true
		default:
			return false
		}
	}, func() { end(errSimLost) })
	h.later(n, timeout, func() { end(errReadTimeout) })
}

// read looks at a span of keys.
func (h *simHistory) read(n *simNode, client int, kind string, span kv.Span, o readOptions, timeout time.Duration, done func(error)) {
	op := &simOp{client: client, kind: kind, call: h.w.q.Now(), span: span, stale: o.stale || o.revision > 0}
	look := func(err error) {
		if err == nil {
			o := o
			o.stale = true // the waiting is done
			err = n.s.read(context.Background(), o, h.rand.Chance(0.2), func(v *kv.View) error {
				op.revision = v.Revision()
				v.Ascend(span, func(e kv.Entry) bool { op.entries = append(op.entries, e); return true })
				return nil
			})
			if errors.Is(err, errFutureRevision) && h.lastRev > 0 && o.revision > 0 && !op.stale {
				h.w.failf("a linearizable read of revision %d: %v", o.revision, err)
			}
		}
		op.ret = h.w.q.Now()
		h.w.trace.Add(sim.Line{At: op.ret, Who: n.m.id, What: kind, A: uint64(client + 1), B: uint64(op.revision), C: uint64(len(op.entries)), Text: span.Start})
		if err == nil {
			op.outcome = simDone
			h.lastRev = max(h.lastRev, op.revision)
			h.ops = append(h.ops, op)
			h.w.cover.Hit("read/done")
		} else {
			h.w.cover.Hit("read/failed")
		}
		done(err)
	}
	if o.stale {
		look(nil)
		return
	}
	h.linearize(n, timeout, look)
}

// Time to live.

// simLease is one key that ends, and what is known of when it may.
type simLease struct {
	key   string
	ttl   time.Duration
	from  time.Duration // somebody applied it then, or later: it lives for ttl from here at least
	rev   int64         // of the put
	known bool          // the put was answered
	kept  time.Duration // when it was last told that it is kept alive
	blur  bool          // it was asked to be kept alive, and what came of that is not known
	gone  bool
}

func (h *simHistory) putTTL(n *simNode, client int, timeout time.Duration, done func(error)) {
	value := h.value()
	l := &simLease{key: "t/" + string(value), ttl: h.rand.Between(50*ms, 3*time.Second).Truncate(ms)}
	op := h.write(client, "put with ttl", l.key, &kv.Command{Op: kv.OpPut, Key: l.key, Value: value, TTL: l.ttl})
	h.propose(n, op, timeout, func(err error) {
		if err == nil {
			l.from, l.rev, l.known = h.shown[op.revision], op.revision, true
			h.leases = append(h.leases, l)
		}
		done(err)
	})
}

// grant makes a lease, attaches a key and keeps it alive for a while.
func (h *simHistory) grant(n *simNode, client int, next func()) {
	l := &simLease{ttl: h.rand.Between(300*ms, 3*time.Second).Truncate(ms)}
	op := h.write(client, "grant", "", &kv.Command{Op: kv.OpGrant, TTL: l.ttl})
	h.propose(n, op, time.Second, func(err error) {
		if err != nil {
			next()
			return
		}
		l.from = op.call // it was applied later than that
		value := h.value()
		l.key = "t/" + string(value)
		put := h.write(client, "put with lease", l.key, &kv.Command{Op: kv.OpPut, Key: l.key, Value: value, Lease: op.res.Lease.ID})
		h.onAny(put, time.Second, func(err error) {
			if err == nil && put.res.Refused == kv.NotRefused {
				l.rev, l.known = put.revision, true
				h.leases = append(h.leases, l)
				h.keepAlive(l, op.res.Lease.ID, client, 1+h.rand.IntN(4))
			} else if err == nil && put.res.Refused == kv.RefusedNoLease && h.tooEarly(l) {
				h.w.failf("lease %d of %v is gone %v after it was asked for", op.res.Lease.ID, l.ttl, h.w.q.Now()-l.from)
			}
			next()
		})
	})
}

func (h *simHistory) keepAlive(l *simLease, id int64, client, times int) {
	if times == 0 || h.stopped {
		return
	}
	h.w.q.After(h.rand.Between(0, l.ttl), func() {
		op := h.write(client, "keep alive", "", &kv.Command{Op: kv.OpKeepAlive, Lease: id})
		blur := l.blur // an attempt of unknown outcome may come at any time
		l.blur = true
		h.onAny(op, time.Second, func(err error) {
			switch {
			case err != nil:
			case op.res.Refused == kv.NotRefused:
				l.from, l.kept, l.blur = max(l.from, op.call), op.ret, blur
				h.w.cover.Hit("lease/kept alive")
			case h.tooEarly(l):
				h.w.failf("lease %d of %v is gone %v after it was last kept alive", id, l.ttl, h.w.q.Now()-l.from)
			}
			h.keepAlive(l, id, client, times-1)
		})
	})
}

// onAny proposes on some member.
func (h *simHistory) onAny(op *simOp, timeout time.Duration, done func(error)) {
	up := h.w.up()
	if len(up) == 0 {
		op.outcome = simNever
		done(errSimLost)
		return
	}
	h.propose(sim.Pick(h.rand, up).node, op, timeout, done)
}

// tooEarly says that a lease must be there: not even the fastest clock has
// measured its time.
func (h *simHistory) tooEarly(l *simLease) bool {
	return float64(h.w.q.Now()-l.from)*h.w.rate < float64(l.ttl)-float64(10*time.Microsecond)
}

// late: a cluster that has been healthy for a while ends what is due within a
// second, by the slowest clock. Half of healthyFor is for it to find a leader.
func (h *simHistory) late() {
	for _, l := range h.leases {
		due := max(l.from, l.kept, h.w.healAt+healthyFor/2) + time.Duration(float64(l.ttl)/(1-h.w.prof.rates)) + time.Second
		if !l.gone && !l.blur && h.w.q.Now() > due {
			h.w.failf("%s of %v, applied at %v, is still there", l.key, l.ttl, l.from)
		}
	}
}

// see looks at the leases in the state of a process, after it has applied something.
func (h *simHistory) see(n *simNode) {
	for top := int64(n.s.revision.At()); h.newest < top; {
		h.newest++
		h.shown[h.newest] = h.w.q.Now()
	}
	for _, l := range h.leases {
		if l.gone || int64(n.s.revision.At()) < l.rev {
			continue
		}
		if _, there := n.s.mu.state.Get(l.key); there {
			continue
		}
		l.gone = true
		if h.tooEarly(l) {
			h.w.failf("member %d: %s is gone %v after it was put or kept alive, its TTL is %v", n.m.id, l.key, h.w.q.Now()-l.from, l.ttl)
		}
		h.w.cover.Hit("lease/ended")
	}
}

// Watches.

type simWatcher struct {
	h         *simHistory
	id        int
	filter    watch.Filter
	started   bool
	first     int64 // what came up to this revision was before the watch
	delivered int64
	got       []kv.Event
	node      *simNode
	w         *watch.Watcher
}

// begin subscribes on some member, from where the watcher stopped: what
// watchStream does.
func (x *simWatcher) begin() {
	h := x.h
	again := func() { h.w.q.After(h.rand.Between(0, 200*ms), x.begin) }
	up := h.w.up()
	if len(up) == 0 {
		again()
		return
	}
	n := sim.Pick(h.rand, up).node
	h.linearize(n, time.Second, func(err error) {
		if err != nil {
			again()
			return
		}
		w, hist, _, err := n.s.subscribe(x.filter, false)
		if err != nil {
			h.w.failf("subscribe: %v", err)
		}
		switch {
		case !x.started:
			x.started, x.first, x.delivered = true, hist.Revision(), hist.Revision()
		case hist.Revision() < x.delivered:
			h.w.failf("member %d is at revision %d after a linearizable read, a watch was at %d before", n.m.id, hist.Revision(), x.delivered)
		case hist.Compacted() >= x.delivered+1:
			h.w.failf("member %d has forgotten revision %d, with a history of %d events at most", n.m.id, x.delivered+1, hist.Revision())
		default:
			hist.Events(x.delivered+1, func(e kv.Event) bool {
				if x.filter.Wants(&e) {
					x.got = append(x.got, e)
				}
				return true
			})
			x.delivered = hist.Revision()
			h.w.cover.Hit("watch/resumed")
		}
		x.node, x.w = n, w
		n.wait(func() bool { return x.w != w || x.take() }, func() {
			if x.w == w { // else the watch has gone on elsewhere
				x.w = nil
				again()
			}
		})
		if h.rand.Chance(0.5) {
			h.later(n, h.rand.Between(0, 4*time.Second), func() {
				if x.w == w && !h.stopped {
					x.take()
					x.leave()
				}
			})
		}
	})
}

func (x *simWatcher) leave() {
	if x.w != nil {
		x.w.Close()
		x.w = nil
		x.h.w.q.After(x.h.rand.Between(0, 300*ms), x.begin)
	}
}

// take empties the queue; true: the watch on this member is over.
func (x *simWatcher) take() bool {
	if x.w == nil {
		return true
	}
	if x.h.w.prof.watchQueue > 0 && !x.h.w.healed && x.h.rand.Chance(0.7) {
		return false // a slow reader
	}
	var batch [8]watch.Message
	for {
		n, st := x.w.Take(batch[:])
		for _, m := range batch[:n] {
			switch {
			case m.Revision <= x.delivered:
				x.h.w.failf("watch %d: revision %d after %d", x.id, m.Revision, x.delivered)
			case m.Revision > int64(x.node.s.revision.At()):
				x.h.w.failf("watch %d: revision %d, the store is at %d", x.id, m.Revision, x.node.s.revision.At())
			}
			x.got = append(x.got, m.Events...)
			x.delivered = m.Revision
		}
		if st.Delivered < x.delivered {
			x.h.w.failf("watch %d: delivered up to %d, says that it is %d", x.id, x.delivered, st.Delivered)
		}
		x.delivered = st.Delivered
		switch {
		case st.More:
		case st.Cut || st.Closed:
			x.h.w.cover.Hit("watch/cut")
			x.leave()
			return true
		default:
			return false
		}
	}
}
