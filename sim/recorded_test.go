package sim

import (
	"bufio"
	"bytes"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// record is one exchange with real vLLM.
type record struct {
	Name    string            `json:"name"`
	Method  string            `json:"method"`
	Path    string            `json:"path"`
	Sent    map[string]string `json:"request_headers"`
	Request string            `json:"request"`
	Status  int               `json:"status"`
	Headers map[string]string `json:"headers"`
	Body    string            `json:"body"`
}

func readRecords(t *testing.T, path string) (list []record) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r record
		if err := json.Unmarshal(lines.Bytes(), &r, lenient()); err != nil {
			t.Fatal(err)
		}
		list = append(list, r)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return list
}

// unlike are the recorded exchanges that the simulation does not repeat, and why.
func unlike() map[string]string {
	return map[string]string{
		"chat_logprobs":             "no logprobs",
		"comp_logprobs":             "no logprobs",
		"chat_return_token_ids":     "no token ids",
		"err_bad_schema":            "no guided decoding",
		"err_logit_bias":            "no vocabulary",
		"err_token_id_out_of_range": "no vocabulary",
		"err_token_id_negative":     "only the first of pydantic's four errors",
		"get_docs":                  "no such page",
		"get_metrics":               "see TestMetricsAreThoseOfVLLM",
		"messages_basic":            "no Anthropic API",
		"tokenize":                  "no tokenizer",
		"chat_stream":               "see TestStream",
	}
}

// tinyConfig is the server of the recordings: a byte-level tokenizer, 2,048 tokens.
func tinyConfig() Config {
	return Config{Models: []string{"tiny"}, MaxModelLen: 2048, BytesPerToken: 1, NoPrefixCaching: true}
}

func TestBodiesAreThoseOfVLLM(t *testing.T) {
	r := serve(t, tinyConfig())
	for _, rec := range readRecords(t, "../testdata/vllm/vllm-0.32.0-cpu.jsonl") {
		t.Run(rec.Name, func(t *testing.T) {
			if why, ok := unlike()[rec.Name]; ok {
				t.Skip(why)
			}
			if strings.Contains(rec.Request, "characters cut]") {
				t.Skip("the recorded request is not whole")
			}
			req, err := http.NewRequest(rec.Method, r.url+rec.Path, strings.NewReader(rec.Request))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			for k, v := range rec.Sent {
				req.Header.Set(k, v)
			}
			if rec.Name == "err_text_plain" {
				req.Header.Set("Content-Type", "text/plain")
			}
			got := r.do(req)
			if got.err != nil || got.status != rec.Status {
				t.Fatalf("got %d %s, error %v; want %d %s", got.status, got.body, got.err, rec.Status, rec.Body)
			}
			for k, v := range rec.Headers {
				if got.header.Get(k) != v {
					t.Errorf("header %s is %q, want %q", k, got.header.Get(k), v)
				}
			}
			if rec.Status != http.StatusOK {
				if string(got.body) != rec.Body {
					t.Errorf("got  %s\nwant %s", got.body, rec.Body)
				}
				return
			}
			sameAnswer(t, got.body, []byte(rec.Body))
		})
	}
}

// sameAnswer compares two answers field by field, in order. What is random or
// ours may differ in value.
func sameAnswer(t *testing.T, got, want []byte) {
	t.Helper()
	free := []string{"id", "created", "created_at", "content", "text", "system_fingerprint", "root", "version"}
	if bytes.Contains(want, []byte(`"finish_reason":"stop"`)) {
		free = append(free, "finish_reason", "completion_tokens", "total_tokens")
	}
	g, w := flatten(t, got, free), flatten(t, want, free)
	if !slices.Equal(g, w) {
		t.Errorf("got  %s\nwant %s", g, w)
	}
}

// flatten lists every value of a document with its path, or, where the last
// name of the path is free, the kind of value.
func flatten(t *testing.T, doc []byte, free []string) (list []string) {
	t.Helper()
	d := jsontext.NewDecoder(bytes.NewReader(doc), lenient())
	for {
		tok, err := d.ReadToken()
		if err != nil {
			return list
		}
		value := tok.String()
		path := string(d.StackPointer())
		if kind, n := d.StackIndex(d.StackDepth()); kind == '{' && n%2 == 1 {
			continue // a name
		}
		if slices.Contains(free, path[strings.LastIndex(path, "/")+1:]) {
			value = fmt.Sprintf("any %v", tok.Kind())
		}
		list = append(list, path+"="+value)
	}
}

func TestRequestIDs(t *testing.T) {
	r := serve(t, tinyConfig())
	if id := r.post(chatPath, chat("x", `, "request_id": "mine"`)).ok(t).ID; id != "chatcmpl-mine" {
		t.Errorf("id is %s", id)
	}
	for path, prefix := range map[string]string{chatPath: "chatcmpl-", "/v1/completions": "cmpl-", "/v1/responses": "resp_"} {
		req, _ := http.NewRequest(http.MethodPost, r.url+path, strings.NewReader(
			`{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "max_tokens": 1, "request_id": "mine"}`))
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("X-Request-Id", "theirs")
		if id := r.do(req).ok(t).ID; id != prefix+"theirs" {
			t.Errorf("%s: id is %s", path, id)
		}
	}
}

