package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/proto"
)

// JobView is all that the broker knows of a job.
type JobView struct {
	Job      proto.Job
	Control  proto.Control
	Feed     proto.Feed
	Progress proto.Progress
	Silent   time.Duration // since the owner last wrote its record, on the broker's clock; 0 where there is none, or nothing to own
	Unfolded bool          // who looked asked for an aggregator as well, and none answered
	Unserved string        // why no worker runs lines of it now, where who looked asked the workers as well; empty: they are run
}

// States of a job, as people see it.
const (
	StateRunning   = "running"
	StateOrphaned  = "orphaned" // nobody owns its input at the moment: what is in the queues is run, and no more comes
	StateWaiting   = "waiting"  // the same of an input that lies with the broker: an aggregator adopts it
	StatePaused    = "paused"
	StateHalted    = "halted"
	StateCancelled = "cancelled"
	StateWriting   = "writing"
	StateFinished  = "finished"
)

// State sums a job up.
func (v *JobView) State() string {
	switch {
	case v.Progress.State == proto.FoldDone:
		return StateFinished
	case v.Progress.State == proto.FoldWriting:
		return StateWriting
	case v.Control.Want == proto.WantCancel:
		return StateCancelled
	case v.Feed.State == proto.FeedHalted:
		return StateHalted
	case v.Control.Want == proto.WantPause:
		return StatePaused
	case v.owned():
		return StateRunning
	case v.Job.Object != "":
		return StateWaiting
	}
	return StateOrphaned
}

func (v *JobView) owned() bool { return v.Feed.Owner.ID != "" && v.Silent <= DefaultLeaseTTL }

// Ended counts the lines that have a result.
func (v *JobView) Ended() int64 { return v.Progress.OK + v.Progress.Failed }

// Note is why nothing moves, or empty.
func (v *JobView) Note() string {
	if v.Progress.Note != "" {
		return v.Progress.Note
	}
	switch v.State() {
	case StateOrphaned:
		s := v.left()
		if v.Unserved != "" {
			s = v.Unserved + "; " + s
		}
		if v.Unfolded {
			s = ErrNoAggregator.Error() + "; " + s
		}
		return s
	case StateWaiting:
		return "handed over; an aggregator goes on with it, `millrace serve` or `millrace aggregate`"
	}
	return v.Feed.Note
}

// left says what comes of a job whose producer has left.
func (v *JobView) left() string {
	sent, rest := v.Feed.Enqueued, v.Job.Lines-v.Feed.Enqueued-v.Feed.Ended
	run := "are run"
	if v.Unserved != "" {
		run += " once a worker serves their model"
	}
	switch {
	case sent == 0:
		return "no process runs it; run the command that created it again"
	case rest > 0:
		return fmt.Sprintf("its producer has left: the %s that it sent %s, %d more wait for the command that created it; run that again", proto.Count(sent, "line"), run, rest)
	}
	ends := "by itself"
	if v.Unfolded {
		ends = "once an aggregator is there"
	}
	return fmt.Sprintf("its producer has left, with all lines sent: they %s, and the job ends %s; should some get lost, run the command that created it again", run, ends)
}

func (v *JobView) set(kind string, value []byte) error {
	switch kind {
	case "job":
		return v.Job.Decode(value)
	case "ctl":
		return v.Control.Decode(value)
	case "feed":
		return v.Feed.Decode(value)
	case "agg":
		return v.Progress.Decode(value)
	}
	return nil
}

// keys names the keys of a bucket that match: by the subjects of its stream, since a listing by a watch passes over a
// key that is being written at that moment. Some may be deleted.
func keys(ctx context.Context, js jetstream.JetStream, bucket, match string) ([]string, error) {
	prefix := "$KV." + bucket + "."
	s, err := js.Stream(ctx, bucketStream(bucket))
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil
	}
	var info *jetstream.StreamInfo
	if err == nil {
		info, err = s.Info(ctx, jetstream.WithSubjectFilter(prefix+match))
	}
	if err != nil {
		return nil, explain("list bucket "+bucket, err)
	}
	var out []string
	for subject := range info.State.Subjects {
		out = append(out, strings.TrimPrefix(subject, prefix))
	}
	slices.Sort(out)
	return out, nil
}

