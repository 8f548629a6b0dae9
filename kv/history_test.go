package kv

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"
)

func TestHistoryTrimsWholeRevisions(t *testing.T) {
	s := NewState()
	s.history.maxEvents = 3
	apply(t, s, put("a", "1"), put("b", "1"))           // revisions 1, 2
	apply(t, s, then(opPut("a", "2"), opPut("c", "2"))) // 3: four events, the first goes
	apply(t, s, put("d", "1"))                          // 4: four again, revision 2 goes
	if got := s.History().Compacted(); got != 2 {
		t.Errorf("compacted %d", got)
	}
	apply(t, s, put("e", "1")) // 5: revision 3 goes, both of its events
	if got := fmt.Sprint(events(s, 0)); got != "[4 put d=1 v1 c4 5 put e=1 v1 c5]" || s.History().Compacted() != 3 {
		t.Error(got)
	}
	// One revision that is too large leaves nothing.
	apply(t, s, Command{Op: OpDeleteRange})
	if got := events(s, 0); got != nil || s.History().Compacted() != 6 || s.History().Revision() != 6 {
		t.Errorf("%s, %+v", got, s.History())
	}
	apply(t, s, put("a", ""))
	if got := fmt.Sprint(events(s, 0)); got != "[7 put a= v1 c7]" {
		t.Error(got)
	}
}

func TestHistoryTrimsBySize(t *testing.T) {
	s := NewState()
	apply(t, s, put("a", strings.Repeat("v", 100)))
	apply(t, s, put("a", "")) // counts for the first record: 64 + 1 + 107
	if s.history.size != 65+172 {
		t.Errorf("%d bytes", s.history.size)
	}
	s.history.maxSize = 237
	apply(t, s, del("none"))
	if s.history.count != 2 {
		t.Errorf("%d events at the bound", s.history.count)
	}
	s.history.maxSize = 236
	apply(t, s, del("none"))
	if s.history.count != 1 {
		t.Errorf("%d events beyond the bound", s.history.count)
	}
}

// The real bounds, with values that make chunks end early.
func TestHistoryBounds(t *testing.T) {
	s := NewState()
	value := make([]byte, 1<<20)
	for range 40 {
		s.Apply(s.Applied()+1, &Batch{Commands: []Command{{Op: OpPut, Key: "large", Value: value}}}, nil)
	}
	check(t, s)
	if s.history.count != 31 || s.history.size > maxEventSize {
		t.Errorf("%d events of %d bytes", s.history.count, s.history.size)
	}
	// What is trimmed does not stay in memory beyond a chunk.
	held := s.history.skip
	for _, c := range s.history.full {
		held += len(c)
	}
	if held > 2*s.history.count {
		t.Errorf("%d events held", held)
	}
	b := Batch{}
	for i := range 1000 {
		b.Commands = append(b.Commands, put(fmt.Sprint(i), ""))
	}
	for range maxEvents/1000 + 1 {
		s.Apply(s.Applied()+1, &b, nil)
	}
	check(t, s)
	if s.history.count != maxEvents {
		t.Errorf("%d events", s.history.count)
	}
}

// Values are held once: the next record of an event is the item, or what the
// following event of the key had before it.
func TestHistorySharesMemory(t *testing.T) {
	s := NewState()
	apply(t, s, put("a", "1"), put("a", "2"), put("a", "3"))
	var last string
	h := s.History()
	h.from(1, func(e *event) bool {
		if e.prev != "" && unsafe.StringData(e.prev) != unsafe.StringData(last) {
			t.Errorf("revision %d has its own memory", e.revision)
		}
		last = e.next
		return true
	})
	if rec, _, _ := s.items.get("a"); unsafe.StringData(rec) != unsafe.StringData(last) {
		t.Error("the item has its own memory")
	}
}

// Meant for the race detector: histories and clones are read while the state
// goes on, over the ends of chunks and trims.
func TestHistoryReadWhileStateGoesOn(t *testing.T) {
	s := NewState()
	s.history.maxEvents = 700
	var readers sync.WaitGroup
	read := func(h History) {
		want := h.Compacted() + 1
		for range 3 {
			next := want
			h.Events(0, func(e Event) bool {
				if e.Revision != next || string(e.Entry.Value) != fmt.Sprint(next) {
					t.Errorf("revision %d holds %d, %q", next, e.Revision, e.Entry.Value)
				}
				next++
				return true
			})
			if next != h.Revision()+1 {
				t.Errorf("ends at %d, not %d", next-1, h.Revision())
			}
		}
	}
	for i := range 3000 {
		c := put(fmt.Sprint("k", i%17), fmt.Sprint(i+1))
		s.Apply(uint64(i+1), &Batch{Commands: []Command{c}}, nil)
		if i%100 == 50 {
			h := s.History()
			readers.Go(func() { read(h) })
		}
		if i%500 == 250 {
			clone := s.Clone()
			h := clone.History()
			readers.Go(func() { read(h) })
			readers.Go(func() {
				for j := range 300 {
					clone.Apply(clone.Applied()+1, &Batch{Commands: []Command{put("k", fmt.Sprint(i+2+j))}}, nil)
				}
				read(clone.History())
				if err := clone.Check(); err != nil {
					t.Error(err)
				}
			})
		}
	}
	readers.Wait()
	check(t, s)
}

