package producer

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// stream makes the queue of a model with some settings changed.
func (w *world) stream(model string, change func(*jetstream.StreamConfig)) jetstream.Stream {
	w.t.Helper()
	cfg := proto.RequestStreamConfig(model, 1<<26)
	change(&cfg)
	s, err := w.conn.JS.CreateStream(w.t.Context(), cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func records(n, size int) (out [][]byte) {
	for i := range n {
		out = append(out, fmt.Appendf(nil, "%0*d", size, i))
	}
	return out
}

// stored reads what a stream holds.
func stored(t *testing.T, s jetstream.Stream) (out []string) {
	t.Helper()
	i, err := s.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for seq := i.State.FirstSeq; seq <= i.State.LastSeq && i.State.Msgs > 0; seq++ {
		m, err := s.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, string(m.Data))
	}
	return out
}

// TestWays: each way stores everything once and in order; where a stream does not take it, the plain way does.
func TestWays(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	all := func(*jetstream.StreamConfig) {}
	none := func(c *jetstream.StreamConfig) { c.AllowAtomicPublish, c.AllowBatchPublish = false, false }
	for name, c := range map[string]struct {
		way    way
		change func(*jetstream.StreamConfig)
	}{
		"single": {waySingle, all}, "fast": {wayFast, all}, "atomic": {wayAtomic, all}, "no fast": {wayFast, none}, "no atomic": {wayAtomic, none},
	} {
		t.Run(name, func(t *testing.T) {
			s := w.stream(name, c.change)
			p := publisher{conn: w.conn, way: c.way}
			want := records(batchLines, 20)
			subject := proto.RequestSubject(name, proto.LaneNormal, "j")
			for from := 0; from < len(want); {
				n, err := p.send(t.Context(), subject, want[from:])
				if err != nil && p.shy == 0 {
					t.Fatal(n, err)
				}
				from += n
			}
			if n, err := p.send(t.Context(), subject, want[:1]); n != 1 || err != nil {
				t.Errorf("one record: %d, %v", n, err)
			}
			got := stored(t, s)
			if c.way != waySingle && len(got) > batchLines+1 { // a refused batch may leave its first record
				got = got[len(got)-batchLines-1:]
			}
			for i, m := range append(want, want[0]) {
				if i >= len(got) || got[i] != string(m) {
					t.Fatalf("record %d of %d is not %s", i, len(got), m)
				}
			}
		})
	}
}

// TestChoose: a broker that fsyncs gets atomic batches, another one fast ones, an old one neither.
func TestChoose(t *testing.T) {
	for _, c := range []struct {
		always, atomic, batch bool
		want                  way
	}{{false, true, true, wayFast}, {true, true, true, wayAtomic}, {true, false, true, wayFast}, {false, true, false, waySingle}} {
		p := publisher{conn: &broker.Conn{SyncAlways: c.always}}
		p.choose(jetstream.StreamConfig{AllowAtomicPublish: c.atomic, AllowBatchPublish: c.batch})
		if p.way != c.want {
			t.Errorf("%+v: %v", c, p.way)
		}
	}
}

// TestFull: a full stream says so, and what is said to be stored is.
func TestFull(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	for name, way := range map[string]way{"single": waySingle, "fast": wayFast, "atomic": wayAtomic} {
		t.Run(name, func(t *testing.T) {
			s := w.stream(name, func(c *jetstream.StreamConfig) { c.MaxBytes = 20_000 })
			p := publisher{conn: w.conn, way: way}
			n, err := p.send(t.Context(), proto.RequestSubject(name, proto.LaneNormal, "j"), records(200, 200))
			if !errors.Is(err, errFull) {
				t.Fatalf("%d stored, error %v", n, err)
			}
			got := stored(t, s)
			if n > len(got) {
				t.Errorf("%d said to be stored, %d are", n, len(got))
			}
		})
	}
}

// TestPublishStops: an end of the context ends a batch, and nothing is left of it.
func TestPublishStops(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	w.stream("m", func(*jetstream.StreamConfig) {})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	before := w.conn.NC.NumSubscriptions()
	p := publisher{conn: w.conn, way: wayFast}
	if n, err := p.send(ctx, proto.RequestSubject("m", proto.LaneNormal, "j"), records(100, 20)); err == nil || n > 100 {
		t.Errorf("%d stored, %v", n, err)
	}
	if n := w.conn.NC.NumSubscriptions(); n > before {
		t.Errorf("%d subscriptions left", n-before)
	}
	c := w.connect()
	c.NC.Close()
	for _, way := range []way{waySingle, wayFast, wayAtomic} {
		p := publisher{conn: c, way: way}
		if n, err := p.send(t.Context(), "req.x", records(3, 20)); n != 0 || err == nil || permanent(err) {
			t.Errorf("way %v without a connection: %d, %v", way, n, err)
		}
	}
}

// TestTooLargeIsPermanent: a record over the broker's limit cannot be sent however often it is tried.
func TestTooLargeIsPermanent(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	w.stream("m", func(*jetstream.StreamConfig) {})
	big := [][]byte{make([]byte, proto.MaxPayload+1), {1}}
	for _, way := range []way{waySingle, wayFast, wayAtomic} {
		p := publisher{conn: w.conn, way: way}
		if _, err := p.send(t.Context(), proto.RequestSubject("m", proto.LaneNormal, "j"), big); !errors.Is(err, nats.ErrMaxPayload) || !permanent(err) {
			t.Errorf("way %v: %v", way, err)
		}
	}
}

// TestStuck: requests that their consumer will never hand out again are seen and dropped. Here they are parked by a
// delivery limit that somebody set; a broker that lost its last writes can leave the same.
func TestStuck(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	q := newQueue(w.conn, w.declarer(), nil, &proto.Job{ID: "j"}, "m")
	look := func() level {
		t.Helper()
		l, err := q.look(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	look()
	cfg := proto.ConsumerConfig("m", proto.LaneNormal, testAckWait)
	cfg.MaxDeliver = 1
	c, err := q.stream.UpdateConsumer(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := w.conn.JS.Publish(t.Context(), q.subject, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if look(); look().depth != 3 || !q.stuck.IsZero() {
		t.Error("requests that wait for workers are stuck")
	}
	b, err := c.Fetch(3)
	if err != nil {
		t.Fatal(err)
	}
	for range b.Messages() { // and nothing is acknowledged
	}
	if look(); look().depth != 3 || !q.stuck.IsZero() {
		t.Error("requests that a worker holds are stuck")
	}
	until(t, "they are parked", func() bool { look(); return !q.stuck.IsZero() })
	if _, err := w.conn.JS.Publish(t.Context(), proto.RequestSubject("m", proto.LaneNormal, "other"), []byte("x")); err != nil {
		t.Fatal(err)
	}
	if look(); q.stuck.IsZero() {
		t.Error("not stuck any more when another job's request waits")
	}
	until(t, "they have been stuck for AckWait", func() bool { look(); return q.dead() })
	if err := q.purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if look(); look().depth != 0 || !q.stuck.IsZero() {
		t.Errorf("stuck since %v", q.stuck)
	}
}

// TestAckWaitChanges: an AckWait that somebody changes while a job runs counts from the next look at a queue that stands.
func TestAckWaitChanges(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	q := newQueue(w.conn, w.declarer(), nil, &proto.Job{ID: "j"}, "m")
	if err := q.open(t.Context()); err != nil || q.ackWait != testAckWait {
		t.Fatalf("ack wait %v, %v", q.ackWait, err)
	}
	for _, lane := range []proto.Lane{proto.LaneNormal, proto.LaneHigh} {
		if _, err := w.conn.JS.Publish(t.Context(), proto.RequestSubject("m", lane, "j"), []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	for _, wait := range []time.Duration{time.Hour, time.Minute} {
		for _, lane := range proto.Lanes() {
			if _, err := q.stream.UpdateConsumer(t.Context(), proto.ConsumerConfig("m", lane, wait)); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 { // it stands at the second
			if _, err := q.look(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if q.ackWait != wait {
			t.Errorf("ack wait %v, want %v", q.ackWait, wait)
		}
	}
}

// TestStuckJob: an owner drops stuck requests and sends them again, whether all lines are enqueued or not.
func TestStuckJob(t *testing.T) {
	w := newWorld(t, &broker.Server{})
	o := w.owner(scanned(t, Input{Path: file(t, linesOf(100, "m"))}))
	o.Window = 20
	a := w.aggregate(o.Job)
	s := w.run(o)
	until(t, "the window is full", func() bool { return w.queued(&o.Job) == 20 })
	cfg := proto.ConsumerConfig("m", proto.LaneNormal, testAckWait)
	cfg.MaxDeliver = 1
	if _, err := w.conn.JS.UpdateConsumer(t.Context(), proto.RequestStream("m"), cfg); err != nil {
		t.Fatal(err)
	}
	var held atomic.Int64
	stop := w.work("m", func(*proto.Request) *proto.Result { held.Add(1); return nil })
	until(t, "a window is held by a worker that is gone", func() bool { return held.Load() == 20 })
	stop()
	until(t, "more is sent", func() bool { return w.feed(o.Job.ID).Enqueued > 20 })
	w.work("m", okay)
	if err := s.end(); err != nil || a.folded() != 100 {
		t.Errorf("%d folded, %v", a.folded(), err)
	}
}
