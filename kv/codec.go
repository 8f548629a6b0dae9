package kv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"time"
)

// What is wrong with data, wrapped with where it is.
var (
	// ErrCorrupt says that the data is damaged, or was never of this format.
	ErrCorrupt = errors.New("the data is corrupt")
	// ErrUnknownVersion says that the data is intact and was written by a
	// version that knows more than this one.
	ErrUnknownVersion = errors.New("the data was written by a version that this one does not know")
)

// The log entry, version 1:
//
//	byte     version
//	uint32   CRC-32C of all that follows, little-endian
//	uvarint  node, boot, seq
//	uvarint  number of commands
//	         the commands, and nothing after them
//
// A command:
//
//	uvarint  length of what follows
//	byte     op
//	uvarint  fields: a bit for each optional field that is there
//	         what the op always has:
//	           OpPut          chunk key, chunk value
//	           OpDelete       chunk key
//	           OpDeleteRange  chunk start, chunk end
//	           OpTxn          the transaction
//	           OpTick         uvarint clock, wall, seen, term
//	           others         nothing
//	         the optional fields, ascending by bit:
//	           0  TTL    uvarint milliseconds (OpPut, OpGrant, OpKeepAlive)
//	           1  Lease  uvarint (OpPut, OpKeepAlive, OpRevoke)
//	           2  If     byte kind; of CheckAnyOf and CheckNoneOf also a uvarint
//	                     count and that many uvarint revisions (OpPut, OpDelete)
//	           3  Wall   uvarint (any op but OpDelete, OpDeleteRange, OpTick)
//	           4  Once   chunk key, 16 bytes fingerprint (any op but OpTick)
//
// A transaction:
//
//	byte     bit 0 Each, bit 1 Brief
//	uvarint  number of comparisons, then each: byte target, byte operator,
//	         chunk key, chunk value (TargetValue) or uvarint number (the others)
//	uvarint  number of operations of Then, then each: byte op, uvarint fields,
//	         chunks key and value (OpPut) or start and end (the others), then
//	           0  TTL         as above (OpPut)
//	           1  Lease       as above (OpPut)
//	           2  CreateOnly  nothing (OpPut)
//	           3  Limit       uvarint (OpGet)
//	           4  KeysOnly    nothing (OpGet)
//	uvarint  number of operations of Else, then each
//
// A chunk is a uvarint length and that many bytes. A number is in its shortest
// form, and negative as its two's complement in 64 bits; it is up to
// Batch.validate what a number may be.
//
// An optional field is there exactly where it is not zero, which leaves every
// command one encoding. An op or a bit that a version does not know makes it
// refuse the entry: skipping an option would make replicas differ.
//
// Commands carry their own length so that one can be encoded where its request
// is handled and joined to a batch by the proposer with a copy.
const (
	batchVersion  = 1
	batchHeadSize = 5

	// The least that each takes: what a count is believed by.
	minCommandSize = 4 // length, op, fields, a field: OpRevoke
	minCompareSize = 4 // target, operator, length of the key, number or length of the value
	minTxnOpSize   = 4 // op, fields, two lengths
)

// The optional fields of a command.
const (
	fieldTTL = 1 << iota
	fieldLease
	fieldIf
	fieldWall
	fieldOnce
)

// The optional fields of an operation in a transaction. It shares the first two
// with a command.
const (
	fieldCreateOnly = 1 << (iota + 2)
	fieldLimit
	fieldKeysOnly
)

// The flags of a transaction.
const (
	flagEach = 1 << iota
	flagBrief
)

// commandFields returns the optional fields that an op may have; ok is false for
// an op that is none of a command.
func commandFields(op Op) (fields uint64, ok bool) {
	switch op {
	case OpPut:
		return fieldTTL | fieldLease | fieldIf | fieldWall | fieldOnce, true
	case OpDelete:
		return fieldIf | fieldOnce, true
	case OpDeleteRange:
		return fieldOnce, true
	case OpTxn:
		return fieldWall | fieldOnce, true
	case OpGrant:
		return fieldTTL | fieldWall | fieldOnce, true
	case OpKeepAlive:
		return fieldTTL | fieldLease | fieldWall | fieldOnce, true
	case OpRevoke:
		return fieldLease | fieldWall | fieldOnce, true
	case OpTick:
		return 0, true
	}
	return 0, false
}

