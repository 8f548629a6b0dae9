package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"pontoon/kv"
)

// What a power loss may leave of a data directory, from what a member really
// writes: strace records the system calls of a member that lives through
// everything that touches the disk, a model of a file system that keeps no more
// than it must replays them, and after each call the test builds directories that
// a crash at this moment could leave. A member has to start from each, with all
// that it had promised by then.

var (
	crashAll  = flag.Bool("crash.all", false, "build images after every system call, not after a sample of them (minutes)")
	crashSeed = flag.Uint64("crash.seed", 0, "draws which images are built; 0: others each time")
)

// promise is what holds from the moment it is written into the trace.
type promise struct {
	Entries map[uint64]uint64 `json:"entries"` // index → term, of what was acknowledged
	Commit  uint64            `json:"commit"`  // the newest that was acknowledged as committed
	Term    uint64            `json:"term"`
	Vote    uint64            `json:"vote"`
	Boot    uint64            `json:"boot"`
	Aside   uint64            `json:"aside,omitempty"`  // it stands aside up to this term
	MayAsd  uint64            `json:"may_aside"`        // or it may
	Removed string            `json:"removed"`          // "", "may" or "is"
	Hash    map[uint64]uint64 `json:"hash,omitempty"`   // of the state in each snapshot so far
	Served  bool              `json:"served,omitempty"` // it was founded
}

func crashEntry(index, term uint64) *raftpb.Entry {
	e := entry(index, term)
	e.Data = testBatch(fmt.Sprint("key", index%7), strings.Repeat(fmt.Sprint(index, "/", term, ","), int(index*index%11)*20+1))
	return e
}

// crashLife is the member whose writes are recorded. It runs in a process of its own.
type crashLife struct {
	t     *testing.T
	dir   string
	to    *os.File
	d     *diskStore
	p     promise
	state *kv.State
}

func (l *crashLife) must(errs ...error) {
	l.t.Helper()
	if err := errors.Join(errs...); err != nil {
		l.t.Fatal(err)
	}
}

func (l *crashLife) promise(change func(p *promise)) {
	l.t.Helper()
	change(&l.p)
	b, err := json.Marshal(l.p)
	l.must(err, second(l.to.Write(append(b, '\n'))))
}

func (l *crashLife) open(found bool) *recovered {
	l.t.Helper()
	var err error
	l.d, err = openDataDir(l.dir, 1, 2, quietLog)
	l.must(err)
	if found {
		l.must(l.d.bootstrap(1, soleFounder(), false))
	}
	r, err := l.d.load()
	l.must(err)
	boot, err := l.d.nextBoot()
	l.must(err)
	l.state = r.state
	l.promise(func(p *promise) { p.Served, p.Boot = true, boot })
	return r
}

func (l *crashLife) save(term, vote, commit uint64, ents ...*raftpb.Entry) {
	l.t.Helper()
	synced := len(ents) > 0 || term != l.p.Term || vote != l.p.Vote
	l.must(l.d.save(&raftpb.HardState{Term: new(term), Vote: new(vote), Commit: new(commit)}, ents))
	l.promise(func(p *promise) {
		for _, e := range ents {
			p.Entries[e.GetIndex()] = e.GetTerm()
		}
		if p.Term, p.Vote = term, vote; synced {
			p.Commit = commit
		}
	})
	for i := l.state.Applied() + 1; i <= commit; i++ {
		applyTo(l.t, l.state, crashEntry(i, l.p.Entries[i]))
	}
}

func (l *crashLife) snapshot(term uint64) {
	l.t.Helper()
	h := snapHeader{Index: l.state.Applied(), Term: term, Members: soleFounder()}
	l.promise(func(p *promise) { p.Hash[h.Index] = l.state.Hash() })
	l.must(second(l.d.writeSnapshot(h, l.state)), l.d.saveSnapshot(h.raftSnapshot().Metadata))
	if oldest := l.d.oldestKept(); oldest > 0 {
		l.must(l.d.release(oldest), l.d.purge(oldest))
	}
}

