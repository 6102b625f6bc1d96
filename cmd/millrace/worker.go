package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"millrace/broker"
	"millrace/proto"
	"millrace/vllm"
	"millrace/worker"
)

// engineFlags say which engines to keep full, and how.
type engineFlags struct {
	urls           []string
	key, keyFile   string
	concurrency    string
	requestTimeout time.Duration
	maxAttempts    int64
	stallTimeout   time.Duration
	drainTimeout   time.Duration
	vllm           vllmFlags
	lines          int64  // of the whole job; 0: nobody knows
	hosts          *hosts // of --vllm; nil until it is started
}

func (e *engineFlags) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVar(&e.urls, "engine", nil, "`URL` of an engine (any OpenAI-compatible server); repeat it for several, or give them with commas")
	f.StringVar(&e.key, "engine-api-key", "", "key that the engines ask for; better in MILLRACE_ENGINE_API_KEY or a file")
	f.StringVar(&e.keyFile, "engine-api-key-file", "", "`FILE` with the key that the engines ask for")
	f.DurationVar(&e.stallTimeout, "stall-timeout", 2*time.Minute, "how long an engine with requests may make no token until it is thought hung")
	f.StringVar(&e.concurrency, "concurrency", "auto", "requests in flight at an engine: a number, or auto")
	f.DurationVar(&e.drainTimeout, "drain-timeout", 10*time.Minute, "when it is asked to stop: how long lines in flight may go on until they are given back")
	e.vllm.bind(cmd)
}

// apiKey is the key for the engines; empty: none. A vLLM that is started here may take its own from the environment.
func (e *engineFlags) apiKey() (string, error) {
	if e.keyFile == "" {
		if e.vllm.model != "" {
			return cmp.Or(e.key, os.Getenv("VLLM_API_KEY")), nil
		}
		return e.key, nil
	}
	b, err := broker.ReadFile("--engine-api-key-file", e.keyFile, "the file with the engines' key")
	return strings.TrimSpace(string(b)), err
}

func (e *engineFlags) inFlight() (int, error) {
	if e.concurrency == "auto" || e.concurrency == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(e.concurrency)
	if err != nil || n < 1 {
		return 0, usagef("--concurrency is %q, must be a positive number or auto", e.concurrency)
	}
	return n, nil
}

// check refuses what cannot be meant, before anything begins. known are engines that are no URLs.
func (e *engineFlags) check(known ...string) error {
	if _, err := e.inFlight(); err != nil {
		return err
	}
	switch {
	case e.drainTimeout < 0:
		return usagef("--drain-timeout is %s, must not be negative", e.drainTimeout)
	case e.stallTimeout <= 0:
		return usagef("--stall-timeout is %s, must be positive", e.stallTimeout)
	}
	if len(e.urls) > 0 && e.vllm.model != "" {
		return usagef("give --engine for engines that are there, or --vllm to start one, not both")
	}
	if err := e.vllm.check(); err != nil {
		return err
	}
	key, err := e.apiKey()
	if err != nil {
		return err
	}
	var all []string
	for _, list := range e.urls {
		all = append(all, splitEngines(list)...)
	}
	e.urls = all
	for _, u := range e.urls {
		if slices.Contains(known, u) {
			continue
		}
		if _, err := newEngineClient(u, key, nil); err != nil {
			return coded{err, exitUsage}
		}
	}
	return nil
}

// splitEngines takes a list with commas apart. A password may hold commas, too: where there is one, another engine begins
// only where that can be told.
func splitEngines(list string) (all []string) {
	begins := func(s string) bool {
		lower := strings.ToLower(s)
		return strings.HasPrefix(lower, "http://") || strings.HasPrefix(lower, "https://") || s == simEngine || s == nullEngine
	}
	end := len(list)
	for at := end - 1; at >= 0; at-- {
		if part := strings.TrimSpace(list[at+1 : end]); list[at] == ',' && (begins(part) || !strings.Contains(list, "@")) {
			all = append(all, part)
			end = at
		}
	}
	all = append(all, strings.TrimSpace(list[:end]))
	slices.Reverse(all)
	return all
}

