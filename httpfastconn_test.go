package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"pontoon/kv"
)

// The life of a connection on the short path: deadlines, ends, hand-overs and
// what one costs. Most of it runs in synctest bubbles, whose clock costs no time
// and which fail if a goroutine is left.

const (
	plainGet = "GET /k HTTP/1.1\r\nHost: h\r\n\r\n"
	plainPut = "PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
	slowGet  = "GET /k HTTP/1.1\r\nHost: h\r\nX-Odd: 1\r\n\r\n" // goes to net/http
)

// fastServer is a clientServer over connections in memory.
type fastServer struct {
	*clientServer
	t      *testing.T
	l      *memListener
	served chan error
}

// startFast has to be stopped by Close or Shutdown before the bubble ends.
func startFast(t *testing.T, h http.Handler, log *zap.Logger) *fastServer {
	s := &fastServer{newClientServer(h, log), t, newMemListener(), make(chan error, 1)}
	go func() { s.served <- s.Serve(newBoundedListener(s.l, 500)) }()
	return s
}

func (s *fastServer) dial() *rawConn {
	c := s.l.dial()
	s.t.Cleanup(func() { c.Close() })
	return &rawConn{s.t, c, bufio.NewReader(c)}
}

// stop closes the server, and fails unless all of it has ended.
func (s *fastServer) stop() {
	s.t.Helper()
	if err := s.Close(); err != nil {
		s.t.Errorf("Close: %v", err)
	}
	if err := <-s.served; !errors.Is(err, http.ErrServerClosed) {
		s.t.Errorf("Serve: %v", err)
	}
	synctest.Wait()
	if n := s.open(); n != 0 {
		s.t.Errorf("%d connections are left", n)
	}
}

// end waits until the server has closed the connection, and returns when that was
// and what came before.
func (c *rawConn) end(since time.Time) (time.Duration, string) {
	rest, err := io.ReadAll(c.r)
	if err != nil {
		c.t.Errorf("the connection ended with %v", err)
	}
	return time.Since(since), string(rest)
}

// pathHandler says which path a request took.
var pathHandler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	path := "slow"
	if _, ok := w.(*fastWriter); ok {
		path = "fast"
	}
	_, _ = io.WriteString(w, path)
})

func (c *rawConn) wantPath(request, path string) {
	c.t.Helper()
	c.send(request)
	if a := c.answer("GET"); a.body != path {
		c.t.Errorf("%.40q took the path %q, want %q", request, a.body, path)
	}
}

