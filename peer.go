package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"pontoon/kv"
)

// The peer port. Whoever reaches it is trusted to be a member, as in etcd
// without TLS: keep it on a private network. It is still not allowed to end
// the process by mistake: what raft or rafthttp would panic over is refused here.

// badMessage makes rafthttp answer 400 (it panics over other errors).
type badMessage struct{ error }

// WriteTo is what rafthttp looks for.
func (e badMessage) WriteTo(w http.ResponseWriter) {
	http.Error(w, e.Error(), http.StatusBadRequest)
}

// Process takes a message from a peer (rafthttp.Raft). It is called on the
// transport's goroutines.
func (n *raftNode) Process(ctx context.Context, m *raftpb.Message) error {
	if err := n.validateMessage(m); err != nil {
		n.met.refusedMessages.Inc()
		return badMessage{err}
	}
	n.queueMessage(m, messageBytes(m))
	return nil
}

// received is a message on its way to the loop, and what it costs there.
type received struct {
	*raftpb.Message
	bytes int64
}

func (n *raftNode) queueMessage(m *raftpb.Message, bytes int64) {
	if n.received.Add(bytes) <= maxReceived {
		select {
		case n.recvC <- received{m, bytes}:
			return
		default:
		}
	}
	n.received.Add(-bytes)
	n.met.droppedMessages.Inc()
}

// taken is a message that has left recvC.
func (n *raftNode) taken(r received) *raftpb.Message {
	n.received.Add(-r.bytes)
	return r.Message
}

// IsIDRemoved is asked by the transport before it answers a peer (rafthttp.Raft).
func (n *raftNode) IsIDRemoved(id uint64) bool { return n.members.Load().isRemoved(id) }

// ReportUnreachable and ReportSnapshot come from the transport, at times on
// the loop's own goroutine in the middle of a send: they must not wait for it.
func (n *raftNode) ReportUnreachable(id uint64) {
	n.mail.post(func() { n.raw.ReportUnreachable(id); delete(n.acked, id) })
}

func (n *raftNode) ReportSnapshot(id uint64, status raft.SnapshotStatus) {
	n.mail.post(func() { n.raw.ReportSnapshot(id, status) })
}

var fromPeers = map[raftpb.MessageType]bool{
	raftpb.MsgProp: true, raftpb.MsgApp: true, raftpb.MsgAppResp: true, raftpb.MsgVote: true, raftpb.MsgVoteResp: true,
	raftpb.MsgSnap: true, raftpb.MsgHeartbeat: true, raftpb.MsgHeartbeatResp: true, raftpb.MsgTransferLeader: true,
	raftpb.MsgTimeoutNow: true, raftpb.MsgReadIndex: true, raftpb.MsgReadIndexResp: true, raftpb.MsgPreVote: true, raftpb.MsgPreVoteResp: true,
}

// forwarded are the messages that a follower passes on to the leader in their
// sender's name: one that led a moment ago may pass them back to it.
var forwarded = map[raftpb.MessageType]bool{raftpb.MsgProp: true, raftpb.MsgReadIndex: true, raftpb.MsgTransferLeader: true}

// maxTermJump is more than elections can add while a member is away, and keeps
// a made-up term from bringing raft's term + 1 near the end of its numbers.
const maxTermJump = 1 << 32

// validateMessage refuses what no member sends: raft takes its
// peers at their word and panics. Step has the checks that need raft's state.
func (n *raftNode) validateMessage(m *raftpb.Message) error {
	if err := n.validateEnvelope(m); err != nil {
		return err
	}
	switch m.GetType() {
	case raftpb.MsgProp:
		return validateProposal(m.GetEntries())
	case raftpb.MsgApp:
		return validateAppend(m)
	case raftpb.MsgSnap:
		return n.validateSnapshot(m)
	case raftpb.MsgReadIndex, raftpb.MsgReadIndexResp:
		if e := m.GetEntries(); len(e) != 1 || e[0] == nil || len(e[0].GetData()) == 0 || len(e[0].GetData()) > 64 {
			return errors.New("read index without one short context")
		}
	}
	return nil
}

