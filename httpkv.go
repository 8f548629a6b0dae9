package main

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"pontoon/api"
	"pontoon/kv"
)

// commands holds scratch commands: a Command escapes to the heap on its way
// through the backend interface, and a plain PUT must not pay for it.
var commands = sync.Pool{New: func() any { return new(kv.Command) }}

// serveKey answers the classic key calls and those under /v1/kv.
func (c *apiCall) serveKey(raw string) error {
	method := c.r.Method
	if methodIndex(method) == 0 || method == http.MethodPost {
		return badMethod(c.route)
	}
	key, err := decodeKey(raw)
	switch {
	case err != nil:
		return err
	case c.route == routeKey && isReserved(key):
		return c.reservedPath(raw)
	case key == "":
		return errEmptyKey
	case len(key) > c.api.l.MaxKeyBytes:
		return &httpRefusal{err: errKeyTooLong, detail: "the key has " + strconv.Itoa(len(key)) +
			" bytes; the limit is " + strconv.Itoa(c.api.l.MaxKeyBytes)}
	}
	switch method {
	case http.MethodPut:
		return c.putKey(key)
	case http.MethodDelete:
		return c.deleteKey(key)
	}
	return c.getKey(key)
}

func (c *apiCall) getKey(key string) error {
	takes := optRead | optRevision | optIfNoneMatch | optPreferWait
	if c.route == routeKV {
		takes |= optHistory
		c.w.Header()["Vary"] = headerAccept
	}
	if err := c.parseOptions(takes); err != nil {
		return err
	}
	if err := c.checkRead(); err != nil {
		return err
	}
	if c.opt.has(optHistory) {
		return c.onHeap(func(c *apiCall) error { return c.keyHistory(key) })
	}
	e, revision, err := c.lookUp(key)
	if err != nil {
		if c.route == routeKey && errors.Is(err, errKeyNotFound) {
			return &httpRefusal{err: err, firstLine: classicGetFailed}
		}
		return err
	}
	matches := c.opt.has(optIfNoneMatch) && matchesTag(&c.opt.noneMatch, e.ModRevision)
	if len(e.Value) > smallAnswer && !matches {
		if err := c.holdAnswer(int64(len(e.Value)), true); err != nil {
			return err
		}
	}
	switch {
	case matches:
		setRevisions(c.w.Header(), e.ModRevision, revision)
		c.writeHeader(http.StatusNotModified)
	case c.route == routeKV && c.prefersJSON():
		c.writeEntryJSON(&e, revision)
	default:
		c.writeEntry(&e, revision)
	}
	return nil
}

// checkRead refuses options of a read that cannot be meant together.
func (c *apiCall) checkRead() error {
	o := &c.opt
	switch {
	case o.has(optHistory) && o.has(optIfNoneMatch):
		return badRequest("header If-None-Match and query option history contradict each other; send one")
	case o.has(optPreferWait) && !o.has(optIfNoneMatch):
		return &httpRefusal{err: errBadRequest, detail: "header Prefer: wait= needs If-None-Match: it waits until the key no longer matches that",
			hint: `send the ETag of the answer that you have, or If-None-Match: "0" to wait until the key exists`}
	case o.has(optPreferWait) && o.has(optRevision):
		return badRequest("header Prefer: wait= and query option revision contradict each other: what was at a revision never changes")
	}
	return nil
}

// lookUp gives its slot back before the value is written: a client that reads
// slowly does not wait on the store. A long poll takes none while it waits.
func (c *apiCall) lookUp(key string) (kv.Entry, int64, error) {
	if c.opt.has(optPreferWait) {
		return c.awaitChange(c.r.Context(), key)
	}
	if err := c.acquire(); err != nil {
		return kv.Entry{}, 0, err
	}
	defer c.release()
	ctx, cancel := c.bounded()
	defer cancel()
	return c.api.b.get(ctx, key, c.read)
}

