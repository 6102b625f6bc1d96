package sim

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"
)

// stuck is a server with requests inside that will not finish soon: a step has
// given each its first token, and the next one is slow.
func stuck(t *testing.T, cfg Config, bodies []string) (*rig, func() []reply) {
	t.Helper()
	cfg.StepTime = time.Millisecond
	cfg.Faults = Faults{Slow: 1, SlowFactor: 1 << 40}
	r := serve(t, cfg)
	wait := r.spread(chatPath, bodies)
	r.inside(len(bodies))
	r.until("running", func() bool { return r.value("num_requests_running") == float64(len(bodies)) })
	return r, wait
}

func fourChats() []string {
	return repeat(4, func(i int) string { return chat(fmt.Sprint("chat ", i), `, "max_tokens": 10, "ignore_eos": true`) })
}

func TestShutdownError(t *testing.T) {
	r, wait := stuck(t, Config{}, fourChats())
	r.stop()
	r.died(wait())
}

func TestShutdownAbort(t *testing.T) {
	bodies := fourChats()
	r, wait := stuck(t, Config{Shutdown: ShutdownAbort}, bodies)
	r.stop()
	for i, got := range wait() {
		res := got.belongs(t, bodies[i])
		if res.Choices[0].FinishReason != "abort" || res.Usage.Completion >= 10 {
			t.Errorf("got %+v", res)
		}
	}
	r.died(nil)
}

func TestShutdownAbortOfAHungEngine(t *testing.T) {
	r := serve(t, Config{Shutdown: ShutdownAbort, Faults: Faults{Hang: true}})
	wait := r.spread(chatPath, fourChats())
	r.inside(4)
	r.stop()
	for _, got := range wait() {
		if res := got.ok(t); res.Choices[0].FinishReason != "abort" {
			t.Errorf("got %+v", res)
		}
	}
}

func (r *rig) refusing() bool {
	c, err := net.Dial("tcp", strings.TrimPrefix(r.url, "http://"))
	if err == nil {
		c.Close()
	}
	return err != nil
}

// unanswered checks that a server that was told to end does so only when its
// clients have left.
func (r *rig) unanswered(leave context.CancelFunc, wait func() []reply) {
	r.t.Helper()
	r.until("refusing connections", r.refusing)
	select {
	case err := <-r.done:
		r.t.Fatalf("Serve returned %v with clients still there", err)
	default:
	}
	leave()
	for _, got := range wait() {
		if !errors.Is(got.err, context.Canceled) {
			r.t.Errorf("got %d %s, error %v", got.status, got.body, got.err)
		}
	}
	r.died(nil)
}

func TestShutdownHang(t *testing.T) {
	r := serve(t, Config{Shutdown: ShutdownHang, Faults: Faults{Hang: true}})
	leave := r.leaving()
	wait := r.spread(chatPath, fourChats())
	r.inside(4)
	r.stop()
	r.unanswered(leave, wait)
}

func (r *rig) draining() bool {
	r.gate.mu.Lock()
	defer r.gate.mu.Unlock()
	return r.gate.drained != nil
}

func TestShutdownDrain(t *testing.T) {
	bodies := fourChats()
	r := serve(t, Config{Shutdown: ShutdownDrain, Faults: Faults{Hang: true}})
	wait := r.spread(chatPath, bodies)
	r.inside(4)
	r.stop()
	r.until("draining", r.draining)
	if got := r.get("/health"); got.status != http.StatusOK {
		t.Errorf("/health while draining: %d", got.status)
	}
	r.post(chatPath, chat("late", "")).is(t, stopping())
	r.setFaults(`{}`)
	for i, got := range wait() {
		if res := got.belongs(t, bodies[i]); res.Usage.Completion != 10 || res.Choices[0].FinishReason != "length" {
			t.Errorf("got %+v", res)
		}
	}
	r.died(nil)
}

// What is not drained in time is never answered: the clients have to leave.
func TestShutdownDrainTimeout(t *testing.T) {
	r := serve(t, Config{Shutdown: ShutdownDrain, DrainTimeout: 1, Faults: Faults{Hang: true}})
	leave := r.leaving()
	wait := r.spread(chatPath, fourChats())
	r.inside(4)
	r.stop()
	r.unanswered(leave, wait)
}

func TestLoading(t *testing.T) {
	e := testEngine(t, Config{LoadTime: 1 << 50})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- e.ListenAndServe(ctx, "127.0.0.1:0", func(net.Addr) { t.Error("ready without having loaded") })
	}()
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	synctest.Test(t, func(t *testing.T) {
		e := testEngine(t, Config{LoadTime: time.Minute})
		start := time.Now()
		err := e.ListenAndServe(t.Context(), "an address without port", nil)
		if err == nil || time.Since(start) != time.Minute {
			t.Errorf("listened after %v, error %v", time.Since(start), err)
		}
	})
}

