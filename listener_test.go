package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

var helloHandler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })

func TestPortTakenSaysWhatToDo(t *testing.T) {
	l, err := listenClient("127.0.0.1:0", "--listen-client", 4)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	addr := l.Addr().String()
	if _, err := listenClient(addr, "--listen-client", 4); err == nil || strings.Contains(err.Error(), "\n") ||
		!strings.Contains(err.Error(), addr+" is taken") || !strings.Contains(err.Error(), "with --listen-client") {
		t.Errorf("a taken port: %v", err)
	}
	for _, bad := range []string{"127.0.0.1:99999", "nonsense", "192.0.2.1:0"} {
		if _, err := listenClient(bad, "--listen-client", 4); err == nil || !strings.Contains(err.Error(), bad) || !strings.Contains(err.Error(), "--listen-client") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// flakyListener fails as accept(2) does when the process is out of files, and
// then works.
type flakyListener struct {
	net.Listener
	failures int // of the one accept loop
}

func (l *flakyListener) Accept() (net.Conn, error) {
	if l.failures > 0 {
		l.failures--
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return l.Listener.Accept()
}

func TestListenerSurvivesTooManyOpenFiles(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zapcore.DebugLevel)
	srv := newHTTPServer(helloHandler, zap.New(core))
	// More failures than slots: a failed accept must give its slot back.
	l := newBoundedListener(&flakyListener{Listener: inner, failures: 3}, 1)
	done := make(chan error)
	go func() { done <- srv.Serve(l) }()
	if a := exchange(t, inner.Addr().String(), "GET", "/", "", ""); a.body != "hello" {
		t.Errorf("answer %q", a.body)
	}
	srv.Close()
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("Serve: %v", err)
	}
	if n := logs.FilterLevelExact(zapcore.WarnLevel).FilterMessageSnippet("open files").Len(); n != 3 {
		t.Errorf("%d warnings, want 3", n)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	l, err := listenClient("127.0.0.1:0", "--listen-client", 2)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	for range 3 {
		dialRaw(t, l.Addr().String()) // the third waits in the kernel's queue
	}
	first, second := <-accepted, <-accepted
	slots := l.(*boundedListener).slots
	if len(slots) != 2 {
		t.Errorf("%d slots taken, want 2", len(slots))
	}
	select {
	case <-accepted:
		t.Error("a third connection was accepted")
	default:
	}
	first.Close()
	first.Close() // gives back one slot, not two
	third := <-accepted
	if len(slots) != 2 {
		t.Errorf("%d slots taken after a second Close, want 2", len(slots))
	}
	l.Close() // wakes an Accept that waits for a slot
	if _, open := <-accepted; open {
		t.Error("accepted after Close")
	}
	second.Close()
	third.Close()
}

func TestHeaderTimeout(t *testing.T) {
	for name, start := range map[string]string{"nothing": "", "half a line": "GET /k HT", "no end": "GET /k HTTP/1.1\r\nHost: h\r\n"} {
		t.Run(name, func(t *testing.T) {
			l, err := listenClient("127.0.0.1:0", "--listen-client", 4)
			if err != nil {
				t.Fatal(err)
			}
			srv := newHTTPServer(helloHandler, zap.NewNop())
			if srv.ReadHeaderTimeout <= 0 || srv.IdleTimeout <= 0 || srv.MaxHeaderBytes <= 0 || srv.ReadTimeout != 0 || srv.WriteTimeout != 0 {
				t.Errorf("limits of the server: %v %v %v %v %v", srv.ReadHeaderTimeout, srv.IdleTimeout, srv.MaxHeaderBytes, srv.ReadTimeout, srv.WriteTimeout)
			}
			srv.ReadHeaderTimeout = 20 * time.Millisecond
			go srv.Serve(l)
			defer srv.Close()
			c := dialRaw(t, l.Addr().String())
			c.send(start)
			if rest, err := io.ReadAll(c.r); err != nil || strings.Contains(string(rest), "hello") {
				t.Errorf("got %q, %v; want an end", rest, err)
			}
		})
	}
}

func TestIdleConnectionEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := pipeServer(t, helloHandler)
		c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		c.answer("GET")
		start := time.Now()
		_, err := c.r.ReadByte()
		if took := time.Since(start); err != io.EOF || took < idleTimeout || took > idleTimeout+idleSlack {
			t.Errorf("%v after %v, want an end after %v to %v", err, took, idleTimeout, idleTimeout+idleSlack)
		}
	})
}

func TestHeaderTooLarge(t *testing.T) {
	addr := serveTest(t, helloHandler)
	if a := exchange(t, addr, "GET", "/", "X-Large: "+strings.Repeat("x", 2*maxHeaderBytes)+"\r\n", ""); a.status != 431 {
		t.Errorf("status %d, want 431", a.status)
	}
}

func TestBothProtocols(t *testing.T) {
	addr := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto) }))
	for proto, client := range map[string]*http.Client{"HTTP/1.1": {Transport: &http.Transport{DisableKeepAlives: true}}, "HTTP/2.0": http2Client(t)} {
		resp, err := client.Get("http://" + addr)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(body) != proto {
			t.Errorf("served as %q, want %q", body, proto)
		}
	}
}

