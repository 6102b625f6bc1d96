package load

import "math"

// What a step of an engine costs, in units of one prompt token computed. Weights are read once a step; a sequence that
// decodes reads its KV cache. Fitted to vLLM 0.26.0 (docs/measurements): a step is 110 to 150 where a 4B model runs,
// 750 where the processor and not the card is the limit; a sequence is 3 to 15. The result depends on them weakly.
const (
	stepCost = 150
	seqCost  = 3
)

// shape is what lines are like, on average: tokens of the prompt that no other line shares, and tokens of the output.
type shape struct{ prompt, output float64 }

func (l shape) tokens() float64 { return l.prompt + l.output }

// apart says whether one of two figures is more than so many times the other.
func apart(a, b, times float64) bool { return a > times*b || b > times*a }

// spare is the share of an engine's time that n lines at once spend on what a larger n would not make more: what one
// per cent more of them is worth, in per cent.
func (l shape) spare(n float64) float64 {
	return stepCost / (stepCost + (seqCost+l.prompt/max(l.output, 1))*n)
}

// again is what a pre-emption costs, in units of what a line costs: half its output and the whole of its prompt are
// computed again.
func (l shape) again(n float64) float64 {
	return (l.prompt + l.output/2 + 1) / (l.output*(stepCost+seqCost*n)/n + l.prompt + 1)
}

// fits is how many lines to have at once in a KV cache before any pre-emption was seen: as many as it holds to their
// ends, or, where pre-emptions cost less than they bring, as many as it holds halfway.
func (l shape) fits(kv float64) float64 {
	ends := kv / max(l.prompt+l.output, 1)
	return ends + (kv/max(l.prompt+l.output/2, 1)-ends)*l.eager(ends)
}

// eager is 0 where pre-emptions are dear and 1 where they are cheap.
func (l shape) eager(n float64) float64 {
	return min(1, max(0, (l.spare(n)/l.again(n)-0.5)/2))
}

// beginning is what is known before many lines were answered.
type beginning struct {
	kv      float64 // tokens to plan with
	prompt  float64 // tokens of a line of its own
	most    float64 // output tokens that a line may have
	made    float64 // output tokens so far, over all lines
	answers float64 // lines that were answered
}

const (
	usualOutput = 256 // tokens; a limit above it is rarely reached
	guessWeight = 4   // a guess counts as much as so many answers
)

// fits is how many lines to have at once. Where pre-emptions are cheap, outputs are taken to be shorter than they may
// be, until the lines show that they are not.
func (b beginning) fits() float64 {
	longest := shape{b.prompt, b.output(b.most)}
	usual := min(b.most, math.Sqrt(b.most*usualOutput))
	guess := shape{b.prompt, b.output(b.most + (usual-b.most)*longest.eager(b.kv/(b.prompt+longest.output)))}
	n := max(longest.fits(b.kv), b.kv/(guess.prompt+guess.output))
	return max(n, guess.fits(b.kv)*b.answers/(b.answers+guessWeight))
}

// output is the length of outputs where it is guessed to be c and lines have shown some of it. All tokens made over
// the answers that they gave: right for lines that end at any token with the same chance, too long for others, as is
// safe.
func (b beginning) output(c float64) float64 {
	return max(1, min(b.most, (b.made+guessWeight*c)/(b.answers+guessWeight)))
}

// mean is a running mean over the last lines. All of it is per line.
type mean struct {
	n      int
	bytes  float64 // of the body
	prompt float64 // tokens, less those from the prefix cache
	output float64 // tokens
	took   float64 // seconds
	most   float64 // output tokens that it may have; 0: unknown
}

// usual is a figure of one line, cut to three times its mean: one line that is far larger than the others says nothing of
// those that follow it.
func (m *mean) usual(v, mean float64) float64 {
	if m.n < 8 || mean == 0 {
		return v
	}
	return min(v, 3*mean)
}

// add takes in one line; the mean remembers as many as keep.
func (m *mean) add(keep int, bytes, prompt, output, took, most float64) {
	m.n = min(m.n+1, keep)
	w := 1 / float64(m.n)
	m.bytes += (bytes - m.bytes) * w
	m.prompt += (prompt - m.prompt) * w
	m.output += (output - m.output) * w
	m.took += (took - m.took) * w
	switch {
	case most == 0:
	case m.most == 0:
		m.most = most
	default:
		m.most += (most - m.most) * w
	}
}
