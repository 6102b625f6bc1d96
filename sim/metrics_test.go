package sim

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

func parseMetrics(t testing.TB, text []byte) map[string]*dto.MetricFamily {
	t.Helper()
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	maps.DeleteFunc(families, func(name string, _ *dto.MetricFamily) bool { return !strings.HasPrefix(name, "vllm:") })
	return families
}

// value returns a counter or gauge, summed over its labels.
func (r *rig) value(name string) (sum float64) {
	r.t.Helper()
	f := parseMetrics(r.t, r.get("/metrics").body)["vllm:"+name]
	if f == nil {
		r.t.Fatalf("no metric %s", name)
	}
	for _, m := range f.Metric {
		sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + m.GetHistogram().GetSampleSum()
	}
	return sum
}

// signature is everything of a family but its numbers.
func signature(f *dto.MetricFamily, skip func(label string) bool) string {
	var samples []string
	for _, m := range f.Metric {
		var labels []string
		for _, l := range m.Label {
			value := l.GetValue()
			if skip(l.GetName()) {
				value = "*"
			}
			labels = append(labels, l.GetName()+"="+value)
		}
		for _, b := range m.GetHistogram().GetBucket() {
			labels = append(labels, fmt.Sprint("le ", b.GetUpperBound()))
		}
		samples = append(samples, strings.Join(labels, ","))
	}
	slices.Sort(samples)
	return fmt.Sprint(f.GetType(), f.GetHelp(), samples)
}

func TestMetricsAreThoseOfVLLM(t *testing.T) {
	r := serve(t, tinyConfig())
	r.post(chatPath, chat("x", "")).ok(t)
	got := r.get("/metrics")
	if ct := got.header.Get("Content-Type"); ct != "text/plain; version=1.0.0; charset=utf-8" {
		t.Errorf("content type %s", ct)
	}
	recorded, err := os.ReadFile("../testdata/vllm/metrics-vllm-0.32.0-cpu.txt")
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := parseMetrics(t, got.body), parseMetrics(t, recorded)
	for name, f := range theirs {
		if ours[name] == nil {
			t.Errorf("no %s", name)
			continue
		}
		// The size of a cache is a matter of configuration.
		skip := func(string) bool { return name == "vllm:cache_config_info" }
		if g, w := signature(ours[name], skip), signature(f, skip); g != w {
			t.Errorf("%s is\n%s, want\n%s", name, g, w)
		}
	}
	for name := range ours {
		if theirs[name] == nil {
			t.Errorf("%s is invented", name)
		}
	}
}

func TestMetricsTextIsPythons(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0.0", 1: "1.0", .3: "0.3", 5237: "5237.0", 999999.5: "999999.5", 1e6: "1e+06", 1234567: "1.234567e+06", 1.7954753491081e9: "1.7954753491081e+09",
	} {
		if got := promFloat(v); got != want {
			t.Errorf("%v is written %s, want %s", v, got, want)
		}
	}
	r := serve(t, tinyConfig())
	for _, line := range []string{
		"# TYPE vllm:generation_tokens_total counter\nvllm:generation_tokens_total{engine=\"0\",model_name=\"tiny\"} 0.0\n",
		"vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"tiny\"} 0.0\n",
		"vllm:request_params_n_bucket{engine=\"0\",le=\"+Inf\",model_name=\"tiny\"} 0.0\n",
	} {
		if !bytes.Contains(r.get("/metrics").body, []byte(line)) {
			t.Errorf("no %s", line)
		}
	}
}

func TestMetricsCountTheWork(t *testing.T) {
	r := serve(t, Config{MaxModelLen: 1000, KVTokens: 4000})
	bodies := repeat(30, func(i int) string {
		return chat(words("shared", 100)+fmt.Sprint(i), fmt.Sprintf(`, "max_tokens": %d, "ignore_eos": true, "n": %d`, 1+i, 1+i%3))
	})
	var prompt, completion, cached, seqs int
	for i, got := range r.spread(chatPath, bodies)() {
		res := got.belongs(t, bodies[i])
		if n := 1 + i%3; len(res.Choices) != n || res.Usage.Completion != n*(1+i) || res.Usage.Total != res.Usage.Prompt+res.Usage.Completion {
			t.Errorf("n=%d, max_tokens=%d: %+v", n, 1+i, res.Usage)
		}
		prompt += res.Usage.Prompt * len(res.Choices)
		completion += res.Usage.Completion
		cached += res.Usage.Details.Cached
		seqs += len(res.Choices)
	}
	if cached == 0 {
		t.Error("nothing was cached")
	}
	for name, want := range map[string]int{
		"prompt_tokens_total": prompt, "generation_tokens_total": completion, "request_success_total": seqs,
		"request_generation_tokens": completion, "request_prompt_tokens": prompt, "request_params_n": seqs,
		"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0,
	} {
		if got := r.value(name); got != float64(want) {
			t.Errorf("%s is %v, want %d", name, got, want)
		}
	}
	if got := r.value("prompt_tokens_cached_total"); got < float64(cached) {
		t.Errorf("prompt_tokens_cached_total is %v, the answers say %d", got, cached)
	}
}

func TestCacheConfigInfo(t *testing.T) {
	r := serve(t, Config{Models: []string{"a\"b"}, MaxModelLen: 2048, KVTokens: 65536 + 5})
	labels := map[string]string{}
	for _, l := range parseMetrics(t, r.get("/metrics").body)["vllm:cache_config_info"].Metric[0].Label {
		labels[l.GetName()] = l.GetValue()
	}
	for name, want := range map[string]string{
		"num_gpu_blocks": "4096", "block_size": "16", "kv_cache_size_tokens": "65536", "kv_cache_max_concurrency": "32.0", "enable_prefix_caching": "True",
	} {
		if labels[name] != want {
			t.Errorf("%s is %s, want %s", name, labels[name], want)
		}
	}
}

// A request of /v1/completions with several prompts is as many requests for the engine.
func TestSeveralPrompts(t *testing.T) {
	r := serve(t, Config{})
	body := `{"prompt": ["abc", "defgh", [1, 2, 3]], "n": 2, "max_tokens": 5}`
	res := r.post("/v1/completions", body).belongs(t, body)
	if len(res.Choices) != 6 || res.Usage.Prompt != 1+2+3 || res.Usage.Completion != 30 {
		t.Errorf("got %+v", res)
	}
	if n, sum := r.value("request_success_total"), r.value("request_params_n"); n != 6 || sum != 6 {
		t.Errorf("%v requests, sum of n %v", n, sum)
	}
}