// matchesTag is If-None-Match of a read, against a key whose mod revision is
// mod; 0: it is absent, which `*` does not match (RFC 9110, section 13.1.2).
func matchesTag(p *kv.Precondition, mod int64) bool {
	if p.Kind == kv.CheckAbsent {
		return mod != 0
	}
	return slices.Contains(p.Revisions, mod)
}

// prefersJSON says that the client named JSON itself and wants it at least as
// much as bytes. For bytes the most specific range counts (RFC 9110, section
// 12.5.1). Whoever wants neither gets bytes: there is no third form, and a 406
// would help nobody.
func (c *apiCall) prefersJSON() bool {
	var asJSON, asBytes float64
	specific := 0 // of the range behind asBytes: 1 is */*, 2 application/*, 3 the type itself
	for _, line := range c.r.Header["Accept"] {
		if line == "*/*" {
			continue
		}
		for item := range strings.SplitSeq(line, ",") {
			media, params, _ := strings.Cut(item, ";")
			rank := 0
			switch strings.ToLower(strings.TrimSpace(media)) {
			case "application/json":
				asJSON = max(asJSON, quality(params))
			case "*/*":
				rank = 1
			case "application/*":
				rank = 2
			case "application/octet-stream":
				rank = 3
			}
			if rank > specific {
				specific, asBytes = rank, quality(params)
			}
		}
	}
	return asJSON > 0 && asJSON >= asBytes
}

// quality is the weight among the parameters of a media range, 1 if there is
// none; one that is malformed counts as 0, so that it chooses nothing.
func quality(params string) float64 {
	for p := range strings.SplitSeq(params, ";") {
		name, value, _ := strings.Cut(p, "=")
		if !strings.EqualFold(strings.TrimSpace(name), "q") {
			continue
		}
		q, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
		if err != nil || !(q >= 0 && q <= 1) {
			return 0
		}
		return q
	}
	return 1
}

func (c *apiCall) putKey(key string) error {
	if err := c.parseOptions(optCAS | optTTL | optLease | optPreferEcho); err != nil {
		return err
	}
	if c.r.Header["Content-Range"] != nil { // RFC 9110, section 14.4
		return badRequest("header Content-Range: a value is written whole")
	}
	buf := c.api.buffers.Get().(*[]byte)
	defer c.api.putBuffer(buf)
	res, err := c.proposePut(key, buf)
	if err != nil {
		return err
	}
	if c.route == routeKey {
		if _, ok := parseMemberID(key); ok {
			c.w.Header()["Kv-Notice"] = []string{"numeric key; DELETE /" + key + " removes member " + key}
		}
	}
	c.answerPut(key, *buf, &res)
	return nil
}

// proposePut takes its slot before it reads the body into buf, so that the slots
// bound the memory for bodies too, and gives it back before the answer. A slow
// body gives it back at the latest with its deadline.
func (c *apiCall) proposePut(key string, buf *[]byte) (kv.Result, error) {
	var err error
	if *buf, err = c.readBody((*buf)[:0], c.api.l.MaxValueBytes); err != nil {
		return kv.Result{}, err
	}
	if err := c.acquire(); err != nil {
		return kv.Result{}, err
	}
	defer c.release()
	return c.propose(kv.Command{Op: kv.OpPut, Key: key, Value: *buf, If: c.opt.check,
		TTL: c.opt.ttl, Lease: c.opt.lease, Once: c.once(*buf)})
}

// answerPut writes what a put has done. The classic call never says 201.
func (c *apiCall) answerPut(key string, value []byte, res *kv.Result) {
	h := c.w.Header()
	setRevisions(h, res.Entry.ModRevision, res.Revision)
	setExpires(h, res.Entry.Expires)
	status := http.StatusNoContent
	if c.route == routeKV && !res.Existed {
		status = http.StatusCreated
	}
	if !c.opt.echo {
		if status == http.StatusCreated {
			h["Content-Length"] = headerZero
		}
		c.writeHeader(status)
		return
	}
	if status == http.StatusNoContent {
		status = http.StatusOK
	}
	h["Preference-Applied"] = headerEcho
	e := res.Entry
	e.Key, e.Value = key, value // a kept result has no value; the request that repeats it has the same
	c.writeJSONEntry(status, &e)
}

