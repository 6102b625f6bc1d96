package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"millrace/proto"
)

// gate says whether lines may be run. It watches the engine by probes, and hears from every line how it went.
//
// Two things must both be well: what the last probe found, and that no line has tripped the gate since. A trip
// (trip.go) says why and how it clears:
//
//	unreached  no connection: by a probe that succeeds
//	dead       the engine died: by a probe that succeeds after one that failed; where none fails (it is draining,
//	           or a proxy stands before it), lines are let through one by one until one is answered
//	denied     a line was refused for want of a key: one by one, every RetryEvery
//	degraded   all lines fail alike: one by one, every RetryEvery; see degraded.go
//	hung       no progress: when the engine's gauges move, or one by one, every RetryEvery
//
// Where the engine's process is in our hand, its end is seen at once, and one that hangs or is gone is started again.
type gate struct {
	engine Engine
	keeper Keeper // nil: none
	log    *slog.Logger
	stall  time.Duration
	every  time.Duration        // between probes of an engine that is ready, at most
	pace   func() time.Duration // what the limit wants for that
	took   time.Duration        // the last probe
	gone   bool                 // the last look found no process; only run looks
	ends   int                  // how often that was so
	retry  time.Duration        // RetryEvery

	opened  func()                              // the quota may have changed; holds no lock
	found   func(Status)                        // a probe succeeded
	abort   func(error)                         // let go of what the engine has, for a cause
	busy    func() int                          // lines in flight
	inside  func(time.Time) bool                // whether one of them was started before
	others  func(model string, then func(bool)) // asks whether another ready worker serves a model, and goes on with the answer
	kick    chan struct{}
	started time.Time // of the worker

	mu          sync.Mutex
	status      Status
	was         Status // what it was found to be when it was last ready
	slow        int    // probes in a row that got no answer in time from a ready engine
	trip        *trip
	deaths      int // trips by dead or unreached without an answer in between
	draining    bool
	diary       diary
	health      health
	loaded      time.Duration
	lastBad     time.Time // end of the last probe that did not find the engine up
	begun       int       // probes begun
	ended       int       // number of the last probe that ended
	lastDeath   time.Time // when lines last found it dead, or nobody there
	turn        chan struct{}
	equal       equalErrors
	doubts      []*doubt
	refusals    refusals
	hang        hangWatch
	answers     int                // answers that were no sign of trouble
	down        time.Time          // the engine is not up since then, and has answered nothing
	downAnswers int                // answers until down
	everOK      bool               // a line has succeeded, ever
	lastOK      time.Time          // when one has succeeded
	listed      map[string]listing // by model
	names       map[string]string  // by model: by which other name it answers
	mended      time.Time          // when one has succeeded while the engine was degraded
	last        time.Time          // start of the last probe that found the engine ready
	idle        lack               // why there is nothing to pull from, though the engine lists models; zero: there is
}

// lack is a state of a ready engine that gets no lines, and why.
type lack struct{ state, reason string }

const (
	probeTimeout = 5 * time.Second
	probeWaiting = 500 * time.Millisecond // between probes of an engine that is not ready
	probeGap     = 50 * time.Millisecond  // at least between any two
	probeMost    = 10 * time.Second       // between those of an engine that takes long to answer them
	slowProbes   = 3                      // probes without an answer in time, until a ready engine is thought gone
	goneGrace    = time.Second            // for answers of a dead process that are on their way
)

// run probes until ctx ends.
func (g *gate) run(ctx context.Context) {
	var moved <-chan struct{}
	if g.keeper != nil {
		moved = g.keeper.Changed()
	}
	for {
		g.probe(ctx)
		timer := time.NewTimer(g.interval())
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-moved:
			timer.Stop()
		case <-g.kick:
			timer.Stop()
			select {
			case <-ctx.Done():
				return
			case <-time.After(probeGap):
			}
		}
	}
}

