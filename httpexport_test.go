package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"pontoon/api"
	"pontoon/kv"
)

const acceptNDJSON = "Accept: application/x-ndjson"

func TestExport(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	b.do(kv.Command{Op: kv.OpPut, Key: "a", Value: []byte("1")}, kv.Command{Op: kv.OpPut, Key: "b\xff", Value: []byte{0xfe}})
	b.do(kv.Command{Op: kv.OpPut, Key: "c", TTL: time.Minute, Wall: 1_900_000_000_000}, kv.Command{Op: kv.OpPut, Key: "a", Value: []byte("2")})
	const (
		a  = `{"key":"a","value":"2","create_revision":1,"mod_revision":4,"version":2}` + "\n"
		b2 = `{"key_b64":"Yv8=","value_b64":"/g==","create_revision":2,"mod_revision":2,"version":1}` + "\n"
		c  = `{"key":"c","value":"","create_revision":3,"mod_revision":3,"version":1,"lease":"1","expires":"2030-03-17T17:47:40Z"}` + "\n"
	)
	for _, row := range []struct{ query, want string }{
		{"", a + b2 + c + `{"end":true,"items":3,"revision":4}` + "\n"},
		{"prefix=", a + b2 + c + `{"end":true,"items":3,"revision":4}` + "\n"},
		{"prefix=a", a + `{"end":true,"items":1,"revision":4}` + "\n"},
		{"prefix=x", `{"end":true,"items":0,"revision":4}` + "\n"},
		{"start=b&end=c&count=false&reverse=false", b2 + `{"end":true,"items":1,"revision":4}` + "\n"},
		{"keys&end=b", `{"key":"a","create_revision":1,"mod_revision":4,"version":2}` + "\n" + `{"end":true,"items":1,"revision":4}` + "\n"},
		{"revision=1", strings.NewReplacer("2", "1", "4", "1").Replace(a) + `{"end":true,"items":1,"revision":1}` + "\n"},
	} {
		got := ask(t, h, "GET", "/v1/kv?"+row.query, "", acceptNDJSON)
		if got.status != 200 || got.body != row.want {
			t.Errorf("%s: %d\n%s, want\n%s", row.query, got.status, got.body, row.want)
		}
		if got.header.Get("Content-Type") != "application/x-ndjson" || got.header.Get("Vary") != "Accept" || got.header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: %v", row.query, got.header)
		}
		head := ask(t, h, "HEAD", "/v1/kv?"+row.query, "", acceptNDJSON)
		if head.status != 200 || head.body != "" || head.header.Get("Kv-Revision") == "" || head.header.Get("Kv-Revision") != got.header.Get("Kv-Revision") ||
			head.header.Get("Content-Type") != "application/x-ndjson" {
			t.Errorf("%s: HEAD %d %v", row.query, head.status, head.header)
		}
	}
}

// An export of the past leaves out leases that have ended since, so that it is
// an import wherever it is sent: without the lease, or attached to a stranger's.
func TestExportWithoutEndedLeases(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	b.do(kv.Command{Op: kv.OpPut, Key: "a", Value: []byte("1"), TTL: 2 * time.Second, Wall: 1_900_000_000_000},
		kv.Command{Op: kv.OpPut, Key: "b", Value: []byte("2"), TTL: time.Hour, Wall: 1_900_000_000_000})
	b.tick(time.Second)
	b.tick(10 * time.Second)
	got := ask(t, h, "GET", "/v1/kv?revision=2", "", acceptNDJSON)
	const want = `{"key":"a","value":"1","create_revision":1,"mod_revision":1,"version":1}` + "\n" +
		`{"key":"b","value":"2","create_revision":2,"mod_revision":2,"version":1,"lease":"2","expires":"2026-01-02T04:04:06Z"}` + "\n" +
		`{"end":true,"items":2,"revision":2}` + "\n"
	if got.status != 200 || got.body != want {
		t.Errorf("%d\n%s, want\n%s", got.status, got.body, want)
	}
	if a := ask(t, h, "POST", "/v1/kv", got.body); a.status != 200 {
		t.Errorf("the import: %d %s", a.status, a.body)
	}
}

func TestExportRefusals(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	fill(b, "a")
	for query, detail := range map[string]string{
		"limit=5": "limit contradicts Accept: application/x-ndjson", "after=x": "after contradicts Accept", "count": "count contradicts Accept",
		"delimiter=/": "delimiter contradicts Accept", "reverse": "reverse contradicts Accept", "revision=9": "", "x=1": `"x" is none of this call`,
	} {
		for _, method := range []string{"GET", "HEAD"} {
			a := ask(t, h, method, "/v1/kv?"+query, "", acceptNDJSON)
			if a.status != 400 || method == "GET" && !strings.Contains(a.body, detail) {
				t.Errorf("%s %s: %d %s", method, query, a.status, a.body)
			}
		}
	}
	compact(b)
	if a := ask(t, h, "GET", "/v1/kv?revision=1", "", acceptNDJSON, "Accept: application/problem+json"); a.status != 410 || problemOf(t, a).CompactRevision == 0 {
		t.Errorf("compacted: %d %s", a.status, a.body)
	}
	if n := h.m.inFlight.Load(); n != 0 {
		t.Errorf("%d slots taken", n)
	}
}

