// Package aggregator folds the stream of results: it decides which result counts for a line, keeps the results of each
// job until all its lines have ended, and then writes the output file, the error file and the manifest.
//
// A result for a line may come any number of times, in any order; folding it again changes nothing. So whatever is in
// doubt after a crash, a lost disk or a broker that came back with another one is folded again from the first message
// there is, and what is missing after that is run again by the owner of the input.
package aggregator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"millrace/broker"
	"millrace/proto"
)

// Aggregator folds while it holds the lease on folding; any number may run, on any machine, and one of them folds. Its
// fields may be set until Run.
type Aggregator struct {
	Conn *broker.Conn // ours alone: Run reads its Reconnected
	Self proto.Owner
	// Dir holds the state: checkpoint, unknown (results that belong to no job), jobs/<id>/…. Run locks Dir/jobs while
	// it holds the lease.
	Dir    string
	Output func(*proto.Job) Files // where a job's results go; missing folders are made
	// SharedDisk says that the broker's disk is this machine's: results that are in a checkpoint are purged there.
	// Otherwise those of unfinished jobs stay, so that an aggregator with an empty disk can begin anew.
	SharedDisk      bool
	Log             *slog.Logger
	Registry        prometheus.Registerer // nil: no metrics
	KeepFor         time.Duration         // how long a finished job is remembered, here and at the broker; 0: until rm
	Program         string                // version of the program, for manifests
	CheckpointEvery time.Duration         // 1 s where 0
	LeaseTTL        time.Duration         // broker.DefaultLeaseTTL where 0

	hostname   string
	retryEvery time.Duration // of files that cannot be written
	lingerFor  time.Duration
}

func (a *Aggregator) checkpointEvery() time.Duration {
	return orDefault(a.CheckpointEvery, time.Second)
}
func (a *Aggregator) retry() time.Duration  { return orDefault(a.retryEvery, 3*time.Second) }
func (a *Aggregator) linger() time.Duration { return orDefault(a.lingerFor, lingerFor) }

func orDefault(d, otherwise time.Duration) time.Duration {
	if d <= 0 {
		return otherwise
	}
	return d
}

// check completes the fields.
func (a *Aggregator) check() error {
	if a.Conn == nil || a.Dir == "" || a.Output == nil || a.Self.ID == "" {
		return errors.New("aggregator needs Conn, Self, Dir and Output")
	}
	if a.Log == nil {
		a.Log = slog.New(slog.DiscardHandler)
	}
	a.hostname, _ = os.Hostname() // only shown
	if err := broker.MakeDir(filepath.Join(a.Dir, "jobs")); err != nil {
		return fmt.Errorf("make the aggregator's folder: %w; choose another --data", err)
	}
	return nil
}

// Run folds until ctx ends, and returns nil then. Errors are those of the fields, and broker.ErrClosed when the
// connection is closed for good; whatever else breaks later is logged, shown in the progress of the jobs it touches,
// and tried again.
func (a *Aggregator) Run(ctx context.Context) error {
	if err := a.check(); err != nil {
		return err
	}
	m := newMeter()
	unregister, err := m.register(a.Registry)
	if err != nil {
		return err
	}
	defer unregister()
	ctx, stop := a.Conn.While(ctx)
	defer stop()
	said, wait := said{}, firstWait
	for {
		t := a.newTenure(m)
		if !t.acquire(ctx) {
			return closed(ctx)
		}
		began := time.Now()
		err := t.hold(ctx)
		t.release(err)
		if ctx.Err() != nil {
			return closed(ctx)
		}
		said.warn(a.Log, "the aggregator begins anew", err)
		if time.Since(began) > longestWait {
			wait = firstWait
		}
		sleep(ctx, wait)
		wait = min(2*wait, longestWait)
	}
}

// closed is why ctx ended, if it is the connection.
func closed(ctx context.Context) error {
	if err := context.Cause(ctx); errors.Is(err, broker.ErrClosed) {
		return fmt.Errorf("fold results: %w", err)
	}
	return nil
}

func (a *Aggregator) newTenure(m *meter) *tenure {
	return &tenure{
		a: a, log: a.Log, m: m, lookups: lookups{},
		silent: make(chan struct{}, 1), wake: make(chan struct{}, 1), finish: make(chan struct{}, 1),
	}
}

// acquire waits for the lease, through a broker that does not answer or has lost its disk. It returns false when ctx
// ended.
func (t *tenure) acquire(ctx context.Context) bool {
	var w broker.Watch
	said := said{}
	held := ""
	ttl := orDefault(t.a.LeaseTTL, broker.DefaultLeaseTTL)
	for ctx.Err() == nil {
		holder, err := t.try(ctx, &w)
		if err == nil {
			return true
		}
		if !errors.Is(err, broker.ErrLeaseHeld) {
			said.warn(t.log, "the lease of the aggregator cannot be asked for; trying again", err)
		} else if held != holder.ID {
			held = holder.ID
			t.log.Info("another aggregator folds; waiting for it to end", "host", holder.Machine(), "pid", holder.PID)
		}
		sleep(ctx, ttl/12)
	}
	return false
}

// try takes the lease if it is free. Buckets and streams are declared first: the broker may be new.
func (t *tenure) try(ctx context.Context, w *broker.Watch) (proto.Owner, error) {
	ctx, cancel := context.WithTimeout(ctx, brokerTimeout)
	defer cancel()
	if t.lease == nil {
		if err := t.open(ctx); err != nil {
			return proto.Owner{}, err
		}
	}
	holder, err := t.lease.Try(ctx, w)
	if err != nil && !errors.Is(err, broker.ErrLeaseHeld) {
		t.lease = nil
	}
	return holder, err
}

func (t *tenure) open(ctx context.Context) error {
	if err := (broker.Declarer{JS: t.a.Conn.JS}).Base(ctx); err != nil {
		return err
	}
	kv, err := t.a.Conn.JS.KeyValue(ctx, proto.JobsBucket)
	if err != nil {
		return fmt.Errorf("open bucket %s: %w", proto.JobsBucket, err)
	}
	t.kv, t.lease = kv, newLease(kv, t.a.Self, t.a.LeaseTTL)
	return nil
}

func newLease(kv jetstream.KeyValue, self proto.Owner, ttl time.Duration) *broker.Lease {
	return &broker.Lease{
		KV: kv, Key: proto.LeaseKey, Self: self, TTL: ttl,
		Value: func(o proto.Owner) ([]byte, error) { return o.Encode() },
		Holder: func(b []byte) (o proto.Owner, err error) {
			err = o.Decode(b)
			return o, err
		},
	}
}

// release lets go of the lease, for another to have it at once.
func (t *tenure) release(why error) {
	if errors.Is(why, broker.ErrLeaseLost) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := t.lease.Release(ctx)
	if err != nil { // a renewal that was cut short may have been written all the same: learn its revision
		if err = t.lease.Renew(ctx); err == nil {
			err = t.lease.Release(ctx)
		}
	}
	if err != nil {
		t.log.Warn("the lease of the aggregator ends by itself", "error", err)
	}
}
