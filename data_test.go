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

// The data calls on whole clusters: conditional writes, transactions and
// retries, checked against an exact model. A store counts every change with one
// revision, so the model knows the revision that each answer must show, and a
// write that took effect twice, or not at all, has no place in the history.

const storeKeys = 3

type storeCell struct {
	value                string
	create, mod, version int64 // mod 0: absent
}

type storeModel struct {
	revision int64
	cells    [storeKeys]storeCell
}

type storeOp struct {
	get     bool
	txn     bool // if the value of key is value: put all keys; else delete key
	delete  bool
	key     int
	value   string
	ifExist kv.Check
	ifRev   int64
}

type storeOut struct {
	known    bool
	revision int64
	refused  bool
	existed  bool
	success  bool
	entry    storeCell
}

// step carries out op and says what the answer has to be.
func (m storeModel) step(op storeOp) (storeModel, storeOut) {
	c := &m.cells[op.key]
	out := storeOut{known: true, entry: *c, existed: c.mod != 0}
	put := func(i int, value string) {
		c := &m.cells[i]
		if c.mod == 0 {
			c.create = m.revision
		}
		c.value, c.mod = value, m.revision
		c.version++
	}
	switch {
	case op.get:
	case op.txn && c.mod != 0 && c.value == op.value:
		m.revision++
		for i := range m.cells {
			put(i, op.value+"+")
		}
		out.success = true
	case op.txn:
		if c.mod != 0 {
			m.revision++
			*c = storeCell{}
		}
	case op.ifExist == kv.CheckExists && c.mod == 0, op.ifExist == kv.CheckAbsent && c.mod != 0,
		op.ifExist == kv.CheckAnyOf && (c.mod == 0 || c.mod != op.ifRev), op.ifExist == kv.CheckNoneOf && c.mod == op.ifRev:
		out.refused = true
	case op.delete:
		if c.mod != 0 {
			m.revision++
			*c = storeCell{}
		}
	default:
		m.revision++
		put(op.key, op.value)
		out.entry = *c
	}
	if op.txn {
		out.entry, out.existed = storeCell{}, false
	}
	out.revision = m.revision
	return m, out
}

func keyName(i int) string { return fmt.Sprintf("cell-%d", i) }

func (op storeOp) command() *kv.Command {
	if op.txn {
		t := &kv.Txn{
			If:   []kv.Compare{{Key: keyName(op.key), Target: kv.TargetValue, Op: kv.Equal, Value: []byte(op.value)}},
			Else: []kv.TxnOp{{Op: kv.OpDeleteRange, Span: kv.SingleKey(keyName(op.key))}},
		}
		for i := range storeKeys {
			t.Then = append(t.Then, kv.TxnOp{Op: kv.OpPut, Key: keyName(i), Value: []byte(op.value + "+")})
		}
		return &kv.Command{Op: kv.OpTxn, Txn: t}
	}
	c := &kv.Command{Op: kv.OpPut, Key: keyName(op.key), Value: []byte(op.value)}
	if op.delete {
		c.Op, c.Value = kv.OpDelete, nil
	}
	c.If.Kind = op.ifExist
	if op.ifExist == kv.CheckAnyOf || op.ifExist == kv.CheckNoneOf {
		c.If.Revisions = []int64{op.ifRev}
	}
	return c
}

// outcome turns a result into what the model predicts. A replayed result lacks
// the value: the request has it.
func (op storeOp) outcome(r *kv.Result) storeOut {
	out := storeOut{known: true, revision: r.Revision, refused: r.Refused == kv.RefusedCondition}
	if op.txn {
		out.success = r.Txn.Succeeded
		return out
	}
	out.existed = r.Existed || out.refused && r.Entry.ModRevision != 0 || op.delete && r.Deleted == 1
	out.entry = storeCell{string(r.Entry.Value), r.Entry.CreateRevision, r.Entry.ModRevision, r.Entry.Version}
	return out
}

