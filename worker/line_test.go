package worker

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"millrace/proto"
)

// TestTimeout: a line that takes too long gets twice the time once, then it fails.
func TestTimeout(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = blocks })
	q := request(0)
	q.TimeoutMS, q.Run = 30, 7
	r.send(q)
	r.start(f.engine())
	got := r.wait(1)[0]
	if got.OK || got.Run != 7 || got.Code != proto.CodeRequestTimeout || got.Status != 0 || len(got.Attempts) != 1 {
		t.Fatalf("result %+v", got)
	}
	first := got.Attempts[0]
	if first.Code != proto.CodeRequestTimeout || first.DurationUS < 30_000 || got.DurationUS < 60_000 {
		t.Errorf("attempt %+v, then %d µs", first, got.DurationUS)
	}
	r.settled(0)
}

// TestTooLarge: an answer that fits no message, and one that is not even read.
func TestTooLarge(t *testing.T) {
	for _, n := range []int{proto.MaxPayload, maxAnswer + 1} {
		r, f := newRig(t), newFake(t)
		big := `{"id":"big","choices":[{"message":{"content":"` + strings.Repeat("x", n) + `"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":9}}`
		f.set(func() {
			f.work = func(w http.ResponseWriter, r *http.Request, body string) {
				if strings.Contains(body, `"1"`) {
					w.(http.Flusher).Flush() // no Content-Length
					_, _ = w.Write([]byte(big))
					return
				}
				say(w, 200, big)
			}
		})
		r.send(requests(2)...)
		r.start(f.engine())
		for _, res := range exactly(t, r.wait(2), 2) {
			if res.OK || res.Code != proto.CodeResponseTooLarge || res.Status != 0 || res.Body != nil || !strings.Contains(res.Message, "bytes") {
				t.Errorf("result %+v", res)
			}
		}
		r.settled(0)
	}
}

// TestHeaders: what the engine is told of a line.
func TestHeaders(t *testing.T) {
	r, f := newRig(t), newFake(t)
	got := make(chan *http.Request, 1)
	f.set(func() {
		f.work = func(w http.ResponseWriter, q *http.Request, _ string) {
			got <- q
			w.Header().Set("X-Request-Id", "theirs")
			say(w, 400, `{"error":{"message":"no","type":"Bad Request","param":"body.x","code":400}}`)
		}
	})
	q := request(7)
	q.URL = "/v1/completions"
	r.send(q)
	r.start(f.engine())
	req := <-got
	if req.URL.Path != "/v1/completions" || req.Header.Get("Content-Type") != "application/json" ||
		req.Header.Get("Authorization") != "Bearer key" || req.Header.Get("X-Request-Id") != "j-7" || req.Header.Get("Idempotency-Key") != "" {
		t.Errorf("%s %v", req.URL, req.Header)
	}
	if res := r.wait(1)[0]; res.RequestID != "theirs" || res.Status != 400 || string(res.Body) == "" || res.Message != "no" {
		t.Errorf("result %+v", res)
	}
}

// TestOnce: two workers share a queue, and nothing runs twice.
func TestOnce(t *testing.T) {
	r, a, b := newRig(t), newFake(t), newFake(t)
	const n = 400
	r.send(requests(n)...)
	r.start(a.engine(), func(w *Worker) { w.Concurrency = 8 })
	r.start(b.engine(), func(w *Worker) { w.Concurrency = 8 })
	exactly(t, r.wait(n), n)
	r.settled(0)
	seen := map[string]bool{}
	for _, body := range append(a.enter(len(a.came)), b.enter(len(b.came))...) {
		if seen[body] {
			t.Errorf("ran twice: %s", body)
		}
		seen[body] = true
	}
	if len(seen) != n {
		t.Errorf("%d lines ran", len(seen))
	}
}

// TestKept: a line that takes longer than AckWait is delivered once.
func TestKept(t *testing.T) {
	r, f := newRig(t), newFake(t)
	r.declare(2 * time.Second)
	release := make(chan struct{})
	f.set(func() { f.work = after(release) })
	reg := prometheus.NewRegistry()
	signs := r.signs()
	r.send(requests(12)...) // four of them wait for a slot
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 8; w.Registry = reg })
	for range 12 * 5 { // three come in each AckWait
		signs()
	}
	close(release)
	exactly(t, r.wait(12), 12)
	r.settled(0)
	if n, err := testutil.GatherAndCount(reg, "millrace_redeliveries_total"); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	if got := value(t, reg, "millrace_redeliveries_total"); got != 0 {
		t.Errorf("%v redeliveries", got)
	}
}