// txnOpFields is commandFields for the operations of a transaction.
func txnOpFields(op Op) (fields uint64, ok bool) {
	switch op {
	case OpPut:
		return fieldTTL | fieldLease | fieldCreateOnly, true
	case OpDeleteRange:
		return 0, true
	case OpGet:
		return fieldLimit | fieldKeysOnly, true
	}
	return 0, false
}

// bitIf returns bit where it is set.
func bitIf(set bool, bit uint64) uint64 {
	if set {
		return bit
	}
	return 0
}

// fields returns the optional fields to encode: those that are not zero and that
// count for the op.
func (c *Command) fields() uint64 {
	allowed, _ := commandFields(c.Op)
	return allowed & (bitIf(c.TTL != 0, fieldTTL) | bitIf(c.Lease != 0, fieldLease) |
		bitIf(c.If.Kind != CheckNothing, fieldIf) | bitIf(c.Wall != 0, fieldWall) | bitIf(c.Once != nil, fieldOnce))
}

func (o *TxnOp) fields() uint64 {
	allowed, _ := txnOpFields(o.Op)
	return allowed & (bitIf(o.TTL != 0, fieldTTL) | bitIf(o.Lease != 0, fieldLease) |
		bitIf(o.CreateOnly, fieldCreateOnly) | bitIf(o.Limit != 0, fieldLimit) | bitIf(o.KeysOnly, fieldKeysOnly))
}

func (t *Txn) flags() byte { return byte(bitIf(t.Each, flagEach) | bitIf(t.Brief, flagBrief)) }

// hasRevisions says which kinds of precondition carry a list.
func (p *Precondition) hasRevisions() bool { return p.Kind == CheckAnyOf || p.Kind == CheckNoneOf }

// CommandSize returns the exact number of bytes AppendCommand will add.
func CommandSize(c *Command) int {
	n := c.bodySize(c.fields())
	return uvarintSize(uint64(n)) + n
}

func chunkSize(length int) int { return uvarintSize(uint64(length)) + length }

func (s *Span) encodedSize() int { return chunkSize(len(s.Start)) + chunkSize(len(s.End)) }

// millis is how a duration goes into the log. It must be a whole number of them.
func millis(d time.Duration) uint64 { return uint64(d / time.Millisecond) }

func (c *Command) bodySize(fields uint64) int {
	n := 1 + uvarintSize(fields)
	switch c.Op {
	case OpPut:
		n += chunkSize(len(c.Key)) + chunkSize(len(c.Value))
	case OpDelete:
		n += chunkSize(len(c.Key))
	case OpDeleteRange:
		n += c.Span.encodedSize()
	case OpTxn:
		n += c.Txn.encodedSize()
	case OpTick:
		n += uvarintSize(uint64(c.Tick.Clock)) + uvarintSize(uint64(c.Tick.Wall)) +
			uvarintSize(c.Tick.Seen) + uvarintSize(c.Tick.Term)
	}
	if fields == 0 {
		return n
	}
	if fields&fieldTTL != 0 {
		n += uvarintSize(millis(c.TTL))
	}
	if fields&fieldLease != 0 {
		n += uvarintSize(uint64(c.Lease))
	}
	if fields&fieldIf != 0 {
		n += c.If.encodedSize()
	}
	if fields&fieldWall != 0 {
		n += uvarintSize(uint64(c.Wall))
	}
	if fields&fieldOnce != 0 {
		n += chunkSize(len(c.Once.Key)) + len(c.Once.Fingerprint)
	}
	return n
}

func (p *Precondition) encodedSize() int {
	n := 1
	if p.hasRevisions() {
		n += uvarintSize(uint64(len(p.Revisions)))
		for _, r := range p.Revisions {
			n += uvarintSize(uint64(r))
		}
	}
	return n
}