func TestAcceptDecidesAboutExport(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	fill(b, "a")
	for accept, export := range map[string]bool{
		"application/x-ndjson":                               true,
		"Application/X-NDJSON; charset=utf-8":                true,
		"application/x-ndjson, application/problem+json":     true,
		"application/x-ndjson, */*":                          true,
		"application/json, application/x-ndjson":             true,
		"application/json;q=0.5, application/x-ndjson;q=0.6": true,
		"application/json, application/x-ndjson;q=0.9":       false,
		"application/x-ndjson;q=0":                           false,
		"application/x-ndjson;q=x":                           false,
		"*/*":                                                false,
		"application/*":                                      false,
		"application/json":                                   false,
		"":                                                   false,
		"text/plain":                                         false,
	} {
		a := ask(t, h, "GET", "/v1/kv", "", "Accept: "+accept)
		if got := a.header.Get("Content-Type") == "application/x-ndjson"; a.status != 200 || got != export {
			t.Errorf("Accept: %s: %d %v", accept, a.status, a.header)
		}
	}
}

// exportLines reads an export and fails if it is not whole.
func exportLines(t failer, r io.Reader) ([]string, string) {
	t.Helper()
	var lines []string
	s := bufio.NewScanner(r)
	s.Buffer(nil, 16<<20)
	for s.Scan() {
		lines = append(lines, s.Text())
	}
	if err := s.Err(); err != nil {
		t.Fatalf("after %d lines: %v", len(lines), err)
	}
	if len(lines) == 0 || !strings.HasPrefix(lines[len(lines)-1], `{"end":true,`) {
		t.Fatalf("%d lines and no trailer", len(lines))
	}
	return lines[:len(lines)-1], lines[len(lines)-1]
}

