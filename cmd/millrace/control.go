package main

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"

	"millrace/broker"
	"millrace/proto"
)

func (a *app) printJSON(v any) error {
	if err := json.MarshalWrite(a.std.out, v, jsontext.WithIndent("  "), json.Deterministic(true)); err != nil {
		return fmt.Errorf("print JSON: %w", err)
	}
	fmt.Fprintln(a.std.out)
	return nil
}

// wantCommand makes cancel, pause and resume.
func (a *app) wantCommand(verb string) *cobra.Command {
	want := map[string]string{"cancel": proto.WantCancel, "pause": proto.WantPause, "resume": proto.WantRun}[verb]
	short := map[string]string{
		"cancel": "Cancel a job: what was done stays, the rest ends as batch_cancelled",
		"pause":  "Pause a job: nothing new of it is started",
		"resume": "Let a paused job go on",
	}[verb]
	var reason string
	cmd := &cobra.Command{
		Use:               verb + " JOB",
		Short:             short,
		Args:              wants("JOB"),
		ValidArgsFunction: a.completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 10*time.Second)
			defer cancel()
			return settle(ctx, func() error { return a.want(ctx, args[0], verb, &proto.Control{Want: want, Reason: reason, By: me()}) })
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "for people: shown by status, by jobs, and by the command that runs the job")
	a.natsFlags(cmd)
	return cmd
}

func (a *app) want(ctx context.Context, job, verb string, c *proto.Control) error {
	conn, v, err := a.find(ctx, job)
	if err != nil {
		return err
	}
	defer conn.Close()
	switch {
	case v.State() == broker.StateFinished:
		return usagef("job %s is %s; there is nothing to %s", v.Job.ID, shown(v.State(), outcome(&v.Progress)), verb)
	case v.Control.Want == proto.WantCancel && c.Want != proto.WantCancel:
		return usagef("job %s was %s; run its command with --again for a fresh one", v.Job.ID, asked(&v.Control))
	}
	if err := broker.Want(ctx, conn.JS, v.Job.ID, *c); err != nil {
		return lost(conn, v.Job.ID, err)
	}
	fmt.Fprintf(a.std.err, "%s: told job %s (%d of %s ended)\n", verb, v.Job.ID, v.Ended(), count(v.Job.Lines, "line"))
	if s := unheard(v.State(), c.Want); s != "" {
		fmt.Fprintln(a.std.err, s)
	}
	return nil
}

// unheard says when what is wanted of a job takes effect that no process runs; empty: one does.
func unheard(state, want string) string {
	switch {
	case state == broker.StateWaiting:
		return "no process runs this job at the moment; it takes effect when an aggregator goes on with it"
	case state == broker.StateOrphaned && want == proto.WantCancel:
		return "no process runs this job at the moment; it takes effect when an aggregator sees it, or when its command is run again"
	case state == broker.StateOrphaned && want == proto.WantPause:
		return "no process runs this job at the moment; workers begin no more of it, and what they drop of it is sent again when its command is run, after `millrace resume`"
	case state == broker.StateOrphaned:
		return "no process runs this job at the moment; it takes effect when its command is run again"
	}
	return ""
}

// me is who is asking, for people.
func me() string {
	host, _ := os.Hostname()
	if u, err := user.Current(); err == nil {
		return u.Username + "@" + host
	}
	return host
}

func (a *app) rmCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm JOB...",
		Short: "Forget jobs that are finished, cancelled ones too; their output files stay until the same job is run again",
		Args:  wants("JOB..."),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			for _, arg := range args {
				if err := settle(ctx, func() error { return a.remove(ctx, arg, force) }); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also a job that is not finished: what it has done so far is lost")
	a.natsFlags(cmd)
	return cmd
}

