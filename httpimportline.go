package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"time"

	"pontoon/kv"
)

// importEntry is what one line of an import says: a put, a delete, or the
// trailer of an export.
type importEntry struct {
	key     string
	value   []byte // part of the line, or its own; nil: no put
	delete  bool
	ttl     time.Duration
	lease   int64
	expires time.Time // zero: not given
	expired bool      // nothing is left until then

	end   bool // a trailer, of so many items
	items int64
}

var lineFields = jsonFields{"key", "value", "key_b64", "value_b64", "create_revision", "mod_revision", "version",
	"ttl", "lease", "expires", "delete", "end", "items", "revision"}

// parseImportLine reads one line, which r holds. The value of the entry may be
// part of the line.
func parseImportLine(r *jsonReader, l *limits) (e importEntry, err error) {
	seen, err := r.object(lineFields, func(name string) (err error) {
		switch name {
		case "key", "key_b64":
			e.key, err = r.key(name == "key_b64", l.MaxKeyBytes)
		case "value", "value_b64":
			e.value, err = r.value(name == "value_b64", l.MaxValueBytes)
		case "ttl":
			e.ttl, err = r.ttl()
		case "lease":
			e.lease, err = r.lease()
		case "expires":
			e.expires, err = r.time()
		case "delete":
			e.delete = true
			err = r.onlyTrue()
		case "end":
			e.end = true
			err = r.onlyTrue()
		case "items":
			e.items, err = r.integer(0, math.MaxInt64)
		default: // where an entry comes from; a put makes revisions of its own
			_, err = r.integer(0, math.MaxInt64)
		}
		return err
	})
	if err == nil {
		err = r.end()
	}
	if err == nil {
		err = e.check(r, seen)
	}
	return e, err
}

// check refuses what the fields of a line cannot mean together.
func (e *importEntry) check(r *jsonReader, seen jsonSeen) error {
	if trailer := seen.count("end", "items", "revision"); trailer > 0 {
		if trailer != 3 || seen.count(lineFields...) != 3 {
			return r.bad("a trailer has the fields end, items and revision, and no others; an entry has none of them")
		}
		return nil
	}
	if err := r.oneOf(seen, "key", "key_b64"); err != nil {
		return err
	}
	if e.delete {
		if seen.count("value", "value_b64", "ttl", "lease", "expires") > 0 {
			return r.bad("a delete has a key, and neither a value, a ttl, a lease nor expires")
		}
		return nil
	}
	if seen.count("ttl") > 0 && seen.count("lease", "expires") > 0 {
		return r.bad("the field ttl contradicts lease and expires; give one")
	}
	return r.oneOf(seen, "value", "value_b64")
}

// clockSkew is how far the clocks of two clusters may be apart.
const clockSkew = 24 * time.Hour

// timeToLive turns expires, as exports have it, into a TTL of what is left of
// it. The lease next to it is dropped: it belongs to the cluster of the export.
// It returns false where more is left than any lease can have.
func (e *importEntry) timeToLive(now time.Time) bool {
	if e.expires.IsZero() {
		return true
	}
	left := e.expires.Sub(now)
	e.expired = left <= 0
	e.lease, e.ttl = 0, min(max(left.Truncate(time.Millisecond), minTTL), maxTTL)
	return left <= maxTTL+clockSkew
}

func (e *importEntry) size() int { return len(e.key) + len(e.value) }

func (e *importEntry) op(create bool) kv.TxnOp {
	if e.delete {
		return kv.TxnOp{Op: kv.OpDeleteRange, Span: kv.SingleKey(e.key)}
	}
	return kv.TxnOp{Op: kv.OpPut, Key: e.key, Value: e.value, TTL: e.ttl, Lease: e.lease, CreateOnly: create}
}

// time reads a moment as RFC 3339 has it.
func (r *jsonReader) time() (time.Time, error) {
	s, err := r.text()
	if err != nil {
		return time.Time{}, err
	}
	t, err := time.Parse(time.RFC3339Nano, string(s))
	if err != nil || t.IsZero() {
		return time.Time{}, r.bad("want a time as RFC 3339 has it, such as \"2030-01-02T15:04:05Z\", not " + quoteShort(string(s)))
	}
	return t, nil
}

// onlyTrue reads a marker that is left out where it does not hold.
func (r *jsonReader) onlyTrue() error {
	if on, err := r.boolean(); err != nil || !on {
		return r.bad("want true, or leave the field out")
	}
	return nil
}

