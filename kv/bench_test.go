package kv

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The benchmarks use keys of 12 and values of 128 bytes.

func benchKey(i int) string { return fmt.Sprintf("key-%08d", i) }

// benchState returns a state of n keys that were put in random order.
func benchState(n int) *State {
	s := NewState()
	value := bytes.Repeat([]byte{'v'}, 128)
	b := Batch{Commands: make([]Command, 1)}
	var results []Result
	for i, k := range rand.New(rand.NewPCG(1, 2)).Perm(n) {
		b.Commands[0] = Command{Op: OpPut, Key: benchKey(k), Value: value}
		results = s.Apply(uint64(i+1), &b, results[:0])
	}
	return s
}

func benchKeys(n int) []string {
	keys := make([]string, n)
	for i, k := range rand.New(rand.NewPCG(3, 4)).Perm(n) {
		keys[i] = benchKey(k)
	}
	return keys
}

var benchSizes = []int{1_000, 1_000_000}

func BenchmarkApplyOverwrite(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			s, keys := benchState(n), benchKeys(n)
			batch := Batch{Commands: []Command{{Op: OpPut, Value: bytes.Repeat([]byte{'w'}, 128)}}}
			var results []Result
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				batch.Commands[0].Key = keys[i%n]
				i++
				results = s.Apply(uint64(n+i), &batch, results[:0])
			}
		})
	}
}

func BenchmarkApplyInsertDelete(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			s, keys := benchState(n), benchKeys(n)
			batch := Batch{Commands: []Command{{Op: OpPut, Value: bytes.Repeat([]byte{'w'}, 128)}, {Op: OpDelete}}}
			var results []Result
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				key := keys[i%n] + "+"
				batch.Commands[0].Key, batch.Commands[1].Key = key, key
				i++
				results = s.Apply(uint64(n+i), &batch, results[:0])
			}
		})
	}
}

// BenchmarkApplyReplay is ApplyOverwrite at 1000 keys with an identity.
func BenchmarkApplyReplay(b *testing.B) {
	s, keys := benchState(1000), benchKeys(1000)
	batch := Batch{Node: 1, Boot: 1, Commands: []Command{{Op: OpPut, Value: bytes.Repeat([]byte{'w'}, 128)}}}
	var results []Result
	b.ReportAllocs()
	for b.Loop() {
		batch.Seq++
		batch.Commands[0].Key = keys[batch.Seq%1000]
		results = s.Apply(batch.Seq, &batch, results[:0])
	}
}

func BenchmarkGet(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			s, keys := benchState(n), benchKeys(n)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if _, ok := s.Get(keys[i%n]); !ok {
					b.Fatal("no such key")
				}
				i++
			}
		})
	}
}

// BenchmarkCold is what a look-up costs in a server, where everything else that
// a request needs has been through the caches since the one before: three
// states take turns, as three members on one machine do, and 64 KiB are touched
// in between. The time is the median of the operation alone, with some 50 ns for
// taking it.
func BenchmarkCold(b *testing.B) {
	for _, n := range []int{10_000, 100_000, 1_000_000} {
		states, keys := []*State{benchState(n), benchState(n), benchState(n)}, benchKeys(n)
		batch := Batch{Commands: []Command{{Op: OpPut, Value: bytes.Repeat([]byte{'w'}, 128)}}}
		var results []Result
		for _, op := range []struct {
			name string
			do   func(s *State, key string)
		}{
			{"get", func(s *State, key string) { s.Get(key) }},
			{"absent", func(s *State, key string) { s.Get(key + "+") }},
			{"put", func(s *State, key string) {
				batch.Commands[0].Key = key
				results = s.Apply(s.Applied()+1, &batch, results[:0])
			}},
		} {
			b.Run(fmt.Sprintf("%s/%d", op.name, n), func(b *testing.B) {
				dirt, sum := make([]byte, 4<<20), byte(0)
				var took []time.Duration
				for i := 0; b.Loop(); i++ {
					for at := range 1 << 10 {
						sum += dirt[(i<<16+at<<6)%len(dirt)]
					}
					key := strings.Clone(keys[i%n]) // as a request has just brought it
					start := time.Now()
					op.do(states[i%3], key)
					took = append(took, time.Since(start))
				}
				runtime.KeepAlive(sum)
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2]), "ns/look")
			})
		}
	}
}

