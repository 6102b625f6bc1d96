package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/producer"
	"millrace/proto"
	"millrace/sim"
	"millrace/vllm"
)

// runFlags are those of `millrace run`.
type runFlags struct {
	jobFlags
	engineFlags
	output string
	sync   string
}

func (a *app) runCommand() *cobra.Command {
	var r runFlags
	cmd := &cobra.Command{
		Use:   "run FILE {--engine URL | --vllm MODEL}",
		Short: "Run a file on one or more engines, everything in this process",
		Long: `Run FILE (OpenAI batch JSONL, also .gz and .zst, - for standard input) on one or more engines: broker, workers,
aggregator and producer in this one process. The same command again continues what an interruption left.

  millrace run requests.jsonl --engine http://localhost:8000 --engine http://gpu2:8000 -o results.jsonl
  millrace run requests.jsonl --vllm Qwen/Qwen3-8B --gpus all -- --max-model-len 8192    starts vLLM, and ends it
  millrace run requests.jsonl --engine sim                 try it without a GPU, on a simulated engine`,
		Args: r.vllm.behindDash(wants("FILE")),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := r.jobFlags.check(); err != nil {
				return err
			}
			if err := checkSync(r.sync); err != nil {
				return err
			}
			if len(r.urls) == 0 && r.vllm.model == "" {
				return usagef("no engine; give --engine URL, such as http://localhost:8000, --vllm MODEL to start one, or --engine sim to try without one")
			}
			if err := r.engineFlags.check(simEngine); err != nil {
				return err
			}
			r.once(a.std.err)
			take, stop, done := a.phases(cmd.Context(), r.drainTimeout, "the same command continues")
			defer done()
			return a.runFile(take, stop, &r, args[0])
		},
	}
	r.bindInput(cmd)
	r.bindJob(cmd)
	r.bind(cmd)
	f := cmd.Flags()
	f.StringVarP(&r.output, "output", "o", "", "output `FILE` (default: the input's name with .results), written over if it is there; errors and manifest beside it")
	f.StringVar(&r.sync, "sync", "1s", "when the queue's disk is flushed: 1s (power loss costs doing that second again) or always")
	a.jsonFlag(cmd)
	a.metricsFlag(cmd)
	return cmd
}

func (a *app) runFile(take, stop context.Context, r *runFlags, file string) error {
	files, err := r.files(file)
	if err != nil {
		return err
	}
	if err := usable(&files, file); err != nil {
		return err
	}
	ds, clean, err := a.scan(take, &r.jobFlags, file, proto.MaxPayload)
	if err != nil {
		return a.invalid(err)
	}
	defer clean()
	job := ds.Job()
	p, err := a.place(&job, r.again)
	if err != nil {
		return err
	}
	wanted := ""
	if r.output != "" {
		wanted = files.Output
	}
	if p.finished != "" {
		return a.showFinished(take, &job, p.finished, wanted, &r.jobFlags)
	}
	if !p.known {
		a.nameOlder(&job)
	}
	lock, err := broker.LockDir(p.dir)
	if errors.Is(err, broker.ErrInUse) {
		lock, err = a.watchRun(take, &job, p.dir, wanted, &r.jobFlags)
	}
	if err != nil || lock == nil {
		return err
	}
	if m, err := readMemo(p.dir); err == nil && m.Finished { // by another process, until we had the folder
		lock.Unlock()
		return a.showFinished(take, &job, m.Manifest, wanted, &r.jobFlags)
	}
	defer lock.Unlock()
	_ = os.Remove(endpointFile(p.dir)) // of a process that was killed; one that stays leads nowhere
	files, held, err := a.take(files, &job, wanted != "")
	if err != nil {
		return err
	}
	defer held.Unlock()
	if err := producer.Preflight(&job, map[string]string{"--data": p.dir, "-o": filepath.Dir(files.Output)}); err != nil {
		return err
	}
	v, err := a.runJob(take, stop, r, ds, job, p, files)
	if errors.Is(err, producer.ErrHalted) {
		p.halted(a)
	}
	if !ended(err) {
		return err
	}
	p.finish(a, v.Progress.Manifest)
	if ferr := a.finish(take, nil, &v, &r.jobFlags); err == nil {
		return ferr
	}
	return err
}

