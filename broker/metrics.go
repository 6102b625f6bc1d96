package broker

import (
	"slices"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/prometheus/client_golang/prometheus"

	"millrace/proto"
)

// Metrics shows what an embedded server holds. It asks the server at each scrape, and has no state of its own.
// Streams are as many as there are models, and a few; consumers are those of the queues, by lane.
func (s *Server) Metrics() prometheus.Collector { return collector{s} }

type collector struct{ s *Server }

func brokerDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("millrace_broker_"+name, help, labels, nil)
}

var (
	descConnections = brokerDesc("connections", "Clients that are connected, those inside the process included.")
	descSlow        = brokerDesc("slow_consumers_total", "Connections that were cut because they did not read what was sent to them.")
	descDisk        = brokerDesc("disk_free_bytes", "Free space of the disk with the streams.")
	descMessages    = brokerDesc("stream_messages", "Messages in a stream.", "stream")
	descBytes       = brokerDesc("stream_bytes", "Bytes that a stream takes.", "stream")
	descLimit       = brokerDesc("stream_limit_bytes", "Bytes that a stream may take, reserved for it; -1: any.", "stream")
	descWaiting     = brokerDesc("queue_waiting", "Requests of a queue that were not handed out.", "stream", "lane")
	descHanded      = brokerDesc("queue_handed_out", "Requests of a queue that workers hold, or gave back for a while; for some time after a cancel at most so many.", "stream", "lane")
	descRedelivered = brokerDesc("queue_redelivered", "Of queue_handed_out, those that were handed out more than once.", "stream", "lane")
	descPulls       = brokerDesc("queue_pulls", "Pulls of workers that wait for requests of a queue.", "stream", "lane")

	brokerDescs = []*prometheus.Desc{descConnections, descSlow, descDisk, descMessages, descBytes, descLimit, descWaiting, descHanded, descRedelivered, descPulls}
)

func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range brokerDescs {
		ch <- d
	}
}

func (c collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(descConnections, float64(c.s.ns.NumClients()))
	ch <- prometheus.MustNewConstMetric(descSlow, prometheus.CounterValue, float64(c.s.ns.NumSlowConsumers()))
	if free, err := FreeBytes(c.s.Dir); err == nil { // else there is no figure
		gauge(descDisk, float64(free))
	}
	info, err := c.s.ns.Jsz(&server.JSzOptions{Streams: true, Consumer: true, Config: true})
	if err != nil { // JetStream is going down: no figures
		return
	}
	stored := c.stored()
	for _, a := range info.AccountDetails {
		for i := range a.Streams {
			st := &a.Streams[i]
			gauge(descMessages, float64(st.State.Msgs), st.Name)
			gauge(descBytes, float64(st.State.Bytes), st.Name)
			gauge(descLimit, float64(st.Config.MaxBytes), st.Name)
			if !proto.IsRequestStream(st.Name) {
				continue
			}
			lanes := slices.DeleteFunc(st.Consumer, func(q *server.ConsumerInfo) bool {
				return !slices.Contains(proto.Lanes(), proto.Lane(q.Name)) // names of other consumers are without bound
			})
			var waiting int64
			for _, q := range lanes {
				waiting += int64(q.NumPending)
			}
			for _, q := range lanes {
				gauge(descWaiting, float64(q.NumPending), st.Name, q.Name)
				out := handed(int64(q.NumAckPending), max(st.State.Msgs, stored[st.Name]), waiting) // at most: the stream tells of its lanes together
				gauge(descHanded, float64(out), st.Name, q.Name)
				gauge(descRedelivered, float64(min(int64(q.NumRedelivered), out)), st.Name, q.Name)
				gauge(descPulls, float64(q.NumWaiting), st.Name, q.Name)
			}
		}
	}
}

// stored is how many messages each stream holds.
func (c collector) stored() map[string]uint64 {
	n := map[string]uint64{}
	info, err := c.s.ns.Jsz(&server.JSzOptions{Streams: true})
	if err != nil { // JetStream is going down: none
		return n
	}
	for _, a := range info.AccountDetails {
		for i := range a.Streams {
			n[a.Streams[i].Name] = a.Streams[i].State.Msgs
		}
	}
	return n
}
