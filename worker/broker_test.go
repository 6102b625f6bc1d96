package worker

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"millrace/broker"
	"millrace/proto"
)

// newRigTCP is a rig whose broker may be restarted.
func newRigTCP(t *testing.T) *rig {
	t.Helper()
	t.Cleanup(func() { goleak.VerifyNone(t, goleak.IgnoreCurrent()) })
	r := &rig{tb: t, model: "m", came: make(chan struct{}, 1)}
	r.server = &broker.Server{Dir: t.TempDir(), Addr: freeAddr(t)}
	must(t, r.server.Start(t.Context()))
	t.Cleanup(func() { r.server.Stop() })
	conn, err := broker.Connect(t.Context(), broker.Access{URL: r.server.URL()}, "test", r.log())
	must(t, err)
	t.Cleanup(conn.Close)
	r.conn = conn
	r.declare(0)
	r.listen()
	return r
}

// restart stops the broker and starts it again, with another disk if one is given.
func (r *rig) restart(dir string) {
	r.tb.Helper()
	addr := r.server.Addr
	if dir == "" {
		dir = r.server.Dir
	}
	r.server.Stop()
	r.until("connection is gone", func() bool { return !r.conn.NC.IsConnected() })
	r.server = &broker.Server{Dir: dir, Addr: addr}
	must(r.tb, r.server.Start(context.Background()))
	r.until("connection is back", r.conn.NC.IsConnected)
}

// TestBrokerRestart: lines in flight outlive a restart of the broker, and nothing runs twice.
func TestBrokerRestart(t *testing.T) {
	r, f := newRigTCP(t), newFake(t)
	release := make(chan struct{})
	f.set(func() { f.work = after(release) })
	r.send(requests(20)...)
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 8 })
	f.enter(8)
	r.restart("")
	close(release)
	exactly(t, r.wait(20), 20)
	r.settled(0)
	if n := len(f.came); n != 12 {
		t.Errorf("%d calls after the first 8", n)
	}
}

// TestBrokerEmptyDisk: the broker comes back with nothing. The worker declares its queues again, what it has done is
// published, and new lines are run.
func TestBrokerEmptyDisk(t *testing.T) {
	r, f := newRigTCP(t), newFake(t)
	release := make(chan struct{})
	f.set(func() { f.work = after(release) })
	r.send(requests(4)...)
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 4 })
	f.enter(4)
	r.deaf()
	r.restart(t.TempDir())
	r.until("queues are declared", func() bool {
		_, err := r.conn.JS.Consumer(context.Background(), proto.RequestStream("m"), string(proto.LaneLow))
		return err == nil
	})
	for i := range 4 {
		r.send(request(10 + i)) // the sequence numbers of the old queue
	}
	close(release)
	r.until("all results are stored", func() bool { return len(r.stored()) == 8 })
	r.settled(0)
}

// resize limits a stream to what it holds and so many bytes more.
func (r *rig) resize(name string, more int64) {
	r.tb.Helper()
	ctx := context.Background()
	st, err := r.conn.JS.Stream(ctx, name)
	must(r.tb, err)
	cfg := st.CachedInfo().Config
	cfg.MaxBytes = max(int64(st.CachedInfo().State.Bytes)+more, 1)
	_, err = r.conn.JS.UpdateStream(ctx, cfg)
	must(r.tb, err)
}

// TestResultsFull: a result that cannot be stored is tried until it can.
func TestResultsFull(t *testing.T) {
	r, f := newRig(t), newFake(t)
	r.resize(proto.ResultStream, 10)
	r.send(request(0))
	r.start(f.engine())
	f.enter(1)
	r.wait(1) // it was sent
	if stored, _ := r.pending(); stored != 1 {
		t.Error("acknowledged, and not stored")
	}
	r.resize(proto.ResultStream, 1<<20)
	r.settled(0)
	if n := len(f.came); n != 0 {
		t.Errorf("%d more calls", n)
	}
}

