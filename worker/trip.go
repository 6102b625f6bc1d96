package worker

import (
	"fmt"
	"time"

	"millrace/proto"
	"millrace/worker/load"
)

// trip is why lines closed the gate.
type trip struct {
	kind   tripKind
	state  string
	reason string
	at     time.Time
	until  time.Time   // not before this a probe or a line may clear it
	tries  int         // lines that were let through and went alike
	gauges load.Gauges // when it hung
	failed bool        // a probe has failed since
}

type tripKind int

const (
	tripUnreached tripKind = iota
	tripDead
	tripDenied
	tripDegraded
	tripHung
)

// close trips the gate, unless a trip of this kind is in force.
func (g *gate) close(kind tripKind, state, reason string) {
	g.mu.Lock()
	fresh := g.closeLocked(kind, state, reason)
	g.mu.Unlock()
	if fresh {
		g.hurry()
	}
	g.show()
}

// closeLocked says whether the trip is a new one. Called with mu held.
func (g *gate) closeLocked(kind tripKind, state, reason string) bool {
	now := time.Now()
	if t := g.trip; t != nil && (t.kind == kind || t.kind == tripHung) {
		if kind != tripUnreached && now.After(t.until) { // the line that was let through went the same way
			t.tries++
			t.until = now.Add(g.pause(kind))
			t.reason = reason
		}
		return false
	}
	g.trip = &trip{kind: kind, state: state, reason: reason, at: now, until: now.Add(g.pause(kind))}
	if kind == tripDead || kind == tripUnreached {
		g.lastDeath, g.health = now, health{}
	}
	g.heard() // the trip says now why nothing moves
	return true
}

// dying says whether lines found the engine dead, or nobody there, and nothing has shown yet that it is back. Called with mu held.
func (g *gate) dying() bool {
	return g.trip != nil && (g.trip.kind == tripDead || g.trip.kind == tripUnreached)
}

// pause is how long the gate stays closed at least. Called with mu held.
func (g *gate) pause(kind tripKind) time.Duration {
	switch {
	case kind == tripDenied && g.everOK && g.trip == nil:
		return min(time.Second, g.retry) // the key was right before: it may be the line
	case kind == tripDegraded && g.equal.route == "":
		tries := 0
		if g.trip != nil {
			tries = g.trip.tries
		}
		return min(time.Second<<min(tries, 10), g.retry)
	case kind == tripDenied, kind == tripDegraded, kind == tripHung:
		return g.retry
	}
	g.deaths++
	d := 250 * time.Millisecond
	if kind == tripDead {
		d = time.Second // /health still says 200 for up to 0.35 s after the engine's death
	}
	return min(d<<min(g.deaths-1, 6), 10*time.Second, g.retry)
}

// diedSince says whether the engine was found gone at any time after t.
func (g *gate) diedSince(t time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.lastBad.After(t) || g.lastDeath.After(t)
}

// died closes the gate because a line that was started at a time found the engine dead. When the engine has been
// found gone and well again meanwhile, nothing is left to wait for. It says whether it was found gone before.
func (g *gate) died(started time.Time, reason string) bool {
	g.mu.Lock()
	gone := g.lastBad.After(started)
	if g.status.State == proto.EngineReady && g.trip == nil && (gone || g.lastDeath.After(started)) {
		g.mu.Unlock()
		return true
	}
	fresh := g.closeLocked(tripDead, proto.EngineWaiting, reason)
	if gone && g.trip.kind == tripDead {
		g.trip.failed = true
	}
	g.mu.Unlock()
	if fresh {
		g.hurry()
	}
	g.show()
	return gone
}

// clearByProbe clears a trip that a probe may clear. Called with mu held.
func (g *gate) clearByProbe(begun time.Time, st Status) {
	t := g.trip
	if t == nil {
		return
	}
	if st.State != proto.EngineReady {
		t.failed = true
		return
	}
	early := t.kind == tripHung || t.kind == tripDead && t.failed && g.deaths <= 2 // it has been gone, and is back
	if begun.Before(t.at) || !early && begun.Before(t.until) {
		return
	}
	switch t.kind {
	case tripUnreached:
		g.trip = nil
	case tripDead:
		if t.failed {
			g.trip = nil
		}
	case tripHung:
		if t.failed || g.hang.moved(t.gauges, st.Gauges) {
			g.trip = nil
			g.hang.reset(begun)
		}
	}
}

// knew says whether the engine was known to be dead at a time, and nothing was let through to it.
func (g *gate) knew(at time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	t := g.trip
	return t != nil && t.kind == tripDead && at.After(t.at) && at.Before(t.until)
}

// tripHung closes the gate of a hung engine. Called with mu held.
func (g *gate) tripHung(now time.Time, idle time.Duration, gauges load.Gauges) {
	g.hang.reset(now)
	g.heard()
	if g.trip == nil || g.trip.kind != tripHung {
		what := "restart it"
		if g.keeper != nil {
			what = "it is started again if that stays so"
		}
		g.trip = &trip{kind: tripHung, state: proto.EngineHung, at: now,
			reason: fmt.Sprintf("engine has requests and made no token for %s; %s", idle.Round(100*time.Millisecond), what)}
	}
	g.trip.until, g.trip.gauges = now.Add(g.retry), gauges
}

// stood says whether the engine, as its metrics tell, did nothing at all since a line was started at a time, and
// closes the gate if so: a line may have less time than the stall timeout.
func (g *gate) stood(started time.Time) bool {
	now := time.Now()
	g.mu.Lock()
	if g.trip != nil && g.trip.kind == tripHung && g.trip.at.After(started) {
		g.mu.Unlock()
		return true // another line has found it
	}
	stood := g.status.State == proto.EngineReady && g.status.Gauges.Known && g.last.After(started) &&
		!g.hang.since.IsZero() && !g.hang.since.After(started) && g.hang.answers == g.answers
	if stood {
		g.tripHung(now, now.Sub(started), g.status.Gauges)
	}
	g.mu.Unlock()
	if stood {
		g.show()
	}
	return stood
}
