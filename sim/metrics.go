package sim

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// metricsText writes the text form as Python's prometheus_client does, which is
// not quite what Go's would write: floats with a point, labels in order of their
// names with le among them, and a _created gauge beside every counter. A reader
// of real vLLM has to cope with that, so it is kept.
type metricsText struct {
	b       []byte
	model   string
	created float64
}

type label struct{ name, value string }

// serveMetrics is GET /metrics.
func (e *Engine) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	m := &metricsText{model: e.cfg.Models[0], created: e.stats.created}
	if e.cfg.Frontend != FrontendRust {
		m.sleepState(e.faults.Load().Asleep)
	}
	e.stats.mu.Lock()
	m.gaugesAndCounters(e.stats)
	m.histograms(e.stats)
	e.stats.mu.Unlock()
	m.cacheConfig(e.cfg)
	w.Header().Set("Content-Type", "text/plain; version=1.0.0; charset=utf-8")
	w.Write(m.b)
}

func (m *metricsText) sleepState(asleep bool) {
	v := []float64{1, 0, 0}
	if asleep {
		v = []float64{0, 1, 0}
	}
	m.head("engine_sleep_state", "gauge", "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; "+
		"weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.")
	m.by("engine_sleep_state", "sleep_state", []string{"awake", "weights_offloaded", "discard_all"}, v)
}

func (m *metricsText) gaugesAndCounters(s *stats) {
	n := func(v uint64) float64 { return float64(v) }
	m.counter("estimated_flops_per_gpu", "Estimated number of floating point operations per GPU (for Model Flops Utilization calculations).", 0)
	m.counter("estimated_read_bytes_per_gpu", "Estimated number of bytes read from memory per GPU (for Model Flops Utilization calculations).", 0)
	m.counter("estimated_write_bytes_per_gpu", "Estimated number of bytes written to memory per GPU (for Model Flops Utilization calculations).", 0)
	m.gauge("num_requests_running", "Number of requests in model execution batches.", float64(s.running))
	m.gauge("num_requests_waiting", "Number of requests waiting to be processed.", float64(s.waiting))
	m.head("num_requests_waiting_by_reason", "gauge", "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling capacity; "+
		"'deferred' = deferred by transient constraints (LoRA budget, KV transfer, blocked status). Sum of all reasons equals vllm:num_requests_waiting.")
	m.by("num_requests_waiting_by_reason", "reason", []string{"capacity", "deferred"}, []float64{float64(s.waiting), 0})
	m.gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", s.usage)
	m.counter("prefix_cache_queries", "Prefix cache queries, in terms of number of queried tokens.", n(s.queried))
	m.counter("prefix_cache_hits", "Prefix cache hits, in terms of number of cached tokens.", n(s.hit))
	m.counter("external_prefix_cache_queries", "External prefix cache queries from KV connector cross-instance cache sharing, in terms of number of queried tokens.", 0)
	m.counter("external_prefix_cache_hits", "External prefix cache hits from KV connector cross-instance cache sharing, in terms of number of cached tokens.", 0)
	m.counter("mm_cache_queries", "Multi-modal cache queries, in terms of number of queried items.", 0)
	m.counter("mm_cache_hits", "Multi-modal cache hits, in terms of number of cached items.", 0)
	m.counter("num_preemptions", "Cumulative number of preemption from the engine.", n(s.preemptions))
	m.counter("prompt_tokens", "Number of prefill tokens processed.", n(s.prompt))
	m.counterBy("prompt_tokens_by_source", "Number of prompt tokens by source.", "source",
		[]string{"local_compute", "local_cache_hit", "external_kv_transfer"}, []float64{n(s.prompt - s.cached), n(s.cached), 0})
	m.counter("prompt_tokens_cached", "Number of cached prompt tokens (local + external).", n(s.cached))
	m.counterBy("prompt_tokens_cached_by_source", "Prefix-cache hit tokens by the cache tier that supplied them: device (local HBM), "+
		"host (offloaded to DRAM), disk, p2p (transferred from another vLLM instance) or external_unspecified. "+
		"Counted at admission; sums to vllm:prefix_cache_hits + vllm:external_prefix_cache_hits.", "source",
		[]string{"device", "host", "p2p", "disk", "external_unspecified"}, []float64{n(s.hit), 0, 0, 0, 0})
	m.counter("generation_tokens", "Number of generation tokens processed.", n(s.generated))
	finished := make([]float64, len(s.finished))
	for i, v := range s.finished {
		finished[i] = n(v)
	}
	m.counterBy("request_success", "Count of successfully processed requests.", "finished_reason", finishNames(), finished)
	m.rejections(n(s.rejected))
}

