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
	"strings"
	"sync"

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
	old   position           // the last result that was there before we began
	high  position           // see checkpoint
	marks map[string]jobMark // of jobs in the checkpoint that could not be opened
	heard map[string]uint64  // the latest revision of each job's key in this session
	kept  position           // of the checkpoint on disk; zero where the stream is folded again since
	turns int64              // how often the fold began anew
	visit int64              // the session: see sight
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
		jobs: map[string]*job{}, marks: map[string]jobMark{}, heard: map[string]uint64{},
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
		level := slog.LevelWarn
		if errors.Is(err, fs.ErrNotExist) { // as at the first start
			level = slog.LevelDebug
		}
		log.Log(ctx, level, "results are folded from the first there is", "reason", err)
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

func jobsDir(dir string) string         { return filepath.Join(dir, "jobs") }
func (s *state) jobsDir() string        { return jobsDir(s.dir) }
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
	there := map[string]bool{}
	for _, d := range dirs {
		there[d.Name()] = true
		if strings.HasPrefix(d.Name(), gonePrefix) {
			_ = os.RemoveAll(filepath.Join(s.jobsDir(), d.Name())) // costs some disk where it fails
		}
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
	for id, m := range s.marks {
		if there[id] {
			continue
		}
		if m.Length > 0 {
			s.log.Warn("results on disk are gone; what can be had is folded again, the rest will be run again", "job", id)
			again = true
		}
		delete(s.marks, id)
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
	delete(s.marks, id)
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

// begin notes what lay in the stream when it was opened for the first time.
func (s *state) begin(old position) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.old.Stream == 0 {
		s.old = old
	}
}

// before says whether a message had come before we began.
func (s *state) before(m message) bool { return s.old.Stream == s.pos.Stream && m.seq <= s.old.Seq }

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
