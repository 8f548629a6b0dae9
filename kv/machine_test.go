package kv

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// machine drives a state and its twin, and the clones taken on the way.
type machine struct {
	state  *State
	twin   *model
	batch  Batch
	clones []cloned
}

type cloned struct {
	state   *State
	twin    *model
	hash    uint64
	history History
}

func (m *machine) next() uint64 { return m.twin.applied + 1 }

// setBounds makes the bounds small enough to be met.
func (m *machine) setBounds(s *State) {
	s.history.maxEvents, s.history.maxSize, s.leases.maxTickKeys = m.twin.maxEvents, m.twin.maxSize, m.twin.maxTickKeys
	s.once.maxKept, s.once.maxTombs, s.once.maxBytes, s.once.maxTickKept = m.twin.maxKept, m.twin.maxTombs, m.twin.maxBytes, m.twin.maxTickKept
}

func newMachine(t *rapid.T) *machine {
	m := &machine{state: NewState()}
	m.twin = newModel(m.state)
	m.twin.maxEvents = rapid.SampledFrom([]int{20, 300, 1000, maxEvents}).Draw(t, "max events")
	m.twin.maxSize = rapid.SampledFrom([]int64{5000, maxEventSize}).Draw(t, "max event size")
	m.twin.maxTickKeys = rapid.IntRange(1, 8).Draw(t, "max tick keys")
	m.twin.maxKept = rapid.IntRange(1, 12).Draw(t, "max kept")
	m.twin.maxBytes = rapid.SampledFrom([]int64{100, 400, maxKeptBytes}).Draw(t, "max kept bytes")
	m.twin.maxTickKept = rapid.IntRange(1, 6).Draw(t, "max tick kept")
	m.twin.maxTombs = rapid.IntRange(0, 5).Draw(t, "max tombstones")
	m.setBounds(m.state)
	return m
}

func drawKey(t *rapid.T) string {
	// Few keys, so that they meet again; many enough for a few tree nodes.
	if rapid.IntRange(0, 3).Draw(t, "known") > 0 {
		return rapid.SampledFrom([]string{
			"a", "b", "\x00", "/\xff\xfe", "a\x00", "aa", "a/", "a/1", "a/1/2", "a/2", "b//", "b/1/1", "b/1/2", "\xff", "\xff\xff",
		}).Draw(t, "key")
	}
	return fmt.Sprintf("k%03d", rapid.IntRange(0, 199).Draw(t, "key"))
}

func pickSpan(t *rapid.T) Span {
	switch rapid.IntRange(0, 4).Draw(t, "span") {
	case 0:
		return Span{}
	case 1, 2:
		return Prefix(rapid.SampledFrom([]string{"", "a", "a/", "b/", "b/1/", "k", "k1", "k19", "\xff"}).Draw(t, "prefix"))
	case 3:
		return SingleKey(drawKey(t))
	}
	return Span{drawKey(t), drawKey(t)}
}

func pickTTL(t *rapid.T) time.Duration {
	return time.Duration(rapid.SampledFrom([]int{1, 1000, 5000, 20_000, 700_000}).Draw(t, "ttl")) * time.Millisecond
}

func drawValue(t *rapid.T) []byte { return rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "value") }

// lease prefers ids that are there.
func (m *machine) lease(t *rapid.T) int64 {
	return max(1, m.twin.lastLease+rapid.SampledFrom([]int64{0, 0, 0, -1, -1, -2, -4, 1}).Draw(t, "lease"))
}

// owner draws what a put says of leases.
func (m *machine) owner(t *rapid.T) (ttl time.Duration, lease int64) {
	switch rapid.IntRange(0, 4).Draw(t, "owner") {
	case 0:
		return pickTTL(t), 0
	case 1:
		return 0, m.lease(t)
	}
	return 0, 0
}

