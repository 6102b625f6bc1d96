package broker_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"millrace/broker"
	"millrace/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, s *broker.Server) *broker.Conn {
	t.Helper()
	if s.Dir == "" {
		s.Dir = t.TempDir()
	}
	s.Log = slog.New(slog.DiscardHandler)
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	c, err := s.Connect(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// bucket starts a broker that has all that jobs need, and opens one of its buckets.
func bucket(t *testing.T, name string) (*broker.Conn, jetstream.KeyValue) {
	t.Helper()
	c := start(t, &broker.Server{})
	if err := (broker.Declarer{JS: c.JS, Disk: 1 << 30}).Base(t.Context()); err != nil {
		t.Fatal(err)
	}
	kv, err := c.JS.KeyValue(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return c, kv
}

func TestServerRefusals(t *testing.T) {
	dir := t.TempDir()
	first := &broker.Server{Dir: dir, Addr: "127.0.0.1:0", Token: "secret"}
	start(t, first)
	second := &broker.Server{Dir: dir}
	if err := second.Start(t.Context()); !errors.Is(err, broker.ErrInUse) {
		t.Errorf("folder in use: %v", err)
	}
	addr := strings.TrimPrefix(first.URL(), "nats://")
	third := &broker.Server{Dir: t.TempDir(), Addr: addr}
	if err := third.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "choose another --addr") {
		t.Errorf("port taken: %v", err)
	}
	for _, token := range []string{"", "wrong"} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		_, err := broker.Connect(ctx, broker.Access{URL: first.URL(), Token: token}, "test", slog.New(slog.DiscardHandler))
		cancel()
		if err == nil || errors.Is(err, broker.ErrUnreachable) || !strings.Contains(strings.ToLower(err.Error()), "authorization") {
			t.Errorf("token %q: %v", token, err)
		}
	}
	c, err := broker.Connect(t.Context(), broker.Access{URL: first.URL(), Token: "secret"}, "test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestConnectNobodyThere(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := broker.Connect(ctx, broker.Access{URL: "nats://" + addr}, "test", slog.New(slog.DiscardHandler)); !errors.Is(err, broker.ErrUnreachable) {
		t.Errorf("error %v", err)
	}
}

func owner(id string) proto.Owner { return proto.Owner{ID: id, Host: "elsewhere"} }

func lease(t *testing.T, c *broker.Conn, self proto.Owner, ttl time.Duration) *broker.Lease {
	t.Helper()
	kv, err := c.JS.CreateOrUpdateKeyValue(t.Context(), proto.JobsConfig())
	if err != nil {
		t.Fatal(err)
	}
	return &broker.Lease{KV: kv, Key: proto.LeaseKey, Self: self, TTL: ttl,
		Value: func(o proto.Owner) ([]byte, error) { return o.Encode() },
		Holder: func(v []byte) (proto.Owner, error) {
			var o proto.Owner
			return o, o.Decode(v)
		}}
}

func TestLease(t *testing.T) {
	c := start(t, &broker.Server{})
	a, b := lease(t, c, owner("a"), time.Hour), lease(t, c, owner("b"), time.Hour)
	var w broker.Watch
	if _, err := a.Try(t.Context(), &w); err != nil {
		t.Fatal(err)
	}
	if h, err := b.Try(t.Context(), &w); !errors.Is(err, broker.ErrLeaseHeld) || h.ID != "a" {
		t.Fatalf("held lease: %v by %q", err, h.ID)
	}
	if err := a.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Try(t.Context(), &w); err != nil {
		t.Fatalf("released lease: %v", err)
	}
	if err := a.Renew(t.Context()); !errors.Is(err, broker.ErrLeaseLost) {
		t.Fatalf("renewed what another holds: %v", err)
	}
}

// TestLeaseOfSilentHolder: a holder on another machine that fell silent loses the lease; its own renewal, late as it
// comes, is refused.
func TestLeaseOfSilentHolder(t *testing.T) {
	c := start(t, &broker.Server{})
	a, b := lease(t, c, owner("a"), time.Hour), lease(t, c, owner("b"), 100*time.Millisecond)
	var w broker.Watch
	if _, err := a.Try(t.Context(), &w); err != nil {
		t.Fatal(err)
	}
	var holders []string
	for {
		o, err := b.Try(t.Context(), &w)
		if err == nil {
			break
		}
		if !errors.Is(err, broker.ErrLeaseHeld) {
			t.Fatal(err)
		}
		if !slices.Contains(holders, o.ID) {
			holders = append(holders, o.ID)
		}
	}
	if !slices.Equal(holders, []string{"a"}) {
		t.Errorf("met %v", holders)
	}
	if err := a.Renew(t.Context()); !errors.Is(err, broker.ErrLeaseLost) {
		t.Errorf("late renewal: %v", err)
	}
}

