package kv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
)

// ReplayWindow is how many of a member's latest batches are told apart. A batch
// that lies ReplayWindow or more behind the newest is taken for a duplicate, so
// a member must never have that many batches in flight.
const ReplayWindow = 1024

const (
	windowWords = ReplayWindow / 64
	windowSize  = 24 + ReplayWindow/8 // bytes of an encoded window
)

// A window remembers which batches of one member were applied.
//
// A member that cannot tell whether a proposal survived a change of leader
// proposes the same batch again; both copies may then be committed. The first
// takes effect, the second must not. Remembering the highest Seq alone would
// be wrong: proposals overtake each other on their way to the leader, and one
// that comes late for the first time is no duplicate.
type window struct {
	node uint64 // never 0
	boot uint64 // the newest Boot seen; batches of an older one are refused
	high uint64 // the highest Seq applied in that Boot, at least 1
	// seen has a bit for each of the ReplayWindow Seqs up to high, at Seq
	// modulo ReplayWindow. The places that no Seq has reached yet are zero.
	seen [windowWords]uint64
}

// admit reports whether the batch is new, and remembers it if so.
func (s *State) admit(node, boot, seq uint64) bool {
	i, found := s.findWindow(node)
	if !found {
		s.windows = slices.Insert(s.windows, i, window{node: node, boot: boot})
	}
	w := &s.windows[i]
	if boot < w.boot {
		return false
	}
	if boot > w.boot {
		*w = window{node: node, boot: boot}
	}
	return w.admit(seq)
}

func (w *window) admit(seq uint64) bool {
	if seq > w.high {
		w.advance(seq)
		return true
	}
	// No overflow: seq is at most high here.
	if w.high-seq >= ReplayWindow || w.has(seq) {
		return false
	}
	w.set(seq)
	return true
}

// advance moves the window up to seq and marks it. The Seqs that were skipped
// take over places of Seqs that leave the window, and have not been seen.
func (w *window) advance(seq uint64) {
	if seq-w.high >= ReplayWindow {
		w.seen = [windowWords]uint64{}
	} else {
		for skipped := w.high + 1; skipped < seq; skipped++ {
			w.seen[skipped%ReplayWindow/64] &^= 1 << (skipped % 64)
		}
	}
	w.high = seq
	w.set(seq)
}

func (w *window) has(seq uint64) bool {
	return w.seen[seq%ReplayWindow/64]&(1<<(seq%64)) != 0
}

func (w *window) set(seq uint64) { w.seen[seq%ReplayWindow/64] |= 1 << (seq % 64) }

// ForgetNode drops what replay protection knows of a member. Call it where the
// log removes the member, on every replica: the table is part of the state.
//
// From then on a batch of that member would be taken for new. The caller must
// not Apply batches of removed members, but SetApplied over them.
func (s *State) ForgetNode(node uint64) {
	if i, found := s.findWindow(node); found {
		s.windows = slices.Delete(s.windows, i, i+1)
	}
}

// findWindow returns where the window of node is, or belongs. A member looks at
// no more windows than the cluster has members.
func (s *State) findWindow(node uint64) (int, bool) {
	for i := range s.windows {
		if s.windows[i].node >= node {
			return i, s.windows[i].node == node
		}
	}
	return len(s.windows), false
}

// append encodes the window in windowSize bytes: node, boot and high, then the
// bitmap, as little-endian words.
func (w *window) append(dst []byte) []byte {
	for _, v := range [...]uint64{w.node, w.boot, w.high} {
		dst = binary.LittleEndian.AppendUint64(dst, v)
	}
	for _, v := range w.seen {
		dst = binary.LittleEndian.AppendUint64(dst, v)
	}
	return dst
}

// decode reads what append wrote; b holds windowSize bytes.
func (w *window) decode(b []byte) {
	w.node = binary.LittleEndian.Uint64(b)
	w.boot = binary.LittleEndian.Uint64(b[8:])
	w.high = binary.LittleEndian.Uint64(b[16:])
	for i := range w.seen {
		w.seen[i] = binary.LittleEndian.Uint64(b[24+8*i:])
	}
}

func (w *window) hash() uint64 {
	var buf [windowSize]byte
	b := w.append(buf[:0])
	return joinHash(crc32.Checksum(b[:24], castagnoli), crc32.Checksum(b[24:], castagnoli))
}

// valid checks one window on its own.
func (w *window) valid() error {
	switch {
	case w.node == 0:
		return errors.New("a replay window without a node")
	case w.high == 0 || !w.has(w.high):
		return fmt.Errorf("replay window of node %d: its highest batch %d is not marked", w.node, w.high)
	}
	if w.high >= ReplayWindow {
		return nil
	}
	// The places of Seq 0 and of those above high were never reached.
	if w.has(0) {
		return fmt.Errorf("replay window of node %d: batch 0 is marked", w.node)
	}
	for seq := w.high + 1; seq < ReplayWindow; seq++ {
		if w.has(seq) {
			return fmt.Errorf("replay window of node %d: batch %d is marked beyond %d", w.node, seq, w.high)
		}
	}
	return nil
}

// addWindow counts one window and checks it against its predecessor.
func (t *tally) addWindow(w *window) error {
	if err := w.valid(); err != nil {
		return err
	}
	if w.node <= t.lastWindow {
		return fmt.Errorf("replay windows of nodes %d and %d are out of order", t.lastWindow, w.node)
	}
	t.lastWindow = w.node
	t.windows++
	t.windowSum += w.hash()
	return nil
}
