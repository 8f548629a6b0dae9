package main

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"

	"go.uber.org/zap"

	"pontoon/api"
	"pontoon/kv"
)

// An export is the whole of a span at one revision, one entry a line
// (application/x-ndjson), and api.Trailer as the last line. It reads a
// copy-on-write clone, so that it neither holds up the writers nor grows with the
// store; what it costs is the memory of what is overwritten meanwhile, for which
// limits.MaxExports bounds how many are under way.
//
// The trailer is the promise that nothing is missing. So it is written only
// after the store has said that the read went well, and whatever goes wrong
// before breaks the connection off: a client that counts on the end of the body
// alone sees an error, too.

var headerNDJSON = []string{"application/x-ndjson"}

// errClientLeft ends a read whose reader is gone; it is never answered.
var errClientLeft = errors.New("the client left")

// wantsNDJSON says that the client named NDJSON itself and wants it at least as
// much as JSON. The tie goes to NDJSON: whoever lists both can read both, and
// names JSON for the errors.
func (c *apiCall) wantsNDJSON() bool {
	var lines, whole float64
	for _, header := range c.r.Header["Accept"] {
		for item := range strings.SplitSeq(header, ",") {
			media, params, _ := strings.Cut(item, ";")
			switch strings.ToLower(strings.TrimSpace(media)) {
			case "application/x-ndjson":
				lines = max(lines, quality(params))
			case "application/json":
				whole = max(whole, quality(params))
			}
		}
	}
	return lines > 0 && lines >= whole
}

func (c *apiCall) serveExport() error {
	const all = "Accept: application/x-ndjson, which asks for all of it, ascending"
	if err := c.contradicts(all, optLimit|optAfter|optCount|optReverse|optDelimiter); err != nil {
		return err
	}
	if c.r.Method == http.MethodHead {
		return c.headExport()
	}
	if n := c.api.exports.Add(1); n > int64(c.api.l.MaxExports) {
		c.api.exports.Add(-1)
		return &httpRefusal{err: errOverloaded, hint: "send it again once another export is done, or to another member",
			detail: strconv.Itoa(c.api.l.MaxExports) + " exports are under way on this member, the limit"}
	}
	defer c.api.exports.Add(-1)
	return c.export()
}

// headExport shows the headers that an export would have now.
func (c *apiCall) headExport() error {
	err := c.readView(func(v *kv.View) { c.exportHeaders(v) })
	if err == nil {
		c.writeHeader(http.StatusOK)
	}
	return err
}

func (c *apiCall) exportHeaders(v *kv.View) {
	h := c.w.Header()
	h["Kv-Revision"] = []string{strconv.FormatInt(v.Revision(), 10)}
	h["Content-Type"] = headerNDJSON
	c.safetyHeaders()
}

func (c *apiCall) export() error {
	if err := c.acquire(); err != nil {
		return err
	}
	waits := true // on the store; it holds a slot only so long
	defer func() {
		if waits {
			c.release()
		}
	}()
	// The deadline bounds the wait for the clone. What comes after it is
	// bounded by the client's progress.
	ctx, cancel := context.WithDeadline(c.r.Context(), c.deadline)
	defer cancel()
	p := c.startPieces(headerNDJSON)
	end := api.Trailer{End: true}
	err := c.api.b.read(ctx, c.read, true, func(v *kv.View) error {
		waits = false
		c.release()
		c.exportHeaders(v)
		end.Revision = v.Revision()
		return c.exportEntries(p, v, &end.Items)
	})
	switch {
	case err == nil:
		p.buf = append(p.buf, `{"end":true,"items":`...)
		p.buf = strconv.AppendInt(p.buf, end.Items, 10)
		p.buf = append(p.buf, `,"revision":`...)
		p.buf = strconv.AppendInt(p.buf, end.Revision, 10)
		p.buf = append(p.buf, '}', '\n')
		p.done()
		return nil
	case !p.begun:
		p.release()
		return err
	case p.err != nil:
		c.counted = statusClientClosed
	default:
		c.counted = http.StatusInternalServerError
		c.api.log.Error("an export was broken off", zap.Int64("revision", end.Revision), zap.Error(err))
	}
	// panic: net/http's own way to break an answer off, so that no client takes
	// its end for the end of the data.
	panic(http.ErrAbortHandler)
}

// exportEntries sends every entry of the span in pieces, and counts them. What
// is less than a piece stays in the buffer.
func (c *apiCall) exportEntries(p *pieces, v *kv.View, items *int64) error {
	flush := http.NewResponseController(c.w)
	v.Ascend(c.opt.span, func(e kv.Entry) bool {
		if e.Expires == 0 {
			e.Lease = 0 // it has ended since: an import would not find it, or find somebody else's
		}
		shown := listEntry(&e, c.opt.keys)
		p.entry(&shown)
		p.buf = append(p.buf, '\n')
		*items++
		if len(p.buf) == 1 && p.err == nil { // the entry went out
			p.err = flush.Flush()
		}
		return p.err == nil
	})
	if p.err != nil {
		return errClientLeft
	}
	return nil
}
