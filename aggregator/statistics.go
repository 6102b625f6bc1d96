package aggregator

import (
	"maps"
	"slices"

	"millrace/proto"
)

// Statistics are the figures of a finished job, as they stand in its manifest. They speak of the results that count,
// one per line, but for Dropped. Tokens are those that the engine itself counted and sent with its answers.
//
// Three clocks: a worker's own (its start is 0) for what one worker did; the broker's for what several did together,
// each worker's clock being set against it by the quickest of its results; no other machine's.
type Statistics struct {
	// Figures of the whole job. Its duration goes from the first result, less the time that its request took, to the
	// last result, by the broker's timestamps.
	Figures
	ByModel  []ModelStatistics  `json:"by_model"`
	ByWorker []WorkerStatistics `json:"by_worker"`
	Failures []Failure          `json:"failures"` // the most frequent first
	Dropped  Dropped            `json:"dropped"`
}

// Figures are what is told of a job, a model and a worker alike. What cannot be told is null.
type Figures struct {
	Completed int64 `json:"completed"` // lines that ended ok
	// Failed are lines that ended as an error. Of a worker, those are not among them that were broken off at its engine as
	// their job was cancelled or its time over.
	Failed int64 `json:"failed"`
	// Attempts that were charged: for each line those in its history, and its last one if an engine was asked.
	Attempts     int64 `json:"attempts"`
	InputTokens  int64 `json:"total_input_tokens"`  // prompt tokens, the cached ones included
	OutputTokens int64 `json:"total_output_tokens"` // completion tokens
	CachedTokens int64 `json:"cached_tokens"`       // prompt tokens that came from the engine's prefix cache
	WithoutUsage int64 `json:"completed_without_usage"`
	// ContextCut are those of Completed that ended at a limit of tokens with fewer than their line asked for: prompt and
	// output together exceed the engine's context, and it cut the rest off without an error.
	ContextCut int64 `json:"context_cut"`

	Duration float64 `json:"duration"` // s; from the start of the first request to the end of the last
	// Idle is how much of Duration no request that ended its line, or that was broken off as its job was ended, was at an
	// engine, in s: the time between two runs of a job that was interrupted, and pauses of 30 s and more, also of an engine
	// that refused all it got. Shorter pauses of a worker that goes on afterwards are not counted, also where a user paused
	// the job, nor pauses under 1 s. Of a job in more than 4,096 pieces only the longer pauses are counted. A worker has 250 ms
	// to tell what it broke off; then the owner ends these lines too, and for how long they were at the engine nobody learns.
	Idle float64 `json:"idle"`
	// Rates over the time that was not idle: per s of Duration less Idle.
	RequestThroughput *float64 `json:"request_throughput"`     // Completed
	OutputThroughput  *float64 `json:"output_throughput"`      // completion tokens
	TotalThroughput   *float64 `json:"total_token_throughput"` // prompt and completion tokens

	// Time of a request at its engine, of the last attempts of lines that ended ok, in ms.
	MeanMS *float64 `json:"mean_e2el_ms"`
	P50MS  *float64 `json:"p50_e2el_ms"`
	P95MS  *float64 `json:"p95_e2el_ms"`
	P99MS  *float64 `json:"p99_e2el_ms"`
	MaxMS  *float64 `json:"max_e2el_ms"`

	Windows *Windows `json:"windows"`
	Steady  *Steady  `json:"steady"`
}

// Windows divide the time from the start of the first request to the end of the last; idle time is in none of them.
type Windows struct {
	// Plateau is what was in flight at least during a quarter of the time in which anything was.
	Plateau       float64 `json:"plateau"`
	RampSeconds   float64 `json:"ramp_s"`   // until 0.9 of the plateau are in flight for the first time
	SteadySeconds float64 `json:"steady_s"` // from then until 0.9 of it are for the last time
	DrainSeconds  float64 `json:"drain_s"`  // the rest
}

// Steady holds rates over the steady window, less the time that 95 % of the requests took less than, from the first request
// on. A request, with its tokens, counts evenly over the time it took; the share of that time inside is its share here. Where an
// engine lets many wait, the first ones take less time than those that came with them, and before these have ended that would
// count too much. The rates are null where the steady window is shorter than 5 times the median time of a request, or what is left
// of it shorter than 3 times: all of it is ramp and drain then.
type Steady struct {
	Seconds           float64 `json:"duration"`
	RequestThroughput float64 `json:"request_throughput"` // lines that ended, ok or not, per s
	OutputThroughput  float64 `json:"output_throughput"`
	TotalThroughput   float64 `json:"total_token_throughput"`
}

// ModelStatistics are the figures of a model: all its workers together, on the broker's clock.
type ModelStatistics struct {
	Model   string `json:"model"`
	Workers int64  `json:"workers"` // that a counting result came from; one that started again is two
	Figures
}

// WorkerStatistics are the figures of a worker, for one model, on the worker's own clock.
type WorkerStatistics struct {
	Worker      string  `json:"worker"`
	Model       string  `json:"model"`
	LoadSeconds float64 `json:"load_s"` // from the worker's start until its engine was first ready; outside Duration
	// WorkerAttempts are the charged attempts that this worker made, for all models, those of lines that another
	// worker ended included.
	WorkerAttempts int64 `json:"worker_attempts"`
	Figures
}

// Failure is one kind of error: a code, a status, and a message but for the numbers and ids in it. At most 10 messages of a
// code and status are told apart; the lines with any other are one kind more.
type Failure struct {
	Code     string `json:"code"`
	Status   int64  `json:"status_code"` // 0: the engine never answered
	Count    int64  `json:"count"`
	CustomID string `json:"custom_id"`       // of the first such line in the order of the input
	Message  string `json:"message"`         // of the same
	Line     int64  `json:"line,omitempty"`  // of the same, in the input file, from 1; 0: an engine was asked
	Mixed    bool   `json:"mixed,omitempty"` // the messages of these lines differ
}

// Dropped are the results that came and do not count, of the job and of each model that has any.
type Dropped struct {
	Losses
	ByModel []ModelLosses `json:"by_model,omitempty"`
}

// ModelLosses are those of a model.
type ModelLosses struct {
	Model string `json:"model"`
	Losses
}

// Losses are results that came and do not count.
type Losses struct {
	Duplicates int64 `json:"duplicates"` // their line had ended before
	Replaced   int64 `json:"replaced"`   // errors of lines that ended ok after all
	// WastedTokens were counted by engines for these; input_tokens holds cached ones too.
	WastedInputTokens  int64 `json:"wasted_input_tokens"`
	WastedOutputTokens int64 `json:"wasted_output_tokens"`
	WastedTokens       int64 `json:"wasted_tokens"` // both
}

func newDropped(duplicates, replaced int64, wasted proto.Usage) Dropped {
	return Dropped{Losses: newLosses(loss{duplicates, replaced, wasted})}
}

func newLosses(l loss) Losses {
	return Losses{
		Duplicates: l.Duplicates, Replaced: l.Replaced,
		WastedInputTokens: l.Wasted.Prompt, WastedOutputTokens: l.Wasted.Completion,
		WastedTokens: l.Wasted.Prompt + l.Wasted.Completion,
	}
}

// models tells the losses by model.
func (d *Dropped) models(parts ...losses) {
	var all losses
	for _, part := range parts {
		for _, model := range slices.Sorted(maps.Keys(part)) {
			all.add(model, part[model])
		}
	}
	for _, model := range slices.Sorted(maps.Keys(all)) {
		d.ByModel = append(d.ByModel, ModelLosses{model, newLosses(all[model])})
	}
}
