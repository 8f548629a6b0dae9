package kv

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// The sections of a snapshot beyond replay table and items. Numbers and chunks
// are as in the log entry (codec.go), and what is 0 by its bit is 0.
//
// Time:
//
//	uvarint  clock, id of the last lease
//
// A lease:
//
//	uvarint  fields: bit 0: it is its key's own
//	uvarint  id, TTL, deadline, log index, label, number of keys
//
// An event:
//
//	uvarint  fields: bit 0: the key was deleted; bit 1: it was there before
//	uvarint  revision
//	         the record that was there before (record.go); else chunk key
//
// What a put left behind is not with its event: it is the record before the
// key's following event, or the item. A reader links the two, so that they share
// memory as they did before.
//
// A kept result:
//
//	chunk    key
//	16 bytes fingerprint
//	byte     class
//	uvarint  deadline, log index
//	chunk    the outcome (result.go)

const (
	leaseOwn = 1 << iota
	leaseAll = 1<<iota - 1
)

const (
	eventDeleted = 1 << iota
	eventReplaced
	eventAll = 1<<iota - 1
)

// What to have buffered before the front of an element is decoded, if the
// section goes on that far.
const (
	maxTimeSize      = 2 * binary.MaxVarintLen64
	maxLeaseSize     = 7 * binary.MaxVarintLen64
	maxEventHeadSize = 3 * binary.MaxVarintLen64 // fields, revision, length of the key
	maxKeptHeadSize  = 4*binary.MaxVarintLen64 + MaxOnceKey + 16 + 1
)

// extras writes the sections between items and trailer, and returns what a reader
// will make of them; buf is memory to use.
func (bw *blockWriter) extras(s *State, buf []byte) extras {
	x := extras{clock: s.clock, lastLease: s.leases.last}
	buf = slices.Grow(buf[:0], 64) // for the hashes
	bw.section(sectionTime)
	if s.clock != 0 || s.leases.last != 0 {
		buf = binary.AppendUvarint(buf[:0], uint64(s.clock))
		bw.write(binary.AppendUvarint(buf, uint64(s.leases.last)))
	}
	bw.section(sectionLeases)
	s.leases.byID.Scan(func(id int64, l lease) bool {
		buf = l.append(buf[:0], id)
		bw.write(buf)
		x.leases += leaseHash(buf, id, &l)
		return bw.err == nil
	})
	bw.section(sectionHistory)
	history := s.History()
	history.from(0, func(e *event) bool {
		buf = e.append(buf[:0])
		bw.write(buf)
		bw.write(bytesOf(e.prev))
		x.history += e.recomputed()
		return bw.err == nil
	})
	bw.section(sectionKept)
	s.once.kept.Scan(func(key string, k kept) bool {
		buf = k.append(buf[:0], key)
		bw.write(buf)
		bw.write(bytesOf(k.result))
		x.kept += keptHash(buf, key, &k)
		return bw.err == nil
	})
	bw.section(sectionTombstones)
	s.once.tombs.each(func(hash uint64) bool {
		buf = binary.LittleEndian.AppendUint64(buf[:0], hash)
		bw.write(buf)
		x.tombs += mix(hash)
		return bw.err == nil
	})
	return x
}

func (l *lease) append(dst []byte, id int64) []byte {
	dst = binary.AppendUvarint(dst, bitIf(l.own, leaseOwn))
	for _, v := range [...]uint64{uint64(id), uint64(l.ttl), uint64(l.deadline), l.index, uint64(l.expires), uint64(l.keys)} {
		dst = binary.AppendUvarint(dst, v)
	}
	return dst
}

// append appends the event but for the record that was there before.
func (e *event) append(dst []byte) []byte {
	dst = binary.AppendUvarint(dst, bitIf(e.next == "", eventDeleted)|bitIf(e.prev != "", eventReplaced))
	dst = binary.AppendUvarint(dst, uint64(e.revision))
	if e.prev == "" {
		dst = appendChunk(dst, e.key())
	}
	return dst
}

