package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"pontoon/api"
	"pontoon/internal/watch"
	"pontoon/kv"
)

// docs/api.md is executed: its shell blocks in their order, in one shell, beside
// three nodes. What it shows as output, status and headers has to be that. Between
// curl and the nodes stands a proxy, so that every request and every answer is
// also held against api/openapi.json.

func apiPage(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// docStep is what is typed at once, and what it shows.
type docStep struct {
	line    int    // in docs/api.md
	command string // lines
	status  string // `201, ETag: "1"`; empty: no answer is an error
	output  []string
}

// docAnswer is the end of a line, or a line, that is no command.
var docAnswer = regexp.MustCompile(`^(.*?)\s*# (→ .*|[1-5]\d\d(?:, .*)?)$`)

// docSteps splits the shell blocks: a step ends before the next command once it
// has an answer, and at an empty line.
func docSteps(t *testing.T, text string) (steps []docStep) {
	t.Helper()
	shell, open := false, false
	answered := false
	for i, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(line, "```") {
			shell, open = !open && line == "```sh", !open
			answered = true
			continue
		}
		if !shell || line == "" {
			answered = true
			continue
		}
		answer := ""
		if m := docAnswer.FindStringSubmatch(line); m != nil {
			line, answer = m[1], m[2]
		}
		if line != "" {
			if answered {
				steps = append(steps, docStep{line: i + 1})
			}
			steps[len(steps)-1].command += line + "\n"
			answered = false
		}
		if answer == "" {
			continue
		}
		answered = true
		step := &steps[len(steps)-1]
		if output, ok := strings.CutPrefix(answer, "→ "); ok {
			step.output = append(step.output, output)
		} else {
			step.status = answer
		}
	}
	if open || len(steps) < 50 {
		t.Fatalf("docs/api.md: %d steps, the last block open: %v", len(steps), open)
	}
	return steps
}

// docExchange is one request and its answer, as they went by.
type docExchange struct {
	method, path string
	sent         []byte
	status       int
	header       http.Header
	body         []byte
	cut          bool // the body has no end
}

// docProxy stands before the nodes.
type docProxy struct {
	mu struct {
		sync.Mutex
		seen     []*docExchange
		underWay int
	}
}

// serve returns the address of a proxy to one node.
func (p *docProxy) serve(t *testing.T, target string) string {
	t.Helper()
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", strings.TrimPrefix(target, "http://")
			r.Out.Host = r.In.Host
		},
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0), // of clients that leave a watch
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		p.mu.underWay++
		p.mu.Unlock()
		x := &docExchange{method: r.Method, path: r.URL.EscapedPath()}
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		r = r.WithContext(ctx)
		rec := docRecorder{ResponseWriter: w, x: x}
		if x.path == "/v1/watch" {
			rec.leave = cancel
		}
		var sent bytes.Buffer
		r.Body = struct {
			io.Reader
			io.Closer
		}{io.TeeReader(r.Body, &sent), r.Body}
		defer func() {
			x.cut = recover() != nil || r.Context().Err() != nil // ReverseProxy panics where a body breaks off
			x.sent = sent.Bytes()
			p.mu.Lock()
			defer p.mu.Unlock()
			p.mu.underWay--
			p.mu.seen = append(p.mu.seen, x)
		}()
		forward.ServeHTTP(&rec, r)
	}))
	t.Cleanup(srv.Close)
	return srv.URL
}

// docRecorder copies what is written, and leaves a watch that has nothing more
// to say: that is sooner than --max-time on an idle machine, and late enough on a
// busy one.
type docRecorder struct {
	http.ResponseWriter
	x     *docExchange
	leave context.CancelFunc // of a watch
	idle  *time.Timer        // since the last message
}

const docIdle = 300 * time.Millisecond

func (r *docRecorder) WriteHeader(status int) {
	r.x.status, r.x.header = status, r.Header().Clone()
	r.ResponseWriter.WriteHeader(status)
}

