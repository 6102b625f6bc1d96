package aggregator

import (
	"fmt"
	"testing"

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
