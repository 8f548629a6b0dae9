package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/raft/v3/raftpb"
)

// membership is the replicated table of who belongs to the cluster. A value
// that has been published is never changed: apply returns a new one.
//
// Invariants: Members is sorted by ID; at least one member votes once the
// cluster exists; no id is in both Members and Removed; ids and peer URLs are
// unique. Removed only grows: an id that lost its data must not vote again
// under the same name (raft thesis 3.8: votes and log are bound to the id).
type membership struct {
	ClusterID uint64   `json:"cluster_id,string"`
	Members   []member `json:"members"`
	Removed   []uint64 `json:"removed,omitempty"`
}

type member struct {
	ID        uint64   `json:"id"`
	PeerURLs  []string `json:"peer_urls"`
	ClientURL string   `json:"client_url,omitempty"`
	Learner   bool     `json:"learner,omitempty"`
	// Promote asks the leader to make a voter of this learner once it has
	// caught up.
	Promote bool `json:"promote,omitempty"`
	// Started: the leader has seen this member hold log entries. If it comes
	// back with an empty directory it has lost its data, and its votes.
	Started bool `json:"started,omitempty"`
}

type memberOp string

const (
	opAdd     memberOp = "add"
	opRemove  memberOp = "remove"
	opPromote memberOp = "promote"
	opUpdate  memberOp = "update" // new peer or client URL
	opStarted memberOp = "started"
)

// memberChange is one request to change the table. It travels as JSON in the
// Context of a raft ConfChangeV2 whose Changes follow from it (see confChange).
type memberChange struct {
	Version int      `json:"v"`
	Op      memberOp `json:"op"`
	Member  member   `json:"member"`
	// Bounded: the table that follows keeps to maxMembers and maxTableBytes. A change
	// of before there were bounds is applied as it was then, or members that replay it
	// would differ from those that did not.
	Bounded bool `json:"bounded,omitempty"`
	// Request names the waiter: the proposing node and a number unique there.
	Node    uint64 `json:"node,omitempty"`
	Request uint64 `json:"request,omitempty"`
}

const memberChangeVersion = 1

const (
	maxPeerURLs   = 16 // of one member
	maxMembers    = 64
	maxTableBytes = 512 << 10 // as JSON; the table is in the header of each snapshot, and in answers to peers, both of 1 MiB at most
)

// errNoChange says that the table already is as the change wants it.
var errNoChange = errors.New("the member table already says so")

// bootstrapMembership is the table that every founding member computes for
// itself from the same --cluster. The cluster id follows from it, so that two
// clusters do not merge by accident.
func bootstrapMembership(token string, cluster []clusterURL) *membership {
	m := &membership{}
	for _, c := range cluster {
		m.Members = append(m.Members, member{ID: c.ID, PeerURLs: []string{c.URL}})
	}
	slices.SortFunc(m.Members, func(a, b member) int { return compare(a.ID, b.ID) })
	h := sha256.New()
	fmt.Fprintf(h, "pontoon cluster\n%q\n", token)
	for _, x := range m.Members {
		fmt.Fprintf(h, "%d %q\n", x.ID, x.PeerURLs)
	}
	m.ClusterID = binary.BigEndian.Uint64(h.Sum(nil)) | 1 // never 0, which means "not known yet"
	return m
}

