package producer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/synadia-io/orbit.go/jetstreamext"

	"millrace/broker"
)

// way is how records are published.
type way int

const (
	waySingle way = iota // one acknowledgement each, many at once: any broker can
	wayFast              // a fast batch: one acknowledgement for hundreds
	wayAtomic            // all or nothing: the one way in which a broker that fsyncs does so once for a thousand
)

// Limits of one batch. A thousand is the server's limit for atomic batches; the bytes stay well below what it
// buffers (128 MB), and bound what a batch takes in memory here.
const (
	batchLines = 1000
	batchBytes = 8 << 20
)

// publishTimeout bounds the wait for one acknowledgement.
const publishTimeout = 5 * time.Second

// errFull is returned when a stream refuses more.
var errFull = errors.New("the stream is full")

const errStoreFailed = 10077 // nats-server: JSStreamStoreFailedF, of which "maximum bytes exceeded" is one

// publisher puts records into one stream, in the way that suits the broker. One goroutine uses it at a time.
type publisher struct {
	conn *broker.Conn
	way  way
	shy  int // sends that do without batches, because one went wrong
}

// shyFor is how many sends go without batches after one that went wrong for another reason than a full stream.
const shyFor = 20

// choose picks the way for a stream.
func (p *publisher) choose(cfg jetstream.StreamConfig) {
	switch {
	case p.conn.SyncAlways && cfg.AllowAtomicPublish:
		p.way = wayAtomic
	case cfg.AllowBatchPublish:
		p.way = wayFast
	default: // a broker older than 2.12 knows neither
		p.way = waySingle
	}
}

// send publishes msgs in order and returns how many of them, from the first, are stored for certain. Those after may
// be stored as well: whoever sends them again makes duplicates, which are harmless.
func (p *publisher) send(ctx context.Context, subject string, msgs [][]byte) (int, error) {
	n, err := p.try(ctx, subject, msgs)
	if err != nil && ctx.Err() == nil && p.way != waySingle && p.shy == 0 && !errors.Is(err, errFull) {
		p.shy = shyFor
		if refused(err) {
			var m int
			m, err = p.try(ctx, subject, msgs[n:])
			n += m
		}
	}
	if err != nil {
		return n, fmt.Errorf("publish to %s: %w", subject, err)
	}
	p.shy = max(p.shy-1, 0)
	return n, nil
}

func (p *publisher) try(ctx context.Context, subject string, msgs [][]byte) (int, error) {
	var n int
	var err error
	switch {
	case len(msgs) == 1 || p.shy > 0 || p.way == waySingle:
		n, err = p.singles(ctx, subject, msgs)
	case p.way == wayAtomic:
		n, err = p.atomic(ctx, subject, msgs)
	default:
		n, err = p.fast(ctx, subject, msgs)
	}
	if e := apiError(err); e != nil && e.ErrorCode == errStoreFailed {
		err = fmt.Errorf("%w: %s", errFull, e.Description)
	}
	return n, err
}

func apiError(err error) *jetstream.APIError {
	var je jetstream.JetStreamError
	if errors.As(err, &je) && je.APIError() != nil {
		return je.APIError()
	}
	var ae *jetstream.APIError
	errors.As(err, &ae)
	return ae
}

// refused says whether the broker answered, and with a no.
func refused(err error) bool {
	return apiError(err) != nil || errors.Is(err, jetstreamext.ErrInvalidBatchAck)
}

func (p *publisher) atomic(ctx context.Context, subject string, msgs [][]byte) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	ms := make([]*nats.Msg, len(msgs))
	for i, m := range msgs {
		ms[i] = &nats.Msg{Subject: subject, Data: m, Header: nats.Header{}}
	}
	if _, err := jetstreamext.PublishMsgBatch(ctx, p.conn.JS, ms); err != nil {
		return 0, err
	}
	return len(msgs), nil
}

// fast publishes one fast batch. A batch that idles for ten seconds is gone at the broker without a word; this one
// cannot idle, since all of its records are there before it begins, and only what is acknowledged counts.
func (p *publisher) fast(ctx context.Context, subject string, msgs [][]byte) (int, error) {
	if !p.conn.NC.IsConnected() { // a batch that breaks leaves a subscription behind in the library until the connection closes
		return 0, nats.ErrDisconnected
	}
	var said firstError
	b, err := jetstreamext.NewFastPublisher(p.conn.JS,
		jetstreamext.FastPublishFlowControl{Flow: batchLines / 2, MaxOutstandingAcks: 2, AckTimeout: publishTimeout},
		jetstreamext.WithFastPublisherErrorHandler(said.set))
	if err != nil {
		return 0, err
	}
	stored := 0
	last := len(msgs) - 1
	for _, m := range msgs[:last] {
		ack, err := b.Add(subject, m)
		if err != nil {
			return stored, said.or(err)
		}
		stored = int(ack.AckSequence)
		if ctx.Err() != nil {
			p.abandon(b)
			return stored, context.Cause(ctx)
		}
	}
	ack, err := b.Commit(ctx, subject, msgs[last])
	if err != nil {
		return stored, said.or(err)
	}
	if n := int(ack.BatchSize); n < len(msgs) {
		return n, said.or(jetstreamext.ErrInvalidBatchAck)
	}
	return len(msgs), nil
}

// abandon ends a batch that nobody waits for, so that nothing is left of it here.
func (p *publisher) abandon(b jetstreamext.FastPublisher) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, _ = b.Close(ctx) // sends the end of the batch and does not wait for an answer
}

// firstError keeps what the broker said first; the library tells only its handler.
type firstError struct {
	mu  sync.Mutex
	err error
}

func (f *firstError) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
	}
}

func (f *firstError) or(err error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return f.err
	}
	return err
}

// singles publishes each record for itself, all before it waits for the first acknowledgement.
func (p *publisher) singles(ctx context.Context, subject string, msgs [][]byte) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	acks := make([]jetstream.PubAckFuture, 0, len(msgs))
	var failed error
	for _, m := range msgs {
		a, err := p.conn.JS.PublishAsync(subject, m, jetstream.WithStallWait(publishTimeout))
		if err != nil {
			failed = err
			break
		}
		acks = append(acks, a)
	}
	for i, a := range acks {
		select {
		case <-a.Ok():
		case err := <-a.Err():
			return i, err
		case <-ctx.Done():
			return i, context.Cause(ctx)
		}
	}
	return len(acks), failed
}
