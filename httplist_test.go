package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"

	"pontoon/api"
	"pontoon/kv"
)

// failer is what testing.TB and rapid.T have in common.
type failer interface {
	Helper()
	Fatalf(format string, args ...any)
}

// ask sends one request without a network; headers are "Name: value".
func ask(t failer, h http.Handler, method, target, body string, headers ...string) answer {
	t.Helper()
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ": ")
		r.Header.Add(name, value)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return answer{status: w.Code, header: w.Header(), body: w.Body.String()}
}

// askJSON is ask that allows JSON errors; the answer must have the status.
func askJSON(t failer, h http.Handler, method, target, body string, status int, into any, headers ...string) answer {
	t.Helper()
	a := ask(t, h, method, target, body, append(headers, "Accept: application/json")...)
	if a.status != status {
		t.Fatalf("%s %s: %d %s; want %d", method, target, a.status, a.body, status)
	}
	if into != nil {
		dec := json.NewDecoder(strings.NewReader(a.body))
		if err := dec.Decode(into); err != nil {
			t.Fatalf("%s %s: %v in %s", method, target, err, a.body)
		}
	}
	return a
}

// fill puts keys, each at a revision of its own. Their values are "v:" + key.
func fill(b *twinBackend, keys ...string) {
	for _, k := range keys {
		b.do(kv.Command{Op: kv.OpPut, Key: k, Value: []byte("v:" + k)})
	}
}

// pageText shows a page in one line.
func pageText(l *api.List) string {
	var b strings.Builder
	fmt.Fprintf(&b, "r%d n%d", l.Revision, l.Count)
	for i := range l.Items {
		fmt.Fprintf(&b, " %q", l.Items[i].Key)
		if l.Items[i].Value != nil {
			fmt.Fprintf(&b, "=%q", l.Items[i].Value)
		}
	}
	for _, p := range l.Prefixes {
		fmt.Fprintf(&b, " %q*", p)
	}
	for _, p := range l.PrefixesB64 {
		fmt.Fprintf(&b, " b64:%q*", p)
	}
	if l.Next != "" {
		b.WriteString(" more")
	}
	return b.String()
}

func TestList(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	fill(b, "a/1", "a/b/1", "a/b/2", "a/c/1", "b", "c", "\xff/1", "\xff/2")
	b.do(kv.Command{Op: kv.OpDelete, Key: "c"}) // revision 9
	for _, row := range []struct{ query, want string }{
		{"keys", `r9 n7 "a/1" "a/b/1" "a/b/2" "a/c/1" "b" "\xff/1" "\xff/2"`},
		{"", `r9 n7 "a/1"="v:a/1" "a/b/1"="v:a/b/1" "a/b/2"="v:a/b/2" "a/c/1"="v:a/c/1" "b"="v:b" "\xff/1"="v:\xff/1" "\xff/2"="v:\xff/2"`},
		{"prefix=&keys=true", `r9 n7 "a/1" "a/b/1" "a/b/2" "a/c/1" "b" "\xff/1" "\xff/2"`},
		{"prefix=b", `r9 n1 "b"="v:b"`},
		{"prefix=a/b/", `r9 n2 "a/b/1"="v:a/b/1" "a/b/2"="v:a/b/2"`},
		{"prefix=x", `r9 n0`},
		{"prefix=%FF&keys", `r9 n2 "\xff/1" "\xff/2"`},
		{"start=a/b/2&keys", `r9 n5 "a/b/2" "a/c/1" "b" "\xff/1" "\xff/2"`},
		{"start=a/b/2&end=b&keys", `r9 n2 "a/b/2" "a/c/1"`},
		{"end=a/b/2&keys", `r9 n2 "a/1" "a/b/1"`},
		{"prefix=a/&keys&reverse", `r9 n4 "a/c/1" "a/b/2" "a/b/1" "a/1"`},
		{"prefix=a/&keys&reverse=false&limit=4", `r9 n4 "a/1" "a/b/1" "a/b/2" "a/c/1"`},
		{"prefix=a/&keys&limit=3", `r9 n4 "a/1" "a/b/1" "a/b/2" more`},
		{"prefix=a/&keys&delimiter=/", `r9 n4 "a/1" "a/b/"* "a/c/"*`},
		{"prefix=a/&keys&delimiter=/&limit=2", `r9 n4 "a/1" "a/b/"* more`},
		{"prefix=a/&keys&delimiter=/&reverse&limit=2", `r9 n4 "a/c/"* "a/b/"* more`},
		{"delimiter=/&keys", `r9 n7 "b" "a/"* b64:"\xff/"*`},
		{"start=a&end=b&delimiter=/&keys", `r9 n4 "a/"*`},
		{"count", `r9 n7`},
		{"count=true&prefix=a/", `r9 n4`},
		{"count=true&revision=2", `r2 n2`},
		{"count=false&keys=false&prefix=b", `r9 n1 "b"="v:b"`},
		{"revision=6&prefix=c", `r6 n1 "c"="v:c"`},
		{"revision=5&keys", `r5 n5 "a/1" "a/b/1" "a/b/2" "a/c/1" "b"`},
		{"min_revision=9&prefix=b&consistency=stale&timeout=1s", `r9 n1 "b"="v:b"`},
	} {
		var l api.List
		a := askJSON(t, h, "GET", "/v1/kv?"+row.query, "", 200, &l)
		if got := pageText(&l); got != row.want {
			t.Errorf("%s:\ngot  %s\nwant %s", row.query, got, row.want)
		}
		if l.Items == nil || l.Prefixes == nil {
			t.Errorf("%s: a list is null in %s", row.query, a.body)
		}
		if got := a.header.Get("Kv-Revision"); got != strconv.FormatInt(l.Revision, 10) {
			t.Errorf("%s: Kv-Revision %q", row.query, got)
		}
		if got, want := a.header.Get("Content-Length"), strconv.Itoa(len(a.body)); got != want {
			t.Errorf("%s: Content-Length %q, want %s", row.query, got, want)
		}
		if (a.header.Get("Link") != "") != (l.Next != "") {
			t.Errorf("%s: next %q, Link %q", row.query, l.Next, a.header.Get("Link"))
		}
		if a.header.Get("Content-Type") != "application/json" || a.header.Get("X-Content-Type-Options") != "nosniff" || a.header.Get("Vary") != "Accept" {
			t.Errorf("%s: headers %v", row.query, a.header)
		}
		head := ask(t, h, "HEAD", "/v1/kv?"+row.query, "", "Accept: application/json")
		if head.status != 200 || head.body != "" || !maps.EqualFunc(head.header, a.header, slices.Equal) {
			t.Errorf("%s: HEAD %d %v %q; GET %v", row.query, head.status, head.header, head.body, a.header)
		}
	}
}

