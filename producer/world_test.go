package producer

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// world is a broker and what a test puts around it.
type world struct {
	t    *testing.T
	srv  *broker.Server
	conn *broker.Conn
}

const testAckWait = 500 * time.Millisecond

// newWorld starts a broker inside the process, with the model's queues declared.
func newWorld(t *testing.T, s *broker.Server) *world {
	t.Helper()
	if s.Dir == "" {
		s.Dir = t.TempDir()
	}
	s.Log = slog.New(slog.DiscardHandler)
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, srv: s}
	t.Cleanup(func() { w.srv.Stop() })
	w.conn = w.connect()
	if err := w.declarer().Base(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) declarer() broker.Declarer {
	return broker.Declarer{JS: w.conn.JS, Disk: 1 << 30, AckWait: testAckWait}
}

// connect opens one more connection, which ends with the test.
func (w *world) connect() *broker.Conn {
	w.t.Helper()
	var c *broker.Conn
	var err error
	if w.srv.Addr == "" {
		c, err = w.srv.Connect(w.t.Context(), "test")
	} else {
		c, err = broker.Connect(w.t.Context(), broker.Access{URL: w.srv.URL()}, "test", slog.New(slog.DiscardHandler))
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(c.Close)
	return c
}

// until waits for what cond sees, as long as the test may run.
func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	over := time.After(time.Minute)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-over:
			t.Fatalf("never: %s", what)
		case <-tick.C:
		}
	}
}

// background runs f until the test ends.
func (w *world) background(f func(ctx context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); f(ctx) }()
	stop = func() { cancel(); <-done }
	w.t.Cleanup(stop)
	return stop
}

// owner is an owner of the job of a dataset, with times for tests.
func (w *world) owner(d *Dataset) *Owner {
	w.t.Helper()
	job, _, err := Create(w.t.Context(), w.conn, d.Job(), false)
	if err != nil {
		w.t.Fatal(err)
	}
	return &Owner{Conn: w.connect(), Dataset: d, Job: job, AckWait: testAckWait, LeaseTTL: time.Second, Disk: 1 << 30}
}

// started is an owner at work.
type started struct {
	t    *testing.T
	stop context.CancelFunc
	err  chan error
	once sync.Once
	got  error
}

// run starts an owner, which is stopped with the test.
func (w *world) run(o *Owner) *started {
	ctx, cancel := context.WithCancel(context.Background())
	s := &started{t: w.t, stop: cancel, err: make(chan error, 1)}
	go func() { s.err <- o.Run(ctx) }()
	w.t.Cleanup(func() { cancel(); s.end() })
	return s
}

// end waits for the end of the owner.
func (s *started) end() error {
	s.once.Do(func() {
		select {
		case s.got = <-s.err:
		case <-time.After(time.Minute):
			s.got = errors.New("the owner does not end")
		}
	})
	return s.got
}

// aggregator is a stand-in for the real one: it folds results into memory.
type aggregator struct {
	conn *broker.Conn
	job  proto.Job

	mu      sync.Mutex
	results map[int64][]*proto.Result // of each line, in the order of RES
	stream  int64
	seq     int64
	asked   int
	mute    bool  // does not answer
	behind  bool  // folds nothing
	page    int64 // ranges per answer at most; 0: as asked
	noKey   bool  // writes no progress
}

// aggregate starts an aggregator for one job.
func (w *world) aggregate(job proto.Job) *aggregator {
	w.t.Helper()
	a := &aggregator{conn: w.connect(), job: job, results: map[int64][]*proto.Result{}}
	sub, err := a.conn.NC.Subscribe(proto.SubjectMissing, a.answer)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := a.conn.NC.Flush(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = sub.Unsubscribe() })
	w.background(func(ctx context.Context) {
		for ctx.Err() == nil {
			a.fold(ctx)
			_ = sleep(ctx, 10*time.Millisecond) // ends with ctx
		}
	})
	return a
}

