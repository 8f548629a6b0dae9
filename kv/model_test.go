package kv

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// model is the dumb twin of State: plain maps and slices, every event there ever
// was, and the rules in the order in which they are worded.
type model struct {
	entries  map[string]Entry // without Expires
	revision int64
	applied  uint64
	members  map[uint64]twinMember

	clock     int64
	leases    map[int64]twinLease
	lastLease int64

	events    []Event // all, ever
	compacted int64

	kept  map[string]twinKept
	tombs []string // keys, oldest first

	maxEvents, maxKept, maxTombs, maxTickKeys, maxTickKept int
	maxSize, maxBytes                                      int64
}

type twinMember struct {
	boot, high uint64
	seen       map[uint64]bool
}

type twinLease struct {
	ttl, deadline, expires int64
	index                  uint64
	own                    bool
}

type twinKept struct {
	fingerprint [16]byte
	window      time.Duration
	deadline    int64
	index       uint64
	size        int64
	result      Result
}

// newModel returns the twin of a state, with its bounds.
func newModel(s *State) *model {
	return &model{
		entries: map[string]Entry{}, members: map[uint64]twinMember{},
		leases: map[int64]twinLease{}, kept: map[string]twinKept{},
		maxEvents: s.history.maxEvents, maxSize: s.history.maxSize, maxTickKeys: s.leases.maxTickKeys,
		maxKept: s.once.maxKept, maxTombs: s.once.maxTombs, maxTickKept: s.once.maxTickKept, maxBytes: s.once.maxBytes,
	}
}

func (m *model) clone() *model {
	c := *m
	c.entries = maps.Clone(m.entries)
	c.leases = maps.Clone(m.leases)
	c.kept = maps.Clone(m.kept)
	c.events = slices.Clone(m.events)
	c.tombs = slices.Clone(m.tombs)
	c.members = map[uint64]twinMember{}
	for node, member := range m.members {
		member.seen = maps.Clone(member.seen)
		c.members[node] = member
	}
	return &c
}

// duplicate follows the wording of the rule: an older boot, a batch seen, or
// one that lies ReplayWindow or more behind the highest.
func (m *model) duplicate(node, boot, seq uint64) bool {
	member, known := m.members[node]
	if known && boot < member.boot {
		return true
	}
	if !known || boot > member.boot {
		member = twinMember{boot: boot, seen: map[uint64]bool{}}
	}
	if member.seen[seq] || member.high >= ReplayWindow && seq <= member.high-ReplayWindow {
		m.members[node] = member
		return true
	}
	member.seen[seq] = true
	member.high = max(member.high, seq)
	m.members[node] = member
	return false
}

func (m *model) apply(index uint64, b *Batch) (results []Result) {
	m.applied = index
	if b.Node != 0 && m.duplicate(b.Node, b.Boot, b.Seq) {
		for range b.Commands {
			results = append(results, Result{Revision: m.revision, Duplicate: true})
		}
		return results
	}
	for i := range b.Commands {
		results = append(results, m.once(&b.Commands[i]))
		used := map[int64]bool{}
		for _, e := range m.entries {
			used[e.Lease] = true
		}
		maps.DeleteFunc(m.leases, func(id int64, l twinLease) bool { return l.own && !used[id] })
		m.trim()
	}
	return results
}

// once is the rule of idempotency around run.
func (m *model) once(c *Command) Result {
	if c.Once == nil {
		return m.run(c)
	}
	if k, ok := m.kept[c.Once.Key]; ok {
		if k.fingerprint != c.Once.Fingerprint {
			return Result{Revision: m.revision, Refused: RefusedMismatch}
		}
		r := k.result
		r.Replayed, r.Window = true, k.window
		if k.deadline != 0 {
			r.Window = time.Duration(max(0, k.deadline-m.clock)) * time.Millisecond
		}
		return r
	}
	if slices.Contains(m.tombs, c.Once.Key) {
		return Result{Revision: m.revision, Refused: RefusedExpired}
	}
	size := int64(0)
	for _, k := range m.kept {
		size += k.size
	}
	fill := max(float64(len(m.kept))/float64(m.maxKept), float64(size)/float64(m.maxBytes))
	window := 10 * time.Second
	switch {
	case fill >= 1:
		return Result{Revision: m.revision, Refused: RefusedOnceIsFull}
	case fill < 0.5:
		window = 10 * time.Minute
	case fill < 0.75:
		window = time.Minute
	}
	r := m.run(c)
	k := twinKept{fingerprint: c.Once.Fingerprint, window: window, index: m.applied, result: r}
	k.size = int64(len(c.Once.Key) + len(appendResult(nil, &r)))
	k.result.Entry.Value = nil
	if r.Txn != nil {
		txn := *r.Txn
		txn.Ops = slices.Clone(txn.Ops)
		for i := range txn.Ops {
			txn.Ops[i].Entry.Value = nil
		}
		k.result.Txn = &txn
	}
	m.kept[strings.Clone(c.Once.Key)] = k
	r.Window = window
	return r
}

