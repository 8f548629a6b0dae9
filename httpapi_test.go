// The client contract, row by row, then what a table cannot say.
//
// long: the fake node and the raw client at its top serve every test below.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"pontoon/api"
	"pontoon/internal/watch"
	"pontoon/kv"
)

// fakeBackend answers as told and notes what it was asked. The zero value
// knows every key: its value is "value", of mod revision 7 at revision 9.
type fakeBackend struct {
	err     error                                               // what every call returns
	existed bool                                                // what put and delete found
	there   bool                                                // what addMember found
	value   []byte                                              // what get returns instead of "value"
	result  *kv.Result                                          // what propose returns instead
	onPut   func(ctx context.Context, key string, value []byte) // before a put returns
	onGet   func(ctx context.Context) error                     // before get returns
	sick    []check

	mu struct {
		sync.Mutex
		calls []string
	}
}

func (f *fakeBackend) note(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.calls = append(f.mu.calls, fmt.Sprintf(format, args...))
}

// takeCalls returns what was called since the last time, in order.
func (f *fakeBackend) takeCalls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.mu.calls
	f.mu.calls = nil
	return calls
}

func (f *fakeBackend) propose(ctx context.Context, c *kv.Command) (kv.Result, error) {
	f.note("%s", commandText(c))
	if f.onPut != nil && c.Op == kv.OpPut {
		f.onPut(ctx, c.Key, c.Value)
	}
	switch {
	case f.err != nil:
		return kv.Result{}, f.err
	case f.result != nil:
		return *f.result, nil
	case c.Op == kv.OpPut:
		return kv.Result{Revision: 9, Existed: f.existed, Entry: kv.Entry{ModRevision: 9}}, ctx.Err()
	}
	return kv.Result{Revision: 9, Existed: f.existed}, ctx.Err()
}

// commandText is how the tests write a command down: what is zero is left out.
func commandText(c *kv.Command) string {
	var text string
	switch c.Op {
	case kv.OpPut:
		text = fmt.Sprintf("put %q=%q", c.Key, short(c.Value))
	case kv.OpDelete:
		text = fmt.Sprintf("delete %q", c.Key)
	case kv.OpDeleteRange:
		text = fmt.Sprintf("delete range %q", c.Span)
	case kv.OpTxn:
		text = fmt.Sprintf("txn %+v", *c.Txn)
	default:
		text = fmt.Sprintf("op %d", c.Op)
	}
	if c.If.Kind != kv.CheckNothing {
		text += fmt.Sprintf(" if %d %v", c.If.Kind, c.If.Revisions)
	}
	if c.TTL != 0 {
		text += fmt.Sprintf(" ttl %v", c.TTL)
	}
	if c.Lease != 0 {
		text += fmt.Sprintf(" lease %d", c.Lease)
	}
	if (c.Wall != 0) != (c.TTL != 0 || c.Lease != 0) && c.Op != kv.OpTxn {
		text += fmt.Sprintf(" wall %d", c.Wall)
	}
	if c.Once != nil {
		text += fmt.Sprintf(" once %q", c.Once.Key)
	}
	return text
}

func (o readOptions) String() string {
	var text string
	if o.stale {
		text += " stale"
	}
	if o.minRevision != 0 {
		text += fmt.Sprintf(" min %d", o.minRevision)
	}
	if o.revision != 0 {
		text += fmt.Sprintf(" at %d", o.revision)
	}
	return text
}

func (f *fakeBackend) sync(_ context.Context, o readOptions) error {
	f.note("sync%v", o)
	return f.err
}

func (f *fakeBackend) get(ctx context.Context, key string, o readOptions) (kv.Entry, int64, error) {
	f.note("get %q%v", key, o)
	if f.onGet != nil {
		if err := f.onGet(ctx); err != nil {
			return kv.Entry{}, 0, err
		}
	}
	if f.err != nil {
		return kv.Entry{}, 0, f.err
	}
	value := f.value
	if value == nil {
		value = []byte("value")
	}
	return kv.Entry{Key: key, Value: value, CreateRevision: 3, ModRevision: 7, Version: 2}, 9, nil
}

// read shows an empty store.
func (f *fakeBackend) read(_ context.Context, o readOptions, whole bool, do func(*kv.View) error) error {
	f.note("read%v whole=%v", o, whole)
	if f.err != nil {
		return f.err
	}
	v, err := kv.NewState().View(0)
	if err != nil {
		return err
	}
	return do(v)
}

func (f *fakeBackend) history(_ context.Context, o readOptions) (kv.History, error) {
	f.note("history%v", o)
	return kv.History{}, f.err
}

func (f *fakeBackend) lease(_ context.Context, id int64, o readOptions) (leaseInfo, error) {
	f.note("lease %d%v", id, o)
	if f.err != nil {
		return leaseInfo{}, f.err
	}
	return leaseInfo{Lease: kv.Lease{ID: id, TTL: 30 * time.Second, Keys: 1}, remaining: 29 * time.Second, keys: []string{"k"}}, nil
}

// subscribe begins a watch that nothing is published to.
func (f *fakeBackend) subscribe(filter watch.Filter, initial bool) (*watch.Watcher, kv.History, *kv.View, error) {
	f.note("subscribe %+v initial=%v", filter, initial)
	if f.err != nil {
		return nil, kv.History{}, nil, f.err
	}
	w, err := new(watch.Hub).Add(filter, 9)
	return w, kv.History{}, nil, err
}

func (f *fakeBackend) members() []api.Member {
	return []api.Member{{ID: 1, PeerURLs: []string{"http://h:1"}, Role: api.RoleVoter, Leader: true}}
}

func (f *fakeBackend) addMember(_ context.Context, m memberSpec) (api.Member, bool, error) {
	f.note("add %+v", m)
	if m.ID == 0 {
		m.ID = 77
	}
	return api.Member{ID: m.ID, PeerURLs: []string{m.PeerURL}, Role: api.RoleLearner}, !f.there, f.err
}

func (f *fakeBackend) removeMember(_ context.Context, id uint64, force bool) error {
	f.note("remove %d %v", id, force)
	return f.err
}

func (f *fakeBackend) updateMember(_ context.Context, id uint64, peerURL string) error {
	f.note("update %d %s", id, peerURL)
	return f.err
}

func (f *fakeBackend) promoteMember(_ context.Context, id uint64) error {
	f.note("promote %d", id)
	return f.err
}

func (f *fakeBackend) transferLeader(_ context.Context, to uint64) error {
	f.note("lead %d", to)
	return f.err
}

func (f *fakeBackend) leader() uint64 { return 2 }

func (f *fakeBackend) status(context.Context) api.Status {
	return api.Status{ID: 1, ClusterID: "c0ffee", Role: api.RoleFollower, Leader: 2, Revision: 9}
}

func (f *fakeBackend) checks(context.Context) []check {
	return append([]check{{"leader", nil}, {"disk", nil}}, f.sick...)
}

func (f *fakeBackend) live(context.Context) []check { return []check{{"raft", nil}} }

func short(b []byte) string {
	if len(b) > 40 {
		return fmt.Sprintf("%d bytes", len(b))
	}
	return string(b)
}

func testLimits() limits {
	return limits{MaxKeyBytes: 4096, MaxValueBytes: 1 << 20, MaxInFlight: 16,
		DefaultTimeout: 5 * time.Second, MaxTimeout: time.Minute, MaxConns: 64, MaxBodyBytes: 64 << 20,
		MaxAnswerBytes: 64 << 20, MaxExports: 4, MaxTxnBytes: 4 << 20}
}

// testAPI is a handler with its backend and metrics.
type testAPI struct {
	http.Handler
	*fakeBackend
	m   *httpMetrics
	reg *prometheus.Registry
}

func newTestAPI(f *fakeBackend, l limits) *testAPI { return newTestAPIOver(f, f, l) }

// newTestAPIOver serves b, which may be a fake or hold one.
func newTestAPIOver(b backend, f *fakeBackend, l limits) *testAPI {
	reg := prometheus.NewRegistry()
	m := newHTTPMetrics(reg)
	return &testAPI{newHTTPAPI(b, l, m, reg, zap.NewNop()), f, m, reg}
}

// serveTest runs h on a socket until the test ends, and returns its address.
func serveTest(t testing.TB, h http.Handler) string {
	t.Helper()
	l, err := listenClient("127.0.0.1:0", "--listen-client", 64)
	if err != nil {
		t.Fatal(err)
	}
	srv := newClientServer(h, zap.NewNop())
	done := make(chan error)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
	return l.Addr().String()
}

// rawConn is a client that sends exactly the bytes it is told to.
type rawConn struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

func dialRaw(t testing.TB, addr string) *rawConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second)) // a hang becomes a failure
	return &rawConn{t, c, bufio.NewReader(c)}
}

func (c *rawConn) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

type answer struct {
	status int
	header http.Header
	body   string
	closes bool
}

func (c *rawConn) answer(method string) answer {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("no answer: %v", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatalf("answer cut short: %v", err)
	}
	return answer{resp.StatusCode, resp.Header, string(body), resp.Close}
}

// exchange sends one request on a connection of its own.
func exchange(t testing.TB, addr, method, target, headers, body string) answer {
	t.Helper()
	c := dialRaw(t, addr)
	defer c.Close()
	if body != "" || method == "PUT" || method == "POST" {
		headers += "Content-Length: " + strconv.Itoa(len(body)) + "\r\n"
	}
	c.send(method + " " + target + " HTTP/1.1\r\nHost: pontoon\r\n" + headers + "\r\n" + body)
	return c.answer(method)
}