// fold reads what RES has and writes progress.
func (a *aggregator) fold(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	s, err := a.conn.JS.Stream(ctx, proto.ResultStream)
	if err != nil {
		return
	}
	i := s.CachedInfo()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.behind {
		return
	}
	if created := i.Created.UnixNano(); created != a.stream || int64(i.State.LastSeq) < a.seq {
		a.stream, a.seq = created, 0
	}
	for a.seq < int64(i.State.LastSeq) {
		m, err := s.GetMsg(ctx, uint64(a.seq+1))
		if err == nil {
			a.add(m.Data)
		} else if !errors.Is(err, jetstream.ErrMsgNotFound) {
			return
		}
		a.seq++
	}
	a.progress(ctx)
}

func (a *aggregator) add(b []byte) {
	r, err := proto.DecodeResult(b)
	if err == nil && r.Job == a.job.ID {
		a.results[r.Index] = append(a.results[r.Index], r)
	}
}

func (a *aggregator) progress(ctx context.Context) {
	p := proto.Progress{State: proto.FoldFolding, Lines: a.job.Lines}
	codes := map[string]int64{}
	for _, rs := range a.results {
		if r := best(rs); r.OK {
			p.OK++
		} else {
			p.Failed++
			codes[r.Code]++
		}
	}
	for code, n := range codes {
		p.Errors = append(p.Errors, proto.ErrorCount{Code: code, Count: n, CustomID: "x", Message: "because"})
	}
	if p.OK+p.Failed == p.Lines {
		p.State = proto.FoldDone
	}
	if a.noKey {
		return
	}
	kv, err := a.conn.JS.KeyValue(ctx, proto.JobsBucket)
	if err != nil {
		return
	}
	if b, err := p.Encode(); err == nil {
		_, _ = kv.Put(ctx, proto.ProgressKey(a.job.ID), b) // tried again soon
	}
}

// best is the result that counts.
func best(rs []*proto.Result) *proto.Result {
	for _, r := range rs {
		if r.OK {
			return r
		}
	}
	return rs[0]
}

func (a *aggregator) answer(m *nats.Msg) {
	var q proto.MissingQuestion
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked++
	if a.mute || q.Decode(m.Data) != nil {
		return
	}
	ans := proto.MissingAnswer{Known: q.Job == a.job.ID, Stream: a.stream, Seq: a.seq, Done: int64(len(a.results)) == a.job.Lines}
	most := q.Max
	if a.page > 0 {
		most = a.page
	}
	for i := q.From; i < a.job.Lines; i++ {
		if len(a.results[i]) > 0 {
			continue
		}
		if n := len(ans.Ranges); n > 0 && ans.Ranges[n-1].To == i {
			ans.Ranges[n-1].To++
			continue
		}
		if int64(len(ans.Ranges)) == most {
			ans.Next = i
			break
		}
		ans.Ranges = append(ans.Ranges, proto.Range{From: i, To: i + 1})
	}
	if b, err := ans.Encode(); err == nil {
		_ = m.Respond(b) // asked again otherwise
	}
}

// folded counts the lines that have a result.
func (a *aggregator) folded() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.results)
}

func (a *aggregator) questions() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked
}

// saysDone waits until the aggregator has said a few times that every line has ended.
func (a *aggregator) saysDone(t *testing.T) {
	t.Helper()
	until(t, "every line has ended", func() bool { return int64(a.folded()) == a.job.Lines })
	const times = 5
	before := a.questions()
	until(t, "the owner has heard so", func() bool { return a.questions() >= before+times })
}

// of returns the results of a line.
func (a *aggregator) of(i int64) []*proto.Result {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.results[i]
}

func (a *aggregator) set(f func(*aggregator)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f(a)
}

// okay answers every request.
func okay(q *proto.Request) *proto.Result {
	return &proto.Result{Job: q.Job, Index: q.Index, CustomID: q.CustomID, Model: q.Model, OK: true, Status: 200, Body: []byte("{}"), Worker: "w", Run: q.Run}
}

