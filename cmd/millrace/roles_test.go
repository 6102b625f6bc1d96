package main

import (
	"os"
	"strings"
	"testing"

	"millrace/broker"
)

// hourAckWait is longer than any test: what passes with it does not wait AckWait out.
const hourAckWait = "1h"

// TestDetached: the input lies with the broker, the producer is gone, and the fleet feeds and finishes the job.
func TestDetached(t *testing.T) {
	f := newFleet(t)
	input := writeInput(t, 100, nil)
	f.serve()
	f.worker(1, newEngine(t, slow()))
	if code := f.produce(input, "--detach").wait(); code != exitOK {
		t.Fatalf("produce --detach ended with %d", code)
	}
	v := f.finished(100)
	oracleDir(t, input, f.output())
	manifest := f.start("results", "results", v.Job.ID, "--manifest")
	if code := manifest.wait(); code != exitOK {
		t.Fatalf("results --manifest ended with %d: %s", code, manifest.err)
	}
	want, err := os.ReadFile(v.Progress.Manifest)
	if err != nil || manifest.out.String() != string(want) {
		t.Errorf("%v, the manifest by NATS is another one than that on disk:\n%s", err, manifest.out)
	}
}

// TestTwoAggregators: the second waits for the lease, and takes over when the first dies, with an empty disk or with the
// same one.
func TestTwoAggregators(t *testing.T) {
	for disk, folder := range map[string]string{"empty": "aggregator2", "same": "aggregator"} {
		t.Run(disk, func(t *testing.T) {
			f := newFleet(t)
			input := writeInput(t, killLines, nil)
			e := newEngine(t, slow())
			f.broker()
			first := f.start("aggregator", "aggregate", "--output", f.path("out"), "--data", f.path("aggregator"), "--verbose")
			first.says("results are folded")
			second := f.start("second aggregator", "aggregate", "--output", f.path("out"), "--data", f.path(folder))
			second.says("another aggregator folds")
			f.worker(1, e)
			p := f.produce(input)
			answered(t, killLines/2, e)
			first.kill()
			if code := p.wait(); code != exitOK {
				t.Fatalf("the producer ended with %d\n%s", code, second.err)
			}
			oracleDir(t, input, f.output())
			if n, _ := e.count(); disk == "same" && n > killLines*3/2 {
				t.Errorf("%d calls for %d lines: what the first had was run again", n, killLines)
			}
		})
	}
}

// TestFinishedStaysFinished: an aggregator with an empty disk does not make a finished job run again.
func TestFinishedStaysFinished(t *testing.T) {
	f := newFleet(t)
	input := writeInput(t, 50, nil)
	e := newEngine(t, slow())
	f.broker()
	first := f.aggregate()
	f.worker(1, e)
	if code := f.produce(input).wait(); code != exitOK {
		t.Fatalf("the producer ended with %d", code)
	}
	f.finished(50)
	calls, _ := e.count()
	first.kill()
	f.start("second aggregator", "aggregate", "--output", f.path("out"), "--data", f.path("aggregator2"), "--verbose").says("results are folded")
	p := f.produce(input)
	if code := p.wait(); code != exitOK {
		t.Errorf("the producer ended with %d\n%s", code, p.err)
	}
	f.finished(50)
	if n, _ := e.count(); n != calls {
		t.Errorf("%d more calls", n-calls)
	}
	oracleDir(t, input, f.output())
}

// TestWorkerRestartGivesBackAtOnce: a worker that was killed and is started again gives back what its dead process
// held. What was on its way to that one comes back after AckWait, which is therefore no hour.
func TestWorkerRestartGivesBackAtOnce(t *testing.T) {
	f := newFleet(t)
	input := writeInput(t, 100, nil)
	e := newEngine(t, slow())
	f.broker()
	f.aggregate()
	args := []string{"worker", "--engine", e.url, "--data", f.path("worker1"), "--concurrency", "8", "--ack-wait", "10s"}
	w := f.start("worker", args...)
	p := f.start("producer", "produce", input, "--data", f.path("producer"))
	answered(t, 30, e)
	w.kill()
	f.start("worker again", args...).says("gave back requests that a dead worker held")
	if code := p.wait(); code != exitOK {
		t.Fatalf("the producer ended with %d\n%s", code, p.err)
	}
	oracleDir(t, input, f.output())
}

// TestWorkerDrains: a worker that is asked to stop finishes or gives back all that it holds, and another one goes on;
// AckWait is an hour.
func TestWorkerDrains(t *testing.T) {
	f := newFleet(t)
	input := writeInput(t, 100, nil)
	e1, e2 := newEngine(t, slow()), newEngine(t, slow())
	f.broker()
	f.aggregate()
	worker := func(name string, e *testEngine) *proc {
		return f.start(name, "worker", "--engine", e.url, "--data", f.path(name), "--concurrency", "8", "--ack-wait", hourAckWait)
	}
	w := worker("first", e1)
	p := f.start("producer", "produce", input, "--data", f.path("producer"))
	answered(t, 30, e1)
	if code := w.term(); code != exitOK {
		t.Errorf("the worker that was asked to stop ended with %d", code)
	}
	worker("second", e2)
	if code := p.wait(); code != exitOK {
		t.Fatalf("the producer ended with %d\n%s", code, p.err)
	}
	oracleDir(t, input, f.output())
	n1, _ := e1.count()
	n2, _ := e2.count()
	if n1+n2 != 100 {
		t.Errorf("%d + %d calls for 100 lines", n1, n2)
	}
}

