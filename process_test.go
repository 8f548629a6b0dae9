// Tests of the program as an operator meets it: real processes, ports, signals
// and data directories.
//
// long: one harness, and every test here needs it

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pontoon/api"
)

// built is the program, built once and only if a test asks for it.
var built struct {
	once      sync.Once
	dir, path string
	err       error
}

func TestMain(m *testing.M) {
	flag.Parse()
	shareCores()
	shortSegments()
	code := m.Run()
	if built.dir != "" {
		if err := os.RemoveAll(built.dir); err != nil {
			fmt.Fprintln(os.Stderr, "remove the test binary:", err)
		}
	}
	os.Exit(code)
}

// shareCores lets twice as many tests run in parallel as there are cores, unless
// -parallel says otherwise: those that do wait for processes and their timers most
// of the time. What measures how fast something is, or keeps a core busy, is not
// parallel.
func shareCores() {
	set := false
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == "test.parallel" })
	if !set {
		_ = flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0))) // a number, as it wants
	}
}

// shortSegments is for members within the tests. A start reads a segment to its end,
// and 64 MiB of nothing are more work than most tests. Processes have the real size.
func shortSegments() { segmentBytes = 4 << 20 }

// program builds pontoon, without the race detector even where the tests have
// it: the binary is the one that users run.
func program(t *testing.T) string {
	t.Helper()
	b := &built
	b.once.Do(func() {
		if b.dir, b.err = os.MkdirTemp("", "pontoon-test-"); b.err != nil {
			return
		}
		b.path = filepath.Join(b.dir, "pontoon")
		out, err := exec.Command("go", "build", "-o", b.path, ".").CombinedOutput()
		if err != nil {
			b.err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if b.err != nil {
		t.Fatal(b.err)
	}
	return b.path
}

// output collects what a process writes, while it writes.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// process is one running pontoon.
type process struct {
	t              *testing.T
	name           string
	url            string       // of its client port; empty: none is expected
	via            *http.Client // nil: web
	cmd            *exec.Cmd
	stdout, stderr output
	exited         chan struct{} // closed once it has ended and all its output is here
}

// launchAttr are how processes are started. Where the system can, they end with
// the tests, however those end.
var launchAttr = syscall.SysProcAttr{Setpgid: true}

// launch runs the program in dir, with env on top of an environment that is
// free of PONTOON_ variables. It is killed with its group when the test ends.
func launch(t *testing.T, dir string, env []string, args ...string) *process {
	t.Helper()
	return launchCommand(t, dir, env, exec.Command(program(t), args...), args)
}

// launchLimited is launch under a limit of open files.
func launchLimited(t *testing.T, dir string, files int, args ...string) *process {
	t.Helper()
	shell := []string{"-c", fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, files), program(t)}
	return launchCommand(t, dir, nil, exec.Command("sh", append(shell, args...)...), args)
}

// launchUnder is launch by means of another program and its arguments, which
// becomes pontoon.
func launchUnder(t *testing.T, dir string, wrapper []string, args ...string) *process {
	t.Helper()
	return launchCommand(t, dir, nil, exec.Command(wrapper[0], slices.Concat(wrapper[1:], []string{program(t)}, args)...), args)
}

func launchCommand(t *testing.T, dir string, env []string, cmd *exec.Cmd, args []string) *process {
	t.Helper()
	p := &process{t: t, name: "pontoon " + strings.Join(args, " "), cmd: cmd, exited: make(chan struct{})}
	p.cmd.Dir = dir
	p.cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "PONTOON_") }), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	attr := launchAttr
	p.cmd.SysProcAttr = &attr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // the state has the exit code
		close(p.exited)
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // it may have ended long ago
		<-p.exited
		if t.Failed() {
			t.Logf("%s\n%s", p.name, tail(p.stderr.String(), 40))
		}
	})
	return p
}

func tail(s string, lines int) string {
	all := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func (p *process) signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatalf("%s: %v: %v", p.name, sig, err)
	}
}

// wait returns the exit code (-1 for a signal) and fails after the limit.
func (p *process) wait(limit time.Duration) int {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(limit):
		p.t.Fatalf("%s: still running after %v", p.name, limit)
	}
	return p.cmd.ProcessState.ExitCode()
}

// stop ends the process as an operator would and wants exit code 0.
func (p *process) stop() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	if code := p.wait(10 * time.Second); code != 0 {
		p.t.Fatalf("%s: exit code %d after SIGTERM", p.name, code)
	}
}

func (p *process) crash() {
	p.t.Helper()
	p.signal(syscall.SIGKILL)
	p.wait(10 * time.Second)
}

func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// ready waits until the member serves.
func (p *process) ready() {
	p.t.Helper()
	waitFor(p.t, p.name+" to be ready", func() bool {
		if !p.running() {
			p.t.Fatalf("%s: exit code %d before it was ready", p.name, p.cmd.ProcessState.ExitCode())
		}
		a, err := p.try(http.MethodGet, "/readyz", "")
		return err == nil && a.status == http.StatusOK
	})
}

// web talks to the processes. No request waits longer than the server's own
// longest default.
var web = &http.Client{Timeout: 7 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

type reply struct {
	status int
	header http.Header
	body   string
}

// try sends one request. target begins with a slash and is sent as it stands.
func (p *process) try(method, target, body string) (reply, error) {
	req, err := http.NewRequest(method, p.url+target, strings.NewReader(body))
	if err != nil {
		return reply{}, err
	}
	resp, err := p.client().Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, string(b)}, err
}

func (p *process) client() *http.Client {
	if p.via != nil {
		return p.via
	}
	return web
}

// want sends one request and compares the status.
func (p *process) want(status int, method, target, body string) reply {
	p.t.Helper()
	a, err := p.try(method, target, body)
	if err != nil {
		p.t.Fatalf("%s %s: %v", method, target, err)
	}
	if a.status != status {
		p.t.Fatalf("%s %s: %d %q, want %d", method, target, a.status, a.body, status)
	}
	return a
}

func (p *process) put(key, value string) {
	p.t.Helper()
	p.want(http.StatusNoContent, http.MethodPut, "/"+key, value)
}

