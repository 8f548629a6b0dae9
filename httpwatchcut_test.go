package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pontoon/kv"
)

// A watch that cannot keep up gets what is queued and its id to go on from; with
// that nothing is lost.
func TestWatchOverflow(t *testing.T) {
	for _, headers := range []string{"", asSSE} {
		synctest.Test(t, func(t *testing.T) {
			h, b := newTwinAPI(t, testLimits())
			b.hub.SetQueue(3, 1<<30)
			w, finished := watchPipe(t, h, "?prefix=a", headers)
			large := strings.Repeat("x", 2*streamPiece)
			for i := range 12 {
				b.do(put("a", large), put("b", ""))
				synctest.Wait() // the handler is stuck in the first, or done
				if i == 0 && h.m.inFlight.Load() != 0 {
					t.Error("a stream holds a slot")
				}
			}
			var got []int64
			resume := int64(0)
			for resume == 0 {
				f, ok := w.next()
				switch {
				case !ok:
					t.Fatal("no overflow message")
				case f.Overflow:
					resume = f.Revision
				default:
					got = append(got, f.Revision)
				}
			}
			w.wantEnd()
			<-finished
			if len(got) < 3 || resume < got[len(got)-1] {
				t.Errorf("got %v, then resume %d", got, resume)
			}
			w, _ = watchPipe(t, h, "?prefix=a", headers+"Last-Event-ID: "+strconv.FormatInt(resume, 10)+"\r\n")
			for len(got) < 12 {
				f, ok := w.next()
				if !ok || f.Overflow {
					t.Fatalf("after %v: %v %.60q", got, ok, f.data)
				}
				got = append(got, f.Revision)
			}
			for i, r := range got {
				if r != int64(2*i+1) {
					t.Fatalf("revisions %v", got)
				}
			}
			if text := metricsText(t, h); !strings.Contains(text, "pontoon_watches_cut_total 1\n") ||
				!strings.Contains(text, "pontoon_watchers 1\n") || !strings.Contains(text, "pontoon_watch_events_total ") {
				t.Error("metrics of watches are missing")
			}
			b.hub.Close()
			w.wantEnd()
		})
	}
}

// pipeHTTP2 sends one request by HTTP/2 over the pipe.
func pipeHTTP2(t *testing.T, h http.Handler, target string) *http.Response {
	t.Helper()
	c := pipeServer(t, h)
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: &protocols, DialContext: func(context.Context, string, string) (net.Conn, error) { return c.Conn, nil }}
	t.Cleanup(tr.CloseIdleConnections)
	resp, err := (&http.Client{Transport: tr}).Do(requestTo(t, "GET", "pipe", target, nil))
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// A client that never reads loses its stream cutGrace after its queue was full,
// or the member began to stop, and not only with its next lack of progress.
func TestStalledWatchEnds(t *testing.T) {
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2"} {
		for _, end := range []string{"overflow", "close", "lost"} {
			t.Run(protocol+" "+end, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					h, b := newTwinAPI(t, testLimits())
					b.hub.SetQueue(10, 1<<30)
					finished := make(chan struct{})
					handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						defer close(finished)
						h.ServeHTTP(w, r)
					})
					if protocol == "HTTP/2" {
						resp := pipeHTTP2(t, handler, "/v1/watch")
						defer resp.Body.Close()
					} else {
						readWatch(t, pipeServer(t, handler), "", "")
					}
					// More than HTTP/2's window for one stream, which the client
					// takes in without anybody reading.
					for range 10 {
						b.do(put("a", strings.Repeat("x", 1<<20)))
						synctest.Wait()
					}
					<-time.After(time.Second)
					select {
					case <-finished:
						t.Fatal("ended before it was cut")
					default:
					}
					start := time.Now()
					switch end {
					case "close":
						b.hub.Close()
					case "lost":
						b.hub.Lost()
					default:
						for range 10 {
							b.do(put("a", "x"))
						}
					}
					<-finished
					if took := time.Since(start); took != cutGrace {
						t.Errorf("ended after %v, want %v", took, cutGrace)
					}
					if n := h.m.watchers.Load() + int64(b.hub.Len()); n != 0 {
						t.Errorf("%d watchers are left", n)
					}
				})
			})
		}
	}
}

