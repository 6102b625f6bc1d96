package producer

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"millrace/broker"
	"millrace/proto"
)

// adopter starts one with times for tests.
func (w *world) adopter(dir string) (a *Adopter, stop func()) {
	a = &Adopter{Conn: w.connect(), Dir: dir, AckWait: testAckWait, LeaseTTL: time.Second, Disk: 1 << 30, Every: 20 * time.Millisecond,
		Registry: prometheus.NewRegistry()}
	return a, w.background(func(ctx context.Context) {
		if err := a.Run(ctx); !errors.Is(err, context.Canceled) {
			w.t.Errorf("adopter: %v", err)
		}
	})
}

// knows says whether the adopter has nothing to do, and thinks that of a job.
func (a *Adopter) knows() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.busy) == 0 && len(a.next)+len(a.done) > 0
}

// left counts what lies in the object store.
func (w *world) left() int {
	w.t.Helper()
	store, err := w.conn.JS.ObjectStore(w.t.Context(), proto.InputsBucket)
	if err != nil {
		w.t.Fatal(err)
	}
	l, err := store.List(w.t.Context())
	if errors.Is(err, jetstream.ErrNoObjectsFound) {
		return 0
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return len(l)
}

func (w *world) detach(in Input) proto.Job {
	w.t.Helper()
	d := scanned(w.t, in)
	job, _, err := Create(w.t.Context(), w.conn, d.Job(), false)
	if err != nil {
		w.t.Fatal(err)
	}
	for range 2 { // the second time finds it there
		if err := Detach(w.t.Context(), w.conn, d, job); err != nil {
			w.t.Fatal(err)
		}
	}
	return job
}

// TestDetachAdopt: an input that was left with the broker is run by an adopter, from its first line to its last, and
// nothing is left of it.
func TestDetachAdopt(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	text := linesOf(100, "m") + "{broken\n" + strings.Repeat(line("same", "m", strings.Repeat("x", 50_000))+"\n", 3)
	name := file(t, text)
	job := w.detach(Input{Path: name, SkipInvalid: true, Limit: 102, Override: "m2", MaxAttempts: 3})
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if w.left() != 1 {
		t.Fatalf("%d objects", w.left())
	}
	a := w.aggregate(job)
	w.work("m2", okay)
	dir := t.TempDir()
	ad, stop := w.adopter(dir)
	until(t, "the job is done and its input gone", func() bool { return a.folded() == 102 && w.left() == 0 })
	until(t, "it is let go", func() bool { return w.feed(job.ID).State == proto.FeedFinished })
	if p, err := testutil.GatherAndLint(ad.Registry.(prometheus.Gatherer)); err != nil || len(p) > 0 {
		t.Errorf("metrics: %v, %v", p, err)
	}
	until(t, "nothing lies in its folder", func() bool { l, _ := filepath.Glob(filepath.Join(dir, "*")); return len(l) == 0 })
	for i := range job.Lines {
		if n := len(a.of(i)); n != 1 || a.of(i)[0].OK != (i != 100) {
			t.Errorf("line %d: %+v", i, a.of(i))
		}
	}
	stop()
}

// TestAdoptAgain: a job that was removed and left again, which has the same id, is adopted again: when it was finished,
// and, faster than the adopter looks, while it ran. Nothing is left of what was removed.
func TestAdoptAgain(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	in := Input{Path: file(t, linesOf(10, "m"))}
	job := w.detach(in)
	a := w.aggregate(job)
	dir := t.TempDir()
	ad, _ := w.adopter(dir)
	removed := func() {
		t.Helper()
		a.set(func(a *aggregator) { a.noKey = true })
		w.remove(job.ID)
		a.set(func(a *aggregator) { clear(a.results) })
		if again := w.detach(in); again.ID != job.ID {
			t.Fatalf("job %s, was %s", again.ID, job.ID)
		}
		a.set(func(a *aggregator) { a.noKey = false })
	}
	until(t, "all are enqueued", func() bool { return w.queued(&job) == 10 })
	removed()
	stop := w.work("m", okay)
	until(t, "left again, it is done", func() bool { return a.folded() == 10 && w.left() == 0 })
	until(t, "the adopter knows", ad.knows)
	removed()
	until(t, "left again, it is done again", func() bool { return a.folded() == 10 && w.left() == 0 })
	until(t, "it is let go", func() bool { return w.feed(job.ID).State == proto.FeedFinished })
	stop()
	removed()
	until(t, "all are enqueued", func() bool { return w.queued(&job) == 10 })
	w.remove(job.ID)
	until(t, "nothing lies in its folder", func() bool { l, _ := filepath.Glob(filepath.Join(dir, "*")); return len(l) == 0 })
	if left := w.left(); left > 0 {
		t.Errorf("%d objects", left)
	}
}

// TestAdoptUnfinished: a finished job that is not so any more, since the broker came back with an older disk, is
// adopted again.
func TestAdoptUnfinished(t *testing.T) {
	w := tcpWorld(t)
	job := w.detach(Input{Path: file(t, linesOf(10, "m"))})
	w.restart(func(dir string) { copyDir(t, dir, dir+".old") })
	a := w.aggregate(job)
	ad, _ := w.adopter(t.TempDir())
	w.work("m", okay)
	until(t, "the adopter knows that it is done", ad.knows)
	a.set(func(a *aggregator) { a.behind = true; clear(a.results) })
	w.restart(func(dir string) { copyDir(t, dir+".old", dir) })
	a.set(func(a *aggregator) { a.behind = false })
	until(t, "all have run again, and the input is gone", func() bool { return a.folded() == 10 && w.left() == 0 })
}

// TestAdoptKeepsInput: the copy of the input stays until the files are final, whatever the aggregator says before.
func TestAdoptKeepsInput(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	job := w.detach(Input{Path: file(t, linesOf(10, "m"))})
	a := w.aggregate(job)
	a.set(func(a *aggregator) { a.noKey = true })
	w.work("m", okay)
	w.adopter(t.TempDir())
	a.saysDone(t)
	if w.left() != 1 || w.feed(job.ID).Owner.ID == "" {
		t.Errorf("%d objects, record %+v", w.left(), w.feed(job.ID))
	}
	a.set(func(a *aggregator) { clear(a.results) }) // it loses all before it wrote a file
	until(t, "all lines have run again", func() bool { return a.folded() == 10 })
	a.set(func(a *aggregator) { a.noKey = false })
	until(t, "the input is gone", func() bool { return w.left() == 0 })
}

// TestAdoptTakesOver: when an adopter goes, another one goes on; when it died with half of the input laid down, its
// leftovers do no harm.
func TestAdoptTakesOver(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	job := w.detach(Input{Path: file(t, linesOf(100, "m"))})
	a := w.aggregate(job)
	dir := t.TempDir()
	if err := writeFile(filepath.Join(dir, "adopted-"+job.ID+".jsonl"), "half"); err != nil {
		t.Fatal(err)
	}
	_, stop := w.adopter(dir) // sees that the file is not the job's, removes it, and tries again later
	until(t, "the leftover is gone", func() bool {
		b, _ := os.ReadFile(filepath.Join(dir, "adopted-"+job.ID+".jsonl"))
		return string(b) != "half"
	})
	stop()
	_, stop = w.adopter(dir)
	until(t, "the first feeds it", func() bool { return w.queued(&job) == 100 })
	stop()
	_, _ = w.adopter(t.TempDir())
	w.work("m", okay)
	until(t, "the second ends it", func() bool { return a.folded() == 100 && w.left() == 0 })
}

// TestAdoptLeavesAlone: jobs that another process feeds, and halted ones that nobody asked to go on.
func TestAdoptLeavesAlone(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	job := w.detach(Input{Path: file(t, linesOf(10, "m")), MaxErrors: "0"})
	a := w.aggregate(job)
	bad := true
	w.work("m", func(q *proto.Request) *proto.Result {
		r := okay(q)
		if bad && q.Index == 0 {
			bad = false
			r.OK, r.Code = false, proto.CodeEngineError
			return r
		}
		if q.Index > 5 {
			return nil
		}
		return r
	})
	ad, _ := w.adopter(t.TempDir())
	until(t, "it is halted", func() bool { f := w.feed(job.ID); return f.State == proto.FeedHalted && f.Owner.ID == "" })
	until(t, "the adopter knows", ad.knows)
	if _, todo, err := ad.judge(t.Context(), mustKV(t, w), job.ID); todo != adoptNot || err != nil {
		t.Errorf("to do for a halted job: %d, %v", todo, err)
	}
	w.want(job.ID, proto.WantRun)
	if _, todo, err := ad.judge(t.Context(), mustKV(t, w), job.ID); todo != adoptIt || err != nil {
		t.Errorf("to do for one that is to go on: %d, %v", todo, err)
	}
	w.work("m", okay)
	until(t, "it is done", func() bool { return a.folded() == 10 && w.left() == 0 })
}

func mustKV(t *testing.T, w *world) jetstream.KeyValue {
	t.Helper()
	kv, err := jobs(t.Context(), w.conn)
	if err != nil {
		t.Fatal(err)
	}
	return kv
}

// TestAdoptMany: however many jobs there are, few inputs are read at once; all of them are in the end.
func TestAdoptMany(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	text := randomLines(30)
	var all []proto.Job
	for i := range 5 {
		all = append(all, w.detach(Input{Path: file(t, text), Name: fmt.Sprint("job ", i)}))
	}
	dir := t.TempDir()
	w.adopter(dir)
	most := 0
	until(t, "all are enqueued", func() bool {
		l, _ := filepath.Glob(filepath.Join(dir, tempLaid))
		most = max(most, len(l))
		return !slices.ContainsFunc(all, func(job proto.Job) bool { return w.queued(&job) < job.Lines })
	})
	if most > adoptReading {
		t.Errorf("%d inputs are laid down at once", most)
	}
}

// TestAdoptEndsOrphans: a cancelled job ends although nobody has its input any more. Lines that are in its queue, at a worker
// too, keep their names.
func TestAdoptEndsOrphans(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(20, "m", "n"))}))
	o.Window = 8
	a := w.aggregate(o.Job)
	s := w.run(o)
	until(t, "both windows are full", func() bool { return w.queued(&o.Job) == 16 })
	_, _ = w.adopter(t.TempDir())
	s.stop()
	if err := s.end(); err == nil {
		t.Fatal("no error")
	}
	w.pull("m", 1)
	w.want(o.Job.ID, proto.WantCancel)
	until(t, "all have ended", func() bool { return a.folded() == 20 })
	until(t, "it is let go", func() bool { return w.feed(o.Job.ID).State == proto.FeedFinished })
	named := 0
	for i := range o.Job.Lines {
		r := a.of(i)[0]
		if r.OK || r.Code != proto.CodeCancelled || r.Index != i {
			t.Errorf("result %+v", r)
		}
		if r.CustomID == "" {
			continue
		}
		if named++; r.CustomID != fmt.Sprint("id-", i) || r.URL == "" || r.Model != []string{"m", "n"}[i%2] {
			t.Errorf("result %+v", r)
		}
	}
	if named != 16 || w.queued(&o.Job) > 0 {
		t.Errorf("%d lines have their names, %d are queued", named, w.queued(&o.Job))
	}
}

