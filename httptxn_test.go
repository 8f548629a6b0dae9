package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pontoon/api"
	"pontoon/kv"
)

func TestTxnStories(t *testing.T) {
	txn := func(body string, status int, text string, want ...string) httpStep {
		return httpStep{call: "POST /v1/txn", body: body, status: status, text: text, want: want}
	}
	for name, steps := range map[string][]httpStep{
		"compare and swap": {
			txn(`{"if":[{"key":"k","exists":false}],"then":[{"put":{"key":"k","value":"v1"}}],"else":[{"get":{"key":"k"}}]}`, 200,
				`{"succeeded":true,"revision":1,"results":[{"put":{"key":"k","create_revision":1,"mod_revision":1,"version":1}}]}`, "Kv-Revision: 1", "Content-Type: application/json"),
			txn(`{"if":[{"key":"k","exists":false}],"then":[{"put":{"key":"k","value":"v1"}}],"else":[{"get":{"key":"k"}}]}`, 200,
				`{"succeeded":false,"revision":1,"results":[{"get":{"count":1,"items":[{"key":"k","value":"v1","create_revision":1,"mod_revision":1,"version":1}]}}]}`, "Kv-Revision: 1"),
			txn(`{"if":[{"key":"k","mod_revision":1},{"key":"k","value":"v1"}],"then":[{"put":{"key":"k","value":"v2"}},{"put":{"key":"l","value_b64":"/w=="}}]}`, 200,
				`{"succeeded":true,"revision":2,"results":[{"put":{"key":"k","create_revision":1,"mod_revision":2,"version":2}},{"put":{"key":"l","create_revision":2,"mod_revision":2,"version":1}}]}`),
			{call: "GET /v1/kv/l", status: 200, text: "\xff", want: []string{`Etag: "2"`}},
			txn(`{"then":[{"delete":{"prefix":"k"}},{"put":{"key":"k","value":"v3"}},{"get":{"start":"k","end":"m"}}]}`, 200,
				`{"succeeded":true,"revision":3,"results":[{"delete":{"deleted":1}},{"put":{"key":"k","create_revision":3,"mod_revision":3,"version":1}},`+
					`{"get":{"count":2,"items":[{"key":"k","value":"v3","create_revision":3,"mod_revision":3,"version":1},{"key":"l","value_b64":"/w==","create_revision":2,"mod_revision":2,"version":1}]}}]}`),
			txn(`{"then":[{"get":{"all":true,"keys":true,"limit":1}}]}`, 200,
				`{"succeeded":true,"revision":3,"results":[{"get":{"count":2,"items":[{"key":"k","create_revision":3,"mod_revision":3,"version":1}]}}]}`),
			txn(`{"then":[{"delete":{"all":true}},{"get":{"all":true}}]}`, 200, `{"succeeded":true,"revision":4,"results":[{"delete":{"deleted":2}},{"get":{"count":0,"items":[]}}]}`),
			txn(`{}`, 200, `{"succeeded":true,"revision":4,"results":[]}`),
			txn(`{"if":[{"key":"k","exists":true}]}`, 200, `{"succeeded":false,"revision":4,"results":[]}`),
		},
		"every comparison": {
			{call: "PUT /v1/kv/k", body: "b", status: 201}, {call: "PUT /v1/kv/k", body: "b", status: 204}, {call: "PUT /v1/kv/e", body: "", status: 201},
			txn(`{"if":[{"key":"k","mod_revision":2},{"key":"k","op":"=","create_revision":1},{"key":"k","version":2},{"key":"k","value":"b"},{"key":"k","value_b64":"Yg=="},{"key_b64":"aw==","exists":true},
				{"key":"k","op":"!=","mod_revision":1},{"key":"k","op":">","mod_revision":1},{"key":"k","op":"<","mod_revision":3},{"key":"k","op":">","value":"a"},{"key":"k","op":"<","value":"c"},{"key":"k","op":"!=","value":"c"},
				{"key":"k","op":"!=","exists":false},{"key":"none","exists":false},{"key":"none","version":0},{"key":"none","mod_revision":0},{"key":"none","op":"!=","value":"b"},{"key":"e","value":""},{"key":"k","op":"<","version":9223372036854775807}]}`, 200, `~"succeeded":true`),
			txn(`{"if":[{"key":"k","mod_revision":1}]}`, 200, `~"succeeded":false`), txn(`{"if":[{"key":"k","op":"<","mod_revision":2}]}`, 200, `~"succeeded":false`),
			txn(`{"if":[{"key":"k","op":">","version":2}]}`, 200, `~"succeeded":false`), txn(`{"if":[{"key":"none","value":""}]}`, 200, `~"succeeded":false`),
			txn(`{"if":[{"key":"k","op":"!=","exists":true}]}`, 200, `~"succeeded":false`), txn(`{"if":[{"key":"k","create_revision":2}]}`, 200, `~"succeeded":false`),
			txn(`{"if":[{"key":"k","exists":true},{"key":"k","value":"x"}]}`, 200, `~"succeeded":false`),
		},
		"binary keys": {
			txn(`{"then":[{"put":{"key_b64":"/wA=","value":""}}]}`, 200, `{"succeeded":true,"revision":1,"results":[{"put":{"key_b64":"/wA=","create_revision":1,"mod_revision":1,"version":1}}]}`),
			txn(`{"then":[{"get":{"prefix_b64":"/w=="}},{"get":{"start_b64":"/w==","end_b64":"/wE="}},{"get":{"key_b64":"/wA="}},{"get":{"start":"a"}},{"get":{"end_b64":"/wA="}},{"get":{"start":"","end":"z"}}]}`, 200,
				`{"succeeded":true,"revision":1,"results":[`+strings.Repeat(`{"get":{"count":1,"items":[{"key_b64":"/wA=","value":"","create_revision":1,"mod_revision":1,"version":1}]}},`, 4)+`{"get":{"count":0,"items":[]}},{"get":{"count":0,"items":[]}}]}`),
		},
		"leases": {
			txn(`{"then":[{"put":{"key":"k","value":"v","lease":"7"}},{"put":{"key":"l","value":"v"}}]}`, 404, ""),
			{call: "POST /v1/txn", body: `{"then":[{"put":{"key":"l","value":"v"}},{"put":{"key":"k","value":"v","lease":"7"}}]}`, status: 404, code: api.CodeLeaseNotFound},
			{call: "GET /v1/kv/l", status: 404},
			{call: "POST /v1/leases", body: `{"ttl":"30s"}`, status: 201},
			txn(`{"then":[{"put":{"key":"k","value":"v","lease":"1"}},{"put":{"key":"l","value":"v","ttl":"30s"}}]}`, 200, `~"lease":"1"`),
			{call: "GET /v1/leases/1", status: 200, text: `~"keys":["k"],"key_count":1`},
		},
		"idempotency": {
			{call: "PUT /v1/kv/k", body: "v", status: 201},
			{call: "POST /v1/txn", headers: "Idempotency-Key: a", body: `{"then":[{"get":{"key":"k"}},{"put":{"key":"k","value":"w"}}]}`, status: 200, want: []string{"Kv-Idempotency-Window: 10m0s", "Kv-Revision: 2"}},
			{call: "PUT /v1/kv/k", body: "x", status: 204},
			{call: "POST /v1/txn", headers: "Idempotency-Key: a", body: `{"then":[{"get":{"key":"k"}},{"put":{"key":"k","value":"w"}}]}`, status: 200, want: []string{"Kv-Idempotent-Replay: true", "Kv-Revision: 2"},
				text: `{"succeeded":true,"revision":2,"results":[{"get":{"count":1,"items":[{"key":"k","value":"v","create_revision":1,"mod_revision":1,"version":1}]}},{"put":{"key":"k","create_revision":1,"mod_revision":2,"version":2}}]}`},
			{call: "POST /v1/txn", headers: "Idempotency-Key: a", body: `{"then":[{"get":{"key":"k"}},{"put":{"key":"k","value":"W"}}]}`, status: 422, code: api.CodeIdempotencyMismatch},
			{call: "GET /v1/kv/k", status: 200, text: "x"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			h, _ := newTwinAPI(t, testLimits())
			runStory(t, serveTest(t, h), steps)
		})
	}
}

