// The client port: routes, then the calls. Options, bodies, errors, metrics and
// the listener have files of their own.

package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"

	"pontoon/api"
	"pontoon/internal/watch"
	"pontoon/kv"
)

// backend is what the HTTP layer needs of the node. Every method may be called
// from any number of goroutines; those with a context return once it ends.
type backend interface {
	// propose carries out one command: it returns once the command is on disk at
	// a majority, committed and applied here. What c holds belongs to the
	// caller again after return.
	propose(ctx context.Context, c *kv.Command) (kv.Result, error)
	// sync waits until the local state is as fresh as o asks for, and
	// refuses a revision that cannot be read.
	sync(ctx context.Context, o readOptions) error
	get(ctx context.Context, key string, o readOptions) (kv.Entry, int64, error) // the entry, the revision that the read shows; errKeyNotFound
	// read calls f with the store as o asks for it. Without whole, f holds up
	// the writers and must be short: a page. With whole it may take its
	// time, on a copy-on-write clone.
	read(ctx context.Context, o readOptions, whole bool, f func(*kv.View) error) error
	history(ctx context.Context, o readOptions) (kv.History, error)
	lease(ctx context.Context, id int64, o readOptions) (leaseInfo, error) // errLeaseNotFound
	// subscribe begins a watch at the local state as it is: the watcher
	// receives every revision after that of the history. The view is nil
	// unless initial is set; it may be read as long as the caller likes.
	subscribe(f watch.Filter, initial bool) (*watch.Watcher, kv.History, *kv.View, error)

	members() []api.Member
	addMember(ctx context.Context, m memberSpec) (m2 api.Member, created bool, err error) // not created: the same id and URL were there
	removeMember(ctx context.Context, id uint64, force bool) error                        // an absent id: nil
	updateMember(ctx context.Context, id uint64, peerURL string) error
	promoteMember(ctx context.Context, id uint64) error
	transferLeader(ctx context.Context, to uint64) error

	leader() uint64                        // 0: unknown
	status(ctx context.Context) api.Status // what it cannot learn in time is left out
	checks(ctx context.Context) []check    // what /readyz asks; what has no answer in time is an error
	live(ctx context.Context) []check      // what /livez asks, likewise
}

type readOptions struct {
	stale       bool  // the local state as it is, without a round to the leader
	minRevision int64 // wait until the local state has reached it
	revision    int64 // 0: the present one
}

// leaseInfo is a lease at one moment.
type leaseInfo struct {
	kv.Lease
	remaining time.Duration
	keys      []string // attached to it, the first maxLeaseKeys
}

const maxLeaseKeys = 1_000

type memberSpec struct {
	ID      uint64 // 0: the cluster chooses
	PeerURL string
	Learner bool // it stays a learner until promoted by hand
}

// check is one line of a health answer; a nil err is health.
type check struct {
	name string
	err  error
}

// limits bounds what one client, and all of them together, can ask of a member.
type limits struct {
	MaxKeyBytes    int           // after percent-decoding
	MaxValueBytes  int64         // one value
	MaxInFlight    int           // requests waiting on the store; more get 429
	DefaultTimeout time.Duration // a call without timeout=
	MaxTimeout     time.Duration // the most timeout= may ask for
	MaxConns       int           // open client connections; and calls of HTTP/2, however many connections they share
	MaxBodyBytes   int64         // bodies under way, together
	MaxAnswerBytes int64         // answers under way, together; one larger than that is let through alone
	MaxExports     int           // exports under way; more get 429
	MaxTxnBytes    int64         // the body of a transaction, or of an import that is atomic or has an idempotency key
}

const (
	maxPeerURLBytes = 2 << 10  // a peer URL in a body
	maxJSONBytes    = 16 << 10 // a JSON body of the cluster calls
	minBodyBuffer   = 4 << 10
	maxPooledBuffer = 64 << 10 // larger body buffers are left to the collector

	bodyProgress  = 10 * time.Second // the longest pause inside a body
	drainTime     = time.Second      // for what is left of a body nobody reads
	maxDrainBytes = 8 << 20
)

