package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// load is a set of calls straight for the scheduler.
func load(e *Engine, n int, shape func(i int) (prompt string, want int)) []*call {
	calls := make([]*call, n)
	for i := range calls {
		text, want := shape(i)
		q := &request{route: routeCompletion, n: 1, maxTokens: want, hasMax: true, ignoreEOS: true}
		q.Prompt = quote(nil, text)
		calls[i] = e.newCall(q, []string{text}, verdict{slow: 1})
	}
	return calls
}

// words is a prompt of so many tokens, the same for the same name.
func words(name string, tokens int) string {
	return strings.Repeat(fmt.Sprintf("%-7s ", name), tokens)[:4*tokens]
}

func testEngine(t *testing.T, cfg Config) *Engine {
	t.Helper()
	cfg.Models = []string{"tiny"}
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// checkPool recounts the KV cache from the sequences that hold it.
func checkPool(t *testing.T, sc *scheduler) {
	t.Helper()
	refs := make([]int32, len(sc.pool.refs))
	for _, s := range sc.running {
		if len(s.blocks)*blockSize < s.computed || len(s.blocks) > sc.blocksFor(s.tokens()) {
			t.Fatalf("%d blocks for %d computed of %d tokens", len(s.blocks), s.computed, s.tokens())
		}
		for _, b := range s.blocks {
			refs[b]++
		}
	}
	free := 0
	for b, n := range refs {
		if n != sc.pool.refs[b] {
			t.Fatalf("block %d has %d users, counted as %d", b, n, sc.pool.refs[b])
		}
		if n == 0 {
			free++
		}
	}
	if free != sc.pool.free || sc.pool.used() > len(refs) {
		t.Fatalf("%d blocks are free, counted as %d", free, sc.pool.free)
	}
	for hash, b := range sc.pool.cached {
		if sc.pool.hashes[b] != hash {
			t.Fatalf("block %d is found by a hash that is not its own", b)
		}
	}
}

// drive steps the scheduler until it has nothing to do.
func drive(t *testing.T, sc *scheduler, check func(p *plan)) (steps int) {
	t.Helper()
	var p plan
	for ; sc.busy(); steps++ {
		if steps > 1_000_000 {
			t.Fatal("the scheduler makes no progress")
		}
		sc.schedule(&p, 1)
		checkPool(t, sc)
		total := 0
		for _, s := range p.seqs {
			total += s.step
		}
		if total > sc.maxTokens || len(sc.running) > sc.maxSeqs {
			t.Fatalf("step of %d tokens with %d sequences", total, len(sc.running))
		}
		check(&p)
		sc.advance(&p)
	}
	return steps
}

func TestSchedulerConserves(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 0))
		e := testEngine(t, Config{
			MaxModelLen: 400, KVTokens: 400 + rng.IntN(2000), MaxNumSeqs: 1 + rng.IntN(20), MaxBatchedTokens: 1 + rng.IntN(300),
			NoPrefixCaching: seed%3 == 0,
		})
		calls := load(e, 60, func(i int) (string, int) {
			return words(fmt.Sprint(rng.IntN(6)), 1+rng.IntN(250)), 1 + rng.IntN(149)
		})
		for _, c := range calls {
			if rng.IntN(8) == 0 {
				c.seqs[0].slow = 3
			}
			e.sched.add(c)
		}
		drive(t, e.sched, func(*plan) {})
		for i, c := range calls {
			s := c.seqs[0]
			if s.made != c.maxTokens || s.made != s.want || s.cached < 0 || s.cached >= s.prompt {
				t.Fatalf("seed %d, call %d: %d of %d tokens, %d of %d cached", seed, i, s.made, c.maxTokens, s.cached, s.prompt)
			}
		}
		if e.sched.pool.used() != 0 {
			t.Fatalf("seed %d: %d blocks are still held", seed, e.sched.pool.used())
		}
	}
}

func TestPreemption(t *testing.T) {
	// 100 blocks; a sequence ends with 20: five fit to the end, more start.
	e := testEngine(t, Config{MaxModelLen: 400, KVTokens: 1600, NoPrefixCaching: true})
	calls := load(e, 40, func(i int) (string, int) { return words(fmt.Sprint(i), 160), 160 })
	for _, c := range calls {
		e.sched.add(c)
	}
	most := 0
	drive(t, e.sched, func(*plan) { most = max(most, len(e.sched.running)) })
	if e.sched.preemptions == 0 {
		t.Error("nobody was pre-empted")
	}
	if most <= 5 || most > 10 {
		t.Errorf("%d ran at once, want 6 to 10", most)
	}
	if calls[0].seqs[0].preempted != 0 {
		t.Error("the first to come was pre-empted")
	}
	for _, c := range calls {
		if c.seqs[0].made != 160 {
			t.Errorf("made %d tokens", c.seqs[0].made)
		}
	}
}

func TestNoPreemptionWithoutNeed(t *testing.T) {
	e := testEngine(t, Config{MaxModelLen: 400, KVTokens: 1600, MaxNumSeqs: 5, NoPrefixCaching: true})
	for _, c := range load(e, 40, func(i int) (string, int) { return words(fmt.Sprint(i), 160), 160 }) {
		e.sched.add(c)
	}
	drive(t, e.sched, func(*plan) {})
	if n := e.sched.preemptions; n != 0 {
		t.Errorf("%d pre-emptions with five sequences that fit", n)
	}
}

