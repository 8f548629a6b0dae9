package main

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"pontoon/api"
	"pontoon/kv"
)

// What single keys answer, over a real state: preconditions, old revisions,
// entries as JSON, TTLs.
func TestKeyStories(t *testing.T) {
	entry := func(create, mod, version string) string {
		return `{"key":"k","value":"v` + mod + `","create_revision":` + create + `,"mod_revision":` + mod + `,"version":` + version + `}`
	}
	for name, steps := range map[string][]httpStep{
		"If-Match": {
			{call: "PUT /v1/kv/k", headers: `If-Match: "1"`, body: "v", status: 412, code: api.CodePreconditionFailed, want: []string{"Etag:", "Kv-Revision:"}, text: "~does not exist"},
			{call: "PUT /v1/kv/k", headers: `If-Match: *`, body: "v", status: 412, code: api.CodePreconditionFailed},
			{call: "GET /v1/kv/k", status: 404, code: api.CodeKeyNotFound},
			{call: "PUT /v1/kv/k", body: "v1", status: 201, want: []string{`Etag: "1"`, "Kv-Revision: 1", "Kv-Idempotency-Window:", "Kv-Expires:", "Preference-Applied:"}},
			{call: "PUT /v1/kv/other", body: "x", status: 201},
			{call: "PUT /v1/kv/k", headers: `If-Match: "1"`, body: "v3", status: 204, want: []string{`Etag: "3"`, "Kv-Revision: 3"}},
			{call: "PUT /v1/kv/k", headers: `If-Match: "1"`, body: "v4", status: 412, code: api.CodePreconditionFailed, want: []string{`Etag: "3"`, "Kv-Revision: 3"}, text: `~"current_revision":3`},
			{call: "PUT /k", headers: `If-Match: "2"`, body: "v4", status: 412, code: api.CodePreconditionFailed, want: []string{`Etag: "3"`}},
			{call: "PUT /k", headers: `If-Match: "1", "3"`, body: "v4", status: 204, want: []string{`Etag: "4"`}},
			{call: "PUT /k", headers: "If-Match: \"1\"\nIf-Match: \"4\"", body: "v5", status: 204, want: []string{`Etag: "5"`}},
			{call: "PUT /k", headers: `If-Match: *`, body: "v6", status: 204, want: []string{`Etag: "6"`}},
			{call: "DELETE /v1/kv/k", headers: `If-Match: "5"`, status: 412, code: api.CodePreconditionFailed, want: []string{`Etag: "6"`}, text: `~"current_revision":6`},
			{call: "DELETE /v1/kv/k", headers: `If-Match: "6"`, status: 204, want: []string{"Kv-Deleted: 1", "Kv-Revision: 7", "Etag:"}},
			{call: "DELETE /v1/kv/k", headers: `If-Match: "6"`, status: 412, code: api.CodePreconditionFailed, want: []string{"Etag:"}},
			{call: "DELETE /v1/kv/k", status: 204, want: []string{"Kv-Deleted: 0", "Kv-Revision: 7"}},
		},
		"If-None-Match of a write": {
			{call: "PUT /k", headers: `If-None-Match: *`, body: "v1", status: 204, want: []string{`Etag: "1"`}},
			{call: "PUT /k", headers: `If-None-Match: *`, body: "v2", status: 412, code: api.CodePreconditionFailed, want: []string{`Etag: "1"`}},
			{call: "PUT /v1/kv/new", headers: `If-None-Match: *`, body: "v2", status: 201, want: []string{`Etag: "2"`}},
			{call: "PUT /v1/kv/k", headers: `If-None-Match: "1"`, body: "v3", status: 412, code: api.CodePreconditionFailed},
			{call: "PUT /v1/kv/k", headers: `If-None-Match: "7"`, body: "v3", status: 204, want: []string{`Etag: "3"`}},
			{call: "DELETE /v1/kv/k", headers: `If-None-Match: "3"`, status: 412, code: api.CodePreconditionFailed},
			{call: "DELETE /v1/kv/k", headers: `If-None-Match: *`, status: 412, code: api.CodePreconditionFailed},
			{call: "DELETE /v1/kv/k", headers: `If-None-Match: "1"`, status: 204, want: []string{"Kv-Deleted: 1"}},
			{call: "DELETE /v1/kv/k", headers: `If-None-Match: *`, status: 204, want: []string{"Kv-Deleted: 0"}},
		},
		"If-None-Match of a read": {
			{call: "GET /v1/kv/k", headers: `If-None-Match: "0"`, status: 404, code: api.CodeKeyNotFound},
			{call: "GET /v1/kv/k", headers: `If-None-Match: *`, status: 404, code: api.CodeKeyNotFound},
			{call: "PUT /v1/kv/k", body: "v1", status: 201},
			{call: "PUT /v1/kv/l", body: "l", status: 201},
			{call: "GET /v1/kv/k", headers: `If-None-Match: "1"`, status: 304, want: []string{`Etag: "1"`, "Kv-Revision: 2", "Vary: Accept", "Content-Type:"}, text: ""},
			{call: "HEAD /v1/kv/k", headers: `If-None-Match: W/"1"`, status: 304, want: []string{`Etag: "1"`}},
			{call: "GET /k", headers: `If-None-Match: *`, status: 304, want: []string{`Etag: "1"`, "Vary:"}},
			{call: "GET /v1/kv/k", headers: `If-None-Match: "2", "3"`, status: 200, text: "v1"},
			{call: "GET /k", headers: `If-None-Match: "0"`, status: 200, text: "v1"},
			{call: "GET /v1/kv/k", headers: "If-None-Match: \"1\"\nAccept: application/json", status: 304},
			{call: "GET /v1/kv/k?revision=1", headers: `If-None-Match: "1"`, status: 304, want: []string{`Etag: "1"`}},
		},
		"revision": {
			{call: "PUT /v1/kv/k", body: "v1", status: 201},
			{call: "PUT /v1/kv/k", body: "v2", status: 204},
			{call: "DELETE /v1/kv/k", status: 204},
			{call: "PUT /v1/kv/k", body: "v4", status: 201},
			{call: "GET /v1/kv/k?revision=1", status: 200, text: "v1", want: []string{`Etag: "1"`, "Kv-Revision: 1", "Kv-Version: 1"}},
			{call: "GET /k?revision=2", status: 200, text: "v2", want: []string{`Etag: "2"`, "Kv-Create-Revision: 1", "Kv-Version: 2"}},
			{call: "GET /v1/kv/k?revision=2", headers: "Accept: application/json", status: 200, text: entry("1", "2", "2")},
			{call: "GET /v1/kv/k?revision=3", status: 404, code: api.CodeKeyNotFound},
			{call: "GET /k?revision=3", status: 404, text: "Failed to GET"},
			{call: "GET /v1/kv/k?revision=4", headers: "Accept: application/json", status: 200, text: entry("4", "4", "1")},
			{call: "GET /v1/kv/k?revision=5", status: 400, code: api.CodeFutureRevision},
			{call: "GET /v1/kv/k?revision=0", status: 400, code: api.CodeBadRequest, text: "~revision"},
			{call: "GET /v1/kv/k?revision=-1", status: 400, code: api.CodeBadRequest, text: "~revision"},
			{call: "GET /v1/kv/k?revision=9223372036854775808", status: 400, code: api.CodeBadRequest, text: "~revision"},
			{call: "GET /v1/kv/k?revision=3&min_revision=4", status: 400, code: api.CodeBadRequest, text: "~min_revision"},
			{call: "GET /v1/kv/k?revision=3&history=4", status: 400, code: api.CodeBadRequest, text: "~history"},
			{call: "GET /v1/kv/k?history=4", headers: `If-None-Match: "1"`, status: 400, code: api.CodeBadRequest, text: "~If-None-Match"},
			{call: "GET /v1/kv/k?history=0", status: 400, code: api.CodeBadRequest, text: "~history"},
		},
		"representations": {
			{call: "PUT /v1/kv/k", headers: "Prefer: return=representation", body: "v1", status: 201, text: entry("1", "1", "1"),
				want: []string{"Preference-Applied: return=representation", "Content-Type: application/json", `Etag: "1"`, "Kv-Revision: 1", "X-Content-Type-Options: nosniff"}},
			{call: "PUT /v1/kv/k", headers: `Prefer: return="representation"`, body: "v2", status: 200, text: entry("1", "2", "2"), want: []string{`Etag: "2"`}},
			{call: "PUT /k", headers: "Prefer: return=representation", body: "v3", status: 200, text: entry("1", "3", "3"), want: []string{"Content-Type: application/json"}},
			{call: "PUT /k", headers: "Prefer: return=minimal", body: "v4", status: 204, want: []string{"Preference-Applied:"}},
			{call: "PUT /7", headers: "Prefer: return=representation", body: "", status: 200, text: `{"key":"7","value":"","create_revision":5,"mod_revision":5,"version":1}`,
				want: []string{"Kv-Notice: numeric key; DELETE /7 removes member 7"}},
			{call: "PUT /%FF", headers: "Prefer: return=representation", body: "\xfe", status: 200, text: `{"key_b64":"/w==","value_b64":"/g==","create_revision":6,"mod_revision":6,"version":1}`},
			{call: "GET /v1/kv/%FF", headers: "Accept: application/json", status: 200, text: `{"key_b64":"/w==","value_b64":"/g==","create_revision":6,"mod_revision":6,"version":1}`, want: []string{"Kv-Expires:", "Content-Length: 87"}},
			{call: "GET /v1/kv/7", headers: "Accept: application/json", status: 200, text: `{"key":"7","value":"","create_revision":5,"mod_revision":5,"version":1}`},
			{call: "HEAD /v1/kv/k", headers: "Accept: application/json", status: 200, want: []string{"Content-Type: application/json", `Etag: "4"`, "Kv-Version: 4"}},
			{call: "GET /k", headers: "Accept: application/json", status: 200, text: "v4", want: []string{"Content-Type: application/octet-stream", "Vary:"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			h, _ := newTwinAPI(t, testLimits())
			runStory(t, serveTest(t, h), steps)
		})
	}
}

func TestRefusedKeyOptions(t *testing.T) {
	h, twin := newTwinAPI(t, testLimits())
	addr := serveTest(t, h)
	long := strings.Repeat("x", 256)
	tags := `"1"` + strings.Repeat(`, "1"`, kv.MaxRevisions)
	for _, row := range []struct{ call, headers, named string }{
		{"PUT /k?ttl=0s", "", "ttl"}, {"PUT /k?ttl=-1s", "", "ttl"}, {"PUT /k?ttl=999ms", "", "ttl"}, {"PUT /k?ttl=87600h", "", "ttl"},
		{"PUT /k?ttl=30", "", "ttl"}, {"PUT /k?ttl=1.0000001s", "", "ttl"}, {"PUT /k?ttl=", "", "ttl"}, {"PUT /k?ttl=10y", "", "ttl"},
		{"PUT /k?lease=0", "", "lease"}, {"PUT /k?lease=-7", "", "lease"}, {"PUT /k?lease=x", "", "lease"}, {"PUT /k?lease=07", "", "lease"}, {"PUT /k?lease=9223372036854775808", "", "lease"},
		{"PUT /k?ttl=1s&lease=7", "", "ttl and lease"}, {"PUT /k?ttl=1s&ttl=1s", "", "ttl"},
		{"PUT /k", "If-Match: 17", "If-Match"}, {"PUT /k", `If-Match: W/"17"`, "weak"}, {"PUT /k", `If-Match: "x"`, "If-Match"},
		{"PUT /k", `If-Match: "0"`, "If-Match"}, {"PUT /k", `If-Match: "-1"`, "If-Match"}, {"PUT /k", `If-Match: ""`, "If-Match"}, {"PUT /k", `If-Match: "017"`, `"\"017\""`},
		{"PUT /k", `If-Match: "17",`, "If-Match"}, {"PUT /k", `If-Match:`, "If-Match"}, {"PUT /k", `If-Match: *, "17"`, "If-Match"},
		{"PUT /k", "If-Match: *\nIf-Match: *", "If-Match"}, {"PUT /k", "If-Match: " + tags, "16 tags"},
		{"PUT /k", `If-Match: "9223372036854775808"`, "If-Match"}, {"PUT /k", `If-None-Match: "+1"`, "If-None-Match"},
		{"PUT /k", "If-Match: *\nIf-None-Match: *", "contradict"}, {"DELETE /v1/kv/k", "If-Match: \"1\"\nIf-None-Match: \"2\"", "contradict"},
		{"PUT /k", "Idempotency-Key:", "Idempotency-Key"}, {"PUT /k", "Idempotency-Key: a b", "Idempotency-Key"}, {"PUT /k", "Idempotency-Key: é", "Idempotency-Key"},
		{"PUT /k", "Idempotency-Key: " + long, "Idempotency-Key"}, {"PUT /k", "Idempotency-Key: a\nIdempotency-Key: a", "twice"},
		{"PUT /k", "Prefer: return", "return"}, {"PUT /k", "Prefer: return=all", "return"}, {"PUT /k", "Prefer: return=minimal, return=representation", "twice"},
		{"PUT /k", "Prefer: ", "Prefer"}, {"PUT /k", "Prefer: wait=999", "none of this call"}, {"GET /k", "Prefer: return=all", "none of this call"},
		{"GET /k", "Prefer: wait=30", "If-None-Match"}, {"GET /k", "If-None-Match: \"1\"\nPrefer: wait=x", "wait"}, {"GET /k", "If-None-Match: \"1\"\nPrefer: wait=61", "wait"},
		{"GET /k?revision=1", "If-None-Match: \"1\"\nPrefer: wait=1", "never changes"}, {"GET /k", `If-None-Match: x`, "If-None-Match"},
		{"GET /k", `If-None-Match: "00"`, "If-None-Match"}, {"GET /k?min_revision=01", "", "min_revision"},
	} {
		method, target, _ := strings.Cut(row.call, " ")
		headers := "Accept: application/json\r\n"
		for line := range strings.Lines(row.headers) {
			headers += strings.TrimSuffix(line, "\n") + "\r\n"
		}
		a := exchange(t, addr, method, target, headers, "")
		if p := problemOf(t, a); a.status != 400 || !strings.Contains(p.Detail, row.named) {
			t.Errorf("%s %.80s: %d %s; want a 400 that names %s", row.call, row.headers, a.status, a.body, row.named)
		}
	}
	if n := twin.revision(); n != 0 {
		t.Errorf("something was written: revision %d", n)
	}
}

func TestPrefersJSON(t *testing.T) {
	for accept, want := range map[string]bool{
		"": false, "*/*": false, "text/html": false, "application/*": false, "application/problem+json": false, "application/octet-stream": false,
		"application/json": true, "Application/JSON; charset=utf-8": true, "application/json, */*": true, "*/*, application/json": true,
		"application/json, */*;q=0.1": true, "application/json;q=0.5, */*;q=0.5": true,
		"application/json;q=0.5, */*": false, "application/json;q=0.5, application/octet-stream": false, "application/json;q=0": false,
		"application/json;q=0.5, */*, application/octet-stream;q=0.1": true, "application/json;q=0.5, application/*;q=0.6, */*;q=0.1": false,
		"application/json;q=x": false, "application/json;q=2": false, "application/json;q=NaN": false, "application/json;q=-1": false,
		"*/*\nAccept: application/json": true, "*/*;q=0.9\nAccept: application/json;q=0.5": false,
		"text/event-stream, application/json;q=0.9": true,
	} {
		r := httptest.NewRequest("GET", "/v1/kv/k", nil)
		for i, line := range strings.Split(accept, "\nAccept: ") {
			if i > 0 || line != "" {
				r.Header.Add("Accept", line)
			}
		}
		if got := (&apiCall{r: r}).prefersJSON(); got != want {
			t.Errorf("Accept %q: JSON %v, want %v", accept, got, want)
		}
	}
}

// An absent key, of mod revision 0, matches what names it and not `*`.
func TestMatchesTag(t *testing.T) {
	for tag, want := range map[string][2]bool{ // against revision 0, and 7
		`*`: {false, true}, `"0"`: {true, false}, `"7"`: {false, true}, `W/"7"`: {false, true}, `"6", "8"`: {false, false}, `"0", "7"`: {true, true},
	} {
		p, err := parseETags("If-None-Match", []string{tag}, false)
		if got := [2]bool{matchesTag(&p, 0), matchesTag(&p, 7)}; err != nil || got != want {
			t.Errorf("%s: %v, %v; want %v", tag, got, err, want)
		}
	}
}

// A key with a TTL says when it ends, and then does.
func TestKeyTTL(t *testing.T) {
	h, twin := newTwinAPI(t, testLimits())
	addr := serveTest(t, h)
	before := time.Now().Truncate(time.Millisecond)
	a := exchange(t, addr, "PUT", "/k?ttl=30s", "", "v")
	expires, err := time.Parse(time.RFC3339, a.header.Get("Kv-Expires"))
	if err != nil || a.status != 204 || expires.Before(before.Add(30*time.Second)) || expires.After(time.Now().Add(30*time.Second)) || !strings.HasSuffix(a.header.Get("Kv-Expires"), "Z") {
		t.Errorf("PUT: %d, Kv-Expires %q, %v", a.status, a.header.Get("Kv-Expires"), err)
	}
	if calls := twin.takeCalls(); len(calls) != 1 || calls[0] != `put "k"="v" ttl 30s` {
		t.Errorf("calls %q", calls)
	}
	twin.tick(0)
	started := time.UnixMilli(twin.mu.wall).Add(30 * time.Second).UTC().Format(time.RFC3339Nano)
	runStory(t, addr, []httpStep{
		{call: "GET /k", status: 200, text: "v", want: []string{"Kv-Expires: " + started}},
		{call: "GET /v1/kv/k", headers: "Accept: application/json", status: 200, want: []string{"Kv-Expires: " + started},
			text: `{"key":"k","value":"v","create_revision":1,"mod_revision":1,"version":1,"lease":"1","expires":"` + started + `"}`},
		{call: "PUT /v1/kv/l?lease=99", body: "v", status: 404, code: api.CodeLeaseNotFound, want: []string{"Etag:"}},
		{call: "PUT /v1/kv/l?lease=1", body: "v", status: 201, want: []string{"Kv-Expires: " + started}},
	})
	twin.tick(29 * time.Second)
	runStory(t, addr, []httpStep{{call: "GET /k", status: 200, text: "v"}})
	twin.tick(time.Second)
	runStory(t, addr, []httpStep{
		{call: "GET /k", status: 404},
		{call: "GET /k?revision=2", status: 200, text: "v"},
		{call: "PUT /k?ttl=1h", body: "w", status: 204},
		{call: "PUT /k", body: "x", status: 204, want: []string{"Kv-Expires:"}},
		{call: "GET /k", status: 200, text: "x", want: []string{"Kv-Expires:"}},
	})
}

// A repetition under one idempotency key is answered as the first time, whatever
// happened since; another request under it is refused.
func TestIdempotentKeyCalls(t *testing.T) {
	const window = "Kv-Idempotency-Window: 10m0s"
	h, twin := newTwinAPI(t, testLimits())
	addr := serveTest(t, h)
	key := func(k string) string { return "Idempotency-Key: " + k + "\n" }
	runStory(t, addr, []httpStep{
		{call: "PUT /v1/kv/k", headers: key("a"), body: "v1", status: 201, want: []string{`Etag: "1"`, "Kv-Revision: 1", window, "Kv-Idempotent-Replay:"}},
		{call: "PUT /v1/kv/k", headers: key("b") + "Prefer: return=representation", body: "v2", status: 200, want: []string{window}},
		{call: "PUT /v1/kv/k", headers: key("c") + `If-Match: "1"`, body: "v2", status: 412, code: api.CodePreconditionFailed, want: []string{`Etag: "2"`, window}},
		{call: "PUT /v1/kv/k?lease=99", headers: key("d"), body: "v2", status: 404, code: api.CodeLeaseNotFound, want: []string{window}},
		{call: "DELETE /v1/kv/k", headers: key("e"), status: 204, want: []string{"Kv-Deleted: 1", "Kv-Revision: 3", window}},
		{call: "PUT /v1/kv/k?ttl=30s", headers: key("f"), body: "v4", status: 201, want: []string{`Etag: "4"`, window}},
		{call: "PUT /v1/kv/other", body: "v5", status: 201},

		// All of them again, a with another time-out and f spelled as before.
		{call: "PUT /v1/kv/k?timeout=7s", headers: key("a"), body: "v1", status: 201, want: []string{`Etag: "1"`, "Kv-Revision: 1", window, "Kv-Idempotent-Replay: true"}},
		{call: "PUT /v1/kv/k", headers: key("b") + "Prefer: return=representation", body: "v2", status: 200, want: []string{"Kv-Idempotent-Replay: true", `Etag: "2"`},
			text: `{"key":"k","value":"v2","create_revision":1,"mod_revision":2,"version":2}`},
		{call: "PUT /v1/kv/k", headers: key("c") + `If-Match: "1"`, body: "v2", status: 412, code: api.CodePreconditionFailed, want: []string{`Etag: "2"`, window, "Kv-Idempotent-Replay: true"}, text: `~"current_revision":2`},
		{call: "PUT /v1/kv/k?lease=99", headers: key("d"), body: "v2", status: 404, code: api.CodeLeaseNotFound, want: []string{"Kv-Idempotent-Replay: true"}},
		{call: "DELETE /v1/kv/k", headers: key("e"), status: 204, want: []string{"Kv-Deleted: 1", "Kv-Revision: 3", "Kv-Idempotent-Replay: true"}},
		{call: "PUT /v1/kv/k?ttl=30s", headers: key("f"), body: "v4", status: 201, want: []string{`Etag: "4"`, "Kv-Idempotent-Replay: true"}},
		{call: "GET /v1/kv/k", status: 200, text: "v4"},

		// Other requests.
		{call: "PUT /v1/kv/k", headers: key("a"), body: "v9", status: 422, code: api.CodeIdempotencyMismatch, want: []string{"Kv-Idempotent-Replay:"}},
		{call: "PUT /v1/kv/l", headers: key("a"), body: "v1", status: 422, code: api.CodeIdempotencyMismatch},
		{call: "PUT /k", headers: key("a"), body: "v1", status: 422, code: api.CodeIdempotencyMismatch},
		{call: "PUT /v1/kv/k?ttl=30s", headers: key("a"), body: "v1", status: 422, code: api.CodeIdempotencyMismatch},
		{call: "PUT /v1/kv/k", headers: key("a") + "If-None-Match: *", body: "v1", status: 422, code: api.CodeIdempotencyMismatch},
		{call: "PUT /v1/kv/k", headers: key("c") + `If-Match: "2"`, body: "v2", status: 422, code: api.CodeIdempotencyMismatch},
		{call: "PUT /v1/kv/k", headers: key("b"), body: "v2", status: 422, code: api.CodeIdempotencyMismatch},
		{call: "PUT /v1/kv/k", headers: key("e"), status: 422, code: api.CodeIdempotencyMismatch},
		{call: "DELETE /v1/kv/other", headers: key("e"), status: 422, code: api.CodeIdempotencyMismatch},
		{call: "GET /v1/kv/k", status: 200, text: "v4"},
	})
	if n := twin.revision(); n != 5 {
		t.Errorf("revision %d, want 5", n)
	}
	twin.tick(0)
	twin.tick(90500 * time.Millisecond)
	runStory(t, addr, []httpStep{{call: "PUT /v1/kv/k", headers: key("a"), body: "v1", status: 201, want: []string{"Kv-Idempotency-Window: 8m29s"}}})
	twin.tick(10 * time.Minute)
	runStory(t, addr, []httpStep{
		{call: "PUT /v1/kv/k", headers: key("a"), body: "v1", status: 409, code: api.CodeIdempotencyExpired, want: []string{"Kv-Idempotency-Window:"}},
		{call: "GET /v1/kv/k", status: 404},
	})
}

// A long poll answers as a plain read does, only later.
func TestKeyLongPoll(t *testing.T) {
	h, twin := newTwinAPI(t, testLimits())
	addr := serveTest(t, h)
	runStory(t, addr, []httpStep{
		{call: "GET /v1/kv/k", headers: "If-None-Match: \"0\"\nPrefer: wait=0", status: 404, code: api.CodeKeyNotFound},
		{call: "PUT /v1/kv/k", body: "v1", status: 201},
		{call: "GET /v1/kv/k", headers: "If-None-Match: \"0\"\nPrefer: wait=60", status: 200, text: "v1", want: []string{`Etag: "1"`}},
		{call: "GET /k", headers: "If-None-Match: \"1\"\nPrefer: wait=0", status: 304, want: []string{`Etag: "1"`, "Kv-Revision: 1"}},
	})
	c := dialRaw(t, addr)
	c.send("GET /v1/kv/k HTTP/1.1\r\nHost: h\r\nAccept: application/json\r\nIf-None-Match: \"1\"\r\nPrefer: wait=60\r\n\r\n")
	answered := make(chan answer)
	go func() { answered <- c.answer("GET") }()
	for h.m.watchers.Load() == 0 {
		runtime.Gosched()
	}
	twin.do(kv.Command{Op: kv.OpPut, Key: "other", Value: []byte("x")}, kv.Command{Op: kv.OpPut, Key: "k", Value: []byte("v3")})
	if a := <-answered; a.status != 200 || a.header.Get("Etag") != `"3"` || !strings.Contains(a.body, `"value":"v3"`) {
		t.Errorf("%d %v %s", a.status, a.header, a.body)
	}
}

// The calls for which this program is written must not pay for the others.
func TestPlainCallsAllocateLittle(t *testing.T) {
	h := benchHandlers()["api"]
	for method, limit := range map[string]float64{"GET": 6, "PUT": 7} { // a pool loses some of what it holds under the race detector
		body := strings.NewReader(strings.Repeat("v", 256))
		r := httptest.NewRequest(method, "/bench-key", io.NopCloser(body))
		r.ContentLength = 256
		if method == "GET" {
			r.Body, r.ContentLength = http.NoBody, 0
		}
		w := &nullWriter{http.Header{}}
		allocs := testing.AllocsPerRun(100, func() {
			clear(w.h)
			body.Seek(0, io.SeekStart)
			h.ServeHTTP(w, r)
		})
		if allocs > limit {
			t.Errorf("%s: %v allocations, want at most %v", method, allocs, limit)
		}
	}
}

// Every refusal of the state machine has an answer, and never an internal error.
func TestRefusals(t *testing.T) {
	for refused, want := range map[kv.Refusal]string{
		kv.RefusedCondition: "412 precondition_failed", kv.RefusedNoLease: "404 lease_not_found", kv.RefusedTooLarge: "413 too_large",
		kv.RefusedMismatch: "422 idempotency_mismatch", kv.RefusedExpired: "409 idempotency_expired", kv.RefusedOnceIsFull: "429 overloaded",
		200: "500 internal",
	} {
		f := &fakeBackend{result: &kv.Result{Refused: refused, Revision: 9, Entry: kv.Entry{ModRevision: 7}, Window: 90500 * time.Millisecond}}
		a := exchange(t, serveTest(t, newTestAPI(f, testLimits())), "PUT", "/v1/kv/k", "Accept: application/json\r\nIdempotency-Key: a\r\n", "v")
		p := problemOf(t, a)
		if got := strconv.Itoa(a.status) + " " + string(p.Code); got != want || a.header.Get("Kv-Idempotency-Window") != "1m30s" {
			t.Errorf("refusal %d: %s, window %q; want %s", refused, got, a.header.Get("Kv-Idempotency-Window"), want)
		}
		if isCondition := refused == kv.RefusedCondition; (a.header.Get("Etag") == `"7"`) != isCondition || (p.CurrentRevision == 7) != isCondition {
			t.Errorf("refusal %d: ETag %q, current_revision %d", refused, a.header.Get("Etag"), p.CurrentRevision)
		}
	}
	// A window of less than a second is none that a client could use.
	f := &fakeBackend{result: &kv.Result{Revision: 9, Window: 999 * time.Millisecond}}
	a := exchange(t, serveTest(t, newTestAPI(f, testLimits())), "PUT", "/v1/kv/k", "Idempotency-Key: a\r\n", "v")
	if got, ok := a.header["Kv-Idempotency-Window"]; ok {
		t.Errorf("window %q", got)
	}
}

// Revisions that cannot be read say why.
func TestUnreadableRevisions(t *testing.T) {
	for _, row := range []struct {
		err  error
		want string
		gone int64
	}{
		{&compactedError{41}, "410 revision_compacted", 41},
		{errFutureRevision, "400 future_revision", 0},
		{errKeyNotFound, "404 key_not_found", 0},
	} {
		h := newTestAPI(&fakeBackend{err: row.err}, testLimits())
		a := exchange(t, serveTest(t, h), "GET", "/v1/kv/k?revision=7", "Accept: application/json\r\n", "")
		p := problemOf(t, a)
		if got := strconv.Itoa(a.status) + " " + string(p.Code); got != row.want || p.CompactRevision != row.gone {
			t.Errorf("%v: %s, compact_revision %d; want %s, %d", row.err, got, p.CompactRevision, row.want, row.gone)
		}
		if calls := h.takeCalls(); len(calls) != 1 || calls[0] != `get "k" at 7` {
			t.Errorf("calls %q", calls)
		}
	}
}

// A slow reader of an answer keeps nobody else waiting.
func TestSlotIsFreeWhileAnswersAreWritten(t *testing.T) {
	h, _ := newTwinAPI(t, testLimits())
	for _, row := range []struct{ call, headers, body string }{
		{"PUT /v1/kv/k", "Prefer: return=representation", "v"}, {"GET /v1/kv/k", "Accept: application/json", ""},
		{"POST /v1/txn", "", `{"then":[{"get":{"key":"k"}}]}`}, {"POST /v1/leases", "", `{"ttl":"30s"}`},
		{"GET /v1/leases/1", "", ""}, {"PUT /v1/leases/1", "", ""},
	} {
		method, target, _ := strings.Cut(row.call, " ")
		r := httptest.NewRequest(method, target, strings.NewReader(row.body))
		if name, value, ok := strings.Cut(row.headers, ": "); ok {
			r.Header.Set(name, value)
		}
		w := &slotWatcher{ResponseWriter: httptest.NewRecorder(), m: h.m, during: -1}
		h.ServeHTTP(w, r)
		if w.during != 0 {
			t.Errorf("%s: %d slots held while writing", row.call, w.during)
		}
	}
}

func TestSlotsBoundDataCalls(t *testing.T) {
	l := testLimits()
	l.MaxInFlight = 0
	h, twin := newTwinAPI(t, l)
	addr := serveTest(t, h)
	for _, call := range []string{"GET /k", "PUT /k", "DELETE /v1/kv/k", "POST /v1/txn", "POST /v1/leases", "GET /v1/leases/1", "PUT /v1/leases/1", "DELETE /v1/leases/1"} {
		body := ""
		switch call {
		case "POST /v1/leases":
			body = `{"ttl":"30s"}`
		case "POST /v1/txn": // a slot is taken when the body is there and makes sense
			body = `{"then":[{"get":{"key":"k"}}]}`
		}
		runStory(t, addr, []httpStep{{call: call, body: body, status: http.StatusTooManyRequests, code: api.CodeOverloaded, want: []string{"Retry-After: 1"}}})
	}
	if calls := twin.takeCalls(); len(calls) != 0 || h.m.inFlight.Load() != 0 {
		t.Errorf("calls %q, %d in flight", calls, h.m.inFlight.Load())
	}
}

// What may be done with a write whose fate is open does not depend on the call.
func TestOpenWrites(t *testing.T) {
	for _, call := range []string{"PUT /k", "DELETE /v1/kv/k", "POST /v1/txn", "POST /v1/leases", "PUT /v1/leases/1", "DELETE /v1/leases/1"} {
		for _, row := range []struct {
			err     error
			status  int
			outcome api.Outcome
		}{{errCommitTimeout, 504, api.OutcomeUnknown}, {errNoLeader, 503, api.OutcomeNotApplied}, {errDiskLow, 507, api.OutcomeNotApplied}, {errors.New("x"), 500, api.OutcomeUnknown}} {
			body := ""
			if strings.HasPrefix(call, "POST") {
				body = `{"ttl":"30s"}`
			}
			if call == "POST /v1/txn" {
				body = `{}`
			}
			method, target, _ := strings.Cut(call, " ")
			a := exchange(t, serveTest(t, newTestAPI(&fakeBackend{err: row.err}, testLimits())), method, target, "Accept: application/json\r\n", body)
			if p := problemOf(t, a); a.status != row.status || p.Outcome != row.outcome {
				t.Errorf("%s, %v: %d %s", call, row.err, a.status, a.body)
			}
		}
	}
}

// The entry as JSON is what the shared shape reads.
func TestEntryJSONIsReadBack(t *testing.T) {
	h, twin := newTwinAPI(t, testLimits())
	addr := serveTest(t, h)
	twin.do(kv.Command{Op: kv.OpPut, Key: "k\xff", Value: []byte("\x00<&>\u2028"), TTL: time.Minute, Wall: 1})
	a := exchange(t, addr, "GET", "/v1/kv/k%FF", "Accept: application/json\r\n", "")
	var e api.Entry
	if err := json.Unmarshal([]byte(a.body), &e); err != nil {
		t.Fatalf("%v in %s", err, a.body)
	}
	want := time.UnixMilli(1 + 60_000)
	if e.Key != "k\xff" || string(e.Value) != "\x00<&>\u2028" || e.CreateRevision != 1 || e.ModRevision != 1 || e.Version != 1 || e.Lease != 1 || !e.Expires.Equal(want) {
		t.Errorf("%+v of %s", e, a.body)
	}
}

func FuzzETags(f *testing.F) {
	for _, s := range []string{`*`, `"17"`, `W/"17"`, `"1", "2"`, `"0"`, `"017"`, `""`, `,`, `"1`, `"9223372036854775807"`, "\"1\"\n\"2\""} {
		f.Add(s, false)
		f.Add(s, true)
	}
	f.Fuzz(func(t *testing.T, text string, write bool) {
		for _, header := range []string{"If-Match", "If-None-Match"} {
			p, err := parseETags(header, strings.Split(text, "\n"), write)
			if err != nil {
				if !errors.Is(err, errBadRequest) || p.Kind != kv.CheckNothing || p.Revisions != nil {
					t.Fatalf("%q: %v, %+v", text, err, p)
				}
				continue
			}
			var batch kv.Batch
			c := kv.Command{Op: kv.OpDelete, Key: "k", If: p}
			if err := kv.DecodeBatch(kv.AppendBatch(nil, 0, 0, 0, kv.AppendCommand(nil, &c)), &batch); err != nil {
				t.Fatalf("%q: the log refuses %+v: %v", text, p, err)
			}
			for _, revision := range p.Revisions { // tags are opaque: no other spelling is the same tag
				if !strings.Contains(text, `"`+strconv.FormatInt(revision, 10)+`"`) {
					t.Fatalf("%q: made up %d", text, revision)
				}
			}
			if len(p.Revisions) > strings.Count(text, `"`)/2 || (p.Kind == kv.CheckExists || p.Kind == kv.CheckAbsent) != (strings.TrimSpace(text) == "*") {
				t.Fatalf("%q: %+v", text, p)
			}
		}
	})
}
