package main

import (
	"math"
	"net/url"
	"strconv"
	"strings"
	"time"

	"pontoon/kv"
)

// Options of a call: the query string and the headers that change what it does.
// What is unknown, malformed or contradictory is refused by name, never ignored.

// optionSet names the query options and headers that a call takes besides
// timeout=.
type optionSet uint64

const (
	optTimeout optionSet = 1 << iota // every call
	optConsistency
	optMinRevision
	optRevision
	optHistory
	optForce
	optVerbose
	optTTL
	optLease
	optPrefix
	optStart
	optEnd
	optLimit
	optAfter
	optReverse
	optKeys
	optCount
	optDelimiter
	optAll
	optAtomic
	optMode
	optWatchKey    // key=, any number of times
	optWatchPrefix // prefix=, any number of times
	optFrom
	optInitial
	optPrev
	optEvents
	optProgress

	optIfMatch     // If-Match
	optIfNoneMatch // If-None-Match
	optIdempotency // Idempotency-Key
	optPreferWait  // Prefer: wait=
	optPreferEcho  // Prefer: return=
	optLastEventID // Last-Event-ID

	optRead = optConsistency | optMinRevision
	optSpan = optPrefix | optStart | optEnd
	optCAS  = optIfMatch | optIfNoneMatch | optIdempotency
)

// callOptions are the options of one call, parsed. What was not given is zero,
// or false in given.
type callOptions struct {
	given optionSet

	force, verbose bool

	history   int           // versions of a key, newest first
	ttl       time.Duration // minTTL to maxTTL
	lease     int64
	span      kv.Span // of prefix=, or start= and end=; everything if none is given
	prefix    string
	limit     int
	after     string // a cursor, not decoded
	reverse   bool
	keys      bool // keys only
	count     bool // the number only
	delimiter string
	all       bool
	atomic    bool
	create    bool // mode=create

	watchKeys     []string
	watchPrefixes []string
	from          int64 // the first revision to send; Last-Event-ID + 1 wins over from=
	initial, prev bool
	noPuts        bool // events= left them out
	noDeletes     bool
	progress      time.Duration // 0: none

	check       kv.Precondition // If-Match or If-None-Match of a write
	noneMatch   kv.Precondition // If-None-Match of a read: CheckAbsent for *, else CheckNoneOf; may hold 0, the absent key
	idempotency string          // "": none
	wait        time.Duration   // Prefer: wait=
	echo        bool            // Prefer: return=representation
}

func (o *callOptions) has(opt optionSet) bool { return o.given&opt != 0 }

// Bounds of options.
const (
	minTTL         = time.Second
	maxTTL         = 366 * 24 * time.Hour
	maxListLimit   = 10_000
	defaultLimit   = 1_000
	maxHistory     = 1_000
	maxWatchTerms  = 100 // keys and prefixes of one watch
	minProgress    = 100 * time.Millisecond
	maxProgress    = time.Hour
	maxDelimiter   = 64
	maxWaitSeconds = 60
)

// headerOptions are the headers that change what a call does.
var headerOptions = [...]struct {
	name  string // as its standard spells it, for errors
	inMap string // as net/http does
	opts  optionSet
}{
	{"If-Match", "If-Match", optIfMatch}, {"If-None-Match", "If-None-Match", optIfNoneMatch},
	{"Idempotency-Key", "Idempotency-Key", optIdempotency}, {"Prefer", "Prefer", optPreferWait | optPreferEcho},
	{"Last-Event-ID", "Last-Event-Id", optLastEventID},
	// Never served. Ignoring a precondition would be worse than refusing it.
	{"If-Unmodified-Since", "If-Unmodified-Since", 0}, {"If-Modified-Since", "If-Modified-Since", 0}, {"If-Range", "If-Range", 0},
	// A body is taken as it stands, so that nobody would undo the coding.
	{"Content-Encoding", "Content-Encoding", 0},
}

