package aggregator

import (
	"time"

	"millrace/proto"
)

// Rate tells how fast a job goes of late. Its time is that in which lines of the job were at engines, as their results tell;
// since the last result, which may be long ago, it is the time that passes. So what no worker could run has no part in it.
// Its zero value is ready.
type Rate struct {
	looks []look    // a second apart at least, and none older than is needed
	last  look      // the newest
	since time.Time // when that came, or when lines can run again
	moved bool      // something has ended since the first look
}

// look is how far a job was when its lines had been at engines for so long.
type look struct {
	busy          time.Duration
	lines, tokens int64
}

// RateWindow is the longest that a Rate looks back.
const RateWindow = time.Minute

// Add takes in how far a job is. stands says that nothing can run now.
func (r *Rate) Add(now time.Time, p *proto.Progress, stands bool) {
	l := look{time.Duration(p.BusyUS) * time.Microsecond, p.OK + p.Failed - p.BeforeLines, p.Usage.Completion - p.BeforeTokens}
	if l.lines < r.last.lines || l.busy < r.last.busy { // the results are counted anew
		*r = Rate{}
	}
	if len(r.looks) == 0 || l.busy != r.last.busy || stands {
		r.since = now
	}
	r.moved = r.moved || len(r.looks) > 0 && l.lines != r.last.lines
	r.last = l
	if n := len(r.looks); n == 0 || l.busy-r.looks[n-1].busy >= time.Second {
		r.looks = append(r.looks, l)
	}
	for len(r.looks) > 1 && r.ran(now)-r.looks[1].busy >= RateWindow {
		r.looks = r.looks[1:]
	}
}

func (r *Rate) ran(now time.Time) time.Duration { return r.last.busy + now.Sub(r.since) }

// Per returns how many lines, and completion tokens, have ended per second in the last window, or since the first look where
// that is less: over is that time, and 0 as long as there is nothing to tell.
func (r *Rate) Per(now time.Time, window time.Duration) (lines, tokens float64, over time.Duration) {
	if !r.moved {
		return 0, 0, 0
	}
	ran, old := r.ran(now), r.looks[0]
	for _, l := range append(r.looks[1:len(r.looks):len(r.looks)], r.last) {
		if ran-l.busy < window {
			break
		}
		old = l
	}
	over = ran - old.busy
	if over < 100*time.Millisecond {
		return 0, 0, 0
	}
	return float64(r.last.lines-old.lines) / over.Seconds(), float64(r.last.tokens-old.tokens) / over.Seconds(), over
}

// busy is for how long lines of a job were at engines, by the results that came since this process began, in µs of
// the broker's clock. A line that is away from its engine for less than handOver is there.
type busy struct {
	spans  spans
	before int64 // of stretches that are not kept any more
	floor  int64 // where the last of them ended
}

const busySpans = 64

func (b *busy) add(from, to int64) {
	if from = max(from, b.floor); to <= from {
		return
	}
	b.spans.pause = handOver
	b.spans.add(from, to)
	if all := b.spans.all; len(all) > busySpans {
		b.before, b.floor = b.before+all[0].to-all[0].from, all[0].to
		b.spans.all = all[1:]
	}
}

func (b *busy) sum() int64 { return b.before + b.spans.whole() - b.spans.idle() }
