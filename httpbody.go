package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"pontoon/kv"
)

// Bodies in and out, and the deadlines that keep them moving.

func (a *httpAPI) putBuffer(buf *[]byte) {
	if cap(*buf) <= maxPooledBuffer {
		a.buffers.Put(buf)
	}
}

func bodyTooLarge(limit int64) error {
	return &httpRefusal{err: errTooLarge, detail: "the body is larger than " + strconv.FormatInt(limit, 10) + " bytes, the limit"}
}

// bodyRoom is what bodies may take together, on their way in and while their calls
// wait for raft. A call waits for its client without a slot (acquire): else as many
// slow clients as there are slots would keep all others out. What bounds slow
// bodies instead is this. The first minBodyBuffer of each has always room, so that
// clients with small values are served whatever others do; of those, HTTP/1
// has one for each connection, and streams of HTTP/2 are counted.
type bodyRoom struct {
	bytes   atomic.Int64 // buffers beyond minBodyBuffer
	streams atomic.Int64 // of HTTP/2, whose body is being read
}

// take makes room for a buffer that grows by n bytes; the call gives it back at its end.
func (c *apiCall) takeRoom(n int) error {
	if n <= 0 {
		return nil
	}
	if room := &c.api.bodies; room.bytes.Add(int64(n)) > c.api.l.MaxBodyBytes {
		room.bytes.Add(-int64(n))
		return &httpRefusal{err: errOverloaded, detail: "the bodies under way on this member take " + strconv.FormatInt(c.api.l.MaxBodyBytes, 10) + " bytes, the limit"}
	}
	c.room += int64(n)
	return nil
}

// changeRoom is takeRoom for a buffer that may also shrink.
func (c *apiCall) changeRoom(n int) error {
	if n < 0 {
		c.api.bodies.bytes.Add(int64(n))
		c.room += int64(n)
	}
	return c.takeRoom(n)
}

// smallAnswer is an answer that always has room: a client's own socket holds as much.
const smallAnswer = 64 << 10

// answerRoom is what large answers may hold together until their clients have read
// them: values, which a later write would free, and entries of pages. What is encoded
// of them comes on top, a piece each.
type answerRoom struct {
	mu struct {
		sync.Mutex
		bytes int64
		freed chan struct{} // closed when some are given back; nil: nobody waits
	}
}

// take reports whether there is room for n bytes more; if not, freed tells when to try
// again.
func (r *answerRoom) take(n, most int64) (ok bool, freed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.bytes == 0 || r.mu.bytes+n <= most {
		r.mu.bytes += n
		return true, nil
	}
	if r.mu.freed == nil {
		r.mu.freed = make(chan struct{})
	}
	return false, r.mu.freed
}

func (r *answerRoom) give(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.bytes -= n
	if r.mu.freed != nil {
		close(r.mu.freed)
		r.mu.freed = nil
	}
}

// holdAnswer makes room for an answer that holds n bytes; the call gives it back at
// its end. Whoever waits for it waits until the call's deadline, and holds little: one
// value, and no slot.
func (c *apiCall) holdAnswer(n int64, waits bool) error {
	if n <= smallAnswer {
		return nil
	}
	ctx, cancel := c.bounded()
	defer cancel()
	for {
		ok, freed := c.api.answers.take(n, c.api.l.MaxAnswerBytes)
		if ok {
			c.held += n
			return nil
		}
		if waits {
			select {
			case <-freed:
				continue
			case <-ctx.Done():
			}
		}
		return c.noAnswerRoom()
	}
}

func (c *apiCall) noAnswerRoom() error {
	return &httpRefusal{err: errOverloaded, detail: "the answers under way on this member hold " + strconv.FormatInt(c.api.l.MaxAnswerBytes, 10) + " bytes, the limit"}
}

// holdResult is holdAnswer for the result of a command, which nothing can refuse any
// more. Before it was proposed, hasAnswerRoom said that there is some.
func (c *apiCall) holdResult(n int64) {
	if n > smallAnswer {
		c.api.answers.take(n, math.MaxInt64)
		c.held += n
	}
}

func (c *apiCall) hasAnswerRoom() bool {
	r := &c.api.answers
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.bytes < c.api.l.MaxAnswerBytes
}

// listedBytes is what an entry of a page takes besides its key and value.
const listedBytes = 128

func pageBytes(p *kv.Page) int64 {
	n := entriesBytes(p.Items)
	for _, s := range p.Prefixes {
		n += int64(len(s)) + listedBytes/8
	}
	return n
}

func entriesBytes(items []kv.Entry) (n int64) {
	for i := range items {
		n += int64(len(items[i].Key)+len(items[i].Value)) + listedBytes
	}
	return n
}

