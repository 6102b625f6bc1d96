package aggregator

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"millrace/proto"
)

// Report makes the statistics of a job from the results that count. Add each of them once, in any order that is always
// the same; then Close. Its zero value is ready.
type Report struct {
	parts       map[partKey]*part
	models      map[string]*hdrhistogram.Histogram
	failures    kinds
	workers     map[string]int64 // attempts
	paces       map[string]*pace // of workers
	begin       int64            // µs on the broker's clock: where the first request began at the latest; see whole
	first, last time.Time        // timestamps of the first and the last result
	dropped     Dropped
}

// part is what one worker did for one model.
type part struct {
	totals
	work     timeline // on the worker's clock
	when     spans    // the same, and the attempts before
	times    *hdrhistogram.Histogram
	loadUS   int64
	startsAt int64 // µs: where on the broker's clock the worker's clock is 0, at the latest
}

type partKey struct{ model, worker string }

// totals are what can be summed.
type totals struct {
	completed, failed, attempts, uncounted, cut int64
	ended                                       int64 // of failed: with the job, at an engine or before
	usage                                       proto.Usage
}

// Times of requests, in µs. A percentile is within 1 % (per worker) or 0.1 % (per model).
const (
	shortest = 1
	longest  = int64(24 * time.Hour / time.Microsecond)
	// maxTimed bounds the parts that have their own timeline and histogram, some 100 KB each.
	maxTimed = 4096
)

// Add takes in a result and the broker's timestamp of its message.
func (r *Report) Add(res *proto.Result, at time.Time) {
	if r.parts == nil {
		r.parts, r.models = map[partKey]*part{}, map[string]*hdrhistogram.Histogram{}
		r.workers, r.paces = map[string]int64{}, map[string]*pace{}
		r.begin, r.first, r.last = math.MaxInt64, at, at
	}
	us := at.UnixMicro()
	r.begin = min(r.begin, us-min(max(res.DurationUS, 0), longest))
	if at.Before(r.first) {
		r.first = at
	}
	if at.After(r.last) {
		r.last = at
	}
	p := r.part(partKey{res.Model, res.Worker})
	p.add(res)
	r.workers[res.Worker] += attempts(res) - int64(len(res.Attempts))
	for _, a := range res.Attempts {
		r.workers[a.Worker]++
	}
	if !res.OK {
		r.failures.add(res, 1)
	}
	if res.Worker != "" {
		r.pace(res)
		r.time(p, res, us)
	}
}

func (r *Report) part(k partKey) *part {
	p := r.parts[k]
	if p == nil {
		p = &part{startsAt: math.MaxInt64, when: spans{pause: math.MaxInt64}}
		if len(r.parts) < maxTimed {
			p.times, p.when.pause = hdrhistogram.New(shortest, longest, 2), longPause
		}
		r.parts[k] = p
	}
	return p
}

// time notes when the worker was busy with a result. The smallest difference between the broker's timestamp and the
// end of the request on the worker's clock tells how the two clocks stand to each other: what it is too large by is
// the quickest way of any result to the broker.
func (r *Report) time(p *part, res *proto.Result, us int64) {
	v, d := atEngine(res), min(max(res.DurationUS, shortest), longest)
	start := v.to - d
	p.loadUS = max(p.loadUS, res.LoadUS)
	p.startsAt = min(p.startsAt, us-(start+d))
	p.when.add(v.from, v.to)
	if p.times == nil {
		return
	}
	w := load{busy: float64(d), requests: 1}
	if proto.EndedWithJob(res.Code) {
		w.requests = 0 // it was broken off
	}
	if res.Usage.Counted {
		w.prompt, w.completion = float64(res.Usage.Prompt), float64(res.Usage.Completion)
	}
	p.work.spread(start, d, w)
	if !res.OK {
		return
	}
	m := r.models[res.Model]
	if m == nil {
		m = hdrhistogram.New(shortest, longest, 3)
		r.models[res.Model] = m
	}
	_ = p.times.RecordValue(d) // d is within the histogram's range
	_ = m.RecordValue(d)
}

