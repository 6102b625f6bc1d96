package proto

import (
	"slices"
	"strings"
)

// Job is what is known of a job before its first line runs. It does not change. Key: job.<id>.
type Job struct {
	ID          string
	Name        string // the user's name for it, may be empty
	Input       string // path of the input as its owner sees it; "-" was standard input
	Host        string // machine of that path
	SHA256      string // of the lines as they are enqueued from (decompressed), hex
	Bytes       int64  // of the same
	Lines       int64  // lines that count: each ends as one line of the output or the error file
	Invalid     int64  // of these, invalid lines that were let through by --skip-invalid
	Models      []ModelLines
	Override    string // model that replaces the one of every line; empty: none
	MaxAttempts int64
	TimeoutMS   int64  // per attempt; 0: the worker's own
	Object      string // name in the object store where a copy of the input lies, zstd; empty: the owner has it
	Again       int64  // how many jobs of the same input and parameters came before this one
	CreatedMS   int64  // Unix time in ms on the creator's clock; shown, never compared
	MaxErrors   string // as the user gave it: "N" or "P%"; empty: no limit
	LifetimeMS  int64  // --timeout: from the moment its first owner began (Feed.Since), whoever owns it later; 0: none
	Program     string // version of the program that created it
	SkipInvalid bool
	Lane        string // one of the Lane constants; empty: normal
	// After is when a job of this id was removed before this one was created, Unix ns on the broker's clock: what is
	// left of that one is not this one's. 0: there was none, as far as the broker knows.
	After      int64
	Limit      int64 // --limit: how many lines of the input were taken at most; 0: all
	InputOrder bool  // --order input: lines are sent in the order of the input; else those that share a prefix together
}

// ModelLines counts the lines of a job that name a model.
type ModelLines struct {
	Model string
	Lines int64
}

func (m *ModelLines) visit(c *codec) {
	c.str(&m.Model)
	c.int(&m.Lines)
}

// Run tells this job from those of its id that were removed before it, which have less at a broker whose clock does not go back.
func (j *Job) Run() int64 { return j.After + 1 }

func (j *Job) visit(c *codec) {
	c.str(&j.ID)
	c.str(&j.Name)
	c.str(&j.Input)
	c.str(&j.Host)
	c.str(&j.SHA256)
	c.int(&j.Bytes)
	c.int(&j.Lines)
	c.int(&j.Invalid)
	list(c, &j.Models)
	c.str(&j.Override)
	c.int(&j.MaxAttempts)
	c.int(&j.TimeoutMS)
	c.str(&j.Object)
	c.int(&j.Again)
	c.int(&j.CreatedMS)
	c.str(&j.MaxErrors)
	c.int(&j.LifetimeMS)
	c.str(&j.Program)
	c.bool(&j.SkipInvalid)
	c.str(&j.Lane)
	c.int(&j.After)
	c.int(&j.Limit)
	c.bool(&j.InputOrder)
}

// Control is what the user last asked of a job. Key: ctl.<id>.
type Control struct {
	Want   string // one of the Want constants
	Reason string
	By     string // user@host
}

// What a user may want of a job.
const (
	WantRun    = "run"
	WantPause  = "pause"
	WantCancel = "cancel"
)

func (v *Control) visit(c *codec) {
	c.str(&v.Want)
	c.str(&v.Reason)
	c.str(&v.By)
}

// Owner names a process that holds a lease.
type Owner struct {
	ID    string // drawn at the start of the process; empty: the lease is free
	Host  string // machine, boot and process name space: two owners with the same Host can see each other's PID
	PID   int64
	Start string // start time of the process as its system tells it: a PID may be used again
}

func (o *Owner) visit(c *codec) {
	c.str(&o.ID)
	c.str(&o.Host)
	c.int(&o.PID)
	c.str(&o.Start)
}

// Feed is the lease on a job's input and how far its owner came. Key: feed.<id>.
type Feed struct {
	Owner    Owner
	State    string       // one of the Feed constants
	Note     string       // why nothing moves, for people; empty: it moves
	Enqueued int64        // lines sent to the queue at least once
	Resent   int64        // lines sent again because they were missing
	Ended    int64        // lines that the owner ended itself: invalid, cancelled, expired
	Models   []ModelLines // of Enqueued, per model: where the next owner goes on

	// What had failed, and ended, when a halted job was started again: it does not count towards --max-errors any more.
	BasisFailed int64
	BasisEnded  int64
	Since       int64 // when its first owner began, Unix ns on the clock of the broker it is at; 0: not known
	After       int64 // of the job it speaks of
	Heard       int64 // revision of what users wanted, up to which the feed has followed; 0: they wanted nothing
}

