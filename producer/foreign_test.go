package producer

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

// TestNotJSONL: an input that is something else is refused in one sentence at its beginning; one of which a line is JSON or
// may be, or of which many begin so, has its lines told one by one.
func TestNotJSONL(t *testing.T) {
	noise := strings.Repeat("PK\x03\x04\x00\x00\n\x8f{\x00z\n", 50)
	const pretty = "{\n  \"custom_id\": \"a\",\n  \"body\": {}\n}"
	const array, several = "it is a JSON array; give a file with one JSON object a line, which `jq -c '.[]' FILE > FILE.jsonl` makes of it", "its JSON objects go over several lines; give a file with one JSON object a line, which `jq -c . FILE > FILE.jsonl` makes"
	prose := strings.Repeat("a word, and another\n", 100)
	for name, c := range map[string]struct {
		text, want string // of the error; empty: it is an *InvalidInput
	}{
		"binary":             {noise + strings.Repeat("{}\n", 1000), "none of its first 100 lines is a JSON object, and there are NUL bytes: it is binary, or no UTF-8; give"},
		"binary, by chance":  {"{\x00\x01\n" + noise, "none of its first 100 lines is"},
		"binary, and short":  {"PK\x03\x04\x00\x00\n\x8f\x00z", "none of its first 2 lines is"},
		"prose":              {prose, "none of its first 100 lines is a JSON object; give"},
		"short":              {"a word\n", ""},
		"one line is valid":  {prose[:len(prose)/2] + line("a", "m", "x") + "\n" + prose, ""},
		"one is an object":   {"{\"a\":1}\n" + prose, ""},
		"one is too long":    {"{" + strings.Repeat(" ", 9<<20) + "\n" + prose, ""},
		"all begin as JSON":  {strings.Repeat("{\n", 200), ""},
		"a NUL in one":       {"{\"custom_id\":\"\x00\"}\n", ""},
		"a document of JSON": {"[\n" + strings.Repeat("  {\n", 150) + "]\n", ""}, // a broken one
		"an array":           {"[\n" + strings.Repeat(line("a", "m", "x")+",\n", 3) + line("b", "m", "x") + "\n]\n", array},
		"an array on a line": {"\ufeff [" + line("a", "m", "x") + "," + line("b", "m", "x") + "]\n", array},
		"a pretty array":     {"\t[\n" + pretty + ",\n" + pretty + "]\n", array},
		"a pretty object":    {pretty + "\n", several},
		"pretty objects":     {"\ufeff" + strings.Repeat(pretty+"\r\n", 50), several},
		"one over two lines": {strings.Replace(line("a", "m", "x"), ",", ",\n", 1) + "\n" + line("b", "m", "x") + "\n" + line("c", "m", "x") + "\n", ""},
		"one, then no JSON":  {pretty + "\n" + "a word\n", ""},
		"an array later":     {line("a", "m", "x") + "\n[\n" + pretty + "]\n", ""},
		"an array of others": {"[1,\n2]\n", ""},
		"one that is cut":    {pretty[:len(pretty)-1], ""},
	} {
		t.Run(name, func(t *testing.T) {
			in := Input{Path: file(t, c.text), Dir: t.TempDir()}
			_, err := Scan(t.Context(), in, nil)
			var other *BadFile
			if is := errors.As(err, &other); is != (c.want != "") || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			if left, _ := filepath.Glob(filepath.Join(in.Dir, "*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			in.SkipInvalid = true
			d, err := Scan(t.Context(), in, nil)
			if err != nil {
				t.Fatalf("with lines that end as errors: %v", err)
			}
			if n := int64(strings.Count(strings.TrimSuffix(c.text, "\n"), "\n") + 1); d.Lines != n {
				t.Errorf("%d lines, want %d", d.Lines, n)
			}
			d.Close()
		})
	}
}

// TestNotJSONLUnpacked: what makes lines of an input is said as it fits the way in which that comes.
func TestNotJSONLUnpacked(t *testing.T) {
	const pretty = "{\n \"custom_id\": \"a\"\n}\n"
	for _, c := range []struct {
		stdin      bool
		text, want string
	}{
		{false, pretty, "`jq -c . FILE > FILE.jsonl`"}, {false, string(pack(t, "gz", pretty)), "`gzip -dc FILE | jq -c . > FILE.jsonl`"},
		{false, string(pack(t, "zst", "["+pretty+"]")), "`zstd -dc FILE | jq -c '.[]' > FILE.jsonl`"},
		{true, pretty, "`jq -c .`"}, {true, string(pack(t, "gz", pretty)), "`gzip -dc | jq -c .`"},
	} {
		in := Input{Path: "-", Stdin: strings.NewReader(c.text), Dir: t.TempDir()}
		if !c.stdin {
			in.Path = file(t, c.text)
		}
		if _, err := Scan(t.Context(), in, nil); err == nil || !strings.HasSuffix(err.Error(), ", which "+c.want+" makes of it") {
			t.Errorf("error %v, want %q", err, c.want)
		}
	}
}
