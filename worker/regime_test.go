package worker_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"millrace/proto"
	"millrace/sim"
	"millrace/worker"
)

// ask is a line of a regime: what it holds, and what it says in max_tokens.
type ask struct {
	sim.Request
	most int
}

// regime is an engine and a kind of lines.
type regime struct {
	name   string
	engine sim.Config
	fit    int // lines that fit to their ends, about
	line   func(r *rand.Rand, i, of int) ask
	mute   bool // its metrics vanish after a quarter of the lines
}

// The engines have the times of those of sim.TestMeasured, a KV cache of any size, and no sliding window.
func card(kv, seqs, batched int, step, decode, prefill time.Duration) sim.Config {
	return sim.Config{KVTokens: kv, MaxNumSeqs: seqs, MaxBatchedTokens: batched, StepTime: step * time.Microsecond, DecodeTime: decode * time.Microsecond, PrefillTime: prefill * time.Microsecond}
}

func big(kv int) sim.Config   { return card(kv, 1024, 8192, 3000, 55, 20) }
func small(kv int) sim.Config { return card(kv, 256, 2048, 3100, 60, 28) }
func fast(kv int) sim.Config  { return card(kv, 1024, 8192, 1500, 30, 2) }

func fixed(prompt, output int) func(*rand.Rand, int, int) ask {
	return func(*rand.Rand, int, int) ask { return ask{sim.Request{Prompt: prompt, Output: output}, output} }
}

func uniform(prompt, least, most int) func(*rand.Rand, int, int) ask {
	return func(r *rand.Rand, _, _ int) ask {
		return ask{sim.Request{Prompt: prompt, Output: least + r.IntN(most-least+1)}, most}
	}
}

func longTail(prompt int, median, sigma float64, most int) func(*rand.Rand, int, int) ask {
	return func(r *rand.Rand, _, _ int) ask {
		return ask{sim.Request{Prompt: prompt, Output: min(most, max(1, int(median*math.Exp(sigma*r.NormFloat64()))))}, most}
	}
}

func half(a, b func(*rand.Rand, int, int) ask) func(*rand.Rand, int, int) ask {
	return func(r *rand.Rand, i, of int) ask {
		if i < of/2 {
			return a(r, i, of)
		}
		return b(r, i, of)
	}
}

func shared(tokens, groups int, a func(*rand.Rand, int, int) ask) func(*rand.Rand, int, int) ask {
	return func(r *rand.Rand, i, of int) ask {
		l := a(r, i, of)
		l.Shared, l.Group = tokens, 1+uint64(r.IntN(groups))
		return l
	}
}

func regimes(most int) (out []regime) {
	for _, size := range []struct {
		fit    int
		engine func(kv int) sim.Config
	}{{10, small}, {30, small}, {100, big}, {432, big}, {1000, fast}} {
		if size.fit > most {
			break
		}
		add := func(name string, kv int, line func(*rand.Rand, int, int) ask) {
			out = append(out, regime{name: name, engine: size.engine(size.fit*kv + 4096), fit: size.fit, line: line})
		}
		add("788 + 308", 1096, fixed(788, 308))
		add("788 + 50 to 600", 1113, uniform(788, 50, 600))
		add("100 + 1,000", 1100, fixed(100, 1000))
		add("300 + long tail, median 150", 547, longTail(300, 150, 1, 3000))
		add("100 + 100, then 1,500 + 600", 1150, half(fixed(100, 100), fixed(1500, 600)))
		add("1,500 + 600, then 100 + 100", 1150, half(fixed(1500, 600), fixed(100, 100)))
		add("788 + 308, of them 600 shared by a fifth", 1096, shared(600, 5, fixed(788, 308)))
		if size.fit == 100 {
			r := out[len(out)-6]
			r.name, r.mute = r.name+", metrics vanish", true
			out = append(out, r)
		}
		if size.fit == 432 {
			add("788 + 308, 256 sequences at most", 1096, fixed(788, 308))
			out[len(out)-1].engine.MaxNumSeqs = 256
		}
	}
	return out
}

func (g *regime) lines(of int) []ask {
	r := rand.New(rand.NewPCG(1, 2))
	out := make([]ask, of)
	for i := range out {
		out[i] = g.line(r, i, of)
	}
	return out
}

