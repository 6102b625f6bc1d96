package aggregator

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/proto"
)

// errWatchEnded ends the session: watchers do not survive a bucket that is made anew.
var errWatchEnded = errors.New("the watch of a bucket ended")

// watch calls see for every entry of a bucket whose key matches, those that are there first, and all once these have
// come. What was there when the watch began may come again with the next one.
func watch(ctx context.Context, kv jetstream.KeyValue, keys string, see func(jetstream.KeyValueEntry), all func()) error {
	w, err := kv.Watch(ctx, keys)
	if err != nil {
		return fmt.Errorf("watch %s of %s: %w", keys, kv.Bucket(), err)
	}
	defer endWatch(w)
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-w.Updates():
			if !ok && ctx.Err() == nil {
				return errWatchEnded
			}
			if e != nil {
				see(e)
			} else if ok {
				all()
			}
		}
	}
}

// endWatch ends a watch. Its sender is not left standing. Where the connection was closed before, the channel may stay open: nats.go
// sets what closes it only when the watch has begun. Then there is no sender, or one with two entries at most.
func endWatch(w jetstream.KeyWatcher) {
	if w.Stop() == nil {
		for range w.Updates() {
		}
		return
	}
	for {
		select {
		case _, ok := <-w.Updates():
			if !ok {
				return
			}
		default:
			return
		}
	}
}

// watchJobs learns of jobs and of their end. That a job is not in the bucket says nothing: only the marker of a delete
// does. all is called when the jobs that are there now are known.
func (t *tenure) watchJobs(ctx context.Context, cancel context.CancelCauseFunc, all func()) {
	session := t.s.session()
	err := watch(ctx, t.kv, proto.JobKey("*"), func(e jetstream.KeyValueEntry) {
		_, id := proto.SplitKey(e.Key())
		at := sight{session, e.Revision()}
		if e.Operation() != jetstream.KeyValuePut {
			t.deleted(ctx, id, e.Created().UnixNano(), at)
			return
		}
		err := t.created(ctx, id, e, at)
		if errors.Is(err, errLookup) || errors.Is(err, errReload) {
			cancel(err)
		} else if err != nil {
			t.log.Error("a job cannot be taken in", "job", id, "error", err)
		}
	}, func() {
		if ctx.Err() == nil {
			all()
		}
	})
	if err != nil {
		cancel(err)
	}
}

func (t *tenure) created(ctx context.Context, id string, e jetstream.KeyValueEntry, at sight) error {
	spec := new(proto.Job)
	if err := spec.Decode(e.Value()); err != nil {
		return fmt.Errorf("%w: %w", errBadJob, err)
	}
	if spec.ID != id {
		return fmt.Errorf("%w: the spec under %s is that of %q", errBadJob, e.Key(), spec.ID)
	}
	var was *proto.Progress
	if !t.s.settled(spec) {
		var err error
		if was, err = t.lastTold(ctx, id); err != nil {
			return err
		}
	}
	return t.s.know(spec, at, was)
}

// lastTold reads what was last told of a job, by us or by another aggregator; nil: nothing that can be read. Its errors are
// errLookup.
func (t *tenure) lastTold(ctx context.Context, id string) (*proto.Progress, error) {
	ctx, cancel := context.WithTimeout(ctx, brokerTimeout)
	defer cancel()
	e, err := t.kv.Get(ctx, proto.ProgressKey(id))
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil, nil
	}
	p := new(proto.Progress)
	if err == nil {
		err = p.Decode(e.Value())
		if err != nil && !errors.Is(err, proto.ErrNewerVersion) {
			return nil, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: read the progress of job %s: %w", errLookup, id, err)
	}
	return p, nil
}

// deleted forgets a job, with the progress that may have been put since its keys were removed.
func (t *tenure) deleted(ctx context.Context, id string, marker int64, at sight) {
	if !t.s.forget(id, marker, at) {
		return
	}
	t.log.Info("job is forgotten; its files stay", "job", id)
	if err := t.kv.Purge(ctx, proto.ProgressKey(id)); err != nil {
		t.log.Warn("the progress of a deleted job stays at the broker", "job", id, "error", err)
	}
}

// lookups remembers for a moment that a job is unknown to the broker too: there may be many results of a job that was
// removed. The reader's alone. The moment is short: a job may be created in it.
type lookups map[string]time.Time

const unknownFor = 200 * time.Millisecond

func (l lookups) recent(id string) bool { return time.Since(l[id]) < unknownFor }

func (l lookups) miss(id string) {
	if len(l) > 1<<12 {
		clear(l)
	}
	l[id] = time.Now()
}

var errLookup = errors.New("the broker cannot be asked")

// lookup asks the broker for a job, and says whether there is one now. Its errors are errLookup, or of the disk.
func (t *tenure) lookup(ctx context.Context, id string) (found bool, err error) {
	if !validID(id) {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, brokerTimeout)
	defer cancel()
	for session := int64(-1); err == nil && session != t.s.session(); { // what was heard before another began is void
		session = t.s.session()
		found, err = t.ask(ctx, id, session)
	}
	return found, err
}

func (t *tenure) ask(ctx context.Context, id string, session int64) (bool, error) {
	e, err := t.kv.Get(ctx, proto.JobKey(id))
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("%w: look up job %s: %w", errLookup, id, err)
	}
	err = t.created(ctx, id, e, sight{session, e.Revision()})
	if errors.Is(err, errBadJob) {
		return false, nil
	}
	return err == nil, err
}

// workers is what the workers last said of themselves.
type workers struct {
	mu   sync.Mutex
	byID map[string]*proto.Worker
}

// maxWorkers bounds what is remembered of workers that are gone.
const maxWorkers = 4096

func (w *workers) get(id string) *proto.Worker {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.byID[id]
}

func (w *workers) put(v *proto.Worker) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.byID == nil || len(w.byID) >= maxWorkers {
		w.byID = map[string]*proto.Worker{}
	}
	w.byID[v.ID] = v
}

// watchWorkers listens to what workers say of themselves, for the manifests. It is best effort: a session goes on
// without it, and it is tried again.
func (t *tenure) watchWorkers(ctx context.Context) {
	said := said{}
	for {
		err := t.hearWorkers(ctx)
		if ctx.Err() != nil {
			return
		}
		said.warn(t.log, "workers cannot be heard; manifests may miss engines; trying again", err)
		if !sleep(ctx, stuckWait) {
			return
		}
	}
}

func (t *tenure) hearWorkers(ctx context.Context) error {
	kv, err := t.a.Conn.JS.KeyValue(ctx, proto.WorkersBucket)
	if err != nil {
		return fmt.Errorf("open bucket %s: %w", proto.WorkersBucket, err)
	}
	return watch(ctx, kv, "*", func(e jetstream.KeyValueEntry) {
		w := new(proto.Worker)
		if e.Operation() == jetstream.KeyValuePut && w.Decode(e.Value()) == nil && (w.Version != "" || w.State == proto.EngineReady || w.Restarts > 0 || w.GivenUp != "") { // some tell no version
			t.workers.put(w)
			if w.GivenUp != "" {
				t.s.gaveUp(w)
			}
		}
	}, func() {})
}
