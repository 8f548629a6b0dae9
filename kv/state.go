package kv

import (
	"fmt"
	"slices"
)

// Batch is what one raft log entry carries: commands that are applied one after
// the other, and the identity under which replay protection knows them.
type Batch struct {
	Node uint64 // the member that proposed it; 0: no identity, always applied
	Boot uint64 // grows at every start of that member
	Seq  uint64 // counts the member's batches from 1 within one Boot
	// Commands may be empty: the batch then only takes up its Seq.
	Commands []Command
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
	// Expires is when its lease ends, Unix milliseconds: a label, which the
	// next keep-alive changes. 0: it has no lease, or the entry is out of an Event.
	Expires int64
}

// State is the replicated state at one position of the log. Use NewState or
// ReadSnapshot; the zero State is not usable.
type State struct {
	// items has the records (record.go) in the order of their keys. An item is
	// one allocation without pointers, and 8 bytes of the tree.
	items *itemTree

	revision int64  // store revision; 0 for a store that never changed
	applied  uint64 // raft index of the last applied entry
	bytes    int64  // sum of len(key)+len(value)
	sum      uint64 // sum of recordHash over items, modulo 2^64

	clock   int64 // milliseconds, moved by OpTick alone; never back
	leases  leases
	history history
	once    once

	// windows is the replay table, strictly ascending by node. A slice, as it
	// holds a handful of members and must never be walked in a random order.
	windows []window

	// Beside the state: see digest.go.
	trace  uint64 // digest of the results since the last mark
	marked bool   // there was one since this state was made or read
	scrub  scrub
}

// NewState returns the empty state that every replica starts from.
func NewState() *State {
	return &State{
		items: newItemTree(), leases: newLeases(), once: newOnce(),
		history: history{maxEvents: maxEvents, maxSize: maxEventSize},
	}
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
			s.trace = results[len(results)-1].fold(s.trace)
		}
		return results
	}
	for i := range b.Commands {
		results = append(results, s.run(&b.Commands[i], index))
		s.trace = results[len(results)-1].fold(s.trace)
		if len(s.leases.orphans) > 0 {
			s.leases.reap()
		}
		s.history.trim()
	}
	return results
}

// run carries out one command, or finds the result of an earlier one.
func (s *State) run(c *Command, index uint64) Result {
	if c.Once != nil {
		return s.runOnce(c, index)
	}
	return s.runAlways(c, index)
}

func (s *State) runAlways(c *Command, index uint64) Result {
	switch c.Op {
	case OpPut:
		return s.put(c, index)
	case OpDelete:
		return s.delete(c)
	case OpDeleteRange:
		return s.deleteRange(c.Span)
	case OpTxn:
		return s.txn(c, index)
	case OpGrant:
		id := s.leases.grant(c.TTL, c.Wall, index, false)
		return s.leaseResult(id)
	case OpKeepAlive:
		return s.keepAlive(c, index)
	case OpRevoke:
		return s.revoke(c.Lease)
	default: // OpTick, as the batch is valid
		return s.tick(&c.Tick)
	}
}

// put always takes a revision, also where it stores the bytes that were there:
// a put is a change, and watchers and preconditions see it as one.
func (s *State) put(c *Command, index uint64) Result {
	if c.If.Kind != CheckNothing {
		if r, ok := s.meets(c); !ok {
			return r
		}
	}
	lease := c.Lease
	if c.TTL != 0 {
		lease = s.leases.grant(c.TTL, c.Wall, index, true)
	} else if lease != 0 && !s.leases.has(lease) {
		return s.refuse(RefusedNoLease)
	}
	s.revision++
	e, h := s.store(c.Key, c.Value, lease)
	s.history.add(e)
	return Result{Revision: s.revision, Entry: s.entry(e.next, h), Existed: e.prev != ""}
}

// delete of an absent key changes nothing and takes no revision.
func (s *State) delete(c *Command) Result {
	if c.If.Kind != CheckNothing {
		if r, ok := s.meets(c); !ok {
			return r
		}
	}
	e, ok := s.remove(c.Key, s.revision+1)
	if !ok {
		return Result{Revision: s.revision}
	}
	s.revision++
	s.history.add(e)
	// A lease of its own is still there, for its label, until the command ends.
	return Result{Revision: s.revision, Entry: s.entry(e.prev, headOf(e.prev)), Existed: true, Deleted: 1}
}

func (s *State) deleteRange(span Span) Result {
	keys := s.keysOf(span)
	s.removeAll(keys)
	return Result{Revision: s.revision, Deleted: int64(len(keys))}
}

// keysOf returns the present keys of a span. They are collected before any of
// them is removed, as a tree must not change while it is walked.
func (s *State) keysOf(span Span) (keys []string) {
	s.items.ascend(span.Start, func(rec string, h head) bool {
		key := keyOf(rec, h)
		if !span.Contains(key) {
			return false
		}
		keys = append(keys, key)
		return true
	})
	return keys
}

