package watch

import (
	"cmp"
	"slices"
	"sort"

	"pontoon/kv"
)

// The index: which terms an event matches, and which watchers each of them has.
//
// The events of a revision ascend by key, so each term, be it a key, a prefix
// or a span, matches one contiguous range of them. Publishing therefore finds a
// range for each term that matches (a look-up an event in the map of keys, one
// for each length of prefix that is in use, two binary searches a span), and only
// then looks at watchers. A revision of m events under a prefix that n watch
// costs m+n, not m·n, as they share one message. Watchers that do not share it cost
// up to m each: those with several terms that match, and those that want only puts
// or only deletes of a revision that has both.
//
// Rejected: a tree of all prefixes, which would not hash a long key once for
// each length. Lengths are few in practice, and a map is one line.

// term is one key, prefix or span, with the watchers that named it.
type term struct {
	seats []seat // in no order
	span  kv.Span
	kind  termKind
	at    int // kindSpan: its place in index.spans

	// While a revision is published: the range of its events, and the message
	// that all its watchers share; no events: not made yet.
	touched  bool
	from, to int
	message  Message
}

type termKind uint8

const (
	kindAll    termKind = iota // index.all: every watcher, matches nothing
	kindKey                    // span.Start
	kindPrefix                 // span.Start
	kindSpan
)

// seat is a watcher in a term, and place is the way back, so that either is
// removed in constant time.
type seat struct {
	w     *Watcher
	place int // in w.places
}

type place struct {
	t    *term
	seat int // in t.seats
}

// prefixLength counts the prefixes of one length.
type prefixLength struct{ bytes, prefixes int }

// index is guarded by the lock of its Hub.
type index struct {
	all      term
	keys     map[string]*term
	prefixes map[string]*term
	lengths  []prefixLength // ascending by bytes
	spans    []*term        // in no order
	bySpan   map[kv.Span]*term

	// While a revision is published. The slices keep their room.
	events   []kv.Event
	sizes    []int64 // sizes[i]: bytes of events[:i]; empty until needed
	touched  []*term
	watchers []*Watcher
	ranges   []eventRange
}

type eventRange struct{ from, to int }

// add gives w a seat in each term of f.
func (x *index) add(w *Watcher, f *Filter) {
	if x.keys == nil {
		x.keys, x.prefixes, x.bySpan = map[string]*term{}, map[string]*term{}, map[kv.Span]*term{}
	}
	w.places = make([]place, 0, 1+len(f.Keys)+len(f.Prefixes)+len(f.Spans))
	x.all.seat(w)
	for _, key := range f.Keys {
		t := x.keys[key]
		if t == nil {
			t = &term{kind: kindKey, span: kv.Span{Start: key}}
			x.keys[key] = t
		}
		t.seat(w)
	}
	for _, p := range f.Prefixes {
		t := x.prefixes[p]
		if t == nil {
			t = &term{kind: kindPrefix, span: kv.Span{Start: p}}
			x.prefixes[p] = t
			x.countLength(len(p), 1)
		}
		t.seat(w)
	}
	for _, s := range f.Spans {
		t := x.bySpan[s]
		if t == nil {
			t = &term{kind: kindSpan, span: s, at: len(x.spans)}
			x.bySpan[s] = t
			x.spans = append(x.spans, t)
		}
		t.seat(w)
	}
}

func (t *term) seat(w *Watcher) {
	t.seats = append(t.seats, seat{w, len(w.places)})
	w.places = append(w.places, place{t, len(t.seats) - 1})
}

// remove takes w out of all its terms; the last one out removes the term.
func (x *index) remove(w *Watcher) {
	for _, p := range w.places {
		t, last := p.t, len(p.t.seats)-1
		moved := t.seats[last]
		t.seats[p.seat] = moved
		moved.w.places[moved.place].seat = p.seat
		t.seats[last] = seat{}
		t.seats = t.seats[:last]
		if last == 0 {
			x.drop(t)
		}
	}
	w.places = nil
}

func (x *index) drop(t *term) {
	switch t.kind {
	case kindKey:
		delete(x.keys, t.span.Start)
	case kindPrefix:
		delete(x.prefixes, t.span.Start)
		x.countLength(len(t.span.Start), -1)
	case kindSpan:
		delete(x.bySpan, t.span)
		last := len(x.spans) - 1
		x.spans[t.at] = x.spans[last]
		x.spans[t.at].at = t.at
		x.spans[last] = nil
		x.spans = x.spans[:last]
	}
}

func (x *index) countLength(bytes, change int) {
	i, found := slices.BinarySearchFunc(x.lengths, bytes, func(l prefixLength, n int) int { return cmp.Compare(l.bytes, n) })
	if !found {
		x.lengths = slices.Insert(x.lengths, i, prefixLength{bytes: bytes})
	}
	if x.lengths[i].prefixes += change; x.lengths[i].prefixes == 0 {
		x.lengths = slices.Delete(x.lengths, i, i+1)
	}
}

