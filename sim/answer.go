package sim

import (
	"encoding/base64"
	"encoding/binary"
	"math"
	"strconv"
	"time"
)

// answer is a finished call on its way into JSON. The fields and their order are
// those of vLLM 0.32.0.
type answer struct {
	e       *Engine
	q       *request
	c       *call
	id      string
	hash    string
	created int64 // Unix time
}

func (e *Engine) newAnswer(q *request, c *call) *answer {
	id := q.id
	if id == "" {
		id = randomID()
	}
	prefix := [...]string{routeChat: "chatcmpl-", routeCompletion: "cmpl-", routeResponse: "resp_", routeEmbedding: "embd-"}
	return &answer{e: e, q: q, c: c, id: prefix[q.route] + id, hash: hashValue(q.promptField()), created: time.Now().Unix()}
}

func (a *answer) body() []byte {
	switch a.q.route {
	case routeChat:
		return a.chat()
	case routeCompletion:
		return a.completion()
	case routeResponse:
		return a.response()
	}
	return a.embedding()
}

// text appends the text of one choice as a JSON string. It needs no escapes.
func (a *answer) text(b []byte, s *sequence) []byte {
	b = append(b, '"')
	b = appendText(b, a.hash, s.choice, s.made*a.e.cfg.BytesPerToken)
	return append(b, '"')
}

// head begins the body: id, object, created, model.
func (a *answer) head(object string) []byte {
	size := 1024
	for _, s := range a.c.seqs {
		size += 256 + s.made*a.e.cfg.BytesPerToken
	}
	b := make([]byte, 0, size)
	b = quote(append(b, `{"id":`...), a.id)
	b = append(b, `,"object":"`+object+`","created":`...)
	b = strconv.AppendInt(b, a.created, 10)
	return quote(append(b, `,"model":`...), a.e.cfg.Models[0])
}

// usage appends the usage of the whole call. A prompt counts once for all its choices.
func (a *answer) usage(b []byte) []byte {
	prompt, made, cached := a.c.usage()
	b = append(b, `"usage":{"prompt_tokens":`...)
	b = strconv.AppendInt(b, int64(prompt), 10)
	b = strconv.AppendInt(append(b, `,"total_tokens":`...), int64(prompt+made), 10)
	b = strconv.AppendInt(append(b, `,"completion_tokens":`...), int64(made), 10)
	b = append(b, `,"prompt_tokens_details":`...)
	if a.e.cfg.NoPrefixCaching {
		b = append(b, "null"...)
	} else {
		b = strconv.AppendInt(append(b, `{"cached_tokens":`...), int64(cached), 10)
		b = append(b, '}')
	}
	return append(b, `,"completion_tokens_details":null}`...)
}

func (c *call) usage() (prompt, made, cached int) {
	for i, s := range c.seqs {
		made += s.made
		if i%c.choices == 0 {
			prompt += s.prompt
			cached += max(s.cached, 0)
		}
	}
	return prompt, made, cached
}

func (a *answer) chat() []byte {
	b := append(a.head("chat.completion"), `,"choices":[`...)
	for i, s := range a.c.seqs {
		b = comma(b, i)
		b = strconv.AppendInt(append(b, `{"index":`...), int64(i), 10)
		b = a.text(append(b, `,"message":{"role":"assistant","content":`...), s)
		b = append(b, `,"refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"`...)
		b = append(b, finishNames()[s.reason]...)
		b = append(b, `","stop_reason":null,"token_ids":null,"routed_experts":null}`...)
	}
	b = quote(append(b, `],"service_tier":null,"system_fingerprint":`...), a.e.fingerprint)
	b = a.usage(append(b, ','))
	return append(b, `,"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}`...)
}

