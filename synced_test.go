package main

import (
	"encoding/hex"
	"testing"
)

// The bytes of version 1. A change of format needs a new magic, and this test
// to stay.
func TestSyncMarkGolden(t *testing.T) {
	m := syncMark{term: 3, index: 0x1122334455667788, hardTerm: 4, vote: 2}
	const want = "504f4e5453594e31" + "0300000000000000" + "8877665544332211" + "0400000000000000" + "0200000000000000" + "f6999529" + "00000000"
	if got := hex.EncodeToString(m.encode()); got != want {
		t.Fatalf("encodes as\n%s, want\n%s", got, want)
	}
	b, err := hex.DecodeString(want)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := decodeSyncMark(b); err != nil || got != m {
		t.Fatalf("decodes as %+v, %v", got, err)
	}
}

func TestSyncMarkNoticesEveryFlippedBit(t *testing.T) {
	good := syncMark{term: 3, index: 9, hardTerm: 4, vote: 2}.encode()
	for i := range len(good) * 8 {
		bad := append([]byte(nil), good...)
		bad[i/8] ^= 1 << (i % 8)
		if m, err := decodeSyncMark(bad); err == nil {
			t.Errorf("bit %d flipped: read %+v", i, m)
		}
	}
	for n := range len(good) {
		if _, err := decodeSyncMark(good[:n]); err == nil {
			t.Errorf("cut to %d bytes: read", n)
		}
	}
}

func TestSyncMarkCovers(t *testing.T) {
	old := syncMark{term: 3, index: 9, hardTerm: 4, vote: 2}
	for _, x := range []struct {
		name string
		log  syncMark
		ok   bool
	}{
		{"the same", old, true},
		{"more", syncMark{3, 10, 4, 2}, true},
		{"shorter under a newer leader", syncMark{4, 5, 4, 2}, true},
		{"shorter", syncMark{3, 8, 4, 2}, false},
		{"longer of an older term", syncMark{2, 20, 4, 2}, false},
		{"a newer vote", syncMark{3, 9, 5, 0}, true},
		{"a lost term", syncMark{3, 9, 3, 2}, false},
		{"a lost vote", syncMark{3, 9, 4, 0}, false},
		{"another vote in the same term", syncMark{3, 9, 4, 1}, false},
		{"nothing", syncMark{}, false},
	} {
		if err := x.log.covers(old); (err == nil) != x.ok {
			t.Errorf("%s: %v", x.name, err)
		}
	}
	if err := (syncMark{1, 1, 1, 0}).covers(syncMark{}); err != nil {
		t.Errorf("a new mark: %v", err)
	}
	if err := (syncMark{3, 9, 4, 2}).covers(syncMark{3, 9, 4, 0}); err != nil {
		t.Errorf("a vote given since: %v", err)
	}
}

func FuzzSyncMark(f *testing.F) {
	f.Add(syncMark{term: 1, index: 2, hardTerm: 3, vote: 4}.encode())
	f.Add([]byte(syncMarkMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := decodeSyncMark(b); err == nil && string(m.encode()) != string(b) {
			t.Errorf("%x decodes to %+v, which encodes otherwise", b, m)
		}
	})
}
