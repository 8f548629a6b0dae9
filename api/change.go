package api

import "strconv"

// AppendJSON appends the JSON object of the change to dst: what
// encoding/json makes of it, without its cost.
func (c *Change) AppendJSON(dst []byte) []byte {
	dst = strconv.AppendInt(append(dst, `{"revision":`...), c.Revision, 10)
	if len(c.Events) > 0 {
		dst = append(dst, `,"events":`...)
		sep := byte('[')
		for i := range c.Events {
			dst = c.Events[i].AppendJSON(append(dst, sep))
			sep = ','
		}
		dst = append(dst, ']')
	}
	for _, f := range [...]struct {
		name string
		set  bool
	}{{"initial", c.Initial}, {"more", c.More}, {"progress", c.Progress}, {"overflow", c.Overflow}, {"compacted", c.Compacted}} {
		if f.set {
			dst = append(append(append(dst, `,"`...), f.name...), `":true`...)
		}
	}
	if c.CompactRevision != 0 {
		dst = strconv.AppendInt(append(dst, `,"compact_revision":`...), c.CompactRevision, 10)
	}
	return append(dst, '}')
}

// AppendJSON appends the JSON object of the event to dst.
func (e *Event) AppendJSON(dst []byte) []byte { return e.StreamJSON(dst, nil) }

// StreamJSON is AppendJSON that need not hold all of it, as [Entry.StreamJSON].
func (e *Event) StreamJSON(dst []byte, spill func([]byte) []byte) []byte {
	dst = AppendString(append(dst, `{"type":`...), e.Type)
	dst = e.Entry.StreamJSON(append(dst, `,"entry":`...), spill)
	if e.Prev != nil {
		dst = e.Prev.StreamJSON(append(dst, `,"prev":`...), spill)
	}
	return append(dst, '}')
}
