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
	proto.Worker           // as it was last heard
	since        time.Time // when that was, on the clock here
	sure         bool      // it was seen to be silent twice: once may be a broker that was away itself
}

// beatLag is how much longer a worker may have lived than its last heartbeat tells, until the next one was due.
const beatLag = 2 * time.Second

// look takes in what the workers last said, and returns those that are there.
func (g gone) look(beats []broker.Beat, now time.Time) (ws []proto.Worker) {
	for _, b := range beats {
		w, silent := g[b.ID], b.Silent >= proto.WorkerSilent
		switch {
		case !silent:
			delete(g, b.ID)
			g.took(&b.Worker, now)
		case w != nil:
			w.sure = true
		default:
			g[b.ID] = &goneWorker{Worker: b.Worker, since: now.Add(-b.Silent)}
		}
		if w == nil || !silent {
			ws = append(ws, b.Worker)
		}
	}
	return ws
}

// took forgets the one in whose place a worker was started since: what that had, it has given back by its journal.
func (g gone) took(w *proto.Worker, now time.Time) {
	begun := now.Add(-time.Duration(w.UptimeUS) * time.Microsecond)
	for id, was := range g {
		if was.Host == w.Host && was.Engine == w.Engine && begun.After(was.since) {
			delete(g, id)
		}
	}
}

// note says what workers that are gone had of queues, and when it is handed out again at the latest; empty: nothing is held
// by them any more.
func (g gone) note(qs []broker.Queue, living []proto.Worker, now time.Time) string {
	var wait time.Duration
	var handed int64
	for _, q := range qs {
		wait, handed = max(wait, q.AckWait), handed+q.HandedTo
	}
	others, some := heldOf(qs, living)
	var who []string
	var held int64
	since, back := now, time.Time{}
	for id, w := range g {
		again := w.since.Add(wait + beatLag)
		if over := !now.Before(again); over && now.Sub(w.since) > proto.WorkerTTL {
			delete(g, id) // its heartbeat is not there any more either
		} else if !over && w.sure && concerns(qs, w.Models) && (w.Held > 0 || !some) {
			who, held = append(who, id), held+w.Held
			if w.since.Before(since) {
				since = w.since
			}
			if again.After(back) {
				back = again
			}
		}
	}
	if len(who) == 0 || handed == 0 || handed-others < held/2 { // what the others have is not known to the line
		return ""
	}
	had := "about " + proto.Count(held, "line")
	if !some { // then all that is handed out was theirs
		had = proto.Count(handed, "line")
	}
	slices.Sort(who)
	s := "worker " + who[0] + " is gone"
	if len(who) > 1 {
		s = "workers " + few(who, 3) + " are gone"
	}
	return fmt.Sprintf("%s, not heard of since %s, with %s in hand: other workers get them by %s",
		s, since.Format(time.TimeOnly), had, back.Format("15:04:05 MST"))
}

// heldOf is what workers hold, at most, of queues, and whether there are any for these.
func heldOf(qs []broker.Queue, ws []proto.Worker) (held int64, some bool) {
	for _, w := range ws {
		if concerns(qs, w.Models) {
			held, some = held+w.Held, true
		}
	}
	return held, some
}

// concerns says whether one of the queues is that of one of the models.
func concerns(qs []broker.Queue, models []string) bool {
	return slices.ContainsFunc(qs, func(q broker.Queue) bool { return slices.Contains(models, q.Model) })
}

// noteGone notes what workers that are gone had of the job's models.
func (r *run) noteGone(ctx context.Context, g gone, living []proto.Worker) error {
	if len(g) == 0 {
		r.note(noteGone, "")
		return nil
	}
	qs, err := broker.Queues(ctx, r.o.Conn.JS)
	if err != nil {
		return err
	}
	r.note(noteGone, g.note(r.open(qs), living, time.Now()))
	return nil
}

// open are those of queues in which the job still has lines.
func (r *run) open(qs []broker.Queue) []broker.Queue {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(qs, func(q broker.Queue) bool {
		return !slices.ContainsFunc(r.job.Models, func(m proto.ModelLines) bool { return m.Model == q.Model && !r.over(m.Model, m.Lines) })
	})
}
