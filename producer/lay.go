package producer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"millrace/broker"
)

// source is a file of plain lines that can be read again: the input itself, or a copy laid down in Dir.
type source struct {
	file *os.File
	name string // of the input, for messages
	base string // of the input, without what compression and format append to it
	laid string // where the copy lies; empty: the input itself is read
	kept bool   // the copy has its name, in a folder of its own
	once bool   // the input is gone when it has been read; its copy is all there is
	done bool   // the copy is not needed any more

	piped  bool   // it is standard input
	packed string // how the input is compressed; empty: it is not
}

// open finds out what the input is, and lays it down as plain lines where it cannot be read twice.
func (in *Input) open(ctx context.Context) (*source, error) {
	src := &source{name: in.Path, base: baseName(in.Path)}
	r := in.Stdin
	if in.Path == "-" {
		src.name, src.base, src.once, src.piped = "standard input", "stdin", true, true
	} else {
		f, err := os.Open(in.Path)
		if err != nil {
			return nil, unopened(in.Path, err)
		}
		st, err := f.Stat()
		if err != nil || st.IsDir() {
			f.Close()
			return nil, errors.Join(err, badFile("%s is a folder; give a JSONL file", in.Path))
		}
		if src.once = !st.Mode().IsRegular(); !src.once {
			magic := make([]byte, 4)
			n, _ := f.ReadAt(magic, 0) // an error shows again when the file is read
			if !compressed(magic[:n]) {
				if err := misnamed(in.Path, magic[:n]); err != nil {
					f.Close()
					return nil, err
				}
				src.file = f
				return src, nil
			}
		}
		defer f.Close()
		r = f
	}
	return src, src.lay(ctx, in, r)
}

// unopened says why a file cannot be opened, in the user's words.
func unopened(path string, err error) error {
	why := err
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		why = pe.Err
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return badFile("%s: no such file; give the path of a JSONL file, or - for standard input", path)
	case errors.Is(err, fs.ErrPermission):
		return badFile("%s: it cannot be read (%w); give yourself the right to, or another file", path, why)
	}
	return fmt.Errorf("open input: %w", err)
}

// baseName is the name of a file without its folder and the endings of compressed and of JSONL files.
func baseName(path string) string {
	b := filepath.Base(path)
	for _, end := range []string{".gz", ".zst", ".zstd", ".jsonl", ".ndjson", ".json", ".txt"} {
		b = strings.TrimSuffix(b, end)
	}
	return b
}

const tempLaid = "input-*.tmp"

// lay writes the plain lines to a file in the folder. It has its name when keep has been called.
func (src *source) lay(ctx context.Context, in *Input, r io.Reader) (err error) {
	sweep(in.Dir)
	if src.file, err = tempInput(in.Dir); err != nil {
		return err
	}
	src.laid = src.file.Name()
	defer func() {
		if err != nil {
			src.drop()
		}
	}()
	if f, ok := r.(*os.File); ok { // a read that nothing comes for ends with ctx, where the system can do that
		defer context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Now()) })()
	}
	if src.packed, err = in.copyPlain(ctx, src.file, r); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if bad := (*BadFile)(nil); errors.As(err, &bad) {
			return fmt.Errorf("%s: %w", src.name, err)
		}
		return fmt.Errorf("lay down %s as plain lines in %s: %w", src.name, in.Dir, err)
	}
	if err := src.file.Sync(); err != nil {
		return fmt.Errorf("lay down the input: %w", err)
	}
	return nil
}

// tempInput makes the file that an input is laid down in. It is locked for sweep; the lock goes with the process.
func tempInput(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, tempLaid)
	if err != nil {
		return nil, fmt.Errorf("lay down the input: %w; choose another --data", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		_ = os.Remove(f.Name()) // else sweep does
		return nil, fmt.Errorf("lock the laid down input: %w", err)
	}
	return f, nil
}

// sweep removes what killed processes left half laid down. Living ones hold a lock on theirs; a young file may be
// one whose lock is still to come.
func sweep(dir string) {
	names, _ := filepath.Glob(filepath.Join(dir, tempLaid)) // the pattern is well formed
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		st, err := f.Stat()
		if err == nil && time.Since(st.ModTime()) > time.Minute && syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
			_ = os.Remove(name) // tried again next time
		}
		f.Close()
	}
}

// keep gives the laid down lines their name, which is made of their content: the same content is laid down once.
func (src *source) keep(sum string) error {
	if src.laid == "" {
		return nil
	}
	broker.CrashPoint("producer.input-before-rename")
	dir := filepath.Join(filepath.Dir(src.laid), "input-"+sum[:16])
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("lay down the input: %w", err)
	}
	name := filepath.Join(dir, src.base+".jsonl")
	if err := os.Rename(src.laid, name); err != nil {
		return fmt.Errorf("lay down the input: %w", err)
	}
	src.laid, src.kept = name, true
	return errors.Join(broker.SyncDir(dir), broker.SyncDir(filepath.Dir(dir)))
}

// close lets go of the file. A copy stays only where it is all there is of a job that has not ended.
func (src *source) close() error {
	if src.laid != "" && (!src.once || src.done) {
		src.drop()
		return nil
	}
	if src.file == nil {
		return nil
	}
	return src.file.Close()
}

// drop lets go of the file and removes a copy.
func (src *source) drop() {
	if src.file != nil {
		src.file.Close() // read only, or not wanted
		src.file = nil
	}
	if src.laid == "" {
		return
	}
	_ = os.Remove(src.laid) // what cannot be removed is found by its name
	if src.kept {
		_ = os.Remove(filepath.Dir(src.laid)) // only if it is empty
	}
}