func (r *docRecorder) Write(b []byte) (int, error) {
	r.x.body = append(r.x.body, b...)
	switch {
	case r.leave == nil:
	case r.idle == nil:
		r.idle = time.AfterFunc(docIdle, r.leave)
		time.AfterFunc(3*docIdle, r.leave) // it may never be idle, with progress=
	default:
		r.idle.Reset(docIdle)
	}
	return r.ResponseWriter.Write(b)
}

func (r *docRecorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// take returns what went by since the last time, once nothing is under way.
func (p *docProxy) take(t *testing.T) []*docExchange {
	t.Helper()
	waitFor(t, "the proxy to be idle", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.mu.underWay == 0
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := p.mu.seen
	p.mu.seen = nil
	return seen
}

// docShell is one shell that lives as long as the page.
type docShell struct {
	in  io.Writer
	out *bufio.Reader
}

const docMark = "-- end of step --"

func newDocShell(t *testing.T, dir string) *docShell {
	t.Helper()
	cmd := exec.Command("/bin/sh")
	cmd.Dir = dir
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the shell of docs/api.md: %v", err)
		}
	})
	s := &docShell{in, bufio.NewReader(out)}
	// Without a terminal curl would show its progress; and nothing may hang.
	s.run(t, `curl() { command curl -s --max-time 20 "$@"; }`)
	return s
}

func (s *docShell) run(t *testing.T, command string) string {
	t.Helper()
	if _, err := io.WriteString(s.in, command+"\necho; echo '"+docMark+"'\n"); err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for {
		line, err := s.out.ReadString('\n')
		if err != nil {
			t.Fatalf("the shell ended: %v after %s", err, all.String())
		}
		if line == docMark+"\n" {
			return strings.TrimSpace(all.String())
		}
		all.WriteString(line)
	}
}

func TestDocsCommands(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skipf("the commands of docs/api.md need curl, which this machine lacks: %v", err)
	}
	text := apiPage(t)
	steps := docSteps(t, text)
	s := newSite(t, 3, 0)
	s.start(1, 2, 3)
	proxy := &docProxy{}
	ports := []string{}
	for id := 1; id <= 3; id++ {
		addr := strings.TrimPrefix(proxy.serve(t, s.nodes[id].url), "http://127.0.0.1:")
		ports = append(ports, fmt.Sprintf("%d2380", id), addr, fmt.Sprintf("%d2379", id), strings.TrimPrefix(s.peers[id-1], "http://127.0.0.1:"))
	}
	for i, port := range freePorts(t, 3) { // addresses of members that never start
		ports = append(ports, fmt.Sprintf("%d2379", i+4), strconv.Itoa(port))
	}
	// The page moves leadership to member 2, and shows what a follower says.
	s.nodes[1].want(http.StatusNoContent, http.MethodPost, "/v1/leader", `{"to":1}`)
	replace := strings.NewReplacer(append(ports, " --max-time 1 ", " ")...) // see docRecorder
	sh := newDocShell(t, t.TempDir())
	d := loadOpenAPI(t)
	operations := map[string]bool{}
	for _, step := range steps {
		where := fmt.Sprintf("docs/api.md:%d: %s", step.line, strings.TrimSpace(step.command))
		output := sh.run(t, replace.Replace(step.command))
		seen := proxy.take(t)
		if want := replace.Replace(strings.Join(step.output, "\n")); !readmeMatches(output, want) {
			t.Errorf("%s\nprints %q\nwant   %q", where, output, want)
		}
		docStatus(t, where, &step, seen)
		for _, x := range seen {
			if op := x.conforms(t, d, where); op != nil {
				operations[op.OperationID] = true
			}
		}
	}
	for _, op := range d.ops {
		if !operations[op.OperationID] && op.method != http.MethodHead {
			t.Errorf("docs/api.md has no example of %s %s", op.method, op.path)
		}
	}
}

// docStatus compares the last answer of a step with what the page says of it.
func docStatus(t *testing.T, where string, step *docStep, seen []*docExchange) {
	t.Helper()
	if step.status == "" {
		return
	}
	if len(seen) == 0 {
		t.Errorf("%s\nsends no request", where)
		return
	}
	x := seen[len(seen)-1]
	status, headers, _ := strings.Cut(step.status, ", ")
	if strconv.Itoa(x.status) != status {
		t.Errorf("%s\nanswers %d %q, the page says %s", where, x.status, x.body, status)
	}
	for name, value := range docHeaders(headers) {
		if got := strings.Join(x.header.Values(name), ", "); !readmeMatches(got, value) {
			t.Errorf("%s\nanswers %s: %s, the page says %s", where, name, got, value)
		}
	}
}