func compare(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (m *membership) get(id uint64) (member, bool) {
	if i := m.index(id); i >= 0 {
		return m.Members[i], true
	}
	return member{}, false
}

func (m *membership) index(id uint64) int {
	return slices.IndexFunc(m.Members, func(x member) bool { return x.ID == id })
}

// owner is the member at a peer URL, 0: none.
func (m *membership) owner(url string) uint64 {
	for _, x := range m.Members {
		if slices.Contains(x.PeerURLs, url) {
			return x.ID
		}
	}
	return 0
}

func (m *membership) isRemoved(id uint64) bool { return slices.Contains(m.Removed, id) }

func (m *membership) voters() []uint64 {
	var ids []uint64
	for _, x := range m.Members {
		if !x.Learner {
			ids = append(ids, x.ID)
		}
	}
	return ids
}

// nextID is a free id for a member that did not choose one: above every id
// that was ever used.
func (m *membership) nextID() uint64 {
	var top uint64
	for _, x := range m.Members {
		top = max(top, x.ID)
	}
	for _, id := range m.Removed {
		top = max(top, id)
	}
	return top + 1
}

// apply returns the table after c, or why c is refused. It is the only rule
// for membership: proposers ask it first, and every member asks it again when
// the change is committed, because the table may have moved in between. raft
// panics on an invalid change, so a refused one never reaches it.
func (m *membership) apply(c memberChange) (*membership, error) {
	if c.Version != memberChangeVersion {
		return nil, fmt.Errorf("%w: membership change of version %d; upgrade this member", errUnsupported, c.Version)
	}
	next := &membership{ClusterID: m.ClusterID, Members: slices.Clone(m.Members), Removed: slices.Clone(m.Removed)}
	i := m.index(c.Member.ID)
	switch c.Op {
	case opAdd:
		if err := m.mayAdd(c.Member); err != nil {
			return nil, err
		}
		next.Members = append(next.Members, c.Member)
		slices.SortFunc(next.Members, func(a, b member) int { return compare(a.ID, b.ID) })
	case opRemove:
		switch {
		case i < 0:
			return nil, errNoChange
		case !m.Members[i].Learner && len(m.voters()) == 1:
			return nil, fmt.Errorf("%w: member %d", errLastVoter, c.Member.ID)
		}
		next.Members = slices.Delete(next.Members, i, i+1)
		next.Removed = append(next.Removed, c.Member.ID)
		slices.Sort(next.Removed)
	case opPromote:
		switch {
		case i < 0:
			return nil, fmt.Errorf("%w: %d", errMemberUnknown, c.Member.ID)
		case !m.Members[i].Learner:
			return nil, errNoChange
		}
		next.Members[i].Learner, next.Members[i].Promote = false, false
	case opUpdate:
		if err := m.mayUpdate(i, c.Member); err != nil {
			return nil, err
		}
		if len(c.Member.PeerURLs) > 0 {
			next.Members[i].PeerURLs = c.Member.PeerURLs
		}
		if c.Member.ClientURL != "" {
			next.Members[i].ClientURL = c.Member.ClientURL
		}
	case opStarted:
		switch {
		case i < 0:
			return nil, fmt.Errorf("%w: %d", errMemberUnknown, c.Member.ID)
		case m.Members[i].Started:
			return nil, errNoChange
		}
		next.Members[i].Started = true
	default:
		return nil, fmt.Errorf("%w: membership operation %q", errUnsupported, c.Op)
	}
	if c.Bounded && (c.Op == opAdd || c.Op == opUpdate) { // what else there is adds a few bytes a member, or takes more than it adds
		if err := next.fits(); err != nil {
			return nil, err
		}
	}
	return next, nil
}

// fits says whether a table is of a size that a snapshot and a peer's answer take.
func (m *membership) fits() error {
	if len(m.Members) > maxMembers {
		return fmt.Errorf("%w: %d members; the limit is %d, so remove one first", errBadRequest, len(m.Members), maxMembers)
	}
	b, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode member table: %w", err)
	}
	if len(b) > maxTableBytes {
		return fmt.Errorf("%w: the table of %d members and %d ids that were removed would have %d bytes; the limit is %d: use shorter URLs, or remove members; removed ids stay for good",
			errBadRequest, len(m.Members), len(m.Removed), len(b), maxTableBytes)
	}
	return nil
}

func (m *membership) mayAdd(x member) error {
	if x.ID == 0 || x.ID >= 1<<64-2 {
		return fmt.Errorf("%w: member id %d", errBadRequest, x.ID)
	}
	if m.isRemoved(x.ID) {
		return fmt.Errorf("%w: id %d was removed; choose another, for example %d", errMemberExists, x.ID, m.nextID())
	}
	if err := errors.Join(checkPeerURLs(x.PeerURLs), checkClientURL(x.ClientURL)); err != nil {
		return err
	}
	if old, ok := m.get(x.ID); ok {
		if slices.Equal(old.PeerURLs, x.PeerURLs) {
			return errNoChange
		}
		return fmt.Errorf("%w: member %d is at %s", errMemberExists, x.ID, old.PeerURLs[0])
	}
	return m.urlsFree(x)
}

func (m *membership) mayUpdate(i int, x member) error {
	if i < 0 {
		return fmt.Errorf("%w: %d", errMemberUnknown, x.ID)
	}
	if err := checkClientURL(x.ClientURL); err != nil {
		return err
	}
	if len(x.PeerURLs) > 0 {
		if err := checkPeerURLs(x.PeerURLs); err != nil {
			return err
		}
		if err := m.urlsFree(x); err != nil {
			return err
		}
	}
	old := m.Members[i]
	if (len(x.PeerURLs) == 0 || slices.Equal(x.PeerURLs, old.PeerURLs)) && (x.ClientURL == "" || x.ClientURL == old.ClientURL) {
		return errNoChange
	}
	return nil
}

// checkPeerURLs matters at apply too: rafthttp panics on a URL it cannot parse.
func checkPeerURLs(urls []string) error {
	if len(urls) == 0 || len(urls) > maxPeerURLs {
		return fmt.Errorf("%w: %d peer URLs; a member has 1 to %d", errBadRequest, len(urls), maxPeerURLs)
	}
	for _, u := range urls {
		if len(u) > maxPeerURLBytes {
			return fmt.Errorf("%w: a peer URL of %d bytes; the limit is %d", errBadRequest, len(u), maxPeerURLBytes)
		}
		clean, err := parseHTTPURL(u)
		if err != nil {
			return fmt.Errorf("%w: %v", errBadRequest, err)
		}
		// Tables of before the port had one spelling may have leading zeros there.
		if host, port, err := splitHTTPURL(u); err != nil || "http://"+host+":"+port != u {
			return fmt.Errorf("%w: write the peer URL as %s", errBadRequest, clean)
		}
	}
	return nil
}