func TestFastDeadlines(t *testing.T) {
	const second = time.Second
	for _, row := range []struct {
		name        string
		send        []string        // piece by piece
		pauses      []time.Duration // before each piece
		least, most time.Duration   // from the first pause to the end of the connection
		got         int             // answers
	}{
		{"nothing", nil, nil, readHeaderTimeout, readHeaderTimeout, 0},
		{"a first byte late", []string{"G"}, []time.Duration{9 * second}, 19 * second, 19 * second, 1}, // net/http's 400
		{"a line that trickles", strings.Split(plainGet[:15], ""), slicesOf(15, second), 11 * second, 11 * second, 1},
		{"a head that trickles", append([]string{plainGet[:17]}, strings.Split("Host: example", "")...), slicesOf(14, second), 11 * second, 11 * second, 0},
		{"a head that trickles for net/http", append([]string{slowGet[:26], slowGet[26:36]}, strings.Split("Host: example", "")...), append([]time.Duration{0, 9 * second}, slicesOf(13, second)...), 19 * second, 19 * second, 0},
		{"idle", []string{plainGet}, []time.Duration{0}, idleTimeout, idleTimeout + idleSlack, 1},
		{"idle late", []string{plainGet, plainGet}, []time.Duration{0, idleTimeout - second}, 2*idleTimeout - second, 2*idleTimeout - second + idleSlack, 2},
		{"a second head that trickles", append([]string{plainGet}, strings.Split(plainGet[:20], "")...), append([]time.Duration{0, 100 * second}, slicesOf(19, second)...), 113 * second, 113 * second, 2},
		{"idle after a head in pieces", []string{plainGet[:15], plainGet[15:]}, []time.Duration{0, 9 * second}, 9*second + idleTimeout, 9*second + idleTimeout + idleSlack, 1},
		{"idle after a body in pieces", []string{plainPut[:50], plainPut[50:]}, []time.Duration{0, 4 * second}, 4*second + idleTimeout, 4*second + idleTimeout + idleSlack, 1},
		{"three bytes", []string{plainGet, "GET"}, []time.Duration{0, second}, idleTimeout, second + idleTimeout + idleSlack, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := startFast(t, newTestAPI(&fakeBackend{}, testLimits()), zap.NewNop())
				defer s.stop()
				c := s.dial()
				start := time.Now()
				var sending sync.WaitGroup
				defer sending.Wait()
				sending.Go(func() {
					for i, piece := range row.send {
						<-time.After(row.pauses[i])
						if _, err := io.WriteString(c, piece); err != nil {
							return // it has ended
						}
					}
				})
				took, rest := c.end(start)
				if got := strings.Count(rest, "HTTP/1.1 "); took < row.least || took > row.most || got != row.got {
					t.Errorf("ended after %v with %d answers, want %v to %v, and %d", took, got, row.least, row.most, row.got)
				}
			})
		})
	}
}

func slicesOf(n int, d time.Duration) []time.Duration {
	all := make([]time.Duration, n)
	for i := range all {
		all[i] = d
	}
	return all
}

// A connection that is used stays, however long that is.
func TestFastConnectionStaysWhileUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startFast(t, pathHandler, zap.NewNop())
		defer s.stop()
		c := s.dial()
		c.wantPath(plainGet, "fast")
		for range 30 {
			<-time.After(idleTimeout - time.Second)
			if c.wantPath(plainGet, "fast"); t.Failed() {
				return
			}
			c.wantPath(plainPut, "fast")
		}
	})
}

// The time of one head does not count for the next, which begins in the same
// piece and waits while the first is answered.
func TestFastHeadTimeIsItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startFast(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { <-time.After(3 * readHeaderTimeout) }), zap.NewNop())
		defer s.stop()
		c := s.dial()
		c.send(plainGet[:20])
		<-time.After(time.Second)
		c.send(plainGet[20:] + plainGet[:20])
		c.answer("GET")
		<-time.After(time.Second)
		c.send(plainGet[20:])
		c.answer("GET")
	})
}

// Connections that never finish a head all end, on whichever path they are.
func TestFastSlowLoris(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startFast(t, pathHandler, zap.NewNop())
		defer s.stop()
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 200 {
			c := s.dial()
			wg.Go(func() {
				head := []string{plainGet, slowGet, "GET /k HTTP/1.1\r\nX-Odd: ", "PUT /" + strings.Repeat("k", 5000)}[i%4]
				for _, b := range head[:len(head)-4] {
					if _, err := c.Write([]byte{byte(b)}); err != nil {
						return
					}
					<-time.After(time.Second)
				}
			})
			wg.Go(func() { io.Copy(io.Discard, c) })
		}
		wg.Wait()
		if took := time.Since(start); took > 2*readHeaderTimeout+time.Second {
			t.Errorf("the last ended after %v", took)
		}
		synctest.Wait()
		if n := s.open(); n != 0 {
			t.Errorf("%d are open", n)
		}
	})
}

// A client that does not read its answers loses the connection.
func TestFastStuckWriteEnds(t *testing.T) {
	for _, size := range []int{10, fastInline - 1000, 4 * fastInline} {
		synctest.Test(t, func(t *testing.T) {
			s := startFast(t, newTestAPI(&fakeBackend{value: make([]byte, size)}, testLimits()), zap.NewNop())
			defer s.stop()
			c := s.dial()
			c.send(plainGet)
			<-time.After(writeProgress + time.Second)
			synctest.Wait()
			if n := s.open(); n != 0 {
				t.Errorf("%d bytes: the connection is open", size)
			}
		})
	}
}

func TestFastShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leave := make(chan bool)
		s := startFast(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut {
				<-leave
			}
			pathHandler(w, r)
		}), zap.NewNop())
		fresh, idle, half, slowIdle, busy, slowBusy := s.dial(), s.dial(), s.dial(), s.dial(), s.dial(), s.dial()
		idle.wantPath(plainGet, "fast")
		half.send(plainGet[:20])
		slowIdle.wantPath(slowGet, "slow")
		busy.send(plainPut + plainGet) // the second is never let in
		slowBusy.send("PUT /k HTTP/1.1\r\nHost: h\r\nX-Odd: 1\r\nContent-Length: 5\r\n\r\nhello" + plainGet)
		synctest.Wait()

		start := time.Now()
		done := make(chan error, 1)
		go func() { done <- s.Shutdown(t.Context()) }()
		for i, c := range []*rawConn{fresh, idle, half, slowIdle} {
			if took, rest := c.end(start); took != 0 || rest != "" {
				t.Errorf("waiting connection %d ended after %v with %q, want at once", i, took, rest)
			}
		}
		<-time.After(5 * time.Second)
		select {
		case err := <-done:
			t.Fatalf("Shutdown did not wait: %v", err)
		default:
		}
		close(leave)
		for i, c := range []*rawConn{busy, slowBusy} {
			a := c.answer("PUT")
			if took, rest := c.end(start); a.body != []string{"fast", "slow"}[i] || !a.closes || rest != "" || took != 5*time.Second {
				t.Errorf("busy connection %d: %+v, then %q after %v", i, a, rest, took)
			}
		}
		if err := <-done; err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		s.stop()
	})
}

// An answer that began before Shutdown does not say that the connection ends, but
// it does.
func TestFastShutdownWithinAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startFast(t, newTestAPI(&fakeBackend{value: make([]byte, 4*fastInline)}, testLimits()), zap.NewNop())
		c := s.dial()
		c.send(plainGet)
		synctest.Wait() // the answer is stuck in its write
		start := time.Now()
		done := make(chan error, 1)
		go func() { done <- s.Shutdown(t.Context()) }()
		synctest.Wait()
		if a := c.answer("GET"); len(a.body) != 4*fastInline {
			t.Errorf("%d bytes", len(a.body))
		}
		if took, rest := c.end(start); took != 0 || rest != "" {
			t.Errorf("ended after %v with %q", took, rest)
		}
		if err := <-done; err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		s.stop()
	})
}

// A body that the handler leaves unread does not become the next request, and is
// waited for only so long.
func TestFastUnreadBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startFast(t, helloHandler, zap.NewNop())
		defer s.stop()
		c := s.dial()
		c.send(fmt.Sprintf("PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s", fastMaxBody, strings.Repeat("x", fastMaxBody)))
		if a := c.answer("PUT"); a.body != "hello" || a.closes {
			t.Errorf("a whole body: %+v", a)
		}
		start := time.Now()
		c.send(plainPut[:len(plainPut)-2])
		a := c.answer("PUT")
		if took, rest := c.end(start); a.body != "hello" || !a.closes || took != drainTime || rest != "" {
			t.Errorf("a part of a body: %+v, then %q after %v", a, rest, took)
		}
	})
}

// A request that is stuck holds Shutdown up until its context ends, and Close
// ends the connection.
func TestFastShutdownGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leave := make(chan bool)
		s := startFast(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-leave }), zap.NewNop())
		c := s.dial()
		c.send(plainGet)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		start := time.Now()
		if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 3*time.Second {
			t.Errorf("Shutdown: %v after %v", err, time.Since(start))
		}
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if took, rest := c.end(start); rest != "" || took != 3*time.Second {
			t.Errorf("the connection ended after %v with %q", took, rest)
		}
		close(leave)
		s.stop()
	})
}

