package kv

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"pgregory.net/rapid"
)

// dumpAll is dump with all that a snapshot has beyond entries.
func dumpAll(s *State) string {
	var b strings.Builder
	b.WriteString(dump(s))
	fmt.Fprintf(&b, "\nclock %d, lease %d, compacted %d\n", s.clock, s.leases.last, s.history.compacted)
	s.leases.byID.Scan(func(id int64, l lease) bool {
		fmt.Fprintf(&b, "lease %d %+v %q\n", id, l, s.leases.keysOf(id, 0))
		return true
	})
	s.History().Events(0, func(e Event) bool {
		fmt.Fprintf(&b, "event %+v\n", e)
		return true
	})
	s.once.kept.Scan(func(key string, k kept) bool {
		fmt.Fprintf(&b, "kept %q %+v\n", key, k)
		return true
	})
	s.once.tombs.each(func(hash uint64) bool {
		fmt.Fprintf(&b, "tombstone %016x\n", hash)
		return true
	})
	unstarted, next := s.Pending()
	fmt.Fprintf(&b, "windows %+v, pending %v %d", s.windows, unstarted, next)
	return b.String()
}

// forgetHistory leaves a state as one that was read from a file without history.
func forgetHistory(s *State) {
	s.history = history{compacted: s.revision, maxEvents: maxEvents, maxSize: maxEventSize}
}

// fullState has something of every section, each in all of its forms.
func fullState(t testing.TB) *State {
	s := goldenState()
	s.history.maxEvents = 12
	once := func(c Command, key string) Command {
		c.Once = &Once{Key: key, Fingerprint: [16]byte{0: 0xff, 15: byte(len(key))}}
		return c
	}
	const wall = 1_790_000_000_000
	tick := func(clock int64) Command {
		return Command{Op: OpTick, Tick: Tick{Clock: clock, Wall: wall + clock, Seen: s.Applied()}}
	}
	grant := Command{Op: OpGrant, TTL: time.Hour, Wall: wall}
	leased := func(key string, id int64) Command {
		c := put(key, "leased")
		c.Lease, c.Wall = id, wall
		return c
	}
	own := func(key string, ttl time.Duration) Command {
		c := put(key, "own")
		c.TTL, c.Wall = ttl, wall
		return c
	}
	apply(t, s, once(put("once", "1"), "early"), once(del("nothing"), "early too"))
	apply(t, s, tick(1000))
	apply(t, s, tick(1000+10*60*1000)) // both results end
	apply(t, s, grant, grant, once(grant, "grant"), leased("l/1", 1), leased("l/2", 1), leased("l/3", 2), own("o/1", time.Minute))
	apply(t, s, own("o/ends", time.Millisecond))
	apply(t, s, tick(1000+11*60*1000))
	apply(t, s, tick(1001+11*60*1000)) // the key ends
	apply(t, s, own("o/2", MaxTTL), Command{Op: OpKeepAlive, Lease: 2, TTL: time.Minute, Wall: wall})
	apply(t, s, put("c", "1"), put("c", "2"), put("d", "1"), put("d", ""), del("d"), put("e", strings.Repeat("e", 200)))
	refused := once(put("c", "3"), "refused")
	refused.If = Precondition{Kind: CheckAbsent}
	apply(t, s, once(put("c", "3"), "put"), once(del("c"), "delete"), refused, once(Command{Op: OpTxn, Txn: &Txn{
		Then: []TxnOp{
			{Op: OpGet, Span: Prefix("l/")},
			{Op: OpDeleteRange, Span: SingleKey("e")},
			{Op: OpPut, Key: "e", Value: []byte("replaced")},
			{Op: OpPut, Key: "f", Value: []byte{}},
			{Op: OpPut, Key: "empty", Value: []byte("full"), Lease: 2},
			{Op: OpGet, KeysOnly: true, Limit: 2},
		},
	}}, "txn"))
	apply(t, s, once(Command{Op: OpDeleteRange, Span: SingleKey("f")}, "range"), once(Command{Op: OpTxn, Txn: &Txn{Brief: true}}, "brief"))
	apply(t, s, put("c", "after"))
	return s
}

