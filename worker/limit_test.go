package worker

import (
	"testing"
	"time"

	"millrace/proto"
)

// seen is what a probe of an engine finds that has a KV cache of so many tokens.
func seen(kv int64, g Gauges) Status {
	g.Known, g.KVTokens = true, kv
	return Status{State: proto.EngineReady, MaxLen: 4096, Gauges: g}
}

// TestLimitBegins: what lines ask for decides before they have shown what they hold, and prompts as soon as they are seen.
func TestLimitBegins(t *testing.T) {
	now := time.Now()
	l := newLimit(0)
	l.observe(seen(473807, Gauges{}), 0, now)
	l.expects(3152, wish{308, 1}) // 788 tokens, but a byte may be a token
	if got := l.get(); got < 130 || got > 140 {
		t.Errorf("limit %d by a body", got)
	}
	l.observe(seen(473807, Gauges{Running: 100, KVUsage: 100 * 788 / 473807., Generation: 0}), 134, now.Add(100*time.Millisecond))
	if got := l.get(); got < 415 || got > 440 {
		t.Errorf("limit %d by the KV cache in use", got)
	}
	if moved, _ := l.expects(3152, wish{308, 1}); moved {
		t.Error("bodies still count")
	}
}

// TestLimitForgets: an engine that was started anew is looked at anew, and what lines hold stays known.
func TestLimitForgets(t *testing.T) {
	now := time.Now()
	l := newLimit(0)
	look := func(g Gauges) {
		now = now.Add(time.Second)
		l.observe(seen(473807, g), 400, now)
	}
	l.expects(3152, wish{308, 1})
	for i := range int64(4000) {
		if i%50 == 0 {
			look(Gauges{Running: 400, KVUsage: 0.8, Generation: 308 * i, Preemptions: 40 * i})
		}
		l.finished(proto.Usage{Counted: true, Prompt: 788, Completion: 308}, 3152, wish{308, 1}, 10*time.Second, now)
	}
	if got := l.get(); got > 300 {
		t.Fatalf("limit %d while each line is pre-empted 40 times", got)
	}
	look(Gauges{Running: 1, Generation: 1})
	if got := l.get(); got < 400 || got > 450 {
		t.Errorf("limit %d after a new start", got)
	}
}

func TestLimitFallsBack(t *testing.T) {
	now := time.Now()
	l := newLimit(0)
	l.observe(Status{State: proto.EngineReady}, 0, now)
	if got := l.get(); got != blindStart {
		t.Errorf("limit %d without a capacity", got)
	}
	l = newLimit(7)
	l.observe(seen(473807, Gauges{}), 0, now)
	if moved, wake := l.expects(10, wish{10, 1}); moved || wake || l.get() != 7 {
		t.Errorf("limit %d, asked for 7", l.get())
	}
	l = newLimit(0)
	l.observe(seen(16, Gauges{}), 0, now) // as of a model that only embeds
	if got := l.get(); got != blindStart {
		t.Errorf("limit %d without a KV cache", got)
	}
	l = newLimit(0)
	l.observe(seen(4096, Gauges{}), 0, now)
	if got := l.get(); got != minLimit {
		t.Errorf("limit %d of a tiny engine", got)
	}
	l.observe(Status{State: proto.EngineReady}, 0, now)
	if got := l.get(); got != minLimit {
		t.Errorf("limit %d when the metrics have gone", got)
	}
}

// TestLimitIdle: a worker that waited for its first line plans with what that asks for, and a burst after a pause is not
// taken for an engine that runs no more at once.
func TestLimitIdle(t *testing.T) {
	now := time.Now()
	l := newLimit(0)
	look := func(inFlight int, g Gauges) {
		now = now.Add(time.Second)
		l.observe(seen(473807, g), inFlight, now)
	}
	for range 20 {
		look(0, Gauges{})
	}
	if got := l.get(); got > 130 {
		t.Errorf("limit %d before the first line", got)
	}
	l.expects(3152, wish{308, 1})
	if got := l.get(); got < 120 || got > 145 {
		t.Errorf("limit %d by the first line", got)
	}
	made := int64(0)
	line := func() {
		made += 308
		l.finished(proto.Usage{Counted: true, Prompt: 788, Completion: 308}, 3152, wish{308, 1}, 10*time.Second, now)
	}
	full := func() {
		look(l.get(), Gauges{Running: int64(l.get()), KVUsage: min(0.96, float64(l.get())*942/473807), Generation: made})
	}
	for range 30 {
		full()
		for range 40 {
			line()
		}
	}
	was := l.get()
	if was < 400 || was > 520 {
		t.Fatalf("limit %d of a full engine", was)
	}
	for range 30 {
		look(0, Gauges{Generation: made})
	}
	look(was, Gauges{Running: 43, Waiting: 380, KVUsage: 0.07, Generation: made})
	look(was, Gauges{Running: 90, Waiting: 330, KVUsage: 0.14, Generation: made})
	look(was, Gauges{Running: 190, Waiting: 230, KVUsage: 0.28, Generation: made})
	if got := l.get(); got < was*9/10 || got > was*11/10 {
		t.Errorf("limit %d in a burst after a pause, %d before", got, was)
	}
}

// TestLimitLargeLine: one line that is far larger than the others does not cut the limit, and many do.
func TestLimitLargeLine(t *testing.T) {
	now := time.Now()
	l := newLimit(0)
	l.observe(seen(473807, Gauges{}), 0, now)
	made := int64(0)
	second := func(bytes int) {
		now = now.Add(time.Second)
		for range 40 {
			l.expects(bytes, wish{308, 1})
			made += 308
			l.finished(proto.Usage{Counted: true, Prompt: 788, Completion: 308}, 3152, wish{308, 1}, 10*time.Second, now)
		}
		n := l.get()
		l.observe(seen(473807, Gauges{Running: int64(n), KVUsage: min(0.96, float64(n)*942/473807), Generation: made}), n, now)
	}
	for range 30 {
		second(3152)
	}
	was := l.get()
	l.expects(8<<20, wish{308, 1})
	second(3152)
	if got := l.get(); got < was*9/10 {
		t.Errorf("limit %d after one large line, %d before", got, was)
	}
	for range 3 {
		second(30 * 1024)
	}
	if got := l.get(); got > was/3 {
		t.Errorf("limit %d when all lines are large, %d before", got, was)
	}
}
