package load

import (
	"testing"
	"time"

	"millrace/proto"
)

// full is a limit that has settled on an engine whose KV cache is full. Lines are 788 + 308 tokens.
type full struct {
	*Limit
	now  time.Time
	made int64
}

func newFull(t *testing.T) *full {
	t.Helper()
	f := &full{Limit: New(0), now: time.Now()}
	f.Expects(3152, Wish{308, 1})
	for range 40 {
		f.second(3152, 1, Gauges{Running: int64(f.Get()), KVUsage: 0.96})
	}
	if n := f.Get(); !f.steers || n < 300 || n > 600 {
		t.Fatalf("limit %d, steers %v: %s", n, f.steers, f.Reason())
	}
	return f
}

// second lets 40 lines end, as many come that have so many bytes, and shows the load with a share of the limit in flight.
func (f *full) second(bytes int, part float64, g Gauges) {
	f.now = f.now.Add(time.Second)
	for range 40 {
		f.Expects(bytes, Wish{308, 1})
		f.Finished(proto.Usage{Counted: true, Prompt: 788, Completion: 308}, 3152, Wish{308, 1}, 10*time.Second, f.now)
		f.made += 308
	}
	g.Generation = f.made
	f.Observe(seen(473807, g), int(part*float64(f.Get())), f.now)
}

// TestLimitGrows: into room in the KV cache, and not where lines wait in the engine or few are there.
func TestLimitGrows(t *testing.T) {
	for _, c := range []struct {
		name    string
		part    float64 // of the limit in flight
		waiting float64 // of those that run
		grows   bool
	}{
		{"room", 1, 0, true},
		{"some wait", 1, 0.1, true},
		{"many wait", 1, 0.5, false},
		{"few in flight", 0.8, 0, false},
	} {
		f := newFull(t)
		was := f.Get()
		for range 20 {
			running := 0.9 * float64(f.Get())
			f.second(3152, c.part, Gauges{Running: int64(running), Waiting: int64(c.waiting * running), KVUsage: 0.92})
		}
		if got := f.Get(); (got > was*102/100) != c.grows || got < was*98/100 {
			t.Errorf("%s: limit %d, %d before; %s", c.name, got, was, f.Reason())
		}
	}
}

// TestLimitLonger: lines twice as long are met before they run, a tenth more is nothing.
func TestLimitLonger(t *testing.T) {
	for bytes, lower := range map[int]bool{3500: false, 2 * 3152: true} {
		f := newFull(t)
		was := f.Get()
		for range 4 {
			f.second(bytes, 1, Gauges{Running: int64(f.Get()), KVUsage: 0.96})
		}
		if got := f.Get(); (got < was*9/10) != lower {
			t.Errorf("%d bytes: limit %d, %d before; %s", bytes, got, was, f.Reason())
		}
	}
}

// TestLimitOfOthersLines: pre-emptions are held against all that the engine finishes, whoever asked.
func TestLimitOfOthersLines(t *testing.T) {
	for finished, lower := range map[int64]bool{0: true, 400: false} {
		f := newFull(t)
		was := f.Get()
		for i := range int64(40) {
			f.second(3152, 1, Gauges{Running: int64(f.Get()), KVUsage: 0.96, Preemptions: i, Finished: finished * i})
		}
		if got := f.Get(); (got < was*98/100) != lower {
			t.Errorf("%d finished a second: limit %d, %d before; %s", finished, got, was, f.Reason())
		}
	}
}

// TestPromptLeast: what the KV cache shows of a prompt is not believed to be next to nothing, as while it has just been filled.
func TestPromptLeast(t *testing.T) {
	l := New(0)
	l.Observe(seen(473807, Gauges{}), 0, time.Now())
	l.Expects(3200, Wish{308, 1})
	if got := l.prompt(look{inFlight: 100, g: Gauges{Known: true, Running: 100, KVUsage: 1e-6}}); got != 200 {
		t.Errorf("prompt of %.0f tokens, 3,200 bytes", got)
	}
}

// TestCrowded: an engine whose KV cache is more than half full may let lines wait for that.
func TestCrowded(t *testing.T) {
	for use, want := range map[float64]float64{0.4: 64, 0.6: 0} {
		l := &Limit{}
		for i := range 4 {
			l.looks = append(l.looks, look{answers: 40 * i, g: Gauges{Running: 64, Waiting: 64, KVUsage: use}})
		}
		if got := l.crowded(); got != want {
			t.Errorf("KV cache %.1f full: runs %.0f at once, want %.0f", use, got, want)
		}
	}
}

// TestGainMeets: steps are large again when lines are a quarter larger.
func TestGainMeets(t *testing.T) {
	for tokens, want := range map[float64]float64{1200: leastGain, 1300: 1, 750: 1} {
		g := gain{size: leastGain, line: 1000}
		if g.meet(shape{tokens, 0}); g.size != want {
			t.Errorf("lines of %.0f tokens after 1,000: %v, want %v", tokens, g.size, want)
		}
	}
}

// edge is a vLLM that makes a share of the usual with more than 512 sequences.
type edge struct {
	graphs
	beyond float64
	now    time.Time
	work   float64
}

func newEdge(beyond float64) *edge {
	e := &edge{beyond: beyond, now: time.Unix(0, 0)}
	e.meet(proto.KindVLLM, false, 0, 1)
	return e
}

// quarter lets a quarter of those in flight end.
func (e *edge) quarter(room, line float64) {
	n := e.most(room)
	rate := 1000.
	if n > vllmGraphs {
		rate *= e.beyond
	}
	e.ended += n / 4
	e.now = e.now.Add(time.Duration(n / 4 / rate * 1e9))
	e.work += n / 4 * line
	e.weigh(look{at: e.now, inFlight: n, g: Gauges{Prompt: int64(e.work)}}, n, room, line)
}