func (p *process) get(key, value string) {
	p.t.Helper()
	if a := p.want(http.StatusOK, http.MethodGet, "/"+key, ""); a.body != value {
		p.t.Fatalf("%s: GET /%s: %q, want %q", p.name, key, a.body, value)
	}
}

func (p *process) status() (st api.Status, err error) {
	a, err := p.try(http.MethodGet, "/v1/status", "")
	if err != nil {
		return st, err
	}
	return st, json.Unmarshal([]byte(a.body), &st)
}

// site is the processes of one cluster. They run in dir, so their data is in
// dir/pontoon-1 and so on.
type site struct {
	t      *testing.T
	dir    string
	flags  []string // of every process
	ports  []int    // client port of member i+1
	peers  []string // peer URL of member i+1
	listed int      // how many of them --cluster names
	nodes  map[int]*process
}

// newSite picks addresses for n members and some that join later. It starts none.
func newSite(t *testing.T, n, joiners int, flags ...string) *site {
	t.Helper()
	s := &site{t: t, dir: t.TempDir(), flags: flags, listed: n, nodes: map[int]*process{}}
	free := freePorts(t, 2*(n+joiners))
	for i := range n + joiners {
		s.ports = append(s.ports, free[2*i])
		s.peers = append(s.peers, fmt.Sprintf("http://127.0.0.1:%d", free[2*i+1]))
	}
	return s
}

// takenPorts are those that freePorts gave out.
var takenPorts sync.Map

// freePorts are ports on which nobody listens now. No test gets what another had,
// and they lie below those that systems give to who asks for any port, which every
// connection does: a member that is started again would find its own taken.
func freePorts(t *testing.T, n int) []int {
	t.Helper()
	const low, high = 10_000, 32_768
	var ports []int
	for range high {
		if len(ports) == n {
			return ports
		}
		port := low + rand.IntN(high-low)
		if _, taken := takenPorts.LoadOrStore(port, true); taken {
			continue
		}
		if l, err := net.Listen("tcp", fmt.Sprintf(":%d", port)); err == nil {
			l.Close()
			ports = append(ports, port)
		}
	}
	t.Fatalf("no %d ports are free", n)
	return nil
}

func (s *site) cluster() string { return strings.Join(s.peers[:s.listed], ",") }
func (s *site) data(id int) string {
	return filepath.Join(s.dir, fmt.Sprintf("pontoon-%d", id))
}

func (s *site) args(id int) []string {
	return append([]string{"--id", strconv.Itoa(id), "--cluster", s.cluster(), "--port", strconv.Itoa(s.ports[id-1])}, s.flags...)
}

// spawn starts one member and does not wait for it.
func (s *site) spawn(id int, flags ...string) *process {
	s.t.Helper()
	p := launch(s.t, s.dir, nil, append(s.args(id), flags...)...)
	p.url = fmt.Sprintf("http://127.0.0.1:%d", s.ports[id-1])
	s.nodes[id] = p
	return p
}

// start starts members and waits until all of them serve.
func (s *site) start(ids ...int) {
	s.t.Helper()
	for _, id := range ids {
		s.spawn(id)
	}
	for _, id := range ids {
		s.nodes[id].ready()
	}
}

// leader waits until all running members agree on one of them.
func (s *site) leader() int {
	s.t.Helper()
	leader := 0
	waitFor(s.t, "a leader", func() bool {
		leader = 0
		for _, p := range s.nodes {
			if !p.running() {
				continue
			}
			st, err := p.status()
			if err != nil || st.Leader == 0 || leader != 0 && int(st.Leader) != leader {
				return false
			}
			leader = int(st.Leader)
		}
		return s.nodes[leader] != nil && s.nodes[leader].running()
	})
	return leader
}

// others are the started members but one.
func (s *site) others(id int) (out []int) {
	for other := range s.nodes {
		if other != id {
			out = append(out, other)
		}
	}
	slices.Sort(out)
	return out
}

// load writes unique values under unique keys until it is stopped. Each writer
// waits for its answer and a little longer; when a member does not answer with
// a 2xx, the writer goes on to the next one.
type load struct {
	s      *site
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     struct {
		sync.Mutex
		acked map[string]string
		times []time.Time // of the acknowledgements, ascending
	}
}

const (
	loadWriters = 12
	loadPause   = 4 * time.Millisecond
)

func (s *site) load(ids ...int) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{s: s, cancel: cancel}
	l.mu.acked = map[string]string{}
	run := rand.Uint32()
	for w := range loadWriters {
		urls := make([]string, len(ids))
		for i := range ids {
			urls[i] = s.nodes[ids[(i+w)%len(ids)]].url
		}
		l.wg.Go(func() { l.write(ctx, fmt.Sprintf("load-%08x-%d-", run, w), urls) })
	}
	s.t.Cleanup(l.stop)
	return l
}

func (l *load) write(ctx context.Context, prefix string, urls []string) {
	pace := time.NewTicker(loadPause)
	defer pace.Stop()
	for n, at := 0, 0; ; n++ {
		select {
		case <-pace.C:
		case <-ctx.Done():
			return
		}
		key := prefix + strconv.Itoa(n)
		p := process{url: urls[at]}
		a, err := p.try(http.MethodPut, "/"+key+"?timeout=3s", "value of "+key)
		if err != nil || a.status/100 != 2 {
			at = (at + 1) % len(urls)
			continue
		}
		l.mu.Lock()
		l.mu.acked[key] = "value of " + key
		l.mu.times = append(l.mu.times, time.Now())
		l.mu.Unlock()
	}
}

// stop lets every write finish.
func (l *load) stop() {
	l.cancel()
	l.wg.Wait()
}

func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.mu.times)
}

// grow waits for more acknowledged writes.
func (l *load) grow(n int) {
	l.s.t.Helper()
	from := l.count()
	waitFor(l.s.t, fmt.Sprintf("%d more writes", n), func() bool { return l.count() >= from+n })
}

// gap is the longest time without an acknowledgement that ends after since.
func (l *load) gap(since time.Time) (worst time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := 1; i < len(l.mu.times); i++ {
		if l.mu.times[i].After(since) {
			worst = max(worst, l.mu.times[i].Sub(l.mu.times[i-1]))
		}
	}
	return worst
}

