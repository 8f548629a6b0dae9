//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Disks that fail, stall and fill up, under real processes. System calls are made
// to fail or to wait by strace; a full disk is a small file system of its own.

// tracer is an strace that is attached to a process. When it ends the process
// goes on undisturbed.
type tracer struct {
	t    *testing.T
	cmd  *exec.Cmd
	log  string // what was injected
	done chan struct{}
}

// inject attaches to p. args say what happens to which system calls. Nothing of a
// process that is stopped by a signal waits for it: the tracer is ready when
// inject returns.
func (p *process) inject(args ...string) *tracer {
	p.t.Helper()
	path, err := exec.LookPath("strace")
	if err != nil {
		p.t.Skip("needs strace, to make system calls fail: it is not installed")
	}
	f := &tracer{t: p.t, log: filepath.Join(p.t.TempDir(), "injected"), done: make(chan struct{})}
	f.cmd = exec.Command(path, append([]string{"-f", "-y", "-o", f.log, "-p", strconv.Itoa(p.cmd.Process.Pid)}, args...)...)
	attr := launchAttr
	f.cmd.SysProcAttr = &attr
	var says output
	f.cmd.Stderr = &says
	if err := f.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	go func() {
		_ = f.cmd.Wait() // killed, or its process ended
		close(f.done)
	}()
	p.t.Cleanup(f.stop)
	waitFor(p.t, "strace to attach", func() bool {
		if strings.Contains(says.String(), "attached") {
			return true // and its process may have ended since
		}
		select {
		case <-f.done:
			if strings.Contains(says.String(), "ermitted") {
				p.t.Skipf("needs to trace its own processes, to make system calls fail: %s", says.String())
			}
			if !strings.Contains(says.String(), "attached") {
				p.t.Fatalf("strace ended: %s", says.String())
			}
		default:
		}
		return false
	})
	return f
}

// stop undoes what the tracer does.
func (f *tracer) stop() {
	_ = f.cmd.Process.Kill() // it may have ended with its process
	<-f.done
}

// injected are the calls that were tampered with.
func (f *tracer) injected() (lines []string) {
	f.t.Helper()
	b, err := os.ReadFile(f.log)
	if err != nil {
		f.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "(INJECTED)") || strings.Contains(line, "(DELAYED)") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// segment is the log file that a member writes to.
func (s *site) segment(id int) string {
	s.t.Helper()
	return segmentIn(s.t, s.data(id))
}

func segmentIn(t *testing.T, dataDir string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dataDir, "wal", "*.wal"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no log in %s: %v", dataDir, err)
	}
	return slices.Max(names)
}

func (s *site) clients() *clients {
	var urls []string
	for _, port := range s.ports[:s.listed] {
		urls = append(urls, fmt.Sprintf("http://127.0.0.1:%d", port))
	}
	via := &http.Client{Timeout: 1500 * time.Millisecond, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	return newClients(s.t, uint64(time.Now().UnixNano()), 0, via, urls)
}

// A write or a sync that fails ends the process at once, with its own exit code,
// and is not tried again: after a failed sync the kernel may take for clean what
// never reached the disk, and say so to whoever asks again.
func TestProcessSyncFails(t *testing.T) {
	t.Parallel()
	for _, members := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d members", members), func(t *testing.T) {
			t.Parallel()
			s := newSite(t, members, 0)
			var ids []int
			for id := 1; id <= members; id++ {
				ids = append(ids, id)
			}
			s.start(ids...)
			c := s.clients()
			for i, call := range []string{"fdatasync:error=EIO", "pwrite64:error=EIO", "pwrite64:error=ENOSPC", "pwrite64:error=EIO of synced"} {
				c.round.Store(int64(i))
				c.grow(30)
				victim := s.leader()
				if i%2 == 1 && members > 1 {
					victim = s.others(victim)[0]
				}
				p := s.nodes[victim]
				file := s.segment(victim)
				call, ofMark := strings.CutSuffix(call, " of synced")
				if ofMark {
					file = filepath.Join(s.data(victim), "synced")
				}
				name, _, _ := strings.Cut(call, ":")
				f := p.inject("-P", file, "-e", "trace="+name, "-e", "inject="+call)
				waitFor(t, "the call to fail", func() bool { return len(f.injected()) > 0 })
				at := time.Now()
				badStart{3, "the disk failed"}.check(t, p)
				took := time.Since(at)
				if took > time.Second {
					t.Errorf("%s: ended %v later, want 1s", call, took)
				}
				f.stop()
				if n := f.injected(); len(n) != 1 {
					t.Errorf("%s: tried again after it failed:\n%s", call, strings.Join(n, "\n"))
				}
				if members > 1 {
					c.grow(30)
				}
				t.Logf("%s on member %d: exit code 3 after %v", call, victim, took.Round(time.Millisecond))
				s.start(victim)
			}
			c.grow(30)
			c.verify()
		})
	}
}

