// Command millrace runs JSONL files of LLM requests over a fleet of GPUs. One binary holds every role; this package
// builds the roles, connects them, stops them in reverse, and decides nothing.
package main

import (
	"context"
	"io"
	"os"
)

func main() { os.Exit(run(context.Background(), os.Args[1:], stdio{os.Stdin, os.Stdout, os.Stderr})) }

// stdio is what a command reads and writes: data on out, talk on err.
type stdio struct {
	in  io.Reader
	out io.Writer
	err io.Writer
}

// run runs one command line and returns its exit code.
func run(ctx context.Context, args []string, std stdio) int {
	a := &app{std: std}
	root := a.root()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err != nil && a.log == nil { // it did not come so far as to run
		err = misused(cmd, err)
	}
	return a.report(err)
}
