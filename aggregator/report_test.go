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
		merged.merge(&tl, func(t int64) int64 { return t + 12345 })
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

// An engine that runs 32 of 512 in flight makes what it makes: those that wait in it make nothing.
func TestSteadyRateOfManyThatWait(t *testing.T) {
	var r Report
	const each, atOnce, inFlight, lines = int64(1_000_000), 32, 512, 4000
	ends := func(i int64) int64 { return (i/atOnce + 1) * each }
	for i := range int64(lines) {
		res := good("j", i, 0)
		res.Worker, res.StartUS = "w", 5_000_000
		if i >= inFlight {
			res.StartUS += ends(i - inFlight)
		}
		res.DurationUS = 5_000_000 + ends(i) - res.StartUS
		res.Usage = proto.Usage{Counted: true, Prompt: 50, Completion: 200}
		r.Add(res, time.Unix(1e9, 0).Add(time.Duration(res.StartUS+res.DurationUS)*time.Microsecond))
	}
	if s := r.Close(); s.Steady == nil || !near(s.Steady.OutputThroughput, 6400, 0.02) {
		t.Errorf("%+v, %+v", s.Windows, s.Steady)
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

// A job that was interrupted and went on an hour later has the rates of the time in which it ran, and says how long it
// did not: whether its workers ended meanwhile, or had nothing to do.
func TestTimeBetweenRunsIsIdle(t *testing.T) {
	begin := time.Unix(1e9, 0)
	var once Report
	plan(&once, "w1", begin, 100)
	want := once.Close()

	var ended Report // other workers, an hour and 119 s later
	plan(&ended, "w1", begin, 100)
	plan(&ended, "w2", begin.Add(time.Hour+119*time.Second), 100)

	var paused Report // the same worker
	plan(&paused, "w1", begin, 100)
	later := func(us int64) *proto.Result {
		res := good("j", us, 0)
		res.Worker, res.StartUS, res.DurationUS = "w1", 5_000_000+(3600+119)*1_000_000+us, 1_000_000
		res.Usage = proto.Usage{Counted: true, Prompt: 50, Completion: 100}
		return res
	}
	for slot := range int64(10) {
		for at := slot; at < 110+slot; at++ {
			res := later(at * 1_000_000)
			paused.Add(res, begin.Add(time.Duration(res.StartUS+res.DurationUS)*time.Microsecond+time.Millisecond))
		}
	}

	for what, r := range map[string]*Report{"ended": &ended, "paused": &paused} {
		s := r.Close()
		all := map[string]Figures{"job": s.Figures, "model": s.ByModel[0].Figures}
		if what == "paused" {
			all["worker"] = s.ByWorker[0].Figures
		}
		for of, f := range all {
			if !near(f.Duration, 3600+2*119, 0.001) || !near(f.Idle, 3600, 0.001) {
				t.Errorf("%s, %s: %v s, %v s of them idle", what, of, f.Duration, f.Idle)
			}
			if !near(*f.OutputThroughput, *want.OutputThroughput, 0.01) || !near(*f.RequestThroughput, *want.RequestThroughput, 0.01) {
				t.Errorf("%s, %s: %v tokens/s, want %v", what, of, *f.OutputThroughput, *want.OutputThroughput)
			}
			w := f.Windows
			if !near(w.RampSeconds+w.SteadySeconds+w.DrainSeconds, 2*119, 0.01) || f.Steady.Seconds > 2*119 {
				t.Errorf("%s, %s: windows %+v, steady %+v", what, of, w, f.Steady)
			}
		}
	}
}

// What is short is a part of the work: a pause between two requests of a worker, and a worker that takes over.
func TestShortPausesAreNotIdle(t *testing.T) {
	var r Report
	for i, start := range []int64{0, 31, 61, 120} { // s; each request takes 2
		res := good("j", int64(i), 0)
		res.Worker, res.StartUS, res.DurationUS = "w", start*1_000_000, 2_000_000
		if start == 120 { // it waited for its second attempt, which is the one that is told
			res.Attempts = []proto.Attempt{{Worker: "w", DurationUS: 50_000_000}}
		}
		r.Add(res, time.Unix(1e9+start+2, 0))
	}
	next := good("j", 4, 0)
	next.Worker, next.StartUS, next.DurationUS = "w2", 0, 1_000_000
	r.Add(next, time.Unix(1e9+122, 9e8).Add(time.Second))
	if s := r.Close(); s.Idle != 0 || s.ByModel[0].Idle != 0 || s.ByWorker[0].Idle != 0 || !near(s.Duration, 123.9, 0.001) {
		t.Errorf("%v s, idle %v, %v, %v", s.Duration, s.Idle, s.ByModel[0].Idle, s.ByWorker[0].Idle)
	}
}

// Lines that their owner ended, long before or after anything ran, are no work.
func TestEndedLinesAreIdleTime(t *testing.T) {
	gone := func(i int64) *proto.Result {
		return &proto.Result{Job: "j", Index: i, Code: proto.CodeCancelled, Model: testModel}
	}
	var r Report
	r.Add(gone(0), time.Unix(1e9, 0))
	r.Add(good("j", 1, 0), time.Unix(1e9+1000, 0))
	r.Add(gone(2), time.Unix(1e9+2000, 0))
	if s := r.Close(); s.Duration != 2000 || s.Idle != 1999.5 || *s.RequestThroughput != 2 {
		t.Errorf("%v s, idle %v, %v per s", s.Duration, s.Idle, *s.RequestThroughput)
	}
	var none Report
	none.Add(gone(0), time.Unix(1e9, 0))
	none.Add(gone(1), time.Unix(1e9+2000, 0))
	if s := none.Close(); s.Duration != 2000 || s.Idle != 2000 || s.RequestThroughput != nil {
		t.Errorf("%+v", s.Figures)
	}
}

// A job that was interrupted, and whose time was over when it went on, was idle in between, however short that was; what its
// owner ends right after the last answer takes no time from it.
func TestPauseBeforeExpiryIsIdle(t *testing.T) {
	for pause, idle := range map[time.Duration]float64{20 * time.Second: 20, time.Hour: 3600, time.Second: 1, 900 * time.Millisecond: 0} {
		var r Report
		plan(&r, "w1", time.Unix(1e9, 0), 100)
		want := r.Close()
		_, last := r.Times()
		for i := range int64(50) {
			r.Add(&proto.Result{Job: "j", Index: 5000 + i, Code: proto.CodeExpired, Model: testModel}, last.Add(pause))
		}
		got := r.Close()
		if !near(got.Duration, want.Duration+pause.Seconds(), 0.001) || !near(got.Idle, idle, 0.001) {
			t.Errorf("pause of %s: %v s, %v s of them idle", pause, got.Duration, got.Idle)
		}
		if idle > 0 && !near(*got.OutputThroughput, *want.OutputThroughput, 0.001) {
			t.Errorf("pause of %s: %v tokens/s, want %v", pause, *got.OutputThroughput, *want.OutputThroughput)
		}
		if *got.Steady != *want.Steady {
			t.Errorf("pause of %s: steady %+v, want %+v", pause, *got.Steady, *want.Steady)
		}
	}
}

// The time in which an engine had lines that their job's end broke off is work, however long it was; they are no attempts, and
// no failures of its worker.
func TestLinesAtTheEndAreWork(t *testing.T) {
	var r Report
	line := func(i, start, long int64) *proto.Result {
		res := good("j", i, 0)
		res.Worker, res.StartUS, res.DurationUS = "w", start*1_000_000, long*1_000_000
		return res
	}
	for i := range int64(16) {
		r.Add(line(i, i/8*55, 55), time.Unix(1e9+(i/8+1)*55, 0))
	}
	before := r.Close()
	for i := range int64(8) {
		res := line(16+i, 110, 29)
		res.OK, res.Status, res.Body, res.Usage, res.Code = false, 0, nil, proto.Usage{}, proto.CodeExpired
		r.Add(res, time.Unix(1e9+139, 0))
	}
	r.Add(&proto.Result{Job: "j", Index: 24, Code: proto.CodeExpired, Model: testModel}, time.Unix(1e9+139, 5e8))
	s := r.Close()
	if s.Duration != 139.5 || s.Idle != 0 || s.ByModel[0].Idle != 0 || s.Attempts != before.Attempts || s.Failed != 9 {
		t.Errorf("%v s, idle %v, %v; %d attempts, were %d; %d failed", s.Duration, s.Idle, s.ByModel[0].Idle, s.Attempts, before.Attempts, s.Failed)
	}
	failed := line(25, 139, 1) // at the worker, after all
	failed.OK, failed.Code = false, proto.CodeEngineError
	r.Add(failed, time.Unix(1e9+140, 0))
	s = r.Close()
	if w := s.ByWorker[0]; w.Completed != 16 || w.Failed != 1 || s.Failed != 10 || s.ByModel[0].Failed != 10 {
		t.Errorf("the worker: %d ok, %d failed; of the job %d, of the model %d", w.Completed, w.Failed, s.Failed, s.ByModel[0].Failed)
	}
}

// A job whose first results came late, as from a worker that lost its broker, begins with its first request: what was idle
// is a part of its duration.
func TestLateResultsAreIdleInside(t *testing.T) {
	for _, c := range []struct {
		name                       string
		away, next, lines          int64 // s: results of 10 lines that ran from 0 to 5 come at away; lines run from next, one a second
		duration, idle, throughput float64
	}{
		{"most after", 100, 100, 300, 400, 95, 1.016},
		{"away for longer than at work", 300, 300, 100, 400, 295, 1.048},
		{"no pause of work", 300, 5, 300, 305, 0, 1.016},
		{"nothing after", 300, 0, 0, 5, 0, 2}, // nothing tells that they came late
	} {
		var r Report
		add := func(i, start, long, at int64) {
			res := good("j", i, 0)
			res.Worker, res.StartUS, res.DurationUS = "w", start*1_000_000, long*1_000_000
			r.Add(res, time.Unix(1e9+at, 0))
		}
		for i := range int64(10) {
			add(i, 0, 5, c.away)
		}
		for i := range c.lines {
			add(10+i, c.next+i, 1, max(c.next+i+1, c.away))
		}
		s := r.Close()
		for of, f := range map[string]Figures{"job": s.Figures, "model": s.ByModel[0].Figures} {
			if f.Duration != c.duration || f.Idle != c.idle || *f.RequestThroughput != c.throughput {
				t.Errorf("%s, %s: %v s, idle %v, %v per s", c.name, of, f.Duration, f.Idle, *f.RequestThroughput)
			}
		}
	}
}

// Whatever is added in whatever order, the same stretches are there, and the clock without the time between them holds
// all of them and nothing else.
func TestSpans(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pause := rapid.Int64Range(1, 20).Draw(t, "pause")
		in := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) span {
			from := rapid.Int64Range(-500, 500).Draw(t, "from")
			return span{from, from + rapid.Int64Range(0, 30).Draw(t, "long")}
		}), 1, 40).Draw(t, "spans")
		one, other := spans{pause: pause}, spans{pause: pause}
		for _, v := range in {
			one.add(v.from, v.to)
		}
		for _, v := range rapid.Permutation(in).Draw(t, "order") {
			other.add(v.from, v.to)
		}
		if !reflect.DeepEqual(one, other) {
			t.Fatalf("%v and %v", one.all, other.all)
		}
		for i, v := range one.all {
			if v.to < v.from || i > 0 && v.from-one.all[i-1].to < pause {
				t.Fatalf("%v, with pauses of %d", one.all, pause)
			}
			if got := one.at(v.to) - one.at(v.from); got != v.to-v.from {
				t.Fatalf("%v is %d long", v, got)
			}
		}
		if got := one.at(1e6); got != one.whole()-one.idle() || one.at(-1e6) != 0 {
			t.Fatalf("%v: %d of %d, idle %d", one.all, got, one.whole(), one.idle())
		}
	})
	many := spans{pause: 1}
	for i := range int64(10 * maxSpans) {
		many.add(10*i, 10*i+1)
	}
	if len(many.all) > maxSpans || many.whole() != 100*maxSpans-9 {
		t.Errorf("%d, from %v", len(many.all), many.all[0])
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
