package main

import (
	"fmt"
	"strings"
	"testing"
	"unicode"

	"millrace/aggregator"
	"millrace/proto"
)

func ptr[T any](v T) *T { return &v }

// TestManyEngines: of fifty engines four have a row, and the rest one.
func TestManyEngines(t *testing.T) {
	var all []aggregator.Engine
	for i := range 50 {
		e := aggregator.Engine{Worker: fmt.Sprintf("w%02d", i), Version: "0.26.0", KVTokens: 1000, Lines: int64(100 + i), Flags: []string{"--seed", "1"},
			InFlight: ptr(int64(400 + i)), FullShare: ptr(float64(i+50) / 100), Preemptions: ptr(int64(2)), PreemptionsPerLine: ptr(0.01),
			GPUs: []aggregator.GPU{{Name: "H100"}, {Name: "H100"}}}
		switch i {
		case 0:
			e.InFlight, e.FullShare, e.Preemptions, e.Version = nil, nil, nil, ""
		case 48:
			e.OwnGPUs, e.Flags = true, nil
			e.Restarts = ptr(int64(0))
		case 49, 1, 2:
			e.Restarts, e.LastRestart, e.GivenUp = ptr(int64(3)), "oom", "no memory"
		}
		all = append(all, e)
	}
	var b strings.Builder
	printEngines(&b, all)
	want := `
  engine of  version         gpu  KV tok  lines       limit            full  pre-emptions  per line  restarts
        w49   0.26.0   worker's 2 × H100    1000    149         449           99.0%             2     0.010   3 (oom), given up
        w48   0.26.0      2 × H100    1000    148         448           98.0%             2     0.010         0
        w47   0.26.0   worker's 2 × H100    1000    147         447           97.0%             2     0.010         -
        w46   0.26.0   worker's 2 × H100    1000    146         446           96.0%             2     0.010         -
  46 others  several   worker's 2 × H100    1000   5635  401 to 445  51.0% to 95.0%            90     0.016         6, 2 given up
engine flags of w49, w47, w46: --seed 1
`
	squeeze := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	if squeeze(b.String()) != squeeze(want) || strings.Count(b.String(), "\n") != 8 {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
	b.Reset()
	printEngines(&b, nil)
	if b.String() != "" {
		t.Errorf("of nothing: %q", b.String())
	}
}

// TestControlCharacters: what engines and workers say of themselves breaks no row, and does nothing to a terminal.
func TestControlCharacters(t *testing.T) {
	const bad = "a\nb\x1b[2J\t\u009bc"
	w := proto.Worker{ID: bad, Engine: bad, Models: []string{bad}, State: proto.EngineReady, Reason: bad, LimitWhy: bad, LastError: bad}
	j := jobRow{Note: bad, Input: bad, Models: map[string]int64{bad: 1}, TopErrors: []topError{{Message: bad}}}
	o := overview{Jobs: []jobRow{j}, Workers: []workerRow{rowOfWorker(&w), rowOfWorker(&w)}, Queues: []queueRow{{Model: bad}}}
	var b strings.Builder
	if err := o.print(&b, true); err != nil {
		t.Fatal(err)
	}
	printEngines(&b, []aggregator.Engine{{Worker: bad, Kind: bad, Version: bad, GPUs: []aggregator.GPU{{Name: bad}}, Flags: []string{bad}}})
	if s := strings.ReplaceAll(b.String(), "\n", ""); strings.ContainsFunc(s, unicode.IsControl) || strings.Count(b.String(), "\nb") > 0 {
		t.Errorf("%q", b.String())
	}
}

// TestWorkersTable: a row and its notes, within 120 columns; what is not known is a dash.
func TestWorkersTable(t *testing.T) {
	ready := proto.Worker{ID: "gpu1-3kq8v0xz", Engine: "http://127.0.0.1:8000", Models: []string{"google/gemma-3-4b-it-qat-q4_0", "b", "c"}, State: proto.EngineReady,
		Limit: 409, InFlight: 402, OK: 51200, Failed: 17, LimitWhy: "KV used up to 94 %", Metered: true, KVUsage: 0.934, TokenRate: 9312.4, RateOf: proto.RateEngine,
		LastError: "HTTP 400: too long", LastErrorUS: 95e6}
	waiting := proto.Worker{ID: "gpu2-00000000", Engine: "http://a-name-that-is-long.example:8000", State: proto.EngineWaiting, Reason: "engine refuses connections", Limit: 8, LimitWhy: "not told"}
	answers := proto.Worker{ID: "w", Engine: "null:", State: proto.EngineReady, TokenRate: 5, RateOf: proto.RateAnswers}
	rows := []workerRow{rowOfWorker(&ready), rowOfWorker(&waiting), rowOfWorker(&answers)}
	var b strings.Builder
	if err := printWorkers(&b, rows); err != nil {
		t.Fatal(err)
	}
	want := `WORKER         STATE    MODEL                   IN FLIGHT  KV   TOK/S  OK     FAILED  ENGINE
gpu1-3kq8v0xz  ready    google/gemma-3-4b-… +2  402/409    93%  9312   51200  17      127.0.0.1:8000
  limit 409: KV used up to 94 %
  last error 1m35s ago: HTTP 400: too long
gpu2-00000000  waiting  -                       0/8        -    -      0      0       a-name-that-is-long.e…
  engine refuses connections
w              ready    -                       0/0        -    5*     0      0       null:
* of the answers to this worker: the engine tells no count of its tokens
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
	b.Reset()
	var many []workerRow
	for range manyWorkers + 1 {
		many = append(many, rowOfWorker(&ready))
	}
	if err := printWorkers(&b, many); err != nil {
		t.Fatal(err)
	}
	if s := b.String(); strings.Contains(s, "limit 409") || strings.Count(s, "last error") != len(many) {
		t.Errorf("%s", s)
	}
	for line := range strings.Lines(b.String()) {
		if n := len([]rune(line)); n > 120 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}
