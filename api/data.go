package api

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"
	"unicode/utf8"
)

// Entry is one key as answers and watches show it. In JSON, key and value are
// text where the bytes are valid UTF-8 ("key", "value") and base64 where they
// are not ("key_b64", "value_b64").
type Entry struct {
	Key            string
	Value          []byte // nil: not shown, as in lists of keys only and in the event of a delete
	CreateRevision int64
	ModRevision    int64
	Version        int64     // puts since the key was created, from 1
	Lease          int64     // 0: none; in JSON a string of decimal digits
	Expires        time.Time // zero: never; in JSON RFC 3339 in UTC
	Deleted        bool      // in the history of a key: it was deleted at ModRevision
}

// AppendJSON appends the JSON object of the entry to dst.
func (e *Entry) AppendJSON(dst []byte) []byte { return e.StreamJSON(dst, nil) }

// StreamJSON is AppendJSON that need not hold all of a large value: every few
// kilobytes of it, spill gets what dst has become, may send it, and returns what to
// append to. A nil spill takes nothing.
func (e *Entry) StreamJSON(dst []byte, spill func([]byte) []byte) []byte {
	dst = AppendBytes(append(dst, '{'), "key", e.Key)
	if e.Value != nil {
		dst = streamBytes(append(dst, ','), "value", e.Value, spill)
	}
	for _, f := range [...]struct {
		name  string
		value int64
	}{{`,"create_revision":`, e.CreateRevision}, {`,"mod_revision":`, e.ModRevision}, {`,"version":`, e.Version}} {
		if f.value != 0 {
			dst = strconv.AppendInt(append(dst, f.name...), f.value, 10)
		}
	}
	if e.Lease != 0 {
		dst = strconv.AppendInt(append(dst, `,"lease":"`...), e.Lease, 10)
		dst = append(dst, '"')
	}
	if !e.Expires.IsZero() {
		dst = append(dst, `,"expires":"`...)
		dst = e.Expires.UTC().AppendFormat(dst, time.RFC3339Nano)
		dst = append(dst, '"')
	}
	if e.Deleted {
		dst = append(dst, `,"deleted":true`...)
	}
	return append(dst, '}')
}

// AppendBytes appends a JSON member, `"name":"text"` where b is valid UTF-8,
// else `"name_b64":"base64"`.
func AppendBytes[T string | []byte](dst []byte, name string, b T) []byte {
	dst = append(append(dst, '"'), name...)
	if isText(b) {
		return AppendString(append(dst, `":`...), b)
	}
	dst = append(dst, `_b64":"`...)
	dst = base64.StdEncoding.AppendEncode(dst, []byte(b))
	return append(dst, '"')
}

// spillEvery is a multiple of 3, so that the base64 of the parts is that of the whole.
const spillEvery = 3 << 9

// streamBytes is AppendBytes in parts.
func streamBytes(dst []byte, name string, b []byte, spill func([]byte) []byte) []byte {
	if spill == nil || len(b) <= spillEvery {
		return AppendBytes(dst, name, b)
	}
	dst = append(append(dst, '"'), name...)
	encode := appendEscaped[[]byte]
	if isText(b) {
		dst = append(dst, `":"`...)
	} else {
		dst = append(dst, `_b64":"`...)
		encode = base64.StdEncoding.AppendEncode
	}
	for ; len(b) > spillEvery; b = b[spillEvery:] {
		dst = spill(encode(dst, b[:spillEvery]))
	}
	return append(encode(dst, b), '"')
}

// isText does without a conversion, which would copy a value to look at it.
func isText[T string | []byte](b T) bool {
	switch b := any(b).(type) {
	case string:
		return utf8.ValidString(b)
	case []byte:
		return utf8.Valid(b)
	}
	return false
}

const hexDigits = "0123456789abcdef"

// AppendString appends s, which is valid UTF-8, as a JSON string (RFC 8259,
// section 7). Only what must be escaped is.
func AppendString[T string | []byte](dst []byte, s T) []byte {
	return append(appendEscaped(append(dst, '"'), s), '"')
}

// appendEscaped appends what stands between the quotes. It looks at single bytes, so
// that it may be called with any part of a text.
func appendEscaped[T string | []byte](dst []byte, s T) []byte {
	plain := 0 // start of the bytes that are not copied yet
	for i := range len(s) {
		c := s[i]
		if c >= 0x20 && c != '"' && c != '\\' && c != 0x7f {
			continue
		}
		dst = append(dst, s[plain:i]...)
		plain = i + 1
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		case '\n':
			dst = append(dst, '\\', 'n')
		case '\r':
			dst = append(dst, '\\', 'r')
		case '\t':
			dst = append(dst, '\\', 't')
		default:
			dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
	}
	return append(dst, s[plain:]...)
}

// MarshalJSON implements json.Marshaler.
func (e Entry) MarshalJSON() ([]byte, error) { return e.AppendJSON(nil), nil }

