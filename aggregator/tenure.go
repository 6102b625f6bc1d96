package aggregator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// tenure is one time of holding the lease, from reading the state on disk to writing it for the last time.
type tenure struct {
	a     *Aggregator
	log   *slog.Logger
	kv    jetstream.KeyValue
	lease *broker.Lease
	m     *meter
	s     *state

	holding atomic.Bool   // the lease is ours, as far as we know
	link    atomic.Value  // of the last session
	silent  chan struct{} // the lease could not be renewed for its time: another may have it
	wake    chan struct{} // of the keeper
	finish  chan struct{} // of the finisher
	full    atomic.Bool   // the stream of results is nearly full
	stuck   bool          // a note of the fold is set; the reader's alone
	workers workers
	lookups lookups
}

// How long things are waited for.
const (
	brokerTimeout = 5 * time.Second        // an answer of the broker
	firstWait     = 100 * time.Millisecond // before the second try
	longestWait   = 5 * time.Second        // between tries of what fails again and again
	stuckWait     = time.Second            // between tries of what needs help from outside
	lingerFor     = time.Minute            // a finished job's spool is kept for those who read on in it
)

// hold folds until ctx ends, the lease is lost or the state must be read again; the error says which.
func (t *tenure) hold(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	t.holding.Store(true)
	wg.Go(func() { t.keepLease(ctx, cancel) })
	lock, err := t.lock(ctx)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	t.s, err = openState(ctx, t.a.Dir, t.a.hostname, t.log, t.m, t.wake)
	if err != nil {
		return err
	}
	defer t.s.close()
	t.m.watch(t.s.states)
	defer t.m.watch(nil)
	return t.work(ctx, cancel)
}

// keepLease renews the lease. One that is another's ends the tenure; one that nobody could be asked about stops the
// fold until it is renewed: what is on disk and in memory is still right, since only the lock's holder changes it.
func (t *tenure) keepLease(ctx context.Context, cancel context.CancelCauseFunc) {
	lost := func(err error) {
		t.holding.Store(false)
		t.log.Warn("the lease of the aggregator is lost", "error", broker.Plain(err))
		signal(t.silent)
	}
	if err := t.lease.Keep(ctx, lost, func() {}); err != nil {
		cancel(err)
	}
}

// mine renews the lease: nobody else can have it then.
func (t *tenure) mine(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, brokerTimeout)
	defer cancel()
	if err := t.lease.Renew(ctx); err != nil {
		return fmt.Errorf("renew the lease of the aggregator: %w", err)
	}
	return nil
}

// lock takes the folder of jobs. A process that lost the lease in its sleep still has it: it is waited for.
func (t *tenure) lock(ctx context.Context) (*broker.Lock, error) {
	said := false
	for {
		l, err := broker.LockDir(filepath.Join(t.a.Dir, "jobs"))
		if err == nil || !errors.Is(err, broker.ErrInUse) {
			return l, err
		}
		if !said {
			said = true
			t.log.Warn("waiting for the folder", "error", err)
		}
		if !sleep(ctx, firstWait) {
			return nil, context.Cause(ctx)
		}
	}
}

// work runs the parts of the tenure and waits for them. What was folded is saved at its end.
func (t *tenure) work(ctx context.Context, cancel context.CancelCauseFunc) error {
	srv, err := t.serve(ctx)
	if err != nil {
		return err
	}
	k := &keeper{t: t, said: said{}}
	f := &finisher{
		s: t.s, output: t.a.Output, program: t.a.Program, mine: t.mine, log: t.log,
		retry: t.a.retry(), linger: t.a.linger(), wake: t.finish,
	}
	var wg sync.WaitGroup
	part := func(run func(context.Context) error) {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				cancel(err)
			}
		})
	}
	part(k.run)
	part(f.run)
	part(t.sessions)
	wg.Wait()
	srv.stop()
	err = context.Cause(ctx)
	if !errors.Is(err, errReload) {
		t.part(k, !errors.Is(err, broker.ErrLeaseLost))
	}
	return err
}

