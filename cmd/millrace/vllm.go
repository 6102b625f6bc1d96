package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"millrace/broker"
	"millrace/proto"
	"millrace/vllm"
	"millrace/worker"
)

// vllmFlags say which vLLM servers to start here.
type vllmFlags struct {
	model    string
	command  string
	gpus     string
	quiet    time.Duration
	restarts int
	flags    vllm.Flags // behind --
	groups   [][]string // GPUs of each server; one nil: as the environment says
	byBus    bool       // they are numbered as nvidia-smi does it
}

func (v *vllmFlags) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&v.model, "vllm", "", "start a vLLM server for `MODEL` (a name or a folder) here, and keep it running; flags of `vllm serve` go behind --")
	f.StringVar(&v.gpus, "gpus", "", "GPUs for --vllm, a server and a worker for each, or two with a very small model (README): all, or numbers such as 0 or 0,1 (default: what vLLM takes by itself)")
	f.StringVar(&v.command, "vllm-command", "vllm", "`COMMAND` that starts vLLM, without the word serve; may have arguments")
	f.DurationVar(&v.quiet, "engine-start-timeout", 15*time.Minute, "how long a vLLM server that starts may log nothing new until it is thought stuck")
	f.IntVar(&v.restarts, "engine-restarts", 12, "restarts of a vLLM server until it is given up, counted anew when it has answered lines since the last one, or was well for 10 minutes; one that does not come up three times in a row is given up sooner, unless its port is taken or the hub of models not reached")
}

// check refuses what cannot be meant, and finds the GPUs.
func (v *vllmFlags) check() error {
	if v.model == "" {
		switch {
		case v.flags != nil:
			return usagef("what stands behind -- is for vLLM; give --vllm MODEL, too")
		case v.gpus != "":
			return usagef("--gpus is for the vLLM servers that are started here; give --vllm MODEL, too")
		}
		return nil
	}
	each, err := v.flags.GPUs()
	if err == nil {
		err = v.flags.Check()
	}
	switch {
	case err != nil:
		return coded{err, exitUsage}
	case strings.TrimSpace(v.command) == "":
		return usagef("--vllm-command is empty; leave it out for vllm")
	case v.quiet <= 0:
		return usagef("--engine-start-timeout is %s, must be positive", v.quiet)
	case v.restarts < 0:
		return usagef("--engine-restarts is %d, must not be negative", v.restarts)
	}
	v.groups = [][]string{nil}
	if v.gpus != "" {
		if v.groups, v.byBus, err = vllm.GPUs(v.gpus, each); err != nil {
			return coded{err, exitUsage}
		}
	}
	return nil
}

// behindDash takes the words behind -- from a command's arguments: they are vLLM's.
func (v *vllmFlags) behindDash(wants cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if at := cmd.ArgsLenAtDash(); at >= 0 {
			args, v.flags = args[:at], append(vllm.Flags{}, args[at:]...)
		}
		return wants(cmd, args)
	}
}

// served refuses models of the job under whose names no server will answer, where that can be told before it is loaded.
func (v *vllmFlags) served(job *proto.Job) error {
	names := v.flags.Names(v.model)
	if names == nil {
		return nil
	}
	served := map[string]bool{}
	for _, name := range names {
		served[name] = true
	}
	if err := unservedModels(job, served); err != nil {
		return coded{fmt.Errorf("%w, or -- --served-model-name NAME", err), exitInvalid}
	}
	return nil
}

// hosts are the vLLM servers of one process.
type hosts struct {
	servers []*vllm.Server
	locks   []*broker.Lock
	end     context.CancelFunc
	running sync.WaitGroup
	failed  func(error) // what to do when one will never come up, or all are given up
	log     *slog.Logger

	mu    sync.Mutex
	given int // up, so many of them
}

// startVLLM starts servers, where they are asked for, and makes them the engines. They are asked to end by hosts.stop, which
// waits for it, and killed when patience ends. failed is called where nothing can come of them any more: all were given up,
// or one cannot come up.
func (a *app) startVLLM(patience context.Context, e *engineFlags, reg prometheus.Registerer, failed func(error)) (*hosts, error) {
	h := &hosts{failed: failed, log: a.log, end: func() {}}
	if e.vllm.model == "" {
		return h, nil
	}
	key, err := e.apiKey()
	if err != nil {
		return nil, err
	}
	restarted, err := vllm.NewRestarted(reg)
	if err != nil {
		return nil, err
	}
	self := broker.Self()
	card := sync.OnceValue(func() vllm.Card { // the servers are all alike
		return vllm.Cards((&vllm.Server{GPUs: slices.Concat(e.vllm.groups...), ByBus: e.vllm.byBus}).Devices())
	})
	cards := len(e.vllm.groups)
	perCard := 1
	if n, _ := e.inFlight(); n == 0 { // who says how many is not to get twice as many
		perCard = (&vllm.Server{Model: e.vllm.model, Flags: e.vllm.flags, GPUs: e.vllm.groups[0]}).PerCard(card, cards, runtime.GOMAXPROCS(0), e.lines)
	}
	if err := h.folders(filepath.Join(a.data, "vllm"), cards*perCard, self.Host, func(n int) {
		a.log.Warn("ended an engine that a killed millrace had left", "processes", n)
	}); err != nil {
		h.unlock()
		return nil, err
	}
	if err := h.ports(&e.vllm); err != nil {
		h.unlock()
		return nil, coded{err, exitUsage}
	}
	live, end := context.WithCancel(context.Background())
	h.end = end
	var mates *vllm.Mates
	for i, s := range h.servers {
		if i%perCard == 0 {
			mates = vllm.NewMates(perCard)
		}
		s.Command, s.Model, s.Flags, s.GPUs, s.Mates = commandOf(e.vllm.command), e.vllm.model, e.vllm.flags, e.vllm.groups[i/perCard], mates
		s.ByBus, s.Quiet, s.Restarts, s.Key, s.Host, s.Log, s.Restarted = e.vllm.byBus, e.vllm.quiet, e.vllm.restarts, key, self.Host, a.log, restarted
		s.Tune(card)
		e.urls = append(e.urls, s.String())
		fmt.Fprintf(a.std.err, "starting vLLM for %s at %s%s; its log is %s\n", s.Model, s, onGPUs(s.GPUs, perCard), s.LogFile())
		h.running.Go(func() { h.watch(s, s.Run(live, patience)) })
	}
	return h, nil
}

