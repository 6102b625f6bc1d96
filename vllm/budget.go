package vllm

import (
	"fmt"
	"time"

	"millrace/proto"
)

const (
	wellFor      = 10 * time.Minute // then its restarts are forgotten
	wellBriefly  = time.Minute      // then the next restart waits no longer than the first
	failedStarts = 3                // in a row, of which none came up: it is given up
	mostPause    = 30 * time.Second
	passing      = 20 // times the first pause is waited for what may mend itself
)

// ending is how a server came to its end that was not asked to stop.
type ending struct {
	cause  string        // one of Causes
	why    string        // for people, with what to do
	said   string        // why, without that; empty: nobody said
	line   string        // of its log, that gives the reason
	reason string        // name of the one in its log; empty: none that is known
	final  bool          // a restart would not mend it
	passes bool          // it may mend itself
	itself bool          // its process ended, and nobody ended it
	well   time.Duration // for how long it was up; 0: it never was
}

// tally is what there is to know about restarts.
type tally struct {
	restarts int   // since it was well or answered
	others   int   // restarts with other flags, since then
	crowded  int   // ends that another server on its card may be behind, until it was well for long
	failed   int   // starts in a row
	quick    int   // ends in a row that came soon
	answered int64 // lines, until the end before
	came     bool  // up, once
}

// judge says how long to wait before the next start, or that there is none.
func (t *tally) judge(e ending, s *Server) (time.Duration, *Failed) {
	t.failed++
	if e.well > 0 {
		t.failed, t.came = 0, true
	}
	answered := s.Answered.Load()
	if e.well >= wellFor || answered > t.answered { // a line that kills its engine is found while others are answered
		t.restarts, t.others = 0, 0
	}
	t.answered = answered
	if e.well >= wellBriefly {
		t.quick = 0
	}
	switch {
	case e.final && !t.came:
		return 0, &Failed{Why: e.why, Final: true}
	case t.restarts >= s.Restarts, t.failed >= failedStarts && !e.passes:
		return 0, &Failed{Why: fmt.Sprintf("%s; it was started again %s and is given up", e.why, proto.Count(int64(t.restarts+t.others), "time"))}
	}
	t.restarts++
	t.quick++
	first := s.pause
	if e.passes {
		first *= passing
	}
	return min(first<<min(t.quick-1, 10), mostPause), nil
}

// number says which restart it is, of how many: of the budget that ends first if they all go as the last start went.
func (t *tally) number(e ending, s *Server) string {
	if n := failedStarts - t.failed; t.failed > 0 && !e.passes && n-1 < s.Restarts-t.restarts {
		return fmt.Sprintf("%d of %d while it does not come up", t.failed, t.failed+n-1)
	}
	return fmt.Sprintf("%d of %d", t.restarts, s.Restarts)
}