func problemOf(t testing.TB, a answer) api.Error {
	t.Helper()
	var p api.Error
	if got := a.header.Get("Content-Type"); got != api.ProblemType {
		t.Fatalf("Content-Type %q, want %q; body %s", got, api.ProblemType, a.body)
	}
	if err := json.Unmarshal([]byte(a.body), &p); err != nil {
		t.Fatalf("%v in %s", err, a.body)
	}
	if p.Status != a.status || p.Title == "" || p.Detail == "" || p.Hint == "" || !strings.HasSuffix(p.Type, string(p.Code)) {
		t.Errorf("incomplete problem for status %d: %s", a.status, a.body)
	}
	return p
}

// contractRow is one line of API.md. Rows with a code are asked twice: as curl
// asks, then with an Accept that allows JSON.
type contractRow struct {
	method, target string
	headers        string // "Name: value\r\n" each
	body           string
	backend        *fakeBackend // nil: the zero one
	status         int
	want           []string // "Name: value" of the answer; "Name:" is absence
	text           string   // the whole body; with a leading ~ a part of it
	call           string   // the backend call; empty: none
	code           api.Code
	outcome        api.Outcome // empty with a code: not_applied
}

func contractRows() []contractRow {
	value := []string{`Etag: "7"`, "Kv-Revision: 9", "Kv-Create-Revision: 3", "Kv-Version: 2", "Content-Length: 5",
		"Content-Type: application/octet-stream", "X-Content-Type-Options: nosniff", "Content-Security-Policy: sandbox", "Location:"}
	written := []string{`Etag: "9"`, "Kv-Revision: 9", "Kv-Notice:"}
	missing := &fakeBackend{err: errKeyNotFound}
	form := "Content-Type: application/x-www-form-urlencoded\r\n"
	long := strings.Repeat("k", 4096)
	rows := []contractRow{
		// The classic calls.
		{method: "GET", target: "/my-key", status: 200, want: value, text: "value", call: `get "my-key"`},
		{method: "GET", target: "/my-key", headers: "Accept: application/json\r\n", status: 200, want: value, text: "value", call: `get "my-key"`},
		{method: "HEAD", target: "/my-key", status: 200, want: value, text: "", call: `get "my-key"`},
		{method: "GET", target: "/my-key", backend: missing, status: 404, text: "Failed to GET\n", code: api.CodeKeyNotFound, call: `get "my-key"`},
		{method: "PUT", target: "/my-key", body: "hello", headers: form, status: 204, want: written, call: `put "my-key"="hello"`},
		{method: "PUT", target: "/my-key", body: "a=1&b=%20", headers: form, backend: &fakeBackend{existed: true}, status: 204, want: written, call: `put "my-key"="a=1&b=%20"`},
		{method: "PUT", target: "/my-key", status: 204, want: written, call: `put "my-key"=""`},
		{method: "PUT", target: "/3", body: "x", status: 204, want: []string{"Kv-Notice: numeric key; DELETE /3 removes member 3"}, call: `put "3"="x"`},
		{method: "PUT", target: "/03", body: "x", status: 204, want: written, call: `put "03"="x"`},
		{method: "PUT", target: "/v1/kv/3", body: "x", status: 201, want: written, call: `put "3"="x"`},
		{method: "POST", target: "/4", body: "http://127.0.0.1:42379\n", headers: form, status: 204, call: "add {ID:4 PeerURL:http://127.0.0.1:42379 Learner:false}"},
		{method: "POST", target: "/4", body: "http://127.0.0.1:42379", backend: &fakeBackend{there: true}, status: 204, call: "add {ID:4 PeerURL:http://127.0.0.1:42379 Learner:false}"},
		{method: "POST", target: "/4", body: "http://127.0.0.1:42379", backend: &fakeBackend{err: errMemberExists}, status: 409, code: api.CodeMemberExists, call: "add {ID:4 PeerURL:http://127.0.0.1:42379 Learner:false}"},
		{method: "POST", target: "/4", body: "nonsense", status: 400, code: api.CodeBadRequest, text: "~not of the form"},
		{method: "POST", target: "/4", body: "http://nowhere", status: 400, code: api.CodeBadRequest, text: "~not of the form"},
		{method: "POST", target: "/4", body: strings.Repeat("u", 3000), status: 413, code: api.CodeTooLarge},
		{method: "DELETE", target: "/3", status: 204, call: "remove 3 false"},
		{method: "DELETE", target: "/3?force=true", status: 204, call: "remove 3 true"},
		{method: "DELETE", target: "/3?force=false", status: 204, call: "remove 3 false"},
		{method: "DELETE", target: "/18446744073709551615", status: 204, call: "remove 18446744073709551615 false"},
		{method: "DELETE", target: "/3", backend: &fakeBackend{err: errQuorumAtRisk}, status: 409, code: api.CodeQuorumAtRisk, text: "~force=true", call: "remove 3 false"},
		{method: "POST", target: "/my-key", body: "x", status: 400, code: api.CodeBadRequest, text: "Failed on POST\nhint: a key is written with PUT /v1/kv/my-key; a member is added with POST /v1/members\n"},
		{method: "DELETE", target: "/my-key", status: 400, code: api.CodeBadRequest, text: "Failed on DELETE\nhint: a key is deleted with DELETE /v1/kv/my-key; a member is removed with DELETE /v1/members/{id}\n"},
		{method: "PATCH", target: "/my-key", status: 405, want: []string{"Allow: GET, HEAD, PUT, POST, DELETE"}, code: api.CodeMethodNotAllowed},
		{method: "OPTIONS", target: "/my-key", status: 405, want: []string{"Allow: GET, HEAD, PUT, POST, DELETE"}, code: api.CodeMethodNotAllowed},
		{method: "GET", target: "/", status: 400, code: api.CodeBadRequest, text: "~Empty key"},
		{method: "PUT", target: "/v1/kv/", body: "x", status: 400, code: api.CodeBadRequest, text: "~Empty key"},
		{method: "GET", target: "/" + long, status: 200, text: "value", call: `get "` + long + `"`},
		{method: "GET", target: "/" + long + "k", status: 414, code: api.CodeKeyTooLong},
		{method: "GET", target: "/" + strings.Repeat("%6B", 4096), status: 200, text: "value", call: `get "` + long + `"`},
		{method: "PUT", target: "/v1/kv/" + long + "k", body: "x", status: 414, code: api.CodeKeyTooLong},

		// /v1/kv.
		{method: "GET", target: "/v1/kv/my-key", status: 200, want: value, text: "value", call: `get "my-key"`},
		{method: "HEAD", target: "/v1/kv/my-key", status: 200, want: value, call: `get "my-key"`},
		{method: "GET", target: "/v1/kv/my-key", backend: missing, status: 404, code: api.CodeKeyNotFound, text: "Key not found: the key does not exist\nhint: write it with PUT first\n", call: `get "my-key"`},
		{method: "GET", target: "/v1/kv/k?consistency=stale&min_revision=12", status: 200, text: "value", call: `get "k" stale min 12`},
		{method: "GET", target: "/k?consistency=linearizable", status: 200, text: "value", call: `get "k"`},
		{method: "GET", target: "/v1/kv/k", headers: "Accept: application/json\r\n", status: 200, want: []string{`Etag: "7"`, "Kv-Revision: 9", "Kv-Create-Revision: 3", "Kv-Version: 2", "Content-Type: application/json", "Vary: Accept", "X-Content-Type-Options: nosniff", "Content-Security-Policy: sandbox"},
			text: `{"key":"k","value":"value","create_revision":3,"mod_revision":7,"version":2}` + "\n", call: `get "k"`},
		{method: "GET", target: "/v1/kv/k", headers: "Accept: application/json;q=0.1, */*\r\n", status: 200, want: append(value, "Vary: Accept"), text: "value", call: `get "k"`},
		{method: "PUT", target: "/v1/kv/k", headers: "Content-Encoding: identity\r\n", body: "x", status: 201, want: append(written, "Content-Length: 0"), call: `put "k"="x"`},
		{method: "PUT", target: "/v1/kv/k", body: "x", status: 201, want: append(written, "Content-Length: 0"), call: `put "k"="x"`},
		{method: "PUT", target: "/v1/kv/k", body: "x", backend: &fakeBackend{existed: true}, status: 204, want: written, call: `put "k"="x"`},
		{method: "PUT", target: "/v1/kv/k", body: strings.Repeat("v", 1<<20), status: 201, call: `put "k"="1048576 bytes"`},
		{method: "PUT", target: "/k", headers: "Content-Range: bytes 0-1/5\r\n", body: "he", status: 400, code: api.CodeBadRequest, text: "~Content-Range"},
		{method: "DELETE", target: "/v1/kv/k", backend: &fakeBackend{existed: true}, status: 204, want: []string{"Kv-Deleted: 1", "Kv-Revision: 9"}, call: `delete "k"`},
		{method: "DELETE", target: "/v1/kv/k", status: 204, want: []string{"Kv-Deleted: 0", "Kv-Revision: 9"}, call: `delete "k"`},
		{method: "DELETE", target: "/v1/kv/3", status: 204, want: []string{"Kv-Deleted: 0"}, call: `delete "3"`},
		{method: "POST", target: "/v1/kv/k", body: "x", status: 405, want: []string{"Allow: GET, HEAD, PUT, DELETE"}, code: api.CodeMethodNotAllowed},

		// Reads and writes that did not succeed.
		{method: "PUT", target: "/k", body: "x", backend: &fakeBackend{err: errNoLeader}, status: 503, want: []string{"Retry-After: 1"}, code: api.CodeNoLeader, call: `put "k"="x"`},
		{method: "PUT", target: "/k", body: "x", backend: &fakeBackend{err: errCommitTimeout}, status: 504, code: api.CodeCommitTimeout, outcome: api.OutcomeUnknown, call: `put "k"="x"`},
		{method: "PUT", target: "/k", body: "x", backend: &fakeBackend{err: errDiskLow}, status: 507, code: api.CodeDiskLow, call: `put "k"="x"`},
		{method: "PUT", target: "/k", body: "x", backend: &fakeBackend{err: errors.New("secret /var/lib")}, status: 500, code: api.CodeInternal, outcome: api.OutcomeUnknown, text: "Internal error: the member met an unexpected error; its log has it\nhint: a write may have taken effect: read the key back; the log of this member says what went wrong\n", call: `put "k"="x"`},
		{method: "GET", target: "/k", backend: &fakeBackend{err: errors.New("secret")}, status: 500, code: api.CodeInternal, call: `get "k"`},
		{method: "GET", target: "/k", backend: &fakeBackend{err: errNoLeader}, status: 503, want: []string{"Retry-After: 1"}, code: api.CodeNoLeader, text: "~No leader: ", call: `get "k"`},

		// The cluster.
		{method: "GET", target: "/v1/members", status: 200, want: []string{"Content-Type: application/json"}, text: `{"members":[{"id":1,"peer_urls":["http://h:1"],"role":"voter","leader":true}]}` + "\n"},
		{method: "HEAD", target: "/v1/members", status: 200},
		{method: "POST", target: "/v1/members", body: `{"peer_url":"http://h:5"}`, status: 201, want: []string{"Location: /v1/members/77", "Content-Type: application/json"},
			text: `{"id":77,"peer_urls":["http://h:5"],"role":"learner","leader":false}` + "\n", call: "add {ID:0 PeerURL:http://h:5 Learner:false}"},
		{method: "POST", target: "/v1/members", body: ` {"id":18446744073709551615,"peer_url":"http://h:5","learner":true} `, status: 201, want: []string{"Location: /v1/members/18446744073709551615"}, call: "add {ID:18446744073709551615 PeerURL:http://h:5 Learner:true}"},
		{method: "POST", target: "/v1/members", body: `{"id":5,"peer_url":"http://h:5"}`, backend: &fakeBackend{there: true}, status: 200, want: []string{"Location: /v1/members/5"}, call: "add {ID:5 PeerURL:http://h:5 Learner:false}"},
		{method: "POST", target: "/v1/members", body: `{"peer_url":"http://h:5"}`, backend: &fakeBackend{err: errMembershipInProgress}, status: 409, want: []string{"Location:"}, code: api.CodeMembershipInProgress, call: "add {ID:0 PeerURL:http://h:5 Learner:false}"},
		{method: "DELETE", target: "/v1/members/3?force=true", status: 204, call: "remove 3 true"},
		{method: "DELETE", target: "/v1/members/03", status: 400, code: api.CodeBadRequest},
		{method: "GET", target: "/v1/members/3", status: 405, want: []string{"Allow: PUT, DELETE"}, code: api.CodeMethodNotAllowed},
		{method: "PUT", target: "/v1/members/3", body: `{"peer_url":"https://h:6"}`, status: 204, call: "update 3 https://h:6"},
		{method: "PUT", target: "/v1/members/3", body: `{"peer_url":"http://h:6"}`, backend: &fakeBackend{err: errMemberUnknown}, status: 404, code: api.CodeMemberNotFound, call: "update 3 http://h:6"},
		{method: "PUT", target: "/v1/members/3", body: `{"peer_url":"http://h:6/x"}`, status: 400, code: api.CodeBadRequest},
		{method: "POST", target: "/v1/members/3/promote", status: 204, call: "promote 3"},
		{method: "POST", target: "/v1/members/3/promote", body: "{}", status: 400, code: api.CodeBadRequest},
		{method: "POST", target: "/v1/members/3/promote", backend: &fakeBackend{err: errLearnerBehind}, status: 412, code: api.CodePreconditionFailed, call: "promote 3"},
		{method: "PUT", target: "/v1/members/3/promote", status: 405, want: []string{"Allow: POST"}, code: api.CodeMethodNotAllowed},
		{method: "POST", target: "/v1/leader", body: `{"to":2}`, status: 204, call: "lead 2"},
		{method: "POST", target: "/v1/leader", body: `{"to":2}`, backend: &fakeBackend{err: errTransferRefused}, status: 409, code: api.CodeTransferRefused, call: "lead 2"},
		{method: "POST", target: "/v1/leader", body: `{"to":2}`, backend: &fakeBackend{err: errTransferTimeout}, status: 504, code: api.CodeTransferTimeout, outcome: api.OutcomeUnknown, call: "lead 2"},
		{method: "POST", target: "/v1/leader", body: `{}`, status: 400, code: api.CodeBadRequest, text: "~lacks the field to"},
		{method: "PUT", target: "/v1/leader", body: `{"to":2}`, status: 405, want: []string{"Allow: POST"}, code: api.CodeMethodNotAllowed},
		{method: "GET", target: "/v1/status", status: 200, want: []string{"Content-Type: application/json"}, text: `~{"id":1,"cluster_id":"c0ffee","role":"follower","leader":2,"term":0`},
		{method: "GET", target: "/v1/status?timeout=1s", status: 200, text: `~"peers":[]`},
		{method: "DELETE", target: "/v1/status", status: 405, want: []string{"Allow: GET, HEAD"}, code: api.CodeMethodNotAllowed},

		// Health.
		{method: "GET", target: "/livez", status: 200, text: "ok\n"},
		{method: "GET", target: "/livez?verbose", status: 200, text: "[+]raft ok\n"},
		{method: "HEAD", target: "/readyz", status: 200},
		{method: "GET", target: "/readyz?verbose", status: 200, text: "[+]leader ok\n[+]disk ok\n"},
		{method: "GET", target: "/readyz", backend: &fakeBackend{sick: []check{{"wal", errors.New("slow")}}}, status: 503, text: "[-]wal failed: slow\n"},
		{method: "GET", target: "/readyz?verbose=true", backend: &fakeBackend{sick: []check{{"wal", errors.New("slow")}}}, status: 503, text: "[+]leader ok\n[+]disk ok\n[-]wal failed: slow\n"},
		{method: "GET", target: "/metrics", status: 200, text: "~pontoon_http_requests_in_flight 0"},
		{method: "PATCH", target: "/livez", status: 405, want: []string{"Allow: GET, HEAD"}, code: api.CodeMethodNotAllowed},

		// A web page must not be able to change anything.
		{method: "POST", target: "/4", headers: "Sec-Fetch-Site: cross-site\r\n", body: "http://h:4", status: 403, code: api.CodeCrossOrigin},
		{method: "POST", target: "/4", headers: "Sec-Fetch-Site: same-site\r\n", body: "http://h:4", status: 403, code: api.CodeCrossOrigin},
		{method: "PUT", target: "/k", headers: "Origin: http://evil.example\r\n", body: "x", status: 403, code: api.CodeCrossOrigin},
		{method: "DELETE", target: "/v1/kv/k", headers: "Origin: null\r\n", status: 403, code: api.CodeCrossOrigin},
		{method: "POST", target: "/v1/leader", headers: "Origin: http://pontoon.evil\r\n", body: `{"to":1}`, status: 403, code: api.CodeCrossOrigin},
		{method: "PUT", target: "/k", headers: "Origin: http://pontoon\r\n", body: "x", status: 204, call: `put "k"="x"`},
		{method: "PUT", target: "/k", headers: "Sec-Fetch-Site: same-origin\r\n", body: "x", status: 204, call: `put "k"="x"`},
		{method: "GET", target: "/k", headers: "Sec-Fetch-Site: cross-site\r\n", status: 200, text: "value", call: `get "k"`},
	}
	return slices.Concat(rows, reservedRows(), refusedOptionRows(), badBodyRows())
}

