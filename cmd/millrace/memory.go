package main

import (
	"os"
	"runtime/debug"
)

// Where GOGC is set, it decides, and what follows does nothing.
func collectorIsSet() bool { return os.Getenv("GOGC") != "" }

// spareHeap is memory that a role holds and never touches, so that it takes no room, but the garbage collector counts
// it as in use, and lets as much garbage gather before it collects. The roles that only pass lines on have small heaps
// and make much garbage: without this they collect dozens of times a second, which is a sixth of a worker's time
// (docs/benchmarks.md). A larger GOGC does the same, but also multiplies what a heap full of large lines grows to.
func spareHeap() []byte {
	if collectorIsSet() {
		return nil
	}
	return make([]byte, 32<<20)
}

// tightHeap is for the broker: its heap is a few buffers of megabytes each, which cost nothing to look through, and
// waiting until there is as much garbage again only makes the process larger.
func tightHeap() {
	if !collectorIsSet() {
		debug.SetGCPercent(25)
	}
}
