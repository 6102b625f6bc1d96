package producer

import (
	"errors"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"millrace/broker"
	"millrace/proto"
)

// TestLease: a second owner learns who the first is, and takes over when that one falls silent.
func TestLease(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	in := Input{Path: file(t, linesOf(10, "m"))}
	o := w.owner(scanned(t, in))
	o.Self = proto.Owner{ID: "first", Host: "elsewhere/boot/pid:[1]", PID: 7}
	a := w.aggregate(o.Job)
	first := w.run(o)
	until(t, "the first owns it", func() bool { return w.feed(o.Job.ID).Owner.ID == "first" })
	o2 := w.owner(scanned(t, in))
	err := w.run(o2).end()
	var held *HeldError
	if !errors.Is(err, broker.ErrLeaseHeld) || !errors.As(err, &held) || held.Holder.PID != 7 || err.Error() != "the job is run by process 7 on elsewhere" {
		t.Fatalf("error %v", err)
	}
	o.Conn.NC.Close() // it cannot renew any more
	second := w.run(o2)
	until(t, "the second owns it", func() bool { id := w.feed(o.Job.ID).Owner.ID; return id != "first" && id != "" })
	if err := first.end(); !errors.Is(err, broker.ErrClosed) {
		t.Errorf("first: %v", err)
	}
	w.work("m", okay)
	if err := second.end(); err != nil || a.folded() != 10 {
		t.Errorf("second: %v, %d folded", err, a.folded())
	}
}

// TestWatch: an owner that finds another one watches it, and goes on, or ends, where that one does.
func TestWatch(t *testing.T) {
	var failed atomic.Int64
	broken := func(q *proto.Request) *proto.Result {
		if failed.Add(1) > 10 { // the rest is held, else all might fail before the halt
			return nil
		}
		r := okay(q)
		r.OK, r.Status, r.Code = false, 500, proto.CodeEngineError
		return r
	}
	for name, c := range map[string]struct {
		first func(w *world, o *Owner, s *started)
		want  error
	}{
		"stops":     {func(w *world, o *Owner, s *started) { s.stop(); s.end(); w.work("m", okay) }, nil},
		"dies":      {func(w *world, o *Owner, s *started) { o.Conn.NC.Close(); w.work("m", okay) }, nil},
		"ends":      {func(w *world, o *Owner, s *started) { w.work("m", okay) }, nil},
		"cancelled": {func(w *world, o *Owner, s *started) { w.want(o.Job.ID, proto.WantCancel) }, ErrCancelled},
		"halted":    {func(w *world, o *Owner, s *started) { w.work("m", broken) }, ErrLeft},
		"removed":   {func(w *world, o *Owner, s *started) { w.remove(o.Job.ID) }, ErrRemoved},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, &broker.Server{})
			in := Input{Path: file(t, linesOf(50, "m")), MaxErrors: "5"}
			o := w.owner(scanned(t, in))
			o.Window = 10
			o.Self = proto.Owner{ID: "first", Host: "elsewhere", PID: 7}
			a := w.aggregate(o.Job)
			first := w.run(o)
			until(t, "the first owns it", func() bool { return w.feed(o.Job.ID).Owner.ID == "first" })
			o2 := w.owner(scanned(t, in))
			watches := make(chan *HeldError, 1)
			o2.Held = func(by *HeldError) { watches <- by }
			second := w.run(o2)
			if by := <-watches; by.Holder.PID != 7 {
				t.Errorf("watches %v", by)
			}
			if name == "removed" {
				a.set(func(a *aggregator) { a.noKey = true })
			}
			c.first(w, o, first)
			if err := second.end(); !errors.Is(err, c.want) || c.want == nil && a.folded() != 50 {
				t.Errorf("%d folded, %v", a.folded(), err)
			}
			if name != "removed" {
				return
			}
			if err := first.end(); !errors.Is(err, ErrRemoved) || len(w.keys()) > 0 {
				t.Errorf("the first: %v; left are %v", err, w.keys())
			}
		})
	}
}

// TestLeaseTaken: an owner whose lease another one has stops, and its queues do not count any more.
func TestLeaseTaken(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(10, "m"))}))
	o.metrics = newMetrics()
	depth := func() float64 { return testutil.ToFloat64(o.metrics.depth.WithLabelValues("m")) }
	s := w.run(o)
	until(t, "all are enqueued, and it has seen that", func() bool { return depth() == 10 })
	w.put(proto.FeedKey(o.Job.ID), &proto.Feed{Owner: proto.Owner{ID: "thief"}})
	if err := s.end(); !errors.Is(err, broker.ErrLeaseLost) {
		t.Errorf("error %v", err)
	}
	if f := w.feed(o.Job.ID); f.Owner.ID != "thief" || depth() != 0 {
		t.Errorf("record %+v, depth %v", f, depth())
	}
}
