package producer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// TestCancel: what was done stays, the rest ends as cancelled, the queue is empty.
func TestCancel(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	in := Input{Path: file(t, linesOf(100, "m", "n"))}
	o := w.owner(scanned(t, in))
	a := w.aggregate(o.Job)
	s := w.run(o)
	w.work("m", okay)
	until(t, "half is done", func() bool { return a.folded() == 50 })
	w.want(o.Job.ID, proto.WantCancel)
	if err := s.end(); !errors.Is(err, ErrCancelled) {
		t.Fatalf("error %v", err)
	}
	for i := range o.Job.Lines {
		r := best(a.of(i))
		if r.OK != (i%2 == 0) || r.CustomID != fmt.Sprint("id-", i) || !r.OK && (r.Code != proto.CodeCancelled || r.Model != "n" || r.Line != i+1) {
			t.Errorf("line %d: %+v", i, r)
		}
	}
	if f := w.feed(o.Job.ID); f.State != proto.FeedFinished || f.Ended < 50 || w.queued(&o.Job) > 0 {
		t.Errorf("record %+v, %d queued", f, w.queued(&o.Job))
	}
	if err := w.run(w.owner(scanned(t, in))).end(); !errors.Is(err, ErrCancelled) {
		t.Errorf("the same command again: %v", err)
	}
}

