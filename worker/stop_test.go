package worker

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/broker"
	"millrace/proto"
)

// TestDrain: what was started is finished, what was not is had by others at once.
func TestDrain(t *testing.T) {
	r, f := newRig(t), newFake(t)
	release := make(chan struct{})
	f.set(func() {
		f.work = func(w http.ResponseWriter, _ *http.Request, _ string) {
			<-release
			say(w, 200, okBody)
		}
	})
	r.send(requests(30)...)
	w := r.start(f.engine(), func(w *Worker) { w.Concurrency = 8 })
	f.enter(8)
	w.leave()
	r.state(proto.EngineDraining)
	r.until("the rest is back", func() bool { return len(r.takeAll()) == 22 })
	close(release)
	w.end(t)
	exactly(t, r.wait(8), 8)
	r.settled(22)
	if len(r.workers()) != 0 {
		t.Error("heartbeat is still there")
	}
}

// TestAbort: everything is broken off and had by others at once.
func TestAbort(t *testing.T) {
	r, f := newRig(t), newFake(t)
	gone := make(chan struct{}, 100)
	f.set(func() {
		f.work = func(w http.ResponseWriter, q *http.Request, s string) {
			blocks(w, q, s)
			gone <- struct{}{}
		}
	})
	r.send(requests(30)...)
	w := r.start(f.engine(), func(w *Worker) { w.Concurrency = 8 })
	f.enter(8)
	w.stop()
	w.end(t)
	r.settled(30)
	for range 8 {
		<-gone
	}
	if len(r.results) != 0 {
		t.Errorf("%d results", len(r.results))
	}
}

// TestAbortIdle: a worker without work ends at once, whatever its engine does.
func TestAbortIdle(t *testing.T) {
	r := newRig(t)
	e, err := NewHTTP("http://"+freeAddr(t), "")
	must(t, err)
	w := r.start(e)
	r.state(proto.EngineWaiting)
	w.leave()
	w.end(t)
}

// control sets what is wanted of a job.
func (r *rig) control(job, want string) {
	r.tb.Helper()
	b, err := (&proto.Control{Want: want}).Encode()
	must(r.tb, err)
	r.put(proto.ControlKey(job), b)
}

// put writes a record about a job.
func (r *rig) put(key string, b []byte) {
	r.tb.Helper()
	kv, err := r.conn.JS.KeyValue(context.Background(), proto.JobsBucket)
	must(r.tb, err)
	_, err = kv.Put(context.Background(), key, b)
	must(r.tb, err)
}

// TestCancel: a user cancels a job, or its owner ends it because its time is over.
func TestCancel(t *testing.T) {
	t.Run("user", func(t *testing.T) {
		testCancel(t, proto.CodeCancelled, func(r *rig) { r.control("j", proto.WantCancel) })
	})
	t.Run("time", func(t *testing.T) {
		testCancel(t, proto.CodeExpired, func(r *rig) {
			b, err := (&proto.Feed{State: proto.FeedEnding}).Encode()
			must(t, err)
			r.put(proto.FeedKey("j"), b)
		})
	})
}

// testCancel: calls of the job are aborted, and their lines end with how long they took; other jobs go on. The lines that
// have not begun, and those that come later, are given back for the owner to end, and only these are counted as given back.
func testCancel(t *testing.T, code string, cancel func(*rig)) {
	r, f, reg := newRig(t), newFake(t), prometheus.NewPedanticRegistry()
	gone := make(chan struct{}, 100)
	f.set(func() {
		f.work = func(w http.ResponseWriter, q *http.Request, s string) {
			if strings.Contains(s, "other") {
				say(w, 200, okBody)
				return
			}
			blocks(w, q, s)
			gone <- struct{}{}
		}
	})
	r.send(requests(10)...)
	other := request(0)
	other.Job, other.Body = "k", []byte(`{"other":1}`)
	r.start(f.engine(), func(w *Worker) { w.Concurrency, w.Registry = 4, reg })
	f.enter(4)
	r.send(other)
	cancel(r)
	for range 4 {
		<-gone
	}
	r.send(request(99))
	others := 0
	for _, got := range r.wait(5) {
		switch {
		case got.Job == "k" && got.OK:
			others++
		case got.OK || got.Code != code || got.Status != 0 || got.CustomID != request(int(got.Index)).CustomID || got.Worker == "" || got.DurationUS <= 0:
			t.Errorf("result %+v", got)
		}
	}
	r.until("the rest has been handed out and is in the queue", func() bool { stored, out := r.pending(); return stored == 7 && out == 7 })
	if n := len(r.seen()); n != 5 || others != 1 {
		t.Errorf("%d results, %d of the other job", n, others)
	}
	r.until("4 are counted as ended, 1 as ok, and the rest as given back", func() bool {
		return labelled(t, reg, "millrace_worker_requests_total", "outcome", code) == 4 && value(t, reg, "millrace_worker_requests_total") == 5 &&
			labelled(t, reg, "millrace_worker_given_back_total", "reason", "cancelled") == 7 && value(t, reg, "millrace_worker_given_back_total") == 7
	})
}