func (a *app) remove(ctx context.Context, job string, force bool) error {
	conn, v, err := a.find(ctx, job)
	switch k, shut := a.keptFor(job, err); {
	case shut:
		return fmt.Errorf("%w; the run %s, which is kept in %s, stays", err, k.Job, k.dir)
	case k != nil:
		return a.forget(k, force)
	case err != nil:
		return err
	}
	defer conn.Close()
	if v.State() == broker.StateCancelled && !force {
		return coded{fmt.Errorf("job %s is cancelled, and its last lines are being ended; wait for that, or say --force", v.Job.ID), exitUsage}
	}
	if v.State() != broker.StateFinished && !force {
		return coded{fmt.Errorf("job %s is %s; cancel it first, or say --force", v.Job.ID, v.State()), exitUsage}
	}
	if conn.Ends && v.State() == broker.StateFinished { // with what is kept of it, once its process has noted that
		return &busyError{v.Job.ID}
	}
	if err := broker.Remove(ctx, conn.JS, v); err != nil {
		return lost(conn, v.Job.ID, err)
	}
	fmt.Fprintln(a.std.err, "removed", v.Job.ID)
	return nil
}

func (a *app) doctorCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what is wrong with a broker and how to mend it",
		Args:  wants(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 20*time.Second)
			defer cancel()
			findings, err := a.examine(ctx)
			if err != nil {
				return err
			}
			return a.printFindings(findings)
		},
	}
	a.jsonFlag(cmd)
	a.natsFlags(cmd)
	return cmd
}

func (a *app) examine(ctx context.Context) ([]broker.Finding, error) {
	var findings []broker.Finding
	if acc, named, _ := a.nats.access(); !named || near(acc.URL) { // an error shows again when it connects
		findings = diskFindings(a.data)
	}
	b, err := a.control(ctx)
	if err != nil {
		mend := broker.Remedy(err)
		return append(findings, broker.Finding{Check: "connection", Level: broker.LevelBad, Found: strings.TrimSuffix(err.Error(), "; "+mend), Mend: mend}), nil
	}
	defer b.close()
	for _, c := range b.conns {
		fs := broker.Doctor(ctx, c)
		for i := range fs {
			if len(b.conns) > 1 { // several runs
				fs[i].Check = c.NC.ConnectedAddr() + ": " + fs[i].Check
			}
		}
		findings = append(findings, fs...)
	}
	return findings, nil
}

// near says whether one of a broker's URLs leads to this machine.
func near(urls string) bool {
	return slices.ContainsFunc(strings.Split(urls, ","), func(at string) bool {
		if _, after, ok := strings.Cut(at, "://"); ok {
			at = after
		}
		at = at[strings.LastIndexByte(at, '@')+1:]
		return loopback(at) || loopback(at+":4222")
	})
}

// diskFindings looks at the disk of --data here, where a broker of this machine has its own by default.
func diskFindings(dir string) []broker.Finding {
	f := broker.Finding{Check: "disk of " + dir, Level: broker.LevelOK}
	free, err := broker.FreeBytes(dir)
	switch {
	case err != nil:
		f.Level, f.Found, f.Mend = broker.LevelBad, err.Error(), "choose another --data"
	case free < 1<<30:
		f.Level, f.Found, f.Mend = broker.LevelBad, broker.Size(free)+" free", "free some space, or choose another --data"
	default:
		f.Found = broker.Size(free) + " free"
	}
	return []broker.Finding{f}
}

func (a *app) printFindings(fs []broker.Finding) error {
	bad := 0
	for _, f := range fs {
		if f.Level == broker.LevelBad {
			bad++
		}
	}
	if a.json {
		if err := a.printJSON(fs); err != nil {
			return err
		}
	} else {
		for _, f := range fs {
			fmt.Fprintf(a.std.out, "%-4s  %s: %s\n", f.Level, f.Check, f.Found)
			if f.Mend != "" {
				fmt.Fprintf(a.std.out, "      → %s\n", f.Mend)
			}
		}
	}
	if bad > 0 {
		return quiet(exitFailure)
	}
	return nil
}
