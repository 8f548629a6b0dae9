package kv

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Two replicas of one log have one digest at every mark, whatever each went through
// besides: snapshots, clones, scrubs. Without one of the commands on one of them
// they have one only if that left state and results the same.
func TestMarksCompareReplicas(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newMachine(t)
		peer := NewState()
		m.setBounds(peer)
		_, _ = m.state.Mark(0)
		_, _ = peer.Mark(0)
		for range rapid.IntRange(1, 12).Draw(t, "marks") {
			_, differs := m.applyTo(t, peer, -1), false
			if rapid.IntRange(0, 3).Draw(t, "differ") == 0 {
				differs = m.applyTo(t, peer, rapid.IntRange(0, 2).Draw(t, "left out"))
			}
			if rapid.Bool().Draw(t, "restart the peer") {
				peer = restarted(t, m, peer)
			}
			if err := peer.Scrub(rapid.IntRange(1, 50).Draw(t, "scrub"), 1000); err != nil {
				t.Fatal(err)
			}
			index := m.next()
			m.twin.applied = index
			a, whole := m.state.Mark(index)
			b, too := peer.Mark(index)
			if !whole {
				t.Fatal("a state that saw a mark says that it did not")
			}
			differs = differs || dumpAll(m.state) != dumpAll(peer)
			if too && (a != b) != differs {
				t.Fatalf("digests %016x and %016x; the replicas differ: %v", a, b, differs)
			}
			if differs {
				return
			}
		}
	})
}

// applyTo applies a batch to the machine and to its peer, there without one of the
// commands; -1 leaves out none. It says whether the results differ.
func (m *machine) applyTo(t *rapid.T, peer *State, without int) (differs bool) {
	b := Batch{Commands: make([]Command, 3)}
	for i := range b.Commands {
		b.Commands[i] = m.drawCommand(t)
	}
	index := m.next()
	here := m.state.Apply(index, &b, nil)
	m.twin.apply(index, &b)
	if without >= 0 {
		b.Commands = append(b.Commands[:without:without], b.Commands[without+1:]...)
	}
	return fmt.Sprintf("%+v", resultsText(here)) != fmt.Sprintf("%+v", resultsText(peer.Apply(index, &b, nil)))
}

func restarted(t *rapid.T, m *machine, s *State) *State {
	var file bytes.Buffer
	if err := WriteSnapshot(&file, nil, s); err != nil {
		t.Fatal(err)
	}
	_, restored, err := ReadSnapshot(&file)
	if err != nil {
		t.Fatal(err)
	}
	m.setBounds(restored)
	return restored
}

// Each number and each flag that a result tells is in the trace.
func TestTraceHasEveryPartOfResults(t *testing.T) {
	entry := Entry{CreateRevision: 1, ModRevision: 2, Version: 3, Lease: 4, Expires: 5}
	r := Result{
		Revision: 1, Entry: entry, Window: time.Second, Deleted: 2,
		Lease: &Lease{ID: 1, TTL: 2, Deadline: 3, Expires: 4, Keys: 5},
		Txn: &TxnResult{Put: 1, Deleted: 2, Skipped: 3, Ops: []OpResult{
			{Op: OpPut, Entry: entry}, {Op: OpGet, Items: []Entry{entry, {Key: "k", Value: []byte("v"), ModRevision: 1, Lease: 1}}, Count: 2},
		}},
	}
	was := r.fold(0)
	parts := 0
	var visit func(path string, v reflect.Value)
	visit = func(path string, v reflect.Value) {
		old := reflect.New(v.Type()).Elem()
		old.Set(v)
		switch v.Kind() {
		case reflect.Pointer:
			visit(path, v.Elem())
			return
		case reflect.Struct:
			for i := range v.NumField() {
				visit(path+"."+v.Type().Field(i).Name, v.Field(i))
			}
			return
		case reflect.Slice:
			if v.Type().Elem().Kind() != reflect.Uint8 {
				for i := range v.Len() {
					visit(fmt.Sprintf("%s[%d]", path, i), v.Index(i))
				}
				return
			}
			v.SetBytes([]byte("other"))
		case reflect.Bool:
			v.SetBool(!v.Bool())
		case reflect.String:
			v.SetString("other")
		case reflect.Uint8:
			v.SetUint(v.Uint() + 1)
		default:
			v.SetInt(v.Int() + 1)
		}
		parts++
		// The state's hash has the bytes of what was put or deleted, the command
		// has the op.
		known := path == ".Entry.Key" || path == ".Entry.Value" || path == ".Txn.Ops[0].Entry.Key" || path == ".Txn.Ops[0].Entry.Value" ||
			path == ".Txn.Ops[1].Entry.Key" || path == ".Txn.Ops[1].Entry.Value" || path == ".Txn.Ops[0].Op" || path == ".Txn.Ops[1].Op" ||
			path == ".Txn.Ops[1].Entry.Expires" // a label of a lease that is not there
		if (r.fold(0) == was) != known {
			t.Errorf("%s changed, and the digest is another: %v", path, known)
		}
		v.Set(old)
	}
	visit("", reflect.ValueOf(&r).Elem())
	if parts < 40 || r.fold(0) != was {
		t.Fatalf("%d parts", parts)
	}
}

func claimsMore(rec string) bool {
	defer func() { _ = recover() }() // headOf: it cannot be read at all
	return int(headOf(rec).recordSize()) > len(rec)
}

