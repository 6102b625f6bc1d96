package producer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// missingRanges is how many ranges of missing lines are asked for at once: about 200 KB of answer.
const missingRanges = 10_000

// ask asks the aggregator once which lines are missing.
func (r *run) ask(ctx context.Context, from int64) (*proto.MissingAnswer, error) {
	q := proto.MissingQuestion{Job: r.job.ID, From: from, Max: missingRanges}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	b, err := broker.AskMissing(ctx, r.o.Conn, &q)
	if err != nil {
		return nil, err
	}
	a := new(proto.MissingAnswer)
	if err := a.Decode(b); err != nil {
		return nil, fmt.Errorf("read the aggregator's answer: %w", err)
	}
	if !a.Known {
		return nil, errors.New("the aggregator does not know the job yet")
	}
	return a, nil
}

// answer asks until the aggregator answers, and says so while it does not.
func (r *run) answer(ctx context.Context, from int64) (*proto.MissingAnswer, error) {
	for {
		a, err := r.ask(ctx, from)
		if err == nil {
			r.note(noteAggregator, "")
			return a, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		r.note(noteAggregator, text(err))
		if err := sleep(ctx, time.Second); err != nil {
			return nil, err
		}
	}
}

// missing is the set of lines that have no result, however long it takes to learn that.
func (r *run) missing(ctx context.Context) (bitset, error) { return r.collect(ctx, r.answer) }

// missingNow is the same, where the aggregator answers at once.
func (r *run) missingNow(ctx context.Context) (bitset, error) { return r.collect(ctx, r.ask) }

func (r *run) collect(ctx context.Context, ask func(context.Context, int64) (*proto.MissingAnswer, error)) (bitset, error) {
	todo := make(bitset, (r.job.Lines+63)/64)
	for from := int64(0); ; {
		a, err := ask(ctx, from)
		if err != nil {
			return nil, err
		}
		for _, g := range a.Ranges {
			todo.fill(max(g.From, 0), min(g.To, r.job.Lines), r.job.Lines)
		}
		if a.Next <= from {
			return todo, nil
		}
		from = a.Next
	}
}

// lacking is the set of lines that have no result and are in no queue: those are not sent a second time, since they may
// be in flight. The order matters: a request that is gone from its queue has its result in RES by then.
func (r *run) lacking(ctx context.Context) (bitset, error) {
	queued := make(bitset, (r.job.Lines+63)/64)
	for _, q := range r.queues {
		if err := r.mark(ctx, q, queued); err != nil {
			return nil, err
		}
	}
	if err := r.folded(ctx); err != nil {
		return nil, err
	}
	todo, err := r.missing(ctx)
	for i := range todo {
		todo[i] &^= queued[i]
	}
	return todo, err
}

// mark adds the lines of which a queue holds a request.
func (r *run) mark(ctx context.Context, q *queue, lines bitset) error {
	return r.requests(ctx, q, func(req *proto.Request) {
		if 0 <= req.Index && req.Index < r.job.Lines {
			lines.set(req.Index, r.job.Lines)
		}
	})
}

// requests calls each for the requests that a queue holds of the job, for some more than once.
func (r *run) requests(ctx context.Context, q *queue, each func(*proto.Request)) error {
	for from := uint64(1); from > 0; {
		if err := r.retry(ctx, "read the queue of "+q.model, func(ctx context.Context) (err error) {
			from, err = q.requests(ctx, from, each)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// quiet returns when lines are missing although nothing is under way: nothing of the job is in its queues, or only
// what is stuck there, and the aggregator has folded all results that were stored when that was so; both for AckWait
// without a break, so that a worker that fell silent with a request has been noticed.
func (r *run) quiet(ctx context.Context) error {
	const least, most = 20 * time.Millisecond, 2 * time.Second
	pause := max(min(r.ackWait()/8, most), least)
	var since time.Time
	for {
		quiet, err := r.silent(ctx)
		if err == nil {
			r.reached()
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case permanent(err):
			return err
		case err != nil:
			r.trouble("see what is under way", err)
		case quiet && since.IsZero():
			since = time.Now()
		case quiet && time.Since(since) >= r.ackWait():
			for _, q := range r.queues {
				if q.depth > 0 {
					r.unstick(ctx, q)
				}
			}
			return nil
		}
		if !quiet {
			since = time.Time{}
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
}

func (r *run) ackWait() time.Duration {
	most := time.Duration(0)
	for _, q := range r.queues {
		most = max(most, q.ackWait)
	}
	return most
}

// silent looks once whether nothing is under way while lines are missing. The order matters: a worker stores the
// result before it acknowledges the request, so that all results of requests that are gone are in RES by then.
func (r *run) silent(ctx context.Context) (bool, error) {
	for _, q := range r.queues {
		l, err := q.look(ctx)
		if err != nil || l.depth > 0 && q.stuck.IsZero() {
			return false, err
		}
	}
	last, created, err := r.results(ctx)
	if err != nil {
		return false, err
	}
	a, err := r.ask(ctx, 0)
	if ctx.Err() == nil {
		r.note(noteAggregator, text(err))
	}
	if err != nil {
		return false, nil
	}
	return !a.Done && a.Stream == created && a.Seq >= last, nil
}

// results is the last sequence of RES, and when that stream was made.
func (r *run) results(ctx context.Context) (last, created int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	s, err := r.o.Conn.JS.Stream(ctx, proto.ResultStream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		err = errors.Join(err, r.declare.Base(ctx))
	}
	if err != nil {
		return 0, 0, fmt.Errorf("look at the results: %w", err)
	}
	i := s.CachedInfo()
	return int64(i.State.LastSeq), i.Created.UnixNano(), nil
}
