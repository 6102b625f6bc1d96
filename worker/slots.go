package worker

import (
	"context"
	"math"
	"slices"
	"sync"
	"time"

	"millrace/proto"
)

// slots runs lines, at most limit at once, and keeps a few more ready so that a slot never waits for the broker.
//
// The rule for lines that may have killed an engine (their Suspicions count the deaths at which they were in
// flight): with one suspicion at most √limit of them run at once, so that a second death casts suspicion on few; as
// many more are kept here for their turn, the rest goes back to the queue for a while. From two suspicions on a line
// runs alone: nothing is started until the engine is empty, then it, then the next. If the engine dies even so, the
// line is the cause (see settle).
type slots struct {
	run  func(*line) // runs one attempt; returns when the slot is free
	back func(*line) // gives a suspect back for which there is no room
	more func()      // is called, holding no lock, when there is room for a chunk of lines

	wg      sync.WaitGroup // lines at runners, or on their way back
	runners sync.WaitGroup

	mu       sync.Mutex
	limit    int
	trial    bool // what is started now tries the engine
	full     fullness
	ready    fifo
	doubted  fifo // lines with one suspicion for which there is no room among the suspects
	alone    fifo // lines with two suspicions or more
	running  map[*line]struct{}
	suspects int  // running lines with a suspicion
	single   bool // the one running line runs alone
	away     int  // lines that wait for their retry

	// parked are the ways to runners without a line; the one that ran last comes last. A new one costs more: it grows
	// its stack anew. They wait until end.
	parked []chan *line
	ended  bool
}

// fifo is a queue of lines.
type fifo struct {
	lines []*line
	head  int
}

func (f *fifo) len() int { return len(f.lines) - f.head }

func (f *fifo) push(l *line) { f.lines = append(f.lines, l) }

func (f *fifo) pop() *line {
	l := f.lines[f.head]
	f.lines[f.head] = nil
	f.head++
	if f.head == len(f.lines) {
		f.lines, f.head = f.lines[:0], 0
	}
	return l
}

// take removes and returns the lines that match.
func (f *fifo) take(match func(*line) bool) []*line {
	var out, rest []*line
	for _, l := range f.lines[f.head:] {
		if match(l) {
			out = append(out, l)
		} else {
			rest = append(rest, l)
		}
	}
	f.lines, f.head = rest, 0
	return out
}

// setLimit changes how many lines may run; 0 starts no more. A trial is a line that tries an engine.
func (s *slots) setLimit(n int, trial bool) {
	s.mu.Lock()
	s.limit, s.trial = n, trial
	s.fill()
	s.full.see(time.Now(), len(s.running), s.usual())
	s.mu.Unlock()
	s.more()
}

// offer takes a line to run it when there is a slot.
func (s *slots) offer(l *line) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.poisonous() {
		s.alone.push(l)
	} else {
		s.ready.push(l)
	}
	s.fill()
}

// fill starts lines while there are slots. Called with mu held.
func (s *slots) fill() {
	for l := s.pick(); l != nil; l = s.pick() {
		s.wg.Add(1)
		if n := len(s.parked) - 1; n >= 0 {
			s.parked[n] <- l // it has room for one
			s.parked = s.parked[:n]
			continue
		}
		s.runners.Go(func() { s.runner(l) })
	}
}

// end lets the runners go. All lines have ended.
func (s *slots) end() {
	s.mu.Lock()
	s.ended = true
	for _, in := range s.parked {
		close(in)
	}
	s.parked = nil
	s.mu.Unlock()
	s.runners.Wait()
}

// pick chooses the next line to run and counts it as running. Called with mu held.
func (s *slots) pick() *line {
	if s.single || len(s.running) >= s.limit {
		return nil
	}
	if s.alone.len() > 0 {
		if len(s.running) > 0 {
			return nil // until the engine is empty
		}
		s.single = true
		return s.start(s.alone.pop())
	}
	return s.pickNext()
}

