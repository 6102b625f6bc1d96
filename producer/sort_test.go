package producer

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"
)

// TestSorter: the sorter does what slices.SortFunc does, however much of it goes through the disk.
func TestSorter(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		s := sorter{dir: dir, limit: rapid.IntRange(1, 50).Draw(t, "limit")}
		want := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) entry {
			return entry{key: rapid.Uint64Range(0, 20).Draw(t, "key"), index: rapid.Uint32().Draw(t, "index"), group: rapid.Uint32Range(0, 2).Draw(t, "group")}
		}), 0, 300).Draw(t, "entries")
		for _, e := range want {
			if err := s.add(e); err != nil {
				t.Fatal(err)
			}
		}
		var got []entry
		if err := s.each(func(e entry) error { got = append(got, e); return nil }); err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(want, entry.compare)
		if !slices.Equal(got, want) {
			t.Fatalf("sorted\n%v, want\n%v", got, want)
		}
	})
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestSplitter: whatever the reads and the limits are, the splitter finds the lines that bytes.Split finds.
func TestSplitter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		lines := rapid.SliceOfN(rapid.StringMatching(`(\xef\xbb\xbf)?[ab \t]{0,12}\r?`), 0, 30).Draw(t, "lines")
		text := strings.Join(lines, "\n")
		most := rapid.IntRange(1, 20).Draw(t, "most")
		limit := rapid.Int64Range(0, 10).Draw(t, "limit")
		s := splitter{src: iotest.OneByteReader(strings.NewReader(text)), sum: sha256.New(), most: most, limit: limit}
		got := ""
		var b block
		for {
			err := s.next(&b)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, sp := range b.spans {
				if sp.to > 0 && string(b.data[sp.from:sp.to]) != text[sp.offset:sp.offset+sp.size] {
					t.Fatalf("span %+v is %q", sp, b.data[sp.from:sp.to])
				}
				if (sp.to == 0) != (sp.size > int64(most)) {
					t.Fatalf("span %+v, most %d", sp, most)
				}
				got += fmt.Sprintf("%d:%d+%d ", sp.line, sp.offset, sp.size)
			}
		}
		want, used := simpleSplit(text, limit)
		if got != want {
			t.Fatalf("lines\n%s, want\n%s", got, want)
		}
		if s.at != used || !bytes.Equal(s.sum.Sum(nil), sum([]byte(text[:used]))) {
			t.Fatalf("hashed %d bytes, want %d", s.at, used)
		}
	})
}

func sum(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}

func simpleSplit(text string, limit int64) (out string, used int64) {
	at, taken := 0, int64(0)
	for i, l := range strings.SplitAfter(text, "\n") {
		if limit > 0 && taken == limit {
			return out, int64(at)
		}
		from, l2 := at, strings.TrimSuffix(strings.TrimSuffix(l, "\n"), "\r")
		if i == 0 && strings.HasPrefix(l2, "\xef\xbb\xbf") {
			l2, from = l2[3:], from+3
		}
		at += len(l)
		if strings.Trim(l2, " \t\r") != "" {
			out += fmt.Sprintf("%d:%d+%d ", i+1, from, len(l2))
			taken++
		}
	}
	return out, int64(at)
}

func TestBitset(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const n = 300
		var b bitset
		want := map[int64]bool{}
		for range rapid.IntRange(0, 5).Draw(t, "ranges") {
			from := rapid.Int64Range(0, n).Draw(t, "from")
			to := rapid.Int64Range(from, n).Draw(t, "to")
			b.fill(from, to, n)
			for i := from; i < to; i++ {
				want[i] = true
			}
		}
		got := int64(0)
		for i := range b.all {
			if !want[i] || !b.has(i) {
				t.Fatalf("%d is in the set", i)
			}
			got++
		}
		if got != int64(len(want)) || b.count() != got {
			t.Fatalf("%d in the set, count %d, want %d", got, b.count(), len(want))
		}
	})
}

func TestCommas(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", -1234567: "-1,234,567", -123: "-123", 8388608: "8,388,608"} {
		if got := commas(n); got != want {
			t.Errorf("%d: %s", n, got)
		}
	}
}

func TestThreshold(t *testing.T) {
	for _, c := range []struct {
		s             string
		failed, ended int64
		want          bool
	}{
		{"", 1000, 1000, false}, {"0", 0, 5, false}, {"0", 1, 1, true}, {"5", 5, 5, false}, {"5", 6, 6, true},
		{"10%", 99, 99, false}, {"10%", 10, 100, false}, {"10%", 11, 100, true}, {"0%", 1, 100, true}, {"0.5%", 6, 1000, true},
	} {
		th, err := parseThreshold(c.s)
		if err != nil || th.reached(c.failed, c.ended) != c.want {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
