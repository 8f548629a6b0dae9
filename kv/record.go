package kv

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"strings"
	"unsafe"
)

// A record is one entry as a single run of bytes, the same in memory and in the
// item section of a snapshot:
//
//	uvarint  fields         a bit for each optional field that is there
//	uvarint  CreateRevision
//	uvarint  ModRevision
//	uvarint  Version
//	uvarint  Lease          bit 0: where it is not 0
//	uvarint  length of the key
//	uvarint  length of the value
//	key, value
//
// In memory it is an immutable string. That one allocation holds no pointer,
// so the garbage collector marks it and never looks inside, and small numbers
// take one byte each. An entry has exactly one encoding: the hash relies on it.
//
// In front of the string, in the same allocation, are the length of the key and
// the size of the head once more, 16 bits each: one look at a pointer to the
// record finds the key (keyAt), which is what itemTree searches by.

const frontSize = 4

// maxHeadSize bounds what precedes the key: seven uvarints.
const maxHeadSize = 7 * binary.MaxVarintLen64

// recordLease is the bit of the lease among the optional fields.
const recordLease = 1

// maxValueSize is where a length stops being believable. Readers never reserve
// memory for a length they were merely told.
const maxValueSize = 1 << 40

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// head is the decoded front of a record.
type head struct {
	create, mod, version int64
	lease                int64 // 0: none
	keyLen, valueLen     int
	size                 int // bytes in front of the key
}

// newHead returns the head of a record that is yet to be built.
func newHead(create, mod, version, lease int64, keyLen, valueLen int) head {
	h := head{
		create: create, mod: mod, version: version, lease: lease, keyLen: keyLen, valueLen: valueLen,
		size: 1 + uvarintSize(uint64(create)) + uvarintSize(uint64(mod)) +
			uvarintSize(uint64(version)) + uvarintSize(uint64(keyLen)) + uvarintSize(uint64(valueLen)),
	}
	if lease != 0 {
		h.size += uvarintSize(uint64(lease))
	}
	return h
}

// payload is what the record adds to State.Bytes.
func (h head) payload() int64 { return int64(h.keyLen) + int64(h.valueLen) }

// prefix is the number of bytes in front of the value.
func (h head) prefix() int { return h.size + h.keyLen }

// recordSize cannot overflow: parseHead bounds both lengths.
func (h head) recordSize() uint64 { return uint64(h.prefix()) + uint64(h.valueLen) }

// valid returns the rules that one entry can be held to without its store.
func (h head) valid() error {
	switch {
	case h.keyLen < 1 || h.keyLen > MaxKeySize:
		return fmt.Errorf("a key of %d bytes", h.keyLen)
	case h.create < 1 || h.create > h.mod:
		return fmt.Errorf("create revision %d with mod revision %d", h.create, h.mod)
	case h.version < 1 || h.version > h.mod-h.create+1:
		return fmt.Errorf("version %d between revisions %d and %d", h.version, h.create, h.mod)
	}
	return nil
}

func newRecord(h head, key string, value []byte) string {
	var front [maxHeadSize]byte
	f := append(front[:0], 0)
	if h.lease != 0 {
		f[0] = recordLease
	}
	f = binary.AppendUvarint(f, uint64(h.create))
	f = binary.AppendUvarint(f, uint64(h.mod))
	f = binary.AppendUvarint(f, uint64(h.version))
	if h.lease != 0 {
		f = binary.AppendUvarint(f, uint64(h.lease))
	}
	f = binary.AppendUvarint(f, uint64(h.keyLen))
	f = binary.AppendUvarint(f, uint64(h.valueLen))
	var b strings.Builder
	h.front(&b)
	b.Write(f)
	b.WriteString(key)
	b.Write(value)
	return b.String()[frontSize:]
}