// reservedRows: a root call on a reserved name is a 404 that says where the
// key is, whatever the method.
func reservedRows() []contractRow {
	var rows []contractRow
	for _, name := range []string{"v1", "v1/", "v1/foo", "v3", "v3/kv/range", "version", "version/x", "health", "ui", "ui/", "debug", "debug/pprof/"} {
		for _, method := range []string{"GET", "HEAD", "PUT", "POST", "DELETE"} {
			text := "~a key of this name is reached as /v1/kv/" + name + "\n"
			if method == "HEAD" {
				text = ""
			}
			rows = append(rows, contractRow{method: method, target: "/" + name, status: 404, code: api.CodePathNotFound, text: text})
		}
		rows = append(rows, contractRow{method: "PUT", target: "/v1/kv/" + name, body: "x", status: 201, call: fmt.Sprintf(`put %q="x"`, name)})
	}
	for _, name := range []string{"livez", "readyz", "metrics"} {
		for _, method := range []string{"PUT", "POST", "DELETE"} {
			rows = append(rows, contractRow{method: method, target: "/" + name, status: 404, code: api.CodePathNotFound, text: "~reached as /v1/kv/" + name + "\n"})
		}
		rows = append(rows, contractRow{method: "GET", target: "/" + name + "/x", status: 404, code: api.CodePathNotFound, text: "~reached as /v1/kv/" + name + "/x\n"})
	}
	// The encoding of a reserved name does not matter; a longer name is not reserved.
	rows = append(rows, contractRow{method: "GET", target: "/%761/kv/k", status: 404, code: api.CodePathNotFound},
		contractRow{method: "PUT", target: "/v1%2Fkv%2Fk", body: "x", status: 404, code: api.CodePathNotFound},
		contractRow{method: "DELETE", target: "/%6Cive%7A", status: 404, code: api.CodePathNotFound})
	for _, name := range []string{"v2", "v10", "V1", "healthz", "versions", "livez2", "metric"} {
		rows = append(rows, contractRow{method: "PUT", target: "/" + name, body: "x", status: 204, call: fmt.Sprintf(`put %q="x"`, name)})
	}
	rows = append(rows, contractRow{method: "GET", target: "/v1/snapshot", status: 501, code: api.CodeUnsupported})
	return rows
}