// An export that a client reads slowly is of one revision, whatever is written
// meanwhile, over both protocols, and well after its deadline.
func TestExportWhileWriting(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	const keys = 500
	for i := range keys {
		b.do(kv.Command{Op: kv.OpPut, Key: fmt.Sprintf("k%04d", i), Value: make([]byte, 20_000)})
	}
	addr := serveTest(t, h)
	for _, client := range []*http.Client{{Transport: &http.Transport{}}, http2Client(t)} {
		revision := b.revision()
		r, err := http.NewRequest("GET", "http://"+addr+"/v1/kv?timeout=100ms", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Accept", "application/x-ndjson")
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		in := bufio.NewReader(resp.Body)
		first, err := in.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		for i := range keys {
			b.do(kv.Command{Op: kv.OpPut, Key: fmt.Sprintf("k%04d", i), Value: []byte("new")}, kv.Command{Op: kv.OpPut, Key: fmt.Sprintf("n%04d", i)})
		}
		<-time.After(150 * time.Millisecond) // the time-out
		lines, trailer := exportLines(t, in)
		if want := fmt.Sprintf(`{"end":true,"items":%d,"revision":%d}`, len(lines)+1, revision); trailer != want {
			t.Errorf("trailer %s, want %s", trailer, want)
		}
		if n := strconv.FormatInt(revision, 10); resp.Header.Get("Kv-Revision") != n {
			t.Errorf("%v, want Kv-Revision %s", resp.Header, n)
		}
		for _, line := range append(lines, first) {
			var e api.Entry
			if err := e.UnmarshalJSON([]byte(line)); err != nil || e.ModRevision > revision {
				t.Fatalf("%v, %+v in an export of revision %d", err, e, revision)
			}
		}
		resp.Body.Close()
		client.CloseIdleConnections()
	}
}

// lostClone breaks every whole read off after its last entry.
func lostClone(b backend) backend {
	return &hooked{backend: b, onRead: func(_ context.Context, f func(*kv.View) error, inner func(func(*kv.View) error) error) error {
		return errors.Join(inner(f), errors.New("the clone is gone"))
	}}
}

// What could not be read to its end must not look like an export: neither the
// trailer comes nor a regular end of the body.
func TestExportThatBreaksOff(t *testing.T) {
	_, b := newTwinAPI(t, testLimits())
	for i := range 200 {
		b.do(kv.Command{Op: kv.OpPut, Key: fmt.Sprintf("k%04d", i), Value: make([]byte, 1000)})
	}
	h := newTestAPIOver(lostClone(b), &b.fakeBackend, testLimits())
	addr := serveTest(t, h)
	for _, client := range []*http.Client{{Transport: &http.Transport{}}, http2Client(t)} {
		r, _ := http.NewRequest("GET", "http://"+addr+"/v1/kv", nil)
		r.Header.Set("Accept", "application/x-ndjson")
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err == nil || strings.Contains(string(body), `"end"`) || len(body) < pieceBytes {
			t.Errorf("%s: %d bytes, %v", resp.Proto, len(body), err)
		}
		resp.Body.Close()
		client.CloseIdleConnections()
		// Where nothing was sent yet, there is room for the error.
		r, _ = http.NewRequest("GET", "http://"+addr+"/v1/kv?prefix=k0001", nil)
		r.Header.Set("Accept", "application/x-ndjson")
		if resp, err = client.Do(r); err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != 500 {
			t.Errorf("%s: a short export: %s", resp.Proto, resp.Status)
		}
		resp.Body.Close()
		client.CloseIdleConnections()
	}
	if text := metricsText(t, h); !strings.Contains(text, `pontoon_http_requests_total{code="500",route="/v1/kv"} 4`) {
		t.Errorf("not counted as 500: %s", text)
	}
}

func TestExportBound(t *testing.T) {
	_, b := newTwinAPI(t, testLimits())
	fill(b, "a")
	gate, begun := make(chan struct{}), make(chan struct{})
	h := newTestAPIOver(&hooked{backend: b, onRead: func(_ context.Context, f func(*kv.View) error, inner func(func(*kv.View) error) error) error {
		return inner(func(v *kv.View) error {
			err := f(v)
			begun <- struct{}{}
			<-gate
			return err
		})
	}}, &b.fakeBackend, testLimits())
	done := make(chan answer)
	most := testLimits().MaxExports
	for range most {
		go func() { done <- ask(t, h, "GET", "/v1/kv", "", acceptNDJSON) }()
		<-begun
	}
	if n := h.m.inFlight.Load(); n != 0 {
		t.Errorf("%d slots held by exports that stream", n)
	}
	a := ask(t, h, "GET", "/v1/kv", "", acceptNDJSON, "Accept: application/json;q=0.5")
	if p := problemOf(t, a); a.status != 429 || p.Code != api.CodeOverloaded || a.header.Get("Retry-After") == "" || !strings.Contains(p.Detail, "4 exports") {
		t.Errorf("one too many: %d %s", a.status, a.body)
	}
	close(gate)
	for range most {
		if a := <-done; a.status != 200 {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	go func() { <-begun }()
	if a := ask(t, h, "GET", "/v1/kv", "", acceptNDJSON); a.status != 200 {
		t.Errorf("after them: %d", a.status)
	}
}

// A client that leaves ends its export: it neither goes on being read nor stays
// among those under way.
func TestExportClientLeaves(t *testing.T) {
	_, b := newTwinAPI(t, testLimits())
	for i := range 200 {
		b.do(kv.Command{Op: kv.OpPut, Key: fmt.Sprintf("k%04d", i), Value: make([]byte, 100_000)})
	}
	ended := make(chan error, 1)
	h := newTestAPIOver(&hooked{backend: b, onRead: func(_ context.Context, f func(*kv.View) error, inner func(func(*kv.View) error) error) error {
		err := inner(f)
		ended <- err
		return err
	}}, &b.fakeBackend, testLimits())
	c := dialRaw(t, serveTest(t, h))
	c.send("GET /v1/kv HTTP/1.1\r\nHost: pontoon\r\n" + acceptNDJSON + "\r\n\r\n")
	if _, err := c.r.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := <-ended; !errors.Is(err, errClientLeft) {
		t.Errorf("the read ended with %v", err)
	}
}

// An export needs no memory that grows with the store.
func TestExportMemory(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	fillMany(b, 20_000)
	r := httptest.NewRequest("GET", "/v1/kv", nil)
	r.Header.Set("Accept", "application/x-ndjson")
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	w := &countingWriter{nullWriter: nullWriter{h: http.Header{}}}
	h.ServeHTTP(w, r)
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 || w.bytes < 20_000*100 {
		t.Errorf("%d bytes allocated for an export of %d", got, w.bytes)
	}
}

type countingWriter struct {
	nullWriter
	bytes int
}

func (w *countingWriter) Write(p []byte) (int, error) {
	w.bytes += len(p)
	return len(p), nil
}

func (w *countingWriter) Flush() {}

func fillMany(b *twinBackend, n int) {
	var commands []kv.Command
	for i := range n {
		commands = append(commands, kv.Command{Op: kv.OpPut, Key: fmt.Sprintf("key-%07d", i), Value: []byte(strings.Repeat("v", 100))})
		if len(commands) == 1000 || i == n-1 {
			b.do(commands...)
			commands = commands[:0]
		}
	}
}

// BenchmarkExport reports what one export of 200,000 keys allocates.
func BenchmarkExport(b *testing.B) {
	h, twin := newTwinAPI(b, testLimits())
	fillMany(twin, 200_000)
	r := httptest.NewRequest("GET", "/v1/kv", nil)
	r.Header.Set("Accept", "application/x-ndjson")
	b.ReportAllocs()
	for b.Loop() {
		w := &countingWriter{nullWriter: nullWriter{h: http.Header{}}}
		h.ServeHTTP(w, r)
		b.SetBytes(int64(w.bytes))
	}
}
