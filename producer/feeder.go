package producer

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// How often a queue is looked at: at once after lines were sent, then less and less often.
const (
	leastPoll = 20 * time.Millisecond
	mostPoll  = 250 * time.Millisecond
)

// fillers is how many models may be fed at the same instant: it bounds the memory for lines on their way.
const fillers = 4

// orderRead is how many positions of the order are read at once.
const orderRead = 4096

// serve feeds until something else is wanted: a round of sending, the wait until nothing is under way any more, and
// another round for what is missing then.
func (r *run) serve(ctx context.Context) error {
	said := r.wishes()
	todo, from, err := r.plan(ctx)
	for err == nil {
		r.state(proto.FeedFeeding)
		if err = r.round(ctx, todo, from); err != nil {
			break
		}
		r.heard(said)
		r.state(proto.FeedWaiting)
		if err = r.quiet(ctx); err != nil {
			break
		}
		if todo, err = r.missing(ctx); err == nil {
			r.log.Warn("lines are missing and nothing is under way, sending them again", "lines", todo.count())
			broker.CrashPoint("producer.resend")
		}
		from = make([]int64, len(r.queues))
	}
	return err
}

// plan says which lines to send, nil: all, and from which position of each queue's order.
//
// A new job begins at the beginning. One that had an owner goes on where that one stopped; what is missing before
// that place shows when everything is sent. When requests were dropped on purpose, what is missing must be asked: workers
// drop those of a paused job, also where no owner saw the pause.
func (r *run) plan(ctx context.Context) (bitset, []int64, error) {
	r.mu.Lock()
	dropped := r.said != r.feed.Heard || r.before == proto.FeedHalted
	from := append([]int64(nil), r.first...)
	r.mu.Unlock()
	if dropped {
		todo, err := r.lacking(ctx)
		return todo, make([]int64, len(r.queues)), err
	}
	todo, err := r.missingNow(ctx) // spares the lines that have results; nothing depends on it
	if err != nil {
		todo = nil
	}
	return todo, from, nil
}

// wishes is the revision of what users want, and heard notes that what they wanted up to one was followed.
func (r *run) wishes() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.said
}

func (r *run) heard(said int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.feed.Heard, r.before = said, ""
}

