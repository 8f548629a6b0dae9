package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	stats "go.etcd.io/etcd/server/v3/etcdserver/api/v2stats"
	"go.uber.org/zap"
)

// server is one running member: the parts, and the order in which they start
// and stop.
type server struct {
	cfg   Config
	log   *zap.Logger
	disk  *diskStore
	node  *raftNode
	store *kvstore
	tr    *rafthttp.Transport
	lanes *lanes

	stopTransport func() // nil: not started

	clientListener, peerListener, debugListener net.Listener
	client                                      *clientServer
	peer                                        *http.Server
}

// newServer opens the ports and the data directory and brings the member's
// state back. Nothing is served before run. ctx ends only the wait of --join.
func newServer(ctx context.Context, cfg Config, log *zap.Logger) (_ *server, err error) {
	s := &server{cfg: cfg, log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.closeEarly())
		}
	}()
	// Before the ports open: peers that start at the same time ask as well, and
	// an open port that does not answer yet would keep them waiting.
	// And whoever waits to be let in does not look like a member that hangs.
	var joining *membership
	if !holdsMember(cfg.DataDir) {
		if cfg.Join {
			joining, err = s.join(ctx)
		} else {
			err = mayFound(ctx, cfg)
		}
		if err != nil {
			return nil, err
		}
	}
	clients, peerConns, err := connectionRoom(cfg.MaxConns)
	if err != nil {
		return nil, err
	}
	if clients < cfg.MaxConns {
		log.Warn("fewer client connections than --max-connections: the limit of open files leaves no room for more; raise it (ulimit -n)", zap.Int("connections", clients), zap.Int("asked", cfg.MaxConns))
	}
	if s.clientListener, err = listenClient(cfg.ListenClient, cfg.clientFlag, clients); err != nil {
		return nil, err
	}
	if s.peerListener, err = listenPeer(cfg.ListenPeer, peerConns); err != nil {
		return nil, err
	}
	if cfg.ListenDebug != "" {
		if s.debugListener, err = net.Listen("tcp", cfg.ListenDebug); err != nil {
			return nil, fmt.Errorf("debug address %s cannot be used: %w; choose another with --listen-debug, or go without", cfg.ListenDebug, unwrapOp(err))
		}
	}
	if s.disk, err = openDataDir(cfg.DataDir, cfg.ID, cfg.KeepSnapshots, log); err != nil {
		return nil, err
	}
	reg := prometheus.NewRegistry()
	met := newNodeMetrics(reg)
	s.disk.synced = func(took time.Duration) { met.logSync.Observe(took.Seconds()) }
	r, peers, err := s.recover(ctx, joining)
	if err != nil {
		return nil, err
	}
	boot, err := s.disk.nextBoot()
	if err != nil {
		return nil, fmt.Errorf("count this start: %w", err)
	}
	if s.node, err = newRaftNode(cfg, boot, r, s.disk, s.disk, log, met); err != nil {
		return nil, err
	}
	s.store = newKVStore(s.node, r, s.disk)
	s.store.registerGauges(reg)
	s.checkDisk()
	if err := s.startTransport(r.meta.ClusterID, peers); err != nil {
		return nil, err
	}
	promauto.With(reg).NewGaugeFunc(prometheus.GaugeOpts{Name: "pontoon_peer_lanes", Help: "Peers to whom messages take the short way; without one they take rafthttp's."},
		func() float64 { return float64(s.lanes.standing()) })
	l := limits{MaxKeyBytes: cfg.MaxKeyBytes, MaxValueBytes: cfg.MaxValueBytes, MaxInFlight: cfg.MaxInFlight,
		DefaultTimeout: cfg.DefaultTimeout, MaxTimeout: cfg.MaxTimeout, MaxConns: clients, MaxBodyBytes: maxBodyBytes,
		MaxAnswerBytes: maxAnswerBytes, MaxExports: maxExports, MaxTxnBytes: maxTxnBytes}
	api := newHTTPAPI(s.store, l, newHTTPMetrics(reg), prometheus.Gatherers{prometheus.DefaultGatherer, reg}, log)
	s.client = newClientServer(api, log)
	s.peer = &http.Server{Handler: s.node.peerHandler(s.lanes.handler(s.tr.Handler())), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute,
		MaxHeaderBytes: 64 << 10, ErrorLog: newServerLog(log)}
	return s, nil
}

