package producer

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestBadFiles: an input that cannot be unpacked is said by its name, with where and what to do, and without our folders.
func TestBadFiles(t *testing.T) {
	text := linesOf(2000, "m")
	cut := func(how string) string { b := pack(t, how, text); return string(b[:len(b)-10]) }
	flip := func(how string) string {
		b := pack(t, how, text)
		b[len(b)/2] ^= 0xff
		return string(b)
	}
	for name, c := range map[string]struct{ content, want string }{
		"cut.jsonl.gz":     {cut("gz"), "the gzip data ends too early, after "},
		"cut.jsonl.zst":    {cut("zst"), "the zstd data ends too early, after "},
		"flipped.jsonl.gz": {flip("gz"), "the gzip data is damaged, found after "},
		"flipped.zst":      {flip("zst"), "the zstd data is damaged, found after "},
		"head.gz":          {string(pack(t, "gz", text)[:7]), "the gzip data cannot be read"},
		"tail.gz":          {string(pack(t, "gz", text)) + "some other text, longer", "after 2,000 whole lines the gzip data ends, and something else follows it in the file; cut that off, or make the file again"},
		"shorttail.gz":     {string(pack(t, "gz", text)) + "abc", "after 2,000 whole lines the gzip data ends, and something else follows it"},
		"onebyte.gz":       {string(pack(t, "gz", text)) + "\n", "after 2,000 whole lines the gzip data ends, and something else follows it"},
		"zeros.gz":         {string(pack(t, "gz", text)) + strings.Repeat("\x00", 512), "after 2,000 whole lines the gzip data ends, and something else follows it"},
		"tail.zst":         {string(pack(t, "zst", text)) + "some other text, longer", "after 2,000 whole lines the zstd data ends, and something else follows it"},
		"secondhead.gz":    {string(pack(t, "gz", text)) + string(pack(t, "gz", text)[:5]), "the gzip data ends too early, after 2,000 whole lines"},
		"secondcut.gz":     {string(pack(t, "gz", text)) + cut("gz"), "the gzip data ends too early, after "},
		"wide.zst":         {wide(text[:1000], 31), "the zstd data needs more than 256 MB of memory to be unpacked, as after `zstd --long=31`; unpack it yourself (zstd -d --long=31)"},
		"wider.zst":        {wide(text[:1000], 29), "the zstd data needs more than 256 MB"},
		"other.gz":         {"BZh91AY", "by its name it is gzip, by its content it is not"},
		"other.zst":        {"<html>", "by its name it is zstd, by its content it is not"},
	} {
		in := Input{Path: filepath.Join(t.TempDir(), name), Dir: t.TempDir()}
		if err := os.WriteFile(in.Path, []byte(c.content), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := Scan(t.Context(), in, nil)
		var bad *BadFile
		if !errors.As(err, &bad) || !strings.HasPrefix(err.Error(), in.Path+": "+c.want) || strings.Contains(err.Error(), in.Dir) {
			t.Errorf("%s: error %v, want %q", name, err, c.want)
		}
		if left, _ := filepath.Glob(filepath.Join(in.Dir, "*")); len(left) > 0 {
			t.Errorf("%s: left behind: %v", name, left)
		}
	}
	half := len(text) / 2 // in the middle of a line
	for name, content := range map[string]string{"two.gz": string(pack(t, "gz", text[:half])) + string(pack(t, "gz", text[half:])), "plain.gz": text, "bom.gz": "\xef\xbb\xbf" + text, "blank.zst": "\n\n\n\n" + text} {
		in := Input{Path: filepath.Join(t.TempDir(), name), Dir: t.TempDir()}
		if err := os.WriteFile(in.Path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if d := scanned(t, in); d.Lines != 2000 {
			t.Errorf("%s: %d lines", name, d.Lines)
		}
	}
}

// wide is text as zstd data of one plain block, whose head wants a window of 1 << log bytes.
func wide(text string, log int) string {
	block := uint32(len(text))<<3 | 1 // the last one
	return string(zstdMagic) + string([]byte{0, byte(log-10) << 3, byte(block), byte(block >> 8), byte(block >> 16)}) + text
}
