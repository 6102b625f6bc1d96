package aggregator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// finished makes a whole job of n lines (every fifth an error), in a scrambled order, and writes its files.
func finished(t *testing.T, n int64) (*state, *finisher, Files) {
	t.Helper()
	s, _ := folded(t, t.TempDir(), n)
	st := &stream{created: s.pos.Stream}
	for i := range n {
		k := (i*7 + 3) % n // 7 and n have no common divisor in these tests
		r := good("j", k, k)
		if k%5 == 0 {
			r = bad("j", k, proto.CodeEngineError)
		}
		if err := s.fold(st.add(t, r)); err != nil {
			t.Fatal(err)
		}
	}
	save(t, s)
	to := filesIn(filepath.Join(t.TempDir(), "out"))
	return s, newFinisher(s, to), to
}

func filesIn(dir string) Files {
	return Files{filepath.Join(dir, "output.jsonl"), filepath.Join(dir, "errors.jsonl"), filepath.Join(dir, "manifest.json")}
}

func newFinisher(s *state, to Files) *finisher {
	return &finisher{s: s, output: func(*proto.Job) Files { return to }, program: "v1", mine: holds, log: quiet(), retry: time.Hour, linger: time.Hour}
}

// holds is a lease that nobody takes.
func holds(context.Context) error { return nil }

