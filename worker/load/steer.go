package load

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
)

// Steering has two stages.
//
//   - Until as many lines have finished as are in flight, it computes: KV tokens / tokens of a line at its end where
//     pre-emptions are dear, up to KV tokens / tokens of a line halfway where they are cheap. Prompts are measured
//     (tokens in use / running), outputs are guessed from max_tokens and from what was made so far.
//   - From then on it looks back over the life of one line: where the pre-emptions per finished line stay well
//     under what more requests are worth, or the KV cache was never full, it grows; above that it shrinks and waits for
//     one life.
//
// Both weigh pre-emptions by the model of load.go.

const (
	maxLooks = 512
	// requests that run tell how long prompts are from so many on
	seenRunning = 4
	mostGrowth  = 0.25 // of the limit, in the life of a line
	// at first so many are in flight, or that many times what runs: an engine that runs few lets no more than these wait
	leastAtOnce = 64.
	mostAtOnce  = 3
	// of an engine that runs so many at once and no more, that many times seqsMore, and seqsWait, are in flight
	seqsMore, seqsWait = 1.02, 2.
	seqsSteps          = 2.   // or, of short outputs, as many more as end in so many steps
	seqsTurn           = 0.5  // but no more than that share
	seenShort          = 0.94 // of what it runs, at least, a gauge shows that is read when some have just ended, of long outputs
	seenLeast          = 0.8  // and of short ones
)

// look is what a probe saw.
type look struct {
	at       time.Time
	inFlight float64 // sequences of ours
	answers  int     // sequences that were answered, since the start
	g        Gauges
}

// steer moves the limit after a look at the engine.
func (l *Limit) steer(now look) {
	if n := len(l.looks); n > 0 {
		if last := l.looks[n-1].g; now.g.Generation < last.Generation || now.g.Preemptions < last.Preemptions {
			l.forget()
			now.answers = 0
		}
	}
	if now.inFlight == 0 {
		l.uncap()
		l.count, l.made, now.answers = 0, 0, 0
	}
	if len(l.looks) == 0 || now.inFlight == 0 {
		l.first = now
	}
	if now.inFlight < l.base/2 { // what was seen so far says nothing of an engine that is full
		l.looks = l.looks[:0]
	}
	l.looks = append(l.looks, now)
	life := max(time.Duration(l.ended.took*float64(time.Second)), 2*time.Second)
	l.trim(now.at.Add(-life))
	l.gather(cmp.Or(l.slots, l.base))
	if n := l.crowded(); n > 0 {
		l.runs(n)
	}
	switch {
	case !l.steers:
		enough := l.all >= l.enough()
		more := l.begin(now) // the last time with what lines really held
		l.steers = enough && !more
	case now.at.Before(l.hold):
	default:
		l.grow(now, life)
	}
	l.keepToGraphs(now)
}

// keepToGraphs bounds the limit by the engine's CUDA graphs, and frees it where more are no slower.
func (l *Limit) keepToGraphs(now look) {
	line := l.line()
	room := max(line.fits(fill*l.kv), l.base*fill/max(l.use(), 0.01))
	next := l.base
	if l.graphs.weigh(now, l.base, room, line.tokens()) && l.graphs.stage != graphsKeep {
		next = room
	}
	l.set(next)
}

// use is how much of the KV cache was in use at most, in the looks that are kept.
func (l *Limit) use() (most float64) {
	for _, k := range l.looks {
		most = max(most, k.g.KVUsage)
	}
	return most
}

// trim forgets all looks before a time but the last of them.
func (l *Limit) trim(before time.Time) {
	n := len(l.looks)
	i := 0
	for i < n-1 && !l.looks[i+1].at.After(before) || n-i > maxLooks {
		i++
	}
	l.looks = slices.Delete(l.looks, 0, i)
}

