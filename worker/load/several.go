package load

import "time"

// several recognises a load balancer with replicas behind it: a look sees the counters of one of them, the next those of
// another, so that they go back and forth. Those of an engine that was started anew go back once.
type several struct {
	sure  bool
	last  int64 // output tokens at the last look
	top   int64 // at the look before they went back; 0: they have not
	since time.Time
	turns int // how often they went back and forth
}

const (
	enoughTurns = 2
	turnTime    = time.Minute // in which an engine that was started anew does not make what it had made before
)

// see takes in a look and says whether there are several.
func (s *several) see(g Gauges, now time.Time) bool {
	if s.sure || !g.Known {
		return s.sure
	}
	switch {
	case g.Generation < s.last:
		s.top, s.since = s.last, now
	case s.top > 0 && now.Sub(s.since) > turnTime:
		s.top, s.turns = 0, 0
	case s.top > 0 && g.Generation >= s.top:
		s.top = 0
		s.turns++
	}
	s.last = g.Generation
	s.sure = s.turns >= enoughTurns
	return s.sure
}
