package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"pontoon/api"
	"pontoon/kv"
)

// contents shows a store in one line: "k"="v"@create.version/lease.
func contents(b *twinBackend) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var rows []string
	b.mu.state.Ascend("", func(e kv.Entry) bool {
		row := fmt.Sprintf("%q=%q", e.Key, short(e.Value))
		if e.Version != 1 {
			row += fmt.Sprintf(".%d", e.Version)
		}
		if e.Lease != 0 {
			row += fmt.Sprintf("/%d", e.Lease)
		}
		rows = append(rows, row)
		return true
	})
	return strings.Join(rows, " ")
}

func TestImport(t *testing.T) {
	for _, row := range []struct {
		name, query, body, want, state string
	}{
		{"nothing", "", "", `{"put":0,"deleted":0,"skipped":0,"revision":2}`, `"a"="old" "b"="old"`},
		{"empty lines", "", "\n \t\r\n\n", `{"put":0,"deleted":0,"skipped":0,"revision":2}`, `"a"="old" "b"="old"`},
		{"put", "", `{"key":"a","value":"x"}`, `{"put":1,"deleted":0,"skipped":0,"revision":3}`, `"a"="x".2 "b"="old"`},
		{"line ends", "", "{\"key\":\"c\",\"value\":\"x\"}\r\n\n{\"key\":\"d\",\"value\":\"\"}\n", `{"put":2,"deleted":0,"skipped":0,"revision":4}`, `"a"="old" "b"="old" "c"="x" "d"=""`},
		{"base64", "", `{"key_b64":"/w==","value_b64":"AP8="}`, `{"put":1,"deleted":0,"skipped":0,"revision":3}`, `"a"="old" "b"="old" "\xff"="\x00\xff"`},
		{"mixed", "", `{"key":"ÿ","value_b64":"YQ=="}` + "\n" + `{"key_b64":"Yg==","value":"ü"}`, `{"put":2,"deleted":0,"skipped":0,"revision":4}`, `"a"="old" "b"="ü".2 "ÿ"="a"`},
		{"escapes", "", `{"\u006bey":"a\u0000\n\ud83d\ude00","value":"\"\\\/"}`, `{"put":1,"deleted":0,"skipped":0,"revision":3}`, `"a"="old" "a\x00\n😀"="\"\\/" "b"="old"`},
		{"delete", "", `{"key":"a","delete":true}` + "\n" + `{"key":"x","delete":true}`, `{"put":0,"deleted":1,"skipped":0,"revision":3}`, `"b"="old"`},
		{"a key again", "", `{"key":"c","value":"1"}` + "\n" + `{"key":"c","value":"2"}` + "\n" + `{"key":"c","delete":true}` + "\n" + `{"key":"c","value":"3"}`,
			`{"put":3,"deleted":1,"skipped":0,"revision":6}`, `"a"="old" "b"="old" "c"="3"`},
		{"what exports have", "", `{"key":"c","value":"1","create_revision":9,"mod_revision":10,"version":11}`, `{"put":1,"deleted":0,"skipped":0,"revision":3}`, `"a"="old" "b"="old" "c"="1"`},
		{"upsert", "?mode=upsert", `{"key":"a","value":"x"}`, `{"put":1,"deleted":0,"skipped":0,"revision":3}`, `"a"="x".2 "b"="old"`},
		{"create", "?mode=create", `{"key":"a","value":"x"}` + "\n" + `{"key":"c","value":"x"}` + "\n" + `{"key":"c","value":"y"}`, `{"put":1,"deleted":0,"skipped":2,"revision":3}`, `"a"="old" "b"="old" "c"="x"`},
		{"atomic", "?atomic=true", `{"key":"a","value":"x"}` + "\n" + `{"key":"c","value":"x"}` + "\n" + `{"key":"b","delete":true}`, `{"put":2,"deleted":1,"skipped":0,"revision":3}`, `"a"="x".2 "c"="x"`},
		{"atomic replacement", "?atomic", `{"key":"a","delete":true}` + "\n" + `{"key":"a","delete":true}` + "\n" + `{"key":"a","value":"x"}`, `{"put":1,"deleted":1,"skipped":0,"revision":3}`, `"a"="x" "b"="old"`},
		{"atomic create", "?atomic&mode=create", `{"key":"a","value":"x"}` + "\n" + `{"key":"c","value":"x"}`, `{"put":1,"deleted":0,"skipped":1,"revision":3}`, `"a"="old" "b"="old" "c"="x"`},
		{"atomic nothing", "?atomic", "", `{"put":0,"deleted":0,"skipped":0,"revision":2}`, `"a"="old" "b"="old"`},
		{"trailer", "", `{"key":"c","value":"x"}` + "\n\n" + `{"key":"x","delete":true}` + "\n" + `{"end":true,"items":2,"revision":99}` + "\n\n \n", `{"put":1,"deleted":0,"skipped":0,"revision":3}`, `"a"="old" "b"="old" "c"="x"`},
		{"trailer alone", "", `{"revision":0,"items":0,"end":true}`, `{"put":0,"deleted":0,"skipped":0,"revision":2}`, `"a"="old" "b"="old"`},
		{"ttl", "", `{"key":"c","value":"x","ttl":"30s"}`, `{"put":1,"deleted":0,"skipped":0,"revision":3}`, `"a"="old" "b"="old" "c"="x"/2`},
		{"lease", "", `{"key":"c","value":"x","lease":"1"}`, `{"put":1,"deleted":0,"skipped":0,"revision":3}`, `"a"="old" "b"="old" "c"="x"/1`},
		{"expires", "", `{"key":"c","value":"x","lease":"77","expires":"2126-01-02T03:04:05Z"}`, "", ""},
		{"expired", "", `{"key":"c","value":"x","lease":"77","expires":"2016-01-02T03:04:05.678+02:00"}` + "\n" + `{"key":"d","value":"x"}`, `{"put":1,"deleted":0,"skipped":1,"revision":3}`, `"a"="old" "b"="old" "d"="x"`},
		{"all expired", "", `{"key":"a","value":"x","expires":"2016-01-02T03:04:05Z"}`, `{"put":0,"deleted":0,"skipped":1,"revision":2}`, `"a"="old" "b"="old"`},
		{"all expired, atomic", "?atomic", `{"key":"a","value":"x","expires":"2016-01-02T03:04:05Z"}`, `{"put":0,"deleted":0,"skipped":1,"revision":2}`, `"a"="old" "b"="old"`},
	} {
		t.Run(row.name, func(t *testing.T) {
			h, b := newTwinAPI(t, testLimits())
			b.do(kv.Command{Op: kv.OpGrant, TTL: time.Minute, Wall: 1}, kv.Command{Op: kv.OpPut, Key: "a", Value: []byte("old")}, kv.Command{Op: kv.OpPut, Key: "b", Value: []byte("old")})
			// The media type says nothing: curl -d sends that of forms.
			a := ask(t, h, "POST", "/v1/kv"+row.query, row.body, "Content-Type: application/x-www-form-urlencoded")
			if row.want == "" {
				if a.status != 400 || !strings.Contains(a.body, "more than 8784h") {
					t.Fatalf("%d %s", a.status, a.body)
				}
				return
			}
			if a.status != 200 || a.body != row.want+"\n" {
				t.Errorf("%d %s, want %s", a.status, a.body, row.want)
			}
			if got := contents(b); got != row.state {
				t.Errorf("store %s, want %s", got, row.state)
			}
			if want := strconv.FormatInt(b.revision(), 10); a.header.Get("Kv-Revision") != want {
				t.Errorf("Kv-Revision %q, want %s", a.header.Get("Kv-Revision"), want)
			}
			if n := h.m.inFlight.Load(); n != 0 {
				t.Errorf("%d slots taken", n)
			}
		})
	}
}

