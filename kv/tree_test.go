package kv

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func treeRecord(key, value string) string {
	return newRecord(newHead(1, 1, 1, 0, len(key), len(value)), key, []byte(value))
}

// naiveTree is what an itemTree has to be like: records by key.
type naiveTree map[string]string

func (m naiveTree) keys() []string {
	keys := make([]string, 0, len(m))
	for k := range m { // order: sorted below
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// same holds a tree against its twin by every way to read it; at is where walks begin.
func (m naiveTree) same(t rapid.TB, tree *itemTree, at string) {
	if err := tree.check(); err != nil {
		t.Fatal(err)
	}
	keys := m.keys()
	i, found := slices.BinarySearch(keys, at)
	if got := tree.rank(at); got != i || tree.len() != len(keys) {
		t.Fatalf("rank of %q is %d of %d, not %d of %d", at, got, tree.len(), i, len(keys))
	}
	rec, h, ok := tree.get(at)
	if ok != found || rec != m[at] || ok && keyOf(rec, h) != at {
		t.Fatalf("get %q: %q, %v", at, rec, ok)
	}
	up := slices.Clone(keys[i:])
	tree.ascend(at, func(rec string, h head) bool {
		if len(up) == 0 || keyOf(rec, h) != up[0] || rec != m[up[0]] {
			t.Fatalf("ascending from %q: %q, not the first of %q", at, keyOf(rec, h), up)
		}
		up = up[1:]
		return true
	})
	down := slices.Clone(keys[:i])
	if at == "" {
		down = keys
	}
	tree.descend(at, func(rec string, h head) bool {
		if len(down) == 0 || keyOf(rec, h) != down[len(down)-1] {
			t.Fatalf("descending from %q: %q, not the last of %q", at, keyOf(rec, h), down)
		}
		down = down[:len(down)-1]
		return true
	})
	if len(up) > 0 || len(down) > 0 {
		t.Fatalf("from %q, not met: ascending %q, descending %q", at, up, down)
	}
	walked := 0
	stop := func(string, head) bool { walked++; return walked < 3 }
	tree.ascend(at, stop)
	if want := min(3, len(keys)-i); walked != want {
		t.Fatalf("a walk that was to end went on: %d, not %d", walked, want)
	}
}

// Runs of keys in order, at random and of deletions, on a tree and on copies
// of it that live on beside it.
func TestTreeModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		trees, twins := []*itemTree{newItemTree()}, []naiveTree{{}}
		key := func(i int) string { return fmt.Sprintf("%s%03d", strings.Repeat("k", i%3), i) }
		for range rapid.IntRange(1, 12).Draw(t, "runs") {
			i := rapid.IntRange(0, len(trees)-1).Draw(t, "tree")
			tree, twin := trees[i], twins[i]
			from, n := rapid.IntRange(0, 999).Draw(t, "from"), rapid.IntRange(1, 400).Draw(t, "n")
			step := rapid.SampledFrom([]int{1, 3, -1, 7, 389}).Draw(t, "step")
			run := rapid.SampledFrom([]string{"set", "set", "delete", "copy", "rebuild"}).Draw(t, "run")
			switch run {
			case "copy":
				if len(trees) < 4 {
					c := naiveTree{}
					for k, v := range twin { // order: copied
						c[k] = v
					}
					trees, twins = append(trees, tree.clone()), append(twins, c)
				}
			case "rebuild":
				b := newItemBuilder()
				tree.ascend("", func(rec string, _ head) bool { b.add(rec); return true })
				trees[i] = b.tree()
			}
			for ; n > 0 && (run == "set" || run == "delete"); n-- {
				k := key(from)
				from = (from + step + 1000) % 1000
				if run == "set" {
					twin[k] = treeRecord(k, fmt.Sprint(n))
					tree.set(twin[k])
					continue
				}
				want, there := twin[k]
				if rec, _, ok := tree.delete(k); ok != there || rec != want {
					t.Fatalf("delete %q: %q, %v, not %q, %v", k, rec, ok, want, there)
				}
				delete(twin, k)
			}
			at := rapid.SampledFrom([]string{"", key(from), key(from) + "+", "z"}).Draw(t, "at")
			for i := range trees {
				twins[i].same(t, trees[i], at)
			}
		}
	})
}

// Keys that make every common front and tag: prefixes of each other, zeros and
// 0xff, fronts that are shorter and longer than a node has room for.
func TestTreeKeys(t *testing.T) {
	fronts := []string{"", "a", "\x00", "\xff\xff", strings.Repeat("f", maxFront), strings.Repeat("f", maxFront+1) + "g", strings.Repeat("f", 3*maxFront)}
	rapid.Check(t, func(t *rapid.T) {
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		alphabet := []byte("\x00\x01ab\xff")[rapid.IntRange(0, 3).Draw(t, "alphabet"):]
		key := func(front string) string {
			k := []byte(front)
			for range 1 + rng.IntN(8) {
				k = append(k, alphabet[rng.IntN(len(alphabet))])
			}
			return string(k)
		}
		tree, twin := newItemTree(), naiveTree{}
		old, oldTwin := tree.clone(), naiveTree{}
		for range rapid.IntRange(1, 10).Draw(t, "runs") {
			front := rapid.SampledFrom(fronts).Draw(t, "front")
			run := rapid.SampledFrom([]string{"set", "set", "set", "delete", "clone"}).Draw(t, "run")
			n := rapid.IntRange(1, 300).Draw(t, "n")
			switch run {
			case "set":
				for i := range n {
					k := key(front)
					rec := treeRecord(k, fmt.Sprint(i))
					place := tree.place(k)
					if _, there := twin[k]; there != (place != nil) {
						t.Fatalf("a place for %q: %v", k, there)
					}
					if place != nil && i%2 == 0 {
						*place = itemOf(rec)
					} else {
						tree.set(rec)
					}
					twin[k] = rec
				}
			case "delete":
				for _, k := range twin.keys() {
					if strings.HasPrefix(k, front) && rng.IntN(300) < n {
						if rec, _, ok := tree.delete(k); !ok || rec != twin[k] {
							t.Fatalf("delete %q: %q, %v", k, rec, ok)
						}
						delete(twin, k)
					}
				}
			case "clone":
				old, oldTwin = tree.clone(), maps.Clone(twin)
			}
			at := key(front)
			if rapid.Bool().Draw(t, "short") {
				at = at[:rng.IntN(len(at))]
			}
			twin.same(t, tree, at)
			oldTwin.same(t, old, at)
			for _, k := range twin.keys() {
				if rec, _, ok := tree.get(k); !ok || rec != twin[k] {
					t.Fatalf("get %q: %q, %v", k, rec, ok)
				}
			}
		}
	})
}