// receive takes a snapshot that arrives a second time: the process was killed when the
// file had its name, and that was not on disk yet.
func (l *crashLife) receive(file []byte, index uint64) {
	l.t.Helper()
	f, err := os.CreateTemp(l.d.snapDir(), "tmp")
	l.must(err, second(f.Write(file)), f.Sync(), f.Close(), os.Rename(f.Name(), l.d.snapPath(index)), l.d.close())
	l.open(false)
	l.must(l.d.receiveSnapshot(index, bytes.NewReader(file), func(snapHeader) error { return nil }))
}

// cutShort ends the process when a new segment has its name, and that is not on disk
// yet: there is a descriptor for the file, and none for its directory. The next start
// goes on in that segment.
func (l *crashLife) cutShort() {
	l.t.Helper()
	next := max(l.state.Applied(), slices.Max(slices.Collect(maps.Keys(l.p.Entries)))) + 1
	at := len(segments(l.t, l.dir))
	for i := next; ; i++ {
		var was syscall.Rlimit
		probe, err := os.Open("/")
		l.must(err, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was))
		lowest := uint64(probe.Fd())
		l.must(probe.Close(), syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: lowest + 1, Max: was.Max}))
		err = l.d.save(hardState(l.p.Term, l.p.Vote, i-1), []*raftpb.Entry{crashEntry(i, l.p.Term)})
		l.must(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was))
		if errors.Is(err, syscall.EMFILE) {
			break
		}
		l.must(err)
		l.promise(func(p *promise) { p.Entries[i], p.Commit = p.Term, i-1 })
	}
	if n := len(segments(l.t, l.dir)); n != at+1 {
		l.t.Fatalf("%d segments after %d", n, at)
	}
	l.must(l.d.close())
	r := l.open(false)
	for _, e := range r.entries {
		if e.GetIndex() > l.state.Applied() {
			applyTo(l.t, l.state, e)
		}
	}
	for i := l.state.Applied() + 1; i < l.state.Applied()+4; i++ {
		l.must(l.d.save(hardState(l.p.Term, l.p.Vote, i-1), []*raftpb.Entry{crashEntry(i, l.p.Term)}))
		l.promise(func(p *promise) { p.Entries[i], p.Commit = p.Term, i-1 })
	}
}

