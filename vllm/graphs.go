package vllm

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A step of vLLM with more tokens than its largest CUDA graph is started kernel by kernel, from one core of the processor,
// and the card waits for that. By itself vLLM records graphs of up to 512 tokens (vllm/config/vllm.py, 0.26.0 to 0.32.0):
// fewer than a step has with one prompt in it, or with all of 1,024 sequences. On a card that is fast for its model those
// are the slow steps (docs/measurements/speed.md), so Tune asks for larger graphs there: as many as by itself, in larger
// strides. They take about 0.3 GiB more of the card: measured with those that it takes by itself and 14 more, up to as many.

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