// stalledStream asks for target by HTTP/2 as a client that grants its stream no byte
// of the answer's body, and tells how the server ends the stream: RST_STREAM, or
// nothing within ten minutes.
func stalledStream(t *testing.T, h http.Handler, method, target, headers, body string) (after time.Duration, reset bool) {
	t.Helper()
	c := pipeServer(t, h)
	frame := func(kind, flags byte, stream uint32, payload string) string {
		head := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
		return string(binary.BigEndian.AppendUint32(append(head, flags), stream)) + payload
	}
	field := func(name, value string) string { // literal, not indexed (RFC 7541, section 6.2.2)
		return "\x00" + string(rune(len(name))) + name + string(rune(len(value))) + value
	}
	fields := field(":method", method) + field(":scheme", "http") + field(":path", target) + field(":authority", "h")
	if name, value, ok := strings.Cut(headers, ": "); ok {
		fields += field(strings.ToLower(name), value)
	}
	const endStream, endHeaders, initialWindow = 1, 4, "\x00\x04\x00\x00\x00\x00"
	request := frame(1, endHeaders|endStream, 1, fields)
	if body != "" {
		request = frame(1, endHeaders, 1, fields) + frame(0, endStream, 1, body)
	}
	start := time.Now()
	c.SetDeadline(start.Add(10 * time.Minute))
	go c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, initialWindow) + request))
	for {
		var head [9]byte
		if _, err := io.ReadFull(c.r, head[:]); err != nil {
			return time.Since(start), false
		}
		if _, err := io.CopyN(io.Discard, c.r, int64(binary.BigEndian.Uint32(head[:])>>8)); err != nil {
			return time.Since(start), false
		}
		switch head[3] {
		case 0:
			t.Errorf("%s %s: DATA without a window", method, target)
		case 3:
			return time.Since(start), true
		}
	}
}

// A client of HTTP/2 that takes nothing of its answer loses the stream, whatever it
// has asked for, as one of HTTP/1.1 loses the connection.
func TestStalledStreamEnds(t *testing.T) {
	for _, row := range []struct{ method, target, headers, body string }{
		{"GET", "/v1/kv/small", "", ""},
		{"GET", "/v1/kv/a", "", ""},
		{"GET", "/v1/kv/a", "Accept: application/json", ""},
		{"GET", "/v1/kv/none", "", ""},
		{"GET", "/v1/kv", "", ""},
		{"GET", "/v1/kv", "Accept: application/x-ndjson", ""},
		{"GET", "/v1/kv/a?history=9", "", ""},
		{"POST", "/v1/txn", "", `{"then":[{"get":{"prefix":"","all":true,"limit":3}}]}`},
		{"GET", "/v1/watch?initial=true", "", ""},
		{"GET", "/v1/watch?from=1", "", ""},
		{"GET", "/v1/status", "", ""},
		{"GET", "/metrics", "", ""},
	} {
		t.Run(row.method+" "+row.target+row.headers, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h, b := newTwinAPI(t, testLimits())
				b.do(put("small", "x"), put("a", strings.Repeat("x", 1<<20)), put("b", strings.Repeat("\xff", 1<<20)))
				after, reset := stalledStream(t, h, row.method, row.target, row.headers, row.body)
				if !reset || after > writeProgress {
					t.Errorf("after %v: reset %v; want a reset within %v", after, reset, writeProgress)
				}
				synctest.Wait()
				if n := h.m.watchers.Load() + h.m.inFlight.Load() + int64(b.hub.Len()); n != 0 {
					t.Errorf("%d watchers or slots are left", n)
				}
			})
		})
	}
}

