package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"

	"go.uber.org/zap"

	"pontoon/api"
)

// Refusals that only the HTTP layer can make.
var (
	errNoSuchPath  = errors.New("nothing is served at this path")
	errBadMethod   = errors.New("the path does not take this method")
	errCrossOrigin = errors.New("a web page of another origin sent the request")
)

// errorRow says how one sentinel is answered.
type errorRow struct {
	err     error
	code    api.Code
	outcome api.Outcome
	title   string
	hint    string // what the caller or the operator does next
}

// errorTable maps every refusal to its answer; the first row that matches
// wins. An error in no row is a 500 `internal`.
//
// An error in the table with outcome not_applied is a promise: whoever returns
// it knows that the request will never take effect.
//
// The order matters for an error that wraps two of them: what is certainly
// unknown comes first, what only tells that a context ended comes last.
var errorTable = []errorRow{
	{errCommitTimeout, api.CodeCommitTimeout, api.OutcomeUnknown, "Timed out",
		"a write may yet take effect: read the key back before sending it again, or allow more time with ?timeout="},
	{errTransferTimeout, api.CodeTransferTimeout, api.OutcomeUnknown, "Transfer timed out",
		"GET /v1/status shows who leads now; send it again if that is not the wanted member"},
	{errReadTimeout, api.CodeCommitTimeout, api.OutcomeUnknown, "Timed out",
		"send it again, allow more time with ?timeout=, or read with consistency=stale"},
	{errKeyNotFound, api.CodeKeyNotFound, api.OutcomeNotApplied, "Key not found",
		"write it with PUT first"},
	{errEmptyKey, api.CodeBadRequest, api.OutcomeNotApplied, "Empty key",
		"name a key after the slash: /my-key or /v1/kv/my-key"},
	{errKeyTooLong, api.CodeKeyTooLong, api.OutcomeNotApplied, "Key too long",
		"use a shorter key; the limit counts the bytes after percent-decoding"},
	{errTooLarge, api.CodeTooLarge, api.OutcomeNotApplied, "Body too large",
		"split the value over several keys, or keep it elsewhere and store its address"},
	{errBadRequest, api.CodeBadRequest, api.OutcomeNotApplied, "Bad request",
		"correct what the detail names and send it again"},
	{errMemberExists, api.CodeMemberExists, api.OutcomeNotApplied, "Member exists",
		"GET /v1/members shows who has it; an id that was removed stays unused, so take a new one"},
	{errMemberUnknown, api.CodeMemberNotFound, api.OutcomeNotApplied, "Member not found",
		"GET /v1/members lists the ids"},
	{errMembershipInProgress, api.CodeMembershipInProgress, api.OutcomeNotApplied, "Membership change in progress",
		"send it again once the other change is done; GET /v1/members shows the present state"},
	{errQuorumAtRisk, api.CodeQuorumAtRisk, api.OutcomeNotApplied, "Quorum at risk",
		"bring the stopped members back first (GET /v1/status shows who is active); a removal goes ahead with ?force=true"},
	{errLastVoter, api.CodeQuorumAtRisk, api.OutcomeNotApplied, "Quorum at risk",
		"add another member first and wait until it votes, or stop this process if the cluster is to end"},
	{errLearnerBehind, api.CodePreconditionFailed, api.OutcomeNotApplied, "Learner behind",
		"wait until its match_index in GET /v1/status of the leader is near the leader's last_index, then send it again"},
	{errTransferRefused, api.CodeTransferRefused, api.OutcomeNotApplied, "Transfer refused",
		"name a voter that is active and caught up; GET /v1/status of the leader shows them"},
	{errOverloaded, api.CodeOverloaded, api.OutcomeNotApplied, "Overloaded",
		"send it again after a pause that grows, or spread the load over the members"},
	{errNotProposed, api.CodeOverloaded, api.OutcomeNotApplied, "Timed out before it began",
		"allow more time with ?timeout=, or send it again after a pause"},
	{errNoLeader, api.CodeNoLeader, api.OutcomeNotApplied, "No leader",
		"send it again shortly; if it stays so, see that a majority of the members runs and reaches each other (GET /v1/status)"},
	{errStopping, api.CodeStopping, api.OutcomeNotApplied, "Stopping",
		"send it to another member, or again once this one is back"},
	{errDiverged, api.CodeStopping, api.OutcomeNotApplied, "State differs",
		"send it to another member; the log of this one says what to do about it"},
	{errDoubted, api.CodeNoLeader, api.OutcomeNotApplied, "State in doubt",
		"send it again shortly; if it stays so, bring back the members that are down, or restart those that run, one by one: each makes its state anew"},
	{errDiskLow, api.CodeDiskLow, api.OutcomeNotApplied, "Disk low",
		"free space on the disk of the data directory; reads go on, and writes resume by themselves"},
	{errPrecondition, api.CodePreconditionFailed, api.OutcomeNotApplied, "Precondition failed",
		"read the key, decide anew, and send the write with the ETag that the answer shows"},
	{errLeaseNotFound, api.CodeLeaseNotFound, api.OutcomeNotApplied, "Lease not found",
		"it has expired, was deleted, or never was; make a new one with POST /v1/leases"},
	{errCompacted, api.CodeRevisionCompacted, api.OutcomeNotApplied, "Revision compacted",
		"read the present state instead (a list, or a watch with initial=true) and go on from its revision"},
	{errFutureRevision, api.CodeFutureRevision, api.OutcomeNotApplied, "Future revision",
		"use a revision of an earlier answer of this cluster; min_revision=N waits for one"},
	{errOnceMismatch, api.CodeIdempotencyMismatch, api.OutcomeNotApplied, "Idempotency key reused",
		"use a new Idempotency-Key for every new request, and the same one only to repeat a request unchanged"},
	{errOnceExpired, api.CodeIdempotencyExpired, api.OutcomeNotApplied, "Idempotency key expired",
		"this repetition did nothing; the first request with this key was answered long ago: read what it changed before sending it under a new key"},
	{errOnceFull, api.CodeOverloaded, api.OutcomeNotApplied, "Too many idempotency keys",
		"send it again after a pause that grows; results leave as their window ends"},
	{errReadsTooMuch, api.CodeTooLarge, api.OutcomeNotApplied, "Transaction reads too much",
		"lower the limits of its gets, or read with GET /v1/kv"},
	{errTooManyWatches, api.CodeOverloaded, api.OutcomeNotApplied, "Too many watches",
		"watch on another member, or several keys and prefixes in one watch"},
	{errUnsupported, api.CodeUnsupported, api.OutcomeNotApplied, "Unsupported",
		"send it without what the detail names"},
	{context.DeadlineExceeded, api.CodeCommitTimeout, api.OutcomeUnknown, "Timed out",
		"a write may yet take effect: read the key back before sending it again, or allow more time with ?timeout="},
	{context.Canceled, api.CodeCommitTimeout, api.OutcomeUnknown, "Canceled",
		"the connection was closed while the request waited: read the key back before sending it again"},
	{errNoSuchPath, api.CodePathNotFound, api.OutcomeNotApplied, "Path not found",
		"a key is reached as /v1/kv/NAME"},
	{errBadMethod, api.CodeMethodNotAllowed, api.OutcomeNotApplied, "Method not allowed",
		"the Allow header lists the methods of this path"},
	{errCrossOrigin, api.CodeCrossOrigin, api.OutcomeNotApplied, "Cross-origin request refused",
		"send changes from a program, or from a page that this member itself serves"},
}

