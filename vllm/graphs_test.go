package vllm_test

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"millrace/vllm"
)

const h100 = 81559 << 20 // bytes

func card() vllm.Card { return vllm.Card{Memory: h100} }

// TestGraphs: what the largest graph holds is read from the log; a server that does not start with ours is started without.
func TestGraphs(t *testing.T) {
	unknown := logged(t, "vllm: error: unrecognized arguments: --compilation-config {}")
	for _, c := range []struct {
		plan   string
		flags  vllm.Flags
		graphs int64
		starts int
	}{
		{"serve", nil, 2048, 1}, {"not-with-our-graphs " + recorded(t, "cache.txt"), nil, 512, 2}, {"not-with-our-graphs " + unknown, nil, 512, 2}, {"serve", vllm.Flags{"--enforce-eager"}, -1, 1},
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

// TestPlainer: a model that is not there, or a flag of the user that vLLM does not take, is not tried twice, by one of several on a
// card neither.
func TestPlainer(t *testing.T) {
	for _, name := range []string{"model-no-folder.txt", "flag-unknown.txt"} {
		says := recorded(t, name)
		r := newRig(t, "says "+says)
		r.Flags = random
		r.Tune(card)
		for _, r := range append(mates(t, []string{"says " + says}, []string{"says " + says}), r) {
			if f := r.start().fails(); !f.Final || len(r.lives()) != 1 {
				t.Errorf("%s: %+v, %d starts", name, f, len(r.lives()))
			}
		}
	}
}

// TestPlainerCounts: a start without our flags is one of those that are said when the server is given up.
func TestPlainerCounts(t *testing.T) {
	r := newRig(t, "fails")
	r.Flags = random
	r.Tune(card)
	f := r.start().fails()
	if n, _ := r.Again(); n != 3 || len(r.lives()) != 4 || !strings.HasSuffix(f.Why, "it was started again 3 times and is given up") {
		t.Errorf("%d, %d starts: %s", n, len(r.lives()), f.Why)
	}
}

// TestPlainerCame: flags that a server came up with once are kept, whatever it ends of later.
func TestPlainerCame(t *testing.T) {
	r := newRig(t, "serve", "fails", "serve")
	r.Flags = random
	r.Tune(card)
	kill(t, r.start().up(1).api, syscall.SIGKILL)
	r.up(3)
	if r.Sequences() != 2048 || !slices.Contains(r.Shown(), "--compilation-config") {
		t.Errorf("%d sequences, shown %q", r.Sequences(), r.Shown())
	}
}

// TestPlainerSays: what is given up is said by name.
func TestPlainerSays(t *testing.T) {
	says := recorded(t, "cache.txt")
	for _, c := range []struct {
		flags vllm.Flags
		want  string
	}{{vllm.Flags{"--max-num-seqs", "8"}, "(--compilation-config)"}, {nil, "(--compilation-config, --max-num-seqs 2048, --max-num-batched-tokens 16384)"},
		{vllm.Flags{"--enforce-eager"}, "(--max-num-seqs 2048, --max-num-batched-tokens 16384)"}} {
		r := newRig(t, "not-with-our-graphs "+says)
		r.Flags, r.Restarts = append(c.flags, random...), 0
		r.Tune(card)
		r.start().up(2)
		if want := "it is tried without what millrace asked for by itself " + c.want; !strings.Contains(r.said.String(), want) {
			t.Errorf("%+v: %q is not in %s", c, want, r.said)
		}
		r.stop()
	}
}

// TestCards: the memory is that of the smallest of the GPUs that are asked for.
func TestCards(t *testing.T) {
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	if got := vllm.Cards(nil); got != (vllm.Card{}) {
		t.Errorf("%+v, without nvidia-smi", got)
	}
	script := `#!/bin/sh
case "$*" in
"--query-gpu=memory.total,compute_mode,mig.mode.current,name --format=csv,noheader,nounits") echo '81559, Default, Disabled, NVIDIA H100 80GB HBM3'; echo '24576, Default, [N/A], NVIDIA L4' ;;
"--query-gpu=memory.total,compute_mode,mig.mode.current,name --format=csv,noheader,nounits -i 0,GPU-2") echo '81559, Default, Disabled, NVIDIA H100 80GB HBM3'; echo '143771, Default, Disabled, NVIDIA H200' ;;
*"-i 3") echo '81920, Default, Disabled, NVIDIA A100-SXM4-80GB' ;;
*"-i 4") echo '81559, Exclusive_Process, Disabled, NVIDIA H100 80GB HBM3' ;;
*"-i 5") echo '81559, [N/A], [N/A], NVIDIA H100 80GB HBM3' ;;
*"-i 6") echo '81559, Default, Enabled, NVIDIA H100 80GB HBM3' ;;
*"-i 7") echo '81559, NVIDIA H100 80GB HBM3' ;;
*) echo '[N/A]' ;;
esac
`
	if err := os.WriteFile(filepath.Join(bin, "nvidia-smi"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		ids  []string
		want vllm.Card
	}{{nil, vllm.Card{Memory: 24576 << 20, Count: 2}}, {[]string{"0", "GPU-2"}, vllm.Card{Memory: 81559 << 20, Count: 2}}, {[]string{"3"}, vllm.Card{Memory: 81920 << 20, Count: 1, A100: true}},
		{[]string{"4"}, vllm.Card{Memory: 81559 << 20, Count: 1, Alone: true}}, {[]string{"5"}, vllm.Card{Memory: 81559 << 20, Count: 1, Alone: true}}, {[]string{"6"}, vllm.Card{}}, {[]string{"7"}, vllm.Card{}}, {[]string{"MIG-1"}, vllm.Card{}}} {
		if got := vllm.Cards(c.ids); got != c.want {
			t.Errorf("%q: %+v, want %+v", c.ids, got, c.want)
		}
	}
}
