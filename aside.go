package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"pontoon/internal/wal"
)

// A member whose disk lost or changed something that was synced cannot go on as if
// nothing had happened: it may have voted in a term that it no longer knows, and
// acknowledged entries that it no longer has. Nor need it be thrown away, where
// the others hold all that was committed. It stands aside: it puts what is left
// out of the way, begins with an empty log, follows, and does not vote until it
// has caught up with a leader that was elected without it.
//
// # Why nothing is lost
//
// Let T be the hard term that the file synced tells of: in no later term has this
// member promised anything (synced.go). The new log begins in term T+1 without a
// vote. Two rules are left to raft and two are here:
//
//  1. A leader of a term up to T is refused. It may count this member for entries
//     that are gone. raft does that: a message of an older term is answered with
//     the newer term, and such a leader steps down.
//  2. A leader of a later term begins to count this member at zero. raft too.
//  3. This member answers no request for a vote and never campaigns.
//  4. That ends once the last entry on this disk is of a term after T.
//
// A leader of a term t > T was elected by a majority Q without this member: before
// it stood aside it promised nothing in t, and since then it gives no votes. An
// entry that was committed with the help of what is lost was stored by a majority;
// so another member of it is in Q, and had the entry when it voted. By the rule of
// elections (raft, 5.4.1) the leader of t has it. So do all logs that hold an entry of
// t, as two logs that share an entry share all before it: this one at step 4, and
// from there on its vote rests on what it has, as that of any other.
//
// To the others it is, up to T, a member that has failed, and from T+1 on one that is slow. So
// they have to be a majority by themselves: with one or two voters it refuses to start.

// asideFile is what the file "aside" holds, as one sealed line of JSON.
type asideFile struct {
	Term    uint64 `json:"term"` // T
	Cluster uint64 `json:"cluster_id,string"`
	Member  uint64 `json:"member_id,string"`
	Number  int    `json:"n"` // of the directory damaged-<n>
	// Moved: the new log is in place. Before that, the next start goes on with it.
	Moved bool `json:"moved"`
}

// aside is the same for the loop.
type aside struct {
	term uint64
	end  func() error // forgets it, durably
}

func (d *diskStore) asidePath() string { return filepath.Join(d.dir, "aside") }

