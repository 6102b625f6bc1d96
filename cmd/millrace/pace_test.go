package main

import (
	"strings"
	"testing"
	"time"

	"millrace/proto"
)

// progress is that of a job of which so many lines ended, of 10 tokens each, and were at engines for so many seconds.
func progress(busy, lines int64) *proto.Progress {
	return &proto.Progress{BusyUS: busy * 1e6, OK: lines, Usage: proto.Usage{Completion: 10 * lines}}
}

// TestPace: rates and the time that is left follow the last minute in which lines were at engines, whatever came before.
func TestPace(t *testing.T) {
	var p pace
	begin := time.Now()
	at := func(sec int) time.Time { return begin.Add(time.Duration(sec) * time.Second) }
	add := func(sec, busy int, lines int64, stands bool) {
		p.Add(at(sec), progress(int64(busy), lines), stands)
	}
	is := func(sec int, left int64, want string) {
		t.Helper()
		if got := p.say(at(sec), left).String(); got != want {
			t.Errorf("after %d s: %q, want %q", sec, got, want)
		}
	}
	add(0, 0, 1000, false) // an interrupted job that goes on
	is(0, 500, "")
	for sec := 1; sec <= 52; sec++ { // the engine loads, which is noticed late
		add(sec, 0, 1000, sec > 5)
	}
	is(52, 500, "")
	for sec := 53; sec <= 62; sec++ {
		add(sec, sec-52, 1000+31*int64(sec-52), false)
	}
	is(62, 310, ", 31.0 lines/s, 310 output tok/s in the last 10s") // too early for more
	for sec := 63; sec <= 132; sec++ {
		add(sec, sec-52, 1310+10*int64(sec-62), false)
	}
	is(132, 300, ", 10.0 lines/s, 100 output tok/s in the last 1m, 30s left")
	for sec := 133; sec <= 172; sec++ { // the engine died, and loads again
		add(sec, 80, 2010, sec > 135)
	}
	is(172, 300, ", 10.0 lines/s, 100 output tok/s in the last 57s, 30s left")
	add(177, 80, 2010, false) // it is up
	is(177, 300, ", 9.2 lines/s, 92 output tok/s in the last 1m, 45s left")
	add(180, 88, 2090, false) // and its first lines tell since when
	is(180, 220, ", 10.0 lines/s, 100 output tok/s in the last 1m, 22s left")
	is(195, 220, ", 7.5 lines/s, 75 output tok/s in the last 1m") // nothing ends, and an engine has lines
	is(240, 220, ", 0.0 lines/s, 0 output tok/s in the last 1m")
	add(241, 1, 10, false) // the results are folded anew
	add(242, 2, 20, false)
	is(242, 1<<40, ", 10.0 lines/s, 100 output tok/s in the last 1s")
}

// TestPaceSettles: the time that is left is told once the rate has rested on 15 s of lines that come evenly, or on a minute:
// before that it is that of the first lines, which are the short ones.
func TestPaceSettles(t *testing.T) {
	begin := time.Now()
	for name, c := range map[string]struct {
		lines func(sec int64) int64
		from  int64 // s; from when on it is told
	}{
		"evenly":      {func(sec int64) int64 { return 40 * sec }, 15},
		"long lines":  {func(sec int64) int64 { return sec/8 + max(sec-20, 0)*40 }, 60},
		"very slowly": {func(sec int64) int64 { return sec / 10 }, 60},
	} {
		var p pace
		for sec := range int64(70) {
			now := begin.Add(time.Duration(sec) * time.Second)
			p.Add(now, progress(sec, c.lines(sec)), false)
			if says := strings.Contains(p.say(now, 1<<50).String(), "876000h left"); says != (sec >= c.from) {
				t.Errorf("%s: after %d s it says %q", name, sec, p.say(now, 1<<50).String())
			}
		}
	}
}

// TestPaceOfAnotherRun: what the run before left to be folded is no rate of this one.
func TestPaceOfAnotherRun(t *testing.T) {
	var p pace
	now := time.Now()
	at := func(sec int) time.Time { return now.Add(time.Duration(sec) * time.Second) }
	p.Add(at(0), progress(80, 5000), false) // what the aggregator before this one last told
	folded := progress(0, 6000)             // and left
	folded.BeforeLines, folded.BeforeTokens = 6000, 60000
	for sec := range 10 {
		if p.Add(at(sec), folded, false); p.say(at(sec), 100).String() != "" {
			t.Errorf("after %d s %q", sec, p.say(at(sec), 100).String())
		}
	}
	folded.OK, folded.Usage.Completion, folded.BusyUS = 6020, 60200, 10e6
	p.Add(at(10), folded, false)
	if got, want := p.say(at(10), 100).String(), ", 2.0 lines/s, 20 output tok/s in the last 10s"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestPaceOfOldAggregator: one that does not tell for how long lines were at engines leaves the clock.
func TestPaceOfOldAggregator(t *testing.T) {
	var p pace
	now := time.Now()
	for sec := range int64(11) {
		p.Add(now.Add(time.Duration(sec)*time.Second), progress(0, 5*sec), false)
	}
	if got, want := p.say(now.Add(10*time.Second), 50).String(), ", 5.0 lines/s, 50 output tok/s in the last 10s"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
