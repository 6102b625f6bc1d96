package worker

import (
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"millrace/proto"
)

// mortal makes the fake die of lines whose body holds "poison": every connection breaks, and /health says 503.
type mortal struct {
	f    *fake
	mu   sync.Mutex
	dead chan struct{} // closed at a death
	n    int
	held int // lines that wait for a death, rather than being answered
}

func newMortal(tb testing.TB) *mortal {
	m := &mortal{f: newFake(tb), dead: make(chan struct{})}
	m.f.work = m.work
	return m
}

func (m *mortal) work(w http.ResponseWriter, r *http.Request, body string) {
	m.mu.Lock()
	dead, wait := m.dead, m.held > 0
	if wait {
		m.held--
	}
	m.mu.Unlock()
	if strings.Contains(body, "poison") {
		m.die()
		panic(http.ErrAbortHandler)
	}
	if wait {
		select {
		case <-dead:
			panic(http.ErrAbortHandler)
		case <-r.Context().Done():
			return
		}
	}
	say(w, 200, okBody)
}

// die breaks what is in flight and is ill for one probe.
func (m *mortal) die() {
	m.f.set(func() { m.f.health, m.f.illness = 503, 0 })
	m.mu.Lock()
	m.n++
	m.held = 0
	close(m.dead)
	m.dead = make(chan struct{})
	m.mu.Unlock()
}

// toHold is how many lines are to be held that have not come yet.
func (m *mortal) toHold() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held
}

// seenDead is how many deaths a probe has seen.
func (m *mortal) seenDead() int {
	m.f.mu.Lock()
	defer m.f.mu.Unlock()
	if m.f.illness == 0 {
		return 0
	}
	return m.deaths()
}

func (m *mortal) deaths() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.n
}

// TestEngineDies: what was in flight goes back, uncharged, with a suspicion, and no line fails.
func TestEngineDies(t *testing.T) {
	r, m := newRig(t), newMortal(t)
	m.held = 8
	r.send(requests(8)...)
	r.start(m.f.engine(), func(w *Worker) { w.Concurrency = 8 })
	r.until("8 lines are held", func() bool { return m.toHold() == 0 })
	m.die()
	r.state(proto.EngineWaiting)
	r.until("lines are back", func() bool {
		got := r.takeAll()
		return len(got) == 8 && got[0].Suspicions == 1 && len(got[0].Attempts) == 0
	})
	m.f.set(func() { m.f.health = 200 })
	for _, res := range exactly(t, r.wait(8), 8) {
		if !res.OK || len(res.Attempts) > 0 {
			t.Errorf("result %+v", res)
		}
	}
	r.settled(0)
}

// TestCoreDies: the Python frontend answers for its dead core.
func TestCoreDies(t *testing.T) {
	r, f := newRig(t), newFake(t)
	var n atomic.Int64
	all := make(chan struct{})
	f.set(func() {
		f.work = func(w http.ResponseWriter, r *http.Request, body string) {
			if n.Add(1) == 4 { // all are there when it dies
				f.set(func() { f.health = 503 })
				close(all)
			}
			<-all
			says(500, coreDied)(w, r, body)
		}
	})
	r.send(requests(4)...)
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 4 })
	f.enter(4)
	r.state(proto.EngineWaiting)
	r.until("lines are back", func() bool { got := r.takeAll(); return len(got) == 4 && got[0].Suspicions == 1 })
	f.set(func() { f.health, f.work = 200, f.ok })
	for _, res := range exactly(t, r.wait(4), 4) {
		if !res.OK || len(res.Attempts) > 0 {
			t.Errorf("result %+v", res)
		}
	}
}

// TestEngineDrains: an engine that stops finishes what it has and takes nothing in, while it looks well.
func TestEngineDrains(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = says(500, stopping) })
	r.send(requests(4)...)
	r.start(f.engine())
	r.reason(proto.EngineWaiting, "stopping")
	f.set(func() { f.work = f.ok })
	for _, res := range exactly(t, r.wait(4), 4) {
		if !res.OK || len(res.Attempts) > 0 {
			t.Errorf("result %+v", res)
		}
	}
}

