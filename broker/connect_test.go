package broker_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"millrace/broker"
	"millrace/proto"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// TestConnectFiles: a file that cannot be used is named at once, and nobody waits for a broker with it.
func TestConnectFiles(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, []byte("nothing of use"), 0o644); err != nil {
		t.Fatal(err)
	}
	for flag, as := range map[string][]broker.Access{
		"--creds":    {{Creds: missing}, {Creds: bad}, {Creds: t.TempDir()}},
		"--tls-ca":   {{TLSCA: missing}, {TLSCA: bad}, {TLSCA: t.TempDir()}},
		"--tls-cert": {{TLSCert: missing, TLSKey: bad}, {TLSCert: bad, TLSKey: bad}, {TLSCert: bad}, {TLSKey: bad}},
	} {
		for _, a := range as {
			a.URL = "nats://" + nobody(t)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			_, err := broker.Connect(ctx, a, "test", quiet())
			if !errors.Is(err, broker.ErrAccess) || errors.Is(err, broker.ErrUnreachable) || ctx.Err() != nil {
				t.Errorf("%+v: %v", a, err)
			} else if !strings.Contains(err.Error(), flag) {
				t.Errorf("%q does not name %s", err, flag)
			}
			cancel()
		}
	}
}

// TestConnectHidesSecrets: neither a log nor an error holds what is secret in a URL.
func TestConnectHidesSecrets(t *testing.T) {
	host := nobody(t)
	for _, c := range []struct{ url, shown string }{
		{"nats://" + host, "nats://" + host},
		{"nats://s3cret@" + host, "nats://:xxxxx@" + host},
		{"nats://me:s3cret@" + host, "nats://me:xxxxx@" + host},
		{"s3cret@" + host, ":xxxxx@" + host},
		{"nats://me:s3cret@" + host + ",tls://s3cret@" + host, "nats://me:xxxxx@" + host + ",tls://:xxxxx@" + host},
		{"nats://me:s3cret@" + host + "x", "nats://me:xxxxx@" + host + "x"},
		{"nats://me:s3c@ret@[" + host, "nats://me:xxxxx@[" + host},
	} {
		var log strings.Builder
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := broker.Connect(ctx, broker.Access{URL: c.url}, "test", slog.New(slog.NewTextHandler(&log, nil)))
		if err == nil || !strings.Contains(err.Error(), c.shown) || strings.Contains(err.Error()+log.String(), "s3c") {
			t.Errorf("%s: %v\n%s", c.url, err, log.String())
		}
	}
}

// TestConnectStranger: what is no broker is told from one that does not answer.
func TestConnectStranger(t *testing.T) {
	engine := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(engine.Close)
	hasty := httptest.NewUnstartedServer(http.NotFoundHandler())
	hasty.Config.ReadHeaderTimeout = 50 * time.Millisecond
	hasty.Start()
	t.Cleanup(hasty.Close)
	const isHTTP = "; it is an HTTP server, or a proxy; --engine names engines, --nats the broker"
	for name, c := range map[string]struct{ addr, want string }{
		"an engine":        {engine.Listener.Addr().String(), isHTTP},
		"one in a hurry":   {hasty.Listener.Addr().String(), isHTTP},
		"one that greets":  {greets(t, "SSH-2.0-OpenSSH_9.2\r\n"), "; --nats names the broker"},
		"nobody":           {nobody(t), ""},
		"one that is mute": {greets(t, ""), ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // what says nothing is waited for
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			want := "broker unreachable: what listens at nats://:xxxxx@" + c.addr + " is no NATS broker" + c.want
			if c.want == "" {
				want = "broker unreachable: no answer at nats://:xxxxx@" + c.addr + ": "
			}
			_, err := broker.Connect(ctx, broker.Access{URL: "nats://s3cret@" + c.addr}, "test", quiet())
			if !errors.Is(err, broker.ErrUnreachable) || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
		})
	}
}

// greets returns the address of what says something to everybody who comes, and no more.
func greets(t *testing.T, greeting string) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			_, _ = c.Write([]byte(greeting)) // who comes may be gone
		}
	}()
	t.Cleanup(func() { _ = ln.Close(); <-done })
	return ln.Addr().String()
}

// nobody returns an address at which nobody listens.
func nobody(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// TestClosed: whoever uses a connection to a broker that comes back with another token hears why it ends, and what to do.
func TestClosed(t *testing.T) {
	addr := nobody(t)
	first := &broker.Server{Dir: t.TempDir(), Addr: addr, Token: "old", Log: quiet()}
	if err := first.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := broker.Connect(t.Context(), broker.Access{URL: first.URL(), Token: "old"}, "test", quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, stop := c.While(t.Context())
	defer stop()
	first.Stop()
	if err := c.Closed(); err != nil {
		t.Errorf("closed while the broker is away: %v", err)
	}
	start(t, &broker.Server{Dir: t.TempDir(), Addr: addr, Token: "new"})
	<-ctx.Done()
	ferr := broker.Follow(t.Context(), c.JS, "j", time.Millisecond, func(broker.JobView) bool { return true })
	for what, err := range map[string]error{"cause": context.Cause(ctx), "Closed": c.Closed(), "Follow": ferr} {
		if !errors.Is(err, broker.ErrClosed) || !errors.Is(err, nats.ErrAuthorization) || !strings.Contains(err.Error(), "MILLRACE_TOKEN") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestWhile: a connection that we close ends what needs it, and is no refusal; what ends by itself lets go.
func TestWhile(t *testing.T) {
	c := start(t, &broker.Server{})
	done, stop := c.While(t.Context())
	stop()
	if !errors.Is(context.Cause(done), context.Canceled) {
		t.Errorf("after stop: %v", context.Cause(done))
	}
	ctx, stop := c.While(t.Context())
	defer stop()
	c.Close()
	<-ctx.Done()
	if err := context.Cause(ctx); !errors.Is(err, broker.ErrClosed) || errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("after Close: %v", err)
	}
	if err := broker.Follow(t.Context(), c.JS, "j", time.Millisecond, func(broker.JobView) bool { return true }); !errors.Is(err, broker.ErrClosed) {
		t.Errorf("Follow: %v", err)
	}
	if err := (broker.Declarer{JS: c.JS}).Base(t.Context()); err == nil || errors.Is(err, broker.ErrUnreachable) {
		t.Errorf("declare %s over a closed connection: %v", proto.JobsBucket, err)
	}
}
