package aggregator

import (
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"millrace/proto"
)

func near(a, b, tolerance float64) bool { return math.Abs(a-b) <= tolerance*max(math.Abs(b), 1e-9) }

// The timeline must hold exactly what was put in, wherever it doubled, grew or began.
func TestTimelineLosesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tl timeline
		var want load
		begin, end := int64(math.MaxInt64), int64(math.MinInt64)
		for range rapid.IntRange(1, 40).Draw(t, "n") {
			at := rapid.Int64Range(-1e9, 1e12).Draw(t, "at")
			d := rapid.Int64Range(1, 1e10).Draw(t, "d")
			w := load{busy: float64(d), requests: 1, prompt: 7, completion: float64(rapid.IntRange(0, 1000).Draw(t, "tokens"))}
			tl.spread(at, d, w)
			want.add(w, 1)
			begin, end = min(begin, at), max(end, at+d)
		}
		tl.settle()
		var got load
		for _, b := range tl.buckets {
			got.add(b, 1)
			if b.busy < -1e-3*float64(tl.width) {
				t.Fatalf("a bucket holds %f", b.busy)
			}
		}
		if !near(got.busy, want.busy, 1e-6) || !near(got.requests, want.requests, 1e-6) || !near(got.completion, want.completion, 1e-6) {
			t.Fatalf("%+v, want %+v", got, want)
		}
		if len(tl.buckets) > maxBuckets || tl.begin != begin || tl.end != end {
			t.Fatalf("%d buckets, %d to %d", len(tl.buckets), tl.begin, tl.end)
		}
		var merged timeline
		merged.merge(&tl, 12345)
		merged.settle()
		var again load
		for _, b := range merged.buckets {
			again.add(b, 1)
		}
		if !near(again.completion, want.completion, 1e-5) {
			t.Fatalf("merged: %+v, want %+v", again, want)
		}
	})
}

func TestTimelineOfNonsense(t *testing.T) {
	var tl timeline
	for _, at := range []int64{math.MinInt64, -1, 0, math.MaxInt64} {
		tl.spread(at, math.MaxInt64, load{busy: 1})
		tl.spread(at, -5, load{busy: 1})
	}
	if w, _ := tl.steady(); w.to < w.from {
		t.Errorf("%+v", w)
	}
	var empty timeline
	if w, level := empty.steady(); w != (window{}) || level != 0 {
		t.Errorf("%+v %f", w, level)
	}
}

// plan adds, for one worker, a ramp from 1 to 10 in flight over 10 s, a plateau, and a drain over 10 s, of requests of
// 1 s and 100 tokens each.
func plan(r *Report, worker string, from time.Time, steady int64) (lines int64) {
	for slot := range int64(10) {
		for at := slot; at < 10+steady+slot; at++ {
			res := good("j", lines, 0)
			res.Worker, res.StartUS, res.DurationUS = worker, 5_000_000+at*1_000_000, 1_000_000
			res.Usage = proto.Usage{Counted: true, Prompt: 50, Completion: 100}
			r.Add(res, from.Add(time.Duration(res.StartUS+res.DurationUS)*time.Microsecond+time.Millisecond))
			lines++
		}
	}
	return lines
}

func TestSteadyRate(t *testing.T) {
	var r Report
	n := plan(&r, "w", time.Unix(1e9, 0), 100)
	s := r.Close()
	if s.Completed != n || s.OutputTokens != 100*n || s.InputTokens != 50*n {
		t.Fatalf("%+v", s.Figures)
	}
	w := s.ByWorker[0]
	if w.Windows.Plateau != 10 || w.LoadSeconds != 0.9 {
		t.Errorf("plateau %v, load %v", w.Windows.Plateau, w.LoadSeconds)
	}
	// 9 in flight are reached after 8 s, and left 1 s after the plateau of 101 s.
	for what, v := range map[string][2]float64{
		"ramp": {w.Windows.RampSeconds, 8}, "steady": {w.Windows.SteadySeconds, 103}, "drain": {w.Windows.DrainSeconds, 8},
		"duration": {w.Duration, 119}, "output": {w.Steady.OutputThroughput, 998}, "total": {w.Steady.TotalThroughput, 1497},
		"requests": {w.Steady.RequestThroughput, 9.98}, "whole": {*w.OutputThroughput, float64(100*n) / 119},
		"p50": {*w.P50MS, 1000}, "model": {s.ByModel[0].Steady.OutputThroughput, 998}, "job": {s.Steady.OutputThroughput, 998},
		"job's duration": {s.Duration, 119}, "model's duration": {s.ByModel[0].Duration, 119},
	} {
		if !near(v[0], v[1], 0.01) {
			t.Errorf("%s is %v, want %v", what, v[0], v[1])
		}
	}
}

