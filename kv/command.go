package kv

import "time"

// Op says what a Command does.
type Op uint8

// The numbers are part of the log format: never reuse one.
const (
	OpPut         Op = 1 // store Value under Key, creating or replacing it
	OpDelete      Op = 2 // remove Key
	OpDeleteRange Op = 3 // remove all keys of Span, at one revision
	OpTxn         Op = 4 // what Txn says
	OpGrant       Op = 5 // make a lease that lives for TTL
	OpKeepAlive   Op = 6 // let Lease live for another TTL, which becomes that of the lease; TTL 0: the one it has
	OpRevoke      Op = 7 // end Lease and remove its keys, at one revision
	OpTick        Op = 8 // move the clock: what Tick says
)

// Limits of the formats, far above or equal to what the API accepts.
const (
	MaxKeySize   = 64<<10 - 1           // bytes; it is what lets VerifySnapshot run in constant memory
	MaxTTL       = 366 * 24 * time.Hour // of a lease
	MaxOnceKey   = 255                  // bytes of an idempotency key
	MaxRevisions = 16                   // of one Precondition
)

// Command is one request to change the state. Which fields count depends on Op;
// the others are zero.
type Command struct {
	Op    Op
	Key   string       // OpPut, OpDelete: 1 to MaxKeySize bytes, any bytes
	Value []byte       // OpPut
	If    Precondition // OpPut, OpDelete
	// TTL is whole milliseconds, from 1 ms to MaxTTL. OpPut: the key gets a
	// lease of its own, which ends with the key; not together with Lease.
	TTL   time.Duration // OpPut, OpGrant, OpKeepAlive
	Lease int64         // OpPut: the lease to attach the key to; OpKeepAlive, OpRevoke: which one
	// Wall is the proposer's wall clock, Unix milliseconds, with every TTL or
	// lease: it only labels what clients are shown until the first tick. Not
	// negative, and at most 2^60.
	Wall int64
	Span Span  // OpDeleteRange
	Txn  *Txn  // OpTxn
	Tick Tick  // OpTick
	Once *Once // any op but OpTick: idempotency; nil: none
}

// Precondition says what must hold of the present entry for a put or a delete
// to happen. The zero Precondition always holds.
type Precondition struct {
	Kind      Check
	Revisions []int64 // CheckAnyOf, CheckNoneOf: mod revisions, 1 to MaxRevisions of them
}

// Check is the kind of a Precondition.
type Check uint8

// The kinds. The numbers are part of the log format.
const (
	CheckNothing Check = 0
	CheckExists  Check = 1 // If-Match: *
	CheckAbsent  Check = 2 // If-None-Match: *
	CheckAnyOf   Check = 3 // If-Match: "17", "18": it exists and its mod revision is among them
	CheckNoneOf  Check = 4 // If-None-Match: "17": it is absent or its mod revision is not among them
)

// Span is a range of keys: Start ≤ key < End in byte order. An empty End is
// beyond the last key; so the zero Span is all keys.
type Span struct{ Start, End string }

// Prefix returns the span of all keys that begin with p.
func Prefix(p string) Span {
	end := []byte(p)
	for len(end) > 0 && end[len(end)-1] == 0xff {
		end = end[:len(end)-1]
	}
	if len(end) > 0 {
		end[len(end)-1]++
	}
	return Span{p, string(end)}
}

// Contains says whether key lies in the span.
func (s Span) Contains(key string) bool { return key >= s.Start && (s.End == "" || key < s.End) }

// Empty says that no key can lie in the span.
func (s Span) Empty() bool { return s.End != "" && s.Start >= s.End }

// Txn is a transaction: if all comparisons hold, Then is carried out, else
// Else; all of it at one revision, or nothing of it.
//
// Within one branch a key must not be put twice, nor put and then deleted.
// Deleting first and putting then is a replacement: one event, version 1.
type Txn struct {
	If   []Compare
	Then []TxnOp
	Else []TxnOp
	// Each gives every put and delete that changes anything a revision of its
	// own, one after the other; a key may then occur any number of times. For
	// imports, which have neither comparisons nor gets, nor Else.
	Each bool
	// Brief leaves out TxnResult.Ops: the counts are enough.
	Brief bool
}

// Compare is one comparison of a transaction. A key that is absent has
// revisions and version 0, and no value: "!=" holds for any value, the other
// operators for none.
type Compare struct {
	Key    string
	Target Target
	Op     CompareOp
	Number int64  // TargetModRevision, TargetCreateRevision, TargetVersion; TargetExists: 0 or 1
	Value  []byte // TargetValue: compared byte by byte
}

// Target is what a Compare looks at.
type Target uint8

// The targets. The numbers are part of the log format.
const (
	TargetModRevision    Target = 1
	TargetCreateRevision Target = 2
	TargetVersion        Target = 3
	TargetValue          Target = 4
	TargetExists         Target = 5 // with Equal or NotEqual only
)

// CompareOp is an operator; the key's side is on the left.
type CompareOp uint8

// The operators. The numbers are part of the log format.
const (
	Equal    CompareOp = 1
	NotEqual CompareOp = 2
	Less     CompareOp = 3
	Greater  CompareOp = 4
)

