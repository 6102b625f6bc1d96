package aggregator

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"

	"millrace/broker"
	"millrace/proto"
)

// rig is a broker of its own, with an aggregator or several.
type rig struct {
	t    *testing.T
	srv  *broker.Server
	conn *broker.Conn
	dir  string // of the aggregators, unless they are told another
	out  string
	runs []func() // stop those that were started
}

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, srv: &broker.Server{Dir: t.TempDir()}, dir: t.TempDir(), out: t.TempDir()}
	r.up()
	return r
}

// newNetRig has a broker that can be stopped and come back under its address.
func newNetRig(t *testing.T) *rig {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	r := &rig{t: t, srv: &broker.Server{Dir: t.TempDir(), Addr: addr}, dir: t.TempDir(), out: t.TempDir()}
	r.up()
	return r
}

func (r *rig) up() {
	r.t.Helper()
	if err := r.srv.Start(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	srv := r.srv
	var once sync.Once
	r.t.Cleanup(func() { once.Do(srv.Stop) })
	r.conn = r.connect("test")
	if err := (broker.Declarer{JS: r.conn.JS, Disk: 1 << 30}).Base(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// restart brings the broker back with the disk in dir.
func (r *rig) restart(dir string) {
	r.t.Helper()
	r.conn.Close()
	r.srv.Stop()
	r.srv = &broker.Server{Dir: dir, Addr: r.srv.Addr}
	r.up()
	for _, stop := range r.runs { // before their broker
		r.t.Cleanup(stop)
	}
}

func (r *rig) connect(role string) *broker.Conn {
	r.t.Helper()
	var c *broker.Conn
	var err error
	if r.srv.Addr == "" {
		c, err = r.srv.Connect(r.t.Context(), role)
	} else {
		c, err = broker.Connect(r.t.Context(), broker.Access{URL: r.srv.URL()}, role, quiet())
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(c.Close)
	return c
}

// runner is a running aggregator.
type runner struct {
	*Aggregator
	t    *testing.T
	stop func() // waits for its end
}

func (r *rig) start(change ...func(*Aggregator)) *runner {
	r.t.Helper()
	a := &Aggregator{
		Conn: r.connect("aggregator"), Self: proto.Owner{ID: nuid.Next(), Host: nuid.Next()}, Dir: r.dir,
		SharedDisk: true, Program: "test", CheckpointEvery: 20 * time.Millisecond, LeaseTTL: time.Second,
		Output:     func(j *proto.Job) Files { return filesIn(filepath.Join(r.out, j.ID)) },
		retryEvery: 20 * time.Millisecond, Log: slog.New(slog.NewTextHandler(r.t.Output(), nil)),
	}
	for _, c := range change {
		c(a)
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan error, 1)
	go func() { over <- a.Run(ctx) }()
	var once sync.Once
	n := &runner{Aggregator: a, t: r.t, stop: func() {
		once.Do(func() {
			cancel()
			if err := <-over; err != nil {
				r.t.Errorf("Run: %v", err)
			}
		})
	}}
	r.t.Cleanup(n.stop)
	r.runs = append(r.runs, n.stop)
	return n
}

func (r *rig) kv() jetstream.KeyValue      { return r.bucket(proto.JobsBucket) }
func (r *rig) workers() jetstream.KeyValue { return r.bucket(proto.WorkersBucket) }

func (r *rig) bucket(name string) jetstream.KeyValue {
	r.t.Helper()
	kv, err := r.conn.JS.KeyValue(r.t.Context(), name)
	if err != nil {
		r.t.Fatal(err)
	}
	return kv
}

func (r *rig) job(id string, lines int64) { r.put(spec(id, lines)) }

func (r *rig) put(job *proto.Job) {
	r.t.Helper()
	b, err := job.Encode()
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.kv().Put(r.t.Context(), proto.JobKey(job.ID), b); err != nil {
		r.t.Fatal(err)
	}
}

// send publishes results and returns the sequence of the last.
func (r *rig) send(rs ...*proto.Result) (seq int64) {
	r.t.Helper()
	for _, v := range rs {
		ack, err := r.conn.JS.Publish(r.t.Context(), proto.ResultSubject(v.Job), wire(r.t, v))
		if err != nil {
			r.t.Fatal(err)
		}
		seq = int64(ack.Sequence)
	}
	return seq
}

// await waits for a progress of the job that is as wanted.
func (r *rig) await(id string, wanted func(*proto.Progress) bool) *proto.Progress {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	var last *proto.Progress
	err := watch(ctx, r.kv(), proto.ProgressKey(id), func(e jetstream.KeyValueEntry) {
		p := new(proto.Progress)
		if e.Operation() == jetstream.KeyValuePut && p.Decode(e.Value()) == nil {
			if last = p; wanted(p) {
				cancel()
			}
		}
	}, func() {})
	if err != nil || last == nil || !wanted(last) {
		r.t.Fatalf("job %s came to %+v: %v", id, last, err)
	}
	return last
}

func done(p *proto.Progress) bool { return p.State == proto.FoldDone }

func folding(seq int64) func(*proto.Progress) bool {
	return func(p *proto.Progress) bool { return p.Seq >= seq }
}

func (r *rig) ask(subject string, q encoder, a interface{ Decode([]byte) error }) {
	r.t.Helper()
	b, err := q.Encode()
	if err != nil {
		r.t.Fatal(err)
	}
	for { // an aggregator that is between two sessions or not there yet does not answer
		msg, err := r.conn.NC.Request(subject, b, time.Second)
		if errors.Is(err, nats.ErrNoResponders) || errors.Is(err, nats.ErrTimeout) {
			continue
		}
		if err != nil {
			r.t.Fatal(err)
		}
		if err := a.Decode(msg.Data); err != nil {
			r.t.Fatalf("%v: %v", err, msg.Header)
		}
		return
	}
}

func (r *rig) verify(id string) *Manifest {
	r.t.Helper()
	m, reasons, err := Verify(filesIn(filepath.Join(r.out, id)).Manifest)
	if err != nil || len(reasons) > 0 {
		r.t.Fatalf("%v %v", reasons, err)
	}
	return m
}

// all makes an ok result of every line from..to-1.
func all(job string, from, to int64) (out []*proto.Result) {
	for i := from; i < to; i++ {
		out = append(out, good(job, i, i))
	}
	return out
}

// history collects every progress of a job that is told from now on.
func (r *rig) history(id string) func() []*proto.Progress {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	var out []*proto.Progress
	over, began := make(chan error, 1), make(chan struct{})
	go func() {
		over <- watch(ctx, r.kv(), proto.ProgressKey(id), func(e jetstream.KeyValueEntry) {
			p := new(proto.Progress)
			if e.Operation() == jetstream.KeyValuePut && p.Decode(e.Value()) == nil {
				out = append(out, p)
			}
		}, func() { close(began) })
	}()
	<-began
	return func() []*proto.Progress {
		r.t.Helper()
		cancel()
		if err := <-over; err != nil {
			r.t.Fatal(err)
		}
		v, err := broker.Get(r.t.Context(), r.conn.JS, id)
		if err != nil {
			r.t.Fatal(err)
		}
		return append(out, &v.Progress)
	}
}
