package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	"millrace/aggregator"
	"millrace/proto"
)

// mostEngines is how many engines are shown one by one; what else there is, is summed up.
const mostEngines = 5

// printEngines prints a row for each of the engines that ended the most lines, a row for the rest together, and with what
// flags they ran.
func printEngines(w io.Writer, all []aggregator.Engine) {
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b aggregator.Engine) int { return cmp.Compare(b.Lines, a.Lines) })
	if len(all) == 0 {
		return
	}
	shown, rest := all, []aggregator.Engine(nil)
	if len(all) > mostEngines {
		shown, rest = all[:mostEngines-1], all[mostEngines-1:]
	}
	rows := [][]string{{"engine of", "version", "gpu", "KV tok", "lines", "limit", "full", "pre-emptions", "per line", "restarts"}}
	for i := range shown {
		rows = append(rows, engineRow(&shown[i]))
	}
	if len(rest) > 0 {
		rows = append(rows, restRow(rest))
	}
	table(w, rows)
	printFlags(w, shown)
}

func engineRow(e *aggregator.Engine) []string {
	row := []string{e.Worker, cmp.Or(strings.TrimSpace(e.Kind+" "+e.Version), unknown), gpuNames(e), unknown, fmt.Sprint(e.Lines), unknown, unknown, unknown, figure(e.PreemptionsPerLine, 1, 3), unknown}
	if e.KVTokens > 0 {
		row[3] = fmt.Sprint(e.KVTokens)
	}
	if e.InFlight != nil {
		row[5] = fmt.Sprint(*e.InFlight)
	}
	if e.FullShare != nil {
		row[6] = percent(*e.FullShare)
	}
	if e.Preemptions != nil {
		row[7] = fmt.Sprint(*e.Preemptions)
	}
	if e.Restarts != nil {
		row[9] = restarts(*e.Restarts, e.LastRestart)
	}
	if e.GivenUp != "" {
		row[9] += ", given up"
	}
	return row
}

// restarts are how many, and the cause of the last one.
func restarts(n int64, last string) string {
	if last != "" {
		return fmt.Sprintf("%d (%s)", n, last)
	}
	return fmt.Sprint(n)
}

func percent(share float64) string { return fmt.Sprintf("%.1f%%", 100*share) }

// restRow sums engines up: what they have in common, from the least to the most, or all together.
func restRow(all []aggregator.Engine) []string {
	var version, gpu, kv, flight, full []string
	lines, preempted, of, given, again := int64(0), int64(0), int64(0), int64(0), (*int64)(nil)
	byFlight := func(a, b aggregator.Engine) int { return cmp.Compare(value(a.InFlight), value(b.InFlight)) }
	byFull := func(a, b aggregator.Engine) int { return cmp.Compare(value(a.FullShare), value(b.FullShare)) }
	for _, e := range all {
		row := engineRow(&e)
		version, gpu, kv = append(version, row[1]), append(gpu, row[2]), append(kv, row[3])
		lines += e.Lines
		if e.Preemptions != nil {
			preempted += *e.Preemptions
			of += e.Lines
		}
		if e.GivenUp != "" {
			given++
		}
		if e.Restarts != nil {
			n := value(again) + *e.Restarts
			again = &n
		}
	}
	for _, e := range slices.SortedFunc(slices.Values(all), byFlight) {
		flight = append(flight, engineRow(&e)[5])
	}
	for _, e := range slices.SortedFunc(slices.Values(all), byFull) {
		full = append(full, engineRow(&e)[6])
	}
	row := []string{count(len(all), "other"), common(version), common(gpu), common(kv), fmt.Sprint(lines), reach(flight), reach(full), unknown, unknown, unknown}
	if again != nil {
		row[9] = fmt.Sprint(*again)
	}
	if given > 0 {
		row[9] += fmt.Sprintf(", %d given up", given)
	}
	if of > 0 {
		row[7], row[8] = fmt.Sprint(preempted), fmt.Sprintf("%.3f", float64(preempted)/float64(of))
	}
	return row
}

func value[N int64 | float64](p *N) (v N) {
	if p != nil {
		v = *p
	}
	return v
}

// common is what all of them are.
func common(all []string) string {
	if slices.ContainsFunc(all, func(s string) bool { return s != all[0] }) {
		return "several"
	}
	return all[0]
}

// reach is from the first that is known to the last.
func reach(sorted []string) string {
	known := slices.DeleteFunc(sorted, func(s string) bool { return s == unknown })
	switch n := len(known); {
	case n == 0:
		return unknown
	case known[0] == known[n-1]:
		return known[0]
	default:
		return known[0] + " to " + known[n-1]
	}
}

// gpuNames names the GPUs of an engine, or where nobody knows which it has, what its worker's machine has.
func gpuNames(e *aggregator.Engine) string {
	if len(e.GPUs) == 0 {
		return unknown
	}
	var names []string
	for _, g := range e.GPUs {
		names = append(names, g.Name)
	}
	name := common(names)
	if n := len(names); n > 1 {
		name = fmt.Sprintf("%d × %s", n, name)
	}
	if !e.OwnGPUs {
		return "worker's " + name
	}
	return name
}

// printFlags says with what flags engines ran; those with the same flags together.
func printFlags(w io.Writer, all []aggregator.Engine) {
	var flags []string
	whose := map[string][]string{}
	for _, e := range all {
		f := strings.Join(e.Flags, " ")
		if f != "" && whose[f] == nil {
			flags = append(flags, f)
		}
		whose[f] = append(whose[f], e.Worker)
	}
	for _, f := range flags {
		of := " of " + strings.Join(whose[f], ", ")
		if len(whose[f]) == len(all) {
			of = ""
		}
		fmt.Fprintf(w, "engine flags%s: %s\n", plain(of), proto.Truncate(plain(f), 160))
	}
}
