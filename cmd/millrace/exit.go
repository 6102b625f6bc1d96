package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"millrace/broker"
	"millrace/producer"
)

// Exit codes, also in README.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitSomeFailed  = 3 // finished, some lines failed
	exitThreshold   = 4 // --fail-under missed
	exitEngine      = 5 // --vllm: cannot come up, or was given up
	exitNoJob       = 6 // no such job; of verify: nor a manifest there
	exitUnreachable = 7 // broker; or an engine that is not usable, of --check: a worker waits for it
	exitEnded       = 8 // timed out or cancelled
	exitInvalid     = 9 // input
)

// coded is an error that knows its exit code.
type coded struct {
	error
	code int
}

func (c coded) Unwrap() error { return c.error }

func usagef(format string, args ...any) error { return coded{fmt.Errorf(format, args...), exitUsage} }

// misused is the error of a command line that names no command, or not the arguments that the command wants: one line.
func misused(cmd *cobra.Command, err error) error {
	var c coded
	if errors.As(err, &c) {
		return err
	}
	how := "usage: " + cmd.UseLine()
	if !cmd.Runnable() {
		how = "see `" + cmd.CommandPath() + " --help`"
	}
	wrong, guess, _ := strings.Cut(err.Error(), "Did you mean this?") // the words of cobra, on several lines
	wrong = strings.Join(strings.Fields(wrong), " ")
	if like := strings.Fields(guess); len(like) > 0 {
		wrong += "; did you mean " + strings.Join(like, " or ") + "?"
		return usagef("%s %s", wrong, strings.ToUpper(how[:1])+how[1:])
	}
	return usagef("%s; %s", wrong, how)
}

// wants is for a command that takes one argument of that name; none where it is empty, NAME... one or more, [NAME] one
// or none.
func wants(name string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		most, least := 1, 1
		switch {
		case name == "":
			most, least = 0, 0
		case strings.HasPrefix(name, "["):
			least = 0
		case strings.HasSuffix(name, "..."):
			most = len(args)
		}
		switch {
		case len(args) < least:
			return fmt.Errorf("%s is missing", strings.TrimSuffix(name, "..."))
		case len(args) > most && most == 0:
			return fmt.Errorf("%q is one argument too many, it takes none", args[0])
		case len(args) > most:
			return fmt.Errorf("%q is one argument too many, it takes one %s", args[most], strings.Trim(name, "[]"))
		}
		return nil
	}
}

// quiet is an exit code without a message: what there was to say has been said.
type quiet int

func (q quiet) Error() string { return fmt.Sprintf("exit %d", int(q)) }

// signalled is the cause of a context that a signal ended.
type signalled struct{ sig os.Signal }

func (s signalled) Error() string { return "stopped by " + s.sig.String() }

// report says what went wrong, once, and returns the exit code.
func (a *app) report(err error) int {
	var q quiet
	if err == nil {
		return exitOK
	}
	if errors.As(err, &q) {
		return int(q)
	}
	fmt.Fprintln(a.std.err, "millrace:", err)
	if n := (*nobody)(nil); errors.As(err, &n) {
		fmt.Fprint(a.std.err, n.list())
	}
	return exitCode(err)
}

func exitCode(err error) int {
	var c coded
	var s signalled
	var bad *producer.InvalidInput
	var file *producer.BadFile
	switch {
	case errors.As(err, &c):
		return c.code
	case errors.Is(err, broker.ErrAccess), errors.Is(err, broker.ErrAmbiguous):
		return exitUsage
	case errors.As(err, &bad), errors.As(err, &file), errors.Is(err, producer.ErrEmpty):
		return exitInvalid
	case errors.As(err, &s):
		if n, ok := s.sig.(syscall.Signal); ok {
			return 128 + int(n)
		}
		return 130
	case errors.Is(err, broker.ErrNoJob): // though no broker is there that could have it
		return exitNoJob
	case errors.Is(err, broker.ErrUnreachable):
		return exitUnreachable
	case errors.Is(err, producer.ErrCancelled), errors.Is(err, producer.ErrExpired), errors.Is(err, context.DeadlineExceeded):
		return exitEnded
	}
	return exitFailure
}