func TestTxnTTL(t *testing.T) {
	h, twin := newTwinAPI(t, testLimits())
	addr := serveTest(t, h)
	before := time.Now().Truncate(time.Millisecond)
	for _, branch := range []string{`"then"`, `"if":[{"key":"k","exists":false}],"else"`} {
		a := exchange(t, addr, "POST", "/v1/txn", "", `{`+branch+`:[{"put":{"key":"k","value":"v","ttl":"30s"}}]}`)
		var res api.TxnResult
		if err := json.Unmarshal([]byte(a.body), &res); err != nil || len(res.Results) != 1 {
			t.Fatalf("%v: %d %s", err, a.status, a.body)
		}
		expires := res.Results[0].Put.Expires
		if expires.Before(before.Add(30*time.Second)) || expires.After(time.Now().Add(30*time.Second)) {
			t.Errorf("%s: expires %v", branch, expires)
		}
	}
	twin.tick(0)
	twin.tick(30 * time.Second)
	runStory(t, addr, []httpStep{{call: "GET /k", status: 404}})
}

func TestRefusedTxns(t *testing.T) {
	l := testLimits()
	l.MaxKeyBytes, l.MaxValueBytes, l.MaxTxnBytes = 8, 16, 100_000
	h, twin := newTwinAPI(t, l)
	addr := serveTest(t, h)
	ops := func(n int, op string) string { return strings.TrimSuffix(strings.Repeat(op+",", n), ",") }
	get, exists := `{"get":{"key":"k"}}`, `{"key":"k","exists":true}`
	for body, named := range map[string]string{
		``: "ends too early", `[]`: "want an object", `null`: "want an object", `{"then":null}`: "then: want an array", `{"then":{}}`: "then: want an array", `{} {}`: "goes on", `{"then":[]}x`: "goes on",
		"{\"then\":[{\"put\":{\"key\":\"\xff\",\"value\":\"\"}}]}": "then[0].put.key: the string is not valid UTF-8",
		`{"than":[]}`: "than: unknown field", `{"then":[],"then":[]}`: "then: the field is given twice", `{"Then":[]}`: "Then: unknown field",
		`{"then":[` + get + `,` + get + `,{"put":{"key":"k","vaule":"v"}}]}`: "then[2].put.vaule: unknown field",
		`{"then":[{"put":{"key":"k","value":"v","value":"w"}}]}`:             "then[0].put.value: the field is given twice",
		`{"else":[{"put":{"key":"k","value":null}}]}`:                        "else[0].put.value: want a string",
		`{"else":[{"put":{"key":"k","value":17}}]}`:                          "else[0].put.value: want a string",
		`{"then":[{"put":{"key":"k"}}]}`:                                     "then[0].put: want exactly one of the fields value, value_b64",
		`{"then":[{"put":{"value":"v"}}]}`:                                   "then[0].put: want exactly one of the fields key, key_b64",
		`{"then":[{"put":{"key":"k","key_b64":"aw==","value":"v"}}]}`:        "then[0].put: want exactly one of the fields key, key_b64",
		`{"then":[{"put":{"key":"k","value":"v","value_b64":"dg=="}}]}`:      "then[0].put: want exactly one of the fields value, value_b64",
		`{"then":[{"put":{"key":"","value":"v"}}]}`:                          "then[0].put.key: the key is empty",
		`{"then":[{"put":{"key":"k","value_b64":"v"}}]}`:                     "then[0].put.value_b64: want base64",
		`{"then":[{"put":{"key":"k","value":"v","ttl":"0s"}}]}`:              "then[0].put.ttl: want a duration",
		`{"then":[{"put":{"key":"k","value":"v","ttl":"87600h"}}]}`:          "then[0].put.ttl: want a duration",
		`{"then":[{"put":{"key":"k","value":"v","lease":7}}]}`:               "then[0].put.lease: want the id",
		`{"then":[{"put":{"key":"k","value":"v","lease":"0"}}]}`:             "then[0].put.lease: want the id",
		`{"then":[{"put":{"key":"k","value":"v","ttl":"30s","lease":"7"}}]}`: "then[0].put: the fields ttl and lease contradict",
		`{"then":[{"put":{"key":"k","value":"v","mod_revision":7}}]}`:        "then[0].put.mod_revision: unknown field",
		`{"then":[{}]}`: "then[0]: want exactly one of the fields put, delete, get",
		`{"then":[{"get":{"key":"k"},"delete":{"key":"k"}}]}`: "then[0]: want exactly one of the fields put, delete, get",
		`{"then":[[]]}`:                                                                          "then[0]: want an object",
		`{"then":[{"get":{}}]}`:                                                                  "then[0].get: it names no keys",
		`{"then":[{"get":{"limit":1}}]}`:                                                         "then[0].get: it names no keys",
		`{"then":[{"delete":{}}]}`:                                                               "then[0].delete: it names no keys",
		`{"then":[{"delete":{"prefix":""}}]}`:                                                    "then[0].delete: it names no keys",
		`{"then":[{"delete":{"start":""}}]}`:                                                     "then[0].delete: it names no keys",
		`{"then":[{"delete":{"all":false}}]}`:                                                    "then[0].delete: it names no keys",
		`{"then":[{"delete":{"end":""}}]}`:                                                       "then[0].delete.end: the key is empty",
		`{"then":[{"delete":{"all":true,"prefix":"a"}}]}`:                                        "then[0].delete: all contradicts",
		`{"then":[{"delete":{"all":true,"key":"a"}}]}`:                                           "then[0].delete: all contradicts",
		`{"then":[{"delete":{"key":"a","prefix":"a"}}]}`:                                         "then[0].delete: want exactly one of key, prefix, or start and end",
		`{"then":[{"delete":{"key":"a","end":"b"}}]}`:                                            "then[0].delete: want exactly one of key, prefix, or start and end",
		`{"then":[{"get":{"prefix":"a","prefix_b64":"YQ=="}}]}`:                                  "then[0].get: want exactly one of key, prefix, or start and end",
		`{"then":[{"get":{"start":"a","start_b64":"YQ=="}}]}`:                                    "then[0].get: want exactly one of key, prefix, or start and end",
		`{"then":[{"get":{"start":"a","end":"b","end_b64":"YQ=="}}]}`:                            "then[0].get: want exactly one of key, prefix, or start and end",
		`{"then":[{"get":{"start":"b","end":"a"}}]}`:                                             "then[0].get: no key can lie between",
		`{"then":[{"get":{"start":"a","end":"a"}}]}`:                                             "then[0].get: no key can lie between",
		`{"then":[{"get":{"key":"k","limit":0}}]}`:                                               "then[0].get.limit: want a whole number",
		`{"then":[{"get":{"key":"k","limit":10001}}]}`:                                           "then[0].get.limit: want a whole number",
		`{"then":[{"get":{"key":"k","keys":"true"}}]}`:                                           "then[0].get.keys: want true or false",
		`{"then":[{"delete":{"key":"k","limit":1}}]}`:                                            "then[0].delete.limit: unknown field",
		`{"if":[{"key":"k"}]}`:                                                                   "if[0]: want exactly one of the fields mod_revision",
		`{"if":[{"key":"k","version":1,"exists":true}]}`:                                         "if[0]: want exactly one of the fields mod_revision",
		`{"if":[{"key":"k","value":"a","value_b64":"YQ=="}]}`:                                    "if[0]: want exactly one of the fields mod_revision",
		`{"if":[{"version":1}]}`:                                                                 "if[0]: want exactly one of the fields key, key_b64",
		`{"if":[` + exists + `,{"key":"k","op":"<","exists":true}]}`:                             `if[1]: exists goes with`,
		`{"if":[{"key":"k","op":"==","version":1}]}`:                                             `if[0].op: want "=", "!=", "<" or ">", not "=="`,
		`{"if":[{"key":"k","op":">=","version":1}]}`:                                             `if[0].op: want`,
		`{"if":[{"key":"k","version":-1}]}`:                                                      "if[0].version: want a whole number",
		`{"if":[{"key":"k","version":1.5}]}`:                                                     "if[0].version: want a whole number",
		`{"if":[{"key":"k","mod_revision":"7"}]}`:                                                "if[0].mod_revision: want a whole number",
		`{"if":[{"key":"k","lease":"7"}]}`:                                                       "if[0].lease: unknown field",
		`{"then":[` + ops(maxTxnOps+1, get) + `]}`:                                               "then[128]: more than 128 operations",
		`{"then":[` + ops(maxTxnOps, get) + `],"else":[` + get + `]}`:                            "else[0]: more than 128 operations",
		`{"if":[` + ops(maxTxnCompares+1, exists) + `]}`:                                         "if[128]: more than 128 comparisons",
		`{"then":[` + get + `,{"put":{"key":"k","value":"a"}},{"put":{"key":"k","value":"b"}}]}`: `then[2]: it puts the key "k", which then[1] puts as well`,
		`{"else":[{"put":{"key":"ab","value":""}},{"delete":{"prefix":"a"}}]}`:                   `else[1]: it deletes the key "ab", which else[0] puts`,
		`{"then":[{"put":{"key":"k","value":""}},{"delete":{"key_b64":"aw=="}}]}`:                `then[1]: it deletes the key "k", which then[0] puts`,
		`{"then":[{"put":{"key":"k","value":""}},{"delete":{"all":true}}]}`:                      `then[1]: it deletes the key "k", which then[0] puts`,
	} {
		a := exchange(t, addr, "POST", "/v1/txn", "Accept: application/json\r\n", body)
		if p := problemOf(t, a); a.status != 400 || p.Code != api.CodeBadRequest || !strings.Contains(p.Detail, named) {
			t.Errorf("%.200s: %d %s; want a 400 with %q", body, a.status, p.Detail, named)
		}
	}
	runStory(t, addr, []httpStep{
		{call: "GET /v1/txn", status: 405, code: api.CodeMethodNotAllowed, want: []string{"Allow: POST"}},
		{call: "POST /v1/txn", body: `{"then":[{"get":{"key":"123456789"}}]}`, status: 414, code: api.CodeKeyTooLong, text: "~then[0].get.key"},
		{call: "POST /v1/txn", body: `{"then":[{"get":{"prefix":"123456789"}}]}`, status: 414, code: api.CodeKeyTooLong, text: "~then[0].get.prefix"},
		{call: "POST /v1/txn", body: `{"then":[{"put":{"key":"k","value":"12345678901234567"}}]}`, status: 413, code: api.CodeTooLarge, text: "~then[0].put.value"},
		{call: "POST /v1/txn", body: `{"if":[{"key":"k","value":"12345678901234567"}]}`, status: 413, code: api.CodeTooLarge, text: "~if[0].value"},
		{call: "POST /v1/txn", body: `{` + strings.Repeat(" ", 100_000) + `}`, status: 413, code: api.CodeTooLarge},
	})
	if calls := twin.takeCalls(); len(calls) != 0 {
		t.Errorf("a refused transaction reached the store: %q", calls)
	}
	// What is at the limits, or spelled unusually, is fine; keys may meet across branches.
	runStory(t, addr, []httpStep{
		{call: "POST /v1/txn", body: `{"if":[` + ops(maxTxnCompares, exists) + `],"then":[` + ops(maxTxnOps-1, get) + `],"else":[` + get + `]}`, status: 200},
		{call: "POST /v1/txn", body: `{"then":[{"put":{"key":"12345678","value":"1234567890123456"}},{"get":{"key":"12345678","limit":10000}}]}`, status: 200},
		{call: "POST /v1/txn", body: `{"then":[{"put":{"key":"k","value":""}}],"else":[{"put":{"key":"k","value":""}}]}`, status: 200},
		{call: "POST /v1/txn", body: `{"then":[{"delete":{"key":"k"}},{"put":{"key":"k","value":""}},{"delete":{"start":"l"}},{"get":{"key":"k"}}]}`, status: 200},
		{call: "POST /v1/txn", body: " {\"\\u0074hen\"\n:\t[ ] } \n", status: 200},
	})
}