// recover reads the data directory, or founds or joins a cluster if it is
// empty. The table holds the peers to talk to before the log names them.
func (s *server) recover(ctx context.Context, joining *membership) (*recovered, *membership, error) {
	table := joining
	if !s.disk.exists() {
		if table == nil {
			table = bootstrapMembership(s.cfg.ClusterToken, s.cfg.Cluster)
		}
		if err := s.disk.bootstrap(s.cfg.ID, table, joining != nil); err != nil {
			return nil, nil, err
		}
	}
	r, err := s.disk.loadOrStandAside(func() *membership {
		if m := askTable(ctx, s.cfg); m != nil {
			return m
		}
		return s.disk.salvageTable()
	})
	if err != nil {
		return nil, nil, err
	}
	if r.meta.MemberID != s.cfg.ID {
		return nil, nil, fmt.Errorf("%w: %s belongs to member %d; start it with --id %d, or choose another --data-dir for member %d",
			errRefuse, s.cfg.DataDir, r.meta.MemberID, r.meta.MemberID, s.cfg.ID)
	}
	switch {
	case r.snap.Index > 0:
		table = r.table()
		if err := s.checkCluster(ctx, table); err != nil {
			return nil, nil, err
		}
	case r.aside != nil: // it learns of others when it asks them to hand over
		table = bootstrapMembership(s.cfg.ClusterToken, s.cfg.Cluster)
		table.ClusterID = r.meta.ClusterID
	case table == nil: // a joiner that was stopped before its first snapshot
		if table, err = s.join(ctx); err != nil {
			return nil, nil, err
		}
	}
	if table.ClusterID != r.meta.ClusterID {
		return nil, nil, fmt.Errorf("%w: %s belongs to cluster %016x, --cluster names cluster %016x; choose another --data-dir or correct --cluster",
			errRefuse, s.cfg.DataDir, r.meta.ClusterID, table.ClusterID)
	}
	return r, table, nil
}

func (s *server) join(ctx context.Context) (*membership, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.JoinTimeout)
	defer cancel()
	return fetchCluster(ctx, s.cfg, s.log)
}

// checkCluster holds --cluster against the member table of the data directory.
// The table counts, and the list may lag behind it. But a list of which nothing
// fits belongs to another cluster, and an own address that the cluster does not
// know would leave this member unheard. Members may have moved while this one
// was down, so before it refuses it asks the peers that the list names.
func (s *server) checkCluster(ctx context.Context, table *membership) error {
	known, fits, moved := 0, 0, false
	for _, c := range s.cfg.Cluster {
		m, ok := table.get(c.ID)
		switch {
		case !ok:
		case c.ID == s.cfg.ID:
			moved = !slices.Contains(m.PeerURLs, c.URL)
		default:
			known++
			if slices.Contains(m.PeerURLs, c.URL) {
				fits++
			}
		}
	}
	if !moved && (known == 0 || fits > 0) {
		return nil
	}
	for a := range askAll(ctx, s.cfg.otherURLs()) {
		if a.err != nil || a.info.Members.ClusterID != table.ClusterID {
			continue
		}
		if self, ok := a.info.Members.get(s.cfg.ID); ok && slices.Contains(self.PeerURLs, s.cfg.peerURL()) {
			return nil
		}
	}
	if self, _ := table.get(s.cfg.ID); moved {
		return fmt.Errorf("%w: the cluster knows member %d at %s, --cluster says %s; correct --cluster, or move the member with PUT /v1/members/%d on another one",
			errRefuse, s.cfg.ID, self.PeerURLs[0], s.cfg.peerURL(), s.cfg.ID)
	}
	return fmt.Errorf("%w: %s belongs to a cluster of %s, and --cluster names %s; correct --cluster, choose another --data-dir, or move a member with PUT /v1/members/<id> on a running one",
		errRefuse, s.cfg.DataDir, describeMembers(table), describeCluster(s.cfg.Cluster))
}

func describeMembers(m *membership) string {
	var c []clusterURL
	for _, x := range m.Members {
		c = append(c, clusterURL{x.ID, x.PeerURLs[0]})
	}
	return describeCluster(c)
}