func TestIdleConnectionsAreClosed(t *testing.T) {
	r := serve(t, Config{KeepAlive: time.Millisecond})
	c, err := net.Dial("tcp", strings.TrimPrefix(r.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
	all, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(all), "HTTP/1.1 200 OK\r\n") {
		t.Errorf("got %q, error %v", all, err)
	}
}

func TestRunOnce(t *testing.T) {
	r := serve(t, Config{})
	r.post(chatPath, chat("x", "")).ok(t)
	if err := r.Run(t.Context()); err == nil {
		t.Error("a second Run runs")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Serve(t.Context(), ln); err == nil {
		t.Error("a second Serve serves")
	}
}

func TestHandlerAlone(t *testing.T) {
	e := testEngine(t, Config{})
	srv := httptest.NewServer(e.Handler())
	defer srv.Close()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- e.Run(ctx) }()
	r := &rig{Engine: e, t: t, ctx: t.Context(), http: srv.Client(), url: srv.URL}
	r.post(chatPath, chat("x", "")).ok(t)
	e.Kill()
	if err := <-done; !errors.Is(err, ErrEngineDead) {
		t.Errorf("Run returned %v", err)
	}
	stop()
	r.post(chatPath, chat("x", "")).is(t, engineDead())
}

func TestConfigIsChecked(t *testing.T) {
	for _, cfg := range []Config{
		{}, {Models: []string{""}}, {MaxModelLen: -1}, {KVTokens: 100}, {MaxNumSeqs: -1}, {StepTime: -1}, {BytesPerToken: -1},
		{OutputTokens: Range{5, 4}}, {Shutdown: "maybe"}, {Faults: Faults{Torn: 2}}, {MaxQueued: -1},
	} {
		if cfg.Models == nil && cfg.MaxModelLen+cfg.KVTokens+cfg.MaxNumSeqs+int(cfg.StepTime)+cfg.BytesPerToken+cfg.OutputTokens.Min+len(cfg.Shutdown)+cfg.MaxQueued+int(cfg.Faults.Torn) != 0 {
			cfg.Models = []string{"tiny"}
		}
		if _, err := New(cfg); err == nil {
			t.Errorf("%+v is accepted", cfg)
		}
	}
	if _, err := New(Config{Models: []string{"m"}, MaxModelLen: 200_001}); err != nil {
		t.Error(err)
	}
}

func TestServedNames(t *testing.T) {
	r := serve(t, Config{Models: []string{"big", "alias"}})
	for _, model := range []string{"big", "alias"} {
		if res := r.post(chatPath, chat("x", `, "model": "`+model+`"`)).ok(t); res.Model != "big" {
			t.Errorf("%s answers as %s", model, res.Model)
		}
	}
	r.post(chatPath, chat("x", `, "model": "small"`)).is(t, unknownModel("small", "big, alias"))
	var list struct {
		Data []struct {
			ID  string `json:"id"`
			Max int    `json:"max_model_len"`
		} `json:"data"`
	}
	if err := json.Unmarshal(r.get("/v1/models").body, &list); err != nil || len(list.Data) != 2 || list.Data[1].ID != "alias" || list.Data[1].Max != 4096 {
		t.Errorf("models are %+v, error %v", list, err)
	}
}

func TestEmbeddings(t *testing.T) {
	const path = "/v1/embeddings"
	r := serve(t, Config{EmbeddingDim: 8, MaxModelLen: 64})
	body := `{"input": ["hello", "world"]}`
	hash, err := PromptHash([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	res := r.post(path, body).ok(t)
	if len(res.Data) != 2 || res.Usage.Prompt != 4 || res.Usage.Completion != 0 || !strings.HasPrefix(res.ID, "embd-") {
		t.Fatalf("got %+v", res)
	}
	for i, h := range []string{hash, hash + "/1"} {
		var v []float64
		if err := json.Unmarshal(res.Data[i].Embedding, &v); err != nil || !slices.Equal(v, Embedding(h, 8)) {
			t.Errorf("vector %d is %v, error %v", i, v, err)
		}
	}
	var raw []byte
	res = r.post(path, `{"input": ["hello", "world"], "encoding_format": "base64"}`).ok(t)
	if err := json.Unmarshal(res.Data[0].Embedding, &raw); err != nil || len(raw) != 32 {
		t.Fatalf("%d bytes, error %v", len(raw), err)
	}
	for i, want := range Embedding(hash, 8) {
		if got := math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:])); float64(got) != want {
			t.Errorf("number %d is %v, want %v", i, got, want)
		}
	}
	for _, bad := range []string{`{"input": ""}`, `{"input": []}`, `{}`, `{"input": {}}`, `{"input": "x", "dimensions": 4}`, `{"input": "` + strings.Repeat("x", 300) + `"}`, `{"input": [-1]}`} {
		if got := r.post(path, bad); got.status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", bad, got.status, got.body)
		}
	}
	r.post(chatPath, chat("x", "")).is(t, detail(http.StatusNotFound, "Not Found"))
	if n := r.value("request_success_total"); n != 4 {
		t.Errorf("%v requests", n)
	}
}

