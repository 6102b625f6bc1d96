package producer

import (
	"context"
	"errors"
	"testing"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// again creates the job of a dataset that was removed.
func (w *world) again(d *Dataset) proto.Job {
	w.t.Helper()
	job, _, err := Create(w.t.Context(), w.conn, d.Job(), false)
	if err != nil || job.After == 0 {
		w.t.Fatalf("%+v, %v", job, err)
	}
	return job
}

// TestStopRemoved: an owner that is stopped before it has noticed that its job was removed puts nothing of it again.
func TestStopRemoved(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(10, "m"))}))
	s := w.run(o)
	until(t, "all are enqueued", func() bool { return w.queued(&o.Job) == 10 })
	w.remove(o.Job.ID)
	s.stop()
	if err := s.end(); !errors.Is(err, context.Canceled) && !errors.Is(err, ErrRemoved) {
		t.Errorf("error %v", err)
	}
	if keys := w.keys(); len(keys) > 0 || w.queued(&o.Job) > 0 {
		t.Errorf("left are %v, %d queued", keys, w.queued(&o.Job))
	}
}

// TestReplaced: an owner whose job was removed and created again is not the later one's.
func TestReplaced(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	d := scanned(t, Input{Path: file(t, linesOf(10, "m"))})
	o := w.owner(d)
	s := w.run(o)
	until(t, "all are enqueued", func() bool { return w.queued(&o.Job) == 10 })
	w.remove(o.Job.ID)
	w.again(d)
	if err := s.end(); !errors.Is(err, ErrRemoved) {
		t.Errorf("error %v", err)
	}
	if _, err := mustKV(t, w).Get(t.Context(), proto.FeedKey(o.Job.ID)); err == nil {
		t.Errorf("it left %+v", w.feed(o.Job.ID))
	}
	if err := w.run(o).end(); !errors.Is(err, ErrRemoved) {
		t.Errorf("of a spec that is no longer true: %v", err)
	}
}

// TestOlderThanAgain: a broker comes back with a disk on which the job that is owned was not created yet, and the one before
// it was removed already. That is no removal of it.
func TestOlderThanAgain(t *testing.T) {
	w := tcpWorld(t)
	d := scanned(t, Input{Path: file(t, linesOf(10, "m"))})
	w.remove(w.owner(d).Job.ID)
	w.restart(func(dir string) { copyDir(t, dir, dir+".old") })
	until(t, "the broker is back", w.conn.NC.IsConnected)
	o := &Owner{Conn: w.connect(), Dataset: d, Job: w.again(d), AckWait: testAckWait, LeaseTTL: time.Second, Disk: 1 << 30}
	a := w.aggregate(o.Job)
	s := w.run(o)
	until(t, "all are enqueued", func() bool { return w.queued(&o.Job) == 10 })
	w.restart(func(dir string) { copyDir(t, dir+".old", dir) })
	w.work("m", okay)
	if err := s.end(); err != nil || a.folded() != 10 {
		t.Errorf("%d folded, %v", a.folded(), err)
	}
	if v, err := broker.Get(t.Context(), w.conn.JS, o.Job.ID); err != nil || v.Job.After != o.Job.After {
		t.Errorf("job %+v, %v", v.Job, err)
	}
}

// TestLeftovers: what an owner of a removed job left of it says nothing of the job that follows: neither that its time is
// over, nor that it is being ended, nor that its lines were sent.
func TestLeftovers(t *testing.T) {
	for name, f := range map[string]proto.Feed{
		"late":   {State: proto.FeedFeeding, Since: time.Now().Add(-time.Hour).UnixNano()},
		"ending": {State: proto.FeedEnding},
		"sent":   {State: proto.FeedWaiting, Models: []proto.ModelLines{{Model: "m", Lines: 10}}, Ended: 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, &broker.Server{})
			d := scanned(t, Input{Path: file(t, linesOf(10, "m")+"{\n"), SkipInvalid: true})
			id := w.owner(d).Job.ID
			w.remove(id)
			o := &Owner{Conn: w.connect(), Dataset: d, Job: w.again(d), AckWait: testAckWait, LeaseTTL: time.Second, Disk: 1 << 30}
			o.Job.LifetimeMS = time.Minute.Milliseconds()
			w.put(proto.FeedKey(id), &f)
			a := w.aggregate(o.Job)
			w.work("m", okay)
			if err := w.run(o).end(); err != nil {
				t.Error(err)
			}
			for i := range int64(10) {
				if rs := a.of(i); len(rs) != 1 || !rs[0].OK || rs[0].Run != o.Job.Run() {
					t.Errorf("line %d: %+v", i, rs)
				}
			}
			if rs := a.of(10); len(rs) != 1 || rs[0].OK || rs[0].Run != o.Job.Run() { // which is invalid
				t.Errorf("%+v", rs)
			}
			if f := w.feed(id); f.After != o.Job.After || f.Resent != 0 || f.Ended != 1 {
				t.Errorf("record %+v", f)
			}
		})
	}
}

// TestAdoptLeftovers: a detached job is adopted although the one that it follows was halted.
func TestAdoptLeftovers(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	in := Input{Path: file(t, linesOf(10, "m"))}
	id := w.detach(in).ID
	w.remove(id)
	d := scanned(t, in)
	job := w.again(d)
	w.put(proto.FeedKey(id), &proto.Feed{State: proto.FeedHalted})
	if err := Detach(t.Context(), w.conn, d, job); err != nil {
		t.Fatal(err)
	}
	w.adopter(t.TempDir())
	until(t, "it is adopted", func() bool { return w.queued(&job) == 10 })
}
