package main

import (
	"fmt"
	"time"
)

// pace tells how fast a job goes of late: over the last paceWindow, or since the first look where that is less. It uses
// the clock of this process alone.
type pace struct {
	looks []paceLook // a second apart at least, the first one no newer than the window reaches
	moved bool       // something has ended since the first look
}

type paceLook struct {
	when          time.Time
	lines, tokens int64 // that had ended, and their completion tokens
}

const paceWindow = time.Minute

// add notes how far a job is.
func (p *pace) add(now time.Time, lines, tokens int64) {
	if len(p.looks) > 0 && lines < p.looks[0].lines { // the aggregator lost what it had, and counts anew
		*p = pace{}
	}
	n := len(p.looks)
	p.moved = p.moved || n > 0 && lines != p.looks[0].lines
	if n == 0 || now.Sub(p.looks[n-1].when) >= time.Second {
		p.looks = append(p.looks, paceLook{now, lines, tokens})
	}
	for len(p.looks) > 1 && now.Sub(p.looks[1].when) >= paceWindow {
		p.looks = p.looks[1:]
	}
}

// say renders the rates, and the time that left lines take at them; empty as long as there is nothing to tell.
func (p *pace) say(now time.Time, lines, tokens, left int64) string {
	if !p.moved {
		return ""
	}
	old := p.looks[0]
	d := now.Sub(old.when)
	if d < time.Second {
		return ""
	}
	per := float64(lines-old.lines) / d.Seconds()
	s := fmt.Sprintf(", %.1f lines/s, %.0f output tok/s in the last %s", per, float64(tokens-old.tokens)/d.Seconds(), span(d))
	if slow := min(per, p.lately(now, lines)); slow > 0 { // the last lines of a job may be slower than those before
		secs := min(float64(left)/slow, (100 * 365 * 24 * time.Hour).Seconds())
		s += fmt.Sprintf(", %s left", span(time.Duration(secs*float64(time.Second))))
	}
	return s
}

// paceLately is long enough for a rate, and short enough to see that a job has come to its last lines.
const paceLately = 15 * time.Second

// lately is how many lines a second have ended in the last paceLately, or since the first look.
func (p *pace) lately(now time.Time, lines int64) float64 {
	old := p.looks[0]
	for _, l := range p.looks {
		if now.Sub(l.when) < paceLately {
			break
		}
		old = l
	}
	return float64(lines-old.lines) / now.Sub(old.when).Seconds()
}
