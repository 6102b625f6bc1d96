package worker

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"millrace/proto"
)

// TestNoRoute: an engine whose address is wrong lists its models and knows no line's route. It is told of at the first
// line, and none fails, however many it has had.
func TestNoRoute(t *testing.T) {
	for _, c := range []struct {
		name   string
		rival  bool
		status int
		body   string
	}{
		{"vLLM", true, 404, `{"detail":"Not Found"}`},
		{"alone", false, 404, "404 page not found"},
		{"another method", true, 405, "<html>405 Not Allowed</html>"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, f := newRig(t), newFake(t)
			const n = 200
			f.set(func() { f.work = says(c.status, c.body) })
			if c.rival {
				r.rival()
			}
			r.send(requests(n)...)
			r.start(f.engine(), func(w *Worker) {
				w.Concurrency, w.refusal = 64, time.Millisecond
				if !c.rival {
					w.RetryEvery = time.Hour
				}
			})
			r.reason(proto.EngineDegraded, "engine has no route /v1/chat/completions (HTTP "+strconv.Itoa(c.status))
			if !c.rival {
				r.settled(n)
				return
			}
			f.enter(64 + patience) // it tries on, when nothing else is in flight
			f.set(func() { f.work = f.ok })
			r.unblamed(n)
		})
	}
}

// TestNoRouteOfSome: an engine that does without one of two routes is well; only the lines of that one fail, in
// whatever order they come.
func TestNoRouteOfSome(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() {
		f.work = func(w http.ResponseWriter, q *http.Request, body string) {
			if q.URL.Path == "/v1/embeddings" {
				say(w, 404, `{"detail":"Not Found"}`)
				return
			}
			say(w, 200, okBody)
		}
	})
	const n = 60
	reqs := requests(n)
	for _, q := range reqs[:n/2] {
		q.URL = "/v1/embeddings"
	}
	r.send(reqs...)
	r.start(f.engine(), func(w *Worker) { w.Concurrency, w.refusal = 4, time.Millisecond })
	for i, res := range exactly(t, r.wait(n), n) {
		if res.OK != (i >= n/2) || !res.OK && (res.Code != proto.CodeInvalidRequest || res.Status != 404) {
			t.Errorf("index %d: %+v", i, res)
		}
	}
	r.state(proto.EngineReady)
	r.settled(0)
}

// TestNoRouteAtAll: a job for a route that nobody has ends.
func TestNoRouteAtAll(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = says(404, `{"detail":"Not Found"}`) })
	r.send(requests(50)...)
	r.start(f.engine(), func(w *Worker) { w.refusal = time.Millisecond })
	for _, res := range exactly(t, r.wait(50), 50) {
		if res.OK || res.Status != 404 || len(res.Attempts) > 0 {
			t.Fatalf("result %+v", res)
		}
	}
	r.settled(0)
}

// TestDoubt: errors of an engine that has answered nothing yet wait for its first answer, and end their lines then.
func TestDoubt(t *testing.T) {
	r, f := newRig(t), newFake(t)
	release := make(chan struct{})
	f.set(func() {
		f.work = func(w http.ResponseWriter, q *http.Request, body string) {
			if strings.Contains(body, `"0"`) {
				after(release)(w, q, body)
				return
			}
			say(w, 400, recording(t, file032, "err_temperature_9").Body)
		}
	})
	r.send(requests(equalLimit - 1)...)
	r.start(f.engine(), func(w *Worker) { w.grace = time.Hour })
	f.enter(equalLimit - 1)
	if got := len(r.seen()); got > 0 {
		t.Errorf("%d lines have ended", got)
	}
	close(release)
	for i, res := range exactly(t, r.wait(equalLimit-1), equalLimit-1) {
		if res.OK != (i == 0) {
			t.Errorf("index %d: %+v", i, res)
		}
	}
	r.settled(0)
}

// TestDoubtOfFew: a job of few lines that are all wrong has nothing else to tell by, and ends.
func TestDoubtOfFew(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = says(400, recording(t, file032, "err_temperature_9").Body) })
	r.send(requests(3)...)
	r.start(f.engine())
	exactly(t, r.wait(3), 3)
	r.settled(0)
}

// TestDoubtElsewhere: few lines that an engine which has answered nothing well fails are left to another worker, which answers
// them. They are charged once, however often the first one has them.
func TestDoubtElsewhere(t *testing.T) {
	r, f, well := newRig(t), newFake(t), newFake(t)
	f.set(func() { f.work = says(400, recording(t, file032, "err_temperature_9").Body) })
	r.rival()
	r.send(requests(3)...)
	w := r.start(f.engine(), func(w *Worker) { w.grace, w.refusal = time.Millisecond, time.Millisecond })
	f.enter(9)
	w.leave()
	w.end(t)
	r.start(well.engine())
	for _, res := range exactly(t, r.wait(3), 3) {
		if !res.OK || len(res.Attempts) != 1 || res.Attempts[0].Worker == res.Worker {
			t.Errorf("result %+v", res)
		}
	}
	r.settled(0)
}

