package sim

import (
	"math"
	"slices"
)

// scheduler decides what each step computes, by the rules of vLLM V1. It knows
// no clock and no HTTP, and belongs to the goroutine of Engine.Run.
//
// In each step the running sequences come first, in the order in which they
// were admitted: a decoding one gets one token, one still in its prompt gets as
// much of it as the budget of the step leaves. When there is no block for one,
// the latest admitted is pre-empted: it loses its blocks, goes to the head of
// the queue, and will compute prompt and output so far again. Then, if nobody
// was pre-empted, waiting sequences are admitted, first come first served, as
// long as there is budget, a seat, and room for the whole of what they have.
type scheduler struct {
	maxSeqs, maxTokens int
	window, sliding    int // see Config
	pool               *blockPool
	running            []*sequence
	waiting            queue
	steps              uint64

	// Prefix-cache counters in tokens. They count every attempt to admit a
	// sequence, as vLLM's do, so under KV pressure they run far ahead of the work.
	queried, hit uint64
	preemptions  uint64
}

func newScheduler(cfg Config) *scheduler {
	return &scheduler{
		maxSeqs:   cfg.MaxNumSeqs,
		maxTokens: cfg.MaxBatchedTokens,
		window:    cfg.SlidingWindow,
		sliding:   cfg.SlidingLayers,
		pool:      newBlockPool(cfg.KVTokens/blockSize, !cfg.NoPrefixCaching),
	}
}

// plan is what one step computes. Its memory is reused by the next step.
type plan struct {
	seqs     []*sequence // those that are scheduled, with their tokens in .step
	prefill  int         // prompt tokens that are computed, recomputed ones too
	decodes  int         // sequences that decode, or hold a seat while being slow
	now      int64       // when it was made, ns since the start of the engine
	poisoned bool        // a sequence was admitted that kills the engine
}

func (sc *scheduler) add(c *call) {
	for _, s := range c.seqs {
		s.cached = -1
		sc.waiting.pushBack(s)
	}
}

func (sc *scheduler) busy() bool { return len(sc.running) > 0 || sc.waiting.len() > 0 }

// schedule fills p with the next step. The time now is only noted in the sequences.
func (sc *scheduler) schedule(p *plan, now int64) {
	*p = plan{seqs: p.seqs[:0], now: now}
	sc.steps++
	budget, preempted := sc.scheduleRunning(p)
	if !preempted {
		sc.admit(p, budget)
	}
}

func (sc *scheduler) scheduleRunning(p *plan) (budget int, preempted bool) {
	budget = sc.maxTokens
	for i := 0; i < len(sc.running) && budget > 0; i++ {
		s := sc.running[i]
		if s.slow > 1 && sc.steps%uint64(s.slow) != 0 {
			p.decodes++
			continue
		}
		n := min(s.tokens()-s.computed, budget)
		for !sc.grow(s, s.computed+n) {
			preempted = true
			if sc.preemptLast() == s {
				return 0, true
			}
		}
		budget -= n
		p.schedule(s, n)
	}
	return budget, preempted
}

// schedule puts n tokens of s into the step.
func (p *plan) schedule(s *sequence, n int) {
	s.step = n
	p.seqs = append(p.seqs, s)
	if s.computed+n > s.prompt && n == 1 {
		p.decodes++
	} else {
		p.prefill += n
	}
}

func (sc *scheduler) admit(p *plan, budget int) {
	for budget > 0 && len(sc.running) < sc.maxSeqs && sc.waiting.len() > 0 {
		s := sc.waiting.front()
		found := sc.findPrefix(s)
		if !sc.fits(s, found) {
			return
		}
		sc.waiting.popFront()
		sc.holdPrefix(s, found, p.now)
		n := min(s.tokens()-s.computed, budget)
		sc.grow(s, s.computed+n)
		sc.running = append(sc.running, s)
		budget -= n
		p.poisoned = p.poisoned || s.poison
		p.schedule(s, n)
	}
}

// findPrefix returns how many leading blocks of s are in the prefix cache. The
// last token is never taken from there, since it must be computed to go on.
func (sc *scheduler) findPrefix(s *sequence) (found int) {
	if !sc.pool.caching {
		return 0
	}
	for most := (s.tokens() - 1) / blockSize; found < most; found++ {
		if _, ok := sc.pool.lookup(s.hashAt(found)); !ok {
			break
		}
	}
	sc.queried += uint64(s.tokens())
	sc.hit += uint64(found * blockSize)
	return found
}

// fits says whether all tokens of s find room, its found blocks being there
// already (but, where nobody uses them, still counted as free).
func (sc *scheduler) fits(s *sequence, found int) bool {
	need := sc.blocksFor(s.tokens()) - found
	for i := range found {
		if b, _ := sc.pool.lookup(s.hashAt(i)); sc.pool.refs[b] == 0 {
			need++
		}
	}
	return need <= sc.pool.free
}

