package kv

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
)

func put(key, value string) Command { return Command{Op: OpPut, Key: key, Value: []byte(value)} }

func del(key string) Command { return Command{Op: OpDelete, Key: key} }

// apply applies commands without an identity, at the next index, and checks
// the whole state afterwards.
func apply(t testing.TB, s *State, commands ...Command) []Result {
	t.Helper()
	results := s.Apply(s.Applied()+1, &Batch{Commands: commands}, nil)
	check(t, s)
	return results
}

func check(t testing.TB, s *State) {
	t.Helper()
	if err := s.Check(); err != nil {
		t.Fatal(err)
	}
}

// dump shows a state as text: one entry a line, and its totals.
func dump(s *State) string {
	var b strings.Builder
	s.Ascend("", func(e Entry) bool {
		fmt.Fprintf(&b, "%q=%q c%d m%d v%d l%d\n", e.Key, e.Value, e.CreateRevision, e.ModRevision, e.Version, e.Lease)
		return true
	})
	fmt.Fprintf(&b, "applied %d revision %d len %d bytes %d hash %016x", s.Applied(), s.Revision(), s.Len(), s.Bytes(), s.Hash())
	return b.String()
}

func TestApply(t *testing.T) {
	entry := func(key, value string, create, mod, version int64) Entry {
		return Entry{Key: key, Value: []byte(value), CreateRevision: create, ModRevision: mod, Version: version}
	}
	tests := []struct {
		name     string
		commands []Command
		want     []Result
		left     []Entry
	}{
		{"nothing", nil, nil, nil},
		{
			"create", []Command{put("a", "1")},
			[]Result{{Revision: 1, Entry: entry("a", "1", 1, 1, 1)}},
			[]Entry{entry("a", "1", 1, 1, 1)},
		},
		{
			"replace", []Command{put("a", "1"), put("b", "2"), put("a", "3")},
			[]Result{
				{Revision: 1, Entry: entry("a", "1", 1, 1, 1)},
				{Revision: 2, Entry: entry("b", "2", 2, 2, 1)},
				{Revision: 3, Entry: entry("a", "3", 1, 3, 2), Existed: true},
			},
			[]Entry{entry("a", "3", 1, 3, 2), entry("b", "2", 2, 2, 1)},
		},
		{
			"the same value again is a change", []Command{put("a", "1"), put("a", "1")},
			[]Result{
				{Revision: 1, Entry: entry("a", "1", 1, 1, 1)},
				{Revision: 2, Entry: entry("a", "1", 1, 2, 2), Existed: true},
			},
			[]Entry{entry("a", "1", 1, 2, 2)},
		},
		{
			"delete returns what was there", []Command{put("a", "1"), del("a")},
			[]Result{
				{Revision: 1, Entry: entry("a", "1", 1, 1, 1)},
				{Revision: 2, Entry: entry("a", "1", 1, 1, 1), Existed: true, Deleted: 1},
			},
			nil,
		},
		{
			"delete of an absent key takes no revision", []Command{del("a"), put("a", "1"), del("b"), put("c", "")},
			[]Result{
				{},
				{Revision: 1, Entry: entry("a", "1", 1, 1, 1)},
				{Revision: 1},
				{Revision: 2, Entry: entry("c", "", 2, 2, 1)},
			},
			[]Entry{entry("a", "1", 1, 1, 1), entry("c", "", 2, 2, 1)},
		},
		{
			"a key that comes back starts over", []Command{put("a", "1"), put("a", "2"), del("a"), put("a", "3")},
			[]Result{
				{Revision: 1, Entry: entry("a", "1", 1, 1, 1)},
				{Revision: 2, Entry: entry("a", "2", 1, 2, 2), Existed: true},
				{Revision: 3, Entry: entry("a", "2", 1, 2, 2), Existed: true, Deleted: 1},
				{Revision: 4, Entry: entry("a", "3", 4, 4, 1)},
			},
			[]Entry{entry("a", "3", 4, 4, 1)},
		},
		{
			"order is by byte, keys are any bytes",
			[]Command{put("\xff\xfe", "4"), put("a/", "2"), put("\x00", "1"), put("é", "3")},
			[]Result{
				{Revision: 1, Entry: entry("\xff\xfe", "4", 1, 1, 1)},
				{Revision: 2, Entry: entry("a/", "2", 2, 2, 1)},
				{Revision: 3, Entry: entry("\x00", "1", 3, 3, 1)},
				{Revision: 4, Entry: entry("é", "3", 4, 4, 1)},
			},
			[]Entry{entry("\x00", "1", 3, 3, 1), entry("a/", "2", 2, 2, 1), entry("é", "3", 4, 4, 1), entry("\xff\xfe", "4", 1, 1, 1)},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := NewState()
			got := apply(t, s, tt.commands...)
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("results\n got %+v\nwant %+v", got, tt.want)
			}
			var left []Entry
			var size int64
			s.Ascend("", func(e Entry) bool {
				left = append(left, e)
				size += int64(len(e.Key) + len(e.Value))
				return true
			})
			if !reflect.DeepEqual(left, tt.left) {
				t.Errorf("entries\n got %+v\nwant %+v", left, tt.left)
			}
			if s.Len() != len(tt.left) || s.Bytes() != size {
				t.Errorf("Len %d, Bytes %d; want %d, %d", s.Len(), s.Bytes(), len(tt.left), size)
			}
			for _, want := range tt.left {
				if e, ok := s.Get(want.Key); !ok || !reflect.DeepEqual(e, want) {
					t.Errorf("Get(%q) = %+v, %v", want.Key, e, ok)
				}
			}
			if e, ok := s.Get("absent"); ok || !reflect.DeepEqual(e, Entry{}) {
				t.Errorf("Get of an absent key = %+v, %v", e, ok)
			}
		})
	}
}

