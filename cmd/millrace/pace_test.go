package main

import (
	"testing"
	"time"
)

// TestPace: rates and the time that is left follow the last minute, whatever came before.
func TestPace(t *testing.T) {
	var p pace
	begin := time.Now()
	at := func(sec int) time.Time { return begin.Add(time.Duration(sec) * time.Second) }
	is := func(sec int, lines, left int64, want string) {
		t.Helper()
		if got := p.say(at(sec), lines, 10*lines, left); got != want {
			t.Errorf("after %d s: %q, want %q", sec, got, want)
		}
	}
	p.add(at(0), 1000, 10000) // an interrupted job that goes on
	is(0, 1000, 500, "")
	for sec := 1; sec <= 20; sec++ { // the engine loads
		p.add(at(sec), 1000, 10000)
	}
	is(20, 1000, 500, "")
	for sec := 21; sec <= 30; sec++ {
		p.add(at(sec), 1000+int64(sec-20), 10*(1000+int64(sec-20)))
	}
	is(30, 1010, 490, ", 0.3 lines/s, 3 output tok/s in the last 30s, 24m30s left")
	for sec := 31; sec <= 100; sec++ {
		p.add(at(sec), 1010+10*int64(sec-30), 10*(1010+10*int64(sec-30)))
	}
	is(100, 1710, 300, ", 10.0 lines/s, 100 output tok/s in the last 1m, 30s left")
	for sec := 101; sec <= 116; sec++ { // the last lines take long
		p.add(at(sec), 1710, 17100)
	}
	p.add(at(117), 1711, 17110)
	is(117, 1711, 299, ", 7.2 lines/s, 72 output tok/s in the last 1m, 1h14m45s left")
	for sec := 118; sec <= 170; sec++ { // nothing moves
		p.add(at(sec), 1710, 17100)
	}
	is(170, 1710, 300, ", 0.0 lines/s, 0 output tok/s in the last 1m")
	if n := len(p.looks); n > 62 {
		t.Errorf("%d looks are kept", n)
	}
	p.add(at(171), 10, 100) // the results are folded anew
	p.add(at(172), 20, 200)
	is(172, 20, 1<<40, ", 10.0 lines/s, 100 output tok/s in the last 1s, 876000h left")
}
