package worker

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"millrace/broker"
	"millrace/proto"
)

const patient = 30 * time.Second // how long a test waits for what must come

// rig is a broker with the queues of one model, and what came out of it.
type rig struct {
	tb     testing.TB
	server *broker.Server
	conn   *broker.Conn
	model  string

	mu      sync.Mutex
	results []*proto.Result
	came    chan struct{}
	sub     *nats.Subscription
}

func newRig(tb testing.TB) *rig {
	tb.Helper()
	if t, ok := tb.(*testing.T); ok {
		tb.Cleanup(func() { goleak.VerifyNone(t, goleak.IgnoreCurrent()) })
	}
	return newRigAt(tb, &broker.Server{Dir: tb.TempDir()}, 0)
}

// newRigAt starts the server and declares what a worker needs.
func newRigAt(tb testing.TB, server *broker.Server, ackWait time.Duration) *rig {
	tb.Helper()
	r := &rig{tb: tb, server: server, model: "m", came: make(chan struct{}, 1)}
	ctx := context.Background()
	must(tb, server.Start(ctx))
	tb.Cleanup(func() { r.server.Stop() })
	conn, err := server.Connect(ctx, "test")
	must(tb, err)
	r.conn = conn
	tb.Cleanup(conn.Close)
	r.declare(ackWait)
	r.listen()
	return r
}

func (r *rig) declare(ackWait time.Duration) {
	r.tb.Helper()
	d := broker.Declarer{JS: r.conn.JS, Disk: 8 << 30, AckWait: ackWait}
	must(r.tb, d.Base(context.Background()))
	must(r.tb, d.Model(context.Background(), r.model))
}

// listen collects what is published as results.
func (r *rig) listen() {
	sub, err := r.conn.NC.Subscribe("res.>", func(m *nats.Msg) {
		res, err := proto.DecodeResult(m.Data)
		if err != nil {
			r.tb.Errorf("result: %v", err)
			return
		}
		r.mu.Lock()
		r.results = append(r.results, res)
		r.mu.Unlock()
		select {
		case r.came <- struct{}{}:
		default:
		}
	})
	must(r.tb, err)
	r.sub = sub
	must(r.tb, sub.SetPendingLimits(-1, -1))
	must(r.tb, r.conn.NC.Flush())
}

// deaf stops listening: a publisher to a subject that someone listens on is not told that there is no stream.
func (r *rig) deaf() { must(r.tb, r.sub.Unsubscribe()) }

// stored returns what the stream of results holds; nothing when there is none.
func (r *rig) stored() map[int64]*proto.Result {
	r.tb.Helper()
	out := map[int64]*proto.Result{}
	st, err := r.conn.JS.Stream(context.Background(), proto.ResultStream)
	if err != nil {
		return out
	}
	for seq := range st.CachedInfo().State.Msgs {
		m, err := st.GetMsg(context.Background(), seq+1)
		must(r.tb, err)
		res, err := proto.DecodeResult(m.Data)
		must(r.tb, err)
		out[res.Index] = res
	}
	return out
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// send puts requests of job "j" into the normal lane.
func (r *rig) send(reqs ...*proto.Request) {
	r.tb.Helper()
	r.sendTo(proto.LaneNormal, reqs...)
}

func (r *rig) sendTo(lane proto.Lane, reqs ...*proto.Request) {
	r.tb.Helper()
	for _, q := range reqs {
		b, err := q.Encode()
		must(r.tb, err)
		_, err = r.conn.JS.PublishAsync(proto.RequestSubject(r.model, lane, q.Job), b)
		must(r.tb, err)
	}
	select {
	case <-r.conn.JS.PublishAsyncComplete():
	case <-time.After(patient):
		r.tb.Fatal("requests were not stored")
	}
}

// request makes line i of job "j".
func request(i int) *proto.Request {
	return &proto.Request{Job: "j", Index: int64(i), CustomID: "id-" + strconv.Itoa(i), URL: "/v1/chat/completions", Model: "m",
		Body: []byte(`{"model":"m","messages":[{"role":"user","content":"` + strconv.Itoa(i) + `"}]}`)}
}

func requests(n int) []*proto.Request {
	var out []*proto.Request
	for i := range n {
		out = append(out, request(i))
	}
	return out
}

// wait returns the results when there are n.
func (r *rig) wait(n int) []*proto.Result {
	r.tb.Helper()
	return r.waitFor(patient, n)
}

// waitFor is wait for as long as is given.
func (r *rig) waitFor(d time.Duration, n int) []*proto.Result {
	r.tb.Helper()
	timeout := time.After(d)
	for {
		got := r.seen()
		if len(got) >= n {
			return got
		}
		select {
		case <-r.came:
		case <-timeout:
			r.tb.Fatalf("%d results, want %d", len(got), n)
		}
	}
}

// seen returns the results that have come.
func (r *rig) seen() []*proto.Result {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.results
}

// pending is how many messages of the model's queue are stored, and how many of these are handed out.
func (r *rig) pending() (stored, out int) {
	r.tb.Helper()
	ctx := context.Background()
	st, err := r.conn.JS.Stream(ctx, proto.RequestStream(r.model))
	must(r.tb, err)
	stored = int(st.CachedInfo().State.Msgs)
	for _, lane := range proto.Lanes() {
		c, err := st.Consumer(ctx, string(lane))
		must(r.tb, err)
		out += c.CachedInfo().NumAckPending
	}
	return stored, out
}

// settled waits until the queue holds so many messages and nobody holds one. It takes them all and gives them back:
// the broker counts a message that was given back as handed out until it is handed out again.
func (r *rig) settled(want int) {
	r.tb.Helper()
	r.until("queue settled", func() bool {
		stored, out := r.pending()
		if want == 0 || stored != want {
			return stored == want && out == 0
		}
		return len(r.takeAll()) == want
	})
}

// takeAll reads what can be had at once, and gives it back.
func (r *rig) takeAll() []*proto.Request {
	r.tb.Helper()
	var out []*proto.Request
	var back []jetstream.Msg
	for _, lane := range proto.Lanes() {
		c, err := r.conn.JS.Consumer(context.Background(), proto.RequestStream(r.model), string(lane))
		must(r.tb, err)
		b, err := c.FetchNoWait(1000)
		must(r.tb, err)
		for m := range b.Messages() {
			q, err := proto.DecodeRequest(m.Data())
			must(r.tb, err)
			out, back = append(out, q), append(back, m)
		}
	}
	for _, m := range back {
		must(r.tb, m.Nak())
	}
	return out
}

// until waits for a condition that no event tells.
func (r *rig) until(what string, ok func() bool) {
	r.tb.Helper()
	eventually(r.tb, what, ok)
}

func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	deadline := time.Now().Add(patient)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			tb.Fatalf("not within %s: %s", patient, what)
		}
		<-tick.C
	}
}

