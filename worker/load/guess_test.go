package load

import (
	"os"
	"strings"
	"testing"
	"time"

	"millrace/proto"
)

// TestGuess: the Rust frontend tells no capacity. The engine that was recorded has 4,112,864 tokens, as its Python frontend
// says.
func TestGuess(t *testing.T) {
	b, err := os.ReadFile("../../testdata/vllm/metrics-vllm-0.26.0-rust.txt")
	if err != nil {
		t.Fatal(err)
	}
	l := New(0)
	st := Engine{Kind: proto.KindVLLM, Version: "0.26.0", Run: 1, MaxLen: 4096, Gauges: ReadGauges(b)}
	l.Observe(st, 1024, time.Now())
	if l.kv < 0.97*4112864 || l.kv > 1.03*4112864 || l.way != bySteering {
		t.Errorf("KV cache of %.0f tokens", l.kv)
	}
	st.Gauges.KVTokens = 4112864
	l.Observe(st, 1024, time.Now())
	if l.kv != 4112864 {
		t.Errorf("KV cache of %.0f tokens, the engine says 4112864", l.kv)
	}
	st.Gauges.KVTokens = 0 // the engine's word stays
	l.Observe(st, 1024, time.Now())
	if l.kv != 4112864 {
		t.Errorf("KV cache of %.0f tokens, the engine said 4112864", l.kv)
	}
}

// TestGuessLost: tokens of requests that were broken off are counted as held for ever, and are not.
func TestGuessLost(t *testing.T) {
	now := time.Now()
	l := New(0)
	l.Observe(seen(0, Gauges{Held: 50000}), 0, now)
	l.Observe(seen(0, Gauges{Held: 150000 - 8*100, Running: 100, KVUsage: 0.25}), 100, now.Add(time.Second))
	if l.kv != 400000 {
		t.Errorf("KV cache of %.0f tokens, want 400000", l.kv)
	}
}

// TestGuessWaits: what waits in an engine that runs nothing at the moment is held and not lost; and what is guessed while the
// KV cache is emptier than before counts little.
func TestGuessWaits(t *testing.T) {
	now := time.Now()
	l := New(0)
	look := func(g Gauges) {
		now = now.Add(time.Second)
		l.Observe(seen(0, g), 100, now)
	}
	look(Gauges{Held: 50000, Waiting: 50})
	look(Gauges{Held: 100000 - 8*100, Running: 100, KVUsage: 0.25})
	if l.kv != 400000 {
		t.Errorf("KV cache of %.0f tokens, want 400000", l.kv)
	}
	look(Gauges{Held: 100000 - 8*100, Running: 100, KVUsage: 0.2})
	if l.kv != 400000 {
		t.Errorf("KV cache of %.0f tokens after a look at one that is emptier, want 400000", l.kv)
	}
}

// TestGuessGivenUp: requests that a client gave up stay among those that are counted as held while others go on.
func TestGuessGivenUp(t *testing.T) {
	now := time.Now()
	l := New(0)
	for i := range int64(100) { // each time 30 more, of about as many tokens
		g := Gauges{Held: 100*992 + 30*i*1100, Holding: 100 + 30*i, Running: 100, KVUsage: 0.25}
		l.Observe(seen(0, g), 100, now.Add(time.Duration(i)*time.Second))
	}
	if l.kv < 380000 || l.kv > 450000 {
		t.Errorf("KV cache of %.0f tokens, want 400000", l.kv)
	}
}

const sglangMetrics = `# as python/sglang/srt/observability/metrics_collector.py names them, with two data-parallel engines and priorities
sglang:num_running_reqs{dp_rank="0",engine_type="unified",model_name="m",priority="",tp_rank="0"} 30.0
sglang:num_running_reqs{dp_rank="0",engine_type="unified",model_name="m",priority="1",tp_rank="0"} 10.0
sglang:num_running_reqs{dp_rank="1",engine_type="unified",model_name="m",priority="",tp_rank="1"} 20.0
sglang:num_queue_reqs{dp_rank="0",model_name="m",priority=""} 3.0
sglang:token_usage{dp_rank="0",model_name="m"} 0.28
sglang:token_usage{dp_rank="1",model_name="m"} 0.5
sglang:num_used_tokens{dp_rank="0",model_name="m"} 30000.0
sglang:max_total_num_tokens{dp_rank="0",model_name="m"} 100000.0
sglang:max_total_num_tokens{dp_rank="1",model_name="m"} 100000.0
sglang:num_retracted_reqs{dp_rank="0",model_name="m"} 9.0
sglang:num_retracted_requests_total{dp_rank="0",model_name="m"} 2.0
sglang:num_retracted_requests_total{dp_rank="1",model_name="m"} 5.0
sglang:prompt_tokens_total{model_name="m"} 8.128902e+06
sglang:generation_tokens_total{model_name="m"} 7000.0
sglang:realtime_tokens_total{dp_rank="0",mode="decode",model_name="m"} 5000.0
sglang:realtime_tokens_total{dp_rank="0",mode="prefill_compute",model_name="m"} 90000.0
sglang:realtime_tokens_total{dp_rank="1",mode="decode",model_name="m"} 4000.0
`

func TestGaugesSGLang(t *testing.T) {
	want := Gauges{Known: true, Engines: 2, KVTokens: 200000, KVUsage: 0.4, Running: 50, Waiting: 3, Prompt: 8128902, Generation: 9000, Preemptions: 7}
	if got := ReadGauges([]byte(sglangMetrics)); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// TestGaugesOfSeveral: the use of several engines is their mean, as their capacity is their sum, wherever that stands.
func TestGaugesOfSeveral(t *testing.T) {
	got := ReadGauges([]byte(strings.Join([]string{
		`vllm:num_requests_running{engine="0"} 30`, `vllm:num_requests_running{engine="1"} 10`,
		`vllm:kv_cache_usage_perc{engine="0"} 0.9`, `vllm:kv_cache_usage_perc{engine="1"} 0.3`,
		`vllm:cache_config_info{kv_cache_size_tokens="1000"} 1.0`,
	}, "\n")))
	want := Gauges{Known: true, Engines: 2, KVTokens: 1000, KVUsage: 0.6, Running: 40}
	if got.KVUsage < 0.599 || got.KVUsage > 0.601 {
		t.Errorf("use of %v", got.KVUsage)
	}
	if got.KVUsage = 0.6; got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}
