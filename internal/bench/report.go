package bench

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Result is what a run found; docs/bench.md explains each field of its JSON.
type Result struct {
	Options         Options            `json:"options"`
	Servers         []Server           `json:"servers"`
	Loop            string             `json:"loop"`             // closed or open
	MeasuredSeconds float64            `json:"measured_seconds"` // of the window
	Interrupted     bool               `json:"interrupted"`
	Ops             int64              `json:"ops"` // answers inside the window; events with op watch
	OpsPerSecond    float64            `json:"ops_per_second"`
	BytesPerSecond  float64            `json:"bytes_per_second"` // of values
	ErrorCount      int64              `json:"error_count"`
	Errors          map[string]int64   `json:"errors"`  // by name
	Latency         map[string]Latency `json:"latency"` // by put, get, event
	Open            *OpenLoop          `json:"open_loop,omitempty"`
	Watch           *Delivery          `json:"watch,omitempty"`
	ClientCPU       float64            `json:"client_cpu_us_per_op"` // 0: not known
	ClientCores     float64            `json:"client_cpu_cores"`
	Throughput      Throughput         `json:"throughput"`

	lastError string
	rec       *recorder
}

// Latency is of the requests that began inside the window and succeeded, in
// microseconds.
type Latency struct {
	Count int64   `json:"count"`
	Min   float64 `json:"min_us"`
	Mean  float64 `json:"mean_us"`
	P50   float64 `json:"p50_us"`
	P90   float64 `json:"p90_us"`
	P99   float64 `json:"p99_us"`
	P999  float64 `json:"p999_us"`
	Max   float64 `json:"max_us"`
}

// OpenLoop tells whether the answers kept up with the schedule.
type OpenLoop struct {
	Target      float64 `json:"target_per_second"`
	Achieved    float64 `json:"achieved_per_second"` // answers that were no errors
	Scheduled   int64   `json:"scheduled"`           // requests due inside the window
	Unsent      int64   `json:"unsent"`              // of them, at its end; they have no latency
	MostBacklog int64   `json:"most_backlog"`        // due and not sent, at the worst sampled moment
	Followed    bool    `json:"followed"`
}

// Delivery is of the writes that began inside the window and succeeded.
type Delivery struct {
	WritesPerSecond float64 `json:"writes_per_second"`
	Expected        int64   `json:"expected"` // events, of all watchers
	Delivered       int64   `json:"delivered"`
	Missing         int64   `json:"missing"`
}

// Throughput is the answers of each interval of the window.
type Throughput struct {
	IntervalSeconds float64 `json:"interval_seconds"`
	Ops             []int64 `json:"ops"`
}

// finish takes the result out of a run that is over. The window lasted elapsed;
// cpu is what this process used in it.
func (res *Result) finish(r *run, elapsed, cpu time.Duration, mostBacklog int64) {
	rec := r.rec
	res.rec = rec
	res.Loop = "closed"
	elapsed = max(elapsed, 0)
	res.MeasuredSeconds = elapsed.Seconds()
	seconds := max(elapsed, time.Nanosecond).Seconds()
	res.Latency = map[string]Latency{}
	bytes := int64(0)
	for k := range rec.kinds {
		t := &rec.kinds[k]
		if rec.shown[k] {
			res.Ops += t.ops.Load()
			bytes += t.bytes.Load()
		}
		if t.latency.count.Load() > 0 {
			res.Latency[kindNames[k]] = latencyOf(&t.latency)
		}
	}
	res.OpsPerSecond = float64(res.Ops) / seconds
	res.BytesPerSecond = float64(bytes) / seconds
	res.ClientCores = cpu.Seconds() / seconds
	if res.Ops > 0 {
		res.ClientCPU = micros(cpu) / float64(res.Ops)
	}
	answers := rec.kinds[kindPut].ops.Load() + rec.kinds[kindGet].ops.Load()
	if o := r.o; o.Rate > 0 {
		res.Loop = "open"
		scheduled := r.schedule.due(rec.until()) - r.schedule.due(rec.start)
		res.Open = &OpenLoop{Target: o.Rate, Achieved: float64(answers) / seconds, Scheduled: scheduled,
			Unsent: max(scheduled-rec.begun.Load(), 0), MostBacklog: mostBacklog}
		res.Open.Followed = scheduled-answers <= max(scheduled/100, int64(o.Clients))
	}
	if r.o.Op == opWatch {
		expected, delivered := r.expected.Load(), r.delivered.Load()
		res.Watch = &Delivery{WritesPerSecond: float64(answers) / seconds, Expected: expected, Delivered: delivered, Missing: max(expected-delivered, 0)}
	}
	rec.mu.Lock()
	defer rec.mu.Unlock()
	res.Errors, res.lastError = maps.Clone(rec.mu.errors), rec.mu.last
	for _, n := range res.Errors {
		res.ErrorCount += n
	}
	res.Throughput = rec.throughput(elapsed)
}

