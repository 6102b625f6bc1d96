package worker

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"millrace/broker"
	"millrace/proto"
	"millrace/worker/load"
)

// TestGateStates goes through what keeps an engine from being used, and lets it get well each time.
func TestGateStates(t *testing.T) {
	for _, c := range []struct {
		name   string
		ill    func(*fake)
		state  string
		reason string
	}{
		{"loading", func(f *fake) { f.health = 503 }, proto.EngineWaiting, "503"},
		{"key", func(f *fake) { f.listed = 401 }, proto.EngineDenied, "refuses the key that it was given (HTTP 401); give the right one with --engine-api-key"},
		{"forbidden", func(f *fake) { f.listed = 403 }, proto.EngineDenied, "refuses the key that it was given (HTTP 403)"},
		{"no model", func(f *fake) { f.models = "" }, proto.EngineNoModel, "no model"},
		{"asleep", func(f *fake) { f.metrics = `vllm:engine_sleep_state{engine="0",sleep_state="awake"} 0.0` }, proto.EngineWaiting, "asleep"},
		{"not an engine", func(f *fake) { f.listed = 404 }, proto.EngineWaiting, "/v1/models says 404 Unauthorized; is that an OpenAI-compatible engine? check --engine: http://"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, f := newRig(t), newFake(t)
			f.set(func() { c.ill(f) })
			r.send(request(0))
			r.start(f.engine())
			r.reason(c.state, c.reason)
			f.set(func() { f.health, f.listed, f.models, f.metrics = 200, 200, `"m"`, "" })
			if got := r.wait(1)[0]; !got.OK || got.LoadUS == 0 || got.StartUS < got.LoadUS {
				t.Errorf("result %+v", got)
			}
			r.settled(0)
		})
	}
}

// TestDenial: who gave a key hears that it is refused, who gave none that one is wanted; no key is ever shown.
func TestDenial(t *testing.T) {
	for _, c := range []struct{ url, key, said, want string }{
		{"http://h", "", "", "engine wants a key (HTTP 401); give one with --engine-api-key"},
		{"http://h", "", "Unauthorized", "engine wants a key (HTTP 401: Unauthorized); give one"},
		{"http://h", "", "HTTP 401 Unauthorized", "engine wants a key (HTTP 401); give one"},
		{"http://h", "s3cret", "", "engine refuses the key that it was given (HTTP 401); give the right one with --engine-api-key"},
		{"http://h", "s3cret", "no such key: s3cret", "refuses the key that it was given (HTTP 401: no such key: xxxxx)"},
		{"http://me:s3cret@h", "", "no such key: s3cret", "refuses the key that it was given (HTTP 401: no such key: xxxxx)"},
	} {
		h, err := NewHTTP(c.url, c.key)
		must(t, err)
		if got := denial(h, 401, c.said); !strings.Contains(got, c.want) || strings.Contains(got, "s3cret") {
			t.Errorf("%s %q %q: %s", c.url, c.key, c.said, got)
		}
	}
}

