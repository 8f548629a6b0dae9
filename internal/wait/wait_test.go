package wait

import (
	"slices"
	"sync"
	"testing"
)

func TestCallRunsOnceInOrder(t *testing.T) {
	var x Index
	var got []uint64
	for _, target := range []uint64{5, 3, 9, 3} {
		x.Call(target, func() { got = append(got, target) })
	}
	x.Advance(2)
	if len(got) != 0 {
		t.Fatalf("ran %v before the number was there", got)
	}
	x.Advance(5)
	if !slices.Equal(got, []uint64{3, 3, 5}) {
		t.Fatalf("at 5 ran %v", got)
	}
	x.Advance(4) // never back
	if x.At() != 5 {
		t.Fatalf("at %d, want 5", x.At())
	}
	x.Call(5, func() { got = append(got, 50) })
	if got[len(got)-1] != 50 {
		t.Fatal("a target already reached must run at once")
	}
	x.Advance(100)
	x.Advance(101)
	if !slices.Equal(got, []uint64{3, 3, 5, 50, 9}) {
		t.Fatalf("ran %v", got)
	}
}

func TestWaitConcurrently(t *testing.T) {
	var x Index
	var wg sync.WaitGroup
	for i := range uint64(200) {
		wg.Go(func() { <-x.Wait(i) })
	}
	for i := range uint64(200) {
		wg.Go(func() { x.Advance(i) })
	}
	wg.Wait()
	if x.At() != 199 {
		t.Fatalf("at %d", x.At())
	}
}

// A caller that has left leaves nothing behind.
func TestCancel(t *testing.T) {
	var x Index
	var got []uint64
	var cancels []func()
	for _, target := range []uint64{5, 3, 9, 7, 3} {
		cancels = append(cancels, x.Call(target, func() { got = append(got, target) }))
	}
	cancels[1]()
	cancels[2]()
	cancels[2]() // twice is once
	if x.Waiting() != 3 {
		t.Fatalf("%d wait, want 3", x.Waiting())
	}
	x.Advance(10)
	if !slices.Equal(got, []uint64{3, 5, 7}) {
		t.Fatalf("ran %v", got)
	}
	cancels[0]() // after it ran
	if x.Waiting() != 0 {
		t.Fatalf("%d wait, want none", x.Waiting())
	}
}
