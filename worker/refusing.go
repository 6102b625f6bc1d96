package worker

import (
	"fmt"
	"time"

	"millrace/proto"
)

// refusals are since when an engine gives lines back unanswered: it is too busy (503, 429), or aborts them. No line is
// charged for that and the gate stays open, so nothing else would tell a user why the job does not move.
type refusals struct {
	since  time.Time // the first after the last answer; zero: none
	until  time.Time // RetryEvery after the lines that were given back are due again: without another one they are over
	said   string    // by the engine, the last time
	reason string    // what is said of the engine; empty: it may only be busy for a moment
}

// For how long an engine does nothing but refuse until that is said: one that was well may be busy for a moment, of one
// that has answered no line well yet somebody waits to hear what is wrong with it.
const (
	refusedNew  = 2 * time.Second
	refusedWell = 10 * time.Second
)

// refused is called for each line that came back so, and is given back for a while.
func (g *gate) refused(what string, rest time.Duration) {
	now := time.Now()
	g.mu.Lock()
	if now.After(g.refusals.until) {
		g.refusals = refusals{since: now}
		time.AfterFunc(g.refusedFor(), g.hurry) // the next line may come back later than that; the probe tells then
	}
	g.refusals.said = what
	if until := now.Add(rest + g.retry); until.After(g.refusals.until) {
		g.refusals.until = until
	}
	g.mu.Unlock()
	if g.tell() {
		g.show()
	}
}

// tell says, once until the engine answers, that it has refused for long, where not one of the lines that it had at the
// beginning was answered. It returns whether there is something to show.
func (g *gate) tell() bool {
	g.mu.Lock()
	since := g.refusals.since
	long := !since.IsZero() && g.refusals.reason == "" && time.Since(since) >= g.refusedFor()
	g.mu.Unlock()
	if !long || g.inside(since) {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.refusals.since.Equal(since) { // it has answered meanwhile
		return false
	}
	g.refusals.reason = g.refusing()
	return true
}

// refusedFor is how long it refuses until that is said. Called with mu held.
func (g *gate) refusedFor() time.Duration {
	if g.everOK {
		return min(refusedWell, g.retry)
	}
	return min(refusedNew, g.retry)
}

// refusing is what is said of an engine that refuses. Called with mu held.
func (g *gate) refusing() string {
	return fmt.Sprintf("engine at %s refuses requests: %s; waiting", g.engine, g.refusals.said)
}

// heard forgets the refusals, because the engine has answered a line, or they are over, and says whether they were told
// of. Called with mu held.
func (g *gate) heard() bool {
	told := g.refusals.reason != ""
	g.refusals = refusals{}
	return told
}

// stateWell is the state of an engine whose gate is open. Called with mu held.
func (g *gate) stateWell() (state, reason string) {
	switch {
	case g.refusals.reason != "":
		return proto.EngineWaiting, g.refusals.reason
	case g.equal.pardoned != "":
		return proto.EngineDegraded, g.equal.reason()
	}
	return proto.EngineReady, g.health.text
}