// verify reads every acknowledged write back, linearizably, from all members in
// turn. Each key was written once, so a version above 1 is a write applied twice.
func (l *load) verify() {
	l.s.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	var running []*process
	for _, p := range l.s.nodes {
		if p.running() {
			running = append(running, p)
		}
	}
	type lost struct{ key, got string }
	keys, bad := make(chan string), make(chan lost, len(l.mu.acked))
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for key := range keys {
				a, err := running[w%len(running)].try(http.MethodGet, "/"+key, "")
				if version := a.header.Get("Kv-Version"); err != nil || a.status != http.StatusOK || a.body != l.mu.acked[key] || version != "1" {
					bad <- lost{key, fmt.Sprintf("%d %q version %s %v", a.status, a.body, version, err)}
				}
			}
		})
	}
	for key := range l.mu.acked {
		keys <- key
	}
	close(keys)
	wg.Wait()
	close(bad)
	n := 0
	for b := range bad {
		if n++; n <= 10 {
			l.s.t.Errorf("acknowledged write %s: read back %s", b.key, b.got)
		}
	}
	if n > 0 {
		l.s.t.Fatalf("%d of %d acknowledged writes are not there", n, len(l.mu.acked))
	}
	l.s.t.Logf("%d acknowledged writes, all there", len(l.mu.acked))
}

// The tour of raftexample's README, with its own calls and flags.
func TestProcessClassicTour(t *testing.T) {
	t.Parallel()
	t.Run("single node", func(t *testing.T) {
		s := newSite(t, 1, 0)
		s.start(1)
		s.nodes[1].put("my-key", "hello")
		s.nodes[1].get("my-key", "hello")
		if a := s.nodes[1].want(http.StatusNotFound, http.MethodGet, "/no-key", ""); a.body != "Failed to GET\n" {
			t.Errorf("an absent key: %q", a.body)
		}
	})
	t.Run("cluster", func(t *testing.T) {
		s := newSite(t, 3, 1)
		s.start(1, 2, 3)
		for w := range 3 {
			value := fmt.Sprintf("written to %d", w+1)
			s.nodes[w+1].put("my-key", value)
			for r := range 3 {
				s.nodes[r+1].get("my-key", value)
			}
		}

		s.nodes[2].stop()
		s.nodes[1].put("my-key", "while 2 was away")
		s.nodes[3].get("my-key", "while 2 was away")
		s.start(2)
		s.nodes[2].get("my-key", "while 2 was away")
		waitFor(t, "node 2 to have the value itself", func() bool {
			return s.nodes[2].want(http.StatusOK, http.MethodGet, "/my-key?consistency=stale", "").body == "while 2 was away"
		})

		s.nodes[1].want(http.StatusNoContent, http.MethodPost, "/4", s.peers[3])
		s.listed = 4
		s.spawn(4, "--join").ready()
		s.nodes[4].get("my-key", "while 2 was away")
		s.nodes[4].put("from-four", "hello")
		s.nodes[1].get("from-four", "hello")
		waitFor(t, "member 4 to be a voter", func() bool { return s.member(1, 4).Role == api.RoleVoter })
		s.nodes[1].want(http.StatusNoContent, http.MethodPost, "/4", s.peers[3]) // the same again
		s.nodes[1].want(http.StatusConflict, http.MethodPost, "/4", "http://127.0.0.1:1")

		s.nodes[1].want(http.StatusNoContent, http.MethodDelete, "/3", "")
		if code := s.nodes[3].wait(10 * time.Second); code != 0 {
			t.Errorf("the removed node: exit code %d, want 0", code)
		}
		if out := s.nodes[3].stderr.String(); !strings.Contains(out, "removed from the cluster") {
			t.Errorf("the removed node does not say why it ends:\n%s", out)
		}
		badStart{code: 1, says: "member 3 was removed from cluster"}.check(t, s.spawn(3))
		if err := os.RemoveAll(s.data(3)); err != nil {
			t.Fatal(err)
		}
		badStart{code: 1, says: "its id never comes back"}.check(t, s.spawn(3, "--join"))
		delete(s.nodes, 3)
		s.nodes[1].want(http.StatusConflict, http.MethodPost, "/3", s.peers[2])
		s.nodes[2].put("my-key", "three are left")
		s.nodes[4].get("my-key", "three are left")
	})
}

// member is a row of the member table as one process has it.
func (s *site) member(at, id int) api.Member {
	s.t.Helper()
	var list api.MemberList
	a := s.nodes[at].want(http.StatusOK, http.MethodGet, "/v1/members", "")
	if err := json.Unmarshal([]byte(a.body), &list); err != nil {
		s.t.Fatal(err)
	}
	for _, m := range list.Members {
		if m.ID == uint64(id) {
			return m
		}
	}
	return api.Member{}
}

func TestProcessFlags(t *testing.T) {
	t.Parallel()
	ports := freePorts(t, 3)
	port, peer, unused := strconv.Itoa(ports[0]), fmt.Sprintf("http://127.0.0.1:%d", ports[1]), strconv.Itoa(ports[2])
	for _, tt := range []struct {
		name string
		env  []string
		args []string
	}{
		{"two dashes", nil, []string{"--id", "1", "--cluster", peer, "--port", port}},
		{"one dash", nil, []string{"-id=1", "-cluster=" + peer, "-port=" + port, "-join=false"}},
		{"environment", []string{"PONTOON_ID=7", "PONTOON_CLUSTER=7=" + peer, "PONTOON_PORT=" + port, "PONTOON_DATA_DIR=elsewhere"}, nil},
		{"a flag wins", []string{"PONTOON_CLUSTER=" + peer, "PONTOON_PORT=" + unused}, []string{"--port", port}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := launch(t, t.TempDir(), tt.env, tt.args...)
			p.url = "http://127.0.0.1:" + port
			p.ready()
			p.put("my-key", tt.name)
			p.get("my-key", tt.name)
			if c, err := net.Dial("tcp", "127.0.0.1:"+unused); err == nil {
				c.Close()
				t.Error("serves on the port of the variable too")
			}
			if tt.name == "environment" {
				if st, err := p.status(); err != nil || st.ID != 7 {
					t.Errorf("id %d, %v; want 7", st.ID, err)
				}
				if _, err := os.Stat(filepath.Join(p.cmd.Dir, "elsewhere", "LOCK")); err != nil {
					t.Error(err)
				}
			}
			p.stop()
		})
	}

	for _, args := range [][]string{{"--help"}, {"-h"}, {"help"}} {
		help := launch(t, t.TempDir(), nil, args...)
		if code := help.wait(10 * time.Second); code != 0 || help.stderr.String() != "" {
			t.Errorf("%v: exit code %d, stderr %q", args, code, help.stderr.String())
		}
		for _, name := range flagNames(t) {
			if !strings.Contains(help.stdout.String(), "\n  -"+name+" ") && !strings.Contains(help.stdout.String(), "\n  -"+name+"\n") {
				t.Errorf("%v does not list --%s", args, name)
			}
		}
	}
	v := launch(t, t.TempDir(), nil, "version")
	if code := v.wait(10 * time.Second); code != 0 || !strings.HasPrefix(v.stdout.String(), "pontoon "+version+" ") {
		t.Errorf("version: exit code %d, %q", code, v.stdout.String())
	}
}

