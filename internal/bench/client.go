package bench

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"time"
)

const (
	leastPause = 10 * time.Millisecond
	mostPause  = 200 * time.Millisecond
	maxStatus  = 1 << 20 // of an answer to /v1/status

	// Errors are asked for as JSON, for their codes; a value would be sent as JSON
	// only to whoever names application/json.
	acceptLine = "Accept: application/problem+json\r\n"
)

// client is one connection and the goroutine that owns it.
type client struct {
	r     *run
	ctx   context.Context // its end cuts what is under way
	at    int             // the endpoint in use
	conn  *conn           // nil: none yet, or the last one broke
	rng   *rand.Rand
	timer *time.Timer
	pause time.Duration // after the next failure
	head  []byte
	value []byte // of a watch's write
}

func (r *run) newClient(ctx context.Context, i int) *client {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return &client{r: r, ctx: ctx, at: i % len(r.o.Endpoints), rng: rand.New(rand.NewPCG(r.o.Seed, uint64(i))), timer: t}
}

func (c *client) close() {
	c.timer.Stop()
	c.drop()
}

// drop closes the connection, if there is one.
func (c *client) drop() {
	if c.conn != nil {
		c.conn.close()
		c.conn = nil
	}
}

// loop sends requests until the window ends.
func (c *client) loop() {
	defer c.close()
	for {
		began := c.r.now()
		if c.r.schedule.rate > 0 {
			began = c.r.schedule.take()
			if began >= c.r.rec.until() || !c.wait(began-c.r.now()) {
				return
			}
		}
		if c.r.now() >= c.r.rec.until() {
			return
		}
		if c.r.rec.inside(began) {
			c.r.rec.begun.Add(1)
		}
		c.request(began)
	}
}

// wait returns false if the run ended meanwhile.
func (c *client) wait(d time.Duration) bool {
	if d <= 0 {
		return true
	}
	c.timer.Reset(d)
	select {
	case <-c.timer.C:
		return true
	case <-c.r.stopped:
		return false
	}
}

// request sends one request that is to begin, or was to begin, at began.
func (c *client) request(began time.Duration) {
	k, key := kindPut, int64(0)
	if o := c.r.o; o.Op == opGet || o.Op == opMixed && c.rng.Float64() < o.Reads {
		k, key = kindGet, c.r.keys.read(c.rng)
	} else {
		key = c.r.keys.write(c.rng)
	}
	var a answer
	var bytes int64
	var err error
	if k == kindGet {
		a, err = c.get(key)
		bytes = a.bytes
	} else {
		value := c.r.values.draw(c.rng)
		if c.r.o.Op == opWatch {
			c.value = c.r.appendStamp(c.value[:0], began)
			value = append(c.value, value[stampSize:]...)
			c.value = value
		}
		a, err = c.put(key, value)
		bytes = int64(len(value))
	}
	done := c.r.now()
	name, text := c.name(a, err)
	if name != "" {
		c.r.rec.failure(done, name, text)
		c.wait(c.backoff(a, err))
		return
	}
	c.pause = 0
	c.r.rec.success(k, began, done, bytes)
	if c.r.o.Op == opWatch && c.r.rec.inside(began) {
		c.r.expected.Add(c.r.watchersOf(key))
	}
}

// backoff is how long to wait after a failure, so that a server that refuses is
// not asked as fast as it can refuse. A key that is not there is no reason.
func (c *client) backoff(a answer, err error) time.Duration {
	if err == nil && a.status < 500 && a.status != 429 {
		return 0
	}
	c.pause = min(max(2*c.pause, leastPause), mostPause)
	return c.pause
}

// name is what an answer or an error is counted as; empty for a success. The
// text is for the case that nothing succeeds.
func (c *client) name(a answer, err error) (name, text string) {
	var dial *dialError
	switch {
	case err == nil && a.status < 300:
		return "", ""
	case err == nil:
		name = strconv.Itoa(a.status)
		if a.code != "" {
			name += " " + string(a.code)
		}
		return name, ""
	case c.ctx.Err() != nil:
		return errorUnsettled, ""
	case errors.As(err, &dial):
		name = errorConnect
	case errors.Is(err, os.ErrDeadlineExceeded):
		name = errorTimeout
	case errors.Is(err, errMalformed):
		name = errorMalformed
	default:
		name = errorLost
	}
	return name, err.Error()
}

// dialError is a connection that did not come about.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// connect leaves c.at at the endpoint in use, or at the next after one
// that failed.
func (c *client) connect() error {
	if c.conn != nil {
		return nil
	}
	conn, err := dial(c.ctx, c.r.o.Endpoints[c.at], c.r.o.Timeout)
	if err != nil {
		c.next()
		return &dialError{err}
	}
	c.conn = conn
	return nil
}

func (c *client) next() { c.at = (c.at + 1) % len(c.r.o.Endpoints) }

func (c *client) put(key int64, value []byte) (answer, error) {
	if err := c.connect(); err != nil {
		return answer{}, err
	}
	b := c.r.keys.appendPath(append(c.head[:0], "PUT /v1/kv/"...), key)
	b = append(append(b, " HTTP/1.1\r\nHost: "...), c.r.o.Endpoints[c.at]...)
	b = strconv.AppendInt(append(b, "\r\n"+acceptLine+"Content-Length: "...), int64(len(value)), 10)
	c.head = append(b, "\r\n\r\n"...)
	return c.do(value)
}

func (c *client) get(key int64) (answer, error) {
	if err := c.connect(); err != nil {
		return answer{}, err
	}
	b := c.r.keys.appendPath(append(c.head[:0], "GET /v1/kv/"...), key)
	if c.r.o.Consistency == stale {
		b = append(b, "?consistency=stale"...)
	}
	b = append(append(b, " HTTP/1.1\r\nHost: "...), c.r.o.Endpoints[c.at]...)
	c.head = append(b, "\r\n"+acceptLine+"\r\n"...)
	return c.do(nil)
}

// do sends c.head. After an error the next request goes to the next endpoint.
func (c *client) do(body []byte) (answer, error) {
	a, err := c.conn.do(c.head, body)
	closes := c.conn.closes
	if err != nil || closes {
		c.drop()
	}
	if err != nil {
		c.next()
	}
	return a, err
}

// fetch gets a path outside the run: what it answered is read up to a bound.
func fetch(ctx context.Context, endpoint, path string, timeout time.Duration) (answer, []byte, error) {
	c, err := dial(ctx, endpoint, timeout)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err // without the address, which the caller has
		}
		return answer{}, nil, err
	}
	defer c.close()
	a, err := c.begin([]byte("GET "+path+" HTTP/1.1\r\nHost: "+endpoint+"\r\nConnection: close\r\n\r\n"), nil)
	if err != nil {
		return a, nil, err
	}
	body, err := io.ReadAll(io.LimitReader(&c.body, maxStatus))
	if err != nil {
		return a, nil, fmt.Errorf("read %s: %w", path, err)
	}
	return a, body, nil
}

// appendStamp appends what marks a value as written by this run at a time.
func (r *run) appendStamp(dst []byte, began time.Duration) []byte {
	dst = append(dst, r.nonce...)
	var b [8]byte
	for i := range b {
		b[i] = byte(began >> (56 - 8*i))
	}
	return hex.AppendEncode(dst, b[:])
}
