package sim

import (
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// work answers a request that needs the engine, checking in vLLM's order: body,
// model, life, queue limit, prompt, sampling values. Only then it counts as an
// arrival, so that refused requests do not shift the faults of the others.
func (e *Engine) work(w http.ResponseWriter, r *http.Request, to route) {
	q, fail := e.readRequest(r, to)
	if fail == nil {
		fail = e.checkModel(q)
	}
	if fail != nil {
		fail.write(w)
		return
	}
	if e.isDead() {
		e.answerDead(w)
		return
	}
	texts, refused := e.render(q)
	seats := max(1, len(texts)*min(q.n, maxChoices))
	if fail := e.enter(seats); fail != nil {
		fail.write(w)
		return
	}
	defer e.gate.leave(seats)
	if refused == nil {
		refused = e.check(q, texts)
	}
	if refused != nil {
		refused.write(w)
		return
	}
	v := e.faults.Load().judge(e.cfg.Seed, e.arrivals.Add(1))
	if v.kind == faultStatus {
		e.injected(v.status).write(w)
		return
	}
	e.answer(w, r, q, e.newCall(q, texts, v), v)
}

func (e *Engine) checkModel(q *request) *apiError {
	if q.model != "" && !e.cfg.AnyModel && !slices.Contains(e.cfg.Models, q.model) {
		return unknownModel(q.model, e.aliases())
	}
	return nil
}

func (e *Engine) enter(seats int) *apiError {
	switch e.gate.enter(seats) {
	case entryStopping:
		return stopping()
	case entryBusy:
		e.stats.reject()
		return busy()
	}
	return nil
}

func (e *Engine) check(q *request, texts []string) *apiError {
	if q.route == routeEmbedding && q.Dimensions.Kind() == '0' {
		return badRequest("", `Model "%s" does not support matryoshka representation, `+
			"changing output dimensions will lead to poor results.", e.cfg.Models[0])
	}
	if fail := e.checkPrompt(q, texts); fail != nil {
		return fail
	}
	if fail := q.checkSampling(); fail != nil {
		return fail
	}
	return e.checkSchema(q)
}

// newCall lays out the sequences: for each prompt n choices, in the order of
// their index in the answer.
func (e *Engine) newCall(q *request, texts []string, v verdict) *call {
	c := &call{
		choices: q.n,
		left:    len(texts) * q.n,
		arrived: int64(time.Since(e.start)),
		done:    make(chan struct{}),
	}
	poison := e.faults.Load().Poison
	hash := hash64(string(q.promptField()))
	seqs := make([]sequence, c.left)
	c.seqs = make([]*sequence, c.left)
	for i, text := range texts {
		var blocks []uint64
		var tail uint64
		if !e.cfg.NoPrefixCaching {
			blocks, tail = hashBlocks(e.hashSeed, text, blockSize*e.cfg.BytesPerToken)
		}
		for j := range q.n {
			k := i*q.n + j
			s := &seqs[k]
			*s = sequence{
				call: c, choice: k, prompt: e.countTokens(text), slow: v.slow,
				hashes: blocks, tail: mix(tail + uint64(j)),
				poison: v.crash || poison != "" && strings.Contains(text, poison),
			}
			e.setLength(s, q, mix(hash^e.cfg.Seed)+uint64(k))
			if v.kind == faultAbort && s.want > 0 {
				s.want, s.reason = (s.want+1)/2, finishAbort
			}
			c.seqs[k] = s
		}
	}
	return c
}

// setLength fixes how many tokens s makes and why it stops, and the limit of its call.
func (e *Engine) setLength(s *sequence, q *request, draw uint64) {
	if q.route == routeEmbedding {
		s.reason = finishStop
		return
	}
	limit := e.cfg.MaxModelLen - s.prompt
	if q.hasMax {
		limit = min(limit, q.maxTokens)
	}
	s.call.maxTokens = limit
	r := e.cfg.OutputTokens
	natural := max(r.Min+int(mix(draw)%uint64(r.Max-r.Min+1)), q.minTokens)
	if q.ignoreEOS || natural > limit {
		s.want, s.reason = limit, finishLength
		return
	}
	s.want, s.reason = natural, finishStop
}

// answer puts the call through the engine and writes what comes of it.
func (e *Engine) answer(w http.ResponseWriter, r *http.Request, q *request, c *call, v verdict) {
	var events *stream
	if q.stream && (q.route == routeChat || q.route == routeCompletion) {
		events = startStream(w)
	}
	submitted := e.inbox.submit(c)
	if submitted {
		select {
		case <-c.done:
		case <-r.Context().Done():
			e.inbox.leave(c)
			return
		}
	}
	a := e.newAnswer(q, c)
	switch dead := !submitted || c.died; {
	case events != nil && dead:
		events.fail(engineDead())
	case events != nil:
		events.send(a)
	case dead:
		e.answerDead(w)
	case q.nonsense() != "":
		deliver(w, withoutContent(a.body()), v.kind)
	default:
		deliver(w, a.body(), v.kind)
	}
}

// deliver writes a good body, or spoils it.
func deliver(w http.ResponseWriter, body []byte, kind fault) {
	switch kind {
	case faultReset:
		panic(http.ErrAbortHandler)
	case faultEmpty:
		body = nil
	case faultGarbage:
		body = body[:len(body)/2]
	case faultTorn:
		h := w.Header()
		h.Set("Content-Type", "application/json")
		h.Set("Content-Length", strconv.Itoa(len(body)))
		w.Write(body[:len(body)/2])
		_ = http.NewResponseController(w).Flush() // the cut follows anyway
		panic(http.ErrAbortHandler)
	}
	writeJSON(w, http.StatusOK, body)
}

// nullHandler answers the same to everybody, without a look at the request.
func (e *Engine) nullHandler(to route) http.HandlerFunc {
	q := &request{route: to, id: "null", n: 1}
	q.Input = jsontext.Value(`""`)
	s := &sequence{prompt: 1}
	if to != routeEmbedding {
		s.made = 1
	}
	body := e.newAnswer(q, &call{seqs: []*sequence{s}, choices: 1}).body()
	return func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // a body that breaks off shows on the connection
		writeJSON(w, http.StatusOK, body)
	}
}
