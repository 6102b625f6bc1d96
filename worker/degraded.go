package worker

import (
	"fmt"
	"time"

	"millrace/proto"
)

// A mispointed worker must not turn a million lines into errors faster than the healthy ones answer; and a job whose
// every line is wrong must still end. The rule, in one place:
//
//   - equalLimit errors in a row that are alike (status, code, message but for numbers and quoted text), permanent or
//     charged, without one success in between, close the gate: the engine is degraded. One is enough where an engine
//     that is not proven (doubt.go) does not have the route of a line.
//   - While it is closed, lines that fail alike are given back uncharged, and so are those that were in doubt.
//   - It opens again at once when the engine is proven and no other ready worker serves the model: then it is rather
//     the lines that are wrong, and nobody else would do better.
//   - Otherwise one line is let through after 1, 2 and 4 s, after RetryEvery at most; where there is another worker, or
//     no route, every RetryEvery. A success opens the gate, and so does another error.
//   - When patience lines in a row went alike, and after none of them another ready worker served the model, the gate
//     opens: the lines fail, which ends them. While there is such a worker, the gate stays closed and the lines are
//     that worker's. Where nobody can tell, there may be one.
//   - An error for which the gate was opened does not close it again before a success; but every RetryEvery it is
//     asked again whether there is such a worker now, and if so it closes. Until then the worker goes on to say that
//     it is degraded: it is nobody's better choice.
//
// What was already published stays: nobody asks for those lines again.
type equalErrors struct {
	same     string
	model    string // of the last line
	message  string // of the last line
	route    string // of the last line, where an engine that is not proven does not have it
	n        int
	pardoned string
	review   time.Time // not before this it is asked again whether the pardon stands
}

const (
	equalLimit = 20
	patience   = 3
)

// add counts an error and says whether the gate is to close.
func (e *equalErrors) add(o *outcome, proven bool) bool {
	if o.same != e.same {
		e.same, e.n = o.same, 0
	}
	e.model, e.message, e.route = o.queue.model, o.said(), ""
	if o.noRoute && !proven {
		e.route = o.req.URL
	}
	e.n++
	return (e.n >= equalLimit || e.route != "") && o.same != e.pardoned
}

// success is called for each line, started at a time, that the engine answered well.
func (g *gate) success(started time.Time) {
	g.mu.Lock()
	g.everOK, g.lastOK = true, time.Now()
	g.equal = equalErrors{}
	g.resolve(true, func(*doubt) bool { return true })
	told := g.heard()
	open := g.answeredLocked(started) || told
	g.mu.Unlock()
	if open {
		g.show()
	}
}

// answeredLocked takes note of an answer that shows the engine alive. It says whether that opens the gate: what was in
// the engine before it began to refuse the key tells nothing about the key.
func (g *gate) answeredLocked(started time.Time) bool {
	g.answers++
	g.deaths = 0
	t := g.trip
	if t == nil || t.kind == tripUnreached || t.kind == tripDead && time.Now().Before(t.until) ||
		t.kind == tripDenied && started.Before(t.at) {
		return false
	}
	g.trip = nil
	return true
}

// failed is called for each line that the engine answered with an error.
func (g *gate) failed(o *outcome) {
	g.mu.Lock()
	g.heard()
	t := g.trip
	alike := o.same == g.equal.same
	tooMany := g.equal.add(o, g.proven())
	judge := false
	switch now := time.Now(); {
	case t == nil && tooMany:
		judge = g.degrade()
	case t == nil && o.same == g.equal.pardoned && now.After(g.equal.review):
		g.equal.review = now.Add(g.retry)
		judge = true
	case t != nil && t.kind == tripDegraded && alike:
		if now.After(t.until) {
			t.tries++
			t.until = now.Add(g.pause(tripDegraded))
			judge = true
		}
	default:
		g.answeredLocked(o.started)
	}
	g.mu.Unlock()
	if judge {
		g.judge()
	}
	g.show()
}

// degrade closes the gate of a degraded engine. Called with mu held.
func (g *gate) degrade() bool {
	g.resolve(false, func(d *doubt) bool { return d.same == g.equal.same })
	return g.closeLocked(tripDegraded, proto.EngineDegraded, g.equal.reason())
}

// reason says what is wrong with a degraded engine.
func (e *equalErrors) reason() string {
	if e.pardoned != "" {
		return "engine fails all lines alike, and nobody else serves " + e.model + ", so they are let fail: " + e.message
	}
	if e.route != "" {
		return fmt.Sprintf("engine has no route %s (%s); is its address right, and does it serve such requests?", e.route, e.message)
	}
	return fmt.Sprintf("engine failed %d lines in a row alike: %s", equalLimit, e.message)
}

// judge applies the rule to a degraded engine.
func (g *gate) judge() {
	g.mu.Lock()
	model := g.equal.model
	g.mu.Unlock()
	g.others(model, func(others bool) {
		g.mu.Lock()
		switch t := g.trip; {
		case t != nil && t.kind == tripDegraded && others:
			t.tries, t.until = 0, time.Now().Add(g.retry)
		case t != nil && t.kind == tripDegraded && (g.proven() || t.tries >= patience):
			g.equal.pardoned, g.equal.review = g.equal.same, time.Now().Add(g.retry)
			g.trip = nil
		case t == nil && others && g.equal.pardoned != "":
			g.equal.pardoned = ""
			g.degrade()
		}
		g.mu.Unlock()
		g.show()
	})
}
