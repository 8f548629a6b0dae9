package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"testing"
	"testing/cryptotest"
	"time"

	"pontoon/internal/sim"
)

// Whole clusters in one goroutine and in virtual time. The raftNode and kvstore
// that run are the real ones; what the simulation stands in for is their
// goroutines (simnode_test.go), the disk (simdisk_test.go), the network, the
// clocks and the clients (simhistory_test.go). All chance comes from one seed,
// so a run that fails can be had again:
//
//	go test -run 'TestSim$' -sim.seed=17 .                     what failed, and the last lines of its trace
//	go test -run 'TestSim$' -sim.seed=17 -sim.trace=all . | less
//	make sim SIM='-sim.duration=8h -sim.seed=1000000'          for a night; docs/simulation.md keeps the score
//
// A seed first draws which faults there are and how strong (simProfile), then
// runs a cluster under them for 8 to 20 virtual seconds, ends all faults, and
// wants it whole again: everybody writes and reads, all hold the same, and what
// clients, watchers and leases were told all the while was true.

var (
	simSeed     = flag.Uint64("sim.seed", 0, "TestSim: run only this seed; with -sim.duration, begin with it")
	simDuration = flag.Duration("sim.duration", 0, "TestSim: run seeds for so long instead of the default ones")
	simTrace    = flag.String("sim.trace", "", "TestSim: all: print every line of the trace")
	simAll      = flag.Bool("sim.all", false, "TestSim: run all default seeds, however long that takes")
	simStop     = flag.Int("sim.stop", 20, "TestSim: end after so many seeds that failed")
	simLedger   = flag.String("sim.ledger", "", "TestSim: append what was run to this file")
)

// What the default tests run: all seeds if that takes no longer than simTime,
// and simFloor of them in any case.
const (
	simSeeds = 300
	simFloor = 80
	simTime  = 25 * time.Second
)

// simResult is what is known of a seed after its run.
type simResult struct {
	seed    uint64
	failure string // empty: none
	trace   *sim.Trace
	cover   sim.Cover
	virtual time.Duration
}

// simulate runs one seed.
func simulate(t *testing.T, seed uint64, all io.Writer) (res simResult) {
	t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
		cryptotest.SetGlobalRandom(t, seed) // raft draws its election time-outs from there
		w := newSimWorld(seed, all)
		defer func() {
			res = simResult{seed: seed, trace: w.trace, cover: w.cover, virtual: w.q.Now()}
			switch p := recover().(type) {
			case nil:
			case simFailure:
				res.failure = string(p)
			default:
				res.failure = fmt.Sprintf("panic: %v\n%s", p, debug.Stack())
			}
		}()
		w.live()
	})
	return res
}

// report fails the test over a seed.
func (res *simResult) report(t *testing.T) {
	t.Helper()
	var lines strings.Builder
	if *simTrace == "" {
		for _, l := range res.trace.Last() {
			fmt.Fprintln(&lines, l)
		}
	}
	t.Errorf("%sseed %d fails after %v: %s\nreplay it with: go test -run 'TestSim$' -sim.seed=%d .", lines.String(), res.seed, res.virtual, res.failure, res.seed)
}

