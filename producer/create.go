package producer

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// Create finds the job that spec (from Dataset.Job) is, or puts a new one; with again a new one always, whose id ends
// in -r2, -r3, … A job that is continued gets the thresholds, the lifetime and the lane of now; those that again passes
// over stay as they are.
//
// changed is, for a new job, the newest older one of the same input file, if its content was another: its input is gone,
// and it can only be cancelled.
func Create(ctx context.Context, conn *broker.Conn, spec proto.Job, again bool) (job proto.Job, changed *proto.Job, err error) {
	kv, err := jobs(ctx, conn)
	if err != nil {
		return spec, nil, err
	}
	for n := int64(1); ; n++ {
		job = spec
		if n > 1 {
			job.ID, job.Again = proto.RunID(spec.ID, n), n-1
		}
		if job.After, err = removedAt(ctx, kv, job.ID); err != nil {
			return job, nil, err
		}
		existed, err := createJob(ctx, kv, job)
		switch {
		case err != nil:
			return job, nil, err
		case !existed:
			changed, err = olderContent(ctx, conn, &job)
			return job, changed, err
		case !again:
			return job, nil, mergeJob(ctx, kv, &job)
		}
	}
}

// jobs opens the bucket of jobs, which it declares where it is not there.
func jobs(ctx context.Context, conn *broker.Conn) (jetstream.KeyValue, error) {
	kv, err := conn.JS.KeyValue(ctx, proto.JobsBucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		if err := (broker.Declarer{JS: conn.JS}).Base(ctx); err != nil {
			return nil, err
		}
		kv, err = conn.JS.KeyValue(ctx, proto.JobsBucket)
	}
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", proto.JobsBucket, err)
	}
	return kv, nil
}

// removedAt is when a job of that id was removed, by the marker that it left (Unix ns on the broker's clock); 0: there
// is none.
func removedAt(ctx context.Context, kv jetstream.KeyValue, id string) (int64, error) {
	es, err := kv.History(ctx, proto.JobKey(id), jetstream.MetaOnly())
	if errors.Is(err, jetstream.ErrKeyNotFound) || err == nil && es[len(es)-1].Operation() == jetstream.KeyValuePut {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look for an earlier job %s: %w", id, err)
	}
	return es[len(es)-1].Created().UnixNano(), nil
}

// createJob puts the job, or says that it is there.
func createJob(ctx context.Context, kv jetstream.KeyValue, job proto.Job) (existed bool, err error) {
	b, err := job.Encode()
	if err != nil {
		return false, err
	}
	_, err = kv.Create(ctx, proto.JobKey(job.ID), b)
	if err == nil {
		broker.CrashPoint("producer.job-put")
		return false, nil
	}
	if !errors.Is(err, jetstream.ErrKeyExists) {
		return false, fmt.Errorf("put the job: %w", err)
	}
	return true, nil
}

// mergeJob makes job the one that is there, with the limits that job brings.
func mergeJob(ctx context.Context, kv jetstream.KeyValue, job *proto.Job) error {
	have, rev, err := getJob(ctx, kv, job.ID)
	if err != nil {
		return err
	}
	if have.SHA256 != job.SHA256 || have.Lines != job.Lines {
		return fmt.Errorf("job %s holds another input; give this one a name (--name)", job.ID)
	}
	next := have
	next.MaxErrors, next.LifetimeMS, next.Lane = job.MaxErrors, job.LifetimeMS, job.Lane
	*job = next
	if next.MaxErrors == have.MaxErrors && next.LifetimeMS == have.LifetimeMS && next.Lane == have.Lane {
		return nil
	}
	return updateJob(ctx, kv, next, rev)
}

func getJob(ctx context.Context, kv jetstream.KeyValue, id string) (proto.Job, uint64, error) {
	var job proto.Job
	e, err := kv.Get(ctx, proto.JobKey(id))
	if err == nil {
		err = job.Decode(e.Value())
	}
	if err != nil {
		return job, 0, fmt.Errorf("read job %s: %w", id, err)
	}
	return job, e.Revision(), nil
}

func updateJob(ctx context.Context, kv jetstream.KeyValue, job proto.Job, rev uint64) error {
	b, err := job.Encode()
	if err != nil {
		return err
	}
	if _, err := kv.Update(ctx, proto.JobKey(job.ID), b, rev); err != nil {
		return fmt.Errorf("update job %s: %w", job.ID, err)
	}
	return nil
}

// olderContent finds the newest older job of the same file, and returns it where the content was another. One of another
// --limit had other lines, too, but tells nothing of the file.
func olderContent(ctx context.Context, conn *broker.Conn, job *proto.Job) (*proto.Job, error) {
	all, err := broker.Jobs(ctx, conn.JS) // the newest first
	if err != nil || job.Input == "-" {
		return nil, err
	}
	for _, v := range all {
		if v.Job.ID == job.ID || v.Job.Input != job.Input || v.Job.Host != job.Host || v.Job.Limit != job.Limit {
			continue
		}
		if v.Job.SHA256 == job.SHA256 {
			return nil, nil
		}
		return &v.Job, nil
	}
	return nil, nil
}