func (c *apiCall) deleteKey(key string) error {
	if err := c.parseOptions(optCAS); err != nil {
		return err
	}
	res, err := c.proposeInSlot(kv.Command{Op: kv.OpDelete, Key: key, If: c.opt.check, Once: c.once(nil)})
	if err != nil {
		return err
	}
	h := c.w.Header()
	h["Kv-Revision"] = []string{strconv.FormatInt(res.Revision, 10)}
	h["Kv-Deleted"] = headerZero
	if res.Existed {
		h["Kv-Deleted"] = headerOne
	}
	c.writeHeader(http.StatusNoContent)
	return nil
}

// proposeInSlot is propose for a call that holds no slot yet.
func (c *apiCall) proposeInSlot(command kv.Command) (kv.Result, error) {
	if err := c.acquire(); err != nil {
		return kv.Result{}, err
	}
	defer c.release()
	return c.propose(command)
}

// propose carries out one command within the call's deadline, and turns a
// refusal of the state machine into the error that answers it. The caller
// holds a slot. Headers that every answer to the command carries are set then.
func (c *apiCall) propose(command kv.Command) (kv.Result, error) {
	ctx, cancel := c.bounded()
	defer cancel()
	if command.Wall == 0 && (command.TTL != 0 || command.Lease != 0 || command.Op == kv.OpTxn && grantsLeases(command.Txn)) {
		command.Wall = time.Now().UnixMilli()
	}
	scratch := commands.Get().(*kv.Command)
	*scratch = command
	res, err := c.api.b.propose(ctx, scratch)
	*scratch = kv.Command{} // pins nothing
	commands.Put(scratch)
	if err != nil {
		return kv.Result{}, err
	}
	c.setOnce(&res)
	if res.Refused != kv.NotRefused {
		return kv.Result{}, c.refusal(&res)
	}
	return res, nil
}

// grantsLeases says that a put of the transaction has a TTL.
func grantsLeases(txn *kv.Txn) bool {
	hasTTL := func(op kv.TxnOp) bool { return op.TTL != 0 }
	return slices.ContainsFunc(txn.Then, hasTTL) || slices.ContainsFunc(txn.Else, hasTTL)
}

// setOnce tells how long the result of an idempotent command is kept, in whole
// seconds, and whether this is a kept one.
func (c *apiCall) setOnce(res *kv.Result) {
	if window := res.Window.Truncate(time.Second); window > 0 {
		c.w.Header()["Kv-Idempotency-Window"] = []string{window.String()}
	}
	if res.Replayed {
		c.w.Header()["Kv-Idempotent-Replay"] = headerTrue
	}
}

// refusal is the error for a command that the state machine refused. It sets
// the ETag of the entry that a precondition did not match.
func (c *apiCall) refusal(res *kv.Result) error {
	switch res.Refused {
	case kv.RefusedCondition:
		mod := res.Entry.ModRevision
		if mod == 0 {
			return &httpRefusal{err: errPrecondition, detail: "the precondition does not hold: the key does not exist"}
		}
		setRevisions(c.w.Header(), mod, res.Revision)
		return &httpRefusal{err: errPrecondition, current: mod,
			detail: "the precondition does not hold: the key is at revision " + strconv.FormatInt(mod, 10)}
	case kv.RefusedNoLease:
		return errLeaseNotFound
	case kv.RefusedTooLarge:
		return errReadsTooMuch
	case kv.RefusedMismatch:
		return errOnceMismatch
	case kv.RefusedExpired:
		return errOnceExpired
	case kv.RefusedOnceIsFull:
		return errOnceFull
	}
	return errors.New("the state machine refused for a reason that has no name: " + strconv.Itoa(int(res.Refused)))
}