func (a *answer) completion() []byte {
	b := append(a.head("text_completion"), `,"choices":[`...)
	for i, s := range a.c.seqs {
		b = comma(b, i)
		b = strconv.AppendInt(append(b, `{"index":`...), int64(i), 10)
		b = a.text(append(b, `,"text":`...), s)
		b = append(b, `,"logprobs":null,"finish_reason":"`...)
		b = append(b, finishNames()[s.reason]...)
		b = append(b, `","stop_reason":null,"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}`...)
	}
	b = quote(append(b, `],"service_tier":null,"system_fingerprint":`...), a.e.fingerprint)
	b = a.usage(append(b, ','))
	return append(b, `,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}`...)
}

func (a *answer) response() []byte {
	s := a.c.seqs[0]
	status, why := "completed", "null"
	if s.reason != finishStop {
		status, why = "incomplete", `{"reason":"max_output_tokens"}`
	}
	prompt, made, cached := a.c.usage()
	b := quote([]byte(`{"id":`), a.id)
	b = strconv.AppendInt(append(b, `,"created_at":`...), a.created, 10)
	b = append(b, `,"incomplete_details":`+why+`,"instructions":null,"metadata":null,"model":`...)
	b = quote(b, a.e.cfg.Models[0])
	b = append(b, `,"object":"response","output":[{"id":"msg_`+randomID()+`","content":[{"annotations":[],"text":`...)
	b = a.text(b, s)
	b = append(b, `,"type":"output_text","logprobs":null}],"role":"assistant","status":"completed","type":"message","phase":null}],`...)
	b = append(b, `"parallel_tool_calls":true,"temperature":1.0,"tool_choice":"none","tools":[],"top_p":1.0,"background":false,"max_output_tokens":`...)
	b = strconv.AppendInt(b, int64(a.c.maxTokens), 10)
	b = append(b, `,"max_tool_calls":null,"previous_response_id":null,"prompt":null,"reasoning":null,"service_tier":"auto","status":"`+status+`",`...)
	b = append(b, `"text":null,"top_logprobs":null,"truncation":"disabled","usage":{"input_tokens":`...)
	b = strconv.AppendInt(b, int64(prompt), 10)
	b = strconv.AppendInt(append(b, `,"input_tokens_details":{"cached_tokens":`...), int64(cached), 10)
	b = append(b, `,"cache_write_tokens":0,"input_tokens_per_turn":[],"cached_tokens_per_turn":[]},"output_tokens":`...)
	b = strconv.AppendInt(b, int64(made), 10)
	b = append(b, `,"output_tokens_details":{"reasoning_tokens":0,"tool_output_tokens":0,"output_tokens_per_turn":[],"tool_output_tokens_per_turn":[]},`...)
	b = strconv.AppendInt(append(b, `"total_tokens":`...), int64(prompt+made), 10)
	return append(b, `},"user":null,"presence_penalty":0.0,"frequency_penalty":0.0,"kv_transfer_params":null,"ec_transfer_params":null,"input_messages":null,"output_messages":null}`...)
}

func (a *answer) embedding() []byte {
	b := append(a.head("list"), `,"data":[`...)
	for i := range a.c.seqs {
		hash := a.hash
		if i > 0 {
			hash += "/" + itoa(i)
		}
		b = comma(b, i)
		b = strconv.AppendInt(append(b, `{"index":`...), int64(i), 10)
		b = append(b, `,"object":"embedding","embedding":`...)
		b = appendVector(b, Embedding(hash, a.e.cfg.EmbeddingDim), unquote(a.q.EncodingFormat) == "base64")
		b = append(b, '}')
	}
	b = a.usage(append(b, "],"...))
	return append(b, '}')
}

func appendVector(b []byte, v []float64, asBase64 bool) []byte {
	if asBase64 {
		raw := make([]byte, 0, 4*len(v))
		for _, f := range v {
			raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(float32(f)))
		}
		return append(base64.StdEncoding.AppendEncode(append(b, '"'), raw), '"')
	}
	b = append(b, '[')
	for i, f := range v {
		b = strconv.AppendFloat(comma(b, i), f, 'g', -1, 64)
	}
	return append(b, ']')
}

func comma(b []byte, i int) []byte {
	if i > 0 {
		b = append(b, ',')
	}
	return b
}
