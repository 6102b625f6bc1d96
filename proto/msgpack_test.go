package proto

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"github.com/vmihailenco/msgpack/v5"
)

// TestMsgpack holds what is written here, and what is read, against another program's msgpack.
func TestMsgpack(t *testing.T) {
	var theirs bytes.Buffer
	enc := msgpack.NewEncoder(&theirs)
	same := func(ours []byte, err error) {
		t.Helper()
		if err != nil || !bytes.Equal(ours, theirs.Bytes()) {
			t.Errorf("wrote %.20x, want %.20x (%v)", ours, theirs.Bytes(), err)
		}
		theirs.Reset()
	}
	for _, n := range edges() {
		same(appendInt(nil, n), enc.EncodeInt(n))
		for _, form := range []func() error{
			func() error { return enc.EncodeInt64(n) },
			func() error { return enc.EncodeInt32(int32(n)) },
			func() error { return enc.EncodeInt16(int16(n)) },
			func() error { return enc.EncodeInt8(int8(n)) },
			func() error { return enc.EncodeUint64(uint64(n)) },
			func() error { return enc.EncodeUint32(uint32(n)) },
			func() error { return enc.EncodeUint16(uint16(n)) },
			func() error { return enc.EncodeUint8(uint8(n)) },
		} {
			if err := form(); err != nil {
				t.Fatal(err)
			}
			want, err := msgpack.NewDecoder(bytes.NewReader(theirs.Bytes())).DecodeInt64()
			r := reader{b: theirs.Bytes()}
			if got := r.int(); got != want || r.err != nil || err != nil || len(r.b) > 0 {
				t.Errorf("%x read as %d, want %d (%v)", theirs.Bytes(), got, want, r.err)
			}
			theirs.Reset()
		}
	}
	for _, n := range []int{0, 1, 15, 16, 31, 32, 255, 256, 65535, 65536} {
		s := strings.Repeat("x", n)
		same(appendString(nil, s), enc.EncodeString(s))
		same(appendBytes(nil, []byte(s)), enc.EncodeBytes([]byte(s)))
		same(appendArray(nil, n), enc.EncodeArrayLen(n))
		for _, b := range [][]byte{appendString(nil, s), appendBytes(nil, []byte(s))} {
			r := reader{b: b}
			if got := r.bytes(); string(got) != s || r.err != nil {
				t.Errorf("a text of %d bytes is read as one of %d (%v)", n, len(got), r.err)
			}
		}
		r := reader{b: appendArray(nil, n)}
		if got := r.array(); got != n || r.err != nil {
			t.Errorf("a list of %d is read as one of %d (%v)", n, got, r.err)
		}
	}
	for _, v := range []float64{0, -1.5, math.Inf(1), math.MaxFloat64} {
		same(appendFloat(nil, v), enc.EncodeFloat64(v))
	}
	same(appendBool(nil, true), enc.EncodeBool(true))
	same(appendBool(nil, false), enc.EncodeBool(false))
	same(appendBytes(nil, nil), enc.EncodeNil())
	for b, want := range map[string]float64{"\xca\x3f\xc0\x00\x00": 1.5, "\xcb\xbf\xf8\x00\x00\x00\x00\x00\x00": -1.5, "\xd0\x80": -128, "\xc0": 0} {
		r := reader{b: []byte(b)}
		if got := r.float(); got != want || r.err != nil {
			t.Errorf("%x read as %v, want %v (%v)", b, got, want, r.err)
		}
	}
}

func edges() []int64 {
	out := []int64{0, 1, -1, -32, -33, math.MaxInt64, math.MinInt64}
	for bits := 7; bits < 64; bits++ {
		out = append(out, 1<<bits-1, 1<<bits, -1<<bits, -1<<bits-1)
	}
	return out
}

// TestDeep: lists in lists in lists cost no stack.
func TestDeep(t *testing.T) {
	b := append([]byte("\x93\x01\xa3run"), strings.Repeat("\x91", MaxPayload)...)
	if err := new(Owner).Decode(append(b, codeNil)); err == nil {
		t.Error("a list is read as a text")
	}
	r := reader{b: append(b[6:], codeNil)}
	if r.skip(); r.err != nil || len(r.b) > 0 {
		t.Errorf("%d bytes left, %v", len(r.b), r.err)
	}
}

// FuzzSkip: what is passed over is what another program passes over.
func FuzzSkip(f *testing.F) {
	for _, r := range goldenRecords() {
		b, err := encode(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	for _, v := range []any{map[string]any{"k": []any{nil, true, 1.5}}, float32(1), make([]any, 20), strings.Repeat("x", 300)} {
		b, err := msgpack.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	for _, b := range []string{"\xc7\x02\x01ab", "\xd8\x010123456789abcdef", "\xdd\x00\x00\x00\x02\x01\x02", "\xdf\x00\x00\x00\x01\x01\x02", "\xc1"} {
		f.Add([]byte(b))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		theirs := bytes.NewReader(b)
		err := msgpack.NewDecoder(theirs).Skip()
		r := reader{b: b}
		if r.skip(); (r.err == nil) != (err == nil) || err == nil && len(r.b) != theirs.Len() {
			t.Fatalf("%x: %d bytes left (%v), want %d (%v)", b, len(r.b), r.err, theirs.Len(), err)
		}
	})
}
