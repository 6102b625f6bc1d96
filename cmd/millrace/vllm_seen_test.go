//go:build vllm && linux

package main

import (
	"path/filepath"
	"testing"

	"github.com/go-json-experiment/json"

	"millrace/aggregator"
)

// TestRealEngineSeen: `worker --check` sees a real engine as it is, and so does the manifest of a job that it ran.
func TestRealEngineSeen(t *testing.T) {
	e := newVLLM(t)
	check := func(code int) (rows []checkRow) {
		p := startProc(t, "check", nil, "worker", "--check", "--json", "--engine", e.url())
		if got := p.wait(); got != code {
			t.Fatalf("check ends with %d, want %d: %s%s", got, code, p.out, p.err)
		}
		if err := json.Unmarshal([]byte(p.out.String()), &rows); err != nil || len(rows) != 1 {
			t.Fatalf("%v: %s", err, p.out)
		}
		return rows
	}
	if r := check(exitUnreachable)[0]; r.OK || r.Reason == "" || r.State != "waiting" {
		t.Errorf("before it is started: %+v", r)
	}
	e.start(t)
	r := check(exitOK)[0]
	if !r.OK || r.Version == "" || r.MaxLen != 2048 || !r.Metrics || r.KVTokens != 131072 || *r.Running != 0 || *r.Waiting != 0 ||
		r.Limit < 8 || len(r.Settings) == 0 || len(r.Queues) != 1 || r.Queues[0].Model != "tiny" {
		t.Errorf("ready: %+v", r)
	}
	input, want := realJob(t)
	dir := t.TempDir()
	manifest := filepath.Join(dir, "r.manifest.json")
	p := startProc(t, "run", nil, "run", input, "--engine", e.url(), "-o", filepath.Join(dir, "r.jsonl"), "--data", filepath.Join(dir, "d"), "--concurrency", "32")
	if code := p.wait(); code != exitSomeFailed {
		t.Fatalf("run ends with %d: %s", code, p.err)
	}
	audit(t, want, filepath.Join(dir, "r.jsonl"), filepath.Join(dir, "r.errors.jsonl"), manifest, ownAnswer)
	m, err := aggregator.ReadManifest(manifest)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Engines) != 1 {
		t.Fatalf("%d engines", len(m.Engines))
	}
	got := &m.Engines[0]
	if got.Version != r.Version || got.KVTokens != r.KVTokens || len(got.Flags) == 0 || got.Lines != realLines+realFailing || got.InFlight == nil || *got.InFlight != 32 ||
		got.Preemptions == nil || got.FullShare == nil || *got.FullShare < 0.5 {
		t.Errorf("in the manifest: %+v", got)
	}
	t.Logf("%+v, full %v of the time", got, *got.FullShare)
}