// wideState takes several blocks of every section but time.
func wideState(t testing.TB) *State {
	s := multiBlockState(t)
	var grants, txns []Command
	for i := range 7000 {
		grants = append(grants, Command{Op: OpGrant, TTL: time.Hour, Wall: int64(i) << 30})
	}
	apply(t, s, grants...)
	for i := range 3 {
		txns = append(txns, Command{Op: OpTxn, Once: &Once{Key: fmt.Sprint("once", i)}, Txn: &Txn{Then: []TxnOp{{Op: OpGet, Span: Span{"k0", "k2"}}}}})
	}
	apply(t, s, txns...)
	for i := range 3 {
		apply(t, s, put(fmt.Sprintf("k%d", i), "short"))
	}
	for i := range blockSize / 8 * 5 / 2 {
		s.once.loadTombstone(mix(uint64(i)))
	}
	check(t, s)
	return s
}

func TestGoldenFullSnapshot(t *testing.T) {
	want := fullState(t)
	file := golden(t, "snapshot-v1-full.hex", snapshot(t, []byte("a header"), want))
	header, s := restore(t, file)
	if string(header) != "a header" || dumpAll(s) != dumpAll(want) {
		t.Errorf("header %q\n got %s\nwant %s", header, dumpAll(s), dumpAll(want))
	}
}

// The states that the other tests rely on have in them what they should.
func TestFullStateIsFull(t *testing.T) {
	for name, s := range map[string]*State{"full": fullState(t), "wide": wideState(t)} {
		_, blocks := splitBlocks(t, snapshot(t, nil, s))
		count := map[byte]int{}
		for _, b := range blocks {
			count[b[8]]++
		}
		for _, typ := range []byte{sectionItems, sectionTime, sectionLeases, sectionHistory, sectionKept, sectionTombstones} {
			if count[typ] == 0 || name == "wide" && typ != sectionTime && count[typ] < 2 {
				t.Errorf("%s: %d blocks of section %d", name, count[typ], typ)
			}
		}
	}
	s := fullState(t)
	var own, started, idle, deleted, created, replaced int
	s.leases.byID.Scan(func(_ int64, l lease) bool {
		own += int(bitIf(l.own, 1))
		started += int(bitIf(l.deadline != 0, 1))
		idle += int(bitIf(l.keys == 0, 1))
		return true
	})
	s.History().Events(0, func(e Event) bool {
		switch {
		case e.Deleted:
			deleted++
		case e.Prev.ModRevision == 0:
			created++
		default:
			replaced++
		}
		return true
	})
	if n := s.leases.byID.Len(); own < 2 || own > n-2 || started < 2 || started > n-2 || idle < 1 {
		t.Errorf("%d leases, of them %d own, %d started, %d without keys", n, own, started, idle)
	}
	if deleted < 2 || created < 2 || replaced < 2 || s.history.compacted == 0 || s.history.skip == 0 {
		t.Errorf("%d deleted, %d created, %d replaced, compacted %d", deleted, created, replaced, s.history.compacted)
	}
	if s.once.kept.Len() < 6 || s.once.tombs.count < 2 {
		t.Errorf("%d kept, %d tombstones", s.once.kept.Len(), s.once.tombs.count)
	}
}

// A record that an event and its successor both mean is in memory once.
func TestRestoredHistorySharesMemory(t *testing.T) {
	_, s := restore(t, snapshot(t, nil, fullState(t)))
	next := map[string]*byte{} // what the key's newest event so far led to; nil: nothing
	events := 0
	view := s.History()
	view.from(0, func(e *event) bool {
		events++
		key := e.key()
		if left, ok := next[key]; ok && e.prev != "" && unsafe.StringData(e.prev) != left {
			t.Errorf("revision %d, key %q: another memory than the event before left behind", e.revision, key)
		}
		next[key] = nil
		if e.next != "" {
			next[key] = unsafe.StringData(e.next)
		}
		return true
	})
	for key, left := range next {
		rec, _, ok := s.items.get(key)
		if ok != (left != nil) || ok && unsafe.StringData(rec) != left {
			t.Errorf("key %q: another memory than its last event left behind", key)
		}
	}
	if events != 12 || len(next) < 4 {
		t.Errorf("only %d events of %d keys", events, len(next))
	}
	// The same of attachments is for Check.

	// And by size: a value that a thousand events have seen is there once.
	big := NewState()
	for i := range 20 {
		apply(t, big, put("k", strings.Repeat(fmt.Sprint(i%10), 1<<20)))
	}
	file := snapshot(t, nil, big)
	if n := allocated(func() { ReadSnapshot(bytes.NewReader(file)) }); n > uint64(3*len(file)/2) {
		t.Errorf("%d bytes allocated for a file of %d", n, len(file))
	}
}