func TestListOfEmptyStore(t *testing.T) {
	h, _ := newTwinAPI(t, testLimits())
	if a := ask(t, h, "GET", "/v1/kv", ""); a.body != `{"revision":0,"count":0,"items":[],"prefixes":[]}`+"\n" {
		t.Error(a.body)
	}
}

func TestListRefusals(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	fill(b, "a", "b", "c", "d")
	var page api.List
	askJSON(t, h, "GET", "/v1/kv?limit=1&prefix=", "", 200, &page)
	next := page.Next
	future := (&cursor{revision: 99, query: walkHash(&kv.Query{}), last: "a"}).encode()
	for _, row := range []struct {
		query, detail string
		status        int
		code          api.Code
	}{
		{"limit=0", "want 1 to 10000", 400, api.CodeBadRequest},
		{"limit=10001", "want 1 to 10000", 400, api.CodeBadRequest},
		{"prefix=a&start=a", "prefix and start or end contradict", 400, api.CodeBadRequest},
		{"start=b&end=b", "no key can lie between", 400, api.CodeBadRequest},
		{"all=true", `"all" is none of this call`, 400, api.CodeBadRequest},
		{"atomic=true", `"atomic" is none of this call`, 400, api.CodeBadRequest},
		{"count&limit=5", "limit contradicts count", 400, api.CodeBadRequest},
		{"count&keys", "keys contradicts count", 400, api.CodeBadRequest},
		{"count&reverse", "reverse contradicts count", 400, api.CodeBadRequest},
		{"count&delimiter=/", "delimiter contradicts count", 400, api.CodeBadRequest},
		{"count&after=" + next, "after contradicts count", 400, api.CodeBadRequest},
		{"delimiter=", "want 1 to 64 bytes", 400, api.CodeBadRequest},
		{"delimiter=" + strings.Repeat("/", 65), "want 1 to 64 bytes", 400, api.CodeBadRequest},
		{"prefix=" + strings.Repeat("k", 4097), "at most 4096 bytes", 400, api.CodeBadRequest},
		{"revision=0", "whole number from 1", 400, api.CodeBadRequest},
		{"revision=5", "", 400, api.CodeFutureRevision},
		{"after=", "the value of `next`", 400, api.CodeBadRequest},
		{"after=x", "option after: it is broken", 400, api.CodeBadRequest},
		{"after=" + next[1:], "option after: it is broken", 400, api.CodeBadRequest},
		{"after=" + next + "&limit=2&limit=3", "limit is given twice", 400, api.CodeBadRequest},
		{"after=" + next + "&keys", "option after: it is of another query", 400, api.CodeBadRequest},
		{"after=" + next + "&reverse", "option after: it is of another query", 400, api.CodeBadRequest},
		{"after=" + next + "&prefix=a", "option after: it is of another query", 400, api.CodeBadRequest},
		{"after=" + next + "&delimiter=/", "option after: it is of another query", 400, api.CodeBadRequest},
		{"after=" + next + "&revision=3", "it is of revision 4, which contradicts", 400, api.CodeBadRequest},
		{"after=" + next + "&min_revision=5", "it is of revision 4, which contradicts a later min_revision", 400, api.CodeBadRequest},
		{"after=" + future, "", 400, api.CodeFutureRevision},
	} {
		a := askJSON(t, h, "GET", "/v1/kv?"+row.query, "", row.status, nil)
		p := problemOf(t, a)
		if p.Code != row.code || !strings.Contains(p.Detail, row.detail) || p.Outcome != api.OutcomeNotApplied {
			t.Errorf("%s: %s", row.query, a.body)
		}
		if a.header.Get("Link") != "" {
			t.Errorf("%s: an error with a Link", row.query)
		}
	}
	if a := ask(t, h, "GET", "/v1/kv", "", "If-None-Match: *"); a.status != 400 || !strings.Contains(a.body, "If-None-Match") {
		t.Errorf("If-None-Match on a list: %d %s", a.status, a.body)
	}
	// What a walk may change from page to page.
	var rest api.List
	askJSON(t, h, "GET", "/v1/kv?limit=3&timeout=1s&consistency=stale&revision=4&after="+next, "", 200, &rest)
	if got := pageText(&rest); got != `r4 n4 "b"="v:b" "c"="v:c" "d"="v:d"` {
		t.Error(got)
	}
}

