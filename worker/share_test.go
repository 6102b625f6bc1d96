package worker

import (
	"math"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

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
		if got := level(c.lines, c.hungry, c.full); int(math.Ceil(got)) != c.want {
			t.Errorf("%d lines, %d hungry, full %v: %.1f, want %d", c.lines, c.hungry, c.full, got, c.want)
		}
	}
}

// sharing is a share of a rig's queue with n lines in it, with no worker around it.
func sharing(t *testing.T, n int) (*rig, *share, []*queue) {
	t.Helper()
	r := newRig(t)
	r.send(requests(n)...)
	return r, &share{js: r.conn.JS, id: "me", longGap: longGap, peers: map[string]peer{}, nudge: func() {}}, []*queue{{model: "m", lane: proto.LaneNormal}}
}

// beats writes heartbeats.
func (r *rig) beats(ws ...*proto.Worker) {
	r.tb.Helper()
	for _, w := range ws {
		b, err := w.Encode()
		must(r.tb, err)
		_, err = r.heartbeats().Put(r.tb.Context(), w.ID, b)
		must(r.tb, err)
	}
}

func (r *rig) heartbeats() jetstream.KeyValue {
	r.tb.Helper()
	kv, err := r.conn.JS.KeyValue(r.tb.Context(), proto.WorkersBucket)
	must(r.tb, err)
	return kv
}

// looks is what a look finds before which the heartbeats are read.
func (s *share) looks(t *testing.T, taps []*queue, most int) int {
	s.end()
	s.found, s.read, s.fails = nil, time.Time{}, 0
	s.begin(t.Context(), time.Now(), false)
	s.end()
	return s.look(t.Context(), time.Now(), taps, most, 1)
}

// readyWorker is one that is ready, with as many lines in flight as given.
func readyWorker(id string, inFlight int64) *proto.Worker {
	return &proto.Worker{ID: id, State: proto.EngineReady, Models: []string{"m"}, Limit: 16, InFlight: inFlight, LoadUS: 1}
}

// TestShareCounts: with whom lines are shared.
func TestShareCounts(t *testing.T) {
	r, s, taps := sharing(t, 100)
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
		{"starts", func(w *proto.Worker) { w.State, w.LoadUS, w.Models, w.Limit = proto.EngineWaiting, 0, nil, 0 }, 50},
		{"has no queue yet", func(w *proto.Worker) { w.Models = nil }, 50},
		{"does not start", func(w *proto.Worker) {
			w.State, w.LoadUS, w.UptimeUS = proto.EngineWaiting, 0, 2*startLife.Microseconds()
		}, 0},
		{"died", func(w *proto.Worker) { w.State = proto.EngineWaiting }, 0},
		{"degraded", func(w *proto.Worker) { w.State = proto.EngineDegraded }, 0},
		{"hangs", func(w *proto.Worker) { w.State = proto.EngineHung }, 0},
		{"stops", func(w *proto.Worker) { w.State = proto.EngineDraining }, 0},
	} {
		w := readyWorker("other", 0)
		c.change(w)
		must(t, r.heartbeats().Delete(t.Context(), "other"))
		r.beats(w)
		if got := s.looks(t, taps, 200); got != c.want {
			t.Errorf("%s: %d lines, want %d", c.name, got, c.want)
		}
	}
}

// TestShareForgets: a worker that left, or was not heard for long, has no part.
func TestShareForgets(t *testing.T) {
	r, s, taps := sharing(t, 100)
	check := func(what string, want int) {
		t.Helper()
		if got := s.looks(t, taps, 200); got != want {
			t.Errorf("%s: %d lines, want %d", what, got, want)
		}
	}
	r.beats(readyWorker("a", 0), readyWorker("b", 0))
	check("one of three", 34)
	must(t, r.heartbeats().Delete(t.Context(), "a"))
	check("one of two", 50)
	must(t, r.heartbeats().Delete(t.Context(), "b"))
	check("alone", 0)
	r.beats(readyWorker("b", 0))
	check("one of two", 50)
	must(t, r.conn.JS.DeleteKeyValue(t.Context(), proto.WorkersBucket))
	check("nobody can tell", 0)
	if !s.next.IsZero() {
		t.Errorf("next look %v", s.next)
	}
}

