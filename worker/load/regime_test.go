package load_test

import (
	"math"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"millrace/proto"
	"millrace/sim"
	"millrace/worker/load"
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
	mute   bool  // its metrics vanish after a quarter of the lines
	steady bool  // what lines hold stays the same
	prefix bool  // they share it, which only the load of the engine shows
	pause  bool  // half of the lines come a minute after the others have ended
	others int   // requests of another client that are always there
	shared int   // workers that share the engine; 0: one
	graphs int64 // tokens of its largest CUDA graph, as its log says; 0: nobody knows
	told   int64 // sequences that it runs at once, by its flags; 0: nobody knows
}

// view is what an engine tells of itself.
type view int

const (
	tellsAll      view = iota
	tellsUse           // of its KV cache, not the capacity: vLLM's Rust frontend
	tellsCapacity      // and no load: SGLang without --enable-metrics
	tellsNothing
)

// The engines have the times of those of sim.TestMeasured, a KV cache of any size, and no sliding window.
func card(kv, seqs, batched int, step, decode, prefill time.Duration) sim.Config {
	return sim.Config{KVTokens: kv, MaxNumSeqs: seqs, MaxBatchedTokens: batched, StepTime: step * time.Microsecond, DecodeTime: decode * time.Microsecond, PrefillTime: prefill * time.Microsecond}
}

func big(kv int) sim.Config   { return card(kv, 1024, 8192, 3000, 55, 20) }
func small(kv int) sim.Config { return card(kv, 256, 2048, 3100, 60, 28) }
func fast(kv int) sim.Config  { return card(kv, 1024, 8192, 1500, 30, 2) }

// graphed is slower in steps of more than 512 tokens, and largeGraphs in those of more than 2,048.
func graphed(kv int) sim.Config {
	c := card(kv, 1024, 8192, 3000, 56, 12)
	c.GraphTokens, c.EagerTime = 512, 15*time.Millisecond
	return c
}

func largeGraphs(kv int) sim.Config {
	c := graphed(kv)
	c.GraphTokens = 2048
	return c
}

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