// refusedOptionRows: no option or header is ever ignored.
func refusedOptionRows() []contractRow {
	var rows []contractRow
	refused := func(method, target, headers, name string) {
		rows = append(rows, contractRow{method: method, target: target, headers: headers, status: 400, code: api.CodeBadRequest, text: "~" + name})
	}
	for header, calls := range map[string][]string{
		`If-Match: "17"`:                 {"GET /k", "HEAD /v1/kv/k", "DELETE /3", "POST /v1/members", "GET /v1/status", "POST /v1/txn", "POST /v1/leases"},
		`If-None-Match: "7"`:             {"DELETE /3", "POST /4", "POST /v1/members", "GET /v1/members", "POST /v1/txn", "GET /v1/leases/7"},
		"Idempotency-Key: a":             {"GET /k", "GET /v1/kv/k", "DELETE /3", "POST /v1/members", "GET /v1/leases/7"},
		"Prefer: wait=30":                {"PUT /k", "DELETE /v1/kv/k", "POST /v1/txn", "POST /v1/leases", "GET /v1/leases/7"},
		"Prefer: return=none":            {"PUT /k"},
		"Prefer: return=representation":  {"GET /k", "GET /v1/kv/k", "DELETE /v1/kv/k", "POST /v1/txn", "POST /v1/leases"},
		"Prefer: respond-async":          {"PUT /k", "GET /v1/kv/k"},
		"Last-Event-ID: 7":               {"GET /k", "PUT /v1/kv/k", "POST /v1/txn", "GET /v1/leases/7"},
		"If-Unmodified-Since: x":         {"PUT /k", "GET /k"},
		"If-Modified-Since: x":           {"GET /k", "GET /v1/kv/k", "GET /v1/kv", "GET /v1/status"},
		"Content-Encoding: gzip":         {"PUT /k", "PUT /v1/kv/k", "POST /v1/txn", "POST /v1/kv", "POST /v1/leases", "POST /v1/members", "POST /4"},
		"Content-Encoding: identity, br": {"PUT /k"},
		"If-Range: x":                    {"GET /v1/kv/k"},
	} {
		name, _, _ := strings.Cut(header, ":")
		for _, call := range calls {
			method, target, _ := strings.Cut(call, " ")
			if method == "HEAD" {
				continue // its answer has no text
			}
			refused(method, target, header+"\r\n", name)
		}
	}
	for option, calls := range map[string][]string{
		"revision=3": {"PUT /k", "PUT /v1/kv/k", "DELETE /v1/kv/k", "POST /v1/txn", "GET /v1/leases/7"},
		"history=20": {"GET /k", "PUT /v1/kv/k", "DELETE /v1/kv/k"},
		"ttl=30s":    {"GET /k", "GET /v1/kv/k", "DELETE /v1/kv/k", "POST /v1/txn", "POST /v1/leases"},
		"lease=7":    {"GET /k", "DELETE /v1/kv/k", "POST /v1/txn"},
		"prefix=a":   {"GET /k", "PUT /k", "GET /v1/kv/k", "DELETE /v1/kv/k", "POST /v1/txn"},
		"limit=5":    {"GET /v1/kv/k", "PUT /k"},
		"count=true": {"GET /v1/kv/k"},
		"all=true":   {"DELETE /v1/kv/k", "GET /k"},
	} {
		name, _, _ := strings.Cut(option, "=")
		for _, call := range calls {
			method, target, _ := strings.Cut(call, " ")
			refused(method, target+"?"+option, "", name)
		}
	}
	for _, call := range []string{
		"GET /k?timeout=0s", "GET /k?timeout=-1s", "GET /k?timeout=61s", "GET /k?timeout=5", "GET /k?timeout=", "GET /k?timeout",
		"GET /k?consistency=eventual", "GET /k?consistency", "GET /k?min_revision=-1", "GET /k?min_revision=x", "GET /k?min_revision=9223372036854775808",
		"GET /k?timeout=1s&timeout=2s", "GET /k?consistency=stale&consistency=stale", "GET /k?timeout=1s;consistency=stale",
		"GET /k?nonsense", "GET /k?nonsense=1", "GET /k?Timeout=1s", "GET /k?nonsense%zz", "GET /k?timeout=%zz",
		"PUT /k?consistency=stale", "PUT /k?min_revision=1", "PUT /k?force=true", "GET /k?verbose", "DELETE /v1/kv/k?force=true",
		"DELETE /3?force", "DELETE /3?force=yes", "DELETE /3?prefix=a", "DELETE /3?consistency=stale", "POST /4?force=true",
		"GET /v1/members?x=1", "GET /v1/status?verbose", "GET /metrics?x=1", "GET /metrics?name[]=up", "GET /livez?verbose=maybe", "GET /readyz?exclude=disk", "POST /v1/leader?force=true",
	} {
		method, target, _ := strings.Cut(call, " ")
		_, query, _ := strings.Cut(target, "?")
		named := strings.FieldsFunc(query, func(r rune) bool { return strings.ContainsRune("=&;%", r) })[0]
		rows = append(rows, contractRow{method: method, target: target, status: 400, code: api.CodeBadRequest, text: "~" + named})
	}
	return append(rows, contractRow{method: "GET", target: "/k?=1", status: 400, code: api.CodeBadRequest, text: `~query option ""`})
}

func badBodyRows() []contractRow {
	var rows []contractRow
	for body, named := range map[string]string{
		``: "no JSON object", `[]`: "no JSON object", `"x"`: "no JSON object", `null`: "no JSON object", "{\"peer_url\":\"\xff\"}": "no JSON object",
		`{"peer_url":"http://h:1","extra":1}`:                 `unknown field "extra"`,
		`{"Peer_URL":"http://h:1"}`:                           `unknown field "Peer_URL"`,
		`{"peer_url":"http://h:1","peer_url":"http://h:2"}`:   "peer_url twice",
		`{"peer_url":"http://h:1"} {}`:                        "goes on",
		`{"peer_url":"http://h:1"}x`:                          "goes on",
		`{"peer_url":"http://h:1"`:                            "no valid JSON",
		`{"peer_url":"http://h:1",}`:                          "no valid JSON",
		`{"peer_url":7}`:                                      "peer_url of the wrong kind",
		`{"peer_url":null}`:                                   "peer_url of the wrong kind",
		`{"id":0,"peer_url":"http://h:1"}`:                    "id of the wrong kind",
		`{"id":-1,"peer_url":"http://h:1"}`:                   "id of the wrong kind",
		`{"id":"5","peer_url":"http://h:1"}`:                  "id of the wrong kind",
		`{"id":1.5,"peer_url":"http://h:1"}`:                  "id of the wrong kind",
		`{"id":18446744073709551616,"peer_url":"http://h:1"}`: "id of the wrong kind",
		`{"learner":"yes","peer_url":"http://h:1"}`:           "learner of the wrong kind",
		`{"id":5}`:                              "lacks the field peer_url",
		`{"peer_url":"ftp://h:1"}`:              "not of the form",
		`{"peer_url":"http://user:secret@h:1"}`: "not of the form",
		`{"peer_url":"http://h:1?x"}`:           "not of the form",
	} {
		rows = append(rows, contractRow{method: "POST", target: "/v1/members", body: body, status: 400, code: api.CodeBadRequest, text: "~" + named})
	}
	return append(rows, contractRow{method: "POST", target: "/v1/members", body: `{"peer_url":"` + strings.Repeat("x", 20<<10) + `"}`, status: 413, code: api.CodeTooLarge})
}

func TestContract(t *testing.T) {
	for _, row := range contractRows() {
		t.Run(row.method+" "+short([]byte(row.target)), func(t *testing.T) {
			f := row.backend
			if f == nil {
				f = &fakeBackend{}
			}
			h := newTestAPI(f, testLimits())
			addr := serveTest(t, h)
			a := exchange(t, addr, row.method, row.target, row.headers, row.body)
			row.check(t, a, h.takeCalls())
			if row.code == "" || row.method == "HEAD" {
				return
			}
			headers := row.headers
			if !strings.Contains(headers, "Accept") {
				headers += "Accept: application/json\r\n"
			}
			a = exchange(t, addr, row.method, row.target, headers, row.body)
			h.takeCalls()
			p := problemOf(t, a)
			want := row.outcome
			if want == "" {
				want = api.OutcomeNotApplied
			}
			if p.Code != row.code || p.Outcome != want || a.status != row.status {
				t.Errorf("status %d, code %s, outcome %s; want %d, %s, %s", a.status, p.Code, p.Outcome, row.status, row.code, want)
			}
		})
	}
}