// TestQueueFull: a retry for which there is no room goes back as it was.
func TestQueueFull(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.work = says(500, `{"error":{"message":"x"}}`) })
	r.send(request(0))
	r.resize(proto.RequestStream("m"), 0)
	reg := prometheus.NewRegistry()
	w := r.start(f.engine(), func(w *Worker) { w.Registry = reg })
	f.enter(1)
	r.until("given back", func() bool { return value(t, reg, "millrace_worker_given_back_total") == 1 })
	w.leave()
	w.end(t)
	if stored, _ := r.pending(); stored != 1 {
		t.Errorf("%d stored", stored)
	}
}

// TestAbandon: a worker that is stopped while the results cannot be stored gives the lines back.
func TestAbandon(t *testing.T) {
	r, f := newRig(t), newFake(t)
	r.resize(proto.ResultStream, 10)
	r.send(requests(3)...)
	w := r.start(f.engine())
	r.wait(3)
	w.leave()
	w.stop()
	w.end(t)
	r.settled(3)
}

// TestConsumerGone: somebody removed a consumer.
func TestConsumerGone(t *testing.T) {
	r, f := newRig(t), newFake(t)
	r.send(request(0))
	r.start(f.engine())
	r.wait(1)
	r.settled(0)
	must(t, r.conn.JS.DeleteConsumer(context.Background(), proto.RequestStream("m"), string(proto.LaneNormal)))
	r.send(request(1))
	exactly(t, r.wait(2), 2)
}

// TestStreamGone: somebody removed the queue of a model, and the results.
func TestStreamGone(t *testing.T) {
	r, f := newRig(t), newFake(t)
	r.send(request(0))
	r.start(f.engine())
	r.wait(1)
	r.settled(0)
	r.deaf()
	ctx := context.Background()
	must(t, r.conn.JS.DeleteStream(ctx, proto.RequestStream("m")))
	must(t, r.conn.JS.DeleteStream(ctx, proto.ResultStream))
	r.until("queue is back", func() bool {
		_, err := r.conn.JS.Consumer(ctx, proto.RequestStream("m"), string(proto.LaneLow))
		return err == nil
	})
	b, err := request(1).Encode()
	must(t, err)
	r.until("request is stored", func() bool { // a stream that was just deleted may swallow one
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err := r.conn.JS.Publish(ctx, proto.RequestSubject("m", proto.LaneNormal, "j"), b)
		return err == nil
	})
	r.settled(0)
	if got := r.stored(); len(got) != 1 || got[1] == nil {
		t.Errorf("stored %v", got)
	}
}

// TestBrokerOlderDisk: the broker comes back with a copy of its disk that is older than what is held. Words on it
// would hit other messages of the same numbers.
func TestBrokerOlderDisk(t *testing.T) {
	r, f := newRigTCP(t), newFake(t)
	release := make(chan struct{})
	reg := prometheus.NewRegistry()
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 5; w.Registry = reg })
	r.send(requests(5)...)
	r.wait(5)
	r.settled(0)
	f.enter(5)
	old := t.TempDir()
	r.server.Stop()
	must(t, os.CopyFS(old, os.DirFS(r.server.Dir)))
	r.restart("")
	f.set(func() { f.work = after(release) })
	r.send(requests(10)[5:]...)
	f.enter(5)

	r.restart(old)
	for i := range 5 {
		r.send(request(100 + i)) // the sequence numbers of those that are held
	}
	c, err := r.conn.JS.Consumer(t.Context(), proto.RequestStream("m"), string(proto.LaneNormal))
	must(t, err)
	batch, err := c.Fetch(5, jetstream.FetchMaxWait(patient)) // somebody else has them now
	must(t, err)
	var theirs []jetstream.Msg
	for m := range batch.Messages() {
		theirs = append(theirs, m)
	}
	close(release)
	r.until("results are stored", func() bool { return len(r.stored()) == 10 })
	r.until("nothing is held", func() bool { return value(t, reg, "millrace_worker_held") == 0 })
	if stored, _ := r.pending(); stored != 5 || len(theirs) != 5 {
		t.Errorf("%d of %d requests are left", stored, len(theirs))
	}
	for _, m := range theirs {
		must(t, m.Nak())
	}
	r.until("all results are stored", func() bool { return len(r.stored()) == 15 })
	r.settled(0)
}
