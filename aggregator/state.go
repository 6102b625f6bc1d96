package aggregator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// state is all that the fold knows, in memory and under Dir. One process has it at a time: see tenure.
type state struct {
	dir  string
	log  *slog.Logger
	m    *meter
	host string

	// add makes one change to the set of jobs at a time, with their folders. It is taken before mu.
	add sync.Mutex

	mu    sync.Mutex // guards what follows, and the jobs
	jobs  map[string]*job
	pos   position
	high  position           // see checkpoint
	marks map[string]jobMark // of jobs in the checkpoint that could not be opened
	gone  map[string]int64   // when jobs were deleted, by the broker's clock, Unix ns
	kept  position           // of the checkpoint on disk; zero where the stream is folded again since
	turns int64              // how often the fold began anew
	notes [notes]string      // why the fold does not go on, for people
	moved bool               // pos differs from the last checkpoint
	wake  chan<- struct{}    // tells the keeper that a job is whole
	aside *spool             // results that belong to no job
	ctx   context.Context    // of the jobs' contexts
}

// asideMax bounds the file of the results that belong to no job.
const asideMax = 64 << 20

// openState reads what lies under dir. Its jobs end with ctx.
func openState(ctx context.Context, dir, host string, log *slog.Logger, m *meter, wake chan<- struct{}) (*state, error) {
	s := &state{
		dir: dir, log: log, m: m, host: host, ctx: ctx, wake: wake,
		jobs: map[string]*job{}, marks: map[string]jobMark{}, gone: map[string]int64{},
		aside: &spool{path: filepath.Join(dir, "unknown")},
	}
	if err := broker.MakeDir(s.jobsDir()); err != nil {
		return nil, fmt.Errorf("make the folder of jobs: %w", err)
	}
	sweep(dir)
	c, err := readCheckpoint(s.checkpointFile())
	lost := errors.Is(err, errNoCheckpoint)
	if err != nil && !lost {
		return nil, err
	}
	if lost {
		log.Info("results are folded from the first there is", "reason", err)
		c = new(checkpoint)
	}
	s.pos, s.high, s.kept = c.position, c.High, c.position
	for _, m := range c.Jobs {
		s.marks[m.ID] = m
	}
	again, err := s.openJobs(ctx, lost)
	if err != nil {
		s.close()
		return nil, err
	}
	if again {
		s.pos.Seq, s.pos.Time, s.kept = 0, 0, position{}
	}
	return s, s.openAside()
}

func (s *state) jobsDir() string        { return filepath.Join(s.dir, "jobs") }
func (s *state) checkpointFile() string { return filepath.Join(s.dir, "checkpoint") }

// sweep removes what writes that a crash cut short left behind.
func sweep(dir string) {
	left, _ := filepath.Glob(filepath.Join(dir, ".*[0-9]")) // the pattern is valid
	for _, f := range left {
		_ = os.Remove(f) // costs some bytes of disk where it fails
	}
}

// openJobs opens every job there is a folder of, and says whether results must be folded again because one lost some.
func (s *state) openJobs(ctx context.Context, lost bool) (again bool, err error) {
	dirs, err := os.ReadDir(s.jobsDir())
	if err != nil {
		return false, fmt.Errorf("list jobs: %w", err)
	}
	for _, d := range dirs {
		if !d.IsDir() || !validID(d.Name()) {
			continue
		}
		err := s.openJob(ctx, d.Name(), lost)
		if errors.Is(err, errSpoolShort) {
			s.log.Warn("results on disk are damaged or older than the checkpoint; what can be had is folded again, the rest will be run again",
				"job", d.Name())
			again = true
		} else if err != nil {
			return false, err
		}
	}
	return again, nil
}

