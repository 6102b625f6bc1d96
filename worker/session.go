package worker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"

	"millrace/broker"
	"millrace/proto"
	"millrace/worker/load"
)

// session is one Run of a Worker. It wires the parts together; what the parts do is in their files.
type session struct {
	*Worker
	id    string
	nc    *nats.Conn
	began time.Time

	taking   context.Context // ends when no more is to be pulled
	leave    context.CancelFunc
	stopped  context.Context // ends when everything is to be broken off
	breakOff context.CancelCauseFunc

	gate    *gate
	limit   *load.Limit
	slots   *slots
	feeder  *feeder
	queues  *queues
	held    *held
	outbox  *outbox
	control *control
	beat    *beat
	journal *journal
	metrics *metrics
	meter   meter

	waits  sync.WaitGroup // lines that are away from their slot
	ok     atomic.Int64
	failed atomic.Int64
	newer  sync.Once // says that there are records of a newer version

	adjusting sync.Mutex // the slots follow the gate in order

	mu       sync.Mutex
	unserved map[string]bool // models that the engine said it does not know, until it lists them
	foreign  string          // of what answers it was said last that they are not used; see sayForeign
	lacks    string          // why it serves none of its models; empty: it does
}

// Causes with which a line's context ends.
var (
	errStopped   = errors.New("worker was stopped")
	errCancelled = errors.New("job was cancelled")
	errHung      = errors.New("engine hangs")
	errGone      = errors.New("engine is gone")
	errClosed    = broker.ErrClosed
)