func TestChunkedPrefill(t *testing.T) {
	e := testEngine(t, Config{MaxBatchedTokens: 100, NoPrefixCaching: true})
	for _, c := range load(e, 1, func(int) (string, int) { return words("a", 50), 20 }) {
		e.sched.add(c)
	}
	for _, c := range load(e, 1, func(int) (string, int) { return words("b", 250), 1 }) {
		e.sched.add(c)
	}
	var got []string
	drive(t, e.sched, func(p *plan) { got = append(got, fmt.Sprintf("%d+%d", p.prefill, p.decodes)) })
	want := "100+0 99+1 99+1 2+1" // 50 and 50 of b; then one of a and what is left
	if s := strings.Join(got[:4], " "); s != want {
		t.Errorf("prefill+decodes are %s, want %s", s, want)
	}
	if len(got) != 20 {
		t.Errorf("%d steps, want the 20 of a", len(got))
	}
}

func TestPrefixCache(t *testing.T) {
	e := testEngine(t, Config{MaxModelLen: 400, KVTokens: 1600})
	run := func(prompt string) *sequence {
		c := load(e, 1, func(int) (string, int) { return prompt, 10 })[0]
		e.sched.add(c)
		drive(t, e.sched, func(*plan) {})
		return c.seqs[0]
	}
	base := words("same", 160)
	for _, step := range []struct {
		prompt string
		cached int
	}{
		{base, 0},
		{base, 144}, // all but the block with the last token
		{base + words("more", 30), 160},
		{words("other", 16) + base, 0},
		{base[:4*40] + words("x", 10), 32}, // a part of a block is none
	} {
		if s := run(step.prompt); s.cached != step.cached {
			t.Errorf("%d of %d tokens cached, want %d", s.cached, s.prompt, step.cached)
		}
	}
	for i := range 10 {
		run(words(fmt.Sprint(i), 300)) // 10 × 19 blocks push out all 100
	}
	if s := run(base); s.cached != 0 {
		t.Errorf("%d tokens cached after eviction", s.cached)
	}
}

// Every attempt to admit counts as a query again, as in vLLM.
func TestPrefixQueriesInflate(t *testing.T) {
	e := testEngine(t, Config{MaxModelLen: 400, KVTokens: 400})
	prompts := 0
	for _, c := range load(e, 10, func(i int) (string, int) { return words(fmt.Sprint(i), 160), 100 }) {
		prompts += c.seqs[0].prompt
		e.sched.add(c)
	}
	drive(t, e.sched, func(*plan) {})
	if e.sched.queried < 5*uint64(prompts) {
		t.Errorf("%d tokens queried for %d in prompts", e.sched.queried, prompts)
	}
}

// The time of a step is exactly that of the model, in the false clock of the bubble.
func TestStepTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := testEngine(t, Config{
			StepTime: 5 * time.Millisecond, DecodeTime: 100 * time.Microsecond, PrefillTime: 10 * time.Microsecond, NoPrefixCaching: true,
		})
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.Run(ctx) }()
		start := time.Now()
		calls := load(e, 4, func(i int) (string, int) { return words(fmt.Sprint(i), 100), 50 })
		e.faults.Store(Faults{Hang: true}.arm(0)) // so that all four come at once
		for _, c := range calls {
			e.inbox.submit(c)
		}
		if err := e.SetFaults(Faults{}); err != nil {
			t.Fatal(err)
		}
		for _, c := range calls {
			<-c.done
		}
		want := 50*e.cfg.StepTime + 400*e.cfg.PrefillTime + 4*49*e.cfg.DecodeTime
		if got := time.Since(start); got != want {
			t.Errorf("took %v, want %v", got, want)
		}
		if s := e.stats; s.generated != 200 || s.firstToken.sum != 4*(e.cfg.StepTime+400*e.cfg.PrefillTime).Seconds() {
			t.Errorf("%d tokens, first after %v s", s.generated, s.firstToken.sum)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestSlowSequence(t *testing.T) {
	e := testEngine(t, Config{})
	calls := load(e, 2, func(int) (string, int) { return "x", 30 })
	calls[0].seqs[0].slow = 10
	e.sched.add(calls[0])
	e.sched.add(calls[1])
	if steps := drive(t, e.sched, func(p *plan) {
		if e.sched.steps == 31 && calls[1].seqs[0].made != 30 {
			t.Error("the other one is slow, too")
		}
	}); steps < 281 || steps > 310 {
		t.Errorf("30 tokens at a tenth of the speed took %d steps", steps)
	}
}

func TestQueue(t *testing.T) {
	var q queue
	next := func() *sequence { return &sequence{} }
	var want []*sequence
	rng := rand.New(rand.NewPCG(1, 2))
	for range 5000 {
		switch op := rng.IntN(7); {
		case op < 3:
			s := next()
			q.pushBack(s)
			want = append(want, s)
		case op == 3:
			s := next()
			q.pushFront(s)
			want = append([]*sequence{s}, want...)
		case op < 6 && len(want) > 0:
			if q.front() != want[0] {
				t.Fatal("wrong front")
			}
			q.popFront()
			want = want[1:]
		case len(want) > 3:
			drop := want[2]
			q.deleteFunc(func(s *sequence) bool { return s == drop })
			want = append(want[:2:2], want[3:]...)
		}
		if q.len() != len(want) {
			t.Fatalf("%d items, want %d", q.len(), len(want))
		}
	}
}
