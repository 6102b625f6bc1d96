package broker

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestLockBesideWithoutLocks: where the file system knows none, the hidden file does not stay.
func TestLockBesideWithoutLocks(t *testing.T) {
	defer func() { flock = syscall.Flock }()
	for _, cannot := range []error{syscall.ENOLCK, syscall.ENOTSUP, syscall.ENOSYS} {
		flock = func(int, int) error { return cannot }
		dir := t.TempDir()
		if l, err := LockBeside(filepath.Join(dir, "r.json"), "a"); l != nil || err != nil {
			t.Errorf("%v: lock %v, error %v", cannot, l, err)
		}
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("%v: left behind: %v", cannot, left)
		}
	}
}

// TestLockBesideTakenAway: a hidden file that somebody removes each time it is made is given up.
func TestLockBesideTakenAway(t *testing.T) {
	defer func() { flock = syscall.Flock }()
	path := filepath.Join(t.TempDir(), "r.json")
	n := 0
	flock = func(fd, how int) error {
		n++
		_ = os.Remove(filepath.Join(filepath.Dir(path), ".r.json.lock"))
		return syscall.Flock(fd, how)
	}
	if _, err := LockBeside(path, "a"); err == nil || !strings.Contains(err.Error(), "taken away") || n != lockTries {
		t.Errorf("error %v after %d tries", err, n)
	}
}