// Header values shared by all responses; net/http only reads them.
var (
	headerRetryAfter  = []string{"1"}
	headerProblemJSON = []string{api.ProblemType}
	headerJSON        = []string{"application/json"}
	headerPlainText   = []string{"text/plain; charset=utf-8"}
	headerOctets      = []string{"application/octet-stream"}
	headerNosniff     = []string{"nosniff"}
	headerSandbox     = []string{"sandbox"}
	headerZero        = []string{"0"}
	headerOne         = []string{"1"}
	headerTrue        = []string{"true"}
	headerAccept      = []string{"Accept"}
	headerEcho        = []string{"return=representation"}
)

const classicGetFailed = "Failed to GET"

// httpAPI answers the client port. It routes by hand and not with
// http.ServeMux, which cleans paths and redirects: `//`, `.` and `..` are keys.
//
// The handler starts no goroutine, and holds no lock while it waits.
type httpAPI struct {
	b       backend
	l       limits
	m       *httpMetrics
	log     *zap.Logger
	metrics http.Handler
	origins http.CrossOriginProtection
	buffers sync.Pool // of *[]byte, for bodies

	exports, imports atomic.Int64 // under way
	streams          atomic.Int64 // calls of HTTP/2 under way, see limits.MaxConns
	deadlines        sharedDeadlines
	bodies           bodyRoom
	answers          answerRoom
}

// newHTTPAPI serves b within l; gather is what /metrics shows.
func newHTTPAPI(b backend, l limits, m *httpMetrics, gather prometheus.Gatherer, log *zap.Logger) http.Handler {
	a := &httpAPI{b: b, l: l, m: m, log: log}
	a.metrics = promhttp.HandlerFor(gather, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
	a.buffers.New = func() any {
		buf := make([]byte, 0, minBodyBuffer)
		return &buf
	}
	return a
}

// apiCall is one request on its way. It lives on the handler's stack; the calls
// that hand it on get a copy from onHeap.
type apiCall struct {
	api         *httpAPI
	w           http.ResponseWriter
	r           *http.Request
	route       route
	start       time.Time
	deadline    time.Time     // of the whole call, its body included
	readUntil   time.Time     // the read deadline in force; zero: none
	bodyPending bool          // some of the body may still be on its way
	status      int           // what was answered; 0: nothing yet
	counted     int           // what metrics say instead, if not 0
	room        int64         // of bodyRoom
	held        int64         // of answerRoom
	answered    time.Duration // of a watch: how long its answer took to begin; 0: count until the end

	read readOptions
	opt  callOptions
}

func (a *httpAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor > 1 {
		w = &streamWriter{ResponseWriter: w, deadlines: http.NewResponseController(w)}
		a.streams.Add(1)
		defer a.streams.Add(-1)
	}
	c := apiCall{api: a, w: w, r: r, start: time.Now(), bodyPending: r.ContentLength != 0}
	c.deadline = c.start.Add(a.l.DefaultTimeout)
	defer c.observe()
	if err := c.serve(); err != nil {
		c.fail(err)
	}
}

// observe ends a call, also while its handler panics; such a call counts as a 500.
func (c *apiCall) observe() {
	status := c.status
	if c.counted != 0 {
		status = c.counted
	} else if status == 0 {
		status = http.StatusInternalServerError
	}
	took := c.answered
	if took == 0 {
		took = time.Since(c.start)
	}
	c.api.m.observe(c.route, c.r.Method, status, took)
	if c.room > 0 {
		c.api.bodies.bytes.Add(-c.room)
	}
	if c.held > 0 {
		c.api.answers.give(c.held)
	}
}

// onHeap runs a call that keeps a pointer to its apiCall, in a closure or a
// stream, on a copy. Escape analysis is per variable: without the copy every
// plain GET and PUT would pay for the allocation too.
func (c *apiCall) onHeap(call func(*apiCall) error) error {
	moved := new(apiCall)
	*moved = *c
	defer func() { *c = *moved }() // also while call panics: observe wants the status
	return call(moved)
}

// serve answers, or returns the error to answer with and has written nothing.
func (c *apiCall) serve() error {
	path, ok := rawPath(c.r)
	if !ok {
		if methodIndex(c.r.Method) == 0 {
			return badMethod(routeKey)
		}
		return badRequest("the request target is no path; it starts with a slash")
	}
	rt, arg := resolve(c.r.Method, path)
	c.route = rt
	if err := c.api.origins.Check(c.r); err != nil {
		return &httpRefusal{err: errCrossOrigin, detail: err.Error()}
	}
	if c.r.ProtoMajor > 1 && rt < routeStatus && c.api.streams.Load() > int64(c.api.l.MaxConns) {
		return &httpRefusal{err: errOverloaded, detail: strconv.Itoa(c.api.l.MaxConns) + " calls of HTTP/2 are under way on this member, the limit"}
	}
	switch rt {
	case routeKey, routeKV:
		return c.serveKey(arg)
	case routeMember:
		return c.serveClassicMember(arg)
	case routeMembers, routeMemberID, routePromote, routeLeader:
		return c.serveCluster(arg)
	case routeStatus, routeLivez, routeReadyz, routeMetrics, routeOpenAPI:
		return c.serveHealth()
	case routeRange:
		return c.onHeap((*apiCall).serveRange)
	case routeTxn:
		return c.onHeap((*apiCall).serveTxn)
	case routeWatch:
		return c.onHeap((*apiCall).serveWatch)
	case routeLeases, routeLeaseID:
		return c.serveLeases(arg)
	case routeUnbuilt:
		return &httpRefusal{err: errUnsupported, detail: "this version does not serve " + strconv.Quote(path),
			hint: "an export is GET /v1/kv with Accept: application/x-ndjson; GET /v1/status shows the version of this member"}
	}
	return c.reservedPath(path[1:])
}

// rawPath is the path of the request target as it came, with its slash and
// without the query. The URL that net/http parsed would do for almost all
// targets; the bytes on the wire do for all. It reports false for `*`, for an
// authority (CONNECT), and for an absolute form that is not HTTP (RFC 9112,
// section 3.2).
func rawPath(r *http.Request) (string, bool) {
	target := r.RequestURI
	if target == "" { // a request that did not come through a server
		target = r.URL.EscapedPath()
	}
	target, _, _ = strings.Cut(target, "?")
	if strings.HasPrefix(target, "/") {
		return target, true
	}
	scheme, rest, found := strings.Cut(target, "://")
	if !found || !strings.EqualFold(scheme, "http") && !strings.EqualFold(scheme, "https") {
		return "", false
	}
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		return rest[i:], true
	}
	return "/", true
}

