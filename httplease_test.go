package main

import (
	"encoding/json"
	"errors"
	"strconv"
	"testing"
	"time"

	"pontoon/api"
	"pontoon/kv"
)

func TestLeaseStories(t *testing.T) {
	h, twin := newTwinAPI(t, testLimits())
	addr := serveTest(t, h)
	lease := func(id, ttl, remaining, keys, count string) string {
		return `{"id":"` + id + `","ttl":"` + ttl + `","remaining":"` + remaining + `","keys":[` + keys + `],"key_count":` + count + `}`
	}
	runStory(t, addr, []httpStep{
		{call: "POST /v1/leases", body: `{"ttl":"30s"}`, status: 201, text: lease("1", "30s", "30s", "", "0"),
			want: []string{"Location: /v1/leases/1", "Content-Type: application/json", "Kv-Idempotency-Window:"}},
		{call: "POST /v1/leases", headers: "Idempotency-Key: a", body: `{"ttl":"1m30s"}`, status: 201, want: []string{"Location: /v1/leases/2", "Kv-Idempotency-Window: 10m0s"}},
		{call: "POST /v1/leases", headers: "Idempotency-Key: a", body: `{"ttl":"1m30s"}`, status: 201, text: lease("2", "1m30s", "1m30s", "", "0"),
			want: []string{"Location: /v1/leases/2", "Kv-Idempotent-Replay: true"}},
		{call: "POST /v1/leases", headers: "Idempotency-Key: a", body: `{"ttl":"31s"}`, status: 422, code: api.CodeIdempotencyMismatch},
		{call: "PUT /v1/kv/b?lease=1", body: "v", status: 201},
		{call: "PUT /v1/kv/a?lease=1", body: "v", status: 201},
		{call: "PUT /v1/kv/%FF?lease=1", body: "v", status: 201},
		{call: "GET /v1/leases/1", status: 200, want: []string{"Content-Type: application/json"},
			text: `{"id":"1","ttl":"30s","remaining":"30s","keys":["a","b"],"key_count":3,"keys_b64":["/w=="]}`},
		{call: "HEAD /v1/leases/1", status: 200},
		{call: "GET /v1/leases/1?consistency=stale&min_revision=3", status: 200},
		{call: "DELETE /v1/kv/%FF", status: 204},
	})
	twin.tick(0)
	twin.tick(10500 * time.Millisecond)
	runStory(t, addr, []httpStep{
		{call: "GET /v1/leases/1", status: 200, text: lease("1", "30s", "19.5s", `"a","b"`, "2")},
		{call: "PUT /v1/leases/1", status: 200, text: lease("1", "30s", "30s", `"a","b"`, "2")},
		{call: "PUT /v1/leases/1", body: "{}", status: 200, text: lease("1", "30s", "30s", `"a","b"`, "2")},
		{call: "PUT /v1/leases/1", headers: "Idempotency-Key: b", body: `{"ttl":"1h"}`, status: 200, text: lease("1", "1h0m0s", "1h0m0s", `"a","b"`, "2"), want: []string{"Kv-Idempotency-Window: 10m0s"}},
		{call: "PUT /v1/leases/1", headers: "Idempotency-Key: b", body: `{"ttl":"1h"}`, status: 200, text: lease("1", "1h0m0s", "1h0m0s", `"a","b"`, "2"), want: []string{"Kv-Idempotent-Replay: true"}},
	})
	twin.tick(0)
	twin.tick(59 * time.Minute)
	runStory(t, addr, []httpStep{
		{call: "GET /v1/leases/1", status: 200, text: `~"remaining":"1m0s"`},
		{call: "GET /v1/leases/2", status: 404, code: api.CodeLeaseNotFound},
		{call: "DELETE /v1/leases/1", headers: "Idempotency-Key: c", status: 204, want: []string{"Kv-Deleted: 2", "Kv-Revision: 5", "Kv-Idempotency-Window: 10m0s"}},
		{call: "GET /v1/kv/a", status: 404},
		{call: "DELETE /v1/leases/1", headers: "Idempotency-Key: c", status: 204, want: []string{"Kv-Deleted: 2", "Kv-Revision: 5", "Kv-Idempotent-Replay: true"}},
		{call: "DELETE /v1/leases/1", status: 404, code: api.CodeLeaseNotFound},
		{call: "PUT /v1/leases/1", status: 404, code: api.CodeLeaseNotFound},
		{call: "PUT /v1/leases/1", headers: "Idempotency-Key: d", status: 404, code: api.CodeLeaseNotFound, want: []string{"Kv-Idempotency-Window: 10m0s"}},
		{call: "POST /v1/leases", body: `{"ttl":"1s"}`, status: 201, want: []string{"Location: /v1/leases/3"}},
		{call: "DELETE /v1/leases/3", status: 204, want: []string{"Kv-Deleted: 0", "Kv-Revision: 5"}},
	})
}

