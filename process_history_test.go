package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// The history of one key. Every write has a value of its own, so a condition on
// a revision is one on a value, which a write of unknown outcome has as well.

type cellOp struct {
	key   string
	kind  cellKind
	value string // written
	seen  string // cellSwap: the value that the condition names by its revision
}

type cellKind int

const (
	cellGet cellKind = iota
	cellPut
	cellCreate // If-None-Match: *
	cellSwap   // If-Match
	cellDelete
)

type cellOut struct {
	known, refused bool
	value          string // read
	mod            int64  // read, or given to the write; 0: absent
	version        int64  // read
	created        bool   // by the write
}

// cellState: version 0 is an absent key; mod -1 a revision that nobody was told.
type cellState struct {
	value        string
	mod, version int64
}

var cells = porcupine.Model{
	Init: func() any { return cellState{} },
	Step: func(state, input, output any) (bool, any) {
		s, op, out := state.(cellState), input.(cellOp), output.(cellOut)
		if op.kind == cellGet {
			ok := s.version == out.version && s.value == out.value && (s.mod == out.mod || s.mod == -1)
			return ok, cellState{out.value, out.mod, out.version}
		}
		if op.kind == cellCreate && s.version > 0 || op.kind == cellSwap && (s.version == 0 || s.value != op.seen) {
			return !out.known || out.refused, s
		}
		next := cellState{op.value, -1, s.version + 1}
		if op.kind == cellDelete {
			next = cellState{}
		}
		if !out.known {
			return true, next
		}
		if next.version > 0 {
			next.mod = out.mod
		}
		return !out.refused && out.created == (next.version == 1) && (next.version == 0 || out.mod > s.mod), next
	},
	Equal: func(a, b any) bool { return a == b },
	DescribeOperation: func(in, out any) string {
		return fmt.Sprintf("%+v → %+v", in, out)
	},
}

// clients call random members and write down what they are told.
type clients struct {
	t     *testing.T
	seed  uint64
	urls  []string // of member i+1
	via   *http.Client
	shaky atomic.Int64 // bit id: this member may not answer; few requests go there
	start time.Time
	stopC chan struct{}
	wg    sync.WaitGroup
	round atomic.Int64 // keys change with each fault: short histories are quickly checked
	mu    struct {
		sync.Mutex
		byKey            map[string][]porcupine.Operation
		writes           []time.Time // when an acknowledgement came
		unknown, retried int
		last             map[string]cellOut // last seen of each key, for conditions
	}
}

const (
	historyClients = 8
	historyPause   = 6 * time.Millisecond
	historyKeys    = 4 // at a time
)

// newClients begins to call the members at urls, with the keys of a round. via should give up on a request
// soon after the second that a member is given.
func newClients(t *testing.T, seed uint64, round int64, via *http.Client, urls []string) *clients {
	c := &clients{t: t, seed: seed, urls: urls, via: via, start: time.Now(), stopC: make(chan struct{})}
	c.round.Store(round)
	c.mu.byKey, c.mu.last = map[string][]porcupine.Operation{}, map[string]cellOut{}
	for id := range historyClients {
		c.wg.Go(func() { c.run(id) })
	}
	t.Cleanup(c.stop)
	return c
}

// expect says which members are disturbed from now on.
func (c *clients) expect(disturbed ...int) {
	var bits int64
	for _, id := range disturbed {
		bits |= 1 << id
	}
	c.shaky.Store(bits)
}

// pick chooses a member, one that is disturbed once in a while.
func (c *clients) pick(r *rand.Rand) int {
	for {
		id := r.IntN(len(c.urls)) + 1
		if c.shaky.Load()&(1<<id) == 0 || r.IntN(10) == 0 {
			return id
		}
	}
}

func (c *clients) stop() {
	select {
	case <-c.stopC:
	default:
		close(c.stopC)
	}
	c.wg.Wait()
}

