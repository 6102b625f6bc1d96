package aggregator

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/proto"
)

// meter holds the metrics of one aggregator. They count what this process saw; the numbers of a job are in its
// progress and its manifest. Labels are bounded: models to maxModels, outcomes to proto's codes.
type meter struct {
	tokens     *prometheus.CounterVec
	requests   *prometheus.CounterVec
	seconds    *prometheus.HistogramVec
	duplicates prometheus.Counter
	late       prometheus.Counter
	unknown    prometheus.Counter
	gauges     []prometheus.Collector

	lag   atomic.Int64
	since atomic.Int64 // Unix ns on our clock: since when something folded is in no checkpoint; 0: all is

	mu     sync.Mutex // guards what follows
	models map[string]*modelMeter
	jobs   func() map[string]int // of the present state; nil: none
}

// modelMeter are the metrics of one model, looked up once.
type modelMeter struct {
	prompt, completion, cached, wasted prometheus.Counter
	ok                                 prometheus.Counter
	failed                             map[string]prometheus.Counter
	seconds                            prometheus.Observer
}

const maxModels = 100

func newMeter() *meter {
	m := &meter{models: map[string]*modelMeter{}}
	m.tokens = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "millrace_tokens_total",
		Help: "Tokens that engines counted, by model and kind. Cached ones are part of prompt; wasted ones are those of results that do not count.",
	}, []string{"model", "kind"})
	m.requests = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "millrace_requests_total",
		Help: "Results that count for a line, by model and outcome: ok or the code of the error. A line whose error is replaced by an ok counts under both.",
	}, []string{"model", "outcome"})
	m.seconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:                           "millrace_request_duration_seconds",
		Help:                           "Time of a request at its engine, of the last attempts of lines that ended ok.",
		Buckets:                        []float64{.05, .1, .25, .5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000},
		NativeHistogramBucketFactor:    1.1,
		NativeHistogramMaxBucketNumber: 160,
	}, []string{"model"})
	m.duplicates = counter("millrace_duplicates_total", "Results that were dropped because their line had ended before.")
	m.late = counter("millrace_late_results_total", "Results that came after the files of their job were final.")
	m.unknown = counter("millrace_unknown_results_total", "Results that were set aside because they belong to no job, or cannot be read.")
	m.gauges = []prometheus.Collector{
		gauge("millrace_checkpoint_age_seconds", "For how long something that was folded is in no checkpoint.", nil, m.age),
		gauge("millrace_fold_lag_messages", "Results in the stream that are not folded.", nil, func() float64 { return float64(m.lag.Load()) }),
	}
	for _, state := range []string{proto.FoldFolding, proto.FoldWriting, proto.FoldDone} {
		m.gauges = append(m.gauges, gauge("millrace_jobs", "Jobs by state of their fold.", prometheus.Labels{"state": state},
			func() float64 { return m.count(state) }))
	}
	return m
}

func counter(name, help string) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
}

func gauge(name, help string, labels prometheus.Labels, read func() float64) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, read)
}

// register makes the metrics visible until unregister is called.
func (m *meter) register(to prometheus.Registerer) (unregister func(), err error) {
	var done []prometheus.Collector
	unregister = func() {
		for _, c := range done {
			to.Unregister(c)
		}
	}
	if to == nil {
		return unregister, nil
	}
	all := append([]prometheus.Collector{m.tokens, m.requests, m.seconds, m.duplicates, m.late, m.unknown}, m.gauges...)
	for _, c := range all {
		if err := to.Register(c); err != nil {
			unregister()
			return nil, fmt.Errorf("register metrics: %w", err)
		}
		done = append(done, c)
	}
	return unregister, nil
}

// result counts one result.
func (m *meter) result(r *proto.Result, fate fate) {
	v := m.model(r.Model)
	switch fate {
	case fateDuplicate:
		m.duplicates.Inc()
		v.waste(r.Usage)
		return
	case fateLate:
		m.late.Inc()
		v.waste(r.Usage)
		return
	}
	v.outcome(r).Inc()
	if r.Usage.Counted {
		v.prompt.Add(float64(max(r.Usage.Prompt, 0)))
		v.completion.Add(float64(max(r.Usage.Completion, 0)))
		v.cached.Add(float64(max(r.Usage.Cached, 0)))
	}
	if r.OK && r.DurationUS > 0 {
		v.seconds.Observe(float64(r.DurationUS) / 1e6)
	}
}

func (v *modelMeter) waste(u proto.Usage) {
	if u.Counted {
		v.wasted.Add(float64(max(u.Prompt, 0) + max(u.Completion, 0)))
	}
}

func (v *modelMeter) outcome(r *proto.Result) prometheus.Counter {
	if r.OK {
		return v.ok
	}
	if c := v.failed[r.Code]; c != nil {
		return c
	}
	return v.failed[otherKind]
}

func (m *meter) model(name string) *modelMeter {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.models[name]
	if v == nil && len(m.models) >= maxModels {
		name = otherKind
		v = m.models[name]
	}
	if v == nil {
		v = m.newModel(name)
		m.models[name] = v
	}
	return v
}

// codes are the outcomes that have a label of their own.
func codes() []string {
	return []string{
		proto.CodeCancelled, proto.CodeExpired, proto.CodeRequestTimeout, proto.CodeEngineCrash, proto.CodeBadResponse,
		proto.CodeEngineError, proto.CodeContextLength, proto.CodeInvalidRequest, proto.CodeResponseTooLarge,
		proto.CodeTransport, otherKind,
	}
}

func (m *meter) newModel(name string) *modelMeter {
	v := &modelMeter{
		prompt:     m.tokens.WithLabelValues(name, "prompt"),
		completion: m.tokens.WithLabelValues(name, "completion"),
		cached:     m.tokens.WithLabelValues(name, "cached"),
		wasted:     m.tokens.WithLabelValues(name, "wasted"),
		ok:         m.requests.WithLabelValues(name, "ok"),
		failed:     map[string]prometheus.Counter{},
		seconds:    m.seconds.WithLabelValues(name),
	}
	for _, c := range codes() {
		v.failed[c] = m.requests.WithLabelValues(name, c)
	}
	return v
}

func (m *meter) count(state string) float64 {
	m.mu.Lock()
	jobs := m.jobs
	m.mu.Unlock()
	if jobs == nil {
		return 0
	}
	return float64(jobs()[state])
}

func (m *meter) age() float64 {
	since := m.since.Load()
	if since == 0 {
		return 0
	}
	return max(time.Since(time.Unix(0, since)).Seconds(), 0)
}

// watch tells which state the gauges speak of.
func (m *meter) watch(jobs func() map[string]int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.jobs = jobs
}

// states counts the jobs by state.
func (s *state) states() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := map[string]int{}
	for _, j := range s.jobs {
		n[j.state]++
	}
	return n
}
