package worker

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/proto"
)

// unblamed waits for the results of n lines, all ok and none charged.
func (r *rig) unblamed(n int) {
	r.tb.Helper()
	for i, res := range exactly(r.tb, r.wait(n), n) {
		if !res.OK || len(res.Attempts) > 0 {
			r.tb.Errorf("index %d: %+v", i, res)
		}
	}
	r.settled(0)
}

// gaveBack waits until so many lines were given back because of the engine.
func (r *rig) gaveBack(reg *prometheus.Registry, reason string, n float64) {
	r.tb.Helper()
	r.until(fmt.Sprintf("%v lines given back for %s", n, reason), func() bool {
		return labelled(r.tb, reg, "millrace_worker_given_back_total", "reason", reason) >= n
	})
}

// labelled is the value of the counter with a label.
func labelled(tb testing.TB, reg *prometheus.Registry, name, label, value string) float64 {
	tb.Helper()
	families, err := reg.Gather()
	must(tb, err)
	for _, f := range families {
		for _, m := range f.Metric {
			for _, l := range m.Label {
				if f.GetName() == name && l.GetName() == label && l.GetValue() == value {
					return m.Counter.GetValue()
				}
			}
		}
	}
	return 0
}

// TestHungForLong: an engine that hangs all night is tried line by line, and fails none of them.
func TestHungForLong(t *testing.T) {
	r, f := newRig(t), newFake(t)
	reg := prometheus.NewRegistry()
	f.set(func() { f.metrics, f.work = gauges(3, 100), blocks })
	r.send(requests(3)...)
	r.start(f.engine(), func(w *Worker) { w.StallTimeout, w.refusal, w.Registry = 60*time.Millisecond, time.Millisecond, reg })
	r.gaveBack(reg, "engine", 2*guilty*3)
	f.set(func() { f.metrics, f.work = gauges(0, 200), f.ok })
	r.unblamed(3)
}

// TestHungBeforeTheStallTimeout: lines with less time than that are not charged for an engine that hangs.
func TestHungBeforeTheStallTimeout(t *testing.T) {
	r, f := newRig(t), newFake(t)
	reg := prometheus.NewRegistry()
	f.set(func() { f.metrics, f.work = gauges(3, 100), blocks })
	r.send(requests(3)...)
	r.start(f.engine(), func(w *Worker) {
		w.StallTimeout, w.RequestTimeout, w.refusal, w.Registry = time.Hour, 100*time.Millisecond, time.Millisecond, reg
	})
	r.reason(proto.EngineHung, "made no token")
	r.gaveBack(reg, "engine", 2*guilty)
	f.set(func() { f.metrics, f.work = gauges(0, 200), f.ok })
	r.unblamed(3)
}

// TestSlowAlone: a line that takes longer than the stall timeout before its first token, each time, ends as too slow:
// its engine has not crashed.
func TestSlowAlone(t *testing.T) {
	r, f := newRig(t), newFake(t)
	var n atomic.Int64
	f.set(func() {
		f.metrics = gauges(0, 100)
		f.work = func(w http.ResponseWriter, q *http.Request, body string) {
			f.set(func() { f.metrics = gauges(1, 100+int(n.Load())) })
			<-q.Context().Done()
			f.set(func() { f.metrics = gauges(0, 100+int(n.Add(1))) }) // it is alive again as soon as it is let go of
		}
	})
	r.send(request(0))
	r.start(f.engine(), func(w *Worker) { w.StallTimeout, w.refusal = 100*time.Millisecond, time.Millisecond })
	got := r.wait(1)[0]
	if got.OK || got.Code != proto.CodeRequestTimeout || !strings.Contains(got.Message, "--stall-timeout") || len(got.Attempts) != 1 {
		t.Errorf("result %+v", got)
	}
	r.settled(0)
}

