package producer

import (
	"context"
	"fmt"
	"slices"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// gone are the workers that fell silent with lines in hand, by id. What one of them held is handed out again once AckWait
// is over; one that leaves in order gives it back, and takes its heartbeat away, before it is silent for long.
type gone map[string]*goneWorker

type goneWorker struct {
	proto.Worker               // as it was last heard
	since        time.Time     // when that was, on the clock here
	sure         bool          // it was seen to be silent twice: once may be a broker that was away itself
	wait         time.Duration // AckWait of its queues, the longest
	said         bool          // that it is gone
	over         bool          // what it had was seen to be with others: it is not said anew
}

// beatLag is how much longer a worker may have lived than its last heartbeat tells, until the next one was due.
const beatLag = 2 * time.Second

// again is when what the worker had is handed out again, at the latest.
func (w *goneWorker) again() time.Time { return w.since.Add(w.wait + beatLag) }

// mayBeBack says whether a part of it may be with others by now: the worker asked for more time every third of AckWait. Before
// that a look at what others have tells nothing, since their heartbeats are older than it.
func (w *goneWorker) mayBeBack(now time.Time) bool { return !now.Before(w.since.Add(2 * w.wait / 3)) }

// look takes in what the workers last said, and returns those that are there.
func (g gone) look(beats []broker.Beat, now time.Time) (ws []proto.Worker) {
	told := map[string]bool{}
	for _, b := range beats {
		told[b.ID] = true
		w, silent := g[b.ID], b.Silent >= proto.WorkerSilent
		switch {
		case !silent:
			delete(g, b.ID)
			g.took(&b, now)
		case w != nil:
			w.sure = true
		default:
			g[b.ID] = &goneWorker{Worker: b.Worker, since: now.Add(-b.Silent), wait: proto.DefaultAckWait}
		}
		if w == nil || !silent {
			ws = append(ws, b.Worker)
		}
	}
	for id, w := range g {
		// It took its heartbeat away where that cannot have run out yet, give or take what the broker takes to answer.
		left := now.Sub(w.since) < proto.WorkerTTL-beatLag
		if !told[id] && (left || !now.Before(w.again())) {
			delete(g, id)
		}
	}
	return ws
}

// took forgets the one in whose place a worker was started since: what that had, it has given back by its journal.
func (g gone) took(b *broker.Beat, now time.Time) {
	begun := now.Add(-b.Silent - time.Duration(b.UptimeUS)*time.Microsecond)
	for id, was := range g {
		if was.Host == b.Host && was.Engine == b.Engine && begun.After(was.since) {
			delete(g, id)
		}
	}
}

// note says what workers that are gone had of queues, and when it is handed out again at the latest; empty: nothing is held
// by them any more. Of each it is said once, without a break, however what the others have goes up and down meanwhile.
func (g gone) note(qs []broker.Queue, living []proto.Worker, now time.Time) string {
	var handed int64
	for _, q := range qs {
		handed += q.HandedTo
	}
	others, some := heldOf(qs, living)
	var who []string
	var held int64
	since, back := now, time.Time{}
	said, mayBeBack := false, true
	for id, w := range g {
		if !w.sure || w.over || !concerns(qs, w.Models) {
			continue
		}
		w.wait = longest(qs, w.Models)
		if !now.Before(w.again()) || w.Held == 0 && some {
			continue
		}
		who, held = append(who, id), held+w.Held
		said, mayBeBack = said || w.said, mayBeBack && w.mayBeBack(now)
		if w.since.Before(since) {
			since = w.since
		}
		if w.again().After(back) {
			back = w.again()
		}
	}
	none := handed == 0 || handed-others < held/2 && (mayBeBack || !said) // what the others have is not known to the line
	for _, id := range who {
		g[id].over = none && (g[id].said || handed == 0)
		g[id].said = !none
	}
	if len(who) == 0 || none {
		return ""
	}
	had, then := "about "+proto.Count(held, "line"), "other workers get them by %s"
	if !some { // then all that is handed out was theirs
		had, then = proto.Count(handed, "line"), "free again by %s, for a worker that serves the model"
	}
	slices.Sort(who)
	s := "worker " + who[0] + " is gone"
	if len(who) > 1 {
		s = "workers " + few(who, 3) + " are gone"
	}
	return fmt.Sprintf("%s, not heard of since %s, with %s in hand: "+then, s, since.Format(time.TimeOnly), had, back.Format("15:04:05 MST"))
}

// heldOf is what workers hold, at most, of queues, and whether there are any for these. What is held by those that are for
// further models may be of these, and is left out.
func heldOf(qs []broker.Queue, ws []proto.Worker) (held int64, some bool) {
	for _, w := range ws {
		if !concerns(qs, w.Models) {
			continue
		}
		some = true
		if !slices.ContainsFunc(w.Models, func(m string) bool { return !concerns(qs, []string{m}) }) {
			held += w.Held
		}
	}
	return held, some
}

// concerns says whether one of the queues is that of one of the models.
func concerns(qs []broker.Queue, models []string) bool {
	return slices.ContainsFunc(qs, func(q broker.Queue) bool { return slices.Contains(models, q.Model) })
}

// longest is the longest AckWait of the queues of models.
func longest(qs []broker.Queue, models []string) (wait time.Duration) {
	for _, q := range qs {
		if slices.Contains(models, q.Model) {
			wait = max(wait, q.AckWait)
		}
	}
	return wait
}

// noteGone notes what workers that are gone had of the job's models.
func (r *run) noteGone(ctx context.Context, g gone, living []proto.Worker) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	qs, err := broker.HandedOut(ctx, r.o.Conn.JS, r.goneModels(g))
	if err != nil {
		return err
	}
	r.note(noteGone, g.note(qs, living, time.Now()))
	return nil
}

// goneModels are the models of workers that are gone of which the job still has lines.
func (r *run) goneModels(g gone) (models []string) {
	had := map[string]bool{}
	for _, w := range g {
		for _, m := range w.Models {
			had[m] = had[m] || w.sure
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.job.Models {
		if had[m.Model] && !r.progress.Over(m.Model, m.Lines) {
			models = append(models, m.Model)
		}
	}
	return models
}