// rejections is the one family without an engine label: the frontend counts it.
func (m *metricsText) rejections(v float64) {
	const name, help = "admission_rejections", "Number of admission attempts rejected by a queue limit, by reason."
	for _, part := range []struct {
		name, kind    string
		first, second float64
	}{{name + "_total", "counter", v, 0}, {name + "_created", "gauge", m.created, m.created}} {
		m.head(part.name, part.kind, help)
		m.sample(part.name, part.first, label{"model_name", m.model}, label{"reason", "max_num_queued_reqs"})
		m.sample(part.name, part.second, label{"model_name", m.model}, label{"reason", "max_num_queued_tokens"})
	}
}

func (m *metricsText) histograms(s *stats) {
	m.histogram("request_prompt_tokens", "Number of prefill tokens processed.", &s.promptTokens)
	m.histogram("request_generation_tokens", "Number of generation tokens processed.", &s.generationTokens)
	m.histogram("iteration_tokens_total", "Histogram of number of tokens per engine_step.", &s.iterationTokens)
	m.histogram("request_max_num_generation_tokens", "Histogram of maximum number of requested generation tokens.", &s.maxGeneration)
	m.histogram("request_params_n", "Histogram of the n request parameter.", &s.paramN)
	m.histogram("request_params_max_tokens", "Histogram of the max_tokens request parameter.", &s.paramMaxTokens)
	m.histogram("time_to_first_token_seconds", "Histogram of time to first token in seconds.", &s.firstToken)
	m.histogram("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", &s.interToken)
	m.histogram("request_time_per_output_token_seconds", "Histogram of time_per_output_token_seconds per request.", &s.perToken)
	m.histogram("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", &s.latency)
	m.histogram("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", &s.queueTime)
	m.histogram("request_inference_time_seconds", "Histogram of time spent in RUNNING phase for request.", &s.inference)
	m.histogram("request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.", &s.prefill)
	m.histogram("request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.", &s.decode)
	m.histogram("request_num_preemptions", "Histogram of the number of times a request was preempted.", &s.preempted)
	m.histogram("request_prefill_kv_computed_tokens", "Histogram of new KV tokens computed during prefill (excluding cached tokens).", &s.computed)
}

// cacheConfig carries the size of the KV cache in its labels.
func (m *metricsText) cacheConfig(c Config) {
	blocks := c.KVTokens / blockSize
	size := itoa(blockSize)
	labels := []label{
		{"block_size", size}, {"effective_attention_block_size", size},
		{"num_gpu_blocks", itoa(blocks)}, {"kv_cache_size_tokens", itoa(blocks * blockSize)},
		{"kv_cache_max_concurrency", pyFloat(float64(blocks*blockSize) / float64(c.MaxModelLen))},
		{"enable_prefix_caching", pyBool(!c.NoPrefixCaching)},
		{"engine", "0"}, {"_block_size_resolved", "True"}, {"cache_dtype", "auto"}, {"gpu_memory_utilization", "0.92"},
		{"kv_cache_dtype_skip_layers", "[]"}, {"kv_offloading_backend", "native"}, {"mamba_cache_dtype", "auto"},
		{"mamba_cache_mode", "none"}, {"mamba_ssm_cache_dtype", "float32"}, {"prefix_cache_retention_interval", "0"},
		{"prefix_caching_hash_algo", "sha256"}, {"replayssm_buffer_len", "16"}, {"swa_bounded_replay", "True"},
	}
	for _, name := range []string{"enable_mamba_shared_prefix_checkpoint", "is_attention_free", "kv_sharing_fast_prefill",
		"use_kda_recoverssm", "use_replayssm", "user_specified_block_size"} {
		labels = append(labels, label{name, "False"})
	}
	for _, name := range []string{"cache_hit_alignment_tokens", "hash_block_size", "kv_cache_layout", "kv_cache_memory_bytes", "kv_offloading_size",
		"mamba_block_size", "mamba_page_size_padded", "num_cpu_blocks", "num_gpu_blocks_override", "prefix_match_unit",
		"skip_page_size_padded", "sliding_window"} {
		labels = append(labels, label{name, "None"})
	}
	slices.SortFunc(labels, func(a, b label) int { return strings.Compare(a.name, b.name) })
	m.head("cache_config_info", "gauge", "Information of the LLMEngine CacheConfig")
	m.sample("cache_config_info", 1, labels...)
}

