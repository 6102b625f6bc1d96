package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"millrace/proto"
	"millrace/worker/load"
)

// Probe asks /health, /v1/models and /metrics, and once after each start of the engine what it is; where its
// metrics do not tell whether it sleeps, /is_sleeping, if it has that. Ready means that
// /health says 200, or is not there, and that /v1/models lists a model: while vLLM loads it answers nothing at all.
func (h *HTTP) Probe(ctx context.Context) (Status, error) {
	st, err := h.probe(ctx)
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), st.Gauges.Asleep: // it may be busy
	case err != nil, st.State != proto.EngineReady:
		h.about.forget()
	}
	return st, err
}

func (h *HTTP) probe(ctx context.Context) (Status, error) {
	health, err := h.get(ctx, "/health")
	if err != nil {
		return Status{}, h.greeted(ctx, err)
	}
	if st, ok := h.notWell(health); !ok {
		return st, nil
	}
	models, err := h.get(ctx, "/v1/models")
	if err != nil {
		return Status{}, err
	}
	st := h.readModels(models)
	if st.State != proto.EngineReady {
		return st, nil
	}
	if m, err := h.get(ctx, "/metrics"); err != nil {
		return Status{}, err
	} else if m.Status == http.StatusOK {
		st.Gauges, st.Settings = load.ReadGauges(m.Body), load.ReadSettings(m.Body)
	}
	if st.Gauges.Asleep || !st.Gauges.SleepTold && h.asleep(ctx) {
		st.Gauges.Asleep = true
		st.State, st.Reason = proto.EngineWaiting, "engine is asleep; POST /wake_up wakes it"
	}
	h.tell(ctx, &st)
	return st, nil
}

// asleep asks an engine whether it sleeps. One that does not answer that is taken to be awake; one without the route is
// not asked again.
func (h *HTTP) asleep(ctx context.Context) bool {
	if h.about.awake() {
		return false
	}
	a, err := h.ask(ctx, "/is_sleeping")
	if err != nil {
		return false
	}
	if a.Status == http.StatusNotFound || a.Status == http.StatusMethodNotAllowed {
		h.about.wakes()
	}
	var v struct {
		Asleep bool `json:"is_sleeping"`
	}
	_ = json.Unmarshal(a.Body, &v, lenient) // what is something else says nothing of sleep
	return a.Status == http.StatusOK && v.Asleep
}

// speaksFirst stands in the error of a probe of what greets before it is asked, which no HTTP server does. The greeting
// may follow.
const speaksFirst = "is no HTTP server: it speaks first"

// greeted asks, where a connection was made and no answer came, whether what listens there speaks first. The transport's
// error depends on whether the greeting or the request was quicker.
func (h *HTTP) greeted(ctx context.Context, err error) error {
	var dial *net.OpError
	if ctx.Err() != nil || errors.As(err, &dial) && dial.Op == "dial" || h.direct == nil {
		return err
	}
	conn, derr := h.direct.dialer.DialContext(ctx, "tcp", h.direct.addr)
	if derr != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(greetingTimeout))
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	said := make([]byte, 40)
	n, _ := conn.Read(said)
	switch text := printable(said[:n]); {
	case n == 0:
		return err
	case text == "":
		return errors.New(speaksFirst)
	default:
		return fmt.Errorf(`%s and says "%s"`, speaksFirst, text)
	}
}

// greetingTimeout is how long a server that may speak first is listened to: at each probe, as at one that only breaks connections.
const greetingTimeout = 300 * time.Millisecond

// printable is the beginning of a greeting, without quotes, as far as it is text: what follows may be random.
func printable(said []byte) string {
	if end := bytes.IndexFunc(said, func(r rune) bool { return r < ' ' || r > '~' }); end >= 0 {
		said = said[:end]
	}
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune("\"'`", r) {
			return -1
		}
		return r
	}, string(said))
}

func (h *HTTP) get(ctx context.Context, path string) (Answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.base+path, nil)
	if err != nil {
		return Answer{}, fmt.Errorf("make probe: %w", err)
	}
	return h.send(req)
}

// notWell judges what /health said; true: go on.
func (h *HTTP) notWell(a Answer) (Status, bool) {
	switch a.Status {
	case http.StatusOK, http.StatusNotFound, http.StatusMethodNotAllowed:
		return Status{}, true
	case http.StatusUnauthorized, http.StatusForbidden:
		return h.denied(a), false
	}
	said := readError(a.Body).message
	if rest, plain := strings.CutPrefix(h.String(), "http://"); plain && a.Status == http.StatusBadRequest && strings.Contains(said, "HTTPS") {
		return Status{State: proto.EngineWaiting, Reason: fmt.Sprintf("engine at %s wants TLS; name it https://%s", h, rest)}, false
	}
	return Status{State: proto.EngineWaiting, Ill: true, Reason: strings.TrimSpace(fmt.Sprintf("engine is not well: /health says %d %s", a.Status, said))}, false
}

func (h *HTTP) denied(a Answer) Status {
	return Status{State: proto.EngineDenied, Reason: denial(h, a.Status, "")}
}

// denial says that an engine wants a key, or another one than it got. said is what the engine said, or empty; some
// repeat the key there.
func denial(e Engine, status int, said string) string {
	how := fmt.Sprintf("HTTP %d", status)
	h, _ := e.(*HTTP)
	if h != nil && h.key != "" {
		said = strings.ReplaceAll(said, h.key, "xxxxx")
	}
	if said != "" && !strings.HasPrefix(said, how) {
		how += ": " + said
	}
	if h != nil && h.auth != "" {
		return fmt.Sprintf("engine refuses the key that it was given (%s); give the right one with --engine-api-key or --engine-api-key-file", how)
	}
	return fmt.Sprintf("engine wants a key (%s); give one with --engine-api-key or --engine-api-key-file", how)
}

// readModels reads an answer of /v1/models.
func (h *HTTP) readModels(a Answer) Status {
	odd := func(what string) Status {
		return Status{State: proto.EngineWaiting, Reason: fmt.Sprintf("%s/v1/models %s; is that an OpenAI-compatible engine? check --engine: %s", h, what, h)}
	}
	switch a.Status {
	case http.StatusOK:
	case http.StatusUnauthorized, http.StatusForbidden:
		return h.denied(a)
	default:
		return odd(strings.TrimSpace(fmt.Sprintf("says %d %s", a.Status, readError(a.Body).message)))
	}
	var list struct {
		Data []struct {
			ID     string `json:"id"`
			MaxLen int64  `json:"max_model_len"`
		} `json:"data"`
	}
	if err := json.Unmarshal(a.Body, &list, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)); err != nil {
		return odd("does not answer with a list of models")
	}
	st := Status{State: proto.EngineReady}
	for _, m := range list.Data {
		if m.ID != "" {
			st.Models = append(st.Models, m.ID)
			st.MaxLen = max(st.MaxLen, m.MaxLen)
		}
	}
	if len(st.Models) == 0 {
		st.State, st.Reason = proto.EngineNoModel, "engine serves no model"
	}
	return st
}

// tell adds what the engine says of itself.
func (h *HTTP) tell(ctx context.Context, st *Status) {
	p, run := h.profile(ctx)
	st.Kind, st.Version, st.Run, st.Slots = p.kind, p.version, run, p.slots
	st.Simulated = strings.Contains(st.Version, "-sim")
	if st.MaxLen == 0 {
		st.MaxLen = p.maxLen
	}
	if st.Gauges.KVTokens == 0 {
		st.Gauges.KVTokens = p.kvTokens
	}
}
