package broker

import (
	"errors"
	"fmt"
	"io"
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
	name := filepath.Join(dir, dirLock)
	for range lockTries {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make folder: %w; choose another --data", err)
		}
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return nil, fmt.Errorf("open lock file: %w; choose another --data", err)
		}
		l, err := lockFile(f, syscall.LOCK_EX, fmt.Sprint(os.Getpid()))
		if err != nil {
			return nil, dirError(dir, err)
		}
		if l.stands() {
			return l, nil
		}
		l.Unlock() // the folder was removed between our opening and our locking it
	}
	return nil, errTaken(name)
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
		case noLocks(err):
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
	return nil, errTaken(name)
}

// LockFor takes a folder that is there together with all others who take it for the same purpose, by a hidden file in it
// that goes with the last of them. Others are told who took it first. Where the file system knows no locks nothing is held,
// and the Lock is nil.
func LockFor(dir, purpose, who string) (*Lock, error) {
	name := filepath.Join(dir, ".millrace.lock")
	for range lockTries {
		f, ours, err := openLock(name)
		if err != nil {
			return nil, err
		}
		l := &Lock{f: f, remove: true}
		err = l.share(ours, purpose+"\n"+who+"\n")
		switch {
		case noLocks(err):
			f.Close()
			_ = os.Remove(name) // nobody can hold it
			return nil, nil
		case errors.Is(err, syscall.EWOULDBLOCK), err == nil && !l.stands():
			f.Close() // another writes into it, or removed it
			time.Sleep(time.Millisecond)
			continue
		case err == nil:
			err = l.isFor(purpose)
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		return l, nil
	}
	return nil, errTaken(name)
}

// share locks the file together with others, and writes text into it where there are none.
func (l *Lock) share(ours bool, text string) error {
	if flock(int(l.f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
		if !ours && os.Remove(l.f.Name()) != nil { // else it goes on telling of its dead holder
			return barred(l.f.Name(), fs.ErrPermission)
		}
		if ours {
			if err := errors.Join(l.f.Truncate(0), second(l.f.WriteAt([]byte(text), 0))); err != nil {
				return fmt.Errorf("write lock file: %w", err)
			}
		}
	}
	return flock(int(l.f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
}

func second(_ int, err error) error { return err }

// isFor is nil where that is what the file says, and a Holder where it says something else.
func (l *Lock) isFor(purpose string) error {
	text := make([]byte, 4096)
	n, err := l.f.ReadAt(text, 0)
	if err != nil && err != io.EOF {
		return fmt.Errorf("read lock file: %w", err)
	}
	is, who, _ := strings.Cut(string(text[:n]), "\n")
	if is != purpose {
		return &Holder{strings.TrimSpace(who)}
	}
	return nil
}

// noLocks says that the file system has none.
func noLocks(err error) bool {
	return errors.Is(err, syscall.ENOLCK) || errors.Is(err, syscall.ENOTSUP) || errors.Is(err, syscall.ENOSYS)
}

func errTaken(name string) error {
	return fmt.Errorf("lock %s: it was taken away %d times, each time right after it was made", name, lockTries)
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
	if l.remove && flock(int(l.f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil { // nobody shares it
		_ = os.Remove(l.f.Name()) // one that stays is taken over
	}
	l.f.Close()
}
