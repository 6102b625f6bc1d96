package aggregator

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

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
	if d := m.Statistics.Dropped; d.WastedTokens == 0 || fmt.Sprint(d.ByModel) != fmt.Sprint([]ModelLosses{{testModel, d.Losses}}) {
		t.Errorf("by model: %+v", d)
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

// A job that was removed and created again while no aggregator ran begins anew: the marker of its removal is gone, but
// the new spec tells.
func TestCreatedAgainWhileNobodyLooked(t *testing.T) {
	for _, disk := range []string{"same", "empty"} {
		t.Run(disk, func(t *testing.T) {
			r := newRig(t)
			a := r.start()
			r.job("i", 2)
			r.job("j", 2)
			r.send(all("i", 0, 2)...)
			r.send(good("j", 0, 1))
			r.await("i", done)
			r.await("j", func(p *proto.Progress) bool { return p.OK == 1 })
			a.stop()
			for _, id := range []string{"i", "j"} {
				v, err := broker.Get(t.Context(), r.conn.JS, id)
				if err != nil {
					t.Fatal(err)
				}
				if err := broker.Remove(t.Context(), r.conn.JS, v); err != nil {
					t.Fatal(err)
				}
				es, err := r.kv().History(t.Context(), proto.JobKey(id))
				if err != nil {
					t.Fatal(err)
				}
				again := spec(id, 2)
				again.After = es[0].Created().UnixNano()
				r.put(again)
				b, err := v.Progress.Encode() // a dying aggregator told once more
				if err != nil {
					t.Fatal(err)
				}
				if _, err := r.kv().Put(t.Context(), proto.ProgressKey(id), b); err != nil {
					t.Fatal(err)
				}
			}
			told := r.history("i")
			if disk == "empty" {
				r.dir = t.TempDir()
			}
			a = r.start()
			r.await("i", func(p *proto.Progress) bool { return p.State == proto.FoldFolding && p.OK == 0 && p.After != 0 })
			for range 2 { // and it is known again by the next one
				r.await("j", func(p *proto.Progress) bool { return p.OK == 0 && p.After != 0 })
				a.stop()
				a = r.start()
			}
			for i, p := range told() {
				if i > 0 && p.State == proto.FoldDone { // the first was there before
					t.Errorf("a job that was just created was told to be %+v", p)
				}
			}
			r.send(all("i", 0, 2)...)
			if p := r.await("i", done); p.OK != 2 || p.Late != 0 || p.Duplicates != 0 {
				t.Errorf("%+v", p)
			}
			a.stop()
			a = r.start()
			r.await("i", done)
			a.stop()
		})
	}
}

// A job is removed and created again, so that results of the first may yet come, at a broker that took the place of another one, and gives revisions from 1 again.
func TestRemovedAtAnotherBroker(t *testing.T) {
	r := newNetRig(t)
	r.start()
	for range 50 {
		r.job("j", 2)
	}
	old := r.await("j", folding(r.send(good("j", 0, 1))))
	r.restart(t.TempDir())
	r.job("j", 2) // by its owner
	r.await("j", func(p *proto.Progress) bool { return p.OK == 1 && p.Stream != old.Stream })
	v, err := broker.Get(t.Context(), r.conn.JS, "j")
	if err != nil {
		t.Fatal(err)
	}
	if err := broker.Remove(t.Context(), r.conn.JS, v); err != nil {
		t.Fatal(err)
	}
	r.awaitGone("j")
	es, err := r.kv().History(t.Context(), proto.JobKey("j"))
	if err != nil {
		t.Fatal(err)
	}
	again := spec("j", 2)
	again.After = es[0].Created().UnixNano()
	r.put(again)
	r.await("j", func(p *proto.Progress) bool { return p.After == again.After })
	late := bad("j", 0, proto.CodeCancelled) // by a worker that was out of touch
	late.Run = (&proto.Job{}).Run()
	cut := bad("j", 1, proto.CodeRequestTimeout)
	cut.Run = again.Run()
	if p := r.await("j", folding(r.send(late, cut))); p.OK != 0 || p.Failed != 1 || len(p.Errors) != 1 || p.Errors[0].Code != cut.Code {
		t.Errorf("%+v", p)
	}
	mine := good("j", 0, 2)
	mine.Run = again.Run()
	r.send(good("j", 1, 2), mine) // one of an older program, which tells no run
	if p := r.await("j", done); p.OK != 2 || p.Duplicates != 0 || p.After != again.After {
		t.Errorf("%+v", p)
	}
	r.verify("j")
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
