package aggregator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"

	"millrace/proto"
)

// source reads the stream of results, in order and without gaps, from where the fold stands. It is a pull consumer of
// its own and not jetstream's ordered one: that mends itself after a break by sequence alone, and would go on in the
// middle of another stream of the same name. This one ends, and whoever opens the next looks at which stream it is.
type source struct {
	js   jetstream.JetStream
	name string
	it   jetstream.MessagesContext
	last uint64 // sequence of the consumer
	old  uint64 // sequence of the last message that was there before
}

// How results are pulled. The bytes bound what lies in memory; the heartbeat, how long a dead broker goes unnoticed
// (twice as long).
const (
	pullMessages  = 4096
	pullExpiry    = 20 * time.Second
	pullHeartbeat = 2 * time.Second
	consumerLives = time.Minute // without being pulled from
	closeTimeout  = 2 * time.Second
)

var (
	errAnotherStream = errors.New("the stream of results was replaced")
	errGap           = errors.New("the broker skipped messages")
)

// resume decides where to go on in a stream: behind at, if this is the stream that at speaks of and it still holds
// what was folded, or else at its first message (again). stamp returns the timestamp of the message at a sequence, 0
// where there is none.
func resume(at position, info *jetstream.StreamInfo, stamp func(seq uint64) (int64, error)) (to position, again bool, err error) {
	created := info.Created.UnixNano()
	start := position{Stream: created, Seq: max(info.State.FirstSeq, 1) - 1}
	if at.Stream != created || info.State.LastSeq < at.Seq {
		return start, true, nil
	}
	if at.Seq < start.Seq { // what lies between is gone
		return start, at.Seq == 0, nil
	}
	if at.Time == 0 {
		return at, false, nil
	}
	t, err := stamp(at.Seq)
	if err != nil {
		return at, false, err
	}
	if t != 0 && t != at.Time { // the broker's disk is an older one, and was written on since
		return start, true, nil
	}
	return at, false, nil
}

// openSource opens the stream and says where in it the fold goes on. close it.
func openSource(ctx context.Context, js jetstream.JetStream, at position) (s *source, to position, again bool, err error) {
	stream, err := js.Stream(ctx, proto.ResultStream)
	if err != nil {
		return nil, at, false, fmt.Errorf("open the stream of results: %w", err)
	}
	info := stream.CachedInfo()
	to, again, err = resume(at, info, func(seq uint64) (int64, error) { return stamp(ctx, stream, seq) })
	if err != nil {
		return nil, at, false, err
	}
	c, err := stream.CreateConsumer(ctx, jetstream.ConsumerConfig{
		Name:              "aggregator-" + nuid.Next(),
		DeliverPolicy:     jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:       to.Seq + 1,
		AckPolicy:         jetstream.AckNonePolicy,
		MemoryStorage:     true,
		Replicas:          1,
		InactiveThreshold: consumerLives,
	})
	if err != nil {
		return nil, at, false, fmt.Errorf("read the stream of results: %w", err)
	}
	s = &source{js: js, name: c.CachedInfo().Name, old: info.State.LastSeq}
	if err := s.pull(ctx, stream, c, info.Created); err != nil {
		s.close()
		return nil, at, false, err
	}
	if c.CachedInfo().NumPending == 0 && info.State.LastSeq > to.Seq { // all behind it was deleted, not by us
		to = position{Stream: to.Stream, Seq: info.State.LastSeq}
	}
	return s, to, again, nil
}

// pull begins to read, if the consumer is one of the stream that was created then.
func (s *source) pull(ctx context.Context, stream jetstream.Stream, c jetstream.Consumer, created time.Time) error {
	now, err := stream.Info(ctx)
	if err != nil {
		return fmt.Errorf("look at the stream of results: %w", err)
	}
	if !now.Created.Equal(created) {
		return errAnotherStream
	}
	s.it, err = c.Messages(jetstream.PullMaxMessagesWithBytesLimit(pullMessages, proto.PullBytes),
		jetstream.PullExpiry(pullExpiry), jetstream.PullHeartbeat(pullHeartbeat), jetstream.WithMessagesErrOnMissingHeartbeat(true))
	if err != nil {
		return fmt.Errorf("read the stream of results: %w", err)
	}
	return nil
}

func stamp(ctx context.Context, stream jetstream.Stream, seq uint64) (int64, error) {
	m, err := stream.GetMsg(ctx, seq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look at the last folded result: %w", err)
	}
	return m.Time.UnixNano(), nil
}

// next returns the next message. After an error the source is to be closed.
func (s *source) next(ctx context.Context) (message, error) {
	msg, err := s.it.Next(jetstream.NextContext(ctx))
	if err != nil {
		return message{}, fmt.Errorf("read results: %w", err)
	}
	meta, err := msg.Metadata()
	if err != nil {
		return message{}, fmt.Errorf("read results: %w", err)
	}
	if s.last++; meta.Sequence.Consumer != s.last {
		return message{}, errGap
	}
	return message{subject: msg.Subject(), data: msg.Data(), seq: meta.Sequence.Stream, time: meta.Timestamp.UnixNano()}, nil
}

// close stops reading. The consumer goes away by itself where the broker cannot be told.
func (s *source) close() {
	if s.it != nil {
		s.it.Stop()
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	_ = s.js.DeleteConsumer(ctx, proto.ResultStream, s.name) // see above
}