func (m *model) run(c *Command) Result {
	before := maps.Clone(m.entries)
	switch c.Op {
	case OpPut, OpDelete:
		old, existed := m.entries[c.Key]
		if !m.meets(c, old, existed) {
			return Result{Revision: m.revision, Refused: RefusedCondition, Entry: m.show(old), Existed: existed}
		}
		r := Result{Existed: existed}
		if c.Op == OpDelete {
			r.Entry = m.show(old)
			r.Deleted = m.deleteSpan(SingleKey(c.Key))
		} else {
			if _, ok := m.leases[c.Lease]; c.Lease != 0 && !ok {
				return Result{Revision: m.revision, Refused: RefusedNoLease}
			}
			r.Entry = m.put(c.Key, c.Value, c.TTL, c.Lease, c.Wall)
		}
		m.commit(before)
		r.Revision = m.revision
		return r
	case OpDeleteRange:
		n := m.deleteSpan(c.Span)
		m.commit(before)
		return Result{Revision: m.revision, Deleted: n}
	case OpTxn:
		return m.txn(c)
	case OpGrant:
		return m.leaseResult(m.grant(c.TTL, c.Wall, false))
	case OpTick:
		return m.tick(&c.Tick)
	}
	l, ok := m.leases[c.Lease]
	if !ok {
		return Result{Revision: m.revision, Refused: RefusedNoLease}
	}
	if c.Op == OpRevoke {
		n := m.endLease(c.Lease)
		return Result{Revision: m.revision, Deleted: n}
	}
	if c.TTL != 0 {
		l.ttl = c.TTL.Milliseconds()
	}
	l.deadline, l.index, l.expires = 0, m.applied, c.Wall+l.ttl
	m.leases[c.Lease] = l
	return m.leaseResult(c.Lease)
}

func (m *model) meets(c *Command, e Entry, exists bool) bool {
	switch c.If.Kind {
	case CheckExists:
		return exists
	case CheckAbsent:
		return !exists
	case CheckAnyOf:
		return exists && slices.Contains(c.If.Revisions, e.ModRevision)
	case CheckNoneOf:
		return !exists || !slices.Contains(c.If.Revisions, e.ModRevision)
	}
	return true
}

// put, deleteSpan and the like change the entries at the next revision, which
// commit takes if anything differs.
func (m *model) put(key string, value []byte, ttl time.Duration, lease, wall int64) Entry {
	if ttl != 0 {
		lease = m.grant(ttl, wall, true)
	}
	next := m.revision + 1
	e := Entry{Key: strings.Clone(key), Value: append([]byte{}, value...), CreateRevision: next, ModRevision: next, Version: 1, Lease: lease}
	if old, existed := m.entries[key]; existed {
		e.CreateRevision, e.Version = old.CreateRevision, old.Version+1
	}
	m.entries[e.Key] = e
	return m.show(e)
}

func (m *model) deleteSpan(span Span) (n int64) {
	for _, key := range m.keys(span) {
		delete(m.entries, key)
		n++
	}
	return n
}

func (m *model) keys(span Span) (keys []string) {
	for _, key := range slices.Sorted(maps.Keys(m.entries)) {
		if key >= span.Start && (span.End == "" || key < span.End) {
			keys = append(keys, key)
		}
	}
	return keys
}

