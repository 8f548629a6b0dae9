package main

import (
	"errors"
	"fmt"
)

// The refusals a caller can meet, one sentence each. Code wraps them with the
// operation ("put: %w"); httperror.go holds the one table that maps them to HTTP.
//
// The names say what the client may rely on: every error here but errCommitTimeout
// and errTransferTimeout means that the request did not and will never change
// anything.
var (
	errKeyNotFound          = errors.New("the key does not exist")
	errEmptyKey             = errors.New("the key is empty")
	errKeyTooLong           = errors.New("the key is longer than the limit")
	errTooLarge             = errors.New("the value is larger than the limit")
	errBadRequest           = errors.New("the request is malformed")
	errMemberExists         = errors.New("the member id or its URL is already taken, or was removed and never comes back")
	errMemberUnknown        = errors.New("no member has this id")
	errMembershipInProgress = errors.New("another membership change is in flight")
	errQuorumAtRisk         = errors.New("the members alive now would lose their quorum")
	errLastVoter            = errors.New("the only voter cannot be removed")
	errLearnerBehind        = errors.New("the learner has not caught up yet")
	errTransferRefused      = errors.New("leadership cannot move to that member")
	errTransferTimeout      = errors.New("leadership did not move in time")
	errOverloaded           = errors.New("too many requests are in flight on this member")
	errNoLeader             = errors.New("the cluster has no leader that this member knows of")
	errStopping             = errors.New("this member is shutting down")
	errDiskLow              = errors.New("the disk of this member is nearly full")
	errPrecondition         = errors.New("the precondition does not hold")
	errLeaseNotFound        = errors.New("the lease does not exist")
	errCompacted            = errors.New("the revision is older than what history keeps")
	errFutureRevision       = errors.New("the store has not reached the revision")
	errOnceMismatch         = errors.New("another request was made with this idempotency key")
	errOnceExpired          = errors.New("a request was made with this idempotency key, and its result is no longer kept")
	errOnceFull             = errors.New("too many results are kept for idempotency keys")
	errReadsTooMuch         = errors.New("the gets of the transaction may return more than the limit")
	errTooManyWatches       = errors.New("too many watches are open on this member")
	errUnsupported          = errors.New("this member does not support the request")

	// errReadTimeout ends a read, or a request that had changed nothing yet.
	errReadTimeout = errors.New("the state could not be read in time")

	// errNotProposed: the deadline passed before raft was given the command.
	errNotProposed = errors.New("the deadline passed before the request could be proposed")

	// errCommitTimeout is about a command, whose outcome is unknown then: it was
	// handed to raft and may yet commit.
	errCommitTimeout = errors.New("the request did not complete in time")
)

// compactedError is errCompacted with the newest revision whose changes are gone.
type compactedError struct{ compact int64 }

func (e *compactedError) Error() string {
	return fmt.Sprintf("%v: changes up to revision %d are gone", errCompacted, e.compact)
}

func (e *compactedError) Unwrap() error { return errCompacted }
