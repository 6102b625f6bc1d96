package broker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// ErrInUse is returned when another process uses a folder or a file.
var ErrInUse = errors.New("folder is in use")

// Lock holds a folder, or the files of a job, for one process. The system lets go of it when the process ends, however
// it ends.
type Lock struct {
	f      *os.File
	remove bool // the file goes with the lock
}

// Holder is the error of a lock that another process has. It is ErrInUse.
type Holder struct{ Who string } // what the other one said of itself, for people; may be empty

func (h *Holder) Error() string { return ErrInUse.Error() + " by " + h.Who }
func (h *Holder) Unwrap() error { return ErrInUse }

// LockDir takes the folder, which it makes if need be.
func LockDir(dir string) (*Lock, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make folder: %w; choose another --data", err)
	}
	l, err := lockFile(filepath.Join(dir, "lock"), fmt.Sprint(os.Getpid()))
	var h *Holder
	if errors.As(err, &h) {
		return nil, fmt.Errorf("%s: %w by process %s; stop it or choose another --data", dir, ErrInUse, h.Who)
	}
	if err != nil {
		return nil, fmt.Errorf("%w; choose another --data", err)
	}
	return l, nil
}

// LockBeside takes the file at path, which need not be there, by a hidden file beside it that goes when it is let go of.
// One that a killed process left is taken over. Others are told who has it. Where the file system knows no locks
// nothing is held, and the Lock is nil.
func LockBeside(path, who string) (*Lock, error) {
	name := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".lock")
	for {
		l, err := lockFile(name, who)
		if errors.Is(err, syscall.ENOLCK) || errors.Is(err, syscall.ENOTSUP) || errors.Is(err, syscall.ENOSYS) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		l.remove = true
		if l.stands() {
			return l, nil
		}
		l.f.Close() // its holder removed it between our opening and our locking it
	}
}

// lockFile takes a file, which it makes if need be, and writes into it who has it.
func lockFile(name, who string) (*Lock, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|syscall.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		by := make([]byte, 4096)
		n, _ := f.Read(by) // it is only for people
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, &Holder{strings.TrimSpace(string(by[:n]))}
		}
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	if err := f.Truncate(0); err == nil {
		_, _ = fmt.Fprintln(f, who) // for the messages of others only
	}
	return &Lock{f: f}, nil
}

// stands says whether the file that is locked is the one that others would open.
func (l *Lock) stands() bool {
	mine, err := l.f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(l.f.Name())
	return err == nil && os.SameFile(mine, there)
}

// Unlock lets go. The nil Lock holds nothing.
func (l *Lock) Unlock() {
	if l == nil {
		return
	}
	if l.remove {
		_ = os.Remove(l.f.Name()) // one that stays is taken over
	}
	l.f.Close()
}
