package main

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestGCPercent(t *testing.T) {
	for _, tt := range []struct {
		alive   uint64
		share   float64
		percent int
	}{
		{0, gcShareServing, 1600}, // no more than if 4 MiB were alive
		{2 << 20, gcShareServing, 1600},
		{8 << 20, gcShareServing, 800},
		{64 << 20, gcShareServing, 100},
		{256 << 20, gcShareServing, 25},
		{10 << 30, gcShareServing, 25},
		{32 << 20, gcShareLoading, 200},
		{10 << 30, gcShareLoading, 100},
	} {
		if got := gcPercent(tt.alive, tt.share); got != tt.percent {
			t.Errorf("%d bytes alive, share %v: %d percent, not %d", tt.alive, tt.share, got, tt.percent)
		}
	}
}

// The percentage is set only where that makes a difference.
func TestGCTuner(t *testing.T) {
	var alive uint64
	var sets []int
	g := &gcTuner{alive: func() uint64 { return alive }, set: func(percent int) { sets = append(sets, percent) }}
	g.mu.share = gcShareLoading
	for _, mib := range []uint64{1, 1, 128, 130, 400} {
		alive = mib << 20
		g.tune()
	}
	g.serving()
	for _, mib := range []uint64{400, 410, 200, 190, 260} {
		alive = mib << 20
		g.tune()
	}
	if want := []int{1600, 100, 25, 32, 25}; !slices.Equal(sets, want) {
		t.Errorf("set to %v, not %v", sets, want)
	}
}

// It goes on looking, until the process ends.
func TestGCTunerRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		alive, sets := uint64(128<<20), 0
		g := &gcTuner{alive: func() uint64 { alive *= 2; return alive }, set: func(int) { sets++ }}
		g.mu.share = gcShareLoading
		go g.run(ctx)
		time.Sleep(3*gcEvery + gcEvery/2)
		synctest.Wait()
		if alive != 128<<23 || sets != 1 {
			t.Errorf("%d bytes alive, set %d times", alive, sets)
		}
		cancel()
	})
}

// The process tunes itself, and a GOGC of the user's wins.
func TestProcessGC(t *testing.T) {
	percent := func(p *process) string {
		for line := range strings.Lines(p.want(http.StatusOK, http.MethodGet, "/metrics", "").body) {
			if v, ok := strings.CutPrefix(line, "go_gc_gogc_percent "); ok {
				return strings.TrimSpace(v)
			}
		}
		return "no go_gc_gogc_percent"
	}
	t.Setenv("GOGC", "")
	s := newSite(t, 1, 0)
	s.start(1)
	if got := percent(s.nodes[1]); got == "100" {
		t.Error("Go's default percentage")
	}
	t.Setenv("GOGC", "77")
	s = newSite(t, 1, 0)
	s.start(1)
	if got := percent(s.nodes[1]); got != "77" {
		t.Errorf("GOGC=77 and the percentage is %s", got)
	}
}
