package worker

import (
	"strings"
	"time"

	"millrace/proto"
)

// What a line asked may be gone from its engine's address while everything looks well: another model was loaded, or
// another engine was started there. vLLM says 404 then; engines that do not look at the name answer. So an answer is
// used only if the engine lists the model, as seen since connections last told that it may have become another one
// (Answer.Since; over TLS, and for bodies above 64 KB, they do not tell).

// done ends a line by its answer, if that is from the model that was asked.
func (s *session) done(o *outcome) {
	if s.gate.vouches(o) || s.Models != nil { // who names models knows better
		s.finished(o)
		return
	}
	s.away(func() { s.confirm(o) })
}

// confirm looks whether the engine still serves the model of a line before it uses an answer.
func (s *session) confirm(o *outcome) {
	st := s.gate.fresh(s.stopped)
	switch {
	case s.stopped.Err() != nil:
		s.giveBack(o.line, 0, "stopped")
	case st.State == proto.EngineReady && st.serves(o.queue.model) && s.gate.known(o):
		s.finished(o)
	default:
		if st.State == proto.EngineReady {
			s.sayForeign(o, st)
		}
		s.giveBack(o.line, 0, reasonOf(classNoModel))
	}
}

// noModel deals with a line whose model the engine does not know. Where it does list the model, it is the line that
// is wrong, because its body names another one, or an engine that fails all lines so.
func (s *session) noModel(o *outcome) {
	st := s.gate.fresh(s.stopped)
	if st.State == proto.EngineReady && st.serves(o.queue.model) {
		if s.gate.back(o.queue.model, o.started) { // it was another engine that said so
			s.giveBack(o.line, 0, reasonOf(o.class))
			return
		}
		s.blame(o)
		s.retry(o)
		return
	}
	s.mu.Lock()
	s.unserved[o.queue.model] = true
	s.mu.Unlock()
	if st.State == proto.EngineReady {
		s.found(st)
		s.gate.show()
	}
	s.giveBack(o.line, 0, reasonOf(o.class))
}

// sayForeign says once for each model and list that answers are not used.
func (s *session) sayForeign(o *outcome, st Status) {
	what := o.queue.model + " " + strings.Join(st.Models, " ")
	s.mu.Lock()
	told := s.foreign == what
	s.foreign = what
	s.mu.Unlock()
	if !told {
		s.Log.Warn("engine served other models meanwhile; answers that may be theirs are not used", "engine", s.Engine.String(), "model", o.queue.model, "serves", st.Models)
	}
}

// vouches says whether a good answer is from the model of its line for all that is known. The engine has listed the model
// since it may last have become another one. Where it does not list it any more, the line was in it before. And it answers
// by a name that it lists, or did before: engines answer by the first of several names, by the one that an alias stands
// for, or by that which was asked, whatever they run.
func (g *gate) vouches(o *outcome) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	at := g.listed[o.queue.model].begun
	_, lists := g.listed[o.model]
	return at.After(o.answer.Since) && (!g.last.After(at) || o.started.Before(at)) && !g.anothers(o) &&
		(o.model == "" || lists || g.names[o.queue.model] == o.model)
}

// anothers says whether an answer names a model that was at the engine's address once and is no more, where the model of its
// line has come back since the line began: it was away, and what is there now tells nothing of the answer. Called with mu held.
func (g *gate) anothers(o *outcome) bool {
	l, ok := g.listed[o.model]
	return ok && o.model != o.queue.model && l.begun.Before(g.last) && g.listed[o.queue.model].anew.After(o.started)
}

// listing is when an engine listed a model.
type listing struct {
	begun time.Time // start of the last probe that found it ready and the model listed
	anew  time.Time // end of the last probe that found it where the one before had not
}

// list takes note of the models of a ready engine that a probe has found, which began at a time. Called with mu held.
func (g *gate) list(models []string, begun time.Time) {
	for _, m := range models {
		l, ok := g.listed[m]
		if !ok || l.begun.Before(g.last) {
			l.anew = time.Now()
		}
		l.begun = begun
		g.listed[m] = l
	}
	g.last = begun
}

// back says whether a model was found after a time that had not been there before.
func (g *gate) back(model string, t time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.listed[model].anew.After(t)
}

// known takes note of the name by which an engine answers for a model. False: the name is that of another one.
func (g *gate) known(o *outcome) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.anothers(o) {
		return false
	}
	if _, lists := g.listed[o.model]; lists || o.model == "" {
		return true
	}
	if was := g.names[o.queue.model]; was != o.model {
		g.log.Info("engine answers by another name", "engine", g.engine.String(), "model", o.queue.model, "name", o.model, "before", was)
	}
	if g.names == nil {
		g.names = map[string]string{}
	}
	g.names[o.queue.model] = o.model
	return true
}
