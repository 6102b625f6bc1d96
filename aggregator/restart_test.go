package aggregator

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

func TestResume(t *testing.T) {
	created := time.Unix(0, 111)
	for _, c := range []struct {
		name        string
		at          position
		first, last uint64
		stamps      map[uint64]int64
		want        position
		again       bool
	}{
		{"nothing folded, empty stream", position{}, 0, 0, nil, position{Stream: 111}, true},
		{"nothing folded", position{}, 5, 9, nil, position{Stream: 111, Seq: 4}, true},
		{"where it stood", position{111, 7, 70}, 1, 9, map[uint64]int64{7: 70}, position{111, 7, 70}, false},
		{"at the end", position{111, 9, 90}, 9, 9, map[uint64]int64{9: 90}, position{111, 9, 90}, false},
		{"all purged", position{111, 9, 90}, 10, 9, nil, position{111, 9, 90}, false},
		{"the next ones are gone", position{111, 3, 30}, 6, 9, nil, position{Stream: 111, Seq: 5}, false},
		{"another stream", position{110, 7, 70}, 1, 9, map[uint64]int64{7: 70}, position{Stream: 111}, true},
		{"rolled back behind it", position{111, 12, 120}, 4, 9, nil, position{Stream: 111, Seq: 3}, true},
		{"rolled back and written on", position{111, 7, 70}, 4, 9, map[uint64]int64{7: 71}, position{Stream: 111, Seq: 3}, true},
		{"the message itself was deleted", position{111, 7, 70}, 4, 9, nil, position{111, 7, 70}, false},
		{"all is to be folded again", position{Stream: 111}, 4, 9, nil, position{Stream: 111, Seq: 3}, true},
	} {
		info := &jetstream.StreamInfo{Created: created, State: jetstream.StreamState{FirstSeq: c.first, LastSeq: c.last}}
		got, again, err := resume(c.at, info, func(seq uint64) (int64, error) { return c.stamps[seq], nil })
		if got != c.want || again != c.again || err != nil {
			t.Errorf("%s: %+v %v %v, want %+v %v", c.name, got, again, err, c.want, c.again)
		}
	}
	info := &jetstream.StreamInfo{Created: created, State: jetstream.StreamState{FirstSeq: 1, LastSeq: 9}}
	no := errors.New("no answer")
	if _, _, err := resume(position{111, 7, 70}, info, func(uint64) (int64, error) { return 0, no }); !errors.Is(err, no) {
		t.Errorf("a broker that does not answer: %v", err)
	}
}

// reopen closes a state without saving, as a crash would, and opens it again.
func reopen(t *testing.T, s *state) *state {
	t.Helper()
	s.close()
	n := openTest(t, s.dir)
	t.Cleanup(n.close)
	return n
}

func wantLines(t *testing.T, s *state, want ...string) {
	t.Helper()
	j := s.job("j")
	for i, w := range want {
		if got := kind(t, j, int64(i)); got != w {
			t.Errorf("line %d is %q, want %q", i, got, w)
		}
	}
}

func TestRestartFoldsOnlyWhatIsNew(t *testing.T) {
	s, st := folded(t, t.TempDir(), 5, good("j", 0, 1), bad("j", 1, "a"))
	save(t, s)
	st.purged = 1
	for _, m := range []message{st.add(t, good("j", 2, 2)), st.add(t, good("j", 2, 3))} { // folded, not saved
		if err := s.fold(m); err != nil {
			t.Fatal(err)
		}
	}
	s = reopen(t, s)
	wantLines(t, s, "ok req-1", "error a", "")
	if p := s.position(); p.Seq != 2 || p.Time == 0 {
		t.Errorf("stands at %+v", p)
	}
	catchUp(t, s, st)
	wantLines(t, s, "ok req-1", "error a", "ok req-2", "", "")
	if d := s.job("j").drops.Duplicates; d != 1 {
		t.Errorf("%d duplicates", d)
	}
}

