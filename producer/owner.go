package producer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"millrace/broker"
	"millrace/proto"
)

// defaultWindow is how many requests of a job are kept in the queues at least.
const defaultWindow = 20_000

// Owner feeds one job from its input until every line has ended and its files are final. Its fields may be set until Run.
type Owner struct {
	Conn     *broker.Conn
	Dataset  *Dataset
	Job      proto.Job             // as Create returned it
	Self     proto.Owner           // zero: broker.Self()
	Log      *slog.Logger          // nil: silent
	Registry prometheus.Registerer // for the metrics of this owner, while Run lasts; nil: none
	Window   int64                 // requests kept in the queues, at least; 0: 20,000
	AckWait  time.Duration         // set on the consumers; 0: theirs stays
	LeaseTTL time.Duration         // 0: broker.DefaultLeaseTTL
	Disk     int64                 // free bytes of the broker's disk where known, for the size of queues
	Own      bool                  // the workers are those of this process
	// Held is called, where not nil, when another process owns the job; Run watches then, and goes on where that one
	// stops. Where it is nil, Run returns a *HeldError.
	Held func(*HeldError)
	// Report is called, where not nil, with every change of how far it is, never twice at the same time. It must not block.
	Report func(proto.Feed)

	metrics *metrics // shared by the owners of an Adopter
	// fetch, where not nil, gets the dataset once the lease is held.
	fetch func(context.Context) (*Dataset, error)
}

// How a job ends that was not left to run.
var (
	ErrCancelled = errors.New("the job was cancelled")
	ErrExpired   = errors.New("the job's time was over before all lines had run; --timeout counts from its first start, also where it was continued, and a longer one comes too late now; --again makes a fresh run of all lines")
	ErrHalted    = errors.New("too many lines failed, the job was halted")
	ErrLeft      = errors.New("the process that ran the job gave it up")
	ErrRemoved   = errors.New("the job was removed")
	ErrJudged    = errors.New("the input is the same, but other lines of it are valid now than when the job was created")
)

// HeldError says who owns the job. It is a broker.ErrLeaseHeld.
type HeldError struct{ Holder proto.Owner }

func (e *HeldError) Error() string {
	return fmt.Sprintf("the job is run by process %d on %s", e.Holder.PID, e.Holder.Machine())
}

func (e *HeldError) Unwrap() error { return broker.ErrLeaseHeld }

// Run takes the lease on the job and feeds it. It returns
//   - nil when the job is finished, or ErrCancelled or ErrExpired when that is how lines ended;
//   - a *HeldError (broker.ErrLeaseHeld) when a living process has the lease and nobody wants to watch (Held);
//   - ErrLeft when it watched, and the process that it watched gave up;
//   - broker.ErrLeaseLost when another process took it;
//   - ErrRemoved when the job was removed at the broker: nothing of it is put again;
//   - ErrHalted, with the most frequent error, when Job.MaxErrors was exceeded: it can be run again;
//   - ErrChanged when the input is not what it was, and ErrJudged when it is but other lines of it can run;
//   - broker.ErrClosed when the connection is closed for good;
//   - the cause of ctx when that ended first. What is in the queues runs on, and a later Run continues.
//
// A broker that does not answer is waited for, for as long as ctx lasts.
func (o *Owner) Run(ctx context.Context) error {
	m, stop, err := startMetrics(o.Registry)
	if err != nil {
		return err
	}
	defer stop()
	if m == nil {
		m = o.metrics
	}
	ctx, let := o.Conn.While(ctx)
	defer let()
	r := newRun(o, m)
	if err := r.start(ctx); err != nil {
		return err
	}
	m.job(1)
	defer m.job(-1)
	return r.live(ctx)
}

func newRun(o *Owner, m *metrics) *run {
	r := &run{o: o, metrics: m, job: o.Job, d: o.Dataset, log: o.Log, notes: map[noteKind]string{}}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	r.log = r.log.With("job", o.Job.ID)
	r.declare = broker.Declarer{JS: o.Conn.JS, Disk: o.Disk, AckWait: o.AckWait}
	self := o.Self
	if self.ID == "" {
		self = broker.Self()
	}
	r.lease = &broker.Lease{Key: proto.FeedKey(o.Job.ID), Self: self, TTL: o.LeaseTTL, Value: r.record, Holder: holder}
	for _, l := range o.Job.Models {
		r.queues = append(r.queues, newQueue(o.Conn, r.declare, m, &o.Job, l.Model))
	}
	r.first = make([]int64, len(r.queues))
	r.limits = make([]int64, len(r.queues))
	r.full = make([]string, len(r.queues))
	return r
}

func holder(value []byte) (proto.Owner, error) {
	var f proto.Feed
	err := f.Decode(value)
	return f.Owner, err
}

// start waits for the broker, puts the job where it is not there, and takes the lease.
func (r *run) start(ctx context.Context) (err error) {
	if r.limit, err = parseThreshold(r.job.MaxErrors); err != nil {
		return err
	}
	err = r.retry(ctx, "reach the broker", func(ctx context.Context) error {
		if err := r.base(ctx); err != nil {
			return err
		}
		_, err := r.recall(ctx)
		return err
	})
	if err != nil {
		return err
	}
	broker.CrashPoint("producer.job-put")
	return r.take(ctx)
}

