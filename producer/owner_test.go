package producer

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"millrace/broker"
	"millrace/proto"
)

// TestRun: every line ends once, requests carry the bytes of the input, and the record says how far it is.
func TestRun(t *testing.T) {
	for name, always := range map[string]bool{"default": false, "always": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, &broker.Server{SyncAlways: always})
			text := linesOf(300, "a", "b/c", "d")
			d := scanned(t, Input{Path: file(t, text)})
			o := w.owner(d)
			o.AckWait = time.Minute // a slow disk is no reason to hand a line out twice
			reg := prometheus.NewPedanticRegistry()
			o.Registry = reg
			var reports atomic.Int64
			o.Report = func(f proto.Feed) { reports.Add(1) }
			a := w.aggregate(o.Job)
			for _, m := range o.Job.Models {
				w.work(m.Model, func(q *proto.Request) *proto.Result {
					if !strings.Contains(text, fmt.Sprintf(`{"custom_id":%q,"method":"POST","url":%q,"body":%s}`, q.CustomID, q.URL, q.Body)) {
						t.Errorf("request %+v is not of the input", q)
					}
					return okay(q)
				})
			}
			s := w.run(o)
			until(t, "metrics", func() bool { n, _ := testutil.GatherAndCount(reg); return n > 0 })
			if p, err := testutil.GatherAndLint(reg); err != nil || len(p) > 0 {
				t.Errorf("metrics: %v, %v", p, err)
			}
			if err := s.end(); err != nil {
				t.Fatal(err)
			}
			for i := range o.Job.Lines {
				if n := len(a.of(i)); n != 1 {
					t.Errorf("line %d has %d results", i, n)
				}
			}
			f := w.feed(o.Job.ID)
			if f.State != proto.FeedFinished || f.Enqueued != 300 || f.Resent != 0 || f.Owner.ID != "" || fmt.Sprint(f.Models) != "[{a 100} {b/c 100} {d 100}]" {
				t.Errorf("record %+v", f)
			}
			if n, err := testutil.GatherAndCount(reg); n > 0 || err != nil {
				t.Errorf("%d metrics left, %v", n, err)
			}
			if reports.Load() == 0 {
				t.Error("nothing reported")
			}
			// The same command again finds it finished.
			if err := w.run(o).end(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestClosed: an owner whose connection is closed for good ends, and says why.
func TestClosed(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(10, "a"))}))
	s := w.run(o)
	until(t, "it is queued", func() bool { return w.queued(&o.Job) == 10 })
	o.Conn.Close()
	if err := s.end(); !errors.Is(err, broker.ErrClosed) {
		t.Errorf("error %v", err)
	}
}

// TestWindow: no more requests wait than the window takes, and no model waits for another.
func TestWindow(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(400, "a", "b"))}))
	o.Window = 20
	a := w.aggregate(o.Job)
	var most atomic.Int64
	w.run(o)
	until(t, "both windows are full", func() bool { most.Store(max(most.Load(), w.queued(&o.Job))); return w.queued(&o.Job) == 40 })
	w.work("b", func(q *proto.Request) *proto.Result {
		most.Store(max(most.Load(), w.queued(&o.Job)))
		return okay(q)
	})
	until(t, "model b is served", func() bool { return a.folded() == 200 })
	if most.Load() > 40 {
		t.Errorf("%d requests queued, more than 2 windows of 20", most.Load())
	}
	w.work("a", okay)
	until(t, "all are served", func() bool { return a.folded() == 400 })
}

// TestFullQueue: beyond 80 % of a stream nothing is sent, and it says so.
func TestFullQueue(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	const mb = 1 << 20
	if _, err := w.conn.JS.CreateStream(t.Context(), proto.RequestStreamConfig("m", 2*mb)); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for i := range 100 {
		b.WriteString(line(fmt.Sprint(i), "m", strings.Repeat("x", 50_000)) + "\n")
	}
	o := w.owner(scanned(t, Input{Path: file(t, b.String())}))
	a := w.aggregate(o.Job)
	s := w.run(o)
	until(t, "the queue is full", func() bool { return strings.Contains(w.feed(o.Job.ID).Note, "no worker") && w.queued(&o.Job) > 0 })
	if n := w.queued(&o.Job); n > 34 {
		t.Errorf("%d requests of 50 KB in a queue of 2 MB", n)
	}
	w.work("m", okay)
	if err := s.end(); err != nil || a.folded() != 100 {
		t.Errorf("%d folded, %v", a.folded(), err)
	}
}

