package worker

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// outcome is how one attempt at a line went.
type outcome struct {
	*line
	verdict
	answer Answer
	took   time.Duration
}

// attempt runs a line once and does what follows. When it returns, the line's slot is free.
func (s *session) attempt(l *line) {
	if s.unwanted(l) {
		return
	}
	s.journal.write()
	l.pace.Before, l.pace.Metered = s.meter.preempted()
	timeout := s.timeout(l)
	l.until.Store(l.started.Add(timeout + overdue).UnixNano())
	timer := time.AfterFunc(timeout, func() { l.cancel(context.DeadlineExceeded) }) // a context of its own costs more
	a, err := s.Engine.Do(l.ctx, l.req)
	timer.Stop()
	l.until.Store(0)
	took := time.Since(l.started)
	broker.CrashPoint("worker.after-engine")
	l.excused = (err != nil || a.Status >= http.StatusInternalServerError) && s.slots.lost(l)
	if cause := context.Cause(l.ctx); err != nil && cause != nil && !errors.Is(cause, context.DeadlineExceeded) {
		s.interrupted(l, cause)
		return
	}
	if err == nil {
		s.metrics.seconds.WithLabelValues(l.queue.model).Observe(took.Seconds())
	}
	v := classify(l.req.URL, a, err)
	if v.class == classDone {
		v = v.against(l.asks, l.req.URL)
	}
	s.settle(&outcome{line: l, verdict: v, answer: a, took: took})
}

// said is what the engine said, in short.
func (o *outcome) said() string {
	status := fmt.Sprintf("HTTP %d", o.answer.Status)
	if o.answer.Status == 0 || o.class == classBroken || strings.HasPrefix(o.message, status) {
		return o.message
	}
	return status + ": " + o.message
}

// timeout is the time for one attempt. A line that took too long once gets twice the time.
func (s *session) timeout(l *line) time.Duration {
	d := s.RequestTimeout
	if l.req.TimeoutMS > 0 {
		d = time.Duration(l.req.TimeoutMS) * time.Millisecond
	}
	if l.timeouts() > 0 {
		d *= 2
	}
	return d
}

// interrupted deals with a line whose attempt was broken off from this side.
func (s *session) interrupted(l *line, cause error) {
	switch {
	case errors.Is(cause, errCancelled):
		s.end(l)
	case errors.Is(cause, errHung):
		s.hung(l)
	case errors.Is(cause, errGone):
		s.suspect(l, "the engine went away while it had this line")
	default:
		s.giveBack(l, 0, "stopped")
	}
}

// settle does what follows from an attempt.
func (s *session) settle(o *outcome) {
	if o.class != classBroken { // it may be the engine's death, see there
		s.gate.note(o)
	}
	if o.class != classDone {
		s.meter.failed(o.said())
	}
	switch o.class {
	case classDone:
		s.done(o)
	case classPermanent:
		s.blame(o)
		s.fail(o)
	case classRetry:
		if s.gate.diedSince(o.started) && o.mayBeDeath() {
			s.died(o)
			return
		}
		s.blame(o)
		s.retry(o)
	case classTimeout:
		if s.gate.stood(o.started) {
			s.hung(o.line)
			return
		}
		s.retry(o)
	case classBusy, classLost, classDenied:
		s.refuse(o)
	case classUnreached:
		s.unreached(o)
	case classDead:
		s.died(o)
	case classNoModel:
		s.away(func() { s.noModel(o) })
	case classBroken:
		s.away(func() { s.broken(o) })
	}
}

// refuse deals with a line that the engine did not take for no fault of the line: it is not charged. But when others
// are answered all the while and this one never is, it is the line after all.
func (s *session) refuse(o *outcome) {
	if o.stubborn() && s.gate.answered(time.Minute) {
		if o.code == "" {
			o.code = proto.CodeEngineError
		}
		s.retry(o)
		return
	}
	rest := o.pause(s.refusal)
	if s.gate.answered(time.Minute) { // it is not down: lines that it refuses by chance should not wait for a minute
		most := 8 * s.refusal
		if 2*s.slots.inFlight() < s.limit.Get() { // nor where it has little else to do, as at the end of a job
			most = 2 * s.refusal
		}
		rest = min(rest, jitter(most))
	}
	rest = max(o.delay, rest)
	switch o.class {
	case classBusy:
		s.limit.Refused(time.Now())
		s.gate.refused(o.said(), rest)
		s.adjust()
	case classLost:
		s.gate.refused(o.said(), rest)
	case classDenied:
		s.gate.close(tripDenied, proto.EngineDenied, denial(s.Engine, o.answer.Status, o.message))
	}
	s.giveBack(o.line, rest, reasonOf(o.class))
}

