package kv

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/tidwall/btree"
)

// maxTickKeys bounds how many keys one tick removes, so that the mass expiry
// of leases does not hold up the log. A lease without keys counts as one.
const maxTickKeys = 10_000

// lease is a lease as the state holds it, under its id.
type lease struct {
	ttl      int64  // milliseconds
	deadline int64  // in the state's clock, at least 1; 0: it waits for a tick
	index    uint64 // of the log entry that granted it or kept it alive last
	expires  int64  // the deadline as a label, Unix milliseconds
	keys     int    // attached to it
	// own says that a put made it for its key: it goes when no key is left. A
	// lease that was granted stays without keys until it ends.
	own bool
}

// leases is all that a state knows of leases.
type leases struct {
	last int64 // the id that was given out last; ids are never used twice
	byID *btree.Map[int64, lease]
	due  timers[int64]
	// keys holds an attachment for each item that has a lease: for those of
	// one lease to be found in order of their keys. The key is a substring of
	// the item's record, so an attachment costs its 24 bytes and no object.
	keys *btree.BTreeG[attachment]
	sum  uint64 // of leaseHash over byID, modulo 2^64

	// maxTickKeys is the constant but in tests.
	maxTickKeys int
	// orphans are leases of their own whose last key went, while a command
	// runs; a later operation of it may attach a key again.
	orphans []int64
}

type attachment struct {
	lease int64
	key   string
}

// timer is when something ends, or since which log index it waits for the tick
// that starts it.
type timer[ID cmp.Ordered] struct {
	at int64
	id ID
}

// timers orders what ends some time: leases by id, kept results by key. Each
// of them is in one of the two trees.
type timers[ID cmp.Ordered] struct {
	waiting *btree.BTreeG[timer[ID]] // for a tick; at is a log index
	running *btree.BTreeG[timer[ID]] // at is a deadline in the state's clock
}

func newTimers[ID cmp.Ordered]() timers[ID] {
	less := func(a, b timer[ID]) bool { return a.at < b.at || a.at == b.at && a.id < b.id }
	return timers[ID]{newTree(less), newTree(less)}
}

// newTree returns a tree without a lock: the State's caller has one.
func newTree[T any](less func(a, b T) bool) *btree.BTreeG[T] {
	return btree.NewBTreeGOptions(less, btree.Options{NoLocks: true})
}

func (t *timers[ID]) clone() timers[ID] {
	return timers[ID]{t.waiting.Copy(), t.running.Copy()}
}

// add takes in what has the deadline, or waits since index where that is 0.
func (t *timers[ID]) add(id ID, deadline int64, index uint64) {
	if deadline == 0 {
		t.waiting.Set(timer[ID]{int64(index), id})
	} else {
		t.running.Set(timer[ID]{deadline, id})
	}
}

func (t *timers[ID]) remove(id ID, deadline int64, index uint64) {
	if deadline == 0 {
		t.waiting.Delete(timer[ID]{int64(index), id})
	} else {
		t.running.Delete(timer[ID]{deadline, id})
	}
}

func (t *timers[ID]) len() int { return t.waiting.Len() + t.running.Len() }

// has is for Check.
func (t *timers[ID]) has(id ID, deadline int64, index uint64) bool {
	tree, at := t.running, deadline
	if deadline == 0 {
		tree, at = t.waiting, int64(index)
	}
	_, ok := tree.Get(timer[ID]{at, id})
	return ok
}

func newLeases() leases {
	return leases{
		byID: new(btree.Map[int64, lease]),
		due:  newTimers[int64](),
		keys: newTree(func(a, b attachment) bool {
			return a.lease < b.lease || a.lease == b.lease && a.key < b.key
		}),
		maxTickKeys: maxTickKeys,
	}
}

func (t *leases) clone() leases {
	c := *t
	c.byID, c.due, c.keys, c.orphans = t.byID.Copy(), t.due.clone(), t.keys.Copy(), nil
	return c
}