// A page from a member that lags behind the one that made the cursor waits.
func TestCursorOfMemberAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := newTwinAPI(t, testLimits())
		fill(b, "a", "b")
		ahead := (&cursor{revision: 3, query: walkHash(&kv.Query{}), last: "a"}).encode()
		done := make(chan answer, 1)
		go func() { done <- ask(t, h, "GET", "/v1/kv?consistency=stale&after="+ahead, "") }()
		synctest.Wait()
		fill(b, "c")
		if a := <-done; a.status != 200 || !strings.Contains(a.body, `"key":"c"`) {
			t.Errorf("%d %s", a.status, a.body)
		}
	})
}

func TestListCompacted(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	fill(b, "a", "b")
	var page api.List
	askJSON(t, h, "GET", "/v1/kv?limit=1", "", 200, &page)
	compact(b)
	for _, query := range []string{"after=" + page.Next, "revision=1", "revision=1&count", "revision=1&delimiter=/"} {
		a := askJSON(t, h, "GET", "/v1/kv?"+query, "", 410, nil)
		if p := problemOf(t, a); p.Code != api.CodeRevisionCompacted || p.CompactRevision < 2 {
			t.Errorf("%s: %s", query, a.body)
		}
	}
}

// compact writes until the first revisions are gone.
func compact(b *twinBackend) {
	value := make([]byte, 1<<20)
	for range 70 { // each event holds the value before
		b.do(kv.Command{Op: kv.OpPut, Key: "compact", Value: value})
	}
	b.do(kv.Command{Op: kv.OpDelete, Key: "compact"})
	b.do(kv.Command{Op: kv.OpPut, Key: "compact", Value: nil})
}

func TestPageBytes(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	value := bytes.Repeat([]byte{1}, 1<<20) // six times as long in JSON
	for i := range 6 {
		b.do(kv.Command{Op: kv.OpPut, Key: "k" + strconv.Itoa(i), Value: value})
	}
	var got []int
	for target := "/v1/kv"; target != ""; {
		var page api.List
		a := askJSON(t, h, "GET", target, "", 200, &page)
		got = append(got, len(page.Items))
		for i := range page.Items {
			if !bytes.Equal(page.Items[i].Value, value) {
				t.Errorf("the value of %s is not what was stored", page.Items[i].Key)
			}
		}
		target = linkOf(t, a)
	}
	if !slices.Equal(got, []int{3, 3}) {
		t.Errorf("pages of %v items, want 3 and 3: 4 MiB less the keys", got)
	}
	var page api.List
	askJSON(t, h, "GET", "/v1/kv?keys", "", 200, &page)
	if len(page.Items) != 6 {
		t.Errorf("%d keys on a page without values, want 6", len(page.Items))
	}
}

