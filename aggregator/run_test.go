package aggregator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"

	"millrace/broker"
	"millrace/proto"
)

// rig is a broker of its own, with an aggregator or several.
type rig struct {
	t    *testing.T
	srv  *broker.Server
	conn *broker.Conn
	dir  string // of the aggregators, unless they are told another
	out  string
	runs []func() // stop those that were started
}

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, srv: &broker.Server{Dir: t.TempDir()}, dir: t.TempDir(), out: t.TempDir()}
	r.up()
	return r
}

// newNetRig has a broker that can be stopped and come back under its address.
func newNetRig(t *testing.T) *rig {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	r := &rig{t: t, srv: &broker.Server{Dir: t.TempDir(), Addr: addr}, dir: t.TempDir(), out: t.TempDir()}
	r.up()
	return r
}

func (r *rig) up() {
	r.t.Helper()
	if err := r.srv.Start(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	srv := r.srv
	var once sync.Once
	r.t.Cleanup(func() { once.Do(srv.Stop) })
	r.conn = r.connect("test")
	if err := (broker.Declarer{JS: r.conn.JS, Disk: 1 << 30}).Base(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// restart brings the broker back with the disk in dir.
func (r *rig) restart(dir string) {
	r.t.Helper()
	r.conn.Close()
	r.srv.Stop()
	r.srv = &broker.Server{Dir: dir, Addr: r.srv.Addr}
	r.up()
	for _, stop := range r.runs { // before their broker
		r.t.Cleanup(stop)
	}
}

func (r *rig) connect(role string) *broker.Conn {
	r.t.Helper()
	var c *broker.Conn
	var err error
	if r.srv.Addr == "" {
		c, err = r.srv.Connect(r.t.Context(), role)
	} else {
		c, err = broker.Connect(r.t.Context(), broker.Access{URL: r.srv.URL()}, role, quiet())
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(c.Close)
	return c
}

// runner is a running aggregator.
type runner struct {
	*Aggregator
	t    *testing.T
	stop func() // waits for its end
}

func (r *rig) start(change ...func(*Aggregator)) *runner {
	r.t.Helper()
	a := &Aggregator{
		Conn: r.connect("aggregator"), Self: proto.Owner{ID: nuid.Next(), Host: nuid.Next()}, Dir: r.dir,
		SharedDisk: true, Program: "test", CheckpointEvery: 20 * time.Millisecond, LeaseTTL: time.Second,
		Output:     func(j *proto.Job) Files { return filesIn(filepath.Join(r.out, j.ID)) },
		retryEvery: 20 * time.Millisecond, Log: slog.New(slog.NewTextHandler(r.t.Output(), nil)),
	}
	for _, c := range change {
		c(a)
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan error, 1)
	go func() { over <- a.Run(ctx) }()
	var once sync.Once
	n := &runner{Aggregator: a, t: r.t, stop: func() {
		once.Do(func() {
			cancel()
			if err := <-over; err != nil {
				r.t.Errorf("Run: %v", err)
			}
		})
	}}
	r.t.Cleanup(n.stop)
	r.runs = append(r.runs, n.stop)
	return n
}

func (r *rig) kv() jetstream.KeyValue {
	r.t.Helper()
	kv, err := r.conn.JS.KeyValue(r.t.Context(), proto.JobsBucket)
	if err != nil {
		r.t.Fatal(err)
	}
	return kv
}

func (r *rig) job(id string, lines int64) {
	r.t.Helper()
	b, err := spec(id, lines).Encode()
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.kv().Put(r.t.Context(), proto.JobKey(id), b); err != nil {
		r.t.Fatal(err)
	}
}

// send publishes results and returns the sequence of the last.
func (r *rig) send(rs ...*proto.Result) (seq int64) {
	r.t.Helper()
	for _, v := range rs {
		ack, err := r.conn.JS.Publish(r.t.Context(), proto.ResultSubject(v.Job), wire(r.t, v))
		if err != nil {
			r.t.Fatal(err)
		}
		seq = int64(ack.Sequence)
	}
	return seq
}

// await waits for a progress of the job that is as wanted.
func (r *rig) await(id string, wanted func(*proto.Progress) bool) *proto.Progress {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	var last *proto.Progress
	err := watch(ctx, r.kv(), proto.ProgressKey(id), func(e jetstream.KeyValueEntry) {
		p := new(proto.Progress)
		if e.Operation() == jetstream.KeyValuePut && p.Decode(e.Value()) == nil {
			if last = p; wanted(p) {
				cancel()
			}
		}
	}, func() {})
	if err != nil || last == nil || !wanted(last) {
		r.t.Fatalf("job %s came to %+v: %v", id, last, err)
	}
	return last
}

func done(p *proto.Progress) bool { return p.State == proto.FoldDone }

func folding(seq int64) func(*proto.Progress) bool {
	return func(p *proto.Progress) bool { return p.Seq >= seq }
}

func (r *rig) ask(subject string, q encoder, a interface{ Decode([]byte) error }) {
	r.t.Helper()
	b, err := q.Encode()
	if err != nil {
		r.t.Fatal(err)
	}
	for { // an aggregator that is between two sessions or not there yet does not answer
		msg, err := r.conn.NC.Request(subject, b, time.Second)
		if errors.Is(err, nats.ErrNoResponders) || errors.Is(err, nats.ErrTimeout) {
			continue
		}
		if err != nil {
			r.t.Fatal(err)
		}
		if err := a.Decode(msg.Data); err != nil {
			r.t.Fatalf("%v: %v", err, msg.Header)
		}
		return
	}
}

func (r *rig) verify(id string) *Manifest {
	r.t.Helper()
	m, reasons, err := Verify(filesIn(filepath.Join(r.out, id)).Manifest)
	if err != nil || len(reasons) > 0 {
		r.t.Fatalf("%v %v", reasons, err)
	}
	return m
}

// all makes an ok result of every line from..to-1.
func all(job string, from, to int64) (out []*proto.Result) {
	for i := from; i < to; i++ {
		out = append(out, good(job, i, i))
	}
	return out
}

func TestAJobFromItsFirstResultToItsManifest(t *testing.T) {
	r := newRig(t)
	r.start()
	r.job("j", 20)
	r.send(all("j", 0, 10)...)
	seq := r.send(bad("j", 15, proto.CodeEngineError), good("j", 3, 99))
	p := r.await("j", folding(seq))
	if p.OK != 10 || p.Failed != 1 || p.Duplicates != 1 || p.State != proto.FoldFolding || p.Wasted.Completion != 199 {
		t.Errorf("%+v", p)
	}
	var a proto.MissingAnswer
	r.ask(proto.SubjectMissing, &proto.MissingQuestion{Job: "j"}, &a)
	if fmt.Sprint(a.Ranges) != "[{10 15} {16 20}]" || a.Seq != seq || a.Stream != p.Stream || !a.Known || a.Done {
		t.Errorf("%+v", a)
	}
	r.send(all("j", 10, 20)...)
	p = r.await("j", done)
	if p.OK != 20 || p.Failed != 0 || p.Verdict != Valid || p.Host == "" {
		t.Errorf("%+v", p)
	}
	m := r.verify("j")
	if m.Counts.OK != 20 || m.Statistics.Dropped.Duplicates != 1 || m.Statistics.Dropped.Replaced != 1 {
		t.Errorf("%+v %+v", m.Counts, m.Statistics.Dropped)
	}
	var v proto.VerifyAnswer
	r.ask(proto.SubjectVerify, &proto.VerifyQuestion{Job: "j"}, &v)
	if !v.Known || !v.Valid || v.Error != "" {
		t.Errorf("%+v", v)
	}
	edit(t, p.Output, func(s string) string { return s[1:] })
	r.ask(proto.SubjectVerify, &proto.VerifyQuestion{Job: "j"}, &v)
	if v.Valid || len(v.Reasons) == 0 {
		t.Errorf("after tampering: %+v", v)
	}
}

// What is folded and in a checkpoint is purged, but for the last message.
func TestSharedDiskPurges(t *testing.T) {
	r := newRig(t)
	a := r.start()
	r.job("j", 20)
	seq := r.send(all("j", 0, 10)...)
	r.await("j", folding(seq))
	a.stop()
	b := r.start() // it finds the message by which it knows the stream
	seq = r.send(all("j", 10, 15)...)
	r.await("j", folding(seq))
	b.stop()
	s, err := r.conn.JS.Stream(t.Context(), proto.ResultStream)
	if err != nil {
		t.Fatal(err)
	}
	if st := s.CachedInfo().State; st.FirstSeq < 10 || st.LastSeq != 15 || st.Msgs < 1 {
		t.Errorf("%+v", st)
	}
}

// An aggregator with an empty or an older disk rebuilds the job that is not finished, and leaves the one that is.
func TestOtherDisk(t *testing.T) {
	for _, disk := range []string{"empty", "older"} {
		t.Run(disk, func(t *testing.T) {
			r := newRig(t)
			keep := func(a *Aggregator) { a.SharedDisk = false }
			a := r.start(keep)
			r.job("i", 3)
			r.job("j", 20)
			r.await("i", folding(r.send(all("i", 0, 2)...)))
			a.stop()
			other := filepath.Join(t.TempDir(), "other")
			if disk == "older" {
				copyDir(t, r.dir, other)
			}
			a = r.start(keep)
			r.send(all("i", 2, 3)...)
			r.await("i", done)
			r.await("j", folding(r.send(all("j", 0, 10)...)))
			a.stop()
			// The results of i are gone where those of j need not be kept for them.
			if err := broker.Purge(t.Context(), r.conn.JS, proto.ResultStream, proto.ResultSubject("i")); err != nil {
				t.Fatal(err)
			}
			told := r.history("i")
			r.dir = other
			a = r.start(keep)
			r.send(all("j", 10, 20)...)
			if p := r.await("j", done); p.OK != 20 || p.Duplicates != 0 {
				t.Errorf("%+v", p)
			}
			r.verify("j")
			var m proto.MissingAnswer
			r.ask(proto.SubjectMissing, &proto.MissingQuestion{Job: "i"}, &m)
			if !m.Known || !m.Done {
				t.Errorf("the finished job: %+v", m)
			}
			a.stop()
			for _, p := range told() {
				if p.State != proto.FoldDone || p.OK != 3 || p.Verdict != Valid {
					t.Errorf("the finished job was told to be %+v", p)
				}
			}
			a = r.start(keep) // it is so on the disk, too
			if p := r.await("i", done); p.OK != 3 {
				t.Errorf("%+v", p)
			}
			a.stop()
		})
	}
}

// history collects every progress of a job that is told from now on.
func (r *rig) history(id string) func() []*proto.Progress {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	var out []*proto.Progress
	over, began := make(chan error, 1), make(chan struct{})
	go func() {
		over <- watch(ctx, r.kv(), proto.ProgressKey(id), func(e jetstream.KeyValueEntry) {
			p := new(proto.Progress)
			if e.Operation() == jetstream.KeyValuePut && p.Decode(e.Value()) == nil {
				out = append(out, p)
			}
		}, func() { close(began) })
	}()
	<-began
	return func() []*proto.Progress {
		r.t.Helper()
		cancel()
		if err := <-over; err != nil {
			r.t.Fatal(err)
		}
		v, err := broker.Get(r.t.Context(), r.conn.JS, id)
		if err != nil {
			r.t.Fatal(err)
		}
		return append(out, &v.Progress)
	}
}

func TestJobThatTheWatchHasNotSeenYet(t *testing.T) {
	r := newRig(t)
	r.job("j", 1)
	r.send(good("j", 0, 1)) // both before the aggregator starts: the result may come first
	r.start()
	r.await("j", done)
}

func TestResultsOfUnknownJobs(t *testing.T) {
	r := newRig(t)
	a := r.start()
	r.job("j", 2)
	r.send(good("nobody", 0, 1))
	if _, err := r.conn.JS.Publish(t.Context(), "res.a.b!c", []byte("x")); err != nil {
		t.Fatal(err)
	}
	seq := r.send(good("nobody", 1, 1), good("j", 0, 1))
	r.await("j", folding(seq))
	a.stop()
	if rs, _ := readAll(t, read(t, filepath.Join(r.dir, "unknown"))); len(rs) != 3 {
		t.Errorf("%d results set aside", len(rs))
	}
	var m proto.MissingAnswer
	r.start()
	r.ask(proto.SubjectMissing, &proto.MissingQuestion{Job: "nobody"}, &m)
	if m.Known {
		t.Errorf("%+v", m)
	}
}

func TestRemovedJob(t *testing.T) {
	r := newRig(t)
	r.start()
	r.job("i", 1)
	r.job("j", 2)
	r.send(good("i", 0, 1), good("j", 0, 1))
	p := r.await("i", done)
	r.await("j", func(p *proto.Progress) bool { return p.OK == 1 })
	for _, id := range []string{"i", "j"} {
		v, err := broker.Get(t.Context(), r.conn.JS, id)
		if err != nil {
			t.Fatal(err)
		}
		if err := broker.Remove(t.Context(), r.conn.JS, v); err != nil {
			t.Fatal(err)
		}
	}
	r.awaitGone("i")
	r.awaitGone("j")
	if _, err := os.Stat(p.Output); err != nil {
		t.Errorf("the output file went too: %v", err)
	}
	r.job("j", 2) // it starts afresh
	r.send(good("j", 1, 5), good("j", 0, 6))
	if p := r.await("j", done); p.OK != 2 || p.Duplicates != 0 {
		t.Errorf("%+v", p)
	}
}

// awaitGone waits until the aggregator does not know a job any more, and its state is gone.
func (r *rig) awaitGone(id string) {
	r.t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		var m proto.MissingAnswer
		r.ask(proto.SubjectMissing, &proto.MissingQuestion{Job: id}, &m)
		if _, err := os.Stat(filepath.Join(r.dir, "jobs", id)); !m.Known && errors.Is(err, os.ErrNotExist) {
			return
		}
	}
	r.t.Fatalf("job %s does not go", id)
}

// A job that was removed while no aggregator ran is forgotten by the next; one that the broker merely lost is not.
func TestRemovedWhileNobodyLooked(t *testing.T) {
	r := newNetRig(t)
	a := r.start()
	r.job("i", 2)
	r.job("j", 2)
	r.await("j", func(p *proto.Progress) bool { return p.State == proto.FoldFolding })
	r.await("i", func(p *proto.Progress) bool { return p.State == proto.FoldFolding })
	a.stop()
	if err := r.kv().Purge(t.Context(), proto.JobKey("i")); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.awaitGone("i")
	r.restart(t.TempDir())
	r.send(good("j", 0, 1), good("j", 1, 1)) // its spec is not there any more
	r.await("j", done)
}

func TestKeepFor(t *testing.T) {
	r := newRig(t)
	r.start(func(a *Aggregator) { a.KeepFor = time.Millisecond })
	r.job("j", 1)
	w, err := r.kv().Watch(t.Context(), proto.JobKey("j"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = w.Stop()
		for range w.Updates() {
		}
	}()
	r.send(good("j", 0, 1))
	for e := range w.Updates() {
		if e != nil && e.Operation() != jetstream.KeyValuePut {
			break
		}
	}
	r.awaitGone("j")
	r.verify("j")
}

func TestOutputFolderMended(t *testing.T) {
	r := newRig(t)
	blocked := filepath.Join(r.out, "j")
	if err := os.WriteFile(blocked, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.job("i", 1)
	r.job("j", 1)
	r.send(good("j", 0, 1))
	p := r.await("j", func(p *proto.Progress) bool { return p.Note != "" })
	if p.State != proto.FoldWriting || !strings.Contains(p.Note, "cannot write "+blocked) {
		t.Errorf("%+v", p)
	}
	r.send(good("i", 0, 1))
	r.await("i", done) // others go on
	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	if p := r.await("j", done); p.Note != "" {
		t.Errorf("%+v", p)
	}
	r.verify("j")
}

// A spool that cannot be written stops the fold, says so, and loses nothing.
func TestStateFolderMended(t *testing.T) {
	r := newRig(t)
	r.start()
	r.job("i", 1)
	if p := r.await("i", func(*proto.Progress) bool { return true }); p.Note != "" {
		t.Errorf("%+v", p)
	}
	jobs := filepath.Join(r.dir, "jobs")
	if err := os.WriteFile(filepath.Join(jobs, "j"), nil, 0o644); err != nil { // where the job's folder should be
		t.Fatal(err)
	}
	r.job("j", 1)
	seq := r.send(good("j", 0, 1), good("i", 0, 1))
	p := r.await("i", func(p *proto.Progress) bool { return p.Note != "" })
	if !strings.Contains(p.Note, "free space or fix permissions") || p.Seq >= seq {
		t.Errorf("%+v", p)
	}
	if err := os.Remove(filepath.Join(jobs, "j")); err != nil {
		t.Fatal(err)
	}
	r.await("j", done)
	r.await("i", done)
}

func TestRunRefusesNonsense(t *testing.T) {
	if err := (&Aggregator{}).Run(t.Context()); err == nil {
		t.Error("an empty aggregator ran")
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	a := &Aggregator{Conn: &broker.Conn{}, Self: proto.Owner{ID: "x"}, Dir: file, Output: func(*proto.Job) Files { return Files{} }}
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "choose another --data") {
		t.Errorf("%v", err)
	}
}
