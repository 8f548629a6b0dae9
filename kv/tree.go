package kv

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"strings"
)

// itemTree is a B-tree of records, ordered by their keys, that can be copied in
// constant time. An item is a bare pointer to a record: key and length are read
// from there. A general map holds key and value beside each other, 32 bytes
// where this has 8, and its nodes keep the room of the full node that they were
// split from; together that was a quarter of the memory of a store of small
// values (Decisions in ARCHITECTURE.md has the figures).
//
// Not safe for concurrent use, but that of two copies each may be used by its
// own goroutine.
type itemTree struct {
	root  *node // nil: empty
	owner *owner
}

// owner tells whose a node is: a tree changes its own nodes in place, and copies
// those that another tree may see. It has a size, as the addresses of two
// variables without one may be equal.
type owner struct{ _ byte }

// node is a node of a tree. Each but the root has at least one item, and an inner
// one has one child more than it has items.
//
// A look-up waits for memory most of its time, so a node is one run of bytes, and
// the records of the items, which are anywhere, are read only where tags are
// equal. Measured with cold caches against nodes of pointers alone, at 10,000 keys:
// a get takes three quarters of the time, a put two thirds, for 5 to 11 bytes an
// entry (BenchmarkCold).
type node struct {
	owner    *owner
	items    []*byte // ascending by key (record.go: keyAt, recordAt)
	children []*node // nil: a leaf
	size     int     // items in it and below
	// skip is how many bytes the keys of the items have in common at their front,
	// or fewer: deletions leave it as it is. front has these bytes as far as there
	// is room, and tags[i] those that follow in the key of items[i] (tagOf).
	skip  int
	front [maxFront]byte
	tags  [maxItems + 1]uint32
}

// leaf and branch are the memory of a node: its slices point into them.
type leaf struct {
	node
	room [maxItems + 1]*byte
}

type branch struct {
	leaf
	room [maxItems + 2]*node
}

const (
	// maxItems is how many a node has; one more for the moment before it is split.
	// A leaf of 74 takes 1016 bytes, and the allocator has 1024 for it with what
	// it adds. Twice and half as many are not faster.
	maxItems = 74
	// minItems is where a deletion looks for a neighbour to share with. Splits
	// at an end leave nodes that are smaller.
	minItems = maxItems / 4
	// maxFront is what a search compares without reading a record.
	maxFront = 40
)

func newItemTree() *itemTree { return &itemTree{owner: new(owner)} }

func (t *itemTree) newLeaf() *node {
	l := new(leaf)
	l.owner, l.items = t.owner, l.room[:0]
	return &l.node
}

func (t *itemTree) newBranch() *node {
	b := new(branch)
	b.owner, b.items, b.children = t.owner, b.leaf.room[:0], b.room[:0]
	return &b.node
}

// like returns an empty node of the level of n.
func (t *itemTree) like(n *node) *node {
	if n.children == nil {
		return t.newLeaf()
	}
	return t.newBranch()
}

// clone returns a copy. The two share nodes until one of them changes those.
func (t *itemTree) clone() *itemTree {
	t.owner = new(owner)
	return &itemTree{root: t.root, owner: new(owner)}
}

func (t *itemTree) len() int {
	if t.root == nil {
		return 0
	}
	return t.root.size
}

// own returns the node for changing.
func (t *itemTree) own(at **node) *node {
	n := *at
	if n.owner != t.owner {
		c := t.like(n)
		c.items, c.children = append(c.items, n.items...), append(c.children, n.children...)
		c.size, c.skip, c.front, c.tags = n.size, n.skip, n.front, n.tags
		n, *at = c, c
	}
	return n
}

// search returns where the key is among the items, or belongs. The key may be any:
// one without the common front lies before or behind all of them.
func (n *node) search(key string) (int, bool) {
	front := stringOf(n.front[:min(n.skip, maxFront)])
	if n.skip > maxFront {
		front = keyAt(n.items[0])[:n.skip]
	}
	switch c := strings.Compare(key[:min(n.skip, len(key))], front); {
	case c < 0:
		return 0, false
	case c > 0:
		return len(n.items), false
	}
	tag := tagOf(key, n.skip)
	low, high := 0, len(n.items)
	for low < high {
		i := int(uint(low+high) / 2)
		c := cmp.Compare(n.tags[i], tag)
		if c == 0 {
			c = strings.Compare(keyAt(n.items[i]), key)
		}
		switch {
		case c == 0:
			return i, true
		case c < 0:
			low = i + 1
		default:
			high = i
		}
	}
	return low, false
}