// TestCrashLife is no test: TestCrashImages runs it under strace.
func TestCrashLife(t *testing.T) {
	dir := os.Getenv("PONTOON_CRASH_LIFE")
	if dir == "" {
		t.Skip("TestCrashImages runs it")
	}
	smallSegments(t, 8<<10)
	to, err := os.Create(os.Getenv("PONTOON_CRASH_PROMISES"))
	l := &crashLife{t: t, dir: dir, to: to, p: promise{Entries: map[uint64]uint64{}, Hash: map[uint64]uint64{1: kv.NewState().Hash()}}}
	l.must(err)
	l.open(true)
	l.promise(func(p *promise) { p.Term = 1 })
	l.save(1, 1, 1)
	for i := uint64(2); i <= 30; i++ {
		l.save(1, 1, i-1, crashEntry(i, 1))
		if i%3 == 0 {
			l.save(1, 1, i) // not synced
		}
		if i%9 == 0 {
			l.snapshot(1)
		}
	}
	// A later leader replaces what was not committed.
	l.save(1, 1, 30, crashEntry(31, 1), crashEntry(32, 1), crashEntry(33, 1))
	l.save(3, 2, 30)
	l.promise(func(p *promise) { maps.DeleteFunc(p.Entries, func(i, _ uint64) bool { return i > 30 }) })
	l.save(3, 2, 30, crashEntry(31, 3), crashEntry(32, 3))
	l.must(l.d.close())
	l.open(false)
	for i := l.state.Applied() + 1; i <= 30; i++ {
		applyTo(t, l.state, crashEntry(i, 1))
	}
	for i := uint64(33); i <= 45; i++ {
		l.save(3, 2, i-1, crashEntry(i, 3))
	}
	l.snapshot(3)
	// A later leader may even have an older entry in the place of a newer one.
	l.save(5, 2, 44, crashEntry(46, 5), crashEntry(47, 5))
	l.save(7, 3, 44)
	l.promise(func(p *promise) { maps.DeleteFunc(p.Entries, func(i, _ uint64) bool { return i > 45 }) })
	l.save(7, 3, 44, crashEntry(46, 4))
	l.save(7, 3, 44, crashEntry(47, 7))
	// A leader sends a snapshot that is ahead of this log, and of an older term than
	// its end.
	ahead := l.state.Clone()
	for i := ahead.Applied() + 1; i <= 60; i++ {
		applyTo(t, ahead, crashEntry(i, 6))
	}
	h := snapHeader{Index: 60, Term: 6, Members: soleFounder()}
	l.promise(func(p *promise) {
		p.Hash[60] = ahead.Hash()
		maps.DeleteFunc(p.Entries, func(i, _ uint64) bool { return i > 44 }) // never committed
	})
	head, err := json.Marshal(h)
	l.must(err)
	var file bytes.Buffer
	l.must(kv.WriteSnapshot(&file, head, ahead))
	l.receive(file.Bytes(), 60)
	l.must(l.d.install(h.raftSnapshot().Metadata, &raftpb.HardState{Term: new(uint64(8)), Vote: new(uint64(0)), Commit: new(uint64(60))}, nil))
	l.state = ahead.Clone()
	l.promise(func(p *promise) { p.Term, p.Vote, p.Commit = 8, 0, 60 })
	for i := uint64(61); i <= 80; i++ {
		l.save(8, 3, i-1, crashEntry(i, 8))
		if i%9 == 0 {
			l.snapshot(8)
		}
	}
	l.cutShort()
	// It stands aside, twice, and ends it.
	for _, number := range []uint64{8, 9} {
		l.promise(func(p *promise) { p.MayAsd = number })
		l.must(l.d.standAside())
		l.promise(func(p *promise) {
			p.Aside, p.Entries, p.Commit, p.Term, p.Vote = number, map[uint64]uint64{}, 0, number+1, 0
		})
		l.must(l.d.close())
		l.open(false)
	}
	l.receive(file.Bytes(), 60)
	l.must(l.d.install(h.raftSnapshot().Metadata, &raftpb.HardState{Term: new(uint64(12)), Vote: new(uint64(0)), Commit: new(uint64(60))}, nil))
	l.state = ahead
	l.promise(func(p *promise) { p.Term, p.Commit = 12, 60 })
	l.save(12, 0, 60, crashEntry(61, 12))
	l.promise(func(p *promise) { p.Aside, p.MayAsd = 0, 9 })
	l.must(l.d.endAside())
	l.promise(func(p *promise) { p.MayAsd = 0 })
	l.save(12, 0, 61, crashEntry(62, 12))
	l.promise(func(p *promise) { p.Removed = "may" })
	l.must(l.d.markRemoved("member 1 was removed"))
	l.promise(func(p *promise) { p.Removed = "is" })
	l.must(l.d.close())
}

// An inode of the model. What is pending may reach the disk or not, in any order,
// a write by sectors, until the file (for a name: the directory) is synced.
type inode struct {
	dir     bool
	data    []byte            // on disk
	names   map[string]*inode // on disk
	pending []diskOp
}

// diskOp is a write, a new size (data nil), or new names (from, to; either may be empty).
type diskOp struct {
	at       int64
	data     []byte
	grow     bool // the size only ever grows: fallocate
	from, to string
	file     *inode
	other    *inode // of a rename between directories, the other one: both take it or neither
}

func (c diskOp) apply(dir bool, data []byte, names map[string]*inode) []byte {
	switch {
	case dir:
		if c.from != "" && names[c.from] == c.file {
			delete(names, c.from)
		}
		if c.to != "" {
			names[c.to] = c.file
		}
	case c.data != nil:
		if end := int(c.at) + len(c.data); end > len(data) {
			data = append(data, make([]byte, end-len(data))...)
		}
		copy(data[c.at:], c.data)
	case int64(len(data)) < c.at:
		data = append(data, make([]byte, c.at-int64(len(data)))...)
	case !c.grow:
		data = data[:c.at]
	}
	return data
}

