package broker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"time"
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
	f, err := os.OpenFile(filepath.Join(dir, dirLock), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w; choose another --data", err)
	}
	l, err := lockFile(f, syscall.LOCK_EX, fmt.Sprint(os.Getpid()))
	return l, dirError(dir, err)
}

// ShareDir takes a folder that is there, and may be another user's, together with all others who share it: meanwhile
// nobody has it alone.
func ShareDir(dir string) (*Lock, error) {
	f, _, err := openLock(filepath.Join(dir, dirLock))
	if err != nil {
		return nil, err
	}
	l, err := lockFile(f, syscall.LOCK_SH, "")
	return l, dirError(dir, err)
}

const dirLock = "lock"

func dirError(dir string, err error) error {
	var h *Holder
	if errors.As(err, &h) {
		return fmt.Errorf("%s: %w by process %s; stop it or choose another --data", dir, ErrInUse, h.Who)
	}
	if err != nil {
		return fmt.Errorf("%w; choose another --data", err)
	}
	return nil
}

// LockBeside takes the file at path, which need not be there, by a hidden file beside it that goes when it is let go of.
// One that a killed process left, of whatever user, is taken over. Others are told who has it. Where the file system
// knows no locks nothing is held, and the Lock is nil. An error that is fs.ErrPermission is that of a hidden file of
// another user, or of the folder.
func LockBeside(path, who string) (*Lock, error) {
	name := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".lock")
	for range lockTries {
		f, ours, err := openLock(name)
		if err != nil {
			return nil, err
		}
		l, err := lockFile(f, syscall.LOCK_EX, who)
		switch {
		case errors.Is(err, syscall.ENOLCK), errors.Is(err, syscall.ENOTSUP), errors.Is(err, syscall.ENOSYS):
			_ = os.Remove(name) // nobody can hold it
			return nil, nil
		case errors.Is(err, syscall.EBADF) && !ours: // as of NFS, which wants the right to write
			return nil, barred(name, fs.ErrPermission)
		case err != nil:
			return nil, err
		}
		l.remove = true
		// One into which we cannot write goes on telling of its dead holder: where it can be, it is replaced.
		if l.stands() && (ours || os.Remove(name) != nil) {
			return l, nil
		}
		l.f.Close() // its holder removed it between our opening and our locking it, or we did
		time.Sleep(time.Millisecond)
	}
	return nil, fmt.Errorf("lock %s: it was taken away %d times, each time right after it was made", name, lockTries)
}

// lockTries bounds how often a hidden file is made anew.
const lockTries = 100

// openLock opens a lock's file, which it makes if need be. One of another user, which is not ours, is opened for reading:
// that is enough to lock it.
func openLock(name string) (f *os.File, ours bool, err error) {
	f, err = os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if errors.Is(err, fs.ErrPermission) && there(name) {
		if f, err = os.Open(name); err != nil {
			err = barred(name, err)
		}
		return f, false, err
	}
	if err != nil {
		return nil, false, fmt.Errorf("open lock file: %w", err)
	}
	return f, true, nil
}

func there(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// lockFile locks f, and writes into it who has it; empty: nothing. It closes f where it cannot.
func lockFile(f *os.File, how int, who string) (*Lock, error) {
	if err := flock(int(f.Fd()), how|syscall.LOCK_NB); err != nil {
		by := make([]byte, 4096)
		n, _ := f.Read(by) // it is only for people
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, &Holder{strings.TrimSpace(string(by[:n]))}
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	if who != "" && f.Truncate(0) == nil { // for the messages of others only
		_, _ = fmt.Fprintln(f, who)
	}
	return &Lock{f: f}, nil
}

var flock = syscall.Flock // tests have a file system that cannot

// barred says whose the lock file is that we may not use.
func barred(name string, err error) error {
	whose := "another user"
	if st, err := os.Stat(name); err == nil {
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			whose = fmt.Sprintf("user %d", sys.Uid)
			if u, err := user.LookupId(fmt.Sprint(sys.Uid)); err == nil {
				whose = "user " + u.Username
			}
		}
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return fmt.Errorf("%s is of %s (%w); it may be removed when no run of theirs is writing there", name, whose, err)
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