// once is the idempotency of the call, nil without the header. The fingerprint
// covers all that decides what the call does and how it is answered; so a
// repetition may have another time-out, and nothing else.
func (c *apiCall) once(body []byte) *kv.Once {
	if !c.opt.has(optIdempotency) {
		return nil
	}
	h := sha256.New()
	var scratch []byte
	part := func(p string) { // with its length, so that no two lists of parts read the same
		scratch = append(binary.AppendUvarint(scratch[:0], uint64(len(p))), p...)
		h.Write(scratch)
	}
	path, _ := rawPath(c.r)
	_, arg := resolve(c.r.Method, path)
	part(c.r.Method)
	part(c.route.String())
	part(arg)
	var pieces []string
	for piece := range strings.SplitSeq(c.r.URL.RawQuery, "&") {
		rawName, _, _ := strings.Cut(piece, "=")
		if name, err := url.QueryUnescape(rawName); piece != "" && err == nil && name != "timeout" {
			pieces = append(pieces, piece)
		}
	}
	slices.Sort(pieces)
	part(strconv.Itoa(len(pieces)))
	for _, piece := range pieces {
		part(piece)
	}
	scratch = append(scratch[:0], byte(c.opt.check.Kind), byte(len(c.opt.check.Revisions)))
	for _, revision := range c.opt.check.Revisions {
		scratch = binary.AppendVarint(scratch, revision)
	}
	scratch = strconv.AppendBool(scratch, c.opt.echo)
	h.Write(scratch)
	h.Write(body) // last, so that it needs no length
	once := &kv.Once{Key: c.opt.idempotency}
	copy(once.Fingerprint[:], h.Sum(nil))
	return once
}

// apiEntry is e as JSON shows it, value included. It aliases e.Value.
func apiEntry(e *kv.Entry) api.Entry {
	a := api.Entry{Key: e.Key, Value: e.Value, CreateRevision: e.CreateRevision, ModRevision: e.ModRevision,
		Version: e.Version, Lease: e.Lease, Expires: unixMilli(e.Expires)}
	if a.Value == nil {
		a.Value = []byte{} // nil would leave it out
	}
	return a
}

func appendEntry(dst []byte, e *kv.Entry, value bool) []byte {
	a := apiEntry(e)
	if !value {
		a.Value = nil
	}
	return a.AppendJSON(dst)
}

// unixMilli is a label of the state as a time; zero for 0.
func unixMilli(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

// setExpires sets Kv-Expires, in the same form as `expires` has in JSON.
func setExpires(h http.Header, ms int64) {
	if ms != 0 {
		h["Kv-Expires"] = []string{unixMilli(ms).Format(time.RFC3339Nano)}
	}
}

// writeEntryJSON is writeEntry with the whole entry as the body.
func (c *apiCall) writeEntryJSON(e *kv.Entry, revision int64) {
	setRevisions(c.w.Header(), e.ModRevision, revision)
	c.w.Header()["Kv-Create-Revision"] = []string{strconv.FormatInt(e.CreateRevision, 10)}
	c.w.Header()["Kv-Version"] = []string{strconv.FormatInt(e.Version, 10)}
	setExpires(c.w.Header(), e.Expires)
	c.writeJSONEntry(http.StatusOK, e)
}

// writeJSONEntry sends a large value in pieces: its text can be six times as long.
func (c *apiCall) writeJSONEntry(status int, e *kv.Entry) {
	if len(e.Value) > wholeValue {
		shown := apiEntry(e)
		_ = c.onHeap(func(c *apiCall) error {
			p := c.startPieces(headerJSON)
			p.status = status
			p.entry(&shown)
			p.buf = append(p.buf, '\n')
			p.done()
			return nil
		})
		return
	}
	buf := c.api.buffers.Get().(*[]byte)
	defer c.api.putBuffer(buf)
	*buf = append(appendEntry((*buf)[:0], e, true), '\n')
	c.writeJSONBytes(status, *buf)
}

// writeJSONBytes answers with JSON that is encoded already.
func (c *apiCall) writeJSONBytes(status int, body []byte) {
	h := c.w.Header()
	h["Content-Type"] = headerJSON
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	c.safetyHeaders()
	c.writeHeader(status)
	_, _ = c.w.Write(body) // an error here means that the client left
}