func (g *gate) interval() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.status.State == proto.EngineReady && g.trip == nil {
		return max(min(g.every, g.pace()), min(10*g.took, probeMost)) // a scrape takes a third of a second of a busy frontend
	}
	return min(probeWaiting, g.every)
}

// hurry asks for a probe soon.
func (g *gate) hurry() {
	select {
	case g.kick <- struct{}{}:
	default:
	}
}

func (g *gate) probe(ctx context.Context) {
	g.mu.Lock()
	g.begun++
	n := g.begun
	g.mu.Unlock()
	begun := time.Now()
	pctx, cancel := context.WithTimeout(ctx, probeTimeout)
	st, err := g.look(pctx)
	cancel()
	took := time.Since(begun)
	if ctx.Err() != nil {
		return
	}
	g.take(begun, st, err)
	g.mu.Lock()
	g.ended, g.took = n, took
	close(g.turn)
	g.turn = make(chan struct{})
	g.mu.Unlock()
}

// look asks the engine, unless it is known to have no process that could answer.
func (g *gate) look(ctx context.Context) (Status, error) {
	if g.keeper != nil {
		if state, reason := g.keeper.State(); state != "" {
			if !g.gone {
				g.gone = true
				g.ends++
			}
			return Status{State: state, Reason: reason, Gone: true}, nil
		}
	}
	g.gone = false
	st, err := g.engine.Probe(ctx)
	st.Run += g.ends // the engine may not have been asked in between
	return st, err
}

// fresh waits for a probe that begins after the call, and returns what the gate knows then.
func (g *gate) fresh(ctx context.Context) Status {
	g.mu.Lock()
	after := g.begun
	for g.ended <= after && ctx.Err() == nil {
		turn := g.turn
		g.mu.Unlock()
		g.hurry()
		select {
		case <-turn:
		case <-ctx.Done():
		}
		g.mu.Lock()
	}
	defer g.mu.Unlock()
	return g.status
}

// lookedSince says whether a probe has found the engine ready that began after a time.
func (g *gate) lookedSince(t time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.last.After(t)
}

// take digests what a probe found.
func (g *gate) take(begun time.Time, st Status, err error) {
	g.mu.Lock()
	if err != nil {
		if g.tolerate(err) {
			g.mu.Unlock()
			return
		}
		st = Status{State: proto.EngineWaiting, Reason: unreachable(g.engine.String(), err, g.loaded > 0)}
		if g.keeper != nil { // it is what it was, and not loading
			st.Reason = fmt.Sprintf("engine at %s does not answer: %s", g.engine, plain(err.Error()))
		}
	} else {
		g.slow = 0
	}
	if st.State == proto.EngineReady {
		g.was = st
	} else {
		g.lastBad = time.Now()
		if st.Gone || errors.Is(err, syscall.ECONNREFUSED) {
			g.health = health{} // what it failed last was its death; one that is ill for a moment stays what it is
		}
		if g.keeper != nil { // one that we start is the same the next time
			k := &g.was
			st.Kind, st.Version, st.Slots, st.MaxLen, st.Simulated = k.Kind, k.Version, k.Slots, k.MaxLen, k.Simulated
		}
	}
	g.status = st
	g.clearByProbe(begun, st)
	cause := g.watch(begun, st, err)
	if st.State == proto.EngineReady {
		if time.Now().After(g.refusals.until) {
			g.heard()
		}
		if time.Since(g.health.when) > sickAnew {
			g.health = health{}
		}
		g.list(st.Models, begun)
		if g.loaded == 0 {
			g.loaded = max(time.Since(g.started), 1)
		}
	}
	g.mu.Unlock()
	if cause != nil {
		g.opened() // first: slots that become free would take the next lines
		g.abort(cause)
		if !st.Gone {
			g.restart(cause)
		}
	}
	if st.State == proto.EngineReady {
		g.found(st)
		g.tell()
	}
	g.show()
}

