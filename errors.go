package main

import "errors"

// The refusals a caller can meet, one sentence each. Code wraps them with the
// operation ("put: %w"); httpapi.go holds the one table that maps them to HTTP.
//
// The names say what the client may rely on: every error here but
// errCommitTimeout means that the request did not and will never take effect.
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
	errUnsupported          = errors.New("this member does not support the request")

	// errReadTimeout ends a read, or a request that had changed nothing yet.
	errReadTimeout = errors.New("the state could not be read in time")

	// errNotProposed: the deadline passed before raft was given the command.
	errNotProposed = errors.New("the deadline passed before the request could be proposed")

	// errCommitTimeout is the one whose outcome is unknown: the request was
	// handed to raft and may yet commit.
	errCommitTimeout = errors.New("the request did not complete in time")
)
