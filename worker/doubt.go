package worker

import (
	"context"
	"slices"
	"time"
)

// doubt is an error of which it must show whether it is the line's or the engine's. The engine's it may be
//
//   - while the engine is degraded, and this error condemns it as well (degraded.go): the line is given back at once.
//     So is a line that went in before the success which ended that: the engine was still degraded when it had the line.
//   - when the engine has answered no line well since it was last found gone: it is not proven. Then the error waits:
//     until such an answer comes, which makes it the line's; until the engine is degraded, which makes it the engine's;
//     or until a short time is over, because a job of few lines may have no others to tell by. Then another ready worker
//     of the model, if there is one, gets the line; what a second worker fails too is the line's.
//
// About equalLimit wait at most: so many errors, of whatever kind, degrade an engine that is not proven.
type doubt struct {
	ours chan bool // gets whether the error is the line's; room for one
}

// doubt returns nil where an error of a line, started at a time, is the line's for sure.
func (g *gate) doubt(same string, started time.Time) *doubt {
	g.mu.Lock()
	defer g.mu.Unlock()
	d := &doubt{make(chan bool, 1)}
	switch {
	case g.condemns(same, started):
		d.ours <- false
	case same == "", g.equal.pardons(same), g.proven():
		return nil
	default:
		g.doubts = append(g.doubts, d)
	}
	return d
}

// believe waits until a doubt is over, and says whether the error is the line's. A worker that stops leaves it to others.
func (g *gate) believe(ctx context.Context, d *doubt, most time.Duration) bool {
	timer := time.NewTimer(most)
	defer timer.Stop()
	own := false
	select {
	case own = <-d.ours:
	case <-timer.C:
		own = true
	case <-ctx.Done():
	}
	g.mu.Lock()
	g.doubts = slices.DeleteFunc(g.doubts, func(have *doubt) bool { return have == d })
	g.mu.Unlock()
	select {
	case own = <-d.ours: // it came in the same moment, and counts
	default:
	}
	return own
}

// elsewhere leaves a line whose error is still in doubt to another ready worker of its model, and says whether there is one
// that has not failed it before. The line's history tells the other one of ours, and once is enough: what two engines fail is
// the line's fault. The attempt is charged, or, where none is left (--max-attempts 1), only noted: a line that is right must not
// fail by one engine that may fail any.
func (s *session) elsewhere(o *outcome) bool {
	ours := o.req.Doubted == s.id
	theirs := o.req.Doubted != "" && !ours
	for i := range o.req.Attempts {
		if o.req.Attempts[i].Worker != s.id {
			theirs = true
		}
		ours = true
	}
	switch {
	case theirs, s.gate.trusted(), !s.beat.others(s.stopped, o.queue.model):
		return false
	case ours:
		s.giveBack(o.line, o.pause(s.refusal), "doubted")
	case s.last(o):
		s.metrics.givenBack.WithLabelValues("doubted").Inc()
		next := *o.req
		next.Doubted = s.id
		s.resend(o.line, &next, func() { s.publish(o.line, s.result(o)) })
	default:
		s.metrics.retries.WithLabelValues(o.code).Inc()
		s.resend(o.line, s.charged(o), func() { s.publish(o.line, s.result(o)) })
	}
	return true
}

// resolve ends all doubts. Called with mu held.
func (g *gate) resolve(ours bool) {
	for _, d := range g.doubts {
		d.ours <- ours
	}
	g.doubts = nil
}

// proven says whether the engine has answered a line well since it was last found gone. Called with mu held.
func (g *gate) proven() bool { return g.everOK && g.lastOK.After(g.lastBad) }

// trusted is proven for those who do not hold mu.
func (g *gate) trusted() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.proven()
}

// condemns says whether the engine is degraded by errors like this one, of a line started at a time; by any, while it
// is not proven. Or whether it was degraded when the line went in. Called with mu held.
func (g *gate) condemns(same string, started time.Time) bool {
	switch {
	case same == "":
		return false
	case started.Before(g.mended):
		return true
	}
	return g.trip != nil && g.trip.kind == tripDegraded && (same == g.equal.same || !g.proven())
}

// condemned is condemns for those who do not hold mu.
func (g *gate) condemned(same string, started time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.condemns(same, started)
}