func (t *Txn) encodedSize() int {
	n := 1 + uvarintSize(uint64(len(t.If))) + uvarintSize(uint64(len(t.Then))) + uvarintSize(uint64(len(t.Else)))
	for i := range t.If {
		c := &t.If[i]
		n += 2 + chunkSize(len(c.Key))
		if c.Target == TargetValue {
			n += chunkSize(len(c.Value))
		} else {
			n += uvarintSize(uint64(c.Number))
		}
	}
	for i := range t.Then {
		n += t.Then[i].encodedSize()
	}
	for i := range t.Else {
		n += t.Else[i].encodedSize()
	}
	return n
}

func (o *TxnOp) encodedSize() int {
	fields := o.fields()
	n := 1 + uvarintSize(fields)
	if o.Op == OpPut {
		n += chunkSize(len(o.Key)) + chunkSize(len(o.Value))
	} else {
		n += o.Span.encodedSize()
	}
	if fields&fieldTTL != 0 {
		n += uvarintSize(millis(o.TTL))
	}
	if fields&fieldLease != 0 {
		n += uvarintSize(uint64(o.Lease))
	}
	if fields&fieldLimit != 0 {
		n += uvarintSize(uint64(o.Limit))
	}
	return n
}

// AppendCommand appends the encoding of one command to dst. It does not
// validate: what DecodeBatch would refuse must not be proposed. Fields that do
// not count for the op are left out.
func AppendCommand(dst []byte, c *Command) []byte {
	fields := c.fields()
	dst = binary.AppendUvarint(dst, uint64(c.bodySize(fields)))
	dst = append(dst, byte(c.Op))
	dst = binary.AppendUvarint(dst, fields)
	switch c.Op {
	case OpPut:
		dst = appendChunk(dst, c.Key)
		dst = appendChunk(dst, c.Value)
	case OpDelete:
		dst = appendChunk(dst, c.Key)
	case OpDeleteRange:
		dst = c.Span.append(dst)
	case OpTxn:
		dst = c.Txn.append(dst)
	case OpTick:
		dst = binary.AppendUvarint(dst, uint64(c.Tick.Clock))
		dst = binary.AppendUvarint(dst, uint64(c.Tick.Wall))
		dst = binary.AppendUvarint(dst, c.Tick.Seen)
		dst = binary.AppendUvarint(dst, c.Tick.Term)
	}
	if fields == 0 {
		return dst
	}
	if fields&fieldTTL != 0 {
		dst = binary.AppendUvarint(dst, millis(c.TTL))
	}
	if fields&fieldLease != 0 {
		dst = binary.AppendUvarint(dst, uint64(c.Lease))
	}
	if fields&fieldIf != 0 {
		dst = c.If.append(dst)
	}
	if fields&fieldWall != 0 {
		dst = binary.AppendUvarint(dst, uint64(c.Wall))
	}
	if fields&fieldOnce != 0 {
		dst = appendChunk(dst, c.Once.Key)
		dst = append(dst, c.Once.Fingerprint[:]...)
	}
	return dst
}

func appendChunk[T string | []byte](dst []byte, chunk T) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(chunk)))
	return append(dst, chunk...)
}

func (s *Span) append(dst []byte) []byte {
	dst = appendChunk(dst, s.Start)
	return appendChunk(dst, s.End)
}

func (p *Precondition) append(dst []byte) []byte {
	dst = append(dst, byte(p.Kind))
	if p.hasRevisions() {
		dst = binary.AppendUvarint(dst, uint64(len(p.Revisions)))
		for _, r := range p.Revisions {
			dst = binary.AppendUvarint(dst, uint64(r))
		}
	}
	return dst
}

func (t *Txn) append(dst []byte) []byte {
	dst = append(dst, t.flags())
	dst = binary.AppendUvarint(dst, uint64(len(t.If)))
	for i := range t.If {
		c := &t.If[i]
		dst = append(dst, byte(c.Target), byte(c.Op))
		dst = appendChunk(dst, c.Key)
		if c.Target == TargetValue {
			dst = appendChunk(dst, c.Value)
		} else {
			dst = binary.AppendUvarint(dst, uint64(c.Number))
		}
	}
	for _, branch := range [...][]TxnOp{t.Then, t.Else} {
		dst = binary.AppendUvarint(dst, uint64(len(branch)))
		for i := range branch {
			dst = branch[i].append(dst)
		}
	}
	return dst
}

