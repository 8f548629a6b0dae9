package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// net/http is made for handlers of any kind, and its bookkeeping costs more than
// a read of a key: a goroutine that watches the connection for each request, a
// context, maps of headers, four deadlines. So a connection starts on a
// short path of its own, for requests that need none of that: GET and PUT
// of a key in HTTP/1.1 with headers that change nothing. Every other request is
// given to net/http, with the connection and for the rest of its life: there
// is no way back, so neither side has to agree with the other on where a
// request ends.
//
// The short path reads only what it is sure of. It has no refusals of its own: a
// request that it does not understand to the last byte is net/http's. What
// answers is the same handler, httpAPI, on both paths.

const (
	fastBuffer  = 4 << 10        // of a connection, for the head of a request and what came with it
	fastMaxBody = 64 << 10       // larger ones are net/http's
	fastInline  = 16 << 10       // a larger body of an answer is written by itself
	fastKeep    = 2 * fastInline // larger buffers for answers are left to the collector
	fastUnsized = 64 << 10       // of an answer whose length the handler does not say; such are refusals, which are short
	idleSlack   = idleTimeout / 2
)

var errUnsized = errors.New("the answer has no Content-Length and is too large to be kept until it ends; set one, or leave the request to net/http")

// clientServer serves the client port on both paths.
type clientServer struct {
	handler http.Handler
	slow    *http.Server
	handoff *handoffListener
	log     *zap.Logger

	mu struct {
		sync.Mutex
		conns   map[*fastConn]struct{}
		l       net.Listener
		stopped bool
	}
	closing atomic.Bool
	ended   chan struct{} // capacity 1: a connection has ended
}

func newClientServer(h http.Handler, log *zap.Logger) *clientServer {
	s := &clientServer{handler: h, slow: newHTTPServer(h, log), log: log, ended: make(chan struct{}, 1),
		handoff: &handoffListener{conns: make(chan net.Conn), closed: make(chan struct{})}}
	s.mu.conns = map[*fastConn]struct{}{}
	return s
}

// Serve accepts connections until Shutdown or Close; then it returns
// http.ErrServerClosed.
func (s *clientServer) Serve(l net.Listener) error {
	s.mu.Lock()
	s.mu.l = l
	stopped := s.mu.stopped
	s.mu.Unlock()
	if stopped {
		return errors.Join(http.ErrServerClosed, l.Close())
	}
	s.handoff.addr = l.Addr()
	slow := make(chan error, 1)
	// goroutine: client-server
	go func() { slow <- s.slow.Serve(s.handoff) }()
	err := s.accept(l)
	if s.closing.Load() {
		return http.ErrServerClosed
	}
	s.handoff.Close()
	<-slow // it ends because handoff is closed, and has nothing to add
	return err
}

func (s *clientServer) accept(l net.Listener) error {
	var pause time.Duration
	for {
		c, err := l.Accept()
		if err != nil {
			// What passes by itself, such as too many open files, is waited for.
			if t, ok := err.(interface{ Temporary() bool }); ok && t.Temporary() && !s.closing.Load() {
				pause = min(max(2*pause, 5*time.Millisecond), time.Second)
				s.log.Warn("no connection can be accepted; raise the limit of open files, or lower the number of clients", zap.Error(err))
				<-time.After(pause)
				continue
			}
			return err
		}
		pause = 0
		f := &fastConn{server: s, conn: c}
		if !s.add(f) {
			_ = c.Close() // nothing was read from it
			continue
		}
		// goroutine: client-connection
		go f.serve()
	}
}

func (s *clientServer) add(f *fastConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.stopped {
		return false
	}
	s.mu.conns[f] = struct{}{}
	return true
}

func (s *clientServer) remove(f *fastConn) {
	s.mu.Lock()
	delete(s.mu.conns, f)
	s.mu.Unlock()
	select {
	case s.ended <- struct{}{}:
	default: // Shutdown will look anyway
	}
}

// stop closes the listener and the connections for which of holds.
func (s *clientServer) stop(of func(*fastConn) bool) (err error) {
	s.closing.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.mu.stopped && s.mu.l != nil {
		err = s.mu.l.Close()
	}
	s.mu.stopped = true
	for f := range s.mu.conns { // order: does not matter, all that wait are closed
		if of(f) {
			_ = f.conn.Close() // it ends its goroutine, which removes it
		}
	}
	return err
}

func (s *clientServer) open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.mu.conns)
}

