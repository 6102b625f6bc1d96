package producer

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ErrEmpty is returned for an input without a single line.
var ErrEmpty = errors.New("the input has no lines")

// ErrChanged is returned when a line is not what it was when the file was scanned.
var ErrChanged = errors.New("the file changed while it was in use; start again: what it holds now is a new job")

// BadFile is the error of an input that is not there, or that cannot be unpacked.
type BadFile struct{ err error }

func (e *BadFile) Error() string { return e.err.Error() }
func (e *BadFile) Unwrap() error { return e.err }

func badFile(format string, args ...any) error { return &BadFile{fmt.Errorf(format, args...)} }

// maxProblems is how many invalid lines are listed; the rest is counted.
const maxProblems = 1000

// LineProblem is a line that is not valid.
type LineProblem struct {
	Line     int64  // of the input, from 1
	CustomID string // where it has one that can be used
	Message  string
}

func (p *LineProblem) Error() string { return fmt.Sprintf("line %d: %s", p.Line, p.Message) }

// InvalidInput is the error for an input with invalid lines.
type InvalidInput struct {
	Errors []LineProblem // by line, at most 1,000
	Total  int64
	Lines  int64 // of the input, the invalid ones included
}

// Error shows the first few problems; callers that have room show Errors.
func (e *InvalidInput) Error() string {
	const shown = 5
	var b strings.Builder
	fmt.Fprintf(&b, "input has %s invalid lines, nothing was enqueued", commas(e.Total))
	if e.Total == 1 {
		b.Reset()
		b.WriteString("input has an invalid line, nothing was enqueued")
	}
	for _, p := range e.Errors[:min(shown, len(e.Errors))] {
		b.WriteString("\n  " + p.Error())
	}
	if e.Total > shown {
		b.WriteString("\n  …")
	}
	b.WriteString("\nmend them, or let them end as error lines (--skip-invalid)")
	return b.String()
}

// problems collects invalid lines: the first ones by line, and how many there are.
type problems struct {
	list  []LineProblem
	total int64
}

func (p *problems) add(v LineProblem) {
	p.total++
	p.list = append(p.list, v)
	if len(p.list) >= 2*maxProblems {
		p.cut()
	}
}

func (p *problems) cut() {
	slices.SortStableFunc(p.list, func(a, b LineProblem) int { return cmp.Compare(a.Line, b.Line) })
	p.list = slices.Clip(p.list[:min(len(p.list), maxProblems)])
}

// aliens counts what no line of JSONL is that somebody got wrong.
type aliens struct{ lines, nul, objects int64 }

// aliensFrom is how many lines at the beginning tell that an input is no JSONL.
const aliensFrom = 100

func (a *aliens) add(p *parsed) {
	switch {
	case p.alien:
		a.lines++
	case p.object:
		a.objects++
	}
	if p.nul {
		a.nul++
	}
}

// all says whether none of so many lines is a JSON object and nearly all are aliens; by chance a few of a binary file begin
// as one.
func (a *aliens) all(of int64) bool { return a.objects == 0 && a.lines >= of-of/20 }
