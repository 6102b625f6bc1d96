package producer

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"millrace/broker"
)

func compressed(magic []byte) bool {
	return bytes.HasPrefix(magic, gzipMagic) || bytes.HasPrefix(magic, zstdMagic)
}

var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// misnamed says that a file whose name says that it is packed is neither that nor text. Plain lines under such a name,
// as after a download that unpacks, are read.
func misnamed(path string, begin []byte) error {
	how := ""
	switch {
	case strings.HasSuffix(path, ".gz"):
		how = "gzip"
	case strings.HasSuffix(path, ".zst"), strings.HasSuffix(path, ".zstd"):
		how = "zstd"
	}
	text := bytes.TrimLeft(begin, " \t\r\n\xef\xbb\xbf")
	if how == "" || len(text) == 0 || text[0] == '{' {
		return nil
	}
	return badFile("%s: by its name it is %s, by its content it is not; copy or make it again, or give a plain JSONL file", path, how)
}

// Limits of compressed inputs. Prompts that repeat compress well, so that a high ratio alone says nothing until
// there is much of it.
const (
	maxRatio   = 1000
	ratioFrom  = 1 << 30
	keptFree   = 256 << 20 // of the disk, for everything else
	zstdMemory = 256 << 20 // `zstd --long=27` needs half of that
)

// copyPlain writes what r holds to w, unpacked, and says how it was compressed; empty: it was not.
func (in *Input) copyPlain(ctx context.Context, w io.Writer, r io.Reader) (how string, err error) {
	plain, end, err := in.plain(ctx, r)
	if err != nil {
		return "", err
	}
	defer end()
	_, err = io.CopyBuffer(struct{ io.Writer }{w}, plain, make([]byte, 1<<18))
	return plain.how, err
}

// plain unpacks r where it is compressed.
func (in *Input) plain(ctx context.Context, r io.Reader) (*capped, func(), error) {
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
			return nil, nil, badFile("the gzip data cannot be read (%w); copy or make the file again", err)
		}
		z.Multistream(false)
		c.r, c.packed, c.how = &members{z, buf}, packed, "gzip"
	case bytes.HasPrefix(magic, zstdMagic):
		z, err := zstd.NewReader(buf, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(zstdMemory))
		if err != nil {
			return nil, nil, fmt.Errorf("unpack zstd: %w", err)
		}
		c.r, c.packed, c.how = z, packed, "zstd"
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
	how    string   // it is compressed
	n      int64
	lines  int64
	most   int64
	from   int64 // bytes before the ratio counts
}

func (c *capped) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.lines += int64(bytes.Count(p[:n], []byte{'\n'}))
	switch {
	case c.n > c.most:
		return 0, fmt.Errorf("it has more than the %s bytes that there is room for; free some, or choose another --data", commas(c.most))
	case c.packed != nil && c.n > c.from && c.n/maxRatio > c.packed.n:
		return 0, badFile("it unpacks to more than %s times its size (%s bytes so far); unpack it yourself if that is right", commas(maxRatio), commas(c.n))
	case err == nil, errors.Is(err, io.EOF), c.packed == nil, c.packed.err != nil:
		return n, err
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return n, badFile("the zstd data needs more than %d MB of memory to be unpacked, as after `zstd --long=31`; unpack it yourself (zstd -d --long=31) and give the plain file", zstdMemory>>20)
	case errors.Is(err, errTail), errors.Is(err, zstd.ErrMagicMismatch): // the first magic was there
		return n, badFile("after %s whole lines the %s data ends, and something else follows it in the file; cut that off, or make the file again", commas(c.lines), c.how)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return n, badFile("the %s data ends too early, after %s whole lines: the file is cut off; copy or make it again", c.how, commas(c.lines))
	}
	return n, badFile("the %s data is damaged, found after %s whole lines (%w); copy or make the file again", c.how, commas(c.lines), err)
}

// members reads gzip data as gzip does, one member after another. What follows the last one and is none is errTail, also
// where it is too short to tell (gzip's own reader takes that for a member that is cut off).
type members struct {
	z   *gzip.Reader
	buf *bufio.Reader // what z reads, and not a byte further than the member's end
}

var errTail = errors.New("something else follows")

func (m *members) Read(p []byte) (int, error) {
	for {
		n, err := m.z.Read(p)
		if !errors.Is(err, io.EOF) {
			return n, err
		}
		if n > 0 { // the end is told again
			return n, nil
		}
		next, err := m.buf.Peek(len(gzipMagic))
		switch {
		case len(next) == 0:
			return 0, err
		case !bytes.Equal(next, gzipMagic):
			return 0, errTail
		}
		if err := m.z.Reset(m.buf); err != nil {
			if errors.Is(err, io.EOF) { // in the middle of its head
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		m.z.Multistream(false)
	}
}

type counter struct {
	r   io.Reader
	n   int64
	err error // that reading ended with, but for the end of the file
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		c.err = err
	}
	return n, err
}
