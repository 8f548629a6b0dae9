package kv

import (
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
)

// How a replica that differs is found out. State.Hash is about what the state
// is; what it has answered, and whether its memory still holds what was put
// there, is here:
//
//   - the trace folds in every Result since the last mark. A mark is a place in the
//     log at which replicas compare: Mark returns hash and trace as one number,
//     which one replica tells the others in a Witness;
//   - Scrub recomputes, a few entries at a time, what Hash is kept up to date from.
//     A bit that flipped changes nothing until its entry is touched; this finds it.
//
// The trace begins anew at each mark, so that it says the same on a replica that
// came out of a snapshot, which does not carry it, from its second mark on.

// ErrBroken says that the state in memory is not what was put there.
var ErrBroken = errors.New("the state in memory is not what was put there")

// Witness is what one member says of its state: the digest that it had at a mark.
type Witness struct {
	Member uint64
	// Mark: this entry of the log is a mark itself. Only a leader proposes these.
	Mark   bool
	Index  uint64 // the log index of the mark that Digest is of; 0: the member knows none
	Digest uint64
}

// witnessVersion is above the digest's upper half. Another one has other
// digests, and does not compare with this one.
const witnessVersion = 1

// AppendWitness appends a log entry with a witness to dst.
//
// It is a batch with a tick of term 0, which no term is: a version that knows of no
// witnesses takes it for a late tick, and skips it on every member alike. An op
// of its own would stop the members of such a version, and with them a rolling
// upgrade. A mark has no identity, as whatever a leader alone proposes.
func AppendWitness(dst []byte, w Witness) []byte {
	tick := Tick{Clock: witnessVersion<<32 | int64(w.Digest>>32), Wall: int64(w.Digest & (1<<32 - 1)), Seen: w.Index}
	c := AppendCommand(nil, &Command{Op: OpTick, Tick: tick})
	if w.Mark {
		return AppendBatch(dst, 0, w.Member, 0, c)
	}
	return AppendBatch(dst, w.Member, 0, 1, c)
}

// Witness returns what AppendWitness encoded. Such a batch is not for Apply.
func (b *Batch) Witness() (w Witness, ok bool) {
	if len(b.Commands) != 1 || b.Commands[0].Op != OpTick || b.Commands[0].Tick.Term != 0 {
		return w, false
	}
	t := &b.Commands[0].Tick
	if t.Clock>>32 != witnessVersion || t.Wall >= 1<<32 {
		return w, false
	}
	w = Witness{Member: b.Node, Index: t.Seen, Digest: uint64(t.Clock)<<32 | uint64(t.Wall)}
	if b.Node == 0 {
		w.Member, w.Mark = b.Boot, true
	}
	return w, true
}

// Mark is SetApplied for an entry that is a mark, and returns the digest there:
// Hash, and the results since the mark before. whole says that there was one:
// else the digest lacks the results before this state was made or read, and must
// not be compared.
func (s *State) Mark(index uint64) (digest uint64, whole bool) {
	digest, whole = mix(s.Hash()+mix(s.trace)), s.marked
	s.applied, s.trace, s.marked = index, 0, true
	return digest, whole
}

// fold adds one number to a digest. It is a bijection of either.
func fold(digest, v uint64) uint64 {
	return bits.RotateLeft64((digest^v)*0x9e3779b97f4a7c15, 32)
}

// fold adds a result to a digest. The bytes of a put or deleted entry are left out:
// they are those of the command or of the state, whose hash has them.
func (r *Result) fold(digest uint64) uint64 {
	flags := uint64(r.Refused)<<3 | bitIf(r.Existed, 1) | bitIf(r.Duplicate, 2) | bitIf(r.Replayed, 4)
	digest = fold(digest, uint64(r.Revision))
	digest = fold(digest, flags)
	digest = r.Entry.fold(digest)
	if r.Window != 0 || r.Deleted != 0 {
		digest = fold(fold(digest, uint64(r.Window)), ^uint64(r.Deleted))
	}
	if l := r.Lease; l != nil {
		for _, v := range [...]int64{l.ID, int64(l.TTL), l.Deadline, l.Expires, int64(l.Keys)} {
			digest = fold(digest, uint64(v))
		}
	}
	if r.Txn != nil {
		digest = r.Txn.fold(digest)
	}
	return digest
}

