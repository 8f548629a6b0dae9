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
	"time"

	"pgregory.net/rapid"
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

// goldenBatch has plain puts and deletes, the odd keys and values, and numbers
// of several bytes.
func goldenBatch() Batch {
	return Batch{Node: 0x8e9e05148064967c, Boot: 3, Seq: 300, Commands: []Command{
		{Op: OpPut, Key: "sky", Value: []byte("blue")},
		{Op: OpPut, Key: "\x00/\xff\xfe", Value: []byte("\x00/\xff\xfe")},
		{Op: OpDelete, Key: "sky"},
		{Op: OpPut, Key: "empty", Value: []byte{}},
		{Op: OpPut, Key: strings.Repeat("k", 200), Value: bytes.Repeat([]byte("v"), 130)},
	}}
}

// goldenOps has every op and every field, each field present and absent.
func goldenOps() Batch {
	once := func(key string, b byte) *Once {
		o := &Once{Key: key}
		for i := range o.Fingerprint {
			o.Fingerprint[i] = b + byte(i)
		}
		return o
	}
	const wall = 1_790_000_000_123
	return Batch{Node: 1, Boot: 1, Seq: 1, Commands: []Command{
		{Op: OpPut, Key: "a", Value: []byte("1"), TTL: 90 * time.Second, Wall: wall},
		{Op: OpPut, Key: "a", Value: []byte("2"), If: Precondition{Kind: CheckExists}},
		{Op: OpPut, Key: "b", Value: []byte{}, Lease: 300, Wall: wall, If: Precondition{Kind: CheckAbsent}, Once: once("request 1", 0xf8)},
		{Op: OpPut, Key: "b", Value: []byte("3"), If: Precondition{Kind: CheckAnyOf, Revisions: []int64{17, 0, 1<<63 - 1}}},
		{Op: OpDelete, Key: "a", If: Precondition{Kind: CheckNoneOf, Revisions: []int64{18}}, Once: once("\x00\xff", 0)},
		{Op: OpDelete, Key: "a", Once: once(strings.Repeat("o", MaxOnceKey), 1)},
		{Op: OpDeleteRange},
		{Op: OpDeleteRange, Span: Prefix("b/"), Once: once("range", 2)},
		{Op: OpTxn, Txn: &Txn{}},
		{Op: OpTxn, Wall: wall, Once: once("txn", 3), Txn: &Txn{
			If: []Compare{
				{Key: "a", Target: TargetModRevision, Op: Equal, Number: 300},
				{Key: "a", Target: TargetCreateRevision, Op: NotEqual},
				{Key: "a", Target: TargetVersion, Op: Less, Number: -1},
				{Key: "a", Target: TargetValue, Op: Greater, Value: []byte("v")},
				{Key: "a", Target: TargetExists, Op: Equal, Number: 1},
			},
			Then: []TxnOp{
				{Op: OpGet, Span: SingleKey("a"), Limit: 1},
				{Op: OpDeleteRange, Span: Span{"a", "c"}},
				{Op: OpPut, Key: "a", Value: []byte("1"), TTL: time.Millisecond},
				{Op: OpPut, Key: "b", Value: []byte("2"), Lease: 7, CreateOnly: true},
				{Op: OpPut, Key: "c", Value: []byte{}},
				{Op: OpGet, KeysOnly: true},
			},
			Else: []TxnOp{{Op: OpGet, Span: Prefix("\xff"), Limit: 1000, KeysOnly: true}},
		}},
		{Op: OpTxn, Txn: &Txn{Each: true, Brief: true, Then: []TxnOp{
			{Op: OpPut, Key: "a", Value: []byte("1")}, {Op: OpPut, Key: "a", Value: []byte("2"), CreateOnly: true},
		}}},
		{Op: OpTxn, Txn: &Txn{Brief: true, Else: []TxnOp{{Op: OpDeleteRange}}}},
		{Op: OpGrant, TTL: time.Millisecond},
		{Op: OpGrant, TTL: MaxTTL, Wall: wall, Once: once("grant", 4)},
		{Op: OpKeepAlive, Lease: 1},
		{Op: OpKeepAlive, Lease: 1<<63 - 1, TTL: time.Minute, Wall: wall, Once: once("keep", 5)},
		{Op: OpRevoke, Lease: 300, Wall: wall, Once: once("revoke", 6)},
		{Op: OpRevoke, Lease: 1},
		{Op: OpTick},
		{Op: OpTick, Tick: Tick{Clock: 300, Wall: wall, Seen: 1<<64 - 1, Term: 1<<64 - 1}},
	}}
}