func TestImportBadLines(t *testing.T) {
	l := testLimits()
	l.MaxKeyBytes, l.MaxValueBytes = 10, 20
	for _, row := range []struct{ line, detail string }{
		{`x`, "line 3: want an object"},
		{`[]`, "line 3: want an object"},
		{`{}`, "line 3: want exactly one of the fields key, key_b64"},
		{`null`, "line 3: want an object"},
		{`{"key":"k"}`, "line 3: want exactly one of the fields value, value_b64"},
		{`{"value":"v"}`, "line 3: want exactly one of the fields key, key_b64"},
		{`{"key":"k","key_b64":"aw==","value":"v"}`, "line 3: want exactly one of the fields key, key_b64"},
		{`{"key":"k","value":"v","value_b64":"dg=="}`, "line 3: want exactly one of the fields value, value_b64"},
		{`{"key":"k","vaule":"v"}`, "line 3: vaule: unknown field"},
		{`{"Key":"k","value":"v"}`, "line 3: Key: unknown field"},
		{`{"key":"k","value":"v","deleted":true}`, "line 3: deleted: unknown field"},
		{`{"key":"k","key":"k","value":"v"}`, "line 3: key: the field is given twice"},
		{`{"key":null,"value":"v"}`, "line 3: key: want a string"},
		{`{"key":"k","value":null}`, "line 3: value: want a string"},
		{`{"key":"k","value":5}`, "line 3: value: want a string"},
		{`{"key":"","value":"v"}`, "line 3: key: the key is empty"},
		{`{"key":"12345678901","value":"v"}`, "line 3: key: the key has 11 bytes"},
		{`{"key":"k","value":"123456789012345678901"}`, "line 3: value: the value has 21 bytes"},
		{`{"key":"k","value_b64":"v"}`, "line 3: value_b64: want base64"},
		{`{"key":"k","value_b64":"dg"}`, "line 3: value_b64: want base64"},
		{`{"key":"k","value":"\ud800"}`, "line 3: value: the string has a \\u escape"},
		{"{\"key\":\"k\",\"value\":\"\xff\"}", "line 3: value: the string is not valid UTF-8"},
		{"{\"key\":\"k\",\"value\":\"\t\"}", "line 3: value: the string has a control character"},
		{`{"key":"k","value":"v"`, "line 3: the JSON ends too early"},
		{`{"key":"k","value":"v"} x`, "line 3: it goes on after the JSON value"},
		{`{"key":"k","value":"v"}{"key":"k","value":"v"}`, "line 3: it goes on after the JSON value"},
		{`{"key":"k","value":"v","version":-1}`, "line 3: version: want a whole number"},
		{`{"key":"k","value":"v","mod_revision":"1"}`, "line 3: mod_revision: want a whole number"},
		{`{"key":"k","value":"v","create_revision":1.5}`, "line 3: create_revision: want a whole number"},
		{`{"key":"k","value":"v","ttl":"0s"}`, "line 3: ttl: want a duration"},
		{`{"key":"k","value":"v","ttl":"999ms"}`, "line 3: ttl: want a duration"},
		{`{"key":"k","value":"v","ttl":"87600h"}`, "line 3: ttl: want a duration"},
		{`{"key":"k","value":"v","ttl":30}`, "line 3: ttl: want a string"},
		{`{"key":"k","value":"v","lease":1}`, "line 3: lease: want the id of a lease"},
		{`{"key":"k","value":"v","lease":"0"}`, "line 3: lease: want the id of a lease"},
		{`{"key":"k","value":"v","lease":"1","ttl":"5s"}`, "line 3: the field ttl contradicts lease and expires"},
		{`{"key":"k","value":"v","expires":"2126-01-02T03:04:05Z","ttl":"5s"}`, "line 3: the field ttl contradicts lease and expires"},
		{`{"key":"k","value":"v","expires":"2126-01-02T03:04:05Z"}`, "line 3: expires lies more than 8784h"},
		{`{"key":"k","value":"v","expires":"tomorrow"}`, "line 3: expires: want a time as RFC 3339"},
		{`{"key":"k","value":"v","expires":"2026-01-02 03:04:05"}`, "line 3: expires: want a time as RFC 3339"},
		{`{"key":"k","value":"v","expires":5}`, "line 3: expires: want a string"},
		{`{"key":"k","delete":false}`, "line 3: delete: want true"},
		{`{"key":"k","delete":1}`, "line 3: delete: want true"},
		{`{"key":"k","delete":true,"value":"v"}`, "line 3: a delete has a key"},
		{`{"key":"k","delete":true,"value_b64":""}`, "line 3: a delete has a key"},
		{`{"key":"k","delete":true,"ttl":"5s"}`, "line 3: a delete has a key"},
		{`{"key":"k","delete":true,"lease":"1"}`, "line 3: a delete has a key"},
		{`{"key":"k","delete":true,"expires":"2026-01-02T03:04:05Z"}`, "line 3: a delete has a key"},
		{`{"delete":true}`, "line 3: want exactly one of the fields key, key_b64"},
		{`{"end":true,"items":1,"revision":2}`, "line 3: the trailer counts 1 items, and 2 came before it"},
		{`{"end":true,"items":3,"revision":2}`, "line 3: the trailer counts 3 items, and 2 came before it"},
		{`{"end":false,"items":2,"revision":2}`, "line 3: end: want true"},
		{`{"end":true,"items":2}`, "line 3: a trailer has the fields"},
		{`{"items":2,"revision":2}`, "line 3: a trailer has the fields"},
		{`{"end":true,"items":2,"revision":2,"key":"k"}`, "line 3: a trailer has the fields"},
		{`{"key":"k","value":"v","revision":5}`, "line 3: a trailer has the fields"},
		{`{"end":true,"items":2,"revision":2}` + "\n\n" + `{"key":"k","value":"v"}`, "line 5: it comes after the trailer"},
		{`{"end":true,"items":2,"revision":2}` + "\n" + `{"end":true,"items":2,"revision":2}`, "line 4: it comes after the trailer"},
		{`{"key":"k","value":"` + strings.Repeat(" ", 5000), "line 3 is longer than 4276 bytes"},
	} {
		before := `{"key":"a","value":"1"}` + "\n" + `{"key":"b","value":"2"}` + "\n"
		after := "\n" + `{"key":"never","value":""}` + "\n"
		status, code := 400, api.CodeBadRequest
		switch {
		case strings.Contains(row.detail, "key has"):
			status, code = 414, api.CodeKeyTooLong
		case strings.Contains(row.detail, "value has"), strings.Contains(row.detail, "longer than"):
			status, code = 413, api.CodeTooLarge
		}
		var line int
		if _, err := fmt.Sscanf(row.detail, "line %d", &line); err != nil {
			t.Fatal(err)
		}
		for _, query := range []string{"", "?atomic=true"} {
			h, b := newTwinAPI(t, l)
			a := askJSON(t, h, "POST", "/v1/kv"+query, before+row.line+after, status, nil)
			p := problemOf(t, a)
			if !strings.HasPrefix(p.Detail, row.detail) || p.Code != code || p.Line != line {
				t.Errorf("%s%s:\n%s, want %q", row.line, query, a.body, row.detail)
			}
			state, outcome, applied := `"a"="1" "b"="2"`, api.OutcomeApplied, &api.Imported{Put: 2, Revision: 2}
			if query != "" {
				state, outcome, applied = "", api.OutcomeNotApplied, nil
			}
			if got := contents(b); got != state || p.Outcome != outcome || fmt.Sprint(p.Applied) != fmt.Sprint(applied) {
				t.Errorf("%s%s: store %s, %s", row.line, query, got, a.body)
			}
		}
		// With a key it is one command; the key stays unused.
		h, b := newTwinAPI(t, l)
		for _, body := range []string{before + row.line + after, before} {
			a := ask(t, h, "POST", "/v1/kv", body, "Idempotency-Key: one")
			if bad := body != before; bad != (a.status == status) || bad != (contents(b) == "") {
				t.Errorf("%s with a key: %d %s, store %s", row.line, a.status, a.body, contents(b))
			}
		}
	}
}

