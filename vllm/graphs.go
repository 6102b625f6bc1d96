package vllm

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A step of vLLM with more tokens than its largest CUDA graph is started kernel by kernel, from one core of the processor,
// and the card waits for that. By itself vLLM records graphs of up to 512 tokens (vllm/config/vllm.py, 0.26.0 to 0.32.0):
// fewer than a step has with one prompt in it, or with all of 1,024 sequences. On a card that is fast for its model those
// are the slow steps (docs/measurements/speed.md), so we ask for larger graphs there: as many as by itself, in larger
// strides. They take about 0.3 GiB more of the card: measured with those that it takes by itself and 14 more, up to as many.

const (
	bigCard    = 70 << 30 // bytes: from there on vLLM runs 1,024 sequences at once, but 256 on an A100 (engine/arg_utils.py)
	smallModel = 4        // times its weights is the card's memory; a larger model keeps the card busy, and needs the memory itself
)

// graphStrides are the sizes of graphs in tokens: from the one before up to most, every so many.
var graphStrides = []struct{ every, most int }{{8, 64}, {16, 512}, {64, 1024}, {128, 2048}}

func graphSizes() string {
	sizes, at := []string{"1", "2", "4"}, 0
	for _, s := range graphStrides {
		for at += s.every; at <= s.most; at += s.every {
			sizes = append(sizes, strconv.Itoa(at))
		}
		at = s.most
	}
	return fmt.Sprintf(`{"cudagraph_capture_sizes":[%s]}`, strings.Join(sizes, ","))
}

// Beginnings of flags: those that say what graphs there are, or change what a graph holds, and those of speculative decoding.
var (
	ofGraphs = slices.Concat(speculative, []string{"--enforce-eager", "--compilation-config", "-cc", "-O", "--optimization-level",
		"--cudagraph-capture-sizes", "--cuda-graph-sizes", "--max-cudagraph-capture-size", "--performance-mode", "--enable-lora"})
	speculative = []string{"--speculative-", "--spec-", "-sc"}
)

// begin says whether any flag begins with one of these.
func (f Flags) begin(beginnings []string) bool {
	return slices.ContainsFunc(f, func(word string) bool {
		return slices.ContainsFunc(beginnings, func(b string) bool { return strings.HasPrefix(spelt(word), b) })
	})
}

// Tune lets the server have larger CUDA graphs than vLLM takes by itself, where its one GPU has so many bytes and is fast
// for the model, as the files of its weights on this machine say. It is called before Run, and asks for the memory only where
// nothing else speaks against it.
func (s *Server) Tune(memory func() int64) {
	each, err := s.Flags.GPUs()
	if err != nil || each != 1 || s.Flags.begin(ofGraphs) {
		return
	}
	if bytes, known := s.weights(); known && memory() >= max(bigCard, bytes*smallModel) {
		s.extra = Flags{"--compilation-config", graphSizes()}
	}
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

// plainer gives up our own flags where the server ended by itself before it was up, and they may be why.
func (s *Server) plainer(e ending) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.extra == nil || !e.itself || e.well > 0 || !slices.Contains(mayBeOurs, e.reason) {
		return false
	}
	s.extra = nil
	return true
}

// Graphs is how many tokens the largest CUDA graph of the running server holds, as its log says; 0: it does not, below 0:
// it has none, or holds more than one token of a sequence.
func (s *Server) Graphs() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Flags.begin(speculative) { // older versions do not log it
		return -1
	}
	return s.graphs
}

// weights is how many bytes the files of the model's weights have on this machine, and whether that is known: else there are
// none yet, or they are elsewhere. 0: they are random, as for a benchmark, of a size that no file says.
func (s *Server) weights() (bytes int64, known bool) {
	if format, _ := s.Flags.last("--load-format"); format == "dummy" {
		return 0, true
	}
	if info, err := os.Stat(s.Model); err == nil && !info.IsDir() {
		return info.Size(), true
	} else if err == nil {
		bytes = weightsIn(s.Model)
		_, err = os.Stat(filepath.Join(s.Model, "config.json"))
		return bytes, bytes > 0 || err == nil
	}
	hub, ok := s.Flags.last("--download-dir")
	if !ok {
		hub = hubCache()
	}
	dirs, _ := filepath.Glob(filepath.Join(hub, "models--"+strings.ReplaceAll(s.Model, "/", "--"), "snapshots", "*")) // a name that is no pattern has none
	for _, dir := range dirs {
		bytes = max(bytes, weightsIn(dir))
	}
	return bytes, bytes > 0
}

// hubCache is where huggingface_hub keeps models that have a name (constants.py, file_download.py).
func hubCache() string {
	home, _ := os.UserHomeDir() // without one there is nothing in it
	for _, c := range []struct{ variable, below string }{{"HF_HUB_CACHE", ""}, {"HUGGINGFACE_HUB_CACHE", ""}, {"HF_HOME", "hub"}, {"XDG_CACHE_HOME", "huggingface/hub"}} {
		if dir := os.Getenv(c.variable); dir != "" {
			return filepath.Join(dir, c.below)
		}
	}
	return filepath.Join(home, ".cache", "huggingface", "hub")
}

// weightsIn is how many bytes the files of weights in a folder have.
func weightsIn(dir string) (bytes int64) {
	files, _ := os.ReadDir(dir) // nothing is known of what cannot be read
	for _, f := range files {
		if !slices.Contains([]string{".safetensors", ".bin", ".pt", ".gguf"}, filepath.Ext(f.Name())) {
			continue
		}
		if info, err := os.Stat(filepath.Join(dir, f.Name())); err == nil { // a link leads to it
			bytes += info.Size()
		}
	}
	return bytes
}