// States of a feed.
const (
	FeedFeeding  = "feeding"  // lines are being enqueued
	FeedWaiting  = "waiting"  // all are enqueued, results are coming
	FeedPaused   = "paused"   // by the user
	FeedHalted   = "halted"   // by --max-errors
	FeedEnding   = "ending"   // cancelled or expired, the rest is being ended
	FeedFinished = "finished" // every line has ended
)

func (f *Feed) visit(c *codec) {
	c.nested(&f.Owner)
	c.str(&f.State)
	c.str(&f.Note)
	c.int(&f.Enqueued)
	c.int(&f.Resent)
	c.int(&f.Ended)
	list(c, &f.Models)
	c.int(&f.BasisFailed)
	c.int(&f.BasisEnded)
	c.int(&f.Since)
	c.int(&f.After)
	c.int(&f.Heard)
}

// Machine is the part of Host that people know the machine by.
func (o *Owner) Machine() string {
	name, _, _ := strings.Cut(o.Host, "/")
	return name
}

// Progress is how far the aggregator has folded a job. Key: agg.<id>.
type Progress struct {
	State      string // one of the Fold constants
	Lines      int64
	OK         int64
	Failed     int64
	Attempts   int64 // charged attempts of the lines that ended, the last ones included
	Duplicates int64 // results dropped because the line had ended before
	Late       int64 // results that came after the files were final
	Usage      Usage // of the results that count
	Wasted     Usage // of those that were dropped
	Models     []ModelProgress
	Errors     []ErrorCount // most frequent first: ten, and CodeCancelled and CodeExpired whatever their rank
	Stream     int64        // creation time of RES in Unix ns: which stream Seq belongs to
	Seq        int64        // last sequence of RES that is folded and on disk
	Host       string       // machine of the files
	Output     string       // paths on that machine, once the files are whole
	ErrorFile  string
	Manifest   string
	Verdict    string  // VALID, or INVALID and why
	Note       string  // why the aggregator cannot go on, for people
	RateLines  float64 // lines folded per second of late, while lines were at engines
	RateTokens float64 // completion tokens, in the same way
	After      int64   // of the job it speaks of
	// BusyUS is for how long lines were at engines, in µs, by the results that came since this aggregator began: what
	// two records differ by is what was between them. 0: none has come, or it is of an older version.
	BusyUS int64
	// BeforeLines are those of OK and Failed, and BeforeTokens those of Usage.Completion, that had come before this aggregator
	// began, though it may have folded them since: they are in no rate, and not in BusyUS.
	BeforeLines  int64
	BeforeTokens int64
}

// Over says whether all lines of a model have ended, of which the job has so many.
func (p *Progress) Over(model string, lines int64) bool {
	return slices.ContainsFunc(p.Models, func(m ModelProgress) bool { return m.Model == model && m.OK+m.Failed >= lines })
}

// ContextCut counts the answers that were cut, of all models; see Result.
func (p *Progress) ContextCut() (n int64) {
	for i := range p.Models {
		n += p.Models[i].ContextCut
	}
	return n
}

// EndedWithJob counts the errors of lines that ended with their job.
func (p *Progress) EndedWithJob() (n int64) {
	for i := range p.Errors {
		if EndedWithJob(p.Errors[i].Code) {
			n += p.Errors[i].Count
		}
	}
	return n
}

// ModelProgress is the part of a model in a job's progress.
type ModelProgress struct {
	Model  string
	OK     int64
	Failed int64
	Usage  Usage
	// ContextCut are those of OK whose answers were cut; see Result.
	ContextCut int64
}

func (m *ModelProgress) visit(c *codec) {
	c.str(&m.Model)
	c.int(&m.OK)
	c.int(&m.Failed)
	c.nested(&m.Usage)
	c.int(&m.ContextCut)
}

// ErrorCount is one kind of failure, how often it came and one example.
type ErrorCount struct {
	Code     string
	Status   int64
	Count    int64
	CustomID string // of the first line that failed so
	Message  string // of the same
	Line     int64  // of the same, in the input file, from 1; 0: not known
	Mixed    bool   // the messages of these lines differ
}

