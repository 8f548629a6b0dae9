package kv

import (
	"errors"
	"fmt"
	"slices"
)

// Check walks the whole state and returns the first broken invariant it finds.
// It needs memory for the keys of the history and 8 bytes a tombstone, and
// time for sorting those.
func (s *State) Check() error {
	c := checker{s: s}
	for _, part := range [...]struct {
		name  string
		check func() error
	}{
		{"entries", c.items},
		{"history", c.history},
		{"leases", c.leases},
		{"kept results", c.kept},
		{"tombstones", c.tombstones},
		{"replay table", c.windows},
	} {
		if err := part.check(); err != nil {
			return fmt.Errorf("kv: check: %s: %w", part.name, err)
		}
	}
	return nil
}

// checker is a walk over the state. What the parts must agree on is counted by
// the one and compared by the other.
type checker struct {
	s *State
	t tally

	attached int // items with a lease
	recent   int // items of a revision that history has
}

func (c *checker) items() error {
	s, t := c.s, &c.t
	var err error
	s.items.ascend("", func(rec string, h head) bool {
		if err = c.item(rec, h); err != nil {
			err = fmt.Errorf("entry %d: %w", t.count, err)
		}
		return err == nil
	})
	if err == nil {
		err = s.items.check()
	}
	switch {
	case err != nil:
		return err
	case t.count != uint64(s.items.len()):
		return fmt.Errorf("the tree says %d and holds %d", s.items.len(), t.count)
	case t.bytes != uint64(s.bytes):
		return fmt.Errorf("the state says %d bytes and holds %d", s.bytes, t.bytes)
	case t.sum != s.sum:
		return fmt.Errorf("the state says hash sum %016x and holds %016x", s.sum, t.sum)
	case t.maxMod > s.revision:
		return fmt.Errorf("one has revision %d, the store %d", t.maxMod, s.revision)
	}
	return nil
}

func (c *checker) item(rec string, h head) error {
	key := keyAt(itemOf(rec))
	if keyOf(rec, h) != key {
		return fmt.Errorf("the record of key %q is found as that of %q", keyOf(rec, h), key)
	}
	if err := c.t.add(bytesOf(key), h); err != nil {
		return err
	}
	c.t.sum += recordHash(rec, h)
	if h.mod > c.s.history.compacted {
		c.recent++
	}
	if h.lease == 0 {
		return nil
	}
	c.attached++
	c.t.attachSum += attachHash(h.lease)
	a, ok := c.s.leases.keys.Get(attachment{h.lease, key})
	if !ok {
		return fmt.Errorf("key %q has lease %d, which does not know", key, h.lease)
	}
	if &bytesOf(a.key)[0] != &bytesOf(rec)[h.size] {
		return fmt.Errorf("lease %d keeps an old record of key %q in memory", h.lease, key)
	}
	return nil
}

func (c *checker) leases() error {
	l, t := &c.s.leases, &c.t
	var err error
	l.byID.Scan(func(id int64, one lease) bool {
		switch err = t.addLease(id, &one); {
		case err != nil:
		case !l.due.has(id, one.deadline, one.index):
			err = fmt.Errorf("lease %d is not among those with its deadline", id)
		case one.deadline > c.s.clock+one.ttl || one.index > c.s.applied:
			err = fmt.Errorf("lease %d: deadline %d at clock %d, log index %d at %d", id, one.deadline, c.s.clock, one.index, c.s.applied)
		}
		return err == nil
	})
	switch {
	case err != nil:
		return err
	case t.lastLease > l.last:
		return fmt.Errorf("there is lease %d, and the last was %d", t.lastLease, l.last)
	case t.leaseSum != l.sum:
		return fmt.Errorf("the state says hash sum %016x and holds %016x", l.sum, t.leaseSum)
	case l.due.len() != l.byID.Len():
		return fmt.Errorf("%d have a deadline or wait for one, of %d", l.due.len(), l.byID.Len())
	case t.attachSum != 0 || l.keys.Len() != c.attached:
		return fmt.Errorf("%d keys are attached, %d entries have one, and the counts say other", l.keys.Len(), c.attached)
	case len(l.orphans) > 0:
		return errors.New("orphans are left over")
	}
	return nil
}

// history undoes all events, newest first, and compares what each left behind
// with what the next one, or the entry, says.
func (c *checker) history() error {
	s, h := c.s, &c.s.history
	if err := c.eventsInOrder(); err != nil {
		return err
	}
	view := s.History()
	present := map[string]string{}
	puts, recent := 0, c.recent
	for i := len(view.full); i >= 0; i-- {
		chunk := view.chunk(i)
		if i < len(view.full) && len(chunk) == 0 {
			return errors.New("an empty chunk")
		}
		for j := len(chunk) - 1; j >= 0; j-- {
			e := &chunk[j]
			key := e.key()
			next, ok := present[key]
			if !ok {
				next, _, _ = s.items.get(key)
			}
			if next != e.next {
				return fmt.Errorf("revision %d: key %q does not lead to what is there since", e.revision, key)
			}
			if err := follows(e.revision, e.next == "", e.prev, e.next); err != nil {
				return fmt.Errorf("revision %d: key %q: %w", e.revision, key, err)
			}
			if e.next != "" {
				puts++
			}
			if e.prev != "" && headOf(e.prev).mod > h.compacted {
				recent++
			}
			present[key] = e.prev
		}
	}
	// Each put led to a record of its own. If there are no more records that
	// new, each of them has its event.
	if puts != recent {
		return fmt.Errorf("%d puts after revision %d, and %d records", puts, h.compacted, recent)
	}
	return nil
}

