package worker

import (
	"bytes"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/proto"
)

// said collects what a worker logs.
type said struct {
	mu  sync.Mutex
	out bytes.Buffer
}

func (s *said) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.Write(b)
}

func (s *said) times(text string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Count(s.out.String(), text)
}

// TestRefusing: an engine that answers nothing but "not now" is told of, once, until it answers. No line is charged.
func TestRefusing(t *testing.T) {
	for _, c := range []struct {
		name   string
		work   func(http.ResponseWriter, *http.Request, string)
		reason string
	}{
		{"overload", says(503, busyBody), "refuses requests: HTTP 503: The engine is currently busy"},
		{"rate limit", says(429, "slow down"), "refuses requests: HTTP 429"},
		{"abort", says(200, lostBody), "refuses requests: HTTP 200: the engine gave the request up"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, f := newRig(t), newFake(t)
			f.set(func() { f.work = c.work })
			r.send(requests(5)...)
			var log said
			r.start(f.engine(), func(w *Worker) {
				w.Concurrency, w.refusal, w.RetryEvery = 2, time.Millisecond, 200*time.Millisecond
				w.Log = slog.New(slog.NewTextHandler(&log, nil))
			})
			r.reason(proto.EngineWaiting, c.reason)
			f.enter(len(f.came) + 5) // it tries on
			f.set(func() { f.work = f.ok })
			r.unblamed(5)
			r.state(proto.EngineReady)
			if n := log.times("refuses requests"); n != 1 {
				t.Errorf("logged %d times", n)
			}
		})
	}
}

// TestRefusingSoon: what an engine that has answered nothing well refuses with is known long before a line is tried again.
func TestRefusingSoon(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() {
		f.work = func(w http.ResponseWriter, _ *http.Request, _ string) {
			w.Header().Set("Retry-After", "300")
			say(w, 503, busyBody)
		}
	})
	r.send(request(0))
	r.start(f.engine(), func(w *Worker) { w.RetryEvery, w.ProbeEvery = time.Hour, time.Hour })
	r.reason(proto.EngineWaiting, "refuses requests: HTTP 503")
}

// TestStoppedEarly: who stops a worker for a cause hears what kept its engine from working; who has no more work does not.
func TestStoppedEarly(t *testing.T) {
	for _, c := range []struct {
		name   string
		work   func(http.ResponseWriter, *http.Request, string)
		cause  error
		reason string
	}{
		{"refused", says(503, busyBody), errStopped, "refuses requests: HTTP 503: The engine is currently busy"},
		{"denied", says(401, unauthStr), errStopped, "HTTP 401"},
		{"no more work", says(503, busyBody), nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, f := newRig(t), newFake(t)
			f.set(func() { f.work = c.work })
			r.send(request(0))
			reg := prometheus.NewRegistry()
			var log said
			w := r.start(f.engine(), func(w *Worker) {
				w.RetryEvery, w.Registry, w.Log = time.Hour, reg, slog.New(slog.NewTextHandler(&log, nil))
			})
			r.until("the line is given back", func() bool {
				return labelled(t, reg, "millrace_worker_given_back_total", "reason", "busy")+labelled(t, reg, "millrace_worker_given_back_total", "reason", "denied") > 0
			})
			w.interrupt(c.cause)
			w.end(t)
			if told := log.times("stopped while the engine could not be used") > 0; told != (c.reason != "") || told && log.times(c.reason) == 0 {
				t.Errorf("log:\n%s", log.out.String())
			}
		})
	}
}

// TestRefusingBeside: an engine that refuses some while it works on another is busy, and no more than that.
func TestRefusingBeside(t *testing.T) {
	r, f := newRig(t), newFake(t)
	release := make(chan struct{})
	f.set(func() {
		f.work = func(w http.ResponseWriter, q *http.Request, body string) {
			if strings.Contains(body, `"0"`) {
				after(release)(w, q, body)
				return
			}
			say(w, 503, busyBody)
		}
	})
	r.send(request(0))
	r.start(f.engine(), func(w *Worker) { w.Concurrency, w.refusal, w.RetryEvery = 64, time.Millisecond, 50*time.Millisecond })
	f.enter(1)
	r.send(request(1))
	f.enter(8)
	if got := r.state(proto.EngineReady); got.Reason != "" {
		t.Errorf("it is said that %s", got.Reason)
	}
	close(release)
	r.wait(1)
	r.reason(proto.EngineWaiting, "refuses requests")
	f.set(func() { f.work = f.ok })
	r.unblamed(2)
}

// TestRefusingOver: when the job is cancelled, nothing is refused any more, and the worker says so.
func TestRefusingOver(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = says(503, busyBody) })
	r.send(request(0))
	r.start(f.engine(), func(w *Worker) { w.refusal = time.Millisecond })
	r.reason(proto.EngineWaiting, "refuses requests")
	r.control("j", proto.WantCancel)
	r.state(proto.EngineReady)
}

// TestRefusingRarely: two refusals are not one long one, however long it is from one to the other.
func TestRefusingRarely(t *testing.T) {
	g := aloneGate(t)
	for range 3 {
		g.refused("busy", -2*g.retry) // it is over already
	}
	if g.refusals.reason != "" {
		t.Errorf("it is said that %s", g.refusals.reason)
	}
	g.refused("busy", time.Hour)
	g.refusals.since = g.refusals.since.Add(-g.retry) // as if it went on
	g.refused("busy", time.Hour)
	if state, reason := g.stateWell(); state != proto.EngineWaiting || reason == "" {
		t.Errorf("state %s, reason %q", state, reason)
	}
	g.close(tripDenied, proto.EngineDenied, "no key")
	if !g.refusals.since.IsZero() {
		t.Error("the trip tells more")
	}
}

// aloneGate is a gate of an engine that is ready, without a worker around it.
func aloneGate(t *testing.T) *gate {
	return &gate{engine: newFake(t).engine(), log: slog.New(slog.DiscardHandler), retry: time.Minute, status: Status{State: proto.EngineReady},
		opened: func() {}, inside: func(time.Time) bool { return false }, kick: make(chan struct{}, 1)}
}