// TestAdoptExpires: a job whose time is over ends although its producer has left and nobody has its input any more.
func TestAdoptExpires(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(20, "m")), LifetimeMS: time.Hour.Milliseconds()}))
	a := w.aggregate(o.Job)
	s := w.run(o)
	until(t, "all are enqueued", func() bool { return w.queued(&o.Job) == 20 })
	s.stop()
	if err := s.end(); err == nil {
		t.Fatal("no error")
	}
	ad, _ := w.adopter(t.TempDir())
	until(t, "the adopter knows", ad.knows)
	judged := func(want int) {
		t.Helper()
		if _, todo, err := ad.judge(t.Context(), mustKV(t, w), o.Job.ID); todo != want || err != nil {
			t.Errorf("to do: %d, %v, want %d", todo, err, want)
		}
	}
	judged(adoptNot)
	f := w.feed(o.Job.ID)
	f.Since -= time.Hour.Nanoseconds()
	f.State = proto.FeedHalted
	w.put(proto.FeedKey(o.Job.ID), &f)
	judged(adoptNot)
	f.State = proto.FeedWaiting
	w.put(proto.FeedKey(o.Job.ID), &f)
	judged(adoptNot) // its owner may come back
	f.State = proto.FeedEnding
	w.put(proto.FeedKey(o.Job.ID), &f)
	judged(adoptIt)
	f.State, f.Since = proto.FeedWaiting, f.Since-overGrace.Nanoseconds()
	w.put(proto.FeedKey(o.Job.ID), &f)
	until(t, "all have ended", func() bool { return a.folded() == 20 })
	until(t, "it is let go", func() bool { return w.feed(o.Job.ID).State == proto.FeedFinished })
	for i := range o.Job.Lines {
		if r := a.of(i)[0]; r.Code != proto.CodeExpired || r.CustomID != fmt.Sprint("id-", i) {
			t.Errorf("result %+v", r)
		}
	}
}