// front begins the memory of a record.
//
// A Builder that has grown once hands out its buffer without a copy, and
// unlike make it does not clear memory that is about to be written.
func (h head) front(b *strings.Builder) {
	b.Grow(frontSize + h.prefix() + h.valueLen)
	var f [frontSize]byte
	binary.LittleEndian.PutUint32(f[:], uint32(h.size)<<16|uint32(h.keyLen))
	b.Write(f[:])
}

// keepRecord returns a copy of an encoded record whose head is h.
func keepRecord(h head, encoded []byte) string {
	var b strings.Builder
	h.front(&b)
	b.Write(encoded)
	return b.String()[frontSize:]
}

// headOf decodes the head of a record that this package has built.
func headOf(rec string) head {
	h, err := parseHead(bytesOf(rec))
	if err != nil {
		// panic: memory that this package wrote is broken; no answer would be true.
		panic("kv: a record in memory is broken: " + err.Error())
	}
	return h
}

func keyOf(rec string, h head) string { return rec[h.size:h.prefix()] }

func entryOf(rec string, h head) Entry {
	return Entry{
		// The capacity ends with the record: a careless append reallocates.
		Key: keyOf(rec, h), Value: bytesOf(rec)[h.prefix():],
		CreateRevision: h.create, ModRevision: h.mod, Version: h.version, Lease: h.lease,
	}
}

// parseHead decodes the head at the front of b, which may end anywhere behind
// it. It does not judge the numbers; head.valid does.
func parseHead(b []byte) (head, error) {
	var v [7]uint64 // in the order of the format
	rest := b
	for i := range v {
		if i == 4 && v[0]&recordLease == 0 {
			continue
		}
		x, n := uvarint(rest)
		if n <= 0 {
			return head{}, fmt.Errorf("item: no valid number in field %d: %w", i, ErrCorrupt)
		}
		v[i], rest = x, rest[n:]
	}
	if v[0]&^recordLease != 0 {
		return head{}, fmt.Errorf("item: unknown fields %#x: %w", v[0], ErrUnknownVersion)
	}
	for _, x := range v[1:5] {
		if x > math.MaxInt64 {
			return head{}, fmt.Errorf("item: revision, version or lease %d: %w", x, ErrCorrupt)
		}
	}
	if v[0] != 0 && v[4] == 0 {
		return head{}, fmt.Errorf("item: lease 0: %w", ErrCorrupt)
	}
	if v[5] > MaxKeySize || v[6] > maxValueSize || v[6] > math.MaxInt-2*MaxKeySize {
		return head{}, fmt.Errorf("item: lengths %d and %d: %w", v[5], v[6], ErrCorrupt)
	}
	return head{
		create: int64(v[1]), mod: int64(v[2]), version: int64(v[3]), lease: int64(v[4]),
		keyLen: int(v[5]), valueLen: int(v[6]), size: len(b) - len(rest),
	}, nil
}

// recordHash is the hash of one entry; State.Hash is built on the sum of them,
// which can be kept up to date without order: subtract the old, add the new.
//
// CRC-32C because it is the fastest in std that gives the same on every machine
// (it has an instruction on amd64 and arm64; hash/maphash is seeded by process,
// fnv takes a nanosecond a byte, crc64 a table look-up a byte). One over what
// precedes the value and one over the value make 64 bits, and the finalizer
// spreads them, as a sum of bare CRCs would let differences cancel out. Two
// entries that differ in the value alone are told apart by 32 bits: enough for
// replicas that are compared again and again.
func recordHash(rec string, h head) uint64 {
	b := bytesOf(rec)
	return joinHash(crc32.Checksum(b[:h.prefix()], castagnoli), crc32.Checksum(b[h.prefix():], castagnoli))
}

func joinHash(front, value uint32) uint64 { return mix(uint64(front)<<32 | uint64(value)) }

// mix is the 64-bit finalizer of splitmix64: a bijection in which every bit of
// the input reaches every bit of the output.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// stateHash gives the three parts different weights, so that a difference
// cannot move from one to another unseen.
func stateHash(items, windows uint64, revision int64) uint64 {
	return mix(mix(mix(items)+windows) + uint64(revision))
}