func TestApplyAppendsToResults(t *testing.T) {
	s := NewState()
	first := apply(t, s, put("a", "1"))
	all := s.Apply(2, &Batch{Commands: []Command{put("b", "2")}}, first)
	if len(all) != 2 || all[0].Revision != 1 || all[1].Revision != 2 {
		t.Fatalf("got %+v", all)
	}
}

func TestAppliedIndex(t *testing.T) {
	s := NewState()
	s.SetApplied(3)
	s.Apply(4, &Batch{Commands: []Command{del("absent")}}, nil)
	if s.Applied() != 4 || s.Revision() != 0 {
		t.Errorf("applied %d, revision %d", s.Applied(), s.Revision())
	}
	hash := s.Hash()
	s.SetApplied(5)
	if s.Applied() != 5 || s.Hash() != hash {
		t.Errorf("applied %d, hash changed %v", s.Applied(), s.Hash() != hash)
	}
}

// The batch aliases a log entry, which is reused or must be free to go.
func TestApplyCopies(t *testing.T) {
	c := put("key", "value")
	data := AppendBatch(nil, 0, 0, 0, AppendCommand(nil, &c))
	var b Batch
	if err := DecodeBatch(data, &b); err != nil {
		t.Fatal(err)
	}
	s := NewState()
	results := s.Apply(1, &b, nil)
	for i := range data {
		data[i] = 'X'
	}
	check(t, s)
	if e, ok := s.Get("key"); !ok || string(e.Value) != "value" || results[0].Entry.Key != "key" {
		t.Errorf("got %+v, %v, %+v", e, ok, results)
	}
}

func TestEntryValueHasNoRoom(t *testing.T) {
	s := NewState()
	e := apply(t, s, put("a", "1"))[0].Entry
	if cap(e.Value) != len(e.Value) {
		t.Errorf("an append to the value would write to the state's memory: cap %d", cap(e.Value))
	}
}

func TestApplyPanicsOnWhatDecodeRefuses(t *testing.T) {
	for name, b := range map[string]Batch{
		"op":        {Commands: []Command{put("a", "1"), {Op: 9, Key: "a"}}},
		"no op":     {Commands: []Command{{Key: "a"}}},
		"empty key": {Commands: []Command{put("", "1")}},
		"long key":  {Commands: []Command{put(strings.Repeat("k", MaxKeySize+1), "")}},
		"seq 0":     {Node: 1, Boot: 1},
		"no key":    {Commands: []Command{del("")}},
	} {
		t.Run(name, func(t *testing.T) {
			s := NewState()
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
				if s.Revision() != 0 || s.Applied() != 0 {
					t.Error("half applied")
				}
			}()
			s.Apply(1, &b, nil)
		})
	}
}

func TestAscend(t *testing.T) {
	s := NewState()
	for i := range 500 {
		apply(t, s, put(fmt.Sprintf("k%03d", i), ""))
	}
	collect := func(from string, limit int) (keys []string) {
		s.Ascend(from, func(e Entry) bool {
			keys = append(keys, e.Key)
			return len(keys) < limit
		})
		return keys
	}
	if got := collect("k497", 10); !slices.Equal(got, []string{"k497", "k498", "k499"}) {
		t.Errorf("from a key: %q", got)
	}
	if got := collect("k1230", 2); !slices.Equal(got, []string{"k124", "k125"}) {
		t.Errorf("from between two keys: %q", got)
	}
	if got := collect("l", 2); got != nil {
		t.Errorf("from behind the end: %q", got)
	}
	if got := collect("", 1000); len(got) != 500 || !slices.IsSorted(got) {
		t.Errorf("all: %d keys, sorted %v", len(got), slices.IsSorted(got))
	}
}

