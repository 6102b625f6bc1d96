package producer

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

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
}

// open finds out what the input is, and lays it down as plain lines where it cannot be read twice.
func (in *Input) open(ctx context.Context) (*source, error) {
	src := &source{name: in.Path, base: baseName(in.Path)}
	r := in.Stdin
	if in.Path == "-" {
		src.name, src.base, src.once = "standard input", "stdin", true
	} else {
		f, err := os.Open(in.Path)
		if err != nil {
			return nil, fmt.Errorf("open input: %w", err)
		}
		st, err := f.Stat()
		if err != nil || st.IsDir() {
			f.Close()
			return nil, errors.Join(err, fmt.Errorf("input %s is a folder; give a file", in.Path))
		}
		if src.once = !st.Mode().IsRegular(); !src.once {
			magic := make([]byte, 4)
			n, _ := f.ReadAt(magic, 0) // an error shows again when the file is read
			if !compressed(magic[:n]) {
				src.file = f
				return src, nil
			}
		}
		defer f.Close()
		r = f
	}
	return src, src.lay(ctx, in, r)
}

// baseName is the name of a file without its folder and the endings of compressed and of JSONL files.
func baseName(path string) string {
	b := filepath.Base(path)
	for _, end := range []string{".gz", ".zst", ".zstd", ".jsonl", ".ndjson", ".json", ".txt"} {
		b = strings.TrimSuffix(b, end)
	}
	return b
}

func compressed(magic []byte) bool {
	return bytes.HasPrefix(magic, gzipMagic) || bytes.HasPrefix(magic, zstdMagic)
}

var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

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
	if err := in.copyPlain(ctx, src.file, r); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
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

// Limits of compressed inputs. Prompts that repeat compress well, so that a high ratio alone says nothing until
// there is much of it.
const (
	maxRatio   = 1000
	ratioFrom  = 1 << 30
	keptFree   = 256 << 20 // of the disk, for everything else
	zstdMemory = 256 << 20 // `zstd --long=27` needs half of that
)

// copyPlain writes what r holds to w, unpacked.
func (in *Input) copyPlain(ctx context.Context, w io.Writer, r io.Reader) error {
	plain, end, err := in.plain(ctx, r)
	if err != nil {
		return err
	}
	defer end()
	_, err = io.CopyBuffer(struct{ io.Writer }{w}, plain, make([]byte, 1<<18))
	return err
}

// plain unpacks r where it is compressed.
func (in *Input) plain(ctx context.Context, r io.Reader) (io.Reader, func(), error) {
	packed := &counter{r: r}
	buf := bufio.NewReaderSize(packed, 1<<16)
	most, err := in.mostPlain()
	if err != nil {
		return nil, nil, err
	}
	c := &capped{ctx: ctx, r: buf, most: most, from: cmp.Or(in.ratioFrom, ratioFrom)}
	magic, err := buf.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("read: %w", err)
	}
	switch {
	case bytes.HasPrefix(magic, gzipMagic):
		z, err := gzip.NewReader(buf)
		if err != nil {
			return nil, nil, fmt.Errorf("unpack gzip: %w", err)
		}
		c.r, c.packed = z, packed
	case bytes.HasPrefix(magic, zstdMagic):
		z, err := zstd.NewReader(buf, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(zstdMemory))
		if err != nil {
			return nil, nil, fmt.Errorf("unpack zstd: %w", err)
		}
		c.r, c.packed = z, packed
		return c, z.Close, nil
	}
	return c, func() {}, nil
}

// mostPlain is how many bytes may be laid down.
func (in *Input) mostPlain() (int64, error) {
	if in.MaxPlain > 0 {
		return in.MaxPlain, nil
	}
	free, err := broker.FreeBytes(in.Dir)
	return max(free-keptFree, 1), err
}

// capped reads up to most bytes, ends with its context, and stops where too much comes out of too little.
type capped struct {
	ctx    context.Context
	r      io.Reader
	packed *counter // what went in; nil: it is not compressed
	n      int64
	most   int64
	from   int64 // bytes before the ratio counts
}

func (c *capped) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.r.Read(p)
	c.n += int64(n)
	switch {
	case c.n > c.most:
		return 0, fmt.Errorf("it has more than the %s bytes that there is room for", commas(c.most))
	case c.packed != nil && c.n > c.from && c.n/maxRatio > c.packed.n:
		return 0, fmt.Errorf("it unpacks to more than %s times its size (%s bytes so far); unpack it yourself if that is right", commas(maxRatio), commas(c.n))
	case errors.Is(err, io.ErrUnexpectedEOF):
		return n, fmt.Errorf("the compressed input ends too early: %w", err)
	}
	return n, err
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
