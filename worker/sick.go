package worker

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"millrace/proto"
)

// health is how an engine did with the last requests. One that fails many of them is used all the same, since others are
// answered; but the job is slow then, and nothing else would tell a user why. Errors of a line's own do not count.
type health struct {
	last  [50]string // how each failed, or healthy
	n     int        // requests that were counted
	ok    int        // of last that are healthy
	began time.Time  // the first of them
	when  time.Time  // the last of them
	text  string     // what is said of it; empty: it does well
	until time.Time  // so long that is not said anew
}

const (
	healthy   = ""
	sickLeast = 20          // requests to judge by
	sickAnew  = time.Minute // until the figures are told again, and after which it is forgotten how it did
)

// count takes a request in. It says whether that calls for another word on the engine: on one that answers less than half of
// its requests well, until it is three quarters again.
func (h *health) count(how string, now time.Time) bool {
	if now.Sub(h.when) > sickAnew {
		*h = health{began: now}
	}
	at := &h.last[h.n%len(h.last)]
	if h.n >= len(h.last) && *at == healthy {
		h.ok--
	}
	if how == healthy {
		h.ok++
	}
	*at = how
	h.n++
	h.when = now
	n, ok := h.share()
	if h.text == "" {
		return n >= sickLeast && 2*ok < n
	}
	return 4*ok >= 3*n || !now.Before(h.until)
}

// share is how many of the last requests were answered well.
func (h *health) share() (n, ok int) { return min(h.n, len(h.last)), h.ok }

// judge words it.
func (h *health) judge(engine string, now time.Time) {
	n, ok := h.share()
	if 4*ok >= 3*n {
		h.text = ""
		return
	}
	counts := map[string]int{}
	for _, how := range h.last[:n] {
		counts[how]++
	}
	delete(counts, healthy)
	var bad []string
	for _, how := range slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	}) {
		bad = append(bad, fmt.Sprintf("%s: %d", how, counts[how]))
	}
	h.until = now.Add(sickAnew)
	h.text = fmt.Sprintf("engine at %s answered %d of the last %d requests well (%s); the others are tried again", engine, ok, n, strings.Join(bad, ", "))
}

// how names an outcome in what is said of an engine's health, and says whether it counts there.
func (o *outcome) how() (string, bool) {
	switch o.class {
	case classDone:
		return healthy, true
	case classPermanent, classDead: // the latter is said otherwise
		return "", false
	case classLost:
		return "aborted", true
	case classBroken:
		return "connection broke", !o.closed // as idle
	case classUnreached:
		return "no connection", true
	case classTimeout:
		return "too late", true
	}
	if o.code == proto.CodeBadResponse {
		return "no whole answer", true
	}
	return fmt.Sprintf("HTTP %d", o.answer.Status), true
}

// note tells the gate how a request went. What fails by an engine's death is said otherwise, and tells nothing of the engine that
// comes after it. At the beginning, what fails at once comes before what is answered: nothing is said before the requests that
// the engine had then have come back, and some time has passed.
func (g *gate) note(o *outcome) {
	how, counts := o.how()
	if !counts {
		return
	}
	now := time.Now()
	g.mu.Lock()
	due := g.status.State == proto.EngineReady && !g.dying() && g.health.count(how, now)
	began := g.health.began
	g.mu.Unlock()
	if !due || now.Sub(began) < min(refusedWell, g.retry) || g.inside(began) {
		return
	}
	g.mu.Lock()
	g.health.judge(g.engine.String(), now)
	g.mu.Unlock()
	g.show()
}

// diary is what was logged of an engine. A state that was logged less than a minute ago, as of an engine that fails some
// lines and answers others, is logged again only when it lasts; so is another reason for the state that was logged last, as
// one that dies gives several in a second.
type diary struct {
	now   string    // what holds, but for figures
	since time.Time // it holds
	last  string    // what was logged last, but for figures
	state string    // its state
	at    map[string]time.Time
}

const (
	diaryAnew  = time.Minute
	diaryLasts = 5 * time.Second
)

// due says whether to log a state and a reason, and takes it for logged then.
func (d *diary) due(state, reason string, now time.Time) bool {
	s := state + " " + alike(reason)
	if s != d.now {
		d.now, d.since = s, now
	}
	recent := now.Sub(d.at[s]) < diaryAnew
	switch {
	case s == d.last && (recent || state != proto.EngineReady || reason == ""), // only figures change in what is said of a ready one
		(recent || state == d.state && state != proto.EngineReady) && now.Sub(d.since) < diaryLasts:
		return false
	}
	if d.at == nil {
		d.at = map[string]time.Time{}
	}
	maps.DeleteFunc(d.at, func(_ string, at time.Time) bool { return now.Sub(at) >= diaryAnew })
	d.last, d.state, d.at[s] = s, state, now
	return true
}