// Shutdown lets in no more requests, and waits until those under way are
// answered, or ctx ends.
//
// net/http shuts down last, because it drops what it is handed after that. Until
// then it answers what it has, and closes each connection behind the answer.
func (s *clientServer) Shutdown(ctx context.Context) error {
	err := s.stop((*fastConn).quit)
	s.slow.SetKeepAlivesEnabled(false)
	for s.open() > 0 && ctx.Err() == nil {
		select {
		case <-s.ended:
		case <-ctx.Done():
		}
	}
	s.handoff.Close()
	return errors.Join(err, ctx.Err(), s.slow.Shutdown(ctx))
}

// Close ends all connections at once.
func (s *clientServer) Close() error {
	err := s.stop(func(*fastConn) bool { return true })
	s.handoff.Close()
	return errors.Join(err, s.slow.Close())
}

// handoffListener gives net/http the connections that the short path leaves.
type handoffListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	addr   net.Addr
}

func (l *handoffListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *handoffListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *handoffListener) Addr() net.Addr { return l.addr }

// give hands over a connection, with what was read from it and the error that
// ended that, if one did.
func (l *handoffListener) give(c net.Conn, read []byte, err error) {
	c = newReplayedConn(c, read, err)
	select {
	case l.conns <- c:
	case <-l.closed:
		_ = c.Close() // the server ends
	}
}

// replayedConn begins with bytes that were read before. It keeps the methods of
// *clientConn, which net/http and the handlers look for.
type replayedConn struct {
	*clientConn
	read []byte
	err  error // behind read; nil: what the connection has
}

func newReplayedConn(c net.Conn, read []byte, err error) net.Conn {
	cc, ok := c.(*clientConn)
	if !ok {
		cc = &clientConn{Conn: c, release: func() {}}
	}
	return &replayedConn{cc, slices.Clone(read), err}
}

func (c *replayedConn) Read(p []byte) (int, error) {
	switch {
	case len(c.read) == 0 && c.err != nil:
		return 0, c.err
	case len(c.read) == 0:
		return c.clientConn.Read(p)
	}
	n := copy(p, c.read)
	if c.read = c.read[n:]; len(c.read) == 0 {
		c.read = nil
	}
	return n, nil
}

// States of a connection, for Shutdown.
const (
	connWaits int32 = iota // for a request; it may be closed
	connBusy               // a request is under way, here or on its way to net/http
	connQuits              // Shutdown closes it
)

// fastConn is one connection on the short path. One goroutine owns it, but for
// state.
type fastConn struct {
	server *clientServer
	conn   net.Conn
	state  atomic.Int32

	in     []byte // read, not yet consumed: in[at:]
	at     int
	armed  time.Time // the read deadline in force
	buf    []byte    // behind in
	out    []byte    // the answer's head, and its body if that is short
	body   []byte    // of an answer whose length the handler did not say
	req    *http.Request
	unread int       // of the request's body
	until  time.Time // for reading the body
	header http.Header
	names  []string // scratch, to sort the header
	status int
	wrote  bool  // the head is in out, or further
	ends   bool  // no request can follow: the body was cut short, or Shutdown has begun
	broken error // what a write met; nothing more is written
}

func (c *fastConn) quit() bool { return c.state.CompareAndSwap(connWaits, connQuits) }

// serve answers requests until the connection ends or goes to net/http.
func (c *fastConn) serve() {
	keep := false
	defer func() {
		if p := recover(); p != nil {
			keep = false
			if p != http.ErrAbortHandler {
				c.server.log.Error("a request handler panicked", zap.Any("reason", p), zap.Stack("stack"))
			}
		}
		if !keep {
			_ = c.conn.Close() // the client has all that it will get
		}
		c.server.remove(c) // last: Shutdown waits for it
	}()
	c.buf = make([]byte, fastBuffer)
	c.in = c.buf[:0]
	w := firstRequest
	for {
		head, plain, err := c.readHead(w)
		if err != nil && len(c.in)-c.at < w.begun || !c.state.CompareAndSwap(connWaits, connBusy) {
			return // nothing was asked, or Shutdown was first
		}
		if !plain {
			keep = true
			c.server.handoff.give(c.conn, c.in[c.at:], err)
			return
		}
		c.at += head
		c.server.handler.ServeHTTP((*fastWriter)(c), c.req)
		if !c.finish() {
			return
		}
		c.state.Store(connWaits)
		if c.server.closing.Load() {
			return
		}
		w = laterRequest
	}
}

// requestWait is how a request is waited for.
type requestWait struct {
	wait, slack time.Duration
	begun       int // bytes, with which it has begun
}

