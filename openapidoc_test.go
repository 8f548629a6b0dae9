package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"pontoon/api"
)

// The document as the tests read it: operations with all references resolved,
// and a validator for its schemas.

// openAPI is the document as far as tests look at it.
type openAPI struct {
	OpenAPI    string
	Paths      map[string]map[string]json.RawMessage
	Components struct {
		Schemas    map[string]openSchema
		Parameters map[string]*openParameter
		Headers    map[string]*openHeader
		Responses  map[string]*openResponse
	}

	ops      []*openOperation
	schemas  *jsonschema.Compiler
	compiled map[string]*jsonschema.Schema // by their JSON
}

type openSchema struct {
	Ref        string `json:"$ref"`
	Type       string
	Format     string
	Pattern    string
	Enum       []any
	Const      any
	Minimum    *int64
	Maximum    *int64
	MinLength  *int
	MaxLength  *int
	MaxItems   *int
	Required   []string
	Items      *openSchema
	Properties map[string]openSchema
	AllowMore  *bool  `json:"additionalProperties"`
	Encoding   string `json:"contentEncoding"`
}

type openParameter struct {
	Ref     string `json:"$ref"`
	Name    string
	In      string
	Schema  openSchema
	Example any
}

type openHeader struct {
	Ref      string `json:"$ref"`
	Required bool
}

type openContent map[string]struct {
	Schema  json.RawMessage
	Example any
}

type openResponse struct {
	Ref     string `json:"$ref"`
	Headers map[string]*openHeader
	Content openContent
}

// openOperation is one method of one path; references are resolved.
type openOperation struct {
	path, method string // as the document has them
	route        route
	at           string // JSON pointer

	OperationID string
	Summary     string
	Tags        []string
	Parameters  []*openParameter // those of the path included
	RequestBody struct {
		Required bool
		Content  openContent
	}
	Responses map[string]*openResponse
}

// target is a request target of the operation.
func (o *openOperation) target() string {
	key := "k"
	if o.method == http.MethodPost || o.method == http.MethodDelete {
		key = "3" // at the root these are about members
	}
	return strings.NewReplacer("{key}", key, "{id}", "3").Replace(o.path)
}

// response is what the document says of a status; nil: nothing.
func (o *openOperation) response(status int) *openResponse {
	return o.Responses[strconv.Itoa(status)]
}

func loadOpenAPI(t testing.TB) *openAPI {
	t.Helper()
	d := &openAPI{schemas: jsonschema.NewCompiler(), compiled: map[string]*jsonschema.Schema{}}
	if err := json.Unmarshal(api.OpenAPI, d); err != nil {
		t.Fatalf("api/openapi.json: %v", err)
	}
	parsed, err := jsonschema.UnmarshalJSON(bytes.NewReader(api.OpenAPI))
	if err == nil {
		err = d.schemas.AddResource("openapi.json", parsed)
	}
	if err != nil {
		t.Fatal(err)
	}
	d.schemas.AssertFormat()
	d.schemas.AssertContent()
	for _, path := range slices.Sorted(maps.Keys(d.Paths)) {
		item := d.Paths[path]
		var shared []*openParameter
		if raw := item["parameters"]; raw != nil {
			if err := json.Unmarshal(raw, &shared); err != nil {
				t.Fatalf("%s: %v", path, err)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(item)) {
			if name == "parameters" || name == "description" {
				continue
			}
			op := &openOperation{path: path, method: strings.ToUpper(name),
				at: "/paths/" + strings.ReplaceAll(path, "/", "~1") + "/" + name}
			if methodIndex(op.method) == 0 {
				t.Fatalf("%s has %q, which is no method", path, name)
			}
			if err := json.Unmarshal(item[name], op); err != nil {
				t.Fatalf("%s %s: %v", op.method, path, err)
			}
			d.resolve(t, op, shared)
			op.route, _ = resolve(op.method, op.target())
			d.ops = append(d.ops, op)
		}
	}
	return d
}

// resolve follows the references of an operation, and adds the parameters of
// its path that it does not have itself.
func (d *openAPI) resolve(t testing.TB, op *openOperation, shared []*openParameter) {
	t.Helper()
	has := map[string]bool{}
	all := op.Parameters
	op.Parameters = nil
	for i, p := range append(slices.Clone(all), shared...) {
		if p.Ref != "" {
			p = d.Components.Parameters[strings.TrimPrefix(p.Ref, "#/components/parameters/")]
		}
		if p == nil {
			t.Fatalf("%s: parameter %d refers to nothing", op.at, i)
		}
		if s := p.Schema.Ref; s != "" {
			resolved := *p
			resolved.Schema = d.Components.Schemas[strings.TrimPrefix(s, "#/components/schemas/")]
			p = &resolved
		}
		switch id := p.In + " " + p.Name; {
		case has[id] && i < len(all):
			t.Errorf("%s has the parameter %s twice", op.at, id)
		case !has[id]:
			has[id] = true
			op.Parameters = append(op.Parameters, p)
		}
	}
	for status, r := range op.Responses {
		if r.Ref != "" {
			r = d.Components.Responses[strings.TrimPrefix(r.Ref, "#/components/responses/")]
		}
		if r == nil {
			t.Fatalf("%s: response %s refers to nothing", op.at, status)
		}
		resolved := *r
		resolved.Headers = map[string]*openHeader{}
		for name, h := range r.Headers {
			if h.Ref != "" {
				h = d.Components.Headers[strings.TrimPrefix(h.Ref, "#/components/headers/")]
			}
			if h == nil {
				t.Fatalf("%s: header %s of response %s refers to nothing", op.at, name, status)
			}
			resolved.Headers[http.CanonicalHeaderKey(name)] = h
		}
		op.Responses[status] = &resolved
	}
}

// find is the operation that answers a request; nil: none.
func (d *openAPI) find(method, path string) *openOperation {
	rt, _ := resolve(method, path)
	for _, op := range d.ops {
		if op.route == rt && op.method == method {
			return op
		}
	}
	return nil
}

// validate holds one JSON value against a schema, which may refer to others of
// the document.
func (d *openAPI) validate(schema json.RawMessage, body []byte) error {
	compiled := d.compiled[string(schema)]
	if compiled == nil {
		text := strings.ReplaceAll(string(schema), `"#/`, `"openapi.json#/`)
		name := "schema-" + strconv.Itoa(len(d.compiled)) + ".json"
		parsed, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
		if err == nil {
			err = d.schemas.AddResource(name, parsed)
		}
		if err == nil {
			compiled, err = d.schemas.Compile(name)
		}
		if err != nil {
			return err
		}
		d.compiled[string(schema)] = compiled
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%w in %s", err, body)
	}
	return compiled.Validate(value)
}