// TestGateSaysOnce: an engine that breaks every connection is told of once; each connection has another port of ours.
func TestGateSaysOnce(t *testing.T) {
	r := newRig(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	broken := make(chan struct{}, 1000)
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_ = c.(*net.TCPConn).SetLinger(0) // closing resets it
			_, _ = c.Read(make([]byte, 1))
			c.Close()
			broken <- struct{}{}
		}
	})
	t.Cleanup(func() {
		ln.Close()
		accepting.Wait()
	})
	e, err := NewHTTP("http://"+ln.Addr().String(), "")
	must(t, err)
	t.Cleanup(e.Close)
	var log said
	r.start(e, func(w *Worker) { w.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	for range 20 {
		select {
		case <-broken:
		case <-time.After(patient):
			t.Fatal("the engine is not asked")
		}
	}
	if n := log.times("engine cannot be used"); n != 1 {
		t.Errorf("said %d times:\n%s", n, log.out.String())
	}
}

// TestGateRefused: an engine that loads refuses connections.
func TestGateRefused(t *testing.T) {
	r := newRig(t)
	addr := freeAddr(t)
	e, err := NewHTTP("http://"+addr+"/v1/", "")
	must(t, err)
	t.Cleanup(e.Close)
	r.send(request(0))
	r.start(e)
	r.reason(proto.EngineWaiting, "refuses connections; still loading?")
	f := &fake{tb: t, came: make(chan string, 10), health: 200, listed: 200, models: `"m"`}
	f.work = f.ok
	ln, err := net.Listen("tcp", addr)
	must(t, err)
	f.Server = &httptest.Server{Listener: ln, Config: &http.Server{Handler: f}}
	f.Server.Start()
	t.Cleanup(f.Server.Close)
	if !r.wait(1)[0].OK {
		t.Error("not ok")
	}
}

// TestGateScheme: an engine that is named with the wrong scheme, or whose certificate nobody here trusts.
func TestGateScheme(t *testing.T) {
	plain, safe := httptest.NewServer(http.NotFoundHandler()), httptest.NewUnstartedServer(http.NotFoundHandler())
	safe.Config.ErrorLog = log.New(io.Discard, "", 0) // what the server says of our handshakes
	safe.StartTLS()
	t.Cleanup(plain.Close)
	t.Cleanup(safe.Close)
	for url, want := range map[string]string{
		strings.Replace(plain.URL, "http:", "https:", 1): "engine at https://127.0.0.1:%s has no TLS; name it http://127.0.0.1:%[1]s",
		strings.Replace(safe.URL, "https:", "http:", 1):  "engine at http://127.0.0.1:%s wants TLS; name it https://127.0.0.1:%[1]s",
		safe.URL: "engine at https://127.0.0.1:%s has a certificate that this machine does not trust (certificate signed by unknown authority",
	} {
		e, err := NewHTTP(url, "")
		must(t, err)
		r := newRig(t)
		r.send(request(0))
		r.start(e)
		r.reason(proto.EngineWaiting, fmt.Sprintf(want, url[strings.LastIndexByte(url, ':')+1:]))
		e.Close()
	}
}

// TestGateModelAway: a model the engine was asked to serve and does not know. The line stays in the queue.
func TestGateModelAway(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() {
		f.models = `"other"`
		f.work = says(404, recording(t, file032, "err_unknown_model").Body)
	})
	r.send(request(0))
	r.start(f.engine(), func(w *Worker) { w.Models = []string{"m"} })
	r.reason(proto.EngineNoModel, "does not know m; it serves other")
	r.settled(1)
	f.set(func() { f.models, f.work = `"other","m"`, f.ok })
	if got := r.wait(1)[0]; !got.OK || len(got.Attempts) != 0 {
		t.Errorf("result %+v", got)
	}
}

// TestGateModels: what an engine serves may change.
func TestGateModels(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.models = `"base"` })
	r.send(request(0))
	r.start(f.engine())
	r.state(proto.EngineReady)
	r.settled(1)
	f.set(func() { f.models = `"base","m"` })
	if !r.wait(1)[0].OK {
		t.Error("not ok")
	}
}

// TestDegradedForGood: a worker whose engine fails all lines alike stops, as long as another one is there.
func TestDegradedForGood(t *testing.T) {
	r, f := newRig(t), newFake(t)
	const n = 200
	f.set(func() { f.work = says(400, recording(t, file032, "err_temperature_9").Body) })
	r.rival()
	r.send(requests(n)...)
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 4; w.RetryEvery = 20 * time.Millisecond })
	r.reason(proto.EngineDegraded, "alike")
	f.enter(equalLimit + 2*patience) // it tries on, one by one
	f.set(func() { f.work = f.ok })
	r.unblamed(n)
}

// TestDegradedOfAnyKind: whatever an engine fails all lines with, none fails for it while another worker is there.
func TestDegradedOfAnyKind(t *testing.T) {
	torn := func(w http.ResponseWriter, q *http.Request, body string) {
		w.Header().Set("Content-Length", "1000")
		say(w, 200, okBody)
	}
	kinds := map[string]func(http.ResponseWriter, *http.Request, string){"torn": torn, "reset": cut, "empty": says(200, ""),
		"no such model": says(404, `{"error":{"message":"The model `+"`m`"+` does not exist.","type":"NotFoundError","param":"model","code":404}}`)}
	for _, status := range []int{400, 402, 404, 405, 406, 410, 413, 415, 422, 431, 451, 500, 501} {
		kinds[strconv.Itoa(status)] = says(status, fmt.Sprintf(`{"error":{"message":"no","type":"x","param":"p","code":%d}}`, status))
	}
	for name, work := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, f := newRigAt(t, &broker.Server{Dir: t.TempDir()}, 0), newFake(t)
			const n = 100
			f.set(func() { f.work = work })
			r.rival()
			r.send(requests(n)...)
			r.start(f.engine(), func(w *Worker) {
				w.Concurrency, w.refusal, w.RetryEvery, w.grace = 32, time.Millisecond, 20*time.Millisecond, 50*time.Millisecond
			})
			r.reason(proto.EngineDegraded, "in a row alike: ")
			f.enter(32 + patience) // it tries on, one by one
			f.set(func() { f.work = f.ok })
			for i, res := range exactly(t, r.wait(n), n) {
				if !res.OK {
					t.Errorf("index %d: %+v", i, res)
				}
			}
			r.settled(0)
		})
	}
}