var docHeader = regexp.MustCompile(`(?:^|, )([A-Z][A-Za-z-]+): `)

// docHeaders splits `ETag: "1", Kv-Revision: 1`.
func docHeaders(text string) map[string]string {
	headers := map[string]string{}
	at := docHeader.FindAllStringSubmatchIndex(text, -1)
	for i, m := range at {
		end := len(text)
		if i+1 < len(at) {
			end = at[i+1][0]
		}
		headers[text[m[2]:m[3]]] = text[m[1]:end]
	}
	return headers
}

// conforms holds an exchange against the document.
func (x *docExchange) conforms(t *testing.T, d *openAPI, where string) *openOperation {
	t.Helper()
	what := fmt.Sprintf("%s\n%s %s: %d", where, x.method, x.path, x.status)
	op := d.find(x.method, x.path)
	if op == nil {
		t.Errorf("%s: no such operation in api/openapi.json", what)
		return nil
	}
	response := op.response(x.status)
	if response == nil {
		t.Errorf("%s: %s does not have this status; %s", what, op.OperationID, x.body)
		return op
	}
	for name, h := range response.Headers {
		if h.Required && x.header.Get(name) == "" {
			t.Errorf("%s: the answer lacks %s", what, name)
		}
	}
	for name := range x.header {
		if (strings.HasPrefix(name, "Kv-") || slices.Contains([]string{"Etag", "Link", "Location", "Retry-After", "Preference-Applied", "Vary", "Allow"}, name)) &&
			response.Headers[name] == nil {
			t.Errorf("%s: the header %s: %s is not documented", what, name, x.header.Get(name))
		}
	}
	if x.status < 300 && x.status != http.StatusNoContent || x.status >= 400 {
		media, _, _ := strings.Cut(x.header.Get("Content-Type"), ";")
		content, ok := response.Content[media]
		if !ok && (x.method != http.MethodHead && (len(x.body) > 0 || x.status != http.StatusCreated)) {
			t.Errorf("%s: the media type %q is not documented", what, media)
		}
		if len(x.body) > 0 && (!x.cut || op.route == routeWatch) {
			docBody(t, d, what, media, content.Schema, x.body, x.cut)
		}
	}
	for media, content := range op.RequestBody.Content {
		if strings.Contains(media, "json") && x.status < 300 && len(x.sent) > 0 {
			docBody(t, d, what+" (request)", media, content.Schema, x.sent, false)
		}
	}
	return op
}

func docBody(t *testing.T, d *openAPI, what, media string, schema json.RawMessage, body []byte, cut bool) {
	t.Helper()
	texts := [][]byte{body}
	switch {
	case media == "application/x-ndjson":
		texts = bytes.Split(bytes.TrimSuffix(body, []byte("\n")), []byte("\n"))
		if cut && !bytes.HasSuffix(body, []byte("\n")) {
			texts = texts[:len(texts)-1]
		}
	case media == "text/event-stream":
		schema, texts = json.RawMessage(`{"$ref":"#/components/schemas/Change"}`), nil
		for line := range bytes.Lines(body) {
			if data, ok := bytes.CutPrefix(line, []byte("data: ")); ok {
				texts = append(texts, data)
			}
		}
	case !strings.Contains(media, "json"):
		return
	}
	for _, text := range texts {
		if err := d.validate(schema, text); err != nil {
			t.Errorf("%s: %v\n%s", what, err, text)
		}
	}
}