// throughput is the answers over the time that the window lasted.
func (r *recorder) throughput(elapsed time.Duration) Throughput {
	collected := r.series[:min(int((elapsed+r.interval-1)/r.interval), len(r.series))]
	each := max((len(collected)+maxIntervals-1)/maxIntervals, 1)
	t := Throughput{IntervalSeconds: (time.Duration(each) * r.interval).Seconds(), Ops: make([]int64, (len(collected)+each-1)/each)}
	for i := range collected {
		t.Ops[i/each] += collected[i].Load()
	}
	return t
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

func latencyOf(h *histogram) Latency {
	return Latency{
		Count: int64(h.count.Load()), Min: micros(h.minimum()), Mean: micros(h.mean()),
		P50: micros(h.quantile(0.5)), P90: micros(h.quantile(0.9)), P99: micros(h.quantile(0.99)), P999: micros(h.quantile(0.999)),
		Max: micros(h.maximum()),
	}
}

func (res *Result) writeJSON(w io.Writer) error { return json.NewEncoder(w).Encode(res) }

// describe says what is about to be measured.
func describe(w io.Writer, o *Options, servers []Server) error {
	b := bufio.NewWriter(w)
	what := o.Op
	switch o.Op {
	case opMixed:
		what = fmt.Sprintf("mixed (%g %% reads, %s)", 100*o.Reads, o.Consistency)
	case opGet:
		what = o.Consistency + " get"
	case opWatch:
		what = fmt.Sprintf("watch: %s watchers of a %s,", thousands(int64(o.Watchers)), o.Scope)
	}
	loop := "closed loop"
	if o.Rate > 0 {
		loop = "open loop, " + thousands(int64(o.Rate)) + " requests/s"
	}
	fmt.Fprintf(b, "%s with %s clients, %s\n", what, thousands(int64(o.Clients)), loop)
	fmt.Fprintf(b, "%s keys of %d bytes, %s; values of %d bytes; %v after %v of warm-up; seed %d\n",
		thousands(int64(o.Keys)), o.KeySize, o.Distribution, o.ValueSize, o.Duration, o.Warmup, o.Seed)
	for _, s := range servers {
		switch {
		case s.Error != "":
			fmt.Fprintf(b, "  %-21s  unreachable: %s; its clients move to the others\n", s.Endpoint, s.Error)
		case s.Leader == 0:
			fmt.Fprintf(b, "  %-21s  member %d, %s, knows no leader; pontoon %s\n", s.Endpoint, s.ID, s.Role, s.Version)
		default:
			fmt.Fprintf(b, "  %-21s  member %d, %s; pontoon %s\n", s.Endpoint, s.ID, s.Role, s.Version)
		}
	}
	return b.Flush()
}

// writeTable is the result for people.
func (res *Result) writeTable(w io.Writer) error {
	b := bufio.NewWriter(w)
	unit := res.Options.Op
	switch unit {
	case opMixed:
		unit = "request"
	case opWatch:
		unit = "event"
	}
	fmt.Fprintf(b, "\n%s %ss/s   %s/s of values   %s in %.1f s   %s errors\n", thousands(int64(math.Round(res.OpsPerSecond))), unit,
		bytesText(res.BytesPerSecond), thousands(res.Ops), res.MeasuredSeconds, thousands(res.ErrorCount))
	if res.Interrupted {
		fmt.Fprintf(b, "interrupted: the result so far\n")
	}
	for _, name := range slices.SortedFunc(maps.Keys(res.Errors), func(x, y string) int {
		if d := res.Errors[y] - res.Errors[x]; d != 0 {
			return int(max(min(d, 1), -1))
		}
		return strings.Compare(x, y)
	}) {
		fmt.Fprintf(b, "  %10s × %s\n", thousands(res.Errors[name]), name)
	}
	if res.lastError != "" {
		fmt.Fprintf(b, "  the last one: %s\n", res.lastError)
	}
	if o := res.Open; o != nil {
		fmt.Fprintf(b, "schedule: %s/s wanted, %s/s answered", thousands(int64(o.Target)), thousands(int64(math.Round(o.Achieved))))
		if o.Followed {
			fmt.Fprintf(b, "; at most %s requests waited to be sent\n", thousands(o.MostBacklog))
		} else {
			fmt.Fprintf(b, ".\nTHE SERVERS DID NOT FOLLOW: %s of %s requests were not sent when the time was up, and their waits are in no figure.\n"+
				"Lower --rate; or raise --clients, if %d requests under way are too few for it.\n", thousands(o.Unsent), thousands(o.Scheduled), res.Options.Clients)
		}
	}
	if d := res.Watch; d != nil {
		fmt.Fprintf(b, "watch: %s writes/s, %s of %s events delivered", thousands(int64(math.Round(d.WritesPerSecond))), thousands(d.Delivered), thousands(d.Expected))
		if d.Missing > 0 {
			fmt.Fprintf(b, ", %s MISSING %v after the last write", thousands(d.Missing), settleTime)
		}
		fmt.Fprintln(b)
	}
	if res.ClientCPU > 0 {
		fmt.Fprintf(b, "this client used %.1f µs of processor time for each, %.2f cores\n", res.ClientCPU, res.ClientCores)
	}
	if len(res.Latency) > 0 {
		fmt.Fprintf(b, "\n%-8s", "latency")
		for _, column := range []string{"min", "mean", "p50", "p90", "p99", "p99.9", "max"} {
			fmt.Fprintf(b, " %9s", column)
		}
		fmt.Fprintln(b)
		for _, name := range kindNames {
			l, ok := res.Latency[name]
			if !ok {
				continue
			}
			fmt.Fprintf(b, "%-8s", name)
			for _, us := range []float64{l.Min, l.Mean, l.P50, l.P90, l.P99, l.P999, l.Max} {
				fmt.Fprintf(b, " %9s", latencyText(time.Duration(us*float64(time.Microsecond))))
			}
			fmt.Fprintln(b)
		}
	}
	plotThroughput(b, res.Throughput, res.MeasuredSeconds)
	for k := range res.rec.kinds {
		if res.rec.shown[k] {
			plotLatency(b, kindNames[k], &res.rec.kinds[k].latency)
		}
	}
	return b.Flush()
}

// latencyText has three digits, and the unit that fits.
func latencyText(d time.Duration) string {
	value, unit := float64(d), "ns"
	switch {
	case d >= time.Second:
		value, unit = d.Seconds(), "s"
	case d >= time.Millisecond:
		value, unit = value/1e6, "ms"
	case d >= time.Microsecond:
		value, unit = value/1e3, "µs"
	}
	digits := 0
	if unit != "ns" {
		digits = max(2-int(math.Log10(value)), 0)
	}
	return strconv.FormatFloat(value, 'f', digits, 64) + " " + unit
}

// bytesText counts in powers of ten, as disks and networks do.
func bytesText(n float64) string {
	for _, unit := range []string{"B", "kB", "MB"} {
		if n < 1000 {
			return strconv.FormatFloat(n, 'f', 1, 64) + " " + unit
		}
		n /= 1000
	}
	return strconv.FormatFloat(n, 'f', 1, 64) + " GB"
}

// thousands groups the digits: 12,345.
func thousands(n int64) string {
	s := strconv.FormatInt(n, 10)
	first := 0
	if n < 0 {
		first = 1
	}
	for i := len(s) - 3; i > first; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
