package worker

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"millrace/proto"
	"millrace/worker/load"
)

// engineOf answers GET requests with what stands there for their paths, and counts them.
type engineOf struct {
	mu    sync.Mutex
	say   map[string]string
	asked map[string]int
}

func (e *engineOf) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	body, ok := e.say[r.URL.Path]
	e.asked[r.URL.Path]++
	e.mu.Unlock()
	switch {
	case body == "hang":
		<-r.Context().Done()
	case body == "cut":
		panic(http.ErrAbortHandler)
	case body == "503":
		w.WriteHeader(http.StatusServiceUnavailable)
	case ok:
		say(w, 200, body)
	default:
		say(w, 404, `{"detail":"Not Found"}`)
	}
}

func (e *engineOf) change(path, body string) {
	e.mu.Lock()
	e.say[path] = body
	e.mu.Unlock()
}

func (e *engineOf) count(path string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.asked[path]
}

func newEngineOf(t *testing.T, say map[string]string) (*engineOf, *HTTP) {
	say["/v1/models"] = `{"data":[{"id":"m"}]}`
	e := &engineOf{say: say, asked: map[string]int{}}
	srv := httptest.NewServer(e)
	t.Cleanup(srv.Close)
	h, err := NewHTTP(srv.URL, "")
	must(t, err)
	t.Cleanup(h.Close)
	return e, h
}

// TestProfile: what the kinds of engines say of themselves, as their sources or recordings have it, is found.
func TestProfile(t *testing.T) {
	for _, c := range []struct {
		name string
		say  map[string]string
		want Status
	}{
		{"vLLM", map[string]string{"/health": "", "/version": `{"version":"0.32.0"}`, "/metrics": `vllm:cache_config_info{block_size="16",num_gpu_blocks="10"} 1.0`},
			Status{Engine: load.Engine{Kind: proto.KindVLLM, Version: "0.32.0", Gauges: load.Gauges{KVTokens: 160}}}},
		{"Rust frontend", map[string]string{"/health": "", "/version": `{"version":"0.26.0","rust_frontend_version":"0.1.0"}`}, Status{Engine: load.Engine{Kind: proto.KindVLLM, Version: "0.26.0"}}},
		{"SGLang", map[string]string{"/health": "", "/get_server_info": `{"version":"0.5.20","max_total_num_tokens":270336,"dp_size":8,"max_running_requests":null,
			"internal_states":[{"memory_usage":{"token_capacity":270336},"effective_max_running_requests_per_dp":2},{"effective_max_running_requests_per_dp":2}]}`},
			Status{Engine: load.Engine{Kind: proto.KindSGLang, Version: "0.5.20", Slots: 4, Gauges: load.Gauges{KVTokens: 8 * 270336}}}},
		{"SGLang, one engine", map[string]string{"/health": "", "/server_info": `{"version":"0.5.20","max_total_num_tokens":326223,"max_running_requests":48}`},
			Status{Engine: load.Engine{Kind: proto.KindSGLang, Version: "0.5.20", Slots: 48, Gauges: load.Gauges{KVTokens: 326223}}}},
		{"llama.cpp", map[string]string{"/health": `{"status":"ok"}`, "/props": `{"default_generation_settings":{"n_ctx":8192},"total_slots":4,"build_info":"b6700-abc"}`},
			Status{Engine: load.Engine{Kind: proto.KindLlama, Version: "b6700-abc", Slots: 4, MaxLen: 8192}}},
		{"Ollama", map[string]string{"/api/version": `{"version":"0.14.1"}`}, Status{Engine: load.Engine{Kind: proto.KindOllama, Version: "0.14.1"}}},
		{"others", map[string]string{"/version": "<html>", "/props": `{"total_slots":"x"}`, "/get_server_info": `[]`}, Status{Engine: load.Engine{Kind: proto.KindOther}}},
		{"one that hangs at others' questions", map[string]string{"/version": "hang", "/api/version": `{"version":"0.14.1"}`}, Status{Engine: load.Engine{Kind: proto.KindOllama, Version: "0.14.1"}}},
	} {
		_, h := newEngineOf(t, c.say)
		st, err := h.Probe(t.Context())
		must(t, err)
		w := &c.want
		if st.State != proto.EngineReady || st.Kind != w.Kind || st.Version != w.Version || st.Slots != w.Slots || st.MaxLen != w.MaxLen || st.Run != 1 || st.Gauges.KVTokens != w.Gauges.KVTokens {
			t.Errorf("%s: %+v, want %+v", c.name, st, w)
		}
	}
}