// What has nothing to send waits as long as it likes, and a slow reader gets all.
func TestIdleStreamLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := newTwinAPI(t, testLimits())
		b.do(put("a", "x"))
		resp := pipeHTTP2(t, h, "/v1/watch?initial=true")
		defer resp.Body.Close()
		lines := bufio.NewReader(resp.Body)
		for i := range 3 {
			if line, err := lines.ReadString('\n'); err != nil {
				t.Fatalf("message %d: %q, %v", i, line, err)
			}
			<-time.After(10 * writeProgress)
			b.do(put("a", "y"))
		}
	})
	synctest.Test(t, func(t *testing.T) {
		h, b := newTwinAPI(t, testLimits())
		b.do(put("a", strings.Repeat("x", 64<<20)))
		resp := pipeHTTP2(t, h, "/v1/kv/a")
		defer resp.Body.Close()
		start, all := time.Now(), 0
		for buf := make([]byte, 1<<20); ; {
			n, err := io.ReadFull(resp.Body, buf)
			if all += n; err != nil {
				break
			}
			<-time.After(5 * time.Second)
		}
		if all != 64<<20 || time.Since(start) < 10*writeProgress {
			t.Errorf("%d bytes within %v", all, time.Since(start))
		}
	})
}

// One connection of HTTP/2 carries many calls: of those a member has as many under way
// as it may have connections, and those of health besides.
func TestStreamsAreBounded(t *testing.T) {
	l := testLimits()
	l.MaxConns = 2
	h, _ := newTwinAPI(t, l)
	addr := serveTest(t, h)
	client := http2Client(t)
	status := func(c *http.Client, target string) int {
		t.Helper()
		resp, err := c.Do(requestTo(t, "GET", addr, target, nil))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	ctx, leave := context.WithCancel(t.Context())
	for range 2 {
		resp, err := client.Do(requestTo(t, "GET", addr, "/v1/watch", nil).WithContext(ctx))
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		defer resp.Body.Close()
	}
	for target, want := range map[string]int{"/v1/kv/k": 429, "/v1/watch": 429, "/livez": 200, "/readyz": 200, "/v1/status": 200, "/metrics": 200} {
		if got := status(client, target); got != want {
			t.Errorf("%s by HTTP/2: %d, want %d", target, got, want)
		}
	}
	if got := status(http.DefaultClient, "/v1/kv/k"); got != 404 {
		t.Errorf("by HTTP/1.1: %d", got)
	}
	leave()
	waitFor(t, "the streams to end", func() bool { return status(client, "/v1/kv/k") == 404 })
}

// A stream that ended in time leaves no deadline behind for the next answer on
// the connection.
func TestCutterLeavesConnectionAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := newTwinAPI(t, testLimits())
		c := pipeServer(t, h)
		w := readWatch(t, c, "", "")
		b.hub.Lost()
		w.want("0:  [overflow]")
		w.wantEnd()
		<-time.After(2 * cutGrace)
		c.send("GET /livez HTTP/1.1\r\nHost: h\r\n\r\n")
		if a := c.answer("GET"); a.status != 200 {
			t.Errorf("status %d", a.status)
		}
	})
}

func TestWatchClientLeaves(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		h, b := newTwinAPI(t, testLimits())
		finished := make(chan struct{}, 1)
		addr := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h.ServeHTTP(w, r)
			finished <- struct{}{}
		}))
		for _, query := range []string{"", "?initial=true", "?from=1&progress=1h"} {
			if http2 {
				ctx, cancel := context.WithCancel(t.Context())
				resp, err := http2Client(t).Do(requestTo(t, "GET", addr, "/v1/watch"+query, nil).WithContext(ctx))
				if err != nil {
					t.Fatal(err)
				}
				cancel()
				resp.Body.Close()
			} else {
				c := dialRaw(t, addr)
				readWatch(t, c, query, "")
				c.Close()
			}
			<-finished
			if n := b.hub.Len(); n != 0 || h.m.watchers.Load() != 0 || h.m.inFlight.Load() != 0 {
				t.Errorf("%d watchers are left", n)
			}
		}
	}
}

// Streams take no slots from the calls that wait on the store.
func TestWatchesHoldNoSlots(t *testing.T) {
	l := testLimits()
	l.MaxInFlight = 1
	h, b := newTwinAPI(t, l)
	addr := serveTest(t, h)
	var watches []*watchReader
	for range 10 {
		watches = append(watches, readWatch(t, dialRaw(t, addr), "?key=k", ""))
	}
	if a := exchange(t, addr, "PUT", "/k", "", "v"); a.status != 204 {
		t.Errorf("status %d", a.status)
	}
	for _, w := range watches {
		w.want("1: put k=v")
	}
	h.m.inFlight.Add(1)
	if a := exchange(t, addr, "GET", "/v1/watch", "", ""); a.status != 429 {
		t.Errorf("the start takes a slot: status %d", a.status)
	}
	h.m.inFlight.Add(-1)
	b.hub.Close()
	if text := metricsText(t, h); !strings.Contains(text, "pontoon_watch_events_total 10\n") {
		t.Error("10 events were sent")
	}
}

