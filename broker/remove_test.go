package broker_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// racing is a broker whose jobs change right after the spec of one was read, or after a look at its records, and right
// before or after one of them was removed.
type racing struct {
	jetstream.JetStream
	read, looked    func()
	before, removed map[string]func() // by key
}

type racingKV struct {
	jetstream.KeyValue
	racing
}

func (r racing) KeyValue(ctx context.Context, bucket string) (jetstream.KeyValue, error) {
	kv, err := r.JetStream.KeyValue(ctx, bucket)
	return racingKV{kv, r}, err
}

func (r racingKV) Get(ctx context.Context, key string) (jetstream.KeyValueEntry, error) {
	if r.read != nil && key == proto.JobKey("j") {
		defer r.read()
	}
	if r.looked != nil && key == proto.ControlKey("j") {
		defer r.looked()
	}
	return r.KeyValue.Get(ctx, key)
}

func (r racing) PublishMsg(ctx context.Context, m *nats.Msg, opts ...jetstream.PublishOpt) (*jetstream.PubAck, error) {
	key := strings.TrimPrefix(m.Subject, "$KV."+proto.JobsBucket+".")
	if f := r.before[key]; f != nil {
		f()
	}
	if f := r.removed[key]; f != nil {
		defer f()
	}
	return r.JetStream.PublishMsg(ctx, m, opts...)
}

// TestExpire: what expires is the job that was looked at, never one that was created again under its id, nor anything of
// that.
func TestExpire(t *testing.T) {
	c := start(t, &broker.Server{})
	d := broker.Declarer{JS: c.JS, Disk: 1 << 30}
	must(t, d.Base(t.Context()))
	must(t, d.Model(t.Context(), "m"))
	kv, err := c.JS.KeyValue(t.Context(), proto.JobsBucket)
	must(t, err)
	objects, err := c.JS.ObjectStore(t.Context(), proto.InputsBucket)
	must(t, err)
	models := []proto.ModelLines{{Model: "m"}}
	keys := []string{proto.JobKey("j"), proto.FeedKey("j"), proto.ControlKey("j"), proto.ProgressKey("j")}
	subjects := map[string]string{proto.RequestStream("m"): proto.RequestSubject("m", proto.LaneNormal, "j"), proto.ResultStream: proto.ResultSubject("j")}
	put := func(after int64) {
		b, err := (&proto.Job{ID: "j", After: after, Models: models}).Encode()
		must(t, err)
		for _, key := range keys {
			_, err := kv.Put(t.Context(), key, b)
			must(t, err)
		}
		for _, subject := range subjects {
			_, err := c.JS.Publish(t.Context(), subject, b)
			must(t, err)
		}
		_, err = objects.PutBytes(t.Context(), "j", b)
		must(t, err)
	}
	left := func() (n int) {
		for _, key := range keys {
			if _, err := kv.Get(t.Context(), key); err == nil {
				n++
			}
		}
		for name, subject := range subjects {
			s, err := c.JS.Stream(t.Context(), name)
			must(t, err)
			info, err := s.Info(t.Context(), jetstream.WithSubjectFilter(subject))
			must(t, err)
			n += int(info.State.Subjects[subject])
		}
		if _, err := objects.GetInfo(t.Context(), "j"); err == nil {
			n++
		}
		return n
	}
	const whole = 4 + 2 + 1
	expire := func(js jetstream.JetStream, after int64) error {
		return broker.Expire(t.Context(), js, &proto.Job{ID: "j", After: after, Models: models})
	}
	put(2)
	if err := expire(c.JS, 1); !errors.Is(err, broker.ErrNoJob) || left() != whole {
		t.Errorf("created again before: %v, %d things left", err, left())
	}
	if err := expire(racing{JetStream: c.JS, read: func() { put(3) }}, 2); !errors.Is(err, broker.ErrNoJob) || left() != whole+2 {
		t.Errorf("created again after it was looked at: %v, %d things left", err, left())
	}
	for range 2 { // the second time it is gone
		if err := expire(c.JS, 3); err != nil || left() != 0 {
			t.Errorf("%v, %d things left", err, left())
		}
	}
	put(4)
	if err := expire(racing{JetStream: c.JS, removed: map[string]func(){proto.JobKey("j"): func() { put(5) }}}, 4); err != nil || left() != whole {
		t.Errorf("created again after its spec went: %v, %d things left", err, left())
	}
	if err := expire(racing{JetStream: c.JS, read: func() { put(6) }}, 6); !errors.Is(err, broker.ErrNoJob) {
		t.Errorf("%v", err)
	}
	must(t, kv.Purge(t.Context(), proto.JobKey("j")))
	if err := expire(racing{JetStream: c.JS, read: func() { put(7) }}, 6); err != nil || left() != whole {
		t.Errorf("created again while what was left of it went: %v, %d things left", err, left())
	}
}