// validateEnvelope is validateMessage for what all types have.
func (n *raftNode) validateEnvelope(m *raftpb.Message) error {
	from := m.GetFrom()
	switch {
	case !fromPeers[m.GetType()]:
		return fmt.Errorf("message of type %v", m.GetType())
	case m.GetTo() != n.id:
		return fmt.Errorf("message for member %d reached member %d", m.GetTo(), n.id)
	case from == 0 || from == n.id && !forwarded[m.GetType()] || raft.IsLocalMsgTarget(from):
		return fmt.Errorf("message from %d", from)
	case m.GetTerm() > n.soft.Load().term+maxTermJump:
		return fmt.Errorf("message of term %d", m.GetTerm())
	case n.IsIDRemoved(from):
		return fmt.Errorf("message from member %d, which was removed", from)
	}
	if !fitsContext(m) {
		return fmt.Errorf("%v with a context of %d bytes", m.GetType(), len(m.GetContext()))
	}
	if m.Snapshot != nil && m.GetType() != raftpb.MsgSnap {
		return fmt.Errorf("%v with a snapshot", m.GetType())
	}
	// raft sets the term of every message but these, and panics if it has to
	// forward one of these that carries a term.
	if local := m.GetType() == raftpb.MsgProp || m.GetType() == raftpb.MsgReadIndex; local != (m.GetTerm() == 0) {
		return fmt.Errorf("%v of term %d", m.GetType(), m.GetTerm())
	}
	return nil
}

// messageBytes is what a message costs in recvC: all that came on the wire, fields
// that nobody knows included, and Go's objects around it.
func messageBytes(m *raftpb.Message) int64 {
	return int64(messageObject + len(m.GetEntries())*entryObject + proto.Size(m))
}

const (
	messageObject = 384 // bytes of a Message and of the numbers that it points to
	entryObject   = 160 // the same of an Entry, with its place in Entries
)

// fitsContext: raft gives a context to heartbeats, which it reads as a number, and to
// votes. Reads carry theirs as an entry.
func fitsContext(m *raftpb.Message) bool {
	c := m.GetContext()
	switch m.GetType() {
	case raftpb.MsgHeartbeat, raftpb.MsgHeartbeatResp:
		return len(c) == 0 || len(c) == 8
	case raftpb.MsgVote, raftpb.MsgPreVote:
		return len(c) == 0 || string(c) == "CampaignTransfer"
	}
	return len(c) == 0
}

var batches = sync.Pool{New: func() any { return new(kv.Batch) }}

// validateProposal looks into proposals, because a committed entry that cannot
// be applied would stop every member.
func validateProposal(ents []*raftpb.Entry) error {
	if len(ents) == 0 {
		return errors.New("proposal without entries")
	}
	for _, e := range ents {
		switch {
		case e == nil:
			return errors.New("nil entry")
		case e.GetType() == raftpb.EntryNormal:
			b := batches.Get().(*kv.Batch)
			err := kv.DecodeBatch(e.GetData(), b)
			if err == nil && (b.Node == 0 || !mayTick(b, 0)) {
				err = errors.New("a proposal that only a leader makes")
			}
			batches.Put(b)
			if err != nil {
				return err
			}
		case e.GetType() == raftpb.EntryConfChangeV2:
			var cc raftpb.ConfChangeV2
			if err := proto.Unmarshal(e.GetData(), &cc); err != nil {
				return err
			}
			if _, err := decodeConfChange(&cc); err != nil {
				return err
			}
		default:
			return fmt.Errorf("proposal of type %v", e.GetType())
		}
	}
	return nil
}

// validateAppend: the entries follow the message's index without a gap, and
// their terms never fall nor exceed the message's.
func validateAppend(m *raftpb.Message) error {
	term := m.GetLogTerm()
	for i, e := range m.GetEntries() {
		switch {
		case e == nil:
			return errors.New("nil entry")
		case e.GetIndex() != m.GetIndex()+1+uint64(i):
			return fmt.Errorf("entry %d follows entry %d", e.GetIndex(), m.GetIndex()+uint64(i))
		case e.GetTerm() < term || e.GetTerm() > m.GetTerm():
			return fmt.Errorf("entry of term %d after %d in an append of term %d", e.GetTerm(), term, m.GetTerm())
		case e.GetType() != raftpb.EntryNormal && e.GetType() != raftpb.EntryConfChangeV2:
			return fmt.Errorf("entry of type %v", e.GetType())
		}
		term = e.GetTerm()
	}
	return nil
}