// What the disk cannot give back is refused at start, by name.
func TestProcessReadFails(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.start(1)
	s.nodes[1].put("my-key", "hello")
	segment := s.segment(1)
	s.nodes[1].inject("-P", segment, "-e", "trace=none").stop() // skips where strace is of no use
	s.nodes[1].stop()
	snaps, err := filepath.Glob(filepath.Join(s.data(1), "snap", "*.snap.db"))
	if err != nil || len(snaps) == 0 {
		t.Fatalf("no snapshot: %v", err)
	}
	for file, code := range map[string]int{segment: 1, snaps[0]: 1, filepath.Join(s.data(1), "synced"): 3, filepath.Join(s.data(1), "boots"): 3} {
		p := launchUnder(t, s.dir, []string{"strace", "-D", "-f", "-qq", "-o", os.DevNull, "-P", file, "-e", "trace=read,pread64", "-e", "inject=read,pread64:error=EIO"}, s.args(1)...)
		badStart{code, "input/output error"}.check(t, p)
		t.Log(tail(p.stderr.String(), 1))
	}
	s.start(1)
	s.nodes[1].get("my-key", "hello")
}

// A disk that hangs. Nothing fails, so nobody learns of it but by the silence.
func TestProcessDiskStalls(t *testing.T) { // not parallel: it compares rates
	const stall = "inject=fdatasync:delay_enter=3600000000"
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	c := s.clients()
	c.grow(30)

	leader := s.leader()
	at := time.Now()
	f := s.nodes[leader].inject("-e", "trace=fdatasync", "-e", stall)
	c.expect(leader)
	var took time.Duration
	waitFor(t, "another leader", func() bool {
		took = time.Since(at)
		for _, id := range s.others(leader) {
			if st, err := s.nodes[id].status(); err != nil || st.Leader == 0 || int(st.Leader) == leader {
				return false
			}
		}
		return true
	})
	c.grow(60)
	t.Logf("the leader's disk hangs: another leads after %v, longest gap between writes %v", took.Round(time.Millisecond), c.gap(at).Round(time.Millisecond))
	if limit := 3 * 900 * time.Millisecond; c.gap(at) > limit+busyMachine {
		t.Errorf("no write for %v while the leader's disk hung; want %v", c.gap(at), limit)
	}
	f.stop()
	s.nodes[leader].ready()
	c.expect()

	c.round.Store(1)
	follower := s.others(s.leader())[0]
	c.expect(follower)
	rest := s.others(follower)
	rate := func() float64 {
		l := s.load(rest...)
		at := time.Now()
		l.grow(500)
		took := time.Since(at)
		l.stop()
		return 500 / took.Seconds()
	}
	before := rate()
	f = s.nodes[follower].inject("-e", "trace=fdatasync", "-e", stall)
	during := rate()
	t.Logf("writes a second: %.0f, with a follower whose disk hangs %.0f", before, during)
	if during < before/3 {
		t.Errorf("%.0f writes a second with a follower whose disk hangs, %.0f without: the others wait for it", during, before)
	}
	f.stop()
	s.nodes[follower].ready()
	c.verify()
}

// busyMachine is what bounds on time leave for tests that run beside each other.
const busyMachine = 2 * time.Second

// The only member's disk hangs: nothing is acknowledged, every request ends in
// time, and what is refused for certain does not happen later either.
func TestProcessOnlyDiskStalls(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.start(1)
	c := s.clients()
	c.grow(30)
	f := s.nodes[1].inject("-e", "trace=fdatasync", "-e", "inject=fdatasync:delay_enter=3600000000")
	var before int
	for i := range 4 {
		if i == 1 { // the first may yet meet a disk that does not hang
			before = c.count()
		}
		at := time.Now()
		a, err := s.nodes[1].try(http.MethodPut, "/my-key?timeout=300ms", "during")
		if took := time.Since(at); err != nil || a.status != http.StatusGatewayTimeout && a.status != http.StatusServiceUnavailable && a.status != http.StatusTooManyRequests || took > time.Second {
			t.Errorf("a write while the disk hangs: %d %q %v after %v", a.status, a.body, err, took)
		}
	}
	s.nodes[1].want(http.StatusOK, http.MethodGet, "/v1/status", "")
	if n := c.count(); n > before {
		t.Errorf("%d writes were acknowledged while the disk hung", n-before)
	}
	f.stop()
	c.grow(30)
	c.verify()
}