// readBody appends the body to buf, which is empty. It never holds more than limit+1
// bytes, and grows with what has arrived, not with what was announced. It ends at the
// call's deadline, or earlier when nothing arrives for bodyProgress.
func (c *apiCall) readBody(buf []byte, limit int64) ([]byte, error) {
	announced := c.r.ContentLength // -1: unknown
	if announced > limit {
		return buf, bodyTooLarge(limit)
	}
	if announced == 0 {
		return buf, nil
	}
	if c.r.ProtoMajor > 1 {
		defer c.api.bodies.streams.Add(-1)
		if n := c.api.bodies.streams.Add(1); n > int64(c.api.l.MaxInFlight) {
			return buf, errOverloaded
		}
	}
	if c.takeRoom(cap(buf)-minBodyBuffer) != nil {
		buf = nil // a smaller one will do
	}
	for {
		if len(buf) == cap(buf) {
			grown := growBody(buf, announced, limit)
			if err := c.takeRoom(cap(grown) - max(cap(buf), minBodyBuffer)); err != nil {
				return buf, err
			}
			buf = grown
		}
		c.armRead()
		n, err := c.r.Body.Read(buf[len(buf):min(int64(cap(buf)), limit+1)])
		buf = buf[:len(buf)+n]
		switch {
		case int64(len(buf)) > limit:
			return buf, bodyTooLarge(limit)
		case err == io.EOF:
			c.bodyPending = false
			// net/http lifts the read deadline where a body ends, so that it
			// does not cut the wait for raft; a test holds it to that.
			return buf, nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			c.bodyPending = false // nobody waits for the rest
			return buf, badRequest("the body did not arrive in time; " + strconv.Itoa(len(buf)) + " bytes came")
		case err != nil:
			return buf, badRequest("the body is broken: " + err.Error())
		}
	}
}

func growBody(buf []byte, announced, limit int64) []byte {
	size := min(max(4*int64(cap(buf)), minBodyBuffer), limit+1)
	if announced >= int64(len(buf)) {
		size = min(size, announced+1)
	}
	grown := make([]byte, len(buf), size)
	copy(grown, buf)
	return grown
}

// armRead keeps a read deadline that moves with the body's progress and never
// passes the call's. A call with a short time-out arms it only once.
func (c *apiCall) armRead() {
	if c.readUntil.Equal(c.deadline) {
		return
	}
	until := time.Now().Add(bodyProgress)
	if until.After(c.deadline) {
		until = c.deadline
	}
	c.setReadDeadline(until)
}

func (c *apiCall) setReadDeadline(t time.Time) {
	c.readUntil = t
	// Writers without deadlines are those of tests, whose bodies are in memory.
	_ = http.NewResponseController(c.w).SetReadDeadline(t)
}

// smallBody reads the body of a cluster call. Its limit is small, so that it
// needs no slot.
func (c *apiCall) smallBody(limit int64) ([]byte, error) { return c.readBody(nil, limit) }

// readObject reads a JSON object into fields, which point to uint64, bool or
// string. encoding/json alone would let pass unknown fields, the same field
// twice, and any capitals; each of them hides a mistake.
func (c *apiCall) readObject(fields map[string]any, required string) error {
	body, err := c.smallBody(maxJSONBytes)
	if err != nil {
		return err
	}
	bad := func(what string) error { return badRequest("the body " + what) }
	dec := json.NewDecoder(bytes.NewReader(body))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') || !utf8.Valid(body) {
		return bad("is no JSON object")
	}
	seen := map[string]bool{}
	for dec.More() {
		t, err := dec.Token()
		name, _ := t.(string)
		if err != nil {
			return bad("is no valid JSON: " + err.Error())
		}
		field, known := fields[name]
		if !known {
			return bad("has an unknown field " + quoteShort(name))
		}
		if seen[name] {
			return bad("has the field " + name + " twice")
		}
		seen[name] = true
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return bad("is no valid JSON: " + err.Error())
		}
		id, isID := field.(*uint64)
		if json.Unmarshal(raw, field) != nil || string(raw) == "null" || isID && *id == 0 {
			return bad("has a field " + name + " of the wrong kind: " + quoteShort(string(raw)))
		}
	}
	if _, err := dec.Token(); err != nil {
		return bad("is no valid JSON: " + err.Error())
	}
	if _, err := dec.Token(); err != io.EOF {
		return bad("goes on after the JSON object")
	}
	if !seen[required] {
		return bad("lacks the field " + required)
	}
	return nil
}

// writeHeader sends the status, and bounds the wait for what is left of an
// unread body: net/http reads some of it before it answers.
func (c *apiCall) writeHeader(status int) {
	if c.bodyPending {
		c.setReadDeadline(time.Now().Add(drainTime))
		if status == http.StatusRequestEntityTooLarge && c.r.ProtoMajor == 1 && c.r.Header["Expect"] == nil {
			// A client that is still sending when the connection closes sees
			// a reset instead of the answer. One that sent Expect waits.
			_, _ = io.CopyN(io.Discard, c.r.Body, maxDrainBytes)
		}
	}
	c.status = status
	c.w.WriteHeader(status)
}

// safetyHeaders keep a browser from running what a client has stored.
func (c *apiCall) safetyHeaders() {
	h := c.w.Header()
	h["X-Content-Type-Options"] = headerNosniff
	h["Content-Security-Policy"] = headerSandbox
}

