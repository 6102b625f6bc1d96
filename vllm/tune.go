package vllm

import (
	"os"
	"slices"
	"strconv"
	"strings"
)

const (
	bigCard    = 70 << 30 // bytes: from there on vLLM runs 1,024 sequences at once, but 256 on an A100 (engine/arg_utils.py)
	smallModel = 4        // times its weights is the card's memory; a larger model keeps the card busy, and needs the memory itself
	tinyModel  = 20       // times its weights is the card's memory: one process cannot read and write what the card answers

	tinyFrontends = 2
	coresForThem  = 6 // of the processor: EngineCore fills one, these as many as they are, and the rest is for what else is there
)

// With a model of 1B on an H200, 1,024 sequences at once and graphs for all of them, EngineCore and the one process that
// speaks HTTP fill a core each (docs/measurements/speed.md). That one is two with --api-server-count 2, which share the port;
// any of them tells the metrics of all. Some of what vLLM can do asks for one process, and with more
// it does without its cache of images and sound.
var (
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

// Tune lets the server have what vLLM does not take by itself, where its one GPU has so many bytes and is fast for the model,
// as the files of its weights on this machine say, and the user's flags say nothing of it: larger CUDA graphs, and for a very
// small model a second process that speaks HTTP, where so many cores are there for this server. It is called before Run, and
// asks for the memory only where nothing else speaks against both.
func (s *Server) Tune(memory func() int64, cores int) {
	each, err := s.Flags.GPUs()
	graphs := !s.Flags.begin(ofGraphs)
	frontends := cores >= coresForThem && !s.Flags.begin(ofFrontends) && !slices.ContainsFunc(oneFrontend, isSet)
	if err != nil || each != 1 || !graphs && !frontends {
		return
	}
	bytes, known := s.weights()
	if !known {
		return
	}
	card := memory()
	if card < bigCard {
		return
	}
	if graphs && card >= bytes*smallModel {
		s.extra = append(s.extra, "--compilation-config", graphSizes())
	}
	if frontends && card >= bytes*tinyModel && !s.sees() {
		s.extra = append(s.extra, "--api-server-count", strconv.Itoa(tinyFrontends))
	}
}

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

// plainer gives up our own flags where the server ended by itself before it was up, and they may be why; nil: it does not.
func (s *Server) plainer(e ending) Flags {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.extra == nil || !e.itself || e.well > 0 || !slices.Contains(mayBeOurs, e.reason) {
		return nil
	}
	ours := s.extra
	s.extra = nil
	return ours
}
