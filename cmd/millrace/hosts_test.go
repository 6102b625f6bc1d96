package main

import (
	"log/slog"
	"slices"
	"strings"
	"testing"

	"millrace/vllm"
	"millrace/worker"
)

// TestHostsGivenUp: one of several servers that is given up leaves the work to the others; one that never will come up
// ends it all.
func TestHostsGivenUp(t *testing.T) {
	var ends []error
	var said strings.Builder
	s := &vllm.Server{Port: 1}
	h := &hosts{servers: make([]*vllm.Server, 2), failed: func(err error) { ends = append(ends, err) }, log: slog.New(slog.NewTextHandler(&said, nil))}
	h.watch(s, nil)
	h.watch(s, &vllm.Failed{Why: "first"})
	if len(ends) != 0 || !strings.Contains(said.String(), "first; the other engines go on without it") {
		t.Errorf("ended by the first: %v; said %s", ends, said.String())
	}
	h.watch(s, &vllm.Failed{Why: "second"})
	if len(ends) != 1 || !strings.HasPrefix(ends[0].Error(), "second; it is http://127.0.0.1:1, its log is ") || exitCode(ends[0]) != exitEngine {
		t.Errorf("not ended by the last: %v", ends)
	}
	h.watch(s, &vllm.Failed{Why: "never", Final: true})
	if len(ends) != 2 || exitCode(ends[1]) != exitEngine {
		t.Errorf("not ended by one that cannot come up: %v", ends)
	}
}

// TestHostsKeep: the worker of a server of ours knows what is known of it.
func TestHostsKeep(t *testing.T) {
	s := &vllm.Server{Port: 1, GPUs: []string{"3"}, ByBus: true, Flags: vllm.Flags{"--max-num-seqs", "64", "-dp=2"}}
	h, w := &hosts{servers: []*vllm.Server{s}}, &worker.Worker{}
	h.keep("http://127.0.0.1:2", w)
	if w.Keeper != nil {
		t.Error("it keeps an engine of others")
	}
	h.keep(s.String(), w)
	if w.Keeper != s || w.Sequences() != 128 || w.Answered != &s.Answered || len(w.Devices) != 1 || w.Devices[0] != "3" {
		t.Errorf("worker %+v", w)
	}
}

// TestCommandOf: the word serve is ours.
func TestCommandOf(t *testing.T) {
	for in, want := range map[string][]string{"vllm": {"vllm"}, " /opt/vllm serve ": {"/opt/vllm"}, "python3 -m vllm.entrypoints.cli.main": {"python3", "-m", "vllm.entrypoints.cli.main"}, "serve": {"serve"}} {
		if got := commandOf(in); !slices.Equal(got, want) {
			t.Errorf("%q: %q", in, got)
		}
	}
}
