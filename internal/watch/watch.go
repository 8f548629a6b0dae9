// Package watch fans the changes of the store out to those who watch it.
//
// It is a package of its own because its rule needs neither raft nor a network:
// who asked for which keys gets every event of them once, in order, all events
// of one revision together, and nobody who is slow holds up anybody else.
//
// Its nouns: a [Hub] knows all watchers and which keys they want, a [Filter]
// says which these are, a [Message] is the wanted part of one revision, and a
// [Watcher] is a bounded queue of messages with a channel that wakes its reader:
//
//	var hub watch.Hub
//	w, err := hub.Add(watch.Filter{Prefixes: []string{"jobs/"}}, revision)
//	...
//	defer w.Close()
//	var batch [16]watch.Message
//	for {
//		n, st := w.Take(batch[:])
//		for _, m := range batch[:n] {
//			fmt.Println(m.Revision, len(m.Events))
//		}
//		switch {
//		case st.More:
//		case st.Cut, st.Closed:
//			return st.Delivered // where to go on
//		default:
//			<-w.Wake()
//		}
//	}
//
// Caveats: the package starts no goroutine; Publish does all the work, and has
// one caller. Events are shared by the publisher and all watchers: nobody may
// change them. The zero Filter wants nothing.
package watch

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"pontoon/kv"
)

// Why there is no new watcher.
var (
	ErrTooMany = errors.New("watch: the limit of watchers is reached")
	ErrClosed  = errors.New("watch: the hub is closed")
)

// What waits for one watcher, at most, unless SetQueue says otherwise.
const (
	DefaultMaxMessages = 1024
	DefaultMaxBytes    = 4 << 20
)

// eventBytes is what an event takes besides its keys and values: a revision of
// many small events must count as what it is.
const eventBytes = int64(unsafe.Sizeof(kv.Event{}))

// Filter says which events a watcher wants: those of any of its keys, prefixes
// or spans. An event that is wanted for several reasons is one event.
type Filter struct {
	Keys      []string
	Prefixes  []string // the empty one: all keys
	Spans     []kv.Span
	NoPuts    bool
	NoDeletes bool
}

// Wants says whether an event matches, in time that grows with the filter. It
// is for replaying history; a Hub has an index.
func (f *Filter) Wants(e *kv.Event) bool {
	if e.Deleted && f.NoDeletes || !e.Deleted && f.NoPuts {
		return false
	}
	key := e.Entry.Key
	return slices.Contains(f.Keys, key) ||
		slices.ContainsFunc(f.Prefixes, func(p string) bool { return strings.HasPrefix(key, p) }) ||
		slices.ContainsFunc(f.Spans, func(s kv.Span) bool { return s.Contains(key) })
}

// Message is what a watcher gets of one revision.
type Message struct {
	Revision int64
	Events   []kv.Event // at least one, ascending by key
	size     int64      // bytes, as queues count them
}

// Hub knows the watchers. The zero Hub is ready, without a limit of watchers.
// All methods may be called from any goroutine, but Publish, Skip and Lost only
// from one at a time.
type Hub struct {
	limits struct {
		watchers, messages int
		bytes              int64
	} // set before the first use; 0: none for watchers, the default for the others
	open atomic.Int64 // watchers that are not closed; written under mu
	// published is the newest revision that was handed out, or that nobody
	// was there to want; written under mu, never back. Who reads it before
	// looking at an empty queue knows that the queue had all of it.
	published atomic.Int64
	mu        struct {
		sync.Mutex
		closed bool
		index
	}
}

// SetLimit bounds the watchers. It is for the time before the first Add.
func (h *Hub) SetLimit(watchers int) { h.limits.watchers = watchers }

// SetQueue bounds what waits for one watcher: messages, and bytes of keys,
// values and previous values. A single message may be larger. It is for the
// time before the first Add.
func (h *Hub) SetQueue(messages int, bytes int64) {
	h.limits.messages, h.limits.bytes = messages, bytes
}

// Published is the newest revision that needs no Publish any more: it was
// published, or came before all watchers.
func (h *Hub) Published() int64 { return h.published.Load() }

// Len is the number of watchers, those that were cut and are not yet closed included.
func (h *Hub) Len() int { return int(h.open.Load()) }

// Add registers a watcher that receives what is published of the revisions
// after after. The publisher may lag behind it, which is as it should be: what it
// then publishes up to after is left out. One that is ahead has published
// something that the watcher misses, so the watcher is cut from the start.
//
// The error is ErrTooMany or ErrClosed.
func (h *Hub) Add(f Filter, after int64) (*Watcher, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.mu.closed:
		return nil, ErrClosed
	case h.limits.watchers > 0 && h.Len() >= h.limits.watchers:
		return nil, ErrTooMany
	}
	w := &Watcher{hub: h, after: after, noPuts: f.NoPuts, noDeletes: f.NoDeletes, wake: make(chan struct{}, 1)}
	w.mu.delivered = after
	h.open.Add(1)
	switch published := h.published.Load(); {
	case after < published:
		w.mu.cut = true
		w.signal()
		return w, nil
	case len(h.mu.all.seats) == 0:
		h.published.Store(after) // else the publisher would have to begin where the last watcher left
	}
	h.mu.add(w, &f)
	return w, nil
}

// Publish hands out the events of one revision, ascending by key, at most one a
// key; they belong to the hub from then on. Revisions ascend. It never blocks:
// its time grows with the watchers that want something of it, and a watcher
// whose queue is full is cut. Revisions up to Published are passed over.
func (h *Hub) Publish(revision int64, events []kv.Event) {
	h.mu.Lock()
	if revision <= h.published.Load() {
		h.mu.Unlock()
		return
	}
	var cut []*Watcher
	for _, w := range h.mu.match(events) {
		if revision <= w.after {
			continue
		}
		m := h.mu.wanted(w, revision)
		if len(m.Events) > 0 && !w.offer(m) {
			cut = append(cut, w)
		}
	}
	h.mu.forget()
	for _, w := range cut {
		h.mu.remove(w)
	}
	h.published.Store(revision)
	h.mu.Unlock()
	for _, w := range cut {
		w.tellOwner()
	}
}

// Skip tells that no revision up to revision needs a Publish, if nobody is there to
// want one: a watcher that comes with an older one is then cut. False: somebody is.
func (h *Hub) Skip(revision int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.mu.closed: // what its watchers still have to take is not to look complete
		return true
	case len(h.mu.all.seats) > 0:
		return false
	}
	h.published.Store(max(h.published.Load(), revision))
	return true
}

// Lost tells that revisions were not published: every watcher is cut after the
// newest one that was.
func (h *Hub) Lost() {
	for _, w := range h.takeAll(false) {
		w.cut(max(h.published.Load(), w.after))
	}
}

// Close ends all watchers, now and later.
func (h *Hub) Close() {
	for _, w := range h.takeAll(true) {
		w.close()
	}
}

// takeAll empties the index.
func (h *Hub) takeAll(closing bool) []*Watcher {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mu.closed = h.mu.closed || closing
	all := make([]*Watcher, 0, len(h.mu.all.seats))
	for _, s := range h.mu.all.seats {
		all = append(all, s.w)
		s.w.places = nil
	}
	h.mu.index = index{}
	return all
}