// append appends the kept result up to the length of its outcome.
func (k *kept) append(dst []byte, key string) []byte {
	dst = appendChunk(dst, key)
	dst = append(dst, k.fingerprint[:]...)
	dst = append(dst, k.class)
	dst = binary.AppendUvarint(dst, uint64(k.deadline))
	dst = binary.AppendUvarint(dst, k.index)
	return binary.AppendUvarint(dst, uint64(len(k.result)))
}

// readExtras is what the sections between items and trailer say.
type readExtras struct {
	extras
	index  uint64        // the highest log index in them
	events []loadedEvent // for State.loadHistory, once the revision is known; if they were to be kept
}

// extras reads the sections between items and trailer.
func (br *blockReader) extras(t *tally, s *State) (x readExtras, err error) {
	if err := br.time(&x.extras); err != nil {
		return x, err
	}
	if err := br.leases(t, &x, s); err != nil {
		return x, fmt.Errorf("lease %d: %w", t.leases, err)
	}
	if x.events, err = br.history(t, s != nil); err != nil {
		return x, fmt.Errorf("event %d: %w", t.events, err)
	}
	if err := br.kept(t, &x, s); err != nil {
		return x, fmt.Errorf("kept result %d: %w", t.kept, err)
	}
	if err := br.tombstones(t, s); err != nil {
		return x, fmt.Errorf("tombstone %d: %w", t.tombs, err)
	}
	x.leases, x.history, x.kept, x.tombs = t.leaseSum, t.eventSum, t.keptSum, t.tombSum
	if s != nil {
		s.clock, s.leases.last = x.clock, x.lastLease
	}
	return x, nil
}

// front returns a cursor over what is left of the section, as far as it is
// buffered: at least n bytes, or all. ok is false at the section's end.
func (br *blockReader) front(section byte, n int) (in cursor, ok bool, err error) {
	b, err := br.peek(section, n)
	return cursor{rest: b}, err == nil && len(b) > 0, err
}

// passed discards what the cursor has read, and returns its error.
func (br *blockReader) passed(in *cursor) error {
	if in.err == nil {
		br.discard(len(br.unread()) - len(in.rest))
	}
	return in.err
}

// time reads the time section.
func (br *blockReader) time(x *extras) error {
	in, ok, err := br.front(sectionTime, maxTimeSize+1)
	if !ok {
		return err
	}
	x.clock, x.lastLease = in.number("clock"), in.number("last lease")
	in.end()
	if in.err == nil && x.clock == 0 && x.lastLease == 0 {
		in.fail("a time section of nothing: %w", ErrCorrupt)
	}
	return br.passed(&in)
}

func (br *blockReader) leases(t *tally, x *readExtras, s *State) error {
	for {
		in, ok, err := br.front(sectionLeases, maxLeaseSize)
		if !ok {
			return err
		}
		l := lease{own: in.fields(leaseAll)&leaseOwn != 0}
		id := in.number("id")
		l.ttl, l.deadline, l.index = in.number("TTL"), in.number("deadline"), in.uvarint("log index")
		l.expires, l.keys = in.number("label"), int(in.number("keys"))
		if err := br.passed(&in); err != nil {
			return err
		}
		if err := t.addLease(id, &l); err != nil {
			return fmt.Errorf("%w: %w", err, ErrCorrupt)
		}
		if l.deadline > x.clock+l.ttl {
			return fmt.Errorf("deadline %d at clock %d: %w", l.deadline, x.clock, ErrCorrupt)
		}
		x.index = max(x.index, l.index)
		if s != nil {
			s.leases.load(id, l)
		}
	}
}

