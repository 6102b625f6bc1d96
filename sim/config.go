package sim

import (
	"errors"
	"fmt"
	"time"
)

// blockSize is the number of tokens in one KV block.
const blockSize = 16

// Shutdown says what becomes of the requests in flight when the context of
// Serve ends. Real vLLM without --shutdown-timeout does one of the first three,
// by chance.
type Shutdown string

const (
	// ShutdownError answers them with HTTP 500 "EngineCore encountered an issue".
	ShutdownError Shutdown = "error"
	// ShutdownAbort answers them with HTTP 200, finish_reason "abort" and the
	// text so far.
	ShutdownAbort Shutdown = "abort"
	// ShutdownHang answers nothing: the port is closed, and Serve returns when
	// the last client has given up.
	ShutdownHang Shutdown = "hang"
	// ShutdownDrain finishes them, for at most Config.DrainTimeout. Meanwhile
	// /health says 200, and new requests get HTTP 500 "cannot schedule new
	// futures after shutdown".
	ShutdownDrain Shutdown = "drain"
)

// Range is a range of whole numbers, both ends included.
type Range struct{ Min, Max int }

// Config describes an engine. Only Models must be set; the zero value of every
// other field means the default given there, negative values are refused. With StepTime, DecodeTime and
// PrefillTime all zero the engine is as fast as the processor allows.
type Config struct {
	// Models are the served names. Any of them is accepted in a request, and the
	// first one is the name in answers and metrics.
	Models []string
	// MaxModelLen is the context: prompt and output together, in tokens. Default 4096.
	MaxModelLen int
	// KVTokens is the capacity of the KV cache in tokens, rounded down to blocks
	// of 16. At least MaxModelLen. Default 131072 or MaxModelLen, the larger one.
	KVTokens int
	// SlidingWindow is how many tokens a layer with a sliding window keeps, and SlidingLayers how many such layers
	// there are for each one that keeps all: 1024 and 5 for Gemma 3. Default 0: every layer keeps all.
	SlidingWindow, SlidingLayers int
	// MaxNumSeqs is the most sequences that run at once. Default 256.
	MaxNumSeqs int
	// MaxBatchedTokens is the most tokens of one step, the chunk of the chunked
	// prefill. Default 2048.
	MaxBatchedTokens int

	// One step takes StepTime + DecodeTime × sequences that decode
	// + PrefillTime × prompt tokens that are computed, in real time.
	StepTime, DecodeTime, PrefillTime time.Duration
	// GraphTokens is how many tokens the largest CUDA graph of the engine holds: 512 for vLLM on most cards. A step of more,
	// decoding sequences counted with one each, is started kernel by kernel, and takes EagerTime longer. Default 0: no such
	// thing.
	GraphTokens int
	EagerTime   time.Duration
	// LoadTime is how long ListenAndServe refuses connections before it is ready.
	LoadTime time.Duration

	// APIKey, when set, is asked for under /v1 and /sim.
	APIKey string
	// MaxQueued is --max-num-queued-reqs: the most sequences that run and wait
	// together; one more gets HTTP 503. Zero means no limit.
	MaxQueued int
	// NoPrefixCaching switches the prefix cache off, and cached_tokens with it.
	NoPrefixCaching bool
	// BytesPerToken is how much text one token stands for. Default 4.
	BytesPerToken int
	// OutputTokens is how long an answer is when the body lets it end by itself:
	// uniform over the range, a function of Seed, prompt and choice. Bodies with
	// ignore_eos run to max_tokens; min_tokens and max_tokens cut the range.
	// Default 32 to 256.
	OutputTokens Range
	// EmbeddingDim above zero makes a pooling server: /v1/embeddings answers
	// vectors of so many numbers and the routes that generate are 404.
	EmbeddingDim int
	// Null makes a server for benchmarks of what lies around it: every request
	// gets the same short answer at once, unread, without a scheduler, limits or
	// faults. Its text carries the hash of "", not of the prompt.
	Null bool

	// Seed makes fault decisions and output lengths repeat.
	Seed uint64
	// Frontend is which HTTP server is simulated. Default FrontendPython.
	Frontend Frontend
	// AnyModel answers whatever model a request names, as llama.cpp does.
	AnyModel bool
	// DevMode serves /is_sleeping, as VLLM_SERVER_DEV_MODE=1 does.
	DevMode bool
	// Version is what /version reports. Default "0.32.0-sim".
	Version string
	// Shutdown is what happens to requests in flight when Serve is told to end.
	// Default ShutdownError.
	Shutdown Shutdown
	// DrainTimeout limits ShutdownDrain. What is unfinished then is never
	// answered, as under ShutdownHang. Zero means no limit.
	DrainTimeout time.Duration
	// KeepAlive is when an idle connection is closed. Default 5 s, uvicorn's.
	KeepAlive time.Duration
	// DeathTime is how long a dead engine says 503 before its port closes.
	// Default 200 ms.
	DeathTime time.Duration
	// Faults are the faults at the start; see Engine.SetFaults.
	Faults Faults
}

