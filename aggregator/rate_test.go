package aggregator

import (
	"testing"
	"time"

	"millrace/proto"
)

// TestProgressLeavesOutWhatNobodyRan: the time that is told is that in which lines were at engines, and so are the rates.
func TestProgressLeavesOutWhatNobodyRan(t *testing.T) {
	s, _ := folded(t, t.TempDir(), 40)
	j := s.jobs["j"]
	at := time.Unix(1000, 0)
	n := int64(0)
	end := func(at time.Time, took time.Duration, worker string) {
		t.Helper()
		r := good("j", n, 0)
		r.Worker, r.DurationUS = worker, took.Microseconds()
		n++
		if err := s.fold(message{subject: proto.ResultSubject("j"), data: wire(t, r), seq: uint64(n), time: at.UnixNano()}); err != nil {
			t.Fatal(err)
		}
	}
	told := func(want time.Duration) *proto.Progress {
		t.Helper()
		p := j.progress(position{}, "", "")
		if p.BusyUS != want.Microseconds() {
			t.Errorf("after %d lines at engines for %d µs, want %s", n, p.BusyUS, want)
		}
		return p
	}
	told(0)
	end(at, time.Second, "") // its owner ended it
	told(0)
	at = at.Add(52 * time.Second) // the engine loads
	for range 10 {
		at = at.Add(time.Second)
		end(at, time.Second, "w")
	}
	told(10 * time.Second)
	at = at.Add(time.Hour) // it died
	for range 10 {
		at = at.Add(time.Second)
		end(at, 2*time.Second, "w")
	}
	if p := told(21 * time.Second); p.RateLines > 1 || p.RateLines < 0.1 { // less what the test itself takes
		t.Errorf("%.2f lines/s, want 1", p.RateLines)
	}
	end(at, 60*time.Second, "v") // another one worked meanwhile
	told(70 * time.Second)
}

// TestBusyIsBounded: a job in many pieces keeps few of them.
func TestBusyIsBounded(t *testing.T) {
	var b busy
	const minute = int64(60e6)
	for i := range int64(1000) {
		b.add(i*minute, i*minute+5e6)
	}
	b.add(0, 900*minute) // what is forgotten is not counted again
	b.add(0, 999*minute+5e6)
	if n := len(b.spans.all); n > busySpans {
		t.Errorf("%d pieces", n)
	}
	forgotten := int64(1000 - busySpans)
	if want := forgotten*5e6 + 999*minute + 5e6 - ((forgotten-1)*minute + 5e6); b.sum() != want {
		t.Errorf("%d µs, want %d", b.sum(), want)
	}
}

// TestRateOfAnotherRun: results that came before the aggregator began, in the spool or in the stream, are in no rate.
func TestRateOfAnotherRun(t *testing.T) {
	r := newRig(t)
	r.job("j", 100)
	r.send(all("j", 0, 40)...)
	first := r.start()
	r.await("j", func(p *proto.Progress) bool { return p.OK == 40 && p.BeforeLines == 40 })
	seq := r.send(all("j", 40, 50)...)
	p := r.await("j", folding(seq))
	if p.BeforeLines != 40 || p.BusyUS == 0 {
		t.Errorf("%+v", p)
	}
	first.stop()
	r.send(all("j", 50, 70)...)
	r.start()
	p = r.await("j", func(p *proto.Progress) bool { return p.OK == 70 })
	if p.BeforeLines != 70 || p.BusyUS != 0 || p.RateLines != 0 || p.BeforeTokens != p.Usage.Completion || p.BeforeTokens == 0 {
		t.Errorf("%+v", p)
	}
}
