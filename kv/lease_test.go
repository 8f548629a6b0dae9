package kv

import (
	"fmt"
	"reflect"
	"testing"
	"time"
)

func putTTL(key string, ttl time.Duration, wall int64) Command {
	return Command{Op: OpPut, Key: key, TTL: ttl, Wall: wall}
}

func putLease(key string, id int64) Command { return Command{Op: OpPut, Key: key, Lease: id} }

func grant(ttl time.Duration, wall int64) Command {
	return Command{Op: OpGrant, TTL: ttl, Wall: wall}
}

func tick(clock, wall int64, seen uint64) Command {
	return Command{Op: OpTick, Tick: Tick{Clock: clock, Wall: wall, Seen: seen}}
}

func pending(t *testing.T, s *State, unstarted bool, next int64) {
	t.Helper()
	if u, n := s.Pending(); u != unstarted || n != next {
		t.Errorf("pending %v, %d; want %v, %d", u, n, unstarted, next)
	}
}

func wantLease(t *testing.T, s *State, want Lease) {
	t.Helper()
	if got, ok := s.Lease(want.ID); !ok || got != want {
		t.Errorf("lease %+v, %v; want %+v", got, ok, want)
	}
}

// The life of a granted lease, at log indexes 1, 2, 3 …
func TestLeaseLife(t *testing.T) {
	s := NewState()
	r := apply(t, s, grant(5*time.Second, 1000))[0]
	want := Lease{ID: 1, TTL: 5 * time.Second, Expires: 6000}
	if r.Revision != 0 || !reflect.DeepEqual(r.Lease, &want) {
		t.Fatalf("granted %+v", r)
	}
	if r := apply(t, s, putLease("b", 1), putLease("a", 1))[0]; r.Entry.Lease != 1 || r.Entry.Expires != 6000 {
		t.Errorf("put %+v", r.Entry)
	}
	want.Keys = 2
	wantLease(t, s, want)
	pending(t, s, true, 0)

	apply(t, s, tick(100, 2000, 0)) // proposed before index 1 was applied
	wantLease(t, s, want)
	pending(t, s, true, 0)

	apply(t, s, tick(700, 3000, 1))
	want.Deadline, want.Expires = 5700, 8000
	wantLease(t, s, want)
	pending(t, s, false, 5700)
	if e, _ := s.Get("a"); e.Expires != 8000 {
		t.Errorf("entry %+v", e)
	}

	r = apply(t, s, Command{Op: OpKeepAlive, Lease: 1, Wall: 4000})[0] // index 5
	want.Deadline, want.Expires = 0, 9000
	if r.Revision != 2 || !reflect.DeepEqual(r.Lease, &want) {
		t.Errorf("kept alive %+v", r.Lease)
	}
	apply(t, s, tick(5700, 5000, 4)) // would have ended it; has not seen the keep-alive
	wantLease(t, s, want)
	apply(t, s, tick(6000, 6000, 5))
	want.Deadline, want.Expires = 11_000, 11_000
	wantLease(t, s, want)

	if r := apply(t, s, tick(10_999, 0, 9))[0]; r.Deleted != 0 || r.Revision != 2 {
		t.Errorf("too early: %+v", r)
	}
	if r := apply(t, s, tick(11_000, 0, 9))[0]; r.Deleted != 2 || r.Revision != 3 {
		t.Errorf("ended: %+v", r)
	}
	if got := fmt.Sprint(events(s, 3)); got != "[3 delete a was  of 2 3 delete b was  of 1]" {
		t.Error(got)
	}
	if s.Leases() != 0 || s.Len() != 0 {
		t.Errorf("%d leases, %d keys", s.Leases(), s.Len())
	}
	pending(t, s, false, 0)
	for _, c := range []Command{{Op: OpKeepAlive, Lease: 1}, {Op: OpRevoke, Lease: 1}, putLease("a", 1)} {
		if r := apply(t, s, c)[0]; r.Refused != RefusedNoLease || r.Revision != 3 {
			t.Errorf("%+v", r)
		}
	}
	if r := apply(t, s, grant(time.Second, 0))[0]; r.Lease.ID != 2 {
		t.Errorf("an id came again: %+v", r.Lease)
	}
}

