package main

import (
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pontoon/api"
)

// Large answers that nobody reads hold so many bytes together and no more. Beyond
// that a value waits for room until its deadline, pages and reads of transactions are
// refused, and nothing that has happened is. What is small is served throughout.
func TestLargeAnswersHaveABudget(t *testing.T) {
	const size = 400 << 10
	newAPI := func(t *testing.T) (*testAPI, func(request string) *rawConn) {
		l := testLimits()
		l.MaxAnswerBytes = 1 << 20
		h, b := newTwinAPI(t, l)
		for _, key := range []string{"a", "b", "c"} {
			b.do(put(key, strings.Repeat("x", size)))
		}
		b.do(put("small", "s"), put("whole", strings.Repeat("x", 3<<20)))
		return h, func(request string) *rawConn {
			c := pipeServer(t, h)
			c.SetDeadline(time.Now().Add(time.Hour))
			method, rest, _ := strings.Cut(request, " ")
			target, body, _ := strings.Cut(rest, " ")
			head := method + " " + target + " HTTP/1.1\r\nHost: h\r\nAccept: application/json\r\n"
			if body != "" {
				head += "Content-Length: " + strconv.Itoa(len(body)) + "\r\n"
			}
			c.send(head + "\r\n" + body)
			synctest.Wait()
			return c
		}
	}
	for _, row := range []struct {
		request string
		status  int
		took    time.Duration
	}{
		{"GET /v1/kv/c", 429, 5 * time.Second},
		{"GET /v1/kv/c?timeout=1s", 429, time.Second},
		{"GET /v1/kv/c?timeout=60s", 200, writeProgress}, // the clients that stall are cut by then
		{"GET /c", 429, 5 * time.Second},
		{"GET /v1/kv/whole", 429, 5 * time.Second},
		{"GET /v1/kv", 429, 0},
		{"GET /v1/kv/c?history=2", 429, 0},
		{"GET /v1/kv?limit=1&start=small", 200, 0},
		{"GET /v1/kv?keys=true", 200, 0},
		{"GET /v1/kv/small", 200, 0},
		{`POST /v1/txn {"then":[{"get":{"key":"c"}}]}`, 200, 0}, // there is some room, and then it has happened
		{`POST /v1/txn {"then":[{"put":{"key":"c","value":""}}]}`, 200, 0},
	} {
		t.Run(row.request, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h, send := newAPI(t)
				stalled := []*rawConn{send("GET /a"), send("GET /v1/kv/b")}
				if got := h.m.inFlight.Load(); got != 0 {
					t.Errorf("%d slots are held", got)
				}
				start := time.Now()
				c := send(row.request)
				a := c.answer(strings.Fields(row.request)[0])
				if took := time.Since(start); a.status != row.status || took != row.took {
					t.Errorf("%d after %v, want %d after %v: %.200s", a.status, took, row.status, row.took, a.body)
				}
				if a.status == 429 {
					if p := problemOf(t, a); p.Code != api.CodeOverloaded || p.Outcome != api.OutcomeNotApplied || a.header.Get("Retry-After") == "" {
						t.Errorf("%+v %v", p, a.header)
					}
				}
				for _, s := range stalled {
					s.Close()
				}
				synctest.Wait()
				if a := send("GET /v1/kv/whole").answer("GET"); a.status != 200 || len(a.body) < 3<<20 {
					t.Errorf("a value larger than the room, alone: %d", a.status)
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		_, send := newAPI(t)
		send("GET /a")
		send("GET /b")
		send(`POST /v1/txn {"then":[{"get":{"key":"c"}}]}`)
		if a := send(`POST /v1/txn {"then":[{"get":{"key":"c"}},{"put":{"key":"d","value":""}}]}`).answer("POST"); a.status != 429 {
			t.Errorf("a transaction that reads, without any room: %d", a.status)
		}
		if a := send(`GET /v1/kv/d`).answer("GET"); a.status != 404 {
			t.Errorf("a refused transaction has happened: %d", a.status)
		}
		if a := send(`POST /v1/txn {"then":[{"put":{"key":"d","value":""}}]}`).answer("POST"); a.status != 200 {
			t.Errorf("a transaction that reads nothing: %d", a.status)
		}
	})
}