// eventsInOrder checks each event and the totals.
func (c *checker) eventsInOrder() error {
	s, t, h := c.s, &c.t, &c.s.history
	var err error
	view := s.History()
	view.from(0, func(e *event) bool {
		key := e.key()
		var prev head
		prevHash := absentHash(key)
		if e.prev != "" {
			prev = headOf(e.prev)
			prevHash = recordHash(e.prev, prev)
		}
		err = t.addEvent(e.revision, bytesOf(key), e.next == "", e.prev != "", prev, prevHash)
		if err == nil && e.hash != eventHash(e.revision, e.next == "", prevHash) {
			err = fmt.Errorf("revision %d: key %q: a wrong hash", e.revision, key)
		}
		if err == nil && int(e.keyLen) != len(key) {
			err = fmt.Errorf("revision %d: a key of %d bytes that counts for %d", e.revision, len(key), e.keyLen)
		}
		if err == nil && e.prev != "" && keyOf(e.prev, prev) != key {
			err = fmt.Errorf("revision %d: keys %q and %q in one event", e.revision, keyOf(e.prev, prev), key)
		}
		return err == nil
	})
	switch {
	case err != nil:
		return err
	case t.events == 0 && h.compacted != s.revision:
		return fmt.Errorf("no events, compacted up to %d, revision %d", h.compacted, s.revision)
	case t.events > 0 && (t.firstEvent != h.compacted+1 || t.lastEvent != s.revision):
		return fmt.Errorf("events from %d to %d, compacted up to %d, revision %d", t.firstEvent, t.lastEvent, h.compacted, s.revision)
	case t.events != uint64(h.count) || t.eventBytes != uint64(h.size):
		return fmt.Errorf("the state says %d events of %d bytes and holds %d of %d", h.count, h.size, t.events, t.eventBytes)
	case t.eventSum != h.sum:
		return fmt.Errorf("the state says hash sum %016x and holds %016x", h.sum, t.eventSum)
	case h.count > h.maxEvents || h.size > h.maxSize:
		return fmt.Errorf("%d events of %d bytes are more than are kept", h.count, h.size)
	}
	return nil
}

func (c *checker) kept() error {
	o, t := &c.s.once, &c.t
	var err error
	largest := int64(0)
	o.kept.Scan(func(key string, k kept) bool {
		if err = t.addKept(key, &k); err == nil {
			_, err = decodeResult(bytesOf(k.result))
		}
		window := int64(0)
		if err == nil {
			window = keptWindows[k.class].Milliseconds()
		}
		switch {
		case err != nil:
		case !o.due.has(key, k.deadline, k.index):
			err = fmt.Errorf("key %q is not among those with its deadline", key)
		case k.deadline > c.s.clock+window || k.index > c.s.applied:
			err = fmt.Errorf("key %q: deadline %d at clock %d, log index %d at %d", key, k.deadline, c.s.clock, k.index, c.s.applied)
		}
		largest = max(largest, k.size(key))
		return err == nil
	})
	switch {
	case err != nil:
		return err
	case o.due.len() != o.kept.Len():
		return fmt.Errorf("%d have a deadline or wait for one, of %d", o.due.len(), o.kept.Len())
	case t.keptBytes != uint64(o.bytes):
		return fmt.Errorf("the state says %d bytes and holds %d", o.bytes, t.keptBytes)
	case t.keptSum != o.sum:
		return fmt.Errorf("the state says hash sum %016x and holds %016x", o.sum, t.keptSum)
	case o.kept.Len() > o.maxKept || o.kept.Len() > 0 && o.bytes-largest >= o.maxBytes:
		return fmt.Errorf("%d of %d bytes are more than are kept", o.kept.Len(), o.bytes)
	}
	return nil
}

func (c *checker) tombstones() error {
	o, t := &c.s.once, &c.t
	all := make([]uint64, 0, o.tombs.count)
	o.tombs.each(func(hash uint64) bool {
		t.addTombstone(hash)
		all = append(all, hash)
		return true
	})
	slices.Sort(all)
	same := len(all) == o.tombSet.Len()
	i := 0
	o.tombSet.Scan(func(hash uint64) bool {
		same = same && all[i] == hash
		i++
		return same
	})
	switch {
	case len(all) != o.tombs.count:
		return fmt.Errorf("the queue says %d and holds %d", o.tombs.count, len(all))
	case !same:
		return errors.New("queue and set hold others")
	case t.tombSum != o.tombSum:
		return fmt.Errorf("the state says hash sum %016x and holds %016x", o.tombSum, t.tombSum)
	case len(all) > o.maxTombs:
		return fmt.Errorf("%d are more than are kept", len(all))
	}
	return nil
}

func (c *checker) windows() error {
	for i := range c.s.windows {
		if err := c.t.addWindow(&c.s.windows[i]); err != nil {
			return err
		}
	}
	return nil
}
