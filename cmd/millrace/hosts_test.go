package main

import (
	"testing"

	"millrace/vllm"
)

// TestHostsGivenUp: one of several servers that is given up leaves the work to the others; one that never will come up
// ends it all.
func TestHostsGivenUp(t *testing.T) {
	var ends []error
	h := &hosts{servers: make([]*vllm.Server, 2), failed: func(err error) { ends = append(ends, err) }}
	h.watch(nil)
	h.watch(&vllm.Failed{Why: "first"})
	if len(ends) != 0 {
		t.Errorf("ended by the first: %v", ends)
	}
	h.watch(&vllm.Failed{Why: "second"})
	if len(ends) != 1 || ends[0].Error() != "second" || exitCode(ends[0]) != exitFailure {
		t.Errorf("not ended by the last: %v", ends)
	}
	h.watch(&vllm.Failed{Why: "never", Final: true})
	if len(ends) != 2 || exitCode(ends[1]) != exitEngine {
		t.Errorf("not ended by one that cannot come up: %v", ends)
	}
}
