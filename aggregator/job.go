package aggregator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// maxLines bounds the lines of a job; each takes 8 bytes of memory.
const maxLines = 1 << 28

// job is the state of one job. The lock of the fold guards it, but for what is said otherwise; once state is not
// FoldFolding any more, at and the spool's file do not change and may be read without it.
type job struct {
	spec *proto.Job
	dir  string
	// after is that of the spec at the broker. A broker that lost its disk may have another one than our spec.
	after int64

	state string  // one of proto's Fold constants
	at    []int64 // where a line's record begins in the spool, negative for an error; 0: the line has not ended
	left  int64   // lines that have not ended
	spool spool
	tally tally

	replaced int64       // errors that an ok replaced
	undone   proto.Usage // usage of these
	undoneOf losses      // the two above by model
	drops    dropped     // unlike the three above, not to be had from the spool
	first    uint64      // sequence of the job's first result in the present stream; 0: none yet, or not known
	durable  int64       // bytes of the spool that a checkpoint counts
	seal     int64       // of the spool, see newSeal; 0: made by an older program
	engines  engines     // what the workers of its results last said of their engines
	finished *proto.Progress
	note     string    // why the files cannot be written, for people
	failed   time.Time // when that was last found; the finisher's alone
	rate     Rate
	busy     busy
	base     look      // what of it is in no rate
	unsaved  bool      // differs from the last checkpoint
	met      bool      // engines has something that is not on disk
	unshown  bool      // differs from the last progress
	urgent   bool      // the progress is due now, however young the last one is
	shown    time.Time // when the progress was last put
	moving   bool      // it said that lines are coming
	doneAt   time.Time // when the files became whole, while this process looked
	followed time.Time // when someone last read on in the results while the job ran

	ctx  context.Context // ends when the job is deleted
	stop context.CancelFunc
}

// engines maps the id of a worker to what it said of its engine, see learn; nil until it was heard.
type engines map[string]*proto.Worker

// Names in a job's folder.
const (
	fileSpec  = "job.mp"     // proto.Job
	fileSpool = "spool"      // see spool
	fileAbout = "about.json" // about
	fileDone  = "done.mp"    // proto.Progress, once the files are whole
)

// about is what a job's folder holds beside its spec.
type about struct {
	Spool   int64           `json:"spool"` // its seal
	Engines []*proto.Worker `json:"engines,omitempty"`
}

// Began says whether an aggregator's folder holds a result of a job that is not finished.
func Began(dir, id string) bool {
	st, err := os.Stat(filepath.Join(jobsDir(dir), id, fileSpool))
	return err == nil && st.Size() > int64(len(spoolMagic))
}

// errBadJob says that a spec makes no sense.
var errBadJob = errors.New("the job cannot be folded")

// newJob checks a spec. It touches no disk.
func newJob(ctx context.Context, dir string, spec *proto.Job) (*job, error) {
	switch {
	case !validID(spec.ID):
		return nil, fmt.Errorf("%w: its id %q may hold letters, digits, - and _ only", errBadJob, spec.ID)
	case spec.Lines < 0 || spec.Lines > maxLines:
		return nil, fmt.Errorf("%w: %s has %d lines, at most %d are allowed; split the input", errBadJob, spec.ID, spec.Lines, maxLines)
	}
	j := &job{spec: spec, dir: dir, after: spec.After, state: proto.FoldFolding, left: spec.Lines, seal: newSeal(), engines: engines{}}
	j.spool.path = filepath.Join(dir, fileSpool)
	j.ctx, j.stop = context.WithCancel(ctx)
	return j, nil
}

// create makes the job's folder, so that an aggregator whose broker lost its disk still knows the job.
func (j *job) create() error {
	if err := broker.MakeDir(j.dir); err != nil {
		return fmt.Errorf("make the job's folder: %w", err)
	}
	b, err := j.spec.Encode()
	if err != nil {
		return err
	}
	if err := j.saveAbout(j.about()); err != nil {
		return err
	}
	return writeDurable(filepath.Join(j.dir, fileSpec), b)
}

