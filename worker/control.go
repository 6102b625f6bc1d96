package worker

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// control knows what is wanted of jobs: by users, and by an owner that ends one whose time is over. It never blocks a
// line: what it does not know is to be run.
type control struct {
	js      jetstream.JetStream
	log     *slog.Logger
	changed func(job, want string)
	missing func()

	again chan struct{} // watch anew
	jobs  atomic.Pointer[map[string]string]
}

func newControl(js jetstream.JetStream, log *slog.Logger) *control {
	c := &control{js: js, log: log, again: make(chan struct{}, 1)}
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
			c.log.Warn("cannot watch the controls of jobs, trying on", "error", broker.Plain(err))
		}
		select {
		case <-ctx.Done():
		case <-c.again:
		case <-time.After(time.Second):
		}
	}
}

// watch follows the bucket until it is to be watched anew. It begins with nothing, because the broker may have come
// back without what it had, and nobody says so; until all that is there has come, the old holds.
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
	heard, whole := wishes{users: map[string]string{}, ending: map[string]bool{}}, false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.again:
			return nil
		case e, ok := <-w.Updates():
			changed := false
			switch {
			case !ok:
				return errors.New("watch ended")
			case e == nil: // all that was there has come
				whole, changed = true, true
			default:
				changed = c.take(&heard, e)
			}
			if whole && changed { // every owner renews its record, and mostly nothing is new in it
				c.follow(heard.jobs())
			}
		}
	}
}

// wantEnd is what the owner of a job wants whose time is over: the same as a cancel, under another name.
const wantEnd = "end"

func isOver(want string) bool { return want == proto.WantCancel || want == wantEnd }

// wishes is what one watch has heard.
type wishes struct {
	users  map[string]string
	ending map[string]bool // the owner publishes how the rest of it ends
}

// jobs is what is wanted of each job that is not just to be run.
func (w *wishes) jobs() map[string]string {
	out := maps.Clone(w.users)
	for job := range w.ending {
		if out[job] != proto.WantCancel {
			out[job] = wantEnd
		}
	}
	return out
}

// take digests a record, and says whether it changes what is wanted of its job.
func (c *control) take(heard *wishes, e jetstream.KeyValueEntry) bool {
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
		return false
	}
	if kind == "ctl" {
		return set(heard.users, job, control.Want, control.Want != proto.WantRun)
	}
	return set(heard.ending, job, true, feed.State == proto.FeedEnding)
}

// follow makes jobs what is wanted from now on.
func (c *control) follow(jobs map[string]string) {
	old := *c.jobs.Load()
	if maps.Equal(old, jobs) {
		return
	}
	c.jobs.Store(&jobs)
	for job, want := range jobs {
		if old[job] != want {
			c.changed(job, want)
		}
	}
}

// set keeps a value in a map, or removes it, and says whether that changed the map.
func set[V comparable](m map[string]V, key string, v V, keep bool) bool {
	have, was := m[key]
	if keep {
		m[key] = v
		return !was || have != v
	}
	delete(m, key)
	return was
}