// validateSnapshot holds a snapshot's message against its file. That the file is
// whole was seen when it came: only then has it its name.
func (n *raftNode) validateSnapshot(m *raftpb.Message) error {
	if err := checkSnapshotMeta(m); err != nil {
		return err
	}
	h, err := n.snaps.snapshotHeader(m.GetSnapshot().GetMetadata().GetIndex())
	if err == nil {
		err = n.snapshotFits(m, h)
	}
	return err
}

func checkSnapshotMeta(m *raftpb.Message) error {
	meta := m.GetSnapshot().GetMetadata()
	index := meta.GetIndex()
	if index == 0 || index >= 1<<63 || meta.GetTerm() == 0 || meta.GetTerm() > m.GetTerm() {
		return fmt.Errorf("snapshot of index %d and term %d", index, meta.GetTerm())
	}
	return nil
}

func (n *raftNode) snapshotFits(m *raftpb.Message, h snapHeader) error {
	meta := m.GetSnapshot().GetMetadata()
	switch {
	case h.Members.ClusterID != n.members.Load().ClusterID:
		return errors.New("snapshot file of another cluster")
	case h.Index != meta.GetIndex() || h.Term != meta.GetTerm() || !sameConf(h.Members.confState(), meta.GetConfState()):
		return errors.New("snapshot file and message disagree")
	}
	return nil
}

func (n *raftNode) isMember(id uint64) bool { return n.members.Load().index(id) >= 0 }

// refusedAnswer is told what was wrong with a peer's answer.
func (n *raftNode) refusedAnswer(err error) {
	n.met.refusedMessages.Inc()
	n.said.Error("a peer's answer was refused; do all members run the same version?", zap.Error(err))
}

// clusterInfo is what a member tells a joiner on the peer port.
type clusterInfo struct {
	Member  uint64      `json:"member,string"`
	Members *membership `json:"membership"`
	// CaughtUp: the learners that could be promoted now; only a leader knows.
	CaughtUp []uint64 `json:"caught_up,omitempty"`
	// Without is the member that was asked about, and AtRisk why the others would be no
	// quorum of the living without it, if so; only a leader says.
	Without uint64 `json:"without,string,omitempty"`
	AtRisk  string `json:"at_risk,omitempty"`
}

// clusterInfoPath is also for those who do not know the cluster yet. With ?without=ID
// it costs a round of heartbeats, and members alone may ask.
const clusterInfoPath = "/pontoon/cluster"

// peerHandler serves the peer port. rafthttp has the streams; what comes with a
// body is received here (peerreceive.go).
func (n *raftNode) peerHandler(next http.Handler) http.Handler {
	in := newPeerReceiver(n)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			// rafthttp reads what it decoded without a look, and panics to
			// cut a connection.
			if p := recover(); p != nil {
				n.met.refusedMessages.Inc()
				n.log.Debug("peer request refused", zap.Any("reason", p))
				http.Error(w, "malformed request", http.StatusBadRequest)
			}
		}()
		readUntil(http.NewResponseController(w), time.Now().Add(peerPatience))
		switch r.URL.Path {
		case clusterInfoPath:
			n.serveCluster(w, r)
			return
		case asidePath:
			n.serveAside(w, r)
			return
		}
		// With this header any caller could make us send to any address.
		// Members are known from the table instead.
		r.Header.Del("X-PeerURLs")
		if err := checkVersions(r.Header); err != nil {
			n.met.refusedMessages.Inc()
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		switch r.URL.Path {
		case rafthttp.RaftPrefix:
			in.serve(w, r, in.message)
		case rafthttp.RaftSnapshotPrefix:
			in.serve(w, r, in.snapshot)
		default:
			if id, ok := strings.CutPrefix(r.URL.Path, rafthttp.RaftStreamPrefix+"/"); ok {
				n.meet(path.Base(id), r.Header.Get("X-Etcd-Cluster-ID"))
			}
			next.ServeHTTP(w, r)
		}
	})
}

