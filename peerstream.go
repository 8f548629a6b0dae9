package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"

	"github.com/coreos/go-semver/semver"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// What peers answer. rafthttp opens streams to them, and reads what comes on
// goroutines of its own, where a panic ends the process: over a version that is
// none, over an entry that is no protobuf, over a length that no memory holds.
// It also names a metric after each sender that a message claims. So each answer
// is read here first, and rafthttp gets whole frames that it can decode.

const (
	maxPeerFrame   = 16 * maxMessageBytes // one message of a peer, encoded
	maxPeerEntries = 1 << 20              // entries in it; each costs 50 times the two bytes that it may have on the wire
	maxPeerAnswer  = 64 << 10             // whatever else a peer answers: reasons, probes
	keptFrame      = 256 << 10            // larger buffers are left to the collector
)

// peerAnswers is the way of rafthttp's requests to the network and back.
type peerAnswers struct {
	next    http.RoundTripper
	known   func(id uint64) bool // is a member
	refused func(error)          // is told why a stream ended here
}

// guardAnswers puts peerAnswers in front of both of t's connections pools. t must
// have been started, and have no peers yet. The function that it returns closes
// what is idle in them, after t.Stop.
//
// rafthttp cannot be given a RoundTripper: hence a look at its private fields,
// which are read and not changed. Each is a plain *http.Transport, and that
// has a place for another way to speak http.
func guardAnswers(t *rafthttp.Transport, known func(id uint64) bool, refused func(error)) (closeIdle func(), err error) {
	var pools []*http.Transport
	for _, name := range []string{"streamRt", "pipelineRt"} {
		f := reflect.ValueOf(t).Elem().FieldByName(name)
		if f.Kind() != reflect.Interface || f.Elem().Type() != reflect.TypeFor[*http.Transport]() {
			return nil, fmt.Errorf("rafthttp has no %s that is an *http.Transport: this version cannot be guarded against its peers' answers; build with the version that go.mod names", name)
		}
		outer := (*http.Transport)(f.Elem().UnsafePointer())
		inner := outer.Clone()
		// The time-outs of a stream (rafthttp.ConnReadTimeout) are in Dial, and
		// net/http prefers DialContext, which has none: a peer that vanished
		// without a word would be listened to until TCP notices.
		inner.DialContext = nil
		inner.DisableCompression = true
		outer.RegisterProtocol("http", &peerAnswers{inner, known, refused})
		pools = append(pools, inner)
	}
	return func() {
		for _, p := range pools {
			p.CloseIdleConnections()
		}
	}, nil
}

func (a *peerAnswers) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := a.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if err := checkVersions(resp.Header); err != nil {
		a.refused(err)
		return nil, errors.Join(err, resp.Body.Close())
	}
	stream, isStream := strings.CutPrefix(req.URL.Path, rafthttp.RaftStreamPrefix+"/")
	if !isStream || resp.StatusCode != http.StatusOK {
		resp.Body = &shortBody{resp.Body, maxPeerAnswer}
		return resp, nil
	}
	peer, err := types.IDFromString(req.Header.Get("X-Raft-To"))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("a stream to nobody: %w", err), resp.Body.Close())
	}
	s := &peerStream{body: resp.Body, src: bufio.NewReaderSize(resp.Body, 32<<10), peer: uint64(peer), known: a.known, refused: a.refused}
	s.next = s.messageFrame
	if strings.HasPrefix(stream, "msgapp/") {
		s.next = s.appendFrame
	}
	resp.Body = s
	return resp, nil
}

// checkVersions refuses the headers over which rafthttp panics.
func checkVersions(h http.Header) error {
	for _, name := range []string{"X-Server-Version", "X-Min-Cluster-Version"} {
		if v := h.Get(name); v != "" {
			if _, err := semver.NewVersion(v); err != nil {
				return fmt.Errorf("%s is malformed: %.40q", name, v)
			}
		}
	}
	return nil
}

// shortBody fails where a body goes on after left bytes: rafthttp reads answers
// to their end.
type shortBody struct {
	io.ReadCloser
	left int64
}

func (b *shortBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left+1)])
	if b.left -= int64(n); b.left < 0 {
		return 0, fmt.Errorf("a peer's answer is longer than %d bytes", maxPeerAnswer)
	}
	return n, err
}

// peerStream is a stream of messages from a peer. It hands a frame on once all of
// it has come and would be decoded; a bad one ends the stream, and rafthttp opens
// another. One goroutine reads.
type peerStream struct {
	body    io.ReadCloser
	src     *bufio.Reader
	next    func() error // appends one frame to frame
	peer    uint64
	known   func(id uint64) bool // is a member, and may have sent something by way of the peer
	refused func(error)
	frame   []byte // frame[at:] is checked and not handed on yet
	at      int
	err     error // after frame
}

var errBadFrame = errors.New("a peer sent what is no message")

