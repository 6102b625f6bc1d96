package producer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// pause feeds nothing until something else is wanted. What is queued stays: the workers drop what they get of the job, and
// a request in the queue afterwards is one that they have begun and finish, or that nobody has had.
func (r *run) pause(ctx context.Context) error {
	r.state(proto.FeedPaused)
	for {
		if err := r.save(ctx, true); err != nil {
			return err
		}
		if err := sleep(ctx, time.Second); err != nil {
			return err
		}
	}
}

// halt drops what is queued and gives up.
func (r *run) halt(ctx context.Context) error {
	r.purge(ctx)
	next := "the same command goes"
	if r.o.fetch != nil {
		next = "`millrace resume " + r.job.ID + "` goes"
	}
	return fmt.Errorf("%w. Lines in flight end first. `millrace results %s --errors` prints what failed. Mend the cause: %s on with the lines that have not ended, and --max-errors counts anew from there; "+
		"those that failed stay so, only a fresh run of all lines (--again) runs them once more", r.halted(), r.job.ID, next)
}

// halted says why the job is.
func (r *run) halted() error {
	return fmt.Errorf("%w: more than --max-errors %s; so far %s", ErrHalted, r.job.MaxErrors, r.worst())
}

// end gives every line that has no result one that says why it never ran, until all have one. Workers that still
// finish a line meanwhile do no harm: the first ok wins.
func (r *run) end(ctx context.Context, as error, code, message string) error {
	r.state(proto.FeedEnding)
	if err := r.save(ctx, true); err != nil { // by that workers know it
		return err
	}
	if err := sleep(ctx, watchEvery); err != nil { // they tell of the lines at their engines first, mostly
		return err
	}
	for {
		if err := r.empty(ctx); err != nil {
			return err
		}
		if err := r.folded(ctx); err != nil {
			return err
		}
		todo, err := r.missing(ctx)
		if err != nil {
			return err
		}
		if todo.count() > 0 {
			r.gave = as
		}
		if err := r.endAll(ctx, todo.all, code, message); err != nil {
			return err
		}
		if r.d == nil { // only now is what the queues told known elsewhere too
			r.purge(ctx)
		}
		if err := r.save(ctx, true); err != nil {
			return err
		}
		if err := sleep(ctx, watchEvery); err != nil {
			return err
		}
	}
}

// empty drops what is queued. Where the input is out of reach it notes instead what is known of the lines by that.
func (r *run) empty(ctx context.Context) error {
	if r.d != nil {
		r.purge(ctx)
		return nil
	}
	if r.known == nil {
		r.known = map[int64]*proto.Request{}
	}
	for _, q := range r.queues {
		err := r.requests(ctx, q, func(req *proto.Request) {
			req.Body = nil // it lies in the message
			r.known[req.Index] = req
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// folded waits until the aggregator has seen all results that are stored now.
func (r *run) folded(ctx context.Context) error {
	var last, created int64
	err := r.retry(ctx, "look at the results", func(ctx context.Context) (err error) {
		last, created, err = r.results(ctx)
		return err
	})
	for err == nil {
		var a *proto.MissingAnswer
		if a, err = r.answer(ctx, 0); err != nil || a.Stream == created && a.Seq >= last || a.Done {
			break
		}
		err = sleep(ctx, watchEvery)
	}
	return err
}

// endInvalid ends the invalid lines that have no result: those of todo, or all (nil) where no owner did before.
func (r *run) endInvalid(ctx context.Context, todo bitset) error {
	g := r.d.invalid()
	r.mu.Lock()
	did := r.feed.Ended >= r.job.Invalid
	r.mu.Unlock()
	if g.n == 0 || todo == nil && did {
		return nil
	}
	var oerr error
	err := r.endAll(ctx, func(yield func(int64) bool) { oerr = r.invalidLines(g, todo, yield) }, "", "")
	if err = errors.Join(oerr, err); err != nil {
		return err
	}
	broker.CrashPoint("producer.invalid-published")
	return r.save(ctx, true)
}

// invalidLines yields the lines of a group that are in todo (nil: all).
func (r *run) invalidLines(g group, todo bitset, yield func(int64) bool) error {
	into := make([]uint32, orderRead)
	for at := int64(0); at < g.n; {
		lines, err := r.d.order.read(g, at, into)
		if err != nil {
			return err
		}
		for _, i := range lines {
			if (todo == nil || todo.has(int64(i))) && !yield(int64(i)) {
				return nil
			}
		}
		at += int64(len(lines))
	}
	return nil
}

// endAll publishes error results for lines.
func (r *run) endAll(ctx context.Context, lines func(func(int64) bool), code, message string) error {
	e := ender{r: r, pub: publisher{conn: r.o.Conn}, code: code, message: message}
	for i := range lines {
		if err := e.add(ctx, i); err != nil {
			return err
		}
	}
	return e.flush(ctx)
}

// ender publishes error results in batches.
type ender struct {
	r             *run
	pub           publisher
	code, message string
	msgs          [][]byte
	bytes         int
	w             scratch
}

func (e *ender) add(ctx context.Context, i int64) error {
	msg, err := ending(e.r.d, e.r.known[i], &e.r.job, i, e.code, e.message, &e.w)
	if err != nil {
		return err
	}
	e.msgs, e.bytes = append(e.msgs, msg), e.bytes+len(msg)
	if len(e.msgs) < batchLines && e.bytes < batchBytes {
		return nil
	}
	return e.flush(ctx)
}

// flush publishes what is collected, however long that takes.
func (e *ender) flush(ctx context.Context) error {
	for len(e.msgs) > 0 {
		err := e.r.retry(ctx, "publish error results", func(ctx context.Context) error {
			if err := e.choose(ctx); err != nil {
				return err
			}
			n, err := e.pub.send(ctx, proto.ResultSubject(e.r.job.ID), e.msgs)
			e.msgs = e.msgs[n:]
			e.r.count(0, int64(n))
			e.r.metrics.end(e.label(), int64(n))
			return err
		})
		if err != nil {
			return err
		}
	}
	e.msgs, e.bytes = nil, 0
	return nil
}

func (e *ender) label() string {
	if e.code == "" {
		return proto.CodeInvalidRequest
	}
	return e.code
}

// choose looks how RES takes batches.
func (e *ender) choose(ctx context.Context) error {
	if e.pub.way != waySingle {
		return nil
	}
	s, err := e.r.o.Conn.JS.Stream(ctx, proto.ResultStream)
	if err != nil {
		return fmt.Errorf("look up the results: %w", err)
	}
	e.pub.choose(s.CachedInfo().Config)
	return nil
}
