// Package bench is the load generator behind pontoon bench: it sends a chosen
// mix of calls to a running cluster and tells how fast they were answered.
//
// Its nouns: a client is one connection with one request under way; a loop is
// closed (a client sends when it has its answer) or open (requests begin by a
// schedule, whatever becomes of the ones before); the window is the measured
// time, after the warm-up. The rate counts answers that came inside the window,
// latencies are of requests that began inside it:
//
//	code := bench.Main(ctx, []string{"--endpoints", "127.0.0.1:9121", "--op", "put"}, os.Stdout, os.Stderr)
//
// It is a package of its own because it is a client: it must not be able to
// reach into the node that it measures. It has its own HTTP/1.1 client (conn.go)
// and its own histogram (histogram.go); both files say why.
//
// Caveats: a generator on the machine of the servers takes its processor time
// from theirs, and the report says how much. A request without an answer has
// no latency; it is counted among the errors.
package bench

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

// Main runs pontoon bench with the arguments that follow that name, and returns
// the exit code: 0 if anything succeeded, 1 if nothing did, 2 for wrong flags.
// The end of ctx ends the run early, with the result so far. Results go to
// stdout, progress and errors to stderr.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "pontoon bench: %v (try pontoon bench --help)\n", err)
		return 2
	}
	about := stdout
	if o.JSON {
		about = stderr
	}
	res, err := measure(ctx, &o, about, progressTo(stderr))
	if err == nil && res.Ops == 0 {
		err = nothingMeasured(res)
	}
	if res != nil {
		write := res.writeTable
		if o.JSON {
			write = res.writeJSON
		}
		if werr := write(stdout); werr != nil && err == nil {
			err = fmt.Errorf("write the result: %w", werr)
		}
	}
	if err != nil {
		fmt.Fprintln(stderr, "pontoon bench:", err)
		return 1
	}
	return 0
}

// nothingMeasured says what most requests died of and what to try.
func nothingMeasured(res *Result) error {
	if res.Interrupted && len(res.Errors) == 0 {
		return errors.New("interrupted before anything was measured; let it run longer, or lower --warmup")
	}
	worst, most := "", int64(0)
	for name, n := range res.Errors {
		if n > most || n == most && name < worst {
			worst, most = name, n
		}
	}
	var endpoints []string
	for _, s := range res.Servers {
		endpoints = append(endpoints, s.Endpoint)
	}
	where := strings.Join(endpoints, ", ")
	switch {
	case most == 0:
		return fmt.Errorf("no answer from %s inside the %v of --duration; measure longer", where, res.Options.Duration)
	case worst == "404 key_not_found":
		return fmt.Errorf("no key was there to read at %s; leave out --fill=false, so that the keys are written first", where)
	}
	text := ""
	if res.lastError != "" {
		text = " (" + res.lastError + ")"
	}
	return fmt.Errorf("nothing succeeded at %s: %d × %s%s; see /readyz?verbose and the log of the servers, and try one with --only 1", where, most, worst, text)
}

// progressTo is stderr if that is a terminal, else nil: nobody reads how far a
// run is in a file.
func progressTo(w io.Writer) io.Writer {
	f, ok := w.(*os.File)
	if !ok {
		return nil
	}
	info, err := f.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return nil
	}
	return f
}
