package sim

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
)

// BenchmarkHTTP measures the whole way of a request with 256 in flight, client
// and server in one process:
//
//	go test ./sim -run '^$' -bench HTTP -benchtime 20000x
func BenchmarkHTTP(b *testing.B) {
	prompt := strings.Repeat("some text of a prompt that is not short ", 30) // 300 tokens
	for _, bench := range []struct {
		name string
		cfg  Config
		out  int
	}{
		{"300+16", Config{}, 16},
		{"300+121", Config{}, 121},
		{"300+121 no prefix cache", Config{NoPrefixCaching: true}, 121},
		{"300+121 starved", Config{KVTokens: 8192}, 121},
		{"null", Config{Null: true}, 1},
	} {
		b.Run(bench.name, func(b *testing.B) { benchHTTP(b, bench.cfg, prompt, bench.out) })
	}
}

func benchHTTP(b *testing.B, cfg Config, prompt string, out int) {
	const inFlight = 256
	r := serve(b, cfg)
	var next atomic.Int64
	done := make(chan error, inFlight)
	b.ResetTimer()
	for range inFlight {
		go func() {
			for {
				i := next.Add(1)
				if i > int64(b.N) {
					done <- nil
					return
				}
				body := fmt.Sprintf(`{"messages": [{"role": "user", "content": "%d %s"}], "max_tokens": %d, "ignore_eos": true}`, i, prompt, out)
				res, err := r.http.Post(r.url+chatPath, "application/json", strings.NewReader(body))
				if err != nil {
					done <- err
					return
				}
				text, err := io.ReadAll(res.Body)
				res.Body.Close()
				if err != nil || res.StatusCode != http.StatusOK || !bytes.Contains(text, []byte("sim:")) {
					done <- fmt.Errorf("got %d %s, error %w", res.StatusCode, text, err)
					return
				}
			}
		}()
	}
	for range inFlight {
		if err := <-done; err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
}

// BenchmarkStep measures the engine alone: one step of 256 sequences.
func BenchmarkStep(b *testing.B) {
	e, err := New(Config{Models: []string{"m"}, MaxModelLen: 2048, KVTokens: 1 << 20})
	if err != nil {
		b.Fatal(err)
	}
	calls := load(e, 256, func(i int) (string, int) { return words(fmt.Sprint(i), 300), 1024 })
	var p plan
	for b.Loop() {
		if !e.sched.busy() {
			for _, c := range calls {
				c.seqs[0].made, c.seqs[0].computed, c.left, c.done = 0, 0, 1, make(chan struct{})
				e.sched.add(c)
			}
		}
		e.sched.schedule(&p, e.now())
		e.endStep(&p)
	}
}