func TestContext(t *testing.T) {
	r := serve(t, tinyConfig())
	// The template of the recordings is 18 tokens around the text.
	long := func(tokens int) string { return strings.Repeat("x", tokens-18) }
	cut := r.post(chatPath, chat(long(1918), `, "max_tokens": 1000, "ignore_eos": true`)).ok(t)
	if cut.Usage.Completion != 130 || cut.Usage.Total != 2048 || cut.Choices[0].FinishReason != "length" {
		t.Errorf("prompt + max_tokens over the context: %+v", cut)
	}
	want := badRequest("input_tokens", "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input tokens, "+
		"which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. (parameter=input_tokens, value=2049)")
	r.post(chatPath, chat(long(5000), "")).is(t, want)
	r.post("/v1/completions", `{"prompt": "`+long(5000)+`"}`).is(t, want)
	if got := r.post(chatPath, chat(long(2048), "")); got.status != http.StatusBadRequest {
		t.Errorf("a prompt that leaves no room: %d", got.status)
	}
}

func TestMalformedBodies(t *testing.T) {
	r := serve(t, tinyConfig())
	for body, want := range map[string]string{
		`{"a": 1 "b": 2}`:           "body.8 Expecting ',' delimiter",
		`{"a" 1}`:                   "body.5 Expecting ':' delimiter",
		`{"a": `:                    "body.6 Expecting value",
		`{"a": tru}`:                "body.6 Expecting value",
		`{1: 2}`:                    "body.1 Expecting property name enclosed in double quotes",
		`{"messages": []} {}`:       "body.17 Extra data",
		`{"messages": ["é", oops]}`: "body.19 Expecting value",
		`{"messages": [1 2]}`:       "body.16 Expecting ',' delimiter",
	} {
		loc, msg, _ := strings.Cut(want, " ")
		var c checks
		c.add("json_invalid", loc, "JSON decode error", "<dict of 0 items>", ", 'ctx': {'error': "+pyQuote(msg)+"}")
		t.Run(body, func(t *testing.T) { r.post(chatPath, body).is(t, c.failure()) })
	}
	r.post(chatPath, "{\"messages\": \"\xff\"}").is(t, detail(http.StatusBadRequest, "There was an error parsing the body"))
}

func TestBodiesAreReadLikePydantic(t *testing.T) {
	r := serve(t, tinyConfig())
	for more, kind := range map[string]string{
		`, "max_tokens": "7"`: "", `, "max_tokens": 7.0`: "", `, "max_tokens": null`: "", `, "temperature": "1"`: "", `, "stream": "off"`: "",
		`, "max_tokens": 7.5`: "int_from_float", `, "max_tokens": []`: "int_type", `, "temperature": {}`: "float_type",
		`, "ignore_eos": "maybe"`: "bool_parsing", `, "ignore_eos": []`: "bool_type", `, "model": 7`: "string_type",
	} {
		got := r.post(chatPath, chat("x", more))
		if kind == "" {
			got.ok(t)
		} else if got.status != http.StatusBadRequest || !bytes.Contains(got.body, []byte("'type': '"+kind+"'")) {
			t.Errorf("%s: %d %s, want %s", more, got.status, got.body, kind)
		}
	}
	for body, want := range map[string]string{
		`{"messages": "hello"}`:        `"param":"body.messages"`,
		`{"messages": [1]}`:            `"param":"body.messages.0"`,
		`{"messages": [{}]}`:           `"param":"body.messages.0.role"`,
		`{"n": "x", "max_tokens": []}`: `3 validation errors:`,
	} {
		if got := r.post(chatPath, body); got.status != http.StatusBadRequest || !bytes.Contains(got.body, []byte(want)) {
			t.Errorf("%s: %d %s, want %s", body, got.status, got.body, want)
		}
	}
}

func TestKey(t *testing.T) {
	cfg := tinyConfig()
	cfg.APIKey = "secret"
	r := serve(t, cfg)
	for header, status := range map[string]int{"": 401, "Bearer wrong": 401, "secret": 401, "Bearer secret": 200, "bearer secret": 200} {
		req, _ := http.NewRequest(http.MethodGet, r.url+"/v1/models", nil)
		req.Header.Set("Authorization", header)
		if got := r.do(req); got.status != status {
			t.Errorf("%q: %d, want %d", header, got.status, status)
		} else if status == 401 {
			got.is(t, unauthorized())
		}
	}
	r.get("/sim/faults").is(t, unauthorized())
	if got := r.get("/health"); got.status != http.StatusOK {
		t.Errorf("/health without key: %d", got.status)
	}
}

func TestVersionSaysSimulated(t *testing.T) {
	r := serve(t, Config{})
	if got := r.get("/version"); string(got.body) != `{"version":"0.32.0-sim"}` {
		t.Errorf("/version: %s", got.body)
	}
}

func TestStream(t *testing.T) {
	r := serve(t, tinyConfig())
	body := chat("Say hello to the mill race.", `, "max_tokens": 4, "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true`)
	got := r.post(chatPath, body)
	recs := readRecords(t, "../testdata/vllm/vllm-0.32.0-cpu.jsonl")
	rec := recs[slices.IndexFunc(recs, func(r record) bool { return r.Name == "chat_stream" })]
	if got.header.Get("Content-Type") != rec.Headers["content-type"] {
		t.Errorf("content type %s", got.header.Get("Content-Type"))
	}
	shapes := func(body string) map[string]bool {
		m := map[string]bool{}
		for _, event := range strings.Split(strings.TrimSpace(body), "\n\n") {
			m[strings.Join(flatten(t, []byte(strings.TrimPrefix(event, "data: ")), []string{"id", "created", "content", "system_fingerprint"}), " ")] = true
		}
		return m
	}
	if g, w := shapes(string(got.body)), shapes(rec.Body); !maps.Equal(g, w) {
		t.Errorf("got events %v\nwant %v", g, w)
	}
	if !strings.HasSuffix(string(got.body), "data: [DONE]\n\n") {
		t.Error("no [DONE]")
	}
}
