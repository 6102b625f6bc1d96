package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"millrace/broker"
	"millrace/proto"
)

// claim makes the queue of a model another model's: their names have one token.
func (r *rig) claim(model string) {
	r.tb.Helper()
	cfg := proto.RequestStreamConfig(model, 1<<20)
	cfg.Metadata[proto.MetaModel] = "another"
	_, err := r.conn.JS.CreateOrUpdateStream(r.tb.Context(), cfg)
	must(r.tb, err)
}

// says waits until the heartbeat has a state and a reason that contains a text, and checks which models it names.
func (r *rig) says(state, text string, models ...string) {
	r.tb.Helper()
	r.until("heartbeat "+state+", "+text, func() bool {
		return slices.ContainsFunc(r.workers(), func(w *proto.Worker) bool {
			return w.State == state && strings.Contains(w.Reason, text) && slices.Equal(w.Models, models)
		})
	})
}

// after answers well once a channel is closed.
func after(release chan struct{}) func(http.ResponseWriter, *http.Request, string) {
	return func(w http.ResponseWriter, r *http.Request, _ string) {
		select {
		case <-release:
			say(w, 200, okBody)
		case <-r.Context().Done():
		}
	}
}

// TestOneQueueFails: a model whose queue cannot be declared does not stop the others, and its worker says so.
func TestOneQueueFails(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.models = `"b","m"` })
	r.claim("b")
	r.send(requests(5)...)
	r.start(f.engine())
	exactly(t, r.wait(5), 5)
	r.settled(0)
	r.says(proto.EngineReady, `belongs to model "another"`, "m")
	must(t, r.conn.JS.DeleteStream(t.Context(), proto.RequestStream("b")))
	r.until("both are declared", func() bool {
		got := r.state(proto.EngineReady)
		return got.Reason == "" && len(got.Models) == 2
	})
}

// TestAllQueuesFail: a worker that has no queue says why it does not run.
func TestAllQueuesFail(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.models = `"b"` })
	r.claim("b")
	r.start(f.engine())
	r.says(proto.EngineNoQueue, `belongs to model "another"`)
	must(t, r.conn.JS.DeleteStream(t.Context(), proto.RequestStream("b")))
	r.says(proto.EngineReady, "", "b")
}

// TestOneQueueFailsLater: the same when the connection is made anew. What is held of the others is acknowledged.
func TestOneQueueFailsLater(t *testing.T) {
	r, f := newRigTCP(t), newFake(t)
	release := make(chan struct{})
	f.set(func() {
		f.models = `"b","m"`
		f.work = after(release)
	})
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 2 })
	r.says(proto.EngineReady, "", "b", "m")
	r.send(requests(2)...)
	f.enter(2)
	r.claim("b")
	r.restart("")
	close(release)
	exactly(t, r.wait(2), 2)
	r.settled(0)
	r.says(proto.EngineReady, `belongs to model "another"`, "m")
	r.send(request(2))
	exactly(t, r.wait(3), 3)
}

// TestTroubleOfSome: what is wrong with one queue is told, also where another one waits for the connection.
func TestTroubleOfSome(t *testing.T) {
	away := fmt.Errorf("look up stream: %w", nats.ErrConnectionReconnecting)
	var log strings.Builder
	q := newQueues(nil, 0, slog.New(slog.NewTextHandler(&log, nil)))
	q.changed = func() {}
	q.show(nil, map[string]error{"a": away, "b": errors.New("belongs to another"), "c": away})
	if got := log.String(); !strings.Contains(got, "belongs to another") || strings.Count(got, broker.ErrAway.Error()) != 1 {
		t.Errorf("%s", got)
	}
}

// TestModelLeaves: what is held of a model that its engine does not serve any more is acknowledged after the
// connection was made anew.
func TestModelLeaves(t *testing.T) {
	r, f := newRigTCP(t), newFake(t)
	release := make(chan struct{})
	f.set(func() {
		f.models = `"b","m"`
		f.work = after(release)
	})
	var looks atomic.Int64
	r.start(&looked{Engine: f.engine(), n: &looks})
	r.says(proto.EngineReady, "", "b", "m")
	r.send(requests(2)...)
	f.enter(2)
	from := looks.Load()
	r.until("it is known whose connections these are", func() bool { return looks.Load() >= from+2 })
	f.set(func() { f.models = `"b"` })
	r.says(proto.EngineReady, "", "b")
	r.restart("")
	close(release)
	exactly(t, r.wait(2), 2)
	r.settled(0)
}

// TestAckWaitChanges: somebody declares another AckWait. The worker's signs of life follow it, and the queues are
// the same ones: what is held is still known.
func TestAckWaitChanges(t *testing.T) {
	r, f := newRig(t), newFake(t)
	release := make(chan struct{})
	f.set(func() { f.work = after(release) })
	r.send(requests(2)...)
	r.start(f.engine())
	f.enter(2)
	signs := r.signs()
	r.declare(2 * time.Second)
	for range 8 { // in the old time they would come every 20 s
		signs()
	}
	close(release)
	exactly(t, r.wait(2), 2)
	r.settled(0)
	if n := len(f.came); n != 0 {
		t.Errorf("%d lines ran again", n)
	}
}

// TestQueuesLookAgain: an AckWait that was changed is found without a hint.
func TestQueuesLookAgain(t *testing.T) {
	r := newRig(t)
	q := newQueues(r.conn.JS, 0, r.log())
	q.every = 10 * time.Millisecond
	q.epoch = func() uint64 { return 0 }
	q.marks, q.found = func(*queue) []mark { return nil }, func(string, time.Time) {}
	q.changed, q.seen = func() {}, func() {}
	ctx, cancel := context.WithCancel(t.Context())
	var looking sync.WaitGroup
	looking.Go(func() { q.run(ctx) })
	t.Cleanup(func() {
		cancel()
		looking.Wait()
	})
	q.want([]string{"m"})
	r.until("queues are there", func() bool { return len(q.all()) == len(proto.Lanes()) })
	before := q.all()
	r.declare(time.Second)
	r.until("the new AckWait is known", func() bool { return q.shortest() == time.Second })
	if !slices.Equal(before, q.all()) {
		t.Error("the queues are other ones")
	}
}

// TestOlder tells a stream from an older copy of it.
func TestOlder(t *testing.T) {
	r := newRig(t)
	r.send(requests(3)...)
	name := proto.RequestStream("m")
	stream, err := r.conn.JS.Stream(t.Context(), name)
	must(t, err)
	var marks []mark
	for seq := range uint64(3) {
		m, err := stream.GetMsg(t.Context(), seq+1)
		must(t, err)
		marks = append(marks, mark{m.Sequence, m.Time})
	}
	other := func(m mark) mark { return mark{m.seq, m.stored.Add(1)} }
	must(t, stream.DeleteMsg(t.Context(), 3))
	for name, c := range map[string]struct {
		held []mark
		want bool
	}{
		"nothing held":      {nil, false},
		"the same":          {marks[:2], false},
		"one is gone":       {marks, false},
		"only one, gone":    {marks[2:], false},
		"past the end":      {append(slices.Clone(marks), mark{4, time.Now()}), true},
		"another":           {[]mark{marks[0], other(marks[1])}, true},
		"gone, and another": {[]mark{other(marks[1]), marks[2]}, true},
	} {
		if got, err := older(t.Context(), stream, c.held); got != c.want || err != nil {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}