// admit is one batch as it arrives, and whether it is to take effect.
type admit struct {
	boot, seq uint64
	fresh     bool
}

func TestReplay(t *testing.T) {
	const w = ReplayWindow
	tests := []struct {
		name  string
		steps []admit
	}{
		{"once", []admit{{1, 1, true}, {1, 1, false}, {1, 1, false}}},
		{"overtaken is not a duplicate", []admit{{1, 3, true}, {1, 1, true}, {1, 2, true}, {1, 1, false}, {1, 2, false}, {1, 3, false}}},
		{"the edge of the window", []admit{{1, w, true}, {1, 1, true}, {1, w + 1, true}, {1, 1, false}, {1, 2, true}}},
		{"one behind the edge, never seen", []admit{{1, w + 1, true}, {1, 1, false}, {1, 2, true}}},
		{"two behind the edge, in a place that is free", []admit{{1, w + 2, true}, {1, 1, false}, {1, w + 1, true}}},
		{"the first skipped place was taken before", []admit{{1, 4, true}, {1, w + 3, true}, {1, 4, false}, {1, w + 5, true}, {1, w + 4, true}, {1, w + 4, false}}},
		{"a place is taken over", []admit{{1, 5, true}, {1, w + 4, true}, {1, w + 5, true}, {1, 5, false}, {1, w + 5, false}}},
		{"skipped places are free", []admit{{1, 1, true}, {1, 2, true}, {1, 3, true}, {1, w + 3, true}, {1, w + 1, true}, {1, w + 2, true}, {1, w + 2, false}}},
		{"a jump of exactly a window", []admit{{1, 7, true}, {1, 8, true}, {1, 8 + w, true}, {1, 9, true}, {1, 8, false}, {1, 7 + w, true}}},
		{"a far jump", []admit{{1, 9, true}, {1, 1 << 40, true}, {1, 10, false}, {1, 1<<40 - w, false}, {1, 1<<40 - w + 1, true}, {1, 1<<40 - 1, true}}},
		{"to the last number", []admit{{1, 1<<64 - 1, true}, {1, 1<<64 - 1, false}, {1, 1, false}, {1, 1<<64 - w, true}, {1, 1<<64 - w - 1, false}}},
		{"a new boot starts over", []admit{{1, 1, true}, {1, 2, true}, {2, 1, true}, {2, 1, false}, {2, 2, true}}},
		{"an old boot is refused", []admit{{5, 1, true}, {4, 2, false}, {4, 9999, false}, {5, 2, true}, {5, 1, false}}},
		{"the newest boot stays, whatever comes late", []admit{{2, 1, true}, {1, 7, false}, {1, 8, false}, {2, 2, true}}},
		{"boot 0", []admit{{0, 1, true}, {0, 1, false}, {1, 1, true}, {0, 2, false}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := NewState()
			for i, step := range tt.steps {
				before, revision := s.Hash(), s.Revision()
				r := s.Apply(uint64(i+1), &Batch{Node: 3, Boot: step.boot, Seq: step.seq, Commands: []Command{put("k", "v"), del("x")}}, nil)
				check(t, s)
				if s.Applied() != uint64(i+1) {
					t.Errorf("step %d: applied %d", i, s.Applied())
				}
				if step.fresh {
					if r[0].Duplicate || r[1].Duplicate || s.Revision() != revision+1 {
						t.Fatalf("step %d %+v: refused: %+v", i, step, r)
					}
					continue
				}
				want := Result{Revision: revision, Duplicate: true}
				if !reflect.DeepEqual(r, []Result{want, want}) {
					t.Fatalf("step %d %+v: got %+v", i, step, r)
				}
				if s.Hash() != before {
					t.Errorf("step %d: a duplicate changed the state", i)
				}
			}
		})
	}
}

// The window against a set that forgets nothing, near its edges.
func TestReplayWindowTwin(t *testing.T) {
	var w window
	w.node = 1
	seen := map[uint64]bool{}
	high := uint64(0)
	x := uint64(1)
	for range 200_000 {
		x = mix(x)
		seq := high + x>>32%40
		switch x % 8 {
		case 0:
			seq = high + ReplayWindow - 2 + x>>32%4
		case 1, 2, 3, 4, 5:
			seq = max(seq, ReplayWindow+20) - ReplayWindow*(x>>20%2) - x>>40%20
		}
		seq = max(seq, 1)
		want := !seen[seq] && seq+ReplayWindow > high
		if got := w.admit(seq); got != want {
			t.Fatalf("seq %d at high %d: admitted %v", seq, high, got)
		}
		seen[seq] = true
		high = max(high, seq)
	}
	if err := w.valid(); err != nil {
		t.Fatal(err)
	}
}