// valid returns the rules that one lease can be held to without its state.
func (l *lease) valid(id int64) error {
	switch {
	case id < 1:
		return fmt.Errorf("lease %d", id)
	case l.ttl < 1 || l.ttl > MaxTTL.Milliseconds():
		return fmt.Errorf("lease %d: a TTL of %d ms", id, l.ttl)
	case l.deadline < 0 || l.deadline > maxMillis+l.ttl || l.index > 1<<63-1:
		return fmt.Errorf("lease %d: deadline %d, log index %d", id, l.deadline, l.index)
	case l.expires < 0 || l.expires > maxMillis+l.ttl:
		return fmt.Errorf("lease %d: expires at %d", id, l.expires)
	case l.keys < 0 || l.own && l.keys == 0:
		return fmt.Errorf("lease %d: %d keys, of its own: %v", id, l.keys, l.own)
	}
	return nil
}

// leaseHash is the hash of one lease; the attachments are in those of items. It
// works in scratch, which may be nil.
func leaseHash(scratch []byte, id int64, l *lease) uint64 {
	own := uint64(0)
	if l.own {
		own = 1
	}
	b := scratch[:0]
	for _, v := range [...]uint64{uint64(id), uint64(l.ttl), uint64(l.deadline), l.index, uint64(l.expires), uint64(l.keys), own} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return joinHash(crc32.Checksum(b[:24], castagnoli), crc32.Checksum(b[24:], castagnoli))
}

// attachHash is what one attached key, or one of the keys that a lease counts,
// adds to a sum: with equal sums the counts are right, in constant memory.
func attachHash(id int64) uint64 { return mix(uint64(id)) }

// set stores a lease, new or changed; old is what was there, or nil.
func (t *leases) set(id int64, old, l *lease) {
	if old != nil {
		t.sum -= leaseHash(nil, id, old)
	}
	if old == nil || old.deadline != l.deadline || old.index != l.index {
		if old != nil {
			t.due.remove(id, old.deadline, old.index)
		}
		t.due.add(id, l.deadline, l.index)
	}
	t.byID.Set(id, *l)
	t.sum += leaseHash(nil, id, l)
}

// drop removes a lease that has no keys.
func (t *leases) drop(id int64) {
	l, _ := t.byID.Delete(id)
	t.due.remove(id, l.deadline, l.index)
	t.sum -= leaseHash(nil, id, &l)
}

// load takes in a lease of a snapshot; the items, and so the attachments, are
// there already (loadAttachment).
func (t *leases) load(id int64, l lease) { t.set(id, nil, &l) }

// loadAttachment takes in the lease of an item of a snapshot; key is a
// substring of its record.
func (t *leases) loadAttachment(id int64, key string) { t.keys.Set(attachment{id, key}) }

// addLease counts one lease, in ascending order of ids, and checks it.
func (t *tally) addLease(id int64, l *lease) error {
	if err := l.valid(id); err != nil {
		return err
	}
	if id <= t.lastLease {
		return fmt.Errorf("leases %d and %d are out of order", t.lastLease, id)
	}
	t.lastLease = id
	t.leases++
	t.leaseSum += leaseHash(nil, id, l)
	t.attachSum -= uint64(l.keys) * attachHash(id)
	return nil
}

func (t *leases) has(id int64) bool {
	_, ok := t.byID.Get(id)
	return ok
}

// grant makes a lease and returns its id.
func (t *leases) grant(ttl time.Duration, wall int64, index uint64, own bool) int64 {
	t.last++
	ms := ttl.Milliseconds()
	t.set(t.last, nil, &lease{ttl: ms, index: index, expires: wall + ms, own: own})
	return t.last
}

// move takes an item's key from one lease to another; 0 is none. With the same
// lease twice only the attachment's memory moves, to the item's new record.
func (t *leases) move(key string, from, to int64) {
	if from == to {
		t.keys.Set(attachment{to, key})
		return
	}
	if from != 0 {
		t.keys.Delete(attachment{from, key})
		if l := t.count(from, -1); l.own && l.keys == 0 {
			t.orphans = append(t.orphans, from)
		}
	}
	if to != 0 {
		t.keys.Set(attachment{to, key})
		t.count(to, +1)
	}
}

func (t *leases) count(id int64, delta int) lease {
	old, _ := t.byID.Get(id)
	l := old
	l.keys += delta
	t.set(id, &old, &l)
	return l
}

// reap drops the orphans, once the command is over. Not at once: a transaction
// may take the last key off a lease and attach another one.
func (t *leases) reap() {
	for _, id := range t.orphans {
		if l, ok := t.byID.Get(id); ok && l.keys == 0 {
			t.drop(id)
		}
	}
	t.orphans = t.orphans[:0]
}

