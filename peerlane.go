package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
)

// Lanes are the short way of messages between members: one connection for both
// directions, on which the raft loop itself writes, and whose reader
// hands what comes straight to the loop of the other side. On the streams of
// rafthttp a message passes through two goroutines more, each of which sleeps when its
// turn comes, and through protobuf. Of a member that has few clients, to wake them
// was most of the work, and of a write by a single client most of its time.
//
// rafthttp keeps what lanes do not do: snapshots, who is reachable, who was
// removed, and all messages while no lane stands. So a lane may refuse and end
// whenever anything is odd; nothing is lost that raft would miss.
//
//	the member with the higher id                     the other
//	GET /pontoon/lane, Upgrade: pontoon-lane/1   →
//	                                             ←    101
//	frames                                       ↔    frames: 4 bytes of length, then a message (peercodec.go); of length 0: the sender lives
type lanes struct {
	transport
	node    *raftNode
	silence time.Duration   // laneSilence; tests set it before anything runs
	ctx     context.Context // ends at Stop
	stop    context.CancelFunc
	wg      sync.WaitGroup // of everything that runs

	mu struct {
		sync.Mutex
		peers   map[uint64]*lanePeer
		stopped bool
	}

	// The loop's.
	touched []*lane // have something to send
	others  []*raftpb.Message
}

// lanePeer is a member that rafthttp knows.
type lanePeer struct {
	url  string
	quit context.CancelFunc // ends its dialer; nil: there is none
	lane *lane              // nil: none stands
}

const (
	lanePath     = "/pontoon/lane"
	laneProtocol = "pontoon-lane/1"
	laneHeadMax  = 4 << 10 // of the answer to a request for a lane
	laneBuffer   = 64 << 10

	maxLaneInline = 128 << 10 // more is written by the lane's writer, so that the loop goes on to its own disk
	maxLaneBehind = 32 << 20  // waits for a peer that does not read; messages beyond it are dropped
	laneWriteMax  = 256 << 10 // of one write by the writer, which has to come to an end within peerPatience
	laneRetry     = 100 * time.Millisecond
	laneRetryMax  = 2 * time.Second
)

// laneSilence ends a lane on which nothing comes: whoever has nothing to say sends a
// sign of life four times as often.
const laneSilence = 2 * time.Second

func newLanes(n *raftNode, t transport) *lanes {
	l := &lanes{transport: t, node: n, silence: laneSilence}
	l.ctx, l.stop = context.WithCancel(context.Background())
	l.mu.peers = map[uint64]*lanePeer{}
	return l
}

// Send never waits.
func (l *lanes) Send(ms []*raftpb.Message) {
	l.mu.Lock()
	for _, m := range ms {
		p := l.mu.peers[m.GetTo()]
		if p == nil || p.lane == nil || !fitsLane(m) {
			l.others = append(l.others, m)
			continue
		}
		if p.lane.add(m) {
			l.touched = append(l.touched, p.lane)
		}
	}
	l.mu.Unlock()
	for _, c := range l.touched {
		if !c.flush() {
			l.node.met.droppedMessages.Inc()
			l.node.ReportUnreachable(c.peer)
		}
	}
	clear(l.touched)
	l.touched = l.touched[:0]
	if len(l.others) > 0 {
		l.transport.Send(l.others)
		clear(l.others)
		l.others = l.others[:0]
	}
}

func (l *lanes) AddPeer(id types.ID, urls []string) {
	l.transport.AddPeer(id, urls)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.peers[uint64(id)] == nil && !l.mu.stopped {
		l.mu.peers[uint64(id)] = &lanePeer{}
		l.redialLocked(uint64(id), urls)
	}
}

func (l *lanes) UpdatePeer(id types.ID, urls []string) {
	l.transport.UpdatePeer(id, urls)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.peers[uint64(id)] != nil && !l.mu.stopped {
		l.redialLocked(uint64(id), urls)
	}
}

// redialLocked has a peer's dialer use its first URL; nothing changes if it does.
func (l *lanes) redialLocked(id uint64, urls []string) {
	p := l.mu.peers[id]
	if len(urls) == 0 || p.url == urls[0] || urls[0] == nowhere || id > l.node.id {
		return
	}
	p.end()
	p.url = urls[0]
	var ctx context.Context
	ctx, p.quit = context.WithCancel(l.ctx)
	// goroutine: lane-dialer
	l.wg.Go(func() { l.dial(ctx, id, urls[0]) })
}

