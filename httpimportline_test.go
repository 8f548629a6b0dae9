package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"pontoon/api"
	"pontoon/kv"
)

func TestLineReader(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(1, 30).Draw(t, "limit")
		text := rapid.StringOfN(rapid.RuneFrom([]rune{'a', 'b', '\n'}), 0, 200, -1).Draw(t, "text")
		l := lineReader{src: &dripReader{t: t, text: text}, limit: limit}
		want := strings.SplitAfter(text, "\n")
		for _, line := range want {
			if line == "" {
				continue // behind the last line end
			}
			line = strings.TrimSuffix(line, "\n")
			got, err := l.next()
			if len(line) > limit {
				if !errors.Is(err, errLineTooLong) {
					t.Fatalf("%q: %v", line, err)
				}
				return
			}
			if err != nil || string(got) != line {
				t.Fatalf("%q, %v; want %q", got, err, line)
			}
			if cap(l.buf) > limit+lineBuffer {
				t.Fatalf("a buffer of %d bytes", cap(l.buf))
			}
		}
		for range 2 {
			if _, err := l.next(); err != io.EOF {
				t.Fatalf("at the end: %v", err)
			}
		}
	})
}

// dripReader gives a text in pieces, the last sometimes together with the end.
type dripReader struct {
	t    *rapid.T
	text string
}

func (r *dripReader) Read(p []byte) (int, error) {
	n := copy(p[:min(len(p), rapid.IntRange(0, 9).Draw(r.t, "piece"))], r.text)
	r.text = r.text[n:]
	if r.text == "" && rapid.Bool().Draw(r.t, "end") {
		return n, io.EOF
	}
	return n, nil
}

// A line grows the buffer with what has come, and no more than to its limit.
func TestLineReaderBuffer(t *testing.T) {
	l := lineReader{src: strings.NewReader(strings.Repeat("x", 10<<20)), limit: 1 << 20}
	if _, err := l.next(); !errors.Is(err, errLineTooLong) {
		t.Error(err)
	}
	if _, err := l.next(); !errors.Is(err, errLineTooLong) || cap(l.buf) > 1<<20+2*lineBuffer {
		t.Errorf("%v, %d bytes", err, cap(l.buf))
	}
}

func FuzzImportLine(f *testing.F) {
	for _, s := range []string{
		`{"key":"k","value":"v"}`, `{"key_b64":"/w==","value_b64":"AP8=","ttl":"30s"}`, `{"key":"k","delete":true}`, `{"end":true,"items":2,"revision":3}`,
		`{"key":"k","value":"\ud83d\ude00\n","create_revision":1,"mod_revision":2,"version":3,"lease":"4","expires":"2030-01-02T03:04:05Z"}`, `{`, ``, ` {} x`,
	} {
		f.Add([]byte(s))
	}
	l := testLimits()
	l.MaxKeyBytes, l.MaxValueBytes = 30, 60
	f.Fuzz(func(t *testing.T, line []byte) {
		e, err := parseImportLine(&jsonReader{data: line, line: 1}, &l)
		if err != nil {
			if !errors.Is(err, errBadRequest) && !errors.Is(err, errKeyTooLong) && !errors.Is(err, errTooLarge) || !strings.HasPrefix(err.Error(), "line 1") {
				t.Fatalf("%q: %v", line, err)
			}
			return
		}
		// The standard library's decoder, which takes much more, reads the same.
		var loose struct {
			api.Trailer
			Delete bool
		}
		var entry api.Entry
		if json.Unmarshal(line, &loose) != nil || json.Unmarshal(line, &entry) != nil {
			t.Fatalf("%q is taken, and is no JSON", line)
		}
		if e.end != loose.End || e.items != loose.Items || e.delete != loose.Delete || e.key != entry.Key || string(e.value) != string(entry.Value) ||
			e.lease != entry.Lease || !e.expires.Equal(entry.Expires) {
			t.Fatalf("%q: %+v, and by encoding/json %+v, %+v", line, e, loose, entry)
		}
		if !e.end && (e.key == "" || len(e.key) > l.MaxKeyBytes || int64(len(e.value)) > l.MaxValueBytes || !e.delete && e.value == nil) {
			t.Fatalf("%q: %+v", line, e)
		}
	})
}

// FuzzImport compares what the answer says with what the store holds.
func FuzzImport(f *testing.F) {
	f.Add([]byte(`{"key":"a","value":"1"}`+"\n"+`{"key":"a","delete":true}`+"\n"+`{"end":true,"items":2,"revision":3}`), byte(0))
	f.Add([]byte(`{"key":"a","value":"1","lease":"1"}`+"\n"+`{"key":"b","value":"1","lease":"9"}`), byte(1))
	f.Add([]byte(`{"key":"a","value":"1"}`+"\n"+`{"key":"a","value":"2"}`+"\nx"), byte(2))
	f.Add([]byte(`{"key":"a","value":"1","expires":"2016-01-02T03:04:05Z"}`), byte(5))
	f.Fuzz(func(t *testing.T, body []byte, how byte) {
		h, b := newTwinAPI(t, testLimits())
		b.do(kv.Command{Op: kv.OpGrant, TTL: time.Minute, Wall: 1})
		headers := []string{"Accept: application/json"}
		if how&4 != 0 {
			headers = append(headers, "Idempotency-Key: one")
		}
		query := "?atomic=" + strconv.FormatBool(how&1 != 0) + "&mode=" + map[bool]string{false: "upsert", true: "create"}[how&2 != 0]
		a := ask(t, h, "POST", "/v1/kv"+query, string(body), headers...)
		var did api.Imported
		if a.status == 200 {
			if err := json.Unmarshal([]byte(a.body), &did); err != nil {
				t.Fatal(err)
			}
		} else {
			p := problemOf(t, a)
			if a.status >= 500 || p.Outcome == api.OutcomeUnknown || how&5 == 0 && (p.Line == 0 || p.Applied == nil) {
				t.Fatalf("%q%s: %d %s", body, query, a.status, a.body)
			}
			if p.Applied != nil {
				did = *p.Applied
			}
			if changed := did.Put+did.Deleted > 0; changed != (p.Outcome == api.OutcomeApplied) {
				t.Fatalf("%q%s: %s", body, query, a.body)
			}
		}
		want := did.Put + did.Deleted
		if how&1 != 0 {
			want = min(want, 1)
		}
		if b.revision() != want {
			t.Fatalf("%q%s: revision %d after %d %s", body, query, b.revision(), a.status, a.body)
		}
	})
}

