package proto

import (
	"crypto/sha256"
	"encoding/hex"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Lane is a priority of requests.
type Lane string

// Lanes in the order in which a worker pulls from them.
const (
	LaneHigh   Lane = "high"
	LaneNormal Lane = "normal"
	LaneLow    Lane = "low"
)

// Lanes lists all lanes, the most urgent first.
func Lanes() []Lane { return []Lane{LaneHigh, LaneNormal, LaneLow} }

// Names of streams and buckets.
const (
	ResultStream  = "RES"
	JobsBucket    = "JOBS"
	WorkersBucket = "WORKERS"
	InputsBucket  = "INPUTS" // object store of detached inputs
	requestPrefix = "REQ_"
)

// Metadata of the streams, consumers and buckets that millrace declares.
const (
	MetaModel   = "millrace.model"    // true name of the model whose requests the stream holds
	MetaAckWait = "millrace.ack_wait" // of JOBS: the AckWait of queues for which nobody asks for another
	MetaSchema  = "millrace.schema"   // version of the configurations below
	// Schema counts up with any change of them, and no version undoes what one with a higher number declared.
	Schema = "2"
)

const (
	// MaxPayload is the largest message in bytes that the embedded broker takes. Above 8 MB nats-server warns,
	// and its file store refuses records over 32 MiB.
	MaxPayload = 8 << 20
	// PullBytes limits one pull, in bytes. It must exceed MaxPayload, or a consumer with such a message stalls.
	PullBytes = 16 << 20
	// DefaultAckWait is how long a request may go without a heartbeat before it is given to another worker.
	DefaultAckWait = 60 * time.Second
	// WorkerTTL is how long a worker's heartbeat counts.
	WorkerTTL = 15 * time.Second
	// WorkerSilent is after how long without one, on the broker's clock, a worker may be gone: it writes one every 2 s.
	WorkerSilent = 8 * time.Second
)

// ModelToken turns a model's name into a token for subjects, stream names and file names: a slug, always
// followed by 8 hex digits of the SHA-256 of the name, so that two names never meet on any file system.
func ModelToken(model string) string {
	sum := sha256.Sum256([]byte(model))
	return Slug(model, 40) + "-" + hex.EncodeToString(sum[:4])
}

// Slug keeps lower-case letters, digits and single dashes of s, at most n of them; it is never empty.
func Slug(s string, n int) string {
	var b strings.Builder
	dash := false
	for _, r := range strings.ToLower(s) {
		if b.Len() >= n {
			break
		}
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			if dash && b.Len() > 0 {
				b.WriteByte('-')
			}
			b.WriteRune(r)
			dash = false
			continue
		}
		dash = true
	}
	if b.Len() == 0 {
		return "x"
	}
	return b.String()
}

// RunID is the id of the nth run of a job, the first of which has the id base.
func RunID(base string, n int64) string {
	if n == 1 {
		return base
	}
	return base + "-r" + strconv.FormatInt(n, 10)
}

// RequestStream is the name of the stream that holds the requests for a model.
func RequestStream(model string) string { return requestPrefix + ModelToken(model) }

// IsRequestStream says whether a stream of that name holds requests.
func IsRequestStream(name string) bool { return strings.HasPrefix(name, requestPrefix) }

// RequestSubject is where the requests of a job for a model go.
func RequestSubject(model string, lane Lane, job string) string {
	return "req." + ModelToken(model) + "." + string(lane) + "." + job
}

// RequestFilter matches the requests of a job in all lanes.
func RequestFilter(model, job string) string { return "req." + ModelToken(model) + ".*." + job }

// ResultSubject is where the results of a job go.
func ResultSubject(job string) string { return "res." + job }

// JobOfSubject returns the job in a subject of requests or results: its last token.
func JobOfSubject(subject string) string { return subject[strings.LastIndexByte(subject, '.')+1:] }

// RequestStreamConfig is the work queue of a model. maxBytes is reserved on the broker's disk.
// DiscardNew: at its limit the stream refuses, it never drops what nobody has run. MaxAge 0 for the same reason.
func RequestStreamConfig(model string, maxBytes int64) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:               RequestStream(model),
		Subjects:           []string{"req." + ModelToken(model) + ".>"},
		Retention:          jetstream.WorkQueuePolicy,
		Storage:            jetstream.FileStorage,
		Discard:            jetstream.DiscardNew,
		MaxBytes:           maxBytes,
		Replicas:           1,
		AllowAtomicPublish: true,
		AllowBatchPublish:  true,
		AllowDirect:        true,
		Metadata:           map[string]string{MetaModel: model, MetaSchema: Schema},
	}
}

// ConsumerConfig is the one durable consumer of a (model, lane).
// MaxDeliver -1: with any other value a line is parked for ever after that many give-backs.
func ConsumerConfig(model string, lane Lane, ackWait time.Duration) jetstream.ConsumerConfig {
	return jetstream.ConsumerConfig{
		Durable:       string(lane),
		FilterSubject: "req." + ModelToken(model) + "." + string(lane) + ".>",
		AckPolicy:     jetstream.AckExplicitPolicy,
		AckWait:       ackWait,
		MaxDeliver:    -1,
		MaxAckPending: -1,
		MaxWaiting:    4096,
		Metadata:      schema(),
	}
}

// ResultStreamConfig is the log of results.
func ResultStreamConfig(maxBytes int64) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:               ResultStream,
		Subjects:           []string{"res.>"},
		Retention:          jetstream.LimitsPolicy,
		Storage:            jetstream.FileStorage,
		Discard:            jetstream.DiscardNew,
		MaxBytes:           maxBytes,
		Replicas:           1,
		AllowAtomicPublish: true,
		AllowBatchPublish:  true,
		Metadata:           schema(),
	}
}

// JobsConfig is the bucket of what is known of jobs.
func JobsConfig() jetstream.KeyValueConfig {
	return jetstream.KeyValueConfig{Bucket: JobsBucket, History: 1, Storage: jetstream.FileStorage, Metadata: schema()}
}

// WorkersConfig is the bucket of heartbeats; a key that is not renewed goes away.
func WorkersConfig() jetstream.KeyValueConfig {
	return jetstream.KeyValueConfig{Bucket: WorkersBucket, History: 1, TTL: WorkerTTL, Storage: jetstream.MemoryStorage, Metadata: schema()}
}

// InputsConfig is the object store of detached inputs.
func InputsConfig() jetstream.ObjectStoreConfig {
	return jetstream.ObjectStoreConfig{Bucket: InputsBucket, Storage: jetstream.FileStorage, Metadata: schema()}
}

func schema() map[string]string { return map[string]string{MetaSchema: Schema} }
