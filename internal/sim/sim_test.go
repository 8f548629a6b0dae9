package sim

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const ms = time.Millisecond

func TestQueueRunsInOrder(t *testing.T) {
	var q Queue
	var ran []string
	note := func(s string) func() { return func() { ran = append(ran, s+"@"+q.Now().String()) } }
	q.After(3*ms, note("c"))
	q.After(1*ms, func() {
		note("a")()
		q.At(0, note("late")) // its time has passed: it runs now, behind what is there
		q.After(1*ms, note("b"))
	})
	q.After(1*ms, note("a2"))
	q.At(3*ms, note("c2"))
	for q.Step() {
	}
	if got, want := strings.Join(ran, " "), "a@1ms a2@1ms late@1ms b@2ms c@3ms c2@3ms"; got != want {
		t.Errorf("ran %s, want %s", got, want)
	}
	if q.Step() {
		t.Error("an empty queue steps")
	}
}

func TestRandFollowsItsSeed(t *testing.T) {
	draw := func(seed uint64) (out []uint64) {
		r := NewRand(seed)
		f := r.Fork()
		for range 5 {
			out = append(out, r.Uint64(), f.Uint64())
		}
		return out
	}
	if !slices.Equal(draw(1), draw(1)) || slices.Equal(draw(1), draw(2)) {
		t.Error("chance does not follow the seed")
	}
	r := NewRand(1)
	hits := 0
	for range 10_000 {
		if r.Chance(0.25) {
			hits++
		}
		if d := r.Between(2*ms, 5*ms); d < 2*ms || d >= 5*ms {
			t.Fatalf("%v is outside", d)
		}
	}
	if hits < 2200 || hits > 2800 || r.Chance(0) || r.Between(3*ms, 3*ms) != 3*ms {
		t.Errorf("%d of 10000 at 1 in 4", hits)
	}
}

// TestNet holds each fault alone against what it may do to 1000 messages.
func TestNet(t *testing.T) {
	tests := []struct {
		name                   string
		set                    func(*Net)
		lost, twice, overtaken bool
		slowest                time.Duration
	}{
		{name: "no fault", set: func(*Net) {}, slowest: 2 * ms},
		{name: "drop", set: func(n *Net) { n.Drop = 0.5 }, lost: true, slowest: 2 * ms},
		{name: "duplicate", set: func(n *Net) { n.Duplicate = 0.5 }, twice: true, slowest: 42 * ms},
		{name: "reorder", set: func(n *Net) { n.Reorder = 0.5 }, overtaken: true, slowest: 2 * ms},
		{name: "delay", set: func(n *Net) { n.Max = 80 * ms }, slowest: 80 * ms},
		{name: "healed", set: func(n *Net) { n.Drop, n.Duplicate, n.Reorder, n.Max = 1, 1, 1, time.Hour; n.Cut(1, 2, true); n.Heal() }, slowest: 2 * ms},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := NewNet(NewRand(7))
			tt.set(n)
			var lost, twice, overtaken bool
			var latest, slowest time.Duration
			for i := range 1000 {
				at := time.Duration(i) * 100 * time.Microsecond
				f := n.Route(at, 1, 2)
				lost = lost || len(f.Arrivals) == 0
				twice = twice || len(f.Arrivals) > 1
				if len(f.Arrivals) > 0 {
					overtaken = overtaken || f.Arrivals[0] < latest
					latest = max(latest, f.Arrivals[0])
					slowest = max(slowest, slices.Max(f.Arrivals)-at)
				}
				if len(f.Arrivals) > 0 && f.Arrivals[0] < at {
					t.Fatalf("a message arrives %v before it leaves", at-f.Arrivals[0])
				}
			}
			if lost != tt.lost || twice != tt.twice || overtaken != tt.overtaken || slowest > tt.slowest {
				t.Errorf("lost %v twice %v overtaken %v slowest %v", lost, twice, overtaken, slowest)
			}
		})
	}
	n := NewNet(NewRand(7))
	n.Cut(1, 2, true)
	if f := n.Route(0, 1, 2); len(f.Arrivals) > 0 || !f.Separate || !n.IsCut(1, 2) {
		t.Error("a message crosses a cut")
	}
	if f := n.Route(0, 2, 1); len(f.Arrivals) != 1 || n.IsCut(2, 1) {
		t.Error("a cut goes both ways")
	}
	n.Cut(1, 2, false)
	if f := n.Route(0, 1, 2); len(f.Arrivals) != 1 {
		t.Error("a cut stays")
	}
}

