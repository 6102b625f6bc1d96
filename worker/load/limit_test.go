package load

import (
	"strings"
	"testing"
	"time"

	"millrace/proto"
)

// seen is what a probe of an engine finds that has a KV cache of so many tokens.
func seen(kv int64, g Gauges) Engine {
	g.Known, g.KVTokens = true, kv
	return Engine{MaxLen: 4096, Gauges: g}
}

// TestLimitBegins: what lines ask for decides before they have shown what they hold, and prompts as soon as they are seen.
func TestLimitBegins(t *testing.T) {
	now := time.Now()
	l := New(0)
	l.Observe(seen(473807, Gauges{}), 0, now)
	l.Expects(3152, Wish{308, 1}) // 788 tokens, but a byte may be a token
	if got := l.Get(); got != leastAtOnce {
		t.Errorf("limit %d at first", got)
	}
	l.Observe(seen(473807, Gauges{Running: 64}), 64, now)
	if got := l.Get(); got < 130 || got > 140 {
		t.Errorf("limit %d by a body", got)
	}
	l.Observe(seen(473807, Gauges{Running: 144, KVUsage: 144 * 788 / 473807., Generation: 0}), 144, now.Add(100*time.Millisecond))
	if got := l.Get(); got < 415 || got > 440 {
		t.Errorf("limit %d by the KV cache in use", got)
	}
	if moved, _ := l.Expects(3152, Wish{308, 1}); moved {
		t.Error("bodies still count")
	}
}

// TestLimitForgets: an engine that was started anew gets few lines until it runs them, since it may run few, and what lines hold
// stays known.
func TestLimitForgets(t *testing.T) {
	now := time.Now()
	l := New(0)
	look := func(g Gauges) {
		now = now.Add(time.Second)
		l.Observe(seen(473807, g), 400, now)
	}
	l.Expects(3152, Wish{308, 1})
	for i := range int64(4000) {
		if i%50 == 0 {
			look(Gauges{Running: 400, KVUsage: 0.8, Generation: 308 * i, Preemptions: 40 * i})
		}
		l.Finished(proto.Usage{Counted: true, Prompt: 788, Completion: 308}, 3152, Wish{308, 1}, 10*time.Second, now)
	}
	if got := l.Get(); got > 300 {
		t.Fatalf("limit %d while each line is pre-empted 40 times", got)
	}
	for _, c := range []struct{ running, least, most int }{{1, 64, 64}, {64, 192, 192}, {192, 400, 450}} {
		look(Gauges{Running: int64(c.running), Generation: 1})
		if got := l.Get(); got < c.least || got > c.most {
			t.Errorf("limit %d after a new start, where %d run", got, c.running)
		}
	}
}

func TestLimitFallsBack(t *testing.T) {
	now := time.Now()
	l := New(0)
	l.Observe(Engine{}, 0, now)
	if got := l.Get(); got != blindStart {
		t.Errorf("limit %d without a capacity", got)
	}
	l = New(7)
	l.Observe(seen(473807, Gauges{}), 0, now)
	if moved, wake := l.Expects(10, Wish{10, 1}); moved || wake || l.Get() != 7 {
		t.Errorf("limit %d, asked for 7", l.Get())
	}
	l = New(0)
	l.Observe(seen(16, Gauges{}), 0, now) // as of a model that only embeds
	if got := l.Get(); got != blindStart {
		t.Errorf("limit %d without a KV cache", got)
	}
	for i := range 20 * blindStart { // its lines are so short that none is seen to run
		now = now.Add(50 * time.Millisecond / time.Duration(l.Get())) // twice as many in flight make twice as many
		l.Finished(proto.Usage{Counted: true, Prompt: 100}, 400, Wish{}, 50*time.Millisecond, now)
		if i%blindStart == 0 {
			l.Observe(seen(16, Gauges{Prompt: int64(100 * i)}), l.Get(), now)
		}
	}
	if got := l.Get(); got < 4*blindStart {
		t.Errorf("limit %d of an engine that does more with more", got)
	}
	l = New(0)
	l.Observe(seen(4096, Gauges{}), 0, now)
	if got := l.Get(); got != minLimit {
		t.Errorf("limit %d of a tiny engine", got)
	}
	l.Observe(Engine{}, 0, now)
	if got := l.Get(); got != minLimit {
		t.Errorf("limit %d when the metrics have gone", got)
	}
}

