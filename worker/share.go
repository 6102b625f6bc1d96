package worker

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// share decides how many lines a worker may have here while few are left: not more than its part of them, so that no
// engine has hundreds in flight while another one has none.
//
// What is left of a model, in the queue and at any worker, is what its stream holds. It is spread evenly over this
// worker, those that are ready for the model and those that start; one that said that it is full counts with what it can
// take. The part is the sum over the models. Where more is left than all could take, nothing is asked and nothing
// changes. How much of its part a worker takes of which model is left open: one that serves two may take lines of the
// first that another one, which serves only that, could have had; at most as many as it has at once, for as long as
// these run.
//
// Nobody waits for a worker that does not come for its part. A worker looks again after a brief gap, then after twice as
// long, and so on up to longGap; from then on each look lets it take a quarter more, until it finds the queue empty.
//
// Who is there is read from the heartbeats in the bucket WORKERS, the more rarely the more there are: what is read, by
// all of n workers, grows with n and not with its square. Nobody waits for a reading but the first lines of a worker.
// All of this is of the feeder alone, but for the reading itself.
type share struct {
	js    jetstream.JetStream
	id    string
	began time.Time // of the worker

	longGap time.Duration // see the constant

	peers map[string]peer // other workers, by id, as they were read last
	read  time.Time       // when that reading was begun
	found chan census     // what one that is under way will find; nil: none is
	tried bool            // one was ended
	fails int             // in a row
	over  chan struct{}   // closed when the last reading is over
	nudge func()          // has the feeder look again

	left   int           // lines, at the last look
	last   time.Time     // of that look
	next   time.Time     // when to look again; zero: more is left than can be taken
	gap    time.Duration // from turned on nobody is waited for after it
	turned time.Time
	extra  int // lines beyond its part that nobody else came for
}

// peer is another worker as its last heartbeat told.
type peer struct {
	models []string
	wants  bool // lines: it is ready, or starts
	starts bool // its engine, or its queues, were not ready yet
	full   bool // it had nearly as much in flight as it may
	most   int  // lines that it may have
}

const (
	leastShare  = 2                      // lines that a worker may have whatever is left
	firstGap    = 20 * time.Millisecond  // between the first looks, at least
	gapPerPeer  = time.Millisecond       // and for each other worker: together they ask a thousand times a second at most
	longGap     = 500 * time.Millisecond // what nobody has come for in so long others may take
	readPerPeer = 100 * time.Millisecond // between two readings, for each heartbeat: a worker reads ten a second at most
	readAtFirst = 100 * time.Microsecond // at first: n workers that begin together read ten thousand a second
	readRarely  = 5                      // times as long while more is left than all could take
	peerLife    = 3 * beatEvery          // a worker whose heartbeat is so much older than another one is gone
	startLife   = 5 * time.Minute        // an engine that is not ready after that is not waited for
	fresh       = 5 * time.Second        // for so long it is believed what a message said of its queue
	mostModels  = 16                     // of a worker; with more of them it would ask too much
	leftTimeout = 2 * time.Second        // of a question to the broker
	readTimeout = 10 * time.Second       // of a reading
	readAgain   = time.Minute            // at the latest, after readings that failed
)

// census is what a reading of the heartbeats found.
type census struct {
	beats []jetstream.KeyValueEntry
	err   error
}

// begin has the heartbeats read where that was long ago.
func (s *share) begin(ctx context.Context, now time.Time, much bool) {
	if s.found != nil || now.Sub(s.read) < s.believed(now, much) {
		return
	}
	found, over := make(chan census, 1), make(chan struct{})
	s.read, s.found, s.over = now, found, over
	go func() {
		defer close(over)
		ctx, cancel := context.WithTimeout(ctx, readTimeout)
		defer cancel()
		beats, err := broker.Heartbeats(ctx, s.js)
		found <- census{beats, err}
		s.nudge()
	}()
}

// learn takes in what a reading found that has ended, and says whether a worker wants lines that did not before. Where the
// heartbeats cannot be read, nobody is known.
func (s *share) learn() (anew bool) {
	var r census
	select {
	case r = <-s.found:
	default:
		return false
	}
	s.found, s.tried = nil, true
	if r.err != nil {
		s.fails++
		clear(s.peers)
		return false
	}
	s.fails = 0
	var newest time.Time
	for _, e := range r.beats {
		if e.Created().After(newest) {
			newest = e.Created()
		}
	}
	was := s.peers
	s.peers = make(map[string]peer, len(r.beats))
	for _, e := range r.beats {
		if newest.Sub(e.Created()) <= peerLife {
			anew = s.hear(e.Key(), e.Value(), was[e.Key()]) || anew
		}
	}
	return anew
}

// end waits until nothing is read any more.
func (s *share) end() {
	if s.over != nil {
		<-s.over
	}
}

// believed is for how long what was read of others is believed. While this worker is new, others may be, too.
func (s *share) believed(now time.Time, much bool) time.Duration {
	n := time.Duration(len(s.peers))
	d := max(beatEvery, n*readPerPeer)
	if much {
		d *= readRarely
	}
	d = min(d, max(n*n*readAtFirst, now.Sub(s.began)/8))
	if s.fails > 0 {
		d = max(d, min(beatEvery<<min(s.fails, 10), readAgain))
	}
	return d
}

