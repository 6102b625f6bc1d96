package worker

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// The words of JetStream's acknowledgements.
var (
	verbAck      = []byte("+ACK")
	verbNak      = []byte("-NAK")
	verbProgress = []byte("+WPI")
	verbTerm     = []byte("+TERM")
)

// held is everything that was pulled and is not acknowledged. It keeps it ours by a sign of life every third of
// AckWait, from the receipt on: the time runs while a line waits for its slot, too.
type held struct {
	nc      *nats.Conn
	journal *journal
	ackWait func() time.Duration // the shortest of all consumers
	over    func(*line) bool     // the line is held for longer than it may be
	again   chan struct{}        // ackWait may be another one

	mu    sync.Mutex
	lines map[key]*line
	bytes int
}

// maxHeldBytes is how much may be held before no more is pulled: a thousand lines with images in them are large.
const maxHeldBytes = 512 << 20

// add takes a line in. A message that comes again while we hold it (its signs of life were lost) is the same line:
// add keeps the newer delivery's reply and returns false. Another line under the same number is from another stream.
func (h *held) add(l *line) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if have, ok := h.lines[l.key]; ok && have.equals(l) {
		h.journal.done(have.reply)
		have.reply = l.reply
		h.journal.received(l.reply, l.queue.born)
		return false
	} else if ok {
		have.stale = true
		h.forget(have)
	}
	h.lines[l.key] = l
	h.bytes += l.size
	h.journal.received(l.reply, l.queue.born)
	return true
}

// say speaks the last word on a line. What cannot be sent now is sent when the connection is back and the line's queue
// was found to be the same: words on a queue that was made anew could hit another message of the same number.
func (h *held) say(l *line, verb []byte) {
	h.mu.Lock()
	l.verb = verb
	h.utter(l)
	h.mu.Unlock()
}

// utter sends a line's last word. Called with mu held.
func (h *held) utter(l *line) {
	if l.stale {
		return // add has forgotten it
	}
	if !l.queue.void.Load() && (!h.verified(l.queue) || h.nc.Publish(l.reply, l.verb) != nil) {
		return
	}
	h.forget(l)
}

// forget removes a line. Called with mu held.
func (h *held) forget(l *line) {
	if h.lines[l.key] == l {
		delete(h.lines, l.key)
		h.bytes -= l.size
	}
	h.journal.done(l.reply)
}

// verified says whether a queue was looked at since the connection was last made.
func (h *held) verified(q *queue) bool { return h.nc.Stats().Reconnects == q.looked.Load() }

// marks returns those of the lines of a queue.
func (h *held) marks(q *queue) []mark {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []mark
	for k, l := range h.lines {
		if k.queue == q {
			out = append(out, mark{k.seq, l.stored})
		}
	}
	return out
}

// full says whether so much is held that no more should be pulled.
func (h *held) full() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.bytes > maxHeldBytes
}

func (h *held) len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.lines)
}

// nak is the word that gives a message back, to be had again after a delay.
func nak(delay time.Duration) []byte {
	if delay <= 0 {
		return verbNak
	}
	return append(append(slices.Clone(verbNak), ` {"delay":`...), strconv.FormatInt(int64(delay), 10)+"}"...)
}

// keep sends signs of life until ctx ends.
func (h *held) keep(ctx context.Context) {
	for {
		every := h.ackWait() / 3
		timer := time.NewTimer(every)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-h.again:
			timer.Stop()
			h.beat(0)
		case <-timer.C:
			h.beat(every / 2)
		}
	}
}

// hurry follows a new AckWait: what was early enough may be late by it.
func (h *held) hurry() {
	select {
	case h.again <- struct{}{}:
	default:
	}
}

// beat sends a sign of life for every line that is held for longer than age, and the words that could not be sent.
func (h *held) beat(age time.Duration) {
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	alive := h.nc.IsConnected()
	for _, l := range h.lines {
		switch {
		case l.verb != nil:
			h.utter(l)
		case l.queue.void.Load():
		case h.over(l):
			h.journal.done(l.reply) // it is somebody else's soon
		case now.Sub(l.pulled) >= age:
			alive = h.nc.Publish(l.reply, verbProgress) == nil && alive // or the next one, which is not far
		}
	}
	if alive {
		h.journal.alive(now, h.ackWait())
	}
}