// run runs lines through the engine, with a fixed number in flight or, for 0, as many as the controller says, whose least
// and largest limit in the last third, while there are lines, it returns.
func (g *regime) run(t testing.TB, lines []ask, inFlight int) (f sim.Figures, least, largest int) {
	t.Helper()
	v, err := sim.NewVirtual(g.engine)
	if err != nil {
		t.Fatal(err)
	}
	loop := sim.Loop{Requests: make([]sim.Request, len(lines)), InFlight: func() int { return inFlight }, Turn: 15 * time.Millisecond, Spacing: 2 * time.Millisecond}
	for i := range lines {
		loop.Requests[i] = lines[i].Request
	}
	if inFlight > 0 {
		return loop.Run(v), inFlight, inFlight
	}
	c := worker.NewLimit()
	look := func(n int) {
		l := v.Load()
		c.Observe(worker.Status{State: proto.EngineReady, MaxLen: int64(g.engine.MaxModelLen), Gauges: worker.Gauges{Known: true, KVTokens: int64(g.engine.KVTokens),
			KVUsage: l.KVUsage, Running: int64(l.Running), Waiting: int64(l.Waiting), Generation: l.Generated, Preemptions: l.Preemptions}}, n, time.Unix(0, 0).Add(v.Now()))
	}
	look(0)
	const bytesPerToken = 4
	begun, done := 0, 0
	loop.InFlight = c.Get
	loop.Sent = func(r *sim.Request) {
		begun++
		c.Expects(bytesPerToken*r.Prompt, lines[r.ID].most)
	}
	loop.Ended = func(r *sim.Request, took time.Duration) {
		done++
		c.Finished(proto.Usage{Counted: true, Prompt: int64(r.Prompt), Completion: int64(r.Output)}, bytesPerToken*r.Prompt, lines[r.ID].most, took)
	}
	least = math.MaxInt
	loop.Look = func(n int) time.Duration {
		if !g.mute || done < len(lines)/4 {
			look(n)
		}
		if begun > len(lines)*2/3 && begun < len(lines) {
			least, largest = min(least, c.Get()), max(largest, c.Get())
		}
		return min(2*time.Second, c.Pace())
	}
	return loop.Run(v), least, largest
}

// best sweeps over fixed numbers in flight.
func (g *regime) best(t testing.TB, lines []ask) (inFlight int, rate float64) {
	t.Helper()
	tried := map[int]bool{}
	try := func(x float64) {
		n := min(max(1, int(x+0.5)), g.engine.MaxNumSeqs)
		if tried[n] {
			return
		}
		tried[n] = true
		if f, _, _ := g.run(t, lines, n); f.Rate > rate {
			inFlight, rate = n, f.Rate
		}
	}
	for x := float64(g.fit) / 2; x < 6*float64(g.fit); x *= 1.25 {
		try(x)
	}
	around := float64(inFlight)
	for _, by := range []float64{0.85, 0.92, 0.96, 1.04, 1.08, 1.16} {
		try(around * by)
	}
	return inFlight, rate
}

// TestRegimes holds the controller against the best fixed number in flight, which knows all lines before: in jobs of 20
// times as many lines as fit, and in short ones of 3 times as many. The aims are 0.97 and 0.95; what falls short of them is
// in docs/measurements/in-flight.md, and the test keeps it from getting worse. MILLRACE_REGIMES=all runs the large ones too,
// and with -v it prints the table.
func TestRegimes(t *testing.T) {
	most := 30
	if os.Getenv("MILLRACE_REGIMES") == "all" {
		most = math.MaxInt
	}
	t.Log("| fit | lines | 20 times: best fixed | tok/s | controller | of it | limit at the end | pre-emptions a line | 3 times: best fixed | of it |")
	for _, g := range regimes(most) {
		long, short := g.lines(20*g.fit), g.lines(3*g.fit)
		n, rate := g.best(t, long)
		f, least, largest := g.run(t, long, 0)
		n3, rate3 := g.best(t, short)
		f3, _, _ := g.run(t, short, 0)
		of, of3 := f.Rate/rate, f3.Rate/rate3
		t.Logf("| %d | %s | %d | %.0f | %.0f | %.3f | %s | %.3f | %d | %.3f |", g.fit, g.name, n, rate, f.Rate, of,
			fmt.Sprintf("%d to %d", least, largest), float64(f.Preemptions)/float64(len(long)), n3, of3)
		if of < 0.94 || of3 < 0.84 {
			t.Errorf("%s, %d fit: %.3f and %.3f of the best", g.name, g.fit, of, of3)
		}
	}
}