// TestLimitIdle: a worker that waited for its first line plans with what that asks for, and a burst after a pause is not
// taken for an engine that runs no more at once.
func TestLimitIdle(t *testing.T) {
	now := time.Now()
	l := New(0)
	look := func(inFlight int, g Gauges) {
		now = now.Add(time.Second)
		l.Observe(seen(473807, g), inFlight, now)
	}
	for range 20 {
		look(0, Gauges{})
	}
	if got := l.Get(); got != leastAtOnce {
		t.Errorf("limit %d before the first line", got)
	}
	l.Expects(3152, Wish{308, 1})
	if got := l.Get(); got != leastAtOnce {
		t.Errorf("limit %d by the first line", got)
	}
	made := int64(0)
	line := func() {
		made += 308
		l.Finished(proto.Usage{Counted: true, Prompt: 788, Completion: 308}, 3152, Wish{308, 1}, 10*time.Second, now)
	}
	full := func() {
		look(l.Get(), Gauges{Running: int64(l.Get()), KVUsage: min(0.96, float64(l.Get())*942/473807), Generation: made})
	}
	for range 30 {
		full()
		for range 40 {
			line()
		}
	}
	was := l.Get()
	if was < 400 || was > 520 {
		t.Fatalf("limit %d of a full engine", was)
	}
	for range 30 {
		look(0, Gauges{Generation: made})
	}
	look(was, Gauges{Running: 43, Waiting: 380, KVUsage: 0.07, Generation: made})
	look(was, Gauges{Running: 90, Waiting: 330, KVUsage: 0.14, Generation: made})
	look(was, Gauges{Running: 190, Waiting: 230, KVUsage: 0.28, Generation: made})
	if got := l.Get(); got < was*9/10 || got > was*11/10 {
		t.Errorf("limit %d in a burst after a pause, %d before", got, was)
	}
}

// TestLimitCrowded: an engine that runs fewer lines at once than its KV cache holds is known by what it lets wait, long
// before as many have ended as are in flight; one that runs all that it gets gets more. vLLM gets no line that would wait,
// so that is seen only where lines become others. Of others as many more as end in two steps, of 20 in these, and two.
func TestLimitCrowded(t *testing.T) {
	for kind, want := range map[string]int{proto.KindOther: 72, proto.KindVLLM: 64} {
		now := time.Now()
		l := New(0)
		made, most, size := int64(0), int64(64), int64(20)
		second := func() {
			now = now.Add(time.Second)
			n := int64(l.Get())
			running := min(n, most)
			for range 250 {
				l.Expects(100, Wish{int(size), 1})
				made += size
				l.Finished(proto.Usage{Counted: true, Prompt: 118, Completion: size}, 100, Wish{int(size), 1}, time.Duration(n)*4*time.Millisecond, now)
			}
			st := seen(131072, Gauges{Running: running, Waiting: n - running, KVUsage: float64(running) * 128 / 131072, Generation: made})
			st.Kind = kind
			l.Observe(st, int(n), now)
		}
		second()
		second()
		if got := l.Get(); got != 3*64 {
			t.Fatalf("%s: limit %d where 64 run", kind, got)
		}
		told := New(0)
		st := seen(131072, Gauges{})
		st.Kind, st.Sequences = kind, 64
		told.Observe(st, 0, now)
		told.Expects(100, Wish{20, 1})
		if got, why := told.Get(), told.Reason(); got != min(want, 67) || why != "engine runs no more than 64 at once, by its flags" {
			t.Errorf("%s: limit %d by its flags: %s", kind, got, why)
		}
		for range 3 {
			second()
		}
		if got, why := l.Get(), l.Reason(); got != want || why != "engine runs no more than 64 at once" {
			t.Errorf("%s: limit %d: %s", kind, got, why)
		}
		most = 1024
		for range 10 {
			second()
		}
		if kind == proto.KindVLLM {
			if got := l.Get(); got != want {
				t.Errorf("%s: limit %d, though lines are what they were", kind, got)
			}
			for size = 120; l.Get() == want && most > 1000; most-- {
				second()
			}
			for range 10 {
				second()
			}
		}
		if got := l.Get(); got < 80 {
			t.Errorf("%s: limit %d of an engine that runs all", kind, got)
		}
	}
}

// TestLimitLargeLine: one line that is far larger than the others does not cut the limit, and many do.
func TestLimitLargeLine(t *testing.T) {
	now := time.Now()
	l := New(0)
	l.Observe(seen(473807, Gauges{}), 0, now)
	made := int64(0)
	second := func(bytes int) {
		now = now.Add(time.Second)
		for range 40 {
			l.Expects(bytes, Wish{308, 1})
			made += 308
			l.Finished(proto.Usage{Counted: true, Prompt: 788, Completion: 308}, 3152, Wish{308, 1}, 10*time.Second, now)
		}
		n := l.Get()
		l.Observe(seen(473807, Gauges{Running: int64(n), KVUsage: min(0.96, float64(n)*942/473807), Generation: made}), n, now)
	}
	for range 30 {
		second(3152)
	}
	was := l.Get()
	l.Expects(8<<20, Wish{308, 1})
	second(3152)
	if got := l.Get(); got < was*9/10 {
		t.Errorf("limit %d after one large line, %d before", got, was)
	}
	for range 3 {
		second(30 * 1024)
	}
	if got := l.Get(); got > was/3 {
		t.Errorf("limit %d when all lines are large, %d before", got, was)
	}
}

