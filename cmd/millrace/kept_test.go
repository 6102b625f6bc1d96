package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/producer"
	"millrace/proto"
	"millrace/sim"
)

// keep makes the folder of a run that was interrupted.
func keep(t *testing.T, data, id string) (dir string) {
	t.Helper()
	a := &app{data: data}
	p := &place{dir: a.runDir(id)}
	lock, err := broker.LockDir(p.dir)
	if err != nil {
		t.Fatal(err)
	}
	lock.Unlock()
	if err := p.remember(&proto.Job{ID: id, Input: "foo.jsonl"}, aggregator.Files{Output: filepath.Join(data, "r.jsonl"), Manifest: filepath.Join(data, "r.manifest.json")}); err != nil {
		t.Fatal(err)
	}
	return p.dir
}

// startBroker starts a broker and connects to it, both until the end of the test at the latest.
func startBroker(t *testing.T, srv *broker.Server) *broker.Conn {
	t.Helper()
	if err := srv.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(srv.Stop)
	conn, err := srv.Connect(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

// brokerWith is a broker that holds these jobs.
func brokerWith(t *testing.T, token string, ids ...string) *broker.Server {
	t.Helper()
	srv := &broker.Server{Dir: t.TempDir(), Addr: "127.0.0.1:0", Token: token, Log: slog.New(slog.DiscardHandler)}
	conn := startBroker(t, srv)
	for _, id := range ids {
		if _, _, err := producer.Create(t.Context(), conn, proto.Job{ID: id}, false); err != nil {
			t.Fatal(err)
		}
	}
	return srv
}

// TestKeptBesideBroker: the beginning of an id means one job, of those at the broker and of the runs that are kept.
func TestKeptBesideBroker(t *testing.T) {
	t.Setenv("NATS_URL", "")
	data := t.TempDir()
	dir := keep(t, data, "foo-c1")
	for _, ids := range [][]string{{"foo-a1", "foo-b1"}, {"foo-a1"}} {
		usual := brokerWith(t, "", ids...).URL()
		for _, command := range []string{"rm --force", "results", "verify", "status", "cancel"} {
			args := append(strings.Fields(command), "foo", "--data", data)
			code, said := usually(t.Context(), usual, io.Discard, args...)
			want := `^millrace: several jobs begin so: "foo" could be any of ` + strings.Join(ids, ", ") + ", foo-c1; give more of it\n$"
			if code != exitUsage || !regexp.MustCompile(want).MatchString(said) {
				t.Errorf("%s: exit code %d, %q", command, code, said)
			}
		}
		if !exists(dir) {
			t.Fatal("the run was removed")
		}
	}
	// A whole id of a job at the broker, and one that only the kept run has.
	usual := brokerWith(t, "", "foo-c", "bar-1").URL()
	if code, said := usually(t.Context(), usual, io.Discard, "rm", "--force", "foo-c", "--data", data); code != exitOK || said != "removed foo-c\n" || !exists(dir) {
		t.Errorf("exit code %d, %q", code, said)
	}
	if code, said := usually(t.Context(), usual, io.Discard, "rm", "--force", "foo", "--data", data); code != exitOK || !strings.HasPrefix(said, "removed foo-c1: ") || exists(dir) {
		t.Errorf("exit code %d, %q", code, said)
	}
}

// busyPort is where somebody listens and takes no connection for now, as a process that is stopped.
func busyPort(t *testing.T) (addr string) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	addr = freePort(t)
	port, err := strconv.Atoi(strings.TrimPrefix(addr, "127.0.0.1:"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for { // until its queue is full
		conn, err := net.DialTimeout("tcp", addr, 200*time.Millisecond)
		if os.IsTimeout(err) {
			return addr
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
	}
}

// TestKeptStays: nothing is removed from this machine where it is not known whether a job of the broker is meant.
func TestKeptStays(t *testing.T) {
	t.Setenv("NATS_URL", "")
	busy, foreign, jobless := busyPort(t), foreignBroker(t, "another's"), foreignBroker(t, "")
	ended, end := context.WithCancel(t.Context())
	end()
	for name, c := range map[string]struct {
		ctx   context.Context
		usual string
		works bool // a run does
		code  int
		says  string
	}{
		"refused":                         {t.Context(), foreign, false, exitFailure, `^millrace: connect to the broker at .*: Authorization Violation; give its token .*; the run foo-c1, which is kept in .*/foo-c1, stays$`},
		"refused, while a run works":      {t.Context(), foreign, true, exitFailure, `^millrace: no run that is at work here is "foo-c1": connect to .*: Authorization Violation; .* stays$`},
		"no JetStream":                    {t.Context(), jobless, false, exitFailure, `^millrace: .*JetStream`},
		"no JetStream, while a run works": {t.Context(), jobless, true, exitFailure, `^millrace: .*JetStream`},
		"no answer":                       {t.Context(), "nats://" + busy, false, exitUnreachable, `^millrace: broker unreachable: no answer at `},
		"too late":                        {ended, "nats://" + freePort(t), false, exitFailure, `^millrace: context canceled$`},
	} {
		t.Run(name, func(t *testing.T) {
			data := t.TempDir()
			dir := keep(t, data, "foo-c1")
			if c.works {
				srv := brokerWith(t, "secret", "bar-1")
				if err := (endpoint{URL: srv.URL(), Token: srv.Token}).write(keep(t, data, "bar-1")); err != nil {
					t.Fatal(err)
				}
			}
			code, said := usually(c.ctx, c.usual, io.Discard, "rm", "--force", "foo-c1", "--data", data)
			if code != c.code || !regexp.MustCompile(`(?m)`+c.says).MatchString(said) || !exists(dir) {
				t.Errorf("exit code %d, %q, kept: %v", code, said, exists(dir))
			}
		})
	}
}

// TestKeptReadUnasked: whose files are read is said where the broker could not be asked.
func TestKeptReadUnasked(t *testing.T) {
	t.Setenv("NATS_URL", "")
	data, foreign := t.TempDir(), foreignBroker(t, "another's")
	keep(t, data, "foo-c1")
	code, said := usually(t.Context(), foreign, io.Discard, "verify", "foo", "--data", data)
	if code != exitUnreachable || !strings.HasPrefix(said, "note: this is job foo-c1 as it is kept here; the broker was not asked: ") || !strings.Contains(said, "\nmillrace: foo is no file here: job foo-c1 was interrupted, ") {
		t.Errorf("exit code %d, %q", code, said)
	}
	if err := (&place{dir: (&app{data: data}).runDir("foo-c1")}).write(memo{Job: "foo-c1", Finished: true, Manifest: filepath.Join(data, "none")}); err != nil {
		t.Fatal(err)
	}
	if _, said := usually(t.Context(), foreign, io.Discard, "verify", "foo", "--data", data); !strings.Contains(said, "\nmillrace: job foo-c1 is finished, but ") {
		t.Errorf("%q", said)
	}
}

// TestFinishedResultsStop: results of a finished run are printed until somebody stops that.
func TestFinishedResultsStop(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	input, e := writeInput(t, killLines, nil), newEngine(t, slow())
	p := f.start("run", "run", input, "--data", f.path("data"), "-o", f.path("r.jsonl"), "--engine", e.url)
	if code := p.wait(); code != exitOK {
		t.Fatalf("the run ended with %d\n%s", code, p.err)
	}
	ctx, stop := context.WithCancelCause(t.Context())
	defer stop(nil)
	var out bytes.Buffer
	code, said := usually(ctx, "nats://"+freePort(t), writerFunc(func(b []byte) (int, error) {
		stop(signalled{os.Interrupt})
		return out.Write(b)
	}), "results", "input-", "--data", f.path("data"))
	if n := strings.Count(out.String(), "\n"); code != 130 || n == 0 || n >= killLines {
		t.Errorf("%d lines, exit code %d, %q", n, code, said)
	}
}

// TestRunFinishedMeanwhile: a job that another process finishes right before this one has its folder is not run again.
func TestRunFinishedMeanwhile(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	input, e := writeInput(t, 5, nil), newEngine(t, sim.Config{})
	args := []string{"run", input, "--data", f.path("data"), "-o", f.path("r.jsonl"), "--engine", e.url}
	if p := f.start("older", args...); p.wait() != exitOK {
		t.Fatalf("the run failed\n%s", p.err)
	}
	b, err := os.ReadFile(input)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(input, b[:bytes.LastIndexByte(b[:len(b)-1], '\n')+1], 0o644); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	others := 0
	a := &app{std: stdio{os.Stdin, io.Discard, writerFunc(func(b []byte) (int, error) {
		if bytes.Contains(b, []byte("was changed since")) { // it has looked, and has no lock
			others++
			if p := f.start("other", args...); p.wait() != exitOK {
				t.Errorf("the other run failed\n%s", p.err)
			}
		}
		return said.Write(b)
	})}}
	root := a.root()
	root.SetArgs(args)
	if err := root.ExecuteContext(t.Context()); err != nil || others != 1 || !strings.Contains(said.String(), " is finished; --again makes a fresh run\n") {
		t.Errorf("%v, %q", err, said.String())
	}
	if n, _ := e.count(); n != 5+4 {
		t.Errorf("%d requests, want 9", n)
	}
}
