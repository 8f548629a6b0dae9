package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pontoon/api"
	"pontoon/kv"
)

// api/openapi.json is written by hand. These tests hold it against the server in
// both directions, so that neither can move without the other.

// TestOpenAPIRoutes: every method of every route is an operation, and no other.
func TestOpenAPIRoutes(t *testing.T) {
	d := loadOpenAPI(t)
	if !strings.HasPrefix(d.OpenAPI, "3.1.") {
		t.Errorf("openapi is %q", d.OpenAPI)
	}
	type call struct {
		rt     route
		method string
	}
	want := map[call]bool{}
	for rt, methods := range allowed {
		for method := range strings.SplitSeq(methods, ", ") {
			c := call{route(rt), method}
			if c.rt == routeKey && (method == http.MethodPost || method == http.MethodDelete) {
				c.rt = routeMember
			}
			if methods != "" {
				want[c] = true
			}
		}
	}
	ids := map[string]bool{}
	for _, op := range d.ops {
		c := call{op.route, op.method}
		if !want[c] {
			t.Errorf("api/openapi.json has %s %s, which the server does not serve (route %v)", op.method, op.path, op.route)
		}
		delete(want, c)
		if op.OperationID == "" || ids[op.OperationID] || op.Summary == "" || len(op.Tags) != 1 {
			t.Errorf("%s %s: operationId %q, summary %q, tags %q: want a new id, a summary and one tag", op.method, op.path, op.OperationID, op.Summary, op.Tags)
		}
		ids[op.OperationID] = true
		if op.path != "/{key}" && op.path != op.route.String() {
			t.Errorf("the path %s is the route %v", op.path, op.route)
		}
	}
	for c := range want {
		t.Errorf("api/openapi.json lacks %s %v", c.method, c.rt)
	}
}

// TestOpenAPIReferences: they all resolve, and what is defined is used.
func TestOpenAPIReferences(t *testing.T) {
	loadOpenAPI(t) // follows those of operations
	var parsed any
	if err := json.Unmarshal(api.OpenAPI, &parsed); err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				walk(e)
			}
		case map[string]any:
			if ref, ok := v["$ref"].(string); ok {
				used[ref] = true
			}
			for _, e := range v {
				walk(e)
			}
		}
	}
	walk(parsed)
	defined := map[string]bool{}
	for kind, all := range parsed.(map[string]any)["components"].(map[string]any) {
		for name := range all.(map[string]any) {
			defined["#/components/"+kind+"/"+name] = true
		}
	}
	for ref := range used {
		if !defined[ref] {
			t.Errorf("%s refers to nothing", ref)
		}
	}
	for name := range defined {
		if !used[name] {
			t.Errorf("%s is not used", name)
		}
	}
}

// optionProbe tells whether a call takes an option: a value that is in order,
// and one that is wrong whatever else is given.
type optionProbe struct {
	bits        optionSet
	in, name    string
	good, wrong string
}

