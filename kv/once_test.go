package kv

import (
	"fmt"
	"reflect"
	"testing"
	"time"
)

func asOnce(id string, c Command) Command {
	c.Once = &Once{Key: id, Fingerprint: [16]byte{byte(c.Op)}}
	return c
}

func TestOnceReplays(t *testing.T) {
	for name, c := range map[string]Command{
		"put":        {Op: OpPut, Key: "a", Value: []byte("9"), TTL: time.Second, Wall: 3},
		"delete":     {Op: OpDelete, Key: "a"},
		"no delete":  {Op: OpDelete, Key: "none"},
		"range":      {Op: OpDeleteRange},
		"grant":      {Op: OpGrant, TTL: time.Minute, Wall: 5},
		"keep alive": {Op: OpKeepAlive, Lease: 1},
		"revoke":     {Op: OpRevoke, Lease: 1},
		"condition":  {Op: OpPut, Key: "a", If: Precondition{Kind: CheckAbsent}},
		"no lease":   {Op: OpPut, Key: "a", Lease: 77},
		"txn":        then(opPut("c", "7"), TxnOp{Op: OpPut, Key: "a", CreateOnly: true}, opGet(Span{}), opDel(Prefix("b"))),
		"import":     {Op: OpTxn, Txn: &Txn{Each: true, Brief: true, Then: []TxnOp{opPut("x", ""), opPut("x", "")}}},
	} {
		t.Run(name, func(t *testing.T) {
			s := NewState()
			apply(t, s, put("a", "1"), grant(time.Second, 0), putLease("b", 1))
			first := apply(t, s, asOnce("id", c))[0]
			if first.Window != 10*time.Minute || first.Replayed || s.Kept() != 1 {
				t.Errorf("first: %+v", first)
			}
			apply(t, s, put("later", ""))
			hash := s.Hash()
			again := apply(t, s, asOnce("id", c))[0]
			if s.Hash() != hash {
				t.Error("the repetition changed the state")
			}
			want := first
			want.Replayed = true
			want.Entry.Value = nil
			if want.Txn != nil && want.Txn.Ops != nil {
				for i := range want.Txn.Ops {
					want.Txn.Ops[i].Entry.Value = nil
				}
			}
			if !reflect.DeepEqual(again, want) {
				t.Errorf("\n got %s\nwant %s", resultText(again), resultText(want))
			}
			other := asOnce("id", c)
			other.Once.Fingerprint[3]++
			if r := apply(t, s, other)[0]; !reflect.DeepEqual(r, Result{Revision: s.Revision(), Refused: RefusedMismatch}) || s.Hash() != hash {
				t.Errorf("another request: %+v", r)
			}
		})
	}
}

// The window runs from the first tick that has seen the result.
func TestOnceWindow(t *testing.T) {
	s := NewState()
	c := asOnce("id", put("a", "1"))
	window := func(want time.Duration) {
		t.Helper()
		if r := apply(t, s, c)[0]; !r.Replayed || r.Window != want {
			t.Errorf("window %v, replayed %v; want %v", r.Window, r.Replayed, want)
		}
	}
	apply(t, s, tick(5000, 0, 0))
	apply(t, s, c) // index 2
	pending(t, s, true, 0)
	apply(t, s, tick(6000, 0, 1))
	window(10 * time.Minute)
	apply(t, s, tick(7000, 0, 2))
	pending(t, s, false, 607_000)
	window(10 * time.Minute)
	apply(t, s, tick(606_999, 0, 9))
	window(time.Millisecond)
	apply(t, s, tick(607_000, 0, 9))
	pending(t, s, false, 0)
	r := apply(t, s, c)[0]
	if !reflect.DeepEqual(r, Result{Revision: 1, Refused: RefusedExpired}) || s.Kept() != 0 {
		t.Errorf("after the window: %+v, %d kept", r, s.Kept())
	}
}

