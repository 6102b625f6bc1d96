package worker

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"millrace/proto"
	"millrace/worker/load"
)

// hands are a Keeper in the hand of a test.
type hands struct {
	changed chan struct{}
	asked   chan string // causes of restarts that the worker wanted

	mu            sync.Mutex
	state, reason string
}

func newHands() *hands { return &hands{changed: make(chan struct{}, 1), asked: make(chan string, 100)} }

func (h *hands) set(state, reason string) {
	h.mu.Lock()
	h.state, h.reason = state, reason
	h.mu.Unlock()
	h.changed <- struct{}{}
}

func (h *hands) State() (state, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state, h.reason
}

func (h *hands) Changed() <-chan struct{} { return h.changed }
func (h *hands) Restart(cause string)     { h.asked <- cause }

// TestKeeperSaysDead: the end of the engine's process is news at once, whatever still answers in its place; what it had is
// suspected.
func TestKeeperSaysDead(t *testing.T) {
	r, f, h := newRig(t), newFake(t), newHands()
	f.set(func() { f.work = blocks })
	r.send(requests(3)...)
	r.start(f.engine(), func(w *Worker) { w.Keeper, w.ProbeEvery = h, time.Hour })
	f.enter(3)
	h.set(proto.EngineWaiting, "engine died: by hand")
	if w := r.state(proto.EngineWaiting); w.Reason != "engine died: by hand" {
		t.Errorf("reason %q", w.Reason)
	}
	r.until("its lines are suspected", func() bool {
		suspected := func(q *proto.Request) bool { return q.Suspicions == 1 }
		all := r.takeAll()
		return len(all) == 3 && !slices.ContainsFunc(all, func(q *proto.Request) bool { return !suspected(q) })
	})
	f.set(func() { f.work = f.ok })
	h.set("", "")
	for _, res := range exactly(t, r.wait(3), 3) {
		if !res.OK || len(res.Attempts) != 0 {
			t.Errorf("result %+v", res)
		}
	}
	select {
	case cause := <-h.asked:
		t.Errorf("a restart was wanted for %s, of an engine that is being started again", cause)
	default:
	}
}

// TestKeeperGivesUp: nothing is pulled for an engine that is given up, and it is said why.
func TestKeeperGivesUp(t *testing.T) {
	r, f, h := newRig(t), newFake(t), newHands()
	h.state, h.reason = proto.EngineDegraded, "engine is given up"
	r.send(requests(3)...)
	r.start(f.engine(), func(w *Worker) { w.Keeper, w.Coming = h, []string{"m"} })
	if w := r.state(proto.EngineDegraded); w.Reason != "engine is given up" || w.GivenUp != w.Reason || w.Pending() || !slices.Equal(w.Models, []string{"m"}) {
		t.Errorf("%+v", w)
	}
	r.settled(3)
	if len(f.came) > 0 {
		t.Error("it was asked")
	}
}

// TestKeeperRemembers: of an engine that is given up it is still told what it was, and of a simulated one no GPUs.
func TestKeeperRemembers(t *testing.T) {
	smi(t, twoGPUs)
	mux := http.NewServeMux()
	for path, says := range map[string]string{"/health": "", "/v1/models": `{"data":[{"id":"m","max_model_len":512}]}`, "/version": `{"version":"0.32.0-sim"}`} {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, says) })
	}
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	e, err := NewHTTP(srv.URL, "")
	must(t, err)
	t.Cleanup(e.Close)
	r, h := newRig(t), newHands()
	r.start(e, func(w *Worker) { w.Keeper, w.GPUs = h, new(GPUs) })
	r.state(proto.EngineReady)
	h.set(proto.EngineDegraded, "engine is given up")
	if w := r.state(proto.EngineDegraded); w.GivenUp == "" || w.Kind != proto.KindVLLM || w.Version != "0.32.0-sim" || w.MaxLen != 512 || !w.Simulated || len(w.GPUs) > 0 {
		t.Errorf("%+v", w)
	}
}

