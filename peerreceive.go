package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/coreos/go-semver/semver"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"pontoon/kv"
)

// What peers send with a POST: single messages, while no stream stands, and
// snapshots. rafthttp has handlers for both, which are not used: they read what
// they decoded without a look, name metrics after whatever sender a message
// claims, and write a snapshot to the disk before anybody has looked at it.

const (
	smallMessage     = 64 << 10         // larger messages take a place
	largeMessages    = 8                // received at once; more are answered 503, and raft sends again
	maxSnapMessage   = 1 << 20          // the message before a snapshot: metadata and members
	snapshotsAtOnce  = 4                // as above; one leader sends one
	snapshotProgress = 30 * time.Second // in which at least snapshotPiece of a snapshot has to come
	snapshotPiece    = 256 << 10
)

// peerPatience is the time in which a request of a peer has to come, but for the file
// of a snapshot; a message gets another second for each peerPace bytes that came.
// Only tests change them.
var peerPatience, peerPace = 10 * time.Second, 64 << 10

// peerReceiver takes what peers send. Its channels are semaphores.
type peerReceiver struct {
	*raftNode
	large, snapshots chan struct{}
}

func newPeerReceiver(n *raftNode) *peerReceiver {
	return &peerReceiver{n, make(chan struct{}, largeMessages), make(chan struct{}, snapshotsAtOnce)}
}

// errPeerBusy is answered 503: rafthttp reports it to raft, which tries again.
var errPeerBusy = errors.New("this member is receiving as much as it can; send it again")

// admit lets members of this cluster pass, by what they say in their headers, and
// answers others.
func (n *raftNode) admit(w http.ResponseWriter, r *http.Request) bool {
	cluster := types.ID(n.members.Load().ClusterID).String()
	w.Header().Set("X-Etcd-Cluster-ID", cluster)
	switch {
	case r.Header.Get("X-Etcd-Cluster-ID") != cluster:
		http.Error(w, rafthttp.ErrClusterIDMismatch.Error(), http.StatusPreconditionFailed)
	case !compatible(r.Header):
		http.Error(w, "incompatible version", http.StatusPreconditionFailed) // rafthttp knows these words
	default:
		return true
	}
	return false
}

// serve checks what all POSTs share, and answers with what receive returns.
func (in *peerReceiver) serve(w http.ResponseWriter, r *http.Request, receive func(*http.Request, *peerBody) error) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
		return
	}
	if !in.admit(w, r) {
		return
	}
	err := receive(r, &peerBody{r.Body, http.NewResponseController(w), time.Now().Add(peerPatience)})
	status := http.StatusBadRequest
	switch {
	case err == nil:
		w.WriteHeader(http.StatusNoContent)
		return
	case errors.Is(err, errPeerBusy):
		status = http.StatusServiceUnavailable
	case errors.Is(err, errDiskLow):
		status = http.StatusInsufficientStorage
	case !errors.As(err, new(badMessage)): // Process has counted those
		in.met.refusedMessages.Inc()
	}
	in.log.Debug("peer request refused", zap.String("path", r.URL.Path), zap.String("from", r.RemoteAddr), zap.Error(err))
	http.Error(w, err.Error(), status)
}

// compatible: the peer's messages are of our rafthttp's kind, version 3. Who says
// nothing is older than that.
func compatible(h http.Header) bool {
	v, err := semver.NewVersion(h.Get("X-Server-Version"))
	return err == nil && v.Major == 3
}

// peerBody is a body that has to come as a whole until a deadline, which moves by as
// much as the bytes that came have bought. It goes on to hold when a body was refused:
// net/http reads what is left of a short one.
type peerBody struct {
	io.Reader
	conn  *http.ResponseController
	until time.Time
}

func (b *peerBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.until = b.until.Add(time.Duration(n) * time.Second / time.Duration(peerPace))
	readUntil(b.conn, b.until)
	return n, err
}

// readUntil sets the deadline of a request. Where that cannot be, there is no
// connection that could be held: a test calls the handler.
func readUntil(conn *http.ResponseController, t time.Time) { _ = conn.SetReadDeadline(t) }

// peerConn is a connection that a peer has opened. Each read and write has to come to
// something within rafthttp's time-outs. Its own connections forget at each read what
// deadline net/http or a handler had set: a byte now and then would hold a place for ever.
type peerConn struct {
	placedConn
	mu struct {
		sync.Mutex
		until time.Time // what was set last; zero: nothing
	}
}

func (c *peerConn) Read(p []byte) (int, error) {
	if err := c.armRead(func() {}); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// SetReadDeadline is also for the read under way.
func (c *peerConn) SetReadDeadline(t time.Time) error {
	return c.armRead(func() { c.mu.until = t })
}

func (c *peerConn) armRead(change func()) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
	until := time.Now().Add(rafthttp.ConnReadTimeout)
	if !c.mu.until.IsZero() && c.mu.until.Before(until) {
		until = c.mu.until
	}
	return c.Conn.SetReadDeadline(until)
}

