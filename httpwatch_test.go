package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"pontoon/api"
	"pontoon/internal/watch"
	"pontoon/kv"
)

// frame is one message of a watch as a client reads it.
type frame struct {
	event, id string // of an event stream
	hasID     bool
	data      string
	api.Change
}

// text is how the tests write a message down: "7: put a=x, delete b".
func (f *frame) text() string {
	var parts []string
	for _, e := range f.Events {
		part := e.Type + " " + e.Entry.Key
		if e.Type == api.EventPut {
			part += "=" + string(e.Entry.Value)
		} else if e.Entry.Value != nil || e.Entry.ModRevision != f.Revision {
			part += " (malformed)"
		}
		if e.Prev != nil {
			part += " (was " + string(e.Prev.Value) + ")"
		}
		parts = append(parts, part)
	}
	text := fmt.Sprintf("%d: %s", f.Revision, strings.Join(parts, ", "))
	for name, set := range map[string]bool{"initial": f.Initial, "more": f.More, "progress": f.Progress, "overflow": f.Overflow,
		fmt.Sprint("compacted ", f.CompactRevision): f.Compacted} {
		if set {
			text += " [" + name + "]"
		}
	}
	return text
}

// watchReader reads a stream of either form, and checks the form.
type watchReader struct {
	t    testing.TB
	resp *http.Response
	r    *bufio.Reader
	sse  bool
	conn net.Conn // with HTTP/1.1
}

// readWatch begins a watch on a connection of its own, by HTTP/1.1.
func readWatch(t testing.TB, c *rawConn, query, headers string) *watchReader {
	t.Helper()
	c.send("GET /v1/watch" + query + " HTTP/1.1\r\nHost: pontoon\r\n" + headers + "\r\n")
	resp, err := http.ReadResponse(c.r, &http.Request{Method: "GET"})
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	w := newWatchReader(t, resp)
	w.conn = c
	return w
}

func newWatchReader(t testing.TB, resp *http.Response) *watchReader {
	t.Helper()
	w := &watchReader{t: t, resp: resp, r: bufio.NewReader(resp.Body), sse: resp.Header.Get("Content-Type") == "text/event-stream"}
	if resp.StatusCode != 200 {
		body, _ := io.ReadAll(resp.Body)
		t.Fatalf("status %d: %s", resp.StatusCode, body)
	}
	return w
}

// next returns the next message; false is the clean end of the stream.
func (w *watchReader) next() (frame, bool) {
	w.t.Helper()
	var f frame
	var err error
	if w.sse {
		f, err = readSSE(w.r)
	} else {
		f.data, err = w.r.ReadString('\n')
		if err == io.EOF && f.data != "" {
			err = io.ErrUnexpectedEOF
		}
		f.data = strings.TrimSuffix(f.data, "\n")
	}
	if err == io.EOF {
		return f, false
	}
	if err != nil {
		w.t.Fatalf("the stream breaks: %v", err)
	}
	if err := json.Unmarshal([]byte(f.data), &f.Change); err != nil {
		w.t.Fatalf("%v in %.200q", err, f.data)
	}
	if again := string(f.Change.AppendJSON(nil)); again != f.data {
		w.t.Fatalf("not what api.Change makes of it:\n%s\n%s", f.data, again)
	}
	if !w.sse {
		return f, true
	}
	kind := map[bool]string{f.Progress: "progress", f.Overflow: "overflow", f.Compacted: "compacted"}[true]
	if kind == "" {
		kind = "change"
	}
	if f.event != kind || f.hasID != (!f.More && !f.Compacted) || f.hasID && f.id != strconv.FormatInt(f.Revision, 10) {
		w.t.Fatalf("event %q with id %q for %s", f.event, f.id, f.data)
	}
	return f, true
}

func (w *watchReader) want(texts ...string) {
	w.t.Helper()
	for _, want := range texts {
		f, ok := w.next()
		if got := f.text(); !ok || got != want {
			w.t.Fatalf("got %q (%v), want %q", got, ok, want)
		}
	}
}