func TestImportRefusals(t *testing.T) {
	h, _ := newTwinAPI(t, testLimits())
	for query, detail := range map[string]string{
		"mode=replace": "want upsert or create", "atomic=1": "want true, false or no value", "prefix=a": `"prefix" is none of this call`,
		"limit=1": `"limit" is none of this call`, "ttl=5s": `"ttl" is none of this call`, "timeout=0": "want a duration",
	} {
		if a := ask(t, h, "POST", "/v1/kv?"+query, "{}"); a.status != 400 || !strings.Contains(a.body, detail) {
			t.Errorf("%s: %d %s", query, a.status, a.body)
		}
	}
	if a := ask(t, h, "POST", "/v1/kv", "{}", "If-Match: *"); a.status != 400 || !strings.Contains(a.body, "If-Match") {
		t.Errorf("If-Match: %d %s", a.status, a.body)
	}
	if a := ask(t, h, "POST", "/v1/kv", "{}", "Origin: http://evil.example"); a.status != 403 {
		t.Errorf("a page of another origin: %d %s", a.status, a.body)
	}
	l := testLimits()
	l.MaxTxnBytes = 30
	h, b := newTwinAPI(t, l)
	body := `{"key":"a","value":"123456789"}`
	for _, header := range []string{"Idempotency-Key: one", "X: y"} {
		a := askJSON(t, h, "POST", "/v1/kv?atomic", body, 413, nil, header)
		if p := problemOf(t, a); p.Code != api.CodeTooLarge || !strings.Contains(p.Hint, "as a stream of any length") || contents(b) != "" {
			t.Errorf("%s", a.body)
		}
	}
	askJSON(t, h, "POST", "/v1/kv?atomic", body[:len(body)-5]+`"}`, 200, nil)
	if a := ask(t, h, "POST", "/v1/kv", strings.Repeat(body+"\n", 10)); a.status != 200 {
		t.Errorf("streamed: %d %s", a.status, a.body)
	}
}

