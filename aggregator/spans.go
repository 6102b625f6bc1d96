package aggregator

import (
	"slices"
	"sort"
	"time"
)

// spans are stretches of time in which there was work, in µs of one clock: in order, and none nearer to the next than
// pause. What is nearer is one stretch.
type spans struct {
	pause  int64
	all    []span
	before []int64 // of each, the length of those before it; see at
}

type span struct{ from, to int64 }

const (
	// longPause is how long a worker that goes on afterwards must have nothing to do for that to be idle time. Shorter
	// pauses are a part of the work: a line that rests before its next attempt, a queue that ran dry for a moment.
	longPause = int64(30 * time.Second / time.Microsecond)
	// handOver is the same where one worker ended and another came.
	handOver = int64(time.Second / time.Microsecond)
	// maxSpans bounds the stretches of a clock, 16 bytes each. The pause doubles where there would be more.
	maxSpans = 4096
)

func (s *spans) add(from, to int64) {
	// those from i to j are nearer to the new one than a pause
	i := sort.Search(len(s.all), func(i int) bool { return from-s.all[i].to < s.pause })
	j := i
	for ; j < len(s.all) && s.all[j].from-to < s.pause; j++ {
		from, to = min(from, s.all[j].from), max(to, s.all[j].to)
	}
	s.all = slices.Replace(s.all, i, j, span{from, to})
	for len(s.all) > maxSpans {
		s.widen()
	}
}

func (s *spans) widen() {
	s.pause *= 2
	n := 1
	for _, v := range s.all[1:] {
		if last := &s.all[n-1]; v.from-last.to < s.pause {
			last.to = v.to
			continue
		}
		s.all[n] = v
		n++
	}
	s.all = s.all[:n]
}

// whole is the time from the first stretch to the end of the last.
func (s *spans) whole() int64 {
	if len(s.all) == 0 {
		return 0
	}
	return s.all[len(s.all)-1].to - s.all[0].from
}

// idle is the time between the stretches.
func (s *spans) idle() (sum int64) {
	for i := 1; i < len(s.all); i++ {
		sum += s.all[i].from - s.all[i-1].to
	}
	return sum
}

// at is where the time t lies on a clock that stands still between the stretches. Nothing is added after the first call.
func (s *spans) at(t int64) int64 {
	if s.before == nil {
		sum := int64(0)
		for _, v := range s.all {
			s.before = append(s.before, sum)
			sum += v.to - v.from
		}
	}
	i := sort.Search(len(s.all), func(i int) bool { return s.all[i].from > t }) - 1
	if i < 0 {
		return 0
	}
	return s.before[i] + min(t, s.all[i].to) - s.all[i].from
}
