package watch

import (
	"fmt"
	"testing"

	"pontoon/kv"
)

// One revision for one, all, or one of 10,000 watchers. The readers' side is
// part of it where there is any, or the queues would fill.
func BenchmarkPublish(b *testing.B) {
	const watchers = 10_000
	for _, row := range []struct {
		name   string
		filter func(i int) Filter
		key    string
		wanted int // how many get it
	}{
		{"keys", func(i int) Filter { return Filter{Keys: []string{fmt.Sprintf("job/%05d", i)}} }, "job/00042", 1},
		{"keys-nobody", func(i int) Filter { return Filter{Keys: []string{fmt.Sprintf("job/%05d", i)}} }, "job/none", 0},
		{"prefixes", func(i int) Filter { return Filter{Prefixes: []string{fmt.Sprintf("job/%05d/", i)}} }, "job/00042/x", 1},
		{"one-prefix", func(int) Filter { return Filter{Prefixes: []string{"job/"}} }, "job/00042", watchers},
		{"spans", func(i int) Filter {
			return Filter{Spans: []kv.Span{{Start: fmt.Sprintf("job/%05d", i), End: fmt.Sprintf("job/%05d", i+1)}}}
		}, "job/00042", 1},
	} {
		b.Run(row.name, func(b *testing.B) {
			h := &Hub{}
			var awake []*Watcher
			for i := range watchers {
				w, err := h.Add(row.filter(i), 0)
				if err != nil {
					b.Fatal(err)
				}
				if row.wanted == watchers || i == 42 {
					awake = append(awake, w)
				}
			}
			events := []kv.Event{{Entry: kv.Entry{Key: row.key, Value: make([]byte, 100)}}}
			var batch [4]Message
			revision := int64(0)
			b.ReportAllocs()
			for b.Loop() {
				revision++
				h.Publish(revision, events)
				if revision%1000 == 0 {
					b.StopTimer()
					for _, w := range awake {
						for st := (Status{More: true}); st.More; {
							_, st = w.Take(batch[:])
						}
					}
					b.StartTimer()
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(max(row.wanted, 1)), "ns/message")
		})
	}
}

// A revision of many events under a prefix that many watch: their sum, not
// their product.
func BenchmarkPublishLarge(b *testing.B) {
	h := &Hub{}
	var watchers []*Watcher
	for range 10_000 {
		w, err := h.Add(Filter{Prefixes: []string{"job/"}}, 0)
		if err != nil {
			b.Fatal(err)
		}
		watchers = append(watchers, w)
	}
	var events []kv.Event
	for i := range 10_000 {
		events = append(events, kv.Event{Entry: kv.Entry{Key: fmt.Sprintf("job/%05d", i)}})
	}
	var batch [4]Message
	revision := int64(0)
	for b.Loop() {
		revision++
		h.Publish(revision, events)
		b.StopTimer()
		for _, w := range watchers {
			w.Take(batch[:])
		}
		b.StartTimer()
	}
}

func BenchmarkAddClose(b *testing.B) {
	h := &Hub{}
	for range 10_000 {
		if _, err := h.Add(Filter{Prefixes: []string{"job/"}}, 0); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		w, err := h.Add(Filter{Prefixes: []string{"job/"}}, 0)
		if err != nil {
			b.Fatal(err)
		}
		w.Close()
	}
}
