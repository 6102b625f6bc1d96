package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"millrace/broker"
)

// TestForget: a run whose process still clears up is forgotten when that has gone, and then nothing of it is left.
func TestForget(t *testing.T) {
	var said bytes.Buffer
	parent := t.TempDir()
	k := &kept{memo: memo{Job: "j", Finished: true}, dir: filepath.Join(parent, "j")}
	a := &app{std: stdio{err: &said}}
	lock, err := broker.LockDir(k.dir)
	if err != nil {
		t.Fatal(err)
	}
	var busy *busyError
	if err := a.forget(k, false); !errors.As(err, &busy) {
		t.Errorf("error %v while a process has it", err)
	}
	lock.Unlock()
	if err := a.forget(k, false); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(parent)
	if err != nil || len(left) > 0 || !strings.HasPrefix(said.String(), "removed j: ") {
		t.Errorf("left %v, %v; said %q", left, err, said.String())
	}
}