// parseOptions reads the query and the headers, and refuses every one that this
// call would otherwise ignore.
func (c *apiCall) parseOptions(takes optionSet) error {
	for i := range headerOptions {
		ho := &headerOptions[i]
		values := c.r.Header[ho.inMap]
		if values == nil {
			continue
		}
		if ho.name == "Content-Encoding" {
			if len(values) == 1 && strings.EqualFold(values[0], "identity") {
				continue
			}
			return badRequest("header Content-Encoding: " + quoteShort(strings.Join(values, ", ")) + ": a body is taken as it stands; send it without a coding")
		}
		if takes&ho.opts == 0 {
			return badRequest("header " + ho.name + " is none of this call")
		}
		if err := c.parseHeader(takes, ho.name, values); err != nil {
			return err
		}
	}
	if c.opt.has(optIfMatch) && c.opt.has(optIfNoneMatch) {
		return badRequest("headers If-Match and If-None-Match contradict each other; send one")
	}
	if c.r.URL.RawQuery == "" {
		return nil
	}
	takes |= optTimeout
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
		opt, want := c.parseOption(takes, name, value, hasValue)
		switch {
		case takes&opt == 0:
			return badRequest("query option " + quoteShort(name) + " is none of this call")
		case want != "":
			return badRequest("query option " + name + "=" + quoteShort(value) + ": want " + want)
		case c.opt.has(opt) && opt&(optWatchKey|optWatchPrefix) == 0:
			return badRequest("query option " + name + " is given twice")
		}
		c.opt.given |= opt
	}
	return c.contradictions()
}

// contradictions refuses options that cannot be meant together.
func (c *apiCall) contradictions() error {
	o := &c.opt
	both := func(a, b string) error {
		return badRequest("query options " + a + " and " + b + " contradict each other; give one")
	}
	switch {
	case o.has(optPrefix) && (o.has(optStart) || o.has(optEnd)):
		return both("prefix", "start or end")
	case o.has(optTTL) && o.has(optLease):
		return both("ttl", "lease")
	case c.read.revision > 0 && c.read.minRevision > c.read.revision:
		return both("revision", "a later min_revision")
	case o.has(optRevision) && o.has(optHistory):
		return both("revision", "history")
	case o.has(optStart) && o.has(optEnd) && o.span.Empty():
		return badRequest("query options start and end: no key can lie between them")
	}
	return nil
}

// parseOption takes one option into c and tells which one it was, and what was
// wanted if its value is wrong.
func (c *apiCall) parseOption(takes optionSet, name, value string, hasValue bool) (opt optionSet, want string) {
	o := &c.opt
	ok := true
	number := func(least, most int64) (n int64) {
		n, ok = parseNumber(value, least, most)
		return n
	}
	flag := func() bool {
		ok = !hasValue || value == "" || value == "true" || value == "false"
		return value != "false"
	}
	duration := func(least, most time.Duration) (d time.Duration) {
		d, err := time.ParseDuration(value)
		ok = err == nil && d >= least && d <= most
		return d
	}
	switch name {
	case "timeout":
		opt, want = optTimeout, "a duration such as 5s, above 0 and at most "+c.api.l.MaxTimeout.String()
		c.deadline = c.start.Add(duration(1, c.api.l.MaxTimeout))
	case "consistency":
		opt, want = optConsistency, "linearizable or stale"
		c.read.stale = value == "stale"
		ok = c.read.stale || value == "linearizable"
	case "min_revision":
		opt, want = optMinRevision, "a revision, a whole number from 0"
		c.read.minRevision = number(0, math.MaxInt64)
	case "revision":
		opt, want = optRevision, "a revision, a whole number from 1"
		c.read.revision = number(1, math.MaxInt64)
	case "history":
		opt, want = optHistory, "how many versions, 1 to "+strconv.Itoa(maxHistory)
		o.history = int(number(1, maxHistory))
	case "force":
		opt, want = optForce, "true or false"
		o.force = value == "true"
		ok = o.force || value == "false"
	case "verbose":
		opt, want = optVerbose, "true, false or no value"
		o.verbose = flag()
	case "ttl":
		opt, want = optTTL, wantTTL
		o.ttl = duration(minTTL, maxTTL)
		ok = ok && o.ttl%time.Millisecond == 0
	case "lease":
		opt, want = optLease, "a lease id, decimal digits"
		o.lease = number(1, math.MaxInt64)
	default:
		return c.parseRangeOption(takes, name, value, flag, number, duration, &ok)
	}
	if ok {
		want = ""
	}
	return opt, want
}

const wantTTL = "a duration of whole milliseconds from 1s to 8784h (366 days), such as 30s or 1m30s"

