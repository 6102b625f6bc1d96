package broker_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"millrace/broker"
)

func TestLockDirUnwritable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := broker.LockDir(filepath.Join(file, "sub")); err == nil || !strings.Contains(err.Error(), "--data") {
		t.Errorf("error %v", err)
	}
}

// TestLockBeside: one has it, others are told who, and its file goes with it. One that nobody holds is taken over.
func TestLockBeside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	file := filepath.Join(filepath.Dir(path), ".r.json.lock")
	if err := os.WriteFile(file, []byte("a dead one, whose name is longer\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := broker.LockBeside(path, "job a")
	if err != nil {
		t.Fatal(err)
	}
	var held *broker.Holder
	if _, err := broker.LockBeside(path, "job b"); !errors.As(err, &held) || held.Who != "job a" || !errors.Is(err, broker.ErrInUse) {
		t.Errorf("error %v", err)
	}
	l.Unlock()
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lock's file: %v", err)
	}
	var both, max atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for n := 0; n < 50; {
				l, err := broker.LockBeside(path, "x")
				if err != nil {
					continue
				}
				if both.Add(1) > 1 {
					max.Store(2)
				}
				both.Add(-1)
				l.Unlock()
				n++
			}
		})
	}
	wg.Wait()
	if max.Load() > 1 {
		t.Error("two held it at once")
	}
}

// TestShareDir: those who share a folder do so with each other, and with nobody who wants it alone.
func TestShareDir(t *testing.T) {
	dir := t.TempDir()
	if l, err := broker.LockDir(dir); err != nil {
		t.Fatal(err)
	} else if _, err := broker.ShareDir(dir); !errors.Is(err, broker.ErrInUse) {
		t.Errorf("shared with one who has it alone: %v", err)
	} else {
		l.Unlock()
	}
	var shared []*broker.Lock
	for range 2 {
		l, err := broker.ShareDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		shared = append(shared, l)
	}
	for _, l := range shared {
		if _, err := broker.LockDir(dir); !errors.Is(err, broker.ErrInUse) {
			t.Errorf("taken while it is shared: %v", err)
		}
		l.Unlock()
	}
	l, err := broker.LockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	l.Unlock()
}

// TestLockFor: a folder is shared by those who take it for the same purpose, one after the other or at once; the file goes
// with the last of them, and what a dead one left says nothing.
func TestLockFor(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, ".millrace.lock")
	if err := os.WriteFile(file, []byte("another purpose, longer than ours\na dead one\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	first, err := broker.LockFor(dir, "one", "process a")
	if err != nil {
		t.Fatal(err)
	}
	second, err := broker.LockFor(dir, "one", "process b")
	if err != nil {
		t.Fatal(err)
	}
	first.Unlock()
	var held *broker.Holder
	if _, err := broker.LockFor(dir, "two", "process c"); !errors.As(err, &held) || held.Who != "process a" {
		t.Errorf("shared for another purpose: %v", err)
	}
	second.Unlock()
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lock's file: %v", err)
	}
	var mu sync.Mutex
	has, mixed := map[string]int{}, false
	var wg sync.WaitGroup
	for i := range 8 {
		purpose := []string{"one", "two"}[i%2]
		wg.Go(func() {
			for n := 0; n < 50; {
				l, err := broker.LockFor(dir, purpose, "x")
				if err != nil {
					continue
				}
				mu.Lock()
				has[purpose]++
				mixed = mixed || has["one"] > 0 && has["two"] > 0
				mu.Unlock()
				mu.Lock()
				has[purpose]--
				mu.Unlock()
				l.Unlock()
				n++
			}
		})
	}
	wg.Wait()
	if mixed {
		t.Error("two purposes at once")
	}
}
