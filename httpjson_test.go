package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"pontoon/kv"
)

// anyJSON reads a value of whatever kind stands there, which only tests want:
// objects may have the fields a and b.
func (r *jsonReader) anyJSON(depth int) (v any, err error) {
	if depth > 100 {
		return nil, r.bad("too deep for this test")
	}
	switch c := r.peek(); {
	case c == '{':
		object := map[string]any{}
		_, err = r.object(jsonFields{"a", "b"}, func(name string) (err error) {
			object[name], err = r.anyJSON(depth + 1)
			return err
		})
		return object, err
	case c == '[':
		array := []any{}
		err = r.array(func(int) error {
			element, err := r.anyJSON(depth + 1)
			array = append(array, element)
			return err
		})
		return array, err
	case c == '"':
		s, err := r.text()
		return string(s), err
	case c == 't' || c == 'f':
		return r.boolean()
	}
	n, err := r.integer(math.MinInt64, math.MaxInt64)
	return json.Number(jsonText(n)), err
}

func jsonText(v any) string {
	b, _ := json.Marshal(v)
	return string(b)
}

// What jsonReader takes, encoding/json takes too and reads alike; what it
// refuses of valid JSON is one of the things that its comment names.
func FuzzJSONReader(f *testing.F) {
	for _, s := range []string{
		`{}`, `[]`, `""`, `0`, `-1`, `true`, `{"a":1,"b":[true,false,"x"]}`, ` { "a" : [ ] } `, `"\u00e9\ud83d\ude00\n\"\\\/"`, `"\ud83d"`, `"\ud83dx"`, `"\ude00\ud83d"`, `"\u12"`, `"\x"`,
		`{"a":1,"a":2}`, `{"c":1}`, `{"\u0061":1}`, `{"a":null}`, `null`, `1.5`, `1e3`, `01`, `-0`, `-`, `9223372036854775808`, `-9223372036854775808`,
		`[1,]`, `{"a":1,}`, `[1 2]`, `{"a" 1}`, `{a:1}`, `"`, `"a`, `[`, `{`, `{"a"`, `{"a":`, `tru`, `truex`, "\"\xff\"", "\"\x00\"", "\x00", "[]\x00", "\"\\u0041\xff\"", `[]]`, "\ufeff[]", `"` + strings.Repeat("é", 40) + `"`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := jsonReader{data: data}
		got, err := r.anyJSON(0)
		if err == nil {
			err = r.end()
		}
		dec := json.NewDecoder(bytes.NewReader(data))
		dec.UseNumber()
		var want any
		valid := json.Valid(data) && utf8.Valid(data) && dec.Decode(&want) == nil
		switch {
		case err == nil && !valid:
			t.Fatalf("%q is no JSON, but was read as %#v", data, got)
		case err == nil && !reflect.DeepEqual(got, want):
			t.Fatalf("%q: %#v, want %#v", data, got, want)
		case err != nil && !errors.Is(err, errBadRequest):
			t.Fatalf("%q: %v is no refusal", data, err)
		case err != nil && (!utf8.ValidString(err.Error()) || len(err.Error()) > 2000):
			t.Fatalf("%q: the error cannot be shown: %q", data, err)
		case err != nil && valid && !mayRefuse(err.Error()):
			t.Fatalf("%q is valid, but refused: %v", data, err)
		}
	})
}

func mayRefuse(text string) bool {
	for _, reason := range []string{"unknown field", "twice", "whole number", "stands for no character", "too deep"} {
		if strings.Contains(text, reason) {
			return true
		}
	}
	return false
}