// Jobs lists all jobs, the newest first.
func Jobs(ctx context.Context, js jetstream.JetStream) ([]JobView, error) {
	ids, err := jobIDs(ctx, js)
	if err != nil {
		return nil, err
	}
	var out []JobView
	for _, id := range ids {
		v, err := Get(ctx, js, id)
		if errors.Is(err, ErrNoJob) { // removed meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b JobView) int {
		return cmp.Or(cmp.Compare(b.Job.CreatedMS, a.Job.CreatedMS), strings.Compare(a.Job.ID, b.Job.ID))
	})
	return out, nil
}

func jobIDs(ctx context.Context, js jetstream.JetStream) (ids []string, err error) {
	ks, err := keys(ctx, js, proto.JobsBucket, proto.JobKey("*"))
	for _, k := range ks {
		_, id := proto.SplitKey(k)
		ids = append(ids, id)
	}
	return ids, err
}

// Errors of looking for a job.
var (
	ErrNoJob     = errors.New("no such job")
	ErrAmbiguous = errors.New("several jobs begin so")
)

// rateHolds is for how long a rate is true that a job's record tells: the time that it is over. An aggregator that is there tells
// it anew more often than that, until it is 0.
const rateHolds = 15 * time.Second

// Get reads one job by its id. Each key is asked for by itself: a listing of the bucket passes over a key that is
// being written at that moment, and two of them are written several times a second.
func Get(ctx context.Context, js jetstream.JetStream, id string) (v JobView, err error) {
	none := fmt.Errorf("%w: %s", ErrNoJob, id)
	kv, err := js.KeyValue(ctx, proto.JobsBucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return v, none
	}
	if err != nil {
		return v, explain("open bucket "+proto.JobsBucket, err)
	}
	var fed, folded time.Time
	for _, key := range []string{proto.JobKey(id), proto.ControlKey(id), proto.FeedKey(id), proto.ProgressKey(id)} {
		e, err := kv.Get(ctx, key)
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			if key == proto.JobKey(id) {
				return v, none
			}
			continue
		}
		if err != nil {
			return v, explain("read "+key, err)
		}
		kind, _ := proto.SplitKey(key)
		if err := v.set(kind, e.Value()); err != nil {
			return v, fmt.Errorf("read %s: %w", key, err)
		}
		switch kind {
		case "feed":
			fed = e.Created()
		case "agg":
			folded = e.Created()
		}
	}
	p := &v.Progress
	owned := v.Feed.Owner.ID != "" && p.State != proto.FoldDone
	if !owned && p.RateLines == 0 {
		return v, nil
	}
	now, err := Now(ctx, js)
	if err != nil {
		return v, err
	}
	if owned {
		v.Silent = max(now.Sub(fed), 0)
	}
	if now.Sub(folded) > rateHolds {
		p.RateLines, p.RateTokens = 0, 0
	}
	return v, nil
}

// Choose finds, among jobs that were read, the one whose id or name is what, or the only one whose id begins so, be it as
// the file's name is in an id.
func Choose(all []JobView, what string) (JobView, error) {
	var begin []JobView
	var ids []string
	if what == "" {
		return JobView{}, fmt.Errorf("%w: it has no name; give a job's id, its beginning, or its name", ErrNoJob)
	}
	typed := asTyped(what)
	for _, v := range all {
		if v.Job.ID == what || v.Job.Name == what {
			return v, nil
		}
		if strings.HasPrefix(v.Job.ID, what) || typed != "" && strings.HasPrefix(v.Job.ID+"-", typed) {
			begin, ids = append(begin, v), append(ids, v.Job.ID)
		}
	}
	switch len(begin) {
	case 1:
		return begin[0], nil
	case 0:
		return JobView{}, fmt.Errorf("%w: %q; `millrace jobs` lists them", ErrNoJob, what)
	}
	return JobView{}, fmt.Errorf("%w: %q could be any of %s; give more of it", ErrAmbiguous, what, strings.Join(ids, ", "))
}

// asTyped is the beginning of the id of a job whose file has that name; empty where the name tells too little: an id keeps
// only the letters and digits of ASCII.
func asTyped(name string) string {
	beyond := func(r rune) bool { return r >= utf8.RuneSelf }
	if strings.ContainsFunc(name, beyond) {
		return ""
	}
	slug := proto.Slug(name, len(name))
	if slug == proto.Slug("", 0) && !strings.Contains(strings.ToLower(name), slug) {
		return ""
	}
	return slug + "-"
}