func ptr(c Command) *Command { return &c }

func encode(b Batch) []byte {
	var commands [][]byte
	for _, c := range b.Commands {
		commands = append(commands, AppendCommand(nil, &c))
	}
	return AppendBatch(nil, b.Node, b.Boot, b.Seq, commands...)
}

func TestGoldenBatch(t *testing.T) {
	for name, want := range map[string]Batch{"batch-v1.hex": goldenBatch(), "batch-v1-ops.hex": goldenOps()} {
		data := golden(t, name, encode(want))
		var got Batch
		if err := DecodeBatch(data, &got); err != nil {
			t.Fatal(name, err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v\nwant %+v", name, got, want)
		}
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
		"golden":      goldenBatch(),
		"golden, ops": goldenOps(),
		"large ops": {Commands: []Command{
			{Op: OpDeleteRange, Span: Span{strings.Repeat("s", MaxKeySize+1), strings.Repeat("t", MaxKeySize+1)}},
			{Op: OpTxn, Txn: &Txn{Each: true, Then: slices.Repeat([]TxnOp{{Op: OpPut, Key: "k", Value: []byte("v")}}, 50_000)}},
			{Op: OpPut, Key: "k", Value: []byte{}, If: Precondition{Kind: CheckNoneOf, Revisions: make([]int64, MaxRevisions)}},
		}},
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
				if n := len(AppendCommand(nil, &c)); n != CommandSize(&c) {
					t.Errorf("command %d: CommandSize %d, encoded %d", i, CommandSize(&c), n)
				}
			}
		})
	}
}

func TestAppendBatchAppends(t *testing.T) {
	one := AppendBatch([]byte("front"), 1, 2, 3, AppendCommand(nil, ptr(put("a", "1"))))
	if string(one[:5]) != "front" || !bytes.Equal(one[5:], AppendBatch(nil, 1, 2, 3, AppendCommand(nil, ptr(put("a", "1"))))) {
		t.Errorf("got %x", one)
	}
}

