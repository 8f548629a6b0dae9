package kv

import (
	"encoding/binary"
	"fmt"
	"math"
)

// The outcome of an idempotent command is kept as bytes: one allocation without
// pointers, whose size is known to the byte, and the same in memory and in a
// snapshot. An outcome has exactly one encoding; the hash relies on it.
//
//	uvarint  fields: a bit for each part that is there
//	byte     refusal
//	uvarint  revision
//	         the parts, ascending by bit:
//	           0  Existed  nothing
//	           1  Entry    an entry, without its value
//	           2  Deleted  uvarint
//	           3  Lease    uvarint id, TTL in milliseconds, deadline, label, keys
//	           4  Txn      the outcome of the transaction
//
// An entry:
//
//	uvarint  fields
//	chunk    key
//	uvarint  create revision, mod revision, version, then
//	           0  Lease    uvarint
//	           1  Expires  uvarint
//	           2  Value    chunk; an empty value is there, one left out is not
//
// The outcome of a transaction:
//
//	uvarint  fields
//	           0  Succeeded  nothing
//	           1  Ops        uvarint count, then that many outcomes; there may be none
//	           2  Put, 3 Deleted, 4 Skipped  uvarint
//
// The outcome of one operation:
//
//	byte     op
//	uvarint  fields
//	           0  Entry    an entry, without its value
//	           1  Existed  nothing
//	           2  Skipped  nothing
//	           3  Deleted  uvarint
//	           4  Items    uvarint count, then that many entries
//	           5  Count    uvarint
//
// A part is there exactly where it is not zero. Chunks and numbers are as in the
// log entry (codec.go).

// The parts of each.
const (
	resultExisted = 1 << iota
	resultEntry
	resultDeleted
	resultLease
	resultTxn
	resultAll = 1<<iota - 1
)

const (
	entryLease = 1 << iota
	entryExpires
	entryValue
	entryAll = 1<<iota - 1
)

const (
	txnSucceeded = 1 << iota
	txnOps
	txnPut
	txnDeleted
	txnSkipped
	txnAll = 1<<iota - 1
)

const (
	opEntry = 1 << iota
	opExisted
	opSkipped
	opDeleted
	opItems
	opCount
	opAll = 1<<iota - 1
)

// The least that each takes: what a count is believed by.
const (
	minOpResultSize = 2 // op, fields
	minEntrySize    = 5 // fields, length of the key, three numbers
)

// appendResult appends the encoding of what is kept of r: all but Duplicate,
// Replayed and Window, which belong to the answer and not to the outcome, and
// the value of an entry that a command or an operation put or found. What gets
// have read is kept with its values.
func appendResult(dst []byte, r *Result) []byte {
	fields := bitIf(r.Existed, resultExisted) | bitIf(hasEntry(&r.Entry), resultEntry) | bitIf(r.Deleted != 0, resultDeleted) |
		bitIf(r.Lease != nil, resultLease) | bitIf(r.Txn != nil, resultTxn)
	dst = binary.AppendUvarint(dst, fields)
	dst = append(dst, byte(r.Refused))
	dst = binary.AppendUvarint(dst, uint64(r.Revision))
	if fields&resultEntry != 0 {
		dst = appendEntry(dst, &r.Entry, false)
	}
	if r.Deleted != 0 {
		dst = binary.AppendUvarint(dst, uint64(r.Deleted))
	}
	if l := r.Lease; l != nil {
		dst = binary.AppendUvarint(dst, uint64(l.ID))
		dst = binary.AppendUvarint(dst, millis(l.TTL))
		dst = binary.AppendUvarint(dst, uint64(l.Deadline))
		dst = binary.AppendUvarint(dst, uint64(l.Expires))
		dst = binary.AppendUvarint(dst, uint64(l.Keys))
	}
	if r.Txn != nil {
		dst = r.Txn.append(dst)
	}
	return dst
}

// hasEntry says that e is not the zero Entry: no entry is without a revision.
func hasEntry(e *Entry) bool { return e.ModRevision != 0 }

func appendEntry(dst []byte, e *Entry, withValue bool) []byte {
	withValue = withValue && e.Value != nil
	dst = binary.AppendUvarint(dst,
		bitIf(e.Lease != 0, entryLease)|bitIf(e.Expires != 0, entryExpires)|bitIf(withValue, entryValue))
	dst = appendChunk(dst, e.Key)
	dst = binary.AppendUvarint(dst, uint64(e.CreateRevision))
	dst = binary.AppendUvarint(dst, uint64(e.ModRevision))
	dst = binary.AppendUvarint(dst, uint64(e.Version))
	if e.Lease != 0 {
		dst = binary.AppendUvarint(dst, uint64(e.Lease))
	}
	if e.Expires != 0 {
		dst = binary.AppendUvarint(dst, uint64(e.Expires))
	}
	if withValue {
		dst = appendChunk(dst, e.Value)
	}
	return dst
}

func (t *TxnResult) append(dst []byte) []byte {
	dst = binary.AppendUvarint(dst, bitIf(t.Succeeded, txnSucceeded)|bitIf(t.Ops != nil, txnOps)|
		bitIf(t.Put != 0, txnPut)|bitIf(t.Deleted != 0, txnDeleted)|bitIf(t.Skipped != 0, txnSkipped))
	if t.Ops != nil {
		dst = binary.AppendUvarint(dst, uint64(len(t.Ops)))
		for i := range t.Ops {
			dst = t.Ops[i].append(dst)
		}
	}
	for _, n := range [...]int64{t.Put, t.Deleted, t.Skipped} {
		if n != 0 {
			dst = binary.AppendUvarint(dst, uint64(n))
		}
	}
	return dst
}