// atEngine is when the worker of a result had its line at the engine, with its attempts before, on the worker's clock.
func atEngine(res *proto.Result) span {
	start := min(max(res.StartUS, farPast), farFuture)
	return span{start - min(tried(res), max(start, 0)), start + min(max(res.DurationUS, shortest), longest)}
}

// tried is how long the attempts took that the worker of a result made of the line before.
func tried(res *proto.Result) (us int64) {
	for _, a := range res.Attempts {
		if a.Worker == res.Worker {
			us += min(max(a.DurationUS, 0), longest)
		}
	}
	return us
}

// Drop takes in the numbers of what did not count.
func (r *Report) Drop(d Dropped) { r.dropped = d }

func (t *totals) add(r *proto.Result) {
	if r.OK {
		t.completed++
		if !r.Usage.Counted {
			t.uncounted++
		}
		if r.ContextCut {
			t.cut++
		}
	} else {
		t.failed++
		if proto.EndedWithJob(r.Code) {
			t.ended++
		}
	}
	t.attempts += attempts(r)
	addUsage(&t.usage, r.Usage, 1)
}

func (t *totals) sum(o totals) {
	t.completed += o.completed
	t.failed += o.failed
	t.ended += o.ended
	t.attempts += o.attempts
	t.uncounted += o.uncounted
	t.cut += o.cut
	addUsage(&t.usage, o.usage, 1)
}

// Close returns the statistics of what was added.
func (r *Report) Close() *Statistics {
	s := &Statistics{ByModel: []ModelStatistics{}, ByWorker: []WorkerStatistics{}, Failures: []Failure{}, Dropped: r.dropped}
	var all group
	byModel := map[string]*group{}
	for _, k := range slices.SortedFunc(maps.Keys(r.parts), comparePart) {
		p := r.parts[k]
		g := byModel[k.model]
		if g == nil {
			g = &group{times: r.models[k.model]}
			byModel[k.model] = g
		}
		g.parts, all.parts = append(g.parts, p), append(all.parts, p)
		if k.worker != "" {
			s.ByWorker = append(s.ByWorker, r.worker(k, p))
		}
	}
	for _, m := range slices.Sorted(maps.Keys(byModel)) {
		f := byModel[m].figures()
		s.ByModel = append(s.ByModel, ModelStatistics{Model: m, Workers: byModel[m].workers, Figures: f})
	}
	for _, f := range r.failures.list() {
		s.Failures = append(s.Failures, Failure(f))
	}
	all.times = r.allTimes()
	s.Figures = all.figures()
	if r.parts != nil {
		s.rates(r.whole(&all.when))
	}
	return s
}

// whole is the time of the whole job, and how much of it was idle. It begins with the first request, also where the
// first results came late: the spans of the workers tell then. Before the first request and after the last there may be
// lines that their owner ended; those that were at an engine their workers did, and these are requests like others.
func (r *Report) whole(when *spans) (duration, idle int64) {
	begin, end := r.begin, r.last.UnixMicro()
	if len(when.all) == 0 {
		when = &spans{all: []span{{begin, begin}}}
	}
	first, last := when.all[0].from, when.all[len(when.all)-1].to
	begin, idle = min(begin, first), when.idle()
	for _, edge := range []int64{first - begin, end - last} {
		if edge >= handOver { // it is between no two requests of a worker
			idle += edge
		}
	}
	return end - begin, min(idle, end-begin)
}

// Times returns the broker's timestamps of the first and the last result; nil where there is none.
func (r *Report) Times() (first, last *time.Time) {
	if r.parts == nil {
		return nil, nil
	}
	f, l := r.first.UTC(), r.last.UTC()
	return &f, &l
}

func (r *Report) allTimes() *hdrhistogram.Histogram {
	all := hdrhistogram.New(shortest, longest, 3)
	for _, m := range slices.Sorted(maps.Keys(r.models)) {
		all.Merge(r.models[m])
	}
	return all
}

func comparePart(a, b partKey) int {
	return cmp.Or(cmp.Compare(a.model, b.model), cmp.Compare(a.worker, b.worker))
}

