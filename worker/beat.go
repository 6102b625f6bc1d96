package worker

import (
	"context"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// beat keeps the worker's record in the bucket WORKERS, and reads those of others.
type beat struct {
	js      jetstream.JetStream
	log     *slog.Logger
	id      string
	record  func() *proto.Worker
	missing func() // the bucket is not there
	kick    chan struct{}
	last    atomic.Pointer[string] // state and reason that were written last
}

const beatEvery = 2 * time.Second

// changed writes the record soon if the state is another one than was written last.
func (b *beat) changed() {
	r := b.record()
	if old := b.last.Load(); old == nil || *old != r.State+r.Reason {
		b.soon()
	}
}

// soon writes the record without waiting for the next turn.
func (b *beat) soon() {
	select {
	case b.kick <- struct{}{}:
	default:
	}
}

// run writes the record until ctx ends, then deletes it.
func (b *beat) run(ctx context.Context) {
	failing := false
	for {
		err := b.write(ctx)
		if err != nil && ctx.Err() == nil && !failing {
			b.log.Warn("cannot say that this worker is here, trying on", "error", broker.Plain(err))
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			b.remove()
			return
		case <-b.kick:
		case <-time.After(beatEvery):
		}
	}
}

func (b *beat) write(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, beatEvery)
	defer cancel()
	kv, err := b.js.KeyValue(ctx, proto.WorkersBucket)
	if err == nil {
		r := b.record()
		said := r.State + r.Reason
		b.last.Store(&said)
		var v []byte
		if v, err = r.Encode(); err == nil {
			_, err = kv.Put(ctx, b.id, v)
		}
	}
	if err != nil && gone(err) {
		b.missing()
	}
	return err
}

// remove deletes the record; it would go by itself after proto.WorkerTTL.
func (b *beat) remove() {
	ctx, cancel := context.WithTimeout(context.Background(), beatEvery)
	defer cancel()
	kv, err := b.js.KeyValue(ctx, proto.WorkersBucket)
	if err == nil {
		_ = kv.Delete(ctx, b.id) // see above
	}
}

// others says whether another worker that is ready serves a model, or may do so: where nobody can tell, somebody does.
func (b *beat) others(ctx context.Context, model string) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	beats, err := broker.Heartbeats(ctx, b.js)
	return err != nil || slices.ContainsFunc(beats, func(e jetstream.KeyValueEntry) bool {
		var w proto.Worker
		return e.Key() != b.id && w.Decode(e.Value()) == nil && w.Serves(model)
	})
}
