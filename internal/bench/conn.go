package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"

	"pontoon/api"
)

// An HTTP/1.1 client for one connection and one request at a time (RFC 9112).
// net/http's Transport has two goroutines a connection, allocates 44 times a
// request and takes twice the processor time (BenchmarkClient: 21 µs, here 11), which
// on one machine is taken from the servers that are measured.
//
// It reads every answer that a server may give to a GET or PUT: of a length, in
// chunks, without a body or up to the end of the connection, after any number of
// interim answers. Whatever it cannot make sense of is an error, and a
// connection with an error is not used again.

const (
	dialTimeout  = 3 * time.Second
	readBuffer   = 4 << 10  // also the longest line of a head or of a chunk
	maxHeadLines = 256      // of all heads of one answer together
	maxProblem   = 16 << 10 // of an error's body that is looked at
	copiedBody   = 16 << 10 // larger bodies are not copied behind their head
)

var errMalformed = errors.New("the answer is not HTTP/1.1")

// conn belongs to one goroutine; only the end of its context reaches in from
// outside, by closing the socket.
type conn struct {
	c       net.Conn
	br      *bufio.Reader
	release func() bool // of the context
	timeout time.Duration
	until   time.Time // the deadline that is set
	body    bodyReader
	closes  bool // the server closes after this answer
	scratch []byte
}

// dial connects to host:port. The end of ctx closes the connection and with
// that ends what waits on it.
func dial(ctx context.Context, endpoint string, timeout time.Duration) (*conn, error) {
	d := net.Dialer{Timeout: min(dialTimeout, timeout)}
	nc, err := d.DialContext(ctx, "tcp", endpoint)
	if err != nil {
		return nil, err
	}
	return newConn(ctx, nc, timeout), nil
}

func newConn(ctx context.Context, nc net.Conn, timeout time.Duration) *conn {
	c := &conn{c: nc, br: bufio.NewReaderSize(nc, readBuffer), timeout: timeout}
	c.body.br = c.br
	c.release = context.AfterFunc(ctx, func() { _ = nc.Close() }) // nobody is left to tell
	return c
}

func (c *conn) close() {
	c.release()
	_ = c.c.Close() // what was to be read is read
}

// answer is what became of a request.
type answer struct {
	status   int
	code     api.Code // of the problem, where the answer is one
	bytes    int64    // of the body
	revision int64    // Kv-Revision; 0: none
}

// do sends a request whose head is complete, with its body, and reads the answer
// to its end.
func (c *conn) do(head, body []byte) (answer, error) {
	a, err := c.begin(head, body)
	if err != nil {
		return a, err
	}
	if a.status >= 400 {
		a.code, err = c.problem()
	}
	if err == nil {
		err = c.body.discard()
	}
	a.bytes = c.body.read
	return a, err
}

// begin sends a request and reads the head of its answer; the body is to be
// read next, from c.body.
//
// A server may answer and close before it has read a large body. So a failed
// write is an error only where there is no answer either.
func (c *conn) begin(head, body []byte) (answer, error) {
	if err := c.arm(); err != nil {
		return answer{}, err
	}
	var werr error
	if len(body) > copiedBody {
		pieces := net.Buffers{head, body}
		_, werr = pieces.WriteTo(c.c)
	} else {
		c.scratch = append(append(c.scratch[:0], head...), body...)
		_, werr = c.c.Write(c.scratch)
	}
	a, err := c.readHead()
	if werr != nil {
		c.closes = true
		if err != nil {
			err = werr
		}
	}
	return a, err
}

// arm sets a deadline that leaves at least the timeout and at most a quarter
// more, so that most requests set none.
func (c *conn) arm() error {
	now := time.Now()
	if c.until.Sub(now) >= c.timeout {
		return nil
	}
	c.until = now.Add(c.timeout + c.timeout/4)
	return c.c.SetDeadline(c.until)
}