func TestAtomicImportOfOneKeyTwice(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	put, del := `{"key":"a","value":"x"}`, `{"key_b64":"YQ==","delete":true}`
	for _, row := range []struct {
		lines []string
		bad   int
	}{
		{[]string{put, put}, 2}, {[]string{put, "", del}, 3}, {[]string{del, put, del}, 3}, {[]string{del, put, put}, 3}, {[]string{del, del, put}, 0},
	} {
		a := ask(t, h, "POST", "/v1/kv?atomic", strings.Join(row.lines, "\n"), "Accept: application/json")
		if row.bad == 0 {
			if a.status != 200 {
				t.Errorf("%q: %d %s", row.lines, a.status, a.body)
			}
			continue
		}
		p := problemOf(t, a)
		if a.status != 400 || p.Line != row.bad || !strings.Contains(p.Detail, "the key is put in line") || p.Outcome != api.OutcomeNotApplied || contents(b) != "" {
			t.Errorf("%q: %d %s", row.lines, a.status, a.body)
		}
	}
}

// importLines are n puts of keys 0 to n-1.
func importLines(n int) string {
	var s strings.Builder
	for i := range n {
		fmt.Fprintf(&s, `{"key":"k%07d","value":"%d"}`+"\n", i, i)
	}
	return s.String()
}

func TestImportChunks(t *testing.T) {
	_, b := newTwinAPI(t, testLimits())
	var chunks []int
	h := newTestAPIOver(&hooked{backend: b, onPropose: func(ctx context.Context, c *kv.Command) (kv.Result, error) {
		if !c.Txn.Each || !c.Txn.Brief || c.Once != nil || c.Wall != 0 {
			t.Errorf("a chunk with %+v", *c.Txn)
		}
		chunks = append(chunks, len(c.Txn.Then))
		return b.propose(ctx, c)
	}}, &b.fakeBackend, testLimits())
	for _, row := range []struct {
		body string
		want []int
	}{
		{importLines(2500), []int{1000, 1000, 500}},
		{importLines(1000), []int{1000}},
		{importLines(1001), []int{1000, 1}},
		{strings.Repeat(`{"key":"k","value":"`+strings.Repeat("x", 100_000)+`"}`+"\n", 5), []int{2, 2, 1}},
		{`{"key":"k","value":"` + strings.Repeat("x", 1<<20) + `"}` + "\n" + importLines(3), []int{1, 3}},
		{`{"key":"k","value":"` + strings.Repeat(`\u0001`, 1<<20) + `"}`, []int{1}}, // the longest line there is
	} {
		chunks = nil
		if a := ask(t, h, "POST", "/v1/kv", row.body); a.status != 200 || !slices.Equal(chunks, row.want) {
			t.Errorf("%d %s: chunks %v, want %v", a.status, a.body, chunks, row.want)
		}
	}
}

