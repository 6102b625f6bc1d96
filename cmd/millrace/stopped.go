package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// nobody says that there is no broker to ask for a job: neither of a run on this machine nor at the usual place.
func (a *app) nobody(ctx context.Context) bool {
	return len(a.endpoints(ctx)) == 0 && !listens(ctx, defaultNATS)
}

// stopped finds a `millrace run` on this machine that is not finished, by its id or the beginning of one, unless a broker
// was named. It may be running.
func (a *app) stopped(what string) (id string, ok bool) {
	if _, named, err := a.nats.access(); named || err != nil {
		return "", false
	}
	k := (&nobody{runs: a.kept(), job: what}).askedFor()
	if k == nil || k.Finished {
		return "", false
	}
	return k.Job, true
}

// stoppedResults writes to w what is there of a run that is stopped.
func (a *app) stoppedResults(id, which string, w io.Writer) error {
	if which == proto.WhichManifest {
		return fmt.Errorf("job %s is not finished; its command goes on with it", id)
	}
	lock, err := broker.LockDir(a.runDir(id)) // it cannot start meanwhile
	if err != nil {
		return err
	}
	defer lock.Unlock()
	return aggregator.Stopped(filepath.Join(a.runDir(id), "aggregate"), id, which, w)
}