// hear takes in a heartbeat, and says whether the worker wants lines and did not before.
func (s *share) hear(id string, record []byte, was peer) (anew bool) {
	var w proto.Worker
	if id == s.id || w.Decode(record) != nil {
		return false
	}
	is := peer{models: w.Models, starts: starts(&w), full: w.InFlight > 0 && 16*w.InFlight >= 15*w.Limit, most: ready(int(w.Limit))}
	is.wants = is.starts || w.State == proto.EngineReady
	s.peers[id] = is
	return is.wants && !was.wants
}

// starts says whether a worker is likely to be ready soon.
func starts(w *proto.Worker) bool {
	switch w.State {
	case proto.EngineWaiting:
		return w.LoadUS == 0 && w.UptimeUS < startLife.Microseconds()
	case proto.EngineReady, proto.EngineNoQueue:
		return len(w.Models) == 0 && w.UptimeUS < startLife.Microseconds()
	}
	return false
}

// of says whether a worker wants lines of a model. Nobody knows yet what one will serve that starts.
func (p *peer) of(model string) bool {
	return p.wants && (p.starts && len(p.models) == 0 || slices.Contains(p.models, model))
}

// others is with how many workers what is left of some models is shared.
func (s *share) others(models []string) (n int) {
	for _, p := range s.peers {
		if slices.ContainsFunc(models, p.of) {
			n++
		}
	}
	return n
}

// part is how many lines of a model are for this worker, of so many that are left.
func (s *share) part(model string, left int) float64 {
	hungry, full := 1, []int(nil)
	for _, p := range s.peers {
		switch {
		case !p.of(model):
		case p.full:
			full = append(full, p.most)
		default:
			hungry++
		}
	}
	return level(left, hungry, full)
}

// due says whether it is time to look again, though nothing has happened here.
func (s *share) due(now time.Time) bool { return !s.next.IsZero() && !now.Before(s.next) }

// looked says whether the last look is so fresh that another one is not worth a question to the broker.
func (s *share) looked(now time.Time) bool {
	return !s.next.IsZero() && now.Sub(s.last) < s.brief() && !s.due(now)
}

// brief is the least time between two looks.
func (s *share) brief() time.Duration {
	return max(firstGap, time.Duration(len(s.peers))*gapPerPeer)
}

// wait is how long to wait for the next look.
func (s *share) wait(now time.Time) time.Duration {
	if s.next.IsZero() {
		return pullExpiry
	}
	return max(0, min(s.next.Sub(now), pullExpiry))
}

// look returns how many lines may be here of what is left, where most are as many as the limit allows, and so many are here.
// 0: as many as the limit allows.
func (s *share) look(ctx context.Context, now time.Time, taps []*queue, most, here int) int {
	var models []string
	behind := 0
	for _, q := range taps {
		behind += q.behind(now)
		if !slices.Contains(models, q.model) {
			models = append(models, q.model)
		}
	}
	switch {
	case len(models) > mostModels:
		return s.free()
	case behind == 0 && here == 0: // the first line to come tells whether there are more
		s.free()
		s.next = now
		return leastShare
	}
	much := func() bool { return behind >= 2*(s.others(models)+1)*most }
	anew := s.learn()
	s.begin(ctx, now, much())
	switch {
	case !s.tried && !much(): // who is there is known in a moment
		s.next = now.Add(firstGap)
		return leastShare
	case s.others(models) == 0 || much():
		return s.free()
	}
	left, mine, err := s.ask(ctx, models)
	if err != nil {
		return s.free()
	}
	part := max(leastShare, int(math.Ceil(mine)))
	if anew || left > 2*s.left || part >= most {
		s.gap, s.extra = 0, 0 // what is new others see now, too
	}
	s.left, s.last = left, now
	switch {
	case part >= most: // the limit may grow
		s.next = now.Add(s.longGap)
		return part
	case s.gap == 0 || now.Sub(s.turned) >= s.gap:
		if s.gap >= s.longGap {
			s.extra += max(leastShare, (part+s.extra)/4)
		}
		s.gap, s.turned = min(max(2*s.gap, s.brief()), s.longGap), now
	}
	s.next = s.turned.Add(s.gap)
	return part + s.extra
}

// free lets go of the share.
func (s *share) free() int {
	s.left, s.gap, s.next, s.extra = 0, 0, time.Time{}, 0
	return 0
}

// empty takes note that there is nothing in the queues that others could have left.
func (s *share) empty() { s.extra = 0 }

// ask returns how many lines are left of some models, in their queues and at workers, and how many are for this one.
func (s *share) ask(ctx context.Context, models []string) (left int, mine float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, leftTimeout)
	defer cancel()
	for _, m := range models {
		stream, err := s.js.Stream(ctx, proto.RequestStream(m))
		if err != nil {
			return 0, 0, fmt.Errorf("ask what is left of %s: %w", m, err)
		}
		n := int(stream.CachedInfo().State.Msgs)
		left, mine = left+n, mine+s.part(m, n)
	}
	return left, mine, nil
}

// level spreads lines evenly over those that are hungry and those that are full with so many each, and returns how many
// one gets that is hungry; of these there is one at least.
func level(lines, hungry int, full []int) float64 {
	slices.Sort(full)
	n := hungry + len(full)
	for _, most := range full {
		if most*n >= lines {
			break
		}
		lines, n = lines-most, n-1
	}
	return float64(lines) / float64(n)
}
