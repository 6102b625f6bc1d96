package vllm

import (
	"fmt"
	"os"
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
	kvShare       = 0.3  // of the card's memory for each KV cache; the model, its graphs and its steps have the rest, which nobody measures
	memoryForEach = 0.45 // of the card's memory must be free when one starts, though another has its part
)

// ofMemory are beginnings of flags that say how a server uses a card, that it needs it alone, or whom else it speaks to.
var ofMemory = slices.Concat(ofSizes, []string{"--gpu-memory-utilization", "--kv-cache-memory-bytes", "--num-gpu-blocks-override",
	"--kv-transfer-config", "--kv-events-config", "--kv-offloading", "--ec-transfer-config", "--weight-transfer-config", "--cpu-offload", "--offload-",
	"--data-parallel", "-dp", "--api-server-count", "-asc", "--enable-lora", "--enable-sleep-mode", "--enable-elastic-ep", "--enable-fault-tolerance",
	"--mm-", "--port", "--device", "--quantization", "-q"})

// PerCard is how many servers to start on each of so many cards for the most lines a second: two of a very small model, where
// several processes may use a card, so many cores of the processor are there for all and so many lines to answer, 0: nobody knows
// how many, and where the user's flags do not say how its memory is used. A model that takes images or sound needs memory that
// nobody measures, and the files of a quantized one do not say how much there is to compute. It asks for the card only where
// nothing else speaks against it.
func (s *Server) PerCard(card func() Card, cards, cores int, lines int64) int {
	each, err := s.Flags.GPUs()
	if err != nil || each != 1 || cores < cards*coresForThem || lines > 0 && lines < int64(cards*linesForThem) || s.Flags.begin(ofMemory) {
		return 1
	}
	bytes, _ := s.weights()
	if info, err := os.Stat(s.Model); bytes == 0 || err == nil && !info.IsDir() || s.configured(`"vision_config"`, `"audio_config"`, `"quantization_config"`) {
		return 1
	}
	c := card()
	if s.GPUs == nil { // other cards of the machine have servers of their own
		cards = c.Count
	}
	if cores < cards*coresForThem || c.Memory < bigCard || c.Memory < bytes*tinyModel || c.A100 || c.Alone {
		return 1
	}
	return onOneCard
}

// Mates are servers that have one card together.
type Mates struct{ left atomic.Int32 } // how many there are still

// NewMates is for n servers, nil for one.
func NewMates(n int) *Mates {
	if n < 2 {
		return nil
	}
	m := &Mates{}
	m.left.Store(int32(n))
	return m
}

// ofShare are flags that say what part of a card is for each.
func ofShare(c Card) []string {
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

// settle takes the flags of a server that has its card alone where the others have left it, and says whether it did. One that
// came up beside another keeps those of then, for back.
func (s *Server) settle(came bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.alone == nil || s.Mates.left.Load() > 1 {
		return false
	}
	if came {
		s.part = s.extra
	}
	s.extra, s.alone = s.alone, nil
	return true
}

// back takes the flags again with which a server came up beside another, where it does not come up with those of one that has
// its card alone, and says whether it did.
func (s *Server) back(e ending) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.well > 0 {
		s.part = nil
	}
	killed := !e.itself && !e.final && !e.passes
	if s.part == nil || !killed && !e.ofCard(s.extra) {
		return false
	}
	s.extra, s.part = s.part, nil
	return true
}

// ofCard says whether a server ended by itself for a reason that its part of a card, or other flags of ours, may be behind.
func (e ending) ofCard(ours Flags) bool {
	return e.ofFlags(ours) || e.itself && e.reason == "memory in use"
}

// aside leaves the card to the others where the server ended by itself and there being others may be why: it did not come up
// with its part of the card, for a reason that will be there at the next start or for the second time, or ran out of memory for
// the second time since it was well for long. It returns nil where it is started again.
func (s *Server) aside(e ending, t *tally) *Failed {
	s.mu.Lock()
	defer s.mu.Unlock()
	came := e.well > 0 || t.came
	if s.alone == nil || !e.ofCard(s.extra) || came && e.reason != "memory" {
		return nil
	}
	if e.well >= wellFor || came && !t.came {
		t.crowded = 0
	}
	t.crowded++
	if t.crowded < 2 && (came || !e.final) || !s.Mates.leave() {
		return nil
	}
	what, so := "does not start", "and nothing has to be done"
	if came {
		what, so = "runs out of memory", "until millrace is started again"
	}
	return &Failed{Why: fmt.Sprintf("engine %s beside the other one on its GPU, with %s: %s; it leaves the GPU to that one, %s", what, s.extra[:len(ofShare(Card{}))].brief(), e.said, so)}
}
