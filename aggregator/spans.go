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
	// maxSpans bounds the stretches of a clock, 16 bytes each, or 72 with marks. The pause doubles where there would be more.
	maxSpans = 4096
)

func (s *spans) add(from, to int64) { s.all = addTo(s.all, span{from, to}, &s.pause) }

func (s span) at() span { return s }

func (s span) with(o span) span { return span{min(s.from, o.from), max(s.to, o.to)} }

// stretchOf is a T that lies in a stretch of time, and can be one with another.
type stretchOf[T any] interface {
	at() span
	with(T) T
}

// addTo adds v to what is in order, and none nearer to the next than the pause, which doubles where there would be too many.
func addTo[T stretchOf[T]](all []T, v T, pause *int64) []T {
	// those from i to j are nearer to the new one than a pause
	i := sort.Search(len(all), func(i int) bool { return v.at().from-all[i].at().to < *pause })
	j := i
	for ; j < len(all) && all[j].at().from-v.at().to < *pause; j++ {
		v = v.with(all[j])
	}
	all = slices.Replace(all, i, j, v)
	for len(all) > maxSpans {
		*pause *= 2
		n := 1
		for _, next := range all[1:] {
			if last := &all[n-1]; next.at().from-(*last).at().to < *pause {
				*last = (*last).with(next)
				continue
			}
			all[n] = next
			n++
		}
		all = all[:n]
	}
	return all
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
