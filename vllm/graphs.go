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
// strides. They take 0.3 GiB more of the card, and a second or two at the start.

const (
	bigCard    = 70 << 30 // bytes: from there on vLLM runs 1,024 sequences at once (engine/arg_utils.py)
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

// ofGraphs are the beginnings of flags that say what graphs there are, or change what a graph holds.
var ofGraphs = []string{"--enforce-eager", "--compilation-config", "-cc", "-O", "--optimization-level", "--cudagraph-capture-sizes", "--cuda-graph-sizes",
	"--max-cudagraph-capture-size", "--speculative-config", "--enable-lora"}

// ofGraphs says whether any of them is there.
func (f Flags) ofGraphs() bool {
	return slices.ContainsFunc(f, func(word string) bool {
		return slices.ContainsFunc(ofGraphs, func(of string) bool { return strings.HasPrefix(spelt(word), of) })
	})
}

// Tune lets the server have larger CUDA graphs than vLLM takes by itself, where its one GPU has so many bytes and is fast
// for the model. It is called before Run.
func (s *Server) Tune(memory int64) {
	each, err := s.Flags.GPUs()
	if err != nil || each != 1 || memory < bigCard || s.Flags.ofGraphs() || weights(s.Model)*smallModel > memory {
		return
	}
	s.extra = Flags{"--compilation-config", graphSizes()}
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
var mayBeOurs = []string{"", "cache", "context", "memory", "core"}

// plainer gives up our own flags where the server did not start and they may be why.
func (s *Server) plainer(e ending) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.extra == nil || e.well > 0 || !slices.Contains(mayBeOurs, e.reason) {
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
	if s.Flags.has("--speculative-config") {
		return -1
	}
	return s.graphs
}

// weights is how many bytes the files of a model's weights have on this machine; 0: there are none yet, or they are
// elsewhere. A model with a name is looked for where huggingface_hub keeps it (constants.py, file_download.py).
func weights(model string) (most int64) {
	dirs := []string{model}
	if _, err := os.Stat(model); err != nil {
		hub := os.Getenv("HF_HUB_CACHE")
		if home := os.Getenv("HF_HOME"); hub == "" && home != "" {
			hub = filepath.Join(home, "hub")
		}
		if home, err := os.UserHomeDir(); hub == "" && err == nil {
			hub = filepath.Join(home, ".cache", "huggingface", "hub")
		}
		dirs, _ = filepath.Glob(filepath.Join(hub, "models--"+strings.ReplaceAll(model, "/", "--"), "snapshots", "*")) // a name that is no pattern has none
	}
	for _, dir := range dirs {
		var size int64
		files, _ := os.ReadDir(dir) // nothing is known of what cannot be read
		for _, f := range files {
			if !slices.Contains([]string{".safetensors", ".bin", ".pt", ".gguf"}, filepath.Ext(f.Name())) {
				continue
			}
			if info, err := os.Stat(filepath.Join(dir, f.Name())); err == nil { // a link leads to it
				size += info.Size()
			}
		}
		most = max(most, size)
	}
	return most
}