// readAside returns nil if this member does not stand aside.
func (d *diskStore) readAside() (*asideFile, error) {
	b, err := os.ReadFile(d.asidePath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var line string
	if err == nil {
		line, err = unseal(b)
	}
	a := &asideFile{}
	if err == nil {
		err = json.Unmarshal([]byte(line), a)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s is damaged, so this member cannot know when it may vote again: %w; %s", errRefuse, d.asidePath(), err, replaceHint)
	}
	return a, nil
}

func (d *diskStore) writeAside(a *asideFile) error {
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	return writeFileSync(d.asidePath(), seal(string(b)))
}

// loadAside is the last step of load. A crash may have come between the entry that
// ends it and the end.
func (d *diskStore) loadAside(r *recovered) (*aside, error) {
	a, err := d.readAside()
	if a == nil || err != nil {
		return nil, err
	}
	last := r.snap.Term
	if n := len(r.entries); n > 0 {
		last = r.entries[n-1].GetTerm()
	}
	if last > a.Term {
		return nil, d.endAside()
	}
	return &aside{a.Term, d.endAside}, nil
}

func (d *diskStore) endAside() error {
	if err := errors.Join(os.Remove(d.asidePath()), syncDir(d.dir)); err != nil {
		return fmt.Errorf("%w: vote again: %w", errDurability, err)
	}
	return nil
}

// loadOrStandAside is load for a member of a cluster. table is asked for the
// members that are known, where load finds damage; nil: nobody knows.
func (d *diskStore) loadOrStandAside(table func() *membership) (*recovered, error) {
	r, err := d.load()
	var damage *damageError
	if !errors.As(err, &damage) {
		return r, err
	}
	if why := d.mayStandAside(table()); why != nil {
		return nil, fmt.Errorf("%w (it cannot stand aside and heal: %w)", err, why)
	}
	d.log.Error("this member stands aside: it begins with an empty log, and votes again once it has caught up", zap.Error(damage.error))
	if err := d.standAside(); err != nil {
		return nil, fmt.Errorf("%w: stand aside: %w", errDurability, err)
	}
	return d.load()
}

// mayStandAside: it is known who this member is and what it may have promised, and
// the others are a majority without it.
func (d *diskStore) mayStandAside(m *membership) error {
	switch {
	case d.owner == owner{} || d.marked.hardTerm == 0:
		return fmt.Errorf("%s does not say whose log it was", filepath.Join(d.dir, "synced"))
	case d.owner.member != d.id:
		return fmt.Errorf("%s belongs to member %d", d.dir, d.owner.member)
	case m == nil:
		return errors.New("no other member answers, and no snapshot here names them; start the others first")
	case d.owner.cluster != m.ClusterID:
		return fmt.Errorf("%s belongs to cluster %016x, and the others are cluster %016x", d.dir, d.owner.cluster, m.ClusterID)
	case m.isRemoved(d.id):
		return errors.New("it was removed from the cluster")
	}
	voters := m.voters()
	others := len(slices.DeleteFunc(slices.Clone(voters), func(id uint64) bool { return id == d.id }))
	if others < len(voters)/2+1 {
		return fmt.Errorf("of %d voters the others are no majority, so what only this member had would be lost; it takes 3", len(voters))
	}
	return nil
}

// standAside may be cut short at any point: as soon as the file is there, the next
// start goes on (resumeAside).
func (d *diskStore) standAside() error {
	old, err := d.readAside() // damaged once more, before it had caught up
	if err != nil {
		return err
	}
	a := &asideFile{Term: d.marked.hardTerm, Cluster: d.owner.cluster, Member: d.owner.member, Number: 1}
	if old != nil {
		a.Term = max(a.Term, old.Term)
	}
	for _, n := range d.damagedDirs() {
		a.Number = max(a.Number, n+1)
	}
	if err := d.writeAside(a); err != nil {
		return err
	}
	if d.wal != nil {
		// Its files are only moved; what it still holds in its buffer is of no use.
		if err := d.wal.Close(); err != nil {
			d.log.Debug("close damaged log", zap.Error(err))
		}
		d.wal = nil
	}
	err = d.mark.Close()
	d.mark = nil
	return errors.Join(err, d.resumeAside())
}

// resumeAside moves what is left out of the way and puts an empty log in its
// place. Each step finds what the ones before it did.
func (d *diskStore) resumeAside() error {
	a, err := d.readAside()
	if a == nil || a.Moved || err != nil {
		return err
	}
	for _, step := range d.asideSteps(a) {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (d *diskStore) asideSteps(a *asideFile) []func() error {
	to := filepath.Join(d.dir, fmt.Sprint("damaged-", a.Number))
	move := func(name string) error {
		if _, err := os.Stat(filepath.Join(to, name)); err == nil {
			return nil // by an earlier attempt, and what is here now is new
		}
		if err := os.Rename(filepath.Join(d.dir, name), filepath.Join(to, name)); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	return []func() error{
		func() error { // one is kept, the newest
			for _, n := range d.damagedDirs() {
				if n != a.Number {
					if err := os.RemoveAll(filepath.Join(d.dir, fmt.Sprint("damaged-", n))); err != nil {
						return err
					}
				}
			}
			return errors.Join(os.MkdirAll(to, 0o700), syncDir(d.dir))
		},
		func() error { // the new log ends before what the old one held
			return writeFileSync(filepath.Join(d.dir, "synced"), string(syncMark{hardTerm: a.Term}.encode(owner{a.Cluster, a.Member})))
		},
		func() error { return errors.Join(move("wal"), syncDir(to), syncDir(d.dir)) },
		func() error { return errors.Join(move("snap"), syncDir(to), syncDir(d.dir)) },
		func() error { return errors.Join(os.MkdirAll(d.snapDir(), 0o700), syncDir(d.dir)) },
		func() error {
			if wal.Exists(d.walDir()) {
				return nil
			}
			return d.createLog(walMetadata{Version: 1, ClusterID: a.Cluster, MemberID: a.Member, Joined: true}, func(l *wal.Log) error {
				l.State(wal.State{Term: a.Term + 1})
				return l.Sync()
			})
		},
		func() error { a.Moved = true; return d.writeAside(a) },
	}
}

func (d *diskStore) damagedDirs() (numbers []int) {
	names, err := fs.Glob(os.DirFS(d.dir), "damaged-*")
	if err != nil {
		return nil // the pattern is well-formed
	}
	for _, name := range names {
		var n int
		if _, err := fmt.Sscanf(name, "damaged-%d", &n); err == nil {
			numbers = append(numbers, n)
		}
	}
	return numbers
}

// salvageTable is the member table of the newest snapshot whose header can be read,
// and of the log after it, as far as that can be: the one with the fewest voters, where
// it is not known whether a change was committed. It may be old. nil: there is none.
func (d *diskStore) salvageTable() *membership {
	files, err := d.snapshotFiles()
	if err != nil {
		return nil
	}
	for _, index := range slices.Backward(files) {
		h, err := d.snapshotHeader(index)
		if err != nil {
			continue
		}
		r := &recovered{snap: h}
		c, err := wal.Read(d.walDir(), wal.Visitor{Entry: r.add})
		d.log.Debug("read what is left of the log", zap.Uint64("from", index), zap.Int("entries", len(r.entries)), zap.Error(err))
		r.hard = &raftpb.HardState{Commit: new(c.State.Commit)}
		committed := r.table()
		r.hard.Commit = new(uint64(math.MaxUint64))
		if all := r.table(); len(all.voters()) < len(committed.voters()) {
			return all
		}
		return committed
	}
	return nil
}

// askTable asks the peers of --cluster for the member table; nil: nobody answers.
// One of them may lag behind, or have been removed without knowing: of what they say
// it takes what speaks most against standing aside.
func askTable(ctx context.Context, cfg Config) (table *membership) {
	for a := range askAll(ctx, cfg.otherURLs()) {
		if a.err != nil {
			continue
		}
		m := a.info.Members
		if table == nil || m.isRemoved(cfg.ID) || !table.isRemoved(cfg.ID) && len(m.voters()) < len(table.voters()) {
			table = m
		}
	}
	return table
}

// asideState is the loop's side.
type asideState struct {
	term  atomic.Uint64 // T, 0: this member votes; set by the loop only
	end   func() error
	heard uint64 // tick at which an old leader was first heard of, 0: not yet
}

func (s *asideState) init(a *aside) {
	if a != nil {
		s.end = a.end
		s.term.Store(a.term)
	}
}

func (s *asideState) stands() bool { return s.term.Load() != 0 }

// err is why a member that stands aside is not ready.
func (s *asideState) err() error {
	if s.stands() {
		return errAside
	}
	return nil
}

var errAside = errors.New("this member stands aside after damage to its disk, until it has caught up")

// asidePatience is for how many ticks an old leader is left alone, so that it can
// hand over before this member's newer term makes it step down.
const asidePatience = 10

// drops says which messages a member that stands aside does not answer.
func (s *asideState) drops(m *raftpb.Message, tick uint64) bool {
	if !s.stands() {
		return false
	}
	switch m.GetType() {
	case raftpb.MsgVote, raftpb.MsgPreVote, raftpb.MsgTimeoutNow:
		return true
	case raftpb.MsgApp, raftpb.MsgHeartbeat, raftpb.MsgSnap:
		if m.GetTerm() > s.term.Load() {
			return false
		}
		if s.heard == 0 {
			s.heard = max(tick, 1)
		}
		return tick < s.heard+asidePatience
	}
	return false
}

// leaveAside is called when the log on disk may have grown.
func (n *raftNode) leaveAside() error {
	if !n.aside.stands() {
		return nil
	}
	last, err := n.mem.Term(n.stable)
	if err != nil {
		return fmt.Errorf("term of the last entry: %w", err)
	}
	if last <= n.aside.term.Load() {
		return nil
	}
	if err := n.aside.end(); err != nil {
		return err
	}
	n.aside.term.Store(0)
	n.log.Info("this member has caught up with a leader that was elected without it, and votes again", zap.Uint64("last", n.stable))
	return nil
}

// asideRequest asks a leader of a term up to Term to hand over to another member
// than Member, which stands aside. The answer is that of clusterInfoPath.
type asideRequest struct {
	Member uint64 `json:"member,string"`
	Term   uint64 `json:"term,string"`
}

const asidePath = "/pontoon/aside"

func (n *raftNode) serveAside(w http.ResponseWriter, r *http.Request) {
	var req asideRequest
	if r.Method != http.MethodPost {
		http.Error(w, "POST it", http.StatusMethodNotAllowed)
		return
	}
	if !n.admit(w, r) {
		n.met.refusedMessages.Inc()
		return
	}
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<10)).Decode(&req)
	if err != nil || n.members.Load().index(req.Member) < 0 || req.Term == 0 || req.Term > n.soft.Load().term+maxTermJump {
		n.met.refusedMessages.Inc()
		http.Error(w, fmt.Sprintf("not a member that stands aside (%v)", err), http.StatusBadRequest)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), time.Second)
	defer cancel()
	if err := n.do(ctx, func() { n.yieldTo(req) }); err != nil {
		n.log.Debug("hand over for a member that stands aside", zap.Error(err))
	}
	n.serveCluster(w, r)
}

// yieldTo hands leadership over where that helps the member that asks. If nobody
// can take it, the member's newer term will end this leadership.
func (n *raftNode) yieldTo(req asideRequest) {
	if to := n.heir(req); to != raft.None {
		n.log.Info("handing over leadership, so that a member that lost its log can follow", zap.Uint64("member", req.Member), zap.Uint64("to", to))
		n.raw.TransferLeader(to)
	}
}

// heir is who leads after that, None: this member goes on.
func (n *raftNode) heir(req asideRequest) uint64 {
	if n.now.term > req.Term || req.Member == n.id {
		return raft.None
	}
	return n.successor(req.Member)
}

// askToYield runs while this member stands aside: it tells the others, who answer
// with the member table, so that even the leader of a changed cluster is found.
func (s *server) askToYield(ctx context.Context) {
	peers := bootstrapMembership(s.cfg.ClusterToken, s.cfg.Cluster)
	peers.ClusterID = uint64(s.tr.ClusterID)
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for term := s.node.aside.term.Load(); term != 0; term = s.node.aside.term.Load() {
		body, err := json.Marshal(asideRequest{s.cfg.ID, term})
		if err != nil {
			return
		}
		for _, m := range peers.Members {
			if m.ID == s.cfg.ID || len(m.PeerURLs) == 0 {
				continue
			}
			info, err := postAside(ctx, m.PeerURLs[0], peers.ClusterID, body)
			if err != nil || info.Members.ClusterID != peers.ClusterID {
				s.log.Debug("ask to hand over", zap.Uint64("member", m.ID), zap.Error(err))
				continue
			}
			for _, p := range info.Members.Members {
				if p.ID != s.cfg.ID {
					s.lanes.AddPeer(types.ID(p.ID), p.PeerURLs) // does nothing for a known peer
				}
			}
			peers = info.Members
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

func postAside(ctx context.Context, url string, cluster uint64, body []byte) (*clusterInfo, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+asidePath, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	asMember(req, cluster)
	return fetchInfo(peerClient(), req, url)
}
