// Package api holds the JSON shapes and the error codes that a Pontoon server
// and its clients share.
//
// Its nouns: a [Member] is one process of the cluster, a [Status] is what one
// member knows about itself, an [Error] is a refusal, its [Code] says why and
// its [Outcome] says what became of the request:
//
//	var e api.Error
//	if err := json.NewDecoder(resp.Body).Decode(&e); err == nil && e.Outcome == api.OutcomeUnknown {
//		// The write may still take effect: read the key before writing again.
//	}
//
// Caveats: member ids are 64 bits wide, so a reader that keeps JSON numbers as
// floating point loses the low digits of large ones. The package imports the
// standard library only, because clients outside this module import it.
package api

import "time"

// Roles of a member. A member list knows voters and learners; a status tells
// what a voter does at the moment.
const (
	RoleVoter     = "voter"
	RoleLearner   = "learner"
	RoleLeader    = "leader"
	RoleFollower  = "follower"
	RoleCandidate = "candidate"
)

// Member is one process of the cluster, as the replicated member table has it.
type Member struct {
	ID        uint64   `json:"id"`                   // never 0, never used again after a removal
	PeerURLs  []string `json:"peer_urls"`            // where the other members reach it
	ClientURL string   `json:"client_url,omitempty"` // where clients reach it, once it has said so
	Role      string   `json:"role"`                 // RoleVoter or RoleLearner
	Leader    bool     `json:"leader"`               // as far as the answering member knows
}

// MemberList is the answer to GET /v1/members.
type MemberList struct {
	Members []Member `json:"members"`
}

// MemberAdd is the body of POST /v1/members.
type MemberAdd struct {
	ID      uint64 `json:"id,omitempty"`      // 0: the cluster chooses one
	PeerURL string `json:"peer_url"`          // such as http://10.0.0.4:12379
	Learner bool   `json:"learner,omitempty"` // true: it stays a learner until it is promoted by hand
}

// MemberUpdate is the body of PUT /v1/members/{id}.
type MemberUpdate struct {
	PeerURL string `json:"peer_url"`
}

// LeaderTransfer is the body of POST /v1/leader.
type LeaderTransfer struct {
	To uint64 `json:"to"`
}

// Status is the answer to GET /v1/status: what one member knows about itself.
// Indexes count log entries, Revision counts changes to the store.
type Status struct {
	ID              uint64  `json:"id"`
	ClusterID       string  `json:"cluster_id"` // hexadecimal
	Role            string  `json:"role"`       // RoleLeader, RoleFollower, RoleCandidate or RoleLearner
	Leader          uint64  `json:"leader"`     // 0: none known
	Term            uint64  `json:"term"`
	CommittedIndex  uint64  `json:"committed_index"`
	AppliedIndex    uint64  `json:"applied_index"`
	LastIndex       uint64  `json:"last_index"`
	SnapshotIndex   uint64  `json:"snapshot_index"`
	Revision        int64   `json:"revision"`
	Keys            int64   `json:"keys"`
	Sizes           Sizes   `json:"sizes"`
	Version         string  `json:"version"`
	UptimeSeconds   float64 `json:"uptime_seconds"`
	CompactRevision int64   `json:"compact_revision"`   // changes up to it are no longer known
	Diverged        bool    `json:"diverged,omitempty"` // its state differs from that of the others: it serves no clients
	Peers           []Peer  `json:"peers"`              // only a leader knows match indexes
}

// Sizes are bytes.
type Sizes struct {
	StateBytes    int64 `json:"state_bytes"`    // keys and values in memory
	WALBytes      int64 `json:"wal_bytes"`      // log files on disk
	SnapshotBytes int64 `json:"snapshot_bytes"` // snapshot files on disk
}

// Peer is another member as the answering one sees it.
type Peer struct {
	ID          uint64    `json:"id"`
	Role        string    `json:"role"`
	MatchIndex  uint64    `json:"match_index,omitempty"` // only a leader knows
	LastContact time.Time `json:"last_contact,omitzero"` // RFC 3339 in UTC; absent: never
	Active      bool      `json:"active"`
}
