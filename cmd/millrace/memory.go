package main

import "os"

// spareHeap is memory that a role holds and never touches, so that it takes no room, but the garbage collector counts
// it as in use, and lets as much garbage gather before it collects. The roles that only pass lines on have small heaps
// and make much garbage: without this they collect dozens of times a second, which is a sixth of a worker's time
// (docs/benchmarks.md). A larger GOGC does the same, but also multiplies what a heap full of large lines grows to.
// Where GOGC is set, it decides.
func spareHeap() []byte {
	if os.Getenv("GOGC") != "" {
		return nil
	}
	return make([]byte, 32<<20)
}