// commandOf splits what the user wants vLLM to be started with. Some take the word serve for a part of it.
func commandOf(s string) []string {
	words := strings.Fields(s)
	if n := len(words); n > 1 && words[n-1] == "serve" {
		words = words[:n-1]
	}
	return words
}

// onGPUs says where a server runs, and that others are there, too.
func onGPUs(ids []string, servers int) string {
	switch {
	case len(ids) == 0 && servers > 1:
		return fmt.Sprintf(", one of %d on its GPU", servers)
	case len(ids) == 0:
		return ""
	case servers > 1:
		return fmt.Sprintf(" on GPU %s, one of %d there", ids[0], servers)
	case len(ids) == 1:
		return " on GPU " + ids[0]
	}
	return " on GPUs " + strings.Join(ids, ", ")
}

// watch takes the end of a server.
func (h *hosts) watch(s *vllm.Server, err error) {
	if err == nil {
		return
	}
	h.mu.Lock()
	h.given++
	all := h.given == len(h.servers)
	h.mu.Unlock()
	var f *vllm.Failed
	if errors.As(err, &f) {
		err = coded{err, exitEngine}
	}
	if all || f == nil || f.Final {
		if len(h.servers) > 1 {
			err = fmt.Errorf("%w; it is %s%s, its log is %s", err, s, onGPUs(s.GPUs, 1), s.LogFile())
		}
		h.failed(err)
		return
	}
	h.log.Warn(fmt.Sprintf("%v; the other engines go on without it", err), "engine", s.String(), "log", s.LogFile())
}

// folders takes a folder for each of n servers: those that no living millrace has. What a dead one left running in any of
// them is ended, and told.
func (h *hosts) folders(dir string, n int, host string, told func(int)) error {
	known, err := filepath.Glob(filepath.Join(dir, "[0-9]*"))
	if err != nil {
		return err
	}
	for i := 1; len(h.servers) < n || i <= len(known); i++ {
		name := filepath.Join(dir, strconv.Itoa(i))
		lock, err := broker.LockDir(name)
		if errors.Is(err, broker.ErrInUse) {
			continue
		}
		if err != nil {
			return err
		}
		ended, err := vllm.EndOrphan(name, host)
		if ended > 0 {
			told(ended)
		}
		if len(h.servers) == n {
			lock.Unlock()
			continue
		}
		h.locks = append(h.locks, lock)
		if err != nil {
			return err
		}
		h.servers = append(h.servers, &vllm.Server{Dir: name})
	}
	return nil
}

// ports gives each server its port: free ones, or from the one on that the user wants.
func (h *hosts) ports(v *vllmFlags) error {
	first, err := v.flags.Port()
	if err != nil {
		return err
	}
	taken := map[int]bool{}
	for i, s := range h.servers {
		if s.Port = first + i; first == 0 {
			if s.Port, err = vllm.FreePort(func(p int) bool { return taken[p] }); err != nil {
				return err
			}
		}
		taken[s.Port] = true
	}
	return nil
}

// stop ends the servers and waits until nothing of them is left.
func (h *hosts) stop() {
	h.end()
	h.running.Wait()
	h.unlock()
}

func (h *hosts) unlock() {
	for _, l := range h.locks {
		l.Unlock()
	}
	h.locks = nil
}

// keep gives a worker the server at a URL, where it is one of ours.
func (h *hosts) keep(u string, w *worker.Worker) {
	if h == nil {
		return
	}
	for _, s := range h.servers {
		if s.String() == u {
			w.Keeper, w.KVTokens, w.Answered, w.Flags = s, s.KVTokens, &s.Answered, s.Shown
			w.Sequences, w.Graphs = s.Sequences, s.Graphs
			w.Devices, w.Coming, w.Restarts = s.Devices(), s.Flags.Names(s.Model), s.Again
			if w.Dir != "" { // its port may be another one each time
				w.Dir = filepath.Join(filepath.Dir(w.Dir), "vllm-"+filepath.Base(s.Dir))
			}
		}
	}
}