// TestPause: nothing is fed while the job is paused. When it goes on, what is missing is sent, but for what is in the queue:
// it may be in flight. A new owner of a paused job keeps it paused.
func TestPause(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	in := Input{Path: file(t, linesOf(100, "m"))}
	o := w.owner(scanned(t, in))
	o.Window, o.AckWait = 40, time.Hour
	a := w.aggregate(o.Job)
	s := w.run(o)
	until(t, "the window is full", func() bool { return w.queued(&o.Job) == 40 })
	w.want(o.Job.ID, proto.WantPause)
	until(t, "the job is paused", func() bool { return w.feed(o.Job.ID).State == proto.FeedPaused })
	inFlight, dropped := w.pull("m", 30), w.pull("m", 10)
	for _, m := range dropped {
		if err := m.DoubleAck(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s.stop()
	if err := s.end(); err == nil {
		t.Fatal("no error")
	}
	o2 := w.owner(scanned(t, in))
	o2.AckWait = time.Hour
	s = w.run(o2)
	until(t, "the second owner has it", func() bool { return w.feed(o.Job.ID).Owner.ID != "" })
	if f := w.feed(o.Job.ID); f.State != proto.FeedPaused || w.queued(&o.Job) != 30 {
		t.Errorf("record %+v, %d queued", f, w.queued(&o.Job))
	}
	w.want(o.Job.ID, proto.WantRun)
	until(t, "it goes on", func() bool { return w.queued(&o.Job) > 30 })
	w.work("m", okay)
	until(t, "all else has ended", func() bool { return a.folded() == 70 })
	for _, m := range inFlight {
		if err := end(t.Context(), w.conn, m, okay); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
	for i := range o.Job.Lines {
		if n := len(a.of(i)); n != 1 {
			t.Errorf("line %d has %d results", i, n)
		}
	}
	if f := w.feed(o.Job.ID); f.Enqueued != 100 || f.Resent != 10 {
		t.Errorf("record %+v", f)
	}
}

// TestPauseUnseen: a pause that no owner saw made workers drop requests all the same. They are sent again without waiting
// for AckWait, by the owner that lived through it and by one that comes later.
func TestPauseUnseen(t *testing.T) {
	for _, later := range []bool{false, true} {
		w := newWorld(t, &broker.Server{})
		in := Input{Path: file(t, linesOf(50, "m"))}
		o := w.owner(scanned(t, in))
		o.AckWait = time.Hour
		a := w.aggregate(o.Job)
		s := w.run(o)
		until(t, "all is queued", func() bool { return w.queued(&o.Job) == 50 })
		if later {
			until(t, "the record says so", func() bool { return w.feed(o.Job.ID).Enqueued == 50 })
			s.stop()
			if err := s.end(); err == nil {
				t.Fatal("no error")
			}
		}
		for _, m := range w.pull("m", 20) {
			if err := m.DoubleAck(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		w.want(o.Job.ID, proto.WantPause)
		w.want(o.Job.ID, proto.WantRun)
		if later {
			o = w.owner(scanned(t, in))
			o.AckWait = time.Hour
			s = w.run(o)
		}
		until(t, "the dropped ones are queued again", func() bool { return w.queued(&o.Job) == 50 })
		w.work("m", okay)
		if err := s.end(); err != nil {
			t.Fatal(err)
		}
		for i := range o.Job.Lines {
			if n := len(a.of(i)); n != 1 {
				t.Errorf("line %d has %d results", i, n)
			}
		}
	}
}

func TestExpire(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(20, "m")), LifetimeMS: 300}))
	a := w.aggregate(o.Job)
	if err := w.run(o).end(); !errors.Is(err, ErrExpired) {
		t.Fatalf("error %v", err)
	}
	for i := range o.Job.Lines {
		if r := best(a.of(i)); r.Code != proto.CodeExpired || r.Message != "This request could not be executed before the completion window expired." {
			t.Errorf("line %d: %+v", i, r)
		}
	}
}

// TestExpireGoesOn: a job whose time is over stays so, whoever owns it: no line runs after the first was given up, and
// time passes while nobody owns it.
func TestExpireGoesOn(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	in := Input{Path: file(t, linesOf(50, "m")), LifetimeMS: 300}
	o := w.owner(scanned(t, in))
	o.LeaseTTL = time.Hour // workers hear at once that the job is ended, not with the next renewal
	a := w.aggregate(o.Job)
	a.set(func(a *aggregator) { a.mute = true }) // the end of the lines takes a while
	s := w.run(o)
	until(t, "the rest is being ended", func() bool { return w.feed(o.Job.ID).State == proto.FeedEnding })
	s.stop()
	if err := s.end(); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	in.LifetimeMS = time.Hour.Milliseconds() // too late
	a.set(func(a *aggregator) { a.mute = false })
	w.work("m", okay)
	if err := w.run(w.owner(scanned(t, in))).end(); !errors.Is(err, ErrExpired) {
		t.Errorf("error %v", err)
	}
	for i := range o.Job.Lines {
		if r := best(a.of(i)); r.Code != proto.CodeExpired {
			t.Errorf("line %d: %+v", i, r)
		}
	}
}

// TestExpireCounts: the time of a job counts from its first owner on.
func TestExpireCounts(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	in := Input{Path: file(t, linesOf(10, "m")), LifetimeMS: time.Hour.Milliseconds()}
	o := w.owner(scanned(t, in))
	w.aggregate(o.Job)
	s := w.run(o)
	until(t, "all are enqueued", func() bool { return w.queued(&o.Job) == 10 })
	s.stop()
	s.end()
	f := w.feed(o.Job.ID)
	if now, err := broker.Now(t.Context(), w.conn.JS); err != nil || f.Since == 0 || f.Since > now.UnixNano() {
		t.Fatalf("began %d, it is %v, %v", f.Since, now, err)
	}
	f.Since -= time.Hour.Nanoseconds()
	w.put(proto.FeedKey(o.Job.ID), &f)
	if err := w.run(w.owner(scanned(t, in))).end(); !errors.Is(err, ErrExpired) {
		t.Errorf("error %v", err)
	}
}

// TestSinceAtAnotherBroker: when a job began is told on the clock of the broker that is there, not of one before it.
func TestSinceAtAnotherBroker(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(10, "m")), LifetimeMS: time.Hour.Milliseconds()}))
	r := newRun(o, nil)
	if err := r.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	began := r.feed.Since
	for _, wrong := range []time.Duration{-10 * time.Hour, 10 * time.Hour} {
		r.feed.Since = began + wrong.Nanoseconds() // as a broker with another clock said
		if err := r.restore(t.Context()); err != nil {
			t.Fatal(err)
		}
		now, err := broker.Now(t.Context(), w.conn.JS)
		if err != nil {
			t.Fatal(err)
		}
		if age := now.Sub(time.Unix(0, r.feed.Since)); age < 0 || age > time.Since(r.began)+time.Minute {
			t.Errorf("a clock that was %v off: it began %v ago", wrong, age)
		}
	}
}

// TestHalt: too many failures stop the job, with the commonest as the reason; run again, it may fail as often again.
func TestHalt(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	in := Input{Path: file(t, linesOf(200, "m")), MaxErrors: "10"}
	o := w.owner(scanned(t, in))
	o.Window = 10
	a := w.aggregate(o.Job)
	stop := w.work("m", func(q *proto.Request) *proto.Result {
		r := okay(q)
		r.OK, r.Status, r.Code, r.Message = false, 500, proto.CodeEngineError, "boom"
		return r
	})
	err := w.run(o).end()
	if !errors.Is(err, ErrHalted) || !strings.Contains(err.Error(), proto.CodeEngineError) || !strings.Contains(err.Error(), "--max-errors") {
		t.Fatalf("error %v", err)
	}
	if f := w.feed(o.Job.ID); f.State != proto.FeedHalted || f.Owner.ID != "" || w.queued(&o.Job) > 0 {
		t.Errorf("record %+v, %d queued", f, w.queued(&o.Job))
	}
	if n := a.folded(); n >= 200 {
		t.Errorf("%d lines ended, the halt came too late", n)
	}
	// Run again and interrupted, it halts only at new failures: what was forgiven stays so.
	stop()
	s := w.run(w.owner(scanned(t, in)))
	until(t, "it goes on", func() bool { f := w.feed(o.Job.ID); return f.State != proto.FeedHalted && f.BasisFailed > 10 })
	s.stop()
	if err := s.end(); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	w.work("m", okay)
	if err := w.run(w.owner(scanned(t, in))).end(); err != nil {
		t.Errorf("run again: %v", err)
	}
}