func (row *contractRow) check(t *testing.T, a answer, calls []string) {
	t.Helper()
	if a.status != row.status {
		t.Errorf("status %d, want %d; body %s", a.status, row.status, a.body)
	}
	for _, line := range row.want {
		name, value, _ := strings.Cut(line, ":")
		if got := a.header.Get(name); got != strings.TrimSpace(value) {
			t.Errorf("header %s: %q, want %q", name, got, value)
		}
	}
	part, isPart := strings.CutPrefix(row.text, "~")
	if isPart && !strings.Contains(a.body, part) || !isPart && (row.text != "" || a.status == 204) && a.body != row.text {
		t.Errorf("body %q, want %q", a.body, row.text)
	}
	if a.status >= 400 && a.body != "" && !strings.Contains(row.headers, "json") {
		if got := a.header.Get("Content-Type"); got != "text/plain; charset=utf-8" {
			t.Errorf("error Content-Type %q", got)
		}
	}
	if row.code != "" && !slices.Equal(a.header.Values("Vary"), []string{"Accept"}) {
		t.Errorf("Vary %q: the form of an error depends on Accept", a.header.Values("Vary"))
	}
	if got := strings.Join(calls, "; "); got != row.call {
		t.Errorf("backend calls %q, want %q", short([]byte(got)), short([]byte(row.call)))
	}
}

// Every sentinel of this program has a row, and the row says what API.md says.
func TestErrorTable(t *testing.T) {
	wants := map[string]string{ // name in the source: status, code, outcome
		"errKeyNotFound": "404 key_not_found not_applied", "errEmptyKey": "400 bad_request not_applied",
		"errKeyTooLong": "414 key_too_long not_applied", "errTooLarge": "413 too_large not_applied",
		"errBadRequest": "400 bad_request not_applied", "errMemberExists": "409 member_exists not_applied",
		"errMemberUnknown": "404 member_not_found not_applied", "errMembershipInProgress": "409 membership_in_progress not_applied",
		"errQuorumAtRisk": "409 quorum_at_risk not_applied", "errLearnerBehind": "412 precondition_failed not_applied", "errLastVoter": "409 quorum_at_risk not_applied",
		"errReadTimeout": "504 commit_timeout unknown", "errNotProposed": "429 overloaded not_applied",
		"errTransferRefused": "409 transfer_refused not_applied", "errTransferTimeout": "504 transfer_timeout unknown",
		"errOverloaded": "429 overloaded not_applied", "errNoLeader": "503 no_leader not_applied",
		"errStopping": "503 stopping not_applied", "errDiskLow": "507 disk_low not_applied",
		"errUnsupported": "501 unsupported not_applied", "errCommitTimeout": "504 commit_timeout unknown",
		"errNoSuchPath": "404 path_not_found not_applied", "errBadMethod": "405 method_not_allowed not_applied",
		"errCrossOrigin": "403 cross_origin not_applied", "errPrecondition": "412 precondition_failed not_applied",
		"errLeaseNotFound": "404 lease_not_found not_applied", "errCompacted": "410 revision_compacted not_applied",
		"errFutureRevision": "400 future_revision not_applied", "errOnceMismatch": "422 idempotency_mismatch not_applied",
		"errOnceExpired": "409 idempotency_expired not_applied", "errOnceFull": "429 overloaded not_applied",
		"errReadsTooMuch": "413 too_large not_applied", "errTooManyWatches": "429 overloaded not_applied",
	}
	sentinels := map[string]error{
		"errKeyNotFound": errKeyNotFound, "errEmptyKey": errEmptyKey, "errKeyTooLong": errKeyTooLong, "errTooLarge": errTooLarge,
		"errBadRequest": errBadRequest, "errMemberExists": errMemberExists, "errMemberUnknown": errMemberUnknown,
		"errMembershipInProgress": errMembershipInProgress, "errQuorumAtRisk": errQuorumAtRisk, "errLearnerBehind": errLearnerBehind, "errLastVoter": errLastVoter, "errReadTimeout": errReadTimeout, "errNotProposed": errNotProposed,
		"errTransferRefused": errTransferRefused, "errTransferTimeout": errTransferTimeout, "errOverloaded": errOverloaded,
		"errNoLeader": errNoLeader, "errStopping": errStopping, "errDiskLow": errDiskLow, "errUnsupported": errUnsupported,
		"errCommitTimeout": errCommitTimeout, "errNoSuchPath": errNoSuchPath, "errBadMethod": errBadMethod, "errCrossOrigin": errCrossOrigin,
		"errPrecondition": errPrecondition, "errLeaseNotFound": errLeaseNotFound, "errCompacted": errCompacted,
		"errFutureRevision": errFutureRevision, "errOnceMismatch": errOnceMismatch, "errOnceExpired": errOnceExpired,
		"errOnceFull": errOnceFull, "errReadsTooMuch": errReadsTooMuch, "errTooManyWatches": errTooManyWatches,
	}
	for _, name := range slices.Concat(sentinelNames(t, "errors.go"), sentinelNames(t, "httperror.go")) {
		err, ok := sentinels[name]
		if !ok {
			t.Errorf("%s: not in this test; give it a row in errorTable and here", name)
			continue
		}
		row, _ := findErrorRow(fmt.Errorf("put: %w", err))
		if got := fmt.Sprint(row.code.Status(), " ", row.code, " ", row.outcome); got != wants[name] {
			t.Errorf("%s: %s, want %s", name, got, wants[name])
		}
	}
	both := fmt.Errorf("%w: %w", errCommitTimeout, errNoLeader)
	if row, _ := findErrorRow(both); row.outcome != api.OutcomeUnknown {
		t.Errorf("an error that is both unknown and refused: outcome %s", row.outcome)
	}
}

func sentinelNames(t *testing.T, file string) (names []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok {
			for _, id := range spec.Names {
				if strings.HasPrefix(id.Name, "err") && id.Name != "errorTable" {
					names = append(names, id.Name)
				}
			}
		}
		_, isFunc := n.(*ast.FuncDecl)
		return !isFunc
	})
	if len(names) == 0 {
		t.Fatalf("no sentinel found in %s", file)
	}
	return names
}

func TestAcceptDecidesTheForm(t *testing.T) {
	for accept, want := range map[string]bool{
		"": false, "*/*": false, "text/plain": false, "text/html, */*;q=0.8": false,
		"application/json": true, "Application/JSON": true, "application/problem+json": true, "application/*": true,
		"text/plain, application/json;q=0.5": true, "application/json;q=0": false, "application/json; q=0.000, */*": false,
		"text/plain\r\nAccept: application/json": true,
	} {
		h := newTestAPI(&fakeBackend{err: errKeyNotFound}, testLimits())
		headers := ""
		if accept != "" {
			headers = "Accept: " + accept + "\r\n"
		}
		a := exchange(t, serveTest(t, h), "GET", "/v1/kv/k", headers, "")
		if got := a.header.Get("Content-Type") == api.ProblemType; got != want || a.status != 404 {
			t.Errorf("Accept %q: status %d, JSON %v, want %v", accept, a.status, got, want)
		}
	}
}

// Keys are the percent-decoded bytes after the slash, as they stand.
var keysAsTheyStand = map[string]string{
	"/a": "a", "//": "/", "///": "//", "/.": ".", "/..": "..", "/a/../b": "a/../b", "/a//b/": "a//b/", "/./a": "./a",
	"//host/path": "/host/path", "//host:80/path": "/host:80/path", "/%2F": "/", "/%2e%2E": "..", "/a%2fb": "a/b",
	"/%00": "\x00", "/%FF%fe": "\xff\xfe", "/%C3%A9": "é", "/a%20b": "a b", "/a+b": "a+b", "/%25": "%", "/%2541": "%41",
	"/a%3Fb": "a?b", "/a?timeout=1s": "a", "/a%23b": "a#b", "/a;b=c": "a;b=c", "/a:b@c": "a:b@c", "/http://x/y": "http://x/y", "/*": "*",
	"/%0d%0aX": "\r\nX", "/~'()!$&,=": "~'()!$&,=",
}

func TestKeysAsTheyStand(t *testing.T) {
	h := newTestAPI(&fakeBackend{}, testLimits())
	addr := serveTest(t, h)
	targets := map[string]string{"http://other/abs": "abs", "http://other//x": "/x", "HTTPS://other:1/y?timeout=1s": "y", "/é": "é", "/\xff": "\xff", "/a#b": "a#b"}
	for target, key := range keysAsTheyStand {
		targets[target] = key
		targets["/v1/kv"+target] = key
	}
	for target, key := range targets {
		exchange(t, addr, "PUT", target, "", "v")
		exchange(t, addr, "GET", target, "", "")
		want := []string{fmt.Sprintf(`put %q="v"`, key), fmt.Sprintf("get %q", key)}
		if got := h.takeCalls(); !slices.Equal(got, want) {
			t.Errorf("%s: calls %q, want %q", target, got, want)
		}
	}
}

// Over HTTP/2 the same targets are the same keys.
func TestKeysAsTheyStandHTTP2(t *testing.T) {
	h := newTestAPI(&fakeBackend{}, testLimits())
	addr := serveTest(t, h)
	client := http2Client(t)
	for target, key := range keysAsTheyStand {
		for _, target := range []string{target, "/v1/kv" + target} {
			resp, err := client.Do(requestTo(t, "PUT", addr, target, strings.NewReader("v")))
			if err != nil {
				t.Fatalf("%s: %v", target, err)
			}
			resp.Body.Close()
			want := []string{fmt.Sprintf(`put %q="v"`, key)}
			if got := h.takeCalls(); !slices.Equal(got, want) || resp.ProtoMajor != 2 {
				t.Errorf("%s: HTTP/%d calls %q, want %q", target, resp.ProtoMajor, got, want)
			}
		}
	}
}

func http2Client(t testing.TB) *http.Client {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: &protocols}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