// linkOf is the target of the Link header; empty without one.
func linkOf(t failer, a answer) string {
	t.Helper()
	link := a.header.Get("Link")
	if link == "" {
		return ""
	}
	target, ok := strings.CutSuffix(strings.TrimPrefix(link, "<"), `>; rel="next"`)
	if !ok || link[0] != '<' || strings.ContainsAny(target, "<> \"") {
		t.Fatalf("Link %q", link)
	}
	return target
}

// The Link keeps what the client asked, whatever bytes it used for that.
func TestLinkQuery(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	fill(b, `>; rel="x" +&=%`+"\xff1", `>; rel="x" +&=%`+"\xff2")
	var seen []string
	// Not encoded where the line allows it: net/http takes it as it is.
	for target := `/v1/kv?&&prefix=%3E;%20rel="x"+%2B%26=%25%FF&limit=1&keys&reverse&min_revision=1`; target != ""; {
		r := httptest.NewRequest("GET", "/v1/kv", nil)
		r.RequestURI = target
		_, r.URL.RawQuery, _ = strings.Cut(target, "?")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		var page api.List
		if err := json.Unmarshal(w.Body.Bytes(), &page); err != nil || w.Code != 200 || len(page.Items) != 1 {
			t.Fatalf("%s: %d %s", target, w.Code, w.Body)
		}
		seen = append(seen, page.Items[0].Key[len(page.Items[0].Key)-1:])
		target = linkOf(t, answer{header: w.Header()})
		if target != "" && (!strings.Contains(target, "&reverse&") || !strings.Contains(target, "min_revision=1") || strings.Count(target, "after=") != 1) {
			t.Errorf("Link %s", target)
		}
	}
	if !slices.Equal(seen, []string{"2", "1"}) {
		t.Errorf("walked %q", seen)
	}
}

// naiveList is what a walk over m has to show: keys, and rolled-up prefixes
// with a star, in order.
func naiveList(m map[string]string, o url.Values) (rows []string, count int) {
	span := kv.Span{Start: o.Get("start"), End: o.Get("end")}
	if o.Has("prefix") {
		span = kv.Prefix(o.Get("prefix"))
	}
	last := ""
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if !span.Contains(k) {
			continue
		}
		count++
		row := fmt.Sprintf("%q=%q", k, m[k])
		if o.Has("keys") {
			row = fmt.Sprintf("%q", k)
		}
		if d := o.Get("delimiter"); d != "" {
			if i := strings.Index(k[len(o.Get("prefix")):], d); i >= 0 {
				row = fmt.Sprintf("%q*", k[:len(o.Get("prefix"))+i+len(d)])
			}
		}
		if row != last {
			rows = append(rows, row)
		}
		last = row
	}
	if o.Has("reverse") {
		slices.Reverse(rows)
	}
	return rows, count
}

