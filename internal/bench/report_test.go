package bench

import (
	"strings"
	"testing"
	"time"
)

func TestTexts(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0 ns", 999: "999 ns", 1000: "1.00 µs", 61_340: "61.3 µs", 812_000: "812 µs", 6_130_000: "6.13 ms", 61_300_000: "61.3 ms",
		time.Second: "1.00 s", 73 * time.Minute: "4380 s",
	} {
		if got := latencyText(d); got != want {
			t.Errorf("%d ns is %q, want %q", d, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -1000: "-1,000", -100: "-100"} {
		if got := thousands(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
	for n, want := range map[float64]string{0: "0.0 B", 999: "999.0 B", 2.5e6: "2.5 MB", 1.5e12: "1500.0 GB"} {
		if got := bytesText(n); got != want {
			t.Errorf("%v bytes is %q, want %q", n, got, want)
		}
	}
}

func TestPlotThroughput(t *testing.T) {
	var b strings.Builder
	plotThroughput(&b, Throughput{0.1, []int64{100, 50, 0, 25, 13}}, 0.45)
	want := `
throughput, each column 0.1 s
     1,000/s │█
             │█
             │██
             │██ ██
           0 └─────
`
	if b.String() != want {
		t.Errorf("%s\nwant%s", b.String(), want)
	}
	for _, few := range [][]int64{nil, {5}, {0, 0, 0}} {
		b.Reset()
		if plotThroughput(&b, Throughput{0.1, few}, 0.3); b.Len() > 0 {
			t.Errorf("%v is drawn:\n%s", few, b.String())
		}
	}
	for _, n := range []int{59, 60, 61, 119, 121, maxIntervals} {
		b.Reset()
		ops := make([]int64, n)
		for i := range ops {
			ops[i] = int64(i + 1)
		}
		plotThroughput(&b, Throughput{1, ops}, float64(n))
		for line := range strings.Lines(b.String()) {
			if _, bars, _ := strings.Cut(line, "│"); len([]rune(strings.TrimSpace(bars))) > plotWidth {
				t.Errorf("%d intervals are drawn too wide: %s", n, line)
			}
		}
	}
}

// However long a run was to be, one that ends early shows its seconds, and a
// long one no more than there is room for.
func TestThroughputIntervals(t *testing.T) {
	o := defaults()
	o.Warmup, o.Duration = 0, time.Hour
	for elapsed, want := range map[time.Duration]int{0: 0, time.Second: 10, 90 * time.Second: 450, time.Hour: 600} {
		r := newRecorder(&o)
		for at := time.Duration(0); at < elapsed; at += 50 * time.Millisecond {
			r.success(kindPut, at, at, 1)
		}
		got := r.throughput(elapsed)
		sum := int64(0)
		for _, n := range got.Ops {
			sum += n
		}
		if len(got.Ops) != want || sum != int64(elapsed/(50*time.Millisecond)) || elapsed > 0 && got.IntervalSeconds*float64(want) < elapsed.Seconds() {
			t.Errorf("%v: %d intervals of %v s with %d answers, want %d intervals", elapsed, len(got.Ops), got.IntervalSeconds, sum, want)
		}
	}
}

func TestPlotLatency(t *testing.T) {
	var h histogram
	for i := range 1000 {
		h.record(time.Duration(i+1) * 100 * time.Microsecond)
	}
	var b strings.Builder
	plotLatency(&b, "put", &h)
	want := `
put latency by percentile, log scale from 100 µs
    min    100 µs │
    p25   25.0 ms │████████████████████████████████████████████████
    p50   50.0 ms │██████████████████████████████████████████████████████
    p75   75.0 ms │█████████████████████████████████████████████████████████▌
    p90   90.0 ms │███████████████████████████████████████████████████████████▏
    p95   95.0 ms │███████████████████████████████████████████████████████████▌
    p99   99.0 ms │███████████████████████████████████████████████████████████▉
  p99.9   99.9 ms │████████████████████████████████████████████████████████████
    max    100 ms │████████████████████████████████████████████████████████████
`
	if b.String() != want {
		t.Errorf("%s\nwant%s", b.String(), want)
	}
	for _, d := range []time.Duration{0, 1, longest} {
		var one histogram
		one.record(d)
		b.Reset()
		plotLatency(&b, "get", &one)
		for line := range strings.Lines(b.String()) {
			if _, bar, _ := strings.Cut(line, "│"); len([]rune(strings.TrimSpace(bar))) > plotWidth {
				t.Errorf("%v is drawn too wide: %s", d, line)
			}
		}
	}
	b.Reset()
	if plotLatency(&b, "get", new(histogram)); b.Len() > 0 {
		t.Errorf("nothing is drawn:\n%s", b.String())
	}
}