func (c *clients) stopped() bool {
	select {
	case <-c.stopC:
		return true
	default:
		return false
	}
}

func (c *clients) run(id int) {
	r := rand.New(rand.NewPCG(c.seed, uint64(id)))
	pace := time.NewTicker(historyPause)
	defer pace.Stop()
	for i := 0; ; i++ {
		select {
		case <-pace.C:
		case <-c.stopC:
			return
		}
		op := cellOp{key: fmt.Sprintf("r%d/k%d", c.round.Load(), r.IntN(historyKeys)), kind: cellKind(r.IntN(int(cellDelete) + 1)), value: fmt.Sprintf("%d-%d", id, i)}
		if op.kind == cellDelete && r.IntN(3) > 0 {
			op.kind = cellPut
		}
		headers := []string{}
		switch op.kind {
		case cellGet, cellDelete:
			op.value = ""
		case cellCreate:
			headers = append(headers, "If-None-Match", "*")
		case cellSwap:
			c.mu.Lock()
			last := c.mu.last[op.key]
			c.mu.Unlock()
			if last.mod == 0 {
				continue
			}
			op.seen = last.value
			headers = append(headers, "If-Match", fmt.Sprintf(`"%d"`, last.mod))
		}
		once := op.kind != cellGet && id%2 == 0
		if once {
			headers = append(headers, "Idempotency-Key", fmt.Sprintf("%x-%d-%d", c.seed, id, i))
		}
		c.call(r, id, op, once, headers)
	}
}

// call sends op, and with once repeats it, to any member, until its outcome is known.
func (c *clients) call(r *rand.Rand, id int, op cellOp, once bool, headers []string) {
	at := time.Now()
	pause := time.NewTicker(20 * time.Millisecond)
	defer pause.Stop()
	for try := 0; ; try++ {
		out, sure := c.ask(c.pick(r), op, headers)
		switch {
		case out.known:
			c.add(id, op, at, out)
			if once && r.IntN(4) == 0 {
				c.repeat(r, op, headers, out)
			}
			return
		case once && try < 200 && !c.stopped():
			c.mu.Lock()
			c.mu.retried++
			c.mu.Unlock()
			<-pause.C // whatever happened, asking again is safe
		case sure && !once || op.kind == cellGet:
			return
		default:
			c.add(id, op, at, out)
			return
		}
	}
}

// repeat sends once more what was answered: the answer must be the first one.
func (c *clients) repeat(r *rand.Rand, op cellOp, headers []string, first cellOut) {
	again, _ := c.ask(c.pick(r), op, headers)
	if again.known && again != first {
		c.t.Errorf("%+v was answered %+v, and its repetition %+v", op, first, again)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.retried++
}

// ask sends one request. sure says that what is not known did not happen.
func (c *clients) ask(member int, op cellOp, headers []string) (out cellOut, sure bool) {
	p := process{url: c.urls[member-1], via: c.via}
	method := map[cellKind]string{cellGet: http.MethodGet, cellDelete: http.MethodDelete}[op.kind]
	if method == "" {
		method = http.MethodPut
	}
	a, err := p.send(context.Background(), method, "/v1/kv/"+op.key+"?timeout=1s", op.value, headers...)
	var dial *net.OpError
	switch {
	case errors.As(err, &dial) && dial.Op == "dial":
		return out, true
	case err != nil:
		return out, false
	case a.status == http.StatusPreconditionFailed:
		return cellOut{known: true, refused: true}, true
	case a.status == http.StatusNotFound && op.kind == cellGet:
		return cellOut{known: true}, true
	case a.status == http.StatusServiceUnavailable, a.status == http.StatusTooManyRequests:
		return out, true
	case a.status == http.StatusGatewayTimeout:
		return out, false
	case a.status/100 != 2:
		c.t.Errorf("member %d: %s %s: %d %q", member, method, op.key, a.status, a.body)
		return out, false
	}
	out.known = true
	if op.kind == cellDelete {
		return out, true
	}
	number := func(header string) int64 {
		n, err := strconv.ParseInt(strings.Trim(a.header.Get(header), `"`), 10, 64)
		if err != nil {
			c.t.Errorf("member %d: %s %s: header %s: %v in %v", member, method, op.key, header, err, a.header)
		}
		return n
	}
	out.value, out.mod, out.created = op.value, number("ETag"), a.status == http.StatusCreated
	if op.kind == cellGet {
		out.value, out.version = a.body, number("Kv-Version")
	}
	return out, true
}

func (c *clients) add(id int, op cellOp, call time.Time, out cellOut) {
	now := time.Now()
	ret := now.Sub(c.start).Nanoseconds()
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !out.known:
		ret = int64(1 << 62) // may take effect as late as that
		c.mu.unknown++
	case op.kind != cellGet:
		c.mu.writes = append(c.mu.writes, now)
	}
	if out.known && !out.refused {
		c.mu.last[op.key] = out
	}
	c.mu.byKey[op.key] = append(c.mu.byKey[op.key], porcupine.Operation{ClientId: id, Input: op, Call: call.Sub(c.start).Nanoseconds(), Output: out, Return: ret})
}