// lineReader cuts what src gives into lines, and holds one of them at a time.
type lineReader struct {
	src     io.Reader // nil: all there is lies in buf
	buf     []byte
	start   int               // of the line to come
	scanned int               // there is no end of a line before it
	limit   int               // bytes of a line
	room    func(n int) error // takes what the buffer grows by beyond lineBuffer, or gives it back; nil: nobody counts
	err     error
}

const lineBuffer = 32 << 10

var errLineTooLong = errors.New("the line is too long")

// next returns the next line without its end, which the last line need not
// have. The line is valid until the call after. After an error, io.EOF
// included, the same comes again.
func (l *lineReader) next() ([]byte, error) {
	for {
		if i := bytes.IndexByte(l.buf[l.scanned:], '\n'); i >= 0 {
			line := l.buf[l.start : l.scanned+i]
			l.start = l.scanned + i + 1
			l.scanned = l.start
			return l.checked(line)
		}
		l.scanned = len(l.buf)
		rest := l.buf[l.start:]
		switch {
		case len(rest) > l.limit:
			return l.checked(rest)
		case l.err == io.EOF && len(rest) > 0:
			l.start = len(l.buf)
			return rest, nil
		case l.err != nil:
			return nil, l.err
		case l.src == nil:
			l.err = io.EOF
		default:
			l.fill()
		}
	}
}

func (l *lineReader) checked(line []byte) ([]byte, error) {
	if len(line) > l.limit {
		l.err = errLineTooLong
		l.start = len(l.buf)
		l.scanned = l.start
		return nil, l.err
	}
	return line, nil
}

// fill reads once. It moves the line to the front where that makes enough room,
// and else doubles the buffer: with what has arrived, not with what may. A buffer that
// a long line has left behind shrinks.
func (l *lineReader) fill() {
	rest, size := l.buf[l.start:], cap(l.buf)
	switch full := len(l.buf) == size; {
	case size == 0, size > 8*lineBuffer && len(rest) <= lineBuffer/2:
		size = lineBuffer
	case full && len(rest) > size/2:
		size = min(2*size, l.limit+lineBuffer)
	case !full:
		l.read()
		return
	}
	to := l.buf[:0]
	if size != cap(l.buf) {
		if l.room != nil {
			if l.err = l.room(size - max(cap(l.buf), lineBuffer)); l.err != nil {
				return
			}
		}
		to = make([]byte, 0, size)
	}
	l.buf = append(to, rest...)
	l.scanned -= l.start
	l.start = 0
	l.read()
}

func (l *lineReader) read() {
	n, err := l.src.Read(l.buf[len(l.buf):cap(l.buf)])
	l.buf = l.buf[:len(l.buf)+n]
	l.err = err
}

// bodyReader reads a body whose read deadline moves with it: a body of any
// length may take its time, and one that stands still ends.
//
// It has to come at a pace as well, which is that of the client alone: the time that
// raft takes does not count. Else a byte now and then would keep an import, of which
// there are few, for ever. And timeout= ends it, if the client set one.
type bodyReader struct {
	c      *apiCall
	waited time.Duration // for the client
	came   int           // bytes meanwhile
}

const (
	importProgress = 30 * time.Second // of waiting, in which at least importPiece has to come
	importPiece    = 64 << 10
)

// errBodyStopped is wrapped by every error of a bodyReader.
var errBodyStopped = errors.New("the body stopped before its end")

func (b *bodyReader) Read(p []byte) (int, error) {
	c := b.c
	if !c.bodyPending {
		return 0, io.EOF
	}
	start := time.Now()
	until := start.Add(min(bodyProgress, importProgress-b.waited))
	if c.opt.has(optTimeout) && c.deadline.Before(until) {
		until = c.deadline
	}
	c.setReadDeadline(until)
	n, err := c.r.Body.Read(p)
	b.waited += time.Since(start)
	if b.came += n; b.came >= importPiece {
		b.waited, b.came = 0, 0
	}
	late := errors.Is(err, os.ErrDeadlineExceeded)
	switch {
	case err == io.EOF:
		c.bodyPending = false
		return n, io.EOF
	case late && until.Equal(c.deadline):
		err = errors.New("its timeout is over")
	case b.waited >= importProgress:
		err = fmt.Errorf("%d bytes came within %v, the least is %d", b.came, importProgress, importPiece)
	case late:
		err = fmt.Errorf("nothing came for %v", bodyProgress)
	case err == nil:
		return n, nil
	}
	if late {
		c.bodyPending = false // nobody waits for the rest: the deadline stays as it is
	}
	return n, fmt.Errorf("%w: %v", errBodyStopped, err)
}

func blank(line []byte) bool { return len(bytes.TrimLeft(line, " \t\r")) == 0 }

func lineText(line int64) string { return "line " + strconv.FormatInt(line, 10) }
