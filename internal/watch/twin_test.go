package watch

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"pontoon/kv"
)

// naive is the hub as one would write it down: every watcher looks at every event.
type naive struct {
	messages  int // bound of a queue
	watchers  []*naiveWatcher
	published int64
}

type naiveWatcher struct {
	f         Filter
	after     int64
	queue     []string // "7:a,-b"
	cut       bool
	resume    int64
	delivered int64
}

func (n *naive) add(f Filter, after int64) {
	w := &naiveWatcher{f: f, after: after, delivered: after}
	if after < n.published {
		w.cut, w.resume = true, after
	} else if !slices.ContainsFunc(n.watchers, func(w *naiveWatcher) bool { return !w.cut }) {
		n.published = after
	}
	n.watchers = append(n.watchers, w)
}

// skip says whether nobody was there.
func (n *naive) skip(revision int64) bool {
	if slices.ContainsFunc(n.watchers, func(w *naiveWatcher) bool { return !w.cut }) {
		return false
	}
	n.published = max(n.published, revision)
	return true
}

func (n *naive) publish(revision int64, events []kv.Event) {
	if revision <= n.published {
		return
	}
	for _, w := range n.watchers {
		var keys []string
		for _, e := range events {
			key := e.Entry.Key
			wanted := slices.Contains(w.f.Keys, key)
			for _, p := range w.f.Prefixes {
				wanted = wanted || strings.HasPrefix(key, p)
			}
			for _, s := range w.f.Spans {
				wanted = wanted || s.Contains(key)
			}
			switch {
			case !wanted:
			case e.Deleted && !w.f.NoDeletes:
				keys = append(keys, "-"+key)
			case !e.Deleted && !w.f.NoPuts:
				keys = append(keys, key)
			}
		}
		if len(keys) == 0 || w.cut || revision <= w.after {
			continue
		}
		if len(w.queue) == n.messages {
			w.cut, w.resume = true, revision-1
			continue
		}
		w.queue = append(w.queue, fmt.Sprintf("%d:%s", revision, strings.Join(keys, ",")))
	}
	n.published = revision
}

// take returns what Take does, for up to count messages.
func (n *naive) take(w *naiveWatcher, count int) (got []string, st Status) {
	count = min(count, len(w.queue))
	got, w.queue = w.queue[:count:count], w.queue[count:]
	if count > 0 {
		fmt.Sscanf(got[count-1], "%d:", &w.delivered)
	}
	switch {
	case len(w.queue) > 0:
		return got, Status{Delivered: w.delivered, More: true}
	case w.cut:
		w.delivered = max(w.delivered, w.resume)
	default:
		w.delivered = max(w.delivered, n.published)
	}
	return got, Status{Delivered: w.delivered, Cut: w.cut}
}

// Few letters, so that keys, prefixes and bounds meet.
var genKey = rapid.StringMatching(`[ab]{0,4}`)

func genFilter(t *rapid.T) Filter {
	f := Filter{
		Keys:      rapid.SliceOfN(genKey, 0, 3).Draw(t, "keys"),
		Prefixes:  rapid.SliceOfN(genKey, 0, 3).Draw(t, "prefixes"),
		NoPuts:    rapid.IntRange(0, 4).Draw(t, "puts") == 0,
		NoDeletes: rapid.IntRange(0, 4).Draw(t, "deletes") == 0,
	}
	for range rapid.IntRange(0, 2).Draw(t, "spans") {
		f.Spans = append(f.Spans, kv.Span{Start: genKey.Draw(t, "start"), End: genKey.Draw(t, "end")})
	}
	return f
}

func genEvents(t *rapid.T, revision int64) []kv.Event {
	keys := rapid.SliceOfNDistinct(genKey, 1, 8, rapid.ID[string]).Draw(t, "changed")
	slices.Sort(keys)
	var events []kv.Event
	for _, key := range keys {
		e := event(revision, key)
		e.Deleted = rapid.Bool().Draw(t, "deleted")
		e.Entry.Value = make([]byte, rapid.SampledFrom([]int{0, 10, 1000}).Draw(t, "bytes"))
		events = append(events, e)
	}
	return events
}

func TestHubAgainstNaive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h, n := &Hub{}, &naive{messages: rapid.IntRange(1, 4).Draw(t, "queue")}
		h.SetQueue(n.messages, 1<<40)
		var watchers []*Watcher // as in n.watchers
		revision := int64(0)
		pick := func(t *rapid.T) int {
			if len(watchers) == 0 {
				t.Skip("no watcher yet")
			}
			return rapid.IntRange(0, len(watchers)-1).Draw(t, "watcher")
		}
		check := func(t *rapid.T, i, count int) {
			dst := make([]Message, count)
			got, st := w2text(watchers[i], dst)
			want, wantSt := n.take(n.watchers[i], count)
			if !slices.Equal(got, want) || st != wantSt {
				t.Fatalf("watcher %d %+v:\n got %q %+v\nwant %q %+v", i, n.watchers[i].f, got, st, want, wantSt)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"publish": func(t *rapid.T) {
				revision++
				events := genEvents(t, revision)
				n.publish(revision, events)
				h.Publish(revision, events)
			},
			"add": func(t *rapid.T) {
				f, ahead := genFilter(t), rapid.Int64Range(0, 2).Draw(t, "ahead")
				n.add(f, revision+ahead)
				watchers = append(watchers, add(t, h, f, revision+ahead))
			},
			"skip": func(t *rapid.T) {
				revision++
				if got, want := h.Skip(revision), n.skip(revision); got != want {
					t.Fatalf("skipped %d: %v, want %v", revision, got, want)
				}
			},
			"take": func(t *rapid.T) { check(t, pick(t), rapid.IntRange(1, 3).Draw(t, "count")) },
			"close": func(t *rapid.T) {
				i := pick(t)
				watchers[i].Close()
				n.watchers = slices.Delete(n.watchers, i, i+1)
				watchers = slices.Delete(watchers, i, i+1)
			},
			"lost": func(t *rapid.T) {
				if rapid.IntRange(0, 5).Draw(t, "seldom") > 0 {
					return
				}
				h.Lost()
				for _, w := range n.watchers {
					if !w.cut {
						w.cut, w.resume = true, max(n.published, w.after)
					}
				}
			},
		})
		for i, w := range watchers {
			check(t, i, 100)
			w.Close()
		}
		checkEmpty(t, h)
	})
}

func w2text(w *Watcher, dst []Message) ([]string, Status) {
	n, st := w.Take(dst)
	var got []string
	for _, m := range dst[:n] {
		var keys []string
		for _, e := range m.Events {
			if key := e.Entry.Key; e.Deleted {
				keys = append(keys, "-"+key)
			} else {
				keys = append(keys, key)
			}
		}
		got = append(got, fmt.Sprintf("%d:%s", m.Revision, strings.Join(keys, ",")))
	}
	return got, st
}