// TestPace: the records of a job are read often only while more and more lines fail, and few more of them would halt it.
func TestPace(t *testing.T) {
	all := func(d time.Duration, n int) []time.Duration { return slices.Repeat([]time.Duration{d}, n) }
	for _, c := range []struct {
		name   string
		most   string // --max-errors
		failed []int64
		want   []time.Duration
	}{
		{"no limit", "", []int64{0, 5, 10, 15}, all(watchEvery, 4)},
		{"nothing fails", "10", []int64{0, 0, 0, 0}, all(watchEvery, 4)},
		{"few fail", "100", []int64{10, 20, 30, 40}, all(watchEvery, 4)},
		{"few of all fail", "50%", []int64{100, 200, 240}, all(watchEvery, 3)},
		{"many of all fail", "50%", []int64{100, 260}, []time.Duration{watchEvery, haltEvery}},
		{"more and more fail", "10", []int64{0, 6, 7, 8, 9, 10}, append(all(watchEvery, 1), all(haltEvery, 5)...)},
		{"no more fail", "10", []int64{6, 6, 6, 6, 6, 6}, append(all(haltEvery, quick), all(watchEvery, 2)...)},
		{"it is halted", "10", []int64{0, 11, 12}, all(watchEvery, 3)},
	} {
		t.Run(c.name, func(t *testing.T) {
			var r run
			var err error
			if r.limit, err = parseThreshold(c.most); err != nil {
				t.Fatal(err)
			}
			var p pace
			for i, failed := range c.failed {
				r.progress = proto.Progress{OK: 1000 - failed, Failed: failed}
				r.want = r.judge(proto.Control{}, r.progress)
				if got := p.next(r.nearHalt()); got != c.want[i] {
					t.Errorf("look %d: %v, want %v", i, got, c.want[i])
				}
			}
		})
	}
}

// tcpWorld is a broker that can be started anew at the same address.
func tcpWorld(t *testing.T) *world {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	return newWorld(t, &broker.Server{Addr: addr, Dir: filepath.Join(t.TempDir(), "broker")})
}

// restart stops the broker, lets change do something to its folder, and starts it anew.
func (w *world) restart(change func(dir string)) {
	w.t.Helper()
	w.srv.Stop()
	until(w.t, "the broker is gone", func() bool { return !w.conn.NC.IsConnected() })
	if change != nil {
		change(w.srv.Dir)
	}
	next := &broker.Server{Addr: w.srv.Addr, Dir: w.srv.Dir, Log: w.srv.Log}
	if err := next.Start(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	w.srv = next
}

// TestBrokerRestarts: an owner lives through a broker that goes and comes back as it was.
func TestBrokerRestarts(t *testing.T) {
	w := tcpWorld(t)
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(300, "m"))}))
	o.Window = 50
	a := w.aggregate(o.Job)
	s := w.run(o)
	until(t, "the window is full", func() bool { return w.queued(&o.Job) == 50 })
	w.restart(nil)
	w.work("m", okay)
	if err := s.end(); err != nil || a.folded() != 300 {
		t.Errorf("%d folded, %v", a.folded(), err)
	}
}

// TestBrokerAway: that the broker is away is said in words of ours, not in its record, and not any more when it is back.
func TestBrokerAway(t *testing.T) {
	w := tcpWorld(t)
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(30, "m"))}))
	o.LeaseTTL = time.Second
	var mu sync.Mutex
	var notes []string
	o.Report = func(f proto.Feed) {
		mu.Lock()
		defer mu.Unlock()
		notes = append(notes, f.Note)
	}
	last := func() string {
		mu.Lock()
		defer mu.Unlock()
		return notes[len(notes)-1]
	}
	w.aggregate(o.Job)
	s := w.run(o)
	until(t, "all are enqueued", func() bool { return w.queued(&o.Job) == 30 })
	w.restart(func(string) {
		until(t, "it is said that the broker is away", func() bool { return strings.Contains(last(), awayNote) })
	})
	until(t, "it is not said any more", func() bool {
		note := w.feed(o.Job.ID).Note
		if strings.Contains(note, awayNote) {
			t.Fatalf("the record says %q", note)
		}
		return !strings.Contains(last(), awayNote)
	})
	w.work("m", okay)
	if err := s.end(); err != nil {
		t.Error(err)
	}
	for _, n := range notes {
		if strings.Contains(n, "outbound") {
			t.Errorf("note %q", n)
		}
	}
}

