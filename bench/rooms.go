package main

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// rooms runs the benchmarks of single rooms: Go's own, with the broker inside the process.
func (c *config) rooms(ctx context.Context, t *table) error {
	for _, b := range []struct{ title, name, room, benchtime, goal string }{
		{"scan of the input (pass 1)", "BenchmarkScan", "./producer", "1s", ""},
		{"enqueue", "BenchmarkEnqueue/sync=1s", "./producer", "1s", "goal 50,000"},
		{"enqueue, `--sync always`", "BenchmarkEnqueue/sync=always", "./producer", "1s", "goal 10,000"},
		{"fold with spool and checkpoints", "BenchmarkFold", "./aggregator", "300000x", ""},
		{"read from the broker and fold", "BenchmarkReadAndFold", "./aggregator", "300000x", ""},
	} {
		pattern := "^" + strings.ReplaceAll(b.name, "/", "$/^") + "$"
		say("%s of %s, %d times", b.name, b.room, c.runs)
		said, err := output(ctx, "go", "test", "-run", "^$", "-bench", pattern, "-benchtime", b.benchtime, "-count", strconv.Itoa(c.runs), b.room)
		if err != nil {
			return err
		}
		rates, err := readRates(said)
		if err != nil {
			return err
		}
		t.add(b.title+", lines/s", rates, b.goal, "`go test -run '^$' -bench '"+pattern+"' -benchtime "+b.benchtime+" "+b.room+"`")
	}
	return nil
}

var goRate = regexp.MustCompile(`(?m)^Benchmark\S+\s.*?\s([0-9.e+]+) (?:lines|results)/s`)

// readRates finds the rates in what a Go benchmark prints.
func readRates(said string) ([]float64, error) {
	var out []float64
	for _, m := range goRate.FindAllStringSubmatch(said, -1) {
		v, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no rate in:\n%s", said)
	}
	return out, nil
}