// requestTo sends target as it stands, which http.NewRequest would not.
func requestTo(t testing.TB, method, addr, target string, body io.Reader) *http.Request {
	t.Helper()
	r, err := http.NewRequest(method, "http://"+addr+"/", body)
	if err != nil {
		t.Fatal(err)
	}
	path, query, _ := strings.Cut(target, "?")
	r.URL.Path, err = decodeKey(path)
	if err != nil {
		t.Fatal(err)
	}
	r.URL.RawPath, r.URL.RawQuery = path, query
	return r
}

func TestTargetsThatAreNoPath(t *testing.T) {
	h := newTestAPI(&fakeBackend{}, testLimits())
	addr := serveTest(t, h)
	for _, row := range []struct {
		method, target string
		status         int
	}{
		{"GET", "*", 400}, {"PUT", "*", 400}, {"OPTIONS", "*", 200}, {"CONNECT", "host:1", 405},
		{"GET", "ftp://host/x", 400}, {"GET", "mailto:x", 400}, {"GET", "http://host", 400}, {"GET", "http://host?timeout=1s", 400},
		{"GET", "/%zz", 400}, {"GET", "/%", 400}, {"GET", "/%4", 400}, {"GET", "/a b", 400}, {"GET", "", 400},
	} {
		if a := exchange(t, addr, row.method, row.target, "", ""); a.status != row.status {
			t.Errorf("%s %s: status %d, want %d", row.method, row.target, a.status, row.status)
		}
	}
	// net/http refuses broken percent-encoding by itself; so do we, should it change.
	r := httptest.NewRequest("GET", "/x", nil)
	r.RequestURI = "/%zz"
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != 400 || !strings.Contains(w.Body.String(), "percent-encoding") {
		t.Errorf("broken encoding: %d %s", w.Code, w.Body)
	}
	if calls := h.takeCalls(); len(calls) != 0 {
		t.Errorf("calls %q", calls)
	}
	// Without a server there is no request line, only a URL.
	r = requestTo(t, "GET", "h", "/a%2Fb%25", nil)
	h.ServeHTTP(httptest.NewRecorder(), r)
	if calls := h.takeCalls(); len(calls) != 1 || !strings.HasPrefix(calls[0], `get "a/b%"`) {
		t.Errorf("calls %q", calls)
	}
}

func TestExpectContinue(t *testing.T) {
	l := testLimits()
	l.MaxValueBytes = 100
	h := newTestAPI(&fakeBackend{}, l)
	addr := serveTest(t, h)

	c := dialRaw(t, addr)
	c.send("PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: 101\r\nExpect: 100-continue\r\n\r\n")
	if a := c.answer("PUT"); a.status != 413 || !a.closes {
		t.Errorf("over the limit: status %d, closes %v; want 413 and a close, with no 100 before it", a.status, a.closes)
	}
	c = dialRaw(t, addr)
	c.send("PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n")
	if a := c.answer("PUT"); a.status != 100 {
		t.Fatalf("within the limit: status %d, want 100", a.status)
	}
	c.send(strings.Repeat("v", 100))
	if a := c.answer("PUT"); a.status != 204 {
		t.Errorf("after 100: status %d, want 204", a.status)
	}
	if got := h.takeCalls(); !slices.Equal(got, []string{`put "k"="100 bytes"`}) {
		t.Errorf("calls %q", got)
	}
}

func TestBodies(t *testing.T) {
	l := testLimits()
	l.MaxValueBytes = 10
	const chunked = "Transfer-Encoding: chunked\r\n\r\n"
	for name, row := range map[string]struct {
		send      string // after the request line and Host
		halfClose bool
		status    int
		call      string
	}{
		"chunked":              {chunked + "3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n", false, 204, `put "k"="abcdefg"`},
		"chunked, at limit":    {chunked + "a\r\n0123456789\r\n0\r\n\r\n", false, 204, `put "k"="0123456789"`},
		"chunked, over limit":  {chunked + "b\r\n0123456789x\r\n0\r\n\r\n", false, 413, ""},
		"chunked, empty":       {chunked + "0\r\n\r\n", false, 204, `put "k"=""`},
		"chunked, broken":      {chunked + "3\r\nabc\r\nzz\r\n", false, 400, ""},
		"chunked, cut":         {chunked + "3\r\nabc\r\n", true, 400, ""},
		"cut":                  {"Content-Length: 9\r\n\r\nabc", true, 400, ""},
		"at limit":             {"Content-Length: 10\r\n\r\n0123456789", false, 204, `put "k"="0123456789"`},
		"over limit":           {"Content-Length: 11\r\n\r\n0123456789x", false, 413, ""},
		"far over limit, sent": {"Content-Length: 3000000\r\n\r\n" + strings.Repeat("v", 3000000), false, 413, ""},
		"far over, chunked":    {chunked + "2dc6c0\r\n" + strings.Repeat("v", 3000000) + "\r\n0\r\n\r\n", false, 413, ""},
		"two lengths":          {"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", false, 400, ""},
		"length and chunked":   {"Content-Length: 3\r\n" + chunked + "3\r\nabc\r\n0\r\n\r\n", false, 204, `put "k"="abc"`},
		"no body":              {"\r\n", false, 204, `put "k"=""`},
	} {
		t.Run(name, func(t *testing.T) {
			h := newTestAPI(&fakeBackend{}, l)
			c := dialRaw(t, serveTest(t, h))
			c.send("PUT /k HTTP/1.1\r\nHost: h\r\n" + row.send)
			if row.halfClose {
				c.Conn.(*net.TCPConn).CloseWrite()
			}
			if a := c.answer("PUT"); a.status != row.status {
				t.Errorf("status %d, want %d; body %s", a.status, row.status, a.body)
			}
			if got := strings.Join(h.takeCalls(), "; "); got != row.call {
				t.Errorf("calls %q, want %q", got, row.call)
			}
		})
	}
}

// countingBody is an endless body that counts what is taken from it.
type countingBody struct{ taken int }

func (b *countingBody) Read(p []byte) (int, error) {
	b.taken += len(p)
	return len(p), nil
}

func (b *countingBody) Close() error { return nil }

func TestNothingBufferedBeyondLimit(t *testing.T) {
	for _, limit := range []int64{1, 10, 4095, 4096, 5000, 100_000} {
		for _, announced := range []int64{-1, limit} {
			body := &countingBody{}
			r := httptest.NewRequest("PUT", "/k", body)
			r.ContentLength = announced
			h := newTestAPI(&fakeBackend{}, testLimits()).Handler.(*httpAPI)
			c := apiCall{api: h, w: httptest.NewRecorder(), r: r, deadline: time.Now().Add(time.Hour)}
			buf, err := c.readBody(make([]byte, 0, 8), limit)
			if !errors.Is(err, errTooLarge) || int64(body.taken) != limit+1 || int64(cap(buf)) > max(limit+1, minBodyBuffer) {
				t.Errorf("limit %d: %v after %d bytes, buffer %d", limit, err, body.taken, cap(buf))
			}
		}
	}
	// What is announced and never sent costs little.
	r := httptest.NewRequest("PUT", "/k", strings.NewReader("abc"))
	r.ContentLength = 1 << 20
	h := newTestAPI(&fakeBackend{}, testLimits()).Handler.(*httpAPI)
	c := apiCall{api: h, w: httptest.NewRecorder(), r: r, deadline: time.Now().Add(time.Hour)}
	if buf, err := c.readBody(nil, 1<<20); err != nil || cap(buf) > minBodyBuffer {
		t.Errorf("announced only: %v, buffer %d", err, cap(buf))
	}
}

// A refused body that is small leaves the connection usable.
func TestConnectionSurvivesRefusals(t *testing.T) {
	l := testLimits()
	l.MaxValueBytes = 10
	c := dialRaw(t, serveTest(t, newTestAPI(&fakeBackend{}, l)))
	for _, row := range []struct {
		request string
		status  int
	}{
		{"PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: 3000\r\n\r\n" + strings.Repeat("v", 3000), 413},
		{"PUT /k?x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", 400},
		{"GET /k HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", 200},
		{"PATCH /k HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", 405},
		{"PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", 204},
	} {
		c.send(row.request)
		if a := c.answer("PUT"); a.status != row.status || a.closes {
			t.Errorf("%.20q: status %d, closes %v; want %d", row.request, a.status, a.closes, row.status)
		}
	}
}

func TestDeadlineReachesTheStore(t *testing.T) {
	for query, want := range map[string]time.Duration{"": 5 * time.Second, "?timeout=2s": 2 * time.Second, "?timeout=1m0s": time.Minute} {
		var left time.Duration
		f := &fakeBackend{onGet: func(ctx context.Context) error {
			until, _ := ctx.Deadline()
			left = time.Until(until)
			return nil
		}}
		exchange(t, serveTest(t, newTestAPI(f, testLimits())), "GET", "/k"+query, "", "")
		if left > want+deadlineSlack || left < want-time.Second {
			t.Errorf("%q: %v left, want %v", query, left, want)
		}
	}
}

