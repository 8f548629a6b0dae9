package bench

import (
	"fmt"
	"io"
	"math"
	"strings"
	"time"
)

const (
	plotWidth  = 60 // columns
	plotHeight = 4  // rows of eighths
)

var eighths = []rune(" ▁▂▃▄▅▆▇█")

// plotThroughput draws the answers per second over the time of the window, from 0.
func plotThroughput(w io.Writer, t Throughput, seconds float64) {
	if len(t.Ops) < 2 || seconds <= 0 {
		return
	}
	each := (len(t.Ops) + plotWidth - 1) / plotWidth // intervals of one column
	var rates []float64
	most := 0.0
	for i := 0; i < len(t.Ops); i += each {
		sum := int64(0)
		last := min(i+each, len(t.Ops))
		for _, n := range t.Ops[i:last] {
			sum += n
		}
		from, to := float64(i)*t.IntervalSeconds, min(float64(last)*t.IntervalSeconds, seconds)
		if to-from < t.IntervalSeconds/4 && len(rates) > 0 {
			continue // too short a rest to be a rate
		}
		rates = append(rates, float64(sum)/(to-from))
		most = max(most, rates[len(rates)-1])
	}
	if most == 0 {
		return
	}
	fmt.Fprintf(w, "\nthroughput, each column %.3g s\n", float64(each)*t.IntervalSeconds)
	for row := plotHeight - 1; row >= 0; row-- {
		label := ""
		if row == plotHeight-1 {
			label = thousands(int64(math.Round(most))) + "/s"
		}
		var line strings.Builder
		for _, r := range rates {
			full := int(math.Round(r / most * plotHeight * 8))
			line.WriteRune(eighths[min(max(full-8*row, 0), 8)])
		}
		fmt.Fprintf(w, "%12s │%s\n", label, strings.TrimRight(line.String(), " "))
	}
	fmt.Fprintf(w, "%12s └%s\n", "0", strings.Repeat("─", len(rates)))
}

// plotLatency draws the latency at each percentile as a bar whose length is its
// logarithm: one more digit is as long everywhere. A percentile that fewer
// requests than one lie above is left out: it would be the maximum.
func plotLatency(w io.Writer, name string, h *histogram) {
	n := h.count.Load()
	if n == 0 {
		return
	}
	low := math.Pow(10, math.Floor(math.Log10(max(float64(h.minimum()), 1))))
	width := math.Log(max(float64(h.maximum()), 10*low) / low)
	bar := func(label string, d time.Duration) {
		length := int(math.Round(math.Log(max(float64(d), low)/low) / width * plotWidth * 8))
		text := strings.Repeat("█", length/8)
		if length%8 > 0 {
			text += string("▏▎▍▌▋▊▉"[3*(length%8-1) : 3*(length%8)])
		}
		fmt.Fprintf(w, "%7s %9s │%s\n", label, latencyText(d), text)
	}
	fmt.Fprintf(w, "\n%s latency by percentile, log scale from %s\n", name, latencyText(time.Duration(low)))
	bar("min", h.minimum())
	for _, q := range []struct {
		label string
		above float64 // the share of requests beyond
	}{{"p25", 0.75}, {"p50", 0.5}, {"p75", 0.25}, {"p90", 0.1}, {"p95", 0.05}, {"p99", 0.01}, {"p99.9", 1e-3}, {"p99.99", 1e-4}, {"p99.999", 1e-5}} {
		if float64(n)*q.above >= 1 {
			bar(q.label, h.quantile(1-q.above))
		}
	}
	bar("max", h.maximum())
}
