package proto

// Request is one line on its way to an engine. It holds all that a worker needs to know of the line.
type Request struct {
	Job         string // job id
	Index       int64  // position of the line among the lines of the job, from 0
	CustomID    string
	URL         string // path at the engine, such as /v1/chat/completions
	Model       string // the model that the body names
	Body        []byte // raw JSON as it stood in the input; only its model may have been replaced
	MaxAttempts int64  // attempts that are charged before the line fails; 0: the worker's own
	TimeoutMS   int64  // time for one attempt; 0: the worker's own
	Attempts    []Attempt
	Suspicions  int64 // engines that died while they held this line, and no line that was suspected more
	// Doubted is the worker that left the line to another one, uncharged, since its engine had refused this line and answered
	// no other one well; empty: none.
	Doubted string
	Alone   int64 // those of Suspicions at which no other line was in the engine
	Run     int64 // Job.Run; 0: not known, as to an older program
}

func (r *Request) visit(c *codec) {
	c.str(&r.Job)
	c.int(&r.Index)
	c.str(&r.CustomID)
	c.str(&r.URL)
	c.str(&r.Model)
	c.bytes(&r.Body)
	c.int(&r.MaxAttempts)
	c.int(&r.TimeoutMS)
	list(c, &r.Attempts)
	c.int(&r.Suspicions)
	c.str(&r.Doubted)
	c.int(&r.Alone)
	c.int(&r.Run)
}

// Encode renders the request for the wire.
func (r *Request) Encode() ([]byte, error) { return encode(r) }

// DecodeRequest reads a request from the wire. Its body is a part of b.
func DecodeRequest(b []byte) (*Request, error) {
	r := new(Request)
	if err := decode(b, r); err != nil {
		return nil, err
	}
	return r, nil
}

// Attempt is one charged try of a line that did not end it.
type Attempt struct {
	Worker     string
	Code       string // what went wrong, one of the Code constants
	Status     int64  // HTTP status; 0: no answer
	Message    string // cut to MaxMessage bytes
	DurationUS int64
}

func (a *Attempt) visit(c *codec) {
	c.str(&a.Worker)
	c.str(&a.Code)
	c.int(&a.Status)
	c.str(&a.Message)
	c.int(&a.DurationUS)
}

// MaxMessage is the longest message, in bytes, that an attempt or an error carries.
const MaxMessage = 1000

// Usage is what the engine itself counted for one answer, in tokens. Counted is false where it said nothing.
type Usage struct {
	Counted    bool
	Prompt     int64 // prompt tokens, the cached ones included
	Completion int64
	Cached     int64 // prompt tokens that came from the engine's prefix cache, where it tells
}

func (u *Usage) visit(c *codec) {
	c.bool(&u.Counted)
	c.int(&u.Prompt)
	c.int(&u.Completion)
	c.int(&u.Cached)
}

// Result is how a line ended. A result for (Job, Index) may arrive any number of times.
type Result struct {
	Job      string
	Index    int64
	CustomID string // empty where the input's was unusable
	Line     int64  // line of the input file, from 1; 0: not known
	Model    string
	URL      string

	OK        bool
	Status    int64  // HTTP status of the engine's answer; 0: the line was never answered
	RequestID string // the engine's id of the answer
	Body      []byte // the engine's answer as it came; nil where Status is 0
	Code      string // where not OK: one of the Code constants
	Message   string
	Finish    string // finish_reason of the first choice

	Usage      Usage
	Worker     string // id of the worker process that made this result; empty: the owner of the input
	StartUS    int64  // from the start of that worker to the start of this (last) attempt, on its monotonic clock
	DurationUS int64  // of this (last) attempt at the engine, on the worker's monotonic clock
	LoadUS     int64  // from the start of that worker until its engine was first ready
	Attempts   []Attempt
	Pace       Pace // of that worker around this attempt
	// ContextCut says that the engine ended the answer before the limit of tokens that its body sets, since prompt and
	// output together exceed the context, or a limit of the engine's own.
	ContextCut bool
	Run        int64 // of the request, or of the owner's job; 0: not known
}

func (r *Result) visit(c *codec) {
	c.str(&r.Job)
	c.int(&r.Index)
	c.str(&r.CustomID)
	c.int(&r.Line)
	c.str(&r.Model)
	c.str(&r.URL)
	c.bool(&r.OK)
	c.int(&r.Status)
	c.str(&r.RequestID)
	c.bytes(&r.Body)
	c.str(&r.Code)
	c.str(&r.Message)
	c.str(&r.Finish)
	c.nested(&r.Usage)
	c.str(&r.Worker)
	c.int(&r.StartUS)
	c.int(&r.DurationUS)
	c.int(&r.LoadUS)
	list(c, &r.Attempts)
	c.nested(&r.Pace)
	c.bool(&r.ContextCut)
	c.int(&r.Run)
}

// Pace is how full a worker kept its engine, and what the engine paid for that, as far as the worker knew when it started
// and ended an attempt. All of it counts from the worker's start, on its monotonic clock, and is for lines of any job: what
// two results of one worker differ by is what happened between them.
type Pace struct {
	Limit  int64 // requests that might be in flight when the attempt was started; 0: not known
	FullUS int64 // how long 95 % of the limit or more had been in flight until then, in µs
	// Pre-emptions that the engine had counted when the attempt was started and when it ended, each as of the last look at
	// its metrics. Metered is false where it does not count them.
	Metered       bool
	Before, After int64
}

func (p *Pace) visit(c *codec) {
	c.int(&p.Limit)
	c.int(&p.FullUS)
	c.bool(&p.Metered)
	c.int(&p.Before)
	c.int(&p.After)
}

// Encode renders the result for the wire.
func (r *Result) Encode() ([]byte, error) { return encode(r) }

// DecodeResult reads a result from the wire. Its body is a part of b.
func DecodeResult(b []byte) (*Result, error) {
	r := new(Result)
	if err := decode(b, r); err != nil {
		return nil, err
	}
	return r, nil
}

// Codes of lines that failed. Those that OpenAI has too are spelled as there.
const (
	CodeCancelled        = "batch_cancelled"         // the job was cancelled before the line was answered
	CodeExpired          = "batch_expired"           // the job's time was over before the line was answered
	CodeRequestTimeout   = "request_timeout"         // the engine did not answer in time, on the last attempt
	CodeEngineCrash      = "engine_crash"            // the line killed its engine, more than once, at last alone
	CodeBadResponse      = "bad_engine_response"     // the engine answered 200 with what is not an answer
	CodeEngineError      = "engine_error"            // the engine answered 5xx, on every attempt
	CodeContextLength    = "context_length_exceeded" // the prompt does not fit the model's context
	CodeInvalidRequest   = "invalid_request"         // the line or its body is not a valid request
	CodeResponseTooLarge = "response_too_large"      // the answer does not fit one message
	CodeTransport        = "transport_error"         // the connection broke in the middle of the answer
)

// Messages of lines that ended with their job.
const (
	MessageCancelled = "This request was not executed because the job was cancelled."
	MessageExpired   = "This request could not be executed before the completion window expired."
)

// EndedWithJob says whether a code is one of lines that ended with their job, at an engine or before.
func EndedWithJob(code string) bool { return code == CodeCancelled || code == CodeExpired }

// Truncate cuts s to at most n bytes, at a character's edge.
func Truncate(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const dots = "…"
	n = max(n-len(dots), 0)
	for n > 0 && s[n]&0xC0 == 0x80 {
		n--
	}
	return s[:n] + dots
}
