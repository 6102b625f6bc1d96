package sim

import (
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Frontend is which of vLLM's HTTP servers is simulated. All answers are those of FrontendPython, but for what is told of
// the others, as it was recorded (testdata/vllm).
type Frontend string

const (
	// FrontendPython is that of 0.32: where prompt and max_tokens exceed the context, the output is cut without a word.
	FrontendPython Frontend = "python"
	// FrontendPython26 is that of 0.26: HTTP 400 for that, and HTTP 500 for a body that is a list.
	FrontendPython26 Frontend = "python-0.26"
	// FrontendRust is the one in Rust (0.26): it cuts as well, also a max_tokens above the context; it answers 200 without
	// content to a JSON schema that makes no sense; when the engine dies it resets connections; and it has no
	// engine_sleep_state in its metrics.
	FrontendRust Frontend = "rust"
)

func (f Frontend) check() error {
	if slices.Contains([]Frontend{FrontendPython, FrontendPython26, FrontendRust}, f) {
		return nil
	}
	return fmt.Errorf("--frontend is %q, must be python, python-0.26 or rust", f)
}

// checkContext refuses, where that is done, what has no room for its max_tokens.
func (e *Engine) checkContext(q *request, texts []string) *apiError {
	if !q.hasMax || e.cfg.Frontend != FrontendPython26 {
		return nil
	}
	limit := e.cfg.MaxModelLen
	for _, text := range texts {
		if n := e.countTokens(text); n+q.maxTokens > limit {
			return badRequest("input_tokens", "You passed %d input tokens and requested %d output tokens. However, the model's context length is only "+
				"%d tokens, resulting in a maximum input length of %d tokens. Please reduce the length of the input prompt. (parameter=input_tokens, value=%d)",
				n, q.maxTokens, limit, limit-q.maxTokens, n)
		}
	}
	return nil
}

// nonsense is the type in a JSON schema that is none; empty: there is no schema, or it makes sense. It looks at the
// outermost type alone.
func (q *request) nonsense() string {
	var f struct {
		Type   string `json:"type"`
		Schema struct {
			Schema struct {
				Type jsontext.Value `json:"type"`
			} `json:"schema"`
		} `json:"json_schema"`
	}
	if q.route != routeChat || json.Unmarshal(q.ResponseFormat, &f, lenient()) != nil || f.Type != "json_schema" {
		return ""
	}
	t := f.Schema.Schema.Type
	if t.Kind() != '"' || slices.Contains([]string{"object", "array", "string", "number", "integer", "boolean", "null"}, unquote(t)) {
		return ""
	}
	return unquote(t)
}

// checkSchema refuses a JSON schema that makes no sense, where that is done.
func (e *Engine) checkSchema(q *request) *apiError {
	if t := q.nonsense(); t != "" && e.cfg.Frontend != FrontendRust {
		return badRequest("", "Grammar error: Invalid type: %s", t)
	}
	return nil
}

// answerDead answers what the engine can answer no more.
func (e *Engine) answerDead(w http.ResponseWriter) {
	if e.cfg.Frontend == FrontendRust {
		panic(http.ErrAbortHandler)
	}
	engineDead().write(w)
}

// withoutContent is what the Rust frontend makes of a chat answer to a schema that makes no sense.
func withoutContent(body []byte) []byte {
	before, after, _ := strings.Cut(string(body), `"content":"`)
	_, after, _ = strings.Cut(after, `"`) // the text needs no escapes
	return []byte(before + `"content":null` + after)
}

// serveSleeping is GET /is_sleeping, which vLLM has in its developer mode.
func (e *Engine) serveSleeping(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, fmt.Appendf(nil, `{"is_sleeping":%t}`, e.faults.Load().Asleep))
}
