package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// showFinished prints a run that had finished before, if its files are still what was written: whatever became of them,
// nothing is run again unasked. output is where the caller wants the results; empty: wherever they are.
func (a *app) showFinished(ctx context.Context, job *proto.Job, manifest, output string, j *jobFlags) error {
	m, err := whole(job.ID, manifest)
	if err != nil {
		return err
	}
	files := m.Paths(manifest)
	if output != "" && output != files.Output {
		return usagef("job %s is finished, with results in %s; copy its files from there, or say --again to run it anew", job.ID, files.Output)
	}
	if err := a.intact(ctx, m, manifest); err != nil {
		return err
	}
	fmt.Fprintf(a.std.err, "job %s is %s; --again makes a fresh run\n", job.ID, shown(broker.StateFinished, outcome(progressOf(m))))
	if a.json {
		err = a.printJSON(m)
	} else {
		a.printManifest(m, files)
	}
	if err != nil {
		return err
	}
	return verdict(&broker.JobView{Job: *job, Progress: *progressOf(m)}, j)
}

// longCheck is how many bytes of files take so long to read that it is said.
const longCheck = 256 << 20

// intact reads the files of a finished run. The error says what is not as it was written.
func (a *app) intact(ctx context.Context, m *aggregator.Manifest, manifest string) error {
	if !m.Valid { // which says INVALID already
		return nil
	}
	if n := m.Files.Output.Bytes + m.Files.Errors.Bytes; n >= longCheck {
		fmt.Fprintf(a.std.err, "job %s is finished; checking its files, %s\n", m.Job.ID, broker.Size(n))
	}
	_, reasons, err := aggregator.VerifyContext(ctx, manifest)
	if err == nil && len(reasons) > 0 {
		err = fmt.Errorf("job %s is finished, but its files are INVALID by now: %s; `millrace verify %s` says all of it; %s", m.Job.ID, reasons[0], manifest, putBack)
	}
	return err
}

// whole reads the manifest of a finished run. The error says which of its files are gone; it does not look into them.
func whole(job, manifest string) (*aggregator.Manifest, error) {
	m, err := manifestOf(manifest, job)
	replaced := (*replacedError)(nil)
	switch {
	case errors.As(err, &replaced):
		return nil, fmt.Errorf("job %s is finished, but %w", job, err)
	case errors.Is(err, os.ErrNotExist):
		return nil, missing(job, manifest)
	case err != nil:
		return nil, fmt.Errorf("job %s is finished, but its manifest cannot be read: %w; %s", job, err, putBack)
	}
	files := m.Paths(manifest)
	var names []string
	if !exists(files.Output) {
		names = append(names, gone(files.Output, &m.Files.Output))
	}
	if !exists(files.Errors) {
		names = append(names, gone(files.Errors, &m.Files.Errors))
	}
	if len(names) > 0 {
		return nil, missing(job, names...)
	}
	return m, nil
}

const putBack = "put back what was written; else the same command with --again runs all lines anew"

func gone(name string, f *aggregator.FileFacts) string {
	if f.Bytes == 0 {
		name += " (an empty file)"
	}
	return name
}

func missing(job string, names ...string) error {
	return fmt.Errorf("job %s is finished, but %s gone; %s", job, are(names), putBack)
}

// are says: a is, a and b are.
func are(words []string) string {
	if len(words) == 1 {
		return words[0] + " is"
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " and " + words[last] + " are"
}

// finishedResults writes to w what the files of a finished run hold.
func finishedResults(k *kept, which string, w io.Writer) error {
	m, err := whole(k.Job, k.Manifest)
	if err != nil {
		return err
	}
	files := m.Paths(k.Manifest)
	for _, name := range map[string][]string{
		proto.WhichOK: {files.Output}, proto.WhichErrors: {files.Errors}, proto.WhichAll: {files.Output, files.Errors}, proto.WhichManifest: {files.Manifest},
	}[which] {
		f, err := os.Open(name)
		if err != nil {
			return fmt.Errorf("read results: %w", err)
		}
		_, err = io.Copy(w, f)
		f.Close()
		if err != nil {
			return fmt.Errorf("write results: %w", err)
		}
	}
	return nil
}

// forget removes what is kept under --data of a run that is over, and not its output files.
func (a *app) forget(k *kept, force bool) error {
	if state, _ := k.state(); !k.Finished && !force {
		return usagef("job %s is %s, and what it has done so far would be lost; say --force to forget it all the same", k.Job, state)
	}
	lock, err := broker.LockDir(k.dir)
	if errors.Is(err, broker.ErrInUse) { // as of a run that has noted its end and clears up
		return &busyError{k.Job}
	}
	if err != nil {
		return err
	}
	defer lock.Unlock()
	// Whoever comes now finds another folder, or none, and not one that is removed under his hands.
	gone := filepath.Join(filepath.Dir(k.dir), "."+filepath.Base(k.dir)+".removed")
	if err := errors.Join(os.RemoveAll(gone), os.Rename(k.dir, gone), os.RemoveAll(gone)); err != nil {
		return fmt.Errorf("forget job %s: %w", k.Job, err)
	}
	fmt.Fprintf(a.std.err, "removed %s: its folder %s; its output files stay where they are\n", k.Job, k.dir)
	return nil
}
