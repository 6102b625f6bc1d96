//go:build vllm && linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"millrace/aggregator"
	"millrace/proto"
)

// realAsked are lines to a real engine, of one token a byte and 2,048 of context, and how each ends: with a code, or, where
// that is empty, with an answer.
var realAsked = []struct{ id, url, body, code, says string }{
	{"fine", "/v1/chat/completions", `"messages":[{"role":"user","content":"Hi"}],"max_tokens":8`, "", ""},
	{"over-long", "/v1/chat/completions", `"messages":[{"role":"user","content":"` + strings.Repeat("long ", 500) + `"}]`, proto.CodeContextLength, "maximum context length is 2048"},
	{"cut", "/v1/completions", `"prompt":"` + strings.Repeat("x", 2000) + `","max_tokens":100,"ignore_eos":true`, "", ""},
	{"schema", "/v1/chat/completions", `"messages":[{"role":"user","content":"Hi"}],"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":"wrong"}}}`, proto.CodeInvalidRequest, "Invalid type: wrong"},
	{"type", "/v1/chat/completions", `"messages":7`, proto.CodeInvalidRequest, "not iterable"},
	{"choices", "/v1/completions", `"prompt":["a","b"],"n":2,"max_tokens":4`, "", ""},
}

// TestRealEngineRows holds rows of docs/measurements/trouble.md against a real vLLM: what it refuses, what it cuts, and
// another model at its address.
func TestRealEngineRows(t *testing.T) {
	e := newVLLM(t)
	t.Run("Refused", func(t *testing.T) { refused(t, e) })
	t.Run("OtherModel", func(t *testing.T) {
		r := newRealRun(t, e)
		r.spread(r.serve)
		r.midway()
		send(t, e.cmd.Process.Pid, syscall.SIGTERM)
		r.let()
		e.end(t)
		e.start(t, "--served-model-name", "another")
		poll(t, "the worker sees what is served now", func() bool {
			return strings.Contains(printed(t, r.fleet, "status", "--json"), `"models":["another"]`)
		})
		e.end(t)
		e.start(t)
		r.audit()
	})
}

// printed returns what a command prints.
func printed(t *testing.T, f *fleet, args ...string) string {
	p := f.start(args[0], args...)
	if code := p.wait(); code != exitOK {
		t.Fatalf("%v ended with %d: %s", args, code, p.err)
	}
	return strings.Join(strings.Fields(p.out.String()), "")
}

func refused(t *testing.T, e *realVLLM) {
	e.start(t)
	f := newFleet(t)
	var input strings.Builder
	for _, a := range realAsked {
		fmt.Fprintf(&input, `{"custom_id":%q,"method":"POST","url":%q,"body":{"model":"tiny",%s}}`+"\n", a.id, a.url, a.body)
	}
	name, base := f.path("asked.jsonl"), f.path("results")
	if err := os.WriteFile(name, []byte(input.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	if code := f.start("run", "run", name, "--engine", e.url(), "--data", f.path("data"), "-o", base+".jsonl").wait(); code != exitSomeFailed {
		t.Fatalf("it ended with %d", code)
	}
	m, err := aggregator.ReadManifest(base + ".manifest.json")
	if err != nil {
		t.Fatal(err)
	}
	if s := m.Statistics; s.ContextCut != 1 || s.Attempts != int64(len(realAsked)) || !m.Valid {
		t.Errorf("%d cut, %d attempts for %d lines, valid %v", s.ContextCut, s.Attempts, len(realAsked), m.Valid)
	}
	lines := map[string]*proto.OutputLine{}
	for _, file := range []string{base + ".jsonl", base + ".errors.jsonl"} {
		eachLine(t, filepath.Clean(file), func(b []byte) {
			l := parseOutput(t, b)
			lines[*l.CustomID] = l
		})
	}
	for _, a := range realAsked {
		l := lines[a.id]
		switch {
		case l == nil || l.Response == nil:
			t.Errorf("%s: %+v", a.id, l)
		case (l.Response.StatusCode == 200) != (a.code == "") || !strings.Contains(string(l.Response.Body), a.says):
			t.Errorf("%s: HTTP %d %s", a.id, l.Response.StatusCode, l.Response.Body)
		}
	}
	for _, k := range m.Statistics.Failures {
		t.Logf("%s %d: %s", k.Code, k.Status, k.Message)
	}
}
