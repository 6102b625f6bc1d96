package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// queue is the consumer of one lane of one model.
type queue struct {
	model   string
	lane    proto.Lane
	born    time.Time // when its stream was made
	ackWait time.Duration
	// void is set when the stream is another one than it was: replies to its messages mean nothing any more.
	void atomic.Bool

	tap *tap      // of the feeder alone
	dry time.Time // it was empty then; of the feeder alone
}

// queues declares the queues of the models that are served, and again when they are gone: a broker may come back
// with an empty disk.
type queues struct {
	js      jetstream.JetStream
	ackWait time.Duration
	log     *slog.Logger
	changed func() // the list is another one

	// epoch is how often the connection was made anew; seen is called with what it was before a look at the queues
	// that found, or made, all of them.
	epoch func() uint64
	seen  func(epoch uint64)

	kick chan struct{}
	list atomic.Pointer[[]*queue]

	mu     sync.Mutex
	models []string
	base   bool      // what all jobs share is missing, too
	after  time.Time // nothing is declared before
}

func newQueues(js jetstream.JetStream, ackWait time.Duration, log *slog.Logger, changed func()) *queues {
	q := &queues{js: js, ackWait: ackWait, log: log, changed: changed, kick: make(chan struct{}, 1)}
	q.list.Store(new([]*queue))
	return q
}

// all returns the queues that are declared, in no order that matters.
func (q *queues) all() []*queue { return *q.list.Load() }

// want says which models are served.
func (q *queues) want(models []string) {
	q.mu.Lock()
	same := slices.Equal(q.models, models)
	q.models = slices.Clone(models)
	q.mu.Unlock()
	if !same {
		q.check()
	}
}

// check looks whether everything is there, and declares what is not.
func (q *queues) check() {
	select {
	case q.kick <- struct{}{}:
	default:
	}
}

// lost is check after something was found missing: a queue, or (base) what all jobs share. It does not hurry:
// nats-server 2.15.2 makes a stream that takes no messages when it is made within milliseconds of its deletion.
func (q *queues) lost(base bool) {
	q.mu.Lock()
	q.base = q.base || base
	q.after = time.Now().Add(deletedGrace)
	q.mu.Unlock()
	q.check()
}

const deletedGrace = 500 * time.Millisecond

// run declares until ctx ends.
func (q *queues) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-q.kick:
		}
		q.mu.Lock()
		pause := time.Until(q.after)
		q.mu.Unlock()
		wait(ctx, pause)
		var said string
		for wait := 100 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
			err := q.declare(ctx)
			if err == nil || ctx.Err() != nil {
				break
			}
			if err.Error() != said {
				said = err.Error()
				q.log.Warn("cannot declare the queues, trying on", "error", err)
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
		}
	}
}

func (q *queues) declare(ctx context.Context) error {
	q.mu.Lock()
	models, base := slices.Clone(q.models), q.base
	q.mu.Unlock()
	epoch := q.epoch()
	d := broker.Declarer{JS: q.js, AckWait: q.ackWait}
	if base {
		if err := d.Base(ctx); err != nil {
			return err
		}
		q.mu.Lock()
		q.base = false
		q.mu.Unlock()
	}
	var list []*queue
	for _, m := range models {
		if err := d.Model(ctx, m); err != nil {
			return err
		}
		lanes, err := q.lanes(ctx, m)
		if err != nil {
			return err
		}
		list = append(list, lanes...)
	}
	q.replace(list)
	q.seen(epoch)
	return nil
}

// lanes looks up the consumers of a model. Those that are the same as before keep their queue.
func (q *queues) lanes(ctx context.Context, model string) ([]*queue, error) {
	name := proto.RequestStream(model)
	stream, err := q.js.Stream(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", name, err)
	}
	born := stream.CachedInfo().Created
	var out []*queue
	for _, lane := range proto.Lanes() {
		c, err := stream.Consumer(ctx, string(lane))
		if err != nil {
			return nil, fmt.Errorf("look up consumer %s of %s: %w", lane, name, err)
		}
		out = append(out, q.reuse(model, lane, born, c.CachedInfo().Config.AckWait))
	}
	return out, nil
}

func (q *queues) reuse(model string, lane proto.Lane, born time.Time, ackWait time.Duration) *queue {
	for _, have := range q.all() {
		if have.model == model && have.lane == lane && have.born.Equal(born) && have.ackWait == ackWait {
			return have
		}
	}
	return &queue{model: model, lane: lane, born: born, ackWait: ackWait}
}

func (q *queues) replace(list []*queue) {
	old := q.all()
	if slices.Equal(old, list) {
		return
	}
	for _, was := range old {
		for _, is := range list {
			if was.model == is.model && was.lane == is.lane && !was.born.Equal(is.born) {
				was.void.Store(true)
			}
		}
	}
	q.list.Store(&list)
	q.changed()
}

// gone says whether an error means that a stream is not there.
func gone(err error) bool {
	return errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, jetstream.ErrStreamNotFound) ||
		errors.Is(err, jetstream.ErrBucketNotFound)
}