// part saves for the last time, and tells it if the lease is still ours.
func (t *tenure) part(k *keeper, ours bool) {
	if k.save() != nil || !ours || !t.holding.Load() || t.link.Load() == nil {
		return // what is not saved is folded again
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	t.s.hurry()
	_ = k.tell(ctx) // the lease is another's: then it tells
}

// hurry makes the progress of all jobs that changed due.
func (s *state) hurry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, j := range s.jobs {
		j.urgent = j.unshown
	}
}

// sessions reads the stream of results, again and again: whatever breaks, the next session looks at what there is.
func (t *tenure) sessions(ctx context.Context) error {
	said := said{}
	wait := firstWait
	for {
		before := t.s.position()
		err := t.session(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errReload), errors.Is(err, broker.ErrLeaseLost):
			return err
		case errors.Is(err, errReopen):
			err = nil
		}
		said.warn(t.log, "results cannot be read; trying again", err)
		if before != t.s.position() || err == nil {
			wait = firstWait
		}
		sleep(ctx, wait)
		wait = min(2*wait, longestWait)
	}
}

var errReopen = errors.New("the stream of results is opened again")

// session reads the stream until something breaks.
func (t *tenure) session(ctx context.Context) error {
	drain(t.a.Conn.Reconnected)
	drain(t.silent)
	if err := t.confirm(ctx); err != nil {
		return err
	}
	octx, done := context.WithTimeout(ctx, brokerTimeout)
	src, to, again, err := openSource(octx, t.a.Conn.JS, t.s.position())
	done()
	if err != nil {
		return err
	}
	defer src.close()
	if again && t.s.position().Stream != 0 {
		t.log.Info("results are folded again from the first there is", "sequence", to.Seq+1)
	}
	t.s.moveTo(to, again)
	t.s.begin(position{Stream: to.Stream, Seq: src.old})
	t.s.listen()

	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	wg.Go(func() { t.attend(ctx, cancel) })
	wg.Go(func() {
		t.watchJobs(ctx, cancel, func() {
			t.link.Store(link{ctx})
			t.s.showAgain()
		})
	})
	wg.Go(func() { t.watchWorkers(ctx) })
	err = t.read(ctx, src)
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// link is how the keeper reaches the broker: as long as the session lasts that found the stream to be the right one,
// and once what the broker knows of the jobs was read. Before that, an older or an empty disk would make finished jobs
// unfinished ones.
type link struct{ context.Context }

// linked returns a context for talking to the broker; false where there is no session.
func (t *tenure) linked() (context.Context, bool) {
	l, ok := t.link.Load().(link)
	return l.Context, ok && l.Err() == nil
}

// confirm makes sure that the streams are there and that the lease is ours.
func (t *tenure) confirm(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, brokerTimeout)
	defer cancel()
	if err := (broker.Declarer{JS: t.a.Conn.JS}).Base(ctx); err != nil {
		return err
	}
	if err := t.lease.Renew(ctx); err != nil {
		return err
	}
	t.holding.Store(true)
	return nil
}

// read folds messages. Whatever cannot be taken in is offered again.
func (t *tenure) read(ctx context.Context, src *source) error {
	for {
		m, err := src.next(ctx)
		if err != nil {
			return err
		}
		if err := t.take(ctx, m); err != nil {
			return err
		}
	}
}

func (t *tenure) take(ctx context.Context, m message) error {
	for {
		err := t.fold(ctx, m)
		if err == nil {
			if t.stuck {
				t.stuck = false
				t.s.setNote(noteFold, "")
			}
			return nil
		}
		if errors.Is(err, errReload) || errors.Is(err, errLookup) {
			return err
		}
		t.stuck = true
		if t.s.setNote(noteFold, t.explain(err)) {
			t.log.Error("a result cannot be taken in; trying again", "error", err)
		}
		if !sleep(ctx, stuckWait) {
			return context.Cause(ctx)
		}
	}
}

func (t *tenure) explain(err error) string {
	if errors.Is(err, proto.ErrNewerVersion) {
		return err.Error()
	}
	return hint(filepath.Join(t.s.dir, "jobs"), err).Error()
}