// near draws a revision that may matter to a key.
func (m *machine) near(t *rapid.T, key string) int64 {
	e := m.twin.entries[key]
	base := rapid.SampledFrom([]int64{e.ModRevision, e.CreateRevision, e.Version}).Draw(t, "base")
	return max(0, base+rapid.SampledFrom([]int64{0, 0, 0, 1, -1}).Draw(t, "off"))
}

func (m *machine) drawIf(t *rapid.T, key string) (p Precondition) {
	p.Kind = Check(rapid.SampledFrom([]int{0, 0, 0, 1, 2, 3, 4}).Draw(t, "if"))
	if p.Kind == CheckAnyOf || p.Kind == CheckNoneOf {
		for range rapid.IntRange(1, 3).Draw(t, "revisions") {
			p.Revisions = append(p.Revisions, m.near(t, key))
		}
	}
	return p
}

func (m *machine) drawCommand(t *rapid.T) Command {
	c := Command{Op: rapid.SampledFrom([]Op{
		OpPut, OpPut, OpPut, OpPut, OpDelete, OpDelete, OpDeleteRange, OpTxn, OpTxn, OpGrant, OpKeepAlive, OpRevoke, OpTick, OpTick,
	}).Draw(t, "op")}
	switch c.Op {
	case OpPut:
		c.Key, c.Value = drawKey(t), drawValue(t)
		c.TTL, c.Lease = m.owner(t)
		c.If = m.drawIf(t, c.Key)
	case OpDelete:
		c.Key = drawKey(t)
		c.If = m.drawIf(t, c.Key)
	case OpDeleteRange:
		c.Span = pickSpan(t)
	case OpTxn:
		c.Txn = m.drawTxn(t)
	case OpGrant:
		c.TTL = pickTTL(t)
	case OpKeepAlive:
		c.Lease = m.lease(t)
		if rapid.Bool().Draw(t, "other ttl") {
			c.TTL = pickTTL(t)
		}
	case OpRevoke:
		c.Lease = m.lease(t)
	case OpTick:
		c.Tick = m.drawTick(t)
		return c
	}
	if c.Op != OpDelete && c.Op != OpDeleteRange {
		c.Wall = rapid.Int64Range(0, 1000).Draw(t, "wall")
	}
	if rapid.IntRange(0, 2).Draw(t, "once") == 0 {
		c.Once = &Once{Key: fmt.Sprint("id", rapid.IntRange(0, 15).Draw(t, "once key"))}
		c.Once.Fingerprint[15] = byte(rapid.SampledFrom([]int{0, 0, 0, 0, 1}).Draw(t, "fingerprint"))
	}
	return c
}

func (m *machine) drawTick(t *rapid.T) Tick {
	step := rapid.SampledFrom([]int64{-1000, 0, 1, 999, 1000, 5000, 10_000, 60_000, 600_000}).Draw(t, "step")
	return Tick{
		Clock: max(0, m.twin.clock+step),
		Wall:  rapid.Int64Range(0, 1000).Draw(t, "wall"),
		Seen:  uint64(max(0, int64(m.twin.applied)-rapid.SampledFrom([]int64{0, 0, 1, 3}).Draw(t, "unseen"))),
		Term:  7,
	}
}

// drawTxn draws until the result is a valid one, which most are.
func (m *machine) drawTxn(t *rapid.T) *Txn {
	txn := &Txn{Brief: rapid.Bool().Draw(t, "brief"), Each: rapid.IntRange(0, 3).Draw(t, "each") == 0}
	txn.Then = m.drawBranch(t, txn.Each)
	if txn.Each {
		return txn
	}
	txn.Else = m.drawBranch(t, false)
	for range rapid.IntRange(0, 2).Draw(t, "compares") {
		c := Compare{Key: drawKey(t), Target: Target(rapid.IntRange(1, 5).Draw(t, "target")), Op: CompareOp(rapid.IntRange(1, 4).Draw(t, "operator"))}
		switch c.Target {
		case TargetExists:
			c.Number, c.Op = rapid.Int64Range(0, 1).Draw(t, "number"), min(c.Op, NotEqual)
		case TargetValue:
			c.Value = rapid.SampledFrom([][]byte{m.twin.entries[c.Key].Value, drawValue(t)}).Draw(t, "compared")
		default:
			c.Number = m.near(t, c.Key)
		}
		txn.If = append(txn.If, c)
	}
	return txn
}

