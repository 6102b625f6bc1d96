package sim

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// route is one of the routes that make the engine work.
type route int

const (
	routeChat route = iota
	routeCompletion
	routeResponse
	routeEmbedding
)

// fields are the members of a body that matter, as they were received.
type fields struct {
	Messages            jsontext.Value `json:"messages"`
	Prompt              jsontext.Value `json:"prompt"`
	Input               jsontext.Value `json:"input"`
	Model               jsontext.Value `json:"model"`
	Logprobs            jsontext.Value `json:"logprobs"`
	TopLogprobs         jsontext.Value `json:"top_logprobs"`
	MaxTokens           jsontext.Value `json:"max_tokens"`
	MaxCompletionTokens jsontext.Value `json:"max_completion_tokens"`
	MaxOutputTokens     jsontext.Value `json:"max_output_tokens"`
	N                   jsontext.Value `json:"n"`
	PresencePenalty     jsontext.Value `json:"presence_penalty"`
	FrequencyPenalty    jsontext.Value `json:"frequency_penalty"`
	Stream              jsontext.Value `json:"stream"`
	StreamOptions       jsontext.Value `json:"stream_options"`
	Temperature         jsontext.Value `json:"temperature"`
	TopP                jsontext.Value `json:"top_p"`
	TopK                jsontext.Value `json:"top_k"`
	Tools               jsontext.Value `json:"tools"`
	ToolChoice          jsontext.Value `json:"tool_choice"`
	IgnoreEOS           jsontext.Value `json:"ignore_eos"`
	MinTokens           jsontext.Value `json:"min_tokens"`
	RequestID           jsontext.Value `json:"request_id"`
	EncodingFormat      jsontext.Value `json:"encoding_format"`
	Dimensions          jsontext.Value `json:"dimensions"`
	ResponseFormat      jsontext.Value `json:"response_format"`
}

// promptField is the raw value that PromptHash is about.
func (f *fields) promptField() jsontext.Value {
	for _, v := range []jsontext.Value{f.Messages, f.Prompt, f.Input} {
		if len(v) > 0 {
			return v
		}
	}
	return nil
}

// request is a body that passed the validation of its types.
type request struct {
	route route
	fields
	id        string // without prefix
	model     string // "" when the body names none
	n         int
	maxTokens int
	hasMax    bool
	minTokens int
	ignoreEOS bool
	stream    bool
	usage     bool // stream_options.include_usage
	temperature, topP,
	presence, frequency float64
	topK, logprobs int
}

// readRequest reads and validates a body as far as vLLM does before it looks at
// the model's name.
func (e *Engine) readRequest(r *http.Request, to route) (*request, *apiError) {
	if kind, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";"); !strings.EqualFold(strings.TrimSpace(kind), "application/json") {
		return nil, unsupportedMedia()
	}
	body, err := io.ReadAll(r.Body)
	switch {
	case err != nil, !utf8.Valid(body):
		return nil, detail(http.StatusBadRequest, "There was an error parsing the body")
	case len(body) == 0:
		return nil, missing("body", "None")
	}
	req := &request{route: to}
	if err := json.Unmarshal(body, &req.fields, lenient()); err != nil {
		if e.cfg.Frontend == FrontendPython26 && jsontext.Value(body).Kind() == '[' {
			return nil, internalError("'list' object has no attribute 'get'")
		}
		return nil, badBody(body)
	}
	if fail := req.validate(body); fail != nil {
		return nil, fail
	}
	if id := r.Header.Get("X-Request-Id"); id != "" {
		req.id = id
	}
	return req, nil
}

// badBody tells a body that is not JSON from one that is no object.
func badBody(body []byte) *apiError {
	v := jsontext.Value(bytes.TrimSpace(body))
	if !v.IsValid(lenient()) {
		return malformed(body)
	}
	var c checks
	c.add("model_attributes_type", "body", "Input should be a valid dictionary or object to extract fields from", pyInput(v), "")
	return c.failure()
}

