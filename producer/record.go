package producer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// saveEvery is how often the cursor is written while lines flow. What was sent after the last time is sent again by
// the next owner if this one dies.
const saveEvery = 250 * time.Millisecond

// noteKind is a reason why nothing moves, or not as it should; they are shown in this order.
type noteKind int

const (
	noteEnd  noteKind = iota
	noteAway          // not in the record: whoever reads it there has a broker
	noteBroker
	noteAggregator
	noteGone
	noteWorkers
	noteFull
	noteKinds
)

// record renders what is written under the lease.
func (r *run) record(owner proto.Owner) ([]byte, error) {
	f := r.snapshot(noteAway)
	f.Owner = owner
	return f.Encode()
}

// snapshot is how far the job is now, without notes of those kinds.
func (r *run) snapshot(without ...noteKind) proto.Feed {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.feed
	f.Models = nil
	f.Enqueued = 0
	for i, q := range r.queues {
		f.Models = append(f.Models, proto.ModelLines{Model: q.model, Lines: r.first[i]})
		f.Enqueued += r.first[i]
	}
	var notes []string
	away := r.notes[noteAway] != "" && !slices.Contains(without, noteAway) // nothing is known of the others then
	for k := range noteKinds {
		if away && (k == noteAggregator || k == noteGone || k == noteWorkers) {
			continue
		}
		if s := r.notes[k]; s != "" && !slices.Contains(without, k) {
			notes = append(notes, s)
		}
	}
	f.Note = strings.Join(notes, "; ")
	return f
}

// report tells whoever drives the owner.
func (r *run) report() {
	if r.o.Report == nil {
		return
	}
	r.reporting.Lock()
	defer r.reporting.Unlock()
	f := r.snapshot()
	f.Owner = r.lease.Self
	r.o.Report(f)
}

// note sets or clears one reason why nothing moves.
func (r *run) note(k noteKind, text string) {
	r.mu.Lock()
	same := r.notes[k] == text
	r.notes[k] = text
	r.mu.Unlock()
	if !same {
		r.report()
	}
}

// unnote clears all reasons; nobody sees to them any more.
func (r *run) unnote() {
	r.mu.Lock()
	clear(r.notes)
	r.mu.Unlock()
}

// state says what the owner does now, in the job's record too.
func (r *run) state(s string) {
	r.mu.Lock()
	same := r.feed.State == s
	r.feed.State = s
	r.mu.Unlock()
	if !same {
		r.report()
	}
}

// count adds to the lines that were sent again, or ended.
func (r *run) count(resent, ended int64) {
	r.mu.Lock()
	r.feed.Resent += resent
	r.feed.Ended += ended
	r.mu.Unlock()
}

// advance notes that queue i got everything up to position to of its order, and returns how many of the positions
// it sent were sent for the first time.
func (r *run) advance(i int, sent []int64, to int64) int64 {
	r.mu.Lock()
	at, _ := slices.BinarySearch(sent, r.first[i])
	r.first[i] = max(r.first[i], to)
	again := int64(at)
	r.feed.Resent += again
	r.mu.Unlock()
	return int64(len(sent)) - again
}

// save writes the cursor, if it is time or it must be. It returns an error only when the lease is lost.
func (r *run) save(ctx context.Context, must bool) error {
	r.mu.Lock()
	due := must || time.Since(r.saved) >= saveEvery
	if due {
		r.saved = time.Now()
	}
	r.mu.Unlock()
	if !due {
		return nil
	}
	r.report()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := r.lease.Renew(ctx)
	if errors.Is(err, broker.ErrLeaseLost) {
		return err
	}
	if err == nil {
		broker.CrashPoint("producer.cursor-written")
	}
	return nil // else Keep sees it too, and says so
}

// watchEvery is how often control and progress are read, and keyEvery how often the job's own key is looked for.
// Reading again and again is cheap, and unlike a subscription it survives a broker that came back empty.
const (
	watchEvery = 250 * time.Millisecond
	keyEvery   = 8 * watchEvery
	haltEvery  = watchEvery / 5 // where a job is likely to be halted soon
)

// pace is how soon control and progress are read again: soon after lines failed, if as many more would halt the job.
type pace struct {
	failed int64
	soon   int // looks that are due after haltEvery
}

// quick is how many looks follow soon: for longer than the aggregator takes to tell of more lines that failed.
const quick = 4

// next is told how many lines have failed, and whether as many more would halt the job.
func (p *pace) next(failed int64, near bool) time.Duration {
	switch moved := failed != p.failed; {
	case !near:
		p.soon = 0
	case moved:
		p.soon = quick
	}
	p.failed = failed
	if p.soon == 0 {
		return watchEvery
	}
	p.soon--
	return haltEvery
}

// nearHalt is how many lines have failed, and whether as many more would halt the job.
func (r *run) nearHalt() (failed int64, near bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	failed, ended := r.failures(r.progress)
	return failed, r.want < wantHalt && r.limit.reached(2*failed, ended)
}

