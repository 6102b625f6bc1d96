package broker_test

import (
	"context"
	"crypto/x509"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// TestRemedy: each reason why there is no connection has what to do about it, which is seldom to start a broker.
func TestRemedy(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	cert, key := ca.pair("server", x509.ExtKeyUsageServerAuth)
	plain := &broker.Server{Addr: "127.0.0.1:0", Token: "secret"}
	secure := &broker.Server{Addr: "127.0.0.1:0", Token: "secret", TLSCert: cert, TLSKey: key}
	mutual := &broker.Server{Addr: "127.0.0.1:0", Token: "secret", TLSCert: cert, TLSKey: key, TLSCA: ca.file}
	for _, s := range []*broker.Server{plain, secure, mutual} {
		start(t, s)
	}
	for _, c := range []struct {
		name string
		at   broker.Access
		want string
	}{
		{"nobody", broker.Access{URL: "nats://" + nobody(t)}, "start `millrace broker`"},
		{"token", broker.Access{URL: plain.URL(), Token: "wrong"}, "give its token with --token-file"},
		{"no TLS there", broker.Access{URL: "tls://" + strings.TrimPrefix(plain.URL(), "nats://"), Token: "secret"}, "it has no TLS, name it nats://"},
		{"not trusted", broker.Access{URL: secure.URL(), Token: "secret", TLSCA: other.file}, "with --tls-ca"},
		{"no certificate", broker.Access{URL: mutual.URL(), Token: "secret", TLSCA: ca.file}, "with --tls-cert"},
		{"file", broker.Access{URL: plain.URL(), Creds: filepath.Join(t.TempDir(), "missing")}, "mend that file"},
		{"URL", broker.Access{URL: "nats://a b"}, "--nats nats://HOST:PORT"},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		if c.name == "nobody" {
			cancel()
		}
		_, err := broker.Connect(ctx, c.at, "test", quiet())
		cancel()
		if got := broker.Remedy(err); err == nil || !strings.Contains(got, c.want) || c.name != "nobody" && strings.Contains(got, "start ") {
			t.Errorf("%s: %q for %v", c.name, got, err)
		}
	}
}

// TestDoctorOfPermissions: a user whom the broker lets in, and does not let do what a role does.
func TestDoctorOfPermissions(t *testing.T) {
	user := &server.User{Username: "me", Password: "secret", Permissions: &server.Permissions{
		Publish: &server.SubjectPermission{Deny: []string{"$JS.API.>"}}, Subscribe: &server.SubjectPermission{Allow: []string{">"}}}}
	ns, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true,
		JetStream: true, StoreDir: t.TempDir(), Users: []*server.User{user}})
	if err != nil {
		t.Fatal(err)
	}
	ns.Start()
	t.Cleanup(func() { ns.Shutdown(); ns.WaitForShutdown() })
	if !ns.ReadyForConnections(20 * time.Second) {
		t.Fatal("the server does not start")
	}
	c, err := broker.Connect(t.Context(), broker.Access{URL: strings.Replace(ns.ClientURL(), "//", "//me:secret@", 1)}, "test", quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	fs := broker.Doctor(t.Context(), c)
	last := fs[len(fs)-1]
	if last.Check != "jetstream" || last.Level != broker.LevelBad || !strings.Contains(strings.ToLower(last.Found), "permissions violation") ||
		!strings.Contains(last.Mend, "let this user do that") {
		t.Errorf("%+v", last)
	}
}

