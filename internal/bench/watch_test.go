package bench

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"pontoon/api"
)

// fakeWatch keeps every change and streams it to whoever watches.
type fakeWatch struct {
	mu      sync.Mutex
	lines   []string      // of revision i+1
	grown   chan struct{} // closed and replaced with each line
	cut     int           // a stream ends after so many lines; 0: never
	streams int
	refuse  int // so many requests for a stream are answered 429
}

func (f *fakeWatch) serve(w http.ResponseWriter, r *http.Request) bool {
	if r.Method == http.MethodPut {
		f.mu.Lock()
		defer f.mu.Unlock()
		value, _ := r.Context().Value(bodyKey{}).([]byte)
		f.put(strings.TrimPrefix(r.URL.Path, "/v1/kv/"), string(value))
		return false
	}
	f.mu.Lock()
	f.streams++
	if f.refuse > 0 {
		f.refuse--
		f.mu.Unlock()
		refuse(w, api.CodeOverloaded)
		return true
	}
	next := len(f.lines) + 1
	f.mu.Unlock()
	if from := r.URL.Query().Get("from"); from != "" {
		next, _ = strconv.Atoi(from)
	}
	w.Header().Set("Kv-Revision", strconv.Itoa(next-1))
	_ = http.NewResponseController(w).Flush()
	for sent := 0; f.cut == 0 || sent < f.cut; {
		f.mu.Lock()
		lines, grown := f.lines[next-1:], f.grown
		f.mu.Unlock()
		for _, line := range lines {
			if _, err := io.WriteString(w, line); err != nil {
				return true
			}
			next++
			sent++
		}
		_ = http.NewResponseController(w).Flush()
		select {
		case <-grown:
		case <-r.Context().Done():
			return true
		}
	}
	return true
}

func (f *fakeWatch) put(key, value string) {
	rev := len(f.lines) + 1
	f.lines = append(f.lines, fmt.Sprintf(`{"revision":%d,"events":[{"type":"put","entry":{"key":%q,"value":%q,"mod_revision":%d}}]}`+"\n", rev, key, value, rev))
	close(f.grown)
	f.grown = make(chan struct{})
}

// Streams that end are resumed, and no event is missed or counted twice; events
// of other writers and lines that are too long are not ours.
func TestWatchResumes(t *testing.T) {
	t.Parallel()
	for _, cut := range []int{0, 7} {
		fw := &fakeWatch{grown: make(chan struct{}), cut: cut, refuse: 2}
		f := newFake(t, nil)
		f.key = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut {
				fw.mu.Lock()
				switch len(fw.lines) % 10 {
				case 3:
					fw.put("other", "somebody else's value, which has no stamp")
				case 6:
					fw.put("other", strings.Repeat("x", 2*maxLine))
				}
				fw.mu.Unlock()
			}
			return fw.serve(w, r)
		}
		res, code, stderr := bench(t.Context(), "--op", "watch", "--watchers", "3", "--rate", "200", "--value-size", "40", "--endpoints", f.endpoint())
		d := res.Watch
		if code != 0 || d == nil || d.Missing != 0 || d.Delivered != d.Expected || d.Expected < 30 || d.Expected%3 != 0 || res.Latency["event"].Count != d.Delivered {
			t.Errorf("cut %d: exit code %d, %+v, errors %v\n%s", cut, code, d, res.Errors, stderr)
		}
		if (res.Errors[errorWatchCut] > 0) != (cut > 0) {
			t.Errorf("cut %d: %d streams, errors %v", cut, fw.streams, res.Errors)
		}
	}
}

// Watches that cannot be opened end the run before it begins.
func TestWatchRefused(t *testing.T) {
	t.Parallel()
	fw := &fakeWatch{grown: make(chan struct{}), refuse: 1 << 30}
	f := newFake(t, nil)
	f.key = fw.serve
	_, code, stderr := bench(t.Context(), "--op", "watch", "--watchers", "2", "--endpoints", f.endpoint())
	if code != 1 || !strings.Contains(stderr, "429 overloaded") || !strings.Contains(stderr, "--watchers") {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

func TestWatcherTakes(t *testing.T) {
	o, err := parse([]string{"--op", "watch", "--warmup", "0s", "--duration", "1s"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	stamp := func(r *run, d time.Duration) string { return `"value":"` + string(r.appendStamp(nil, d)) }
	for _, tt := range []struct {
		line  func(r *run) string
		count uint64
		from  int64
	}{
		{func(r *run) string { return `{"revision":41,"events":[{"entry":{` + stamp(r, 1) + `xyz"}}]}` }, 1, 42},
		{func(r *run) string { return `{"revision":41,"events":[` + stamp(r, 1) + stamp(r, 2) + stamp(r, 3) }, 3, 42},
		{func(r *run) string { return `{"revision":41,"progress":true}` }, 0, 42},
		{func(r *run) string { return `{"revision":41}` }, 0, 42},
		{func(r *run) string { return `{"revision":x` + stamp(r, 1)[:30] }, 0, 7},
		{func(r *run) string { return `{"revision":` }, 0, 7},
		{func(r *run) string { return `"value":"` + r.nonce + `xxxxxxxxxxxxxxxx` + stamp(r, 5) }, 1, 7},
		{func(r *run) string { return stamp(r, 2*time.Second) }, 0, 7}, // written after the window
		{func(r *run) string { return `"value":"someone's` }, 0, 7},
		{func(r *run) string { return "" }, 0, 7},
	} {
		r := &run{o: &o, keys: newKeyspace(&o), rec: newRecorder(&o), nonce: "01234567", base: time.Now(), stopped: make(chan struct{})}
		w := r.newWatcher(t.Context(), 0)
		w.from = 7
		line := tt.line(r)
		w.take([]byte(line))
		if got := r.rec.kinds[kindEvent].latency.count.Load(); got != tt.count || w.from != tt.from {
			t.Errorf("%s: %d events, goes on from %d; want %d, %d", line, got, w.from, tt.count, tt.from)
		}
	}
}

func TestWatchersOf(t *testing.T) {
	for _, args := range []string{"--keys 10 --watchers 3", "--keys 3 --watchers 10", "--keys 5 --watchers 5", "--keys 1 --watchers 4"} {
		o, err := parse(append(strings.Fields(args), "--op", "watch", "--scope", "key"), nil)
		if err != nil {
			t.Fatal(err)
		}
		r := &run{o: &o, keys: newKeyspace(&o)}
		counts := make([]int64, o.Keys)
		for i := range o.Watchers {
			w := r.newWatcher(t.Context(), i)
			for key := range counts {
				if w.query == "key=bench%2F"+fmt.Sprintf("%010d", key) {
					counts[key]++
				}
			}
		}
		for key, n := range counts {
			if got := r.watchersOf(int64(key)); got != n {
				t.Errorf("%s: key %d has %d watchers, want %d", args, key, got, n)
			}
		}
		if o.Scope = scopePrefix; r.watchersOf(0) != int64(o.Watchers) {
			t.Errorf("%s: a prefix has %d watchers", args, r.watchersOf(0))
		}
	}
}