// A server that has ended lets nobody in, and a connection that it accepts all the
// same is closed.
func TestFastServeAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newClientServer(pathHandler, zap.NewNop())
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		l := newMemListener()
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("Serve: %v", err)
		}
		if _, err := l.Accept(); err == nil {
			t.Error("the listener is open")
		}
	})
	synctest.Test(t, func(t *testing.T) {
		s := startFast(t, pathHandler, zap.NewNop())
		synctest.Wait()
		s.mu.Lock()
		s.mu.stopped = true
		s.mu.Unlock()
		c := s.dial()
		if took, _ := c.end(time.Now()); took != 0 {
			t.Errorf("closed after %v", took)
		}
		s.mu.Lock()
		s.mu.stopped = false
		s.mu.Unlock()
		s.stop()
	})
}

// A connection on its way to net/http carries a request: Shutdown waits until net/http
// has it or its context ends, and Close does not.
func TestFastHandOverDuringShutdown(t *testing.T) {
	for _, end := range []string{"taken", "closed", "canceled"} {
		synctest.Test(t, func(t *testing.T) {
			s := newClientServer(pathHandler, zap.NewNop()) // and net/http does not take any yet
			client, server := newDuplex()
			f := &fastConn{server: s, conn: server}
			s.add(f)
			go f.serve()
			if _, err := io.WriteString(client, slowGet); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			stopped := make(chan error, 1)
			go func() { stopped <- s.Shutdown(ctx) }()
			synctest.Wait()
			if end == "taken" {
				select {
				case err := <-stopped:
					t.Errorf("Shutdown has left a connection behind: %v", err)
				default:
				}
				c, err := s.handoff.Accept()
				if err != nil {
					t.Fatal(err)
				}
				read := make([]byte, 2*len(slowGet))
				if n, err := c.Read(read); string(read[:n]) != slowGet || err != nil {
					t.Errorf("net/http reads %q, %v", read[:n], err)
				}
				go func() { _, _ = io.WriteString(c, "answer"); c.Close() }()
				if all, err := io.ReadAll(client); err != nil || string(all) != "answer" {
					t.Errorf("the client reads %q, %v", all, err)
				}
			} else {
				if end == "closed" {
					s.Close()
				} else {
					cancel()
				}
				if all, err := io.ReadAll(client); err != nil || len(all) != 0 {
					t.Errorf("%s: the client reads %q, %v", end, all, err)
				}
			}
			if err := <-stopped; errors.Is(err, context.Canceled) != (end == "canceled") || err != nil && end != "canceled" {
				t.Errorf("%s: Shutdown: %v", end, err)
			}
			client.Close()
			s.Close()
		})
	}
}

// Whatever moment Shutdown begins at, a request that has reached the handler is
// answered.
func TestFastShutdownAnswersWhatItLetIn(t *testing.T) {
	for i := range 40 {
		entered := make(chan bool, 1)
		l, err := listenClient("127.0.0.1:0", "--listen-client", 4)
		if err != nil {
			t.Fatal(err)
		}
		s := newClientServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			entered <- true
			pathHandler(w, r)
		}), zap.NewNop())
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		c := dialRaw(t, l.Addr().String())
		request := []string{plainGet, slowGet}[i%2]
		go func() { _, _ = io.WriteString(c, request) }()
		for range i {
			runtime.Gosched()
		}
		if err := s.Shutdown(t.Context()); err != nil {
			t.Fatalf("Shutdown: %v", err)
		}
		all, _ := io.ReadAll(c.r)
		select {
		case <-entered:
			if !bytes.Contains(all, []byte("HTTP/1.1 200")) {
				t.Errorf("run %d: no answer: %q", i, all)
			}
		default:
		}
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("Serve: %v", err)
		}
	}
}

