package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"pontoon/internal/watch"
	"pontoon/kv"
)

// Watches: GET /v1/watch, and GET of a key with Prefer: wait=, which waits for
// one change.
//
// What a client sees is the history from a revision on, without gap or
// repetition, whether the server takes it from the state's history or from a
// watcher's queue:
//
//	sync ─► no from=         subscribe                                 ─► live
//	     ─► initial=true     subscribe ─► what there was at that moment ─► live
//	     ─► from= (far back) history, piece by piece ─┐
//	     ─► from= (near)     subscribe ◄──────────────┘ ─► the rest of it ─► live
//
// A watcher gets what comes after the moment it subscribed, and subscribe
// tells the revision of that moment. A long replay goes on without a watcher,
// whose queue would overflow meanwhile, until it is so near that a queue can hold
// what comes during the rest.
//
// The handler's goroutine does all of it. It holds no slot (acquire) while it
// streams; what bounds it is the limit of watchers, the queue of its watcher, and
// the progress that its client makes (clientConn, streamWriter). A long replay is no
// watcher yet: it holds the history of one piece, and connections bound how many go on.

const (
	nearEvents = 1_000   // of history: a replay of fewer begins with subscribing
	nearBytes  = 1 << 20 // the same, keys and values

	replayPiece    = 256 << 10 // written of one History, before a newer one is taken
	initialEntries = 1_000     // of one message of initial=true
	initialBytes   = 1 << 20   // the same, keys and values

	// cutGrace is what a client gets to take what is queued for it, once its
	// watcher was cut or the member stops: time for a slow line, not for a client
	// that is stuck, which holds memory as long as it is there.
	cutGrace = 5 * time.Second
)

// watchStream is one GET /v1/watch.
type watchStream struct {
	changeStream
	filter watch.Filter
	from   int64          // the next revision to replay
	w      *watch.Watcher // nil while a long replay goes on
	begun  bool           // the header is out: errors are messages now
	cutter streamCutter
}

func (c *apiCall) serveWatch() error {
	if c.r.Method != http.MethodGet {
		return badMethod(c.route)
	}
	c.w.Header()["Vary"] = headerAccept
	if err := c.parseOptions(optRead | optWatchKey | optWatchPrefix | optStart | optEnd | optFrom | optLastEventID |
		optInitial | optPrev | optEvents | optProgress); err != nil {
		return err
	}
	if err := c.checkWatch(); err != nil {
		return err
	}
	err := c.waiting(func(ctx context.Context) error { return c.api.b.sync(ctx, c.read) })
	if err != nil {
		return err
	}
	s := watchStream{filter: c.watchFilter(), from: c.opt.from}
	s.c, s.sse, s.prev = c, acceptsSSE(c.r), c.opt.prev
	s.flusher = http.NewResponseController(c.w)
	s.cutter.conn = s.flusher
	defer s.close()
	switch {
	case c.opt.initial:
		err = s.startInitial()
	case s.from == 0:
		var h kv.History
		if h, err = s.subscribe(); err == nil {
			s.sendHeader(h.Revision())
		}
	default:
		err = s.startReplay()
	}
	if err != nil {
		return err
	}
	if s.w != nil {
		s.live()
	}
	return nil
}

// checkWatch refuses options that cannot be meant together. A browser that
// reconnects repeats the query and adds Last-Event-ID, which wins.
func (c *apiCall) checkWatch() error {
	o := &c.opt
	switch {
	case o.has(optWatchKey|optWatchPrefix) && o.has(optStart|optEnd):
		return badRequest("query options start and end contradict key and prefix; watch twice for both")
	case o.has(optLastEventID):
		o.initial = false
	case o.initial && o.has(optFrom):
		return badRequest("query options from and initial contradict each other; give one")
	}
	return nil
}

func (c *apiCall) watchFilter() watch.Filter {
	o := &c.opt
	f := watch.Filter{Keys: o.watchKeys, Prefixes: o.watchPrefixes, NoPuts: o.noPuts, NoDeletes: o.noDeletes}
	switch {
	case o.has(optStart | optEnd):
		f.Spans = []kv.Span{o.span}
	case !o.has(optWatchKey | optWatchPrefix):
		f.Prefixes = []string{""}
	}
	return f
}

// subscribeError gives the refusals of a hub their rows in the error table.
func subscribeError(err error) error {
	switch {
	case errors.Is(err, watch.ErrTooMany):
		return errTooManyWatches
	case errors.Is(err, watch.ErrClosed):
		return errStopping
	}
	return err
}

