package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/tracker"

	"pontoon/api"
)

// What an operator can see of a member. All of it answers without a leader and
// without the raft loop, so that it works when nothing else does; what those alone
// know is asked for a moment, and then left out, or told as what is wrong.

// describe is one row of the member table for the API.
func (s *kvstore) describe(m member) api.Member {
	role := api.RoleVoter
	if m.Learner {
		role = api.RoleLearner
	}
	return api.Member{ID: m.ID, PeerURLs: m.PeerURLs, ClientURL: m.ClientURL, Role: role, Leader: m.ID == s.leader()}
}

// members is the member table as this member knows it.
func (s *kvstore) members() []api.Member {
	out := []api.Member{} // never null in JSON
	for _, m := range s.node.members.Load().Members {
		out = append(out, s.describe(m))
	}
	return out
}

// status is this member's view of itself and its peers.
func (s *kvstore) status(ctx context.Context) api.Status {
	members, soft := s.node.members.Load(), s.node.soft.Load()
	s.mu.RLock()
	st := api.Status{Revision: s.mu.state.Revision(), CompactRevision: s.mu.state.History().Compacted(), Keys: int64(s.mu.state.Len()), Sizes: api.Sizes{StateBytes: s.mu.state.Bytes()}}
	s.mu.RUnlock()
	st.ID, st.ClusterID = s.node.id, fmt.Sprintf("%016x", members.ClusterID)
	st.Role = role(soft.state)
	if m, ok := members.get(s.node.id); !ok || m.Learner {
		st.Role = api.RoleLearner
	}
	st.Leader, st.Term = soft.lead, soft.term
	st.CommittedIndex = s.node.progress.committed.Load()
	st.AppliedIndex = s.applied.At()
	st.LastIndex = s.node.progress.last.Load()
	st.SnapshotIndex = s.node.progress.snapshot.Load()
	st.Sizes.WALBytes, st.Sizes.SnapshotBytes = s.disk.sizes()
	st.Version = version
	st.Diverged = s.standing() == diverged
	st.UptimeSeconds = time.Since(s.started).Seconds()
	st.Peers = s.peers(ctx, members)
	return st
}

func role(st raft.StateType) string {
	switch st {
	case raft.StateLeader:
		return api.RoleLeader
	case raft.StateFollower:
		return api.RoleFollower
	}
	return api.RoleCandidate
}

// peers asks the loop; a loop that hangs leaves the list without its part.
func (s *kvstore) peers(ctx context.Context, members *membership) []api.Peer {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	match, seen, alive := map[uint64]uint64{}, map[uint64]time.Duration{}, map[uint64]bool{}
	err := s.node.do(ctx, func() {
		s.node.raw.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) {
			match[id] = pr.Match
		})
		for _, m := range members.Members {
			alive[m.ID] = s.node.alive(m.ID)
			if at, ok := s.node.lastSeen[m.ID]; ok {
				seen[m.ID] = time.Duration(s.node.ticks-at) * s.cfg.TickInterval
			}
		}
	})
	out := []api.Peer{}
	for _, m := range members.Members {
		if m.ID == s.node.id {
			continue
		}
		p := api.Peer{ID: m.ID, Role: s.describe(m).Role}
		if err == nil { // else f may still be running
			p.MatchIndex, p.Active = match[m.ID], alive[m.ID]
			if ago, ok := seen[m.ID]; ok {
				p.LastContact = time.Now().Add(-ago).UTC().Truncate(time.Millisecond)
			}
		}
		out = append(out, p)
	}
	return out
}

// live says whether restarting this process could help.
func (s *kvstore) live(ctx context.Context) []check {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var state error
	if s.standing() == diverged {
		state = errDiverged // a restart makes the state anew
	}
	return []check{{"raft loop", s.node.do(ctx, func() {})}, {"state as on the other members", state}}
}

// checks say whether this member should get traffic. A low disk is not among
// them: reads go on (pontoon_disk_low tells of it).
func (s *kvstore) checks(ctx context.Context) []check {
	out := s.live(ctx)
	var stopping, member error
	if s.stopping.Load() {
		stopping = errStopping
	}
	if !slices.Contains(s.node.members.Load().voters(), s.node.id) {
		member = errors.New("this member is not a voter yet")
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.electionTimeout()+time.Second)
	defer cancel()
	return append(out,
		check{"not shutting down", stopping},
		check{"voter", member},
		check{"log whole", s.node.aside.err()},
		check{"linearizable read", s.sync(ctx, readOptions{})},
	)
}
