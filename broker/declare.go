package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/proto"
)

// Sizes of streams in bytes. JetStream reserves them, so they come from the disk there is.
const (
	minStream    = 32 << 20
	maxRequests  = 16 << 30
	maxResults   = 1 << 40
	unknownDisk  = 8 << 30 // assumed where the broker does not tell and its disk is not ours
	errNoStorage = 10047   // JSStorageResourcesExceeded
)

// Declarer makes the streams, consumers and buckets of proto, or brings those of an older version up to date. What is
// there already keeps what an operator may have chosen: size, replicas, placement, compression, description. What a
// newer version declared stays as it is, or two versions would undo each other's settings at every start.
// Anyone may declare, at any time and side by side.
type Declarer struct {
	JS jetstream.JetStream
	// Disk is the free space in bytes of the broker's disk where it is known; 0: it is not.
	Disk int64
	// AckWait is set on consumers; 0: what they have stays, and new ones get that of Queues.
	AckWait time.Duration
}

// Base declares what all jobs share.
func (d Declarer) Base(ctx context.Context) error {
	for _, cfg := range []jetstream.KeyValueConfig{proto.JobsConfig(), proto.WorkersConfig()} {
		if err := d.keyValue(ctx, cfg); err != nil {
			return err
		}
	}
	if err := d.objects(ctx, proto.InputsConfig()); err != nil {
		return err
	}
	return d.stream(ctx, proto.ResultStreamConfig(0), maxResults, 2)
}

func (d Declarer) keyValue(ctx context.Context, cfg jetstream.KeyValueConfig) error {
	create := func() error {
		_, err := d.JS.CreateKeyValue(ctx, cfg)
		return err
	}
	return d.ensure(ctx, bucketStream(cfg.Bucket), create, func(have *jetstream.StreamConfig) error {
		have.Discard, have.MaxAge, have.MaxMsgsPerSubject = jetstream.DiscardNew, cfg.TTL, int64(cfg.History)
		if cfg.TTL > 0 { // the broker wants it so
			have.Duplicates = min(have.Duplicates, cfg.TTL)
		}
		return nil
	})
}

func (d Declarer) objects(ctx context.Context, cfg jetstream.ObjectStoreConfig) error {
	create := func() error {
		_, err := d.JS.CreateObjectStore(ctx, cfg)
		return err
	}
	return d.ensure(ctx, "OBJ_"+cfg.Bucket, create, func(have *jetstream.StreamConfig) error {
		have.Discard, have.MaxAge = jetstream.DiscardNew, cfg.TTL
		return nil
	})
}

// bucketStream is the stream in which a bucket lies.
func bucketStream(bucket string) string { return "KV_" + bucket }

// Model declares the queue of a model and its consumers.
func (d Declarer) Model(ctx context.Context, model string) error {
	if err := d.stream(ctx, proto.RequestStreamConfig(model, 0), maxRequests, 10); err != nil {
		return err
	}
	for _, lane := range proto.Lanes() {
		if err := d.consumer(ctx, model, lane); err != nil {
			return err
		}
	}
	return nil
}

// Queues sets AckWait, where it is not 0, on the consumers of all queues: on those that there are, and on those that
// anybody declares later without an AckWait. Without it new ones get the one that was set last, or else
// proto.DefaultAckWait.
func (d Declarer) Queues(ctx context.Context) error {
	if d.AckWait == 0 {
		return nil
	}
	jobs, err := d.JS.Stream(ctx, bucketStream(proto.JobsBucket))
	if err != nil {
		return explain("keep the ack wait", err)
	}
	cfg := jobs.CachedInfo().Config
	if cfg.Metadata[proto.MetaAckWait] != d.AckWait.String() {
		cfg.Metadata = merged(cfg.Metadata, map[string]string{proto.MetaAckWait: d.AckWait.String()})
		if _, err := d.JS.UpdateStream(ctx, cfg); err != nil {
			return explain("keep the ack wait", err)
		}
	}
	qs, err := Queues(ctx, d.JS)
	if err != nil {
		return err
	}
	for _, q := range qs {
		if q.Stream != proto.RequestStream(q.Model) { // not declared by us
			continue
		}
		if err := d.Model(ctx, q.Model); err != nil {
			return err
		}
	}
	return nil
}

