// Package producer owns the input of a job: it reads, validates, indexes and orders the lines of a dataset (Scan),
// keeps the queues of their models filled, sends again what went missing and ends the lines that will never run
// (Owner), and leaves an input with the broker for others to own (Detach, Adopter).
package producer

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"millrace/proto"
)

// Input says what to scan and how.
type Input struct {
	Path        string    // "-": Stdin
	Stdin       io.Reader // read once, where Path is "-"
	Name        string    // the user's name for the job, part of its id; may be empty
	Override    string    // model that replaces the one of every line; empty: none
	Limit       int64     // lines that are taken, the first ones; 0: all
	SkipInvalid bool      // invalid lines become lines that fail, instead of stopping everything
	InputOrder  bool      // lines are sent in the order of the input; else those of a model that share a prefix together
	MaxPayload  int64     // bytes of a message that the broker takes; 0: proto.MaxPayload
	MaxPlain    int64     // bytes to which a compressed input may unpack; 0: what the disk of Dir has room for
	Dir         string    // where plain copies, the line table and sort runs lie; made if it is not there

	// Properties of the job that do not come from its lines.
	MaxAttempts int64  // charged attempts of a line before it fails; 0: the worker's own
	TimeoutMS   int64  // for one attempt; 0: the worker's own
	Lane        string // one of the Lane constants of proto; empty: normal
	MaxErrors   string // "N" or "P%" of failed lines at which the job is halted; empty: never
	LifetimeMS  int64  // after which lines that did not run expire; 0: never
	Program     string // version of the program, for the record

	ratioFrom int64 // for tests; 0: ratioFrom
}

func (in *Input) check() error {
	if in.MaxPayload == 0 {
		in.MaxPayload = proto.MaxPayload
	}
	if in.Path == "" || in.Path == "-" && in.Stdin == nil {
		return errors.New("no input file; give a path, or - for standard input")
	}
	if in.Limit < 0 {
		return fmt.Errorf("limit is %d, must not be negative", in.Limit)
	}
	if !validLane(in.Lane) {
		return fmt.Errorf("lane is %q, must be one of %v", in.Lane, proto.Lanes())
	}
	if len(in.Override) > maxModel {
		return fmt.Errorf("the name of the model has %d bytes, at most %d are allowed", len(in.Override), maxModel)
	}
	_, err := parseThreshold(in.MaxErrors)
	return err
}

func validLane(s string) bool {
	if s == "" {
		return true
	}
	for _, l := range proto.Lanes() {
		if s == string(l) {
			return true
		}
	}
	return false
}

// threshold is when a job has failed too often. Its zero value is never reached.
type threshold struct {
	set     bool
	part    bool    // a part of the lines that ended counts, not a number
	lines   int64   // more failed lines than that are too many
	percent float64 // the same in percent of the lines that ended
}

// thresholdFrom is how many lines must have ended before a percentage means anything.
const thresholdFrom = 100

func parseThreshold(s string) (threshold, error) {
	if s == "" {
		return threshold{}, nil
	}
	if p, ok := strings.CutSuffix(s, "%"); ok {
		v, err := strconv.ParseFloat(p, 64)
		if err != nil || !(v >= 0 && v <= 100) {
			return threshold{}, fmt.Errorf("max errors is %q, must be a number of lines or a percentage from 0%% to 100%%", s)
		}
		return threshold{set: true, part: true, percent: v}, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return threshold{}, fmt.Errorf("max errors is %q, must be a number of lines or a percentage such as 5%%", s)
	}
	return threshold{set: true, lines: n}, nil
}

// reached says whether failed of the lines that ended are too many.
func (t threshold) reached(failed, ended int64) bool {
	switch {
	case !t.set:
		return false
	case t.part:
		return ended >= thresholdFrom && float64(failed)*100 > t.percent*float64(ended)
	}
	return failed > t.lines
}

// rules are what a line must obey beyond its format.
type rules struct {
	override string
	most     int64 // bytes that a message may have
	reserve  int64 // bytes of it that are kept free for the history of attempts
}

// A request's history of attempts grows while it travels; each attempt carries at most proto.MaxMessage bytes of text
// and the names around it. Fixed is the rest of the record but the fields that are counted, headers of batches included.
const (
	attemptBytes    = proto.MaxMessage + 200
	fixedBytes      = 4096
	defaultAttempts = 8 // assumed where the workers decide
	maxModel        = 256
)

func (in *Input) rules() rules {
	n := in.MaxAttempts
	if n == 0 {
		n = defaultAttempts
	}
	return rules{override: in.Override, most: in.MaxPayload, reserve: min(n*attemptBytes+fixedBytes, in.MaxPayload/2)}
}

// parse reads a line. Where it is not valid it returns what is wrong with it, and its custom_id if that can be used.
func (r rules) parse(text []byte) (l proto.Line, id, wrong string) {
	l, err := proto.ParseLine(text)
	var le *proto.LineError
	if errors.As(err, &le) {
		return l, le.CustomID, proto.Truncate(le.Message, proto.MaxMessage)
	}
	if err != nil {
		return l, "", err.Error()
	}
	return l, l.CustomID, r.judge(&l)
}

// judge returns what is wrong with a line that is well formed, or nothing.
func (r rules) judge(l *proto.Line) string {
	model := l.Model
	if r.override != "" {
		model = r.override
	}
	switch {
	case model == "":
		return "body names no model; add \"model\" to it or name a model for all lines (--model)"
	case len(model) > maxModel:
		return fmt.Sprintf("the name of the model has %d bytes, at most %d are allowed", len(model), maxModel)
	}
	size := int64(len(l.Body)+len(l.CustomID)+len(l.URL)+len(model)) + r.reserve
	if r.override != "" {
		size += int64(len(r.override)) // at most: it replaces a shorter name or is put in
	}
	if size > r.most {
		return r.tooLong(size)
	}
	return ""
}

func (r rules) tooLong(size int64) string {
	return fmt.Sprintf("needs %s bytes, the broker takes %s", commas(size), commas(r.most))
}

// model is the one that a valid line will ask for.
func (r rules) model(l *proto.Line) string {
	if r.override != "" {
		return r.override
	}
	return l.Model
}

// commas writes n with a comma between thousands.
func commas(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
