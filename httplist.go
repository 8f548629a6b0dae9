package main

import (
	"context"
	"encoding/base64"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"pontoon/api"
	"pontoon/kv"
)

// Calls about many keys: pages of them, range deletes, the history of one.
// Exports and imports have files of their own.

// maxPageBytes bounds the keys and values of one page; one item always fits.
const maxPageBytes = 4 << 20

// serveRange answers /v1/kv.
func (c *apiCall) serveRange() error {
	switch c.r.Method {
	case http.MethodGet, http.MethodHead:
		return c.serveList()
	case http.MethodDelete:
		return c.deleteRange()
	case http.MethodPost:
		return c.serveImport()
	}
	return badMethod(c.route)
}

func (c *apiCall) serveList() error {
	c.w.Header()["Vary"] = headerAccept
	if err := c.parseOptions(optRead | optSpan | optRevision | optLimit | optAfter | optReverse | optKeys | optCount | optDelimiter); err != nil {
		return err
	}
	switch {
	case c.wantsNDJSON():
		return c.serveExport()
	case c.opt.count:
		return c.serveCount()
	}
	q := c.listQuery()
	walk := walkHash(&q)
	if err := c.continueWalk(&q, walk); err != nil {
		return err
	}
	var page kv.Page
	if err := c.readView(func(v *kv.View) { page = v.List(q) }); err != nil {
		return err
	}
	if err := c.holdAnswer(pageBytes(&page), false); err != nil {
		return err
	}
	next := ""
	if page.More {
		k := cursor{revision: page.Revision, query: walk, last: page.Last, rolled: page.LastRolled}
		next = k.encode()
		c.w.Header()["Link"] = []string{c.nextLink(next)}
	}
	c.writePage(&page, next)
	return nil
}

// readView runs f on the store as the options ask for it. The slot is given
// back before anything is written to the client.
func (c *apiCall) readView(f func(*kv.View)) error {
	return c.waiting(func(ctx context.Context) error {
		return c.api.b.read(ctx, c.read, false, func(v *kv.View) error {
			f(v)
			return nil
		})
	})
}

func (c *apiCall) listQuery() kv.Query {
	o := &c.opt
	q := kv.Query{Span: o.span, Reverse: o.reverse, Delimiter: o.delimiter, Prefix: o.prefix,
		Limit: o.limit, MaxBytes: maxPageBytes, KeysOnly: o.keys}
	if q.Limit == 0 {
		q.Limit = defaultLimit
	}
	return q
}

// continueWalk takes the place and the revision of after=.
func (c *apiCall) continueWalk(q *kv.Query, walk [8]byte) error {
	if !c.opt.has(optAfter) {
		return nil
	}
	bad := func(what string) error { return badRequest("query option after: " + what) }
	k, wrong := decodeCursor(c.opt.after)
	switch {
	case wrong != "":
		return bad(wrong)
	case k.query != walk:
		return bad("it is of another query; a walk keeps its range, delimiter, reverse and keys from page to page")
	case c.opt.has(optRevision) && c.read.revision != k.revision:
		return bad("it is of revision " + strconv.FormatInt(k.revision, 10) + ", which contradicts query option revision; give one")
	case c.read.minRevision > k.revision:
		return bad("it is of revision " + strconv.FormatInt(k.revision, 10) + ", which contradicts a later min_revision; give one")
	}
	c.read.revision = k.revision
	if c.read.stale {
		// The page before may have come from a member that is ahead of this one.
		c.read.minRevision = k.revision
	}
	q.After, q.Rolled = k.last, k.rolled
	return nil
}

// serveCount answers a list with nothing but its numbers.
func (c *apiCall) serveCount() error {
	if err := c.contradicts("count", optLimit|optAfter|optKeys|optReverse|optDelimiter); err != nil {
		return err
	}
	var page kv.Page
	err := c.readView(func(v *kv.View) {
		page.Revision, page.Count = v.Revision(), v.Count(c.opt.span)
	})
	if err != nil {
		return err
	}
	c.writePage(&page, "")
	return nil
}

// contradicts refuses the first of others that was given.
func (c *apiCall) contradicts(what string, others optionSet) error {
	for _, o := range [...]struct {
		opt  optionSet
		name string
		on   bool // as false, a flag says what holds anyway
	}{
		{optLimit, "limit", true}, {optAfter, "after", true}, {optCount, "count", c.opt.count},
		{optKeys, "keys", c.opt.keys}, {optReverse, "reverse", c.opt.reverse}, {optDelimiter, "delimiter", true},
	} {
		if others&o.opt != 0 && c.opt.has(o.opt) && o.on {
			return badRequest("query option " + o.name + " contradicts " + what + "; give one")
		}
	}
	return nil
}