// A message larger than any buffer goes out whole.
func TestWatchLargeMessage(t *testing.T) {
	_, b, addr := serveTwin(t)
	var then []kv.TxnOp
	for i := range 100 {
		then = append(then, kv.TxnOp{Op: kv.OpPut, Key: fmt.Sprintf("k%03d", i), Value: []byte(strings.Repeat("\x01", 10_000))})
	}
	w := readWatch(t, dialRaw(t, addr), "", asSSE)
	b.do(kv.Command{Op: kv.OpTxn, Txn: &kv.Txn{Then: then}}, put("z", "end"))
	f, ok := w.next()
	if !ok || len(f.Events) != 100 || len(f.Events[99].Entry.Value) != 10_000 {
		t.Errorf("%d events", len(f.Events))
	}
	w.want("2: put z=end")
}

// A replay from far back goes on without a watcher, whose queue would overflow,
// and meets the live changes without a gap.
func TestWatchFarReplay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := newTwinAPI(t, testLimits())
		b.hub.SetQueue(5, 1<<30)
		value := strings.Repeat("x", 1000)
		for range 2 * nearEvents {
			b.do(put("a", value))
		}
		w, _ := watchPipe(t, h, "?from=1", asSSE)
		synctest.Wait()
		if n := b.hub.Len(); n != 0 {
			t.Errorf("%d watchers during a long replay", n)
		}
		next := int64(1)
		read := func(n int) {
			t.Helper()
			for range n {
				f, ok := w.next()
				if !ok || f.Revision != next || f.Overflow {
					t.Fatalf("want revision %d, got %v %.80q", next, ok, f.data)
				}
				next++
			}
		}
		for range 50 { // slower than the writes
			read(20)
			for range 40 {
				b.do(put("a", value))
			}
		}
		read(int(b.revision()-next) + 1)
		synctest.Wait()
		if n := b.hub.Len(); n != 1 {
			t.Errorf("%d watchers once it has caught up", n)
		}
		b.do(put("a", "live"))
		read(1)
		b.hub.Close()
		w.wantEnd()
	})
}

// What is compacted while a replay is on its way ends it with a word.
func TestWatchReplayIsOvertaken(t *testing.T) {
	for _, headers := range []string{"", asSSE} {
		synctest.Test(t, func(t *testing.T) {
			h, b := newTwinAPI(t, testLimits())
			for range 2 * nearEvents {
				b.do(put("a", strings.Repeat("x", 1000)))
			}
			w, finished := watchPipe(t, h, "?from=1", headers)
			synctest.Wait()
			compacted := compactTwin(b)
			last := int64(0)
			for {
				f, ok := w.next()
				if !ok {
					t.Fatal("the stream ends without a word")
				}
				if f.Compacted {
					if f.CompactRevision != compacted || f.Revision != last || last > compacted {
						t.Errorf("after %d: %s, compacted is %d", last, f.data, compacted)
					}
					break
				}
				if f.Revision != last+1 {
					t.Fatalf("revision %d after %d", f.Revision, last)
				}
				last = f.Revision
			}
			w.wantEnd()
			<-finished
			if last < 100 || last > nearEvents || b.hub.Len() != 0 {
				t.Errorf("%d revisions came, %d watchers", last, b.hub.Len())
			}
		})
	}
}

// Other origins may read, and only read.
func TestWatchFromAnotherOrigin(t *testing.T) {
	_, _, addr := serveTwin(t)
	readWatch(t, dialRaw(t, addr), "", asSSE+"Origin: http://elsewhere.example\r\nSec-Fetch-Site: cross-site\r\n")
	if a := exchange(t, addr, "POST", "/v1/watch", "Origin: http://elsewhere.example\r\nSec-Fetch-Site: cross-site\r\n", ""); a.status != 403 {
		t.Errorf("status %d", a.status)
	}
}
