package worker

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"millrace/proto"
)

// What follows from attempts that an engine did not survive, or may not have.

// unreached deals with a line that the engine never had.
func (s *session) unreached(o *outcome) {
	if o.answer.Status != 0 { // it answers, but takes nothing in
		s.gate.close(tripDead, proto.EngineWaiting, "engine is stopping: "+o.message)
	} else {
		s.gate.close(tripUnreached, proto.EngineWaiting, unreachable(s.Engine.String(), errors.New(o.message), s.gate.wasReady()))
	}
	s.giveBack(o.line, 0, "engine")
}

// died deals with a line that was in an engine when it died.
func (s *session) died(o *outcome) {
	known := s.gate.knew(o.started)
	seen := s.gate.died(o.started, "engine died: "+o.message)
	if known || o.trial && !seen && !o.stubborn() { // it was dead before
		s.giveBack(o.line, o.pause(s.refusal), "engine")
		return
	}
	s.suspect(o.line, "the engine died while it had this line: "+o.message)
}

// suspect sends a line back with one more death to its name, unless others are rather to blame. A line that was alone
// with the engine twice is the cause: once may be chance.
func (s *session) suspect(l *line, what string) {
	if l.excused {
		s.giveBack(l, 0, "engine")
		return
	}
	next := *l.req
	next.Suspicions++
	if l.alone {
		next.Alone++
	}
	end := func() {
		o := &outcome{line: l, verdict: verdict{class: classPermanent, code: proto.CodeEngineCrash,
			message: proto.Truncate(fmt.Sprintf("%s; engines died %d times while they had it, and %d of these times it was alone", what, next.Suspicions, next.Alone), proto.MaxMessage)}, took: time.Since(l.started)}
		s.publish(l, s.result(o))
	}
	if next.Alone >= 2 && next.Suspicions >= guilty {
		s.Log.Warn("a line stops its engine even alone", "job", l.req.Job, "index", l.req.Index, "suspicions", next.Suspicions)
		end()
		return
	}
	s.metrics.givenBack.WithLabelValues("suspect").Inc()
	s.resend(l, &next, end)
}

// brokenGrace is for how long the engine must look well after a connection broke, until that is thought an accident:
// a dying engine answers probes for a while.
const brokenGrace = 3 * time.Second

// broken deals with a line whose answer did not come whole, and decides whether the engine died.
func (s *session) broken(o *outcome) {
	for until := time.Now().Add(s.grace); ; {
		s.gate.fresh(s.stopped)
		switch {
		case s.gate.diedSince(o.started):
			s.died(o)
			return
		case s.stopped.Err() != nil:
			s.giveBack(o.line, 0, "stopped")
			return
		case time.Now().After(until):
			if o.closed && o.deliveries <= mostStale {
				s.giveBack(o.line, 0, "connection")
				return
			}
			s.gate.note(o)
			s.blame(o)
			s.retry(o)
			return
		}
		wait(s.stopped, s.grace/6)
	}
}

// mostStale is how often a line may come back because a connection was closed in the moment when it was used for it again.
// More often than that, it is no chance.
const mostStale = 3

// mayBeDeath says whether a failed attempt may be the last word of an engine that dies, in words that are not known:
// whatever the status of its answer is from 500 on.
func (o *outcome) mayBeDeath() bool {
	return o.class == classRetry && o.answer.Status >= http.StatusInternalServerError
}

// deadAfterAll waits for a while, and then deals with a line whose error turns out to be the death of its engine.
func (s *session) deadAfterAll(o *outcome, most time.Duration) bool {
	wait(s.taking, most) // a worker that stops does not wait
	if !o.mayBeDeath() {
		return false
	}
	if !s.gate.lookedSince(o.started.Add(o.took)) {
		s.gate.fresh(s.stopped)
	}
	if !s.gate.diedSince(o.started) {
		return false
	}
	s.died(o)
	return true
}

// hung deals with a line that was at an engine while that made nothing for long. The line may be the reason; but an
// engine that hangs for another one must not fail it.
func (s *session) hung(l *line) {
	switch {
	case l.trial && !l.stubborn():
		s.giveBack(l, l.pause(s.refusal), "engine")
	case l.alone && l.req.Suspicions >= guilty-2:
		took := time.Since(l.started)
		s.retry(&outcome{line: l, took: took, verdict: verdict{class: classTimeout, code: proto.CodeRequestTimeout,
			message: fmt.Sprintf("the engine, which had this line alone, made no token for %s; --stall-timeout says how long that may be", took.Round(time.Second))}})
	default:
		s.suspect(l, "the engine made no progress while it had this line")
	}
}