// flagNames are the flags that config.go defines, read from its source: the
// flag set itself lives inside parseConfig.
func flagNames(t *testing.T) (names []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "config.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if x, ok := sel.X.(*ast.Ident); !ok || x.Name != "fs" || !strings.HasSuffix(sel.Sel.Name, "Var") && sel.Sel.Name != "Func" {
			return true
		}
		for _, arg := range call.Args {
			if lit, ok := arg.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				name, _ := strconv.Unquote(lit.Value)
				names = append(names, name)
				break
			}
		}
		return true
	})
	if len(names) < 10 {
		t.Fatalf("found only the flags %v in config.go", names)
	}
	return names
}

// badStart is how a start that cannot succeed has to end: soon, with one line
// for the operator, and without a stack trace.
type badStart struct {
	code int
	says string
}

func (b badStart) check(t *testing.T, p *process) {
	t.Helper()
	if code := p.wait(15 * time.Second); code != b.code {
		t.Errorf("%s: exit code %d, want %d", p.name, code, b.code)
	}
	said := 0
	for line := range strings.Lines(p.stderr.String()) {
		text, ok := strings.CutPrefix(line, "pontoon: ")
		switch {
		case ok:
			said++
			if !strings.Contains(text, b.says) || strings.HasPrefix(text, "usage:") {
				t.Errorf("%s: says %q, want %q in it", p.name, text, b.says)
			}
		case b.code == 2 || !json.Valid([]byte(line)): // the log is JSON here
			t.Errorf("%s: beside its one line it says %q", p.name, line)
		case strings.Contains(line, "stacktrace") || strings.Contains(line, "goroutine "):
			t.Errorf("%s: logs a stack trace: %.300s", p.name, line)
		}
	}
	if said != 1 {
		t.Errorf("%s: %d lines for the operator, want 1:\n%s", p.name, said, p.stderr.String())
	}
	if out := p.stdout.String(); out != "" {
		t.Errorf("%s: writes %q to its standard output", p.name, out)
	}
}

func TestProcessBadStarts(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	used := taken.Addr().(*net.TCPAddr).Port
	usedURL := fmt.Sprintf("http://127.0.0.1:%d", used)
	ports := freePorts(t, 2)
	port, peer := strconv.Itoa(ports[0]), fmt.Sprintf("http://127.0.0.1:%d", ports[1])
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		badStart
		env  []string
		args []string
	}{
		{"client port taken", badStart{1, "with --port"}, nil, []string{"--cluster", peer, "--port", strconv.Itoa(used)}},
		{"client address taken", badStart{1, "with --listen-client"}, nil, []string{"--cluster", peer, "--listen-client", "127.0.0.1:" + strconv.Itoa(used)}},
		{"debug address taken", badStart{1, "with --listen-debug"}, nil, []string{"--cluster", peer, "--port", port, "--listen-debug", "127.0.0.1:" + strconv.Itoa(used)}},
		{"nobody to join", badStart{2, "--join needs"}, nil, []string{"--cluster", peer, "--port", port, "--join"}},
		{"peer port taken", badStart{1, strings.TrimPrefix(usedURL, "http://")}, nil, []string{"--cluster", usedURL, "--port", port}},
		{"data directory is a file", badStart{1, "--data-dir"}, nil, []string{"--cluster", peer, "--port", port, "--data-dir", "file"}},
		{"data directory inside a file", badStart{1, "--data-dir"}, nil, []string{"--cluster", peer, "--port", port, "--data-dir", "file/data"}},
		{"no URL", badStart{2, "cluster"}, nil, []string{"--cluster", "127.0.0.1:12379"}},
		{"URL without port", badStart{2, "host:port"}, nil, []string{"--cluster", "http://127.0.0.1"}},
		{"https URL", badStart{2, "http://"}, nil, []string{"--cluster", "https://127.0.0.1:1"}},
		{"URL twice", badStart{2, "twice"}, nil, []string{"--cluster", peer + "," + peer}},
		{"empty cluster", badStart{2, "cluster"}, nil, []string{"--cluster", ""}},
		{"id outside the list", badStart{2, "--id 4 is not in --cluster"}, nil, []string{"--id", "4", "--cluster", peer}},
		{"id 0", badStart{2, "--id"}, nil, []string{"--id", "0", "--cluster", peer}},
		{"unknown flag", badStart{2, "no-such-flag"}, nil, []string{"--no-such-flag"}},
		{"unexpected argument", badStart{2, `"serve"`}, nil, []string{"--port", port, "serve"}},
		{"flag without value", badStart{2, "port"}, nil, []string{"--port"}},
		{"bad variable", badStart{2, "PONTOON_PORT"}, []string{"PONTOON_PORT=many"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.check(t, launch(t, dir, tt.env, tt.args...)) })
	}

	t.Run("of a founder", func(t *testing.T) {
		s := newSite(t, 3, 3)
		first := s.spawn(1)
		waitFor(t, "node 1 to live", func() bool {
			a, err := first.try(http.MethodGet, "/livez", "")
			return err == nil && a.status == http.StatusOK
		})
		first.stop() // alone it has founded its part, and nothing more
		data := s.data(1)
		foreign := strings.Join(append([]string{s.peers[0]}, s.peers[3:5]...), ",")
		badStart{1, "--cluster"}.check(t, launch(t, s.dir, nil, "--cluster", foreign, "--port", port, "--data-dir", data))
		badStart{1, "belongs to member 1"}.check(t, launch(t, s.dir, nil, "--id", "2", "--cluster", s.cluster(), "--port", port, "--data-dir", data))
		moved := strings.Join(append([]string{s.peers[5]}, s.peers[1:3]...), ",")
		badStart{1, "--cluster says " + s.peers[5]}.check(t, launch(t, s.dir, nil, "--cluster", moved, "--port", port, "--data-dir", data))
	})
	t.Run("of a member with data", func(t *testing.T) {
		s := newSite(t, 1, 1)
		s.start(1)
		for i := range 20 {
			s.nodes[1].put(fmt.Sprintf("key-%d", i), strings.Repeat("value ", 100))
		}
		holder := fmt.Sprintf("process %d (member 1)", s.nodes[1].cmd.Process.Pid)
		badStart{1, holder}.check(t, launch(t, s.dir, nil, "--cluster", s.peers[1], "--port", port, "--data-dir", s.data(1)))
		s.nodes[1].get("key-7", strings.Repeat("value ", 100)) // the holder did not notice
		s.nodes[1].stop()

		snaps := filepath.Join(s.data(1), "snap")
		if err := os.Rename(snaps, snaps+".away"); err != nil {
			t.Fatal(err)
		}
		badStart{1, "no usable snapshot"}.check(t, s.spawn(1))
		if err := errors.Join(os.RemoveAll(snaps), os.Rename(snaps+".away", snaps)); err != nil {
			t.Fatal(err)
		}

		log, frames := logFrames(t, s.data(1))
		middle := frames[len(frames)/2]
		flipBit(t, log, middle.data+middle.size-1)
		badStart{1, "is damaged"}.check(t, s.spawn(1))
		badStart{1, "is damaged"}.check(t, s.spawn(1)) // the refusal changed nothing
		flipBit(t, log, middle.data+middle.size-1)
		s.start(1)
		s.nodes[1].get("key-7", strings.Repeat("value ", 100))
	})
}

