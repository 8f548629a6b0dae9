package kv

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
)

// Bounds of the history; after each command the oldest revisions go until both hold.
const (
	maxEvents    = 100_000
	maxEventSize = 32 << 20 // bytes, by event.size
)

// event is one change of one key. At least one of the records is there, and
// both are of the same key.
type event struct {
	revision int64
	prev     string // record that was there before; empty: none
	// next is the record that is there since; empty: deleted. It is the memory of
	// prev of the key's next event, or of the item.
	next string
	hash uint64 // by eventHash
	// keyLen is that of the key: trimming an event must not touch its records,
	// which left the processor's caches long ago.
	keyLen int32
}

// key returns the event's key.
func (e *event) key() string {
	rec := e.next
	if rec == "" {
		rec = e.prev
	}
	return keyOf(rec, headOf(rec))
}

func (e *event) size() int64 { return eventSize(int(e.keyLen), len(e.prev)) }

// eventSize is what an event counts for: its own memory and what it alone keeps alive.
func eventSize(keyLen, prevLen int) int64 { return 64 + int64(keyLen) + int64(prevLen) }

// eventHash is the hash of one event. What is there since is not in it: it is in
// the hash of the key's next event, or of the item.
// prev is recordHash of the record that was there before, or absentHash of the key.
func eventHash(revision int64, deleted bool, prev uint64) uint64 {
	x := mix(prev) + uint64(revision)
	if deleted {
		x = ^x
	}
	return mix(x)
}

// recomputed is the hash of the event as it is in memory now.
func (e *event) recomputed() uint64 {
	if e.prev == "" {
		return eventHash(e.revision, e.next == "", absentHash(e.key()))
	}
	return eventHash(e.revision, e.next == "", recordHash(e.prev, headOf(e.prev)))
}

// absentHash stands for the record of a key that was not there.
func absentHash(key string) uint64 {
	return mix(uint64(crc32.Checksum(bytesOf(key), castagnoli)))
}

// loadedEvent is an event as a snapshot has it: without what is there since.
type loadedEvent struct {
	revision int64
	deleted  bool
	prev     string // record, or empty
	key      string // where prev is empty
}

// addEvent counts one event of a walk in order, and checks it against its
// predecessor. prev is its head where hasPrev; size is that of the record.
func (t *tally) addEvent(revision int64, key []byte, deleted, hasPrev bool, prev head, prevHash uint64) error {
	switch {
	case revision < 1:
		return fmt.Errorf("an event of revision %d", revision)
	case !hasPrev && deleted:
		return fmt.Errorf("revision %d: key %q was deleted and not there", revision, key)
	case hasPrev && prev.mod >= revision:
		return fmt.Errorf("revision %d: key %q was of revision %d before", revision, key, prev.mod)
	case len(key) < 1 || len(key) > MaxKeySize:
		return fmt.Errorf("revision %d: a key of %d bytes", revision, len(key))
	}
	size := 0
	if hasPrev {
		if err := prev.valid(); err != nil {
			return fmt.Errorf("revision %d: %w", revision, err)
		}
		size = int(prev.recordSize())
	}
	switch {
	case t.events == 0:
		t.firstEvent = revision
	case revision == t.lastEvent && bytes.Compare(t.lastEventKey, key) >= 0:
		return fmt.Errorf("revision %d: keys are not in ascending order", revision)
	case revision != t.lastEvent && revision != t.lastEvent+1:
		return fmt.Errorf("history goes from revision %d to %d", t.lastEvent, revision)
	}
	t.lastEvent = revision
	t.lastEventKey = append(t.lastEventKey[:0], key...)
	t.events++
	t.eventBytes += uint64(eventSize(len(key), size))
	t.eventSum += eventHash(revision, deleted, prevHash)
	return nil
}

