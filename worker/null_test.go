package worker

import "testing"

func TestNull(t *testing.T) {
	r := newRig(t)
	r.send(requests(500)...)
	r.start(&Null{Models: []string{"m"}})
	by := exactly(t, r.wait(500), 500)
	for _, res := range by {
		if !res.OK || res.Status != 200 || res.Finish != "stop" || !res.Usage.Counted || res.Usage.Completion != 1 {
			t.Fatalf("result %+v", res)
		}
	}
	r.settled(0)
}