func TestKeepAliveWithAnotherTTL(t *testing.T) {
	s := NewState()
	apply(t, s, grant(5*time.Second, 0), tick(1, 0, 1))
	apply(t, s, Command{Op: OpKeepAlive, Lease: 1, TTL: time.Minute, Wall: 7}) // index 2
	wantLease(t, s, Lease{ID: 1, TTL: time.Minute, Expires: 60_007})
	apply(t, s, Command{Op: OpKeepAlive, Lease: 1, Wall: 8})
	wantLease(t, s, Lease{ID: 1, TTL: time.Minute, Expires: 60_008})
	apply(t, s, tick(10, 0, 3))
	wantLease(t, s, Lease{ID: 1, TTL: time.Minute, Deadline: 60_010, Expires: 60_000})
}

func TestClockNeverGoesBack(t *testing.T) {
	s := NewState()
	apply(t, s, tick(1000, 0, 0), tick(400, 0, 0))
	if s.Clock() != 1000 {
		t.Errorf("clock %d", s.Clock())
	}
	apply(t, s, grant(time.Second, 0))
	apply(t, s, tick(400, 50, 2)) // it starts at the state's clock all the same
	wantLease(t, s, Lease{ID: 1, TTL: time.Second, Deadline: 2000, Expires: 1050})
	apply(t, s, tick(500, 0, 2))
	if s.Leases() != 1 {
		t.Error("ended by a clock that was behind")
	}
}

// A tick of clock 0 starts a lease; that must not look like one that waits.
func TestTickAtClockZero(t *testing.T) {
	s := NewState()
	apply(t, s, grant(time.Millisecond, 0))
	apply(t, s, tick(0, 0, 1))
	pending(t, s, false, 1)
	apply(t, s, tick(0, 0, 1))
	if s.Leases() != 1 {
		t.Error("ended early")
	}
	apply(t, s, tick(1, 0, 1))
	if s.Leases() != 0 {
		t.Error("not ended")
	}
}

func TestOwnLease(t *testing.T) {
	s := NewState()
	r := apply(t, s, putTTL("a", time.Second, 10))[0]
	if r.Entry.Lease != 1 || r.Entry.Expires != 1010 {
		t.Errorf("put %+v", r.Entry)
	}
	r = apply(t, s, putTTL("a", time.Minute, 10))[0]
	if r.Entry.Lease != 2 || s.Leases() != 1 || r.Entry.Version != 2 {
		t.Errorf("another TTL: %+v, %d leases", r.Entry, s.Leases())
	}
	apply(t, s, putLease("b", 2)) // it may be shared
	wantLease(t, s, Lease{ID: 2, TTL: time.Minute, Expires: 60_010, Keys: 2})
	if e := apply(t, s, put("a", ""))[0].Entry; e.Lease != 0 || e.Expires != 0 || s.Leases() != 1 {
		t.Errorf("a put without lease: %+v", e)
	}
	if e := apply(t, s, putLease("b", 2))[0].Entry; e.Lease != 2 || s.Leases() != 1 {
		t.Errorf("the same lease again: %+v, %d leases", e, s.Leases())
	}
	if r := apply(t, s, del("b"))[0]; r.Entry.Expires != 60_010 || s.Leases() != 0 {
		t.Errorf("deleted %+v, %d leases", r, s.Leases())
	}
	// A granted lease stays.
	apply(t, s, grant(time.Second, 0), putLease("c", 3), del("c"))
	if s.Leases() != 1 {
		t.Error("a granted lease went with its last key")
	}
	// Whatever removes the key ends its lease.
	apply(t, s, putTTL("d", time.Second, 0), Command{Op: OpDeleteRange, Span: Prefix("d")})
	apply(t, s, putTTL("e", time.Second, 0), Command{Op: OpRevoke, Lease: 5})
	if s.Leases() != 1 || s.Len() != 1 {
		t.Errorf("%d leases, %d keys", s.Leases(), s.Len())
	}
}

