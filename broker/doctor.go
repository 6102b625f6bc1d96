package broker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/proto"
)

// Finding is one thing that doctor looked at.
type Finding struct {
	Check string `json:"check"`
	Level string `json:"level"` // ok, note (works, but know it), or bad (mend it)
	Found string `json:"found"`
	Mend  string `json:"mend,omitempty"`
}

// Levels of a finding.
const (
	LevelOK   = "ok"
	LevelNote = "note"
	LevelBad  = "bad"
)

// Doctor looks at a broker and says what is wrong with it and how to mend it. What it cannot see from a client (the
// fsync policy of a broker that is not ours) it says too.
func Doctor(ctx context.Context, c *Conn) []Finding {
	d := doctor{ctx: ctx, c: c}
	d.server()
	if !d.jetStream() {
		return d.out
	}
	d.streams()
	d.buckets()
	ws := d.workers()
	d.aggregator(ws, d.work(ws))
	return d.out
}

type doctor struct {
	ctx context.Context
	c   *Conn
	out []Finding
}

func (d *doctor) ok(check, format string, args ...any) {
	d.out = append(d.out, Finding{check, LevelOK, fmt.Sprintf(format, args...), ""})
}

func (d *doctor) note(check, mend, format string, args ...any) {
	d.out = append(d.out, Finding{check, LevelNote, fmt.Sprintf(format, args...), mend})
}

func (d *doctor) bad(check, mend, format string, args ...any) {
	d.out = append(d.out, Finding{check, LevelBad, fmt.Sprintf(format, args...), mend})
}

// failed is bad for a call that the broker did not answer as it should. A call that it does not allow is not answered at
// all: what it refused last is in the connection.
func (d *doctor) failed(check, mend string, err error) {
	if last := d.c.NC.LastError(); errors.Is(err, nats.ErrPermissionViolation) {
		mend = mendPermission
	} else if errors.Is(last, nats.ErrPermissionViolation) {
		mend, err = mendPermission, last
	}
	d.bad(check, mend, "%v", err)
}

const mendPermission = "let this user do that in the broker's configuration, or come as another user with --creds or --token-file"

func (d *doctor) server() {
	nc := d.c.NC
	rtt, err := nc.RTT()
	if err != nil {
		d.bad("connection", "look at the network between here and the broker", "connected, but no answer to a ping: %v", err)
		return
	}
	d.ok("connection", "%s, nats-server %s, round trip %s", redact(nc.ConnectedUrl()), nc.ConnectedServerVersion(), rtt.Round(10*time.Microsecond))
	if v := nc.ConnectedServerVersion(); older(v, 2, 14) {
		d.note("version", "use nats-server 2.15 or newer, or `millrace broker`", "nats-server %s has no fast batches; enqueueing is slower", v)
	}
	if p := nc.MaxPayload(); p < proto.MaxPayload {
		d.note("max_payload", "set max_payload: 8MB at the broker", "%d bytes: longer lines are invalid, longer answers become error lines", p)
	} else {
		d.ok("max_payload", "%d bytes", p)
	}
}

// older says whether a version "2.14.3" is below major.minor.
func older(v string, major, minor int) bool {
	var a, b int
	if _, err := fmt.Sscanf(v, "%d.%d", &a, &b); err != nil {
		return false
	}
	return a < major || a == major && b < minor
}

func (d *doctor) jetStream() bool {
	ctx, cancel := context.WithTimeout(d.ctx, 5*time.Second)
	defer cancel()
	a, err := d.c.JS.AccountInfo(ctx)
	if err != nil {
		mend := "look at the broker's log"
		if errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount) {
			mend = "start nats-server with -js (and give the account JetStream), or use `millrace broker`"
		}
		d.failed("jetstream", mend, err)
		return false
	}
	limit := "no account limit"
	if a.Limits.MaxStore > 0 {
		limit = fmt.Sprintf("account limit %s", Size(a.Limits.MaxStore))
		if left := a.Limits.MaxStore - int64(a.Store); left < 1<<30 {
			d.bad("disk", "raise the account's max file storage", "%s left of %s", Size(left), limit)
		}
	}
	d.ok("jetstream", "on, %d streams, %s stored, %s", a.Streams, Size(int64(a.Store)), limit)
	if a.Limits.MaxConsumers > 0 && a.Limits.MaxConsumers < 8 {
		d.bad("consumers", "allow at least 3 consumers per model and 4 more", "account limit %d", a.Limits.MaxConsumers)
	}
	return true
}

