package broker

import (
	"context"
	"sort"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/proto"
)

// Queue is the state of the requests for a model.
type Queue struct {
	Model    string
	Stream   string
	Waiting  int64 // not handed out
	HandedTo int64 // handed to workers, not acknowledged; those are among them that a worker gave back for a while
	Bytes    int64
	MaxBytes int64
	AckWait  time.Duration // after which a line is handed out again whose worker gives no sign of life, the longest of its consumers
}

// Queues lists the queues of all models.
func Queues(ctx context.Context, js jetstream.JetStream) ([]Queue, error) {
	var out []Queue
	l := js.ListStreams(ctx)
	for info := range l.Info() {
		if !proto.IsRequestStream(info.Config.Name) {
			continue
		}
		q := Queue{Model: info.Config.Metadata[proto.MetaModel], Stream: info.Config.Name,
			Bytes: int64(info.State.Bytes), MaxBytes: info.Config.MaxBytes}
		q.consumers(ctx, js, info.State.Msgs)
		out = append(out, q)
	}
	if l.Err() != nil {
		return nil, explain("list streams", l.Err())
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Model < out[j].Model })
	return out, nil
}

// HandedOut looks at the queues of these models: only what they handed out, and for how long, is asked.
func HandedOut(ctx context.Context, js jetstream.JetStream, models []string) ([]Queue, error) {
	var out []Queue
	for _, m := range models {
		q := Queue{Model: m, Stream: proto.RequestStream(m)}
		before, _ := stored(ctx, js, q.Stream) // one that is not there has handed out nothing
		q.consumers(ctx, js, before)
		if err := ctx.Err(); err != nil {
			return nil, explain("look at the queue of "+m, err)
		}
		out = append(out, q)
	}
	return out, nil
}

// consumers asks those of a queue, and then its stream, which held so many messages before: what was purged, as of a job that was
// cancelled, counts as handed out at its consumer until its time is over.
func (q *Queue) consumers(ctx context.Context, js jetstream.JetStream, before uint64) {
	for _, lane := range proto.Lanes() {
		c, err := js.Consumer(ctx, q.Stream, string(lane))
		if err != nil { // not declared yet: nothing was handed out
			continue
		}
		info := c.CachedInfo()
		q.Waiting += int64(info.NumPending)
		q.HandedTo += int64(info.NumAckPending)
		q.AckWait = max(q.AckWait, info.Config.AckWait)
	}
	if q.HandedTo == 0 {
		return
	}
	if after, err := stored(ctx, js, q.Stream); err == nil {
		q.HandedTo = handed(q.HandedTo, max(before, after), q.Waiting)
	}
}

// stored is how many messages a stream holds.
func stored(ctx context.Context, js jetstream.JetStream, stream string) (uint64, error) {
	s, err := js.Stream(ctx, stream)
	if err != nil {
		return 0, err
	}
	return s.CachedInfo().State.Msgs, nil
}

// handed is how many requests of a queue are handed out that are there yet. The stream is looked at before its consumers and after
// them: neither what comes in between nor what is acknowledged makes it less.
func handed(pending int64, stored uint64, waiting int64) int64 {
	return min(pending, max(int64(stored)-waiting, 0))
}