// TestShareUnknown: until it is known who is there a worker takes few lines; where that cannot be told it shares with nobody,
// asks ever more rarely, and waits for no answer.
func TestShareUnknown(t *testing.T) {
	_, s, taps := sharing(t, 100)
	must(t, s.js.DeleteKeyValue(t.Context(), proto.WorkersBucket))
	now, readings := time.Now(), 0
	s.nudge = func() { readings++ }
	if got := s.look(t.Context(), now, taps, 200, 1); got != leastShare || s.next.IsZero() {
		t.Errorf("%d lines before it is known who is there", got)
	}
	for end := now.Add(10 * time.Minute); now.Before(end); now = now.Add(time.Second) {
		s.end()
		if got := s.look(t.Context(), now, taps, 200, 1); got != 0 {
			t.Fatalf("%d lines where nobody can tell", got)
		}
	}
	s.end()
	if readings < 10 || readings > 20 {
		t.Errorf("%d readings in ten minutes", readings)
	}
}

// TestShareOfMany: while much is left nothing is asked and nothing kept back, and what was heard long ago is not believed.
func TestShareOfMany(t *testing.T) {
	r, s, taps := sharing(t, 100)
	r.beats(readyWorker("a", 0))
	taps[0].pending.Store(1000)
	taps[0].heard.Store(int64(time.Since(born)))
	if got := s.looks(t, taps, 200); got != 0 {
		t.Errorf("%d lines of 1000", got)
	}
	taps[0].heard.Store(int64(time.Since(born) - time.Minute))
	if got := s.looks(t, taps, 200); got != 50 {
		t.Errorf("%d lines of 100", got)
	}
}

// TestShareIdle: a worker that waits for lines asks nothing, and takes few until it knows that there are more.
func TestShareIdle(t *testing.T) {
	r, s, taps := sharing(t, 100)
	r.beats(readyWorker("a", 0))
	asked, err := r.conn.NC.SubscribeSync("$JS.API.>")
	must(t, err)
	must(t, r.conn.NC.Flush())
	if got := s.look(t.Context(), time.Now(), taps, 200, 0); got != leastShare {
		t.Errorf("%d lines where none has come", got)
	}
	must(t, r.conn.NC.Flush())
	if n, _, err := asked.Pending(); n > 0 || err != nil {
		t.Errorf("asked %d times (%v)", n, err)
	}
	if got := s.looks(t, taps, 200); got != 50 {
		t.Errorf("%d lines when one has come, want 50", got)
	}
	must(t, asked.Unsubscribe())
}

// TestShareReads: the more workers there are the more rarely one reads what they say, and more rarely still while there is
// enough for all; a new one reads at once.
func TestShareReads(t *testing.T) {
	for _, c := range []struct {
		workers, behind int
		age             time.Duration // of this worker
		least, most     int           // readings in a minute
	}{
		{4, 0, time.Hour, 29, 31},
		{50, 0, time.Hour, 11, 13},
		{200, 0, time.Hour, 3, 4},
		{50, 1e6, time.Hour, 2, 3},
		{4, 0, 0, 40, 60},
		{200, 0, 0, 10, 15},
	} {
		r, s, taps := sharing(t, 100)
		for i := range c.workers - 1 {
			r.beats(readyWorker(strconv.Itoa(i), 0))
		}
		got := 0
		s.nudge = func() { got++ }
		now := time.Now()
		s.began = now.Add(-c.age)
		taps[0].pending.Store(int64(c.behind))
		for end := now.Add(time.Minute); now.Before(end); now = now.Add(100 * time.Millisecond) {
			taps[0].heard.Store(int64(now.Sub(born)))
			s.look(t.Context(), now, taps, 200, 1)
			s.end()
		}
		if got < c.least || got > c.most || len(s.peers) != c.workers-1 {
			t.Errorf("%+v: read %d times, know %d others", c, got, len(s.peers))
		}
	}
}

