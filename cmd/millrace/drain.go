package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/proto"
)

// drain says how many lines are in flight while workers finish them, and ends the wait at its limit.
type drain struct {
	w     io.Writer
	limit time.Duration
	reg   prometheus.Gatherer // of the process: its workers count there what they have in flight
	said  time.Time
	last  int
}

// drain makes the one for the workers of this process, whose metrics are in reg.
func (a *app) drain(e *engineFlags, reg prometheus.Gatherer) *drain {
	return &drain{w: a.std.err, limit: e.drainTimeout, reg: reg}
}

// drainLook is how often the count is read. It is said when it is known, and then every sayEvery where it fell.
const drainLook = 500 * time.Millisecond

// watch says the count until over closes or stop ends, and calls abort when the limit is reached. It begins when no
// more is taken.
func (d *drain) watch(over <-chan struct{}, stop context.Context, abort func()) {
	if stop.Err() != nil {
		return
	}
	end := time.Now().Add(d.limit)
	limit, look := time.NewTimer(d.limit), time.NewTicker(drainLook)
	defer limit.Stop()
	defer look.Stop()
	for {
		select {
		case <-over:
			return
		case <-stop.Done():
			return
		case <-limit.C:
			if n, _ := inFlight(d.reg); n > 0 {
				fmt.Fprintf(d.w, "millrace: --drain-timeout is over; given back: %s\n", count(n, "line"))
			}
			abort()
			return
		case now := <-look.C:
			if n, known := inFlight(d.reg); known {
				d.see(n, now, end.Sub(now))
			}
		}
	}
}

// see takes a count and says it where it is time to.
func (d *drain) see(n int, now time.Time, left time.Duration) {
	if n == 0 || n == d.last || !d.said.IsZero() && now.Sub(d.said) < sayEvery {
		return
	}
	d.said, d.last = now, n
	fmt.Fprintf(d.w, "millrace: %s in flight; what has not ended in %s is given back\n", count(n, "line"), span(left))
}

// inFlight adds up what the workers of this process have at their engines. It is known when all of them have stopped
// to begin new lines.
func inFlight(reg prometheus.Gatherer) (n int, known bool) {
	fams, err := reg.Gather()
	if err != nil {
		return 0, false
	}
	engines, draining := 0, 0
	for _, f := range fams {
		for _, m := range f.GetMetric() {
			switch f.GetName() {
			case "millrace_inflight_requests":
				engines++
				n += int(m.GetGauge().GetValue())
			case "millrace_engine_state":
				for _, l := range m.GetLabel() {
					if l.GetName() == "state" && l.GetValue() == proto.EngineDraining {
						draining += int(m.GetGauge().GetValue())
					}
				}
			}
		}
	}
	return n, draining == engines
}
