package broker_test

import (
	"strings"
	"testing"

	"millrace/broker"
	"millrace/proto"
)

// TestLeftUnfolded: nor is it said that a job ends by itself which no aggregator is there for.
func TestLeftUnfolded(t *testing.T) {
	v := broker.JobView{Job: proto.Job{Lines: 10}, Feed: proto.Feed{Enqueued: 10}, Unfolded: true}
	if got := v.Note(); !strings.HasPrefix(got, "no aggregator answers; start `millrace aggregate`; its producer has left, ") || strings.Contains(got, "ends by itself") {
		t.Errorf("%q", got)
	}
}

// TestLeft: of a job whose producer has left it is said whether it ends without it.
func TestLeft(t *testing.T) {
	for want, f := range map[string]proto.Feed{
		"no process runs it; run the command that created it again":                                     {},
		"its producer has left: the 6 lines that it sent are run, 3 more wait for the command":          {Enqueued: 6, Ended: 1},
		"its producer has left, with all lines sent: they are run, and the job ends by itself; should ": {Enqueued: 9, Ended: 1},
	} {
		v := broker.JobView{Job: proto.Job{Lines: 10}, Feed: f}
		if got := v.Note(); !strings.HasPrefix(got, want) {
			t.Errorf("%+v: %q", f, got)
		}
		v.Unserved = "no worker serves model m"
		want = v.Unserved + "; " + strings.Replace(want, "are run", "are run once a worker serves their model", 1)
		if got := v.Note(); !strings.HasPrefix(got, want) {
			t.Errorf("%+v: %q, want %q", f, got, want)
		}
	}
}