func (s *peerStream) Read(p []byte) (int, error) {
	for s.at == len(s.frame) {
		if s.err != nil {
			return 0, s.err
		}
		if s.at = 0; cap(s.frame) > keptFrame {
			s.frame = nil
		}
		s.frame = s.frame[:0]
		if s.err = s.next(); s.err != nil {
			s.frame = s.frame[:0]
			if errors.Is(s.err, errBadFrame) {
				s.refused(s.err)
			}
		}
	}
	n := copy(p, s.frame[s.at:])
	s.at += n
	return n, nil
}

func (s *peerStream) Close() error { return s.body.Close() }

// take appends n bytes to the frame and returns them. The frame grows with what
// has arrived, not with what was announced.
func (s *peerStream) take(n uint64) ([]byte, error) {
	if n > maxPeerFrame || uint64(len(s.frame))+n > maxPeerFrame {
		return nil, fmt.Errorf("%w: a frame of more than %d bytes", errBadFrame, maxPeerFrame)
	}
	begin, end := len(s.frame), len(s.frame)+int(n)
	for len(s.frame) < end {
		at := len(s.frame)
		s.frame = slices.Grow(s.frame, min(end-at, 64<<10))
		k, err := io.ReadFull(s.src, s.frame[at:min(end, cap(s.frame))])
		s.frame = s.frame[:at+k]
		if err != nil {
			if at+k > 0 {
				err = io.ErrUnexpectedEOF // within a frame
			}
			return nil, err
		}
	}
	return s.frame[begin:end], nil
}

func (s *peerStream) number() (uint64, error) {
	b, err := s.take(8)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}

func (s *peerStream) sized() ([]byte, error) {
	n, err := s.number()
	if err != nil {
		return nil, err
	}
	return s.take(n)
}

// messageFrame: length, message (rafthttp's msg_codec.go).
func (s *peerStream) messageFrame() error {
	b, err := s.sized()
	if err != nil {
		return err
	}
	from, err := wireSender(b)
	if err == nil && from != 0 && from != s.peer && !s.known(from) { // 0: the connection lives
		s.frame = s.frame[:0] // left out: our table may lag behind the peer's
	}
	return err
}

// appendFrame: a byte tells what follows (rafthttp's msgappv2_codec.go).
func (s *peerStream) appendFrame() error {
	typ, err := s.take(1)
	if err != nil {
		return err
	}
	switch typ[0] {
	case 0: // the connection lives
		return nil
	case 1: // number of entries, then length and entry of each, commit index
		count, err := s.number()
		if err != nil {
			return err
		}
		if count > maxPeerEntries {
			return fmt.Errorf("%w: %d entries", errBadFrame, count)
		}
		for range count {
			b, err := s.sized()
			if err != nil {
				return err
			}
			if err := wireFields(b, func(protowire.Number, protowire.Type, []byte) error { return nil }); err != nil {
				return err
			}
		}
		_, err = s.number()
		return err
	case 2: // length, message
		b, err := s.sized()
		if err != nil {
			return err
		}
		from, err := wireSender(b)
		if err == nil && from != s.peer {
			err = fmt.Errorf("%w: an append of member %d", errBadFrame, from)
		}
		if err != nil {
			return err
		}
		if err := proto.Unmarshal(b, new(raftpb.Message)); err != nil { // rafthttp would panic over it
			return fmt.Errorf("%w: %w", errBadFrame, err)
		}
		return nil
	}
	return fmt.Errorf("%w: frame of type %d", errBadFrame, typ[0])
}

// wireSender reads who sent an encoded message, and refuses one that would cost
// far more memory than it has bytes.
func wireSender(b []byte) (from uint64, err error) {
	entries := 0
	err = wireFields(b, func(field protowire.Number, typ protowire.Type, value []byte) error {
		switch {
		case field == 3 && typ == protowire.VarintType: // from; of another type it would not be read as such
			from, _ = protowire.ConsumeVarint(value) // wireFields has read it
		case field == 7: // entries
			if entries++; entries > maxPeerEntries {
				return fmt.Errorf("%w: more than %d entries", errBadFrame, maxPeerEntries)
			}
		case field == 14: // messages in a message: only between a process and its own disk
			return fmt.Errorf("%w: it holds messages", errBadFrame)
		}
		return nil
	})
	return from, err
}

// wireFields walks through the fields of an encoded message. What it accepts
// proto.Unmarshal does, if no field is a message itself.
func wireFields(b []byte, f func(protowire.Number, protowire.Type, []byte) error) error {
	for len(b) > 0 {
		field, typ, n := protowire.ConsumeTag(b)
		if n < 0 || !field.IsValid() || typ == protowire.StartGroupType || typ == protowire.EndGroupType {
			return fmt.Errorf("%w: no field of a message", errBadFrame)
		}
		size := protowire.ConsumeFieldValue(field, typ, b[n:])
		if size < 0 {
			return fmt.Errorf("%w: %w", errBadFrame, protowire.ParseError(size))
		}
		if err := f(field, typ, b[n:n+size]); err != nil {
			return err
		}
		b = b[n+size:]
	}
	return nil
}
