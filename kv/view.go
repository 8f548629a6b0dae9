package kv

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Why a revision cannot be read.
var (
	// ErrCompacted says that the revision is older than what history keeps.
	ErrCompacted = errors.New("the revision is compacted")
	// ErrFuture says that the store has not reached the revision.
	ErrFuture = errors.New("the revision lies in the future")
)

// View is the store as it was at one revision: the present entries, with what
// history says came later undone. It reads the State it was taken from, which
// must not change while the View is used; take it of a Clone to read without a
// lock. A View may be used by one goroutine at a time.
type View struct {
	state    *State
	revision int64
	// undo has what was under each key that changed since, in ascending order
	// of keys. It is made when first needed, and of no use at the present
	// revision.
	undo  []undone
	ready bool
}

// undone is a key that changed after the revision of a View.
type undone struct {
	key string
	rec string // that was there; empty: none
	// more is how many keys are there at the revision for each one that is now: -1, 0 or 1.
	more int
}

// View returns the store at revision; 0 is the present one. The error is
// ErrCompacted or ErrFuture.
func (s *State) View(revision int64) (*View, error) {
	switch {
	case revision == 0:
		revision = s.revision
	case revision > s.revision:
		return nil, fmt.Errorf("revision %d, the newest is %d: %w", revision, s.revision, ErrFuture)
	case revision < s.history.compacted:
		return nil, fmt.Errorf("revision %d, the oldest is %d: %w", revision, s.history.compacted, ErrCompacted)
	}
	return &View{state: s, revision: revision, ready: revision == s.revision}, nil
}

// Revision is that of the view.
func (v *View) Revision() int64 { return v.revision }

// Get returns the entry that was under key. At an older revision it looks
// through the events since then at most once.
func (v *View) Get(key string) (Entry, bool) {
	rec, h, ok := v.state.items.get(key)
	if ok && h.mod <= v.revision {
		// What has not changed since the revision was there at it.
		return v.state.entry(rec, h), true
	}
	if v.ready {
		if i, found := v.find(key); found {
			return v.entry(v.undo[i].rec)
		}
		return Entry{}, false
	}
	history := v.state.History()
	return v.entry(history.before(key, v.revision))
}

// entry returns the entry of a record; empty: there is none.
func (v *View) entry(rec string) (Entry, bool) {
	if rec == "" {
		return Entry{}, false
	}
	return v.state.entry(rec, headOf(rec)), true
}

// find returns where key is in undo, or belongs.
func (v *View) find(key string) (int, bool) {
	return slices.BinarySearchFunc(v.undo, key, func(u undone, key string) int { return strings.Compare(u.key, key) })
}

// prepare makes undo.
func (v *View) prepare() { _ = v.Prepare(func() error { return nil }) } // nothing stops it

// Prepare does what Ascend, Count and List begin with: at an older revision it copies
// and sorts the events since, of which there may be as many as history keeps. It asks
// stop now and then, and returns its error, with nothing done.
func (v *View) Prepare(stop func() error) error {
	if v.ready {
		return nil
	}
	var err error
	h := v.state.History()
	h.from(v.revision+1, func(e *event) bool {
		if len(v.undo)%stopEvery == 0 {
			err = stop()
		}
		u := undone{key: e.key(), rec: e.prev}
		if e.prev != "" {
			u.more++
		}
		if e.next != "" {
			u.more--
		}
		v.undo = append(v.undo, u)
		return err == nil
	})
	if err == nil {
		err = stop()
	}
	if err != nil {
		v.undo = nil
		return err
	}
	v.ready = true
	slices.SortStableFunc(v.undo, func(a, b undone) int { return strings.Compare(a.key, b.key) })
	// Of the events of one key, which the sort leaves in their order, the first
	// has what was there.
	keys := v.undo[:0]
	for _, u := range v.undo {
		if n := len(keys); n > 0 && keys[n-1].key == u.key {
			keys[n-1].more += u.more
		} else {
			keys = append(keys, u)
		}
	}
	v.undo = keys
	return nil
}

const stopEvery = 4096 // events

// Ascend calls f for each entry of the span in byte order, until f returns false.
func (v *View) Ascend(span Span, f func(Entry) bool) {
	v.ascend(span, func(rec string, h head) bool { return f(v.state.entry(rec, h)) })
}

// ascend is Ascend with records, as not every caller needs entries.
func (v *View) ascend(span Span, f func(rec string, h head) bool) {
	v.prepare()
	at, _ := v.find(span.Start)
	// undoTo calls f for what was there before key, or everywhere if it is empty.
	undoTo := func(key string) bool {
		for ; at < len(v.undo) && (key == "" || v.undo[at].key < key) && span.Contains(v.undo[at].key); at++ {
			if rec := v.undo[at].rec; rec != "" && !f(rec, headOf(rec)) {
				return false
			}
		}
		return true
	}
	more := true
	v.state.items.ascend(span.Start, func(rec string, h head) bool {
		key := keyOf(rec, h)
		if !span.Contains(key) {
			return false
		}
		if more = undoTo(key); !more {
			return false
		}
		if at < len(v.undo) && v.undo[at].key == key {
			return true // undone, it comes with the next key
		}
		more = f(rec, h)
		return more
	})
	if more {
		undoTo("")
	}
}

