// Command bench measures millrace and prints a table in Markdown: `make bench`. Nothing here fails for being slow; a
// run that is not VALID does. What it compares, it compares within one run: speeds of the same minute on the same
// machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() { os.Exit(run(os.Args[1:])) }

// config is what to measure.
type config struct {
	bin     string        // the program
	dir     string        // for everything that is written; removed at the end
	lines   int           // of the jobs whose speed is measured
	big     int           // lines of the large job; 0: none
	runs    int           // of each measurement but the large job's, which runs once
	wrk     time.Duration // of one run of wrk
	profile string        // folder for CPU profiles of each role; empty: none
	during  time.Duration // of each profile
	parts   string        // which parts: null, http, big, rooms

	nulls, https []sample // what was measured, for the large job to be compared with
}

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(args) == 1 && args[0] == "serve" { // how the harness starts its server as a process of its own
		return report(serve(ctx))
	}
	if len(args) > 0 && args[0] == "bare" {
		return report(bare(ctx, args[1:]))
	}
	var c config
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.StringVar(&c.bin, "bin", "bin/millrace", "the program to measure")
	fs.StringVar(&c.dir, "dir", "bin/bench", "folder for inputs, queues and results; it is removed at the end")
	fs.IntVar(&c.lines, "lines", 100_000, "lines of a job")
	fs.IntVar(&c.big, "big", 1_000_000, "lines of the large job; 0: none")
	fs.IntVar(&c.runs, "runs", 3, "runs of each measurement; the large job runs once")
	fs.DurationVar(&c.wrk, "wrk", 10*time.Second, "time of each run of wrk")
	fs.StringVar(&c.profile, "profile", "", "folder for a CPU profile of each role; the figures are then of a profiled program")
	fs.DurationVar(&c.during, "profile-for", 5*time.Second, "time of each profile, which begins 2 s after its process; jobs must last as long")
	fs.StringVar(&c.parts, "parts", "null,http,big,rooms", "what to measure")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	if fs.NArg() > 0 || c.lines < 1 || c.big < 0 || c.runs < 1 {
		fmt.Fprintln(os.Stderr, "bench: -lines and -runs are at least 1, -big at least 0, and there are no arguments")
		return 2
	}
	return report(c.measure(ctx))
}

func report(err error) int {
	if err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// measure runs the parts in order and prints the table.
func (c *config) measure(ctx context.Context) (err error) {
	if err := c.prepare(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(c.dir)) }()
	var t table
	where, err := machine(ctx, c.bin)
	if err != nil {
		return err
	}
	meanwhile := watchOthers()
	for _, part := range []struct {
		name string
		run  func(context.Context, *table) error
	}{{"null", c.null}, {"http", c.http}, {"big", c.large}, {"rooms", c.rooms}} {
		if !c.wants(part.name) {
			continue
		}
		if err := part.run(ctx, &t); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	fmt.Printf("%s%s\n\n", where, meanwhile)
	return t.write(os.Stdout)
}

func (c *config) prepare() error {
	if c.parts == "" {
		return errors.New("nothing to measure")
	}
	for _, p := range []*string{&c.bin, &c.dir, &c.profile} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return fmt.Errorf("find %s: %w", *p, err)
		}
		if *p != "" {
			*p = abs
		}
	}
	if _, err := os.Stat(c.bin); err != nil {
		return fmt.Errorf("%w; `make build` makes it", err)
	}
	for _, dir := range []string{c.dir, c.profile} {
		if dir == "" {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make a folder: %w", err)
		}
	}
	return nil
}

// say tells the person who waits.
func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...) }
