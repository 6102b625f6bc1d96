package worker

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/nats-io/nats.go"

	"millrace/proto"
)

// TestSick: of an engine that fails most requests in many ways it is said what it does, until it does well. It is used
// all the while, and no line fails for it.
func TestSick(t *testing.T) {
	r, f := newRig(t), newFake(t)
	const n = 300
	var calls atomic.Int64
	ways := []func(http.ResponseWriter, *http.Request, string){f.ok, says(500, "boom"), f.ok, says(503, busyBody), says(200, lostBody), says(200, ""), cut, cut}
	f.set(func() {
		f.work = func(w http.ResponseWriter, q *http.Request, body string) {
			ways[calls.Add(1)%int64(len(ways))](w, q, body)
		}
	})
	var log said
	r.send(requests(n)...)
	r.start(f.engine(), func(w *Worker) {
		w.Concurrency, w.refusal, w.grace, w.MaxAttempts = 4, time.Millisecond, 5*time.Millisecond, 1000
		w.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	r.reason(proto.EngineReady, "of the last ")
	for _, w := range r.workers() {
		if !strings.Contains(w.Reason, "HTTP 500: ") || !strings.Contains(w.Reason, "HTTP 503: ") || !strings.Contains(w.Reason, "aborted: ") ||
			!strings.Contains(w.Reason, "no whole answer: ") { // broken connections are judged later
			t.Errorf("it is said that %s", w.Reason)
		}
	}
	for _, res := range exactly(t, r.wait(n), n) {
		if !res.OK {
			t.Errorf("result %+v", res)
		}
	}
	f.set(func() { f.work = f.ok })
	for i := range 50 {
		r.send(request(n + i))
	}
	exactly(t, r.wait(n+50), n+50)
	r.until("nothing is said any more", func() bool {
		ws := r.workers()
		return len(ws) == 1 && ws[0].Reason == ""
	})
	if n := log.times("engine fails many requests"); n < 1 || n > 3 { // more than once only where that lasts
		t.Errorf("logged %d times", n)
	}
}

// TestSickConnections: of an engine that breaks most of its answers off, and is well otherwise, it is said.
func TestSickConnections(t *testing.T) {
	r, f := newRig(t), newFake(t)
	const n = 200
	var calls atomic.Int64
	f.set(func() {
		f.work = func(w http.ResponseWriter, q *http.Request, body string) {
			if calls.Add(1)%3 == 0 {
				f.ok(w, q, body)
				return
			}
			w.Header().Set("Content-Length", "100") // one that broke before its answer may have been idle
			_, _ = w.Write([]byte("{"))
			panic(http.ErrAbortHandler)
		}
	})
	r.send(requests(n)...)
	r.start(f.engine(), func(w *Worker) {
		w.Concurrency, w.RetryEvery, w.grace, w.MaxAttempts = 4, time.Millisecond, 5*time.Millisecond, 1000
	})
	r.reason(proto.EngineReady, "(connection broke: ")
	f.set(func() { f.work = f.ok })
	exactly(t, r.wait(n), n)
}

// TestHealth: when a word on an engine is due, and what it is.
func TestHealth(t *testing.T) {
	var h health
	now := time.Now()
	count := func(how string, n int) (due bool) {
		for range n {
			due = h.count(how, now)
		}
		return due
	}
	if count("HTTP 500", sickLeast-1) {
		t.Error("too few to tell by")
	}
	if !count("HTTP 500", 1) {
		t.Error("it fails all")
	}
	if count(healthy, sickLeast) {
		t.Error("half of them are answered well")
	}
	if !count("aborted", 2) {
		t.Error("most are not answered well")
	}
	h.judge("E", now)
	if want := "engine at E answered 20 of the last 42 requests well (HTTP 500: 20, aborted: 2); the others are tried again"; h.text != want {
		t.Errorf("%q, want %q", h.text, want)
	}
	if count("aborted", 50) {
		t.Error("it was said a moment ago")
	}
	now = now.Add(sickAnew)
	if !count("aborted", 1) {
		t.Error("it is time to say it again")
	}
	h.judge("E", now)
	if !strings.Contains(h.text, "answered 0 of the last 50 requests well (aborted: 50)") {
		t.Errorf("%q", h.text)
	}
	if count(healthy, 37) {
		t.Error("it is not well yet")
	}
	if !count(healthy, 1) {
		t.Error("three quarters are answered well")
	}
	if h.judge("E", now); h.text != "" {
		t.Errorf("%q", h.text)
	}
	now = now.Add(sickAnew + 1)
	if count("aborted", sickLeast-1) {
		t.Error("what was long ago counts")
	}
}

// TestDiary: a state that comes and goes is logged once, and again when it lasts; so is another reason for the same state.
func TestDiary(t *testing.T) {
	var d diary
	start := time.Now()
	for _, s := range []struct {
		at            time.Duration
		state, reason string
		want          bool
	}{
		{0, proto.EngineReady, "", true},
		{time.Second, proto.EngineReady, "", false},
		{2 * time.Second, proto.EngineDegraded, "failed 20", true},
		{2 * time.Second, proto.EngineDegraded, "failed 21", false},
		{3 * time.Second, proto.EngineReady, "", false},
		{4 * time.Second, proto.EngineDegraded, "failed 20", false},
		{5 * time.Second, proto.EngineReady, "", false},
		{6 * time.Second, proto.EngineWaiting, "gone", true}, // another one
		{7 * time.Second, proto.EngineReady, "", false},
		{12 * time.Second, proto.EngineReady, "", true}, // it lasts
		{13 * time.Second, proto.EngineReady, "answered 3 of 50", true},
		{72 * time.Second, proto.EngineReady, "answered 4 of 50", false},
		{73 * time.Second, proto.EngineReady, "answered 4 of 50", true}, // other figures
		{74 * time.Second, proto.EngineDegraded, "failed 20", true},     // it was long ago
		{9 * time.Minute, proto.EngineDegraded, "failed 21", false},
		{10 * time.Minute, proto.EngineWaiting, "gone", true},
		{10*time.Minute + time.Second, proto.EngineWaiting, "health", false}, // of the same death
		{10*time.Minute + 2*time.Second, proto.EngineDenied, "key", true},
		{10*time.Minute + 3*time.Second, proto.EngineDenied, "another key", false},
		{10*time.Minute + 8*time.Second, proto.EngineDenied, "another key", true},
	} {
		if got := d.due(s.state, s.reason, start.Add(s.at)); got != s.want {
			t.Errorf("at %v %s %q: %v", s.at, s.state, s.reason, got)
		}
	}
	if len(d.at) != 3 {
		t.Errorf("%d states are kept", len(d.at))
	}
}

// TestRefusedByChance: a line that the engine refuses again and again while it answers others waits for 8 units at most.
func TestRefusedByChance(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() {
		f.work = func(w http.ResponseWriter, q *http.Request, body string) {
			if strings.Contains(body, `"0"`) {
				say(w, 503, busyBody)
				return
			}
			say(w, 200, okBody)
		}
	})
	delays := make(chan time.Duration, 1<<10)
	_, err := r.conn.NC.Subscribe("$JS.ACK.>", func(m *nats.Msg) {
		var said struct {
			Delay int64 `json:"delay"` // ns
		}
		if _, body, ok := strings.Cut(string(m.Data), "-NAK "); ok && json.Unmarshal([]byte(body), &said) == nil {
			delays <- time.Duration(said.Delay)
		}
	})
	must(t, err)
	r.start(f.engine(), func(w *Worker) { w.refusal, w.MaxAttempts = 8*time.Millisecond, 1 })
	r.send(request(1))
	r.wait(1)
	r.send(request(0))
	r.wait(2)
	n := len(delays)
	for range n {
		if d := <-delays; d > 8*8*time.Millisecond*6/5 {
			t.Errorf("it was given back for %v", d)
		}
	}
	if n != 29 {
		t.Errorf("it was given back %d times", n)
	}
}

// TestDeathIsNoSickness: of an engine that died it is said that it did, and not that it fails many requests: not while it still
// looks well, nor when it is back.
func TestDeathIsNoSickness(t *testing.T) {
	r, m, addr := newRig(t), newMortal(t), freeAddr(t)
	serve := func() *httptest.Server {
		ln, err := net.Listen("tcp", addr)
		must(t, err)
		s := &httptest.Server{Listener: ln, Config: &http.Server{Handler: m.f}}
		s.Start()
		t.Cleanup(s.Close)
		return s
	}
	first := serve()
	m.f.set(func() { // on a connection that was used before it may be chance
		m.f.work = func(w http.ResponseWriter, _ *http.Request, _ string) {
			w.Header().Set("Connection", "close")
			say(w, 200, okBody)
		}
	})
	e, err := NewHTTP("http://"+addr, "")
	must(t, err)
	t.Cleanup(e.Close)
	const n = 30
	var log said
	r.send(requests(sickLeast)...)
	r.start(e, func(w *Worker) {
		w.Concurrency, w.RetryEvery, w.grace = n, time.Millisecond, patient
		w.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	r.wait(sickLeast)
	m.mu.Lock()
	m.held = n
	m.mu.Unlock()
	m.f.set(func() { m.f.work = m.work })
	for i := range n {
		r.send(request(sickLeast + i))
	}
	r.until("all lines are held", func() bool { return m.toHold() == 0 })
	m.f.set(func() { m.f.work = blocks }) // it takes no more
	m.mu.Lock()
	close(m.dead)
	m.mu.Unlock()
	r.until("all connections have broken", func() bool {
		ws := r.workers()
		return len(ws) == 1 && strings.Contains(ws[0].LastError, "connection broke") && ws[0].InFlight == 0
	})
	first.Close()
	r.reason(proto.EngineWaiting, "does not answer any more; it died or was stopped, or is starting again")
	m.f.set(func() { m.f.work = m.f.ok })
	serve()
	exactly(t, r.wait(sickLeast+n), sickLeast+n)
	r.state(proto.EngineReady)
	if log.times("engine fails many requests") > 0 {
		t.Errorf("it is said: %s", log.out.String())
	}
}

// TestDeadGateForgets: what was refused when the engine had died, before a probe found that, tells nothing of it when it is back.
func TestDeadGateForgets(t *testing.T) {
	g := aloneGate(t)
	g.stall, g.busy, g.found = time.Minute, func() int { return 0 }, func(Status) {}
	ready := g.status
	at := time.Now()
	note := func(c class, n int) {
		for range n {
			g.note(&outcome{line: &line{}, verdict: verdict{class: c}})
		}
	}
	note(classUnreached, 2*sickLeast)
	g.take(at, Status{}, fmt.Errorf("dial tcp: %w", syscall.ECONNREFUSED))
	note(classUnreached, 2*sickLeast)
	g.take(at, ready, nil)
	if n, _ := g.health.share(); n > 0 || g.health.text != "" {
		t.Errorf("of %d requests: %q", n, g.health.text)
	}
	note(classUnreached, 1)
	if n, _ := g.health.share(); n != 1 {
		t.Error("nothing counts any more")
	}
	for _, kind := range []tripKind{tripDead, tripUnreached} {
		note(classRetry, sickLeast)
		g.close(kind, proto.EngineWaiting, "engine died")
		note(classRetry, sickLeast)
		if n, _ := g.health.share(); n > 0 {
			t.Errorf("%d requests of a death, of kind %d, count", n, kind)
		}
		g.trip = nil
	}
}

// TestFlaky: of an engine that fails its requests it is said also where a probe now and then does not find it ready.
func TestFlaky(t *testing.T) {
	g := aloneGate(t)
	g.stall, g.retry, g.busy, g.found = time.Minute, 0, func() int { return 0 }, func(Status) {}
	ready := g.status
	for range 3 {
		for range sickLeast - 1 {
			g.note(&outcome{line: &line{}, verdict: verdict{class: classRetry}, answer: Answer{Status: 500}})
		}
		g.take(time.Now(), Status{State: proto.EngineWaiting, Ill: true, Reason: "/health says 503"}, nil)
		g.take(time.Now(), Status{}, errors.New("read: connection reset by peer"))
		g.take(time.Now(), ready, nil)
	}
	if want := "answered 0 of the last 20 requests well (HTTP 500: 20)"; !strings.Contains(g.health.text, want) {
		t.Errorf("it is said that %q, want %q", g.health.text, want)
	}
}
