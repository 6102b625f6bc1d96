package main

import (
	"testing"

	"millrace/vllm"
	"millrace/worker"
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

// TestHostsKeep: the worker of a server of ours knows what is known of it.
func TestHostsKeep(t *testing.T) {
	s := &vllm.Server{Port: 1, GPUs: []string{"3"}, ByBus: true}
	h, w := &hosts{servers: []*vllm.Server{s}}, &worker.Worker{}
	h.keep("http://127.0.0.1:2", w)
	if w.Keeper != nil {
		t.Error("it keeps an engine of others")
	}
	h.keep(s.String(), w)
	if w.Keeper != s || w.Answered != &s.Answered || len(w.Devices) != 1 || w.Devices[0] != "3" {
		t.Errorf("worker %+v", w)
	}
}