// withDefaults returns c with every unset field filled, or says what is wrong.
func (c Config) withDefaults() (Config, error) {
	def(&c.MaxModelLen, 4096)
	def(&c.KVTokens, max(131072, c.MaxModelLen+blockSize-1))
	def(&c.MaxNumSeqs, 256)
	def(&c.MaxBatchedTokens, 2048)
	def(&c.BytesPerToken, 4)
	def(&c.OutputTokens, Range{32, 256})
	def(&c.Frontend, FrontendPython)
	def(&c.Version, "0.32.0-sim")
	def(&c.Shutdown, ShutdownError)
	def(&c.KeepAlive, 5*time.Second)
	def(&c.DeathTime, 200*time.Millisecond)
	return c, c.check()
}

func def[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// check names fields as the flags of `millrace sim` are, where there is one.
func (c Config) check() error {
	if len(c.Models) == 0 || c.Models[0] == "" {
		return errors.New("--model is empty, must be a name")
	}
	for name, v := range map[string]int{
		"--max-model-len": c.MaxModelLen, "--max-num-seqs": c.MaxNumSeqs, "--max-num-batched-tokens": c.MaxBatchedTokens,
		"BytesPerToken": c.BytesPerToken, "--output-min": c.OutputTokens.Min,
	} {
		if v < 1 {
			return fmt.Errorf("%s is %d, must be at least 1", name, v)
		}
	}
	for name, v := range map[string]int64{
		"--step-time": int64(c.StepTime), "--decode-time": int64(c.DecodeTime), "--prefill-time": int64(c.PrefillTime),
		"--load-time": int64(c.LoadTime), "--max-num-queued-reqs": int64(c.MaxQueued), "--embedding-dim": int64(c.EmbeddingDim),
		"--graph-tokens": int64(c.GraphTokens), "--eager-time": int64(c.EagerTime), "--sliding-window": int64(c.SlidingWindow), "--sliding-layers": int64(c.SlidingLayers),
		"DrainTimeout": int64(c.DrainTimeout), "KeepAlive": int64(c.KeepAlive), "DeathTime": int64(c.DeathTime),
	} {
		if v < 0 {
			return fmt.Errorf("%s must not be negative", name)
		}
	}
	switch {
	case c.OutputTokens.Max < c.OutputTokens.Min:
		return fmt.Errorf("--output-max is %d, must be at least --output-min, which is %d", c.OutputTokens.Max, c.OutputTokens.Min)
	case c.KVTokens/blockSize*blockSize < c.MaxModelLen:
		return fmt.Errorf("--kv-tokens is %d, must hold one request of --max-model-len, which is %d, in blocks of %d", c.KVTokens, c.MaxModelLen, blockSize)
	}
	switch c.Shutdown {
	case ShutdownError, ShutdownAbort, ShutdownHang, ShutdownDrain:
	default:
		return fmt.Errorf("--shutdown is %q, must be error, abort, hang or drain", c.Shutdown)
	}
	if err := c.Frontend.check(); err != nil {
		return err
	}
	if err := c.Faults.check(); err != nil {
		return fmt.Errorf("--faults: %w", err)
	}
	return nil
}
