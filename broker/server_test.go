package broker_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"millrace/broker"
	"millrace/proto"
)

// TestStartSaysWhy: a server that cannot start says at once what is in its way and what to do, and leaves nothing
// behind.
func TestStartSaysWhy(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dir := t.TempDir()
	store := filepath.Join(dir, "jetstream")
	if err := os.WriteFile(store, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what string
		srv  *broker.Server
		says []string
	}{
		{"monitoring port taken", &broker.Server{Dir: t.TempDir(), Monitor: ln.Addr().String()}, []string{ln.Addr().String(), "in use", "choose another --monitor-addr"}},
		{"port taken", &broker.Server{Dir: t.TempDir(), Addr: ln.Addr().String()}, []string{ln.Addr().String(), "in use", "choose another --addr"}},
		{"store is a file", &broker.Server{Dir: dir}, []string{dir, "JetStream", "not a directory", "choose another --data"}},
	} {
		var log strings.Builder
		c.srv.Log = slog.New(slog.NewTextHandler(&log, nil))
		err := c.srv.Start(t.Context())
		if err == nil {
			t.Fatalf("%s: it started", c.what)
		}
		for _, s := range c.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: %q does not say %q", c.what, err, s)
			}
		}
		if strings.Contains(err.Error(), "\n") || strings.Contains(log.String(), "ERROR") {
			t.Errorf("%s: said more than once: %q and log %s", c.what, err, log.String())
		}
	}
	if err := os.Remove(store); err != nil {
		t.Fatal(err)
	}
	start(t, &broker.Server{Dir: dir}) // the folder was let go of
}

// TestStartEnds: a start that was called off leaves nothing behind.
func TestStartEnds(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (&broker.Server{Dir: dir}).Start(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	start(t, &broker.Server{Dir: dir})
}

// TestStartAfterKill: what nats-server rebuilds after a kill is no warning.
func TestStartAfterKill(t *testing.T) {
	dir, killed := t.TempDir(), filepath.Join(t.TempDir(), "killed")
	publish := func(c *broker.Conn) {
		for range 10 {
			if _, err := c.JS.Publish(t.Context(), proto.ResultSubject("j"), []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
	}
	first := &broker.Server{Dir: dir}
	c := start(t, first)
	if err := (broker.Declarer{JS: c.JS, Disk: 1 << 30}).Base(t.Context()); err != nil {
		t.Fatal(err)
	}
	publish(c)
	c.Close()
	first.Stop() // it writes its indexes
	publish(start(t, &broker.Server{Dir: dir}))
	if err := os.CopyFS(killed, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	second := &broker.Server{Dir: killed, Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	if err := second.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	second.Stop()
	if !strings.Contains(log.String(), "Stream state outdated") || strings.Contains(log.String(), "WARN") {
		t.Errorf("log:\n%s", log.String())
	}
}