// nextLink is the Link header (RFC 8288) of the page after this one: the same
// call, with after= replaced. The query is encoded anew, since net/http lets
// bytes pass in it that would end the target early.
func (c *apiCall) nextLink(next string) string {
	var b strings.Builder
	b.WriteString("</v1/kv?")
	for piece := range strings.SplitSeq(c.r.URL.RawQuery, "&") {
		rawName, rawValue, hasValue := strings.Cut(piece, "=")
		// They were parsed before, so that errors cannot be.
		name, _ := url.QueryUnescape(rawName)
		value, _ := url.QueryUnescape(rawValue)
		if name == "" || name == "after" {
			continue
		}
		b.WriteString(name) // of an option that is known, so it needs no encoding
		if hasValue {
			b.WriteString("=" + url.QueryEscape(value))
		}
		b.WriteByte('&')
	}
	b.WriteString("after=" + next + `>; rel="next"`)
	return b.String()
}

// writePage writes api.List in pieces: its text can be six times its 4 MiB.
func (c *apiCall) writePage(page *kv.Page, next string) {
	c.w.Header()["Kv-Revision"] = []string{strconv.FormatInt(page.Revision, 10)}
	p := c.startPieces(headerJSON)
	defer p.done()
	p.buf = append(p.buf, `{"revision":`...)
	p.buf = strconv.AppendInt(p.buf, page.Revision, 10)
	p.buf = append(p.buf, `,"count":`...)
	p.buf = strconv.AppendInt(p.buf, int64(page.Count), 10)
	p.buf = append(p.buf, `,"items":[`...)
	for i := range page.Items {
		if i > 0 {
			p.buf = append(p.buf, ',')
		}
		e := listEntry(&page.Items[i], c.opt.keys)
		if !p.entry(&e) {
			return
		}
	}
	p.buf = append(p.buf, `],"prefixes":[`...)
	binary := p.prefixes(page.Prefixes)
	p.buf = append(p.buf, ']')
	if next != "" {
		p.buf = append(p.buf, `,"next":"`...)
		p.buf = append(p.buf, next...)
		p.buf = append(p.buf, '"')
	}
	if len(binary) > 0 {
		p.buf = append(p.buf, `,"prefixes_b64":[`...)
		p.binaryPrefixes(binary)
		p.buf = append(p.buf, ']')
	}
	p.buf = append(p.buf, '}', '\n')
}

func listEntry(e *kv.Entry, keysOnly bool) api.Entry {
	shown := apiEntry(e)
	if keysOnly {
		shown.Value = nil
	}
	return shown
}

// deleteRange removes the keys of a span at one revision. Everything is only
// removed where that is said in words: a script whose variable is empty sends
// prefix= too.
func (c *apiCall) deleteRange() error {
	if err := c.parseOptions(optSpan | optAll | optIdempotency); err != nil {
		return err
	}
	switch everything := c.opt.span == (kv.Span{}); {
	case everything && !c.opt.all:
		return &httpRefusal{err: errBadRequest, detail: "no query option prefix, start or end narrows the delete",
			hint: "name a range, or delete every key of the store with all=true"}
	case !everything && c.opt.all:
		return badRequest("query option all contradicts prefix, start and end; give one")
	}
	if err := c.acquire(); err != nil {
		return err
	}
	res, err := c.propose(kv.Command{Op: kv.OpDeleteRange, Span: c.opt.span, Once: c.once(nil)})
	c.release()
	if err != nil {
		return err
	}
	c.w.Header()["Kv-Revision"] = []string{strconv.FormatInt(res.Revision, 10)}
	return c.writeJSON(http.StatusOK, api.Deleted{Deleted: res.Deleted, Revision: res.Revision})
}