func TestJSONErrorsNameTheirPlace(t *testing.T) {
	read := func(r *jsonReader) error {
		_, err := r.object(jsonFields{"list", "n", "s", "b", "raw", "ttl", "lease"}, func(name string) (err error) {
			switch name {
			case "list":
				err = r.array(func(int) error {
					_, err := r.object(jsonFields{"key"}, func(string) error { _, err := r.key(false, 8); return err })
					return err
				})
			case "n":
				_, err = r.integer(1, 10)
			case "s":
				_, err = r.value(false, 8)
			case "b":
				_, err = r.boolean()
			case "raw":
				_, err = r.base64()
			case "ttl":
				_, err = r.ttl()
			case "lease":
				_, err = r.lease()
			}
			return err
		})
		if err != nil {
			return err
		}
		return r.end()
	}
	for body, want := range map[string]string{
		``: "the body: the JSON ends too early", ` `: "the body: the JSON ends too early", `[]`: `the body: want an object, not "["`, `null`: `the body: want an object, not "null"`,
		`{"list":[{"key":"a"},{"kee":1}]}`:      "list[1].kee: unknown field; known are key",
		`{"list":[{"key":"a"},{"a b\n":1}]}`:    `list[1]: unknown field "a b\n"; known are key`,
		`{"Key":1}`:                             "Key: unknown field",
		`{"":1}`:                                `the body: unknown field ""`,
		`{"list":[{"key":"a","key":"a"}]}`:      "list[0].key: the field is given twice",
		`{"n":1,"\u006e":2}`:                    "n: the field is given twice",
		`{"list":[{"key":null}]}`:               `list[0].key: want a string, not "null"`,
		`{"list":[{"key":""}]}`:                 "list[0].key: the key is empty",
		`{"list":[{"key":"123456789"}]}`:        "list[0].key: the key has 9 bytes; the limit is 8",
		`{"list":[{"key":"a"}`:                  "list: the JSON ends too early",
		`{"list":[{"key":"a"},]}`:               `list[1]: want an object, not "]"`,
		`{"list":{}}`:                           `list: want an array, not "{"`,
		`{"s":17}`:                              `s: want a string, not "17"`,
		`{"s":"123456789"}`:                     "s: the value has 9 bytes; the limit is 8",
		"{\"s\":\"\xff\"}":                      "s: the string is not valid UTF-8",
		"{\"s\":\"\\n\xff\"}":                   "s: the string is not valid UTF-8",
		"{\"s\":\"a\nb\"}":                      "s: the string has a control character",
		"{\"s\":\"\\ta\nb\"}":                   "s: the string has a control character",
		`{"s":"\ud800"}`:                        `s: the string has a \u escape that stands for no character`,
		`{"s":"\ud800\n"}`:                      `s: the string has a \u escape that stands for no character`,
		`{"s":"\udc00\ud800"}`:                  `s: the string has a \u escape that stands for no character`,
		`{"s":"\a"}`:                            `s: the string has an unknown escape "\\a"`,
		`{"s":"a`:                               "s: the JSON ends too early",
		`{"n":0}`:                               `n: want a whole number from 1, not "0"`,
		`{"n":11}`:                              `n: want a whole number from 1 to 10, not "11"`,
		`{"n":1.0}`:                             `n: want a whole number from 1, not "1.0"`,
		`{"n":"1"}`:                             "n: want a whole number",
		`{"n":01}`:                              "n: want a whole number",
		`{"n":99999999999999999999999999999}`:   "n: want a whole number",
		`{"b":"true"}`:                          "b: want true or false",
		`{"b":1}`:                               "b: want true or false",
		`{"raw":"a"}`:                           "raw: want base64",
		`{"raw":"YQ"}`:                          "raw: want base64",
		`{"raw":"YR=="}`:                        "raw: want base64",
		`{"raw":"Y\nQ=="}`:                      "raw: want base64",
		`{"raw":"_w=="}`:                        "raw: want base64",
		`{"ttl":"999ms"}`:                       "ttl: want a duration",
		`{"ttl":"8784h1ms"}`:                    "ttl: want a duration",
		`{"ttl":"1.005s"}`:                      "",
		`{"ttl":"1.00005s"}`:                    "ttl: want a duration",
		`{"ttl":30}`:                            `ttl: want a string, not "30"`,
		`{"lease":7}`:                           "lease: want the id of a lease as a string",
		`{"lease":"07"}`:                        "lease: want the id of a lease as a string",
		`{"lease":"9223372036854775808"}`:       "lease: want the id of a lease as a string",
		`{"n":1} x`:                             `the body: it goes on after the JSON value: "x"`,
		`{"n":1}{}`:                             "the body: it goes on after",
		"{}\x00":                                "the body: it goes on after",
		`{"n":1,"s":"a","b":true,"raw":"/w=="}`: "",
		"{\"n\"\t:\r\n1}\n":                     "",
		`{"n" 1}`:                               `n: want a colon`,
		`{"n":1 "s":"a"}`:                       `the body: want a comma or }`,
		`{n:1}`:                                 `the body: want a field name in double quotes`,
		`{` + strings.Repeat("x", 100):          `the body: want a field name in double quotes, not "xxxxxxxxxxxxxxxxxxxxxxxx"`,
	} {
		err := read(&jsonReader{data: []byte(body)})
		switch {
		case want == "" && err != nil:
			t.Errorf("%s: %v", body, err)
		case want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)):
			t.Errorf("%s: %v, want %s", body, err, want)
		}
	}
	// The limits are those of a path: the codes are, too.
	if err := read(&jsonReader{data: []byte(`{"list":[{"key":"123456789"}]}`)}); !errors.Is(err, errKeyTooLong) {
		t.Error(err)
	}
	if err := read(&jsonReader{data: []byte(`{"s":"123456789"}`)}); !errors.Is(err, errTooLarge) {
		t.Error(err)
	}
}

