package worker

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/nats-io/nats.go"

	"millrace/proto"
)

// feeder pulls lines into the slots: only while the gate is open, and only what can be run.
//
// While there is work it takes chunks of what is there, the urgent lanes first, the models of a lane in turn. A
// queue that was empty a moment ago is passed over; when there is still room after the last queue, a waiting pull
// for one message stays at each of them (at the first standing ones, where there are many), and the message that
// comes ends the wait. So at most that many messages more than slots + slots/8 are ever here.
type feeder struct {
	nc      *nats.Conn
	prefix  string // of the JetStream API
	queues  *queues
	slots   *slots
	share   *share
	open    func() bool
	crowded func() bool // so much is on its way that no more should come
	receive func(*nats.Msg, *queue)
	rest    func() // all that came was received

	wake chan struct{}
	turn int // rotates the models
}

const (
	maxChunk = 256                    // messages of one pull
	dryFor   = 250 * time.Millisecond // a queue that was empty is not asked again for so long
	sweepGap = time.Second            // between looks at queues without a waiting pull
	crowdGap = 20 * time.Millisecond  // between looks at a crowd
)

func newFeeder() *feeder { return &feeder{wake: make(chan struct{}, 1)} }

// nudge makes the feeder look at the slots again.
func (f *feeder) nudge() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// run pulls until ctx ends. When it returns, nothing more is received.
func (f *feeder) run(ctx context.Context) {
	var taps []*queue
	defer func() {
		closeTaps(taps)
		f.share.end()
	}()
	for ctx.Err() == nil {
		want := f.queues.sure()
		if !f.open() {
			want = nil
		}
		if !slices.Equal(taps, want) || broken(taps) {
			closeTaps(taps)
			taps = f.openTaps(want)
		}
		wait := f.feed(ctx, taps)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-f.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// feed fills the room there is, and returns how long to wait where nothing happens.
func (f *feeder) feed(ctx context.Context, taps []*queue) time.Duration {
	if f.crowded() {
		return crowdGap
	}
	if len(taps) == 0 {
		return pullExpiry
	}
	room, chunk := f.room(ctx, taps)
	if room < chunk {
		return f.share.wait(time.Now())
	}
	standing, order := 0, f.order(taps)
	for _, q := range order {
		out, waits, missing := q.tap.state()
		if !out && q.tap.surprised() {
			q.dry = time.Time{}
		}
		switch {
		case missing:
			f.queues.lost(false)
			q.tap.forget()
			continue
		case out && waits:
			standing++
			continue
		case time.Since(q.dry) < dryFor:
			continue
		}
		room = f.drink(ctx, q, taps, room)
		if room < chunk {
			return min(dryFor, f.share.wait(time.Now()))
		}
	}
	f.share.empty()
	return f.stand(order, standing)
}

// room is how many lines may be pulled, and how many at least are worth it. Where few are left it looks how many.
func (f *feeder) room(ctx context.Context, taps []*queue) (room, chunk int) {
	now := time.Now()
	due := f.share.due(now)
	if room, chunk = f.slots.room(); room < chunk && !due || f.share.looked(now) {
		return room, chunk
	}
	most, here := f.slots.capacity()
	f.slots.setShare(f.share.look(ctx, now, taps, most, here))
	if room, chunk = f.slots.room(); due {
		chunk = 1
	}
	return room, chunk
}

// drink takes from a queue until it is empty or there is no room, and returns the room that is left.
func (f *feeder) drink(ctx context.Context, q *queue, taps []*queue, room int) int {
	for room > 0 && ctx.Err() == nil {
		if q.tap.pull(min(room, maxChunk), false) != nil {
			q.dry = time.Now()
			return room
		}
		all := f.pulled(ctx, q)
		room, _ = f.room(ctx, taps)
		if !all {
			q.dry = time.Now()
			return room
		}
	}
	return room
}

// pulled waits for the end of a pull, and says whether it brought all it asked for.
func (f *feeder) pulled(ctx context.Context, q *queue) bool {
	timer := time.NewTimer(pullGrace)
	defer timer.Stop()
	for {
		out, _, _ := q.tap.state()
		if !out {
			return q.tap.brought()
		}
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return false
		case <-q.tap.ends:
		}
	}
}

// stand leaves waiting pulls at the queues, as many as may be.
func (f *feeder) stand(order []*queue, standing int) time.Duration {
	limit, here := f.slots.capacity()
	most := max(len(proto.Lanes()), (limit-here)/8)
	for _, q := range order {
		out, _, _ := q.tap.state()
		if out {
			continue
		}
		if standing >= most {
			return sweepGap
		}
		if q.tap.pull(1, true) != nil {
			return sweepGap
		}
		standing++
	}
	return pullExpiry
}

// order sorts the queues by lane; the models of a lane take turns at being first.
func (f *feeder) order(taps []*queue) []*queue {
	f.turn++
	n := len(taps)
	out := make([]*queue, 0, n)
	for i := range taps {
		out = append(out, taps[(i+f.turn*len(proto.Lanes()))%n])
	}
	lanes := proto.Lanes()
	slices.SortStableFunc(out, func(a, b *queue) int {
		return cmp.Compare(slices.Index(lanes, a.lane), slices.Index(lanes, b.lane))
	})
	return out
}

func (f *feeder) openTaps(want []*queue) []*queue {
	var out []*queue
	for _, q := range want {
		ask := f.prefix + "CONSUMER.MSG.NEXT." + proto.RequestStream(q.model) + "." + string(q.lane)
		t, err := openTap(f.nc, ask, func(m *nats.Msg) { f.receive(m, q) }, f.rest, f.nudge)
		if err != nil {
			closeTaps(out)
			return nil // the connection is closed
		}
		q.tap, q.dry = t, time.Time{}
		out = append(out, q)
	}
	return out
}

func closeTaps(taps []*queue) {
	done := make(chan struct{})
	for _, q := range taps {
		go func() {
			q.tap.close()
			done <- struct{}{}
		}()
	}
	for range taps {
		<-done
	}
}

// broken says whether the connection was lost since the taps were opened: pulls are lost with it.
func broken(taps []*queue) bool {
	return slices.ContainsFunc(taps, func(q *queue) bool { return q.tap.stale() })
}