func (c *peerConn) Write(p []byte) (int, error) {
	if err := c.Conn.SetWriteDeadline(time.Now().Add(rafthttp.ConnWriteTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// SetDeadline is that of net.Conn, for both halves; only net/http calls it.
func (c *peerConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.Conn.SetWriteDeadline(t))
}

// message takes one message.
func (in *peerReceiver) message(r *http.Request, b *peerBody) error {
	body, err := io.ReadAll(io.LimitReader(b, smallMessage))
	if err == nil && len(body) == smallMessage {
		select {
		case in.large <- struct{}{}:
			defer func() { <-in.large }()
		default:
			return errPeerBusy
		}
		var rest []byte
		rest, err = io.ReadAll(io.LimitReader(b, maxPeerFrame-smallMessage+1))
		body = append(body, rest...)
	}
	switch {
	case err != nil:
		return fmt.Errorf("the message is cut short: %w", err)
	case len(body) > maxPeerFrame:
		return fmt.Errorf("%w: more than %d bytes", errBadFrame, maxPeerFrame)
	}
	m, err := decodeMessage(body)
	if err != nil {
		return err
	}
	if m.GetType() == raftpb.MsgSnap {
		return errors.New("a snapshot without its file")
	}
	return in.Process(r.Context(), m)
}

func decodeMessage(b []byte) (*raftpb.Message, error) {
	if _, err := wireSender(b); err != nil {
		return nil, err
	}
	m := &raftpb.Message{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadFrame, err)
	}
	return m, nil
}

// snapshot takes a message of a snapshot, its length before it, and the file
// behind it. The file is checked while it comes, so that what is none ends early,
// and gets its name only when all of it was good.
func (in *peerReceiver) snapshot(r *http.Request, b *peerBody) error {
	select {
	case in.snapshots <- struct{}{}:
		defer func() { <-in.snapshots }()
	default:
		return errPeerBusy
	}
	m, err := readSnapMessage(b)
	if err != nil {
		return err
	}
	if err := in.validateEnvelope(m); err != nil {
		return err
	}
	if err := checkSnapshotMeta(m); err != nil {
		return err
	}
	index := m.GetSnapshot().GetMetadata().GetIndex()
	start := time.Now()
	readUntil(b.conn, time.Time{})                                        // what follows has a pace of its own
	defer func() { readUntil(b.conn, time.Now().Add(peerPatience/10)) }() // but not once it is refused
	body := &snapBody{Reader: r.Body, room: in.roomForSnapshot, since: start}
	if err := in.snaps.receiveSnapshot(index, body, func(h snapHeader) error { return in.snapshotFits(m, h) }); err != nil {
		in.said.Error("refused a snapshot", zap.Uint64("from", m.GetFrom()), zap.Uint64("index", index), zap.Error(err))
		return err
	}
	in.log.Info("received a snapshot", zap.Uint64("from", m.GetFrom()), zap.Uint64("index", index), zap.Duration("took", time.Since(start).Round(time.Millisecond)))
	return in.Process(context.WithoutCancel(r.Context()), m)
}

func readSnapMessage(r io.Reader) (*raftpb.Message, error) {
	var size [8]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, fmt.Errorf("the message is cut short: %w", err)
	}
	n := binary.BigEndian.Uint64(size[:])
	if n > maxSnapMessage {
		return nil, fmt.Errorf("%w: more than %d bytes before a snapshot", errBadFrame, maxSnapMessage)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("the message is cut short: %w", err)
	}
	m, err := decodeMessage(b)
	if err == nil && m.GetType() != raftpb.MsgSnap {
		err = fmt.Errorf("a snapshot behind a message of type %v", m.GetType())
	}
	return m, err
}

func (n *raftNode) roomForSnapshot() error {
	free, err := n.snaps.freeBytes()
	if err == nil && free < n.cfg.DiskReserve {
		err = errDiskLow
	}
	return err
}

// receiveSnapshot makes the file of snapshot index of what a peer sends, unless a
// good one is there. It is checked on its way to the disk, and nothing gets the
// name that is not whole or does not fit.
func (d *diskStore) receiveSnapshot(index uint64, body io.Reader, fits func(snapHeader) error) (err error) {
	f, err := os.CreateTemp(d.snapDir(), "tmp") // a crash leaves it, and clean removes it
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	var h snapHeader
	b, err := kv.VerifySnapshot(bufio.NewReaderSize(io.TeeReader(body, &syncWriter{f: f}), 256<<10))
	if err == nil {
		h, err = decodeSnapHeader(b)
	}
	if err == nil {
		err = fits(h)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	// raft may have been told of the file that is there, and be about to load it.
	if old, verr := d.verifySnapshot(index); verr == nil && fits(old) == nil {
		err = os.Remove(f.Name())
	} else {
		err = os.Rename(f.Name(), d.snapPath(index))
	}
	// A crash may have come between the name of the one that is there and this.
	return errors.Join(err, syncDir(d.snapDir()))
}

// snapBody is a snapshot that arrives. It ends where the disk is low, however
// many come at once, and where too little comes: a body has no other deadline,
// as a large one on a slow line takes long.
type snapBody struct {
	io.Reader
	room  func() error
	ahead int // may come before the next look at the disk
	since time.Time
	came  int // since then
}

func (b *snapBody) Read(p []byte) (int, error) {
	if b.ahead <= 0 {
		if err := b.room(); err != nil {
			return 0, err
		}
		b.ahead = syncEvery
	}
	n, err := b.Reader.Read(p)
	b.ahead -= n
	b.came += n
	if now := time.Now(); now.Sub(b.since) > snapshotProgress {
		if b.came < snapshotPiece && err == nil {
			err = fmt.Errorf("only %d bytes of the snapshot came within %v", b.came, snapshotProgress)
		}
		b.since, b.came = now, 0
	}
	return n, err
}