var optionProbes = []optionProbe{
	{optTimeout, "query", "timeout", "5s", "61s"},
	{optConsistency, "query", "consistency", "stale", "eventual"},
	{optMinRevision, "query", "min_revision", "1", "-1"},
	{optRevision, "query", "revision", "1", "0"},
	{optHistory, "query", "history", "1", "1001"},
	{optForce, "query", "force", "true", "yes"},
	{optVerbose, "query", "verbose", "true", "yes"},
	{optTTL, "query", "ttl", "30s", "0s"},
	{optLease, "query", "lease", "7", "x"},
	{optPrefix | optWatchPrefix, "query", "prefix", "p", strings.Repeat("p", 4097)},
	{optStart, "query", "start", "a", strings.Repeat("p", 4097)},
	{optEnd, "query", "end", "b", ""},
	{optLimit, "query", "limit", "1", "10001"},
	{optAfter, "query", "after", "x", ""},
	{optReverse, "query", "reverse", "true", "yes"},
	{optKeys, "query", "keys", "true", "yes"},
	{optCount, "query", "count", "true", "yes"},
	{optDelimiter, "query", "delimiter", "/", ""},
	{optAll, "query", "all", "true", "yes"},
	{optAtomic, "query", "atomic", "true", "yes"},
	{optMode, "query", "mode", "create", "replace"},
	{optWatchKey, "query", "key", "k", ""},
	{optFrom, "query", "from", "1", "0"},
	{optInitial, "query", "initial", "true", "yes"},
	{optPrev, "query", "prev", "true", "yes"},
	{optEvents, "query", "events", "put", "get"},
	{optProgress, "query", "progress", "15s", "1ms"},
	{optIfMatch, "header", "If-Match", `"17"`, "17"},
	{optIfNoneMatch, "header", "If-None-Match", `"17"`, "17"},
	{optIdempotency, "header", "Idempotency-Key", "k", "two words"},
	{optPreferWait, "header", "Prefer", "wait=5", "wait=61"},
	{optPreferEcho, "header", "Prefer", "return=minimal", "return=all"},
	{optLastEventID, "header", "Last-Event-ID", "17", "x"},
}