// running is a worker that works.
type running struct {
	*Worker
	leave, stop context.CancelFunc
	interrupt   context.CancelCauseFunc // leave, for a cause
	done        chan error
}

// start runs a worker until the test ends.
func (r *rig) start(e Engine, change ...func(*Worker)) *running {
	r.tb.Helper()
	w := &Worker{Conn: r.conn, Self: broker.Self(), Engine: e, ProbeEvery: 20 * time.Millisecond, RetryEvery: 50 * time.Millisecond,
		grace: 200 * time.Millisecond, Log: r.log()}
	for _, c := range change {
		c(w)
	}
	take, interrupt := context.WithCancelCause(context.Background())
	stop, cancel := context.WithCancel(context.Background())
	leave := func() { interrupt(nil) }
	run := &running{Worker: w, leave: leave, stop: cancel, interrupt: interrupt, done: make(chan error, 1)}
	go func() { run.done <- w.Run(take, stop) }()
	r.tb.Cleanup(func() {
		leave()
		cancel()
		run.end(r.tb)
	})
	return run
}

// end waits for the worker's end.
func (w *running) end(tb testing.TB) {
	tb.Helper()
	select {
	case err := <-w.done:
		w.done <- err
		if err != nil {
			tb.Errorf("worker: %v", err)
		}
	case <-time.After(patient):
		tb.Fatal("worker does not end")
	}
}

func (r *rig) log() *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{r.tb}, &slog.HandlerOptions{Level: slog.LevelInfo}))
}

type testWriter struct{ tb testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	if _, bench := w.tb.(*testing.B); !bench {
		w.tb.Log(strings.TrimSpace(string(b)))
	}
	return len(b), nil
}

// workers returns the heartbeats.
func (r *rig) workers() []*proto.Worker {
	r.tb.Helper()
	ctx := context.Background()
	kv, err := r.conn.JS.KeyValue(ctx, proto.WorkersBucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil // it is in the broker's memory, and declared anew after a restart
	}
	must(r.tb, err)
	keys, err := kv.Keys(ctx)
	if err != nil {
		return nil // none
	}
	var out []*proto.Worker
	for _, k := range keys {
		if e, err := kv.Get(ctx, k); err == nil {
			w := new(proto.Worker)
			must(r.tb, w.Decode(e.Value()))
			out = append(out, w)
		}
	}
	return out
}

// state waits until the one worker says that its engine is in a state, and returns the record.
func (r *rig) state(want string) *proto.Worker {
	r.tb.Helper()
	var got *proto.Worker
	r.until("engine "+want, func() bool {
		for _, w := range r.workers() {
			if w.State == want {
				got = w
				return true
			}
		}
		return false
	})
	return got
}

// reason waits until a worker says that its engine is in a state for a reason that contains a text.
func (r *rig) reason(state, text string) {
	r.tb.Helper()
	r.until("engine "+state+" for "+text, func() bool {
		return slices.ContainsFunc(r.workers(), func(w *proto.Worker) bool { return w.State == state && strings.Contains(w.Reason, text) })
	})
}

// exactly checks that every index from 0 to n-1 has one result, and returns them by index.
func exactly(tb testing.TB, got []*proto.Result, n int) map[int64]*proto.Result {
	tb.Helper()
	by := map[int64]*proto.Result{}
	for _, r := range got {
		if by[r.Index] != nil {
			tb.Errorf("index %d has two results", r.Index)
		}
		by[r.Index] = r
	}
	for i := range n {
		if by[int64(i)] == nil {
			tb.Errorf("index %d has no result", i)
		}
	}
	return by
}

// signs returns a function that waits for the next sign of life of any line.
func (r *rig) signs() func() {
	r.tb.Helper()
	came := make(chan struct{}, 1<<10)
	_, err := r.conn.NC.Subscribe("$JS.ACK.>", func(m *nats.Msg) {
		if string(m.Data) == string(verbProgress) {
			select {
			case came <- struct{}{}:
			default: // enough have come
			}
		}
	})
	must(r.tb, err)
	return func() {
		r.tb.Helper()
		select {
		case <-came:
		case <-time.After(patient):
			r.tb.Fatal("no sign of life")
		}
	}
}
