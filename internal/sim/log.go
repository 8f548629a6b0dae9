package sim

import "slices"

// Record is one record of a log.
type Record struct {
	Kind byte
	Data []byte
}

// Log is an append-only file of records. What was synced survives any crash; of
// the rest some first part does, in the order in which it was written: one
// that ends within a record ends before it, as a reader repairs it.
type Log struct {
	records []Record
	synced  int // how many
}

// Append writes a record, which is not synced yet. It belongs to the log.
func (l *Log) Append(kind byte, data []byte) { l.records = append(l.records, Record{kind, data}) }

// Sync makes all that was written survive.
func (l *Log) Sync() { l.synced = len(l.records) }

// Unsynced is how many records a crash may take.
func (l *Log) Unsynced() int { return len(l.records) - l.synced }

// Records are all records, oldest first.
func (l *Log) Records() []Record { return l.records }

// Replace puts another content in place of the log, at once and synced, as the
// rename of a file does.
func (l *Log) Replace(records []Record) {
	l.records = records
	l.synced = len(records)
}

// Crash leaves what a loss of power leaves, and says how many records went.
func (l *Log) Crash(r *Rand) (lost int) {
	if n := l.Unsynced(); n > 0 {
		lost = r.IntN(n + 1)
		l.records = slices.Clip(l.records[:len(l.records)-lost])
	}
	l.synced = len(l.records)
	return lost
}