// TestPoison: a line that kills its engine fails in the end, and its neighbours live.
func TestPoison(t *testing.T) {
	r, m := newRig(t), newMortal(t)
	const n = 30
	reqs := requests(n)
	reqs[7].Body = []byte(`{"model":"m","messages":[{"role":"user","content":"poison"}]}`)
	m.held = 6
	r.send(reqs...)
	r.start(m.f.engine(), func(w *Worker) { w.Concurrency = 16 })
	for dead := 0; dead < guilty; { // it gets well after each death
		r.until("death", func() bool { return m.deaths() > dead })
		dead = m.deaths()
		r.until("a probe sees it", func() bool { return m.seenDead() == dead })
		m.f.set(func() { m.f.health = 200 })
	}
	for i, res := range exactly(t, r.wait(n), n) {
		want := ""
		if i == 7 {
			want = proto.CodeEngineCrash
		}
		if res.OK != (want == "") || res.Code != want || res.Status != 0 && want != "" || len(res.Attempts) > 0 {
			t.Errorf("index %d: %+v", i, res)
		}
	}
	if m.deaths() != guilty {
		t.Errorf("%d deaths, want %d", m.deaths(), guilty)
	}
	r.settled(0)
}

// TestBrokenConnection: an engine that is well all the time and a connection that broke: charged, and done again.
func TestBrokenConnection(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = cut })
	r.send(request(0))
	r.start(f.engine())
	f.enter(1)
	f.set(func() { f.work = f.ok })
	got := r.wait(1)[0]
	if !got.OK || len(got.Attempts) != 1 || got.Attempts[0].Code != proto.CodeTransport || got.Attempts[0].Status != 0 {
		t.Errorf("result %+v", got)
	}
	if a := got.Attempts[0]; a.Worker != got.Worker || a.DurationUS <= 0 || a.Message == "" {
		t.Errorf("attempt %+v", a)
	}
}

// TestTorn: half a body, then the end.
func TestTorn(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() {
		f.work = func(w http.ResponseWriter, _ *http.Request, _ string) {
			w.Header().Set("Content-Length", "1000")
			say(w, 200, okBody)
		}
	})
	r.send(request(0))
	r.start(f.engine(), func(w *Worker) { w.MaxAttempts = 1 })
	got := r.wait(1)[0]
	if got.OK || got.Code != proto.CodeTransport || got.Status != 0 || got.Body != nil || got.Message == "" {
		t.Errorf("result %+v", got)
	}
}

