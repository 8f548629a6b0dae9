package main

import (
	"strings"
	"testing"

	"pontoon/kv"
)

func testCursors() []cursor {
	return []cursor{
		{revision: 1, last: "k"},
		{revision: 1<<63 - 1, query: [8]byte{1, 2, 3, 4, 5, 6, 7, 8}, last: "\x00\xff"},
		{revision: 42, query: walkHash(&kv.Query{Delimiter: "/"}), last: "dir/", rolled: true},
		{revision: 7, last: strings.Repeat("k", 4096)},
	}
}

func TestCursorRoundTrip(t *testing.T) {
	for _, k := range testCursors() {
		text := k.encode()
		if got, wrong := decodeCursor(text); wrong != "" || got != k {
			t.Errorf("decodeCursor(%q) = %+v, %q; want %+v", text, got, wrong, k)
		}
		if limit := 4 * testLimits().MaxKeyBytes; len(text) > limit {
			t.Errorf("a cursor of %d bytes; after= takes %d", len(text), limit)
		}
	}
}

// Every cursor that is cut or has one bit of its text changed is found out.
func TestCursorDamage(t *testing.T) {
	for _, k := range testCursors()[:3] {
		text := k.encode()
		for i := range len(text) {
			if _, wrong := decodeCursor(text[:i]); wrong == "" {
				t.Errorf("%q, cut after %d bytes, passes", text, i)
			}
			for bit := range 8 {
				damaged := []byte(text)
				damaged[i] ^= 1 << bit
				if _, wrong := decodeCursor(string(damaged)); wrong == "" {
					t.Errorf("%q with bit %d of byte %d changed passes", text, bit, i)
				}
			}
		}
		for _, other := range []string{text + "A", text + "=", text + "\n", text[:5] + "\r\n" + text[5:], " " + text, ""} {
			if _, wrong := decodeCursor(other); wrong == "" {
				t.Errorf("%q passes", other)
			}
		}
	}
}

// The rules that the checksum does not hold: only a server that is wrong would
// make such cursors.
func TestCursorRules(t *testing.T) {
	for _, k := range []cursor{{revision: 0, last: "k"}, {revision: -1, last: "k"}, {revision: 1}} {
		if _, wrong := decodeCursor(k.encode()); wrong == "" {
			t.Errorf("%+v passes", k)
		}
	}
}

func TestWalkHashTellsWalksApart(t *testing.T) {
	queries := []kv.Query{
		{}, {Span: kv.Span{Start: "a"}}, {Span: kv.Span{End: "a"}}, {Prefix: "a"}, {Delimiter: "a"}, {Reverse: true}, {KeysOnly: true},
		{Span: kv.Span{Start: "ab", End: "c"}}, {Span: kv.Span{Start: "a", End: "bc"}}, {Reverse: true, KeysOnly: true},
	}
	seen := map[[8]byte]int{}
	for i := range queries {
		h := walkHash(&queries[i])
		if j, known := seen[h]; known {
			t.Errorf("queries %+v and %+v are one walk", queries[i], queries[j])
		}
		seen[h] = i
		queries[i].Limit, queries[i].MaxBytes, queries[i].After, queries[i].Rolled = 9, 9, "x", true
		if walkHash(&queries[i]) != h {
			t.Errorf("%+v: the place in the walk, or the size of a page, is part of what the walk is", queries[i])
		}
	}
}

func FuzzCursor(f *testing.F) {
	for _, k := range testCursors()[:3] {
		f.Add(k.encode())
	}
	f.Add("")
	f.Add("AQ")
	f.Fuzz(func(t *testing.T, text string) {
		k, wrong := decodeCursor(text)
		if wrong == "" && k.encode() != text {
			t.Errorf("%q decodes to %+v, which is %q", text, k, k.encode())
		}
	})
}
