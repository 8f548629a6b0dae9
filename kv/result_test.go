package kv

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// goldenResults has every part of a kept outcome, each there and not there.
func goldenResults() []Result {
	entry := Entry{Key: "\x00\xff", CreateRevision: 300, ModRevision: 1<<63 - 1, Version: 2, Lease: 7, Expires: 1_790_000_000_123}
	plain := Entry{Key: "k", CreateRevision: 1, ModRevision: 1, Version: 1}
	read, empty := entry, plain
	read.Value, empty.Value = []byte("value"), []byte{}
	return []Result{
		{},
		{Revision: 1<<63 - 1, Entry: entry, Existed: true},
		{Revision: 1, Entry: plain},
		{Revision: 5, Refused: RefusedCondition, Entry: plain, Existed: true},
		{Revision: 5, Refused: RefusedOnceIsFull},
		{Revision: 6, Deleted: 300},
		{Revision: 6, Lease: &Lease{ID: 1, TTL: time.Millisecond}},
		{Revision: 6, Lease: &Lease{ID: 300, TTL: MaxTTL, Deadline: 1 << 40, Expires: 1 << 41, Keys: 200}},
		{Revision: 7, Txn: &TxnResult{}},
		{Revision: 7, Txn: &TxnResult{Succeeded: true, Put: 1, Deleted: 300, Skipped: 3}},
		{Revision: 8, Txn: &TxnResult{Skipped: 1, Ops: []OpResult{}}},
		{Revision: 9, Txn: &TxnResult{Succeeded: true, Put: 1, Ops: []OpResult{
			{Op: OpPut, Entry: entry, Existed: true},
			{Op: OpPut, Entry: plain},
			{Op: OpPut, Existed: true, Skipped: true},
			{Op: OpDeleteRange},
			{Op: OpDeleteRange, Deleted: 300},
			{Op: OpGet},
			{Op: OpGet, Items: []Entry{read, empty, plain}, Count: 300},
		}}},
	}
}

func TestResultRoundTrip(t *testing.T) {
	for i, want := range goldenResults() {
		b := appendResult(nil, &want)
		got, err := decodeResult(b)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%d: %v\n got %+v\nwant %+v", i, err, got, want)
		}
	}
}

// What belongs to the answer is not kept, nor are values but those read.
func TestResultLeavesOut(t *testing.T) {
	want := Result{Revision: 3, Entry: Entry{Key: "k", CreateRevision: 1, ModRevision: 3, Version: 2}, Txn: &TxnResult{
		Ops: []OpResult{{Op: OpPut, Entry: Entry{Key: "k", CreateRevision: 1, ModRevision: 3, Version: 2}}},
	}}
	r := want
	r.Duplicate, r.Replayed, r.Window = true, true, time.Minute
	r.Entry.Value = []byte("value")
	r.Txn = &TxnResult{Ops: []OpResult{want.Txn.Ops[0]}}
	r.Txn.Ops[0].Entry.Value = []byte("value")
	b := appendResult([]byte("front"), &r)
	if !bytes.HasPrefix(b, []byte("front")) {
		t.Fatalf("got %q", b)
	}
	got, err := decodeResult(b[5:])
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v\n got %+v\nwant %+v", err, got, want)
	}
}

// Keys and values are not copied: a replay of a large read is cheap.
func TestResultAliases(t *testing.T) {
	value := bytes.Repeat([]byte("v"), 100_000)
	r := Result{Txn: &TxnResult{Ops: []OpResult{{Op: OpGet, Count: 1, Items: []Entry{
		{Key: strings.Repeat("k", 1000), Value: value, CreateRevision: 1, ModRevision: 1, Version: 1},
	}}}}}
	b := appendResult(nil, &r)
	if n := allocated(func() { decodeResult(b) }); n > uint64(len(value)/2) {
		t.Errorf("%d bytes allocated for %d", n, len(b))
	}
}

