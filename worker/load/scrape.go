package load

import (
	"bytes"
	"strconv"
	"strings"
)

// The metrics that are read. Names are compared whole: a prefix would take num_requests_waiting_by_reason for
// num_requests_waiting.
//
// vLLM's are those of the engines that were recorded (testdata/vllm). Those of SGLang, which has them only with
// --enable-metrics, are named in python/sglang/srt/observability/metrics_collector.py (commit 016d860 of
// github.com/sgl-project/sglang, 2026; python/sglang/srt/metrics/collector.py before). It counts generation_tokens_total
// when a request ends, realtime_tokens_total as it goes. A scheduler that is a rank of the same engine may tell the same
// once more, and priorities stand beside their total: so the largest value counts, for each data-parallel engine. Those of
// llama.cpp's server are not read: its slots say what there is to know, and its counters stand still while a line runs.

// scrape is what the samples of one answer of /metrics add up to.
type scrape struct {
	engines []engineGauges
	sums    Gauges
	ended   int64 // tokens of sequences that ended, prompts included
	begun   int64 // sequences that had their first token
	over    int64 // sequences that ended is of
	counts  bool  // ended is told
	live    int64 // output tokens, of SGLang's realtime_tokens_total
}

// engineGauges is what is told for each data-parallel engine.
type engineGauges struct {
	name                      string
	running, waiting, retract float64
	usage, used, capacity     float64
	runs, holds               bool // running is told, and usage
}

// ReadGauges reads metrics in Prometheus' text or as OpenMetrics.
func ReadGauges(text []byte) Gauges {
	var s scrape
	for len(text) > 0 {
		line := text
		if i := bytes.IndexByte(text, '\n'); i >= 0 {
			line, text = text[:i], text[i+1:]
		} else {
			text = nil
		}
		if bytes.HasPrefix(line, []byte("vllm:")) || bytes.HasPrefix(line, []byte("sglang:")) {
			s.read(string(line))
		}
	}
	return s.total()
}

func (s *scrape) read(sample string) {
	i := strings.IndexAny(sample, "{ ")
	if i < 0 {
		return
	}
	name, labels, value := sample[:i], "", sample[i:]
	if sample[i] == '{' {
		j := strings.LastIndexByte(sample, '}')
		if j < i {
			return
		}
		labels, value = sample[i+1:j], sample[j+1:]
	}
	f := strings.Fields(value) // a time stamp may follow the value
	if len(f) == 0 {
		return
	}
	if v, err := strconv.ParseFloat(f[0], 64); err == nil && v >= 0 {
		s.gauge(name, labels, v)
		s.counter(name, labels, v)
	}
}

// gauge takes in what each engine tells of itself.
func (s *scrape) gauge(name, labels string, v float64) {
	var to func(e *engineGauges) *float64
	switch name {
	case "vllm:num_requests_running", "sglang:num_running_reqs":
		s.sums.Known = true
		to = func(e *engineGauges) *float64 { return &e.running }
	case "vllm:num_requests_waiting", "sglang:num_queue_reqs":
		to = func(e *engineGauges) *float64 { return &e.waiting }
	case "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage": // the second of older versions
		to = func(e *engineGauges) *float64 { return &e.usage }
	case "sglang:num_used_tokens":
		to = func(e *engineGauges) *float64 { return &e.used }
	case "sglang:max_total_num_tokens":
		to = func(e *engineGauges) *float64 { return &e.capacity }
	case "sglang:num_retracted_requests_total":
		to = func(e *engineGauges) *float64 { return &e.retract }
	case "vllm:cache_config_info":
		v = capacity(labels)
		to = func(e *engineGauges) *float64 { return &e.capacity }
	default:
		return
	}
	e := s.engine(label(labels, "engine") + label(labels, "dp_rank"))
	at := to(e)
	*at = max(*at, v)
	e.runs, e.holds = e.runs || at == &e.running, e.holds || at == &e.usage || at == &e.used
}