func TestStoreRunsOutOfTime(t *testing.T) {
	f := &fakeBackend{onGet: func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("get: %w", ctx.Err()) }}
	a := exchange(t, serveTest(t, newTestAPI(f, testLimits())), "GET", "/k?timeout=10ms", "Accept: application/json\r\n", "")
	if p := problemOf(t, a); a.status != 504 || p.Code != api.CodeCommitTimeout || p.Outcome != api.OutcomeUnknown || p.Leader != 2 {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestInFlightBound(t *testing.T) {
	l := testLimits()
	l.MaxInFlight = 2
	entered, leave := make(chan bool, 2), make(chan bool)
	f := &fakeBackend{onPut: func(context.Context, string, []byte) { entered <- true; <-leave }}
	h := newTestAPI(f, l)
	addr := serveTest(t, h)
	waiting := []*rawConn{dialRaw(t, addr), dialRaw(t, addr)}
	for _, c := range waiting {
		c.send("PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nv")
		<-entered
	}
	for _, call := range []string{"PUT /k", "GET /k", "DELETE /v1/kv/k", "DELETE /3", "POST /v1/members/3/promote"} {
		method, target, _ := strings.Cut(call, " ")
		a := exchange(t, addr, method, target, "Accept: application/json\r\n", "")
		if p := problemOf(t, a); a.status != 429 || p.Outcome != api.OutcomeNotApplied || a.header.Get("Retry-After") != "1" {
			t.Errorf("%s while full: %d %s", call, a.status, a.body)
		}
	}
	for _, target := range []string{"/livez", "/readyz", "/metrics", "/v1/status", "/v1/members"} {
		a := exchange(t, addr, "GET", target, "", "")
		if a.status != 200 || target == "/metrics" && !strings.Contains(a.body, "pontoon_http_requests_in_flight 2\n") {
			t.Errorf("%s while full: %d %s", target, a.status, a.body)
		}
	}
	close(leave)
	for _, c := range waiting {
		if a := c.answer("PUT"); a.status != 204 {
			t.Errorf("a write that waited: %d", a.status)
		}
	}
	if a := exchange(t, addr, "PUT", "/k", "", "v"); a.status != 204 || h.m.inFlight.Load() != 0 {
		t.Errorf("after: status %d, %d in flight", a.status, h.m.inFlight.Load())
	}
}

// slotWatcher checks that nobody holds a slot while an answer is written.
type slotWatcher struct {
	http.ResponseWriter
	m      *httpMetrics
	during int64
}

func (w *slotWatcher) Write(p []byte) (int, error) {
	w.during = w.m.inFlight.Load()
	return w.ResponseWriter.Write(p)
}

func TestSlotIsFreeWhileValueIsWritten(t *testing.T) {
	h := newTestAPI(&fakeBackend{}, testLimits())
	w := &slotWatcher{ResponseWriter: httptest.NewRecorder(), m: h.m, during: -1}
	h.ServeHTTP(w, httptest.NewRequest("GET", "/k", nil))
	if w.during != 0 {
		t.Errorf("%d slots held while writing", w.during)
	}
}

func TestPanicGivesEverythingBack(t *testing.T) {
	f := &fakeBackend{onPut: func(context.Context, string, []byte) { panic("boom") }}
	h := newTestAPI(f, testLimits())
	c := dialRaw(t, serveTest(t, h))
	c.send("PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nv")
	if rest, err := io.ReadAll(c.r); err != nil || len(rest) != 0 {
		t.Errorf("answer %q, %v; want a closed connection", rest, err)
	}
	if n := h.m.inFlight.Load(); n != 0 {
		t.Errorf("%d in flight", n)
	}
	if text := metricsText(t, h); !strings.Contains(text, `pontoon_http_requests_total{code="500",route="/{key}"} 1`) {
		t.Errorf("metrics: %s", text)
	}
}

func metricsText(t *testing.T, h http.Handler) string {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	return w.Body.String()
}

func TestClientThatLeaves(t *testing.T) {
	entered, left := make(chan bool), make(chan error, 1)
	f := &fakeBackend{onPut: func(ctx context.Context, _ string, _ []byte) { entered <- true; <-ctx.Done(); left <- ctx.Err() }}
	h := newTestAPI(f, testLimits())
	finished := make(chan bool)
	addr := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { defer close(finished); h.ServeHTTP(w, r) }))
	c := dialRaw(t, addr)
	c.send("PUT /k?timeout=5s HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nv") // the short path does not watch its client
	<-entered
	c.Close()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("the store saw %v", err)
	}
	<-finished
	if text := metricsText(t, h); !strings.Contains(text, `pontoon_http_requests_total{code="499",route="/{key}"} 1`) {
		t.Errorf("metrics: %s", text)
	}
}

// A client that only closed its sending side still reads, and must not take
// an empty 200 for a commit.
func TestHalfClosedClientHearsUnknown(t *testing.T) {
	entered := make(chan bool)
	f := &fakeBackend{onPut: func(ctx context.Context, _ string, _ []byte) { entered <- true; <-ctx.Done() }}
	c := dialRaw(t, serveTest(t, newTestAPI(f, testLimits())))
	c.send("PUT /k HTTP/1.1\r\nHost: h\r\nAccept: application/json\r\nContent-Length: 1\r\n\r\nv")
	<-entered
	c.Conn.(*net.TCPConn).CloseWrite()
	a := c.answer("PUT")
	if p := problemOf(t, a); a.status != 504 || p.Outcome != api.OutcomeUnknown {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestMetricsNeverNameKeys(t *testing.T) {
	h := newTestAPI(&fakeBackend{}, testLimits())
	addr := serveTest(t, h)
	for _, call := range []string{"GET /secret", "PUT /secret", "GET /v1/kv/secret", "POST /secret", "GET /v1/secret", "SECRET /secret", "GET /v1/members/secret"} {
		method, target, _ := strings.Cut(call, " ")
		exchange(t, addr, method, target, "", "")
	}
	text := metricsText(t, h)
	for _, line := range []string{
		`pontoon_http_requests_total{code="200",route="/{key}"} 1`, `pontoon_http_requests_total{code="204",route="/{key}"} 1`,
		`pontoon_http_requests_total{code="200",route="/v1/kv/{key}"} 1`, `pontoon_http_requests_total{code="400",route="/{id}"} 1`,
		`pontoon_http_requests_total{code="404",route="other"} 1`, `pontoon_http_requests_total{code="405",route="/{key}"} 1`,
		`pontoon_http_request_duration_seconds_count{method="GET",route="/{key}"} 1`,
		`pontoon_http_request_duration_seconds_count{method="other",route="/{key}"} 1`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no line %s", line)
		}
	}
	if strings.Contains(strings.ToLower(text), "secret") {
		t.Errorf("a key or method of the client is a label:\n%s", text)
	}
}

// Body buffers are shared by pool; no value may turn up under another key.
func TestValuesDoNotMix(t *testing.T) {
	l := testLimits()
	l.MaxInFlight = 1000
	f := &fakeBackend{onPut: func(_ context.Context, key string, value []byte) {
		for range 3 {
			if n, _ := strconv.Atoi(key); len(value) != n || bytes.Count(value, []byte{byte(n)}) != n {
				t.Errorf("key %s has a value of %d bytes, some of another", key, len(value))
			}
			runtime.Gosched()
		}
	}}
	addr := serveTest(t, newTestAPI(f, l))
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			c := dialRaw(t, addr)
			for i := range 50 {
				n := (worker*7919 + i*104729) % 9000
				value := string(bytes.Repeat([]byte{byte(n)}, n))
				c.send(fmt.Sprintf("PUT /v1/kv/%d HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s", n, n, value[:n/2]))
				runtime.Gosched()
				c.send(value[n/2:])
				if a := c.answer("PUT"); a.status != 201 {
					t.Errorf("status %d", a.status)
				}
			}
		})
	}
	wg.Wait()
}

func TestValuesComeBackWhole(t *testing.T) {
	for _, n := range []int{0, 1, 2047, 2048, 2049, 1 << 20} {
		value := bytes.Repeat([]byte("<html>"), n/6+1)[:n]
		addr := serveTest(t, newTestAPI(&fakeBackend{value: value}, testLimits()))
		a := exchange(t, addr, "GET", "/k", "", "")
		if a.body != string(value) || a.header.Get("Content-Length") != strconv.Itoa(n) {
			t.Errorf("%d bytes: got %d, Content-Length %q", n, len(a.body), a.header.Get("Content-Length"))
		}
		resp, err := http2Client(t).Get("http://" + addr + "/k")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(body, value) || resp.ContentLength != int64(n) || resp.Header.Get("Etag") != `"7"` {
			t.Errorf("HTTP/2, %d bytes: got %d, %v", n, len(body), err)
		}
	}
}

func TestHTTP2Refusals(t *testing.T) {
	h := newTestAPI(&fakeBackend{err: errNoLeader}, testLimits())
	addr := serveTest(t, h)
	client := http2Client(t)
	for _, row := range []struct {
		method, target string
		body           io.Reader
		status         int
	}{
		{"GET", "/k", nil, 503}, {"PUT", "/k", strings.NewReader("v"), 503},
		{"PUT", "/k", bytes.NewReader(make([]byte, 2<<20)), 413},
		{"PUT", "/k", io.MultiReader(bytes.NewReader(make([]byte, 2<<20))), 413}, // no Content-Length
		{"POST", "/v1", nil, 404}, {"PATCH", "/k", nil, 405},
	} {
		resp, err := client.Do(requestTo(t, row.method, addr, row.target, row.body))
		if err != nil {
			t.Errorf("%s %s: %v", row.method, row.target, err)
			continue
		}
		resp.Body.Close()
		if resp.StatusCode != row.status || resp.ProtoMajor != 2 {
			t.Errorf("%s %s: HTTP/%d %d, want %d", row.method, row.target, resp.ProtoMajor, resp.StatusCode, row.status)
		}
	}
}

