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
		{"a/unknown", h100, vllm.Flags{"--load_format=dummy"}, true}, {random, h100, nil, true}, {t.TempDir(), h100, nil, false},
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
		s.Tune(func() int64 { return c.memory }, 1)
		line := s.CommandLine()
		at := slices.Index(line, "--compilation-config")
		if at >= 0 != c.want || c.want && (line[at+1] != s.Shown()[len(s.Shown())-1] || !strings.HasSuffix(line[at+1], ",1920,2048]}") || !strings.Contains(line[at+1], "[1,2,4,8,16,24,32,40,48,56,64,80,96,")) {
			t.Errorf("%+v: %q", c, line)
		}
	}
}

// TestTuneFrontends: a very small model gets a second process that speaks HTTP, where there are cores for it and nothing asks for
// one process, as a model that takes images or sound does.
func TestTuneFrontends(t *testing.T) {
	tiny, small := t.TempDir(), t.TempDir()
	weigh(t, tiny, 3)
	weigh(t, small, 5)
	sees, hears, reads, hub := t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir()
	t.Setenv("HF_HUB_CACHE", hub)
	seer, reader := filepath.Join(hub, "models--a--seer", "snapshots", "1f"), filepath.Join(hub, "models--a--reader", "snapshots", "1f")
	for dir, config := range map[string]string{sees: `{"vision_config": {}}`, seer: `{"vision_config": {}}`, hears: `{"thinker_config": {"audio_config": {}}}`, reads: `{"vocab_size": 1}`, reader: `{}`} {
		weigh(t, dir, 3)
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		model  string
		memory int64
		cores  int
		flags  vllm.Flags
		env    string // name and value
		want   bool
	}{
		{tiny, h100, 6, nil, "", true}, {tiny, h100, 6, vllm.Flags{"--enforce-eager", "--max-num-seqs", "1024"}, "", true}, {tiny, h100, 5, nil, "", false},
		{small, h100, 16, nil, "", false}, {small, 141 << 30, 16, nil, "", true}, {tiny, 64 << 30, 16, nil, "", false}, {tiny, 0, 16, nil, "", false}, {t.TempDir(), h100, 16, nil, "", false},
		{tiny, h100, 16, vllm.Flags{"--api_server_count=1"}, "", false}, {tiny, h100, 16, vllm.Flags{"-asc", "4"}, "", false}, {tiny, h100, 16, vllm.Flags{"--data-parallel-size", "1"}, "", false},
		{tiny, h100, 16, vllm.Flags{"-tp", "2"}, "", false}, {tiny, h100, 16, vllm.Flags{"--enable-lora"}, "", false}, {tiny, h100, 16, vllm.Flags{"--mm-processor-cache-type", "shm"}, "", false},
		{tiny, h100, 16, vllm.Flags{"--api-se", "1"}, "", false}, {tiny, h100, 16, vllm.Flags{"--api_server=1"}, "", false}, {tiny, h100, 16, vllm.Flags{"--enable-prefix-caching"}, "", true},
		{tiny, h100, 16, nil, "VLLM_USE_RUST_FRONTEND=1", false}, {tiny, h100, 16, nil, "VLLM_USE_RUST_FRONTEND=0", true}, {tiny, h100, 16, nil, "VLLM_RUST_FRONTEND_PATH=/x", false},
		{tiny, h100, 16, nil, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", false}, {tiny, h100, 16, nil, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=true", false},
		{sees, h100, 16, nil, "", false}, {hears, h100, 16, nil, "", false}, {reads, h100, 16, nil, "", true}, {"a/seer", h100, 16, nil, "", false}, {"a/reader", h100, 16, nil, "", true},
		{sees, h100, 16, vllm.Flags{"--load-format", "dummy"}, "", false},
	} {
		name, value, _ := strings.Cut(c.env, "=")
		if c.env != "" {
			t.Setenv(name, value)
		}
		s := &vllm.Server{Model: c.model, Flags: c.flags, Port: 1}
		s.Tune(func() int64 { return c.memory }, c.cores)
		if shown := strings.Join(s.Shown(), " "); strings.Contains(shown, "--api-server-count 2") != c.want {
			t.Errorf("%+v: %s", c, shown)
		}
		if c.env != "" {
			t.Setenv(name, "")
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
		if s.Tune(card, 1); len(s.Shown()) == 0 {
			t.Errorf("%s: not found", c.variable)
		}
	}
}