func (s *server) startTransport(clusterID uint64, peers *membership) error {
	own, err := types.NewURLs([]string{s.cfg.peerURL()})
	if err != nil {
		return fmt.Errorf("peer URL: %w", err)
	}
	id := types.ID(s.cfg.ID)
	s.tr = &rafthttp.Transport{
		Logger:      quiet(s.log),
		DialTimeout: 2 * time.Second,
		ID:          id,
		URLs:        own,
		ClusterID:   types.ID(clusterID),
		Raft:        s.node,
		Snapshotter: snap.New(quiet(s.log), s.disk.snapDir()),
		ServerStats: stats.NewServerStats(strconv.FormatUint(s.cfg.ID, 10), id.String()),
		LeaderStats: stats.NewLeaderStats(quiet(s.log), id.String()),
		ErrorC:      make(chan error, 8),
	}
	if err := s.tr.Start(); err != nil {
		return fmt.Errorf("start peer transport: %w", err)
	}
	closeIdle, err := guardAnswers(s.tr, s.node.isMember, s.node.refusedAnswer)
	if err != nil {
		return err
	}
	s.lanes = newLanes(s.node, s.tr)
	s.stopTransport = func() { s.lanes.Stop(); closeIdle() }
	s.node.tr = s.lanes
	for _, m := range peers.Members {
		if m.ID != s.cfg.ID {
			s.lanes.AddPeer(types.ID(m.ID), m.PeerURLs)
		}
	}
	return nil
}

// listenPeer opens the peer port. Its connections have time-outs on progress; how
// long a request may take is up to its handler, as a snapshot may take long.
func listenPeer(addr string, maxConns int) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		hint := "correct this node's URL in --cluster, or listen elsewhere with --listen-peer"
		if errors.Is(err, syscall.EADDRINUSE) {
			hint = "stop what listens there, or choose another with --listen-peer"
		}
		return nil, fmt.Errorf("peer address %s cannot be used: %w; %s", addr, unwrapOp(err), hint)
	}
	b := newBoundedListener(l, maxConns)
	b.wrap = func(c net.Conn, release func()) net.Conn {
		return &peerConn{placedConn: placedConn{Conn: c, release: release}}
	}
	return b, nil
}

// unwrapOp leaves the reason of a network error without the address again.
func unwrapOp(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// run serves until ctx ends (nil), this member is removed (errRemoved), or
// something fails that it must not survive.
func (s *server) run(ctx context.Context) error {
	loop := make(chan error, 1)
	applied := make(chan struct{})
	serving := make(chan error, 3)
	watch, stopWatch := context.WithCancel(context.Background())
	defer stopWatch()
	// goroutine: raft-loop
	go func() { loop <- s.node.serveChannels() }()
	// goroutine: read-commits
	go func() { s.store.readCommits(s.node.commitC); close(applied) }()
	// goroutine: watch-dispatcher
	go s.store.dispatch(watch)
	// goroutine: disk-watcher
	go s.watchDisk(watch)
	// goroutine: peer-server
	go func() { serving <- s.peer.Serve(s.peerListener) }()
	// goroutine: client-server
	go func() { serving <- s.client.Serve(s.clientListener) }()
	if s.node.aside.stands() {
		// goroutine: aside-asker
		go s.askToYield(watch)
	}
	if s.cfg.AdvertiseClient != "" {
		// goroutine: announcer
		go s.announce(watch)
	}
	if s.debugListener != nil {
		// goroutine: debug-server
		go func() { serving <- http.Serve(s.debugListener, debugHandler()) }()
	}
	s.greet()

	err := s.wait(ctx, loop, serving)
	if ctx.Err() != nil && err == nil {
		s.drain()
	}
	if errors.Is(err, errRemoved) {
		s.finishClients()
		s.log.Warn("this member was removed from the cluster and shuts down", zap.Error(err))
		if merr := s.disk.markRemoved(fmt.Sprintf("member %d was removed from cluster %016x; its id never comes back. To use this machine again, empty the data directory and add a member with a new id",
			s.cfg.ID, uint64(s.tr.ClusterID))); merr != nil {
			err = errors.Join(err, fmt.Errorf("%w: note that this member was removed: %w", errDurability, merr))
		}
	}
	s.node.stop()
	if !errors.Is(err, errDurability) {
		<-applied
	}
	return errors.Join(err, s.close())
}

// wait blocks until there is a reason to stop.
func (s *server) wait(ctx context.Context, loop, serving <-chan error) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-loop:
			return err
		case err := <-s.store.failC:
			return err
		case err := <-serving:
			return fmt.Errorf("serve: %w", err)
		case <-s.tr.ErrorC:
			// A peer answered that we are removed. What ends a member
			// for good deserves a second look at a member table.
			if err := s.confirmRemoval(ctx); err != nil {
				return err
			}
		}
	}
}