// jobAlone puts the spec of a job and nothing beside it.
func jobAlone(t *testing.T) (c *broker.Conn, kv jetstream.KeyValue, job proto.Job) {
	t.Helper()
	c, job = start(t, &broker.Server{}), proto.Job{ID: "j"}
	must(t, (&broker.Declarer{JS: c.JS, Disk: 1 << 30}).Base(t.Context()))
	kv, err := c.JS.KeyValue(t.Context(), proto.JobsBucket)
	must(t, err)
	b, err := job.Encode()
	must(t, err)
	_, err = kv.Put(t.Context(), proto.JobKey("j"), b)
	must(t, err)
	return c, kv, job
}

// nothingLeft checks that there is no record of any job.
func nothingLeft(t *testing.T, kv jetstream.KeyValue) {
	t.Helper()
	keys, err := kv.ListKeys(t.Context())
	must(t, err)
	for key := range keys.Keys() {
		t.Errorf("%s is left", key)
	}
}

// TestRemoveWhileWanted: what is wanted of a job while it is removed is removed with it, and is not wanted of the next job of
// that id.
func TestRemoveWhileWanted(t *testing.T) {
	for when, at := range map[string]func(cancel func()) racing{
		"after the look":              func(f func()) racing { return racing{looked: f} },
		"after that was removed":      func(f func()) racing { return racing{removed: map[string]func(){proto.ControlKey("j"): f}} },
		"before its spec was removed": func(f func()) racing { return racing{before: map[string]func(){proto.JobKey("j"): f}} },
	} {
		for word, before := range map[string]bool{"the first word": false, "another word": true} {
			t.Run(word+" "+when, func(t *testing.T) {
				c, kv, job := jobAlone(t)
				cancel := func() { must(t, broker.Want(t.Context(), c.JS, "j", proto.Control{Want: proto.WantCancel})) }
				if before {
					cancel()
				}
				wanted := 0
				js := at(func() {
					if wanted++; wanted == 1 {
						cancel()
					}
				})
				js.JetStream = c.JS
				must(t, broker.Remove(t.Context(), js, broker.JobView{Job: job}))
				nothingLeft(t, kv)
				if wanted == 0 {
					t.Error("nobody wanted anything")
				}
			})
		}
	}
}

// TestRemoveTwice: who is late to remove a job leaves the one alone that was created again after another one had removed it,
// and what is wanted of that.
func TestRemoveTwice(t *testing.T) {
	for when, at := range map[string]func(f func()) racing{
		"after the look":                  func(f func()) racing { return racing{looked: f} },
		"after the spec was read":         func(f func()) racing { return racing{read: f} },
		"before what is wanted is purged": func(f func()) racing { return racing{before: map[string]func(){proto.ControlKey("j"): f}} },
		"after what is wanted is purged":  func(f func()) racing { return racing{removed: map[string]func(){proto.ControlKey("j"): f}} },
		"before the spec is purged":       func(f func()) racing { return racing{before: map[string]func(){proto.JobKey("j"): f}} },
	} {
		t.Run(when, func(t *testing.T) {
			c, kv, job := jobAlone(t)
			next, err := (&proto.Job{ID: "j", After: 7}).Encode()
			must(t, err)
			put := sync.OnceFunc(func() {
				must(t, broker.Remove(t.Context(), c.JS, broker.JobView{Job: job}))
				_, err := kv.Create(t.Context(), proto.JobKey("j"), next)
				must(t, err)
				must(t, broker.Want(t.Context(), c.JS, "j", proto.Control{Want: proto.WantCancel}))
			})
			js := at(put)
			js.JetStream = c.JS
			if err := broker.Remove(t.Context(), js, broker.JobView{Job: job}); !errors.Is(err, broker.ErrNoJob) {
				t.Errorf("%v", err)
			}
			v, err := broker.Get(t.Context(), c.JS, "j")
			if err != nil || v.Job.After != 7 || v.Control.Want != proto.WantCancel {
				t.Errorf("%+v, %v", v, err)
			}
		})
	}
}

// TestExpireWhileWanted: what is wanted of a job after its records were looked at expires with it.
func TestExpireWhileWanted(t *testing.T) {
	c, kv, job := jobAlone(t)
	cancel := func() { must(t, broker.Want(t.Context(), c.JS, "j", proto.Control{Want: proto.WantCancel})) }
	must(t, broker.Expire(t.Context(), racing{JetStream: c.JS, before: map[string]func(){proto.JobKey("j"): cancel}}, &job))
	nothingLeft(t, kv)
}

// TestWantRemoved: nothing can be wanted of a job that is not there, also where it went while that was said.
func TestWantRemoved(t *testing.T) {
	c, kv, job := jobAlone(t)
	gone := func() { must(t, broker.Remove(t.Context(), c.JS, broker.JobView{Job: job})) }
	for _, js := range []jetstream.JetStream{racing{JetStream: c.JS, read: gone}, c.JS} {
		if err := broker.Want(t.Context(), js, "j", proto.Control{Want: proto.WantCancel}); !errors.Is(err, broker.ErrNoJob) {
			t.Errorf("%v", err)
		}
		nothingLeft(t, kv)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
