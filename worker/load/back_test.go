package load

import (
	"testing"
	"time"

	"millrace/proto"
)

func TestLimitBackPressure(t *testing.T) {
	now := time.Now()
	l := New(60)
	for i := range 10 {
		l.Refused(now.Add(time.Duration(i) * 90 * time.Millisecond)) // a burst counts once
	}
	if got := l.Get(); got != 40 {
		t.Errorf("limit %d", got)
	}
	for range 30 {
		now = now.Add(time.Second)
		l.Refused(now)
	}
	if got := l.Get(); got != 1 {
		t.Errorf("limit %d after many", got)
	}
	for i := range 30 {
		now = now.Add(5 * time.Second)
		l.Observe(Engine{}, 0, now)
		l.Observe(Engine{}, 0, now.Add(4*time.Second)) // not before five are over
		if got := l.Get(); i == 15 && (got < 30 || got >= 60) {
			t.Errorf("limit %d after 80 seconds, a quarter more each five", got)
		}
	}
	if got := l.Get(); got != 60 {
		t.Errorf("limit %d after a while", got)
	}
}

// TestLimitBusyNowAndThen: an engine that answers more than it refuses keeps half of the limit, and one that refuses all
// does not.
func TestLimitBusyNowAndThen(t *testing.T) {
	now := time.Now()
	l := New(60)
	for range 30 {
		now = now.Add(time.Second)
		for range 3 {
			l.Finished(proto.Usage{}, 0, Wish{}, 0, now)
		}
		l.Refused(now)
	}
	if got := l.Get(); got != 30 {
		t.Errorf("limit %d", got)
	}
	for range 2 {
		now = now.Add(time.Second)
		l.Refused(now)
	}
	if got := l.Get(); got >= 30 {
		t.Errorf("limit %d of an engine that only refuses", got)
	}
}