// All pages of a walk together are the naive list of the revision at which it
// began, however many writes come between them.
func TestWalk(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	key := rapid.StringOfN(rapid.RuneFrom([]rune{'a', 'b', '/', '\u00ff'}), 1, 4, -1)
	binary := rapid.Map(rapid.SliceOfN(rapid.SampledFrom([]byte{'a', '/', 0, 0xff}), 1, 4), func(b []byte) string { return string(b) })
	anyKey := rapid.OneOf(key, binary)
	rapid.Check(t, func(t *rapid.T) {
		b.do(kv.Command{Op: kv.OpDeleteRange})
		m := map[string]string{}
		write := func(into map[string]string) {
			k := anyKey.Draw(t, "key")
			if rapid.IntRange(0, 3).Draw(t, "delete") == 0 {
				b.do(kv.Command{Op: kv.OpDelete, Key: k})
				delete(into, k)
				return
			}
			v := strconv.FormatInt(b.revision(), 10)
			b.do(kv.Command{Op: kv.OpPut, Key: k, Value: []byte(v)})
			into[k] = v
		}
		for range rapid.IntRange(0, 30).Draw(t, "writes") {
			write(m)
		}
		o := url.Values{}
		flag := func(name string) {
			if rapid.Bool().Draw(t, name) {
				o.Set(name, "true")
			}
		}
		flag("keys")
		flag("reverse")
		switch rapid.IntRange(0, 2).Draw(t, "span") {
		case 0:
			o.Set("prefix", rapid.OneOf(rapid.Just(""), anyKey).Draw(t, "prefix"))
		case 1:
			start, end := anyKey.Draw(t, "start"), anyKey.Draw(t, "end")
			if start < end {
				o.Set("start", start)
				o.Set("end", end)
			} else {
				o.Set("start", start)
			}
		}
		if rapid.Bool().Draw(t, "roll up") {
			o.Set("delimiter", rapid.SampledFrom([]string{"/", "a", "/a"}).Draw(t, "delimiter"))
		}
		limit := rapid.IntRange(1, 6).Draw(t, "limit")
		o.Set("limit", strconv.Itoa(limit))
		want, count := naiveList(m, o)
		revision := b.revision()

		var got, items, prefixes []string
		later := maps.Clone(m)
		for target := "/v1/kv?" + o.Encode(); target != ""; {
			var page api.List
			a := ask(t, h, "GET", target, "")
			if a.status != 200 {
				t.Fatalf("GET %s: %d %s", target, a.status, a.body)
			}
			if err := json.Unmarshal([]byte(a.body), &page); err != nil {
				t.Fatalf("GET %s: %v", target, err)
			}
			if page.Revision != revision || page.Count != count {
				t.Fatalf("GET %s: revision %d, count %d; want %d, %d", target, page.Revision, page.Count, revision, count)
			}
			if n := len(page.Items) + len(page.Prefixes) + len(page.PrefixesB64); n > limit {
				t.Fatalf("%d items on a page of %d", n, limit)
			}
			for i := range page.Items {
				row := fmt.Sprintf("%q", page.Items[i].Key)
				if page.Items[i].Value != nil {
					row += fmt.Sprintf("=%q", page.Items[i].Value)
				}
				items = append(items, row)
			}
			for _, p := range page.Prefixes {
				prefixes = append(prefixes, fmt.Sprintf("%q*", p))
			}
			for _, p := range page.PrefixesB64 {
				prefixes = append(prefixes, fmt.Sprintf("%q*", p))
			}
			if link := linkOf(t, a); page.Next == "" {
				target = ""
			} else if target = link; !strings.HasSuffix(link, "after="+page.Next) {
				t.Fatalf("Link %s, next %s", link, page.Next)
			}
			for range rapid.IntRange(0, 3).Draw(t, "writes between") {
				write(later)
			}
		}
		// Items and prefixes come apart: each in the order of the walk, but for
		// the prefixes that are not UTF-8.
		for _, row := range want {
			if !strings.HasSuffix(row, "*") {
				got = append(got, row)
			}
		}
		if !slices.Equal(items, got) {
			t.Fatalf("%s: items\n%s\nwant\n%s", o.Encode(), items, got)
		}
		want = slices.DeleteFunc(want, func(row string) bool { return !strings.HasSuffix(row, "*") })
		slices.Sort(want)
		slices.Sort(prefixes)
		if !slices.Equal(prefixes, want) {
			t.Fatalf("%s: prefixes\n%s\nwant\n%s", o.Encode(), prefixes, want)
		}
	})
}

