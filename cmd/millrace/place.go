package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/google/renameio/v2"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// place is the folder of one job of `millrace run`.
type place struct {
	dir      string
	finished string // manifest of a run that is finished, where it was written; empty: it is not
	known    bool   // the job was run before
}

// memo is what stays in the folder of a job: enough to find its files again.
type memo struct {
	Job      string `json:"job"`
	Name     string `json:"name,omitempty"`
	Input    string `json:"input"`
	SHA256   string `json:"sha256"`
	Limit    int64  `json:"limit,omitempty"`
	Output   string `json:"output,omitempty"`
	Manifest string `json:"manifest"`
	Finished bool   `json:"finished"`
	Halted   bool   `json:"halted,omitempty"` // and not started again since
}

const memoFile = "job.json"

func (a *app) runDir(job string) string { return filepath.Join(a.data, "run", job) }

func readMemo(dir string) (memo, error) {
	var m memo
	b, err := os.ReadFile(filepath.Join(dir, memoFile))
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(b, &m)
}

// place finds the folder of the job: that of its newest run. again takes another one when that is finished, or was halted.
func (a *app) place(job *proto.Job, again bool) (*place, error) {
	base, n := job.ID, a.newestRun(job.ID)
	job.ID, job.Again = proto.RunID(base, n), n-1
	p := &place{dir: a.runDir(job.ID)}
	m, err := readMemo(p.dir)
	switch p.known = err == nil; {
	case errors.Is(err, os.ErrNotExist): // the first
	case err != nil:
		return nil, fmt.Errorf("read the job's folder: %w", err)
	case again && (m.Finished || m.Halted):
		job.ID, job.Again = proto.RunID(base, n+1), n
		p.dir = a.runDir(job.ID)
	case m.Finished:
		p.finished = m.Manifest
	}
	return p, nil
}

// newestRun is the number of the newest run of a job that is kept; 1 where none is.
func (a *app) newestRun(base string) int64 {
	newest := int64(1)
	dirs, _ := os.ReadDir(a.runDir("")) // where there is none, nothing is kept
	for _, d := range dirs {
		after, ok := strings.CutPrefix(d.Name(), base+"-r")
		n, err := strconv.ParseInt(after, 10, 64)
		if ok && err == nil && n > newest && exists(filepath.Join(a.runDir(d.Name()), memoFile)) {
			newest = n
		}
	}
	return newest
}

func (p *place) write(m memo) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(filepath.Join(p.dir, memoFile), b, 0o644); err != nil {
		return fmt.Errorf("write the job's folder: %w", err)
	}
	return nil
}

func (p *place) remember(job *proto.Job, files aggregator.Files) error {
	return p.write(memo{Job: job.ID, Name: job.Name, Input: job.Input, SHA256: job.SHA256, Limit: job.Limit, Output: files.Output, Manifest: files.Manifest})
}

// halted notes that too much failed: the same command goes on, and --again begins anew.
func (p *place) halted(a *app) {
	m, err := readMemo(p.dir)
	if err == nil {
		m.Halted = true
		err = p.write(m)
	}
	if err != nil {
		a.log.Warn("write the job's folder", "error", err)
	}
}

// finish marks the job as finished, with the manifest that was written, and drops its queues and spools.
func (p *place) finish(a *app, manifest string) {
	m, err := readMemo(p.dir)
	if err == nil {
		m.Finished, m.Manifest = true, manifest
		err = p.write(m)
	}
	for _, sub := range []string{"broker", "aggregate", "endpoint.json"} {
		if err == nil {
			err = os.RemoveAll(filepath.Join(p.dir, sub))
		}
	}
	if err != nil {
		a.log.Warn("clear the job's folder", "error", err)
	}
}

// nameOlder tells of the newest job of the same file of which something ran, where its content was another. One of another
// --limit had other lines, too, but tells nothing of the file.
func (a *app) nameOlder(job *proto.Job) {
	for _, k := range a.kept() { // the newest first
		if k.Input != job.Input || k.Limit != job.Limit || job.Input == "-" || !k.Finished && !aggregator.Began(filepath.Join(k.dir, "aggregate"), k.Job) {
			continue
		}
		if k.SHA256 != job.SHA256 {
			a.sayOlder(k.Job, job)
		}
		return
	}
}

// sayOlder names an older job of the same file as a new one.
func (a *app) sayOlder(older string, job *proto.Job) {
	fmt.Fprintf(a.std.err, "note: %s was changed since job %s; this is a new job\n", filepath.Base(job.Input), older)
}

// watchRun follows a job that another process of this machine runs, to its end or to that of the process. Where the
// folder comes free and the job is finished, or nobody ran it, as when its results were read, it is the caller's, with
// the lock. output is where the caller wants the results; empty: wherever they are.
func (a *app) watchRun(ctx context.Context, job *proto.Job, dir, output string, j *jobFlags) (*broker.Lock, error) {
	said := 0
	defer a.watched.Store(0)
	for n := 1; ; n++ {
		if e, err := readEndpoint(dir); err == nil { // else the process is starting, or about to end
			if output != "" && e.Output != "" && e.Output != output {
				return nil, usagef("job %s is run by process %d, with results in %s; watch that with -o %s, or give this one another --name", job.ID, e.PID, e.Output, e.Output)
			}
			v, err := a.watchAt(ctx, e, job, func() {
				if said != e.PID {
					said = e.PID
					a.watched.Store(int64(e.PID))
					fmt.Fprintf(a.std.err, "job %s is run by process %d; watching it\n", job.ID, e.PID)
				}
			})
			switch {
			case ctx.Err() != nil:
				return nil, context.Cause(ctx)
			case err != nil:
				return nil, err
			case v.State() == broker.StateFinished:
				return nil, a.finish(ctx, nil, &v, j)
			}
		}
		// Its broker ends before the process has written down how the job ended: that is known when the process is gone.
		lock, err := broker.LockDir(dir)
		if err == nil {
			if m, err := readMemo(dir); said == 0 || err == nil && m.Finished {
				return lock, nil
			}
			lock.Unlock()
			return nil, fmt.Errorf("the process that ran job %s is gone; the same command continues", job.ID)
		}
		if !errors.Is(err, broker.ErrInUse) {
			return nil, err
		}
		if n == 10 && said == 0 { // about a second; one that starts is quicker
			fmt.Fprintf(a.std.err, "job %s is in use by another process; waiting for it\n", job.ID)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// watchAt shows a job until it is finished, or its broker is gone or cannot be reached. It calls there where it can.
func (a *app) watchAt(ctx context.Context, e endpoint, job *proto.Job, there func()) (broker.JobView, error) {
	conn, err := a.connectTo(ctx, e.access(), "control", time.Second)
	if err != nil {
		return broker.JobView{}, nil
	}
	defer conn.Close()
	there()
	v, err := a.watch(ctx, conn, *job, func(v *broker.JobView) bool { return v.State() == broker.StateFinished })
	if errors.Is(err, broker.ErrClosed) {
		err = nil
	}
	return v, err
}
