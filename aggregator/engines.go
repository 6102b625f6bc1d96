package aggregator

import (
	"cmp"
	"maps"
	"slices"

	"millrace/proto"
)

// Engine is the engine of one worker of a job; a worker that started again is another one. What it is was said by the
// worker while it was there to be asked, and the last that is known counts; how it did comes from the results. None of it
// can be had from the files, so nothing of it is verified. What is not known is null, or not there.
type Engine struct {
	Worker    string   `json:"worker"`
	Host      string   `json:"host,omitempty"`
	Kind      string   `json:"engine_kind,omitempty"`
	Version   string   `json:"engine_version,omitempty"`
	Models    []string `json:"models,omitempty"`
	KVTokens  int64    `json:"kv_tokens,omitempty"` // capacity of its KV cache
	MaxLen    int64    `json:"max_model_len,omitempty"`
	Slots     int64    `json:"max_sequences,omitzero"` // that it runs at once
	Program   string   `json:"millrace,omitempty"`
	Simulated bool     `json:"simulated"`
	// Flags are those of its command line, keys left out, where the worker knows it; otherwise settings that its metrics
	// tell, as NAME=VALUE.
	Flags []string `json:"engine_flags,omitempty"`
	// GPUs are those of the engine where OwnGPUs says so. Otherwise they are those of the worker's machine, told where the
	// engine's URL is a loopback address. Nobody knows which of them it has; through a tunnel, such as of ssh -L, none.
	GPUs    []GPU `json:"gpus,omitempty"`
	OwnGPUs bool  `json:"gpus_are_the_engines,omitzero"`

	Lines int64 `json:"lines"` // of this job that it ended, or that it had when the job was cancelled or its time over
	// InFlight is how many requests it might have at once when the last of these lines was started: what was found to be
	// right for it, or what --concurrency said.
	InFlight *int64 `json:"in_flight_limit"`
	// FullShare is the share of the time with work in which at least 95 % of as many as might be were in flight, lines of
	// other jobs included. That time is from the start of the first of these lines to that of the last, but for pauses of
	// 30 s and more in which none of them was at the engine (see Figures.Idle): each stretch of work between two of these
	// counts from its first start to its last. Null where each had one start.
	FullShare *float64 `json:"full_share"`
	// Preemptions were counted by the engine from the start of the first of these lines to the end of the last, give or
	// take a few seconds; those of other jobs, and of other clients of the engine, are among them.
	Preemptions        *int64   `json:"preemptions"`
	PreemptionsPerLine *float64 `json:"preemptions_per_line"` // Preemptions / Lines
	// Restarts is how often the engine was started again from its worker's start on, also while it ran lines of other jobs,
	// and LastRestart the cause of the last time, as millrace_engine_restarts_total has it. Neither is there where the worker
	// did not start the engine itself.
	Restarts    *int64 `json:"restarts,omitzero"`
	LastRestart string `json:"last_restart,omitzero"`
	// GivenUp is why the engine was not started again any more, where the worker started it itself. Such an engine is listed
	// though it may have ended no line, if it was for a model of the job and its worker was there while the job ran.
	GivenUp string `json:"given_up,omitzero"`
}

// GPU is a GPU as nvidia-smi names it.
type GPU struct {
	UUID        string `json:"uuid,omitempty"`
	Name        string `json:"name"`
	MemoryBytes int64  `json:"memory_bytes,omitzero"`
}

// pace is what the results of one worker tell of how full it kept its engine.
type pace struct {
	lines         int64
	work          []stretch // in order, and none nearer to the next than pause
	pause         int64
	metered       bool
	before, after int64 // pre-emptions
}

// stretch is a time in which a worker had lines of the job at its engine, and the first and the last start in it whose
// pace is told. Workers of older versions tell none.
type stretch struct {
	span
	told        bool
	first, last mark
}

// mark is a start of a line, on the worker's clock.
type mark struct{ startUS, fullUS, limit int64 }

// pace takes in the pace of a result.
func (r *Report) pace(res *proto.Result) {
	p := r.paces[res.Worker]
	if p == nil {
		p = &pace{pause: longPause}
		r.paces[res.Worker] = p
	}
	p.lines++
	w := &res.Pace
	at := mark{res.StartUS, w.FullUS, w.Limit}
	p.work = addTo(p.work, stretch{atEngine(res), w.Limit > 0, at, at}, &p.pause)
	if w.Limit <= 0 || !w.Metered {
		return
	}
	if !p.metered || w.Before < p.before {
		p.before = w.Before
	}
	p.metered, p.after = true, max(p.after, w.After)
}