func (p *lanePeer) end() {
	if p.quit != nil {
		p.quit()
	}
	if p.lane != nil {
		p.lane.end()
	}
}

func (l *lanes) RemovePeer(id types.ID) {
	l.mu.Lock()
	if p := l.mu.peers[uint64(id)]; p != nil {
		p.end()
		delete(l.mu.peers, uint64(id))
	}
	l.mu.Unlock()
	l.transport.RemovePeer(id)
}

func (l *lanes) Stop() {
	l.stop()
	l.mu.Lock()
	l.mu.stopped = true
	for _, p := range l.mu.peers { // order: does not matter, all end
		p.end()
	}
	l.mu.Unlock()
	l.wg.Wait()
	l.transport.Stop()
}

// standing is the number of lanes, for the metric.
func (l *lanes) standing() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.mu.peers { // order: does not matter
		if p.lane != nil {
			n++
		}
	}
	return n
}

// dial keeps a lane to a peer with a lower id, until ctx ends.
func (l *lanes) dial(ctx context.Context, id uint64, peerURL string) {
	pause := laneRetry
	for ctx.Err() == nil {
		start := time.Now()
		c, src, err := l.open(ctx, id, peerURL)
		if err == nil {
			err = l.serve(id, c, c, src)
		}
		if time.Since(start) > laneRetryMax {
			pause = laneRetry
		}
		l.node.log.Debug("no lane to a peer", zap.Uint64("peer", id), zap.Error(err))
		select {
		case <-time.After(pause):
			pause = min(2*pause, laneRetryMax)
		case <-ctx.Done():
		}
	}
}

func (l *lanes) open(ctx context.Context, id uint64, peerURL string) (_ net.Conn, _ *bufio.Reader, err error) {
	u, err := url.Parse(peerURL)
	if err != nil {
		return nil, nil, err
	}
	if u.Scheme != "http" {
		return nil, nil, fmt.Errorf("a lane to %s", peerURL)
	}
	host := u.Host
	if u.Port() == "" {
		host = net.JoinHostPort(u.Hostname(), "80")
	}
	d := net.Dialer{Timeout: l.silence}
	c, err := d.DialContext(ctx, "tcp", host)
	if err != nil {
		return nil, nil, err
	}
	quit := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer func() {
		if !quit() && err == nil {
			err = ctx.Err()
		}
		if err != nil {
			_ = c.Close()
		}
	}()
	req, err := http.NewRequest(http.MethodGet, peerURL+lanePath, nil)
	if err != nil {
		return nil, nil, err
	}
	asMember(req, l.node.members.Load().ClusterID)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", laneProtocol)
	req.Header.Set("X-Server-From", types.ID(l.node.id).String())
	req.Header.Set("X-Raft-To", types.ID(id).String())
	src := bufio.NewReaderSize(c, laneBuffer)
	if err := errors.Join(c.SetDeadline(time.Now().Add(l.silence)), req.Write(c), readSwitch(src), c.SetDeadline(time.Time{})); err != nil {
		return nil, nil, err
	}
	return c, src, nil
}

// readSwitch reads the head of an answer, which has to be short and say 101.
func readSwitch(src *bufio.Reader) error {
	status := ""
	for size := 0; size < laneHeadMax; {
		b, err := src.ReadSlice('\n')
		if err != nil {
			return err
		}
		size += len(b)
		line := strings.TrimRight(string(b), "\r\n")
		switch {
		case status == "":
			if status = line; !strings.HasPrefix(line, "HTTP/1.1 101 ") {
				return fmt.Errorf("the answer to a request for a lane is %.80q", line)
			}
		case line == "":
			return nil
		}
	}
	return fmt.Errorf("the answer to a request for a lane is longer than %d bytes", laneHeadMax)
}

// handler takes requests for a lane, and leaves others to next.
func (l *lanes) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == lanePath {
			l.accept(w, r)
		} else {
			next.ServeHTTP(w, r)
		}
	})
}