// A worker that starts again is another worker; its rate must not be added to the one before it.
func TestModelRateOfWorkersOneAfterTheOther(t *testing.T) {
	var r Report
	plan(&r, "w1", time.Unix(1e9, 0), 100)
	plan(&r, "w2", time.Unix(1e9+119, 0), 100)
	plan(&r, "w3", time.Unix(1e9, 0), 219) // beside both
	m := r.Close().ByModel[0]
	if m.Workers != 3 || !near(m.Steady.OutputThroughput, 1950, 0.06) || m.Windows.Plateau < 19 || m.Windows.Plateau > 21 {
		t.Errorf("%d workers, %+v, %+v", m.Workers, m.Steady, m.Windows)
	}
}

func TestTooShortForARate(t *testing.T) {
	var r Report
	for i := range int64(10) {
		r.Add(good("j", i, 0), time.Unix(1e9, i))
	}
	s := r.Close()
	if s.Steady != nil || s.ByModel[0].Steady != nil || s.ByWorker[0].Steady != nil || s.OutputThroughput == nil {
		t.Errorf("%+v", s.Figures)
	}
	b, err := json.Marshal(s.Figures)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"completed", "failed", "attempts", "total_input_tokens", "total_output_tokens", "cached_tokens",
		"request_throughput", "output_throughput", "total_token_throughput", "mean_e2el_ms", "p50_e2el_ms", "p95_e2el_ms", "p99_e2el_ms",
		"windows", "steady"} {
		if _, ok := m[key]; !ok {
			t.Errorf("%s is not there", key)
		}
	}
	if v, ok := m["steady"]; !ok || v != nil {
		t.Errorf("steady is %v", v)
	}
}

func TestReportCountsFailuresAndAttempts(t *testing.T) {
	var r Report
	at := time.Unix(1e9, 0)
	r.Add(bad("j", 0, proto.CodeEngineError), at)
	r.Add(bad("j", 1, proto.CodeEngineError), at)
	r.Add(&proto.Result{Job: "j", Index: 2, Code: proto.CodeCancelled, Message: "gone", Model: testModel}, at.Add(time.Second))
	r.Add(good("j", 3, 1), at)
	r.Drop(newDropped(4, 5, proto.Usage{Prompt: 6, Completion: 7}))
	s := r.Close()
	want := []Failure{
		{Code: proto.CodeEngineError, Count: 2, CustomID: "id-0", Message: "it broke"},
		{Code: proto.CodeCancelled, Count: 1, Message: "gone"},
	}
	if !reflect.DeepEqual(s.Failures, want) {
		t.Errorf("%+v", s.Failures)
	}
	if s.Attempts != 5 || s.Failed != 3 || s.Completed != 1 || s.Dropped.WastedTokens != 13 || s.Dropped.Replaced != 5 {
		t.Errorf("%+v %+v", s.Figures, s.Dropped)
	}
	got := map[string]int64{}
	for _, w := range s.ByWorker {
		got[w.Worker] = w.WorkerAttempts
	}
	if fmt.Sprint(got) != "map[w0:2 w1:3]" { // w1 made the attempts before the last
		t.Errorf("%v", got)
	}
	if f, l := r.Times(); !f.Equal(at) || !l.Equal(at.Add(time.Second)) {
		t.Errorf("%v to %v", f, l)
	}
}

func TestEmptyReport(t *testing.T) {
	var r Report
	s := r.Close()
	if f, l := r.Times(); f != nil || l != nil || s.Duration != 0 || s.RequestThroughput != nil || s.P50MS != nil {
		t.Errorf("%+v", s)
	}
}
