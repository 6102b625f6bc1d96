//go:build vllm && linux

package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/go-json-experiment/json"

	"millrace/aggregator"
)

// hosted is the main job on a real vLLM that `millrace run --vllm` starts itself.
type hosted struct {
	*realRun
	groups []int // of its engines so far
}

func newHosted(t *testing.T, more ...string) *hosted {
	t.Helper()
	tmp, err := os.MkdirTemp("", "vllm") // short: the names of sockets are made of it
	if err != nil {
		t.Fatal(err)
	}
	h := &hosted{realRun: &realRun{fleet: newFleet(t), metrics: freePort(t)}}
	h.input, h.want = realJob(t)
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(h.path("data", "vllm", "1", "engine.log")) // it may not have come so far
			t.Logf("the engine said at last:\n%s", b[max(0, len(b)-8000):])
		}
		for _, g := range h.groups {
			_ = syscall.Kill(-g, syscall.SIGKILL) // of a test that failed
		}
		if err := os.RemoveAll(tmp); err != nil {
			t.Error(err)
		}
	})
	home, err := filepath.Abs(vllmHome)
	if err != nil {
		t.Fatal(err)
	}
	h.env = append(h.env, "TMPDIR="+tmp, "HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1", "DO_NOT_TRACK=1", "VLLM_CPU_OMP_THREADS_BIND=nobind",
		"OMP_NUM_THREADS=1", "TORCHDYNAMO_DISABLE=1") // as testdata/vllm-cpu/serve.sh says why
	base := h.path("results")
	h.files = aggregator.Files{Output: base + ".jsonl", Errors: base + ".errors.jsonl", Manifest: base + ".manifest.json"}
	args := append([]string{"run", h.input, "--data", h.path("data"), "-o", h.files.Output, "--metrics-addr", h.metrics, "--concurrency", "48",
		"--vllm", filepath.Join(home, "model"), "--vllm-command", filepath.Join(home, "venv", "bin", "vllm")}, more...)
	h.job = h.start("run", append(args, "--", "--served-model-name", "tiny", "--load-format", "dummy", "--dtype", "float32",
		"--max-model-len", "2048", "--enforce-eager", "--kv-cache-memory-bytes", "134217728", "--max-num-seqs", "64", "--disable-uvicorn-access-log")...)
	return h
}

// midway waits until so many lines are answered and others are in flight, and returns the group of the engine.
func (h *hosted) midway(ok int64) int {
	h.t.Helper()
	poll(h.t, "lines are answered and others are in flight", func() bool {
		select {
		case <-h.job.over:
			h.t.Fatalf("the job ended: %s", h.job.err)
		default:
		}
		w := h.worker()
		return w.sum("millrace_inflight_requests") >= 16 && w.sum("millrace_worker_requests_total", `outcome="ok"`) >= ok
	})
	var record struct {
		Group int `json:"group"`
	}
	b, err := os.ReadFile(h.path("data", "vllm", "1", "engine.json"))
	if err == nil {
		err = json.Unmarshal(b, &record)
	}
	if err != nil || record.Group <= 1 {
		h.t.Fatalf("no record of the engine: %s, %v", b, err)
	}
	h.groups = append(h.groups, record.Group)
	return record.Group
}

// member is a process of a group whose name begins so.
func member(t *testing.T, group int, name string) int {
	t.Helper()
	for _, p := range processes(t) {
		if p.group == group && strings.HasPrefix(p.name, name) {
			return p.id
		}
	}
	t.Fatalf("the engine has no %s in its group", name)
	return 0
}

// restarts waits until the engine was started again so often by that cause.
func (h *hosted) restarts(cause string, n int64) {
	h.t.Helper()
	poll(h.t, "the engine is started again", func() bool {
		return h.worker().sum("millrace_engine_restarts_total", `cause="`+cause+`"`) == n
	})
}

// none says that nothing of the engines is left.
func (h *hosted) none(groups ...int) {
	h.t.Helper()
	for _, p := range processes(h.t) {
		for _, g := range groups {
			if p.group == g {
				h.t.Errorf("%s (%d) of an engine lives", p.name, p.id)
			}
		}
	}
}

// audit waits for the end of the job and asks the oracle.
func (h *hosted) audit() {
	h.t.Helper()
	m := h.conserved()
	h.none(h.groups...)
	h.t.Logf("%d ok, %d failed, %.1f s; said:\n%s", m.Statistics.Completed, m.Statistics.Failed, m.Statistics.Duration, h.job.err)
}

// TestRealHost runs the main job on a real vLLM that is started, restarted and ended by `millrace run --vllm`.
func TestRealHost(t *testing.T) {
	t.Run("Lost", func(t *testing.T) { // the engine dies in three ways in one job
		h := newHosted(t, "--stall-timeout", "10s")
		first := h.midway(realLines / 10)
		send(t, member(t, first, "VLLM::EngineCor"), syscall.SIGKILL) // the kernel keeps 15 bytes of a name
		h.restarts("crashed", 1)
		h.none(first)
		second := h.midway(realLines * 3 / 10)
		send(t, second, syscall.SIGKILL) // the API server, which leads the group
		h.restarts("killed", 1)
		h.none(first, second)
		third := h.midway(realLines * 5 / 10)
		send(t, member(t, third, "VLLM::EngineCor"), syscall.SIGSTOP)
		h.restarts("hung", 1)
		h.none(first, second, third)
		h.audit()
	})
	t.Run("Stopped", func(t *testing.T) { // with work in flight, and continued
		h := newHosted(t)
		g := h.midway(realLines / 10)
		h.job.says("vLLM is starting") // what it does is said
		if code := h.job.term(); code != 128+int(syscall.SIGTERM) {
			t.Errorf("it ended with %d\n%s", code, h.job.err)
		}
		h.none(g)
	})
	t.Run("MillraceKilled", func(t *testing.T) {
		h := newHosted(t)
		g := h.midway(realLines / 10)
		h.job.kill()
		poll(t, "the engine of a millrace that was killed is gone", func() bool {
			for _, p := range processes(t) {
				if p.group == g {
					return false
				}
			}
			return true
		})
	})
}
