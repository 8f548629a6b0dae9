package kv

import (
	"fmt"
	"slices"

	"github.com/tidwall/btree"
)

// Op says what a Command does.
type Op uint8

// The numbers are part of the log format: never reuse one.
const (
	OpPut    Op = 1 // store Value under Key, creating or replacing it
	OpDelete Op = 2 // remove Key; Value is ignored
)

// MaxKeySize bounds a key, in bytes. It is a limit of the formats (it is what
// lets VerifySnapshot run in constant memory), far above what the API accepts.
const MaxKeySize = 64<<10 - 1

// Command is one request to change the state.
type Command struct {
	Op    Op
	Key   string // 1 to MaxKeySize bytes, any bytes
	Value []byte // OpPut only
}

// Batch is what one raft log entry carries: commands that are applied one after
// the other, and the identity under which replay protection knows them.
type Batch struct {
	Node uint64 // the member that proposed it; 0: no identity, always applied
	Boot uint64 // grows at every start of that member
	Seq  uint64 // counts the member's batches from 1 within one Boot
	// Commands may be empty: the batch then only takes up its Seq.
	Commands []Command
}

// Result is the outcome of one Command.
type Result struct {
	// Revision is the store's revision once the command was applied.
	Revision int64
	// Entry is, for OpPut, the entry as stored; for OpDelete the entry that
	// was removed, zero if there was none. It aliases the state.
	Entry Entry
	// Existed says that the key was there before.
	Existed bool
	// Duplicate says that the batch had been applied before: nothing happened
	// this time, and the other fields but Revision are zero.
	Duplicate bool
}

// Entry is one key as the state holds it. Value must never be modified: it is
// the state's own memory, shared with its clones.
type Entry struct {
	Key            string
	Value          []byte
	CreateRevision int64 // store revision that created the key, at least 1
	ModRevision    int64 // store revision that last put the key
	Version        int64 // puts since creation, from 1
	Lease          int64 // 0: none
}

// State is the replicated state at one position of the log. Use NewState or
// ReadSnapshot; the zero State is not usable.
type State struct {
	// items maps a key to its record (record.go). The key is a substring of
	// its own record, so that an item is one allocation without pointers.
	//
	// Rejected, measured at 1M items of 12+128 bytes (this: 208 bytes an item,
	// one object): a pointer to a struct per item, 245 to 261 bytes in two or
	// three objects that the garbage collector visits on top; btree.BTreeG
	// holding the bare record, 185 bytes, but reads take 1.7 times as long, as
	// it compares through a func that has to find the key first.
	items *btree.Map[string, string]

	revision int64  // store revision; 0 for a store that never changed
	applied  uint64 // raft index of the last applied entry
	bytes    int64  // sum of len(key)+len(value)
	sum      uint64 // sum of recordHash over items, modulo 2^64

	// windows is the replay table, strictly ascending by node. A slice, as it
	// holds a handful of members and must never be walked in a random order.
	windows []window
}

// NewState returns the empty state that every replica starts from.
func NewState() *State {
	return &State{items: new(btree.Map[string, string])}
}

// Apply applies the batch of the log entry at index: all of its commands in
// order, or none if the batch is a duplicate. It appends one Result for each
// command to results and returns the extended slice.
//
// Key and value are copied: nothing in the state keeps b, or the log entry that
// b aliases, alive. Apply panics on a batch that DecodeBatch would refuse.
func (s *State) Apply(index uint64, b *Batch, results []Result) []Result {
	if err := b.validate(); err != nil {
		// panic: DecodeBatch refuses such a batch, so the caller made it up.
		panic(fmt.Sprintf("kv: Apply at index %d: %v", index, err))
	}
	s.applied = index
	results = slices.Grow(results, len(b.Commands))
	if b.Node != 0 && !s.admit(b.Node, b.Boot, b.Seq) {
		for range b.Commands {
			results = append(results, Result{Revision: s.revision, Duplicate: true})
		}
		return results
	}
	for i := range b.Commands {
		c := &b.Commands[i]
		if c.Op == OpPut {
			results = append(results, s.put(c.Key, c.Value))
		} else {
			results = append(results, s.delete(c.Key))
		}
	}
	return results
}

// put always takes a revision, also where it stores the bytes that were there:
// a put is a change, and watchers and preconditions see it as one.
func (s *State) put(key string, value []byte) Result {
	s.revision++
	create, version := s.revision, int64(1)
	old, existed := s.items.Get(key)
	if existed {
		h := headOf(old)
		create, version = h.create, h.version+1
		s.bytes -= h.payload()
		s.sum -= recordHash(old, h)
	}
	// The old key string is not reused: it is part of the old record, and
	// would pin the old value. Set replaces key and record together.
	h := newHead(create, s.revision, version, len(key), len(value))
	rec := newRecord(h, key, value)
	s.items.Set(keyOf(rec, h), rec)
	s.bytes += h.payload()
	s.sum += recordHash(rec, h)
	return Result{Revision: s.revision, Entry: entryOf(rec, h), Existed: existed}
}

