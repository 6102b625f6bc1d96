// Package proto is the contract on the wire: the records that travel, the names and configurations of the
// streams, consumers and buckets they travel through, and the OpenAI batch lines they begin and end as.
//
// Every record is a msgpack array with a version first. A reader skips fields it does not know and leaves
// fields that are not there at zero, so a field may be appended without a new version; a new version means
// that an older reader must not guess ([ErrNewerVersion]).
package proto

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/tinylib/msgp/msgp"
)

// Version is the version that this program writes, and the newest that it reads.
const Version = 1

// ErrNewerVersion is returned for a record of a version this program does not know. Such a record is given
// back to where it came from, never dropped.
var ErrNewerVersion = errors.New("record was written by a newer millrace")

// maxList bounds the number of elements that a decoded list may announce before any of them is read.
const maxList = 1 << 20

// codec writes or reads a record field by field; each record lists its fields once, in visit, for every way. The
// first error of reading sticks.
type codec struct {
	way  codecWay
	out  []byte // what is written
	in   []byte // what is left to read
	err  error
	left int // fields of the record being read that are not read yet
	n    int // fields that were measured
	size int // the most bytes that they take
}

type codecWay byte

const (
	measuring codecWay = iota
	writing
	reading
)

// maxHead is the most bytes that stand before a text or a list, and maxNumber those of a number.
const (
	maxHead   = msgp.ArrayHeaderSize
	maxNumber = msgp.Int64Size
)

type record interface{ visit(*codec) }

// next says whether the field at hand is to be read; a field that is not there any more keeps its zero value.
func (c *codec) next() bool {
	if c.err != nil || c.left == 0 {
		return false
	}
	c.left--
	return true
}

// field writes or reads one value that takes at most size bytes.
func field[T any](c *codec, p *T, size int, write func([]byte, T) []byte, read func([]byte) (T, []byte, error)) {
	switch {
	case c.way == writing:
		c.out = write(c.out, *p)
	case c.way == measuring:
		c.n++
		c.size += size
	case c.next():
		*p = take(c, read)
	}
}

// take reads a value. Nil is the zero value.
func take[T any](c *codec, read func([]byte) (T, []byte, error)) (v T) {
	if msgp.IsNil(c.in) {
		c.in = c.in[1:]
		return v
	}
	v, rest, err := read(c.in)
	if err != nil {
		c.err = err
		return v
	}
	c.in = rest
	return v
}

func (c *codec) str(p *string) {
	field(c, p, maxHead+len(*p), msgp.AppendString, msgp.ReadStringBytes)
}

// bytes reads into a part of the message, which is not copied.
func (c *codec) bytes(p *[]byte) {
	field(c, p, maxHead+len(*p), appendBytes, readBytes)
}

func (c *codec) bool(p *bool) { field(c, p, msgp.BoolSize, msgp.AppendBool, msgp.ReadBoolBytes) }

func (c *codec) int(p *int64) { field(c, p, maxNumber, appendInt, msgp.ReadInt64Bytes) }

func (c *codec) float(p *float64) {
	field(c, p, maxNumber, msgp.AppendFloat64, msgp.ReadFloat64Bytes)
}

func readBytes(b []byte) (v, rest []byte, err error) {
	v, rest, err = msgp.ReadBytesZC(b)
	return slices.Clip(v), rest, err
}

func appendBytes(b, v []byte) []byte {
	if v == nil {
		return msgp.AppendNil(b)
	}
	return msgp.AppendBytes(b, v)
}

// appendInt writes the shortest form, as msgp does not for positive numbers, and Python does.
func appendInt(b []byte, n int64) []byte {
	if n >= 0 {
		return msgp.AppendUint64(b, uint64(n))
	}
	return msgp.AppendInt64(b, n)
}

// nested writes or reads one record inside another, as an array without a version.
func (c *codec) nested(r record) {
	switch {
	case c.way == writing:
		c.out = msgp.AppendArrayHeader(c.out, c.count(r))
		r.visit(c)
	case c.way == measuring:
		n := c.n
		r.visit(c)
		c.n = n + 1
		c.size += maxHead
	case c.next():
		c.inside(r, int(take(c, msgp.ReadArrayHeaderBytes)))
	}
}

// count returns how many fields r has, in the middle of writing.
func (c *codec) count(r record) uint32 {
	c.way, c.n = measuring, 0
	r.visit(c)
	c.way = writing
	return uint32(c.n)
}

// inside reads r from the next n elements and skips those it does not know.
func (c *codec) inside(r record, n int) {
	outer := c.left
	c.left = n
	r.visit(c)
	for c.err == nil && c.left > 0 {
		c.left--
		c.in, c.err = msgp.Skip(c.in)
	}
	c.left = outer
}

// list writes or reads a list of records.
func list[T any, P interface {
	*T
	record
}](c *codec, p *[]T) {
	each(c, p, func(v *T) { c.nested(P(v)) })
}

// each writes or reads a list whose elements are handled by one.
func each[T any](c *codec, p *[]T, one func(*T)) {
	switch {
	case c.way == writing:
		c.out = msgp.AppendArrayHeader(c.out, uint32(len(*p)))
		for i := range *p {
			one(&(*p)[i])
		}
	case c.way == measuring:
		n := c.n
		for i := range *p {
			one(&(*p)[i])
		}
		c.n = n + 1
		c.size += maxHead
	case c.next():
		n := take(c, msgp.ReadArrayHeaderBytes)
		if n > maxList {
			c.err = fmt.Errorf("list of %d elements, more than %d", n, maxList)
			return
		}
		var out []T
		outer := c.left
		for i := uint32(0); i < n && c.err == nil; i++ {
			var v T
			c.left = 1
			one(&v)
			out = append(out, v)
		}
		c.left = outer
		*p = out
	}
}

// encode renders r as one msgpack array, the version first.
func encode(r record) ([]byte, error) {
	var c codec
	r.visit(&c)
	if c.size > math.MaxUint32 {
		return nil, fmt.Errorf("encode %T: too long", r)
	}
	c.way, c.out = writing, make([]byte, 0, maxHead+maxNumber+c.size)
	c.out = msgp.AppendArrayHeader(c.out, uint32(1+c.n))
	c.out = appendInt(c.out, Version)
	r.visit(&c)
	return c.out, nil
}

// decode reads what encode wrote. Fields that are bytes are parts of b.
func decode(b []byte, r record) error {
	n, b, err := msgp.ReadArrayHeaderBytes(b)
	if err != nil {
		return fmt.Errorf("decode %T: %w", r, err)
	}
	if n < 1 {
		return fmt.Errorf("decode %T: empty record", r)
	}
	v, b, err := msgp.ReadInt64Bytes(b)
	switch {
	case err != nil:
		return fmt.Errorf("decode %T: version: %w", r, err)
	case v > Version:
		return fmt.Errorf("decode %T: version %d: %w", r, v, ErrNewerVersion)
	case v < 1:
		return fmt.Errorf("decode %T: version %d", r, v)
	}
	c := codec{way: reading, in: b}
	c.inside(r, int(n-1))
	if c.err != nil {
		return fmt.Errorf("decode %T: %w", r, c.err)
	}
	if len(c.in) > 0 {
		return fmt.Errorf("decode %T: %d bytes after its end", r, len(c.in))
	}
	return nil
}