// commit makes what differs from before the events of one revision.
func (m *model) commit(before map[string]Entry) {
	all := maps.Clone(before)
	maps.Copy(all, m.entries)
	next := m.revision + 1
	for _, key := range slices.Sorted(maps.Keys(all)) {
		old := before[key]
		now, exists := m.entries[key]
		if !exists {
			m.events = append(m.events, Event{Revision: next, Deleted: true, Entry: Entry{Key: key, ModRevision: next}, Prev: old})
		} else if now.ModRevision == next {
			m.events = append(m.events, Event{Revision: next, Entry: now, Prev: old})
		} else {
			continue
		}
		m.revision = next
	}
}

func (m *model) grant(ttl time.Duration, wall int64, own bool) int64 {
	m.lastLease++
	m.leases[m.lastLease] = twinLease{ttl: ttl.Milliseconds(), expires: wall + ttl.Milliseconds(), index: m.applied, own: own}
	return m.lastLease
}

// attached returns the keys of a lease.
func (m *model) attached(id int64) (keys []string) {
	for key, e := range m.entries {
		if e.Lease == id {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

func (m *model) lease(id int64) Lease {
	l := m.leases[id]
	return Lease{
		ID: id, TTL: time.Duration(l.ttl) * time.Millisecond,
		Deadline: l.deadline, Expires: l.expires, Keys: len(m.attached(id)),
	}
}

func (m *model) leaseResult(id int64) Result {
	l := m.lease(id)
	return Result{Revision: m.revision, Lease: &l}
}

func (m *model) endLease(id int64) int64 {
	before := maps.Clone(m.entries)
	keys := m.attached(id)
	for _, key := range keys {
		delete(m.entries, key)
	}
	delete(m.leases, id)
	m.commit(before)
	return int64(len(keys))
}

// show fills in what an entry's lease says.
func (m *model) show(e Entry) Entry {
	e.Expires = m.leases[e.Lease].expires
	return e
}

func (m *model) tick(t *Tick) Result {
	m.clock = max(m.clock, t.Clock)
	for id, l := range m.leases {
		if l.deadline == 0 && l.index <= t.Seen {
			l.deadline, l.expires = m.clock+l.ttl, t.Wall+l.ttl
			m.leases[id] = l
		}
	}
	var seen []string
	for key, k := range m.kept {
		if k.deadline == 0 && k.index <= t.Seen {
			seen = append(seen, key)
		}
	}
	slices.SortFunc(seen, func(a, b string) int {
		return cmp.Or(cmp.Compare(m.kept[a].index, m.kept[b].index), cmp.Compare(a, b))
	})
	for _, key := range seen[:min(len(seen), m.maxTickKept)] {
		k := m.kept[key]
		k.deadline = m.clock + k.window.Milliseconds()
		m.kept[key] = k
	}
	deleted, load := int64(0), 0
	for _, id := range m.due() {
		n := max(1, len(m.attached(id)))
		if load > 0 && load+n > m.maxTickKeys {
			break
		}
		load += n
		deleted += m.endLease(id)
	}
	m.forget()
	return Result{Revision: m.revision, Deleted: deleted}
}

// due returns the leases to end, by deadline and id.
func (m *model) due() (ids []int64) {
	for id, l := range m.leases {
		if l.deadline != 0 && l.deadline <= m.clock {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b int64) int {
		return cmp.Or(cmp.Compare(m.leases[a].deadline, m.leases[b].deadline), cmp.Compare(a, b))
	})
	return ids
}

// forget drops the results whose window has ended.
func (m *model) forget() {
	var over []string
	for key, k := range m.kept {
		if k.deadline != 0 && k.deadline <= m.clock {
			over = append(over, key)
		}
	}
	slices.SortFunc(over, func(a, b string) int {
		return cmp.Or(cmp.Compare(m.kept[a].deadline, m.kept[b].deadline), cmp.Compare(a, b))
	})
	over = over[:min(len(over), m.maxTickKept)]
	for _, key := range over {
		delete(m.kept, key)
		m.tombs = append(m.tombs, key)
	}
	m.tombs = m.tombs[max(0, len(m.tombs)-m.maxTombs):]
}

// trim follows the wording: whole revisions go, oldest first, until both bounds
// hold.
func (m *model) trim() {
	for {
		count, size, oldest := 0, 0, int64(0)
		for _, e := range m.events {
			if e.Revision <= m.compacted {
				continue
			}
			oldest = cmp.Or(oldest, e.Revision)
			count++
			size += 64 + len(e.Entry.Key)
			if p := e.Prev; p.ModRevision != 0 {
				size += int(newHead(p.CreateRevision, p.ModRevision, p.Version, p.Lease, len(p.Key), len(p.Value)).recordSize())
			}
		}
		if count <= m.maxEvents && int64(size) <= m.maxSize {
			return
		}
		m.compacted = oldest
	}
}

func (m *model) txn(c *Command) Result {
	t := c.Txn
	out := &TxnResult{Succeeded: true}
	for i := range t.If {
		out.Succeeded = out.Succeeded && m.compare(&t.If[i])
	}
	ops := t.Else
	if out.Succeeded {
		ops = t.Then
	}
	for i := range ops {
		if _, ok := m.leases[ops[i].Lease]; ops[i].Op == OpPut && ops[i].Lease != 0 && !ok {
			return Result{Revision: m.revision, Refused: RefusedNoLease}
		}
	}
	before := maps.Clone(m.entries)
	if !t.Brief {
		out.Ops = []OpResult{} // of a branch without operations too: it takes a byte where it is kept
	}
	for i := range ops {
		r := m.txnOp(&ops[i], c.Wall, out)
		if !t.Brief {
			out.Ops = append(out.Ops, r)
		}
		if t.Each {
			m.commit(before)
			before = maps.Clone(m.entries)
		}
	}
	m.commit(before)
	return Result{Revision: m.revision, Txn: out}
}

func (m *model) compare(c *Compare) bool {
	e, exists := m.entries[c.Key]
	var order int
	switch c.Target {
	case TargetModRevision:
		order = cmp.Compare(e.ModRevision, c.Number)
	case TargetCreateRevision:
		order = cmp.Compare(e.CreateRevision, c.Number)
	case TargetVersion:
		order = cmp.Compare(e.Version, c.Number)
	case TargetExists:
		return (exists == (c.Number == 1)) == (c.Op == Equal)
	case TargetValue:
		if !exists {
			return c.Op == NotEqual
		}
		order = bytes.Compare(e.Value, c.Value)
	}
	return order == 0 && c.Op == Equal || order != 0 && c.Op == NotEqual ||
		order < 0 && c.Op == Less || order > 0 && c.Op == Greater
}

func (m *model) txnOp(o *TxnOp, wall int64, out *TxnResult) OpResult {
	r := OpResult{Op: o.Op}
	switch o.Op {
	case OpPut:
		_, r.Existed = m.entries[o.Key]
		if r.Skipped = r.Existed && o.CreateOnly; r.Skipped {
			out.Skipped++
			return r
		}
		r.Entry = m.put(o.Key, o.Value, o.TTL, o.Lease, wall)
		out.Put++
	case OpDeleteRange:
		r.Deleted = m.deleteSpan(o.Span)
		out.Deleted += r.Deleted
	case OpGet:
		keys := m.keys(o.Span)
		r.Count = len(keys)
		if o.Limit != 0 {
			keys = keys[:min(len(keys), o.Limit)]
		}
		for _, key := range keys {
			e := m.show(m.entries[key])
			if o.KeysOnly {
				e.Value = nil
			}
			r.Items = append(r.Items, e)
		}
	}
	return r
}

// at returns the entries of a revision, sorted: what all events up to it have
// left behind.
func (m *model) at(revision int64) []Entry {
	entries := map[string]Entry{}
	for _, e := range m.events {
		if e.Revision > revision {
			break
		}
		entries[e.Entry.Key] = m.show(e.Entry)
		if e.Deleted {
			delete(entries, e.Entry.Key)
		}
	}
	sorted := make([]Entry, 0, len(entries))
	for _, key := range slices.Sorted(maps.Keys(entries)) {
		sorted = append(sorted, entries[key])
	}
	return sorted
}

// list answers a query from the entries of its revision.
func list(revision int64, entries []Entry, q Query) Page {
	p := Page{Revision: revision}
	entries = slices.DeleteFunc(slices.Clone(entries), func(e Entry) bool { return !q.Span.Contains(e.Key) })
	p.Count = len(entries)
	entries = slices.DeleteFunc(entries, func(e Entry) bool {
		switch {
		case q.After == "":
			return false
		case q.Reverse:
			return e.Key >= q.After
		}
		return e.Key <= q.After || q.Rolled && strings.HasPrefix(e.Key, q.After)
	})
	if q.Reverse {
		slices.Reverse(entries)
	}
	size := int64(0)
	for _, e := range entries {
		group := ""
		if rest, ok := strings.CutPrefix(e.Key, q.Prefix); ok && q.Delimiter != "" {
			if before, _, found := strings.Cut(rest, q.Delimiter); found {
				group = q.Prefix + before + q.Delimiter
			}
		}
		if group != "" && slices.Contains(p.Prefixes, group) {
			continue
		}
		if q.KeysOnly {
			e.Value = nil
		}
		n := int64(len(e.Key) + len(e.Value))
		if group != "" {
			n = int64(len(group))
		}
		rows := len(p.Items) + len(p.Prefixes)
		if rows > 0 && (rows >= q.Limit || q.MaxBytes > 0 && size+n > q.MaxBytes) {
			p.More = true
			break
		}
		size += n
		if p.LastRolled = group != ""; p.LastRolled {
			p.Last = group
			p.Prefixes = append(p.Prefixes, group)
		} else {
			p.Last = e.Key
			p.Items = append(p.Items, e)
		}
	}
	return p
}

// text shows what a state and its twin must agree on.
func (m *model) text() string {
	var b bytes.Buffer
	size := 0
	for _, key := range slices.Sorted(maps.Keys(m.entries)) {
		fmt.Fprintf(&b, "%+v\n", m.show(m.entries[key]))
		size += len(key) + len(m.entries[key].Value)
	}
	fmt.Fprintf(&b, "revision %d applied %d len %d bytes %d\n", m.revision, m.applied, len(m.entries), size)
	for id := int64(1); id <= m.lastLease; id++ {
		if _, ok := m.leases[id]; ok {
			fmt.Fprintf(&b, "%+v %q\n", m.lease(id), m.attached(id))
		}
	}
	unstarted, next := false, int64(0)
	pending := func(deadline int64) {
		if deadline == 0 {
			unstarted = true
		} else if next == 0 || deadline < next {
			next = deadline
		}
	}
	for _, l := range m.leases {
		pending(l.deadline)
	}
	for _, k := range m.kept {
		pending(k.deadline)
	}
	fmt.Fprintf(&b, "clock %d leases %d kept %d tombs %d pending %v %d\n", m.clock, len(m.leases), len(m.kept), len(m.tombs), unstarted, next)
	fmt.Fprintf(&b, "compacted %d\n", m.compacted)
	for _, e := range m.events {
		if e.Revision > m.compacted {
			fmt.Fprintf(&b, "%+v\n", e)
		}
	}
	return b.String()
}

func stateText(s *State) string {
	var b bytes.Buffer
	s.Ascend("", func(e Entry) bool {
		fmt.Fprintf(&b, "%+v\n", e)
		return true
	})
	fmt.Fprintf(&b, "revision %d applied %d len %d bytes %d\n", s.Revision(), s.Applied(), s.Len(), s.Bytes())
	view, _ := s.View(0)
	for id := int64(1); id <= s.leases.last; id++ {
		if l, ok := s.Lease(id); ok {
			fmt.Fprintf(&b, "%+v %q\n", l, view.LeaseKeys(id, 1<<20))
		}
	}
	unstarted, next := s.Pending()
	fmt.Fprintf(&b, "clock %d leases %d kept %d tombs %d pending %v %d\n", s.Clock(), s.Leases(), s.Kept(), s.once.tombs.count, unstarted, next)
	h := s.History()
	fmt.Fprintf(&b, "compacted %d\n", h.Compacted())
	h.Events(0, func(e Event) bool {
		fmt.Fprintf(&b, "%+v\n", e)
		return true
	})
	return b.String()
}

// resultText shows a result with what its pointers lead to.
func resultText(r Result) string {
	lease, txn := "", ""
	if r.Lease != nil {
		lease = fmt.Sprintf("%+v", *r.Lease)
	}
	if r.Txn != nil {
		txn = fmt.Sprintf("%+v", *r.Txn)
	}
	r.Lease, r.Txn = nil, nil
	return fmt.Sprintf("%+v lease %s txn %s\n", r, lease, txn)
}

func resultsText(results []Result) string {
	var b strings.Builder
	for _, r := range results {
		b.WriteString(resultText(r))
	}
	return b.String()
}