func TestRestartCutsATornTail(t *testing.T) {
	s, st := folded(t, t.TempDir(), 5, good("j", 0, 1))
	save(t, s)
	path := s.job("j").spool.path
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(recordMagic + "torn"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	s = reopen(t, s)
	if s.position().Seq != 1 {
		t.Errorf("a torn tail behind the checkpoint makes it fold again: %+v", s.position())
	}
	if st, err := os.Stat(path); err != nil || st.Size() != s.job("j").durable {
		t.Errorf("%d bytes are left of %d: %v", st.Size(), s.job("j").durable, err)
	}
	if err := s.fold(st.add(t, good("j", 1, 2))); err != nil {
		t.Fatal(err)
	}
	save(t, s)
	s = reopen(t, s)
	wantLines(t, s, "ok req-1", "ok req-2")
}

func flip(t *testing.T, path string, at int64) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[at] ^= 4
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestRestartWithAFlippedBit(t *testing.T) {
	s, st := folded(t, t.TempDir(), 5, good("j", 0, 1), good("j", 1, 2), good("j", 2, 3), good("j", 2, 4))
	save(t, s)
	j := s.job("j")
	flip(t, j.spool.path, j.at[1]+recordHeader+5)
	s = reopen(t, s)
	wantLines(t, s, "ok req-1", "", "ok req-3")
	if s.position().Seq != 0 {
		t.Errorf("stands at %+v, what the broker still has is not folded again", s.position())
	}
	catchUp(t, s, st)
	wantLines(t, s, "ok req-1", "ok req-2", "ok req-3")
	if d := s.job("j").drops.Duplicates; d != 1 {
		t.Errorf("%d duplicates: folding again counted them again", d)
	}
	save(t, s)
	s = reopen(t, s) // the hole is still in the file; it costs nothing more
	catchUp(t, s, st)
	wantLines(t, s, "ok req-1", "ok req-2", "ok req-3")
}

func TestRestartWithAShortOrLostSpool(t *testing.T) {
	for name, harm := range map[string]func(path string) error{
		"short": func(p string) error { return os.Truncate(p, 200) },
		"empty": func(p string) error { return os.Truncate(p, 0) },
		"lost":  os.Remove,
	} {
		t.Run(name, func(t *testing.T) {
			s, st := folded(t, t.TempDir(), 5, good("j", 0, 1), good("j", 1, 2), good("j", 2, 3))
			save(t, s)
			if err := harm(s.job("j").spool.path); err != nil {
				t.Fatal(err)
			}
			s = reopen(t, s)
			catchUp(t, s, st)
			wantLines(t, s, "ok req-1", "ok req-2", "ok req-3", "", "")
			save(t, s)
			s = reopen(t, s)
			wantLines(t, s, "ok req-1", "ok req-2", "ok req-3", "", "")
		})
	}
}

// The folder of a job is gone, and its mark in the checkpoint speaks of nothing any more.
func TestRestartWithALostFolder(t *testing.T) {
	s, st := folded(t, t.TempDir(), 5, good("j", 0, 1), good("j", 1, 2), good("j", 1, 3))
	save(t, s)
	if err := os.RemoveAll(s.job("j").dir); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if err := s.know(spec("j", 5), sight{rev: 1}, nil); err != nil {
		t.Fatal(err)
	}
	catchUp(t, s, st)
	wantLines(t, s, "ok req-1", "ok req-2", "")
	if len(s.marks) > 0 {
		t.Errorf("%+v", s.marks)
	}
}

// What is purged and lost is missing, no more: its owner sends it again.
func TestRestartWithALostSpoolAndAPurgedStream(t *testing.T) {
	s, st := folded(t, t.TempDir(), 5, good("j", 0, 1), good("j", 1, 2), good("j", 2, 3))
	save(t, s)
	st.purged = 2
	if err := os.Remove(s.job("j").spool.path); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	catchUp(t, s, st)
	wantLines(t, s, "", "", "ok req-3")
	if a := s.missing(s.job("j"), 0, 0); len(a.Ranges) != 2 {
		t.Errorf("%+v", a)
	}
}

func TestRestartWithAnOlderDisk(t *testing.T) {
	for _, what := range []string{"all", "checkpoint"} {
		t.Run(what, func(t *testing.T) {
			s, st := folded(t, t.TempDir(), 5, good("j", 0, 1))
			save(t, s)
			old := t.TempDir()
			copyDir(t, s.dir, old)
			for _, m := range []message{st.add(t, good("j", 1, 2)), st.add(t, good("j", 2, 3))} {
				if err := s.fold(m); err != nil {
					t.Fatal(err)
				}
			}
			save(t, s)
			st.purged = 2
			if what == "checkpoint" {
				if err := os.Rename(filepath.Join(old, "checkpoint"), filepath.Join(s.dir, "checkpoint")); err != nil {
					t.Fatal(err)
				}
			} else {
				s.close()
				s.dir = old
			}
			s = reopen(t, s)
			catchUp(t, s, st)
			wantLines(t, s, "ok req-1", "", "ok req-3", "", "")
		})
	}
}

func TestRestartWithoutACheckpointKeepsTheSpools(t *testing.T) {
	for name, harm := range map[string]func(string) error{
		"lost":    os.Remove,
		"damaged": func(p string) error { return os.WriteFile(p, []byte("x"), 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			s, st := folded(t, t.TempDir(), 5, good("j", 0, 1), good("j", 1, 2))
			save(t, s)
			st.purged = 1
			if err := harm(filepath.Join(s.dir, "checkpoint")); err != nil {
				t.Fatal(err)
			}
			s = reopen(t, s)
			catchUp(t, s, st)
			wantLines(t, s, "ok req-1", "ok req-2")
			if d := s.job("j").drops.Duplicates; d != 0 {
				t.Errorf("%d duplicates", d)
			}
		})
	}
}

func TestAnotherStreamIsFoldedFromItsFirst(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 5, good("j", 0, 1), good("j", 1, 2))
	save(t, s)
	st := &stream{created: 9_000_000}
	st.add(t, good("j", -1, 7)) // of no line
	st.add(t, good("j", 1, 7))  // it was sent again: a duplicate
	st.add(t, good("j", 2, 8))
	catchUp(t, s, st)
	wantLines(t, s, "ok req-1", "ok req-2", "ok req-8")
	j := s.job("j")
	if j.drops.Duplicates != 1 || j.first != 2 || s.position().Stream != 9_000_000 {
		t.Errorf("%+v, first %d, at %+v", j.drops, j.first, s.position())
	}
	s = reopen(t, s) // the checkpoint is of the old stream
	catchUp(t, s, st)
	wantLines(t, s, "ok req-1", "ok req-2", "ok req-8")
}