// TestResend: what was dropped behind everybody's back is sent again.
func TestResend(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(50, "m"))}))
	a := w.aggregate(o.Job)
	a.page = 3
	s := w.run(o)
	until(t, "all are enqueued", func() bool { return w.queued(&o.Job) == 50 })
	var n atomic.Int64
	stop := w.work("m", func(q *proto.Request) *proto.Result {
		if n.Add(1)%2 == 0 {
			return nil
		}
		return okay(q)
	})
	until(t, "half of them are done", func() bool { return a.folded() == 25 })
	stop()
	if err := broker.Purge(t.Context(), w.conn.JS, proto.RequestStream("m"), proto.RequestFilter("m", o.Job.ID)); err != nil {
		t.Fatal(err)
	}
	until(t, "the missing half is sent again", func() bool { return w.queued(&o.Job) == 25 })
	w.work("m", okay)
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
	if f := w.feed(o.Job.ID); f.Resent != 25 || f.Enqueued != 50 {
		t.Errorf("record %+v", f)
	}
}

// TestNotQuietYet: while a worker holds a request, or the aggregator is silent or behind, nothing is sent again.
func TestNotQuietYet(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(10, "m"))}))
	a := w.aggregate(o.Job)
	s := w.run(o)
	until(t, "all are enqueued", func() bool { return w.queued(&o.Job) == 10 })
	a.set(func(a *aggregator) { a.mute, a.behind = true, true })
	w.work("m", okay)
	until(t, "all are done", func() bool { return w.queued(&o.Job) == 0 })
	a.set(func(a *aggregator) { a.mute = false })
	const looks = 20 // the owner looks eight times in AckWait
	before := a.questions()
	until(t, "the owner has asked often", func() bool { return a.questions() >= before+looks })
	if n := w.queued(&o.Job); n > 0 {
		t.Errorf("%d sent again", n)
	}
	a.set(func(a *aggregator) { a.behind = false })
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
	if f := w.feed(o.Job.ID); f.Resent != 0 {
		t.Errorf("record %+v", f)
	}
}

// TestContinue: an owner that stopped half way goes on where it was, and what has results is not sent again.
func TestContinue(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	in := Input{Path: file(t, linesOf(200, "a", "b"))}
	o := w.owner(scanned(t, in))
	o.Window = 50
	a := w.aggregate(o.Job)
	first := w.run(o)
	until(t, "both windows are full", func() bool { return w.queued(&o.Job) == 100 })
	first.stop()
	if err := first.end(); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	f := w.feed(o.Job.ID)
	if f.Enqueued != 100 || f.Owner.ID != "" || f.State != proto.FeedFeeding {
		t.Errorf("record %+v", f)
	}
	o2 := w.owner(scanned(t, in))
	if o2.Job.ID != o.Job.ID {
		t.Fatalf("job %s, was %s", o2.Job.ID, o.Job.ID)
	}
	o2.Window = 50
	second := w.run(o2)
	w.work("a", okay)
	w.work("b", okay)
	if err := second.end(); err != nil {
		t.Fatal(err)
	}
	for i := range o.Job.Lines {
		if n := len(a.of(i)); n != 1 {
			t.Errorf("line %d has %d results", i, n)
		}
	}
	if f := w.feed(o.Job.ID); f.Enqueued != 200 || f.Resent != 0 {
		t.Errorf("record %+v", f)
	}
}