// TestSlots looks at the rules for suspects without a broker.
func TestSlots(t *testing.T) {
	started := make(chan *line, 100)
	hold := map[int64]chan struct{}{}
	for i := range int64(100) {
		hold[i] = make(chan struct{})
	}
	back := make(chan int64, 100)
	s := &slots{more: func() {}, back: func(l *line) { back <- l.req.Index }}
	s.run = func(l *line) {
		started <- l
		<-hold[l.req.Index]
	}
	put := func(i, suspicions int64) { s.offer(&line{req: &proto.Request{Index: i, Suspicions: suspicions}}) }
	come := func(want ...int64) (lines []*line) {
		t.Helper()
		got := map[int64]bool{}
		for range want {
			l := <-started
			got[l.req.Index] = true
			lines = append(lines, l)
		}
		for _, i := range want {
			if !got[i] {
				t.Fatalf("%v were started, want %v", got, want)
			}
		}
		return lines
	}
	s.setLimit(32, 1, false)
	put(0, 0)
	fresh := come(0)[0]
	for i := range int64(9) {
		put(10+i, 1) // eight run, one waits
	}
	some := come(10, 11, 12, 13, 14, 15, 16, 17)
	if got := s.doubted(); got != "few at a time of 1 line that an engine may have died of" {
		t.Errorf("said %q", got)
	}
	for i := range int64(3) {
		put(20+i, 2) // two run beside them
	}
	more := come(20, 21)
	if !s.lost(fresh) || !s.lost(some[0]) || s.lost(more[0]) {
		t.Error("not those are blamed that were suspected most")
	}
	hold[20] <- struct{}{}
	come(22)
	hold[21] <- struct{}{}
	hold[22] <- struct{}{}
	s.wait(func() bool { return len(s.running) == 9 })
	if !s.lost(some[0]) {
		t.Error("it is forgotten that one was there which was suspected more")
	}
	put(30, 3)
	put(40, 0)
	if room, _ := s.room(); s.inFlight() != 9 || room != 0 {
		t.Errorf("%d run, room %d", s.inFlight(), room)
	}
	for _, i := range []int64{0, 10, 11, 12, 13, 14, 15, 16, 17} { // the engine empties, and 30 runs alone
		hold[i] <- struct{}{}
	}
	if l := come(30)[0]; !l.alone {
		t.Error("it does not run alone")
	}
	hold[30] <- struct{}{}
	come(18, 40)
	for i := range int64(41) {
		put(50+i, 1) // seven run, 32 wait, two go back
	}
	come(50, 51, 52, 53, 54, 55, 56)
	if a, b := <-back, <-back; a < 89 || b < 89 {
		t.Errorf("%d and %d went back", a, b)
	}
	for _, i := range []int64{18, 40} {
		hold[i] <- struct{}{}
	}
	for i := range int64(39) {
		hold[50+i] <- struct{}{}
	}
	s.wg.Wait()
	s.setLimit(9, 1, false)
	if room, _ := s.room(); room != 10 {
		t.Errorf("room %d", room)
	}
	s.stepAway(manyAway)
	if room, _ := s.room(); room != 10 {
		t.Errorf("room %d with %d away", room, manyAway)
	}
	s.stepAway(3)
	if room, _ := s.room(); room != 7 {
		t.Errorf("room %d with %d away", room, manyAway+3)
	}
}

// TestSlotsAfterDeath: an engine that comes back begins with few lines, and suspects run a quarter of those at a time that were in
// flight when it died.
func TestSlotsAfterDeath(t *testing.T) {
	started, end := make(chan *line, 100), make(chan struct{})
	s := &slots{more: func() {}, back: func(*line) { t.Error("one went back") }}
	s.run = func(l *line) {
		started <- l
		<-end
	}
	put := func(n int, suspicions int64) (lines []*line) {
		for range n {
			lines = append(lines, &line{req: &proto.Request{Suspicions: suspicions}})
			s.offer(lines[len(lines)-1])
		}
		return lines
	}
	run := func(n int) {
		t.Helper()
		for range n {
			<-started
		}
		if got := s.inFlight(); got != n {
			t.Errorf("%d in flight, want %d", got, n)
		}
	}
	s.setLimit(32, 1, false)
	all := put(32, 0)
	run(32)
	lost := func() {
		for _, l := range all { // the engine dies
			s.lost(l)
			end <- struct{}{}
		}
		s.wait(func() bool { return len(s.running) == 0 })
	}
	lost()
	s.setLimit(16, 1, false)
	put(32, 1)
	run(8)
	close(end)
	s.wg.Wait()
	s.setLimit(16, 1, false) // at the next death so many are in flight
	started, end = make(chan *line, 100), make(chan struct{})
	all = put(16, 0)
	run(16)
	lost()
	put(16, 1)
	run(4)
	close(end)
	s.wg.Wait()
}

// wait waits until something holds of the slots.
func (s *slots) wait(ok func() bool) {
	for {
		s.mu.Lock()
		done := ok()
		s.mu.Unlock()
		if done {
			return
		}
		runtime.Gosched()
	}
}

// TestSlotsComeBack: lines that come back from their wait make room, and the feeder hears of it.
func TestSlotsComeBack(t *testing.T) {
	more := 0
	s := &slots{more: func() { more++ }}
	s.setLimit(8, 1, false)
	s.stepAway(manyAway + 9)
	before := more
	if room, _ := s.room(); room != 0 || before != 1 {
		t.Errorf("room %d, told %d times", room, before)
	}
	s.stepAway(-1)
	if room, _ := s.room(); room != 1 || more != before+1 {
		t.Errorf("room %d, told %d times", room, more)
	}
}