// TestDetachChanged: what is copied is what was scanned, or nothing.
func TestDetachChanged(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	text := randomLines(100) // some chunks are stored before it shows
	name := file(t, text)
	d := scanned(t, Input{Path: name})
	job, _, err := Create(t.Context(), w.conn, d.Job(), false)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeFile(name, strings.ToUpper(text)); err != nil {
		t.Fatal(err)
	}
	if err := Detach(t.Context(), w.conn, d, job); !errors.Is(err, ErrChanged) {
		t.Errorf("error %v", err)
	}
	if w.left() > 0 || w.chunks() > 0 {
		t.Errorf("%d objects and %d chunks are left", w.left(), w.chunks())
	}
}

// randomLines are lines of 20 KB that do not compress to less than half.
func randomLines(n int) string {
	var b strings.Builder
	rnd := rand.NewChaCha8([32]byte{})
	text := make([]byte, 10_000)
	for i := range n {
		_, _ = rnd.Read(text) // never fails
		fmt.Fprintln(&b, line(fmt.Sprint("id-", i), "m", hex.EncodeToString(text)))
	}
	return b.String()
}

// chunks counts the chunks of objects at the broker, and of uploads that never became one.
func (w *world) chunks() (n uint64) {
	w.t.Helper()
	s, err := w.conn.JS.Stream(w.t.Context(), inputsStream)
	var i *jetstream.StreamInfo
	if err == nil {
		i, err = s.Info(w.t.Context(), jetstream.WithSubjectFilter(chunksOf+">"))
	}
	if err != nil {
		w.t.Fatal(err)
	}
	for _, k := range i.State.Subjects {
		n += k
	}
	return n
}

