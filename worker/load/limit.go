package load

import (
	"cmp"
	"fmt"
	"math"
	"sync"
	"time"

	"millrace/proto"
)

// limit decides how many requests the engine may have at once. Too few leave the card idle; too many make the engine
// pre-empt: it throws the KV cache of a request away and computes it again. Between the two lies what the KV cache
// holds, and where exactly depends on the engine and on the lines.
//
// It knows three things: the capacity of the KV cache, what lines hold in it, and how often lines were pre-empted. How
// it decides depends on what the engine tells:
//
//   - Capacity and load: it steers (steer.go). A capacity that is not told follows from what the KV cache holds and
//     which share that is (guess.go).
//   - A capacity and no load: as many lines as fit, by their lengths (plan).
//   - Slots: these, and a few lines that wait for one.
//   - Nothing, or the load of another replica at each look: it climbs by what is finished in a second (climb.go).
//
// It counts sequences, as engines do: a line that asks for n choices is n of them. All methods may be called from any
// goroutine.
type Limit struct {
	fixed int // by the user; 0: find out

	mu      sync.Mutex
	base    float64   // sequences, before back-pressure
	choices mean      // sequences of a line, in its field output
	share   float64   // of base that back-pressure leaves
	moved   time.Time // when share was changed
	busy    int       // answers that said "too much", since counted
	served  int       // lines that were answered well, since counted
	counted time.Time
	flooded bool // the second before, more answers said "too much" than were good
	why     string
	way     way // how base is found

	engine  identity
	kv      float64 // tokens; 0: unknown
	told    bool    // kv is the engine's word
	guesses guesses
	copies  int     // data-parallel engines, as it told last
	slots   float64 // sequences that it runs at once, as it says or its flags do; 0: not known
	flagged float64 // the same, as its flags say
	most    float64 // sequences that an engine of its kind may have at once
	seqs    float64 // the same, as far as it was seen
	ran     float64 // so many ran while others waited, when that was seen; 0: it was not, or it has run more since
	ranLine float64 // tokens of a line then
	maxLen  float64
	several several
	climb   climb
	graphs  graphs

	begun   mean // of sequences that were taken
	ended   mean // of sequences that were answered
	looks   []look
	first   look      // since the start of the engine, or ours, or since nothing was in flight
	hold    time.Time // no change of base until then
	gain    gain
	count   int     // sequences that were answered since first
	made    float64 // tokens in these
	all     int     // answers, ever
	steers  bool    // so many lines have ended that it need not compute any more
	gathers bool    // lines should begin together
	idle    bool    // nothing was in flight at the last look, and no line has come since
	early   int     // looks since then, before any line has ended
}

// way is how the limit is found.
type way int

const (
	byNothing way = iota // nothing is known yet
	byClimb
	bySlots
	byPlan
	bySteering
)

// identity tells one run of an engine from another.
type identity struct {
	kind, version string
	run           int
}

const (
	blindStart  = 32   // of an engine that tells nothing, before it has shown what it can
	ollamaStart = 8    // Ollama runs a few at once
	minLimit    = 8    // lines, of any engine, but for back-pressure
	mostSeqs    = 1024 // vLLM's max_num_seqs on a large card; on others it is 256, which is seen
	fill        = 0.98 // of the KV cache is planned with
	begunLines  = 64   // lines that begun remembers
	endedLines  = 512  // lines that ended remembers, at most
	fewLines    = 64   // and at least
	burstWorth  = 0.2  // 2e / 4
	burstMost   = 0.05 // of the slots
	burstFew    = 40   // lines, in flight and ended, at least, for bursts
	burstStays  = 0.8  // of what the graphs hold: less in a step, and lines begin one by one again
	briefLines  = 1.5  // output tokens: lines of fewer, such as embeddings, are over before an engine tells that they run
)

