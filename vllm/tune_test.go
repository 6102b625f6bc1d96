package vllm_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"millrace/vllm"
)

// TestTune: larger graphs are asked for on a big card alone, for one model that is small, and where the user says nothing of them.
func TestTune(t *testing.T) {
	model := t.TempDir()
	large := t.TempDir()
	weigh(t, model, 16)
	weigh(t, large, 21)
	hub := t.TempDir()
	t.Setenv("HF_HUB_CACHE", hub)
	weigh(t, filepath.Join(hub, "models--a--large", "snapshots", "1f"), 65)
	weigh(t, filepath.Join(hub, "models--a--small", "snapshots", "1f"), 8)
	other := t.TempDir()
	weigh(t, filepath.Join(other, "models--a--large", "snapshots", "1f"), 8)
	random := t.TempDir()
	if err := os.WriteFile(filepath.Join(random, "config.json"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		model  string
		memory int64
		flags  vllm.Flags
		want   bool
	}{
		{model, h100, nil, true}, {"a/small", h100, vllm.Flags{"--max-model-len", "4096"}, true}, {"a/unknown", h100, nil, false},
		{"a/unknown", h100, vllm.Flags{"--load_format=dummy"}, true}, {random, h100, nil, false}, {t.TempDir(), h100, nil, false},
		{filepath.Join(model, "model-1.safetensors"), h100, nil, true}, {filepath.Join(large, "model-1.safetensors"), h100, nil, false},
		{"a/large", h100, vllm.Flags{"--download-dir", other}, true}, {"a/small", h100, vllm.Flags{"--download-dir", other}, false},
		{large, h100, nil, false}, {"a/large", h100, nil, false}, {model, 0, nil, false}, {model, 24 << 30, nil, false}, {large, 141 << 30, nil, true},
		{model, h100, vllm.Flags{"-tp", "2"}, false}, {model, h100, vllm.Flags{"--enforce-eager"}, false}, {model, h100, vllm.Flags{"--max_cudagraph_capture_size=512"}, false},
		{model, h100, vllm.Flags{"--compilation_config.mode=3"}, false}, {model, h100, vllm.Flags{"-cc.mode", "3"}, false}, {model, h100, vllm.Flags{"-O1"}, false}, {model, h100, vllm.Flags{"-O", "2"}, false}, {model, h100, vllm.Flags{"--enable-lora"}, false},
		{model, h100, vllm.Flags{"--speculative-config={}"}, false}, {model, h100, vllm.Flags{"--speculative-config.method", "ngram"}, false},
		{model, h100, vllm.Flags{"-sc", "{}"}, false}, {model, h100, vllm.Flags{"--spec-method", "ngram"}, false}, {model, h100, vllm.Flags{"--spec_tokens=3"}, false},
		{model, h100, vllm.Flags{"--spec-model", "m"}, false}, {model, h100, vllm.Flags{"--performance-mode", "interactivity"}, false},
		{model, h100, vllm.Flags{"--compil", "{}"}, false}, {model, h100, vllm.Flags{"--compilation_c={}"}, false}, {model, h100, vllm.Flags{"--compilation-c.mode", "3"}, false}, {model, h100, vllm.Flags{"--compi", "3"}, false},
	} {
		s := &vllm.Server{Model: c.model, Flags: c.flags, Port: 1}
		s.Tune(func() vllm.Card { return vllm.Card{Memory: c.memory} })
		line := s.CommandLine()
		at := slices.Index(line, "--compilation-config")
		if at >= 0 != c.want || c.want && (!slices.Contains(s.Shown(), line[at+1]) || !strings.HasSuffix(line[at+1], ",1920,2048]}") || !strings.Contains(line[at+1], "[1,2,4,8,16,24,32,40,48,56,64,80,96,")) {
			t.Errorf("%+v: %q", c, line)
		}
	}
}

// TestTuneSizes: a very small model gets larger steps, where the user says nothing of their size, and how many sequences they hold
// is known.
func TestTuneSizes(t *testing.T) {
	tiny, small := t.TempDir(), t.TempDir()
	weigh(t, tiny, 2)
	weigh(t, small, 4)
	big := vllm.Card{Memory: h100}
	for _, c := range []struct {
		model string
		card  vllm.Card
		flags vllm.Flags
		want  int64 // sequences
	}{
		{tiny, big, nil, 2048}, {tiny, big, vllm.Flags{"--enforce-eager"}, 2048}, {small, big, nil, 0}, {tiny, vllm.Card{Memory: 64 << 30}, nil, 0}, {tiny, vllm.Card{}, nil, 0}, {tiny, vllm.Card{Memory: h100, A100: true}, nil, 0},
		{tiny, big, vllm.Flags{"--max-num-seqs", "64"}, 64}, {tiny, big, vllm.Flags{"--max-num-b=512"}, 0}, {tiny, big, vllm.Flags{"--performance-mode", "balanced"}, 0},
		{tiny, big, vllm.Flags{"--no-enable-chunked-prefill"}, 0}, {tiny, big, vllm.Flags{"--runner", "pooling"}, 0}, {tiny, big, vllm.Flags{"-sc", "{}"}, 0},
		{tiny, big, vllm.Flags{"-tp", "2"}, 0},
	} {
		s := &vllm.Server{Model: c.model, Flags: c.flags, Port: 1}
		s.Tune(func() vllm.Card { return c.card })
		shown := strings.Join(s.Shown()[len(c.flags):], " ")
		if got := s.Sequences(); got != c.want || strings.Contains(shown, "--max-num-seqs 2048 --max-num-batched-tokens 16384") != (c.want == 2048) {
			t.Errorf("%+v: %d, %s", c, got, shown)
		}
	}
}

// TestNoAccessLog: a server does not log each request, if the user says nothing of that.
func TestNoAccessLog(t *testing.T) {
	for _, c := range []struct {
		flags vllm.Flags
		want  bool
	}{
		{nil, true}, {vllm.Flags{"--max-num-seqs", "8"}, true}, {vllm.Flags{"--no-disable-uvicorn-access-log"}, false},
		{vllm.Flags{"--uvicorn_log_level=debug"}, false}, {vllm.Flags{"--disable-access-log-for-endpoints", "/health"}, false},
		{vllm.Flags{"--no-disable-uv"}, false}, {vllm.Flags{"--disable-uvicorn"}, false}, {vllm.Flags{"--disable-log-stats"}, true},
	} {
		s := &vllm.Server{Model: "m", Flags: c.flags, Port: 1}
		if line := s.CommandLine(); slices.Contains(line, "--disable-uvicorn-access-log") != c.want || len(s.Shown()) != len(c.flags) {
			t.Errorf("%q, shown %q", line, s.Shown())
		}
	}
}

// weigh makes a folder with weights of so many GiB.
func weigh(t *testing.T, dir string, gib int64) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "model-1.safetensors"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "model-1.safetensors"), gib<<30); err != nil {
		t.Fatal(err)
	}
}

// TestTuneHub: a model with a name is looked for where huggingface_hub keeps it.
func TestTuneHub(t *testing.T) {
	for _, c := range []struct{ variable, below string }{{"HF_HUB_CACHE", ""}, {"HUGGINGFACE_HUB_CACHE", ""}, {"HF_HOME", "hub"}, {"XDG_CACHE_HOME", "huggingface/hub"}, {"HOME", ".cache/huggingface/hub"}} {
		t.Setenv("HOME", t.TempDir())
		for _, other := range []string{"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"} {
			t.Setenv(other, "")
		}
		dir := t.TempDir()
		t.Setenv(c.variable, dir)
		files := filepath.Join(dir, c.below, "models--a--small", "snapshots", "1f")
		if err := os.MkdirAll(files, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(files, "model.safetensors"), []byte("w"), 0o600); err != nil {
			t.Fatal(err)
		}
		s := &vllm.Server{Model: "a/small", Port: 1}
		if s.Tune(card); len(s.Shown()) == 0 {
			t.Errorf("%s: not found", c.variable)
		}
	}
}
