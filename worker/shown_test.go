package worker

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"millrace/proto"
	"millrace/worker/load"
)

// smi puts a program that does so into PATH as nvidia-smi.
func smi(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "nvidia-smi"), []byte("#!/bin/sh\n"+script), 0o755))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

const twoGPUs = `cat <<END
0, GPU-aa11-22, NVIDIA H100 80GB HBM3, 71680, 81559, 612.25, 98
1, GPU-bb33-44, NVIDIA H100 80GB HBM3, 5, 81559, [N/A], [Not Supported]
END
`

func TestGPUs(t *testing.T) {
	smi(t, `[ "$1 $2" = "--query-gpu=index,uuid,name,memory.used,memory.total,power.draw,utilization.gpu --format=csv,noheader,nounits" ] || exit 6`+"\n"+twoGPUs)
	g := new(GPUs)
	if g.now() != nil {
		t.Error("it knows before it looked")
	}
	must(t, g.look(t.Context()))
	want := []proto.GPU{
		{Index: "0", UUID: "GPU-aa11-22", Name: "NVIDIA H100 80GB HBM3", MemoryUsed: 71680 << 20, MemoryTotal: 81559 << 20, Power: 612.25, Utilization: 0.98},
		{Index: "1", UUID: "GPU-bb33-44", Name: "NVIDIA H100 80GB HBM3", MemoryUsed: 5 << 20, MemoryTotal: 81559 << 20, Power: -1, Utilization: -1},
	}
	if got := g.now(); !slices.Equal(got, want) {
		t.Errorf("%+v\nwant\n%+v", got, want)
	}
	if n := testutil.CollectAndCount(g); n != 6 { // what is not known has no sample
		t.Errorf("%d samples", n)
	}
	for _, c := range []struct{ devices, want string }{{"", ""}, {"1", "1"}, {"GPU-aa", "0"}, {"1,GPU-aa11-22", "01"}, {"7", ""}, {"GP", ""}} {
		got := ""
		for _, v := range among(want, strings.Split(c.devices, ",")) {
			got += v.Index
		}
		if got != c.want {
			t.Errorf("devices %s are %q, want %q", c.devices, got, c.want)
		}
	}
	g.at = g.at.Add(-gpuStale)
	if g.now() != nil {
		t.Error("it tells what is old")
	}
}

// TestNoGPUs: a machine without nvidia-smi is asked once, a program that fails or hangs is tried again.
func TestNoGPUs(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	new(GPUs).watch(t.Context(), nil) // returns
	smi(t, "echo 'Failed to initialize NVML'; exit 9\n")
	if err := new(GPUs).look(t.Context()); err == nil || errors.Is(err, errNoSMI) {
		t.Error(err)
	}
	up := filepath.Join(t.TempDir(), "up")
	must(t, syscall.Mkfifo(up, 0o600))
	smi(t, "echo >"+up+"; exec /bin/sleep 1000\n")
	ctx, cancel := context.WithCancelCause(t.Context())
	over := make(chan error, 1)
	go func() { over <- new(GPUs).look(ctx) }()
	_, err := os.ReadFile(up) // it runs
	must(t, err)
	cancel(errStopped)
	if err := <-over; !errors.Is(err, errStopped) {
		t.Error(err)
	}
}

