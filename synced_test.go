package main

import (
	"encoding/hex"
	"testing"
)

// The bytes of both versions. A change of format needs a new magic, and this
// test to stay.
func TestSyncMarkGolden(t *testing.T) {
	m, o := syncMark{term: 3, index: 0x1122334455667788, hardTerm: 4, vote: 2}, owner{cluster: 0xabcdef, member: 7}
	const fields = "0300000000000000" + "8877665544332211" + "0400000000000000" + "0200000000000000"
	const first = "504f4e5453594e31" + fields + "f6999529" + "00000000"
	const second = "504f4e5453594e32" + fields + "efcdab0000000000" + "0700000000000000" + "e7d9c2e5" + "00000000"
	if got := hex.EncodeToString(m.encode(o)); got != second {
		t.Errorf("encodes as\n%s, want\n%s", got, second)
	}
	for text, want := range map[string]owner{first: {}, second: o} {
		b, err := hex.DecodeString(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, whose, err := decodeSyncMark(b); err != nil || got != m || whose != want {
			t.Errorf("decodes as %+v, %+v, %v", got, whose, err)
		}
	}
}

func TestSyncMarkNoticesEveryFlippedBit(t *testing.T) {
	good := syncMark{term: 3, index: 9, hardTerm: 4, vote: 2}.encode(owner{cluster: 5, member: 1})
	for i := range len(good) * 8 {
		bad := append([]byte(nil), good...)
		bad[i/8] ^= 1 << (i % 8)
		if m, _, err := decodeSyncMark(bad); err == nil {
			t.Errorf("bit %d flipped: read %+v", i, m)
		}
	}
	for n := range len(good) {
		if _, _, err := decodeSyncMark(good[:n]); err == nil {
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
	f.Add(syncMark{term: 1, index: 2, hardTerm: 3, vote: 4}.encode(owner{5, 6}))
	f.Add([]byte(syncMarkMagic))
	f.Add([]byte(syncMarkMagic1))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, o, err := decodeSyncMark(b); err == nil && len(b) == syncMarkSize && string(m.encode(o)) != string(b) {
			t.Errorf("%x decodes to %+v, which encodes otherwise", b, m)
		}
	})
}