// match returns the watchers that have a term which matches one of the events.
func (x *index) match(events []kv.Event) []*Watcher {
	if len(x.all.seats) == 0 {
		return nil
	}
	x.events = events
	for i := range events {
		key := events[i].Entry.Key
		if t := x.keys[key]; t != nil {
			x.touch(t, i, i+1)
		}
		for _, l := range x.lengths {
			if l.bytes > len(key) {
				break
			}
			if t := x.prefixes[key[:l.bytes]]; t != nil {
				x.touch(t, i, i+1)
			}
		}
	}
	for _, t := range x.spans {
		from := sort.Search(len(events), func(i int) bool { return events[i].Entry.Key >= t.span.Start })
		to := len(events)
		if t.span.End != "" {
			to = from + sort.Search(len(events)-from, func(i int) bool { return events[from+i].Entry.Key >= t.span.End })
		}
		if from < to {
			x.touch(t, from, to)
		}
	}
	for _, t := range x.touched {
		for _, s := range t.seats {
			if len(s.w.matched) == 0 {
				x.watchers = append(x.watchers, s.w)
			}
			s.w.matched = append(s.w.matched, t)
		}
	}
	return x.watchers
}

// touch notes that t matches the events from from up to to, which continue
// those that it matched before.
func (x *index) touch(t *term, from, to int) {
	if !t.touched {
		t.touched, t.from = true, from
		x.touched = append(x.touched, t)
	}
	t.to = to
}

// wanted returns the message that w gets; it may turn out to have no events.
func (x *index) wanted(w *Watcher, revision int64) Message {
	var m Message
	if len(w.matched) == 1 {
		t := w.matched[0]
		if t.message.Events == nil {
			t.message = newMessage(revision, x.part(t.from, t.to))
		}
		m = t.message
	} else {
		m = newMessage(revision, x.union(w.matched))
	}
	if !w.noPuts && !w.noDeletes {
		return m
	}
	unwanted := func(e kv.Event) bool { return e.Deleted && w.noDeletes || !e.Deleted && w.noPuts }
	if !slices.ContainsFunc(m.Events, unwanted) {
		return m
	}
	return newMessage(revision, slices.DeleteFunc(slices.Clone(m.Events), unwanted))
}

func newMessage(revision int64, events []kv.Event) Message {
	m := Message{Revision: revision, Events: events}
	for i := range events {
		m.size += eventSize(&events[i])
	}
	return m
}

// union merges the ranges of several terms, so that no event occurs twice.
func (x *index) union(terms []*term) []kv.Event {
	ranges := x.ranges[:0]
	for _, t := range terms {
		ranges = append(ranges, eventRange{t.from, t.to})
	}
	x.ranges = ranges
	slices.SortFunc(ranges, func(a, b eventRange) int { return cmp.Compare(a.from, b.from) })
	last := 0 // ranges[:last+1] are merged
	for _, r := range ranges[1:] {
		if r.from <= ranges[last].to {
			ranges[last].to = max(ranges[last].to, r.to)
			continue
		}
		last++
		ranges[last] = r
	}
	if last == 0 {
		return x.part(ranges[0].from, ranges[0].to)
	}
	var events []kv.Event
	for _, r := range ranges[:last+1] {
		events = append(events, x.events[r.from:r.to]...)
	}
	return events
}

// part returns events as a queue may keep them: shared with the revision where
// they are most of its bytes, else copied. A queue that kept a small part alone
// would hold on to the whole revision, without counting it.
func (x *index) part(from, to int) []kv.Event {
	if from == 0 && to == len(x.events) {
		return x.events
	}
	if len(x.sizes) == 0 {
		sum := int64(0)
		x.sizes = append(x.sizes, 0)
		for i := range x.events {
			sum += eventSize(&x.events[i])
			x.sizes = append(x.sizes, sum)
		}
	}
	if 2*(x.sizes[to]-x.sizes[from]) >= x.sizes[len(x.events)] {
		return x.events[from:to:to]
	}
	return slices.Clone(x.events[from:to])
}

// eventSize is what queues count: keys and values, of the entry and of what
// was there before.
func eventSize(e *kv.Event) int64 {
	return eventBytes + int64(len(e.Entry.Key)+len(e.Entry.Value)+len(e.Prev.Key)+len(e.Prev.Value))
}

// maxScratch bounds the room that is kept for the next revision, in elements.
const maxScratch = 1 << 16

// forget ends a publication.
func (x *index) forget() {
	for _, t := range x.touched {
		t.touched, t.message = false, Message{}
	}
	for _, w := range x.watchers {
		clear(w.matched)
		w.matched = w.matched[:0]
	}
	clear(x.touched)
	clear(x.watchers)
	x.touched, x.watchers = scratch(x.touched), scratch(x.watchers)
	x.sizes, x.ranges, x.events = scratch(x.sizes), scratch(x.ranges), nil
}

func scratch[T any](s []T) []T {
	if cap(s) > maxScratch {
		return nil
	}
	return s[:0]
}
