package producer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// run is an Owner at work. Its goroutines: drive feeds (with one feeder per model inside a round), keep renews the
// lease, watch reads what is wanted and how far the fold is, notice looks at the workers. live owns them all.
type run struct {
	o       *Owner
	job     proto.Job
	d       *Dataset // after the lease is held
	log     *slog.Logger
	declare broker.Declarer
	lease   *broker.Lease
	metrics *metrics
	queues  []*queue
	limit   threshold
	began   time.Time                // since when the job has had owners, on the clock here
	ending  bool                     // the last one had begun to end it: what was given up stays given up
	before  string                   // state in which that one left it
	gave    error                    // ErrCancelled or ErrExpired, when lines were ended so. Only drive uses it, as the next.
	known   map[int64]*proto.Request // what the queues told of lines whose input is out of reach, without bodies

	kv jetstream.KeyValue

	mu       sync.Mutex // guards the rest
	feed     proto.Feed
	first    []int64 // of each queue: lines of its model that were sent, or ended, at least once
	limits   []int64 // of each queue: what its workers may have in flight
	notes    map[noteKind]string
	full     []string // of each queue: why it takes no more
	progress proto.Progress
	want     demand
	said     int64 // revision of what users want
	unheld   bool  // the lease could not be renewed and may be another's
	turn     context.CancelCauseFunc
	saved    time.Time

	reporting sync.Mutex
}

// demand is what the owner has to do; of several the last one here.
type demand int

const (
	wantRun demand = iota
	wantPause
	wantHalt
	wantExpire
	wantCancel
	wantDone
)

// errTurn ends a phase because something else is demanded.
var errTurn = errors.New("something else is wanted")

// live runs the job until it ends, and lets go of the lease.
func (r *run) live(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = r.lease.Keep(ctx, func(err error) { r.lost(err, stop) }, r.regained) // what it returns, lost has heard
	})
	wg.Go(func() {
		if err := r.watch(ctx); err != nil {
			stop(err)
		}
	})
	wg.Go(func() { r.notice(ctx) })
	err := r.drive(ctx)
	if ctx.Err() != nil { // whatever broke then broke because of it
		err = context.Cause(ctx)
	}
	stop(nil)
	wg.Wait()
	if r.o.fetch != nil && r.d != nil {
		err = errors.Join(err, r.d.Close())
	}
	return r.leave(err)
}

func (r *run) lost(err error, stop context.CancelCauseFunc) {
	if errors.Is(err, broker.ErrLeaseLost) {
		stop(err)
		return
	}
	r.mu.Lock()
	r.unheld = true
	r.mu.Unlock()
	if broker.Away(err) {
		r.log.Warn("the broker is away, feeding stops until it is back")
		r.note(noteAway, awayNote)
		return
	}
	r.log.Warn("lease not renewed, feeding stops", "error", err)
	r.note(noteAway, "the broker does not answer: "+err.Error())
}

func (r *run) regained() {
	r.mu.Lock()
	r.unheld = false
	r.mu.Unlock()
	r.log.Warn("the lease is renewed again, feeding goes on")
	r.reached()
}

const awayNote = "the broker is away; trying again"

// reached notes that the broker did what it was asked.
func (r *run) reached() {
	r.note(noteAway, "")
	r.note(noteBroker, "")
}

// drive does what is demanded, one phase after the other.
func (r *run) drive(ctx context.Context) error {
	if err := r.look(ctx); err != nil { // what is demanded is known before the first line is sent
		return err
	}
	if err := r.ready(ctx); err != nil {
		return err
	}
	for ctx.Err() == nil {
		pctx, want := r.phase(ctx)
		if want == wantDone {
			return r.finished()
		}
		if err := r.do(pctx, want); !errors.Is(context.Cause(pctx), errTurn) {
			return err
		}
	}
	return context.Cause(ctx)
}

// ready gets the dataset, and opens the queues.
func (r *run) ready(ctx context.Context) error {
	r.mu.Lock()
	nowhere := r.d == nil && r.o.fetch == nil
	done, ends := r.want == wantDone, r.want == wantCancel || r.want == wantExpire && nowhere
	r.mu.Unlock()
	if done {
		return nil
	}
	if err := r.obtain(ctx); err != nil && !ends {
		return err
	}
	for _, q := range r.queues {
		if err := r.retry(ctx, "declare the queue of "+q.model, q.open); err != nil {
			return err
		}
	}
	return nil
}

// obtain gets the dataset where it was not given, and checks that it is the job's. Cancelled jobs end without one, and so do those
// whose time is over where nobody has it.
func (r *run) obtain(ctx context.Context) error {
	if r.d == nil && r.o.fetch == nil {
		return errors.New("nobody has the input of the job")
	}
	if r.d == nil {
		d, err := r.o.fetch(ctx)
		if err != nil {
			return err
		}
		r.d = d
	}
	if r.job.SHA256 != r.d.SHA256 || r.job.Lines != r.d.Lines {
		return fmt.Errorf("job %s was made from another input: %w", r.job.ID, ErrChanged)
	}
	if now := r.d.Models(); !slices.Equal(r.job.Models, now) {
		return fmt.Errorf("%w: %s lines were valid, %s are; the broker's max_payload or this program is another than then (millrace %s); "+
			"run it as it was created, or cancel it and begin anew with --again", ErrJudged, commas(count(r.job.Models)), commas(count(now)), r.job.Program)
	}
	return nil
}

func count(models []proto.ModelLines) (n int64) {
	for _, m := range models {
		n += m.Lines
	}
	return n
}