// A failure in the middle says from which line on nothing is known, and what
// was applied before it.
func TestImportFailsInTheMiddle(t *testing.T) {
	for _, row := range []struct {
		err     error
		chunk   int // that fails, from 0
		status  int
		outcome api.Outcome
		detail  string
	}{
		{errNoLeader, 0, 503, api.OutcomeNotApplied, "lines 1 to 1000: "},
		{errNoLeader, 1, 503, api.OutcomeApplied, "lines 1001 to 2000: "},
		{errNoLeader, 2, 503, api.OutcomeApplied, "lines 2001 to 2001: "},
		{errStopping, 1, 503, api.OutcomeApplied, "lines 1001 to 2000: "},
		{errDiskLow, 1, 507, api.OutcomeApplied, "lines 1001 to 2000: "},
		{errNotProposed, 1, 429, api.OutcomeApplied, "lines 1001 to 2000: "},
		{errCommitTimeout, 0, 504, api.OutcomeUnknown, "lines 1 to 1000: "},
		{errCommitTimeout, 1, 504, api.OutcomeUnknown, "lines 1001 to 2000: "},
		{errors.New("whatever"), 1, 500, api.OutcomeUnknown, ""},
	} {
		_, b := newTwinAPI(t, testLimits())
		n := 0
		h := newTestAPIOver(&hooked{backend: b, onPropose: func(ctx context.Context, c *kv.Command) (kv.Result, error) {
			if n++; n > row.chunk {
				return kv.Result{}, row.err
			}
			return b.propose(ctx, c)
		}}, &b.fakeBackend, testLimits())
		a := askJSON(t, h, "POST", "/v1/kv", importLines(2001), row.status, nil)
		p := problemOf(t, a)
		detail := strings.Replace(row.detail, "lines 2001 to 2001", "line 2001", 1)
		if p.Line != 1000*row.chunk+1 || !strings.HasPrefix(p.Detail, detail) || p.Outcome != row.outcome || p.Applied == nil ||
			*p.Applied != (api.Imported{Put: int64(1000 * row.chunk), Revision: int64(1000 * row.chunk)}) ||
			!strings.HasPrefix(p.Hint, fmt.Sprintf("go on from line %d: ", p.Line)) {
			t.Errorf("%v: %s", row, a.body)
		}
		if n := h.m.inFlight.Load(); n != 0 {
			t.Errorf("%d slots taken", n)
		}
		// One piece fails as a whole.
		n = 1000
		a = askJSON(t, h, "POST", "/v1/kv?atomic", importLines(5), row.status, nil)
		if p := problemOf(t, a); p.Line != 0 || p.Applied != nil || p.Outcome == api.OutcomeApplied {
			t.Errorf("atomic, %v: %s", row, a.body)
		}
	}
}

// A bad line after a failed chunk is not what the answer is about.
func TestImportFailureBeforeBadLine(t *testing.T) {
	_, b := newTwinAPI(t, testLimits())
	h := newTestAPIOver(&hooked{backend: b, onPropose: func(context.Context, *kv.Command) (kv.Result, error) {
		return kv.Result{}, errCommitTimeout
	}}, &b.fakeBackend, testLimits())
	a := askJSON(t, h, "POST", "/v1/kv", importLines(5)+"x\n", 504, nil)
	if p := problemOf(t, a); p.Line != 1 || p.Outcome != api.OutcomeUnknown {
		t.Error(a.body)
	}
}

func TestImportLeases(t *testing.T) {
	setUp := func() (*testAPI, *twinBackend) {
		h, b := newTwinAPI(t, testLimits())
		b.do(kv.Command{Op: kv.OpGrant, TTL: time.Minute, Wall: 1})
		return h, b
	}
	good, bad := `{"key":"a","value":"x","lease":"1"}`, `{"key":"b","value":"x","lease":"7"}`
	worse, expired := `{"key":"c","value":"x","lease":"8"}`, `{"key":"e","value":"x","expires":"2016-01-02T03:04:05Z"}`
	for _, row := range []struct {
		lines   []string
		line    int
		applied api.Imported
		state   string
	}{
		{[]string{good, expired, bad, strings.Replace(expired, `"e"`, `"f"`, 1), worse}, 3, api.Imported{Put: 1, Skipped: 1, Revision: 1}, `"a"="x"/1`},
		{[]string{bad, good}, 1, api.Imported{}, ""},
		{[]string{expired, bad}, 2, api.Imported{Skipped: 1}, ""},
		{[]string{`{"key":"z","delete":true}`, worse, bad}, 2, api.Imported{}, ""},
	} {
		h, b := setUp()
		a := askJSON(t, h, "POST", "/v1/kv", strings.Join(row.lines, "\n"), 404, nil)
		p := problemOf(t, a)
		outcome := api.OutcomeNotApplied
		if row.applied.Put > 0 {
			outcome = api.OutcomeApplied
		}
		if p.Code != api.CodeLeaseNotFound || p.Line != row.line || p.Outcome != outcome || p.Applied == nil {
			t.Fatalf("%q: %s", row.lines, a.body)
		}
		row.applied.Revision = p.Applied.Revision
		if *p.Applied != row.applied || contents(b) != row.state || !strings.HasPrefix(p.Detail, fmt.Sprintf("line %d: the lease ", row.line)) {
			t.Errorf("%q: %s, store %s", row.lines, a.body, contents(b))
		}
		h, b = setUp()
		a = askJSON(t, h, "POST", "/v1/kv?atomic", strings.Join(row.lines, "\n"), 404, nil)
		if p := problemOf(t, a); p.Line != row.line || p.Outcome != api.OutcomeNotApplied || contents(b) != "" {
			t.Errorf("atomic %q: %s, store %s", row.lines, a.body, contents(b))
		}
		// A kept refusal reads the same at each repetition.
		h, b = setUp()
		first := ask(t, h, "POST", "/v1/kv", strings.Join(row.lines, "\n"), "Idempotency-Key: one")
		b.do(kv.Command{Op: kv.OpRevoke, Lease: 1})
		again := ask(t, h, "POST", "/v1/kv", strings.Join(row.lines, "\n"), "Idempotency-Key: one")
		if first.status != 404 || again.status != 404 || first.body != again.body || again.header.Get("Kv-Idempotent-Replay") != "true" || contents(b) != "" {
			t.Errorf("%d %s, then %d %s", first.status, first.body, again.status, again.body)
		}
	}
}