// TestDoubtOfLastAttempt: a line that has one attempt is left to another worker uncharged, so that it does not have two,
// and ends there.
func TestDoubtOfLastAttempt(t *testing.T) {
	for _, c := range []struct {
		name string
		of   int // attempts of the worker; 0: those of the line
	}{{"of the worker", 1}, {"of the line", 0}} {
		t.Run(c.name, func(t *testing.T) {
			r, f, well := newRig(t), newFake(t), newFake(t)
			f.set(func() { f.work = says(400, recording(t, file032, "err_temperature_9").Body) })
			r.rival()
			reqs := requests(3)
			for _, q := range reqs {
				if c.of == 0 {
					q.MaxAttempts = 1
				}
			}
			r.send(reqs...)
			w := r.start(f.engine(), func(w *Worker) {
				w.grace, w.refusal, w.MaxAttempts = time.Millisecond, time.Millisecond, c.of
			})
			f.enter(9)
			w.leave()
			w.end(t)
			r.start(well.engine())
			for _, res := range exactly(t, r.wait(3), 3) {
				if !res.OK || len(res.Attempts) != 0 {
					t.Errorf("result %+v", res)
				}
			}
			r.settled(0)
		})
	}
}

// TestDoubtOfTwo: few lines that two workers fail, neither of which has answered one well, end when both have had them,
// also where they have one attempt.
func TestDoubtOfTwo(t *testing.T) {
	for _, most := range []int{1, 4} {
		t.Run(fmt.Sprintf("attempts %d", most), func(t *testing.T) {
			r := newRig(t)
			var calls atomic.Int64
			for range 2 {
				f := newFake(t)
				f.set(func() {
					f.work = func(w http.ResponseWriter, _ *http.Request, _ string) {
						calls.Add(1)
						say(w, 400, recording(t, file032, "err_temperature_9").Body)
					}
				})
				r.start(f.engine(), func(w *Worker) { w.grace, w.refusal, w.MaxAttempts = time.Millisecond, time.Millisecond, most })
			}
			r.until("two are ready", func() bool {
				ws := r.workers()
				return len(ws) == 2 && ws[0].State == proto.EngineReady && ws[1].State == proto.EngineReady && len(ws[0].Models)+len(ws[1].Models) == 2
			})
			r.send(request(0))
			res := r.wait(1)[0]
			if res.OK || res.Status != 400 || len(res.Attempts) != min(most-1, 1) || most > 1 && res.Attempts[0].Worker == res.Worker {
				t.Errorf("result %+v", res)
			}
			if n := calls.Load(); n < 2 || n >= 30 {
				t.Errorf("%d calls", n)
			}
			r.settled(0)
		})
	}
}

// TestDoubtOfUnlike: an engine that has answered no line well is not believed because it fails each in another way,
// as long as another worker is there: no line fails.
func TestDoubtOfUnlike(t *testing.T) {
	for _, c := range []struct {
		name, reason string
		words        func(n int64) string
	}{
		{"ids", "in a row alike: HTTP 400: no such tenant", func(n int64) string { return fmt.Sprintf("no such tenant (request %08x-%x-f0)", n*2654435761, n) }},
		{"words", "engine failed 20 lines in a row, the last: HTTP 400: no ", letters},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, f := newRig(t), newFake(t)
			const n = 200
			f.set(func() { f.work = unlike(c.words) })
			r.rival()
			r.send(requests(n)...)
			r.start(f.engine(), func(w *Worker) {
				w.Concurrency, w.refusal, w.grace = 64, time.Millisecond, time.Hour
			})
			r.reason(proto.EngineDegraded, c.reason)
			f.enter(64 + patience) // it tries on, when nothing else is in flight
			f.set(func() { f.work = f.ok })
			r.unblamed(n)
		})
	}
}

// TestDoubtOfUnlikeAlone: a job whose every line is wrong in another way ends where nobody else is there.
func TestDoubtOfUnlikeAlone(t *testing.T) {
	r, f := newRig(t), newFake(t)
	const n = 200
	f.set(func() { f.work = unlike(letters) })
	r.send(requests(n)...)
	r.start(f.engine(), func(w *Worker) { w.refusal, w.grace = time.Millisecond, time.Hour })
	r.reason(proto.EngineDegraded, "let fail")
	for _, res := range exactly(t, r.wait(n), n) {
		if res.OK || res.Status != 400 || len(res.Attempts) > 0 {
			t.Fatalf("result %+v", res)
		}
	}
	r.settled(0)
}

