package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"

	"millrace/broker"
	"millrace/sim"
)

// stoppedRun runs the first lines of a job and stops. It returns the command that goes on with it, on an engine that is
// quicker, and the job's folder.
func stoppedRun(t *testing.T, f *fleet) (args []string, dir string) {
	t.Helper()
	input := writeInput(t, killLines, nil)
	e, quick := newEngine(t, slow()), newEngine(t, sim.Config{})
	args = []string{"run", input, "--data", f.path("data"), "-o", f.path("r.jsonl"), "--concurrency", "8", "--engine"}
	p := f.start("run", append(args, e.url)...)
	answered(t, 20, e)
	if code := p.term(); code != 143 {
		t.Fatalf("the run ended with %d\n%s", code, p.err)
	}
	dirs, err := os.ReadDir(f.path("data/run"))
	if err != nil || len(dirs) != 1 {
		t.Fatalf("folders %v, error %v", dirs, err)
	}
	return append(args, quick.url), filepath.Join(f.path("data/run"), dirs[0].Name())
}

// usually runs a command in this process, with the usual broker at another place, and returns its exit code and what it
// said.
func usually(ctx context.Context, usual string, out io.Writer, args ...string) (code int, said string) {
	var errs bytes.Buffer
	a := &app{std: stdio{os.Stdin, out, &errs}}
	a.nats.usual = usual
	root := a.root()
	root.SetArgs(args)
	code = a.report(root.ExecuteContext(ctx))
	return code, errs.String()
}

// results prints those of the only job in the fleet's folder.
func results(t *testing.T, f *fleet, usual string, out io.Writer) error {
	if code, said := usually(t.Context(), usual, out, "results", "input-", "--data", f.path("data")); code != exitOK {
		return errors.New(said)
	}
	return nil
}

// foreignBroker is one that does not let us in, or where the token is empty holds no jobs.
func foreignBroker(t *testing.T, token string) (addr string) {
	t.Helper()
	ns, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true, Authorization: token})
	if err != nil {
		t.Fatal(err)
	}
	ns.Start()
	t.Cleanup(func() {
		ns.Shutdown()
		ns.WaitForShutdown()
	})
	if !ns.ReadyForConnections(hangLimit) {
		t.Fatal("nats-server does not become ready")
	}
	return ns.ClientURL()
}

// TestStoppedResultsRead: whoever takes long to read the results of a stopped run keeps neither another one from reading
// nor the run from going on, and reads what there was.
func TestStoppedResultsRead(t *testing.T) {
	t.Setenv("NATS_URL", "")
	f := newFleet(t)
	args, _ := stoppedRun(t, f)
	nobody := "nats://" + freePort(t)
	r, w := io.Pipe()
	over := make(chan error, 1)
	go func() {
		err := results(t, f, nobody, w)
		w.Close()
		over <- err
	}()
	var slowly, second bytes.Buffer
	if _, err := io.CopyN(&slowly, r, 1); err != nil { // it has begun to write, and waits
		t.Fatal(err)
	}
	if err := results(t, f, nobody, &second); err != nil {
		t.Errorf("a second reader: %v", err)
	}
	p := f.start("again", args...)
	if code := p.wait(); code != exitOK {
		t.Errorf("the run ended with %d\n%s", code, p.err)
	}
	if _, err := io.Copy(&slowly, r); err != nil {
		t.Error(err)
	}
	if err := <-over; err != nil {
		t.Errorf("the first reader: %v", err)
	}
	if n := strings.Count(slowly.String(), "\n"); n < 20 || n == killLines || slowly.String() != second.String() {
		t.Errorf("%d lines, and %d", n, strings.Count(second.String(), "\n"))
	}
}

// TestRunTakesOver: a run whose folder another process had, and no run was in it, goes on when it comes free.
func TestRunTakesOver(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	args, dir := stoppedRun(t, f)
	lock, err := broker.LockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	p := f.start("again", args...)
	p.says("is in use by another process; waiting for it")
	lock.Unlock()
	if code := p.wait(); code != exitOK {
		t.Fatalf("the run ended with %d\n%s", code, p.err)
	}
	oracle(t, args[1], f.path("r.jsonl"), f.path("r.errors.jsonl"), f.path("r.manifest.json"))
}

// TestStoppedResultsForeignBroker: a broker at the usual place that does not let us in does not hide a stopped run.
func TestStoppedResultsForeignBroker(t *testing.T) {
	t.Setenv("NATS_URL", "")
	f := newFleet(t)
	_, dir := stoppedRun(t, f)
	foreign := foreignBroker(t, "another's")
	var out bytes.Buffer
	if err := results(t, f, foreign, &out); err != nil || strings.Count(out.String(), "\n") < 20 {
		t.Errorf("error %v, %d bytes", err, out.Len())
	}
	lock, err := broker.LockDir(dir) // as a run that starts
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	if err := results(t, f, foreign, &out); err == nil || !strings.Contains(err.Error(), "uthorization") || !strings.Contains(err.Error(), "in use") {
		t.Errorf("while a run has it: %v", err)
	}
}