// subscribe begins the watch at the present revision, that of the history.
func (s *watchStream) subscribe() (kv.History, error) {
	w, h, _, err := s.c.api.b.subscribe(s.filter, false)
	if err != nil {
		return h, subscribeError(err)
	}
	s.watch(w)
	return h, nil
}

// watch takes w over.
func (s *watchStream) watch(w *watch.Watcher) {
	s.w = w
	s.c.api.m.watchers.Add(1)
	w.OnEnd(s.cutter.start)
}

// close gives everything back; the answer may not be touched after it.
func (s *watchStream) close() {
	if s.w != nil {
		s.w.Close()
		s.c.api.m.watchers.Add(-1)
	}
	s.flush()
	s.cutter.stop()
}

// sendHeader begins the answer at once. What comes after revision is live.
func (s *watchStream) sendHeader(revision int64) {
	h := s.c.w.Header()
	h["Content-Type"] = headerNDJSON
	if s.sse {
		h["Content-Type"] = headerSSE
	}
	h["Cache-Control"] = headerNoStore
	h["X-Accel-Buffering"] = headerNoBuffer // a proxy that gathers the stream would hold it back
	h["Kv-Revision"] = []string{strconv.FormatInt(revision, 10)}
	s.c.safetyHeaders()
	s.c.writeHeader(http.StatusOK)
	s.c.answered = time.Since(s.c.start)
	s.begun, s.unsent = true, true
	s.flush()
}

// startInitial sends what there is, and leaves the rest to live.
func (s *watchStream) startInitial() error {
	w, _, view, err := s.c.api.b.subscribe(s.filter, true)
	if err != nil {
		return subscribeError(err)
	}
	s.watch(w)
	list := initialList{view: view}
	if !s.filter.NoPuts {
		list.spans = filterSpans(&s.filter)
	}
	entries, more := list.next(nil)
	if more { // the view, a clone of the state, is held on to
		if n := s.c.api.exports.Add(1); n > int64(s.c.api.l.MaxExports) {
			s.c.api.exports.Add(-1)
			return &httpRefusal{err: errOverloaded, hint: "send it again after a pause, or to another member",
				detail: strconv.Itoa(s.c.api.l.MaxExports) + " exports and long lists of initial=true are under way on this member, the limit"}
		}
		defer s.c.api.exports.Add(-1)
	}
	revision := view.Revision()
	s.sendHeader(revision)
	for {
		s.initial(entries, revision, more)
		if !more || s.err != nil {
			return nil
		}
		entries, more = list.next(entries[:0])
	}
}

// initial sends one part of the list. Only the last has an id: whoever was cut
// before it has to begin anew.
func (s *watchStream) initial(entries []kv.Entry, revision int64, more bool) {
	id, flags := revision, `,"initial":true`
	if more {
		id, flags = withoutID, `,"initial":true,"more":true`
	}
	s.begin(sseChange, id, revision)
	for i := range entries {
		if s.err != nil {
			break
		}
		s.event(&kv.Event{Revision: entries[i].ModRevision, Entry: entries[i]})
	}
	s.end(flags)
}

// initialList walks the entries of a view that a watch wants.
type initialList struct {
	view  *kv.View
	spans []kv.Span // what is left, ascending, apart from each other
}

// next appends the next entries to dst, as many as one message holds, and says
// whether there are more.
func (l *initialList) next(dst []kv.Entry) (entries []kv.Entry, more bool) {
	bytes := 0
	for len(l.spans) > 0 && !more {
		l.view.Ascend(l.spans[0], func(e kv.Entry) bool {
			bytes += len(e.Key) + len(e.Value)
			if len(dst) > 0 && (len(dst) == initialEntries || bytes > initialBytes) {
				l.spans[0].Start, more = e.Key, true
				return false
			}
			dst = append(dst, e)
			return true
		})
		if !more {
			l.spans = l.spans[1:]
		}
	}
	return dst, more
}

