package worker

import (
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"millrace/proto"
)

// tap pulls from one consumer, one pull at a time.
//
// It speaks the pull protocol itself. Fetch of nats.go drops what is on its way when it is cancelled, and such
// requests would lie untouched until AckWait; a tap is closed by draining its subscription, so that what still
// arrives is seen and given back. (A broker of several servers may deliver a moment longer; that waits for AckWait.)
type tap struct {
	nc      *nats.Conn
	ask     string // subject of pull requests
	receive func(*nats.Msg)
	rest    func() // nothing more lies here for the moment
	ended   func() // a pull has ended; may be called from any goroutine

	sub   *nats.Subscription
	inbox string
	gone  chan struct{} // closed when the subscription is drained
	ends  chan struct{} // gets a value, dropped when one is waiting, when a pull has ended
	epoch uint64        // reconnects of the connection when the tap was opened

	mu      sync.Mutex
	n       uint64    // number of the last pull; 0: none yet
	asked   int       // messages of the last pull
	left    int       // messages it may still bring; 0: no pull is out
	short   bool      // the last pull ended because there was no more
	waits   bool      // it waits for messages to come, rather than taking what is there
	until   time.Time // after this it is lost
	missing bool      // the broker does not know the consumer
	hold    time.Time // no pull before this: the last one was refused
}

// pullExpiry is how long a waiting pull waits. A shorter wait costs the broker a message, a longer one is noticed
// later when it is lost.
const pullExpiry = 5 * time.Second

// pullHold is how long nothing is asked of a consumer that refused a pull.
const pullHold = time.Second

// pullGrace is added to what a pull may take before it is thought lost.
const pullGrace = 2 * time.Second

func openTap(nc *nats.Conn, ask string, receive func(*nats.Msg), rest, ended func()) (*tap, error) {
	t := &tap{nc: nc, ask: ask, receive: receive, rest: rest, ended: ended, inbox: nc.NewInbox(),
		gone: make(chan struct{}), ends: make(chan struct{}, 1), epoch: nc.Stats().Reconnects}
	sub, err := nc.Subscribe(t.inbox+".*", t.handle)
	if err != nil {
		return nil, fmt.Errorf("subscribe for pulls: %w", err)
	}
	t.sub = sub
	sub.SetClosedHandler(func(string) { close(t.gone) })
	if err := sub.SetPendingLimits(-1, -1); err != nil { // pulls bound it
		return nil, fmt.Errorf("lift limits: %w", err)
	}
	return t, nil
}

// pull asks for up to n messages: those that are there, or, when waits is set, the next n that come within
// pullExpiry. It does nothing while a pull is out, or soon after one was refused.
func (t *tap) pull(n int, waits bool) error {
	now := time.Now()
	t.mu.Lock()
	if t.out(now) || now.Before(t.hold) {
		t.mu.Unlock()
		return nil
	}
	t.n++
	number := t.n
	t.asked = n
	t.left, t.waits, t.until, t.missing, t.short = n, waits, now.Add(pullGrace), false, true
	how := `,"no_wait":true}`
	if waits {
		t.until = t.until.Add(pullExpiry)
		how = `,"expires":` + strconv.FormatInt(int64(pullExpiry), 10) + `}`
	}
	reply := t.inbox + "." + strconv.FormatUint(number, 10)
	t.mu.Unlock()
	body := `{"batch":` + strconv.Itoa(n) + `,"max_bytes":` + strconv.Itoa(proto.PullBytes) + how
	if err := t.nc.PublishRequest(t.ask, reply, []byte(body)); err != nil {
		t.end(number, endRefused)
		return fmt.Errorf("pull: %w", err)
	}
	return nil
}

// out says whether a pull is out. Called with mu held.
func (t *tap) out(now time.Time) bool { return t.left > 0 && now.Before(t.until) }

// state says whether a pull is out, whether it waits, and whether the consumer is missing.
func (t *tap) state() (out, waits, missing bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	out = t.out(time.Now())
	return out, out && t.waits, t.missing
}

// handle gets messages, and what the broker says of a pull: such a message has the pull's own subject.
func (t *tap) handle(m *nats.Msg) {
	status := ""
	if len(m.Data) == 0 && len(m.Header) > 0 {
		status = m.Header.Get("Status")
	}
	if status == "" {
		t.receive(m)
		if n, _, err := m.Sub.Pending(); n <= 1 || err != nil { // this one counts
			t.rest()
		}
		t.got()
		return
	}
	if status == "100" { // a heartbeat
		return
	}
	if n, err := strconv.ParseUint(m.Subject[min(len(t.inbox)+1, len(m.Subject)):], 10, 64); err == nil {
		t.end(n, reading(status, m.Header.Get("Description")))
	}
}

// ending is how a pull ended that did not bring all it asked for.
type ending int

const (
	endEmpty   ending = iota // nothing more was there, or came in time
	endBytes                 // the next message did not fit in its bytes
	endRefused               // the broker does not want it now
	endMissing               // the broker does not know the consumer
)

// reading reads the status of a pull. Source: nats-server's consumer.go.
func reading(status, description string) ending {
	switch {
	case status == "404", status == "408":
		return endEmpty
	case status == "503", description == "Consumer Deleted":
		return endMissing
	case description == "Message Size Exceeds MaxBytes":
		return endBytes
	}
	return endRefused
}

func (t *tap) got() {
	t.mu.Lock()
	last := t.left == 1
	if t.left > 0 {
		t.left--
	}
	t.short = t.short && !last
	t.mu.Unlock()
	if last {
		t.tell()
	}
}

// end marks the pull of that number as ended, if it is the one that is out.
func (t *tap) end(n uint64, how ending) {
	t.mu.Lock()
	ours := n == t.n && t.left > 0
	if ours {
		if how == endBytes && t.left == t.asked { // one message is larger than a pull: it is not for us
			how = endRefused
		}
		t.left, t.missing, t.short = 0, how == endMissing, how != endBytes
		if how == endMissing || how == endRefused {
			t.hold = time.Now().Add(pullHold)
		}
	}
	t.mu.Unlock()
	if ours {
		t.tell()
	}
}

func (t *tap) tell() {
	select {
	case t.ends <- struct{}{}:
	default:
	}
	t.ended()
}

// brought says whether the last pull brought all it had room for: there may be more.
func (t *tap) brought() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.short
}

// surprised says whether the last pull waited, and something came.
func (t *tap) surprised() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.waits && !t.short && t.n > 0
}

// forget lets a queue be asked again that was missing.
func (t *tap) forget() {
	t.mu.Lock()
	t.missing = false
	t.mu.Unlock()
}

// stale says whether the connection was lost since the tap was opened.
func (t *tap) stale() bool { return t.nc.Stats().Reconnects != t.epoch }

// close ends the subscription. When the connection is up it returns after everything that was on its way has been
// received; what was on its way when the connection broke is lost until AckWait.
func (t *tap) close() {
	if !t.nc.IsConnected() || t.sub.Drain() != nil {
		_ = t.sub.Unsubscribe() // it is gone either way
		return
	}
	select {
	case <-t.gone:
	case <-time.After(pullGrace):
		_ = t.sub.Unsubscribe() // a drain that takes so long has lost its connection
	}
}