func (s *scrape) engine(name string) *engineGauges {
	for i := range s.engines {
		if s.engines[i].name == name {
			return &s.engines[i]
		}
	}
	s.engines = append(s.engines, engineGauges{name: name})
	return &s.engines[len(s.engines)-1]
}

// counter takes in what adds up over all labels.
func (s *scrape) counter(name, labels string, v float64) {
	n := int64(v)
	switch name {
	case "vllm:prompt_tokens_total", "sglang:prompt_tokens_total":
		s.sums.Prompt += n
	case "vllm:generation_tokens_total", "sglang:generation_tokens_total":
		s.sums.Generation += n
	case "vllm:num_preemptions_total":
		s.sums.Preemptions += n
	case "vllm:request_success_total":
		s.sums.Finished += n
	case "vllm:request_prompt_tokens_sum":
		s.ended += n
	case "vllm:request_generation_tokens_sum":
		s.ended, s.counts = s.ended+n, true
	case "vllm:request_generation_tokens_count":
		s.over += n
	case "vllm:time_to_first_token_seconds_count":
		s.begun += n
	case "sglang:realtime_tokens_total":
		if label(labels, "mode") == "decode" {
			s.live += n
		}
	case "vllm:engine_sleep_state":
		s.sums.SleepTold = true
		s.sums.Asleep = s.sums.Asleep || label(labels, "sleep_state") == "awake" && v == 0
	}
}

// total adds up the engines. Each has a KV cache of its own, which the same share of the lines fills; the share of
// all of them is the mean.
func (s *scrape) total() Gauges {
	g := s.sums
	g.Generation = max(g.Generation, s.live)
	if s.counts {
		g.Held, g.Holding = max(0, g.Prompt+g.Generation-s.ended), max(0, s.begun-s.over)
	}
	var share, shares float64
	for i := range s.engines {
		e := &s.engines[i]
		if e.used > 0 && e.capacity > 0 {
			e.usage = e.used / e.capacity // not rounded
		}
		if e.runs {
			g.Engines++
		}
		if e.holds {
			share, shares = share+e.usage, shares+1
		}
		g.Running += int64(e.running)
		g.Waiting += int64(e.waiting)
		g.Preemptions += int64(e.retract)
		g.KVTokens += int64(e.capacity)
	}
	g.KVUsage = share / max(1, shares)
	return g
}

// capacity finds the size of the KV cache. Which labels there are depends on the version.
func capacity(labels string) float64 {
	if n, err := strconv.ParseInt(label(labels, "kv_cache_size_tokens"), 10, 64); err == nil {
		return float64(n)
	}
	blocks, err1 := strconv.ParseInt(label(labels, "num_gpu_blocks"), 10, 64)
	size, err2 := strconv.ParseInt(label(labels, "block_size"), 10, 64)
	if err1 != nil || err2 != nil {
		return 0
	}
	return float64(blocks * size)
}

// label returns the value of a label whose value holds no quotes.
func label(labels, name string) string {
	for rest := labels; ; {
		i := strings.Index(rest, name+`="`)
		if i < 0 {
			return ""
		}
		v := rest[i+len(name)+2:]
		if i == 0 || rest[i-1] == ',' {
			v, _, _ = strings.Cut(v, `"`)
			return v
		}
		rest = v
	}
}

// ReadSettings picks what people ask about first from the settings of a KV cache, as vLLM's metrics tell them.
func ReadSettings(text []byte) (out []string) {
	_, rest, found := bytes.Cut(text, []byte("\nvllm:cache_config_info{"))
	if !found {
		return nil
	}
	labels, _, _ := bytes.Cut(rest, []byte("}"))
	for _, name := range []string{"block_size", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "kv_cache_max_concurrency", "sliding_window"} {
		if v := label(string(labels), name); v != "" && v != "None" {
			out = append(out, name+"="+v)
		}
	}
	return out
}
