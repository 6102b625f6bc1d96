package main

import (
	"bytes"
	"testing"
	"time"
)

// TestDrainTalk: the count is said at first, and then where it has fallen, every ten seconds at most.
func TestDrainTalk(t *testing.T) {
	var said bytes.Buffer
	d := drain{w: &said}
	begin := time.Now()
	for at, n := range []int{0: 8, 1: 7, 9: 7, 10: 7, 11: 6, 20: 6, 21: 5, 31: 5, 40: 1, 50: 1, 51: 0} {
		if n > 0 || at > 50 {
			d.see(n, begin.Add(time.Duration(at)*time.Second), time.Hour-time.Duration(at)*time.Second)
		}
	}
	want := `millrace: 8 lines in flight; what has not ended in 1h is given back
millrace: 7 lines in flight; what has not ended in 59m50s is given back
millrace: 6 lines in flight; what has not ended in 59m40s is given back
millrace: 5 lines in flight; what has not ended in 59m29s is given back
millrace: 1 line in flight; what has not ended in 59m10s is given back
`
	if said.String() != want {
		t.Errorf("said\n%s", said.String())
	}
}
