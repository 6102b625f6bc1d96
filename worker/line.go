package worker

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"millrace/proto"
)

// line is a request from the moment it is pulled until it is acknowledged or given back. One goroutine at a time
// owns it, and only its owner acknowledges it: the slots while it waits, its runner while it runs, the outbox while
// its result is on the way.
type line struct {
	req     *proto.Request
	subject string // it came on this, and a retry goes back on it, so that it keeps its lane
	key     key
	queue   *queue
	size    int
	asks    demand // what its body asks for
	pulled  time.Time
	stored  time.Time // by the broker; see mark
	alone   bool      // it runs while nothing else does
	excused bool      // if the engine died of its last attempt, others are to blame; see slots.lost
	trial   bool      // it was let through to an engine that may not be well, to try it

	deliveries uint64 // of the message, this one included

	ctx     context.Context // ends when the line is to be let go of, or its time is over; set when it is started
	cancel  context.CancelCauseFunc
	started time.Time    // of the attempt
	pace    proto.Pace   // as it was then
	until   atomic.Int64 // Unix ns after which the attempt is overdue, and the line not kept any more; 0: it is not at the engine

	// reply is where acknowledgements go, verb the last word on the message where it could not be sent yet.
	// stale is set when another message has its number: there is nothing more to say on it. Guarded by held.mu.
	reply string
	verb  []byte
	stale bool
}

// key is the same for all deliveries of a message.
type key struct {
	queue *queue
	seq   uint64
}

// newLine reads a message. The error says what is wrong with the record in it; the line can be given back all
// the same, unless it is nil.
func newLine(m *nats.Msg, q *queue, now time.Time) (*line, error) {
	meta, err := m.Metadata()
	if err != nil {
		return nil, err
	}
	l := &line{subject: m.Subject, key: key{q, meta.Sequence.Stream}, queue: q, size: len(m.Data), pulled: now, stored: meta.Timestamp,
		reply: m.Reply, deliveries: meta.NumDelivered}
	q.pending.Store(int64(meta.NumPending))
	q.heard.Store(int64(now.Sub(born)))
	l.req, err = proto.DecodeRequest(m.Data)
	return l, err
}

// equals says whether two deliveries under one number are of one message.
func (l *line) equals(m *line) bool {
	if l.req == nil || m.req == nil {
		return l.req == m.req && l.size == m.size
	}
	return l.req.Job == m.req.Job && l.req.Index == m.req.Index && l.req.Suspicions == m.req.Suspicions && l.req.Doubted == m.req.Doubted &&
		len(l.req.Attempts) == len(m.req.Attempts)
}

// timeouts counts the attempts that ended because the engine took too long.
func (l *line) timeouts() int {
	n := 0
	for i := range l.req.Attempts {
		if l.req.Attempts[i].Code == proto.CodeRequestTimeout {
			n++
		}
	}
	return n
}

// rank is how much a line is suspected of killing engines: 0 not at all, at most mostRank.
func (l *line) rank() int { return int(min(max(l.req.Suspicions, 0), mostRank)) }

// guilty is how many deaths a line is blamed for until it is the cause, at two of them alone: what two engines die of may
// be chance.
const guilty = 4

// stubborn says that a message was given back so often that it may be its line that is wrong.
func (l *line) stubborn() bool { return l.deliveries >= 30 }

// pause is for how long a line is given back that the engine refused, in units of u: longer and longer, up to 64.
func (l *line) pause(u time.Duration) time.Duration {
	return jitter(u << min(max(l.deliveries, 1)-1, 6))
}

// rest is for how long a line waits after its n-th charged attempt, in units of u: a half, four times as long each time,
// up to 8. A fault of a few seconds must not use up all attempts, and the last line of a job should not wait for long.
func rest(n int, u time.Duration) time.Duration {
	return jitter(u / 2 << (2 * min(max(n-1, 0), 2)))
}

// overdue is how long after its time a line at the engine is still kept.
const overdue = time.Minute

// over says whether a line is at the engine for longer than can be.
func (l *line) over() bool {
	u := l.until.Load()
	return u != 0 && time.Now().UnixNano() > u
}
