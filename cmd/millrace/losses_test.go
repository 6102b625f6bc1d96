package main

import (
	"testing"

	"millrace/sim"
)

// Three losses that were published of other systems of this kind, each with 64 lines.

// TestLossWorkerKilledWhileItHolds: all lines are in flight at a worker that is killed; another one answers them.
func TestLossWorkerKilledWhileItHolds(t *testing.T) {
	f := newFleet(t)
	input := writeInput(t, 64, nil)
	stuck := newEngine(t, sim.Config{Faults: sim.Faults{Hang: true}})
	well := newEngine(t, sim.Config{})
	f.broker()
	f.aggregate()
	w := f.start("worker", "worker", "--engine", stuck.url, "--data", f.path("worker1"), "--concurrency", "64", "--ack-wait", testAckWait)
	p := f.produce(input)
	f.holds(64)
	w.kill()
	f.worker(2, well)
	if code := p.wait(); code != exitOK {
		t.Fatalf("the producer ended with %d\n%s", code, p.err)
	}
	oracleDir(t, input, f.output())
}

// TestLossTwoHealthyConsumers: two workers share one queue; every line runs exactly once.
func TestLossTwoHealthyConsumers(t *testing.T) {
	f := newFleet(t)
	input := writeInput(t, 64, nil)
	e1, e2 := newEngine(t, slow()), newEngine(t, slow())
	f.broker()
	f.aggregate()
	f.worker(1, e1)
	f.worker(2, e2)
	p := f.produce(input)
	if code := p.wait(); code != exitOK {
		t.Fatalf("the producer ended with %d\n%s", code, p.err)
	}
	oracleDir(t, input, f.output())
	n1, _ := e1.count()
	n2, _ := e2.count()
	if n1+n2 != 64 {
		t.Errorf("%d + %d calls for 64 lines", n1, n2)
	}
}

// TestLossCoordinatorKilled: the process that coordinates everything is killed in the middle and started again. It
// does not wait for AckWait: that is an hour here.
func TestLossCoordinatorKilled(t *testing.T) {
	f := newFleet(t)
	input := writeInput(t, 64, nil)
	e := newEngine(t, slow())
	out := f.path("results.jsonl")
	args := []string{"run", input, "--engine", e.url, "--data", f.path("data"), "-o", out, "--concurrency", "8", "--ack-wait", "1h"}
	p := f.start("run", args...)
	answered(t, 20, e)
	p.kill()
	again := f.start("run again", args...)
	if code := again.wait(); code != exitOK {
		t.Fatalf("the run ended with %d\n%s", code, again.err)
	}
	oracle(t, input, out, f.path("results.errors.jsonl"), f.path("results.manifest.json"))
	n, _ := e.count()
	third := f.start("run a third time", args...)
	if code := third.wait(); code != exitOK {
		t.Fatalf("the finished run ended with %d\n%s", code, third.err)
	}
	third.says("is finished; --again makes a fresh run")
	if m, _ := e.count(); m != n {
		t.Errorf("a finished job ran %d lines again", m-n)
	}
}