// open makes a session ready to work.
func open(w *Worker, stop context.Context) (*session, error) {
	s := &session{Worker: w, nc: w.Conn.NC, began: time.Now(), unserved: map[string]bool{}}
	s.id = workerID(w.Self)
	var err error
	if s.metrics, err = newMetrics(w.Registry); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	if w.Dir != "" {
		if s.journal, err = openJournal(w.Dir, w.Log); err != nil {
			return nil, err
		}
	}
	s.stopped, s.breakOff = context.WithCancelCause(stop)
	s.limit = load.New(w.Concurrency)
	s.feeder = newFeeder()
	s.slots = &slots{run: s.attempt, more: s.feeder.nudge}
	s.slots.back = func(l *line) { s.giveBack(l, jitter(2*time.Second), "doubted") }
	s.queues = newQueues(w.Conn.JS, w.AckWait, w.Log)
	s.queues.epoch = func() uint64 { return s.nc.Stats().Reconnects }
	s.held = &held{nc: s.nc, journal: s.journal, lines: map[key]*line{}, over: (*line).over, again: make(chan struct{}, 1),
		ackWait: s.queues.shortest}
	s.queues.marks, s.queues.found = s.held.marks, s.giveBackDead
	s.queues.seen = func() {
		s.held.beat(0)
		s.feeder.nudge()
	}
	s.queues.changed = func() {
		s.held.hurry()
		s.equip()
		s.gate.show()
		s.feeder.nudge()
		s.beat.soon() // others read there which models are served
	}
	s.outbox = &outbox{held: s.held, log: w.Log, stop: s.stopped, refuse: s.refused, missing: func() { s.queues.lost(true) },
		full: func(l *line) { s.giveBack(l, jitter(5*time.Second), "queue-full") }}
	if err := openOutbox(w.Conn.JS, s.outbox); err != nil {
		s.journal.close()
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	s.openWatchers()
	return s, nil
}

// openWatchers makes the parts that look around.
func (s *session) openWatchers() {
	missing := func() { s.queues.lost(true) }
	s.control = newControl(s.Conn.JS, s.Log)
	s.control.changed, s.control.missing = s.controlled, missing
	s.beat = &beat{js: s.Conn.JS, log: s.Log, id: s.id, record: s.record, missing: missing, kick: make(chan struct{}, 1)}
	s.gate = &gate{listed: map[string]listing{}, engine: s.Engine, keeper: s.Keeper, log: s.Log, stall: s.StallTimeout, every: s.ProbeEvery, pace: s.limit.Pace, retry: s.RetryEvery,
		kick: make(chan struct{}, 1), turn: make(chan struct{}), started: s.began,
		found: s.found, opened: s.adjust, busy: s.slots.inFlight, inside: s.slots.older, others: s.others,
		abort: func(cause error) { s.slots.abort(cause, all) }}
	f := s.feeder
	f.nc, f.queues, f.receive, f.rest, f.slots = s.nc, s.queues, s.receive, s.received, s.slots
	f.share = &share{js: s.Conn.JS, id: s.id, began: s.began, longGap: s.longGap, peers: map[string]peer{}, nudge: f.nudge}
	f.prefix = apiPrefix(s.Conn.JS.Options())
	f.crowded = func() bool { return s.outbox.crowded() || s.held.full() }
	f.open = func() bool { return s.gate.quota() != 0 }
}

func all(*line) bool { return true }

// workerID is the name of this worker: readable, and drawn anew for each session.
func workerID(self proto.Owner) string {
	id := nuid.Next()
	return proto.Slug(self.Machine(), 32) + "-" + id[len(id)-8:]
}

// work runs the session to its end.
func (s *session) work(take context.Context) error {
	defer s.journal.close()
	if e, ok := s.Engine.(interface{ CloseIdleConnections() }); ok {
		defer e.CloseIdleConnections()
	}
	defer s.metrics.watch(s)()
	s.taking, s.leave = context.WithCancel(take)
	defer s.leave()
	defer context.AfterFunc(s.stopped, s.leave)()
	defer s.breakOff(nil)

	life, end := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	for _, run := range []func(context.Context){s.gate.run, s.queues.run, s.control.run, s.beat.run, s.held.keep, s.journal.keep, s.watchBroker, s.watchGPUs} {
		parts.Go(func() { run(life) })
	}
	s.outbox.waiting.Go(s.outbox.run)
	s.feeder.run(s.taking)
	s.finish()
	end()
	parts.Wait()
	s.flush()
	if errors.Is(context.Cause(s.stopped), errClosed) {
		return fmt.Errorf("run worker: %w", s.Conn.Closed())
	}
	return nil
}

// finish lets what was started come to its end, or to an early one when stop ends.
func (s *session) finish() {
	s.gate.drain(!errors.Is(context.Cause(s.taking), context.Canceled))
	s.beat.soon()
	idle := make(chan struct{})
	go func() {
		defer close(idle)
		s.slots.wg.Wait()
		s.waits.Wait()
	}()
	select {
	case <-idle:
	case <-s.stopped.Done():
		s.slots.abort(errStopped, all)
		<-idle
	}
	s.slots.end()
	select {
	case <-s.outbox.drained():
	case <-s.stopped.Done():
		select {
		case <-s.outbox.drained():
		case <-time.After(lastGrace):
		}
	}
	s.breakOff(nil)
	if n := s.outbox.abandon(); n > 0 {
		s.Log.Warn("gave back lines whose results could not be stored", "lines", n)
	}
	for until := time.Now().Add(lastGrace); s.held.len() > 0 && time.Now().Before(until) && !s.nc.IsClosed(); {
		wait(context.Background(), 10*time.Millisecond) // until the queues are looked at again
		s.held.beat(0)
	}
}

// lastGrace is how long results that are on their way are waited for when everything is broken off.
const lastGrace = 2 * time.Second

// flush waits until the broker has all that was said to it.
func (s *session) flush() {
	if err := s.nc.FlushTimeout(5 * time.Second); err != nil && !s.nc.IsClosed() {
		s.Log.Warn("broker did not take the last words; what was held returns to its queue after the ack wait", "error", err)
	}
}

// giveBackDead gives back what a dead process of this worker's folder held of a model.
func (s *session) giveBackDead(model string, born time.Time) {
	dead := s.journal.reclaim(model, born)
	for _, reply := range dead {
		_ = s.nc.Publish(reply, verbNak) // or it comes back after AckWait
	}
	if n := len(dead); n > 0 {
		s.Log.Info("gave back requests that a dead worker held", "model", model, "requests", n)
	}
}

// watchBroker looks after everything again when the connection is back: the broker may be another one.
func (s *session) watchBroker(ctx context.Context) {
	ch := s.nc.StatusChanged(nats.CONNECTED, nats.CLOSED)
	defer s.nc.RemoveStatusListener(ch)
	if s.nc.IsClosed() {
		s.breakOff(errClosed)
	}
	for {
		select {
		case <-ctx.Done():
			return
		case st := <-ch:
			if st == nats.CLOSED {
				s.breakOff(errClosed)
				return
			}
			s.queues.check()
			s.held.beat(0)
			s.control.restart()
			s.beat.soon()
			s.feeder.nudge()
		}
	}
}

// receive takes a message in.
func (s *session) receive(m *nats.Msg, q *queue) {
	l, err := newLine(m, q, time.Now())
	if l == nil {
		s.Log.Warn("message in a queue was not delivered by JetStream, passing it over", "subject", m.Subject, "error", err)
		return
	}
	if l.deliveries > 1 {
		s.metrics.redelivered.Inc()
	}
	if !s.held.add(l) {
		s.queues.check() // we have it already: our signs of life are late, perhaps by a new AckWait
		return
	}
	switch {
	case errors.Is(err, proto.ErrNewerVersion):
		s.newer.Do(func() {
			s.Log.Warn("requests of a newer millrace are given back; upgrade this worker", "subject", m.Subject)
		})
		s.giveBack(l, 30*time.Second, "newer")
	case err != nil:
		s.metrics.undecodable.Inc()
		s.Log.Error("message is no request and is removed; the owner of the job will send the line again", "subject", m.Subject, "error", err)
		s.held.say(l, verbTerm)
	default:
		s.accept(l)
	}
}

// received is called when all messages that came are taken in.
func (s *session) received() {
	s.journal.write()
	broker.CrashPoint("worker.after-fetch")
}

// accept puts a line into the slots, unless its job is not to run.
func (s *session) accept(l *line) {
	if s.unwanted(l) {
		return
	}
	l.asks = readDemand(l.req.Body)
	moved, wake := s.limit.Expects(len(l.req.Body), l.asks.wish())
	if moved {
		s.adjust()
	}
	if wake {
		s.gate.hurry()
	}
	s.slots.offer(l)
	if s.taking.Err() != nil || s.gate.quota() == 0 {
		s.adjust()
	}
}

// unwanted lets go of a line whose job is cancelled (see cancelled) or paused (the owner sends it again, since it is
// in no queue then; given back, it would come again and again, and stand before the lines of other jobs).
func (s *session) unwanted(l *line) bool {
	switch s.control.want(l.req.Job) {
	case proto.WantCancel, wantEnd:
		s.cancelled(l)
	case proto.WantPause:
		s.drop(l, "paused")
	default:
		return false
	}
	return true
}

// controlled follows that a job is to be paused or cancelled now.
func (s *session) controlled(job, want string) {
	ours := func(l *line) bool { return l.req.Job == job }
	for _, l := range s.slots.takeReady(ours) {
		s.unwanted(l)
	}
	if !isOver(want) {
		return // what is in flight is finished
	}
	if n := s.slots.abort(errCancelled, ours); n > 0 {
		s.Log.Info("job was cancelled or its time is over, aborting its requests", "job", job, "requests", n)
	}
}

// adjust makes the slots follow the gate and the limit.
func (s *session) adjust() {
	s.adjusting.Lock()
	defer s.adjusting.Unlock()
	n, quota := s.limit.Get(), s.gate.quota()
	if quota >= 0 {
		n = min(n, quota)
	}
	if s.taking.Err() != nil {
		n = 0
	}
	s.slots.setLimit(n, s.limit.Burst(), quota == 1)
	if n == 0 {
		for _, l := range s.slots.takeReady(all) {
			s.giveBack(l, 0, "closed")
		}
	}
	s.beat.changed()
}

// found follows what a probe found of a ready engine.
func (s *session) found(st Status) {
	st.Gauges.KVTokens = s.capacity(st)
	now := time.Now()
	if s.Graphs != nil {
		st.Graphs = s.Graphs()
	}
	if s.Sequences != nil {
		st.Sequences = s.Sequences()
	}
	s.limit.Observe(st.Engine, s.slots.inFlight(), now)
	s.meter.look(st.Gauges, now)
	models := s.Models
	if models == nil {
		models = st.Models
	}
	s.mu.Lock()
	var serves, lacks []string
	for _, m := range models {
		if s.unserved[m] && !st.serves(m) {
			lacks = append(lacks, m)
			continue
		}
		delete(s.unserved, m)
		serves = append(serves, m)
	}
	s.lacks = ""
	if len(serves) == 0 {
		s.lacks = fmt.Sprintf("engine does not know %s; it serves %s; have it serve that name, or let the lines ask for one that it serves (--model)", strings.Join(lacks, ", "), strings.Join(st.Models, ", "))
	}
	s.mu.Unlock()
	s.queues.want(serves)
	s.equip()
}

// capacity is the engine's KV cache in tokens, as far as anybody knows.
func (w *Worker) capacity(st Status) int64 {
	if st.Gauges.KVTokens == 0 && w.KVTokens != nil {
		return w.KVTokens()
	}
	return st.Gauges.KVTokens
}

// equip tells the gate whether there is a model to pull for, and a queue to pull from.
func (s *session) equip() {
	s.mu.Lock()
	defer s.mu.Unlock()
	var why lack
	if s.lacks != "" {
		why = lack{proto.EngineNoModel, s.lacks}
	} else if trouble := s.queues.trouble(); trouble != "" && len(s.queues.all()) == 0 {
		why = lack{proto.EngineNoQueue, trouble}
	}
	s.gate.without(why)
}

// others asks whether another ready worker serves a model.
func (s *session) others(model string, then func(bool)) {
	s.waits.Go(func() { then(s.beat.others(s.stopped, model)) })
}

// record is what the others see of this worker.
func (s *session) record() *proto.Worker {
	state, reason, st, loaded := s.gate.view()
	if reason == "" {
		reason = s.queues.trouble()
	}
	w := &proto.Worker{
		ID: s.id, Host: s.Self.Machine(), PID: s.Self.PID, Engine: s.Engine.String(), Version: st.Version, Models: s.queues.serves(),
		State: state, Reason: reason, Limit: int64(s.limit.Get()), InFlight: int64(s.slots.inFlight()), Held: int64(s.held.len()),
		OK: s.ok.Load(), Failed: s.failed.Load(), LoadUS: loaded.Microseconds(), UptimeUS: time.Since(s.began).Microseconds(),
		KVTokens: cmp.Or(s.capacity(st), s.limit.Tokens()), MaxLen: st.MaxLen, Program: s.Program, Simulated: st.Simulated,
		LimitWhy: s.limit.Reason(), Flags: s.flags(st), Kind: st.Kind, Slots: st.Slots, Network: broker.Network(),
	}
	if s.Keeper != nil && st.Gone && st.State == proto.EngineDegraded {
		w.GivenUp = st.Reason
	}
	if len(w.Models) == 0 && (state == proto.EngineWaiting || w.GivenUp != "") {
		w.Models = s.Coming
	}
	if w.Hosted = s.Restarts != nil; w.Hosted {
		w.Restarts, w.LastRestart = s.Restarts()
	}
	if d := s.slots.doubted(); d != "" {
		w.LimitWhy += "; " + d
	}
	w.GPUs, w.OwnGPUs = s.gpus(st)
	s.meter.tell(w, st.State == proto.EngineReady, time.Now())
	return w
}
