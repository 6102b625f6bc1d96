package worker

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"millrace/broker"
	"millrace/proto"
)

// TestCheckOfBroker: who mistakes the broker for the engine is told so.
func TestCheckOfBroker(t *testing.T) {
	b := &broker.Server{Dir: t.TempDir(), Addr: "127.0.0.1:0"}
	must(t, b.Start(t.Context()))
	t.Cleanup(b.Stop)
	e, err := NewHTTP(strings.Replace(b.URL(), "nats:", "http:", 1), "")
	must(t, err)
	t.Cleanup(e.Close)
	if got := (&Worker{Engine: e}).Check(t.Context()).Trouble; !strings.Contains(got, "is a NATS broker, not an engine") || strings.Contains(got, "INFO") {
		t.Error(got)
	}
}

// TestCheck: what is found of an engine, and why a worker would not run lines on it.
func TestCheck(t *testing.T) {
	smi(t, twoGPUs)
	const metrics = "vllm:num_requests_running{} 3\nvllm:num_requests_waiting{} 1\nvllm:kv_cache_usage_perc{} 0.5\nvllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"10000\"} 1\n"
	for _, c := range []struct {
		name    string
		set     func(*fake)
		state   string
		trouble string // part of it; empty: none
	}{
		{"ready", func(f *fake) { f.metrics = metrics }, proto.EngineReady, ""},
		{"no metrics", func(f *fake) { f.health = 404 }, proto.EngineReady, ""},
		{"loading", func(f *fake) { f.health = 503 }, proto.EngineWaiting, "/health says 503"},
		{"no such path", func(f *fake) { f.listed = 404 }, proto.EngineWaiting, "check --engine"},
		{"a key", func(f *fake) { f.listed = 401 }, proto.EngineDenied, "--engine-api-key"},
		{"no model", func(f *fake) { f.models = "" }, proto.EngineNoModel, "serves no model"},
		{"asleep", func(f *fake) { f.metrics = "vllm:engine_sleep_state{sleep_state=\"awake\"} 0\n" }, proto.EngineWaiting, "asleep"},
		{"gone", func(f *fake) { f.Close() }, proto.EngineWaiting, "refuses connections"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t)
			c.set(f)
			w := &Worker{Engine: f.engine(), GPUs: new(GPUs), Devices: []string{"0"}}
			got := w.Check(t.Context())
			if got.State != c.state || !strings.Contains(got.Trouble, c.trouble) || (got.Trouble == "") != (c.trouble == "") {
				t.Errorf("%s: %q", got.State, got.Trouble)
			}
			if well := c.trouble == ""; well != (got.Limit >= 8) || well != (got.LimitWhy != "") || well && strings.Join(got.Models, "") != "m" {
				t.Errorf("%+v", got)
			}
			if len(got.GPUs) != 1 || !got.OwnGPUs || got.GPUs[0].Index != "0" {
				t.Errorf("GPUs %+v", got.GPUs)
			}
			if g := got.Gauges; c.name == "ready" && (!g.Known || g.Running != 3 || g.KVTokens != 160000 || len(got.Settings) == 0) {
				t.Errorf("%+v %v", g, got.Settings)
			}
			if n := len(f.came); n > 0 {
				t.Errorf("%d requests were sent", n)
			}
		})
	}
	for _, c := range []struct{ path, says, kind, version string }{
		{"/get_server_info", `{"version":"0.5.20","max_total_num_tokens":50000,"max_running_requests":48}`, proto.KindSGLang, "0.5.20 50000 48"},
		{"/props", `{"total_slots":4,"build_info":"b7000","default_generation_settings":{"n_ctx":2048}}`, proto.KindLlama, "b7000 0 4"},
		{"/api/version", `{"version":"0.13.1"}`, proto.KindOllama, "0.13.1 0 0"},
	} {
		mux := http.NewServeMux()
		for path, says := range map[string]string{"/health": "{}", "/v1/models": `{"data":[{"id":"m"}]}`, c.path: c.says} {
			mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(says)) })
		}
		srv := httptest.NewServer(mux)
		t.Cleanup(srv.Close)
		e, err := NewHTTP(srv.URL, "")
		must(t, err)
		t.Cleanup(e.Close)
		got := (&Worker{Engine: e}).Check(t.Context())
		if v := fmt.Sprint(got.Version, " ", got.Gauges.KVTokens, " ", got.Slots); got.Trouble != "" || got.Kind != c.kind || v != c.version || got.LimitWhy == "" {
			t.Errorf("%s: %+v, want %s", c.kind, got, c.version)
		}
		t.Logf("%s: %d in flight: %s", got.Kind, got.Limit, got.LimitWhy)
	}
	f := newFake(t)
	if got := (&Worker{Engine: f.engine(), Concurrency: 5, Models: []string{"x"}}).Check(t.Context()); got.Limit != 5 || got.Models[0] != "x" || got.GPUs != nil {
		t.Errorf("%+v", got)
	}
}

// TestCheckOfGreeting: what speaks before it is asked is no engine, whether its greeting or the request is quicker. What may be
// random in it is not said.
func TestCheckOfGreeting(t *testing.T) {
	for greeting, want := range map[string]string{
		"SSH-2.0-OpenSSH_9.2\r\n":                    ` and says "SSH-2.0-OpenSSH_9.2"; check --engine`,
		"220 \"mail\" 'of' `mine`\r\n":               ` and says "220 mail of mine"; check --engine`,
		"J\x00\x00\x00\n8.0.36\x00\x08\"salt\" \x00": ` and says "J"; check --engine`,
		"\xff\xfb\x01":                               `; check --engine`,
		"hello, " + strings.Repeat("and so on, ", 9): ` and says "hello, and so on, and so on, and so on, "; check --engine`,
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = c.Write([]byte(greeting))
				_ = c.Close()
			}
		}()
		t.Cleanup(func() { _ = l.Close(); <-done })
		e, err := NewHTTP("http://"+l.Addr().String(), "")
		must(t, err)
		t.Cleanup(e.Close)
		if got := (&Worker{Engine: e}).Check(t.Context()).Trouble; !strings.Contains(got, "is no HTTP server: it speaks first"+want) {
			t.Errorf("%q: %s", greeting, got)
		}
	}
}