// openJob opens the job in the folder of that name. A folder without a spec that can be read is left alone: the spec
// comes again with the broker's copy.
func (s *state) openJob(ctx context.Context, id string, lost bool) error {
	dir := filepath.Join(s.jobsDir(), id)
	sweep(dir)
	spec, err := readSpec(filepath.Join(dir, fileSpec))
	if err != nil || spec.ID != id {
		s.log.Warn("the spec of a job on disk cannot be read", "job", id, "error", err)
		return nil
	}
	j, err := newJob(s.ctx, dir, spec)
	if err != nil {
		s.log.Warn("a job on disk is left alone", "error", err)
		return nil
	}
	j.loadAbout()
	s.jobs[id] = j
	mark := s.mark(j)
	if j.loadDone() {
		s.unlink(j)
		return nil
	}
	if lost {
		mark.Length = -1
	}
	err = j.restore(ctx, mark.Length)
	short := errors.Is(err, errSpoolShort)
	if short {
		if aerr := j.another(); aerr != nil {
			return fmt.Errorf("open job %s: %w", id, aerr)
		}
	}
	if err != nil && !short {
		return fmt.Errorf("open job %s: %w", id, err)
	}
	s.whole(j)
	return err
}

// mark hands a job what the checkpoint holds of it.
func (s *state) mark(j *job) jobMark {
	m := s.marks[j.spec.ID]
	delete(s.marks, j.spec.ID)
	j.first, j.drops = m.First, m.Drops
	return m
}

func readSpec(path string) (*proto.Job, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read spec: %w", err)
	}
	spec := new(proto.Job)
	if err := spec.Decode(b); err != nil {
		return nil, err
	}
	return spec, nil
}

// openAside goes on with the file of results that belong to no job.
func (s *state) openAside() error {
	st, err := os.Stat(s.aside.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at the results of unknown jobs: %w", err)
	}
	s.aside.flushed = st.Size()
	return nil
}

// close gives back the files. What had to be on disk is there.
func (s *state) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, j := range s.jobs {
		j.stop()
		j.spool.close()
	}
	s.aside.close()
}

// know adds a job that was created at the broker's time born (Unix ns), unless it was deleted since. was is what was
// last told of it, which may be nil: a job that another aggregator has finished, or this one with a disk that was lost,
// is finished. What is here of a job that was removed before this one was created is forgotten.
func (s *state) know(spec *proto.Job, born int64, was *proto.Progress) error {
	s.add.Lock()
	defer s.add.Unlock()
	if s.stale(spec) {
		s.drop(spec.ID, spec.After)
	}
	s.mu.Lock()
	have, gone := s.jobs[spec.ID], s.gone[spec.ID] >= born && born > 0
	s.mu.Unlock()
	if gone {
		return nil
	}
	over := was != nil && was.State == proto.FoldDone && was.After == spec.After
	if have != nil {
		err := s.same(have, spec)
		if err == nil && over {
			err = s.conclude(have, was)
		}
		return err
	}
	j, err := newJob(s.ctx, filepath.Join(s.jobsDir(), spec.ID), spec)
	if err != nil {
		return err
	}
	j.born = born
	if err := j.create(); err != nil {
		return err
	}
	s.mu.Lock()
	mark := s.mark(j)
	s.mu.Unlock()
	if over {
		err = s.conclude(j, was)
	} else {
		err = j.restore(s.ctx, mark.Length)
	}
	if err != nil && !errors.Is(err, errSpoolShort) {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.jobs[spec.ID] = j
	j.touch()
	s.whole(j)
	return nil
}

// settled says whether nothing that the broker holds of a job can change what is known of it here.
func (s *state) settled(spec *proto.Job) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := s.jobs[spec.ID]
	return j != nil && j.state != proto.FoldFolding && j.after == spec.After
}

// stale says whether the job that is known may be one that was removed before this one was created.
func (s *state) stale(spec *proto.Job) bool {
	j := s.job(spec.ID)
	return j != nil && spec.After != 0 && j.spec.After != spec.After
}

