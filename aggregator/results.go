package aggregator

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"millrace/proto"
)

// A cursor says where to read on: in the spool while the job runs, in its files when it is finished. The three kinds
// are told apart by their upper bits. Those of a spool hold its seal, too: another spool has the same results at other
// places, or does not have them yet.
const (
	cursorErrors = int64(1) << 61 // in the error file
	cursorFile   = int64(1) << 62 // in one of the files
	cursorOffset = cursorErrors - 1

	spoolShift  = 45 // a spool has less than 32 TiB
	spoolSeals  = int64(1) << 16
	spoolOffset = int64(1)<<spoolShift - 1
)

// newSeal draws what tells a spool from any that the job had before, or has at another aggregator.
func newSeal() int64 { return 1 + rand.Int64N(spoolSeals-1) }

// answerOverhead is what an answer takes besides its lines, in bytes.
const answerOverhead = 1 << 10

var (
	errCursor     = errors.New("these results were being read while the job ran, and it has ended since; read its files, or begin anew")
	errSpool      = errors.New("these results were being read in another order than they have now: another aggregator took over, or its disk was damaged; begin anew, and what was read comes again")
	errUnfinished = errors.New("the job is not finished")
	errLong       = errors.New("the next line does not fit one answer; read the job's files when it is finished")
)

// results gives lines of a job in the order in which they came, while it runs; from its files, in input order, when it
// is finished before anyone reads.
//
// What a follower sees: every line that counts at the time it is read, none twice, but for one case: a line that was
// read as an error and ends ok after all is read again, as ok, further on. Only what is in a checkpoint is given. A
// follower who stops reading while the job ends, and comes back more than a minute later, is told to begin anew, as is
// one whose spool is not there any more.
func (s *service) results(b []byte) (encoder, error) {
	var q proto.ResultsQuestion
	if err := q.Decode(b); err != nil {
		return nil, err
	}
	a := &proto.ResultsAnswer{Next: q.Cursor}
	j := s.find(q.Job)
	if j == nil {
		return a, nil
	}
	a.Known = true
	q.MaxBytes = min(max(q.MaxBytes, 1), maxAnswer-answerOverhead)
	p := page{q: q, a: a}
	if err := p.fill(s.t.s, j); err != nil && !errors.Is(err, errFull) {
		a.Data, a.Next, a.Done, a.Error = nil, q.Cursor, false, err.Error()
	}
	return a, nil
}

// page is an answer as it fills up.
type page struct {
	q proto.ResultsQuestion
	a *proto.ResultsAnswer
}

// errFull says that an answer holds all it may.
var errFull = errors.New("the answer is full")

func (p *page) fill(s *state, j *job) error {
	v, err := s.view(j, p.q)
	if err != nil {
		return err
	}
	if v.files != nil {
		return elsewhere(p.files(v.files), v.files, s.host)
	}
	if p.q.Which == proto.WhichManifest {
		return errUnfinished
	}
	f, err := os.Open(j.spool.path)
	if errors.Is(err, os.ErrNotExist) && v.length == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open spool: %w", err)
	}
	defer f.Close()
	p.a.Next = p.q.Cursor & spoolOffset
	if p.q.Which == proto.WhichErrors {
		err = p.errors(s, j, f, v)
	} else {
		err = p.scan(s, j, f, v)
	}
	if p.a.Next > 0 {
		p.a.Next |= v.seal << spoolShift
	}
	p.a.Done = err == nil && v.done
	return err
}

// elsewhere says on which machine files are that are not here.
func elsewhere(err error, done *proto.Progress, host string) error {
	if errors.Is(err, os.ErrNotExist) && done.Host != host {
		return fmt.Errorf("%w; the job was finished on %s", err, done.Host)
	}
	return err
}

// view is what may be read of a job at one instant.
type view struct {
	files  *proto.Progress // of a finished job; nil: read the spool
	length int64           // bytes of the spool that are in a checkpoint
	seal   int64           // of the spool
	done   bool            // nothing is added to it any more
	errors []int64         // offsets of the errors in the spool, where only these are asked for
}

