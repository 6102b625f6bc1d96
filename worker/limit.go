package worker

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"millrace/proto"
)

// limit decides how many requests the engine may have at once. Too few leave the card idle; too many make the engine
// pre-empt: it throws the KV cache of a request away and computes it again. Between the two lies what the KV cache
// holds, and where exactly depends on the engine and on the lines.
//
// It knows three things: the capacity of the KV cache, what lines hold in it, and how often lines were pre-empted.
//
//   - Until as many lines have finished as are in flight, it computes: KV tokens / tokens of a line at its end where
//     pre-emptions are dear, up to KV tokens / tokens of a line halfway where they are cheap. Prompts are measured
//     (tokens in use / running), outputs are guessed from max_tokens and from what was made so far.
//   - From then on it steers. It looks back over the life of one line: where the pre-emptions per finished line stay well
//     under what more requests are worth, or the KV cache was never full, it grows; above that it shrinks and waits for
//     one life.
//
// Both weigh pre-emptions by the model of load.go. All methods may be called from any goroutine.
type limit struct {
	fixed int // by the user; 0: find out

	mu      sync.Mutex
	kv      float64   // tokens; 0: the engine does not tell
	seqs    float64   // most requests that the engine runs at once, as far as it was seen
	base    float64   // before back-pressure
	share   float64   // of base that back-pressure leaves
	moved   time.Time // when share was changed
	busy    int       // answers that said "too much", since counted
	served  int       // lines that were answered well, since counted
	counted time.Time
	flooded bool      // the second before, more answers said "too much" than were good
	hold    time.Time // no change of base until then
	why     string

	maxLen float64
	begun  mean // of lines that were taken
	ended  mean // of lines that were answered
	looks  []look
	first  look    // since the start of the engine, or ours, or since nothing was in flight
	count  int     // answers since first
	made   float64 // tokens in these
	all    int     // answers, ever
	bodies int     // that were asked for
	steers bool    // so many lines have ended that it need not compute any more
	idle   bool    // nothing was in flight at the last look, and no line has come since
}

const (
	blindLimit = 64   // of an engine without metrics
	minLimit   = 8    // of any engine, but for back-pressure
	mostSeqs   = 1024 // vLLM's max_num_seqs on a large card; on others it is 256, which is seen
	fill       = 0.98 // of the KV cache is planned with
	begunLines = 64   // lines that begun remembers
	endedLines = 512  // lines that ended remembers, at most
	fewLines   = 64   // and at least
	maxLooks   = 512
	// requests that run tell how long prompts are from so many on
	seenRunning = 4
	mostGrowth  = 0.25 // of the limit, in the life of a line
)

// look is what a probe saw.
type look struct {
	at       time.Time
	inFlight int
	answers  int // since the start
	g        Gauges
}

func newLimit(fixed int) *limit {
	return &limit{fixed: fixed, base: float64(max(fixed, 1)), share: 1, seqs: mostSeqs}
}

// get returns the limit, at least 1.
func (l *limit) get() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return max(1, int(l.base*l.share+0.5))
}

// reason says why the limit is what it is.
func (l *limit) reason() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.share < 1:
		return fmt.Sprintf("the engine pushed back; %.0f %% of %.0f", 100*l.share, l.base)
	case l.fixed > 0:
		return "fixed by --concurrency"
	}
	return l.why
}

// expects takes in what a line asks for, before it runs. most is the output tokens that it may have, 0 when nobody
// looked. It says whether the limit may have moved, and whether the engine was idle, so that a look is due.
func (l *limit) expects(bytes, most int) (moved, wake bool) {
	if l.fixed > 0 {
		return false, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	wake, l.idle = l.idle, false
	b := &l.begun
	b.add(begunLines, b.usual(float64(bytes), b.bytes), 0, 0, 0, b.usual(float64(most), b.most))
	n := len(l.looks)
	if l.kv <= 0 || l.all > 0 || n > 0 && l.looks[n-1].g.Running >= seenRunning {
		return false, wake
	}
	l.begin(look{})
	return true, wake
}

// asks finds how many output tokens a body asks for; 0: it did not look. It looks into every body at the beginning, and
// into some later.
func (l *limit) asks(body []byte) int {
	if l.fixed > 0 {
		return 0
	}
	l.mu.Lock()
	l.bodies++
	look := l.begun.n < begunLines || l.bodies%8 == 0
	l.mu.Unlock()
	if !look {
		return 0
	}
	return maxTokens(body)
}

// finished takes in what a line held. Lines whose engine counts nothing do not tell.
func (l *limit) finished(u proto.Usage, bytes, most int, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.served++
	if !u.Counted {
		return
	}
	l.count++
	l.all++
	l.made += float64(u.Completion)
	n := int(min(max(l.base, fewLines), endedLines))
	l.ended.add(n, float64(bytes), float64(u.Prompt-u.Cached), float64(u.Completion), took.Seconds(), float64(most))
}

// observe takes in what a probe found, with as many requests in flight, and moves the limit.
func (l *limit) observe(st Status, inFlight int, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.relax(now)
	l.maxLen, l.idle = float64(st.MaxLen), inFlight == 0
	g := st.Gauges
	if g.KVTokens > 0 && g.KVTokens >= st.MaxLen { // a smaller one is that of a model that keeps nothing
		l.capacity(float64(g.KVTokens))
	}
	switch {
	case l.fixed > 0:
	case l.kv <= 0:
		l.base, l.why = blindLimit, "the engine tells no KV capacity"
	case !g.Known:
		l.why = "the engine tells no load any more; as it was"
	default:
		l.steer(look{at: now, inFlight: inFlight, answers: l.count, g: g})
	}
}

// pace is how long to wait for the next look: a quarter of a line's life, and less before there is one.
func (l *limit) pace() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.fixed > 0 || l.kv <= 0 || len(l.looks) > 0 && l.looks[len(l.looks)-1].inFlight == 0:
		return time.Hour
	case l.ended.n == 0:
		return 100 * time.Millisecond << min(len(l.looks), 4)
	}
	return max(time.Duration(l.ended.took/4*float64(time.Second)), time.Second/2)
}

