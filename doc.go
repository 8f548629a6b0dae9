// Command pontoon is a replicated key-value store that any HTTP client can use.
//
// # Reading order
//
//	kv/          what is replicated: the state machine, without raft, clock or disk
//	raft.go      the one goroutine that owns raft: collect, propose, ready, advance
//	storage.go   the log and the snapshots on disk, and the order in which they are written
//	kvstore.go   a write: propose and wait; and the goroutine that applies what was committed
//	propose.go   the loop's side of a write: batches, and what happens when leadership moves; gather.go: when
//	             a leader makes the next append
//	read.go      a linearizable read, views of older revisions, and where watches begin
//	clock.go     the time that leases run by
//	aside.go     what a member does whose disk has lost something; founder.go: one whose directory is gone
//	divergence.go how a member whose state differs from that of the others is found out
//	snapshot.go  how a snapshot is written, recorded, sent and installed
//	member.go    the rules of membership, as plain functions of a table; reconfigure.go carries them out
//	peer.go      the peer port: what is refused, how a joiner learns the cluster; peerreceive.go: what peers
//	             POST, peerstream.go: what they answer; peerlane.go: the short way of messages between members
//	httpapi.go   routes and cluster calls; httpkv.go, httptxn.go, httplease.go, httplist.go, httpwatch.go: the data calls;
//	             other http*.go: options, bodies, errors → status, metrics; internal/watch: fan-out; listener.go: what a slow client may cost
//	server.go    the parts of a member, how they start and stop
//	status.go    /v1/status, /readyz; metrics.go: /metrics
//	config.go    flags and every limit; main.go: exit codes; internal/bench: pontoon bench, which is a client
//
// # The way of a write
//
//	handler → proposeC → raft loop packs all that wait into one log entry
//	        → to the followers and, at the same time, to the log: one sync for all
//	        → majority → commitC → apply → each waiter gets its own result
//
// ARCHITECTURE.md has the goroutines, the files on disk and the decisions.
package main