// logFrame is where one frame of a log segment stands (see internal/wal): its head,
// its records, the padding.
type logFrame struct{ at, data, size, end int64 }

const (
	logFrames0 = 4096 // where the first frame begins
	logSecret  = 64   // where a segment has what numbers are combined with
)

// logFrames walks the newest segment up to where nothing was written yet.
func logFrames(t *testing.T, dataDir string) (path string, frames []logFrame) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dataDir, "wal", "*.wal"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no log in %s: %v", dataDir, err)
	}
	slices.Sort(names)
	path = names[len(names)-1]
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := int64(logFrames0); at+24 <= int64(len(b)); {
		size := binary.LittleEndian.Uint32(b[at:])
		if size == 0 || ^size != binary.LittleEndian.Uint32(b[at+20:]) {
			break
		}
		f := logFrame{at, at + 24, int64(size), (at + 24 + int64(size) + 7) &^ 7}
		if f.end > int64(len(b)) {
			t.Fatalf("%s: the frame at %d reaches past the end of the file", path, at)
		}
		frames = append(frames, f)
		at = f.end
	}
	if len(frames) < 3 {
		t.Fatalf("%s: only %d frames", path, len(frames))
	}
	return path, frames
}

func flipBit(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	_, rerr := f.ReadAt(b[:], at)
	b[0] ^= 4
	_, werr := f.WriteAt(b[:], at)
	if err := errors.Join(rerr, werr, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// tear leaves behind the last record what a power cut leaves of a write that
// nobody was told of: a frame some of whose sectors never reached the disk.
func tear(t *testing.T, dataDir string, lost func(sector int) bool) {
	t.Helper()
	path, frames := logFrames(t, dataDir)
	segment, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	last, word := frames[len(frames)-1], binary.LittleEndian.Uint64
	end, secret := last.end, word(segment[logSecret:])
	const size = 4000
	frame := binary.LittleEndian.AppendUint32(nil, size)
	frame = append(frame, segment[last.at+4:last.at+8]...) // a checksum, of something else
	frame = binary.LittleEndian.AppendUint64(frame, (word(segment[last.at+8:])^secret+1)^secret)
	frame = append(frame, segment[last.at+4:last.at+8]...)
	inverted := uint32(size)
	frame = binary.LittleEndian.AppendUint32(frame, ^inverted)
	frame = append(frame, bytes.Repeat([]byte("lost"), size/4)...)
	for i := range frame {
		at := end + int64(i)
		if sector := at/512 - end/512; i >= 24 && lost(int(sector)) {
			frame[i] = 0
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, werr := f.WriteAt(frame, end)
	if err := errors.Join(werr, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// How long writes may stop. Both are generous, for busy machines; what was
// measured is logged. A leader that goes without handing over costs an election
// time-out, 500 ms at least.
const (
	maxWriteGap   = 3 * time.Second
	maxPlannedGap = 400 * time.Millisecond
)

// What was acknowledged survives kill -9, of a leader at a time and of all at once.
func TestProcessKill(t *testing.T) {
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	l := s.load(1, 2, 3)
	l.grow(50)
	for range 3 {
		leader := s.leader()
		at := time.Now()
		s.nodes[leader].crash()
		s.leader()
		l.grow(100)
		gap := l.gap(at)
		t.Logf("leader %d killed: longest gap between writes %v", leader, gap.Round(time.Millisecond))
		if gap > maxWriteGap {
			t.Errorf("no write for %v after the leader was killed; the limit is %v", gap, maxWriteGap)
		}
		s.start(leader)
	}
	for range 3 {
		l.grow(100)
		s.killAll()
		s.start(1, 2, 3)
	}
	l.grow(100)
	l.stop()
	l.verify()
}

// killAll is what a power cut in the whole building would be, but for the disks.
func (s *site) killAll() {
	s.t.Helper()
	for _, p := range s.nodes {
		p.signal(syscall.SIGKILL)
	}
	for _, p := range s.nodes {
		p.wait(10 * time.Second)
	}
}

// A planned restart: the leader hands over first.
func TestProcessTerm(t *testing.T) {
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	for range 2 {
		leader := s.leader()
		l := s.load(s.others(leader)...)
		l.grow(100)
		at := time.Now()
		s.nodes[leader].signal(syscall.SIGTERM)
		code := s.nodes[leader].wait(5 * time.Second)
		took := time.Since(at)
		l.grow(200)
		l.stop()
		t.Logf("SIGTERM to leader %d: exit code %d after %v, longest gap between writes %v", leader, code,
			took.Round(time.Millisecond), l.gap(at).Round(time.Millisecond))
		if code != 0 || took > 1500*time.Millisecond {
			t.Errorf("SIGTERM: exit code %d after %v; want 0 within 1.5s", code, took)
		}
		if l.gap(at) > maxPlannedGap {
			t.Errorf("no write for %v; the limit is %v", l.gap(at), maxPlannedGap)
		}
		s.start(leader)
		l.verify()
	}

	l := s.load(1, 2, 3)
	l.grow(50)
	at := time.Now()
	for _, p := range s.nodes {
		p.signal(syscall.SIGINT)
	}
	for id, p := range s.nodes {
		if code := p.wait(5 * time.Second); code != 0 {
			t.Errorf("node %d: exit code %d after SIGINT", id, code)
		}
	}
	took := time.Since(at)
	t.Logf("SIGINT to all: gone after %v", took.Round(time.Millisecond))
	if took > 1500*time.Millisecond {
		t.Errorf("SIGINT to all: gone after %v, want 1.5s", took)
	}
	l.stop()
	s.start(1, 2, 3)
	l.verify()
}

// A leader that was frozen and does not know that it was replaced must not
// answer a linearizable read from its old state.
func TestProcessFrozenLeader(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	for round := range 2 {
		old := s.leader()
		key, frozen := fmt.Sprintf("key-%d", round), s.nodes[old]
		frozen.put(key, "before")
		frozen.signal(syscall.SIGSTOP)
		other := s.nodes[s.others(old)[0]]
		waitFor(t, "a write without the frozen leader", func() bool {
			a, err := other.try(http.MethodPut, "/"+key, "after")
			return err == nil && a.status == http.StatusNoContent
		})
		type read struct {
			when string
			reply
			err error
		}
		reads := make(chan read, 16)
		ask := func(when string) {
			go func() {
				a, err := frozen.try(http.MethodGet, "/"+key, "")
				reads <- read{when, a, err}
			}()
		}
		n := 0
		for range 4 { // these lie in its sockets when it wakes
			ask("before SIGCONT")
			n++
		}
		poll := time.NewTicker(5 * time.Millisecond)
		for range 20 {
			<-poll.C
		}
		frozen.signal(syscall.SIGCONT)
		for range 10 {
			ask("after SIGCONT")
			n++
			<-poll.C
		}
		poll.Stop()
		served := 0
		for range n {
			r := <-reads
			switch {
			case r.err != nil:
				t.Errorf("read sent %s: %v", r.when, r.err)
			case r.status == http.StatusOK && r.body == "after":
				served++
			case r.status != http.StatusServiceUnavailable && r.status != http.StatusGatewayTimeout:
				t.Errorf("read sent %s: %d %q; want the new value, or a refusal", r.when, r.status, r.body)
			}
		}
		t.Logf("%d of %d reads on the woken leader were served", served, n)
		frozen.ready()
	}
}

// A write that a power cut tore is forgotten, and nothing else is.
func TestProcessTornLog(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	l := s.load(1, 2, 3)
	l.grow(100)
	s.killAll()
	l.stop()
	tear(t, s.data(1), func(sector int) bool { return sector > 0 })  // only the first sector was written
	tear(t, s.data(2), func(sector int) bool { return true })        // only the length
	tear(t, s.data(3), func(sector int) bool { return sector == 4 }) // a hole
	s.start(1, 2, 3)
	for id, p := range s.nodes {
		if !strings.Contains(p.stderr.String(), "cut short") {
			t.Errorf("node %d does not say that it repaired its log:\n%s", id, p.stderr.String())
		}
	}
	l.verify()
	l = s.load(1, 2, 3)
	l.grow(50)
	l.stop()
	l.verify()
}

// A crash while a data directory is being founded, or while a joiner waits for
// its first snapshot, leaves something that starts.
func TestProcessKillAtStart(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 1)
	for i := range 15 {
		p := s.spawn(1)
		<-time.After(time.Duration(2*i) * time.Millisecond) // each time a little further
		p.crash()
	}
	s.start(1)
	s.nodes[1].put("my-key", "hello")
	s.nodes[1].want(http.StatusNoContent, http.MethodPost, "/2", s.peers[1])
	s.listed = 2
	for i := range 15 {
		p := s.spawn(2, "--join")
		<-time.After(time.Duration(5*i) * time.Millisecond)
		p.crash()
	}
	s.spawn(2, "--join").ready()
	s.nodes[2].get("my-key", "hello")
}

// A member that was away too long, and one that is new, get a snapshot.
func TestProcessSnapshotCatchUp(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 1, "--snapshot-entries", "50", "--catch-up-bytes", "0")
	s.start(1, 2, 3)
	away := s.others(s.leader())[0]
	rest := s.others(away)
	s.nodes[away].crash()
	delete(s.nodes, away)
	large := strings.Repeat("\xff\x00", 1<<19)
	s.nodes[rest[0]].put("large", large)
	l := s.load(rest...)
	l.grow(400)
	l.stop()
	s.start(away)
	back := s.nodes[away]
	back.get("large", large)
	if out := back.stderr.String(); !strings.Contains(out, "took over a snapshot") {
		t.Errorf("it caught up without a snapshot:\n%s", out)
	}
	back.crash()
	s.start(away)
	s.nodes[away].get("large", large)

	s.nodes[away].want(http.StatusNoContent, http.MethodPost, "/4", s.peers[3])
	s.listed = 4
	s.spawn(4, "--join").ready()
	s.nodes[4].get("large", large)
	l.verify()
	s.nodes[4].crash()
	s.start(4) // --join is not needed any more
	l.verify()
}

// A member that moves to another address keeps it over a restart of the whole
// cluster, when it can ask nobody where it belongs.
func TestProcessMove(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 3)
	s.start(1, 2, 3)
	s.nodes[1].put("my-key", "hello")
	for id := 1; id <= 3; id++ {
		moved := s.peers[id+2]
		at := s.nodes[s.others(id)[0]]
		s.nodes[id].stop()
		waitFor(t, "the new address to be accepted", func() bool {
			a, err := at.try(http.MethodPut, fmt.Sprintf("/v1/members/%d", id), fmt.Sprintf(`{"peer_url":%q}`, moved))
			return err == nil && a.status == http.StatusNoContent
		})
		s.peers[id-1] = moved
		s.start(id)
		s.nodes[id].get("my-key", "hello")
	}
	s.killAll()
	s.start(1, 2, 3)
	s.nodes[2].get("my-key", "hello")
}

// A disk that fails ends the process with its own exit code, and what was
// acknowledged before is there afterwards.
func TestProcessDiskFails(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0, "--snapshot-entries", "20")
	s.start(1)
	snaps := filepath.Join(s.data(1), "snap")
	if err := os.Rename(snaps, snaps+".away"); err != nil {
		t.Fatal(err)
	}
	acked := 0
	waitFor(t, "the node to end", func() bool {
		if a, err := s.nodes[1].try(http.MethodPut, fmt.Sprintf("/key-%d", acked), "value"); err == nil && a.status == http.StatusNoContent {
			acked++
		}
		return !s.nodes[1].running()
	})
	badStart{3, "the disk failed"}.check(t, s.nodes[1])
	if err := os.Rename(snaps+".away", snaps); err != nil {
		t.Fatal(err)
	}
	s.start(1)
	for i := range acked {
		s.nodes[1].get(fmt.Sprintf("key-%d", i), "value")
	}
	t.Logf("%d writes were acknowledged before, all there", acked)
}

func TestProcessDiskLow(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.start(1)
	s.nodes[1].put("my-key", "hello")
	s.nodes[1].stop()
	s.spawn(1, "--disk-reserve", "1000000GiB")
	waitFor(t, "the node to serve", func() bool {
		a, err := s.nodes[1].try(http.MethodGet, "/my-key", "")
		return err == nil && a.status == http.StatusOK && a.body == "hello"
	})
	s.nodes[1].want(http.StatusInsufficientStorage, http.MethodPut, "/my-key", "more")
	s.nodes[1].get("my-key", "hello")
	s.nodes[1].stop()
}

// A member that lost its data has forgotten its vote and what it acknowledged:
// under its old id it may not come back (raft thesis 3.8). A joiner begins as a
// learner, so one that votes already and has no data gives itself away.
func TestProcessWipedVoter(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	s.nodes[1].put("my-key", "hello")
	id := s.others(s.leader())[0]
	s.nodes[id].crash()
	if err := os.RemoveAll(s.data(id)); err != nil {
		t.Fatal(err)
	}
	p := s.spawn(id, "--join", "--join-timeout", "3s")
	waitFor(t, "it to end or to join", func() bool {
		return !p.running() || strings.Contains(p.stderr.String(), "serves clients")
	})
	if p.running() {
		t.Fatal("a voter without its data was let in")
	}
	badStart{1, fmt.Sprintf("member %d", id)}.check(t, p)
}

// The same without --join: it would found itself anew, and vote again.
func TestProcessWipedFounder(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	id := s.others(s.leader())[0]
	asked := s.others(id)[0]
	waitFor(t, "the cluster to know that the member has data", func() bool {
		info, err := askPeer(t.Context(), peerClient(), s.peers[asked-1])
		if err != nil {
			return false
		}
		m, _ := info.Members.get(uint64(id))
		return m.Started
	})
	s.nodes[id].crash()
	if err := os.RemoveAll(s.data(id)); err != nil {
		t.Fatal(err)
	}
	badStart{1, "its data is lost"}.check(t, s.spawn(id))
}

// The leader itself can be removed, under load, and a cluster can shrink to
// members that the list of its first day does not name.
func TestProcessRemoveLeader(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 1)
	s.start(1, 2, 3)
	s.nodes[1].want(http.StatusNoContent, http.MethodPost, "/4", s.peers[3])
	s.listed = 4
	s.spawn(4, "--join").ready()
	waitFor(t, "member 4 to be a voter", func() bool { return s.member(1, 4).Role == api.RoleVoter })
	for range 2 {
		leader := s.leader()
		rest := s.others(leader)
		l := s.load(rest...)
		l.grow(50)
		at := time.Now()
		s.nodes[rest[0]].want(http.StatusNoContent, http.MethodDelete, fmt.Sprintf("/%d", leader), "")
		if code := s.nodes[leader].wait(10 * time.Second); code != 0 {
			t.Errorf("removed leader: exit code %d", code)
		}
		delete(s.nodes, leader)
		l.grow(200)
		l.stop()
		t.Logf("leader %d removed: longest gap between writes %v", leader, l.gap(at).Round(time.Millisecond))
		if l.gap(at) > maxWriteGap {
			t.Errorf("no write for %v after the leader was removed", l.gap(at))
		}
		l.verify()
	}
	left := s.others(0)
	s.killAll()
	for _, id := range left {
		if s.listed = 3; id == 4 {
			s.listed = 4
		}
		s.spawn(id)
	}
	for _, id := range left {
		s.nodes[id].ready()
	}
	s.nodes[left[0]].put("my-key", "two are left")
	s.nodes[left[1]].get("my-key", "two are left")
}

// A stop is a stop, also while a node waits to be let in.
func TestProcessStopWhileJoining(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 1)
	s.start(1)
	s.listed = 2
	p := s.spawn(2, "--join")
	waitFor(t, "node 2 to wait", func() bool { return strings.Contains(p.stderr.String(), "waiting to be let in") })
	p.signal(syscall.SIGTERM)
	if code := p.wait(2 * time.Second); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	if out := p.stderr.String(); strings.Contains(out, "gave up after") {
		t.Errorf("it was stopped and did not give up:\n%s", out)
	}
}