func (o *TxnOp) append(dst []byte) []byte {
	fields := o.fields()
	dst = append(dst, byte(o.Op))
	dst = binary.AppendUvarint(dst, fields)
	if o.Op == OpPut {
		dst = appendChunk(dst, o.Key)
		dst = appendChunk(dst, o.Value)
	} else {
		dst = o.Span.append(dst)
	}
	if fields&fieldTTL != 0 {
		dst = binary.AppendUvarint(dst, millis(o.TTL))
	}
	if fields&fieldLease != 0 {
		dst = binary.AppendUvarint(dst, uint64(o.Lease))
	}
	if fields&fieldLimit != 0 {
		dst = binary.AppendUvarint(dst, uint64(o.Limit))
	}
	return dst
}

// AppendBatch appends a log entry to dst. Each of commands is the output of
// AppendCommand for exactly one command.
func AppendBatch(dst []byte, node, boot, seq uint64, commands ...[]byte) []byte {
	size := batchHeadSize + 4*binary.MaxVarintLen64
	for _, c := range commands {
		size += len(c)
	}
	start := len(dst)
	dst = slices.Grow(dst, size)
	dst = append(dst, batchVersion, 0, 0, 0, 0)
	dst = binary.AppendUvarint(dst, node)
	dst = binary.AppendUvarint(dst, boot)
	dst = binary.AppendUvarint(dst, seq)
	dst = binary.AppendUvarint(dst, uint64(len(commands)))
	for _, c := range commands {
		dst = append(dst, c...)
	}
	crc := crc32.Checksum(dst[start+batchHeadSize:], castagnoli)
	binary.LittleEndian.PutUint32(dst[start+1:], crc)
	return dst
}

// DecodeBatch decodes one log entry into b, reusing the memory of b.Commands.
//
// Keys and values alias data, which must not be modified while b is in use:
// clone what is to outlive it. Accepted data has exactly one encoding. After an
// error (ErrCorrupt or ErrUnknownVersion, wrapped) b holds no commands.
func DecodeBatch(data []byte, b *Batch) error {
	// Clearing drops the references into the previous entry, which would
	// otherwise stay alive behind the end of a shorter batch.
	clear(b.Commands)
	*b = Batch{Commands: b.Commands[:0]}
	if err := b.decode(data); err != nil {
		clear(b.Commands)
		b.Commands = b.Commands[:0]
		return fmt.Errorf("kv: log entry: %w", err)
	}
	return nil
}