func (o *OpResult) append(dst []byte) []byte {
	fields := bitIf(hasEntry(&o.Entry), opEntry) | bitIf(o.Existed, opExisted) | bitIf(o.Skipped, opSkipped) |
		bitIf(o.Deleted != 0, opDeleted) | bitIf(len(o.Items) > 0, opItems) | bitIf(o.Count != 0, opCount)
	dst = append(dst, byte(o.Op))
	dst = binary.AppendUvarint(dst, fields)
	if fields&opEntry != 0 {
		dst = appendEntry(dst, &o.Entry, false)
	}
	if o.Deleted != 0 {
		dst = binary.AppendUvarint(dst, uint64(o.Deleted))
	}
	if len(o.Items) > 0 {
		dst = binary.AppendUvarint(dst, uint64(len(o.Items)))
		for i := range o.Items {
			dst = appendEntry(dst, &o.Items[i], true)
		}
	}
	if o.Count != 0 {
		dst = binary.AppendUvarint(dst, uint64(o.Count))
	}
	return dst
}

// decodeResult returns the outcome that appendResult wrote. Its keys and values
// alias b, which must never change. The error is ErrCorrupt or
// ErrUnknownVersion, wrapped.
func decodeResult(b []byte) (Result, error) {
	in := cursor{rest: b}
	r := in.result()
	in.end()
	if in.err != nil {
		return Result{}, fmt.Errorf("kept result: %w", in.err)
	}
	return r, nil
}

// number reads a number that is no bit pattern: what counts, dates or names.
func (in *cursor) number(what string) int64 {
	v := in.uvarint(what)
	if v > math.MaxInt64 {
		in.fail("%s: %d: %w", what, v, ErrCorrupt)
		return 0
	}
	return int64(v)
}

// part is number for a part that is there only if it is not 0.
func (in *cursor) part(there bool, what string) int64 {
	if !there {
		return 0
	}
	v := in.number(what)
	if v == 0 && in.err == nil {
		in.fail("%s is there and 0: %w", what, ErrCorrupt)
	}
	return v
}

func (in *cursor) result() Result {
	fields := in.fields(resultAll)
	r := Result{Existed: fields&resultExisted != 0, Refused: Refusal(in.byte("refusal"))}
	if r.Refused > RefusedOnceIsFull {
		in.fail("refusal %d: %w", r.Refused, ErrUnknownVersion)
	}
	r.Revision = in.number("revision")
	if fields&resultEntry != 0 {
		in.entry(&r.Entry, false)
	}
	r.Deleted = in.part(fields&resultDeleted != 0, "deleted")
	if fields&resultLease != 0 {
		r.Lease = in.lease()
	}
	if fields&resultTxn != 0 {
		r.Txn = in.txnResult()
	}
	return r
}

func (in *cursor) lease() *Lease {
	return &Lease{
		ID: in.number("lease"), TTL: in.ttl(),
		Deadline: in.number("deadline"), Expires: in.number("label"), Keys: int(in.number("keys")),
	}
}

// entry reads an entry into e, which is zero.
func (in *cursor) entry(e *Entry, withValue bool) {
	known := uint64(entryAll)
	if !withValue {
		known &^= entryValue
	}
	fields := in.fields(known)
	e.Key = stringOf(in.chunk("key"))
	e.CreateRevision = in.number("create revision")
	e.ModRevision = in.part(true, "mod revision")
	e.Version = in.number("version")
	e.Lease = in.part(fields&entryLease != 0, "lease")
	e.Expires = in.part(fields&entryExpires != 0, "label")
	if fields&entryValue != 0 {
		e.Value = in.chunk("value")
	}
}

func (in *cursor) txnResult() *TxnResult {
	fields := in.fields(txnAll)
	t := &TxnResult{Succeeded: fields&txnSucceeded != 0}
	if fields&txnOps != 0 {
		t.Ops = make([]OpResult, in.count("outcomes", minOpResultSize))
		for i := range t.Ops {
			in.opResult(&t.Ops[i])
		}
	}
	t.Put = in.part(fields&txnPut != 0, "put")
	t.Deleted = in.part(fields&txnDeleted != 0, "deleted")
	t.Skipped = in.part(fields&txnSkipped != 0, "skipped")
	return t
}

// opResult reads the outcome of one operation into o, which is zero.
func (in *cursor) opResult(o *OpResult) {
	o.Op = Op(in.byte("op"))
	if _, ok := txnOpFields(o.Op); !ok && in.err == nil {
		in.fail("outcome of op %d: %w", o.Op, ErrUnknownVersion)
	}
	fields := in.fields(opAll)
	if fields&opEntry != 0 {
		in.entry(&o.Entry, false)
	}
	o.Existed = fields&opExisted != 0
	o.Skipped = fields&opSkipped != 0
	o.Deleted = in.part(fields&opDeleted != 0, "deleted")
	if fields&opItems != 0 {
		n := in.count("items", minEntrySize)
		if n == 0 && in.err == nil {
			in.fail("no items where some should be: %w", ErrCorrupt)
		}
		o.Items = make([]Entry, n)
		for i := range o.Items {
			in.entry(&o.Items[i], true)
		}
	}
	o.Count = int(in.part(fields&opCount != 0, "count"))
}
