package aggregator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// Files are where a job's results go. The three may lie in one folder or in several.
type Files struct {
	Output, Errors, Manifest string

	Over string // id of the job whose results may lie there and are written over; those of any other job stay
}

// finisher writes the files of jobs whose lines have all ended, one job at a time, beside the fold. A crash at any
// instant leaves a job that is written again, to the same bytes; the manifest comes last, and the job's state says that
// it is done only after that.
type finisher struct {
	s       *state
	output  func(*proto.Job) Files
	program string
	// mine makes sure that the lease is ours at this instant, also after a sleep of the process in which it ended.
	mine   func(context.Context) error
	log    *slog.Logger
	retry  time.Duration
	linger time.Duration
	wake   <-chan struct{}
}

// run works until ctx ends, or a spool turns out to be damaged (errReload).
func (f *finisher) run(ctx context.Context) error {
	for {
		var later <-chan time.Time
		for _, j := range f.s.finishable() {
			// What is told of a failure wakes us, too.
			if left := time.Until(j.failed.Add(f.retry)); left > 0 {
				later = time.After(left)
				continue
			}
			err := f.one(ctx, j)
			if errors.Is(err, errReload) {
				return err
			}
			if err != nil {
				j.failed = time.Now()
				later = time.After(f.retry)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-f.wake:
		case <-later:
		}
	}
}

// finishable lists the jobs whose lines have all ended, and are on disk.
func (s *state) finishable() []*job {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*job
	for _, j := range s.jobs {
		if j.state == proto.FoldWriting && j.durable == j.spool.size() {
			out = append(out, j)
		}
	}
	sortBy(out, func(j *job) string { return j.spec.ID })
	return out
}

// one finishes a job. What stops it is told to the job's users.
func (f *finisher) one(ctx context.Context, j *job) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(j.ctx, func() { cancel(errDeleted) })()
	to := f.output(j.spec)
	m, err := f.write(ctx, j, to)
	if err == nil {
		err = f.done(j, to, m)
	}
	switch {
	case err == nil:
		f.log.Info("job is finished", "job", j.spec.ID, "ok", m.Counts.OK, "failed", m.Counts.Failed, "verdict", m.Verdict, "output", to.Output)
	case ctx.Err() != nil || j.ctx.Err() != nil:
		err = nil
	case f.s.setJobNote(j, err.Error()):
		f.log.Error("job cannot be finished; trying again", "job", j.spec.ID, "error", err)
	}
	return err
}

var errDeleted = errors.New("the job was deleted")

func (s *state) setJobNote(j *job, note string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.note == note {
		return false
	}
	j.note, j.unshown, j.urgent = note, true, true
	s.kick()
	return true
}

// hint tells what to do about a file that cannot be written.
func hint(path string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("cannot write %s: %w; free space or fix permissions", filepath.Dir(path), err)
}

// write makes the three files.
func (f *finisher) write(ctx context.Context, j *job, to Files) (*Manifest, error) {
	out, err := newPart(to.Output)
	if err != nil {
		return nil, hint(to.Output, err)
	}
	defer out.discard()
	failed, err := newPart(to.Errors)
	if err != nil {
		return nil, hint(to.Errors, err)
	}
	defer failed.discard()
	rep := new(Report)
	if err := eachResult(ctx, j, func(r *row) error {
		rep.Add(r.result, time.Unix(0, r.time))
		if r.result.OK {
			return hint(to.Output, out.write(r.line))
		}
		return hint(to.Errors, failed.write(r.line))
	}); err != nil {
		return nil, err
	}
	rep.Drop(f.s.droppedOf(j))
	facts := ManifestPair{out.facts(to.Manifest, to.Output), failed.facts(to.Manifest, to.Errors)}
	if err := f.commit(ctx, j, out, failed, to); err != nil {
		return nil, err
	}
	m := newManifest(f.program, j.spec, rep.Close())
	m.FirstResult, m.LastResult = rep.Times()
	m.Engines = rep.engines(f.s.enginesOf(j))
	if err := check(ctx, m, to, facts); err != nil {
		return nil, err
	}
	return m, f.putManifest(ctx, m, to)
}

func (s *state) droppedOf(j *job) Dropped {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := newDropped(j.drops.Duplicates, j.replaced, j.wasted())
	d.models(j.drops.Models, j.undoneOf)
	return d
}

func (s *state) enginesOf(j *job) []*proto.Worker {
	s.mu.Lock()
	defer s.mu.Unlock()
	return j.engines.known()
}