// begin sets the limit from what the lines ask for and what is seen of those in flight. It says whether more are to come as
// soon as these run.
func (l *Limit) begin(now look) (more bool) {
	b := l.beginning(now)
	n := b.fits()
	if l.ended.n >= fewLines { // of before the engine's last start
		n = max(n, l.line().fits(b.kv))
	}
	others := max(0, float64(now.g.Running+now.g.Waiting)-now.inFlight)
	n = max(n-others, n/2) // another worker does the same
	few := l.few()
	all := float64(now.g.Running) >= 0.9*l.base
	l.set(min(n, few))
	fits := fmt.Sprintf("KV cache of %.0f tokens", l.kv)
	if n > few {
		fits += fmt.Sprintf(" would hold %.0f, %.0f are enough at first", n, few)
	}
	if l.begun.n == 0 {
		l.why = fmt.Sprintf("%s, lines of up to %.0f; none has come yet", fits, b.prompt)
		return false
	}
	l.why = fmt.Sprintf("%s, lines of %.0f + up to %.0f; few have ended", fits, b.prompt, b.most)
	return min(n, l.seqs) > few && all
}

// few is how many are enough until more are seen to run: the engine may run few, whatever room it has.
func (l *Limit) few() float64 {
	if l.slots > 0 { // that is known
		return math.Inf(1)
	}
	return max(leastAtOnce*float64(max(l.copies, 1)), mostAtOnce*l.ranMost())
}

// ranMost is how many sequences ran at most, in the looks that are kept.
func (l *Limit) ranMost() (most float64) {
	for _, k := range l.looks {
		most = max(most, float64(k.g.Running))
	}
	return most
}

func (l *Limit) beginning(now look) beginning {
	most := l.begun.most
	if most == 0 {
		most = NoMaxTokens
	}
	p := l.prompt(now)
	if l.maxLen > 0 {
		most = min(most, max(1, l.maxLen-p))
	}
	return beginning{kv: fill * l.kv, prompt: p, most: most, made: l.generated(now), answers: float64(now.answers)}
}

// prompt is how many tokens the prompt of a line holds of its own. Before the engine has shown that, a byte is taken
// for a token, which errs on the side of few, and before the first line, its context.
func (l *Limit) prompt(now look) float64 {
	p := l.begun.bytes
	switch {
	case l.begun.n == 0:
		p = cmp.Or(l.maxLen, 4096)
	case l.ended.n > 0 && l.ended.bytes > 0:
		p *= l.ended.prompt / l.ended.bytes
	case l.maxLen > 0:
		p = min(p, l.maxLen)
	}
	ours := float64(now.g.Running) <= now.inFlight*9/8+2 // else there are others, of whom nothing is known
	if r := float64(now.g.Running); ours && now.g.KVUsage > 0 && (r >= 2*seenRunning || r >= seenRunning && now.g.Waiting == 0) {
		made := max(0, l.generated(now)-l.made) // by those in flight
		p = min(p, max(now.g.KVUsage*l.kv/r-made/r, l.begun.bytes/16))
	}
	return max(p, 1)
}

// generated is how many output tokens the engine has made since first, or ended lines have where it does not tell.
func (l *Limit) generated(now look) float64 {
	if !now.g.Known {
		return l.made
	}
	return max(0, float64(now.g.Generation-l.first.g.Generation))
}

// window is what the looks over the life of a line show.
type window struct {
	whole            bool    // it spans a life, all of it with about as many in flight as may be
	use              float64 // of the KV cache, at most
	waiting, running float64 // mean
	inFlight         float64 // sequences of ours, mean
	most, queued     float64 // running at most; waiting at least
	often            float64 // share of the looks that found about as many running as at most
	held             float64 // tokens in the KV cache per running request, mean; 0: not told
}

func (l *Limit) window(life time.Duration) (w window) {
	first, last := l.looks[0], l.looks[len(l.looks)-1]
	w.whole = last.at.Sub(first.at) >= life*9/10
	w.queued, w.use = math.Inf(1), l.use()
	for _, k := range l.looks {
		running, waiting := float64(k.g.Running), float64(k.g.Waiting)
		w.whole = w.whole && k.inFlight >= 0.9*min(l.base, first.inFlight)
		w.waiting += waiting / float64(len(l.looks))
		w.running += running / float64(len(l.looks))
		w.inFlight += k.inFlight / float64(len(l.looks))
		w.most, w.queued = max(w.most, running), min(w.queued, waiting)
		w.held += k.g.KVUsage * l.kv / max(running, 1) / float64(len(l.looks))
	}
	for _, k := range l.looks {
		if float64(k.g.Running) >= 0.98*w.most {
			w.often += 1 / float64(len(l.looks))
		}
	}
	return w
}