func TestSim(t *testing.T) {
	start := time.Now()
	run := sim.Run{When: start, First: max(*simSeed, 1)}
	more := func(seed uint64) bool {
		spent := time.Since(start)
		switch {
		case *simDuration > 0:
			return spent < *simDuration && len(run.Failures) < *simStop
		case *simSeed > 0:
			return seed == *simSeed
		}
		if raceEnabled {
			return seed <= 10
		}
		return seed <= simSeeds && (spent < simTime || seed <= simFloor || *simAll)
	}
	var all io.Writer
	if *simTrace == "all" {
		all = os.Stdout
	}
	cover := sim.Cover{}
	for seed := run.First; more(seed); seed++ {
		res := simulate(t, seed, all)
		cover.Add(res.cover)
		run.Virtual += res.virtual
		run.Last = seed
		if res.failure != "" {
			run.Failures = append(run.Failures, seed)
			res.report(t)
			if *simDuration > 0 {
				fmt.Printf("seed %d fails: %s\n", seed, res.failure) // at once: the report comes in the end
			}
		}
	}
	run.Wall = time.Since(start)
	speed := fmt.Sprintf("seeds %d to %d: %.2f virtual hours in %v, %.2f virtual hours a minute, %d failures", run.First, run.Last, run.Virtual.Hours(),
		run.Wall.Round(time.Second/10), run.Virtual.Hours()/run.Wall.Minutes(), len(run.Failures))
	t.Log(speed)
	if *simDuration > 0 {
		fmt.Println(speed) // go test shows the log of a test only if it fails
	}
	if testing.Verbose() {
		for _, m := range cover.Names() {
			t.Logf("%8d %s", cover[m], m)
		}
	}
	if *simLedger != "" {
		run.Commit = simCommit()
		if err := run.Append(*simLedger); err != nil {
			t.Error(err)
		}
	}
	if *simSeed > 0 || *simDuration > 0 {
		return
	}
	if run.Last < simSeeds {
		t.Logf("stopped after %d seeds of %d, and so without a look at what they came to: the machine is slow, or busy", run.Last, simSeeds)
		return
	}
	if missing := cover.Missing(simMarkers()); len(missing) > 0 {
		t.Errorf("no seed has come to: %s", strings.Join(missing, ", "))
	}
}

func simCommit() string {
	out, err := exec.Command("git", "rev-parse", "--short", "HEAD").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(out))
}

// simMarkers are the situations that the default seeds must come to, or the
// simulation proves less than it says: each fault, at a member of each role,
// while the cluster does each of what it may be doing.
func simMarkers() (markers []string) {
	for _, fault := range []string{"drop", "duplicate", "reorder", "one-way cut", "isolate", "pause", "kill", "power loss", "stop", "blackout",
		"disk stalls", "disk fails", "disk full", "transfer", "join", "leave",
		"crash before a save", "crash before a sync", "crash after a save", "crash between messages"} {
		markers = append(markers, fault+"/leader/steady", fault+"/leader/installing", fault+"/follower/steady", fault+"/follower/electing")
	}
	for _, fault := range []string{"drop", "duplicate", "reorder", "isolate", "pause", "kill", "stop", "disk stalls", "transfer"} {
		markers = append(markers, fault+"/leader/changing", fault+"/follower/installing")
	}
	for _, fault := range []string{"drop", "duplicate", "reorder"} {
		markers = append(markers, fault+"/learner/changing", fault+"/learner/installing", fault+"/candidate/electing")
	}
	return append(markers, "crash before a snapshot is recorded/leader/steady", "crash after a snapshot is recorded/leader/steady",
		"crash before an install/follower/installing", "installs a snapshot/follower/installing", "installs a snapshot/learner/installing",
		"crash/loses records", "rot/leader/steady", "load/older snapshot", "load/refused", "removed", "removed/refused", "removed/asks to come back", "changed/add", "changed/remove",
		"once/retried", "once/replayed", "lease/ended", "lease/kept alive", "watch/cut", "watch/resumed", "apply/back-pressure", "gather/others",
		"write/done", "write/unknown", "write/"+errNoLeader.Error(), "write/"+errNotProposed.Error(), "write/"+errDiskLow.Error(), "write/"+errStopping.Error(),
		"read/done", "read/failed")
}

// TestSimReplays: a seed gives the same run to the last event.
func TestSimReplays(t *testing.T) {
	for seed := uint64(1); seed <= 8; seed++ {
		one, two := simulate(t, seed, nil), simulate(t, seed, nil)
		if one.trace.Hash() != two.trace.Hash() || one.trace.Len() != two.trace.Len() {
			t.Errorf("seed %d: two runs differ: %d lines with hash %016x, %d with %016x", seed, one.trace.Len(), one.trace.Hash(), two.trace.Len(), two.trace.Hash())
		}
		if one.trace.Len() < 1000 {
			t.Errorf("seed %d: only %d lines", seed, one.trace.Len())
		}
	}
}