// TestLeaseOfDeadProcess: a dead process of the same machine is not waited for, a living one is.
func TestLeaseOfDeadProcess(t *testing.T) {
	c := start(t, &broker.Server{})
	self := broker.Self()
	gone := self
	gone.ID, gone.PID = "gone", 1<<22+1 // above Linux' largest PID
	var w broker.Watch
	if _, err := lease(t, c, gone, time.Hour).Try(t.Context(), &w); err != nil {
		t.Fatal(err)
	}
	if _, err := lease(t, c, self, time.Hour).Try(t.Context(), &w); err != nil {
		t.Fatalf("lease of a dead process: %v", err)
	}
	other := broker.Self()
	if _, err := lease(t, c, other, time.Hour).Try(t.Context(), &w); !errors.Is(err, broker.ErrLeaseHeld) {
		t.Fatalf("lease of a living process: %v", err)
	}
	reused := self
	reused.ID, reused.Start = "reused", "1" // our PID, but a process that started at another time
	kv, v := mine(t, c, reused)
	if _, err := kv.Put(t.Context(), proto.LeaseKey, v); err != nil {
		t.Fatal(err)
	}
	if _, err := lease(t, c, other, time.Hour).Try(t.Context(), &w); err != nil {
		t.Fatalf("lease of a dead process whose PID is in use again: %v", err)
	}
}

func mine(t *testing.T, c *broker.Conn, o proto.Owner) (jetstream.KeyValue, []byte) {
	t.Helper()
	v, err := o.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return lease(t, c, o, time.Hour).KV, v
}

// TestLeaseSurvivesEmptyBroker: the holder goes on when the key is gone or older than it knows.
func TestLeaseSurvivesEmptyBroker(t *testing.T) {
	c := start(t, &broker.Server{})
	a := lease(t, c, owner("a"), time.Hour)
	var w broker.Watch
	if _, err := a.Try(t.Context(), &w); err != nil {
		t.Fatal(err)
	}
	if err := c.JS.DeleteKeyValue(t.Context(), proto.JobsBucket); err != nil {
		t.Fatal(err)
	}
	a.KV = lease(t, c, owner("a"), time.Hour).KV
	if err := a.Renew(t.Context()); err != nil {
		t.Fatalf("renew on an empty broker: %v", err)
	}
	// An older disk: the key is ours, at another revision.
	o := owner("a")
	v, err := o.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.KV.Put(t.Context(), a.Key, v); err != nil {
		t.Fatal(err)
	}
	if err := a.Renew(t.Context()); err != nil {
		t.Fatalf("renew our own at another revision: %v", err)
	}
	// A renewal whose answer we did not wait for: letting go works all the same.
	if _, err := a.KV.Put(t.Context(), a.Key, v); err != nil {
		t.Fatal(err)
	}
	if err := a.Release(t.Context()); err != nil {
		t.Fatalf("release our own at another revision: %v", err)
	}
}