func TestJSONTextsAndBytes(t *testing.T) {
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	r := jsonReader{data: []byte(`"` + base64.StdEncoding.EncodeToString(every) + `"`)}
	if got, err := r.base64(); err != nil || !bytes.Equal(got, every) {
		t.Errorf("%q, %v", got, err)
	}
	for _, text := range []string{"", "plain", "é\u2028😀", "\x00\x1f\x7f\"\\/\b\f\n\r\t", strings.Repeat("x\n", 1000)} {
		for _, encoded := range []string{jsonText(text), string(appendASCII(text))} {
			r := jsonReader{data: []byte(encoded)}
			if got, err := r.value(false, 1<<20); err != nil || string(got) != text || got == nil || r.end() != nil {
				t.Errorf("%s: %q, %v", encoded, got, err)
			}
		}
	}
	r = jsonReader{data: []byte(`"366h"`)}
	if d, err := r.ttl(); err != nil || d != 366*time.Hour {
		t.Errorf("%v, %v", d, err)
	}
	r = jsonReader{data: []byte(`"9223372036854775807"`)}
	if id, err := r.lease(); err != nil || id != math.MaxInt64 {
		t.Errorf("%v, %v", id, err)
	}
}

// appendASCII is a JSON string with every character escaped.
func appendASCII(s string) []byte {
	b := []byte{'"'}
	for _, c := range s {
		if c > 0xffff {
			c -= 0x10000
			b = append(b, jsonEscape(0xd800+c>>10)...)
			c = 0xdc00 + c&0x3ff
		}
		b = append(b, jsonEscape(c)...)
	}
	return append(b, '"')
}

func jsonEscape(c rune) string {
	const digits = "0123456789aBcDeF"
	return `\u` + string([]byte{digits[c>>12&15], digits[c>>8&15], digits[c>>4&15], digits[c&15]})
}

// pieceWriter takes an answer, and notes its largest piece.
type pieceWriter struct {
	h       http.Header
	largest int
	body    bytes.Buffer
	cancel  func() // ends a watch once the answer is there; nil: none
}

func (w *pieceWriter) Header() http.Header { return w.h }
func (w *pieceWriter) WriteHeader(int)     {}
func (w *pieceWriter) Write(p []byte) (int, error) {
	w.largest = max(w.largest, len(p))
	return w.body.Write(p)
}
func (w *pieceWriter) FlushError() error {
	if w.cancel != nil && w.body.Len() > 0 {
		w.cancel()
	}
	return nil
}

// However large a value and its text are, what waits for a client that reads slowly
// is one piece; and the pieces make up the text that encoding all of it makes.
func TestLargeAnswersAreWrittenInPieces(t *testing.T) {
	for _, unit := range []string{"\x00", "x", "\xff", "\"", "ü", "日本", "a\nb"} {
		h, b := newTwinAPI(t, testLimits())
		e := kv.Entry{Key: "k", Value: []byte(strings.Repeat(unit, (1<<18)/len(unit))), CreateRevision: 1, ModRevision: 1, Version: 1}
		b.do(put("k", string(e.Value)))
		entry := apiEntry(&e)
		for _, row := range []struct{ method, target, accept, body string }{
			{"GET", "/v1/kv/k", "application/json", ""},
			{"GET", "/v1/kv", "", ""},
			{"GET", "/v1/kv", "application/x-ndjson", ""},
			{"GET", "/v1/kv/k?history=1", "", ""},
			{"POST", "/v1/txn", "", `{"then":[{"get":{"key":"k"}}]}`},
			{"GET", "/v1/watch?initial=true", "", ""},
			{"GET", "/v1/watch?from=1", "", ""},
		} {
			ctx, cancel := context.WithCancel(t.Context())
			r := httptest.NewRequestWithContext(ctx, row.method, row.target, strings.NewReader(row.body))
			r.Header.Set("Accept", row.accept)
			w := &pieceWriter{h: http.Header{}}
			if strings.Contains(row.target, "watch") {
				w.cancel = cancel
			}
			h.ServeHTTP(w, r)
			cancel()
			if text := entry.AppendJSON(nil); !bytes.Contains(w.body.Bytes(), text) {
				t.Errorf("%s of %q is %d bytes, and not what encodes the entry: %.60q", row.target, unit, w.body.Len(), w.body.Bytes())
			}
			if w.largest > maxPooledBuffer {
				t.Errorf("%s of %q: a piece of %d bytes", row.target, unit, w.largest)
			}
		}
	}
}