// TestProxyWithoutBackend: something before the engine looks well and says 502 while the engine loads.
func TestProxyWithoutBackend(t *testing.T) {
	r, f := newRig(t), newFake(t)
	reg := prometheus.NewRegistry()
	f.set(func() { f.work = says(502, "<html>502 Bad Gateway</html>") })
	r.send(requests(3)...)
	r.start(f.engine(), func(w *Worker) { w.refusal, w.Registry = time.Millisecond, reg })
	r.gaveBack(reg, "engine", 2*guilty)
	f.set(func() { f.work = f.ok })
	r.unblamed(3)
}

// TestKeyChangesMeanwhile: what is in the engine when it begins to refuse the key goes on.
func TestKeyChangesMeanwhile(t *testing.T) {
	r, f := newRig(t), newFake(t)
	release := make(chan struct{})
	var calls, looks atomic.Int64
	f.set(func() {
		f.work = func(w http.ResponseWriter, _ *http.Request, _ string) {
			calls.Add(1)
			<-release
			say(w, 200, okBody)
		}
	})
	r.send(requests(4)...)
	w := r.start(&looked{Engine: f.engine(), n: &looks}, func(w *Worker) { w.Concurrency, w.StallTimeout = 4, 100*time.Millisecond })
	f.enter(4)
	from := looks.Load()
	r.until("it is known whose connections these are", func() bool { return looks.Load() >= from+2 })
	f.set(func() { f.listed = 401 })
	r.state(proto.EngineDenied)
	from = looks.Load()
	r.until("it was denied for longer than an engine may be down", func() bool {
		return looks.Load()-from > 2*int64(w.StallTimeout/w.ProbeEvery)
	})
	close(release)
	r.unblamed(4)
	if calls.Load() != 4 {
		t.Errorf("%d calls for 4 lines", calls.Load())
	}
}

// looked counts the probes of an engine.
type looked struct {
	Engine
	n *atomic.Int64
}

func (l *looked) Probe(ctx context.Context) (Status, error) {
	defer l.n.Add(1)
	return l.Engine.Probe(ctx)
}

// TestRefusedAlone: a line that is refused again and again while the others are answered ends; the others go on.
func TestRefusedAlone(t *testing.T) {
	for _, c := range []struct {
		status int
		body   string
		want   int64
	}{
		{403, `{"error":{"message":"not this one","type":"guard","code":403}}`, 403},
		{503, `{"error":{"message":"too long for the queue","type":"ServiceUnavailable","code":503}}`, 503},
		{200, `{"id":"x","choices":[{"index":0,"message":{"content":""},"finish_reason":"abort"}],"usage":{"prompt_tokens":1,"completion_tokens":0}}`, 0},
	} {
		t.Run(fmt.Sprint(c.status), func(t *testing.T) {
			r, f := newRig(t), newFake(t)
			f.set(func() {
				f.work = func(w http.ResponseWriter, _ *http.Request, body string) {
					if strings.Contains(body, "wrong") {
						say(w, c.status, c.body)
						return
					}
					say(w, 200, okBody)
				}
			})
			wrong := request(0)
			wrong.Body = []byte(`{"model":"m","messages":[{"role":"user","content":"wrong"}]}`)
			wrong.MaxAttempts = 1
			r.send(wrong)
			r.start(f.engine(), func(w *Worker) { w.Concurrency, w.refusal, w.RetryEvery = 4, time.Millisecond, 5*time.Millisecond })
			i := 0
			var got *proto.Result
			r.until("the line has ended", func() bool {
				i++
				r.send(request(i))
				for _, res := range r.seen() {
					if res.Index == 0 {
						got = res
					}
				}
				return got != nil
			})
			if got.OK || got.Status != c.want || got.Code == "" || got.Message == "" {
				t.Errorf("result %+v", got)
			}
			for i, res := range exactly(t, r.wait(i+1), i+1) {
				if i > 0 && !res.OK {
					t.Errorf("index %d: %+v", i, res)
				}
			}
			r.settled(0)
		})
	}
}

