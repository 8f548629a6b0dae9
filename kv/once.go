package kv

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"time"

	"github.com/tidwall/btree"
)

// Bounds of what is kept for idempotency keys.
const (
	maxKept       = 262_144   // results
	maxKeptBytes  = 32 << 20  // of keys and encoded results
	maxTombstones = 1_048_576 // keys whose result is gone
	maxTickKept   = 10_000    // results that one tick drops: the state is locked meanwhile
)

// keptWindows are the classes of kept results: how long one is kept at least.
// The fuller the table when a result comes, the sooner it may go; so a burst
// uses up the room of later bursts last.
var keptWindows = [...]time.Duration{10 * time.Minute, time.Minute, 10 * time.Second}

// kept is the result of an idempotent command, under its key.
type kept struct {
	fingerprint [16]byte
	class       uint8  // of keptWindows
	deadline    int64  // in the state's clock, at least 1; 0: it waits for a tick
	index       uint64 // of the log entry that ran the command
	result      string // by appendResult
}

// once is the memory behind idempotency keys.
//
// A result is never dropped before its window has ended: a client that retries
// within it gets the first outcome whatever else happens. Afterwards a hash of
// the key stays for a while, so that a late retry is refused and not run again.
type once struct {
	kept  *btree.Map[string, kept]
	due   timers[string]
	bytes int64  // sum of kept.size
	sum   uint64 // of keptHash over kept, modulo 2^64

	// tombs are hashes of keys in the order in which their results went, each
	// of them once; tombSet holds the same. Hashes as keys would take eight
	// times the memory.
	tombs   fifo
	tombSet *btree.Set[uint64]
	tombSum uint64 // of mix over tombs, modulo 2^64

	// The bounds are the constants but in tests.
	maxKept, maxTombs, maxTickKept int
	maxBytes                       int64
}

func newOnce() once {
	return once{
		kept: new(btree.Map[string, kept]), due: newTimers[string](), tombSet: new(btree.Set[uint64]),
		maxKept: maxKept, maxTombs: maxTombstones, maxTickKept: maxTickKept, maxBytes: maxKeptBytes,
	}
}

func (o *once) clone() once {
	c := *o
	c.kept, c.due, c.tombs, c.tombSet = o.kept.Copy(), o.due.clone(), o.tombs.clone(), o.tombSet.Copy()
	return c
}

// size is what a kept result adds to once.bytes.
func (k *kept) size(key string) int64 { return int64(len(key)) + int64(len(k.result)) }

// valid returns the rules that one kept result can be held to without its
// state; whether it can be decoded is for the reader of a snapshot.
func (k *kept) valid(key string) error {
	switch {
	case len(key) < 1 || len(key) > MaxOnceKey:
		return fmt.Errorf("an idempotency key of %d bytes", len(key))
	case int(k.class) >= len(keptWindows):
		return fmt.Errorf("idempotency key %q: class %d", key, k.class)
	case k.deadline < 0 || k.deadline > maxMillis+keptWindows[0].Milliseconds() || k.index > 1<<63-1:
		return fmt.Errorf("idempotency key %q: deadline %d, log index %d", key, k.deadline, k.index)
	}
	return nil
}

// keptHash is the hash of one kept result. It works in scratch, which may be nil.
func keptHash(scratch []byte, key string, k *kept) uint64 {
	b := binary.LittleEndian.AppendUint64(scratch[:0], uint64(k.deadline))
	b = binary.LittleEndian.AppendUint64(b, k.index)
	b = append(b, k.class)
	b = append(b, k.fingerprint[:]...)
	front := crc32.Checksum(b, castagnoli)
	front = crc32.Update(front, castagnoli, bytesOf(key))
	return joinHash(front, crc32.Checksum(bytesOf(k.result), castagnoli))
}

// tombstone is what stays of an idempotency key. It has to be the same on every
// replica, and nobody should find two keys with one by trying.
func tombstone(key string) uint64 {
	h := sha256.Sum256([]byte(key))
	return binary.BigEndian.Uint64(h[:])
}

// load takes in a kept result of a snapshot.
func (o *once) load(key string, k kept) {
	o.kept.Set(key, k)
	o.due.add(key, k.deadline, k.index)
	o.bytes += k.size(key)
	o.sum += keptHash(nil, key, &k)
}

// loadTombstone takes in a tombstone of a snapshot, in their order; false: it
// was there before.
func (o *once) loadTombstone(hash uint64) bool {
	if o.tombSet.Contains(hash) {
		return false
	}
	o.tombs.push(hash)
	o.tombSet.Insert(hash)
	o.tombSum += mix(hash)
	return true
}

// addKept counts one kept result, in ascending order of keys, and checks it.
func (t *tally) addKept(key string, k *kept) error {
	if err := k.valid(key); err != nil {
		return err
	}
	if t.kept > 0 && bytes.Compare(t.lastKept, bytesOf(key)) >= 0 {
		return errors.New("idempotency keys are not in ascending order")
	}
	t.lastKept = append(t.lastKept[:0], key...)
	t.kept++
	t.keptBytes += uint64(k.size(key))
	t.keptSum += keptHash(nil, key, k)
	return nil
}

