package aggregator

import (
	"errors"
	"fmt"
	"time"

	"millrace/proto"
)

// message is one message of the stream of results.
type message struct {
	subject string
	data    []byte
	seq     uint64
	time    int64 // the broker's timestamp, Unix ns
}

// errUnknownJob is how fold asks for a job's spec.
var errUnknownJob = errors.New("unknown job")

// fold takes one message in. The same message may be folded any number of times. After an error it is not taken in and
// must be offered again: errUnknownJob wants the job looked up first (setAside, where there is none), errReload wants
// the state read from disk again, anything else (a full disk, a record of a newer program) wants time and help.
func (s *state) fold(m message) error {
	id := proto.JobOfSubject(m.subject)
	r, err := proto.DecodeResult(m.data)
	s.mu.Lock()
	defer s.mu.Unlock()
	j := s.jobs[id]
	switch {
	case j == nil:
		return fmt.Errorf("%w %q", errUnknownJob, id)
	case errors.Is(err, proto.ErrNewerVersion):
		return fmt.Errorf("read a result of job %s: %w; start the newer program here too", id, err)
	case err != nil || r.Job != id || !j.holds(r.Index), j.earlier(r):
		return s.leave(m)
	}
	if err := s.take(j, r, m); err != nil {
		return err
	}
	s.passed(m)
	return nil
}

// earlier says whether a result is of a job of that id that was removed: a worker that was out of touch may have kept it.
func (j *job) earlier(r *proto.Result) bool { return r.Run != 0 && r.Run <= j.after }

// take gives a result to its job.
func (s *state) take(j *job, r *proto.Result, m message) error {
	if err := j.spool.room(); err != nil {
		return err
	}
	if j.first == 0 {
		j.first = m.seq
	}
	fate := j.judge(r.Index, r.OK)
	again := s.counted(m)
	if fate == fateFirst || fate == fateReplaces {
		err := j.keep(r, m, s.before(m))
		if errors.Is(err, errMixedUp) {
			s.log.Error("a result is dropped", "job", r.Job, "worker", r.Worker, "error", err)
			return s.leave(m)
		}
		if err != nil {
			return err
		}
	} else if again || fate == fateDuplicate && j.told(r.Index, m.time) {
		return nil
	}
	j.drop(r, fate)
	j.touch()
	if !r.OK && fate == fateFirst && j.spec.MaxErrors != "" {
		s.alarm(j)
	}
	if !again {
		s.m.result(r, fate)
	}
	s.whole(j)
	return nil
}

// alarm makes the progress of a job due whose owner may want to halt it: with the first failures, and soon with more.
func (s *state) alarm(j *job) {
	if time.Since(j.shown) >= showSoon {
		j.urgent = true
		s.kick()
	}
}

// keep appends a result that counts. One that came before we began is in no rate.
func (j *job) keep(r *proto.Result, m message, before bool) error {
	off := max(j.spool.size(), int64(len(spoolMagic)))
	if err := j.place(r, off); err != nil {
		return err
	}
	j.spool.append(Record{Index: r.Index, OK: r.OK, Time: m.time, Data: m.data})
	if before {
		j.rebase()
	} else if r.Worker != "" {
		at := m.time / int64(time.Microsecond)
		j.busy.add(at-min(max(r.DurationUS, shortest), longest), at) // of the last attempt: when the others were nobody knows
	}
	return nil
}

// drop counts a result that does not.
func (j *job) drop(r *proto.Result, fate fate) {
	switch fate {
	case fateDuplicate:
		j.drops.Duplicates++
		addUsage(&j.drops.Wasted, r.Usage, 1)
		j.drops.Models.add(r.Model, loss{Duplicates: 1, Wasted: r.Usage})
	case fateLate:
		j.drops.Late++
		addUsage(&j.drops.LateWasted, r.Usage, 1)
	}
}

// counted says whether the message was folded before: then what is dropped of it was counted then. It only keeps the
// counters right; no line depends on it.
func (s *state) counted(m message) bool {
	return s.high.Stream == s.pos.Stream && m.seq <= s.high.Seq && m.time <= s.high.Time
}

// passed moves the fold behind a message.
func (s *state) passed(m message) {
	if !s.moved {
		s.m.since.Store(time.Now().UnixNano())
	}
	s.pos.Seq, s.pos.Time, s.moved = m.seq, m.time, true
	if m.seq > s.high.Seq || m.time > s.high.Time {
		s.high.Seq, s.high.Time = max(s.high.Seq, m.seq), max(s.high.Time, m.time)
	}
}

// setAside passes a message whose job is not known to anyone.
func (s *state) setAside(m message) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leave(m)
}

// leave keeps a message that belongs to no line, for people to look at, as long as there is room for it.
func (s *state) leave(m message) error {
	if !s.counted(m) {
		s.m.unknown.Inc()
		if s.aside.size() < asideMax {
			if err := s.aside.room(); err != nil {
				return err
			}
			s.aside.append(Record{Index: int64(m.seq), Time: m.time, Data: m.data})
		}
	}
	s.passed(m)
	return nil
}
