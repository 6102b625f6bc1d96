package aggregator

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
)

// A spool holds the results of one job in the order in which they came: the magic of the file, then records of a
// header and the result's own bytes. All numbers are little-endian.
//
//	0  magic of the record   u32
//	4  length of the result  u32
//	8  CRC32C of what follows, then of the length  u32
//	12 kind: 1 ok, 2 error   u32
//	16 index of the line     i64
//	24 broker's timestamp    i64, Unix ns
//	32 the result
const (
	spoolMagic   = "millrace spool 1"
	recordMagic  = "\xfemrR" // never part of UTF-8 text, so it is rare in results
	recordHeader = 32
	maxRecord    = 64 << 20 // nats-server takes no larger message, whatever its max_payload
	spoolBuffer  = 256 << 10
	readerWindow = 1 << 20
)

const (
	kindOK    = 1
	kindError = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Record is one result in a spool.
type Record struct {
	Index int64
	OK    bool
	Time  int64  // the broker's timestamp of the message, Unix ns
	Data  []byte // the result as it came over the wire
}

// appendRecord renders r for the file.
func appendRecord(dst []byte, r Record) []byte {
	at := len(dst)
	kind := uint32(kindError)
	if r.OK {
		kind = kindOK
	}
	dst = append(dst, recordMagic...)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(r.Data)))
	dst = binary.LittleEndian.AppendUint32(dst, 0)
	dst = binary.LittleEndian.AppendUint32(dst, kind)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(r.Index))
	dst = binary.LittleEndian.AppendUint64(dst, uint64(r.Time))
	dst = append(dst, r.Data...)
	binary.LittleEndian.PutUint32(dst[at+8:], recordSum(dst[at:]))
	return dst
}

// recordSum is the checksum of a whole record.
func recordSum(b []byte) uint32 {
	sum := crc32.Update(0, castagnoli, b[12:])
	return crc32.Update(sum, castagnoli, b[4:8])
}

// recordLength reads how long the record is that begins with the header b, and whether it can be one.
func recordLength(b []byte) (int64, bool) {
	if len(b) < recordHeader || string(b[:4]) != recordMagic {
		return 0, false
	}
	n := binary.LittleEndian.Uint32(b[4:])
	kind := binary.LittleEndian.Uint32(b[12:])
	return recordHeader + int64(n), n <= maxRecord && (kind == kindOK || kind == kindError)
}

// parseRecord reads a whole record. Data is a part of b.
func parseRecord(b []byte) (Record, bool) {
	n, ok := recordLength(b)
	if !ok || n != int64(len(b)) || recordSum(b) != binary.LittleEndian.Uint32(b[8:]) {
		return Record{}, false
	}
	return Record{
		Index: int64(binary.LittleEndian.Uint64(b[16:])),
		OK:    binary.LittleEndian.Uint32(b[12:]) == kindOK,
		Time:  int64(binary.LittleEndian.Uint64(b[24:])),
		Data:  b[recordHeader:],
	}, true
}

// spool is the spool of a job as its fold writes it. What is appended can be read at once; it is in the file after
// flush and on disk after sync. sync may run beside all others, which need the lock of the fold.
type spool struct {
	path    string
	file    *os.File // nil until the first flush
	flushed int64    // bytes in the file that count; a torn end behind them is written over
	buf     []byte   // follows them
}

var errDamaged = errors.New("the record is damaged")

func (s *spool) size() int64 { return s.flushed + int64(len(s.buf)) }

// room makes sure that a record can be appended without holding more and more in memory.
func (s *spool) room() error {
	if len(s.buf) < spoolBuffer {
		return nil
	}
	return s.flush()
}

// append adds a record and returns where it begins. It cannot fail: call room first.
func (s *spool) append(r Record) int64 {
	if s.size() == 0 {
		s.buf = append(s.buf, spoolMagic...)
	}
	at := s.size()
	s.buf = appendRecord(s.buf, r)
	return at
}