func TestDeleteRange(t *testing.T) {
	for _, row := range []struct {
		query   string
		status  int
		deleted int64
		left    string
		detail  string
	}{
		{"prefix=a", 200, 2, `"b" "c"`, ""},
		{"start=b", 200, 2, `"a1" "a2"`, ""},
		{"end=b", 200, 2, `"b" "c"`, ""},
		{"start=a2&end=c", 200, 2, `"a1" "c"`, ""},
		{"start=&end=a2", 200, 1, `"a2" "b" "c"`, ""},
		{"prefix=x", 200, 0, `"a1" "a2" "b" "c"`, ""},
		{"prefix=a&all=false", 200, 2, `"b" "c"`, ""},
		{"all=true", 200, 4, ``, ""},
		{"all", 200, 4, ``, ""},
		{"all=true&prefix=", 200, 4, ``, ""},
		{"all=true&start=", 200, 4, ``, ""},
		{"", 400, 0, `"a1" "a2" "b" "c"`, "no query option prefix, start or end"},
		{"prefix=", 400, 0, `"a1" "a2" "b" "c"`, "no query option prefix, start or end"},
		{"start=", 400, 0, `"a1" "a2" "b" "c"`, "no query option prefix, start or end"},
		{"all=false", 400, 0, `"a1" "a2" "b" "c"`, "no query option prefix, start or end"},
		{"all=true&prefix=a", 400, 0, `"a1" "a2" "b" "c"`, "all contradicts"},
		{"all=true&start=a", 400, 0, `"a1" "a2" "b" "c"`, "all contradicts"},
		{"all=1", 400, 0, `"a1" "a2" "b" "c"`, "want true, false or no value"},
		{"prefix=a&limit=1", 400, 0, `"a1" "a2" "b" "c"`, `"limit" is none of this call`},
		{"prefix=a&start=a", 400, 0, `"a1" "a2" "b" "c"`, "contradict each other"},
		{"start=b&end=a", 400, 0, `"a1" "a2" "b" "c"`, "no key can lie between"},
	} {
		h, b := newTwinAPI(t, testLimits())
		fill(b, "a1", "a2", "b", "c")
		a := ask(t, h, "DELETE", "/v1/kv?"+row.query, "", "Accept: application/json")
		if a.status != row.status {
			t.Fatalf("%s: %d %s", row.query, a.status, a.body)
		}
		if row.status == 200 {
			revision := int64(4)
			if row.deleted > 0 {
				revision = 5 // one for all of them
			}
			if want := fmt.Sprintf(`{"deleted":%d,"revision":%d}`+"\n", row.deleted, revision); a.body != want {
				t.Errorf("%s: %s, want %s", row.query, a.body, want)
			}
			if a.header.Get("Kv-Revision") != strconv.FormatInt(revision, 10) {
				t.Errorf("%s: headers %v", row.query, a.header)
			}
		} else if p := problemOf(t, a); !strings.Contains(p.Detail, row.detail) || p.Outcome != api.OutcomeNotApplied {
			t.Errorf("%s: %s", row.query, a.body)
		}
		var l api.List
		askJSON(t, h, "GET", "/v1/kv?keys", "", 200, &l)
		if got := strings.TrimSpace(strings.SplitN(pageText(&l)+" ", " ", 3)[2]); got != row.left {
			t.Errorf("%s: left %s, want %s", row.query, got, row.left)
		}
	}
}

func TestDeleteRangeOnce(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	fill(b, "a1", "a2", "b")
	first := ask(t, h, "DELETE", "/v1/kv?prefix=a", "", "Idempotency-Key: one")
	fill(b, "a3")
	again := ask(t, h, "DELETE", "/v1/kv?prefix=a&timeout=2s", "", "Idempotency-Key: one")
	if first.status != 200 || again.status != 200 || first.body != again.body || first.body != `{"deleted":2,"revision":4}`+"\n" {
		t.Errorf("%d %s, then %d %s", first.status, first.body, again.status, again.body)
	}
	if first.header.Get("Kv-Idempotent-Replay") != "" || again.header.Get("Kv-Idempotent-Replay") != "true" ||
		first.header.Get("Kv-Idempotency-Window") == "" || again.header.Get("Kv-Revision") != "4" {
		t.Errorf("%v, then %v", first.header, again.header)
	}
	if other := ask(t, h, "DELETE", "/v1/kv?prefix=b", "", "Idempotency-Key: one"); other.status != 422 {
		t.Errorf("another request under the key: %d %s", other.status, other.body)
	}
	if a := ask(t, h, "GET", "/v1/kv/a3", ""); a.status != 200 {
		t.Error("the repetition deleted again")
	}
}

