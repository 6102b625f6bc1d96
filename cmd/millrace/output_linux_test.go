package main

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// TestTakeBarred: a lock file that another user left, and that cannot be read, is said to be that. Where nobody named a
// place the files go aside, and that is said when they have gone.
func TestTakeBarred(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{filepath.Dir(dir), dir} { // those of the test
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	bar := func(manifest string) {
		name := filepath.Join(dir, "."+filepath.Base(manifest)+".lock")
		if err := os.WriteFile(name, []byte("job x\n"), 0); err != nil {
			t.Fatal(err)
		}
	}
	f := filesOf(filepath.Join(dir, "r"), filepath.Join(dir, "r.jsonl"))
	bar(f.Manifest)
	var said strings.Builder
	a := &app{std: stdio{err: &said}}
	job := &proto.Job{ID: "r-1"}

	_, _, err := takeAsOther(a, f, job, true)
	if exitCode(err) != exitUsage || !strings.Contains(err.Error(), "r.jsonl cannot be locked: ") || !strings.Contains(err.Error(), ".lock is of user ") || said.Len() > 0 {
		t.Errorf("named: error %v; %s", err, &said)
	}
	got, lock, err := takeAsOther(a, f, job, false)
	if want := filepath.Join(dir, "r-1.results.jsonl"); err != nil || got.Output != want || !strings.HasSuffix(said.String(), "those of this one go to "+want+"\n") {
		t.Fatalf("files %v, error %v; %s", got, err, &said)
	}
	lock.Unlock()
	bar(got.Manifest)
	said.Reset()
	if _, _, err := takeAsOther(a, f, job, false); err == nil || said.Len() > 0 || strings.Contains(err.Error(), "another run") {
		t.Errorf("the other place barred, too: error %v; %s", err, &said)
	}
}

// takeAsOther calls take as one who is not the owner of the files that are there. A user who is not root stays what it is.
func takeAsOther(a *app, f aggregator.Files, job *proto.Job, named bool) (files aggregator.Files, lock *broker.Lock, err error) {
	over := make(chan struct{})
	go func() {
		defer close(over)
		runtime.LockOSThread() // and never lets go of it: the thread ends with the goroutine
		if os.Getuid() == 0 {
			_, _, _ = syscall.RawSyscall(syscall.SYS_SETFSUID, 65534, 0, 0) // of this thread alone
		}
		files, lock, err = a.take(f, job, named)
	}()
	<-over
	return files, lock, err
}

// TestTakeAsideHeld: where another run has the other place, too, it is named, and no place is promised.
func TestTakeAsideHeld(t *testing.T) {
	dir := t.TempDir()
	f := filesOf(filepath.Join(dir, "r"), filepath.Join(dir, "r.jsonl"))
	for _, name := range []string{"r", "r-1.results"} {
		l, err := broker.LockBeside(filepath.Join(dir, name+".manifest.json"), "job of "+name)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Unlock()
	}
	var said strings.Builder
	a := &app{std: stdio{err: &said}}
	_, _, err := a.take(f, &proto.Job{ID: "r-1"}, false)
	want := filepath.Join(dir, "r-1.results.jsonl") + " is being written by job of r-1.results; give another -o, or run this again when that one has ended"
	var c coded
	if !errors.As(err, &c) || c.code != exitUsage || err.Error() != want || said.Len() > 0 {
		t.Errorf("error %v; %s", err, &said)
	}
}