func (m *machine) drawBranch(t *rapid.T, each bool) (ops []TxnOp) {
	for range rapid.IntRange(0, 6).Draw(t, "ops") {
		o := TxnOp{Op: rapid.SampledFrom([]Op{OpPut, OpPut, OpPut, OpDeleteRange, OpGet}).Draw(t, "txn op")}
		switch {
		case o.Op == OpPut:
			o.Key, o.Value = drawKey(t), drawValue(t)
			o.TTL, o.Lease = m.owner(t)
			o.CreateOnly = rapid.IntRange(0, 3).Draw(t, "create only") == 0
		case o.Op == OpGet && !each:
			o.Span, o.Limit, o.KeysOnly = pickSpan(t), rapid.IntRange(0, 4).Draw(t, "limit"), rapid.Bool().Draw(t, "keys only")
		default:
			o.Op, o.Span = OpDeleteRange, pickSpan(t)
		}
		// What would break a rule is left out.
		if more := append(slices.Clone(ops), o); each || validBranch(more) == nil {
			ops = more
		}
	}
	return ops
}

// drawIdentity prefers what is near an edge: the highest Seq, the far end of the
// window, the recorded Boot.
func (m *machine) drawIdentity(t *rapid.T) (node, boot, seq uint64) {
	node = rapid.Uint64Range(0, 3).Draw(t, "node")
	member := m.twin.members[node]
	boot = uint64(max(int64(member.boot)+rapid.SampledFrom([]int64{0, 0, 0, 0, 0, 0, 1, -1}).Draw(t, "boot"), 0))
	around := rapid.SampledFrom([]int64{1, 1, 1, 1, 0, -5, -ReplayWindow, ReplayWindow}).Draw(t, "around")
	seq = uint64(max(int64(member.high)+around+rapid.Int64Range(-2, 2).Draw(t, "off"), 1))
	return node, boot, seq
}

// applyBatch takes the whole way: encode, decode, apply.
func (m *machine) applyBatch(t *rapid.T) {
	node, boot, seq := m.drawIdentity(t)
	commands := make([]Command, rapid.IntRange(0, 6).Draw(t, "commands"))
	var encoded [][]byte
	for i := range commands {
		commands[i] = m.drawCommand(t)
		encoded = append(encoded, AppendCommand(nil, &commands[i]))
	}
	data := AppendBatch(nil, node, boot, seq, encoded...)
	if err := DecodeBatch(data, &m.batch); err != nil {
		t.Fatal(err)
	}
	index := m.next()
	got := m.state.Apply(index, &m.batch, nil)
	want := m.twin.apply(index, &Batch{Node: node, Boot: boot, Seq: seq, Commands: commands})
	clear(data) // the state must not depend on it any more
	if got, want := resultsText(got), resultsText(want); got != want {
		t.Fatalf("results of node %d boot %d seq %d\n got %s\nwant %s", node, boot, seq, got, want)
	}
}

func (m *machine) load(t *rapid.T) {
	// Enough keys at once for splits and merges of tree nodes.
	op := rapid.SampledFrom([]Op{OpPut, OpDelete}).Draw(t, "op")
	ttl := rapid.SampledFrom([]time.Duration{0, 0, time.Second}).Draw(t, "ttl")
	b := Batch{}
	for i := range 200 {
		c := Command{Op: op, Key: fmt.Sprintf("k%03d", i*7%200)}
		if op == OpPut {
			c.TTL = ttl
		}
		b.Commands = append(b.Commands, c)
	}
	index := m.next()
	m.state.Apply(index, &b, nil)
	m.twin.apply(index, &b)
}

