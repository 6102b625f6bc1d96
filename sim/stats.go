package sim

import (
	"sort"
	"sync"
	"time"
)

// stats are the numbers behind /metrics. The loop writes them at the end of a
// step, which is when vLLM's move too; a scrape reads them. Times are seconds.
type stats struct {
	mu      sync.Mutex
	created float64 // Unix time of the start

	running, waiting int
	usage            float64 // 0 to 1

	queried, hit, preemptions uint64 // copies of the scheduler's

	prompt    uint64 // tokens of prompts that are computed, cached ones too
	cached    uint64 // of those, found in the prefix cache
	generated uint64 // tokens
	finished  [finishRepetition + 1]uint64
	rejected  uint64 // by MaxQueued

	promptTokens, generationTokens, iterationTokens, maxGeneration histogram
	paramN, paramMaxTokens                                         histogram
	firstToken, interToken, perToken                               histogram
	latency, queueTime, inference, prefill, decode                 histogram
	preempted, computed                                            histogram

	last int64 // end of the step before, ns since the start of the engine
}

// histogram counts by upper bounds, the last bucket being +Inf.
type histogram struct {
	bounds []float64
	counts []uint64 // not cumulative
	sum    float64
}

func newHistogram(bounds []float64) histogram {
	return histogram{bounds: bounds, counts: make([]uint64, len(bounds)+1)}
}

// observe counts v n times.
func (h *histogram) observe(v float64, n uint64) {
	h.counts[sort.SearchFloat64s(h.bounds, v)] += n
	h.sum += v * float64(n)
}

// tokenBounds are 1, 2, 5, 10, 20 … up to the context.
func tokenBounds(maxLen int) (bounds []float64) {
	for decade := 1; ; decade *= 10 {
		for _, m := range []int{1, 2, 5} {
			if m*decade > maxLen {
				return bounds
			}
			bounds = append(bounds, float64(m*decade))
		}
	}
}

func newStats(cfg Config) *stats {
	tokens := tokenBounds(cfg.MaxModelLen)
	requests := []float64{.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680}
	between := []float64{.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80}
	first := []float64{.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560}
	steps := []float64{1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384}
	return &stats{
		created:          float64(time.Now().UnixNano()) / 1e9,
		promptTokens:     newHistogram(tokens),
		generationTokens: newHistogram(tokens),
		maxGeneration:    newHistogram(tokens),
		paramMaxTokens:   newHistogram(tokens),
		computed:         newHistogram(tokens),
		iterationTokens:  newHistogram(steps),
		paramN:           newHistogram([]float64{1, 2, 5, 10, 20}),
		firstToken:       newHistogram(first),
		interToken:       newHistogram(between),
		perToken:         newHistogram(between),
		latency:          newHistogram(requests),
		queueTime:        newHistogram(requests),
		inference:        newHistogram(requests),
		prefill:          newHistogram(requests),
		decode:           newHistogram(requests),
		preempted:        newHistogram([]float64{1, 2, 3, 4, 5, 10, 20}),
	}
}

// step counts what a step has made, at the time now of its end.
func (st *stats) step(now int64, p *plan, sc *scheduler) {
	st.mu.Lock()
	defer st.mu.Unlock()
	var made, steady, iteration uint64
	for _, s := range p.seqs {
		if !s.emitted {
			continue
		}
		if s.want > 0 {
			made++
		}
		switch {
		case s.firstAt == 0:
			iteration += st.first(now, s)
		case s.lastAt == st.last:
			steady++
		default:
			st.interToken.observe(seconds(now-s.lastAt), 1)
		}
		s.lastAt = now
		if s.made == s.want {
			st.finish(now, s)
		}
	}
	if steady > 0 {
		st.interToken.observe(seconds(now-st.last), steady)
	}
	if iteration += made; iteration > 0 {
		st.iterationTokens.observe(float64(iteration), 1)
	}
	st.generated += made
	st.last = now
	st.set(sc)
}

// first counts a prompt that is computed, and returns its tokens that were not cached.
func (st *stats) first(now int64, s *sequence) uint64 {
	s.firstAt = now
	st.prompt += uint64(s.prompt)
	st.cached += uint64(s.cached)
	if s.want > 0 {
		st.firstToken.observe(seconds(now-s.call.arrived), 1)
	}
	return uint64(s.prompt - s.cached)
}

func (st *stats) finish(now int64, s *sequence) {
	st.finished[s.reason]++
	st.promptTokens.observe(float64(s.prompt), 1)
	st.generationTokens.observe(float64(s.made), 1)
	st.paramMaxTokens.observe(float64(s.call.maxTokens), 1)
	st.computed.observe(float64(s.prompt-s.cached), 1)
	st.preempted.observe(float64(s.preempted), 1)
	st.latency.observe(seconds(now-s.call.arrived), 1)
	st.queueTime.observe(seconds(s.scheduledAt-s.call.arrived), 1)
	st.prefill.observe(seconds(s.firstAt-s.scheduledAt), 1)
	st.decode.observe(seconds(now-s.firstAt), 1)
	st.inference.observe(seconds(now-s.scheduledAt), 1)
	perToken := 0.0
	if s.made > 1 {
		perToken = seconds(now-s.firstAt) / float64(s.made-1)
	}
	st.perToken.observe(perToken, 1)
}

// call counts the parameters of a call that is finished, once per prompt.
func (st *stats) call(c *call) {
	if c.maxTokens == 0 {
		return // embeddings have none
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	for i := 0; i < len(c.seqs); i += c.choices {
		longest := 0
		for _, s := range c.seqs[i : i+c.choices] {
			longest = max(longest, s.made)
		}
		st.maxGeneration.observe(float64(longest), 1)
		st.paramN.observe(float64(c.choices), 1)
	}
}

func (st *stats) reject() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.rejected++
}

func (st *stats) gauges(sc *scheduler) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.set(sc)
}

func (st *stats) set(sc *scheduler) {
	st.running, st.waiting = len(sc.running), sc.waiting.len()
	st.usage = float64(sc.pool.used()) / float64(len(sc.pool.refs))
	st.queried, st.hit, st.preemptions = sc.queried, sc.hit, sc.preemptions
}

func seconds(ns int64) float64 { return float64(ns) / 1e9 }