// detail is what the server says against one option; "" if it does not refuse it.
func (p *optionProbe) detail(t *testing.T, h http.Handler, op *openOperation, value string) string {
	t.Helper()
	target := op.target()
	if p.in == "query" {
		target += "?" + p.name + "=" + url.QueryEscape(value)
	}
	ctx := t.Context()
	r := httptest.NewRequestWithContext(ctx, op.method, target, http.NoBody)
	r.Header.Set("Accept", "application/problem+json")
	if p.in == "header" {
		r.Header.Set(p.name, value)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	var problem api.Error
	if w.Code != http.StatusBadRequest || op.method == http.MethodHead && w.Body.Len() == 0 {
		return ""
	}
	if err := json.Unmarshal(w.Body.Bytes(), &problem); err != nil {
		t.Fatalf("%s %s: %v in %s", op.method, target, err, w.Body)
	}
	return problem.Detail
}

// TestOpenAPIParameters: the options that a call takes are those that the
// document lists, of all that the server knows.
func TestOpenAPIParameters(t *testing.T) {
	covered := optionSet(0)
	for _, p := range optionProbes {
		covered |= p.bits
	}
	if all := optLastEventID<<1 - 1; covered != all {
		t.Errorf("no row in optionProbes for the options %b", all&^covered)
	}
	d := loadOpenAPI(t)
	// What the backend would say comes after the options: it refuses all.
	h := newTestAPI(&fakeBackend{err: errStopping}, testLimits()).Handler
	for _, op := range d.ops {
		documented := map[string]*openParameter{}
		for _, p := range op.Parameters {
			if p.In != "path" {
				documented[p.In+" "+p.Name] = p
			}
		}
		for _, probe := range optionProbes {
			p := documented[probe.in+" "+probe.name]
			what := fmt.Sprintf("%s %s, %s %s", op.method, op.path, probe.in, probe.name)
			if p != nil && probe.name == "Prefer" {
				preference, _, _ := strings.Cut(probe.good, "=")
				if !strings.Contains(p.Schema.Pattern+fmt.Sprint(p.Schema.Enum...), preference) {
					p = nil
				}
			}
			if p == nil {
				if got := probe.detail(t, h, op, probe.good); !strings.Contains(got, "is none of this call") {
					t.Errorf("%s is not documented, and the server takes it: %q", what, got)
				}
				continue
			}
			if got := probe.detail(t, h, op, probe.good); strings.Contains(got, "is none of this call") {
				t.Errorf("%s is documented, and the server does not take it: %q", what, got)
			}
			if got := probe.detail(t, h, op, probe.wrong); !strings.Contains(strings.ToLower(got), strings.ToLower(probe.name)) || strings.Contains(got, "is none of this call") {
				t.Errorf("%s=%s is not refused by name: %q", what, quoteShort(probe.wrong), got)
			}
			probeBounds(t, h, op, &probe, p)
		}
		for id := range documented {
			if !slices.ContainsFunc(optionProbes, func(p optionProbe) bool { return p.in+" "+p.name == id }) {
				t.Errorf("%s %s: no row in optionProbes for %s", op.method, op.path, id)
			}
		}
	}
}

// probeBounds holds the bounds of a parameter's schema against the server.
func probeBounds(t *testing.T, h http.Handler, op *openOperation, probe *optionProbe, p *openParameter) {
	t.Helper()
	s := p.Schema
	if s.Type == "array" {
		s = *s.Items
	}
	try := func(value string, want bool) {
		t.Helper()
		got := probe.detail(t, h, op, value)
		if taken := !strings.Contains(got, "option "+p.Name+"=") && !strings.Contains(got, "header "+p.Name+":"); taken != want {
			t.Errorf("%s %s: %s=%s: taken %v, the schema says %v (%s)", op.method, op.path, p.Name, quoteShort(value), taken, want, got)
		}
	}
	if s.Minimum != nil {
		try(strconv.FormatInt(*s.Minimum, 10), true)
		try(strconv.FormatInt(*s.Minimum-1, 10), false)
	}
	if s.Maximum != nil {
		try(strconv.FormatInt(*s.Maximum, 10), true)
		try(strconv.FormatInt(*s.Maximum+1, 10), false)
	}
	if s.MinLength != nil && *s.MinLength > 0 {
		try(strings.Repeat("a", *s.MinLength), true)
		try("", false)
	}
	if s.MaxLength != nil && probe.in == "query" {
		try(strings.Repeat("a", *s.MaxLength), true)
		try(strings.Repeat("a", *s.MaxLength+1), false)
	}
	for _, value := range s.Enum {
		try(value.(string), true)
	}
	if s.Pattern != "" && !regexp.MustCompile(s.Pattern).MatchString(probe.good) {
		t.Errorf("%s %s: the pattern of %s refuses %q, the server does not", op.method, op.path, p.Name, probe.good)
	}
	if s.Pattern != "" && probe.bits&(optTTL|optTimeout|optProgress) == 0 && regexp.MustCompile(s.Pattern).MatchString(probe.wrong) {
		t.Errorf("%s %s: the pattern of %s takes %q, the server does not", op.method, op.path, p.Name, probe.wrong)
	}
}

// TestOpenAPICodes: the codes are those of the api package, each under its status.
func TestOpenAPICodes(t *testing.T) {
	d := loadOpenAPI(t)
	want := map[string]int{}
	for _, value := range apiConstants(t, "Code") {
		want[value] = api.Code(value).Status()
	}
	var raw struct {
		Components struct {
			Schemas   map[string]struct{ Enum []string }
			Responses map[string]struct {
				Content map[string]struct {
					Schema struct {
						Properties struct {
							Status struct{ Const int }
							Code   struct{ Enum []string }
						}
					}
				}
			}
		}
	}
	if err := json.Unmarshal(api.OpenAPI, &raw); err != nil {
		t.Fatal(err)
	}
	got := raw.Components.Schemas["Code"].Enum
	if slices.Sort(got); !slices.Equal(got, slices.Sorted(maps.Keys(want))) {
		t.Errorf("the codes of the document are %q\nthose of package api %q", got, slices.Sorted(maps.Keys(want)))
	}
	outcomes := raw.Components.Schemas["Outcome"].Enum
	if slices.Sort(outcomes); !slices.Equal(outcomes, slices.Sorted(maps.Values(apiConstants(t, "Outcome")))) {
		t.Errorf("the outcomes of the document are %q", outcomes)
	}
	// No operation can name those that say that there is no operation.
	covered := map[string]bool{string(api.CodeMethodNotAllowed): true, string(api.CodeUnsupported): true}
	for name, r := range raw.Components.Responses {
		p := r.Content[api.ProblemType].Schema.Properties
		for _, code := range p.Code.Enum {
			if covered[code] = true; want[code] != p.Status.Const {
				t.Errorf("response %s says status %d for %s, which is %d", name, p.Status.Const, code, want[code])
			}
		}
	}
	for _, op := range d.ops {
		for status, r := range op.Responses {
			content, isError := r.Content[api.ProblemType]
			if isError && !strings.Contains(string(content.Schema), `"const": `+status) {
				t.Errorf("%s %s: the response under %s is of another status", op.method, op.path, status)
			}
		}
	}
	for code, status := range want {
		if !covered[code] {
			t.Errorf("no response has the code %s", code)
		}
		if row := fmt.Sprintf("| %s | %d |", code, status); !strings.Contains(string(api.OpenAPI), row) {
			t.Errorf("the description of Code lacks the row %q", row)
		}
	}
}

// apiFiles are the files of package api, parsed.
func apiFiles(t *testing.T) (files []*ast.File) {
	t.Helper()
	names, err := filepath.Glob("api/*.go")
	if err != nil || len(names) < 3 {
		t.Fatalf("package api has the files %q: %v", names, err)
	}
	for _, name := range names {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(name, "_test.go") {
			files = append(files, f)
		}
	}
	return files
}

// apiConstants are the constants of one type of package api, by name.
func apiConstants(t *testing.T, typeName string) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, f := range apiFiles(t) {
		ast.Inspect(f, func(n ast.Node) bool {
			if v, ok := n.(*ast.ValueSpec); ok && len(v.Values) == 1 {
				if id, ok := v.Type.(*ast.Ident); ok && id.Name == typeName {
					found[v.Names[0].Name], _ = strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
				}
			}
			return true
		})
	}
	if len(found) < 3 {
		t.Fatalf("package api has only %d constants of type %s", len(found), typeName)
	}
	return found
}

