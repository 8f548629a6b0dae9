package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"time"

	"pontoon/api"
	"pontoon/kv"
)

// An import is NDJSON, one entry or delete a line (httpimportline.go). It comes
// in two forms:
//
//	streamed   lines gather into chunks, one command each, one after the other.
//	           Its length has no bound; a failure names the line from which on
//	           nothing, or nothing for certain, has happened.
//	one piece  with atomic=true or an Idempotency-Key: the body is read and
//	           checked to its end, then it is one command. Where any line is
//	           bad nothing happens, and the key is still unused.
//
// A streamed import needs memory for one chunk and one line, whatever its
// length; a long line takes room as a body does. Its read deadline moves with the
// body, and each command has a deadline of its own: the default time-out bounds every
// wait for raft, as no call could be long otherwise. A timeout= bounds all of it.
type importer struct {
	c       *apiCall
	timeout time.Duration
	lines   lineReader
	json    jsonReader // scratch
	line    int64      // the last that was read, from 1
	items   int64      // lines that are entries or deletes
	ended   bool       // the trailer was read
	chunk   importChunk
	done    api.Imported
}

// importChunk is what goes into one command.
type importChunk struct {
	ops    []kv.TxnOp
	refs   []importRef // of each op
	first  int64       // its first line
	last   int64
	puts   int64  // put lines, also those that had expired and became no op
	bytes  int    // keys and values
	values []byte // what the values of ops are part of
	leases bool   // some op has a TTL or a lease
}

// importRef is where an operation comes from.
type importRef struct{ line, putsBefore int64 }

const (
	maxChunkLines = 1_000
	maxChunkBytes = 256 << 10 // of keys and values; one line always fits
	maxImports    = 64        // streamed ones under way
)

func (c *apiCall) serveImport() error {
	if err := c.parseOptions(optAtomic | optMode | optIdempotency); err != nil {
		return err
	}
	im := importer{c: c, timeout: c.deadline.Sub(c.start)}
	// The longest line is that of the longest value, every byte of it escaped
	// as \u0001: what an export writes can be imported.
	im.lines.limit = 6*(int(c.api.l.MaxValueBytes)+c.api.l.MaxKeyBytes) + minBodyBuffer
	var err error
	if c.opt.atomic || c.opt.has(optIdempotency) {
		err = im.onePiece()
	} else {
		err = im.streamed()
	}
	if err != nil {
		return err
	}
	c.w.Header()["Kv-Revision"] = []string{strconv.FormatInt(im.done.Revision, 10)}
	return c.writeJSON(http.StatusOK, im.done)
}

// inSlot runs an import within one slot from begin to end: a busy member
// refuses it before it has begun, not in the middle.
func (im *importer) inSlot(run func() error) error {
	if err := im.c.acquire(); err != nil {
		return err
	}
	defer im.c.release()
	if err := run(); err != nil || im.done.Revision != 0 {
		return err
	}
	// There was nothing to propose, or it changed nothing in an empty store.
	im.renewDeadline()
	ctx, cancel := context.WithDeadline(im.c.r.Context(), im.c.deadline)
	defer cancel()
	return im.c.api.b.read(ctx, readOptions{}, false, func(v *kv.View) error {
		im.done.Revision = v.Revision()
		return nil
	})
}

// renewDeadline is for the next wait of a streamed import.
func (im *importer) renewDeadline() {
	if im.lines.src != nil && !im.c.opt.has(optTimeout) {
		im.c.deadline = time.Now().Add(im.timeout)
	}
}

// streamed never takes all slots, however few there are: an import waits for
// its client most of the time, while others wait for a slot.
func (im *importer) streamed() error {
	a := im.c.api
	most := max(min(maxImports, a.l.MaxInFlight/2), 1)
	defer a.imports.Add(-1)
	if n := a.imports.Add(1); n > int64(most) {
		return &httpRefusal{err: errOverloaded, hint: "send it again once another import is done, or to another member",
			detail: strconv.Itoa(most) + " imports are under way on this member, the limit"}
	}
	err := im.inSlot(im.stream)
	if err != nil && im.line > 0 && im.c.bodyPending && im.c.r.ProtoMajor == 1 {
		// The answer says where to go on. A client that is still sending when
		// the connection closes might see a reset instead.
		im.c.setReadDeadline(time.Now().Add(drainTime))
		_, _ = io.CopyN(io.Discard, im.c.r.Body, maxDrainBytes)
	}
	return err
}