func TestDecodeResultRefuses(t *testing.T) {
	below := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1} // -1
	join := func(parts ...[]byte) (b []byte) {
		for _, p := range parts {
			b = append(b, p...)
		}
		return b
	}
	entry := []byte{0, 1, 'k', 1, 1, 1}
	tests := []struct {
		name string
		data []byte
		want error
	}{
		{"nothing", nil, ErrCorrupt},
		{"no revision", []byte{0, 0}, ErrCorrupt},
		{"more", []byte{0, 0, 0, 0}, ErrCorrupt},
		{"unknown part", []byte{0x20, 0, 0}, ErrUnknownVersion},
		{"unknown refusal", []byte{0, 7, 0}, ErrUnknownVersion},
		{"revision below 0", join([]byte{0, 0}, below), ErrCorrupt},
		{"deleted 0", []byte{4, 0, 0, 0}, ErrCorrupt},
		{"deleted below 0", join([]byte{4, 0, 0}, below), ErrCorrupt},
		{"entry with a value", []byte{2, 0, 0, 4, 1, 'k', 1, 1, 1, 0}, ErrUnknownVersion},
		{"entry with unknown fields", []byte{2, 0, 0, 8, 1, 'k', 1, 1, 1, 0}, ErrUnknownVersion},
		{"entry of revision 0", []byte{2, 0, 0, 0, 1, 'k', 0, 0, 1}, ErrCorrupt},
		{"entry cut short", []byte{2, 0, 0, 0, 1, 'k', 1, 1}, ErrCorrupt},
		{"entry with lease 0", []byte{2, 0, 0, 1, 1, 'k', 1, 1, 1, 0}, ErrCorrupt},
		{"entry with label 0", []byte{2, 0, 0, 2, 1, 'k', 1, 1, 1, 0}, ErrCorrupt},
		{"lease without a TTL", []byte{8, 0, 0, 1, 0, 0, 0, 0}, ErrCorrupt},
		{"lease cut short", []byte{8, 0, 0, 1, 1, 0, 0}, ErrCorrupt},
		{"lease with keys below 0", join([]byte{8, 0, 0, 1, 1, 0, 0}, below), ErrCorrupt},
		{"transaction with an unknown part", []byte{16, 0, 0, 0x20}, ErrUnknownVersion},
		{"transaction that put 0", []byte{16, 0, 0, 4, 0}, ErrCorrupt},
		{"transaction that deleted 0", []byte{16, 0, 0, 8, 0}, ErrCorrupt},
		{"transaction that skipped 0", []byte{16, 0, 0, 16, 0}, ErrCorrupt},
		{"outcomes beyond belief", []byte{16, 0, 0, 2, 0xff, 0x7f, 1, 0}, ErrCorrupt},
		{"outcome of a delete", []byte{16, 0, 0, 2, 1, 2, 0}, ErrUnknownVersion},
		{"outcome with an unknown part", []byte{16, 0, 0, 2, 1, 1, 0x40}, ErrUnknownVersion},
		{"outcome that deleted 0", []byte{16, 0, 0, 2, 1, 3, 8, 0}, ErrCorrupt},
		{"outcome of no items", []byte{16, 0, 0, 2, 1, 9, 16, 0}, ErrCorrupt},
		{"outcome that counts 0", []byte{16, 0, 0, 2, 1, 9, 32, 0}, ErrCorrupt},
		{"items beyond belief", join([]byte{16, 0, 0, 2, 1, 9, 16, 2}, entry), ErrCorrupt},
		{"item whose value is cut short", []byte{16, 0, 0, 2, 1, 9, 16, 1, 4, 1, 'k', 1, 1, 1, 2, 'v'}, ErrCorrupt},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := decodeResult(tt.data)
			if !errors.Is(err, tt.want) || !reflect.DeepEqual(got, Result{}) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
	if _, err := decodeResult(join([]byte{16, 0, 0, 2, 1, 9, 16, 1}, entry)); err != nil {
		t.Errorf("the outcome that the last ones differ from: %v", err)
	}
}

// A kept outcome has no checksum of its own; but whatever is accepted is the one
// encoding of what it decodes to, and none is the front of another.
func TestResultEveryFlipAndCut(t *testing.T) {
	for i, r := range goldenResults() {
		b := appendResult(nil, &r)
		for j := range b {
			if _, err := decodeResult(b[:j]); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%d, cut to %d bytes: %v", i, j, err)
			}
			for bit := range 8 {
				b[j] ^= 1 << bit
				resultEither(t, b)
				b[j] ^= 1 << bit
			}
		}
		if _, err := decodeResult(append(b, 0)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%d, a byte too many: %v", i, err)
		}
	}
}

func resultEither(t *testing.T, b []byte) {
	t.Helper()
	var r Result
	var err error
	// An OpResult in memory is some 80 times as large as the shortest encoding.
	if n := allocated(func() { r, err = decodeResult(b) }); n > uint64(120*len(b))+64<<10 {
		t.Errorf("%d bytes allocated for %d", n, len(b))
	}
	if err != nil {
		if !refused(err) {
			t.Errorf("error without a kind: %v", err)
		}
		return
	}
	if again := appendResult(nil, &r); !bytes.Equal(again, b) {
		t.Errorf("two encodings\n%x\n%x", b, again)
	}
}

func FuzzDecodeResult(f *testing.F) {
	for _, r := range goldenResults() {
		f.Add(appendResult(nil, &r))
	}
	f.Add([]byte{16, 0, 0, 2, 0xff, 0x7f, 1, 0})
	f.Fuzz(resultEither)
}

// Outcomes as they come: of random commands over a few keys.
func TestAppliedResultsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := NewState()
		for i := range rapid.IntRange(1, 30).Draw(t, "commands") {
			c := drawAnyCommand(t)
			for _, r := range s.Apply(uint64(i+1), &Batch{Commands: []Command{c}}, nil) {
				got, err := decodeResult(appendResult(nil, &r))
				r.Window, r.Replayed, r.Entry.Value = 0, false, nil
				if r.Txn != nil {
					txn := *r.Txn
					r.Txn = &txn
					for i := range txn.Ops {
						txn.Ops[i].Entry.Value = nil
					}
				}
				if err != nil || !reflect.DeepEqual(got, r) {
					t.Fatalf("%+v: %v\n got %+v\nwant %+v", c, err, got, r)
				}
			}
		}
	})
}