// tagOf returns the 4 bytes of the key from skip on, as a number. A key that ends
// before has zeros there: of two keys the greater one never has the smaller tag.
func tagOf(key string, skip int) uint32 {
	var b [4]byte
	copy(b[:], key[skip:])
	return binary.BigEndian.Uint32(b[:])
}

// tag sets the tag of item i, which is new. The first and the last item alone
// decide what all have in common.
func (n *node) tag(i int) {
	if last := len(n.items) - 1; last == 0 || (i == 0 || i == last) && n.common() != n.skip {
		n.tagAll()
		return
	}
	n.tags[i] = tagOf(keyAt(n.items[i]), n.skip)
}

func (n *node) tagAll() {
	n.skip = n.common()
	copy(n.front[:], keyAt(n.items[0])[:n.skip])
	for i, item := range n.items {
		n.tags[i] = tagOf(keyAt(item), n.skip)
	}
}

// common is how many bytes all keys of the items have in common at their front.
func (n *node) common() int {
	first, last := keyAt(n.items[0]), keyAt(n.items[len(n.items)-1])
	i := 0
	for i < len(first) && i < len(last) && first[i] == last[i] {
		i++
	}
	return i
}

// get returns the record under a key, with its head.
func (t *itemTree) get(key string) (rec string, h head, ok bool) {
	for n := t.root; n != nil; {
		i, found := n.search(key)
		if found {
			rec, h = recordAt(n.items[i])
			return rec, h, true
		}
		if n.children == nil {
			break
		}
		n = n.children[i]
	}
	return "", head{}, false
}

// place returns where the item of a key is, in a node of the tree's own, for another
// record of that key to be put there; nil: there is none.
func (t *itemTree) place(key string) **byte {
	for at := &t.root; *at != nil; {
		n := t.own(at)
		i, found := n.search(key)
		if found {
			return &n.items[i]
		}
		if n.children == nil {
			break
		}
		at = &n.children[i]
	}
	return nil
}

// set puts a record in, in the place of the one that had its key.
func (t *itemTree) set(rec string) {
	if t.root == nil {
		t.root = t.newLeaf()
	}
	_, at := t.insert(&t.root, itemOf(rec))
	if len(t.root.items) > maxItems {
		left := t.root
		median, right := t.split(left, at)
		t.root = t.newBranch()
		t.root.fill([]*byte{median}, []*node{left, right})
	}
}

// insert returns whether there is one item more, and where in the node that is,
// which may then have one more than it should.
func (t *itemTree) insert(place **node, item *byte) (more bool, at int) {
	n := t.own(place)
	i, found := n.search(keyAt(item))
	switch {
	case found:
		n.items[i] = item
		return false, i
	case n.children == nil:
		n.insert(i, item)
	default:
		more, at := t.insert(&n.children[i], item)
		if !more {
			return false, i
		}
		if child := n.children[i]; len(child.items) > maxItems {
			median, right := t.split(child, at)
			n.insert(i, median)
			n.children = slices.Insert(n.children, i+1, right)
		}
	}
	n.size++
	return true, i
}

func (n *node) insert(i int, item *byte) {
	copy(n.tags[i+1:], n.tags[i:len(n.items)])
	n.items = slices.Insert(n.items, i, item)
	n.tag(i)
}

func (n *node) delete(i int) {
	copy(n.tags[i:], n.tags[i+1:len(n.items)])
	n.items = slices.Delete(n.items, i, i+1)
}

// split moves the upper part of a node to a new one. at is where the last item
// came in: where that is near the end, keys probably arrive in order, and the
// node keeps most of its items, as no more will come.
func (t *itemTree) split(n *node, at int) (median *byte, right *node) {
	middle := len(n.items) / 2
	if end := len(n.items) * 13 / 16; at >= end {
		middle = end
	}
	median, right = n.items[middle], t.like(n)
	if n.children == nil {
		right.fill(n.items[middle+1:], nil)
		n.fill(n.items[:middle], nil)
	} else {
		right.fill(n.items[middle+1:], n.children[middle+1:])
		n.fill(n.items[:middle], n.children[:middle+1])
	}
	return median, right
}