// maxStrangers bounds the members that a member knows by their connections alone.
const maxStrangers = 32

// nowhere is where a stranger cannot be reached: what is sent to it travels on
// the connection that it has opened.
const nowhere = "http://127.0.0.1:0"

// meet lets a member that this one has not in its table yet open a connection
// for our answers. Without it a member that was away, or that waits for its
// first snapshot, could never answer a leader which was let in after the table
// it knows, and so not learn that it was let in. The address stays unknown until
// the table says it: a caller does not get to choose where we send.
func (n *raftNode) meet(hexID, hexCluster string) {
	id, err := types.IDFromString(hexID)
	m := n.members.Load()
	if err != nil || id == 0 || uint64(id) == n.id || raft.IsLocalMsgTarget(uint64(id)) || hexCluster != types.ID(m.ClusterID).String() {
		return
	}
	n.strangers.Lock()
	defer n.strangers.Unlock()
	n.strangers.ids = slices.DeleteFunc(n.strangers.ids, func(id uint64) bool { return m.index(id) >= 0 || m.isRemoved(id) })
	if m.index(uint64(id)) >= 0 || m.isRemoved(uint64(id)) || len(n.strangers.ids) >= maxStrangers || slices.Contains(n.strangers.ids, uint64(id)) {
		return
	}
	n.strangers.ids = append(n.strangers.ids, uint64(id))
	n.tr.AddPeer(id, []string{nowhere}) // does nothing for a peer that the joiner was told of
}

func (n *raftNode) serveCluster(w http.ResponseWriter, r *http.Request) {
	without := uint64(0)
	if id := r.URL.Query().Get("without"); id != "" {
		if !n.admit(w, r) {
			return
		}
		var err error
		if without, err = strconv.ParseUint(id, 10, 64); err != nil {
			http.Error(w, "no member id", http.StatusBadRequest)
			return
		}
	}
	if len(n.members.Load().Members) == 0 {
		http.Error(w, "this member waits for its first snapshot", http.StatusServiceUnavailable)
		return
	}
	info := n.clusterInfo(r.Context(), without)
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(info); err != nil {
		n.log.Debug("answer peer", zap.Error(err))
	}
}

