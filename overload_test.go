package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pontoon/kv"
)

// Clients that mean harm, or too well, against a real process. While each attack
// goes on an honest client is served, memory stays within what the attack may
// cost, and when the attackers are gone nothing of theirs is left.
//
// The default is small. make overload runs -overload.full, which prints what it
// measures.

var overloadFull = flag.Bool("overload.full", false, "attack with thousands of connections, and for seconds each")

// scale is n connections in full, an eightieth of that by default, and never
// more than the limit of open files leaves room for.
func scale(t *testing.T, n int) int {
	t.Helper()
	if !*overloadFull {
		n = max(n/80, 8)
	}
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		t.Fatal(err)
	}
	if room := int(min(l.Cur, 1<<20)) - 512; n > room {
		t.Logf("%d connections instead of %d: the limit of open files is %d", room, n, l.Cur)
		n = room
	}
	return n
}

// victim is the process under attack.
type victim struct {
	*process
	addr string
}

func newVictim(t *testing.T, flags ...string) *victim {
	s := newSite(t, 1, 0, append([]string{"--log-level", "warn"}, flags...)...)
	s.start(1)
	s.leader()
	return &victim{s.nodes[1], fmt.Sprintf("127.0.0.1:%d", s.ports[0])}
}

// rss is what the process holds of memory, in bytes.
func (v *victim) rss() int64 { return v.procStatus("VmRSS:") << 10 }

func (v *victim) procStatus(field string) int64 {
	v.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.cmd.Process.Pid))
	if err != nil {
		v.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == field {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				v.t.Fatal(err)
			}
			return n
		}
	}
	v.t.Fatalf("no %s in %s", field, b)
	return 0
}

// resetPeak makes VmHWM count from here on.
func (v *victim) resetPeak() {
	v.t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", v.cmd.Process.Pid), []byte("5"), 0); err != nil {
		v.t.Fatal(err)
	}
}

// metric reads one number of /metrics; it fails by what it returns, as the port
// may be full.
func (v *victim) metric(name string) (float64, error) {
	a, err := v.try(http.MethodGet, "/metrics", "")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(a.body) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			return strconv.ParseFloat(strings.TrimSpace(rest), 64)
		}
	}
	return 0, fmt.Errorf("no %s in /metrics", name)
}

// honest is a client that writes and reads one key over one connection, pauses,
// and notes how long each took.
type honest struct {
	v      *victim
	client *http.Client
	took   []time.Duration
	bad    map[string]int // what went wrong, and how often
}

func newHonest(v *victim) *honest {
	return &honest{v: v, client: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 1}}, bad: map[string]int{}}
}

// work runs for d, and returns the 99th percentile.
func (h *honest) work(d time.Duration) time.Duration {
	h.took = h.took[:0]
	clear(h.bad)
	pace := time.NewTicker(5 * time.Millisecond)
	defer pace.Stop()
	for n, end := 0, time.Now().Add(d); time.Now().Before(end); n++ {
		<-pace.C
		value := strconv.Itoa(n)
		start := time.Now()
		err := h.call(http.MethodPut, value)
		if err == nil {
			err = h.call(http.MethodGet, value)
		}
		h.took = append(h.took, time.Since(start))
		if err != nil {
			h.bad[err.Error()]++
		}
	}
	slices.Sort(h.took)
	return h.took[len(h.took)*99/100]
}

func (h *honest) call(method, value string) error {
	req, err := http.NewRequest(method, h.v.url+"/honest", strings.NewReader(value))
	if err != nil {
		return err
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return err
	case resp.StatusCode/100 != 2:
		return fmt.Errorf("%s: %d", method, resp.StatusCode)
	case method == http.MethodGet && string(body) != value:
		return fmt.Errorf("read %q after writing %q", body, value)
	}
	return nil
}

// attack is one way to be a bad client.
type attack struct {
	name  string
	conns int   // in full
	each  int64 // bytes of memory that one of them may cost
	all   int64 // and all together, beyond that
	busy  bool  // honest clients may be told to come back: 429
	run   func(a *attackers)
}

// attackers run until the test is done with them.
type attackers struct {
	t     *testing.T
	v     *victim
	n     int
	ctx   context.Context
	wg    sync.WaitGroup
	ready atomic.Int64 // of n, have begun
	mu    struct {
		sync.Mutex
		seen map[string]int // what they were answered
	}
}

