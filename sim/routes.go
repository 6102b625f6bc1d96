package sim

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Handler returns the HTTP side of the engine, for a server that the caller owns;
// Run must run beside it, or requests wait for ever. LoadTime, KeepAlive,
// Shutdown and the closing of a dead engine's port are Serve's and ListenAndServe's.
func (e *Engine) Handler() http.Handler {
	type handlers map[string]http.HandlerFunc
	get := func(h http.HandlerFunc) handlers { return handlers{http.MethodGet: h} }
	work := func(to route) handlers {
		if e.cfg.Null {
			return handlers{http.MethodPost: e.nullHandler(to)}
		}
		return handlers{http.MethodPost: func(w http.ResponseWriter, r *http.Request) { e.work(w, r, to) }}
	}
	routes := map[string]handlers{
		"/health":     get(e.serveHealth),
		"/ping":       {http.MethodGet: e.serveHealth, http.MethodPost: e.serveHealth},
		"/version":    get(constant(`{"version":` + string(quote(nil, e.cfg.Version)) + `}`)),
		"/load":       get(constant(`{"server_load":0}`)),
		"/metrics":    get(e.serveMetrics),
		"/v1/models":  get(e.serveModels),
		"/sim/faults": {http.MethodGet: e.serveFaults, http.MethodPost: e.serveFaults},
	}
	if e.cfg.DevMode {
		routes["/is_sleeping"] = get(e.serveSleeping)
	}
	if e.cfg.EmbeddingDim > 0 {
		routes["/v1/embeddings"] = work(routeEmbedding)
	} else {
		routes["/v1/chat/completions"] = work(routeChat)
		routes["/v1/completions"] = work(routeCompletion)
		routes["/v1/responses"] = work(routeResponse)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Server"] = []string{"uvicorn"}
		if !e.allowed(r) {
			unauthorized().write(w)
			return
		}
		methods, ok := routes[r.URL.Path]
		if !ok {
			detail(http.StatusNotFound, "Not Found").write(w)
			return
		}
		handle, ok := methods[r.Method]
		if !ok {
			detail(http.StatusMethodNotAllowed, "Method Not Allowed").write(w)
			return
		}
		handle(w, r)
	})
}

func constant(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, []byte(body)) }
}

// allowed asks for the key where vLLM does, and where faults are made.
func (e *Engine) allowed(r *http.Request) bool {
	if e.cfg.APIKey == "" || !strings.HasPrefix(r.URL.Path, "/v1") && !strings.HasPrefix(r.URL.Path, "/sim") {
		return true
	}
	scheme, key, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.EqualFold(scheme, "Bearer") && key == e.cfg.APIKey
}

// serveHealth says 200 unless the engine is dead; a hung one is well, as in vLLM.
func (e *Engine) serveHealth(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Length", "0")
	if e.isDead() {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
}

func (e *Engine) serveModels(w http.ResponseWriter, _ *http.Request) {
	created := strconv.FormatInt(time.Now().Unix(), 10)
	b := []byte(`{"object":"list","data":[`)
	for i, name := range e.cfg.Models {
		if i > 0 {
			b = append(b, ',')
		}
		b = quote(append(b, `{"id":`...), name)
		b = append(b, `,"object":"model","created":`+created+`,"owned_by":"vllm","root":`...)
		b = quote(b, e.cfg.Models[0])
		b = fmt.Appendf(b, `,"parent":null,"max_model_len":%d,"permission":[{"id":"modelperm-%s","object":"model_permission","created":%s,`,
			e.cfg.MaxModelLen, randomID(), created)
		b = append(b, `"allow_create_engine":false,"allow_sampling":true,"allow_logprobs":true,"allow_search_indices":false,`...)
		b = append(b, `"allow_view":true,"allow_fine_tuning":false,"organization":"*","group":null,"is_blocking":false}]}`...)
	}
	writeJSON(w, http.StatusOK, append(b, "]}"...))
}

// randomID is 16 hex digits. Ids are the one thing that does not repeat with a seed.
func randomID() string { return fmt.Sprintf("%016x", rand.Uint64()) }

func hex8(x uint64) string { return fmt.Sprintf("%08x", uint32(x)) }
