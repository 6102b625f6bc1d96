package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
)

// outcome names what a client sees of a request.
func (p reply) outcome() string {
	var res result
	switch {
	case errors.Is(p.err, io.ErrUnexpectedEOF):
		return "torn"
	case p.err != nil:
		return "reset"
	case p.status != http.StatusOK:
		return fmt.Sprint(p.status)
	case len(p.body) == 0:
		return "empty"
	case json.Unmarshal(p.body, &res) != nil:
		return "garbage"
	}
	return res.Choices[0].FinishReason
}

func TestFaultShares(t *testing.T) {
	const n = 400
	run := func(seed uint64) map[string]int {
		r := serve(t, Config{Seed: seed, Faults: Faults{
			Errors: map[int]float64{500: .1, 503: .1, 429: .1}, Abort: .1, Torn: .1, Reset: .1, Empty: .1, Garbage: .1,
		}})
		count := map[string]int{}
		for _, got := range r.spread("/v1/completions", repeat(n, func(int) string { return `{"prompt": "x", "max_tokens": 20}` }))() {
			count[got.outcome()]++
		}
		return count
	}
	first := run(7)
	for _, kind := range []string{"500", "503", "429", "abort", "torn", "reset", "empty", "garbage", "length"} {
		if c := first[kind]; c < n/10/2 || c > n/10*3 {
			t.Errorf("%d of %d are %s", c, n, kind)
		}
	}
	if second := run(7); fmt.Sprint(first) != fmt.Sprint(second) {
		t.Errorf("two runs differ: %v and %v", first, second)
	}
	if other := run(8); fmt.Sprint(first) == fmt.Sprint(other) {
		t.Errorf("another seed changes nothing: %v", other)
	}
}

func TestFaultBodies(t *testing.T) {
	r := serve(t, Config{})
	for status, want := range map[int]*apiError{500: internalError("Internal server error"), 503: busy(), 401: unauthorized(), 404: unknownModel("tiny", "tiny")} {
		r.setFaults(fmt.Sprintf(`{"errors": {"%d": 1}}`, status))
		got := r.post(chatPath, chat("x", ""))
		got.is(t, want)
		if got.header.Get("Retry-After") != "" {
			t.Error("vLLM sends no Retry-After")
		}
	}
	r.setFaults(`{"abort": 1}`)
	res := r.post(chatPath, chat("x", `, "max_tokens": 20, "ignore_eos": true`)).ok(t)
	if c := res.Choices[0]; c.FinishReason != "abort" || res.Usage.Completion != 10 || !strings.HasPrefix(c.Message.Content, "sim:") {
		t.Errorf("aborted half-way: %+v", res)
	}
	r.setFaults(`{}`)
	r.post(chatPath, chat("x", "")).ok(t)
}

func TestFaultsRoute(t *testing.T) {
	r := serve(t, Config{})
	r.setFaults(`{"errors": {"503": 0.25}, "slow": 0.5, "poison": "boo"}`)
	if got := string(r.get("/sim/faults").body); got != `{"errors":{"503":0.25},"slow":0.5,"poison":"boo"}` {
		t.Errorf("GET: %s", got)
	}
	for _, bad := range []string{`{"abort": 2}`, `{"abort": 0.6, "torn": 0.6}`, `{"errors": {"200": 1}}`, `{"nonsense": 1}`, `{`, `{"empty": -1}`, `{"errors": {"500": -1}}`} {
		if got := r.post("/sim/faults", bad); got.status != http.StatusBadRequest {
			t.Errorf("%s: %d", bad, got.status)
		}
	}
	if got := r.Faults(); got.Poison != "boo" {
		t.Errorf("refused faults changed something: %+v", got)
	}
}

func TestRefusedRequestsShiftNoFaults(t *testing.T) {
	r := serve(t, Config{Faults: Faults{Errors: map[int]float64{500: .5}}})
	var first, second string
	for range 50 {
		first += r.post(chatPath, chat("x", "")).outcome() + " "
	}
	r2 := serve(t, Config{Faults: Faults{Errors: map[int]float64{500: .5}}})
	for range 50 {
		r2.post(chatPath, chat("x", `, "max_tokens": 0`))
		second += r2.post(chatPath, chat("x", "")).outcome() + " "
	}
	if first != second {
		t.Errorf("%s\n%s", first, second)
	}
}

func TestHang(t *testing.T) {
	r := serve(t, Config{})
	r.setFaults(`{"hang": true}`)
	bodies := repeat(8, func(i int) string { return chat(fmt.Sprint("hang ", i), `, "max_tokens": 5`) })
	wait := r.spread(chatPath, bodies)
	r.inside(8)
	for _, path := range []string{"/health", "/v1/models", "/metrics"} {
		if got := r.get(path); got.status != http.StatusOK {
			t.Errorf("%s of a hung engine: %d", path, got.status)
		}
	}
	if n := r.value("num_requests_running") + r.value("num_requests_waiting") + r.value("generation_tokens_total"); n != 0 {
		t.Errorf("a hung engine counts: %v", n)
	}
	r.setFaults(`{}`)
	for i, got := range wait() {
		got.belongs(t, bodies[i])
	}
}