// reasonOf names a class in metrics.
func reasonOf(c class) string {
	switch c {
	case classBusy:
		return "busy"
	case classLost:
		return "aborted"
	case classDenied:
		return "denied"
	case classNoModel:
		return "no-model"
	}
	return "engine"
}

func (s *session) finished(o *outcome) {
	s.gate.success(o.started)
	if s.Answered != nil {
		s.Answered.Add(1)
	}
	s.limit.Finished(o.usage, len(o.req.Body), o.asks.wish(), o.took, time.Now())
	s.metrics.answered(o.queue.model, o.usage)
	s.meter.answered(o.usage)
	s.publish(o.line, s.result(o))
}

// blame tells the gate of an error. An answer that is only too long is no fault of the engine.
func (s *session) blame(o *outcome) {
	if o.code == proto.CodeResponseTooLarge {
		s.gate.success(o.started)
		return
	}
	s.gate.failed(o)
}

// fail ends a line by an error, unless the error turns out to be the engine's: then others may have the line. While
// that is open, the line takes no slot; see doubt for how many these can be.
func (s *session) fail(o *outcome) {
	d := s.gate.doubt(o.same, o.started)
	if d == nil {
		s.publish(o.line, s.result(o))
		return
	}
	s.waits.Go(func() {
		switch {
		case !s.gate.believe(s.taking, d, s.grace):
			s.giveBack(o.line, o.pause(s.refusal), "degraded")
		case !s.elsewhere(o):
			s.publish(o.line, s.result(o))
		}
	})
}

// result makes the record of how a line ended.
func (s *session) result(o *outcome) *proto.Result {
	_, _, _, loaded := s.gate.view()
	r := &proto.Result{
		Job: o.req.Job, Index: o.req.Index, CustomID: o.req.CustomID, Model: o.req.Model, URL: o.req.URL,
		OK: o.class == classDone, ContextCut: o.cut, Status: int64(o.answer.Status), RequestID: o.id, Body: o.answer.Body,
		Code: o.code, Message: o.message, Finish: o.finish, Usage: o.usage, Attempts: o.req.Attempts,
		Worker: s.id, StartUS: o.started.Sub(s.began).Microseconds(), DurationUS: o.took.Microseconds(), LoadUS: loaded.Microseconds(),
		Pace: o.pace, Run: o.req.Run,
	}
	r.Pace.After, _ = s.meter.preempted()
	if o.class == classBroken || o.class == classTimeout || !r.OK && r.Status/100 == 2 { // what came of an answer is not one
		r.Status, r.Body = 0, nil
	}
	return r
}

// publish sends a line's result; the line is acknowledged when it is stored.
func (s *session) publish(l *line, r *proto.Result) {
	data, err := r.Encode()
	switch limit := s.nc.MaxPayload(); {
	case err != nil: // msgpack writes any of our records
		s.Log.Error("cannot encode a result", "job", r.Job, "index", r.Index, "error", err)
		s.giveBack(l, 30*time.Second, "encode")
		return
	case int64(len(data))+payloadSlack > limit && r.Code != proto.CodeResponseTooLarge:
		s.publish(l, tooLarge(r, limit))
		return
	}
	p := &parcel{line: l, msg: &nats.Msg{Subject: proto.ResultSubject(r.Job), Data: data}}
	p.sent = func() { s.published(l.queue.model, r.OK, r.Code) }
	if r.Code != proto.CodeResponseTooLarge {
		p.instead = func() { s.publish(l, tooLarge(r, int64(len(data)))) }
	}
	s.outbox.send(p)
}

// payloadSlack is left free in a message.
const payloadSlack = 1 << 10

// tooLarge is what is published instead of a result that fits no message.
func tooLarge(r *proto.Result, limit int64) *proto.Result {
	t := *r
	t.OK, t.Code, t.Finish, t.ContextCut = false, proto.CodeResponseTooLarge, "", false
	t.Message = fmt.Sprintf("the answer has %d bytes and does not fit a message of %d bytes", len(r.Body), limit)
	t.Status, t.Body = 0, nil
	return &t
}

func (s *session) published(model string, ok bool, code string) {
	broker.CrashPoint("worker.after-puback")
	switch {
	case ok:
		s.ok.Add(1)
		code = "ok"
	case proto.EndedWithJob(code): // it did not fail here
	default:
		s.failed.Add(1)
	}
	s.metrics.requests.WithLabelValues(model, code).Inc()
}

