package producer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"millrace/broker"
	"millrace/proto"
)

// Adopter feeds all jobs whose input lies with the broker and that nobody feeds. It also ends the jobs
// that are cancelled, or whose time is over, and whose input nobody can reach: of their lines those that were never sent end
// without their custom_id. Its fields may be set until Run.
type Adopter struct {
	Conn     *broker.Conn
	Dir      string                // where inputs are laid down while their jobs run
	Self     proto.Owner           // zero: broker.Self()
	Log      *slog.Logger          // nil: silent
	Registry prometheus.Registerer // for the metrics of all owners, while Run lasts; nil: none
	Window   int64                 // see Owner, as the next three
	AckWait  time.Duration
	LeaseTTL time.Duration
	Disk     int64
	Every    time.Duration // how often it looks for jobs; 0: 2 s

	metrics *metrics
	reading chan struct{} // holds one for each input that is fetched or scanned

	mu   sync.Mutex           // guards the rest
	busy map[string]bool      // jobs that a goroutine has
	done map[string]versions  // jobs that need nothing any more, as long as they stay so
	next map[string]time.Time // when a job that could not be adopted is tried again
}

// versions are the revisions of a job's own key and of its progress: a job that was removed and left again has others,
// and so has one whose progress went back.
type versions struct{ job, progress uint64 }

// adoptReading is how many inputs are fetched and scanned at once: a scan takes up to 150 MB of memory.
const adoptReading = 2

// adoptAgain is how long a job is left alone that another process has or that could not be fed, and adoptLater one
// that needs another program or broker first.
const (
	adoptAgain = 5 * time.Second
	adoptLater = 5 * time.Minute
)

// Run adopts jobs until ctx ends or the connection is closed for good, and returns when all of them are let go.
func (a *Adopter) Run(ctx context.Context) error {
	if a.Log == nil {
		a.Log = slog.New(slog.DiscardHandler)
	}
	if a.Self.ID == "" {
		a.Self = broker.Self()
	}
	if err := os.MkdirAll(a.Dir, 0o755); err != nil {
		return fmt.Errorf("make folder: %w; choose another --data", err)
	}
	sweep(a.Dir)
	m, stop, err := startMetrics(a.Registry)
	if err != nil {
		return err
	}
	defer stop()
	a.metrics, a.reading = m, make(chan struct{}, adoptReading)
	ctx, let := a.Conn.While(ctx)
	defer let()
	a.mu.Lock()
	a.busy, a.done, a.next = map[string]bool{}, map[string]versions{}, map[string]time.Time{}
	a.mu.Unlock()
	every := a.Every
	if every <= 0 {
		every = 2 * time.Second
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	var swept time.Time
	for {
		if time.Since(swept) >= uploadIdle {
			swept = time.Now()
			a.sweep(ctx)
		}
		if err := a.look(ctx, &wg); err != nil && ctx.Err() == nil {
			a.Log.Debug("look for jobs to adopt", "error", err)
		}
		if err := sleep(ctx, every); err != nil {
			return err
		}
	}
}

// sweep removes what interrupted uploads left at the broker.
func (a *Adopter) sweep(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := sweepUploads(ctx, a.Conn, uploadIdle); err != nil && ctx.Err() == nil {
		a.Log.Debug("sweep interrupted uploads", "error", err)
	}
}

// look starts a goroutine for every job that may need one.
func (a *Adopter) look(ctx context.Context, wg *sync.WaitGroup) error {
	cctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	kv, err := jobs(cctx, a.Conn)
	if err != nil {
		return err
	}
	all, removed, err := list(cctx, kv)
	if err != nil {
		return err
	}
	a.drop(all, removed)
	for id, at := range all {
		if a.claim(id, at) {
			wg.Go(func() { a.release(id, at, a.adopt(ctx, kv, id)) })
		}
	}
	return nil
}

// list reads which jobs there are, and which were removed. The progress of a job that is being written at that moment is
// passed over; then the job only seems to have changed.
func list(ctx context.Context, kv jetstream.KeyValue) (all map[string]versions, removed []string, err error) {
	w, err := kv.WatchFiltered(ctx, []string{proto.JobKey("*"), proto.ProgressKey("*")}, jetstream.MetaOnly())
	if err != nil {
		return nil, nil, fmt.Errorf("list jobs: %w", err)
	}
	defer func() { _ = w.Stop() }() // it ends with the connection at the latest
	all = map[string]versions{}
	progress := map[string]uint64{}
	for {
		var e jetstream.KeyValueEntry
		ok := true
		select {
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("list jobs: %w", context.Cause(ctx))
		case e, ok = <-w.Updates():
		}
		if !ok {
			return nil, nil, errors.New("list jobs: the watch ended")
		}
		if e == nil { // all that was there has come
			break
		}
		kind, id := proto.SplitKey(e.Key())
		switch put := e.Operation() == jetstream.KeyValuePut; {
		case kind == "agg" && put:
			progress[id] = e.Revision()
		case kind == "job" && put:
			all[id] = versions{job: e.Revision()}
		case kind == "job":
			removed = append(removed, id)
		}
	}
	for id, v := range all {
		all[id] = versions{v.job, progress[id]}
	}
	return all, removed, nil
}

// drop forgets the jobs that are not there, and removes what is laid down of those that were removed. That a job is not
// there says nothing else: the broker may have lost it.
func (a *Adopter) drop(all map[string]versions, removed []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	gone := func(id string) bool { _, ok := all[id]; return !ok }
	maps.DeleteFunc(a.done, func(id string, _ versions) bool { return gone(id) })
	maps.DeleteFunc(a.next, func(id string, _ time.Time) bool { return gone(id) })
	for _, id := range removed {
		if !a.busy[id] {
			_ = os.Remove(a.file(id)) // most often there is none
		}
	}
}

func (a *Adopter) claim(id string, at versions) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.busy[id] || a.done[id] == at || time.Now().Before(a.next[id]) {
		return false
	}
	a.busy[id] = true
	return true
}

