package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"sync"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// keptResults writes to w what the files of a run hold that is finished, or what is there of one that is stopped, until ctx
// ends.
func (a *app) keptResults(ctx context.Context, k *kept, which string, w io.Writer) error {
	out := writerFunc(func(b []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return w.Write(b)
	})
	if k.Finished {
		return finishedResults(k, which, out)
	}
	return a.stoppedResults(k, which, out)
}

// stoppedResults writes to w what is there of a run that is stopped. It keeps the run from starting until the first line
// is written, so not for as long as somebody reads. By then it is known what counts, which lies in a file that is open;
// a run that starts only appends to it, or removes it.
func (a *app) stoppedResults(k *kept, which string, w io.Writer) error {
	lock, err := broker.ShareDir(k.dir)
	if err != nil {
		return err
	}
	unlock := sync.OnceFunc(lock.Unlock)
	defer unlock()
	if m, err := readMemo(k.dir); err == nil && m.Finished { // since it was looked at
		k.memo = m
		return finishedResults(k, which, w)
	}
	if which == proto.WhichManifest {
		return fmt.Errorf("job %s is not finished; its command goes on with it", k.Job)
	}
	first := writerFunc(func(b []byte) (int, error) {
		unlock()
		return w.Write(b)
	})
	return aggregator.Stopped(filepath.Join(k.dir, "aggregate"), k.Job, which, first)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