// TestDocsRows: each row of the contract has an example on the page.
func TestDocsRows(t *testing.T) {
	var commands strings.Builder
	for _, step := range docSteps(t, apiPage(t)) {
		commands.WriteString(strings.ReplaceAll(strings.TrimSpace(step.command), "\n", " ") + "\n")
	}
	text := commands.String()
	for _, row := range []struct{ name, pattern string }{
		{"PUT /{key}", `-X PUT -d \S+ \$P/[a-z-]+$`},
		{"GET /{key}", `^curl \$P/my-key$`},
		{"HEAD /{key}", `-I \$P/my-key`},
		{"POST /{id}", `-X POST -d http\S+ \$P/4$`},
		{"DELETE /{id}", `-X DELETE \$P/4$`},
		{"DELETE on no id", `-X DELETE \$P/my-key`},
		{"GET /v1/kv/{key}", `^curl \$Q/v1/kv/\S+$`},
		{"HEAD /v1/kv/{key}", `-I \$P/v1/kv/`},
		{"consistency", `consistency=stale`},
		{"min_revision", `min_revision=`},
		{"revision", `v1/kv/\S+\?revision=`},
		{"304", `If-None-Match: "\d+"' \$P/v1/kv`},
		{"long poll", `Prefer: wait=`},
		{"the entry as JSON", `Accept: application/json' \$P/v1/kv/`},
		{"PUT /v1/kv/{key}", `-X PUT -d \S+ \$P/v1/kv/`},
		{"If-Match", `-X PUT -H 'If-Match: "`},
		{"update only", `If-Match: \*`},
		{"create only", `If-None-Match: \*`},
		{"ttl", `-X PUT .*\?ttl=`},
		{"lease", `-X PUT .*\?lease=`},
		{"Idempotency-Key", `-X PUT -H 'Idempotency-Key: `},
		{"representation", `Prefer: return=representation`},
		{"DELETE /v1/kv/{key}", `-X DELETE \$P/v1/kv/`},
		{"DELETE if", `-X DELETE -H 'If-Match`},
		{"list by prefix", `^curl "\$P/v1/kv\?prefix=`},
		{"list by range", `^curl "\$P/v1/kv\?start=\S+&end=`},
		{"limit", `limit=2`}, {"after", `after=`}, {"reverse", `reverse=true`}, {"keys", `keys=true`}, {"count", `count=true`}, {"delimiter", `delimiter=/`},
		{"list at a revision", `v1/kv\?prefix=\S+&revision=`},
		{"export", `Accept: application/x-ndjson`},
		{"range delete", `-X DELETE "\$P/v1/kv\?`},
		{"history", `\?history=`},
		{"import", `--data-binary @\S+ "?\$[PQ]/v1/kv`}, {"atomic", `atomic=true`}, {"mode", `mode=create`},
		{"txn", `\$P/v1/txn`}, {"txn if", `"if":`}, {"txn else", `"else":`},
		{"watch key", `/v1/watch\?key=`}, {"watch prefix", `/v1/watch\?prefix=`}, {"watch range", `/v1/watch\?start=\S+&end=`},
		{"watch from", `watch\S+from=`}, {"Last-Event-ID", `Last-Event-ID: `}, {"initial", `initial=true`}, {"prev", `prev=true`},
		{"events", `events=`}, {"progress", `progress=`}, {"SSE", `text/event-stream`},
		{"POST /v1/leases", `\$P/v1/leases$`}, {"GET /v1/leases/{id}", `^curl \$[PQ]/v1/leases/\$`},
		{"PUT /v1/leases/{id}", `-X PUT \$P/v1/leases/\$`}, {"DELETE /v1/leases/{id}", `-X DELETE \$P/v1/leases/\$`},
		{"GET /v1/members", `^curl \$P/v1/members$`}, {"POST /v1/members", `-d .*\$P/v1/members$`},
		{"PUT /v1/members/{id}", `-X PUT .*/v1/members/`}, {"DELETE /v1/members/{id}", `-X DELETE \$P/v1/members/`},
		{"promote", `/promote`}, {"leader", `\$P/v1/leader`},
		{"status", `/v1/status`}, {"livez", `/livez`}, {"readyz", `/readyz\?verbose`}, {"metrics", `/metrics`}, {"openapi", `/v1/openapi.json`},
	} {
		if !regexp.MustCompile(`(?m)` + row.pattern).MatchString(text) {
			t.Errorf("docs/api.md has no command for %s (%s)", row.name, row.pattern)
		}
	}
}

