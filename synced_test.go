package main

import (
	"encoding/hex"
	"testing"

	"pontoon/internal/wal"
)

// A change of format needs a new magic, and this test to stay.
func TestSyncMarkGolden(t *testing.T) {
	m, o := syncMark{frames: 0x1122334455667788, hardTerm: 4}, owner{cluster: 0xabcdef, member: 7}
	const want = "504f4e5453594e32" + "8877665544332211" + "0400000000000000" + "efcdab0000000000" + "0700000000000000" + "b0aac4ac" + "00000000"
	if got := hex.EncodeToString(m.encode(o)); got != want {
		t.Errorf("encodes as\n%s, want\n%s", got, want)
	}
	b, err := hex.DecodeString(want)
	if err != nil {
		t.Fatal(err)
	}
	if got, whose, err := decodeSyncMark(b); err != nil || got != m || whose != o {
		t.Errorf("decodes as %+v, %+v, %v", got, whose, err)
	}
}

func TestSyncMarkNoticesEveryFlippedBit(t *testing.T) {
	good := syncMark{frames: 9, hardTerm: 4}.encode(owner{cluster: 5, member: 1})
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

func TestSyncMarkCovered(t *testing.T) {
	mark := syncMark{frames: 9, hardTerm: 4}
	for _, x := range []struct {
		name         string
		frames, term uint64
		ok           bool
	}{
		{"the same", 9, 4, true},
		{"more", 10, 5, true},
		{"shorter", 8, 4, false},
		{"a lost term", 9, 3, false},
		{"nothing", 0, 0, false},
	} {
		if err := mark.covered(wal.Content{Frames: x.frames, State: wal.State{Term: x.term}}); (err == nil) != x.ok {
			t.Errorf("%s: %v", x.name, err)
		}
	}
}

func FuzzSyncMark(f *testing.F) {
	f.Add(syncMark{frames: 1, hardTerm: 3}.encode(owner{5, 6}))
	f.Add([]byte(syncMarkMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, o, err := decodeSyncMark(b); err == nil && string(m.encode(o)) != string(b) {
			t.Errorf("%x decodes to %+v, which encodes otherwise", b, m)
		}
	})
}
