package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Delivery latency. Each value of a watch's writer begins with a stamp: a word
// that no other run has, and the time when the PUT was to begin, by the clock
// that the watchers read too, as both are this process. So events of other
// writers do not count, and no event has to wait for the answer to its PUT.

const (
	nonceSize = 8
	stampSize = nonceSize + 16 // and nanoseconds in hexadecimal

	watchProgress = 10 * time.Second  // a silent stream says so this often
	watchSilence  = 3 * watchProgress // then the connection is taken for dead
	watchTries    = 5                 // to open one watch before the run
	watchOpeners  = 64                // watches being opened at once
	maxLine       = 64 << 10          // of a line, what is kept besides the value
	settleTime    = 2 * time.Second   // for events that are on their way at the end
)

// watcher is one open watch.
type watcher struct {
	client   // of its connection; it sends one request
	query    string
	from     int64 // the revision to go on with; 0: not known
	in       *bufio.Reader
	line     []byte
	maxBytes int    // of line that are kept; the rest is skipped
	marker   []byte // before the time, in a line
}

// watchersOf counts those who will be told of a write.
func (r *run) watchersOf(key int64) int64 {
	if r.o.Scope == scopePrefix {
		return int64(r.o.Watchers)
	}
	n := int64(r.o.Watchers) / r.keys.n
	if key < int64(r.o.Watchers)%r.keys.n {
		n++
	}
	return n
}

func (r *run) newWatcher(ctx context.Context, i int) *watcher {
	w := &watcher{client: *r.newClient(ctx, i), maxBytes: maxLine + r.o.ValueSize, marker: []byte(`"value":"` + r.nonce)}
	if r.o.Scope == scopePrefix {
		w.query = "prefix=" + url.QueryEscape(r.keys.prefix)
	} else {
		path := r.keys.appendPath(nil, int64(i)%r.keys.n)
		w.query = "key=" + url.QueryEscape(r.keys.prefix) + string(path[len(r.keys.escaped):])
	}
	return w
}

// openWatches starts the watchers and returns once all of them have a stream.
// They read until ctx ends; wg counts them.
func (r *run) openWatches(ctx context.Context, wg *sync.WaitGroup) error {
	opening, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var opened atomic.Int64
	places := make(chan struct{}, watchOpeners) // full: the next waits until one is open
	for i := range r.o.Watchers {
		select {
		case places <- struct{}{}:
		case <-opening.Done():
			return context.Cause(opening)
		}
		w := r.newWatcher(ctx, i)
		// goroutine: bench-watcher
		wg.Go(func() {
			defer w.close()
			err := w.tryOpen()
			<-places
			if err != nil {
				cancel(err)
				return
			}
			if opened.Add(1) == int64(r.o.Watchers) {
				cancel(nil)
			}
			w.read()
		})
	}
	<-opening.Done()
	n := opened.Load()
	if n == int64(r.o.Watchers) {
		return nil
	}
	if err := context.Cause(opening); ctx.Err() == nil {
		return fmt.Errorf("only %d of %d watches could be opened, then: %w; try fewer --watchers, or see the log of the servers", n, r.o.Watchers, err)
	}
	return context.Cause(ctx)
}

func (w *watcher) tryOpen() (err error) {
	for range watchTries {
		var a answer
		if a, err = w.open(); err == nil {
			return nil
		}
		if !w.wait(w.backoff(a, err)) || w.ctx.Err() != nil {
			return context.Canceled
		}
	}
	return err
}

// open begins the stream where the last one ended.
func (w *watcher) open() (answer, error) {
	if err := w.connect(); err != nil {
		return answer{}, err
	}
	w.conn.timeout = w.r.o.Timeout
	query := w.query + "&progress=" + watchProgress.String()
	if w.from > 0 {
		query += "&from=" + strconv.FormatInt(w.from, 10)
	}
	a, err := w.conn.begin([]byte("GET /v1/watch?"+query+" HTTP/1.1\r\nHost: "+w.r.o.Endpoints[w.at]+"\r\n"+acceptLine+"\r\n"), nil)
	if err == nil && a.status != 200 {
		if a.code, err = w.conn.problem(); err == nil {
			name, _ := w.name(a, nil)
			err = errors.New("GET /v1/watch is answered " + name)
		}
		if a.status == 410 {
			w.from = 0 // too far back: what was missed shows as missing
		}
	}
	if err != nil {
		w.drop()
		w.next()
		return a, err
	}
	w.pause = 0
	if w.from == 0 {
		w.from = a.revision + 1
	}
	w.conn.timeout = watchSilence
	if w.in == nil {
		w.in = bufio.NewReaderSize(nil, 16<<10)
	}
	w.in.Reset(&w.conn.body)
	return a, nil
}

// read takes events until the run is over, with as many streams as that needs.
func (w *watcher) read() {
	for w.ctx.Err() == nil {
		var a answer
		var err error
		if w.conn == nil {
			a, err = w.open()
		}
		if err == nil {
			err = w.message()
		}
		if err == nil || w.ctx.Err() != nil {
			continue
		}
		w.r.rec.failure(w.r.now(), errorWatchCut, err.Error())
		w.drop()
		w.wait(w.backoff(a, err))
	}
}

// message takes one line.
func (w *watcher) message() error {
	if err := w.conn.arm(); err != nil {
		return err
	}
	w.line = w.line[:0]
	for {
		piece, err := w.in.ReadSlice('\n')
		w.line = append(w.line, piece[:min(len(piece), w.maxBytes-len(w.line))]...)
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
	w.take(w.line)
	return nil
}

// take records the events of one message that carry the stamp of this run.
func (w *watcher) take(line []byte) {
	done := w.r.now()
	if rest, ok := bytes.CutPrefix(line, []byte(`{"revision":`)); ok {
		end := bytes.IndexAny(rest, ",}")
		if n, ok := parseDigits(rest[:max(end, 0)]); ok {
			w.from = n + 1
		}
	}
	for {
		at := bytes.Index(line, w.marker)
		if at < 0 || len(line) < at+len(w.marker)+16 {
			return
		}
		line = line[at+len(w.marker):]
		var b [8]byte
		if _, err := hex.Decode(b[:], line[:16]); err != nil {
			continue
		}
		began := int64(0)
		for _, x := range b {
			began = began<<8 | int64(x)
		}
		if w.r.rec.inside(time.Duration(began)) {
			w.r.delivered.Add(1)
		}
		w.r.rec.success(kindEvent, time.Duration(began), done, int64(w.r.o.ValueSize))
	}
}
