package main

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"millrace/sim"
)

// kills is how often each role is killed: MILLRACE_KILLS, or 3.
func kills() int {
	if n, err := strconv.Atoi(os.Getenv("MILLRACE_KILLS")); err == nil {
		return n
	}
	return 3
}

// seed is MILLRACE_SEED, or another one each time. A failed test prints it.
func seed() uint64 {
	if n, err := strconv.ParseUint(os.Getenv("MILLRACE_SEED"), 10, 64); err == nil {
		return n
	}
	return uint64(time.Now().UnixNano())
}

// slow is an engine that makes a job of a few hundred lines last long enough to be killed in its middle.
func slow() sim.Config {
	return sim.Config{StepTime: 5 * time.Millisecond, MaxNumSeqs: 8, OutputTokens: sim.Range{Min: 4, Max: 8}}
}

const killLines = 240

// TestKill kills one role with kill -9 at a random instant between 5 and 95 % of a job, with lines held, starts it
// again, and asks the oracle.
func TestKill(t *testing.T) {
	s := seed()
	t.Logf("MILLRACE_SEED=%d", s)
	for ri, role := range []string{"worker", "aggregator", "producer", "broker"} {
		t.Run(role, func(t *testing.T) {
			for i := range kills() {
				t.Run(strconv.Itoa(i), func(t *testing.T) {
					rnd := rand.New(rand.NewPCG(s, uint64(ri*1000000+i)))
					killOnce(t, role, killLines*5/100+rnd.IntN(killLines*90/100))
				})
			}
		})
	}
}

func killOnce(t *testing.T, role string, at int) {
	t.Helper()
	f := newFleet(t)
	input := writeInput(t, killLines, nil)
	e1, e2 := newEngine(t, slow()), newEngine(t, slow())
	procs := map[string]*proc{"broker": f.broker(), "aggregator": f.aggregate(), "worker": f.worker(1, e1)}
	f.worker(2, e2)
	procs["producer"] = f.produce(input)
	answered(t, at, e1, e2)
	procs[role].kill()
	again := map[string]func() *proc{
		"broker": f.broker, "aggregator": f.aggregate,
		"worker":   func() *proc { return f.worker(1, e1) },
		"producer": func() *proc { return f.produce(input) },
	}[role]
	procs[role] = again()
	if code := procs["producer"].wait(); code != exitOK {
		t.Fatalf("killed %s after %d answers: the producer ended with %d\n%s", role, at, code, procs["producer"].err)
	}
	if c := oracleDir(t, input, f.output()); c.ok != killLines || c.failed != 0 {
		t.Errorf("killed %s after %d answers: %d ok, %d failed", role, at, c.ok, c.failed)
	}
	total, _ := e1.count()
	n2, _ := e2.count()
	t.Logf("killed %s after %d answers; %d calls for %d lines", role, at, total+n2, killLines)
}