// commit puts the two files in their places. A manifest that is there already speaks of other files: it goes first.
// Whoever lost the lease must not touch what the next holder wrote.
func (f *finisher) commit(ctx context.Context, j *job, out, failed *partFile, to Files) error {
	if err := out.settle(); err != nil {
		return hint(to.Output, err)
	}
	if err := failed.settle(); err != nil {
		return hint(to.Errors, err)
	}
	if err := f.ours(ctx); err != nil {
		return err
	}
	if err := vacant(j.spec.ID, to); err != nil {
		return err
	}
	if err := remove(to.Manifest); err != nil {
		return hint(to.Manifest, err)
	}
	broker.CrashPoint("agg.output-before-rename")
	if err := out.rename(); err != nil {
		return hint(to.Output, err)
	}
	broker.CrashPoint("agg.output-after-rename")
	if err := failed.rename(); err != nil {
		return hint(to.Errors, err)
	}
	broker.CrashPoint("agg.errors-after-rename")
	if err := broker.SyncDir(filepath.Dir(to.Output)); err != nil {
		return hint(to.Output, err)
	}
	return hint(to.Errors, broker.SyncDir(filepath.Dir(to.Errors)))
}

// ours makes sure that the job's files are still ours to put in place.
func (f *finisher) ours(ctx context.Context) error {
	if err := f.mine(ctx); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// vacant says whether results of another job came to the place of ours while it ran. Those that may be written over are
// known from the start.
func vacant(id string, to Files) error {
	m, err := ReadManifest(to.Manifest)
	if err != nil || m.Job.ID == id || m.Job.ID == to.Over {
		return nil
	}
	return fmt.Errorf("%s holds the results of job %s, which came there while this one ran; they are not written over: move its files away, or stop and give another -o", to.Output, m.Job.ID)
}

// errAltered says that the files are to be written again.
var errAltered = errors.New("the files read back are not those that were written")

// check reads the files again, completes the manifest with what it finds, and sets the verdict.
func check(ctx context.Context, m *Manifest, to Files, wrote ManifestPair) error {
	a := audit{expect: m.Input.Lines}
	out, err := a.file(ctx, to.Output, true)
	if err != nil {
		return err
	}
	failed, err := a.file(ctx, to.Errors, false)
	if err != nil {
		return err
	}
	m.Files.Output, m.Files.Errors = *out, *failed
	m.Files.Output.Name, m.Files.Errors.Name = wrote.Output.Name, wrote.Errors.Name
	if out.SHA256 != wrote.Output.SHA256 || failed.SHA256 != wrote.Errors.SHA256 {
		return fmt.Errorf("%w: the disk or another program changed %s or %s; the results are kept", errAltered, to.Output, to.Errors)
	}
	a.counts(m)
	a.indexes(m.Job.ID, m.Input.Lines)
	if err := a.twice(ctx); err != nil {
		return err
	}
	if n := m.tokenNote(); n != "" {
		m.Notes = append(m.Notes, n)
	}
	m.judge(a.reasons)
	return nil
}

func (f *finisher) putManifest(ctx context.Context, m *Manifest, to Files) error {
	path := to.Manifest
	b, err := m.encode()
	if err != nil {
		return err
	}
	p, err := newPart(path)
	if err != nil {
		return hint(path, err)
	}
	defer p.discard()
	if err := p.write(b); err != nil {
		return hint(path, err)
	}
	if err := p.settle(); err != nil {
		return hint(path, err)
	}
	if err := f.ours(ctx); err != nil {
		return err
	}
	if err := vacant(m.Job.ID, to); err != nil {
		return err
	}
	broker.CrashPoint("agg.manifest-before-rename")
	if err := p.rename(); err != nil {
		return hint(path, err)
	}
	broker.CrashPoint("agg.manifest-after-rename")
	return hint(path, broker.SyncDir(filepath.Dir(path)))
}

// done makes it known, durably, that the files are whole. A job that was deleted meanwhile may have a successor of the
// same name by now, in the same folder.
func (f *finisher) done(j *job, to Files, m *Manifest) error {
	f.s.add.Lock()
	defer f.s.add.Unlock()
	if !f.s.has(j) {
		return errDeleted
	}
	p := f.s.final(j)
	p.Output, p.ErrorFile, p.Manifest, p.Verdict = to.Output, to.Errors, to.Manifest, m.Verdict
	if !m.Valid {
		p.Verdict += ": " + first(m.Reasons)
	}
	if err := j.saveDone(p); err != nil {
		return err
	}
	if f.s.finish(j, p, f.linger) {
		f.s.unlink(j)
	}
	return nil
}

func (j *job) saveDone(p *proto.Progress) error {
	b, err := p.Encode()
	if err != nil {
		return err
	}
	return hint(filepath.Join(j.dir, fileDone), writeDurable(filepath.Join(j.dir, fileDone), b))
}

// finish closes a job in memory, and says whether its spool may go: nobody is reading on in it.
func (s *state) finish(j *job, p *proto.Progress, linger time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over(j, p)
	if time.Since(j.followed) < linger {
		return false
	}
	j.release()
	return true
}

// final is the progress of a job that is done, without what comes late.
func (s *state) final(j *job) *proto.Progress {
	s.mu.Lock()
	defer s.mu.Unlock()
	j.note = ""
	p := j.progress(s.pos, s.host, "")
	p.State, p.RateLines, p.RateTokens = proto.FoldDone, 0, 0
	p.Late, p.Wasted = 0, j.wasted()
	return p
}

// release lets go of the spool of a finished job in memory; dropSpool deletes it, unless the verdict is INVALID. That
// takes a while where it is large, and does not stop the fold.
func (j *job) release() {
	j.spool.close()
	j.at, j.spool.flushed, j.spool.buf, j.durable = nil, 0, nil, 0
}

func (s *state) dropSpool(j *job) {
	s.add.Lock()
	defer s.add.Unlock()
	if s.has(j) {
		s.unlink(j)
	}
}

// unlink is dropSpool for those who have s.add.
func (s *state) unlink(j *job) {
	if j.finished.Verdict != Valid { // the results may be more right than the files
		return
	}
	broker.CrashPoint("agg.before-spool-delete")
	if err := remove(j.spool.path); err != nil {
		s.log.Warn("the spool of a finished job stays on disk", "job", j.spec.ID, "error", err)
	}
}

// loadDone reads that the job is finished, and since when by the clock of this machine, which wrote it.
func (j *job) loadDone() bool {
	path := filepath.Join(j.dir, fileDone)
	b, err := os.ReadFile(path)
	if err != nil {
		return false
	}
	p := new(proto.Progress)
	if p.Decode(b) != nil || p.State != proto.FoldDone {
		return false
	}
	if st, err := os.Stat(path); err == nil {
		j.doneAt = st.ModTime()
	}
	j.finished, j.state, j.left = p, proto.FoldDone, 0
	return true
}

// row is one line of a job as it goes into its file.
type row struct {
	result *proto.Result
	line   []byte
	time   int64
}

// Lines are read and rendered in batches, by several goroutines, and used in order.
const (
	batchLines = 1024
	batchBytes = 64 << 20 // of results and lines in memory; a batch ends early there
	keptBytes  = 64 << 10 // of a line's memory is used again for another
)

// clear lets go of the result, and of the memory of a line that was long: one in a thousand must not make every row as
// large as it is.
func (r *row) clear() {
	r.result = nil
	if cap(r.line) > keptBytes {
		r.line = nil
	}
}

// eachResult calls use with the result of every line, in the order of the input.
func eachResult(ctx context.Context, j *job, use func(*row) error) error {
	if j.spec.Lines == 0 {
		return nil
	}
	spool, err := os.Open(j.spool.path)
	if err != nil {
		return fmt.Errorf("%w: %w", errReload, err)
	}
	defer spool.Close()
	b := batch{spool: spool, j: j, rows: make([]row, batchLines)}
	for from := int64(0); from < j.spec.Lines; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := b.read(from)
		if err != nil {
			return err
		}
		for i := range n {
			if err := use(&b.rows[i]); err != nil {
				return err
			}
			b.rows[i].clear()
		}
		from += n
	}
	return nil
}

