package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// untilSignal gives a command its context, which ends with the first signal. The second ends the process, as if
// nobody had listened. hint, where not empty, is printed at the first. The caller must call done.
func (a *app) untilSignal(ctx context.Context, hint string) (live context.Context, done func()) {
	live, end := context.WithCancelCause(ctx)
	return live, a.onSignals(func(s os.Signal) {
		a.stopping("millrace: stopping; press Ctrl-C again to kill it", hint)
		end(signalled{s})
	}, func() { end(nil) })
}

// phases gives a command its two contexts: take ends with the first signal (take no more, finish what is in
// flight), stop with the second (abort). The third ends the process. limit, which is for others to keep, and hint, where
// not empty, are printed at the first. The caller must call done.
func (a *app) phases(ctx context.Context, limit time.Duration, hint string) (take, stop context.Context, done func()) {
	what := "finishing what is in flight (up to " + span(limit) + ", --drain-timeout); press Ctrl-C again to stop at once"
	if limit == 0 {
		what = "giving back what is in flight"
	}
	stop, abort := context.WithCancelCause(ctx)
	take, drain := context.WithCancelCause(stop)
	return take, stop, a.onSignals(
		func(s os.Signal) { a.stopping("millrace: stopping: "+what, hint); drain(signalled{s}) },
		func() { drain(nil); abort(nil) },
		func(s os.Signal) { abort(signalled{s}) })
}

func (a *app) stopping(what, hint string) {
	if hint != "" {
		what += "; " + hint
	}
	fmt.Fprintln(a.std.err, what)
}

// onSignals calls first, and then the others, one for each signal to stop, until the function that it returns is
// called, which calls over. After the last of them signals do what they do by default.
func (a *app) onSignals(first func(os.Signal), over func(), others ...func(os.Signal)) (done func()) {
	sigs := make(chan os.Signal, 2)
	signal.Notify(sigs, os.Interrupt, syscall.SIGTERM)
	ended, quit := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		defer signal.Stop(sigs)
		for _, do := range append([]func(os.Signal){first}, others...) {
			select {
			case <-quit:
				return
			case s := <-sigs:
				do(s)
			}
		}
	}()
	return func() {
		close(quit)
		<-ended
		over()
	}
}
