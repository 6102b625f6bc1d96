package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"millrace/aggregator"
	"millrace/proto"
	"millrace/sim"
)

// writeInput writes n valid chat lines, each with a prompt of its own. edit may change a line.
func writeInput(t testing.TB, n int, edit func(i int, line string) string) string {
	t.Helper()
	var b bytes.Buffer
	for i := range n {
		line := inputLine(i)
		if edit != nil {
			line = edit(i, line)
		}
		b.WriteString(line + "\n")
	}
	name := filepath.Join(t.TempDir(), "input.jsonl")
	if err := os.WriteFile(name, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// inputLine is a line that is valid, another one for each i.
func inputLine(i int) string {
	return fmt.Sprintf(`{"custom_id":"id-%d","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[{"role":"user","content":"question %d of the mill race"}],"max_tokens":%d}}`, i, i, 4+i%5)
}

// want is what the oracle knows of an input.
type want struct {
	hash     map[string]string // custom_id → hash of its prompt
	lines    int               // all that count, those without a usable custom_id included
	nameless int               // of these, lines whose custom_id is unusable
}

func readInput(t testing.TB, name string) want {
	t.Helper()
	w := want{hash: map[string]string{}}
	eachLine(t, name, func(b []byte) {
		if b = bytes.TrimSuffix(bytes.TrimPrefix(b, []byte("\ufeff")), []byte("\r")); len(b) == 0 {
			return // no line
		}
		l, err := proto.ParseLine(b)
		w.lines++
		id := l.CustomID
		var le *proto.LineError
		if errors.As(err, &le) {
			id = le.CustomID
		}
		if _, twice := w.hash[id]; id == "" || twice || len(b) > proto.MaxPayload {
			w.nameless++
			return
		}
		if err != nil {
			w.hash[id] = "no answer"
			return
		}
		h, err := sim.PromptHash(l.Body)
		if err != nil {
			t.Fatal(err)
		}
		w.hash[l.CustomID] = h
	})
	return w
}

func eachLine(t testing.TB, name string, visit func([]byte)) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 32<<20)
	for sc.Scan() {
		visit(sc.Bytes())
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
}

// counts is what the oracle found in the files.
type counts struct{ ok, failed int }

// oracle closes every end-to-end test: every line of the input ended as exactly one line of the output or of the
// error file, each answer carries the hash of its own prompt, and the manifest says what is there.
func oracle(t testing.TB, input, output, failed, manifest string) counts {
	t.Helper()
	w := readInput(t, input)
	return audit(t, w, output, failed, manifest, func(id string, l *proto.OutputLine) bool {
		return strings.Contains(string(l.Response.Body), `"sim:`+w.hash[id]+` `)
	})
}

// audit is the oracle for any engine: own says whether an answer is the one to its line.
func audit(t testing.TB, w want, output, failed, manifest string, own func(id string, l *proto.OutputLine) bool) counts {
	t.Helper()
	seen := map[string]bool{}
	var c counts
	var tokens proto.Usage
	nameless := 0
	once := func(l *proto.OutputLine, file string) string {
		if l.CustomID == nil {
			if nameless++; file == "output" || l.Line == 0 {
				t.Errorf("%s: neither custom_id nor line number", file)
			}
			return ""
		}
		id := *l.CustomID
		if _, ok := w.hash[id]; !ok {
			t.Errorf("%s: %s is not in the input", file, id)
		}
		if seen[id] {
			t.Errorf("%s: %s is there twice", file, id)
		}
		seen[id] = true
		return id
	}
	eachLine(t, output, func(b []byte) {
		l := parseOutput(t, b)
		id := once(l, "output")
		c.ok++
		if l.Response == nil || l.Error != nil || l.Response.StatusCode != 200 {
			t.Errorf("%s: not an ok line: %s", id, b)
			return
		}
		if !own(id, l) {
			t.Errorf("%s: not the answer to its own prompt: %s", id, b)
		}
		u := proto.ReadUsage(l.Response.Body)
		tokens.Prompt += u.Prompt
		tokens.Completion += u.Completion
	})
	eachLine(t, failed, func(b []byte) {
		l := parseOutput(t, b)
		once(l, "errors")
		c.failed++
	})
	if len(seen)+nameless != w.lines || nameless != w.nameless {
		t.Errorf("%d lines and %d without custom_id ended, the input has %d and %d", len(seen), nameless, w.lines-w.nameless, w.nameless)
	}
	m, reasons, err := aggregator.Verify(manifest)
	if err != nil || len(reasons) > 0 {
		t.Fatalf("manifest: %v %v", reasons, err)
	}
	checkManifest(t, m, c, tokens)
	return c
}

func parseOutput(t testing.TB, b []byte) *proto.OutputLine {
	t.Helper()
	l, err := proto.ParseOutput(b)
	if err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return l
}

// oracleDir is the oracle for a folder of `millrace aggregate`.
func oracleDir(t testing.TB, input, dir string) counts {
	t.Helper()
	return oracle(t, input, filepath.Join(dir, "output.jsonl"), filepath.Join(dir, "errors.jsonl"), filepath.Join(dir, "manifest.json"))
}

// checkManifest compares the manifest with what was counted from the files here.
func checkManifest(t testing.TB, m *aggregator.Manifest, c counts, tokens proto.Usage) {
	t.Helper()
	if !m.Valid || m.Verdict != aggregator.Valid {
		t.Errorf("the manifest says %s: %v", m.Verdict, m.Reasons)
	}
	if m.Counts.OK != int64(c.ok) || m.Counts.Failed != int64(c.failed) {
		t.Errorf("the manifest counts %d ok and %d failed, the files hold %d and %d", m.Counts.OK, m.Counts.Failed, c.ok, c.failed)
	}
	if s := m.Statistics; s.InputTokens != tokens.Prompt || s.OutputTokens != tokens.Completion {
		t.Errorf("the manifest counts %d and %d tokens, the files hold %d and %d", s.InputTokens, s.OutputTokens, tokens.Prompt, tokens.Completion)
	}
}
