package sim

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// Line is one event of a run.
type Line struct {
	At      time.Duration
	Who     uint64
	What    string
	A, B, C uint64 // what they mean depends on What
	Text    string // may be empty
}

func (l Line) String() string {
	return strings.TrimRight(fmt.Sprintf("%12.6f  %2d  %-22s %6d %6d %6d  %s", l.At.Seconds(), l.Who, l.What, l.A, l.B, l.C, l.Text), " ")
}

// Trace hashes all lines and keeps the last ones.
type Trace struct {
	All  io.Writer // gets each line as text; nil: nobody
	keep int
	hash uint64
	n    uint64
	ring []Line
}

// NewTrace returns a trace that keeps so many lines.
func NewTrace(keep int) *Trace { return &Trace{keep: keep, hash: 14695981039346656037} }

// Add takes in one line.
func (t *Trace) Add(l Line) {
	for _, v := range [...]uint64{uint64(l.At), l.Who, l.A, l.B, l.C} {
		t.mix(v)
	}
	for _, s := range [...]string{l.What, l.Text} {
		for i := range len(s) {
			t.mix(uint64(s[i]))
		}
	}
	if len(t.ring) < t.keep {
		t.ring = append(t.ring, l)
	} else if t.keep > 0 {
		t.ring[t.n%uint64(t.keep)] = l
	}
	t.n++
	if t.All != nil {
		fmt.Fprintln(t.All, l)
	}
}

// mix is FNV-1a over words instead of bytes, with a shift that brings the high
// bits down.
func (t *Trace) mix(v uint64) {
	t.hash = (t.hash ^ v) * 1099511628211
	t.hash ^= t.hash >> 29
}

// Hash is a digest of all lines in their order.
func (t *Trace) Hash() uint64 { return t.hash }

// Len is how many lines there were.
func (t *Trace) Len() uint64 { return t.n }

// Last returns the lines that were kept, oldest first.
func (t *Trace) Last() []Line {
	if t.n <= uint64(len(t.ring)) {
		return slices.Clone(t.ring)
	}
	at := int(t.n % uint64(t.keep))
	return append(slices.Clone(t.ring[at:]), t.ring[:at]...)
}

// Cover counts the situations that runs were in, by name.
type Cover map[string]int

// Hit counts one.
func (c Cover) Hit(marker string) { c[marker]++ }

// Add takes in the counts of another.
func (c Cover) Add(o Cover) {
	for m, n := range o {
		c[m] += n
	}
}

// Missing are those of the wanted markers that were never hit, sorted.
func (c Cover) Missing(wanted []string) []string {
	missing := slices.DeleteFunc(slices.Clone(wanted), func(m string) bool { return c[m] > 0 })
	slices.Sort(missing)
	return missing
}

// Names are the markers that were hit, sorted.
func (c Cover) Names() []string { return slices.Sorted(maps.Keys(c)) }
