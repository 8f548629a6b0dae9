package main

import (
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

// What makes cycles of the log fewer and larger: see raftNode.sort, gathers and
// mayHaveInFlight.

// An append says as much as the two that it stands for, and is only made where
// the second follows the first without a gap, to the same peer in the same term.
func TestJoinedAppends(t *testing.T) {
	app := func(to, term, index, entries, commit uint64) *raftpb.Message {
		m := &raftpb.Message{Type: raftpb.MsgApp.Enum(), To: new(to), Term: new(term), Index: new(index), LogTerm: new(uint64(1)), Commit: new(commit)}
		for i := range entries {
			m.Entries = append(m.Entries, entry(index+1+i, 1))
		}
		return m
	}
	big := app(2, 1, 8, 1, 7)
	big.Entries[0].Data = make([]byte, maxMessageBytes)
	for name, x := range map[string]struct {
		first, second *raftpb.Message
		joined        bool
	}{
		"follows":               {app(2, 1, 5, 3, 4), app(2, 1, 8, 2, 7), true},
		"only the commit moves": {app(2, 1, 5, 3, 4), app(2, 1, 8, 0, 8), true},
		"after an empty one":    {app(2, 1, 8, 0, 4), app(2, 1, 8, 2, 7), true},
		"gap":                   {app(2, 1, 5, 3, 4), app(2, 1, 9, 2, 7), false},
		"overlap":               {app(2, 1, 5, 3, 4), app(2, 1, 7, 2, 7), false},
		"another peer":          {app(2, 1, 5, 3, 4), app(3, 1, 8, 2, 7), false},
		"another term":          {app(2, 1, 5, 3, 4), app(2, 2, 8, 2, 7), false},
		"too large":             {app(2, 1, 5, 3, 4), big, false},
	} {
		first := x.first.GetEntries()
		if len(first) > 0 { // raft's own slice has room, and what is there is not ours
			first = append(first, entry(99, 1))[:len(first)]
			x.first.Entries = first
		}
		got := joinAppends([]*raftpb.Message{x.first}, x.second)
		if joined := len(got) == 1; joined != x.joined {
			t.Errorf("%s: joined is %v", name, joined)
			continue
		}
		if !x.joined {
			continue
		}
		if got[0].GetCommit() != x.second.GetCommit() {
			t.Errorf("%s: commit %d", name, got[0].GetCommit())
		}
		if last := x.second.GetIndex() + uint64(len(x.second.GetEntries())); got[0].GetIndex()+uint64(len(got[0].GetEntries())) != last {
			t.Errorf("%s: it ends at another entry than %d", name, last)
		}
		if err := validateAppend(got[0]); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if len(first) > 0 && first[:len(first)+1][len(first)].GetIndex() != 99 {
			t.Errorf("%s: raft's slice was written to", name)
		}
	}
}

func TestJoinedAnswers(t *testing.T) {
	ack := func(to, index uint64, reject bool) *raftpb.Message {
		return &raftpb.Message{Type: raftpb.MsgAppResp.Enum(), To: new(to), Term: new(uint64(1)), Index: new(index), Reject: new(reject)}
	}
	for name, x := range map[string]struct {
		first, second *raftpb.Message
		want          int
	}{
		"later":           {ack(2, 5, false), ack(2, 8, false), 1},
		"earlier":         {ack(2, 8, false), ack(2, 5, false), 2},
		"to another":      {ack(2, 5, false), ack(3, 8, false), 2},
		"a refusal":       {ack(2, 5, false), ack(2, 8, true), 2},
		"after a refusal": {ack(2, 5, true), ack(2, 8, false), 2},
	} {
		if got := joinAcks([]*raftpb.Message{x.first}, x.second); len(got) != x.want || got[len(got)-1] != x.second {
			t.Errorf("acknowledgement %s: %d messages", name, len(got))
		}
	}
	beat := func(context string) *raftpb.Message {
		return &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), To: new(uint64(2)), Term: new(uint64(1)), Context: []byte(context)}
	}
	for name, x := range map[string]struct {
		first, second *raftpb.Message
		want          int
	}{
		"of a later read":        {beat("1"), beat("2"), 1},
		"of a read after a tick": {beat(""), beat("2"), 1},
		"of a tick":              {beat(""), beat(""), 1},
		"of a tick after a read": {beat("1"), beat(""), 2},
	} {
		if got := joinHeartbeats([]*raftpb.Message{x.first}, x.second); len(got) != x.want || got[len(got)-1] != x.second {
			t.Errorf("heartbeat %s: %d messages", name, len(got))
		}
	}
}