// about renders what saveAbout writes.
func (j *job) about() about { return about{Spool: j.seal, Engines: j.engines.known()} }

// saveAbout needs no lock.
func (j *job) saveAbout(v about) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", fileAbout, err)
	}
	return writeDurable(filepath.Join(j.dir, fileAbout), b)
}

// loadAbout is best effort: what it cannot read is only missing from the manifest, and followers begin anew.
func (j *job) loadAbout() {
	b, err := os.ReadFile(filepath.Join(j.dir, fileAbout))
	if err != nil {
		return
	}
	var v about
	if json.Unmarshal(b, &v) != nil {
		return
	}
	j.seal = v.Spool & (spoolSeals - 1)
	for _, w := range v.Engines {
		if w != nil {
			j.engines[w.ID] = w
		}
	}
}

// errSpoolShort says that a spool holds less than the checkpoint promised, or damaged records.
var errSpoolShort = errors.New("the spool lost records")

// another notes that the spool holds other results than before: it lost some, which will come again behind the rest.
func (j *job) another() error {
	j.seal = newSeal()
	return j.saveAbout(j.about())
}

// restore reads the spool's first length bytes (all, where length is negative), cuts off the rest, and rebuilds what
// follows from the records. It returns errSpoolShort when some are lost; the others count all the same.
func (j *job) restore(ctx context.Context, length int64) error {
	j.at = make([]int64, j.spec.Lines)
	defer j.rebase()
	size, err := j.spoolSize()
	if err != nil {
		return err
	}
	if size == 0 {
		if length > 0 {
			return errSpoolShort
		}
		return nil
	}
	if err := j.spool.open(); err != nil {
		return err
	}
	unsure := length < 0
	if unsure {
		length = size
		if err := j.spool.renew(size); err != nil {
			return err
		}
	}
	j.spool.flushed = min(size, length) // the records of replaced errors are read again
	rd := NewSpoolReader(j.spool.file, min(size, length))
	strange, err := j.replay(ctx, rd)
	if err != nil {
		return err
	}
	if err := j.spool.cut(rd.End()); err != nil {
		return err
	}
	j.durable = rd.End()
	if unsure { // nobody knows what of it was synced
		j.durable = 0
		j.touch()
	}
	if rd.End() < length || rd.Damaged() > 0 || strange > 0 {
		return errSpoolShort
	}
	return nil
}

func (j *job) spoolSize() (int64, error) {
	st, err := os.Stat(j.spool.path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look at the spool: %w", err)
	}
	return st.Size(), nil
}

// replay takes the records of a spool in, and counts those that do not belong in it.
func (j *job) replay(ctx context.Context, rd *SpoolReader) (strange int64, err error) {
	for n := 0; ; n++ {
		if n%1024 == 0 && ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		rec, err := rd.Next()
		if err == io.EOF {
			return strange, nil
		}
		if err != nil {
			return 0, err
		}
		r, err := proto.DecodeResult(rec.Data)
		if errors.Is(err, proto.ErrNewerVersion) {
			return 0, fmt.Errorf("read the spool of job %s: %w; start that program again", j.spec.ID, err)
		}
		if err != nil || r.Job != j.spec.ID || r.Index != rec.Index || !j.holds(r.Index) {
			strange++
			continue
		}
		err = j.place(r, rd.Offset())
		if errors.Is(err, errMixedUp) {
			strange++
		} else if err != nil {
			return 0, err
		}
	}
}

func (j *job) holds(index int64) bool { return index >= 0 && index < j.spec.Lines }

// fate is what becomes of a result.
type fate int

const (
	fateFirst     fate = iota // it ends its line
	fateReplaces              // it is the ok of a line that had an error
	fateDuplicate             // the line had ended before
	fateLate                  // the files are final
)

// judge says what becomes of a result: the first ok wins, an ok replaces an error while the files are not final,
// nothing else replaces anything.
func (j *job) judge(index int64, ok bool) fate {
	switch {
	case j.state != proto.FoldFolding:
		return fateLate
	case j.at[index] == 0:
		return fateFirst
	case j.at[index] < 0 && ok:
		return fateReplaces
	}
	return fateDuplicate
}

