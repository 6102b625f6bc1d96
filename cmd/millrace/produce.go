package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"millrace/broker"
	"millrace/producer"
	"millrace/proto"
)

func (a *app) validateCommand() *cobra.Command {
	var j jobFlags
	cmd := &cobra.Command{
		Use:   "validate FILE",
		Short: "Check every line of an input file, enqueue nothing",
		Args:  wants("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			take, done := a.untilSignal(cmd.Context(), "")
			defer done()
			if err := j.check(); err != nil {
				return err
			}
			ds, clean, err := a.scan(take, &j, args[0], 0)
			if err != nil {
				return a.invalid(err)
			}
			defer clean()
			job := ds.Job()
			if a.json {
				return a.printJSON(map[string]any{"job": job.ID, "lines": job.Lines, "invalid": job.Invalid, "bytes": job.Bytes, "sha256": job.SHA256, "models": rowOfJob(&broker.JobView{Job: job}).Models})
			}
			fmt.Fprintf(a.std.out, "%s valid, %d invalid; job %s, sha256 %s\n", count(job.Lines-job.Invalid, "line"), job.Invalid, job.ID, job.SHA256)
			for _, m := range job.Models {
				fmt.Fprintf(a.std.out, "  %s: %s\n", modelName(m.Model), count(m.Lines, "line"))
			}
			return nil
		},
	}
	j.bindInput(cmd)
	a.jsonFlag(cmd)
	return cmd
}

// invalid prints what is wrong with the lines of an input and returns the sum of it: one per line of the error stream, or
// with --json as one document.
func (a *app) invalid(err error) error {
	var bad *producer.InvalidInput
	var file *producer.BadFile
	if !errors.As(err, &bad) && !errors.As(err, &file) && !errors.Is(err, producer.ErrEmpty) {
		return err
	}
	if bad != nil {
		err = coded{fmt.Errorf("lines that are invalid: %d; nothing was enqueued. Mend them, or let them end as error lines (--skip-invalid)", bad.Total), exitInvalid}
	}
	if a.json {
		return cmp.Or(a.printJSON(refusalOf(bad, err)), err)
	}
	if bad == nil {
		return err
	}
	for _, e := range bad.Errors {
		fmt.Fprintf(a.std.err, "line %d: %s\n", e.Line, e.Message)
	}
	if n := bad.Total - int64(len(bad.Errors)); n > 0 {
		fmt.Fprintf(a.std.err, "… and %d more\n", n)
	}
	return err
}

// refusal is what --json prints of an input that is refused.
type refusal struct {
	Error   string      `json:"error"`
	Lines   int64       `json:"lines"`
	Invalid int64       `json:"invalid"`
	Errors  []lineError `json:"errors"` // of Invalid the first 1,000, by line
}

type lineError struct {
	Line     int64  `json:"line"`
	CustomID string `json:"custom_id,omitempty"`
	Code     string `json:"code"` // as the line would end with --skip-invalid
	Message  string `json:"message"`
}

func refusalOf(bad *producer.InvalidInput, err error) refusal {
	r := refusal{Error: err.Error(), Errors: []lineError{}}
	if bad == nil {
		return r
	}
	r.Lines, r.Invalid = bad.Lines, bad.Total
	for _, e := range bad.Errors {
		r.Errors = append(r.Errors, lineError{e.Line, e.CustomID, proto.CodeInvalidRequest, e.Message})
	}
	return r
}

func (a *app) produceCommand() *cobra.Command {
	var j jobFlags
	var detach bool
	cmd := &cobra.Command{
		Use:   "produce FILE",
		Short: "Enqueue a file for the fleet and stay with it until every line has ended",
		Long: `Validate FILE (OpenAI batch JSONL, also .gz and .zst, - for standard input), enqueue its lines and stay with the
job: refill, send again what got lost, report. The same command again continues the same job. With --detach the
input is copied to the broker and the fleet's aggregator stays with the job instead.`,
		Args: wants("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := j.check(); err != nil {
				return err
			}
			defer runtime.KeepAlive(spareHeap())
			take, done := a.untilSignal(cmd.Context(), "the same command continues")
			defer done()
			return a.produce(take, &j, args[0], detach)
		},
	}
	j.bindInput(cmd)
	j.bindJob(cmd)
	cmd.Flags().BoolVar(&detach, "detach", false, "leave the input with the broker and return")
	a.jsonFlag(cmd)
	a.metricsFlag(cmd)
	a.natsFlags(cmd)
	return cmd
}

