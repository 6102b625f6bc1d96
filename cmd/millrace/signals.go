package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// phases gives a command its two contexts: take ends with the first signal (take no more, finish what is in
// flight), stop with the second (abort). hint, where not empty, is printed at the first. The caller must call done.
func (a *app) phases(ctx context.Context, hint string) (take, stop context.Context, done func()) {
	stop, abort := context.WithCancelCause(ctx)
	take, drain := context.WithCancelCause(stop)
	sigs := make(chan os.Signal, 2)
	signal.Notify(sigs, os.Interrupt, syscall.SIGTERM)
	over := make(chan struct{})
	quit := make(chan struct{})
	go func() {
		defer close(over)
		for n := 0; ; n++ {
			select {
			case <-quit:
				return
			case s := <-sigs:
				if n == 0 {
					say := "millrace: stopping, once more to abort"
					if hint != "" {
						say += "; " + hint
					}
					fmt.Fprintln(a.std.err, say)
					drain(signalled{s})
					continue
				}
				abort(signalled{s})
			}
		}
	}()
	return take, stop, func() {
		signal.Stop(sigs)
		close(quit)
		<-over
		drain(nil)
		abort(nil)
	}
}
