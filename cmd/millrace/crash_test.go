//go:build crashpoints

package main

import (
	"compress/gzip"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"millrace/broker"
	"millrace/proto"
	"millrace/sim"
)

// crash is one named place where a role dies, and the kind of job that passes it.
type crash struct {
	point string
	role  string // process that dies: worker, aggregator, producer or serve
	job   string // "", or what the job must have: retries, detach, invalid, gzip, purge
}

var crashes = []crash{
	{"worker.after-fetch", "worker", ""},
	{"worker.after-engine:7", "worker", ""},
	{"worker.after-puback:7", "worker", ""},
	{"worker.after-republish", "worker", "retries"},
	{"worker.after-ack:7", "worker", ""},
	{"agg.spool-written", "aggregator", ""},
	{"agg.checkpoint-before-rename", "aggregator", ""},
	{"agg.checkpoint-after-rename", "aggregator", ""},
	{"agg.checkpoint-after-rename:2", "aggregator", ""},
	{"agg.before-purge", "serve", ""},
	{"agg.after-purge", "serve", ""},
	{"agg.output-before-rename", "aggregator", ""},
	{"agg.output-after-rename", "aggregator", ""},
	{"agg.errors-after-rename", "aggregator", ""},
	{"agg.manifest-before-rename", "aggregator", ""},
	{"agg.manifest-after-rename", "aggregator", ""},
	{"agg.before-spool-delete", "aggregator", ""},
	{"producer.job-put", "producer", ""},
	{"producer.batch-sent", "producer", ""},
	{"producer.cursor-written", "producer", ""},
	{"producer.invalid-published", "producer", "invalid"},
	{"producer.input-before-rename", "producer", "gzip"},
	{"producer.resend", "producer", "purge"},
	{"adopt.lease-taken", "aggregator", "detach"},
	{"adopt.downloaded", "aggregator", "detach"},
	{"adopt.before-delete", "aggregator", "detach"},
}

// TestCrashPoints dies at each named place once, starts the dead role again, and asks the oracle.
func TestCrashPoints(t *testing.T) {
	for _, c := range crashes {
		t.Run(c.point, func(t *testing.T) { crashOnce(t, c) })
	}
}

func crashOnce(t *testing.T, c crash) {
	f := newFleet(t)
	input, file, args := crashInput(t, c.job)
	cfg := slow()
	if c.job == "retries" {
		cfg.Faults.Errors = map[int]float64{500: 0.2}
	}
	if c.job == "purge" {
		cfg.Faults.Hang = true
	}
	e := newEngine(t, cfg)
	point := "MILLRACE_CRASH=" + c.point
	roles := map[string]func() *proc{
		"broker": f.broker, "aggregator": f.aggregate, "serve": f.serve,
		"worker":   func() *proc { return f.worker(1, e) },
		"producer": func() *proc { return f.produce(file, args...) },
	}
	order := []string{"broker", "aggregator", "worker", "producer"}
	if c.role == "serve" {
		order = []string{"serve", "worker", "producer"}
	}
	procs := map[string]*proc{}
	for _, r := range order {
		if r == c.role {
			f.env = []string{point}
		}
		procs[r] = roles[r]()
		f.env = nil
	}
	if c.job == "purge" {
		loseQueue(t, f, e)
	}
	if code := procs[c.role].wait(); code != -1 {
		t.Fatalf("%s ended with %d before it came to %s\n%s", c.role, code, c.point, procs[c.role].err)
	}
	procs[c.role] = roles[c.role]()
	code := procs["producer"].wait()
	if c.job == "detach" {
		f.finished(killLines)
	} else if code != exitOK && code != exitSomeFailed {
		t.Fatalf("the producer ended with %d\n%s", code, procs["producer"].err)
	}
	oracleDir(t, input, f.output())
}

// crashInput writes the input; file is what the producer reads.
func crashInput(t *testing.T, job string) (input, file string, args []string) {
	t.Helper()
	switch job {
	case "invalid":
		input = writeInput(t, killLines, func(i int, line string) string {
			if i%50 == 49 {
				return strings.TrimSuffix(line, "}") + `,"custom_id":"twice"}`
			}
			return line
		})
		return input, input, []string{"--skip-invalid"}
	case "detach":
		input = writeInput(t, killLines, nil)
		return input, input, []string{"--detach"}
	case "gzip":
		input = writeInput(t, killLines, nil)
		return input, gzipped(t, input), nil
	}
	input = writeInput(t, killLines, nil)
	return input, input, nil
}

func gzipped(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "input.jsonl.gz")
	w, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	z := gzip.NewWriter(w)
	if _, err := z.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out
}

// loseQueue takes the waiting requests away behind everyone's back, and lets the engine go on.
func loseQueue(t *testing.T, f *fleet, e *testEngine) {
	t.Helper()
	conn := f.connect(t.Context())
	defer conn.Close()
	f.until(func(v *broker.JobView) bool { return v.Feed.State == proto.FeedWaiting })
	if err := broker.Purge(context.WithoutCancel(t.Context()), conn.JS, proto.RequestStream("m"), ">"); err != nil {
		t.Fatal(err)
	}
	if err := e.SetFaults(sim.Faults{}); err != nil {
		t.Fatal(err)
	}
}