func TestRevoke(t *testing.T) {
	s := NewState()
	apply(t, s, grant(time.Second, 0), grant(time.Second, 0), put("x", ""), putLease("b", 2), putLease("a", 2))
	r := apply(t, s, Command{Op: OpRevoke, Lease: 2})[0]
	if r.Deleted != 2 || r.Revision != 4 || s.Len() != 1 {
		t.Errorf("%+v", r)
	}
	if r := apply(t, s, Command{Op: OpRevoke, Lease: 1})[0]; r.Deleted != 0 || r.Revision != 4 || s.Leases() != 0 {
		t.Errorf("without keys: %+v", r)
	}
}

// Leases end by deadline, then id, each at a revision of its own; and a tick
// stops before it removes too many keys.
func TestExpiryOrderAndLimit(t *testing.T) {
	s := NewState()
	s.leases.maxTickKeys = 3
	apply(t, s, grant(2*time.Second, 0), grant(time.Second, 0), grant(time.Second, 0), grant(3*time.Second, 0), grant(3*time.Second, 0))
	for key, id := range []int64{1, 2, 2, 3, 4, 4, 4, 4, 5} {
		apply(t, s, putLease(fmt.Sprint("k", key), id))
	}
	apply(t, s, tick(0, 0, s.Applied()))
	step := func(wantDeleted int64, wantEvents string, wantNext int64) {
		t.Helper()
		from := s.Revision() + 1
		if r := apply(t, s, tick(5000, 0, s.Applied()))[0]; r.Deleted != wantDeleted || r.Revision != s.Revision() {
			t.Errorf("%+v", r)
		}
		if got := fmt.Sprint(events(s, from)); got != wantEvents {
			t.Error(got)
		}
		pending(t, s, false, wantNext)
	}
	step(3, "[10 delete k1 was  of 2 10 delete k2 was  of 3 11 delete k3 was  of 4]", 2000)
	step(1, "[12 delete k0 was  of 1]", 3000) // lease 4 would make it 5
	step(4, "[13 delete k4 was  of 5 13 delete k5 was  of 6 13 delete k6 was  of 7 13 delete k7 was  of 8]", 3000)
	step(1, "[14 delete k8 was  of 9]", 0)
}

// A lease without keys counts as one key, or a tick could end any number.
func TestExpiryLimitCountsEmptyLeases(t *testing.T) {
	s := NewState()
	s.leases.maxTickKeys = 2
	apply(t, s, grant(time.Second, 0), grant(time.Second, 0), grant(time.Second, 0), putLease("k", 3))
	apply(t, s, tick(0, 0, s.Applied()))
	for _, want := range []int{1, 0} {
		apply(t, s, tick(1000, 0, s.Applied()))
		if s.Leases() != want {
			t.Errorf("%d leases, want %d", s.Leases(), want)
		}
	}
}

func TestLeaseKeys(t *testing.T) {
	s := NewState()
	apply(t, s, grant(time.Second, 0), grant(time.Second, 0), putLease("b", 1), putLease("a", 1), putLease("c", 2), putLease("d", 1))
	v, _ := s.View(0)
	for limit, want := range []string{"[]", "[a]", "[a b]", "[a b d]", "[a b d]"} {
		if got := fmt.Sprint(v.LeaseKeys(1, limit)); got != want {
			t.Errorf("limit %d: %s", limit, got)
		}
	}
	if got := v.LeaseKeys(3, 9); got != nil {
		t.Errorf("no lease: %q", got)
	}
}