// TestLogCrash: a crash leaves all that was synced and any first part of the rest.
func TestLogCrash(t *testing.T) {
	seen := map[int]bool{}
	r := NewRand(1)
	for range 200 {
		var l Log
		for i := range 6 {
			l.Append('r', []byte{byte(i)})
			if i == 2 {
				l.Sync()
			}
		}
		if l.Unsynced() != 3 {
			t.Fatalf("%d are not synced", l.Unsynced())
		}
		lost := l.Crash(r)
		left := l.Records()
		if len(left) != 6-lost || lost > 3 || l.Unsynced() != 0 {
			t.Fatalf("lost %d, %d are left, %d not synced", lost, len(left), l.Unsynced())
		}
		for i, rec := range left {
			if rec.Kind != 'r' || rec.Data[0] != byte(i) {
				t.Fatalf("record %d is %v", i, rec)
			}
		}
		seen[lost] = true
	}
	if len(seen) != 4 {
		t.Errorf("crashes took %v records", seen)
	}
	var l Log
	l.Append('a', nil)
	l.Replace([]Record{{'b', nil}})
	if lost := l.Crash(r); lost != 0 || len(l.Records()) != 1 || l.Records()[0].Kind != 'b' {
		t.Errorf("what replaced the log is gone: %v", l.Records())
	}
}

func TestTrace(t *testing.T) {
	lines := []Line{{1, 1, "a", 1, 2, 3, ""}, {2, 1, "b", 1, 2, 3, "x"}, {3, 2, "a", 0, 0, 0, ""}}
	hash := func(lines []Line) uint64 {
		tr := NewTrace(2)
		for _, l := range lines {
			tr.Add(l)
		}
		return tr.Hash()
	}
	all := hash(lines)
	if all != hash(lines) {
		t.Error("a hash that differs from itself")
	}
	for i := range lines {
		for name, change := range map[string]func(*Line){
			"At": func(l *Line) { l.At++ }, "Who": func(l *Line) { l.Who++ }, "What": func(l *Line) { l.What += "!" }, "A": func(l *Line) { l.A++ },
			"B": func(l *Line) { l.B++ }, "C": func(l *Line) { l.C++ }, "Text": func(l *Line) { l.Text += "!" },
		} {
			other := slices.Clone(lines)
			if change(&other[i]); hash(other) == all {
				t.Errorf("%s of line %d is not in the hash", name, i)
			}
		}
	}
	if hash([]Line{lines[1], lines[0], lines[2]}) == all {
		t.Error("the order is not in the hash")
	}
	var text strings.Builder
	tr := NewTrace(2)
	tr.All = &text
	for i, l := range lines {
		tr.Add(l)
		if want := lines[max(0, i-1) : i+1]; !slices.Equal(tr.Last(), want) {
			t.Errorf("after line %d the last are %v", i, tr.Last())
		}
	}
	if tr.Len() != 3 || strings.Count(text.String(), "\n") != 3 {
		t.Errorf("%d lines, as text %q", tr.Len(), text.String())
	}
}

func TestCover(t *testing.T) {
	c := Cover{}
	c.Hit("a")
	c.Add(Cover{"b": 2, "c": 0})
	if got := c.Missing([]string{"d", "a", "c", "b"}); !slices.Equal(got, []string{"c", "d"}) {
		t.Errorf("missing %v", got)
	}
	if c["b"] != 2 || !slices.Equal(c.Names(), []string{"a", "b", "c"}) {
		t.Errorf("%v", c)
	}
}

func TestLedger(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.md")
	run := Run{When: time.Unix(0, 0), Commit: "abc", First: 1, Last: 9, Virtual: 90 * time.Minute, Wall: 61500 * ms}
	if err := run.Append(path); err != nil {
		t.Fatal(err)
	}
	run.Failures = []uint64{3, 4}
	if err := run.Append(path); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := ledgerHead + "| 1970-01-01 00:00 | abc | 1 to 9 | 1.5 | 1m2s | none |\n| 1970-01-01 00:00 | abc | 1 to 9 | 1.5 | 1m2s | [3 4] |\n"
	if string(got) != want {
		t.Errorf("got\n%s", got)
	}
	if err := run.Append(filepath.Join(path, "below a file")); err == nil {
		t.Error("no error")
	}
}
