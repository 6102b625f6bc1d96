package worker

import (
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"millrace/proto"
)

// TestGauges reads the metrics that were recorded.
func TestGauges(t *testing.T) {
	for name, want := range map[string]Gauges{
		"metrics-vllm-0.26.0-python.txt": {Known: true, Engines: 1, KVTokens: 4112864, KVUsage: 0.012374879888583323, Running: 159, Waiting: 97, Prompt: 1759626, Generation: 676285, Held: 41654, Holding: 133, Finished: 5604, SleepTold: true},
		"metrics-vllm-0.26.0-rust.txt":   {Known: true, Engines: 1, KVUsage: 0.08386597316506717, Running: 1024, Prompt: 3951024, Generation: 1452280, Held: 332953, Holding: 1009, Finished: 11819},
		"metrics-vllm-0.32.0-cpu.txt":    {Known: true, Engines: 1, KVTokens: 1048576, Prompt: 5237, Generation: 3048, Finished: 45, SleepTold: true},
	} {
		b, err := os.ReadFile("../testdata/vllm/" + name)
		must(t, err)
		if got := readGauges(b); got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
}

func TestGaugesOdd(t *testing.T) {
	got := readGauges([]byte(strings.Join([]string{
		`vllm:num_requests_running{engine="0"} 3`, `vllm:num_requests_running{engine="1"} 4 1700000000`, // two engines, a time stamp
		`vllm:num_requests_waiting 5.0`, // no labels
		`vllm:num_requests_waiting_by_reason{reason="capacity"} 9`,
		`vllm:cache_config_info{other_block_size="1",block_size="16",num_gpu_blocks="10"} 1.0`, // no kv_cache_size_tokens
		`vllm:engine_sleep_state{sleep_state="awake"} 0`,
		`vllm:num_preemptions_total{engine="0"} 2`,
		`vllm:generation_tokens_total NaN`, `vllm:prompt_tokens_total{`, `vllm:prompt_tokens_total`, `vllm:prompt_tokens_total x`, `go_goroutines 7`,
	}, "\n")))
	want := Gauges{Known: true, Engines: 2, KVTokens: 160, Running: 7, Waiting: 5, Preemptions: 2, Asleep: true, SleepTold: true}
	if got.Generation = 0; got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if (readGauges(nil) != Gauges{}) {
		t.Error("something of nothing")
	}
}

func TestNewHTTP(t *testing.T) {
	for in, want := range map[string]string{
		"http://127.0.0.1:8000": "http://127.0.0.1:8000", "http://h:1/": "http://h:1",
		"http://h:1/v1": "http://h:1", "http://h:1/v1/": "http://h:1", "https://h/llm/v1//": "https://h/llm", "http://u:p@h:1": "http://h:1",
		"HTTP://GPU3.Example/V2/v1": "http://gpu3.example/V2", "http://h:80": "http://h", "https://h:443/v1": "https://h", "http://h:": "http://h", "http://[::1]:8000": "http://[::1]:8000",
		"http://h_1.x-y.:1": "http://h_1.x-y.:1", "http://10.0.0.8:1": "http://10.0.0.8:1", "http://10.gpu:1": "http://10.gpu:1", "http://gpu10:1": "http://gpu10:1", "http://0xgpu:1": "http://0xgpu:1", "http://müller:1": "http://m%C3%BCller:1",
	} {
		h, err := NewHTTP(in, "")
		if err != nil || h.String() != want {
			t.Errorf("%s: %v %v, want %s", in, h, err, want)
		}
	}
	for _, in := range []string{"", "ftp://h", "http://", "http://h?x=1", "http://h#x", "http://h:port", "://", "127.0.0.1", "127.0.0.1:8000", "gpu3", "/foo", "http:///foo",
		"http://h:99999", "http://h:0", "http://h:-1", "http://a..b:1", "http://300.1.1.1:1", "http://127.0.0:1", "http://a b:1", "http://a,b:1", "sim,http://h:1", "http://h:1,http://g:1"} {
		if h, err := NewHTTP(in, ""); err == nil || !strings.Contains(err.Error(), "HOST:PORT") {
			t.Errorf("%q: %v, %v", in, h, err)
		}
	}
	for _, in := range []string{"http://10:8000", "http://10.:8000", "http://99999999999999999999:8000", "http://010:1", "http://0x7f.1:1", "http://10.8:1", "http://256.1.1.1:1", "http://10.0.0.8.:1"} {
		if h, err := NewHTTP(in, ""); err == nil || !strings.Contains(err.Error(), "four numbers, such as 10.0.0.8; give it like http://HOST:PORT") {
			t.Errorf("%q: %v, %v", in, h, err)
		}
	}
	if _, err := NewHTTP("http://me:s3cret@h:99999", ""); err == nil || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("%v", err)
	}
	for _, c := range []struct{ url, key, auth string }{{"http://h", "", ""}, {"http://h", "k", "Bearer k"}, {"http://u:p@h", "", "Basic dTpw"}, {"http://u:p@h", "k", "Bearer k"}} {
		if h, _ := NewHTTP(c.url, c.key); h.auth != c.auth {
			t.Errorf("%s %s: %q", c.url, c.key, h.auth)
		}
	}
}