// TestNegativeUsage: an engine that cannot count brings nobody down.
func TestNegativeUsage(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = says(200, strings.Replace(okBody, `"prompt_tokens":3`, `"prompt_tokens":-3`, 1)) })
	r.send(request(0))
	r.start(f.engine(), func(w *Worker) { w.Registry = prometheus.NewRegistry() })
	if got := r.wait(1)[0]; !got.OK || got.Usage != (proto.Usage{}) {
		t.Errorf("result %+v", got)
	}
}

// TestTornReplies: what follows a whole object, or is no text, makes an answer none.
func TestTornReplies(t *testing.T) {
	for _, more := range []string{"x", ",", "\x00", "\xff", "data: [DONE]", "{}", "]", `"`} {
		if v := classify("", Answer{Status: 200, Body: []byte(okBody + more)}, nil); v.class != classRetry || v.code != proto.CodeBadResponse {
			t.Errorf("%q: %+v", more, v)
		}
	}
	if v := classify("", Answer{Status: 200, Body: []byte(okBody + " \r\n\t")}, nil); v.class != classDone {
		t.Errorf("space: %+v", v)
	}
	if v := classify("", Answer{Status: 200, Body: []byte(strings.Replace(okBody, "hi", "h\xff", 1))}, nil); v.class != classRetry {
		t.Errorf("not UTF-8: %+v", v)
	}
	for _, status := range []string{"queued", "in_progress"} {
		if v := classify("/v1/responses", Answer{Status: 200, Body: []byte(`{"id":"r","status":"` + status + `","output":[]}`)}, nil); v.class != classRetry {
			t.Errorf("%s: %+v", status, v)
		}
	}
}

// TestBadResponseTellsWhy: a 200 that is no answer ends in the error file with its reason, not as a response.
func TestBadResponseTellsWhy(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() {
		f.work = says(200, `{"id":"x","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":0}}`)
	})
	r.send(request(0))
	r.start(f.engine(), func(w *Worker) { w.MaxAttempts = 1 })
	line, err := proto.ParseOutput(proto.AppendLine(nil, r.wait(1)[0]))
	must(t, err)
	if line.Response != nil || line.Error == nil || line.Error.Code != proto.CodeBadResponse || !strings.Contains(line.Error.Message, "without choices") {
		t.Errorf("%+v, %+v", line, line.Error)
	}
}

// TestUnknown500: an engine dies with a 500 in words that nobody knows. No attempt is charged for that, not even the last;
// of an engine that is well the same words are the line's fault.
func TestUnknown500(t *testing.T) {
	for _, most := range []int{1, 4} {
		r, f := newRig(t), newFake(t)
		reg := prometheus.NewRegistry()
		f.set(func() {
			f.work = func(w http.ResponseWriter, _ *http.Request, _ string) {
				f.set(func() { f.health = 503 })
				say(w, 500, `{"error":{"message":"rank 3 is lost","type":"Fatal","code":500}}`)
			}
		})
		r.send(requests(3)...)
		r.start(f.engine(), func(w *Worker) {
			w.Concurrency, w.MaxAttempts, w.refusal, w.Registry = 1, most, time.Millisecond, reg
		})
		r.until("a line was given back as a suspect", func() bool {
			return labelled(t, reg, "millrace_worker_given_back_total", "reason", "suspect") >= 1
		})
		f.set(func() { f.health, f.work = 200, f.ok })
		r.unblamed(3)
		f.set(func() { f.work = says(500, `{"error":{"message":"rank 3 is lost","type":"Fatal","code":500}}`) })
		r.send(request(3))
		if got := exactly(t, r.wait(4), 4)[3]; got.OK || got.Code != proto.CodeEngineError || len(got.Attempts) != most-1 {
			t.Errorf("result %+v", got)
		}
	}
}