// TestDegradedLate: of a worker whose engine was well, those lines fail that show that it is not any more.
func TestDegradedLate(t *testing.T) {
	r, f := newRig(t), newFake(t)
	const n = 100
	r.rival()
	r.send(request(0))
	r.start(f.engine(), func(w *Worker) { w.Concurrency, w.RetryEvery, w.refusal = 8, 20*time.Millisecond, time.Millisecond })
	r.wait(1)
	f.set(func() { f.work = says(400, recording(t, file032, "err_temperature_9").Body) })
	r.send(requests(n)[1:]...)
	r.reason(proto.EngineDegraded, "alike")
	f.enter(len(f.came) + 8 + patience) // it tries on, when nothing else is in flight
	f.set(func() { f.work = f.ok })
	failed := 0
	for _, res := range exactly(t, r.wait(n), n) {
		if !res.OK {
			failed++
		}
	}
	if failed > equalLimit {
		t.Errorf("%d lines failed", failed)
	}
	r.settled(0)
}

// TestDegradedRivalLeaves: when nobody else is left, the lines are let fail. One by one they would take minutes.
func TestDegradedRivalLeaves(t *testing.T) {
	r, f := newRig(t), newFake(t)
	const n = 1000
	f.set(func() { f.work = says(400, recording(t, file032, "err_temperature_9").Body) })
	r.rival()
	r.send(requests(n)...)
	r.start(f.engine(), func(w *Worker) { w.RetryEvery = 100 * time.Millisecond })
	r.reason(proto.EngineDegraded, "alike")
	r.noRival()
	exactly(t, r.wait(n), n)
}

// TestDegradedRivalComes: the lines are let fail because nobody else is there, until somebody is.
func TestDegradedRivalComes(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = says(400, recording(t, file032, "err_temperature_9").Body) })
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 4; w.RetryEvery = 20 * time.Millisecond })
	n := 0
	next := func(k int) {
		for range k {
			r.send(request(n))
			n++
		}
	}
	next(100)
	r.reason(proto.EngineDegraded, "let fail")
	exactly(t, r.wait(n), n)
	r.rival()
	r.until("the gate is closed again", func() bool {
		next(1)
		return strings.Contains(r.state(proto.EngineDegraded).Reason, "in a row")
	})
	had := n
	next(200)
	f.enter(len(f.came) + patience) // it tries on, one by one
	f.set(func() { f.work = f.ok })
	ok := 0
	for _, res := range exactly(t, r.wait(n), n) {
		if res.OK {
			ok++
		}
	}
	if ok < 100 {
		t.Errorf("%d of %d lines were answered well, %d of them came after the gate closed", ok, n, n-had)
	}
}

// TestOthersUnknown: where nobody can tell whether another worker serves the model, one may.
func TestOthersUnknown(t *testing.T) {
	r := newRig(t)
	b := &beat{js: r.conn.JS, id: "us"}
	if b.others(t.Context(), "m") {
		t.Error("nobody is there")
	}
	r.rival()
	if !b.others(t.Context(), "m") || b.others(t.Context(), "other") {
		t.Error("the rival serves m alone")
	}
	r.noRival()
	if b.others(t.Context(), "m") {
		t.Error("the rival has left")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if !b.others(ctx, "m") {
		t.Error("the broker did not answer")
	}
	must(t, r.conn.JS.DeleteKeyValue(t.Context(), proto.WorkersBucket))
	if !b.others(t.Context(), "m") {
		t.Error("the bucket is gone")
	}
}

// TestDegradedAlone: a job whose every line is wrong ends, also at an engine that never answered one.
func TestDegradedAlone(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = says(400, recording(t, file032, "err_temperature_9").Body) })
	r.send(requests(100)...)
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 4 })
	r.state(proto.EngineDegraded)
	for _, res := range exactly(t, r.wait(100), 100) {
		if res.OK || res.Code != proto.CodeInvalidRequest {
			t.Fatalf("result %+v", res)
		}
	}
}

