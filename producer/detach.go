package producer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/klauspost/compress/zstd"
	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// detachTries is how often the copying is begun anew.
const detachTries = 5

// Detach copies the input to the broker's object store, compressed, and then says so in the job: from then on whoever
// adopts jobs feeds it, and the input here is not needed any more.
func Detach(ctx context.Context, conn *broker.Conn, d *Dataset, job proto.Job) error {
	_ = sweepUploads(ctx, conn, uploadIdle) // adopters do that too
	_, err := backoff.Retry(ctx, func() (struct{}, error) {
		err := detach(ctx, conn, d, job)
		if errors.Is(err, ErrChanged) || errors.Is(err, ErrRemoved) {
			err = backoff.Permanent(err)
		}
		return struct{}{}, err
	}, backoff.WithMaxTries(detachTries))
	if err != nil {
		return fmt.Errorf("leave the input with the broker: %w", err)
	}
	d.ended()
	return nil
}

func detach(ctx context.Context, conn *broker.Conn, d *Dataset, job proto.Job) error {
	kv, err := jobs(ctx, conn)
	if err != nil {
		return err
	}
	if err := putJob(ctx, kv, job); err != nil {
		if errors.Is(err, ErrRemoved) { // while its input was copied, it may be
			err = errors.Join(err, dropObject(ctx, conn, job.ID))
		}
		return err
	}
	have, rev, err := getJob(ctx, kv, job.ID)
	if err != nil {
		return err
	}
	store, err := conn.JS.ObjectStore(ctx, proto.InputsBucket)
	if err != nil {
		return fmt.Errorf("open object store: %w", err)
	}
	if have.Object != "" {
		if _, err := store.GetInfo(ctx, have.Object); err == nil {
			return nil
		}
	}
	if err := upload(ctx, conn, d, job.ID); err != nil {
		return err
	}
	have.Object = job.ID
	return updateJob(ctx, kv, have, rev)
}

// dropObject removes the copy of an input, where there is one.
func dropObject(ctx context.Context, conn *broker.Conn, name string) error {
	store, err := conn.JS.ObjectStore(ctx, proto.InputsBucket)
	if err == nil {
		_, err = store.GetInfo(ctx, name) // deleting what is deleted would write a new marker
	}
	if err == nil {
		err = store.Delete(ctx, name)
	}
	if err != nil && !errors.Is(err, jetstream.ErrObjectNotFound) {
		return fmt.Errorf("remove the input's copy: %w", err)
	}
	return nil
}

// pack writes the plain input, compressed, and checks that it is what was scanned.
func (d *Dataset) pack(w io.Writer) error {
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return fmt.Errorf("compress the input: %w", err)
	}
	sum := sha256.New()
	n, err := io.CopyBuffer(z, io.TeeReader(io.NewSectionReader(d.src.file, 0, d.Bytes), sum), make([]byte, 1<<18))
	if err == nil && (n != d.Bytes || hex.EncodeToString(sum.Sum(nil)) != d.SHA256) {
		err = ErrChanged
	}
	if cerr := z.Close(); err == nil {
		err = cerr
	}
	return err
}

// stall is how long a download may stand still.
const stall = time.Minute

// download writes the plain input of a job to a file, which has its name when it is whole.
func download(ctx context.Context, conn *broker.Conn, object, name string) (err error) {
	f, err := tempInput(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			_ = os.Remove(f.Name()) // else sweep does
		}
	}()
	r, err := openObject(ctx, conn, object)
	if err != nil {
		return err
	}
	defer r.Close()
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(zstdMemory))
	if err != nil {
		return fmt.Errorf("unpack the input: %w", err)
	}
	defer z.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{f}, z, make([]byte, 1<<18)); err != nil {
		return fmt.Errorf("fetch the input: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("lay down the input: %w", err)
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return fmt.Errorf("lay down the input: %w", err)
	}
	return broker.SyncDir(filepath.Dir(name))
}

// object reads an object chunk by chunk. The library's own reader cannot be interrupted while nothing comes.
type object struct {
	ctx  context.Context
	msgs jetstream.MessagesContext
	rest []byte
	left uint32 // chunks
}

func openObject(ctx context.Context, conn *broker.Conn, name string) (*object, error) {
	store, err := conn.JS.ObjectStore(ctx, proto.InputsBucket)
	if err != nil {
		return nil, fmt.Errorf("open object store: %w", err)
	}
	info, err := store.GetInfo(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("look up the input's copy: %w", err)
	}
	c, err := conn.JS.OrderedConsumer(ctx, inputsStream, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{chunksOf + info.NUID}})
	if err != nil {
		return nil, fmt.Errorf("read the input's copy: %w", err)
	}
	msgs, err := c.Messages()
	if err != nil {
		return nil, fmt.Errorf("read the input's copy: %w", err)
	}
	return &object{ctx: ctx, msgs: msgs, left: info.Chunks}, nil
}

func (o *object) Read(p []byte) (int, error) {
	if len(o.rest) == 0 {
		if o.left == 0 {
			return 0, io.EOF
		}
		ctx, cancel := context.WithTimeout(o.ctx, stall)
		defer cancel()
		m, err := o.msgs.Next(jetstream.NextContext(ctx))
		if err != nil {
			return 0, fmt.Errorf("read the input's copy: %w", err)
		}
		o.rest, o.left = m.Data(), o.left-1
	}
	n := copy(p, o.rest)
	o.rest = o.rest[n:]
	return n, nil
}

func (o *object) Close() { o.msgs.Stop() }