// keyHistory answers GET /v1/kv/{key}?history=N.
func (c *apiCall) keyHistory(key string) error {
	var h kv.History
	var items []api.Entry
	err := c.waiting(func(ctx context.Context) (err error) {
		if h, err = c.api.b.history(ctx, c.read); err != nil {
			return err
		}
		if items = versions(h, key, c.opt.history); len(items) > 0 {
			return nil
		}
		if h.Revision() == 0 {
			return errKeyNotFound
		}
		// Nothing has happened to it since the oldest event: its version then
		// is that of now, if it has one.
		now := readOptions{stale: true, revision: h.Revision()}
		e, _, err := c.api.b.get(ctx, key, now)
		if err == nil {
			items = append(items, listEntry(&e, false))
		}
		return err
	})
	if err != nil {
		return err
	}
	held := int64(0)
	for i := range items {
		held += int64(len(items[i].Value)) + listedBytes
	}
	if err := c.holdAnswer(held, false); err != nil {
		return err
	}
	c.w.Header()["Kv-Revision"] = []string{strconv.FormatInt(h.Revision(), 10)}
	p := c.startPieces(headerJSON)
	defer p.done()
	p.buf = append(p.buf, `{"revision":`...)
	p.buf = strconv.AppendInt(p.buf, h.Revision(), 10)
	p.buf = append(p.buf, `,"compact_revision":`...)
	p.buf = strconv.AppendInt(p.buf, h.Compacted(), 10)
	p.buf = append(p.buf, `,"items":[`...)
	for i := range items {
		if i > 0 {
			p.buf = append(p.buf, ',')
		}
		if !p.entry(&items[i]) {
			return nil
		}
	}
	p.buf = append(p.buf, ']', '}', '\n')
	return nil
}

// versions returns up to limit versions of a key, newest first. The oldest
// event also tells what was there before it.
func versions(h kv.History, key string, limit int) []api.Entry {
	var items []api.Entry
	var oldest kv.Entry
	h.Back(key, func(e kv.Event) bool {
		if e.Deleted {
			items = append(items, api.Entry{Key: key, ModRevision: e.Revision, Deleted: true})
		} else {
			items = append(items, listEntry(&e.Entry, false))
		}
		oldest = e.Prev
		return len(items) < limit
	})
	if len(items) < limit && oldest.ModRevision != 0 {
		items = append(items, listEntry(&oldest, false))
	}
	return items
}

// pieces writes a body of unknown length through one buffer. What fits in it
// goes out in one write with its length; after that the body is chunked.
//
// The buffer is the caller's to append to, and to next's to send.
type pieces struct {
	c      *apiCall
	buf    []byte
	pooled *[]byte
	status int
	begun  bool // the header is out
	err    error
}

const (
	pieceBytes = 48 << 10 // sent once there are so many; well below maxPooledBuffer
	wholeValue = 8 << 10  // of an entry; larger ones are encoded part by part
)

func (c *apiCall) startPieces(contentType []string) *pieces {
	c.w.Header()["Content-Type"] = contentType
	c.safetyHeaders()
	p := &pieces{c: c, pooled: c.api.buffers.Get().(*[]byte), status: http.StatusOK}
	p.buf = (*p.pooled)[:0]
	return p
}

// next sends what has gathered once it is enough for a piece. It reports false
// once nobody reads any more.
func (p *pieces) next() bool {
	if len(p.buf) >= pieceBytes {
		p.send()
	}
	return p.err == nil
}

// entry adds an entry, and reports what next does.
func (p *pieces) entry(e *api.Entry) bool {
	if len(e.Value) <= wholeValue {
		p.buf = e.AppendJSON(p.buf)
	} else {
		p.buf = e.StreamJSON(p.buf, p.spill)
	}
	return p.next()
}

// spill sends what there is of a large value.
func (p *pieces) spill(buf []byte) []byte {
	p.buf = buf
	p.next()
	return p.buf
}

// send empties the buffer, also where nobody reads any more.
func (p *pieces) send() {
	if p.err == nil && !p.begun {
		p.begun = true
		p.c.writeHeader(p.status)
	}
	switch {
	case p.err != nil:
	case p.c.r.Method == http.MethodHead:
		p.err = io.EOF // the header is all there is to send
	default:
		_, p.err = p.c.w.Write(p.buf) // an error here means that the client left
	}
	p.buf = p.buf[:0]
}

// done sends the rest and gives the buffer back.
func (p *pieces) done() {
	if !p.begun {
		p.c.w.Header()["Content-Length"] = []string{strconv.Itoa(len(p.buf))}
	}
	p.send()
	p.release()
}

func (p *pieces) release() {
	*p.pooled = p.buf[:0]
	p.c.api.putBuffer(p.pooled)
}

func (p *pieces) prefixes(all []string) (binary []string) {
	first := true
	for _, s := range all {
		if !utf8.ValidString(s) {
			binary = append(binary, s)
			continue
		}
		if !first {
			p.buf = append(p.buf, ',')
		}
		first = false
		p.buf = api.AppendString(p.buf, s)
		if !p.next() {
			break
		}
	}
	return binary
}

func (p *pieces) binaryPrefixes(all []string) {
	for i, s := range all {
		if i > 0 {
			p.buf = append(p.buf, ',')
		}
		p.buf = append(p.buf, '"')
		p.buf = base64.StdEncoding.AppendEncode(p.buf, []byte(s))
		p.buf = append(p.buf, '"')
		if !p.next() {
			break
		}
	}
}