func (a *attackers) note(what string) {
	a.mu.Lock()
	a.mu.seen[what]++
	a.mu.Unlock()
}

func (a *attackers) got(what string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.mu.seen[what]
}

// each runs f for every attacker, again and again, until the attack ends. A
// connection that f is given closes when it returns or the attack ends.
func (a *attackers) each(f func(i int, c net.Conn) error) {
	for i := range a.n {
		a.wg.Go(func() {
			begun := false
			for a.ctx.Err() == nil {
				c, err := (&net.Dialer{}).DialContext(a.ctx, "tcp", a.v.addr)
				if err != nil {
					a.note("dial: " + errno(err))
				} else {
					stop := context.AfterFunc(a.ctx, func() { c.Close() })
					if !begun {
						begun = true
						a.ready.Add(1)
					}
					if err := f(i, c); err != nil {
						a.note(errno(err))
					}
					stop()
					c.Close()
				}
				a.pause(2 * a.pace())
			}
		})
	}
}

// pace is between two steps of one attacker, such that all of them together take
// 5,000 a second: the machine is to be busy with the victim.
func (a *attackers) pace() time.Duration { return time.Duration(a.n) * time.Second / 5000 }

// errno is an error without addresses, so that equal ones count together.
func errno(err error) string {
	var no syscall.Errno
	switch {
	case errors.Is(err, net.ErrClosed), errors.Is(err, context.Canceled):
		return "still there at the end"
	case errors.As(err, &no):
		return no.Error()
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "closed"
	}
	return err.Error()
}

func (a *attackers) pause(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-a.ctx.Done():
	}
}

// drip writes s byte by byte, and the last byte again and again.
func (a *attackers) drip(c net.Conn, s string) error {
	for i := 0; a.ctx.Err() == nil; i++ {
		if _, err := c.Write([]byte{s[min(i, len(s)-1)]}); err != nil {
			return err
		}
		a.pause(a.pace())
	}
	return nil
}

// answer reads one answer and notes its status.
func (a *attackers) answer(c net.Conn) {
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		a.note(errno(err))
		return
	}
	retry := ""
	if resp.Header.Get("Retry-After") != "" {
		retry = ", come back"
	}
	a.note(strconv.Itoa(resp.StatusCode) + retry)
	_, _ = io.CopyN(io.Discard, resp.Body, 1<<20) // the status is what counts
	resp.Body.Close()
}

// pour writes head and then piece without end, or until it is told to stop.
func (a *attackers) pour(c net.Conn, head, piece string, most int) error {
	var answered atomic.Bool
	done := make(chan struct{})
	a.wg.Go(func() { a.answer(c); answered.Store(true); c.Close(); close(done) })
	wait := a.pace()
	if *overloadFull {
		wait *= 4 // 80 MB a second, as attackers and victim share the machine
	}
	n, err := io.WriteString(c, head)
	for n < most && err == nil && a.ctx.Err() == nil && !answered.Load() {
		var k int
		k, err = io.WriteString(c, piece)
		n += k
		a.pause(wait)
	}
	<-done
	return nil // the answer is what counts
}

const mib = 1 << 20