func (im *importer) stream() error {
	im.lines.src, im.lines.room = &bodyReader{c: im.c}, im.c.changeRoom
	for {
		e, err := im.next()
		switch {
		case err == io.EOF:
			return im.flush(nil)
		case errors.Is(err, errBodyStopped):
			// HTTP/1 has ended the request's context with the body: the chunk
			// at hand could not be waited for.
			return im.cut(err)
		case err != nil:
			// The lines before it are good, and happen.
			if err := im.flush(nil); err != nil {
				return err
			}
			return im.stopped(im.line, err)
		}
		if n := len(im.chunk.ops); n >= maxChunkLines || n > 0 && im.chunk.bytes+e.size() > maxChunkBytes {
			if err := im.flush(nil); err != nil {
				return err
			}
		}
		im.add(&e)
	}
}

// onePiece reads all lines before it proposes them.
func (im *importer) onePiece() error {
	limit := im.c.api.l.MaxTxnBytes
	body, err := im.c.readBody(nil, limit)
	if errors.Is(err, errTooLarge) {
		return &httpRefusal{err: err, hint: "send it in several parts, or, without atomic=true and an Idempotency-Key, as a stream of any length"}
	}
	if err != nil {
		return err
	}
	return im.inSlot(func() error { return im.proposePiece(body) })
}

func (im *importer) proposePiece(body []byte) error {
	im.lines.buf = body
	put := map[string]int64{} // the line of each put, with atomic=true
	for {
		e, err := im.next()
		if err == io.EOF {
			return im.flush(im.c.once(body))
		}
		if before := put[e.key]; err == nil && before != 0 {
			err = badRequest(lineText(im.line) + ": the key is put in line " + strconv.FormatInt(before, 10) +
				" already; one revision has one change of a key")
		}
		if err != nil {
			return &httpRefusal{err: err, line: int(im.line)}
		}
		if im.c.opt.atomic && !e.delete {
			put[e.key] = im.line
		}
		im.add(&e)
	}
}

// next returns the next entry or delete; io.EOF after the last.
func (im *importer) next() (e importEntry, err error) {
	for {
		line, err := im.lines.next()
		if err == io.EOF {
			return e, err
		}
		im.line++
		im.json = jsonReader{data: line, line: im.line, path: im.json.path[:0]}
		switch {
		case errors.Is(err, errLineTooLong):
			return e, &httpRefusal{err: errTooLarge, detail: lineText(im.line) + " is longer than " + strconv.Itoa(im.lines.limit) + " bytes, the limit"}
		case err != nil:
			return e, err
		case blank(line):
			continue
		case im.ended:
			return e, im.json.bad("it comes after the trailer, which ends an export")
		}
		if e, err = parseImportLine(&im.json, &im.c.api.l); err != nil {
			return e, err
		}
		if !e.end {
			im.items++
			if !e.timeToLive(time.Now()) {
				return e, im.json.bad("expires lies more than " + maxTTL.String() + " ahead, the longest life of a lease")
			}
			return e, nil
		}
		if e.items != im.items {
			return e, im.json.bad("the trailer counts " + strconv.FormatInt(e.items, 10) + " items, and " +
				strconv.FormatInt(im.items, 10) + " came before it; the export is not whole")
		}
		im.ended = true
	}
}

// add takes an entry into the chunk, which has room for it.
func (im *importer) add(e *importEntry) {
	k := &im.chunk
	if k.first == 0 {
		k.first = im.line
	}
	k.last = im.line
	ref := importRef{im.line, k.puts}
	if !e.delete {
		k.puts++
		if e.expired {
			return
		}
		k.leases = k.leases || e.ttl != 0 || e.lease != 0
		k.values = append(k.values, e.value...)
		e.value = k.values[len(k.values)-len(e.value) : len(k.values) : len(k.values)]
	}
	k.bytes += e.size()
	k.ops = append(k.ops, e.op(im.c.opt.create))
	k.refs = append(k.refs, ref)
}