func (a *app) produce(ctx context.Context, j *jobFlags, file string, detach bool) error {
	reg, stopMetrics, err := a.serveMetrics()
	if err != nil {
		return err
	}
	defer stopMetrics()
	conn, err := a.connect(ctx, "producer", 15*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	ds, clean, err := a.scan(ctx, j, file, conn.NC.MaxPayload())
	if err != nil {
		return a.invalid(err)
	}
	defer clean()
	if err := (broker.Declarer{JS: conn.JS}).Base(ctx); err != nil {
		return err
	}
	job, err := a.create(ctx, conn, ds, j.again)
	if err != nil {
		return err
	}
	if v, err := broker.Get(ctx, conn.JS, job.ID); err == nil && v.State() == broker.StateFinished {
		if s := note(&v); s != "" {
			fmt.Fprintf(a.std.err, "job %s: %s\n", job.ID, s)
		}
		fmt.Fprintf(a.std.err, "job %s is %s; --again makes a fresh run\n", job.ID, shown(v.State(), outcome(&v.Progress)))
		return a.finish(ctx, conn, &v, j)
	}
	if detach {
		if err := producer.Detach(ctx, conn, ds, job); err != nil {
			return err
		}
		fmt.Fprintf(a.std.err, "job %s (%s) lies with the broker; follow it with: millrace status %s --watch\n", job.ID, count(job.Lines, "line"), job.ID)
		fmt.Fprintln(a.std.out, job.ID)
		return nil
	}
	fmt.Fprintf(a.std.err, "job %s: %s\n", job.ID, count(job.Lines, "line"))
	o := &producer.Owner{Conn: conn, Dataset: ds, Job: job, Self: broker.Self(), Log: a.log, Registry: reg,
		Window: j.window, AckWait: j.ackWait}
	v, err := a.own(ctx, ctx, conn, o)
	if ctx.Err() != nil && v.Feed.Owner.ID == o.Self.ID && v.Feed.Enqueued > 0 && (v.Control.Want == "" || v.Control.Want == proto.WantRun) && v.Feed.State != proto.FeedEnding {
		fmt.Fprintf(a.std.err, "workers go on with what was sent of job %[1]s; `millrace pause %[1]s` or `millrace cancel %[1]s` stops that\n", job.ID)
	}
	if !ended(err) {
		return err
	}
	if ferr := a.finish(ctx, conn, &v, j); err == nil {
		return ferr
	}
	return err
}

// create registers the job, and names an older one of the same input whose content was another.
func (a *app) create(ctx context.Context, conn *broker.Conn, ds *producer.Dataset, again bool) (proto.Job, error) {
	job, old, err := producer.Create(ctx, conn, ds.Job(), again)
	if err != nil {
		return job, err
	}
	if old != nil {
		a.sayOlder(old.ID, &job)
	}
	return job, nil
}

// ended says whether err, of an owner, leaves a job whose every line has ended.
func ended(err error) bool {
	return err == nil || errors.Is(err, producer.ErrCancelled) || errors.Is(err, producer.ErrExpired)
}

// own runs the owner of the job's input, which watches the one that there is first, until owned ends, and shows the
// progress until ctx ends, or both to the end of the job.
func (a *app) own(ctx, owned context.Context, conn *broker.Conn, o *producer.Owner) (broker.JobView, error) {
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var v broker.JobView
	seen := make(chan error, 1)
	t := a.newTalk(o.Job)
	t.self = o.Self.ID
	go func() {
		var err error // an interrupted watch has seen what it has seen
		v, err = t.watch(wctx, conn, func(v *broker.JobView) bool { return v.State() == broker.StateFinished })
		seen <- err
	}()
	o.Held = func(by *producer.HeldError) {
		fmt.Fprintf(a.std.err, "job %s is run by process %d on %s; watching it\n", o.Job.ID, by.Holder.PID, by.Holder.Machine())
	}
	err := o.Run(owned)
	if !ended(err) {
		cancel()
	}
	werr := <-seen
	if ctx.Err() != nil {
		return v, context.Cause(ctx)
	}
	return v, cmp.Or(err, werr)
}

// finish prints the end of a job and says which exit code it deserves.
func (a *app) finish(ctx context.Context, conn *broker.Conn, v *broker.JobView, j *jobFlags) error {
	if err := a.summary(ctx, conn, v); err != nil {
		return err
	}
	return verdict(v, j)
}

func verdict(v *broker.JobView, j *jobFlags) error {
	p := &v.Progress
	if p.Verdict != "" && p.Verdict != "VALID" {
		return quiet(exitFailure)
	}
	if j.failUnder != "" {
		n, percent, _ := number(j.failUnder) // checked before the start
		is := float64(p.OK)
		if percent {
			is = 100 * float64(p.OK) / float64(max(v.Job.Lines, 1))
		}
		if is < n {
			return coded{fmt.Errorf("%d of %s ok, less than --fail-under %s", p.OK, count(v.Job.Lines, "line"), j.failUnder), exitThreshold}
		}
	}
	if p.EndedWithJob() > 0 { // also for those who only watch, or come later
		return quiet(exitEnded)
	}
	if p.Failed > 0 {
		return quiet(exitSomeFailed)
	}
	return nil
}

// exists says whether a file is there.
func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}
