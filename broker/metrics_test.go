package broker_test

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"millrace/broker"
	"millrace/proto"
)

// TestMetrics: what lies in the queues shows, and the names are as Prometheus wants them. What was purged does not show.
func TestMetrics(t *testing.T) {
	srv := &broker.Server{}
	c := start(t, srv)
	d := broker.Declarer{JS: c.JS, Disk: 1 << 30}
	if err := d.Base(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Model(t.Context(), "m"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := c.JS.Publish(t.Context(), proto.RequestSubject("m", proto.LaneNormal, "job"), []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	cons, err := c.JS.Consumer(t.Context(), proto.RequestStream("m"), string(proto.LaneNormal))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cons.Next(); err != nil {
		t.Fatal(err)
	}
	problems, err := testutil.CollectAndLint(srv.Metrics())
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v %v", problems, err)
	}
	q := `{lane="normal",stream="` + proto.RequestStream("m") + `"}`
	want := strings.NewReader(`
# HELP millrace_broker_queue_waiting Requests of a queue that were not handed out.
# TYPE millrace_broker_queue_waiting gauge
millrace_broker_queue_waiting` + strings.Replace(q, "normal", "high", 1) + ` 0
millrace_broker_queue_waiting` + strings.Replace(q, "normal", "low", 1) + ` 0
millrace_broker_queue_waiting` + q + ` 2
# HELP millrace_broker_queue_handed_out Requests of a queue that workers hold, or gave back for a while; for some time after a cancel at most so many.
# TYPE millrace_broker_queue_handed_out gauge
millrace_broker_queue_handed_out` + strings.Replace(q, "normal", "high", 1) + ` 0
millrace_broker_queue_handed_out` + strings.Replace(q, "normal", "low", 1) + ` 0
millrace_broker_queue_handed_out` + q + ` 1
`)
	if err := testutil.CollectAndCompare(srv.Metrics(), want, "millrace_broker_queue_waiting", "millrace_broker_queue_handed_out"); err != nil {
		t.Error(err)
	}
	if _, err := c.JS.Publish(t.Context(), proto.RequestSubject("m", proto.LaneNormal, "another"), nil); err != nil {
		t.Fatal(err)
	}
	if err := broker.Purge(t.Context(), c.JS, proto.RequestStream("m"), proto.RequestFilter("m", "job")); err != nil {
		t.Fatal(err)
	}
	none := "# HELP millrace_broker_queue_handed_out Requests of a queue that workers hold, or gave back for a while; for some time after a cancel at most so many.\n# TYPE millrace_broker_queue_handed_out gauge\n"
	for _, lane := range []string{"high", "low", "normal"} {
		none += "millrace_broker_queue_handed_out" + strings.Replace(q, "normal", lane, 1) + " 0\n"
	}
	if err := testutil.CollectAndCompare(srv.Metrics(), strings.NewReader(none), "millrace_broker_queue_handed_out"); err != nil {
		t.Errorf("of a job whose lines are gone: %v", err)
	}
}

// TestWorkersWhileTheyWrite: a worker is listed also while its heartbeat is being written.
func TestWorkersWhileTheyWrite(t *testing.T) {
	c, kv := bucket(t, proto.WorkersBucket)
	w := proto.Worker{ID: "w", State: proto.EngineReady, Models: []string{"m"}}
	v, err := w.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := kv.Put(t.Context(), w.ID, v); err != nil {
		t.Fatal(err)
	}
	quit, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		for {
			select {
			case <-quit:
				return
			default:
			}
			if _, err := kv.Put(t.Context(), w.ID, v); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for i := range 300 {
		ws, err := broker.Beats(t.Context(), c.JS)
		if err != nil || len(ws) != 1 {
			t.Errorf("look %d: %d workers, %v", i, len(ws), err)
			break
		}
	}
	close(quit)
	<-over
}