// Until its first request a connection has not shown what it is. Later ones have
// begun where they have for net/http, which looks for 4 bytes.
var (
	firstRequest = requestWait{readHeaderTimeout, 0, 1}
	laterRequest = requestWait{idleTimeout, idleSlack, 4}
)

// readHead waits for a whole head and returns its length. It is not plain where
// net/http has to look at it; nothing of it is consumed then. An error is one of
// reading: net/http has answers to some heads that it cuts short.
func (c *fastConn) readHead(w requestWait) (head int, plain bool, err error) {
	if c.at == len(c.in) {
		c.in, c.at = c.buf[:0], 0
	}
	var until time.Time // a head has its own time, from its first byte on
	searched := 0
	for {
		pending := c.in[c.at:]
		if i := bytes.Index(pending[searched:], headEnd); i >= 0 {
			head = searched + i + len(headEnd)
			return head, c.parse(pending[:head]), nil
		}
		if len(pending) < w.begun {
			c.arm(time.Now().Add(w.wait), w.slack)
		} else {
			searched = max(0, len(pending)-len(headEnd)+1)
			if len(pending) == fastBuffer || !maybePlain(pending) {
				return 0, false, nil
			}
			if until.IsZero() {
				until = time.Now().Add(readHeaderTimeout)
			}
			c.arm(until, 0)
		}
		if len(c.in) == cap(c.in) { // what is left of an earlier read moves to the front
			n := copy(c.buf, pending)
			c.in, c.at = c.buf[:n], 0
		}
		n, err := c.conn.Read(c.in[len(c.in):cap(c.in)])
		c.in = c.in[:len(c.in)+n]
		if err != nil && n == 0 {
			return 0, false, err
		}
	}
}

// arm lets reads end between until and until+slack. With slack, most reads find a
// deadline in force that will do, and set none.
func (c *fastConn) arm(until time.Time, slack time.Duration) {
	if c.armed.Before(until) || c.armed.After(until.Add(slack)) {
		c.armed = until.Add(slack)
		_ = c.conn.SetReadDeadline(c.armed) // fails only on a closed connection, and so does the read
	}
}

var headEnd = []byte("\r\n\r\n")

// maybePlain says that a head which begins so can become a plain one. Others
// go to net/http before they are complete, because it may answer then: a wrong
// line is wrong before the head ends, and for net/http it also ends in \n\n.
func maybePlain(head []byte) bool {
	var h plainHead
	end := bytes.LastIndexByte(head, '\n') + 1
	return hasPlainMethod(head) && (end == 0 || h.scan(head[:end]))
}

func hasPlainMethod(head []byte) bool {
	n := min(len(head), len("GET /"))
	return string(head[:n]) == "GET /"[:n] || string(head[:n]) == "PUT /"[:n]
}

// plainHead is what the lines of a head say.
type plainHead struct {
	put          bool
	target, host []byte // of the head; nil: not yet
	length       []byte // Content-Length; nil: none
	bytes        int    // what it says
}

// parse reads a whole head into c.req, and reports whether it is plain.
func (c *fastConn) parse(head []byte) bool {
	var h plainHead
	if !h.scan(head[:len(head)-len(headEnd)/2]) || h.host == nil || h.put && h.length == nil {
		return false
	}
	c.begin(h.put, string(h.target), h.host, h.bytes)
	return true
}

// scan reads complete lines, and reports whether all of them are plain.
func (h *plainHead) scan(lines []byte) bool {
	line, rest, ok := bytes.Cut(lines, headEnd[:2])
	if !ok || !hasPlainMethod(line) || len(line) < len("GET / HTTP/1.1") {
		return false
	}
	h.put = line[0] == 'P'
	if h.target, ok = bytes.CutSuffix(line[len("GET "):], []byte(" HTTP/1.1")); !ok || !isPlainTarget(h.target) {
		return false
	}
	for len(rest) > 0 {
		if line, rest, ok = bytes.Cut(rest, headEnd[:2]); !ok || !h.scanField(line) {
			return false
		}
	}
	return true
}

func (h *plainHead) scanField(line []byte) bool {
	name, value, ok := bytes.Cut(line, []byte(":"))
	value = bytes.Trim(value, " ")
	if !ok || !isVisible(value) {
		return false
	}
	switch lowerName(name) {
	case "host":
		if h.host != nil || !isPlainHost(value) {
			return false
		}
		h.host = value
	case "content-length":
		if h.length != nil || !h.put {
			return false
		}
		h.length = value
		h.bytes = parseLength(value)
		return h.bytes >= 0
	case "accept":
		return string(value) == "*/*"
	case "connection":
		return string(value) == "keep-alive"
	case "user-agent", "accept-encoding", "accept-language", "content-type", "cache-control", "pragma",
		"x-request-id", "traceparent", "tracestate": // change nothing
	default:
		return false
	}
	return true
}

