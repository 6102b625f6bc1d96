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

// control knows what users want of jobs. It never blocks a line: what it does not know is to be run.
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

// want is what the user last asked of a job.
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
	w, err := kv.Watch(ctx, proto.ControlKey("*"))
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

func (c *control) take(e jetstream.KeyValueEntry) {
	_, job := proto.SplitKey(e.Key())
	want := proto.WantRun
	if e.Operation() == jetstream.KeyValuePut {
		var v proto.Control
		if err := v.Decode(e.Value()); err != nil {
			c.log.Warn("cannot read the control of a job, passing it over", "key", e.Key(), "error", err)
			return
		}
		want = v.Want
	}
	old := *c.jobs.Load()
	if old[job] == want {
		return
	}
	jobs := maps.Clone(old)
	if want == proto.WantRun {
		delete(jobs, job)
	} else {
		jobs[job] = want
	}
	c.jobs.Store(&jobs)
	c.changed(job, want)
}
