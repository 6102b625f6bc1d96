package millrace_test

import (
	"bytes"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// allowed is the order of imports between the rooms, one way. Rooms on one level meet only in NATS.
var allowed = map[string][]string{
	"proto":        {},
	"broker":       {"proto"},
	"producer":     {"proto", "broker"},
	"worker/load":  {"proto"},
	"worker":       {"proto", "broker", "worker/load"},
	"aggregator":   {"proto", "broker"},
	"sim":          {"proto", "broker"},
	"vllm":         {"proto"},
	"cmd/millrace": {"proto", "broker", "producer", "worker", "aggregator", "sim", "vllm"},
	"bench":        {}, // it measures the program from outside
}

// TestLayers keeps the rooms apart. Tests of a room from outside (package x_test) may use the simulated engine.
func TestLayers(t *testing.T) {
	seen := map[string]bool{}
	walk(t, func(path, room string) {
		want, ok := allowed[room]
		if !ok {
			t.Errorf("%s: %q is not a room; docs/design.md lists them", path, room)
			return
		}
		seen[room] = true
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		outside := strings.HasSuffix(f.Name.Name, "_test")
		for _, imp := range f.Imports {
			name, _ := strconv.Unquote(imp.Path.Value) // the parser has checked it
			to, ours := strings.CutPrefix(name, "millrace/")
			if ours && to != room && !slices.Contains(want, to) && !(outside && to == "sim") {
				t.Errorf("%s: %s must not import %s", path, room, to)
			}
		}
	})
	for room := range allowed {
		if !seen[room] {
			t.Errorf("room %s is gone; mend this list", room)
		}
	}
}

// TestFileLength keeps files short enough to live in.
func TestFileLength(t *testing.T) {
	walk(t, func(path, _ string) {
		n, err := lines(path)
		if err != nil {
			t.Fatal(err)
		}
		if n > 500 {
			t.Errorf("%s has %d lines, more than 500: the design wants a change", path, n)
		}
	})
}

func walk(t *testing.T, visit func(path, room string)) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != "." || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if !d.IsDir() && strings.HasSuffix(path, ".go") && filepath.Dir(path) != "." {
			visit(path, filepath.ToSlash(filepath.Dir(path)))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func lines(path string) (int, error) {
	b, err := os.ReadFile(path)
	return bytes.Count(b, []byte{'\n'}), err
}
