package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

func (c *config) wants(part string) bool { return slices.Contains(strings.Split(c.parts, ","), part) }

// null measures a job in one process, with an engine that answers at once: everything but the engine.
func (c *config) null(ctx context.Context, t *table) error {
	var all []sample
	for i := range c.runs {
		s, err := c.inOne(ctx, "null", c.lines)
		if err != nil {
			return err
		}
		say("in one process, %d of %d: %.0f lines/s", i+1, c.runs, s.rate)
		all = append(all, s)
	}
	c.nulls = all
	title := fmt.Sprintf("in one process, %s lines of 1 KB: ", show(float64(c.lines)))
	t.add(title+"lines/s", each(all, rate), "floor 20,000, goal 30,000", "first to last result of `millrace run FILE --engine null: --concurrency 512`")
	t.add("– the whole command, s", each(all, seconds), "", "from reading the input to checked files")
	t.add("– CPU, µs per line", each(all, c.perLine("run", c.lines)), "", "user and system")
	t.add("– peak memory, MB", each(all, peak("run")), "", "RSS")
	return nil
}

// http measures a process for each role against the fixed server, in turns with wrk.
func (c *config) http(ctx context.Context, t *table) error {
	var all []sample
	for i := range c.runs {
		wrk, err := c.wrkGets(ctx)
		if err != nil {
			return err
		}
		s, err := c.apart(ctx, "http", c.lines)
		if err != nil {
			return err
		}
		s.wrk = wrk
		say("over HTTP, %d of %d: %.0f lines/s, wrk %.0f requests/s", i+1, c.runs, s.rate, wrk.rate)
		all = append(all, s)
	}
	c.https = all
	note := fmt.Sprintf("`wrk -t 2 -c %d -d %s`, POST with the body of a line, just before", inFlight, c.wrk)
	var got, share, work []float64
	for _, s := range all {
		if s.wrk.rate > 0 {
			got, share = append(got, s.wrk.rate), append(share, s.rate/s.wrk.rate)
			work = append(work, float64(s.wrk.cpu)*float64(c.lines)/float64(s.cpu()))
		}
	}
	if len(got) == 0 {
		note = "`wrk` is not installed"
		say("%s: there is no ratio to it", note)
	}
	title := fmt.Sprintf("a process per role, HTTP, %d in flight, %s lines: ", inFlight, show(float64(c.lines)))
	t.add(title+"lines/s", each(all, rate), "", "first to last result; `broker`, `aggregate`, `worker --concurrency 256`, `produce`")
	t.add("– `wrk` on the same server, requests/s", got, "", note)
	t.add("– ratio of the two", share, "floor 0.25, goal 0.35", "each run with its own")
	t.add("– the same by CPU time", work, "", "of `wrk` and server for a request, over that of all processes for a line; other work on the machine does not change it")
	t.add("– the whole `produce`, s", each(all, seconds), "", "")
	for _, r := range roles {
		t.add("– CPU of "+r+", µs per line", each(all, c.perLine(r, c.lines)), "", "user and system, start and end included")
	}
	for _, r := range roles[:len(roles)-1] {
		t.add("– peak memory of "+r+", MB", each(all, peak(r)), "", "RSS")
	}
	return nil
}

// large measures what grows with a job: memory, and time beyond proportion.
func (c *config) large(ctx context.Context, t *table) error {
	if c.big == 0 {
		return nil
	}
	const goal = "goal ≤ 256"
	one, err := c.inOne(ctx, "big-null", c.big)
	if err != nil {
		return err
	}
	say("large, in one process: %.0f lines/s", one.rate)
	apart, err := c.apart(ctx, "big-http", c.big)
	if err != nil {
		return err
	}
	say("large, a process per role: %.0f lines/s", apart.rate)
	title := fmt.Sprintf("in one process, %s lines: ", show(float64(c.big)))
	t.add(title+"lines/s", []float64{one.rate}, "", "as above")
	t.add("– the whole command, s", []float64{one.wall.Seconds()}, "", "")
	t.add("– time against that of small jobs", c.growth(one, c.nulls), "goal ≤ 1.1", c.growthNote())
	t.add("– peak memory, MB", []float64{peak("run")(one)}, goal, "RSS")
	title = fmt.Sprintf("a process per role, HTTP, %s lines: ", show(float64(c.big)))
	t.add(title+"lines/s", []float64{apart.rate}, "", "as above")
	t.add("– the whole `produce`, s", []float64{apart.wall.Seconds()}, "", "")
	t.add("– time against that of small jobs", c.growth(apart, c.https), "goal ≤ 1.1", c.growthNote())
	for _, r := range roles[:len(roles)-1] {
		t.add("– peak memory of "+r+", MB", []float64{peak(r)(apart)}, goal, "RSS")
	}
	return nil
}

// growth is the time of the large job over that of as many small ones, by the median of these.
func (c *config) growth(big sample, small []sample) []float64 {
	if len(small) == 0 {
		return nil
	}
	return []float64{big.wall.Seconds() / (median(each(small, seconds)) * float64(c.big) / float64(c.lines))}
}

func (c *config) growthNote() string {
	return fmt.Sprintf("whole command over %s × the median of %s lines", show(float64(c.big)/float64(c.lines)), show(float64(c.lines)))
}

func each(all []sample, f func(sample) float64) []float64 {
	var out []float64
	for _, s := range all {
		out = append(out, f(s))
	}
	return out
}

func rate(s sample) float64    { return s.rate }
func seconds(s sample) float64 { return s.wall.Seconds() }

func (c *config) perLine(role string, lines int) func(sample) float64 {
	return func(s sample) float64 {
		return float64(s.use[role].cpu) / float64(time.Microsecond) / float64(lines)
	}
}

func peak(role string) func(sample) float64 {
	return func(s sample) float64 { return float64(s.use[role].peak) / 1e6 }
}
