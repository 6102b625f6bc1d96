package aggregator

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"millrace/broker"
	"millrace/proto"
)

func TestBrokerRestarts(t *testing.T) {
	r := newNetRig(t)
	r.start()
	r.job("j", 20)
	r.await("j", folding(r.send(all("j", 0, 10)...)))
	r.restart(r.srv.Dir)
	r.send(all("j", 10, 20)...)
	if p := r.await("j", done); p.OK != 20 || p.Duplicates != 0 {
		t.Errorf("%+v", p)
	}
	r.verify("j")
}

// The broker comes back with an empty disk: the aggregator still knows the job and what it has of it.
func TestBrokerLosesItsDisk(t *testing.T) {
	r := newNetRig(t)
	r.start()
	r.job("j", 20)
	old := r.await("j", folding(r.send(all("j", 0, 10)...)))
	r.restart(t.TempDir())
	p := r.await("j", func(p *proto.Progress) bool { return p.OK == 10 && p.Stream != old.Stream })
	if p.Failed != 0 {
		t.Errorf("%+v", p)
	}
	r.send(good("j", 4, 99)) // under the sequence 1, that the old stream had too
	r.send(all("j", 10, 20)...)
	if p := r.await("j", done); p.OK != 20 || p.Duplicates != 1 {
		t.Errorf("%+v", p)
	}
	r.verify("j")
}

// The broker comes back with an older copy of its disk: some of what was folded is not there, and the sequences that
// it had are given again.
func TestBrokerIsRolledBack(t *testing.T) {
	r := newNetRig(t)
	r.start()
	r.job("j", 20)
	r.await("j", folding(r.send(all("j", 0, 5)...)))
	r.conn.Close()
	r.srv.Stop()
	old := filepath.Join(t.TempDir(), "old")
	copyDir(t, r.srv.Dir, old)
	r.restart(r.srv.Dir)
	r.await("j", folding(r.send(all("j", 5, 12)...)))
	r.restart(old)
	r.send(all("j", 10, 20)...) // the first of them under sequences that were folded already
	if p := r.await("j", done); p.OK != 20 || p.Duplicates != 2 {
		t.Errorf("%+v", p)
	}
	r.verify("j")
}

// The stream is deleted and made anew while the connection stands.
func TestStreamIsReplaced(t *testing.T) {
	r := newRig(t)
	r.start()
	r.job("j", 20)
	old := r.await("j", folding(r.send(all("j", 0, 10)...)))
	if err := r.conn.JS.DeleteStream(t.Context(), proto.ResultStream); err != nil {
		t.Fatal(err)
	}
	r.await("j", func(p *proto.Progress) bool { return p.Stream != old.Stream })
	r.send(all("j", 10, 20)...)
	r.await("j", done)
	r.verify("j")
}

// awaitFold waits until the fold of a job stands at seq or behind it, as the job's owner does.
func (r *rig) awaitFold(id string, seq int64) {
	r.t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		var a proto.MissingAnswer
		if r.ask(proto.SubjectMissing, &proto.MissingQuestion{Job: id}, &a); a.Seq >= seq {
			return
		}
	}
	r.t.Fatalf("the fold does not come to %d", seq)
}

// Someone deletes the newest results before they are folded. The fold must not wait for them for ever: the owner of
// the job waits for the fold.
func TestTailIsDeleted(t *testing.T) {
	r := newRig(t)
	keep := func(a *Aggregator) { a.SharedDisk = false }
	a := r.start(keep)
	r.job("i", 3)
	r.job("j", 3)
	r.await("j", folding(r.send(good("i", 0, 0), good("j", 0, 0))))
	a.stop()
	seq := r.send(good("j", 1, 1), good("k", 0, 1))
	for _, id := range []string{"j", "k"} {
		if err := broker.Purge(t.Context(), r.conn.JS, proto.ResultStream, proto.ResultSubject(id)); err != nil {
			t.Fatal(err)
		}
	}
	r.start(keep)
	r.awaitFold("j", seq)
}

