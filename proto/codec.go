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
)

// Version is the version that this program writes, and the newest that it reads.
const Version = 1

// ErrNewerVersion is returned for a record of a version this program does not know. Such a record is given
// back to where it came from, never dropped.
var ErrNewerVersion = errors.New("record was written by a newer millrace")

// maxList bounds the number of elements that a decoded list may announce before any of them is read.
const maxList = 1 << 20

// codec writes or reads a record field by field; each record lists its fields once, in visit, for every way.
type codec struct {
	way  codecWay
	out  []byte // what is written
	in   reader // what is read
	left int    // fields of the record being read that are not read yet
	n    int    // fields that were measured
	size int    // the most bytes that they take
}

type codecWay byte

const (
	measuring codecWay = iota
	writing
	reading
)

type record interface{ visit(*codec) }

// measure counts one field of at most size bytes.
func (c *codec) measure(size int) {
	c.n++
	c.size += size
}

// next says whether the field at hand is to be read; a field that is not there any more keeps its zero value.
func (c *codec) next() bool {
	if c.in.err != nil || c.left == 0 {
		return false
	}
	c.left--
	return true
}

func (c *codec) str(p *string) {
	switch {
	case c.way == writing:
		c.out = appendString(c.out, *p)
	case c.way == measuring:
		c.measure(maxHead + len(*p))
	case c.next():
		*p = string(c.in.bytes())
	}
}

func (c *codec) bytes(p *[]byte) {
	switch {
	case c.way == writing:
		c.out = appendBytes(c.out, *p)
	case c.way == measuring:
		c.measure(maxHead + len(*p))
	case c.next():
		*p = c.in.bytes()
	}
}

func (c *codec) bool(p *bool) {
	switch {
	case c.way == writing:
		c.out = appendBool(c.out, *p)
	case c.way == measuring:
		c.measure(1)
	case c.next():
		*p = c.in.bool()
	}
}

func (c *codec) int(p *int64) {
	switch {
	case c.way == writing:
		c.out = appendInt(c.out, *p)
	case c.way == measuring:
		c.measure(maxNumber)
	case c.next():
		*p = c.in.int()
	}
}

func (c *codec) float(p *float64) {
	switch {
	case c.way == writing:
		c.out = appendFloat(c.out, *p)
	case c.way == measuring:
		c.measure(maxNumber)
	case c.next():
		*p = c.in.float()
	}
}

// nested writes or reads one record inside another, as an array without a version.
func (c *codec) nested(r record) {
	switch {
	case c.way == writing:
		c.out = appendArray(c.out, c.count(r))
		r.visit(c)
	case c.way == measuring:
		n := c.n
		r.visit(c)
		c.n = n
		c.measure(maxHead)
	case c.next():
		c.inside(r, c.in.array())
	}
}

// count returns how many fields r has, in the middle of writing.
func (c *codec) count(r record) int {
	c.way, c.n = measuring, 0
	r.visit(c)
	c.way = writing
	return c.n
}

// inside reads r from the next n elements and skips those it does not know.
func (c *codec) inside(r record, n int) {
	outer := c.left
	c.left = n
	r.visit(c)
	for c.in.err == nil && c.left > 0 {
		c.left--
		c.in.skip()
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
		c.out = appendArray(c.out, len(*p))
		for i := range *p {
			one(&(*p)[i])
		}
	case c.way == measuring:
		n := c.n
		for i := range *p {
			one(&(*p)[i])
		}
		c.n = n
		c.measure(maxHead)
	case c.next():
		n := c.in.array()
		if n > maxList {
			c.in.fail(fmt.Errorf("list of %d elements, more than %d", n, maxList))
			return
		}
		var out []T
		outer := c.left
		for i := 0; i < n && c.in.err == nil; i++ {
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
	c.out = appendArray(c.out, 1+c.n)
	c.out = appendInt(c.out, Version)
	r.visit(&c)
	return c.out, nil
}

// decode reads what encode wrote. Fields that are bytes are parts of b.
func decode(b []byte, r record) error {
	c := codec{way: reading, in: reader{b: b}}
	n := c.in.array()
	switch {
	case c.in.err != nil:
		return fmt.Errorf("decode %T: %w", r, c.in.err)
	case n < 1:
		return fmt.Errorf("decode %T: empty record", r)
	}
	switch v := c.in.int(); {
	case c.in.err != nil:
		return fmt.Errorf("decode %T: version: %w", r, c.in.err)
	case v > Version:
		return fmt.Errorf("decode %T: version %d: %w", r, v, ErrNewerVersion)
	case v < 1:
		return fmt.Errorf("decode %T: version %d", r, v)
	}
	c.inside(r, n-1)
	if c.in.err != nil {
		return fmt.Errorf("decode %T: %w", r, c.in.err)
	}
	if len(c.in.b) > 0 {
		return fmt.Errorf("decode %T: %d bytes after its end", r, len(c.in.b))
	}
	return nil
}
