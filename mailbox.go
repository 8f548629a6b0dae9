package main

import (
	"sync"
)

// mailbox holds closures for the loop. It is unbounded in principle and small
// in practice: each entry is a report about one peer or one caller that waits.
type mailbox struct {
	wake chan struct{} // capacity 1
	mu   struct {
		sync.Mutex
		box []func()
	}
}

func (b *mailbox) post(f func()) {
	b.mu.Lock()
	b.mu.box = append(b.mu.box, f)
	b.mu.Unlock()
	b.nudge()
}

// nudge makes the loop turn once.
func (b *mailbox) nudge() {
	select {
	case b.wake <- struct{}{}:
	default: // it will turn anyway
	}
}

// at posts f again and again until it says that it is done.
func (b *mailbox) at(f func() bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var again func()
	again = func() {
		if !f() {
			b.mu.Lock()
			b.mu.box = append(b.mu.box, again) // no wake: the next turn is soon enough
			b.mu.Unlock()
		}
	}
	b.mu.box = append(b.mu.box, again)
}

func (b *mailbox) take() []func() {
	b.mu.Lock()
	defer b.mu.Unlock()
	box := b.mu.box
	b.mu.box = nil
	return box
}

// broadcast wakes everybody who waits for something to change.
type broadcast struct {
	mu struct {
		sync.Mutex
		c chan struct{}
	}
}

func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.c == nil {
		b.mu.c = make(chan struct{})
	}
	return b.mu.c
}

func (b *broadcast) notify() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.c != nil {
		close(b.mu.c)
		b.mu.c = nil
	}
}
