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
	return Files{Output: filepath.Join(dir, "output.jsonl"), Errors: filepath.Join(dir, "errors.jsonl"), Manifest: filepath.Join(dir, "manifest.json")}
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

// Results of another job that came to the place of ours stay, unless they were there before and may be written over.
func TestAnothersResultsStay(t *testing.T) {
	_, other, at := finished(t, 3)
	finish(t, other)
	theirs := bytes.Replace(read(t, at.Manifest), []byte(`"id": "j"`), []byte(`"id": "k"`), 1)
	s, f, to := finished(t, 11)
	if err := os.MkdirAll(filepath.Dir(to.Manifest), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to.Manifest, theirs, 0o644); err != nil {
		t.Fatal(err)
	}
	err := f.one(t.Context(), s.job("j"))
	if err == nil || !strings.Contains(err.Error(), "holds the results of job k") {
		t.Fatalf("error %v", err)
	}
	if _, err := os.Stat(to.Output); !errors.Is(err, os.ErrNotExist) || !bytes.Equal(read(t, to.Manifest), theirs) {
		t.Errorf("something was written: %v", err)
	}
	to.Over = "k"
	finish(t, newFinisher(s, to))
	if m, reasons, err := Verify(to.Manifest); err != nil || len(reasons) > 0 || m.Job.ID != "j" {
		t.Errorf("%v %v", reasons, err)
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

// What a worker says of its engine, and what could not be written, is written with the next checkpoint.
func TestEnginesAreSavedAgain(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 3, good("j", 0, 0))
	about := filepath.Join(s.job("j").dir, fileAbout)
	if err := errors.Join(os.Remove(about), os.MkdirAll(filepath.Join(about, "x"), 0o755)); err != nil {
		t.Fatal(err)
	}
	heard := func(id string) *proto.Worker { return &proto.Worker{ID: id, Version: "0.11.0"} }
	if err := s.save(heard); err == nil {
		t.Fatal("it was saved")
	}
	if err := os.RemoveAll(about); err != nil {
		t.Fatal(err)
	}
	if err := s.save(heard); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if e := s.job("j").engines["w0"]; e == nil || e.Version != "0.11.0" {
		t.Errorf("%+v", e)
	}
}

func TestDeletedWhileFinishing(t *testing.T) {
	s, f, to := finished(t, 11)
	j := s.job("j")
	s.discard(s.job("j"))
	if err := f.one(context.Background(), j); err != nil {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(to.Manifest); err == nil {
		t.Error("a manifest was written")
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
