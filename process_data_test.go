package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pontoon/api"
)

// send is one request with headers, given as name, value pairs.
func (p *process) send(ctx context.Context, method, target, body string, headers ...string) (reply, error) {
	req, err := http.NewRequestWithContext(ctx, method, p.url+target, strings.NewReader(body))
	if err != nil {
		return reply{}, err
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := p.client().Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	var b strings.Builder
	_, err = bufio.NewReader(resp.Body).WriteTo(&b)
	return reply{resp.StatusCode, resp.Header, b.String()}, err
}

// counter adds to a number in the store by the book: read, write if nothing
// has changed, and repeat whatever did not answer, under the same idempotency key.
type counter struct {
	s     *site
	id    int
	urls  []string
	added atomic.Int64
	again atomic.Int64 // requests that had to be repeated
}

func (c *counter) run(ctx context.Context) {
	at := 0
	ask := func(method, body string, headers ...string) (reply, bool) {
		for ctx.Err() == nil || method == http.MethodPut { // a write that began has to end
			p := process{url: c.urls[at%len(c.urls)]}
			limit := 5 * time.Second
			if rand.IntN(8) == 0 {
				limit = time.Duration(rand.IntN(3000)) * time.Microsecond // an impatient client
			}
			try, cancel := context.WithTimeout(context.Background(), limit)
			a, err := p.send(try, method, "/v1/kv/counter", body, headers...)
			cancel()
			if err == nil && a.status < 500 && a.status != http.StatusTooManyRequests {
				return a, true
			}
			c.again.Add(1)
			at++
		}
		return reply{}, false
	}
	for n := 0; ctx.Err() == nil; {
		now, ok := ask(http.MethodGet, "")
		if !ok {
			return
		}
		value, err := strconv.Atoi(now.body)
		if err != nil {
			c.s.t.Errorf("the counter reads %d %q", now.status, now.body)
			return
		}
		n++
		a, _ := ask(http.MethodPut, strconv.Itoa(value+1), "If-Match", now.header.Get("ETag"),
			"Idempotency-Key", fmt.Sprintf("writer-%d-%d", c.id, n))
		switch a.status {
		case http.StatusNoContent:
			c.added.Add(1)
		case http.StatusPreconditionFailed: // somebody else was first
		default:
			c.s.t.Errorf("adding to the counter: %d %q", a.status, a.body)
			return
		}
	}
}

// A counter kept with If-Match and Idempotency-Key is exact whatever dies: with
// kill -9 of leaders and of all members, and clients that cut and repeat.
func TestProcessCounter(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	s.nodes[1].want(http.StatusCreated, http.MethodPut, "/v1/kv/counter", "0")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	var counters []*counter
	for id := range 6 {
		c := &counter{s: s, id: id}
		for i := range 3 {
			c.urls = append(c.urls, s.nodes[(id+i)%3+1].url)
		}
		counters = append(counters, c)
		wg.Go(func() { c.run(ctx) })
	}
	total := func() (added, again int64) {
		for _, c := range counters {
			added += c.added.Load()
			again += c.again.Load()
		}
		return added, again
	}
	grow := func(n int64) {
		from, _ := total()
		waitFor(t, fmt.Sprintf("%d more additions", n), func() bool { a, _ := total(); return a >= from+n })
	}
	for range 2 {
		grow(100)
		leader := s.leader()
		s.nodes[leader].crash()
		grow(100)
		s.start(leader)
	}
	s.killAll()
	s.start(1, 2, 3)
	grow(100)
	cancel()
	wg.Wait()
	added, again := total()
	a := s.nodes[2].want(http.StatusOK, http.MethodGet, "/v1/kv/counter", "")
	t.Logf("%d additions acknowledged, the counter reads %s, %d requests were repeated", added, a.body, again)
	if a.body != strconv.FormatInt(added, 10) {
		t.Errorf("the counter reads %s after %d acknowledged additions", a.body, added)
	}
	if version := a.header.Get("Kv-Version"); version != strconv.FormatInt(added+1, 10) {
		t.Errorf("the counter was written %s times for %d additions", version, added)
	}
}

// watchFollower reads a watch, and when it breaks goes on at the next member with
// the id of the last message.
type watchFollower struct {
	t       *testing.T
	urls    []string
	query   string
	last    int64 // revision of the last message
	changes []api.Change
	resumes int
	seen    atomic.Int64 // last revision, for the test
}

func (f *watchFollower) run(ctx context.Context) {
	for at := 0; ctx.Err() == nil; at++ {
		f.stream(ctx, f.urls[at%len(f.urls)])
		f.resumes++
	}
}

func (f *watchFollower) stream(ctx context.Context, base string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/v1/watch?"+f.query, nil)
	if err != nil {
		f.t.Error(err)
		return
	}
	if f.last > 0 {
		req.Header.Set("Last-Event-ID", strconv.FormatInt(f.last, 10))
	}
	resp, err := (&http.Client{}).Do(req)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return // no leader yet
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var c api.Change
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return // cut in the middle of a line
		}
		f.last = c.Revision
		f.seen.Store(c.Revision)
		if len(c.Events) > 0 {
			f.changes = append(f.changes, c)
		}
	}
}

