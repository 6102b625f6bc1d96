// Package worker pulls requests, keeps one engine full with them, and publishes results. It owns the client of the
// engine, the watch over its health, and the limit of what is in flight.
//
// A request goes through these hands:
//
//	tap, feeder     pull it, when the gate is open and there is room            pull.go, feeder.go
//	share           its part of what is left, where that is little              share.go
//	held            keeps it ours by signs of life, until the last word on it   held.go, journal.go
//	slots           give it a place at the engine                               slots.go
//	Engine          answers                                                     http.go, direct.go, conn.go, probe.go
//	classify        says what the answer means                                  classify.go, body.go
//	session.settle  does what follows from it                                   settle.go
//	outbox          publishes the result, then acknowledges the request         outbox.go
//
// and beside them gate (gate.go, trip.go, degraded.go, doubt.go, hang.go, refusing.go) says whether the engine can be used, load.Limit how much at once (package load),
// queues declares streams, control knows what users want of jobs, beat tells the others that we are here.
package worker

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/broker"
	"millrace/proto"
)

// Worker runs the requests for the models of one engine. Its fields may be set until Run.
type Worker struct {
	Conn   *broker.Conn
	Self   proto.Owner // of the process; several workers may share it
	Engine Engine
	Keeper Keeper // of the engine's process; nil: others look after that

	Models         []string      // pulled for, whatever the engine lists; nil: what it lists
	Concurrency    int           // requests in flight; 0: found out
	RequestTimeout time.Duration // of one attempt, where the request does not say; 0: 30 min
	MaxAttempts    int           // charged attempts, where the request does not say; 0: 4
	AckWait        time.Duration // set on consumers; 0: what they have
	Dir            string        // of the journal of held requests, one worker each; empty: none
	StallTimeout   time.Duration // without a token until an engine with requests is thought hung; 0: 2 min
	ProbeEvery     time.Duration // between looks at an engine that is ready; 0: 2 s
	RetryEvery     time.Duration // between lines let through to a degraded, hung or denying engine; 0: 30 s
	KVTokens       func() int64  // capacity of the engine's KV cache in tokens, asked where its metrics do not tell, 0: unknown; nil: nobody knows

	Sequences func() int64 // that the engine runs at once by its flags, 0: they do not say; nil: nobody knows
	Graphs    func() int64 // tokens of its largest CUDA graph, 0: not known, below 0: it has none; nil: nobody knows

	Answered *atomic.Int64 // counts the lines that the engine answered well; nil: nobody counts

	// Restarts tells how often the engine was started again, and the cause of the last time; nil: others look after that.
	Restarts func() (n int64, cause string)

	Coming  []string        // models that the engine will list once it is up, for people; nil: not known
	Flags   func() []string // that the engine was started with, without keys: everybody may read them; nil: not known
	Devices []string        // GPUs that it was given, by number or UUID; nil: not known
	GPUs    *GPUs           // of this machine; nil: nobody looks

	Log      *slog.Logger          // nil: none
	Registry prometheus.Registerer // nil: none
	Program  string                // version of the program, for the heartbeat

	grace   time.Duration // see brokenGrace; an error is in doubt for as long
	refusal time.Duration // for how long a line is given back at first that the engine refused, see also rest; 0: 1 s
	longGap time.Duration // see share; 0: longGap
}

// Run works until take ends and what had been started is finished, or until stop ends. When take ends, no more is
// pulled and what has not been started is given back. When stop ends, everything is broken off and given back. Run
// returns when the broker has all of that, and returns an error only when it could not begin or lost the broker for
// good.
func (w *Worker) Run(take, stop context.Context) error {
	c := *w
	if err := c.complete(); err != nil {
		return err
	}
	s, err := open(&c, stop)
	if err != nil {
		return err
	}
	return s.work(take)
}

// complete checks the fields and fills in what is not set.
func (w *Worker) complete() error {
	switch {
	case w.Conn == nil:
		return errors.New("run worker: no connection to a broker")
	case w.Engine == nil:
		return errors.New("run worker: no engine")
	case w.Concurrency < 0:
		return errors.New("run worker: concurrency below zero; 0 finds it out")
	case w.MaxAttempts < 0:
		return errors.New("run worker: attempts below zero")
	}
	orDefault(&w.RequestTimeout, 30*time.Minute)
	orDefault(&w.MaxAttempts, 4)
	orDefault(&w.StallTimeout, 2*time.Minute)
	orDefault(&w.ProbeEvery, 2*time.Second)
	orDefault(&w.RetryEvery, 30*time.Second)
	orDefault(&w.grace, brokenGrace)
	orDefault(&w.refusal, time.Second)
	orDefault(&w.longGap, longGap)
	if w.Log == nil {
		w.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

func orDefault[T int | time.Duration](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}
