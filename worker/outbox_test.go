package worker

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/proto"
)

// torn publishes, and says of the first message that it could not: so it looks when the connection breaks while nats.go
// has noted a message and not yet written it. nats.go tells of such a message again when it sees that the connection broke.
type torn struct {
	jetstream.JetStream
	up    func() // waits for the connection
	calls atomic.Int64
}

func (t *torn) PublishMsgAsync(m *nats.Msg, opts ...jetstream.PublishOpt) (jetstream.PubAckFuture, error) {
	n := t.calls.Add(1)
	t.up()
	f, err := t.JetStream.PublishMsgAsync(m, opts...)
	if n == 1 && err == nil {
		return nil, nats.ErrReconnectBufExceeded
	}
	return f, err
}

// TestOutboxToldTwice: a result whose publish failed, and is told of again when the connection breaks, is tried once.
func TestOutboxToldTwice(t *testing.T) {
	r := newRigTCP(t)
	must(t, r.conn.JS.DeleteStream(t.Context(), proto.ResultStream)) // and r listens: nobody acknowledges, nobody says no
	stop, cancel := context.WithCancel(t.Context())
	q := &queue{model: r.model}
	o := &outbox{log: r.log(), stop: stop, missing: func() {}, held: &held{nc: r.conn.NC, lines: map[key]*line{}}}
	must(t, openOutbox(r.conn.JS, o))
	js := &torn{JetStream: o.js, up: func() { r.until("connected", r.conn.NC.IsConnected) }}
	o.js = js

	data, err := (&proto.Result{Job: "j", OK: true}).Encode()
	must(t, err)
	p := &parcel{line: &line{req: request(0), queue: q, key: key{q, 1}}, msg: &nats.Msg{Subject: proto.ResultSubject("j"), Data: data}}
	o.send(p)
	o.publish(p)                        // as run does
	told := o.js.PublishAsyncComplete() // is closed when nats.go has told of all that it gave up
	must(t, r.conn.NC.ForceReconnect())
	<-told
	o.waiting.Wait()
	if n := js.calls.Load(); n != 2 {
		t.Errorf("published %d times, want once again", n)
	}
	cancel()
	if n := o.abandon(); n != 1 {
		t.Errorf("%d parcels are left, want 1", n)
	}
}