func TestDecodeBatchReuses(t *testing.T) {
	var b Batch
	if err := DecodeBatch(encode(goldenOps()), &b); err != nil {
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
		if !reflect.DeepEqual(c, Command{}) {
			t.Errorf("place %d keeps the previous entry alive", i+1)
		}
	}
	// A caller may have cut the batch down.
	if err := DecodeBatch(encode(goldenOps()), &b); err != nil {
		t.Fatal(err)
	}
	b.Commands = b.Commands[:0]
	if err := DecodeBatch(encode(goldenBatch()), &b); err != nil || !reflect.DeepEqual(b, goldenBatch()) {
		t.Errorf("got %+v, %v", b, err)
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
	everyFlipAndCut(t, encode(goldenBatch()))
	everyFlipAndCut(t, encode(goldenOps()))
}

func everyFlipAndCut(t *testing.T, data []byte) {
	t.Helper()
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

// refusedBodies are commands from their op on that are refused, all of them less
// than 128 bytes. Those that begin with "unknown" may be of a newer version.
var refusedBodies = map[string][]byte{
	"unknown: TTL of a delete":      {2, 1, 1, 'a', 1},
	"unknown: lease of a grant":     {5, 3, 1, 1},
	"unknown: TTL of a revocation":  {7, 3, 1, 1},
	"unknown: condition of a range": {3, 4, 0, 0, 1},
	"unknown: field of a tick":      {8, 8, 0, 0, 0, 0, 1},
	"unknown: once of a tick":       append([]byte{8, 16, 0, 0, 0, 0, 1, 'o'}, make([]byte, 16)...),
	"TTL of 0":                      {1, 1, 1, 'a', 0, 0},
	"TTL beyond the limit":          {1, 1, 1, 'a', 0, 0x81, 0xf0, 0xb0, 0xeb, 0x75},
	// In nanoseconds of 64 bits it would be one second.
	"TTL that wraps round":             {1, 1, 1, 'a', 0, 0xe8, 0x87, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 4},
	"TTL missing":                      {1, 1, 1, 'a', 0},
	"lease 0":                          {1, 2, 1, 'a', 0, 0},
	"lease below 0":                    {1, 2, 1, 'a', 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1},
	"TTL and lease":                    {1, 3, 1, 'a', 0, 1, 1},
	"wall of 0":                        {1, 8, 1, 'a', 0, 0},
	"wall below 0":                     {1, 8, 1, 'a', 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1},
	"unknown: condition 0":             {2, 4, 1, 'a', 0},
	"unknown: condition 5":             {2, 4, 1, 'a', 5},
	"condition missing":                {2, 4, 1, 'a'},
	"condition on nothing":             {2, 4, 1, 'a', 3, 0},
	"condition on 17 revisions":        append([]byte{2, 4, 1, 'a', 3, 17}, make([]byte, 17)...),
	"condition beyond belief":          {2, 4, 1, 'a', 3, 0xff, 0x7f, 1},
	"condition on a revision below 0":  {2, 4, 1, 'a', 4, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1},
	"once without a key":               append([]byte{2, 16, 1, 'a', 0}, make([]byte, 16)...),
	"once with half a fingerprint":     append([]byte{2, 16, 1, 'a', 1, 'o'}, make([]byte, 15)...),
	"once with too long a fingerprint": append([]byte{2, 16, 1, 'a', 1, 'o'}, make([]byte, 17)...),
	"range without an end":             {3, 0, 1, 'a'},
	"range and more":                   {3, 0, 0, 0, 0},
	"grant without a TTL":              {5, 0},
	"keep-alive without a lease":       {6, 1, 1},
	"revocation without a lease":       {7, 0},
	"tick without a term":              {8, 0, 0, 0, 0},
	"tick with a clock below 0":        {8, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0},
	"tick with a wall below 0":         {8, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0},
	"transaction of nothing":           {4, 0},
	"unknown: flag of a transaction":   {4, 0, 4, 0, 0, 0},
	"transaction without Else":         {4, 0, 0, 0, 0},
	"comparisons beyond belief":        {4, 0, 0, 0x7f, 1, 1, 1, 'a', 0, 0, 0},
	"unknown: target 0":                {4, 0, 0, 1, 0, 1, 1, 'a', 0, 0, 0},
	"unknown: target 6":                {4, 0, 0, 1, 6, 1, 1, 'a', 0, 0, 0},
	"unknown: operator 0":              {4, 0, 0, 1, 1, 0, 1, 'a', 0, 0, 0},
	"unknown: operator 5":              {4, 0, 0, 1, 1, 5, 1, 'a', 0, 0, 0},
	"comparison without a key":         {4, 0, 0, 1, 1, 1, 0, 0, 0, 0},
	"existence, less":                  {4, 0, 0, 1, 5, 3, 1, 'a', 0, 0, 0},
	"existence of 2":                   {4, 0, 0, 1, 5, 1, 1, 'a', 2, 0, 0},
	"operations beyond belief":         {4, 0, 0, 0, 0x7f, 3, 0, 0, 0, 0},
	"unknown: delete in a transaction": {4, 0, 0, 0, 1, 2, 0, 1, 'a', 0},
	"unknown: field of a get":          {4, 0, 0, 0, 1, 9, 1, 0, 0, 1, 0},
	"unknown: field of a put within":   {4, 0, 0, 0, 1, 1, 8, 1, 'a', 0, 1, 0},
	"unknown: field of a range within": {4, 0, 0, 0, 1, 3, 16, 0, 0, 0},
	"put without a key, within":        {4, 0, 0, 0, 1, 1, 0, 0, 0, 0},
	"lease 0 within":                   {4, 0, 0, 0, 1, 1, 2, 1, 'a', 0, 0, 0},
	"limit of 0":                       {4, 0, 0, 0, 1, 9, 8, 0, 0, 0, 0},
	"limit below 0":                    {4, 0, 0, 0, 1, 9, 8, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0},
	"key put twice":                    {4, 0, 0, 0, 2, 1, 0, 1, 'a', 0, 1, 0, 1, 'a', 0, 0},
	"comparison of each":               {4, 0, 1, 1, 1, 1, 1, 'a', 0, 0, 0},
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
		{"op 9, which is for transactions", sealed(0, 0, 0, 1, 4, 9, 0, 0, 0), ErrUnknownVersion},
		{"op 10", sealed(0, 0, 0, 1, 4, 10, 0, 1, 'a'), ErrUnknownVersion},
		{"unknown field", sealed(0, 0, 0, 1, 4, 2, 0x20, 1, 'a'), ErrUnknownVersion},
		{"unknown field of two bytes", sealed(0, 0, 0, 1, 7, 1, 0x80, 0x10, 1, 'a', 1, 'v'), ErrUnknownVersion},
		{"empty key", sealed(0, 0, 0, 1, 4, 1, 0, 0, 0), ErrCorrupt},
		{"key longer than the command", sealed(0, 0, 0, 1, 4, 2, 0, 2, 'a'), ErrCorrupt},
		{"key too long", encode(Batch{Commands: []Command{del(long)}}), ErrCorrupt},
		{"put without a value", sealed(0, 0, 0, 1, 4, 1, 0, 1, 'a'), ErrCorrupt},
		{"delete with a value", sealed(0, 0, 0, 1, 6, 2, 0, 1, 'a', 1, 'v'), ErrCorrupt},
	}
	for name, body := range refusedBodies {
		want := ErrCorrupt
		if strings.HasPrefix(name, "unknown: ") {
			want = ErrUnknownVersion
		}
		content := append([]byte{0, 0, 0, 1, byte(len(body))}, body...)
		tests = append(tests, struct {
			name string
			data []byte
			want error
		}{name, sealed(content...), want})
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
	f.Add(encode(goldenOps()))
	for _, c := range goldenOps().Commands {
		f.Add(encode(Batch{Commands: []Command{c}}))
	}
	for _, body := range refusedBodies {
		f.Add(sealed(append([]byte{0, 0, 0, 1, byte(len(body))}, body...)...))
	}
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
	// A Command in memory is 46 times as large as the shortest in a log, and the
	// lists of a transaction may be believed once more each.
	if n := allocated(func() { err = DecodeBatch(data, &b) }); n > uint64(120*len(data))+64<<10 {
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

// drawAnyCommand draws a valid command of any op, over few keys and leases.
func drawAnyCommand(t *rapid.T) Command {
	c := Command{Op: Op(rapid.IntRange(1, 8).Draw(t, "op"))}
	if c.Op == OpTick {
		c.Tick = Tick{
			Clock: rapid.Int64Range(0, 1<<20).Draw(t, "clock"), Wall: rapid.Int64Range(0, 1<<41).Draw(t, "wall"),
			Seen: rapid.Uint64Range(0, 200).Draw(t, "seen"), Term: rapid.Uint64().Draw(t, "term"),
		}
		return c
	}
	if rapid.IntRange(0, 3).Draw(t, "once") == 0 {
		c.Once = &Once{Key: rapid.StringMatching("[a-m]").Draw(t, "once key")}
		c.Once.Fingerprint[rapid.IntRange(0, 15).Draw(t, "at")] = rapid.SampledFrom([]byte{0, 0, 0, 1}).Draw(t, "fingerprint")
	}
	switch c.Op {
	case OpPut:
		o := drawTxnPut(t)
		c.Key, c.Value, c.TTL, c.Lease, c.If = o.Key, o.Value, o.TTL, o.Lease, drawPrecondition(t)
	case OpDelete:
		c.Key, c.If = drawKey(t), drawPrecondition(t)
	case OpDeleteRange:
		c.Span = drawSpan(t)
	case OpTxn:
		c.Txn = drawTxn(t)
	case OpGrant:
		c.TTL = drawTTL(t)
	case OpKeepAlive:
		c.Lease = rapid.Int64Range(1, 5).Draw(t, "lease")
		if rapid.Bool().Draw(t, "another TTL") {
			c.TTL = drawTTL(t)
		}
	case OpRevoke:
		c.Lease = rapid.Int64Range(1, 5).Draw(t, "lease")
	}
	if c.Op != OpDelete && c.Op != OpDeleteRange {
		c.Wall = rapid.Int64Range(0, 1<<41).Draw(t, "wall")
	}
	return c
}

func drawTTL(t *rapid.T) time.Duration {
	return time.Duration(rapid.Int64Range(1, 1<<18).Draw(t, "TTL")) * time.Millisecond
}

func drawSpan(t *rapid.T) Span {
	switch rapid.IntRange(0, 3).Draw(t, "span") {
	case 0:
		return SingleKey(drawKey(t))
	case 1:
		return Prefix(rapid.SampledFrom([]string{"k", "k1", "a", "/\xff"}).Draw(t, "prefix"))
	case 2:
		return Span{}
	}
	return Span{drawKey(t), drawKey(t)}
}

func drawPrecondition(t *rapid.T) Precondition {
	p := Precondition{Kind: Check(rapid.SampledFrom([]int{0, 0, 0, 1, 2, 3, 4}).Draw(t, "kind"))}
	if p.hasRevisions() {
		p.Revisions = rapid.SliceOfN(rapid.Int64Range(0, 300), 1, MaxRevisions).Draw(t, "revisions")
	}
	return p
}

func drawTxnPut(t *rapid.T) TxnOp {
	o := TxnOp{Op: OpPut, Key: drawKey(t), Value: rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "value")}
	switch rapid.IntRange(0, 4).Draw(t, "lease or TTL") {
	case 0:
		o.TTL = drawTTL(t)
	case 1:
		o.Lease = rapid.Int64Range(1, 5).Draw(t, "lease")
	}
	return o
}

func drawTxn(t *rapid.T) *Txn {
	x := &Txn{Each: rapid.Bool().Draw(t, "each"), Brief: rapid.Bool().Draw(t, "brief")}
	if !x.Each {
		for range rapid.IntRange(0, 2).Draw(t, "comparisons") {
			c := Compare{Key: drawKey(t), Target: Target(rapid.IntRange(1, 5).Draw(t, "target")), Op: CompareOp(rapid.IntRange(1, 4).Draw(t, "operator"))}
			switch c.Target {
			case TargetValue:
				c.Value = rapid.SliceOfN(rapid.Byte(), 0, 3).Draw(t, "value")
			case TargetExists:
				c.Op, c.Number = CompareOp(1+c.Op%2), rapid.Int64Range(0, 1).Draw(t, "exists")
			default:
				c.Number = rapid.Int64Range(-1, 100).Draw(t, "number")
			}
			x.If = append(x.If, c)
		}
		x.Else = drawBranch(t, false)
	}
	x.Then = drawBranch(t, x.Each)
	return x
}

// drawBranch draws operations that are valid together.
func drawBranch(t *rapid.T, each bool) (branch []TxnOp) {
	for range rapid.IntRange(0, 6).Draw(t, "operations") {
		o := TxnOp{Op: rapid.SampledFrom([]Op{OpPut, OpPut, OpDeleteRange, OpGet}).Draw(t, "op")}
		switch o.Op {
		case OpPut:
			o = drawTxnPut(t)
			o.CreateOnly = rapid.Bool().Draw(t, "create only")
		case OpDeleteRange:
			o.Span = drawSpan(t)
		case OpGet:
			o.Span, o.Limit, o.KeysOnly = drawSpan(t), rapid.IntRange(0, 3).Draw(t, "limit"), rapid.Bool().Draw(t, "keys only")
		}
		x := Txn{Each: each, Then: append(slices.Clone(branch), o)}
		if x.validate() == nil {
			branch = x.Then
		}
	}
	return branch
}

func TestAnyBatchRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := Batch{Node: rapid.Uint64().Draw(t, "node"), Boot: rapid.Uint64().Draw(t, "boot"), Seq: rapid.Uint64Range(1, 1<<64-1).Draw(t, "seq")}
		for range rapid.IntRange(0, 8).Draw(t, "commands") {
			want.Commands = append(want.Commands, drawAnyCommand(t))
		}
		var got Batch
		data := encode(want)
		if err := DecodeBatch(data, &got); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v\nwant %+v", got, want)
		}
		for _, c := range want.Commands {
			if n := len(AppendCommand(nil, &c)); n != CommandSize(&c) {
				t.Errorf("%+v: CommandSize %d, encoded %d", c, CommandSize(&c), n)
			}
		}
	})
}

