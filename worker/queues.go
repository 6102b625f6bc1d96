package worker

import (
	"cmp"
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
	born    time.Time     // when its stream was made
	ackWait time.Duration // of queues.run alone
	// void is set when the stream is another one than it was, or an older copy of it: replies to its messages mean
	// nothing any more.
	void atomic.Bool
	// looked is how often the connection had been made anew when the queue was last found to be the same.
	looked atomic.Uint64
	// pending is how many messages waited in the queue when the last one came, at heard (ns since born).
	pending, heard atomic.Int64

	tap *tap      // of the feeder alone
	dry time.Time // it was empty then; of the feeder alone
}

// born is when the clock of all queues began, which nobody sets.
var born = time.Now()

// behind is how many messages wait in the queue, as far as the last one told it of late.
func (q *queue) behind(now time.Time) int {
	if int64(now.Sub(born))-q.heard.Load() > int64(fresh) {
		return 0
	}
	return int(q.pending.Load())
}

// queues declares the queues of the models that are served, and again when they are gone: a broker may come back
// with an empty disk. A model whose queue cannot be declared keeps no other from its own. Every now and then it looks
// at them again, because anyone may declare another AckWait.
type queues struct {
	js      jetstream.JetStream
	ackWait time.Duration // set on consumers; 0: what they have
	every   time.Duration // between looks
	log     *slog.Logger
	changed func() // the list, the shortest AckWait, or what fails, is another one

	epoch func() uint64       // how often the connection was made anew
	seen  func()              // queues were looked at after that
	marks func(*queue) []mark // of the messages of it that are held
	// found is called with when the stream of a model was made, before anything is pulled from it.
	found func(model string, born time.Time)

	kick  chan struct{}
	known []*queue // those of the list, and those of which messages are held; of run alone
	list  atomic.Pointer[[]*queue]
	wrong atomic.Pointer[map[string]error] // by model; "": what all jobs share
	short atomic.Int64                     // see shortest

	mu     sync.Mutex
	models []string
	base   bool      // what all jobs share is missing, too
	after  time.Time // nothing is declared before
}

// lookEvery is the time between looks at queues when nothing happens.
const lookEvery = 10 * time.Second