// history is the latest events, in ascending order of revision and key, with no
// revision missing between compacted and the present one.
//
// Chunks in full are never written again, and tail is only appended to; so a
// History that holds both slices stays as it is while the state goes on.
type history struct {
	full [][]event // none is empty
	tail []event
	skip int // how many of the first events have been trimmed

	compacted int64  // the newest revision that is trimmed
	count     int    // events
	size      int64  // sum of eventSize
	sum       uint64 // of event.hash, modulo 2^64
	tailSize  int64  // of the events in tail, trimmed or not

	// The bounds are the constants but in tests.
	maxEvents int
	maxSize   int64
}

const (
	chunkEvents = 256
	// sealSize ends a chunk early, as its trimmed events stay in memory until
	// all of it can go.
	sealSize = 1 << 20
)

// clone shares all memory. The clone has no room to append in, and takes a copy
// first; h goes on in place, behind all that the clone can see.
func (h *history) clone() history {
	c := *h
	c.full, c.tail = slices.Clip(h.full), slices.Clip(h.tail)
	return c
}

// add appends an event.
func (h *history) add(e event) {
	if len(h.tail) == chunkEvents || h.tailSize >= sealSize {
		h.full = append(h.full, h.tail)
		h.tail, h.tailSize = make([]event, 0, len(h.tail)), 0
	}
	size := e.size()
	h.tail = append(h.tail, e)
	h.tailSize += size
	h.count++
	h.size += size
	h.sum += e.hash
}

// trim drops the oldest revisions until the bounds hold.
func (h *history) trim() {
	for h.count > h.maxEvents || h.size > h.maxSize {
		h.compacted = h.first().revision
		for h.count > 0 && h.first().revision == h.compacted {
			h.pop()
		}
	}
}

// first returns the oldest event; there is one.
func (h *history) first() *event {
	if len(h.full) > 0 {
		return &h.full[0][h.skip]
	}
	return &h.tail[h.skip]
}

// pop drops the oldest event. Its memory goes with the last of its chunk.
func (h *history) pop() {
	e := h.first()
	h.count--
	h.size -= e.size()
	h.sum -= e.hash
	h.skip++
	switch {
	case len(h.full) > 0 && h.skip == len(h.full[0]):
		// A new slice: the old one, which a History may hold, would keep the
		// chunk alive for as long as the rest of it.
		h.full, h.skip = slices.Clone(h.full[1:]), 0
	case len(h.full) == 0 && h.skip == len(h.tail):
		h.tail, h.tailSize, h.skip = nil, 0, 0
	}
}

// loadHistory takes in the events of a snapshot, all at once, after the items
// and the revision. It finds what each event left behind: the record before the
// key's following event, or the item. Both then share one memory.
func (s *State) loadHistory(events []loadedEvent) error {
	s.history.compacted = s.revision
	if len(events) == 0 {
		return nil
	}
	s.history.compacted = events[0].revision - 1
	// present is what was under a key right after the event that is looked at,
	// for the keys that have later events.
	present := map[string]string{}
	nexts := make([]string, len(events))
	for i := len(events) - 1; i >= 0; i-- {
		e := &events[i]
		key := e.key
		if e.prev != "" {
			key = keyOf(e.prev, headOf(e.prev))
		}
		next, ok := present[key]
		if !ok {
			next, _, _ = s.items.get(key)
		}
		if err := follows(e.revision, e.deleted, e.prev, next); err != nil {
			return fmt.Errorf("revision %d: key %q: %w", e.revision, key, err)
		}
		nexts[i] = next
		present[key] = e.prev
	}
	for i := range events {
		e := &events[i]
		out := event{revision: e.revision, prev: e.prev, next: nexts[i], keyLen: int32(len(e.key))}
		before := absentHash(e.key)
		if e.prev != "" {
			h := headOf(e.prev)
			out.keyLen, before = int32(h.keyLen), recordHash(e.prev, h)
		}
		out.hash = eventHash(e.revision, e.deleted, before)
		s.history.add(out)
	}
	return nil
}