// tolerate says whether a probe that got no answer in time may be passed over: a busy frontend is slow, too.
func (g *gate) tolerate(err error) bool {
	if g.status.State != proto.EngineReady || !errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	g.slow++
	return g.slow < slowProbes
}

// unreachable says what is wrong with an engine that cannot be asked, and was well before or never.
func unreachable(engine string, err error, was bool) string {
	if errors.Is(err, context.DeadlineExceeded) && was {
		return fmt.Sprintf("engine at %s does not answer any more", engine)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Sprintf("engine at %s does not answer; still loading?", engine)
	}
	said := plain(err.Error())
	broken := func(how string) bool { return strings.Contains(said, how) }
	reset := broken("connection reset") || broken("broken pipe") || strings.HasSuffix(said, "EOF") // it is chance which of them
	switch {
	case broken("connection refused") && was, reset && was:
		return fmt.Sprintf("engine at %s does not answer any more; it died or was stopped, or is starting again", engine)
	case broken("connection refused"):
		return fmt.Sprintf("engine at %s refuses connections; still loading?", engine)
	case reset:
		s := fmt.Sprintf("engine at %s breaks connections before it answers; still loading, or not an engine?", engine)
		if rest, plain := strings.CutPrefix(engine, "http://"); plain {
			s += " One with TLS is https://" + rest
		}
		return s
	case broken(speaksFirst + ` and says "INFO {server_id:`):
		return fmt.Sprintf("at %s is a NATS broker, not an engine; --nats names the broker, --engine the engine", engine)
	case broken(speaksFirst):
		return fmt.Sprintf("what listens at %s %s; check --engine", engine, said)
	case broken("does not look like a TLS handshake"), broken("server gave HTTP response to HTTPS client"):
		return fmt.Sprintf("engine at %s has no TLS; name it http://%s", engine, strings.TrimPrefix(engine, "https://"))
	case broken("failed to verify certificate"):
		_, why, _ := strings.Cut(said, "x509: ")
		return fmt.Sprintf("engine at %s has a certificate that this machine does not trust (%s); trust its authority here, or name the engine as its certificate does", engine, why)
	}
	s := fmt.Sprintf("engine at %s cannot be reached: %s", engine, said)
	if strings.Contains(s, "no such host") {
		s += "; check --engine"
	}
	return s
}

// watch says why what the engine has should be let go of, if it should, and trips the gate of a hung one. Called
// with mu held.
func (g *gate) watch(now time.Time, st Status, err error) error {
	if st.State != proto.EngineReady {
		return g.watchDown(now, st, err)
	}
	g.down = time.Time{}
	if !g.hang.stalled(now, st.Gauges, g.busy(), g.answers, g.stall) && !g.stuck(now) {
		return nil
	}
	g.tripHung(now, g.stall, st.Gauges)
	return errHung
}

// stuck says whether an engine that we could start again has been hung for long. Called with mu held.
func (g *gate) stuck(now time.Time) bool {
	return g.keeper != nil && g.trip != nil && g.trip.kind == tripHung && now.Sub(g.trip.at) >= g.stall
}

// restart has an engine started again that hangs, or does not answer any more though it has a process.
func (g *gate) restart(cause error) {
	switch {
	case g.keeper == nil:
	case errors.Is(cause, errHung):
		g.keeper.Restart("hung")
	default:
		g.keeper.Restart("gone")
	}
}

// watchDown looks after requests in an engine that is not up any more. vLLM that was told to stop may close its port
// and keep its clients waiting for ever; others finish what they have. So they get time, as long as answers come, and
// more of it where the engine may only be slow. One that answers, and says no, is at work for all we know.
func (g *gate) watchDown(now time.Time, st Status, err error) error {
	most := g.stall / 4
	switch slow := errors.Is(err, context.DeadlineExceeded); {
	case st.Gone:
		most = goneGrace
	case slow, st.Gauges.Asleep:
		most = g.stall
	case err == nil && !st.Ill:
		g.down = time.Time{}
		return nil
	}
	// With nothing in flight nobody is kept waiting; but one that we could start again takes nothing in while it is ill.
	idle := g.busy() == 0 && (g.keeper == nil || st.Gone || st.Gauges.Asleep)
	if g.down.IsZero() || g.downAnswers != g.answers || idle {
		g.down, g.downAnswers = now, g.answers
	}
	if now.Sub(g.down) < most {
		return nil
	}
	g.down = now
	return errGone
}

