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
		func(s os.Signal) {
			if pid := a.watched.Load(); pid != 0 {
				a.stopping(fmt.Sprintf("millrace: no longer watching; process %d goes on with the job", pid), "")
			} else {
				a.stopping("millrace: stopping: "+what, hint)
			}
			drain(signalled{s})
		},
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
// called, which calls over. After the last of them signals do what they do by default, but for SIGHUP: a terminal that is
// closed sends it more than once, from its shell too, so it can be the first and is passed over later. Whoever has it
// ignored, as nohup does, is not stopped by it.
func (a *app) onSignals(first func(os.Signal), over func(), others ...func(os.Signal)) (done func()) {
	sigs, hangups := make(chan os.Signal, 2), make(chan os.Signal, 1)
	signal.Notify(sigs, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) {
		signal.Notify(hangups, syscall.SIGHUP)
	}
	ended, quit := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		defer signal.Stop(sigs)
		hangup := (<-chan os.Signal)(hangups)
		for _, do := range append([]func(os.Signal){first}, others...) {
			select {
			case <-quit:
				return
			case s := <-sigs:
				do(s)
			case s := <-hangup:
				do(s)
			}
			hangup = nil
		}
	}()
	return func() {
		close(quit)
		<-ended
		signal.Stop(hangups)
		over()
	}
}