// TestDocsErrors: the table of errors has all codes, each with what the server
// says of it.
func TestDocsErrors(t *testing.T) {
	outcomes := map[api.Code]api.Outcome{api.CodeInternal: api.OutcomeUnknown}
	for _, row := range errorTable {
		outcomes[row.code] = row.outcome
	}
	found := map[api.Code]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| ((?:`[a-z_]+`(?:, )?)+) \\| (\\d{3}) \\| (\\w+) \\|").FindAllStringSubmatch(apiPage(t), -1) {
		for name := range strings.SplitSeq(m[1], ", ") {
			code := api.Code(strings.Trim(name, "`"))
			found[code] = true
			if m[2] != strconv.Itoa(code.Status()) || m[3] != string(outcomes[code]) {
				t.Errorf("docs/api.md says %s and %s of %s, the server %d and %s", m[2], m[3], code, code.Status(), outcomes[code])
			}
		}
	}
	for _, code := range apiConstants(t, "Code") {
		if !found[api.Code(code)] {
			t.Errorf("docs/api.md does not explain the code %s", code)
		}
	}
}

// docSource returns the values of an unexported constant or variable of another
// package, read from its source: one, or the elements of an array.
func docSource(t *testing.T, file, name string) (values []int64) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	units := strings.NewReplacer("time.Minute", strconv.Itoa(int(time.Minute)), "time.Second", strconv.Itoa(int(time.Second)))
	ast.Inspect(f, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		i := slices.IndexFunc(v.Names, func(id *ast.Ident) bool { return id.Name == name })
		if i < 0 || i >= len(v.Values) {
			return true
		}
		terms := []ast.Expr{v.Values[i]}
		if list, ok := v.Values[i].(*ast.CompositeLit); ok {
			terms = list.Elts
		}
		for _, term := range terms {
			tv, err := types.Eval(token.NewFileSet(), nil, token.NoPos, units.Replace(types.ExprString(term)))
			if err != nil {
				t.Fatalf("%s: %s: %v", file, name, err)
			}
			value, _ := constant.Int64Val(tv.Value)
			values = append(values, value)
		}
		return true
	})
	if len(values) == 0 {
		t.Fatalf("%s does not define %s", file, name)
	}
	return values
}

func docConstant(t *testing.T, file, name string) int64 {
	t.Helper()
	return docSource(t, file, name)[0]
}

// docWindows is how long results are kept for idempotency keys.
func docWindows(t *testing.T) string {
	t.Helper()
	var windows []string
	for _, ns := range docSource(t, "kv/once.go", "keptWindows") {
		windows = append(windows, time.Duration(ns).String())
	}
	last := len(windows) - 1
	return strings.Join(windows[:last], ", ") + " or " + windows[last]
}