// removeAll removes keys that are there, in ascending order, at one revision;
// without any it takes none.
func (s *State) removeAll(keys []string) {
	if len(keys) > 0 {
		s.revision++
	}
	for _, key := range keys {
		e, _ := s.remove(key, s.revision)
		s.history.add(e)
	}
}

// refuse is the result of a command that changes nothing, for a reason.
func (s *State) refuse(why Refusal) Result { return Result{Revision: s.revision, Refused: why} }

// meets reports whether the precondition of a put or delete holds, and the
// refusal if not.
func (s *State) meets(c *Command) (Result, bool) {
	e, exists := s.Get(c.Key)
	ok := true
	switch c.If.Kind {
	case CheckExists:
		ok = exists
	case CheckAbsent:
		ok = !exists
	case CheckAnyOf:
		ok = exists && slices.Contains(c.If.Revisions, e.ModRevision)
	case CheckNoneOf:
		ok = !exists || !slices.Contains(c.If.Revisions, e.ModRevision)
	}
	if ok {
		return Result{}, true
	}
	r := s.refuse(RefusedCondition)
	r.Entry, r.Existed = e, exists
	return r, false
}

// store puts a key at the present revision, which the caller has taken, and
// attaches it to the lease, which is there; 0 is none. It returns the event,
// which is yet to become history, and the head of its next record.
func (s *State) store(key string, value []byte, lease int64) (event, head) {
	create, version := s.revision, int64(1)
	place := s.items.place(key)
	var old string
	var prevHash, from uint64
	var oldLease int64
	if place != nil {
		var was head
		old, was = recordAt(*place)
		create, version, oldLease = was.create, was.version+1, was.lease
		s.bytes -= was.payload()
		prevHash = recordHash(old, was)
		from = prevHash
	} else {
		prevHash = absentHash(key)
	}
	h := newHead(create, s.revision, version, lease, len(key), len(value))
	rec := newRecord(h, key, value)
	if place != nil {
		*place = itemOf(rec)
	} else {
		s.items.set(rec)
	}
	s.bytes += h.payload()
	to := recordHash(rec, h)
	s.sum += to - from
	s.scrub.moved(key, from, to)
	if oldLease != 0 || lease != 0 {
		s.leases.move(keyOf(rec, h), oldLease, lease)
	}
	return event{s.revision, old, rec, eventHash(s.revision, false, prevHash), int32(h.keyLen)}, h
}

// remove takes a key out at that revision, and returns the event; false: it is
// not there. Here the caller may take the revision afterwards, so that a delete
// looks for its key once.
func (s *State) remove(key string, revision int64) (event, bool) {
	old, h, ok := s.items.delete(key)
	if !ok {
		return event{}, false
	}
	s.bytes -= h.payload()
	prevHash := recordHash(old, h)
	s.sum -= prevHash
	s.scrub.moved(key, prevHash, 0)
	if h.lease != 0 {
		s.leases.move(key, h.lease, 0)
	}
	return event{revision, old, "", eventHash(revision, true, prevHash), int32(h.keyLen)}, true
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
	rec, h, ok := s.items.get(key)
	if !ok {
		return Entry{}, false
	}
	return s.entry(rec, h), true
}

// entry is entryOf with what the state knows of the lease.
func (s *State) entry(rec string, h head) Entry {
	e := entryOf(rec, h)
	if h.lease != 0 {
		// An old record may name a lease that has ended: no label then.
		l, _ := s.leases.byID.Get(h.lease)
		e.Expires = l.expires
	}
	return e
}

// Len returns the number of keys.
func (s *State) Len() int { return s.items.len() }

// Bytes returns the sum of len(key)+len(value) over all entries. What the
// process needs for them is more: about 45 bytes an entry on top.
func (s *State) Bytes() int64 { return s.bytes }

// Ascend calls f for each entry whose key is at least from, in byte order of
// the keys, until f returns false. The state must not be changed meanwhile.
func (s *State) Ascend(from string, f func(Entry) bool) {
	s.items.ascend(from, func(rec string, h head) bool { return f(s.entry(rec, h)) })
}

// Clone returns a copy that is independent of s, in time that does not depend
// on the number of keys. The two share memory until one of them is written: the
// first writes after a Clone copy the tree nodes on their path, never the items.
//
// Clone itself counts as a write of s. After it returns, one goroutine may read
// the clone while another writes s, or the other way round.
func (s *State) Clone() *State {
	c := *s
	c.items = s.items.clone()
	c.windows = slices.Clone(s.windows)
	c.leases, c.once, c.history = s.leases.clone(), s.once.clone(), s.history.clone()
	return &c
}

func (s *State) extras() extras {
	return extras{
		clock: s.clock, lastLease: s.leases.last, leases: s.leases.sum,
		history: s.history.sum, kept: s.once.sum, tombs: s.once.tombSum,
	}
}

// Hash returns a 64-bit digest of all that is replicated: entries, revision,
// history, leases, clock, results kept for idempotency keys, replay table; the same on every replica at one log position, and across snapshot and
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
	return s.extras().join(stateHash(s.sum, windows, s.revision))
}
