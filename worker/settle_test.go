package worker

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"time"

	"millrace/proto"
)

const file032 = "vllm-0.32.0-cpu"

// server answers as a real engine was recorded to, over HTTP. The answers to POST are played in order, the last one
// for ever.
type server struct {
	*httptest.Server
	tb     testing.TB
	mu     sync.Mutex
	play   []recorded
	bodies []string
}

func newServer(tb testing.TB, play ...recorded) *server {
	s := &server{tb: tb, play: play}
	s.Server = httptest.NewServer(http.HandlerFunc(s.serve))
	tb.Cleanup(s.Close)
	return s
}

func (s *server) serve(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			s.tb.Error(err)
		}
		s.say(w, s.next(string(b)))
		return
	}
	switch r.URL.Path {
	case "/v1/models":
		fmt.Fprint(w, `{"object":"list","data":[{"id":"m","object":"model","max_model_len":2048}]}`)
	case "/health":
	case "/version":
		fmt.Fprint(w, `{"version":"0.32.0"}`)
	default:
		http.NotFound(w, r)
	}
}

func (s *server) next(body string) recorded {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bodies = append(s.bodies, body)
	r := s.play[0]
	if len(s.play) > 1 {
		s.play = s.play[1:]
	}
	return r
}

func (s *server) say(w http.ResponseWriter, r recorded) {
	for k, v := range r.Headers {
		w.Header().Set(k, v)
	}
	w.WriteHeader(r.Status)
	_, _ = io.WriteString(w, r.Body) // a client that is gone is the test's doing
}

func (s *server) engine() *HTTP {
	s.tb.Helper()
	e, err := NewHTTP(s.URL, "")
	must(s.tb, err)
	s.tb.Cleanup(e.rt.CloseIdleConnections)
	return e
}

func status(code int, body string) recorded {
	return recorded{Status: code, Body: body, Headers: map[string]string{"content-type": "application/json"}}
}

// The recorded answers of a dead engine, an engine under --max-num-queued-reqs, and one that aborted.
const (
	deadBody = `{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root cause.","type":"InternalServerError","param":null,"code":500}}`
	busyBody = `{"error":{"message":"The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.","type":"Service Unavailable","param":null,"code":503}}`
	lostBody = `{"id":"x","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"half"},"finish_reason":"abort"}],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}`
	oddBody  = `{"error":{"message":"'list' object has no attribute 'get'","type":"InternalServerError","param":null,"code":500}}`
)

// TestAnswers plays answers to one line and looks at how it ends: what is published, how often it was tried, what
// was charged, and that nothing is left in the queue.
func TestAnswers(t *testing.T) {
	ok := recording(t, file032, "chat_basic")
	for _, c := range []struct {
		name     string
		play     []recorded
		ok       bool
		code     string
		attempts int // charged before the last one
		calls    int
	}{
		{"ok", []recorded{ok}, true, "", 0, 1},
		{"permanent", []recorded{recording(t, file032, "err_temperature_9")}, false, proto.CodeInvalidRequest, 0, 1},
		{"too long", []recorded{recording(t, file032, "err_overlong_prompt")}, false, proto.CodeContextLength, 0, 1},
		{"busy, then ok", []recorded{status(503, busyBody), ok}, true, "", 0, 2},
		{"aborted, then ok", []recorded{status(200, lostBody), ok}, true, "", 0, 2},
		{"dead, then ok", []recorded{status(500, deadBody), ok}, true, "", 0, 2},
		{"wants a key, then ok", []recorded{status(401, `{"error":"Unauthorized"}`), ok}, true, "", 0, 2},
		// It lists the model and yet says that there is none: charged, or the line would go round for ever.
		{"no model, then ok", []recorded{recording(t, file032, "err_unknown_model"), ok}, true, "", 1, 2},
		{"500, then ok", []recorded{status(500, oddBody), ok}, true, "", 1, 2},
		{"500 for ever", []recorded{status(500, oddBody)}, false, proto.CodeEngineError, 1, 2},
		{"empty, then ok", []recorded{status(200, ""), ok}, true, "", 1, 2},
		{"half an answer for ever", []recorded{status(200, `{"choices":[`)}, false, proto.CodeBadResponse, 1, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			s := newServer(t, c.play...)
			r.start(s.engine(), func(w *Worker) { w.MaxAttempts, w.refusal = 2, time.Millisecond })
			r.send(request(0))
			got := exactly(t, r.wait(1), 1)[0]
			if got.OK != c.ok || got.Code != c.code || len(got.Attempts) != c.attempts {
				t.Errorf("ok %v, code %q, attempts %+v", got.OK, got.Code, got.Attempts)
			}
			r.settled(0)
			if len(s.bodies) != c.calls {
				t.Errorf("%d calls, want %d", len(s.bodies), c.calls)
			}
			if c.ok && string(got.Body) != ok.Body {
				t.Errorf("body %s", got.Body)
			}
		})
	}
}

