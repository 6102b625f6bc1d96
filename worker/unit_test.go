package worker

import (
	"millrace/worker/load"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

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

func TestReadWish(t *testing.T) {
	some := func(n, sequences int) load.Wish { return load.Wish{Most: n, Sequences: sequences} }
	for body, want := range map[string]load.Wish{
		`{"max_tokens":16}`: some(16, 1), `{"max_completion_tokens":5,"n":3}`: some(15, 3), `{"messages":[{"max_tokens":9}]}`: some(load.NoMaxTokens, 1),
		`{"max_tokens":null}`: some(load.NoMaxTokens, 1), `{"max_tokens":"x"}`: some(load.NoMaxTokens, 1), `{"max_tokens":1e400}`: some(load.NoMaxTokens, 1), `[`: some(load.NoMaxTokens, 1), ``: some(load.NoMaxTokens, 1),
		`{"max_tokens":12345678901234567890}`: some(load.NoMaxTokens, 1), `{"max_output_tokens":7}`: some(7, 1), `{"max_tokens":3`: some(3, 1),
		`{"prompt":["a","b"],"max_tokens":4,"n":2}`: some(16, 4), `{"prompt":"a","max_tokens":4}`: some(4, 1), `{"prompt":[1,2,3],"max_tokens":4}`: some(4, 1),
		`{"prompt":[[1,2],[3]],"max_tokens":4}`: some(8, 2), `{"prompt":[],"max_tokens":4}`: some(4, 1), `{"input":[{"role":"user"},{"role":"user"}],"max_output_tokens":4}`: some(4, 1),
		`{"prompt":["a",`: some(load.NoMaxTokens, 1), `{"prompt":`: some(load.NoMaxTokens, 1),
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
