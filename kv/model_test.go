package kv

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// model is the dumb twin of State: a plain map, and every batch ever applied.
type model struct {
	entries  map[string]Entry
	revision int64
	applied  uint64
	members  map[uint64]twinMember
}

type twinMember struct {
	boot, high uint64
	seen       map[uint64]bool
}

func newModel() *model {
	return &model{entries: map[string]Entry{}, members: map[uint64]twinMember{}}
}

func (m *model) clone() *model {
	c := *m
	c.entries = maps.Clone(m.entries)
	c.members = map[uint64]twinMember{}
	for node, member := range m.members {
		member.seen = maps.Clone(member.seen)
		c.members[node] = member
	}
	return &c
}

// duplicate follows the wording of the rule: an older boot, a batch seen, or
// one that lies ReplayWindow or more behind the highest.
func (m *model) duplicate(node, boot, seq uint64) bool {
	member, known := m.members[node]
	if known && boot < member.boot {
		return true
	}
	if !known || boot > member.boot {
		member = twinMember{boot: boot, seen: map[uint64]bool{}}
	}
	if member.seen[seq] || member.high >= ReplayWindow && seq <= member.high-ReplayWindow {
		m.members[node] = member
		return true
	}
	member.seen[seq] = true
	member.high = max(member.high, seq)
	m.members[node] = member
	return false
}

func (m *model) apply(index uint64, b *Batch) (results []Result) {
	m.applied = index
	if b.Node != 0 && m.duplicate(b.Node, b.Boot, b.Seq) {
		for range b.Commands {
			results = append(results, Result{Revision: m.revision, Duplicate: true})
		}
		return results
	}
	for _, c := range b.Commands {
		old, existed := m.entries[c.Key]
		r := Result{Existed: existed, Entry: old}
		if c.Op == OpPut {
			m.revision++
			e := Entry{Key: c.Key, Value: bytes.Clone(c.Value), CreateRevision: m.revision, ModRevision: m.revision, Version: 1}
			if existed {
				e.CreateRevision, e.Version = old.CreateRevision, old.Version+1
			}
			m.entries[c.Key] = e
			r.Entry = e
		} else if existed {
			m.revision++
			delete(m.entries, c.Key)
		}
		r.Revision = m.revision
		results = append(results, r)
	}
	return results
}

// text shows what a state and its twin must agree on.
func (m *model) text() string {
	var b bytes.Buffer
	size := 0
	for _, key := range slices.Sorted(maps.Keys(m.entries)) {
		fmt.Fprintf(&b, "%+v\n", m.entries[key])
		size += len(key) + len(m.entries[key].Value)
	}
	fmt.Fprintf(&b, "revision %d applied %d len %d bytes %d", m.revision, m.applied, len(m.entries), size)
	return b.String()
}

func stateText(s *State) string {
	var b bytes.Buffer
	s.Ascend("", func(e Entry) bool {
		fmt.Fprintf(&b, "%+v\n", e)
		return true
	})
	fmt.Fprintf(&b, "revision %d applied %d len %d bytes %d", s.Revision(), s.Applied(), s.Len(), s.Bytes())
	return b.String()
}

// machine drives a state and its twin, and the clones taken on the way.
type machine struct {
	state  *State
	twin   *model
	batch  Batch
	clones []cloned
}

type cloned struct {
	state *State
	twin  *model
	hash  uint64
}

func (m *machine) next() uint64 { return m.twin.applied + 1 }

func drawKey(t *rapid.T) string {
	// Few keys, so that they meet again; many enough for a few tree nodes.
	if rapid.Bool().Draw(t, "known") {
		return rapid.SampledFrom([]string{"a", "b", "\x00", "/\xff\xfe", "a\x00", "aa"}).Draw(t, "key")
	}
	return fmt.Sprintf("k%03d", rapid.IntRange(0, 199).Draw(t, "key"))
}

func drawCommands(t *rapid.T) []Command {
	commands := make([]Command, rapid.IntRange(0, 12).Draw(t, "commands"))
	for i := range commands {
		commands[i] = Command{Op: OpDelete, Key: drawKey(t)}
		if rapid.IntRange(0, 2).Draw(t, "put") > 0 {
			commands[i].Op = OpPut
			commands[i].Value = rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "value")
		}
	}
	return commands
}

// drawIdentity prefers what is near an edge: the highest Seq, the far end of the
// window, the recorded Boot.
func (m *machine) drawIdentity(t *rapid.T) (node, boot, seq uint64) {
	node = rapid.Uint64Range(0, 3).Draw(t, "node")
	member := m.twin.members[node]
	boot = uint64(max(int64(member.boot)+rapid.SampledFrom([]int64{0, 0, 0, 0, 0, 0, 1, -1}).Draw(t, "boot"), 0))
	around := rapid.SampledFrom([]int64{1, 1, 0, -5, -ReplayWindow, ReplayWindow}).Draw(t, "around")
	seq = uint64(max(int64(member.high)+around+rapid.Int64Range(-2, 2).Draw(t, "off"), 1))
	return node, boot, seq
}

// applyBatch takes the whole way: encode, decode, apply.
func (m *machine) applyBatch(t *rapid.T) {
	node, boot, seq := m.drawIdentity(t)
	commands := drawCommands(t)
	var encoded [][]byte
	for _, c := range commands {
		encoded = append(encoded, AppendCommand(nil, c))
	}
	data := AppendBatch(nil, node, boot, seq, encoded...)
	if err := DecodeBatch(data, &m.batch); err != nil {
		t.Fatal(err)
	}
	index := m.next()
	got := m.state.Apply(index, &m.batch, nil)
	want := m.twin.apply(index, &Batch{Node: node, Boot: boot, Seq: seq, Commands: commands})
	clear(data) // the state must not depend on it any more
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Fatalf("results of node %d boot %d seq %d\n got %+v\nwant %+v", node, boot, seq, got, want)
	}
}

func (m *machine) load(t *rapid.T) {
	// Enough keys at once for splits and merges of tree nodes.
	op := rapid.SampledFrom([]Op{OpPut, OpDelete}).Draw(t, "op")
	b := Batch{}
	for i := range 200 {
		b.Commands = append(b.Commands, Command{Op: op, Key: fmt.Sprintf("k%03d", i*7%200)})
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
	c := cloned{m.state.Clone(), m.twin.clone(), m.state.Hash()}
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
		t.Fatalf("header %x, hash %v, error %v", got, restored.Hash() == m.state.Hash(), err)
	}
	m.state = restored
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
	}
}

func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &machine{state: NewState(), twin: newModel()}
		t.Repeat(map[string]func(*rapid.T){
			"apply":      m.applyBatch,
			"applyAgain": m.applyBatch, // twice, to be drawn more often
			"load":       m.load,
			"setApplied": m.setApplied,
			"forget":     m.forget,
			"clone":      m.clone,
			"snapshot":   m.snapshot,
			"":           m.check,
		})
	})
}
