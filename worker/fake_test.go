package worker

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"millrace/proto"
)

// fake is an engine over HTTP that does as it is told. What it says is what was recorded from real ones.
type fake struct {
	*httptest.Server
	tb   testing.TB
	came chan string // bodies of requests, as they come in

	mu      sync.Mutex
	health  int
	illness int    // answers of /health other than 200, since the last death
	listed  int    // status of /v1/models
	models  string // as JSON strings
	metrics string
	work    func(w http.ResponseWriter, r *http.Request, body string)
}

func newFake(tb testing.TB) *fake {
	f := &fake{tb: tb, came: make(chan string, 1<<16), health: 200, listed: 200, models: `"m"`}
	f.work = f.ok
	f.Server = httptest.NewServer(f)
	tb.Cleanup(f.Close)
	return f
}

// set changes what the engine does.
func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	if r.URL.Path == "/health" && f.health != 200 {
		f.illness++
	}
	health, listed, models, metrics, work := f.health, f.listed, f.models, f.metrics, f.work
	f.mu.Unlock()
	switch {
	case r.Method == http.MethodPost:
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return // the client is gone
		}
		f.came <- string(b)
		work(w, r, string(b))
	case r.URL.Path == "/health":
		w.WriteHeader(health)
	case r.URL.Path == "/v1/models":
		if listed != 200 {
			say(w, listed, unauthStr)
			return
		}
		var data []string
		for m := range strings.SplitSeq(models, ",") {
			if m != "" {
				data = append(data, `{"id":`+m+`,"object":"model","max_model_len":2048}`)
			}
		}
		say(w, 200, `{"object":"list","data":[`+strings.Join(data, ",")+`]}`)
	case r.URL.Path == "/metrics" && metrics != "":
		say(w, 200, metrics)
	default:
		say(w, 404, `{"detail":"Not Found"}`)
	}
}

func say(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, body) // a client that is gone is the test's doing
}

const okBody = `{"id":"chatcmpl-1","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}`

func (f *fake) ok(w http.ResponseWriter, _ *http.Request, _ string) { say(w, 200, okBody) }

// says makes a handler that answers everything alike.
func says(status int, body string) func(http.ResponseWriter, *http.Request, string) {
	return func(w http.ResponseWriter, _ *http.Request, _ string) { say(w, status, body) }
}

// blocks answers nothing until the client is gone.
func blocks(_ http.ResponseWriter, r *http.Request, _ string) { <-r.Context().Done() }

// cut breaks the connection.
func cut(w http.ResponseWriter, _ *http.Request, _ string) { panic(http.ErrAbortHandler) }

// enter waits until n requests have come in, and returns their bodies.
func (f *fake) enter(n int) []string {
	f.tb.Helper()
	var out []string
	timeout := time.After(patient)
	for len(out) < n {
		select {
		case b := <-f.came:
			out = append(out, b)
		case <-timeout:
			f.tb.Fatalf("%d requests came in, want %d", len(out), n)
		}
	}
	return out
}

func (f *fake) engine() *HTTP {
	f.tb.Helper()
	e, err := NewHTTP(f.URL, "key")
	must(f.tb, err)
	f.tb.Cleanup(e.Close)
	return e
}

// gauges renders vLLM's metrics.
func gauges(running, generated int) string {
	return fmt.Sprintf("vllm:num_requests_running{engine=\"0\",model_name=\"m\"} %d.0\nvllm:generation_tokens_total{engine=\"0\"} %d.0\n", running, generated)
}

var ports sync.Map // that freeAddr has given

// freeAddr is an address nobody listens on, nor will: below the ports that the system gives to connections.
func freeAddr(tb testing.TB) string {
	tb.Helper()
	for {
		addr := fmt.Sprintf("127.0.0.1:%d", 10000+rand.IntN(20000))
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			continue
		}
		ln.Close()
		if _, taken := ports.LoadOrStore(addr, true); !taken {
			return addr
		}
	}
}

// rival is the heartbeat of another worker that is ready and serves the model.
func (r *rig) rival() {
	r.tb.Helper()
	kv, err := r.conn.JS.KeyValue(r.tb.Context(), proto.WorkersBucket)
	must(r.tb, err)
	b, err := (&proto.Worker{ID: "rival", State: proto.EngineReady, Models: []string{r.model}}).Encode()
	must(r.tb, err)
	_, err = kv.Put(r.tb.Context(), "rival", b)
	must(r.tb, err)
}

// noRival takes it away.
func (r *rig) noRival() {
	r.tb.Helper()
	kv, err := r.conn.JS.KeyValue(r.tb.Context(), proto.WorkersBucket)
	must(r.tb, err)
	must(r.tb, kv.Delete(r.tb.Context(), "rival"))
}