func (m *metricsText) head(name, kind, help string) {
	m.b = append(m.b, "# HELP vllm:"+name+" "+help+"\n# TYPE vllm:"+name+" "+kind+"\n"...)
}

// sample writes one line. Labels come in order of their names.
func (m *metricsText) sample(name string, value float64, labels ...label) {
	m.b = append(append(m.b, "vllm:"...), name...)
	for i, l := range labels {
		m.b = append(m.b, "{,"[min(i, 1)])
		m.b = append(append(m.b, l.name...), `="`...)
		m.b = append(append(m.b, escapeLabel(l.value)...), '"')
	}
	m.b = append(append(append(m.b, "} "...), promFloat(value)...), '\n')
}

func escapeLabel(s string) string {
	if !strings.ContainsAny(s, "\\\"\n") {
		return s
	}
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s)
}

func (m *metricsText) gauge(name, help string, v float64) {
	m.head(name, "gauge", help)
	m.sample(name, v, label{"engine", "0"}, label{"model_name", m.model})
}

func (m *metricsText) counter(name, help string, v float64) {
	m.head(name+"_total", "counter", help)
	m.sample(name+"_total", v, label{"engine", "0"}, label{"model_name", m.model})
	m.gauge(name+"_created", help, m.created)
}

func (m *metricsText) counterBy(name, help, by string, values []string, v []float64) {
	m.head(name+"_total", "counter", help)
	m.by(name+"_total", by, values, v)
	m.head(name+"_created", "gauge", help)
	m.by(name+"_created", by, values, slices.Repeat([]float64{m.created}, len(values)))
}

// by writes one sample per value of a label.
func (m *metricsText) by(name, by string, values []string, v []float64) {
	for i, value := range values {
		labels := []label{{"engine", "0"}, {"model_name", m.model}, {by, value}}
		slices.SortFunc(labels, func(a, b label) int { return strings.Compare(a.name, b.name) })
		m.sample(name, v[i], labels...)
	}
}

func (m *metricsText) histogram(name, help string, h *histogram) {
	m.head(name, "histogram", help)
	var sum uint64
	for i, n := range h.counts {
		sum += n
		le := "+Inf"
		if i < len(h.bounds) {
			le = promFloat(h.bounds[i])
		}
		m.sample(name+"_bucket", float64(sum), label{"engine", "0"}, label{"le", le}, label{"model_name", m.model})
	}
	m.sample(name+"_count", float64(sum), label{"engine", "0"}, label{"model_name", m.model})
	m.sample(name+"_sum", h.sum, label{"engine", "0"}, label{"model_name", m.model})
	m.gauge(name+"_created", help, m.created)
}

// promFloat is prometheus_client's floatToGoString: Python's repr, but with an
// exponent from a million on.
func promFloat(v float64) string {
	s := strconv.FormatFloat(v, 'f', -1, 64)
	whole, frac, _ := strings.Cut(s, ".")
	if frac == "" {
		frac = "0"
	}
	if v > 0 && len(whole) > 6 {
		return strings.TrimRight(whole[:1]+"."+whole[1:]+frac, "0.") + "e+0" + itoa(len(whole)-1)
	}
	return whole + "." + frac
}

func pyBool(v bool) string {
	if v {
		return "True"
	}
	return "False"
}