// smallDisks are file systems of their own, one a member. They are mounted where
// only one thread of the tests and the processes that it starts see them, so that
// nothing stays mounted whatever ends the tests.
type smallDisks struct {
	t       *testing.T
	calls   chan func() // never closed: see newSmallDisks
	root    string      // shows the mounts to all threads
	mounted []string
}

func newSmallDisks(t *testing.T) *smallDisks {
	t.Helper()
	for _, program := range []string{"mkfs.ext4", "filefrag", "findmnt", "mount"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s, to make a small disk: it is not installed", program)
		}
	}
	d := &smallDisks{t: t, calls: make(chan func())}
	ready := make(chan error)
	go func() {
		// For good: no other goroutine may have a thread that sees other files. Nor may the
		// thread end: with it would end all processes that it started for other tests, before
		// it came here (see launchAttr).
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		d.root = fmt.Sprintf("/proc/%d/task/%d/root", os.Getpid(), unix.Gettid())
		ready <- err
		for f := range d.calls {
			f()
		}
	}()
	t.Cleanup(func() {
		if d.mounted != nil {
			d.do(func() {
				for _, dir := range d.mounted {
					_ = unix.Unmount(dir, unix.MNT_DETACH) // the test may have done so
				}
			})
		}
	})
	if err := <-ready; errors.Is(err, unix.EPERM) {
		t.Skipf("needs root, to mount a disk of its own: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	return d
}

// do runs f where the disks are mounted.
func (d *smallDisks) do(f func()) {
	done := make(chan struct{})
	d.calls <- func() { defer close(done); f() }
	<-done
}

func (d *smallDisks) run(name string, args ...string) string {
	d.t.Helper()
	var out []byte
	var err error
	d.do(func() { out, err = exec.Command(name, args...).CombinedOutput() })
	if err != nil && bytes.Contains(out, []byte("loop")) {
		d.t.Skipf("needs loop devices, for a disk that is soon full: %s", out)
	} else if err != nil {
		d.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// mount makes a disk of size bytes at dir out of a file.
func (d *smallDisks) mount(dir, image string, size int64) {
	d.t.Helper()
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.MkdirAll(filepath.Dir(image), 0o700)); err != nil {
		d.t.Fatal(err)
	}
	d.run("truncate", "-s", strconv.FormatInt(size, 10), image)
	// Blocks of 4096, so that the bitmaps of all groups lie at the beginning: where
	// shrink hides one, the kernel tries to write for ever, and no process with it ends.
	d.run("mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-J", "size=4,location=4M", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
	d.run("mount", "-o", "loop", image, dir)
	d.mounted = append(d.mounted, dir)
}

// shrink lets everything on the device of dir fail that is at or beyond a byte; 0
// ends that. What was written there stays.
func (d *smallDisks) shrink(dir string, from uint64) {
	d.t.Helper()
	device, err := os.OpenFile(strings.TrimSpace(d.run("findmnt", "-n", "-o", "SOURCE", dir)), os.O_RDWR, 0)
	if err != nil {
		d.t.Fatal(err)
	}
	defer device.Close()
	waitFor(d.t, "the device to change", func() bool {
		info, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
		if err == nil {
			info.Sizelimit = from
			err = unix.IoctlLoopSetStatus64(int(device.Fd()), info)
		}
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			d.t.Fatal(err)
		}
		return err == nil
	})
}

// place is where on its device a file begins.
func (d *smallDisks) place(file string) uint64 {
	d.t.Helper()
	says := d.run("filefrag", "-v", file)
	m := regexp.MustCompile(`(?s)of (\d+) bytes.*? 0: +0\.\. *\d+: +(\d+)\.\.`).FindStringSubmatch(says)
	if m == nil {
		d.t.Fatalf("filefrag says %s", says)
	}
	size, _ := strconv.ParseUint(m[1], 10, 64)
	block, _ := strconv.ParseUint(m[2], 10, 64)
	return size * block
}

// fullSite is a site of members on small disks.
type fullSite struct {
	*site
	disks *smallDisks
}

// smallDisk holds two segments of the log, as much again as most tests write, and
// the smallest --disk-reserve.
const smallDisk = 320 << 20

func newFullSite(t *testing.T, n int, flags ...string) *fullSite {
	t.Helper()
	s := &fullSite{newSite(t, n, 0, flags...), newSmallDisks(t)}
	for id := 1; id <= n; id++ {
		s.disks.mount(s.data(id), s.image(id), smallDisk)
	}
	return s
}

func (s *fullSite) image(id int) string {
	return filepath.Join(s.dir, "images", filepath.Base(s.data(id))+".ext4")
}

func (s *fullSite) spawn(id int) *process {
	s.t.Helper()
	program(s.t)
	s.disks.do(func() { s.site.spawn(id) })
	return s.nodes[id]
}

func (s *fullSite) start(ids ...int) {
	s.t.Helper()
	for _, id := range ids {
		s.spawn(id)
	}
	for _, id := range ids {
		s.nodes[id].ready()
	}
}

// path is a file of a member's disk.
func (s *fullSite) path(id int, name string) string {
	return filepath.Join(s.disks.root, s.data(id), name)
}

// fill leaves a member so many bytes, give or take a block.
func (s *fullSite) fill(id int, left int64) {
	s.t.Helper()
	fillDisk(s.t, s.path(id, ""), left)
}

func fillDisk(t *testing.T, dir string, left int64) {
	t.Helper()
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "filler"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	had, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	more := int64(st.Bavail)*st.Bsize - left
	for more >= st.Bsize { // the file system keeps some for itself
		if err := syscall.Fallocate(int(f.Fd()), 0, had, more); err == nil {
			break
		} else if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		more -= st.Bsize
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func (s *fullSite) empty(id int) {
	s.t.Helper()
	if err := os.Remove(s.path(id, "filler")); err != nil {
		s.t.Fatal(err)
	}
}

// answers waits until a write on a member has this status.
func (s *fullSite) answers(id, status int) time.Duration {
	s.t.Helper()
	at := time.Now()
	waitFor(s.t, fmt.Sprintf("member %d to answer a write with %d", id, status), func() bool {
		a, err := s.nodes[id].try(http.MethodPut, "/full", "value")
		return err == nil && a.status == status
	})
	return time.Since(at)
}

// A disk that is nearly full refuses writes on its member only, and takes them
// again once there is room. A snapshot that finds none is put off.
func TestProcessDiskFull(t *testing.T) {
	t.Parallel()
	s := newFullSite(t, 3, "--disk-reserve", "128MiB", "--snapshot-entries", "40")
	s.start(1, 2, 3)
	large := strings.Repeat("x", 1<<20)
	for i := range 8 {
		s.nodes[1].put(fmt.Sprintf("large-%d", i), large)
	}
	leader := s.leader()
	for _, id := range []int{leader, s.others(leader)[0]} {
		fill := func() {
			spare := s.path(id, "snap/spare.tmp") // what was purged is room enough for the next
			if err := os.Remove(spare); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			s.fill(id, 1<<20) // less than a snapshot
		}
		fill()
		t.Logf("member %d refuses writes after %v", id, s.answers(id, http.StatusInsufficientStorage).Round(time.Millisecond))
		s.nodes[id].get("large-7", large)
		l := s.load(s.others(id)...)
		l.grow(50)
		waitFor(t, "a snapshot to be put off", func() bool { // the log of the full member grows as well
			fill()
			return strings.Contains(s.nodes[id].stderr.String(), "no room for a snapshot")
		})
		l.stop()
		s.nodes[id].get("large-7", large)
		if tmp, err := filepath.Glob(s.path(id, "snap/*.tmp")); err != nil || len(tmp) > 1 {
			t.Errorf("left behind: %v, %v", tmp, err)
		}
		before, err := s.nodes[id].status()
		if err != nil {
			t.Fatal(err)
		}
		s.empty(id)
		healed := s.answers(id, http.StatusNoContent)
		t.Logf("member %d takes writes %v after there was room", id, healed.Round(time.Millisecond))
		if healed > 5*time.Second {
			t.Errorf("member %d took no write for %v after there was room", id, healed)
		}
		waitFor(t, "the snapshot that was put off", func() bool {
			s.nodes[id].put("full", "again")
			st, err := s.nodes[id].status()
			return err == nil && st.SnapshotIndex > before.SnapshotIndex
		})
		l.verify()
	}
	for id := range s.nodes {
		s.fill(id, 0)
	}
	for id := range s.nodes {
		s.answers(id, http.StatusInsufficientStorage)
		s.nodes[id].get("large-7", large)
	}
	s.killAll()
	for id := range s.nodes { // what a crash left half written may be room enough
		p := s.spawn(id)
		waitFor(t, "it to serve or to refuse", func() bool {
			return !p.running() || strings.Contains(p.stderr.String(), "serves clients")
		})
		if !p.running() {
			badStart{1, "no space left"}.check(t, p)
		}
	}
	for id, p := range s.nodes {
		s.empty(id)
		if !p.running() {
			s.spawn(id)
		}
	}
	for id := range s.nodes {
		s.answers(id, http.StatusNoContent)
		s.nodes[id].get("large-7", large)
	}
}

// A disk that is full to the last byte ends its member when the log needs a new
// segment, and only then; with room again it starts and has everything.
func TestProcessDiskEmpty(t *testing.T) {
	if *chaosDuration == 0 {
		t.Skip("fills a segment of the log on three members: make chaos runs it")
	}
	t.Parallel()
	s := newFullSite(t, 3, "--disk-reserve", "0")
	s.start(1, 2, 3)
	victim := s.others(s.leader())[0]
	rest := s.others(victim)
	s.nodes[victim].put("before", "hello")
	s.fill(victim, 0)
	large := strings.Repeat("x", 1<<20)
	written := 0
	for ; s.nodes[victim].running() && written < 80; written++ { // a segment is 64 MiB
		s.nodes[rest[written%2]].want(http.StatusNoContent, http.MethodPut, fmt.Sprintf("/large-%d", written%8), large)
	}
	badStart{3, "no space left"}.check(t, s.nodes[victim])
	s.nodes[rest[0]].put("after", "hello")
	s.empty(victim)
	s.start(victim)
	s.nodes[victim].get("before", "hello")
	s.nodes[victim].get("after", "hello")
	s.nodes[victim].get("large-7", large)
	s.answers(victim, http.StatusNoContent)
	t.Logf("member %d ended after %d MiB that its disk had no room for", victim, written)
}

// A sync that failed leaves pages in memory that the kernel takes for clean and
// that never reached the disk. A process that starts again would read them as if
// they had, and a sync would say yes. What it serves must still be there after a
// power loss, for which the end of the mount stands here.
func TestProcessLostSync(t *testing.T) {
	t.Parallel()
	s := newFullSite(t, 1, "--disk-reserve", "0")
	s.start(1)
	n := s.nodes[1]
	n.put("before", "hello")
	s.disks.run("sync", "-f", s.data(1)) // so that only the log is still to be written
	log := s.disks.place(strings.TrimPrefix(segmentIn(t, s.path(1, "")), s.disks.root))
	s.disks.shrink(s.data(1), log)
	large := strings.Repeat("x", 1<<20)
	acked := 0
	for ; n.running() && acked < 8; acked++ {
		a, err := n.try(http.MethodPut, fmt.Sprintf("/large-%d", acked), large)
		if err != nil || a.status != http.StatusNoContent {
			break
		}
	}
	badStart{3, "the disk failed"}.check(t, n)
	s.disks.shrink(s.data(1), 0)

	read := func() (statuses []int) {
		for i := range acked + 1 {
			a, err := s.nodes[1].try(http.MethodGet, fmt.Sprintf("/large-%d", i), "")
			if err != nil || i < acked && a.body != large {
				t.Errorf("write %d of %d that were acknowledged reads %d, %v", i, acked, a.status, err)
			}
			statuses = append(statuses, a.status)
		}
		return statuses
	}
	s.start(1)
	first := read()
	s.nodes[1].put("after", "hello")
	s.nodes[1].crash()
	s.disks.run("umount", s.data(1))
	s.disks.run("mount", "-o", "loop", s.image(1), s.data(1))
	s.start(1)
	if second := read(); !slices.Equal(first, second) {
		t.Errorf("what was read before the power loss with %v is read with %v", first, second)
	}
	s.nodes[1].get("before", "hello")
	s.nodes[1].get("after", "hello")
	t.Logf("%d writes were acknowledged, the one whose sync failed is read with %d", acked, first[acked])
}