// A watch that is resumed on other members, while members die, misses nothing,
// repeats nothing and never splits a transaction.
func TestProcessWatch(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	first := s.nodes[1].want(http.StatusCreated, http.MethodPut, "/v1/kv/w/start", "0")
	from := first.header.Get("Kv-Revision")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg, readers sync.WaitGroup
	var followers []*watchFollower
	for i := range 3 {
		f := &watchFollower{t: t, query: "prefix=w/&from=" + from}
		for j := range 3 {
			f.urls = append(f.urls, s.nodes[(i+j)%3+1].url)
		}
		followers = append(followers, f)
		readers.Go(func() { f.run(ctx) })
	}
	writing, stop := context.WithCancel(context.Background())
	defer stop()
	var written atomic.Int64
	urls := followers[0].urls
	for id := range 4 {
		wg.Go(func() {
			for n := 0; writing.Err() == nil; n++ {
				p := process{url: urls[(id+n)%3]}
				pair := fmt.Sprintf(`{"then":[{"put":{"key":"w/a%d","value":"%d"}},{"put":{"key":"w/b%d","value":"%d"}}]}`, id, n, id, n)
				a, err := p.try(http.MethodPost, "/v1/txn?timeout=2s", pair)
				if err == nil && a.status == http.StatusOK {
					written.Add(1)
				}
			}
		})
	}
	grow := func(n int64) {
		from := written.Load()
		waitFor(t, "more writes", func() bool { return written.Load() >= from+n })
	}
	for range 2 {
		grow(100)
		leader := s.leader()
		s.nodes[leader].crash()
		grow(100)
		s.start(leader)
	}
	s.killAll()
	s.start(1, 2, 3)
	grow(50)
	stop()
	wg.Wait()
	end := s.nodes[3].want(http.StatusCreated, http.MethodPut, "/v1/kv/w/end", "0")
	last, err := strconv.ParseInt(end.header.Get("Kv-Revision"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range followers {
		waitFor(t, "the watches to catch up", func() bool { return f.seen.Load() >= last })
	}
	cancel()
	readers.Wait()
	want, err := strconv.ParseInt(from, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range followers {
		next := want
		for _, c := range f.changes {
			if c.Revision != next {
				t.Fatalf("watch %d: revision %d where %d comes next", i, c.Revision, next)
			}
			next++
			if n := len(c.Events); n != 2 && c.Revision != want && c.Revision != last {
				t.Fatalf("watch %d: revision %d has %d events of a transaction of 2", i, c.Revision, n)
			}
		}
		if next != last+1 {
			t.Errorf("watch %d ends before revision %d, the last is %d", i, next, last)
		}
		t.Logf("watch %d: %d revisions in order, resumed %d times", i, len(f.changes), f.resumes-1)
	}
}

// A key with a TTL is not lost early while the leader is frozen and replaced,
// and not kept for long after; what a frozen leader comes back with changes
// nothing.
func TestProcessTTLFrozenLeader(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	const ttl = 4 * time.Second
	leader := s.leader()
	other := s.nodes[s.others(leader)[0]]
	other.want(http.StatusCreated, http.MethodPut, "/v1/kv/before?ttl=4s", "x")
	before := time.Now()
	s.nodes[leader].signal(syscall.SIGSTOP)
	waitFor(t, "a lease on the new leader", func() bool {
		a, err := other.try(http.MethodPut, "/v1/kv/after?ttl=4s&timeout=1s", "x")
		return err == nil && a.status == http.StatusCreated
	})
	after := time.Now()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for time.Since(before) < 2*time.Second {
		<-poll.C
	}
	s.nodes[leader].signal(syscall.SIGCONT)
	gone := func(key string, since time.Time) {
		for {
			a, err := other.try(http.MethodGet, "/v1/kv/"+key, "")
			at := time.Since(since)
			switch {
			case err != nil || a.status >= 500:
			case a.status == http.StatusNotFound && at < ttl:
				t.Errorf("%s is gone %v after its answer; its TTL is %v", key, at, ttl)
				return
			case a.status == http.StatusNotFound:
				t.Logf("%s is gone %v after its answer", key, at.Round(time.Millisecond))
				return
			case at > ttl+2*time.Second:
				t.Errorf("%s is still there %v after its answer", key, at)
				return
			}
			<-poll.C
		}
	}
	gone("before", before)
	gone("after", after)
}

// A list whose pages are read from different members, while others write, is
// of one revision.
func TestProcessPages(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	var lines strings.Builder
	for i := range 300 {
		fmt.Fprintf(&lines, `{"key":"p/%03d","value":"%d"}`+"\n", i, i)
	}
	s.nodes[1].want(http.StatusOK, http.MethodPost, "/v1/kv?atomic=true", lines.String())
	var next string
	var revision int64
	total := 0
	for page := 0; ; page++ {
		p := s.nodes[page%3+1]
		target := "/v1/kv?prefix=p/&limit=70"
		if page > 0 {
			target += "&after=" + url.QueryEscape(next)
		}
		a := p.want(http.StatusOK, http.MethodGet, target, "")
		var l api.List
		if err := json.Unmarshal([]byte(a.body), &l); err != nil {
			t.Fatal(err)
		}
		if page == 0 {
			revision = l.Revision
		}
		if l.Revision != revision || l.Count != 300 {
			t.Fatalf("page %d is of revision %d with %d keys; the first was of %d", page, l.Revision, l.Count, revision)
		}
		for _, e := range l.Items {
			if e.Key != fmt.Sprintf("p/%03d", total) || string(e.Value) != strconv.Itoa(total) {
				t.Fatalf("item %d is %q = %q", total, e.Key, e.Value)
			}
			total++
		}
		if next = l.Next; next == "" {
			break
		}
		// What changes between the pages does not show.
		s.nodes[2].want(http.StatusNoContent, http.MethodPut, fmt.Sprintf("/v1/kv/p/%03d", 299-page), "changed")
		s.nodes[3].want(http.StatusNoContent, http.MethodDelete, fmt.Sprintf("/v1/kv/p/%03d", 200+page), "")
	}
	if total != 300 {
		t.Errorf("the pages have %d items", total)
	}
}