// Without a quorum every call still ends in time.
func TestProcessQuorumLost(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	s.nodes[1].put("my-key", "old")
	leader := s.leader()
	for _, survivor := range []int{leader, s.others(leader)[0]} {
		last := s.nodes[survivor]
		for _, id := range s.others(survivor) {
			s.nodes[id].signal(syscall.SIGKILL)
		}
		for _, id := range s.others(survivor) {
			s.nodes[id].wait(10 * time.Second)
		}
		refused := func(method, target string, most time.Duration) {
			t.Helper()
			at := time.Now()
			a, err := last.try(method, target, "new")
			took := time.Since(at)
			if err != nil || a.status != http.StatusServiceUnavailable && a.status != http.StatusGatewayTimeout {
				t.Errorf("%s %s: %d %q %v; want 503 or 504", method, target, a.status, a.body, err)
			}
			if took > most {
				t.Errorf("%s %s: answered after %v, want %v", method, target, took, most)
			}
		}
		refused(http.MethodPut, "/my-key?timeout=200ms", time.Second)
		refused(http.MethodGet, "/my-key?timeout=200ms", time.Second)
		if a := last.want(http.StatusOK, http.MethodGet, "/my-key?consistency=stale", ""); a.body == "" {
			t.Error("a stale read finds nothing")
		}
		waitFor(t, "the survivor to know that nobody leads", func() bool {
			st, err := last.status()
			return err == nil && st.Leader == 0
		})
		refused(http.MethodPut, "/my-key?timeout=200ms", time.Second)
		refused(http.MethodPut, "/my-key", 2*time.Second) // one election time-out, not the default of 5s
		refused(http.MethodGet, "/my-key", 2*time.Second)
		a := last.want(http.StatusServiceUnavailable, http.MethodPut, "/my-key", "new")
		if a.header.Get("Retry-After") == "" {
			t.Error("503 without Retry-After")
		}
		if a, err := last.try(http.MethodGet, "/readyz", ""); err != nil || a.status != http.StatusServiceUnavailable {
			t.Errorf("/readyz without a quorum: %d %v", a.status, err)
		}
		last.want(http.StatusOK, http.MethodGet, "/livez", "")
		s.start(s.others(survivor)...)
		last.ready()
	}
}

