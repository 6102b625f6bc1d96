package worker

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
)

// parcel is what ends a line's stay with this worker: its result, or the line itself with a longer history.
type parcel struct {
	line  *line
	msg   *nats.Msg
	retry bool   // it is the line itself, on its way back to its queue
	sent  func() // is called when it is stored and before the line is acknowledged
	// instead publishes something shorter when the broker does not take the parcel at its size; nil: nothing is
	// shorter.
	instead func()

	tries int  // guarded by outbox.mu, as waits
	waits bool // until it is tried again
}

// outbox publishes parcels and acknowledges their lines once they are stored: first the result, then the ack.
// A result is GPU work: it is tried until it is stored or the worker is stopped.
type outbox struct {
	js      jetstream.JetStream
	held    *held
	log     *slog.Logger
	stop    context.Context
	missing func()        // a stream is not there
	refuse  func(*parcel) // the parcel is too large for the broker; refuse takes it over
	full    func(*line)   // the line's own queue is full; full takes it over

	kick chan struct{} // has room for one; see run
	end  chan struct{}

	mu      sync.Mutex
	fresh   []*parcel             // not published yet
	out     map[*nats.Msg]*parcel // every parcel from send until its line is done with
	bytes   int
	quiet   bool          // the present trouble has been logged
	empty   chan struct{} // closed when out is empty; nil: nobody waits
	waiting sync.WaitGroup
}

// Bounds of what may be on its way before no more is pulled. The broker buffers 128 MB for all its clients, then
// refuses.
const (
	maxParcels     = 8192
	maxParcelBytes = 64 << 20
)

// openOutbox makes a publisher of its own, because the handlers belong to it.
func openOutbox(conn jetstream.JetStream, o *outbox) error {
	o.out, o.kick, o.end = make(map[*nats.Msg]*parcel), make(chan struct{}, 1), make(chan struct{})
	opts := []jetstream.JetStreamOpt{
		jetstream.WithPublishAsyncMaxPending(2 * maxParcels),
		jetstream.WithPublishAsyncTimeout(15 * time.Second),
		jetstream.WithPublishAsyncAckHandler(func(_ jetstream.JetStream, m *nats.Msg, _ *jetstream.PubAck) { o.stored(m) }),
		jetstream.WithPublishAsyncErrHandler(func(_ jetstream.JetStream, m *nats.Msg, err error) { o.failed(m, err) }),
	}
	var err error
	switch have := conn.Options(); {
	case have.Domain != "":
		o.js, err = jetstream.NewWithDomain(conn.Conn(), have.Domain, opts...)
	case have.APIPrefix != "":
		o.js, err = jetstream.NewWithAPIPrefix(conn.Conn(), have.APIPrefix, opts...)
	default:
		o.js, err = jetstream.New(conn.Conn(), opts...)
	}
	return err
}

// send takes a parcel over. It does not wait for the broker.
func (o *outbox) send(p *parcel) {
	o.mu.Lock()
	o.out[p.msg] = p
	o.bytes += len(p.msg.Data)
	o.fresh = append(o.fresh, p)
	o.mu.Unlock()
	select {
	case o.kick <- struct{}{}:
	default:
	}
}

// run publishes what is sent, until abandon. It lets those go first who have a parcel as well, so that many leave in
// one write to the broker: one by one they cost the two ends a twentieth of their time. When twice maxParcels are on
// their way it waits, up to 200 ms (nats.go's stall wait), for one of them to come home, and then tries later.
func (o *outbox) run() {
	var batch []*parcel
	for {
		select {
		case <-o.end:
			return
		case <-o.kick:
		}
		runtime.Gosched()
		o.mu.Lock()
		batch, o.fresh = o.fresh, batch[:0]
		o.mu.Unlock()
		for i, p := range batch {
			o.publish(p)
			batch[i] = nil
		}
	}
}

func (o *outbox) publish(p *parcel) {
	o.mu.Lock()
	ours := o.out[p.msg] == p
	p.tries++
	p.waits = false
	o.mu.Unlock()
	if !ours {
		return // it was stored after all
	}
	if _, err := o.js.PublishMsgAsync(p.msg); err != nil {
		o.failed(p.msg, err)
	}
}

