package load_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"millrace/sim"
)

// TestGraphs: an engine that is slower in steps of more than 512 tokens is kept to as many sequences; where lines end one by
// one, those that follow them begin together, and that makes more than any fixed number.
func TestGraphs(t *testing.T) {
	for _, c := range []struct {
		name         string
		line         func(*rand.Rand, int, int) ask
		engine       sim.Config
		kv, seqs     int
		others, best int     // of another client; fixed number in flight
		of           float64 // of what that makes
		least, most  int     // limit at the end
	}{
		{"788 + 308", fixed(788, 308), graphed(0), 880_000, 1024, 0, 500, 0.95, 512, 640},
		{"788 + 50 to 600", uniform(788, 50, 600), graphed(0), 880_000, 1024, 0, 899, 1.04, 512, 640},
		{"788 + 50 to 600, 128 sequences at most", uniform(788, 50, 600), graphed(0), 880_000, 128, 0, 132, 1.08, 128, 128},
		{"300 + long tail, KV cache for 650", longTail(300, 150, 1, 3000), graphed(0), 359_646, 1024, 0, 512, 1.04, 470, 512},
		{"60 + 20 to 280, 64 sequences at most", uniform(60, 20, 280), graphed(0), 880_000, 64, 0, 67, 0.97, 64, 67},
		{"600 + 10 to 30, 256 sequences at most", uniform(600, 10, 30), graphed(0), 880_000, 256, 0, 263, 0.97, 250, 290},
		{"100 + 50 to 600, another client", uniform(100, 50, 600), card(0, 1024, 8192, 3000, 30, 2), 880_000, 1024, 50, 974, 0.93, 700, 1024},
		{"788 + 308, large graphs", fixed(788, 308), largeGraphs(0), 880_000, 1024, 0, 807, 0.97, 790, 850},
		{"788 + 50 to 600, large graphs", uniform(788, 50, 600), largeGraphs(0), 880_000, 1024, 0, 899, 0.97, 800, 1024},
	} {
		g := regime{name: c.name, engine: c.engine, line: c.line, others: c.others}
		if g.engine.GraphTokens > 512 {
			g.graphs = int64(g.engine.GraphTokens)
		}
		g.engine.KVTokens, g.engine.MaxNumSeqs = c.kv, c.seqs
		lines := g.lines(12000)
		best, got := g.run(t, lines, c.best, tellsAll), g.run(t, lines, 0, tellsAll)
		t.Logf("%s: %.3f of the best, limit in the last half %d to %d; %s", c.name, got.rate/best.rate, got.least, got.largest, got.why)
		if got.rate < c.of*best.rate || got.least < c.least || got.largest > c.most {
			t.Errorf("%s: %.3f of the best, %d to %d; %s", c.name, got.rate/best.rate, got.least, got.largest, got.why)
		}
	}
}

// TestPromptsFirst: lines that are almost all prompt keep few running, whatever is in flight; that says nothing of those that
// come after them.
func TestPromptsFirst(t *testing.T) {
	prompts, outputs := fixed(1500, 5), fixed(100, 400)
	for _, c := range []struct {
		name string
		line func(*rand.Rand, int, int) ask
		best int // fixed number in flight
	}{{"1,500 + 5, then 100 + 400", half(prompts, outputs), 890}, {"the same in turns", turns(1500, prompts, outputs), 956}} {
		g := regime{name: c.name, engine: big(432 * 1100), line: c.line}
		g.engine.MaxModelLen = 4096
		lines := g.lines(6000)
		best, got := g.run(t, lines, c.best, tellsAll), g.run(t, lines, 0, tellsAll)
		t.Logf("%s: %.3f of the best, limit in the last half %d to %d", c.name, got.rate/best.rate, got.least, got.largest)
		if got.rate < 0.9*best.rate {
			t.Errorf("%s: %.3f of the best; %s", c.name, got.rate/best.rate, got.why)
		}
	}
}

// TestFewAtOnce: an engine that runs few at once gets not many more of them, not even at first, whatever its KV cache would hold;
// nor fewer, though some of them have just ended whenever it tells how many run. Of short outputs more wait in it, since who is
// sent only when another one has ended misses a step. Fixed numbers are of an engine that nobody knows.
func TestFewAtOnce(t *testing.T) {
	for _, c := range []struct {
		seqs, told           int
		prompt, output, step int // tokens, from half as many to half more; ms
		best                 int // fixed number in flight
		of                   float64
		least, most          int // limit in the last half
	}{
		{32, 0, 300, 125, 3, 36, 0.99, 32, 36}, {100, 0, 300, 125, 3, 104, 0.98, 98, 104}, {64, 0, 10, 20, 100, 72, 0.97, 64, 75},
		{100, 0, 10, 20, 100, 117, 0.97, 100, 118}, {128, 0, 10, 10, 100, 160, 0.96, 128, 168}, {48, 0, 20, 5, 100, 74, 0.95, 54, 80},
		{200, 0, 20, 5, 100, 302, 0.93, 230, 310}, {96, 0, 300, 5, 20, 146, 0.97, 110, 150}, {48, 0, 20, 20, 3, 74, 0.95, 48, 58},
		{96, 0, 20, 1, 100, 146, 0.9, 96, 256}, {200, 200, 300, 5, 20, 202, 0.98, 200, 302}, {128, 128, 20, 20, 20, 142, 0.97, 128, 150},
	} {
		g := regime{engine: big(880_000), line: uniform(c.prompt, max(1, c.output/2), max(1, c.output+c.output/2)), told: int64(c.told)}
		if c.output == 1 {
			g.line = fixed(c.prompt, 1)
		}
		g.engine.MaxNumSeqs, g.engine.StepTime = c.seqs, time.Duration(c.step)*time.Millisecond
		lines := g.lines(100 * c.seqs)
		best, got := g.run(t, lines, c.best, tellsAll), g.run(t, lines, 0, tellsAll)
		t.Logf("%+v: %d at most, %d to %d in the last half, %.3f of the best; %s", c, got.peak, got.least, got.largest, got.rate/best.rate, got.why)
		if peak := max(64, 3*c.seqs) + 10; got.peak > peak || got.least < c.least || got.largest > c.most || got.rate < c.of*best.rate {
			t.Errorf("%+v: %d at most, %d to %d in the last half, %.3f of the best; %s", c, got.peak, got.least, got.largest, got.rate/best.rate, got.why)
		}
	}
}