type batch struct {
	spool *os.File
	j     *job
	rows  []row
}

// read fills the rows with the lines from from on, and returns how many.
func (b *batch) read(from int64) (int64, error) {
	most := min(int64(len(b.rows)), b.j.spec.Lines-from)
	var next, bytes atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, min(runtime.GOMAXPROCS(0), 4))
	for w := range errs {
		wg.Go(func() {
			buf := make([]byte, spoolGuess)
			for errs[w] == nil && bytes.Load() < batchBytes {
				i := next.Add(1) - 1
				if i >= most {
					return
				}
				n, err := b.row(from+i, &b.rows[i], buf)
				errs[w] = err
				bytes.Add(n)
			}
		})
	}
	wg.Wait()
	return min(next.Load(), most), errors.Join(errs...)
}

// row reads the result of one line, and returns how many bytes it takes. It needs no lock: the job is frozen.
func (b *batch) row(index int64, to *row, buf []byte) (int64, error) {
	off := b.j.at[index]
	rec, err := readRecord(b.spool, max(off, -off), buf)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errReload, err)
	}
	r, err := proto.DecodeResult(rec.Data)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errReload, err)
	}
	if r.Index != index || r.Job != b.j.spec.ID || r.OK != (off > 0) {
		return 0, fmt.Errorf("%w: the record of line %d is another's", errReload, index)
	}
	to.result, to.time = r, rec.Time
	to.line = proto.AppendLine(to.line[:0], r)
	r.Body = nil // it lies in buf, which is used again
	return int64(len(rec.Data) + len(to.line)), nil
}
