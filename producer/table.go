package producer

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
)

// record is what the line table keeps of a line that counts. Offset and length are of its text without its end.
type record struct {
	offset int64
	hash   uint64 // xxhash64 of the text
	line   int64  // line of the input, from 1
	flags  uint8
	length uint32 // cut to what fits
	ref    uint32 // model of a valid line; index of the first line with its custom_id, of a duplicate
}

const (
	flagInvalid   = 1 << iota // will not run
	flagDuplicate             // invalid because another line before it has its custom_id
	flagLong                  // invalid because it is too long to be read into memory
)

const recordBytes = 32

func (r record) put(b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], uint64(r.offset))
	le.PutUint64(b[8:], r.hash)
	le.PutUint64(b[16:], uint64(r.line)|uint64(r.flags)<<56)
	le.PutUint32(b[24:], r.length)
	le.PutUint32(b[28:], r.ref)
}

func readRecord(b []byte) record {
	le := binary.LittleEndian
	l := le.Uint64(b[16:])
	return record{offset: int64(le.Uint64(b[0:])), hash: le.Uint64(b[8:]), line: int64(l &^ (0xff << 56)), flags: uint8(l >> 56),
		length: le.Uint32(b[24:]), ref: le.Uint32(b[28:])}
}

// table is the line table: 32 bytes a line in a file without a name. It is written from one goroutine, then read
// from any.
type table struct {
	f *os.File
	w *bufio.Writer
	n int64
}

func newTable(dir string) (*table, error) {
	f, err := nameless(dir, "lines")
	if err != nil {
		return nil, err
	}
	return &table{f: f, w: bufio.NewWriterSize(f, 1<<16)}, nil
}

func (t *table) add(r record) error {
	var b [recordBytes]byte
	r.put(b[:])
	t.n++
	if _, err := t.w.Write(b[:]); err != nil {
		return fmt.Errorf("write line table: %w", err)
	}
	return nil
}

// flush ends the adding.
func (t *table) flush() error {
	if err := t.w.Flush(); err != nil {
		return fmt.Errorf("write line table: %w", err)
	}
	return nil
}

func (t *table) get(i int64) (record, error) {
	var b [recordBytes]byte
	if _, err := t.f.ReadAt(b[:], i*recordBytes); err != nil {
		return record{}, fmt.Errorf("read line table at %d: %w", i, err)
	}
	return readRecord(b[:]), nil
}

// rows are a part of the table in memory, for whoever reads records that mostly lie side by side.
type rows struct {
	from int64 // index of the first
	b    []byte
}

const rowsAtOnce = 128

// near is get for a reader that has rows.
func (t *table) near(i int64, w *rows) (record, error) {
	if at := i - w.from; at < 0 || at >= int64(len(w.b)/recordBytes) {
		from := i - i%rowsAtOnce
		b := slices.Grow(w.b[:0], rowsAtOnce*recordBytes)[:rowsAtOnce*recordBytes]
		n, err := t.f.ReadAt(b, from*recordBytes)
		w.from, w.b = from, b[:n]
		if int64(n/recordBytes) <= i-from {
			return record{}, fmt.Errorf("read line table at %d: %w", i, err)
		}
	}
	return readRecord(w.b[(i-w.from)*recordBytes:]), nil
}

// set writes a record again, after flush.
func (t *table) set(i int64, r record) error {
	var b [recordBytes]byte
	r.put(b[:])
	if _, err := t.f.WriteAt(b[:], i*recordBytes); err != nil {
		return fmt.Errorf("write line table at %d: %w", i, err)
	}
	return nil
}

// order is the lines in the order in which they are enqueued: by model, and of each model by the beginning of their
// prompts. The invalid ones follow at the end. 4 bytes a line in a file without a name.
type order struct {
	f      *os.File
	w      *bufio.Writer
	groups []group
	n      int64
}

// group is a part of the order.
type group struct {
	model   string // empty: the invalid lines
	from, n int64
}

func newOrder(dir string) (*order, error) {
	f, err := nameless(dir, "order")
	if err != nil {
		return nil, err
	}
	return &order{f: f, w: bufio.NewWriterSize(f, 1<<16)}, nil
}

// add appends a line to the group of a model; groups come one after the other.
func (o *order) add(model string, index uint32) error {
	if len(o.groups) == 0 || o.groups[len(o.groups)-1].model != model {
		o.groups = append(o.groups, group{model: model, from: o.n})
	}
	o.groups[len(o.groups)-1].n++
	o.n++
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], index)
	if _, err := o.w.Write(b[:]); err != nil {
		return fmt.Errorf("write order of lines: %w", err)
	}
	return nil
}

func (o *order) flush() error {
	if err := o.w.Flush(); err != nil {
		return fmt.Errorf("write order of lines: %w", err)
	}
	return nil
}

// read returns the lines at the positions from… of a group, at most len(into) of them.
func (o *order) read(g group, from int64, into []uint32) ([]uint32, error) {
	into = into[:min(int64(len(into)), g.n-from)]
	b := make([]byte, 4*len(into))
	if _, err := o.f.ReadAt(b, 4*(g.from+from)); err != nil {
		return nil, fmt.Errorf("read order of lines: %w", err)
	}
	for i := range into {
		into[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return into, nil
}