func (c *clients) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.mu.writes)
}

// grow waits for more acknowledged writes, and says how long it took.
func (c *clients) grow(n int) time.Duration {
	c.t.Helper()
	from, at := c.count(), time.Now()
	waitFor(c.t, fmt.Sprintf("%d more writes", n), func() bool { return c.count() >= from+n })
	return time.Since(at)
}

// gap is the longest time without an acknowledgement that ends after since.
func (c *clients) gap(since time.Time) (worst time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := 1; i < len(c.mu.writes); i++ {
		if c.mu.writes[i].After(since) {
			worst = max(worst, c.mu.writes[i].Sub(c.mu.writes[i-1]))
		}
	}
	return worst
}

// verify ends the clients, has every member read every key, and holds all of
// it against the model.
func (c *clients) verify() {
	t := c.t
	t.Helper()
	c.stop()
	r := rand.New(rand.NewPCG(c.seed, historyClients))
	for _, key := range slices.Sorted(maps.Keys(c.mu.byKey)) {
		at := time.Now()
		var out cellOut
		waitFor(t, "a last read of "+key, func() bool {
			at = time.Now()
			out, _ = c.ask(c.pick(r), cellOp{key: key}, nil)
			return out.known
		})
		c.add(historyClients, cellOp{key: key}, at, out)
	}
	ops := 0
	for key, h := range c.mu.byKey {
		ops += len(h)
		res, _ := porcupine.CheckOperationsVerbose(cells, h, 20*time.Second)
		switch res {
		case porcupine.Illegal:
			t.Errorf("the history of %s is not linearizable; its last steps:\n%s", key, describeHistory(h))
		case porcupine.Unknown:
			t.Errorf("the history of %s, %d operations, was too long to check", key, len(h))
		}
	}
	t.Logf("%d operations on %d keys (%d writes acknowledged, %d of unknown outcome, %d repeated)", ops, len(c.mu.byKey), len(c.mu.writes), c.mu.unknown, c.mu.retried)
	if c.mu.retried == 0 {
		t.Error("nothing was repeated: the test shows nothing about idempotency keys")
	}
}

func describeHistory(h []porcupine.Operation) string {
	slices.SortFunc(h, func(a, b porcupine.Operation) int { return compare(uint64(a.Call), uint64(b.Call)) })
	var b strings.Builder
	for _, op := range h[max(0, len(h)-60):] {
		fmt.Fprintf(&b, "%9.3f-%9.3f  client %d  %s\n", float64(op.Call)/1e9, float64(op.Return)/1e9, op.ClientId, cells.DescribeOperation(op.Input, op.Output))
	}
	return b.String()
}