func (d *doctor) streams() {
	seen := false
	l := d.c.JS.ListStreams(d.ctx)
	for info := range l.Info() {
		name := info.Config.Name
		switch {
		case name == proto.ResultStream:
			seen = true
			d.stream(info, proto.ResultStreamConfig(0))
		case proto.IsRequestStream(name):
			d.stream(info, proto.RequestStreamConfig(info.Config.Metadata[proto.MetaModel], 0))
			d.consumers(name)
		}
	}
	if err := l.Err(); err != nil {
		d.failed("streams", "look at the broker's log", fmt.Errorf("cannot list streams: %w", err))
	} else if !seen {
		d.note("stream "+proto.ResultStream, "any role declares it when it starts", "not declared yet")
	}
}

func (d *doctor) stream(info *jetstream.StreamInfo, want jetstream.StreamConfig) {
	check := "stream " + info.Config.Name
	if drift := Drift(info.Config, want); len(drift) > 0 {
		d.bad(check, "restart a role of this version, it updates the stream; what cannot be changed (retention) needs the stream deleted while no job runs",
			"differs from what this version declares in %s", strings.Join(drift, ", "))
		return
	}
	if newer(info.Config.Metadata) {
		d.note(check, "update this millrace too", "declared by a newer version (settings %s, ours are %s)", info.Config.Metadata[proto.MetaSchema], proto.Schema)
	}
	used := float64(info.State.Bytes) / float64(max(info.Config.MaxBytes, 1))
	switch {
	case info.Config.MaxBytes > 0 && used > 0.8:
		d.bad(check, fmt.Sprintf("raise it: nats stream edit %s --max-bytes=…", info.Config.Name), "%.0f %% of its %s are used", 100*used, Size(info.Config.MaxBytes))
	case info.Config.Replicas > 1:
		d.ok(check, "%d messages, %s, %d replicas", info.State.Msgs, Size(int64(info.State.Bytes)), info.Config.Replicas)
	default:
		d.ok(check, "%d messages, %s of %s, 1 replica", info.State.Msgs, Size(int64(info.State.Bytes)), Size(info.Config.MaxBytes))
	}
	if info.Config.Storage != jetstream.FileStorage {
		d.bad(check, "delete it while no job runs; millrace declares it on disk", "is kept in memory only")
	}
}

func (d *doctor) consumers(stream string) {
	for _, lane := range proto.Lanes() {
		c, err := d.c.JS.Consumer(d.ctx, stream, string(lane))
		if errors.Is(err, jetstream.ErrConsumerNotFound) {
			d.note("consumer "+stream+"/"+string(lane), "a worker or producer declares it when it starts", "not declared")
			continue
		}
		if err != nil {
			d.failed("consumer "+stream+"/"+string(lane), "look at the broker's log", err)
			continue
		}
		cfg := c.CachedInfo().Config
		if cfg.MaxDeliver != -1 {
			d.bad("consumer "+stream+"/"+string(lane), "restart a worker, it updates the consumer", "max_deliver is %d: lines given back that often are parked for ever", cfg.MaxDeliver)
		}
	}
}

func (d *doctor) buckets() {
	for _, b := range []string{proto.JobsBucket, proto.WorkersBucket} {
		_, err := d.c.JS.KeyValue(d.ctx, b)
		switch {
		case errors.Is(err, jetstream.ErrBucketNotFound):
			d.note("bucket "+b, "any role declares it when it starts", "%v", err)
		case err != nil:
			d.failed("bucket "+b, "look at the broker's log", err)
		}
	}
	if d.c.SyncAlways {
		d.ok("fsync", "before every acknowledgement")
		return
	}
	d.note("fsync", "`--sync always` (or sync_interval: always at your nats-server) makes the broker itself durable, at a price",
		"not visible to a client; `millrace broker` flushes every second, nats-server by default every two minutes. Power loss then costs resending, never a line")
}

