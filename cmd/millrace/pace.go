package main

import (
	"fmt"
	"time"

	"millrace/aggregator"
)

// pace tells how fast a job goes of late, and how long it still takes.
type pace struct{ aggregator.Rate }

// paceLately is long enough for a rate, and short enough to see that a job has come to its last lines.
const paceLately = 15 * time.Second

// settled says whether the rate tells how the job goes on: not while the first lines come, of which the short ones are
// before the others. Until a minute has passed it takes some lines, and that both halves of the time tell about the same.
func (p *pace) settled(now time.Time) bool {
	const some, about = 20, 4. / 3
	all, _, over := p.Per(now, aggregator.RateWindow)
	half, _, _ := p.Per(now, over/2)
	return over >= aggregator.RateWindow || over >= paceLately && all*over.Seconds() >= some && half < about*all && all < about*half
}

// say tells the rates, and the time that left lines take at them once these rest on enough; empty as long as there is
// nothing to tell.
func (p *pace) say(now time.Time, left int64) rates {
	per, tokens, over := p.Per(now, aggregator.RateWindow)
	if over < time.Second {
		return rates{}
	}
	f := rates{lines: fmt.Sprintf(", %.1f lines/s", per), tokens: fmt.Sprintf(", %.0f output tok/s", tokens), over: " in the last " + span(over)}
	lately, _, _ := p.Per(now, paceLately)
	if slow := min(per, lately); slow > 0 && p.settled(now) { // the last lines of a job may be slower than those before
		secs := min(float64(left)/slow, (100 * 365 * 24 * time.Hour).Seconds())
		f.left = fmt.Sprintf(", %s left", span(time.Duration(secs*float64(time.Second))))
	}
	return f
}

// rates are what is told of how a job goes, for people; what is empty is not known, or is nothing.
type rates struct{ failed, lines, tokens, over, left string }

func (f rates) String() string { return f.failed + f.lines + f.tokens + f.over + f.left }

// least is what is told however narrow the terminal is.
func (f rates) least() string { return f.failed + f.left }

// fit is what is told beside a bar in a row that has so many columns for both. The bar shrinks below goodBar before the
// rate of lines goes, and what least has never goes.
func (f rates) fit(columns int) string {
	brief := f.failed + f.lines + f.left
	for _, s := range []string{f.String(), f.failed + f.lines + f.tokens + f.left, brief} {
		if len(s)+goodBar <= columns {
			return s
		}
	}
	if len(brief)+leastBar <= columns {
		return brief
	}
	return f.least()
}

// Columns of a bar, with the space around it, that show well, and at all, how far it is.
const (
	goodBar  = 20
	leastBar = 8
)