// phase returns a context that ends with errTurn when another demand comes.
func (r *run) phase(ctx context.Context) (context.Context, demand) {
	pctx, cancel := context.WithCancelCause(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.turn = cancel
	return pctx, r.want
}

// demand takes what is demanded now. The phase begins anew where that is something else, or anew says so.
func (r *run) demand(want demand, anew bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.want != want && (r.want < wantHalt || want >= r.want) { // what was given up stays given up
		r.want, anew = want, true
	}
	if anew && r.turn != nil {
		r.turn(errTurn)
	}
}

// do does one thing until it is done or ctx ends; it returns the cause then.
func (r *run) do(ctx context.Context, want demand) error {
	switch want {
	case wantPause:
		return r.pause(ctx)
	case wantHalt:
		return r.halt(ctx)
	case wantExpire:
		return r.end(ctx, ErrExpired, proto.CodeExpired, proto.MessageExpired)
	case wantCancel:
		return r.end(ctx, ErrCancelled, proto.CodeCancelled, proto.MessageCancelled)
	}
	return r.serve(ctx)
}

// finished is how a job ended whose files are final.
func (r *run) finished() error {
	if r.d != nil {
		r.d.ended()
	}
	if r.gave != nil {
		return r.gave
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.progress.Errors {
		switch e.Code {
		case proto.CodeCancelled:
			return ErrCancelled
		case proto.CodeExpired:
			return ErrExpired
		}
	}
	return nil
}

// leave says in the job's record how it was left, and lets go of it.
func (r *run) leave(err error) error {
	defer r.unmeasure()
	if errors.Is(err, broker.ErrLeaseLost) {
		return fmt.Errorf("job %s: %w", r.job.ID, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout) // ours may be over
	defer cancel()
	r.unnote()
	if errors.Is(err, ErrRemoved) || errors.Is(r.put(ctx), ErrRemoved) {
		r.vanish(ctx)
		return r.left(ctx, err)
	}
	switch {
	case err == nil, errors.Is(err, ErrCancelled), errors.Is(err, ErrExpired):
		r.purge(ctx) // duplicates of lines that have ended
		r.state(proto.FeedFinished)
	case errors.Is(err, ErrHalted):
		r.note(noteEnd, r.halted().Error())
		r.state(proto.FeedHalted)
	case errors.Is(err, ErrChanged):
		r.purge(ctx) // it cannot end; its requests would only stand before those of the job that follows it
		r.note(noteEnd, err.Error())
		r.state(proto.FeedHalted)
	}
	if rerr := r.lease.Release(ctx); rerr != nil {
		r.log.Warn("lease not released, the next owner waits for it to run out", "error", rerr)
	}
	return r.left(ctx, err)
}

func (r *run) left(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil {
		return err
	}
	return fmt.Errorf("job %s: %w", r.job.ID, err)
}

// vanish removes the requests and the record of a job that was removed, where sending and a renewal of the lease put them
// again. Requests stay where a later job goes by the same id: they may be its own, and else they are the same lines.
func (r *run) vanish(ctx context.Context) {
	if _, err := r.kv.Get(ctx, proto.JobKey(r.job.ID)); errors.Is(err, jetstream.ErrKeyNotFound) {
		r.purge(ctx)
	}
	e, err := r.kv.Get(ctx, r.lease.Key)
	if err == nil {
		var f proto.Feed
		if err = f.Decode(e.Value()); err == nil && (f.Owner.ID != r.lease.Self.ID || f.After != r.job.After) {
			return // of one that was created anew
		}
		err = r.kv.Purge(ctx, r.lease.Key, jetstream.LastRevision(e.Revision()))
	}
	if err != nil && !errors.Is(err, jetstream.ErrKeyNotFound) {
		r.log.Warn("the record of a removed job stays at the broker", "error", err)
	}
}

// unmeasure takes the job's queues out of the depth that all owners share.
func (r *run) unmeasure() {
	for _, q := range r.queues {
		q.metrics.deepen(q.model, -q.depth)
	}
}

// purge drops the requests of the job, at best effort.
func (r *run) purge(ctx context.Context) {
	for _, q := range r.queues {
		if err := q.purge(ctx); err != nil {
			r.log.Debug("purge", "error", err)
		}
	}
}

// retry calls f until it succeeds, waiting longer and longer in between, and says why in the job's note. It returns
// an error only where trying again cannot help, and the cause of ctx when that ends.
func (r *run) retry(ctx context.Context, doing string, f func(context.Context) error) error {
	const least, most = 100 * time.Millisecond, 2 * time.Second
	for wait := least; ; wait = min(2*wait, most) {
		cctx, cancel := context.WithTimeout(ctx, callTimeout)
		err := f(cctx)
		cancel()
		switch {
		case err == nil:
			r.reached()
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case permanent(err):
			return fmt.Errorf("%s: %w", doing, err)
		}
		r.trouble(doing, err)
		if err := sleep(ctx, wait); err != nil {
			return err
		}
	}
}

// trouble notes a failure that is tried again.
func (r *run) trouble(doing string, err error) {
	r.log.Debug(doing, "error", err)
	if broker.Away(err) {
		r.note(noteAway, awayNote)
		return
	}
	r.note(noteBroker, fmt.Sprintf("%s: %v; trying again", doing, err))
}

func permanent(err error) bool {
	return errors.Is(err, proto.ErrNewerVersion) || errors.Is(err, nats.ErrMaxPayload) || errors.Is(err, ErrChanged) || errors.Is(err, ErrRemoved) ||
		errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount)
}
