package worker

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/proto"
)

// control knows what is wanted of jobs: by users, and by an owner that ends one whose time is over. It never blocks a
// line: what it does not know is to be run.
type control struct {
	js      jetstream.JetStream
	log     *slog.Logger
	changed func(job, want string)
	missing func()

	again  chan struct{} // watch anew
	users  map[string]string
	ending map[string]bool // the owner publishes how the rest of it ends
	jobs   atomic.Pointer[map[string]string]
}

func newControl(js jetstream.JetStream, log *slog.Logger) *control {
	c := &control{js: js, log: log, again: make(chan struct{}, 1), users: map[string]string{}, ending: map[string]bool{}}
	c.jobs.Store(&map[string]string{})
	return c
}

// want is what is wanted of a job.
func (c *control) want(job string) string { return (*c.jobs.Load())[job] }

// restart watches anew, because the broker may be another one.
func (c *control) restart() {
	select {
	case c.again <- struct{}{}:
	default:
	}
}

// run watches until ctx ends.
func (c *control) run(ctx context.Context) {
	said := ""
	for ctx.Err() == nil {
		err := c.watch(ctx)
		if err == nil {
			said = ""
			continue
		}
		if gone(err) {
			c.missing()
		}
		if err.Error() != said && ctx.Err() == nil {
			said = err.Error()
			c.log.Warn("cannot watch the controls of jobs, trying on", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-c.again:
		case <-time.After(time.Second):
		}
	}
}

// watch follows the bucket until it is to be watched anew.
func (c *control) watch(ctx context.Context) error {
	kv, err := c.js.KeyValue(ctx, proto.JobsBucket)
	if err != nil {
		return err
	}
	w, err := kv.WatchFiltered(ctx, []string{proto.ControlKey("*"), proto.FeedKey("*")})
	if err != nil {
		return err
	}
	defer func() { _ = w.Stop() }() // it ends with the connection at the latest
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.again:
			return nil
		case e, ok := <-w.Updates():
			if !ok {
				return errors.New("watch ended")
			}
			if e != nil { // nil: all that was there has come
				c.take(e)
			}
		}
	}
}

// take digests a record. Only the goroutine that watches calls it.
func (c *control) take(e jetstream.KeyValueEntry) {
	kind, job := proto.SplitKey(e.Key())
	control, feed := proto.Control{Want: proto.WantRun}, proto.Feed{}
	var err error
	switch put := e.Operation() == jetstream.KeyValuePut; {
	case kind == "ctl" && put:
		err = control.Decode(e.Value())
	case kind == "feed" && put:
		err = feed.Decode(e.Value())
	}
	if err != nil {
		c.log.Warn("cannot read what is wanted of a job, passing it over", "key", e.Key(), "error", err)
		return
	}
	if kind == "ctl" {
		set(c.users, job, control.Want, control.Want != proto.WantRun)
	} else {
		set(c.ending, job, true, feed.State == proto.FeedEnding)
	}
	want := c.users[job]
	if c.ending[job] {
		want = proto.WantCancel
	}
	old := *c.jobs.Load()
	if old[job] == want {
		return
	}
	jobs := maps.Clone(old)
	set(jobs, job, want, want != "")
	c.jobs.Store(&jobs)
	if want != "" {
		c.changed(job, want)
	}
}

// set keeps a value in a map, or removes it.
func set[V any](m map[string]V, key string, v V, keep bool) {
	if keep {
		m[key] = v
	} else {
		delete(m, key)
	}
}