// value is the sum over all series of a metric.
func value(tb testing.TB, reg prometheus.Gatherer, name string) float64 {
	tb.Helper()
	all, err := reg.Gather()
	must(tb, err)
	sum := 0.0
	for _, mf := range all {
		if mf.GetName() == name {
			for _, m := range mf.Metric {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// TestLanes: the urgent lanes first.
func TestLanes(t *testing.T) {
	r, f := newRig(t), newFake(t)
	for i, lane := range []proto.Lane{proto.LaneLow, proto.LaneNormal, proto.LaneHigh} {
		for k := range 5 {
			r.sendTo(lane, request(10*i+k))
		}
	}
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 1 })
	r.wait(15)
	var order []int
	for _, body := range f.enter(15) {
		for i := range 30 {
			if string(request(i).Body) == body {
				order = append(order, i/10)
			}
		}
	}
	if want := []int{2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0}; !slices.Equal(order, want) {
		t.Fatalf("lanes in the order of the engine: %v", order)
	}
}

// TestLargeLines: pulls end by their bytes, and go on.
func TestLargeLines(t *testing.T) {
	r, f := newRig(t), newFake(t)
	pad := strings.Repeat("x", 3<<20)
	for i := range 8 {
		q := request(i)
		q.Body = []byte(`{"pad":"` + pad + `"}`)
		r.send(q)
	}
	r.start(f.engine())
	exactly(t, r.wait(8), 8)
	r.settled(0)
}

func TestPullEndings(t *testing.T) {
	for _, c := range []struct {
		status, description string
		want                ending
	}{
		{"404", "No Messages", endEmpty}, {"408", "Request Timeout", endEmpty}, {"408", "Requests Pending", endEmpty},
		{"409", "Message Size Exceeds MaxBytes", endBytes}, {"409", "Consumer Deleted", endMissing}, {"503", "", endMissing},
		{"409", "Exceeded MaxWaiting", endRefused}, {"409", "Leadership Change", endRefused}, {"400", "Bad Request", endRefused},
	} {
		if got := reading(c.status, c.description); got != c.want {
			t.Errorf("%s %s: %v, want %v", c.status, c.description, got, c.want)
		}
	}
}

// TestTrickle: lines that come one by one, on all lanes, after the queues were empty.
func TestTrickle(t *testing.T) {
	r, f := newRig(t), newFake(t)
	r.start(f.engine())
	for i := range 30 {
		r.sendTo(proto.Lanes()[i%3], request(i))
		r.wait(i + 1)
	}
	exactly(t, r.wait(30), 30)
}

// TestBusy: back-pressure shrinks the limit for a while, and charges nothing.
func TestBusy(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() {
		f.work = func(w http.ResponseWriter, _ *http.Request, _ string) {
			w.Header().Set("Retry-After", "0.1")
			say(w, 503, overload)
		}
	})
	r.send(requests(20)...)
	r.start(f.engine())
	r.until("limit is smaller", func() bool {
		return slices.ContainsFunc(r.workers(), func(w *proto.Worker) bool { return w.Limit > 0 && w.Limit < 32 && len(w.Models) > 0 })
	})
	f.set(func() { f.work = f.ok })
	r.unblamed(20)
}

// TestMetrics: the names are well-formed, and two workers live in one registry.
func TestMetrics(t *testing.T) {
	r, a, b := newRig(t), newFake(t), newFake(t)
	a.set(func() { a.work = says(500, `{"error":{"message":"x"}}`) })
	reg := prometheus.NewPedanticRegistry()
	with := func(w *Worker) { w.Registry = reg; w.MaxAttempts = 1 }
	r.send(requests(5)...)
	r.start(a.engine(), with)
	exactly(t, r.wait(5), 5)
	r.start(b.engine(), with)
	r.until("both workers have asked their engines", func() bool { return value(t, reg, "millrace_inflight_limit") == 2*32 })
	problems, err := testutil.GatherAndLint(reg)
	must(t, err)
	if len(problems) > 0 {
		t.Error(problems)
	}
	if got := value(t, reg, "millrace_worker_requests_total"); got != 5 {
		t.Errorf("%v results counted", got)
	}
	if got := value(t, reg, "millrace_engine_state"); got != 2 {
		t.Errorf("%v states of two engines", got)
	}
}

// TestRecord: an embedding, whose usage has prompt tokens only, and the record of a result.
func TestRecord(t *testing.T) {
	r, f := newRig(t), newFake(t)
	body := `{"object":"list","data":[{"index":0,"embedding":[0.5]}],"model":"m","usage":{"prompt_tokens":4,"total_tokens":4,"prompt_tokens_details":{"cached_tokens":2}}}`
	f.set(func() { f.work = says(200, body) })
	q := request(3)
	q.URL = "/v1/embeddings"
	r.send(q)
	r.start(f.engine())
	got := r.wait(1)[0]
	want := proto.Usage{Counted: true, Prompt: 4, Cached: 2}
	if !got.OK || got.Usage != want || got.URL != q.URL || got.CustomID != q.CustomID || got.Model != "m" ||
		got.Job != "j" || string(got.Body) != body || got.Worker == "" || got.DurationUS <= 0 {
		t.Errorf("result %+v", got)
	}
}

// TestManyModels: an engine with several models is fed from all their queues.
func TestManyModels(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.models = `"m","a","b"` })
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 4 })
	r.until("queues are declared", func() bool { return len(r.state(proto.EngineReady).Models) == 3 })
	for i := range 60 {
		r.model = []string{"m", "a", "b"}[i%3]
		q := request(i)
		q.Model = r.model
		q.Body = []byte(`{"model":` + strconv.Quote(r.model) + `}`)
		r.send(q)
	}
	exactly(t, r.wait(60), 60)
	for _, r.model = range []string{"m", "a", "b"} {
		r.settled(0)
	}
}