// parseRangeOption is parseOption for the options of lists and watches.
func (c *apiCall) parseRangeOption(takes optionSet, name, value string, flag func() bool, number func(_, _ int64) int64,
	duration func(_, _ time.Duration) time.Duration, ok *bool) (opt optionSet, want string) {
	o := &c.opt
	boolean := "true, false or no value"
	short := func(s string) string {
		*ok = len(s) <= c.api.l.MaxKeyBytes
		return s
	}
	tooLong := "at most " + strconv.Itoa(c.api.l.MaxKeyBytes) + " bytes"
	switch name {
	case "prefix":
		if takes&optWatchPrefix != 0 {
			opt, want = optWatchPrefix, tooLong+", and at most "+strconv.Itoa(maxWatchTerms)+" keys and prefixes"
			o.watchPrefixes = append(o.watchPrefixes, short(value))
			*ok = *ok && len(o.watchPrefixes)+len(o.watchKeys) <= maxWatchTerms
			break
		}
		opt, want = optPrefix, tooLong
		o.prefix, o.span = value, kv.Prefix(short(value))
	case "key":
		opt, want = optWatchKey, "1 byte or more, "+tooLong+", and at most "+strconv.Itoa(maxWatchTerms)+" keys and prefixes"
		o.watchKeys = append(o.watchKeys, short(value))
		*ok = *ok && value != "" && len(o.watchPrefixes)+len(o.watchKeys) <= maxWatchTerms
	case "start":
		opt, want = optStart, tooLong
		o.span.Start = short(value)
	case "end":
		opt, want = optEnd, "the first key that is out of range, "+tooLong
		o.span.End = short(value)
		*ok = *ok && value != ""
	case "limit":
		opt, want = optLimit, "1 to "+strconv.Itoa(maxListLimit)
		o.limit = int(number(1, maxListLimit))
	case "after":
		opt, want = optAfter, "the value of `next` in the answer before"
		o.after, *ok = value, value != "" && len(value) <= 4*c.api.l.MaxKeyBytes
	case "reverse":
		opt, want, o.reverse = optReverse, boolean, flag()
	case "keys":
		opt, want, o.keys = optKeys, boolean, flag()
	case "count":
		opt, want, o.count = optCount, boolean, flag()
	case "delimiter":
		opt, want = optDelimiter, "1 to "+strconv.Itoa(maxDelimiter)+" bytes"
		o.delimiter, *ok = value, value != "" && len(value) <= maxDelimiter
	case "all":
		opt, want, o.all = optAll, boolean, flag()
	case "atomic":
		opt, want, o.atomic = optAtomic, boolean, flag()
	case "mode":
		opt, want = optMode, "upsert or create"
		o.create = value == "create"
		*ok = o.create || value == "upsert"
	case "from":
		opt, want = optFrom, "a revision, a whole number from 1"
		n := number(1, math.MaxInt64)
		if !o.has(optLastEventID) { // a browser that reconnects repeats the query and adds the header
			o.from = n
		}
	case "initial":
		opt, want, o.initial = optInitial, boolean, flag()
	case "prev":
		opt, want, o.prev = optPrev, boolean, flag()
	case "events":
		opt, want = optEvents, "put, delete or put,delete"
		puts, deletes := false, false
		for e := range strings.SplitSeq(value, ",") {
			puts, deletes = puts || e == "put", deletes || e == "delete"
			*ok = *ok && (e == "put" || e == "delete")
		}
		o.noPuts, o.noDeletes = !puts, !deletes
	case "progress":
		opt, want = optProgress, "a duration from "+minProgress.String()+" to "+maxProgress.String()+", such as 15s"
		o.progress = duration(minProgress, maxProgress)
	}
	if *ok {
		want = ""
	}
	return opt, want
}