func TestSectionsMemory(t *testing.T) {
	for name, change := range map[string]func(s *State){
		"history": func(s *State) {
			for range 30 {
				s.Apply(s.Applied()+1, &Batch{Commands: []Command{put("k", strings.Repeat("v", 1<<20))}}, nil)
			}
		},
		"events": func(s *State) {
			for i := range 50_000 {
				s.Apply(s.Applied()+1, &Batch{Commands: []Command{put(fmt.Sprintf("key-%032d", i), ""), del(fmt.Sprintf("key-%032d", i))}}, nil)
			}
		},
		"leases": func(s *State) {
			for range 200_000 {
				s.Apply(s.Applied()+1, &Batch{Commands: []Command{{Op: OpGrant, TTL: time.Hour, Wall: 1 << 40}}}, nil)
			}
		},
		"kept": func(s *State) {
			for i := range 100_000 {
				c := put("k", "v")
				c.Once = &Once{Key: fmt.Sprint("request", i)}
				s.Apply(s.Applied()+1, &Batch{Commands: []Command{c}}, nil)
			}
		},
		"tombstones": func(s *State) {
			for i := range 500_000 {
				s.once.loadTombstone(mix(uint64(i)))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := NewState()
			change(s)
			var file bytes.Buffer
			if n := allocated(func() { WriteSnapshot(io.Discard, nil, s) }); n > 256<<10 {
				t.Errorf("WriteSnapshot: %d bytes allocated", n)
			}
			if err := WriteSnapshot(&file, nil, s); err != nil {
				t.Fatal(err)
			}
			if file.Len() < 3<<20 {
				t.Errorf("a file of only %d bytes", file.Len())
			}
			r := &measuringReader{r: bytes.NewReader(file.Bytes())}
			r.base = r.inUse()
			if _, err := VerifySnapshot(r); err != nil || r.highest > r.base+512<<10 {
				t.Errorf("VerifySnapshot: up to %d bytes more in use for a file of %d: %v", r.highest-r.base, file.Len(), err)
			}
		})
	}
}

// measuringReader looks now and then how much memory is in use.
type measuringReader struct {
	r             io.Reader
	reads         int
	base, highest uint64
}

func (m *measuringReader) inUse() uint64 {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return stats.HeapAlloc
}

func (m *measuringReader) Read(p []byte) (int, error) {
	if m.reads++; m.reads%32 == 0 {
		m.highest = max(m.highest, m.inUse())
	}
	return m.r.Read(p)
}

// A kept result is held while it is verified, and no longer.
func TestVerifyHoldsOneResult(t *testing.T) {
	s := NewState()
	apply(t, s, put("k", strings.Repeat("v", MaxOnceBytes/2)))
	for i := range 40 {
		apply(t, s, Command{Op: OpTxn, Once: &Once{Key: fmt.Sprint(i)}, Txn: &Txn{Then: []TxnOp{{Op: OpGet}}}})
	}
	file := snapshot(t, nil, s)
	if n := allocated(func() { VerifySnapshot(bytes.NewReader(file)) }); n > 2<<20 || len(file) < 4<<20 {
		t.Errorf("%d bytes allocated for a file of %d", n, len(file))
	}
}

type namedFile struct {
	name string
	data []byte
	want error
	// unseen says that VerifySnapshot, as it says itself, does not see it.
	unseen bool
}

// unseenByVerify tells the errors that only ReadSnapshot finds.
func unseenByVerify(err error) bool {
	return strings.Contains(err.Error(), "snapshot: history: ") || strings.Contains(err.Error(), "it was there before")
}

