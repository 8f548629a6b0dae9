// Package kv is the state machine: the same commands in the same order give the
// same state, the same results and the same bytes of snapshot, on every replica
// and on every run.
//
// It is arithmetic on memory. It has no clock, no goroutine, no randomness, no
// log output and no I/O but the reader or writer it is handed; it imports std
// and a B-tree, and knows nothing of raft beyond an index.
//
// # Nouns
//
// A Command is one request to change the state. A Batch is what one log entry
// carries: commands, and an identity (Node, Boot, Seq) by which a batch that was
// proposed twice takes effect once. The State is an ordered map from key to
// Entry, the store revision, the index of the last applied log entry, the
// replay table behind those identities, and what the following three are about.
// A snapshot is the state as a file.
//
// The revision is one counter for the whole store. Every command that changes
// anything takes the next one; deleting an absent key changes nothing. An Event
// is what one revision did to one key. The History is the latest events, within
// bounds; a View is the store at a revision whose later events are all there.
//
// A Lease is what keys can be attached to, to go when it ends. Time comes into
// the state by ticks only: commands that move its clock, start what was granted
// before, and end what is due.
//
// A kept result is the outcome of a command with an idempotency key (Once), for
// those that repeat it; when its time is over, a tombstone stays for a while.
//
// # Example
//
//	put := kv.AppendCommand(nil, &kv.Command{Op: kv.OpPut, Key: "sky", Value: []byte("blue")})
//	entry := kv.AppendBatch(nil, 1, 1, 1, put) // to be proposed
//
//	var batch kv.Batch
//	if err := kv.DecodeBatch(entry, &batch); err != nil { // once committed
//		return err
//	}
//	state := kv.NewState()
//	results := state.Apply(7, &batch, nil)
//	e, ok := state.Get("sky") // e.Value is "blue", e.ModRevision is results[0].Revision
//
// # Caveats
//
// A State is not safe for concurrent use; the caller locks. The exception is
// what Clone is for: one goroutine may read a clone while another writes the
// original; and a History can be read by any number of them.
//
// Entry.Value is the state's own memory. Never write to it.
//
// A decoded Batch aliases the bytes it was decoded from. Apply copies.
//
// Apply must be called for every log position in order, and only once for each;
// replay protection is about batches that were proposed twice, not about log
// entries that are applied twice.
package kv
