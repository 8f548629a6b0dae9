package main

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"pontoon/kv"
)

// nodeMetrics are this node's own. The libraries register theirs under etcd's
// names with the default registry (etcd_network_peer_round_trip_time_seconds, …);
// /metrics shows both.
type nodeMetrics struct {
	proposals       prometheus.Counter
	reproposed      prometheus.Counter
	batchCommands   prometheus.Histogram
	readIndexes     prometheus.Counter
	readRetries     prometheus.Counter
	readWait        prometheus.Histogram
	droppedMessages prometheus.Counter
	refusedMessages prometheus.Counter
	leaderChanges   prometheus.Counter
	snapshotSeconds prometheus.Histogram
	logSync         prometheus.Histogram
}

func newNodeMetrics(r prometheus.Registerer) *nodeMetrics {
	f := promauto.With(r)
	counter := func(name, help string) prometheus.Counter {
		return f.NewCounter(prometheus.CounterOpts{Name: "pontoon_" + name, Help: help})
	}
	return &nodeMetrics{
		proposals:       counter("proposals_total", "Commands given to raft by this member's clients."),
		reproposed:      counter("reproposed_batches_total", "Batches proposed again because their fate was open."),
		readIndexes:     counter("read_indexes_total", "ReadIndex rounds started; many reads share one."),
		readRetries:     counter("read_index_retries_total", "ReadIndex rounds given up on and started anew."),
		droppedMessages: counter("dropped_messages_total", "Peers' messages dropped because a queue was full."),
		refusedMessages: counter("refused_messages_total", "Peers' messages that no healthy member sends."),
		leaderChanges:   counter("leader_changes_total", "Times that this member came to know a leader, a new one or the same one again."),
		batchCommands: f.NewHistogram(prometheus.HistogramOpts{Name: "pontoon_batch_commands", Help: "Commands packed into one log entry.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 13)}),
		readWait: f.NewHistogram(prometheus.HistogramOpts{Name: "pontoon_read_index_wait_seconds", Help: "Time from the first read of a batch until the state may be read.",
			Buckets: prometheus.ExponentialBuckets(.0001, 2, 16)}),
		logSync: f.NewHistogram(prometheus.HistogramOpts{Name: "pontoon_log_sync_seconds", Help: "Time to write to the log and sync it.",
			Buckets: prometheus.ExponentialBuckets(.0001, 2, 16)}),
		snapshotSeconds: f.NewHistogram(prometheus.HistogramOpts{Name: "pontoon_snapshot_write_seconds", Help: "Time to write a snapshot file.",
			Buckets: prometheus.ExponentialBuckets(.001, 4, 10)}),
	}
}

// registerGauges shows what is read at scrape time.
func (s *kvstore) registerGauges(r prometheus.Registerer) {
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "pontoon_" + name, Help: help}, f))
	}
	b := func(v bool) float64 {
		if v {
			return 1
		}
		return 0
	}
	gauge("has_leader", "1 if this member knows a leader.", func() float64 { return b(s.leader() != 0) })
	gauge("is_leader", "1 if this member leads.", func() float64 { return b(s.leader() == s.node.id) })
	gauge("term", "Raft term.", func() float64 { return float64(s.node.soft.Load().term) })
	gauge("committed_index", "Last committed log entry.", func() float64 { return float64(s.node.progress.committed.Load()) })
	gauge("applied_index", "Last applied log entry.", func() float64 { return float64(s.applied.At()) })
	gauge("apply_lag_entries", "Entries committed and not applied yet.", func() float64 {
		return max(0, float64(s.node.progress.committed.Load())-float64(s.applied.At()))
	})
	gauge("proposals_queued", "Commands that wait to be proposed.", func() float64 { return float64(len(s.node.proposeC)) })
	gauge("disk_low", "1 while writes are refused for lack of disk space.", func() float64 { return b(s.diskLow.Load()) })
	gauge("stands_aside", "1 while this member has no vote, after damage to its disk, until it has caught up.", func() float64 { return b(s.node.aside.stands()) })
	gauge("diverged", "1 while this member serves no clients because its state differs from that of the others.", func() float64 { return b(s.standing() == diverged) })
	state := func(f func(*kv.State) int64) func() float64 {
		return func() float64 {
			s.mu.RLock()
			defer s.mu.RUnlock()
			return float64(f(s.mu.state))
		}
	}
	gauge("keys", "Keys in the store.", state(func(st *kv.State) int64 { return int64(st.Len()) }))
	gauge("revision", "Store revision.", state((*kv.State).Revision))
	gauge("compact_revision", "Revision up to which changes are no longer known.", state(func(st *kv.State) int64 { return st.History().Compacted() }))
	gauge("state_bytes", "Bytes of keys and values.", state((*kv.State).Bytes))
	gauge("leases", "Leases, those of single keys included.", state(func(st *kv.State) int64 { return int64(st.Leases()) }))
	gauge("idempotency_results", "Results kept for idempotency keys.", state(func(st *kv.State) int64 { return int64(st.Kept()) }))
	gauge("watches", "Watchers that the hub of changes holds, cut ones included; the limit of open watches counts these.", func() float64 { return float64(s.hub.Len()) })
}
