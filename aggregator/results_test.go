package aggregator

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"millrace/proto"
)

// follower reads results page by page.
type follower struct {
	t      *testing.T
	s      *state
	j      *job
	which  string
	most   int64
	cursor int64
	got    []string
	done   bool
}

// next reads one page.
func (f *follower) next() *proto.ResultsAnswer {
	f.t.Helper()
	a := f.ask()
	if a.Error != "" {
		f.t.Fatal(a.Error)
	}
	if a.Next < f.cursor && a.Next&cursorFile == 0 {
		f.t.Fatalf("the cursor went back from %d to %d", f.cursor, a.Next)
	}
	for line := range bytes.Lines(a.Data) {
		l, err := proto.ParseOutput(line)
		if err != nil || line[len(line)-1] != '\n' {
			f.t.Fatalf("%v: %q", err, line)
		}
		word := "ok"
		if l.Error != nil {
			word = l.Error.Code
		}
		f.got = append(f.got, *l.CustomID+" "+word)
	}
	f.cursor, f.done = a.Next, a.Done
	return a
}

func (f *follower) ask() *proto.ResultsAnswer {
	f.t.Helper()
	t := &tenure{s: f.s}
	q := proto.ResultsQuestion{Job: f.j.spec.ID, Cursor: f.cursor, MaxBytes: f.most, Which: f.which}
	b, err := q.Encode()
	if err != nil {
		f.t.Fatal(err)
	}
	e, err := (&service{t: t, ctx: f.t.Context()}).results(b)
	if err != nil {
		f.t.Fatal(err)
	}
	return e.(*proto.ResultsAnswer)
}

// rest reads until there is nothing more for now.
func (f *follower) rest() string {
	f.t.Helper()
	f.got = nil
	for {
		n := len(f.got)
		f.next()
		if f.done || len(f.got) == n {
			return strings.Join(f.got, ", ")
		}
	}
}

func TestFollowResults(t *testing.T) {
	for _, most := range []int64{1, 700, 1 << 20} {
		t.Run(fmt.Sprint(most), func(t *testing.T) {
			s, st := folded(t, t.TempDir(), 5, good("j", 1, 1), bad("j", 0, "a"), bad("j", 2, "a"))
			j := s.job("j")
			all := &follower{t: t, s: s, j: j, which: proto.WhichAll, most: most}
			oks := &follower{t: t, s: s, j: j, which: proto.WhichOK, most: most}
			bads := &follower{t: t, s: s, j: j, which: proto.WhichErrors, most: most}
			check := func(f *follower, want string) {
				t.Helper()
				if got := f.rest(); got != want {
					t.Errorf("%s: %q, want %q", f.which, got, want)
				}
			}
			check(all, "") // nothing is in a checkpoint yet
			save(t, s)
			check(all, "id-1 ok, id-0 a, id-2 a")
			check(oks, "id-1 ok")
			check(bads, "id-0 a, id-2 a")
			for _, r := range []*proto.Result{good("j", 1, 2), good("j", 0, 2), bad("j", 3, "b")} {
				if err := s.fold(st.add(t, r)); err != nil {
					t.Fatal(err)
				}
			}
			save(t, s)
			check(all, "id-0 ok, id-3 b")
			check(oks, "id-0 ok")
			check(bads, "id-3 b")
			late := &follower{t: t, s: s, j: j, which: proto.WhichErrors, most: most}
			check(late, "id-2 a, id-3 b") // the replaced one is not there any more
			check(&follower{t: t, s: s, j: j, which: proto.WhichAll, most: most}, "id-1 ok, id-2 a, id-0 ok, id-3 b")
			if all.done {
				t.Error("done before the job is")
			}
			if err := s.fold(st.add(t, good("j", 4, 1))); err != nil {
				t.Fatal(err)
			}
			save(t, s)
			f := newFinisher(s, filesIn(t.TempDir()))
			finish(t, f)
			check(all, "id-4 ok") // from the spool, which is kept for those who read on in it
			check(bads, "")
			if !all.done || !bads.done {
				t.Error("not done")
			}
			check(&follower{t: t, s: s, j: j, which: proto.WhichAll, most: most}, "id-0 ok, id-1 ok, id-4 ok, id-2 a, id-3 b")
			check(&follower{t: t, s: s, j: j, which: proto.WhichOK, most: most}, "id-0 ok, id-1 ok, id-4 ok")
			check(&follower{t: t, s: s, j: j, which: proto.WhichErrors, most: most}, "id-2 a, id-3 b")
			if _, err := os.Stat(j.spool.path); err != nil {
				t.Errorf("the spool: %v", err)
			}
			_, left := s.aged(time.Now().Add(time.Hour), 0, time.Minute)
			for _, j := range left {
				s.dropSpool(j)
			}
			if a := oks.ask(); a.Error == "" || a.Next != oks.cursor || len(a.Data) > 0 {
				t.Errorf("a follower who came back too late: %+v", a)
			}
			if _, err := os.Stat(j.spool.path); err == nil {
				t.Error("the spool is still there")
			}
		})
	}
}