func TestLimitBackPressure(t *testing.T) {
	now := time.Now()
	l := newLimit(60)
	for range 10 {
		l.refused(now) // a burst counts once
	}
	if got := l.get(); got != 40 {
		t.Errorf("limit %d", got)
	}
	for range 30 {
		now = now.Add(time.Second)
		l.refused(now)
	}
	if got := l.get(); got != 1 {
		t.Errorf("limit %d after many", got)
	}
	for range 30 {
		now = now.Add(5 * time.Second)
		l.observe(Status{State: proto.EngineReady}, 0, now)
	}
	if got := l.get(); got != 60 {
		t.Errorf("limit %d after a while", got)
	}
}

// TestLimitBusyNowAndThen: an engine that answers more than it refuses keeps half of the limit, and one that refuses all
// does not.
func TestLimitBusyNowAndThen(t *testing.T) {
	now := time.Now()
	l := newLimit(60)
	for range 30 {
		now = now.Add(time.Second)
		for range 3 {
			l.finished(proto.Usage{}, 0, wish{}, 0, now)
		}
		l.refused(now)
	}
	if got := l.get(); got != 30 {
		t.Errorf("limit %d", got)
	}
	for range 2 {
		now = now.Add(time.Second)
		l.refused(now)
	}
	if got := l.get(); got >= 30 {
		t.Errorf("limit %d of an engine that only refuses", got)
	}
}

func TestReadWish(t *testing.T) {
	one := func(n int) wish { return wish{n, 1} }
	for body, want := range map[string]wish{
		`{"max_tokens":16}`: one(16), `{"max_completion_tokens":5,"n":3}`: {15, 3}, `{"messages":[{"max_tokens":9}]}`: one(noMaxTokens),
		`{"max_tokens":null}`: one(noMaxTokens), `{"max_tokens":"x"}`: one(noMaxTokens), `{"max_tokens":1e400}`: one(noMaxTokens), `[`: one(noMaxTokens), ``: one(noMaxTokens),
		`{"max_tokens":12345678901234567890}`: one(noMaxTokens), `{"max_output_tokens":7}`: one(7), `{"max_tokens":3`: one(3),
		`{"prompt":["a","b"],"max_tokens":4,"n":2}`: {16, 4}, `{"prompt":"a","max_tokens":4}`: one(4), `{"prompt":[1,2,3],"max_tokens":4}`: one(4),
		`{"prompt":[[1,2],[3]],"max_tokens":4}`: {8, 2}, `{"prompt":[],"max_tokens":4}`: one(4), `{"input":[{"role":"user"},{"role":"user"}],"max_output_tokens":4}`: one(4),
		`{"prompt":["a",`: one(noMaxTokens), `{"prompt":`: one(noMaxTokens),
	} {
		if got := readDemand([]byte(body)).wish(); got != want {
			t.Errorf("%s: %v, want %v", body, got, want)
		}
	}
}