// ackWait is that of a new consumer for which nobody asks for another.
func (d Declarer) ackWait(ctx context.Context) (time.Duration, error) {
	jobs, err := d.JS.Stream(ctx, bucketStream(proto.JobsBucket))
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return proto.DefaultAckWait, nil
	}
	if err != nil {
		return 0, explain("look up the ack wait", err)
	}
	if w, err := time.ParseDuration(jobs.CachedInfo().Config.Metadata[proto.MetaAckWait]); err == nil && w > 0 {
		return w, nil
	}
	return proto.DefaultAckWait, nil
}

func (d Declarer) consumer(ctx context.Context, model string, lane proto.Lane) error {
	want := proto.ConsumerConfig(model, lane, d.AckWait)
	stream := proto.RequestStream(model)
	have, err := d.JS.Consumer(ctx, stream, want.Durable)
	switch {
	case err == nil:
		is := have.CachedInfo().Config
		next := is
		next.AckWait = cmp.Or(d.AckWait, is.AckWait)
		if !newer(is.Metadata) {
			next.MaxDeliver, next.MaxAckPending, next.Metadata = want.MaxDeliver, want.MaxAckPending, merged(is.Metadata, want.Metadata)
		}
		if reflect.DeepEqual(next, is) {
			return nil
		}
		want = next
	case !errors.Is(err, jetstream.ErrConsumerNotFound):
		return explain("look up consumer "+want.Durable+" of "+stream, err)
	case want.AckWait == 0:
		if want.AckWait, err = d.ackWait(ctx); err != nil {
			return err
		}
	}
	if _, err := d.JS.CreateOrUpdateConsumer(ctx, stream, want); err != nil {
		return explain("declare consumer "+want.Durable+" of "+stream, err)
	}
	return nil
}

// stream makes a stream that may take a share (one of that many parts) of the free disk, or mends one that differs
// from what this version wants. One that belongs to another model is never touched.
func (d Declarer) stream(ctx context.Context, cfg jetstream.StreamConfig, most int64, share int64) error {
	create := func() error {
		cfg.MaxBytes = d.size(ctx, most, share)
		for {
			_, err := d.JS.CreateStream(ctx, cfg)
			var je jetstream.JetStreamError
			if !errors.As(err, &je) || je.APIError() == nil || je.APIError().ErrorCode != errNoStorage || cfg.MaxBytes/2 < minStream {
				return err
			}
			cfg.MaxBytes /= 2
		}
	}
	return d.ensure(ctx, cfg.Name, create, func(have *jetstream.StreamConfig) error {
		if m := have.Metadata[proto.MetaModel]; m != cfg.Metadata[proto.MetaModel] && m != "" {
			return fmt.Errorf("stream %s belongs to model %q, not %q: two names with one token; rename one model", cfg.Name, m, cfg.Metadata[proto.MetaModel])
		}
		have.Discard, have.MaxAge, have.Subjects = cfg.Discard, cfg.MaxAge, cfg.Subjects
		have.AllowAtomicPublish, have.AllowBatchPublish, have.AllowDirect = cfg.AllowAtomicPublish, cfg.AllowBatchPublish, cfg.AllowDirect
		have.Metadata = merged(have.Metadata, cfg.Metadata)
		return nil
	})
}

