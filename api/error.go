package api

import "net/http"

// ProblemType is the media type of an [Error] (RFC 9457, section 3).
const ProblemType = "application/problem+json"

// Error is a refusal as RFC 9457 shapes it, with three fields of our own: Code
// for programs, Outcome for whoever must decide about a retry, Hint for people.
type Error struct {
	Type            string  `json:"type"`             // a URN made of the code
	Title           string  `json:"title"`            // of a few words; a code may have several
	Status          int     `json:"status"`           // the HTTP status
	Detail          string  `json:"detail,omitempty"` // this occurrence
	Code            Code    `json:"code"`
	Outcome         Outcome `json:"outcome"`
	Hint            string  `json:"hint,omitempty"`             // what to do next
	CurrentRevision int64   `json:"current_revision,omitempty"` // of the key, with CodePreconditionFailed
	Leader          uint64  `json:"leader,omitempty"`           // the leader known to the answering member

	CompactRevision int64     `json:"compact_revision,omitempty"` // changes up to it are no longer known, with CodeRevisionCompacted
	Line            int       `json:"line,omitempty"`             // of an import, from 1: the one that stopped it
	Applied         *Imported `json:"applied,omitempty"`          // of an import: what the lines before it did
}

// Error tells the title and the detail.
func (e *Error) Error() string {
	if e.Detail == "" {
		return e.Title
	}
	return e.Title + ": " + e.Detail
}

// Outcome is the promise about a request that was not answered with a 2xx.
type Outcome string

// The outcomes.
const (
	OutcomeNotApplied Outcome = "not_applied" // it did not and will never take effect
	OutcomeUnknown    Outcome = "unknown"     // it may yet take effect
	OutcomeApplied    Outcome = "applied"     // it took effect
)

// Code names the reason of a refusal. A code never changes its meaning.
type Code string

// The codes.
const (
	CodeKeyNotFound          Code = "key_not_found"
	CodeLeaseNotFound        Code = "lease_not_found"
	CodeMemberNotFound       Code = "member_not_found"
	CodePathNotFound         Code = "path_not_found"
	CodeBadRequest           Code = "bad_request"
	CodeFutureRevision       Code = "future_revision"
	CodeCrossOrigin          Code = "cross_origin"
	CodeMethodNotAllowed     Code = "method_not_allowed"
	CodeRevisionCompacted    Code = "revision_compacted"
	CodeMemberExists         Code = "member_exists"
	CodeMembershipInProgress Code = "membership_in_progress"
	CodeQuorumAtRisk         Code = "quorum_at_risk"
	CodeTransferRefused      Code = "transfer_refused"
	CodePreconditionFailed   Code = "precondition_failed"
	CodeTooLarge             Code = "too_large"
	CodeKeyTooLong           Code = "key_too_long"
	CodeIdempotencyMismatch  Code = "idempotency_mismatch"
	CodeIdempotencyExpired   Code = "idempotency_expired"
	CodeOverloaded           Code = "overloaded"
	CodeInternal             Code = "internal"
	CodeUnsupported          Code = "unsupported"
	CodeNoLeader             Code = "no_leader"
	CodeStopping             Code = "stopping"
	CodeCommitTimeout        Code = "commit_timeout"
	CodeTransferTimeout      Code = "transfer_timeout"
	CodeDiskLow              Code = "disk_low"
)

var codeStatus = map[Code]int{
	CodeKeyNotFound:          http.StatusNotFound,
	CodeLeaseNotFound:        http.StatusNotFound,
	CodeMemberNotFound:       http.StatusNotFound,
	CodePathNotFound:         http.StatusNotFound,
	CodeBadRequest:           http.StatusBadRequest,
	CodeFutureRevision:       http.StatusBadRequest,
	CodeCrossOrigin:          http.StatusForbidden,
	CodeMethodNotAllowed:     http.StatusMethodNotAllowed,
	CodeRevisionCompacted:    http.StatusGone,
	CodeMemberExists:         http.StatusConflict,
	CodeMembershipInProgress: http.StatusConflict,
	CodeQuorumAtRisk:         http.StatusConflict,
	CodeTransferRefused:      http.StatusConflict,
	CodePreconditionFailed:   http.StatusPreconditionFailed,
	CodeTooLarge:             http.StatusRequestEntityTooLarge,
	CodeKeyTooLong:           http.StatusRequestURITooLong,
	CodeIdempotencyMismatch:  http.StatusUnprocessableEntity,
	CodeIdempotencyExpired:   http.StatusConflict,
	CodeOverloaded:           http.StatusTooManyRequests,
	CodeInternal:             http.StatusInternalServerError,
	CodeUnsupported:          http.StatusNotImplemented,
	CodeNoLeader:             http.StatusServiceUnavailable,
	CodeStopping:             http.StatusServiceUnavailable,
	CodeCommitTimeout:        http.StatusGatewayTimeout,
	CodeTransferTimeout:      http.StatusGatewayTimeout,
	CodeDiskLow:              http.StatusInsufficientStorage,
}

// Status is the HTTP status that the code is answered with; 500 for a code
// this version does not know.
func (c Code) Status() int {
	if s, ok := codeStatus[c]; ok {
		return s
	}
	return http.StatusInternalServerError
}