// readHead reads up to the body of the final answer.
func (c *conn) readHead() (a answer, err error) {
	for lines := 0; ; {
		line, err := c.line()
		if err != nil {
			return a, err
		}
		if a.status, c.closes, err = parseStatus(line); err != nil {
			return a, err
		}
		length, chunked := int64(-1), false
		for {
			if lines++; lines > maxHeadLines {
				return a, fmt.Errorf("%w: more than %d header lines", errMalformed, maxHeadLines)
			}
			if line, err = c.line(); err != nil {
				return a, err
			}
			if len(line) == 0 {
				break
			}
			if err = c.header(line, &a, &length, &chunked); err != nil {
				return a, err
			}
		}
		if a.status < 200 {
			if a.status == 101 {
				return a, fmt.Errorf("%w: 101 to a request that asked for no other protocol", errMalformed)
			}
			continue
		}
		switch {
		case a.status == 204 || a.status == 304:
			c.body.start(0, false)
		case chunked:
			c.body.start(0, true)
		case length >= 0:
			c.body.start(length, false)
		default:
			c.closes = true
			c.body.start(-1, false)
		}
		return a, nil
	}
}

// header takes one line of a head. Few names matter, and their lengths differ
// from those of most others.
func (c *conn) header(line []byte, a *answer, length *int64, chunked *bool) error {
	colon := bytes.IndexByte(line, ':')
	if colon <= 0 {
		return fmt.Errorf("%w: header line %.60q", errMalformed, line)
	}
	name, value := line[:colon], bytes.Trim(line[colon+1:], " \t")
	switch len(name) {
	case len("Connection"):
		if equalFold(name, "connection") && containsToken(value, "close") {
			c.closes = true
		}
	case len("Kv-Revision"):
		if equalFold(name, "kv-revision") {
			a.revision, _ = strconv.ParseInt(string(value), 10, 64) // 0 where it is none
		}
	case len("Content-Length"):
		if !equalFold(name, "content-length") {
			break
		}
		n, ok := parseDigits(value)
		if !ok || *length >= 0 && *length != n {
			return fmt.Errorf("%w: Content-Length %.60q", errMalformed, value)
		}
		*length = n
	case len("Transfer-Encoding"):
		if !equalFold(name, "transfer-encoding") {
			break
		}
		if !equalFold(value, "chunked") || *chunked {
			return fmt.Errorf("%w: Transfer-Encoding %.60q", errMalformed, value)
		}
		*chunked = true
	}
	return nil
}

// problem reads the code of an error, if its body has one.
func (c *conn) problem() (api.Code, error) {
	b, err := io.ReadAll(io.LimitReader(&c.body, maxProblem))
	if err != nil {
		return "", err
	}
	var p struct {
		Code api.Code `json:"code"`
	}
	if len(b) == 0 || b[0] != '{' || json.Unmarshal(b, &p) != nil {
		return "", nil // text, or something between us and the server
	}
	return p.Code, nil
}

// line reads one line without its end.
func (c *conn) line() ([]byte, error) { return readLine(c.br) }

func readLine(br *bufio.Reader) ([]byte, error) {
	line, err := br.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return nil, fmt.Errorf("%w: a line of more than %d bytes", errMalformed, readBuffer)
	case err == io.EOF:
		return nil, io.ErrUnexpectedEOF
	case err != nil:
		return nil, err
	}
	line = line[:len(line)-1]
	if n := len(line); n > 0 && line[n-1] == '\r' {
		line = line[:n-1]
	}
	return line, nil
}

// parseStatus reads `HTTP/1.1 204 No Content`; an answer of HTTP/1.0 is the last
// of its connection.
func parseStatus(line []byte) (status int, closes bool, err error) {
	const shape = "HTTP/1.1 204"
	if len(line) < len(shape) || string(line[:7]) != "HTTP/1." || line[8] != ' ' || line[7] != '0' && line[7] != '1' ||
		len(line) > len(shape) && line[len(shape)] != ' ' {
		return 0, false, fmt.Errorf("%w: it begins with %.60q", errMalformed, line)
	}
	n, ok := parseDigits(line[9:12])
	if !ok || n < 100 {
		return 0, false, fmt.Errorf("%w: it begins with %.60q", errMalformed, line)
	}
	return int(n), line[7] == '0', nil
}

