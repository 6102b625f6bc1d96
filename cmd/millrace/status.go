package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"millrace/broker"
	"millrace/producer"
	"millrace/proto"
)

// overview is what `status --json` prints.
type overview struct {
	Jobs    []jobRow              `json:"jobs"`
	Workers []workerRow           `json:"workers"`
	Queues  []queueRow            `json:"queues"`
	Shared  []broker.SharedEngine `json:"shared_engines,omitempty"` // that several workers run lines on
	Kept    []keptRow             `json:"kept,omitempty"`           // only where there is nobody to ask: runs on this machine that no process has
}

type jobRow struct {
	ID         string           `json:"id"`
	Name       string           `json:"name,omitempty"`
	State      string           `json:"state"`
	Outcome    string           `json:"outcome,omitempty"` // of a finished job that was not left to run: cancelled, expired
	Note       string           `json:"note,omitempty"`
	Want       string           `json:"want,omitempty"` // what a user last asked of it: run, pause or cancel
	Reason     string           `json:"reason,omitempty"`
	By         string           `json:"by,omitempty"`
	Lines      int64            `json:"lines"`
	OK         int64            `json:"ok"`
	Failed     int64            `json:"failed"`
	Enqueued   int64            `json:"enqueued"`
	Resent     int64            `json:"resent"`
	Duplicates int64            `json:"duplicates"`
	ContextCut int64            `json:"context_cut"`
	Prompt     int64            `json:"prompt_tokens"`
	Completion int64            `json:"completion_tokens"`
	RateLines  float64          `json:"lines_per_second"`
	RateTokens float64          `json:"output_tokens_per_second"`
	Input      string           `json:"input"`
	SHA256     string           `json:"sha256"`
	Models     map[string]int64 `json:"models"`
	Host       string           `json:"results_host,omitempty"`
	Output     string           `json:"output,omitempty"`
	Errors     string           `json:"errors,omitempty"`
	Manifest   string           `json:"manifest,omitempty"`
	Verdict    string           `json:"verdict,omitempty"`
	TopErrors  []topError       `json:"top_errors,omitempty"`
}

type topError struct {
	Code     string `json:"code"`
	Status   int64  `json:"status,omitempty"`
	Count    int64  `json:"count"`
	CustomID string `json:"custom_id"`
	Message  string `json:"message"`
	Line     int64  `json:"line,omitempty"`
	Mixed    bool   `json:"mixed,omitempty"` // the messages of these lines differ
}

type queueRow struct {
	Model    string `json:"model"`
	Waiting  int64  `json:"waiting"`
	HandedTo int64  `json:"handed_out"`
	Bytes    int64  `json:"bytes"`
	MaxBytes int64  `json:"max_bytes"`
}

func rowOfJob(v *broker.JobView) jobRow {
	p := &v.Progress
	r := jobRow{
		ID: v.Job.ID, Name: v.Job.Name, State: v.State(), Outcome: outcome(p), Note: note(v), Lines: v.Job.Lines, OK: p.OK, Failed: p.Failed,
		Enqueued: v.Feed.Enqueued, Resent: v.Feed.Resent, Duplicates: p.Duplicates, Prompt: p.Usage.Prompt,
		Completion: p.Usage.Completion, RateLines: p.RateLines, RateTokens: p.RateTokens, Input: v.Job.Input,
		SHA256: v.Job.SHA256, Models: map[string]int64{}, ContextCut: p.ContextCut(), Host: p.Host, Output: p.Output, Errors: p.ErrorFile,
		Manifest: p.Manifest, Verdict: p.Verdict, Want: v.Control.Want, Reason: v.Control.Reason, By: v.Control.By,
	}
	for _, m := range v.Job.Models {
		r.Models[m.Model] = m.Lines
	}
	for _, e := range p.Errors {
		r.TopErrors = append(r.TopErrors, topError(e))
	}
	return r
}

func (a *app) statusCommand() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:               "status [JOB]",
		Short:             "Show jobs, workers and queues",
		Args:              wants("[JOB]"),
		ValidArgsFunction: a.completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			take, done := a.untilSignal(cmd.Context(), "")
			defer done()
			job := strings.Join(args, "")
			if !watch {
				return settle(take, func() error {
					_, err := a.status(take, job, false)
					return err
				})
			}
			return a.watchStatus(take, job)
		},
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show it again every 2 s")
	a.jsonFlag(cmd)
	a.natsFlags(cmd)
	return cmd
}