// release notes how long the job, of which at is what was known when it was claimed, is left alone; 0: until that changes.
func (a *Adopter) release(id string, at versions, wait time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.busy, id)
	delete(a.next, id)
	if wait == 0 {
		a.done[id] = at
	} else {
		a.next[id] = time.Now().Add(wait)
	}
}

// adopt feeds a job, if it is one to adopt, until it is finished or removed, and says how long to leave it alone then.
func (a *Adopter) adopt(ctx context.Context, kv jetstream.KeyValue, id string) time.Duration {
	job, todo, err := a.judge(ctx, kv, id)
	if err == nil && todo == adoptIt {
		err = a.feed(ctx, job)
	}
	if errors.Is(err, ErrRemoved) { // and all of it with it; what lies under its name may be of the next one already
		return 0
	}
	if err == nil && todo != adoptNot {
		err = a.forget(ctx, job)
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, broker.ErrLeaseHeld) {
		a.Log.Warn("job not adopted, trying again", "job", id, "error", broker.Plain(err))
	}
	switch {
	case errors.Is(err, ErrJudged):
		return adoptLater
	case err != nil, todo == adoptNot:
		return adoptAgain
	}
	return 0
}

// feed runs an owner. Every way in which a job finishes is a good one here.
func (a *Adopter) feed(ctx context.Context, job proto.Job) error {
	o := &Owner{Conn: a.Conn, Job: job, Self: a.Self, Log: a.Log, Window: a.Window,
		AckWait: a.AckWait, LeaseTTL: a.LeaseTTL, Disk: a.Disk, metrics: a.metrics}
	if job.Object != "" {
		o.fetch = func(ctx context.Context) (*Dataset, error) { return a.fetch(ctx, job) }
	}
	err := o.Run(ctx)
	if errors.Is(err, ErrCancelled) || errors.Is(err, ErrExpired) {
		return nil
	}
	return err
}

// What there is to do for a job.
const (
	adoptNot  = iota // nothing, for now
	adoptIt          // feed it, if nobody else does
	adoptDone        // it has ended: clean up
)