func (q *request) validate(body []byte) *apiError {
	c := &checks{}
	q.validatePrompt(c, body)
	q.model = c.string("model", q.Model)
	q.frequency, _ = c.float("frequency_penalty", q.FrequencyPenalty)
	q.logprobs, _ = c.int("top_logprobs", q.TopLogprobs)
	if q.route == routeCompletion {
		q.logprobs, _ = c.int("logprobs", q.Logprobs)
	}
	q.validateLength(c)
	q.n = 1
	if n, ok := c.int("n", q.N); ok && (q.route == routeChat || q.route == routeCompletion) {
		q.n = n
	}
	q.presence, _ = c.float("presence_penalty", q.PresencePenalty)
	q.stream = c.bool("stream", q.Stream)
	if q.StreamOptions.Kind() == '{' {
		var o struct {
			IncludeUsage bool `json:"include_usage"`
		}
		_ = json.Unmarshal(q.StreamOptions, &o, lenient()) // anything odd counts as false
		q.usage = o.IncludeUsage
	}
	var ok bool
	q.temperature, _ = c.float("temperature", q.Temperature)
	if q.topP, ok = c.float("top_p", q.TopP); !ok {
		q.topP = 1
	}
	q.topK, _ = c.int("top_k", q.TopK)
	q.ignoreEOS = c.bool("ignore_eos", q.IgnoreEOS)
	q.minTokens, _ = c.int("min_tokens", q.MinTokens)
	q.id = c.string("request_id", q.RequestID)
	return c.failure()
}

func (q *request) validatePrompt(c *checks, body []byte) {
	need := func(name string, v jsontext.Value) {
		if len(v) == 0 {
			c.add("missing", "body."+name, "Field required", pyInput(body), "")
		}
	}
	switch q.route {
	case routeChat:
		need("messages", q.Messages)
		if len(q.Messages) > 0 {
			checkMessages(c, q.Messages)
		}
	case routeResponse, routeEmbedding:
		need("input", q.Input)
	}
}

// checkMessages looks for what pydantic refuses: no list, no objects in it, a
// user's content that is null. Unknown roles and absent contents pass.
func checkMessages(c *checks, v jsontext.Value) {
	var list []jsontext.Value
	if v.Kind() != '[' || json.Unmarshal(v, &list, lenient()) != nil {
		c.add("list_type", "body.messages", "Input should be a valid list", pyInput(v), "")
		return
	}
	for i, item := range list {
		loc := "body.messages." + itoa(i)
		if item.Kind() != '{' {
			c.add("dict_type", loc, "Input should be a valid dictionary", pyInput(item), "")
			continue
		}
		var m struct {
			Role    jsontext.Value `json:"role"`
			Content jsontext.Value `json:"content"`
		}
		if json.Unmarshal(item, &m, lenient()) != nil || len(m.Role) == 0 {
			c.add("missing", loc+".role", "Field required", pyInput(item), "")
			continue
		}
		if m.Content.Kind() == 'n' && unquote(m.Role) != "assistant" {
			nullContent(c, loc, unquote(m.Role))
		}
	}
}

// nullContent is the 19 errors with which vLLM refuses a null content: one group
// for every kind of message that it might have been. Only ten are shown.
func nullContent(c *checks, loc, role string) {
	for _, kind := range []string{"Developer", "System", "User", "Assistant", "Tool", "Function"} {
		at := loc + ".ChatCompletion" + kind + "MessageParam"
		if kind != "Assistant" {
			c.add("string_type", at+".content", "Input should be a valid string", "None", "")
			c.add("iterable_type", at+".content", "Input should be iterable", "None", "")
		}
		if want := strings.ToLower(kind); want != role {
			expect := pyQuote(want)
			c.add("literal_error", at+".role", "Input should be "+expect, role, ", 'ctx': {'expected': "+pyQuote(expect)+"}")
		}
	}
	for _, at := range []string{"ChatCompletionToolMessageParam.tool_call_id", "ChatCompletionFunctionMessageParam.name", "Message.author", "Message.channel"} {
		c.add("missing", loc+"."+at, "Field required", "<dict of 2 items>", "")
	}
}

// validateLength finds the field that limits the output of this route.
func (q *request) validateLength(c *checks) {
	q.maxTokens, q.hasMax = c.int("max_tokens", q.MaxTokens)
	switch q.route {
	case routeChat:
		if n, ok := c.int("max_completion_tokens", q.MaxCompletionTokens); ok {
			q.maxTokens, q.hasMax = n, true
		}
	case routeCompletion:
		if !q.hasMax {
			q.maxTokens, q.hasMax = 16, true
		}
	case routeResponse:
		q.maxTokens, q.hasMax = c.int("max_output_tokens", q.MaxOutputTokens)
	}
}
