package kv

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tidwall/btree"
)

// full returns a state with something in each of its parts.
func full(t testing.TB) *State {
	s := NewState()
	s.once.maxKept = 8
	apply(t, s, asOnce("gone", put("a", "1")))
	apply(t, s, tick(0, 0, 1))
	apply(t, s, tick(600_000, 0, 1))
	apply(t, s, grant(time.Minute, 5), put("b", "2"), put("a", "3"), putLease("l", 1), del("b"), putTTL("own", time.Hour, 6))
	apply(t, s, asOnce("kept", put("c", "4")))
	apply(t, s, tick(600_001, 7, 5))
	apply(t, s, asOnce("waits", put("c", "5")), putTTL("own2", time.Hour, 6))
	return s
}

// Check finds what no call of the API can bring about.
func TestCheckFindsDamageOfParts(t *testing.T) {
	keptWith := func(change func(*kept)) func(*State) {
		return func(s *State) {
			k, _ := s.once.kept.Get("kept")
			s.once.drop("kept", &k)
			change(&k)
			s.once.load("kept", k)
		}
	}
	leaseWith := func(id int64, change func(*lease)) func(*State) {
		return func(s *State) {
			old, _ := s.leases.byID.Get(id)
			l := old
			change(&l)
			s.leases.set(id, &old, &l)
		}
	}
	eventWith := func(i int, change func(*event)) func(*State) {
		return func(s *State) { change(&s.history.tail[i]) }
	}
	last := func(s *State) *event { return &s.history.tail[len(s.history.tail)-1] }
	for name, damage := range map[string]func(*State){
		"lease gone":                func(s *State) { s.leases.drop(1) },
		"lease beyond the counter":  func(s *State) { s.leases.last = 2 },
		"lease hash":                func(s *State) { s.leases.sum++ },
		"lease not in the timers":   func(s *State) { s.leases.due.running.PopMin() },
		"lease in no timer's place": func(s *State) { s.leases.due.remove(1, 660_001, 4); s.leases.due.add(1, 660_002, 4) },
		"lease with two timers":     func(s *State) { s.leases.due.add(1, 7, 0) },
		"timer without lease":       func(s *State) { s.leases.due.add(99, 0, 3) },
		"lease counts too many":     leaseWith(1, func(l *lease) { l.keys++ }),
		"counts swapped": func(s *State) {
			leaseWith(1, func(l *lease) { l.keys++ })(s)
			leaseWith(2, func(l *lease) { l.keys-- })(s)
		},
		"own without keys":          func(s *State) { apply(t, s, grant(time.Hour, 0)); leaseWith(4, func(l *lease) { l.own = true })(s) },
		"lease TTL 0":               leaseWith(1, func(l *lease) { l.ttl = 0 }),
		"lease ends too late":       leaseWith(1, func(l *lease) { l.deadline = 660_002 }),
		"lease of the future":       leaseWith(3, func(l *lease) { l.index = 9 }),
		"negative deadline":         leaseWith(1, func(l *lease) { l.deadline = -1 }),
		"negative label":            leaseWith(1, func(l *lease) { l.expires = -1 }),
		"attachment gone":           func(s *State) { s.leases.keys.PopMin() },
		"attachment of no item":     func(s *State) { s.leases.keys.Set(attachment{1, "x"}) },
		"attachment of another":     func(s *State) { s.leases.keys.PopMin(); s.leases.keys.Set(attachment{1, "x"}) },
		"attachment has own memory": func(s *State) { s.leases.keys.Set(attachment{1, strings.Clone("l")}) },
		"orphans":                   func(s *State) { s.leases.orphans = []int64{1} },
		"event hash":                eventWith(1, func(e *event) { e.hash++ }),
		"event sum":                 func(s *State) { s.history.sum++ },
		"event count":               func(s *State) { s.history.count++ },
		"event size":                func(s *State) { s.history.size++ },
		"event key length":          eventWith(1, func(e *event) { e.keyLen++ }),
		"event revision":            eventWith(1, func(e *event) { e.revision++ }),
		"event of another key":      eventWith(1, func(e *event) { e.prev = e.next; e.next = last(&State{history: history{tail: []event{*e}}}).next }),
		"event leads elsewhere":     func(s *State) { last(s).next = s.history.tail[0].next },
		"event leads nowhere":       func(s *State) { last(s).next = ""; last(s).prev = s.history.tail[0].next },
		"first event gone":          func(s *State) { s.history.pop() },
		"compacted too far":         func(s *State) { s.history.compacted++ },
		"more events than allowed":  func(s *State) { s.history.maxEvents = s.history.count - 1 },
		"larger than allowed":       func(s *State) { s.history.maxSize = s.history.size - 1 },
		"no events":                 func(s *State) { s.history = history{maxEvents: 9, maxSize: 9} },
		"item without event":        func(s *State) { s.history.compacted--; s.history.tail = s.history.tail[1:] },
		"item without event, at a revision that has another": func(s *State) {
			apply(t, s, then(opPut("x", ""), opPut("y", "")))
			h, e := &s.history, last(s)
			h.count--
			h.size -= e.size()
			h.sum -= e.hash
			h.tail = h.tail[:len(h.tail)-1]
		},
		"kept hash":                  func(s *State) { s.once.sum++ },
		"kept bytes":                 func(s *State) { s.once.bytes++ },
		"kept without timer":         func(s *State) { s.once.due.running.PopMin() },
		"kept timer elsewhere":       func(s *State) { s.once.due.running.PopMin(); s.once.due.add("kept", 9, 0) },
		"timer without kept":         func(s *State) { s.once.due.add("x", 0, 3) },
		"kept class":                 keptWith(func(k *kept) { k.class = 3 }),
		"kept too long":              keptWith(func(k *kept) { k.deadline = 1_200_002 }),
		"kept of the future":         keptWith(func(k *kept) { k.index = 9 }),
		"kept garbage":               keptWith(func(k *kept) { k.result = "\xff" }),
		"kept empty":                 keptWith(func(k *kept) { k.result = "" }),
		"more kept than allowed":     func(s *State) { s.once.maxKept = 1 },
		"more bytes than allowed":    func(s *State) { s.once.maxBytes = 1 },
		"tombstone hash":             func(s *State) { s.once.tombSum++ },
		"tombstone twice":            func(s *State) { s.once.tombs.push(tombstone("gone")) },
		"tombstone not in the set":   func(s *State) { s.once.tombSet = new(btree.Set[uint64]) },
		"tombstone not in the queue": func(s *State) { s.once.tombSet.Insert(3) },
		"another in the set":         func(s *State) { s.once.tombSet.Delete(tombstone("gone")); s.once.tombSet.Insert(3) },
		"more tombstones":            func(s *State) { s.once.maxTombs = 0 },
		"tombstone count":            func(s *State) { s.once.tombs.count++ },
	} {
		t.Run(name, func(t *testing.T) {
			s := full(t)
			damage(s)
			if err := s.Check(); err == nil {
				t.Error("not found")
			} else {
				t.Log(err)
			}
		})
	}
}