// round sends the lines of todo (nil: all) from the positions in from.
func (r *run) round(ctx context.Context, todo bitset, from []int64) error {
	if err := r.endInvalid(ctx, todo); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	slots := make(chan struct{}, fillers)
	var wg sync.WaitGroup
	for i, q := range r.queues {
		f := &feeder{r: r, q: q, i: i, group: r.d.groups()[i], todo: todo, pos: from[i], slots: slots}
		wg.Go(func() {
			if err := f.run(ctx); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// feeder sends the lines of one model in one round.
type feeder struct {
	r     *run
	q     *queue
	i     int // of the queue
	group group
	todo  bitset
	pos   int64 // in the group: all before it is sent
	slots chan struct{}
}

// chunk is lines on their way.
type chunk struct {
	msgs  [][]byte
	at    []int64 // position of each
	to    int64   // position after the last
	bytes int64
}

func (f *feeder) run(ctx context.Context) error {
	const least, most = 100 * time.Millisecond, 2 * time.Second
	for wait := least; f.pos < f.group.n; {
		lines, bytes, err := f.room(ctx)
		if err != nil {
			return err
		}
		err = f.fill(ctx, lines, bytes)
		switch {
		case err == nil:
			wait = least
			continue
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !errors.Is(err, errAgain):
			return err
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
		wait = min(2*wait, most)
	}
	return f.r.save(ctx, true)
}

// errAgain is returned for what the broker did not take but may take later.
var errAgain = errors.New("try again")

// room waits until the queue has room, and returns how many lines and bytes.
func (f *feeder) room(ctx context.Context) (lines, bytes int64, err error) {
	slow := mostPoll * time.Duration(1+len(f.r.queues)/50)
	for wait := leastPoll; ; wait = min(2*wait, slow) {
		var l level
		err := f.r.retry(ctx, "look at the queue of "+f.q.model, func(ctx context.Context) (err error) {
			l, err = f.q.look(ctx)
			return err
		})
		if err != nil {
			return 0, 0, err
		}
		if f.q.dead() {
			f.r.unstick(ctx, f.q)
			continue
		}
		if lines, bytes = f.space(l); lines > 0 && f.r.held() {
			return lines, bytes, nil
		}
		if err := sleep(ctx, wait); err != nil {
			return 0, 0, err
		}
	}
}

// space is how much a queue takes. It is filled up when it is half empty, and never beyond 80 % of its stream's size:
// what workers send back must always find room.
func (f *feeder) space(l level) (lines, bytes int64) {
	window := f.r.window(f.i)
	bytes = math.MaxInt64
	if l.most > 0 {
		bytes = l.most/10*8 - l.bytes
	}
	if l.most > 0 && bytes < l.most/50 {
		f.r.noteFull(f.i, fmt.Sprintf("the queue of %s is full (%s of %s bytes)", f.q.model, commas(l.bytes), commas(l.most)))
		return 0, 0
	}
	f.r.noteFull(f.i, "")
	if l.depth > window/2 {
		return 0, 0
	}
	return window - l.depth, bytes
}

func (r *run) window(i int) int64 {
	w := r.o.Window
	if w <= 0 {
		w = defaultWindow
	}
	w = max(w/int64(len(r.queues)), min(w, batchLines))
	r.mu.Lock()
	defer r.mu.Unlock()
	return max(w, 3*r.limits[i])
}

func (r *run) held() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.unheld
}

// noteFull notes why a queue takes no more, or that it does.
func (r *run) noteFull(i int, text string) {
	r.mu.Lock()
	r.full[i] = text
	for _, s := range r.full {
		if text = s; text != "" {
			break
		}
	}
	r.mu.Unlock()
	r.note(noteFull, text)
}

// unstick drops requests that no worker will ever get; they are missing then, and sent again.
func (r *run) unstick(ctx context.Context, q *queue) {
	r.log.Warn("the broker holds requests that it will not hand out, dropping them", "model", q.model, "requests", q.depth)
	if err := q.purge(ctx); err != nil {
		r.trouble("drop stuck requests", err)
	}
}

// fill sends up to so many lines and bytes. One goroutine prepares the next chunk while this one sends.
func (f *feeder) fill(ctx context.Context, lines, bytes int64) error {
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	chunks := make(chan chunk, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(chunks)
		if err := f.prepare(ctx, lines, bytes, chunks); err != nil {
			cancel(err)
		}
	})
	for c := range chunks {
		if ctx.Err() == nil {
			if err := f.send(ctx, c); err != nil {
				cancel(err)
			}
		}
	}
	wg.Wait()
	return context.Cause(ctx)
}

// prepare reads lines and renders their requests, from where the feeder is.
func (f *feeder) prepare(ctx context.Context, lines, bytes int64, to chan<- chunk) error {
	var w scratch
	into := make([]uint32, orderRead)
	c := chunk{to: f.pos}
	give := func() error {
		select {
		case to <- c:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		lines, bytes, c = lines-int64(len(c.msgs)), bytes-c.bytes, chunk{to: c.to}
		return nil
	}
	for c.to < f.group.n && lines > 0 && bytes > 0 {
		at, err := f.r.d.order.read(f.group, c.to, into)
		if err != nil {
			return err
		}
		for _, i := range at {
			if int64(len(c.msgs)) == min(lines, batchLines) || c.bytes >= min(bytes, batchBytes) {
				break
			}
			if f.todo == nil || f.todo.has(int64(i)) {
				msg, err := f.r.d.request(&f.r.job, int64(i), &w)
				if err != nil {
					return err
				}
				c.msgs, c.at, c.bytes = append(c.msgs, msg), append(c.at, c.to), c.bytes+int64(len(msg))
			}
			c.to++
		}
		if len(c.msgs) > 0 || c.to == f.group.n {
			if err := give(); err != nil {
				return err
			}
		}
	}
	return nil
}

// send publishes a chunk and notes how far that came.
func (f *feeder) send(ctx context.Context, c chunk) error {
	var n int
	var err error
	if len(c.msgs) > 0 {
		sctx, end := outlast(ctx, publishTimeout)
		n, err = f.q.pub.send(sctx, f.q.subject, c.msgs)
		end()
	}
	to := c.to
	if n < len(c.msgs) {
		to = c.at[n]
	}
	if to > f.pos {
		f.pos = to
		first := f.r.advance(f.i, c.at[:n], to)
		f.r.metrics.sent(f.q.model, first, int64(n)-first)
		broker.CrashPoint("producer.batch-sent")
		if serr := f.r.save(ctx, false); serr != nil {
			return serr
		}
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case permanent(err):
		return err
	}
	f.r.metrics.failure()
	if errors.Is(err, errFull) {
		f.r.noteFull(f.i, fmt.Sprintf("the queue of %s is full", f.q.model))
	} else {
		f.r.trouble("enqueue for "+f.q.model, err)
	}
	return errAgain
}

// outlast returns a context that lasts longer than ctx: what the broker stored just before the end is known to be sent
// then, and no next owner sends it once more.
func outlast(ctx context.Context, d time.Duration) (longer context.Context, end func()) {
	longer, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		time.AfterFunc(d, func() { cancel(context.Cause(ctx)) })
	})
	return longer, func() { stop(); cancel(nil) }
}
