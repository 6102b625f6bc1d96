package aggregator

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"millrace/proto"
)

// fullDisk makes the spool of a job one that takes nothing, and returns how to mend it.
func fullDisk(t *testing.T, j *job) (mend func()) {
	t.Helper()
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("no /dev/full here")
	}
	path := j.spool.path
	if err := os.Symlink("/dev/full", path); err != nil {
		t.Fatal(err)
	}
	return func() {
		j.spool.close()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// A disk that is full stops the fold where it is; what was folded stays in memory, and nothing is lost or torn.
func TestDiskFull(t *testing.T) {
	s, st := folded(t, t.TempDir(), 5000)
	j := s.job("j")
	mend := fullDisk(t, j)
	var err error
	var stuck message
	n := int64(0)
	for ; err == nil && n < 5000; n++ {
		stuck = st.add(t, good("j", n, n))
		err = s.fold(stuck)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("after %d results: %v", n, err)
	}
	if len(j.spool.buf) > 2*spoolBuffer || s.position().Seq != stuck.seq-1 {
		t.Errorf("%d bytes in memory, at %d", len(j.spool.buf), s.position().Seq)
	}
	if err := s.save(noWorkers); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("save: %v", err)
	}
	if _, err := readCheckpoint(s.checkpointFile()); !errors.Is(err, errNoCheckpoint) {
		t.Errorf("a checkpoint was written: %v", err)
	}
	mend()
	if err := s.fold(stuck); err != nil {
		t.Fatal(err)
	}
	save(t, s)
	s = reopen(t, s)
	if j := s.job("j"); j.tally.ok != n || s.position().Seq != stuck.seq {
		t.Errorf("%d of %d lines, at %+v", j.tally.ok, n, s.position())
	}
}

// What could not be synced is not to be believed any more: the state is read again from disk.
func TestSyncFails(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 5, good("j", 0, 1))
	j := s.job("j")
	if err := j.spool.flush(); err != nil {
		t.Fatal(err)
	}
	j.spool.file.Close()
	r, w, err := os.Pipe() // cannot be synced
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	j.spool.file = w
	if err := s.save(noWorkers); !errors.Is(err, errReload) {
		t.Errorf("%v", err)
	}
}

// Without a checkpoint nobody knows what of a spool was ever synced: kill -9 came before the first one, or it could not
// be synced, or the file is lost.
func TestSpoolWithoutACheckpointIsSyncedAgain(t *testing.T) {
	big := good("j", 2, 3)
	big.Body = fmt.Appendf(nil, `{"x":%q}`, strings.Repeat("y", 3*readerWindow))
	s, st := folded(t, t.TempDir(), 5, good("j", 0, 1), good("j", 1, 2), big)
	j := s.job("j")
	if err := j.spool.flush(); err != nil {
		t.Fatal(err)
	}
	before := read(t, j.spool.path)
	s = reopen(t, s)
	wantLines(t, s, "ok req-1", "ok req-2", "ok req-3")
	catchUp(t, s, st)
	v, err := s.snapshot(noWorkers)
	if err != nil || v == nil || len(v.sync) != 1 || len(v.dirs) != 1 || v.Jobs[0].Length != int64(len(before)) {
		t.Fatalf("%+v %v", v, err)
	}
	if !bytes.Equal(before, read(t, s.job("j").spool.path)) {
		t.Error("the spool is another one")
	}
}

// What is whole is not finished before it was synced.
func TestWholeWithoutACheckpoint(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 1, good("j", 0, 1))
	if err := s.job("j").spool.flush(); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if len(s.finishable()) > 0 {
		t.Error("before the checkpoint")
	}
	save(t, s)
	if len(s.finishable()) != 1 {
		t.Error("after it")
	}
}

func TestCheckpointThatCannotBeWritten(t *testing.T) {
	r := newRig(t)
	a := r.start()
	r.job("j", 3)
	r.await("j", folding(r.send(good("j", 0, 1))))
	file := filepath.Join(r.dir, "checkpoint")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(file, "x"), 0o755); err != nil { // a folder that is not empty is not replaced
		t.Fatal(err)
	}
	seq := r.send(good("j", 1, 1))
	p := r.await("j", func(p *proto.Progress) bool { return p.Note != "" })
	if p.Seq >= seq || !strings.Contains(p.Note, "cannot write "+r.dir) {
		t.Errorf("%+v", p)
	}
	if err := os.RemoveAll(file); err != nil {
		t.Fatal(err)
	}
	r.await("j", func(p *proto.Progress) bool { return p.Note == "" && p.Seq == seq })
	r.send(good("j", 2, 1))
	r.await("j", done)
	a.stop()
	r.verify("j")
}
