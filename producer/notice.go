package producer

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// noticeEvery is how often the workers are looked at, and noticeFirst when for the first time: workers that start
// together with the job get as long to show up. As long as something is said of them it is noticeSoon, and noticeOne more
// for each of them, of which each is asked for: what is not so any more should not stand for long.
const (
	noticeEvery = 3 * time.Second
	noticeFirst = 2 * time.Second
	noticeSoon  = 500 * time.Millisecond
	noticeOne   = 20 * time.Millisecond
)

func noticeAgain(note string, workers int) time.Duration {
	if note == "" {
		return noticeEvery
	}
	return min(noticeSoon+time.Duration(workers)*noticeOne, noticeEvery)
}

// notice learns from the workers' heartbeats how much they run at once, and says when nobody runs a model, when a worker is
// gone with lines, or nobody folds results.
func (r *run) notice(ctx context.Context) {
	gone := gone{}
	for wait := noticeFirst; sleep(ctx, wait) == nil; {
		wait = noticeEvery
		if _, err := r.ask(ctx, r.job.Lines); ctx.Err() == nil { // nothing lies behind the last line
			r.note(noteAggregator, text(err))
		}
		cctx, cancel := context.WithTimeout(ctx, callTimeout)
		beats, err := broker.Beats(cctx, r.o.Conn.JS)
		cancel()
		if err != nil {
			r.log.Debug("look at the workers", "error", err)
			continue
		}
		ws := gone.look(beats, time.Now())
		note := r.staff(ws)
		r.note(noteWorkers, note)
		if err := r.noteGone(ctx, gone, ws); err != nil {
			r.log.Debug("look at what is handed out", "error", err)
		}
		if len(gone) == 0 { // that one is gone is sure at the second look, which should not be the same moment
			wait = noticeAgain(note, len(ws))
		}
	}
}

// text is what to note of err. That the broker is away is noted by others.
func text(err error) string {
	if err == nil || broker.Away(err) {
		return ""
	}
	return err.Error()
}

// staff notes what the workers of each model may have in flight, and returns what is missing, and what ails those that are there.
func (r *run) staff(ws []proto.Worker) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.want >= wantHalt || r.want == wantPause {
		return ""
	}
	var idle, waiting, served []string
	for i, q := range r.queues {
		ready, limit := serving(ws, q.model)
		r.limits[i] = limit
		switch {
		case r.progress.Over(q.model, r.job.Models[i].Lines):
		case ready:
			served = append(served, q.model)
		case slices.ContainsFunc(ws, r.comes(q.model)):
			waiting = append(waiting, q.model)
		default:
			idle = append(idle, q.model)
		}
	}
	notes := []string{r.idleNote(idle, ws), r.waitingNote(waiting, ws), ailingNote(served, ws)}
	return strings.Join(slices.DeleteFunc(notes, func(s string) bool { return s == "" }), "; ")
}

// comes says of workers whether they are for a model and do not run it now, as while their engine loads. Which models an
// engine has that was never up nobody knows; of our own workers it may be any.
func (r *run) comes(model string) func(proto.Worker) bool {
	return func(w proto.Worker) bool {
		may := r.o.Own && len(w.Models) == 0 && w.State != proto.EngineNoModel
		return (may || slices.Contains(w.Models, model)) && w.Pending()
	}
}

// waitingNote says what the workers do that are for models which nobody runs now. Our own have no names that tell anybody
// anything.
func (r *run) waitingNote(models []string, ws []proto.Worker) string {
	const shown = 3
	var notes []string
	for _, model := range models {
		if !r.o.Own {
			notes = append(notes, Waits(model, ws))
			continue
		}
		for _, w := range ws {
			if r.comes(model)(w) {
				notes = append(notes, doing(&w))
			}
		}
	}
	if r.o.Own {
		slices.Sort(notes)
		return few(slices.Compact(notes), shown)
	}
	if n := len(notes) - shown; n > 0 {
		notes = append(notes[:shown], fmt.Sprintf("%d models more wait for workers", n))
	}
	return strings.Join(notes, "; ")
}

// Waits says for which workers a model waits that nobody runs now, and what they do; empty: none is for it.
func Waits(model string, ws []proto.Worker) string {
	const shown = 3
	var of []string
	for _, w := range ws {
		if slices.Contains(w.Models, model) && w.Pending() {
			of = append(of, w.ID+" ("+doing(&w)+")")
		}
	}
	if len(of) == 0 {
		return ""
	}
	return fmt.Sprintf("model %s waits for %s", model, few(of, shown))
}

func doing(w *proto.Worker) string { return proto.Truncate(cmp.Or(w.Reason, w.State), 200) }

// few lists the first of them.
func few(all []string, shown int) string {
	s := strings.Join(all[:min(shown, len(all))], ", ")
	if n := len(all) - shown; n > 0 {
		s += fmt.Sprintf(" and %d more", n)
	}
	return s
}

// serving says whether a model is being run, and how much of it at once.
func serving(ws []proto.Worker, model string) (ready bool, limit int64) {
	for _, w := range ws {
		if slices.Contains(w.Models, model) {
			limit += w.Limit
			ready = ready || w.Serves(model)
		}
	}
	return ready, limit
}

// ailingNote says what ails workers that run models.
func ailingNote(models []string, ws []proto.Worker) string {
	const shown = 3
	var notes []string
	for _, w := range ws {
		if w.Reason != "" && slices.ContainsFunc(models, w.Serves) {
			notes = append(notes, fmt.Sprintf("worker %s: %s", w.ID, proto.Truncate(w.Reason, 300)))
		}
	}
	if n := len(notes) - shown; n > 0 {
		notes = append(notes[:shown], fmt.Sprintf("and %d workers more", n))
	}
	return strings.Join(notes, "; ")
}

// idleNote says which models nobody runs, and what the workers that there are do instead.
func (r *run) idleNote(models []string, ws []proto.Worker) string {
	if len(models) == 0 {
		return ""
	}
	if len(ws) == 0 && r.o.Own {
		return "workers are starting"
	}
	const shown = 3
	s := "no worker serves model " + few(models, shown)
	if len(ws) == 0 {
		return s + "; no worker is there, start `millrace worker`"
	}
	var seen, others []string // it may be that the model's name is wrong in the job
	for _, w := range ws {
		if len(w.Models) > 0 && !slices.ContainsFunc(w.Models, func(m string) bool { return slices.Contains(models, m) }) {
			others = append(others, workerNote(w))
		} else {
			seen = append(seen, workerNote(w))
		}
	}
	s += "; waiting"
	if len(seen) > 0 {
		s += "; workers seen: " + few(seen, shown)
	}
	if len(others) > 0 {
		s += "; workers of other models: " + few(others, shown)
	}
	return s
}

func workerNote(w proto.Worker) string {
	what := w.State
	if w.Reason != "" {
		what += ": " + proto.Truncate(w.Reason, 200)
	}
	if len(w.Models) > 0 {
		verb := "for"
		if w.State == proto.EngineReady {
			verb = "serves"
		}
		what += "; " + verb + " " + strings.Join(w.Models[:min(3, len(w.Models))], ", ")
	}
	return fmt.Sprintf("%s (%s)", w.ID, what)
}
