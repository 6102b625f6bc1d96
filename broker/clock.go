package broker

import (
	"context"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/proto"
)

// Now is the time on the clock of the broker: what the timestamps of its messages are compared with. A broker that
// does not tell its time (before 2.10) says the zero time.
func Now(ctx context.Context, js jetstream.JetStream) (time.Time, error) {
	return nowBy(ctx, js, proto.JobsBucket)
}

// nowBy has the broker tell its time by a bucket.
func nowBy(ctx context.Context, js jetstream.JetStream, bucket string) (time.Time, error) {
	s, err := js.Stream(ctx, bucketStream(bucket))
	if err != nil {
		return time.Time{}, explain("ask the broker for its time", err)
	}
	return s.CachedInfo().TimeStamp, nil
}
