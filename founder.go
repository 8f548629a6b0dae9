package main

import (
	"context"
	"fmt"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
)

// A founder whose data directory was lost founds itself anew: a log that holds nothing
// but the first member table, without a vote, as if it had never promised anything. With
// its vote a member could lead that lacks what it has acknowledged. mayFound asks the
// peers before, but cannot ask those that are down.
//
// So who has such a log gives no vote to a candidate that has more, before the
// candidate's own table says that this member was never seen at work (opStarted). Where
// it was, the member ends. In a cluster that is being founded the first candidates have
// no more than it has, and nobody asks.

// founder is the loop's side.
type founder struct {
	asking bool
	proven bool // a candidate said that this member is new
}

// withholds says whether m asks for a vote that must wait, and has the candidate asked.
func (n *raftNode) withholds(m *raftpb.Message) bool {
	f := &n.founder
	if t := m.GetType(); t != raftpb.MsgVote && t != raftpb.MsgPreVote || m.GetIndex() <= 1 || n.stable != 1 || f.proven {
		return false
	}
	candidate, known := n.members.Load().get(m.GetFrom())
	if f.asking || !known || len(candidate.PeerURLs) == 0 {
		return true
	}
	f.asking = true
	// goroutine: founder-asker
	n.spawn(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		info, err := n.ask(ctx, candidate, 0)
		n.mail.post(func() { n.toldOfFounding(candidate, info, err) })
	})
	return true
}

// toldOfFounding takes the answer. Without one the next request for a vote asks again.
func (n *raftNode) toldOfFounding(candidate member, info *clusterInfo, err error) {
	f := &n.founder
	f.asking = false
	if err != nil || info.Members.ClusterID != n.members.Load().ClusterID {
		n.log.Debug("a candidate could not be asked whether this member is new", zap.Uint64("candidate", candidate.ID), zap.Error(err))
		return
	}
	if self, ok := info.Members.get(n.id); !info.Members.isRemoved(n.id) && (!ok || !self.Started) {
		f.proven = true
		return
	}
	n.removed = fmt.Errorf("%w: member %d says that this one, member %d, has been running in the cluster, and its log is new: its data was lost, and with it what it has promised; remove it (DELETE /%d on another member) and add a new one, for example with id %d",
		errRefuse, candidate.ID, n.id, n.id, info.Members.nextID())
}
