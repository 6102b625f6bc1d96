package broker_test

import (
	"context"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

func TestDeclare(t *testing.T) {
	c := start(t, &broker.Server{})
	d := broker.Declarer{JS: c.JS, Disk: 1 << 30}
	for range 2 { // the second time finds everything there
		if err := d.Base(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := d.Model(t.Context(), "org/model"); err != nil {
			t.Fatal(err)
		}
	}
	s, err := c.JS.Stream(t.Context(), proto.RequestStream("org/model"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	if cfg.MaxBytes != 1<<30/10 || cfg.Discard != jetstream.DiscardNew || cfg.MaxAge != 0 || cfg.Metadata[proto.MetaModel] != "org/model" {
		t.Errorf("stream %+v", cfg)
	}
	con, err := s.Consumer(t.Context(), "normal")
	if err != nil {
		t.Fatal(err)
	}
	if got := con.CachedInfo().Config; got.AckWait != proto.DefaultAckWait || got.MaxDeliver != -1 || got.MaxAckPending != -1 {
		t.Errorf("consumer %+v", got)
	}
	// An AckWait that was asked for is set, and stays when nobody asks.
	for _, w := range []time.Duration{2 * time.Second, 0} {
		if err := (broker.Declarer{JS: c.JS, AckWait: w}).Model(t.Context(), "org/model"); err != nil {
			t.Fatal(err)
		}
		con, err := s.Consumer(t.Context(), "normal")
		if err != nil || con.CachedInfo().Config.AckWait != 2*time.Second {
			t.Errorf("ack wait %v, %v", con.CachedInfo().Config.AckWait, err)
		}
	}
}

func TestDeclareMendsDrift(t *testing.T) {
	c := start(t, &broker.Server{})
	old := proto.ResultStreamConfig(64 << 20)
	old.Discard, old.MaxAge, old.AllowBatchPublish, old.Metadata = jetstream.DiscardOld, time.Hour, false, nil
	if _, err := c.JS.CreateStream(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	if err := (broker.Declarer{JS: c.JS, Disk: 1 << 30}).Base(t.Context()); err != nil {
		t.Fatal(err)
	}
	s, err := c.JS.Stream(t.Context(), proto.ResultStream)
	if err != nil {
		t.Fatal(err)
	}
	got := s.CachedInfo().Config
	if drift := broker.Drift(got, proto.ResultStreamConfig(0)); len(drift) > 0 || got.MaxBytes != 64<<20 {
		t.Errorf("still differs in %v, size %d", drift, got.MaxBytes)
	}
}

func TestDeclareRefusesForeignStream(t *testing.T) {
	c := start(t, &broker.Server{})
	other := proto.RequestStreamConfig("mine", 32<<20)
	other.Metadata[proto.MetaModel] = "yours"
	if _, err := c.JS.CreateStream(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	err := broker.Declarer{JS: c.JS}.Model(t.Context(), "mine")
	if err == nil || !strings.Contains(err.Error(), `belongs to model "yours"`) {
		t.Errorf("error %v", err)
	}
}

// declaredStreams are those of Base and of the model m.
func declaredStreams() []string {
	return []string{"KV_" + proto.JobsBucket, "KV_" + proto.WorkersBucket, "OBJ_" + proto.InputsBucket, proto.ResultStream, proto.RequestStream("m")}
}

// declared declares all there is for the model m, and returns how it is configured.
func declared(t *testing.T, c *broker.Conn, d broker.Declarer) map[string]any {
	t.Helper()
	d.JS, d.Disk = c.JS, 1<<30
	if err := d.Base(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Model(t.Context(), "m"); err != nil {
		t.Fatal(err)
	}
	return configured(t, c)
}

func configured(t *testing.T, c *broker.Conn) map[string]any {
	t.Helper()
	out := map[string]any{}
	for _, name := range declaredStreams() {
		s, err := c.JS.Stream(t.Context(), name)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		out[name] = s.CachedInfo().Config
	}
	for _, lane := range proto.Lanes() {
		con, err := c.JS.Consumer(t.Context(), proto.RequestStream("m"), string(lane))
		if err != nil {
			t.Fatalf("%s: %v", lane, err)
		}
		out["consumer "+string(lane)] = con.CachedInfo().Config
	}
	return out
}

func sameConfig(t *testing.T, have, want map[string]any) {
	t.Helper()
	for name := range want {
		if !reflect.DeepEqual(have[name], want[name]) {
			t.Errorf("%s was changed from\n%+v to\n%+v", name, want[name], have[name])
		}
	}
}

func editStream(t *testing.T, c *broker.Conn, name string, edit func(*jetstream.StreamConfig)) {
	t.Helper()
	s, err := c.JS.Stream(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	edit(&cfg)
	if _, err := c.JS.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// TestDeclareKeepsTheOperators: what an operator chose for streams and buckets stays, and a role that finds everything
// there asks for no change at all.
func TestDeclareKeepsTheOperators(t *testing.T) {
	c := start(t, &broker.Server{})
	declared(t, c, broker.Declarer{})
	for _, name := range declaredStreams() {
		editStream(t, c, name, func(cfg *jetstream.StreamConfig) {
			cfg.MaxBytes, cfg.Description, cfg.Metadata["team"] = 77<<20, "the operator's", "a"
			if cfg.Storage == jetstream.FileStorage {
				cfg.Compression = jetstream.S2Compression
			}
		})
	}
	want := configured(t, c)
	asked := make(chan *nats.Msg, 256)
	sub, err := c.NC.ChanSubscribe("$JS.API.>", asked)
	if err != nil {
		t.Fatal(err)
	}
	sameConfig(t, declared(t, c, broker.Declarer{}), want)
	if err := sub.Unsubscribe(); err != nil {
		t.Fatal(err)
	}
	if len(asked) == 0 {
		t.Error("the test hears nothing")
	}
	for len(asked) > 0 {
		if s := (<-asked).Subject; strings.Contains(s, ".UPDATE.") || strings.Contains(s, ".CREATE.") {
			t.Errorf("asked for a change: %s", s)
		}
	}

	// An older version's are mended, and nothing but what is ours.
	editStream(t, c, "KV_"+proto.WorkersBucket, func(cfg *jetstream.StreamConfig) { cfg.MaxAge = time.Hour })
	editStream(t, c, "KV_"+proto.JobsBucket, func(cfg *jetstream.StreamConfig) {
		cfg.MaxAge, cfg.Discard, cfg.MaxMsgsPerSubject = time.Hour, jetstream.DiscardOld, 5
		delete(cfg.Metadata, proto.MetaSchema)
	})
	editStream(t, c, "OBJ_"+proto.InputsBucket, func(cfg *jetstream.StreamConfig) { cfg.MaxAge = time.Hour })
	sameConfig(t, declared(t, c, broker.Declarer{}), want)
}

// TestDeclareLeavesNewer: an older version that starts after a newer one undoes nothing of it; an AckWait that was
// asked for is set all the same.
func TestDeclareLeavesNewer(t *testing.T) {
	c := start(t, &broker.Server{})
	declared(t, c, broker.Declarer{})
	for _, name := range declaredStreams() {
		editStream(t, c, name, func(cfg *jetstream.StreamConfig) {
			cfg.Metadata[proto.MetaSchema], cfg.MaxMsgsPerSubject, cfg.MaxAge = "1000", 7, 30*time.Hour
			if !strings.HasPrefix(name, "OBJ_") {
				cfg.Subjects = append(cfg.Subjects, "newer."+name)
			}
		})
	}
	for _, lane := range proto.Lanes() {
		cfg := proto.ConsumerConfig("m", lane, 11*time.Second)
		cfg.Metadata[proto.MetaSchema], cfg.MaxAckPending = "1000", 12345
		if _, err := c.JS.UpdateConsumer(t.Context(), proto.RequestStream("m"), cfg); err != nil {
			t.Fatal(err)
		}
	}
	want := configured(t, c)
	sameConfig(t, declared(t, c, broker.Declarer{}), want)
	for name, cfg := range want {
		if cfg, ok := cfg.(jetstream.ConsumerConfig); ok {
			cfg.AckWait = 2 * time.Second
			want[name] = cfg
		}
	}
	sameConfig(t, declared(t, c, broker.Declarer{AckWait: 2 * time.Second}), want)
	for _, f := range broker.Doctor(t.Context(), c) {
		if strings.HasPrefix(f.Check, "stream ") && f.Level == broker.LevelBad {
			t.Errorf("doctor: %+v", f)
		}
	}
}

// TestAckWaitOfBroker: what a broker was started with goes for the queues that it has and for those that roles declare
// later, also after a start without it; who asks for another gets another.
func TestAckWaitOfBroker(t *testing.T) {
	c := start(t, &broker.Server{})
	is := func(model string, want time.Duration) {
		t.Helper()
		for _, lane := range proto.Lanes() {
			con, err := c.JS.Consumer(t.Context(), proto.RequestStream(model), string(lane))
			if err != nil {
				t.Fatal(err)
			}
			if got := con.CachedInfo().Config.AckWait; got != want {
				t.Errorf("%s of %s: ack wait %s, want %s", lane, model, got, want)
			}
		}
	}
	model := func(name string, w time.Duration) {
		t.Helper()
		if err := (broker.Declarer{JS: c.JS, AckWait: w}).Model(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	launch := func(w time.Duration) { // a broker starts with --ack-wait, or without
		t.Helper()
		d := broker.Declarer{JS: c.JS, Disk: 1 << 30, AckWait: w}
		if err := d.Base(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := d.Queues(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	launch(0)
	model("old", 0)
	is("old", proto.DefaultAckWait)
	launch(7 * time.Second)
	is("old", 7*time.Second)
	model("new", 0)
	model("own", 3*time.Second)
	launch(0)
	model("newer", 0)
	is("new", 7*time.Second)
	is("own", 3*time.Second)
	is("newer", 7*time.Second)
}

// TestDeclareSideBySide: many may declare the same at the same instant, also where each would make it of another size.
func TestDeclareSideBySide(t *testing.T) {
	srv := &broker.Server{}
	start(t, srv)
	const roles, models = 8, 4
	conns := make([]*broker.Conn, roles)
	for i := range conns {
		var err error
		if conns[i], err = srv.Connect(t.Context(), fmt.Sprint("role", i)); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
	}
	together := func(declare func(broker.Declarer) error) {
		t.Helper()
		gate := make(chan struct{})
		var wg sync.WaitGroup
		for i, c := range conns {
			wg.Go(func() {
				<-gate
				if err := declare(broker.Declarer{JS: c.JS, Disk: 1<<30 + int64(i)<<20}); err != nil {
					t.Errorf("role %d: %v", i, err)
				}
			})
		}
		close(gate)
		wg.Wait()
	}
	together(func(d broker.Declarer) error { return d.Base(t.Context()) })
	for m := range models {
		together(func(d broker.Declarer) error { return d.Model(t.Context(), fmt.Sprint("m", m)) })
	}
	for m := range models {
		name := proto.RequestStream(fmt.Sprint("m", m))
		s, err := conns[0].JS.Stream(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if d := broker.Drift(s.CachedInfo().Config, proto.RequestStreamConfig(fmt.Sprint("m", m), 0)); len(d) > 0 || s.CachedInfo().State.Consumers != 3 {
			t.Errorf("%s differs in %v, %d consumers", name, d, s.CachedInfo().State.Consumers)
		}
	}
	// Two models of one token at one instant: one is refused, none gets the other's stream.
	name := proto.RequestStream("twin")
	lost := &late{JetStream: conns[0].JS, before: func() {
		cfg := proto.RequestStreamConfig("twin", 32<<20)
		cfg.Metadata[proto.MetaModel] = "its twin"
		if _, err := conns[1].JS.CreateStream(t.Context(), cfg); err != nil {
			t.Error(err)
		}
	}}
	if err := (broker.Declarer{JS: lost}).Model(t.Context(), "twin"); err == nil || !strings.Contains(err.Error(), `belongs to model "its twin"`) {
		t.Errorf("%s: %v", name, err)
	}
}

// late is a role whose look at a stream is answered just before somebody else makes it.
type late struct {
	jetstream.JetStream
	once   sync.Once
	before func()
}

func (l *late) CreateStream(ctx context.Context, cfg jetstream.StreamConfig) (jetstream.Stream, error) {
	l.once.Do(l.before)
	return l.JetStream.CreateStream(ctx, cfg)
}