// flush hands what is buffered to the file. After an error nothing is lost: the next flush writes it again at the
// same place.
func (s *spool) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	if err := s.open(); err != nil {
		return err
	}
	if _, err := s.file.WriteAt(s.buf, s.flushed); err != nil {
		return fmt.Errorf("write spool: %w", err)
	}
	s.flushed += int64(len(s.buf))
	s.buf = s.buf[:0]
	if cap(s.buf) > 4*spoolBuffer {
		s.buf = nil
	}
	return nil
}

func (s *spool) open() error {
	if s.file != nil {
		return nil
	}
	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return fmt.Errorf("open spool: %w", err)
	}
	s.file = f
	return nil
}

// cut forgets everything behind n bytes.
func (s *spool) cut(n int64) error {
	if err := s.open(); err != nil {
		return err
	}
	if err := s.file.Truncate(n); err != nil {
		return fmt.Errorf("truncate spool: %w", err)
	}
	s.flushed, s.buf = n, nil
	return nil
}

// renew writes the first n bytes over with themselves. After a failed fsync the system may take for written what never
// came to the disk, and the next one would say nothing; so it is all still to be written, for the next one to speak of.
func (s *spool) renew(n int64) error {
	if err := s.open(); err != nil {
		return err
	}
	buf := make([]byte, readerWindow)
	for at := int64(0); at < n; {
		got, err := s.file.ReadAt(buf[:min(n-at, readerWindow)], at)
		if got == 0 {
			return fmt.Errorf("read spool: %w", err)
		}
		if _, err := s.file.WriteAt(buf[:got], at); err != nil {
			return fmt.Errorf("write spool: %w", err)
		}
		at += int64(got)
	}
	return nil
}

// record reads the record that begins at off, in memory or in the file.
func (s *spool) record(off int64) (Record, error) {
	if off >= s.flushed {
		b := s.buf[min(off-s.flushed, int64(len(s.buf))):]
		if n, ok := recordLength(b); ok && n <= int64(len(b)) {
			if r, ok := parseRecord(b[:n]); ok {
				return r, nil
			}
		}
		return Record{}, fmt.Errorf("read spool at %d: %w", off, errDamaged)
	}
	return readRecord(s.file, off, nil)
}

func (s *spool) close() {
	if s.file != nil {
		s.file.Close() // what had to be on disk was synced before
		s.file = nil
	}
}

// spoolGuess is how many bytes are read for a record at first: most are shorter, and what is longer is read in two.
const spoolGuess = 4 << 10

// readRecord reads the record that begins at off. The record's data may lie in buf.
func readRecord(f io.ReaderAt, off int64, buf []byte) (Record, error) {
	if cap(buf) < spoolGuess {
		buf = make([]byte, spoolGuess)
	}
	buf = buf[:cap(buf)]
	got, err := f.ReadAt(buf, off)
	n, ok := recordLength(buf[:got])
	if !ok {
		if err != nil && err != io.EOF {
			return Record{}, fmt.Errorf("read spool: %w", err)
		}
		return Record{}, fmt.Errorf("read spool at %d: %w", off, errDamaged)
	}
	if n > int64(got) {
		whole := make([]byte, n)
		copy(whole, buf[:got])
		if _, err := f.ReadAt(whole[got:], off+int64(got)); err != nil && err != io.EOF {
			return Record{}, fmt.Errorf("read spool: %w", err)
		}
		buf = whole
	}
	r, ok := parseRecord(buf[:n])
	if !ok {
		return Record{}, fmt.Errorf("read spool at %d: %w", off, errDamaged)
	}
	return r, nil
}

// SpoolReader reads the first bytes of a spool from its beginning. It skips what is damaged, to the next record that
// is whole: a flipped bit costs the line it hit, not the night's work behind it.
type SpoolReader struct {
	r       io.ReaderAt
	size    int64
	at      int64 // of the next record
	from    int64 // of the last one
	end     int64
	damaged int64

	buf   []byte // the bytes of the file from bufAt on
	bufAt int64
}

