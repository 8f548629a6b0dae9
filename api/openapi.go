package api

import _ "embed"

// OpenAPI describes every call of the server as an OpenAPI 3.1 document in
// JSON. It must not be written to.
//
//go:embed openapi.json
var OpenAPI []byte