// UnmarshalJSON implements json.Unmarshaler. Fields of later versions are ignored.
func (e *Entry) UnmarshalJSON(data []byte) error {
	var raw struct {
		Key            *string   `json:"key"`
		KeyB64         []byte    `json:"key_b64"`
		Value          *string   `json:"value"`
		ValueB64       []byte    `json:"value_b64"`
		CreateRevision int64     `json:"create_revision"`
		ModRevision    int64     `json:"mod_revision"`
		Version        int64     `json:"version"`
		Lease          string    `json:"lease"`
		Expires        time.Time `json:"expires"`
		Deleted        bool      `json:"deleted"`
	}
	if err := json.Unmarshal(data, &raw); err != nil {
		return err
	}
	*e = Entry{Key: string(raw.KeyB64), Value: raw.ValueB64, CreateRevision: raw.CreateRevision, ModRevision: raw.ModRevision,
		Version: raw.Version, Expires: raw.Expires, Deleted: raw.Deleted}
	switch {
	case raw.Key != nil && raw.KeyB64 != nil, raw.Value != nil && raw.ValueB64 != nil:
		return errors.New("api: an entry has text and base64 of the same field")
	case raw.Key != nil:
		e.Key = *raw.Key
	}
	if raw.Value != nil {
		e.Value = []byte(*raw.Value)
	}
	if raw.Lease != "" {
		id, err := strconv.ParseInt(raw.Lease, 10, 64)
		if err != nil || id < 1 {
			return fmt.Errorf("api: %q is no lease id", raw.Lease)
		}
		e.Lease = id
	}
	return nil
}

// List is the answer to GET /v1/kv.
type List struct {
	Revision int64    `json:"revision"` // of every page of a walk
	Count    int      `json:"count"`    // keys that match, on all pages together
	Items    []Entry  `json:"items"`
	Prefixes []string `json:"prefixes"`       // what delimiter= rolled up; those that are not UTF-8 are in PrefixesB64
	Next     string   `json:"next,omitempty"` // for after=; absent on the last page

	PrefixesB64 [][]byte `json:"prefixes_b64,omitempty"`
}

// Trailer is the last line of an export.
type Trailer struct {
	End      bool  `json:"end"` // true
	Items    int64 `json:"items"`
	Revision int64 `json:"revision"`
}

// Deleted is the answer to DELETE /v1/kv.
type Deleted struct {
	Deleted  int64 `json:"deleted"`
	Revision int64 `json:"revision"`
}

// Imported is the answer to POST /v1/kv.
type Imported struct {
	Put      int64 `json:"put"`
	Deleted  int64 `json:"deleted"` // keys that were there
	Skipped  int64 `json:"skipped"` // with mode=create: keys that were there
	Revision int64 `json:"revision"`
}

// History is the answer to GET /v1/kv/{key}?history=N, newest first.
type History struct {
	Revision        int64   `json:"revision"`
	CompactRevision int64   `json:"compact_revision"` // changes up to this one are no longer known; 0: all are
	Items           []Entry `json:"items"`
}

// Lease is a lease as its calls answer it. Durations are Go's, such as "29.5s".
type Lease struct {
	ID        string   `json:"id"` // decimal digits
	TTL       string   `json:"ttl"`
	Remaining string   `json:"remaining"` // until it ends, unless it is kept alive
	Keys      []string `json:"keys"`      // attached to it, the first 1,000; those that are not UTF-8 are in KeysB64
	KeyCount  int      `json:"key_count"` // all of them

	KeysB64 [][]byte `json:"keys_b64,omitempty"`
}

// TxnResult is the answer to POST /v1/txn.
type TxnResult struct {
	Succeeded bool       `json:"succeeded"` // the comparisons held, so `then` ran; else `else` did
	Revision  int64      `json:"revision"`  // of the store after it
	Results   []OpResult `json:"results"`   // one an operation, in order
}

// OpResult is the outcome of one operation; the field that is set tells its kind.
type OpResult struct {
	Put    *Entry     `json:"put,omitempty"` // as stored, without the value
	Delete *DeleteOp  `json:"delete,omitempty"`
	Get    *GetResult `json:"get,omitempty"`
}

// DeleteOp is the outcome of a delete inside a transaction.
type DeleteOp struct {
	Deleted int64 `json:"deleted"`
}

// GetResult is the outcome of a get inside a transaction.
type GetResult struct {
	Count int     `json:"count"` // keys that match, whatever the limit
	Items []Entry `json:"items"`
}

// Change is one message of a watch: all events of one revision, or one of the
// other kinds. In NDJSON it is a line, in an event stream (SSE) the data of an event.
type Change struct {
	// Revision of the events. A watch that was cut goes on with
	// Last-Event-ID: Revision.
	Revision int64   `json:"revision"`
	Events   []Event `json:"events,omitempty"`
	// Initial: the events are entries that were there when the watch began
	// (initial=true), and Revision is the store's at that moment. More says
	// that another such message follows; a watch that is cut before the last
	// one begins anew.
	Initial bool `json:"initial,omitempty"`
	More    bool `json:"more,omitempty"`
	// Progress: nothing else up to Revision concerns this watch.
	Progress bool `json:"progress,omitempty"`
	// Overflow ends a watch that could not keep up: it goes on with
	// Last-Event-ID: Revision.
	Overflow bool `json:"overflow,omitempty"`
	// Compacted ends a watch that fell so far behind that changes are gone for
	// good: list anew. Changes up to CompactRevision are no longer known.
	Compacted       bool  `json:"compacted,omitempty"`
	CompactRevision int64 `json:"compact_revision,omitempty"`
}

// Event is one change of one key.
type Event struct {
	Type  string `json:"type"`           // EventPut or EventDelete
	Entry Entry  `json:"entry"`          // of a delete: key and revision
	Prev  *Entry `json:"prev,omitempty"` // what was there before, with prev=true
}

// The types of events.
const (
	EventPut    = "put"
	EventDelete = "delete"
)