// TestShareOfModels: each model is shared by those that serve it.
func TestShareOfModels(t *testing.T) {
	r, s, taps := sharing(t, 100)
	r.model = "b"
	r.declare(0)
	r.send(requests(4)...)
	taps = append(taps, &queue{model: "b", lane: proto.LaneNormal})
	w := readyWorker("other", 0)
	w.Models = []string{"b"}
	r.beats(w)
	if got := s.looks(t, taps, 200); got != 102 {
		t.Errorf("%d lines, want all 100 of one model and two of the other's four", got)
	}
	for i := range mostModels {
		taps = append(taps, &queue{model: strconv.Itoa(i), lane: proto.LaneNormal})
	}
	asked, err := r.conn.NC.SubscribeSync("$JS.API.>")
	must(t, err)
	must(t, r.conn.NC.Flush())
	if got := s.look(t.Context(), time.Now(), taps, 200, 1); got != 0 {
		t.Errorf("%d lines of too many models to ask of", got)
	}
	must(t, r.conn.NC.Flush())
	if n, _, err := asked.Pending(); n > 0 || err != nil {
		t.Errorf("asked %d times (%v)", n, err)
	}
	must(t, asked.Unsubscribe())
}

// TestShareGrows: what nobody comes for is taken by others, a quarter more at each look, until nothing is found.
func TestShareGrows(t *testing.T) {
	r, s, taps := sharing(t, 100)
	r.beats(readyWorker("a", 0))
	s.looks(t, taps, 90)
	s.free()
	now := time.Now()
	looks := func(n int) (got []int) {
		for range n {
			got = append(got, s.look(t.Context(), now, taps, 90, 1))
			now = s.next
		}
		return slices.Compact(got)
	}
	if got := looks(20); !slices.Equal(got[:4], []int{50, 62, 77, 96}) {
		t.Errorf("parts of %v", got)
	}
	s.empty()
	if got := s.look(t.Context(), now.Add(-time.Millisecond), taps, 90, 1); got != 50 {
		t.Errorf("part of %d when nothing was found", got)
	}
	r.beats(readyWorker("b", 0)) // another one comes
	if got := s.looks(t, taps, 90); got != 34 || s.gap != firstGap {
		t.Errorf("part of %d, next look after %v", got, s.gap)
	}
}

// TestShareOfMore: when many more lines come, or this worker could not take its part for a while, others are waited for again.
func TestShareOfMore(t *testing.T) {
	r, s, taps := sharing(t, 100)
	r.beats(readyWorker("a", 0))
	s.looks(t, taps, 400)
	s.free()
	now := time.Now()
	for range 10 {
		s.look(t.Context(), now, taps, 400, 1)
		now = s.next
	}
	if s.extra == 0 {
		t.Fatal("nothing was taken that nobody else came for")
	}
	s.end()
	s.learn()
	kept := *s
	if got := s.look(t.Context(), now, taps, 10, 1); got < 10 || !s.looked(now.Add(firstGap/2)) {
		t.Errorf("%d lines where 10 can be taken, next look %v", got, s.next)
	}
	if got := s.look(t.Context(), now, taps, 400, 1); got != 50 {
		t.Errorf("%d lines of 100 when more can be taken", got)
	}
	s.end() // a reading that a look has begun
	*s = kept
	r.send(requests(300)...)
	if got := s.look(t.Context(), now, taps, 400, 1); got != 200 {
		t.Errorf("%d lines of 400", got)
	}
}

// TestShareLeast: less than two lines are nobody's part, and so many more are taken at each look that nobody comes for.
func TestShareLeast(t *testing.T) {
	r, s, taps := sharing(t, 1)
	r.beats(readyWorker("a", 0))
	if got := s.looks(t, taps, 200); got != leastShare {
		t.Errorf("%d lines where one is left", got)
	}
	for range 10 {
		s.look(t.Context(), s.next, taps, 200, 1)
	}
	if s.extra < leastShare {
		t.Errorf("%d more than its part when nobody has come", s.extra)
	}
}

// TestShareBrief: who has just looked does not ask again, the less so the more others do the same.
func TestShareBrief(t *testing.T) {
	_, s, _ := sharing(t, 0)
	s.last = time.Now()
	s.next = s.last.Add(time.Second)
	for i := range 100 {
		if at := s.last.Add(2 * firstGap); s.looked(at) != (i > 40) || !s.looked(s.last.Add(firstGap/2)) {
			t.Errorf("%d others: looked %v", i, s.looked(at))
		}
		s.peers[strconv.Itoa(i)] = peer{}
	}
}

// TestSharePhantoms: workers that say that they are ready and take nothing keep no line from one that does.
func TestSharePhantoms(t *testing.T) {
	r, f := newRig(t), newFake(t)
	release := make(chan struct{})
	f.set(func() { f.work = after(release) })
	for i := range 3 {
		r.beats(readyWorker("phantom-"+strconv.Itoa(i), 0))
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
