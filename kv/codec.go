package kv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
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
//	uvarint  fields: a bit for each optional field; none yet. A bit that a
//	         version does not know makes it refuse the entry: skipping an
//	         option would make replicas differ.
//	uvarint  length of the key, then the key
//	uvarint  length of the value, then the value (OpPut only)
//
// Commands carry their own length so that one can be encoded where its request
// is handled and joined to a batch by the proposer with a copy.
const (
	batchVersion   = 1
	batchHeadSize  = 5
	minCommandSize = 5 // length, op, fields, length of the key, one byte of key
)

// CommandSize returns the exact number of bytes AppendCommand will add.
func CommandSize(c Command) int {
	n := commandBodySize(c)
	return uvarintSize(uint64(n)) + n
}

func commandBodySize(c Command) int {
	n := 2 + uvarintSize(uint64(len(c.Key))) + len(c.Key)
	if c.Op == OpPut {
		n += uvarintSize(uint64(len(c.Value))) + len(c.Value)
	}
	return n
}

// AppendCommand appends the encoding of one command to dst. It does not
// validate: what DecodeBatch would refuse must not be proposed.
func AppendCommand(dst []byte, c Command) []byte {
	dst = binary.AppendUvarint(dst, uint64(commandBodySize(c)))
	dst = append(dst, byte(c.Op), 0)
	dst = binary.AppendUvarint(dst, uint64(len(c.Key)))
	dst = append(dst, c.Key...)
	if c.Op == OpPut {
		dst = binary.AppendUvarint(dst, uint64(len(c.Value)))
		dst = append(dst, c.Value...)
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
	count := in.uvarint("number of commands")
	// A count is believed only as far as the bytes behind it could hold it.
	if in.err == nil && count > uint64(len(in.rest)/minCommandSize) {
		return fmt.Errorf("%d commands in %d bytes: %w", count, len(in.rest), ErrCorrupt)
	}
	if in.err == nil {
		b.Commands = slices.Grow(b.Commands, int(count))
	}
	for i := uint64(0); i < count && in.err == nil; i++ {
		body := cursor{rest: in.chunk("command")}
		if in.err != nil {
			break
		}
		b.Commands = append(b.Commands, body.command())
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

// validate returns the rules of a batch that its types do not express.
func (b *Batch) validate() error {
	if b.Node != 0 && b.Seq == 0 {
		return fmt.Errorf("a batch of node %d without a sequence number", b.Node)
	}
	for i := range b.Commands {
		c := &b.Commands[i]
		if len(c.Key) == 0 || len(c.Key) > MaxKeySize {
			return fmt.Errorf("command %d: a key of %d bytes", i, len(c.Key))
		}
		if c.Op != OpPut && c.Op != OpDelete {
			return fmt.Errorf("command %d: op %d", i, c.Op)
		}
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

// command reads one command, which must fill the cursor. An op or a field that
// is unknown behind a good checksum comes from a newer version.
func (in *cursor) command() Command {
	if len(in.rest) == 0 {
		in.fail("empty: %w", ErrCorrupt)
		return Command{}
	}
	c := Command{Op: Op(in.rest[0])}
	in.rest = in.rest[1:]
	if c.Op != OpPut && c.Op != OpDelete {
		in.fail("op %d: %w", c.Op, ErrUnknownVersion)
	}
	if fields := in.uvarint("fields"); fields != 0 {
		in.fail("fields %#x: %w", fields, ErrUnknownVersion)
	}
	c.Key = stringOf(in.chunk("key"))
	if c.Op == OpPut {
		c.Value = in.chunk("value")
	}
	in.end()
	return c
}