// watchStatus shows it again and again. It looks for runs each time, since some may end and others begin.
func (a *app) watchStatus(ctx context.Context, job string) error {
	for runs := false; ; {
		ended := runs && len(a.endpoints(ctx)) == 0
		if !ended {
			now, err := a.status(ctx, job, true)
			var busy *busyError
			starting := errors.As(err, &busy) // or about to end, which shows at the next look
			ended = runs && !starting && (errors.Is(err, broker.ErrUnreachable) || errors.Is(err, broker.ErrNoJob))
			switch {
			case ended, starting:
			case err != nil:
				return orStopped(ctx, err)
			default:
				runs = now
			}
		}
		if ended {
			fmt.Fprintln(a.std.err, "what ran on this machine has ended")
			return nil
		}
		select {
		case <-ctx.Done():
			return stopped(ctx)
		case <-time.After(2 * time.Second):
		}
	}
}

// status shows a job, or all, and says whether they are runs on this machine.
func (a *app) status(ctx context.Context, job string, clear bool) (runs bool, err error) {
	cctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	b, jobs, err := a.list(cctx, job)
	if rows, nobody := keptRows(err); nobody && a.json {
		return false, cmp.Or(a.printJSON(overview{Jobs: []jobRow{}, Workers: []workerRow{}, Queues: []queueRow{}, Kept: rows}), err)
	}
	if err != nil {
		return false, err
	}
	defer b.close()
	o, err := look(cctx, b, jobs)
	if err != nil {
		return b.runs, err
	}
	if a.json {
		return b.runs, a.printJSON(o)
	}
	if clear && terminal(a.std.out) {
		fmt.Fprint(a.std.out, "\x1b[H\x1b[2J")
	}
	return b.runs, o.print(a.std.out, job != "")
}

// list reads one job, or all where it is empty, the newest first.
func (a *app) list(ctx context.Context, job string) (*brokers, []broker.JobView, error) {
	if job != "" {
		b, v, err := a.lookup(ctx, job)
		return b, []broker.JobView{v}, err
	}
	b, err := a.control(ctx)
	if err != nil {
		return nil, nil, err
	}
	jobs, err := b.jobs(ctx)
	if err != nil {
		b.close()
	}
	return b, jobs, err
}