// Gets that might return more than a member would hold are refused.
func TestTxnReadsTooMuch(t *testing.T) {
	h, twin := newTwinAPI(t, testLimits())
	addr := serveTest(t, h)
	for i := range 5 {
		twin.do(kv.Command{Op: kv.OpPut, Key: fmt.Sprint("k", i), Value: make([]byte, 1<<20)})
	}
	runStory(t, addr, []httpStep{
		{call: "POST /v1/txn", body: `{"then":[{"put":{"key":"a","value":""}},{"get":{"prefix":"k"}}]}`, status: 413, code: api.CodeTooLarge},
		{call: "GET /v1/kv/a", status: 404},
		{call: "POST /v1/txn", body: `{"then":[{"get":{"prefix":"k","limit":3}}]}`, status: 200, text: `~"count":5`},
		{call: "POST /v1/txn", body: `{"then":[{"get":{"prefix":"k","keys":true}}]}`, status: 200, text: `~"key":"k4"`},
		{call: "POST /v1/txn", headers: "Idempotency-Key: a", body: `{"then":[{"get":{"key":"k1"}}]}`, status: 413, code: api.CodeTooLarge},
	})
}

// The answer is the shared shape, whatever the bytes.
func TestTxnResultIsReadBack(t *testing.T) {
	put := kv.Entry{Key: "k\xff", CreateRevision: 1, ModRevision: 7, Version: 3, Lease: 9, Expires: 1_700_000_000_123, Value: []byte("not shown")}
	res := kv.Result{Revision: 7, Txn: &kv.TxnResult{Ops: []kv.OpResult{
		{Op: kv.OpPut, Entry: put}, {Op: kv.OpDeleteRange, Deleted: 2},
		{Op: kv.OpGet, Count: 5, Items: []kv.Entry{{Key: "a\"\x00", Value: []byte("\xfe"), ModRevision: 4}, {Key: "b", ModRevision: 5}}},
		{Op: kv.OpGet, Count: 1, Items: []kv.Entry{{Key: "b", ModRevision: 5}}},
	}}}
	txn := &kv.Txn{Else: []kv.TxnOp{{Op: kv.OpPut}, {Op: kv.OpDeleteRange}, {Op: kv.OpGet}, {Op: kv.OpGet, KeysOnly: true}}}
	var got api.TxnResult
	p := pieces{c: &apiCall{}}
	p.txnResult(txn, &res)
	text := p.buf
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	want := api.TxnResult{Revision: 7, Results: []api.OpResult{
		{Put: &api.Entry{Key: "k\xff", CreateRevision: 1, ModRevision: 7, Version: 3, Lease: 9, Expires: time.UnixMilli(1_700_000_000_123).UTC()}},
		{Delete: &api.DeleteOp{Deleted: 2}},
		{Get: &api.GetResult{Count: 5, Items: []api.Entry{{Key: "a\"\x00", Value: []byte("\xfe"), ModRevision: 4}, {Key: "b", Value: []byte{}, ModRevision: 5}}}},
		{Get: &api.GetResult{Count: 1, Items: []api.Entry{{Key: "b", ModRevision: 5}}}},
	}}
	if a, b := jsonText(got), jsonText(want); a != b {
		t.Errorf("%s\nwant\n%s", a, b)
	}
}

