package worker

import (
	"context"
	"net/http"
	"time"

	"millrace/proto"
	"millrace/worker/load"
)

// Engine answers requests. HTTP is a real one, Null one for benchmarks.
type Engine interface {
	// Do sends one request and returns the answer as it came. An error says that there is no whole answer; the
	// Answer beside it holds the status where that much was heard; where ctx ended before, the error is its cause. Do
	// sends a request once.
	Do(ctx context.Context, r *proto.Request) (Answer, error)
	// Probe looks at the engine. An error says that it did not answer.
	Probe(ctx context.Context) (Status, error)
	// String is where the engine is, without user information.
	String() string
}

// Keeper has the process of an engine in hand.
type Keeper interface {
	// State says why the engine cannot be asked, one of the states of an engine and why; both are empty when it can.
	State() (state, reason string)
	// Changed gets a value when State says something else.
	Changed() <-chan struct{}
	// Restart ends an engine that hangs or is gone, and starts it again. It returns at once.
	Restart(cause string)
}

// Answer is what an engine said to one request.
type Answer struct {
	Status   int
	Header   http.Header // may be nil
	Body     []byte
	TooLarge bool // the body was longer than the engine client reads and is not here
	// Since is when the engine may last have become another one, as far as connections tell: this answer is from the one
	// that a look after that finds. Zero: not known.
	Since time.Time
}

// Status is what a probe found. Fields that the engine does not tell stay zero.
type Status struct {
	State  string // proto.EngineReady, or why not: EngineWaiting, EngineDenied, EngineNoModel
	Reason string // for people, where not ready
	Ill    bool   // the engine itself says that it is not well
	Gone   bool   // it has no process that could answer
	// What matters for how many requests it gets. Kind is empty: not asked yet. Run counts how often the engine was found
	// anew: at first, and after it was not well.
	load.Engine
	Models    []string
	Simulated bool
	Settings  []string // NAME=VALUE
}

// Null answers everything at once, inside the process. It measures what lies around an engine.
type Null struct {
	Models []string
	Text   []byte        // body of every answer; nil: a short chat completion
	Delay  time.Duration // before each answer
}

var nullText = []byte(`{"id":"null","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"0"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"total_tokens":2,"completion_tokens":1}}`)

// Do answers with HTTP status 200 and the same body every time.
func (n *Null) Do(ctx context.Context, _ *proto.Request) (Answer, error) {
	if n.Delay > 0 {
		select {
		case <-ctx.Done():
			return Answer{}, context.Cause(ctx)
		case <-time.After(n.Delay):
		}
	}
	body := n.Text
	if body == nil {
		body = nullText
	}
	return Answer{Status: http.StatusOK, Body: body}, nil
}

// Probe always finds the engine ready.
func (n *Null) Probe(context.Context) (Status, error) {
	return Status{State: proto.EngineReady, Engine: load.Engine{Kind: proto.KindOther, Version: "null"}, Models: n.Models, Simulated: true}, nil
}

func (n *Null) String() string { return "null:" }