// apiTypes are the structs of package api. Entry encodes itself.
var apiTypes = []any{api.Member{}, api.MemberList{}, api.MemberAdd{}, api.MemberUpdate{}, api.LeaderTransfer{}, api.Status{}, api.Sizes{}, api.Peer{},
	api.List{}, api.Trailer{}, api.Deleted{}, api.Imported{}, api.History{}, api.Lease{}, api.TxnResult{}, api.OpResult{}, api.DeleteOp{}, api.GetResult{},
	api.Change{}, api.Event{}, api.Error{}}

// TestOpenAPISchemas: the schemas have the fields of the structs, with their types.
func TestOpenAPISchemas(t *testing.T) {
	d := loadOpenAPI(t)
	missing := map[string]bool{}
	for _, f := range apiFiles(t) {
		ast.Inspect(f, func(n ast.Node) bool {
			if s, ok := n.(*ast.TypeSpec); ok && s.Name.IsExported() && s.Name.Name != "Entry" {
				if _, ok := s.Type.(*ast.StructType); ok {
					missing[s.Name.Name] = true
				}
			}
			return true
		})
	}
	for _, v := range apiTypes {
		typ := reflect.TypeOf(v)
		delete(missing, typ.Name())
		schema, ok := d.Components.Schemas[typ.Name()]
		if !ok {
			t.Errorf("no schema %s", typ.Name())
			continue
		}
		var required []string
		fields := map[string]bool{}
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			fields[name] = true
			if options == "" {
				required = append(required, name)
			}
			p, ok := schema.Properties[name]
			if !ok {
				t.Errorf("the schema %s lacks %s", typ.Name(), name)
				continue
			}
			if got, want := d.schemaKind(p), goKind(f.Type); got != want {
				t.Errorf("%s.%s is %s, the schema says %s", typ.Name(), name, want, got)
			}
		}
		for name := range schema.Properties {
			if !fields[name] {
				t.Errorf("the schema %s has %s, the struct has not", typ.Name(), name)
			}
		}
		if !slices.Equal(slices.Sorted(slices.Values(required)), slices.Sorted(slices.Values(schema.Required))) {
			t.Errorf("the schema %s requires %q, the struct always has %q", typ.Name(), schema.Required, required)
		}
	}
	for name := range missing {
		t.Errorf("no row in apiTypes for api.%s", name)
	}
	fields := map[string]bool{}
	full := api.Entry{Key: "k", Value: []byte("v"), CreateRevision: 1, ModRevision: 2, Version: 3, Lease: 4, Expires: time.Unix(5, 0), Deleted: true}
	for _, e := range []api.Entry{full, {Key: "\xff", Value: []byte{0xff}, ModRevision: 1}} {
		var raw map[string]any
		text := e.AppendJSON(nil)
		if err := json.Unmarshal(text, &raw); err != nil {
			t.Fatal(err)
		}
		for name := range raw {
			fields[name] = true
		}
		if err := d.validate([]byte(`{"$ref":"#/components/schemas/Entry"}`), text); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	if got := d.Components.Schemas["Entry"].Properties; !slices.Equal(slices.Sorted(maps.Keys(fields)), slices.Sorted(maps.Keys(got))) {
		t.Errorf("the schema Entry has %q, an entry %q", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(fields)))
	}
}