// TestNoRouteOfTwo: two routes that an engine does not have, and says so of each in its own way.
func TestNoRouteOfTwo(t *testing.T) {
	r, f := newRig(t), newFake(t)
	const n = 100
	f.set(func() {
		f.work = func(w http.ResponseWriter, q *http.Request, _ string) {
			say(w, 404, "no handler for "+strings.ReplaceAll(q.URL.Path, "/", " "))
		}
	})
	r.rival()
	reqs := requests(n)
	for i := range n / 2 {
		reqs[2*i].URL = "/v1/embeddings"
	}
	r.send(reqs...)
	r.start(f.engine(), func(w *Worker) { w.Concurrency, w.refusal, w.RetryEvery = 64, time.Millisecond, 10*time.Millisecond })
	r.reason(proto.EngineDegraded, "engine has no route")
	f.enter(64 + 4*patience) // it tries on, when nothing else is in flight
	f.set(func() { f.work = f.ok })
	r.unblamed(n)
}

// unlike makes a handler that refuses each line in other words.
func unlike(words func(int64) string) func(http.ResponseWriter, *http.Request, string) {
	var n atomic.Int64
	return func(w http.ResponseWriter, _ *http.Request, _ string) {
		say(w, 400, fmt.Sprintf(`{"error":{"message":%q,"type":"BadRequestError","param":null,"code":400}}`, words(n.Add(1))))
	}
}

// letters are other words for each number, without a digit.
func letters(n int64) string {
	return "no " + strings.Map(func(c rune) rune { return c - '0' + 'a' }, strconv.FormatInt(n, 10))
}

// TestDoubtInTime: a verdict that comes in the moment in which the time is over counts.
func TestDoubtInTime(t *testing.T) {
	g := aloneGate(t)
	for range 100 {
		d := g.doubt("400 no", time.Now())
		g.mu.Lock()
		g.resolve(false)
		g.mu.Unlock()
		if g.believe(t.Context(), d, 0) {
			t.Fatal("the line is blamed")
		}
	}
}

// TestDoubtOfLate: a line that went in while the engine was degraded is not blamed when it fails after a success; one
// that went in later is.
func TestDoubtOfLate(t *testing.T) {
	g := aloneGate(t)
	g.others = func(_ string, then func(bool)) { then(true) }
	l := &line{req: &proto.Request{}, queue: &queue{model: "m"}, started: time.Now()}
	for i := range int64(equalLimit) {
		g.failed(&outcome{line: l, verdict: verdict{class: classPermanent, same: letters(i), message: letters(i)}})
	}
	g.success(time.Now())
	if !g.condemned("400 no", l.started) {
		t.Error("a line of before is blamed")
	}
	if d := g.doubt("400 no", l.started); d == nil || g.believe(t.Context(), d, time.Hour) {
		t.Error("a line of before is blamed")
	}
	if g.condemned("400 no", time.Now()) || g.doubt("400 no", time.Now()) != nil {
		t.Error("a line of after is given back")
	}
}

// TestDoubtAtStop: a worker that stops meanwhile leaves the lines to others.
func TestDoubtAtStop(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = says(400, recording(t, file032, "err_temperature_9").Body) })
	r.send(requests(3)...)
	w := r.start(f.engine(), func(w *Worker) { w.grace, w.refusal = time.Hour, time.Millisecond })
	f.enter(3)
	w.leave()
	w.end(t)
	r.settled(3)
	if got := len(r.seen()); got > 0 {
		t.Errorf("%d lines have ended", got)
	}
}

// TestNoRouteOrLine: what tells a route that an engine does not have from a line that asks for something it does not have.
func TestNoRouteOrLine(t *testing.T) {
	for _, c := range []struct {
		status int
		body   string
		want   bool
	}{
		{404, "", true},
		{404, "<html>404 Not Found</html>", true},
		{404, `{"detail":"Not Found"}`, true},
		{405, `{"detail":"Method Not Allowed"}`, true},
		{404, `{"error":{"message":"Response with id 'x' not found.","type":"invalid_request_error","param":"response_id","code":404}}`, false},
		{404, recording(t, file032, "err_unknown_model").Body, false},
		{400, `{"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}`, false},
	} {
		if v := classify("/v1/completions", Answer{Status: c.status, Body: []byte(c.body)}, nil); v.noRoute != c.want {
			t.Errorf("%d %s: no route %v", c.status, c.body, v.noRoute)
		}
	}
}
