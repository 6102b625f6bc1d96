// Package load decides how many requests an engine has at once, from what the engine says of itself and of its load.
package load

// Engine is what is known of an engine.
type Engine struct {
	Kind    string // proto.KindVLLM, …
	Version string
	Run     int   // another one is another run of the engine, whose counters start anew
	Slots   int64 // most sequences that it runs at once; 0: not told
	MaxLen  int64 // longest context of any of its models, in tokens
	Graphs  int64 // tokens of its largest CUDA graph; 0: not told, below 0: it has none
	// Sequences is how many it runs at once, by its flags; 0: they do not say.
	Sequences int64
	Gauges    Gauges
}

// Gauges is what an engine counts itself, over all engines behind one server. Known is false where it has no metrics:
// then nothing is zero, all is unknown. Sequences are what it calls requests: a request with n = 4 is four of them.
type Gauges struct {
	Known       bool
	Engines     int     // data-parallel engines that it is the sum of
	KVTokens    int64   // capacity of the KV cache in tokens; 0: not told
	KVUsage     float64 // share of it in use, 0 to 1
	Running     int64   // sequences
	Waiting     int64
	Prompt      int64 // prompt tokens since the engine's start
	Generation  int64 // output tokens since the engine's start
	Held        int64 // tokens, prompts included, of sequences that have begun and not ended; 0: not told
	Holding     int64 // sequences that Held is of, those that clients gave up included where it has them; 0: not told
	Finished    int64 // sequences that ended since the engine's start, whoever asked; 0: not told
	Preemptions int64 // since the engine's start
	Asleep      bool
	SleepTold   bool // Asleep is known
}

// NoMaxTokens is how many output tokens are expected of a line that sets no limit.
const NoMaxTokens = 512

// Wish is what an engine has to do for a line.
type Wish struct {
	Most      int // output tokens, over all its sequences
	Sequences int // n for each prompt
}

// width is how many sequences a line has, one at least.
func (w Wish) width() float64 { return float64(max(w.Sequences, 1)) }
