package producer

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"

	"millrace/broker"
	"millrace/proto"
)

// Objects lie in their stream as NATS lays them (ADR-20): chunks under a subject of their own, and a record of what the
// object is under another. They are written here and not by the library, which cannot clean up after an upload that is
// interrupted.
const (
	inputsStream = "OBJ_" + proto.InputsBucket
	chunksOf     = "$O." + proto.InputsBucket + ".C."
	metaOf       = "$O." + proto.InputsBucket + ".M."
)

// Bytes of a chunk, and chunks that are under way before the broker is waited for.
const (
	chunkBytes = 128 << 10
	chunkBatch = 8
)

func metaSubject(name string) string {
	return metaOf + base64.URLEncoding.EncodeToString([]byte(name))
}

// upload copies the plain input to the object of that name, and replaces what was there. An upload that fails leaves
// nothing behind, unless the broker cannot be reached: then sweepUploads does the rest.
func upload(ctx context.Context, conn *broker.Conn, d *Dataset, name string) error {
	s, err := conn.JS.Stream(ctx, inputsStream)
	if err != nil {
		return fmt.Errorf("open object store: %w", err)
	}
	before, err := readMeta(ctx, s, metaSubject(name))
	if err != nil {
		return err
	}
	u := newUploader(ctx, conn, name)
	if err = d.pack(u); err == nil {
		err = u.flush()
	}
	if err == nil {
		err = u.check(s)
	}
	if err != nil {
		u.abandon(s)
		return fmt.Errorf("copy the input: %w", err)
	}
	if err := u.commit(); err != nil { // it may be there all the same: what no object names is swept away
		return fmt.Errorf("copy the input: %w", err)
	}
	if before.NUID != "" {
		_ = s.Purge(ctx, jetstream.WithPurgeSubject(chunksOf+before.NUID)) // else sweepUploads does
	}
	return nil
}

// readMeta reads what an object is; the zero value: there is none.
func readMeta(ctx context.Context, s jetstream.Stream, subject string) (info jetstream.ObjectInfo, err error) {
	m, err := s.GetLastMsgForSubject(ctx, subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return info, nil
	}
	if err == nil {
		err = json.Unmarshal(m.Data, &info)
	}
	if err != nil {
		return info, fmt.Errorf("look up the input's copy: %w", err)
	}
	return info, nil
}

// uploader stores what is written to it as the chunks of an object.
type uploader struct {
	ctx     context.Context
	pub     publisher
	subject string // of the chunks
	info    jetstream.ObjectInfo
	sum     hash.Hash
	msgs    [][]byte // the last one may not be full
}

func newUploader(ctx context.Context, conn *broker.Conn, name string) *uploader {
	id := nuid.Next()
	meta := jetstream.ObjectMeta{Name: name, Description: "input of job " + name + ", zstd", Opts: &jetstream.ObjectMetaOptions{ChunkSize: chunkBytes}}
	return &uploader{ctx: ctx, pub: publisher{conn: conn}, subject: chunksOf + id, sum: sha256.New(),
		info: jetstream.ObjectInfo{ObjectMeta: meta, Bucket: proto.InputsBucket, NUID: id}}
}

func (u *uploader) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		if k := len(u.msgs); k == 0 || len(u.msgs[k-1]) == chunkBytes {
			if k == chunkBatch {
				if err := u.flush(); err != nil {
					return 0, err
				}
			}
			u.msgs = append(u.msgs, make([]byte, 0, chunkBytes))
		}
		last := &u.msgs[len(u.msgs)-1]
		part := p[:min(len(p), chunkBytes-len(*last))]
		*last, p = append(*last, part...), p[len(part):]
	}
	return n, nil
}

// flush stores the chunks that are there. It does not try again: a chunk that is there twice would spoil the object.
func (u *uploader) flush() error {
	if u.ctx.Err() != nil {
		return context.Cause(u.ctx)
	}
	if len(u.msgs) == 0 {
		return nil
	}
	if _, err := u.pub.send(u.ctx, u.subject, u.msgs); err != nil {
		return err
	}
	for _, m := range u.msgs {
		u.sum.Write(m)
		u.info.Size += uint64(len(m))
		u.info.Chunks++
	}
	u.msgs = nil
	return nil
}

// check looks whether all chunks are still there: those of an upload that stood still for long were swept away.
func (u *uploader) check(s jetstream.Stream) error {
	i, err := s.Info(u.ctx, jetstream.WithSubjectFilter(u.subject))
	if err != nil {
		return err
	}
	if n := i.State.Subjects[u.subject]; n != uint64(u.info.Chunks) {
		return fmt.Errorf("the broker holds %d of %d chunks", n, u.info.Chunks)
	}
	return nil
}

// commit makes the object of the chunks.
func (u *uploader) commit() error {
	u.info.Digest = jetstream.GetObjectDigestValue(u.sum)
	b, err := json.Marshal(&u.info)
	if err != nil {
		return err
	}
	m := &nats.Msg{Subject: metaSubject(u.info.Name), Data: b, Header: nats.Header{}}
	m.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	_, err = u.pub.conn.JS.PublishMsg(u.ctx, m)
	return err
}

// abandon removes the chunks, also where the caller's time is over.
func (u *uploader) abandon(s jetstream.Stream) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(u.ctx), callTimeout)
	defer cancel()
	select {
	case <-u.pub.conn.JS.PublishAsyncComplete(): // what is under way would be stored after the purge
	case <-ctx.Done():
	}
	_ = s.Purge(ctx, jetstream.WithPurgeSubject(u.subject)) // else sweepUploads does
}

// uploadIdle is how long an upload may stand still before its chunks are swept away.
const uploadIdle = 15 * time.Minute

// sweepUploads removes the chunks of uploads that were cut short: those that no object names, and none of which is
// younger than idle on the broker's clock.
func sweepUploads(ctx context.Context, conn *broker.Conn, idle time.Duration) error {
	s, err := conn.JS.Stream(ctx, inputsStream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	}
	var info *jetstream.StreamInfo
	if err == nil {
		info, err = s.Info(ctx, jetstream.WithSubjectFilter("$O."+proto.InputsBucket+".>"))
	}
	if err != nil {
		return fmt.Errorf("look at the object store: %w", err)
	}
	named := map[string]bool{}
	for subject := range info.State.Subjects {
		if strings.HasPrefix(subject, metaOf) {
			o, err := readMeta(ctx, s, subject)
			if err != nil {
				return err
			}
			named[chunksOf+o.NUID] = !o.Deleted
		}
	}
	for subject := range info.State.Subjects {
		if !strings.HasPrefix(subject, chunksOf) || named[subject] {
			continue
		}
		m, err := s.GetLastMsgForSubject(ctx, subject)
		if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && info.TimeStamp.Sub(m.Time) < idle {
			continue
		}
		if err == nil {
			err = s.Purge(ctx, jetstream.WithPurgeSubject(subject))
		}
		if err != nil {
			return fmt.Errorf("sweep the object store: %w", err)
		}
	}
	return nil
}