// runJob starts every role in order, runs the job, and stops them in reverse.
func (a *app) runJob(take, stop context.Context, r *runFlags, ds *producer.Dataset, job proto.Job, p *place, files aggregator.Files) (v broker.JobView, err error) {
	reg, stopMetrics, err := a.serveMetrics()
	if err != nil {
		return v, err
	}
	defer stopMetrics()
	take, stopTaking := context.WithCancelCause(take)
	defer stopTaking(nil)
	patience := stop
	stop, abort := context.WithCancelCause(stop)
	defer abort(nil)
	broken := func(err error) { // nothing that is in flight could be stored, or answered
		stopTaking(err)
		abort(err)
	}
	defer func() {
		if why := context.Cause(take); !ended(err) && errors.As(why, new(*vllm.Failed)) {
			err = fmt.Errorf("%w; the same command goes on with the job once that is mended", why)
		}
	}()
	stopEngines, err := a.engines(take, patience, r, &job, reg, broken)
	defer stopEngines()
	if err != nil {
		return v, err
	}
	srv := &broker.Server{Dir: filepath.Join(p.dir, "broker"), Addr: "127.0.0.1:0", Token: newToken(), SyncAlways: r.sync == "always", Log: a.log, Broken: broken}
	if err := srv.Start(take); err != nil {
		return v, err
	}
	defer srv.Stop()
	reg.MustRegister(srv.Metrics())
	if err := (endpoint{URL: srv.URL(), Token: srv.Token, PID: os.Getpid(), Output: files.Output}).write(p.dir); err != nil {
		return v, err
	}
	defer os.Remove(endpointFile(p.dir)) // one that stays leads nowhere
	conn, err := srv.Connect(take, "run")
	if err != nil {
		return v, err
	}
	defer conn.Close()
	if err := a.declareRun(take, conn, srv, &job, r.ackWait); err != nil {
		return v, err
	}
	if job, _, err = producer.Create(take, conn, job, false); err != nil {
		return v, err
	}
	if err := p.remember(&job, files); err != nil {
		return v, err
	}
	stopAgg, err := a.startAggregator(srv, job, p, files, reg)
	if err != nil {
		return v, err
	}
	defer func() { err = errors.Join(err, stopAgg()) }()
	wconn, err := srv.Connect(take, "worker")
	if err != nil {
		return v, err
	}
	defer wconn.Close()
	// No journals: declareRun has made available what a dead process held, and by now another worker may have it.
	ws, err := a.workers(wconn, &r.engineFlags, modelsOf(&job), reg, r.ackWait, "")
	if err != nil {
		return v, err
	}
	c := startCrew(take, stop, ws, a.drain(&r.engineFlags, reg))
	defer func() { err = errors.Join(err, c.stop()) }()
	o := &producer.Owner{Conn: conn, Dataset: ds, Job: job, Self: broker.Self(), Log: a.log, Registry: reg, Window: r.window, AckWait: r.ackWait, Own: true}
	fmt.Fprintf(a.std.err, "job %s: %s\n", job.ID, count(job.Lines, "line"))
	// The job is owned until what is in flight has ended: nobody should take it for orphaned meanwhile.
	owned, letGo := context.WithCancelCause(context.WithoutCancel(take))
	defer letGo(nil)
	stopOwning := context.AfterFunc(take, func() { <-c.ended; letGo(context.Cause(take)) })
	defer stopOwning()
	v, err = a.own(take, owned, conn, o)
	if ended(err) { // every line has: nobody waits for what an engine still does
		c.abort(nil)
	}
	return v, err
}

