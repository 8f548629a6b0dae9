package main

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"
	"pgregory.net/rapid"

	"pontoon/kv"
)

// The naive model of a watch: a list of all that ever happened, filtered.

type modelEvent struct {
	key, value, prev string
	existed, deleted bool
}

type modelStore struct {
	now       map[string]string
	revisions [][]modelEvent // of revision i+1, ascending by key
}

// apply does one command, a put or delete of several keys at once, and says
// whether it took a revision.
func (m *modelStore) apply(changes map[string]string, deletes []string) bool {
	var events []modelEvent
	for key, value := range changes {
		prev, existed := m.now[key]
		events = append(events, modelEvent{key, value, prev, existed, false})
		m.now[key] = value
	}
	for _, key := range deletes {
		prev, existed := m.now[key]
		if _, put := changes[key]; put || !existed {
			continue
		}
		events = append(events, modelEvent{key, "", prev, true, true})
		delete(m.now, key)
	}
	if len(events) == 0 {
		return false
	}
	slices.SortFunc(events, func(a, b modelEvent) int { return strings.Compare(a.key, b.key) })
	m.revisions = append(m.revisions, events)
	return true
}

// modelWatch is a client that reads, leaves and comes back.
type modelWatch struct {
	query   string
	sse     bool
	wants   func(key string) bool
	puts    bool
	deletes bool
	prev    bool

	r      *watchReader // nil: not connected
	listed bool         // the list of initial=true has come, or none is to
	list   string       // that list, of the moment of the last connect
	id     int64        // of the last message
}

// message is what the client reads of a revision; empty: nothing.
func (w *modelWatch) message(m *modelStore, revision int64) string {
	var parts []string
	for _, e := range m.revisions[revision-1] {
		part := "put " + e.key + "=" + e.value
		if e.deleted {
			part = "delete " + e.key
		}
		if w.prev && e.existed {
			part += " (was " + e.prev + ")"
		}
		if w.wants(e.key) && (e.deleted && w.deletes || !e.deleted && w.puts) {
			parts = append(parts, part)
		}
	}
	if parts == nil {
		return ""
	}
	return fmt.Sprintf("%d: %s", revision, strings.Join(parts, ", "))
}

// pending is the next message to come; empty: none is due.
func (w *modelWatch) pending(m *modelStore) (string, int64) {
	if !w.listed {
		return w.list, w.id
	}
	for r := w.id + 1; r <= int64(len(m.revisions)); r++ {
		if text := w.message(m, r); text != "" {
			return text, r
		}
	}
	return "", 0
}

func (w *modelWatch) connect(t *testing.T, m *modelStore, addr string) {
	headers := ""
	if w.sse {
		headers = asSSE
	}
	if w.listed {
		headers += fmt.Sprintf("Last-Event-ID: %d\r\n", w.id)
	} else {
		w.id = int64(len(m.revisions))
		var parts []string
		for _, key := range slices.Sorted(maps.Keys(m.now)) {
			if w.wants(key) && w.puts {
				parts = append(parts, "put "+key+"="+m.now[key])
			}
		}
		w.list = fmt.Sprintf("%d: %s [initial]", w.id, strings.Join(parts, ", "))
	}
	w.r = readWatch(t, dialRaw(t, addr), w.query, headers)
}

// read takes one message, if one is due, and compares it.
func (w *modelWatch) read(t *rapid.T, m *modelStore) bool {
	want, revision := w.pending(m)
	if want == "" {
		return false
	}
	f, ok := w.r.next()
	switch {
	case !ok:
		t.Fatalf("%s: the stream ends where %q is due", w.query, want)
	case f.Overflow:
		if f.Revision < w.id || f.Revision >= revision {
			t.Fatalf("%s: cut with id %d, after %d and before %q", w.query, f.Revision, w.id, want)
		}
		w.id = f.Revision
		w.r.wantEnd()
		w.leave()
	case f.text() != want:
		t.Fatalf("%s: got %q, want %q", w.query, f.text(), want)
	default:
		w.id, w.listed = f.Revision, true
	}
	return true
}

func (w *modelWatch) leave() {
	w.r.conn.Close()
	w.r = nil
}

