package aggregator

import (
	"fmt"
	"testing"
	"time"

	"millrace/proto"
)

// TestTallyTellsTheEnd: that lines were cancelled or expired is told whatever else failed more often, and however many
// kinds of errors there are.
func TestTallyTellsTheEnd(t *testing.T) {
	for _, kinds := range []int{0, 1, 20, 2 * maxKinds} {
		var all tally
		for i := range kinds {
			for range 2 {
				all.add(bad("j", 0, fmt.Sprintf("kind-%04d", i)), 1)
			}
		}
		all.add(bad("j", 1, proto.CodeExpired), 1)
		all.add(bad("j", 2, proto.CodeCancelled), 1)
		var p proto.Progress
		all.fill(&p)
		told := map[string]int64{}
		for i, e := range p.Errors {
			told[e.Code] += e.Count
			if i > 0 && e.Count > p.Errors[i-1].Count {
				t.Errorf("%d kinds: %s is not in its place", kinds, e.Code)
			}
		}
		if told[proto.CodeCancelled] != 1 || told[proto.CodeExpired] != 1 || len(p.Errors) != min(kinds, topKinds)+2 {
			t.Errorf("%d kinds: told are %v", kinds, told)
		}
		all.add(bad("j", 2, proto.CodeCancelled), -1)
		p = proto.Progress{}
		if all.fill(&p); len(p.Errors) != min(kinds, topKinds)+1 {
			t.Errorf("%d kinds: told are %+v when none is cancelled any more", kinds, p.Errors)
		}
	}
}

// TestContextCut: answers that an engine cut are counted while they come, for each model, and in the statistics; those that
// do not count any more are taken back.
func TestContextCut(t *testing.T) {
	cut := func(i int64, model string) *proto.Result {
		r := good("j", i, 1)
		r.Model, r.ContextCut = model, true
		return r
	}
	var all tally
	var report Report
	for _, r := range []*proto.Result{good("j", 0, 1), cut(1, "a"), cut(2, "b"), cut(3, "b"), bad("j", 4, proto.CodeBadResponse)} {
		all.add(r, 1)
		report.Add(r, time.Unix(1e9, 0))
	}
	all.add(cut(3, "b"), -1)
	var p proto.Progress
	all.fill(&p)
	if p.ContextCut() != 2 || len(p.Models) != 3 {
		t.Errorf("%d cut, of %+v", p.ContextCut(), p.Models)
	}
	s := report.Close()
	got := map[string]int64{}
	for _, m := range s.ByModel {
		got[m.Model] = m.ContextCut
	}
	if s.ContextCut != 3 || got["a"] != 1 || got["b"] != 2 || got[testModel] != 0 {
		t.Errorf("%d cut, by model %v", s.ContextCut, got)
	}
}
