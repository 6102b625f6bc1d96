package producer

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/cespare/xxhash/v2"

	"millrace/proto"
)

// Dataset is a scanned input. Its lines can be read again from any goroutine until Close.
type Dataset struct {
	Lines    int64  // that count: each becomes one line of the output or the error file
	Invalid  int64  // of these, the ones that will not run
	Bytes    int64  // of the plain input, up to the last line that counts where there is a limit
	SHA256   string // of the same, hex
	Problems []LineProblem

	in    Input
	rules rules
	src   *source
	table *table
	order *order
}

// Models counts the valid lines by model.
func (d *Dataset) Models() []proto.ModelLines {
	var out []proto.ModelLines
	for _, g := range d.groups() {
		out = append(out, proto.ModelLines{Model: g.model, Lines: g.n})
	}
	return out
}

// groups are the parts of the order that run.
func (d *Dataset) groups() []group {
	gs := d.order.groups
	if len(gs) > 0 && gs[len(gs)-1].model == "" {
		gs = gs[:len(gs)-1]
	}
	return gs
}

// invalid is the part of the order that does not run.
func (d *Dataset) invalid() group {
	if gs := d.order.groups; len(gs) > 0 && gs[len(gs)-1].model == "" {
		return gs[len(gs)-1]
	}
	return group{}
}

// Close lets go of the files. The plain copy of an input that cannot be read twice stays where its job has not ended,
// so that it can be continued: that copy is the same job.
func (d *Dataset) Close() error {
	d.drop()
	return d.src.close()
}

func (d *Dataset) drop() {
	if d.table != nil {
		d.table.f.Close() // nameless, gone with it
	}
	if d.order != nil {
		d.order.f.Close() // as well
	}
}

// ended says that the job of this dataset needs its input no more.
func (d *Dataset) ended() { d.src.done = true }

// Job is the job that this dataset is, before anything is known of earlier ones (see Create).
func (d *Dataset) Job() proto.Job {
	host, _ := os.Hostname() // empty where the system does not tell
	path := d.in.Path
	if path != "-" {
		if abs, err := filepath.Abs(path); err == nil {
			path = abs
		}
	}
	return proto.Job{
		ID: d.id(), Name: d.in.Name, Input: path, Host: host, SHA256: d.SHA256, Bytes: d.Bytes, Lines: d.Lines,
		Invalid: d.Invalid, Models: d.Models(), Override: d.in.Override, MaxAttempts: d.in.MaxAttempts,
		TimeoutMS: d.in.TimeoutMS, CreatedMS: time.Now().UnixMilli(), MaxErrors: d.in.MaxErrors,
		LifetimeMS: d.in.LifetimeMS, Program: d.in.Program, SkipInvalid: d.in.SkipInvalid, Lane: d.in.Lane, Limit: d.in.Limit,
		InputOrder: d.in.InputOrder,
	}
}

// id is a slug of the file's name and a hash of the content and of all that changes requests, and of the name that the
// user gave. What only changes how the job is run (lane, thresholds, lifetime) is not part of it, nor are compression
// and --skip-invalid: with invalid lines there is no job without it. The order is, because owners note how far they came
// in it.
func (d *Dataset) id() string {
	h := sha256.New()
	parts := []string{d.SHA256, d.in.Override, d.in.Name, strconv.FormatInt(d.in.Limit, 10),
		strconv.FormatInt(d.in.MaxAttempts, 10), strconv.FormatInt(d.in.TimeoutMS, 10)}
	if d.in.InputOrder {
		parts = append(parts, "input order")
	}
	for _, s := range parts {
		fmt.Fprintf(h, "%d:%s,", len(s), s)
	}
	return proto.Slug(d.src.base, 40) + "-" + hex.EncodeToString(h.Sum(nil))[:10]
}

// scratch is the memory of one reader of lines; its zero value is ready.
type scratch struct {
	text []byte
	rows rows
}