// TestKeeperOfHung: an engine that hangs is started again.
func TestKeeperOfHung(t *testing.T) {
	r, f, h := newRig(t), newFake(t), newHands()
	f.set(func() { f.metrics, f.work = gauges(3, 100), blocks })
	r.send(requests(3)...)
	r.start(f.engine(), func(w *Worker) { w.Keeper, w.StallTimeout, w.RetryEvery = h, 200*time.Millisecond, time.Hour })
	f.enter(3)
	wanted(t, h, "hung")
	r.state(proto.EngineHung)
	h.set(proto.EngineWaiting, "engine hung and was killed")
	r.until("that is said", func() bool {
		ws := r.workers()
		return len(ws) == 1 && strings.HasPrefix(ws[0].Reason, "engine hung and was killed")
	})
	f.set(func() { f.metrics, f.work = gauges(0, 0), f.ok })
	h.set("", "")
	exactly(t, r.wait(3), 3)
}

// TestKeeperOfHungWithImpatientLines: where lines have less time than the stall timeout, it is they who find that the
// engine does nothing; it is started again all the same.
func TestKeeperOfHungWithImpatientLines(t *testing.T) {
	r, f, h := newRig(t), newFake(t), newHands()
	f.set(func() { f.metrics, f.work = gauges(3, 100), blocks })
	r.send(requests(3)...)
	r.start(f.engine(), func(w *Worker) {
		w.Keeper, w.StallTimeout, w.RequestTimeout, w.RetryEvery = h, 500*time.Millisecond, 100*time.Millisecond, time.Hour
	})
	r.state(proto.EngineHung)
	wanted(t, h, "hung")
}

// TestKeeperOfGone: an engine that closed its port and keeps its clients waiting, as vLLM may that was told to stop, is
// started again.
func TestKeeperOfGone(t *testing.T) {
	r, f, h := newRig(t), newFake(t), newHands()
	f.set(func() { f.work = blocks })
	r.send(requests(2)...)
	r.start(f.engine(), func(w *Worker) { w.Keeper, w.StallTimeout = h, 400*time.Millisecond })
	f.enter(2)
	f.set(func() { f.health = 503 })
	wanted(t, h, "gone")
}

// TestKeeperOfIdleIll: an engine that falls ill while it has nothing is started again: nothing would ever get to it.
func TestKeeperOfIdleIll(t *testing.T) {
	r, f, h := newRig(t), newFake(t), newHands()
	r.start(f.engine(), func(w *Worker) { w.Keeper, w.StallTimeout, w.ProbeEvery = h, 400*time.Millisecond, 20*time.Millisecond })
	r.state(proto.EngineReady)
	f.set(func() { f.health = 503 })
	wanted(t, h, "gone")
}

// TestKeeperLetsSleep: one that somebody put to sleep is not woken by a restart.
func TestKeeperLetsSleep(t *testing.T) {
	g := &gate{keeper: newHands(), stall: time.Second, busy: func() int { return 0 }}
	st, now := Status{State: proto.EngineWaiting, Engine: load.Engine{Gauges: load.Gauges{Asleep: true}}}, time.Now()
	for range 3 {
		if err := g.watchDown(now, st, nil); err != nil {
			t.Errorf("it is let go of: %v", err)
		}
		now = now.Add(time.Minute)
	}
}

// TestKeeperTellsRunsApart: an engine that was started again is another run of it, though no probe found it down.
func TestKeeperTellsRunsApart(t *testing.T) {
	f, h := newFake(t), newHands()
	g := &gate{engine: f.engine(), keeper: h}
	look := func() Status {
		t.Helper()
		st, err := g.look(t.Context())
		must(t, err)
		return st
	}
	first := look()
	if again := look(); again.Run != first.Run || first.State != proto.EngineReady {
		t.Errorf("runs %d and %d of the same engine, which is %s", first.Run, again.Run, first.State)
	}
	h.set(proto.EngineWaiting, "engine died")
	look()
	if down := look(); !down.Gone {
		t.Errorf("found %+v", down)
	}
	h.state = ""
	if next := look(); next.Run != first.Run+1 {
		t.Errorf("run %d after %d", next.Run, first.Run)
	}
}

func wanted(t *testing.T, h *hands, cause string) {
	t.Helper()
	select {
	case got := <-h.asked:
		if got != cause {
			t.Errorf("a restart was wanted for %q, not for %q", got, cause)
		}
	case <-time.After(patient):
		t.Fatal("no restart was wanted")
	}
}