// conclude takes an aggregator's word that the job's files are whole. The caller has s.add.
func (s *state) conclude(j *job, was *proto.Progress) error {
	s.mu.Lock()
	folding := j.state == proto.FoldFolding
	s.mu.Unlock()
	if !folding {
		return nil
	}
	if err := j.saveDone(was); err != nil { // until then nothing may be told of it
		return fmt.Errorf("%w: %w", errReload, err)
	}
	s.mu.Lock()
	if j.state != proto.FoldFolding { // its last result came meanwhile: the files are written here too
		s.mu.Unlock()
		return nil
	}
	j.drops = dropped{Late: was.Late}
	s.over(j, was)
	j.release()
	s.mu.Unlock()
	s.log.Info("job was finished before", "job", j.spec.ID, "host", was.Host, "output", was.Output)
	s.unlink(j)
	return nil
}

// over closes a job in memory.
func (s *state) over(j *job, p *proto.Progress) {
	j.finished, j.state, j.left, j.doneAt, j.note = p, proto.FoldDone, 0, time.Now(), ""
	j.touch()
	j.urgent = true
	s.kick()
}

func (s *state) same(j *job, spec *proto.Job) error {
	if j.spec.Lines != spec.Lines || j.spec.SHA256 != spec.SHA256 {
		return fmt.Errorf("%w: %s came again with another input; that is ignored", errBadJob, spec.ID)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	j.after = spec.After
	return nil
}

// forget drops a job that was deleted at the broker's time when (Unix ns): its state here, never its final files. It
// returns false when there is no such job, or when it was created after that.
func (s *state) forget(id string, when int64) bool {
	s.add.Lock()
	defer s.add.Unlock()
	return s.drop(id, when)
}

// drop is forget for those who have s.add.
func (s *state) drop(id string, when int64) bool {
	s.mu.Lock()
	j := s.jobs[id]
	if j != nil && j.born > when {
		s.mu.Unlock()
		return false
	}
	if len(s.gone) >= 1<<14 {
		clear(s.gone)
	}
	s.gone[id] = max(s.gone[id], when)
	delete(s.jobs, id)
	delete(s.marks, id)
	if j != nil {
		j.stop()
		j.spool.close()
	}
	s.mu.Unlock()
	if j == nil {
		return false
	}
	if err := os.RemoveAll(j.dir); err != nil {
		s.log.Warn("state of a deleted job stays on disk", "job", id, "error", err)
	}
	return true
}

// whole freezes a job whose lines have all ended: from here on its files are final.
func (s *state) whole(j *job) {
	if j.state != proto.FoldFolding || j.left > 0 {
		return
	}
	j.state = proto.FoldWriting
	j.touch()
	j.urgent = true
	s.kick()
}

func (s *state) kick() { signal(s.wake) }

// signal wakes who waits at a channel with room for one.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Who may say why the fold does not go on.
const (
	noteFold = iota
	noteSave
	notes
)

// setNote says to the users of all unfinished jobs why nothing moves; empty: it moves. It returns whether that is new.
func (s *state) setNote(who int, note string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.notes[who] == note {
		return false
	}
	s.notes[who] = note
	for _, j := range s.jobs {
		if j.finished == nil {
			j.unshown, j.urgent = true, true
		}
	}
	s.kick()
	return true
}

// why is the first note there is.
func (s *state) why() string { return cmp.Or(s.notes[:]...) }

// moveTo sets where the fold stands in the stream. again says that it begins anew, at the first message there is: then
// the checkpoint on disk, and one on its way there, speak of messages that are not folded.
func (s *state) moveTo(p position, again bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.Stream != s.high.Stream {
		s.high = position{Stream: p.Stream}
	}
	if again {
		s.kept = position{}
		s.turns++
		for _, j := range s.jobs {
			j.first = 0
		}
	}
	if s.pos != p {
		s.pos, s.moved = p, true
	}
}

func (s *state) position() position {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pos
}

// has says whether a job was not deleted, with or without a successor. The answer holds for those who have s.add.
func (s *state) has(j *job) bool { return s.job(j.spec.ID) == j }

func (s *state) job(id string) *job {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.jobs[id]
}
