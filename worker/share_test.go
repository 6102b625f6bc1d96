package worker

import (
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"millrace/proto"
)

func TestLevel(t *testing.T) {
	for _, c := range []struct {
		lines, hungry int
		full          []int
		want          int
	}{
		{500, 4, nil, 125},
		{501, 4, nil, 126},
		{3, 4, nil, 1},
		{0, 4, nil, 0},
		{500, 1, []int{13, 13, 13}, 461},
		{500, 2, []int{400, 13}, 163}, // one that could have more than its part is no less hungry
		{500, 1, []int{400, 400, 400}, 125},
		{30, 1, []int{13, 13}, 10},
	} {
		if got := level(c.lines, c.hungry, c.full); got != c.want {
			t.Errorf("%d lines, %d hungry, full %v: %d, want %d", c.lines, c.hungry, c.full, got, c.want)
		}
	}
}

// sharing is a share of a rig's queue with n lines in it, with no worker around it.
func sharing(t *testing.T, n int) (*rig, *share, []*queue) {
	t.Helper()
	r := newRig(t)
	r.send(requests(n)...)
	s := &share{nc: r.conn.NC, js: r.conn.JS, id: "me", longGap: longGap, changed: func() {}, peers: map[string]peer{}}
	return r, s, []*queue{{model: "m", lane: proto.LaneNormal}}
}

// says takes in a heartbeat.
func (s *share) says(t *testing.T, w *proto.Worker) {
	t.Helper()
	b, err := w.Encode()
	must(t, err)
	s.hear(w.ID, b)
}

// readyWorker is one that is ready, with as many lines in flight as given.
func readyWorker(id string, inFlight int64) *proto.Worker {
	return &proto.Worker{ID: id, State: proto.EngineReady, Models: []string{"m"}, Limit: 16, InFlight: inFlight, LoadUS: 1}
}

// TestShareCounts: with whom lines are shared.
func TestShareCounts(t *testing.T) {
	_, s, taps := sharing(t, 100)
	for _, c := range []struct {
		name   string
		change func(*proto.Worker)
		want   int // of 100 lines
	}{
		{"ready", func(*proto.Worker) {}, 50},
		{"myself", func(w *proto.Worker) { w.ID = "me" }, 0},
		{"for another model", func(w *proto.Worker) { w.Models = []string{"b"} }, 0},
		{"for another model, too", func(w *proto.Worker) { w.Models = []string{"b", "m"} }, 50},
		{"full", func(w *proto.Worker) { w.InFlight = 15 }, 82},
		{"starts", func(w *proto.Worker) { w.State, w.LoadUS, w.Models = proto.EngineWaiting, 0, nil }, 50},
		{"has no queue yet", func(w *proto.Worker) { w.Models = nil }, 50},
		{"does not start", func(w *proto.Worker) {
			w.State, w.LoadUS, w.UptimeUS = proto.EngineWaiting, 0, 2*startLife.Microseconds()
		}, 0},
		{"died", func(w *proto.Worker) { w.State = proto.EngineWaiting }, 0},
		{"degraded", func(w *proto.Worker) { w.State = proto.EngineDegraded }, 0},
		{"hangs", func(w *proto.Worker) { w.State = proto.EngineHung }, 0},
		{"stops", func(w *proto.Worker) { w.State = proto.EngineDraining }, 0},
	} {
		clear(s.peers)
		w := readyWorker("other", 0)
		c.change(w)
		s.says(t, w)
		if got := s.look(t.Context(), taps, 200); got != c.want {
			t.Errorf("%s: %d lines, want %d", c.name, got, c.want)
		}
	}
}

// TestShareForgets: a worker that left, or was not heard for long, has no part.
func TestShareForgets(t *testing.T) {
	_, s, taps := sharing(t, 100)
	var changes atomic.Int64
	s.changed = func() { changes.Add(1) }
	s.says(t, readyWorker("a", 0))
	s.says(t, readyWorker("b", 0))
	s.says(t, readyWorker("b", 9))
	if got := s.look(t.Context(), taps, 200); got != 34 || changes.Load() != 2 {
		t.Errorf("%d lines for one of three, told of %d changes", got, changes.Load())
	}
	s.hear("a", nil)
	if got := s.look(t.Context(), taps, 200); got != 50 || changes.Load() != 3 {
		t.Errorf("%d lines for one of two, told of %d changes", got, changes.Load())
	}
	p := s.peers["b"]
	p.heard = p.heard.Add(-2 * peerLife)
	s.peers["b"] = p
	if got := s.look(t.Context(), taps, 200); got != 0 || !s.next.IsZero() {
		t.Errorf("%d lines for one alone, next look %v", got, s.next)
	}
}

// TestShareOfMany: while much is left nothing is asked and nothing kept back, and what was heard long ago is not believed.
func TestShareOfMany(t *testing.T) {
	_, s, taps := sharing(t, 100)
	s.says(t, readyWorker("a", 0))
	taps[0].pending.Store(1000)
	taps[0].heard.Store(int64(time.Since(born)))
	if got := s.look(t.Context(), taps, 200); got != 0 {
		t.Errorf("%d lines of 1000", got)
	}
	taps[0].heard.Store(int64(time.Since(born) - time.Minute))
	if got := s.look(t.Context(), taps, 200); got != 50 {
		t.Errorf("%d lines of 100", got)
	}
}

// TestShareGrows: what nobody comes for is taken by others, a quarter more at each look, until nothing is found.
func TestShareGrows(t *testing.T) {
	_, s, taps := sharing(t, 100)
	s.says(t, readyWorker("a", 0))
	looks := func(n int) (got []int) {
		for range n {
			got = append(got, s.look(t.Context(), taps, 90))
			s.next = time.Now() // it is due
		}
		return slices.Compact(got)
	}
	if got := looks(20); !slices.Equal(got[:4], []int{50, 62, 77, 96}) {
		t.Errorf("parts of %v", got)
	}
	s.empty()
	s.says(t, readyWorker("b", 0)) // another one comes
	if got := s.look(t.Context(), taps, 90); got != 34 || s.gap != firstGap {
		t.Errorf("part of %d, next look after %v", got, s.gap)
	}
}

// TestSharePhantoms: workers that say that they are ready and take nothing keep no line from one that does.
func TestSharePhantoms(t *testing.T) {
	r, f := newRig(t), newFake(t)
	release := make(chan struct{})
	f.set(func() { f.work = after(release) })
	kv, err := r.conn.JS.KeyValue(t.Context(), proto.WorkersBucket)
	must(t, err)
	for i := range 3 {
		w := readyWorker("phantom-"+strconv.Itoa(i), 0)
		b, err := w.Encode()
		must(t, err)
		_, err = kv.Put(t.Context(), w.ID, b)
		must(t, err)
	}
	const n = 100
	r.send(requests(n)...)
	r.start(f.engine(), func(w *Worker) { w.Concurrency = n })
	seen := map[string]bool{}
	for _, b := range f.enter(n) {
		seen[b] = true
	}
	if len(seen) != n {
		t.Errorf("%d lines at the engine, want %d", len(seen), n)
	}
	close(release)
	exactly(t, r.wait(n), n)
	r.settled(0)
}
