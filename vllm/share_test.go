package vllm_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"millrace/proto"
	"millrace/vllm"
)

// TestPerCard: a very small model gets two servers on a card, where there are cores and lines for them, the card takes both, and
// nothing says that one is to have it alone.
func TestPerCard(t *testing.T) {
	tiny, small := t.TempDir(), t.TempDir()
	weigh(t, tiny, 2)
	weigh(t, small, 4)
	sees, hears, reads, hub := t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir()
	t.Setenv("HF_HUB_CACHE", hub)
	seer, reader := filepath.Join(hub, "models--a--seer", "snapshots", "1f"), filepath.Join(hub, "models--a--reader", "snapshots", "1f")
	for dir, config := range map[string]string{sees: `{"vision_config": {}}`, seer: `{"vision_config": {}}`, hears: `{"thinker_config": {"audio_config": {}}}`, reads: `{"vocab_size": 1}`, reader: `{}`} {
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
		{sees, big, 16, 0, random, 1}, {t.TempDir(), big, 16, 0, random, 2},
	} {
		s := &vllm.Server{Model: c.model, Flags: c.flags}
		if got := s.PerCard(func() vllm.Card { return c.card }, c.cores, c.lines); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

// TestMates: servers of one card have a part of its memory each. One that does not come up with that leaves it to the other, and the
// last is started without.
func TestMates(t *testing.T) {
	says, err := filepath.Abs("testdata/reasons/cache.txt")
	if err != nil {
		t.Fatal(err)
	}
	shares := func(r *rig) bool {
		return strings.Contains(strings.Join(r.Shown(), " "), "--gpu-memory-utilization 0.45 --kv-cache-memory-bytes 29932283494 ")
	}
	two := func(plans ...string) (rs []*rig) {
		mates := vllm.NewMates(2)
		for _, p := range plans {
			r := newRig(t, p)
			r.Flags, r.Mates = random, mates
			r.Tune(card)
			if !shares(r) || r.Sequences() != 1024 {
				t.Fatalf("%q, %d sequences", r.Shown(), r.Sequences())
			}
			rs = append(rs, r)
		}
		return rs
	}
	aside := func(r *rig) {
		if f := r.start().fails(); f.Final || !strings.HasSuffix(f.Why, "; it leaves its GPU to the other server there") || len(r.lives()) != 1 {
			t.Errorf("%+v, %d starts", f, len(r.lives()))
		}
		if state, why := r.State(); state != proto.EngineDegraded || !strings.Contains(why, "leaves its GPU") {
			t.Errorf("it is %s: %s", state, why)
		}
	}
	rs := two("not-with-our-graphs "+says, "serve")
	aside(rs[0])
	if rs[1].start().up(1); !shares(rs[1]) {
		t.Errorf("the other one has %q", rs[1].Shown())
	}
	rs = two("not-with-our-graphs "+says, "not-with-our-graphs "+says)
	aside(rs[0])
	if rs[1].start().up(2); !slices.Equal(rs[1].Shown(), random) {
		t.Errorf("the last one has %q", rs[1].Shown())
	}
	if vllm.NewMates(1) != nil {
		t.Error("one server has a mate")
	}
}