// What a node derives from its items is held against them.
func TestTreeCheck(t *testing.T) {
	build := func() *itemTree {
		b := newItemBuilder()
		for i := range 10 {
			b.add(treeRecord(benchKey(i), ""))
		}
		return b.tree()
	}
	for name, spoil := range map[string]func(n *node){ // order: each on its own
		"skip":  func(n *node) { n.skip++ },
		"front": func(n *node) { n.front[n.skip-1]++ },
		"tag":   func(n *node) { n.tags[9]++ },
		"size":  func(n *node) { n.size++ },
	} {
		tree := build()
		if err := tree.check(); err != nil {
			t.Fatal(err)
		}
		spoil(tree.root)
		if tree.check() == nil {
			t.Errorf("%s: nothing is found", name)
		}
	}
}

// A tree of every size that brings a level or a node more.
func TestTreeBuilder(t *testing.T) {
	sizes := []int{20_000}
	for _, n := range []int{0, maxItems, maxItems * (maxItems + 1), (maxItems + 1) * (maxItems + 1)} {
		for d := range 4 {
			sizes = append(sizes, n+d, max(0, n-d))
		}
	}
	for _, n := range sizes {
		b := newItemBuilder()
		for i := range n {
			b.add(treeRecord(benchKey(i), ""))
		}
		tree := b.tree()
		if err := tree.check(); err != nil || tree.len() != n {
			t.Fatalf("%d records: %d in the tree, %v", n, tree.len(), err)
		}
		i := 0
		tree.ascend("", func(rec string, h head) bool {
			if keyOf(rec, h) != benchKey(i) {
				t.Fatalf("%d records: %q is number %d", n, keyOf(rec, h), i)
			}
			i++
			return true
		})
		for ; i > 0; i-- { // all the way down: the small nodes at the end have neighbours to join
			if _, _, ok := tree.delete(benchKey(i - 1)); !ok {
				t.Fatalf("%d records: %q is not there", n, benchKey(i-1))
			}
		}
		if err := tree.check(); err != nil || tree.len() != 0 {
			t.Fatalf("%d records: %d are left, %v", n, tree.len(), err)
		}
	}
}

// A copy costs no more than itself, and the first write after it the nodes on
// its path.
func TestTreeCopyIsCheap(t *testing.T) {
	b := newItemBuilder()
	for i := range 100_000 {
		b.add(treeRecord(benchKey(i), ""))
	}
	tree, rec := b.tree(), treeRecord(benchKey(5), "new")
	if got := testing.AllocsPerRun(100, func() { tree.clone(); tree.set(rec) }); got > 6 {
		t.Errorf("a copy and a write make %v allocations: 3 of the copy, at most 1 a level", got)
	}
	if got := testing.AllocsPerRun(100, func() { tree.set(rec) }); got > 0 {
		t.Errorf("replacing an item in a tree of one's own makes %v allocations", got)
	}
}

// What an entry of 12+128 bytes takes is bounded, however it came in. 160 is
// what the allocator has for the record.
func TestMemoryPerEntry(t *testing.T) {
	const n = 100_000
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	fill := func(s *State, keys func(i int) int) *State {
		value := bytes.Repeat([]byte{'v'}, 128)
		b := Batch{Commands: make([]Command, 1)}
		s.history.maxEvents = 0
		for i := range n {
			b.Commands[0] = Command{Op: OpPut, Key: benchKey(keys(i)), Value: value}
			s.Apply(uint64(i+1), &b, nil)
		}
		return s
	}
	order, random := func(i int) int { return i }, rand.New(rand.NewPCG(1, 2)).Perm(n)
	file := snapshot(t, nil, fill(NewState(), order))
	for _, tt := range []struct {
		name  string
		limit float64
		build func() *State
	}{
		{"in order", 179, func() *State { return fill(NewState(), order) }},
		// 128 clients that count together: the order is lost in the small.
		{"nearly in order", 183, func() *State {
			return fill(NewState(), func(i int) int { return i/100*100 + i*37%100 })
		}},
		{"at random", 183, func() *State { return fill(NewState(), func(i int) int { return random[i] }) }},
		{"overwritten", 179, func() *State {
			return fill(fill(NewState(), order), func(i int) int { return random[i] })
		}},
		{"restored", 176, func() *State { _, s, _ := ReadSnapshot(bytes.NewReader(file)); return s }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := heap()
			s := tt.build()
			got := float64(heap()-before) / n
			t.Logf("%.1f bytes an entry", got)
			if got > tt.limit || s.Len() != n {
				t.Errorf("%.1f bytes for each of %d entries, at most %v", got, s.Len(), tt.limit)
			}
		})
	}
}
