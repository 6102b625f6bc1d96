package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/producer"
	"millrace/proto"
)

// aggregateFlags are those of the commands that fold.
type aggregateFlags struct {
	output  string
	keepFor time.Duration
	ackWait time.Duration
}

func (g *aggregateFlags) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&g.output, "output", "o", "results", "`DIR` for results: DIR/JOB/output.jsonl, errors.jsonl, manifest.json")
	f.DurationVar(&g.keepFor, "keep-for", 0, "forget finished jobs after this long (default: keep until millrace rm); their files stay")
}

// check refuses what cannot be meant.
func (g *aggregateFlags) check() error {
	if g.keepFor < 0 {
		return usagef("--keep-for is %s, must not be negative", g.keepFor)
	}
	return nil
}

func (a *app) aggregateCommand() *cobra.Command {
	var g aggregateFlags
	cmd := &cobra.Command{
		Use:   "aggregate",
		Short: "Gather results into output files, and run detached jobs",
		Long: `Gather the results of all jobs of a broker into files under --output, and stay with the jobs of produce --detach.
One aggregator works at a time; others on the same broker wait to take over.`,
		Args: wants(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := g.check(); err != nil {
				return err
			}
			if err := checkAckWait(g.ackWait); err != nil {
				return err
			}
			defer runtime.KeepAlive(spareHeap())
			take, done := a.untilSignal(cmd.Context(), "")
			defer done()
			reg, stopMetrics, err := a.serveMetrics()
			if err != nil {
				return err
			}
			defer stopMetrics()
			conn, err := a.connect(take, "aggregator", foreverWait)
			if err != nil {
				return orStopped(take, err)
			}
			defer conn.Close()
			return a.aggregate(take, conn, &g, reg, false)
		},
	}
	g.bind(cmd)
	cmd.Flags().DurationVar(&g.ackWait, "ack-wait", 0, "for detached jobs: how long a request may go without a heartbeat (default: as the broker's, 1m)")
	a.metricsFlag(cmd)
	a.natsFlags(cmd)
	return cmd
}

func (a *app) serveCommand() *cobra.Command {
	var b brokerFlags
	var g aggregateFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Broker and aggregator in one process",
		Long: `Hold the queues and gather the results, for workers and producers on any machine: broker and aggregator in one process.
At its start it prints the variables with which the others find it.

  millrace serve --addr 0.0.0.0:4222 --output /srv/results`,
		Args: wants(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := g.check(); err != nil {
				return err
			}
			take, done := a.untilSignal(cmd.Context(), "")
			defer done()
			return a.holdBroker(take, &b, func(ctx context.Context, srv *broker.Server, reg *prometheus.Registry) error {
				conn, err := srv.Connect(ctx, "aggregator")
				if err != nil {
					return err
				}
				defer conn.Close()
				return a.aggregate(ctx, conn, &g, reg, true)
			})
		},
	}
	b.bind(cmd, a)
	g.bind(cmd)
	a.metricsFlag(cmd)
	return cmd
}

// aggregate folds, and feeds the detached jobs, until ctx ends or one of the two fails.
func (a *app) aggregate(ctx context.Context, conn *broker.Conn, g *aggregateFlags, reg prometheus.Registerer, shared bool) error {
	if err := writable(g.output, "--output"); err != nil {
		return err
	}
	output, err := filepath.Abs(g.output)
	if err != nil {
		return fmt.Errorf("find the output folder: %w", err)
	}
	lock, err := a.lockOutput(ctx, conn, output)
	if err != nil {
		return orStopped(ctx, err)
	}
	defer lock.Unlock()
	agg := &aggregator.Aggregator{
		Conn: conn, Self: broker.Self(), Dir: filepath.Join(a.data, "aggregate"), SharedDisk: shared, Log: a.log,
		Registry: reg, KeepFor: g.keepFor, Program: programVersion(),
		Output: func(job *proto.Job) aggregator.Files {
			dir := filepath.Join(output, job.ID)
			return aggregator.Files{Output: filepath.Join(dir, "output.jsonl"), Errors: filepath.Join(dir, "errors.jsonl"), Manifest: filepath.Join(dir, "manifest.json")}
		},
	}
	adopter := &producer.Adopter{Conn: conn, Self: broker.Self(), Dir: filepath.Join(a.data, "aggregate", "inputs"), Log: a.log, Registry: reg, AckWait: g.ackWait}
	ready()
	return orStopped(ctx, together(ctx, agg.Run, func(ctx context.Context) error { return a.adopt(ctx, adopter) }))
}

// lockOutput takes the folder for results, together with all other aggregators of the same broker: jobs of another one may
// go by the same ids. A broker is known by when its stream of results was made.
func (a *app) lockOutput(ctx context.Context, conn *broker.Conn, dir string) (*broker.Lock, error) {
	ctx, stop := conn.While(ctx)
	defer stop()
	made, err := resultsMade(ctx, conn)
	for said := false; err != nil; said = true {
		if !said {
			a.log.Warn("the broker cannot be asked for its results; trying again", "error", broker.Plain(err))
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(folderWait):
			made, err = resultsMade(ctx, conn)
		}
	}
	host, _ := os.Hostname() // only shown
	lock, err := broker.LockFor(dir, made.UTC().Format(time.RFC3339Nano), fmt.Sprintf("process %d on %s, --data %s", os.Getpid(), host, a.data))
	var held *broker.Holder
	if errors.As(err, &held) {
		return nil, usagef("results of another broker go to %s (%s, or another aggregator of that broker); give another --output. Where it is the same broker, with a disk that was emptied, restart its aggregators", dir, held.Who)
	}
	if err != nil {
		return nil, fmt.Errorf("hold the output folder: %w", err)
	}
	return lock, nil
}

func resultsMade(ctx context.Context, conn *broker.Conn) (made time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := (broker.Declarer{JS: conn.JS}).Base(ctx); err != nil {
		return made, err
	}
	s, err := conn.JS.Stream(ctx, proto.ResultStream)
	if err != nil {
		return made, fmt.Errorf("look up the results: %w", err)
	}
	return s.CachedInfo().Created, nil
}

// adopt runs the adopter once its folder is ours. Another process on this disk may be waited for, as it is for the
// lease on folding, to take over when it ends.
func (a *app) adopt(ctx context.Context, adopter *producer.Adopter) error {
	for said := false; ; said = true {
		lock, err := broker.LockDir(adopter.Dir)
		if err == nil {
			defer lock.Unlock()
			return adopter.Run(ctx)
		}
		if !errors.Is(err, broker.ErrInUse) {
			return err
		}
		if !said {
			a.log.Info("another process on this disk runs detached jobs; waiting for it to end", "folder", adopter.Dir)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(folderWait):
		}
	}
}

// folderWait is how often a folder that another process has is tried.
const folderWait = 500 * time.Millisecond

// together runs parts of a role until ctx ends; the first that fails ends the others.
func together(ctx context.Context, parts ...func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	errs := make([]error, len(parts))
	var wg sync.WaitGroup
	for i, part := range parts {
		wg.Go(func() {
			if errs[i] = part(ctx); errs[i] != nil {
				cancel(errs[i])
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// writable makes the folder and tries to write there, so that a mistake shows at the start and not at the end.
func writable(dir, flag string) error {
	if err := broker.MakeDir(dir); err != nil {
		return fmt.Errorf("make the output folder: %w; choose another %s", err, flag)
	}
	f, err := os.CreateTemp(dir, ".millrace-*")
	if err != nil {
		return fmt.Errorf("write to the output folder: %w; choose another %s or mend its permissions", err, flag)
	}
	f.Close()
	return os.Remove(f.Name())
}