// delete of an absent key changes nothing and takes no revision.
func (s *State) delete(key string) Result {
	rec, existed := s.items.Delete(key)
	if !existed {
		return Result{Revision: s.revision}
	}
	s.revision++
	h := headOf(rec)
	s.bytes -= h.payload()
	s.sum -= recordHash(rec, h)
	return Result{Revision: s.revision, Entry: entryOf(rec, h), Existed: true}
}

// SetApplied records that the log entry at index was applied and carried no
// batch (an empty entry of a new leader, a configuration change).
func (s *State) SetApplied(index uint64) { s.applied = index }

// Applied returns the raft index of the last applied entry.
func (s *State) Applied() uint64 { return s.applied }

// Revision returns the store revision: 0 for the empty store, and one more for
// every command that changed anything.
func (s *State) Revision() int64 { return s.revision }

// Get returns the entry under key.
func (s *State) Get(key string) (Entry, bool) {
	rec, ok := s.items.Get(key)
	if !ok {
		return Entry{}, false
	}
	return entryOf(rec, headOf(rec)), true
}

// Len returns the number of keys.
func (s *State) Len() int { return s.items.Len() }

// Bytes returns the sum of len(key)+len(value) over all entries. What the
// process needs for them is more: about 70 bytes an entry on top.
func (s *State) Bytes() int64 { return s.bytes }

// Ascend calls f for each entry whose key is at least from, in byte order of
// the keys, until f returns false. The state must not be changed meanwhile.
func (s *State) Ascend(from string, f func(Entry) bool) {
	s.items.Ascend(from, func(_, rec string) bool {
		return f(entryOf(rec, headOf(rec)))
	})
}

// Clone returns a copy that is independent of s, in time that does not depend
// on the number of keys. The two share memory until one of them is written: the
// first writes after a Clone copy the tree nodes on their path, never the items.
//
// Clone itself counts as a write of s. After it returns, one goroutine may read
// the clone while another writes s, or the other way round.
func (s *State) Clone() *State {
	c := *s
	c.items = s.items.Copy()
	c.windows = slices.Clone(s.windows)
	return &c
}

// Hash returns a 64-bit digest of the entries, the revision and the replay
// table; the same on every replica at one log position, and across snapshot and
// restore. Applied is left out: replicas compare hashes at one index anyway.
//
// It is kept up to date by Apply, so that asking for it costs nothing that grows
// with the number of keys. It finds replicas that diverged by mistake; it is no
// proof against somebody who searches for collisions.
func (s *State) Hash() uint64 {
	var windows uint64
	for i := range s.windows {
		windows += s.windows[i].hash()
	}
	return stateHash(s.sum, windows, s.revision)
}

// Check walks the whole state and returns the first broken invariant it finds.
// It needs 8 bytes a key of memory, and time for sorting them.
func (s *State) Check() error {
	var (
		t    tally
		mods = make([]int64, 0, s.items.Len())
		err  error
	)
	s.items.Scan(func(key, rec string) bool {
		var h head
		if h, err = parseHead(bytesOf(rec)); err != nil {
			return false
		}
		if err = t.add(bytesOf(key), h); err != nil {
			return false
		}
		if h.recordSize() != uint64(len(rec)) || keyOf(rec, h) != key {
			err = fmt.Errorf("the record under key %q is of another key or size", key)
			return false
		}
		t.sum += recordHash(rec, h)
		mods = append(mods, h.mod)
		return true
	})
	if err != nil {
		return fmt.Errorf("kv: check: entry %d: %w", t.count, err)
	}
	if err := s.checkTotals(&t, mods); err != nil {
		return fmt.Errorf("kv: check: %w", err)
	}
	return nil
}

// checkTotals compares the state's counters with what a walk has counted.
func (s *State) checkTotals(t *tally, mods []int64) error {
	switch {
	case t.count != uint64(s.items.Len()):
		return fmt.Errorf("the tree says %d entries and holds %d", s.items.Len(), t.count)
	case t.bytes != uint64(s.bytes):
		return fmt.Errorf("the state says %d bytes and holds %d", s.bytes, t.bytes)
	case t.sum != s.sum:
		return fmt.Errorf("the state says hash sum %016x and holds %016x", s.sum, t.sum)
	case t.maxMod > s.revision:
		return fmt.Errorf("an entry has revision %d, the store %d", t.maxMod, s.revision)
	}
	// No two entries share a mod revision: every command takes its own.
	slices.Sort(mods)
	for i := 1; i < len(mods); i++ {
		if mods[i-1] == mods[i] {
			return fmt.Errorf("two entries have mod revision %d", mods[i])
		}
	}
	for i := range s.windows {
		if err := t.addWindow(&s.windows[i]); err != nil {
			return err
		}
	}
	return nil
}