func TestReplayIsPerNode(t *testing.T) {
	s := NewState()
	for i, node := range []uint64{5, 2, 9, 1<<64 - 1, 3} {
		for repeat := range 2 {
			r := s.Apply(uint64(i), &Batch{Node: node, Boot: 1, Seq: 1, Commands: []Command{put("k", "v")}}, nil)
			check(t, s)
			if r[0].Duplicate != (repeat == 1) {
				t.Errorf("node %d, repeat %d: %+v", node, repeat, r)
			}
		}
	}
	s.ForgetNode(9)
	s.ForgetNode(77) // not there
	check(t, s)
	for i, node := range []uint64{5, 2, 9, 1<<64 - 1, 3} {
		r := s.Apply(uint64(10+i), &Batch{Node: node, Boot: 1, Seq: 1, Commands: []Command{put("k", "v")}}, nil)
		if r[0].Duplicate != (node != 9) {
			t.Errorf("after forgetting node 9, node %d: %+v", node, r)
		}
	}
}

func TestNoIdentityIsAlwaysApplied(t *testing.T) {
	s := NewState()
	for i := range 3 {
		s.Apply(uint64(i+1), &Batch{Boot: 1, Seq: 1, Commands: []Command{put("k", "v")}}, nil)
	}
	if s.Revision() != 3 || len(s.windows) != 0 {
		t.Errorf("revision %d, %d windows", s.Revision(), len(s.windows))
	}
}

func TestEmptyBatchTakesItsSeq(t *testing.T) {
	s := NewState()
	s.Apply(1, &Batch{Node: 1, Boot: 1, Seq: 1}, nil)
	if r := s.Apply(2, &Batch{Node: 1, Boot: 1, Seq: 1, Commands: []Command{put("a", "")}}, nil); !r[0].Duplicate {
		t.Errorf("got %+v", r)
	}
}

// Each of these states differs from the first in one thing only.
func TestHashTellsStatesApart(t *testing.T) {
	build := func(node uint64, commands ...Command) *State {
		s := NewState()
		s.Apply(1, &Batch{Node: node, Boot: 1, Seq: 1, Commands: commands}, nil)
		return s
	}
	states := []*State{
		NewState(),
		build(0, put("a", "1"), put("b", "2")),
		build(0, put("a", "1"), put("b", "3")),
		build(0, put("a", "2"), put("b", "1")),
		build(0, put("b", "2"), put("a", "1")),
		build(0, put("a1", ""), put("b", "2")),
		build(0, put("a", "1b"), put("b", "2")),
		build(0, put("a", "1"), put("b", "2"), put("c", ""), del("c")),
		build(1, put("a", "1"), put("b", "2")),
		build(2, put("a", "1"), put("b", "2")),
		build(0, put("a", "1"), put("a", "1"), put("b", "2")),
	}
	seen := map[uint64]int{}
	for i, s := range states {
		if j, dup := seen[s.Hash()]; dup {
			t.Errorf("states %d and %d have the same hash", j, i)
		}
		seen[s.Hash()] = i
	}
	if a, b := build(0, put("a", "1")), build(0, put("a", "1")); a.Hash() != b.Hash() {
		t.Error("equal states have different hashes")
	}
}

