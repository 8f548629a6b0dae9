package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pontoon/api"
	"pontoon/internal/watch"
	"pontoon/kv"
)

// twinBackend is a node without raft: a real state behind a lock, which has
// applied every command when propose returns. What it does not have, members
// and health, is the fake's.
type twinBackend struct {
	fakeBackend
	hub watch.Hub

	mu struct {
		sync.Mutex
		state   *kv.State
		index   uint64
		wall    int64         // Unix ms of the ticks; a label
		changed chan struct{} // closed and replaced by each change
	}
}

func newTwin(t testing.TB) *twinBackend {
	t.Helper()
	b := &twinBackend{}
	b.mu.state = kv.NewState()
	b.mu.wall = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).UnixMilli()
	b.mu.changed = make(chan struct{})
	t.Cleanup(b.hub.Close)
	return b
}

// newTwinAPI is a handler over a twin.
func newTwinAPI(t testing.TB, l limits) (*testAPI, *twinBackend) {
	t.Helper()
	b := newTwin(t)
	return newTestAPIOver(b, &b.fakeBackend, l), b
}

// do applies commands as one batch, without HTTP.
func (b *twinBackend) do(commands ...kv.Command) []kv.Result {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.index++
	before := b.mu.state.Revision()
	results := b.mu.state.Apply(b.mu.index, &kv.Batch{Commands: commands}, nil)
	b.publishLocked(before)
	return results
}

// publishLocked hands the watches what came after a revision.
func (b *twinBackend) publishLocked(before int64) {
	var events []kv.Event
	flush := func() {
		if len(events) > 0 {
			b.hub.Publish(events[0].Revision, events)
		}
		events = nil // the hub may keep what it was given
	}
	b.mu.state.History().Events(before+1, func(e kv.Event) bool {
		if len(events) > 0 && events[0].Revision != e.Revision {
			flush()
		}
		events = append(events, e)
		return true
	})
	flush()
	close(b.mu.changed)
	b.mu.changed = make(chan struct{})
}

// tick moves the clock of the leases. The first tick after a grant starts the
// lease, so that a test which wants one to expire ticks twice.
func (b *twinBackend) tick(d time.Duration) {
	b.mu.Lock()
	clock, seen := b.mu.state.Clock()+d.Milliseconds(), b.mu.index
	b.mu.wall += d.Milliseconds()
	wall := b.mu.wall
	b.mu.Unlock()
	b.do(kv.Command{Op: kv.OpTick, Tick: kv.Tick{Clock: max(clock, 1), Wall: wall, Seen: seen}})
}

func (b *twinBackend) revision() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.state.Revision()
}

func (b *twinBackend) propose(ctx context.Context, c *kv.Command) (kv.Result, error) {
	b.note("%s", commandText(c))
	if b.err != nil {
		return kv.Result{}, b.err
	}
	if err := ctx.Err(); err != nil {
		return kv.Result{}, errNotProposed
	}
	// Through the log's encoding, as in a node: what it would refuse shows here.
	var batch kv.Batch
	encoded := kv.AppendBatch(nil, 0, 0, 0, kv.AppendCommand(nil, c))
	if err := kv.DecodeBatch(encoded, &batch); err != nil {
		return kv.Result{}, fmt.Errorf("the log refuses %s: %w", commandText(c), err)
	}
	return b.do(batch.Commands...)[0], nil
}

func (b *twinBackend) sync(ctx context.Context, o readOptions) error {
	if b.err != nil {
		return b.err
	}
	for {
		b.mu.Lock()
		revision, compacted, changed := b.mu.state.Revision(), b.mu.state.History().Compacted(), b.mu.changed
		b.mu.Unlock()
		switch {
		case o.revision > revision && o.minRevision <= revision:
			return errFutureRevision
		case o.revision != 0 && o.revision < compacted:
			return &compactedError{compacted}
		case o.minRevision <= revision:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errReadTimeout
		}
	}
}

func (b *twinBackend) get(ctx context.Context, key string, o readOptions) (e kv.Entry, revision int64, err error) {
	b.note("get %q%v", key, o)
	err = b.read(ctx, o, false, func(v *kv.View) error {
		var ok bool
		e, ok = v.Get(key)
		revision = v.Revision()
		if !ok {
			return errKeyNotFound
		}
		return nil
	})
	return e, revision, err
}