func (e *ErrorCount) visit(c *codec) {
	c.str(&e.Code)
	c.int(&e.Status)
	c.int(&e.Count)
	c.str(&e.CustomID)
	c.str(&e.Message)
	c.int(&e.Line)
	c.bool(&e.Mixed)
}

// States of a fold.
const (
	FoldFolding = "folding" // results are coming
	FoldWriting = "writing" // every line has ended, the files are being written
	FoldDone    = "done"    // the files and the manifest are whole
)

func (p *Progress) visit(c *codec) {
	c.str(&p.State)
	c.int(&p.Lines)
	c.int(&p.OK)
	c.int(&p.Failed)
	c.int(&p.Attempts)
	c.int(&p.Duplicates)
	c.int(&p.Late)
	c.nested(&p.Usage)
	c.nested(&p.Wasted)
	list(c, &p.Models)
	list(c, &p.Errors)
	c.int(&p.Stream)
	c.int(&p.Seq)
	c.str(&p.Host)
	c.str(&p.Output)
	c.str(&p.ErrorFile)
	c.str(&p.Manifest)
	c.str(&p.Verdict)
	c.str(&p.Note)
	c.float(&p.RateLines)
	c.float(&p.RateTokens)
	c.int(&p.After)
	c.int(&p.BusyUS)
	c.int(&p.BeforeLines)
	c.int(&p.BeforeTokens)
}

// Worker is a worker's heartbeat. Key in WORKERS: its ID.
type Worker struct {
	ID        string
	Host      string
	PID       int64
	Engine    string // URL without user information
	Version   string // of the engine, as it says
	Models    []string
	State     string // one of the Engine constants
	Reason    string // why it does not run, for people
	Limit     int64  // requests it may have in flight
	InFlight  int64
	Held      int64 // pulled and not acknowledged, those in flight included
	OK        int64 // results published since its start
	Failed    int64
	LoadUS    int64 // from its start until the engine was first ready
	UptimeUS  int64
	KVTokens  int64 // capacity of the engine's KV cache; 0: not known
	MaxLen    int64 // context of the model in tokens; 0: not known
	Program   string
	Simulated bool   // the engine says that its text is simulated
	LimitWhy  string // why Limit is what it is, for people

	// What follows is as of the last look at the engine, and of late.
	Metered     bool     // the engine has metrics: KVUsage and Preemptions are known
	KVUsage     float64  // share of the KV cache in use, 0 to 1
	Preemptions int64    // that the engine counted since the worker's start
	TokenRate   float64  // output tokens per second over the last 15 s or more
	RateOf      string   // whose TokenRate is, one of the Rate constants; empty: nobody's, it is not known
	LastError   string   // what went wrong with the last attempt that failed, for people; empty: none has
	LastErrorUS int64    // how long ago that was
	Flags       []string // the engine's, where they are known: of its command line, or NAME=VALUE as its metrics tell
	GPUs        []GPU    // of the worker's machine, where the engine's URL is a loopback address and nvidia-smi is there
	OwnGPUs     bool     // these are the engine's; otherwise nobody knows which of them are
	Kind        string   // of the engine, as its worker found out; empty: not known
	Slots       int64    // most sequences that it runs at once; 0: it does not tell
	Hosted      bool     // the worker's process runs the engine: Restarts is known
	Restarts    int64    // of the engine since its worker's process began it
	LastRestart string   // cause of the last one, as in the metrics; empty: there was none
	GivenUp     string   // why the engine is not started again any more, for people; empty: it is, or the worker does not run it
	Network     string   // boot of its machine, and behind a slash the name space of its network: where two are equal, an address leads to the same place; empty: not known
}

// Whose tokens a rate counts.
const (
	RateEngine  = "engine"  // all that the engine made, for whomever
	RateAnswers = "answers" // those of the answers to this worker, as they came
)

// GPU is what nvidia-smi says of a GPU. What it does not say is negative.
type GPU struct {
	Index       string // as nvidia-smi counts
	UUID        string
	Name        string
	MemoryUsed  int64   // bytes
	MemoryTotal int64   // bytes
	Power       float64 // W
	Utilization float64 // share of the last sample period in which any kernel ran, 0 to 1
}