// NewSpoolReader returns a reader of the first size bytes of r.
func NewSpoolReader(r io.ReaderAt, size int64) *SpoolReader {
	return &SpoolReader{r: r, size: size}
}

// Next returns the next record; its data is valid until the next call. At the end it returns io.EOF, and other errors
// only where the file cannot be read.
func (s *SpoolReader) Next() (Record, error) {
	if s.at == 0 {
		if err := s.begin(); err != nil {
			return Record{}, err
		}
	}
	for {
		if s.at >= s.size {
			return Record{}, io.EOF
		}
		r, n, err := s.parse(s.at)
		if err != nil {
			return Record{}, err
		}
		if n > 0 {
			s.from, s.at = s.at, s.at+n
			s.end = s.at
			return r, nil
		}
		next, err := s.resync(s.at + 1)
		if err != nil {
			return Record{}, err
		}
		s.damaged += next - s.at
		s.at = next
	}
}

// Offset is where the record that Next returned last begins.
func (s *SpoolReader) Offset() int64 { return s.from }

// End is where the last whole record ends.
func (s *SpoolReader) End() int64 { return s.end }

// Damaged counts the bytes that were skipped.
func (s *SpoolReader) Damaged() int64 { return s.damaged }

func (s *SpoolReader) begin() error {
	if s.size == 0 {
		return io.EOF
	}
	b, err := s.view(0, len(spoolMagic))
	if err != nil {
		return err
	}
	s.at = int64(len(spoolMagic))
	if string(b) == spoolMagic {
		s.end = s.at
		return nil
	}
	s.damaged = min(s.at, s.size)
	return nil
}

// parse reads the record at at; n is 0 where there is no whole one.
func (s *SpoolReader) parse(at int64) (r Record, n int64, err error) {
	head, err := s.view(at, recordHeader)
	if err != nil {
		return r, 0, err
	}
	n, ok := recordLength(head)
	if !ok || n > s.size-at {
		return r, 0, nil
	}
	whole, err := s.view(at, int(n))
	if err != nil {
		return r, 0, err
	}
	if r, ok = parseRecord(whole); !ok {
		return r, 0, nil
	}
	return r, n, nil
}

// resync finds the first whole record that begins at at or later, or the end.
func (s *SpoolReader) resync(at int64) (int64, error) {
	for at < s.size {
		b, err := s.view(at, readerWindow)
		if err != nil {
			return 0, err
		}
		i := bytes.Index(b, []byte(recordMagic))
		if i < 0 {
			if at+int64(len(b)) >= s.size {
				break
			}
			at += int64(len(b) - len(recordMagic) + 1)
			continue
		}
		at += int64(i)
		_, n, err := s.parse(at)
		if err != nil {
			return 0, err
		}
		if n > 0 {
			return at, nil
		}
		at++
	}
	return s.size, nil
}

// view returns n bytes of the file, fewer at its end. They are valid until the next call.
func (s *SpoolReader) view(at int64, n int) ([]byte, error) {
	n = int(min(int64(n), s.size-at))
	if at >= s.bufAt && at+int64(n) <= s.bufAt+int64(len(s.buf)) {
		return s.buf[at-s.bufAt:][:n], nil
	}
	want := int(min(int64(max(n, readerWindow)), s.size-at))
	if cap(s.buf) < want {
		s.buf = make([]byte, want)
	}
	got, err := s.r.ReadAt(s.buf[:want], at)
	if err != nil && err != io.EOF {
		s.buf = s.buf[:0]
		return nil, fmt.Errorf("read spool: %w", err)
	}
	s.buf, s.bufAt = s.buf[:got], at
	if got < want { // the file is shorter than was said
		s.size = at + int64(got)
	}
	return s.buf[:min(n, got)], nil
}