var storeHistory = porcupine.Model{
	Init: func() any { return storeModel{} },
	Step: func(state, input, output any) (bool, any) {
		op, out := input.(storeOp), output.(storeOut)
		next, want := state.(storeModel).step(op)
		if !out.known {
			return true, next
		}
		if out.entry.value == "" || op.delete { // not kept with a replayed result
			want.entry.value = out.entry.value
		}
		return out == want, next
	},
	Equal:             func(a, b any) bool { return a == b },
	DescribeOperation: func(in, out any) string { return fmt.Sprintf("%+v → %+v", in, out) },
}

// storeClient makes random calls on random members. With once it repeats a call
// of unknown outcome under the same idempotency key until it is known.
type storeClient struct {
	id   int
	once bool
	pick func() *testNode
	h    *storeLog
}

type storeLog struct {
	start time.Time
	mu    struct {
		sync.Mutex
		ops              []porcupine.Operation
		unknown, retried int
		lastRev          int64
	}
}

func (l *storeLog) add(client int, op storeOp, call time.Time, out storeOut) {
	ret := time.Since(l.start).Nanoseconds()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !out.known {
		ret = int64(time.Hour)
		l.mu.unknown++
	}
	l.mu.lastRev = max(l.mu.lastRev, out.entry.mod)
	l.mu.ops = append(l.mu.ops, porcupine.Operation{ClientId: client, Input: op, Call: call.Sub(l.start).Nanoseconds(), Output: out, Return: ret})
}

func (c *storeClient) draw(r *rand.Rand, i int) storeOp {
	op := storeOp{key: r.IntN(storeKeys), value: fmt.Sprintf("%d-%d", c.id, i)}
	switch r.IntN(10) {
	case 0, 1, 2:
		return storeOp{get: true, key: op.key}
	case 3, 4:
		op.txn = true
		if r.IntN(2) == 0 {
			op.value = "seed"
		}
		return op
	case 5:
		op.delete = true
		op.value = ""
	case 6:
		op.value = "seed"
	}
	op.ifExist = kv.Check(r.IntN(5))
	if op.ifExist >= kv.CheckAnyOf {
		c.h.mu.Lock()
		op.ifRev = max(1, c.h.mu.lastRev-int64(r.IntN(2)))
		c.h.mu.Unlock()
	}
	return op
}

func (c *storeClient) run(stop <-chan struct{}) {
	r := rand.New(rand.NewPCG(uint64(c.id), 7))
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		op := c.draw(r, i)
		call := time.Now()
		if op.get {
			c.read(op, call)
			continue
		}
		c.write(op, call, i)
	}
}

func (c *storeClient) read(op storeOp, call time.Time) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	e, rev, err := c.pick().store.get(ctx, keyName(op.key), readOptions{})
	if err != nil && !errors.Is(err, errKeyNotFound) {
		return
	}
	c.h.add(c.id, op, call, storeOut{known: true, revision: rev, existed: err == nil,
		entry: storeCell{string(e.Value), e.CreateRevision, e.ModRevision, e.Version}})
}

func (c *storeClient) write(op storeOp, call time.Time, i int) {
	cmd := op.command()
	if c.once {
		cmd.Once = &kv.Once{Key: fmt.Sprintf("%d-%d", c.id, i), Fingerprint: [16]byte{byte(i), byte(i >> 8)}}
	}
	for try := 0; ; try++ {
		timeout := 2 * time.Second
		if c.once && try == 0 {
			timeout = time.Millisecond + time.Duration(i%8)*time.Millisecond // many of them are cut in the middle
		}
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		res, err := c.pick().store.propose(ctx, cmd)
		cancel()
		switch {
		case err == nil:
			c.h.add(c.id, op, call, op.outcome(&res))
			return
		case c.once && try < 100:
			c.h.mu.Lock()
			c.h.mu.retried++
			c.h.mu.Unlock()
			continue // whatever happened, asking again is safe
		case errors.Is(err, errCommitTimeout):
			c.h.add(c.id, op, call, storeOut{})
			return
		default:
			return // promises that nothing happened
		}
	}
}