// until lets lines end until the stage is over, and returns how many generations that took.
func (e *edge) until(t *testing.T, over stage) (generations float64) {
	t.Helper()
	for range 100 {
		if e.stage != over {
			return generations
		}
		e.quarter(2000, 1000)
		generations += 0.25
	}
	t.Fatalf("stage %d does not end", over)
	return 0
}

// TestGraphsEdge: more sequences than the graphs hold are given up after half a generation where they make much less, and
// after one where they make less; what was found is found anew when lines are others.
func TestGraphsEdge(t *testing.T) {
	for _, c := range []struct {
		beyond      float64
		found       stage
		generations float64
	}{{0.7, graphsKeep, 1}, {0.9, graphsKeep, 1.5}, {0.98, graphsFree, 1.5}} {
		e := newEdge(c.beyond)
		e.until(t, graphsHold)
		if n := e.until(t, graphsTry); e.stage != c.found || n != c.generations {
			t.Errorf("%.2f beyond: stage %d after %.2f generations", c.beyond, e.stage, n)
		}
		if e.quarter(2000, 1400); e.stage != c.found {
			t.Errorf("%.2f beyond: stage %d when lines are a little longer", c.beyond, e.stage)
		}
		if e.quarter(2000, 1600); e.stage != graphsHold {
			t.Errorf("%.2f beyond: stage %d when lines are others", c.beyond, e.stage)
		}
	}
}

// TestGraphsFull: where the KV cache turns out to hold no more than the graphs, more are not tried for ever.
func TestGraphsFull(t *testing.T) {
	e := newEdge(1)
	e.until(t, graphsHold)
	if e.quarter(520, 1000); e.stage != graphsKeep {
		t.Errorf("stage %d", e.stage)
	}
}

// TestGraphsOfOthers: what others have there takes its place in the graphs, up to half of them.
func TestGraphsOfOthers(t *testing.T) {
	for seen, want := range map[float64]float64{0: 512, 100: 412, 400: 256} {
		e := newEdge(1)
		if e.seen = seen; e.most(2000) != want {
			t.Errorf("%.0f beside %.0f of others", e.most(2000), seen)
		}
	}
}

// TestBurstGraphs: a small engine has small graphs, twice its sequences, unless it is told how large they are.
func TestBurstGraphs(t *testing.T) {
	for _, c := range []struct {
		sequences int64
		told      bool
		want      int
	}{{64, false, 2}, {0, false, 1}, {64, true, 1}} {
		l := New(0)
		l.flagged, l.way, l.base = float64(c.sequences), bySteering, 64
		l.graphs.size, l.graphs.told, l.ended = 512, c.told, mean{n: fewLines, prompt: 100, output: 300}
		l.gather(64)
		if got := l.Burst(); got != c.want {
			t.Errorf("%+v: bursts of %d", c, got)
		}
	}
}

// TestGraphsFew: an engine that says that its graphs are small is not kept to them; it gets lines in bursts where they hold it.
func TestGraphsFew(t *testing.T) {
	for _, c := range []struct {
		told, copies int64
		most         float64 // of 900 that would fit
		burst        int     // of 64
	}{{0, 1, 512, 3}, {512, 1, 512, 1}, {256, 1, 256, 1}, {255, 1, 900, 1}, {128, 1, 900, 3}, {16, 1, 900, 1}, {255, 2, 900, 1}, {256, 2, 512, 1}, {-1, 1, 900, 1}} {
		l := New(0)
		l.graphs.meet(proto.KindVLLM, false, c.told, float64(c.copies))
		l.flagged, l.way, l.base, l.ended = 64, bySteering, 64, mean{n: fewLines, prompt: 100, output: 64}
		l.gather(64)
		if most, burst := l.graphs.most(900), l.Burst(); most != c.most || burst != c.burst {
			t.Errorf("%+v: %.0f sequences, bursts of %d", c, most, burst)
		}
	}
}

// TestGathers: where a prompt just fits into the graphs beside those that run, lines begin together or one by one, and do not change
// between the two at each look; short outputs never begin together, since more of them than would begin together end in a step.
func TestGathers(t *testing.T) {
	l := New(0)
	l.graphs.meet(proto.KindVLLM, false, 256, 1)
	for i, c := range []struct {
		prompt, output float64
		want           bool
	}{{140, 300, true}, {120, 300, true}, {70, 300, false}, {120, 300, false}, {140, 300, true}, {300, 19, false}, {300, 21, true}} {
		l.ended = mean{n: fewLines, prompt: c.prompt, output: c.output}
		if l.gather(128); l.gathers != c.want {
			t.Errorf("%d: %.0f + %.0f: %v", i, c.prompt, c.output, l.gathers)
		}
	}
}

// TestSeveralStarts: an engine that is started anew again and again is one.
func TestSeveralStarts(t *testing.T) {
	var s several
	now := time.Unix(0, 0)
	for range 5 {
		for made := int64(0); made <= 2000; made += 500 {
			now = now.Add(turnTime / 2)
			if s.see(Gauges{Known: true, Generation: made + now.Unix()/100}, now) {
				t.Fatal("it is taken for several")
			}
		}
	}
}

// TestBeginningLearns: where max_tokens says far more than lines make, what they make counts the more the more have ended.
func TestBeginningLearns(t *testing.T) {
	for answers, want := range map[float64][2]float64{0: {7, 9}, 20: {16, 18}} {
		b := beginning{kv: 9500, prompt: 300, most: 3000, made: 240 * answers, answers: answers}
		if got := b.fits(); got < want[0] || got > want[1] {
			t.Errorf("%.1f lines after %.0f answers, want %v", got, answers, want)
		}
	}
}
