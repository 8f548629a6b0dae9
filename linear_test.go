package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"pontoon/kv"
)

// Histories of concurrent clients, checked against the simplest model there
// is: one register per key. A write whose outcome is unknown may take effect
// at any time after its call, or never.

type regInput struct {
	key   string
	write bool
	value string
}

type regOutput struct {
	value string // read
	rev   int64  // mod revision read, or given to the write
	known bool
}

type regState struct {
	value string
	rev   int64
}

var registers = porcupine.Model{
	Partition: func(h []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[string][]porcupine.Operation{}
		for _, op := range h {
			k := op.Input.(regInput).key
			byKey[k] = append(byKey[k], op)
		}
		var parts [][]porcupine.Operation
		for _, p := range byKey {
			parts = append(parts, p)
		}
		return parts
	},
	Init: func() any { return regState{} },
	Step: func(state, input, output any) (bool, any) {
		s, in, out := state.(regState), input.(regInput), output.(regOutput)
		if !in.write {
			// An unknown write leaves the revision open until a read shows it.
			return s.value == out.value && (s.rev == out.rev || s.rev == -1), regState{s.value, out.rev}
		}
		if !out.known {
			return true, regState{in.value, -1}
		}
		return out.rev > s.rev, regState{in.value, out.rev}
	},
	Equal: func(a, b any) bool { return a == b },
	DescribeOperation: func(in, out any) string {
		i, o := in.(regInput), out.(regOutput)
		if i.write {
			return fmt.Sprintf("put(%s,%s) rev %d known %v", i.key, i.value, o.rev, o.known)
		}
		return fmt.Sprintf("get(%s) = %s rev %d", i.key, o.value, o.rev)
	},
}

// history records operations; the clock only has to order them.
type history struct {
	start time.Time
	mu    struct {
		sync.Mutex
		ops []porcupine.Operation
	}
}

func (h *history) add(client int, in regInput, call time.Time, out regOutput, unknown bool) {
	ret := time.Since(h.start).Nanoseconds()
	if unknown {
		ret = int64(time.Hour) // may take effect as late as that
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mu.ops = append(h.mu.ops, porcupine.Operation{ClientId: client, Input: in, Call: call.Sub(h.start).Nanoseconds(), Output: out, Return: ret})
}

// client reads and writes random keys on random members until stop.
func (h *history) client(c *cluster, id int, pick func() *testNode, stop <-chan struct{}) {
	r := rand.New(rand.NewPCG(uint64(id), 1))
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		in := regInput{key: fmt.Sprintf("k%d", r.IntN(4)), write: r.IntN(2) == 0, value: fmt.Sprintf("%d-%d", id, i)}
		n := pick()
		if n == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		call := time.Now()
		if in.write {
			var res kv.Result
			res, err := n.store.put(ctx, in.key, []byte(in.value))
			switch {
			case err == nil:
				h.add(id, in, call, regOutput{rev: res.Revision, known: true}, false)
			case errors.Is(err, errCommitTimeout):
				h.add(id, in, call, regOutput{}, true)
			} // any other error promises that nothing happened
		} else {
			e, _, err := n.store.get(ctx, in.key, readOptions{})
			if err == nil || errors.Is(err, errKeyNotFound) {
				h.add(id, in, call, regOutput{value: string(e.Value), rev: e.ModRevision}, false)
			}
		}
		cancel()
	}
}

func TestLinearizableUnderFaults(t *testing.T) {
	c := newCluster(t, 3, small)
	c.leader()
	h := &history{start: time.Now()}
	var nodes struct {
		sync.RWMutex
		up []*testNode
	}
	set := func() {
		nodes.Lock()
		defer nodes.Unlock()
		nodes.up = nil
		for _, n := range c.nodes {
			nodes.up = append(nodes.up, n)
		}
	}
	set()
	pick := func() *testNode {
		nodes.RLock()
		defer nodes.RUnlock()
		return nodes.up[rand.IntN(len(nodes.up))]
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for id := range 6 {
		wg.Go(func() { h.client(c, id, pick, stop) })
	}
	progress := func(n *testNode) { <-n.store.applied.Wait(n.store.applied.At() + 30) }
	for round := range 6 {
		l := c.leader()
		switch round % 3 {
		case 0: // cut the leader off, let another lead, heal
			c.isolate(l.id, true)
			i := slices.IndexFunc(nodes.up, func(n *testNode) bool { return n != l })
			progress(nodes.up[i])
			c.isolate(l.id, false)
		case 1: // restart the leader
			if err := c.stop(l.id); err != nil {
				t.Error(err)
			}
			set()
			progress(c.any())
			c.start(l.id)
			set()
		case 2: // hand leadership around
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			l.store.handOver(ctx)
			cancel()
			progress(l)
		}
	}
	close(stop)
	wg.Wait()
	c.check()
	res, _ := porcupine.CheckOperationsVerbose(registers, h.mu.ops, 20*time.Second)
	t.Logf("%d operations: %s", len(h.mu.ops), res)
	if res == porcupine.Illegal {
		t.Fatal("the history is not linearizable")
	}
}
