package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/go-json-experiment/json"
	"github.com/google/renameio/v2"
	"github.com/nats-io/nats.go"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// place is the folder of one job of `millrace run`.
type place struct {
	dir      string
	finished string // manifest of a run that is finished; empty: it is not
}

// memo is what stays in the folder of a job: enough to find its files again.
type memo struct {
	Job      string `json:"job"`
	Input    string `json:"input"`
	SHA256   string `json:"sha256"`
	Manifest string `json:"manifest"`
	Finished bool   `json:"finished"`
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

// place finds the folder of the job. again takes the first run of it that is not finished. A run whose files were
// taken away is not finished.
func (a *app) place(job *proto.Job, again bool) (*place, error) {
	base := job.ID
	for n := int64(1); ; n++ {
		if n > 1 {
			job.ID, job.Again = fmt.Sprintf("%s-r%d", base, n), n-1
		}
		p := &place{dir: a.runDir(job.ID)}
		m, err := readMemo(p.dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("read the job's folder: %w", err)
		}
		if err != nil || !m.Finished {
			return p, nil
		}
		if again {
			continue
		}
		next := a.runDir(fmt.Sprintf("%s-r%d", base, n+1))
		if exists(filepath.Join(next, memoFile)) { // the newest run is the one that counts
			continue
		}
		if filesStand(m.Manifest) {
			p.finished = m.Manifest
			return p, nil
		}
		if err := os.RemoveAll(p.dir); err != nil {
			return nil, fmt.Errorf("clear the job's folder: %w", err)
		}
		return p, nil
	}
}

// filesStand says whether the manifest of a finished run and the files that it names are where they were written.
func filesStand(manifest string) bool {
	m, err := aggregator.ReadManifest(manifest)
	if err != nil {
		return false
	}
	files := m.Paths(manifest)
	return exists(files.Output) && exists(files.Errors)
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
	return p.write(memo{Job: job.ID, Input: job.Input, SHA256: job.SHA256, Manifest: files.Manifest})
}

// finish marks the job as finished and drops its queues and spools.
func (p *place) finish(a *app, files aggregator.Files) {
	m, err := readMemo(p.dir)
	if err == nil {
		m.Finished, m.Manifest = true, files.Manifest
		err = p.write(m)
	}
	for _, sub := range []string{"broker", "aggregate", "worker", "endpoint.json"} {
		if err == nil {
			err = os.RemoveAll(filepath.Join(p.dir, sub))
		}
	}
	if err != nil {
		a.log.Warn("clear the job's folder", "error", err)
	}
}

// nameOlder tells of an unfinished job of the same file whose content was another.
func (a *app) nameOlder(job *proto.Job) {
	dirs, _ := filepath.Glob(filepath.Join(a.data, "run", "*")) // the pattern is well formed
	for _, d := range dirs {
		if m, err := readMemo(d); err == nil && m.Input == job.Input && m.SHA256 != job.SHA256 && job.Input != "-" {
			fmt.Fprintf(a.std.err, "note: %s has changed since job %s; this is a new job\n", filepath.Base(job.Input), m.Job)
		}
	}
}

// watchRun follows a job that another process of this machine runs.
func (a *app) watchRun(ctx context.Context, job *proto.Job, dir string, j *jobFlags) error {
	e, err := readEndpoint(dir)
	if err != nil {
		return fmt.Errorf("job %s is being started by another process; try again", job.ID)
	}
	conn, err := a.connectTo(ctx, broker.Access{URL: e.URL, Token: e.Token}, "control", controlWait)
	if err != nil {
		return err
	}
	defer conn.Close()
	fmt.Fprintf(a.std.err, "job %s is run by process %d; watching it\n", job.ID, e.PID)
	wctx, gone := context.WithCancel(ctx) // with the process goes its broker
	defer gone()
	lost := conn.NC.StatusChanged(nats.RECONNECTING, nats.CLOSED)
	defer conn.NC.RemoveStatusListener(lost)
	if !conn.NC.IsConnected() { // before it could be told
		gone()
	}
	go func() {
		select {
		case <-lost:
			gone()
		case <-wctx.Done():
		}
	}()
	v, err := a.watch(wctx, conn, *job, func(v *broker.JobView) bool { return v.State() == broker.StateFinished })
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil && wctx.Err() == nil {
		return err
	}
	if v.State() != broker.StateFinished {
		if m, err := readMemo(dir); err == nil && m.Finished {
			return a.showFinished(job, m.Manifest, j)
		}
		return fmt.Errorf("the process that ran job %s is gone; the same command continues", job.ID)
	}
	return a.finish(ctx, conn, &v, j)
}