func (d *doctor) workers() []proto.Worker {
	beats, err := Beats(d.ctx, d.c.JS)
	if err != nil {
		d.failed("workers", "look at the broker's log", err)
		return nil
	}
	if len(beats) == 0 {
		d.note("workers", "start one beside each engine: millrace worker --engine URL", "none")
	}
	var ws []proto.Worker
	for _, b := range beats {
		w := b.Seen()
		ws = append(ws, w)
		check := "worker " + w.ID
		switch {
		case w.State == StateSilent:
			d.note(check, "if it was killed, start it again; else look at its machine, and at the network between that and the broker", "%s: %s", w.State, w.Reason)
		case w.State == proto.EngineUnknown:
			d.note(check, "run the same version of millrace everywhere", "%s", w.Reason)
		case w.State == proto.EngineNoQueue, w.State == proto.EngineReady && w.Reason != "":
			d.note(check, "mend that at the broker; its engine "+w.Engine+" is well", "%s: %s", w.State, w.Reason)
		case w.State != proto.EngineReady:
			d.note(check, "look at its engine "+w.Engine, "%s: %s", w.State, w.Reason)
		default:
			d.ok(check, "%s serves %s, %d in flight of %d", w.Engine, strings.Join(w.Models, ", "), w.InFlight, w.Limit)
		}
	}
	for _, e := range Shared(beats) {
		d.note("engine "+e.Engine, mendShared, "workers %s run on it: one of them is enough", strings.Join(e.Workers, ", "))
	}
	return ws
}

// work says which models nobody serves though lines wait for that, and returns the jobs.
func (d *doctor) work(ws []proto.Worker) []JobView {
	jobs, err := Jobs(d.ctx, d.c.JS)
	var queues []Queue
	if err == nil {
		queues, err = Queues(d.ctx, d.c.JS)
	}
	if err != nil {
		d.failed("jobs", "look at the broker's log", err)
		return nil
	}
	wanted, queued := map[string][]string{}, map[string]int64{}
	for i := range jobs {
		switch jobs[i].State() {
		case StateRunning, StateOrphaned, StateWaiting:
			for _, m := range jobs[i].open() {
				wanted[m] = append(wanted[m], jobs[i].Job.ID)
			}
		}
	}
	for _, q := range queues {
		if queued[q.Model] = q.Waiting + q.HandedTo; queued[q.Model] > 0 && wanted[q.Model] == nil {
			wanted[q.Model] = []string{}
		}
	}
	for _, model := range slices.Sorted(maps.Keys(wanted)) {
		if slices.ContainsFunc(ws, func(w proto.Worker) bool { return w.Serves(model) }) {
			continue
		}
		found := fmt.Sprintf("no worker serves it; in its queue: %s", proto.Count(queued[model], "line"))
		if of := wanted[model]; len(of) > 0 {
			found += "; wanted by job " + strings.Join(of, ", ")
		}
		mend := "start a worker beside an engine that serves it (millrace worker --engine URL), mend the worker that is for it, or cancel the job"
		if of := coming(ws, model); len(of) > 0 {
			mend = "wait for " + strings.Join(of, ", ") + ", or look at what keeps it: it is for this model"
		}
		d.note("model "+model, mend, "%s", found)
	}
	return jobs
}

// coming are the workers that are for a model, and may run it yet.
func coming(ws []proto.Worker, model string) (of []string) {
	for _, w := range ws {
		if slices.Contains(w.Models, model) && w.Pending() && w.State != StateSilent && w.State != proto.EngineUnknown {
			of = append(of, "worker "+w.ID)
		}
	}
	return of
}

// aggregator says whether one is there. None is needed as long as there are no workers and no job is to end.
func (d *doctor) aggregator(ws []proto.Worker, jobs []JobView) {
	const check, mend = "aggregator", "start one: millrace aggregate; until then no job ends, and no file is written"
	unended := func(v JobView) bool { return v.Progress.State != proto.FoldDone }
	switch err := Folding(d.ctx, d.c); {
	case err == nil:
		d.ok(check, "answers")
	case !errors.Is(err, ErrNoAggregator):
		d.failed(check, "look at the network between here and the broker", err)
	case len(ws) > 0, slices.ContainsFunc(jobs, unended):
		d.bad(check, mend, "none answers")
	default:
		d.note(check, mend, "none answers")
	}
}

// open are the models of which a job has lines that have not ended.
func (v *JobView) open() (models []string) {
	for _, m := range v.Job.Models {
		if !v.Progress.Over(m.Model, m.Lines) {
			models = append(models, m.Model)
		}
	}
	return models
}
