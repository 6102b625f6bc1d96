package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"millrace/proto"
)

// workerRow is a worker in `status --json`. What is not known is null, or not there.
type workerRow struct {
	ID          string   `json:"id"`
	Host        string   `json:"host"`
	Engine      string   `json:"engine"`
	Kind        string   `json:"engine_kind,omitempty"`
	Version     string   `json:"engine_version"`
	Models      []string `json:"models"`
	State       string   `json:"state"`
	Reason      string   `json:"reason,omitempty"`
	Limit       int64    `json:"limit"`
	LimitWhy    string   `json:"limit_reason"`
	InFlight    int64    `json:"in_flight"`
	Held        int64    `json:"held"`
	OK          int64    `json:"ok"`
	Failed      int64    `json:"failed"`
	Load        float64  `json:"load_s"`   // from its start until its engine was first ready
	Uptime      float64  `json:"uptime_s"` // of the worker
	MaxLen      int64    `json:"max_model_len,omitzero"`
	KVTokens    int64    `json:"kv_tokens,omitzero"`
	Slots       int64    `json:"max_sequences,omitzero"`   // that the engine runs at once
	KVUsage     *float64 `json:"kv_usage"`                 // 0 to 1
	Preemptions *int64   `json:"preemptions"`              // that the engine counted since the worker's start
	TokenRate   *float64 `json:"output_tokens_per_second"` // over the last 15 s
	RateOf      string   `json:"tokens_of,omitempty"`      // engine: all that it made; answers: those of the answers to this worker
	LastError   string   `json:"last_error,omitempty"`     // of the last attempt that failed
	LastErrorS  *float64 `json:"last_error_s,omitempty"`   // how long ago that was
	Flags       []string `json:"engine_flags,omitempty"`   // or NAME=VALUE, as it tells of its settings
	GPUs        []gpuRow `json:"gpus,omitempty"`
	OwnGPUs     bool     `json:"gpus_are_the_engines,omitzero"` // otherwise they are those of the worker's machine, told of engines at a loopback address; nobody knows which of them it has
	Restarts    *int64   `json:"engine_restarts,omitzero"`      // where the worker started the engine itself
	LastRestart string   `json:"last_restart_cause,omitzero"`   // of these
	Program     string   `json:"millrace,omitempty"`
	Simulated   bool     `json:"simulated,omitzero"`
}

// gpuRow is a GPU as nvidia-smi shows it.
type gpuRow struct {
	Index       string   `json:"index"`
	UUID        string   `json:"uuid"`
	Name        string   `json:"name"`
	MemoryUsed  *int64   `json:"memory_used_bytes"`
	MemoryTotal *int64   `json:"memory_total_bytes"`
	Power       *float64 `json:"power_watts"`
	Utilization *float64 `json:"utilization"` // 0 to 1
}

func rowOfWorker(w *proto.Worker) workerRow {
	r := workerRow{
		ID: w.ID, Host: w.Host, Engine: w.Engine, Kind: w.Kind, Version: w.Version, Models: w.Models, State: w.State, Reason: w.Reason,
		Limit: w.Limit, LimitWhy: w.LimitWhy, InFlight: w.InFlight, Held: w.Held, OK: w.OK, Failed: w.Failed,
		Load: float64(w.LoadUS) / 1e6, Uptime: float64(w.UptimeUS) / 1e6, MaxLen: w.MaxLen, KVTokens: w.KVTokens, Slots: w.Slots,
		RateOf: w.RateOf, LastError: w.LastError, Flags: w.Flags, GPUs: rowsOfGPUs(w.GPUs), OwnGPUs: w.OwnGPUs,
		Program: w.Program, Simulated: w.Simulated,
	}
	if w.Metered {
		r.KVUsage, r.Preemptions = &w.KVUsage, &w.Preemptions
	}
	if w.Hosted {
		r.Restarts, r.LastRestart = &w.Restarts, w.LastRestart
	}
	if w.RateOf != "" {
		r.TokenRate = &w.TokenRate
	}
	if w.LastError != "" {
		ago := float64(w.LastErrorUS) / 1e6
		r.LastErrorS = &ago
	}
	return r
}

func rowsOfGPUs(gpus []proto.GPU) (out []gpuRow) {
	for _, g := range gpus {
		out = append(out, gpuRow{g.Index, g.UUID, g.Name, told(g.MemoryUsed), told(g.MemoryTotal), told(g.Power), told(g.Utilization)})
	}
	return out
}

// told is nil for what is not known of a GPU.
func told[N int64 | float64](v N) *N {
	if v < 0 {
		return nil
	}
	return &v
}

// How much of the workers a table shows. It should fit a terminal of 120 columns.
const (
	manyWorkers = 16 // from more on it is not told why limits are what they are
	wideModel   = 24 // bytes
	wideEngine  = 24
	wideError   = 90
)

// printWorkers prints a row for each worker, and what there is to say of it under that.
func printWorkers(w io.Writer, all []workerRow) error {
	var table bytes.Buffer
	tw := tabwriter.NewWriter(&table, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "WORKER\tSTATE\tMODEL\tIN FLIGHT\tKV\tTOK/S\tOK\tFAILED\tENGINE")
	ours := false
	for i := range all {
		r := &all[i]
		kv := unknown
		if r.KVUsage != nil {
			kv = fmt.Sprintf("%.0f%%", 100**r.KVUsage)
		}
		rate := figure(r.TokenRate, 1, 0)
		if r.RateOf == proto.RateAnswers {
			rate, ours = rate+"*", true
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d/%d\t%s\t%s\t%d\t%d\t%s\n", plain(r.ID), r.State, r.model(), r.InFlight, r.Limit, kv, rate, r.OK, r.Failed,
			proto.Truncate(plain(strings.TrimPrefix(r.Engine, "http://")), wideEngine))
	}
	_ = tw.Flush() // to memory
	for i, line := range strings.Split(strings.TrimSuffix(table.String(), "\n"), "\n") {
		if _, err := fmt.Fprintln(w, line); err != nil {
			return err
		}
		if i > 0 { // under the head
			all[i-1].notes(w, len(all) <= manyWorkers)
		}
	}
	if ours {
		fmt.Fprintln(w, "* of the answers to this worker: the engine tells no count of its tokens")
	}
	return nil
}

// model names the first model, and counts the others.
func (r *workerRow) model() string {
	if len(r.Models) == 0 {
		return unknown
	}
	others := ""
	if n := len(r.Models) - 1; n > 0 {
		others = fmt.Sprintf(" +%d", n)
	}
	return proto.Truncate(plain(r.Models[0]), wideModel-len(others)) + others
}

// notes says why a worker does not run, or why it has as much in flight as it has, and what went wrong last. What fails here
// fails with the next line of the table, too.
func (r *workerRow) notes(w io.Writer, limit bool) {
	if r.Reason != "" {
		fmt.Fprintf(w, "  %s\n", plain(r.Reason))
	}
	if limit && r.State == proto.EngineReady && r.LimitWhy != "" {
		fmt.Fprintf(w, "  limit %d: %s\n", r.Limit, plain(r.LimitWhy))
	}
	if r.LastError != "" {
		fmt.Fprintf(w, "  last error %s ago: %s\n", span(time.Duration(*r.LastErrorS*float64(time.Second))), proto.Truncate(plain(r.LastError), wideError))
	}
}
