package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"

	"millrace/broker"
	"millrace/proto"
	"millrace/worker"
)

// checkRow is an engine in `worker --check --json`. What is not known is null, or not there.
type checkRow struct {
	Engine    string     `json:"engine"`
	OK        bool       `json:"ok"` // a worker would run lines now
	Reason    string     `json:"reason,omitempty"`
	State     string     `json:"state"`
	Kind      string     `json:"engine_kind,omitempty"`
	Version   string     `json:"engine_version,omitempty"`
	Models    []string   `json:"models"`
	MaxLen    int64      `json:"max_model_len,omitzero"`
	Slots     int64      `json:"max_sequences,omitzero"` // that the engine runs at once
	Metrics   bool       `json:"metrics"`                // the engine has some that are understood
	Running   *int64     `json:"running"`                // requests, of all its clients
	Waiting   *int64     `json:"waiting"`
	KVTokens  int64      `json:"kv_tokens,omitzero"`
	KVUsage   *float64   `json:"kv_usage"` // 0 to 1
	Asleep    bool       `json:"asleep"`
	Settings  []string   `json:"engine_settings,omitempty"`
	GPUs      []gpuRow   `json:"gpus,omitempty"`
	OwnGPUs   bool       `json:"gpus_are_the_engines,omitzero"`
	Simulated bool       `json:"simulated,omitzero"`
	Limit     int        `json:"limit,omitzero"` // requests that would be in flight at first
	LimitWhy  string     `json:"limit_reason,omitempty"`
	Queues    []queueFor `json:"queues"` // that lines would be pulled from
}

type queueFor struct {
	Model  string `json:"model"`
	Stream string `json:"stream"`
}

// check looks at each engine once and says what a worker would do with it. It asks no broker.
func (a *app) check(ctx context.Context, e *engineFlags) error {
	ws, err := a.workers(nil, e, nil, nil, 0, "")
	if err != nil {
		return err
	}
	var rows []checkRow
	well := true
	for _, w := range ws {
		r := rowOfFinding(w.Engine.String(), w.Check(ctx))
		rows = append(rows, r)
		well = well && r.OK
	}
	if a.json {
		err = a.printJSON(rows)
	}
	for i := range rows {
		if err == nil && !a.json {
			err = a.printCheck(&rows[i])
		}
	}
	if err == nil && !well {
		return quiet(exitUnreachable) // the reason is in what was printed
	}
	return err
}

func rowOfFinding(engine string, f *worker.Finding) checkRow {
	r := checkRow{
		Engine: engine, OK: f.Trouble == "", Reason: f.Trouble, State: f.State, Kind: f.Kind, Version: f.Version, Models: f.Models, MaxLen: f.MaxLen, Slots: f.Slots,
		Metrics: f.Gauges.Known, KVTokens: f.Gauges.KVTokens, Asleep: f.Gauges.Asleep, Settings: f.Settings, GPUs: rowsOfGPUs(f.GPUs),
		OwnGPUs: f.OwnGPUs, Simulated: f.Simulated, Limit: f.Limit, LimitWhy: f.LimitWhy, Queues: []queueFor{},
	}
	if f.Gauges.Known {
		r.Running, r.Waiting, r.KVUsage = &f.Gauges.Running, &f.Gauges.Waiting, &f.Gauges.KVUsage
	}
	for _, m := range f.Models {
		r.Queues = append(r.Queues, queueFor{m, proto.RequestStream(m)})
	}
	return r
}

// printCheck prints what is known of an engine, one thing a line.
func (a *app) printCheck(r *checkRow) error {
	tw := tabwriter.NewWriter(a.std.out, 0, 4, 2, ' ', 0)
	say := func(what, format string, args ...any) {
		fmt.Fprintf(tw, "%s\t%s\n", plain(what), plain(fmt.Sprintf(format, args...)))
	}
	say("engine", "%s", r.Engine)
	if r.Kind+r.Version != "" {
		say("version", "%s", strings.TrimSpace(r.Kind+" "+r.Version))
	}
	if len(r.Models) > 0 {
		say("models", "%s", strings.Join(r.Models, ", "))
	}
	if r.MaxLen > 0 {
		say("context", "%d tokens", r.MaxLen)
	}
	if r.Slots > 0 {
		say("at once", "%s at most", count(r.Slots, "sequence"))
	}
	if r.State != "" && (r.OK || r.Metrics) {
		say("metrics", "%s", r.load())
		say("KV cache", "%s", r.cache())
	}
	if len(r.Settings) > 0 {
		say("settings", "%s", strings.Join(r.Settings, " "))
	}
	for _, g := range r.GPUs {
		say("GPU "+g.Index, "%s", g.shown())
	}
	if len(r.GPUs) > 0 && !r.OwnGPUs {
		say("", "of this machine; which of them the engine has is not known; none, if a tunnel leads to it")
	}
	if r.OK {
		for _, q := range r.Queues {
			say("would pull", "lines for %s, from %s", q.Model, q.Stream)
		}
		say("in flight", "%s until it has seen lines: %s", count(r.Limit, "request"), r.LimitWhy)
		say("so", "a worker would run lines on it now")
	} else {
		say("so", "a worker would wait: %s", r.Reason)
	}
	return tw.Flush()
}

// load is what the engine is doing.
func (r *checkRow) load() string {
	if !r.Metrics {
		return "none that are understood; its load is not known"
	}
	return fmt.Sprintf("there; now %d running, %d waiting, of all its clients", *r.Running, *r.Waiting)
}

func (r *checkRow) cache() string {
	if r.KVTokens == 0 && r.KVUsage == nil {
		return "size not told"
	}
	size := "size not told"
	if r.KVTokens > 0 {
		size = fmt.Sprintf("%d tokens", r.KVTokens)
	}
	if r.KVUsage != nil {
		size += fmt.Sprintf(", %.0f%% in use", 100**r.KVUsage)
	}
	for _, how := range []string{"True", "False"} {
		if slices.Contains(r.Settings, "enable_prefix_caching="+how) {
			size += map[string]string{"True": ", prefixes are shared", "False": ", prefixes are not shared"}[how]
		}
	}
	return size
}

// shown describes a GPU; what nvidia-smi does not say is not there.
func (g *gpuRow) shown() string {
	s := g.Name
	if g.MemoryUsed != nil && g.MemoryTotal != nil {
		s += fmt.Sprintf(", %s of %s in use", broker.Size(*g.MemoryUsed), broker.Size(*g.MemoryTotal))
	}
	if g.Power != nil {
		s += fmt.Sprintf(", %.0f W", *g.Power)
	}
	if g.Utilization != nil {
		s += fmt.Sprintf(", busy %.0f%%", 100**g.Utilization)
	}
	return s
}