func TestBackoff(t *testing.T) {
	for n, want := range map[int]time.Duration{0: 250 * time.Millisecond, 1: 250 * time.Millisecond, 2: 500 * time.Millisecond, 5: 4 * time.Second, 7: 10 * time.Second, 100: 10 * time.Second} {
		if got := backoff(n); got < want*4/5 || got > want*6/5 {
			t.Errorf("%d: %v, want about %v", n, got, want)
		}
	}
	if got := string(nak(1500 * time.Millisecond)); got != `-NAK {"delay":1500000000}` {
		t.Errorf("nak %q", got)
	}
	if got := string(nak(0)); got != "-NAK" {
		t.Errorf("nak %q", got)
	}
}

// TestRest: the attempts of a line are not used up by a fault of some seconds, and the second one comes soon.
func TestRest(t *testing.T) {
	var least time.Duration
	for n, want := range []time.Duration{500 * time.Millisecond, 2 * time.Second, 8 * time.Second, 8 * time.Second} {
		got := rest(n+1, time.Second)
		if got < want*4/5 || got > want*6/5 {
			t.Errorf("%d: %v, want about %v", n+1, got, want)
		}
		if n < 3 { // the default is four attempts
			least += want * 4 / 5
		}
	}
	if least < 8*time.Second || rest(1000, time.Second) > 10*time.Second {
		t.Errorf("at least %v", least)
	}
}

// TestReadError: what engines say of errors, in all its shapes.
func TestReadError(t *testing.T) {
	for body, want := range map[string]errorBody{
		``:                         {},
		`null`:                     {},
		`{}`:                       {},
		`{"error":"text"}`:         {message: "text"},
		`{"error":{}}`:             {},
		`{"error":null}`:           {},
		`{"detail":"Not Found"}`:   {typ: "detail", message: "Not Found"},
		`{"detail":[{"msg":"x"}]}`: {typ: "detail", message: `[{"msg":"x"}]`},
		`{"object":"error","message":"m","type":"t","param":null,"code":400}`: {typ: "t", code: "400", message: "m"},
		`{"error":{"message":"m","type":"t","param":"p","code":"c"}}`:         {typ: "t", param: "p", code: "c", message: "m"},
		"  plain\n":       {message: "plain"},
		`"text"`:          {message: `"text"`},
		"\xff":            {message: "\uFFFD"},
		`{"error":[1,2]}`: {},
	} {
		if got := readError([]byte(body)); got != want {
			t.Errorf("%q: %+v, want %+v", body, got, want)
		}
	}
}

// TestSlotsPark: runners wait for lines, there are never more of them than slots, and all leave in the end.
func TestSlotsPark(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t, goleak.IgnoreCurrent()) })
	const limit, lines = 8, 2000
	var ran, now, most atomic.Int64
	s := &slots{limit: limit, more: func() {}}
	s.run = func(*line) {
		if n := now.Add(1); n > most.Load() {
			most.Store(n)
		}
		ran.Add(1)
		now.Add(-1)
	}
	for i := range lines {
		s.offer(&line{req: request(i)})
		if i%100 == 0 {
			s.wg.Wait() // now all of them wait
		}
	}
	s.wg.Wait()
	s.mu.Lock()
	parked := len(s.parked)
	s.mu.Unlock()
	if ran.Load() != lines || most.Load() > limit || parked < 1 || parked > limit {
		t.Errorf("%d lines ran, up to %d at once, on %d runners", ran.Load(), most.Load(), parked)
	}
	s.end()
	s.offer(&line{req: request(0)}) // one that comes after the end is run, too, and its runner leaves
	s.wg.Wait()
	s.runners.Wait()
	if ran.Load() != lines+1 {
		t.Errorf("%d lines ran", ran.Load())
	}
}