func (w *watchReader) wantEnd() {
	w.t.Helper()
	if f, ok := w.next(); ok {
		w.t.Fatalf("got %q, want the end", f.text())
	}
}

// readSSE reads one event as the HTML standard parses it: fields until an empty
// line; an event that is cut short is none.
func readSSE(r *bufio.Reader) (f frame, err error) {
	var data []string
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return frame{}, err
		}
		line = strings.TrimSuffix(line, "\n")
		if line == "" {
			if data == nil {
				continue
			}
			f.data = strings.Join(data, "\n")
			return f, nil
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "":
		case "data":
			data = append(data, value)
		case "event":
			f.event = value
		case "id":
			f.id, f.hasID = value, true
		default:
			return f, fmt.Errorf("a field %q, which browsers ignore", field)
		}
	}
}

const asSSE = "Accept: text/event-stream\r\n"

func put(key, value string) kv.Command {
	return kv.Command{Op: kv.OpPut, Key: key, Value: []byte(value)}
}
func del(key string) kv.Command { return kv.Command{Op: kv.OpDelete, Key: key} }

// serveTwin is a twin behind a socket.
func serveTwin(t testing.TB) (*testAPI, *twinBackend, string) {
	t.Helper()
	h, b := newTwinAPI(t, testLimits())
	return h, b, serveTest(t, h)
}

func TestWatchRefusals(t *testing.T) {
	_, b, addr := serveTwin(t)
	b.do(put("a", "1"), put("a", "2")) // revision 2
	long := strings.Repeat("k", 4097)
	many := strings.Repeat("&key=k", 51) + strings.Repeat("&prefix=p", 50)
	for _, row := range []struct {
		method, query, headers string
		status                 int
		code                   api.Code
		text                   string
	}{
		{"POST", "", "", 405, api.CodeMethodNotAllowed, "method"},
		{"HEAD", "", "", 405, "", ""},
		{"GET", "?from=0", "", 400, api.CodeBadRequest, "from"},
		{"GET", "?from=-1", "", 400, api.CodeBadRequest, "from"},
		{"GET", "?from=x", "", 400, api.CodeBadRequest, "from"},
		{"GET", "?from=9999999999999999999", "", 400, api.CodeBadRequest, "from"},
		{"GET", "?from=4", "", 400, api.CodeFutureRevision, "revision 4, the store is at 2"},
		{"GET", "", "Last-Event-ID: 3\r\n", 400, api.CodeFutureRevision, "revision 4"},
		{"GET", "", "Last-Event-ID: 9223372036854775806\r\n", 400, api.CodeFutureRevision, ""},
		{"GET", "", "Last-Event-ID: x\r\n", 400, api.CodeBadRequest, "header Last-Event-ID:"},
		{"GET", "", "Last-Event-ID: \r\n", 400, api.CodeBadRequest, "header Last-Event-ID:"},
		{"GET", "", "Last-Event-ID: 1\r\nLast-Event-ID: 1\r\n", 400, api.CodeBadRequest, "twice"},
		{"GET", "?from=1&initial=true", "", 400, api.CodeBadRequest, "from and initial"},
		{"GET", "?initial=maybe", "", 400, api.CodeBadRequest, "initial"},
		{"GET", "?prefix=a&start=b", "", 400, api.CodeBadRequest, "start and end"},
		{"GET", "?key=a&end=b", "", 400, api.CodeBadRequest, "start and end"},
		{"GET", "?start=b&end=a", "", 400, api.CodeBadRequest, "no key can lie"},
		{"GET", "?key=", "", 400, api.CodeBadRequest, "key="},
		{"GET", "?key=" + long, "", 400, api.CodeBadRequest, "key="},
		{"GET", "?prefix=" + long, "", 400, api.CodeBadRequest, "prefix="},
		{"GET", "?" + many[1:], "", 400, api.CodeBadRequest, "at most 100 keys and prefixes"},
		{"GET", "?events=", "", 400, api.CodeBadRequest, "events"},
		{"GET", "?events=put,nope", "", 400, api.CodeBadRequest, "events"},
		{"GET", "?progress=1ms", "", 400, api.CodeBadRequest, "progress"},
		{"GET", "?progress=2h", "", 400, api.CodeBadRequest, "progress"},
		{"GET", "?limit=3", "", 400, api.CodeBadRequest, "limit"},
		{"GET", "?revision=1", "", 400, api.CodeBadRequest, "revision"},
		{"GET", "?prev=true&prev=true", "", 400, api.CodeBadRequest, "twice"},
		{"GET", "", "If-None-Match: \"1\"\r\n", 400, api.CodeBadRequest, "If-None-Match"},
		{"GET", "", "Prefer: wait=3\r\n", 400, api.CodeBadRequest, "Prefer"},
		{"GET", "?min_revision=9&timeout=10ms", "", 504, api.CodeCommitTimeout, ""},
	} {
		a := exchange(t, addr, row.method, "/v1/watch"+row.query, row.headers+"Accept: application/json\r\n", "")
		if a.status != row.status {
			t.Errorf("%s %s %q: status %d, want %d; %s", row.method, row.query, row.headers, a.status, row.status, a.body)
			continue
		}
		if row.code == "" {
			continue
		}
		if p := problemOf(t, a); p.Code != row.code || !strings.Contains(a.body, row.text) || row.method == "GET" && row.status < 500 && p.Outcome != api.OutcomeNotApplied {
			t.Errorf("%s %s %q: %s", row.method, row.query, row.headers, a.body)
		}
	}
	if a := exchange(t, addr, "GET", "/v1/watch?from=9", asSSE, ""); a.status != 400 || a.header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("a refusal to a browser: %d %v", a.status, a.header)
	}
}

