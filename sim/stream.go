package sim

import (
	"net/http"
	"strconv"
)

// stream is an answer by server-sent events. Its HTTP status is 200 before
// anything is known, so that a failure can only be an event.
type stream struct{ w http.ResponseWriter }

func startStream(w http.ResponseWriter) *stream {
	w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
	w.WriteHeader(http.StatusOK)
	_ = http.NewResponseController(w).Flush() // a client that left finds out by itself
	return &stream{w}
}

func (s *stream) fail(err *apiError) {
	s.w.Write(append(append([]byte("data: "), err.body()...), "\n\ndata: [DONE]\n\n"...))
}

// send writes a whole answer: per choice the role (chat only), all the text, and
// the reason for its end; then the usage, if it was asked for.
func (s *stream) send(a *answer) {
	object := "text_completion"
	if a.q.route == routeChat {
		object = "chat.completion.chunk"
	}
	chunk := func() []byte { return append(append([]byte("data: "), a.head(object)...), `,"choices":[`...) }
	for i, seq := range a.c.seqs {
		index := `{"index":` + strconv.Itoa(i)
		end := `,"finish_reason":"` + finishNames()[seq.reason] + `","stop_reason":null,"token_ids":null}]}` + "\n\n"
		if a.q.route == routeCompletion {
			b := a.text(append(chunk(), index+`,"text":`...), seq)
			s.w.Write(append(b, `,"logprobs":null`+end...))
			continue
		}
		s.w.Write(append(chunk(), index+`,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}`+"\n\n"...))
		b := a.text(append(chunk(), index+`,"delta":{"content":`...), seq)
		s.w.Write(append(b, `},"logprobs":null,"finish_reason":null,"token_ids":null}]}`+"\n\n"...))
		s.w.Write(append(chunk(), index+`,"delta":{"content":""},"logprobs":null`+end...))
	}
	if a.q.usage {
		prompt, made, _ := a.c.usage()
		b := append(chunk(), `],"usage":{"prompt_tokens":`...)
		b = strconv.AppendInt(b, int64(prompt), 10)
		b = strconv.AppendInt(append(b, `,"total_tokens":`...), int64(prompt+made), 10)
		b = strconv.AppendInt(append(b, `,"completion_tokens":`...), int64(made), 10)
		b = quote(append(b, `},"system_fingerprint":`...), a.e.fingerprint)
		s.w.Write(append(b, "}\n\n"...))
	}
	s.w.Write([]byte("data: [DONE]\n\n"))
}
