package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// summary prints the end of a job: its verdict, a row per model, its failures, and where its files lie. conn may be nil
// where they lie here.
func (a *app) summary(ctx context.Context, conn *broker.Conn, v *broker.JobView) error {
	p := &v.Progress
	m, err := a.manifest(ctx, conn, v)
	if gone := (*replacedError)(nil); errors.As(err, &gone) { // what it was is not what lies there
		return fmt.Errorf("job %s is finished, but %w", v.Job.ID, err)
	}
	if err != nil { // the job is finished all the same
		fmt.Fprintf(a.std.err, "%s  job %s: %s, %d ok, %d failed; its manifest is not to be had: %v\n",
			p.Verdict, v.Job.ID, count(v.Job.Lines, "line"), p.OK, p.Failed, err)
		if a.json {
			return a.printJSON(rowOfJob(v))
		}
		return nil
	}
	if a.json {
		return a.printJSON(m)
	}
	a.printManifest(m, aggregator.Files{Output: p.Output, Errors: p.ErrorFile, Manifest: p.Manifest})
	if !here(p) {
		fmt.Fprintf(a.std.out, "on %s; read them from here with: millrace results %s\n", p.Host, v.Job.ID)
	}
	return nil
}

// here says whether the files of a job lie on this machine.
func here(p *proto.Progress) bool {
	host, _ := os.Hostname() // empty where it fails, for the aggregator as well
	return p.Host == host && exists(p.Manifest)
}

// manifest reads the manifest of a finished job, or asks the aggregator for it.
func (a *app) manifest(ctx context.Context, conn *broker.Conn, v *broker.JobView) (*aggregator.Manifest, error) {
	if conn == nil || here(&v.Progress) {
		return manifestOf(v.Progress.Manifest, v.Job.ID)
	}
	var b bytes.Buffer
	if err := a.copyResults(ctx, conn, v.Job.ID, proto.WhichManifest, false, &b); err != nil {
		return nil, err
	}
	return aggregator.ParseManifest(b.Bytes())
}

// progressOf is how far a job is whose manifest is m.
func progressOf(m *aggregator.Manifest) *proto.Progress {
	return &proto.Progress{State: proto.FoldDone, OK: m.Counts.OK, Failed: m.Counts.Failed, Verdict: m.Verdict, Errors: kindsOf(m)}
}

func (a *app) printManifest(m *aggregator.Manifest, files aggregator.Files) {
	w := a.std.out
	fmt.Fprintf(w, "\n%s  job %s: %s, %d ok, %d failed, %s\n", m.Verdict, m.Job.ID, count(m.Input.Lines, "line"), m.Counts.OK, m.Counts.Failed, took(&m.Statistics.Figures))
	for _, r := range m.Reasons {
		fmt.Fprintln(w, "  ", plain(r))
	}
	if simulated(m) {
		fmt.Fprintln(w, "the text is simulated: no model ran, and the figures are the simulator's")
	}
	printFigures(w, m.Statistics)
	if s := cuts(m.Statistics.ContextCut); s != "" {
		fmt.Fprintln(w, s)
	}
	printEngines(w, m.Engines)
	if s := repeats(&m.Statistics.Dropped.Losses); s != "" {
		fmt.Fprintln(w, s)
	}
	if m.Counts.Failed > 0 {
		fmt.Fprintln(w)
	}
	failures(w, kindsOf(m))
	fmt.Fprintf(w, "\noutput    %s\nerrors    %s\nmanifest  %s\n", files.Output, files.Errors, files.Manifest)
}

func kindsOf(m *aggregator.Manifest) (out []proto.ErrorCount) {
	for _, f := range m.Statistics.Failures {
		out = append(out, proto.ErrorCount(f))
	}
	return out
}

func simulated(m *aggregator.Manifest) bool {
	for _, e := range m.Engines {
		if e.Simulated {
			return true
		}
	}
	return false
}

// printFigures prints a row for each model, and one for all where there are several.
func printFigures(w io.Writer, s *aggregator.Statistics) {
	rows := [][]string{{"model", "ok", "failed", "attempts", "prompt tok", "output tok", "out tok/s", "total tok/s", "steady out tok/s", "steady total tok/s", "p50 s", "p95 s"}}
	for i := range s.ByModel {
		rows = append(rows, figures(modelName(s.ByModel[i].Model), &s.ByModel[i].Figures))
	}
	if len(s.ByModel) > 1 {
		rows = append(rows, figures("all", &s.Figures))
	}
	table(w, rows)
}

// table prints rows under the first of them, without the columns of which nothing is known.
func table(w io.Writer, rows [][]string) {
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw)
	for _, row := range rows {
		for c, cell := range row {
			if slices.ContainsFunc(rows[1:], func(r []string) bool { return r[c] != unknown }) {
				fmt.Fprint(tw, plain(cell), "\t")
			}
		}
		fmt.Fprintln(tw)
	}
	_ = tw.Flush() // to the same writer as what follows; what fails here fails there
}

func figures(name string, f *aggregator.Figures) []string {
	steadyOut, steadyTotal := unknown, unknown
	if f.Steady != nil {
		steadyOut, steadyTotal = fmt.Sprintf("%.0f", f.Steady.OutputThroughput), fmt.Sprintf("%.0f", f.Steady.TotalThroughput)
	}
	return []string{name, fmt.Sprint(f.Completed), fmt.Sprint(f.Failed), fmt.Sprint(f.Attempts), fmt.Sprint(f.InputTokens), fmt.Sprint(f.OutputTokens),
		figure(f.OutputThroughput, 1, 0), figure(f.TotalThroughput, 1, 0), steadyOut, steadyTotal, figure(f.P50MS, 1000, 3), figure(f.P95MS, 1000, 3)}
}

// cuts says how many answers the engine cut without an error; empty: none.
func cuts(n int64) string {
	if n == 0 {
		return ""
	}
	return count(n, "answer") + " ended with fewer tokens than the line asked for: they end at the engine's context, or at a limit of its own; give such lines a smaller max_tokens, or the engine a longer context or a larger limit"
}

// repeats says what came and does not count, with its tokens; empty: nothing.
func repeats(l *aggregator.Losses) string {
	var parts []string
	if l.Duplicates > 0 {
		parts = append(parts, count(l.Duplicates, "result")+" of lines that had ended before")
	}
	if l.Replaced > 0 {
		parts = append(parts, count(l.Replaced, "error")+" of lines that ended ok after all")
	}
	if len(parts) == 0 {
		return ""
	}
	s := "not counted above: " + strings.Join(parts, ", ")
	if l.WastedTokens > 0 {
		s += fmt.Sprintf(", with %d prompt and %d output tokens", l.WastedInputTokens, l.WastedOutputTokens)
	}
	return s
}

// unknown stands where a figure is not known.
const unknown = "-"

// took prints how long it was, and how much of that the rates leave out.
func took(f *aggregator.Figures) string {
	s := fmt.Sprintf("%.1f s", f.Duration)
	if f.Idle > 0 {
		s += fmt.Sprintf(" (of which idle %.1f s, with nothing at an engine that it answered; rates are over the rest)", f.Idle)
	}
	return s
}

// figure prints what may not be known.
func figure(v *float64, unit float64, digits int) string {
	if v == nil {
		return unknown
	}
	return fmt.Sprintf("%.*f", digits, *v/unit)
}