// clusterInfo is this member's answer; without is 0 or whom it is asked about.
func (n *raftNode) clusterInfo(ctx context.Context, without uint64) *clusterInfo {
	info := &clusterInfo{Member: n.id, Members: n.members.Load()}
	if without != 0 {
		leads, err := n.survives(ctx, without)
		if errors.Is(err, errQuorumAtRisk) {
			info.AtRisk = strings.TrimPrefix(err.Error(), errQuorumAtRisk.Error()+": ")
			err = nil
		}
		if leads && (err == nil || errors.Is(err, errLastVoter)) { // the table itself refuses the last
			info.Without = without
		}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var caughtUp []uint64
	if err := n.do(ctx, func() {
		for _, m := range info.Members.Members {
			if m.Learner && n.now.state == raft.StateLeader && n.caughtUp(m.ID) {
				caughtUp = append(caughtUp, m.ID)
			}
		}
	}); err == nil { // else the closure may still run
		info.CaughtUp = caughtUp
	}
	return info
}

// fetchCluster asks the peers of --cluster for the member table until one
// answers that lists this node, or ctx ends.
func fetchCluster(ctx context.Context, cfg Config, log *zap.Logger) (*membership, error) {
	said := ""
	for {
		m, err := askCluster(ctx, cfg)
		if err == nil || errors.Is(err, errRefuse) || errors.Is(err, errUsage) {
			return m, err
		}
		if err.Error() != said && ctx.Err() == nil {
			said = err.Error()
			log.Warn("waiting to be let in", zap.Error(err))
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) { // told to stop
				return nil, ctx.Err()
			}
			return nil, fmt.Errorf("join: gave up after %v: %s", cfg.JoinTimeout, said)
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// askCluster asks each peer of --cluster once. The error is that of the last one that
// answered, or else that of the last.
func askCluster(ctx context.Context, cfg Config) (*membership, error) {
	silent := fmt.Errorf("%w: --join needs the URL of a member in --cluster besides this node's own", errUsage)
	var said error
	for _, url := range cfg.otherURLs() {
		info, err := askPeer(ctx, peerClient(), url)
		if errors.Is(err, errNoAnswer) {
			silent = err
			continue
		}
		if err == nil {
			err = mayJoin(info.Members, cfg, url)
		}
		if err == nil {
			return info.Members, nil
		}
		if said = err; errors.Is(err, errRefuse) {
			break
		}
	}
	if said == nil {
		said = silent
	}
	return nil, said
}

func peerClient() *http.Client {
	return &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
}

func mayJoin(m *membership, cfg Config, peer string) error {
	self, ok := m.get(cfg.ID)
	owner := m.owner(cfg.peerURL())
	switch {
	case m.isRemoved(cfg.ID):
		return fmt.Errorf("%w: member %d was removed from the cluster and its id never comes back; choose another, for example %d", errRefuse, cfg.ID, m.nextID())
	case !ok && owner != 0:
		return fmt.Errorf("member %d is not in the cluster of %s, and %s is the URL of member %d there: start it with --id %d, or remove member %d (curl -X DELETE http://<a member's client address>/%d) and add this one",
			cfg.ID, peer, cfg.peerURL(), owner, owner, owner, owner)
	case !ok:
		return fmt.Errorf("member %d is not in the cluster of %s yet: tell it with curl -X POST -d %s http://<a member's client address>/%d", cfg.ID, peer, cfg.peerURL(), cfg.ID)
	case self.Started || !self.Learner:
		// An empty directory under an id that has voted could vote again, for
		// somebody else.
		return fmt.Errorf("%w: member %d has been running in the cluster of %s, and %s is empty: its data is lost; remove it (curl -X DELETE http://<a member's client address>/%d) and add a new one, for example with id %d",
			errRefuse, cfg.ID, peer, cfg.DataDir, cfg.ID, m.nextID())
	case !slices.Contains(self.PeerURLs, cfg.peerURL()):
		return fmt.Errorf("%w: the cluster knows member %d at %s, --cluster says %s; correct --cluster, or move the member (curl -X PUT http://<a member's client address>/v1/members/%d -d '{\"peer_url\":\"%s\"}')",
			errRefuse, cfg.ID, strings.Join(self.PeerURLs, ","), cfg.peerURL(), cfg.ID, cfg.peerURL())
	}
	return nil
}

// mayFound asks the peers whether this member has been running before. A founder
// whose directory was lost would found itself anew without a word, and vote
// again. Peers that do not answer say nothing: clusters start cold. founder.go has
// the rest.
func mayFound(ctx context.Context, cfg Config) error {
	want := bootstrapMembership(cfg.ClusterToken, cfg.Cluster).ClusterID
	for a := range askAll(ctx, cfg.otherURLs()) {
		if a.err != nil {
			continue
		}
		m := a.info.Members
		if m.ClusterID != want {
			return fmt.Errorf("%w: %s already serves cluster %016x, and --cluster would found another; to join that one, POST /%d to it and start with --join; else correct --cluster",
				errRefuse, a.url, m.ClusterID, cfg.ID)
		}
		if self, ok := m.get(cfg.ID); m.isRemoved(cfg.ID) || ok && self.Started {
			return mayJoin(m, cfg, a.url)
		}
	}
	return nil
}

// peerAnswer is what one peer said of its cluster, or why it said nothing.
type peerAnswer struct {
	url  string
	info *clusterInfo
	err  error
}

// askAll asks the peers at these URLs all at the same time, each for as long as
// peerClient waits, and yields their answers as they come: one that hangs keeps
// nobody from being heard. To stop early ends the questions that are open.
func askAll(ctx context.Context, urls []string) iter.Seq[peerAnswer] {
	return func(yield func(peerAnswer) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		answers := make(chan peerAnswer, len(urls))
		for _, url := range urls {
			// goroutine: peer-asker
			go func() {
				info, err := askPeer(ctx, peerClient(), url)
				answers <- peerAnswer{url, info, err}
			}()
		}
		for range urls {
			if !yield(<-answers) {
				return
			}
		}
	}
}

func askPeer(ctx context.Context, c *http.Client, url string) (*clusterInfo, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+clusterInfoPath, nil)
	if err != nil {
		return nil, err
	}
	return fetchInfo(c, req, url)
}

// askMember asks another member of this cluster; without as in clusterInfo.
func (n *raftNode) askMember(ctx context.Context, m member, without uint64) (*clusterInfo, error) {
	url, c := m.PeerURLs[0], peerClient()
	path := clusterInfoPath
	if without != 0 {
		path += "?without=" + strconv.FormatUint(without, 10)
		c.Timeout += n.cfg.survivePatience()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+path, nil)
	if err != nil {
		return nil, err
	}
	asMember(req, n.members.Load().ClusterID)
	return fetchInfo(c, req, url)
}

// asMember adds the headers that admit asks for.
func asMember(req *http.Request, cluster uint64) {
	req.Header.Set("X-Etcd-Cluster-ID", types.ID(cluster).String())
	req.Header.Set("X-Server-Version", peerVersion)
}

// peerVersion is what this member says where rafthttp does not speak for it; see compatible.
const peerVersion = "3.7.0"

// errNoAnswer: a peer may be down, or hang.
var errNoAnswer = errors.New("no answer")

func fetchInfo(c *http.Client, req *http.Request, url string) (*clusterInfo, error) {
	resp, err := c.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w from %s: %w", errNoAnswer, url, err)
	}
	defer resp.Body.Close()
	var info clusterInfo
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound: // so does the client port
		return nil, fmt.Errorf("%s is no Pontoon peer address (it answered %s); --cluster takes the peer URLs of members, not those of clients", url, resp.Status)
	default:
		return nil, fmt.Errorf("%s answered %s", url, resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&info); err != nil {
		return nil, fmt.Errorf("%s is no Pontoon peer address (%w)", url, err)
	}
	if err := info.Members.check(); err != nil {
		return nil, fmt.Errorf("%s is no Pontoon peer address (%w)", url, err)
	}
	return &info, nil
}

// raftLogger gives raft's own log to zap. What raft calls information or a
// warning is detail to an operator; a panic is a broken invariant and stays one.
type raftLogger struct{ *zap.Logger }

func (l raftLogger) Debug(v ...any)                   {}
func (l raftLogger) Debugf(format string, v ...any)   {}
func (l raftLogger) Info(v ...any)                    { l.Sugar().Debug(v...) }
func (l raftLogger) Infof(format string, v ...any)    { l.Sugar().Debugf(format, v...) }
func (l raftLogger) Warning(v ...any)                 { l.Sugar().Debug(v...) }
func (l raftLogger) Warningf(format string, v ...any) { l.Sugar().Debugf(format, v...) }
func (l raftLogger) Error(v ...any)                   { l.Sugar().Error(v...) }
func (l raftLogger) Errorf(format string, v ...any)   { l.Sugar().Errorf(format, v...) }
func (l raftLogger) Fatal(v ...any)                   { l.broken(fmt.Sprint(v...)) }
func (l raftLogger) Fatalf(format string, v ...any)   { l.broken(fmt.Sprintf(format, v...)) }
func (l raftLogger) Panic(v ...any)                   { l.broken(fmt.Sprint(v...)) }
func (l raftLogger) Panicf(format string, v ...any)   { l.broken(fmt.Sprintf(format, v...)) }

// broken ends the process: raft found an invariant violated, and whatever it
// did next would spread that.
func (l raftLogger) broken(what string) {
	// panic: raft's logger has no other way to stop raft.
	l.Logger.Panic("raft: " + what)
}

var _ transport = (*rafthttp.Transport)(nil)
var _ rafthttp.Raft = (*raftNode)(nil)