func TestWatchStartFails(t *testing.T) {
	h, b, addr := serveTwin(t)
	b.hub.SetLimit(1)
	first := readWatch(t, dialRaw(t, addr), "", "")
	a := exchange(t, addr, "GET", "/v1/watch", "Accept: application/json\r\n", "")
	if p := problemOf(t, a); a.status != 429 || p.Code != api.CodeOverloaded || a.header.Get("Retry-After") == "" {
		t.Errorf("one too many: %d %s", a.status, a.body)
	}
	if a := exchange(t, addr, "GET", "/v1/kv/k", "Prefer: wait=1\r\nIf-None-Match: \"0\"\r\n", ""); a.status != 429 {
		t.Errorf("a long poll is a watch: %d", a.status)
	}
	b.do(put("k", "v"))
	first.want("1: put k=v")
	b.hub.Close()
	first.wantEnd()
	if a := exchange(t, addr, "GET", "/v1/watch", "Accept: application/json\r\n", ""); a.status != 503 || problemOf(t, a).Code != api.CodeStopping {
		t.Errorf("while stopping: %d %s", a.status, a.body)
	}
	h.fakeBackend.err = errNoLeader
	if a := exchange(t, addr, "GET", "/v1/watch", "", ""); a.status != 503 {
		t.Errorf("without a leader: %d", a.status)
	}
}

