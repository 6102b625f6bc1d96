package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/proto"
)

// Remove forgets a job: its keys, its requests, its results at the broker and its detached input. Its output files
// stay. What somebody wants of the job while it is removed goes with it: nobody can create the job again as long as its
// spec is there, so no record beside it is another one's, and nobody can want anything of it afterwards (Want). A job that
// another one removed and that was created again since stays, and the error is ErrNoJob.
func Remove(ctx context.Context, js jetstream.JetStream, v JobView) error {
	l, err := look(ctx, js, &v.Job)
	if err != nil {
		return err
	}
	for { // again where something was wanted meanwhile, or the spec has changed
		spec, err := l.spec(ctx)
		if err != nil || spec == 0 {
			return err
		}
		if err := l.remove(ctx); err != nil {
			return err
		}
		if err := l.removeKeys(ctx, spec); !errors.Is(err, errChanged) {
			return err
		}
	}
}

// removeKeys removes the records of a job as long as its spec has that revision, and then the spec: so what failed can be
// done again. It does only if nothing was wanted since that was removed.
func (l *leftovers) removeKeys(ctx context.Context, spec uint64) error {
	same := jetstream.WithExpectLastSequenceForSubject(spec, jobsSubject(proto.JobKey(l.job.ID)))
	var wanted uint64
	for _, key := range records(l.job.ID) {
		var err error
		if wanted, err = purgeKey(ctx, l.js, key, same); err != nil {
			return err
		}
	}
	_, err := purgeKey(ctx, l.js, proto.JobKey(l.job.ID), jetstream.WithExpectLastSequenceForSubject(wanted, jobsSubject(proto.ControlKey(l.job.ID))))
	return err
}

// records are the keys of a job beside its spec, that of what is wanted last.
func records(id string) []string {
	return []string{proto.FeedKey(id), proto.ProgressKey(id), proto.ControlKey(id)}
}

// Expire is Remove for a job that may have been removed and created again meanwhile, which Job.After tells: that one
// stays, and the error is ErrNoJob. The spec goes first, if it is still the one that was looked at; then what there was
// beside it before that.
func Expire(ctx context.Context, js jetstream.JetStream, job *proto.Job) error {
	l, err := look(ctx, js, job)
	if err != nil {
		return err
	}
	spec, err := l.spec(ctx)
	if err != nil {
		return err
	}
	if spec == 0 { // it is removed, but perhaps not all of it
		return l.expire(ctx)
	}
	marker, err := purgeKey(ctx, js, proto.JobKey(job.ID), jetstream.WithExpectLastSequencePerSubject(spec))
	if errors.Is(err, errChanged) {
		return again(job)
	}
	if err != nil {
		return err
	}
	e, err := l.kv.Get(ctx, proto.ControlKey(job.ID)) // what was wanted after the look, of this job and not of the next one
	if err == nil && e.Revision() < marker {
		l.keys[e.Key()] = e.Revision()
	}
	if err != nil && !errors.Is(err, jetstream.ErrKeyNotFound) {
		return explain("read "+proto.ControlKey(job.ID), err)
	}
	return l.expire(ctx)
}

func again(job *proto.Job) error {
	return fmt.Errorf("%w: %s was removed and created again, and the new one stays", ErrNoJob, job.ID)
}

// leftovers is what there is of a job beside its spec, as it was when it was looked at: what a job that is created
// again under the same id puts there later is not part of it.
type leftovers struct {
	js     jetstream.JetStream
	kv     jetstream.KeyValue
	job    *proto.Job
	last   map[string]uint64 // of each stream that may hold messages of the job: the last sequence in it
	keys   map[string]uint64 // of each record of the job: its revision
	input  string            // NUID of the object that is the detached input; empty: there is none
	inputs jetstream.ObjectStore
}

// spec is the revision of the job's spec; 0: it is gone. The error is ErrNoJob where it is that of a job that was created
// again.
func (l *leftovers) spec(ctx context.Context) (revision uint64, err error) {
	key := proto.JobKey(l.job.ID)
	e, err := l.kv.Get(ctx, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, explain("read "+key, err)
	}
	var have proto.Job
	if err := have.Decode(e.Value()); err != nil {
		return 0, fmt.Errorf("read %s: %w", key, err)
	}
	if have.After != l.job.After {
		return 0, again(l.job)
	}
	return e.Revision(), nil
}

// streams gives the streams that may hold messages of a job, and under which subject.
func (l *leftovers) streams(f func(stream, subject string) error) error {
	for _, m := range l.job.Models {
		if err := f(proto.RequestStream(m.Model), proto.RequestFilter(m.Model, l.job.ID)); err != nil {
			return err
		}
	}
	return f(proto.ResultStream, proto.ResultSubject(l.job.ID))
}