func (g *GPU) visit(c *codec) {
	c.str(&g.Index)
	c.str(&g.UUID)
	c.str(&g.Name)
	c.int(&g.MemoryUsed)
	c.int(&g.MemoryTotal)
	c.float(&g.Power)
	c.float(&g.Utilization)
}

// States of an engine as its worker sees it.
const (
	EngineWaiting  = "waiting"  // does not answer, is loading, or refuses all that it is asked
	EngineReady    = "ready"    //
	EngineDenied   = "denied"   // wants a key, or another one
	EngineNoModel  = "no-model" // serves no model at all, or none that its worker is for
	EngineNoQueue  = "no-queue" // is well, but the queue of none of its models can be used
	EngineDegraded = "degraded" // answers every line with the same permanent error
	EngineHung     = "hung"     // takes requests and makes no progress
	EngineDraining = "draining" // the worker is stopping
	EngineUnknown  = "unknown"  // for a reader: what its worker says cannot be read; no worker says it
)

// Serves says whether it runs lines of a model now.
func (w *Worker) Serves(model string) bool {
	return w.State == EngineReady && slices.Contains(w.Models, model)
}

// Pending says that it runs no lines now, and may do so yet.
func (w *Worker) Pending() bool {
	return w.State != EngineReady && w.State != EngineDraining && w.GivenUp == ""
}

func (w *Worker) visit(c *codec) {
	c.str(&w.ID)
	c.str(&w.Host)
	c.int(&w.PID)
	c.str(&w.Engine)
	c.str(&w.Version)
	each(c, &w.Models, c.str)
	c.str(&w.State)
	c.str(&w.Reason)
	c.int(&w.Limit)
	c.int(&w.InFlight)
	c.int(&w.Held)
	c.int(&w.OK)
	c.int(&w.Failed)
	c.int(&w.LoadUS)
	c.int(&w.UptimeUS)
	c.int(&w.KVTokens)
	c.int(&w.MaxLen)
	c.str(&w.Program)
	c.bool(&w.Simulated)
	c.str(&w.LimitWhy)
	c.bool(&w.Metered)
	c.float(&w.KVUsage)
	c.int(&w.Preemptions)
	c.float(&w.TokenRate)
	c.str(&w.RateOf)
	c.str(&w.LastError)
	c.int(&w.LastErrorUS)
	each(c, &w.Flags, c.str)
	list(c, &w.GPUs)
	c.bool(&w.OwnGPUs)
	c.str(&w.Kind)
	c.int(&w.Slots)
	c.bool(&w.Hosted)
	c.int(&w.Restarts)
	c.str(&w.LastRestart)
	c.str(&w.GivenUp)
	c.str(&w.Network)
}

// Encode renders the record for the wire.
func (j *Job) Encode() ([]byte, error)      { return encode(j) }
func (v *Control) Encode() ([]byte, error)  { return encode(v) }
func (o *Owner) Encode() ([]byte, error)    { return encode(o) }
func (f *Feed) Encode() ([]byte, error)     { return encode(f) }
func (p *Progress) Encode() ([]byte, error) { return encode(p) }
func (w *Worker) Encode() ([]byte, error)   { return encode(w) }

// Decode reads the record from the wire.
func (j *Job) Decode(b []byte) error      { return decode(b, j) }
func (v *Control) Decode(b []byte) error  { return decode(b, v) }
func (o *Owner) Decode(b []byte) error    { return decode(b, o) }
func (f *Feed) Decode(b []byte) error     { return decode(b, f) }
func (p *Progress) Decode(b []byte) error { return decode(b, p) }
func (w *Worker) Decode(b []byte) error   { return decode(b, w) }

// Keys of the JOBS bucket. Each has one writer.
func JobKey(id string) string      { return "job." + id }
func ControlKey(id string) string  { return "ctl." + id }
func FeedKey(id string) string     { return "feed." + id }
func ProgressKey(id string) string { return "agg." + id }

// LeaseKey holds the Owner that folds.
const LeaseKey = "lease.agg"

// SplitKey returns the kind of a key of JOBS ("job", "ctl", "feed", "agg") and the job's id.
func SplitKey(key string) (kind, id string) {
	kind, id, _ = strings.Cut(key, ".")
	return kind, id
}

// Kinds of engines, as they are discovered.
const (
	KindVLLM   = "vllm" // or a simulated one
	KindSGLang = "sglang"
	KindLlama  = "llama.cpp"
	KindOllama = "ollama"
	KindOther  = "other"
)
