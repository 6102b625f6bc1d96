package aggregator

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"millrace/proto"
)

// edit rewrites a file.
func edit(t *testing.T, path string, change func(string) string) {
	t.Helper()
	b := read(t, path)
	if err := os.WriteFile(path, []byte(change(string(b))), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestVerifyNoticesEveryTampering(t *testing.T) {
	firstLine := func(s string) string { return s[:strings.IndexByte(s, '\n')+1] }
	for name, c := range map[string]struct {
		harm func(t *testing.T, to Files)
		want string
	}{
		"a line is gone": {func(t *testing.T, to Files) {
			edit(t, to.Output, func(s string) string { return s[len(firstLine(s)):] })
		}, "the line with index 1 of the input is missing"},
		"a line is there twice": {func(t *testing.T, to Files) {
			edit(t, to.Output, func(s string) string { return s + firstLine(s) })
		}, `custom_id "id-1" is there 2 times`},
		"a line is in both files": {func(t *testing.T, to Files) {
			line := firstLine(string(read(t, to.Output)))
			edit(t, to.Errors, func(s string) string { return s + line })
		}, `custom_id "id-1" is there 2 times`},
		"a line of another job": {func(t *testing.T, to Files) {
			edit(t, to.Output, func(s string) string {
				return string(proto.AppendLine(nil, good("k", 1, 1))) + s[len(firstLine(s)):]
			})
		}, "are not of this job"},
		"two custom_ids are swapped with one": {func(t *testing.T, to Files) {
			edit(t, to.Output, func(s string) string { return strings.Replace(s, `"id-2"`, `"id-1"`, 1) })
		}, `custom_id "id-1" is there 2 times`},
		"tokens are changed": {func(t *testing.T, to Files) {
			edit(t, to.Output, func(s string) string { return strings.Replace(s, `"prompt_tokens":11`, `"prompt_tokens":99`, 1) })
		}, "prompt tokens, the manifest says"},
		"a letter is changed": {func(t *testing.T, to Files) {
			edit(t, to.Output, func(s string) string { return strings.Replace(s, "answer", "Answer", 1) })
		}, "its SHA-256 is"},
		"the end is cut off": {func(t *testing.T, to Files) {
			edit(t, to.Output, func(s string) string { return s[:len(s)-1] })
		}, "the last line is cut off"},
		"a line is not JSON": {func(t *testing.T, to Files) {
			edit(t, to.Errors, func(s string) string { return "{" + s })
		}, "errors.jsonl:1:"},
		"an error is in the output": {func(t *testing.T, to Files) {
			line := firstLine(string(read(t, to.Errors)))
			edit(t, to.Output, func(s string) string { return s + line })
		}, "the line is no answer of an engine"},
		"a file is gone": {func(t *testing.T, to Files) {
			if err := os.Remove(to.Errors); err != nil {
				t.Fatal(err)
			}
		}, "errors.jsonl"},
		"the counts are changed": {func(t *testing.T, to Files) {
			edit(t, to.Manifest, func(s string) string { return strings.Replace(s, `"ok": 8`, `"ok": 9`, 1) })
		}, "9 lines ended ok, the output file has 8"},
		"the verdict is changed": {func(t *testing.T, to Files) {
			edit(t, to.Manifest, func(s string) string { return strings.Replace(s, `"valid": true`, `"valid": false`, 1) })
		}, "the manifest itself says"},
	} {
		t.Run(name, func(t *testing.T) {
			_, f, to := finished(t, 11)
			finish(t, f)
			c.harm(t, to)
			m, reasons, err := Verify(to.Manifest)
			if err != nil || m == nil {
				t.Fatal(err)
			}
			if all := strings.Join(reasons, "\n"); !strings.Contains(all, c.want) {
				t.Errorf("want %q in:\n%s", c.want, all)
			}
		})
	}
}

func TestVerifyWithoutAManifest(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := Verify(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	for _, text := range []string{"", "{}", "[]", `{"schema":2}`} {
		path := filepath.Join(dir, "m.json")
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Verify(path); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}

func TestVerifyFindsFilesBesideTheManifest(t *testing.T) {
	_, f, to := finished(t, 11)
	finish(t, f)
	moved := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.Rename(filepath.Dir(to.Output), moved); err != nil {
		t.Fatal(err)
	}
	if _, reasons, err := Verify(filepath.Join(moved, "manifest.json")); err != nil || len(reasons) > 0 {
		t.Errorf("%v %v", reasons, err)
	}
}