// TestGPUsHang: while a run that cannot be killed lasts, no other is started.
func TestGPUsHang(t *testing.T) {
	smi(t, "exit 7\n")
	synctest.Test(t, func(t *testing.T) {
		var ran atomic.Int64
		release := make(chan struct{})
		g := &GPUs{smi: func(context.Context, string) ([]byte, error) {
			ran.Add(1)
			<-release
			return []byte("0, GPU-1, H100, 1, 2, 3, 4\n"), nil
		}}
		if err := g.look(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		for range 3 {
			if err := g.look(t.Context()); !errors.Is(err, errHangs) {
				t.Error(err)
			}
		}
		if n := ran.Load(); n != 1 {
			t.Errorf("it was run %d times while it hung", n)
		}
		close(release)
		synctest.Wait()
		must(t, g.look(t.Context()))
		if len(g.now()) != 1 || ran.Load() != 2 {
			t.Errorf("%+v after %d runs", g.now(), ran.Load())
		}
	})
}

func TestHere(t *testing.T) {
	for engine, want := range map[string]bool{"http://127.0.0.1:8000": true, "http://localhost": true, "https://[::1]:1/x": true, "http://127.9.9.9:1": true,
		"http://10.0.0.1:8000": false, "http://gpu1:8000": false, "null:": false, "": false} {
		if here(engine) != want {
			t.Errorf("%s is here: %v", engine, !want)
		}
	}
}

func TestSettings(t *testing.T) {
	for name, want := range map[string]string{
		"metrics-vllm-0.26.0-python.txt": "block_size=16 cache_dtype=auto enable_prefix_caching=True gpu_memory_utilization=0.92 kv_cache_max_concurrency=1004.1171875",
		"metrics-vllm-0.26.0-rust.txt":   "",
		"metrics-vllm-0.32.0-cpu.txt":    "block_size=128 cache_dtype=auto enable_prefix_caching=True gpu_memory_utilization=0.92 kv_cache_max_concurrency=512.0",
	} {
		b, err := os.ReadFile("../testdata/vllm/" + name)
		must(t, err)
		if got := strings.Join(load.ReadSettings(b), " "); got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// TestMeter: a rate is the engine's while it counts, and else that of its answers; what is not known is not told.
func TestMeter(t *testing.T) {
	var m meter
	now := time.Now()
	is := func(what string, rate float64, of string, pressure float64, known bool) {
		t.Helper()
		r, whose := m.rate(now)
		p, k := m.pressure(now)
		if r != rate || whose != of || p != pressure || k != known {
			t.Errorf("%s: %v %q, %v %v; want %v %q, %v %v", what, r, whose, p, k, rate, of, pressure, known)
		}
	}
	look := func(after time.Duration, g load.Gauges) {
		now = now.Add(after)
		m.look(g, now)
	}
	is("nothing", 0, "", 0, false)
	look(0, load.Gauges{Known: true, Generation: 1e6, Preemptions: 50})
	is("one look", 0, "", 0, false)
	m.answered(proto.Usage{Counted: true, Completion: 10})
	m.answered(proto.Usage{Counted: true, Completion: 10})
	look(10*time.Second, load.Gauges{Known: true, Generation: 1e6 + 1000, Preemptions: 53, KVUsage: 0.5})
	is("two looks", 100, proto.RateEngine, 1.5, true)
	look(100*time.Millisecond, load.Gauges{Known: true, Generation: 1e6 + 1010, Preemptions: 53}) // close to the last: the first stays
	is("close looks", 100, proto.RateEngine, 1.5, true)
	look(10*time.Second, load.Gauges{Known: true, Generation: 11, Preemptions: 1}) // it started anew
	is("an engine that started anew", 1021/20.1, proto.RateEngine, 2, true)
	if n, known := m.preempted(); n != 4 || !known {
		t.Errorf("%d pre-emptions", n)
	}
	if g := m.gauges(now.Add(rateWindow + 1)); g.Known {
		t.Error("gauges of an engine that was not seen of late are told")
	}
	m.answered(proto.Usage{Counted: true, Completion: 10})
	look(time.Second, load.Gauges{})
	is("its metrics are gone", 0, "", 0, false)
	look(5*time.Second, load.Gauges{})
	is("no answer", 0, proto.RateAnswers, 0, false)
	m.answered(proto.Usage{})
	look(time.Second, load.Gauges{})
	is("answers that tell no tokens", 0, "", 0, false)
	m.answered(proto.Usage{Counted: true, Completion: 80})
	look(2*time.Second, load.Gauges{})
	is("answers that do", 10, proto.RateAnswers, 0, false)
	now = now.Add(rateWindow + 1)
	is("not seen of late", 0, "", 0, false)
	look(0, load.Gauges{})
	m.answered(proto.Usage{Counted: true, Completion: 30})
	look(2*time.Second, load.Gauges{})
	is("it is back", 15, proto.RateAnswers, 0, false)
	for range 1000 {
		look(2*time.Second, load.Gauges{})
	}
	if n := len(m.looks); n > 200 {
		t.Errorf("%d looks are kept", n)
	}
}

func TestFullness(t *testing.T) {
	var f fullness
	now := time.Now()
	for _, c := range []struct {
		after           time.Duration
		inFlight, limit int
		total           time.Duration
	}{{0, 94, 100, 0}, {10, 95, 100, 0}, {10, 100, 100, 10}, {10, 96, 100, 20}, {10, 94, 100, 30}, {10, 94, 100, 30}, {0, 94, 80, 30}, {5, 94, 0, 35}, {5, 0, 0, 35}} {
		now = now.Add(c.after)
		f.see(now, c.inFlight, c.limit)
		if f.upTo(now) != c.total {
			t.Errorf("%+v: %d", c, f.upTo(now))
		}
	}
}

// TestSeen: what an operator sees of a worker in its heartbeat, its metrics and its results.
func TestSeen(t *testing.T) {
	smi(t, twoGPUs)
	r, f, reg := newRig(t), newFake(t), prometheus.NewPedanticRegistry()
	metrics := func(text string) { f.set(func() { f.metrics = text }) }
	metrics("vllm:num_requests_running{} 3\nvllm:kv_cache_usage_perc{} 0.25\nvllm:num_preemptions_total{} 7\nvllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"1000\"} 1\n")
	release := make(chan struct{})
	f.set(func() {
		f.work = func(w http.ResponseWriter, r *http.Request, body string) {
			<-release
			if strings.Contains(body, `"content":"11"`) {
				say(w, 400, `{"error":{"message":"not so"}}`)
				return
			}
			say(w, 200, okBody)
		}
	})
	r.send(requests(12)...)
	r.start(f.engine(), func(w *Worker) {
		w.Concurrency, w.Registry, w.GPUs, w.Devices = 4, reg, new(GPUs), []string{"1"}
	})
	f.enter(4)
	r.until("GPUs are seen", func() bool { return value(t, reg, "millrace_gpu_memory_total_bytes") == 2*81559<<20 })
	r.until("it is full", func() bool { return value(t, reg, "millrace_inflight_full_seconds_total") > 0 })
	metrics("vllm:num_requests_running{} 3\nvllm:kv_cache_usage_perc{} 0.5\nvllm:num_preemptions_total{} 10\n")
	r.until("pre-emptions are seen", func() bool {
		return slices.ContainsFunc(r.workers(), func(w *proto.Worker) bool { return w.Preemptions == 3 })
	})
	for name, want := range map[string]float64{"millrace_inflight_requests": 4, "millrace_inflight_limit": 4, "millrace_engine_kv_usage_ratio": 0.5,
		"millrace_gpu_power_watts": 612.25, "millrace_engine_state": 1} {
		if got := value(t, reg, name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	close(release)
	got := exactly(t, r.wait(12), 12)
	r.until("the failure is told", func() bool {
		return slices.ContainsFunc(r.workers(), func(w *proto.Worker) bool { return w.LastError == "HTTP 400: not so" && w.LastErrorUS >= 0 })
	})
	r.until("pre-emptions per line are told", func() bool { return value(t, reg, "millrace_preemptions_per_line") == 3./11 })
	w := r.state(proto.EngineReady)
	if !w.Metered || w.KVUsage != 0.5 || w.RateOf != proto.RateEngine || !w.OwnGPUs || len(w.GPUs) != 1 || w.GPUs[0].UUID != "GPU-bb33-44" {
		t.Errorf("%+v", w)
	}
	last := &proto.Result{}
	for _, res := range got {
		if p := res.Pace; p.Limit != 4 || !p.Metered || p.After != 3 || p.Before != 0 && p.Before != 3 {
			t.Errorf("%d: %+v", res.Index, p)
		}
		if res.StartUS > last.StartUS {
			last = res
		}
	}
	if last.Pace.FullUS <= 0 || last.Pace.FullUS > last.StartUS || last.Pace.Before != 3 {
		t.Errorf("of the last: %+v, started at %d", last.Pace, last.StartUS)
	}
	problems, err := testutil.GatherAndLint(reg)
	must(t, err)
	if len(problems) > 0 {
		t.Error(problems)
	}
}