// turns changes from a to b and back after every n lines.
func turns(n int, a, b func(*rand.Rand, int, int) ask) func(*rand.Rand, int, int) ask {
	return func(r *rand.Rand, i, of int) ask {
		if i/n%2 == 0 {
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

func choices(n int, a func(*rand.Rand, int, int) ask) func(*rand.Rand, int, int) ask {
	return func(r *rand.Rand, i, of int) ask {
		l := a(r, i, of)
		l.Choices = n
		l.most *= n
		return l
	}
}

func regimes(most int) (out []regime) {
	for _, size := range []struct {
		fit    int
		engine func(kv int) sim.Config
	}{{10, small}, {30, small}, {100, big}, {432, big}, {800, graphed}, {1000, fast}} {
		if size.fit > most {
			break
		}
		add := func(name string, kv int, line func(*rand.Rand, int, int) ask) *regime {
			out = append(out, regime{name: name, engine: size.engine(size.fit*kv + 4096), fit: size.fit, line: line, steady: true})
			return &out[len(out)-1]
		}
		add("788 + 308", 1096, fixed(788, 308))
		add("788 + 50 to 600", 1113, uniform(788, 50, 600))
		add("100 + 1,000", 1100, fixed(100, 1000))
		add("300 + long tail, median 150", 547, longTail(300, 150, 1, 3000)).steady = false // what is in flight differs by a tenth
		add("100 + 100, then 1,500 + 600", 1150, half(fixed(100, 100), fixed(1500, 600))).steady = false
		add("1,500 + 600, then 100 + 100", 1150, half(fixed(1500, 600), fixed(100, 100))).steady = false
		add("788 + 308, of them 600 shared by a fifth", 1096, shared(600, 5, fixed(788, 308))).prefix = true
		if size.fit == 30 || size.fit == 432 {
			add("788 + 50 to 600, a minute's pause", 1113, uniform(788, 50, 600)).pause = true
			add("788 + 50 to 600, another client", 1113, uniform(788, 50, 600)).others = size.fit / 3
			add("788 + 50 to 600, two workers", 1113, uniform(788, 50, 600)).shared = 2
			add("788 + 4 × 20 to 135", 1098, choices(4, uniform(788, 20, 135)))
		}
		if size.fit == 100 {
			add("788 + 50 to 600, metrics vanish", 1113, uniform(788, 50, 600)).mute = true
		}
		if size.fit == 800 {
			add("788 + 50 to 600, 256 sequences at most", 1113, uniform(788, 50, 600)).engine.MaxNumSeqs = 256
		}
		if size.fit == 432 {
			add("788 + 308, 256 sequences at most", 1096, fixed(788, 308)).engine.MaxNumSeqs = 256
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

// course is what came of a run of a regime.
type course struct {
	rate           float64 // output tokens a second, without the pause
	preemptions    float64 // a line
	least, largest int     // limit in the last half, while there are lines
	peak           int     // of all of it
	looks          float64 // for 1,000 lines
	why            string
}

// run runs lines through the engine, with a fixed number in flight or, for 0, as many as the controller says.
func (g *regime) run(t testing.TB, lines []ask, inFlight int, tells view) (c course) {
	t.Helper()
	v, err := sim.NewVirtual(g.engine)
	if err != nil {
		t.Fatal(err)
	}
	clients := []client{&always{g.others}}
	for range max(g.shared, 1) {
		if inFlight > 0 {
			clients = append(clients, &always{inFlight / max(g.shared, 1)})
			continue
		}
		limit := load.New(0)
		clients = append(clients, &controlled{limit: limit, regime: g, engine: v, tells: tells})
	}
	parts := [][]ask{lines}
	if g.pause {
		parts = [][]ask{lines[:len(lines)/2], lines[len(lines)/2:]}
	}
	var idle time.Duration
	for i, part := range parts {
		if i > 0 {
			for range 30 {
				idle += 2 * time.Second
				v.Wait(v.Now() + 2*time.Second)
				for _, cl := range clients {
					cl.look(0, 0)
				}
			}
		}
		runPart(v, clients, part, i == len(parts)-1)
	}
	load := v.Load()
	c.rate = float64(load.Generated) / (v.Now() - idle).Seconds()
	c.preemptions = float64(load.Preemptions) / float64(len(lines))
	if last, ok := clients[len(clients)-1].(*controlled); ok {
		c.peak = last.peak
		c.least, c.largest, c.looks, c.why = last.least, last.largest, float64(last.looks)*1000/float64(len(lines)), last.limit.Reason()
	}
	return c
}

// client is one of those that send lines to the engine.
type client interface {
	most() int
	sent(ask)
	ended(a ask, took time.Duration)
	look(inFlight int, done float64) time.Duration
}

// always has so many in flight.
type always struct{ n int }

func (a *always) most() int                       { return a.n }
func (a *always) sent(ask)                        {}
func (a *always) ended(ask, time.Duration)        {}
func (a *always) look(int, float64) time.Duration { return time.Hour }

// controlled has as many in flight as the controller says.
type controlled struct {
	limit          *load.Limit
	regime         *regime
	engine         *sim.Virtual
	tells          view
	least, largest int
	peak, looks    int
}

const bytesPerToken = 4

func (c *controlled) most() int { return c.limit.Get() }
func (c *controlled) sent(a ask) {
	c.limit.Expects(bytesPerToken*a.Prompt, load.Wish{Most: a.most, Sequences: max(a.Choices, 1)})
}
func (c *controlled) ended(a ask, took time.Duration) {
	u := proto.Usage{Counted: true, Prompt: int64(a.Prompt), Completion: int64(a.Output * max(a.Choices, 1))}
	c.limit.Finished(u, bytesPerToken*a.Prompt, load.Wish{Most: a.most, Sequences: max(a.Choices, 1)}, took, time.Unix(0, 0).Add(c.engine.Now()))
}

func (c *controlled) look(n int, done float64) time.Duration {
	l := c.engine.Load()
	g := load.Gauges{Known: true, KVTokens: int64(c.regime.engine.KVTokens), KVUsage: l.KVUsage, Running: int64(l.Running), Waiting: int64(l.Waiting),
		Prompt: l.Prompts, Generation: l.Generated, Held: l.Held, Finished: l.Finished, Preemptions: l.Preemptions}
	switch {
	case c.tells == tellsNothing, c.regime.mute && done > 0.25:
		g = load.Gauges{}
	case c.tells == tellsUse:
		g.KVTokens = 0
	case c.tells == tellsCapacity:
		g = load.Gauges{KVTokens: g.KVTokens}
	}
	c.looks++
	kind := proto.KindVLLM
	if c.tells >= tellsCapacity {
		kind = proto.KindOther
	}
	st := load.Engine{Kind: kind, Run: 1, MaxLen: int64(c.regime.engine.MaxModelLen), Graphs: c.regime.graphs, Sequences: c.regime.told, Gauges: g}
	c.limit.Observe(st, n, time.Unix(0, 0).Add(c.engine.Now()))
	c.peak = max(c.peak, c.limit.Get())
	if done > 0.5 && done < 1 {
		if c.least == 0 {
			c.least = math.MaxInt
		}
		c.least, c.largest = min(c.least, c.limit.Get()), max(c.largest, c.limit.Get())
	}
	return min(2*time.Second, c.limit.Pace())
}

// runPart runs lines, each by the first client that has room.
func runPart(v *sim.Virtual, clients []client, lines []ask, last bool) {
	loop := sim.Loop{Requests: make([]sim.Request, len(lines)), Turn: 15 * time.Millisecond, Spacing: 2 * time.Millisecond}
	for i := range lines {
		loop.Requests[i] = lines[i].Request
	}
	inside, of, due := make([]int, len(clients)), make([]int, len(lines)), make([]time.Duration, len(clients))
	begun := 0
	look := func() time.Duration {
		next := time.Hour
		for i, c := range clients {
			if due[i] <= v.Now() {
				done := 0.
				if last {
					done = float64(begun) / float64(len(lines))
				}
				due[i] = v.Now() + c.look(inside[i], done)
			}
			next = min(next, due[i]-v.Now())
		}
		return next
	}
	look()
	clear(due) // lines that come to a worker that was idle make it look soon
	if c, ok := clients[len(clients)-1].(*controlled); ok {
		loop.Burst = c.limit.Burst
	}
	loop.InFlight = func() int {
		n := 0
		for i, c := range clients {
			n += max(c.most(), inside[i])
		}
		return n
	}
	loop.Sent = func(r *sim.Request) {
		begun++
		for i, c := range clients {
			if inside[i] < c.most() || i == len(clients)-1 {
				of[r.ID] = i
				inside[i]++
				c.sent(lines[r.ID])
				return
			}
		}
	}
	loop.Ended = func(r *sim.Request, took time.Duration) {
		inside[of[r.ID]]--
		clients[of[r.ID]].ended(lines[r.ID], took)
	}
	loop.Look = func(int) time.Duration { return look() }
	loop.Run(v)
}

// best sweeps over fixed numbers in flight, in steps that are fine or coarse.
func (g *regime) best(t testing.TB, lines []ask, fine bool) (inFlight int, rate float64) {
	t.Helper()
	tried := map[int]bool{}
	try := func(x float64) {
		n := min(max(g.shared, 1, int(x+0.5)), g.engine.MaxNumSeqs)
		if tried[n] {
			return
		}
		tried[n] = true
		if c := g.run(t, lines, n, tellsAll); c.rate > rate {
			inFlight, rate = n, c.rate
		}
	}
	step, near := 1.25, []float64{0.85, 0.92, 0.96, 1.04, 1.08, 1.16}
	if !fine {
		step, near = 1.5, []float64{0.85, 1.16}
	}
	for x := float64(g.fit) / 2; x < 6*float64(g.fit); x *= step {
		try(x)
	}
	around := float64(inFlight)
	for _, by := range near {
		try(around * by)
	}
	return inFlight, rate
}

// TestRegimes holds the controller against the best fixed number in flight, which knows all lines before: in jobs of 20
// times as many lines as fit, and in short ones of 3 times as many. The aims are 0.97 and 0.95; what falls short of them is
// in docs/measurements/in-flight.md, and the test keeps it from getting worse. MILLRACE_REGIMES=all runs the large ones too, with a finer sweep,
// and with -v it prints the table. The last three columns are engines that tell less: the use of their KV cache and not its
// capacity, the capacity alone, nothing.
func TestRegimes(t *testing.T) {
	most, all := 30, os.Getenv("MILLRACE_REGIMES") == "all"
	if all {
		most = math.MaxInt
	}
	t.Log("| fit | lines | 20 times: best fixed | tok/s | controller | of it | limit, last half | pre-emptions a line | looks for 1,000 lines | 3 times: best fixed | of it | tells use | tells capacity | tells nothing |")
	for _, g := range regimes(most) {
		long, short := g.lines(20*g.fit), g.lines(3*g.fit)
		n, rate := g.best(t, long, all)
		n3, rate3 := g.best(t, short, all)
		c, c3 := g.run(t, long, 0, tellsAll), g.run(t, short, 0, tellsAll)
		of, of3 := c.rate/rate, c3.rate/rate3
		var less [3]float64
		for i, tells := range []view{tellsUse, tellsCapacity, tellsNothing} {
			less[i] = g.run(t, long, 0, tells).rate / rate
		}
		t.Logf("| %d | %s | %d | %.0f | %.0f | %.3f | %d to %d | %.3f | %.0f | %d | %.3f | %.3f | %.3f | %.3f |", g.fit, g.name, n, rate, c.rate, of,
			c.least, c.largest, c.preemptions, c.looks, n3, of3, less[0], less[1], less[2])
		if of < 0.94 || of3 < 0.86 {
			t.Errorf("%s, %d fit: %.3f and %.3f of the best", g.name, g.fit, of, of3)
		}
		graphs := g.engine.GraphTokens > 0 // an edge that is only looked for where an engine tells its load
		if less[0] < 0.94 || less[1] < 0.92 && !g.prefix && !graphs || less[1] < 0.7 || less[2] < 0.86 && !graphs || less[2] < 0.82 {
			t.Errorf("%s, %d fit: %.3f of the best for engines that tell less", g.name, g.fit, less)
		}
	}
}

// TestSettles: where lines stay as they are, the limit is in the last half of a job within 10 per cent of itself.
func TestSettles(t *testing.T) {
	all := regimes(100)
	for _, c := range []struct{ fit, seqs int }{{100, 60}, {432, 256}, {432, 16}} {
		g := regime{name: "788 + 308, few sequences at most", engine: big(c.fit*1096 + 4096), fit: c.fit, line: fixed(788, 308), steady: true}
		g.engine.MaxNumSeqs = c.seqs
		all = append(all, g)
	}
	for _, g := range all {
		if !g.steady {
			continue
		}
		c := g.run(t, g.lines(60*g.fit), 0, tellsAll)
		t.Logf("%s, %d fit: %d to %d, %.0f looks for 1,000 lines", g.name, g.fit, c.least, c.largest, c.looks)
		if c.least == 0 || float64(c.largest) > max(1.1*float64(c.least), float64(c.least)+1) {
			t.Errorf("%s, %d fit: the limit goes from %d to %d while lines stay as they are", g.name, g.fit, c.least, c.largest)
		}
	}
}