func attacks() []attack {
	chunk := func(s string) string { return strconv.FormatInt(int64(len(s)), 16) + "\r\n" + s + "\r\n" }
	large := strings.Repeat("x", 64<<10)
	put := func(path, more string) string {
		return "PUT " + path + " HTTP/1.1\r\nHost: x\r\n" + more + "\r\n"
	}
	return []attack{
		{name: "heads byte by byte", conns: 5000, each: 40 << 10, run: func(a *attackers) {
			a.each(func(i int, c net.Conn) error {
				return a.drip(c, []string{"GET /k HTTP/1.1\r\nHost: x\r\nUser-Agent: ", "POST /v1/txn HTTP/1.1\r\nX: "}[i%2])
			})
		}},
		{name: "bodies byte by byte", conns: 5000, each: 60 << 10, run: func(a *attackers) {
			a.each(func(i int, c net.Conn) error {
				head := []string{put("/slow", "Content-Length: 60000\r\n"), put("/v1/kv/slow?timeout=60s", "Content-Length: 1000000\r\n"),
					put("/v1/kv/slow", "Transfer-Encoding: chunked\r\n") + "fffff\r\n",
					"POST /v1/txn HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"}[i%4]
				if _, err := io.WriteString(c, head); err != nil {
					return err
				}
				return a.drip(c, " ")
			})
		}},
		{name: "half a body, then nothing", conns: 2000, each: 60 << 10, all: 2 * maxBodyBytes, run: func(a *attackers) {
			a.each(func(i int, c net.Conn) error {
				return a.pour(c, put("/v1/kv/half?timeout=60s", "Content-Length: 1000000\r\n"), large, 512<<10)
			})
		}},
		{name: "idle", conns: 10000, each: 40 << 10, run: func(a *attackers) {
			a.each(func(i int, c net.Conn) error {
				if i%2 == 0 {
					if _, err := io.WriteString(c, "GET /honest?consistency=stale HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
						return err
					}
				}
				_, err := io.Copy(io.Discard, c)
				return err
			})
		}},
		{name: "bodies of 1 GiB", conns: 640, each: 1 << 20, run: func(a *attackers) {
			a.each(func(i int, c net.Conn) error {
				switch i % 4 {
				case 0:
					return a.pour(c, put("/large", "Content-Length: 1073741824\r\n"), large, 1<<30)
				case 1:
					return a.pour(c, put("/v1/kv/large", "Transfer-Encoding: chunked\r\n"), chunk(large), 1<<30)
				case 2: // one line without end
					return a.pour(c, "POST /v1/kv HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(large), 1<<30)
				}
				return a.pour(c, "POST /v1/txn HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(large), 1<<30)
			})
		}},
		{name: "heads of 1 MiB", conns: 2000, each: 160 << 10, run: func(a *attackers) {
			a.each(func(i int, c net.Conn) error {
				return a.pour(c, "GET /k HTTP/1.1\r\nHost: x\r\n", strings.Repeat("X-"+strconv.Itoa(i)+": "+large[:8000]+"\r\n", 8), mib)
			})
		}},
		{name: "requests without reading answers", conns: 1000, each: 100 << 10, run: func(a *attackers) {
			a.each(func(i int, c net.Conn) error {
				_ = c.(*net.TCPConn).SetReadBuffer(4 << 10) // smaller is only nastier
				req := strings.Repeat("GET /large-value?consistency=stale HTTP/1.1\r\nHost: x\r\n\r\n", 100)
				for {
					if _, err := io.WriteString(c, req); err != nil {
						return err
					}
				}
			})
		}},
		{name: "watchers that never read", conns: 1000, each: 60 << 10, all: 128 * mib, run: func(a *attackers) {
			a.each(func(i int, c net.Conn) error {
				_ = c.(*net.TCPConn).SetReadBuffer(4 << 10) // smaller is only nastier
				if _, err := io.WriteString(c, "GET /v1/watch?prefix=big HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
					return err
				}
				<-a.ctx.Done()
				return nil
			})
			a.wg.Go(func() { // what they watch
				for i := 0; a.ctx.Err() == nil; i++ {
					if _, err := a.v.try(http.MethodPut, "/big"+strconv.Itoa(i%8), large); err != nil {
						a.note(errno(err))
					}
				}
			})
		}},
		{name: "HTTP/2 streams", conns: 8000, each: 60 << 10, run: func(a *attackers) {
			var protocols http.Protocols
			protocols.SetUnencryptedHTTP2(true)
			const streams = 200
			for range max(a.n/streams, 1) {
				client := &http.Client{Transport: &http.Transport{Protocols: &protocols, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
					c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
					if err == nil {
						context.AfterFunc(a.ctx, func() { c.Close() })
					}
					return c, err
				}}}
				for range min(streams, a.n) {
					a.wg.Go(func() {
						a.ready.Add(1)
						for a.ctx.Err() == nil {
							r, w := io.Pipe()
							req, err := http.NewRequestWithContext(a.ctx, http.MethodPut, a.v.url+"/v1/kv/h2?timeout=60s", r)
							if err != nil {
								panic(err)
							}
							go func() { _, _ = w.Write([]byte("x")) }() // it ends with the request
							if resp, err := client.Do(req); err != nil {
								a.note("request ended")
							} else {
								a.note(resp.Status)
								resp.Body.Close()
							}
							r.Close()
							a.pause(a.pace())
						}
					})
				}
			}
		}},
		{name: "ten times as many writes as may wait", conns: 5120, each: 100 << 10, busy: true, run: func(a *attackers) {
			a.each(func(i int, c net.Conn) error {
				r := bufio.NewReader(c)
				for a.ctx.Err() == nil {
					if _, err := io.WriteString(c, put("/flood-"+strconv.Itoa(i%1000), "Content-Length: 1000\r\n")+large[:1000]); err != nil {
						return err
					}
					resp, err := http.ReadResponse(r, nil)
					if err != nil {
						return err
					}
					if resp.StatusCode == 429 && resp.Header.Get("Retry-After") == "" {
						a.note("429 without Retry-After")
					}
					a.note(strconv.Itoa(resp.StatusCode))
					if _, err := io.Copy(io.Discard, resp.Body); err != nil {
						return err
					}
				}
				return nil
			})
		}},
	}
}

// mustSee is an answer that an attack has to get, mustNot those that it must not.
var (
	mustSee = map[string]string{"bodies of 1 GiB": "413", "heads of 1 MiB": "431", "ten times as many writes as may wait": "429"}
	mustNot = []string{"500", "502", "429 without Retry-After"}
)

func TestOverload(t *testing.T) {
	conns := scale(t, 16000) // before anything is started
	inFlight := max(conns/31, 16)
	v := newVictim(t, "--max-in-flight", strconv.Itoa(inFlight))
	h := newHonest(v)
	lasts := 200 * time.Millisecond
	if *overloadFull {
		lasts = 8 * time.Second
	}
	v.want(204, http.MethodPut, "/large-value", strings.Repeat("v", 64<<10))
	h.work(lasts / 2)
	calm := h.work(lasts)
	goroutines, err := v.metric("go_goroutines")
	if err != nil {
		t.Fatal(err)
	}
	base := v.rss()
	t.Logf("calm: p99 %v, %d MiB, %.0f goroutines; %d requests may wait", calm, base>>20, goroutines, inFlight)
	for _, x := range attacks() {
		t.Run(x.name, func(t *testing.T) {
			ctx, end := context.WithCancel(context.Background())
			a := &attackers{t: t, v: v, n: scale(t, x.conns), ctx: ctx}
			a.mu.seen = map[string]int{}
			defer func() { end(); a.wg.Wait() }()
			v.resetPeak()
			before := v.rss()
			x.run(a)
			waitFor(t, "the attack to begin", func() bool { return a.ready.Load() >= int64(a.n) })
			h.work(lasts / 3)
			p99 := h.work(lasts)
			busy := 0
			for what, n := range h.bad {
				if busy += n; !x.busy || !strings.HasSuffix(what, ": 429") {
					t.Errorf("an honest client met %q %d times of %d", what, n, len(h.took))
				}
			}
			if want := mustSee[x.name]; want != "" {
				waitFor(t, "an attacker to get "+want, func() bool { return a.got(want)+a.got(want+", come back") > 0 })
			}
			peak := v.procStatus("VmHWM:") << 10
			end()
			a.wg.Wait()
			after := h.work(lasts / 3)
			t.Logf("%d attackers: honest p99 %v (calm %v, after it %v; %d of %d refused), %d MiB more (bound %d), answers %v",
				a.n, p99, calm, after, busy, len(h.took), (peak-before)>>20, (x.all+int64(a.n)*x.each)>>20+96, a.mu.seen)
			// Loose, as attackers and victim share the machine's cores.
			if p99 > max(20*calm, 4*time.Second) {
				t.Errorf("an honest client waited %v", p99)
			}
			if after > max(20*calm, time.Second) {
				t.Errorf("an honest client waited %v when the attack was over", after)
			}
			// 96 MiB: what the honest client and the collector's room may take.
			if bound := x.all + int64(a.n)*x.each + 96*mib; peak-before > bound {
				t.Errorf("it cost %d MiB of memory, %d may be", (peak-before)>>20, bound>>20)
			}
			for _, what := range mustNot {
				if n := a.got(what); n > 0 {
					t.Errorf("%d attackers got %s", n, what)
				}
			}
			waitFor(t, "their goroutines to end", func() bool {
				now, err := v.metric("go_goroutines")
				return err == nil && now <= goroutines+8
			})
		})
		if !v.running() {
			t.Fatalf("the process ended: exit code %d", v.wait(time.Second))
		}
	}
}

// Clients cannot take the descriptors that the log, snapshots and peers need.
func TestDescriptorsAreReserved(t *testing.T) {
	const limit = 256
	s := newSite(t, 1, 0)
	args := append(s.args(1), "--snapshot-entries", "20", "--log-level", "warn")
	p := launchLimited(t, s.dir, limit, args...)
	p.url = fmt.Sprintf("http://127.0.0.1:%d", s.ports[0])
	s.nodes[1] = p
	p.ready()
	v := &victim{p, fmt.Sprintf("127.0.0.1:%d", s.ports[0])}
	h := newHonest(v)
	h.work(100 * time.Millisecond) // its connection stands
	ctx, end := context.WithCancel(context.Background())
	a := &attackers{t: t, v: v, n: 2 * limit, ctx: ctx}
	a.mu.seen = map[string]int{}
	a.each(func(i int, c net.Conn) error {
		if _, err := io.WriteString(c, "GET /honest?consistency=stale HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, c)
		return err
	})
	defer func() { end(); a.wg.Wait() }()
	waitFor(t, "the attackers", func() bool { return a.ready.Load() == int64(a.n) })
	open := func() int {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	waitFor(t, "the places for clients to be taken", func() bool { return open() > limit/3 })
	// More than a segment of the log, and snapshots, while they are there.
	large := strings.Repeat("x", mib)
	for i := range 70 {
		req, err := http.NewRequest(http.MethodPut, v.url+"/large"+strconv.Itoa(i%3), strings.NewReader(large))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := h.client.Do(req)
		if err != nil {
			t.Fatalf("write %d: %v\n%s", i, err, tail(p.stderr.String(), 5))
		}
		resp.Body.Close()
		if resp.StatusCode != 204 {
			t.Fatalf("write %d: %d", i, resp.StatusCode)
		}
	}
	if got := open(); got > limit*9/10 {
		t.Errorf("%d of %d descriptors are open", got, limit)
	}
	for dir, want := range map[string]int{"wal/*-*.wal": 2, "snap/*.snap.db": 2} {
		if files, err := filepath.Glob(filepath.Join(s.data(1), dir)); err != nil || len(files) < want {
			t.Errorf("%s: %v %v", dir, files, err)
		}
	}
	end()
	a.wg.Wait()
	p.get("large0", large)
	if text := p.stderr.String(); strings.Contains(text, "too many open files") || !strings.Contains(text, "fewer client connections") {
		t.Errorf("the log says\n%s", text)
	}
	p.stop()
}

// Slow bodies hold no slots, and share the room for bodies: who asks for more than is
// left is told to come back, and small values are let through all the same.
func TestBodiesShareTheirRoom(t *testing.T) {
	l := testLimits()
	l.MaxInFlight, l.MaxBodyBytes = 2, 1<<20
	h, _ := newTwinAPI(t, l)
	addr := serveTest(t, h)
	bodies := &h.Handler.(*httpAPI).bodies
	const half = 400 << 10
	slow := func(target string) *rawConn {
		c := dialRaw(t, addr)
		c.send("PUT " + target + " HTTP/1.1\r\nHost: h\r\nContent-Length: 800000\r\n\r\n" + strings.Repeat("x", half))
		return c
	}
	first := slow("/v1/kv/a")
	waitFor(t, "half of a body", func() bool { return bodies.bytes.Load() >= half-minBodyBuffer })
	if n := h.m.inFlight.Load(); n != 0 {
		t.Errorf("a body on its way holds %d slots", n)
	}
	others := []*rawConn{slow("/v1/kv/b"), slow("/c")}
	for _, c := range others {
		if a := c.answer("PUT"); a.status != 429 || a.header.Get("Retry-After") == "" {
			t.Errorf("beyond the room: %d", a.status)
		}
	}
	for _, target := range []string{"/small", "/v1/kv/small"} {
		if a := exchange(t, addr, "PUT", target, "", strings.Repeat("x", minBodyBuffer/2)); a.status/100 != 2 {
			t.Errorf("a small value while the room is taken: %d %s", a.status, a.body)
		}
	}
	if a := exchange(t, addr, "POST", "/v1/txn", "", `{"then":[{"put":{"key":"k","value":"v"}}]}`); a.status != 200 {
		t.Errorf("a small transaction while the room is taken: %d %s", a.status, a.body)
	}
	first.send(strings.Repeat("x", 800000-half))
	if a := first.answer("PUT"); a.status != 201 {
		t.Errorf("the body that was there first: %d", a.status)
	}
	waitFor(t, "the room to be given back", func() bool { return bodies.bytes.Load() == 0 })
	if a := exchange(t, addr, "PUT", "/large", "", strings.Repeat("x", 800000)); a.status != 204 {
		t.Errorf("afterwards: %d", a.status)
	}
	waitFor(t, "the room to be given back", func() bool { return bodies.bytes.Load() == 0 && h.m.inFlight.Load() == 0 })
}

// Streams of HTTP/2 cost no connection, so those whose bodies are on their way
// are counted; a client of HTTP/1 is served beside them.
func TestStreamsWithBodiesAreCounted(t *testing.T) {
	l := testLimits()
	l.MaxInFlight = 3
	h, _ := newTwinAPI(t, l)
	addr := serveTest(t, h)
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	client := &http.Client{Transport: &http.Transport{Protocols: &protocols}}
	defer client.CloseIdleConnections()
	status := make(chan int, l.MaxInFlight+1)
	var ends []*io.PipeWriter
	for range l.MaxInFlight + 1 {
		r, w := io.Pipe()
		ends = append(ends, w)
		go func() {
			req, err := http.NewRequest(http.MethodPut, "http://"+addr+"/k", r)
			if err != nil {
				panic(err)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Error(err)
				status <- 0
				return
			}
			resp.Body.Close()
			status <- resp.StatusCode
		}()
	}
	if s := <-status; s != 429 {
		t.Errorf("one stream too many: %d", s)
	}
	if a := exchange(t, addr, "PUT", "/small", "", "x"); a.status != 204 {
		t.Errorf("a connection beside them: %d", a.status)
	}
	for _, w := range ends {
		w.Close()
	}
	for range l.MaxInFlight {
		if s := <-status; s != 204 {
			t.Errorf("a stream that was let in: %d", s)
		}
	}
	if n := h.Handler.(*httpAPI).bodies.streams.Load(); n != 0 {
		t.Errorf("%d streams are still counted", n)
	}
}

func TestShareFiles(t *testing.T) {
	for _, x := range []struct {
		most    int
		files   uint64
		clients int
		peers   int
	}{
		{16384, 1 << 20, 16384, 256}, {16384, 20000, 16384, 256}, {16384, 1<<64 - 1, 16384, 256}, {16384, 4096, 3584, 256},
		{16384, 1024, 512, 256}, {16384, 256, 128, 64}, {100, 256, 100, 64}, {16384, 3, 2, 1}, {16384, 0, 1, 1},
	} {
		if clients, peers := shareFiles(x.most, x.files); clients != x.clients || peers != x.peers {
			t.Errorf("of %d files for %d: %d and %d, want %d and %d", x.files, x.most, clients, peers, x.clients, x.peers)
		}
	}
}

// The peer port has places, and a connection that closes gives back its own, once.
func TestPeerPortIsBounded(t *testing.T) {
	l, err := listenPeer("127.0.0.1:0", 2)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	slots := l.(*boundedListener).slots
	var open []net.Conn
	for range 2 {
		out, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		in, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, in)
	}
	if len(slots) != 2 || cap(slots) != 2 {
		t.Fatalf("%d of %d places are taken by 2", len(slots), cap(slots))
	}
	for i, in := range open {
		in.Close()
		in.Close()
		if len(slots) != 1-i {
			t.Fatalf("%d places are taken when %d have left", len(slots), i+1)
		}
	}
}

// While the loop hangs in the disk, what clients offer and give up on stays in
// its queue; that is bounded in bytes.
func TestOfferedBytesAreBounded(t *testing.T) {
	b := newBenchNode(t)
	s := newKVStore(b.raftNode, &recovered{state: kv.NewState()}, nil)
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	const rest = 8 << 10
	b.offered.Store(maxOffered - rest) // by others
	value := make([]byte, rest/8)
	offer := func() error {
		_, err := s.put(gone, "k", value) // the queue or the context: both are ready
		return err
	}
	for len(b.proposeC) < 7 { // the eighth does not fit with its key
		if err := offer(); !errors.Is(err, errNotProposed) && !errors.Is(err, errNoLeader) {
			t.Fatalf("with %d waiting: %v", len(b.proposeC), err)
		}
	}
	for range 20 {
		if err := offer(); !errors.Is(err, errOverloaded) {
			t.Fatalf("beyond the bound: %v", err)
		}
	}
	for len(b.proposeC) > 0 {
		b.enqueue(<-b.proposeC)
	}
	if n := b.offered.Load(); n != maxOffered-rest {
		t.Errorf("%d bytes are counted that are not there", n-(maxOffered-rest))
	}
}