// look makes the overview of jobs that were read.
func look(ctx context.Context, b *brokers, jobs []broker.JobView) (*overview, error) {
	o := &overview{Workers: []workerRow{}, Queues: []queueRow{}}
	ws := map[*broker.Conn][]proto.Worker{}
	var all []broker.Beat // two runs on this machine have a broker each, and may have one engine
	err := b.each(func(c *broker.Conn) error {
		beats, err := broker.Beats(ctx, c.JS)
		if err != nil {
			return err
		}
		ws[c] = seen(beats)
		for i := range ws[c] {
			o.Workers = append(o.Workers, rowOfWorker(&ws[c][i]))
		}
		all = append(all, beats...)
		qs, err := broker.Queues(ctx, c.JS)
		for _, q := range qs {
			o.Queues = append(o.Queues, queueRow{q.Model, q.Waiting, q.HandedTo, q.Bytes, q.MaxBytes})
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	o.Shared = append(o.Shared, broker.Shared(all)...)
	o.Jobs = b.rows(ctx, jobs, ws)
	return o, nil
}

// rows shows jobs that were read, and why nothing moves, by the workers at their brokers, where these are known.
func (b *brokers) rows(ctx context.Context, jobs []broker.JobView, ws map[*broker.Conn][]proto.Worker) []jobRow {
	b.fold(ctx, jobs)
	rows := []jobRow{}
	for i := range jobs {
		lacks := ""
		if here, known := ws[b.at[jobs[i].Job.ID]]; known && moves(&jobs[i]) {
			lacks = unserved(&jobs[i], here)
		}
		if jobs[i].State() == broker.StateOrphaned {
			jobs[i].Unserved = lacks
		}
		r := rowOfJob(&jobs[i])
		if r.Note == "" && r.State == broker.StateRunning {
			r.Note = lacks
		}
		if lacks != "" { // it is that of the workers that were there
			r.RateLines, r.RateTokens = 0, 0
		}
		rows = append(rows, r)
	}
	return rows
}

// moves says whether workers should run lines of a job.
func moves(v *broker.JobView) bool {
	return v.State() == broker.StateOrphaned || v.State() == broker.StateRunning
}

// unserved says which model of a job no worker runs, and for which workers it waits; empty: each with lines left is run by one.
func unserved(v *broker.JobView, ws []proto.Worker) string {
	for _, m := range v.Job.Models {
		if !v.Progress.Over(m.Model, m.Lines) && !slices.ContainsFunc(ws, func(w proto.Worker) bool { return w.Serves(m.Model) }) {
			return cmp.Or(producer.Waits(m.Model, ws), "no worker serves model "+m.Model)
		}
	}
	return ""
}

func (o *overview) print(w io.Writer, detail bool) error {
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "JOB\tSTATE\tDONE\tOK\tFAILED\tLINES/S\tTOK/S\tNOTE")
	for _, j := range o.Jobs {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%d\t%.1f\t%.0f\t%s\n", j.ID, shown(j.State, j.Outcome), part(j.OK+j.Failed, j.Lines), j.OK, j.Failed, j.RateLines, j.RateTokens, plain(j.Note))
	}
	fmt.Fprintln(tw)
	if err := tw.Flush(); err != nil {
		return err
	}
	if err := printWorkers(w, o.Workers); err != nil {
		return err
	}
	for i := range o.Shared {
		fmt.Fprintln(w, plain(o.Shared[i].String()))
	}
	fmt.Fprintln(tw, "\nQUEUE\tWAITING\tHANDED OUT\tSIZE\tOF AT MOST")
	for _, q := range o.Queues {
		fmt.Fprintf(tw, "%s\t%d\t%d\t%s\t%s\n", plain(q.Model), q.Waiting, q.HandedTo, broker.Size(q.Bytes), most(q.MaxBytes))
	}
	if detail && len(o.Jobs) == 1 {
		o.Jobs[0].detail(tw)
	}
	return tw.Flush()
}

func (j *jobRow) detail(w io.Writer) {
	fmt.Fprintf(w, "\ninput\t%s\nsha256\t%s\nenqueued\t%d\nsent again\t%d\ndropped duplicates\t%d\ntokens\t%d prompt, %d completion\n",
		plain(j.Input), j.SHA256, j.Enqueued, j.Resent, j.Duplicates, j.Prompt, j.Completion)
	for m, n := range j.Models {
		fmt.Fprintf(w, "model\t%s: %s\n", modelName(m), count(n, "line"))
	}
	for _, e := range j.TopErrors {
		fmt.Fprintln(w, "error\t"+failure((*proto.ErrorCount)(&e)))
	}
	if j.Manifest != "" {
		fmt.Fprintf(w, "verdict\t%s\nfiles on\t%s\noutput\t%s\nerrors\t%s\nmanifest\t%s\n", j.Verdict, j.Host, plain(j.Output), plain(j.Errors), plain(j.Manifest))
	}
}

// most is the limit of a queue's size, which an operator may have taken away.
func most(n int64) string {
	if n <= 0 {
		return "no limit"
	}
	return broker.Size(n)
}

func part(n, of int64) string {
	if of == 0 {
		return "-"
	}
	return fmt.Sprintf("%d/%d %.0f%%", n, of, 100*float64(n)/float64(of))
}

func (a *app) jobsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "jobs",
		Short: "List jobs",
		Args:  wants(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 10*time.Second)
			defer cancel()
			b, jobs, err := a.list(ctx, "")
			rows := []jobRow{}
			if _, nobody := keptRows(err); nobody && a.json {
				return cmp.Or(a.printJSON(rows), err)
			}
			if err != nil {
				return err
			}
			defer b.close()
			ws := map[*broker.Conn][]proto.Worker{}
			if slices.ContainsFunc(jobs, func(v broker.JobView) bool { return moves(&v) }) {
				ws = b.workers(ctx)
			}
			rows = b.rows(ctx, jobs, ws)
			if a.json {
				return a.printJSON(rows)
			}
			tw := tabwriter.NewWriter(a.std.out, 0, 4, 2, ' ', 0)
			fmt.Fprintln(tw, "JOB\tNAME\tSTATE\tDONE\tFAILED\tINPUT\tOUTPUT\tNOTE")
			for _, j := range rows {
				fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", j.ID, plain(j.Name), shown(j.State, j.Outcome), part(j.OK+j.Failed, j.Lines), j.Failed, plain(j.Input), plain(j.Output), plain(j.Note))
			}
			return tw.Flush()
		},
	}
	a.jsonFlag(cmd)
	a.natsFlags(cmd)
	return cmd
}

// completeJobs completes live job ids in the shell.
func (a *app) completeJobs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 || a.prepare(cmd) != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
	defer cancel()
	b, jobs, err := a.list(ctx, "")
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer b.close()
	var ids []string
	for i := range jobs {
		ids = append(ids, fmt.Sprintf("%s\t%s, %d of %s", jobs[i].Job.ID, shown(jobs[i].State(), outcome(&jobs[i].Progress)), jobs[i].Ended(), count(jobs[i].Job.Lines, "line")))
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}