// fold gives one message to the state, and looks its job up where it is not known.
func (t *tenure) fold(ctx context.Context, m message) error {
	err := t.s.fold(m)
	if !errors.Is(err, errUnknownJob) {
		return err
	}
	id := proto.JobOfSubject(m.subject)
	if t.lookups.recent(id) {
		return t.s.setAside(m)
	}
	found, err := t.lookup(ctx, id)
	if err != nil {
		return err
	}
	if !found {
		t.lookups.miss(id)
		return t.s.setAside(m)
	}
	if err = t.s.fold(m); errors.Is(err, errUnknownJob) { // deleted in this instant
		return t.s.setAside(m)
	}
	return err
}

// stallTicks is how often the fold may be found standing still behind the stream before the stream is opened again.
const stallTicks = 3

// attend ends the session when the connection broke, the lease is uncertain, or the fold stands still though the stream
// has more: the broker lost the consumer, or someone deleted what was to come.
func (t *tenure) attend(ctx context.Context, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var last position
	stalled := 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.a.Conn.Reconnected:
			cancel(errReopen)
			return
		case <-t.silent:
			cancel(errReopen)
			return
		case <-tick.C:
		}
		pos := t.s.position()
		if lag := t.look(ctx, pos); lag <= 0 || pos != last {
			stalled = 0
		} else if stalled++; stalled >= stallTicks && !t.s.noted(noteFold) {
			cancel(errReopen)
			return
		}
		last = pos
	}
}

func (s *state) noted(who int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.notes[who] != ""
}

// look measures the stream, and returns how many sequences the fold is behind.
func (t *tenure) look(ctx context.Context, pos position) int64 {
	ctx, cancel := context.WithTimeout(ctx, brokerTimeout)
	defer cancel()
	stream, err := t.a.Conn.JS.Stream(ctx, proto.ResultStream)
	if err != nil {
		return 0 // the reader will notice too
	}
	info := stream.CachedInfo()
	if info.Created.UnixNano() != pos.Stream {
		return 1
	}
	lag := int64(info.State.LastSeq) - int64(pos.Seq)
	t.m.lag.Store(max(lag, 0))
	full := info.Config.MaxBytes > 0 && int64(info.State.Bytes) > info.Config.MaxBytes/10*8
	if t.full.Swap(full) != full && full && !t.a.SharedDisk {
		t.log.Warn("the stream of results is nearly full; results that are on disk here are purged though their jobs are not finished")
	}
	return lag
}

// purge drops what lies before a sequence, if the stream is the one that at speaks of and still holds what was folded:
// the broker may have come back with an older disk a moment ago.
func purge(ctx context.Context, js jetstream.JetStream, before uint64, at position) error {
	stream, err := js.Stream(ctx, proto.ResultStream)
	if err != nil {
		return fmt.Errorf("open the stream of results: %w", err)
	}
	_, again, err := resume(at, stream.CachedInfo(), func(seq uint64) (int64, error) { return stamp(ctx, stream, seq) })
	if err != nil {
		return err
	}
	if again {
		return errAnotherStream
	}
	if err := stream.Purge(ctx, jetstream.WithPurgeSequence(before)); err != nil {
		return fmt.Errorf("purge results before %d: %w", before, err)
	}
	return nil
}

// sleep waits, and says whether it was not cut short.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

func drain(c <-chan struct{}) {
	select {
	case <-c:
	default:
	}
}

// said logs what goes wrong, once until it goes wrong in another way or goes well.
type said map[string]string

func (s said) warn(log *slog.Logger, what string, err error) {
	if err == nil {
		delete(s, what)
		return
	}
	if errors.Is(err, context.Canceled) {
		return // it was told to stop
	}
	err = broker.Plain(err)
	text := err.Error()
	if i := strings.IndexByte(text, '\n'); i > 0 {
		text = text[:i]
	}
	if s[what] != text {
		s[what] = text
		log.Warn(what, "error", err)
	}
}
