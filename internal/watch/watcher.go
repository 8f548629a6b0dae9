package watch

import "sync"

// Watcher is one watch: a bounded queue. Take belongs to one goroutine, its
// reader; all else may be called from anywhere.
//
// A watcher ends in one of two ways, and keeps what is queued: it is cut, when
// its queue was full or revisions were lost, or the hub closes.
type Watcher struct {
	hub               *Hub
	after             int64 // revisions up to it are not its own
	noPuts, noDeletes bool
	wake              chan struct{} // capacity 1; full: the reader will look anyway

	// Under the hub's lock: where the index has it (empty: nowhere), and the
	// terms that match the revision which is being published.
	places  []place
	matched []*term

	mu struct {
		sync.Mutex
		queue     []Message // from head on
		head      int
		bytes     int64
		delivered int64 // all that is wanted up to this revision was taken; with cut and an empty queue, nothing after it will come
		resume    int64 // with cut: after this revision events are missing
		cut       bool
		closed    bool // the hub is
		gone      bool // the watcher is: its owner called Close
		onEnd     func()
	}
}

// Status tells a reader where it stands.
type Status struct {
	// Delivered: the reader has everything it wants up to this revision,
	// with what this Take returned. It never goes back.
	Delivered int64
	More      bool // the queue holds more
	// Cut: it was the last of the queue, and events after Delivered are missing.
	Cut bool
	// Closed: it was the last of the queue, and the hub is closed.
	Closed bool
}

// Wake returns a channel that receives a value when Take may have something
// new to tell. A value may be stale.
func (w *Watcher) Wake() <-chan struct{} { return w.wake }

// Take moves messages from the queue to dst, which holds at least one, and
// tells how many.
func (w *Watcher) Take(dst []Message) (int, Status) {
	published := w.hub.published.Load() // before the queue is looked at: see Hub.published
	w.mu.Lock()
	defer w.mu.Unlock()
	q := &w.mu
	n := copy(dst, q.queue[q.head:])
	for i := range dst[:n] {
		q.bytes -= dst[i].size
		q.delivered = dst[i].Revision
	}
	clear(q.queue[q.head : q.head+n])
	q.head += n
	if q.head < len(q.queue) {
		return n, Status{Delivered: q.delivered, More: true}
	}
	q.queue, q.head = trim(q.queue), 0
	if q.cut {
		q.delivered = max(q.delivered, q.resume)
	} else {
		q.delivered = max(q.delivered, published)
	}
	return n, Status{Delivered: q.delivered, Cut: q.cut, Closed: q.closed && !q.cut}
}

// trim keeps the room of an empty queue only while it is small: most watchers
// wait for a long time.
func trim(queue []Message) []Message {
	if cap(queue) > 4 {
		return nil
	}
	return queue[:0]
}

// IsCut says that the watcher is cut, whatever its queue still holds.
func (w *Watcher) IsCut() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mu.cut
}

// OnEnd has f called once the watcher is cut or the hub closes, at once if
// that is so already. It is called by the publisher and must not block. It may
// still be called while the owner is in Close, and right after.
func (w *Watcher) OnEnd(f func()) {
	w.mu.Lock()
	w.mu.onEnd = f
	w.mu.Unlock()
	w.tellOwner()
}

// Close gives the watcher up. It may be called more than once.
func (w *Watcher) Close() {
	w.mu.Lock()
	gone := w.mu.gone
	w.mu.gone, w.mu.onEnd = true, nil
	w.mu.queue, w.mu.head, w.mu.bytes = nil, 0, 0
	w.mu.Unlock()
	if gone {
		return
	}
	h := w.hub
	h.mu.Lock()
	h.mu.remove(w)
	h.open.Add(-1)
	h.mu.Unlock()
}

// offer queues a message and reports false if that cuts the watcher. The owner
// is to be told once the hub's lock is free.
func (w *Watcher) offer(m Message) bool {
	messages, bytes := w.hub.limits.messages, w.hub.limits.bytes
	if messages == 0 {
		messages = DefaultMaxMessages
	}
	if bytes == 0 {
		bytes = DefaultMaxBytes
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	q := &w.mu
	waiting := len(q.queue) - q.head
	switch {
	case q.gone:
		return true
	case waiting >= messages, waiting > 0 && q.bytes+m.size > bytes:
		q.cut, q.resume = true, m.Revision-1
		w.signal()
		return false
	}
	if q.head > 0 && len(q.queue) == cap(q.queue) { // instead of growing
		n := copy(q.queue, q.queue[q.head:])
		clear(q.queue[n:])
		q.queue, q.head = q.queue[:n], 0
	}
	q.queue = append(q.queue, m)
	q.bytes += m.size
	w.signal()
	return true
}

// cut ends the watcher; events after resume are missing.
func (w *Watcher) cut(resume int64) {
	w.mu.Lock()
	w.mu.cut, w.mu.resume = true, resume
	w.signal()
	w.mu.Unlock()
	w.tellOwner()
}

// close ends the watcher because the hub closes.
func (w *Watcher) close() {
	w.mu.Lock()
	w.mu.closed = true
	w.signal()
	w.mu.Unlock()
	w.tellOwner()
}

func (w *Watcher) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// tellOwner calls the owner's function, if the watcher has ended, once.
func (w *Watcher) tellOwner() {
	w.mu.Lock()
	var f func()
	if w.mu.cut || w.mu.closed {
		f, w.mu.onEnd = w.mu.onEnd, nil
	}
	w.mu.Unlock()
	if f != nil {
		f()
	}
}