func New(fixed int) *Limit {
	return &Limit{fixed: fixed, base: float64(max(fixed, 1)), share: 1, most: mostSeqs, seqs: mostSeqs, gain: gain{size: 1}}
}

// width is how many sequences a line is.
func (l *Limit) width() float64 { return max(1, l.choices.output) }

// Get returns the limit in lines, at least 1.
func (l *Limit) Get() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return max(1, int(l.base/l.width()*l.share+0.5))
}

// Burst is how many lines to start together, once so many slots are free; 1: each at once.
//
// A prompt makes a step of vLLM larger than its CUDA graphs, and so slower for all that run (see graphs). Where lines end one by
// one, most steps have a prompt in them; where those that follow them begin together, few have. Of n lines with outputs of c
// tokens n/c end in a step, so bursts of k make n/(c·k) of the steps slow, by a share e, and leave k/2 of n slots empty on
// average: best is k = n·√(2e/c). e was 0.4 with 430 in flight on an H200 (docs/measurements/speed.md). Half that k makes
// nearly as much, and what runs is steadier. Where the graphs hold a step with its prompts, there is nothing to gain.
func (l *Limit) Burst() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, output := l.base/l.width()*l.share, max(l.ended.output, 1)
	if l.fixed > 0 || l.way != bySteering || n < burstFew || l.ended.n < burstFew || !l.gathers {
		return 1
	}
	return max(2, int(n*min(math.Sqrt(burstWorth/output), burstMost)))
}

// gather finds whether lines should begin together: where so many run, the graphs help, and do not hold the prompts that come
// into a step where lines begin one by one. Of short outputs more end in each step than would begin together.
func (l *Limit) gather(n float64) {
	if !l.graphs.help(n) || n/l.width() < burstFew {
		l.gathers = false
		return
	}
	if l.ended.n == 0 {
		l.gathers = true
		return
	}
	size := l.graphs.size
	if most := cmp.Or(l.ran, l.flagged); most > 0 && !l.graphs.told {
		size = min(size, 2*most) // see vllmGraphs
	}
	if l.gathers {
		size *= burstStays
	}
	l.gathers = l.ended.output*burstMost >= 1 && n+l.ended.prompt*max(1, n/l.ended.output) > size
}

// Tokens is the capacity of the KV cache, told or guessed; 0: unknown.
func (l *Limit) Tokens() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return int64(l.kv)
}

// Reason says why the limit is what it is.
func (l *Limit) Reason() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.share < 1:
		return fmt.Sprintf("engine refuses requests; %.0f %% of %.0f for now", 100*l.share, l.base/l.width())
	case l.fixed > 0:
		return "fixed by --concurrency"
	case l.way == bySteering && l.idle && l.steers:
		return "no line is in flight; that many were right before"
	case l.way == bySteering && l.ran > 0 && l.base >= l.seqs:
		return fmt.Sprintf("engine runs no more than %.0f at once", l.ran)
	case l.way == bySteering && l.flagged > 0 && l.base >= l.slots:
		return fmt.Sprintf("engine runs no more than %.0f at once, by its flags", l.flagged)
	case l.way == bySteering && l.base >= l.graphs.most(l.base+1):
		return l.graphs.why()
	case l.way >= byPlan && l.base <= minLimit*l.width():
		return l.why + "; never below 8"
	}
	return l.why
}

