package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
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
	// looked is how often the connection had been made anew when the queue was last found to be the same.
	looked atomic.Uint64

	tap *tap      // of the feeder alone
	dry time.Time // it was empty then; of the feeder alone
}

// queues declares the queues of the models that are served, and again when they are gone: a broker may come back
// with an empty disk. A model whose queue cannot be declared keeps no other from its own.
type queues struct {
	js      jetstream.JetStream
	ackWait time.Duration
	log     *slog.Logger
	changed func() // the list, or what fails, is another one

	epoch func() uint64     // how often the connection was made anew
	seen  func()            // queues were found to be the same after that
	holds func(*queue) bool // messages of it are held

	kick  chan struct{}
	known []*queue // those of the list, and those of which messages are held; of run alone
	list  atomic.Pointer[[]*queue]
	wrong atomic.Pointer[map[string]error] // by model; "": what all jobs share

	mu     sync.Mutex
	models []string
	base   bool      // what all jobs share is missing, too
	after  time.Time // nothing is declared before
}

func newQueues(js jetstream.JetStream, ackWait time.Duration, log *slog.Logger) *queues {
	q := &queues{js: js, ackWait: ackWait, log: log, kick: make(chan struct{}, 1)}
	q.list.Store(new([]*queue))
	q.wrong.Store(new(map[string]error))
	return q
}

// all returns the queues that are declared, in no order that matters.
func (q *queues) all() []*queue { return *q.list.Load() }

// sure returns those that were looked at since the connection was last made.
func (q *queues) sure() []*queue {
	epoch := q.epoch()
	return slices.DeleteFunc(slices.Clone(q.all()), func(have *queue) bool { return have.looked.Load() != epoch })
}

// serves lists the models whose queues can be used.
func (q *queues) serves() []string {
	var models []string
	for _, have := range q.all() {
		if (*q.wrong.Load())[have.model] == nil && !slices.Contains(models, have.model) {
			models = append(models, have.model)
		}
	}
	return models
}

// trouble says why not all models have their queues; empty: they have.
func (q *queues) trouble() string {
	wrong := *q.wrong.Load()
	if len(wrong) == 0 {
		return ""
	}
	first := slices.Min(slices.Collect(maps.Keys(wrong)))
	text := "cannot use the queues: " + wrong[first].Error()
	if n := len(wrong) - 1; n > 0 {
		text += fmt.Sprintf("; and %d more", n)
	}
	return text
}

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
	const soon = 100 * time.Millisecond
	pause := soon
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-q.kick:
		case <-again:
		}
		q.mu.Lock()
		after := time.Until(q.after)
		q.mu.Unlock()
		wait(ctx, after)
		again = nil
		if q.look(ctx) {
			pause = soon
			continue
		}
		again = time.After(pause)
		pause = min(2*pause, 5*time.Second)
	}
}

// look goes through all models and says whether everything is there now.
func (q *queues) look(ctx context.Context) bool {
	q.mu.Lock()
	models, base := slices.Clone(q.models), q.base
	q.mu.Unlock()
	wrong := map[string]error{}
	if base {
		if err := q.declarer().Base(ctx); err != nil {
			wrong[""] = err
		} else {
			q.mu.Lock()
			q.base = false
			q.mu.Unlock()
		}
	}
	for _, m := range models {
		if err := q.lookAt(ctx, m); err != nil {
			wrong[m] = err
		}
	}
	q.known = slices.DeleteFunc(q.known, func(k *queue) bool { return !slices.Contains(models, k.model) && !q.holds(k) })
	for _, k := range slices.Clone(q.known) {
		if !slices.Contains(models, k.model) {
			q.lookBack(ctx, k.model)
		}
	}
	if ctx.Err() != nil {
		return true
	}
	q.show(models, wrong)
	return len(wrong) == 0
}

func (q *queues) declarer() broker.Declarer { return broker.Declarer{JS: q.js, AckWait: q.ackWait} }

// lookAt declares the queues of a model that is served.
func (q *queues) lookAt(ctx context.Context, model string) error {
	epoch := q.epoch()
	if err := q.declarer().Model(ctx, model); err != nil {
		return err
	}
	found, err := q.lanes(ctx, model)
	if err == nil {
		q.take(model, found, epoch)
	}
	return err
}

// lookBack looks at the queues of a model that is not served any more, while messages of them are held. Where that
// fails, the next look tells.
func (q *queues) lookBack(ctx context.Context, model string) {
	epoch := q.epoch()
	if !slices.ContainsFunc(q.known, func(k *queue) bool { return k.model == model && k.looked.Load() != epoch }) {
		return
	}
	if found, err := q.lanes(ctx, model); err == nil || gone(err) {
		q.take(model, found, epoch)
	}
}

// lanes looks up the consumers of a model.
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
		out = append(out, &queue{model: model, lane: lane, born: born, ackWait: c.CachedInfo().Config.AckWait})
	}
	return out, nil
}

// take makes what was found the queues of a model. Those that are the same as before stay, others become void.
func (q *queues) take(model string, found []*queue, epoch uint64) {
	back := false
	known := slices.Clone(q.known)
	for i, was := range known {
		if was.model != model {
			continue
		}
		same := slices.IndexFunc(found, func(is *queue) bool {
			return is.lane == was.lane && is.born.Equal(was.born) && is.ackWait == was.ackWait
		})
		known[i] = nil
		if same >= 0 {
			found[same] = was
			back = back || was.looked.Load() != epoch
		} else if !slices.ContainsFunc(found, func(is *queue) bool { return is.lane == was.lane && is.born.Equal(was.born) }) {
			was.void.Store(true)
			back = true
		}
	}
	known = slices.DeleteFunc(known, func(k *queue) bool { return k == nil })
	for _, is := range found {
		is.looked.Store(epoch)
	}
	q.known = append(known, found...)
	if back {
		q.seen()
	}
}

// show makes the queues of these models, and what is wrong with some, visible to others.
func (q *queues) show(models []string, wrong map[string]error) {
	list := slices.DeleteFunc(slices.Clone(q.known), func(k *queue) bool { return !slices.Contains(models, k.model) })
	same := slices.Equal(q.all(), list)
	q.list.Store(&list)
	said := q.trouble()
	q.wrong.Store(&wrong)
	trouble := q.trouble()
	if trouble != said && trouble != "" {
		q.log.Warn("cannot declare all queues, trying on", "error", errors.Join(slices.Collect(maps.Values(wrong))...))
	}
	if !same || trouble != said {
		q.changed()
	}
}

// gone says whether an error means that a stream is not there.
func gone(err error) bool {
	return errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, jetstream.ErrStreamNotFound) ||
		errors.Is(err, jetstream.ErrBucketNotFound)
}