func TestJobs(t *testing.T) {
	c, kv := bucket(t, proto.JobsBucket)
	put := func(key string, r interface{ Encode() ([]byte, error) }) {
		b, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := kv.Put(t.Context(), key, b); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{"alpha-1", "alpha-2", "beta"} {
		put(proto.JobKey(id), &proto.Job{ID: id, Lines: 2, Name: "name of " + id})
	}
	put(proto.ProgressKey("beta"), &proto.Progress{State: proto.FoldDone, OK: 2})
	put(proto.FeedKey("alpha-1"), &proto.Feed{Owner: owner("x"), State: proto.FeedFeeding})
	all, err := broker.Jobs(t.Context(), c.JS)
	if err != nil {
		t.Fatal(err)
	}
	for what, want := range map[string]string{"beta": "finished", "alpha-1": "running", "name of alpha-2": "orphaned", "b": "finished", "Alpha_1": "running"} {
		v, err := broker.Choose(all, what)
		if err != nil || v.State() != want {
			t.Errorf("%s: %s, %v, want %s", what, v.State(), err, want)
		}
	}
	for _, what := range []string{"", "データ", ".", "-", "*", "alp-", "Übeta", "x"} { // no file of these names has a job here
		if v, err := broker.Choose(all, what); !errors.Is(err, broker.ErrNoJob) {
			t.Errorf("%q is job %q, %v", what, v.Job.ID, err)
		}
	}
	silent, err := broker.Get(t.Context(), c.JS, "alpha-1")
	if err != nil || silent.Silent <= 0 || silent.Silent > time.Minute {
		t.Errorf("silent for %s, %v", silent.Silent, err)
	}
	if silent.Silent = 2 * broker.DefaultLeaseTTL; silent.State() != broker.StateOrphaned {
		t.Errorf("a job whose owner has been silent for %s is %s", silent.Silent, silent.State())
	}
	if _, err := broker.Choose(all, "alpha"); err == nil || !strings.Contains(err.Error(), "alpha-1, alpha-2") && !strings.Contains(err.Error(), "alpha-2, alpha-1") {
		t.Errorf("ambiguous: %v", err)
	}
	if err := broker.Want(t.Context(), c.JS, "alpha-1", proto.Control{Want: proto.WantPause}); err != nil {
		t.Fatal(err)
	}
	v, err := broker.Get(t.Context(), c.JS, "alpha-1")
	if err != nil || v.State() != broker.StatePaused {
		t.Errorf("paused job is %s, %v", v.State(), err)
	}
	if err := broker.Remove(t.Context(), c.JS, v); err != nil {
		t.Fatal(err)
	}
	all, err = broker.Jobs(t.Context(), c.JS)
	if err != nil || len(all) != 2 {
		t.Errorf("%d jobs after the removal, %v", len(all), err)
	}
}

// TestFollow: whoever watches a job hears that it was removed; one that is back soon goes on.
func TestFollow(t *testing.T) {
	c, kv := bucket(t, proto.JobsBucket)
	spec, err := (&proto.Job{ID: "j"}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	put := func() {
		if _, err := kv.Put(t.Context(), proto.JobKey("j"), spec); err != nil {
			t.Error(err)
		}
	}
	remove := func() {
		if err := broker.Remove(t.Context(), c.JS, broker.JobView{Job: proto.Job{ID: "j"}}); err != nil {
			t.Error(err)
		}
	}
	put()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	looks := 0
	err = broker.Follow(ctx, c.JS, "j", time.Millisecond, func(broker.JobView) bool {
		if looks++; looks == 1 {
			remove()
		}
		return true
	})
	if !errors.Is(err, broker.ErrNoJob) || !strings.Contains(err.Error(), "removed") || looks != 1 {
		t.Errorf("after the removal: %v, %d looks", err, looks)
	}
	// The job comes back at the first look that does not find it.
	looks = 0
	err = broker.Follow(ctx, refill{c.JS, put}, "j", time.Millisecond, func(broker.JobView) bool { looks++; return false })
	if err != nil || looks != 1 {
		t.Errorf("job that came back: %v, %d looks", err, looks)
	}
}

// refill fills a broker after it was looked into.
type refill struct {
	jetstream.JetStream
	put func()
}

func (r refill) KeyValue(ctx context.Context, bucket string) (jetstream.KeyValue, error) {
	kv, err := r.JetStream.KeyValue(ctx, bucket)
	return emptyOnce{kv, r.put}, err
}

// emptyOnce finds nothing, and then there is something.
type emptyOnce struct {
	jetstream.KeyValue
	put func()
}

func (e emptyOnce) Get(ctx context.Context, key string) (jetstream.KeyValueEntry, error) {
	got, err := e.KeyValue.Get(ctx, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) && key == proto.JobKey("j") {
		e.put()
	}
	return got, err
}

func TestDoctor(t *testing.T) {
	c := start(t, &broker.Server{})
	level := func(check string) string {
		for _, f := range broker.Doctor(t.Context(), c) {
			if f.Check == check {
				return f.Level
			}
		}
		return ""
	}
	if got := level("stream RES"); got != broker.LevelNote {
		t.Errorf("undeclared stream: %q", got)
	}
	d := broker.Declarer{JS: c.JS, Disk: 1 << 30}
	if err := d.Base(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := level("stream RES"); got != broker.LevelOK {
		t.Errorf("declared stream: %q", got)
	}
	cfg := proto.ResultStreamConfig(1 << 26)
	cfg.Discard = jetstream.DiscardOld
	if _, err := c.JS.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if got := level("stream RES"); got != broker.LevelBad {
		t.Errorf("a stream that drops results: %q", got)
	}
}

// TestDoctorOfWorkers: what keeps a worker idle is looked for where it is, at its engine or at the broker.
func TestDoctorOfWorkers(t *testing.T) {
	c, kv := bucket(t, proto.WorkersBucket)
	for id, w := range map[string]proto.Worker{
		"ok":     {State: proto.EngineReady},
		"half":   {State: proto.EngineReady, Reason: "cannot use the queues: it is another's"},
		"queue":  {State: proto.EngineNoQueue, Reason: "cannot use the queues: it is another's"},
		"engine": {State: proto.EngineNoModel, Reason: "engine serves no model"},
	} {
		w.ID = id
		b, err := w.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := kv.Put(t.Context(), id, b); err != nil {
			t.Fatal(err)
		}
	}
	mend := map[string]string{"ok": "", "half": "at the broker", "queue": "at the broker", "engine": "look at its engine"}
	for _, f := range broker.Doctor(t.Context(), c) {
		id, is := strings.CutPrefix(f.Check, "worker ")
		if !is {
			continue
		}
		if want := mend[id]; !strings.Contains(f.Mend, want) || (want == "") != (f.Level == broker.LevelOK) {
			t.Errorf("%+v", f)
		}
		delete(mend, id)
	}
	if len(mend) > 0 {
		t.Errorf("nothing is said of %v", mend)
	}
}