// once drops engines that were given before in other words, and says so: two workers beside one GPU would each think that
// it has it alone. localhost is 127.0.0.1. Those that run inside this process are one each time. It is called after check.
func (e *engineFlags) once(w io.Writer) {
	have := map[string]string{}
	e.urls = slices.DeleteFunc(e.urls, func(u string) bool {
		eng, err := worker.NewHTTP(u, "")
		if err != nil {
			return false
		}
		at, _ := url.Parse(eng.String()) // it was made of one
		if at.Hostname() == "localhost" {
			at.Host = strings.Replace(at.Host, "localhost", "127.0.0.1", 1)
		}
		first, again := have[at.String()]
		switch {
		case !again:
			have[at.String()] = eng.String()
		case first == eng.String():
			fmt.Fprintf(w, "note: engine %s is given more than once; it is used once\n", first)
		default:
			fmt.Fprintf(w, "note: %s and %s are the same engine; it is used once\n", first, eng)
		}
		return again
	})
}

// crew is the workers of one process, one for each engine.
type crew struct {
	drain context.CancelCauseFunc // take no more
	abort context.CancelCauseFunc // break off what is in flight
	over  chan error
	ended chan struct{} // closed when all have
}

// workers builds one worker for each engine. Their journals lie under dir; empty: they keep none. models are what the
// null engine serves.
func (a *app) workers(conn *broker.Conn, e *engineFlags, models []string, reg prometheus.Registerer, ackWait time.Duration, dir string) ([]*worker.Worker, error) {
	key, err := e.apiKey()
	if err != nil {
		return nil, err
	}
	n, err := e.inFlight()
	if err != nil {
		return nil, err
	}
	var out []*worker.Worker
	gpus := new(worker.GPUs)
	for _, u := range e.urls {
		eng, err := newEngineClient(u, key, models)
		if err != nil {
			return nil, coded{err, exitUsage}
		}
		out = append(out, &worker.Worker{
			Conn: conn, Self: broker.Self(), Engine: eng, Concurrency: n, RequestTimeout: e.requestTimeout,
			MaxAttempts: int(e.maxAttempts), AckWait: ackWait, StallTimeout: e.stallTimeout,
			Log: a.log, Registry: reg, Program: programVersion(), GPUs: gpus,
		})
		if dir != "" {
			out[len(out)-1].Dir = filepath.Join(dir, proto.ModelToken(placeOf(eng.String())))
		}
		e.hosts.keep(u, out[len(out)-1])
	}
	return out, nil
}

// nullEngine is an engine inside the process that answers at once; it measures what lies around an engine.
const nullEngine = "null:"

// simEngine is what `millrace run` takes for a simulated one.
const simEngine = "sim"

func newEngineClient(u, key string, models []string) (worker.Engine, error) {
	if u == nullEngine {
		return &worker.Null{Models: models}, nil
	}
	if at := strings.LastIndexByte(u, '@'); at >= 0 {
		if p, err := url.Parse(u); err != nil || p.User == nil { // what is said of it could show a part of the password
			return nil, fmt.Errorf("engine URL \"…%s\": it cannot be read; give it like http://USER:PASSWORD@HOST:PORT, with %%2F for /, %%23 for #, %%25 for %% in user and password", u[at:])
		}
	}
	return worker.NewHTTP(u, key)
}

// placeOf is an engine's URL without its scheme.
func placeOf(engine string) string {
	if u, err := url.Parse(engine); err == nil && u.Host != "" {
		return u.Host + u.Path
	}
	return engine
}

// startCrew runs the workers. They end when take ends (in order, for as long as d lets them) or stop ends (at once), or
// all together when one of them fails.
func startCrew(take, stop context.Context, ws []*worker.Worker, d *drain) *crew {
	c := &crew{over: make(chan error, 1), ended: make(chan struct{})}
	take, c.drain = context.WithCancelCause(take)
	stop, c.abort = context.WithCancelCause(stop)
	var parts []func(context.Context) error
	for _, w := range ws {
		parts = append(parts, func(take context.Context) error {
			err := w.Run(take, stop)
			if err != nil { // the others stop in order, too
				c.drain(err)
			}
			return err
		})
	}
	over, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-take.Done():
			d.watch(over, stop, func() { c.abort(nil) })
		case <-over:
		}
	}()
	go func() {
		err := together(take, parts...)
		close(over)
		close(c.ended)
		<-watched
		c.over <- err
	}()
	return c
}