func BenchmarkEncodeCommand(b *testing.B) {
	c := &Command{Op: OpPut, Key: benchKey(1), Value: make([]byte, 128)}
	buf := make([]byte, 0, CommandSize(c))
	b.ReportAllocs()
	for b.Loop() {
		buf = AppendCommand(buf[:0], c)
	}
}

func benchCommands(n int) [][]byte {
	commands := make([][]byte, n)
	for i := range commands {
		commands[i] = AppendCommand(nil, &Command{Op: OpPut, Key: benchKey(i), Value: make([]byte, 128)})
	}
	return commands
}

func BenchmarkEncodeBatch100(b *testing.B) {
	commands := benchCommands(100)
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf = AppendBatch(buf[:0], 1, 2, 3, commands...)
	}
	b.SetBytes(int64(len(buf)))
}

func BenchmarkDecodeBatch100(b *testing.B) {
	data := AppendBatch(nil, 1, 2, 3, benchCommands(100)...)
	var batch Batch
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if err := DecodeBatch(data, &batch); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSnapshot1M(b *testing.B) {
	s := benchState(1_000_000)
	var file bytes.Buffer
	if err := WriteSnapshot(&file, nil, s); err != nil {
		b.Fatal(err)
	}
	size := int64(file.Len())
	b.Run("write", func(b *testing.B) {
		b.SetBytes(size)
		b.ReportAllocs()
		for b.Loop() {
			if err := WriteSnapshot(io.Discard, nil, s); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read", func(b *testing.B) {
		b.SetBytes(size)
		b.ReportAllocs()
		for b.Loop() {
			if _, _, err := ReadSnapshot(bytes.NewReader(file.Bytes())); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("verify", func(b *testing.B) {
		b.SetBytes(size)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := VerifySnapshot(bytes.NewReader(file.Bytes())); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkCheck1M(b *testing.B) {
	s := benchState(1_000_000)
	for b.Loop() {
		if err := s.Check(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkMemory reports the bytes and objects on the heap for each of 1M
// entries, as they grew and as they come out of a snapshot.
func BenchmarkMemory(b *testing.B) {
	const n = 1_000_000
	measure := func(b *testing.B, build func() *State) {
		for b.Loop() {
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			s := build()
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/item")
			b.ReportMetric(float64(after.HeapObjects-before.HeapObjects)/n, "objects/item")
			runtime.KeepAlive(s)
		}
	}
	b.Run("grown", func(b *testing.B) { measure(b, func() *State { return benchState(n) }) })
	b.Run("leases", func(b *testing.B) {
		measure(b, func() *State {
			s := benchState(n)
			batch := Batch{Commands: []Command{{Op: OpPut, TTL: time.Hour}, {Op: OpTick}}}
			var results []Result
			for i := range n {
				batch.Commands[0].Key = benchKey(i)
				batch.Commands[1].Tick = Tick{Clock: int64(i), Seen: s.Applied()}
				results = s.Apply(s.Applied()+1, &batch, results[:0])
			}
			return s
		})
	})
	var file bytes.Buffer
	if err := WriteSnapshot(&file, nil, benchState(n)); err != nil {
		b.Fatal(err)
	}
	b.Run("restored", func(b *testing.B) {
		measure(b, func() *State {
			_, s, err := ReadSnapshot(bytes.NewReader(file.Bytes()))
			if err != nil {
				b.Fatal(err)
			}
			return s
		})
	})
}

func BenchmarkRecordHash(b *testing.B) {
	for _, size := range []int{0, 128, 4096, 1 << 20} {
		b.Run(strconv.Itoa(size), func(b *testing.B) {
			h := newHead(1000, 1_000_000, 17, 0, 12, size)
			rec := newRecord(h, benchKey(1), make([]byte, size))
			var sum uint64
			for b.Loop() {
				sum += recordHash(rec, h)
			}
			_ = sum
		})
	}
}

// BenchmarkApplyLease puts keys that each get a lease of their own, over and
// over; and ticks that start them.
func BenchmarkApplyLease(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			s, keys := benchState(n), benchKeys(n)
			batch := Batch{Commands: []Command{{Op: OpPut, Value: bytes.Repeat([]byte{'w'}, 128), TTL: time.Hour}}}
			ticks := Batch{Commands: make([]Command, 1)}
			var results []Result
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				batch.Commands[0].Key = keys[i%n]
				i++
				results = s.Apply(s.Applied()+1, &batch, results[:0])
				if i%100 == 0 {
					ticks.Commands[0] = Command{Op: OpTick, Tick: Tick{Clock: int64(i), Seen: s.Applied()}}
					results = s.Apply(s.Applied()+1, &ticks, results[:0])
				}
			}
		})
	}
}

// BenchmarkApplyTxn compares one key, puts two and reads one.
func BenchmarkApplyTxn(b *testing.B) {
	s, keys := benchState(1000), benchKeys(1000)
	value := bytes.Repeat([]byte{'w'}, 128)
	txn := &Txn{If: make([]Compare, 1), Then: make([]TxnOp, 3)}
	batch := Batch{Commands: []Command{{Op: OpTxn, Txn: txn}}}
	var results []Result
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		txn.If[0] = Compare{Key: keys[i%1000], Target: TargetVersion, Op: Greater}
		txn.Then[0] = TxnOp{Op: OpPut, Key: keys[i%1000], Value: value}
		txn.Then[1] = TxnOp{Op: OpPut, Key: keys[(i+1)%1000], Value: value}
		txn.Then[2] = TxnOp{Op: OpGet, Span: SingleKey(keys[(i+2)%1000])}
		results = s.Apply(uint64(i), &batch, results[:0])
	}
}

func BenchmarkApplyOnce(b *testing.B) {
	s, keys := benchState(1000), benchKeys(1000)
	batch := Batch{Commands: []Command{{Op: OpPut, Value: bytes.Repeat([]byte{'w'}, 128), Once: &Once{}}}}
	var results []Result
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if i%100_000 == 0 {
			s.once = newOnce()
		}
		batch.Commands[0].Key, batch.Commands[0].Once.Key = keys[i%1000], strconv.Itoa(i)
		results = s.Apply(uint64(i+1), &batch, results[:0])
	}
}

// benchPast returns a state of a million keys and a view from which 50,000
// events have to be undone.
func benchPast(b *testing.B) (*State, func() *View) {
	s := benchState(1_000_000)
	return s, func() *View {
		v, err := s.View(s.Revision() - 50_000)
		if err != nil {
			b.Fatal(err)
		}
		return v
	}
}

// BenchmarkView is about one million keys: at the present revision, and at one
// that lies 50,000 events back.
func BenchmarkView(b *testing.B) {
	s, past := benchPast(b)
	present, _ := s.View(0)
	undone := past()
	undone.prepare()
	span := Prefix("key-005")
	for _, v := range []struct {
		name string
		view *View
	}{{"present", present}, {"past", undone}} {
		b.Run(v.name+"/count", func(b *testing.B) {
			for b.Loop() {
				v.view.Count(span)
			}
		})
		b.Run(v.name+"/list100", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				v.view.List(Query{Span: span, Limit: 100})
			}
		})
		b.Run(v.name+"/list100reverse", func(b *testing.B) {
			for b.Loop() {
				v.view.List(Query{Span: span, Limit: 100, Reverse: true})
			}
		})
		b.Run(v.name+"/list100rolled", func(b *testing.B) {
			for b.Loop() {
				v.view.List(Query{Delimiter: "7", Limit: 100})
			}
		})
	}
	b.Run("past/prepare", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			past().prepare()
		}
	})
	b.Run("past/get", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			past().Get(benchKey(i % 1_000_000))
		}
	})
}

// BenchmarkHistory reads the newest hundred events, as a watcher would.
func BenchmarkHistory(b *testing.B) {
	s := benchState(200_000)
	b.Run("newest100", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			h := s.History()
			h.Events(h.Revision()-99, func(Event) bool { return true })
		}
	})
	b.Run("back", func(b *testing.B) {
		for b.Loop() {
			s.History().Back("absent", func(Event) bool { return true })
		}
	})
}

func BenchmarkClone(b *testing.B) {
	s := benchState(1_000_000)
	b.ReportAllocs()
	for b.Loop() {
		s.Clone()
	}
}

// BenchmarkScrub is one step as a node makes it, ten times a second.
func BenchmarkScrub(b *testing.B) {
	s := benchState(1_000_000)
	for b.Loop() {
		if err := s.Scrub(256, 64<<10); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkMark is what each member does twice a second while the state changes.
func BenchmarkMark(b *testing.B) {
	s := benchState(1000)
	for i := range 7 {
		s.admit(uint64(i+1), 1, 1)
	}
	for b.Loop() {
		s.Mark(1)
	}
}
