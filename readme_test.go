package main

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// README.md is executed: its shell blocks in their order, then the table of
// calls. What is shown as output has to be the output. Ports are replaced by
// free ones, and what runs until it is stopped is started beside the rest.

// readmeBlock is one ```sh block.
type readmeBlock struct {
	line   int    // of its first command in README.md
	text   string // the commands
	notRun string // the reason in the comment above: <!-- not run: REASON -->
}

func readme(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var notRun = regexp.MustCompile(`^<!-- not run: (.+) -->$`)

func readmeBlocks(t *testing.T, text string) (blocks []readmeBlock) {
	t.Helper()
	fenced, shell := false, false
	above := ""
	for i, line := range strings.Split(text, "\n") {
		switch {
		case strings.HasPrefix(line, "```"):
			fenced, shell = !fenced, !fenced && line == "```sh"
			if shell {
				b := readmeBlock{line: i + 2}
				if m := notRun.FindStringSubmatch(above); m != nil {
					b.notRun = m[1]
				}
				blocks = append(blocks, b)
			}
		case shell:
			blocks[len(blocks)-1].text += line + "\n"
		}
		above = line
	}
	if fenced || len(blocks) < 5 {
		t.Fatalf("README.md: %d shell blocks, the last one open: %v", len(blocks), fenced)
	}
	return blocks
}

// procfile returns the arguments of the program in each line, by process name.
func procfile(t *testing.T) map[string][]string {
	t.Helper()
	b, err := os.ReadFile("Procfile")
	if err != nil {
		t.Fatal(err)
	}
	procs := map[string][]string{}
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		name, command, ok := strings.Cut(line, ": exec ./start.sh ")
		if !ok || procs[name] != nil {
			t.Fatalf("Procfile: unexpected line %q", line)
		}
		procs[name] = strings.Fields(command)
	}
	return procs
}

// readmeRun is a reader at work.
type readmeRun struct {
	t     *testing.T
	dir   string
	ports map[string]string   // of the page → of this run
	procs map[string]*process // by Procfile name, or by command line
	env   []string            // variables that the page sets
	where string              // the line at hand, for messages
}

var readmeAddress = regexp.MustCompile(`(127\.0\.0\.1:|--port )(\d+)`)

func newReadmeRun(t *testing.T, text string) *readmeRun {
	r := &readmeRun{t: t, dir: t.TempDir(), ports: map[string]string{"9021": "", "9121": ""}, procs: map[string]*process{}}
	for _, args := range procfile(t) {
		text += strings.Join(args, " ") + "\n"
	}
	for _, m := range readmeAddress.FindAllStringSubmatch(text, -1) {
		r.ports[m[2]] = ""
	}
	free := freePorts(t, len(r.ports))
	for i, old := range slices.Sorted(maps.Keys(r.ports)) {
		r.ports[old] = fmt.Sprint(free[i])
	}
	return r
}

func (r *readmeRun) replacePorts(s string) string {
	return readmeAddress.ReplaceAllStringFunc(s, func(a string) string {
		m := readmeAddress.FindStringSubmatch(a)
		return m[1] + r.ports[m[2]]
	})
}

// launch starts a node as the page has it. Ports that the command line leaves
// at their defaults are replaced through the environment.
func (r *readmeRun) launch(name string, args []string) {
	r.t.Helper()
	if old := r.procs[name]; old != nil && old.running() {
		r.t.Fatalf("%s runs already", name)
	}
	args = strings.Fields(r.replacePorts(strings.Join(args, " ")))
	port := r.ports["9121"]
	if i := slices.Index(args, "--port"); i >= 0 {
		port = args[i+1]
	}
	p := launch(r.t, r.dir, []string{"PONTOON_PORT=" + r.ports["9121"], "PONTOON_CLUSTER=http://127.0.0.1:" + r.ports["9021"]}, args...)
	p.url = "http://127.0.0.1:" + port
	r.procs[name] = p
}

var readmeAssignment = regexp.MustCompile(`^[A-Z]+=\S+$`)

