package producer

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics counts what owners do. A nil *metrics counts nothing.
type metrics struct {
	enqueued *prometheus.CounterVec
	resent   prometheus.Counter
	ended    *prometheus.CounterVec
	failures prometheus.Counter
	depth    *prometheus.GaugeVec
	jobs     prometheus.Gauge
}

// startMetrics registers the metrics where there is a registry; stop takes them back.
func startMetrics(reg prometheus.Registerer) (m *metrics, stop func(), err error) {
	if reg == nil {
		return nil, func() {}, nil
	}
	m = newMetrics()
	for i, c := range m.collectors() {
		if err := reg.Register(c); err != nil {
			m.unregister(reg, i)
			return nil, nil, fmt.Errorf("register the producer's metrics: %w", err)
		}
	}
	return m, func() { m.unregister(reg, len(m.collectors())) }, nil
}

func (m *metrics) unregister(reg prometheus.Registerer, n int) {
	for _, c := range m.collectors()[:n] {
		reg.Unregister(c)
	}
}

func newMetrics() *metrics {
	counter := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "millrace", Subsystem: "producer", Name: name, Help: help}
	}
	gauge := func(name, help string) prometheus.GaugeOpts { return prometheus.GaugeOpts(counter(name, help)) }
	return &metrics{
		enqueued: prometheus.NewCounterVec(counter("lines_enqueued_total", "Lines that were put into the queue of their model, each once."), []string{"model"}),
		resent:   prometheus.NewCounter(counter("lines_resent_total", "Lines that were put into a queue again because they were missing.")),
		ended:    prometheus.NewCounterVec(counter("lines_ended_total", "Error results published for lines that will not run, by code."), []string{"code"}),
		failures: prometheus.NewCounter(counter("publish_failures_total", "Batches that the broker did not take at the first attempt.")),
		depth:    prometheus.NewGaugeVec(gauge("queue_depth", "Requests of the jobs owned here that were in the queue of a model when it was last looked at, those that workers hold included."), []string{"model"}),
		jobs:     prometheus.NewGauge(gauge("jobs", "Jobs whose input is owned by this process.")),
	}
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.enqueued, m.resent, m.ended, m.failures, m.depth, m.jobs}
}

func (m *metrics) sent(model string, first, again int64) {
	if m == nil {
		return
	}
	m.enqueued.WithLabelValues(model).Add(float64(first))
	m.resent.Add(float64(again))
}

func (m *metrics) end(code string, n int64) {
	if m != nil {
		m.ended.WithLabelValues(code).Add(float64(n))
	}
}

func (m *metrics) failure() {
	if m != nil {
		m.failures.Inc()
	}
}

// deepen moves the depth of a queue; several owners share the gauge.
func (m *metrics) deepen(model string, by int64) {
	if m != nil {
		m.depth.WithLabelValues(model).Add(float64(by))
	}
}

func (m *metrics) job(by float64) {
	if m != nil {
		m.jobs.Add(by)
	}
}
