package sim

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// rig is an engine that serves, and a client for it.
type rig struct {
	*Engine
	t    testing.TB
	http *http.Client
	ctx  context.Context // of the requests by post
	url  string
	stop context.CancelFunc // tells Serve to end
	done chan error         // what Serve returned
}

// serve starts an engine on a port of its own. The test's cleanup ends it.
func serve(t testing.TB, cfg Config) *rig {
	t.Helper()
	if cfg.Models == nil {
		cfg.Models = []string{"tiny"}
	}
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &rig{Engine: e, t: t, ctx: context.Background(), stop: stop, done: make(chan error, 1)}
	r.http = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 512}}
	ready := make(chan net.Addr, 1)
	go func() { r.done <- e.ListenAndServe(ctx, "127.0.0.1:0", func(a net.Addr) { ready <- a }) }()
	select {
	case a := <-ready:
		r.url = "http://" + a.String()
	case err := <-r.done:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		r.http.CloseIdleConnections()
		if err := r.wait(); err != nil {
			t.Error(err)
		}
		r.http.CloseIdleConnections()
	})
	return r
}

// wait returns what Serve returned. It may be called again.
func (r *rig) wait() error {
	err := <-r.done
	r.done <- err
	return err
}

type reply struct {
	status int
	header http.Header
	body   []byte
	err    error
}

func (r *rig) do(req *http.Request) reply {
	res, err := r.http.Do(req)
	if err != nil {
		return reply{err: err}
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return reply{res.StatusCode, res.Header, body, err}
}

func (r *rig) get(path string) reply {
	req, err := http.NewRequest(http.MethodGet, r.url+path, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	return r.do(req)
}

func (r *rig) post(path, body string) reply {
	req, err := http.NewRequestWithContext(r.ctx, http.MethodPost, r.url+path, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	return r.do(req)
}

const chatPath = "/v1/chat/completions"

// chat is a body with one user message.
func chat(text, more string) string {
	return fmt.Sprintf(`{"messages": [{"role": "user", "content": %s}]%s}`, quote(nil, text), more)
}

// spread sends the bodies at the same time and returns the replies in their order.
// The function it returns waits for them.
func (r *rig) spread(path string, bodies []string) func() []reply {
	replies := make([]reply, len(bodies))
	var wg sync.WaitGroup
	for i, body := range bodies {
		wg.Go(func() { replies[i] = r.post(path, body) })
	}
	return func() []reply {
		wg.Wait()
		return replies
	}
}

// leaving lets the clients of later posts leave all at once.
func (r *rig) leaving() (leave context.CancelFunc) {
	r.ctx, leave = context.WithCancel(context.Background())
	return leave
}

func repeat(n int, f func(int) string) []string {
	bodies := make([]string, n)
	for i := range bodies {
		bodies[i] = f(i)
	}
	return bodies
}

// inside waits until n requests are in the engine or its queue.
func (r *rig) inside(n int) {
	r.t.Helper()
	r.until(fmt.Sprintf("%d requests inside", n), func() bool {
		r.gate.mu.Lock()
		defer r.gate.mu.Unlock()
		return r.gate.calls == n
	})
}

// until waits for a condition, which nothing announces.
func (r *rig) until(what string, ok func() bool) {
	r.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	late := time.After(30 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-late:
			r.t.Fatalf("still not %s", what)
		}
	}
}

func (r *rig) setFaults(body string) {
	r.t.Helper()
	if got := r.post("/sim/faults", body); got.status != http.StatusOK {
		r.t.Fatalf("POST /sim/faults %s: %d %s %v", body, got.status, got.body, got.err)
	}
}

// result is what the tests look at in an answer.
type result struct {
	ID      string `json:"id"`
	Model   string `json:"model"`
	Choices []struct {
		Message struct {
			Content string `json:"content"`
		} `json:"message"`
		Text         string `json:"text"`
		FinishReason string `json:"finish_reason"`
	} `json:"choices"`
	Data []struct {
		Embedding jsontext.Value `json:"embedding"`
	} `json:"data"`
	Usage struct {
		Prompt     int `json:"prompt_tokens"`
		Completion int `json:"completion_tokens"`
		Total      int `json:"total_tokens"`
		Details    struct {
			Cached int `json:"cached_tokens"`
		} `json:"prompt_tokens_details"`
	} `json:"usage"`
}

// ok parses a good answer and checks that it is one.
func (p reply) ok(t testing.TB) (res result) {
	t.Helper()
	if p.err != nil || p.status != http.StatusOK {
		t.Fatalf("got %d %s, error %v", p.status, p.body, p.err)
	}
	if err := json.Unmarshal(p.body, &res); err != nil {
		t.Fatalf("parse %s: %v", p.body, err)
	}
	return res
}

// belongs checks that an answer is the one to body.
func (p reply) belongs(t testing.TB, body string) result {
	t.Helper()
	res := p.ok(t)
	hash, err := PromptHash([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range res.Choices {
		if text := c.Message.Content + c.Text; !strings.HasPrefix(text, "sim:"+hash+" ") {
			t.Fatalf("text %q does not begin with hash %s", text, hash)
		}
	}
	return res
}

func (p reply) is(t testing.TB, want *apiError) {
	t.Helper()
	if p.err != nil || p.status != want.status || !bytes.Equal(p.body, want.body()) {
		t.Fatalf("got %d %s, error %v\nwant %d %s", p.status, p.body, p.err, want.status, want.body())
	}
}
