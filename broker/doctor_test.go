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
	c := start(t, &broker.Server{})
	if err := (broker.Declarer{JS: c.JS, Disk: 1 << 30}).Base(t.Context()); err != nil {
		t.Fatal(err)
	}
	kv, err := c.JS.KeyValue(t.Context(), proto.WorkersBucket)
	if err != nil {
		t.Fatal(err)
	}
	good, err := (&proto.Worker{ID: "good", State: proto.EngineReady, Models: []string{"m"}}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	_, err1 := kv.Put(t.Context(), "bad", []byte("nothing of use"))
	_, err2 := kv.Put(t.Context(), "good", good)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	ws, err := broker.Workers(t.Context(), c.JS)
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