func TestSlowIsFromTheSeed(t *testing.T) {
	a := Faults{Slow: .3, SlowFactor: 4}.arm(0)
	slow := 0
	for n := range uint64(1000) {
		v := a.judge(3, n)
		if v != a.judge(3, n) {
			t.Fatal("a decision does not repeat")
		}
		if v.slow == 4 {
			slow++
		}
	}
	if slow < 250 || slow > 350 {
		t.Errorf("%d of 1000 are slow", slow)
	}
}

// died checks that a server that served died as vLLM dies.
func (r *rig) died(inFlight []reply) {
	r.t.Helper()
	for _, got := range inFlight {
		got.is(r.t, engineDead())
	}
	if err := r.wait(); err != nil {
		r.t.Errorf("Serve returned %v, want nil as exit status 0", err)
	}
	if got := r.get("/health"); got.err == nil {
		r.t.Errorf("/health after the end: %d", got.status)
	}
}

func TestCrashNow(t *testing.T) {
	r := serve(t, Config{DeathTime: 1 << 40}) // 18 minutes
	r.setFaults(`{"hang": true}`)
	wait := r.spread(chatPath, repeat(8, func(i int) string { return chat("x", "") }))
	r.inside(8)
	r.setFaults(`{"crash": true}`)
	for _, got := range wait() {
		got.is(t, engineDead())
	}
	if got := r.get("/health"); got.status != http.StatusServiceUnavailable || len(got.body) != 0 {
		t.Errorf("/health of a dead engine: %d %s", got.status, got.body)
	}
	r.post(chatPath, chat("x", "")).is(t, engineDead())
	if got := r.get("/v1/models"); got.status != http.StatusOK {
		t.Errorf("/v1/models of a dead engine: %d", got.status)
	}
	stream := r.post(chatPath, chat("x", `, "stream": true`))
	stream.is(t, engineDead()) // it is known before the stream begins
	r.stop()
	r.died(nil)
}

func TestCrashAfter(t *testing.T) {
	r := serve(t, Config{DeathTime: 1})
	r.post(chatPath, chat("x", "")).ok(t)
	r.setFaults(`{"crash_after": 3}`)
	r.post(chatPath, chat("x", "")).ok(t)
	r.post(chatPath, chat("x", "")).ok(t)
	r.died([]reply{r.post(chatPath, chat("x", ""))})
}

func TestPoison(t *testing.T) {
	r := serve(t, Config{DeathTime: 1, MaxNumSeqs: 4})
	r.setFaults(`{"poison": "tüte", "hang": true}`)
	wait := r.spread(chatPath, append(
		repeat(4, func(int) string { return chat("harmless", `, "max_tokens": 4000, "ignore_eos": true`) }),
		`{"messages": [{"role": "user", "content": "T\u00fcte und t\u00fcte"}]}`))
	r.inside(5)
	r.setFaults(`{}`)
	replies := wait()
	replies[4].is(t, engineDead())
	r.died(nil)
}

func TestStreamOfADyingEngine(t *testing.T) {
	r := serve(t, Config{DeathTime: 1})
	r.setFaults(`{"hang": true}`)
	wait := r.spread(chatPath, []string{chat("x", `, "stream": true`)})
	r.inside(1)
	r.Kill()
	got := wait()[0]
	want := "data: " + string(engineDead().body()) + "\n\ndata: [DONE]\n\n"
	if got.status != http.StatusOK || string(got.body) != want {
		t.Errorf("got %d %s, want 200 %s", got.status, got.body, want)
	}
}

func TestMaxQueued(t *testing.T) {
	r := serve(t, Config{MaxQueued: 4})
	r.setFaults(`{"hang": true}`)
	bodies := repeat(4, func(i int) string { return chat(fmt.Sprint(i), "") })
	wait := r.spread(chatPath, bodies)
	r.inside(4)
	r.post(chatPath, chat("one more", "")).is(t, busy())
	r.setFaults(`{}`)
	for i, got := range wait() {
		got.belongs(t, bodies[i])
	}
	r.post(chatPath, chat("n counts", `, "n": 5`)).is(t, busy())
	r.post("/v1/completions", `{"prompt": ["a", "b", "c", "d", "e"]}`).is(t, busy())
	if n := r.value("admission_rejections_total"); n != 3 {
		t.Errorf("%v rejections", n)
	}
}

// A client that leaves frees its place, and is counted nowhere.
func TestClientLeaves(t *testing.T) {
	r := serve(t, Config{MaxNumSeqs: 1, KVTokens: 4096, StepTime: time.Millisecond, Faults: Faults{Slow: 1, SlowFactor: 1 << 40}})
	leave := r.leaving()
	wait := r.spread(chatPath, []string{chat("x", "")})
	r.until("running", func() bool { return r.value("num_requests_running") == 1 })
	leave()
	if got := wait()[0]; !errors.Is(got.err, context.Canceled) {
		t.Errorf("the client got %+v", got)
	}
	r.until("free again", func() bool { return r.value("num_requests_running") == 0 && r.value("kv_cache_usage_perc") == 0 })
	if n := r.value("request_success_total"); n != 0 {
		t.Errorf("%v requests are counted", n)
	}
	r.ctx = t.Context()
	r.setFaults(`{}`)
	r.post(chatPath, chat("x", "")).ok(t)
}

func TestEmptyAnswersHaveNoBody(t *testing.T) {
	r := serve(t, Config{Faults: Faults{Empty: 1}})
	if got := r.post(chatPath, chat("x", "")); got.status != http.StatusOK || !bytes.Equal(got.body, nil) {
		t.Errorf("got %d %q", got.status, got.body)
	}
}
