package kv

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func opPut(key, value string) TxnOp { return TxnOp{Op: OpPut, Key: key, Value: []byte(value)} }

func opDel(span Span) TxnOp { return TxnOp{Op: OpDeleteRange, Span: span} }

func opGet(span Span) TxnOp { return TxnOp{Op: OpGet, Span: span} }

func then(ops ...TxnOp) Command { return Command{Op: OpTxn, Txn: &Txn{Then: ops}} }

// events shows what history has from a revision on: one event a line.
func events(s *State, from int64) (lines []string) {
	s.History().Events(from, func(e Event) bool {
		what := fmt.Sprintf("put %s=%s v%d c%d", e.Entry.Key, e.Entry.Value, e.Entry.Version, e.Entry.CreateRevision)
		if e.Deleted {
			what = "delete " + e.Entry.Key
		}
		if e.Prev.ModRevision != 0 {
			what += fmt.Sprintf(" was %s of %d", e.Prev.Value, e.Prev.ModRevision)
		}
		lines = append(lines, fmt.Sprintf("%d %s", e.Revision, what))
		return true
	})
	return lines
}

// Each starts from a=1 (revision 1), b=2 (revision 2), b/1=3 (revision 3).
func TestTxnRevisionsAndEvents(t *testing.T) {
	tests := []struct {
		name    string
		command Command
		want    []string
	}{
		{"one revision, ascending", then(opPut("z", "1"), opPut("a", "2"), opDel(SingleKey("b"))), []string{
			"4 put a=2 v2 c1 was 1 of 1", "4 delete b was 2 of 2", "4 put z=1 v1 c4",
		}},
		{"delete and put is one event", then(opDel(Span{}), opPut("b", "9")), []string{
			"4 delete a was 1 of 1", "4 put b=9 v1 c4 was 2 of 2", "4 delete b/1 was 3 of 3",
		}},
		{"no effect, no revision", then(opDel(Prefix("x")), opGet(Span{})), nil},
		{"nothing at all", then(), nil},
		{"a range", Command{Op: OpDeleteRange, Span: Prefix("b")}, []string{"4 delete b was 2 of 2", "4 delete b/1 was 3 of 3"}},
		{"an empty range", Command{Op: OpDeleteRange, Span: Span{"c", "b"}}, nil},
		{"everything", Command{Op: OpDeleteRange}, []string{"4 delete a was 1 of 1", "4 delete b was 2 of 2", "4 delete b/1 was 3 of 3"}},
		{"each its own revision", Command{Op: OpTxn, Txn: &Txn{Each: true, Then: []TxnOp{
			opPut("c", "1"), opPut("c", "2"), {Op: OpPut, Key: "a", CreateOnly: true}, opDel(Prefix("b")), opDel(Prefix("b")), opPut("b", "3"),
		}}}, []string{
			"4 put c=1 v1 c4", "5 put c=2 v2 c4 was 1 of 4", "6 delete b was 2 of 2", "6 delete b/1 was 3 of 3", "7 put b=3 v1 c7",
		}},
		{"create only", then(TxnOp{Op: OpPut, Key: "a", CreateOnly: true}, TxnOp{Op: OpPut, Key: "c", CreateOnly: true}), []string{"4 put c= v1 c4"}},
		{"create only sees the deletion", then(opDel(SingleKey("a")), TxnOp{Op: OpPut, Key: "a", CreateOnly: true}), []string{"4 put a= v1 c4 was 1 of 1"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := NewState()
			apply(t, s, put("a", "1"), put("b", "2"), put("b/1", "3"))
			r := apply(t, s, tt.command)[0]
			if got := events(s, 4); !slices.Equal(got, tt.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
			if r.Revision != s.Revision() {
				t.Errorf("result of revision %d, state %d", r.Revision, s.Revision())
			}
		})
	}
}

func TestTxnCompares(t *testing.T) {
	s := NewState()
	apply(t, s, put("a", "1"), put("b", "2"), put("b", "3"), put("e", ""))
	number := func(key string, target Target, op CompareOp, n int64) Compare {
		return Compare{Key: key, Target: target, Op: op, Number: n}
	}
	value := func(key string, op CompareOp, v string) Compare {
		return Compare{Key: key, Target: TargetValue, Op: op, Value: []byte(v)}
	}
	for _, tt := range []struct {
		c    Compare
		want bool
	}{
		{number("b", TargetModRevision, Equal, 3), true},
		{number("b", TargetModRevision, Equal, 2), false},
		{number("b", TargetModRevision, NotEqual, 3), false},
		{number("b", TargetModRevision, Less, 3), false},
		{number("b", TargetModRevision, Less, 4), true},
		{number("b", TargetModRevision, Greater, 3), false},
		{number("b", TargetModRevision, Greater, 2), true},
		{number("b", TargetCreateRevision, Equal, 2), true},
		{number("b", TargetVersion, Equal, 2), true},
		{number("none", TargetModRevision, Equal, 0), true},
		{number("none", TargetVersion, Less, 1), true},
		{number("none", TargetCreateRevision, Greater, -1), true},
		{number("a", TargetExists, Equal, 1), true},
		{number("a", TargetExists, Equal, 0), false},
		{number("a", TargetExists, NotEqual, 0), true},
		{number("none", TargetExists, Equal, 0), true},
		{number("none", TargetExists, NotEqual, 1), true},
		{value("b", Equal, "3"), true},
		{value("b", Less, "30"), true},
		{value("b", Greater, "3"), false},
		{value("b", Greater, ""), true},
		{value("b", NotEqual, "3"), false},
		{value("e", Equal, ""), true},
		{value("none", Equal, ""), false},
		{value("none", NotEqual, ""), true},
		{value("none", Less, "x"), false},
		{value("none", Greater, ""), false},
	} {
		r := apply(t, s, Command{Op: OpTxn, Txn: &Txn{If: []Compare{tt.c}, Then: []TxnOp{opGet(SingleKey("a"))}}})[0]
		if r.Txn.Succeeded != tt.want || len(r.Txn.Ops) == 0 == tt.want {
			t.Errorf("%+v: %+v", tt.c, r.Txn)
		}
	}
	r := apply(t, s, Command{Op: OpTxn, Txn: &Txn{
		If:   []Compare{number("a", TargetExists, Equal, 1), number("none", TargetExists, Equal, 1)},
		Then: []TxnOp{opDel(Span{})}, Else: []TxnOp{opPut("else", "")},
	}})[0]
	if r.Txn.Succeeded || r.Txn.Put != 1 || s.Len() != 4 {
		t.Errorf("all have to hold: %+v, %d keys", r.Txn, s.Len())
	}
}

func TestTxnResults(t *testing.T) {
	s := NewState()
	apply(t, s, put("a", "1"), put("b", "2"), put("c", "3"))
	r := apply(t, s, then(
		opPut("d", "4"),
		opDel(SingleKey("a")),
		TxnOp{Op: OpGet, Limit: 2},
		TxnOp{Op: OpGet, Span: Span{Start: "d"}, KeysOnly: true},
		TxnOp{Op: OpPut, Key: "b", CreateOnly: true},
	))[0].Txn
	b := Entry{Key: "b", Value: []byte("2"), CreateRevision: 2, ModRevision: 2, Version: 1}
	c := Entry{Key: "c", Value: []byte("3"), CreateRevision: 3, ModRevision: 3, Version: 1}
	d := Entry{Key: "d", Value: []byte("4"), CreateRevision: 4, ModRevision: 4, Version: 1}
	bare := d
	bare.Value = nil
	want := &TxnResult{Succeeded: true, Put: 1, Deleted: 1, Skipped: 1, Ops: []OpResult{
		{Op: OpPut, Entry: d},
		{Op: OpDeleteRange, Deleted: 1},
		{Op: OpGet, Items: []Entry{b, c}, Count: 3},
		{Op: OpGet, Items: []Entry{bare}, Count: 1},
		{Op: OpPut, Existed: true, Skipped: true},
	}}
	if !reflect.DeepEqual(r, want) {
		t.Errorf("\n got %+v\nwant %+v", r, want)
	}
	brief := apply(t, s, Command{Op: OpTxn, Txn: &Txn{Brief: true, Then: []TxnOp{opPut("x", ""), opPut("a", "")}}})[0].Txn
	if brief.Ops != nil || brief.Put != 2 {
		t.Errorf("brief: %+v", brief)
	}
}

func TestTxnRefusedForLease(t *testing.T) {
	s := NewState()
	apply(t, s, put("a", "1"))
	missing := TxnOp{Op: OpPut, Key: "z", Lease: 5}
	before := dump(s)
	for name, c := range map[string]Command{
		"then":        then(opPut("a", "2"), missing),
		"each":        {Op: OpTxn, Txn: &Txn{Each: true, Then: []TxnOp{opPut("a", "2"), missing}}},
		"else":        {Op: OpTxn, Txn: &Txn{If: []Compare{{Key: "a", Target: TargetVersion, Op: Equal}}, Else: []TxnOp{missing}}},
		"create only": then(TxnOp{Op: OpPut, Key: "a", Lease: 5, CreateOnly: true}),
	} {
		r := apply(t, s, c)[0]
		if r.Refused != RefusedNoLease || r.Revision != 1 || r.Txn != nil {
			t.Errorf("%s: %+v", name, r)
		}
	}
	s.SetApplied(1)
	if got := dump(s); got != before {
		t.Errorf("something changed:\n%s\n%s", got, before)
	}
	// The branch that is not run does not count.
	if r := apply(t, s, Command{Op: OpTxn, Txn: &Txn{Then: []TxnOp{opPut("a", "2")}, Else: []TxnOp{missing}}})[0]; r.Refused != NotRefused {
		t.Errorf("%+v", r)
	}
}

// A transaction takes the last key off a lease of its own and attaches another
// one: the lease lives on.
func TestTxnHandsALeaseOn(t *testing.T) {
	s := NewState()
	apply(t, s, Command{Op: OpPut, Key: "a", TTL: time.Second})
	apply(t, s, then(opPut("a", ""), TxnOp{Op: OpPut, Key: "b", Lease: 1}))
	if l, ok := s.Lease(1); !ok || l.Keys != 1 {
		t.Errorf("%+v, %v", l, ok)
	}
	apply(t, s, then(opDel(SingleKey("b")), opPut("c", "")))
	if s.Leases() != 0 {
		t.Errorf("%d leases", s.Leases())
	}
}

func TestTxnTooLarge(t *testing.T) {
	fill := func(n, size int) *State {
		s := NewState()
		b := Batch{}
		for i := range n {
			b.Commands = append(b.Commands, put(fmt.Sprintf("k%06d", i), strings.Repeat("v", size)))
		}
		s.Apply(1, &b, nil)
		return s
	}
	once := func(c Command) Command {
		c.Once = &Once{Key: "id"}
		return c
	}
	limit := func(n int, o TxnOp) TxnOp {
		o.Limit = n
		return o
	}
	keys := func(o TxnOp) TxnOp {
		o.KeysOnly = true
		return o
	}
	// 4 MiB are 4096 entries of 7+1017 bytes.
	many, large := fill(MaxTxnItems+5, 0), fill(4097, 1017)
	for _, tt := range []struct {
		name    string
		s       *State
		c       Command
		refused bool
	}{
		{"a get is cut at the number", many, then(opGet(Span{})), false},
		{"two gets together", many, then(opGet(Span{}), opGet(Span{"k000000", "k000001"})), true},
		{"two gets, just", many, then(opGet(Span{"k000001", "k010000"}), opGet(Span{"k000000", "k000001"})), false},
		{"a limit above the number", many, then(limit(MaxTxnItems+1, opGet(Span{}))), true},
		{"a put may come on top", many, then(opPut("x", ""), opGet(Span{"k000000", "k010000"}), opGet(Prefix("x"))), true},
		{"a put outside does not", many, then(opPut("x", ""), opGet(Span{"k000000", "k010000"})), false},
		{"a put after does not", many, then(opGet(Span{"k000000", "k010000"}), opPut("k", "")), false},
		{"a put outside does not, among several gets", many, then(opPut("x", ""), opGet(Span{"k000001", "k010000"}), opGet(Span{"k000000", "k000001"})), false},
		{"a put after does not, among several gets", many, then(opGet(Span{"k000001", "k010000"}), opGet(Span{"k000000", "k000001"}), opPut("k000000", "")), false},
		{"a delete before is no put", many, then(opDel(SingleKey("x")), opGet(Span{"k000001", "k010000"}), opGet(Span{"", "k000001"})), false},
		{"a new key, read back, counts once", many, then(opPut("x", ""), opGet(Span{"k000001", "k010000"}), opGet(Prefix("x"))), false},
		{"a put into a full get does not", many, then(opPut("k000000", ""), opGet(Span{})), false},
		{"bytes", large, then(opGet(Span{})), true},
		{"bytes, just", large, then(limit(4096, opGet(Span{}))), false},
		{"bytes of keys", large, then(keys(opGet(Span{}))), false},
		{"what is deleted before does not count", large, then(opDel(Span{"", "k000001"}), opGet(Span{})), false},
		{"what is behind comes instead", large, then(opDel(Prefix("k00000")), limit(4096, opGet(Span{})), opGet(Prefix("k0"))), true},
		{"what lies right behind the deleted counts", large, then(opDel(Span{"", "k000001"}), opGet(Span{}), opGet(SingleKey("k000001"))), true},
		{"a put counts with its bytes", large, then(opPut("a", ""), limit(4096, opGet(Span{}))), true},
		{"a new value, read back, counts with its bytes", large, then(opPut("x", strings.Repeat("v", 1024)), limit(4096, opGet(Span{"", "l"})), opGet(SingleKey("x"))), true},
		{"an empty value, read back, counts with its key", large, then(opPut("x", ""), limit(4096, opGet(Span{"", "l"})), opGet(SingleKey("x"))), true},
		{"a new value, read back, just", large, then(opPut("x", strings.Repeat("v", 1023)), limit(4095, opGet(Span{"", "l"})), opGet(SingleKey("x"))), false},
		{"a kept result has less room", large, once(then(limit(257, opGet(Span{})))), true},
		{"a kept result, just", large, once(then(limit(256, opGet(Span{})))), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := tt.s.Clone()
			r := s.Apply(2, &Batch{Commands: []Command{tt.c}}, nil)[0]
			if (r.Refused == RefusedTooLarge) != tt.refused || tt.refused && s.Revision() != tt.s.Revision() {
				t.Errorf("%+v", r.Refused)
			}
			check(t, s)
			if tt.refused {
				return
			}
			items, size := 0, 0
			for _, o := range r.Txn.Ops {
				items += len(o.Items)
				for _, e := range o.Items {
					size += len(e.Key) + len(e.Value)
				}
			}
			if items > MaxTxnItems || size > MaxTxnReadBytes {
				t.Errorf("%d items of %d bytes", items, size)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	long, ttl := strings.Repeat("k", MaxKeySize+1), 5*time.Second
	compare := func(c Compare) Command { return Command{Op: OpTxn, Txn: &Txn{If: []Compare{c}}} }
	for name, c := range map[string]Command{
		"unknown op":                   {Op: 10},
		"a get alone":                  {Op: OpGet},
		"TTL and lease":                {Op: OpPut, Key: "a", TTL: ttl, Lease: 1},
		"TTL of a microsecond":         {Op: OpPut, Key: "a", TTL: time.Microsecond},
		"TTL between milliseconds":     {Op: OpPut, Key: "a", TTL: ttl + 1},
		"TTL too long":                 {Op: OpPut, Key: "a", TTL: MaxTTL + time.Millisecond},
		"negative TTL":                 {Op: OpPut, Key: "a", TTL: -ttl},
		"negative lease":               {Op: OpPut, Key: "a", Lease: -1},
		"unknown precondition":         {Op: OpPut, Key: "a", If: Precondition{Kind: 5}},
		"no revisions":                 {Op: OpDelete, Key: "a", If: Precondition{Kind: CheckAnyOf}},
		"many revisions":               {Op: OpDelete, Key: "a", If: Precondition{Kind: CheckNoneOf, Revisions: make([]int64, MaxRevisions+1)}},
		"negative revision":            {Op: OpDelete, Key: "a", If: Precondition{Kind: CheckNoneOf, Revisions: []int64{-1}}},
		"long start":                   {Op: OpDeleteRange, Span: Span{Start: long + "k"}},
		"long end":                     {Op: OpDeleteRange, Span: Span{End: long + "k"}},
		"grant without TTL":            {Op: OpGrant},
		"keep alive no lease":          {Op: OpKeepAlive},
		"keep alive TTL":               {Op: OpKeepAlive, Lease: 1, TTL: 1},
		"revoke no lease":              {Op: OpRevoke},
		"negative clock":               {Op: OpTick, Tick: Tick{Clock: -1}},
		"clock too far":                {Op: OpTick, Tick: Tick{Clock: maxMillis + 1}},
		"negative wall of a tick":      {Op: OpTick, Tick: Tick{Wall: -1}},
		"tick with key":                {Op: OpTick, Once: &Once{Key: "id"}},
		"negative wall":                {Op: OpGrant, TTL: ttl, Wall: -1},
		"wall too far":                 {Op: OpGrant, TTL: ttl, Wall: maxMillis + 1},
		"empty idempotency key":        {Op: OpDelete, Key: "a", Once: &Once{}},
		"long idempotency key":         {Op: OpDelete, Key: "a", Once: &Once{Key: long[:MaxOnceKey+1]}},
		"no transaction":               {Op: OpTxn},
		"compare without key":          compare(Compare{Target: TargetVersion, Op: Equal}),
		"compare operator 0":           compare(Compare{Key: "a", Target: TargetVersion}),
		"compare operator 5":           compare(Compare{Key: "a", Target: TargetVersion, Op: 5}),
		"compare target 0":             compare(Compare{Key: "a", Op: Equal}),
		"compare target 6":             compare(Compare{Key: "a", Target: 6, Op: Equal}),
		"exists less":                  compare(Compare{Key: "a", Target: TargetExists, Op: Less}),
		"exists 2":                     compare(Compare{Key: "a", Target: TargetExists, Op: Equal, Number: 2}),
		"put twice":                    then(opPut("a", ""), opPut("b", ""), opPut("a", "")),
		"put and deleted":              then(opPut("a", ""), opPut("b", ""), opDel(SingleKey("b"))),
		"put and deleted with all":     then(opPut("a", ""), opDel(Span{})),
		"put twice in else":            {Op: OpTxn, Txn: &Txn{Else: []TxnOp{opPut("a", ""), opPut("a", "")}}},
		"put without key":              then(opPut("", "")),
		"put with TTL and lease":       then(TxnOp{Op: OpPut, Key: "a", TTL: ttl, Lease: 1}),
		"delete of one key":            then(TxnOp{Op: OpDelete, Key: "a"}),
		"op 0":                         then(TxnOp{}),
		"negative limit":               then(TxnOp{Op: OpGet, Limit: -1}),
		"long start in a get":          then(opGet(Span{Start: long + "k"})),
		"get in an import":             {Op: OpTxn, Txn: &Txn{Each: true, Then: []TxnOp{opGet(Span{})}}},
		"else in an import":            {Op: OpTxn, Txn: &Txn{Each: true, Else: []TxnOp{opPut("a", "")}}},
		"comparison in an import":      {Op: OpTxn, Txn: &Txn{Each: true, If: []Compare{{Key: "a", Target: TargetVersion, Op: Equal}}}},
		"a bad operation in an import": {Op: OpTxn, Txn: &Txn{Each: true, Then: []TxnOp{opPut("", "")}}},
	} {
		if err := (&Batch{Commands: []Command{put("a", ""), c}}).validate(); err == nil {
			t.Errorf("%s: not refused", name)
		}
	}
	for name, c := range map[string]Command{
		"the longest key's span":          {Op: OpDeleteRange, Span: SingleKey(long[1:])},
		"shortest TTL":                    {Op: OpGrant, TTL: time.Millisecond},
		"longest TTL":                     {Op: OpGrant, TTL: MaxTTL},
		"deleted, put and read":           then(opDel(Span{}), opPut("a", ""), opGet(Span{}), opPut("b", "")),
		"put, a neighbour deleted":        then(opPut("b", ""), opDel(Span{"", "b"}), opDel(Span{"b\x00", ""})),
		"put in both branches":            {Op: OpTxn, Txn: &Txn{Then: []TxnOp{opPut("a", "")}, Else: []TxnOp{opPut("a", "")}}},
		"a key many times in an import":   {Op: OpTxn, Txn: &Txn{Each: true, Then: []TxnOp{opPut("a", ""), opDel(Span{}), opPut("a", "")}}},
		"fields of another op are no one": {Op: OpDelete, Key: "a", TTL: -1, Lease: -1, Txn: &Txn{Each: true, Else: []TxnOp{{}}}},
	} {
		if err := (&Batch{Commands: []Command{c}}).validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPreconditions(t *testing.T) {
	// a has mod revision 2, b is absent.
	for _, tt := range []struct {
		key       string
		kind      Check
		revisions []int64
		want      bool
	}{
		{"a", CheckNothing, nil, true},
		{"b", CheckNothing, nil, true},
		{"a", CheckExists, nil, true},
		{"b", CheckExists, nil, false},
		{"a", CheckAbsent, nil, false},
		{"b", CheckAbsent, nil, true},
		{"a", CheckAnyOf, []int64{1, 2}, true},
		{"a", CheckAnyOf, []int64{1, 3}, false},
		{"b", CheckAnyOf, []int64{0}, false},
		{"a", CheckNoneOf, []int64{1, 2}, false},
		{"a", CheckNoneOf, []int64{1, 3}, true},
		{"b", CheckNoneOf, []int64{0}, true},
	} {
		for _, op := range []Op{OpPut, OpDelete} {
			s := NewState()
			apply(t, s, put("a", "1"), Command{Op: OpPut, Key: "a", Value: []byte("2"), TTL: time.Second, Wall: 5})
			before := s.Hash()
			present, exists := s.Get(tt.key)
			r := apply(t, s, Command{Op: op, Key: tt.key, If: Precondition{tt.kind, tt.revisions}})[0]
			name := fmt.Sprint(op, tt)
			switch {
			case r.Refused == NotRefused != tt.want:
				t.Errorf("%s: %+v", name, r)
			case !tt.want && (r.Refused != RefusedCondition || s.Hash() != before || r.Existed != exists || !reflect.DeepEqual(r.Entry, present) || r.Revision != 2):
				t.Errorf("%s: refused with %+v", name, r)
			}
		}
	}
}
