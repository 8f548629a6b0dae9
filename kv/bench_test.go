package kv

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strconv"
	"testing"
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

func BenchmarkEncodeCommand(b *testing.B) {
	c := Command{Op: OpPut, Key: benchKey(1), Value: make([]byte, 128)}
	buf := make([]byte, 0, CommandSize(c))
	b.ReportAllocs()
	for b.Loop() {
		buf = AppendCommand(buf[:0], c)
	}
}

func benchCommands(n int) [][]byte {
	commands := make([][]byte, n)
	for i := range commands {
		commands[i] = AppendCommand(nil, Command{Op: OpPut, Key: benchKey(i), Value: make([]byte, 128)})
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
			h := newHead(1000, 1_000_000, 17, 12, size)
			rec := newRecord(h, benchKey(1), make([]byte, size))
			var sum uint64
			for b.Loop() {
				sum += recordHash(rec, h)
			}
			_ = sum
		})
	}
}
