package worker

import (
	"bufio"
	"context"
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

	"millrace/broker"
	"millrace/proto"
)

// journal notes where the acknowledgements of held requests go, so that a worker that was killed and is started
// again gives back at once what its dead process held, instead of leaving it for AckWait. What is received is written
// when nothing more lies here, before it runs, and after journalLag at the latest, and so is the rest (giving back what
// was acknowledged does nothing); nothing is synced: what the system has outlives a kill -9, and after a power cut
// AckWait serves. A nil journal does nothing.
//
// One record a line: "+n reply" was received from the stream that was made at n, "-reply" is done with, "~n m" signs
// of life were sent at m, with an AckWait of n. Times are Unix nanoseconds of this machine, AckWait is in nanoseconds.
// Other records, as an older version wrote them, are passed over.
type journal struct {
	path string
	log  *slog.Logger
	lock *broker.Lock

	mu    sync.Mutex
	f     *os.File
	w     *bufio.Writer
	size  int64         // bytes in the file
	late  bool          // what was received is not written yet
	bad   bool          // writing failed; the journal is given up
	noted chan struct{} // gets a value with each note, unless it has one; keep takes it

	held heldBy // by this process
	dead heldBy // by the last one, and not given back yet
}

// heldBy is what a process holds, as far as its journal tells.
type heldBy struct {
	open    map[string]int64 // by reply; when its stream was made
	lived   time.Time        // when signs of life were last sent for all of them
	ackWait time.Duration    // as it was then
}

const (
	journalName  = "held"
	journalLag   = 50 * time.Millisecond
	journalLarge = 4 << 20 // bytes from which the file is written anew, when little of it is still held
)

// openJournal takes the folder.
func openJournal(dir string, log *slog.Logger) (*journal, error) {
	lock, err := broker.LockDir(dir)
	if err != nil {
		return nil, err
	}
	j := &journal{path: filepath.Join(dir, journalName), log: log, lock: lock, held: heldBy{open: map[string]int64{}}, noted: make(chan struct{}, 1)}
	b, err := os.ReadFile(j.path)
	switch {
	case err == nil || errors.Is(err, fs.ErrNotExist):
		j.dead = readJournal(string(b))
		err = j.rewrite()
	default:
		err = fmt.Errorf("read journal: %w", err)
	}
	if err != nil {
		lock.Unlock()
		return nil, err
	}
	return j, nil
}

// readJournal returns what is open at the end of the text. A torn last line is passed over.
func readJournal(text string) heldBy {
	h := heldBy{open: map[string]int64{}}
	for {
		line, rest, whole := strings.Cut(text, "\n")
		if !whole {
			return h
		}
		text = rest
		if len(line) < 2 {
			continue
		}
		number, arg, _ := strings.Cut(line[1:], " ")
		n, err := strconv.ParseInt(number, 10, 64)
		switch {
		case line[0] == '-':
			delete(h.open, line[1:])
		case line[0] == '+' && err == nil && strings.HasPrefix(arg, "$JS.ACK."):
			h.open[arg] = n
		case line[0] == '~' && err == nil:
			if at, err := strconv.ParseInt(arg, 10, 64); err == nil {
				h.lived, h.ackWait = time.Unix(0, at), time.Duration(n)
			}
		}
	}
}

// text is what readJournal reads.
func (h *heldBy) text() string {
	var b strings.Builder
	if !h.lived.IsZero() {
		b.WriteString(h.life())
	}
	for reply, born := range h.open {
		b.WriteString(receipt(reply, born))
	}
	return b.String()
}

func (h *heldBy) life() string {
	return fmt.Sprintf("~%d %d\n", int64(h.ackWait), h.lived.UnixNano())
}

func receipt(reply string, born int64) string {
	return "+" + strconv.FormatInt(born, 10) + " " + reply + "\n"
}

// rewrite makes the file hold what is open and no more. Called with mu held, or before anyone else has j. It waits for
// no disk, and for nobody who does: the lines' owners wait for mu.
func (j *journal) rewrite() error {
	text := j.held.text() + j.dead.text()
	if err := os.WriteFile(j.path+".new", []byte(text), 0o644); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	if err := os.Rename(j.path+".new", j.path); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	f, err := os.OpenFile(j.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return fmt.Errorf("open journal: %w", err)
	}
	if j.f != nil {
		j.f.Close()
	}
	j.f, j.w, j.size = f, bufio.NewWriterSize(f, 64<<10), int64(len(text))
	return nil
}

// reclaim returns the replies of what the dead process held of a model's stream, if that is the one that was made
// at a time: in another one they would hit the requests of others. They are returned once. Nothing is, of any stream,
// when the process has been dead for longer than AckWait: its requests are with others by now, who would lose them.
func (j *journal) reclaim(model string, born time.Time) []string {
	var out []string
	j.do(func() {
		age := time.Since(j.dead.lived)
		late := age < 0 || age > j.dead.ackWait
		for reply, of := range j.dead.open {
			ours := strings.Contains(reply, "."+proto.RequestStream(model)+".")
			if !ours && !late {
				continue
			}
			if !late && of == born.UnixNano() {
				out = append(out, reply)
			}
			delete(j.dead.open, reply)
			j.note("-" + reply + "\n")
		}
	})
	return out
}

func (j *journal) received(reply string, born time.Time) {
	j.do(func() {
		j.held.open[reply] = born.UnixNano()
		j.note(receipt(reply, born.UnixNano()))
		j.late = true
	})
}

// write hands what was received to the system. A message that came alone costs a call of it, many together one.
func (j *journal) write() {
	j.do(func() {
		if j.late {
			j.late = false
			_ = j.w.Flush() // an error sticks and is seen by flush
		}
	})
}

func (j *journal) done(reply string) {
	j.do(func() {
		if _, ok := j.held.open[reply]; ok {
			delete(j.held.open, reply)
			j.note("-" + reply + "\n")
		}
	})
}

// alive says that signs of life were sent for everything that is held, when, and what AckWait is. It is not noted as
// long as there is something of the dead process, which does not live on.
func (j *journal) alive(at time.Time, ackWait time.Duration) {
	j.do(func() {
		if len(j.dead.open) == 0 {
			j.held.lived, j.held.ackWait = at, ackWait
			j.note(j.held.life())
		}
	})
}

// do does something with mu held, unless the journal is given up.
func (j *journal) do(what func()) {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.bad {
		what()
	}
}

// note writes a record. Called with mu held.
func (j *journal) note(record string) {
	_, _ = j.w.WriteString(record) // an error sticks and is seen by flush
	j.size += int64(len(record))
	select {
	case j.noted <- struct{}{}:
	default:
	}
}

// keep flushes what is noted soon after, until ctx ends.
func (j *journal) keep(ctx context.Context) {
	if j == nil {
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-j.noted:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(journalLag):
			j.flush()
		}
	}
}

// flush hands what was noted to the system, which keeps it when this process is killed.
func (j *journal) flush() {
	j.do(func() {
		err := j.w.Flush()
		j.late = false
		if err == nil && j.size > journalLarge && j.size > int64(len(j.held.open)+len(j.dead.open))*400 {
			err = j.rewrite()
		}
		if err != nil {
			j.bad = true
			j.log.Warn("journal of held requests cannot be written and is given up", "error", err)
		}
	})
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