func TestNull(t *testing.T) {
	r := serve(t, Config{Null: true})
	first, second := r.post(chatPath, chat("a", "")), r.post(chatPath, "not even JSON")
	if res := first.ok(t); res.Usage.Completion != 1 || res.Choices[0].FinishReason != "stop" {
		t.Errorf("got %+v", res)
	}
	if string(first.body) != string(second.body) {
		t.Error("two answers differ")
	}
	for _, path := range []string{"/health", "/v1/models", "/metrics"} {
		if got := r.get(path); got.status != http.StatusOK {
			t.Errorf("%s: %d", path, got.status)
		}
	}
	r.post("/v1/completions", "").ok(t)
}

func TestPromptHash(t *testing.T) {
	for body, want := range map[string]string{
		`{"messages": [ 1,  2 ], "model": "m"}`:     `[ 1,  2 ]`,
		`{"prompt":"a\u00e9 \ud800"}`:               `"a\u00e9 \ud800"`,
		`{"prompt": "old", "prompt": "new"}`:        `"new"`,
		`{"input": {"big": 12345678901234567890} }`: `{"big": 12345678901234567890}`,
	} {
		got, err := PromptHash([]byte(body))
		sum := sha256.Sum256([]byte(want))
		if err != nil || got != hex.EncodeToString(sum[:8]) {
			t.Errorf("%s: %s, error %v", body, got, err)
		}
	}
	for _, body := range []string{`{}`, `[]`, `{"prompt": `, ``} {
		if got, err := PromptHash([]byte(body)); err == nil {
			t.Errorf("%s has hash %s", body, got)
		}
	}
}

func TestLengths(t *testing.T) {
	r := serve(t, Config{OutputTokens: Range{20, 30}, Seed: 3})
	for more, want := range map[string]struct {
		min, max int
		reason   string
	}{
		``:                                       {20, 30, "stop"},
		`, "max_tokens": 100`:                    {20, 30, "stop"},
		`, "max_tokens": 7`:                      {7, 7, "length"},
		`, "max_completion_tokens": 7`:           {7, 7, "length"},
		`, "max_tokens": 60, "ignore_eos": true`: {60, 60, "length"},
		`, "min_tokens": 50, "max_tokens": 50`:   {50, 50, "stop"},
		`, "min_tokens": 40`:                     {40, 40, "stop"},
	} {
		res := r.post(chatPath, chat("x", more)).ok(t)
		if n := res.Usage.Completion; n < want.min || n > want.max || res.Choices[0].FinishReason != want.reason {
			t.Errorf("%s: %d tokens, %s", more, n, res.Choices[0].FinishReason)
		}
		if got := len(res.Choices[0].Message.Content); got != max(4*res.Usage.Completion, len("sim:0123456789abcdef ")) {
			t.Errorf("%s: %d tokens are %d bytes", more, res.Usage.Completion, got)
		}
	}
	first, second := r.post(chatPath, chat("y", `, "n": 2`)).ok(t), r.post(chatPath, chat("y", `, "n": 2`)).ok(t)
	if first.Choices[0] != second.Choices[0] || first.Choices[1] != second.Choices[1] {
		t.Error("the same request has two answers")
	}
	if first.Choices[0].Message.Content == first.Choices[1].Message.Content {
		t.Error("two choices are the same")
	}
}

// A starved engine answers everything all the same, over HTTP.
func TestStarved(t *testing.T) {
	r := serve(t, Config{MaxModelLen: 256, KVTokens: 512, MaxBatchedTokens: 64})
	bodies := repeat(64, func(i int) string {
		return chat(fmt.Sprint("starved ", i, words("x", 50)), `, "max_tokens": 100, "ignore_eos": true`)
	})
	wait := r.spread(chatPath, bodies)
	for i, got := range wait() {
		if res := got.belongs(t, bodies[i]); res.Usage.Completion != 100 {
			t.Errorf("got %d tokens", res.Usage.Completion)
		}
	}
	if n := r.value("generation_tokens_total"); n != 6400 {
		t.Errorf("%v tokens are counted", n)
	}
}