func TestHistory(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	put := func(k, v string) { b.do(kv.Command{Op: kv.OpPut, Key: k, Value: []byte(v)}) }
	put("k", "one") // revision 1
	put("other", "x")
	put("k", "two") // 3
	b.do(kv.Command{Op: kv.OpDelete, Key: "k"})
	put("k", "three") // 5
	put("k", "\xff")
	put("other", "y") // 7
	put("one", "")
	const (
		at6 = `{"key":"k","value_b64":"/w==","create_revision":5,"mod_revision":6,"version":2}`
		at5 = `{"key":"k","value":"three","create_revision":5,"mod_revision":5,"version":1}`
		at4 = `{"key":"k","mod_revision":4,"deleted":true}`
		at3 = `{"key":"k","value":"two","create_revision":1,"mod_revision":3,"version":2}`
		at1 = `{"key":"k","value":"one","create_revision":1,"mod_revision":1,"version":1}`
	)
	for _, row := range []struct{ target, want string }{
		{"/v1/kv/k?history=1", at6},
		{"/v1/kv/k?history=2", at6 + "," + at5},
		{"/v1/kv/k?history=3", at6 + "," + at5 + "," + at4},
		{"/v1/kv/k?history=5", at6 + "," + at5 + "," + at4 + "," + at3 + "," + at1},
		{"/v1/kv/k?history=1000&consistency=stale&min_revision=3", at6 + "," + at5 + "," + at4 + "," + at3 + "," + at1},
		{"/v1/kv/one?history=1", `{"key":"one","value":"","create_revision":8,"mod_revision":8,"version":1}`},
	} {
		a := ask(t, h, "GET", row.target, "")
		if want := `{"revision":8,"compact_revision":0,"items":[` + row.want + "]}\n"; a.status != 200 || a.body != want {
			t.Errorf("%s: %d\n%swant\n%s", row.target, a.status, a.body, want)
		}
		if a.header.Get("Kv-Revision") != "8" || a.header.Get("Content-Type") != "application/json" || a.header.Get("Content-Length") != strconv.Itoa(len(a.body)) {
			t.Errorf("%s: %v", row.target, a.header)
		}
		head := ask(t, h, "HEAD", row.target, "")
		if head.status != 200 || head.body != "" || !maps.EqualFunc(head.header, a.header, slices.Equal) {
			t.Errorf("HEAD %s: %d %v, GET %v", row.target, head.status, head.header, a.header)
		}
	}
	for target, status := range map[string]int{
		"/v1/kv/absent?history=5": 404, "/v1/kv/k?history=0": 400, "/v1/kv/k?history=1001": 400, "/v1/kv/k?history=": 400,
		"/v1/kv/k?history=2&revision=3": 400, "/k?history=2": 400,
	} {
		if a := ask(t, h, "GET", target, ""); a.status != status {
			t.Errorf("%s: %d %s", target, a.status, a.body)
		}
	}
	empty, _ := newTwinAPI(t, testLimits())
	if a := ask(t, empty, "GET", "/v1/kv/k?history=1", ""); a.status != 404 {
		t.Errorf("in an empty store: %d %s", a.status, a.body)
	}
}

func TestHistoryAfterCompaction(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	fill(b, "kept", "gone", "changed")
	b.do(kv.Command{Op: kv.OpDelete, Key: "gone"})
	compact(b)
	b.do(kv.Command{Op: kv.OpPut, Key: "changed", Value: []byte("new")})
	for key, want := range map[string][]string{
		"kept":    {"v:kept"},
		"changed": {"new", "v:changed"}, // what was there before the oldest event
		"gone":    nil,
	} {
		a := ask(t, h, "GET", "/v1/kv/"+key+"?history=10", "")
		if want == nil {
			if a.status != 404 {
				t.Errorf("%s: %d %s", key, a.status, a.body)
			}
			continue
		}
		var l api.History
		if err := json.Unmarshal([]byte(a.body), &l); err != nil || a.status != 200 || l.CompactRevision < 4 {
			t.Fatalf("%s: %d %s: %v", key, a.status, a.body, err)
		}
		var got []string
		for i := range l.Items {
			got = append(got, string(l.Items[i].Value))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", key, got, want)
		}
	}
	var l api.History
	askJSON(t, h, "GET", "/v1/kv/changed?history=1", "", 200, &l)
	if len(l.Items) != 1 || string(l.Items[0].Value) != "new" {
		t.Errorf("limited to one: %+v", l.Items)
	}
}

