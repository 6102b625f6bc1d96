package worker

import (
	"testing"

	"millrace/proto"
)

// TestBurst: lines begin together once enough slots are free, or as many as are ready; and then until all slots are taken.
func TestBurst(t *testing.T) {
	started := make(chan *line, 32)
	hold := map[int64]chan struct{}{}
	for i := range int64(32) {
		hold[i] = make(chan struct{})
	}
	s := &slots{more: func() {}, run: func(l *line) {
		started <- l
		<-hold[l.req.Index]
	}}
	defer s.end()
	come := func(n int) {
		t.Helper()
		for range n {
			<-started
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(started) > 0 {
			t.Errorf("%d more were started", len(started))
		}
	}
	end := func(left int, is ...int64) {
		t.Helper()
		for _, i := range is {
			hold[i] <- struct{}{}
		}
		s.wait(func() bool { return len(s.running) == left })
	}
	s.setLimit(8, 4, false)
	for i := range int64(14) {
		s.offer(&line{req: &proto.Request{Index: i}})
	}
	come(8)
	end(5, 0, 1, 2) // three slots are free: they wait
	come(0)
	hold[3] <- struct{}{} // the fourth
	come(4)               // 8 to 11 begin
	end(8)
	end(7, 4)
	come(0) // one is free, and 12 and 13 wait
	hold[5] <- struct{}{}
	come(2) // as many as are ready
	end(8)
	end(7, 6)
	s.offer(&line{req: &proto.Request{Index: 14}})
	come(1) // the only one that is ready
	end(8)
	end(0, 7, 8, 9, 10, 11, 12, 13, 14)
	s.setLimit(0, 4, false)
	for i := range int64(3) {
		s.offer(&line{req: &proto.Request{Index: 15 + i}})
	}
	s.setLimit(1, 4, true) // one tries the engine, whatever a burst is
	come(1)
	s.setLimit(8, 1, false)
	come(2)
	end(0, 15, 16, 17)
}