// history reads the events, and returns them if keep is set.
func (br *blockReader) history(t *tally, keep bool) (events []loadedEvent, err error) {
	for {
		in, ok, err := br.front(sectionHistory, maxEventHeadSize)
		if !ok {
			return events, err
		}
		fields := in.fields(eventAll)
		e := loadedEvent{revision: in.number("revision"), deleted: fields&eventDeleted != 0}
		var r readRecord
		if fields&eventReplaced != 0 {
			if err := br.passed(&in); err != nil {
				return nil, err
			}
			if r, err = br.record(sectionHistory, keep); err != nil {
				return nil, err
			}
			e.prev = r.rec
		} else {
			if r.key, err = br.eventKey(&in); err != nil {
				return nil, err
			}
			r.hash = absentHash(stringOf(r.key))
			if keep {
				e.key = string(r.key)
			}
		}
		if err := t.addEvent(e.revision, r.key, e.deleted, fields&eventReplaced != 0, r.head, r.hash); err != nil {
			return nil, fmt.Errorf("%w: %w", err, ErrCorrupt)
		}
		if keep {
			events = append(events, e)
		}
	}
}

// eventKey reads the key of an event of which in has read the front.
func (br *blockReader) eventKey(in *cursor) ([]byte, error) {
	n := in.uvarint("length of the key")
	if n > MaxKeySize {
		in.fail("a key of %d bytes: %w", n, ErrCorrupt)
	}
	if err := br.passed(in); err != nil {
		return nil, err
	}
	b, err := br.peek(sectionHistory, int(n))
	if err != nil {
		return nil, err
	}
	if uint64(len(b)) < n {
		return nil, fmt.Errorf("cut short in its key: %w", ErrCorrupt)
	}
	br.discard(int(n))
	return b[:n], nil
}

func (br *blockReader) kept(t *tally, x *readExtras, s *State) error {
	for {
		in, ok, err := br.front(sectionKept, maxKeptHeadSize)
		if !ok {
			return err
		}
		var k kept
		br.key = append(br.key[:0], in.chunk("key")...)
		in.copy(k.fingerprint[:], "fingerprint")
		k.class, k.deadline, k.index = in.byte("class"), in.number("deadline"), in.uvarint("log index")
		size := in.uvarint("length of the outcome")
		if err := br.passed(&in); err != nil {
			return err
		}
		if err := br.long(sectionKept, size); err != nil {
			return err
		}
		if _, err := decodeResult(br.scratch); err != nil {
			return err
		}
		key := stringOf(br.key)
		k.result = stringOf(br.scratch)
		if err := t.addKept(key, &k); err != nil {
			return fmt.Errorf("%w: %w", err, ErrCorrupt)
		}
		if k.deadline > x.clock+keptWindows[k.class].Milliseconds() {
			return fmt.Errorf("deadline %d at clock %d: %w", k.deadline, x.clock, ErrCorrupt)
		}
		x.index = max(x.index, k.index)
		if s != nil {
			k.result = strings.Clone(k.result)
			s.once.load(strings.Clone(key), k)
		}
	}
}

// long reads size bytes into scratch, which grows with what has arrived: the
// size is not believed.
func (br *blockReader) long(section byte, size uint64) error {
	br.scratch = br.scratch[:0]
	for left := size; left > 0; {
		b, err := br.peek(section, 1)
		if err != nil {
			return err
		}
		if len(b) == 0 {
			return fmt.Errorf("cut short with %d of %d bytes: %w", len(br.scratch), size, ErrCorrupt)
		}
		b = b[:min(left, uint64(len(b)))]
		br.scratch = append(br.scratch, b...)
		left -= uint64(len(b))
		br.discard(len(b))
	}
	return nil
}

func (br *blockReader) tombstones(t *tally, s *State) error {
	for {
		b, err := br.peek(sectionTombstones, 8)
		if err != nil || len(b) == 0 {
			return err
		}
		if len(b) < 8 {
			return fmt.Errorf("cut short: %w", ErrCorrupt)
		}
		hash := binary.LittleEndian.Uint64(b)
		br.discard(8)
		t.addTombstone(hash)
		if s != nil && !s.once.loadTombstone(hash) {
			return fmt.Errorf("it was there before: %w", ErrCorrupt)
		}
	}
}