// TestStopCounts: what the broker stored is in the record of an owner that is stopped at any moment, and is not sent again.
func TestStopCounts(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	for n := range 10 {
		o := w.owner(scanned(t, Input{Path: file(t, linesOf(2000, "m", fmt.Sprint("m", n)))}))
		var seen atomic.Int64
		var s *started
		begun := make(chan struct{})
		sub, err := w.conn.NC.Subscribe(proto.RequestFilter("m", o.Job.ID), func(*nats.Msg) {
			if <-begun; seen.Add(1) == int64(1+n*100) {
				s.stop()
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		s = w.run(o)
		close(begun)
		if err := s.end(); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if err := sub.Unsubscribe(); err != nil {
			t.Fatal(err)
		}
		if f, queued := w.feed(o.Job.ID), w.queued(&o.Job); f.Enqueued != int64(queued) {
			t.Errorf("%d in the record, %d queued", f.Enqueued, queued)
		}
	}
}

// TestChanged: an edited input stops the job, with its queue empty and the reason in its record.
func TestChanged(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	text := linesOf(100, "m")
	name := file(t, text)
	o := w.owner(scanned(t, Input{Path: name}))
	o.Window = 10
	s := w.run(o)
	until(t, "the window is full", func() bool { return w.queued(&o.Job) == 10 })
	if err := writeFile(name, strings.ReplaceAll(text, "POST", "PUT ")); err != nil {
		t.Fatal(err)
	}
	w.work("m", okay)
	if err := s.end(); !errors.Is(err, ErrChanged) {
		t.Fatalf("error %v", err)
	}
	if f := w.feed(o.Job.ID); f.State != proto.FeedHalted || !strings.Contains(f.Note, "changed") || w.queued(&o.Job) > 0 {
		t.Errorf("record %+v, %d queued", f, w.queued(&o.Job))
	}
	// What it holds now is another job, and the old one is named.
	if err := writeFile(name, linesOf(100, "m2")); err != nil {
		t.Fatal(err)
	}
	job, changed, err := Create(t.Context(), w.conn, scanned(t, Input{Path: name}).Job(), false)
	if err != nil || job.ID == o.Job.ID || changed == nil || changed.ID != o.Job.ID {
		t.Errorf("job %s, changed %+v, %v", job.ID, changed, err)
	}
	for what, in := range map[string]Input{"the first lines of it": {Limit: 3}, "another model": {Override: "o"}} {
		in.Path = name
		if _, changed, err := Create(t.Context(), w.conn, scanned(t, in).Job(), false); err != nil || changed != nil {
			t.Errorf("%s: changed %+v, %v", what, changed, err)
		}
	}
}

// TestJudgedOtherwise: a file that did not change, but of which other lines are valid now, is not called changed. The
// job stays as it is.
func TestJudgedOtherwise(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	path := file(t, linesOf(10, "m")+line("big", "m", strings.Repeat("x", 40_000))+"\n")
	in := Input{Path: path, SkipInvalid: true, MaxPayload: 32 << 10}
	o := w.owner(scanned(t, in))
	w.aggregate(o.Job)
	s := w.run(o)
	until(t, "all that are valid are enqueued", func() bool { return w.queued(&o.Job) == 10 })
	s.stop()
	s.end()
	err := w.run(w.owner(scanned(t, Input{Path: path, SkipInvalid: true}))).end()
	if !errors.Is(err, ErrJudged) || errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "10 lines were valid, 11 are") {
		t.Errorf("error %v", err)
	}
	if f := w.feed(o.Job.ID); f.State == proto.FeedHalted || f.Owner.ID != "" || w.queued(&o.Job) != 10 {
		t.Errorf("record %+v, %d queued", f, w.queued(&o.Job))
	}
	w.work("m", okay)
	if err := w.run(w.owner(scanned(t, in))).end(); err != nil {
		t.Errorf("as it was created: %v", err)
	}
}

// TestNotes: why nothing moves is said, and unsaid.
func TestNotes(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(10, "org/m"))}))
	s := w.run(o)
	noted := func(what string) {
		t.Helper()
		until(t, what, func() bool { return strings.Contains(w.feed(o.Job.ID).Note, what) })
	}
	noted("no worker serves model org/m; no worker is there")
	noted("no aggregator answers")
	kv, err := w.conn.JS.KeyValue(t.Context(), proto.WorkersBucket)
	if err != nil {
		t.Fatal(err)
	}
	beat := func(v proto.Worker) {
		t.Helper()
		b, err := v.Encode()
		if err == nil {
			_, err = kv.Put(t.Context(), v.ID, b)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	beat(proto.Worker{ID: "w1", State: proto.EngineWaiting, Reason: "loading weights"})
	noted("w1 (waiting: loading weights)")
	beat(proto.Worker{ID: "w1", State: proto.EngineWaiting, Models: []string{"org/m"}, Reason: "vLLM is starting (30 s): compiling"})
	until(t, "it is named that is about to run the model", func() bool {
		n := w.feed(o.Job.ID).Note
		return strings.Contains(n, "model org/m waits for w1 (vLLM is starting (30 s): compiling)") && !strings.Contains(n, "no worker")
	})
	beat(proto.Worker{ID: "w1", State: proto.EngineReady, Models: []string{"org/m"}, Limit: 9, Reason: "engine answered 3 of the last 50 requests well"})
	noted("worker w1: engine answered 3 of the last 50 requests well")
	beat(proto.Worker{ID: "w1", State: proto.EngineReady, Models: []string{"org/m"}, Limit: 9})
	until(t, "a worker serves", func() bool { return !strings.Contains(w.feed(o.Job.ID).Note, "no worker") })
	w.aggregate(o.Job)
	until(t, "nothing is amiss", func() bool { return w.feed(o.Job.ID).Note == "" })
	w.work("org/m", okay)
	if err := s.end(); err != nil {
		t.Error(err)
	}
	if f := w.feed(o.Job.ID); f.Note != "" {
		t.Errorf("note %q at the end", f.Note)
	}
}

// TestWaitingNote: workers that are for a model and do not run it are told with what they do; our own have no names.
func TestWaitingNote(t *testing.T) {
	w := func(id, state, reason string, models ...string) proto.Worker {
		return proto.Worker{ID: id, State: state, Reason: reason, Models: models}
	}
	const load = "vLLM is starting (30 s): compiling"
	for _, c := range []struct {
		own  bool
		ws   []proto.Worker
		want string
	}{
		{false, nil, "no worker serves model m, n; no worker is there, start `millrace worker`"},
		{true, nil, "workers are starting"},
		{false, []proto.Worker{w("a", "waiting", load, "m"), w("b", "waiting", load), w("c", "hung", "", "m")},
			"no worker serves model n; waiting; workers seen: b (waiting: " + load + "); workers of other models: a (waiting: " + load + "; for m), c (hung; for m); model m waits for a (" + load + "), c (hung)"},
		{false, []proto.Worker{w("a", "ready", "", "x"), w("b", "waiting", load), w("c", "waiting", load), w("d", "waiting", load), w("e", "waiting", load)},
			"no worker serves model m, n; waiting; workers seen: b (waiting: " + load + "), c (waiting: " + load + "), d (waiting: " + load + ") and 1 more; workers of other models: a (ready; serves x)"},
		{false, []proto.Worker{w("a", "draining", "", "m", "n")}, "no worker serves model m, n; waiting; workers seen: a (draining; for m, n)"},
		{true, []proto.Worker{w("a", "waiting", load, "m", "n"), w("b", "waiting", load, "m", "n")}, load},
		{true, []proto.Worker{w("a", "waiting", "engine refuses connections"), w("b", "waiting", load, "m")}, "engine refuses connections, " + load},
		{true, []proto.Worker{w("a", "no-model", "it serves x")}, "no worker serves model m, n; waiting; workers seen: a (no-model: it serves x)"},
		{true, []proto.Worker{w("a", "ready", "", "m", "n"), w("b", "waiting", load, "m", "n")}, ""},
	} {
		models := []proto.ModelLines{{Model: "m", Lines: 1}, {Model: "n", Lines: 1}}
		r := &run{o: &Owner{Own: c.own}, job: proto.Job{Models: models}, queues: []*queue{{model: "m"}, {model: "n"}}, limits: make([]int64, 2)}
		if got := r.staff(c.ws); got != c.want {
			t.Errorf("%+v:\n%s\nwant\n%s", c.ws, got, c.want)
		}
	}
}

// TestSkipInvalidRuns: invalid lines end as errors, once, and the job ends.
func TestSkipInvalidRuns(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	text := "{\n" + linesOf(5, "m") + line("id-0", "m", "") + "\n"
	o := w.owner(scanned(t, Input{Path: file(t, text), SkipInvalid: true, MaxErrors: "0"}))
	a := w.aggregate(o.Job)
	w.work("m", okay)
	if err := w.run(o).end(); err != nil {
		t.Fatal(err)
	}
	for i, want := range map[int64]string{0: "malformed", 6: "already"} {
		if rs := a.of(i); len(rs) != 1 || rs[0].OK || rs[0].CustomID != "" || rs[0].Line != i+1 || !strings.Contains(rs[0].Message, want) {
			t.Errorf("line %d: %+v", i, rs)
		}
	}
	if f := w.feed(o.Job.ID); f.Ended != 2 || f.Enqueued != 5 {
		t.Errorf("record %+v", f)
	}
}

// TestAllInvalid: a job without a line that can run ends too.
func TestAllInvalid(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, "{\n{\n"), SkipInvalid: true}))
	a := w.aggregate(o.Job)
	if err := w.run(o).end(); err != nil || a.folded() != 2 {
		t.Errorf("%d folded, %v", a.folded(), err)
	}
}

