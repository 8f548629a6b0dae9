package watch

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"pontoon/kv"
)

// event is a put, or a delete where the key has a leading minus.
func event(revision int64, key string) kv.Event {
	key, deleted := strings.CutPrefix(key, "-")
	return kv.Event{Revision: revision, Deleted: deleted, Entry: kv.Entry{Key: key, ModRevision: revision}}
}

func publish(h *Hub, revision int64, keys ...string) {
	var events []kv.Event
	for _, key := range keys {
		events = append(events, event(revision, key))
	}
	h.Publish(revision, events)
}

// tester is what testing.T and rapid.T have in common.
type tester interface {
	Helper()
	Errorf(format string, args ...any)
	Fatal(args ...any)
}

func add(t tester, h *Hub, f Filter, after int64) *Watcher {
	t.Helper()
	w, err := h.Add(f, after)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// drain takes all that is queued, as text: "7:a,-b 8:c".
func drain(w *Watcher, batch int) (string, Status) {
	var text []string
	dst := make([]Message, batch)
	for {
		n, st := w.Take(dst)
		for _, m := range dst[:n] {
			var keys []string
			for _, e := range m.Events {
				if e.Revision != m.Revision {
					keys = append(keys, "an event of another revision")
				}
				key := e.Entry.Key
				if e.Deleted {
					key = "-" + key
				}
				keys = append(keys, key)
			}
			text = append(text, fmt.Sprintf("%d:%s", m.Revision, strings.Join(keys, ",")))
		}
		if !st.More {
			return strings.Join(text, " "), st
		}
	}
}

func TestWhoGetsWhat(t *testing.T) {
	rows := []struct {
		name   string
		filter Filter
		want   string
	}{
		{"nothing", Filter{}, ""},
		{"a key", Filter{Keys: []string{"b"}}, "1:b 2:-b"},
		{"a key twice", Filter{Keys: []string{"b", "b"}}, "1:b 2:-b"},
		{"two keys", Filter{Keys: []string{"c", "a"}}, "1:a 3:a,c"},
		{"a key that is a prefix", Filter{Keys: []string{"aa"}}, ""},
		{"all", Filter{Prefixes: []string{""}}, "1:a,b 2:aab,-b 3:a,-ab,b/x,c"},
		{"a prefix", Filter{Prefixes: []string{"a"}}, "1:a 2:aab 3:a,-ab"},
		{"a longer prefix", Filter{Prefixes: []string{"aa"}}, "2:aab"},
		{"a prefix longer than most keys", Filter{Prefixes: []string{"aaaaaaaa"}}, ""},
		{"prefixes within each other", Filter{Prefixes: []string{"a", "aa", "aab"}}, "1:a 2:aab 3:a,-ab"},
		{"key and prefix of it", Filter{Keys: []string{"aab", "c"}, Prefixes: []string{"a"}}, "1:a 2:aab 3:a,-ab,c"},
		{"a span", Filter{Spans: []kv.Span{{Start: "ab", End: "c"}}}, "1:b 2:-b 3:-ab,b/x"},
		{"a span without end", Filter{Spans: []kv.Span{{Start: "b/"}}}, "3:b/x,c"},
		{"an empty span", Filter{Spans: []kv.Span{{Start: "b", End: "b"}}}, ""},
		{"a span the wrong way round", Filter{Spans: []kv.Span{{Start: "c", End: "a"}}}, ""},
		{"spans that overlap", Filter{Spans: []kv.Span{{Start: "a", End: "b"}, {Start: "ab", End: "b0"}}}, "1:a,b 2:aab,-b 3:a,-ab,b/x"},
		{"parts from both ends", Filter{Keys: []string{"a"}, Spans: []kv.Span{{Start: "c"}}}, "1:a 3:a,c"},
		{"no puts", Filter{Prefixes: []string{""}, NoPuts: true}, "2:-b 3:-ab"},
		{"no deletes", Filter{Prefixes: []string{""}, NoDeletes: true}, "1:a,b 2:aab 3:a,b/x,c"},
		{"nothing is left", Filter{Prefixes: []string{"a"}, Keys: []string{"c"}, NoPuts: true}, "3:-ab"},
	}
	for _, together := range []bool{false, true} {
		h := &Hub{}
		watchers := make([]*Watcher, len(rows))
		feed := func() {
			publish(h, 1, "a", "b")
			publish(h, 2, "aab", "-b")
			publish(h, 3, "a", "-ab", "b/x", "c")
		}
		for i, row := range rows {
			if !together {
				h = &Hub{}
			}
			watchers[i] = add(t, h, row.filter, 0)
			if !together {
				feed()
			}
		}
		if together {
			feed()
		}
		for i, row := range rows {
			if got, st := drain(watchers[i], 1+i%3); got != row.want || st.Delivered != 3 || st.Cut || st.Closed {
				t.Errorf("%s (together: %v): got %q, %+v, want %q", row.name, together, got, st, row.want)
			}
			for _, e := range []kv.Event{event(1, "a"), event(2, "-b"), event(3, "-ab"), event(3, "b/x")} {
				name := e.Entry.Key
				if e.Deleted {
					name = "-" + name
				}
				want := slices.ContainsFunc(strings.Fields(row.want), func(m string) bool {
					revision, keys, _ := strings.Cut(m, ":")
					return revision == fmt.Sprint(e.Revision) && slices.Contains(strings.Split(keys, ","), name)
				})
				if row.filter.Wants(&e) != want {
					t.Errorf("%s: Wants(%s) is %v", row.name, name, !want)
				}
			}
			watchers[i].Close()
		}
		if together {
			checkEmpty(t, h)
		}
	}
}

// checkEmpty: a hub whose watchers have gone remembers none of their terms.
func checkEmpty(t tester, h *Hub) {
	t.Helper()
	x := &h.mu.index
	if n := len(x.keys) + len(x.prefixes) + len(x.lengths) + len(x.spans) + len(x.bySpan) + len(x.all.seats); n != 0 || h.Len() != 0 {
		t.Errorf("a hub without watchers: %+v, %d open", x, h.Len())
	}
}

func TestAfter(t *testing.T) {
	h := &Hub{}
	all := Filter{Prefixes: []string{""}}
	w := add(t, h, all, 5) // the publisher lags behind
	publish(h, 4, "a")
	publish(h, 5, "a")
	if got, st := drain(w, 1); got != "" || st.Delivered != 5 {
		t.Errorf("got %q, %+v", got, st)
	}
	publish(h, 6, "a")
	if got, st := drain(w, 1); got != "6:a" || st.Delivered != 6 {
		t.Errorf("got %q, %+v", got, st)
	}
	late := add(t, h, all, 5) // revision 6 is missing and will not come
	publish(h, 7, "a")
	if got, st := drain(late, 1); got != "" || st.Delivered != 5 || !st.Cut {
		t.Errorf("got %q, %+v", got, st)
	}
	late.Close()
	w.Close()
	checkEmpty(t, h)
}

// A publisher need not care about what came before the first watcher.
func TestPublished(t *testing.T) {
	h := &Hub{}
	all := Filter{Prefixes: []string{""}}
	want := func(published int64) {
		t.Helper()
		if h.Published() != published {
			t.Errorf("published is %d, want %d", h.Published(), published)
		}
	}
	first := add(t, h, all, 100)
	want(100)
	second := add(t, h, all, 105) // the first still wants 101 to 105
	want(100)
	publish(h, 101, "a")
	want(101)
	publish(h, 99, "a")
	want(101)
	first.Close()
	second.Close()
	want(101)
	third := add(t, h, all, 200)
	want(200)
	publish(h, 150, "a")
	publish(h, 201, "b")
	if got, st := drain(third, 1); got != "201:b" || st.Delivered != 201 || st.Cut {
		t.Errorf("got %q, %+v", got, st)
	}
	h.Lost()
	fourth := add(t, h, all, 300)
	want(300)
	if _, st := drain(fourth, 1); st.Cut || st.Delivered != 300 {
		t.Errorf("after the loss: %+v", st)
	}
}

// Delivered never runs ahead of what is still queued, and follows revisions
// that do not concern the watcher.
func TestDelivered(t *testing.T) {
	h := &Hub{}
	w := add(t, h, Filter{Keys: []string{"a"}}, 0)
	for r := int64(1); r <= 10; r++ {
		publish(h, r, []string{"a", "b"}[r%2]) // even: a
	}
	var batch [2]Message
	for i, want := range []Status{{Delivered: 4, More: true}, {Delivered: 8, More: true}, {Delivered: 10}, {Delivered: 10}} {
		if _, st := w.Take(batch[:]); st != want {
			t.Errorf("take %d: %+v, want %+v", i, st, want)
		}
	}
	publish(h, 11, "b")
	if n, st := w.Take(batch[:]); n != 0 || st.Delivered != 11 {
		t.Errorf("%d, %+v", n, st)
	}
}

func TestWake(t *testing.T) {
	h := &Hub{}
	w := add(t, h, Filter{Keys: []string{"a"}}, 0)
	awake := func() bool {
		select {
		case <-w.Wake():
			return true
		default:
			return false
		}
	}
	publish(h, 1, "b")
	if awake() {
		t.Error("woken by a key of others")
	}
	publish(h, 2, "a")
	publish(h, 3, "a")
	if !awake() || awake() {
		t.Error("two messages wake once")
	}
	for name, end := range map[string]func(*Hub){"lost": (*Hub).Lost, "closed": (*Hub).Close} {
		h = &Hub{}
		w = add(t, h, Filter{Keys: []string{"a"}}, 3)
		if end(h); !awake() {
			t.Errorf("%s: not woken", name)
		}
	}
}

func TestFullQueueCuts(t *testing.T) {
	h := &Hub{}
	h.SetQueue(3, 1<<20)
	w := add(t, h, Filter{Keys: []string{"a"}}, 0)
	other := add(t, h, Filter{Keys: []string{"a", "b"}}, 0)
	told := 0
	w.OnEnd(func() {
		told++
		h.Len() // no lock of the hub is held
		drain(w, 1)
	})
	publish(h, 1, "a")
	publish(h, 2, "b")
	drain(other, 4)
	publish(h, 3, "a")
	publish(h, 4, "a")
	if told != 0 {
		t.Error("told too early")
	}
	w.OnEnd(func() { told++ })
	publish(h, 6, "a")
	drain(other, 4)
	publish(h, 8, "a")
	if got, st := drain(w, 2); got != "1:a 3:a 4:a" || !st.Cut || st.Delivered != 5 || told != 1 {
		t.Errorf("got %q, %+v, told %d times", got, st, told)
	}
	if got, st := drain(other, 2); got != "8:a" || st.Cut {
		t.Errorf("the other got %q, %+v", got, st)
	}
	w.OnEnd(func() { told++ })
	if told != 2 {
		t.Error("OnEnd of one that was cut before is not called")
	}
	if h.Len() != 2 {
		t.Errorf("%d watchers: one that was cut counts until it is closed", h.Len())
	}
	w.Close()
	w.Close()
	other.Close()
	checkEmpty(t, h)
}

func TestQueueCountsBytes(t *testing.T) {
	large := func(revision int64, bytes int) []kv.Event {
		e := event(revision, "a")
		e.Entry.Value, e.Prev.Value = make([]byte, bytes/2), make([]byte, bytes/2)
		return []kv.Event{e}
	}
	h := &Hub{}
	h.SetQueue(100, 10_000)
	w := add(t, h, Filter{Keys: []string{"a"}}, 0)
	h.Publish(1, large(1, 50_000)) // alone it may be of any size
	if got, st := drain(w, 1); got != "1:a" || st.Cut {
		t.Errorf("got %q, %+v", got, st)
	}
	h.Publish(2, large(2, 4000))
	h.Publish(3, large(3, 4000))
	drain(w, 1) // gives its room back
	h.Publish(4, large(4, 4000))
	h.Publish(5, large(5, 4000))
	h.Publish(6, large(6, 4000))
	if got, st := drain(w, 1); got != "4:a 5:a" || !st.Cut || st.Delivered != 5 {
		t.Errorf("got %q, %+v", got, st)
	}
}

func TestLostAndClose(t *testing.T) {
	all := Filter{Prefixes: []string{""}}
	h := &Hub{}
	h.SetLimit(2)
	told := 0
	behind, ahead := add(t, h, all, 0), add(t, h, all, 9)
	if _, err := h.Add(all, 0); !errors.Is(err, ErrTooMany) {
		t.Errorf("a third: %v", err)
	}
	behind.OnEnd(func() { told++ })
	publish(h, 4, "a")
	h.Lost()
	publish(h, 10, "a")
	if got, st := drain(behind, 1); got != "4:a" || !st.Cut || st.Delivered != 4 || told != 1 {
		t.Errorf("got %q, %+v, told %d", got, st, told)
	}
	if got, st := drain(ahead, 1); got != "" || !st.Cut || st.Delivered != 9 {
		t.Errorf("got %q, %+v", got, st)
	}
	behind.Close()
	w := add(t, h, all, 10)
	w.OnEnd(func() { told++ })
	publish(h, 11, "a")
	h.Close()
	if _, err := h.Add(all, 11); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	publish(h, 12, "a")
	if got, st := drain(w, 1); got != "11:a" || !st.Closed || st.Cut || told != 2 {
		t.Errorf("got %q, %+v, told %d", got, st, told)
	}
	if _, st := drain(ahead, 1); !st.Cut || st.Closed {
		t.Errorf("one that was cut before: %+v", st)
	}
	w.Close()
	ahead.Close()
	checkEmpty(t, h)
	h.Close()
}

// All watchers of a term share the events; a small part of a large revision is
// copied, so that it does not keep the rest alive.
func TestEventsAreShared(t *testing.T) {
	h := &Hub{}
	a, b := add(t, h, Filter{Prefixes: []string{"a"}}, 0), add(t, h, Filter{Prefixes: []string{"a"}}, 0)
	one := add(t, h, Filter{Keys: []string{"a1"}}, 0)
	most := add(t, h, Filter{Spans: []kv.Span{{Start: "a2"}}}, 0)
	events := []kv.Event{event(1, "a1"), event(1, "a2"), event(1, "b1"), event(1, "b2"), event(1, "b3")}
	h.Publish(1, events)
	take := func(w *Watcher) []kv.Event {
		var batch [1]Message
		w.Take(batch[:])
		return batch[0].Events
	}
	inside := func(part []kv.Event) bool {
		at := uintptr(unsafe.Pointer(&part[0]))
		return at >= uintptr(unsafe.Pointer(&events[0])) && at <= uintptr(unsafe.Pointer(&events[4]))
	}
	first, second, single, rest := take(a), take(b), take(one), take(most)
	if &first[0] != &second[0] {
		t.Error("two watchers of one prefix have a copy each")
	}
	if inside(first) || inside(single) {
		t.Error("a small part keeps the whole revision")
	}
	if !inside(rest) || cap(rest) != 4 {
		t.Error("a large part is copied")
	}
}

func TestPublishDoesNotAllocate(t *testing.T) {
	h := &Hub{}
	for i := range 100 {
		add(t, h, Filter{Keys: []string{fmt.Sprint("k", i)}, Prefixes: []string{fmt.Sprint("p", i)}, Spans: []kv.Span{{Start: "s", End: "t"}}}, 0)
	}
	events := []kv.Event{event(1, "other"), event(1, "pother")}
	revision := int64(0)
	if n := testing.AllocsPerRun(100, func() { revision++; h.Publish(revision, events) }); n != 0 {
		t.Errorf("%v allocations for events that nobody wants", n)
	}
}

// Publisher, readers, and watchers that come and go, for the race detector;
// each reader sees ascending revisions without a gap.
func TestConcurrent(t *testing.T) {
	h := &Hub{}
	var state sync.RWMutex // as the store's: revision and Add are one step
	revision := int64(0)
	const last = 3000
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			at := int64(0)
			for at < last {
				state.RLock()
				w, err := h.Add(Filter{Keys: []string{"a"}, Prefixes: []string{"a"}}, revision)
				at = revision
				state.RUnlock()
				if err != nil {
					t.Error(err)
					return
				}
				w.OnEnd(func() {})
				var batch [4]Message
				for range 50 {
					n, st := w.Take(batch[:])
					for _, m := range batch[:n] {
						if m.Revision != at+1 || len(m.Events) != 1 {
							t.Errorf("revision %d after %d, %d events", m.Revision, at, len(m.Events))
						}
						at = m.Revision
					}
					if st.Delivered < at || st.Cut || at == last {
						break
					}
					if n == 0 {
						<-w.Wake()
					}
				}
				w.Close()
			}
		})
	}
	for range last {
		state.Lock()
		revision++
		state.Unlock()
		publish(h, revision, "a")
	}
	wg.Wait()
	checkEmpty(t, h)
}
