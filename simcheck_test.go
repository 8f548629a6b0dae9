package main

import (
	"fmt"
	"math"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"

	"pontoon/kv"
)

// The verdict.

// simTimeline is what the store says of itself in the end.
type simTimeline struct {
	events []kv.Event
	keys   map[string][]kv.Event
	at     map[int64][]kv.Event
}

// get is the entry of key at revision; ModRevision 0: none.
func (t *simTimeline) get(key string, revision int64) kv.Entry {
	es := t.keys[key]
	i := sort.Search(len(es), func(i int) bool { return es[i].Revision > revision })
	if i == 0 || es[i-1].Deleted {
		return kv.Entry{}
	}
	return es[i-1].Entry
}

// check holds every answer against the history of the store.
func (h *simHistory) check() {
	t := &simTimeline{keys: map[string][]kv.Event{}, at: map[int64][]kv.Event{}}
	st := h.w.leader().node.s.mu.state
	if err := st.Check(); err != nil {
		h.w.failf("the state in the end: %v", err)
	}
	if c := st.History().Compacted(); c != 0 {
		h.w.failf("history begins after revision %d: the run is too long to be checked", c)
	}
	st.History().Events(1, func(e kv.Event) bool {
		t.events = append(t.events, e)
		t.keys[e.Entry.Key] = append(t.keys[e.Entry.Key], e)
		t.at[e.Revision] = append(t.at[e.Revision], e)
		return true
	})
	h.checkEvents(t)
	for _, op := range h.ops {
		if op.outcome == simDone {
			h.checkAnswer(op, t)
		}
	}
	h.checkOrder(t)
	for _, x := range h.watchers {
		x.check(t)
	}
	h.checkRegisters()
}

// checkEvents: every event has one request behind it, which was not denied, and
// none came before its request.
func (h *simHistory) checkEvents(t *simTimeline) {
	writers := map[string]*simOp{}
	for _, op := range h.ops {
		for _, v := range op.writes() {
			writers[v] = op
		}
	}
	seen := map[string]int64{}
	for _, e := range t.events {
		if e.Deleted {
			continue
		}
		id := e.Entry.Key + "=" + string(e.Entry.Value)
		op := writers[id]
		switch {
		case op == nil:
			h.w.failf("revision %d: nobody asked for %s", e.Revision, id)
		case op.outcome == simNever:
			h.w.failf("revision %d: the request for %s (%s) was told that it did not happen", e.Revision, id, op.kind)
		case seen[id] != 0:
			h.w.failf("%s (%s) happened at revision %d and again at %d", id, op.kind, seen[id], e.Revision)
		}
		seen[id] = e.Revision
	}
	// Deletions have no value to know them by; their number is bounded.
	deletes := map[string]int{}
	for _, op := range h.ops {
		if op.cmd != nil && op.cmd.Op == kv.OpDelete && op.outcome != simNever && (op.outcome == simOpen || op.changed) {
			deletes[op.key]++
		}
	}
	for key, es := range t.keys { // order: any one that is wrong will do
		n := 0
		for _, e := range es {
			if e.Deleted {
				n++
			}
		}
		if strings.HasPrefix(key, "p/") && n > deletes[key] {
			h.w.failf("%s was deleted %d times, by %d requests", key, n, deletes[key])
		}
	}
}

// writes are the key=value pairs that a request may put.
func (op *simOp) writes() (out []string) {
	switch {
	case op.cmd == nil:
	case op.cmd.Op == kv.OpPut:
		out = append(out, op.cmd.Key+"="+string(op.cmd.Value))
	case op.cmd.Op == kv.OpTxn:
		for _, o := range slices.Concat(op.cmd.Txn.Then, op.cmd.Txn.Else) {
			if o.Op == kv.OpPut {
				out = append(out, o.Key+"="+string(o.Value))
			}
		}
	}
	return out
}