// What does not count for an op is not in the log.
func TestAppendCommandLeavesOut(t *testing.T) {
	full := Command{
		Key: "k", Value: []byte("v"), If: Precondition{Kind: CheckExists}, TTL: time.Second, Lease: 7, Wall: 8,
		Span: Prefix("p"), Txn: &Txn{Then: []TxnOp{{
			Op: OpDeleteRange, Key: "k", Value: []byte("v"), TTL: time.Second, Lease: 7, CreateOnly: true, Limit: 3, KeysOnly: true,
		}}}, Tick: Tick{1, 2, 3, 4},
	}
	for op, want := range map[Op]Command{
		OpDelete:      {Op: OpDelete, Key: "k", If: full.If},
		OpDeleteRange: {Op: OpDeleteRange, Span: full.Span},
		OpTxn:         {Op: OpTxn, Wall: 8, Txn: &Txn{Then: []TxnOp{{Op: OpDeleteRange}}}},
		OpGrant:       {Op: OpGrant, TTL: full.TTL, Wall: 8},
		OpKeepAlive:   {Op: OpKeepAlive, TTL: full.TTL, Lease: 7, Wall: 8},
		OpRevoke:      {Op: OpRevoke, Lease: 7, Wall: 8},
		OpTick:        {Op: OpTick, Tick: full.Tick},
	} {
		full.Op = op
		var got Batch
		if err := DecodeBatch(encode(Batch{Commands: []Command{full}}), &got); err != nil {
			t.Errorf("op %d: %v", op, err)
		} else if !reflect.DeepEqual(got.Commands[0], want) {
			t.Errorf("op %d: got %+v\nwant %+v", op, got.Commands[0], want)
		}
	}
}
