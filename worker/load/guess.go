package load

// guesses is what the guesses of the capacity of a KV cache rest on.
type guesses struct {
	lost  int64   // tokens that are counted as held and are not, seen while nothing ran
	gone  int64   // sequences that these are of
	usage float64 // largest share in use that a guess was made at
}

// blockWaste is how many tokens of its last block a sequence leaves empty, on average, where blocks have 16.
const blockWaste = 8

// guess finds the capacity of a KV cache from what it holds, where the engine tells only which share of it that is, as
// vLLM's Rust frontend does. Recorded from one (testdata/vllm): 4.07 million tokens, where the engine has 4.11.
//
// What sequences hold is counted from their first token on, and on for those that were pre-empted. So the guess errs on
// the side of few while prompts are computed, and is not made while pre-empted ones wait. Requests that a client gave up
// may be counted as held for ever: where more are than run, they are taken to hold as much each as those that run.
func (l *Limit) guess(g Gauges) {
	if l.told || !g.Known || g.Held <= 0 {
		return
	}
	if g.Running == 0 && g.Waiting == 0 {
		l.guesses.lost, l.guesses.gone = g.Held, g.Holding
		return
	}
	running := float64(g.Running)
	held := float64(g.Held - l.guesses.lost)
	if holding := float64(g.Holding - l.guesses.gone); holding > running {
		held *= running / holding
	}
	held += blockWaste * running
	waits := g.Waiting > 0 && len(l.looks) > 0 && g.Preemptions > l.looks[len(l.looks)-1].g.Preemptions
	if running < seenRunning || g.KVUsage < 0.9*l.guesses.usage || g.KVUsage <= 0 || held <= 0 || waits {
		return
	}
	l.guesses.usage = max(l.guesses.usage, g.KVUsage)
	switch kv := held / g.KVUsage; {
	case l.kv == 0:
		l.kv = kv
		l.forget() // to begin with what is known of the lines
	case kv > l.kv:
		l.kv = kv
	default:
		l.kv += (kv - l.kv) / 16
	}
}