func (e *Entry) fold(digest uint64) uint64 {
	digest = fold(digest, uint64(e.CreateRevision))
	digest = fold(digest, uint64(e.ModRevision))
	digest = fold(digest, uint64(e.Version))
	if e.Lease != 0 {
		digest = fold(fold(digest, uint64(e.Lease)), uint64(e.Expires))
	}
	return digest
}

func (t *TxnResult) fold(digest uint64) uint64 {
	digest = fold(digest, bitIf(t.Succeeded, 1))
	for _, v := range [...]int64{t.Put, t.Deleted, t.Skipped, int64(len(t.Ops))} {
		digest = fold(digest, uint64(v))
	}
	for i := range t.Ops {
		o := &t.Ops[i]
		digest = fold(digest, bitIf(o.Existed, 1)|bitIf(o.Skipped, 2))
		digest = fold(fold(digest, uint64(o.Deleted)), uint64(o.Count))
		digest = o.Entry.fold(digest)
		for j := range o.Items {
			e := &o.Items[j]
			digest = e.fold(fold(digest, uint64(crc32.Checksum(bytesOf(e.Key), castagnoli))))
			digest = fold(digest, uint64(crc32.Checksum(e.Value, castagnoli)))
		}
	}
	return digest
}

// scrub is a walk over entries and events in small steps, that goes on while the
// state changes between them.
type scrub struct {
	// next is where the walk over entries goes on: sum is of recordHash over
	// those below it, kept up to date by store and remove. Empty: a round begins.
	next string
	sum  uint64
	// event is the revision at which the walk over events goes on, and skip how
	// many of that revision it has seen.
	event int64
	skip  int
}

// moved tells the walk that an entry changed: from and to are recordHash before and
// after, or 0.
func (c *scrub) moved(key string, from, to uint64) {
	if key < c.next {
		c.sum += to - from
	}
}

// Scrub checks the next entries and events, about count of each and no more than
// size bytes of entries, and begins anew behind the last. Like Apply it is for
// the goroutine that writes the state. The error is ErrBroken, wrapped.
//
// Leases, kept results and tombstones are not walked: they are compared as they
// change (Mark), and all of them whenever a snapshot is written.
func (s *State) Scrub(count int, size int64) error {
	if err := s.scrubEntries(count, size); err != nil {
		return fmt.Errorf("%w: %w", ErrBroken, err)
	}
	if err := s.scrubEvents(count); err != nil {
		return fmt.Errorf("%w: %w", ErrBroken, err)
	}
	return nil
}

func (s *State) scrubEntries(count int, size int64) error {
	c := &s.scrub
	last, more, found := "", false, true
	s.items.ascend(c.next, func(rec string, h head) bool {
		if more = count <= 0 || size <= 0; more {
			return false
		}
		last = keyOf(rec, h)
		if found = last == keyAt(itemOf(rec)) && last >= c.next; !found {
			return false // going on behind another key could go round for ever
		}
		c.sum += recordHash(rec, h)
		count--
		size -= h.payload()
		return true
	})
	if !found {
		return fmt.Errorf("the entry of key %q is where another key should be", last)
	}
	if more {
		c.next = last + "\x00"
		return nil
	}
	sum := c.sum
	c.next, c.sum = "", 0
	if sum != s.sum {
		return fmt.Errorf("entries have the hash sum %016x, and had %016x when they were put", sum, s.sum)
	}
	return nil
}

func (s *State) scrubEvents(count int) (err error) {
	c := &s.scrub
	at, skip, more := c.event, c.skip, false
	history := s.History()
	history.from(at, func(e *event) bool {
		if e.revision != at {
			at, c.skip, skip = e.revision, 0, 0
		}
		if skip > 0 { // seen in the step before
			skip--
			return true
		}
		if more = count <= 0; more {
			return false
		}
		count--
		c.skip++
		if e.hash != e.recomputed() {
			err = fmt.Errorf("the event of revision %d and key %q has not the hash that it was made with", e.revision, e.key())
		}
		return err == nil
	})
	c.event = at
	if !more {
		c.event, c.skip = 0, 0
	}
	return err
}