// pickNext chooses among the lines that may run beside others. Called with mu held.
func (s *slots) pickNext() *line {
	most := s.suspectLimit()
	if s.suspects < most && s.doubted.len() > 0 {
		return s.start(s.doubted.pop())
	}
	for s.ready.len() > 0 {
		l := s.ready.pop()
		switch {
		case !l.suspect() || s.suspects < most:
			return s.start(l)
		case s.doubted.len() < most:
			s.doubted.push(l)
		default:
			s.wg.Add(1)
			go func() {
				defer s.wg.Done()
				s.back(l)
			}()
		}
	}
	return nil
}

func (s *slots) suspectLimit() int { return max(1, int(math.Sqrt(float64(s.limit)))) }

func (s *slots) start(l *line) *line {
	if s.running == nil {
		s.running = make(map[*line]struct{})
	}
	s.running[l] = struct{}{}
	l.started, l.alone, l.trial = time.Now(), s.single, s.trial
	l.pace = proto.Pace{Limit: int64(s.usual()), FullUS: s.full.upTo(l.started).Microseconds()}
	s.full.see(l.started, len(s.running), s.usual())
	l.ctx, l.cancel = context.WithCancelCause(context.Background())
	if l.suspect() {
		s.suspects++
	}
	return l
}

// runner runs lines, one after another, and waits where there is none for its slot.
func (s *slots) runner(l *line) {
	in := make(chan *line, 1)
	for l != nil {
		s.run(l)
		if l = s.next(l, in); l == nil {
			s.wg.Done()
			l = <-in // nil: it was closed
		}
	}
}

// next ends a line's stay in its slot and returns the line that goes on in it. Where there is none, the next one comes
// through in.
func (s *slots) next(l *line, in chan *line) *line {
	l.cancel(nil)
	s.mu.Lock()
	delete(s.running, l)
	if l.suspect() {
		s.suspects--
	}
	s.single = false
	n := s.pick()
	if n == nil {
		s.full.see(time.Now(), len(s.running), s.usual())
	}
	switch {
	case n != nil:
	case s.ended:
		close(in)
	default:
		s.parked = append(s.parked, in)
	}
	room := s.roomLocked()
	chunk := s.chunk()
	s.mu.Unlock()
	if room >= chunk {
		s.more()
	}
	return n
}

// chunk is how many lines are worth a pull: one by one they cost fifty times as much.
func (s *slots) chunk() int { return max(1, s.limit/16) }

// room is how many more lines may be pulled: enough to fill the slots, and an eighth to have ready. Lines that wait
// for a retry take no room until there are as many as slots, or manyAway: then the engine is sick, and more would not help.
func (s *slots) room() (room, chunk int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.roomLocked(), s.chunk()
}

func (s *slots) roomLocked() int {
	if s.single || s.alone.len() > 0 {
		return 0
	}
	return s.limit + s.limit/8 - len(s.running) - s.ready.len() - max(0, s.away-max(s.limit, manyAway))
}

// manyAway is how many lines may wait for a retry at an engine of few slots. They wait for seconds, which a slot that is
// free should not do.
const manyAway = 64

// step away and come back are the two ends of a line's wait for its retry.
func (s *slots) stepAway(n int) {
	s.mu.Lock()
	s.away += n
	room, chunk := s.roomLocked(), s.chunk()
	s.mu.Unlock()
	if n < 0 && room >= chunk {
		s.more()
	}
}

// takeReady removes the lines that match and have not been started.
func (s *slots) takeReady(match func(*line) bool) []*line {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Concat(s.ready.take(match), s.doubted.take(match), s.alone.take(match))
}

// abort makes the running lines that match come back with a cause.
func (s *slots) abort(cause error, match func(*line) bool) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for l := range s.running {
		if match(l) {
			l.cancel(cause)
			n++
		}
	}
	return n
}

// older says whether a line runs that was started before a time.
func (s *slots) older(than time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.running {
		if l.started.Before(than) {
			return true
		}
	}
	return false
}

// usual is the limit, or 0 while the engine gets none but lines that try it. Called with mu held.
func (s *slots) usual() int {
	if s.trial {
		return 0
	}
	return s.limit
}

// wasFull is for how long nearly as much was in flight as might be.
func (s *slots) wasFull() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.full.upTo(time.Now())
}

// inFlight is how many lines run.
func (s *slots) inFlight() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.running)
}