// declareRun declares the queues. Nobody but our own dead predecessor can hold requests of this broker: they are
// made available at once.
func (a *app) declareRun(ctx context.Context, conn *broker.Conn, srv *broker.Server, job *proto.Job, ackWait time.Duration) error {
	free, err := broker.FreeBytes(srv.Dir)
	if err != nil {
		return err
	}
	d := broker.Declarer{JS: conn.JS, Disk: free, AckWait: ackWait}
	if err := d.Base(ctx); err != nil {
		return err
	}
	for _, m := range job.Models {
		if err := d.Redelivered(ctx, m.Model); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) startAggregator(srv *broker.Server, job proto.Job, p *place, files aggregator.Files, reg prometheus.Registerer) (stop func() error, err error) {
	ctx, cancel := context.WithCancel(context.Background()) // it outlives the workers, to fold what they still publish
	conn, err := srv.Connect(ctx, "aggregator")
	if err != nil {
		cancel()
		return nil, err
	}
	agg := &aggregator.Aggregator{Conn: conn, Self: broker.Self(), Dir: filepath.Join(p.dir, "aggregate"), SharedDisk: true, Log: a.log,
		Registry: reg, Program: programVersion(), Output: func(*proto.Job) aggregator.Files { return files }}
	over := make(chan error, 1)
	go func() { over <- agg.Run(ctx) }()
	return func() error {
		cancel()
		defer conn.Close()
		if err := <-over; err != nil && !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	}, nil
}

// engines starts engines where they are asked for, simulated ones and vLLM, and refuses models that no engine serves. The
// function it returns, which is never nil, stops them: after the workers, which finish what they have in flight. patience
// ends when vLLM is to be killed, and failed is called when no more is to be had of it.
func (a *app) engines(ctx, patience context.Context, r *runFlags, job *proto.Job, reg prometheus.Registerer, failed func(error)) (stop func(), err error) {
	stop = func() {}
	if r.vllm.model != "" {
		if err := r.vllm.served(job); err != nil {
			return stop, err
		}
		r.lines = job.Lines
		if r.hosts, err = a.startVLLM(patience, &r.engineFlags, reg, failed); err != nil {
			return stop, err
		}
		return r.hosts.stop, nil
	}
	if slices.Contains(r.urls, simEngine) {
		var urls []string
		urls, stop, err = a.simulate(ctx, job)
		if err != nil {
			return stop, err
		}
		r.urls = append(slices.DeleteFunc(r.urls, func(u string) bool { return u == simEngine }), urls...)
		fmt.Fprintln(a.std.err, "note: --engine sim answers with simulated text; no model runs")
	}
	return stop, a.served(ctx, r, job)
}

// served refuses models of the job that no engine serves.
func (a *app) served(ctx context.Context, r *runFlags, job *proto.Job) error {
	key, err := r.apiKey()
	if err != nil {
		return err
	}
	served := map[string]bool{}
	for _, u := range r.urls {
		eng, err := newEngineClient(u, key, modelsOf(job))
		if err != nil {
			return coded{err, exitUsage}
		}
		pctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		st, err := eng.Probe(pctx)
		cancel()
		if err != nil && ctx.Err() != nil {
			return fmt.Errorf("%w; engine at %s had not answered yet", context.Cause(ctx), eng)
		}
		if err != nil || st.State != proto.EngineReady { // it may serve anything once it is up; its worker waits and says so
			return nil
		}
		for _, m := range st.Models {
			served[m] = true
		}
	}
	return unservedModels(job, served)
}

func modelsOf(job *proto.Job) []string {
	var out []string
	for _, m := range job.Models {
		out = append(out, m.Model)
	}
	return out
}

func unservedModels(job *proto.Job, served map[string]bool) error {
	var have, miss []string
	for m := range served {
		have = append(have, m)
	}
	for _, m := range job.Models {
		if !served[m.Model] {
			miss = append(miss, m.Model)
		}
	}
	if len(miss) == 0 {
		return nil
	}
	slices.Sort(have)
	return coded{fmt.Errorf("no engine serves %s; served are %s. Start an engine for it, or use --model to replace the model of every line",
		strings.Join(miss, ", "), strings.Join(have, ", ")), exitInvalid}
}

// simulate starts one simulated engine for each model of the job. stop, which is never nil, ends them.
func (a *app) simulate(ctx context.Context, job *proto.Job) (urls []string, stop func(), err error) {
	live, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	stop = func() {
		cancel()
		wg.Wait()
	}
	for _, m := range job.Models {
		eng, err := sim.New(sim.Config{Models: []string{m.Model}, KVTokens: 4096, StepTime: 5 * time.Millisecond, DecodeTime: 20 * time.Microsecond, PrefillTime: 10 * time.Microsecond})
		if err != nil {
			return nil, stop, fmt.Errorf("start the simulated engine: %w", err)
		}
		up := make(chan net.Addr, 1)
		failed := make(chan error, 1)
		wg.Go(func() { failed <- eng.ListenAndServe(live, "127.0.0.1:0", func(at net.Addr) { up <- at }) })
		select {
		case at := <-up:
			urls = append(urls, "http://"+at.String())
		case err := <-failed:
			return nil, stop, fmt.Errorf("start the simulated engine: %w", err)
		}
	}
	return urls, stop, nil
}
