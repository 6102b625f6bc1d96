package worker

import (
	"context"
	"fmt"
	"sync"
	"time"

	"millrace/proto"
)

// slots runs lines, at most limit at once, and keeps a few more ready so that a slot never waits for the broker.
//
// The rule for lines that may have killed an engine (their Suspicions count the deaths for which they were blamed):
//
//   - At a death those in flight with the most suspicions are blamed, and nobody else: the others are given back as they
//     are (see excused). Of lines that nobody suspected, all are.
//   - Of lines with s suspicions at most n/4^s run at once, beside others with fewer, where n is the limit, or what was in
//     flight at the first death where that is more: an engine that comes back begins with few. So each death leaves a quarter
//     of those that may be the cause. A smaller share would need fewer deaths, each of which costs a start of the engine,
//     and more rounds until all groups have had their turn; a larger one the contrary. A quarter is best where a start
//     takes about as long as a line.
//   - Where that would be less than two, a line runs alone: nothing is started until the engine is empty, then it, then
//     the next. If the engine dies even so, twice, the line is the cause (see suspect).
//
// With n in flight that is at most ⌈log4 n⌉+2 deaths, and never fewer than guilty.
//
// As many suspects as slots wait here for their turn; the rest goes back to the queue for a while.
type slots struct {
	run  func(*line) // runs one attempt; returns when the slot is free
	back func(*line) // gives a suspect back for which there is no room
	more func()      // is called, holding no lock, when there is room for a chunk of lines

	wg      sync.WaitGroup // lines at runners, or on their way back
	runners sync.WaitGroup

	mu       sync.Mutex
	limit    int
	burst    int  // lines that are started together, where so many are ready; below 2: one by one
	bursting bool // lines are started until all slots are taken
	share    int  // no more lines than these are pulled while few are left; 0: as many as the limit allows
	trial    bool // what is started now tries the engine
	full     fullness
	ready    fifo
	suspects [mostRank + 1]group // by rank; none at 0
	fell     int                 // lines that were in flight when lines of rank 0 were last lost, and no suspect was there
	running  map[*line]struct{}
	single   bool                    // the one running line runs alone
	away     int                     // lines that wait for their retry
	ranks    [mostRank + 1]time.Time // when a line of that rank last left its slot without an answer

	// parked are the ways to runners without a line; the one that ran last comes last. A new one costs more: it grows
	// its stack anew. They wait until end.
	parked []chan *line
	ended  bool
}

// group is the lines of one rank.
type group struct {
	waiting fifo
	running int
}

// mostRank is the highest rank: with so many suspicions a line runs alone at any limit.
const mostRank = 8

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

// setLimit changes how many lines may run, and how many are started together; 0 starts no more. A trial is a line that
// tries an engine.
func (s *slots) setLimit(n, burst int, trial bool) {
	s.mu.Lock()
	s.limit, s.burst, s.trial = n, burst, trial
	s.fill()
	s.full.see(time.Now(), len(s.running), s.usual())
	s.mu.Unlock()
	s.more()
}

// offer takes a line to run it when there is a slot.
func (s *slots) offer(l *line) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch r := l.rank(); {
	case r == 0:
		s.ready.push(l)
	case s.suspected() < max(s.limit, s.fell, 1):
		s.suspects[r].waiting.push(l)
	default:
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			s.back(l)
		}()
	}
	s.fill()
}

// suspected is how many suspects wait for their turn. Called with mu held.
func (s *slots) suspected() int {
	n := 0
	for r := range s.suspects {
		n += s.suspects[r].waiting.len()
	}
	return n
}