// And while it runs: nothing tells it then but that it stands still.
func TestTailIsDeletedUnderway(t *testing.T) {
	r := newRig(t)
	r.start()
	r.job("j", 3)
	r.await("j", folding(r.send(good("j", 0, 0))))
	s, err := r.conn.JS.Stream(t.Context(), proto.ResultStream)
	if err != nil {
		t.Fatal(err)
	}
	// Sequences 2 to 4 go without ever being there to read.
	if err := s.Purge(t.Context(), jetstream.WithPurgeSequence(5)); err != nil {
		t.Fatal(err)
	}
	r.awaitFold("j", 4)
	r.await("j", folding(r.send(good("j", 1, 1))))
}

func TestPurgeOfAnotherStream(t *testing.T) {
	r := newRig(t)
	r.send(all("j", 0, 9)...)
	s, err := r.conn.JS.Stream(t.Context(), proto.ResultStream)
	if err != nil {
		t.Fatal(err)
	}
	created := s.CachedInfo().Created.UnixNano()
	m, err := s.GetMsg(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	at := m.Time.UnixNano()
	for _, c := range []struct {
		name string
		at   position
		left uint64
		want error
	}{
		{"another stream", position{created + 1, 7, at}, 9, errAnotherStream},
		{"an older disk", position{created, 10, at}, 9, errAnotherStream},
		{"an older disk that was written on", position{created, 7, at + 1}, 9, errAnotherStream},
		{"the one", position{created, 7, at}, 4, nil},
	} {
		err := purge(t.Context(), r.conn.JS, 6, c.at)
		info, ierr := s.Info(t.Context())
		if ierr != nil || !errors.Is(err, c.want) || info.State.Msgs != c.left {
			t.Errorf("%s: %d messages left, want %d: %v %v", c.name, info.State.Msgs, c.left, err, ierr)
		}
	}
}

func TestSecondAggregatorWaits(t *testing.T) {
	r := newRig(t)
	a := r.start()
	r.job("j", 20)
	r.await("j", folding(r.send(all("j", 0, 5)...)))
	r.start(func(b *Aggregator) { b.Dir = t.TempDir(); b.SharedDisk = false })
	r.await("j", folding(r.send(all("j", 5, 10)...)))
	a.stop() // lets go of the lease; what the other did not see was purged, and is sent again
	r.send(all("j", 0, 20)...)
	if p := r.await("j", done); p.OK != 20 {
		t.Errorf("%+v", p)
	}
	r.verify("j")
}

// The holder falls silent without letting go. It must stop when it finds out, and the other go on.
func TestLeaseIsTakenFromASilentHolder(t *testing.T) {
	r := newRig(t)
	// A holder that never renews: its process is on a machine that went dark.
	owner := proto.Owner{ID: "dark", Host: "elsewhere"}
	dark := newLease(r.kv(), owner, time.Second)
	var w broker.Watch
	if _, err := dark.Try(t.Context(), &w); err != nil {
		t.Fatal(err)
	}
	r.job("j", 1)
	r.send(good("j", 0, 1))
	r.start()
	r.await("j", done)
	if err := dark.Renew(t.Context()); err == nil {
		t.Error("the old holder could renew")
	}
}

// Another process takes the lease though we are there: we stop, wait, and go on when it is gone.
func TestLeaseIsLost(t *testing.T) {
	r := newRig(t)
	r.start()
	r.job("j", 20)
	r.await("j", folding(r.send(all("j", 0, 10)...)))
	other := proto.Owner{ID: "other", Host: "elsewhere"}
	b, err := other.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.kv().Put(t.Context(), proto.LeaseKey, b); err != nil {
		t.Fatal(err)
	}
	r.send(all("j", 10, 20)...)
	r.await("j", done) // the other never renews: the lease comes back after its time
	r.verify("j")
}

func TestSameFolderTwice(t *testing.T) {
	r := newRig(t)
	lock, err := broker.LockDir(filepath.Join(r.dir, "jobs"))
	if err != nil {
		t.Fatal(err)
	}
	r.job("j", 1)
	r.send(good("j", 0, 1))
	r.start()
	var w broker.Watch
	probe := newLease(r.kv(), proto.Owner{ID: "probe", Host: "x"}, time.Minute)
	for { // it has the lease, and waits for the folder
		if _, err := probe.Try(t.Context(), &w); err != nil {
			break
		}
		if err := probe.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	lock.Unlock()
	r.await("j", done)
}

// The state on disk turns out to be damaged while it is used: it is read again, and the line is missing.
func TestDamageIsMendedUnderway(t *testing.T) {
	r := newRig(t)
	r.start()
	r.job("j", 3)
	r.await("j", folding(r.send(good("j", 0, 0), good("j", 1, 1))))
	for { // the broker has it no more
		s, err := r.conn.JS.Stream(t.Context(), proto.ResultStream)
		if err != nil {
			t.Fatal(err)
		}
		if s.CachedInfo().State.FirstSeq > 1 {
			break
		}
	}
	flip(t, filepath.Join(r.dir, "jobs", "j", fileSpool), int64(len(spoolMagic))+recordHeader+5)
	r.send(good("j", 2, 2))
	var a proto.MissingAnswer
	for len(a.Ranges) == 0 || a.Seq < 3 {
		r.ask(proto.SubjectMissing, &proto.MissingQuestion{Job: "j"}, &a)
	}
	if len(a.Ranges) != 1 || a.Ranges[0] != (proto.Range{From: 0, To: 1}) {
		t.Errorf("%+v", a)
	}
	r.send(good("j", 0, 1))
	r.await("j", done)
	r.verify("j")
}

func TestResultOfANewerProgram(t *testing.T) {
	r := newRig(t)
	a := r.start()
	r.job("j", 1)
	if _, err := r.conn.JS.Publish(t.Context(), proto.ResultSubject("j"), []byte{0x91, 0x63}); err != nil {
		t.Fatal(err)
	}
	seq := r.send(good("j", 0, 0))
	p := r.await("j", func(p *proto.Progress) bool { return p.Note != "" })
	if p.Seq >= seq || !strings.Contains(p.Note, "newer") {
		t.Errorf("%+v", p)
	}
	a.stop() // in the middle of waiting
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	r := newRig(t)
	a := r.start(func(a *Aggregator) { a.Registry = reg })
	r.job("j", 3)
	r.send(good("nobody", 0, 1), good("j", 0, 1), good("j", 0, 2), good("j", 1, 1), bad("j", 2, "odd"))
	r.await("j", done)
	r.await("j", func(p *proto.Progress) bool { r.send(good("j", 2, 1)); return p.Late > 0 })
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
	got := map[string]float64{}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			name := f.GetName()
			for _, l := range m.Label {
				name += " " + l.GetValue()
			}
			got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	for name, want := range map[string]float64{
		"millrace_requests_total org/model ok":           2,
		"millrace_requests_total org/model other":        1,
		"millrace_duplicates_total":                      1,
		"millrace_unknown_results_total":                 1,
		"millrace_tokens_total prompt org/model":         21,
		"millrace_tokens_total completion org/model":     202,
		"millrace_request_duration_seconds org/model":    2,
		"millrace_jobs done":                             1,
		"millrace_jobs folding":                          0,
		"millrace_requests_total org/model engine_error": 0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v, want %v", name, v, want)
		}
	}
	for _, name := range []string{"millrace_late_results_total", "millrace_tokens_total wasted org/model"} {
		if got[name] == 0 {
			t.Errorf("%s is 0", name)
		}
	}
	for _, name := range []string{"millrace_checkpoint_age_seconds", "millrace_fold_lag_messages"} {
		if _, ok := got[name]; !ok {
			t.Errorf("%s is not there", name)
		}
	}
	a.stop()
	if left, err := reg.Gather(); err != nil || len(left) > 0 {
		t.Errorf("after Run: %v %v", left, err)
	}
}

func TestModelsInMetricsAreBounded(t *testing.T) {
	m := newMeter()
	for i := range 2 * maxModels {
		v := good("j", int64(i), 1)
		v.Model = strings.Repeat("m", i)
		m.result(v, fateFirst)
	}
	if n := testutil.CollectAndCount(m.seconds); n != maxModels+1 {
		t.Errorf("%d models", n)
	}
}

func TestEnginesAreInTheManifest(t *testing.T) {
	r := newRig(t)
	kv, err := r.conn.JS.KeyValue(t.Context(), proto.WorkersBucket)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []proto.Worker{{ID: "w0", Version: "0.11.0", Simulated: true, KVTokens: 7}, {ID: "other", Version: "0.11.0"}} {
		b, err := w.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := kv.Put(t.Context(), w.ID, b); err != nil {
			t.Fatal(err)
		}
	}
	r.start()
	r.job("j", 3)
	r.send(good("j", 0, 0), good("j", 1, 0))
	about := filepath.Join(r.dir, "jobs", "j", fileAbout)
	for { // what was heard is on disk before the job is whole
		if b, err := os.ReadFile(about); err == nil && strings.Contains(string(b), "0.11.0") {
			break
		}
		r.await("j", func(p *proto.Progress) bool { r.send(good("j", 0, 1)); return p.OK == 2 })
	}
	r.send(good("j", 2, 0))
	r.await("j", done)
	e := r.verify("j").Engines
	if len(e) != 1 || e[0].Worker != "w0" || !e[0].Simulated || e[0].KVTokens != 7 {
		t.Errorf("%+v", e)
	}
}

// A bucket of workers that is not there ends nothing, and is heard once it is.
func TestWorkersAreHeardLate(t *testing.T) {
	r := newRig(t)
	if err := r.conn.JS.DeleteKeyValue(t.Context(), proto.WorkersBucket); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	tried := make(chan struct{}, 1)
	n := &tenure{a: &Aggregator{Conn: r.conn}, log: slog.New(slog.NewTextHandler(signalWriter(tried), nil))}
	over := make(chan struct{})
	go func() {
		defer close(over)
		n.watchWorkers(ctx)
	}()
	<-tried
	if err := (broker.Declarer{JS: r.conn.JS, Disk: 1 << 30}).Base(t.Context()); err != nil {
		t.Fatal(err)
	}
	kv, err := r.conn.JS.KeyValue(t.Context(), proto.WorkersBucket)
	if err != nil {
		t.Fatal(err)
	}
	b, err := (&proto.Worker{ID: "w0", Version: "0.11.0"}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := kv.Put(t.Context(), "w0", b); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); n.workers.get("w0") == nil; {
		if time.Now().After(end) {
			t.Fatal("the worker is not heard")
		}
		runtime.Gosched()
	}
	cancel()
	<-over
}

// signalWriter says that something is written.
type signalWriter chan struct{}

func (w signalWriter) Write(b []byte) (int, error) {
	signal(w)
	return len(b), nil
}

// Run must end at once, also when it waits for the lease.
func TestStopWhileWaiting(t *testing.T) {
	r := newRig(t)
	a := r.start()
	r.job("j", 1)
	r.await("j", func(*proto.Progress) bool { return true })
	b := r.start(func(b *Aggregator) { b.Dir = t.TempDir() })
	b.stop()
	a.stop()
}

// TestEndWatch: a watch ends whose connection was closed as it began, though its channel stays open.
func TestEndWatch(t *testing.T) {
	w := &openWatch{updates: make(chan jetstream.KeyValueEntry, 2)}
	w.updates <- nil
	w.updates <- nil
	endWatch(w)
	if len(w.updates) > 0 {
		t.Errorf("%d entries are left: a sender may be left standing", len(w.updates))
	}
}

type openWatch struct {
	jetstream.KeyWatcher
	updates chan jetstream.KeyValueEntry
}

func (w *openWatch) Updates() <-chan jetstream.KeyValueEntry { return w.updates }
func (w *openWatch) Stop() error                             { return nats.ErrConnectionClosed }

// TestClosed: an aggregator whose connection is closed for good ends, and says why.
func TestClosed(t *testing.T) {
	r := newRig(t)
	a := &Aggregator{Conn: r.connect("aggregator"), Self: broker.Self(), Dir: r.dir, LeaseTTL: time.Second,
		Output: func(j *proto.Job) Files { return filesIn(filepath.Join(r.out, j.ID)) }}
	over := make(chan error, 1)
	go func() { over <- a.Run(t.Context()) }()
	kv, err := r.conn.JS.KeyValue(t.Context(), proto.JobsBucket)
	if err != nil {
		t.Fatal(err)
	}
	w, err := kv.Watch(t.Context(), proto.LeaseKey, jetstream.UpdatesOnly())
	if err != nil {
		t.Fatal(err)
	}
	<-w.Updates() // it holds the lease
	if err := w.Stop(); err != nil {
		t.Fatal(err)
	}
	a.Conn.Close()
	if err := <-over; !errors.Is(err, broker.ErrClosed) {
		t.Errorf("error %v", err)
	}
}
