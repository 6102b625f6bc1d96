package main

import (
	"strconv"
	"testing"
)

// TestWatchRunKilled: whoever watches a run of another process hears that it is gone; the same command continues it. Who stops
// watching stops nothing else.
func TestWatchRunKilled(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	input := writeInput(t, killLines, nil)
	e := newEngine(t, slow())
	args := []string{"run", input, "--engine", e.url, "--data", f.path("data"), "-o", f.path("r.jsonl"), "--concurrency", "8"}
	first := f.start("run", args...)
	answered(t, 1, e)
	other := f.start("other", args...)
	other.says("watching it")
	other.term()
	other.says("no longer watching; process " + strconv.Itoa(first.cmd.Process.Pid) + " goes on with the job")
	second := f.start("watch", args...)
	second.says("watching it")
	first.kill()
	if code := second.wait(); code != exitFailure {
		t.Errorf("the watching one ended with %d\n%s", code, second.err)
	}
	second.says("is gone; the same command continues")
	if code := f.start("again", args...).wait(); code != exitOK {
		t.Errorf("the same command ended with %d", code)
	}
}
