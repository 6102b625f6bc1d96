package main

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"

	"millrace/broker"
	"millrace/proto"
)

// count says how many of a thing there are: 1 line, 20 lines.
func count[N int | int64](n N, thing string) string { return proto.Count(n, thing) }

// span prints a duration without its zeros: 10m and not 10m0s.
func span(d time.Duration) string {
	s := d.Round(time.Second).String()
	if t, ok := strings.CutSuffix(s, "m0s"); ok {
		s = t + "m"
	}
	if t, ok := strings.CutSuffix(s, "h0m"); ok {
		s = t + "h"
	}
	return s
}

// modelName is how a table names a model: lines that are invalid may name none.
func modelName(m string) string { return cmp.Or(plain(m), "(none)") }

// plain is what others wrote, without what would break a row of a table or do something to a terminal.
func plain(s string) string {
	return strings.Map(func(c rune) rune {
		if unicode.IsControl(c) {
			return ' '
		}
		return c
	}, s)
}

// failure describes a kind of failure by one line that failed so. Lines that no engine answered have no status.
func failure(e *proto.ErrorCount) string {
	s := fmt.Sprintf("%d × %s", e.Count, e.Code)
	if e.Status != 0 {
		s += fmt.Sprintf(" (HTTP %d)", e.Status)
	}
	if e.Mixed {
		s += " with other messages"
	}
	if eg := proto.Truncate(plain(e.Example()), 240); eg != "" {
		s += ", e.g. " + eg
	}
	return s
}

// maxFailures bounds the kinds of failures that people are shown.
const maxFailures = 10

// failures describes the most frequent kinds of failures, one a line.
func failures(w io.Writer, all []proto.ErrorCount) {
	for i := range all[:min(maxFailures, len(all))] {
		fmt.Fprintln(w, failure(&all[i]))
	}
	if len(all) <= maxFailures {
		return
	}
	n := int64(0)
	for _, e := range all[maxFailures:] {
		n += e.Count
	}
	fmt.Fprintf(w, "%d × %s more; the manifest lists them\n", n, count(len(all)-maxFailures, "kind"))
}

// asked says who paused or cancelled a job, and why; empty: nobody did.
func asked(c *proto.Control) string {
	did := map[string]string{proto.WantPause: "paused", proto.WantCancel: "cancelled"}[c.Want]
	if did == "" {
		return ""
	}
	if c.By != "" {
		did += " by " + plain(c.By)
	}
	if c.Reason != "" {
		did += ": " + plain(strings.Join(strings.Fields(c.Reason), " ")) // on one line, whatever it is
	}
	return did
}

// note is why nothing moves, and who wanted that; empty: it moves.
func note(v *broker.JobView) string {
	who, why := asked(&v.Control), v.Note()
	if v.State() == broker.StateFinished && v.Control.Want == proto.WantPause { // what ran then was all there was
		who = ""
	}
	if n := v.Progress.EndedWithJob(); n > 0 && v.Progress.State == proto.FoldDone && who+why == "" {
		why = count(n, "line") + " had no answer by then; --again makes a fresh run of all lines"
	}
	if who == "" || why == "" {
		return who + why
	}
	return who + "; " + why
}

// outcome is how a finished job ended that was not left to run: cancelled or expired; empty: it was.
func outcome(p *proto.Progress) string {
	if p.State != proto.FoldDone {
		return ""
	}
	for _, e := range p.Errors { // these two are told whatever their rank
		switch e.Code {
		case proto.CodeCancelled:
			return broker.StateCancelled
		case proto.CodeExpired:
			return stateExpired
		}
	}
	return ""
}

const stateExpired = "expired"

// shown is the state of a job for people. For programs finished means that the files are there, however the job ended.
func shown(state, outcome string) string {
	switch state {
	case broker.StateCancelled: // its last lines are being ended
		return "cancelling"
	case broker.StateOrphaned:
		return "no-producer"
	}
	return cmp.Or(outcome, state)
}
