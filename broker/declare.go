package broker

import (
	"context"
	"errors"
	"fmt"
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

// Declarer makes the streams, consumers and buckets of proto, or brings those of an older version up to date.
// Anyone may declare, at any time and side by side.
type Declarer struct {
	JS jetstream.JetStream
	// Disk is the free space in bytes of the broker's disk where it is known; 0: it is not.
	Disk int64
	// AckWait is set on consumers; 0: what they have stays, and new ones get proto.DefaultAckWait.
	AckWait time.Duration
}

// Base declares what all jobs share.
func (d Declarer) Base(ctx context.Context) error {
	if _, err := d.JS.CreateOrUpdateKeyValue(ctx, proto.JobsConfig()); err != nil {
		return explain("declare bucket "+proto.JobsBucket, err)
	}
	if _, err := d.JS.CreateOrUpdateKeyValue(ctx, proto.WorkersConfig()); err != nil {
		return explain("declare bucket "+proto.WorkersBucket, err)
	}
	if _, err := d.JS.CreateOrUpdateObjectStore(ctx, proto.InputsConfig()); err != nil {
		return explain("declare object store "+proto.InputsBucket, err)
	}
	return d.stream(ctx, proto.ResultStreamConfig(0), maxResults, 2)
}

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

func (d Declarer) consumer(ctx context.Context, model string, lane proto.Lane) error {
	want := proto.ConsumerConfig(model, lane, d.AckWait)
	stream := proto.RequestStream(model)
	have, err := d.JS.Consumer(ctx, stream, want.Durable)
	if err == nil {
		cfg := have.CachedInfo().Config
		if want.AckWait == 0 {
			want.AckWait = cfg.AckWait
		}
		if cfg.AckWait == want.AckWait && cfg.MaxDeliver == want.MaxDeliver && cfg.MaxAckPending == want.MaxAckPending {
			return nil
		}
	}
	if err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
		return explain("look up consumer "+want.Durable+" of "+stream, err)
	}
	if want.AckWait == 0 {
		want.AckWait = proto.DefaultAckWait
	}
	if _, err := d.JS.CreateOrUpdateConsumer(ctx, stream, want); err != nil {
		return explain("declare consumer "+want.Durable+" of "+stream, err)
	}
	return nil
}

// stream makes a stream that may take a share (one of that many parts) of the free disk, or mends one that
// differs from what this version wants. The size of a stream that is there stays.
func (d Declarer) stream(ctx context.Context, cfg jetstream.StreamConfig, most int64, share int64) error {
	have, err := d.JS.Stream(ctx, cfg.Name)
	switch {
	case err == nil:
		return d.mend(ctx, have.CachedInfo().Config, cfg)
	case !errors.Is(err, jetstream.ErrStreamNotFound):
		return explain("look up stream "+cfg.Name, err)
	}
	cfg.MaxBytes = d.size(ctx, most, share)
	for {
		_, err = d.JS.CreateStream(ctx, cfg)
		var je jetstream.JetStreamError
		if errors.As(err, &je) && je.APIError() != nil && je.APIError().ErrorCode == errNoStorage && cfg.MaxBytes/2 >= minStream {
			cfg.MaxBytes /= 2
			continue
		}
		break
	}
	if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // someone was faster
		return nil
	}
	if err != nil {
		return explain("declare stream "+cfg.Name, err)
	}
	return nil
}

// mend updates a stream of an older version. One that belongs to another model is never touched.
func (d Declarer) mend(ctx context.Context, have, want jetstream.StreamConfig) error {
	if m := have.Metadata[proto.MetaModel]; want.Metadata[proto.MetaModel] != m && m != "" {
		return fmt.Errorf("stream %s belongs to model %q, not %q: two names with one token; rename one model", have.Name, m, want.Metadata[proto.MetaModel])
	}
	if len(Drift(have, want)) == 0 {
		return nil
	}
	next := have
	next.Discard, next.MaxAge = want.Discard, want.MaxAge
	next.AllowAtomicPublish, next.AllowBatchPublish = want.AllowAtomicPublish, want.AllowBatchPublish
	next.Subjects, next.Metadata = want.Subjects, want.Metadata
	if _, err := d.JS.UpdateStream(ctx, next); err != nil {
		return explain("update stream "+have.Name, err)
	}
	return nil
}

// Drift names the settings in which a stream differs from what this version wants. Size and replicas are the
// operator's.
func Drift(have, want jetstream.StreamConfig) []string {
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
// acknowledged available at once, by making the consumers anew. Only for a broker whose clients are all gone: the requests that someone still works on would
// run twice.
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
