package vllm_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"millrace/vllm"
)

const h100 = 81559 << 20 // bytes

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
	for _, c := range []struct {
		model  string
		memory int64
		flags  vllm.Flags
		want   bool
	}{
		{model, h100, nil, true}, {"a/unknown", h100, vllm.Flags{"--max-model-len", "4096"}, true},
		{large, h100, nil, false}, {"a/large", h100, nil, false}, {model, 0, nil, false}, {model, 24 << 30, nil, false}, {large, 141 << 30, nil, true},
		{model, h100, vllm.Flags{"-tp", "2"}, false}, {model, h100, vllm.Flags{"--enforce-eager"}, false}, {model, h100, vllm.Flags{"--max_cudagraph_capture_size=512"}, false},
		{model, h100, vllm.Flags{"--compilation_config.mode=3"}, false}, {model, h100, vllm.Flags{"-cc.mode", "3"}, false}, {model, h100, vllm.Flags{"-O1"}, false}, {model, h100, vllm.Flags{"-O", "2"}, false}, {model, h100, vllm.Flags{"--enable-lora"}, false},
		{model, h100, vllm.Flags{"--speculative-config={}"}, false},
	} {
		s := &vllm.Server{Model: c.model, Flags: c.flags, Port: 1}
		s.Tune(c.memory)
		line := s.CommandLine()
		at := slices.Index(line, "--compilation-config")
		if at >= 0 != c.want || c.want && (line[at+1] != s.Shown()[len(s.Shown())-1] || !strings.HasSuffix(line[at+1], ",1920,2048]}") || !strings.Contains(line[at+1], "[1,2,4,8,16,24,32,40,48,56,64,80,96,")) {
			t.Errorf("%+v: %q", c, line)
		}
	}
}

// TestGraphs: what the largest graph holds is read from the log; a server that does not start with ours is started without.
func TestGraphs(t *testing.T) {
	says, err := filepath.Abs("testdata/reasons/cache.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		plan   string
		flags  vllm.Flags
		graphs int64
		starts int
	}{
		{"serve", nil, 2048, 1}, {"only-with-our-graphs " + says, nil, 512, 2}, {"serve", vllm.Flags{"--enforce-eager"}, -1, 1},
		{"serve", vllm.Flags{"--max-num-seqs", "8", "--speculative-config", "{}"}, -1, 1},
	} {
		r := newRig(t, c.plan)
		r.Flags, r.Restarts = c.flags, 0
		r.Tune(h100)
		r.start().up(c.starts)
		if n, ours := r.Graphs(), slices.Contains(r.Shown(), "--compilation-config"); n != c.graphs || ours != (n == 2048) || len(r.lives()) != c.starts {
			t.Errorf("%+v: graphs of %d tokens, shown %q, %d starts", c, n, r.Shown(), len(r.lives()))
		}
		r.stop()
	}
}

// TestPlainer: a model that is not there is not tried twice.
func TestPlainer(t *testing.T) {
	says, err := filepath.Abs("testdata/reasons/model-no-folder.txt")
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, "says "+says)
	r.Tune(h100)
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
