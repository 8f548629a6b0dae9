package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"pontoon/api"
)

const (
	fillClients = 32  // write the keys before a run, at least
	fillMost    = 256 // and at most
	fillTries   = 20  // of one key

	interruptGrace = time.Second // for answers that are on their way after Ctrl-C
	sampleTime     = 100 * time.Millisecond
)

var errInterrupted = errors.New("interrupted before the run began")

// run is one run under way. Its times are counted from the beginning of the
// warm-up.
type run struct {
	o        *Options
	keys     *keyspace
	values   values
	nonce    string // marks the values of a watch's writers
	schedule schedule
	rec      *recorder
	base     time.Time     // set before the clients start
	stopped  chan struct{} // closed when the window ends

	expected, delivered atomic.Int64 // events of writes that began inside the window
}

func (r *run) now() time.Duration { return time.Since(r.base) }

// measure does all of it. What is measured is described on about before it begins;
// how far it is on progress, if that is not nil. The result is nil if the run
// did not begin.
func measure(ctx context.Context, o *Options, about, progress io.Writer) (*Result, error) {
	r := &run{
		o: o, keys: newKeyspace(o), values: newValues(o.ValueSize, o.Op == opWatch, o.Seed), rec: newRecorder(o),
		nonce: fmt.Sprintf("%0*x", nonceSize, rand.Uint32()), schedule: schedule{rate: o.Rate}, base: time.Now(), stopped: make(chan struct{}),
	}
	servers, err := look(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := describe(about, o, servers); err != nil {
		return nil, fmt.Errorf("write: %w", err)
	}
	if o.Fill {
		if err := r.fill(ctx, about, progress); err != nil {
			return nil, err
		}
	}
	res := &Result{Options: *o, Servers: servers}
	// What is under way when Ctrl-C comes has a moment left, so hard is not ended by ctx.
	hard, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	watching, unwatch := context.WithCancel(hard)
	defer unwatch()
	var watchers, clients sync.WaitGroup
	if o.Op == opWatch {
		stop := context.AfterFunc(ctx, unwatch)
		if err := r.openWatches(watching, &watchers); err != nil {
			unwatch()
			watchers.Wait()
			if ctx.Err() != nil {
				err = errInterrupted
			}
			return nil, err
		}
		stop()
	}

	r.base = time.Now()
	for i := range o.Clients {
		c := r.newClient(hard, i)
		// goroutine: bench-client
		clients.Go(c.loop)
	}
	p := progressLine{out: progress, r: r}
	_ = p.follow(ctx, r.rec.start) // if it is interrupted, so is the next
	cpu := cpuTime()
	res.Interrupted = p.follow(ctx, r.rec.until()) != nil
	end := min(r.now(), r.rec.until())
	cpu = cpuTime() - cpu
	r.rec.end.Store(int64(end))
	close(r.stopped)

	grace := o.Timeout + o.Timeout/4
	if ctx.Err() != nil {
		grace = interruptGrace
	}
	// goroutine: bench-cutter, a timer: ends requests that nobody answers
	cutter := time.AfterFunc(grace, cut)
	stop := context.AfterFunc(ctx, func() { cutter.Reset(min(grace, interruptGrace)) })
	clients.Wait()
	stop()
	cutter.Stop()
	if o.Op == opWatch {
		r.settle(ctx)
	}
	unwatch()
	watchers.Wait()
	p.clear()
	res.finish(r, end-r.rec.start, cpu, p.mostBacklog)
	return res, nil
}

// settle waits for the events of the last writes.
func (r *run) settle(ctx context.Context) {
	limit := time.NewTimer(settleTime)
	defer limit.Stop()
	tick := time.NewTicker(sampleTime / 10)
	defer tick.Stop()
	for r.delivered.Load() < r.expected.Load() {
		select {
		case <-tick.C:
		case <-limit.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// Server is one endpoint as it was before the run.
type Server struct {
	Endpoint  string `json:"endpoint"`
	ID        uint64 `json:"id,omitempty"`
	Role      string `json:"role,omitempty"`
	Leader    uint64 `json:"leader,omitempty"` // 0: it knows none
	Version   string `json:"version,omitempty"`
	ClusterID string `json:"cluster_id,omitempty"`
	Keys      int64  `json:"keys"`
	Error     string `json:"error,omitempty"` // why there is nothing else
}

// look asks every endpoint for its status. It is an error if none is a Pontoon
// server, or if they belong to different clusters.
func look(ctx context.Context, o *Options) ([]Server, error) {
	servers := make([]Server, len(o.Endpoints))
	var wg sync.WaitGroup
	for i, endpoint := range o.Endpoints {
		// goroutine: bench-status
		wg.Go(func() { servers[i] = lookAt(ctx, endpoint, o.Timeout) })
	}
	wg.Wait()
	if ctx.Err() != nil {
		return nil, errInterrupted
	}
	var failed []string
	cluster := ""
	for _, s := range servers {
		switch {
		case s.Error != "":
			failed = append(failed, s.Endpoint+": "+s.Error)
		case cluster == "":
			cluster = s.ClusterID
		case cluster != s.ClusterID:
			return nil, fmt.Errorf("the endpoints belong to different clusters (%s is of %s, another of %s); name members of one with --endpoints", s.Endpoint, s.ClusterID, cluster)
		}
	}
	if len(failed) == len(servers) {
		return nil, fmt.Errorf("no server answers (%s); start a node, or name the client ports of yours with --endpoints", strings.Join(failed, "; "))
	}
	return servers, nil
}

func lookAt(ctx context.Context, endpoint string, timeout time.Duration) Server {
	s := Server{Endpoint: endpoint}
	a, body, err := fetch(ctx, endpoint, "/v1/status", timeout)
	var st api.Status
	switch {
	case err != nil:
		s.Error = err.Error()
	case a.status != 200 || json.Unmarshal(body, &st) != nil || st.ID == 0:
		s.Error = fmt.Sprintf("something answers %d to GET /v1/status that is no Pontoon server", a.status)
	default:
		s.ID, s.Role, s.Leader, s.Version, s.ClusterID, s.Keys = st.ID, st.Role, st.Leader, st.Version, st.ClusterID, st.Keys
	}
	return s
}

// fill writes every key once.
func (r *run) fill(ctx context.Context, about, progress io.Writer) error {
	filling, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next, written atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for i := range min(max(r.o.Clients, fillClients), fillMost, r.o.Keys) {
		c := r.newClient(filling, i)
		// goroutine: bench-client, of the fill
		wg.Go(func() {
			defer c.close()
			for key := next.Add(1) - 1; key < r.keys.n; key = next.Add(1) - 1 {
				if err := c.fillKey(key); err != nil {
					cancel(err)
					return
				}
				written.Add(1)
			}
		})
	}
	shown := make(chan struct{})
	// goroutine: bench-progress, of the fill
	go func() {
		defer close(shown)
		p := progressLine{out: progress}
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.show(fmt.Sprintf("writing %s keys: %d %%", thousands(r.keys.n), 100*written.Load()/r.keys.n))
			case <-filling.Done():
				p.clear()
				return
			}
		}
	}()
	wg.Wait()
	err := context.Cause(filling)
	cancel(nil)
	<-shown
	switch {
	case ctx.Err() != nil:
		return errInterrupted
	case err != nil:
		return fmt.Errorf("write the keys before the run: %w", err)
	}
	_, err = fmt.Fprintf(about, "  %s keys written in %.1f s\n", thousands(r.keys.n), time.Since(start).Seconds())
	return err
}

// fillKey writes one key, through failures that pass.
func (c *client) fillKey(key int64) error {
	for try := 1; ; try++ {
		a, err := c.put(key, c.r.values.draw(c.rng))
		name, text := c.name(a, err)
		switch {
		case name == "":
			c.pause = 0
			return nil
		case c.ctx.Err() != nil:
			return context.Cause(c.ctx)
		case try == fillTries || err == nil && a.status < 500 && a.status != 429:
			if text != "" {
				text = ": " + text
			}
			return fmt.Errorf("%s%s (endpoint %s, try %d)", name, text, c.r.o.Endpoints[c.at], try)
		}
		c.wait(c.backoff(a, err))
	}
}