// resolve tells what a path that starts with a slash asks for, and its
// argument, still percent-encoded. Only the names of the contract, spelled
// without any encoding, are routes; all else at the root is a key or an id.
func resolve(method, path string) (route, string) {
	name := path[1:]
	if rest, ok := strings.CutPrefix(name, "v1/"); ok {
		return resolveV1(rest)
	}
	switch method {
	case http.MethodPost, http.MethodDelete:
		return routeMember, name
	case http.MethodPut:
		return routeKey, name
	}
	switch name {
	case "livez":
		return routeLivez, ""
	case "readyz":
		return routeReadyz, ""
	case "metrics":
		return routeMetrics, ""
	}
	return routeKey, name
}

func resolveV1(rest string) (route, string) {
	if key, ok := strings.CutPrefix(rest, "kv/"); ok {
		return routeKV, key
	}
	if id, ok := strings.CutPrefix(rest, "members/"); ok {
		if id, ok := strings.CutSuffix(id, "/promote"); ok {
			return routePromote, id
		}
		return routeMemberID, id
	}
	if id, ok := strings.CutPrefix(rest, "leases/"); ok {
		return routeLeaseID, id
	}
	switch rest {
	case "kv":
		return routeRange, ""
	case "txn":
		return routeTxn, ""
	case "watch":
		return routeWatch, ""
	case "leases":
		return routeLeases, ""
	case "openapi.json":
		return routeOpenAPI, ""
	case "members":
		return routeMembers, ""
	case "leader":
		return routeLeader, ""
	case "status":
		return routeStatus, ""
	case "snapshot":
		return routeUnbuilt, ""
	}
	return routeOther, ""
}