func finish(t *testing.T, f *finisher) {
	t.Helper()
	for _, j := range f.s.finishable() {
		if err := f.one(context.Background(), j); err != nil {
			t.Fatal(err)
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ids(t *testing.T, path string) (out []string) {
	t.Helper()
	for line := range bytes.Lines(read(t, path)) {
		l, err := proto.ParseOutput(line)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, *l.CustomID)
	}
	return out
}

func TestFilesAreInInputOrder(t *testing.T) {
	s, f, to := finished(t, 11)
	finish(t, f)
	if got := fmt.Sprint(ids(t, to.Output)); got != "[id-1 id-2 id-3 id-4 id-6 id-7 id-8 id-9]" {
		t.Errorf("output: %s", got)
	}
	if got := fmt.Sprint(ids(t, to.Errors)); got != "[id-0 id-5 id-10]" {
		t.Errorf("errors: %s", got)
	}
	m, reasons, err := Verify(to.Manifest)
	if err != nil || len(reasons) > 0 || !m.Valid || m.Verdict != Valid {
		t.Fatalf("%v %v", reasons, err)
	}
	if m.Counts.OK != 8 || m.Counts.Failed != 3 || m.Input.Lines != 11 || len(m.Notes) > 0 || m.Millrace != "v1" {
		t.Errorf("%+v %v", m.Counts, m.Notes)
	}
	if m.Files.Output.PromptTokens != m.Statistics.InputTokens || m.Statistics.Attempts != 8+6 || m.FirstResult == nil {
		t.Errorf("%+v", m.Statistics.Figures)
	}
	j := s.job("j")
	p := j.progress(s.pos, "host", "")
	if p.State != proto.FoldDone || p.Verdict != Valid || p.Output != to.Output || p.OK != 8 || p.Failed != 3 {
		t.Errorf("%+v", p)
	}
	if _, err := os.Stat(j.spool.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the spool: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(to.Output), ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// More lines than are read at a time, so that batches meet.
func TestManyLines(t *testing.T) {
	_, f, to := finished(t, 3*batchLines+51)
	finish(t, f)
	if _, reasons, err := Verify(to.Manifest); err != nil || len(reasons) > 0 {
		t.Fatalf("%v %v", reasons, err)
	}
	n := 0
	for _, id := range ids(t, to.Output) {
		for n%5 == 0 {
			n++
		}
		if id != fmt.Sprintf("id-%d", n) {
			t.Fatalf("%s where id-%d belongs", id, n)
		}
		n++
	}
}

func TestJobWithoutLines(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 0)
	save(t, s)
	to := filesIn(t.TempDir())
	finish(t, newFinisher(s, to))
	m, reasons, err := Verify(to.Manifest)
	if err != nil || len(reasons) > 0 || m.Files.Errors.Lines != 0 || m.FirstResult != nil {
		t.Fatalf("%v %v", reasons, err)
	}
}

// Whatever instant a crash hits, the next start ends with the same bytes.
func TestFinishingTwiceMakesTheSameFiles(t *testing.T) {
	s, f, to := finished(t, 11)
	s.job("j").engines["w0"] = &proto.Worker{ID: "w0", Version: "0.11.0", KVTokens: 9}
	s.job("j").unsaved = true
	if err := s.job("j").saveAbout(s.job("j").about()); err != nil {
		t.Fatal(err)
	}
	crashed := t.TempDir()
	copyDir(t, s.dir, crashed) // as of before the files were written
	finish(t, f)
	want := [][]byte{read(t, to.Output), read(t, to.Errors), read(t, to.Manifest)}
	s2 := openTest(t, crashed)
	t.Cleanup(s2.close)
	if s2.job("j").state != proto.FoldWriting {
		t.Fatalf("state %s", s2.job("j").state)
	}
	for _, p := range []string{to.Errors, partName(to.Output, strings.Repeat("x", partID))} { // as if in the middle
		if err := os.WriteFile(p, []byte("rubbish that is longer than what belongs here"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	finish(t, newFinisher(s2, to))
	for i, got := range [][]byte{read(t, to.Output), read(t, to.Errors), read(t, to.Manifest)} {
		if !bytes.Equal(got, want[i]) {
			t.Errorf("file %d differs:\n%s\n%s", i, got, want[i])
		}
	}
	m, _, err := Verify(to.Manifest)
	if err != nil || len(m.Engines) != 1 || m.Engines[0].KVTokens != 9 {
		t.Errorf("%+v %v", m.Engines, err)
	}
}

func TestDoneSurvivesARestart(t *testing.T) {
	s, f, to := finished(t, 11)
	finish(t, f)
	st := &stream{created: s.pos.Stream, msgs: make([]message, s.pos.Seq)}
	if err := s.fold(st.add(t, good("j", 0, 9))); err != nil {
		t.Fatal(err)
	}
	save(t, s)
	if err := os.WriteFile(s.job("j").spool.path, nil, 0o644); err != nil { // the crash came before it was deleted
		t.Fatal(err)
	}
	s = reopen(t, s)
	j := s.job("j")
	if old, _ := s.aged(time.Now(), time.Hour, 0); len(old) > 0 {
		t.Error("the restart made it old")
	}
	if _, err := os.Stat(j.spool.path); err == nil {
		t.Error("the spool is still there")
	}
	p := j.progress(s.pos, "host", "")
	if p.State != proto.FoldDone || p.Late != 1 || p.Wasted.Completion != 109 || p.Manifest != to.Manifest {
		t.Errorf("%+v", p)
	}
	if len(s.finishable()) > 0 {
		t.Error("it is written again")
	}
	if a := s.missing(j, 0, 0); !a.Done || !a.Known || len(a.Ranges) > 0 {
		t.Errorf("%+v", a)
	}
}

func TestFolderThatCannotBeWritten(t *testing.T) {
	s, f, _ := finished(t, 11)
	dir := t.TempDir()
	blocked := filepath.Join(dir, "file")
	if err := os.WriteFile(blocked, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	to := filesIn(filepath.Join(blocked, "out")) // a file stands where the folder should be
	f.output = func(*proto.Job) Files { return to }
	j := s.job("j")
	if err := f.one(context.Background(), j); err == nil {
		t.Fatal("it was written")
	}
	p := j.progress(s.pos, "host", "")
	if p.State != proto.FoldWriting || !strings.HasPrefix(p.Note, "cannot write "+filepath.Dir(to.Output)) || !strings.HasSuffix(p.Note, "free space or fix permissions") {
		t.Errorf("%q", p.Note)
	}
	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	finish(t, f)
	if _, reasons, err := Verify(to.Manifest); err != nil || len(reasons) > 0 || j.note != "" {
		t.Errorf("%v %v %q", reasons, err, j.note)
	}
}

// A manifest that is there from before must not stand beside files that it does not speak of.
func TestOldManifestGoesFirst(t *testing.T) {
	s, f, to := finished(t, 11)
	if err := os.MkdirAll(filepath.Join(to.Errors, "in the way"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to.Manifest, []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := f.one(context.Background(), s.job("j")); err == nil {
		t.Fatal("it was written")
	}
	if _, err := os.Stat(to.Manifest); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old manifest: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(to.Output), ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestOnlyWhatIsOnDiskIsFinished(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 1, good("j", 0, 1))
	if len(s.finishable()) > 0 {
		t.Error("before the checkpoint")
	}
	save(t, s)
	if len(s.finishable()) != 1 {
		t.Error("after it")
	}
}

func TestDamagedSpoolIsNoticedWhenFinishing(t *testing.T) {
	s, f, to := finished(t, 11)
	j := s.job("j")
	flip(t, j.spool.path, j.at[1]+recordHeader+3)
	if err := f.one(context.Background(), j); !errors.Is(err, errReload) {
		t.Fatalf("%v", err)
	}
	if _, err := os.Stat(to.Output); err == nil {
		t.Error("an output file was written")
	}
	s = reopen(t, s)
	if a := s.missing(s.job("j"), 0, 0); fmt.Sprint(a.Ranges) != "[{1 2}]" {
		t.Errorf("%+v", a)
	}
}

func TestDeletedWhileFinishing(t *testing.T) {
	s, f, to := finished(t, 11)
	j := s.job("j")
	s.forget("j", 99)
	if err := f.one(context.Background(), j); err != nil {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(to.Manifest); err == nil {
		t.Error("a manifest was written")
	}
}

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

// A result with a custom_id that is another line's cannot be told from a right one while it is folded. The manifest
// must tell.
func TestMixedUpLinesAreInvalid(t *testing.T) {
	wrong := good("j", 1, 1)
	wrong.CustomID = "id-0"
	s, _ := folded(t, t.TempDir(), 2, good("j", 0, 0), wrong)
	save(t, s)
	to := filesIn(t.TempDir())
	finish(t, newFinisher(s, to))
	m, reasons, err := Verify(to.Manifest)
	if err != nil || m.Valid || m.Verdict != Invalid || len(reasons) == 0 {
		t.Errorf("%+v %v %v", m, reasons, err)
	}
	if p := s.job("j").finished; p.Verdict != `INVALID: custom_id "id-0" is there 2 times` {
		t.Errorf("%q", p.Verdict)
	}
}

func TestManifestKeys(t *testing.T) {
	_, f, to := finished(t, 11)
	finish(t, f)
	var got map[string]any
	if err := json.Unmarshal(read(t, to.Manifest), &got); err != nil {
		t.Fatal(err)
	}
	var keys []string
	for k := range got {
		keys = append(keys, k)
	}
	for _, k := range []string{"schema", "millrace", "verdict", "valid", "job", "input", "counts", "files", "statistics", "engines", "first_result", "last_result"} {
		if _, ok := got[k]; !ok {
			t.Errorf("%s is not among %v", k, keys)
		}
	}
	m, err := ReadManifest(to.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	b, err := m.encode()
	if err != nil || !reflect.DeepEqual(b, read(t, to.Manifest)) {
		t.Errorf("it is not what was written: %v", err)
	}
}

// The disk or another program changed a file before it was read back: that is no end of the job.
func TestFilesThatAreNotWhatWasWrittenAreWrittenAgain(t *testing.T) {
	s, f, to := finished(t, 11)
	f.mine = func(context.Context) error {
		parts, err := filepath.Glob(filepath.Join(filepath.Dir(to.Output), ".output.jsonl.*"))
		if err != nil || len(parts) != 1 {
			t.Fatalf("%v %v", parts, err)
		}
		edit(t, parts[0], func(s string) string { return strings.Replace(s, "answer", "Answer", 1) })
		return nil
	}
	j := s.job("j")
	if err := f.one(context.Background(), j); !errors.Is(err, errAltered) {
		t.Fatalf("%v", err)
	}
	if p := j.progress(s.pos, "host", ""); p.State != proto.FoldWriting || !strings.Contains(p.Note, to.Output) {
		t.Errorf("%+v", p)
	}
	if _, err := os.Stat(to.Manifest); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a manifest: %v", err)
	}
	f.mine = holds
	finish(t, f)
	if _, reasons, err := Verify(to.Manifest); err != nil || len(reasons) > 0 || j.finished == nil {
		t.Errorf("%v %v", reasons, err)
	}
}

func TestInvalidKeepsTheSpool(t *testing.T) {
	wrong := good("j", 1, 1)
	wrong.CustomID = "id-0"
	s, _ := folded(t, t.TempDir(), 2, good("j", 0, 0), wrong)
	save(t, s)
	finish(t, newFinisher(s, filesIn(t.TempDir())))
	if v := s.job("j").finished.Verdict; !strings.HasPrefix(v, Invalid) {
		t.Fatal(v)
	}
	s = reopen(t, s)
	if rs, _ := readAll(t, read(t, s.job("j").spool.path)); len(rs) != 2 {
		t.Errorf("%d results are left", len(rs))
	}
}

// Two aggregators with disks of their own and one output: the one that lost the lease in its sleep wakes up in the
// middle of writing, and leaves the other's files alone.
func TestLostLeaseLeavesTheFilesAlone(t *testing.T) {
	for name, when := range map[string]int{"before the files": 1, "before the manifest": 2} {
		t.Run(name, func(t *testing.T) {
			asleep, fa, to := finished(t, 11)
			_, fb, _ := finished(t, 11)
			fb.output = fa.output
			var want [][]byte
			fa.mine = func(context.Context) error {
				if when--; when > 0 {
					return nil
				}
				fb.program = "v2"
				finish(t, fb)
				want = [][]byte{read(t, to.Output), read(t, to.Errors), read(t, to.Manifest)}
				return broker.ErrLeaseLost
			}
			if err := fa.one(context.Background(), asleep.job("j")); !errors.Is(err, broker.ErrLeaseLost) {
				t.Fatalf("%v", err)
			}
			for i, got := range [][]byte{read(t, to.Output), read(t, to.Errors), read(t, to.Manifest)} {
				if !bytes.Equal(got, want[i]) {
					t.Errorf("file %d is\n%s\nand was\n%s", i, got, want[i])
				}
			}
			if m, reasons, err := Verify(to.Manifest); err != nil || len(reasons) > 0 || m.Millrace != "v2" {
				t.Errorf("%v %v", reasons, err)
			}
			if asleep.job("j").finished != nil {
				t.Error("it says that it has finished the job")
			}
		})
	}
}

// What is written under one name does not get into what another writes, and only its own writer puts it in place.
func TestPartsAreNotShared(t *testing.T) {
	path := filepath.Join(t.TempDir(), "output.jsonl")
	a, err := newPart(path)
	if err != nil {
		t.Fatal(err)
	}
	defer a.discard()
	other, err := newPart(path + ".b") // of another file
	if err != nil {
		t.Fatal(err)
	}
	defer other.discard()
	b, err := newPart(path)
	if err != nil {
		t.Fatal(err)
	}
	defer b.discard()
	for _, p := range []*partFile{a, b, other} {
		if err := p.write([]byte(p.temp)); err != nil {
			t.Fatal(err)
		}
		if err := p.settle(); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.rename(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the older one is put in place: %v", err)
	}
	name := b.temp
	if err := errors.Join(b.rename(), other.rename()); err != nil {
		t.Fatal(err)
	}
	if got := string(read(t, path)); got != name {
		t.Errorf("it holds %q, not %q", got, name)
	}
}

// The last steps for a job that was deleted do not touch the one that was created again under its name.
func TestDeletedJobLeavesItsSuccessorAlone(t *testing.T) {
	s, f, to := finished(t, 11)
	old := s.job("j")
	m, err := f.write(t.Context(), old, to)
	if err != nil {
		t.Fatal(err)
	}
	s.forget("j", 5)
	if err := s.know(spec("j", 11), 9, nil); err != nil {
		t.Fatal(err)
	}
	st := &stream{created: s.pos.Stream}
	if err := s.fold(st.add(t, good("j", 4, 4))); err != nil {
		t.Fatal(err)
	}
	save(t, s)
	if err := f.done(old, to, m); !errors.Is(err, errDeleted) {
		t.Errorf("%v", err)
	}
	s.dropSpool(old)
	if err := s.saveAbout(old, about{Born: 77}); err != nil {
		t.Error(err)
	}
	s = reopen(t, s)
	if j := s.job("j"); j.finished != nil || j.left != 10 || j.born != 9 {
		t.Errorf("%s, %d lines left, born %d", j.state, j.left, j.born)
	}
}