// Check finds what no call of the API can bring about.
func TestCheckFindsDamage(t *testing.T) {
	replace := func(s *State, key string, h head) {
		old, was, _ := s.items.get(key)
		s.sum -= recordHash(old, was)
		rec := newRecord(h, "b", []byte("22"))
		s.sum += recordHash(rec, h)
		s.items.set(rec)
	}
	for name, damage := range map[string]func(*State){
		"revision behind":      func(s *State) { s.revision-- },
		"bytes":                func(s *State) { s.bytes++ },
		"hash sum":             func(s *State) { s.sum++ },
		"entry gone":           func(s *State) { s.items.delete("a") },
		"key of another entry": func(s *State) { s.items.root.items[1] = s.items.root.items[0] },
		"front of a record": func(s *State) {
			rec, h, _ := s.items.get("b")
			h.keyLen++
			s.items.root.items[1] = itemOf(keepRecord(h, bytesOf(rec)))
		},
		"value cut":            func(s *State) { _, h, _ := s.items.get("b"); s.items.set(newRecord(h, "b", []byte("2"))) },
		"size of a node":       func(s *State) { s.items.root.size++ },
		"mod twice":            func(s *State) { replace(s, "b", newHead(1, 1, 1, 0, 1, 2)) },
		"mod beyond the store": func(s *State) { replace(s, "b", newHead(2, 9, 1, 0, 1, 2)) },
		"create above mod":     func(s *State) { replace(s, "b", newHead(3, 2, 1, 0, 1, 2)) },
		"create 0":             func(s *State) { replace(s, "b", newHead(0, 2, 1, 0, 1, 2)) },
		"version 0":            func(s *State) { replace(s, "b", newHead(2, 2, 0, 0, 1, 2)) },
		"version too high":     func(s *State) { replace(s, "b", newHead(2, 2, 2, 0, 1, 2)) },
		"window node 0":        func(s *State) { s.windows[0].node = 0 },
		"window order":         func(s *State) { s.windows[0].node = 8 },
		"window node twice":    func(s *State) { s.windows[0].node = 7 },
		"window high 0":        func(s *State) { s.windows[0].high = 0 },
		"window high unmarked": func(s *State) { s.windows[0].high++ },
		"window mark beyond":   func(s *State) { s.windows[0].set(2) },
		"window mark at 0":     func(s *State) { s.windows[0].set(0) },
	} {
		t.Run(name, func(t *testing.T) {
			s := NewState()
			s.Apply(1, &Batch{Node: 6, Boot: 1, Seq: 1, Commands: []Command{put("a", "1"), put("b", "22"), put("c", "3")}}, nil)
			s.Apply(2, &Batch{Node: 7, Boot: 1, Seq: 1}, nil)
			check(t, s)
			damage(s)
			if err := s.Check(); err == nil {
				t.Error("not found")
			} else {
				t.Log(err)
			}
		})
	}
}

func TestCloneIsolation(t *testing.T) {
	s := NewState()
	for i := range 2000 {
		s.Apply(uint64(i+1), &Batch{Node: 1, Boot: 1, Seq: uint64(i + 1), Commands: []Command{put(fmt.Sprintf("k%04d", i), "old")}}, nil)
	}
	clone := s.Clone()
	before := dump(clone)
	if before != dump(s) {
		t.Fatal("the clone differs from its original")
	}
	for i := range 2000 {
		key := fmt.Sprintf("k%04d", i)
		c := put(key, "new")
		if i%3 == 0 {
			c = del(key)
		}
		s.Apply(s.Applied()+1, &Batch{Node: 1, Boot: 2, Seq: uint64(i + 1), Commands: []Command{c, put(key+"x", "more")}}, nil)
	}
	s.ForgetNode(1)
	if got := dump(clone); got != before {
		t.Error("writing the original changed the clone")
	}
	check(t, clone)
	check(t, s)

	// And the other way round: a clone is a state of its own.
	before = dump(s)
	clone.Apply(clone.Applied()+1, &Batch{Node: 1, Boot: 3, Seq: 1, Commands: []Command{put("k0000", "clone"), del("k0001")}}, nil)
	if dump(s) != before {
		t.Error("writing the clone changed the original")
	}
	check(t, clone)
}

// Meant for the race detector: a clone is read while its original is written.
func TestCloneReadWhileOriginalIsWritten(t *testing.T) {
	s := NewState()
	for i := range 3000 {
		s.Apply(uint64(i+1), &Batch{Node: 1, Boot: 1, Seq: uint64(i + 1), Commands: []Command{put(fmt.Sprintf("k%04d", i), "old")}}, nil)
	}
	var readers sync.WaitGroup
	for round := range 3 {
		clone := s.Clone()
		want := dump(clone)
		readers.Go(func() {
			if err := clone.Check(); err != nil {
				t.Error(err)
			}
			var file bytes.Buffer
			if err := WriteSnapshot(&file, nil, clone); err != nil {
				t.Error(err)
			}
			_, restored, err := ReadSnapshot(&file)
			if err != nil {
				t.Error(err)
			} else if dump(restored) != want || dump(clone) != want {
				t.Error("the clone changed")
			}
		})
		for i := range 3000 {
			key := fmt.Sprintf("k%04d", (i*7)%3000)
			c := put(key, fmt.Sprint("new", round))
			if i%2 == round%2 {
				c = del(key)
			}
			s.Apply(s.Applied()+1, &Batch{Node: 1, Boot: 1, Seq: s.windows[0].high + 1, Commands: []Command{c}}, nil)
		}
	}
	readers.Wait()
	check(t, s)
}