// A walk over all entries and events, in steps of any size, with changes between them,
// finds every bit that flipped in a record, and nothing where none did.
func TestScrubFindsEveryFlip(t *testing.T) {
	s := fullState(t)
	var records []string
	s.items.ascend("", func(rec string, _ head) bool { records = append(records, rec); return true })
	history := s.History()
	history.from(0, func(e *event) bool {
		if e.prev != "" {
			records = append(records, e.prev)
		}
		return true
	})
	round := func() (err error) {
		defer func() {
			if p := recover(); p != nil { // headOf: the record cannot be read any more
				err = fmt.Errorf("%w: %v", ErrBroken, p)
			}
		}()
		s.scrub = scrub{}
		for range s.Len() + s.history.count {
			if err := s.Scrub(1, 1<<20); err != nil {
				return err
			}
		}
		return nil
	}
	if err := round(); err != nil {
		t.Fatal(err)
	}
	for _, rec := range records {
		for i := range len(rec) {
			memory := bytesOf(rec)
			memory[i] ^= 1 << (i % 8)
			if claimsMore(rec) { // what is behind it is not ours to read
				memory[i] ^= 1 << (i % 8)
				continue
			}
			err := round()
			writeErr := func() (err error) {
				defer func() {
					if recover() != nil {
						err = ErrBroken
					}
				}()
				return WriteSnapshot(io.Discard, nil, s)
			}()
			memory[i] ^= 1 << (i % 8)
			if !errors.Is(err, ErrBroken) || !errors.Is(writeErr, ErrBroken) {
				t.Fatalf("a flip in byte %d of %q: scrub %v, snapshot %v", i, rec, err, writeErr)
			}
		}
	}
	if err := round(); err != nil {
		t.Fatal(err)
	}
}

// A round takes as many steps as entries and events ask for, also while keys before and
// behind the walk come, change and go.
func TestScrubWhileTheStateChanges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newMachine(t)
		m.load(t)
		count := rapid.IntRange(1, 60).Draw(t, "entries a step")
		size := rapid.SampledFrom([]int64{1, 50, 1 << 20}).Draw(t, "bytes a step")
		rounds := 0
		for range 12 {
			m.applyBatch(t)
			before := m.state.scrub.next
			if err := m.state.Scrub(count, size); err != nil {
				t.Fatal(err)
			}
			if m.state.scrub.next == "" {
				rounds++
			} else if m.state.scrub.next <= before {
				t.Fatalf("the walk stands still at %q", before)
			}
		}
		if count > 30 && size > 1000 && rounds == 0 {
			t.Fatal("no round came to its end")
		}
	})
}

// Touching a record that flipped makes the hash another, for good: a change of
// the entry does not heal it.
func TestFlipThatIsTouchedStaysVisible(t *testing.T) {
	for name, touch := range map[string]Command{"put": put("a", "new"), "delete": del("a")} {
		t.Run(name, func(t *testing.T) {
			good, bad := NewState(), NewState()
			for _, s := range []*State{good, bad} {
				apply(t, s, put("a", "value"), put("b", "value"))
			}
			e, _ := bad.Get("a")
			e.Value[0] ^= 1
			if good.Hash() != bad.Hash() {
				t.Fatal("the hash is recomputed")
			}
			for _, s := range []*State{good, bad} {
				s.Apply(s.Applied()+1, &Batch{Commands: []Command{touch}}, nil) // apply would check
			}
			if good.Hash() == bad.Hash() {
				t.Fatal("the hashes are the same")
			}
			if err := bad.Scrub(10, 1<<20); !errors.Is(err, ErrBroken) {
				t.Fatalf("scrub: %v", err)
			}
		})
	}
}

func TestWitnessRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := Witness{
			Member: rapid.Uint64Min(1).Draw(t, "member"), Mark: rapid.Bool().Draw(t, "mark"),
			Index: rapid.Uint64().Draw(t, "index"), Digest: rapid.Uint64().Draw(t, "digest"),
		}
		var b Batch
		if err := DecodeBatch(AppendWitness(nil, want), &b); err != nil {
			t.Fatal(err)
		}
		if got, ok := b.Witness(); !ok || got != want {
			t.Fatalf("got %+v, %v, want %+v", got, ok, want)
		}
		// What older versions skip it by, and what keeps peers from proposing marks.
		if b.Commands[0].Tick.Term != 0 || (b.Node == 0) != want.Mark {
			t.Fatalf("batch %+v", b)
		}
	})
}

func TestWitnessGolden(t *testing.T) {
	for want, w := range map[string]Witness{
		"0169f8e2ec000300010f0800e78a8d89108580f0d507ac0200": {Member: 3, Mark: true, Index: 300, Digest: 0x01234567_7abc0005},
	} {
		data := AppendWitness(nil, w)
		if got := hex.EncodeToString(data); got != want {
			t.Errorf("%+v is %s, was %s", w, got, want)
		}
	}
}

func TestOtherBatchesAreNoWitness(t *testing.T) {
	tick := func(tick Tick) Command { return Command{Op: OpTick, Tick: tick} }
	for name, commands := range map[string][]Command{
		"nothing":            nil,
		"a put":              {put("a", "b")},
		"a tick":             {tick(Tick{Clock: 1 << 32, Seen: 5, Term: 1})},
		"two":                {tick(Tick{Clock: 1 << 32}), tick(Tick{Clock: 1 << 32})},
		"of no version":      {tick(Tick{Clock: 1<<32 - 1})},
		"of a later one":     {tick(Tick{Clock: 2 << 32})},
		"half a digest more": {tick(Tick{Clock: 1 << 32, Wall: 1 << 32})},
	} {
		if w, ok := (&Batch{Node: 1, Seq: 1, Commands: commands}).Witness(); ok {
			t.Errorf("%s: %+v", name, w)
		}
	}
}