// refusedSections are files that only differ from good ones in one section, have
// good checksums and, where what is wrong can be hashed, a good trailer.
func refusedSections(t testing.TB) []namedFile {
	s := NewState()
	leased := put("a", "1")
	leased.Lease = 1
	c := put("b", "1")
	c.Once = &Once{Key: "o"}
	s.Apply(5, &Batch{Commands: []Command{
		{Op: OpGrant, TTL: time.Second}, leased, c, put("b", "2"), del("b"),
		{Op: OpTick, Tick: Tick{Clock: 100, Wall: 1000, Seen: 5}},
	}}, nil)
	s.once.loadTombstone(77)
	check(t, s)

	sections := map[byte][]byte{}
	_, blocks := splitBlocks(t, snapshot(t, nil, s))
	for _, b := range blocks {
		sections[b[8]] = b[blockHeadSize:]
	}
	// with builds the file anew, with other content of one section.
	with := func(typ byte, content []byte, trail func(*trailer)) []byte {
		var all []section
		for _, x := range []byte{1, 3, 4, 5, 6, 7, 8} {
			payload := sections[x]
			if x == typ {
				payload = content
			}
			if len(payload) > 0 {
				all = append(all, section{x, payload})
			}
		}
		var end trailer
		end.decode(sections[255])
		if trail != nil {
			trail(&end)
		}
		return forge(append(all, section{255, end.append(nil)})...)
	}
	// sum sets the hash to that of the state with other extras.
	sum := func(change func(*extras)) func(*trailer) {
		return func(t *trailer) {
			x := s.extras()
			change(&x)
			t.hash = x.join(stateHash(s.sum, 0, t.revision))
		}
	}
	join := func(parts ...[]byte) []byte { return slices.Concat(parts...) }
	var files []namedFile
	add := func(name string, want error, typ byte, content []byte, trail func(*trailer)) {
		files = append(files, namedFile{name, with(typ, content, trail), want, false})
	}
	unseen := func(name string, typ byte, content []byte, trail func(*trailer)) {
		files = append(files, namedFile{name, with(typ, content, trail), ErrCorrupt, true})
	}
	if _, _, err := ReadSnapshot(bytes.NewReader(with(0, nil, nil))); err != nil {
		t.Fatalf("the file that the others differ from: %v", err)
	}

	one := sections[sectionTime]
	add("no time", ErrCorrupt, 4, nil, nil)
	add("another clock", ErrCorrupt, 4, []byte{99, 1}, nil)
	add("time cut short", ErrCorrupt, 4, one[:1], nil)
	add("time twice", ErrCorrupt, 4, join(one, one), nil)
	files = append(files, namedFile{"time of nothing", forge(section{1, []byte{0}}, section{4, []byte{0, 0}},
		section{255, trailer{hash: NewState().Hash()}.append(nil)}), ErrCorrupt, false})
	add("clock below 0", ErrCorrupt, 4, append(bytes.Repeat([]byte{0xff}, 9), 1, 1), nil)
	add("the last lease is gone beyond", ErrCorrupt, 4, []byte{100, 0}, sum(func(x *extras) { x.lastLease = 0 }))

	one = sections[sectionLeases]
	l, _ := s.leases.byID.Get(1)
	withLease := func(name string, want error, change func(id *int64, l *lease)) {
		id, l := int64(1), l
		change(&id, &l)
		add("lease: "+name, want, 5, l.append(nil, id), sum(func(x *extras) { x.leases = leaseHash(nil, id, &l) }))
	}
	if !bytes.Equal(one, l.append(nil, 1)) {
		t.Fatalf("leases: %x", one)
	}
	add("no leases", ErrCorrupt, 5, nil, sum(func(x *extras) { x.leases = 0 }))
	add("lease cut short", ErrCorrupt, 5, one[:len(one)-1], nil)
	add("lease twice", ErrCorrupt, 5, join(one, one), nil)
	add("lease with unknown fields", ErrUnknownVersion, 5, join([]byte{2}, one[1:]), nil)
	withLease("another id", ErrCorrupt, func(id *int64, l *lease) { *id = 2 })
	withLease("id 0", ErrCorrupt, func(id *int64, l *lease) { *id = 0 })
	withLease("no TTL", ErrCorrupt, func(_ *int64, l *lease) { l.ttl = 0 })
	withLease("a TTL beyond the limit", ErrCorrupt, func(_ *int64, l *lease) { l.ttl = MaxTTL.Milliseconds() + 1 })
	withLease("deadline too late", ErrCorrupt, func(_ *int64, l *lease) { l.deadline = 1101 })
	withLease("deadline below 0", ErrCorrupt, func(_ *int64, l *lease) { l.deadline = -1 })
	withLease("label below 0", ErrCorrupt, func(_ *int64, l *lease) { l.expires = -1 })
	withLease("log index too high", ErrCorrupt, func(_ *int64, l *lease) { l.index = 6 })
	withLease("no keys", ErrCorrupt, func(_ *int64, l *lease) { l.keys = 0 })
	withLease("a key too many", ErrCorrupt, func(_ *int64, l *lease) { l.keys = 2 })
	withLease("keys below 0", ErrCorrupt, func(_ *int64, l *lease) { l.keys = -1 })

	history := sections[sectionHistory]
	// a is put at 1, b at 2 and 3 and deleted at 4.
	b1, b2 := []byte(s.event(1).next), []byte(s.event(2).next)
	event1, event2 := []byte{0, 1, 1, 'a'}, []byte{0, 2, 1, 'b'}
	event3, event4 := join([]byte{2, 3}, b1), join([]byte{3, 4}, b2)
	if !bytes.Equal(history, join(event1, event2, event3, event4)) {
		t.Fatalf("history: %x", history)
	}
	hash := func(revision int64, deleted bool, rec []byte) uint64 {
		return eventHash(revision, deleted, recordHash(stringOf(rec), headOf(stringOf(rec))))
	}
	hashes := func(sums ...uint64) func(*trailer) {
		return sum(func(x *extras) {
			x.history = 0
			for _, h := range sums {
				x.history += h
			}
		})
	}
	h1, h2 := eventHash(1, false, absentHash("a")), eventHash(2, false, absentHash("b"))
	h3, h4 := hash(3, false, b1), hash(4, true, b2)
	add("no history", ErrCorrupt, 6, nil, nil)
	add("event with unknown fields", ErrUnknownVersion, 6, join([]byte{4}, history[1:]), nil)
	add("event missing at the end", ErrCorrupt, 6, join(event1, event2, event3), hashes(h1, h2, h3))
	add("event missing within", ErrCorrupt, 6, join(event1, event3, event4), hashes(h1, h3, h4))
	add("event missing at the front", ErrCorrupt, 6, join(event2, event3, event4), nil)
	add("event twice", ErrCorrupt, 6, join(event1, event1, event2, event3, event4), hashes(h1, h1, h2, h3, h4))
	add("events out of order", ErrCorrupt, 6, join(event2, event1, event3, event4), hashes(h1, h2, h3, h4))
	add("keys of a revision out of order", ErrCorrupt, 6, join(event1, []byte{0, 2, 1, 'c'}, event2, event3, event4), nil)
	add("event of revision 0", ErrCorrupt, 6, join([]byte{0, 0, 1, 'a'}, event1, event2, event3, event4), nil)
	add("deleted what was not there", ErrCorrupt, 6, join([]byte{1, 1, 1, 'a'}, event2, event3, event4), nil)
	add("event without a key", ErrCorrupt, 6, join([]byte{0, 1, 0}, event2, event3, event4), nil)
	add("event with a key beyond the limit", ErrCorrupt, 6, join([]byte{0, 1}, binary.AppendUvarint(nil, MaxKeySize+1), make([]byte, MaxKeySize-10)), nil)
	long := []section{{1, sections[1]}, {3, sections[3]}, {6, binary.AppendUvarint([]byte{0, 1}, 64*blockSize)}}
	for range 64 {
		long = append(long, section{6, make([]byte, blockSize)})
	}
	files = append(files, namedFile{"event with a key of many blocks", forge(append(long, section{255, sections[255]})...), ErrCorrupt, false})
	add("event cut in its key", ErrCorrupt, 6, history[:3], nil)
	add("event cut in its head", ErrCorrupt, 6, history[:1], nil)
	add("event cut in its record", ErrCorrupt, 6, history[:len(history)-1], nil)
	add("event cut before its record", ErrCorrupt, 6, history[:len(history)-len(b2)], nil)
	add("event after its record's revision", ErrCorrupt, 6, join(event1, event2, join([]byte{2, 3}, b2), event4), hashes(h1, h2, hash(3, false, b2), h4))
	add("another record", ErrCorrupt, 6, join(event1, event2, event3, join([]byte{3, 4}, b2[:len(b2)-1], []byte{'3'})), nil)
	unseen("put, and absent since", 6, join(event1, event2, event3, join([]byte{2, 4}, b2)), hashes(h1, h2, h3, hash(4, false, b2)))
	unseen("deleted, and there since", 6, join(event1, event2, join([]byte{3, 3}, b1), event4), hashes(h1, h2, hash(3, true, b1), h4))
	unseen("created twice", 6, join(event1, event2, []byte{0, 3, 1, 'b'}, event4), hashes(h1, h2, eventHash(3, false, absentHash("b")), h4))

	one = sections[sectionKept]
	k, _ := s.once.kept.Get("o")
	withResult := func(name string, want error, change func(key *string, k *kept)) {
		key, k := "o", k
		change(&key, &k)
		add("kept: "+name, want, 7, append(k.append(nil, key), k.result...), sum(func(x *extras) { x.kept = keptHash(nil, key, &k) }))
	}
	if !bytes.Equal(one, append(k.append(nil, "o"), k.result...)) {
		t.Fatalf("kept: %x", one)
	}
	add("no kept result", ErrCorrupt, 7, nil, nil)
	add("kept result twice", ErrCorrupt, 7, join(one, one), sum(func(x *extras) { x.kept *= 2 }))
	add("kept results out of order", ErrCorrupt, 7, join(one, append(k.append(nil, "a"), k.result...)),
		sum(func(x *extras) { x.kept += keptHash(nil, "a", &k) }))
	add("kept result cut in its outcome", ErrCorrupt, 7, one[:len(one)-1], nil)
	add("kept result cut in its fingerprint", ErrCorrupt, 7, one[:10], nil)
	add("kept result cut in its key", ErrCorrupt, 7, one[:1], nil)
	add("kept result beyond belief", ErrCorrupt, 7, append(k.append(nil, "o")[:len(one)-len(k.result)-1], 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f), nil)
	withResult("no key", ErrCorrupt, func(key *string, _ *kept) { *key = "" })
	withResult("key too long", ErrCorrupt, func(key *string, _ *kept) { *key = strings.Repeat("o", MaxOnceKey+1) })
	withResult("unknown class", ErrCorrupt, func(_ *string, k *kept) { k.class = uint8(len(keptWindows)) })
	withResult("deadline too late", ErrCorrupt, func(_ *string, k *kept) { k.deadline++ })
	withResult("deadline below 0", ErrCorrupt, func(_ *string, k *kept) { k.deadline = -1 })
	withResult("log index too high", ErrCorrupt, func(_ *string, k *kept) { k.index = 6 })
	withResult("outcome of nothing", ErrCorrupt, func(_ *string, k *kept) { k.result = "" })
	withResult("outcome and more", ErrCorrupt, func(_ *string, k *kept) { k.result += "\x00" })
	withResult("outcome with an unknown part", ErrUnknownVersion, func(_ *string, k *kept) { k.result = "\x40" + k.result[1:] })
	add("another outcome", ErrCorrupt, 7, append(k.append(nil, "o"), appendResult(nil, &Result{Revision: 2, Deleted: 3})...), nil)

	one = sections[sectionTombstones]
	add("no tombstones", ErrCorrupt, 8, nil, nil)
	add("another tombstone", ErrCorrupt, 8, binary.LittleEndian.AppendUint64(nil, 78), nil)
	add("tombstone cut short", ErrCorrupt, 8, one[:7], nil)
	unseen("tombstone twice", 8, join(one, one), sum(func(x *extras) { x.tombs *= 2 }))
	return files
}

