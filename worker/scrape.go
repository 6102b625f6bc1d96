package worker

import (
	"bytes"
	"strconv"
	"strings"
)

// readGauges reads vLLM's metrics, in Prometheus' text or as OpenMetrics. Names are compared whole: a prefix would
// take num_requests_waiting_by_reason for num_requests_waiting. Several engines behind one server are added up.
func readGauges(text []byte) Gauges {
	var g Gauges
	for len(text) > 0 {
		line := text
		if i := bytes.IndexByte(text, '\n'); i >= 0 {
			line, text = text[:i], text[i+1:]
		} else {
			text = nil
		}
		if bytes.HasPrefix(line, []byte("vllm:")) {
			g.read(string(line))
		}
	}
	return g
}

func (g *Gauges) read(sample string) {
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
	if v, err := strconv.ParseFloat(f[0], 64); err == nil {
		g.add(name, labels, v)
	}
}

func (g *Gauges) add(name, labels string, v float64) {
	switch name {
	case "vllm:num_requests_running":
		g.Known = true
		g.Running += int64(v)
	case "vllm:num_requests_waiting":
		g.Waiting += int64(v)
	case "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc": // the latter of older versions
		g.KVUsage = max(g.KVUsage, v)
	case "vllm:prompt_tokens_total":
		g.Prompt += int64(v)
	case "vllm:generation_tokens_total":
		g.Generation += int64(v)
	case "vllm:num_preemptions_total":
		g.Preemptions += int64(v)
	case "vllm:engine_sleep_state":
		g.Asleep = g.Asleep || label(labels, "sleep_state") == "awake" && v == 0
	case "vllm:cache_config_info":
		g.KVTokens += capacity(labels)
	}
}

// capacity finds the size of the KV cache. Which labels there are depends on the version.
func capacity(labels string) int64 {
	if n, err := strconv.ParseInt(label(labels, "kv_cache_size_tokens"), 10, 64); err == nil {
		return n
	}
	blocks, err1 := strconv.ParseInt(label(labels, "num_gpu_blocks"), 10, 64)
	size, err2 := strconv.ParseInt(label(labels, "block_size"), 10, 64)
	if err1 != nil || err2 != nil {
		return 0
	}
	return blocks * size
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