// A leader lets proposals wait while an append is under way, its own and those of
// followers, and takes all of them once it is committed; or after two ticks, if it
// is not.
func TestLeaderGathers(t *testing.T) {
	for _, commits := range []bool{true, false} {
		b := newBenchNode(t)
		b.lead(t)
		ackAll := func() {
			m := message(raftpb.MsgAppResp, 2, b.now.term)
			m.Index = new(b.stable)
			if err := b.receive(m); err != nil {
				t.Fatal(err)
			}
			b.settle(t)
		}
		ackAll() // the leader's own first entry
		propose := func() {
			b.enqueue(&proposal{command: []byte("c"), done: make(chan struct{}, 1)})
			b.settle(t)
		}
		propose()
		first := b.stable
		propose()
		propose()
		forwarded := &raftpb.Message{Type: raftpb.MsgProp.Enum(), To: new(uint64(1)), From: new(uint64(2)), Entries: []*raftpb.Entry{{Data: testBatch("k", "v")}}}
		b.step(forwarded)
		b.settle(t)
		if b.stable != first || len(b.queue) != 2 || len(b.held) != 1 {
			t.Fatalf("%d entries more while one is under way; %d commands and %d forwarded wait", b.stable-first, len(b.queue), len(b.held))
		}
		if commits {
			ackAll()
		} else {
			b.tick()
			b.settle(t)
			if len(b.queue) != 2 || len(b.held) != 1 {
				t.Error("it waits for less than two ticks")
			}
			if err := b.raw.Propose(testBatch("tick", "of the leader")); err != nil {
				t.Fatal(err)
			}
			b.settle(t)
			first = b.stable
			b.tick()
			b.settle(t)
		}
		if b.stable < first+2 || commits && b.stable != first+2 || len(b.queue) != 0 || len(b.held) != 0 {
			t.Errorf("commits %v: %d entries more, not 2; %d commands and %d forwarded wait", commits, b.stable-first, len(b.queue), len(b.held))
		}
	}
}

// A committed append is followed by the next one once all have answered it who had the log
// before it; or after twice as long as the commit took; or when one of them is gone.
func TestLeaderAwaitsOthers(t *testing.T) {
	var now time.Time
	for what, end := range map[string]func(b *benchNode, ack func(uint64)){
		"all answer":        func(b *benchNode, ack func(uint64)) { ack(3) },
		"one is gone":       func(b *benchNode, ack func(uint64)) { b.ReportUnreachable(3) },
		"one is slow":       func(b *benchNode, ack func(uint64)) { now = b.until },
		"there is no clock": func(b *benchNode, ack func(uint64)) { b.tick(); b.tick() },
	} {
		b := newBenchNode(t)
		b.lead(t)
		now = time.Now()
		b.time = func() time.Time { return now }
		ack := func(from uint64) {
			m := message(raftpb.MsgAppResp, from, b.now.term)
			m.Index = new(b.stable)
			if err := b.receive(m); err != nil {
				t.Fatal(err)
			}
			b.settle(t)
		}
		propose := func() (took bool) {
			last := b.stable
			b.enqueue(&proposal{command: []byte("c"), done: make(chan struct{}, 1)})
			b.settle(t)
			return b.stable > last
		}
		ack(2)
		ack(3)
		ack(99) // no member
		if len(b.acked) != 2 {
			t.Fatalf("it knows what %d followers have", len(b.acked))
		}
		if !propose() {
			t.Fatal("nothing is under way, and it waits")
		}
		now = now.Add(time.Millisecond)
		if propose() || b.wakeAfter() != 0 {
			t.Fatalf("it does not wait for an append that is under way, or looks again after %v", b.wakeAfter())
		}
		last := b.stable
		if ack(2); b.stable != last || b.raw.BasicStatus().GetCommit() != last {
			t.Fatalf("entry %d follows entry %d before all have answered", b.stable, last)
		}
		if d := b.wakeAfter(); d != 2*time.Millisecond {
			t.Errorf("%s: it looks again after %v", what, d)
		}
		end(b, ack)
		if b.settle(t); b.stable <= last || len(b.queue) > 0 {
			t.Errorf("%s: the next append does not leave", what)
		}
		if what == "all answer" {
			continue
		}
		// Whoever did not answer is not waited for again.
		if propose() {
			t.Errorf("%s: it does not wait for the commit", what)
		}
		now = now.Add(time.Millisecond)
		last = b.stable
		if ack(2); b.stable <= last || len(b.queue) > 0 {
			t.Errorf("%s: it waits once more", what)
		}
	}
}

// A follower forwards one batch, and a second one only after an append.
func TestFollowerForwards(t *testing.T) {
	b := newBenchNode(t)
	app := message(raftpb.MsgApp, 2, 2)
	app.Index, app.LogTerm, app.Commit = new(uint64(1)), new(uint64(1)), new(uint64(1))
	receive := func() {
		if err := b.receive(app); err != nil {
			t.Fatal(err)
		}
		b.settle(t)
	}
	receive()
	forwards := func() (n int) {
		for _, m := range b.sent {
			if m.GetType() == raftpb.MsgProp {
				n++
			}
		}
		return n
	}
	propose := func(want int) {
		t.Helper()
		b.enqueue(&proposal{command: []byte("c"), done: make(chan struct{}, 1)})
		b.settle(t)
		if n := forwards(); n != want {
			t.Errorf("%d batches forwarded, not %d", n, want)
		}
	}
	propose(1)
	propose(1)
	app.Entries = []*raftpb.Entry{entry(2, 2)}
	receive()
	if n := forwards(); n != 2 {
		t.Errorf("%d batches forwarded after an append, not 2", n)
	}
	propose(2)
	b.inflight.take(1) // applied: one is under way, and no append has come since it left
	propose(2)
	b.inflight.take(2)
	b.settle(t)
	if n := forwards(); n != 3 {
		t.Errorf("%d batches forwarded with none under way, not 3", n)
	}
}