func (b *twinBackend) read(ctx context.Context, o readOptions, whole bool, f func(*kv.View) error) error {
	if err := b.sync(ctx, o); err != nil {
		return err
	}
	b.mu.Lock()
	state := b.mu.state
	if whole {
		state = state.Clone()
		b.mu.Unlock()
	} else {
		defer b.mu.Unlock()
	}
	v, err := state.View(o.revision)
	switch {
	case errors.Is(err, kv.ErrCompacted):
		return &compactedError{state.History().Compacted()}
	case errors.Is(err, kv.ErrFuture):
		return errFutureRevision
	case err != nil:
		return err
	}
	return f(v)
}

func (b *twinBackend) history(ctx context.Context, o readOptions) (kv.History, error) {
	if err := b.sync(ctx, o); err != nil {
		return kv.History{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.state.History(), nil
}

func (b *twinBackend) lease(ctx context.Context, id int64, o readOptions) (info leaseInfo, err error) {
	b.note("lease %d%v", id, o)
	if err := b.sync(ctx, o); err != nil {
		return leaseInfo{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var ok bool
	if info.Lease, ok = b.mu.state.Lease(id); !ok {
		return leaseInfo{}, errLeaseNotFound
	}
	info.remaining = info.TTL
	if info.Deadline != 0 {
		info.remaining = time.Duration(max(info.Deadline-b.mu.state.Clock(), 0)) * time.Millisecond
	}
	v, err := b.mu.state.View(0)
	if err != nil {
		return leaseInfo{}, err
	}
	info.keys = slices.Clone(v.LeaseKeys(id, maxLeaseKeys))
	return info, nil
}

func (b *twinBackend) subscribe(f watch.Filter, initial bool) (*watch.Watcher, kv.History, *kv.View, error) {
	if b.err != nil {
		return nil, kv.History{}, nil, b.err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.mu.state.History()
	w, err := b.hub.Add(f, h.Revision())
	if err != nil {
		return nil, kv.History{}, nil, err
	}
	if !initial {
		return w, h, nil, nil
	}
	v, err := b.mu.state.Clone().View(0)
	return w, h, v, err
}

// httpStep is one request of a story over one twin, and its answer.
type httpStep struct {
	call    string // "METHOD target"
	headers string // "Name: value", one a line
	body    string
	status  int
	want    []string // "Name: value" of the answer; "Name:" is absence
	text    string   // the whole body, its last newline aside; with a leading ~ a part of it; empty: any
	code    api.Code // of the problem; asked for with an Accept that allows JSON
}

// runStory sends the steps one after the other and compares every answer.
func runStory(t *testing.T, addr string, steps []httpStep) {
	t.Helper()
	for i, s := range steps {
		method, target, _ := strings.Cut(s.call, " ")
		headers := ""
		for line := range strings.Lines(s.headers) {
			headers += strings.TrimSpace(line) + "\r\n"
		}
		if s.code != "" && !strings.Contains(headers, "Accept:") {
			headers += "Accept: application/json\r\n"
		}
		a := exchange(t, addr, method, target, headers, s.body)
		at := fmt.Sprintf("step %d, %s %s", i, short([]byte(s.call)), strings.TrimSpace(s.headers))
		if a.status != s.status {
			t.Errorf("%s: status %d, want %d; body %.300s", at, a.status, s.status, a.body)
		}
		for _, line := range s.want {
			name, value, _ := strings.Cut(line, ":")
			if got := a.header.Get(name); got != strings.TrimSpace(value) {
				t.Errorf("%s: header %s: %q, want %q", at, name, got, value)
			}
		}
		part, isPart := strings.CutPrefix(s.text, "~")
		if isPart && !strings.Contains(a.body, part) || !isPart && s.text != "" && strings.TrimSuffix(a.body, "\n") != s.text {
			t.Errorf("%s: body %.500q, want %q", at, a.body, s.text)
		}
		if s.code == "" || method == "HEAD" {
			continue
		}
		if p := problemOf(t, a); p.Code != s.code || p.Outcome != api.OutcomeNotApplied {
			t.Errorf("%s: code %s, outcome %s, want %s, not_applied", at, p.Code, p.Outcome, s.code)
		}
	}
}