// work starts a worker for a model; answer says how a request ends, nil: it is held for ever.
func (w *world) work(model string, answer func(*proto.Request) *proto.Result) (stop func()) {
	c := w.connect()
	return w.background(func(ctx context.Context) {
		for ctx.Err() == nil {
			if err := workOnce(ctx, c, model, answer); err != nil {
				_ = sleep(ctx, 20*time.Millisecond)
			}
		}
	})
}

func workOnce(ctx context.Context, c *broker.Conn, model string, answer func(*proto.Request) *proto.Result) error {
	cctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	con, err := c.JS.Consumer(cctx, proto.RequestStream(model), string(proto.LaneNormal))
	if err != nil {
		return err
	}
	b, err := con.Fetch(64, jetstream.FetchMaxWait(100*time.Millisecond))
	if err != nil {
		return err
	}
	for m := range b.Messages() {
		if err := end(cctx, c, m, answer); err != nil {
			return err
		}
	}
	return b.Error()
}

// end ends a request as answer says.
func end(ctx context.Context, c *broker.Conn, m jetstream.Msg, answer func(*proto.Request) *proto.Result) error {
	q, err := proto.DecodeRequest(m.Data())
	if err != nil {
		return err
	}
	r := answer(q)
	if r == nil {
		return nil
	}
	body, err := r.Encode()
	if err != nil {
		return err
	}
	if _, err := c.JS.Publish(ctx, proto.ResultSubject(q.Job), body); err != nil {
		return err
	}
	return m.Ack()
}

// pull takes n requests of a model, as a worker does that goes on with them.
func (w *world) pull(model string, n int) (out []jetstream.Msg) {
	w.t.Helper()
	con, err := w.conn.JS.Consumer(w.t.Context(), proto.RequestStream(model), string(proto.LaneNormal))
	if err != nil {
		w.t.Fatal(err)
	}
	b, err := con.Fetch(n, jetstream.FetchMaxWait(time.Minute))
	if err != nil {
		w.t.Fatal(err)
	}
	for m := range b.Messages() {
		out = append(out, m)
	}
	return out
}

// feed reads the job's record of its owner.
func (w *world) feed(id string) (f proto.Feed) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	v, err := broker.Get(ctx, w.conn.JS, id)
	if err != nil {
		return proto.Feed{Note: err.Error()}
	}
	return v.Feed
}

// queued counts the requests of a job.
func (w *world) queued(job *proto.Job) (n int64) {
	for _, m := range job.Models {
		s, err := w.conn.JS.Stream(context.Background(), proto.RequestStream(m.Model))
		if err != nil {
			continue
		}
		info, err := s.Info(context.Background(), jetstream.WithSubjectFilter(proto.RequestFilter(m.Model, job.ID)))
		if err != nil {
			continue
		}
		for _, k := range info.State.Subjects {
			n += int64(k)
		}
	}
	return n
}

// put writes a key of JOBS.
func (w *world) put(key string, v interface{ Encode() ([]byte, error) }) {
	w.t.Helper()
	b, err := v.Encode()
	if err == nil {
		_, err = mustKV(w.t, w).Put(w.t.Context(), key, b)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// keys lists the keys of JOBS.
func (w *world) keys() []string {
	w.t.Helper()
	keys, err := mustKV(w.t, w).Keys(w.t.Context())
	if err != nil && !errors.Is(err, jetstream.ErrNoKeysFound) {
		w.t.Fatal(err)
	}
	return keys
}

// remove is `millrace rm --force`.
func (w *world) remove(id string) {
	w.t.Helper()
	v, err := broker.Get(w.t.Context(), w.conn.JS, id)
	if err == nil {
		err = broker.Remove(w.t.Context(), w.conn.JS, v)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) want(id, what string) {
	w.t.Helper()
	if err := broker.Want(w.t.Context(), w.conn.JS, id, proto.Control{Want: what}); err != nil {
		w.t.Fatal(err)
	}
}

// copyDir copies the broker's folder as it is.
func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil && !strings.Contains(err.Error(), "no such file") {
		t.Fatal(err)
	}
}

func writeFile(name, text string) error { return os.WriteFile(name, []byte(text), 0o644) }
