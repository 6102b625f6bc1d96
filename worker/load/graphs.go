package load

import (
	"fmt"
	"math"
	"time"

	"millrace/proto"
)

// graphs keeps an engine to as many sequences as its largest CUDA graph holds, where more are slower.
//
// vLLM replays a step that was recorded for as many sequences; it records none of more than 512 (min(2 × max_num_seqs, 512),
// vllm/config/vllm.py, 0.26.0 to 0.32.0; 1,024 on data-centre Blackwell). A larger step is started kernel by kernel, and the
// card waits meanwhile: a 4B model on an H200 made 8,600 output tokens a second with 824 in flight and 10,300 with 430
// (docs/measurements/speed.md). No metric tells, so it is measured, on engines whose KV cache holds more: after some
// generations of lines with size in flight, one with a few more. Where these make about as much there is no such edge,
// and the limit is free.
type graphs struct {
	size  float64 // sequences of the largest graph; 0: there is none that is known
	told  bool    // somebody has read it from the engine
	few   bool    // too few to keep the engine to
	stage stage
	seen  float64 // running or waiting sequences of other clients, at the last look
	rate  float64 // work a second with size in flight
	line  float64 // tokens of a line when it was decided

	ended float64 // sequences, ever
	skip  float64 // ended when the measurement may begin; 0: none is wanted
	from  tally   // when it began; zero: it has not
}

// tally is the work of an engine up to a time.
type tally struct {
	at    time.Time
	work  float64 // in prompt tokens, see workOfOutput
	ended float64
}

// stage is what graphs is about to do.
type stage int

const (
	graphsHold stage = iota // size at most, and measure what it makes
	graphsTry               // a few more, and measure what these make
	graphsKeep              // size at most: more made less
	graphsFree              // more
)

const (
	vllmGraphs  = 512  // sequences
	graphsLeast = 256  // that an engine is kept to; one that was told to have smaller graphs would do little else than measure
	graphsTime  = 6    // generations of lines that size is measured for, before more are tried
	graphsMore  = 1.25 // times size are tried
	graphsEdge  = 0.95 // times what size makes: more that make less than that are beyond an edge
	graphsClear = 0.8  // the same, of half a generation
	otherLines  = 1.5  // times the tokens, or the work, of a line: from there on what was found is found anew
	graphsShort = 0.9  // of the limit: fewer in flight show nothing of it
)

// meet begins anew with another kind or version of engine, which is so many copies of the model. told are the tokens of
// its largest graph, 0: nobody knows, below 0: it has none.
func (g *graphs) meet(kind string, same bool, told int64, copies float64) {
	size := 0.0
	switch {
	case told > 0:
		size = float64(told) * copies
	case told == 0 && kind == proto.KindVLLM:
		size = vllmGraphs * copies
	}
	if !same || size != g.size {
		*g = graphs{size: size}
	}
	g.told, g.few = told != 0, told > 0 && told < graphsLeast
	g.restart()
}

// restart forgets what was measured of the present stage.
func (g *graphs) restart() { g.skip, g.from = 0, tally{} }

// help says whether steps of n sequences may be faster for the graphs.
func (g *graphs) help(n float64) bool { return g.size > 0 && (!g.few || n <= g.size) }

// most returns how many sequences of ours the engine may have, of n that would fit.
func (g *graphs) most(n float64) float64 {
	most := g.size
	switch {
	case g.size == 0 || g.few || g.stage == graphsFree:
		return n
	case g.stage == graphsTry:
		most *= graphsMore
	}
	return min(n, max(most-g.seen, most/2))
}

// weigh takes in a look at an engine that has base sequences of ours, and room for so many. It moves on where a measurement
// is complete, and says whether the limit may have moved.
func (g *graphs) weigh(now look, base, room, line float64) bool {
	if g.size == 0 {
		return false
	}
	g.seen = max(0, float64(now.g.Running+now.g.Waiting)-now.inFlight)
	if g.stage == graphsKeep || g.stage == graphsFree {
		if apart(line, g.line, otherLines) {
			g.stage = graphsHold
		}
		return false
	}
	held := base >= graphsShort*g.most(math.Inf(1))
	if !held && g.stage == graphsTry { // the KV cache holds no more
		g.stage, g.line = graphsKeep, line
		g.restart()
		return true
	}
	if !held || now.inFlight < graphsShort*base || g.stage == graphsHold && room < graphsMore*base {
		g.restart()
		return false
	}
	t := tally{at: now.at, work: float64(now.g.Prompt) + workOfOutput*float64(now.g.Generation), ended: g.ended}
	switch {
	case g.skip == 0:
		g.skip = g.ended + base/4
		return false
	case g.ended < g.skip:
		return false
	case g.from == tally{}:
		g.from = t
		return false
	}
	return g.judge(t, base, line)
}

// judge moves on where the work up to t shows enough.
func (g *graphs) judge(t tally, base, line float64) bool {
	generations := (t.ended - g.from.ended) / base
	rate := (t.work - g.from.work) / max(t.at.Sub(g.from.at).Seconds(), 1e-3)
	switch {
	case g.stage == graphsHold && generations >= graphsTime:
		g.stage, g.rate = graphsTry, rate
	case g.stage == graphsTry && (generations >= 1 && rate < graphsEdge*g.rate || generations >= 0.5 && rate < graphsClear*g.rate):
		g.stage, g.line = graphsKeep, line
	case g.stage == graphsTry && generations >= 1:
		g.stage, g.line = graphsFree, line
	default:
		return false
	}
	g.restart()
	return true
}

// why says what the limit rests on.
func (g *graphs) why() string {
	switch g.stage {
	case graphsTry:
		return fmt.Sprintf("trying a few more than the %.0f sequences of the engine's CUDA graphs", g.size)
	case graphsKeep:
		return fmt.Sprintf("more than the %.0f sequences of the engine's CUDA graphs made less", g.size)
	}
	if g.seen > 0 {
		return fmt.Sprintf("engine's CUDA graphs hold %.0f sequences, %.0f of them are of others", g.size, g.seen)
	}
	return fmt.Sprintf("engine's CUDA graphs hold %.0f sequences; more are tried when many lines have run", g.size)
}