// A cursor of one spool says nothing in another one: that of an aggregator with another disk, or with a disk that is
// older or was damaged. In the same one it does, after a restart too.
func TestFollowIntoAnotherSpool(t *testing.T) {
	for _, which := range []string{proto.WhichAll, proto.WhichErrors} {
		t.Run(which, func(t *testing.T) {
			s, st := folded(t, t.TempDir(), 9, bad("j", 0, "a"), bad("j", 1, "a"))
			save(t, s)
			old := t.TempDir()
			copyDir(t, s.dir, old)
			for _, m := range []message{st.add(t, bad("j", 2, "b")), st.add(t, bad("j", 3, "b"))} {
				if err := s.fold(m); err != nil {
					t.Fatal(err)
				}
			}
			save(t, s)
			f := &follower{t: t, s: s, j: s.job("j"), which: which, most: 1 << 20}
			if got := f.rest(); got != "id-0 a, id-1 a, id-2 b, id-3 b" {
				t.Fatal(got)
			}
			refused := func(what string, s *state) {
				t.Helper()
				f := &follower{t: t, s: s, j: s.job("j"), which: which, most: 1 << 20, cursor: f.cursor}
				if a := f.ask(); a.Error != errSpool.Error() || len(a.Data) > 0 || a.Next != f.cursor {
					t.Errorf("%s: %+v", what, a)
				}
			}
			other, _ := folded(t, t.TempDir(), 9, bad("j", 3, "b"), bad("j", 2, "b"), bad("j", 1, "a"), bad("j", 0, "a"), bad("j", 5, "a"))
			save(t, other)
			refused("an empty disk", other)
			refused("an older disk", reopen(t, &state{dir: old, aside: &spool{}}))
			s = reopen(t, s)
			if err := s.fold(st.add(t, bad("j", 4, "c"))); err != nil {
				t.Fatal(err)
			}
			save(t, s)
			f.s, f.j = s, s.job("j")
			if got := f.rest(); got != "id-4 c" {
				t.Errorf("after a restart: %q", got)
			}
			flip(t, s.job("j").spool.path, -s.job("j").at[1]+recordHeader+5)
			s = reopen(t, s)
			catchUp(t, s, st)
			save(t, s)
			refused("a damaged disk", s)
			refused("and after that", reopen(t, s))
		})
	}
}

