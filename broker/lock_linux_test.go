package broker_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"millrace/broker"
)

// asOther calls do as a user who may write in dir, and is not the owner of what lies there. A user who is not root stays
// what it is: the modes of its own files go for it, too.
func asOther(t *testing.T, dir string, mode os.FileMode, do func()) {
	t.Helper()
	for _, d := range []string{filepath.Dir(dir), dir} { // those of the test
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, mode); err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		runtime.LockOSThread() // and never lets go of it: the thread ends with the goroutine
		if os.Getuid() == 0 {
			_, _, _ = syscall.RawSyscall(syscall.SYS_SETFSUID, 65534, 0, 0) // of this thread alone
		}
		do()
	}()
	<-over
}

// TestLockBesideOfAnother: the hidden file that another user's killed process left is taken over, where it can be read.
func TestLockBesideOfAnother(t *testing.T) {
	for _, c := range []struct {
		name       string
		file, dir  os.FileMode
		barred     bool
		taken      string // what the file says then
		goes, live bool
	}{
		{"may be replaced", 0o444, 0o777, false, "job b", true, false},
		{"sticky folder", 0o444, 0o777 | os.ModeSticky, false, "job a", os.Getuid() != 0, false},
		{"unreadable", 0o000, 0o777, true, "job a", false, false},
		{"its holder lives", 0o444, 0o777, false, "job a", false, true},
	} {
		dir := t.TempDir()
		path, file := filepath.Join(dir, "r.json"), filepath.Join(dir, ".r.json.lock")
		if err := os.WriteFile(file, []byte("job a\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if c.live {
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chmod(file, c.file); err != nil {
			t.Fatal(err)
		}
		var l *broker.Lock
		var err error
		asOther(t, dir, c.dir, func() { l, err = broker.LockBeside(path, "job b") })
		var held *broker.Holder
		switch {
		case c.barred:
			if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), file+" is of user ") || !strings.Contains(err.Error(), "may be removed") {
				t.Errorf("%s: error %v", c.name, err)
			}
			continue
		case c.live:
			if !errors.As(err, &held) || held.Who != "job a" {
				t.Errorf("%s: error %v", c.name, err)
			}
			continue
		case err != nil:
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if _, err := broker.LockBeside(path, "job c"); !errors.As(err, &held) || held.Who != c.taken && os.Getuid() == 0 {
			t.Errorf("%s: another one gets %v", c.name, err)
		}
		asOther(t, dir, c.dir, l.Unlock)
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) != c.goes {
			t.Errorf("%s: the file: %v", c.name, err)
		}
		if l, err := broker.LockBeside(path, "job d"); err != nil {
			t.Errorf("%s: at last: %v", c.name, err)
		} else {
			l.Unlock()
		}
	}
}
