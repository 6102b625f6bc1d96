package main

import (
	"os"
	"testing"
)

// TestPowerLoss puts the broker's folder, the aggregator's, and both, back to a copy taken earlier in the job: what a
// power cut without fsync, a restored snapshot or a lost volume does.
func TestPowerLoss(t *testing.T) {
	for name, roles := range map[string][]string{"broker": {"broker"}, "aggregator": {"aggregator"}, "both": {"broker", "aggregator"}} {
		for _, empty := range []bool{false, true} {
			t.Run(name+map[bool]string{false: " older", true: " empty"}[empty], func(t *testing.T) { powerLoss(t, roles, empty) })
		}
	}
}

func powerLoss(t *testing.T, roles []string, empty bool) {
	f := newFleet(t)
	input := writeInput(t, killLines, nil)
	e := newEngine(t, slow())
	start := map[string]func() *proc{"broker": f.broker, "aggregator": f.aggregate}
	procs := map[string]*proc{"broker": f.broker(), "aggregator": f.aggregate()}
	f.worker(1, e)
	p := f.produce(input)
	each := func(do func(role, copy string)) {
		for _, r := range roles {
			procs[r].kill()
		}
		for _, r := range roles {
			do(f.path(r), f.path(r+".copy"))
			procs[r] = start[r]()
		}
	}
	answered(t, killLines*30/100, e)
	each(func(dir, copy string) {
		if err := os.CopyFS(copy, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
	})
	answered(t, killLines*70/100, e)
	each(func(dir, copy string) {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if empty {
			return
		}
		if err := os.Rename(copy, dir); err != nil {
			t.Fatal(err)
		}
	})
	if code := p.wait(); code != exitOK {
		t.Fatalf("the producer ended with %d\n%s", code, p.err)
	}
	if c := oracleDir(t, input, f.output()); c.ok != killLines {
		t.Errorf("%d ok, %d failed", c.ok, c.failed)
	}
	n, _ := e.count()
	t.Logf("%d calls for %d lines", n, killLines)
}