// event returns the n-th event of the history.
func (s *State) event(n int) *event {
	var found *event
	view := s.History()
	view.from(0, func(e *event) bool {
		found = e
		n--
		return n >= 0
	})
	return found
}

// What good checksums do not excuse, in the sections beyond the items.
func TestReadSnapshotRefusesSections(t *testing.T) {
	for _, tt := range refusedSections(t) {
		t.Run(tt.name, func(t *testing.T) {
			if !tt.unseen {
				bothRefuse(t, tt.data, tt.want)
			} else {
				_, s, err := ReadSnapshot(bytes.NewReader(tt.data))
				if s != nil || !refused(err) || !unseenByVerify(err) {
					t.Errorf("read: %v", err)
				}
			}
			_, _, err := ReadSnapshot(bytes.NewReader(tt.data))
			t.Log(err)
			if n := allocated(func() { ReadSnapshot(bytes.NewReader(tt.data)) }); n > 1<<20 {
				t.Errorf("%d bytes allocated for a file of %d", n, len(tt.data))
			}
		})
	}
}

// Sections in another order, or cut into blocks elsewhere.
func TestSnapshotSectionsForged(t *testing.T) {
	var sections []section
	_, blocks := splitBlocks(t, snapshot(t, nil, fullState(t)))
	for _, b := range blocks {
		sections = append(sections, section{b[8], b[blockHeadSize:]})
	}
	for i := range len(sections) - 1 {
		swapped := slices.Clone(sections)
		swapped[i], swapped[i+1] = swapped[i+1], swapped[i]
		bothRefuse(t, forge(swapped...), ErrCorrupt)
		bothRefuse(t, forge(slices.Delete(slices.Clone(sections), i, i+1)...), ErrCorrupt)
		bothRefuse(t, forge(slices.Insert(slices.Clone(sections), i+1, section{9, []byte{1}})...), ErrUnknownVersion)
	}
	// One byte a block, but for header and trailer, which are one block each.
	last := len(sections) - 1
	cut := sections[:1:1]
	for _, s := range sections[1:last] {
		for i := range s.payload {
			cut = append(cut, section{s.typ, s.payload[i : i+1]})
		}
	}
	_, s := restore(t, forge(append(cut, sections[last])...))
	if dumpAll(s) != dumpAll(fullState(t)) {
		t.Errorf("got %s\nwant %s", dumpAll(s), dumpAll(fullState(t)))
	}
}