// The line is found in a later chunk, too.
func TestImportLeaseInSecondChunk(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	lines := strings.Split(importLines(1500), "\n")
	lines[1300] = `{"key":"b","value":"x","lease":"7"}`
	a := askJSON(t, h, "POST", "/v1/kv", strings.Join(lines, "\n"), 404, nil)
	p := problemOf(t, a)
	if p.Line != 1301 || *p.Applied != (api.Imported{Put: 1300, Revision: 1300}) || b.revision() != 1300 {
		t.Errorf("%s, revision %d", a.body, b.revision())
	}
}

// What is left until `expires` becomes the TTL.
func TestImportExpires(t *testing.T) {
	for left, want := range map[time.Duration]time.Duration{
		time.Hour: time.Hour, 1500 * time.Millisecond: 1500 * time.Millisecond, 10 * time.Millisecond: time.Second,
		maxTTL + time.Hour: maxTTL,
	} {
		synctest.Test(t, func(t *testing.T) {
			h, b := newTwinAPI(t, testLimits())
			at := time.Now().Add(left).UTC()
			a := ask(t, h, "POST", "/v1/kv", fmt.Sprintf(`{"key":"k","value":"v","lease":"55","expires":%q}`, at.Format(time.RFC3339Nano)))
			if a.status != 200 {
				t.Fatalf("%d %s", a.status, a.body)
			}
			b.mu.Lock()
			defer b.mu.Unlock()
			e, _ := b.mu.state.Get("k")
			lease, ok := b.mu.state.Lease(e.Lease)
			if !ok || lease.TTL != want || lease.Expires != time.Now().Add(want).UnixMilli() {
				t.Errorf("%v left: lease %+v, want %v", left, lease, want)
			}
		})
	}
}

func TestImportOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := newTwinAPI(t, testLimits())
		soon := time.Now().Add(time.Second).UTC().Format(time.RFC3339Nano)
		body := importLines(3) + `{"key":"k0000000","value":"again"}` + "\n" + `{"key":"s","value":"x","expires":"` + soon + `"}` + "\n" +
			`{"key":"p","value":"x","expires":"1999-01-02T03:04:05Z"}` // the bubble's clock begins in 2000
		first := ask(t, h, "POST", "/v1/kv", body, "Idempotency-Key: one")
		if first.status != 200 || first.body != `{"put":5,"deleted":0,"skipped":1,"revision":5}`+"\n" || first.header.Get("Kv-Idempotency-Window") == "" {
			t.Fatalf("%d %s %v", first.status, first.body, first.header)
		}
		b.do(kv.Command{Op: kv.OpDeleteRange})
		time.Sleep(time.Minute)
		again := ask(t, h, "POST", "/v1/kv?timeout=9s", body, "Idempotency-Key: one")
		if again.status != 200 || again.body != first.body || again.header.Get("Kv-Revision") != "5" || again.header.Get("Kv-Idempotent-Replay") != "true" || contents(b) != "" {
			t.Errorf("%d %s %v, store %s", again.status, again.body, again.header, contents(b))
		}
		for query, other := range map[string]string{"": body + "\n", "?mode=create": body, "?atomic": importLines(3)} {
			if a := ask(t, h, "POST", "/v1/kv"+query, other, "Idempotency-Key: one"); a.status != 422 {
				t.Errorf("another import%s: %d %s", query, a.status, a.body)
			}
		}
		// Nothing to do is an outcome, too.
		for range 2 {
			if a := ask(t, h, "POST", "/v1/kv", "", "Idempotency-Key: two"); a.status != 200 || a.body != `{"put":0,"deleted":0,"skipped":0,"revision":6}`+"\n" {
				t.Errorf("%d %s", a.status, a.body)
			}
			fill(b, "x")
		}
	})
}

// An import of an export is the store that was exported, also with keys and
// values that are no text, and chunk by chunk.
func TestImportOfExport(t *testing.T) {
	from, a := newTwinAPI(t, testLimits())
	to, b := newTwinAPI(t, testLimits())
	anyBytes := rapid.OneOf(rapid.SliceOfN(rapid.Byte(), 0, 20), rapid.Map(rapid.String(), func(s string) []byte { return []byte(s) }))
	rapid.Check(t, func(t *rapid.T) {
		a.do(kv.Command{Op: kv.OpDeleteRange})
		b.do(kv.Command{Op: kv.OpDeleteRange})
		for range rapid.IntRange(0, 20).Draw(t, "keys") {
			key := string(anyBytes.Filter(func(k []byte) bool { return len(k) > 0 }).Draw(t, "key"))
			a.do(kv.Command{Op: kv.OpPut, Key: key, Value: slices.Repeat(anyBytes.Draw(t, "value"), rapid.SampledFrom([]int{1, 1, 1, 2000}).Draw(t, "times"))})
		}
		export := ask(t, from, "GET", "/v1/kv", "", acceptNDJSON)
		query := rapid.SampledFrom([]string{"", "?mode=create", "?atomic"}).Draw(t, "query")
		if query == "?atomic" && len(export.body) > 4<<20 {
			query = ""
		}
		if imported := ask(t, to, "POST", "/v1/kv"+query, export.body); imported.status != 200 {
			t.Fatalf("%d %s", imported.status, imported.body)
		}
		if got, want := stateOf(b), stateOf(a); !maps.Equal(got, want) {
			t.Fatalf("imported %q, exported %q", got, want)
		}
	})
}