func (l *lanes) accept(w http.ResponseWriter, r *http.Request) {
	n := l.node
	if r.Method != http.MethodGet || r.Header.Get("Upgrade") != laneProtocol || r.ProtoMajor != 1 {
		http.Error(w, "this is for members of one version: "+laneProtocol, http.StatusBadRequest)
		return
	}
	if !n.admit(w, r) {
		return
	}
	from, err := types.IDFromString(r.Header.Get("X-Server-From"))
	to, terr := types.IDFromString(r.Header.Get("X-Raft-To"))
	// Of who is no member yet, or no longer, rafthttp knows what to do.
	if err != nil || terr != nil || uint64(to) != n.id || uint64(from) <= n.id || !n.isMember(uint64(from)) {
		http.Error(w, "no lane from there to here", http.StatusPreconditionFailed)
		return
	}
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	inner := c
	if p, ok := c.(*peerConn); ok { // its deadlines are those of requests, and each read sets them
		inner = p.Conn
	}
	// net/http may have read on.
	early, err := io.ReadAll(io.LimitReader(rw, int64(rw.Reader.Buffered())))
	answer := "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + laneProtocol + "\r\n\r\n"
	err = errors.Join(err, inner.SetDeadline(time.Now().Add(l.silence)), second(io.WriteString(inner, answer)), inner.SetDeadline(time.Time{}))
	if err == nil {
		err = l.serve(uint64(from), c, inner, bufio.NewReaderSize(io.MultiReader(bytes.NewReader(early), inner), laneBuffer))
	} else {
		_ = c.Close()
	}
	n.log.Debug("a lane has ended", zap.Uint64("peer", uint64(from)), zap.Error(err))
}

// serve carries messages until the lane ends, and says why it did. outer is c, or
// what has to be closed in its place.
func (l *lanes) serve(peer uint64, outer, c net.Conn, src *bufio.Reader) error {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return errors.Join(fmt.Errorf("a lane needs a socket, not a %T", c), outer.Close())
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return errors.Join(err, outer.Close())
	}
	ln := &lane{peer: peer, conn: c, raw: raw, close: sync.OnceFunc(func() { _ = outer.Close() }), wake: make(chan struct{}, 1), ended: make(chan struct{})}
	ln.try = ln.tryWrite
	if !l.attach(ln) {
		ln.end()
		return errStopping
	}
	defer l.detach(ln)
	// goroutine: lane-writer
	l.wg.Go(func() { ln.write(l.silence / 4) })
	defer ln.end()
	return l.read(ln, src)
}

// attach puts ln in the place of the lane that the peer had.
func (l *lanes) attach(ln *lane) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.mu.peers[ln.peer]
	if p == nil || l.mu.stopped {
		return false
	}
	if p.lane != nil {
		p.lane.end()
	}
	p.lane = ln
	l.wg.Add(1)
	return true
}

func (l *lanes) detach(ln *lane) {
	defer l.wg.Done()
	l.mu.Lock()
	if p := l.mu.peers[ln.peer]; p != nil && p.lane == ln {
		p.lane = nil
	}
	l.mu.Unlock()
	l.node.ReportUnreachable(ln.peer) // what was on its way may be lost
}

// read hands on what comes, until something is wrong.
func (l *lanes) read(ln *lane, src *bufio.Reader) error {
	n := l.node
	until := time.Time{} // the deadline in force
	arm := func(d time.Duration) error {
		now := time.Now()
		if left := until.Sub(now); d/2 < left && left <= d {
			return nil
		}
		until = now.Add(d)
		return ln.conn.SetReadDeadline(until)
	}
	for {
		if src.Buffered() < 4 {
			if err := arm(l.silence); err != nil {
				return err
			}
		}
		head, err := src.Peek(4)
		if err != nil {
			return err
		}
		size := int(binary.BigEndian.Uint32(head))
		if size > maxPeerFrame {
			n.refusedAnswer(fmt.Errorf("%w: a frame of more than %d bytes", errBadFrame, maxPeerFrame))
			return errBadFrame
		}
		if _, err := src.Discard(4); err != nil || size == 0 {
			if err != nil {
				return err
			}
			continue
		}
		if src.Buffered() < size {
			if err := arm(peerPatience + time.Duration(size/peerPace)*time.Second); err != nil {
				return err
			}
		}
		frame, err := readGrowing(src, size)
		if err != nil {
			return err
		}
		m, err := readMessage(frame, n.id)
		if err == nil && m.GetFrom() != ln.peer && !n.isMember(m.GetFrom()) {
			continue // our table may lag behind the peer's
		}
		if err == nil {
			err = n.validateMessage(m)
		}
		if err != nil {
			n.refusedAnswer(err)
			return err
		}
		n.queueMessage(m, int64(size+messageObject+len(m.GetEntries())*entryObject))
	}
}