func (d *openAPI) schemaKind(s openSchema) string {
	if name, ok := strings.CutPrefix(s.Ref, "#/components/schemas/"); ok {
		if r := d.Components.Schemas[name]; r.Type != "object" {
			return d.schemaKind(r)
		}
		return name
	}
	switch {
	case s.Type == "array" && s.Items != nil:
		return "array of " + d.schemaKind(*s.Items)
	case s.Type == "string" && s.Encoding != "":
		return s.Encoding
	case s.Format != "":
		return s.Format
	}
	return s.Type
}

func goKind(typ reflect.Type) string {
	switch {
	case typ == reflect.TypeFor[time.Time]():
		return "date-time"
	case typ == reflect.TypeFor[[]byte]():
		return "base64"
	}
	switch typ.Kind() {
	case reflect.Pointer:
		return goKind(typ.Elem())
	case reflect.Slice:
		return "array of " + goKind(typ.Elem())
	case reflect.Struct:
		return typ.Name()
	case reflect.Int64, reflect.Uint64:
		return typ.Kind().String()
	case reflect.Int:
		return "integer"
	case reflect.Bool:
		return "boolean"
	case reflect.Float64:
		return "number"
	}
	return typ.Kind().String()
}

// knownFields finds the fields in the refusal of an unknown one.
var knownFields = regexp.MustCompile(`; known are ([a-z0-9_, ]+)`)

