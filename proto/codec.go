// Package proto is the contract on the wire: the records that travel, the names and configurations of the
// streams, consumers and buckets they travel through, and the OpenAI batch lines they begin and end as.
//
// Every record is a msgpack array with a version first. A reader skips fields it does not know and leaves
// fields that are not there at zero, so a field may be appended without a new version; a new version means
// that an older reader must not guess ([ErrNewerVersion]).
package proto

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/vmihailenco/msgpack/v5"
)

// Version is the version that this program writes, and the newest that it reads.
const Version = 1

// ErrNewerVersion is returned for a record of a version this program does not know. Such a record is given
// back to where it came from, never dropped.
var ErrNewerVersion = errors.New("record was written by a newer millrace")

// maxList bounds the number of elements that a decoded list may announce before any of them is read.
const maxList = 1 << 20

// codec writes or reads a record field by field; each record lists its fields once, in visit, for both ways.
// The first error sticks.
type codec struct {
	enc  *msgpack.Encoder
	dec  *msgpack.Decoder
	left int // fields of the record being read that are not read yet
	n    int // fields counted, when neither enc nor dec is set
	err  error
}

type record interface{ visit(*codec) }

// next says whether the field at hand is to be read; a field that is not there any more keeps its zero value.
func (c *codec) next() bool {
	if c.err != nil || c.left == 0 {
		return false
	}
	c.left--
	return true
}

// field writes or reads one plain value.
func field[T any](c *codec, p *T, enc func(*msgpack.Encoder, T) error, dec func(*msgpack.Decoder) (T, error)) {
	switch {
	case c.enc != nil:
		c.fail(enc(c.enc, *p))
	case c.dec == nil:
		c.n++
	case c.next():
		*p, c.err = dec(c.dec)
	}
}

func (c *codec) str(p *string) {
	field(c, p, (*msgpack.Encoder).EncodeString, (*msgpack.Decoder).DecodeString)
}

func (c *codec) bytes(p *[]byte) {
	field(c, p, (*msgpack.Encoder).EncodeBytes, (*msgpack.Decoder).DecodeBytes)
}

func (c *codec) bool(p *bool) {
	field(c, p, (*msgpack.Encoder).EncodeBool, (*msgpack.Decoder).DecodeBool)
}

func (c *codec) int(p *int64) {
	field(c, p, (*msgpack.Encoder).EncodeInt, (*msgpack.Decoder).DecodeInt64)
}

func (c *codec) float(p *float64) {
	field(c, p, (*msgpack.Encoder).EncodeFloat64, (*msgpack.Decoder).DecodeFloat64)
}

func (c *codec) fail(err error) {
	if c.err == nil {
		c.err = err
	}
}

// nested writes or reads one record inside another, as an array without a version.
func (c *codec) nested(r record) {
	switch {
	case c.enc != nil:
		c.fail(c.enc.EncodeArrayLen(count(r)))
		r.visit(c)
	case c.dec == nil:
		c.n++
	case c.next():
		n, err := c.dec.DecodeArrayLen()
		if err != nil {
			c.err = err
			return
		}
		c.inside(r, max(n, 0))
	}
}

// inside reads r from the next n elements and skips those it does not know.
func (c *codec) inside(r record, n int) {
	outer := c.left
	c.left = n
	r.visit(c)
	for c.err == nil && c.left > 0 {
		c.left--
		c.err = c.dec.Skip()
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
	case c.enc != nil:
		c.fail(c.enc.EncodeArrayLen(len(*p)))
		for i := range *p {
			one(&(*p)[i])
		}
	case c.dec == nil:
		c.n++
	case c.next():
		n, err := c.dec.DecodeArrayLen()
		if err != nil {
			c.err = err
			return
		}
		if n > maxList {
			c.err = fmt.Errorf("list of %d elements, more than %d", n, maxList)
			return
		}
		var out []T
		outer := c.left
		for i := 0; i < n && c.err == nil; i++ {
			var v T
			c.left = 1
			one(&v)
			out = append(out, v)
		}
		c.left = outer
		*p = out
	}
}

func count(r record) int {
	var c codec
	r.visit(&c)
	return c.n
}

// encode renders r as one msgpack array, the version first.
func encode(r record) ([]byte, error) {
	var buf bytes.Buffer
	enc := msgpack.GetEncoder()
	defer msgpack.PutEncoder(enc)
	enc.Reset(&buf)
	c := codec{enc: enc}
	c.fail(enc.EncodeArrayLen(1 + count(r)))
	c.fail(enc.EncodeInt(Version))
	r.visit(&c)
	if c.err != nil {
		return nil, fmt.Errorf("encode %T: %w", r, c.err)
	}
	return buf.Bytes(), nil
}

// decode reads what encode wrote.
func decode(b []byte, r record) error {
	rd := bytes.NewReader(b)
	dec := msgpack.GetDecoder()
	defer msgpack.PutDecoder(dec)
	dec.Reset(rd)
	n, err := dec.DecodeArrayLen()
	if err != nil {
		return fmt.Errorf("decode %T: %w", r, err)
	}
	if n < 1 {
		return fmt.Errorf("decode %T: empty record", r)
	}
	v, err := dec.DecodeInt64()
	if err != nil {
		return fmt.Errorf("decode %T: version: %w", r, err)
	}
	if v > Version {
		return fmt.Errorf("decode %T: version %d: %w", r, v, ErrNewerVersion)
	}
	if v < 1 {
		return fmt.Errorf("decode %T: version %d", r, v)
	}
	c := codec{dec: dec}
	c.inside(r, n-1)
	if c.err != nil {
		return fmt.Errorf("decode %T: %w", r, c.err)
	}
	if rd.Len() > 0 {
		return fmt.Errorf("decode %T: %d bytes after its end", r, rd.Len())
	}
	return nil
}