// descend is ascend in the other direction.
func (v *View) descend(span Span, f func(rec string, h head) bool) {
	v.prepare()
	at := len(v.undo)
	if span.End != "" {
		at, _ = v.find(span.End)
	}
	// undoTo calls f for what was there behind key, or from the start of the
	// span on if there is none; at is one above the next.
	undoTo := func(key string, all bool) bool {
		for ; at > 0 && (all || v.undo[at-1].key > key) && span.Contains(v.undo[at-1].key); at-- {
			if rec := v.undo[at-1].rec; rec != "" && !f(rec, headOf(rec)) {
				return false
			}
		}
		return true
	}
	more := true
	v.state.items.descend(span.End, func(rec string, h head) bool {
		key := keyOf(rec, h)
		if !span.Contains(key) {
			return false
		}
		if more = undoTo(key, false); !more {
			return false
		}
		if at > 0 && v.undo[at-1].key == key {
			return true
		}
		more = f(rec, h)
		return more
	})
	if more {
		undoTo("", true)
	}
}

// Count is the number of keys in the span, in time that grows with the logarithm of
// the store and, at an older revision, with the events since then.
func (v *View) Count(span Span) int {
	v.prepare()
	n := v.state.count(span)
	for at, _ := v.find(span.Start); at < len(v.undo) && span.Contains(v.undo[at].key); at++ {
		n += v.undo[at].more
	}
	return n
}

// count is the number of present keys in the span.
func (s *State) count(span Span) int {
	if span.Empty() {
		return 0
	}
	end := s.items.len()
	if span.End != "" {
		end = s.items.rank(span.End)
	}
	return end - s.items.rank(span.Start)
}

// Query is what List answers.
type Query struct {
	Span    Span
	Reverse bool // descending order
	// Delimiter rolls up keys: those that have it somewhere after Prefix count
	// as one item, the part up to and with its first occurrence there. Prefix
	// is then that of Span. Empty: no roll-up.
	Delimiter string
	Prefix    string
	// After continues a walk: only what lies behind it in the order of the
	// walk. It is Page.Last of the page before. Empty: from the beginning.
	After string
	// Rolled says that After is a rolled-up prefix and not a key: keys that begin
	// with it are behind the walk, too.
	Rolled   bool
	Limit    int   // items and prefixes together, at least 1
	MaxBytes int64 // of keys, values and prefixes; a page holds at least one item whatever its size; 0: no bound
	KeysOnly bool  // Page.Items have no Value, and none counts towards MaxBytes
}

// Page is one answer to a Query.
type Page struct {
	Revision   int64
	Count      int      // all keys of the span at that revision, whatever Limit and After say
	Items      []Entry  // in the order of the walk
	Prefixes   []string // rolled up, in the order of the walk
	More       bool     // the walk goes on
	Last       string   // for Query.After
	LastRolled bool     // for Query.Rolled
}

// List returns one page.
func (v *View) List(q Query) Page {
	p := Page{Revision: v.revision, Count: v.Count(q.Span)}
	l := lister{v: v, q: &q, p: &p}
	l.run()
	return p
}

// behind returns the part of the span that lies behind a key, or behind a
// prefix and all keys that begin with it, in the order of the walk.
func (q *Query) behind(span Span, after string, prefix bool) Span {
	switch {
	case q.Reverse:
		if span.End == "" || after < span.End {
			span.End = after
		}
	case prefix:
		end := Prefix(after).End
		if end == "" {
			return Span{"\x00", "\x00"} // empty: nothing is behind all of 0xff
		}
		span.Start = max(span.Start, end)
	default:
		span.Start = max(span.Start, after+"\x00")
	}
	return span
}

// group returns the prefix that a key is rolled up to, or nothing.
func (q *Query) group(key string) string {
	if q.Delimiter == "" || !strings.HasPrefix(key, q.Prefix) {
		return ""
	}
	i := strings.Index(key[len(q.Prefix):], q.Delimiter)
	if i < 0 {
		return ""
	}
	return key[:len(q.Prefix)+i+len(q.Delimiter)]
}

// lister fills a page.
type lister struct {
	v      *View
	q      *Query
	p      *Page
	size   int64
	looked int // keys; of a rolled-up group that is one
}

// run walks from rolled-up prefix to rolled-up prefix: the next walk starts
// behind all keys of the last one.
func (l *lister) run() {
	rest := l.q.Span
	if l.q.After != "" {
		rest = l.q.behind(rest, l.q.After, l.q.Rolled)
	}
	for !rest.Empty() {
		group := ""
		step := func(rec string, h head) bool {
			l.looked++
			group = l.q.group(keyOf(rec, h))
			return group == "" && l.item(rec, h)
		}
		if l.q.Reverse {
			l.v.descend(rest, step)
		} else {
			l.v.ascend(rest, step)
		}
		if group == "" || !l.prefix(group) {
			return
		}
		rest = l.q.behind(rest, group, true)
	}
}

// room says whether the page can take one more of that size; if not, the walk
// ends there and goes on with another page.
func (l *lister) room(size int64) bool {
	n := len(l.p.Items) + len(l.p.Prefixes)
	if n > 0 && (n >= l.q.Limit || l.q.MaxBytes > 0 && l.size+size > l.q.MaxBytes) {
		l.p.More = true
		return false
	}
	l.size += size
	return true
}

func (l *lister) item(rec string, h head) bool {
	size := h.payload()
	if l.q.KeysOnly {
		size = int64(h.keyLen)
	}
	if !l.room(size) {
		return false
	}
	e := l.v.state.entry(rec, h)
	if l.q.KeysOnly {
		e.Value = nil
	}
	l.p.Items = append(l.p.Items, e)
	l.p.Last, l.p.LastRolled = e.Key, false
	return true
}

func (l *lister) prefix(group string) bool {
	if !l.room(int64(len(group))) {
		return false
	}
	l.p.Prefixes = append(l.p.Prefixes, group)
	l.p.Last, l.p.LastRolled = group, true
	return true
}

// LeaseKeys returns up to limit keys that are attached to a lease now, in byte
// order, whatever the revision of the view.
func (v *View) LeaseKeys(id int64, limit int) []string {
	if limit < 1 {
		return nil
	}
	return v.state.leases.keysOf(id, limit)
}