func TestFastPanics(t *testing.T) {
	for _, row := range []struct {
		reason any
		logs   int
	}{{"boom", 1}, {http.ErrAbortHandler, 0}} {
		synctest.Test(t, func(t *testing.T) {
			core, logs := observer.New(zapcore.DebugLevel)
			s := startFast(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPut {
					w.Header()["Content-Length"] = []string{"3"}
					_, _ = io.WriteString(w, "par")
					panic(row.reason)
				}
				pathHandler(w, r)
			}), zap.New(core))
			defer s.stop()
			other, c := s.dial(), s.dial()
			other.wantPath(plainGet, "fast")
			c.send(plainPut)
			if took, rest := c.end(time.Now()); took != 0 || rest != "" {
				t.Errorf("%v: ended after %v with %q, want at once with nothing", row.reason, took, rest)
			}
			other.wantPath(plainGet, "fast")
			synctest.Wait()
			if n := s.open(); n != 1 {
				t.Errorf("%v: %d connections, want 1", row.reason, n)
			}
			entries := logs.FilterLevelExact(zapcore.ErrorLevel).FilterMessage("a request handler panicked").All()
			if len(entries) != row.logs || logs.Len() != row.logs {
				t.Fatalf("%v: %d lines in the log, want %d", row.reason, logs.Len(), row.logs)
			}
			if row.logs > 0 && !strings.Contains(fmt.Sprint(entries[0].ContextMap()), "TestFastPanics") {
				t.Errorf("the log does not say where: %v", entries[0].ContextMap())
			}
		})
	}
}

// An answer without a length is kept until it ends, so it is bounded.
func TestFastUnsizedAnswers(t *testing.T) {
	for _, row := range []struct {
		pieces, answers, logs int
	}{{64, 1, 0}, {65, 0, 1}} {
		synctest.Test(t, func(t *testing.T) {
			core, logs := observer.New(zapcore.DebugLevel)
			s := startFast(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				for range row.pieces {
					if n, err := w.Write(make([]byte, fastUnsized/64)); err != nil && n != 0 {
						t.Errorf("%d bytes with %v", n, err)
					}
				}
			}), zap.New(core))
			defer s.stop()
			c := s.dial()
			c.send(plainGet)
			if row.answers == 0 {
				if took, rest := c.end(time.Now()); took != 0 || rest != "" {
					t.Errorf("too large: ended after %v with %d bytes", took, len(rest))
				}
			} else if a := c.answer("GET"); len(a.body) != fastUnsized || a.closes {
				t.Errorf("%d bytes of %d, closes %v", len(a.body), fastUnsized, a.closes)
			}
			synctest.Wait()
			for f := range s.mu.conns {
				if cap(f.out) > fastKeep || cap(f.body) > fastKeep {
					t.Errorf("an idle connection keeps buffers of %d and %d bytes", cap(f.out), cap(f.body))
				}
			}
			if logs.Len() != row.logs {
				t.Errorf("%d pieces: %d lines in the log", row.pieces, logs.Len())
			}
		})
	}
}

// Failures of Accept that pass are waited for; others end Serve.
func TestFastAcceptErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.DebugLevel)
		s := newClientServer(pathHandler, zap.New(core))
		l := newMemListener()
		served := make(chan error, 1)
		start := time.Now()
		go func() { served <- s.Serve(newBoundedListener(&flakyListener{Listener: l, failures: 10}, 1)) }()
		client := l.dial() // returns once it is accepted
		if took := time.Since(start); took != 3275*time.Millisecond {
			t.Errorf("accepted after %v, want 5 ms doubled 7 times, then 1 s twice", took)
		}
		if n := logs.FilterLevelExact(zapcore.WarnLevel).FilterMessageSnippet("open files").Len(); n != 10 {
			t.Errorf("%d warnings, want 10", n)
		}
		client.Close()
		l.Close()
		if err := <-served; !errors.Is(err, net.ErrClosed) || strings.Contains(err.Error(), "\n") {
			t.Errorf("Serve: %v, want the listener's error", err)
		}
		s.Close()
	})
}

