package bench

import (
	"sync"
	"sync/atomic"
	"time"
)

// kind is what a latency belongs to.
type kind int

const (
	kindPut kind = iota
	kindGet
	kindEvent // of a watch: from before the PUT until a watcher has it
	kinds
)

var kindNames = [kinds]string{"put", "get", "event"}

const (
	maxErrorNames  = 32      // further ones are counted as errorOther
	maxCollected   = 1 << 16 // intervals of the throughput over time while a run goes on, which may end early
	maxIntervals   = 600     // of those that are told
	leastInterval  = 100 * time.Millisecond
	errorOther     = "other"
	errorConnect   = "connect"
	errorTimeout   = "timeout"
	errorLost      = "connection lost"
	errorMalformed = "bad answer"
	errorUnsettled = "unanswered at the end"
	errorWatchCut  = "watch cut"
)

// recorder takes what clients and watchers report, from all of them at once.
// Times are counted from the beginning of the warm-up.
type recorder struct {
	start    time.Duration // of the window
	end      atomic.Int64  // of the window, ns; moves back when the run is interrupted
	shown    [kinds]bool   // which kinds the throughput over time consists of
	kinds    [kinds]tally
	begun    atomic.Int64 // requests of the open loop that were sent, of those due inside the window
	interval time.Duration
	series   []atomic.Int64 // answers in each interval of the window
	mu       struct {
		sync.Mutex
		errors map[string]int64
		last   string // the newest error in its own words
	}
}

// tally is one kind. Only latencies count requests that began inside the window;
// the others count answers that came inside it.
type tally struct {
	latency histogram
	ops     atomic.Int64
	bytes   atomic.Int64 // of values
}

func newRecorder(o *Options) *recorder {
	r := &recorder{start: o.Warmup, interval: leastInterval}
	r.end.Store(int64(o.Warmup + o.Duration))
	for o.Duration > maxCollected*r.interval {
		r.interval *= 2
	}
	r.series = make([]atomic.Int64, (o.Duration+r.interval-1)/r.interval)
	r.shown = [kinds]bool{kindPut: o.Op != opWatch, kindGet: o.Op != opWatch, kindEvent: true}
	r.mu.errors = map[string]int64{}
	return r
}

func (r *recorder) until() time.Duration { return time.Duration(r.end.Load()) }

// inside says that a time is in the window.
func (r *recorder) inside(t time.Duration) bool { return t >= r.start && t < r.until() }

func (r *recorder) success(k kind, began, done time.Duration, bytes int64) {
	t := &r.kinds[k]
	if r.inside(began) {
		t.latency.record(done - began)
	}
	if !r.inside(done) {
		return
	}
	t.ops.Add(1)
	t.bytes.Add(bytes)
	if r.shown[k] {
		r.series[(done-r.start)/r.interval].Add(1)
	}
}

// failure counts an error under a short name that is the same for all of its
// sort, unless it came during the warm-up.
func (r *recorder) failure(done time.Duration, name, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if text != "" {
		r.mu.last = text
	}
	if done < r.start {
		return
	}
	if _, known := r.mu.errors[name]; !known && len(r.mu.errors) >= maxErrorNames {
		name = errorOther
	}
	r.mu.errors[name]++
}

func (r *recorder) failures() (n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.mu.errors {
		n += m
	}
	return n
}
