package worker

import (
	"strings"
	"testing"

	"millrace/proto"
)

// TestAgainst holds answers that are whole against what was asked for.
func TestAgainst(t *testing.T) {
	const chat, text, embed, responses = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"
	choice := `{"message":{"content":"x"},"text":"x","finish_reason":"length"}`
	answer := func(choices, tokens string) string {
		return `{"choices":[` + choices + `],"usage":{"prompt_tokens":9,"completion_tokens":` + tokens + `}}`
	}
	for _, c := range []struct {
		name, url, asks, answer string
		class                   class
		cut                     bool
	}{
		{"as asked", chat, `{"max_tokens":8}`, answer(choice, "8"), classDone, false},
		{"cut", chat, `{"max_tokens":8}`, answer(choice, "7"), classDone, true},
		{"cut before the first", chat, `{"max_tokens":8}`, answer(choice, "0"), classDone, true},
		{"the newer name counts", chat, `{"max_completion_tokens":5,"max_tokens":8}`, answer(choice, "5"), classDone, false},
		{"in either order", chat, `{"max_tokens":8,"max_completion_tokens":5}`, answer(choice, "5"), classDone, false},
		{"no limit", chat, `{}`, answer(choice, "7"), classDone, false},
		{"it ended by itself", chat, `{"max_tokens":8}`, strings.Replace(answer(choice, "7"), "length", "stop", 1), classDone, false},
		{"not counted", chat, `{"max_tokens":8}`, `{"choices":[` + choice + `]}`, classDone, false},
		{"two, one cut", chat, `{"n":2,"max_tokens":8}`, answer(choice+","+choice, "12"), classDone, true},
		{"two, one ended", chat, `{"n":2,"max_tokens":8}`, answer(choice+","+strings.Replace(choice, "length", "stop", 1), "12"), classDone, false},
		{"one of two", chat, `{"n":2}`, answer(choice, "8"), classRetry, false},
		{"more than asked", chat, `{}`, answer(choice+","+choice, "8"), classDone, false},
		{"prompts", text, `{"prompt":["a","b"]}`, answer(choice+","+choice, "8"), classDone, false},
		{"one of two prompts", text, `{"prompt":["a","b"]}`, answer(choice, "8"), classRetry, false},
		{"one prompt of tokens", text, `{"prompt":[1,2,3]}`, answer(choice, "8"), classDone, false},
		{"prompts of tokens", text, `{"prompt":[[1,2],[3]],"n":2}`, answer(choice+","+choice+","+choice, "8"), classRetry, false},
		{"response", responses, `{"max_output_tokens":8,"input":["a","b"]}`,
			`{"status":"incomplete","incomplete_details":{"reason":"max_output_tokens"},"output":[],"usage":{"input_tokens":9,"output_tokens":7}}`, classDone, true},
		{"filtered response", responses, `{"max_output_tokens":8}`,
			`{"status":"incomplete","incomplete_details":{"reason":"content_filter"},"output":[],"usage":{"input_tokens":9,"output_tokens":7}}`, classDone, false},
		{"response of nothing", responses, `{}`, `{"status":"completed","output":[],"usage":{"input_tokens":9,"output_tokens":0}}`, classRetry, false},
		{"embedding", embed, `{"input":"a"}`, `{"data":[{"embedding":[1]}]}`, classDone, false},
		{"base64", embed, `{"input":[1,2]}`, `{"data":[{"embedding":"AAA="}]}`, classDone, false},
		{"one of two embeddings", embed, `{"input":["a","b"]}`, `{"data":[{"embedding":[1]}]}`, classRetry, false},
		{"no embeddings", embed, `{"input":"a"}`, `{"data":[]}`, classRetry, false},
		{"empty vector", embed, `{"input":"a"}`, `{"data":[{"embedding": []}]}`, classRetry, false},
		{"empty base64", embed, `{"input":"a"}`, `{"data":[{"embedding": ""}]}`, classRetry, false},
		{"null vector", embed, `{"input":["a","b"]}`, `{"data":[{"embedding":[1]},{"embedding":null}]}`, classRetry, false},
		{"score", "/v1/score", `{"text_1":"a","text_2":["b","c"]}`, `{"data":[{"index":0,"score":0.5}]}`, classDone, false},
		{"not JSON", chat, `[`, answer(choice, "8"), classDone, false},
	} {
		v := classify(c.url, Answer{Status: 200, Body: []byte(c.answer)}, nil)
		if v.class == classDone {
			v = v.against(readDemand([]byte(c.asks)), c.url)
		}
		if v.class != c.class || v.cut != c.cut || (v.class == classDone) != (v.code == "") {
			t.Errorf("%s: %v %s, cut %v (%s), want %v, cut %v", c.name, v.class, v.code, v.cut, v.message, c.class, c.cut)
		}
	}
}

// TestEmptyAnswers: what holds nothing is no answer; a text of no length is one.
func TestEmptyAnswers(t *testing.T) {
	for choice, want := range map[string]class{
		`"message":{"content":null,"reasoning":null}`:                       classRetry, // the Rust frontend, to a bad schema
		`"message":{"content":null,"tool_calls":[],"refusal":null}`:         classRetry,
		`"message":{"content":null,"tool_calls":null,"function_call":null}`: classRetry,
		`"message":{"role":"assistant"}`:                                    classRetry,
		`"message":{"content":null,"reasoning": ""}`:                        classRetry,
		`"message":null`:           classRetry,
		`"index":0`:                classRetry,
		`"text":null`:              classRetry,
		`"text": ""`:               classDone,
		`"message":{"content":""}`: classDone,
		`"message":{"content":[{"type":"text","text":"x"}]}`:                  classDone,
		`"message":{"content":null,"tool_calls":[{"id":"1"}]}`:                classDone,
		`"message":{"content":null,"function_call":{"name":"f"}}`:             classDone,
		`"message":{"content":null,"reasoning":"hm"}`:                         classDone,
		`"message":{"content":null,"reasoning_content":"hm"}`:                 classDone,
		`"message":{"content":null,"refusal":"no"}`:                           classDone,
		`"message":{"content":null,"audio":{"id":"a"}}`:                       classDone,
		`"text":"x"},{"message":{"content":null}`:                             classRetry, // the second choice
		`"text":"x"},{"message":{"content":null},"finish_reason":"abort"`:     classLost,
		`"message":{"content":null,"tool_calls":[{"id":"1"}],"refusal":null}`: classDone,
	} {
		body := `{"choices":[{` + choice + `,"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":0}}`
		if v := classify("", Answer{Status: 200, Body: []byte(body)}, nil); v.class != want || want == classRetry && v.code != proto.CodeBadResponse {
			t.Errorf("%s: %v %s %s, want %v", choice, v.class, v.code, v.message, want)
		}
	}
}