// worker figures are on the worker's own clock.
func (r *Report) worker(k partKey, p *part) WorkerStatistics {
	w := WorkerStatistics{Worker: k.worker, Model: k.model, LoadSeconds: seconds(p.loadUS)}
	work := &p.work
	if len(p.when.all) > 1 {
		work = new(timeline)
		work.merge(&p.work, p.when.at)
	}
	w.Figures = figures(p.totals, &p.when, work, p.times)
	w.Failed -= p.ended // that was no failure of this worker
	w.WorkerAttempts = r.workers[k.worker]
	return w
}

// group is several parts, brought onto the broker's clock.
type group struct {
	parts   []*part
	times   *hdrhistogram.Histogram
	workers int64 // of parts with a timeline
	when    spans
}

// figures sums up. Its timeline leaves out when the group was idle, so that an hour between two runs takes no buckets.
func (g *group) figures() Figures {
	var sum totals
	var work timeline
	g.when.pause = handOver
	for _, p := range g.parts {
		sum.sum(p.totals)
		for _, v := range p.when.all {
			g.when.add(v.from+p.startsAt, v.to+p.startsAt)
		}
	}
	for _, p := range g.parts {
		if p.work.width > 0 {
			work.merge(&p.work, func(t int64) int64 { return g.when.at(t + p.startsAt) })
			g.workers++
		}
	}
	return figures(sum, &g.when, &work, g.times)
}

func figures(t totals, when *spans, work *timeline, times *hdrhistogram.Histogram) Figures {
	f := Figures{
		Completed: t.completed, Failed: t.failed, Attempts: t.attempts, WithoutUsage: t.uncounted,
		InputTokens: t.usage.Prompt, OutputTokens: t.usage.Completion, CachedTokens: t.usage.Cached, ContextCut: t.cut,
	}
	if times != nil && times.TotalCount() > 0 {
		ms := func(us float64) *float64 { return round(us / 1e3) }
		f.MeanMS, f.P50MS = ms(times.Mean()), ms(float64(times.ValueAtQuantile(50)))
		f.P95MS, f.P99MS = ms(float64(times.ValueAtQuantile(95))), ms(float64(times.ValueAtQuantile(99)))
		f.MaxMS = ms(float64(times.Max()))
	}
	if len(when.all) > 0 {
		f.rates(when.whole(), when.idle())
	}
	if work.width > 0 {
		f.windows(work)
	}
	return f
}

// rates sets what is counted per second, from µs.
func (f *Figures) rates(duration, idle int64) {
	f.Duration, f.Idle = seconds(duration), seconds(idle)
	f.RequestThroughput, f.OutputThroughput, f.TotalThroughput = nil, nil, nil
	if s := float64(duration-idle) / 1e6; s > 0 {
		f.RequestThroughput = round(float64(f.Completed) / s)
		f.OutputThroughput = round(float64(f.OutputTokens) / s)
		f.TotalThroughput = round(float64(f.OutputTokens+f.InputTokens) / s)
	}
}

// Median times of a request that a steady window must last for its rates to mean something, and what is left of it.
const (
	tooShort  = 5
	tooLittle = 3
)

func (f *Figures) windows(work *timeline) {
	w, plateau := work.steady()
	f.Windows = &Windows{
		RampSeconds:   seconds(w.from - work.begin),
		SteadySeconds: seconds(w.to - w.from),
		DrainSeconds:  seconds(work.end - w.to),
		Plateau:       *round(plateau),
	}
	if f.P50MS == nil || seconds(w.to-w.from)*1e3 < tooShort**f.P50MS {
		return
	}
	w = work.from(w, work.begin+int64(*f.P95MS*1e3))
	s := float64(w.to-w.from) / 1e6
	if s <= 0 || s*1e3 < tooLittle**f.P50MS {
		return
	}
	f.Steady = &Steady{
		Seconds:           *round(s),
		RequestThroughput: *round(w.work.requests / s),
		OutputThroughput:  *round(w.work.completion / s),
		TotalThroughput:   *round((w.work.completion + w.work.prompt) / s),
	}
}

func seconds(us int64) float64 { return *round(float64(us) / 1e6) }

// round keeps three digits after the point.
func round(v float64) *float64 {
	v = math.Round(v*1e3) / 1e3
	return &v
}
