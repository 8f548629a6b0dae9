package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"pontoon/internal/bench"
)

// benchRun runs pontoon bench to its end.
func benchRun(t *testing.T, args ...string) (code int, p *process) {
	t.Helper()
	p = launch(t, t.TempDir(), nil, append([]string{"bench"}, args...)...)
	return p.wait(30 * time.Second), p
}

// Each operation, from the binary, against a cluster of three; one is stopped
// half-way, and its clients go on elsewhere.
func TestBench(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	var endpoints []string
	for _, port := range s.ports {
		endpoints = append(endpoints, fmt.Sprintf("127.0.0.1:%d", port))
	}
	all := strings.Join(endpoints, ",")
	for _, tt := range []struct {
		args  string
		kinds []string
	}{
		{"--op put --clients 8", []string{"put"}},
		{"--op get --clients 8 --keys 200 --only 2", []string{"get"}},
		{"--op mixed --clients 8 --keys 200 --distribution zipf --consistency stale", []string{"get", "put"}},
		{"--op mixed --clients 8 --keys 200 --fill=false --rate 200 --prefix ü/ --reads 0", []string{"put"}},
		{"--op watch --watchers 9 --rate 100", []string{"event", "put"}},
		{"--op watch --watchers 9 --rate 100 --scope key --keys 3 --prefix=a%b/ --value-size 500", []string{"event", "put"}},
	} {
		code, p := benchRun(t, append(strings.Fields(tt.args), "--endpoints", all, "--warmup", "100ms", "--duration", "500ms", "--json")...)
		var res bench.Result
		if err := json.Unmarshal([]byte(p.stdout.String()), &res); code != 0 || err != nil {
			t.Fatalf("%s: exit code %d, %v\n%s", p.name, code, err, p.stdout.String())
		}
		if res.Ops < 20 || res.ErrorCount != 0 || res.OpsPerSecond < 40 || len(res.Latency) != len(tt.kinds) {
			t.Errorf("%s: %s", p.name, p.stdout.String())
		}
		for _, kind := range tt.kinds {
			if l := res.Latency[kind]; l.Count == 0 || l.P50 <= 0 || l.P50 > l.Max {
				t.Errorf("%s: %s %+v", p.name, kind, l)
			}
		}
		if w := res.Watch; w != nil && (w.Missing != 0 || w.Delivered < 20) {
			t.Errorf("%s: %+v", p.name, w)
		}
		for _, server := range res.Servers {
			if server.ID == 0 || server.Leader == 0 || server.Version != version {
				t.Errorf("%s: %+v", p.name, server)
			}
		}
	}
	if st, err := s.nodes[1].status(); err != nil || st.Keys < 200 {
		t.Errorf("%d keys, %v", st.Keys, err)
	}
	s.nodes[1].want(http.StatusOK, http.MethodGet, "/v1/kv/bench/0000000199", "")

	running := launch(t, t.TempDir(), nil, "bench", "--endpoints", all, "--warmup", "0s", "--duration", "1h", "--clients", "6")
	keys := func() int64 { st, _ := s.nodes[2].status(); return st.Revision }
	grows := func(what string) {
		before := keys()
		waitFor(t, what, func() bool { return keys() > before+100 })
	}
	grows("writes of all clients")
	s.nodes[1].stop()
	grows("writes without member 1")
	running.signal(syscall.SIGINT)
	if code := running.wait(10 * time.Second); code != 0 {
		t.Errorf("exit code %d after Ctrl-C", code)
	}
	for _, text := range []string{"puts/s", "interrupted", "latency by percentile", "closed loop", "leader; pontoon " + version} {
		if !strings.Contains(running.stdout.String(), text) {
			t.Errorf("the table lacks %q:\n%s", text, running.stdout.String())
		}
	}

	code, p := benchRun(t, "--endpoints", fmt.Sprintf("127.0.0.1:%d", s.ports[0]))
	if code != 1 || !strings.Contains(p.stderr.String(), "pontoon bench: no server answers") {
		t.Errorf("a stopped node: exit code %d, %q", code, p.stderr.String())
	}
	if code, p := benchRun(t, "--ops", "put"); code != 2 || !strings.Contains(p.stderr.String(), "pontoon bench --help") {
		t.Errorf("a wrong flag: exit code %d, %q", code, p.stderr.String())
	}
}

// benchFlags are the flags of pontoon bench and their defaults, as its help has them.
func benchFlags(t *testing.T) map[string]string {
	t.Helper()
	var help, stderr strings.Builder
	if code := bench.Main(t.Context(), []string{"--help"}, &help, &stderr); code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr.String())
	}
	flags := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^  -([a-z-]+).*\n((?:    \t.*\n)+)`).FindAllStringSubmatch(help.String(), -1) {
		flags[m[1]] = ""
		if d := regexp.MustCompile(`\(default "?([^")]*)"?\)\n$`).FindStringSubmatch(m[2]); d != nil {
			flags[m[1]] = d[1]
		}
	}
	return flags
}

// TestBenchPage holds docs/bench.md against the flags, their defaults and the
// fields of the JSON.
func TestBenchPage(t *testing.T) {
	b, err := os.ReadFile("docs/bench.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	flags := benchFlags(t)
	named := map[string]bool{}
	for _, m := range regexp.MustCompile("--([a-z][a-z-]*)").FindAllStringSubmatch(text, -1) {
		named[m[1]] = true
		if _, ok := flags[m[1]]; !ok && m[1] != "help" {
			t.Errorf("docs/bench.md names the flag --%s, which does not exist", m[1])
		}
	}
	rows := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `--([a-z-]+)` \\| `?([^|`]*?)`? \\|").FindAllStringSubmatch(text, -1) {
		rows[m[1]] = strings.ReplaceAll(m[2], ",", "")
	}
	for name, value := range flags {
		row, ok := rows[name]
		if !ok {
			t.Errorf("docs/bench.md has no row for --%s", name)
		} else if value != "" && !strings.HasPrefix(row, value) && !strings.HasPrefix(value, "true ") {
			t.Errorf("docs/bench.md says that --%s is %q by default, it is %q", name, row, value)
		}
	}
	whole := bench.Result{Open: &bench.OpenLoop{}, Watch: &bench.Delivery{}, Latency: map[string]bench.Latency{}, Servers: []bench.Server{{}}}
	whole.Latency["put"] = bench.Latency{}
	out, err := json.Marshal(whole)
	if err != nil {
		t.Fatal(err)
	}
	var missing []string
	for _, m := range regexp.MustCompile(`"([a-z0-9_]+)":`).FindAllStringSubmatch(string(out), -1) {
		_, option := flags[strings.ReplaceAll(m[1], "_", "-")]
		if !option && !strings.Contains(text, "`"+m[1]+"`") && !slices.Contains(missing, m[1]) {
			missing = append(missing, m[1])
		}
	}
	if len(missing) > 0 {
		t.Errorf("docs/bench.md does not explain %v of the JSON", missing)
	}
}
