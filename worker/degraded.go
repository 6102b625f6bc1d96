package worker

import (
	"fmt"
	"time"

	"millrace/proto"
)

// A mispointed worker must not turn a million lines into errors faster than the healthy ones answer; and a job whose
// every line is wrong must still end. The rule, in one place:
//
//   - equalLimit errors in a row that are alike (status, code, message but for quoted text and words with digits),
//     permanent or charged, a connection that breaks among them, without one success in between, close the gate: the
//     engine is degraded.
//   - Of an engine that is not proven (doubt.go) all errors count as alike, here and below: nothing tells yet that it
//     is not the engine which fails each line in another way. And one is enough where it does not have a line's route.
//   - While it is closed, lines that fail alike are given back uncharged, and so are those that were in doubt.
//   - It opens again at once when the engine is proven and no other ready worker serves the model: then it is rather
//     the lines that are wrong, and nobody else would do better.
//   - Otherwise one line is let through after 1, 2 and 4 s, after RetryEvery at most; where there is another worker, or
//     no route, every RetryEvery. A success opens the gate, and so does another error of a proven engine.
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
	model    string    // of the last line
	message  string    // of the last line
	route    string    // of the last line, where an engine that is not proven does not have it
	n        int       // errors in a row that are the same
	all      int       // errors in a row, of whatever kind, of an engine that is not proven
	pardoned string    // for what error the gate was opened
	allowed  bool      // it was opened for all errors: the engine was not proven
	why      string    // what is said meanwhile
	review   time.Time // not before this it is asked again whether the pardon stands
}

const (
	equalLimit = 20
	patience   = 3
)

const onTrial = "it gets one line at a time until it answers one"

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
	if e.all++; proven {
		e.all = 0
	}
	return (max(e.n, e.all) >= equalLimit || e.route != "") && !e.pardons(o.same)
}

// pardons says whether the gate was opened for errors like this one.
func (e *equalErrors) pardons(same string) bool {
	return e.pardoned != "" && (e.allowed || same == e.pardoned)
}

// pardon lets lines fail by such errors. What is said of it stays, though the next lines fail in other words.
func (e *equalErrors) pardon(proven bool) {
	how := "engine fails all lines"
	if e.n >= equalLimit {
		how = fmt.Sprintf("engine failed %d lines in a row alike", equalLimit)
	}
	e.why = how + ", and nobody else serves " + e.model + ", so such lines are let fail: " + e.message
	e.pardoned, e.allowed = e.same, !proven
}

// success is called for each line, started at a time, that the engine answered well.
func (g *gate) success(started time.Time) {
	g.mu.Lock()
	g.everOK, g.lastOK = true, time.Now()
	if g.trip != nil && g.trip.kind == tripDegraded {
		g.mended = g.lastOK
	}
	g.equal = equalErrors{}
	g.resolve(true)
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

// failed is called for each line that the engine answered with an error, or did not answer whole though it is up.
func (g *gate) failed(o *outcome) {
	g.mu.Lock()
	if o.class != classBroken { // which is no answer
		g.heard()
	}
	t := g.trip
	proven := g.proven()
	alike := o.same == g.equal.same || !proven
	tooMany := g.equal.add(o, proven)
	judge := false
	switch now := time.Now(); {
	case t == nil && tooMany:
		judge = g.degrade()
	case t == nil && g.equal.pardons(o.same) && now.After(g.equal.review):
		g.equal.review = now.Add(g.retry)
		judge = true
	case t != nil && t.kind == tripDegraded && alike:
		if now.After(t.until) {
			t.tries++
			t.until = now.Add(g.pause(tripDegraded))
			judge = true
		}
	case o.class == classBroken:
	default:
		if g.answeredLocked(o.started) && tooMany {
			judge = g.degrade()
		}
	}
	g.mu.Unlock()
	if judge {
		g.judge()
	}
	g.show()
}

// degrade closes the gate of a degraded engine. What is in doubt is so because the engine is not proven. Called with
// mu held.
func (g *gate) degrade() bool {
	g.resolve(false)
	return g.closeLocked(tripDegraded, proto.EngineDegraded, g.equal.reason())
}

// reason says what is wrong with a degraded engine.
func (e *equalErrors) reason() string {
	if e.pardoned != "" {
		return e.why
	}
	if e.route != "" {
		return fmt.Sprintf("engine has no route %s (%s); is its address right, and does it serve such requests?", e.route, e.message)
	}
	if e.n < equalLimit && e.all >= equalLimit {
		return fmt.Sprintf("engine failed %d lines in a row, the last: %s; %s", e.all, e.message, onTrial)
	}
	return fmt.Sprintf("engine failed %d lines in a row alike: %s; %s", equalLimit, e.message, onTrial)
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
			g.equal.pardon(g.proven())
			g.equal.review = time.Now().Add(g.retry)
			g.trip = nil
		case t == nil && others && g.equal.pardoned != "":
			g.equal.pardoned, g.equal.allowed = "", false
			g.degrade()
		}
		g.mu.Unlock()
		g.show()
	})
}