func (l *limit) capacity(kv float64) {
	if kv == l.kv {
		return
	}
	l.kv = kv
	l.forget()
}

// forget starts anew with an engine whose counters start anew. What lines hold is still known.
func (l *limit) forget() {
	l.looks, l.first, l.count, l.made, l.hold, l.seqs = nil, look{}, 0, 0, time.Time{}, mostSeqs
	if l.ended.n >= fewLines {
		l.set(load{prompt: l.ended.prompt, output: l.ended.output}.fits(fill * l.kv))
	}
}

// steer moves the limit after a look at the engine.
func (l *limit) steer(now look) {
	if n := len(l.looks); n > 0 {
		if last := l.looks[n-1].g; now.g.Generation < last.Generation || now.g.Preemptions < last.Preemptions {
			l.forget()
			now.answers = 0
		}
	}
	if now.inFlight == 0 {
		l.seqs, l.count, l.made, now.answers = mostSeqs, 0, 0, 0
	}
	if len(l.looks) == 0 || now.inFlight == 0 {
		l.first = now
	}
	if float64(now.inFlight) < l.base/2 { // what was seen so far says nothing of an engine that is full
		l.looks = l.looks[:0]
	}
	l.looks = append(l.looks, now)
	life := max(time.Duration(l.ended.took*float64(time.Second)), 2*time.Second)
	l.trim(now.at.Add(-life))
	switch {
	case !l.steers:
		enough := l.all >= max(int(l.base), fewLines/2)
		l.begin(now) // the last time with what lines really held
		l.steers = enough
	case now.at.Before(l.hold):
	default:
		l.grow(now, life)
	}
}

// trim forgets all looks before a time but the last of them.
func (l *limit) trim(before time.Time) {
	n := len(l.looks)
	i := 0
	for i < n-1 && !l.looks[i+1].at.After(before) || n-i > maxLooks {
		i++
	}
	l.looks = slices.Delete(l.looks, 0, i)
}

// begin sets the limit from what the lines ask for and what is seen of those in flight.
func (l *limit) begin(now look) {
	most := l.begun.most
	if most == 0 {
		most = noMaxTokens
	}
	p := l.prompt(now)
	if l.maxLen > 0 {
		most = min(most, max(1, l.maxLen-p))
	}
	b := beginning{kv: fill * l.kv, prompt: p, most: most, made: l.generated(now), answers: float64(now.answers)}
	l.set(b.fits())
	l.why = fmt.Sprintf("KV %.0f tokens; a line is taken to hold %.0f and to make up to %.0f", l.kv, p, most)
}

// prompt is how many tokens the prompt of a line holds of its own. Before the engine has shown that, a byte is taken
// for a token, which errs on the side of few, and before the first line, its context.
func (l *limit) prompt(now look) float64 {
	p := l.begun.bytes
	switch {
	case l.begun.n == 0:
		p = cmp.Or(l.maxLen, 4096)
	case l.ended.n > 0 && l.ended.bytes > 0:
		p *= l.ended.prompt / l.ended.bytes
	case l.maxLen > 0:
		p = min(p, l.maxLen)
	}
	ours := now.g.Running <= int64(now.inFlight)+int64(now.inFlight)/8+2 // else there are others, of whom nothing is known
	if r := float64(now.g.Running); ours && now.g.KVUsage > 0 && (r >= 2*seenRunning || r >= seenRunning && now.g.Waiting == 0) {
		made := max(0, l.generated(now)-l.made) // by those in flight
		p = min(p, max(now.g.KVUsage*l.kv/r-made/r, l.begun.bytes/16))
	}
	return max(p, 1)
}