// Lists and histories give their slots back, and wait on the store within
// their deadline.
func TestListWaits(t *testing.T) {
	l := testLimits()
	h, b := newTwinAPI(t, l)
	fill(b, "a")
	for _, target := range []string{"/v1/kv", "/v1/kv?count", "/v1/kv/a?history=1", "/v1/kv/x?history=1"} {
		for range l.MaxInFlight + 1 {
			if a := ask(t, h, "GET", target, ""); a.status == 429 {
				t.Fatalf("%s keeps its slot", target)
			}
		}
	}
	for _, target := range []string{"/v1/kv", "/v1/kv?count", "/v1/kv/a?history=1"} {
		a := ask(t, h, "GET", target+map[bool]string{true: "&", false: "?"}[strings.Contains(target, "?")]+"min_revision=9&timeout=20ms", "")
		if a.status != 504 {
			t.Errorf("%s, a revision that does not come: %d %s", target, a.status, a.body)
		}
	}
	b.err = errNoLeader
	for _, target := range []string{"/v1/kv", "/v1/kv?count", "/v1/kv/a?history=1"} {
		a := askJSON(t, h, "GET", target, "", 503, nil)
		if p := problemOf(t, a); p.Code != api.CodeNoLeader || a.header.Get("Kv-Revision") != "" {
			t.Errorf("%s: %s", target, a.body)
		}
	}
	b.err = nil
	h.m.inFlight.Store(int64(l.MaxInFlight))
	for _, row := range [][2]string{{"GET", "/v1/kv"}, {"GET", "/v1/kv?count"}, {"GET", "/v1/kv/a?history=1"}, {"DELETE", "/v1/kv?prefix=a"}, {"POST", "/v1/kv"}, {"POST", "/v1/kv?atomic"}} {
		if a := ask(t, h, row[0], row[1], ""); a.status != 429 {
			t.Errorf("%s with all slots taken: %d", row, a.status)
		}
	}
	if a := ask(t, h, "GET", "/v1/kv", "", "Accept: application/x-ndjson"); a.status != 429 {
		t.Errorf("an export with all slots taken: %d", a.status)
	}
	if n := h.m.inFlight.Load(); n != int64(l.MaxInFlight) {
		t.Errorf("%d slots taken, want %d", n, l.MaxInFlight)
	}
}

// A page that is read slowly holds no slot.
func TestPageHoldsNoSlot(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	fill(b, "a")
	for _, target := range []string{"/v1/kv", "/v1/kv/a?history=1"} {
		w := &slotWatcher{ResponseWriter: httptest.NewRecorder(), m: h.m, during: -1}
		h.ServeHTTP(w, httptest.NewRequest("GET", target, nil))
		if w.during != 0 {
			t.Errorf("%s: %d slots taken while it is written", target, w.during)
		}
	}
}

func TestRangeMethods(t *testing.T) {
	h, _ := newTwinAPI(t, testLimits())
	for _, method := range []string{"PUT", "PATCH", "OPTIONS"} {
		if a := ask(t, h, method, "/v1/kv", "x"); a.status != 405 || a.header.Get("Allow") != "GET, HEAD, POST, DELETE" {
			t.Errorf("%s: %d %v", method, a.status, a.header)
		}
	}
}

// hooked is a backend with some calls replaced.
type hooked struct {
	backend
	onPropose func(ctx context.Context, c *kv.Command) (kv.Result, error)
	onRead    func(ctx context.Context, f func(*kv.View) error, inner func(func(*kv.View) error) error) error
}

func (b *hooked) propose(ctx context.Context, c *kv.Command) (kv.Result, error) {
	if b.onPropose != nil {
		return b.onPropose(ctx, c)
	}
	return b.backend.propose(ctx, c)
}

func (b *hooked) read(ctx context.Context, o readOptions, whole bool, f func(*kv.View) error) error {
	inner := func(f func(*kv.View) error) error { return b.backend.read(ctx, o, whole, f) }
	if b.onRead != nil {
		return b.onRead(ctx, f, inner)
	}
	return inner(f)
}

// failingWriter is a client that is gone after some bytes.
type failingWriter struct {
	*httptest.ResponseRecorder
	left int
}

func (w *failingWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, errors.New("gone")
	}
	return w.ResponseRecorder.Write(p)
}

// Nothing goes on being encoded for a client that is gone.
func TestPageForClientThatLeft(t *testing.T) {
	h, b := newTwinAPI(t, testLimits())
	for i := range 200 {
		b.do(kv.Command{Op: kv.OpPut, Key: fmt.Sprintf("k%03d", i), Value: make([]byte, 4096)})
	}
	w := &failingWriter{httptest.NewRecorder(), 100 << 10}
	h.ServeHTTP(w, httptest.NewRequest("GET", "/v1/kv", nil))
	if w.left > 0 || w.left < -2*pieceBytes {
		t.Errorf("%d bytes were written after the client had left", -w.left)
	}
}

func BenchmarkListPage(b *testing.B) {
	h, twin := newTwinAPI(b, testLimits())
	for i := range 2000 {
		twin.do(kv.Command{Op: kv.OpPut, Key: fmt.Sprintf("key-%04d", i), Value: make([]byte, 100)})
	}
	r := httptest.NewRequest("GET", "/v1/kv", nil)
	w := &nullWriter{h: http.Header{}}
	b.ReportAllocs()
	for b.Loop() {
		clear(w.h)
		h.ServeHTTP(w, r)
	}
}