// TestWorkersUnread: a heartbeat that cannot be read, such as a newer version's, hides no other; who looks is told of it.
func TestWorkersUnread(t *testing.T) {
	c, kv := bucket(t, proto.WorkersBucket)
	good, err := (&proto.Worker{ID: "good", State: proto.EngineReady, Models: []string{"m"}}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	_, err1 := kv.Put(t.Context(), "bad", []byte("nothing of use"))
	_, err2 := kv.Put(t.Context(), "good", good)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	ws, err := broker.Beats(t.Context(), c.JS)
	if err != nil || len(ws) != 2 || ws[1].ID != "good" || ws[1].State != proto.EngineReady ||
		ws[0].ID != "bad" || ws[0].State != proto.EngineUnknown || !strings.Contains(ws[0].Reason, "cannot be read") {
		t.Errorf("%+v, %v", ws, err)
	}
	for _, f := range broker.Doctor(t.Context(), c) {
		if f.Check == "worker bad" && (f.Level != broker.LevelNote || !strings.Contains(f.Mend, "same version")) {
			t.Errorf("%+v", f)
		}
	}
}

// later is JetStream at a broker whose clock is ahead of the one that its messages were stamped by.
type later struct {
	jetstream.JetStream
	by time.Duration
}

func (l later) Stream(ctx context.Context, name string) (jetstream.Stream, error) {
	s, err := l.JetStream.Stream(ctx, name)
	return laterStream{s, l.by}, err
}

type laterStream struct {
	jetstream.Stream
	by time.Duration
}

func (l laterStream) CachedInfo() *jetstream.StreamInfo {
	info := *l.Stream.CachedInfo()
	info.TimeStamp = info.TimeStamp.Add(l.by)
	return &info
}

// TestSilentWorker: of a worker that was not heard of for a while it is said whatever it last said, and its model is served by
// nobody. What it had is told of only where it had something. It takes no bucket of jobs to list workers.
func TestSilentWorker(t *testing.T) {
	c := start(t, &broker.Server{})
	d := broker.Declarer{JS: c.JS, Disk: 1 << 30, AckWait: 7 * time.Second}
	if err := errors.Join(d.Base(t.Context()), d.Model(t.Context(), "m")); err != nil {
		t.Fatal(err)
	}
	kv, err := c.JS.KeyValue(t.Context(), proto.WorkersBucket)
	if err != nil {
		t.Fatal(err)
	}
	for id, held := range map[string]int64{"a": 0, "b": 8} {
		v, err := (&proto.Worker{ID: id, State: proto.EngineReady, Models: []string{"m"}, Held: held, TokenRate: 9, RateOf: proto.RateEngine, Metered: true, KVUsage: 0.5}).Encode()
		if err == nil {
			_, err = kv.Put(t.Context(), id, v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.JS.Publish(t.Context(), proto.RequestSubject("m", proto.LaneNormal, "job"), nil); err != nil {
		t.Fatal(err)
	}
	found := func() map[string]broker.Finding {
		out := map[string]broker.Finding{}
		for _, f := range broker.Doctor(t.Context(), c) {
			out[f.Check] = f
		}
		return out
	}
	if fs := found(); fs["worker a"].Level != broker.LevelOK || fs["model m"].Check != "" {
		t.Errorf("of workers that are there: %+v", fs)
	}
	js := c.JS
	c.JS = later{js, proto.WorkerSilent}
	fs := found()
	if a := fs["worker a"]; a.Level != broker.LevelNote || !strings.HasPrefix(a.Found, "silent: not heard of for ") || !strings.HasSuffix(a.Found, "; it may be gone") {
		t.Errorf("%+v", a)
	}
	if b := fs["worker b"]; !strings.HasSuffix(b.Found, "; if it is gone, what it had (8 lines) is free again once --ack-wait is over") {
		t.Errorf("%+v", b)
	}
	if m := fs["model m"]; m.Found != "no worker serves it; in its queue: 1 line" {
		t.Errorf("%+v", m)
	}
	beats, err := broker.Beats(t.Context(), c.JS)
	if err != nil || len(beats) != 2 {
		t.Fatalf("%+v, %v", beats, err)
	}
	if w := beats[0].Seen(); w.RateOf != "" || w.TokenRate != 0 || w.Metered || w.KVUsage != 0 {
		t.Errorf("of a worker that may be gone: %+v", w)
	}
	if err := js.DeleteKeyValue(t.Context(), proto.JobsBucket); err != nil {
		t.Fatal(err)
	}
	beats, err = broker.Beats(t.Context(), js)
	if err != nil || len(beats) != 2 {
		t.Fatalf("%+v, %v", beats, err)
	}
	if w := beats[0].Seen(); w.State != proto.EngineReady || w.RateOf != proto.RateEngine || w.TokenRate != 9 {
		t.Errorf("%+v", w)
	}
}

// TestOldRate: a rate that no aggregator tells anew is not told any more, whether somebody owns the job or not.
func TestOldRate(t *testing.T) {
	c, kv := bucket(t, proto.JobsBucket)
	put := func(key string, r interface{ Encode() ([]byte, error) }) {
		v, err := r.Encode()
		if err == nil {
			_, err = kv.Put(t.Context(), key, v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	put(proto.FeedKey("a"), &proto.Feed{Owner: owner("x")})
	for _, id := range []string{"a", "b"} {
		put(proto.JobKey(id), &proto.Job{ID: id, Lines: 9})
		put(proto.ProgressKey(id), &proto.Progress{State: proto.FoldFolding, OK: 5, RateLines: 2, RateTokens: 30})
	}
	for js, told := range map[jetstream.JetStream]bool{c.JS: true, later{c.JS, 16 * time.Second}: false} {
		for _, id := range []string{"a", "b"} {
			v, err := broker.Get(t.Context(), js, id)
			if p := v.Progress; err != nil || p.OK != 5 || (p.RateLines == 2) != told || (p.RateTokens == 30) != told || (p.RateLines == 0) == told {
				t.Errorf("%s, told %v: %+v, %v", id, told, p, err)
			}
		}
	}
}

// TestDoctorOfComing: where a worker of a model may run it yet, no other one is called for.
func TestDoctorOfComing(t *testing.T) {
	c := start(t, &broker.Server{})
	d := broker.Declarer{JS: c.JS, Disk: 1 << 30}
	if err := errors.Join(d.Base(t.Context()), d.Model(t.Context(), "m"), d.Model(t.Context(), "n")); err != nil {
		t.Fatal(err)
	}
	kv, err := c.JS.KeyValue(t.Context(), proto.WorkersBucket)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []proto.Worker{
		{ID: "a", State: proto.EngineWaiting, Models: []string{"m"}, Reason: "vLLM is starting again after it crashed (10 s)"},
		{ID: "b", State: proto.EngineDegraded, Models: []string{"n"}, GivenUp: "it died"},
	} {
		v, err := w.Encode()
		if err == nil {
			_, err = kv.Put(t.Context(), w.ID, v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, model := range []string{"m", "n"} {
		if _, err := c.JS.Publish(t.Context(), proto.RequestSubject(model, proto.LaneNormal, "job"), nil); err != nil {
			t.Fatal(err)
		}
	}
	mends := map[string]string{}
	for _, f := range broker.Doctor(t.Context(), c) {
		mends[f.Check] = f.Mend
	}
	if m, n := mends["model m"], mends["model n"]; m != "wait for worker a, or look at what keeps it: it is for this model" || !strings.HasPrefix(n, "start a worker") {
		t.Errorf("of m: %q; of n: %q", m, n)
	}
}

// TestHandedOut: what workers hold of a queue, and for how long; a queue that nobody declared has handed out nothing. What was
// purged, as of a job that was cancelled, is not held any more.
func TestHandedOut(t *testing.T) {
	c := start(t, &broker.Server{})
	d := broker.Declarer{JS: c.JS, Disk: 1 << 30, AckWait: time.Hour}
	if err := errors.Join(d.Base(t.Context()), d.Model(t.Context(), "m"), d.Model(t.Context(), "other")); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := c.JS.Publish(t.Context(), proto.RequestSubject("m", proto.LaneNormal, "job"), nil); err != nil {
			t.Fatal(err)
		}
	}
	con, err := c.JS.Consumer(t.Context(), proto.RequestStream("m"), string(proto.LaneNormal))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := con.Next(); err != nil {
			t.Fatal(err)
		}
	}
	qs, err := broker.HandedOut(t.Context(), c.JS, []string{"m", "none"})
	if err != nil || len(qs) != 2 || qs[0].Model != "m" || qs[0].HandedTo != 2 || qs[0].AckWait != time.Hour || qs[1].HandedTo != 0 {
		t.Errorf("%+v, %v", qs, err)
	}
	handed := func(want int64) {
		t.Helper()
		if qs, err := broker.Queues(t.Context(), c.JS); err != nil || len(qs) != 2 || qs[0].HandedTo != want {
			t.Errorf("%+v, %v, want %d", qs, err, want)
		}
		if qs, err := broker.HandedOut(t.Context(), c.JS, []string{"m"}); err != nil || len(qs) != 1 || qs[0].HandedTo != want {
			t.Errorf("%+v, %v, want %d", qs, err, want)
		}
	}
	handed(2)
	for range 5 { // the lines of another job stay
		if _, err := c.JS.Publish(t.Context(), proto.RequestSubject("m", proto.LaneNormal, "another"), nil); err != nil {
			t.Fatal(err)
		}
	}
	handed(2)
	if err := broker.Purge(t.Context(), c.JS, proto.RequestStream("m"), proto.RequestFilter("m", "job")); err != nil {
		t.Fatal(err)
	}
	handed(0)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if qs, err := broker.HandedOut(ctx, c.JS, []string{"m"}); err == nil {
		t.Errorf("of a broker that did not answer: %+v", qs)
	}
}