// allowed is the Allow header of each route. POST and DELETE at the root name
// members, so they are listed for a key as well.
var allowed = [routeCount]string{
	routeKey: "GET, HEAD, PUT, POST, DELETE", routeKV: "GET, HEAD, PUT, DELETE",
	routeMembers: "GET, HEAD, POST", routeMemberID: "PUT, DELETE", routePromote: "POST", routeLeader: "POST",
	routeRange: "GET, HEAD, POST, DELETE", routeTxn: "POST", routeWatch: "GET",
	routeLeases: "POST", routeLeaseID: "GET, HEAD, PUT, DELETE", routeOpenAPI: "GET, HEAD",
	routeStatus: "GET, HEAD", routeLivez: "GET, HEAD", routeReadyz: "GET, HEAD", routeMetrics: "GET, HEAD",
}

func badMethod(rt route) error {
	return &httpRefusal{err: errBadMethod, allow: allowed[rt]}
}

// isReserved is about the first segment of a decoded key at the root.
func isReserved(key string) bool {
	first, _, _ := strings.Cut(key, "/")
	switch first {
	case "v1", "v3", "version", "health", "livez", "readyz", "metrics", "ui", "debug":
		return true
	}
	return false
}

func (c *apiCall) reservedPath(raw string) error {
	c.route = routeOther
	key, err := decodeKey(raw)
	if err != nil {
		return err
	}
	return &httpRefusal{err: errNoSuchPath, detail: "the name is reserved for the server",
		hint: "a key of this name is reached as " + kvPath(key)}
}

// kvPath is the address of a key, for hints.
func kvPath(key string) string {
	if key == "" || len(key) > 128 {
		return "/v1/kv/NAME"
	}
	return "/v1/kv/" + strings.ReplaceAll(url.PathEscape(key), "%2F", "/")
}

// decodeKey undoes percent-encoding and nothing else: `+` stays a plus.
func decodeKey(raw string) (string, error) {
	if strings.IndexByte(raw, '%') < 0 {
		return raw, nil
	}
	key, err := url.PathUnescape(raw)
	if err != nil {
		return "", badRequest("the path is not valid percent-encoding: " + err.Error())
	}
	return key, nil
}

// serveClassicMember is POST and DELETE /{id}, raftexample's membership calls.
func (c *apiCall) serveClassicMember(raw string) error {
	key, err := decodeKey(raw)
	if err != nil {
		return err
	}
	if isReserved(key) {
		return c.reservedPath(raw)
	}
	id, ok := parseMemberID(key)
	if c.r.Method == http.MethodPost {
		if !ok {
			return &httpRefusal{err: errBadRequest, firstLine: "Failed on POST", detail: "the path is no member id",
				hint: "a key is written with PUT " + kvPath(key) + "; a member is added with POST /v1/members"}
		}
		return c.addClassicMember(id)
	}
	if !ok {
		return &httpRefusal{err: errBadRequest, firstLine: "Failed on DELETE", detail: "the path is no member id",
			hint: "a key is deleted with DELETE " + kvPath(key) + "; a member is removed with DELETE /v1/members/{id}"}
	}
	return c.removeMember(id)
}

// parseMemberID takes `[1-9][0-9]*` up to 64 bits. A leading zero is no id:
// whoever writes 010 may mean 8.
func parseMemberID(s string) (uint64, bool) {
	if s == "" || s[0] < '1' || s[0] > '9' {
		return 0, false
	}
	id, err := strconv.ParseUint(s, 10, 64)
	return id, err == nil
}

func (c *apiCall) addClassicMember(id uint64) error {
	if err := c.parseOptions(0); err != nil {
		return err
	}
	body, err := c.smallBody(maxPeerURLBytes)
	if err != nil {
		return err
	}
	peerURL := string(bytes.TrimSpace(body)) // an editor's or echo's last newline is no part of a URL
	if err := checkPeerURL(peerURL); err != nil {
		return err
	}
	return c.change(func(ctx context.Context) error {
		_, _, err := c.api.b.addMember(ctx, memberSpec{ID: id, PeerURL: peerURL})
		return err
	})
}

