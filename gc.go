package main

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"
)

// How much memory may be allocated between two garbage collections: gcRoom, or
// that share of what is alive, if it is more. Go's default is a share of 1: a store
// of 200 MB would take 400, and a store of 2 MB would be collected every 2 MB.
//
// Measured with three nodes on two cores: see Decisions in ARCHITECTURE.md.
const (
	gcRoom         = 64 << 20 // bytes
	gcShareLoading = 1.0      // nearly all that is allocated at a start stays alive
	gcShareServing = 0.25
	gcEvery        = 200 * time.Millisecond
)

// gcTuner keeps Go's GC percentage such that the above holds. A GOGC in the
// environment wins: then there is no tuner. GOMEMLIMIT counts either way, as the
// runtime collects when either asks for it.
type gcTuner struct {
	alive func() uint64 // bytes that the last collection found alive, and roots
	set   func(percent int)

	mu struct {
		sync.Mutex
		share   float64
		percent int // as set last
	}
}

// tuneGC starts a tuner for this process, in the loading phase.
func tuneGC(ctx context.Context, getenv func(string) string) *gcTuner {
	g := &gcTuner{alive: heapAlive, set: func(percent int) { debug.SetGCPercent(percent) }}
	g.mu.share = gcShareLoading
	if getenv("GOGC") == "" {
		g.tune()
		// goroutine: gc-tuner
		go g.run(ctx)
	}
	return g
}

// run looks at the heap again and again. Rejected: a cleanup that the runtime
// calls after each collection, which a busy machine puts off until the heap has
// grown by the old percentage of what is now alive.
func (g *gcTuner) run(ctx context.Context) {
	t := time.NewTicker(gcEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			g.tune()
		case <-ctx.Done():
			return
		}
	}
}

// serving ends the loading phase.
func (g *gcTuner) serving() {
	g.mu.Lock()
	g.mu.share = gcShareServing
	g.mu.Unlock()
}

// tune sets the percentage if it is off by more than a tenth: setting it stops
// the world for a moment.
func (g *gcTuner) tune() {
	alive := g.alive()
	g.mu.Lock()
	defer g.mu.Unlock()
	want := gcPercent(alive, g.mu.share)
	if off := want - g.mu.percent; off*10 > g.mu.percent || -off*10 > g.mu.percent {
		g.set(want)
		g.mu.percent = want
	}
}

// gcPercent is how much of what is alive may be allocated before a collection.
// The runtime never collects below 4 MiB for each 100 percent.
func gcPercent(alive uint64, share float64) int {
	alive = max(alive, 4<<20)
	return int(max(gcRoom, float64(alive)*share) * 100 / float64(alive))
}

// heapAlive is what Go's GC percentage refers to.
func heapAlive() uint64 {
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/stack:bytes"}, {Name: "/gc/scan/globals:bytes"}}
	metrics.Read(samples)
	var sum uint64
	for _, s := range samples {
		if s.Value.Kind() == metrics.KindUint64 {
			sum += s.Value.Uint64()
		}
	}
	return sum
}