// TestOlderDisk: a broker that comes back with an older copy of its disk costs resending, not lines.
func TestOlderDisk(t *testing.T) {
	w := tcpWorld(t)
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(200, "m"))}))
	a := w.aggregate(o.Job)
	w.restart(func(dir string) { copyDir(t, dir, dir+".old") }) // the job is there, its requests are not
	s := w.run(o)
	until(t, "all are enqueued", func() bool { return w.queued(&o.Job) == 200 })
	w.restart(func(dir string) { copyDir(t, dir+".old", dir) })
	w.work("m", okay)
	if err := s.end(); err != nil || a.folded() != 200 {
		t.Errorf("%d folded, %v", a.folded(), err)
	}
}

// TestEmptyDisk: so does a broker that comes back with nothing; the job's own key is put again.
func TestEmptyDisk(t *testing.T) {
	w := tcpWorld(t)
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(200, "m"))}))
	o.Window = 50
	a := w.aggregate(o.Job)
	s := w.run(o)
	stop := w.work("m", okay)
	until(t, "some are done", func() bool { return a.folded() > 20 })
	stop()
	w.restart(func(dir string) { copyDir(t, t.TempDir(), dir) })
	until(t, "the job is put again", func() bool { return w.feed(o.Job.ID).Owner.ID != "" })
	w.work("m", okay)
	if err := s.end(); err != nil || a.folded() != 200 {
		t.Errorf("%d folded, %v", a.folded(), err)
	}
	if v, err := broker.Get(t.Context(), w.conn.JS, o.Job.ID); err != nil || v.Job.SHA256 != o.Job.SHA256 {
		t.Errorf("job %+v, %v", v.Job, err)
	}
}

// TestRecallEmptyDisk: the time of a job counts on where the broker has lost the record of when it began.
func TestRecallEmptyDisk(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	r := newRun(w.owner(scanned(t, Input{Path: file(t, linesOf(1, "m"))})), nil)
	if err := r.base(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.began = time.Now().Add(-time.Hour)
	if _, err := r.recall(t.Context()); err != nil || time.Since(r.began) < time.Hour {
		t.Fatalf("it began %v ago, %v", time.Since(r.began), err)
	}
	if now, err := broker.Now(t.Context(), w.conn.JS); err != nil || now.Sub(time.Unix(0, r.feed.Since)) < time.Hour {
		t.Errorf("others read that it began %v ago, %v", now.Sub(time.Unix(0, r.feed.Since)), err)
	}
}

// TestRemoved: a job that was removed stays removed, though its owner lives and has its input: the owner ends.
func TestRemoved(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(100, "m"))}))
	w.aggregate(o.Job).set(func(a *aggregator) { a.noKey = true })
	s := w.run(o)
	until(t, "all are enqueued", func() bool { return w.queued(&o.Job) == 100 })
	w.remove(o.Job.ID)
	if err := s.end(); !errors.Is(err, ErrRemoved) {
		t.Fatalf("error %v", err)
	}
	if left := w.keys(); len(left) > 0 || w.queued(&o.Job) > 0 {
		t.Errorf("left are %v and %d requests", left, w.queued(&o.Job))
	}
	if err := w.run(o).end(); !errors.Is(err, ErrRemoved) {
		t.Errorf("an owner of a removed job: %v", err)
	}
	var err error
	if o.Job, _, err = Create(t.Context(), w.conn, o.Job, false); err != nil {
		t.Fatal(err)
	}
	w.run(o)
	until(t, "created anew, it runs", func() bool { return w.queued(&o.Job) == 100 })
}

// TestNotFinal: that every line has ended is not enough, the files must be final: until then the input is needed.
func TestNotFinal(t *testing.T) {
	for name, cancelled := range map[string]bool{"finishes": false, "is cancelled": true} {
		t.Run(name, func(t *testing.T) { // with its own broker: of two aggregators the first one to answer is believed
			w := newWorld(t, &broker.Server{})
			o := w.owner(scanned(t, Input{Path: file(t, linesOf(10, "m"))}))
			a := w.aggregate(o.Job)
			a.set(func(a *aggregator) { a.noKey = true })
			if cancelled {
				w.want(o.Job.ID, proto.WantCancel)
			} else {
				w.work("m", okay)
			}
			s := w.run(o)
			a.saysDone(t)
			a.set(func(a *aggregator) { clear(a.results) }) // it loses all
			until(t, "all have run, or ended, again", func() bool { return a.folded() == 10 })
			a.saysDone(t)
			a.set(func(a *aggregator) { a.noKey = false })
			if err := s.end(); cancelled != errors.Is(err, ErrCancelled) || !cancelled && err != nil {
				t.Errorf("cancelled %v: %v", cancelled, err)
			}
		})
	}
}
