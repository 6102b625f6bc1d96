package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/spf13/cobra"

	"millrace/broker"
	"millrace/sim"
)

func (a *app) simCommand() *cobra.Command {
	var c sim.Config
	var addr, faults, shutdown, frontend string
	cmd := &cobra.Command{
		Use:   "sim",
		Short: "A simulated vLLM: same routes, errors, metrics and manners of dying, at a speed you choose",
		Long: `Serve a look-alike of vLLM whose text is simulated. Its scheduler works in steps as vLLM's does; a step takes
--step-time, plus --decode-time for each sequence, plus --prefill-time for each prompt token. Faults can be set at
the start (--faults) and changed while it runs (POST /sim/faults): shares of requests that fail (errors by HTTP status,
abort, torn, reset, empty, garbage) or are slow (slow, slow_factor); true for hang, asleep or crash; crash_after a number of
requests; poison, a text in a prompt that kills it.`,
		Args: wants(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkAddr("--addr", addr); err != nil {
				return err
			}
			c.Shutdown, c.Frontend = sim.Shutdown(shutdown), sim.Frontend(frontend)
			if faults != "" {
				var err error
				if c.Faults, err = sim.ParseFaults([]byte(faults)); err != nil {
					return usagef("--faults: %w", err)
				}
			}
			take, done := a.untilSignal(cmd.Context(), "")
			defer done()
			return a.simServe(take, c, addr)
		},
	}
	f := cmd.Flags()
	f.StringVar(&addr, "addr", "127.0.0.1:8000", "`HOST:PORT` to listen on; no HOST: all addresses of this machine")
	f.StringArrayVar(&c.Models, "model", []string{"sim"}, "`NAME` of a served model; repeat it for several")
	f.IntVar(&c.MaxModelLen, "max-model-len", 4096, "context in tokens")
	f.IntVar(&c.KVTokens, "kv-tokens", 131072, "capacity of the KV cache in tokens")
	f.IntVar(&c.MaxNumSeqs, "max-num-seqs", 256, "sequences that run at once, at most")
	f.IntVar(&c.MaxBatchedTokens, "max-num-batched-tokens", 2048, "tokens of one step, at most")
	f.IntVar(&c.MaxQueued, "max-num-queued-reqs", 0, "requests that run and wait, at most; one more gets HTTP 503; 0: no limit")
	f.IntVar(&c.EmbeddingDim, "embedding-dim", 0, "serve embeddings of so many numbers instead of text")
	f.IntVar(&c.OutputTokens.Min, "output-min", 32, "tokens of an answer that nothing else limits, at least")
	f.IntVar(&c.OutputTokens.Max, "output-max", 256, "tokens of an answer that nothing else limits, at most")
	f.IntVar(&c.SlidingWindow, "sliding-window", 0, "tokens that a layer with a sliding window keeps (default: every layer keeps all)")
	f.IntVar(&c.SlidingLayers, "sliding-layers", 0, "layers with a sliding window for each that keeps all")
	f.DurationVar(&c.StepTime, "step-time", 5*time.Millisecond, "time of one step")
	f.DurationVar(&c.DecodeTime, "decode-time", 20*time.Microsecond, "more time for each sequence that decodes")
	f.IntVar(&c.GraphTokens, "graph-tokens", 0, "tokens of the largest CUDA graph; a larger step takes --eager-time longer; 0: no such thing")
	f.DurationVar(&c.EagerTime, "eager-time", 0, "more time for each step that is larger than --graph-tokens")
	f.DurationVar(&c.PrefillTime, "prefill-time", 10*time.Microsecond, "more time for each prompt token")
	f.DurationVar(&c.LoadTime, "load-time", 0, "refuse connections this long at first, as if the model were loading")
	f.StringVar(&c.APIKey, "api-key", "", "API key to ask for")
	f.Uint64Var(&c.Seed, "seed", 0, "seed of faults and output lengths")
	f.StringVar(&shutdown, "shutdown", "error", "what a signal does to requests in flight: error, abort, hang or drain")
	f.StringVar(&frontend, "frontend", "python", "HTTP server to simulate: python, python-0.26 or rust, which differ in what they refuse, cut and reset")
	f.BoolVar(&c.DevMode, "dev-mode", false, "serve /is_sleeping, as VLLM_SERVER_DEV_MODE=1 does")
	f.BoolVar(&c.AnyModel, "any-model", false, "answer whatever model a request names, as llama.cpp does")
	f.StringVar(&faults, "faults", "", "faults as `JSON`, such as "+`{"errors":{"500":0.01},"abort":0.01}`)
	f.BoolVar(&c.Null, "null", false, "constant answers at once, for benchmarks")
	return cmd
}

func (a *app) simServe(ctx context.Context, c sim.Config, addr string) error {
	eng, err := sim.New(c)
	if err != nil {
		return coded{err, exitUsage}
	}
	err = eng.ListenAndServe(ctx, addr, func(at net.Addr) {
		fmt.Fprintf(a.std.err, "simulated engine at http://%s serves %v; its text is simulated\n", at, c.Models)
		ready()
	})
	if ctx.Err() != nil {
		return stopped(ctx)
	}
	var listen *net.OpError
	if errors.As(err, &listen) && listen.Op == "listen" {
		return broker.ListenError(addr, "--addr", err)
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(a.std.err, "simulated engine: died as vLLM dies, with exit status 0")
	return nil
}
