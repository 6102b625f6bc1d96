package vllm_test

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"millrace/vllm"
)

const h100 = 81559 << 20 // bytes

func card() int64 { return h100 }

// TestTune: larger graphs are asked for on a big card alone, for one model that is small, and where the user says nothing of them.
func TestTune(t *testing.T) {
	model := t.TempDir()
	weights := func(dir string, gib int64) {
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
	large := t.TempDir()
	weights(model, 16)
	weights(large, 21)
	hub := t.TempDir()
	t.Setenv("HF_HUB_CACHE", hub)
	weights(filepath.Join(hub, "models--a--large", "snapshots", "1f"), 65)
	weights(filepath.Join(hub, "models--a--small", "snapshots", "1f"), 8)
	other := t.TempDir()
	weights(filepath.Join(other, "models--a--large", "snapshots", "1f"), 8)
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
	} {
		s := &vllm.Server{Model: c.model, Flags: c.flags, Port: 1}
		s.Tune(func() int64 { return c.memory })
		line := s.CommandLine()
		at := slices.Index(line, "--compilation-config")
		if at >= 0 != c.want || c.want && (line[at+1] != s.Shown()[len(s.Shown())-1] || !strings.HasSuffix(line[at+1], ",1920,2048]}") || !strings.Contains(line[at+1], "[1,2,4,8,16,24,32,40,48,56,64,80,96,")) {
			t.Errorf("%+v: %q", c, line)
		}
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

// TestGraphs: what the largest graph holds is read from the log; a server that does not start with ours is started without.
func TestGraphs(t *testing.T) {
	says, err := filepath.Abs("testdata/reasons")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		plan   string
		flags  vllm.Flags
		graphs int64
		starts int
	}{
		{"serve", nil, 2048, 1}, {"not-with-our-graphs " + says + "/cache.txt", nil, 512, 2}, {"not-with-our-graphs " + says + "/flag-unknown.txt", nil, 512, 2}, {"serve", vllm.Flags{"--enforce-eager"}, -1, 1},
		{"serve", vllm.Flags{"--max-num-seqs", "8", "--speculative-config", "{}"}, -1, 1}, {"serve", vllm.Flags{"--spec-tokens", "3"}, -1, 1},
		{"speculates", vllm.Flags{"-O", "2"}, -1, 1},
	} {
		r := newRig(t, c.plan)
		restarts := r.counted()
		r.Flags, r.Restarts = append(c.flags, random...), 0
		r.Tune(card)
		r.start().up(c.starts)
		if n, ours := r.Graphs(), slices.Contains(r.Shown(), "--compilation-config"); n != c.graphs || ours != (n == 2048) || len(r.lives()) != c.starts {
			t.Errorf("%+v: graphs of %d tokens, shown %q, %d starts", c, n, r.Shown(), len(r.lives()))
		}
		restarts(vllm.CauseStartFailed, float64(c.starts-1))
		if n, cause := r.Again(); n != int64(c.starts-1) || n > 0 && cause != vllm.CauseStartFailed {
			t.Errorf("%+v: %d restarts, the last %s", c, n, cause)
		}
		r.stop()
	}
}

// random are the flags of a server whose weights are: it is tuned wherever its model lies.
var random = vllm.Flags{"--load-format", "dummy"}

// TestPlainerNot: our graphs are no reason where a server did not end by itself, or was none.
func TestPlainerNot(t *testing.T) {
	for name, c := range map[string]struct {
		plan string
		set  func(*rig)
	}{
		"no command": {"serve", func(r *rig) { r.Command = []string{filepath.Join(t.TempDir(), "vllm")} }},
		"other name": {"serve", func(r *rig) { r.Flags = append(r.Flags, "--served-model-name=other") }},
		"port taken": {"serve", func(r *rig) {
			ln, err := net.Listen("tcp", strings.TrimPrefix(r.String(), "http://"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { ln.Close() })
		}},
		"killed": {"killed", func(*rig) {}},
		"quiet":  {"quiet", func(r *rig) { r.Quiet = time.Millisecond }},
	} {
		r := newRig(t, c.plan)
		r.Flags, r.Restarts = random, 0
		c.set(r)
		r.Tune(card)
		if f := r.start().fails(); len(r.lives()) > 1 || !slices.Contains(r.Shown(), "--compilation-config") {
			t.Errorf("%s: %+v, %d starts, shown %q", name, f, len(r.lives()), r.Shown())
		}
	}
}

// TestPlainer: a model that is not there is not tried twice.
func TestPlainer(t *testing.T) {
	says, err := filepath.Abs("testdata/reasons/model-no-folder.txt")
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, "says "+says)
	r.Flags = random
	r.Tune(card)
	if f := r.start().fails(); !f.Final || len(r.lives()) != 1 {
		t.Errorf("%+v, %d starts", f, len(r.lives()))
	}
}

// TestMemory: it is that of the smallest of the GPUs that are asked for.
func TestMemory(t *testing.T) {
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	if got := vllm.Memory(nil); got != 0 {
		t.Errorf("%d bytes, without nvidia-smi", got)
	}
	script := `#!/bin/sh
case "$*" in
"--query-gpu=memory.total --format=csv,noheader,nounits") echo 81559; echo 24576 ;;
"--query-gpu=memory.total --format=csv,noheader,nounits -i 0,GPU-2") echo 81559; echo 143771 ;;
*) echo '[N/A]' ;;
esac
`
	if err := os.WriteFile(filepath.Join(bin, "nvidia-smi"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	for want, ids := range map[int64][]string{24576 << 20: nil, 81559 << 20: {"0", "GPU-2"}, 0: {"MIG-1"}} {
		if got := vllm.Memory(ids); got != want {
			t.Errorf("%q: %d bytes, want %d", ids, got, want)
		}
	}
}
