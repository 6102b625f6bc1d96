package aggregator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"millrace/proto"
)

// Stopped writes to w what the aggregator that works in dir has of a job, while it does not run: the lines that ended ok,
// those that failed, or all, as which says (one of proto's Which constants, but for the manifest), in the order in which
// they came; nothing of a job that it has not begun with. It changes nothing there. The caller sees to it that no aggregator starts meanwhile.
func Stopped(dir, id, which string, w io.Writer) error {
	dir = filepath.Join(dir, "jobs", id)
	spec, err := readSpec(filepath.Join(dir, fileSpec))
	if errors.Is(err, fs.ErrNotExist) { // it is written when the aggregator hears of the job
		return nil
	}
	if err != nil {
		return err
	}
	j, err := newJob(context.Background(), dir, spec)
	if err != nil {
		return err
	}
	defer j.stop()
	f, err := os.Open(j.spool.path)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open spool: %w", err)
	}
	defer f.Close()
	j.at = make([]int64, spec.Lines)
	if err := eachRecord(f, func(r Record, off int64) error {
		if j.holds(r.Index) && j.judge(r.Index, r.OK) <= fateReplaces {
			j.at[r.Index] = signed(r, off)
		}
		return nil
	}); err != nil {
		return err
	}
	var line []byte
	return eachRecord(f, func(r Record, off int64) error {
		if !j.holds(r.Index) || j.at[r.Index] != signed(r, off) || r.OK && which == proto.WhichErrors || !r.OK && which == proto.WhichOK {
			return nil
		}
		res, err := proto.DecodeResult(r.Data)
		if err != nil {
			return err
		}
		line = proto.AppendLine(line[:0], res)
		if _, err := w.Write(line); err != nil {
			return fmt.Errorf("write results: %w", err)
		}
		return nil
	})
}

// signed is how a job notes that a record at off counts.
func signed(r Record, off int64) int64 {
	if r.OK {
		return off
	}
	return -off
}

func eachRecord(f *os.File, do func(Record, int64) error) error {
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("look at the spool: %w", err)
	}
	rd := NewSpoolReader(f, st.Size())
	for {
		r, err := rd.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := do(r, rd.Offset()); err != nil {
			return err
		}
	}
}
