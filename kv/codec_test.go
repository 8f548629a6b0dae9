package kv

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"hash/crc32"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// A golden file is what version N wrote. It stays readable for as long as there
// is data of that version, so it is written once and then never changes.
var writeGolden = flag.Bool("write-golden", false, "write the golden files that are missing")

// golden compares data with a golden file and returns the file's content.
func golden(t testing.TB, name string, data []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) && *writeGolden {
		for line := range slices.Chunk(data, 32) {
			text = append(hex.AppendEncode(text, line), '\n')
		}
		err = os.WriteFile(path, text, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	want, err := hex.DecodeString(strings.ReplaceAll(string(text), "\n", ""))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(data, want) {
		t.Errorf("%s: the encoding has changed. If it must, give it a new version.\n got %x\nwant %x", name, data, want)
	}
	return want
}

// goldenBatch has every op, the odd keys and values, and numbers of several bytes.
func goldenBatch() Batch {
	return Batch{Node: 0x8e9e05148064967c, Boot: 3, Seq: 300, Commands: []Command{
		{Op: OpPut, Key: "sky", Value: []byte("blue")},
		{Op: OpPut, Key: "\x00/\xff\xfe", Value: []byte("\x00/\xff\xfe")},
		{Op: OpDelete, Key: "sky"},
		{Op: OpPut, Key: "empty", Value: []byte{}},
		{Op: OpPut, Key: strings.Repeat("k", 200), Value: bytes.Repeat([]byte("v"), 130)},
	}}
}

func encode(b Batch) []byte {
	var commands [][]byte
	for _, c := range b.Commands {
		commands = append(commands, AppendCommand(nil, c))
	}
	return AppendBatch(nil, b.Node, b.Boot, b.Seq, commands...)
}

func TestGoldenBatch(t *testing.T) {
	data := golden(t, "batch-v1.hex", encode(goldenBatch()))
	var got Batch
	if err := DecodeBatch(data, &got); err != nil {
		t.Fatal(err)
	}
	if want := goldenBatch(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

func TestBatchRoundTrip(t *testing.T) {
	for name, want := range map[string]Batch{
		"nothing":     {},
		"no commands": {Node: 1, Boot: 2, Seq: 3},
		"extremes": {Node: 1<<64 - 1, Boot: 1<<64 - 1, Seq: 1<<64 - 1, Commands: []Command{
			{Op: OpPut, Key: strings.Repeat("\x00", MaxKeySize), Value: make([]byte, 1<<20)},
			{Op: OpDelete, Key: strings.Repeat("\xff", MaxKeySize)},
		}},
		"golden": goldenBatch(),
	} {
		t.Run(name, func(t *testing.T) {
			var got Batch
			if err := DecodeBatch(encode(want), &got); err != nil {
				t.Fatal(err)
			}
			if got.Node != want.Node || got.Boot != want.Boot || got.Seq != want.Seq || len(got.Commands) != len(want.Commands) {
				t.Fatalf("got %d/%d/%d, %d commands", got.Node, got.Boot, got.Seq, len(got.Commands))
			}
			for i, c := range want.Commands {
				if !reflect.DeepEqual(got.Commands[i], c) {
					t.Errorf("command %d differs", i)
				}
				if n := len(AppendCommand(nil, c)); n != CommandSize(c) {
					t.Errorf("command %d: CommandSize %d, encoded %d", i, CommandSize(c), n)
				}
			}
		})
	}
}

func TestAppendBatchAppends(t *testing.T) {
	one := AppendBatch([]byte("front"), 1, 2, 3, AppendCommand(nil, put("a", "1")))
	if string(one[:5]) != "front" || !bytes.Equal(one[5:], AppendBatch(nil, 1, 2, 3, AppendCommand(nil, put("a", "1")))) {
		t.Errorf("got %x", one)
	}
}

func TestDecodeBatchReuses(t *testing.T) {
	var b Batch
	if err := DecodeBatch(encode(goldenBatch()), &b); err != nil {
		t.Fatal(err)
	}
	array := &b.Commands[0]
	if err := DecodeBatch(encode(Batch{Commands: []Command{put("a", "1")}}), &b); err != nil {
		t.Fatal(err)
	}
	if len(b.Commands) != 1 || &b.Commands[0] != array || b.Node != 0 || b.Seq != 0 {
		t.Errorf("got %+v", b)
	}
	for i, c := range b.Commands[1:cap(b.Commands)] {
		if c.Key != "" || c.Value != nil {
			t.Errorf("place %d keeps the previous entry alive", i+1)
		}
	}
	data := encode(goldenBatch())
	if allocs := testing.AllocsPerRun(10, func() { DecodeBatch(data, &b) }); allocs != 0 {
		t.Errorf("%v allocations to decode again", allocs)
	}
	if err := DecodeBatch(data[:len(data)-1], &b); err == nil || len(b.Commands) != 0 {
		t.Errorf("after an error: %d commands, %v", len(b.Commands), err)
	}
}

func refused(err error) bool {
	return errors.Is(err, ErrCorrupt) || errors.Is(err, ErrUnknownVersion)
}

func TestBatchEveryFlipAndCut(t *testing.T) {
	data := encode(goldenBatch())
	var b Batch
	for i := range data {
		if err := DecodeBatch(data[:i], &b); !refused(err) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
		for bit := range 8 {
			data[i] ^= 1 << bit
			if err := DecodeBatch(data, &b); !refused(err) {
				t.Errorf("byte %d, bit %d: %v", i, bit, err)
			}
			data[i] ^= 1 << bit
		}
	}
	if err := DecodeBatch(append(data, 0), &b); !refused(err) {
		t.Errorf("a byte too many: %v", err)
	}
}

// sealed gives a log entry a good checksum, whatever is in it.
func sealed(content ...byte) []byte {
	data := append([]byte{batchVersion, 0, 0, 0, 0}, content...)
	binary.LittleEndian.PutUint32(data[1:], crc32.Checksum(content, castagnoli))
	return data
}

// What a good checksum does not excuse. The first four bytes are node, boot,
// seq and the number of commands.
func TestDecodeBatchRefuses(t *testing.T) {
	long := strings.Repeat("k", MaxKeySize+1)
	tests := []struct {
		name string
		data []byte
		want error
	}{
		{"nothing", nil, ErrCorrupt},
		{"half a head", []byte{1, 0, 0}, ErrCorrupt},
		{"version 0", []byte{0, 0, 0, 0, 0, 0, 0, 0, 0}, ErrUnknownVersion},
		{"version 2", []byte{2, 0, 0, 0, 0, 0, 0, 0, 0}, ErrUnknownVersion},
		{"no content", sealed(), ErrCorrupt},
		{"no count", sealed(0, 0, 0), ErrCorrupt},
		{"a command too few", sealed(0, 0, 0, 2, 5, 2, 0, 2, 'a', 'b'), ErrCorrupt},
		{"a command too many", sealed(0, 0, 0, 1, 4, 2, 0, 1, 'a', 4, 2, 0, 1, 'a'), ErrCorrupt},
		{"trailing byte", sealed(0, 0, 0, 1, 4, 2, 0, 1, 'a', 0), ErrCorrupt},
		{"trailing byte in a command", sealed(0, 0, 0, 1, 5, 2, 0, 1, 'a', 0), ErrCorrupt},
		{"count beyond belief", sealed(0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x7f), ErrCorrupt},
		{"number of 65 bits", sealed(0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0), ErrCorrupt},
		{"number in a longer form", sealed(0x81, 0, 0, 1, 0), ErrCorrupt},
		{"unfinished number", sealed(0, 0, 0, 0x80), ErrCorrupt},
		{"node without seq", sealed(1, 1, 0, 0), ErrCorrupt},
		{"command longer than the rest", sealed(0, 0, 0, 1, 9, 2, 0, 1, 'a'), ErrCorrupt},
		{"empty command", sealed(0, 0, 0, 1, 0, 2, 0, 1, 'a'), ErrCorrupt},
		{"op 0", sealed(0, 0, 0, 1, 4, 0, 0, 1, 'a'), ErrUnknownVersion},
		{"op 3", sealed(0, 0, 0, 1, 4, 3, 0, 1, 'a'), ErrUnknownVersion},
		{"unknown field", sealed(0, 0, 0, 1, 4, 2, 1, 1, 'a'), ErrUnknownVersion},
		{"empty key", sealed(0, 0, 0, 1, 4, 1, 0, 0, 0), ErrCorrupt},
		{"key longer than the command", sealed(0, 0, 0, 1, 4, 2, 0, 2, 'a'), ErrCorrupt},
		{"key too long", encode(Batch{Commands: []Command{del(long)}}), ErrCorrupt},
		{"put without a value", sealed(0, 0, 0, 1, 4, 1, 0, 1, 'a'), ErrCorrupt},
		{"delete with a value", sealed(0, 0, 0, 1, 6, 2, 0, 1, 'a', 1, 'v'), ErrCorrupt},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := goldenBatch()
			if err := DecodeBatch(tt.data, &b); !errors.Is(err, tt.want) {
				t.Errorf("got %v", err)
			} else {
				t.Log(err)
			}
			if len(b.Commands) != 0 {
				t.Error("commands are left after an error")
			}
		})
	}
}

// allocated returns the bytes that f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func FuzzDecodeBatch(f *testing.F) {
	f.Add(encode(goldenBatch()))
	f.Add(encode(Batch{Node: 1, Boot: 1, Seq: 1}))
	f.Add(sealed(0, 0, 0, 2, 4, 2, 0, 1, 'a', 6, 1, 0, 1, 'a', 1, 'v'))
	f.Add(sealed(0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x7f))
	f.Fuzz(func(t *testing.T, data []byte) {
		decodeEither(t, data)
		if len(data) >= batchHeadSize {
			decodeEither(t, sealed(data[batchHeadSize:]...)) // past the checksum
		}
	})
}

// decodeEither checks that data is refused, or is the encoding of what it decodes to.
func decodeEither(t *testing.T, data []byte) {
	var b Batch
	var err error
	// A Command in memory is some ten times as large as the shortest in a log.
	if n := allocated(func() { err = DecodeBatch(data, &b) }); n > uint64(20*len(data))+64<<10 {
		t.Errorf("%d bytes allocated for %d", n, len(data))
	}
	if err != nil {
		if !refused(err) {
			t.Errorf("error without a kind: %v", err)
		}
		return
	}
	if again := encode(b); !bytes.Equal(again, data) {
		t.Errorf("two encodings\n%x\n%x", data, again)
	}
	s := NewState()
	s.Apply(1, &b, nil)
	check(t, s)
}