// refused takes over a parcel that the broker does not take at this size.
func (s *session) refused(p *parcel) {
	if p.instead != nil {
		p.instead()
		return
	}
	s.Log.Error("broker refuses even a short result", "subject", p.msg.Subject, "bytes", len(p.msg.Data))
	s.giveBack(p.line, 30*time.Second, "refused")
}

// retry charges an attempt: the line goes back to its queue with its history, or ends by it.
func (s *session) retry(o *outcome) {
	if s.last(o) || o.class == classTimeout && o.timeouts() > 0 {
		if !o.mayBeDeath() {
			s.fail(o)
			return
		}
		s.away(func() {
			if !s.deadAfterAll(o, s.grace/6) {
				s.fail(o)
			}
		})
		return
	}
	next := s.charged(o)
	s.away(func() {
		if s.deadAfterAll(o, rest(len(next.Attempts), s.refusal)) {
			return
		}
		if isOver(s.control.want(next.Job)) {
			s.cancelled(o.line)
			return
		}
		if s.gate.condemned(o.same, o.started) {
			s.giveBack(o.line, o.pause(s.refusal), "degraded")
			return
		}
		s.metrics.retries.WithLabelValues(o.code).Inc()
		s.resend(o.line, next, func() { s.publish(o.line, s.result(o)) })
	})
}

// last says whether the line has no attempt left after this one.
func (s *session) last(o *outcome) bool {
	most := o.req.MaxAttempts
	if most <= 0 {
		most = int64(s.MaxAttempts)
	}
	return int64(len(o.req.Attempts))+1 >= most
}

// charged is a line's request with this attempt in its history.
func (s *session) charged(o *outcome) *proto.Request {
	next := *o.req
	next.Attempts = append(slices.Clone(o.req.Attempts), proto.Attempt{Worker: s.id, Code: o.code,
		Status: int64(o.answer.Status), Message: o.message, DurationUS: o.took.Microseconds()})
	return &next
}

// resend puts a line into its queue anew. A history that fits no message any more ends the line by instead.
func (s *session) resend(l *line, next *proto.Request, instead func()) {
	data, err := next.Encode()
	if err != nil {
		s.Log.Error("cannot encode a request", "job", next.Job, "index", next.Index, "error", err)
		s.giveBack(l, 30*time.Second, "encode")
		return
	}
	s.outbox.send(&parcel{line: l, msg: &nats.Msg{Subject: l.subject, Data: data}, retry: true, instead: instead,
		sent: func() { broker.CrashPoint("worker.after-republish") }})
}

// away does something with a line that takes time, while its slot is free.
func (s *session) away(do func()) {
	s.slots.stepAway(1)
	s.waits.Go(func() {
		defer s.slots.stepAway(-1)
		do()
	})
}

// wait waits for d, or until ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// end publishes how a line ended that was at the engine when its job was cancelled, or its time was over: for how long it was
// there nobody else knows.
func (s *session) end(l *line) {
	v := verdict{class: classPermanent, code: proto.CodeCancelled, message: proto.MessageCancelled}
	if s.control.want(l.req.Job) == wantEnd {
		v.code, v.message = proto.CodeExpired, proto.MessageExpired
	}
	s.publish(l, s.result(&outcome{line: l, verdict: v, took: time.Since(l.started)}))
}

// endedAfter is how long a line of a cancelled job is given back for at first: its owner is to have ended it by then.
const endedAfter = time.Minute

// cancelled gives back a line whose job is cancelled, for the owner of the input to end and to take out of the queue. Where
// that has left, whoever ends the job has the line's custom_id from there alone. While nobody does, such lines come ever more
// rarely, since what comes again stands before the lines of other jobs.
func (s *session) cancelled(l *line) {
	s.giveBack(l, endedAfter<<min(max(l.deliveries, 1)-1, 5), "cancelled")
}

// drop acknowledges a line without a result: its owner ends it, or sends it again.
func (s *session) drop(l *line, reason string) {
	s.metrics.givenBack.WithLabelValues(reason).Inc()
	s.held.say(l, verbAck)
}

// giveBack lets others have a line, after a delay; at once when this worker stops.
func (s *session) giveBack(l *line, delay time.Duration, reason string) {
	if s.taking.Err() != nil {
		delay = 0
	}
	s.metrics.givenBack.WithLabelValues(reason).Inc()
	s.held.say(l, nak(delay))
}

// apiPrefix is what the subjects of the JetStream API begin with.
func apiPrefix(o jetstream.JetStreamOptions) string {
	switch {
	case o.Domain != "":
		return "$JS." + o.Domain + ".API."
	case o.APIPrefix != "":
		return o.APIPrefix + "."
	}
	return "$JS.API."
}
