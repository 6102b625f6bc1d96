package worker

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// share decides how many lines a worker may have here while few are left: not more than its part of them, so that no
// engine has hundreds in flight while another one has none.
//
// What is left, in the queue and at any worker, is what the streams of its models hold. It is spread evenly over this
// worker, those that are ready for one of its models and those that start; one that said that it is full counts with
// what it can take. Where that is more than this worker could take anyway, nothing is asked and nothing changes.
//
// Nobody waits for a worker that does not come for its part. A worker looks again after firstGap, then after twice as
// long, and so on up to longGap; from then on each look lets it take a quarter more, until it finds the queue empty.
type share struct {
	nc *nats.Conn
	js jetstream.JetStream
	id string

	longGap time.Duration // see the constant
	changed func()        // called when a worker came, or is not ready any more

	anew  atomic.Bool // one came since the last look
	mu    sync.Mutex
	peers map[string]peer // by id

	// Of the feeder alone.
	left  int           // lines, at the last look
	gap   time.Duration // between that look and the next one
	last  time.Time     // of that look
	next  time.Time     // when to look again; zero: more is left than can be taken
	extra int           // lines beyond its part that nobody else came for
}

// peer is another worker as its last heartbeat told.
type peer struct {
	models   []string
	ready    bool
	starting bool // its engine, or its queues, were not ready yet
	full     bool // it had nearly as much in flight as it may
	most     int  // lines that it may have
	heard    time.Time
}

const (
	leastShare  = 2                      // lines that a worker may have whatever is left
	firstGap    = 20 * time.Millisecond  // between the first looks
	longGap     = 500 * time.Millisecond // what nobody has come for in so long others may take
	peerLife    = 3 * beatEvery          // a worker that was not heard for so long is gone
	startLife   = 5 * time.Minute        // an engine that is not ready after that is not waited for
	fresh       = 5 * time.Second        // for so long it is believed what a message said of its queue
	mostModels  = 16                     // of a worker; with more of them it would ask too much
	leftTimeout = 2 * time.Second        // of a question to the broker
)

// open hears the heartbeats of others until the function is called that it returns.
func (s *share) open(ctx context.Context) (shut func()) {
	prefix := "$KV." + proto.WorkersBucket + "."
	sub, err := s.nc.Subscribe(prefix+"*", func(m *nats.Msg) { s.hear(strings.TrimPrefix(m.Subject, prefix), m.Data) })
	if err != nil {
		return func() {} // the connection is closed
	}
	gone := make(chan struct{})
	sub.SetClosedHandler(func(string) { close(gone) })
	ctx, cancel := context.WithTimeout(ctx, leftTimeout)
	defer cancel()
	known, err := broker.Heartbeats(ctx, s.js)
	if err == nil { // otherwise they are heard within beatEvery
		for _, e := range known {
			s.hear(e.Key(), e.Value())
		}
	}
	return func() {
		if sub.Unsubscribe() == nil {
			<-gone
		}
	}
}

// hear takes in a heartbeat. One that is empty is the last one.
func (s *share) hear(id string, record []byte) {
	var w proto.Worker
	known := len(record) > 0 && w.Decode(record) == nil
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.peers[id]
	switch {
	case id == s.id:
		return
	case !known:
		delete(s.peers, id)
	default:
		s.peers[id] = peer{models: w.Models, ready: w.State == proto.EngineReady, starting: starts(&w),
			full: 16*w.InFlight >= 15*w.Limit, most: ready(int(w.Limit)), heard: time.Now()}
	}
	switch is := s.peers[id]; {
	case is.counts() && !was.counts():
		s.anew.Store(true)
		s.changed()
	case was.counts() && !is.counts():
		s.changed()
	}
}

// counts says whether a worker wants lines.
func (p *peer) counts() bool { return p.ready || p.starting }

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

// others counts the workers with whom what is left of some models is shared: those that want as much as they can get,
// and what those can take that are full.
func (s *share) others(models []string, now time.Time) (hungry int, full []int) {
	ours := func(m string) bool { return slices.Contains(models, m) }
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, p := range s.peers {
		switch {
		case now.Sub(p.heard) > peerLife:
			delete(s.peers, id)
		case p.starting && len(p.models) == 0: // nobody knows yet what it will serve
			hungry++
		case !p.counts() || !slices.ContainsFunc(p.models, ours):
		case p.full:
			full = append(full, p.most)
		default:
			hungry++
		}
	}
	return hungry, full
}

// due says whether it is time to look again, though nothing has happened here.
func (s *share) due(now time.Time) bool {
	return !s.next.IsZero() && !now.Before(s.next) || s.anew.Load()
}

// looked says whether the last look is so fresh that another one is not worth a question to the broker.
func (s *share) looked(now time.Time) bool {
	return !s.next.IsZero() && now.Sub(s.last) < firstGap && !s.due(now)
}

// wait is how long to wait for the next look.
func (s *share) wait(now time.Time) time.Duration {
	if s.next.IsZero() {
		return pullExpiry
	}
	return max(0, min(s.next.Sub(now), pullExpiry))
}

// look returns how many lines may be here of what is left, where most are as many as the limit allows. 0: all of these.
func (s *share) look(ctx context.Context, taps []*queue, most int) int {
	now := time.Now()
	anew := s.anew.Swap(false)
	var models []string
	behind := 0
	for _, q := range taps {
		behind += q.behind(now)
		if !slices.Contains(models, q.model) {
			models = append(models, q.model)
		}
	}
	hungry, full := s.others(models, now)
	if all := hungry + len(full) + 1; all == 1 || len(models) > mostModels || behind >= 2*all*most {
		return s.free()
	}
	left, err := s.ask(ctx, models)
	if err != nil {
		return s.free()
	}
	part := max(leastShare, level(left, hungry+1, full))
	if anew || left > 2*s.left || part >= most {
		s.gap, s.extra = 0, 0 // what is new others see now, too
	}
	due := s.due(now)
	s.left, s.last = left, now
	switch {
	case part >= most: // the limit may grow
		s.next = now.Add(s.longGap)
	case s.gap == 0 || due:
		if s.gap >= s.longGap {
			s.extra += max(leastShare, (part+s.extra)/4)
		}
		s.gap = min(max(2*s.gap, firstGap), s.longGap)
		s.next = now.Add(s.gap)
	}
	return part + s.extra
}

// free lets go of the share.
func (s *share) free() int {
	s.left, s.gap, s.next, s.extra = 0, 0, time.Time{}, 0
	return 0
}

// empty takes note that there is nothing in the queues that others could have left.
func (s *share) empty() { s.extra = 0 }

// ask returns how many lines are left of some models, in their queues and at workers.
func (s *share) ask(ctx context.Context, models []string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, leftTimeout)
	defer cancel()
	left := 0
	for _, m := range models {
		stream, err := s.js.Stream(ctx, proto.RequestStream(m))
		if err != nil {
			return 0, fmt.Errorf("ask what is left of %s: %w", m, err)
		}
		left += int(stream.CachedInfo().State.Msgs)
	}
	return left, nil
}

// level spreads lines evenly over those that are hungry and those that are full with so many each, and returns how many
// one gets that is hungry; of these there is one at least.
func level(lines, hungry int, full []int) int {
	slices.Sort(full)
	n := hungry + len(full)
	for _, most := range full {
		if most*n >= lines {
			break
		}
		lines, n = lines-most, n-1
	}
	return (lines + n - 1) / n
}