// Keys and values are bytes, in the log and in snapshots.
func TestProcessBinary(t *testing.T) {
	t.Parallel()
	values := []string{"\xff\xfe\x00", "", "\x00", "\r\n", strings.Repeat("\xf0\x28\x8c\x28", 1000)}
	keys := []string{"%00", "%2F", "%2F%2F", "%FF%FE", "a//b", "..", "a/../b", ".", "%C3%A9", "é/ü", "a%20b+c", "%25", "x?timeout=1s"}
	s := newSite(t, 1, 0, "--snapshot-entries", "5")
	s.start(1)
	n := s.nodes[1]
	want := map[string]string{}
	for round := range 3 {
		for i, key := range keys {
			want[key] = values[(i+round)%len(values)]
			n.put(key, want[key])
		}
	}
	n.put("%C3%A9", "the same key in two spellings")
	n.get("é", "the same key in two spellings")
	want["%C3%A9"] = "the same key in two spellings"
	waitFor(t, "a snapshot", func() bool { st, err := n.status(); return err == nil && st.SnapshotIndex > 30 })
	check := func() {
		t.Helper()
		for key, value := range want {
			n.get(key, value)
			if a := n.want(http.StatusOK, http.MethodGet, "/v1/kv/"+key, ""); a.body != value {
				t.Errorf("/v1/kv/%s: %q, want %q", key, a.body, value)
			}
		}
		if st, err := n.status(); err != nil || int(st.Keys) != len(want) {
			t.Errorf("%d keys, want %d (%v)", st.Keys, len(want), err)
		}
	}
	check()
	n.crash()
	s.start(1)
	n = s.nodes[1]
	check()

	// The newest snapshot is lost: the one before and the log make up for it.
	n.crash()
	snaps, err := filepath.Glob(filepath.Join(s.data(1), "snap", "*.snap.db"))
	if err != nil || len(snaps) < 2 {
		t.Fatalf("snapshots %v, %v; want two", snaps, err)
	}
	slices.Sort(snaps)
	if err := os.Remove(snaps[len(snaps)-1]); err != nil {
		t.Fatal(err)
	}
	s.start(1)
	n = s.nodes[1]
	check()
}

