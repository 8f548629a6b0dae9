package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

var (
	sweepAll  = flag.Bool("sweep.all", false, "damage every bit, sector, page and length of a member's files, not a sample (minutes)")
	sweepSeed = flag.Uint64("sweep.seed", 0, "draws the sample; 0: another one each time")
)

// fixture is the directory of a member that has lived through what a member lives
// through, and what it must find there.
type fixture struct {
	dir     string
	entries []*raftpb.Entry // entries[i] is entry i; nil below 2
	hash    []uint64        // of the state after entry i
	hard    *raftpb.HardState
	boot    uint64
	older   map[string][][]byte // earlier contents of each file
	files   map[string][]byte   // what is there now, by path in dir
}

// newFixture writes a log of several segments: entries of all sizes, commits by
// themselves, entries that a later leader replaced, votes, a change of members, and
// two snapshots.
func newFixture(t *testing.T) *fixture {
	t.Helper()
	smallSegments(t, 4096)
	f := &fixture{dir: t.TempDir(), entries: make([]*raftpb.Entry, 2), hash: make([]uint64, 2), older: map[string][][]byte{}}
	d := openTestDir(t, f.dir)
	if err := d.bootstrap(1, soleFounder(), false); err != nil {
		t.Fatal(err)
	}
	r, err := d.load()
	if err != nil {
		t.Fatal(err)
	}
	for range 9 { // the number gets two digits
		if f.boot, err = d.nextBoot(); err != nil {
			t.Fatal(err)
		}
		f.keepVersions(t)
	}
	if f.boot, err = d.nextBoot(); err != nil {
		t.Fatal(err)
	}
	f.hash[1] = r.state.Hash()
	save := func(term, vote, commit uint64, ents ...*raftpb.Entry) {
		t.Helper()
		f.hard = &raftpb.HardState{Term: new(term), Vote: new(vote), Commit: new(commit)}
		if err := d.save(f.hard, ents); err != nil {
			t.Fatal(err)
		}
		for _, e := range ents {
			f.entries = append(f.entries[:e.GetIndex()], e)
		}
		for i := r.state.Applied() + 1; i <= commit; i++ {
			f.apply(t, r, i)
			if i == 12 || i == 24 {
				h := snapHeader{Index: i, Term: f.entries[i].GetTerm(), Members: soleFounder()}
				if err := errors.Join(second(d.writeSnapshot(h, r.state)), d.saveSnapshot(h.raftSnapshot().Metadata)); err != nil {
					t.Fatal(err)
				}
			}
		}
		f.keepVersions(t)
	}
	with := func(index, term uint64, size int) *raftpb.Entry {
		e := entry(index, term)
		e.Data = testBatch(fmt.Sprint("key", index%5), strings.Repeat(fmt.Sprint(index, "/", term, ","), size/8+1))
		return e
	}
	for i := uint64(2); i <= 13; i++ {
		save(1, 1, i-1, with(i, 1, int(i*i%9)*90))
		if i%2 == 0 {
			save(1, 1, i) // waits for the next frame
		}
	}
	save(1, 1, 13, with(14, 1, 600), with(15, 1, 40), with(16, 1, 40)) // never committed
	save(3, 2, 13)
	save(3, 2, 13, with(14, 3, 30), with(15, 3, 700))
	change := memberChange{Version: memberChangeVersion, Op: opStarted, Member: member{ID: 1}}
	cc, err := change.confChange()
	if err != nil {
		t.Fatal(err)
	}
	data, err := proto.Marshal(cc)
	if err != nil {
		t.Fatal(err)
	}
	save(3, 2, 15, &raftpb.Entry{Index: new(uint64(16)), Term: new(uint64(3)), Type: raftpb.EntryConfChangeV2.Enum(), Data: data})
	save(4, 1, 16, &raftpb.Entry{Index: new(uint64(17)), Term: new(uint64(4)), Type: raftpb.EntryNormal.Enum()})
	for i := uint64(18); i <= 30; i++ {
		save(4, 1, i-1, with(i, 4, int(i*i%7)*70))
		if i%3 == 0 {
			save(4, 1, i)
		}
	}
	save(5, 3, 30)
	for i := uint64(31); i <= 34; i++ {
		save(5, 3, i-1, with(i, 5, 100))
	}
	for i := r.state.Applied() + 1; i < uint64(len(f.entries)); i++ {
		f.apply(t, r, i)
	}
	d.mustClose(t)
	f.keepVersions(t)
	f.files = f.read(t)
	for _, n := range segments(t, f.dir) {
		if rel, _ := filepath.Rel(f.dir, n); len(f.files[rel]) == 0 {
			t.Fatalf("%s is empty", rel)
		}
	}
	return f
}

func (f *fixture) apply(t *testing.T, r *recovered, index uint64) {
	t.Helper()
	if e := f.entries[index]; e.GetType() == raftpb.EntryNormal && len(e.GetData()) > 0 {
		applyTo(t, r.state, e)
	} else {
		r.state.SetApplied(index)
	}
	f.hash = append(f.hash[:index], r.state.Hash())
}

