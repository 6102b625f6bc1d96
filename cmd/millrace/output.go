package main

import (
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
		case inErr == nil && os.SameFile(st, in):
			return usagef("%s is the input; give another -o", name)
		}
	}
	dir := filepath.Dir(f.Output)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return usagef("the output folder %s is not there; make it, or give another -o", dir)
	}
	return writable(dir)
}

// take makes the files of a run its own until the lock is let go of. Where its user named none, neither the results of
// another job nor those that another run is about to write are written over. Else it is said that what lies there will
// be, and another run that writes there is the error.
func (a *app) take(f aggregator.Files, job *proto.Job, named bool) (aggregator.Files, *broker.Lock, error) {
	who := fmt.Sprintf("job %s (process %d, --data %s)", job.ID, os.Getpid(), a.data)
	lock, err := broker.LockBeside(f.Manifest, who)
	var held *broker.Holder
	switch {
	case errors.As(err, &held) && named:
		return f, nil, usagef("%s is being written by %s; give another -o, or run this again when that one has ended", f.Output, held.Who)
	case errors.As(err, &held):
		return a.aside(f, job, "is being written by "+held.Who, who)
	case err != nil:
		return f, nil, fmt.Errorf("hold %s: %w", f.Output, err)
	}
	m, err := aggregator.ReadManifest(f.Manifest) // now that nobody else writes there
	if err != nil {
		if exists(f.Output) {
			fmt.Fprintf(a.std.err, "note: %s is there; it is written over when this job is finished\n", f.Output)
		}
		return f, lock, nil
	}
	f.Over = m.Job.ID
	if family(m.Job.ID, m.Job.Again) == family(job.ID, job.Again) {
		return f, lock, nil
	}
	if !named {
		lock.Unlock()
		return a.aside(f, job, "holds the results of job "+m.Job.ID, who)
	}
	fmt.Fprintf(a.std.err, "note: %s holds the results of job %s; they are written over when this job is finished\n", f.Output, m.Job.ID)
	return f, lock, nil
}

// aside takes files that are named by the job, beside those that are another's.
func (a *app) aside(f aggregator.Files, job *proto.Job, why, who string) (aggregator.Files, *broker.Lock, error) {
	base := filepath.Join(filepath.Dir(f.Output), job.ID+".results")
	next := filesOf(base, base+".jsonl")
	fmt.Fprintf(a.std.err, "note: %s %s; those of this one go to %s\n", f.Output, why, next.Output)
	lock, err := broker.LockBeside(next.Manifest, who)
	if err != nil {
		return next, nil, usagef("%s is being written by another run (%w); give -o", next.Output, err)
	}
	if m, err := aggregator.ReadManifest(next.Manifest); err == nil {
		next.Over = m.Job.ID
	}
	return next, lock, nil
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
	return fmt.Sprintf("its files are gone, %s is the manifest of job %s; the same command with another -o runs it again", e.path, e.by)
}

// family is the id of a job's first run.
func family(id string, again int64) string {
	if again > 0 {
		return strings.TrimSuffix(id, fmt.Sprintf("-r%d", again+1))
	}
	return id
}

func trimKnown(name string) string {
	for _, ext := range []string{".gz", ".zst", ".jsonl", ".json"} {
		name = strings.TrimSuffix(name, ext)
	}
	return name
}