// generated is how many output tokens the engine has made since first.
func (l *limit) generated(now look) float64 {
	return max(0, float64(now.g.Generation-l.first.g.Generation))
}

// window is what the looks over the life of a line show.
type window struct {
	whole               bool    // it spans a life, all of it with about as many in flight as may be
	use                 float64 // of the KV cache, at most
	waiting, running    float64 // mean
	least, most, queued float64 // running at least and at most; waiting at least
	held                float64 // tokens in the KV cache per running request, mean; 0: not told
}

func (l *limit) window(life time.Duration) (w window) {
	first, last := l.looks[0], l.looks[len(l.looks)-1]
	w.whole = last.at.Sub(first.at) >= life*9/10
	w.least, w.queued = math.Inf(1), math.Inf(1)
	for _, k := range l.looks {
		running, waiting := float64(k.g.Running), float64(k.g.Waiting)
		w.whole = w.whole && float64(k.inFlight) >= 0.9*min(l.base, float64(first.inFlight))
		w.use = max(w.use, k.g.KVUsage)
		w.waiting += waiting / float64(len(l.looks))
		w.running += running / float64(len(l.looks))
		w.least, w.most, w.queued = min(w.least, running), max(w.most, running), min(w.queued, waiting)
		w.held += k.g.KVUsage * l.kv / max(running, 1) / float64(len(l.looks))
	}
	return w
}

// grow moves the limit by what was seen over the life of one line.
func (l *limit) grow(now look, life time.Duration) {
	w := l.window(life)
	line := load{prompt: l.ended.prompt, output: l.ended.output}
	if w.held > 0 {
		line.prompt = min(line.prompt, max(w.held-line.output/2, 1)) // what is shared costs nothing
	}
	step, cost := line.spare(l.base), line.again(l.base)
	old := l.looks[0]
	preempted := float64(now.g.Preemptions-old.g.Preemptions) / max(1, float64(now.answers-old.answers), l.base/8)
	bearable := step / ((3 + 7*(1-step)) * cost)
	l.why = fmt.Sprintf("KV used up to %.0f %%, %.3f pre-emptions a line, bearable %.3f", 100*w.use, preempted, bearable)
	dt := now.at.Sub(l.looks[max(0, len(l.looks)-2)].at).Seconds() / life.Seconds()
	switch {
	case l.ahead(line):
	case preempted > bearable:
		most := 1.1 * l.kv / (line.prompt + line.output/2 + 1)
		l.set(min(most, l.base*max(0.9, 1-0.1*(preempted/bearable-1))))
		l.hold = now.at.Add(life)
	case w.waiting > 0.2*w.running+1:
		if w.whole && w.use < 0.9 && w.queued > 0 && w.least >= 0.95*w.most && w.most >= minLimit {
			l.seqs = w.most*1.02 + 2 // it runs no more at once, whatever room there is
			l.set(l.seqs)
		}
	case preempted > bearable/2, float64(now.inFlight) < 0.9*l.base:
	default:
		by := step / 3
		if w.whole && w.use > 0 && w.use < 0.95 {
			lives := life.Seconds() / max(l.ended.took, 0.05) // of short lines, many: what is seen is what there will be
			by = max(by, min(0.97/w.use-1, mostGrowth*min(max(lives, 1), 4)))
		}
		l.set(l.base * (1 + by*min(dt, 1)))
	}
}

// ahead lowers the limit when the lines to come are much larger than those that it was found with.
func (l *limit) ahead(line load) bool {
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
func (l *limit) set(n float64) {
	if math.IsNaN(n) {
		return
	}
	l.base = max(min(n, l.seqs), minLimit)
}

// relax gives back what back-pressure took, a quarter every five seconds.
func (l *limit) relax(now time.Time) {
	if l.share < 1 && now.Sub(l.moved) >= 5*time.Second {
		l.share, l.moved = min(1, l.share*1.25), now
	}
}

// refused is called for each answer that says "too much". At most once a second it takes a third away; more than half
// only while more answers say so than are good: an engine that has too much refuses whatever comes next, at once, while one
// that refuses now and then does so whatever the limit is.
func (l *limit) refused(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if since := now.Sub(l.counted); since >= time.Second {
		l.flooded = l.busy > l.served && since < 5*time.Second
		l.busy, l.served, l.counted = 0, 0, now
	}
	l.busy++
	if now.Sub(l.moved) < time.Second {
		return
	}
	l.moved = now
	least := 0.5
	if l.flooded {
		least = 1 / max(l.base, 1)
	}
	l.share = min(l.share, max(l.share*2/3, least))
}