func (s *state) view(j *job, q proto.ResultsQuestion) (view, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	inFiles := q.Cursor&cursorFile != 0
	switch {
	case q.Cursor < 0:
		return view{}, errCursor
	case j.finished != nil && (inFiles || q.Cursor == 0):
		return view{files: j.finished}, nil
	case inFiles || j.at == nil:
		return view{}, errCursor
	case q.Cursor != 0 && (q.Cursor>>spoolShift != j.seal || q.Cursor&spoolOffset > j.durable):
		return view{}, errSpool
	}
	j.followed = time.Now()
	v := view{length: j.durable, seal: j.seal, done: j.finished != nil}
	if q.Which == proto.WhichErrors {
		for _, off := range j.at {
			if off < 0 && -off >= q.Cursor&spoolOffset && -off < v.length {
				v.errors = append(v.errors, -off)
			}
		}
	}
	return v, nil
}

// points says whether the record at off is the one that counts for its line.
func (s *state) points(j *job, r Record, off int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return j.at != nil && j.holds(r.Index) && j.at[r.Index] == signed(r, off)
}

// scan gives the records of the spool one after the other.
func (p *page) scan(s *state, j *job, f *os.File, v view) error {
	rd := NewSpoolReader(f, v.length)
	rd.at = p.a.Next
	for {
		r, err := rd.Next()
		if err == io.EOF {
			p.a.Next = max(p.a.Next, v.length)
			return nil
		}
		if err != nil {
			return err
		}
		wanted := r.OK || p.q.Which == proto.WhichAll
		if wanted && s.points(j, r, rd.Offset()) {
			if err := p.add(r); err != nil {
				return err
			}
		}
		p.a.Next = rd.at
	}
}

// errors gives the errors of the spool, in its order.
func (p *page) errors(s *state, j *job, f *os.File, v view) error {
	slices.Sort(v.errors)
	for _, off := range v.errors {
		r, err := readRecord(f, off, nil)
		if err != nil {
			return err
		}
		if s.points(j, r, off) {
			if err := p.add(r); err != nil {
				return err
			}
		}
		p.a.Next = off + 1
	}
	p.a.Next = max(p.a.Next, v.length)
	return nil
}

// add renders a record into the answer. Cursors may point into the middle of a record that was given: the errors are
// found by their offset.
func (p *page) add(rec Record) error {
	r, err := proto.DecodeResult(rec.Data)
	if err != nil {
		return err
	}
	n := len(p.a.Data)
	p.a.Data = proto.AppendLine(p.a.Data, r)
	return p.fits(n)
}

// fits takes back what was appended to n bytes of data where it is too much, and says so.
func (p *page) fits(n int) error {
	if int64(len(p.a.Data)) <= p.q.MaxBytes {
		return nil
	}
	if n > 0 {
		p.a.Data = p.a.Data[:n]
		return errFull
	}
	if len(p.a.Data) > proto.MaxPayload-answerOverhead {
		return errLong
	}
	return nil // one line is always given
}

// files gives the lines of a finished job's files.
func (p *page) files(done *proto.Progress) error {
	c := p.q.Cursor
	if p.q.Which == proto.WhichManifest {
		err := p.file(done.Manifest, c|cursorFile)
		p.a.Done = err == nil
		return err
	}
	if c == 0 {
		c = cursorFile
		if p.q.Which == proto.WhichErrors {
			c |= cursorErrors
		}
	}
	if c&cursorErrors == 0 {
		if err := p.file(done.Output, c); err != nil {
			return err
		}
		c = cursorFile | cursorErrors
		p.a.Next = c
	}
	if p.q.Which != proto.WhichOK {
		if err := p.file(done.ErrorFile, c); err != nil {
			return err
		}
	}
	p.a.Done = true
	return nil
}

// file gives the lines of one file from a cursor on.
func (p *page) file(path string, c int64) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open the job's file: %w", err)
	}
	defer f.Close()
	if _, err := f.Seek(c&cursorOffset, io.SeekStart); err != nil {
		return fmt.Errorf("read the job's file: %w", err)
	}
	r := bufio.NewReaderSize(f, 256<<10)
	for {
		line, err := r.ReadBytes('\n')
		if err != nil && err != io.EOF {
			return fmt.Errorf("read the job's file: %w", err)
		}
		n := len(p.a.Data)
		p.a.Data = append(p.a.Data, line...)
		if err := p.fits(n); err != nil {
			return err
		}
		c += int64(len(line))
		p.a.Next = c
		if err == io.EOF {
			return nil
		}
	}
}