// Each of these states differs from the first in one thing only.
func TestHashTellsPartsApart(t *testing.T) {
	seen := map[uint64]string{}
	for name, change := range map[string]func(*State){
		"nothing":       func(*State) {},
		"clock":         func(s *State) { s.clock++ },
		"lease counter": func(s *State) { s.leases.last++ },
		"keep-alive":    func(s *State) { apply(t, s, Command{Op: OpKeepAlive, Lease: 1}) },
		"later one":     func(s *State) { s.SetApplied(9); apply(t, s, Command{Op: OpKeepAlive, Lease: 1}) },
		"label":         func(s *State) { apply(t, s, Command{Op: OpKeepAlive, Lease: 1, Wall: 1}) },
		"TTL":           func(s *State) { apply(t, s, Command{Op: OpKeepAlive, Lease: 1, TTL: time.Hour}) },
		"lease":         func(s *State) { apply(t, s, grant(time.Second, 0)) },
		"history":       func(s *State) { s.history.pop() },
		"kept":          func(s *State) { apply(t, s, asOnce("more", del("none"))) },
		"fingerprint": func(s *State) {
			c := asOnce("more", del("none"))
			c.Once.Fingerprint[15]++
			apply(t, s, c)
		},
		"kept result": func(s *State) { apply(t, s, asOnce("more", Command{Op: OpRevoke, Lease: 9})) },
		"kept key":    func(s *State) { apply(t, s, asOnce("other", del("none"))) },
		"kept later":  func(s *State) { s.SetApplied(9); apply(t, s, asOnce("more", del("none"))) },
		"tombstone":   func(s *State) { s.once.loadTombstone(3) },
		"revision":    func(s *State) { s.revision++ },
	} {
		s := full(t)
		change(s)
		if other, dup := seen[s.Hash()]; dup {
			t.Errorf("%s and %s have the same hash", name, other)
		}
		seen[s.Hash()] = name
	}
	if a, b := full(t), full(t); a.Hash() != b.Hash() {
		t.Error("equal states have different hashes")
	}
}

// A state that has gone back to nothing but its entries has the hash of one
// that never had more, but for what only grows.
func TestHashComesBack(t *testing.T) {
	s := NewState()
	s.history.maxEvents = 0
	apply(t, s, put("a", "1"))
	plain := s.Hash()
	if plain != stateHash(s.sum, 0, 1) {
		t.Error("parts that are not there count")
	}
	apply(t, s, grant(time.Second, 0), asOnce("id", del("none")))
	apply(t, s, Command{Op: OpRevoke, Lease: 1})
	s.once.maxTombs = 0
	apply(t, s, tick(0, 0, 9))
	apply(t, s, tick(600_000, 0, 9))
	s.clock, s.leases.last = 0, 0
	if s.Hash() != plain {
		t.Error("something was left in a sum")
	}
}

func TestEventHash(t *testing.T) {
	seen := map[uint64]bool{}
	for _, h := range []uint64{
		eventHash(1, false, 1), eventHash(2, false, 1), eventHash(1, true, 1), eventHash(1, false, 2),
		eventHash(1, false, absentHash("a")), eventHash(1, false, absentHash("b")),
	} {
		if seen[h] {
			t.Error("a hash twice")
		}
		seen[h] = true
	}
}

func TestCheckNamesThePart(t *testing.T) {
	s := full(t)
	s.once.tombSum++
	if err := s.Check(); err == nil || !strings.Contains(fmt.Sprint(err), "kv: check: tombstones: ") {
		t.Error(err)
	}
}