func TestWatchIsLive(t *testing.T) {
	for _, row := range []struct {
		name, query, headers string
		want                 []string
	}{
		{"everything", "", "", []string{"3: put a=1", "4: put b=2", "5: delete a", "6: put a=x, put c=y, delete d", "7: put a="}},
		{"everything, as SSE", "", asSSE, []string{"3: put a=1", "4: put b=2", "5: delete a", "6: put a=x, put c=y, delete d", "7: put a="}},
		{"a key", "?key=a", "", []string{"3: put a=1", "5: delete a", "6: put a=x", "7: put a="}},
		{"keys and prefixes", "?key=b&prefix=a&key=a", asSSE, []string{"3: put a=1", "4: put b=2", "5: delete a", "6: put a=x", "7: put a="}},
		{"a span", "?start=b&end=d", "", []string{"4: put b=2", "6: put c=y"}},
		{"to the end", "?start=c", "", []string{"6: put c=y, delete d"}},
		{"from the start", "?end=b", "", []string{"3: put a=1", "5: delete a", "6: put a=x", "7: put a="}},
		{"prev", "?prev=true", asSSE, []string{"3: put a=1", "4: put b=2", "5: delete a (was 1)", "6: put a=x, put c=y, delete d (was 0)", "7: put a= (was x)"}},
		{"deletes", "?events=delete&prev", "", []string{"5: delete a (was 1)", "6: delete d (was 0)"}},
		{"puts", "?events=put", "", []string{"3: put a=1", "4: put b=2", "6: put a=x, put c=y", "7: put a="}},
		{"both", "?events=delete,put&prefix=d", "", []string{"6: delete d"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, b, addr := serveTwin(t)
			b.do(put("d", "0"), put("z", "0"))
			w := readWatch(t, dialRaw(t, addr), row.query, row.headers)
			wantHeader := map[string]string{"Kv-Revision": "2", "Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept",
				"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox", "Content-Type": "application/x-ndjson"}
			if row.headers == asSSE {
				wantHeader["Content-Type"] = "text/event-stream"
			}
			for name, want := range wantHeader {
				if got := w.resp.Header.Get(name); got != want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
			// Nothing is read before, so that each write finds the watch waiting
			// or behind, as it comes.
			b.do(put("a", "1"))
			b.do(put("b", "2"), del("a"))
			b.do(kv.Command{Op: kv.OpTxn, Txn: &kv.Txn{Then: []kv.TxnOp{{Op: kv.OpPut, Key: "c", Value: []byte("y")},
				{Op: kv.OpDeleteRange, Span: kv.SingleKey("d")}, {Op: kv.OpPut, Key: "a", Value: []byte("x")}}}})
			b.do(put("a", ""))
			w.want(row.want...)
			b.hub.Close()
			w.wantEnd()

			// The same from history, and by HTTP/2.
			_, b2, addr2 := serveTwin(t)
			b2.mu.state = b.mu.state
			r := requestTo(t, "GET", addr2, "/v1/watch"+row.query, nil)
			r.Header.Set("Last-Event-ID", "2")
			if row.headers == asSSE {
				r.Header.Set("Accept", "text/event-stream")
			}
			resp, err := http2Client(t).Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			w = newWatchReader(t, resp)
			w.want(row.want...)
			b2.hub.Close()
			w.wantEnd()
		})
	}
}

// The bytes, once: what a browser and a line reader parse.
func TestWatchBytes(t *testing.T) {
	_, b, addr := serveTwin(t)
	b.do(put("a", "x\ny"))
	b.do(put("a", "\xff"))
	lines := `{"revision":1,"events":[{"type":"put","entry":{"key":"a","value":"x\ny","create_revision":1,"mod_revision":1,"version":1}}]}` + "\n" +
		`{"revision":2,"events":[{"type":"put","entry":{"key":"a","value_b64":"/w==","create_revision":1,"mod_revision":2,"version":2},` +
		`"prev":{"key":"a","value":"x\ny","create_revision":1,"mod_revision":1,"version":1}}]}` + "\n"
	first, second, _ := strings.Cut(lines, "\n")
	events := "id: 1\nevent: change\ndata: " + first + "\n\nid: 2\nevent: change\ndata: " + second + "\n"
	for headers, want := range map[string]string{"": lines, "Accept: */*\r\n": lines, asSSE: events,
		"Accept: application/json, Text/Event-Stream ;q=0.5\r\n": events, "Accept: text/event-stream;q=0\r\n": lines} {
		w := readWatch(t, dialRaw(t, addr), "?from=1&prev=true", headers)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(w.r, got); err != nil || string(got) != want {
			t.Errorf("%q: %v\n got %s\nwant %s", headers, err, got, want)
		}
	}
}

func TestWatchFrom(t *testing.T) {
	for _, row := range []struct {
		query, headers string
		want           []string
	}{
		{"?from=1", "", []string{"1: put a=1", "2: put a=2", "3: put a=3"}},
		{"?from=3", "", []string{"3: put a=3"}},
		{"?from=4", "", nil},
		{"", "Last-Event-ID: 0\r\n", []string{"1: put a=1", "2: put a=2", "3: put a=3"}},
		{"", "Last-Event-ID: 2\r\n", []string{"3: put a=3"}},
		{"", "Last-Event-ID: 3\r\n", nil},
		{"?from=1", "Last-Event-ID: 2\r\n", []string{"3: put a=3"}},
		{"?from=99", "Last-Event-ID: 2\r\n", []string{"3: put a=3"}},
		{"?initial=true", "Last-Event-ID: 1\r\n", []string{"2: put a=2", "3: put a=3"}},
		{"?initial=true&from=1", "Last-Event-ID: 2\r\n", []string{"3: put a=3"}},
		{"?from=1&prefix=b", "", nil},
		{"?from=3&consistency=stale&min_revision=3&timeout=1s", "", []string{"3: put a=3"}},
	} {
		_, b, addr := serveTwin(t)
		for i := range 3 {
			b.do(put("a", strconv.Itoa(i+1)))
		}
		w := readWatch(t, dialRaw(t, addr), row.query, row.headers)
		if got := w.resp.Header.Get("Kv-Revision"); got != strconv.FormatInt(b.revision(), 10) {
			t.Errorf("Kv-Revision %s", got)
		}
		w.want(row.want...)
		b.do(put("b", "live"))
		w.want(fmt.Sprintf("%d: put b=live", b.revision()))
	}
}

// compactTwin drops the history, by writing more than is kept.
func compactTwin(b *twinBackend) int64 {
	for range 40 {
		b.do(put("large", strings.Repeat("x", 1<<20)))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.state.History().Compacted()
}

func TestWatchFromCompacted(t *testing.T) {
	_, b, addr := serveTwin(t)
	compacted := compactTwin(b)
	if compacted == 0 {
		t.Fatal("nothing is compacted")
	}
	a := exchange(t, addr, "GET", "/v1/watch?from="+strconv.FormatInt(compacted, 10), "Accept: application/json\r\n", "")
	if p := problemOf(t, a); a.status != 410 || p.Code != api.CodeRevisionCompacted || p.CompactRevision != compacted {
		t.Errorf("%d %s", a.status, a.body)
	}
	w := readWatch(t, dialRaw(t, addr), "?key=large&from="+strconv.FormatInt(compacted+1, 10), "")
	if f, ok := w.next(); !ok || f.Revision != compacted+1 {
		t.Errorf("the first revision that is kept: %d, %v", f.Revision, ok)
	}
}

// A dispatcher that comes so late that history has dropped what it did not hand
// out cuts the watchers, each after the last change that it got, and goes on from
// where history is. So a gap is a message to the client, never silence.
func TestDispatcherFallsBehind(t *testing.T) {
	s := &kvstore{}
	s.mu.state = kv.NewState()
	defer s.hub.Close()
	index := uint64(0)
	apply := func(value string) {
		index++
		s.mu.state.Apply(index, &kv.Batch{Commands: []kv.Command{put("k", value)}}, nil)
	}
	subscribe := func() *watch.Watcher {
		w, err := s.hub.Add(watch.Filter{Keys: []string{"k"}}, s.mu.state.Revision())
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	got := make([]watch.Message, 8)

	w, next := subscribe(), uint64(1)
	apply("seen")
	next = s.fanOut(next)
	for s.mu.state.History().Compacted() < int64(next) {
		apply(strings.Repeat("x", 1<<20))
	}
	next = s.fanOut(next)
	n, status := w.Take(got)
	if n != 1 || got[0].Revision != 1 {
		t.Errorf("before the gap: %+v", got[:n])
	}
	if n, status = w.Take(got); n != 0 || !status.Cut || status.Delivered != 1 {
		t.Errorf("at the gap: %d messages, %+v; want none, cut after revision 1", n, status)
	}
	w.Close()

	w = subscribe()
	apply("after")
	s.fanOut(next)
	if n, status = w.Take(got); n != 1 || got[0].Revision != s.mu.state.Revision() || status.Cut {
		t.Errorf("a watcher after the gap got %+v, %+v", got[:n], status)
	}
	w.Close()
}

// lockHub takes the lock of a hub, as a Publish does for as long as it takes.
func lockHub(t *testing.T, h *watch.Hub) *sync.Mutex {
	t.Helper()
	field := reflect.ValueOf(h).Elem().FieldByName("mu")
	if !field.IsValid() || field.Type().Field(0).Type != reflect.TypeFor[sync.Mutex]() {
		t.Fatal("the lock of a Hub is not where it was: look for it anew")
	}
	mu := (*sync.Mutex)(unsafe.Pointer(field.UnsafeAddr()))
	mu.Lock()
	return mu
}

// Who subscribes while the hub is busy holds up no write, and gets each change
// once: those that came between the history and the watcher are published later,
// also if the apply loop saw no watcher yet, or were passed over and are in a newer history.
func TestSubscribeWhileTheHubIsBusy(t *testing.T) {
	for _, passed := range []bool{false, true} {
		for _, initial := range []bool{false, true} {
			s := &kvstore{node: &raftNode{}, published: make(chan struct{}, 1)}
			s.mu.state = kv.NewState()
			write := func() {
				s.mu.state.Apply(s.mu.state.Applied()+1, &kv.Batch{Commands: []kv.Command{put("k", "")}}, nil)
				s.revision.Advance(uint64(s.mu.state.Revision()))
			}
			write()
			next := s.fanOut(1)

			busy := lockHub(t, &s.hub)
			var w *watch.Watcher
			var h kv.History
			var v *kv.View
			var err error
			done := make(chan struct{})
			go func() {
				defer close(done)
				w, h, v, err = s.subscribe(watch.Filter{Keys: []string{"k"}}, initial)
			}()
			asks := func() bool {
				stacks := make([]byte, 1<<20)
				return bytes.Contains(stacks[:runtime.Stack(stacks, true)], []byte("watch.(*Hub).Add("))
			}
			for deadline := time.Now().Add(10 * time.Second); !asks(); runtime.Gosched() {
				if time.Now().After(deadline) {
					t.Fatal("nobody asks the hub")
				}
			}
			if !s.mu.TryLock() {
				busy.Unlock()
				t.Fatalf("passed %v, initial %v: a write waits for the hub", passed, initial)
			}
			write()
			s.mu.Unlock()
			if passed {
				// What Skip does, which would have to wait behind Add for the lock.
				published := reflect.ValueOf(&s.hub).Elem().FieldByName("published")
				(*atomic.Int64)(unsafe.Pointer(published.UnsafeAddr())).Store(2)
			}
			busy.Unlock()
			<-done
			if err != nil {
				t.Fatal(err)
			}

			var nudged bool
			select {
			case <-s.published:
				nudged = true
				s.fanOut(next)
			default:
			}
			began := int64(1)
			if passed {
				began = 2
			}
			got := make([]watch.Message, 8)
			n, status := w.Take(got)
			if h.Revision() != began || initial != (v != nil) || initial && v.Revision() != began ||
				nudged == passed || int64(n) != 2-began || status.Delivered != 2 || status.Cut {
				t.Errorf("passed %v, initial %v: begun at revision %d, view %v, nudged %v, then %d messages, %+v", passed, initial, h.Revision(), v, nudged, n, status)
			}
			w.Close()
			if s.hub.Len() != 0 {
				t.Errorf("passed %v, initial %v: %d watchers are left", passed, initial, s.hub.Len())
			}
		}
	}
}

// A watcher that begins where the dispatcher has passed over what nobody wanted
// misses it, and is cut.
func TestSubscribeBehindTheDispatcher(t *testing.T) {
	s := &kvstore{}
	s.mu.state = kv.NewState()
	write := func(value string) {
		s.mu.state.Apply(s.mu.state.Applied()+1, &kv.Batch{Commands: []kv.Command{put("k", value)}}, nil)
	}
	cut := func(what string) {
		t.Helper()
		w, err := s.hub.Add(watch.Filter{Keys: []string{"k"}}, 1)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		if !w.IsCut() {
			t.Errorf("%s: a watcher that knows revision 1 is not cut at %d", what, s.mu.state.Revision())
		}
	}
	write("")
	write("")
	next := s.fanOut(1)
	cut("nobody watched")

	w, err := s.hub.Add(watch.Filter{Keys: []string{"k"}}, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for s.mu.state.History().Compacted() < int64(next) {
		write(strings.Repeat("x", 1<<20))
	}
	s.fanOut(next)
	if !w.IsCut() || s.hub.Published() != s.mu.state.Revision() {
		t.Errorf("changes are gone: cut %v, published %d, want %d", w.IsCut(), s.hub.Published(), s.mu.state.Revision())
	}
}

func TestWatchInitial(t *testing.T) {
	_, b, addr := serveTwin(t)
	w := readWatch(t, dialRaw(t, addr), "?initial=true", "")
	w.want("0:  [initial]") // an empty store says so
	b.do(put("a/1", "x"), put("b", "y"), put("a/2", "z"), put("c", "w"), del("c"))
	w.want("1: put a/1=x")
	for _, row := range []struct{ query, want string }{
		{"?initial=true", "5: put a/1=x, put a/2=z, put b=y [initial]"},
		{"?initial&prefix=a/", "5: put a/1=x, put a/2=z [initial]"},
		{"?initial&key=b&prefix=a/&key=a/1&prefix=a&key=nope", "5: put a/1=x, put a/2=z, put b=y [initial]"},
		{"?initial&start=a/2", "5: put a/2=z, put b=y [initial]"},
		{"?initial&end=a/2", "5: put a/1=x [initial]"},
		{"?initial&prefix=zz", "5:  [initial]"},
		{"?initial&events=put&prev", "5: put a/1=x, put a/2=z, put b=y [initial]"},
		{"?initial&events=delete", "5:  [initial]"},
	} {
		for _, headers := range []string{"", asSSE} {
			w := readWatch(t, dialRaw(t, addr), row.query, headers)
			w.want(row.want)
			if got := w.resp.Header.Get("Kv-Revision"); got != "5" {
				t.Errorf("Kv-Revision %s", got)
			}
			w.conn.Close()
		}
	}
	w = readWatch(t, dialRaw(t, addr), "?initial=true&key=b", "")
	w.want("5: put b=y [initial]")
	b.do(put("b", "live"))
	w.want("6: put b=live")
}

// A long list comes in parts; only the last can be resumed from. Writes between
// the parts come after all of them.
func TestWatchInitialInParts(t *testing.T) {
	_, b, addr := serveTwin(t)
	want := map[string]string{}
	for i := range 2 * initialEntries {
		key := fmt.Sprintf("k%05d", i)
		want[key] = "v"
		b.do(put(key, "v"))
	}
	for i := range 3 {
		key := fmt.Sprint("large", i)
		want[key] = strings.Repeat("x", initialBytes-10)
		b.do(put(key, want[key]))
	}
	revision := b.revision()
	for try := range 2 { // the first leaves in the middle
		w := readWatch(t, dialRaw(t, addr), "?initial=true", asSSE)
		b.do(put("k00000", "later"), put("zz", "new"))
		got := map[string]string{}
		last := ""
		for part := 0; ; part++ {
			f, ok := w.next()
			if !ok || !f.Initial || f.Revision != revision || len(f.Events) == 0 || len(f.Events) > initialEntries {
				t.Fatalf("part %d: %v %.100q", part, ok, f.data)
			}
			for _, e := range f.Events {
				if e.Entry.Key <= last || e.Type != api.EventPut || e.Prev != nil {
					t.Fatalf("%+v after %q", e, last)
				}
				last = e.Entry.Key
				got[e.Entry.Key] = string(e.Entry.Value)
			}
			if try == 0 && part == 1 {
				w.conn.Close() // no id came yet: the client begins anew
				b.mu.Lock()
				revision = b.mu.state.Revision()
				b.mu.Unlock()
				want["k00000"], want["zz"] = "later", "new"
				break
			}
			if !f.More {
				break
			}
		}
		if try == 0 {
			continue
		}
		for key := range want {
			if got[key] != want[key] {
				t.Errorf("%s: %.20q, want %.20q", key, got[key], want[key])
			}
		}
		if len(got) != len(want) {
			t.Errorf("%d entries, want %d", len(got), len(want))
		}
		w.want(fmt.Sprintf("%d: put k00000=later", revision+1), fmt.Sprintf("%d: put zz=new", revision+2))
	}
}

// Long lists hold a clone of the state each, as exports do; short ones do not.
func TestWatchInitialIsBounded(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	for i := range 4 {
		b.do(put(fmt.Sprint("k", i), strings.Repeat("x", initialBytes/2)))
	}
	b.do(put("z", "1"))
	addr := serveTest(t, h)
	exports := &h.Handler.(*httpAPI).exports
	exports.Store(int64(testLimits().MaxExports))
	if a := exchange(t, addr, "GET", "/v1/watch?initial=true", "", ""); a.status != 429 || a.header.Get("Retry-After") == "" {
		t.Errorf("a long list: %d %s", a.status, a.body)
	}
	w := readWatch(t, dialRaw(t, addr), "?initial=true&prefix=z", "")
	w.want("5: put z=1 [initial]")
	exports.Store(0)
	w = readWatch(t, dialRaw(t, addr), "?initial=true", "")
	for f, ok := w.next(); ok && f.More; {
		f, ok = w.next()
	}
	b.do(put("z", "2"))
	w.want("6: put z=2")
	if n := exports.Load(); n != 0 {
		t.Errorf("%d places held by a list that is sent", n)
	}
}

// watchPipe is a watch over a connection without any buffer, inside a synctest
// bubble. finished is closed when the handler has returned.
func watchPipe(t *testing.T, h http.Handler, query, headers string) (w *watchReader, finished chan struct{}) {
	finished = make(chan struct{})
	c := pipeServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer close(finished)
		h.ServeHTTP(w, r)
	}))
	return readWatch(t, c, query, headers), finished
}

func TestWatchProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := newTwinAPI(t, testLimits())
		b.do(put("a", "1"))
		w, _ := watchPipe(t, h, "?key=a&progress=10s", asSSE)
		start := time.Now()
		at := func(d time.Duration) {
			t.Helper()
			if got := time.Since(start); got != d {
				t.Errorf("came after %v, want %v", got, d)
			}
		}
		w.want("1:  [progress]")
		at(10 * time.Second)
		<-time.After(4 * time.Second)
		b.do(put("b", "1"), put("b", "2")) // of no concern, and no activity
		w.want("3:  [progress]")
		at(20 * time.Second)
		<-time.After(9 * time.Second)
		b.do(put("a", "2"))
		w.want("4: put a=2") // begins the interval anew
		at(29 * time.Second)
		w.want("4:  [progress]", "4:  [progress]")
		at(49 * time.Second)
		b.hub.Close()
		w.wantEnd()
	})
}

// Progress must not overtake what is still to be sent.
func TestWatchProgressBehindEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := newTwinAPI(t, testLimits())
		w, _ := watchPipe(t, h, "?progress=100ms", "")
		for i := range 20 {
			b.do(put("a", strings.Repeat("x", streamPiece)+strconv.Itoa(i))) // stuck in the pipe
		}
		<-time.After(5 * time.Second)
		for i := range 20 {
			if f, ok := w.next(); !ok || f.Revision != int64(i+1) || f.Progress {
				t.Fatalf("message %d: %.60q", i, f.data)
			}
		}
		w.want("20:  [progress]")
		b.hub.Close()
		w.wantEnd()
	})
}