// judge says what there is to do for a job.
func (a *Adopter) judge(ctx context.Context, kv jetstream.KeyValue, id string) (job proto.Job, todo int, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if job, _, err = getJob(ctx, kv, id); errors.Is(err, jetstream.ErrKeyNotFound) {
		return job, adoptNot, nil // removed meanwhile
	}
	if err != nil {
		return job, adoptNot, err
	}
	var p proto.Progress
	var c proto.Control
	var f proto.Feed
	if _, err = revision(ctx, kv, proto.ProgressKey(id), p.Decode); err != nil {
		return job, adoptNot, err
	}
	said, err := revision(ctx, kv, proto.ControlKey(id), c.Decode)
	if err != nil {
		return job, adoptNot, err
	}
	left, err := revision(ctx, kv, proto.FeedKey(id), f.Decode)
	halted := f.State == proto.FeedHalted && f.After == job.After && said < left // it goes on when somebody says so afterwards
	switch {
	case err != nil:
		return job, adoptNot, err
	case p.State == proto.FoldDone:
		return job, adoptDone, nil
	case c.Want == proto.WantCancel, job.Object != "" && !halted, f.State == proto.FeedEnding && f.After == job.After:
		return job, adoptIt, nil
	case f.State == proto.FeedHalted || f.After != job.After:
		return job, adoptNot, nil
	}
	over, err := a.over(ctx, &job, &f)
	if over {
		todo = adoptIt
	}
	return job, todo, err
}

// overGrace is how long after its time a job waits for the owner that has its input, and may only be out of touch.
const overGrace = time.Minute

// over says whether the time of a job is over, and its owner has not ended it.
func (a *Adopter) over(ctx context.Context, job *proto.Job, f *proto.Feed) (bool, error) {
	if job.LifetimeMS <= 0 || f.Since == 0 {
		return false, nil
	}
	now, err := broker.Now(ctx, a.Conn.JS)
	return now.Sub(time.Unix(0, f.Since)) >= time.Duration(job.LifetimeMS)*time.Millisecond+overGrace, err
}

// revision reads a key, and returns its revision; 0: it is not there.
func revision(ctx context.Context, kv jetstream.KeyValue, key string, decode func([]byte) error) (uint64, error) {
	e, err := kv.Get(ctx, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return 0, nil
	}
	if err == nil {
		err = decode(e.Value())
	}
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", key, err)
	}
	return e.Revision(), nil
}

// fetch lays the input down, unless that was done before, and scans it.
func (a *Adopter) fetch(ctx context.Context, job proto.Job) (*Dataset, error) {
	select {
	case a.reading <- struct{}{}:
		defer func() { <-a.reading }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	broker.CrashPoint("adopt.lease-taken")
	name := a.file(job.ID)
	if _, err := os.Stat(name); errors.Is(err, os.ErrNotExist) {
		if err := download(ctx, a.Conn, job.Object, name); err != nil {
			return nil, err
		}
	}
	broker.CrashPoint("adopt.downloaded")
	d, err := Scan(ctx, Input{Path: name, Name: job.Name, Override: job.Override, SkipInvalid: job.SkipInvalid, InputOrder: job.InputOrder,
		MaxPayload: a.Conn.NC.MaxPayload(), Dir: a.Dir, MaxAttempts: job.MaxAttempts, TimeoutMS: job.TimeoutMS}, nil)
	if err == nil && d.SHA256 == job.SHA256 {
		return d, nil
	}
	if err == nil {
		d.Close()
		err = errors.New("the copy of the input is not what it was made from")
	}
	if ctx.Err() == nil {
		_ = os.Remove(name) // fetched anew next time
	}
	return nil, err
}

func (a *Adopter) file(id string) string { return filepath.Join(a.Dir, "adopted-"+id+".jsonl") }

// forget removes the copies of an input whose job has ended.
func (a *Adopter) forget(ctx context.Context, job proto.Job) error {
	broker.CrashPoint("adopt.before-delete")
	if err := os.Remove(a.file(job.ID)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the laid down input: %w", err)
	}
	if job.Object == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return dropObject(ctx, a.Conn, job.Object)
}
