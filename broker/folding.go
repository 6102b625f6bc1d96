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

// Folding asks whether an aggregator is there. The error is ErrNoAggregator where none answers.
func Folding(ctx context.Context, c *Conn) error {
	q, err := new(proto.MissingQuestion).Encode() // of no job
	if err != nil {
		return err
	}
	actx, cancel := context.WithTimeout(ctx, aggregatorTimeout)
	defer cancel()
	_, err = c.NC.RequestWithContext(actx, proto.SubjectMissing, q)
	last := c.NC.LastError()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(last, nats.ErrPermissionViolation): // what is not allowed is not answered
		return fmt.Errorf("ask the aggregator: %w", last)
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, context.DeadlineExceeded):
		return ErrNoAggregator
	}
	return fmt.Errorf("ask the aggregator: %w", err)
}
