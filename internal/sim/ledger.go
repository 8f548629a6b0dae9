package sim

import (
	"errors"
	"fmt"
	"os"
	"time"
)

// Run is what a ledger says of one stretch of seeds.
type Run struct {
	When        time.Time
	Commit      string // of the program that was simulated
	First, Last uint64 // seeds
	Virtual     time.Duration
	Wall        time.Duration
	Failures    []uint64 // the seeds that failed
}

const ledgerHead = `| date | commit | seeds | virtual hours | wall time | failures |
|---|---|---|---|---|---|
`

// Row is the line of a ledger.
func (r Run) Row() string {
	failures := "none"
	if len(r.Failures) > 0 {
		failures = fmt.Sprint(r.Failures)
	}
	return fmt.Sprintf("| %s | %s | %d to %d | %.1f | %s | %s |\n", r.When.UTC().Format("2006-01-02 15:04"), r.Commit, r.First, r.Last,
		r.Virtual.Hours(), r.Wall.Round(time.Second), failures)
}

// Append adds a row to the ledger at path, which it begins if there is none.
func (r Run) Append(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	head := ""
	info, err := f.Stat()
	if err == nil && info.Size() == 0 {
		head = ledgerHead
	}
	if err == nil {
		_, err = f.WriteString(head + r.Row())
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	return nil
}