// base declares what all jobs share, and puts the job where its key never was: at first, and when the broker came back
// with an empty disk.
func (r *run) base(ctx context.Context) error {
	if err := r.declare.Base(ctx); err != nil {
		return err
	}
	if r.kv == nil { // from start, before there are others; the bucket may be made anew behind it
		kv, err := r.o.Conn.JS.KeyValue(ctx, proto.JobsBucket)
		if err != nil {
			return fmt.Errorf("open bucket %s: %w", proto.JobsBucket, err)
		}
		r.kv, r.lease.KV = kv, kv
	}
	return r.put(ctx)
}

// put is putJob, and ErrRemoved too where a later job goes by the same id.
func (r *run) put(ctx context.Context) error {
	if err := putJob(ctx, r.kv, r.job); err != nil {
		return err
	}
	return r.uphold(ctx)
}

// putJob puts the job where its key never was. A key that was removed left a marker, and is not put again (Create does
// that, where a user wants it), but for what revive says.
func putJob(ctx context.Context, kv jetstream.KeyValue, job proto.Job) error {
	b, err := job.Encode()
	if err != nil {
		return err
	}
	key := proto.JobKey(job.ID)
	_, err = kv.Update(ctx, key, b, 0)
	if errors.Is(err, jetstream.ErrKeyExists) {
		_, err = kv.Get(ctx, key)
	}
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return revive(ctx, kv, job, b)
	}
	if err != nil {
		return fmt.Errorf("put the job: %w", err)
	}
	return nil
}

// revive puts a job whose key was removed, if the marker is that of the job before it: a broker that came back with an
// older disk lost this one's spec.
func revive(ctx context.Context, kv jetstream.KeyValue, job proto.Job, spec []byte) error {
	at, err := removedAt(ctx, kv, job.ID)
	if err != nil {
		return err
	}
	if at == 0 || at != job.After {
		return ErrRemoved
	}
	if _, err := kv.Create(ctx, proto.JobKey(job.ID), spec); err != nil {
		return fmt.Errorf("put the job: %w", err)
	}
	return nil
}

// recall reads how far the last owner came, so that the first thing this one writes does not forget it. What the owner of
// a job that was removed left behind does not count.
func (r *run) recall(ctx context.Context) (last proto.Feed, err error) {
	now, err := broker.Now(ctx, r.o.Conn.JS)
	if err != nil {
		return last, err
	}
	if _, err := r.get(ctx, proto.FeedKey(r.job.ID), last.Decode); err != nil {
		return last, err
	}
	if last.After != r.job.After {
		last = proto.Feed{After: r.job.After}
	}
	f := last
	f.Owner, f.Note = proto.Owner{}, ""
	own := now // on the clock of the broker that is there now, which may be another than before
	if !r.began.IsZero() {
		own = now.Add(-time.Since(r.began))
	}
	if f.Since == 0 || own.UnixNano() < f.Since {
		f.Since = own.UnixNano()
	}
	r.began = time.Now().Add(min(time.Unix(0, f.Since).Sub(now), 0))
	r.before, r.feed = f.State, f
	r.ending = f.State == proto.FeedEnding
	clear(r.first)
	for _, m := range f.Models {
		for i, q := range r.queues {
			if q.model == m.Model {
				r.first[i] = min(m.Lines, r.job.Models[i].Lines)
			}
		}
	}
	return last, nil
}

// take waits for the lease until it is ours, or until its holder shows that it lives by renewing it. Where that one is
// to be watched, it waits on.
func (r *run) take(ctx context.Context) error {
	var w broker.Watch
	var seen uint64
	watching := false
	for {
		holder, rev, err := r.try(ctx, &w, watching)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case permanent(err), errors.Is(err, ErrLeft):
			return err
		case !errors.Is(err, broker.ErrLeaseHeld):
			r.log.Debug("take the lease", "error", err)
		case rev != 0 && seen != 0 && rev != seen && !watching:
			if r.o.Held == nil {
				return &HeldError{holder}
			}
			watching = true
			r.o.Held(&HeldError{holder})
		}
		seen = cmp.Or(rev, seen)
		if err := sleep(ctx, cmp.Or(r.o.LeaseTTL, broker.DefaultLeaseTTL)/12); err != nil {
			return err
		}
	}
}

// try takes the lease where it is free, and goes on from where its last holder stopped, unless it was watched and gave
// up: to try again is for the user to say. rev is the revision of a lease that is held.
func (r *run) try(ctx context.Context, w *broker.Watch, watching bool) (holder proto.Owner, rev uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := r.uphold(ctx); err != nil {
		if berr := r.base(ctx); berr != nil { // ErrRemoved, it may be
			err = berr
		}
		return holder, 0, err
	}
	last, err := r.recall(ctx)
	if err != nil {
		return holder, 0, err
	}
	if watching && last.State == proto.FeedHalted && last.Owner.ID == "" {
		return holder, 0, fmt.Errorf("%w: %s", ErrLeft, last.Note)
	}
	holder, err = r.lease.Try(ctx, w)
	if errors.Is(err, broker.ErrLeaseHeld) {
		if e, gerr := r.kv.Get(ctx, r.lease.Key); gerr == nil {
			rev = e.Revision()
		}
	}
	return holder, rev, err
}

// sleep waits for d, or returns the cause with which ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