// follows checks what was under a key right before and right after an event.
func follows(revision int64, deleted bool, prev, next string) error {
	if deleted {
		if prev == "" || next != "" {
			return errors.New("deleted, and absent before or present since")
		}
		return nil
	}
	if next == "" {
		return errors.New("put, and absent since")
	}
	n := headOf(next)
	if n.mod != revision {
		return fmt.Errorf("put, and since of revision %d", n.mod)
	}
	if n.create == revision && n.version == 1 {
		return nil // created, or replaced after a deletion
	}
	if prev == "" {
		return fmt.Errorf("created, and since of version %d and create revision %d", n.version, n.create)
	}
	if p := headOf(prev); n.create != p.create || n.version != p.version+1 {
		return fmt.Errorf("version %d since revision %d became version %d since revision %d", p.version, p.create, n.version, n.create)
	}
	return nil
}

// History is the events that the state still has, at one moment. It stays as it
// is while the state changes, and any number of goroutines may read it.
type History struct {
	revision, compacted int64
	full                [][]event
	tail                []event
	skip                int
}

// History returns what is kept, in constant time.
func (s *State) History() History {
	h := &s.history
	return History{revision: s.revision, compacted: h.compacted, full: h.full, tail: h.tail, skip: h.skip}
}

// Revision is the newest revision: that of the state.
func (h History) Revision() int64 { return h.revision }

// Compacted is the newest revision whose events are gone: events are there of
// all later ones, and Views from this one on. 0: nothing is gone.
func (h History) Compacted() int64 { return h.compacted }

// chunk returns one of the chunks 0 to len(h.full), without trimmed events.
func (h *History) chunk(i int) []event {
	c := h.tail
	if i < len(h.full) {
		c = h.full[i]
	}
	if i == 0 {
		c = c[h.skip:]
	}
	return c
}

// from calls f for each event of revision from and later, in order, until f
// returns false. It finds the first in time that grows with the logarithm of
// the history.
func (h *History) from(from int64, f func(*event) bool) {
	// The first chunk that ends at from or later holds the first event.
	first, _ := slices.BinarySearchFunc(h.full, from, func(c []event, from int64) int {
		return cmp.Compare(c[len(c)-1].revision, from)
	})
	for i := first; i <= len(h.full); i++ {
		c := h.chunk(i)
		if i == first {
			n, _ := slices.BinarySearchFunc(c, from, func(e event, from int64) int {
				return cmp.Compare(e.revision, from)
			})
			c = c[n:]
		}
		for j := range c {
			if !f(&c[j]) {
				return
			}
		}
	}
}

// Events calls f for each event of revision from and later, by ascending
// revision and within one by ascending key, until f returns false. Those up to
// Compacted are missing without a word: the caller asks first.
func (h History) Events(from int64, f func(Event) bool) {
	h.from(from, func(e *event) bool { return f(e.event()) })
}

// Back calls f for each event of one key, newest first, until f returns false.
func (h History) Back(key string, f func(Event) bool) {
	for i := len(h.full); i >= 0; i-- {
		c := h.chunk(i)
		for j := len(c) - 1; j >= 0; j-- {
			if c[j].key() == key && !f(c[j].event()) {
				return
			}
		}
	}
}

// Before returns what was under key right before it first changed after revision,
// without the label of its lease; false: nothing was, or it has not changed. It looks
// through the events since revision, which is at least Compacted.
func (h History) Before(key string, revision int64) (Entry, bool) {
	rec := h.before(key, revision)
	if rec == "" {
		return Entry{}, false
	}
	return entryOf(rec, headOf(rec)), true
}

// before is Before with the record, empty for none.
func (h *History) before(key string, revision int64) (rec string) {
	h.from(revision+1, func(e *event) bool {
		found := e.key() == key
		if found {
			rec = e.prev
		}
		return !found
	})
	return rec
}

// event returns what clients see of e.
func (e *event) event() Event {
	out := Event{Revision: e.revision, Deleted: e.next == ""}
	if e.prev != "" {
		out.Prev = entryOf(e.prev, headOf(e.prev))
	}
	if e.next != "" {
		out.Entry = entryOf(e.next, headOf(e.next))
	} else {
		out.Entry = Entry{Key: out.Prev.Key, ModRevision: e.revision}
	}
	return out
}
