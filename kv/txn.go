package kv

import (
	"bytes"
	"cmp"
	"slices"
	"strings"
)

// txn carries out a transaction: all of what one branch says, or nothing.
func (s *State) txn(c *Command, index uint64) Result {
	t := c.Txn
	out := &TxnResult{Succeeded: s.holds(t.If)}
	ops := t.Then
	if !out.Succeeded {
		ops = t.Else
	}
	// Whatever can refuse the transaction does so before anything changes, so
	// there is nothing to roll back.
	for i := range ops {
		if o := &ops[i]; o.Op == OpPut && o.Lease != 0 && !s.leases.has(o.Lease) {
			return s.refuse(RefusedNoLease)
		}
	}
	limit := MaxTxnReadBytes
	if c.Once != nil {
		limit = MaxOnceBytes
	}
	if !s.readsFit(ops, int64(limit)) {
		return s.refuse(RefusedTooLarge)
	}
	run := txnRun{s: s, c: c, index: index, out: out}
	if !t.Brief {
		out.Ops = make([]OpResult, len(ops))
	}
	for i := range ops {
		r := run.op(&ops[i])
		if !t.Brief {
			out.Ops[i] = r
		}
		if t.Each {
			run.commit()
		}
	}
	run.commit()
	return Result{Revision: s.revision, Txn: out}
}

// holds says whether all comparisons hold.
func (s *State) holds(compares []Compare) bool {
	for i := range compares {
		if c := &compares[i]; !s.holdsOne(c) {
			return false
		}
	}
	return true
}

func (s *State) holdsOne(c *Compare) bool {
	e, exists := s.Get(c.Key)
	var order int
	switch c.Target {
	case TargetModRevision:
		order = cmp.Compare(e.ModRevision, c.Number)
	case TargetCreateRevision:
		order = cmp.Compare(e.CreateRevision, c.Number)
	case TargetVersion:
		order = cmp.Compare(e.Version, c.Number)
	case TargetExists:
		if exists {
			order = 1
		}
		order -= int(c.Number)
	case TargetValue:
		if !exists {
			return c.Op == NotEqual
		}
		order = bytes.Compare(e.Value, c.Value)
	}
	switch c.Op {
	case Equal:
		return order == 0
	case NotEqual:
		return order != 0
	case Less:
		return order < 0
	default: // Greater, as the batch is valid
		return order > 0
	}
}

// readsFit says whether all gets among the operations together stay within
// MaxTxnItems and limit bytes. It never underestimates: a get returns the first
// entries of what its span held before, was not deleted and was maybe put, and
// those that were not put are among the first of them without the puts.
func (s *State) readsFit(ops []TxnOp, limit int64) bool {
	items, size := 0, int64(0)
	for i := range ops {
		if ops[i].Op != OpGet {
			continue
		}
		n, b := s.readSize(&ops[i], ops[:i], limit-size)
		items += n
		size += b
		if items > MaxTxnItems || size > limit {
			return false
		}
	}
	return true
}

// readSize estimates one get, from the operations before it. It may stop
// counting above limit bytes.
func (s *State) readSize(get *TxnOp, before []TxnOp, limit int64) (items int, size int64) {
	most := get.most()
	from := get.Span.Start
	for more := true; more; {
		more = false
		s.items.ascend(from, func(rec string, h head) bool {
			key := keyOf(rec, h)
			if !get.Span.Contains(key) || items == most || size > limit {
				return false
			}
			if i := slices.IndexFunc(before, func(o TxnOp) bool { return o.Op == OpDeleteRange && o.Span.Contains(key) }); i >= 0 {
				// The walk goes on behind what is deleted.
				from = before[i].Span.End
				more = from != ""
				return false
			}
			items++
			size += get.cost(h.keyLen, h.valueLen)
			return true
		})
	}
	for i := range before {
		if o := &before[i]; o.Op == OpPut && get.Span.Contains(o.Key) {
			items = min(items+1, most)
			size += get.cost(len(o.Key), len(o.Value))
		}
	}
	return items, size
}

// most is how many entries a get returns at most.
func (o *TxnOp) most() int {
	if o.Limit == 0 {
		return MaxTxnItems
	}
	return o.Limit
}

// cost is what an entry counts for in the result of a get.
func (o *TxnOp) cost(keyLen, valueLen int) int64 {
	if o.KeysOnly {
		return int64(keyLen)
	}
	return int64(keyLen) + int64(valueLen)
}

// txnRun is a transaction that is being carried out.
type txnRun struct {
	s     *State
	c     *Command
	index uint64
	out   *TxnResult
	// changes are the events of the revision that is not committed yet, in the
	// order of the operations. It is taken with the first of them.
	changes []change
}

type change struct {
	key string
	event
}

// begin takes the revision of the changes.
func (r *txnRun) begin() {
	if len(r.changes) == 0 {
		r.s.revision++
	}
}

func (r *txnRun) op(o *TxnOp) OpResult {
	switch o.Op {
	case OpPut:
		return r.put(o)
	case OpDeleteRange:
		keys := r.s.keysOf(o.Span)
		for _, key := range keys {
			r.begin()
			e, _ := r.s.remove(key, r.s.revision)
			r.changes = append(r.changes, change{key, e})
		}
		r.out.Deleted += int64(len(keys))
		return OpResult{Op: o.Op, Deleted: int64(len(keys))}
	default: // OpGet, as the batch is valid
		return r.get(o)
	}
}

func (r *txnRun) put(o *TxnOp) OpResult {
	s := r.s
	if o.CreateOnly {
		if _, _, exists := s.items.get(o.Key); exists {
			r.out.Skipped++
			return OpResult{Op: o.Op, Existed: true, Skipped: true}
		}
	}
	lease := o.Lease
	if o.TTL != 0 {
		lease = s.leases.grant(o.TTL, r.c.Wall, r.index, true)
	}
	r.begin()
	e, h := s.store(o.Key, o.Value, lease)
	r.changes = append(r.changes, change{keyOf(e.next, h), e})
	r.out.Put++
	return OpResult{Op: o.Op, Entry: s.entry(e.next, h), Existed: e.prev != ""}
}

func (r *txnRun) get(o *TxnOp) OpResult {
	s, most := r.s, o.most()
	out := OpResult{Op: o.Op, Count: s.count(o.Span)}
	s.items.ascend(o.Span.Start, func(rec string, h head) bool {
		if !o.Span.Contains(keyOf(rec, h)) || len(out.Items) == most {
			return false
		}
		e := s.entry(rec, h)
		if o.KeysOnly {
			e.Value = nil
		}
		out.Items = append(out.Items, e)
		return true
	})
	return out
}

// commit makes the changes history: one event a key, in ascending order. A key
// that was deleted and then put has two changes, which become a replacement.
func (r *txnRun) commit() {
	byKey := func(a, b change) int { return strings.Compare(a.key, b.key) }
	if !slices.IsSortedFunc(r.changes, byKey) {
		slices.SortStableFunc(r.changes, byKey)
	}
	for i := 0; i < len(r.changes); i++ {
		e := r.changes[i]
		if i+1 < len(r.changes) && r.changes[i+1].key == e.key {
			i++
			e.next = r.changes[i].next
			e.hash = eventHash(e.revision, false, recordHash(e.prev, headOf(e.prev)))
		}
		r.s.history.add(e.event)
	}
	clear(r.changes)
	r.changes = r.changes[:0]
}
