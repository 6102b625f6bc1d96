package load

import (
	"math"
	"testing"
	"time"
)

// hill is an engine that finishes so many sequences a second with n in flight, each of so much work.
type hill struct {
	climb climb
	rate  func(n float64) float64
	work  float64
	now   time.Time
}

// generations lets n end so often, with a look after each quarter of them.
func (h *hill) generations(often int) {
	for range 4 * often {
		n := h.climb.n
		h.now = h.now.Add(time.Duration(n / 4 / h.rate(n) * float64(time.Second)))
		h.climb.finished(n/4, n/4*h.work, h.now)
		h.climb.look(n)
	}
}

func newHill(rate func(n float64) float64) *hill {
	return &hill{climb: climb{n: 32, least: 8, most: 1024, step: 2}, rate: rate, work: 1000, now: time.Unix(0, 0)}
}

// TestClimbPays: a number is worth it from 5 per cent more on, and what is near that is measured for twice as long before
// it is judged.
func TestClimbPays(t *testing.T) {
	for more, want := range map[float64]float64{1.1: 64, 1.03: 32} {
		h := newHill(func(n float64) float64 { return 100 * math.Pow(more, min(1, math.Log2(n/32))) })
		again := false
		for range 100 {
			h.generations(1)
			again = again || h.climb.trial.again && !h.climb.settled && h.climb.n == 64
		}
		if c := &h.climb; !c.settled || c.n != want || !again {
			t.Errorf("%.2f times as much: %.0f, settled %v, measured for longer %v", more, c.n, c.settled, again)
		}
	}
}

// TestClimbFew: while fewer lines come than may be in flight, nothing is learned.
func TestClimbFew(t *testing.T) {
	h := newHill(func(n float64) float64 { return n })
	h.climb.measure()
	for range 100 {
		h.now = h.now.Add(time.Second)
		h.climb.finished(16, 16*h.work, h.now)
		h.climb.look(16)
	}
	if c := &h.climb; c.n != 32 || c.rate != 0 {
		t.Errorf("%.0f, made %.0f a second, with half of it in flight", c.n, c.rate)
	}
}

// TestClimbAnew: it begins again when lines hold other work, and not when they make less.
func TestClimbAnew(t *testing.T) {
	h := newHill(func(n float64) float64 { return min(n, 64) })
	h.generations(100)
	if !h.climb.settled || h.climb.n < 50 || h.climb.n > 100 {
		t.Fatalf("%.0f, settled %v", h.climb.n, h.climb.settled)
	}
	was := h.climb.n
	h.work = 1400
	h.generations(20)
	if !h.climb.settled || h.climb.n != was {
		t.Errorf("%.0f, settled %v: lines were about the same", h.climb.n, h.climb.settled)
	}
	h.work = 2500
	for range 40 {
		if h.generations(1); !h.climb.settled {
			return
		}
	}
	t.Error("settled, though lines are others")
}
