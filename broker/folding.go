package broker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"millrace/proto"
)

// ErrNoAggregator says that nobody folds results.
var ErrNoAggregator = errors.New("no aggregator answers; start `millrace aggregate`")

// aggregatorTimeout bounds the wait for an aggregator, which answers at once or is not there. One that waits for the lease
// of another does not answer.
const aggregatorTimeout = 2 * time.Second

// AskMissing asks the aggregator which lines of a job are missing, and returns its answer as it came. The error is
// ErrNoAggregator where there is none before ctx ends.
func AskMissing(ctx context.Context, c *Conn, q *proto.MissingQuestion) ([]byte, error) {
	b, err := q.Encode()
	if err != nil {
		return nil, err
	}
	m, err := c.NC.RequestWithContext(ctx, proto.SubjectMissing, b)
	switch {
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, context.DeadlineExceeded):
		return nil, ErrNoAggregator
	case err != nil:
		return nil, fmt.Errorf("ask the aggregator: %w", err)
	}
	return m.Data, nil
}

// Folding asks whether an aggregator is there. The error is ErrNoAggregator where none answers.
func Folding(ctx context.Context, c *Conn) error {
	actx, cancel := context.WithTimeout(ctx, aggregatorTimeout)
	defer cancel()
	_, err := AskMissing(actx, c, new(proto.MissingQuestion)) // of no job
	last := c.NC.LastError()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(last, nats.ErrPermissionViolation): // what is not allowed is not answered
		return fmt.Errorf("ask the aggregator: %w", last)
	}
	return err
}