// checkClientURL bounds what is only shown: the table is in every snapshot.
func checkClientURL(u string) error {
	if u == "" {
		return nil
	}
	if len(u) > maxPeerURLBytes {
		return fmt.Errorf("%w: a client URL of %d bytes; the limit is %d", errBadRequest, len(u), maxPeerURLBytes)
	}
	if _, err := parseHTTPURL(u); err != nil {
		return fmt.Errorf("%w: client URL: %v", errBadRequest, err)
	}
	return nil
}

func (m *membership) urlsFree(x member) error {
	for _, o := range m.Members {
		for _, u := range x.PeerURLs {
			if o.ID != x.ID && slices.Contains(o.PeerURLs, u) {
				return fmt.Errorf("%w: %s belongs to member %d", errMemberExists, u, o.ID)
			}
		}
	}
	return nil
}

// confChange is the raft side of c. One change at a time needs no joint
// consensus (raft thesis 4.1).
func (c memberChange) confChange() (*raftpb.ConfChangeV2, error) {
	t := raftpb.ConfChangeUpdateNode
	switch {
	case c.Op == opAdd && c.Member.Learner:
		t = raftpb.ConfChangeAddLearnerNode
	case c.Op == opAdd, c.Op == opPromote:
		t = raftpb.ConfChangeAddNode
	case c.Op == opRemove:
		t = raftpb.ConfChangeRemoveNode
	}
	ctx, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode membership change: %w", err)
	}
	return &raftpb.ConfChangeV2{
		Transition: raftpb.ConfChangeTransitionAuto.Enum(),
		Changes:    []*raftpb.ConfChangeSingle{{Type: t.Enum(), NodeId: new(c.Member.ID)}},
		Context:    ctx,
	}, nil
}

// decodeConfChange reads what confChange wrote and refuses anything else: what
// raft would do and what the table would say must never differ.
func decodeConfChange(cc *raftpb.ConfChangeV2) (memberChange, error) {
	var c memberChange
	if err := json.Unmarshal(cc.GetContext(), &c); err != nil {
		return c, fmt.Errorf("%w: membership change: %v", errBadRequest, err)
	}
	want, err := c.confChange()
	if err != nil {
		return c, err
	}
	if len(cc.Changes) != 1 || cc.GetTransition() != raftpb.ConfChangeTransitionAuto ||
		cc.Changes[0].GetType() != want.Changes[0].GetType() || cc.Changes[0].GetNodeId() != want.Changes[0].GetNodeId() {
		return c, fmt.Errorf("%w: membership change whose parts disagree", errBadRequest)
	}
	return c, nil
}

// check holds a table from a file or a peer against its invariants: what was made
// by apply alone has them.
func (m *membership) check() error {
	if m == nil || m.ClusterID == 0 {
		return errors.New("member table: no cluster id")
	}
	last := uint64(0)
	for _, x := range m.Members {
		if x.ID <= last || x.ID >= 1<<64-2 || m.isRemoved(x.ID) {
			return fmt.Errorf("member table: id %d is out of order, removed or none", x.ID)
		}
		last = x.ID
		if err := errors.Join(checkPeerURLs(x.PeerURLs), checkClientURL(x.ClientURL), m.urlsFree(x)); err != nil {
			return fmt.Errorf("member table: member %d: %w", x.ID, err)
		}
	}
	if len(m.voters()) == 0 {
		return errors.New("member table: nobody votes")
	}
	return nil
}

// mayRemove refuses a removal after which the members alive now could not
// commit anything. alive must be true for this node itself.
func (m *membership) mayRemove(id uint64, alive func(uint64) bool) error {
	x, ok := m.get(id)
	if !ok || x.Learner {
		return nil
	}
	var left, up int
	for _, v := range m.voters() {
		if v == id {
			continue
		}
		left++
		if alive(v) {
			up++
		}
	}
	if left == 0 {
		return fmt.Errorf("%w: member %d", errLastVoter, id)
	}
	if need := left/2 + 1; up < need {
		return fmt.Errorf("%w: without member %d, %d of %d voters would be alive and %d are needed", errQuorumAtRisk, id, up, left, need)
	}
	return nil
}

// confState is what raft must think of the table.
func (m *membership) confState() *raftpb.ConfState {
	cs := &raftpb.ConfState{AutoLeave: new(false)}
	for _, x := range m.Members {
		if x.Learner {
			cs.Learners = append(cs.Learners, x.ID)
		} else {
			cs.Voters = append(cs.Voters, x.ID)
		}
	}
	return cs
}

// sameConf compares the parts of a ConfState that this program ever sets.
func sameConf(a, b *raftpb.ConfState) bool {
	set := func(ids []uint64) []uint64 {
		out := slices.Clone(ids)
		slices.Sort(out)
		return out
	}
	return slices.Equal(set(a.GetVoters()), set(b.GetVoters())) && slices.Equal(set(a.GetLearners()), set(b.GetLearners())) &&
		simpleConf(a) && simpleConf(b)
}

// simpleConf: no joint consensus, which this program never uses.
func simpleConf(c *raftpb.ConfState) bool {
	return len(c.GetVotersOutgoing()) == 0 && len(c.GetLearnersNext()) == 0 && !c.GetAutoLeave()
}
