package load

import (
	"os"
	"strings"
	"testing"
)

// TestGauges reads the metrics that were recorded.
func TestGauges(t *testing.T) {
	for name, want := range map[string]Gauges{
		"metrics-vllm-0.26.0-python.txt": {Known: true, Engines: 1, KVTokens: 4112864, KVUsage: 0.012374879888583323, Running: 159, Waiting: 97, Prompt: 1759626, Generation: 676285, Held: 41654, Holding: 133, Finished: 5604, SleepTold: true},
		"metrics-vllm-0.26.0-rust.txt":   {Known: true, Engines: 1, KVUsage: 0.08386597316506717, Running: 1024, Prompt: 3951024, Generation: 1452280, Held: 332953, Holding: 1009, Finished: 11819},
		"metrics-vllm-0.32.0-cpu.txt":    {Known: true, Engines: 1, KVTokens: 1048576, Prompt: 5237, Generation: 3048, Finished: 45, SleepTold: true},
	} {
		b, err := os.ReadFile("../../testdata/vllm/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if got := ReadGauges(b); got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
}

func TestGaugesOdd(t *testing.T) {
	got := ReadGauges([]byte(strings.Join([]string{
		`vllm:num_requests_running{engine="0"} 3`, `vllm:num_requests_running{engine="1"} 4 1700000000`, // two engines, a time stamp
		`vllm:num_requests_waiting 5.0`, // no labels
		`vllm:num_requests_waiting_by_reason{reason="capacity"} 9`,
		`vllm:cache_config_info{other_block_size="1",block_size="16",num_gpu_blocks="10"} 1.0`, // no kv_cache_size_tokens
		`vllm:engine_sleep_state{sleep_state="awake"} 0`,
		`vllm:num_preemptions_total{engine="0"} 2`,
		`vllm:generation_tokens_total NaN`, `vllm:prompt_tokens_total{`, `vllm:prompt_tokens_total`, `vllm:prompt_tokens_total x`, `go_goroutines 7`,
	}, "\n")))
	want := Gauges{Known: true, Engines: 2, KVTokens: 160, Running: 7, Waiting: 5, Preemptions: 2, Asleep: true, SleepTold: true}
	if got.Generation = 0; got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if (ReadGauges(nil) != Gauges{}) {
		t.Error("something of nothing")
	}
}