func (sc *scheduler) holdPrefix(s *sequence, found int, now int64) {
	for i := range found {
		b, _ := sc.pool.lookup(s.hashAt(i))
		sc.pool.hold(b)
		s.blocks = append(s.blocks, b)
	}
	s.published, s.computed = found, found*blockSize
	if s.cached < 0 {
		s.cached, s.scheduledAt = s.computed, now
	}
}

// grow gives s the blocks for its first n tokens and publishes those that they
// fill. It reports false, having done nothing, when there are not enough.
func (sc *scheduler) grow(s *sequence, n int) bool {
	need := sc.blocksFor(n) - len(s.blocks)
	if need > sc.pool.free {
		return false
	}
	for range need {
		s.blocks = append(s.blocks, sc.pool.take())
	}
	if sc.pool.caching {
		for ; s.published < min(n/blockSize, sc.windowBlocks()); s.published++ {
			sc.pool.publish(s.blocks[s.published], s.hashAt(s.published))
		}
	}
	return true
}

func (sc *scheduler) preemptLast() *sequence {
	last := len(sc.running) - 1
	s := sc.running[last]
	sc.running = sc.running[:last]
	sc.freeBlocks(s)
	s.computed = 0
	s.preempted++
	sc.preemptions++
	sc.waiting.pushFront(s)
	return s
}

// freeBlocks gives the blocks back, the end first, so that the beginning of a
// prompt, which others may share, is forgotten last.
func (sc *scheduler) freeBlocks(s *sequence) {
	for _, b := range slices.Backward(s.blocks) {
		sc.pool.release(b)
	}
	s.blocks, s.published = s.blocks[:0], 0
}

// advance ends the step: what was scheduled is computed now, and each sequence
// that has caught up with its tokens has made one more. It reports whether some
// have finished; those are off the running list, with made == want.
func (sc *scheduler) advance(p *plan) (finished bool) {
	for _, s := range p.seqs {
		s.computed += s.step
		if s.emitted = s.computed == s.tokens(); !s.emitted {
			continue
		}
		if s.want > 0 {
			s.made++
		}
		finished = finished || s.made == s.want
	}
	if finished {
		sc.remove(func(s *sequence) bool { return s.emitted && s.made == s.want })
	}
	return finished
}

// remove takes the running sequences for which drop is true off the list.
func (sc *scheduler) remove(drop func(*sequence) bool) {
	sc.running = slices.DeleteFunc(sc.running, func(s *sequence) bool {
		if !drop(s) {
			return false
		}
		sc.freeBlocks(s)
		return true
	})
}

// dropGone forgets every sequence whose client has left.
func (sc *scheduler) dropGone() {
	gone := func(s *sequence) bool { return s.call.gone }
	sc.remove(gone)
	sc.waiting.deleteFunc(gone)
}

// blocksFor is how many blocks of all layers so many tokens take. Past its window a sliding layer gives a block back
// for each one that it takes, so that only the other layers grow.
func (sc *scheduler) blocksFor(tokens int) int {
	if sc.window > 0 && tokens > sc.window {
		tokens = sc.window + (tokens-sc.window+sc.sliding)/(sc.sliding+1)
	}
	return (tokens + blockSize - 1) / blockSize
}

// windowBlocks is how many leading blocks of a sequence are whole, with all layers in them.
func (sc *scheduler) windowBlocks() int {
	if sc.window > 0 {
		return sc.window / blockSize
	}
	return math.MaxInt
}

// queue is a first-in-first-out list of sequences that takes some back in front.
type queue struct {
	items []*sequence
	head  int
}

func (q *queue) len() int             { return len(q.items) - q.head }
func (q *queue) front() *sequence     { return q.items[q.head] }
func (q *queue) pushBack(s *sequence) { q.items = append(q.items, s) }
func (q *queue) all() []*sequence     { return q.items[q.head:] }

func (q *queue) popFront() {
	q.items[q.head] = nil
	if q.head++; q.head > 64 && q.head > len(q.items)/2 {
		n := copy(q.items, q.items[q.head:])
		clear(q.items[n:])
		q.items, q.head = q.items[:n], 0
	}
}

func (q *queue) pushFront(s *sequence) {
	if q.head == 0 {
		q.items = slices.Insert(q.items, 0, s)
		return
	}
	q.head--
	q.items[q.head] = s
}

func (q *queue) deleteFunc(drop func(*sequence) bool) {
	kept := slices.DeleteFunc(q.items[q.head:], drop)
	q.items = q.items[:q.head+len(kept)]
}
