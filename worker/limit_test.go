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
	l.expects(3152, 308) // 788 tokens, but a byte may be a token
	if got := l.get(); got < 130 || got > 140 {
		t.Errorf("limit %d by a body", got)
	}
	l.observe(seen(473807, Gauges{Running: 100, KVUsage: 100 * 788 / 473807., Generation: 0}), 134, now.Add(100*time.Millisecond))
	if got := l.get(); got < 415 || got > 440 {
		t.Errorf("limit %d by the KV cache in use", got)
	}
	if l.expects(3152, 308) {
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
	l.expects(3152, 308)
	for i := range int64(4000) {
		if i%50 == 0 {
			look(Gauges{Running: 400, KVUsage: 0.8, Generation: 308 * i, Preemptions: 40 * i})
		}
		l.finished(proto.Usage{Counted: true, Prompt: 788, Completion: 308}, 3152, 308, 10*time.Second)
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
	if got := l.get(); got != blindLimit {
		t.Errorf("limit %d without a capacity", got)
	}
	l = newLimit(7)
	l.observe(seen(473807, Gauges{}), 0, now)
	if l.expects(10, 10) || l.get() != 7 {
		t.Errorf("limit %d, asked for 7", l.get())
	}
	l = newLimit(0)
	l.observe(seen(100, Gauges{}), 0, now)
	if got := l.get(); got != minLimit {
		t.Errorf("limit %d of a tiny engine", got)
	}
	l.observe(Status{State: proto.EngineReady}, 0, now)
	if got := l.get(); got != minLimit {
		t.Errorf("limit %d when the metrics have gone", got)
	}
}