func (b *Batch) decode(data []byte) error {
	if len(data) < batchHeadSize {
		return fmt.Errorf("%d bytes are too few: %w", len(data), ErrCorrupt)
	}
	if data[0] != batchVersion {
		return fmt.Errorf("version %d: %w", data[0], ErrUnknownVersion)
	}
	if crc := crc32.Checksum(data[batchHeadSize:], castagnoli); crc != binary.LittleEndian.Uint32(data[1:]) {
		return fmt.Errorf("checksum mismatch: %w", ErrCorrupt)
	}
	in := cursor{rest: data[batchHeadSize:]}
	b.Node = in.uvarint("node")
	b.Boot = in.uvarint("boot")
	b.Seq = in.uvarint("seq")
	count := in.count("commands", minCommandSize)
	b.Commands = slices.Grow(b.Commands, count)[:count]
	for i := range b.Commands {
		body := cursor{rest: in.chunk("command")}
		if in.err != nil {
			break
		}
		// In place, as a Command is large to be handed around.
		body.command(&b.Commands[i])
		if body.err != nil {
			return fmt.Errorf("command %d: %w", i, body.err)
		}
	}
	in.end()
	if in.err != nil {
		return in.err
	}
	if err := b.validate(); err != nil {
		return fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	return nil
}

// cursor reads from the front of rest. After the first error every read returns
// zero, so that a run of reads needs one check at its end.
type cursor struct {
	rest []byte
	err  error
}

func (in *cursor) fail(format string, args ...any) {
	in.err = fmt.Errorf(format, args...)
	in.rest = nil
}

func (in *cursor) uvarint(what string) uint64 {
	if in.err != nil {
		return 0
	}
	v, n := uvarint(in.rest)
	if n <= 0 {
		in.fail("%s: no valid number: %w", what, ErrCorrupt)
		return 0
	}
	in.rest = in.rest[n:]
	return v
}

// chunk reads a length and that many bytes.
func (in *cursor) chunk(what string) []byte {
	n := in.uvarint(what)
	if n > uint64(len(in.rest)) {
		in.fail("%s: %d bytes where %d are left: %w", what, n, len(in.rest), ErrCorrupt)
	}
	if in.err != nil {
		return nil
	}
	c := in.rest[:n:n]
	in.rest = in.rest[n:]
	return c
}

// end checks that everything was read.
func (in *cursor) end() {
	if in.err == nil && len(in.rest) > 0 {
		in.fail("%d bytes too many: %w", len(in.rest), ErrCorrupt)
	}
}

// byte reads one byte.
func (in *cursor) byte(what string) byte {
	if in.err == nil && len(in.rest) == 0 {
		in.fail("%s is missing: %w", what, ErrCorrupt)
	}
	if in.err != nil {
		return 0
	}
	b := in.rest[0]
	in.rest = in.rest[1:]
	return b
}

// copy reads as many bytes as dst has room for.
func (in *cursor) copy(dst []byte, what string) {
	if in.err == nil && len(in.rest) < len(dst) {
		in.fail("%s is cut short: %w", what, ErrCorrupt)
	}
	in.rest = in.rest[copy(dst, in.rest):]
}

// count reads how many of something follow, and believes it only as far as the
// bytes behind it could hold them at least bytes each.
func (in *cursor) count(what string, least int) int {
	n := in.uvarint(what)
	if in.err == nil && n > uint64(len(in.rest)/least) {
		in.fail("%d %s in %d bytes: %w", n, what, len(in.rest), ErrCorrupt)
	}
	if in.err != nil {
		return 0
	}
	return int(n)
}

// fields reads the bits of the optional fields; known are those that may be there.
func (in *cursor) fields(known uint64) uint64 {
	fields := in.uvarint("fields")
	if fields&^known != 0 {
		in.fail("fields %#x: %w", fields, ErrUnknownVersion)
		return 0
	}
	return fields
}

// optional reads the number of an optional field, which is not 0.
func (in *cursor) optional(what string) uint64 {
	v := in.uvarint(what)
	if v == 0 && in.err == nil {
		in.fail("%s is there and 0: %w", what, ErrCorrupt)
	}
	return v
}

// ttl reads a duration that is not 0.
func (in *cursor) ttl() time.Duration {
	v := in.optional("TTL")
	if v > uint64(MaxTTL/time.Millisecond) {
		in.fail("a TTL of %d milliseconds: %w", v, ErrCorrupt)
		return 0
	}
	return time.Duration(v) * time.Millisecond
}

func (in *cursor) span() Span {
	return Span{stringOf(in.chunk("start")), stringOf(in.chunk("end"))}
}

// command reads one command into c; it must fill the cursor. An op or a field
// that is unknown behind a good checksum comes from a newer version.
func (in *cursor) command(c *Command) {
	// Nothing of the command whose memory this was may show through.
	*c = Command{Op: Op(in.byte("op"))}
	known, ok := commandFields(c.Op)
	if !ok && in.err == nil {
		in.fail("op %d: %w", c.Op, ErrUnknownVersion)
	}
	fields := in.fields(known)
	switch c.Op {
	case OpPut:
		c.Key = stringOf(in.chunk("key"))
		c.Value = in.chunk("value")
	case OpDelete:
		c.Key = stringOf(in.chunk("key"))
	case OpDeleteRange:
		c.Span = in.span()
	case OpTxn:
		c.Txn = in.txn()
	case OpTick:
		c.Tick = Tick{
			Clock: int64(in.uvarint("clock")), Wall: int64(in.uvarint("wall")),
			Seen: in.uvarint("seen"), Term: in.uvarint("term"),
		}
	}
	if fields != 0 {
		in.commandFields(c, fields)
	}
	in.end()
}

func (in *cursor) commandFields(c *Command, fields uint64) {
	if fields&fieldTTL != 0 {
		c.TTL = in.ttl()
	}
	if fields&fieldLease != 0 {
		c.Lease = int64(in.optional("lease"))
	}
	if fields&fieldIf != 0 {
		c.If = in.precondition()
	}
	if fields&fieldWall != 0 {
		c.Wall = int64(in.optional("wall"))
	}
	if fields&fieldOnce != 0 {
		c.Once = &Once{Key: stringOf(in.chunk("idempotency key"))}
		in.copy(c.Once.Fingerprint[:], "fingerprint")
	}
}

func (in *cursor) precondition() Precondition {
	p := Precondition{Kind: Check(in.byte("kind"))}
	if in.err == nil && (p.Kind == CheckNothing || p.Kind > CheckNoneOf) {
		in.fail("precondition of kind %d: %w", p.Kind, ErrUnknownVersion)
	}
	if p.hasRevisions() {
		p.Revisions = make([]int64, in.count("revisions", 1))
		for i := range p.Revisions {
			p.Revisions[i] = int64(in.uvarint("revision"))
		}
	}
	return p
}

func (in *cursor) txn() *Txn {
	flags := in.byte("flags")
	if flags&^(flagEach|flagBrief) != 0 {
		in.fail("flags %#x: %w", flags, ErrUnknownVersion)
	}
	t := &Txn{Each: flags&flagEach != 0, Brief: flags&flagBrief != 0}
	if n := in.count("comparisons", minCompareSize); n > 0 {
		t.If = make([]Compare, n)
		for i := range t.If {
			in.compare(&t.If[i])
		}
	}
	t.Then = in.branch()
	t.Else = in.branch()
	return t
}

func (in *cursor) compare(c *Compare) {
	c.Target, c.Op = Target(in.byte("target")), CompareOp(in.byte("operator"))
	if in.err == nil && (c.Target < TargetModRevision || c.Target > TargetExists || c.Op < Equal || c.Op > Greater) {
		in.fail("target %d, operator %d: %w", c.Target, c.Op, ErrUnknownVersion)
	}
	c.Key = stringOf(in.chunk("key"))
	if c.Target == TargetValue {
		c.Value = in.chunk("value")
	} else {
		c.Number = int64(in.uvarint("number"))
	}
}

// branch reads the operations of a branch; nil if there are none.
func (in *cursor) branch() []TxnOp {
	n := in.count("operations", minTxnOpSize)
	if n == 0 {
		return nil
	}
	branch := make([]TxnOp, n)
	for i := range branch {
		in.txnOp(&branch[i])
	}
	return branch
}

func (in *cursor) txnOp(o *TxnOp) {
	o.Op = Op(in.byte("op"))
	known, ok := txnOpFields(o.Op)
	if !ok && in.err == nil {
		in.fail("op %d in a transaction: %w", o.Op, ErrUnknownVersion)
	}
	fields := in.fields(known)
	if o.Op == OpPut {
		o.Key = stringOf(in.chunk("key"))
		o.Value = in.chunk("value")
	} else {
		o.Span = in.span()
	}
	if fields&fieldTTL != 0 {
		o.TTL = in.ttl()
	}
	if fields&fieldLease != 0 {
		o.Lease = int64(in.optional("lease"))
	}
	o.CreateOnly = fields&fieldCreateOnly != 0
	if fields&fieldLimit != 0 {
		limit := in.optional("limit")
		if limit > math.MaxInt {
			in.fail("a limit of %d: %w", limit, ErrCorrupt)
		}
		o.Limit = int(limit)
	}
	o.KeysOnly = fields&fieldKeysOnly != 0
}
