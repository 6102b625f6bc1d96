package aggregator

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/nuid"

	"millrace/broker"
	"millrace/proto"
)

// sight is one look at the key of a job. Revisions tell which of two looks is the later one, within a session: after it
// the broker may be another one, or have an older disk. Times tell nothing, its clock may be another one too.
type sight struct {
	session int64
	rev     uint64
}

// listen begins a session: what was heard of jobs in those before says nothing of what is heard in this one.
func (s *state) listen() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.visit++
	clear(s.heard)
}

// session is the one that a look at the broker which begins now belongs to.
func (s *state) session() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.visit
}

// maxHeard bounds what is remembered of looks at jobs.
const maxHeard = 1 << 16

// hear says whether a look at a job's key is news: of this session, and nothing later was heard.
func (s *state) hear(id string, at sight) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at.session != s.visit || at.rev < s.heard[id] {
		return false
	}
	if len(s.heard) >= maxHeard {
		clear(s.heard)
	}
	s.heard[id] = at.rev
	return true
}

// know adds a job whose spec was seen, unless it was seen to be deleted since. was is what was last told of it, which
// may be nil: a job that another aggregator has finished, or this one with a disk that was lost, is finished. What is
// here of another job of that id is forgotten.
func (s *state) know(spec *proto.Job, at sight, was *proto.Progress) error {
	s.add.Lock()
	defer s.add.Unlock()
	if !s.hear(spec.ID, at) {
		return nil
	}
	have := s.job(spec.ID)
	if have != nil && spec.After != 0 && have.spec.After != spec.After {
		s.drop(have)
		have = nil
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
	if !over {
		was = nil
	}
	if err := s.admit(j, was); err != nil {
		j.stop()
		j.spool.close()
		return err
	}
	return nil
}

// admit adds a job that is not known, with what is on disk of it, or (was) finished. The caller has s.add.
func (s *state) admit(j *job, was *proto.Progress) error {
	err := j.create()
	if err != nil {
		return err
	}
	s.mu.Lock()
	mark := s.mark(j)
	s.mu.Unlock()
	if was != nil {
		err = s.conclude(j, was)
	} else {
		err = j.restore(s.ctx, mark.Length)
	}
	if err != nil && !errors.Is(err, errSpoolShort) {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.jobs[j.spec.ID] = j
	delete(s.marks, j.spec.ID)
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

// told is a job's spec as the broker has it.
func (s *state) told(j *job) *proto.Job {
	s.mu.Lock()
	defer s.mu.Unlock()
	spec := *j.spec
	spec.After = j.after
	return &spec
}

// forget drops the job under whose key a marker of that time (the broker's, Unix ns) says that it was removed. It
// returns false when there is no such job, or when the marker is that of the one before it: a broker that came back
// with an older disk does not have its spec.
func (s *state) forget(id string, marker int64, at sight) bool {
	s.add.Lock()
	defer s.add.Unlock()
	if !s.hear(id, at) {
		return false
	}
	s.mu.Lock()
	j := s.jobs[id]
	if j == nil {
		delete(s.marks, id)
	}
	s.mu.Unlock()
	if j == nil || j.spec.After == marker {
		return false
	}
	s.drop(j)
	return true
}

// discard drops a job, if it is still there.
func (s *state) discard(j *job) {
	s.add.Lock()
	defer s.add.Unlock()
	if s.has(j) {
		s.drop(j)
	}
}

// drop removes what is here of a job that is there, never its final files. The caller has s.add.
func (s *state) drop(j *job) {
	s.mu.Lock()
	delete(s.jobs, j.spec.ID)
	delete(s.marks, j.spec.ID)
	j.stop()
	j.spool.close()
	s.mu.Unlock()
	if err := s.clear(j.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("state of a deleted job stays on disk", "job", j.spec.ID, "error", err)
	}
}

// gonePrefix begins the names of folders of jobs that are being deleted: what a crash leaves of one is no job's.
const gonePrefix = "."

func (s *state) clear(dir string) error {
	gone := filepath.Join(s.jobsDir(), gonePrefix+nuid.Next())
	if err := os.Rename(dir, gone); err != nil {
		return err
	}
	if err := broker.SyncDir(s.jobsDir()); err != nil {
		return err
	}
	return os.RemoveAll(gone)
}
