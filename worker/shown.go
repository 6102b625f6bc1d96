package worker

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/proto"
)

// flags are those that the engine was started with, or else its settings as far as it tells them.
func (s *session) flags(st Status) []string {
	if s.Flags == nil {
		return st.Settings
	}
	return s.Flags()
}

// gpus are those of the engine, if it is known which these are, or else those of the machine, one of which may be its own.
func (w *Worker) gpus(st Status) (all []proto.GPU, own bool) {
	if w.GPUs == nil || st.Simulated || !here(w.Engine.String()) {
		return nil, false
	}
	all = w.GPUs.now()
	if its := among(all, w.Devices); len(its) > 0 {
		return its, true
	}
	return all, false
}

// watchGPUs keeps an eye on the GPUs of a machine that has the engine.
func (s *session) watchGPUs(ctx context.Context) {
	if s.GPUs != nil && here(s.Engine.String()) {
		s.GPUs.watch(ctx, s.beat.soon) // a job may be over soon
	}
}

// knownGauges show what is not known all the time: what is not has no sample.
type knownGauges struct {
	meter    *meter
	usage    *prometheus.Desc
	pressure *prometheus.Desc
	rate     *prometheus.Desc
}

func newKnownGauges(m *meter, labels prometheus.Labels) *knownGauges {
	return &knownGauges{
		meter:    m,
		usage:    prometheus.NewDesc("millrace_engine_kv_usage_ratio", "Share of the engine's KV cache that is in use, as it tells.", nil, labels),
		pressure: prometheus.NewDesc("millrace_preemptions_per_line", "Pre-emptions that the engine counted, those of its other clients among them, for each line that it answered to this worker, over the last five minutes.", nil, labels),
		rate:     prometheus.NewDesc("millrace_engine_output_tokens_per_second", "Output tokens over the last 15 s: those that the engine counted, or where it has no counter those of its answers.", nil, labels),
	}
}

// Describe is part of prometheus.Collector.
func (e *knownGauges) Describe(to chan<- *prometheus.Desc) {
	to <- e.usage
	to <- e.pressure
	to <- e.rate
}

// Collect is part of prometheus.Collector.
func (e *knownGauges) Collect(to chan<- prometheus.Metric) {
	now := time.Now()
	if g := e.meter.gauges(now); g.Known {
		to <- prometheus.MustNewConstMetric(e.usage, prometheus.GaugeValue, g.KVUsage)
	}
	if v, known := e.meter.pressure(now); known {
		to <- prometheus.MustNewConstMetric(e.pressure, prometheus.GaugeValue, v)
	}
	if v, of := e.meter.rate(now); of != "" {
		to <- prometheus.MustNewConstMetric(e.rate, prometheus.GaugeValue, v)
	}
}