// lowerName spells a header's name in small letters, without an allocation; ""
// if it is none that the short path knows.
func lowerName(name []byte) string {
	var low [16]byte
	if len(name) > len(low) {
		return ""
	}
	for i, b := range name {
		if 'A' <= b && b <= 'Z' {
			b += 'a' - 'A'
		}
		low[i] = b
	}
	for _, known := range plainHeaders {
		if string(low[:len(name)]) == known {
			return known
		}
	}
	return ""
}

var plainHeaders = []string{"host", "content-length", "user-agent", "accept", "content-type", "accept-encoding", "connection",
	"accept-language", "cache-control", "pragma", "x-request-id", "traceparent", "tracestate"}

// isPlainTarget: a key at the root or under /v1/kv/, spelled so that net/http
// would take it as it is.
func isPlainTarget(t []byte) bool {
	if t[0] != '/' || bytes.HasPrefix(t, []byte("/v1/")) && !bytes.HasPrefix(t, []byte("/v1/kv/")) {
		return false
	}
	for i, b := range t {
		switch {
		case 'a' <= b && b <= 'z', 'A' <= b && b <= 'Z', '0' <= b && b <= '9':
		case strings.IndexByte("/-_.~?=&:@!$'()*+,;", b) >= 0:
		case b == '%' && i+2 < len(t) && isHex(t[i+1]) && isHex(t[i+2]):
		default:
			return false
		}
	}
	path, query, _ := bytes.Cut(t, []byte("?"))
	switch string(path) {
	case "/metrics", "/livez", "/readyz":
		return false // they write through net/http's own features
	}
	for len(query) > 0 {
		var piece []byte
		piece, query, _ = bytes.Cut(query, []byte("&"))
		name, _, _ := bytes.Cut(piece, []byte("="))
		switch string(name) {
		case "", "consistency", "min_revision", "revision", "ttl", "lease":
		default:
			// history= streams, and with timeout= a call may wait long: net/http
			// notices a client that leaves. An option to come may do either.
			return false
		}
	}
	return true
}

func isHex(b byte) bool {
	return '0' <= b && b <= '9' || 'a' <= b && b <= 'f' || 'A' <= b && b <= 'F'
}

func isVisible(value []byte) bool {
	for _, b := range value {
		if b < ' ' || b > '~' {
			return false
		}
	}
	return true
}

func isPlainHost(host []byte) bool {
	for _, b := range host {
		if !('a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' || strings.IndexByte("-_.:[]", b) >= 0) {
			return false
		}
	}
	return len(host) > 0
}

// parseLength reads a Content-Length up to fastMaxBody; -1 for all else.
func parseLength(digits []byte) int {
	if len(digits) == 0 || len(digits) > len("65536") {
		return -1
	}
	n := 0
	for _, b := range digits {
		if b < '0' || b > '9' {
			return -1
		}
		n = 10*n + int(b-'0')
	}
	if n > fastMaxBody {
		return -1
	}
	return n
}

// begin prepares c.req and the writer. The request is the same one for each on the
// connection: httpAPI keeps none.
func (c *fastConn) begin(put bool, target string, host []byte, length int) {
	if c.req == nil {
		c.req = &http.Request{Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, URL: &url.URL{}, Header: http.Header{},
			Body: (*fastBody)(c), RemoteAddr: c.conn.RemoteAddr().String()}
		c.header = make(http.Header, 8)
	}
	r := c.req
	if r.Method = http.MethodGet; put {
		r.Method = http.MethodPut
	}
	if r.Host != string(host) { // mostly it is the one before
		r.Host = string(host)
	}
	r.RequestURI, r.ContentLength = target, int64(length)
	r.URL.Path, r.URL.RawQuery, _ = strings.Cut(target, "?")
	c.unread, c.until = length, time.Time{}
	clear(c.header)
	c.status, c.wrote, c.ends, c.broken = 0, false, false, nil
	c.out, c.body = c.out[:0], c.body[:0]
}

// fastBody is the request's body.
type fastBody fastConn

