package aggregator

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// saved is what a checkpoint on its way to disk holds.
type saved struct {
	checkpoint
	turns int64          // of the state
	jobs  map[*job]int64 // length of the spool
	sync  []*os.File
	dirs  []string // whose names changed
	about map[*job]about
}

// snapshot hands all spools to their files and returns what the checkpoint must hold; nil when nothing changed since
// the last one.
func (s *state) snapshot(workers func(id string) *proto.Worker) (*saved, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := &saved{turns: s.turns, jobs: map[*job]int64{}, about: map[*job]about{}}
	v.position, v.High = s.pos, s.high
	changed := s.moved
	for _, j := range s.jobs {
		if j.meet(workers); j.met {
			v.about[j] = j.about()
		}
		changed = changed || j.unsaved || j.met
		if err := v.take(j); err != nil {
			return nil, err
		}
	}
	if !changed {
		return nil, nil
	}
	if err := s.aside.flush(); err != nil {
		return nil, err
	}
	for _, m := range s.marks {
		v.Jobs = append(v.Jobs, m)
	}
	sortBy(v.Jobs, func(m jobMark) string { return m.ID })
	s.moved = false
	return v, nil
}

// take adds a job to the checkpoint.
func (v *saved) take(j *job) error {
	j.unsaved = false
	drops := j.drops
	drops.Models = maps.Clone(drops.Models) // it is written while more are dropped
	if j.finished != nil {
		if j.drops.Late > 0 {
			v.Jobs = append(v.Jobs, jobMark{ID: j.spec.ID, Drops: drops})
		}
		return nil
	}
	if err := j.spool.flush(); err != nil {
		return err
	}
	v.Jobs = append(v.Jobs, jobMark{ID: j.spec.ID, Length: j.spool.flushed, First: j.first, Drops: drops})
	v.jobs[j] = j.spool.flushed
	if j.spool.flushed != j.durable {
		v.sync = append(v.sync, j.spool.file)
		if j.durable == 0 {
			v.dirs = append(v.dirs, j.dir)
		}
	}
	return nil
}

// meet asks what the workers of a job's results say of themselves.
func (j *job) meet(workers func(id string) *proto.Worker) {
	if j.finished != nil {
		return
	}
	for id, old := range j.engines {
		if w := workers(id); w != nil {
			if now := learn(old, w); !reflect.DeepEqual(now, old) {
				j.engines[id], j.met = now, true
			}
		}
	}
}

// save makes a checkpoint if there is something to save. After an error that is not errReload it is to be called again.
func (s *state) save(workers func(id string) *proto.Worker) error {
	began := time.Now()
	v, err := s.snapshot(workers)
	if err == nil && v != nil {
		err = s.write(v)
	}
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.moved = true
		return err
	}
	if v != nil {
		s.stored(v, began)
	}
	return nil
}

// stored takes in that a checkpoint, begun then, is on disk.
func (s *state) stored(v *saved, began time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for j, n := range v.jobs {
		j.durable = n
	}
	for j := range v.about {
		j.met = false
	}
	if v.turns == s.turns {
		s.kept = v.position
	}
	if s.moved {
		s.m.since.Store(began.UnixNano())
	} else {
		s.m.since.Store(0)
	}
}

func (s *state) write(v *saved) error {
	for _, f := range v.sync {
		// After a failed fsync the system may have forgotten what it could not write, and the next one succeed. Only
		// what lies on disk is to be believed then.
		if err := f.Sync(); err != nil && !errors.Is(err, os.ErrClosed) {
			return fmt.Errorf("%w: sync spool: %w", errReload, err)
		}
	}
	for _, d := range v.dirs {
		if err := broker.SyncDir(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for j, a := range v.about {
		if err := s.saveAbout(j, a); err != nil {
			return err
		}
	}
	broker.CrashPoint("agg.spool-written")
	return writeCheckpoint(s.checkpointFile(), &v.checkpoint)
}

// saveAbout leaves the folder of a deleted job's successor alone.
func (s *state) saveAbout(j *job, a about) error {
	s.add.Lock()
	defer s.add.Unlock()
	if !s.has(j) {
		return nil
	}
	return j.saveAbout(a)
}

// purgeable is the sequence up to which (the message itself excluded) results need not be kept at the broker. The
// last message that is folded stays: by its timestamp the next start knows the stream again. With all it is that of the
// checkpoint, otherwise the first result of an unfinished job, so that an aggregator with an empty disk could begin
// anew. at is that checkpoint.
func (s *state) purgeable(all bool) (before uint64, at position) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.kept.Stream != s.pos.Stream {
		return 0, position{}
	}
	before = s.kept.Seq
	for _, j := range s.jobs {
		if !all && j.finished == nil && j.first > 0 {
			before = min(before, j.first)
		}
	}
	return before, s.kept
}

// news is a progress to be put.
type news struct {
	j     *job
	id    string
	value *proto.Progress
}

// How often a job's progress is put: while it changes, while lines fail that may halt it, and while its last rate is not
// true any more.
const (
	showEvery = time.Second
	showSoon  = 100 * time.Millisecond
	showIdle  = 5 * time.Second
)

// due lists the jobs whose progress is to be put now.
func (s *state) due(now time.Time) []news {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []news
	for id, j := range s.jobs {
		age := now.Sub(j.shown)
		if !(j.urgent || j.unshown && age >= showEvery || j.moving && age >= showIdle) {
			continue
		}
		p := j.progress(s.kept, s.host, s.why())
		// What came since the checkpoint is in the numbers and not in Seq: it is told again after the next one.
		j.urgent, j.unshown, j.shown, j.moving = false, j.unsaved, now, p.RateLines > 0
		out = append(out, news{j, id, p})
	}
	return out
}

// showAgain makes the progress of all jobs due: the broker may have forgotten it.
func (s *state) showAgain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, j := range s.jobs {
		j.unshown, j.urgent = true, true
	}
	s.kick()
}