func stateOf(b *twinBackend) map[string]string {
	b.mu.Lock()
	defer b.mu.Unlock()
	m := map[string]string{}
	b.mu.state.Ascend("", func(e kv.Entry) bool {
		m[e.Key] = string(e.Value)
		return true
	})
	return m
}

// A body may take longer than the default time-out as long as it moves; one that
// stands still ends. That time-out bounds each wait for raft, timeout= all of them.
func TestSlowImport(t *testing.T) {
	for _, proto := range []string{"HTTP/1.1", "stands still", "slow raft", "timeout=50s"} {
		t.Run(proto, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, b := newTwinAPI(t, testLimits())
				var waits []time.Duration
				start, query := time.Now(), ""
				if strings.HasPrefix(proto, "timeout") {
					query = "?" + proto
				}
				h := newTestAPIOver(&hooked{backend: b, onPropose: func(ctx context.Context, c *kv.Command) (kv.Result, error) {
					until, _ := ctx.Deadline()
					wait := time.Until(until)
					if query != "" {
						wait = until.Sub(start) - 45*time.Second
					}
					waits = append(waits, wait)
					if proto == "slow raft" {
						// Longer than a read deadline lives.
						time.Sleep(15 * time.Second)
						ctx = context.WithoutCancel(ctx)
					}
					return b.propose(ctx, c)
				}}, &b.fakeBackend, testLimits())
				c := pipeServer(t, h)
				c.SetDeadline(time.Now().Add(time.Hour))
				body := importLines(1500)
				c.send("POST /v1/kv" + query + " HTTP/1.1\r\nHost: pontoon\r\nAccept: application/json\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n")
				const piece = 20_000
				for i := 0; i < len(body); i += piece {
					if proto == "stands still" && i >= 40_000 {
						time.Sleep(11 * time.Second)
						break
					}
					c.send(body[i:min(i+piece, len(body))])
					time.Sleep(8 * time.Second)
				}
				a := c.answer("POST")
				if proto == "stands still" {
					whole := strings.Count(body[:40_000], "\n")
					p := problemOf(t, a)
					detail := fmt.Sprintf("line %d: the body stopped before its end: nothing came for 10s; nothing was applied from line 1001 on", whole+1)
					if a.status != 400 || p.Line != 1001 || p.Applied == nil || p.Applied.Put != 1000 || p.Outcome != api.OutcomeApplied || p.Detail != detail {
						t.Errorf("%d %s", a.status, a.body)
					}
				} else if a.status != 200 || a.body != `{"put":1500,"deleted":0,"skipped":0,"revision":1500}`+"\n" || len(waits) != 2 {
					t.Errorf("%d %s, %d chunks", a.status, a.body, len(waits))
				}
				for _, w := range waits {
					if w != 5*time.Second {
						t.Errorf("a wait for raft of %v, want 5s", w)
					}
				}
				if n := h.m.inFlight.Load(); n != 0 {
					t.Errorf("%d slots taken", n)
				}
			})
		})
	}
}

// deadlineWriter notes the read deadline in force.
type deadlineWriter struct {
	*httptest.ResponseRecorder
	until time.Time
}

func (w *deadlineWriter) SetReadDeadline(t time.Time) error {
	w.until = t
	return nil
}

// Over HTTP/2 a read deadline that passes while raft is waited for would break
// the body for good, so that none is in force then.
func TestImportReadDeadline(t *testing.T) {
	_, b := newTwinAPI(t, testLimits())
	w := &deadlineWriter{ResponseRecorder: httptest.NewRecorder()}
	chunks := 0
	h := newTestAPIOver(&hooked{backend: b, onPropose: func(ctx context.Context, c *kv.Command) (kv.Result, error) {
		// The last chunk comes after the end of the body.
		if chunks++; chunks < 3 && !w.until.IsZero() {
			t.Errorf("chunk %d: the read deadline is %v", chunks, w.until)
		}
		w.until = time.Unix(1, 0)
		return b.propose(ctx, c)
	}}, &b.fakeBackend, testLimits())
	h.ServeHTTP(w, httptest.NewRequest("POST", "/v1/kv", &repeatReader{n: 2500}))
	if w.Code != 200 || chunks != 3 {
		t.Errorf("%d %s in %d chunks", w.Code, w.Body, chunks)
	}
	w.until = time.Time{}
	h.ServeHTTP(w, httptest.NewRequest("POST", "/v1/kv", nil))
	if !w.until.IsZero() {
		t.Errorf("without a body the read deadline is %v", w.until)
	}
}

