package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"millrace/broker"
)

// TestRunsTakeNoLock: whoever looks for runs leaves their locks alone, also where one was killed and another one starts.
func TestRunsTakeNoLock(t *testing.T) {
	a := &app{data: t.TempDir(), log: slog.New(slog.DiscardHandler)}
	dir := a.runDir("gone-0")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := (endpoint{URL: "nats://" + freePort(t)}).write(dir); err != nil {
		t.Fatal(err)
	}
	if b := a.runs(t.Context()); len(b.conns) != 0 {
		t.Errorf("%d runs", len(b.conns))
	}
	if exists(dir + "/lock") {
		t.Error("the folder was locked")
	}
}

// TestRunsOfAnotherToken: a port that is another broker's by now is not a run.
func TestRunsOfAnotherToken(t *testing.T) {
	a := &app{data: filepath.Join(t.TempDir(), "[x"), log: slog.New(slog.DiscardHandler)}
	srv := &broker.Server{Dir: t.TempDir(), Addr: "127.0.0.1:0", Token: newToken(), Log: a.log}
	if err := srv.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer srv.Stop()
	for name, token := range map[string]string{"gone-0": newToken(), "here-0": srv.Token} {
		if err := os.MkdirAll(a.runDir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := (endpoint{URL: srv.URL(), Token: token}).write(a.runDir(name)); err != nil {
			t.Fatal(err)
		}
	}
	b := a.runs(t.Context())
	defer b.close()
	if len(b.conns) != 1 {
		t.Errorf("%d runs", len(b.conns))
	}
}

// TestEnsureToken: the token is made once, for its owner alone; a file that a power failure left empty is replaced and not
// written over, so that it never holds half a token.
func TestEnsureToken(t *testing.T) {
	name := filepath.Join(t.TempDir(), "new", "broker", "token")
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	left := name + ".left"
	if err := os.WriteFile(name, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(name, left); err != nil {
		t.Fatal(err)
	}
	token, err := ensureToken(name)
	if err != nil || len(token) != 32 {
		t.Fatalf("%q, %v", token, err)
	}
	if again, err := ensureToken(name); again != token || err != nil {
		t.Errorf("%q, %v at the next start", again, err)
	}
	if st, err := os.Stat(name); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if st, err := os.Stat(left); err != nil || st.Size() != 0 {
		t.Errorf("the file was written over: %d bytes, %v", st.Size(), err)
	}
}
