package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"hash/crc32"
	"math"
	"strings"

	"pontoon/kv"
)

// A cursor is where a walk over the keys goes on. It holds all that the next
// page needs, so that no member remembers walks, and any member continues one:
//
//	version  1 byte   cursorVersion
//	rolled   1 byte   0 or 1: last is a prefix that delimiter= rolled up
//	revision 8 bytes  of every page of the walk, big-endian, at least 1
//	query    8 bytes  what the walk is over (walkHash)
//	last     1 byte or more
//	checksum 4 bytes  CRC-32C of all before it, big-endian
//
// in base64url without padding. The checksum is against mutilation, not against
// forgery: a forged cursor reads what its maker may read anyway.
type cursor struct {
	revision int64
	query    [8]byte
	last     string
	rolled   bool
}

const (
	cursorVersion  = 1
	cursorHeader   = 1 + 1 + 8 + 8
	cursorChecksum = 4
)

var cursorEncoding = base64.RawURLEncoding.Strict()

func (k *cursor) encode() string {
	b := make([]byte, 0, cursorHeader+len(k.last)+cursorChecksum)
	b = append(b, cursorVersion, 0)
	if k.rolled {
		b[1] = 1
	}
	b = binary.BigEndian.AppendUint64(b, uint64(k.revision))
	b = append(b, k.query[:]...)
	b = append(b, k.last...)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return cursorEncoding.EncodeToString(b)
}

// decodeCursor is the inverse of encode; the text says what is wrong, "" if
// nothing is. Every cursor has exactly one encoding.
func decodeCursor(text string) (k cursor, wrong string) {
	const broken = "it is broken; pass on `next` of the answer before as it came"
	b, err := cursorEncoding.DecodeString(text)
	if err != nil || strings.ContainsAny(text, "\r\n") { // the decoder skips line ends
		return k, broken
	}
	if len(b) > 0 && b[0] != cursorVersion {
		return k, "it is broken, or of another version of the server; begin the walk anew"
	}
	if len(b) <= cursorHeader+cursorChecksum {
		return k, broken
	}
	sealed, sum := b[:len(b)-cursorChecksum], b[len(b)-cursorChecksum:]
	if crc32.Checksum(sealed, castagnoli) != binary.BigEndian.Uint32(sum) {
		return k, broken
	}
	revision := binary.BigEndian.Uint64(b[2:])
	if b[1] > 1 || revision == 0 || revision > math.MaxInt64 {
		return k, broken
	}
	k.rolled = b[1] == 1
	k.revision = int64(revision)
	copy(k.query[:], b[10:])
	k.last = string(sealed[cursorHeader:])
	return k, ""
}

// walkHash tells walks apart. What may change from page to page is left out:
// limit, timeout, consistency.
func walkHash(q *kv.Query) (sum [8]byte) {
	var b bytes.Buffer
	for _, s := range []string{q.Span.Start, q.Span.End, q.Prefix, q.Delimiter} {
		b.Write(binary.AppendUvarint(nil, uint64(len(s))))
		b.WriteString(s)
	}
	for _, flag := range []bool{q.Reverse, q.KeysOnly} {
		if flag {
			b.WriteByte(1)
		} else {
			b.WriteByte(0)
		}
	}
	full := sha256.Sum256(b.Bytes())
	copy(sum[:], full[:])
	return sum
}