// filterSpans returns the keys of a filter as spans that ascend and do not overlap.
func filterSpans(f *watch.Filter) []kv.Span {
	var spans []kv.Span
	for _, key := range f.Keys {
		spans = append(spans, kv.SingleKey(key))
	}
	for _, p := range f.Prefixes {
		spans = append(spans, kv.Prefix(p))
	}
	for _, span := range f.Spans {
		if !span.Empty() {
			spans = append(spans, span)
		}
	}
	slices.SortFunc(spans, func(a, b kv.Span) int { return cmp.Compare(a.Start, b.Start) })
	merged := spans[:0]
	for _, span := range spans {
		last := len(merged) - 1
		if last < 0 || merged[last].End != "" && merged[last].End < span.Start {
			merged = append(merged, span)
		} else if merged[last].End != "" && (span.End == "" || span.End > merged[last].End) {
			merged[last].End = span.End
		}
	}
	return merged
}

// startReplay sends history from s.from on until it has caught up, and leaves
// the rest to live. An error is one from before the header.
//
// It takes the history anew for each piece: an old one would keep alive what the
// state has dropped since, for as long as the client is slow.
func (s *watchStream) startReplay() error {
	for s.err == nil && s.w == nil {
		h, err := s.history()
		if err == nil {
			err = s.checkFrom(h)
		}
		if err == nil && s.near(h) {
			if h, err = s.subscribe(); err == nil {
				err = s.checkFrom(h)
			}
		}
		if err != nil {
			return s.endReplay(err)
		}
		if !s.begun {
			s.sendHeader(h.Revision())
		}
		limit := s.written + replayPiece
		if s.w != nil {
			limit = math.MaxInt64
		}
		s.replay(h, limit)
	}
	return nil
}

// history is as fresh as sync saw to. The call's deadline bounds it until it begins.
func (s *watchStream) history() (kv.History, error) {
	ctx := s.c.r.Context()
	if !s.begun {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, s.c.deadline)
		defer cancel()
	}
	return s.c.api.b.history(ctx, readOptions{stale: true})
}

func (s *watchStream) checkFrom(h kv.History) error {
	switch {
	case s.from > h.Revision()+1:
		return fmt.Errorf("%w: the watch is to go on with revision %d, the store is at %d", errFutureRevision, s.from, h.Revision())
	case s.from <= h.Compacted():
		return &compactedError{h.Compacted()}
	}
	return nil
}

// near says that little is left to replay.
func (s *watchStream) near(h kv.History) bool {
	events, bytes := 0, 0
	h.Events(s.from, func(e kv.Event) bool {
		events++
		bytes += len(e.Entry.Key) + len(e.Entry.Value) + len(e.Prev.Value)
		return events < nearEvents && bytes < nearBytes
	})
	return events < nearEvents && bytes < nearBytes
}

// replay sends whole revisions of h from s.from on, until limit bytes are
// written in all, and moves s.from to what comes next.
func (s *watchStream) replay(h kv.History, limit int64) {
	open := false
	end := func() {
		if open {
			s.end("")
			open = false
		}
	}
	full := false
	h.Events(s.from, func(e kv.Event) bool {
		if e.Revision != s.from {
			end()
			s.from = e.Revision
			if full = s.written >= limit || s.err != nil; full {
				return false
			}
		}
		if s.filter.Wants(&e) {
			if !open {
				s.begin(sseChange, e.Revision, e.Revision)
				open = true
			}
			s.event(&e)
		}
		return true
	})
	end()
	if !full {
		s.from = h.Revision() + 1
	}
}

// endReplay tells the client why its replay goes no further. Before the header
// that is an answer, after it a message. A stream that merely ends is resumed.
func (s *watchStream) endReplay(err error) error {
	if !s.begun {
		return err
	}
	var gone *compactedError
	switch {
	case errors.As(err, &gone):
		// Without an id: there is nothing to go on from.
		s.note(sseCompacted, withoutID, s.from-1, `,"compacted":true,"compact_revision":`+strconv.FormatInt(gone.compact, 10))
	case errors.Is(err, errTooManyWatches):
		s.note(sseOverflow, s.from-1, s.from-1, `,"overflow":true`)
	}
	s.flush()
	s.err = err
	return nil
}