// The bound on connections counts those of both paths, and what ends on either
// gives its place back.
func TestFastConnectionsAreBounded(t *testing.T) {
	l, err := listenClient("127.0.0.1:0", "--listen-client", 2)
	if err != nil {
		t.Fatal(err)
	}
	s := newClientServer(pathHandler, zap.NewNop())
	go s.Serve(l)
	defer s.Close()
	addr, slots := l.Addr().String(), l.(*boundedListener).slots
	fast, slow := dialRaw(t, addr), dialRaw(t, addr)
	fast.wantPath(plainGet, "fast")
	slow.wantPath(slowGet, "slow")
	if len(slots) != 2 {
		t.Errorf("%d places taken, want 2", len(slots))
	}
	third, fourth := dialRaw(t, addr), dialRaw(t, addr)
	slow.Close()
	third.wantPath(plainPut, "fast")
	third.wantPath(slowGet, "slow")
	third.wantPath(plainGet, "slow") // there is no way back
	fast.Close()
	fourth.wantPath(plainGet, "fast")
	if len(slots) != 2 {
		t.Errorf("%d places taken at the end, want 2", len(slots))
	}
}

// Requests that wait are counted and refused beyond the limit as on net/http.
func TestFastInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := testLimits()
		l.MaxInFlight = 1
		leave := make(chan bool)
		a := newTestAPI(&fakeBackend{onGet: func(context.Context) error { <-leave; return nil }}, l)
		s := startFast(t, a, zap.NewNop())
		defer s.stop()
		first, second := s.dial(), s.dial()
		first.send(plainGet)
		synctest.Wait()
		if n := a.m.inFlight.Load(); n != 1 {
			t.Errorf("%d in flight, want 1", n)
		}
		for _, request := range []string{plainGet, plainPut} {
			second.send(request)
			if got := second.answer("GET"); got.status != 429 || got.closes || got.header.Get("Retry-After") != "1" {
				t.Errorf("%.10q beyond the limit: %+v", request, got)
			}
		}
		close(leave)
		if got := first.answer("GET"); got.status != 200 {
			t.Errorf("the first: %+v", got)
		}
		second.send(plainPut)
		if got := second.answer("PUT"); got.status != 204 || a.m.inFlight.Load() != 0 {
			t.Errorf("afterwards: %+v, %d in flight", got, a.m.inFlight.Load())
		}
	})
}

// idleBytes is what one idle connection costs the server, after a get of a value
// and a put of it.
func idleBytes(t testing.TB, start func(http.Handler, *zap.Logger) httpServer, size, n int) int64 {
	l, err := listenClient("127.0.0.1:0", "--listen-client", n)
	if err != nil {
		t.Fatal(err)
	}
	srv := start(newTestAPI(&fakeBackend{value: make([]byte, size)}, testLimits()), zap.NewNop())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	defer func() {
		srv.Close()
		<-served
	}()
	put := []byte(fmt.Sprintf("PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n", size) + strings.Repeat("v", size))
	conns := make([]net.Conn, n)
	var answer [1024]byte
	before := memoryInUse()
	for i := range conns {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns[i] = c
		if _, err := io.WriteString(c, plainGet); err != nil {
			t.Fatal(err)
		}
		for left := -1; left != 0; {
			k, err := c.Read(answer[:])
			if err != nil {
				t.Fatal(err)
			}
			if left < 0 {
				left = size + bytes.Index(answer[:k], headEnd) + len(headEnd)
			}
			left -= k
		}
		if _, err := c.Write(put); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(answer[:]); err != nil {
			t.Fatal(err)
		}
	}
	return (memoryInUse() - before) / int64(n)
}

