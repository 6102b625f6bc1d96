package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"time"

	"github.com/nats-io/nats.go"

	"millrace/broker"
)

// busyError is the error of a command for a run that a process has whose broker does not answer yet, or any more. It is
// broker.ErrUnreachable.
type busyError struct{ job string }

func (e *busyError) Error() string {
	return fmt.Sprintf("a process of this machine has job %s, and is starting or about to end; try again in a moment", e.job)
}

func (e *busyError) Unwrap() error { return broker.ErrUnreachable }

// left is the error of a command for a run that is kept and whose broker is not there.
func left(k *kept) error {
	if k.Finished {
		return &over{k}
	}
	lock, err := broker.ShareDir(k.dir)
	if errors.Is(err, broker.ErrInUse) {
		return &busyError{k.Job}
	}
	if err == nil {
		lock.Unlock()
	}
	return &over{k}
}

// lost is err, or where it came because a run has ended, and its broker with it, or has no aggregator yet or any more,
// that.
func lost(conn *broker.Conn, job string, err error) error {
	if err != nil && conn.Ends && (conn.Closed() != nil || errors.Is(err, nats.ErrNoResponders)) {
		return &busyError{job}
	}
	return err
}

// settle calls do, and calls it again for some 10 s as long as a run that it is for is starting or about to end.
func settle(ctx context.Context, do func() error) error {
	for n := 1; ; n++ {
		err := do()
		var busy *busyError
		if !errors.As(err, &busy) || n == 100 {
			return err
		}
		select {
		case <-ctx.Done():
			if s := (signalled{}); errors.As(context.Cause(ctx), &s) {
				return s
			}
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// fresh passes on lines. Once it remembers them, it passes on each but once.
type fresh struct {
	w        io.Writer
	remember bool
	seen     map[uint64]struct{} // their hashes; nil as long as none is remembered
	seed     maphash.Seed
	part     []byte // of a line whose end has not come yet
}

func (f *fresh) Write(b []byte) (int, error) {
	if f.seen == nil && !f.remember {
		return f.w.Write(b)
	}
	if f.seen == nil {
		f.seen, f.seed = map[uint64]struct{}{}, maphash.MakeSeed()
	}
	f.part = append(f.part, b...)
	var pass []byte
	for end := bytes.IndexByte(f.part, '\n'); end >= 0; end = bytes.IndexByte(f.part, '\n') {
		line := f.part[:end+1]
		f.part = f.part[end+1:]
		h := maphash.Bytes(f.seed, line)
		if _, dup := f.seen[h]; !dup {
			f.seen[h] = struct{}{}
			pass = append(pass, line...)
		}
	}
	if _, err := f.w.Write(pass); err != nil {
		return 0, err
	}
	return len(b), nil
}