// addTombstone counts one tombstone. That none comes twice is for the readers
// that have the memory.
func (t *tally) addTombstone(hash uint64) {
	t.tombs++
	t.tombSum += mix(hash)
}

// fifo is a queue of numbers. Chunks but the last are full and are never written again, so
// that clones share them.
type fifo struct {
	chunks [][]uint64
	gone   int // how many of the first chunk have been popped
	count  int
}

const fifoChunk = 4096

func (q *fifo) clone() fifo {
	c := *q
	c.chunks = slices.Clone(q.chunks)
	// The clone appends to a copy of the last chunk; q goes on in place, behind
	// all that the clone can see.
	if n := len(q.chunks); n > 0 {
		c.chunks[n-1] = slices.Clip(q.chunks[n-1])
	}
	return c
}

func (q *fifo) push(v uint64) {
	n := len(q.chunks)
	if n == 0 || len(q.chunks[n-1]) == fifoChunk {
		q.chunks = append(q.chunks, nil)
		n++
	}
	q.chunks[n-1] = append(q.chunks[n-1], v)
	q.count++
}

// pop removes the oldest; there is one.
func (q *fifo) pop() uint64 {
	v := q.chunks[0][q.gone]
	q.gone++
	q.count--
	if q.gone == len(q.chunks[0]) {
		q.chunks = slices.Clone(q.chunks[1:])
		q.gone = 0
	}
	return v
}

// each calls f for all, oldest first, until f returns false.
func (q *fifo) each(f func(uint64) bool) {
	for i, chunk := range q.chunks {
		if i == 0 {
			chunk = chunk[q.gone:]
		}
		for _, v := range chunk {
			if !f(v) {
				return
			}
		}
	}
}

// runOnce carries out a command unless one ran under its key before.
func (s *State) runOnce(c *Command, index uint64) Result {
	o := &s.once
	if k, ok := o.kept.Get(c.Once.Key); ok {
		return s.replay(c, &k)
	}
	if o.tombSet.Contains(tombstone(c.Once.Key)) {
		return s.refuse(RefusedExpired)
	}
	class, ok := o.class()
	if !ok {
		return s.refuse(RefusedOnceIsFull)
	}
	r := s.runAlways(c, index)
	// The key is cloned as the batch aliases a log entry.
	o.load(strings.Clone(c.Once.Key), kept{
		fingerprint: c.Once.Fingerprint, class: class, index: index, result: string(appendResult(nil, &r)),
	})
	r.Window = keptWindows[class]
	return r
}

// replay answers a command whose key is in the table.
func (s *State) replay(c *Command, k *kept) Result {
	if k.fingerprint != c.Once.Fingerprint {
		return s.refuse(RefusedMismatch)
	}
	r, err := decodeResult(bytesOf(k.result))
	if err != nil {
		// panic: memory that this package wrote is broken; no answer would be true.
		panic("kv: a kept result in memory is broken: " + err.Error())
	}
	r.Replayed = true
	r.Window = keptWindows[k.class]
	if k.deadline != 0 {
		r.Window = time.Duration(max(k.deadline-s.clock, 0)) * time.Millisecond
	}
	return r
}

// class returns how long a result that comes now is kept; false: no room.
func (o *once) class() (uint8, bool) {
	// Quarters of either bound that are full. 4 times the bytes cannot overflow.
	full := max(4*int64(o.kept.Len())/int64(o.maxKept), 4*o.bytes/o.maxBytes)
	switch {
	case full < 2:
		return 0, true
	case full < 3:
		return 1, true
	case full < 4:
		return 2, true
	}
	return 0, false
}

// start gives their deadline to the results that the proposer of the tick has seen,
// to so many at once; a later tick has seen the others too.
func (o *once) start(tick *Tick, clock int64) {
	for range o.maxTickKept {
		w, ok := o.due.waiting.Min()
		if !ok || uint64(w.at) > tick.Seen {
			return
		}
		k, _ := o.kept.Get(w.id)
		o.drop(w.id, &k)
		k.deadline = clock + keptWindows[k.class].Milliseconds()
		o.load(w.id, k)
	}
}

// expire replaces the results whose window has ended by tombstones, so many at once;
// the others stay overdue, which Pending tells.
func (o *once) expire(clock int64) {
	for range o.maxTickKept {
		next, ok := o.due.running.Min()
		if !ok || next.at > clock {
			return
		}
		k, _ := o.kept.Get(next.id)
		o.drop(next.id, &k)
		// Two keys with one hash share a tombstone, in the place of the first.
		o.loadTombstone(tombstone(next.id))
		for o.tombs.count > o.maxTombs {
			oldest := o.tombs.pop()
			o.tombSet.Delete(oldest)
			o.tombSum -= mix(oldest)
		}
	}
}

// drop takes a result out of the table.
func (o *once) drop(key string, k *kept) {
	o.kept.Delete(key)
	o.due.remove(key, k.deadline, k.index)
	o.bytes -= k.size(key)
	o.sum -= keptHash(nil, key, k)
}

// Kept is the number of results that are kept for idempotency keys.
func (s *State) Kept() int { return s.once.kept.Len() }