// doubted says that lines which may have killed an engine wait for their turn; empty: none do.
func (s *slots) doubted() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.suspected()
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("few at a time of %s that an engine may have died of", proto.Count(int64(n), "line"))
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
	for r := mostRank; r > 0; r-- {
		g := &s.suspects[r]
		switch most := s.atOnce(r); {
		case g.waiting.len() == 0:
		case most < 2 && len(s.running) > 0:
			return nil // until the engine is empty
		case most < 2:
			s.single = true
			return s.start(g.waiting.pop())
		case g.running < most:
			return s.start(g.waiting.pop())
		}
	}
	if s.ready.len() == 0 || s.gathers() {
		return nil
	}
	return s.start(s.ready.pop())
}

// gathers says whether free slots wait until there are enough for a burst. Called with mu held.
func (s *slots) gathers() bool {
	if s.burst < 2 {
		return false
	}
	free := s.limit - len(s.running)
	if free >= min(s.burst, s.ready.len(), s.limit) {
		s.bursting = true
	}
	if !s.bursting {
		return true
	}
	s.bursting = free > 1 // the last one otherwise
	return false
}

func (s *slots) start(l *line) *line {
	if s.running == nil {
		s.running = make(map[*line]struct{})
	}
	s.running[l] = struct{}{}
	l.started, l.alone, l.trial = time.Now(), s.single, s.trial
	l.pace = proto.Pace{Limit: int64(s.usual()), FullUS: s.full.upTo(l.started).Microseconds()}
	s.full.see(l.started, len(s.running), s.usual())
	l.ctx, l.cancel = context.WithCancelCause(context.Background())
	s.suspects[l.rank()].running++
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
	s.suspects[l.rank()].running--
	was := s.single
	s.single = false
	n := s.pick()
	if n == nil {
		s.full.see(time.Now(), len(s.running), s.usual())
	}
	if was || n != nil && s.bursting {
		s.fill() // the slots that were empty for its sake, or until there were enough
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
func (s *slots) chunk() int { return max(1, min(s.limit, s.most())/16) }

// ready is how many lines may be here at a limit: enough to fill the slots, and an eighth to have ready.
func ready(limit int) int { return limit + limit/8 }

// most is how many lines may be here. Called with mu held.
func (s *slots) most() int {
	if s.share > 0 {
		return min(ready(s.limit), s.share)
	}
	return ready(s.limit)
}

// setShare says how many lines may be here at most; 0: as many as the limit allows.
func (s *slots) setShare(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.share = n
}

// capacity is how many lines may be here by the limit, and how many are.
func (s *slots) capacity() (most, here int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return ready(s.limit), len(s.running) + s.ready.len() + s.away
}

// room is how many more lines may be pulled. Lines that wait for a retry take no room until there are as many as slots,
// or manyAway: then the engine is sick, and more would not help.
func (s *slots) room() (room, chunk int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.roomLocked(), s.chunk()
}

func (s *slots) roomLocked() int {
	if s.single || s.emptying() {
		return 0
	}
	return s.most() - len(s.running) - s.ready.len() - max(0, s.away-max(s.limit, manyAway))
}

// atOnce is how many lines of a rank may run at once; below 2: one, and alone. Called with mu held.
func (s *slots) atOnce(rank int) int { return max(s.limit, s.fell) >> (2 * rank) }

// emptying says whether nothing is started until a line can run alone. Called with mu held.
func (s *slots) emptying() bool {
	for r := mostRank; r > 0; r-- {
		if s.suspects[r].waiting.len() > 0 && s.atOnce(r) < 2 {
			return true
		}
	}
	return false
}

// lost takes note that a running line got no answer, and says whether it is excused should the engine have died: lines
// were there with it that are suspected more.
func (s *slots) lost(l *line) (excused bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	mine := l.rank()
	first := !s.ranks[mine].After(l.started)
	s.ranks[mine] = time.Now()
	for r := mine + 1; r <= mostRank; r++ {
		if s.suspects[r].running > 0 || s.ranks[r].After(l.started) {
			return true
		}
	}
	if mine == 0 && first {
		s.fell = len(s.running)
	}
	return false
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
	out := s.ready.take(match)
	for r := range s.suspects {
		out = append(out, s.suspects[r].waiting.take(match)...)
	}
	return out
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