// ensure makes a stream where it is not there, and else lets ours set what this version wants of it.
func (d Declarer) ensure(ctx context.Context, name string, create func() error, ours func(*jetstream.StreamConfig) error) error {
	for {
		have, err := d.JS.Stream(ctx, name)
		if err == nil {
			return d.mend(ctx, have.CachedInfo().Config, ours)
		}
		if errors.Is(err, nats.ErrNoResponders) { // the account knows why
			_, why := d.JS.AccountInfo(ctx)
			err = cmp.Or(why, err)
		}
		if !errors.Is(err, jetstream.ErrStreamNotFound) {
			return explain("look up stream "+name, err)
		}
		err = create()
		if err == nil {
			return nil
		}
		if !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			return explain("declare stream "+name, err)
		}
		if ctx.Err() != nil { // someone was faster: what they made is looked at
			return explain("declare stream "+name, ctx.Err())
		}
	}
}

func (d Declarer) mend(ctx context.Context, have jetstream.StreamConfig, ours func(*jetstream.StreamConfig) error) error {
	next := have
	next.Metadata = merged(have.Metadata, map[string]string{proto.MetaSchema: proto.Schema})
	if err := ours(&next); err != nil {
		return err
	}
	if newer(have.Metadata) || reflect.DeepEqual(next, have) {
		return nil
	}
	if _, err := d.JS.UpdateStream(ctx, next); err != nil {
		return explain("update stream "+have.Name, err)
	}
	return nil
}

// newer says whether a later version than this one declared something.
func newer(metadata map[string]string) bool {
	have, err := strconv.Atoi(metadata[proto.MetaSchema])
	ours, _ := strconv.Atoi(proto.Schema) // a number
	return err == nil && have > ours
}

// merged adds ours to what the operator and the broker noted.
func merged(have, ours map[string]string) map[string]string {
	m := make(map[string]string, len(have)+len(ours))
	maps.Copy(m, have)
	maps.Copy(m, ours)
	return m
}

// Drift names the settings in which a stream differs from what this version wants. Size and replicas are the
// operator's; one that a newer version declared is that version's.
func Drift(have, want jetstream.StreamConfig) []string {
	if newer(have.Metadata) {
		return nil
	}
	var out []string
	differ := func(name string, is bool) {
		if is {
			out = append(out, name)
		}
	}
	differ("retention", have.Retention != want.Retention)
	differ("discard", have.Discard != want.Discard)
	differ("max_age", have.MaxAge != want.MaxAge)
	differ("allow_atomic", have.AllowAtomicPublish != want.AllowAtomicPublish)
	differ("allow_batched", have.AllowBatchPublish != want.AllowBatchPublish)
	differ("allow_direct", want.AllowDirect && !have.AllowDirect)
	differ("schema", have.Metadata[proto.MetaSchema] != want.Metadata[proto.MetaSchema])
	differ("subjects", fmt.Sprint(have.Subjects) != fmt.Sprint(want.Subjects))
	return out
}

func (d Declarer) size(ctx context.Context, most, share int64) int64 {
	free := d.Disk
	if free == 0 {
		free = unknownDisk
		if a, err := d.JS.AccountInfo(ctx); err == nil && a.Limits.MaxStore > 0 {
			free = a.Limits.MaxStore - int64(a.ReservedStore)
		}
	}
	return min(max(free/share, minStream), most)
}

// Redelivered declares the queue of a model as Model does, and makes every request that was handed out and not
// acknowledged available at once, by making the consumers anew. Only for a broker whose clients are all gone: the
// requests that someone still works on would run twice.
func (d Declarer) Redelivered(ctx context.Context, model string) error {
	stream := proto.RequestStream(model)
	for _, lane := range proto.Lanes() {
		err := d.JS.DeleteConsumer(ctx, stream, string(lane))
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			break // nothing was handed out
		}
		if err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
			return explain("give back what a dead process held", err)
		}
	}
	return d.Model(ctx, model)
}

// explain adds what to do to the errors that users meet.
func explain(doing string, err error) error {
	switch {
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		return fmt.Errorf("%s: %w; start nats-server with -js, or use `millrace broker`", doing, err)
	case errors.Is(err, nats.ErrTimeout), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s: %w: the broker did not answer", doing, ErrUnreachable)
	case errors.Is(err, nats.ErrNoResponders):
		return fmt.Errorf("%s: %w; JetStream is off or still starting at the broker", doing, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}
