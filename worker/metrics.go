package worker

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/proto"
)

// metrics of a worker. Several workers of one process share them: what differs between engines has the label
// engine (its address), the rest adds up.
type metrics struct {
	tokens      *prometheus.CounterVec
	requests    *prometheus.CounterVec
	redelivered prometheus.Counter
	undecodable prometheus.Counter
	retries     *prometheus.CounterVec
	givenBack   *prometheus.CounterVec
	seconds     *prometheus.HistogramVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	var errs []error
	m := &metrics{
		tokens: registered(r, &errs, counter("millrace_worker_tokens_total",
			"Tokens that the engine counted in answers, by kind: prompt (cached ones included), cached, completion.", "model", "kind")),
		requests: registered(r, &errs, counter("millrace_worker_requests_total",
			"Results that this worker published, by outcome: ok, or the code of the error.", "model", "outcome")),
		redelivered: registered(r, &errs, prometheus.NewCounter(prometheus.CounterOpts{Name: "millrace_redeliveries_total",
			Help: "Requests that had been delivered to a worker before."})),
		undecodable: registered(r, &errs, prometheus.NewCounter(prometheus.CounterOpts{Name: "millrace_worker_undecodable_total",
			Help: "Messages in a queue that are no requests; they are removed."})),
		retries:   registered(r, &errs, counter("millrace_worker_retries_total", "Charged attempts that did not end their line, by code.", "code")),
		givenBack: registered(r, &errs, counter("millrace_worker_given_back_total", "Requests given back to their queue, by reason.", "reason")),
		seconds: registered(r, &errs, prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "millrace_worker_request_duration_seconds",
			Help:                        "Time at the engine of attempts that were answered.",
			Buckets:                     []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100}, []string{"model"})),
	}
	return m, errors.Join(errs...)
}

func counter(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
}

// registered registers c, or returns the one of its kind that another worker of the process has registered.
func registered[C prometheus.Collector](r prometheus.Registerer, errs *[]error, c C) C {
	if r == nil {
		return c
	}
	err := r.Register(c)
	var are prometheus.AlreadyRegisteredError
	if errors.As(err, &are) {
		if have, ok := are.ExistingCollector.(C); ok {
			return have
		}
	}
	if err != nil {
		*errs = append(*errs, err)
	}
	return c
}

// states lists all states of an engine.
func states() []string {
	return []string{proto.EngineWaiting, proto.EngineReady, proto.EngineDenied, proto.EngineNoModel,
		proto.EngineNoQueue, proto.EngineDegraded, proto.EngineHung, proto.EngineDraining}
}

// watch makes the gauges of a session visible, and returns what removes them.
func (m *metrics) watch(s *session) func() {
	if s.Registry == nil {
		return func() {}
	}
	labels := prometheus.Labels{"engine": s.Engine.String()}
	gauges := []prometheus.Collector{
		gauge("millrace_inflight_requests", "Requests that the engine works on for this worker.", labels, func() float64 { return float64(s.slots.inFlight()) }),
		gauge("millrace_inflight_limit", "Requests that may be in flight.", labels, func() float64 { return float64(s.limit.Get()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "millrace_inflight_full_seconds_total", ConstLabels: labels,
			Help: "For how long 95 % of the limit or more were in flight."}, func() float64 { return s.slots.wasFull().Seconds() }),
		newKnownGauges(&s.meter, labels),
		gauge("millrace_worker_held", "Requests that were pulled and are not acknowledged yet.", labels, func() float64 { return float64(s.held.len()) }),
	}
	for _, state := range states() {
		gauges = append(gauges, gauge("millrace_engine_state", "1 for the state that the engine is in, 0 for the others.",
			prometheus.Labels{"engine": s.Engine.String(), "state": state}, func() float64 {
				if is, _, _, _ := s.gate.view(); is == state {
					return 1
				}
				return 0
			}))
	}
	if s.GPUs != nil && here(s.Engine.String()) {
		_ = s.Registry.Register(s.GPUs) // once for all workers of the process, and for good: what is old is not shown
	}
	var ours []prometheus.Collector
	for _, g := range gauges {
		if s.Registry.Register(g) == nil { // another worker of this process may show the same engine
			ours = append(ours, g)
		}
	}
	return func() {
		for _, g := range ours {
			s.Registry.Unregister(g)
		}
	}
}

func gauge(name, help string, labels prometheus.Labels, value func() float64) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, value)
}

// answered counts what an answer cost.
func (m *metrics) answered(model string, u proto.Usage) {
	if !u.Counted {
		return
	}
	m.tokens.WithLabelValues(model, "prompt").Add(float64(u.Prompt))
	m.tokens.WithLabelValues(model, "cached").Add(float64(u.Cached))
	m.tokens.WithLabelValues(model, "completion").Add(float64(u.Completion))
}