// line does what one line of the page says. It returns once a reader would
// type the next one: a node that was started serves.
func (r *readmeRun) line(line string) {
	r.t.Helper()
	words := strings.Fields(line)
	switch {
	case line == "go tool goreman start":
		for name, args := range procfile(r.t) {
			r.launch(name, args)
		}
		for _, p := range r.procs {
			p.ready()
		}
	case strings.HasPrefix(line, "go tool goreman run stop ") && len(words) == 6:
		p := r.procs[words[5]]
		if p == nil {
			r.t.Fatalf("%s\nno such process in the Procfile", r.where)
		}
		p.stop()
	case strings.HasPrefix(line, "go tool goreman run start ") && len(words) == 6:
		args := procfile(r.t)[words[5]]
		if args == nil {
			r.t.Fatalf("%s\nno such process in the Procfile", r.where)
		}
		r.launch(words[5], args)
		r.procs[words[5]].ready()
	case line == "go build -o pontoon .":
		if err := os.Symlink(program(r.t), filepath.Join(r.dir, "pontoon")); err != nil {
			r.t.Fatal(err)
		}
	case strings.HasPrefix(line, "go run . bench "):
		args := append(strings.Fields(r.replacePorts(line))[3:], "--duration", "500ms", "--warmup", "200ms") // the last one counts
		p := launch(r.t, r.dir, nil, args...)
		if code := p.wait(20 * time.Second); code != 0 || !strings.Contains(p.stdout.String(), "puts/s") {
			r.t.Errorf("%s\nexit code %d: %s%s", r.where, code, p.stdout.String(), p.stderr.String())
		}
	case words[0] == "./pontoon":
		if _, err := os.Stat(filepath.Join(r.dir, "pontoon")); err != nil {
			r.t.Fatalf("%s\nthe page has not built it yet: %v", r.where, err)
		}
		r.launch(line, words[1:])
		r.procs[line].ready()
	case readmeAssignment.MatchString(line):
		r.env = append(r.env, r.replacePorts(line))
	case words[0] == "curl":
		command, want, _ := strings.Cut(line, "# → ")
		shell := r.shell
		if words[1] == "-N" {
			shell = r.stream
		}
		if got := shell("", command); !readmeMatches(got, want) {
			r.t.Errorf("%s\nanswers %q", r.where, got)
		}
	default:
		r.t.Fatalf("%s\nno rule for this command; write <!-- not run: REASON --> above its block if it cannot be tested", r.where)
	}
}

// shell runs a command line of the page with more options for its curl.
func (r *readmeRun) shell(options, command string) string {
	r.t.Helper()
	out, err := r.script(options, command).CombinedOutput()
	if err != nil {
		r.t.Errorf("%s\n%v: %s", r.where, err, out)
	}
	return strings.TrimSpace(string(out))
}

// stream is shell for a watch, whose curl learns only from the next event that
// nobody reads on: it is left once the first line is here.
func (r *readmeRun) stream(options, command string) string {
	r.t.Helper()
	cmd := r.script(options, command)
	var out output
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	defer func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait() // the signal
	}()
	waitFor(r.t, "the first line of: "+r.where, func() bool { return strings.Contains(out.String(), "\n") })
	return strings.TrimSpace(out.String())
}

func (r *readmeRun) script(options, command string) *exec.Cmd {
	script := fmt.Sprintf("curl() { command curl -sS --max-time 20 %s \"$@\"; }\n%s\n", options, r.replacePorts(command))
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.Dir = r.dir
	cmd.Env = append(os.Environ(), r.env...)
	return cmd
}

// readmeMatches compares an output with what the page shows, where … stands
// for anything.
func readmeMatches(got, want string) bool {
	parts := strings.Split(strings.TrimSpace(want), "…")
	for i, p := range parts {
		parts[i] = regexp.QuoteMeta(strings.TrimSpace(p))
	}
	return regexp.MustCompile(`(?s)^` + strings.Join(parts, ".*") + `$`).MatchString(got)
}

// readmeCall is a row of the table of calls.
var readmeCall = regexp.MustCompile("(?m)^\\| `(curl [^`]+)` \\| (\\d{3}) \\|")

func TestReadmeCommands(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skipf("the commands of README.md need curl, which this machine lacks: %v", err)
	}
	text := readme(t)
	r := newReadmeRun(t, text)
	for _, b := range readmeBlocks(t, text) {
		if b.notRun != "" {
			t.Logf("README.md:%d is not run: %s", b.line, b.notRun)
			continue
		}
		for i, line := range strings.Split(strings.TrimSpace(b.text), "\n") {
			r.where = fmt.Sprintf("README.md:%d: %s", b.line+i, line)
			if r.line(line); t.Failed() {
				return // the rest would only say so again
			}
		}
	}
	removed := r.procs["pontoon3"]
	if code := removed.wait(10 * time.Second); code != 0 || !strings.Contains(removed.stderr.String(), "removed from the cluster") {
		t.Errorf("the removed member: exit code %d\n%s", code, removed.stderr.String())
	}

	calls := readmeCall.FindAllStringSubmatch(text, -1)
	if len(calls) < 15 {
		t.Fatalf("README.md: only %d calls in the table", len(calls))
	}
	for _, c := range calls {
		r.where = "README.md, table of calls: " + c[1]
		if got := r.shell("-o /dev/null -w '%{http_code}'", c[1]); got != c[2] {
			t.Errorf("%s\nanswers %s, the page says %s", r.where, got, c[2])
		}
	}

	a := r.procs["pontoon1"].want(http.StatusOK, http.MethodGet, "/metrics", "")
	for _, name := range regexp.MustCompile("`((?:pontoon|etcd)_[a-z_]+)`").FindAllStringSubmatch(text, -1) {
		if !strings.Contains(a.body, "# TYPE "+name[1]+" ") {
			t.Errorf("README.md names the metric %s, /metrics does not", name[1])
		}
	}
	for name, p := range r.procs {
		if !p.running() {
			continue
		}
		p.signal(syscall.SIGINT)
		if code := p.wait(5 * time.Second); code != 0 {
			t.Errorf("%s: exit code %d after Ctrl-C", name, code)
		}
	}
}