// live sends what is published, until the client leaves, the watcher is cut or
// the member stops. What waits together is written together.
func (s *watchStream) live() {
	var timer *time.Timer
	var due <-chan time.Time // nil, which is never due, without progress=
	if s.c.opt.progress > 0 {
		timer = time.NewTimer(s.c.opt.progress)
		defer timer.Stop()
		due = timer.C
	}
	idle := false // since the timer was set
	for s.err == nil {
		n, st := s.takeBatch()
		switch {
		case st.More:
			continue
		case st.Cut:
			s.note(sseOverflow, st.Delivered, st.Delivered, `,"overflow":true`)
			s.c.api.m.watchesCut.Inc()
		case n == 0 && idle && !st.Closed:
			s.note(sseProgress, st.Delivered, st.Delivered, `,"progress":true`)
		}
		s.flush()
		if s.err != nil || st.Cut || st.Closed {
			return
		}
		if timer != nil && (n > 0 || idle) {
			timer.Reset(s.c.opt.progress)
		}
		idle = false
		select {
		case <-s.w.Wake():
		case <-due:
			idle = true
		case <-s.c.r.Context().Done():
			return
		}
	}
}

// takeBatch encodes some of what is queued. It is a function of its own so that
// a watcher that waits does not keep the batch on its stack.
//
//go:noinline
func (s *watchStream) takeBatch() (int, watch.Status) {
	var batch [watchBatch]watch.Message
	n, st := s.w.Take(batch[:])
	for i := range batch[:n] {
		m := &batch[i]
		s.begin(sseChange, m.Revision, m.Revision)
		for j := range m.Events {
			if s.err != nil {
				break
			}
			s.event(&m.Events[j])
		}
		s.end("")
	}
	return n, st
}

// streamCutter ends a stream whose client does not take what is left for it.
// Whoever publishes starts it and cannot wait, and the handler may be stuck in a
// write; so a timer does it.
type streamCutter struct {
	conn *http.ResponseController
	mu   struct {
		sync.Mutex
		timer *time.Timer
		done  bool // the handler is about to return: conn is not its own any more
	}
}

func (k *streamCutter) start() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.mu.done && k.mu.timer == nil {
		// goroutine: watch-cutter, once a stream at most
		k.mu.timer = time.AfterFunc(cutGrace, k.cut)
	}
}

func (k *streamCutter) cut() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.mu.done {
		// A deadline in the past ends the write that is stuck. A writer
		// without deadlines is that of a test.
		_ = k.conn.SetWriteDeadline(time.Unix(1, 0))
	}
}

func (k *streamCutter) stop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mu.done = true
	if k.mu.timer != nil {
		k.mu.timer.Stop()
	}
}

// awaitChange is the long poll: it returns key as it is, once it no longer
// matches c.opt.noneMatch or the wait (c.opt.wait) is over. An absent key is
// errKeyNotFound, and matches as revision 0.
//
// The first look at the key is as fresh as the options ask for. It comes after
// subscribing, so that no change falls between.
func (c *apiCall) awaitChange(ctx context.Context, key string) (kv.Entry, int64, error) {
	if !c.opt.has(optTimeout) {
		c.deadline = c.start.Add(c.opt.wait + c.api.l.DefaultTimeout)
	}
	over := c.start.Add(c.opt.wait)
	if c.deadline.Before(over) {
		over = c.deadline
	}
	w, _, _, err := c.api.b.subscribe(watch.Filter{Keys: []string{key}}, false)
	if err != nil {
		return kv.Entry{}, 0, subscribeError(err)
	}
	defer w.Close()
	c.api.m.watchers.Add(1)
	defer c.api.m.watchers.Add(-1)
	e, revision, err := c.firstLook(ctx, key)
	look, cancel := context.WithDeadline(ctx, c.deadline)
	defer cancel()
	timer := time.NewTimer(time.Until(over))
	defer timer.Stop()
	for waits := true; waits && (err == nil || errors.Is(err, errKeyNotFound)) && matchesTag(&c.opt.noneMatch, e.ModRevision); {
		select {
		case <-w.Wake():
			var batch [1]watch.Message
			_, st := w.Take(batch[:])
			waits = !st.Cut && !st.Closed // the client asks again, here or elsewhere
		case <-timer.C:
			waits = false
		case <-ctx.Done():
			return e, revision, ctx.Err()
		}
		// The local state as it is: nothing to wait for, unless it is in doubt.
		e, revision, err = c.api.b.get(look, key, readOptions{stale: true})
	}
	return e, revision, err
}

// firstLook holds a slot, as every read that waits on the store.
func (c *apiCall) firstLook(ctx context.Context, key string) (e kv.Entry, revision int64, err error) {
	if err := c.acquire(); err != nil {
		return e, 0, err
	}
	defer c.release()
	ctx, cancel := context.WithDeadline(ctx, c.deadline)
	defer cancel()
	return c.api.b.get(ctx, key, c.read)
}
