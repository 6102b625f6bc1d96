package worker

import (
	"context"
	"slices"
	"sync"
	"testing"

	"millrace/broker"
	"millrace/proto"
)

// TestControlForgets: a broker that comes back with an empty disk sends no deletions of what it had. What was wanted
// of its jobs is forgotten when all that is there has come, and what is there counts.
func TestControlForgets(t *testing.T) {
	r := newRigTCP(t)
	var mu sync.Mutex
	var told []string
	c := newControl(r.conn.JS, r.log())
	c.changed = func(job, want string) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, job+" "+want)
	}
	c.missing = func() {}
	ctx, cancel := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	watching.Go(func() { c.run(ctx) })
	t.Cleanup(func() {
		cancel()
		watching.Wait()
	})
	ending, err := (&proto.Feed{State: proto.FeedEnding}).Encode()
	must(t, err)
	r.control("paused", proto.WantPause)
	r.control("cancelled", proto.WantCancel)
	r.put(proto.FeedKey("ended"), ending)
	r.until("the wishes are known", func() bool {
		return c.want("paused") == proto.WantPause && c.want("cancelled") == proto.WantCancel && c.want("ended") == proto.WantCancel
	})

	r.restart(t.TempDir())
	must(t, broker.Declarer{JS: r.conn.JS, Disk: 8 << 30}.Base(t.Context()))
	r.control("paused", proto.WantCancel)
	c.restart()
	r.until("the old wishes are forgotten", func() bool {
		return c.want("cancelled") == "" && c.want("ended") == "" && c.want("paused") == proto.WantCancel
	})
	c.restart() // the same again changes nothing
	r.control("last", proto.WantPause)
	r.until("the watch goes on", func() bool { return c.want("last") == proto.WantPause })
	mu.Lock()
	defer mu.Unlock()
	slices.Sort(told)
	if want := []string{"cancelled cancel", "ended cancel", "last pause", "paused cancel", "paused pause"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
}
