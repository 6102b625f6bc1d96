package broker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// ErrInUse is returned when another process uses a folder.
var ErrInUse = errors.New("folder is in use")

// Lock holds a folder for one process. The system lets go of it when the process ends, however it ends.
type Lock struct{ f *os.File }

// LockDir takes the folder, which it makes if need be.
func LockDir(dir string) (*Lock, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make folder: %w; choose another --data", err)
	}
	name := filepath.Join(dir, "lock")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|syscall.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w; choose another --data", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		by := make([]byte, 64)
		n, _ := f.Read(by) // the PID is only for people
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: %w by process %s; stop it or choose another --data", dir, ErrInUse, strings.TrimSpace(string(by[:n])))
		}
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	if err := f.Truncate(0); err == nil {
		_, _ = fmt.Fprintf(f, "%d\n", os.Getpid()) // for the message above only
	}
	return &Lock{f}, nil
}

// Unlock lets go of the folder.
func (l *Lock) Unlock() { l.f.Close() }
