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
// rafthttp keeps what lanes do not do: snapshots, large messages, who is reachable,
// who was removed, and all messages while no lane stands. So a lane may refuse and end
// whenever anything is odd; nothing is lost that raft would miss.
//
// A lane keeps no queue: what the kernel does not take at once is written by the
// lane's writer, and as long as that lasts all else goes by rafthttp, which has a
// connection for appends and another one for what has to be in time. Otherwise a
// heartbeat could wait behind appends until the follower stands for election.
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
	laneRetry    = 100 * time.Millisecond
	laneRetryMax = 2 * time.Second

	maxLaneMessage = 256 << 10          // larger ones go by rafthttp
	laneKernel     = 2 * maxLaneMessage // what the kernel holds of a lane; more would be late on a slow line
)

// laneSilence ends a lane on which nothing comes, or on which a message that has begun does
// not end: whoever has nothing to say sends a sign of life before half of it has passed.
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
		if p == nil || p.lane == nil || !fitsLane(m) || p.lane.isBusy() {
			l.others = append(l.others, m)
		} else if p.lane.add(m) {
			l.touched = append(l.touched, p.lane)
		}
	}
	l.mu.Unlock()
	for _, c := range l.touched {
		c.flush()
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
			err = l.serve(ctx, id, c, c, src)
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
		err = l.serve(l.ctx, uint64(from), c, inner, bufio.NewReaderSize(io.MultiReader(bytes.NewReader(early), inner), laneBuffer))
	} else {
		_ = c.Close()
	}
	n.log.Debug("a lane has ended", zap.Uint64("peer", uint64(from)), zap.Error(err))
}

// serve carries messages until the lane ends, and says why it did. It does not begin
// once ctx has ended. outer is c, or what has to be closed in its place.
func (l *lanes) serve(ctx context.Context, peer uint64, outer, c net.Conn, src *bufio.Reader) error {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return errors.Join(fmt.Errorf("a lane needs a TCP connection, not a %T", c), outer.Close())
	}
	raw, err := tcp.SyscallConn()
	if err = errors.Join(err, tcp.SetWriteBuffer(laneKernel)); err != nil {
		return errors.Join(err, outer.Close())
	}
	ln := &lane{peer: peer, conn: c, raw: raw, close: sync.OnceFunc(func() { _ = outer.Close() }), wake: make(chan struct{}, 1), ended: make(chan struct{})}
	ln.try = ln.tryWrite
	if !l.attach(ctx, ln) {
		ln.end()
		return errStopping
	}
	defer l.detach(ln)
	// goroutine: lane-writer
	l.wg.Go(func() { ln.write(l.silence) })
	defer ln.end()
	return l.read(ln, src)
}

// attach puts ln in the place of the lane that the peer had.
func (l *lanes) attach(ctx context.Context, ln *lane) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.mu.peers[ln.peer]
	if p == nil || l.mu.stopped || ctx.Err() != nil {
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
	until := time.Time{} // the deadline in force: most reads find one that will do
	for {
		if src.Buffered() < 4 {
			if now := time.Now(); until.Sub(now) < l.silence*3/4 {
				until = now.Add(l.silence)
				if err := ln.conn.SetReadDeadline(until); err != nil {
					return err
				}
			}
		}
		head, err := src.Peek(4)
		if err != nil {
			return err
		}
		size := int(binary.BigEndian.Uint32(head))
		if size > maxLaneMessage {
			n.refusedAnswer(fmt.Errorf("%w: a frame of more than %d bytes on a lane", errBadFrame, maxLaneMessage))
			return errBadFrame
		}
		if _, err := src.Discard(4); err != nil {
			return err
		}
		if size == 0 {
			continue
		}
		if src.Buffered() < size {
			until = time.Now().Add(l.silence)
			if err := ln.conn.SetReadDeadline(until); err != nil {
				return err
			}
		}
		frame := make([]byte, size) // what is read from it refers to it
		if _, err := io.ReadFull(src, frame); err != nil {
			return err
		}
		m, err := readMessage(frame, n.id)
		if err != nil {
			n.refusedAnswer(err)
			return err
		}
		switch from := m.GetFrom(); {
		case n.IsIDRemoved(from): // it has not heard of that yet
		case from != ln.peer && !n.isMember(from): // our table may lag behind the peer's
		default:
			if err := n.validateMessage(m); err != nil {
				n.refusedAnswer(err)
				continue
			}
			n.queueMessage(m, int64(size+messageObject+len(m.GetEntries())*entryObject))
		}
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
		over   bool
		wrote  bool   // something since the last look
		behind []byte // what the kernel did not take, for the writer; until it has written that, the lane is busy
	}

	// Of tryWrite; under mu.
	try  func(fd uintptr) bool
	rest []byte
	err  error
}

// isBusy says that nothing may be added now.
func (c *lane) isBusy() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.over || len(c.mu.behind) > 0
}

// add puts m behind what is to be sent, and says whether it is the first.
func (c *lane) add(m *raftpb.Message) bool {
	at := len(c.out)
	c.out = appendMessage(append(c.out, 0, 0, 0, 0), m)
	binary.BigEndian.PutUint32(c.out[at:], uint32(len(c.out)-at-4))
	return at == 0
}

// flush sends what was added without waiting for the peer.
func (c *lane) flush() {
	c.mu.Lock()
	c.sendLocked(c.out)
	c.mu.Unlock()
	if c.out = c.out[:0]; cap(c.out) > keptFrame {
		c.out = nil
	}
}

// sendLocked wants a lane that is not busy.
func (c *lane) sendLocked(b []byte) {
	if c.mu.over {
		return
	}
	c.mu.wrote = true
	c.rest = b
	if err := errors.Join(c.raw.Write(c.try), c.err); err != nil {
		c.endLocked()
		return
	}
	if len(c.rest) > 0 {
		c.mu.behind = slices.Clone(c.rest)
		c.wake <- struct{}{} // there is room: the writer empties it before the lane can be busy again
	}
	c.rest = nil
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

// write is the lane's writer: it writes what the loop would have to wait for, and a
// sign of life where a quarter of silence has passed without anything else.
func (c *lane) write(silence time.Duration) {
	t := time.NewTicker(silence / 4)
	defer t.Stop()
	for {
		select {
		case <-c.wake:
			if err := c.finish(silence); err != nil {
				c.end()
			}
		case <-t.C:
			c.mu.Lock()
			if !c.mu.wrote && len(c.mu.behind) == 0 {
				c.sendLocked(make([]byte, 4))
			}
			c.mu.wrote = false
			c.mu.Unlock()
		case <-c.ended:
			return
		}
	}
}

// finish writes what is behind, for which the peer has until it would call this
// member silent.
func (c *lane) finish(silence time.Duration) error {
	c.mu.Lock()
	b := c.mu.behind
	c.mu.Unlock()
	if err := errors.Join(c.conn.SetWriteDeadline(time.Now().Add(silence)), second(c.conn.Write(b)), c.conn.SetWriteDeadline(time.Time{})); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.behind = nil
	return nil
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
