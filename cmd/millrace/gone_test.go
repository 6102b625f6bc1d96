package main

import (
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"millrace/sim"
)

// TestKillRun kills `millrace run`, which is every role in one process, twice at random instants of a job, and starts
// the same command again. AckWait is an hour: nothing waits it out.
func TestKillRun(t *testing.T) {
	t.Parallel()
	s := seed()
	t.Logf("MILLRACE_SEED=%d", s)
	for i := range kills() {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			t.Parallel()
			rnd := rand.New(rand.NewPCG(s, uint64(9000000+i)))
			killRun(t, rnd.IntN(killLines*95/100), rnd.IntN(killLines*95/100))
		})
	}
}

func killRun(t *testing.T, at ...int) {
	f := newFleet(t)
	input := writeInput(t, killLines, nil)
	e := newEngine(t, slow())
	args := []string{"run", input, "--engine", e.url, "--data", f.path("data"), "-o", f.path("r.jsonl"), "--concurrency", "8", "--ack-wait", hourAckWait}
	slices.Sort(at)
	for _, n := range at {
		p := f.start("run", args...)
		answered(t, n, e) // none may have been: it dies while it starts
		p.kill()
	}
	p := f.start("run again", args...)
	if code := p.wait(); code != exitOK {
		t.Fatalf("killed after %v answers: the run ended with %d\n%s", at, code, p.err)
	}
	if c := oracle(t, input, f.path("r.jsonl"), f.path("r.errors.jsonl"), f.path("r.manifest.json")); c.ok != killLines {
		t.Errorf("killed after %v answers: %d ok, %d failed", at, c.ok, c.failed)
	}
	n, _ := e.count()
	t.Logf("killed after %v answers; %d calls for %d lines", at, n, killLines)
}

// TestKillBrokerStaysAway: the broker is killed while lines are held, and stays away until everyone has lost it and no
// lease can be renewed any more, or for a minute where many kills are asked for. Started again on the same disk,
// everyone goes on by itself.
func TestKillBrokerStaysAway(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	input := writeInput(t, killLines, nil)
	e1, e2 := newEngine(t, slow()), newEngine(t, slow())
	b := f.broker()
	agg, w1, w2 := f.aggregate(), f.worker(1, e1), f.worker(2, e2)
	p := f.produce(input, "--window", "60")
	answered(t, killLines/3, e1, e2)
	f.holds(1)
	b.kill()
	for _, role := range []*proc{agg, w1, w2, p} {
		role.says("broker connection lost")
	}
	p.says("feeding stops")
	if os.Getenv("MILLRACE_KILLS") != "" {
		<-time.After(time.Minute)
	}
	before, _ := e1.count()
	more, _ := e2.count()
	if before+more >= killLines {
		t.Fatalf("the engines have answered %d requests, nothing is left for when the broker is back", before+more)
	}
	f.broker()
	if code := p.wait(); code != exitOK {
		t.Fatalf("the producer ended with %d\n%s", code, p.err)
	}
	if c := oracleDir(t, input, f.output()); c.ok != killLines {
		t.Errorf("%d ok, %d failed", c.ok, c.failed)
	}
	n1, _ := e1.count()
	n2, _ := e2.count()
	t.Logf("%d answers when the broker came back; %d calls for %d lines", before+more, n1+n2, killLines)
}

// TestWorkerGone: that a worker was killed with lines in hand is said by produce and status, with when others get them, long
// before that time.
func TestWorkerGone(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	input := writeInput(t, killLines, nil)
	f.serve()
	e := newEngine(t, sim.Config{StepTime: 5 * time.Millisecond, MaxNumSeqs: 8, OutputTokens: sim.Range{Min: 1 << 20, Max: 1 << 20}})
	first := f.start("worker 1", "worker", "--engine", e.url, "--data", f.path("w1"), "--concurrency", "8", "--ack-wait", hourAckWait)
	p := f.start("producer", "produce", input, "--data", f.path("producer"), "--ack-wait", hourAckWait)
	f.holds(8)
	first.kill()
	for silent := false; !silent; { // its heartbeat is there for a while yet
		status := f.start("status", "status")
		status.wait()
		said := status.out.String()
		silent = strings.Contains(said, " silent ") && strings.Contains(said, "not heard of for ")
		if !silent && strings.Contains(said, " is gone") {
			t.Fatalf("it was never silent:\n%s", said)
		}
	}
	p.says(" is gone, not heard of since ")
	p.says("lines in hand: free again by ")
	status := f.start("status", "status")
	if code := status.wait(); code != exitOK || !strings.Contains(status.out.String(), "lines in hand: free again by ") {
		t.Errorf("status ended with %d and says:\n%s", code, status.out)
	}
}
