package worker_test

import (
	"testing"
	"time"

	"millrace/proto"
	"millrace/sim"
	"millrace/worker"
)

// four starts four engines that hang until they are told otherwise, each with a worker that may have many lines, and
// waits until the workers know of each other.
func four(t *testing.T, r *worker.Rig, limit int) []*engine {
	t.Helper()
	var out []*engine
	for range 4 {
		e := newEngine(t, nil)
		faults(t, e, sim.Faults{Hang: true})
		out = append(out, e)
		r.Start(e.client(), func(w *worker.Worker) {
			w.Concurrency = limit
			w.SetLongGap(time.Hour) // no worker is so late that others take what it would have come for
		})
	}
	r.Until("all are ready", func() bool { return len(held(r)) == len(out) })
	return out
}

// held is how many lines each ready worker has, by its engine.
func held(r *worker.Rig) map[string]int {
	out := map[string]int{}
	for _, w := range r.Workers() {
		if w.State == proto.EngineReady && len(w.Models) > 0 {
			out[w.Engine] = int(w.Held)
		}
	}
	return out
}

// even waits until ready workers, so many of them, have all n lines, and checks that none has much more than its part.
func even(t *testing.T, r *worker.Rig, workers, n int) {
	t.Helper()
	var have map[string]int
	r.Until("they have all lines", func() bool {
		have = held(r)
		sum := 0
		for _, n := range have {
			sum += n
		}
		return len(have) == workers && sum == n
	})
	for e, got := range have {
		if got > n/workers*13/10 {
			t.Errorf("worker of %s has %d lines of %d, want about %d", e, got, n, n/workers)
		}
	}
}

// answer lets engines go on, until all n lines are answered.
func answer(t *testing.T, r *worker.Rig, engines []*engine, n int) {
	t.Helper()
	for _, e := range engines {
		faults(t, e, sim.Faults{})
	}
	allOK(t, r.Wait(n), n)
	r.Settled(0)
}

// TestShare: few lines are spread evenly over workers each of which could have more than half of them.
func TestShare(t *testing.T) {
	r := worker.NewRig(t)
	engines := four(t, r, 277)
	const n = 500
	r.Send(worker.Requests(n)...)
	even(t, r, 4, n)
	answer(t, r, engines, n)
}

// TestShareOfDead: what an engine had that dies is spread evenly, too.
func TestShareOfDead(t *testing.T) {
	r := worker.NewRig(t)
	engines := four(t, r, 277)
	const n = 500
	r.Send(worker.Requests(n)...)
	even(t, r, 4, n)
	engines[0].sim.Kill()
	even(t, r, 3, n)
	answer(t, r, engines[1:], n)
}

// TestShareOfSlow: no part is kept for an engine that does not get on with what it has.
func TestShareOfSlow(t *testing.T) {
	r := worker.NewRig(t)
	engines := four(t, r, 16)
	const n, each = 500, 16 + 2 // the limit and an eighth
	r.Send(worker.Requests(n)...)
	r.Until("each has lines", func() bool { _, out := r.Pending(); return out >= 4*each })
	for _, e := range engines[1:] {
		faults(t, e, sim.Faults{})
	}
	r.Wait(n - each - len(proto.Lanes())) // a pull that waits may bring one more
	answer(t, r, engines[:1], n)
}
