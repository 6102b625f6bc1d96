package worker_test

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"slices"
	"testing"
	"time"

	"millrace/proto"
	"millrace/sim"
	"millrace/worker"
)

// dose makes the requests of a job in which the lines at some places kill the engine.
func dose(n int, poison ...int) []*proto.Request {
	reqs := worker.Requests(n)
	for _, i := range poison {
		reqs[i].Body = []byte(`{"model":"m","messages":[{"role":"user","content":"arsenic"}]}`)
	}
	return reqs
}

// most is how often an engine with n requests in flight may die of one line.
func most(n int) int { return int(math.Ceil(math.Log2(float64(n)))) + 2 }

// TestPoisonFound: the line that kills engines is found within few deaths, however much is in flight; it alone fails, with
// its history, and its neighbours are answered uncharged.
func TestPoisonFound(t *testing.T) {
	for _, c := range []struct{ inFlight, lines int }{{8, 60}, {16, 100}, {64, 300}, {256, 800}} {
		t.Run(fmt.Sprint(c.inFlight), func(t *testing.T) {
			r := worker.NewRig(t)
			e := newEngine(t, func(cfg *sim.Config) { cfg.Faults = sim.Faults{Poison: "arsenic"} })
			e.cfg.LoadTime = 500 * time.Millisecond // it is seen that it was gone; no real one is back at once
			poison := c.lines / 3
			r.Send(dose(c.lines, poison)...)
			r.Start(e.client(), func(w *worker.Worker) { w.Concurrency = c.inFlight })
			deaths := e.immortal(t)
			results := r.Wait(c.lines)
			if n := deaths(); n > most(c.inFlight) {
				t.Errorf("the engine died %d times, at most %d are allowed", n, most(c.inFlight))
			}
			for i, res := range worker.Exactly(t, results, c.lines) {
				switch ok := int(i) != poison; {
				case res.OK != ok, len(res.Attempts) > 0:
					t.Errorf("index %d: %v %s %s, attempts %+v", i, res.OK, res.Code, res.Message, res.Attempts)
				case !ok && (res.Code != proto.CodeEngineCrash || res.Message == ""):
					t.Errorf("the poison ended as %s: %s", res.Code, res.Message)
				}
			}
			r.Settled(0)
		})
	}
}

// TestPoisonCost tells what poison costs a job of 5,000 lines: MILLRACE_POISON=1s runs it, which takes some minutes. The
// engine needs as long to start as MILLRACE_POISON says.
func TestPoisonCost(t *testing.T) {
	start, err := time.ParseDuration(os.Getenv("MILLRACE_POISON"))
	if err != nil {
		t.Skip("MILLRACE_POISON=1s runs it, some minutes, with an engine that takes a second to start")
	}
	const lines = 5000
	run := func(inFlight int, poison ...int) (took time.Duration, deaths int) {
		r := worker.NewRig(t)
		e := newEngine(t, func(cfg *sim.Config) {
			cfg.MaxNumSeqs, cfg.KVTokens = 1024, 1<<21
			cfg.StepTime, cfg.DecodeTime = 10*time.Millisecond, 30*time.Microsecond
			cfg.OutputTokens = sim.Range{Min: 60, Max: 180}
			cfg.Faults = sim.Faults{Poison: "arsenic"}
		})
		e.cfg.LoadTime = start
		count := e.immortal(t)
		r.Send(dose(lines, poison...)...)
		begun := time.Now()
		r.Start(e.client(), func(w *worker.Worker) { w.Concurrency = inFlight })
		results := r.WaitFor(10*time.Minute, lines)
		took = time.Since(begun)
		for i, res := range worker.Exactly(t, results, lines) {
			if res.OK == slices.Contains(poison, int(i)) {
				t.Errorf("index %d: %v %s %s", i, res.OK, res.Code, res.Message)
			}
		}
		return took, count()
	}
	for _, inFlight := range []int{64, 256, 1024, 0} { // 0: found out
		clean, _ := run(inFlight)
		one, deaths := run(inFlight, 2000)
		three, more := run(inFlight, 1000, 2000, 4000)
		t.Logf("%d in flight: clean %.1f s, one poison %.1f s = %.2f, %d deaths (%d allowed), three %.1f s = %.2f, %d deaths", inFlight,
			clean.Seconds(), one.Seconds(), one.Seconds()/clean.Seconds(), deaths, most(cmp.Or(inFlight, 512)), three.Seconds(), three.Seconds()/clean.Seconds(), more)
	}
}
