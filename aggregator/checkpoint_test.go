package aggregator

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"millrace/proto"
)

func someCheckpoint() *checkpoint {
	return &checkpoint{
		position: position{Stream: 1754000000123456789, Seq: 77, Time: 1754000000223456789},
		High:     position{Stream: 1754000000123456789, Seq: 99, Time: 1754000000323456789},
		Jobs: []jobMark{
			{ID: "a-1", Length: 1234, First: 3, Drops: dropped{Duplicates: 2, Wasted: proto.Usage{Counted: true, Prompt: 9}, Late: 1,
				Models: losses{"m": {Duplicates: 2, Wasted: proto.Usage{Counted: true, Prompt: 9}}}}},
			{ID: "b_2"},
		},
	}
}

func TestCheckpointRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "checkpoint")
	if _, err := readCheckpoint(path); !errors.Is(err, errNoCheckpoint) {
		t.Fatalf("no file: %v", err)
	}
	for range 2 {
		if err := writeCheckpoint(path, someCheckpoint()); err != nil {
			t.Fatal(err)
		}
	}
	got, err := readCheckpoint(path)
	if err != nil || !reflect.DeepEqual(got, someCheckpoint()) {
		t.Fatalf("%+v %v", got, err)
	}
	if names, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*")); len(names) != 1 {
		t.Errorf("files left: %v", names)
	}
}

func TestCheckpointNoticesEveryFlippedBit(t *testing.T) {
	b, err := someCheckpoint().encode()
	if err != nil {
		t.Fatal(err)
	}
	for n := range b {
		c := bytes.Clone(b)
		c[n] ^= 1
		if _, err := parseCheckpoint(c); !errors.Is(err, errNoCheckpoint) {
			t.Fatalf("flipped bit at %d: %v", n, err)
		}
		if _, err := parseCheckpoint(b[:n]); !errors.Is(err, errNoCheckpoint) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
}

func TestCheckpointRefusesNamesThatLeaveItsFolder(t *testing.T) {
	for _, id := range []string{"", "..", "a/b", "a.b", "ü", "a b", string(bytes.Repeat([]byte("x"), 201))} {
		c := &checkpoint{Jobs: []jobMark{{ID: id}}}
		b, err := c.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseCheckpoint(b); err == nil {
			t.Errorf("%q was taken", id)
		}
	}
}

func TestCheckpointInAFolderThatIsGone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	if err := writeCheckpoint(filepath.Join(dir, "checkpoint"), someCheckpoint()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func FuzzCheckpoint(f *testing.F) {
	b, err := someCheckpoint().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(checkpointMagic + "00000000\n"))
	f.Add([]byte(checkpointMagic + "e3069283\n123456789")) // the CRC is right, the JSON is not a checkpoint
	f.Add([]byte{})
	f.Add([]byte(`{"seq":1,"jobs":[{"id":"x","length":-1}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parseCheckpoint(b)
		if err != nil { // a CRC that is right leads further
			c, err = parseCheckpoint(append(fmt.Appendf(nil, "%s%08x\n", checkpointMagic, crc32.Checksum(b, castagnoli)), b...))
		}
		if err != nil {
			return
		}
		again, err := c.encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := parseCheckpoint(again)
		if err != nil || !reflect.DeepEqual(c, back) {
			t.Fatalf("%+v became %+v: %v", c, back, err)
		}
	})
}