// TestConditionalHistories: conditional writes, transactions and retries with
// an idempotency key, on all members, while the leader is cut off, restarted
// and replaced.
func TestConditionalHistories(t *testing.T) {
	c := newCluster(t, 3, small)
	c.leader()
	h := &storeLog{start: time.Now()}
	up := newMembersUp(c)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for id := range 6 {
		client := &storeClient{id: id, once: id%2 == 0, pick: up.pick, h: h}
		wg.Go(func() { client.run(stop) })
	}
	for round := range 6 {
		shakeLeader(t, c, up, round)
		n := c.any()
		<-n.store.applied.Wait(n.store.applied.At() + 150)
	}
	close(stop)
	wg.Wait()
	c.check()
	h.mu.Lock()
	defer h.mu.Unlock()
	res, _ := porcupine.CheckOperationsVerbose(storeHistory, h.mu.ops, 30*time.Second)
	t.Logf("%d operations, %d of unknown outcome, %d retries: %s", len(h.mu.ops), h.mu.unknown, h.mu.retried, res)
	if res == porcupine.Illegal {
		t.Fatal("the history is not linearizable")
	}
	if h.mu.retried == 0 {
		t.Error("nothing was retried: the test shows nothing about idempotency keys")
	}
}

// membersUp is the set of running members that clients pick from.
type membersUp struct {
	c  *cluster
	mu struct {
		sync.RWMutex
		nodes []*testNode
	}
}

func newMembersUp(c *cluster) *membersUp {
	u := &membersUp{c: c}
	u.set()
	return u
}

func (u *membersUp) set() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.mu.nodes = nil
	for _, n := range u.c.nodes {
		u.mu.nodes = append(u.mu.nodes, n)
	}
}

func (u *membersUp) pick() *testNode {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.mu.nodes[rand.IntN(len(u.mu.nodes))]
}

// shakeLeader disturbs the cluster in one of three ways and waits until it
// makes progress again.
func shakeLeader(t *testing.T, c *cluster, up *membersUp, round int) {
	t.Helper()
	progress := func(n *testNode) { <-n.store.applied.Wait(n.store.applied.At() + 30) }
	l := c.leader()
	switch round % 3 {
	case 0: // cut the leader off, let another lead, heal
		c.isolate(l.id, true)
		i := slices.IndexFunc(up.mu.nodes, func(n *testNode) bool { return n != l })
		progress(up.mu.nodes[i])
		c.isolate(l.id, false)
	case 1: // restart the leader
		if err := c.stop(l.id); err != nil {
			t.Error(err)
		}
		up.set()
		progress(c.any())
		c.start(l.id)
		up.set()
	case 2: // hand leadership around
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		l.store.handOver(ctx)
		cancel()
		progress(l)
	}
}

// TestRacingCreators: of any number of racing creators on all members exactly
// one wins, and the losers are shown the winner's revision.
func TestRacingCreators(t *testing.T) {
	c := newCluster(t, 3, nil)
	c.leader()
	for round := range 20 {
		key := fmt.Sprintf("lock-%d", round)
		var wg sync.WaitGroup
		results := make([]kv.Result, 12)
		for i := range results {
			n := c.nodes[uint64(i%3+1)]
			wg.Go(func() {
				var err error
				results[i], err = n.store.propose(c.ctx(), &kv.Command{Op: kv.OpPut, Key: key, Value: []byte{byte(i)},
					If: kv.Precondition{Kind: kv.CheckAbsent}})
				if err != nil {
					t.Errorf("creator %d: %v", i, err)
				}
			})
		}
		wg.Wait()
		won := slices.IndexFunc(results, func(r kv.Result) bool { return r.Refused == kv.NotRefused })
		if won < 0 {
			t.Fatalf("round %d: nobody won", round)
		}
		for i, r := range results {
			if i != won && (r.Refused != kv.RefusedCondition || r.Entry.ModRevision != results[won].Entry.ModRevision) {
				t.Errorf("round %d: creator %d of %d: %+v; the winner has %+v", round, i, won, r, results[won])
			}
		}
	}
	c.check()
}
