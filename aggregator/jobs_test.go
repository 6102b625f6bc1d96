package aggregator

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"millrace/proto"
)

func TestForgetAndCreateAgain(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 5, good("j", 0, 1))
	dir := s.job("j").dir
	if s.forget("j", 60, sight{rev: 0}) {
		t.Error("a removal that was followed by the spec removed it")
	}
	if s.forget("j", 60, sight{session: 7, rev: 9}) {
		t.Error("a removal of another session removed it")
	}
	if !s.forget("j", 60, sight{rev: 5}) || s.job("j") != nil {
		t.Error("it is still there")
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its folder: %v", err)
	}
	if err := s.know(spec("j", 5), sight{rev: 4}, nil); err != nil || s.job("j") != nil {
		t.Errorf("a spec older than the removal came back: %v", err)
	}
	again := spec("j", 5)
	again.After = 60
	if err := s.know(again, sight{rev: 6}, nil); err != nil || s.job("j") == nil {
		t.Errorf("a younger spec did not: %v", err)
	}
	wantLines(t, s, "")
	if s.forget("j", 60, sight{rev: 7}) || s.job("j") == nil {
		t.Error("the removal of the one before removed it")
	}
}

// A broker that lost its disk does not know of removals: the job that its owner puts again is the one that is known. One
// that comes after another removal is another job, whatever the clocks say.
func TestSpecOfABrokerThatForgot(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 5)
	first := spec("j", 5)
	first.After = 40
	if err := s.know(first, sight{rev: 2}, nil); err != nil || s.job("j").left != 5 {
		t.Fatal(err)
	}
	st := &stream{created: s.pos.Stream}
	for _, c := range []struct{ after, left int64 }{{40, 4}, {0, 4}, {60, 5}, {30, 5}} {
		if err := s.fold(st.add(t, good("j", 0, 1))); err != nil {
			t.Fatal(err)
		}
		again := spec("j", 5)
		again.After = c.after
		s.listen()
		if err := s.know(again, sight{s.session(), 1}, nil); err != nil {
			t.Fatal(err)
		}
		j := s.job("j")
		if p := j.progress(s.pos, "", ""); j.left != c.left || p.After != c.after {
			t.Errorf("%+v: %d lines left, after %d", c, j.left, p.After)
		}
	}
}

// A broker is replaced by one whose clock is behind and whose revisions begin anew: what it says of jobs counts as what
// the first one said.
func TestBrokerWhoseClockIsBehind(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 5)
	first := spec("i", 1)
	first.After = 9000
	if err := errors.Join(s.know(first, sight{rev: 900}, nil), s.know(spec("j", 5), sight{rev: 901}, nil)); err != nil {
		t.Fatal(err)
	}
	if !s.forget("j", 9001, sight{rev: 902}) {
		t.Fatal("j is not removed")
	}
	s.listen()
	second := s.session()
	if err := s.know(spec("j", 5), sight{second, 1}, nil); err != nil || s.job("j") == nil {
		t.Errorf("a job is not taken in because the first broker removed one: %v", err)
	}
	if !s.forget("i", 3, sight{second, 2}) || s.job("i") != nil {
		t.Error("a job is not forgotten because the first broker has seen it later")
	}
	again := spec("i", 1)
	again.After = 3
	if err := s.know(again, sight{second, 3}, nil); err != nil || s.job("i") == nil {
		t.Errorf("it cannot be created again: %v", err)
	}
	late := spec("i", 1) // a question of the first session is answered now
	late.After = 9000
	if err := s.know(late, sight{0, 900}, nil); err != nil || s.job("i").spec.After != 3 {
		t.Errorf("%+v: %v", s.job("i").spec, err)
	}
}

// What a crash left of a job that was being deleted is not the state of the one that is created again.
func TestCrashInTheMiddleOfADelete(t *testing.T) {
	s, f, to := finished(t, 11)
	m, err := f.write(t.Context(), s.job("j"), to)
	if err == nil {
		err = f.done(s.job("j"), to, m)
	}
	if err != nil {
		t.Fatal(err)
	}
	jobs, kept := s.jobsDir(), filepath.Join(t.TempDir(), "kept")
	copyDir(t, filepath.Join(jobs, "j"), kept)
	s.discard(s.job("j"))
	if left, err := os.ReadDir(jobs); err != nil || len(left) > 0 {
		t.Errorf("%v %v", left, err)
	}
	copyDir(t, kept, filepath.Join(jobs, gonePrefix+"x"))
	s = reopen(t, s)
	if left, err := os.ReadDir(jobs); err != nil || len(left) > 0 || s.job("j") != nil {
		t.Errorf("%v %v", left, err)
	}
}

func TestBadSpecs(t *testing.T) {
	s := openTest(t, t.TempDir())
	t.Cleanup(s.close)
	for _, spec := range []*proto.Job{spec("../x", 1), spec("", 1), spec("a.b", 1), spec("x", -1), spec("x", maxLines+1)} {
		if err := s.know(spec, sight{rev: 1}, nil); !errors.Is(err, errBadJob) {
			t.Errorf("%q with %d lines: %v", spec.ID, spec.Lines, err)
		}
	}
	if err := s.know(spec("x", 2), sight{rev: 1}, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.know(spec("x", 3), sight{rev: 2}, nil); !errors.Is(err, errBadJob) {
		t.Errorf("the same id with other lines: %v", err)
	}
}

// The owner of a job that is halted by failures hears of them soon.
func TestFailuresThatMayHaltAreToldSoon(t *testing.T) {
	for limit, want := range map[string]int{"": 0, "5": 1} {
		s := openTest(t, t.TempDir())
		v := spec("j", 5)
		v.MaxErrors = limit
		if err := s.know(v, sight{}, nil); err != nil {
			t.Fatal(err)
		}
		st := &stream{created: 7}
		s.moveTo(position{Stream: st.created}, false)
		now := time.Now()
		s.due(now.Add(-showSoon))
		if err := s.fold(st.add(t, good("j", 0, 1))); err != nil {
			t.Fatal(err)
		}
		if got := s.due(now); len(got) != 0 {
			t.Errorf("limit %q: an answer was told at once", limit)
		}
		if err := s.fold(st.add(t, bad("j", 1, proto.CodeEngineError))); err != nil {
			t.Fatal(err)
		}
		if got := s.due(now); len(got) != want || want > 0 && got[0].value.Failed != 1 {
			t.Errorf("limit %q: told is %+v", limit, got)
		}
		s.close()
	}
}
