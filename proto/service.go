package proto

// Questions to the aggregator that holds the lease, by NATS request and reply.
const (
	ServiceName    = "millrace-aggregator"
	SubjectMissing = "millrace.agg.missing" // MissingQuestion → MissingAnswer
	SubjectResults = "millrace.agg.results" // ResultsQuestion → ResultsAnswer
	SubjectVerify  = "millrace.agg.verify"  // VerifyQuestion → VerifyAnswer
)

// MissingQuestion asks which lines of a job have no result yet.
type MissingQuestion struct {
	Job  string
	From int64 // first index to look at
	Max  int64 // ranges at most
}

// MissingAnswer lists missing lines in ranges.
type MissingAnswer struct {
	Known  bool    // the aggregator knows the job
	Done   bool    // every line has ended
	Stream int64   // creation time of the RES that the aggregator folds, Unix ns
	Seq    int64   // last sequence of it that is folded
	Ranges []Range // in order
	Next   int64   // where to ask on; 0: there is no more
}

// Range is the lines From..To-1.
type Range struct{ From, To int64 }

func (q *MissingQuestion) visit(c *codec) {
	c.str(&q.Job)
	c.int(&q.From)
	c.int(&q.Max)
}

func (a *MissingAnswer) visit(c *codec) {
	c.bool(&a.Known)
	c.bool(&a.Done)
	c.int(&a.Stream)
	c.int(&a.Seq)
	list(c, &a.Ranges)
	c.int(&a.Next)
}

func (r *Range) visit(c *codec) {
	c.int(&r.From)
	c.int(&r.To)
}

// ResultsQuestion asks for results of a job in the order in which they came, as lines of an output file.
type ResultsQuestion struct {
	Job      string
	Cursor   int64  // 0 at first, then the answer's Next
	MaxBytes int64  // of the answer, at least one line is given
	Which    string // one of the Which constants
}

// Which results are asked for.
const (
	WhichAll    = "all"
	WhichOK     = "ok"
	WhichErrors = "errors"

	WhichManifest = "manifest" // not results but the manifest of a finished job, as it is on disk
)

// ResultsAnswer holds lines of results.
type ResultsAnswer struct {
	Known bool
	Done  bool   // the job has ended and nothing follows
	Data  []byte // whole lines
	Next  int64
	Error string
}

func (q *ResultsQuestion) visit(c *codec) {
	c.str(&q.Job)
	c.int(&q.Cursor)
	c.int(&q.MaxBytes)
	c.str(&q.Which)
}

func (a *ResultsAnswer) visit(c *codec) {
	c.bool(&a.Known)
	c.bool(&a.Done)
	c.bytes(&a.Data)
	c.int(&a.Next)
	c.str(&a.Error)
}

// VerifyQuestion asks the aggregator to recompute a finished job's manifest from its files.
type VerifyQuestion struct{ Job string }

// VerifyAnswer is the outcome.
type VerifyAnswer struct {
	Known   bool
	Valid   bool
	Reasons []string
	Error   string
}

func (q *VerifyQuestion) visit(c *codec) { c.str(&q.Job) }

func (a *VerifyAnswer) visit(c *codec) {
	c.bool(&a.Known)
	c.bool(&a.Valid)
	each(c, &a.Reasons, c.str)
	c.str(&a.Error)
}

// Encode renders the record for the wire.
func (q *MissingQuestion) Encode() ([]byte, error) { return encode(q) }
func (a *MissingAnswer) Encode() ([]byte, error)   { return encode(a) }
func (q *ResultsQuestion) Encode() ([]byte, error) { return encode(q) }
func (a *ResultsAnswer) Encode() ([]byte, error)   { return encode(a) }
func (q *VerifyQuestion) Encode() ([]byte, error)  { return encode(q) }
func (a *VerifyAnswer) Encode() ([]byte, error)    { return encode(a) }

// Decode reads the record from the wire.
func (q *MissingQuestion) Decode(b []byte) error { return decode(b, q) }
func (a *MissingAnswer) Decode(b []byte) error   { return decode(b, a) }
func (q *ResultsQuestion) Decode(b []byte) error { return decode(b, q) }
func (a *ResultsAnswer) Decode(b []byte) error   { return decode(b, a) }
func (q *VerifyQuestion) Decode(b []byte) error  { return decode(b, q) }
func (a *VerifyAnswer) Decode(b []byte) error    { return decode(b, a) }