// grow moves the limit by what was seen over the life of one line.
func (l *Limit) grow(now look, life time.Duration) {
	w := l.window(life)
	line := l.line()
	if w.held > 0 {
		line.prompt = min(line.prompt, max(w.held-line.output/2, 1)) // what is shared costs nothing
	}
	l.gain.meet(line)
	step, cost := line.spare(l.base), line.again(l.base)
	old := l.looks[0]
	ended := max(float64(now.answers-old.answers), float64(now.g.Finished-old.g.Finished)) // those of others, too
	preempted := float64(now.g.Preemptions-old.g.Preemptions) / max(1, ended, l.base/8)
	bearable := step / ((3 + 7*(1-step)) * cost)
	l.why = fmt.Sprintf("KV cache up to %.0f %% full, %.2f pre-emptions a line where %.2f are worth it", 100*w.use, preempted, bearable)
	dt := now.at.Sub(l.looks[max(0, len(l.looks)-2)].at).Seconds() / life.Seconds()
	switch {
	case l.ahead(line):
	case preempted > bearable:
		most := 1.1 * l.kv / (line.prompt + line.output/2 + 1)
		down := l.base - min(most, l.base*max(0.9, 1-0.1*(preempted/bearable-1)))
		l.set(l.base - down*l.gain.turn(false, 1))
		l.hold = now.at.Add(life)
	case w.waiting > 0.2*w.running+1:
		if w.whole && w.use < 0.9 && w.queued > 0 && w.often >= 0.5 && w.most >= minLimit {
			l.runs(w.most)
		}
	case preempted > bearable/2, now.inFlight < 0.9*l.base:
	default:
		by := step / 3 * l.gain.turn(true, dt)
		if w.whole && w.use > 0 && w.use < 0.95 {
			lives := life.Seconds() / max(l.ended.took, 0.05) // of short lines, many: what is seen is what there will be
			by = max(by, max(l.gain.size, 0.5)*min(0.97/w.use-1, mostGrowth*min(max(lives, 1), 4)))
		}
		next := l.base * (1 + by*min(dt, 1))
		if next > l.seqs && w.whole && w.waiting < 1 && w.running > 0.9*w.inFlight && l.mayRunMore(w.most) {
			l.seqs, l.ran = min(next, l.most), 0 // it runs all that it gets
		}
		l.set(next)
	}
}

// crowded finds how many an engine runs at once that lets lines wait though its KV cache has much room: about as many ran at
// each look for as long as it takes to answer that many. 0: it does not look so; else the most that was seen. The life of a
// line would be too long a time to tell by, since it waits for most of it.
func (l *Limit) crowded() (most float64) {
	n := len(l.looks)
	if n == 0 {
		return 0
	}
	now := l.looks[n-1]
	r := float64(now.g.Running)
	for i := n - 1; i >= 0 && r >= minLimit; i-- {
		k := l.looks[i]
		running := float64(k.g.Running)
		if k.g.KVUsage > 0.5 || float64(k.g.Waiting) <= 0.2*r+1 || math.Abs(running-r) > (0.02+l.wavers(r))*r {
			return 0
		}
		most = max(most, running)
		if n-i >= 3 && float64(now.answers-k.answers) >= r {
			return most
		}
	}
	return 0
}

// wavers is by what share a gauge of n running sequences goes up and down, twice the standard deviation, since it is read
// when a step has ended: of outputs of c tokens n/c have ended in it, and those that follow them have not begun.
func (l *Limit) wavers(n float64) float64 {
	if l.ended.output < 1 {
		return 0
	}
	return 2 / math.Sqrt(n*l.ended.output)
}