// TestPause: lines in flight are finished; others, those that come later too, are dropped and not begun: the owner sends
// them again.
func TestPause(t *testing.T) {
	r, f := newRig(t), newFake(t)
	release := make(chan struct{})
	var calls atomic.Int64
	f.set(func() {
		f.work = func(w http.ResponseWriter, _ *http.Request, _ string) {
			calls.Add(1)
			<-release
			say(w, 200, okBody)
		}
	})
	r.send(requests(20)...)
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 16 })
	f.enter(16)
	r.control("j", proto.WantPause)
	r.until("what was ready is dropped", func() bool { stored, _ := r.pending(); return stored <= 18 })
	close(release)
	exactly(t, r.wait(16), 16)
	r.settled(0)
	if calls.Load() != 16 {
		t.Errorf("%d calls", calls.Load())
	}
	r.control("j", proto.WantRun)
	r.until("the job runs again", func() bool {
		r.send(request(16))
		return len(r.seen()) > 16
	})
	r.settled(0)
}

// TestStrangers: a request of a newer version waits for a newer worker, and garbage is removed.
func TestStrangers(t *testing.T) {
	r, f := newRig(t), newFake(t)
	reg := prometheus.NewRegistry()
	ctx := context.Background()
	b, err := request(0).Encode()
	must(t, err)
	b[1] = proto.Version + 1 // the version follows the array's head
	for _, data := range [][]byte{b, []byte("garbage"), {}} {
		_, err = r.conn.JS.Publish(ctx, proto.RequestSubject("m", proto.LaneNormal, "j"), data)
		must(t, err)
	}
	r.start(f.engine(), func(w *Worker) { w.Registry = reg })
	r.until("garbage is removed", func() bool { stored, _ := r.pending(); return stored == 1 })
	r.until("the other is given back", func() bool { return value(t, reg, "millrace_worker_given_back_total") == 1 })
	if got := value(t, reg, "millrace_worker_undecodable_total"); got != 2 {
		t.Errorf("%v messages removed", got)
	}
}

// TestRunChecks: what cannot work is said at once.
func TestRunChecks(t *testing.T) {
	r := newRig(t)
	for _, w := range []*Worker{{}, {Conn: r.conn}, {Conn: r.conn, Engine: &Null{}, Concurrency: -1}, {Conn: r.conn, Engine: &Null{}, MaxAttempts: -1}} {
		if err := w.Run(t.Context(), t.Context()); err == nil {
			t.Errorf("%+v ran", w)
		}
	}
}

// TestClosed: a connection that is closed for good ends the worker with an error.
func TestClosed(t *testing.T) {
	r := newRig(t)
	conn, err := r.server.Connect(t.Context(), "w")
	must(t, err)
	w := &Worker{Conn: conn, Self: broker.Self(), Engine: &Null{Models: []string{"m"}}}
	done := make(chan error, 1)
	go func() { done <- w.Run(context.Background(), context.Background()) }()
	r.state(proto.EngineReady)
	conn.Close()
	select {
	case err := <-done:
		if !errors.Is(err, broker.ErrClosed) {
			t.Errorf("error %v", err)
		}
	case <-time.After(patient):
		t.Fatal("worker does not end")
	}
}
