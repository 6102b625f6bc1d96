package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// sample is one run of one job.
type sample struct {
	rate float64          // lines per second from the first result to the last, by the broker's clock
	wall time.Duration    // of the whole command, `run` or `produce`: from reading the input to files that are checked
	use  map[string]usage // by process
	wrk  asked            // of the server, just before
}

// cpu is the time of all processes.
func (s sample) cpu() (sum time.Duration) {
	for _, u := range s.use {
		sum += u.cpu
	}
	return sum
}

// inFlight is how many requests are at the server at once, and wrk's connections.
const inFlight = 256

// inOne runs a job in one process, with an engine that answers at once.
func (c *config) inOne(ctx context.Context, name string, lines int) (s sample, err error) {
	in, err := c.input(lines)
	if err != nil {
		return s, err
	}
	dir := filepath.Join(c.dir, "one")
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return s, err
	}
	args := []string{"run", in, "--engine", "null:", "--concurrency", "512", "--data", filepath.Join(dir, "data"), "-o", filepath.Join(dir, "out.jsonl")}
	began := time.Now()
	p, err := c.role(ctx, name, "run", args...)
	if err != nil {
		return s, err
	}
	u, err := p.wait()
	if err != nil {
		return s, err
	}
	s.wall, s.use = time.Since(began), map[string]usage{"run": u}
	s.rate, err = c.check(ctx, filepath.Join(dir, "out.manifest.json"), lines)
	return s, err
}

// apart runs a job with a process for each role, over HTTP with the fixed server.
func (c *config) apart(ctx context.Context, name string, lines int) (s sample, err error) {
	in, err := c.input(lines)
	if err != nil {
		return s, err
	}
	f := &fleet{c: c, name: name, dir: filepath.Join(c.dir, "apart")}
	defer func() { err = errors.Join(err, f.abandon()) }()
	if err := f.start(ctx); err != nil {
		return s, err
	}
	began := time.Now()
	p, err := f.add(ctx, "produce", "produce", in, "--nats", f.nats)
	if err != nil {
		return s, err
	}
	<-p.over
	s.wall = time.Since(began)
	if s.use, err = f.end(); err != nil {
		return s, err
	}
	found, err := filepath.Glob(filepath.Join(f.dir, "out", "*", "manifest.json"))
	if err != nil || len(found) != 1 {
		return s, fmt.Errorf("%d manifests where one should be", len(found))
	}
	s.rate, err = c.check(ctx, found[0], lines)
	return s, err
}

// check wants the job to be VALID and every line of it to be ok, and returns its lines per second.
func (c *config) check(ctx context.Context, manifest string, lines int) (float64, error) {
	said, err := output(ctx, c.bin, "verify", manifest)
	if err != nil {
		return 0, err
	}
	if strings.TrimSpace(said) != "VALID" {
		return 0, fmt.Errorf("verify says %q", said)
	}
	b, err := os.ReadFile(manifest)
	if err != nil {
		return 0, err
	}
	var m struct {
		Counts      struct{ OK int }
		FirstResult time.Time `json:"first_result"`
		LastResult  time.Time `json:"last_result"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return 0, fmt.Errorf("read the manifest: %w", err)
	}
	if m.Counts.OK != lines {
		return 0, fmt.Errorf("%d of %d lines are ok", m.Counts.OK, lines)
	}
	return float64(lines) / m.LastResult.Sub(m.FirstResult).Seconds(), nil
}

// fleet is a process for each role and for the server.
type fleet struct {
	c     *config
	name  string // of the measurement, for profiles
	dir   string
	nats  string
	procs []*process // in the order of their start
}

// roles are those of a fleet, as the table lists them; server is the fixed one.
var roles = []string{"broker", "aggregate", "worker", "produce", server}

const server = "server"

var (
	addressSaid = regexp.MustCompile(`(http://\S+)`)
	natsSaid    = regexp.MustCompile(`NATS_URL=(\S+)`)
)

// start starts everything but the producer, and returns when the worker is ready.
func (f *fleet) start(ctx context.Context) error {
	srv, err := startServer(ctx)
	if err != nil {
		return err
	}
	f.procs = append(f.procs, srv.process)
	b, err := f.add(ctx, "broker", "broker", "--addr", "127.0.0.1:0")
	if err != nil {
		return err
	}
	if f.nats, err = b.says(ctx, &b.err, natsSaid); err != nil {
		return err
	}
	if _, err := f.add(ctx, "aggregate", "aggregate", "--nats", f.nats, "--output", filepath.Join(f.dir, "out")); err != nil {
		return err
	}
	if _, err := f.add(ctx, "worker", "worker", "--nats", f.nats, "--engine", srv.url, "--concurrency", strconv.Itoa(inFlight)); err != nil {
		return err
	}
	for { // there is no event to wait for from outside
		said, err := output(ctx, f.c.bin, "status", "--json", "--nats", f.nats)
		if err != nil {
			return err
		}
		var st struct{ Workers []struct{ State string } }
		if err := json.Unmarshal([]byte(said), &st); err != nil {
			return fmt.Errorf("read the status: %w", err)
		}
		if len(st.Workers) == 1 && st.Workers[0].State == "ready" {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// add starts a role, with a data folder of its own.
func (f *fleet) add(ctx context.Context, name string, args ...string) (*process, error) {
	p, err := f.c.role(ctx, f.name, name, append(args, "--data", filepath.Join(f.dir, name))...)
	if err == nil {
		f.procs = append(f.procs, p)
	}
	return p, err
}

// end stops everything, the last first, and returns what each took.
func (f *fleet) end() (map[string]usage, error) {
	use := map[string]usage{}
	for i := len(f.procs) - 1; i >= 0; i-- {
		p := f.procs[i]
		u, err := p.end()
		if err != nil {
			return nil, err
		}
		use[p.name] = u
	}
	return use, nil
}

// abandon kills what still runs and removes the folder.
func (f *fleet) abandon() error {
	for _, p := range f.procs {
		p.kill()
	}
	return os.RemoveAll(f.dir)
}

// started is the fixed server as a process.
type started struct {
	*process
	url string
}

func startServer(ctx context.Context) (*started, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	p, err := start(ctx, server, self, "serve")
	if err != nil {
		return nil, err
	}
	url, err := p.says(ctx, &p.out, addressSaid)
	if err != nil {
		p.kill()
		return nil, err
	}
	return &started{p, url}, nil
}
