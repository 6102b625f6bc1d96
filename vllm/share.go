package vllm

import (
	"slices"
	"strconv"
	"sync/atomic"
)

// With a model of 1B on an H200 one server uses half of the card's time, as EngineCore has no more than a core; two of them
// at the same time made 1.56 times as many tokens (docs/measurements/speed.md). Each holds the model, and has its part of
// the memory for the KV cache said in bytes: then vLLM does not measure what is free, which it must not do while another
// takes it (v1/worker/gpu_worker.py, determine_available_memory).
const (
	onOneCard     = 2
	coresForThem  = 6    // of the processor: two EngineCores and two processes that speak HTTP filled three
	linesForThem  = 2000 // for a card: with fewer there is no time to be won
	kvShare       = 0.35 // of the card's memory for each KV cache; the model, its graphs and its steps have the rest
	memoryForEach = 0.45 // of the card's memory must be free when one starts, though another has its part
)

// ofMemory are flags that say how a server uses a card, or whom else it is for: then it has the card alone.
var ofMemory = slices.Concat(ofSizes, []string{"--gpu-memory-utilization", "--kv-cache-memory-bytes", "--num-gpu-blocks-override", "--kv-transfer-config",
	"--kv-offloading", "--cpu-offload", "--data-parallel", "-dp", "--api-server-count", "-asc", "--enable-lora", "--enable-sleep-mode",
	"--enable-elastic-ep", "--enable-fault-tolerance", "--mm-", "--port", "--device"})

// PerCard is how many servers answer the most on the card of such a one: two of a very small model where the card is known to
// take several processes, so many cores of the processor are there for the card and so many lines to answer, 0: nobody knows how
// many, and where the user's flags do not say how its memory is used. It asks for the card only where nothing else speaks against it.
func (s *Server) PerCard(card func() Card, cores int, lines int64) int {
	each, err := s.Flags.GPUs()
	if err != nil || each != 1 || cores < coresForThem || lines > 0 && lines < linesForThem || s.Flags.begin(ofMemory) {
		return 1
	}
	bytes, known := s.weights()
	if !known || s.sees() { // images take memory that is not measured then
		return 1
	}
	if c := card(); c.Memory < bigCard || c.Memory < bytes*tinyModel || c.A100 || c.Alone {
		return 1
	}
	return onOneCard
}

// Mates are servers that have one card together. A nil one is a server that has it alone.
type Mates struct {
	n    int
	left atomic.Int32 // how many there are still
}

// NewMates is for n servers, nil for one.
func NewMates(n int) *Mates {
	if n < 2 {
		return nil
	}
	m := &Mates{n: n}
	m.left.Store(int32(n))
	return m
}

func (m *Mates) count() int {
	if m == nil {
		return 1
	}
	return m.n
}

// flags say what part of a card is for each.
func (m *Mates) flags(c Card) []string {
	return []string{"--gpu-memory-utilization", strconv.FormatFloat(memoryForEach, 'g', -1, 64),
		"--kv-cache-memory-bytes", strconv.FormatInt(int64(kvShare*float64(c.Memory)), 10)}
}

// leave leaves the card to the others, if there are any.
func (m *Mates) leave() bool {
	if m == nil {
		return false
	}
	for {
		n := m.left.Load()
		if n <= 1 {
			return false
		}
		if m.left.CompareAndSwap(n, n-1) {
			return true
		}
	}
}