// Expects takes in what a line asks for, before it runs. It says whether the limit may have moved, and whether the engine
// was idle, so that a look is due.
func (l *Limit) Expects(bytes int, w Wish) (moved, wake bool) {
	if l.fixed > 0 {
		return false, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	wake, l.idle = l.idle, false
	n := w.width()
	l.choices.add(begunLines, 0, 0, n, 0, 0)
	b := &l.begun
	b.add(begunLines, b.usual(float64(bytes)/n, b.bytes), 0, 0, 0, b.usual(float64(w.Most)/n, b.most))
	switch looks := len(l.looks); {
	case l.way == byPlan:
		l.plan()
	case l.way == bySteering && l.all == 0 && (looks == 0 || l.looks[looks-1].g.Running < seenRunning):
		l.begin(look{})
	default:
		return false, wake
	}
	return true, wake
}

// Finished takes in what a line held that was answered now. Lines whose engine counts nothing do not tell.
func (l *Limit) Finished(u proto.Usage, bytes int, w Wish, took time.Duration, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.served++
	n := w.width()
	prompt, output := float64(u.Prompt-u.Cached)/n, float64(u.Completion)/n
	l.climb.finished(n, n*(prompt+workOfOutput*output), now)
	l.graphs.ended += n
	if !u.Counted {
		return
	}
	l.count += int(n + 0.5)
	l.all++
	l.made += float64(u.Completion)
	keep := int(min(max(l.base/l.width(), fewLines), endedLines))
	l.ended.add(keep, float64(bytes)/n, prompt, output, took.Seconds(), float64(w.Most)/n)
}

// Observe takes in what a probe found, with as many lines in flight, and moves the limit.
func (l *Limit) Observe(st Engine, inFlight int, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.relax(now)
	l.meet(st)
	if n := st.Gauges.Engines; n != l.copies && n > 0 {
		l.spread(st, true)
		if l.ran == 0 {
			l.uncap()
		}
	}
	l.maxLen, l.idle = float64(st.MaxLen), inFlight == 0
	if l.early++; l.idle {
		l.early = 0
	}
	if l.fixed > 0 {
		return
	}
	g := st.Gauges
	if l.several.see(g, now) {
		g = Gauges{}
		l.kv, l.told = 0, false
	}
	if g.KVTokens > 0 && g.KVTokens >= st.MaxLen { // a smaller one is that of a model that keeps nothing
		l.capacity(float64(g.KVTokens))
	}
	l.guess(g)
	l.follow(st, look{at: now, inFlight: float64(inFlight) * l.width(), answers: l.count, g: g})
}

// follow moves the limit the way that the engine allows.
func (l *Limit) follow(st Engine, now look) {
	switch {
	case l.kv > 0 && now.g.Known && l.ended.n >= fewLines && l.ended.output < briefLines:
		l.climbOn(now, l.base, 2)
	case l.kv > 0 && now.g.Known:
		l.way = bySteering
		l.steer(now)
	case l.kv > 0 && l.way == bySteering:
		l.why = "engine tells its load no more; left as it was"
	case l.kv > 0 && l.way != byClimb && l.all < l.enough():
		l.way = byPlan
		l.plan()
	case l.kv > 0:
		l.climbOn(now, l.base, fineStep)
	case st.Slots > 0:
		l.way = bySlots
		l.base = max(float64(st.Slots+st.Slots/8+1), minLimit*l.width())
		l.why = fmt.Sprintf("engine has %d slots; a few lines more wait for one", st.Slots)
	case l.way == byNothing && now.g.Known && now.g.Running < 2*seenRunning && l.all < l.enough():
		l.base, l.why = blindStart*l.width(), "engine tells no KV capacity; it shows when lines run"
	case st.Kind == proto.KindOllama:
		l.climbOn(now, ollamaStart*l.width(), 2)
	case l.way == byNothing:
		l.climbOn(now, blindStart*l.width(), 2)
	default:
		l.climbOn(now, l.base, 2)
	}
}

// climbOn moves the limit by what is finished.
func (l *Limit) climbOn(now look, start, step float64) {
	if l.way != byClimb {
		l.way = byClimb
		l.climb = climb{n: start, least: minLimit * l.width(), most: l.most, step: step}
	}
	l.climb.look(now.inFlight)
	l.base = l.climb.n
	tells := "engine tells no KV capacity"
	switch {
	case l.kv > 0 && now.g.Known:
		tells = "lines are over at once"
	case l.several.sure:
		tells = "several engines at one address"
	case l.kv > 0 && l.engine.kind == proto.KindSGLang:
		tells = "engine tells no load (SGLang does with --enable-metrics)"
	case l.kv > 0:
		tells = "engine tells no load"
	}
	l.why = tells + "; " + l.climb.why(l.width())
}

// line is what the lines were like that have ended.
func (l *Limit) line() shape { return shape{prompt: l.ended.prompt, output: l.ended.output} }

// enough is how many lines have to end before it is known what they hold.
func (l *Limit) enough() int { return max(int(l.base/l.width()), fewLines/2) }

// meet notices that it is another run of the engine: everything is found anew. What lines hold is still known.
func (l *Limit) meet(st Engine) {
	now := identity{st.Kind, st.Version, st.Run}
	if now == l.engine {
		return
	}
	same := now.kind == l.engine.kind && now.version == l.engine.version
	l.engine = now
	l.flagged = float64(st.Sequences)
	l.slots = cmp.Or(float64(st.Slots), l.flagged)
	l.spread(st, same)
	l.kv, l.told, l.guesses, l.several = 0, false, guesses{}, several{}
	l.forget()
	if l.way == byClimb && same {
		l.climb = climb{n: l.climb.n, least: l.climb.least, most: l.most, step: l.climb.step} // likely as good as it was
		return
	}
	l.way = byNothing
}

// spread takes in how many copies of the model the engine is, which it may tell later than what it is.
func (l *Limit) spread(st Engine, same bool) {
	l.copies = st.Gauges.Engines
	n := float64(max(l.copies, 1))
	l.graphs.meet(st.Kind, same, st.Graphs, n)
	if l.most = mostSeqs * n; l.slots > 0 {
		l.most = l.slots*(1+seqsTurn) + seqsWait
	}
}

// Pace is how long to wait for the next look: a quarter of a line's life, twice that once the limit has settled, and
// less before there is one.
func (l *Limit) Pace() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	const least = time.Second / 2
	life := time.Duration(l.ended.took / 4 * float64(time.Second))
	switch {
	case l.fixed > 0, l.idle, l.way == byPlan, l.way == bySlots, l.way == byClimb && l.climb.settled:
		return time.Hour
	case l.way == byClimb, l.way == byNothing:
		return max(life, least)
	case l.ended.n == 0:
		return 100 * time.Millisecond << min(l.early, 4)
	case l.steers && l.gain.size <= settledGain:
		return 2 * max(life, least)
	}
	return max(life, least)
}