// What decodeTxn lets pass, the log takes too: a member that finds a command in
// its log that it refuses ends itself, and so would all of them.
func FuzzTxn(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"if":[{"key":"k","op":"<","mod_revision":7},{"key_b64":"aw==","exists":false},{"key":"k","value":"v"}],"then":[{"put":{"key":"k","value":"v","ttl":"30s"}}],"else":[{"get":{"prefix":"k","limit":3,"keys":true}}]}`,
		`{"then":[{"delete":{"start":"a","end":"b"}},{"put":{"key_b64":"/w==","value_b64":"/w==","lease":"1"}},{"get":{"all":true}}]}`,
		`{"then":[{"put":{"key":"k","value":"v"}},{"put":{"key":"k","value":"v"}}]}`, `{"then":[{"put":{"key":"k","value":"v"}},{"delete":{"prefix":"k"}}]}`,
		`{"then":[{"delete":{"prefix_b64":"/w=="}},{"delete":{"prefix_b64":"//8="}}]}`, `{"then":[{"put":{"key":"k","vaule":"v"}}]}`,
	} {
		f.Add([]byte(s))
	}
	l := testLimits()
	f.Fuzz(func(t *testing.T, body []byte) {
		txn, err := decodeTxn(slices.Clone(body), &l)
		if err != nil {
			if !errors.Is(err, errBadRequest) && !errors.Is(err, errKeyTooLong) && !errors.Is(err, errTooLarge) {
				t.Fatalf("%q: %v", body, err)
			}
			return
		}
		if !json.Valid(body) {
			t.Fatalf("%q was read, but is no JSON", body)
		}
		var batch kv.Batch
		command := kv.Command{Op: kv.OpTxn, Txn: txn}
		if err := kv.DecodeBatch(kv.AppendBatch(nil, 0, 0, 0, kv.AppendCommand(nil, &command)), &batch); err != nil {
			t.Fatalf("%q: the log refuses %+v: %v", body, txn, err)
		}
		s := kv.NewState()
		s.Apply(1, &kv.Batch{Commands: []kv.Command{{Op: kv.OpGrant, TTL: time.Minute}, {Op: kv.OpPut, Key: "k", Value: []byte("v")}}}, nil)
		res := s.Apply(2, &batch, nil)[0]
		if err := s.Check(); err != nil {
			t.Fatalf("%q: %v", body, err)
		}
		if res.Refused != kv.NotRefused {
			return
		}
		var shape api.TxnResult
		p := pieces{c: &apiCall{}}
		p.txnResult(txn, &res)
		text := p.buf
		if err := json.Unmarshal(text, &shape); err != nil || shape.Results == nil {
			t.Fatalf("%q: answer %s: %v", body, text, err)
		}
	})
}