// TestGlitch: a network or an engine that spoils every answer for a moment costs no line, of however small a job.
func TestGlitch(t *testing.T) {
	for name, work := range map[string]func(http.ResponseWriter, *http.Request, string){
		"reset": cut, "empty": says(200, ""), "garbage": says(200, okBody[:len(okBody)/2]),
		"torn": func(w http.ResponseWriter, _ *http.Request, _ string) {
			w.Header().Set("Content-Length", strconv.Itoa(len(okBody)))
			_, _ = io.WriteString(w, okBody[:len(okBody)/2])
			panic(http.ErrAbortHandler)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, f := newRig(t), newFake(t)
			const n = 20
			var mu sync.Mutex
			spoilt, all := map[string]int{}, 0
			glitch := func(b string) bool { // until one of them has come for the second time
				mu.Lock()
				defer mu.Unlock()
				if all > n || spoilt[b] > 1 {
					return false
				}
				spoilt[b]++
				all++
				return true
			}
			f.set(func() {
				f.work = func(w http.ResponseWriter, q *http.Request, b string) {
					if glitch(b) {
						work(w, q, b)
					} else {
						f.ok(w, q, b)
					}
				}
			})
			r.send(requests(n)...)
			r.start(f.engine(), func(w *Worker) { w.refusal = 100 * time.Millisecond })
			for i, res := range exactly(t, r.wait(n), n) {
				if !res.OK {
					t.Errorf("index %d: %+v", i, res)
				}
			}
			r.settled(0)
		})
	}
}

// TestBodyBytes: the engine gets the bytes of the input.
func TestBodyBytes(t *testing.T) {
	r := newRig(t)
	s := newServer(t, recording(t, file032, "chat_basic"))
	r.start(s.engine())
	q := request(0)
	q.Body = []byte(`{ "model" : "m","n":12345678901234567890, "x":1e400 ,"s":"\ud800\u0041"}`)
	r.send(q)
	r.wait(1)
	if s.bodies[0] != string(q.Body) {
		t.Errorf("the engine got %s", s.bodies[0])
	}
}

// TestHeartbeat: a worker says what it serves, and takes its heartbeat away when it leaves.
func TestHeartbeat(t *testing.T) {
	r := newRig(t)
	s := newServer(t, recording(t, file032, "chat_basic"))
	w := r.start(s.engine())
	r.until("models are told", func() bool { return len(r.state(proto.EngineReady).Models) > 0 }) // once their queues are there
	got := r.state(proto.EngineReady)
	if len(got.Models) != 1 || got.Models[0] != "m" || got.Version != "0.32.0" || got.MaxLen != 2048 {
		b, _ := json.Marshal(got)
		t.Errorf("heartbeat %s", b)
	}
	w.leave()
	w.end(t)
	if left := r.workers(); len(left) != 0 {
		t.Errorf("%d heartbeats after the end", len(left))
	}
}