// checkAnswer: what the request was told is true of the revision it was told.
func (h *simHistory) checkAnswer(op *simOp, t *simTimeline) {
	fail := func(format string, a ...any) {
		h.w.failf("%s of %q by client %d at %v, answered %v with revision %d: %s", op.kind, op.key, op.client, op.call, op.ret, op.revision, fmt.Sprintf(format, a...))
	}
	same := func(a, b kv.Entry) bool {
		return a.ModRevision == b.ModRevision && a.CreateRevision == b.CreateRevision && a.Version == b.Version && string(a.Value) == string(b.Value)
	}
	if op.cmd == nil {
		var want []string
		for key := range t.keys { // order: sorted below
			if op.span.Contains(key) && t.get(key, op.revision).ModRevision != 0 {
				want = append(want, key)
			}
		}
		slices.Sort(want)
		if len(want) != len(op.entries) {
			fail("%d entries, there were %d", len(op.entries), len(want))
		}
		for i, e := range op.entries {
			if e.Key != want[i] || !same(e, t.get(e.Key, op.revision)) {
				fail("found %q = %q of revision %d, there was %+v", e.Key, e.Value, e.ModRevision, t.get(want[i], op.revision))
			}
		}
		return
	}
	c, r := op.cmd, &op.res
	before := op.revision // at which the request looked
	if op.changed {
		before--
	}
	switch {
	case c.Op == kv.OpPut && r.Refused == kv.NotRefused:
		e := t.get(c.Key, op.revision)
		if len(t.at[op.revision]) != 1 || e.ModRevision != op.revision || string(e.Value) != string(c.Value) {
			fail("the store has %+v there", e)
		}
		if !h.meets(c, t.get(c.Key, before)) {
			fail("its condition did not hold of %+v", t.get(c.Key, before))
		}
	case c.Op == kv.OpPut && r.Refused == kv.RefusedCondition:
		if e := t.get(c.Key, op.revision); h.meets(c, e) || !same(e, r.Entry) && r.Entry.Value != nil {
			fail("refused over %+v, there was %+v", r.Entry, e)
		}
	case c.Op == kv.OpDelete:
		if was := t.get(c.Key, before); (was.ModRevision != 0) != (r.Deleted == 1) || r.Deleted == 1 && t.get(c.Key, op.revision).ModRevision != 0 {
			fail("deleted %d, there was %+v", r.Deleted, was)
		}
	case c.Op == kv.OpDeleteRange:
		if n := len(t.at[op.revision]); op.changed && int64(n) != r.Deleted {
			fail("deleted %d, the store says %d", r.Deleted, n)
		}
	case c.Op == kv.OpTxn && c.Txn.Each:
		for i := range c.Txn.Then {
			o := &c.Txn.Then[len(c.Txn.Then)-1-i]
			if e := t.get(o.Key, op.revision-int64(i)); e.ModRevision != op.revision-int64(i) || string(e.Value) != string(o.Value) {
				fail("the store has %+v for line %d from the end", e, i)
			}
		}
	case c.Op == kv.OpTxn:
		cmp := c.Txn.If[0]
		if held := t.get(cmp.Key, before).ModRevision < cmp.Number; held != r.Txn.Succeeded {
			fail("succeeded %v, its comparison %v", r.Txn.Succeeded, held)
		}
		ops := c.Txn.Then
		if !r.Txn.Succeeded {
			ops = c.Txn.Else
		}
		for _, o := range ops {
			if o.Op == kv.OpPut {
				if e := t.get(o.Key, op.revision); e.ModRevision != op.revision || string(e.Value) != string(o.Value) {
					fail("the store has %+v", e)
				}
			}
		}
	}
}

// meets is State.meets, said once more.
func (h *simHistory) meets(c *kv.Command, e kv.Entry) bool {
	switch c.If.Kind {
	case kv.CheckExists:
		return e.ModRevision != 0
	case kv.CheckAbsent:
		return e.ModRevision == 0
	case kv.CheckAnyOf:
		return slices.Contains(c.If.Revisions, e.ModRevision) && e.ModRevision != 0
	case kv.CheckNoneOf:
		return !slices.Contains(c.If.Revisions, e.ModRevision)
	}
	return true
}

