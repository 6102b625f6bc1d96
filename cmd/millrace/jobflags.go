package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"millrace/broker"
	"millrace/producer"
)

// jobFlags say what to make of an input file.
type jobFlags struct {
	name, model, maxErrors, failUnder string
	limit                             int64
	maxAttempts                       int64
	requestTimeout, timeout           time.Duration
	ackWait                           time.Duration
	window                            int64
	skipInvalid, again                bool
	order                             string
}

func (j *jobFlags) bindInput(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&j.model, "model", "", "replace the model of every line by `NAME`")
	f.Int64Var(&j.limit, "limit", 0, "take only the first `N` lines; 0: all")
	f.BoolVar(&j.skipInvalid, "skip-invalid", false, "invalid lines become error lines instead of refusing the file")
	f.StringVar(&j.order, "order", "prefix", "`ORDER` in which lines are sent: prefix (those that share the beginning of their prompt together, for the engine's prefix cache) or input")
	f.StringVar(&j.name, "name", "", "`NAME` of the job; another name makes another job of the same file")
	f.Int64Var(&j.maxAttempts, "max-attempts", 4, "tries of a line before it fails, 1 to 100")
	f.DurationVar(&j.requestTimeout, "request-timeout", 30*time.Minute, "time for one try of a line")
}

func (j *jobFlags) bindJob(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&j.maxErrors, "max-errors", "", "halt the job when more than N lines (or P% of at least 100) have failed, counted anew when a halted job is started again; lines in flight still end (default: no limit)")
	f.DurationVar(&j.timeout, "timeout", 0, "end the job this long after its first start, also where it was continued since; what has not run ends as batch_expired (default: no limit)")
	f.StringVar(&j.failUnder, "fail-under", "", "exit with 4 when fewer than N lines (or less than P%) of the finished job are ok")
	f.BoolVar(&j.again, "again", false, "a fresh run of all lines of a job that is finished or was halted")
	f.DurationVar(&j.ackWait, "ack-wait", 0, "how long a request may go without a heartbeat before another worker gets it (default: as its queue has it, 1m)")
	f.Int64Var(&j.window, "window", 0, "lines of the job in the queue at once (default: 20,000, or 3 times what all workers hold)")
	if err := f.MarkHidden("window"); err != nil {
		panic(err) // the flag is defined in the line above
	}
}

// check refuses what cannot be meant.
func (j *jobFlags) check() error {
	if j.maxErrors != "" {
		if _, _, err := number(j.maxErrors); err != nil {
			return usagef("--max-errors is %w", err)
		}
	}
	if j.failUnder != "" {
		if _, _, err := number(j.failUnder); err != nil {
			return usagef("--fail-under is %w", err)
		}
	}
	switch {
	case j.order != "prefix" && j.order != "input":
		return usagef("--order is %q, must be prefix or input", j.order)
	case j.limit < 0:
		return usagef("--limit is %d, must not be negative", j.limit)
	case j.timeout < 0:
		return usagef("--timeout is %s, must not be negative", j.timeout)
	}
	if err := checkTries(j.maxAttempts, j.requestTimeout); err != nil {
		return err
	}
	return checkAckWait(j.ackWait)
}

func checkTries(maxAttempts int64, requestTimeout time.Duration) error {
	switch {
	case maxAttempts < 1 || maxAttempts > 100:
		return usagef("--max-attempts is %d, must be 1 to 100", maxAttempts)
	case requestTimeout <= 0:
		return usagef("--request-timeout is %s, must be positive", requestTimeout)
	}
	return nil
}

// checkAckWait refuses what heartbeats could not keep up with.
func checkAckWait(d time.Duration) error {
	if d != 0 && d < 500*time.Millisecond {
		return usagef("--ack-wait is %s, must be at least 500ms", d)
	}
	return nil
}

// number reads "N" or "P%".
func number(s string) (n float64, percent bool, err error) {
	t, percent := strings.CutSuffix(strings.TrimSpace(s), "%")
	n, err = strconv.ParseFloat(strings.TrimSpace(t), 64)
	if err != nil || !(n >= 0 && n <= math.MaxInt64) || percent && n > 100 || !percent && n != math.Trunc(n) {
		return 0, false, fmt.Errorf("%q, must be a number of lines, such as 100, or a percentage up to 100%%", s)
	}
	return n, percent, nil
}

// scan reads the input once. What it lays down lies in a folder of its own under --data, which the function it
// returns removes.
func (a *app) scan(ctx context.Context, j *jobFlags, file string, maxPayload int64) (*producer.Dataset, func(), error) {
	dir, lock, err := scanFolder(filepath.Join(a.data, "scan"))
	if err != nil {
		return nil, nil, err
	}
	clean := func() {
		lock.Unlock()
		if err := os.RemoveAll(dir); err != nil {
			a.log.Warn("remove the scan's folder", "error", err)
		}
	}
	ds, err := producer.Scan(ctx, producer.Input{
		Path: file, Stdin: a.std.in, Name: j.name, Override: j.model, Limit: j.limit, SkipInvalid: j.skipInvalid,
		InputOrder: j.order == "input",
		MaxPayload: maxPayload, Dir: dir, MaxAttempts: j.maxAttempts, TimeoutMS: j.requestTimeout.Milliseconds(),
		Program:   programVersion(),
		MaxErrors: j.maxErrors, LifetimeMS: j.timeout.Milliseconds(),
	}, a.scanProgress())
	if err != nil {
		clean()
		return nil, nil, err
	}
	closeAll := func() {
		if err := ds.Close(); err != nil {
			a.log.Warn("close the input", "error", err)
		}
		clean()
	}
	if err := j.reachable(ds.Lines); err != nil {
		closeAll()
		return nil, nil, err
	}
	return ds, closeAll, nil
}

// reachable refuses a --fail-under that so many lines cannot reach.
func (j *jobFlags) reachable(lines int64) error {
	n, percent, _ := number(j.failUnder) // checked before; none is 0
	if !percent && n > float64(lines) {
		return usagef("--fail-under is %s, but the job has only %s; give a smaller number, or a percentage", j.failUnder, count(lines, "line"))
	}
	return nil
}

// scanFolder makes a locked folder in parent, and removes those that killed processes left there.
func scanFolder(parent string) (dir string, lock *broker.Lock, err error) {
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", nil, fmt.Errorf("make a folder for state: %w; choose another --data", err)
	}
	sweepScans(parent)
	for range 10 { // another process that sweeps may take a new folder for an old one
		if dir, err = os.MkdirTemp(parent, "*"); err != nil {
			return "", nil, fmt.Errorf("make a folder for state: %w; choose another --data", err)
		}
		if lock, err = broker.LockDir(dir); err == nil {
			return dir, lock, nil
		}
	}
	return "", nil, err
}

// sweepScans removes what killed processes left.
func sweepScans(parent string) {
	dirs, _ := os.ReadDir(parent) // the next command tries again
	for _, e := range dirs {
		d := filepath.Join(parent, e.Name())
		if l, err := broker.LockDir(d); err == nil {
			_ = os.RemoveAll(d) // the next command tries again
			l.Unlock()
		}
	}
}

// scanProgress says now and then how far a long scan is.
func (a *app) scanProgress() func(bytes, lines int64) {
	last := time.Now()
	return func(bytes, lines int64) {
		if time.Since(last) > 5*time.Second {
			last = time.Now()
			fmt.Fprintf(a.std.err, "reading the input: %s, %s\n", count(lines, "line"), broker.Size(bytes))
		}
	}
}