// Want tells the owner and the workers of a job what to do with it. It is put only as long as the job is there: so nothing
// that was wanted of a job that is removed meanwhile stays for the next one of its id.
func Want(ctx context.Context, js jetstream.JetStream, id string, c proto.Control) error {
	kv, err := js.KeyValue(ctx, proto.JobsBucket)
	if err != nil {
		return explain("open bucket "+proto.JobsBucket, err)
	}
	b, err := c.Encode()
	if err != nil {
		return err
	}
	for {
		spec, err := kv.Get(ctx, proto.JobKey(id))
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			return fmt.Errorf("%w: %s; it was removed", ErrNoJob, id)
		}
		if err != nil {
			return explain("read "+proto.JobKey(id), err)
		}
		_, err = js.Publish(ctx, jobsSubject(proto.ControlKey(id)), b,
			jetstream.WithExpectLastSequenceForSubject(spec.Revision(), jobsSubject(proto.JobKey(id))))
		switch {
		case err == nil:
			return nil
		case !hasChanged(err):
			return explain("tell the job", err)
		}
	}
}

// Heartbeats reads the records of all workers, encoded as they are. Where their bucket is not declared the error is
// jetstream.ErrBucketNotFound.
func Heartbeats(ctx context.Context, js jetstream.JetStream) ([]jetstream.KeyValueEntry, error) {
	kv, err := js.KeyValue(ctx, proto.WorkersBucket)
	if err != nil {
		return nil, explain("open bucket "+proto.WorkersBucket, err)
	}
	ids, err := keys(ctx, js, proto.WorkersBucket, ">")
	if err != nil {
		return nil, err
	}
	var out []jetstream.KeyValueEntry
	for _, id := range ids {
		e, err := kv.Get(ctx, id)
		if errors.Is(err, jetstream.ErrKeyNotFound) { // it left meanwhile
			continue
		}
		if err != nil {
			return nil, explain("read worker "+id, err)
		}
		out = append(out, e)
	}
	return out, nil
}

// Beat is what a worker last said of itself.
type Beat struct {
	proto.Worker
	Silent time.Duration // since then, on the broker's clock
}

// Beats lists the workers whose heartbeat counts, by id. One whose heartbeat cannot be read is in the list with no more
// than its id and that reason: it keeps nobody from seeing the others.
func Beats(ctx context.Context, js jetstream.JetStream) ([]Beat, error) {
	all, err := Heartbeats(ctx, js)
	if errors.Is(err, jetstream.ErrBucketNotFound) || err == nil && len(all) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	now, err := nowBy(ctx, js, proto.WorkersBucket) // the one that may be read for sure
	if err != nil {
		return nil, err
	}
	var out []Beat
	for _, e := range all {
		b := Beat{Silent: max(now.Sub(e.Created()), 0)}
		if err := b.Decode(e.Value()); err != nil {
			b.Worker = proto.Worker{ID: e.Key(), State: proto.EngineUnknown, Reason: fmt.Sprintf("its heartbeat cannot be read: %v", err)}
		}
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b Beat) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

// StateSilent is the state of a worker that may be gone, for people.
const StateSilent = "silent"

// Seen is the worker as people are shown it: whatever it last said, it is silent when that is proto.WorkerSilent ago, and how its
// engine does now is not known.
func (b *Beat) Seen() proto.Worker {
	w := b.Worker
	if b.Silent < proto.WorkerSilent {
		return w
	}
	w.State, w.Reason = StateSilent, fmt.Sprintf("not heard of for %s; ", b.Silent.Round(time.Second))
	w.Metered, w.KVUsage, w.TokenRate, w.RateOf = false, 0, 0, ""
	if w.Held > 0 {
		w.Reason += fmt.Sprintf("if it is gone, what it had (%s) is free again once --ack-wait is over", proto.Count(w.Held, "line"))
	} else {
		w.Reason += "it may be gone"
	}
	return w
}

// goneLooks is how many looks in a row must not find a job before it counts as removed: 10 s of the commands that
// people watch with. A broker that came back with an empty disk knows the job again sooner.
const goneLooks = 40

// Follow calls see with a job's view, now and about every interval, until see returns false or ctx ends. It goes on
// through a broker that does not answer, and returns ErrNoJob when the job was removed and ErrClosed when the
// connection is closed.
func Follow(ctx context.Context, js jetstream.JetStream, id string, interval time.Duration, see func(JobView) bool) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	gone := 0
	for {
		gctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		v, err := Get(gctx, js, id)
		cancel()
		switch {
		case err == nil && !see(v):
			return nil
		case !errors.Is(err, ErrNoJob):
			gone = 0
		default:
			gone++
		}
		if gone > goneLooks {
			return fmt.Errorf("%w; it was removed while it was watched", err)
		}
		if err := closed(js.Conn()); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}