// TestDegradedProven: an engine that has answered before is believed at once when nobody else is there.
func TestDegradedProven(t *testing.T) {
	r, f := newRig(t), newFake(t)
	var bad atomic.Bool
	f.set(func() {
		f.work = func(w http.ResponseWriter, q *http.Request, body string) {
			if bad.Load() {
				say(w, 400, recording(t, file032, "err_temperature_9").Body)
				return
			}
			say(w, 200, okBody)
		}
	})
	r.start(f.engine(), func(w *Worker) { w.RetryEvery = time.Hour })
	r.send(request(0))
	r.wait(1)
	bad.Store(true)
	for i := 1; i < 100; i++ {
		r.send(request(i))
	}
	exactly(t, r.wait(100), 100)
}

// TestDeniedByLine: an engine that lists its models to everyone and works only for those with a key.
func TestDeniedByLine(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = says(401, unauthStr) })
	r.send(requests(5)...)
	r.start(f.engine())
	r.state(proto.EngineDenied)
	f.enter(2) // the gate lets one through after a while
	f.set(func() { f.work = f.ok })
	for _, res := range exactly(t, r.wait(5), 5) {
		if !res.OK || len(res.Attempts) > 0 {
			t.Errorf("result %+v", res)
		}
	}
}

// TestHung: the engine takes requests, looks well, and makes no token.
func TestHung(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.metrics, f.work = gauges(3, 100), blocks })
	r.send(requests(3)...)
	r.start(f.engine(), func(w *Worker) { w.StallTimeout = 200 * time.Millisecond; w.RetryEvery = time.Hour })
	f.enter(3)
	r.state(proto.EngineHung)
	r.settled(3) // given back at once
	f.set(func() { f.metrics, f.work = gauges(0, 100), f.ok })
	for _, res := range exactly(t, r.wait(3), 3) {
		if !res.OK || len(res.Attempts) != 0 {
			t.Errorf("result %+v", res)
		}
	}
}

// TestHungTakesNoMore: when the lines that a hung engine has are let go of, their places are not taken by others.
func TestHungTakesNoMore(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.metrics, f.work = gauges(16, 100), blocks })
	r.send(requests(200)...)
	r.start(f.engine(), func(w *Worker) {
		w.Concurrency, w.StallTimeout, w.ProbeEvery, w.RetryEvery = 64, 500*time.Millisecond, 50*time.Millisecond, time.Hour
	})
	f.enter(64)
	r.state(proto.EngineHung)
	r.settled(200)
	if n := len(f.came); n > 0 {
		t.Errorf("%d lines were begun at an engine that was known to hang", n)
	}
}

// TestHungIdle: an engine that stopped while it was idle never counts what came after; one line at a time tries it.
func TestHungIdle(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.metrics, f.work = gauges(0, 100), blocks })
	r.send(requests(2)...)
	r.start(f.engine(), func(w *Worker) { w.StallTimeout = 100 * time.Millisecond })
	r.state(proto.EngineHung)
	f.enter(3)
	f.set(func() { f.work = f.ok })
	exactly(t, r.wait(2), 2)
}

// TestSlowIsNotHung: tokens move, or lines end.
func TestSlowIsNotHung(t *testing.T) {
	var h hangWatch
	now, g := time.Now(), load.Gauges{Known: true, Running: 1, Generation: 5}
	step := func(d time.Duration, inFlight, answers int) bool {
		now = now.Add(d)
		return h.stalled(now, g, inFlight, answers, time.Minute)
	}
	step(0, 1, 0)
	if step(59*time.Second, 1, 0) {
		t.Error("too early")
	}
	g.Generation++
	if step(30*time.Second, 1, 0) || step(59*time.Second, 1, 0) {
		t.Error("tokens moved")
	}
	if step(time.Second, 1, 1) || step(59*time.Second, 1, 1) {
		t.Error("a line ended")
	}
	if step(time.Second, 0, 1) || step(59*time.Second, 1, 1) {
		t.Error("it had nothing to do")
	}
	if !step(2*time.Second, 1, 1) {
		t.Error("it hangs")
	}
	g.Known = false
	if step(time.Hour, 1, 1) {
		t.Error("no metrics")
	}
}