// read returns the files that are kept, by their path.
func (f *fixture) read(t *testing.T) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for _, pattern := range []string{"boots", "synced", "aside", "removed", "wal/*.wal", "snap/*.snap.db"} {
		names, err := filepath.Glob(filepath.Join(f.dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			rel, err := filepath.Rel(f.dir, n)
			if err != nil {
				t.Fatal(err)
			}
			if files[rel], err = os.ReadFile(n); err != nil {
				t.Fatal(err)
			}
		}
	}
	return files
}

func (f *fixture) keepVersions(t *testing.T) {
	t.Helper()
	for name, b := range f.read(t) {
		if n := len(f.older[name]); n == 0 || !bytes.Equal(f.older[name][n-1], b) {
			f.older[name] = append(f.older[name], b)
		}
	}
}

// restore makes the directory what it was; a start may have changed any file.
func (f *fixture) restore(t *testing.T) {
	t.Helper()
	for name := range f.read(t) {
		if f.files[name] == nil {
			if err := os.Remove(filepath.Join(f.dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, b := range f.files {
		if err := os.WriteFile(filepath.Join(f.dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// start says what a member makes of the directory: nil error and nothing to say is
// the truth, an error a refusal, and else what is wrong.
func (f *fixture) start(t *testing.T) (wrong string, refusal error) {
	t.Helper()
	defer func() {
		if p := recover(); p != nil {
			wrong = fmt.Sprint("it panics: ", p)
		}
	}()
	d, err := openDataDir(f.dir, 1, 2, quietLog)
	if err != nil {
		return "", err
	}
	defer func() {
		if err := d.close(); err != nil && wrong == "" && refusal == nil {
			wrong = err.Error()
		}
	}()
	r, err := d.load()
	if err != nil {
		return "", err
	}
	at := r.state.Applied()
	if at >= uint64(len(f.hash)) || r.state.Hash() != f.hash[at] {
		return fmt.Sprintf("the snapshot at %d holds another state", at), nil
	}
	for _, e := range r.entries {
		if at++; at >= uint64(len(f.entries)) || !proto.Equal(e, f.entries[at]) {
			return fmt.Sprintf("entry %d is %.60v", at, e), nil
		}
	}
	hs := r.hard
	switch want := f.hard; {
	case at != uint64(len(f.entries))-1:
		return fmt.Sprintf("the log ends with entry %d", at), nil
	case hs.GetTerm() != want.GetTerm() || hs.GetVote() != want.GetVote() || hs.GetCommit() > want.GetCommit():
		return fmt.Sprintf("the hard state is %v", hs), nil // a lower commit is learned again
	case r.snap.Members.ClusterID != soleFounder().ClusterID || r.meta.MemberID != 1 || r.meta.ClusterID != soleFounder().ClusterID:
		return "another member or cluster", nil
	}
	if boot, err := d.nextBoot(); err != nil {
		return "", err
	} else if boot <= f.boot {
		return fmt.Sprintf("start %d comes after start %d", boot, f.boot), nil
	}
	return "", nil
}

// damage is one way to harm one or two files; it returns false where it changes nothing.
type damage struct {
	kind string
	name string // of the file, in dir
	at   int
	do   func(b []byte) []byte
}

// damages lists every damage of every file.
func (f *fixture) damages() (all []damage) {
	for _, name := range slices.Sorted(maps.Keys(f.files)) {
		whole := f.files[name]
		size := len(whole)
		if strings.HasPrefix(name, "wal") { // and a little of the free space behind it
			size = min(size, len(bytes.TrimRight(whole, "\x00"))+64)
		}
		add := func(kind string, at int, do func(b []byte) []byte) {
			all = append(all, damage{kind, name, at, do})
		}
		for bit := range size * 8 {
			add("flip", bit, func(b []byte) []byte { b[bit/8] ^= 1 << (bit % 8); return b })
		}
		for at := range size {
			add("cut", at, func(b []byte) []byte { return b[:at] })
		}
		for _, piece := range []int{512, 4096} {
			for at := 0; at < size; at += piece {
				end := min(at+piece, len(whole))
				add(fmt.Sprint("zero ", piece), at, func(b []byte) []byte { clear(b[at:end]); return b })
				for to := at + piece; to+piece <= len(whole) && to < size; to += piece {
					add(fmt.Sprint("swap ", piece), at*size+to, func(b []byte) []byte {
						kept := bytes.Clone(b[at : at+piece])
						copy(b[at:], b[to:to+piece])
						copy(b[to:], kept)
						return b
					})
				}
				for v, old := range f.older[name] {
					if at < len(old) {
						add(fmt.Sprint("older ", piece), at<<16+v, func(b []byte) []byte { copy(b[at:end], old[at:min(end, len(old))]); return b })
					}
				}
			}
		}
		add("lost", 0, nil)
		for v, old := range f.older[name] {
			if name != "boots" && name != "synced" {
				add("older file", v, func([]byte) []byte { return old })
			}
		}
	}
	return all
}

// Whatever happens to one file, a member refuses to start or knows the truth: the
// same entries, the same term and vote, the same state. A sample by default.
func TestDamageIsNoticed(t *testing.T) {
	f := newFixture(t)
	if wrong, err := f.start(t); wrong != "" || err != nil {
		t.Fatalf("undamaged: %s, %v", wrong, err)
	}
	f.restore(t)
	all := f.damages()
	seed := cmp.Or(*sweepSeed, rand.Uint64())
	if !*sweepAll {
		t.Logf("-sweep.seed=%d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		each := 12
		if raceEnabled {
			each = 1
		}
		all = sample(rng, all, each)
	}
	type count struct{ noticed, harmless, silent int }
	counts := map[string]*count{}
	for _, x := range all {
		path, whole := filepath.Join(f.dir, x.name), f.files[x.name]
		var err error
		if x.do == nil {
			err = os.Remove(path)
		} else if b := x.do(bytes.Clone(whole)); bytes.Equal(b, whole) {
			continue
		} else {
			err = os.WriteFile(path, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		wrong, refusal := f.start(t)
		kind := x.kind + " " + filepath.Dir(x.name) + "/" + filepath.Ext(x.name)
		if !strings.Contains(x.name, "/") {
			kind = x.kind + " " + x.name
		}
		c := counts[kind]
		if c == nil {
			c = &count{}
			counts[kind] = c
		}
		switch {
		case wrong != "":
			if c.silent++; c.silent <= 20 {
				t.Errorf("%s of %s at %d: %s", x.kind, x.name, x.at, wrong)
			}
		case refusal == nil:
			c.harmless++
		case !errors.Is(refusal, errRefuse):
			t.Errorf("%s of %s at %d: no refusal that tells an operator what to do: %v", x.kind, x.name, x.at, refusal)
		default:
			c.noticed++
		}
		f.restore(t)
	}
	for _, kind := range slices.Sorted(maps.Keys(counts)) {
		c := counts[kind]
		t.Logf("%-28s %6d noticed %6d harmless %3d silent", kind, c.noticed, c.harmless, c.silent)
	}
}

// sample draws up to n of each kind of damage to each file.
func sample(rng *rand.Rand, all []damage, n int) (out []damage) {
	groups := map[string][]damage{}
	for _, x := range all {
		groups[x.kind+x.name] = append(groups[x.kind+x.name], x)
	}
	for _, key := range slices.Sorted(maps.Keys(groups)) {
		g := groups[key]
		rng.Shuffle(len(g), func(i, j int) { g[i], g[j] = g[j], g[i] })
		out = append(out, g[:min(n, len(g))]...)
	}
	return out
}

// frames are the places of a segment's frames, see internal/wal.
func frames(whole []byte) (places []int) {
	for at := 4096; at+24 <= len(whole); {
		size := binary.LittleEndian.Uint32(whole[at:])
		if size == 0 || ^size != binary.LittleEndian.Uint32(whole[at+20:]) {
			break
		}
		places = append(places, at)
		at += (24 + int(size) + 7) &^ 7
	}
	return places
}

// A power loss took the mark back to what had reached the disk by itself, and then
// the log is damaged. That is told from a write that was cut short all the same, as
// the log goes on behind it.
func TestDamageAfterPowerLoss(t *testing.T) {
	f := newFixture(t)
	var name string
	for n := range f.files {
		if strings.HasPrefix(n, "wal") {
			name = max(name, n)
		}
	}
	whole, places := f.files[name], frames(f.files[name])
	if len(places) < 5 {
		t.Fatalf("%s has %d frames", name, len(places))
	}
	sure := places[len(places)-1] // one frame comes after it
	f.files["synced"] = f.older["synced"][len(f.older["synced"])/2]
	f.restore(t)
	if wrong, err := f.start(t); wrong != "" || err != nil {
		t.Fatalf("the mark alone: %s, %v", wrong, err)
	}
	tries := map[string]func(b []byte, at int){
		"flip":     func(b []byte, at int) { b[at] ^= 1 << (at % 8) },
		"zero 8":   func(b []byte, at int) { clear(b[at:min(at+8, sure)]) },
		"zero 512": func(b []byte, at int) { clear(b[at&^511 : min(at&^511+512, sure)]) },
	}
	noticed, lost := 0, 0
	for kind, harm := range tries {
		step := 8
		if raceEnabled {
			step = 256
		}
		for at := places[0]; at < sure; at += step {
			bad := bytes.Clone(whole)
			if harm(bad, at); bytes.Equal(bad, whole) {
				continue
			}
			f.restore(t)
			if err := os.WriteFile(filepath.Join(f.dir, name), bad, 0o600); err != nil {
				t.Fatal(err)
			}
			wrong, refusal := f.start(t)
			if wrong != "" {
				if lost++; lost < 10 {
					t.Errorf("%s at %d of %d: %s", kind, at, sure, wrong)
				}
			} else if refusal != nil {
				noticed++
			}
		}
	}
	if noticed < 100 && !raceEnabled {
		t.Errorf("only %d were noticed", noticed)
	}
}
