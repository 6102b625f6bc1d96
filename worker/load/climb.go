package load

import (
	"fmt"
	"math"
	"time"
)

// climb finds how many sequences to have at once by what comes of it, for an engine that tells neither what it holds
// nor what it does. It doubles the number while that pays, then tries what lies between the best and its neighbours,
// and settles on the best; it begins again when the lines have become others.
//
// What comes of a number is measured over whole generations of lines: when it was changed, all that were in flight have to
// end first, and then as many again as may be, several times over. Lines of one length end all at once.
type climb struct {
	n           float64 // sequences
	least, most float64

	best, rate float64 // the number that made most, and what it made a second
	lines      float64 // sequences a second at best
	size       float64 // work of a sequence at best
	step       float64 // by which it goes up at first; above fineStep it knows little
	factor     float64 // from best to n; 0: the first number
	settled    bool
	few        int     // looks in a row that found fewer than n
	ended      float64 // sequences, since the last look

	trial trial
}

// trial is the measurement of a number.
type trial struct {
	skip  float64 // sequences that have to end before it begins
	want  float64 // sequences that it goes on for
	again bool    // it was prolonged
	began time.Time
	last  time.Time
	ended float64
	work  float64
}

const (
	workOfOutput = 4    // of an output token, in prompt tokens, at what an engine does well
	pays         = 1.05 // a larger number is worth it from here on
	fineStep     = 1.41
	leastEnded   = 64 // sequences that a measurement takes at least
)

// finished takes in n sequences that were answered, and their work.
func (c *climb) finished(n, work float64, now time.Time) {
	w := &c.trial
	c.ended += n
	switch {
	case c.n == 0 || w.want == 0:
	case w.skip > 0:
		w.skip -= n
		w.began = now
	default:
		w.ended, w.work, w.last = w.ended+n, w.work+max(work, 1), now
	}
}

// look moves n where the measurement is complete. inFlight is how many sequences there are.
func (c *climb) look(inFlight float64) {
	w := &c.trial
	if c.few++; inFlight >= 0.9*math.Floor(c.n) || c.ended >= c.n { // as many may have been there, and be over
		c.few = 0
	}
	c.ended = 0
	switch {
	case w.want == 0, c.few > 1: // what comes shows nothing of n; one such look is between two generations
		c.measure()
		return
	case w.ended < c.n || !w.last.After(w.began):
		return
	}
	rate := w.work / w.last.Sub(w.began).Seconds()
	if w.ended < w.want && (c.settled || c.factor == 0 || rate > 0.8*c.rate && rate < 1.3*c.rate) {
		return // not clear yet
	}
	if c.settled {
		c.keep(rate)
		return
	}
	if doubt := rate / max(c.rate, 1e-9); c.factor != 0 && !w.again && doubt > 0.95 && doubt < 1.15 {
		w.again, w.want = true, 2*w.want
		return
	}
	c.judge(rate)
}

// measure begins a measurement of n.
func (c *climb) measure() {
	generations := max(2, math.Ceil(leastEnded/c.n))
	c.trial = trial{skip: c.n, want: generations * c.n}
}

// judge decides what to try next, n having made so much a second.
func (c *climb) judge(rate float64) {
	w := c.trial
	better := c.factor == 0 || rate > pays*c.rate || c.factor < 1 && rate > 1.02*c.rate
	if better {
		c.best, c.rate, c.lines, c.size = c.n, rate, w.ended/w.last.Sub(w.began).Seconds(), w.work/w.ended
	}
	switch {
	case c.factor == 0 || better && c.factor == c.step:
		c.try(c.step)
	case better, c.step <= fineStep: // on with the finer steps
		c.settle()
	case c.factor == c.step:
		c.try(fineStep)
	case c.factor > 1:
		c.try(1 / fineStep)
	default:
		c.settle()
	}
}

// try makes n a multiple of the best, or settles where there is none.
func (c *climb) try(factor float64) {
	n := min(max(c.best*factor, c.least), c.most)
	if n == c.best {
		if factor > 1 && c.step > fineStep {
			c.try(1 / fineStep)
			return
		}
		c.settle()
		return
	}
	c.n, c.factor = n, factor
	c.measure()
}

func (c *climb) settle() {
	c.n, c.settled = c.best, true
	c.measure()
}

// keep watches a number that was settled on, and begins again when lines have become others.
func (c *climb) keep(rate float64) {
	w := c.trial
	size := w.work / w.ended
	if apart(size, c.size, otherLines) {
		*c = climb{n: c.n, least: c.least, most: c.most, step: c.step}
		c.measure()
		return
	}
	c.rate += (rate - c.rate) / 4
	c.lines += (w.ended/w.last.Sub(w.began).Seconds() - c.lines) / 4
	c.measure()
}

// why says what n rests on, where a line is so many sequences.
func (c *climb) why(width float64) string {
	switch {
	case c.rate == 0:
		return fmt.Sprintf("measuring what %.0f in flight make", c.n/width)
	case c.settled && c.best >= c.most:
		return fmt.Sprintf("made %.3g lines a second, most of all; more are not tried", c.lines/width)
	case c.settled:
		return fmt.Sprintf("made %.3g lines a second; more in flight made no more", c.lines/width)
	}
	return fmt.Sprintf("%.0f in flight made %.3g lines a second; trying %.0f", c.best/width, c.lines/width, c.n/width)
}