// TestLimitSlots: an engine that tells its slots has as many lines, and a few that wait; never less than 8.
func TestLimitSlots(t *testing.T) {
	for slots, want := range map[int64]int{4: 8, 32: 37} {
		l := New(0)
		l.Observe(Engine{Kind: proto.KindLlama, Run: 1, Slots: slots}, 0, time.Now())
		if got := l.Get(); got != want {
			t.Errorf("limit %d with %d slots, want %d", got, slots, want)
		}
	}
}

// TestLimitChoices: a line with four choices is four sequences, and holds what they hold.
func TestLimitChoices(t *testing.T) {
	now := time.Now()
	l := New(0)
	l.Observe(seen(473807, Gauges{}), 0, now)
	l.Expects(788, Wish{4 * 308, 4})
	l.Observe(seen(473807, Gauges{Running: 400}), 100, now)
	if got, want := l.Get(), 473807*98/100/(788+4*308); got < want*95/100 || got > want*130/100 {
		t.Errorf("limit %d, %d fit", got, want)
	}
	made := int64(0)
	for range 40 {
		now = now.Add(time.Second)
		n := l.Get()
		l.Observe(seen(473807, Gauges{Running: int64(4 * n), KVUsage: min(0.96, float64(n)*(788+2*308)/473807), Generation: made}), n, now)
		for range 40 {
			made += 4 * 308
			l.Finished(proto.Usage{Counted: true, Prompt: 788, Completion: 4 * 308}, 788, Wish{4 * 308, 4}, 10*time.Second, now)
		}
	}
	if got := l.Get(); got < 220 || got > 256 { // 1,024 sequences
		t.Errorf("limit %d of an engine that runs 1024 sequences", got)
	}
}

// TestLimitOthers: what another worker of the engine has there is left to it, up to half.
func TestLimitOthers(t *testing.T) {
	now := time.Now()
	l := New(0)
	l.Observe(seen(473807, Gauges{}), 0, now)
	for range begunLines {
		l.Expects(788, Wish{308, 1})
	}
	l.Observe(seen(473807, Gauges{Running: 200}), 200, now)
	alone := l.Get()
	l.Observe(seen(473807, Gauges{Running: 100 + int64(alone)/4, KVUsage: 0.1}), 100, now.Add(time.Second))
	if got := l.Get(); got < alone*7/10 || got > alone*8/10 {
		t.Errorf("limit %d beside %d of another worker, %d alone", got, alone/4, alone)
	}
	l.Observe(seen(473807, Gauges{Running: 400, Waiting: 5000, KVUsage: 0.7}), 100, now.Add(2*time.Second))
	if got := l.Get(); got != alone/2 && got != (alone+1)/2 {
		t.Errorf("limit %d beside many of another worker, %d alone", got, alone)
	}
}

// TestLimitOfAnotherEngine: what was found of an engine that died or was replaced counts no more, also where the new one
// tells nothing.
func TestLimitOfAnotherEngine(t *testing.T) {
	now := time.Now()
	l := New(0)
	st := seen(473807, Gauges{})
	st.Kind, st.Version, st.Run = proto.KindVLLM, "1", 1
	l.Observe(st, 0, now)
	l.Expects(3152, Wish{308, 1})
	if got := l.Get(); got != leastAtOnce {
		t.Fatalf("limit %d", got)
	}
	l.Observe(Engine{Kind: proto.KindVLLM, Version: "1", Run: 1}, 0, now.Add(time.Second))
	if got := l.Get(); got != leastAtOnce {
		t.Errorf("limit %d when the metrics have gone", got)
	}
	l.Observe(Engine{Kind: proto.KindOther, Run: 2}, 0, now.Add(2*time.Second))
	if got := l.Get(); got != blindStart {
		t.Errorf("limit %d of another engine that tells nothing", got)
	}
	l.Observe(Engine{Kind: proto.KindOllama, Version: "1", Run: 3}, 0, now.Add(3*time.Second))
	if got := l.Get(); got != ollamaStart {
		t.Errorf("limit %d of Ollama", got)
	}
}

// TestLimitReplicas: counters that go back and forth are those of several engines; those that go back once are of one
// that was started anew.
func TestLimitReplicas(t *testing.T) {
	for _, replicas := range []int{1, 2} {
		now := time.Now()
		l := New(0)
		made := [2]int64{1000, 2000}
		for i := range 20 {
			now = now.Add(2 * time.Second)
			made[i%2] += 500
			g := Gauges{Running: 40, KVUsage: 0.5, Generation: made[i%replicas]}
			if i >= 10 && replicas == 1 {
				g.Generation -= made[0] / 2 // it is another one
			}
			l.Observe(seen(473807, g), 80, now)
			l.Expects(3152, Wish{308, 1})
		}
		if l.several.sure != (replicas == 2) || (l.way == byClimb) != (replicas == 2) {
			t.Errorf("%d replicas: several %v, way %v", replicas, l.several.sure, l.way)
		}
		if why := l.Reason(); replicas == 2 && !strings.HasPrefix(why, "several engines at one address; ") {
			t.Errorf("why: %s", why)
		}
	}
}
