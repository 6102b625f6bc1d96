package aggregator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"millrace/broker"
	"millrace/proto"
)

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
	s.discard(old)
	if err := s.know(spec("j", 11), sight{rev: 9}, nil); err != nil {
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
	seal := s.job("j").seal
	if err := s.saveAbout(old, about{Spool: seal + 1}); err != nil {
		t.Error(err)
	}
	s = reopen(t, s)
	if j := s.job("j"); j.finished != nil || j.left != 10 || j.seal != seal {
		t.Errorf("%s, %d lines left, seal %d", j.state, j.left, j.seal)
	}
}

// What was used of a batch is let go: long lines here and there do not add up over the batches.
func TestLongLinesDoNotStayInMemory(t *testing.T) {
	const n = batchLines + 100
	s, _ := folded(t, t.TempDir(), n)
	st := &stream{created: s.pos.Stream}
	long := fmt.Appendf(nil, `{"x":%q}`, strings.Repeat("y", 2*keptBytes))
	for i := range int64(n) {
		r := good("j", i, 1)
		if i%100 == 0 {
			r.Body = long
		}
		if err := s.fold(st.add(t, r)); err != nil {
			t.Fatal(err)
		}
	}
	save(t, s)
	rows := map[*row]bool{}
	if err := eachResult(t.Context(), s.job("j"), func(r *row) error {
		rows[r] = true
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for r := range rows {
		if r.result != nil || cap(r.line) > keptBytes {
			t.Fatalf("a row holds %d bytes, and %v", cap(r.line), r.result)
		}
	}
	if len(rows) != batchLines {
		t.Errorf("%d rows", len(rows))
	}
}
