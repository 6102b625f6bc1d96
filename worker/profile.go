package worker

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"millrace/proto"
)

// profile is what an engine says of itself and does not change while it runs. It is asked once for each of its runs,
// in this order, until one is known:
//
//	vLLM       /version          {"version"}; testdata/vllm
//	SGLang     /get_server_info  {"version","max_total_num_tokens","dp_size","max_running_requests","internal_states":
//	                             [{"effective_max_running_requests_per_dp"}]}; /server_info, too, in newer ones; get_init_info
//	                             and get_internal_state in python/sglang/srt/managers/scheduler.py, 0.5
//	llama.cpp  /props            {"total_slots","build_info","default_generation_settings":{"n_ctx"}}; tools/server/README.md, 2026
//	Ollama     /api/version      {"version"}; docs/api.md of github.com/ollama/ollama
//
// Two rules are the same for all of them. Ready is what says 200 at /health, or has none (Ollama), and lists a model: SGLang
// and llama.cpp say 503 there while they load. Too much is 429, 503 or 529 (classify.go): SGLang's "The request queue is
// full.", Ollama's "server busy". Metrics are in load/scrape.go. What the limit of in flight rests on then:
//
//	vLLM       capacity and use of its KV cache; its Rust frontend tells only the use
//	SGLang     the same with --enable-metrics, else the capacity
//	llama.cpp  its slots
//	others     what they finish in a second
type profile struct {
	kind     string
	version  string
	kvTokens int64 // capacity of the KV cache, over all data-parallel engines; 0: not told
	slots    int64 // most sequences that it runs at once, over all of them; 0: not told
	maxLen   int64 // context of a sequence; 0: not told
}

// about remembers the profile of this run of the engine.
type about struct {
	mu    sync.Mutex
	known *profile // nil: not known yet
	tries int      // that brought no answer
	run   int      // of those that were asked
	turn  int      // goes up when all is forgotten

	wakeful bool // it has no /is_sleeping
}

const (
	askTimeout = time.Second // for one question: SGLang asks its scheduler, others may hang at what they do not know
	mostTries  = 3           // until an engine that does not answer is one of the others
)

// forget says that what comes next may be another engine.
func (a *about) forget() {
	a.mu.Lock()
	a.known, a.tries, a.wakeful = nil, 0, false
	a.turn++
	a.mu.Unlock()
}

// awake says whether the engine has no /is_sleeping.
func (a *about) awake() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.wakeful
}

// wakes notes that it has none.
func (a *about) wakes() {
	a.mu.Lock()
	a.wakeful = true
	a.mu.Unlock()
}

// now returns what is known (nil: nothing yet), which run that is, and in which turn it was asked for.
func (a *about) now() (known *profile, run, turn int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.known, a.run, a.turn
}

// found takes in what came of asking in a turn, unless that is over or another probe was faster.
func (a *about) found(p profile, missing error, turn int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if turn != a.turn || a.known != nil {
		return
	}
	if a.tries++; missing != nil && a.tries < mostTries {
		return
	}
	p.version = proto.Truncate(p.version, 100)
	a.known = &p
	a.run++
}

// profile asks once for each run, and again at the next probe where an answer was missing.
func (h *HTTP) profile(ctx context.Context) (profile, int) {
	known, run, turn := h.about.now()
	if known == nil {
		p, err := h.discover(ctx)
		h.about.found(p, err, turn)
		known, run, _ = h.about.now()
	}
	if known == nil {
		return profile{}, run
	}
	return *known, run
}

// discover asks until the kind is known. An error says that it might be one that did not answer.
func (h *HTTP) discover(ctx context.Context) (profile, error) {
	var missing error
	for _, ask := range []func(context.Context) (profile, error){h.isVLLM, h.isSGLang, h.isLlama, h.isOllama} {
		p, err := ask(ctx)
		if p.kind != "" {
			return p, nil
		}
		if missing == nil {
			missing = err
		}
	}
	return profile{kind: proto.KindOther}, missing
}

// ask gets what an engine may not have, or not answer.
func (h *HTTP) ask(ctx context.Context, path string) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return h.get(ctx, path)
}

// read asks for a JSON object and says whether it came. What is not there, or is something else, is not it.
func (h *HTTP) read(ctx context.Context, path string, v any) (bool, error) {
	a, err := h.ask(ctx, path)
	if err != nil {
		return false, fmt.Errorf("ask engine for %s: %w", path, err)
	}
	return a.Status == http.StatusOK && json.Unmarshal(a.Body, v, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)) == nil, nil
}

func (h *HTTP) isVLLM(ctx context.Context) (profile, error) {
	var v struct {
		Version string `json:"version"`
	}
	if ok, err := h.read(ctx, "/version", &v); !ok || v.Version == "" {
		return profile{}, err
	}
	return profile{kind: proto.KindVLLM, version: v.Version}, nil
}

func (h *HTTP) isSGLang(ctx context.Context) (profile, error) {
	var v struct {
		Version string `json:"version"`
		Tokens  int64  `json:"max_total_num_tokens"` // of each data-parallel engine
		Engines int64  `json:"dp_size"`
		Seqs    int64  `json:"max_running_requests"` // of all; null: found out
		States  []struct {
			Seqs int64 `json:"effective_max_running_requests_per_dp"`
		} `json:"internal_states"`
	}
	ok, err := h.read(ctx, "/get_server_info", &v)
	if !ok && err == nil {
		ok, err = h.read(ctx, "/server_info", &v)
	}
	if !ok || v.Tokens <= 0 {
		return profile{}, err
	}
	p := profile{kind: proto.KindSGLang, version: v.Version, kvTokens: v.Tokens * max(v.Engines, 1)}
	for _, s := range v.States {
		p.slots += s.Seqs
	}
	if p.slots == 0 {
		p.slots = v.Seqs
	}
	return p, nil
}

func (h *HTTP) isLlama(ctx context.Context) (profile, error) {
	var v struct {
		Slots    int64  `json:"total_slots"`
		Build    string `json:"build_info"`
		Settings struct {
			Context int64 `json:"n_ctx"` // of a slot
		} `json:"default_generation_settings"`
	}
	if ok, err := h.read(ctx, "/props", &v); !ok || v.Slots <= 0 {
		return profile{}, err
	}
	return profile{kind: proto.KindLlama, version: v.Build, slots: v.Slots, maxLen: v.Settings.Context}, nil
}

func (h *HTTP) isOllama(ctx context.Context) (profile, error) {
	var v struct {
		Version string `json:"version"`
	}
	if ok, err := h.read(ctx, "/api/version", &v); !ok || v.Version == "" {
		return profile{}, err
	}
	return profile{kind: proto.KindOllama, version: v.Version}, nil
}