func TestCreate(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	spec := scanned(t, Input{Path: file(t, linesOf(2, "m")), Name: "n"}).Job()
	for _, c := range []struct {
		again bool
		id    string
	}{{false, spec.ID}, {false, spec.ID}, {true, spec.ID + "-r2"}, {true, spec.ID + "-r3"}, {false, spec.ID}} {
		job, _, err := Create(t.Context(), w.conn, spec, c.again)
		if err != nil || job.ID != c.id {
			t.Errorf("job %s, want %s, %v", job.ID, c.id, err)
		}
	}
	more := spec
	more.MaxErrors, more.Lane, more.CreatedMS = "7", "high", 0
	if job, _, err := Create(t.Context(), w.conn, more, false); err != nil || job.MaxErrors != "7" || job.CreatedMS != spec.CreatedMS {
		t.Errorf("job %+v, %v", job, err)
	}
	if v, err := broker.Get(t.Context(), w.conn.JS, spec.ID); err != nil || v.Job.MaxErrors != "7" || v.Job.Lane != "high" {
		t.Errorf("job %+v, %v", v.Job, err)
	}
	if _, _, err := Create(t.Context(), w.conn, spec, true); err != nil {
		t.Error(err)
	}
	if v, err := broker.Get(t.Context(), w.conn.JS, spec.ID); err != nil || v.Job.MaxErrors != "7" || v.Job.Lane != "high" {
		t.Errorf("another run changed job %+v, %v", v.Job, err)
	}
	other := spec
	other.SHA256 = strings.Repeat("0", 64)
	if _, _, err := Create(t.Context(), w.conn, other, false); err == nil {
		t.Error("one id for two inputs")
	}
	named := scanned(t, Input{Path: file(t, linesOf(3, "m")), Name: "n"}).Job()
	if _, changed, err := Create(t.Context(), w.conn, named, false); err != nil || changed != nil {
		t.Errorf("another file: changed %+v, %v", changed, err)
	}
}

