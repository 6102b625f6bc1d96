package sim

import (
	"encoding/binary"
	"hash/maphash"
)

// The reasons for which a sequence ends, in the order of vLLM's metric.
const (
	finishStop = iota
	finishLength
	finishAbort
	finishError
	finishRepetition
)

func finishNames() []string { return []string{"stop", "length", "abort", "error", "repetition"} }

// call is one HTTP request inside the engine: a sequence per prompt and choice.
// The handler fills it and waits on done; in between the loop owns it.
type call struct {
	seqs      []*sequence
	choices   int           // n, sequences per prompt
	maxTokens int           // most output tokens of a sequence
	left      int           // sequences that are not finished
	gone      bool          // the client has left
	died      bool          // the engine died first; read after done
	arrived   int64         // ns since the start of the engine
	done      chan struct{} // closed by the loop when left is 0 or the engine died
}

// sequence is one prompt with one output, vLLM's "request". Times are ns since
// the start of the engine.
type sequence struct {
	call   *call
	choice int // index among the answers of its call
	prompt int // tokens
	want   int // output tokens it is going to make; 0 for embeddings
	reason int // why it ends then
	poison bool
	slow   int // makes progress in every slow-th step only; 0 and 1 are normal
	// hashes of the full blocks of the prompt, each over all that lies before
	// it; nil without prefix caching. tail stands for everything after them.
	hashes []uint64
	tail   uint64

	made      int // output tokens so far
	computed  int // tokens in the KV cache
	step      int // tokens scheduled in this step
	cached    int // prompt tokens found in the prefix cache at first scheduling, -1 before
	preempted int // times
	emitted   bool
	published int // leading blocks that were offered to the prefix cache
	blocks    []int32

	scheduledAt, firstAt, lastAt int64
}

// tokens is how many tokens the sequence has by now.
func (s *sequence) tokens() int { return s.prompt + s.made }

// hashAt is the hash of full block i. Blocks with output are a function of
// prompt and choice, because the output is.
func (s *sequence) hashAt(i int) uint64 {
	if i < len(s.hashes) {
		return s.hashes[i]
	}
	return mix(s.tail + uint64(i))
}

// hashBlocks returns the chained hashes of the full blocks of a prompt and the
// key of its output blocks for choice 0.
func hashBlocks(seed maphash.Seed, text string, bytesPerBlock int) (hashes []uint64, tail uint64) {
	hashes = make([]uint64, 0, len(text)/bytesPerBlock)
	var link [8]byte
	var h maphash.Hash
	h.SetSeed(seed)
	sum := func(part string) uint64 {
		h.Reset()
		h.Write(link[:])
		h.WriteString(part)
		v := h.Sum64() | 1 // 0 means "no hash"
		binary.LittleEndian.PutUint64(link[:], v)
		return v
	}
	for ; len(text) >= bytesPerBlock; text = text[bytesPerBlock:] {
		hashes = append(hashes, sum(text[:bytesPerBlock]))
	}
	return hashes, sum(text)
}

// mix is the finisher of splitmix64: every bit of the result depends on every bit of x.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
