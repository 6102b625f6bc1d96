package worker

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"millrace/broker"
	"millrace/proto"
)

// journal notes where the acknowledgements of held requests go, so that a worker that was killed and is started
// again gives back at once what its dead process held, instead of leaving it for AckWait. What is received is written
// before it runs, the rest behind by up to journalLag (giving back what was acknowledged does nothing); nothing is
// synced: what the system has outlives a kill -9, and after a power cut AckWait serves. A nil journal does nothing.
//
// One record a line: "+reply" was received, "-reply" is done with, "~n" the process lived on, with an AckWait of n
// nanoseconds.
type journal struct {
	path string
	log  *slog.Logger
	lock *broker.Lock

	mu   sync.Mutex
	f    *os.File
	w    *bufio.Writer
	open map[string]struct{}
	size int64 // bytes in the file
	bad  bool  // writing failed; the journal is given up
}

const (
	journalName  = "held"
	journalLag   = 50 * time.Millisecond
	journalLarge = 4 << 20 // bytes from which the file is written anew, when little of it is still held
)

// openJournal takes the folder and returns what a dead process held there and can be given back.
func openJournal(dir string, log *slog.Logger) (*journal, []string, error) {
	lock, err := broker.LockDir(dir)
	if err != nil {
		return nil, nil, err
	}
	j := &journal{path: filepath.Join(dir, journalName), log: log, lock: lock, open: map[string]struct{}{}}
	left, err := j.recover()
	for _, reply := range left {
		j.open[reply] = struct{}{} // until it is given back
	}
	if err == nil {
		err = j.rewrite()
	}
	if err != nil {
		lock.Unlock()
		return nil, nil, err
	}
	return j, left, nil
}

// recover reads what the last process left. Nothing is given back when it has been dead for longer than AckWait:
// its requests are with others by now, who would lose them by it.
func (j *journal) recover() ([]string, error) {
	st, err := os.Stat(j.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at journal: %w", err)
	}
	b, err := os.ReadFile(j.path)
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	open, ackWait := readJournal(string(b))
	if age := time.Since(st.ModTime()); age < 0 || age > ackWait {
		return nil, nil
	}
	left := make([]string, 0, len(open))
	for reply := range open {
		left = append(left, reply)
	}
	return left, nil
}

// readJournal returns the replies that are open at the end of the text. A torn last line is passed over.
func readJournal(text string) (map[string]struct{}, time.Duration) {
	open, ackWait := map[string]struct{}{}, proto.DefaultAckWait
	for {
		line, rest, whole := strings.Cut(text, "\n")
		if !whole {
			return open, ackWait
		}
		text = rest
		if len(line) < 2 {
			continue
		}
		switch arg := line[1:]; line[0] {
		case '+':
			if strings.HasPrefix(arg, "$JS.ACK.") {
				open[arg] = struct{}{}
			}
		case '-':
			delete(open, arg)
		case '~':
			if n, err := strconv.ParseInt(arg, 10, 64); err == nil {
				ackWait = time.Duration(n)
			}
		}
	}
}

// rewrite makes the file hold what is open and no more. Called with mu held, or before anyone else has j.
func (j *journal) rewrite() error {
	var b strings.Builder
	for reply := range j.open {
		b.WriteString("+" + reply + "\n")
	}
	if err := renameio.WriteFile(j.path, []byte(b.String()), 0o644); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	f, err := os.OpenFile(j.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return fmt.Errorf("open journal: %w", err)
	}
	if j.f != nil {
		j.f.Close()
	}
	j.f, j.w, j.size = f, bufio.NewWriterSize(f, 64<<10), int64(b.Len())
	return nil
}

func (j *journal) received(reply string) { j.note('+', reply) }
func (j *journal) done(reply string)     { j.note('-', reply) }

// alive says that the process lives and what AckWait is.
func (j *journal) alive(ackWait time.Duration) {
	j.note('~', strconv.FormatInt(int64(ackWait), 10))
}

func (j *journal) note(kind byte, arg string) {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.bad {
		return
	}
	switch kind {
	case '+':
		j.open[arg] = struct{}{}
	case '-':
		delete(j.open, arg)
	}
	_ = j.w.WriteByte(kind) // an error sticks and is seen by flush
	_, _ = j.w.WriteString(arg)
	_ = j.w.WriteByte('\n')
	j.size += int64(len(arg)) + 2
	if kind == '+' {
		_ = j.w.Flush() // as above
	}
}

// flush hands what was noted to the system, which keeps it when this process is killed.
func (j *journal) flush() {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.bad {
		return
	}
	err := j.w.Flush()
	if err == nil && j.size > journalLarge && j.size > int64(len(j.open))*400 {
		err = j.rewrite()
	}
	if err != nil {
		j.bad = true
		j.log.Warn("journal of held requests cannot be written and is given up", "error", err)
	}
}

// close flushes and lets go of the folder.
func (j *journal) close() {
	if j == nil {
		return
	}
	j.flush()
	j.f.Close()
	j.lock.Unlock()
}