// A job that is created again after it was removed says so; the marker of the removal is gone then.
func TestCreateAfterRemove(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	spec := scanned(t, Input{Path: file(t, linesOf(2, "m"))}).Job()
	job, _, err := Create(t.Context(), w.conn, spec, false)
	if err != nil || job.After != 0 {
		t.Fatalf("%+v, %v", job, err)
	}
	for range 2 {
		if err := broker.Remove(t.Context(), w.conn.JS, broker.JobView{Job: job}); err != nil {
			t.Fatal(err)
		}
		before := job.After
		if job, _, err = Create(t.Context(), w.conn, spec, false); err != nil || job.After <= before {
			t.Fatalf("after %d, and before that %d, %v", job.After, before, err)
		}
		same, _, err := Create(t.Context(), w.conn, spec, false)
		if err != nil || same.After != job.After {
			t.Errorf("after %d, not %d, %v", same.After, job.After, err)
		}
	}
}

func TestPreflight(t *testing.T) {
	job := proto.Job{Lines: 1000, Bytes: 1 << 20}
	dir := t.TempDir()
	if err := Preflight(&job, map[string]string{"--data": dir + "/not/there", "--output": dir}); err != nil {
		t.Error(err)
	}
	job.Lines, job.Bytes = 1<<50, 1<<60
	err := Preflight(&job, map[string]string{"--data": dir, "--output": dir})
	if err == nil || !strings.Contains(err.Error(), "EB") || !strings.Contains(err.Error(), "--data or --output") {
		t.Errorf("error %v", err)
	}
}
