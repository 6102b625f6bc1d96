package worker

import (
	"context"
	"slices"
	"sync"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

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
		return c.want("paused") == proto.WantPause && c.want("cancelled") == proto.WantCancel && c.want("ended") == wantEnd
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
	if want := []string{"cancelled cancel", "ended end", "last pause", "paused cancel", "paused pause"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
}

// TestControlUnchanged: the records that owners renew all the time cost nothing while they say the same.
func TestControlUnchanged(t *testing.T) {
	r := newRig(t)
	c := newControl(r.conn.JS, r.log())
	heard := wishes{users: map[string]string{}, ending: map[string]bool{}}
	kv, err := r.conn.JS.KeyValue(t.Context(), proto.JobsBucket)
	must(t, err)
	w, err := kv.WatchFiltered(t.Context(), []string{proto.ControlKey("*"), proto.FeedKey("*")}, jetstream.UpdatesOnly())
	must(t, err)
	defer func() { must(t, w.Stop()) }()
	feed := func(state string) func() {
		return func() {
			b, err := (&proto.Feed{State: state}).Encode()
			must(t, err)
			r.put(proto.FeedKey("j"), b)
		}
	}
	for i, step := range []struct {
		put     func()
		changed bool
	}{
		{feed(proto.FeedFeeding), false}, {feed(proto.FeedWaiting), false}, {feed(proto.FeedEnding), true}, {feed(proto.FeedEnding), false},
		{func() { must(t, kv.Delete(t.Context(), proto.FeedKey("j"))) }, true}, {feed(proto.FeedFeeding), false},
		{func() { r.control("j", proto.WantPause) }, true}, {func() { r.control("j", proto.WantPause) }, false},
		{func() { r.control("j", proto.WantCancel) }, true}, {func() { r.control("j", proto.WantRun) }, true}, {func() { r.control("j", proto.WantRun) }, false},
	} {
		step.put()
		if got := c.take(&heard, <-w.Updates()); got != step.changed {
			t.Errorf("step %d: changed %v, want %v", i, got, step.changed)
		}
	}
}