// quota is how many lines may run at once: none, one at a time, or (-1) as many as the limit says.
func (g *gate) quota() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.draining, g.status.State != proto.EngineReady, g.idle.state != "":
		return 0
	case g.trip == nil:
		return -1
	case g.trip.kind == tripUnreached, time.Now().Before(g.trip.until):
		return 0
	}
	return 1
}

// view is the state of the engine, why it does not run, and how long it took until it was ready first.
func (g *gate) view() (state, reason string, st Status, loaded time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	state, reason = g.stateLocked()
	return state, reason, g.status, g.loaded
}

func (g *gate) stateLocked() (state, reason string) {
	switch {
	case g.draining:
		return proto.EngineDraining, "worker is stopping"
	case g.status.State == "":
		return proto.EngineWaiting, fmt.Sprintf("engine at %s has not answered yet", g.engine)
	case g.status.State != proto.EngineReady:
		return g.status.State, g.status.Reason
	case g.idle.state != "":
		return g.idle.state, g.idle.reason
	case g.trip != nil:
		return g.trip.state, g.trip.reason
	}
	return g.stateWell()
}

// show logs a change and passes the quota on.
func (g *gate) show() {
	g.mu.Lock()
	state, reason := g.stateLocked()
	due := g.diary.due(state, reason, time.Now())
	models, kept := g.status.Models, g.status.Gone
	g.mu.Unlock()
	if due {
		switch state {
		case proto.EngineReady:
			if reason != "" {
				g.log.Warn("engine fails many requests", "engine", g.engine.String(), "reason", reason)
				break
			}
			g.log.Info("engine is ready", "engine", g.engine.String(), "models", models)
		case proto.EngineDraining:
			g.log.Info("worker is stopping", "engine", g.engine.String())
		case proto.EngineNoQueue:
			g.log.Warn("engine is ready, and no queue can be used", "engine", g.engine.String(), "reason", reason)
		default:
			level := slog.LevelWarn
			if kept { // who keeps it has said what is wrong
				level = slog.LevelInfo
			}
			g.log.Log(context.Background(), level, "engine cannot be used", "engine", g.engine.String(), "state", state, "reason", reason)
		}
	}
	g.opened()
}

// drain closes the gate for good. early says that somebody stops it before its work is done: then it is said what keeps
// the engine from working, which may be why.
func (g *gate) drain(early bool) {
	g.mu.Lock()
	state, reason := g.stateLocked()
	if reason == "" && !g.refusals.since.IsZero() && !g.everOK {
		state, reason = proto.EngineWaiting, g.refusing()
	}
	g.draining = true
	kept := g.status.Gone
	g.mu.Unlock()
	if early && reason != "" && state != proto.EngineReady && !kept {
		g.log.Warn("stopped while the engine could not be used", "engine", g.engine.String(), "state", state, "reason", reason)
	}
	g.show()
}

// without says why there is nothing to pull from; zero: there is.
func (g *gate) without(why lack) {
	g.mu.Lock()
	g.idle = why
	g.mu.Unlock()
}

// answered says whether a line has succeeded of late.
func (g *gate) answered(within time.Duration) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.lastOK.IsZero() && time.Since(g.lastOK) < within
}

// wasReady says whether the engine has been ready, ever.
func (g *gate) wasReady() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.loaded > 0
}

// serves says whether the engine lists a model.
func (st *Status) serves(model string) bool { return slices.Contains(st.Models, model) }