func (n *inode) sync() {
	for _, c := range n.pending {
		n.data = c.apply(n.dir, n.data, n.names)
		if c.other != nil {
			c.other.pending = slices.DeleteFunc(c.other.pending, func(o diskOp) bool {
				half := o.other == n && o.file == c.file
				if half {
					o.apply(true, nil, c.other.names)
				}
				return half
			})
		}
	}
	n.pending = nil
}

// view is what a running process sees.
func (n *inode) view() (data []byte, names map[string]*inode) {
	data, names = slices.Clone(n.data), maps.Clone(n.names)
	for _, c := range n.pending {
		data = c.apply(n.dir, data, names)
	}
	return data, names
}

// image writes what is on disk and what keep chooses of the rest into dir.
func (n *inode) image(dir string, keep func(n *inode) []diskOp) error {
	names := maps.Clone(n.names)
	for _, c := range keep(n) {
		c.apply(true, nil, names)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, file := range names {
		path := filepath.Join(dir, name)
		if file.dir {
			if err := file.image(path, keep); err != nil {
				return err
			}
			continue
		}
		data := slices.Clone(file.data)
		for _, c := range keep(file) {
			data = c.apply(false, data, nil)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// Ways to choose of what is pending.
func keepNothing(*inode) []diskOp  { return nil }
func keepAll(n *inode) []diskOp    { return n.pending }
func keepNames(n *inode) []diskOp  { return n.only(true) }
func keepWrites(n *inode) []diskOp { return n.only(false) }

func (n *inode) only(dir bool) []diskOp {
	if n.dir == dir {
		return n.pending
	}
	return nil
}

// keepSome: each sector, size and name by itself, or a part from the beginning.
func keepSome(rng *rand.Rand) func(n *inode) []diskOp {
	half, prefix := rng.IntN(2) == 0, rng.IntN(3) == 0
	moved := map[*inode]bool{}
	return func(n *inode) (kept []diskOp) {
		pending := n.pending
		if prefix {
			pending = pending[:rng.IntN(len(pending)+1)]
		}
		for _, c := range n.pending {
			if _, drawn := moved[c.file]; c.other != nil && !drawn {
				moved[c.file] = rng.IntN(2) == 0
			}
			if c.other != nil && moved[c.file] {
				kept = append(kept, c)
			}
		}
		for _, c := range pending {
			if c.other != nil {
				continue
			}
			if prefix {
				kept = append(kept, c)
				continue
			}
			for len(c.data) > 0 {
				size := min(len(c.data), 512-int(c.at%512))
				if !half || rng.IntN(2) == 0 {
					kept = append(kept, diskOp{at: c.at, data: c.data[:size]})
				}
				c.at, c.data = c.at+int64(size), c.data[size:]
			}
			if c.data == nil && rng.IntN(2) == 0 {
				kept = append(kept, c)
			}
		}
		return kept
	}
}

// disk replays a trace.
type disk struct {
	t       *testing.T
	parent  string // of the data directory; all that happens elsewhere is left out
	root    *inode
	offsets map[string]int64 // by number of the file
	last    promise
}

func (k *disk) find(path string) (dir *inode, name string) {
	rel, err := filepath.Rel(k.parent, path)
	if err != nil || strings.HasPrefix(rel, "..") || rel == "." {
		return nil, ""
	}
	dir = k.root
	for {
		first, rest, more := strings.Cut(rel, "/")
		if !more {
			return dir, first
		}
		_, names := dir.view()
		if dir = names[first]; dir == nil {
			k.t.Fatalf("the trace names %s in a directory that the model does not have", path)
		}
		rel = rest
	}
}

func (k *disk) inode(path string) *inode {
	if path == k.parent {
		return k.root
	}
	dir, name := k.find(path)
	if dir == nil {
		return nil
	}
	_, names := dir.view()
	return names[name]
}

var (
	traceCall = regexp.MustCompile(`^\d+ +(\w+)\((.*)\) += (-?\d+)`)
	traceFD   = regexp.MustCompile(`^(\d+)<([^>]*)>$`)
)

func unhex(s string) string {
	out, err := strconv.Unquote(`"` + strings.Trim(s, `"`) + `"`)
	if err != nil {
		return s
	}
	return out
}

// step replays one system call and says whether it changed anything.
func (k *disk) step(line string) bool {
	m := traceCall.FindStringSubmatch(line)
	if m == nil || strings.HasPrefix(m[3], "-") {
		return false
	}
	call, args := m[1], strings.Split(m[2], ", ") // in hexadecimal no string holds a comma
	result, err := strconv.ParseInt(m[3], 10, 64)
	if err != nil {
		k.t.Fatal(err)
	}
	var fd, path string
	if g := traceFD.FindStringSubmatch(args[0]); g != nil {
		fd, path = g[1], unhex(g[2])
	}
	number := func(i int) int64 {
		n, err := strconv.ParseInt(args[i], 0, 64)
		if err != nil {
			k.t.Fatalf("%v in %.200s", err, line)
		}
		return n
	}
	at := func(i int) string { // a path, absolute or below the directory before it
		p := unhex(args[i])
		if _, below, ok := strings.Cut(args[max(i-1, 0)], "<"); ok && !filepath.IsAbs(p) {
			p = filepath.Join(unhex(strings.TrimSuffix(below, ">")), p)
		}
		return p
	}
	rename := func(from, to string) bool {
		a, old := k.find(from)
		b, name := k.find(to)
		if a == nil || b == nil {
			return false
		}
		file := k.inode(from)
		if a == b {
			a.pending = append(a.pending, diskOp{from: old, to: name, file: file})
			return true
		}
		a.pending = append(a.pending, diskOp{from: old, file: file, other: b})
		b.pending = append(b.pending, diskOp{from: "", to: name, file: file, other: a})
		return true
	}
	switch call {
	case "openat":
		p := at(1)
		dir, name := k.find(p)
		k.offsets[m[3]] = 0
		if dir == nil {
			return false
		}
		file := k.inode(p)
		if file == nil && strings.Contains(args[2], "O_CREAT") {
			file = &inode{}
			dir.pending = append(dir.pending, diskOp{to: name, file: file})
			return true
		}
		if file != nil && strings.Contains(args[2], "O_TRUNC") {
			file.pending = append(file.pending, diskOp{at: 0})
			return true
		}
	case "mkdirat":
		if dir, name := k.find(at(1)); dir != nil {
			dir.pending = append(dir.pending, diskOp{to: name, file: &inode{dir: true, names: map[string]*inode{}}})
			return true
		}
	case "lseek":
		k.offsets[fd] = result
	case "write", "pwrite64":
		data := []byte(unhex(args[1]))[:result]
		if path == filepath.Join(k.parent, "promises") {
			k.last = promise{}
			if err := json.Unmarshal(data, &k.last); err != nil {
				k.t.Fatal(err)
			}
			return true
		}
		file := k.inode(path)
		if file == nil {
			return false
		}
		offset := k.offsets[fd]
		if call == "pwrite64" {
			offset = number(3)
		} else {
			k.offsets[fd] += result
		}
		file.pending = append(file.pending, diskOp{at: offset, data: data})
		return true
	case "ftruncate", "fallocate":
		if file := k.inode(path); file != nil {
			if call == "ftruncate" {
				file.pending = append(file.pending, diskOp{at: number(1)})
			} else if args[1] == "0" {
				file.pending = append(file.pending, diskOp{at: number(2) + number(3), grow: true})
			} else {
				return false // keeps the size
			}
			return true
		}
	case "fsync", "fdatasync":
		if file := k.inode(path); file != nil {
			file.sync()
			return true
		}
	case "renameat", "renameat2":
		return rename(at(1), at(3))
	case "rename":
		return rename(at(0), at(1))
	case "unlinkat", "unlink", "rmdir":
		p := at(0)
		if call == "unlinkat" {
			p = at(1)
		}
		if dir, name := k.find(p); dir != nil {
			dir.pending = append(dir.pending, diskOp{from: name, file: k.inode(p)})
			return true
		}
	case "copy_file_range", "sendfile", "writev", "pwritev", "link", "linkat", "truncate":
		if strings.Contains(line, "promises") || path != "" && k.inode(path) != nil {
			k.t.Fatalf("the model does not know %.200s", line)
		}
	}
	return false
}

// record runs the member under strace and returns the trace's lines, whole ones.
func record(t *testing.T, parent string) []string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command("strace", "-f", "-y", "-xx", "-s", "1000000", "-o", out,
		"-e", "trace=openat,mkdirat,lseek,write,pwrite64,writev,pwritev,ftruncate,truncate,fallocate,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,link,linkat,copy_file_range,sendfile",
		os.Args[0], "-test.run=^TestCrashLife$", "-test.v")
	// As an operator may write it; nothing of it is there.
	cmd.Env = append(os.Environ(), "PONTOON_CRASH_LIFE="+parent+"/new/data/", "PONTOON_CRASH_PROMISES="+filepath.Join(parent, "promises"))
	if said, err := cmd.CombinedOutput(); errors.Is(err, exec.ErrNotFound) || bytes.Contains(said, []byte("ptrace")) {
		t.Skipf("the writes of a member cannot be recorded here, strace is not to be had: %v %s", err, said)
	} else if err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var lines []string
	begun := map[string]string{} // by thread: a call that another one's overtook
	for s := bufio.NewReader(f); ; {
		line, err := s.ReadString('\n')
		if err != nil {
			return lines
		}
		line = strings.TrimSuffix(line, "\n")
		thread, rest, _ := strings.Cut(line, " ")
		if head, ok := strings.CutSuffix(line, " <unfinished ...>"); ok {
			begun[thread] = head
			continue
		}
		if _, tail, ok := strings.Cut(rest, " resumed>"); ok {
			line = begun[thread] + strings.TrimPrefix(tail, " ")
		}
		lines = append(lines, line)
	}
}

// keeps says how an image breaks the promise; empty: it does not.
func (p *promise) broken(t *testing.T, dir string) (broken string) {
	defer func() {
		if e := recover(); e != nil {
			broken = fmt.Sprint("it panics: ", e)
		}
	}()
	mark, markErr := os.ReadFile(filepath.Join(dir, "synced"))
	d, err := openDataDir(dir, 1, 2, quietLog)
	if p.Removed != "" && errors.Is(err, errRefuse) && strings.Contains(err.Error(), "was removed") {
		return ""
	}
	if err != nil || p.Removed == "is" {
		return fmt.Sprint("opens: ", err)
	}
	defer d.close()
	if !d.exists() {
		if p.Served {
			return "there is no member"
		}
		return ""
	}
	r, err := d.load()
	if err != nil {
		return err.Error()
	}
	if boot, err := d.nextBoot(); err != nil || boot <= p.Boot {
		return fmt.Sprintf("start %d after %d, %v", boot, p.Boot, err)
	}
	if p.Served {
		if markErr != nil {
			return markErr.Error()
		}
		if m, _, err := decodeSyncMark(mark); err != nil || m.hardTerm+1 < p.Term || m.hardTerm < p.Term && p.Aside == 0 && p.MayAsd == 0 {
			return fmt.Sprintf("the mark of term %d, %v, after promises in term %d", m.hardTerm, err, p.Term)
		}
	}
	hs, lastTerm := r.hard, r.snap.Term
	if n := len(r.entries); n > 0 {
		lastTerm = r.entries[n-1].GetTerm()
	}
	if hs.GetTerm() < p.Term || hs.GetTerm() == p.Term && p.Vote != 0 && hs.GetVote() != p.Vote {
		return fmt.Sprintf("the hard state is %v", hs)
	}
	switch {
	case r.aside == nil && lastTerm <= p.Aside:
		return "it votes"
	case r.aside != nil && (r.aside.term != p.Aside && r.aside.term != p.MayAsd):
		return fmt.Sprintf("it stands aside up to term %d", r.aside.term)
	case r.aside != nil && p.Aside == 0 && r.hard.GetTerm() == r.aside.term+1 && r.snap.Index == 0:
		return "" // the old log is gone, as it may
	}
	if r.snap.Index > 0 && p.Hash[r.snap.Index] != 0 && r.state.Hash() != p.Hash[r.snap.Index] {
		return fmt.Sprintf("the snapshot at %d holds another state", r.snap.Index)
	}
	found := map[uint64]*raftpb.Entry{}
	for _, e := range r.entries {
		found[e.GetIndex()] = e
		if !proto.Equal(e, crashEntry(e.GetIndex(), e.GetTerm())) {
			return fmt.Sprintf("entry %d says something else", e.GetIndex())
		}
	}
	for i, term := range p.Entries {
		if i > r.snap.Index && found[i].GetTerm() != term {
			return fmt.Sprintf("entry %d of term %d is not there", i, term)
		}
	}
	if last := r.snap.Index + uint64(len(r.entries)); last < p.Commit {
		return fmt.Sprintf("it ends with entry %d of %d that were committed", last, p.Commit)
	}
	return ""
}

func TestCrashImages(t *testing.T) {
	smallSegments(t, 8<<10)
	parent := t.TempDir()
	lines := record(t, parent)
	seed := cmp.Or(*crashSeed, rand.Uint64())
	t.Logf("-crash.seed=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	k := &disk{t: t, parent: parent, root: &inode{dir: true, names: map[string]*inode{}}, offsets: map[string]int64{}}
	dir := filepath.Join(t.TempDir(), "image")
	images, steps, failed := 0, 0, 0
	for _, line := range lines {
		if !k.step(line) {
			continue
		}
		steps++
		if !*crashAll && rng.IntN(12) != 0 {
			continue
		}
		ways := map[string]func(*inode) []diskOp{"nothing": keepNothing, "all": keepAll, "names": keepNames, "writes": keepWrites}
		for i := range 4 {
			ways[fmt.Sprint("some ", i)] = keepSome(rng)
		}
		if !*crashAll {
			maps.DeleteFunc(ways, func(string, func(*inode) []diskOp) bool { return rng.IntN(2) == 0 })
		}
		for _, way := range slices.Sorted(maps.Keys(ways)) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			if err := k.root.image(dir, ways[way]); err != nil {
				t.Fatal(err)
			}
			images++
			if broken := k.last.broken(t, filepath.Join(dir, "new", "data")); broken != "" {
				if failed++; failed < 20 {
					t.Errorf("after call %d (%.150s), %s of what was not synced is kept: %s", steps, line, way, broken)
				}
			}
		}
	}
	t.Logf("%d images after %d system calls", images, steps)
	if steps < 300 || k.last.Removed != "is" {
		t.Errorf("the trace has %d calls and ends with %+v", steps, k.last)
	}
	// The model is worth as much as it is like the disk.
	if err := errors.Join(os.RemoveAll(dir), k.root.image(dir, keepAll)); err != nil {
		t.Fatal(err)
	}
	sameFiles(t, filepath.Join(parent, "new"), filepath.Join(dir, "new"))
}

func sameFiles(t *testing.T, a, b string) {
	t.Helper()
	list := func(dir string) map[string]string {
		files := map[string]string{}
		if err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			rel, _ := filepath.Rel(dir, path)
			data, err := os.ReadFile(path)
			files[rel] = string(data)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return files
	}
	x, y := list(a), list(b)
	for name := range x {
		if x[name] != y[name] {
			t.Errorf("the model's %s is not what the disk has (%d and %d bytes)", name, len(y[name]), len(x[name]))
		}
	}
	if len(x) != len(y) {
		t.Errorf("the model has %v, the disk %v", slices.Sorted(maps.Keys(y)), slices.Sorted(maps.Keys(x)))
	}
}