func TestResultsThatDoNotFit(t *testing.T) {
	big := good("j", 0, 1)
	big.Body = fmt.Appendf(nil, `{"text":%q}`, strings.Repeat("x", proto.MaxPayload-2000))
	s, _ := folded(t, t.TempDir(), 3, big, good("j", 1, 1))
	save(t, s)
	f := &follower{t: t, s: s, j: s.job("j"), which: proto.WhichAll, most: 1}
	if a := f.next(); len(a.Data) < proto.MaxPayload-2000 { // one line is given, whatever the limit
		t.Errorf("%d bytes", len(a.Data))
	}
	if f.next(); fmt.Sprint(f.got) != "[id-0 ok id-1 ok]" {
		t.Errorf("%v", f.got)
	}
}

func TestResultsOfNothing(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 3)
	f := &follower{t: t, s: s, j: s.job("j"), which: proto.WhichAll}
	if a := f.next(); !a.Known || a.Done || len(a.Data) > 0 || a.Next != 0 {
		t.Errorf("%+v", a)
	}
	for _, c := range []int64{-1, cursorFile | 5} {
		f.cursor = c
		if a := f.ask(); a.Error == "" {
			t.Errorf("cursor %d: %+v", c, a)
		}
	}
}

func TestResultsWhoseFileIsGone(t *testing.T) {
	s, fin, to := finished(t, 11)
	finish(t, fin)
	if err := os.Remove(to.Output); err != nil {
		t.Fatal(err)
	}
	f := &follower{t: t, s: s, j: s.job("j"), which: proto.WhichAll}
	if a := f.ask(); !strings.Contains(a.Error, filepath.Base(to.Output)) {
		t.Errorf("%+v", a)
	}
}

// An aggregator that took over a job's end from another machine says where its files are.
func TestResultsOfAnotherMachine(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 1)
	was := &proto.Progress{State: proto.FoldDone, Lines: 1, OK: 1, Host: "far", Output: "/nowhere/output.jsonl", Verdict: Valid}
	if err := s.know(spec("j", 1), sight{rev: 1}, was); err != nil {
		t.Fatal(err)
	}
	f := &follower{t: t, s: s, j: s.job("j"), which: proto.WhichOK}
	if a := f.ask(); !strings.Contains(a.Error, "finished on far") {
		t.Errorf("%+v", a)
	}
}

// TestManifestByPages: the bytes of the file, once there is one.
func TestManifestByPages(t *testing.T) {
	s, fin, to := finished(t, 11)
	f := &follower{t: t, s: s, j: s.job("j"), which: proto.WhichManifest, most: 300}
	if a := f.ask(); a.Error != errUnfinished.Error() || len(a.Data) > 0 {
		t.Errorf("%+v", a)
	}
	finish(t, fin)
	var got []byte
	pages := 0
	for ; !f.done; pages++ {
		a := f.ask()
		if a.Error != "" {
			t.Fatal(a.Error)
		}
		got = append(got, a.Data...)
		f.cursor, f.done = a.Next, a.Done
	}
	want, err := os.ReadFile(to.Manifest)
	if err != nil || !bytes.Equal(got, want) || pages < 3 {
		t.Errorf("%d pages, %v: %s", pages, err, got)
	}
}

// A follower over the wire, through the whole life of a job.
func TestFollowOverTheWire(t *testing.T) {
	r := newRig(t)
	r.start()
	r.job("j", 30)
	var got []string
	q := proto.ResultsQuestion{Job: "j", MaxBytes: 2000, Which: proto.WhichOK}
	for sent := int64(0); ; {
		var a proto.ResultsAnswer
		r.ask(proto.SubjectResults, &q, &a)
		if a.Error != "" || !a.Known {
			t.Fatalf("%+v", a)
		}
		for line := range bytes.Lines(a.Data) {
			l, err := proto.ParseOutput(line)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, *l.CustomID)
		}
		q.Cursor = a.Next
		if a.Done {
			break
		}
		if len(a.Data) == 0 && sent < 30 {
			r.send(all("j", sent, sent+10)...)
			sent += 10
		}
	}
	slices.Sort(got)
	if len(got) != 30 || len(slices.Compact(got)) != 30 {
		t.Errorf("%v", got)
	}
}
