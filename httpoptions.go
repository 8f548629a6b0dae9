package main

import (
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Options of a call: the query string and the headers that change what it does.
// What is unknown, malformed or contradictory is refused by name, never ignored.

// optionSet lists the query options a call takes besides timeout=.
type optionSet uint8

const (
	optTimeout optionSet = 1 << iota // every call
	optConsistency
	optMinRevision
	optForce
	optVerbose
	optRead = optConsistency | optMinRevision
)

func isUnbuiltOption(name string) bool {
	switch name {
	case "revision", "history", "ttl", "lease", "prefix", "start", "end", "limit", "after", "reverse",
		"keys", "count", "delimiter", "all", "atomic", "mode":
		return true
	}
	return false
}

// Parts of the contract that this version does not serve. They are refused by
// name: a write that ignored a precondition would be worse than none.
var unbuiltHeaders = [...]string{"If-Match", "If-None-Match", "Idempotency-Key", "Prefer"}

// parseOptions reads the query and refuses every option and header that this
// call would otherwise ignore.
func (c *apiCall) parseOptions(takes optionSet) error {
	for _, name := range unbuiltHeaders {
		if c.r.Header[name] != nil {
			return &httpRefusal{err: errUnsupported, detail: "this version does not serve the header " + name}
		}
	}
	if c.r.URL.RawQuery == "" {
		return nil
	}
	var seen optionSet
	for piece := range strings.SplitSeq(c.r.URL.RawQuery, "&") {
		if piece == "" {
			continue
		}
		rawName, rawValue, hasValue := strings.Cut(piece, "=")
		name, err1 := url.QueryUnescape(rawName)
		value, err2 := url.QueryUnescape(rawValue)
		if err1 != nil || err2 != nil {
			return badRequest("query option " + quoteShort(piece) + " is not valid percent-encoding")
		}
		opt, err := c.parseOption(takes|optTimeout, name, value, hasValue)
		if err != nil {
			return err
		}
		if seen&opt != 0 {
			return badRequest("query option " + name + " is given twice")
		}
		seen |= opt
	}
	return nil
}

// parseOption takes one option into c and tells which one it was.
func (c *apiCall) parseOption(takes optionSet, name, value string, hasValue bool) (optionSet, error) {
	opt, want, ok := optionSet(0), "", false
	switch name {
	case "timeout":
		opt, want = optTimeout, "a duration such as 5s, above 0 and at most "+c.api.l.MaxTimeout.String()
		var d time.Duration
		d, ok = parseTimeout(value, c.api.l.MaxTimeout)
		c.deadline = c.start.Add(d)
	case "consistency":
		opt, want = optConsistency, "linearizable or stale"
		c.read.stale = value == "stale"
		ok = c.read.stale || value == "linearizable"
	case "min_revision":
		opt, want = optMinRevision, "a revision, a whole number from 0"
		var n uint64
		var err error
		n, err = strconv.ParseUint(value, 10, 63)
		c.read.minRevision, ok = int64(n), err == nil
	case "force":
		opt, want = optForce, "true or false"
		c.force = value == "true"
		ok = c.force || value == "false"
	case "verbose":
		opt, want = optVerbose, "true, false or no value"
		c.verbose = !hasValue || value == "" || value == "true"
		ok = c.verbose || value == "false"
	}
	switch {
	case takes&opt != 0 && ok:
		return opt, nil
	case takes&opt != 0:
		return 0, badRequest("query option " + name + "=" + quoteShort(value) + ": want " + want)
	case isUnbuiltOption(name) && (c.route == routeKey || c.route == routeKV):
		return 0, &httpRefusal{err: errUnsupported, detail: "this version does not serve the query option " + name}
	}
	return 0, badRequest("query option " + quoteShort(name) + " is none of this call")
}

func parseTimeout(s string, most time.Duration) (time.Duration, bool) {
	d, err := time.ParseDuration(s)
	return d, err == nil && d > 0 && d <= most
}

// quoteShort shows what a client sent: printable, and never all of it.
func quoteShort(s string) string {
	if len(s) > 64 {
		s = s[:64] + "…"
	}
	return strconv.QuoteToASCII(s)
}
