package main

import (
	"encoding/base64"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// jsonReader reads one JSON text (RFC 8259) of a known shape. Whatever the shape
// does not have is an error that names its place, such as
// `then[2].put.vaule`: an unknown field, a field given twice, null, a value of
// another kind, text that is not UTF-8, half of a surrogate pair, and
// anything behind the text.
//
// The caller asks for the values in the order in which they come, so that
// nesting is as deep as its own code, and nothing is read that it does not
// want. Rejected: encoding/json, which lets most of the above pass, and whose
// token reader allocates for every token of an import of a million lines.
//
// The zero jsonReader with data set is ready. After an error it must not be used.
type jsonReader struct {
	data []byte
	pos  int
	path []jsonStep // where pos is; grows with the caller's own nesting only
	line int64      // of NDJSON, from 1: places begin with it; 0: data is all there is
}

// jsonStep is one step of a path: a field, or an element where name is empty.
type jsonStep struct {
	name  string
	index int
}

// place is the path as errors show it; empty at the top.
func (r *jsonReader) place() string {
	var b strings.Builder
	if r.line > 0 {
		b.WriteString(lineText(r.line))
		if len(r.path) > 0 {
			b.WriteString(": ")
		}
	}
	for i, s := range r.path {
		if s.name == "" {
			b.WriteString("[" + strconv.Itoa(s.index) + "]")
			continue
		}
		if i > 0 {
			b.WriteByte('.')
		}
		b.WriteString(s.name)
	}
	return b.String()
}

// bad is an error at the present place.
func (r *jsonReader) bad(what string) error {
	if at := r.place(); at != "" {
		return badRequest(at + ": " + what)
	}
	return badRequest("the body: " + what)
}

// wrong says that another kind of value was wanted.
func (r *jsonReader) wrong(want string) error {
	if r.peek(); r.pos == len(r.data) {
		return r.cut()
	}
	end := r.pos
	for end < len(r.data) && end < r.pos+24 && !strings.ContainsRune(" \t\r\n,]}", rune(r.data[end])) {
		end++
	}
	return r.bad("want " + want + ", not " + quoteShort(string(r.data[r.pos:max(end, r.pos+1)])))
}

func (r *jsonReader) cut() error { return r.bad("the JSON ends too early") }

// peek skips white space and returns the next byte, which it leaves; 0 at the end.
func (r *jsonReader) peek() byte {
	for ; r.pos < len(r.data); r.pos++ {
		switch c := r.data[r.pos]; c {
		case ' ', '\t', '\r', '\n':
		default:
			return c
		}
	}
	return 0
}

// take consumes c if it is next.
func (r *jsonReader) take(c byte) bool {
	if r.peek() != c {
		return false
	}
	r.pos++
	return true
}

// end makes sure that nothing follows.
func (r *jsonReader) end() error {
	if r.peek(); r.pos < len(r.data) {
		return r.bad("it goes on after the JSON value: " + quoteShort(string(r.data[r.pos:min(len(r.data), r.pos+24)])))
	}
	return nil
}

// jsonFields are the names of the fields that an object may have, at most 64.
type jsonFields []string

// jsonSeen tells which fields an object had.
type jsonSeen struct {
	fields jsonFields
	bits   uint64
}

// count is how many of the named fields were there.
func (s jsonSeen) count(names ...string) (n int) {
	for _, name := range names {
		if i := slices.Index(s.fields, name); i >= 0 && s.bits&(1<<i) != 0 {
			n++
		}
	}
	return n
}

// object reads an object. It calls f with the name of each field, and f reads
// the value.
func (r *jsonReader) object(fields jsonFields, f func(name string) error) (jsonSeen, error) {
	seen := jsonSeen{fields: fields}
	if !r.take('{') {
		return seen, r.wrong("an object")
	}
	if r.take('}') {
		return seen, nil
	}
	for {
		if r.peek() != '"' {
			return seen, r.wrong("a field name in double quotes")
		}
		name, err := r.text()
		if err != nil {
			return seen, err
		}
		i := slices.IndexFunc(fields, func(f string) bool { return f == string(name) })
		if i < 0 {
			return seen, r.unknown(name, fields)
		}
		r.path = append(r.path, jsonStep{name: fields[i]})
		if seen.bits&(1<<i) != 0 {
			return seen, r.bad("the field is given twice")
		}
		seen.bits |= 1 << i
		if !r.take(':') {
			return seen, r.wrong("a colon")
		}
		if err := f(fields[i]); err != nil {
			return seen, err
		}
		r.path = r.path[:len(r.path)-1]
		switch {
		case r.take(','):
		case r.take('}'):
			return seen, nil
		default:
			return seen, r.wrong("a comma or }")
		}
	}
}

// oneOf makes sure that of some fields of an object exactly one was there.
func (r *jsonReader) oneOf(seen jsonSeen, names ...string) error {
	if seen.count(names...) == 1 {
		return nil
	}
	return r.bad("want exactly one of the fields " + strings.Join(names, ", "))
}

// unknown names the field with its whole path, as far as it is short.
func (r *jsonReader) unknown(name []byte, fields jsonFields) error {
	known := "; known are " + strings.Join(fields, ", ")
	shown := string(name)
	if len(shown) > 64 || strconv.Quote(shown) != `"`+shown+`"` || shown == "" {
		return r.bad("unknown field " + quoteShort(shown) + known)
	}
	r.path = append(r.path, jsonStep{name: shown})
	return badRequest(r.place() + ": unknown field" + known)
}

// array reads an array. It calls f for each element, which f reads.
func (r *jsonReader) array(f func(i int) error) error {
	if !r.take('[') {
		return r.wrong("an array")
	}
	if r.take(']') {
		return nil
	}
	for i := 0; ; i++ {
		r.path = append(r.path, jsonStep{index: i})
		if err := f(i); err != nil {
			return err
		}
		r.path = r.path[:len(r.path)-1]
		switch {
		case r.take(','):
		case r.take(']'):
			return nil
		default:
			return r.wrong("a comma or ]")
		}
	}
}

// text reads a string. What it returns may be part of data.
func (r *jsonReader) text() ([]byte, error) {
	if !r.take('"') {
		return nil, r.wrong("a string")
	}
	start := r.pos
	for ; r.pos < len(r.data); r.pos++ {
		switch c := r.data[r.pos]; {
		case c == '"':
			s := r.data[start:r.pos]
			r.pos++
			if !utf8.Valid(s) {
				return nil, r.bad("the string is not valid UTF-8; send such bytes as base64 in key_b64 or value_b64")
			}
			return s, nil
		case c == '\\':
			return r.escaped(start)
		case c < ' ':
			return nil, r.bad("the string has a control character that is not escaped")
		}
	}
	return nil, r.cut()
}

// escaped goes on with a string whose first escape is at pos.
func (r *jsonReader) escaped(start int) ([]byte, error) {
	s := slices.Clone(r.data[start:r.pos])
	for r.pos < len(r.data) {
		c := r.data[r.pos]
		r.pos++
		switch {
		case c == '"':
			if !utf8.Valid(s) {
				return nil, r.bad("the string is not valid UTF-8; send such bytes as base64 in key_b64 or value_b64")
			}
			return s, nil
		case c == '\\':
			var err error
			if s, err = r.escape(s); err != nil {
				return nil, err
			}
		case c < ' ':
			return nil, r.bad("the string has a control character that is not escaped")
		default:
			s = append(s, c)
		}
	}
	return nil, r.cut()
}

// escape appends what stands behind a backslash.
func (r *jsonReader) escape(s []byte) ([]byte, error) {
	if r.pos == len(r.data) {
		return nil, r.cut()
	}
	c := r.data[r.pos]
	r.pos++
	switch c {
	case '"', '\\', '/':
		return append(s, c), nil
	case 'b':
		return append(s, '\b'), nil
	case 'f':
		return append(s, '\f'), nil
	case 'n':
		return append(s, '\n'), nil
	case 'r':
		return append(s, '\r'), nil
	case 't':
		return append(s, '\t'), nil
	case 'u':
		return r.unicode(s)
	}
	return nil, r.bad("the string has an unknown escape " + quoteShort(`\`+string(rune(c))))
}

// unicode appends the character of one \uXXXX, or of two that are a surrogate
// pair. Half a pair stands for no character; replacing it would change a key
// without a word.
func (r *jsonReader) unicode(s []byte) ([]byte, error) {
	c, ok := r.hex4()
	if ok && utf16.IsSurrogate(c) {
		ok = r.pos+1 < len(r.data) && r.data[r.pos] == '\\' && r.data[r.pos+1] == 'u'
		if ok {
			r.pos += 2
			var low rune
			if low, ok = r.hex4(); ok {
				c = utf16.DecodeRune(c, low)
				ok = c != utf8.RuneError
			}
		}
	}
	if !ok {
		return nil, r.bad(`the string has a \u escape that stands for no character`)
	}
	return utf8.AppendRune(s, c), nil
}

func (r *jsonReader) hex4() (rune, bool) {
	if r.pos+4 > len(r.data) {
		return 0, false
	}
	n := rune(0)
	for _, c := range r.data[r.pos : r.pos+4] {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		n = n<<4 | rune(c)
	}
	r.pos += 4
	return n, true
}

// base64 reads a string of base64 (RFC 4648, section 4): padded, no line breaks.
func (r *jsonReader) base64() ([]byte, error) {
	s, err := r.text()
	if err != nil {
		return nil, err
	}
	b := make([]byte, base64.StdEncoding.DecodedLen(len(s)))
	n, err := base64.StdEncoding.Strict().Decode(b, s)
	if err != nil || slices.Contains(s, '\n') || slices.Contains(s, '\r') {
		return nil, r.bad("want base64 with + and /, padding and no line breaks, not " + quoteShort(string(s)))
	}
	return b[:n], nil
}

// integer reads a whole number from least to most.
func (r *jsonReader) integer(least, most int64) (int64, error) {
	want := "a whole number from " + strconv.FormatInt(least, 10)
	if c := r.peek(); c != '-' && (c < '0' || c > '9') {
		return 0, r.wrong(want)
	}
	end := r.pos
	for end < len(r.data) && strings.IndexByte("+-.eE0123456789", r.data[end]) >= 0 {
		end++
	}
	s := string(r.data[r.pos:end])
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || strconv.FormatInt(n, 10) != s || n < least { // the way back finds leading zeros and -0
		return 0, r.wrong(want)
	}
	if n > most {
		return 0, r.wrong(want + " to " + strconv.FormatInt(most, 10))
	}
	r.pos = end
	return n, nil
}

func (r *jsonReader) boolean() (bool, error) {
	r.peek()
	for _, word := range [...]string{"true", "false"} {
		if end := r.pos + len(word); end <= len(r.data) && string(r.data[r.pos:end]) == word {
			r.pos = end
			return word == "true", nil
		}
	}
	return false, r.wrong("true or false")
}

// lease reads the id of a lease: a string, since readers that keep numbers as
// floating point would lose digits of large ones.
func (r *jsonReader) lease() (int64, error) {
	const want = `the id of a lease as a string of decimal digits, such as "7"`
	if r.peek() != '"' {
		return 0, r.wrong(want)
	}
	s, err := r.text()
	if err != nil {
		return 0, err
	}
	id, ok := parseLeaseID(string(s))
	if !ok {
		return 0, r.bad("want " + want + ", not " + quoteShort(string(s)))
	}
	return id, nil
}

// ttl reads a duration under the same rules as ttl= in a query.
func (r *jsonReader) ttl() (time.Duration, error) {
	s, err := r.text()
	if err != nil {
		return 0, err
	}
	d, err := time.ParseDuration(string(s))
	if err != nil || d < minTTL || d > maxTTL || d%time.Millisecond != 0 {
		return 0, r.bad("want " + wantTTL + ", not " + quoteShort(string(s)))
	}
	return d, nil
}

// key reads a key of 1 to limit bytes, as text or as base64.
func (r *jsonReader) key(asBase64 bool, limit int) (string, error) {
	k, err := r.bytes(asBase64)
	switch {
	case err != nil:
		return "", err
	case len(k) == 0:
		return "", r.bad("the key is empty")
	case len(k) > limit:
		return "", &httpRefusal{err: errKeyTooLong, detail: r.place() + ": the key has " + strconv.Itoa(len(k)) +
			" bytes; the limit is " + strconv.Itoa(limit)}
	}
	return string(k), nil
}

// value reads a value of at most limit bytes, which may be part of data. It is
// never nil.
func (r *jsonReader) value(asBase64 bool, limit int64) ([]byte, error) {
	v, err := r.bytes(asBase64)
	if err == nil && int64(len(v)) > limit {
		err = &httpRefusal{err: errTooLarge, detail: r.place() + ": the value has " + strconv.Itoa(len(v)) +
			" bytes; the limit is " + strconv.FormatInt(limit, 10)}
	}
	return v, err
}

func (r *jsonReader) bytes(asBase64 bool) ([]byte, error) {
	if asBase64 {
		return r.base64()
	}
	return r.text()
}