// runs takes note of how many sequences the engine runs at once, whatever room there is, where at most n were seen. The
// usual ones are powers of two. Where its flags say it, they are right.
func (l *Limit) runs(n float64) {
	if l.slots > 0 {
		return
	}
	shown := max(1-1/max(l.ended.output, 1), seenLeast) // the rest has just ended
	if usual := math.Exp2(math.Ceil(math.Log2(n))); n >= min(seenShort, max(shown-l.wavers(n), seenLeast))*usual {
		n = usual
	} else {
		n /= shown
	}
	l.ran, l.ranLine = n, l.line().tokens()
	l.seqs = l.enoughFor(n)
	l.set(l.base)
}

// enoughFor is how many to have at an engine that runs n at once and no more. Those that wait in it take the place of others in
// the next step; whoever is sent only then comes a step or two later, which is much of a short output. But they begin as others
// end, one by one; so where they should begin together, none wait.
func (l *Limit) enoughFor(n float64) float64 {
	if l.gathers {
		return n
	}
	more := seqsMore
	if l.ended.n > 0 {
		more = max(more, 1+min(seqsSteps/max(l.ended.output, 1), seqsTurn))
	}
	return n*more + seqsWait
}

// mayRunMore says whether an engine that runs all that it gets, most at once, may run more than was seen once. Where some are to
// wait in it, it has run more than that. Where none are, that would show only when it gets more: so not while lines are what
// they were then.
func (l *Limit) mayRunMore(most float64) bool {
	if l.ran == 0 || l.enoughFor(l.ran) > l.ran {
		return most > l.ran
	}
	return apart(l.line().tokens(), l.ranLine, otherLines)
}

// ahead lowers the limit when the lines to come are much larger than those that it was found with.
func (l *Limit) ahead(line shape) bool {
	larger := func(next, last float64) float64 {
		if next > 1.5*last && last > 0 {
			return next / last
		}
		return 1
	}
	bytes, most := larger(l.begun.bytes, l.ended.bytes), larger(l.begun.most, l.ended.most)
	if bytes == 1 && most == 1 {
		return false
	}
	top := 1.1 * l.kv / (line.prompt*bytes + line.output*most/2 + 1)
	if l.base <= top {
		return false
	}
	l.set(top)
	l.why = "longer lines are coming"
	return true
}

// set makes n the limit, within its bounds.
func (l *Limit) set(n float64) {
	if math.IsNaN(n) {
		return
	}
	most := l.seqs
	if l.slots > 0 {
		most = min(most, l.enoughFor(l.slots))
	}
	l.base = max(min(l.graphs.most(n), most), minLimit*l.width())
}

// plan sets the limit to what fits, where the engine tells its capacity and not its load.
func (l *Limit) plan() {
	b := l.beginning(look{answers: l.count})
	l.set(b.fits())
	l.why = fmt.Sprintf("KV cache of %.0f tokens, lines of %.0f + up to %.0f; engine tells no load", l.kv, b.prompt, b.most)
}

// gain makes the steps smaller each time that the limit turns, so that it settles, and larger again where it goes on
// in one direction.
type gain struct {
	size float64 // 1 at first
	up   bool    // the last steps were up
	run  float64 // for so many lives of a line
	line float64 // tokens of a line when it was 1 last
}

const (
	leastGain   = 1. / 8
	settledGain = 1. / 4
)

// meet makes steps large again where lines are not what they were.
func (g *gain) meet(line shape) {
	if n := line.tokens(); apart(n, g.line, 1.25) {
		*g = gain{size: 1, line: n}
	}
}

// turn takes in a step that lasts so many lives of a line, and returns the size of it.
func (g *gain) turn(up bool, lives float64) float64 {
	if up != g.up {
		g.size, g.up, g.run = max(g.size/2, leastGain), up, 0
	}
	if g.run += lives; g.run >= 3 {
		g.size, g.run = min(1, g.size*2), 0
	}
	return g.size
}