func BenchmarkIdleConnections(b *testing.B) {
	for _, kind := range serverKinds {
		for _, size := range []int{100, 10_000, 60_000} {
			b.Run(fmt.Sprintf("%s/%d", kind.name, size), func(b *testing.B) {
				var bytes int64
				for b.Loop() {
					bytes = idleBytes(b, kind.start, size, 300)
				}
				b.ReportMetric(float64(bytes), "bytes/conn")
			})
		}
	}
}

// fastBench is a backend that allocates nothing, behind the real handler.
func fastBench() http.Handler {
	reg := prometheus.NewRegistry()
	b := &benchBackend{entry: kv.Entry{Value: bytes.Repeat([]byte("v"), 256), CreateRevision: 1234, ModRevision: 123456, Version: 12}}
	return newHTTPAPI(b, testLimits(), newHTTPMetrics(reg), reg, zap.NewNop())
}

// scriptConn is a connection from which the same request comes again and again,
// once for each answer.
type scriptConn struct {
	net.Conn
	request []byte
	asked   chan bool // capacity 1: an answer is wanted
	given   chan bool // capacity 1: it is there
}

func (c *scriptConn) Read(p []byte) (int, error) {
	if !<-c.asked {
		return 0, io.EOF
	}
	return copy(p, c.request), nil
}

func (c *scriptConn) Write(p []byte) (int, error) {
	c.given <- true
	return len(p), nil
}

func (c *scriptConn) SetReadDeadline(time.Time) error { return nil }
func (c *scriptConn) RemoteAddr() net.Addr            { return &net.UnixAddr{Name: "script"} }
func (c *scriptConn) Close() error                    { return nil }

func (c *scriptConn) ask() {
	c.asked <- true
	<-c.given
}

func startScript(t testing.TB, request string) *scriptConn {
	s := newClientServer(fastBench(), zap.NewNop())
	c := &scriptConn{request: []byte(request), asked: make(chan bool, 1), given: make(chan bool, 1)}
	f := &fastConn{server: s, conn: c}
	s.add(f)
	done := make(chan bool)
	go func() { f.serve(); close(done) }()
	t.Cleanup(func() { close(c.asked); <-done })
	return c
}

const (
	scriptGet = "GET /some/key HTTP/1.1\r\nHost: 127.0.0.1:12380\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
	scriptPut = "PUT /some/key HTTP/1.1\r\nHost: 127.0.0.1:12380\r\nUser-Agent: bench\r\nAccept: */*\r\nContent-Length: 10\r\n" +
		"Content-Type: application/octet-stream\r\n\r\n0123456789"
)

func BenchmarkFastGet(b *testing.B) { benchmarkScript(b, scriptGet) }
func BenchmarkFastPut(b *testing.B) { benchmarkScript(b, scriptPut) }

func benchmarkScript(b *testing.B, request string) {
	c := startScript(b, request)
	b.ReportAllocs()
	for b.Loop() {
		c.ask()
	}
}

// What a request on the short path may allocate: its target and the text of the
// answer's headers. More is a regression that costs every request.
func TestFastAllocations(t *testing.T) {
	for request, most := range map[string]float64{scriptGet: 3, scriptPut: 3} {
		c := startScript(t, request)
		for range 100 {
			c.ask()
		}
		if got := testing.AllocsPerRun(500, c.ask); got > most {
			t.Errorf("%.30q allocates %v times, want at most %v", request, got, most)
		}
	}
}

// An idle connection costs no more than on net/http, but for the buffer of an answer that
// was written in one piece.
func TestFastIdleMemory(t *testing.T) {
	for size, more := range map[int]int64{100: 0, 10_000: fastKeep, 60_000: 0} {
		short, long := idleBytes(t, serverKinds[0].start, size, 100), idleBytes(t, serverKinds[1].start, size, 100)
		if short > long+more {
			t.Errorf("values of %d bytes: %d bytes for each idle connection, net/http has %d", size, short, long)
		}
	}
}