// docCount writes a number as the page does.
func docCount[T int | int64](n T) string {
	s := strconv.FormatInt(int64(n), 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func docBytes[T int | int64](n T) string {
	if n%(1<<20) == 0 {
		return strconv.FormatInt(int64(n>>20), 10) + " MiB"
	}
	return strconv.FormatInt(int64(n>>10), 10) + " KiB"
}

// TestDocsLimits: the table of limits shows the constants.
func TestDocsLimits(t *testing.T) {
	c := defaultConfig()
	rows := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^\| ([^|]+) \| ([^|]+) \| [^|]*\|$`).FindAllStringSubmatch(apiPage(t), -1) {
		rows[m[1]] = m[2]
	}
	delete(rows, "what")
	for _, want := range [][2]string{
		{"key", docCount(c.MaxKeyBytes) + " bytes"},
		{"value", docBytes(c.MaxValueBytes) + " (`--max-value-bytes`)"},
		{"body of a transaction or an atomic import", docBytes(int64(maxTxnBytes))},
		{"operations of a transaction, both branches together", docCount(maxTxnOps)},
		{"comparisons of a transaction", docCount(maxTxnCompares)},
		{"what the gets of a transaction return", docCount(kv.MaxTxnItems) + " entries, " + docBytes(kv.MaxTxnReadBytes) + "; " + docBytes(kv.MaxOnceBytes) + " with an Idempotency-Key"},
		{"page of a list", docCount(defaultLimit) + " items by default, " + docCount(maxListLimit) + " at most, " + docBytes(maxPageBytes)},
		{"ETags in one header", docCount(kv.MaxRevisions)},
		{"`delimiter`", docCount(maxDelimiter) + " bytes"},
		{"versions of one `history=`", docCount(maxHistory)},
		{"changes kept for `revision=`, `history=`, `from=`", docCount(docConstant(t, "kv/history.go", "maxEvents")) + " events, " + docBytes(docConstant(t, "kv/history.go", "maxEventSize"))},
		{"TTL", minTTL.String() + " to " + strconv.Itoa(int(maxTTL.Hours())) + "h (" + strconv.Itoa(int(maxTTL.Hours()/24)) + " days)"},
		{"keys shown by a lease", docCount(maxLeaseKeys) + "; `key_count` counts all"},
		{"Idempotency-Key", docCount(kv.MaxOnceKey) + " characters"},
		{"results kept for them", docCount(docConstant(t, "kv/once.go", "maxKept")) + ", " + docBytes(docConstant(t, "kv/once.go", "maxKeptBytes"))},
		{"how long, the fuller the shorter", docWindows(t)},
		{"keys and prefixes of one watch", docCount(maxWatchTerms)},
		{"queue of one watch; a single message may be larger", docCount(watch.DefaultMaxMessages) + " messages, " + docBytes(watch.DefaultMaxBytes)},
		{"`progress=`", minProgress.String() + " to " + maxProgress.String()},
		{"open watches and long polls on a member", docCount(maxWatches)},
		{"exports under way on a member", docCount(maxExports)},
		{"reads of an older revision that undo later changes, at once on a member", docCount(maxUndoing)},
		{"requests that wait on a member", docCount(c.MaxInFlight) + " (`--max-in-flight`)"},
		{"bodies under way on a member, beyond the first " + docBytes(minBodyBuffer) + " of each; of an import in chunks, lines beyond " + docBytes(lineBuffer), docBytes(int64(maxBodyBytes))},
		{"imports in chunks under way on a member", docCount(maxImports) + ", and half of the requests that wait"},
		{"pause inside the body of a request", bodyProgress.String() + ", and an import in chunks has to bring " + docBytes(importPiece) + " in " + importProgress.String()},
		{"what answers of more than " + docBytes(smallAnswer) + " hold on a member until they are read", docBytes(int64(maxAnswerBytes))},
		{"connections to a member", docCount(c.MaxConns) + " (`--max-connections`), or the limit of open files less " + docCount(fileReserve)},
		{"calls of HTTP/2 under way on a member, other than health", "as many as connections"},
		{"`timeout=`", c.DefaultTimeout.String() + " by default, " + c.MaxTimeout.String() + " at most"},
		{"`Prefer: wait=`", docCount(maxWaitSeconds) + " seconds"},
	} {
		if rows[want[0]] != want[1] {
			t.Errorf("docs/api.md says %q of %s, the server has %q", rows[want[0]], want[0], want[1])
		}
		delete(rows, want[0])
	}
	for name := range rows {
		t.Errorf("docs/api.md: no test for the limit of %s", name)
	}
}

// TestDocsLinks: they lead somewhere.
func TestDocsLinks(t *testing.T) {
	text := apiPage(t)
	headings := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^#+ (.+)$`).FindAllStringSubmatch(text, -1) {
		headings["#"+strings.ReplaceAll(strings.ToLower(m[1]), " ", "-")] = true
	}
	for _, m := range regexp.MustCompile(`\]\(([^)]+)\)`).FindAllStringSubmatch(text, -1) {
		switch target := m[1]; {
		case strings.HasPrefix(target, "https://"):
		case strings.HasPrefix(target, "#"):
			if !headings[target] {
				t.Errorf("docs/api.md links to %s, and there is no such heading", target)
			}
		default:
			if _, err := os.Stat("docs/" + target); err != nil {
				t.Errorf("docs/api.md links to %s: %v", target, err)
			}
		}
	}
}
