package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestLongPoll(t *testing.T) {
	for _, row := range []struct {
		name    string
		match   string // If-None-Match
		query   string
		wait    int
		do      func(*twinBackend) // one second into it
		status  int
		took    time.Duration
		revised string // Kv-Revision
	}{
		{"differs", `"1"`, "", 30, nil, 200, 0, "3"},
		{"changes", `"3"`, "", 30, func(b *twinBackend) { b.do(put("k", "new")) }, 200, time.Second, "4"},
		{"another key changes", `"3"`, "", 2, func(b *twinBackend) { b.do(put("kk", "new")) }, 304, 2 * time.Second, "4"},
		{"is over", `"3"`, "", 30, nil, 304, 30 * time.Second, "3"},
		{"is over at once", `"3"`, "", 0, nil, 304, 0, "3"},
		{"longer than the default deadline", `"3"`, "", 60, nil, 304, time.Minute, "3"},
		{"timeout is earlier", `"3"`, "?timeout=3s", 30, nil, 304, 3 * time.Second, "3"},
		{"timeout is later", `"3"`, "?timeout=50s", 30, nil, 304, 30 * time.Second, "3"},
		{"deleted", `"3"`, "", 30, func(b *twinBackend) { b.do(del("k")) }, 404, time.Second, ""},
		{"any", `*`, "", 30, func(b *twinBackend) { b.do(del("k")) }, 404, time.Second, ""},
		{"any, and it changes", `*`, "", 3, func(b *twinBackend) { b.do(put("k", "new")) }, 304, 3 * time.Second, "4"},
		{"exists", `"0"`, "", 30, nil, 200, 0, "3"},
		{"several", `"2", "3", "4"`, "", 3, func(b *twinBackend) { b.do(put("k", "new")) }, 304, 3 * time.Second, "4"},
		{"stops", `"3"`, "", 30, func(b *twinBackend) { b.hub.Close() }, 304, time.Second, "3"},
		{"lost", `"3"`, "", 30, func(b *twinBackend) { b.hub.Lost() }, 304, time.Second, "3"},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := testLimits()
				l.MaxInFlight = 1
				h, b := newTwinAPI(t, l)
				b.do(put("other", ""), put("k", "old"), put("k", "newer"))
				c := pipeServer(t, h)
				start := time.Now()
				c.SetDeadline(start.Add(time.Hour))
				c.send(fmt.Sprintf("GET /v1/kv/k%s HTTP/1.1\r\nHost: h\r\nIf-None-Match: %s\r\nPrefer: wait=%d\r\n\r\n", row.query, row.match, row.wait))
				synctest.Wait()
				if n := h.m.inFlight.Load(); n != 0 {
					t.Errorf("it holds %d slots while it waits", n)
				}
				if row.took > 0 && (h.m.watchers.Load() != 1 || b.hub.Len() != 1) {
					t.Error("it is no watcher")
				}
				if row.do != nil {
					<-time.After(time.Second)
					row.do(b)
				}
				a := c.answer("GET")
				if took := time.Since(start); a.status != row.status || took != row.took || row.revised != "" && a.header.Get("Kv-Revision") != row.revised {
					t.Errorf("%d after %v at revision %s, want %d after %v at %s", a.status, took, a.header.Get("Kv-Revision"), row.status, row.took, row.revised)
				}
				if n := int64(b.hub.Len()) + h.m.watchers.Load(); n != 0 {
					t.Errorf("%d watchers are left", n)
				}
			})
		})
	}
}

// If-None-Match: "0" waits for a key that is not there yet.
func TestLongPollForCreation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := newTwinAPI(t, testLimits())
		c := pipeServer(t, h)
		c.send("GET /v1/kv/k HTTP/1.1\r\nHost: h\r\nIf-None-Match: \"0\"\r\nPrefer: wait=5\r\n\r\n")
		<-time.After(time.Second)
		b.do(put("k", "here"))
		if a := c.answer("GET"); a.status != 200 || a.body != "here" {
			t.Errorf("%d %s", a.status, a.body)
		}
		b.do(del("k"))
		start := time.Now()
		c.send("GET /v1/kv/k HTTP/1.1\r\nHost: h\r\nIf-None-Match: \"0\"\r\nPrefer: wait=5\r\n\r\n")
		if a := c.answer("GET"); a.status != 404 || time.Since(start) != 5*time.Second {
			t.Errorf("%d after %v", a.status, time.Since(start))
		}
		c.send("GET /v1/kv/k HTTP/1.1\r\nHost: h\r\nIf-None-Match: \"7\"\r\nPrefer: wait=5\r\n\r\n")
		start = time.Now()
		if a := c.answer("GET"); a.status != 404 || time.Since(start) != 0 {
			t.Errorf("an absent key matches 0 alone: %d after %v", a.status, time.Since(start))
		}
	})
}

func TestLongPollClientLeaves(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	b.do(put("k", "v"))
	finished, entered := make(chan struct{}), make(chan struct{})
	addr := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		h.ServeHTTP(w, r)
		close(finished)
	}))
	c := dialRaw(t, addr)
	c.send("GET /k HTTP/1.1\r\nHost: h\r\nIf-None-Match: \"1\"\r\nPrefer: wait=60\r\n\r\n")
	<-entered
	c.Close()
	<-finished
	if n := b.hub.Len(); n != 0 {
		t.Errorf("%d watchers are left", n)
	}
	if text := metricsText(t, h); !strings.Contains(text, `code="499"`) {
		t.Error("not counted as a client that left")
	}
}

// The read before the wait is as fresh as was asked for.
func TestLongPollReadFails(t *testing.T) {
	h, _ := newTwinAPI(t, testLimits())
	h.fakeBackend.err = errNoLeader
	a := exchange(t, serveTest(t, h), "GET", "/k", "If-None-Match: \"1\"\r\nPrefer: wait=60\r\n", "")
	if a.status != 503 {
		t.Errorf("status %d", a.status)
	}
}
