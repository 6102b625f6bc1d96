package worker

import (
	"strings"
	"sync"
	"time"

	"millrace/proto"
	"millrace/worker/load"
)

// meter is what people are told of how an engine does: its speed, its pre-emptions, and what went wrong last. Nothing
// here decides anything. All methods may be called from any goroutine.
type meter struct {
	mu    sync.Mutex
	g     load.Gauges // of the last look
	looks []counted   // the last, and those of rateWindow and pressWindow before
	sum   counted     // since the worker's start
	fault string      // what went wrong with the last attempt that failed, in a few words; empty: none has
	when  time.Time   // when that was
}

// counted is what had been counted at a time, since the worker's start.
type counted struct {
	at          time.Time
	generated   int64 // output tokens, by the engine
	preemptions int64 // by the engine
	answers     int64 // to this worker
	tokens      int64 // output tokens of these
	told        int64 // answers that said how many tokens they have
}

const (
	rateWindow  = 15 * time.Second
	pressWindow = 5 * time.Minute // for pre-emptions: longer than the life of most lines
	lookGap     = time.Second     // between looks that are kept
	longFault   = 160             // bytes
)

// look takes in what a probe of a ready engine found. Counters that go back are those of an engine that started anew.
func (m *meter) look(g load.Gauges, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.g.Known && g.Known {
		m.sum.generated += since(g.Generation, m.g.Generation)
		m.sum.preemptions += since(g.Preemptions, m.g.Preemptions)
	}
	if m.g.Known != g.Known || now.Sub(m.sum.at) > rateWindow { // it was not up meanwhile
		m.looks = nil // what had been counted before says nothing
	}
	m.g, m.sum.at = g, now
	if n := len(m.looks); n > 1 && now.Sub(m.looks[n-2].at) < lookGap {
		m.looks[n-1] = m.sum
	} else {
		m.looks = append(m.looks, m.sum)
	}
	for len(m.looks) > 2 && now.Sub(m.looks[1].at) >= pressWindow {
		m.looks = m.looks[1:]
	}
}

// since is what a counter has counted since it was old.
func since(now, old int64) int64 {
	if now < old {
		return now
	}
	return now - old
}

// answered takes in an answer.
func (m *meter) answered(u proto.Usage) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sum.answers++
	if u.Counted {
		m.sum.told++
		m.sum.tokens += u.Completion
	}
}

// failed takes in what went wrong with an attempt.
func (m *meter) failed(what string) {
	what = proto.Truncate(strings.Join(strings.Fields(what), " "), longFault)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fault, m.when = what, time.Now()
}

// since returns the latest look that is at least d before the last one, or the first.
func (m *meter) since(d time.Duration) (old, last counted) {
	last = m.looks[len(m.looks)-1]
	old = m.looks[0]
	for _, r := range m.looks {
		if last.at.Sub(r.at) < d {
			break
		}
		old = r
	}
	return old, last
}

// gauges are those of the last look, if it was a moment ago.
func (m *meter) gauges(now time.Time) load.Gauges {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now.Sub(m.sum.at) > rateWindow {
		return load.Gauges{}
	}
	return m.g
}

// rate is how many output tokens per second there were of late, and whose; empty: it is not known.
func (m *meter) rate(now time.Time) (perSecond float64, of string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.looks) < 2 || now.Sub(m.sum.at) > rateWindow {
		return 0, ""
	}
	old, last := m.since(rateWindow)
	s := last.at.Sub(old.at).Seconds()
	switch {
	case s <= 0:
		return 0, ""
	case m.g.Known:
		return float64(last.generated-old.generated) / s, proto.RateEngine
	case last.told == old.told && last.answers > old.answers:
		return 0, "" // it tells no tokens
	}
	return float64(last.tokens-old.tokens) / s, proto.RateAnswers
}

// pressure is how many pre-emptions there were of late for each line that was answered. It is not known of an engine that
// does not count them, or has answered nothing.
func (m *meter) pressure(now time.Time) (perLine float64, known bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.g.Known || len(m.looks) < 2 || now.Sub(m.sum.at) > rateWindow {
		return 0, false
	}
	old, last := m.since(pressWindow)
	n := last.answers - old.answers
	return float64(last.preemptions-old.preemptions) / float64(max(n, 1)), n > 0
}

// preempted is how many pre-emptions the engine has counted since the worker's start; known is false where it does not.
func (m *meter) preempted() (n int64, known bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sum.preemptions, m.g.Known
}

// tell completes a heartbeat. Of an engine that is not up, nothing is known but the past.
func (m *meter) tell(w *proto.Worker, up bool, now time.Time) {
	w.Preemptions, _ = m.preempted()
	if up {
		g := m.gauges(now)
		w.Metered, w.KVUsage = g.Known, g.KVUsage
		w.TokenRate, w.RateOf = m.rate(now)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if w.LastError = m.fault; m.fault != "" {
		w.LastErrorUS = now.Sub(m.when).Microseconds()
	}
}

// fullness adds up for how long an engine has had nearly as much as it may have.
type fullness struct {
	since time.Time // it is full since then; zero: it is not
	total time.Duration
}

// see takes in how much is in flight from now on. Full is 95 % of the limit, so that the moment in which one line makes way
// for the next does not count.
func (f *fullness) see(now time.Time, inFlight, limit int) {
	full := limit > 0 && 20*inFlight >= 19*limit
	switch {
	case full && f.since.IsZero():
		f.since = now
	case !full && !f.since.IsZero():
		f.total, f.since = f.upTo(now), time.Time{}
	}
}

func (f *fullness) upTo(now time.Time) time.Duration {
	if f.since.IsZero() {
		return f.total
	}
	return f.total + now.Sub(f.since)
}