func (l *Limit) capacity(kv float64) {
	if kv == l.kv && l.told {
		return
	}
	l.kv, l.told = kv, true
	l.forget()
}

// forget starts anew with an engine whose counters start anew. What lines hold is still known.
func (l *Limit) forget() {
	l.graphs.restart()
	l.uncap()
	l.looks, l.first, l.count, l.made, l.hold, l.gain = nil, look{}, 0, 0, time.Time{}, gain{size: 1}
	l.all, l.steers = 0, false // it may run fewer now than it did, so it begins as it did at first
	if l.ended.n >= fewLines && l.kv > 0 {
		l.set(min(l.line().fits(fill*l.kv), l.few()))
	}
}

// uncap forgets how many sequences the engine was seen to run at most.
func (l *Limit) uncap() { l.seqs, l.ran = l.most, 0 }

// relax gives back what back-pressure took, a quarter every five seconds.
func (l *Limit) relax(now time.Time) {
	if l.share < 1 && now.Sub(l.moved) >= 5*time.Second {
		l.share, l.moved = min(1, l.share*1.25), now
	}
}

// Refused is called for each answer that says "too much". At most once a second it takes a third away; more than half
// only while more answers say so than are good: an engine that has too much refuses whatever comes next, at once, while one
// that refuses now and then does so whatever the limit is.
func (l *Limit) Refused(now time.Time) {
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
