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
	reason string    // what is said of the engine; empty: it may only be busy for a moment
}

// refused is called for each line that came back so, and is given back for a while. When that goes on for RetryEvery,
// and not one of the lines that the engine had at the beginning was answered, it is said once, until the engine answers.
func (g *gate) refused(what string, rest time.Duration) {
	now := time.Now()
	g.mu.Lock()
	if now.After(g.refusals.until) {
		g.refusals = refusals{since: now}
	}
	if until := now.Add(rest + g.retry); until.After(g.refusals.until) {
		g.refusals.until = until
	}
	since := g.refusals.since
	long := g.refusals.reason == "" && now.Sub(since) >= g.retry
	g.mu.Unlock()
	if !long || g.inside(since) {
		return
	}
	g.mu.Lock()
	if g.refusals.since.Equal(since) { // or it has answered meanwhile
		g.refusals.reason = fmt.Sprintf("engine at %s refuses requests: %s; waiting", g.engine, what)
	}
	g.mu.Unlock()
	g.show()
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
	return proto.EngineReady, ""
}
