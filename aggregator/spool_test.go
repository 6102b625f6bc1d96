package aggregator

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"pgregory.net/rapid"
)

// readAll returns the records of a spool as a list, with the reader at its end.
func readAll(t *testing.T, b []byte) ([]Record, *SpoolReader) {
	t.Helper()
	rd := NewSpoolReader(bytes.NewReader(b), int64(len(b)))
	var out []Record
	for {
		r, err := rd.Next()
		if err == io.EOF {
			return out, rd
		}
		if err != nil {
			t.Fatal(err)
		}
		r.Data = bytes.Clone(r.Data)
		out = append(out, r)
	}
}

func spoolOf(n int) []byte {
	b := []byte(spoolMagic)
	for i := range n {
		b = appendRecord(b, Record{Index: int64(i), OK: i%3 != 0, Time: int64(1000 + i), Data: bytes.Repeat([]byte{byte(i)}, 10+i)})
	}
	return b
}

func TestSpoolWritesWhatItReads(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := &spool{path: filepath.Join(os.TempDir(), fmt.Sprintf("spool-test-%d", os.Getpid()))}
		defer os.Remove(s.path)
		defer s.close()
		var want []Record
		var at []int64
		for range rapid.IntRange(0, 20).Draw(t, "records") {
			r := Record{
				Index: rapid.Int64().Draw(t, "index"), OK: rapid.Bool().Draw(t, "ok"), Time: rapid.Int64().Draw(t, "time"),
				Data: rapid.SliceOfN(rapid.Byte(), 0, 9000).Draw(t, "data"),
			}
			want, at = append(want, r), append(at, s.append(r))
			if rapid.Bool().Draw(t, "flush") {
				if err := s.flush(); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i, off := range at {
			got, err := s.record(off)
			if err != nil || got.Index != want[i].Index || got.OK != want[i].OK || got.Time != want[i].Time || !bytes.Equal(got.Data, want[i].Data) {
				t.Fatalf("record %d: %+v %v", i, got, err)
			}
		}
		if len(at) > 0 {
			if _, err := s.record(at[0] + 1); !errors.Is(err, errDamaged) {
				t.Fatalf("the middle of a record was read: %v", err)
			}
		}
		if _, err := s.record(s.size()); !errors.Is(err, errDamaged) && !errors.Is(err, os.ErrInvalid) {
			t.Fatalf("something behind the end was read: %v", err)
		}
	})
}

// A write that fails half way leaves the file longer than what counts; the next one must write over it.
func TestSpoolWritesOverATornEnd(t *testing.T) {
	s := &spool{path: filepath.Join(t.TempDir(), "spool")}
	defer s.close()
	s.append(Record{Index: 1, Data: []byte("one")})
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.file.WriteAt([]byte("half of a rec"), s.flushed); err != nil {
		t.Fatal(err)
	}
	s.append(Record{Index: 2, Data: []byte("two")})
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	got, rd := readAll(t, b[:s.size()])
	if len(got) != 2 || rd.Damaged() != 0 {
		t.Errorf("%d records, %d bytes damaged", len(got), rd.Damaged())
	}
}

func TestSpoolTornAnywhere(t *testing.T) {
	whole := spoolOf(5)
	all, _ := readAll(t, whole)
	for n := range len(whole) {
		got, rd := readAll(t, whole[:n])
		if len(got) > len(all) || !reflect.DeepEqual(append([]Record{}, got...), append([]Record{}, all[:len(got)]...)) {
			t.Fatalf("cut at %d: %d records that are not the first", n, len(got))
		}
		if rd.End() > int64(n) {
			t.Fatalf("cut at %d: the end is at %d", n, rd.End())
		}
	}
}

func TestSpoolLosesOnlyTheRecordOfAFlippedBit(t *testing.T) {
	whole := spoolOf(6)
	all, _ := readAll(t, whole)
	for n := range whole {
		b := bytes.Clone(whole)
		b[n] ^= 0x10
		got, rd := readAll(t, b)
		if rd.Damaged() == 0 && n >= len(spoolMagic) {
			t.Fatalf("a flipped bit at %d went unnoticed", n)
		}
		if len(got) < len(all)-1 {
			t.Fatalf("a flipped bit at %d cost %d records", n, len(all)-len(got))
		}
		k := 0
		for _, r := range got { // what is left is right, and in order
			for k < len(all) && !reflect.DeepEqual(all[k], r) {
				k++
			}
			if k == len(all) {
				t.Fatalf("a flipped bit at %d made a record up", n)
			}
		}
	}
}

func FuzzSpool(f *testing.F) {
	f.Add(spoolOf(3))
	f.Add(spoolOf(0))
	f.Add(spoolOf(3)[:40])
	f.Add([]byte{})
	f.Add([]byte(spoolMagic + recordMagic + "\xff\xff\xff\xff"))
	f.Add(append(spoolOf(1), spoolOf(2)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<16 {
			return
		}
		got, rd := readAll(t, b)
		if rd.End() > int64(len(b)) || rd.Damaged() < 0 {
			t.Fatalf("end %d, damaged %d of %d", rd.End(), rd.Damaged(), len(b))
		}
		again := []byte(spoolMagic)
		for _, r := range got {
			again = appendRecord(again, r)
		}
		back, rd := readAll(t, again)
		if len(back) != len(got) || rd.Damaged() != 0 {
			t.Fatalf("%d records became %d", len(got), len(back))
		}
	})
}