// statusClientClosed is counted, never sent: the client went away first.
const statusClientClosed = 499

// httpRefusal is a sentinel with what this one occurrence adds to its row.
type httpRefusal struct {
	err       error
	detail    string        // empty: the text of err
	hint      string        // empty: that of the row
	allow     string        // value of Allow, with errBadMethod
	current   int64         // mod revision of the key, with errPrecondition
	outcome   api.Outcome   // empty: that of the row
	line      int           // of an import
	applied   *api.Imported // of an import
	firstLine string        // stands for `title: detail` in the plain text of a classic call
}

func (e *httpRefusal) Error() string {
	if e.detail != "" {
		return e.detail
	}
	return e.err.Error()
}

func (e *httpRefusal) Unwrap() error { return e.err }

func badRequest(detail string) error {
	return &httpRefusal{err: errBadRequest, detail: detail}
}

// fail answers err. Nothing of the response may have been written before.
func (c *apiCall) fail(err error) {
	row, known := findErrorRow(err)
	var ref *httpRefusal
	if !errors.As(err, &ref) {
		ref = &httpRefusal{err: err}
	}
	p := api.Error{
		Type: "urn:pontoon:error:" + string(row.code), Title: row.title, Status: row.code.Status(),
		Detail: err.Error(), Code: row.code, Outcome: row.outcome, Hint: row.hint,
	}
	if ref.hint != "" {
		p.Hint = ref.hint
	}
	if ref.outcome != "" {
		p.Outcome = ref.outcome
	}
	p.CurrentRevision, p.Line, p.Applied = ref.current, ref.line, ref.applied
	var gone *compactedError
	if errors.As(err, &gone) {
		p.CompactRevision = gone.compact
	}
	switch {
	case !known:
		c.api.log.Error("a request failed for a reason that has no name",
			zap.String("route", c.route.String()), zap.String("method", c.r.Method), zap.Error(err))
		p.Detail = "the member met an unexpected error; its log has it"
		if !c.mutates() {
			p.Outcome = api.OutcomeNotApplied
		}
	case errors.Is(err, context.Canceled) && c.r.Context().Err() != nil:
		c.counted = statusClientClosed
		c.api.log.Debug("the client left before its answer",
			zap.String("route", c.route.String()), zap.String("method", c.r.Method))
	}
	c.writeProblem(&p, ref)
}