func (c *apiCall) removeMember(id uint64) error {
	if err := c.parseOptions(optForce); err != nil {
		return err
	}
	return c.change(func(ctx context.Context) error { return c.api.b.removeMember(ctx, id, c.opt.force) })
}

// change runs a cluster call within the limits and answers 204.
func (c *apiCall) change(do func(context.Context) error) error {
	if err := c.waiting(do); err != nil {
		return err
	}
	c.writeHeader(http.StatusNoContent)
	return nil
}

// waiting runs a call that waits on raft, within a slot and the deadline.
func (c *apiCall) waiting(do func(context.Context) error) error {
	if err := c.acquire(); err != nil {
		return err
	}
	defer c.release()
	ctx, cancel := context.WithDeadline(c.r.Context(), c.deadline)
	defer cancel()
	return do(ctx)
}

// checkPeerURL refuses what no member could dial. The member table has rules
// of its own; this one names the mistake before anything is proposed.
func checkPeerURL(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Port() == "" ||
		u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Path != "" && u.Path != "/" {
		return &httpRefusal{err: errBadRequest, detail: "the peer URL " + quoteShort(s) + " is not of the form http://HOST:PORT",
			hint: "give the address where the other members reach the new one, such as http://10.0.0.4:12379"}
	}
	return nil
}

// serveCluster answers /v1/members and below, and /v1/leader.
func (c *apiCall) serveCluster(arg string) error {
	method := c.r.Method
	if c.route == routeMembers {
		switch method {
		case http.MethodGet, http.MethodHead:
			return c.listMembers()
		case http.MethodPost:
			return c.addMember()
		}
		return badMethod(c.route)
	}
	if c.route == routeLeader {
		if method != http.MethodPost {
			return badMethod(c.route)
		}
		return c.transferLeader()
	}
	if !strings.Contains(allowed[c.route], method) || methodIndex(method) == 0 {
		return badMethod(c.route)
	}
	id, ok := parseMemberID(arg)
	if !ok {
		return &httpRefusal{err: errBadRequest, detail: quoteShort(arg) + " is no member id",
			hint: "an id is a decimal number without leading zeros; GET /v1/members lists them"}
	}
	switch {
	case c.route == routePromote:
		return c.promoteMember(id)
	case method == http.MethodPut:
		return c.updateMember(id)
	}
	return c.removeMember(id)
}

func (c *apiCall) listMembers() error {
	if err := c.parseOptions(0); err != nil {
		return err
	}
	list := api.MemberList{Members: c.api.b.members()}
	if list.Members == nil {
		list.Members = []api.Member{}
	}
	return c.writeJSON(http.StatusOK, list)
}

func (c *apiCall) addMember() error {
	var m memberSpec
	if err := c.parseOptions(0); err != nil {
		return err
	}
	err := c.readObject(map[string]any{"id": &m.ID, "peer_url": &m.PeerURL, "learner": &m.Learner}, "peer_url")
	if err != nil {
		return err
	}
	if err := checkPeerURL(m.PeerURL); err != nil {
		return err
	}
	var added api.Member
	created := false
	err = c.waiting(func(ctx context.Context) (err error) {
		added, created, err = c.api.b.addMember(ctx, m)
		return err
	})
	if err != nil {
		return err
	}
	c.w.Header()["Location"] = []string{"/v1/members/" + strconv.FormatUint(added.ID, 10)}
	if !created {
		return c.writeJSON(http.StatusOK, added)
	}
	return c.writeJSON(http.StatusCreated, added)
}

func (c *apiCall) updateMember(id uint64) error {
	var peerURL string
	if err := c.parseOptions(0); err != nil {
		return err
	}
	if err := c.readObject(map[string]any{"peer_url": &peerURL}, "peer_url"); err != nil {
		return err
	}
	if err := checkPeerURL(peerURL); err != nil {
		return err
	}
	return c.change(func(ctx context.Context) error { return c.api.b.updateMember(ctx, id, peerURL) })
}