// confirmRemoval asks the peers for their table and returns errRemoved if one
// of this cluster lists this member as removed.
func (s *server) confirmRemoval(ctx context.Context) error {
	urls := s.cfg.otherURLs() // a joiner that waits for its first snapshot has no table
	for _, m := range s.node.members.Load().Members {
		if m.ID != s.cfg.ID && !slices.Contains(urls, m.PeerURLs[0]) {
			urls = append(urls, m.PeerURLs[0])
		}
	}
	for a := range askAll(ctx, urls) {
		if a.err == nil && a.info.Members.ClusterID == uint64(s.tr.ClusterID) && a.info.Members.isRemoved(s.cfg.ID) {
			return fmt.Errorf("%w: member %d was removed, says %s", errRemoved, s.cfg.ID, a.url)
		}
	}
	return nil
}

// drain ends service so that clients notice as little as possible: leadership
// goes first, because while it moves writes wait; then what is in flight is
// answered; then the ports close.
func (s *server) drain() {
	s.store.stopping.Store(true)
	s.store.hub.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	s.store.handOver(ctx)
	cancel()
	s.finishClients()
}

// finishClients lets in no more requests and gives those under way a moment.
func (s *server) finishClients() {
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if err := s.client.Shutdown(ctx); err != nil {
		s.log.Debug("client connections cut", zap.Error(err))
	}
}

// close releases everything; the loops have ended.
func (s *server) close() error {
	s.stopTransport()
	err := errors.Join(s.client.Close(), s.peer.Close())
	if s.debugListener != nil {
		err = errors.Join(err, s.debugListener.Close())
	}
	if cerr := s.disk.close(); cerr != nil {
		err = errors.Join(err, fmt.Errorf("%w: close log: %w", errDurability, cerr))
	}
	return err
}

// closeEarly releases what newServer had opened when it failed.
func (s *server) closeEarly() error {
	if s.stopTransport != nil {
		s.stopTransport()
	}
	for _, l := range []net.Listener{s.clientListener, s.peerListener, s.debugListener} {
		if l != nil {
			_ = l.Close() // nothing was served on it
		}
	}
	if s.disk != nil {
		return s.disk.close()
	}
	return nil
}

// debugHandler serves profiles, on a port of its own: they show everything and
// cost time, so neither clients nor peers get them.
func debugHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

// greet is the one line that says who this is and what to do next.
func (s *server) greet() {
	port := s.clientListener.Addr().(*net.TCPAddr).Port
	s.log.Info(fmt.Sprintf("member %d of cluster %016x serves clients on %s, peers on %s, data in %s; try: curl -X PUT -d hello http://127.0.0.1:%d/my-key",
		s.cfg.ID, uint64(s.tr.ClusterID), trimAddr(s.clientListener), trimAddr(s.peerListener), s.cfg.DataDir, port))
}

func trimAddr(l net.Listener) string { return strings.Replace(l.Addr().String(), "[::]", "*", 1) }

// announce puts this member's client URL into the member table, as soon as the
// cluster takes changes.
func (s *server) announce(ctx context.Context) {
	change := memberChange{Op: opUpdate, Member: member{ID: s.cfg.ID, ClientURL: s.cfg.AdvertiseClient}}
	for ctx.Err() == nil {
		try, cancel := context.WithTimeout(ctx, s.cfg.DefaultTimeout)
		err := ignoreNoChange(s.store.changeMembers(try, change, nil))
		cancel()
		if err == nil {
			return
		}
		s.log.Debug("announce client URL", zap.Error(err))
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

// watchDisk refuses writes while the disk is nearly full, and lets them in
// again once there is clearly room: a full disk would end the process.
func (s *server) watchDisk(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			s.checkDisk()
		case <-ctx.Done():
			return
		}
	}
}

func (s *server) checkDisk() {
	free, err := s.disk.freeBytes()
	low := s.store.diskLow.Load()
	switch {
	case err != nil:
		s.log.Warn("cannot tell the free disk space", zap.Error(err))
	case !low && free < s.cfg.DiskReserve:
		s.store.diskLow.Store(true)
		s.log.Error("disk nearly full: writes are refused with 507, reads go on; free some space",
			zap.Int64("free_bytes", free), zap.Int64("reserve_bytes", s.cfg.DiskReserve))
	case low && free > s.cfg.DiskReserve+s.cfg.DiskReserve/16:
		s.store.diskLow.Store(false)
		s.log.Info("disk has room again: writes are accepted", zap.Int64("free_bytes", free))
	}
}
