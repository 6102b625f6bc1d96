package proto

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// The part of msgpack that records are made of. Every value is written in its shortest form, and read in any that can
// hold it; nil reads as zero. Source: https://github.com/msgpack/msgpack/blob/master/spec.md.
const (
	codeNil     = 0xc0
	codeFalse   = 0xc2
	codeTrue    = 0xc3
	codeBin8    = 0xc4
	codeBin32   = 0xc6
	codeExt8    = 0xc7
	codeExt32   = 0xc9
	codeFloat32 = 0xca
	codeFloat64 = 0xcb
	codeUint8   = 0xcc
	codeUint64  = 0xcf
	codeInt8    = 0xd0
	codeInt64   = 0xd3
	codeFixExt1 = 0xd4
	codeFixExt  = 0xd8 // the longest, of 16 bytes
	codeStr8    = 0xd9
	codeStr32   = 0xdb
	codeArray16 = 0xdc
	codeArray32 = 0xdd
	codeMap16   = 0xde
	codeMap32   = 0xdf
	fixMap      = 0x80 // … to 0x8f, with the length
	fixArray    = 0x90 // … to 0x9f
	fixStr      = 0xa0 // … to 0xbf
	negative    = 0xe0 // … to 0xff: -32 to -1
)

// maxHead is the longest that stands before a value's own bytes, and maxNumber the longest number.
const (
	maxHead   = 5
	maxNumber = 9
)

func appendUint(b []byte, n uint64) []byte {
	switch {
	case n < 0x80:
		return append(b, byte(n))
	case n <= math.MaxUint8:
		return append(b, codeUint8, byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, codeUint8+1), uint16(n))
	case n <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(b, codeUint8+2), uint32(n))
	}
	return binary.BigEndian.AppendUint64(append(b, codeUint64), n)
}

func appendInt(b []byte, n int64) []byte {
	switch {
	case n >= 0:
		return appendUint(b, uint64(n))
	case n >= -0x20:
		return append(b, byte(n))
	case n >= math.MinInt8:
		return append(b, codeInt8, byte(n))
	case n >= math.MinInt16:
		return binary.BigEndian.AppendUint16(append(b, codeInt8+1), uint16(n))
	case n >= math.MinInt32:
		return binary.BigEndian.AppendUint32(append(b, codeInt8+2), uint32(n))
	}
	return binary.BigEndian.AppendUint64(append(b, codeInt64), uint64(n))
}

// appendLen writes the length of what has forms for 8, 16 and 32 bits, beginning with code.
func appendLen(b []byte, code byte, n int) []byte {
	switch {
	case n <= math.MaxUint8:
		return append(b, code, byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, code+1), uint16(n))
	}
	return binary.BigEndian.AppendUint32(append(b, code+2), uint32(n))
}

func appendString(b []byte, s string) []byte {
	if len(s) < 0x20 {
		b = append(b, fixStr|byte(len(s)))
	} else {
		b = appendLen(b, codeStr8, len(s))
	}
	return append(b, s...)
}

func appendBytes(b, v []byte) []byte {
	if v == nil {
		return append(b, codeNil)
	}
	return append(appendLen(b, codeBin8, len(v)), v...)
}

func appendBool(b []byte, v bool) []byte {
	if v {
		return append(b, codeTrue)
	}
	return append(b, codeFalse)
}

func appendFloat(b []byte, v float64) []byte {
	return binary.BigEndian.AppendUint64(append(b, codeFloat64), math.Float64bits(v))
}

func appendArray(b []byte, n int) []byte {
	switch {
	case n < 0x10:
		return append(b, fixArray|byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, codeArray16), uint16(n))
	}
	return binary.BigEndian.AppendUint32(append(b, codeArray32), uint32(n))
}

var errCut = errors.New("it ends too early")

// reader takes values off the front of a text. After the first error, which sticks, it returns zeros.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.b = nil
}

