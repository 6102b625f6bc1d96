package worker_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"millrace/broker"
	"millrace/proto"
	"millrace/sim"
	"millrace/worker"
)

// engine is a simulated vLLM that may be ended and started again on its port.
type engine struct {
	tb   testing.TB
	cfg  sim.Config
	addr string
	sim  *sim.Engine
	end  context.CancelFunc
	done chan error
}

// newEngine starts an engine for model "m". A step takes a millisecond.
func newEngine(tb testing.TB, change func(*sim.Config)) *engine {
	tb.Helper()
	cfg := sim.Config{Models: []string{"m"}, StepTime: time.Millisecond, OutputTokens: sim.Range{Min: 5, Max: 20}, DeathTime: 50 * time.Millisecond}
	if change != nil {
		change(&cfg)
	}
	e := &engine{tb: tb, cfg: cfg, addr: worker.FreeAddr(tb)}
	e.start()
	tb.Cleanup(func() {
		e.end()
		<-e.done
	})
	return e
}

func (e *engine) start() {
	e.tb.Helper()
	var err error
	e.sim, err = sim.New(e.cfg)
	if err != nil {
		e.tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	e.end, e.done = cancel, make(chan error, 1)
	up := make(chan struct{})
	go func() { e.done <- e.sim.ListenAndServe(ctx, e.addr, func(net.Addr) { close(up) }) }()
	select {
	case <-up:
	case err := <-e.done:
		e.tb.Fatalf("engine: %v", err)
	}
}

// again waits for the end of an engine and starts it without faults.
func (e *engine) again() {
	e.tb.Helper()
	if err := <-e.done; err != nil {
		e.tb.Fatal(err)
	}
	e.cfg.Faults = sim.Faults{}
	e.start()
}

// immortal starts the engine again whenever it has died, until the function that it returns is called, which says how
// often that was, or the test ends.
func (e *engine) immortal(tb testing.TB) (end func() int) {
	quit, ended := make(chan struct{}), make(chan struct{})
	deaths := 0
	go func() {
		defer close(ended)
		for {
			select {
			case <-quit:
				return
			case err := <-e.done:
				if err != nil {
					tb.Errorf("engine: %v", err)
				}
				deaths++
				e.start()
			}
		}
	}()
	end = sync.OnceValue(func() int {
		close(quit)
		<-ended
		return deaths
	})
	tb.Cleanup(func() { end() })
	return end
}

func (e *engine) client() *worker.HTTP {
	e.tb.Helper()
	c, err := worker.NewHTTP("http://"+e.addr+"/v1", e.cfg.APIKey)
	if err != nil {
		e.tb.Fatal(err)
	}
	e.tb.Cleanup(c.Close)
	return c
}

// allOK checks that every line has one answer, and that it is one.
func allOK(tb testing.TB, got []*proto.Result, n int) {
	tb.Helper()
	for i, res := range worker.Exactly(tb, got, n) {
		if !res.OK {
			tb.Errorf("index %d: %d %s %s, attempts %+v", i, res.Status, res.Code, res.Message, res.Attempts)
		}
	}
}

// TestSimEnds: an engine that is ended in the four ways a real one ends, with lines in flight, and comes back. No
// line fails, none is charged.
func TestSimEnds(t *testing.T) {
	for _, how := range []sim.Shutdown{sim.ShutdownError, sim.ShutdownAbort, sim.ShutdownDrain} {
		t.Run(string(how), func(t *testing.T) {
			r := worker.NewRig(t)
			e := newEngine(t, func(c *sim.Config) { c.Shutdown = how; c.StepTime = 5 * time.Millisecond })
			const n = 120
			r.Send(worker.Requests(n)...)
			r.Start(e.client(), func(w *worker.Worker) { w.Concurrency = 16 })
			r.Wait(10)
			e.end()
			e.again()
			allOK(t, r.Wait(n), n)
			r.Settled(0)
		})
	}
}

// TestSimEndsHanging: an engine that closes its port and lets its clients wait for ever.
func TestSimEndsHanging(t *testing.T) {
	r := worker.NewRig(t)
	e := newEngine(t, func(c *sim.Config) { c.Shutdown = sim.ShutdownHang; c.StepTime = 5 * time.Millisecond })
	const n = 60
	r.Send(worker.Requests(n)...)
	r.Start(e.client(), func(w *worker.Worker) { w.Concurrency = 16; w.StallTimeout = time.Second })
	r.Wait(10)
	e.end()
	e.again() // it ends when its clients have left
	allOK(t, r.Wait(n), n)
	r.Settled(0)
}

// TestSimKilled: the engine dies as by kill -9.
func TestSimKilled(t *testing.T) {
	r := worker.NewRig(t)
	e := newEngine(t, func(c *sim.Config) { c.StepTime = 5 * time.Millisecond })
	const n = 120
	r.Send(worker.Requests(n)...)
	r.Start(e.client(), func(w *worker.Worker) { w.Concurrency = 16 })
	r.Wait(10)
	e.sim.Kill()
	e.again()
	allOK(t, r.Wait(n), n)
	r.Settled(0)
}

// TestSimHang: the scheduler stops, everything else looks well; then it goes on.
func TestSimHang(t *testing.T) {
	r := worker.NewRig(t)
	// Lines of all lengths: when the scheduler stops it has some. One that stops idle shows nothing when it goes on.
	e := newEngine(t, func(c *sim.Config) { c.OutputTokens = sim.Range{Min: 5, Max: 300} })
	const n = 60
	r.Send(worker.Requests(n)...)
	r.Start(e.client(), func(w *worker.Worker) {
		w.Concurrency = 8
		w.StallTimeout = 300 * time.Millisecond
		w.RetryEvery = time.Hour // it is the gauges that show it alive
	})
	r.Wait(5)
	faults(t, e, sim.Faults{Hang: true})
	r.State(proto.EngineHung)
	faults(t, e, sim.Faults{})
	allOK(t, r.Wait(n), n)
	r.Settled(0)
}

func faults(tb testing.TB, e *engine, f sim.Faults) {
	tb.Helper()
	if err := e.sim.SetFaults(f); err != nil {
		tb.Fatal(err)
	}
}

// TestSimFaults: a bad network and a bad engine at once; every line is done in the end.
func TestSimFaults(t *testing.T) {
	r := worker.NewRig(t)
	e := newEngine(t, func(c *sim.Config) {
		c.Seed = 7
		c.Faults = sim.Faults{Errors: map[int]float64{500: .05, 503: .05, 429: .03}, Abort: .03, Torn: .03, Reset: .03, Empty: .03, Garbage: .03, Slow: .1}
	})
	const n = 300
	r.Send(worker.Requests(n)...)
	r.Start(e.client(), func(w *worker.Worker) { w.Concurrency = 32; w.MaxAttempts = 10; w.SetRefusal(100 * time.Millisecond) })
	got := r.Wait(n)
	allOK(t, got, n)
	charged := 0
	for _, res := range got {
		charged += len(res.Attempts)
	}
	if charged == 0 {
		t.Error("no attempt was charged")
	}
	r.Settled(0)
}

// TestSimQueued: an engine that takes few (--max-num-queued-reqs).
func TestSimQueued(t *testing.T) {
	r := worker.NewRig(t)
	e := newEngine(t, func(c *sim.Config) { c.MaxQueued = 6 })
	const n = 60
	r.Send(worker.Requests(n)...)
	r.Start(e.client())
	got := r.Wait(n)
	allOK(t, got, n)
	for _, res := range got {
		if len(res.Attempts) > 0 {
			t.Fatalf("charged: %+v", res.Attempts)
		}
	}
}

// TestSimAuto: the limit follows the cache of the engine, which is never overrun. Others read in the heartbeat where its address is.
func TestSimAuto(t *testing.T) {
	r := worker.NewRig(t)
	e := newEngine(t, func(c *sim.Config) {
		c.KVTokens, c.MaxModelLen = 4096, 512
		c.OutputTokens = sim.Range{Min: 100, Max: 100}
	})
	const n = 100
	reqs := worker.Requests(n)
	for i, q := range reqs {
		q.Body = []byte(`{"model":"m","max_tokens":100,"messages":[{"role":"user","content":"` + strconv.Itoa(i) + `"}]}`)
	}
	r.Send(reqs...)
	r.Start(e.client())
	allOK(t, r.Wait(n), n)
	r.Until("heartbeat tells it", func() bool {
		got := r.State(proto.EngineReady)
		return got.KVTokens == 4096 && got.MaxLen == 512 && got.Limit >= 20 && got.Limit <= 100 && got.Simulated && got.OK == n && got.Network == broker.Network()
	})
}

// TestSimKey: an engine that wants a key gets it.
func TestSimKey(t *testing.T) {
	r := worker.NewRig(t)
	e := newEngine(t, func(c *sim.Config) { c.APIKey = "secret" })
	r.Send(worker.Requests(5)...)
	wrong, err := worker.NewHTTP("http://"+e.addr, "guess")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(wrong.Close)
	r.Start(wrong)
	if said := r.State(proto.EngineDenied).Reason; !strings.Contains(said, "refuses the key") || strings.Contains(said, "guess") {
		t.Errorf("it is said that %s", said)
	}
	r.Start(e.client())
	allOK(t, r.Wait(5), 5)
}

// TestSimTellsUse: a frontend that does not tell the capacity of the KV cache, as vLLM's in Rust. It is found from what the
// cache holds.
func TestSimTellsUse(t *testing.T) {
	r := worker.NewRig(t)
	e := newEngine(t, func(c *sim.Config) {
		c.StepTime, c.KVTokens, c.OutputTokens = 2*time.Millisecond, 32768, sim.Range{Min: 100, Max: 200}
	})
	to, err := url.Parse("http://" + e.addr)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(to)
	proxy.ModifyResponse = func(a *http.Response) error {
		if a.Request.URL.Path != "/metrics" {
			return nil
		}
		b, err := io.ReadAll(a.Body)
		b = []byte(strings.ReplaceAll(string(b), "vllm:cache_config_info", "vllm:other"))
		a.Body, a.ContentLength = io.NopCloser(bytes.NewReader(b)), int64(len(b))
		a.Header.Set("Content-Length", strconv.Itoa(len(b)))
		return err
	}
	front := httptest.NewServer(proxy)
	defer front.Close()
	client, err := worker.NewHTTP(front.URL, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	const n = 400
	r.Send(worker.Requests(n)...)
	r.Start(client)
	allOK(t, r.Wait(n), n)
	var found int64
	r.Until("the capacity is found", func() bool {
		found = r.State(proto.EngineReady).KVTokens
		return found > 0
	})
	if found < 32768*7/10 || found > 32768*13/10 {
		t.Errorf("KV cache of %d tokens, it has 32768", found)
	}
}