// fill gives a node other items and children, which may be some of its own.
func (n *node) fill(items []*byte, children []*node) {
	n.items = slices.Replace(n.items, 0, len(n.items), items...)
	n.children = slices.Replace(n.children, 0, len(n.children), children...)
	n.tagAll()
	n.count()
}

// count sets the size of a node from its children's.
func (n *node) count() {
	n.size = len(n.items)
	for _, c := range n.children {
		n.size += c.size
	}
}

// delete takes the record under a key out and returns it.
func (t *itemTree) delete(key string) (rec string, h head, ok bool) {
	if t.root == nil {
		return "", head{}, false
	}
	item := t.remove(&t.root, key)
	if len(t.root.items) == 0 {
		if t.root.children == nil {
			t.root = nil
		} else {
			t.root = t.root.children[0]
		}
	}
	if item == nil {
		return "", head{}, false
	}
	rec, h = recordAt(item)
	return rec, h, true
}

// remove returns the item that it took out; nil: there was none.
func (t *itemTree) remove(place **node, key string) *byte {
	n := t.own(place)
	i, found := n.search(key)
	var item *byte
	switch {
	case n.children == nil && !found:
		return nil
	case n.children == nil:
		item = n.items[i]
		n.delete(i)
	case found:
		// The item before it takes its place.
		item = n.items[i]
		n.items[i] = t.removeLast(&n.children[i])
		n.tag(i)
		t.mend(n, i)
	default:
		if item = t.remove(&n.children[i], key); item == nil {
			return nil
		}
		t.mend(n, i)
	}
	n.size--
	return item
}

func (t *itemTree) removeLast(place **node) *byte {
	n := t.own(place)
	n.size--
	last := len(n.items) - 1
	if n.children == nil {
		item := n.items[last]
		n.delete(last)
		return item
	}
	item := t.removeLast(&n.children[last+1])
	t.mend(n, last+1)
	return item
}

// mend joins child i of n, if it has become small, with a neighbour, or lets it
// have some of the neighbour's items.
func (t *itemTree) mend(n *node, i int) {
	if len(n.children[i].items) >= minItems {
		return
	}
	i = max(i-1, 0) // the left one of the two
	left, right := t.own(&n.children[i]), n.children[i+1]
	items := slices.Concat(left.items, n.items[i:i+1], right.items)
	children := slices.Concat(left.children, right.children)
	if len(items) <= maxItems {
		left.fill(items, children)
		n.delete(i)
		n.children = slices.Delete(n.children, i+1, i+2)
		return
	}
	right = t.own(&n.children[i+1])
	middle := len(items) / 2
	n.items[i] = items[middle]
	n.tag(i)
	if children == nil {
		left.fill(items[:middle], nil)
		right.fill(items[middle+1:], nil)
	} else {
		left.fill(items[:middle], children[:middle+1])
		right.fill(items[middle+1:], children[middle+1:])
	}
}

// check returns the first thing that is wrong with the shape of the tree; the
// order of the items is for the caller.
func (t *itemTree) check() error {
	if t.root == nil {
		return nil
	}
	depth := 0
	for n := t.root; n.children != nil; n = n.children[0] {
		depth++
	}
	return t.root.check(depth)
}

func (n *node) check(depth int) error {
	size := len(n.items)
	if size < 1 || size > maxItems {
		return fmt.Errorf("a node of %d items", size)
	}
	if n.skip > n.common() {
		return fmt.Errorf("a node whose keys have %d bytes in common skips %d", n.common(), n.skip)
	}
	if front := keyAt(n.items[0])[:min(n.skip, maxFront)]; string(n.front[:len(front)]) != front {
		return fmt.Errorf("a node whose keys begin with %q says %q", front, n.front[:len(front)])
	}
	for i, item := range n.items {
		if n.tags[i] != tagOf(keyAt(item), n.skip) {
			return fmt.Errorf("key %q has tag %08x behind %d bytes", keyAt(item), n.tags[i], n.skip)
		}
	}
	if (n.children == nil) != (depth == 0) || n.children != nil && len(n.children) != size+1 {
		return fmt.Errorf("a node of %d items with %d children, %d above the leaves", size, len(n.children), depth)
	}
	for _, c := range n.children {
		if err := c.check(depth - 1); err != nil {
			return err
		}
		size += c.size
	}
	if n.size != size {
		return fmt.Errorf("a node says that %d items are below it, and there are %d", n.size, size)
	}
	return nil
}