// keysOf returns up to limit keys of a lease, in ascending order; 0: all.
func (t *leases) keysOf(id int64, limit int) (keys []string) {
	t.keys.Ascend(attachment{lease: id}, func(a attachment) bool {
		if a.lease != id {
			return false
		}
		keys = append(keys, a.key)
		return len(keys) != limit
	})
	return keys
}

func (t *leases) get(id int64) (Lease, bool) {
	l, ok := t.byID.Get(id)
	if !ok {
		return Lease{}, false
	}
	return Lease{
		ID: id, TTL: time.Duration(l.ttl) * time.Millisecond,
		Deadline: l.deadline, Expires: l.expires, Keys: l.keys,
	}, true
}

// leaseResult is the result of a command that made or changed a lease; neither
// takes a revision.
func (s *State) leaseResult(id int64) Result {
	l, _ := s.leases.get(id)
	return Result{Revision: s.revision, Lease: &l}
}

// keepAlive stops the lease; the next tick that has seen this starts it anew.
func (s *State) keepAlive(c *Command, index uint64) Result {
	old, ok := s.leases.byID.Get(c.Lease)
	if !ok {
		return s.refuse(RefusedNoLease)
	}
	l := old
	if c.TTL != 0 {
		l.ttl = c.TTL.Milliseconds()
	}
	l.deadline, l.index, l.expires = 0, index, c.Wall+l.ttl
	s.leases.set(c.Lease, &old, &l)
	return s.leaseResult(c.Lease)
}

func (s *State) revoke(id int64) Result {
	if !s.leases.has(id) {
		return s.refuse(RefusedNoLease)
	}
	n := s.endLease(id)
	return Result{Revision: s.revision, Deleted: int64(n)}
}

// endLease removes a lease and its keys, and returns how many those were.
func (s *State) endLease(id int64) int {
	keys := s.leases.keysOf(id, 0)
	s.removeAll(keys)
	s.leases.drop(id)
	return len(keys)
}

// tick starts what the proposer of the tick has seen, then ends what is due.
func (s *State) tick(t *Tick) Result {
	s.clock = max(s.clock, t.Clock)
	s.leases.start(t, s.clock)
	s.once.start(t, s.clock)
	deleted, load := 0, 0
	for {
		next, ok := s.leases.due.running.Min()
		if !ok || next.at > s.clock {
			break
		}
		l, _ := s.leases.byID.Get(next.id)
		n := max(l.keys, 1)
		if load > 0 && load+n > s.leases.maxTickKeys {
			break // the rest stays overdue, which Pending tells
		}
		load += n
		deleted += s.endLease(next.id)
	}
	s.once.expire(s.clock)
	return Result{Revision: s.revision, Deleted: int64(deleted)}
}

// start gives their deadline to the leases that were granted, or kept alive,
// no later than what the proposer had applied.
func (t *leases) start(tick *Tick, clock int64) {
	for {
		w, ok := t.due.waiting.Min()
		if !ok || uint64(w.at) > tick.Seen {
			return
		}
		old, _ := t.byID.Get(w.id)
		l := old
		l.deadline, l.expires = clock+l.ttl, tick.Wall+l.ttl
		t.set(w.id, &old, &l)
	}
}

// Clock returns the state's clock, milliseconds; see Tick.
func (s *State) Clock() int64 { return s.clock }

// Pending says what the clock is needed for: unstarted is whether a lease or a
// kept result waits for its first tick; next is the earliest deadline of one
// that does not, 0 if there is none. A deadline that the clock has passed means
// that a tick left work for the next one.
func (s *State) Pending() (unstarted bool, next int64) {
	unstarted = s.leases.due.waiting.Len() > 0 || s.once.due.waiting.Len() > 0
	if l, ok := s.leases.due.running.Min(); ok {
		next = l.at
	}
	if k, ok := s.once.due.running.Min(); ok && (next == 0 || k.at < next) {
		next = k.at
	}
	return unstarted, next
}

// Lease returns a lease.
func (s *State) Lease(id int64) (Lease, bool) { return s.leases.get(id) }

// Leases is the number of leases.
func (s *State) Leases() int { return s.leases.byID.Len() }