// A client that stops reading loses its connection after writeProgress; one
// that reads slowly keeps it.
func TestStuckWriteEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer client.Close()
		released := false
		c := &clientConn{Conn: server, release: func() { released = true }}
		start := time.Now()
		n, err := c.Write(make([]byte, 10))
		if took := time.Since(start); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) || took != writeProgress {
			t.Errorf("%d bytes, %v after %v", n, err, took)
		}
		c.Close()
		if !released {
			t.Error("Close did not give the slot back")
		}
	})
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		c := &clientConn{Conn: server, release: func() {}}
		defer c.Close()
		var wg sync.WaitGroup
		wg.Go(func() {
			for range 5 {
				<-time.After(writeProgress / 3)
				io.CopyN(io.Discard, client, writePiece)
			}
			client.Close()
		})
		if n, err := c.Write(make([]byte, 5*writePiece)); n != 5*writePiece || err != nil {
			t.Errorf("a slow reader got %d bytes: %v", n, err)
		}
		wg.Wait()
	})
}

// net/http lifts the write deadline after each answer; the next answer on the
// same connection must have one all the same.
func TestStuckSecondAnswerEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := pipeServer(t, helloHandler)
		c.SetDeadline(time.Time{})
		for range 2 {
			c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
			c.answer("GET")
		}
		c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		<-time.After(writeProgress + time.Second) // and read nothing
		if rest, _ := io.ReadAll(c.r); len(rest) != 0 {
			t.Errorf("the server waited longer than writeProgress, and then sent %q", rest)
		}
	})
}

// The earlier of two deadlines ends a write: that of Write, or a handler's,
// whether it was set before the write or while it is stuck.
func TestHandlerWriteDeadline(t *testing.T) {
	const never = -1
	for _, row := range []struct {
		name          string
		before, while time.Duration // the handler's deadline, set before and one second into the write; 0: not set
		lift          bool          // the handler's deadline is lifted before the write
		took          time.Duration
	}{
		{"none", 0, 0, false, writeProgress},
		{"before", 5 * time.Second, 0, false, 5 * time.Second},
		{"later than ours", time.Hour, 0, false, writeProgress},
		{"while stuck", 0, 5 * time.Second, false, 6 * time.Second},
		{"while stuck, past", 0, never, false, time.Second},
		{"while stuck, later than ours", 0, time.Hour, false, writeProgress},
		{"lifted", 5 * time.Second, 0, true, writeProgress},
		{"past and lifted", never, 0, true, writeProgress},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				defer client.Close()
				c := &clientConn{Conn: server, release: func() {}}
				defer c.Close()
				set := func(d time.Duration) {
					if err := c.SetWriteDeadline(time.Now().Add(d)); err != nil {
						t.Error(err)
					}
				}
				if row.before != 0 {
					set(row.before)
				}
				if row.lift {
					c.SetWriteDeadline(time.Time{})
				}
				if row.while != 0 {
					go func() { <-time.After(time.Second); set(row.while) }()
				}
				start := time.Now()
				if _, err := c.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != row.took {
					t.Errorf("%v after %v, want an end after %v", err, time.Since(start), row.took)
				}
			})
		})
	}
}

// Progress moves the deadline of Write, and never a handler's.
func TestHandlerWriteDeadlineStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer client.Close()
		c := &clientConn{Conn: server, release: func() {}}
		defer c.Close()
		start := time.Now()
		c.SetWriteDeadline(start.Add(2 * writeProgress))
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				<-time.After(writeProgress / 4)
				if _, err := io.CopyN(io.Discard, client, writePiece); err != nil {
					return
				}
			}
		})
		if _, err := c.Write(make([]byte, 50*writePiece)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != 2*writeProgress {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		client.Close()
		wg.Wait()
	})
}

// A write after a long silence starts with a whole deadline.
func TestWriteAfterSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		c := &clientConn{Conn: server, release: func() {}}
		defer c.Close()
		go io.Copy(io.Discard, client)
		for _, silence := range []time.Duration{0, time.Second, 20 * time.Second, time.Hour} {
			<-time.After(silence)
			if _, err := c.Write([]byte("x")); err != nil {
				t.Errorf("after %v: %v", silence, err)
			}
			if left := time.Until(c.writeUntil); left < writeProgress/2 {
				t.Errorf("after %v: %v left", silence, left)
			}
		}
	})
}

func TestServerLogLevels(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	log := newServerLog(zap.New(core))
	log.Print("http: panic serving 127.0.0.1:1: boom")
	log.Print("http: Accept error: too many open files; retrying in 5ms")
	log.Print("http: TLS handshake error")
	var levels []string
	for _, e := range logs.All() {
		levels = append(levels, e.Level.String())
	}
	if got := strings.Join(levels, " "); got != "error warn debug" {
		t.Errorf("levels %s", got)
	}
}

// The half-close of net/http has to reach the socket through our connection.
func TestCloseWriteReachesTheSocket(t *testing.T) {
	l, err := listenClient("127.0.0.1:0", "--listen-client", 1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client := dialRaw(t, l.Addr().String())
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := server.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.r.ReadByte(); err != io.EOF {
		t.Errorf("the client sees %v, want the end", err)
	}
	client.send("x")
	if _, err := server.Read(make([]byte, 1)); err != nil {
		t.Errorf("the other direction: %v", err)
	}
}

// Shutdown lets a call in flight finish.
func TestShutdownWaits(t *testing.T) {
	entered, leave := make(chan bool), make(chan bool)
	srv := newHTTPServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		entered <- true
		<-leave
		io.WriteString(w, "done")
	}), zap.NewNop())
	l, err := listenClient("127.0.0.1:0", "--listen-client", 4)
	if err != nil {
		t.Fatal(err)
	}
	go srv.Serve(l)
	c := dialRaw(t, l.Addr().String())
	c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	<-entered
	stopped := make(chan error)
	go func() { stopped <- srv.Shutdown(context.Background()) }()
	close(leave)
	if a := c.answer("GET"); a.body != "done" {
		t.Errorf("answer %q", a.body)
	}
	if err := <-stopped; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}
