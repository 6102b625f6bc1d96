package vllm

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

const (
	bigCard    = 70 << 30 // bytes: from there on vLLM runs 1,024 sequences at once, but 256 on an A100, where larger steps make less (engine/arg_utils.py)
	smallModel = 4        // times its weights is the card's memory; a larger model keeps the card busy, and needs the memory itself
	tinyModel  = 30       // times its weights is the card's memory: cores of the processor are the limit, not the card; measured with 60
)

// With a model of 1B on an H200, EngineCore and the one process that speaks HTTP fill a core each, and half of the card's time
// is not used (docs/measurements/speed.md). Steps of twice the sequences and tokens, as --performance-mode throughput has
// them, leave EngineCore fewer steps.
var (
	ofSizes = slices.Concat(speculative, []string{"--max-num-seqs", "--max-num-batched-tokens", "--performance-mode",
		"--enable-chunked-prefill", "--no-enable-chunked-prefill", "--runner", "--task", "--convert", "--pooler-config"})
	ofAccessLogs = []string{"--disable-uvicorn-access-log", "--no-disable-uvicorn-access-log", "--disable-access-log-for-endpoints", "--uvicorn-log-level", "--log-config-file"}
)

// begin says whether any flag begins with one of these, or is short for it: argparse takes the beginning of a long flag, too.
func (f Flags) begin(beginnings []string) bool {
	return slices.ContainsFunc(f, func(word string) bool {
		word = spelt(word)
		short := word
		if end := strings.IndexAny(word, "=."); end >= 0 {
			short = word[:end]
		}
		return slices.ContainsFunc(beginnings, func(b string) bool {
			return strings.HasPrefix(word, b) || len(short) >= shortest && strings.HasPrefix(b, short)
		})
	})
}

// shortest is how long a word must be to be taken for the beginning of a flag.
const shortest = len("--api-")

// Tune lets the server have what vLLM does not take by itself, where its one GPU is such a card and fast for the model,
// as the files of its weights on this machine say, and the user's flags say nothing of it: larger CUDA graphs, and for a very
// small model larger steps. One of several on a card gets its part of that. It is called before Run, and asks for the card
// only where nothing else speaks against all of it.
func (s *Server) Tune(card func() Card) {
	each, err := s.Flags.GPUs()
	graphs, sizes := !s.Flags.begin(ofGraphs), !s.Flags.begin(ofSizes)
	if err != nil || each != 1 || !graphs && !sizes {
		return
	}
	bytes, known := s.weights()
	if !known {
		return
	}
	c := card()
	if c.Memory < bigCard {
		return
	}
	if graphs && c.Memory >= bytes*smallModel {
		s.extra = append(s.extra, "--compilation-config", graphSizes())
	}
	if sizes && c.Memory >= bytes*tinyModel && !c.A100 {
		beside := slices.Concat(ofShare(c), s.extra, steps(tunedSeqs/onOneCard))
		s.extra = append(s.extra, steps(tunedSeqs)...)
		if s.Mates != nil {
			s.extra, s.alone = beside, s.extra
		}
	}
}

// tunedSeqs is how many sequences run at once on a card with a very small model.
const tunedSeqs = 2048

func steps(seqs int) []string {
	return []string{"--max-num-seqs", strconv.Itoa(seqs), "--max-num-batched-tokens", "16384"}
}

// Sequences is how many the server runs at once, where its flags say so, the user's or ours; 0: they do not.
func (s *Server) Sequences() int64 { return s.flags().Sequences() }

// withoutAccessLog keeps vLLM from logging each request, which costs it time and hides what the log is for.
func (s *Server) withoutAccessLog() []string {
	if s.Flags.begin(ofAccessLogs) {
		return nil
	}
	return []string{"--disable-uvicorn-access-log"}
}

// flags are the user's and our own.
func (s *Server) flags() Flags {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Concat(s.Flags, s.extra)
}

// Shown are the flags of the server for other eyes: without keys.
func (s *Server) Shown() []string { return s.flags().Shown() }

// mayBeOurs are the reasons that our own flags may be behind when a server does not start.
var mayBeOurs = []string{"", "flag", "cache", "context", "memory", "core"}

// ofFlags says whether a server ended by itself for a reason that flags of ours may be behind. One that vLLM does not take is named.
func (e ending) ofFlags(ours Flags) bool {
	named := func(word string) bool { return strings.HasPrefix(word, "--") && strings.Contains(e.line, word) }
	return e.itself && slices.Contains(mayBeOurs, e.reason) && (e.reason != "flag" || slices.ContainsFunc(ours, named))
}

// otherwise takes other flags of ours where a server ended by itself and those that it has may be why, and says how the next start
// differs; empty: it does not.
func (s *Server) otherwise(e ending, came bool) string {
	switch {
	case s.back(e):
		return "with the part of its GPU that it had"
	case e.well == 0 && e.ofCard(s.extra) && s.settle(came):
		return "with the whole GPU, which it has alone"
	}
	if ours := s.plainer(e, came); ours != nil {
		return fmt.Sprintf("without what millrace asked for by itself (%s)", ours.brief())
	}
	return ""
}

// plainer gives up our own flags where the server ended by itself before it ever came up, and they may be why: it returns those
// that the next start goes without; nil: none. One of several on a card has a card to give up first.
func (s *Server) plainer(e ending, came bool) (ours Flags) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.alone != nil || e.well > 0 || came || !e.ofFlags(s.extra) {
		return nil
	}
	ours, s.extra = s.extra, nil
	return ours
}