// text reads the text of a line and checks that it is still the same.
func (d *Dataset) text(r record, w *scratch) ([]byte, error) {
	n := int(r.length)
	if cap(w.text) < n {
		w.text = make([]byte, n, n+n/4)
	}
	text := w.text[:n]
	_, err := d.src.file.ReadAt(text, r.offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read %s: %w", d.src.name, err)
	}
	if err != nil || xxhash.Sum64(text) != r.hash {
		return nil, fmt.Errorf("%s, line %d: %w", d.src.name, r.line, ErrChanged)
	}
	return text, nil
}

// line reads line i again, counted from 0 over the lines that count, in memory that the returned line points into. Its
// error is a LineProblem for a line that is not valid, and ErrChanged where the file was edited.
func (d *Dataset) line(i int64, w *scratch) (proto.Line, error) {
	r, err := d.table.near(i, &w.rows)
	if err != nil {
		return proto.Line{}, err
	}
	if r.flags&flagLong != 0 {
		return proto.Line{}, &LineProblem{Line: r.line, Message: d.rules.tooLong(int64(r.length) + d.rules.reserve)}
	}
	text, err := d.text(r, w)
	if err != nil {
		return proto.Line{}, err
	}
	l, id, wrong := d.rules.parse(text)
	switch {
	case r.flags&flagInvalid == 0 && wrong == "":
		return l, nil
	case r.flags&flagDuplicate != 0:
		id, wrong, err = d.twice(r, id, wrong)
	case wrong == "":
		wrong = fmt.Sprintf("names one more model than the %s that a job may have", commas(maxModels))
	}
	if err != nil {
		return l, err
	}
	return l, &LineProblem{Line: r.line, CustomID: id, Message: wrong}
}

// twice says what is wrong with a duplicate, which has no custom_id that can be used.
func (d *Dataset) twice(r record, id, wrong string) (string, string, error) {
	if wrong != "" {
		return "", wrong, nil
	}
	before, err := d.table.get(int64(r.ref))
	return "", duplicateOf(id, before.line), err
}

// request renders the request for a line.
func (d *Dataset) request(job *proto.Job, i int64, w *scratch) ([]byte, error) {
	l, err := d.line(i, w)
	if err != nil {
		return nil, err
	}
	q := proto.Request{Job: job.ID, Index: i, CustomID: l.CustomID, URL: l.URL, Model: d.rules.model(&l),
		Body: l.BodyFor(d.rules.override), MaxAttempts: job.MaxAttempts, TimeoutMS: job.TimeoutMS, Run: job.Run()}
	return q.Encode()
}

// ending renders the result of a line that will not run. Where the dataset is out of reach (nil) its names come from its
// request, if that is known. A line that cannot be read any more, and one that nothing is known of, end without their
// custom_id rather than not at all.
func ending(d *Dataset, q *proto.Request, job *proto.Job, i int64, code, message string, w *scratch) ([]byte, error) {
	res := proto.Result{Job: job.ID, Index: i, Code: code, Message: message, Run: job.Run()}
	switch {
	case d != nil:
		if err := d.name(&res, w); err != nil {
			return nil, err
		}
	case q != nil:
		res.CustomID, res.URL, res.Model = q.CustomID, q.URL, q.Model
	}
	return res.Encode()
}

// name fills in what is known of the line. An invalid one ends as such, whatever else is the matter.
func (d *Dataset) name(res *proto.Result, w *scratch) error {
	r, err := d.table.near(res.Index, &w.rows)
	if err != nil {
		return err
	}
	res.Line = r.line
	l, err := d.line(res.Index, w)
	var p *LineProblem
	switch {
	case errors.As(err, &p):
		res.CustomID, res.Code, res.Message = p.CustomID, proto.CodeInvalidRequest, p.Message
	case err == nil:
		res.CustomID, res.URL, res.Model = l.CustomID, l.URL, d.rules.model(&l)
	}
	return nil
}