// take returns the next n bytes, or none.
func (r *reader) take(n uint64) []byte {
	if n > uint64(len(r.b)) {
		r.fail(errCut)
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) code() byte {
	if len(r.b) == 0 {
		r.fail(errCut)
		return codeNil
	}
	c := r.b[0]
	r.b = r.b[1:]
	return c
}

// number reads a big-endian number of 1 << log bytes.
func (r *reader) number(log byte) uint64 {
	b := r.take(1 << log)
	switch len(b) {
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(binary.BigEndian.Uint16(b))
	case 4:
		return uint64(binary.BigEndian.Uint32(b))
	case 8:
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) int() int64 { return r.intOf(r.code()) }

func (r *reader) intOf(c byte) int64 {
	switch {
	case c < fixMap || c >= negative:
		return int64(int8(c))
	case c == codeNil:
		return 0
	case c >= codeUint8 && c <= codeUint64:
		return int64(r.number(c - codeUint8))
	case c >= codeInt8 && c <= codeInt64:
		n := r.number(c - codeInt8)
		unused := 64 - 8<<(c-codeInt8)
		return int64(n<<unused) >> unused
	}
	r.wrong(c, "a number")
	return 0
}

func (r *reader) float() float64 {
	switch c := r.code(); c {
	case codeFloat32:
		return float64(math.Float32frombits(uint32(r.number(2))))
	case codeFloat64:
		return math.Float64frombits(r.number(3))
	default:
		return float64(r.intOf(c))
	}
}

func (r *reader) bool() bool {
	switch c := r.code(); c {
	case codeTrue:
		return true
	case codeFalse, codeNil:
	default:
		r.wrong(c, "true or false")
	}
	return false
}

// bytes reads a text or bytes. They are a part of what is read, or nil.
func (r *reader) bytes() []byte {
	switch c := r.code(); {
	case c >= fixStr && c < codeNil:
		return r.take(uint64(c - fixStr))
	case c >= codeStr8 && c <= codeStr32:
		return r.take(r.number(c - codeStr8))
	case c >= codeBin8 && c <= codeBin32:
		return r.take(r.number(c - codeBin8))
	case c != codeNil:
		r.wrong(c, "a text")
	}
	return nil
}

// array reads how many elements follow.
func (r *reader) array() int {
	switch c := r.code(); {
	case c >= fixArray && c < fixStr:
		return int(c - fixArray)
	case c == codeArray16, c == codeArray32:
		return int(r.number(1 + c - codeArray16))
	case c != codeNil:
		r.wrong(c, "a list")
	}
	return 0
}

// skip passes over a value, whatever it is.
func (r *reader) skip() {
	for left := uint64(1); left > 0 && r.err == nil; left-- {
		switch c := r.code(); {
		case c < fixMap, c >= negative, c == codeNil, c == codeFalse, c == codeTrue:
		case c < fixArray:
			left += 2 * uint64(c-fixMap)
		case c < fixStr:
			left += uint64(c - fixArray)
		case c < codeNil:
			r.take(uint64(c - fixStr))
		case c >= codeBin8 && c <= codeBin32:
			r.take(r.number(c - codeBin8))
		case c >= codeExt8 && c <= codeExt32:
			r.take(r.number(c-codeExt8) + 1)
		case c == codeFloat32, c == codeFloat64:
			r.number(2 + c - codeFloat32)
		case c >= codeUint8 && c <= codeUint64:
			r.number(c - codeUint8)
		case c >= codeInt8 && c <= codeInt64:
			r.number(c - codeInt8)
		case c >= codeFixExt1 && c <= codeFixExt:
			r.take(1<<(c-codeFixExt1) + 1)
		case c >= codeStr8 && c <= codeStr32:
			r.take(r.number(c - codeStr8))
		case c == codeArray16, c == codeArray32:
			left += r.number(1 + c - codeArray16)
		case c == codeMap16, c == codeMap32:
			left += 2 * r.number(1+c-codeMap16)
		default:
			r.wrong(c, "anything")
		}
	}
}

func (r *reader) wrong(c byte, what string) { r.fail(fmt.Errorf("%#02x does not begin %s", c, what)) }