func newQueues(js jetstream.JetStream, ackWait time.Duration, log *slog.Logger) *queues {
	q := &queues{js: js, ackWait: ackWait, every: lookEvery, log: log, kick: make(chan struct{}, 1)}
	q.short.Store(int64(proto.DefaultAckWait))
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

// shortest is the AckWait that the worker plans with.
func (q *queues) shortest() time.Duration { return time.Duration(q.short.Load()) }

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
	pause, again := soon, q.every
	for {
		timer := time.NewTimer(again)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-q.kick:
		case <-timer.C:
		}
		timer.Stop()
		q.mu.Lock()
		after := time.Until(q.after)
		q.mu.Unlock()
		wait(ctx, after)
		if q.look(ctx) {
			pause, again = soon, q.every
			continue
		}
		again = pause
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
	q.known = slices.DeleteFunc(q.known, func(k *queue) bool { return !slices.Contains(q.all(), k) && len(q.marks(k)) == 0 })
	for _, m := range models {
		if err := q.lookAt(ctx, m); err != nil {
			wrong[m] = err
		}
	}
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

// lookAt looks at the queues of a model that is served, and declares them where they are not known, or not there.
func (q *queues) lookAt(ctx context.Context, model string) error {
	epoch := q.epoch()
	known := slices.ContainsFunc(q.known, func(k *queue) bool { return k.model == model && k.looked.Load() == epoch })
	if known {
		found, err := q.lanes(ctx, model)
		if err == nil {
			q.take(model, found, epoch)
		}
		if err == nil || !gone(err) {
			return err
		}
	}
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
	held := q.heldBefore(model) // first: what comes while the stream is looked at is newer than that look
	stream, err := q.js.Stream(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("look up stream %s: %w", name, err)
	}
	if err := q.compare(ctx, stream, held); err != nil {
		return nil, err
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

// mark is what tells the messages of a stream apart.
type mark struct {
	seq    uint64
	stored time.Time // by the broker
}

// heldBefore is what is held of the queues of a model that were not looked at since the connection was made anew.
func (q *queues) heldBefore(model string) map[*queue][]mark {
	held := map[*queue][]mark{}
	for _, k := range q.known {
		if k.model == model && k.looked.Load() != q.epoch() {
			held[k] = q.marks(k)
		}
	}
	return held
}

// compare makes queues void if their stream, which is looked at for the first time since the connection was made anew,
// is an older copy: it was made at the same time, and gives the numbers of what we hold to others.
func (q *queues) compare(ctx context.Context, stream jetstream.Stream, held map[*queue][]mark) error {
	var all []mark
	for k, marks := range held {
		if k.born.Equal(stream.CachedInfo().Created) {
			all = append(all, marks...)
		}
	}
	is, err := older(ctx, stream, all)
	if err != nil || !is {
		return err
	}
	q.log.Warn("broker came back with an older disk, what was held of it counts no more", "stream", stream.CachedInfo().Config.Name, "requests", len(all))
	for k := range held {
		if k.born.Equal(stream.CachedInfo().Created) {
			k.void.Store(true)
		}
	}
	return nil
}

// older says whether a stream lacks messages that are held of it, or has others in their place. The last one of
// which the stream has a message tells: what came before it is as old. Of the others, which somebody has removed, no
// word does anything.
func older(ctx context.Context, stream jetstream.Stream, held []mark) (bool, error) {
	slices.SortFunc(held, func(a, b mark) int { return cmp.Compare(b.seq, a.seq) })
	for _, m := range held {
		if m.seq > stream.CachedInfo().State.LastSeq {
			return true, nil
		}
		have, err := stream.GetMsg(ctx, m.seq)
		switch {
		case err == nil:
			return !have.Time.Equal(m.stored), nil
		case !errors.Is(err, jetstream.ErrMsgNotFound):
			return false, fmt.Errorf("look up message %d of %s: %w", m.seq, stream.CachedInfo().Config.Name, err)
		}
	}
	return false, nil
}

// take makes what was found the queues of a model. Those that are the same as before stay, others become void.
func (q *queues) take(model string, found []*queue, epoch uint64) {
	var known []*queue
	back := false
	if len(found) > 0 {
		q.found(model, found[0].born)
	}
	for _, was := range q.known {
		if was.model != model {
			known = append(known, was)
			continue
		}
		i := slices.IndexFunc(found, func(is *queue) bool {
			return is.lane == was.lane && is.born.Equal(was.born) && !was.void.Load()
		})
		if i < 0 {
			was.void.Store(true)
		} else {
			was.ackWait = found[i].ackWait
			found[i] = was
		}
		back = back || was.looked.Load() != epoch
	}
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
	var list []*queue
	short := proto.DefaultAckWait
	for _, k := range q.known {
		if k.ackWait > 0 {
			short = min(short, k.ackWait)
		}
		if slices.Contains(models, k.model) {
			list = append(list, k)
		}
	}
	said := q.trouble()
	changed := !slices.Equal(q.all(), list) || q.shortest() != short
	q.list.Store(&list)
	q.short.Store(int64(short))
	q.wrong.Store(&wrong)
	trouble := q.trouble()
	if trouble != said && trouble != "" {
		q.log.Warn("cannot declare all queues, trying on", "error", inWords(wrong))
	}
	if changed || trouble != said {
		q.changed()
	}
}

// inWords is what is wrong, as people are told of it. That the connection is away is said once, and hides nothing else.
func inWords(wrong map[string]error) error {
	var all []error
	for _, m := range slices.Sorted(maps.Keys(wrong)) {
		if err := broker.Plain(wrong[m]); !errors.Is(errors.Join(all...), err) {
			all = append(all, err)
		}
	}
	return errors.Join(all...)
}

// gone says whether an error means that a stream is not there, or its consumer.
func gone(err error) bool {
	return errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, jetstream.ErrStreamNotFound) ||
		errors.Is(err, jetstream.ErrBucketNotFound) || errors.Is(err, jetstream.ErrConsumerNotFound)
}