// checkOrder: a request that began after an answer sees at least the revision of
// that answer, and changes a later one. A request of unknown outcome that did
// happen is known by its value.
func (h *simHistory) checkOrder(t *simTimeline) {
	revisions := map[string]int64{}
	for _, e := range t.events {
		if !e.Deleted {
			revisions[e.Entry.Key+"="+string(e.Entry.Value)] = e.Revision
		}
	}
	var calls, rets []*simOp
	for _, op := range h.ops {
		if op.outcome == simDone {
			rets = append(rets, op)
		} else if op.outcome == simOpen && op.cmd != nil {
			for _, v := range op.writes() {
				if rev := revisions[v]; rev != 0 {
					op.revision, op.changed = rev, true
				}
			}
		}
		if op.revision != 0 && !op.stale {
			calls = append(calls, op)
		}
	}
	slices.SortStableFunc(calls, func(a, b *simOp) int { return int(a.call - b.call) })
	slices.SortStableFunc(rets, func(a, b *simOp) int { return int(a.ret - b.ret) })
	var newest int64
	var by *simOp
	for i := 0; len(calls) > 0; calls = calls[1:] {
		op := calls[0]
		for ; i < len(rets) && rets[i].ret < op.call; i++ {
			if rets[i].revision > newest {
				newest, by = rets[i].revision, rets[i]
			}
		}
		if op.revision < newest || op.changed && op.revision == newest {
			h.w.failf("%s by client %d at %v has revision %d; %s, answered at %v before, had %d", op.kind, op.client, op.call, op.revision, by.kind, by.ret, newest)
		}
	}
}

// check: the watch has seen exactly what happened.
func (x *simWatcher) check(t *simTimeline) {
	i := 0
	for _, e := range t.events {
		if e.Revision <= x.first || e.Revision > x.delivered || !x.filter.Wants(&e) {
			continue
		}
		if i == len(x.got) {
			x.h.w.failf("watch %d has missed revision %d of %s", x.id, e.Revision, e.Entry.Key)
		}
		g := x.got[i]
		if g.Revision != e.Revision || g.Deleted != e.Deleted || g.Entry.Key != e.Entry.Key || string(g.Entry.Value) != string(e.Entry.Value) || g.Prev.ModRevision != e.Prev.ModRevision {
			x.h.w.failf("watch %d got %+v where the store has %+v", x.id, g, e)
		}
		i++
	}
	if i < len(x.got) {
		x.h.w.failf("watch %d got %+v, which the store does not have", x.id, x.got[i])
	}
}

type simRegisterOp struct {
	key, value string
	write      bool
}

// simRegister is a model of one key that knows nothing of revisions.
var simRegister = porcupine.Model{
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		if in := input.(simRegisterOp); in.write {
			return true, in.value
		}
		return state == output, state
	},
	Equal: func(a, b any) bool { return a == b },
}

func (h *simHistory) checkRegisters() {
	byKey := map[string][]porcupine.Operation{}
	for _, op := range h.ops {
		in, out := simRegisterOp{}, ""
		switch op.kind {
		case "get":
			in.key = op.span.Start
			if len(op.entries) > 0 {
				out = string(op.entries[0].Value)
			}
		case "put", "delete":
			in.key, in.write, in.value = op.key, true, string(op.cmd.Value)
		default:
			continue
		}
		ret := int64(op.ret)
		if op.outcome == simNever {
			continue
		} else if op.outcome == simOpen {
			ret = math.MaxInt64
		}
		byKey[in.key] = append(byKey[in.key], porcupine.Operation{ClientId: op.client, Input: in, Call: int64(op.call), Output: out, Return: ret})
	}
	for _, key := range []string{"p/a", "p/b", "p/c"} {
		switch porcupine.CheckOperationsTimeout(simRegister, byKey[key], 5*time.Second) {
		case porcupine.Illegal:
			h.w.failf("the history of %s is not linearizable", key)
		case porcupine.Unknown:
			h.w.cover.Hit("porcupine/gave up")
		}
	}
}