func TestOnceClasses(t *testing.T) {
	windows := func(s *State, n int, c Command) (got []string) {
		for i := range n {
			r := apply(t, s, asOnce(fmt.Sprint("id", i), c))[0]
			if r.Refused != NotRefused && r.Refused != RefusedOnceIsFull {
				t.Fatalf("%+v", r)
			}
			got = append(got, fmt.Sprint(r.Window, r.Refused))
		}
		return got
	}
	s := NewState()
	s.once.maxKept = 8
	want := "[10m0s 0 10m0s 0 10m0s 0 10m0s 0 1m0s 0 1m0s 0 10s 0 10s 0 0s 6 0s 6]"
	if got := fmt.Sprint(windows(s, 10, del("none"))); got != want {
		t.Errorf("by number: %s", got)
	}
	// Those of the shortest window go first; the table has room again.
	apply(t, s, tick(0, 0, s.Applied()))
	apply(t, s, tick(10_000, 0, s.Applied()))
	if r := apply(t, s, asOnce("new", del("none")))[0]; s.Kept() != 7 || r.Window != 10*time.Second {
		t.Errorf("%d kept, %+v", s.Kept(), r)
	}

	s = NewState()
	s.once.maxBytes = 4 * int64(len("id0")+len(appendResult(nil, &Result{})))
	if got := fmt.Sprint(windows(s, 5, del("none"))); got != "[10m0s 0 10m0s 0 1m0s 0 10s 0 0s 6]" {
		t.Errorf("by bytes: %s", got)
	}

	s = NewState()
	s.once.maxKept = 1
	apply(t, s, asOnce("id", put("a", "1")))
	hash := s.Hash()
	if r := apply(t, s, asOnce("id2", put("a", "2")))[0]; r.Refused != RefusedOnceIsFull || s.Hash() != hash {
		t.Errorf("full: %+v", r)
	}
	if r := apply(t, s, asOnce("id", put("a", "1")))[0]; !r.Replayed {
		t.Errorf("full, a repetition: %+v", r)
	}
}

// One tick starts and ends only so many windows, the oldest first.
func TestTickKeptIsBounded(t *testing.T) {
	s := NewState()
	s.once.maxTickKept = 2
	for i := range 5 {
		apply(t, s, asOnce(fmt.Sprint("id", i), put("a", "1")))
	}
	seen := s.Applied()
	for _, want := range []bool{true, true, false} {
		apply(t, s, tick(1000, 0, seen))
		pending(t, s, want, 601_000)
	}
	for i, next := range []int64{601_000, 601_000, 0} {
		apply(t, s, tick(601_000, 0, seen))
		if want := max(0, 3-2*i); s.Kept() != want {
			t.Errorf("%d results are kept, want %d", s.Kept(), want)
		}
		pending(t, s, false, next)
	}
	if r := apply(t, s, asOnce("id4", put("a", "1")))[0]; r.Refused != RefusedExpired {
		t.Errorf("the last one: %+v", r)
	}
}

func TestTombstonesAreBounded(t *testing.T) {
	s := NewState()
	s.once.maxTombs = 2
	for i := range 3 {
		apply(t, s, asOnce(fmt.Sprint("id", i), put("a", "1")))
		apply(t, s, tick(int64(i)*1e6, 0, s.Applied()))
	}
	apply(t, s, tick(1e9, 0, s.Applied()))
	for i, want := range []Refusal{NotRefused, RefusedExpired, RefusedExpired} {
		if r := apply(t, s.Clone(), asOnce(fmt.Sprint("id", i), put("a", "1")))[0]; r.Refused != want {
			t.Errorf("id%d: %+v", i, r)
		}
	}
}

func TestTombstoneIsStable(t *testing.T) {
	// The first 8 bytes of SHA-256("abc"), as published with the algorithm.
	if got := tombstone("abc"); got != 0xba7816bf8f01cfea {
		t.Errorf("%x", got)
	}
}

func TestFifo(t *testing.T) {
	var q fifo
	next, first := uint64(0), uint64(0)
	var old fifo
	for round := range 40 {
		for range 700 {
			q.push(next)
			next++
		}
		if round == 20 {
			old = q.clone()
			for range 10 {
				old.push(1 << 40) // must not show in q
			}
		}
		for range 600 + round {
			if v := q.pop(); v != first {
				t.Fatalf("popped %d, want %d", v, first)
			}
			first++
		}
		want := first
		q.each(func(v uint64) bool {
			if v != want {
				t.Fatalf("%d where %d should be", v, want)
			}
			want++
			return true
		})
		if want != next || q.count != int(next-first) {
			t.Fatalf("%d to %d, count %d", first, want, q.count)
		}
	}
	n := 0
	old.each(func(v uint64) bool {
		n++
		return (v == 1<<40) == (n > old.count-10) // the last ten are its own
	})
	if n != old.count {
		t.Errorf("the clone has %d of %d", n, old.count)
	}
}
