package vllm

import (
	"os"
	"slices"
	"strconv"
	"strings"
)

const (
	bigCard    = 70 << 30 // bytes: from there on vLLM runs 1,024 sequences at once, but 256 on an A100, where larger steps make less (engine/arg_utils.py)
	smallModel = 4        // times its weights is the card's memory; a larger model keeps the card busy, and needs the memory itself
	tinyModel  = 30       // times its weights is the card's memory: cores of the processor are the limit, not the card; measured with 60

	mostFrontends = 4
	coresForTwo   = 6     // of the processor: EngineCore fills one, two frontends one together, and the rest is for what else is there
	longJob       = 50000 // lines: with fewer the longer start of several frontends may take more than they give
)

// With a model of 1B on an H200, EngineCore and the one process that speaks HTTP, the frontend, fill a core each
// (docs/measurements/speed.md). Steps of twice the sequences and tokens, as --performance-mode throughput has them, leave
// EngineCore fewer steps. With --api-server-count several frontends share the port; any of them tells the metrics of all.
// EngineCore starts only when each of them has loaded vLLM once more: 8 to 23 s on that machine. What they give there is
// not measured by itself; taken for a tenth of the time of the lines, it makes up for the start from longJob on. Some of
// what vLLM can do asks for one frontend, and with more it does without its cache of images and sound.
var (
	ofSizes = slices.Concat(speculative, []string{"--max-num-seqs", "--max-num-batched-tokens", "--performance-mode",
		"--enable-chunked-prefill", "--no-enable-chunked-prefill", "--runner", "--task", "--convert", "--pooler-config"})
	throughput   = []string{"--max-num-seqs", "2048", "--max-num-batched-tokens", "16384"}
	ofFrontends  = []string{"--api-server-count", "-asc", "--data-parallel", "-dp", "--enable-lora", "--enable-fault-tolerance", "--enable-elastic-ep", "--mm-"}
	oneFrontend  = []string{"VLLM_USE_RUST_FRONTEND", "VLLM_RUST_FRONTEND_PATH", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"}
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

// isSet says whether a variable of the environment is set, to something other than the number 0.
func isSet(variable string) bool {
	v := strings.TrimSpace(os.Getenv(variable))
	n, err := strconv.Atoi(v)
	return v != "" && (err != nil || n != 0)
}

// Tune lets the server have what vLLM does not take by itself, where its one GPU is such a card and fast for the model,
// as the files of its weights on this machine say, and the user's flags say nothing of it: larger CUDA graphs, and for a very
// small model larger steps and several processes that speak HTTP, where so many cores are there for this server and so many
// lines for it to answer, 0: nobody knows how many. It is called before Run, and asks for the card only where nothing else
// speaks against all of it.
func (s *Server) Tune(card func() Card, cores int, lines int64) {
	each, err := s.Flags.GPUs()
	graphs, sizes := !s.Flags.begin(ofGraphs), !s.Flags.begin(ofSizes)
	frontends := cores >= coresForTwo && (lines == 0 || lines >= longJob) && !s.Flags.begin(ofFrontends) && !slices.ContainsFunc(oneFrontend, isSet)
	if err != nil || each != 1 || !graphs && !sizes && !frontends {
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
	if c.Memory < bytes*tinyModel || c.A100 {
		return
	}
	if sizes {
		s.extra = append(s.extra, throughput...)
	}
	if frontends && !s.sees() {
		s.extra = append(s.extra, "--api-server-count", strconv.Itoa(min(cores/2-1, mostFrontends)))
	}
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

// plainer gives up our own flags where the server ended by itself before it ever came up, and they may be why; nil: it does not.
func (s *Server) plainer(e ending, came bool) Flags {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.extra == nil || !e.itself || e.well > 0 || came || !slices.Contains(mayBeOurs, e.reason) {
		return nil
	}
	ours := s.extra
	s.extra = nil
	return ours
}