// The data directory stays small however much is written.
func TestProcessDiskBounded(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0, "--snapshot-bytes", "1MiB", "--catch-up-bytes", "256KiB")
	s.start(1)
	var wg sync.WaitGroup
	const writers, writes = 32, 20_000
	for w := range writers {
		wg.Go(func() {
			for i := range writes / writers {
				key := fmt.Sprintf("/key-%d", (w*31+i)%1000)
				if a, err := s.nodes[1].try(http.MethodPut, key, strings.Repeat("x", 300)); err != nil || a.status != http.StatusNoContent {
					t.Errorf("PUT %s: %d %v", key, a.status, err)
					return
				}
			}
		})
	}
	wg.Wait()
	large := strings.Repeat("y", 1<<20)
	for i := range 150 { // two segments and more
		s.nodes[1].put(fmt.Sprintf("large-%d", i%3), large)
	}
	st, err := s.nodes[1].status()
	if err != nil {
		t.Fatal(err)
	}
	var wals, snaps, leftovers int
	settled := func() bool {
		wals, snaps, leftovers = 0, 0, 0
		err := filepath.WalkDir(s.data(1), func(path string, d os.DirEntry, err error) error {
			switch name := d.Name(); {
			case errors.Is(err, os.ErrNotExist): // purged meanwhile
				return nil
			case err != nil:
				return err
			case strings.HasSuffix(name, ".wal"):
				wals++
			case strings.HasSuffix(name, ".snap.db"):
				snaps++
			case strings.Contains(path, "/snap/") && name != "spare.tmp": // the next one's file
				leftovers++
			}
			return nil
		})
		return err == nil && wals <= 2 && snaps == 2 && leftovers == 0
	}
	waitFor(t, "old files to go", settled)
	t.Logf("after %d writes: %d log segments, %d snapshots, %d MiB of log, %d KiB of snapshots, snapshot at %d of %d", writes+150,
		wals, snaps, st.Sizes.WALBytes>>20, st.Sizes.SnapshotBytes>>10, st.SnapshotIndex, st.LastIndex)
	s.nodes[1].crash()
	s.start(1)
	s.nodes[1].get("large-2", large)
	s.nodes[1].get("key-999", strings.Repeat("x", 300))
}