func (b *fastBody) Read(p []byte) (int, error) {
	c := (*fastConn)(b)
	if c.unread == 0 {
		return 0, io.EOF
	}
	p = p[:min(len(p), c.unread)]
	n := copy(p, c.in[c.at:])
	c.at += n
	var err error
	if n == 0 {
		if !c.until.IsZero() {
			c.arm(c.until, 0)
		}
		n, err = c.conn.Read(p)
	}
	c.unread -= n
	switch {
	case c.unread == 0:
		return n, io.EOF
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (b *fastBody) Close() error { return nil }

// fastWriter is the http.ResponseWriter.
type fastWriter fastConn

func (w *fastWriter) Header() http.Header { return w.header }

// SetReadDeadline bounds the reading of the body (http.ResponseController).
func (w *fastWriter) SetReadDeadline(t time.Time) error {
	w.until = t
	return nil
}

func (w *fastWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
}

func (w *fastWriter) Write(p []byte) (int, error) {
	c := (*fastConn)(w)
	w.WriteHeader(http.StatusOK)
	switch {
	case c.broken != nil:
		return 0, c.broken
	case c.header["Content-Length"] == nil && len(c.body)+len(p) > fastUnsized:
		c.broken = errUnsized
		c.server.log.Error("an answer was dropped", zap.String("target", c.req.RequestURI), zap.Error(errUnsized))
		return 0, c.broken
	case c.header["Content-Length"] == nil:
		c.body = append(c.body, p...)
		return len(p), nil
	case !c.wrote:
		c.appendHead()
	}
	if len(c.out)+len(p) <= fastInline {
		c.out = append(c.out, p...)
		return len(p), nil
	}
	if err := c.flush(); err != nil {
		return 0, err
	}
	n, err := c.conn.Write(p)
	if err != nil {
		c.broken = err
	}
	return n, err
}

func (c *fastConn) flush() error {
	if len(c.out) > 0 && c.broken == nil {
		_, c.broken = c.conn.Write(c.out)
	}
	c.out = c.out[:0]
	return c.broken
}

// finish sends what is left of the answer. It reports whether the connection can
// serve another request.
func (c *fastConn) finish() bool {
	(*fastWriter)(c).WriteHeader(http.StatusOK)
	if !c.wrote {
		if c.status >= 200 && c.status != http.StatusNoContent && c.status != http.StatusNotModified && c.header["Content-Length"] == nil {
			c.header["Content-Length"] = []string{strconv.Itoa(len(c.body))}
		}
		c.appendHead()
		c.out = append(c.out, c.body...)
	}
	if c.flush() != nil {
		return false
	}
	if cap(c.out) > fastKeep {
		c.out = nil
	}
	if cap(c.body) > fastKeep {
		c.body = nil
	}
	return !c.ends
}

// drain reads what the handler has left of the body, and reports whether the next
// request begins behind it.
func (c *fastConn) drain() bool {
	if c.unread > 0 && c.until.IsZero() {
		c.until = time.Now().Add(drainTime)
	}
	for c.unread > 0 {
		var scratch [512]byte
		if _, err := (*fastBody)(c).Read(scratch[:]); err != nil && err != io.EOF {
			return false
		}
	}
	return true
}

// appendHead writes status line and header fields, in the order of their names. The
// body is read before, so that the head can say whether the connection ends.
func (c *fastConn) appendHead() {
	c.wrote = true
	c.ends = !c.drain() || c.server.closing.Load()
	b := append(c.out, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(c.status), 10)
	b = append(b, ' ')
	b = append(b, http.StatusText(c.status)...)
	b = append(b, "\r\nDate: "...)
	b = append(b, httpDate(time.Now())...)
	c.names = c.names[:0]
	for name := range c.header { // order: sorted below
		c.names = append(c.names, name)
	}
	slices.Sort(c.names)
	for _, name := range c.names {
		for _, value := range c.header[name] {
			b = append(b, '\r', '\n')
			b = append(b, name...)
			b = append(b, ": "...)
			if strings.ContainsAny(value, "\r\n") {
				value = strings.NewReplacer("\r", " ", "\n", " ").Replace(value)
			}
			b = append(b, value...)
		}
	}
	if c.ends {
		b = append(b, "\r\nConnection: close"...)
	}
	c.out = append(b, headEnd...)
}

// dateText is the Date header of one second.
type dateText struct {
	second int64
	text   string
}

var lastDate atomic.Pointer[dateText]

func httpDate(now time.Time) string {
	d := lastDate.Load()
	if s := now.Unix(); d == nil || d.second != s {
		d = &dateText{s, now.UTC().Format(http.TimeFormat)}
		lastDate.Store(d)
	}
	return d.text
}
