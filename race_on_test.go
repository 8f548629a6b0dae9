//go:build race

package main

// raceEnabled: the race detector makes the tests five to ten times slower. Those that
// run in one goroutine have nothing for it to find.
const raceEnabled = true
