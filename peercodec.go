package main

import (
	"encoding/binary"
	"fmt"

	"go.etcd.io/raft/v3/raftpb"
)

// A message on a lane (peerlane.go):
//
//	1  type
//	1  1 if it rejects, else 0
//	v  from, term, log term, index, commit, reject hint
//	v  size of the context, and the context
//	v  number of entries; of each 1 type, v term, v index, v size, and the data
//
// v is an unsigned varint. A message of raft is an object of pointers, made
// for protobuf: to read one of a single entry in that form takes 17 allocations and
// two walks over the bytes, one of them to see what it would cost. Here it takes
// 3, and costs no more memory than its bytes and its entries say.

// fitsLane says that m is not too large for a lane, and that nothing of it is lost
// there. Snapshots have a way of their own, and the rest is between a process and its
// disk.
func fitsLane(m *raftpb.Message) bool {
	return m.Snapshot == nil && len(m.Responses) == 0 && m.Vote == nil && m.GetType() != raftpb.MsgSnap &&
		maxHead+len(m.GetContext())+len(m.GetEntries())*maxEntryHead+entryBytes(m.GetEntries()) <= maxLaneMessage
}

// What messages and entries take at most besides their data, and entries at least.
const (
	maxHead      = 2 + 8*binary.MaxVarintLen64
	maxEntryHead = 1 + 3*binary.MaxVarintLen64
	minEntry     = 4
)

// appendMessage appends m, for which fitsLane holds.
func appendMessage(b []byte, m *raftpb.Message) []byte {
	reject := byte(0)
	if m.GetReject() {
		reject = 1
	}
	b = append(b, byte(m.GetType()), reject)
	for _, v := range [...]uint64{m.GetFrom(), m.GetTerm(), m.GetLogTerm(), m.GetIndex(), m.GetCommit(), m.GetRejectHint(), uint64(len(m.GetContext()))} {
		b = binary.AppendUvarint(b, v)
	}
	b = append(b, m.GetContext()...)
	b = binary.AppendUvarint(b, uint64(len(m.GetEntries())))
	for _, e := range m.GetEntries() {
		b = append(b, byte(e.GetType()))
		b = binary.AppendUvarint(b, e.GetTerm())
		b = binary.AppendUvarint(b, e.GetIndex())
		b = binary.AppendUvarint(b, uint64(len(e.GetData())))
		b = append(b, e.GetData()...)
	}
	return b
}

// laneMessage and laneEntry hold a message and all that it points to, so that each
// is one allocation.
type laneMessage struct {
	raftpb.Message
	typ    raftpb.MessageType
	reject bool
	n      [7]uint64 // from, term, log term, index, commit, reject hint; to
}

type laneEntry struct {
	raftpb.Entry
	typ         raftpb.EntryType
	term, index uint64
}

// readMessage reads a message to member to. What it returns refers to b: its
// context and the data of its entries.
func readMessage(b []byte, to uint64) (*raftpb.Message, error) {
	if len(b) < 2 || b[1] > 1 {
		return nil, fmt.Errorf("%w: no message begins so", errBadFrame)
	}
	l := &laneMessage{typ: raftpb.MessageType(b[0]), reject: b[1] == 1}
	m := &l.Message
	r := laneReader{b: b[2:]}
	for i := range l.n[:6] {
		l.n[i] = r.number()
	}
	l.n[6] = to
	m.Type, m.Reject = &l.typ, &l.reject
	for i, field := range [...]**uint64{&m.From, &m.Term, &m.LogTerm, &m.Index, &m.Commit, &m.RejectHint, &m.To} {
		*field = &l.n[i]
	}
	m.Context = r.sized()
	count := r.number()
	if r.short || count > uint64(len(r.b)/minEntry) {
		return nil, fmt.Errorf("%w: it is cut short, or announces %d entries", errBadFrame, count)
	}
	if count > 0 {
		m.Entries = make([]*raftpb.Entry, count)
		entries := make([]laneEntry, count)
		for i := range entries {
			e := &entries[i]
			e.typ = raftpb.EntryType(r.byte())
			e.term, e.index = r.number(), r.number()
			e.Type, e.Entry.Term, e.Entry.Index, e.Data = &e.typ, &e.term, &e.index, r.sized()
			m.Entries[i] = &e.Entry
		}
	}
	if r.short || len(r.b) > 0 {
		return nil, fmt.Errorf("%w: its length is not that of a message", errBadFrame)
	}
	return m, nil
}

// laneReader takes values off b. Once short it returns zeros.
type laneReader struct {
	b     []byte
	short bool
}

func (r *laneReader) fail() { r.b, r.short = nil, true }

func (r *laneReader) byte() byte {
	if len(r.b) == 0 {
		r.fail()
		return 0
	}
	v := r.b[0]
	r.b = r.b[1:]
	return v
}

func (r *laneReader) number() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.fail()
		return 0
	}
	r.b = r.b[n:]
	return v
}

// sized is nil where the size is 0.
func (r *laneReader) sized() []byte {
	n := r.number()
	if n > uint64(len(r.b)) {
		r.fail()
		return nil
	}
	if n == 0 {
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}
