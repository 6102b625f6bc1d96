package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// files are where the results of a run go: results.jsonl, results.errors.jsonl, results.manifest.json.
func (r *runFlags) files(input string) (aggregator.Files, error) {
	out := r.output
	if out == "" {
		name := input
		if input == "-" {
			name = "stdin.jsonl"
		}
		out = trimKnown(name) + ".results.jsonl"
	}
	for _, end := range []string{".errors.jsonl", ".manifest.json"} {
		if base, ok := strings.CutSuffix(out, end); ok {
			return aggregator.Files{}, usagef("-o %s ends as what is written beside the output of -o %s.jsonl; give another -o", out, base)
		}
	}
	out, err := filepath.Abs(out)
	if err != nil {
		return aggregator.Files{}, fmt.Errorf("find the output folder: %w", err)
	}
	return filesOf(strings.TrimSuffix(out, ".jsonl"), out), nil
}

func filesOf(base, output string) aggregator.Files {
	return aggregator.Files{Output: output, Errors: base + ".errors.jsonl", Manifest: base + ".manifest.json"}
}

// usable says why the files of a run cannot be written where they should.
func usable(f *aggregator.Files, input string) error {
	in, inErr := os.Stat(input)
	for _, name := range []string{f.Output, f.Errors, f.Manifest} {
		st, err := os.Stat(name)
		switch {
		case err != nil:
		case st.IsDir():
			return usagef("%s is a folder; give a file, such as -o %s", name, filepath.Join(name, "results.jsonl"))
		case !st.Mode().IsRegular() || strings.HasPrefix(name, "/dev/"): // a device would be replaced by a file
			return usagef("%s is no regular file; give another -o", name)
		case inErr == nil && os.SameFile(st, in):
			return usagef("%s is the input; give another -o", name)
		}
	}
	dir := filepath.Dir(f.Output)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return usagef("the output folder %s is not there; make it, or give another -o", dir)
	}
	return writable(dir, "-o")
}

// take makes the files of a run its own until the lock is let go of. Where its user named none, neither the results of
// another job nor those that another run is about to write are written over. Else it is said that what lies there will
// be, and another run that writes there is the error.
func (a *app) take(f aggregator.Files, job *proto.Job, named bool) (aggregator.Files, *broker.Lock, error) {
	who := fmt.Sprintf("job %s (process %d, --data %s)", job.ID, os.Getpid(), a.data)
	lock, err := hold(&f, who)
	var taken *takenError
	if errors.As(err, &taken) && !named {
		return a.aside(f, job, taken.why, who)
	}
	if err != nil {
		return f, nil, err
	}
	m, err := aggregator.ReadManifest(f.Manifest) // now that nobody else writes there
	if err != nil {
		a.sayOver(f, aggregator.Files{})
		return f, lock, nil
	}
	f.Over = m.Job.ID
	if family(m.Job.ID, m.Job.Again) == family(job.ID, job.Again) {
		a.sayOver(f, m.Paths(f.Manifest))
		return f, lock, nil
	}
	if !named {
		lock.Unlock()
		return a.aside(f, job, "holds the results of job "+m.Job.ID, who)
	}
	fmt.Fprintf(a.std.err, "note: %s holds the results of job %s; they are written over when this job is finished\n", m.Paths(f.Manifest).Output, m.Job.ID)
	a.sayOver(f, m.Paths(f.Manifest))
	return f, lock, nil
}

// sayOver says which files will be written over that are none of known.
func (a *app) sayOver(f, known aggregator.Files) {
	var there []string
	for _, name := range []string{f.Output, f.Errors, f.Manifest} {
		if exists(name) && name != known.Output && name != known.Errors && name != known.Manifest {
			there = append(there, name)
		}
	}
	if len(there) == 1 {
		fmt.Fprintf(a.std.err, "note: %s there; it is written over when this job is finished\n", are(there))
	} else if len(there) > 1 {
		fmt.Fprintf(a.std.err, "note: %s there; they are written over when this job is finished\n", are(there))
	}
}

// aside takes files that are named by the job, beside those that are another's.
func (a *app) aside(f aggregator.Files, job *proto.Job, why, who string) (aggregator.Files, *broker.Lock, error) {
	base := filepath.Join(filepath.Dir(f.Output), job.ID+".results")
	next := filesOf(base, base+".jsonl")
	lock, err := hold(&next, who)
	if err != nil {
		return next, nil, err
	}
	fmt.Fprintf(a.std.err, "note: %s %s; those of this one go to %s\n", f.Output, why, next.Output)
	if m, err := aggregator.ReadManifest(next.Manifest); err == nil {
		next.Over = m.Job.ID
	}
	return next, lock, nil
}

// hold locks the files of a run. That somebody else has them, or nobody can, is a takenError.
func hold(f *aggregator.Files, who string) (*broker.Lock, error) {
	lock, err := broker.LockBeside(f.Manifest, who)
	var held *broker.Holder
	switch {
	case errors.As(err, &held):
		return nil, coded{&takenError{f.Output, "is being written by " + cmp.Or(held.Who, "another run"), "or run this again when that one has ended"}, exitUsage}
	case errors.Is(err, fs.ErrPermission):
		return nil, coded{&takenError{f.Output, "cannot be locked: " + err.Error(), "in a folder of yours"}, exitUsage}
	case err != nil:
		return nil, fmt.Errorf("hold %s: %w", f.Output, err)
	}
	return lock, nil
}

// takenError says why the files of a run cannot be ours, and what to do beside giving others.
type takenError struct{ path, why, hint string }

func (e *takenError) Error() string {
	return fmt.Sprintf("%s %s; give another -o, %s", e.path, e.why, e.hint)
}

// manifestOf reads the manifest of a job that was written to path. It is an error that another job's lies there by now.
func manifestOf(path, job string) (*aggregator.Manifest, error) {
	m, err := aggregator.ReadManifest(path)
	if err == nil && m.Job.ID != job {
		return nil, &replacedError{path, m.Job.ID}
	}
	return m, err
}

// replacedError says that the results of a job were written over by those of another one.
type replacedError struct{ path, by string }

func (e *replacedError) Error() string {
	return fmt.Sprintf("its files are gone, %s is the manifest of job %s; the same command with another -o and --again runs all lines anew", e.path, e.by)
}

// family is the id of a job's first run.
func family(id string, again int64) string {
	if again > 0 {
		return strings.TrimSuffix(id, proto.RunID("", again+1))
	}
	return id
}

func trimKnown(name string) string {
	for _, ext := range []string{".gz", ".zst", ".jsonl", ".json"} {
		name = strings.TrimSuffix(name, ext)
	}
	return name
}