// TestRunTwiceWatches: the same run started a second time watches the first.
func TestRunTwiceWatches(t *testing.T) {
	f := newFleet(t)
	input := writeInput(t, 100, nil)
	e := newEngine(t, slow())
	args := []string{"run", input, "--engine", e.url, "--data", f.path("data"), "-o", f.path("r.jsonl"), "--concurrency", "4"}
	first := f.start("first", args...)
	answered(t, 10, e)
	second := f.start("second", args...)
	second.says("watching it")
	if a, b := first.wait(), second.wait(); a != exitOK || b != exitOK {
		t.Errorf("ended with %d and %d\n%s", a, b, second.err)
	}
	if n, _ := e.count(); n != 100 {
		t.Errorf("%d calls for 100 lines", n)
	}
	oracle(t, input, f.path("r.jsonl"), f.path("r.errors.jsonl"), f.path("r.manifest.json"))
}

// TestProduceTakesOver: the same produce started a second time watches the first, and goes on when that one is killed.
// Another one that watches ends when the job is removed, and so does the one that it watches.
func TestProduceTakesOver(t *testing.T) {
	f := newFleet(t)
	input := writeInput(t, 100, nil)
	f.serve()
	produce := func(name string) *proc {
		return f.start(name, "produce", input, "--data", f.path(name), "--window", "10", "--ack-wait", testAckWait)
	}
	first := produce("first")
	f.until(func(v *broker.JobView) bool { return v.Feed.Enqueued > 0 })
	second := produce("second")
	second.says("watching it")
	first.kill()
	w := f.worker(1, newEngine(t, slow()))
	if code := second.wait(); code != exitOK {
		t.Fatalf("the second ended with %d\n%s", code, second.err)
	}
	oracleDir(t, input, f.output())
	w.term()

	v := f.finished(100)
	if code := f.start("rm", "rm", v.Job.ID).wait(); code != exitOK {
		t.Fatalf("rm ended with %d", code)
	}
	third := produce("third")
	f.until(func(v *broker.JobView) bool { return v.Feed.Enqueued > 0 })
	fourth := produce("fourth")
	fourth.says("watching it")
	if code := f.start("rm", "rm", "--force", v.Job.ID).wait(); code != exitOK {
		t.Fatalf("rm --force ended with %d", code)
	}
	for _, p := range []*proc{third, fourth} {
		if code := p.wait(); code != exitFailure || !strings.Contains(p.err.String(), "the job was removed") {
			t.Errorf("ended with %d\n%s", code, p.err)
		}
	}
}

// TestOrphaned: that the owner of a job was killed is seen, by its silence.
func TestOrphaned(t *testing.T) {
	f := newFleet(t)
	f.serve()
	p := f.produce(writeInput(t, 10, nil))
	f.until(func(v *broker.JobView) bool { return v.State() == broker.StateRunning })
	p.kill()
	f.until(func(v *broker.JobView) bool { return v.State() == broker.StateOrphaned })
}

// TestNobodyFoldsOrphan: of a job whose producer has left, status says first that no aggregator is there.
func TestNobodyFoldsOrphan(t *testing.T) {
	f := newFleet(t)
	f.broker()
	p := f.produce(writeInput(t, 10, nil))
	f.until(func(v *broker.JobView) bool { return v.Feed.Enqueued == 10 })
	p.kill()
	f.until(func(v *broker.JobView) bool { return v.State() == broker.StateOrphaned })
	for _, verb := range []string{"status", "jobs"} {
		st := f.start(verb, verb)
		if code := st.wait(); code != exitOK || !strings.Contains(st.out.String(), "no aggregator answers; start `millrace aggregate`; ") || !strings.Contains(st.out.String(), "; its producer has left") {
			t.Errorf("%s ended with %d and printed\n%s", verb, code, st.out)
		}
	}
}

// TestCancelKeepsWhatWasDone: what ran stays, the rest ends as batch_cancelled, each line once.
func TestCancelKeepsWhatWasDone(t *testing.T) {
	f := newFleet(t)
	input := writeInput(t, killLines, nil)
	e := newEngine(t, slow())
	f.serve()
	f.worker(1, e)
	p := f.produce(input)
	answered(t, 40, e)
	v := f.until(func(v *broker.JobView) bool { return v.Job.ID != "" })
	if code := f.start("cancel", "cancel", v.Job.ID).wait(); code != exitOK {
		t.Fatalf("cancel ended with %d", code)
	}
	if code := p.wait(); code != exitEnded {
		t.Errorf("the producer ended with %d\n%s", code, p.err)
	}
	f.finished(killLines)
	if c := oracleDir(t, input, f.output()); c.ok < 20 || c.failed == 0 {
		t.Errorf("%d ok, %d failed", c.ok, c.failed)
	}
}

// TestNobodyServes: that no worker serves the model of a job is said, by the producer and by status.
func TestNobodyServes(t *testing.T) {
	f := newFleet(t)
	input := writeInput(t, 5, nil)
	f.serve()
	p := f.produce(input)
	p.says("no worker serves model m")
	st := f.start("status", "status")
	if code := st.wait(); code != exitOK || !strings.Contains(st.out.String(), "no worker serves model m") {
		t.Errorf("status ended with %d and printed\n%s", code, st.out)
	}
	f.worker(1, newEngine(t, slow()))
	if code := p.wait(); code != exitOK {
		t.Errorf("the producer ended with %d\n%s", code, p.err)
	}
	oracleDir(t, input, f.output())
}