// A state and its clones seal chunks of their own, whatever room there was.
func TestClonesAppendApart(t *testing.T) {
	base := NewState()
	for i := range 5*chunkEvents + 7 {
		base.Apply(base.Applied()+1, &Batch{Commands: []Command{put("k", fmt.Sprint(i))}}, nil)
	}
	if cap(base.history.full) == len(base.history.full) {
		t.Fatal("no room that could be shared")
	}
	states := []*State{base, base.Clone(), base.Clone()}
	for range 2 * chunkEvents {
		for i, s := range states {
			s.Apply(s.Applied()+1, &Batch{Commands: []Command{put(fmt.Sprint("of", i), "")}}, nil)
		}
	}
	for i, s := range states {
		check(t, s)
		s.History().Events(5*chunkEvents+8, func(e Event) bool {
			if e.Entry.Key != fmt.Sprint("of", i) {
				t.Errorf("state %d has an event of %q", i, e.Entry.Key)
			}
			return !t.Failed()
		})
	}
}

// Nothing reaches a trimmed chunk any more but a History that was taken before.
func TestTrimmedChunkIsLetGo(t *testing.T) {
	s := NewState()
	for range 3*chunkEvents + 1 {
		s.Apply(s.Applied()+1, &Batch{Commands: []Command{put("k", "")}}, nil)
	}
	before := s.history.full
	s.history.maxEvents = chunkEvents
	apply(t, s, put("k", ""))
	if len(s.history.full) != len(before)-2 || &s.history.full[0] == &before[2] {
		t.Errorf("%d chunks of %d, in the same array", len(s.history.full), len(before))
	}
}

func TestHistoryBack(t *testing.T) {
	s := NewState()
	apply(t, s, put("a", "1"), put("b", "x"), put("a", "2"), del("a"), put("a", "3"), put("b", "y"))
	var got []string
	s.History().Back("a", func(e Event) bool {
		got = append(got, fmt.Sprintf("%d %v %s", e.Revision, e.Deleted, e.Entry.Value))
		return len(got) < 3
	})
	if fmt.Sprint(got) != "[5 false 3 4 true  3 false 2]" {
		t.Errorf("%q", got)
	}
}

func TestViewErrors(t *testing.T) {
	s := NewState()
	if v, err := s.View(0); err != nil || v.Revision() != 0 || v.Count(Span{}) != 0 {
		t.Errorf("empty: %v", err)
	}
	s.history.maxEvents = 2
	apply(t, s, put("a", "1"), put("a", "2"), put("a", "3"), put("a", "4"))
	for revision, want := range map[int64]error{-1: ErrCompacted, 1: ErrCompacted, 2: nil, 3: nil, 4: nil, 5: ErrFuture} {
		v, err := s.View(revision)
		if !errors.Is(err, want) {
			t.Errorf("revision %d: %v", revision, err)
		}
		if want == nil {
			if e, ok := v.Get("a"); !ok || string(e.Value) != fmt.Sprint(revision) {
				t.Errorf("revision %d: %+v", revision, e)
			}
		}
	}
	if v, err := s.View(0); err != nil || v.Revision() != 4 {
		t.Errorf("present: %v", err)
	}
}

func TestViewGetDoesNotUndoAll(t *testing.T) {
	s := NewState()
	apply(t, s, put("a", "1"), put("b", "1"), put("b", "2"), put("a", "2"))
	v, _ := s.View(2)
	if e, _ := v.Get("b"); string(e.Value) != "1" || v.ready {
		t.Errorf("%+v, all undone: %v", e, v.ready)
	}
}