func (s *state) unshow(due []news) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range due {
		n.j.unshown, n.j.urgent = true, true
	}
}

// aged lists the jobs that finished more than keep ago, and those whose spools nobody reads any more.
func (s *state) aged(now time.Time, keep, linger time.Duration) (old, left []*job) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, j := range s.jobs {
		if j.finished == nil {
			continue
		}
		if j.at != nil && now.Sub(j.followed) > linger {
			j.release()
			left = append(left, j)
		}
		if keep > 0 && now.Sub(j.doneAt) > keep {
			old = append(old, j)
		}
	}
	return old, left
}

// keeper does what is done every second: the checkpoint, what is told of it, and what need not be kept for it.
type keeper struct {
	t      *tenure
	purged position // what was purged: before Seq
	said   said
}

// run works until ctx ends, the state on disk must be read again (errReload), or the lease is lost.
func (k *keeper) run(ctx context.Context) error {
	tick := time.NewTicker(k.t.a.checkpointEvery())
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-k.t.wake:
		}
		if err := k.once(); err != nil {
			return err
		}
	}
}

func (k *keeper) once() error {
	if err := k.save(); err != nil {
		return err
	}
	ctx, ok := k.t.linked()
	if !ok || !k.t.holding.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, brokerTimeout)
	defer cancel()
	return k.tell(ctx)
}

// tell brings the broker up to date. A holder of the lease that slept through the end of its time must not do that: so
// the lease is renewed right before. The only error is ErrLeaseLost.
func (k *keeper) tell(ctx context.Context) error {
	s := k.t.s
	now := time.Now()
	due := s.due(now)
	old, left := s.aged(now, k.t.a.KeepFor, k.t.a.linger())
	for _, j := range left {
		s.dropSpool(j)
	}
	before, at := s.purgeable(k.t.a.SharedDisk || k.t.full.Load())
	purge := before > 1 && (at.Stream != k.purged.Stream || before > k.purged.Seq)
	if len(due) == 0 && len(old) == 0 && !purge {
		return nil
	}
	err := k.t.lease.Renew(ctx)
	if errors.Is(err, broker.ErrLeaseLost) {
		return err
	}
	k.said.warn(k.t.log, "the lease of the aggregator cannot be renewed; trying again", err)
	if err != nil {
		s.unshow(due)
		return nil
	}
	k.show(ctx, due)
	if purge {
		k.purge(ctx, before, at)
	}
	k.expire(ctx, old)
	return nil
}

// save returns errReload only; other errors are told, and it is tried again.
func (k *keeper) save() error {
	s := k.t.s
	err := s.save(k.t.workers.get)
	if errors.Is(err, errReload) {
		return err
	}
	if err != nil {
		if s.setNote(noteSave, hint(filepath.Join(s.dir, "checkpoint"), err).Error()) {
			k.t.log.Error("the checkpoint cannot be written; trying again", "error", err)
		}
		return nil
	}
	s.setNote(noteSave, "")
	signal(k.t.finish)
	return nil
}

func (k *keeper) show(ctx context.Context, due []news) {
	for i, n := range due {
		b, err := n.value.Encode()
		if err == nil && n.j.ctx.Err() == nil {
			_, err = k.t.kv.Put(ctx, proto.ProgressKey(n.id), b)
		}
		k.said.warn(k.t.log, "progress cannot be told; trying again", err)
		if err != nil {
			k.t.s.unshow(due[i:])
			return
		}
	}
}

// purge drops results that are in the checkpoint.
func (k *keeper) purge(ctx context.Context, before uint64, at position) {
	broker.CrashPoint("agg.before-purge")
	err := purge(ctx, k.t.a.Conn.JS, before, at)
	broker.CrashPoint("agg.after-purge")
	if err == nil {
		k.purged = position{Stream: at.Stream, Seq: before}
	}
	k.said.warn(k.t.log, "folded results cannot be purged; trying again", err)
}

// expire forgets jobs that are finished for long.
func (k *keeper) expire(ctx context.Context, old []*job) {
	for _, j := range old {
		if k.t.s.job(j.spec.ID) != j {
			continue // one of the same id was created since
		}
		err := broker.Expire(ctx, k.t.a.Conn.JS, k.t.s.told(j))
		if errors.Is(err, broker.ErrNoJob) {
			continue // likewise, and it is not heard of yet
		}
		k.said.warn(k.t.log, "a finished job cannot be forgotten; trying again", err)
		if err == nil {
			k.t.s.discard(j)
		}
	}
}
