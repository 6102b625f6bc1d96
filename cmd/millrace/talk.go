package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"

	"millrace/broker"
	"millrace/proto"
)

// talk shows a job's progress on the error stream: a bar on a terminal, one plain line every 10 s elsewhere. Why
// nothing moves is said when it changes.
type talk struct {
	a     *app
	job   proto.Job
	self  string // id of the job's owner in this process; empty: it only watches
	bars  *mpb.Progress
	bar   *mpb.Bar
	view  broker.JobView
	note  string
	noted time.Time // when the note came
	stood int64     // lines that had ended then
	moved time.Time // when another one had ended
	said  time.Time
	ended int64 // lines, when that was
	start time.Time
	fed   bool // it had an owner while we looked
	pace  pace
	told  atomic.Value // rates; the bar reads them by itself
}

// sayEvery is how often a line tells how far a job is; standing that of one of which nothing new is to be told.
const (
	sayEvery = 10 * time.Second
	standing = time.Minute
)

func (a *app) newTalk(job proto.Job) *talk {
	t := &talk{a: a, job: job, start: time.Now(), said: time.Now()}
	t.told.Store(rates{})
	if terminal(a.std.err) {
		t.bars = newBars(a.std.err)
		t.bar = t.bars.AddBar(job.Lines, mpb.BarWidth(40),
			mpb.PrependDecorators(decor.Any(t.name)),
			mpb.AppendDecorators(decor.Any(counters), decor.Any(func(s decor.Statistics) string { return t.told.Load().(rates).fit(s.AvailableWidth) })))
	}
	return t
}

// name is the job's id, cut where the rates would have no room beside it.
func (t *talk) name(s decor.Statistics) string {
	room := s.AvailableWidth - len(counters(s)) - len(t.told.Load().(rates).least()) - leastBar
	return proto.Truncate(t.job.ID, max(room, 8))
}

func counters(s decor.Statistics) string {
	return fmt.Sprintf("%d/%d %.0f %%", s.Current, s.Total, 100*float64(s.Current)/float64(max(s.Total, 1)))
}

// newBars draws on a terminal. One that does not know its size, as under script and in some CI, would have room for nothing;
// it is taken for one of 80 columns.
func newBars(w io.Writer) *mpb.Progress {
	if f, ok := w.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && (size.Col == 0 || size.Row == 0) {
			w = struct{ io.Writer }{f} // whose size nobody asks
		}
	}
	return mpb.New(mpb.WithOutput(w), mpb.ForceTTY(), mpb.WithWidth(80), mpb.WithAutoRefresh())
}

// see takes the newest view of the job.
func (t *talk) see(v broker.JobView) {
	now, ended := time.Now(), v.Ended()
	if ended != t.view.Ended() {
		t.moved = now
	}
	t.view = v
	if n, unsure := note(&v), t.unsure(&v); n != t.note && !unsure {
		t.note, t.noted, t.stood = n, now, ended
		switch {
		case n != "":
			t.line(n)
		case v.State() == broker.StateRunning:
			t.line("it goes on")
		}
	}
	stands := t.note != "" && (ended == t.stood || now.Sub(t.moved) >= paceLately)
	t.pace.Add(now, &v.Progress, stands)
	var told rates
	if !stands {
		told = t.pace.say(now, t.job.Lines-ended)
	}
	speed := told.String()
	if v.Progress.Failed > 0 {
		told.failed = fmt.Sprintf(", %d failed", v.Progress.Failed)
	}
	t.told.Store(told)
	if t.bar != nil {
		t.bar.SetCurrent(min(ended, t.job.Lines))
		return
	}
	t.progress(now, speed, stands)
}

// progress prints how far the job is, when it is time to. Why it stands was said when that came.
func (t *talk) progress(now time.Time, speed string, stands bool) {
	ended, p := t.view.Ended(), &t.view.Progress
	if now.Sub(t.said) < sayEvery || stands && ended == t.ended && min(now.Sub(t.said), now.Sub(t.noted)) < standing {
		return
	}
	why := ""
	if ended == t.ended && t.note != "" { // it stands for long
		why = "; " + t.note
	}
	t.said, t.ended = now, ended
	cut := ""
	if n := p.ContextCut(); n > 0 {
		cut = fmt.Sprintf(", %d cut at the context", n)
	}
	fmt.Fprintf(t.a.std.err, "%s: %d of %s, %d failed%s%s%s\n", t.job.ID, ended, count(t.job.Lines, "line"), p.Failed, cut, speed, why)
}

// unsure says whether nobody seems to feed the job, or it seems to be halted, because its owner, this process most often, is
// about to feed it; or because the owner in this process, where the broker was away, is about to renew its lease.
func (t *talk) unsure(v *broker.JobView) bool {
	if v.State() == broker.StateHalted && v.Feed.Owner.ID == "" && t.self != "" && !t.fed {
		return true
	}
	orphaned := v.State() == broker.StateOrphaned || v.State() == broker.StateWaiting
	t.fed = t.fed || !orphaned
	if orphaned && t.self != "" && v.Feed.Owner.ID == t.self {
		return true
	}
	return orphaned && !t.fed && time.Since(t.start) < broker.DefaultLeaseTTL
}

func (t *talk) line(s string) {
	if t.bars != nil {
		fmt.Fprintf(t.bars, "%s: %s\n", t.job.ID, s)
		return
	}
	fmt.Fprintf(t.a.std.err, "%s: %s\n", t.job.ID, s)
}

func (t *talk) close() {
	if t.bars == nil {
		return
	}
	if !t.bar.Completed() {
		t.bar.Abort(false)
	}
	t.bars.Wait()
}

// watch shows the job until until says so, or ctx ends.
func (a *app) watch(ctx context.Context, conn *broker.Conn, job proto.Job, until func(*broker.JobView) bool) (broker.JobView, error) {
	return a.newTalk(job).watch(ctx, conn, until)
}

func (t *talk) watch(ctx context.Context, conn *broker.Conn, until func(*broker.JobView) bool) (broker.JobView, error) {
	defer t.close()
	err := broker.Follow(ctx, conn.JS, t.job.ID, 250*time.Millisecond, func(v broker.JobView) bool {
		t.see(v)
		return !until(&v)
	})
	return t.view, err
}