// remove takes a parcel out. Whoever gets it owns its line; it is nil when someone else did.
func (o *outbox) remove(m *nats.Msg) *parcel {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.removeLocked(m)
}

func (o *outbox) removeLocked(m *nats.Msg) *parcel {
	p := o.out[m]
	if p == nil {
		return nil
	}
	delete(o.out, m)
	o.bytes -= len(m.Data)
	if len(o.out) == 0 && o.empty != nil {
		close(o.empty)
		o.empty = nil
	}
	return p
}

// stored is called when the broker has a parcel.
func (o *outbox) stored(m *nats.Msg) {
	o.mu.Lock()
	p := o.removeLocked(m)
	if p != nil && p.tries > 1 {
		o.quiet = false
	}
	o.mu.Unlock()
	if p == nil {
		return
	}
	p.sent()
	o.held.say(p.line, verbAck)
	broker.CrashPoint("worker.after-ack")
}

const (
	codeStoreFailed = 10077 // the stream is full, for one
	codeTooLarge    = 10054
)

// failed is called when a parcel was not stored, or nobody knows.
func (o *outbox) failed(m *nats.Msg, err error) {
	if errors.Is(err, jetstream.ErrJetStreamPublisherClosed) {
		return // abandon has taken it out
	}
	code := apiCode(err)
	switch {
	case errors.Is(err, nats.ErrMaxPayload), code == codeTooLarge:
		if p := o.remove(m); p != nil {
			o.refuse(p)
		}
		return
	case gone(err), errors.Is(err, jetstream.ErrAsyncPublishTimeout): // with a listener on the subject, nobody says no
		o.missing()
	}
	o.tryLater(m, code, err)
}

func (o *outbox) tryLater(m *nats.Msg, code jetstream.ErrorCode, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.out[m]
	if p == nil || p.waits { // a publish that fails at once may be told of again when the connection is back
		return
	}
	p.waits = true
	if !o.quiet {
		o.quiet = true
		o.log.Warn("a result could not be stored, trying on", "subject", m.Subject, "error", broker.Plain(err))
	}
	o.waiting.Add(1)
	if p.retry && code == codeStoreFailed { // the queue is full: the line goes back as it is
		go func() {
			defer o.waiting.Done()
			if p := o.remove(m); p != nil {
				o.full(p.line)
			}
		}()
		return
	}
	go o.again(p, backoff(p.tries))
}

func apiCode(err error) jetstream.ErrorCode {
	var api *jetstream.APIError
	var je jetstream.JetStreamError
	switch {
	case errors.As(err, &api):
		return api.ErrorCode
	case errors.As(err, &je) && je.APIError() != nil:
		return je.APIError().ErrorCode
	}
	return 0
}

// again publishes a parcel after a while, unless the worker is stopped.
func (o *outbox) again(p *parcel, after time.Duration) {
	defer o.waiting.Done()
	wait := time.NewTimer(after)
	defer wait.Stop()
	select {
	case <-o.stop.Done():
	case <-wait.C:
		o.publish(p)
	}
}

// backoff is how long to wait after the n-th failure: a quarter of a second, doubled each time, up to ten seconds,
// give or take a fifth.
func backoff(n int) time.Duration {
	d := 250 * time.Millisecond << min(max(n-1, 0), 6)
	return jitter(min(d, 10*time.Second))
}

func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}

// crowded says whether so much is on its way that no more should be pulled.
func (o *outbox) crowded() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.out) > maxParcels || o.bytes > maxParcelBytes
}

// drained returns a channel that is closed when nothing is on its way.
func (o *outbox) drained() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.out) == 0 {
		none := make(chan struct{})
		close(none)
		return none
	}
	if o.empty == nil {
		o.empty = make(chan struct{})
	}
	return o.empty
}

// abandon gives back the lines of all parcels that are not known to be stored. Some of them are: their lines run
// twice, and the later result is dropped by its reader. Nothing may be sent any more.
func (o *outbox) abandon() int {
	o.mu.Lock()
	left := o.out
	o.out = map[*nats.Msg]*parcel{}
	o.bytes = 0
	o.mu.Unlock()
	close(o.end)
	o.waiting.Wait() // stop has ended, so nothing is published again
	for _, p := range left {
		o.held.say(p.line, verbNak)
	}
	o.js.CleanupPublisher()
	return len(left)
}