// A list of one group must not take the time of its keys.
func TestListSeeksOverGroups(t *testing.T) {
	s := NewState()
	b := Batch{}
	for i := range 20_000 {
		b.Commands = append(b.Commands, put(fmt.Sprintf("%02d/%04d", i/1000, i%1000), ""))
	}
	s.Apply(1, &b, nil)
	v, _ := s.View(0)
	for _, reverse := range []bool{false, true} {
		q := Query{Delimiter: "/", Limit: 100, Reverse: reverse}
		p := Page{}
		l := lister{v: v, q: &q, p: &p}
		l.run()
		if len(p.Prefixes) != 20 || p.More || l.looked != 20 {
			t.Errorf("reverse %v: %d prefixes, %d keys looked at", reverse, len(p.Prefixes), l.looked)
		}
	}
}

func TestListPages(t *testing.T) {
	s := NewState()
	for _, key := range []string{"a", "b/", "b/1", "b/2", "b0", "c/1", "d", "\xff/1", "\xff\xff"} {
		apply(t, s, put(key, "12345"))
	}
	for _, tt := range []struct {
		name string
		q    Query
		want []string // pages
	}{
		{"by number", Query{Limit: 4}, []string{"a b/ b/1 b/2 ", "b0 c/1 d \xff/1 ", "\xff\xff ."}},
		{"backwards", Query{Limit: 4, Reverse: true}, []string{"\xff\xff \xff/1 d c/1 ", "b0 b/2 b/1 b/ ", "a ."}},
		{"rolled up", Query{Limit: 3, Delimiter: "/"}, []string{"a b0 [b/] ", "d [c/ \xff/] ", "\xff\xff ."}},
		{"rolled up, backwards", Query{Limit: 3, Delimiter: "/", Reverse: true}, []string{"\xff\xff d [\xff/] ", "b0 [c/ b/] ", "a ."}},
		{"a group is the last", Query{Limit: 9, Delimiter: "/", Span: Prefix("\xff/")}, []string{"[\xff/] ."}},
		{"inside a group", Query{Limit: 9, Delimiter: "/", Span: Prefix("b/"), Prefix: "b/"}, []string{"b/ b/1 b/2 ."}},
		{"by bytes", Query{Limit: 9, MaxBytes: 13, Span: Prefix("b")}, []string{"b/ ", "b/1 ", "b/2 ", "b0 ."}},
		{"by bytes, just", Query{Limit: 9, MaxBytes: 15, Span: Prefix("b")}, []string{"b/ b/1 ", "b/2 b0 ."}},
		{"by bytes of keys", Query{Limit: 9, MaxBytes: 5, Span: Prefix("b"), KeysOnly: true}, []string{"b/ b/1 ", "b/2 b0 ."}},
		{"too large for a page", Query{Limit: 9, MaxBytes: 1, Span: SingleKey("a")}, []string{"a ."}},
		{"exactly full", Query{Limit: 1, Span: SingleKey("a")}, []string{"a ."}},
		{"nothing", Query{Limit: 1, Span: Span{"x", "y"}}, []string{"."}},
		{"an empty span", Query{Limit: 1, Span: Span{"y", "x"}}, []string{"."}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v, _ := s.View(0)
			var got []string
			for more := true; more; {
				p := v.List(tt.q)
				line := ""
				for _, e := range p.Items {
					line += e.Key + " "
					if tt.q.KeysOnly != (e.Value == nil) {
						t.Errorf("%+v", e)
					}
				}
				if p.Prefixes != nil {
					line += fmt.Sprint(p.Prefixes, " ")
				}
				if !p.More {
					line += "."
				}
				got = append(got, line)
				more = p.More
				tt.q.After, tt.q.Rolled = p.Last, p.LastRolled
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("\n got %q\nwant %q", got, tt.want)
			}
		})
	}
}

// A view that was stopped while it was made ready can be made ready later.
func TestViewPrepareStops(t *testing.T) {
	s := NewState()
	for i := range 3*stopEvery + 1 {
		s.Apply(uint64(i+1), &Batch{Commands: []Command{{Op: OpPut, Key: fmt.Sprint(i % 1000), Value: []byte{byte(i)}}}}, nil)
	}
	v, err := s.View(1)
	if err != nil {
		t.Fatal(err)
	}
	stopped := errors.New("stopped")
	for after := range 5 {
		asked := 0
		err := v.Prepare(func() error {
			if asked++; asked > after {
				return stopped
			}
			return nil
		})
		if wantErr := after < 4; (err != nil) != wantErr || wantErr && asked != after+1 || v.ready == wantErr {
			t.Errorf("asked %d times, to stop after %d: %v", asked, after, err)
		}
	}
	if n := v.Count(Span{}); n != 1 || len(v.undo) != 1000 {
		t.Errorf("%d keys, %d undone", n, len(v.undo))
	}
}