func (m *machine) setApplied(*rapid.T) {
	index := m.next()
	m.state.SetApplied(index)
	m.twin.applied = index
}

func (m *machine) forget(t *rapid.T) {
	node := rapid.Uint64Range(1, 4).Draw(t, "node")
	m.state.ForgetNode(node)
	delete(m.twin.members, node)
}

func (m *machine) clone(t *rapid.T) {
	c := cloned{m.state.Clone(), m.twin.clone(), m.state.Hash(), m.state.History()}
	if rapid.Bool().Draw(t, "go on with the clone") {
		c.state, m.state = m.state, c.state
	}
	m.clones = append(m.clones, c)
	if len(m.clones) > 3 {
		m.clones = m.clones[1:]
	}
}

func (m *machine) snapshot(t *rapid.T) {
	header := rapid.SliceOfN(rapid.Byte(), 0, 10).Draw(t, "header")
	var file bytes.Buffer
	if err := WriteSnapshot(&file, header, m.state); err != nil {
		t.Fatal(err)
	}
	if _, err := VerifySnapshot(bytes.NewReader(file.Bytes())); err != nil {
		t.Fatal(err)
	}
	got, restored, err := ReadSnapshot(bytes.NewReader(file.Bytes()))
	if err != nil || !bytes.Equal(got, header) || restored.Hash() != m.state.Hash() {
		t.Fatalf("header %x, hash %v, error %v", got, err == nil && restored.Hash() == m.state.Hash(), err)
	}
	m.setBounds(restored)
	m.state = restored
}

// scrub is a step of the walk over entries and events, which goes on while the state changes.
func (m *machine) scrub(t *rapid.T) {
	if err := m.state.Scrub(rapid.IntRange(1, 40).Draw(t, "entries"), 1<<20); err != nil {
		t.Fatal(err)
	}
}

// drawRevision draws one that can be viewed; the 0 of an empty store cannot later.
func (m *machine) drawRevision(t *rapid.T) int64 {
	return rapid.Int64Range(max(m.twin.compacted, min(1, m.twin.revision)), m.twin.revision).Draw(t, "revision")
}

// view compares a random older revision with what all events ever add up to.
func (m *machine) view(t *rapid.T) {
	revision := m.drawRevision(t)
	want := m.twin.at(revision)
	fresh := func() *View {
		v, err := m.state.View(revision)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	span := pickSpan(t)
	inSpan := slices.DeleteFunc(slices.Clone(want), func(e Entry) bool { return !span.Contains(e.Key) })
	v := fresh()
	for range 3 { // before and after the view knows all that came later
		key := drawKey(t)
		i := slices.IndexFunc(want, func(e Entry) bool { return e.Key == key })
		got, ok := v.Get(key)
		if ok != (i >= 0) || ok && fmt.Sprint(got) != fmt.Sprint(want[i]) {
			t.Fatalf("revision %d: %q is %v, %v", revision, key, got, ok)
		}
		if n := v.Count(span); n != len(inSpan) {
			t.Fatalf("revision %d: %+v counts %d, want %d", revision, span, n, len(inSpan))
		}
	}
	var got []Entry
	fresh().Ascend(span, func(e Entry) bool {
		got = append(got, e)
		return true
	})
	if fmt.Sprint(got) != fmt.Sprint(inSpan) {
		t.Fatalf("revision %d: %+v holds\n%v\nwant\n%v", revision, span, got, inSpan)
	}
	if _, err := m.state.View(m.twin.revision + 1); !errors.Is(err, ErrFuture) {
		t.Fatal(err)
	}
	if _, err := m.state.View(m.twin.compacted - 1); m.twin.compacted > 1 && !errors.Is(err, ErrCompacted) {
		t.Fatal(err)
	}
}

// list walks all pages of a random query.
func (m *machine) list(t *rapid.T) {
	revision := m.drawRevision(t)
	prefix := rapid.SampledFrom([]string{"", "a", "a/", "b/", "k", "k1", "\xff"}).Draw(t, "prefix")
	q := Query{
		Span: Prefix(prefix), Prefix: prefix,
		Reverse:   rapid.Bool().Draw(t, "reverse"),
		Delimiter: rapid.SampledFrom([]string{"", "/", "/", "0", "1", "//", "\xff"}).Draw(t, "delimiter"),
		Limit:     rapid.SampledFrom([]int{1, 2, 3, 7, 50, 1000}).Draw(t, "limit"),
		MaxBytes:  rapid.SampledFrom([]int64{0, 1, 10, 100, 1 << 20}).Draw(t, "max bytes"),
		KeysOnly:  rapid.Bool().Draw(t, "keys only"),
	}
	if rapid.Bool().Draw(t, "anywhere") {
		q.After, q.Rolled = drawKey(t), rapid.Bool().Draw(t, "rolled")
	}
	v, err := m.state.View(revision)
	if err != nil {
		t.Fatal(err)
	}
	entries := m.twin.at(revision)
	for {
		got, want := v.List(q), list(revision, entries, q)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("revision %d, query %+v\n got %+v\nwant %+v", revision, q, got, want)
		}
		if !got.More {
			return
		}
		q.After, q.Rolled = got.Last, got.LastRolled
	}
}