// Each section's elements at, just before and just after the end of a block.
func TestSectionsBlockEdges(t *testing.T) {
	for offset := range 60 {
		s := NewState()
		s.Apply(1, &Batch{Commands: []Command{
			put("fill", strings.Repeat("f", blockSize-80+offset)), put("fill", "g"), put("fill", strings.Repeat("h", 200)), del("fill"),
		}}, nil)
		for i := range 3 {
			s.Apply(s.Applied()+1, &Batch{Commands: []Command{{Op: OpTxn, Once: &Once{Key: strings.Repeat("o", 10*i+1)}, Txn: &Txn{Then: []TxnOp{
				{Op: OpPut, Key: "k", Value: bytes.Repeat([]byte("v"), blockSize-140+offset), TTL: time.Second}, {Op: OpGet},
			}}}}}, nil)
		}
		_, got := restore(t, snapshot(t, nil, s))
		if dumpAll(got) != dumpAll(s) {
			t.Fatalf("offset %d: another state", offset)
		}
	}
}

// Random states come back as they were, and go on as they would have.
func TestAnySnapshotRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := NewState()
		bound := func(s *State) {
			s.history.maxEvents, s.once.maxTombs, s.once.maxKept = 40, 5, 12
		}
		bound(a)
		step := func(states ...*State) {
			b := Batch{}
			for range rapid.IntRange(1, 4).Draw(t, "commands") {
				b.Commands = append(b.Commands, drawAnyCommand(t))
			}
			var want string
			for i, s := range states {
				got := fmt.Sprintf("%+v", plain(s.Apply(s.Applied()+1, &b, nil)))
				if i == 0 {
					want = got
				} else if got != want {
					t.Fatalf("results\n%s\n%s", want, got)
				}
			}
		}
		for range rapid.IntRange(0, 80).Draw(t, "steps before") {
			step(a)
		}
		var file bytes.Buffer
		if err := WriteSnapshot(&file, nil, a); err != nil {
			t.Fatal(err)
		}
		if _, err := VerifySnapshot(bytes.NewReader(file.Bytes())); err != nil {
			t.Fatal(err)
		}
		_, b, err := ReadSnapshot(bytes.NewReader(file.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		bound(b)
		for range rapid.IntRange(0, 10).Draw(t, "steps after") {
			if dumpAll(a) != dumpAll(b) {
				t.Fatalf("got %s\nwant %s", dumpAll(b), dumpAll(a))
			}
			if err := b.Check(); err != nil {
				t.Fatal(err)
			}
			step(a, b)
		}
	})
}

// plain replaces what results point to by itself, for them to be printed.
func plain(results []Result) (all []any) {
	for _, r := range results {
		if r.Lease != nil {
			all = append(all, *r.Lease)
		}
		if r.Txn != nil {
			all = append(all, *r.Txn)
		}
		r.Lease, r.Txn = nil, nil
		all = append(all, r)
	}
	return all
}