// watch turns what is wanted, and what became of the job so far, into demands. Its error is ErrRemoved.
func (r *run) watch(ctx context.Context) error {
	var p pace
	p.failed, _ = r.nearHalt()
	for since := time.Duration(0); ; {
		every := p.next(r.nearHalt())
		if sleep(ctx, every) != nil {
			return nil
		}
		err := r.read(ctx)
		if since += every; err == nil && since >= keyEvery {
			since = 0
			err = errors.Join(r.uphold(ctx), r.date(ctx))
		}
		if err == nil || ctx.Err() != nil {
			continue
		}
		r.log.Debug("read the job's keys", "error", err)
		if err := r.restore(ctx); errors.Is(err, ErrRemoved) {
			return err
		} else if err != nil {
			r.log.Debug("restore the job's keys", "error", err)
		}
	}
}

// uphold looks whether the job's key is there. Its error is ErrRemoved where a later job goes by the same id, which the
// later one's After tells. A spec without says nothing: another process may have put it where the broker lost its disk.
func (r *run) uphold(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	now, _, err := getJob(ctx, r.kv, r.job.ID)
	if err == nil && now.After != 0 && now.After != r.job.After {
		return ErrRemoved
	}
	return err
}

// restore puts what a broker that came back with an empty disk does not have.
func (r *run) restore(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := r.base(ctx); err != nil {
		return err
	}
	return r.date(ctx)
}

// date says anew when the job began, on the clock of the broker that is there now: it may have taken the place of another
// one, whose clock says nothing on it. What has passed since then our own clock knows.
func (r *run) date(ctx context.Context) error {
	now, err := broker.Now(ctx, r.o.Conn.JS)
	if err != nil || now.IsZero() {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.feed.Since = now.Add(-time.Since(r.began)).UnixNano()
	return nil
}

// look is the first reading, which is waited for.
func (r *run) look(ctx context.Context) error {
	if err := r.retry(ctx, "read the job's keys", r.read); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.before == proto.FeedHalted { // it may fail as often again
		r.feed.BasisFailed, r.feed.BasisEnded = r.counted(r.progress)
		if r.want == wantHalt {
			r.want = wantRun
		}
	}
	return nil
}

// read reads control and progress.
func (r *run) read(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var c proto.Control
	said, err := r.get(ctx, proto.ControlKey(r.job.ID), c.Decode)
	if err != nil {
		return err
	}
	var p proto.Progress
	if _, err := r.get(ctx, proto.ProgressKey(r.job.ID), p.Decode); err != nil {
		return err
	}
	r.mu.Lock()
	r.progress = p
	anew := r.said != said
	r.said = said
	r.mu.Unlock()
	r.demand(r.judge(c, p), anew) // a user's word may have been a pause that is over
	return nil
}

// get reads a key, where it is there, and returns its revision.
func (r *run) get(ctx context.Context, key string, decode func([]byte) error) (revision int64, err error) {
	e, err := r.kv.Get(ctx, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return 0, nil
	}
	if err == nil {
		err = decode(e.Value())
	}
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", key, err)
	}
	return int64(e.Revision()), nil
}

// judge is what is demanded now. A job is done when its files are final, not when its lines have ended: until then the
// aggregator may lose what it folded, and the input is still needed. Its record says so, again after each reconnect.
func (r *run) judge(c proto.Control, p proto.Progress) demand {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case p.State == proto.FoldDone:
		return wantDone
	case c.Want == proto.WantCancel:
		return wantCancel
	case r.ending, r.job.LifetimeMS > 0 && time.Since(r.began) >= time.Duration(r.job.LifetimeMS)*time.Millisecond:
		return wantExpire
	case r.limit.reached(r.failures(p)):
		return wantHalt
	case c.Want == proto.WantPause:
		return wantPause
	}
	return wantRun
}

// failures counts what speaks for halting: not what was so before a halted job was started again.
func (r *run) failures(p proto.Progress) (failed, ended int64) {
	failed, ended = r.counted(p)
	return max(failed-r.feed.BasisFailed, 0), max(ended-r.feed.BasisEnded, 0)
}

// counted counts the lines that ended, without those that were known to be invalid, and those that workers broke off as the
// job was ended.
func (r *run) counted(p proto.Progress) (failed, ended int64) {
	failed = p.Failed - min(r.job.Invalid, p.Failed)
	failed -= min(p.EndedWithJob(), failed)
	return failed, p.OK + failed
}

// worst describes the most frequent error.
func (r *run) worst() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := proto.Count(r.progress.Failed, "line") + " failed"
	if n := r.feed.BasisFailed; n > 0 {
		s += fmt.Sprintf(" (%d of them before it was started again, which do not count)", n)
	}
	if len(r.progress.Errors) == 0 {
		return s
	}
	e := &r.progress.Errors[0]
	s += fmt.Sprintf(", %d of them with %s", e.Count, e.Code)
	if e.Status != 0 {
		s += fmt.Sprintf(" (HTTP %d)", e.Status)
	}
	if eg := proto.Truncate(e.Example(), 240); eg != "" {
		s += ", such as " + eg
	}
	return s
}