// An import ends that comes too slowly, however steadily, or for longer than the client
// has allowed; what raft takes is not held against the client.
func TestImportPace(t *testing.T) {
	line := `{"key":"k","value":"` + strings.Repeat("v", 1_000) + "\"}\n"
	for _, row := range []struct {
		query  string
		piece  string
		every  time.Duration
		status int
		took   time.Duration
		detail string
	}{
		{"", "\n", 9 * time.Second, 400, importProgress, "4 bytes came within 30s, the least is 65536"},
		{"", strings.Repeat(line, 30), 15 * time.Second, 400, bodyProgress, "nothing came for 10s"},
		{"", strings.Repeat(line, 10), 9 * time.Second, 400, importProgress, "bytes came within 30s, the least is 65536"},
		{"", strings.Repeat(line, 30), 9 * time.Second, 200, 40 * 9 * time.Second, ""},
		{"?timeout=1m", strings.Repeat(line, 30), 9 * time.Second, 400, time.Minute, "its timeout is over"},
		{"?timeout=3s", line, time.Second, 400, 3 * time.Second, "its timeout is over"},
	} {
		synctest.Test(t, func(t *testing.T) {
			h, _ := newTwinAPI(t, testLimits())
			c := pipeServer(t, h)
			start := time.Now()
			c.SetDeadline(start.Add(time.Hour))
			ended := make(chan answer, 1)
			go func() { ended <- c.answer("POST") }()
			_, _ = fmt.Fprintf(c, "POST /v1/kv%s HTTP/1.1\r\nHost: pontoon\r\nAccept: application/json\r\nContent-Length: %d\r\n\r\n", row.query, 40*len(row.piece))
			var a answer
			for i := 0; a.status == 0; i++ {
				if i < 40 {
					go io.WriteString(c, row.piece) // nobody reads it once the import has ended
				}
				select {
				case a = <-ended:
				case <-time.After(row.every):
				}
			}
			// What comes late is drained for a moment before the answer goes out.
			if took := time.Since(start); a.status != row.status || took < row.took-row.every || took > row.took+drainTime || !strings.Contains(a.body, row.detail) {
				t.Errorf("%q of %d bytes: %d after %v, want %d after %v: %s", row.query, len(row.piece), a.status, took, row.status, row.took, a.body)
			}
			if n := h.imports(); n != 0 {
				t.Errorf("%d imports are under way", n)
			}
			c.Close()
			<-time.After(time.Second) // net/http lingers
		})
	}
}

// imports is how many are under way.
func (h *testAPI) imports() int64 { return h.Handler.(*httpAPI).imports.Load() }

// A long line takes room as a body does, as it arrives, and gives it back once it is
// done; an import that finds none says where to go on.
func TestImportLinesTakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := testLimits()
		l.MaxBodyBytes = 3 << 20
		h, _ := newTwinAPI(t, l)
		taken := func() int64 { return h.Handler.(*httpAPI).bodies.bytes.Load() }
		begin := func() *rawConn {
			c := pipeServer(t, h)
			c.SetDeadline(time.Now().Add(time.Hour))
			c.send("POST /v1/kv HTTP/1.1\r\nHost: pontoon\r\nAccept: application/json\r\nContent-Length: 9000000\r\n\r\n" + `{"key":"a","value":""}` + "\n")
			return c
		}
		long := `{"key":"k","value":"` + strings.Repeat("v", 1_000_000)
		first := begin()
		first.send(long)
		synctest.Wait()
		if n := taken(); n < 1_000_000 || n > 2<<20 {
			t.Errorf("%d bytes of room for a line of %d", n, len(long))
		}
		second := begin()
		go io.WriteString(second, strings.Repeat(long, 3)) // it is cut
		a := second.answer("POST")
		if p := problemOf(t, a); a.status != 429 || p.Code != api.CodeOverloaded || p.Line != 2 || p.Outcome != api.OutcomeApplied || p.Applied.Put != 1 || a.header.Get("Retry-After") == "" {
			t.Errorf("without room: %d %s", a.status, a.body)
		}
		first.send("\"}\n")
		first.send("\n")
		synctest.Wait()
		if n := taken(); n != 0 {
			t.Errorf("%d bytes of room behind the long line", n)
		}
		first.Close()
		synctest.Wait()
		if n := taken() + h.imports(); n != 0 {
			t.Errorf("%d bytes and imports are left", n)
		}
		second.Close()
		<-time.After(time.Second) // net/http lingers
	})
}
