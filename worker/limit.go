package worker

import (
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
//   - From then on it steers. It looks back over the life of one line: where the pre-emptions per finished line stay
//     under what one more request is worth, it grows, and above that it shrinks and waits for one life.
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
	first  look // since the start of the engine, or ours
	count  int  // answers since first
	made   float64
	all    int // answers
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
// looked. It says whether the limit may have moved.
func (l *limit) expects(bytes, most int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fixed > 0 {
		return false
	}
	l.begun.add(begunLines, float64(bytes), 0, 0, 0, float64(most))
	if l.kv <= 0 || len(l.looks) > 1 || l.all > 0 {
		return false
	}
	l.begin(look{})
	return true
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
	l.maxLen = float64(st.MaxLen)
	g := st.Gauges
	if g.KVTokens > 0 {
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
	case l.fixed > 0 || l.kv <= 0:
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
	l.kv, l.seqs = kv, mostSeqs
	l.forget()
}

// forget starts anew with an engine whose counters start anew. What lines hold is still known.
func (l *limit) forget() {
	l.looks, l.first, l.count, l.made, l.hold = nil, look{}, 0, 0, time.Time{}
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
	if len(l.looks) == 0 {
		l.first = now
	}
	l.looks = append(l.looks, now)
	life := max(time.Duration(l.ended.took*float64(time.Second)), 2*time.Second)
	l.trim(now.at.Add(-life))
	switch {
	case l.all < int(l.base) && l.ended.n < endedLines:
		l.begin(now)
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
	made := max(0, float64(now.g.Generation-l.first.g.Generation))
	b := beginning{kv: fill * l.kv, prompt: p, most: most, made: made, answers: float64(now.answers)}
	l.set(b.fits())
	l.why = fmt.Sprintf("KV %.0f tokens; a line is taken to hold %.0f and to make up to %.0f", l.kv, p, most)
}

// prompt is how many tokens the prompt of a line holds of its own. Before the engine has shown that, a byte is taken
// for a token, which errs on the side of few.
func (l *limit) prompt(now look) float64 {
	p := max(l.begun.bytes, 1)
	if l.ended.n > 0 && l.ended.bytes > 0 {
		p *= l.ended.prompt / l.ended.bytes
	} else if l.maxLen > 0 {
		p = min(p, l.maxLen)
	}
	if r := float64(now.g.Running); r >= 8 || r >= 4 && now.g.Waiting == 0 {
		made := max(0, float64(now.g.Generation-l.first.g.Generation)-l.made)
		p = min(p, now.g.KVUsage*l.kv/r-made/r)
	}
	return max(p, 1)
}

// grow moves the limit by what was seen over the life of one line.
func (l *limit) grow(now look, life time.Duration) {
	old := l.looks[0]
	var use, waiting, running, most float64
	for _, k := range l.looks {
		use = max(use, k.g.KVUsage)
		waiting += float64(k.g.Waiting)
		running += float64(k.g.Running)
		most = max(most, float64(k.g.Running))
	}
	waiting, running = waiting/float64(len(l.looks)), running/float64(len(l.looks))
	load := load{prompt: l.ended.prompt, output: l.ended.output}
	step, cost := load.spare(l.base), load.again(l.base)
	preempted := float64(now.g.Preemptions-old.g.Preemptions) / math.Max(1, float64(now.answers-old.answers))
	bearable := step / ((3 + 7*(1-step)) * cost)
	l.why = fmt.Sprintf("KV used up to %.0f %%, %.3f pre-emptions a line, bearable %.3f", 100*use, preempted, bearable)
	dt := now.at.Sub(l.looks[max(0, len(l.looks)-2)].at).Seconds() / life.Seconds()
	switch {
	case l.ahead(load):
	case preempted > bearable:
		l.set(l.base * max(0.9, 1-0.1*(preempted/bearable-1)))
		l.hold = now.at.Add(life)
	case waiting > 0.2*running+1:
		if use < 0.9 && len(l.looks) > 3 {
			l.seqs = most*1.02 + 2 // it runs no more at once, whatever room there is
			l.set(l.seqs)
		}
	case preempted > bearable/2, float64(now.inFlight) < 0.9*l.base:
	default:
		by := step / 3
		if use < 0.95 {
			by = max(by, 0.97/max(use, 0.1)-1)
		}
		l.set(l.base * (1 + by*min(dt, 1)))
	}
}

// ahead lowers the limit when the lines to come are much larger than those that it was found with.
func (l *limit) ahead(now load) bool {
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
	top := 1.1 * l.kv / (now.prompt*bytes + now.output*most/2)
	if l.base <= top {
		return false
	}
	l.set(top)
	l.why = "longer lines are coming"
	return true
}

func (l *limit) set(n float64) {
	l.base = min(max(n, minLimit), max(l.seqs, minLimit))
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
