package main

import (
	"context"
	"errors"
	"fmt"
	stdlog "log"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
)

// What a slow or silent client may cost. None of these bounds a whole request
// or response: a large body on a slow line, and a stream, live as long as
// they make progress.
const (
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 64 << 10         // a key of 4096 bytes is 12 KiB when percent-encoded
	writeProgress     = 30 * time.Second // the longest pause inside an answer
	writePiece        = 256 << 10        // what has to leave within one pause
	maxStreams        = 250              // of one HTTP/2 connection
)

// listenClient opens the client port. At most maxConns connections are open at
// once: then nothing is accepted until one closes, and newcomers wait in the
// kernel's queue, where they cost this process nothing. That holds for health
// probes too: a member that is full looks down to whoever connects anew. A
// connection that idles gives its place back after idleTimeout. Errors name the flag
// that the address came from.
func listenClient(addr, flag string, maxConns int) (net.Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3,
	}}
	l, err := lc.Listen(context.Background(), "tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("client port %s is taken: stop the process that listens there, or choose another with %s", addr, flag)
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("client port %s is not allowed for this user: choose one above 1023 with %s", addr, flag)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("client address %s is none of this machine: correct the host in %s", addr, flag)
	case err != nil:
		return nil, fmt.Errorf("client address %s cannot be used: %w; correct %s", addr, unwrapOp(err), flag)
	}
	return newBoundedListener(l, maxConns), nil
}

// fileReserve is how many descriptors are kept from clients: for the log, whose
// next segment is a matter of life, snapshots, and peers, of whose connections
// maxPeerConns come in and fewer go out.
const fileReserve = 2 * maxPeerConns

// connectionRoom is how many connections of clients, at most most, and of peers may
// be open under this process's limit of open files.
func connectionRoom(most int) (clients, peers int, err error) {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return 0, 0, fmt.Errorf("limit of open files: %w", err)
	}
	clients, peers = shareFiles(most, files.Cur)
	return clients, peers, nil
}

func shareFiles(most int, files uint64) (clients, peers int) {
	n := int(min(files, 1<<30))
	reserve := min(fileReserve, n/2)
	return max(min(most, n-reserve), 1), max(reserve/2, 1)
}

// boundedListener is a semaphore in front of Accept. slots has the capacity
// maxConns; when it is full, Accept waits until a connection or the listener
// closes.
type boundedListener struct {
	net.Listener
	wrap      func(c net.Conn, release func()) net.Conn // release gives the slot back
	slots     chan struct{}
	closed    chan struct{}
	closeOnce sync.Once
}

func newBoundedListener(l net.Listener, maxConns int) *boundedListener {
	return &boundedListener{Listener: l, slots: make(chan struct{}, max(maxConns, 1)), closed: make(chan struct{}),
		wrap: func(c net.Conn, release func()) net.Conn { return &clientConn{Conn: c, release: release} }}
}

// Accept hands errors on as they are: http.Server waits and tries again after
// those that pass by themselves, such as too many open files.
func (l *boundedListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return l.wrap(c, func() { <-l.slots }), nil
}

func (l *boundedListener) Close() error {
	l.closeOnce.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// placedConn gives its place back when it closes.
type placedConn struct {
	net.Conn
	closeOnce sync.Once
	release   func()
}

func (c *placedConn) Close() error {
	err := c.Conn.Close()
	c.closeOnce.Do(c.release)
	return err
}

// clientConn gives its place back when it closes, and ends when a writer is
// stuck because the client does not read.
//
// One goroutine writes at a time, because net/http serializes the writes of a
// connection, for HTTP/2 as well. Only the writer changes writeUntil, and reads it
// without the lock; whoever sets another deadline reads it under the lock.
type clientConn struct {
	net.Conn
	writeUntil time.Time
	mu         struct {
		sync.Mutex
		until time.Time // what a handler set; zero: nothing
	}
	closeOnce sync.Once
	release   func()
}

// Write arms the deadline anew only when half of it is gone, so that a stuck
// write ends after writeProgress at the latest and after half of it at the
// earliest, and most writes arm nothing.
func (c *clientConn) Write(p []byte) (int, error) {
	written := 0
	for {
		if now := time.Now(); c.writeUntil.Sub(now) < writeProgress/2 {
			if err := c.armWrite(now.Add(writeProgress)); err != nil {
				return written, err
			}
		}
		n, err := c.Conn.Write(p[:min(len(p), writePiece)])
		written += n
		p = p[n:]
		if err != nil || len(p) == 0 {
			return written, err
		}
	}
}

// armWrite sets the writer's deadline, or a handler's that comes before it.
func (c *clientConn) armWrite(until time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writeUntil = until
	if !c.mu.until.IsZero() && c.mu.until.Before(until) {
		until = c.mu.until
	}
	return c.Conn.SetWriteDeadline(until)
}

// SetWriteDeadline lets a handler end a write earlier than Write would: the
// earlier of both deadlines holds, also for a write that is stuck right now.
// The zero time, which net/http sets after each answer, leaves that of Write.
func (c *clientConn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.IsZero() && c.mu.until.IsZero() {
		return nil // after every answer
	}
	c.mu.until = t
	if t.IsZero() || c.writeUntil.Before(t) {
		t = c.writeUntil
	}
	return c.Conn.SetWriteDeadline(t)
}

// SetDeadline is that of net.Conn, for both halves.
func (c *clientConn) SetDeadline(t time.Time) error {
	if err := c.SetWriteDeadline(t); err != nil {
		return err
	}
	return c.Conn.SetReadDeadline(t)
}

// CloseWrite lets net/http end an answer before the connection: closing at
// once would reset it under a client that is still sending.
func (c *clientConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

func (c *clientConn) Close() error {
	err := c.Conn.Close()
	c.closeOnce.Do(c.release)
	return err
}

// newHTTPServer serves h over HTTP/1.1 and cleartext HTTP/2 (prior knowledge).
// It sets no total time for reading or writing, which would cut streams: the
// handlers bound bodies, the connections bound stuck writes.
func newHTTPServer(h http.Handler, log *zap.Logger) *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		Protocols:         &protocols,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ErrorLog:          newServerLog(log),
	}
}

// newServerLog takes what net/http has to say. Most of it is about clients
// that behave badly; a handler that panicked and a port that accepts nothing
// are for the operator.
func newServerLog(log *zap.Logger) *stdlog.Logger {
	return stdlog.New(serverLog{log}, "", 0)
}

type serverLog struct{ log *zap.Logger }

func (l serverLog) Write(p []byte) (int, error) {
	text := strings.TrimSpace(string(p))
	switch {
	case strings.Contains(text, "panic serving"):
		l.log.Error("a request handler panicked", zap.String("text", text))
	case strings.Contains(text, "Accept error"):
		l.log.Warn("no connection can be accepted; raise the limit of open files, or lower the number of clients", zap.String("text", text))
	default:
		l.log.Debug("http", zap.String("text", text))
	}
	return len(p), nil
}