// parseNumber reads a decimal number without sign or leading zeros: what two
// texts mean is the same only where the texts are, as entity tags need.
func parseNumber(s string, least, most int64) (int64, bool) {
	if s == "" || s[0] < '0' || s[0] > '9' || s[0] == '0' && len(s) > 1 {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n >= least && n <= most
}

// parseHeader takes one header into c.
func (c *apiCall) parseHeader(takes optionSet, name string, values []string) error {
	o := &c.opt
	bad := func(what string) error { return badRequest("header " + name + ": " + what) }
	if name != "Prefer" && name != "If-Match" && name != "If-None-Match" && len(values) > 1 {
		return bad("it is given twice")
	}
	switch name {
	case "If-Match", "If-None-Match":
		check, err := parseETags(name, values, c.mutates())
		if err != nil {
			return err
		}
		switch {
		case name == "If-Match":
			o.given |= optIfMatch
			o.check = check
		case c.mutates():
			o.given |= optIfNoneMatch
			o.check = check
		default:
			o.given |= optIfNoneMatch
			o.noneMatch = check
		}
	case "Idempotency-Key":
		if err := checkIdempotencyKey(values[0]); err != "" {
			return bad(err)
		}
		o.given |= optIdempotency
		o.idempotency = values[0]
	case "Last-Event-ID":
		n, ok := parseNumber(values[0], 0, math.MaxInt64-1)
		if !ok {
			return bad(quoteShort(values[0]) + " is no revision; send the id of the last event that arrived")
		}
		o.given |= optLastEventID
		o.from = n + 1
	case "Prefer":
		for _, line := range values {
			for item := range strings.SplitSeq(line, ",") {
				if err := c.parsePreference(takes, strings.TrimSpace(item)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// parsePreference reads one preference (RFC 7240, section 2). Ignoring those
// that are unknown would be legal there; here they are mistakes.
func (c *apiCall) parsePreference(takes optionSet, item string) error {
	name, value, _ := strings.Cut(item, "=")
	name, value = strings.ToLower(strings.TrimSpace(name)), strings.Trim(strings.TrimSpace(value), `"`)
	bad := func(what string) error { return badRequest("header Prefer: " + quoteShort(item) + ": " + what) }
	var opt optionSet
	switch name {
	case "wait":
		opt = optPreferWait
	case "return":
		opt = optPreferEcho
	}
	switch {
	case takes&opt == 0:
		return bad("is none of this call")
	case c.opt.has(opt):
		return bad("is given twice")
	}
	switch opt {
	case optPreferWait:
		n, ok := parseNumber(value, 0, maxWaitSeconds)
		if !ok {
			return bad("want seconds, 0 to " + strconv.Itoa(maxWaitSeconds))
		}
		c.opt.wait = time.Duration(n) * time.Second
	case optPreferEcho:
		c.opt.echo = value == "representation"
		if !c.opt.echo && value != "minimal" {
			return bad("want return=representation or return=minimal")
		}
	}
	c.opt.given |= opt
	return nil
}

// parseETags reads `*` or a list of entity tags (RFC 9110, section 8.8.3).
// Ours are mod revisions; anything else is a mistake, not a tag that happens
// never to match. A read may use weak tags, and "0" for a key that is absent.
func parseETags(header string, values []string, write bool) (kv.Precondition, error) {
	bad := func(what string) (kv.Precondition, error) {
		return kv.Precondition{}, &httpRefusal{err: errBadRequest, detail: "header " + header + ": " + what,
			hint: `send the ETag of an earlier answer with its quotes, such as ` + header + `: "17"`}
	}
	exists := header == "If-Match"
	if len(values) == 1 && strings.TrimSpace(values[0]) == "*" {
		if exists {
			return kv.Precondition{Kind: kv.CheckExists}, nil
		}
		return kv.Precondition{Kind: kv.CheckAbsent}, nil
	}
	p := kv.Precondition{Kind: kv.CheckNoneOf}
	if exists {
		p.Kind = kv.CheckAnyOf
	}
	for _, line := range values {
		for item := range strings.SplitSeq(line, ",") {
			tag := strings.TrimSpace(item)
			weak := strings.HasPrefix(tag, "W/")
			if weak && write {
				return bad(quoteShort(tag) + " is a weak tag, which never matches in a write")
			}
			if weak {
				tag = tag[2:]
			}
			least := int64(1)
			if !write {
				least = 0
			}
			if len(tag) < 3 || tag[0] != '"' || tag[len(tag)-1] != '"' {
				return bad(quoteShort(tag) + " is no quoted revision")
			}
			n, ok := parseNumber(tag[1:len(tag)-1], least, math.MaxInt64)
			if !ok {
				return bad(quoteShort(tag) + " is no quoted revision")
			}
			if p.Revisions = append(p.Revisions, n); len(p.Revisions) > kv.MaxRevisions {
				return bad("more than " + strconv.Itoa(kv.MaxRevisions) + " tags")
			}
		}
	}
	return p, nil
}

// checkIdempotencyKey says what is wrong with an idempotency key, "" if nothing.
func checkIdempotencyKey(key string) string {
	if key == "" || len(key) > kv.MaxOnceKey {
		return "want 1 to " + strconv.Itoa(kv.MaxOnceKey) + " characters, such as a random UUID"
	}
	for i := range len(key) {
		if key[i] <= ' ' || key[i] > '~' {
			return quoteShort(key) + " has a character that is not visible ASCII"
		}
	}
	return ""
}

// quoteShort shows what a client sent: printable, and never all of it.
func quoteShort(s string) string {
	if len(s) > 64 {
		s = s[:64] + "…"
	}
	return strconv.QuoteToASCII(s)
}