func TestRefusedLeaseCalls(t *testing.T) {
	h, twin := newTwinAPI(t, testLimits())
	addr := serveTest(t, h)
	steps := []httpStep{
		{call: "GET /v1/leases", status: 405, code: api.CodeMethodNotAllowed, want: []string{"Allow: POST"}},
		{call: "DELETE /v1/leases", status: 405, code: api.CodeMethodNotAllowed, want: []string{"Allow: POST"}},
		{call: "POST /v1/leases/7", status: 405, code: api.CodeMethodNotAllowed, want: []string{"Allow: GET, HEAD, PUT, DELETE"}},
		{call: "PATCH /v1/leases/x", status: 405, code: api.CodeMethodNotAllowed},
		{call: "GET /v1/leases/7", status: 404, code: api.CodeLeaseNotFound},
		{call: "GET /v1/leases/9223372036854775807", status: 404, code: api.CodeLeaseNotFound},
		{call: "GET /v1/leases/7?revision=1", status: 400, code: api.CodeBadRequest, text: "~revision"},
		{call: "PUT /v1/leases/7?ttl=30s", status: 400, code: api.CodeBadRequest, text: "~ttl"},
		{call: "POST /v1/leases?consistency=stale", body: `{"ttl":"30s"}`, status: 400, code: api.CodeBadRequest, text: "~consistency"},
		{call: "POST /v1/leases", body: ``, status: 400, code: api.CodeBadRequest, text: "~too early"},
		{call: "POST /v1/leases", body: `{}`, status: 400, code: api.CodeBadRequest, text: "~lacks the field ttl"},
		{call: "POST /v1/leases", body: `{"ttl":"0s"}`, status: 400, code: api.CodeBadRequest, text: "~ttl"},
		{call: "POST /v1/leases", body: `{"ttl":"87600h"}`, status: 400, code: api.CodeBadRequest, text: "~ttl"},
		{call: "POST /v1/leases", body: `{"ttl":30}`, status: 400, code: api.CodeBadRequest, text: "~ttl"},
		{call: "POST /v1/leases", body: `{"ttl":null}`, status: 400, code: api.CodeBadRequest, text: "~ttl"},
		{call: "POST /v1/leases", body: `{"TTL":"30s"}`, status: 400, code: api.CodeBadRequest, text: "~TTL: unknown field"},
		{call: "POST /v1/leases", body: `{"ttl":"30s","id":"7"}`, status: 400, code: api.CodeBadRequest, text: "~id: unknown field"},
		{call: "POST /v1/leases", body: `{"ttl":"30s"} {}`, status: 400, code: api.CodeBadRequest, text: "~goes on"},
		{call: "POST /v1/leases", body: string(make([]byte, maxJSONBytes+1)), status: 413, code: api.CodeTooLarge},
		{call: "PUT /v1/leases/1", body: "[]", status: 400, code: api.CodeBadRequest},
		{call: "PUT /v1/leases/1", body: `{"ttl":"1ms"}`, status: 400, code: api.CodeBadRequest, text: "~ttl"},
	}
	for _, id := range []string{"", "0", "07", "-1", "+1", "1.0", "x", "1/keys", "%31", "9223372036854775808", "18446744073709551616"} {
		for _, method := range []string{"GET", "HEAD", "PUT", "DELETE"} {
			steps = append(steps, httpStep{call: method + " /v1/leases/" + id, status: 400, code: api.CodeBadRequest})
		}
	}
	runStory(t, addr, steps)
	for _, call := range twin.takeCalls() {
		if call != "lease 7" && call != "lease 9223372036854775807" {
			t.Errorf("a refused call reached the store: %s", call)
		}
	}
}

// The answer names the first keys only, however many there are.
func TestLeaseWithManyKeys(t *testing.T) {
	h, twin := newTwinAPI(t, testLimits())
	twin.do(kv.Command{Op: kv.OpGrant, TTL: time.Minute})
	for i := range maxLeaseKeys + 5 {
		twin.do(kv.Command{Op: kv.OpPut, Key: strconv.Itoa(10_000 + i), Lease: 1})
	}
	addr := serveTest(t, h)
	for _, method := range []string{"GET", "PUT"} {
		a := exchange(t, addr, method, "/v1/leases/1", "", "")
		var l api.Lease
		if err := json.Unmarshal([]byte(a.body), &l); err != nil {
			t.Fatal(err)
		}
		if len(l.Keys) != maxLeaseKeys || l.Keys[0] != "10000" || l.KeyCount != maxLeaseKeys+5 {
			t.Errorf("%s: %d keys from %q, count %d", method, len(l.Keys), l.Keys[0], l.KeyCount)
		}
	}
}

func FuzzLeaseBody(f *testing.F) {
	for _, s := range []string{`{"ttl":"30s"}`, `{}`, ``, `{"ttl":"1m30s"} `, `{"ttl":30}`, `{"ttl":"30s","ttl":"30s"}`, `{"ttl":"1e9s"}`, `{"ttl":"8784h"}`, `{"ttl":"\u0031s"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		ttl, err := decodeLease(body)
		if err != nil {
			if !errors.Is(err, errBadRequest) || ttl != 0 {
				t.Fatalf("%q: %v, %v", body, ttl, err)
			}
			return
		}
		var shape struct {
			TTL string `json:"ttl"`
		}
		if err := json.Unmarshal(body, &shape); err != nil {
			t.Fatalf("%q was read, but is no JSON: %v", body, err)
		}
		if want, err := time.ParseDuration(shape.TTL); shape.TTL != "" && (err != nil || ttl != want) || ttl != 0 && (ttl < minTTL || ttl > maxTTL || ttl%time.Millisecond != 0) {
			t.Fatalf("%q: %v, want %v", body, ttl, want)
		}
	})
}