// stop lets the workers finish what is in flight and waits for them.
func (c *crew) stop() error {
	c.drain(nil)
	return c.wait()
}

// wait waits until the workers have ended.
func (c *crew) wait() error {
	defer c.abort(nil)
	return <-c.over
}

func (a *app) workerCommand() *cobra.Command {
	var e engineFlags
	var ackWait time.Duration
	var check bool
	cmd := &cobra.Command{
		Use:   "worker {--engine URL | --vllm MODEL}",
		Short: "Keep an engine full: pull requests, call it, publish results",
		Long: `Keep an engine full: pull requests of the models that it serves, call it, publish results. It waits for its engine and
for its broker, and says so. One worker for each engine is usual; one process can have several.

  millrace worker --engine http://127.0.0.1:8000

With --vllm it starts the engine itself, keeps it running and ends it: one server and one worker for each of --gpus,
or two of each for a very small model.

  millrace worker --vllm meta-llama/Llama-3.2-1B-Instruct --gpus all -- --max-model-len 8192

With --check it asks no broker and runs nothing: it prints what it sees of its engine and what it would do, and ends with 0
if it would run lines now, else with 7.`,
		Args: e.vllm.behindDash(wants("")),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(e.urls) == 0 && e.vllm.model == "" {
				return usagef("no engine; give --engine URL, such as http://localhost:8000, or --vllm MODEL to start one")
			}
			if err := e.check(); err != nil {
				return err
			}
			if err := checkAckWait(ackWait); err != nil {
				return err
			}
			if err := checkTries(e.maxAttempts, e.requestTimeout); err != nil {
				return err
			}
			e.once(a.std.err)
			switch {
			case check && e.vllm.model != "":
				return usagef("--check looks at an engine that is there; give --engine URL")
			case check:
				return a.check(cmd.Context(), &e)
			case a.json:
				return usagef("--json is for --check; a worker prints nothing else as JSON")
			}
			defer runtime.KeepAlive(spareHeap())
			take, stop, done := a.phases(cmd.Context(), e.drainTimeout, "")
			defer done()
			return a.work(take, stop, &e, ackWait)
		},
	}
	e.bind(cmd)
	f := cmd.Flags()
	f.DurationVar(&e.requestTimeout, "request-timeout", 30*time.Minute, "time for one try of a line whose job does not say")
	f.Int64Var(&e.maxAttempts, "max-attempts", 4, "tries of a line whose job does not say, 1 to 100")
	f.DurationVar(&ackWait, "ack-wait", 0, "how long a request may go without a heartbeat (default: as the broker's, 1m)")
	f.BoolVar(&check, "check", false, "print what is seen of the engine and what a worker would do, and end")
	a.jsonFlag(cmd)
	a.metricsFlag(cmd)
	a.natsFlags(cmd)
	return cmd
}

func (a *app) work(take, stop context.Context, e *engineFlags, ackWait time.Duration) error {
	reg, stopMetrics, err := a.serveMetrics()
	if err != nil {
		return err
	}
	defer stopMetrics()
	take, leave := context.WithCancelCause(take)
	defer leave(nil)
	if e.hosts, err = a.startVLLM(stop, e, reg, func(err error) { // one that is given up leaves its worker to say so
		if f := (*vllm.Failed)(nil); !errors.As(err, &f) || f.Final {
			leave(err)
			return
		}
		a.log.Warn(err.Error())
	}); err != nil {
		return err
	}
	defer e.hosts.stop()
	conn, err := a.connect(take, "worker", foreverWait)
	if err != nil {
		return orStopped(take, err)
	}
	defer conn.Close()
	ws, err := a.workers(conn, e, nil, reg, ackWait, filepath.Join(a.data, "worker"))
	if err != nil {
		return err
	}
	ready()
	c := startCrew(take, stop, ws, a.drain(e, reg))
	err = c.wait()
	if stop.Err() != nil {
		return context.Cause(stop)
	}
	return orStopped(take, err)
}

// orStopped is nil where a role was asked to stop, whatever it was doing.
func orStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return stopped(ctx)
	}
	return err
}
