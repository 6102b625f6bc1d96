package worker

import (
	"strings"
	"testing"

	"millrace/proto"
)

// TestCheck: what is found of an engine, and why a worker would not run lines on it.
func TestCheck(t *testing.T) {
	smi(t, twoGPUs)
	const metrics = "vllm:num_requests_running{} 3\nvllm:num_requests_waiting{} 1\nvllm:kv_cache_usage_perc{} 0.5\nvllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"10000\"} 1\n"
	for _, c := range []struct {
		name    string
		set     func(*fake)
		state   string
		trouble string // part of it; empty: none
	}{
		{"ready", func(f *fake) { f.metrics = metrics }, proto.EngineReady, ""},
		{"no metrics", func(f *fake) { f.health = 404 }, proto.EngineReady, ""},
		{"loading", func(f *fake) { f.health = 503 }, proto.EngineWaiting, "/health says 503"},
		{"no such path", func(f *fake) { f.listed = 404 }, proto.EngineWaiting, "check --engine"},
		{"a key", func(f *fake) { f.listed = 401 }, proto.EngineDenied, "--engine-api-key"},
		{"no model", func(f *fake) { f.models = "" }, proto.EngineNoModel, "serves no model"},
		{"asleep", func(f *fake) { f.metrics = "vllm:engine_sleep_state{sleep_state=\"awake\"} 0\n" }, proto.EngineWaiting, "asleep"},
		{"gone", func(f *fake) { f.Close() }, proto.EngineWaiting, "refuses connections"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t)
			c.set(f)
			w := &Worker{Engine: f.engine(), GPUs: new(GPUs), Devices: []string{"0"}}
			got := w.Check(t.Context())
			if got.State != c.state || !strings.Contains(got.Trouble, c.trouble) || (got.Trouble == "") != (c.trouble == "") {
				t.Errorf("%s: %q", got.State, got.Trouble)
			}
			if well := c.trouble == ""; well != (got.Limit >= minLimit) || well != (got.LimitWhy != "") || well && strings.Join(got.Models, "") != "m" {
				t.Errorf("%+v", got)
			}
			if len(got.GPUs) != 1 || !got.OwnGPUs || got.GPUs[0].Index != "0" {
				t.Errorf("GPUs %+v", got.GPUs)
			}
			if g := got.Gauges; c.name == "ready" && (!g.Known || g.Running != 3 || g.KVTokens != 160000 || len(got.Settings) == 0) {
				t.Errorf("%+v %v", g, got.Settings)
			}
			if n := len(f.came); n > 0 {
				t.Errorf("%d requests were sent", n)
			}
		})
	}
	f := newFake(t)
	if got := (&Worker{Engine: f.engine(), Concurrency: 5, Models: []string{"x"}}).Check(t.Context()); got.Limit != 5 || got.Models[0] != "x" || got.GPUs != nil {
		t.Errorf("%+v", got)
	}
}