// The broker came back with an older copy of its disk, and went on.
func TestARolledBackStreamIsFoldedFromItsFirst(t *testing.T) {
	s, st := folded(t, t.TempDir(), 9, good("j", 0, 1), good("j", 1, 2), good("j", 1, 3), good("j", 2, 4))
	save(t, s)
	st.msgs = st.msgs[:3]
	catchUp(t, s, st)
	m := st.add(t, good("j", 3, 5))
	st.msgs[3].time = m.time + 500 // another message under the same sequence
	if err := s.fold(st.msgs[3]); err != nil {
		t.Fatal(err)
	}
	wantLines(t, s, "ok req-1", "ok req-2", "ok req-4", "ok req-5")
	if d := s.job("j").drops.Duplicates; d != 1 {
		t.Errorf("%d duplicates", d)
	}
}

func TestPurgeable(t *testing.T) {
	s, st := folded(t, t.TempDir(), 5, good("j", 0, 1), good("j", 1, 2))
	purgeable := func(all bool) uint64 { n, _ := s.purgeable(all); return n }
	if n := purgeable(true); n != 0 {
		t.Errorf("before any checkpoint: %d", n)
	}
	save(t, s)
	if n := purgeable(true); n != 2 {
		t.Errorf("shared disk: %d", n)
	}
	if err := s.know(spec("k", 1), sight{rev: 1}, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.fold(st.add(t, good("k", 0, 1))); err != nil {
		t.Fatal(err)
	}
	save(t, s)
	if n := purgeable(false); n != 1 {
		t.Errorf("other disk, j is not finished: %d", n)
	}
	s.discard(s.job("j"))
	if n := purgeable(false); n != 3 {
		t.Errorf("other disk, k began at 3: %d", n)
	}
	s.moveTo(position{Stream: 8_000_000}, true)
	if n := purgeable(true); n != 0 {
		t.Errorf("the checkpoint is of another stream: %d", n)
	}
}

// The broker comes back with an older disk while a checkpoint is on its way: neither this one nor the last says what
// may be purged.
func TestNothingIsPurgedOnTheWordOfAnOldCheckpoint(t *testing.T) {
	s, st := folded(t, t.TempDir(), 9, good("j", 0, 1), good("j", 1, 2))
	save(t, s)
	if err := s.fold(st.add(t, good("j", 2, 3))); err != nil {
		t.Fatal(err)
	}
	v, err := s.snapshot(noWorkers)
	if err != nil || v == nil {
		t.Fatalf("%+v %v", v, err)
	}
	s.moveTo(position{Stream: st.created}, true)
	if n, _ := s.purgeable(true); n != 0 {
		t.Errorf("the last checkpoint: results before %d", n)
	}
	if err := s.write(v); err != nil {
		t.Fatal(err)
	}
	s.stored(v, time.Now())
	if n, _ := s.purgeable(true); n != 0 {
		t.Errorf("the one on its way: results before %d", n)
	}
	s.moved = true
	save(t, s)
	if n, at := s.purgeable(true); n != 0 || at.Stream != st.created {
		t.Errorf("the next one: results before %d, %+v", n, at)
	}
}

// And no more when a spool lost results that the broker may still have.
func TestNothingIsPurgedThatIsFoldedAgain(t *testing.T) {
	s, st := folded(t, t.TempDir(), 9, good("j", 0, 1), good("j", 1, 2))
	save(t, s)
	if err := os.Remove(s.job("j").spool.path); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	s.moveTo(position{Stream: st.created}, false)
	if n, _ := s.purgeable(true); n != 0 {
		t.Errorf("results before %d", n)
	}
}

func TestSpecThatCannotBeReadComesAgain(t *testing.T) {
	s, st := folded(t, t.TempDir(), 5, good("j", 0, 1))
	save(t, s)
	path := filepath.Join(s.job("j").dir, fileSpec)
	if err := os.WriteFile(path, []byte("\xff"), 0o644); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if s.job("j") != nil {
		t.Fatal("it was read")
	}
	s.moved = true
	save(t, s) // the job's mark must survive
	spool := filepath.Join(s.jobsDir(), "j", fileSpool)
	if err := errors.Join(os.Rename(spool, spool+".away"), os.Mkdir(spool, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := s.know(spec("j", 5), sight{rev: 1}, nil); err == nil || s.job("j") != nil {
		t.Errorf("%v", err)
	}
	if err := errors.Join(os.Remove(spool), os.Rename(spool+".away", spool)); err != nil { // and a try that failed
		t.Fatal(err)
	}
	if err := s.know(spec("j", 5), sight{rev: 1}, nil); err != nil {
		t.Fatal(err)
	}
	catchUp(t, s, st)
	wantLines(t, s, "ok req-1", "")
	s = reopen(t, s)
	wantLines(t, s, "ok req-1", "")
}