// place counts a result that lies in the spool at off, if it is to count.
func (j *job) place(r *proto.Result, off int64) error {
	switch j.judge(r.Index, r.OK) {
	case fateFirst:
		j.left--
	case fateReplaces:
		if err := j.undo(r); err != nil {
			return err
		}
	default:
		return nil
	}
	if !r.OK {
		off = -off
	}
	j.at[r.Index] = off
	j.tally.add(r, 1)
	if _, ok := j.engines[r.Worker]; !ok && r.Worker != "" && len(j.engines) < maxKinds {
		j.engines[r.Worker] = nil
	}
	return nil
}

// undo takes back the error that r replaces. That error has no custom_id where whoever ended the line could not read it.
func (j *job) undo(r *proto.Result) error {
	old, err := j.result(r.Index)
	if err != nil {
		return err
	}
	if old.CustomID != "" && old.CustomID != r.CustomID {
		return fmt.Errorf("line %d: %w: it was %q and now is %q", r.Index, errMixedUp, old.CustomID, r.CustomID)
	}
	j.tally.add(old, -1)
	j.replaced++
	addUsage(&j.undone, old.Usage, 1)
	j.undoneOf.add(old.Model, loss{Replaced: 1, Wasted: old.Usage})
	return nil
}

var (
	// errMixedUp says that two results of one line name different lines: one of them is another line's.
	errMixedUp = errors.New("the custom_id of the line changed")
	// errReload says that memory and disk may differ: what lies on disk must be read again.
	errReload = errors.New("the state on disk must be read again")
)

// result reads the result that counts for a line that has ended.
func (j *job) result(index int64) (*proto.Result, error) {
	rec, err := j.spool.record(max(j.at[index], -j.at[index]))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errReload, err)
	}
	r, err := proto.DecodeResult(rec.Data)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errReload, err)
	}
	return r, nil
}

// told says whether the message of that timestamp is the one that counts for the line: the stream is being folded
// again, and it is no duplicate of anything.
func (j *job) told(index, timestamp int64) bool {
	rec, err := j.spool.record(max(j.at[index], -j.at[index]))
	return err == nil && rec.Time == timestamp
}

// rateWindow is that of the rates that a progress tells.
const rateWindow = 15 * time.Second

// rebase leaves what has ended so far out of the rates.
func (j *job) rebase() {
	j.base = look{lines: j.tally.ok + j.tally.failed, tokens: j.tally.usage.Completion}
}

// touch notes that the job changed.
func (j *job) touch() { j.unsaved, j.unshown = true, true }

// progress renders the job for people. note says why the fold as a whole does not go on.
func (j *job) progress(pos position, host, note string) *proto.Progress {
	if j.finished != nil {
		p := *j.finished
		p.Late, p.Stream, p.Seq, p.After = j.drops.Late, pos.Stream, int64(pos.Seq), j.after
		addUsage(&p.Wasted, j.drops.LateWasted, 1)
		return &p
	}
	p := &proto.Progress{
		State: j.state, Lines: j.spec.Lines, Duplicates: j.drops.Duplicates, Late: j.drops.Late,
		Stream: pos.Stream, Seq: int64(pos.Seq), Host: host, Note: note, After: j.after,
	}
	if j.note != "" {
		p.Note = j.note
	}
	p.Wasted = j.wasted()
	addUsage(&p.Wasted, j.drops.LateWasted, 1)
	j.tally.fill(p)
	p.BusyUS, p.BeforeLines, p.BeforeTokens = j.busy.sum(), j.base.lines, j.base.tokens
	now := time.Now()
	j.rate.Add(now, p, false)
	p.RateLines, p.RateTokens, _ = j.rate.Per(now, rateWindow)
	return p
}

// wasted is the usage of the results that came before the files were final and do not count.
func (j *job) wasted() proto.Usage {
	u := j.drops.Wasted
	addUsage(&u, j.undone, 1)
	return u
}
