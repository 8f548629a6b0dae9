package main

import (
	"net/http"
	"strconv"
	"strings"

	"pontoon/api"
	"pontoon/kv"
)

// Changes as a client reads them: events of an event stream (SSE, the HTML
// standard, section 9.2) or lines (NDJSON). Either holds one api.Change; a line
// feed inside one would end it early, and JSON has none.

const (
	streamPiece = 32 << 10 // what is gathered before it is written
	watchBatch  = 16       // messages taken from a queue at once
	withoutID   = -1

	mediaSSE     = "text/event-stream"
	sseChange    = "change"
	sseProgress  = "progress"
	sseCompacted = "compacted"
	sseOverflow  = "overflow"
)

var (
	headerSSE      = []string{mediaSSE}
	headerNoStore  = []string{"no-store"}
	headerNoBuffer = []string{"no"}
)

// acceptsSSE says that the client names event streams; `*/*` does not.
func acceptsSSE(r *http.Request) bool {
	for _, line := range r.Header["Accept"] {
		for item := range strings.SplitSeq(line, ",") {
			media, params, _ := strings.Cut(item, ";")
			if strings.EqualFold(strings.TrimSpace(media), mediaSSE) && !qualityIsZero(params) {
				return true
			}
		}
	}
	return false
}

// changeStream encodes changes and writes them in pieces. A change may be larger
// than any buffer (a range delete of a million keys), so that it is encoded event by
// event, a large value part by part, and never held whole.
//
// It belongs to one handler. While nothing is on its way it holds no buffer.
type changeStream struct {
	c         *apiCall
	flusher   *http.ResponseController
	sse, prev bool

	buf     *[]byte // from the pool of bodies; nil: none
	unsent  bool    // something was written and not flushed
	written int64   // bytes
	events  int64   // since the last flush
	first   bool    // the open change has no event yet
	err     error   // the first; nothing is written after it
}

// begin opens a change; events and end follow. The id is what a client sends
// back as Last-Event-ID, withoutID if it must not go on from here.
func (s *changeStream) begin(event string, id, revision int64) {
	if s.buf == nil {
		s.buf = s.c.api.buffers.Get().(*[]byte)
		*s.buf = (*s.buf)[:0]
	}
	b := *s.buf
	if s.sse {
		if id != withoutID {
			b = append(strconv.AppendInt(append(b, "id: "...), id, 10), '\n')
		}
		b = append(append(append(b, "event: "...), event...), "\ndata: "...)
	}
	*s.buf = strconv.AppendInt(append(b, `{"revision":`...), revision, 10)
	s.first = true
}

// event adds one event to the open change.
func (s *changeStream) event(e *kv.Event) {
	shown := api.Event{Type: api.EventPut}
	if e.Deleted {
		shown.Type = api.EventDelete
		shown.Entry = api.Entry{Key: e.Entry.Key, ModRevision: e.Revision}
	} else {
		shown.Entry = apiEntry(&e.Entry)
	}
	var prev api.Entry
	if s.prev && e.Prev.ModRevision != 0 {
		prev = apiEntry(&e.Prev)
		shown.Prev = &prev
	}
	b := *s.buf
	if s.first {
		b = append(b, `,"events":[`...)
	} else {
		b = append(b, ',')
	}
	s.first = false
	if len(shown.Entry.Value)+len(prev.Value) <= wholeValue {
		*s.buf = shown.AppendJSON(b)
	} else {
		*s.buf = shown.StreamJSON(b, s.spill)
	}
	s.events++
	if len(*s.buf) >= streamPiece {
		s.write()
	}
}

// spill writes what there is of a large event.
func (s *changeStream) spill(b []byte) []byte {
	if *s.buf = b; len(b) >= streamPiece {
		s.write()
	}
	return *s.buf
}

// end closes the change with its flags, which are JSON members with a leading comma.
func (s *changeStream) end(flags string) {
	b := *s.buf
	if !s.first {
		b = append(b, ']')
	}
	b = append(append(b, flags...), "}\n"...)
	if s.sse {
		b = append(b, '\n') // the empty line ends an event
	}
	*s.buf = b
	if len(b) >= streamPiece {
		s.write()
	}
}

// note sends a change without events.
func (s *changeStream) note(event string, id, revision int64, flags string) {
	s.begin(event, id, revision)
	s.end(flags)
}

// write gives the buffer to net/http, which sends it once there is a packet of it.
func (s *changeStream) write() {
	if s.err == nil {
		var n int
		n, s.err = s.c.w.Write(*s.buf)
		s.written += int64(n)
		s.unsent = true
	}
	*s.buf = (*s.buf)[:0]
}

// flush sends what is left and gives the buffer back.
func (s *changeStream) flush() {
	if s.buf != nil {
		if len(*s.buf) > 0 {
			s.write()
		}
		s.c.api.putBuffer(s.buf)
		s.buf = nil
	}
	if s.events > 0 {
		s.c.api.m.watchEvents.Add(float64(s.events))
		s.events = 0
	}
	if s.unsent && s.err == nil {
		s.err = s.flusher.Flush()
	}
	s.unsent = false
}