// history compares parts of it; check compares the whole.
func (m *machine) history(t *rapid.T) {
	h := m.state.History()
	from := rapid.Int64Range(0, m.twin.revision+1).Draw(t, "from")
	limit := rapid.IntRange(1, 5).Draw(t, "limit")
	var got, want []Event
	h.Events(from, func(e Event) bool {
		got = append(got, e)
		return len(got) < limit
	})
	for _, e := range m.twin.events {
		if e.Revision > m.twin.compacted && e.Revision >= from && len(want) < limit {
			want = append(want, e)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("from %d\n got %v\nwant %v", from, got, want)
	}
	key := drawKey(t)
	got, want = nil, nil
	h.Back(key, func(e Event) bool {
		got = append(got, e)
		return len(got) < limit
	})
	for _, e := range slices.Backward(m.twin.events) {
		if e.Revision > m.twin.compacted && e.Entry.Key == key && len(want) < limit {
			want = append(want, e)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("back from %q\n got %v\nwant %v", key, got, want)
	}
}

func (m *machine) check(t *rapid.T) {
	if got, want := stateText(m.state), m.twin.text(); got != want {
		t.Fatalf("state\n%s\ntwin\n%s", got, want)
	}
	if err := m.state.Check(); err != nil {
		t.Fatal(err)
	}
	if len(m.clones) > 0 {
		// One clone a step, for the time it takes; each has its turn.
		c := m.clones[m.twin.applied%uint64(len(m.clones))]
		if c.state.Hash() != c.hash || stateText(c.state) != c.twin.text() {
			t.Fatal("a clone has changed")
		}
		if err := c.state.Check(); err != nil {
			t.Fatalf("clone: %v", err)
		}
		n := 0
		c.history.Events(0, func(e Event) bool {
			n++
			return true
		})
		if n != c.state.history.count {
			t.Fatalf("a history has changed to %d events from %d", n, c.state.history.count)
		}
	}
}

func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newMachine(t)
		t.Repeat(map[string]func(*rapid.T){
			"apply":      m.applyBatch,
			"applyAgain": m.applyBatch, // again, to be drawn more often
			"applyMore":  m.applyBatch,
			"load":       m.load,
			"setApplied": m.setApplied,
			"forget":     m.forget,
			"clone":      m.clone,
			"snapshot":   m.snapshot,
			"scrub":      m.scrub,
			"view":       m.view,
			"list":       m.list,
			"history":    m.history,
			"":           m.check,
		})
	})
}