func (c *apiCall) writeJSON(status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	c.w.Header()["Content-Type"] = headerJSON
	c.safetyHeaders()
	c.writeHeader(status)
	_, _ = c.w.Write(append(body, '\n')) // an error here means that the client left
	return nil
}

// setRevisions sets ETag and Kv-Revision with one string and one slice for both.
func setRevisions(h http.Header, mod, store int64) {
	var digits [48]byte
	b := append(digits[:0], '"')
	b = strconv.AppendInt(b, mod, 10)
	b = append(b, '"')
	n := len(b)
	b = strconv.AppendInt(b, store, 10)
	text := string(b)
	values := []string{text[:n], text[n:]}
	h["Etag"] = values[0:1:1]
	h["Kv-Revision"] = values[1:2:2]
}

// writeEntry answers with the value; net/http leaves it out for HEAD.
func (c *apiCall) writeEntry(e *kv.Entry, revision int64) {
	var digits [128]byte
	b := append(digits[:0], '"')
	b = strconv.AppendInt(b, e.ModRevision, 10)
	b = append(b, '"')
	etag := len(b)
	b = strconv.AppendInt(b, revision, 10)
	store := len(b)
	b = strconv.AppendInt(b, e.CreateRevision, 10)
	create := len(b)
	b = strconv.AppendInt(b, e.Version, 10)
	version := len(b)
	b = strconv.AppendInt(b, int64(len(e.Value)), 10)
	text := string(b)
	values := []string{text[:etag], text[etag:store], text[store:create], text[create:version], text[version:]}

	h := c.w.Header()
	h["Etag"] = values[0:1:1]
	h["Kv-Revision"] = values[1:2:2]
	h["Kv-Create-Revision"] = values[2:3:3]
	h["Kv-Version"] = values[3:4:4]
	h["Content-Length"] = values[4:5:5]
	setExpires(h, e.Expires)
	h["Content-Type"] = headerOctets
	c.safetyHeaders()
	c.writeHeader(http.StatusOK)
	_, _ = c.w.Write(e.Value) // an error here means that the client left
}

// streamWriter ends an HTTP/2 stream whose client does not read, as clientConn ends
// a connection: a stream has no bound of its own, since the connection below it may
// get on well with others. What net/http keeps of an answer until the handler has
// returned goes out under the deadline of its last Write.
//
// One goroutine writes. Whoever else sets a deadline (streamCutter) sets one that has
// passed, which no later one revives.
type streamWriter struct {
	http.ResponseWriter
	deadlines *http.ResponseController // of the stream
	until     time.Time                // the write deadline in force; zero: none
}

// Unwrap is for http.ResponseController.
func (s *streamWriter) Unwrap() http.ResponseWriter { return s.ResponseWriter }

func (s *streamWriter) Write(p []byte) (written int, err error) {
	for {
		s.arm()
		n, err := s.ResponseWriter.Write(p[:min(len(p), writePiece)])
		written += n
		if p = p[n:]; err != nil || len(p) == 0 {
			return written, err
		}
	}
}

// FlushError leaves no deadline behind, as net/http would end a stream that waits for
// something to send.
func (s *streamWriter) FlushError() error {
	s.arm()
	err := s.deadlines.Flush()
	s.setUntil(time.Time{})
	return err
}

// arm does what clientConn.Write does: it sets a deadline only where less than half
// of one is left.
func (s *streamWriter) arm() {
	if now := time.Now(); s.until.Sub(now) < writeProgress/2 {
		s.setUntil(now.Add(writeProgress))
	}
}

func (s *streamWriter) setUntil(t time.Time) {
	s.until = t
	_ = s.deadlines.SetWriteDeadline(t) // a writer without deadlines is that of a test
}

// bounded is the context of a call that waits on the store. A request that nobody
// can cancel, as on the short path, shares its context with those that began in
// the same moment: a timer for each costs as much as a read.
func (c *apiCall) bounded() (context.Context, context.CancelFunc) {
	if c.r.Context() == context.Background() && !c.opt.has(optTimeout) {
		return c.api.deadlines.at(c.deadline), func() {}
	}
	return context.WithDeadline(c.r.Context(), c.deadline)
}

// sharedDeadlines hands out contexts that end at a deadline or a little later.
type sharedDeadlines struct {
	last atomic.Pointer[sharedDeadline]
}

type sharedDeadline struct {
	context.Context
	cancel context.CancelFunc // never called: the deadline ends it
	until  time.Time
}

const deadlineSlack = 50 * time.Millisecond

func (s *sharedDeadlines) at(deadline time.Time) context.Context {
	d := s.last.Load()
	if d == nil || d.until.Before(deadline) || d.until.Sub(deadline) > deadlineSlack {
		d = &sharedDeadline{until: deadline.Add(deadlineSlack)}
		d.Context, d.cancel = context.WithDeadline(context.Background(), d.until)
		s.last.Store(d)
	}
	return d.Context
}
