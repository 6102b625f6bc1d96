package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

func (a *app) resultsCommand() *cobra.Command {
	var follow, failed, all, manifest bool
	cmd := &cobra.Command{
		Use:   "results JOB",
		Short: "Print results as lines of an output file, also while the job runs",
		Long: `Print the results of a job, one JSON line each, in the order in which they came (input order once it is
finished). While the job runs, a line that failed may still come again as ok; with --errors or --all it is printed
both times. Of a run on this machine that no process has any more it prints what there is.`,
		Args:              wants("JOB"),
		ValidArgsFunction: a.completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			which := proto.WhichOK
			switch {
			case failed && all, failed && manifest, all && manifest, follow && manifest:
				return usagef("--errors, --all and --manifest exclude each other, and --manifest excludes --follow")
			case failed:
				which = proto.WhichErrors
			case all:
				which = proto.WhichAll
			case manifest:
				which = proto.WhichManifest
			}
			take, done := a.untilSignal(cmd.Context(), "")
			defer done()
			w := &fresh{w: a.std.out}
			return settle(take, func() error { return a.results(take, args[0], which, follow, w) })
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what comes, until the job is finished")
	cmd.Flags().BoolVar(&failed, "errors", false, "the lines that failed instead of those that are ok")
	cmd.Flags().BoolVar(&all, "all", false, "the lines that are ok and those that failed")
	cmd.Flags().BoolVar(&manifest, "manifest", false, "the manifest of a finished job instead of its lines")
	a.natsFlags(cmd)
	return cmd
}

// results writes to w what there is of a job, and with follow what comes. It is called again where the job's run has a
// process that is starting or ends, with which its broker ends: w remembers what came from there.
func (a *app) results(ctx context.Context, what, which string, follow bool, w *fresh) error {
	conn, v, err := a.find(ctx, what)
	if k := a.keptToRead(what, err); k != nil {
		kerr := a.keptResults(ctx, k, which, w)
		switch gone := (*over)(nil); {
		case !errors.As(err, &gone): // the broker did not let us in
		case errors.Is(kerr, broker.ErrInUse): // since it was looked at
			return &busyError{k.Job}
		case kerr == nil && follow && !k.Finished:
			return err
		}
		return kerr
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, stop := conn.While(ctx)
	defer stop()
	if which == proto.WhichManifest { // whole, or nothing of it
		var b bytes.Buffer
		if err := a.copyResults(ctx, conn, v.Job.ID, which, follow, &b); err != nil {
			return lost(conn, v.Job.ID, err)
		}
		_, err := b.WriteTo(w)
		return err
	}
	w.remember = conn.Ends
	return lost(conn, v.Job.ID, a.copyResults(ctx, conn, v.Job.ID, which, follow, w))
}

// copyResults writes to w what the aggregator gives of a job, and with follow what comes until the job is finished.
func (a *app) copyResults(ctx context.Context, conn *broker.Conn, id, which string, follow bool, w io.Writer) error {
	q := proto.ResultsQuestion{Job: id, MaxBytes: 1 << 20, Which: which}
	said := false
	for {
		var ans proto.ResultsAnswer
		err := ask(ctx, conn, proto.SubjectResults, &q, &ans)
		switch {
		case err != nil && ctx.Err() != nil:
			return stopped(ctx)
		case err != nil && (!follow || conn.Ends): // a run has its aggregator, but for when it starts or ends
			return err
		case err != nil && !said:
			said = true
			a.log.Warn("waiting for results", "error", err)
		case err == nil && ans.Error != "":
			return errors.New(ans.Error)
		case err == nil && !ans.Known:
			return fmt.Errorf("the aggregator does not know job %s", id)
		case err == nil:
			said = false
			if _, err := w.Write(ans.Data); err != nil {
				return fmt.Errorf("write results: %w", err)
			}
			if ans.Done || len(ans.Data) == 0 && !follow {
				return nil
			}
			more := len(ans.Data) > 0
			q.Cursor = ans.Next
			if more {
				continue
			}
		}
		select {
		case <-ctx.Done():
			return stopped(ctx)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

type encoder interface{ Encode() ([]byte, error) }
type decoder interface{ Decode([]byte) error }

// ask puts a question to the aggregator.
func ask(ctx context.Context, conn *broker.Conn, subject string, q encoder, ans decoder) error {
	b, err := q.Encode()
	if err != nil {
		return err
	}
	actx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	msg, err := conn.NC.RequestWithContext(actx, subject, b)
	if errors.Is(err, nats.ErrNoResponders) {
		return fmt.Errorf("no aggregator answers; start `millrace aggregate` or `millrace serve`: %w", err)
	}
	if err != nil {
		return fmt.Errorf("ask the aggregator: %w", broker.Plain(err))
	}
	return ans.Decode(msg.Data)
}

func (a *app) verifyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify MANIFEST|DIR|JOB",
		Short: "Recompute a finished job's manifest from its files",
		Long: `Read the files of a finished job again and compare them with its manifest: SHA-256, bytes, lines and tokens of each,
every line of the input once, no custom_id twice, and counts and token sums that agree with each other.

Times and rates, cached and wasted tokens, attempts, answers that were cut at the context (it is not there
what a line asked for) and engines are not in the files, so they are not verified. Nor is the input: input.sha256 in the
manifest is the SHA-256 of its plain lines, as sha256sum prints it for a file that is not compressed and was read whole.`,
		Args: wants("MANIFEST|DIR|JOB"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var reasons []string
			err := settle(cmd.Context(), func() (err error) {
				reasons, err = a.verify(cmd.Context(), args[0])
				return err
			})
			if err != nil {
				return err
			}
			if a.json {
				if err := a.printJSON(map[string]any{"valid": len(reasons) == 0, "reasons": append([]string{}, reasons...)}); err != nil {
					return err
				}
			} else if len(reasons) == 0 {
				fmt.Fprintln(a.std.out, "VALID")
			} else {
				fmt.Fprintln(a.std.out, "INVALID")
				for _, r := range reasons {
					fmt.Fprintln(a.std.out, " ", r)
				}
			}
			if len(reasons) > 0 {
				return quiet(exitFailure)
			}
			return nil
		},
	}
	a.jsonFlag(cmd)
	a.natsFlags(cmd)
	return cmd
}

// verify looks at files here, or asks the aggregator of a job.
func (a *app) verify(ctx context.Context, what string) ([]string, error) {
	name, err := manifestAt(what)
	if err == nil {
		_, reasons, err := aggregator.Verify(name)
		if errors.Is(err, aggregator.ErrNoManifest) {
			err = fmt.Errorf("%w; %s", err, giveManifest)
		}
		return reasons, err
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if strings.HasSuffix(what, "manifest.json") { // a job may have any name, but hardly this one
		return nil, coded{fmt.Errorf("%s: no such file; %s", what, giveManifest), exitNoJob}
	}
	conn, v, err := a.find(ctx, what)
	switch k := a.keptToRead(what, err); {
	case k != nil && k.Finished:
		return k.verify()
	case k != nil:
		return nil, fmt.Errorf("%s is no file here: %w", what, &over{k})
	}
	var n *nobody
	var busy *busyError
	if errors.As(err, &n) || errors.As(err, &busy) {
		return nil, fmt.Errorf("%s is no file here: %w", what, err)
	}
	if errors.Is(err, broker.ErrUnreachable) {
		return nil, fmt.Errorf("%s is no file here, and no broker to ask for a job of that name: %w", what, err)
	}
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var ans proto.VerifyAnswer
	if err := ask(ctx, conn, proto.SubjectVerify, &proto.VerifyQuestion{Job: v.Job.ID}, &ans); err != nil {
		return nil, lost(conn, v.Job.ID, err)
	}
	switch {
	case ans.Error != "":
		return nil, errors.New(ans.Error)
	case !ans.Valid && len(ans.Reasons) == 0:
		return []string{"the aggregator gave no reason"}, nil
	}
	return ans.Reasons, nil
}

const giveManifest = "give the manifest of a finished job (*.manifest.json), its folder, or the job"

// manifestAt is the manifest at path: the file itself, or the only one in the folder.
func manifestAt(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil || !st.IsDir() {
		return path, err
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return "", fmt.Errorf("look for a manifest: %w", err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), "manifest.json") {
			names = append(names, filepath.Join(path, e.Name()))
		}
	}
	switch len(names) {
	case 0:
		return "", coded{fmt.Errorf("%s holds no manifest; give the *.manifest.json of a finished job, or the job", path), exitNoJob}
	case 1:
		return names[0], nil
	}
	return "", fmt.Errorf("%s holds %d manifests; give one of them, such as %s", path, len(names), names[0])
}
