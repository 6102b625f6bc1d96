package producer

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/synadia-io/orbit.go/jetstreamext"

	"millrace/broker"
	"millrace/proto"
)

// callTimeout bounds every question to the broker.
const callTimeout = 5 * time.Second

// queue is the requests of one job for one model, at the broker. One goroutine uses it at a time.
type queue struct {
	conn    *broker.Conn
	declare broker.Declarer
	metrics *metrics
	job     string
	model   string
	subject string // where its requests go
	filter  string // what finds them, in all lanes

	stream  jetstream.Stream // nil until it is declared
	ackWait time.Duration    // of the consumers, the longest; anyone may change it meanwhile
	pub     publisher
	depth   int64     // requests there, when last looked
	stuck   time.Time // since when the stream holds requests that its consumer will never hand out; zero: it does not
}

func newQueue(c *broker.Conn, d broker.Declarer, m *metrics, job *proto.Job, model string) *queue {
	lane := proto.Lane(job.Lane)
	if lane == "" {
		lane = proto.LaneNormal
	}
	return &queue{conn: c, declare: d, metrics: m, job: job.ID, model: model, pub: publisher{conn: c},
		subject: proto.RequestSubject(model, lane, job.ID), filter: proto.RequestFilter(model, job.ID)}
}

// level is what a look at a queue shows.
type level struct {
	depth int64  // requests of the job, those that workers hold included
	bytes int64  // of the stream, all jobs
	most  int64  // bytes that the stream may have; 0 or less: any
	first uint64 // sequence of the stream's first message, any job's
	lanes []string
}

// open declares the queue where it is not there.
func (q *queue) open(ctx context.Context) error {
	if q.stream != nil {
		return nil
	}
	if err := q.declare.Model(ctx, q.model); err != nil {
		return err
	}
	s, err := q.conn.JS.Stream(ctx, proto.RequestStream(q.model))
	if err != nil {
		return fmt.Errorf("look up the queue of %s: %w", q.model, err)
	}
	c, err := s.Consumer(ctx, strings.Split(q.subject, ".")[2])
	if err != nil {
		return fmt.Errorf("look up the consumer of %s: %w", q.model, err)
	}
	q.ackWait = c.CachedInfo().Config.AckWait
	q.pub.choose(s.CachedInfo().Config)
	q.stream = s
	return nil
}

// look asks how full the queue is. A queue that is gone is declared anew.
func (q *queue) look(ctx context.Context) (level, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := q.open(ctx); err != nil {
		return level{}, err
	}
	info, err := q.stream.Info(ctx, jetstream.WithSubjectFilter(q.filter))
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		q.stream = nil
		if err := q.open(ctx); err != nil {
			return level{}, err
		}
		info, err = q.stream.Info(ctx, jetstream.WithSubjectFilter(q.filter))
	}
	if err != nil {
		return level{}, fmt.Errorf("look at the queue of %s: %w", q.model, err)
	}
	l := level{bytes: int64(info.State.Bytes), most: info.Config.MaxBytes, first: info.State.FirstSeq}
	for subject, n := range info.State.Subjects {
		l.depth += int64(n)
		l.lanes = append(l.lanes, strings.Split(subject, ".")[2])
	}
	q.metrics.deepen(q.model, l.depth-q.depth)
	return l, q.judge(ctx, l)
}

// judge notes whether what is in the queue is stuck: in the stream, but behind what its consumers believe they have
// handed out and seen acknowledged. That happens when a broker loses its last writes. It looks only while the queue
// does not move.
func (q *queue) judge(ctx context.Context, l level) error {
	still := l.depth == q.depth
	q.depth = l.depth
	if l.depth == 0 || !still {
		q.stuck = time.Time{}
		return nil
	}
	var wait time.Duration
	for _, lane := range l.lanes {
		c, err := q.stream.Consumer(ctx, lane)
		if errors.Is(err, jetstream.ErrConsumerNotFound) {
			q.stream = nil // declared anew at the next look
			return nil
		}
		if err != nil {
			return fmt.Errorf("look at consumer %s of %s: %w", lane, q.model, err)
		}
		wait = max(wait, c.CachedInfo().Config.AckWait)
		q.ackWait = wait
		behind, err := q.behind(ctx, c.CachedInfo(), lane, l.first)
		if err != nil {
			return err
		}
		if !behind {
			q.stuck = time.Time{}
			return nil
		}
	}
	if q.stuck.IsZero() {
		q.stuck = time.Now()
	}
	return nil
}

// behind says whether the consumer of a lane will never hand out what the stream holds of the job in it: it has nothing
// to hand out or handed out at all, or it counts what comes first of the job among what it is through with.
func (q *queue) behind(ctx context.Context, c *jetstream.ConsumerInfo, lane string, first uint64) (bool, error) {
	if c.NumPending == 0 && c.NumAckPending == 0 {
		return true, nil
	}
	through := c.AckFloor.Stream
	if c.NumAckPending == 0 {
		through = c.Delivered.Stream
	}
	if through < first {
		return false, nil
	}
	m, err := q.stream.GetMsg(ctx, 1, jetstream.WithGetMsgSubject(proto.RequestSubject(q.model, proto.Lane(lane), q.job)))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at the first request for %s: %w", q.model, err)
	}
	return m.Sequence <= through, nil
}

// dead says whether the queue has been stuck for as long as a worker may be silent about what it holds.
func (q *queue) dead() bool { return !q.stuck.IsZero() && time.Since(q.stuck) >= q.ackWait }

// readBytes bounds what one answer of requests brings: it must come within callTimeout.
const readBytes = 1 << 20

// requests calls each for the requests of the job in the queue from a sequence on, some at a time, and returns the
// sequence to go on from; 0: that was all.
func (q *queue) requests(ctx context.Context, from uint64, each func(*proto.Request)) (uint64, error) {
	if err := q.open(ctx); err != nil {
		return from, err
	}
	const most = 1000
	msgs, err := jetstreamext.GetBatch(ctx, q.conn.JS, proto.RequestStream(q.model), most, jetstreamext.GetBatchSeq(from),
		jetstreamext.GetBatchSubject(q.filter), jetstreamext.GetBatchMaxBytes(readBytes))
	if err != nil {
		return from, err
	}
	for m, err := range msgs {
		switch {
		case errors.Is(err, jetstreamext.ErrNoMessages):
			return 0, nil
		case errors.Is(err, nats.ErrNoResponders):
			q.stream = nil // declared anew at the next try
			return from, err
		case err != nil:
			return from, err
		}
		from = m.Sequence + 1
		if req, err := proto.DecodeRequest(m.Data); err == nil { // else its worker says so
			each(req)
		}
	}
	if err := ctx.Err(); err != nil {
		return from, err
	}
	return from, nil
}

// purge drops what the queue holds of the job.
func (q *queue) purge(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := broker.Purge(ctx, q.conn.JS, proto.RequestStream(q.model), q.filter); err != nil {
		return err
	}
	q.metrics.deepen(q.model, -q.depth)
	q.depth, q.stuck = 0, time.Time{}
	return nil
}