// TestDetachInterrupted: an upload that is interrupted leaves nothing behind, and one whose process was killed only
// until it is swept away. What an object names stays.
func TestDetachInterrupted(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	w.detach(Input{Path: file(t, linesOf(10, "m"))})
	whole := w.chunks()
	s, err := w.conn.JS.Stream(t.Context(), inputsStream)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	begun := func() *uploader {
		t.Helper()
		u := newUploader(ctx, w.conn, "x")
		if _, err := u.Write(make([]byte, (chunkBatch+1)*chunkBytes)); err != nil || w.chunks() != whole+chunkBatch {
			t.Fatalf("%d chunks, %v", w.chunks(), err)
		}
		return u
	}
	killed := begun()
	if err := sweepUploads(t.Context(), w.conn, time.Hour); err != nil || w.chunks() != whole+chunkBatch {
		t.Errorf("%d chunks, which may be those of an upload under way, %v", w.chunks(), err)
	}
	if err := sweepUploads(t.Context(), w.conn, 0); err != nil || w.chunks() != whole {
		t.Errorf("%d chunks, want %d, %v", w.chunks(), whole, err)
	}
	if err := errors.Join(killed.flush(), killed.check(s)); err == nil || !strings.Contains(err.Error(), "1 of 9 chunks") {
		t.Errorf("an upload whose chunks were swept away goes on: %v", err)
	}
	killed.abandon(s)
	interrupted := begun()
	cancel()
	if err := interrupted.flush(); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	interrupted.abandon(s)
	if n := w.chunks(); n != whole {
		t.Errorf("%d chunks, want %d", n, whole)
	}
}

// TestDetachRemoved: nothing is left of the input of a job that is removed before its record names the copy.
func TestDetachRemoved(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	d := scanned(t, Input{Path: file(t, linesOf(10, "m"))})
	job, _, err := Create(t.Context(), w.conn, d.Job(), false)
	if err != nil {
		t.Fatal(err)
	}
	copied := func() {
		t.Helper()
		if err := upload(t.Context(), w.conn, d, job.ID); err != nil || w.left() != 1 {
			t.Fatalf("%d objects, %v", w.left(), err)
		}
	}
	copied()
	copied() // the second replaces the first
	w.remove(job.ID)
	if w.chunks() > 0 {
		t.Errorf("%d chunks after rm", w.chunks())
	}
	copied() // it was under way
	if err := Detach(t.Context(), w.conn, d, job); !errors.Is(err, ErrRemoved) || w.chunks() > 0 {
		t.Errorf("%d chunks, %v", w.chunks(), err)
	}
}

// TestDetachLarge: an input of many chunks comes back as it was.
func TestDetachLarge(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	text := randomLines(300)
	d := scanned(t, Input{Path: file(t, text)})
	job, _, err := Create(t.Context(), w.conn, d.Job(), false)
	if err != nil {
		t.Fatal(err)
	}
	if err := Detach(t.Context(), w.conn, d, job); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "copy")
	if err := download(t.Context(), w.conn, job.ID, name); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(name); err != nil || string(got) != text {
		t.Errorf("%d bytes came back of %d, %v", len(got), len(text), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := download(ctx, w.conn, job.ID, name+"2"); err == nil {
		t.Error("no error")
	}
	if err := download(t.Context(), w.conn, "no such job", name+"2"); !errors.Is(err, jetstream.ErrObjectNotFound) {
		t.Errorf("error %v", err)
	}
}