// TestProfileTries: one that does not answer is asked again at the next probes, not for ever.
func TestProfileTries(t *testing.T) {
	e, h := newEngineOf(t, map[string]string{"/health": "", "/get_server_info": "cut"})
	var asked int // some times more than there are probes: net/http repeats what breaks off
	for i, want := range []string{"", "", proto.KindOther, proto.KindOther} {
		asked = e.count("/get_server_info")
		if st, err := h.Probe(t.Context()); err != nil || st.State != proto.EngineReady || st.Kind != want {
			t.Errorf("probe %d: %+v, %v; want kind %q", i, st, err, want)
		}
	}
	if got := e.count("/get_server_info"); got != asked {
		t.Errorf("asked %d times more", got-asked)
	}
}

// TestProfileOnce: an engine is asked once for each of its runs.
func TestProfileOnce(t *testing.T) {
	e, h := newEngineOf(t, map[string]string{"/version": `{"version":"1"}`, "/health": ""})
	probe := func() Status {
		st, err := h.Probe(t.Context())
		must(t, err)
		return st
	}
	probe()
	if st := probe(); st.Run != 1 || e.count("/version") != 1 {
		t.Errorf("run %d, asked %d times", st.Run, e.count("/version"))
	}
	e.change("/health", "503")
	probe()
	e.change("/health", "")
	e.change("/version", `{"version":"2"}`)
	if st := probe(); st.Run != 2 || st.Version != "2" {
		t.Errorf("run %d, version %s after a new start", st.Run, st.Version)
	}
	e.change("/metrics", `vllm:engine_sleep_state{sleep_state="awake"} 0`)
	probe()
	e.change("/metrics", "")
	if st := probe(); st.Run != 2 {
		t.Errorf("run %d of an engine that slept", st.Run)
	}
}

// TestKVTokens: a capacity that the engine does not tell comes from who knows it, and is shown.
func TestKVTokens(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.metrics = gauges(0, 0) })
	r.start(f.engine(), func(w *Worker) { w.KVTokens = func() int64 { return 20480 } })
	r.until("the capacity is known", func() bool {
		return slices.ContainsFunc(r.workers(), func(w *proto.Worker) bool {
			return w.KVTokens == 20480 && strings.HasPrefix(w.LimitWhy, "KV cache of 20480 tokens")
		})
	})
}

// TestHangUsage: an engine that counts tokens only when a request ends lives while its KV cache fills.
func TestHangUsage(t *testing.T) {
	now := time.Now()
	var h hangWatch
	look := func(usage float64) bool {
		now = now.Add(time.Second)
		return h.stalled(now, load.Gauges{Known: true, KVUsage: usage, Generation: 7}, 1, 0, 3*time.Second)
	}
	for i := range 10 {
		if look(float64(i) / 100) {
			t.Fatal("it is called hung")
		}
	}
	look(0.09)
	look(0.09)
	if !look(0.09) {
		t.Error("it stands still and is not called hung")
	}
}

// TestSleepIsAsked: an engine that does not answer whether it sleeps is taken to be awake, holds nobody up, and is asked again;
// one that has no such route is not.
func TestSleepIsAsked(t *testing.T) {
	var asked atomic.Int64
	var answer atomic.Pointer[func(http.ResponseWriter, *http.Request)]
	does := func(f func(http.ResponseWriter, *http.Request)) { answer.Store(&f) }
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/health":
		case "/v1/models":
			say(w, 200, `{"data":[{"id":"m"}]}`)
		case "/is_sleeping":
			asked.Add(1)
			(*answer.Load())(w, r)
		default:
			w.WriteHeader(404)
		}
	}))
	t.Cleanup(srv.Close)
	h, err := NewHTTP(srv.URL, "")
	must(t, err)
	t.Cleanup(h.Close)
	is := func(what, state string, times int64) {
		t.Helper()
		st, err := h.Probe(t.Context())
		if err != nil || st.State != state || asked.Load() != times {
			t.Errorf("%s: %s, %v; asked %d times", what, st.State, err, asked.Load())
		}
	}
	does(func(_ http.ResponseWriter, r *http.Request) {
		h.about.forget() // as another probe may
		<-r.Context().Done()
	})
	is("it hangs", proto.EngineReady, 1)
	does(func(w http.ResponseWriter, _ *http.Request) { say(w, 503, "not now") })
	is("503", proto.EngineReady, 2)
	does(func(w http.ResponseWriter, _ *http.Request) { say(w, 200, `{"is_sleeping":true}`) })
	is("it sleeps", proto.EngineWaiting, 3)
	does(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) })
	is("no route", proto.EngineReady, 4)
	is("no route, as is known", proto.EngineReady, 4)
}