// flush proposes the chunk and begins the next one.
func (im *importer) flush(once *kv.Once) error {
	k := &im.chunk
	var did kv.TxnResult
	if len(k.ops) > 0 || once != nil {
		res, err := im.propose(once)
		if errors.Is(err, errLeaseNotFound) && once == nil {
			return im.withoutLease(err)
		}
		if err != nil {
			return im.failed(err)
		}
		did = *res.Txn
		im.done.Revision = res.Revision
	}
	im.done.Put += did.Put
	im.done.Deleted += did.Deleted
	// Counted this way a repeated import (Once) answers as the first did, also
	// where more lines have expired since.
	im.done.Skipped += k.puts - did.Put
	clear(k.ops) // pins no keys
	*k = importChunk{ops: k.ops[:0], refs: k.refs[:0], values: k.values[:0]}
	return nil
}

func (im *importer) propose(once *kv.Once) (kv.Result, error) {
	c, k := im.c, &im.chunk
	command := kv.Command{Op: kv.OpTxn, Once: once, Txn: &kv.Txn{Then: k.ops, Each: !c.opt.atomic, Brief: true}}
	if k.leases {
		command.Wall = time.Now().UnixMilli()
	}
	if im.lines.src != nil {
		im.renewDeadline()
		if c.bodyPending {
			// HTTP/2 breaks a body for good when its read deadline passes,
			// also while nobody reads.
			c.setReadDeadline(time.Time{})
		}
	}
	return c.propose(command)
}

// failed is the answer where the chunk was not carried out, or maybe was. One
// piece fails as a whole, so that no line is to blame.
func (im *importer) failed(err error) error {
	if im.lines.src == nil {
		return err
	}
	what := lineText(im.chunk.first)
	if im.chunk.last > im.chunk.first {
		what = "lines " + strconv.FormatInt(im.chunk.first, 10) + " to " + strconv.FormatInt(im.chunk.last, 10)
	}
	return im.stopped(im.chunk.first, &httpRefusal{err: err, detail: what + ": " + err.Error()})
}

// cut is the answer where the body stopped.
func (im *importer) cut(err error) error {
	first := im.line
	if im.chunk.first != 0 {
		first = im.chunk.first
	}
	return im.stopped(first, badRequest(lineText(im.line)+": "+err.Error()+"; nothing was applied from "+lineText(first)+" on"))
}

// stopped is the answer where the lines before line happened and it did not.
func (im *importer) stopped(line int64, err error) error {
	row, _ := findErrorRow(err)
	ref := &httpRefusal{err: err, line: int(line), applied: &im.done, hint: "go on from " + lineText(line) + ": " + row.hint}
	if im.done.Put+im.done.Deleted > 0 && row.outcome != api.OutcomeUnknown {
		ref.outcome = api.OutcomeApplied
	}
	return ref
}

// withoutLease finds the line that names a lease which does not exist, for
// which the whole chunk was refused. Streamed, the lines before it happen.
func (im *importer) withoutLease(refused error) error {
	k := &im.chunk
	i, err := im.missingLease()
	switch {
	case err != nil:
		return im.failed(err)
	case i < 0:
		return im.failed(refused)
	}
	ref := k.refs[i]
	bad := &httpRefusal{err: refused, line: int(ref.line),
		detail: lineText(ref.line) + ": the lease " + strconv.FormatInt(k.ops[i].Lease, 10) + " does not exist"}
	if im.lines.src == nil {
		return bad
	}
	k.ops, k.refs, k.puts, k.last = k.ops[:i], k.refs[:i], ref.putsBefore, ref.line-1
	if err := im.flush(nil); err != nil { // another lease may be gone by now; then it is about an earlier line
		return err
	}
	return im.stopped(ref.line, bad)
}

// missingLease returns the first operation whose lease does not exist here,
// where the command was refused; -1 if there is none.
func (im *importer) missingLease() (int, error) {
	im.renewDeadline()
	ctx, cancel := context.WithDeadline(im.c.r.Context(), im.c.deadline)
	defer cancel()
	known := map[int64]bool{}
	for i := range im.chunk.ops {
		id := im.chunk.ops[i].Lease
		if id == 0 || known[id] {
			continue
		}
		_, err := im.c.api.b.lease(ctx, id, readOptions{stale: true})
		if errors.Is(err, errLeaseNotFound) {
			return i, nil
		}
		if err != nil {
			return 0, err
		}
		known[id] = true
	}
	return -1, nil
}