// extras are the parts of the state beyond items, replay table and revision.
type extras struct {
	clock, lastLease             int64
	leases, history, kept, tombs uint64 // sums of hashes
}

// join folds the extras into a stateHash. A state that has none of them has
// the hash that it had before there were any: old snapshots are compared by it.
func (x extras) join(hash uint64) uint64 {
	sum := uint64(0)
	for i, part := range [...]uint64{uint64(x.clock), uint64(x.lastLease), x.leases, x.history, x.kept, x.tombs} {
		if part != 0 {
			sum += mix(part + mix(uint64(i+1)))
		}
	}
	if sum == 0 {
		return hash
	}
	return mix(hash + sum)
}

// tally is what a walk over records and windows adds up, in order, in constant
// memory. Check and the snapshot readers hold a state to the same rules by it.
type tally struct {
	count, bytes uint64
	sum          uint64 // of recordHash; the caller adds, having the bytes
	maxMod       int64
	lastKey      []byte

	windows    uint64
	windowSum  uint64
	lastWindow uint64 // node id

	leases, leaseSum uint64
	lastLease        int64
	// attachSum is the sum of attachHash over the keys that items say are
	// attached, less that over those that leases say: 0 where they agree.
	attachSum uint64

	events, eventBytes, eventSum uint64
	firstEvent, lastEvent        int64 // revisions; 0: none
	lastEventKey                 []byte

	kept, keptBytes, keptSum uint64
	lastKept                 []byte
	tombs, tombSum           uint64
}

// add counts one entry and checks it against its predecessor.
func (t *tally) add(key []byte, h head) error {
	if err := h.valid(); err != nil {
		return err
	}
	if t.count > 0 && bytes.Compare(t.lastKey, key) >= 0 {
		return errors.New("keys are not in ascending order")
	}
	t.lastKey = append(t.lastKey[:0], key...)
	t.count++
	t.bytes += uint64(h.payload())
	t.maxMod = max(t.maxMod, h.mod)
	return nil
}

// uvarint decodes one number and returns the bytes it took: 0 if b ends before
// it does, -1 if it overflows 64 bits or is not in its shortest form. Insisting
// on the shortest form leaves every value exactly one encoding.
func uvarint(b []byte) (uint64, int) {
	if len(b) > 0 && b[0] < 0x80 {
		return uint64(b[0]), 1
	}
	v, n := binary.Uvarint(b)
	if n < 0 || n > 1 && b[n-1] == 0 {
		return 0, -1
	}
	return v, n
}

func uvarintSize(v uint64) int {
	n := 1
	for ; v >= 0x80; v >>= 7 {
		n++
	}
	return n
}

// What follows is the package's only use of unsafe. bytesOf and stringOf change
// the type of a run of bytes without copying it. They are sound as long as nobody
// writes to the bytes: records are never written after they are built, and the
// data given to DecodeBatch must not be while its batch is in use.

func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

func stringOf(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// itemOf, keyAt and recordAt go from a record to a bare pointer and back. They are
// sound for what newRecord and keepRecord return: the front before it and all that
// it says lie in one allocation.

func itemOf(rec string) *byte { return unsafe.StringData(rec) }

func keyAt(item *byte) string {
	front := frontAt(item)
	return unsafe.String((*byte)(unsafe.Add(unsafe.Pointer(item), front>>16)), front&0xffff)
}

func recordAt(item *byte) (string, head) {
	h := headOf(unsafe.String(item, frontAt(item)>>16))
	return unsafe.String(item, h.recordSize()), h
}

func frontAt(item *byte) uint32 {
	return binary.LittleEndian.Uint32((*[frontSize]byte)(unsafe.Add(unsafe.Pointer(item), -frontSize))[:])
}