// pipeServer serves h on one in-memory connection, inside a synctest bubble.
func pipeServer(t *testing.T, h http.Handler) *rawConn {
	t.Helper()
	client, server := net.Pipe()
	l := newBoundedListener(&oneConnListener{conns: make(chan net.Conn, 1), done: make(chan struct{})}, 4)
	l.Listener.(*oneConnListener).conns <- server
	srv := newClientServer(h, zap.NewNop())
	go srv.Serve(l)
	t.Cleanup(func() { client.Close(); srv.Close() })
	return &rawConn{t, client, bufio.NewReader(client)}
}

type oneConnListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *oneConnListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *oneConnListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *oneConnListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

// A body may be slow as long as it moves; a pause, or the call's own deadline,
// ends it.
func TestSlowBodies(t *testing.T) {
	for _, row := range []struct {
		query  string
		pauses []time.Duration // before each byte of the body
		bytes  int             // announced
		status int
		took   time.Duration
	}{
		{"?timeout=60s", []time.Duration{9 * time.Second, 9 * time.Second, 9 * time.Second}, 3, 204, 27 * time.Second},
		{"?timeout=60s", []time.Duration{time.Second}, 2, 400, time.Second + bodyProgress},
		{"?timeout=25s", []time.Duration{9 * time.Second, 9 * time.Second}, 3, 400, 25 * time.Second},
		{"", nil, 1, 400, 5 * time.Second},
		{"?timeout=3s", nil, 1, 400, 3 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := pipeServer(t, newTestAPI(&fakeBackend{}, testLimits()))
			start := time.Now()
			c.send(fmt.Sprintf("PUT /k%s HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n", row.query, row.bytes))
			for _, pause := range row.pauses {
				<-time.After(pause)
				c.send("v")
			}
			a := c.answer("PUT")
			if took := time.Since(start); a.status != row.status || took != row.took {
				t.Errorf("%+v: status %d after %v; %s", row, a.status, took, a.body)
			}
		})
	}
}

// The deadline of the body must not outlive it: the wait for raft is longer.
func TestBodyDeadlineEndsWithTheBody(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := &fakeBackend{onPut: func(ctx context.Context, _ string, _ []byte) {
				select {
				case <-time.After(45 * time.Second):
				case <-ctx.Done():
				}
			}}
			var protocols http.Protocols
			protocols.SetHTTP1(!http2)
			protocols.SetUnencryptedHTTP2(http2)
			c := pipeServer(t, newTestAPI(f, testLimits()))
			tr := &http.Transport{Protocols: &protocols, DialContext: func(context.Context, string, string) (net.Conn, error) { return c.Conn, nil }}
			defer tr.CloseIdleConnections()
			resp, err := (&http.Client{Transport: tr}).Do(requestTo(t, "PUT", "pipe", "/k?timeout=60s", strings.NewReader("vv")))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != 204 || (resp.ProtoMajor == 2) != http2 {
				t.Errorf("HTTP/%d: status %d, want 204", resp.ProtoMajor, resp.StatusCode)
			}
		})
	}
}

// A client that sends all of a refused body before it reads still gets the
// answer, although nothing on the way can buffer the body.
func TestRefusedBodyIsDrained(t *testing.T) {
	for _, head := range []string{"Content-Length: 7000000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n6acfc0\r\n"} {
		synctest.Test(t, func(t *testing.T) {
			c := pipeServer(t, newTestAPI(&fakeBackend{}, testLimits()))
			start := time.Now()
			c.send("PUT /k HTTP/1.1\r\nHost: h\r\n" + head + strings.Repeat("v", 7_000_000))
			if strings.HasPrefix(head, "Transfer") {
				c.send("\r\n0\r\n\r\n")
			}
			if a := c.answer("PUT"); a.status != 413 || time.Since(start) != 0 {
				t.Errorf("status %d after %v", a.status, time.Since(start))
			}
		})
	}
}

func TestLargeBuffersAreNotKept(t *testing.T) {
	h := newTestAPI(&fakeBackend{}, testLimits()).Handler.(*httpAPI)
	for range 20 {
		large := make([]byte, 0, maxPooledBuffer+1)
		h.putBuffer(&large)
		if got := h.buffers.Get().(*[]byte); cap(*got) > maxPooledBuffer {
			t.Fatalf("the pool keeps a buffer of %d bytes", cap(*got))
		}
	}
}

// A body that nobody wants cannot keep an answer back for long.
func TestUnwantedSlowBody(t *testing.T) {
	for _, request := range []string{"GET /k HTTP/1.1\r\nContent-Length: 10", "GET /k HTTP/1.1\r\nTransfer-Encoding: chunked",
		"PUT /k?nonsense HTTP/1.1\r\nContent-Length: 10", "DELETE /v1/kv/k HTTP/1.1\r\nContent-Length: 10"} {
		synctest.Test(t, func(t *testing.T) {
			c := pipeServer(t, newTestAPI(&fakeBackend{}, testLimits()))
			start := time.Now()
			c.send(request + "\r\nHost: h\r\n\r\n")
			a := c.answer("GET")
			if took := time.Since(start); took > drainTime || !a.closes {
				t.Errorf("%q: %d after %v, closes %v", request, a.status, took, a.closes)
			}
		})
	}
}

// benchBackend does nothing, so that what is measured is this layer.
type benchBackend struct {
	fakeBackend
	entry kv.Entry
}

func (b *benchBackend) propose(context.Context, *kv.Command) (kv.Result, error) {
	return kv.Result{Revision: 123456, Entry: kv.Entry{ModRevision: 123456}}, nil
}

func (b *benchBackend) get(context.Context, string, readOptions) (kv.Entry, int64, error) {
	return b.entry, 123456, nil
}

// doNothing is the least a server can do for the same calls.
func doNothing(value []byte) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		w.Write(value)
	})
}

func benchHandlers() map[string]http.Handler {
	value := bytes.Repeat([]byte("v"), 256)
	reg := prometheus.NewRegistry()
	b := &benchBackend{entry: kv.Entry{Value: value, CreateRevision: 1234, ModRevision: 123456, Version: 12}}
	return map[string]http.Handler{
		"api":     newHTTPAPI(b, testLimits(), newHTTPMetrics(reg), reg, zap.NewNop()),
		"nothing": doNothing(value),
	}
}

func benchmarkSocket(b *testing.B, request, end string) {
	for name, h := range benchHandlers() {
		b.Run(name, func(b *testing.B) {
			c := dialRaw(b, serveTest(b, h))
			c.SetDeadline(time.Time{})
			raw := []byte(request)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Write(raw); err != nil {
					b.Fatal(err)
				}
				readAnswer(b, c.r, end)
			}
		})
	}
}

// readAnswer skips one answer without allocating: up to the end of its header,
// then its body of known size.
func readAnswer(b *testing.B, r *bufio.Reader, body string) {
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			b.Fatal(err)
		}
		if len(line) == 2 {
			break
		}
	}
	if _, err := r.Discard(len(body)); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkPut(b *testing.B) {
	benchmarkSocket(b, "PUT /bench-key HTTP/1.1\r\nHost: h\r\nAccept: */*\r\nContent-Length: 256\r\n\r\n"+strings.Repeat("v", 256), "")
}

func BenchmarkGet(b *testing.B) {
	benchmarkSocket(b, "GET /bench-key HTTP/1.1\r\nHost: h\r\nAccept: */*\r\n\r\n", strings.Repeat("v", 256))
}

// nullWriter is a ResponseWriter whose cost is only that of its header map.
type nullWriter struct{ h http.Header }

func (w *nullWriter) Header() http.Header             { return w.h }
func (w *nullWriter) Write(p []byte) (int, error)     { return len(p), nil }
func (w *nullWriter) WriteHeader(int)                 {}
func (w *nullWriter) SetReadDeadline(time.Time) error { return nil }

func BenchmarkHandler(b *testing.B) {
	h := benchHandlers()["api"]
	for _, method := range []string{"GET", "PUT"} {
		b.Run(method, func(b *testing.B) {
			body := bytes.NewReader(bytes.Repeat([]byte("v"), 256))
			r := httptest.NewRequest(method, "/bench-key", io.NopCloser(body))
			r.ContentLength = 256
			if method == "GET" {
				r.Body, r.ContentLength = http.NoBody, 0
			}
			w := &nullWriter{http.Header{}}
			b.ReportAllocs()
			for b.Loop() {
				clear(w.h)
				body.Seek(0, io.SeekStart)
				h.ServeHTTP(w, r)
			}
		})
	}
}

// healthBackend notes how long each health call may take.
type healthBackend struct {
	*fakeBackend
	left []time.Duration
}

func (b *healthBackend) may(ctx context.Context) {
	until, _ := ctx.Deadline()
	b.left = append(b.left, time.Until(until))
}

func (b *healthBackend) status(ctx context.Context) api.Status {
	b.may(ctx)
	return b.fakeBackend.status(ctx)
}
func (b *healthBackend) checks(ctx context.Context) []check {
	b.may(ctx)
	return nil
}
func (b *healthBackend) live(ctx context.Context) []check {
	b.may(ctx)
	return nil
}

// timeout= bounds any call, those of health too.
func TestHealthKeepsItsTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, path := range []string{"/livez", "/readyz", "/v1/status"} {
			for query, want := range map[string]time.Duration{"": 5 * time.Second, "?timeout=100ms": 100 * time.Millisecond} {
				b := &healthBackend{fakeBackend: &fakeBackend{}}
				h := newTestAPIOver(b, b.fakeBackend, testLimits())
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", path+query, nil))
				if w.Code != 200 || len(b.left) != 1 || b.left[0] != want {
					t.Errorf("%s%s: %d, asked with %v, want %v", path, query, w.Code, b.left, want)
				}
			}
		}
	})
}
