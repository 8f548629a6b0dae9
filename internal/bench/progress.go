package bench

import (
	"context"
	"fmt"
	"io"
	"time"
)

// progressLine is the last line of a terminal, written over once a second.
type progressLine struct {
	out io.Writer // nil: nobody looks
	r   *run

	mostBacklog   int64 // of the schedule, inside the window
	before        *snapshot
	beforeOps     int64
	beforeAt      time.Duration
	beforeSeconds int64 // of the window
}

func (p *progressLine) show(text string) {
	if p.out != nil {
		fmt.Fprintf(p.out, "\r\x1b[K  %s", text)
	}
}

func (p *progressLine) clear() {
	if p.out != nil {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}

// follow returns at the given time of the run, or with the error of ctx once
// that ends.
func (p *progressLine) follow(ctx context.Context, until time.Duration) error {
	end := time.NewTimer(until - p.r.now())
	defer end.Stop()
	tick := time.NewTicker(sampleTime)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-end.C:
			return nil
		case <-tick.C:
			p.sample(p.r.now())
		}
	}
}

func (p *progressLine) sample(now time.Duration) {
	if now > p.r.rec.start {
		p.mostBacklog = max(p.mostBacklog, p.r.schedule.backlog(now))
	}
	if p.out != nil && now < p.r.rec.start {
		p.show("warming up")
		return
	}
	second := int64((now - p.r.rec.start) / time.Second)
	if p.out == nil || second == p.beforeSeconds {
		return
	}
	p.beforeSeconds = second
	s := new(snapshot)
	ops := int64(0)
	for k := range p.r.rec.kinds {
		if p.r.rec.shown[k] {
			s.add(&p.r.rec.kinds[k].latency)
			ops += p.r.rec.kinds[k].ops.Load()
		}
	}
	last := *s
	if p.before != nil {
		last.sub(p.before)
	}
	since := max(p.beforeAt, p.r.rec.start)
	rate := float64(ops-p.beforeOps) / max(now-since, time.Millisecond).Seconds()
	p.show(fmt.Sprintf("%4d s  %9s/s   p50 %8s   p99 %8s   errors %s", second,
		thousands(int64(rate)), latencyText(last.quantile(0.5)), latencyText(last.quantile(0.99)), thousands(p.r.rec.failures())))
	p.before, p.beforeOps, p.beforeAt = s, ops, now
}