// findErrorRow reports false, and the row of a 500, for an error without a row.
func findErrorRow(err error) (errorRow, bool) {
	for _, row := range errorTable {
		if errors.Is(err, row.err) {
			return row, true
		}
	}
	return errorRow{err, api.CodeInternal, api.OutcomeUnknown, "Internal error",
		"a write may have taken effect: read the key back; the log of this member says what went wrong"}, false
}

func (c *apiCall) writeProblem(p *api.Error, ref *httpRefusal) {
	h := c.w.Header()
	switch p.Status {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		h["Retry-After"] = headerRetryAfter
	case http.StatusMethodNotAllowed:
		h["Allow"] = []string{ref.allow}
	}
	switch p.Code {
	case api.CodeNoLeader, api.CodeCommitTimeout, api.CodeTransferRefused, api.CodeTransferTimeout:
		p.Leader = c.api.b.leader()
	}
	c.safetyHeaders()
	h["Vary"] = headerAccept
	if asJSON, _ := c.accepts(); asJSON {
		h["Content-Type"] = headerProblemJSON
		c.writeHeader(p.Status)
		_ = json.NewEncoder(c.w).Encode(p) // an error here means that the client left
		return
	}
	h["Content-Type"] = headerPlainText
	c.writeHeader(p.Status)
	_, _ = io.WriteString(c.w, plainProblem(p, ref.firstLine))
}

// plainProblem is the text for people with curl. A classic read that finds
// nothing keeps raftexample's one line, which scripts compare with.
func plainProblem(p *api.Error, firstLine string) string {
	switch firstLine {
	case "":
		return p.Title + ": " + p.Detail + "\nhint: " + p.Hint + "\n"
	case classicGetFailed:
		return firstLine + "\n"
	}
	return firstLine + "\nhint: " + p.Hint + "\n"
}

// accepts reads the Accept header: whether errors may be JSON, and whether a
// value may be raw bytes. curl's own `*/*` asks for no form in particular and
// gets text, because people read it.
func (c *apiCall) accepts() (asJSON, asBytes bool) {
	lines := c.r.Header["Accept"]
	if len(lines) == 0 {
		return false, true
	}
	for _, line := range lines {
		for item := range strings.SplitSeq(line, ",") {
			media, params, _ := strings.Cut(item, ";")
			if qualityIsZero(params) {
				continue
			}
			switch strings.ToLower(strings.TrimSpace(media)) {
			case "application/json", "application/problem+json":
				asJSON = true
			case "application/*":
				asJSON, asBytes = true, true
			case "application/octet-stream", "*/*":
				asBytes = true
			}
		}
	}
	return asJSON, asBytes
}

// qualityIsZero finds `q=0`, which excludes a media type (RFC 9110, section 12.4.2).
func qualityIsZero(params string) bool {
	for p := range strings.SplitSeq(params, ";") {
		name, value, _ := strings.Cut(p, "=")
		if strings.EqualFold(strings.TrimSpace(name), "q") {
			v := strings.TrimSpace(value)
			return v != "" && strings.Trim(v, "0.") == ""
		}
	}
	return false
}
