package sim

import (
	"encoding/binary"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// The chat template: special tokens are one byte each, so that a template costs
// about as many tokens as real ones do.
const (
	tokenBOS  = "\x01"
	tokenTurn = "\x02"
)

// render returns the prompts of a request as the engine sees them: one, or for
// a list of them several.
func (e *Engine) render(q *request) ([]string, *apiError) {
	switch q.route {
	case routeChat:
		return e.renderChat(q)
	case routeResponse:
		if q.Input.Kind() == '"' {
			return []string{template([]message{{role: "user", text: unquote(q.Input)}})}, nil
		}
		msgs, fail := e.messages(q.Input)
		return []string{template(msgs)}, fail
	case routeCompletion:
		if len(q.Prompt) == 0 || q.Prompt.Kind() == 'n' || string(q.Prompt) == `""` {
			return nil, badRequest("prompt", "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)")
		}
		return e.renderTexts("prompt", q.Prompt)
	}
	return e.renderTexts("input", q.Input)
}

func (e *Engine) renderChat(q *request) ([]string, *apiError) {
	msgs, fail := e.messages(q.Messages)
	switch {
	case fail != nil:
		return nil, fail
	case len(msgs) == 0:
		return nil, badRequest("", "Cannot apply chat template to an empty conversation. Provide at least one message.")
	case q.Tools.Kind() == '[' && string(q.ToolChoice) != `"none"`:
		return nil, badRequest("", `"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set`)
	}
	return []string{template(msgs)}, nil
}

type message struct{ role, text string }

func template(msgs []message) string {
	var b strings.Builder
	b.WriteString(tokenBOS)
	for _, m := range append(msgs, message{role: "assistant"}) {
		b.WriteString(tokenTurn)
		b.WriteString(m.role)
		b.WriteByte('\n')
		b.WriteString(m.text)
	}
	return b.String()
}

func (e *Engine) messages(v jsontext.Value) ([]message, *apiError) {
	var list []struct {
		Role    jsontext.Value `json:"role"`
		Content jsontext.Value `json:"content"`
	}
	if err := json.Unmarshal(v, &list, lenient()); err != nil {
		return nil, badRequest("", "%v", err)
	}
	msgs := make([]message, len(list))
	for i, m := range list {
		text, fail := e.content(m.Content)
		if fail != nil {
			return nil, fail
		}
		msgs[i] = message{role: unquote(m.Role), text: text}
	}
	return msgs, nil
}

// content is the text of a message, written as a string or as a list of parts.
func (e *Engine) content(v jsontext.Value) (string, *apiError) {
	switch v.Kind() {
	case '"':
		return unquote(v), nil
	case '[':
	default:
		return "", nil
	}
	var parts []struct {
		Type string         `json:"type"`
		Text jsontext.Value `json:"text"`
	}
	if err := json.Unmarshal(v, &parts, lenient()); err != nil {
		return "", badRequest("", "%v", err)
	}
	var text []string
	for _, p := range parts {
		switch p.Type {
		case "image_url", "input_image", "input_audio", "audio_url", "video_url":
			return "", badRequest("", "%s is not a multimodal model", e.cfg.Models[0])
		}
		text = append(text, unquote(p.Text))
	}
	return strings.Join(text, "\n"), nil
}

// renderTexts reads a prompt that is a text, a list of token ids, or a list of either.
func (e *Engine) renderTexts(field string, v jsontext.Value) ([]string, *apiError) {
	if v.Kind() == '"' {
		if string(v) == `""` {
			return nil, badRequest("", "You must pass at least one prompt")
		}
		return []string{unquote(v)}, nil
	}
	var list []jsontext.Value
	if v.Kind() != '[' || json.Unmarshal(v, &list, lenient()) != nil {
		var c checks
		c.add("string_type", "body."+field, "Input should be a valid string", pyInput(v), "")
		return nil, c.failure()
	}
	if len(list) == 0 {
		return nil, badRequest("", "You must pass at least one prompt")
	}
	if list[0].Kind() == '0' {
		text, fail := e.tokens(field, v)
		return []string{text}, fail
	}
	texts := make([]string, len(list))
	for i, item := range list {
		if item.Kind() == '"' {
			texts[i] = unquote(item)
			continue
		}
		text, fail := e.tokens(field+"."+itoa(i), item)
		if fail != nil {
			return nil, fail
		}
		texts[i] = text
	}
	return texts, nil
}

// tokens turns token ids into as much text as they stand for.
func (e *Engine) tokens(field string, v jsontext.Value) (string, *apiError) {
	var ids []int64
	if err := json.Unmarshal(v, &ids); err != nil {
		var c checks
		c.add("list_type", "body."+field, "Input should be a valid list", pyInput(v), "")
		return "", c.failure()
	}
	text := make([]byte, 0, len(ids)*e.cfg.BytesPerToken)
	var word [8]byte
	for i, id := range ids {
		if id < 0 {
			var c checks
			c.add("greater_than_equal", "body."+field+"."+itoa(i), "Input should be greater than or equal to 0", itoa(int(id)), ", 'ctx': {'ge': 0}")
			return "", c.failure()
		}
		binary.LittleEndian.PutUint64(word[:], uint64(id))
		for j := range e.cfg.BytesPerToken {
			text = append(text, word[j%len(word)])
		}
	}
	return string(text), nil
}

// checkPrompt refuses what leaves no room for an output.
func (e *Engine) checkPrompt(q *request, texts []string) *apiError {
	limit := e.cfg.MaxModelLen
	if q.hasMax && q.maxTokens > limit && e.cfg.Frontend != FrontendRust {
		return badRequest("max_tokens", "max_tokens=%d cannot be greater than max_model_len=%d. "+
			"Please request fewer output tokens. (parameter=max_tokens, value=%d)", q.maxTokens, limit, q.maxTokens)
	}
	for _, text := range texts {
		switch n := e.countTokens(text); {
		case n > limit:
			return badRequest("input_tokens", "This model's maximum context length is %d tokens. However, your prompt "+
				"contains at least %d input tokens, which exceeds this limit even without any output tokens. "+
				"Please reduce the length of the input prompt. (parameter=input_tokens, value=%d)", limit, limit+1, limit+1)
		case n == limit && q.route != routeEmbedding:
			return badRequest("", "The decoder prompt (length %d) plus the number of requested output tokens (at least 1) "+
				"is longer than the maximum model length of %d. Make sure that `max_model_len` is no smaller than the "+
				"number of text tokens (prompt + requested output tokens).", n, limit)
		}
	}
	return e.checkContext(q, texts)
}

func (e *Engine) countTokens(text string) int {
	return (len(text) + e.cfg.BytesPerToken - 1) / e.cfg.BytesPerToken
}

const (
	maxLogprobs = 20    // --max-logprobs
	maxChoices  = 16384 // VLLM_MAX_N_SEQUENCES
)

// checkSampling is the verification of vLLM's SamplingParams, in its order.
func (q *request) checkSampling() *apiError {
	valued := func(name, text, value string) *apiError {
		return badRequest(name, "%s, got %s. (parameter=%s, value=%s)", text, value, name, value)
	}
	switch {
	case q.n < 1:
		return badRequest("", "n must be at least 1, got %d.", q.n)
	case q.n > maxChoices:
		return badRequest("", "n must be at most %d, got %d. To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable.", maxChoices, q.n)
	case q.presence < -2 || q.presence > 2:
		return badRequest("", "presence_penalty must be in [-2, 2], got %s.", pyFloat(q.presence))
	case q.frequency < -2 || q.frequency > 2:
		return badRequest("", "frequency_penalty must be in [-2, 2], got %s.", pyFloat(q.frequency))
	case q.temperature < 0:
		return valued("temperature", "temperature must be non-negative", pyFloat(q.temperature))
	case q.temperature > 2:
		return valued("temperature", "temperature must be in [0, 2]", pyFloat(q.temperature))
	case q.topP <= 0 || q.topP > 1:
		return valued("top_p", "top_p must be in (0, 1]", pyFloat(q.topP))
	case q.topK < -1:
		return badRequest("", "top_k must be 0 (disable), or at least 1, got %d.", q.topK)
	case q.hasMax && q.maxTokens < 1:
		return valued("max_tokens", "max_tokens must be at least 1", itoa(q.maxTokens))
	case q.minTokens < 0:
		return badRequest("", "min_tokens must be greater than or equal to 0, got %d.", q.minTokens)
	case q.hasMax && q.minTokens > q.maxTokens:
		return badRequest("", "min_tokens must be less than or equal to max_tokens=%d, got %d.", q.maxTokens, q.minTokens)
	case q.logprobs > maxLogprobs:
		return badRequest("logprobs", "Requested sample logprobs of %d, which is greater than max allowed: %d (parameter=logprobs, value=%d)",
			q.logprobs, maxLogprobs, q.logprobs)
	}
	return nil
}