// curlLine is a command with flags of its own.
var curlLine = regexp.MustCompile(`(?m)^curl .*$`)

// TestReadmeNames holds what the page names against what exists: flags, their
// defaults, files, headings.
func TestReadmeNames(t *testing.T) {
	t.Parallel()
	text := readme(t)
	flags := append(flagNames(t), slices.Collect(maps.Keys(benchFlags(t)))...)
	for _, m := range regexp.MustCompile(`--([a-z][a-z-]*)`).FindAllStringSubmatch(curlLine.ReplaceAllString(text, ""), -1) {
		if !slices.Contains(flags, m[1]) {
			t.Errorf("README.md names the flag --%s, which does not exist", m[1])
		}
	}
	for _, m := range regexp.MustCompile(`PONTOON_([A-Z_]+)`).FindAllStringSubmatch(text, -1) {
		if name := strings.ToLower(strings.ReplaceAll(m[1], "_", "-")); !slices.Contains(flags, name) {
			t.Errorf("README.md names the variable PONTOON_%s, and there is no --%s", m[1], name)
		}
	}
	c := defaultConfig()
	for _, row := range []string{
		fmt.Sprintf("| `--id` | %d |", c.ID),
		fmt.Sprintf("| `--cluster` | `%s` |", c.Cluster[0].URL),
		fmt.Sprintf("| `--port` | %d |", c.Port),
		fmt.Sprintf("| `--cluster-token` | `%s` |", c.ClusterToken),
		fmt.Sprintf("| `--heartbeat`, `--election-ticks` | %v, %d |", c.TickInterval, c.ElectionTicks),
		fmt.Sprintf("`--disk-reserve` (%s)", (*byteSize)(&c.DiskReserve)),
		fmt.Sprintf("a key %d bytes", c.MaxKeyBytes),
		fmt.Sprintf("(default %v, at most %v)", c.DefaultTimeout, "60s"),
	} {
		if !strings.Contains(text, row) {
			t.Errorf("README.md does not say %q", row)
		}
	}
	if c.MaxTimeout != time.Minute || c.MaxValueBytes != 1<<20 || c.CatchUpBytes != 16<<20 || c.KeepSnapshots != 2 {
		t.Error("a default that README.md spells out in words has changed")
	}

	headings := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^#+ (.+)$`).FindAllStringSubmatch(text, -1) {
		headings["#"+strings.ReplaceAll(strings.ToLower(m[1]), " ", "-")] = true
	}
	for _, m := range regexp.MustCompile(`\]\(([^)]+)\)`).FindAllStringSubmatch(text, -1) {
		target := m[1]
		switch {
		case strings.HasPrefix(target, "https://"):
		case strings.HasPrefix(target, "#"):
			if !headings[target] {
				t.Errorf("README.md links to %s, and there is no such heading", target)
			}
		default:
			if _, err := os.Stat(target); err != nil {
				t.Errorf("README.md links to %s: %v", target, err)
			}
		}
	}
}

// TestProcfile: three members of one cluster, as the README says they are.
func TestProcfile(t *testing.T) {
	procs := procfile(t)
	if len(procs) != 3 {
		t.Fatalf("the Procfile has %d processes, want 3", len(procs))
	}
	var cluster []clusterURL
	for i, port := range []int{12380, 22380, 32380} {
		name := fmt.Sprintf("pontoon%d", i+1)
		c, err := parseConfig(procs[name], func(string) string { return "" }, io.Discard)
		if err != nil {
			t.Fatalf("Procfile: %s: %v", name, err)
		}
		if c.ID != uint64(i+1) || c.Port != port || c.Join {
			t.Errorf("Procfile: %s is member %d on port %d, joining: %v; want member %d on port %d", name, c.ID, c.Port, c.Join, i+1, port)
		}
		if want := fmt.Sprintf("http://127.0.0.1:%d", port-1); c.peerURL() != want {
			t.Errorf("Procfile: %s has the peer URL %s, want %s", name, c.peerURL(), want)
		}
		if i == 0 {
			cluster = c.Cluster
		} else if !slices.Equal(c.Cluster, cluster) {
			t.Errorf("Procfile: %s lists %v, pontoon1 lists %v", name, c.Cluster, cluster)
		}
		if len(c.Cluster) != 3 {
			t.Errorf("Procfile: %s lists %d members", name, len(c.Cluster))
		}
		if !strings.Contains(readme(t), fmt.Sprint(port)) {
			t.Errorf("README.md does not name port %d", port)
		}
	}
	info, err := os.Stat("start.sh")
	if err != nil || info.Mode()&0o111 == 0 {
		t.Errorf("start.sh, which the Procfile runs: %v, %v", info, err)
	}
}