// TestOpenAPIRequests: the bodies take the fields that their schemas have.
// Those with a struct in package api are compared by TestOpenAPISchemas too.
func TestOpenAPIRequests(t *testing.T) {
	d := loadOpenAPI(t)
	h := newTestAPI(&fakeBackend{}, testLimits()).Handler
	for _, row := range []struct{ schema, method, target, body string }{
		{"Txn", "POST", "/v1/txn", `{"nope":1}`},
		{"TxnCompare", "POST", "/v1/txn", `{"if":[{"nope":1}]}`},
		{"TxnOp", "POST", "/v1/txn", `{"then":[{"nope":1}]}`},
		{"TxnPut", "POST", "/v1/txn", `{"else":[{"put":{"nope":1}}]}`},
		{"TxnDelete", "POST", "/v1/txn", `{"then":[{"delete":{"nope":1}}]}`},
		{"TxnGet", "POST", "/v1/txn", `{"then":[{"get":{"nope":1}}]}`},
		{"ImportLine", "POST", "/v1/kv", `{"nope":1}`},
		{"LeaseGrant", "POST", "/v1/leases", `{"nope":1}`},
		{"LeaseKeepAlive", "PUT", "/v1/leases/3", `{"nope":1}`},
		{"MemberAdd", "POST", "/v1/members", `{"nope":1}`},
		{"MemberUpdate", "PUT", "/v1/members/3", `{"nope":1}`},
		{"LeaderTransfer", "POST", "/v1/leader", `{"nope":1}`},
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), row.method, row.target, strings.NewReader(row.body)))
		schema := d.Components.Schemas[row.schema]
		if w.Code != http.StatusBadRequest || !strings.Contains(w.Body.String(), "nope") {
			t.Errorf("%s %s %s: %d %s", row.method, row.target, row.body, w.Code, w.Body)
		}
		if schema.AllowMore == nil || *schema.AllowMore {
			t.Errorf("the schema %s takes any field, the server does not", row.schema)
		}
		m := knownFields.FindStringSubmatch(w.Body.String())
		if m == nil {
			continue // the cluster calls do not list them
		}
		known := slices.Sorted(strings.SplitSeq(m[1], ", "))
		if got := slices.Sorted(maps.Keys(schema.Properties)); !slices.Equal(got, known) {
			t.Errorf("the schema %s has %q, the server knows %q", row.schema, got, known)
		}
	}
	limits := []struct {
		name      string
		got, want any
	}{
		{"TxnGet.limit", *d.Components.Schemas["TxnGet"].Properties["limit"].Maximum, int64(kv.MaxTxnItems)},
		{"Txn.if", *d.Components.Schemas["Txn"].Properties["if"].MaxItems, maxTxnCompares},
		{"Txn.then", *d.Components.Schemas["Txn"].Properties["then"].MaxItems, maxTxnOps},
		{"Txn.else", *d.Components.Schemas["Txn"].Properties["else"].MaxItems, maxTxnOps},
		{"watch key", *d.Components.Parameters["watchKey"].Schema.MaxItems, maxWatchTerms},
		{"watch prefix", *d.Components.Parameters["watchPrefix"].Schema.MaxItems, maxWatchTerms},
	}
	for _, l := range limits {
		if l.got != l.want {
			t.Errorf("%s: the schema says %v, the server %v", l.name, l.got, l.want)
		}
	}
}

// TestOpenAPIExamples: every example is what its schema says.
func TestOpenAPIExamples(t *testing.T) {
	d := loadOpenAPI(t)
	examples := 0
	check := func(where string, content openContent) {
		t.Helper()
		for media, c := range content {
			if c.Example == nil || !strings.Contains(media, "json") {
				continue
			}
			examples++
			text, err := json.Marshal(c.Example)
			if err == nil {
				err = d.validate(c.Schema, text)
			}
			if err != nil {
				t.Errorf("%s, %s: %v", where, media, err)
			}
		}
	}
	for _, op := range d.ops {
		check(op.OperationID, op.RequestBody.Content)
		for status, r := range op.Responses {
			check(op.OperationID+" "+status, r.Content)
		}
		for _, p := range op.Parameters {
			if p.Example == nil {
				t.Errorf("%s: the parameter %s has no example", op.OperationID, p.Name)
			}
		}
	}
	if examples < 100 {
		t.Errorf("only %d examples", examples)
	}
}

// TestOpenAPIServed: the document is what the server serves.
func TestOpenAPIServed(t *testing.T) {
	h := newTestAPI(&fakeBackend{err: errStopping}, testLimits()).Handler
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, "/v1/openapi.json", http.NoBody))
		if w.Code != http.StatusOK || w.Header().Get("Content-Type") != "application/json" ||
			w.Header().Get("Content-Length") != strconv.Itoa(len(api.OpenAPI)) || !bytes.Equal(w.Body.Bytes(), api.OpenAPI) {
			t.Errorf("%s: %d %v, %d bytes", method, w.Code, w.Header(), w.Body.Len())
		}
	}
}