// object names the detached input. It may lie there before the job says so.
func (l *leftovers) object() string { return cmp.Or(l.job.Object, l.job.ID) }

func look(ctx context.Context, js jetstream.JetStream, job *proto.Job) (*leftovers, error) {
	l := &leftovers{js: js, job: job, last: map[string]uint64{}, keys: map[string]uint64{}}
	kv, err := js.KeyValue(ctx, proto.JobsBucket)
	if err != nil {
		return nil, explain("open bucket "+proto.JobsBucket, err)
	}
	l.kv = kv
	err = l.streams(func(stream, _ string) error {
		s, err := js.Stream(ctx, stream)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return nil
		}
		if err != nil {
			return explain("look at stream "+stream, err)
		}
		l.last[stream] = s.CachedInfo().State.LastSeq
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, key := range records(job.ID) {
		e, err := kv.Get(ctx, key)
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			continue
		}
		if err != nil {
			return nil, explain("read "+key, err)
		}
		l.keys[key] = e.Revision()
	}
	if l.inputs, err = js.ObjectStore(ctx, proto.InputsBucket); err == nil {
		var info *jetstream.ObjectInfo
		if info, err = l.inputs.GetInfo(ctx, l.object()); err == nil {
			l.input = info.NUID
		}
	}
	if err != nil && !gone(err) {
		return nil, explain("look for the input's copy", err)
	}
	return l, nil
}

func gone(err error) bool {
	return errors.Is(err, jetstream.ErrObjectNotFound) || errors.Is(err, jetstream.ErrBucketNotFound)
}

// remove removes the requests, the results and the input.
func (l *leftovers) remove(ctx context.Context) error {
	err := l.streams(func(stream, subject string) error {
		last, ok := l.last[stream]
		if !ok {
			return nil
		}
		return purge(ctx, l.js, stream, subject, jetstream.WithPurgeSequence(last+1))
	})
	if err != nil {
		return err
	}
	if l.input != "" {
		info, err := l.inputs.GetInfo(ctx, l.object())
		if err == nil && info.NUID == l.input {
			err = l.inputs.Delete(ctx, l.object())
		}
		if err != nil && !gone(err) {
			return explain("remove the input's copy", err)
		}
	}
	return nil
}

// expire is remove for a job whose spec is gone, with the records as they were. One that has changed since stays: it is
// of a job that was created again, or of an owner that is about to see that its job is gone and leaves nothing that
// counts for another (After).
func (l *leftovers) expire(ctx context.Context) error {
	if err := l.remove(ctx); err != nil {
		return err
	}
	for key, revision := range l.keys {
		_, err := purgeKey(ctx, l.js, key, jetstream.WithExpectLastSequencePerSubject(revision))
		if err != nil && !errors.Is(err, errChanged) {
			return err
		}
	}
	return nil
}

var errChanged = errors.New("it has changed meanwhile")

// purgeKey removes a record of a job as the Purge of a key-value bucket does, which has no condition on another key, and
// returns the sequence of the marker that it leaves. Where a condition does not hold the error is errChanged.
func purgeKey(ctx context.Context, js jetstream.JetStream, key string, conditions ...jetstream.PublishOpt) (uint64, error) {
	m := nats.NewMsg(jobsSubject(key))
	m.Header.Set("KV-Operation", "PURGE")
	m.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	ack, err := js.PublishMsg(ctx, m, conditions...)
	if hasChanged(err) {
		return 0, errChanged
	}
	if err != nil {
		return 0, explain("remove "+key, err)
	}
	return ack.Sequence, nil
}

// hasChanged says whether err is that a message was not stored because a key has changed.
func hasChanged(err error) bool {
	var wrong *jetstream.APIError
	return errors.As(err, &wrong) &&
		(wrong.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || wrong.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

// jobsSubject is where a key of the bucket of jobs is stored.
func jobsSubject(key string) string { return "$KV." + proto.JobsBucket + "." + key }

// Purge drops the messages of one subject. A stream that is not there has none.
func Purge(ctx context.Context, js jetstream.JetStream, stream, subject string) error {
	return purge(ctx, js, stream, subject)
}

func purge(ctx context.Context, js jetstream.JetStream, stream, subject string, opts ...jetstream.StreamPurgeOpt) error {
	s, err := js.Stream(ctx, stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	}
	if err == nil {
		err = s.Purge(ctx, append(opts, jetstream.WithPurgeSubject(subject))...)
	}
	if err != nil {
		return explain("purge "+subject, err)
	}
	return nil
}
