package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

// Peers that send at a pace of their own.

// Whoever sends a byte now and then loses its connection, and its place, whatever it
// has begun to send.
func TestDrippingPeers(t *testing.T) {
	defer func(patience time.Duration, pace int) { peerPatience, peerPace = patience, pace }(peerPatience, peerPace)
	peerPatience, peerPace = 100*time.Millisecond, 1<<20
	c := newCluster(t, 1, nil)
	l := c.leader()
	_, tr := peerPort(t, l)
	listener, err := listenPeer("127.0.0.1:0", 64)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(l.node.peerHandler(tr.Handler()))
	srv.Listener.Close()
	srv.Listener, srv.Config.ReadHeaderTimeout = listener, peerPatience
	srv.Start()
	defer srv.Close()
	post := func(path string, length int) string {
		return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nX-Etcd-Cluster-ID: %s\r\nX-Server-Version: %s\r\nContent-Length: %d\r\n\r\n", path, tr.ClusterID, peerVersion, length)
	}
	term := l.node.soft.Load().term
	envelope := sized(marshal(t, &raftpb.Message{Type: raftpb.MsgSnap.Enum(), From: new(uint64(2)), To: new(l.id), Term: new(term),
		Snapshot: &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(1 << 40)), Term: new(term), ConfState: l.node.members.Load().confState()}}}))
	var all sync.WaitGroup
	ended := make(chan struct{})
	for what, begin := range map[string]string{
		"a header":                      "GET /pontoon/cluster HTTP/1.1\r\nX: ",
		"a message":                     post("/raft", 10_000),
		"a large message":               post("/raft", 1<<20) + strings.Repeat("x", smallMessage+1),
		"what precedes a snapshot":      post("/raft/snapshot", 1<<30) + string(be64(maxSnapMessage)),
		"who stands aside":              post(asidePath, 1000),
		"a body that nobody reads":      post(clusterInfoPath, 100_000),
		"a body that is refused":        post("/raft/xyz", 100_000),
		"what is behind a bad snapshot": post("/raft/snapshot", 100_000) + string(envelope) + strings.Repeat("x", 1000),
	} {
		for range largeMessages {
			all.Go(func() {
				conn, err := net.Dial("tcp", listener.Addr().String())
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				gone := make(chan struct{})
				go func() {
					_, _ = io.Copy(io.Discard, conn) // until the end, of whatever kind
					close(gone)
				}()
				drip := time.NewTicker(10 * time.Millisecond)
				defer drip.Stop()
				for _, err := io.WriteString(conn, begin); err == nil; _, err = conn.Write([]byte{'x'}) {
					select {
					case <-drip.C:
					case <-gone:
						return
					case <-ended:
						t.Errorf("%s goes on for ever", what)
						return
					}
				}
			})
		}
	}
	late := time.AfterFunc(15*time.Second, func() { close(ended) })
	defer late.Stop()
	all.Wait()
	for path, body := range map[string]io.Reader{"/raft": bytes.NewReader(make([]byte, smallMessage+1)), "/raft/snapshot": bytes.NewReader(sized(nil))} {
		if status, text := postPeer(t, srv, tr, path, body); status != 400 {
			t.Errorf("%s afterwards: %d %s", path, status, text)
		}
	}
}

// A large message may take long, if it moves.
func TestBytesBuyTime(t *testing.T) {
	until := time.Now().Add(peerPatience)
	w := &deadlineWriter{ResponseRecorder: httptest.NewRecorder()}
	b := &peerBody{zeros{}, http.NewResponseController(w), until}
	for _, n := range []int{1, peerPace - 1, peerPace, peerPace} {
		until = until.Add(time.Duration(n) * time.Second / time.Duration(peerPace))
		if _, err := io.ReadFull(b, make([]byte, n)); err != nil || until.Sub(w.until).Abs() > time.Millisecond {
			t.Errorf("%v; after %d more bytes the deadline is %v, want %v", err, n, w.until, until)
		}
	}
}