func TestImportHTTP2(t *testing.T) {
	h, _ := newTwinAPI(t, testLimits())
	client := http2Client(t)
	addr := serveTest(t, h)
	post := func(body io.Reader) (int, string) {
		r := requestTo(t, "POST", addr, "/v1/kv", body)
		r.Header.Set("Accept", "application/json")
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(text)
	}
	if status, text := post(strings.NewReader(importLines(20_000))); status != 200 || text != `{"put":20000,"deleted":0,"skipped":0,"revision":20000}`+"\n" {
		t.Errorf("%d %s", status, text)
	}
	status, text := post(strings.NewReader(importLines(1000) + "x\n" + importLines(100_000)))
	var p api.Error
	if err := json.Unmarshal([]byte(text), &p); err != nil || status != 400 || p.Line != 1001 || p.Applied == nil || p.Applied.Put != 1000 {
		t.Errorf("%d %s", status, text)
	}
}

// The answer about a bad line reaches a client that goes on sending.
func TestImportAnswersWhileClientSends(t *testing.T) {
	h, _ := newTwinAPI(t, testLimits())
	addr := serveTest(t, h)
	body := importLines(1500) + "x\n" + importLines(50_000)
	a := exchange(t, addr, "POST", "/v1/kv", "Accept: application/json\r\n", body)
	if p := problemOf(t, a); a.status != 400 || p.Line != 1501 || p.Applied.Put != 1500 {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// A body that is cut is no end: the chunk at hand is not applied.
func TestImportCutBody(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	r := httptest.NewRequest("POST", "/v1/kv", io.MultiReader(strings.NewReader(importLines(2)+`{"key":"never","value":""}`), errReader{}))
	r.Header.Set("Accept", "application/json")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	p := problemOf(t, answer{status: w.Code, header: w.Header(), body: w.Body.String()})
	if w.Code != 400 || p.Line != 1 || p.Applied == nil || p.Applied.Put != 0 || !strings.HasPrefix(p.Detail, "line 3: the body stopped before its end") || contents(b) != "" {
		t.Errorf("%d %s, store %s", w.Code, w.Body, contents(b))
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

func TestImportBound(t *testing.T) {
	l := testLimits()
	l.MaxInFlight = 5
	_, b := newTwinAPI(t, l)
	gate, begun := make(chan struct{}), make(chan struct{})
	h := newTestAPIOver(&hooked{backend: b, onPropose: func(ctx context.Context, c *kv.Command) (kv.Result, error) {
		begun <- struct{}{}
		<-gate
		return b.propose(ctx, c)
	}}, &b.fakeBackend, l)
	done := make(chan answer)
	for range 2 {
		go func() { done <- ask(t, h, "POST", "/v1/kv", importLines(1)) }()
		<-begun
	}
	if n := h.m.inFlight.Load(); n != 2 {
		t.Errorf("%d slots taken by 2 imports", n)
	}
	a := ask(t, h, "POST", "/v1/kv", importLines(1), "Accept: application/json")
	if p := problemOf(t, a); a.status != 429 || p.Code != api.CodeOverloaded || !strings.Contains(p.Detail, "2 imports") || p.Outcome != api.OutcomeNotApplied {
		t.Errorf("one too many: %d %s", a.status, a.body)
	}
	close(gate)
	for range 2 {
		if a := <-done; a.status != 200 {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	go func() { <-begun }()
	if a := ask(t, h, "POST", "/v1/kv", importLines(1)); a.status != 200 {
		t.Errorf("after them: %d", a.status)
	}
}

// repeatReader gives a text n times, and never more than some bytes at once.
type repeatReader struct {
	n, line int
	rest    []byte
	out     []byte
}

func (r *repeatReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.line == r.n {
			return 0, io.EOF
		}
		r.out = fmt.Appendf(r.out[:0], `{"key":"k%07d","value":"some value %d"}`+"\n", r.line, r.line)
		r.rest = r.out
		r.line++
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// A million lines, into a store that forgets them: an import holds one chunk.
func TestImportMillion(t *testing.T) {
	const lines = 1_000_000
	_, b := newTwinAPI(t, testLimits())
	revision, ops := int64(0), 0
	h := newTestAPIOver(&hooked{backend: b, onPropose: func(_ context.Context, c *kv.Command) (kv.Result, error) {
		revision += int64(len(c.Txn.Then))
		ops = max(ops, len(c.Txn.Then))
		return kv.Result{Revision: revision, Txn: &kv.TxnResult{Succeeded: true, Put: int64(len(c.Txn.Then))}}, nil
	}}, &b.fakeBackend, testLimits())
	r := httptest.NewRequest("POST", "/v1/kv", &repeatReader{n: lines})
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if want := fmt.Sprintf(`{"put":%d,"deleted":0,"skipped":0,"revision":%d}`+"\n", lines, lines); w.Code != 200 || w.Body.String() != want || ops != maxChunkLines {
		t.Errorf("%d %s, chunks of %d", w.Code, w.Body, ops)
	}
}

func BenchmarkImport(b *testing.B) {
	_, twin := newTwinAPI(b, testLimits())
	h := newTestAPIOver(&hooked{backend: twin, onPropose: func(_ context.Context, c *kv.Command) (kv.Result, error) {
		return kv.Result{Revision: 1, Txn: &kv.TxnResult{Put: int64(len(c.Txn.Then))}}, nil
	}}, &twin.fakeBackend, testLimits())
	body := importLines(100_000)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if a := ask(b, h, "POST", "/v1/kv", body); a.status != http.StatusOK {
			b.Fatal(a.body)
		}
	}
}
