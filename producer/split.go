package producer

import (
	"bytes"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/cespare/xxhash/v2"
)

// blockBytes is how much of the input is read at once. A block holds whole lines.
const blockBytes = 1 << 20

// span is a line that counts, in a block.
type span struct {
	from, to int    // of its text in the block's data; 0, 0 where it is longer than what is kept
	offset   int64  // of its text in the input
	line     int64  // of the input, from 1
	size     int64  // of its text
	hash     uint64 // of its text, where that is not kept
}

// block is a piece of the input on its way through the parsers.
type block struct {
	data   []byte
	spans  []span
	parsed []parsed
	bytes  int64         // of the input up to the end of this block
	done   chan struct{} // gets a value when parsed is complete
}

// splitter cuts the input into blocks of whole lines, hashing what it takes. A line longer than most is passed over
// without being kept.
type splitter struct {
	src   io.Reader
	sum   hash.Hash
	most  int
	limit int64 // lines that are taken; 0: all

	rest  []byte // the beginning of a line that has not ended yet
	at    int64  // where rest begins in the input
	lines int64  // of the input so far, blank ones included
	taken int64
	eof   bool
}

// next fills b, and returns io.EOF after the last line.
func (s *splitter) next(b *block) error {
	b.spans, b.data = b.spans[:0], append(b.data[:0], s.rest...)
	s.rest = s.rest[:0]
	for {
		if s.eof && len(b.data) == 0 || s.full() {
			if b.bytes = s.at; len(b.spans) > 0 {
				return nil
			}
			return io.EOF
		}
		end, err := s.fill(b)
		if err != nil {
			return err
		}
		if end < 0 { // a long line without an end
			if err := s.pass(b); err != nil {
				return err
			}
			continue
		}
		s.rest = append(s.rest, b.data[end:]...)
		used := s.split(b, end)
		_, _ = s.sum.Write(b.data[:used]) // never fails
		s.at += int64(used)
		b.bytes = s.at
		if len(b.spans) > 0 {
			return nil
		}
		b.data = append(b.data[:0], s.rest...)
		s.rest = s.rest[:0]
	}
}

func (s *splitter) full() bool { return s.limit > 0 && s.taken >= s.limit }

// fill reads until the data holds at least one whole line, and returns where the last one ends; -1: there is none
// within most bytes.
func (s *splitter) fill(b *block) (int, error) {
	seen := 0
	for {
		if !s.eof {
			if err := s.read(b, max(blockBytes-len(b.data), blockBytes/4)); err != nil {
				return 0, err
			}
		}
		if end := bytes.LastIndexByte(b.data[seen:], '\n'); end >= 0 {
			return seen + end + 1, nil
		}
		seen = len(b.data)
		if s.eof {
			return len(b.data), nil
		}
		if len(b.data) > s.most+len("\r\n") {
			return -1, nil
		}
	}
}

// read appends up to n bytes of the input to the data.
func (s *splitter) read(b *block, n int) error {
	from := len(b.data)
	if cap(b.data) < from+n {
		b.data = append(make([]byte, 0, from+max(n, from)), b.data...)
	}
	got, err := io.ReadFull(s.src, b.data[from:from+n])
	b.data = b.data[:from+got]
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		s.eof, err = true, nil
	}
	if err != nil {
		return fmt.Errorf("read input: %w", err)
	}
	return nil
}

// pass goes over the rest of a line whose beginning, the whole data, is too long already, and notes it. What follows
// it becomes the data.
func (s *splitter) pass(b *block) error {
	text := xxhash.New()
	sp := span{offset: s.at, line: s.lines + 1}
	for {
		end := bytes.IndexByte(b.data, '\n')
		ended := end >= 0
		if !ended {
			end = len(b.data)
		}
		_, _ = text.Write(b.data[:end]) // never fails, as the next
		_, _ = s.sum.Write(b.data[:end])
		sp.size += int64(end)
		s.at += int64(end)
		b.data = b.data[:copy(b.data, b.data[end:])]
		if ended || s.eof && len(b.data) == 0 {
			break
		}
		if err := s.read(b, blockBytes); err != nil {
			return err
		}
	}
	sp.hash = text.Sum64()
	s.lines++
	s.taken++
	b.spans = append(b.spans, sp)
	if len(b.data) > 0 { // its line end
		_, _ = s.sum.Write(b.data[:1])
		s.at++
		b.data = b.data[:copy(b.data, b.data[1:])]
	}
	return nil
}

// split notes the lines in the first end bytes, and returns how many of these were used: fewer when the limit is
// reached.
func (s *splitter) split(b *block, end int) int {
	from := 0
	for from < end && !s.full() {
		to, next := end, end
		if n := bytes.IndexByte(b.data[from:end], '\n'); n >= 0 {
			to, next = from+n, from+n+1
		}
		s.lines++
		s.line(b, from, to)
		from = next
	}
	return from
}

// line notes the line between from and to, unless it is blank.
func (s *splitter) line(b *block, from, to int) {
	if s.at == 0 && from == 0 && bytes.HasPrefix(b.data[:to], []byte("\xef\xbb\xbf")) { // byte order mark
		from = 3
	}
	if to > from && b.data[to-1] == '\r' {
		to--
	}
	text := b.data[from:to]
	if len(text) == 0 || text[0] <= ' ' && len(bytes.Trim(text, " \t\r")) == 0 {
		return
	}
	sp := span{from: from, to: to, offset: s.at + int64(from), line: s.lines, size: int64(to - from)}
	if len(text) > s.most {
		sp.hash = xxhash.Sum64(text)
		sp.from, sp.to = 0, 0
	}
	s.taken++
	b.spans = append(b.spans, sp)
}