func (s stretch) with(o stretch) stretch {
	s.span = s.span.with(o.span)
	switch {
	case !o.told:
		return s
	case !s.told:
		s.first, s.last = o.first, o.last
	}
	if o.first.startUS < s.first.startUS {
		s.first = o.first
	}
	if o.last.startUS > s.last.startUS {
		s.last = o.last
	}
	s.told = true
	return s
}

// told says whether the pace of a start is.
func (p *pace) told() bool {
	return slices.ContainsFunc(p.work, func(s stretch) bool { return s.told })
}

// fill tells the pace of an engine.
func (p *pace) fill(e *Engine) {
	e.Lines = p.lines
	var full, of int64
	for _, s := range p.work {
		if s.told {
			e.InFlight = &s.last.limit
			full += s.last.fullUS - s.first.fullUS
			of += s.last.startUS - s.first.startUS
		}
	}
	if of > 0 {
		e.FullShare = round(min(max(float64(full)/float64(of), 0), 1))
	}
	if p.metered {
		n := max(p.after-p.before, 0)
		e.Preemptions, e.PreemptionsPerLine = &n, round(float64(n)/float64(p.lines))
	}
}

// engines lists the engines of the workers that were heard, and of those whose results tell something.
func (r *Report) engines(heard []*proto.Worker) []Engine {
	all := map[string]*Engine{}
	for _, w := range heard {
		all[w.ID] = engineOf(w)
	}
	for id, p := range r.paces {
		if all[id] == nil && p.told() {
			all[id] = &Engine{Worker: id}
		}
		if e := all[id]; e != nil {
			p.fill(e)
		}
	}
	out := []Engine{}
	for _, id := range slices.Sorted(maps.Keys(all)) {
		out = append(out, *all[id])
	}
	return out
}

func engineOf(w *proto.Worker) *Engine {
	e := &Engine{
		Worker: w.ID, Host: w.Host, Kind: w.Kind, Slots: w.Slots, Version: w.Version, Models: w.Models, KVTokens: w.KVTokens, MaxLen: w.MaxLen,
		Program: w.Program, Simulated: w.Simulated, Flags: w.Flags, OwnGPUs: w.OwnGPUs, LastRestart: w.LastRestart, GivenUp: w.GivenUp,
	}
	if w.Hosted {
		e.Restarts = &w.Restarts
	}
	for _, g := range w.GPUs {
		e.GPUs = append(e.GPUs, GPU{g.UUID, g.Name, max(g.MemoryTotal, 0)})
	}
	return e
}

// learn returns what is to be remembered of a worker's engine: what stays the same for long, of what it says now, and of
// what it said before where it does not say it any more.
func learn(old, now *proto.Worker) *proto.Worker {
	w := &proto.Worker{
		ID: now.ID, Host: now.Host, Kind: now.Kind, Slots: now.Slots, Version: now.Version, Models: now.Models, KVTokens: now.KVTokens, MaxLen: now.MaxLen,
		Program: now.Program, Simulated: now.Simulated, Flags: now.Flags, OwnGPUs: now.OwnGPUs,
		Hosted: now.Hosted, Restarts: now.Restarts, LastRestart: now.LastRestart, GivenUp: now.GivenUp,
	}
	for _, g := range now.GPUs {
		w.GPUs = append(w.GPUs, proto.GPU{Index: g.Index, UUID: g.UUID, Name: g.Name, MemoryTotal: g.MemoryTotal})
	}
	if old == nil {
		return w
	}
	w.Version, w.KVTokens, w.MaxLen = cmp.Or(w.Version, old.Version), cmp.Or(w.KVTokens, old.KVTokens), cmp.Or(w.MaxLen, old.MaxLen)
	w.Kind, w.Slots = cmp.Or(w.Kind, old.Kind), cmp.Or(w.Slots, old.Slots)
	w.Simulated = w.Simulated || old.Simulated
	if len(w.Models) == 0 {
		w.Models = old.Models
	}
	if len(w.Flags) == 0 {
		w.Flags = old.Flags
	}
	if len(w.GPUs) == 0 {
		w.GPUs, w.OwnGPUs = old.GPUs, old.OwnGPUs
	}
	return w
}

// gaveUp takes the engine of a worker that gave it up into the jobs that it was for.
func (s *state) gaveUp(w *proto.Worker) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, j := range s.jobs {
		if j.state != proto.FoldFolding || len(j.engines) >= maxKinds {
			continue
		}
		if _, known := j.engines[w.ID]; !known && slices.ContainsFunc(j.spec.Models, func(m proto.ModelLines) bool { return slices.Contains(w.Models, m.Model) }) {
			j.engines[w.ID] = nil
		}
	}
}

func (e engines) known() []*proto.Worker {
	var out []*proto.Worker
	for _, w := range e {
		if w != nil {
			out = append(out, w)
		}
	}
	sortBy(out, func(w *proto.Worker) string { return w.ID })
	return out
}