func (c *apiCall) promoteMember(id uint64) error {
	if err := c.parseOptions(0); err != nil {
		return err
	}
	if body, err := c.smallBody(maxJSONBytes); err != nil {
		return err
	} else if len(bytes.TrimSpace(body)) != 0 {
		return badRequest("the body: a promotion takes none")
	}
	return c.change(func(ctx context.Context) error { return c.api.b.promoteMember(ctx, id) })
}

func (c *apiCall) transferLeader() error {
	var to uint64
	if err := c.parseOptions(0); err != nil {
		return err
	}
	if err := c.readObject(map[string]any{"to": &to}, "to"); err != nil {
		return err
	}
	return c.change(func(ctx context.Context) error { return c.api.b.transferLeader(ctx, to) })
}

// serveHealth answers what must work when nothing else does: none of it needs a
// slot, and where it waits, on the raft loop or for the read that /readyz tries, that is
// for a moment, and no longer than the call's deadline.
func (c *apiCall) serveHealth() error {
	if m := c.r.Method; m != http.MethodGet && m != http.MethodHead {
		return badMethod(c.route)
	}
	switch c.route {
	case routeMetrics:
		if err := c.parseOptions(0); err != nil {
			return err
		}
		rec := statusRecorder{ResponseWriter: c.w}
		c.api.metrics.ServeHTTP(&rec, c.r)
		c.status = rec.status
		return nil
	case routeStatus:
		if err := c.parseOptions(0); err != nil {
			return err
		}
		ctx, cancel := c.bounded()
		defer cancel()
		st := c.api.b.status(ctx)
		if st.Peers == nil {
			st.Peers = []api.Peer{}
		}
		return c.writeJSON(http.StatusOK, st)
	case routeOpenAPI:
		if err := c.parseOptions(0); err != nil {
			return err
		}
		c.writeJSONBytes(http.StatusOK, api.OpenAPI)
		return nil
	}
	if err := c.parseOptions(optVerbose); err != nil {
		return err
	}
	ctx, cancel := c.bounded()
	defer cancel()
	if c.route == routeLivez {
		c.writeChecks(c.api.b.live(ctx))
	} else {
		c.writeChecks(c.api.b.checks(ctx))
	}
	return nil
}

// writeChecks says `ok`, or what failed; verbose adds what did not.
func (c *apiCall) writeChecks(checks []check) {
	var text strings.Builder
	status := http.StatusOK
	for _, ck := range checks {
		switch {
		case ck.err != nil:
			status = http.StatusServiceUnavailable
			text.WriteString("[-]" + ck.name + " failed: " + ck.err.Error() + "\n")
		case c.opt.verbose:
			text.WriteString("[+]" + ck.name + " ok\n")
		}
	}
	if status == http.StatusOK && !c.opt.verbose {
		text.WriteString("ok\n")
	}
	h := c.w.Header()
	h["Content-Type"] = headerPlainText
	h["Cache-Control"] = []string{"no-store"}
	c.safetyHeaders()
	c.writeHeader(status)
	_, _ = io.WriteString(c.w, text.String())
}

// statusRecorder lends the response to promhttp and notes the status for metrics.
type statusRecorder struct {
	http.ResponseWriter
	status int
}

func (s *statusRecorder) WriteHeader(status int) {
	s.status = status
	s.ResponseWriter.WriteHeader(status)
}

func (s *statusRecorder) Write(p []byte) (int, error) {
	if s.status == 0 {
		s.status = http.StatusOK
	}
	return s.ResponseWriter.Write(p)
}

func (s *statusRecorder) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// acquire takes a slot among the requests that wait on the store.
func (c *apiCall) acquire() error {
	if n := c.api.m.inFlight.Add(1); n > int64(c.api.l.MaxInFlight) {
		c.api.m.inFlight.Add(-1)
		return errOverloaded
	}
	return nil
}

func (c *apiCall) release() { c.api.m.inFlight.Add(-1) }

func (c *apiCall) mutates() bool {
	return c.r.Method != http.MethodGet && c.r.Method != http.MethodHead
}