// TxnOp is one operation of a transaction.
type TxnOp struct {
	Op    Op // OpPut, OpDeleteRange (a single key too), or OpGet
	Key   string
	Value []byte        // OpPut
	TTL   time.Duration // OpPut, as in Command
	Lease int64         // OpPut, as in Command
	// CreateOnly makes a put of a key that exists a skip. For imports.
	CreateOnly bool
	Span       Span // OpDeleteRange, OpGet
	Limit      int  // OpGet: at most so many entries, below 2^31; 0: MaxTxnItems
	KeysOnly   bool // OpGet: without values
}

// OpGet reads; it only exists inside a transaction.
const OpGet Op = 9

// SingleKey is the span of exactly one key.
func SingleKey(key string) Span { return Span{key, key + "\x00"} }

// What the gets of one transaction return together, at most. A transaction that
// might return more is refused before it changes anything (RefusedTooLarge):
// the estimate counts, for each get, what its span holds before the transaction
// without what the operations before the get delete, as far as its limit goes,
// plus what those operations put there.
const (
	MaxTxnItems     = 10_000
	MaxTxnReadBytes = 4 << 20   // keys and values
	MaxOnceBytes    = 256 << 10 // the same for one whose result has to be kept (Once)
)

// Tick moves the state's clock, which counts milliseconds and never goes back.
// Its zero has no meaning. The rules that make an expiry never early are with
// the proposer; those of the state are: a lease begins to run at the first tick
// whose Seen covers its grant, and ends at the first tick at or after that
// tick's Clock + TTL.
type Tick struct {
	Clock int64  // milliseconds, from 0 to 2^60
	Wall  int64  // the proposer's wall clock, Unix milliseconds, likewise; a label
	Seen  uint64 // index of the last entry that the proposer had applied
	Term  uint64 // opaque here: the caller drops ticks of another term before Apply
}

// Once makes a command idempotent: under one Key only the first command runs,
// and its Result is given to all that repeat it.
type Once struct {
	Key string // 1 to MaxOnceKey bytes
	// Fingerprint tells requests apart: another one under the same Key is
	// refused (RefusedMismatch).
	Fingerprint [16]byte
}

// Refusal is the reason why a command changed nothing.
type Refusal uint8

// The reasons. The numbers are part of the snapshot format (kept results).
const (
	NotRefused        Refusal = 0
	RefusedCondition  Refusal = 1 // the Precondition does not hold; Result.Entry is the present entry
	RefusedNoLease    Refusal = 2 // the lease does not exist
	RefusedTooLarge   Refusal = 3 // the gets might return more than the limit
	RefusedMismatch   Refusal = 4 // another command ran under this idempotency key
	RefusedExpired    Refusal = 5 // a command ran under this idempotency key; its result is no longer kept
	RefusedOnceIsFull Refusal = 6 // no room to keep another result
)

// Result is the outcome of one Command.
type Result struct {
	// Revision is the store's revision once the command was applied.
	Revision int64
	// Entry is, for OpPut, the entry as stored; for OpDelete the entry that
	// was removed, zero if there was none; with RefusedCondition the present
	// one. It aliases the state. Where a kept result is replayed, Value is nil.
	Entry Entry
	// Existed says that the key was there before.
	Existed bool
	// Duplicate says that the batch had been applied before: nothing happened
	// this time, and the other fields but Revision are zero.
	Duplicate bool
	Refused   Refusal
	// Replayed: a command with this idempotency key ran before; this is its result.
	Replayed bool
	// Window is how long the result of an idempotent command is kept, at
	// least, from now on; 0 for any other command.
	Window  time.Duration
	Deleted int64      // keys removed: OpDelete, OpDeleteRange, OpRevoke, OpTick
	Lease   *Lease     // OpGrant, OpKeepAlive
	Txn     *TxnResult // OpTxn
}

// TxnResult is the outcome of a transaction.
type TxnResult struct {
	Succeeded             bool       // the comparisons held
	Ops                   []OpResult // one for each op of the branch; nil if Brief
	Put, Deleted, Skipped int64      // keys
}

// OpResult is the outcome of one TxnOp.
type OpResult struct {
	Op      Op
	Entry   Entry // OpPut: as stored
	Existed bool  // OpPut: the key was there before
	Skipped bool  // OpPut: CreateOnly, and it was there
	Deleted int64 // OpDeleteRange
	Items   []Entry
	Count   int // OpGet: keys of the span, whatever the limit
}

// Lease is a lease as clients see it.
type Lease struct {
	ID  int64
	TTL time.Duration
	// Deadline is when it ends, in milliseconds of the state's clock; 0: it
	// has not begun to run yet, the next tick starts it.
	Deadline int64
	Expires  int64 // the same as a label, Unix milliseconds
	Keys     int   // attached to it
}

// Event is one change of one key. A revision has at most one event a key.
type Event struct {
	Revision int64
	Deleted  bool
	Entry    Entry // as stored; of a delete only Key and ModRevision = Revision
	Prev     Entry // what was there before; ModRevision 0: nothing
}