func drawModelWatch(t *rapid.T) *modelWatch {
	w := &modelWatch{puts: true, deletes: true, listed: true, sse: rapid.Bool().Draw(t, "sse"), prev: rapid.Bool().Draw(t, "prev")}
	only := rapid.SampledFrom([]string{"", "", "put", "delete"}).Draw(t, "events")
	terms := rapid.SampledFrom([]string{"", "key=a", "prefix=a", "key=b&prefix=a&key=aa", "start=aa&end=b", "prefix=nobody"}).Draw(t, "terms")
	w.wants = map[string]func(string) bool{
		"":                      func(string) bool { return true },
		"key=a":                 func(k string) bool { return k == "a" },
		"prefix=a":              func(k string) bool { return k[0] == 'a' },
		"key=b&prefix=a&key=aa": func(k string) bool { return k[0] == 'a' || k == "b" },
		"start=aa&end=b":        func(k string) bool { return k >= "aa" && k < "b" },
		"prefix=nobody":         func(string) bool { return false },
	}[terms]
	w.query = "?" + terms
	if only != "" {
		w.puts, w.deletes = only == "put", only == "delete"
		w.query += "&events=" + only
	}
	if w.prev {
		w.query += "&prev=true"
	}
	if rapid.Bool().Draw(t, "initial") {
		w.listed = false
		w.query += "&initial=true"
	}
	return w
}

// Every client sees every change that it wants once, in order, those of one
// revision together, however often it leaves, is cut and comes back.
func TestWatchAgainstModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		h, b := newTwinAPI(t, testLimits())
		b.hub.SetQueue(rapid.SampledFrom([]int{1, 3, 1024}).Draw(rt, "queue"), 1<<30)
		addr, stop := serveFor(t, h)
		defer stop()
		m := &modelStore{now: map[string]string{}}
		var watches []*modelWatch
		key := rapid.SampledFrom([]string{"a", "aa", "ab", "b", "ba", "c"})
		for i := range rapid.IntRange(1, 3).Draw(rt, "watches") {
			watches = append(watches, drawModelWatch(rt))
			watches[i].connect(t, m, addr)
		}
		for step := range rapid.IntRange(5, 60).Draw(rt, "steps") {
			w := watches[rapid.IntRange(0, len(watches)-1).Draw(rt, "watch")]
			switch rapid.SampledFrom([]string{"write", "write", "write", "read", "read", "leave"}).Draw(rt, "step") {
			case "write":
				changes := map[string]string{}
				for _, k := range rapid.SliceOfN(key, 0, 3).Draw(rt, "put") {
					changes[k] = fmt.Sprint(step)
				}
				deletes := rapid.SliceOfNDistinct(key, 0, 2, rapid.ID[string]).Draw(rt, "delete")
				writeModel(b, changes, deletes)
				m.apply(changes, deletes)
			case "leave":
				if w.r != nil {
					w.leave()
				}
			default:
				if w.r == nil {
					w.connect(t, m, addr)
				}
				w.read(rt, m)
			}
		}
		if b.revision() != int64(len(m.revisions)) {
			rt.Fatalf("the store is at %d, the model at %d", b.revision(), len(m.revisions))
		}
		for _, w := range watches {
			for more := true; more; {
				if w.r == nil {
					w.connect(t, m, addr)
				}
				more = w.read(rt, m)
			}
			if w.r != nil {
				w.leave()
			}
		}
	})
}

// serveFor is serveTest for less than a test.
func serveFor(t *testing.T, h http.Handler) (addr string, stop func()) {
	l, err := listenClient("127.0.0.1:0", "--listen-client", 64)
	if err != nil {
		t.Fatal(err)
	}
	srv := newHTTPServer(h, zap.NewNop())
	go srv.Serve(l)
	return l.Addr().String(), func() { srv.Close() }
}

// writeModel is one transaction. A key that is deleted and put would be a
// replacement, which is for other tests.
func writeModel(b *twinBackend, changes map[string]string, deletes []string) {
	var ops []kv.TxnOp
	for _, k := range deletes {
		if _, put := changes[k]; !put {
			ops = append(ops, kv.TxnOp{Op: kv.OpDeleteRange, Span: kv.SingleKey(k)})
		}
	}
	for _, k := range slices.Sorted(maps.Keys(changes)) {
		ops = append(ops, kv.TxnOp{Op: kv.OpPut, Key: k, Value: []byte(changes[k])})
	}
	if len(ops) > 0 {
		b.do(kv.Command{Op: kv.OpTxn, Txn: &kv.Txn{Then: ops}})
	}
}
