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
		}, "or not of this job"},
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
		"the completed lines are changed": {func(t *testing.T, to Files) {
			edit(t, to.Manifest, func(s string) string { return strings.Replace(s, `"completed": 8`, `"completed": 9`, 1) })
		}, "there are 9 lines that ended ok, and elsewhere 8"},
		"the failed lines are changed": {func(t *testing.T, to Files) {
			edit(t, to.Manifest, func(s string) string {
				i := strings.Index(s, `"statistics"`)
				return s[:i] + strings.Replace(s[i:], `"failed": 3`, `"failed": 2`, 1)
			})
		}, "there are 2 lines that failed, and elsewhere 3"},
		"the lines of a model are changed": {func(t *testing.T, to Files) {
			edit(t, to.Manifest, func(s string) string {
				i := strings.Index(s, `"by_model"`)
				return s[:i] + strings.Replace(s[i:], `"ok": 8`, `"ok": 7`, 1)
			})
		}, "there are 7 lines of all models that ended ok, and elsewhere 8"},
		"the output tokens are changed": {func(t *testing.T, to Files) {
			edit(t, to.Manifest, func(s string) string {
				return strings.ReplaceAll(s, `"total_output_tokens": `, `"total_output_tokens": 9`)
			})
		}, "completion tokens, the results"},
		"the input tokens of a model are changed": {func(t *testing.T, to Files) {
			edit(t, to.Manifest, func(s string) string {
				i := strings.LastIndex(s, `"by_model"`)
				return s[:i] + strings.Replace(s[i:], `"total_input_tokens": `, `"total_input_tokens": 9`, 1)
			})
		}, "input tokens of all models"},
		"a failure is changed": {func(t *testing.T, to Files) {
			edit(t, to.Manifest, func(s string) string { return strings.Replace(s, `"count": 3`, `"count": 4`, 1) })
		}, "failures by their kind"},
		"an answer is in the errors": {func(t *testing.T, to Files) {
			line := firstLine(string(read(t, to.Output)))
			edit(t, to.Output, func(s string) string { return s[len(line):] })
			edit(t, to.Errors, func(s string) string { return s + line })
		}, "the line is the answer of an engine"},
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

// Engines that count otherwise than their bodies say are no reason, as long as the manifest says so.
func TestVerifyKnowsWhatWasNoted(t *testing.T) {
	odd := good("j", 0, 1)
	odd.Usage.Completion++
	s, _ := folded(t, t.TempDir(), 1, odd)
	save(t, s)
	to := filesIn(t.TempDir())
	finish(t, newFinisher(s, to))
	m, reasons, err := Verify(to.Manifest)
	if err != nil || len(reasons) > 0 || len(m.Notes) != 1 {
		t.Fatalf("%v %v %v", m.Notes, reasons, err)
	}
	edit(t, to.Manifest, func(s string) string {
		return strings.ReplaceAll(s, `"total_output_tokens": 102`, `"total_output_tokens": 103`)
	})
	if _, reasons, err := Verify(to.Manifest); err != nil || len(reasons) != 1 {
		t.Errorf("%v %v", reasons, err)
	}
}

// A failed line of an engine that answered 200 is no answer in the error file.
func TestFailedAnswerIsValid(t *testing.T) {
	r := good("j", 0, 1)
	r.OK, r.Code, r.Message, r.Body = false, proto.CodeBadResponse, "the body is not whole", []byte(`{"choices":[`)
	s, _ := folded(t, t.TempDir(), 1, r)
	save(t, s)
	to := filesIn(t.TempDir())
	finish(t, newFinisher(s, to))
	if _, reasons, err := Verify(to.Manifest); err != nil || len(reasons) > 0 {
		t.Errorf("%v %v", reasons, err)
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
