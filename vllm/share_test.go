package vllm_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"millrace/proto"
	"millrace/vllm"
)

// TestPerCard: a very small model gets two servers on a card, where there are cores and lines for them, the card takes both, and
// nothing says that one is to have it alone.
func TestPerCard(t *testing.T) {
	tiny, small, part := t.TempDir(), t.TempDir(), t.TempDir()
	weigh(t, tiny, 2)
	weigh(t, small, 4)
	weigh(t, part, 1) // of 16
	if err := os.WriteFile(filepath.Join(part, "model.safetensors.index.json"), []byte(`{"metadata": {"total_size": 17179869184}, "weight_map": {}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	sees, hears, reads, packs, hub := t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir()
	t.Setenv("HF_HUB_CACHE", hub)
	seer, reader := filepath.Join(hub, "models--a--seer", "snapshots", "1f"), filepath.Join(hub, "models--a--reader", "snapshots", "1f")
	for dir, config := range map[string]string{sees: `{"vision_config": {}}`, seer: `{"vision_config": {}}`, hears: `{"thinker_config": {"audio_config": {}}}`, packs: `{"quantization_config": {"bits": 4}}`, reads: `{"vocab_size": 1}`, reader: `{}`} {
		weigh(t, dir, 2)
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	big := vllm.Card{Memory: h100}
	for _, c := range []struct {
		model string
		card  vllm.Card
		cores int
		lines int64
		flags vllm.Flags
		want  int
	}{
		{tiny, big, 6, 0, nil, 2}, {tiny, big, 5, 0, nil, 1}, {tiny, big, 16, 2000, nil, 2}, {tiny, big, 16, 1999, nil, 1}, {tiny, big, 16, 0, vllm.Flags{"--enforce-eager", "--max-model-len", "4096"}, 2},
		{small, big, 16, 0, nil, 1}, {small, vllm.Card{Memory: 141 << 30}, 16, 0, nil, 2}, {tiny, vllm.Card{Memory: 64 << 30}, 16, 0, nil, 1}, {tiny, vllm.Card{}, 16, 0, nil, 1},
		{tiny, vllm.Card{Memory: h100, A100: true}, 16, 0, nil, 1}, {tiny, vllm.Card{Memory: h100, Alone: true}, 16, 0, nil, 1}, {t.TempDir(), big, 16, 0, nil, 1},
		{tiny, big, 16, 0, vllm.Flags{"--api_server_count=1"}, 1}, {tiny, big, 16, 0, vllm.Flags{"-asc", "4"}, 1}, {tiny, big, 16, 0, vllm.Flags{"--data-parallel-size", "1"}, 1},
		{tiny, big, 16, 0, vllm.Flags{"-tp", "2"}, 1}, {tiny, big, 16, 0, vllm.Flags{"-tp", "two"}, 1}, {tiny, big, 16, 0, vllm.Flags{"--enable-lora"}, 1}, {tiny, big, 16, 0, vllm.Flags{"--mm-processor-cache-type", "shm"}, 1},
		{tiny, big, 16, 0, vllm.Flags{"--gpu_memory_utilization", "0.5"}, 1}, {tiny, big, 16, 0, vllm.Flags{"--gpu-mem=0.5"}, 1}, {tiny, big, 16, 0, vllm.Flags{"--kv-cache-memory-bytes", "1G"}, 1},
		{tiny, big, 16, 0, vllm.Flags{"--kv-cache-dtype", "fp8"}, 2}, {tiny, big, 16, 0, vllm.Flags{"--max-num-seqs", "64"}, 1}, {tiny, big, 16, 0, vllm.Flags{"--port", "8000"}, 1}, {tiny, big, 16, 0, vllm.Flags{"-sc", "{}"}, 1},
		{sees, big, 16, 0, nil, 1}, {hears, big, 16, 0, nil, 1}, {reads, big, 16, 0, nil, 2}, {"a/seer", big, 16, 0, nil, 1}, {"a/reader", big, 16, 0, nil, 2},
		{sees, big, 16, 0, random, 1}, {t.TempDir(), big, 16, 0, random, 1}, {tiny, big, 16, 0, random, 2}, {packs, big, 16, 0, nil, 1}, {part, big, 16, 0, nil, 1},
		{filepath.Join(tiny, "model-1.safetensors"), big, 16, 0, nil, 1}, {tiny, vllm.Card{Memory: h100, Count: 2}, 12, 0, nil, 2}, {tiny, vllm.Card{Memory: h100, Count: 2}, 11, 0, nil, 1},
	} {
		s := &vllm.Server{Model: c.model, Flags: c.flags}
		if got := s.PerCard(func() vllm.Card { return c.card }, 1, c.cores, c.lines); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
	for _, flag := range []string{"--num-gpu-blocks-override=8", "--kv-transfer-config={}", "--kv-events-config={}", "--kv-offloading-size=1", "--ec-transfer-config={}", "--weight-transfer-config={}", "--cpu-offload-gb=1", "--offload-group-size=1", "--enable-sleep-mode", "--enable-elastic-ep", "--enable-fault-tolerance", "--device=cuda", "-q=awq", "--quantization=fp8"} {
		s := &vllm.Server{Model: tiny, Flags: vllm.Flags{flag}}
		if got := s.PerCard(card, 1, 16, 0); got != 1 {
			t.Errorf("%s: %d", flag, got)
		}
	}
	for _, c := range []struct {
		cards, cores int
		lines        int64
		want         int
	}{{1, 6, 2000, 2}, {2, 12, 4000, 2}, {2, 11, 4000, 1}, {2, 12, 3999, 1}} { // cards that are its own
		s := &vllm.Server{Model: tiny, GPUs: []string{"0"}}
		if got := s.PerCard(func() vllm.Card { return vllm.Card{Memory: h100, Count: 4} }, c.cards, c.cores, c.lines); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

// mates are two servers of one card.
func mates(t *testing.T, plans ...[]string) (rs []*rig) {
	t.Helper()
	both := vllm.NewMates(2)
	for _, p := range plans {
		r := newRig(t, p...)
		r.Flags, r.Mates = append(vllm.Flags{"--enforce-eager"}, random...), both
		r.Tune(card)
		if !shares(r) || r.Sequences() != 1024 {
			t.Fatalf("%q, %d sequences", r.Shown(), r.Sequences())
		}
		rs = append(rs, r)
	}
	return rs
}

// shares says whether a server has the flags of one of two.
func shares(r *rig) bool {
	return strings.Contains(strings.Join(r.Shown(), " "), " --gpu-memory-utilization 0.45 --kv-cache-memory-bytes 25656242995 --max-num-seqs 1024 --max-num-batched-tokens 16384")
}

// alone says whether it has those of one that has its card alone.
func alone(r *rig) bool {
	return strings.HasSuffix(strings.Join(r.Shown(), " "), " dummy --max-num-seqs 2048 --max-num-batched-tokens 16384")
}

// goes waits until a server leaves its card to the other.
func goes(t *testing.T, r *rig, starts int, want string) {
	t.Helper()
	so := "and nothing has to be done"
	if want == fullBeside {
		so = "until millrace is started again"
	}
	if f := r.fails(); f.Final || !strings.HasPrefix(f.Why, want) || !strings.HasSuffix(f.Why, "; it leaves the GPU to that one, "+so) || len(r.lives()) != starts {
		t.Errorf("%+v, %d starts", f, len(r.lives()))
	}
	if state, why := r.State(); state != proto.EngineDegraded || !strings.Contains(why, "leaves the GPU") {
		t.Errorf("it is %s: %s", state, why)
	}
}

const (
	beside     = " beside the other one on its GPU, with --gpu-memory-utilization 0.45, --kv-cache-memory-bytes 25656242995: "
	notBeside  = "engine does not start" + beside
	fullBeside = "engine runs out of memory" + beside + "the GPU's memory is full"
)

// recorded is the file with a log of testdata/reasons.
func recorded(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs("testdata/reasons/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// logged is a file with the last lines of a log.
func logged(t *testing.T, lines string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte(lines+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestMates: of two servers on a card one that does not start leaves it to the other: at once where that is what will be said again,
// else at the second time. The last has all of it, and goes without our own flags only then.
func TestMates(t *testing.T) {
	says := func(text string) string { return "says " + logged(t, text) }
	full := logged(t, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
	t.Run("OtherIsUp", func(t *testing.T) {
		rs := mates(t, []string{"not-beside " + recorded(t, "cache.txt")}, []string{"serve", "serve", "says " + recorded(t, "cache.txt"), "serve"})
		rs[1].start().up(1)
		goes(t, rs[0].start(), 1, notBeside+"the model leaves no GPU memory for the KV cache")
		if !shares(rs[1]) {
			t.Errorf("the other one has %q", rs[1].Shown())
		}
		kill(t, rs[1].lives()[0].api, syscall.SIGKILL)
		if rs[1].up(2); !alone(rs[1]) {
			t.Errorf("later the other one has %q", rs[1].Shown())
		}
		kill(t, rs[1].lives()[1].api, syscall.SIGKILL)
		if rs[1].up(4); !alone(rs[1]) { // it came up with all of it
			t.Errorf("at last the other one has %q", rs[1].Shown())
		}
	})
	for name, c := range map[string]struct {
		plan string
		back bool
	}{
		"InUse":  {says("ValueError: Free memory on device cuda:0 (60.1/79.2 GiB) on startup is less than desired GPU memory utilization (0.92, 72.8 GiB)."), true}, // somebody else has what the other one left
		"Killed": {"killed", true},
		"Disk":   {says("OSError: [Errno 28] No space left on device"), false},
		"Port":   {says("OSError: [Errno 98] error while attempting to bind on address ('127.0.0.1', 8000): address already in use"), false},
	} {
		t.Run("BackToItsPart"+name, func(t *testing.T) {
			rs := mates(t, []string{"not-beside " + recorded(t, "cache.txt")}, []string{"serve", c.plan, "serve"})
			first := rs[1].start().up(1).api
			goes(t, rs[0].start(), 1, notBeside)
			kill(t, first, syscall.SIGKILL)
			if rs[1].up(3); shares(rs[1]) != c.back || alone(rs[1]) == c.back {
				t.Errorf("later the other one has %q", rs[1].Shown())
			}
		})
	}
	t.Run("OnceIsNotEnough", func(t *testing.T) { // the port has nothing to do with the card
		rs := mates(t, []string{says("OSError: [Errno 98] error while attempting to bind on address"), "fails", "serve"}, []string{"serve"})
		rs[1].start().up(1)
		if rs[0].start().up(3); !shares(rs[0]) || !shares(rs[1]) {
			t.Errorf("%q, %q", rs[0].Shown(), rs[1].Shown())
		}
	})
	t.Run("Twice", func(t *testing.T) {
		rs := mates(t, []string{"fails"}, []string{"serve"})
		goes(t, rs[0].start(), 2, notBeside+"its process ended")
	})
	t.Run("MemoryInUse", func(t *testing.T) {
		rs := mates(t, []string{says("ValueError: Free memory on device cuda:0 (30.1/79.2 GiB) on startup is less than desired GPU memory utilization (0.45, 35.6 GiB).")}, []string{"serve"})
		goes(t, rs[0].start(), 2, notBeside+"other programs have the GPU's memory")
	})
	t.Run("Both", func(t *testing.T) { // at the same time
		rs := mates(t, []string{"not-beside " + recorded(t, "cache.txt")}, []string{"not-beside " + recorded(t, "cache.txt")})
		for _, r := range rs {
			r.Restarts = 0
			r.start()
		}
		last := rs[1]
		select {
		case <-rs[0].over:
			goes(t, rs[0], 1, notBeside)
		case <-rs[1].over:
			goes(t, rs[1], 1, notBeside)
			last = rs[0]
		}
		if last.up(2); !alone(last) {
			t.Errorf("the last one has %q", last.Shown())
		}
	})
	t.Run("LastGoesWithout", func(t *testing.T) {
		rs := mates(t, []string{"not-with-our-graphs " + recorded(t, "cache.txt")}, []string{"not-with-our-graphs " + recorded(t, "cache.txt")})
		goes(t, rs[0].start(), 1, notBeside)
		rs[1].Restarts = 0
		if rs[1].start().up(2); !slices.Equal(rs[1].Shown(), rs[1].Flags) {
			t.Errorf("the last one has %q", rs[1].Shown())
		}
	})
	t.Run("OtherGivenUp", func(t *testing.T) {
		rs := mates(t, []string{"killed"}, []string{"not-beside " + recorded(t, "cache.txt")})
		rs[0].Restarts = 1
		if f := rs[0].start().fails(); strings.Contains(f.Why, "leaves the GPU") {
			t.Errorf("%+v", f)
		}
		if rs[1].start().up(1); !alone(rs[1]) || len(rs[1].lives()) != 1 {
			t.Errorf("the last one has %q, %d starts", rs[1].Shown(), len(rs[1].lives()))
		}
	})
	t.Run("OutOfMemory", func(t *testing.T) { // while it answers, twice
		rs := mates(t, []string{"fails", "full " + full}, []string{"serve"})
		rs[0].start().up(2)
		rs[0].write("full2", "")
		if rs[0].up(3); !shares(rs[0]) {
			t.Errorf("after one %q", rs[0].Shown())
		}
		rs[0].write("full3", "")
		goes(t, rs[0], 3, fullBeside)
	})
	t.Run("OutOfMemoryLater", func(t *testing.T) {
		rs := mates(t, []string{"serve", "says " + full}, []string{"serve"})
		kill(t, rs[0].start().up(1).api, syscall.SIGKILL)
		goes(t, rs[0], 3, fullBeside)
	})
	if (&vllm.Server{Port: 1}).BackWherePortTaken() {
		t.Error("back to its part where its port is taken")
	}
	if vllm.NewMates(1) != nil {
		t.Error("one server has a mate")
	}
}