func parseDigits(b []byte) (n int64, ok bool) {
	if len(b) == 0 || len(b) > 18 {
		return 0, false
	}
	for _, d := range b {
		if d < '0' || d > '9' {
			return 0, false
		}
		n = n*10 + int64(d-'0')
	}
	return n, true
}

// equalFold compares in ASCII; lower is in lower case.
func equalFold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i, x := range b {
		if 'A' <= x && x <= 'Z' {
			x |= 0x20
		}
		if x != lower[i] {
			return false
		}
	}
	return true
}

func containsToken(list []byte, lower string) bool {
	for token := range bytes.SplitSeq(list, []byte{','}) {
		if equalFold(bytes.Trim(token, " \t"), lower) {
			return true
		}
	}
	return false
}

// bodyReader is the body of one answer, without its framing.
type bodyReader struct {
	br      *bufio.Reader
	left    int64 // of the body, or of the chunk; -1: up to the end of the connection
	chunked bool
	inChunk bool // a chunk's line was read, and its end was not
	done    bool
	read    int64 // bytes so far
}

func (b *bodyReader) start(length int64, chunked bool) {
	*b = bodyReader{br: b.br, left: length, chunked: chunked, done: length == 0 && !chunked}
}

// Read implements io.Reader.
func (b *bodyReader) Read(p []byte) (int, error) {
	if err := b.advance(); err != nil {
		return 0, err
	}
	if b.left > 0 && int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.br.Read(p)
	b.take(int64(n))
	return n, b.ended(err)
}

// discard reads the rest.
func (b *bodyReader) discard() error {
	for {
		err := b.advance()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		piece := min(b.left, 1<<30)
		if piece < 0 {
			piece = readBuffer
		}
		n, err := b.br.Discard(int(piece))
		b.take(int64(n))
		if err = b.ended(err); err != nil && err != io.EOF {
			return err
		}
	}
}

func (b *bodyReader) take(n int64) {
	b.read += n
	if b.left > 0 {
		b.left -= n
		b.done = b.left == 0 && !b.chunked
	}
}

// ended says what the end of the connection means at this place.
func (b *bodyReader) ended(err error) error {
	switch {
	case err != io.EOF:
		return err
	case b.left < 0:
		b.done = true
		return io.EOF
	}
	return io.ErrUnexpectedEOF
}

// advance returns io.EOF at the end of the body; before it there are bytes to
// read now.
func (b *bodyReader) advance() error {
	switch {
	case b.done:
		return io.EOF
	case !b.chunked || b.left > 0:
		return nil
	}
	if b.inChunk {
		line, err := readLine(b.br)
		if err != nil {
			return err
		}
		if len(line) != 0 {
			return fmt.Errorf("%w: a chunk is longer than it says", errMalformed)
		}
	}
	line, err := readLine(b.br)
	if err != nil {
		return err
	}
	if b.left, err = parseChunkSize(line); err != nil || b.left > 0 {
		b.inChunk = true
		return err
	}
	for lines := 0; ; lines++ { // trailers
		line, err := readLine(b.br)
		switch {
		case err != nil:
			return err
		case len(line) == 0:
			b.done = true
			return io.EOF
		case lines == maxHeadLines:
			return fmt.Errorf("%w: more than %d trailers", errMalformed, maxHeadLines)
		}
	}
}

func parseChunkSize(line []byte) (int64, error) {
	digits, _, _ := bytes.Cut(line, []byte{';'}) // extensions mean nothing here
	digits = bytes.TrimRight(digits, " \t")
	n, err := strconv.ParseUint(string(digits), 16, 62)
	if err != nil {
		return 0, fmt.Errorf("%w: chunk size %.60q", errMalformed, line)
	}
	return int64(n), nil
}