// readGrowing reads size bytes into memory that grows with what has come, not with
// what was announced.
func readGrowing(src io.Reader, size int) ([]byte, error) {
	b := make([]byte, min(size, 64<<10))
	for at := 0; ; {
		if _, err := io.ReadFull(src, b[at:]); err != nil {
			return nil, err
		}
		if at = len(b); at == size {
			return b, nil
		}
		b = slices.Grow(b, min(size-at, at))[:min(size, 2*at)]
	}
}

// lane is one connection to a peer.
type lane struct {
	peer  uint64
	conn  net.Conn
	raw   syscall.RawConn
	close func()
	wake  chan struct{} // capacity 1: the writer has something to do
	ended chan struct{}

	// The loop's.
	out []byte // frames to send

	mu struct {
		sync.Mutex
		over    bool
		wrote   bool   // something since the last look
		writing bool   // the writer has bytes to write, and all others come behind them
		behind  []byte // those that it has not taken yet
	}

	// Of tryWrite; under mu.
	try  func(fd uintptr) bool
	rest []byte
	err  error
}

// add puts m behind what is to be sent, and says whether it is the first.
func (c *lane) add(m *raftpb.Message) bool {
	at := len(c.out)
	c.out = appendMessage(append(c.out, 0, 0, 0, 0), m)
	binary.BigEndian.PutUint32(c.out[at:], uint32(len(c.out)-at-4))
	return at == 0
}

// flush sends what was added without waiting for the peer. It reports false where
// that was dropped.
func (c *lane) flush() bool {
	out := c.out
	if c.out = c.out[:0]; cap(c.out) > keptFrame {
		c.out = nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sendLocked(out, maxLaneInline)
}

func (c *lane) sendLocked(b []byte, inline int) bool {
	if c.mu.over {
		return false
	}
	c.mu.wrote = true
	if !c.mu.writing && len(b) <= inline {
		c.rest = b
		if err := errors.Join(c.raw.Write(c.try), c.err); err != nil {
			c.endLocked()
			return false
		}
		if b, c.rest = c.rest, nil; len(b) == 0 {
			return true
		}
	}
	if len(c.mu.behind) > maxLaneBehind {
		return false
	}
	c.mu.behind = append(c.mu.behind, b...)
	c.mu.writing = true
	select {
	case c.wake <- struct{}{}:
	default:
	}
	return true
}

// tryWrite gives the kernel what it takes now.
func (c *lane) tryWrite(fd uintptr) bool {
	k, err := syscall.Write(int(fd), c.rest)
	switch {
	case k > 0:
		c.rest = c.rest[k:]
	case err != nil && err != syscall.EAGAIN && err != syscall.EINTR:
		c.err = err
	}
	return true // whatever it was: do not wait
}

// write is the lane's writer: it sends what the loop would have to wait for, and a
// sign of life where there was nothing else for so long.
func (c *lane) write(idle time.Duration) {
	t := time.NewTicker(idle)
	defer t.Stop()
	for {
		select {
		case <-c.wake:
			if err := c.catchUp(); err != nil {
				c.end()
			}
		case <-t.C:
			c.mu.Lock()
			if !c.mu.wrote {
				c.sendLocked(make([]byte, 4), maxLaneInline)
			}
			c.mu.wrote = false
			c.mu.Unlock()
		case <-c.ended:
			return
		}
	}
}

func (c *lane) catchUp() error {
	for {
		c.mu.Lock()
		b := c.mu.behind
		c.mu.behind, c.mu.writing = nil, len(b) > 0
		c.mu.Unlock()
		if len(b) == 0 {
			return nil
		}
		for piece := range slices.Chunk(b, laneWriteMax) {
			if err := errors.Join(c.conn.SetWriteDeadline(time.Now().Add(peerPatience)), second(c.conn.Write(piece))); err != nil {
				return err
			}
		}
		if err := c.conn.SetWriteDeadline(time.Time{}); err != nil {
			return err
		}
	}
}

func (c *lane) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endLocked()
}

func (c *lane) endLocked() {
	if !c.mu.over {
		c.mu.over = true
		close(c.ended)
		c.close()
	}
}