// rank is the number of records whose keys are below key.
func (t *itemTree) rank(key string) (below int) {
	for n := t.root; n != nil; {
		i, found := n.search(key)
		below += i
		if n.children == nil {
			break
		}
		for _, c := range n.children[:i] {
			below += c.size
		}
		if found {
			return below + n.children[i].size
		}
		n = n.children[i]
	}
	return below
}

// ascend calls f for each record from the key on, in ascending order, until f
// returns false.
func (t *itemTree) ascend(from string, f func(rec string, h head) bool) {
	if t.root != nil {
		t.root.ascend(from, f)
	}
}

func (n *node) ascend(from string, f func(rec string, h head) bool) bool {
	i, found := 0, false
	if from != "" {
		i, found = n.search(from)
	} else if n.children == nil {
		fetch(n.items)
	}
	if n.children != nil && !found && !n.children[i].ascend(from, f) {
		return false
	}
	for ; i < len(n.items); i++ {
		if !f(recordAt(n.items[i])) || n.children != nil && !n.children[i+1].ascend("", f) {
			return false
		}
	}
	return true
}

// fetch has the processor load the records at once, where a walk would wait for
// one after the other: they are anywhere in memory. Measured: a snapshot of 1M
// records is written in 220 ms instead of 290.
func fetch(items []*byte) {
	sum := uint32(0)
	for _, item := range items {
		sum |= frontAt(item)
	}
	runtime.KeepAlive(sum) // the loads are not left out
}

// descend calls f for each record below the key, or for all if that is empty, in
// descending order, until f returns false.
func (t *itemTree) descend(below string, f func(rec string, h head) bool) {
	if t.root != nil {
		t.root.descend(below, f)
	}
}

func (n *node) descend(below string, f func(rec string, h head) bool) bool {
	i := len(n.items)
	if below != "" {
		i, _ = n.search(below)
	}
	if n.children != nil && !n.children[i].descend(below, f) {
		return false
	}
	for i--; i >= 0; i-- {
		if !f(recordAt(n.items[i])) || n.children != nil && !n.children[i].descend("", f) {
			return false
		}
	}
	return true
}

// itemBuilder makes a tree of records that come in ascending order of their
// keys, with full nodes.
type itemBuilder struct {
	t itemTree
	// spine is the last node of each level, leaf first.
	spine []*node
}

func newItemBuilder() *itemBuilder {
	b := &itemBuilder{t: itemTree{owner: new(owner)}}
	b.spine = []*node{b.t.newLeaf()}
	return b
}

func (b *itemBuilder) add(rec string) {
	item, level := itemOf(rec), 0
	for ; level < len(b.spine) && len(b.spine[level].items) == maxItems; level++ {
	}
	if level == len(b.spine) {
		top := b.t.newBranch()
		top.children = append(top.children, b.spine[level-1])
		b.spine = append(b.spine, top)
	}
	b.spine[level].items = append(b.spine[level].items, item)
	// Behind an item of an inner node begins a new node of each lower level.
	for level--; level >= 0; level-- {
		n := b.t.like(b.spine[level])
		b.spine[level].tagAll()
		b.spine[level+1].children = append(b.spine[level+1].children, n)
		b.spine[level] = n
	}
}

// tree returns the tree. The builder is of no use after that.
func (b *itemBuilder) tree() *itemTree {
	root := b.spine[len(b.spine)-1]
	for _, n := range b.spine {
		if len(n.items) > 0 {
			n.tagAll()
		}
	}
	root.countAll()
	if root.size > 0 {
		b.t.root = root
	}
	// The last nodes may be small, or empty: the one to the left of each is full.
	for n := root; n.children != nil; n = n.children[len(n.children)-1] {
		b.t.mend(n, len(n.children)-1)
	}
	return &b.t
}

func (n *node) countAll() {
	for _, c := range n.children {
		c.countAll()
	}
	n.count()
}
