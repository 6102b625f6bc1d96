package worker

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"millrace/proto"
	"millrace/worker/load"
)

var update = flag.Bool("update", false, "write the golden files anew")

func (c class) String() string {
	return [...]string{"done", "permanent", "retry", "timeout", "busy", "lost", "no-model", "denied", "unreached", "dead", "broken"}[c]
}

// recorded is one exchange with a real engine.
type recorded struct {
	File    string            `json:"-"`
	Name    string            `json:"name"`
	Method  string            `json:"method"`
	Path    string            `json:"path"`
	Request string            `json:"request"`
	Status  int               `json:"status"`
	Headers map[string]string `json:"headers"`
	Body    string            `json:"body"`

	// Of those that were not recorded but read in an engine's source.
	Source string `json:"source"`
	Class  string `json:"class"`
	Code   string `json:"code"`
}

func (r *recorded) answer() Answer {
	h := http.Header{}
	for k, v := range r.Headers {
		h.Set(k, v)
	}
	return Answer{Status: r.Status, Header: h, Body: []byte(r.Body)}
}

// recordings returns all that was recorded from real engines.
func recordings(tb testing.TB) []recorded { return exchanges(tb, "../testdata/vllm/*.jsonl", 3) }

// exchanges reads n files.
func exchanges(tb testing.TB, pattern string, n int) []recorded {
	tb.Helper()
	files, err := filepath.Glob(pattern)
	must(tb, err)
	if len(files) != n {
		tb.Fatalf("%d files are %s, want %d", len(files), pattern, n)
	}
	var out []recorded
	for _, name := range files {
		f, err := os.Open(name)
		must(tb, err)
		sc := bufio.NewScanner(f)
		sc.Buffer(nil, 1<<20)
		for sc.Scan() {
			var r recorded
			must(tb, json.Unmarshal(sc.Bytes(), &r))
			r.File = strings.TrimSuffix(filepath.Base(name), ".jsonl")
			out = append(out, r)
		}
		must(tb, sc.Err())
		f.Close()
	}
	return out
}

// recording returns the exchange of that name.
func recording(tb testing.TB, file, name string) recorded {
	tb.Helper()
	all := recordings(tb)
	i := slices.IndexFunc(all, func(r recorded) bool { return r.File == file && r.Name == name })
	if i < 0 {
		tb.Fatalf("no recording %s of %s", name, file)
	}
	return all[i]
}

// TestClassifyRecordings judges every recorded answer, byte for byte, and compares with what a person has read over.
func TestClassifyRecordings(t *testing.T) {
	var b strings.Builder
	for _, r := range recordings(t) {
		if r.Method != http.MethodPost {
			continue
		}
		v := classify(r.Path, r.answer(), nil)
		fmt.Fprintf(&b, "%s\t%s\t%d\t%v\t%s\t%s", r.File, r.Name, r.Status, v.class, v.code, v.finish)
		if v.class == classDone {
			v = v.against(readDemand([]byte(r.Request)), r.Path)
			fmt.Fprintf(&b, "\t%d+%d", v.usage.Prompt, v.usage.Completion)
			if v.cut {
				b.WriteString("\tcut")
			}
			if want := proto.ReadUsage([]byte(r.Body)); v.usage != want {
				t.Errorf("%s %s: usage %+v, proto reads %+v", r.File, r.Name, v.usage, want)
			}
			if v.id == "" {
				t.Errorf("%s %s: no id", r.File, r.Name)
			}
		} else if v.message == "" {
			t.Errorf("%s %s: no message", r.File, r.Name)
		}
		b.WriteString("\n")
	}
	const golden = "testdata/classified.tsv"
	if *update {
		must(t, os.WriteFile(golden, []byte(b.String()), 0o644))
	}
	want, err := os.ReadFile(golden)
	must(t, err)
	if got := b.String(); got != string(want) {
		t.Errorf("verdicts differ from %s; got\n%s", golden, got)
	}
}

// judged is the verdict on an exchange.
func (r *recorded) judged() verdict {
	v := classify(r.Path, r.answer(), nil)
	if v.class == classDone {
		v = v.against(readDemand([]byte(r.Request)), r.Path)
	}
	return v
}

// TestClassifyEngines judges what other engines say, as their sources tell.
func TestClassifyEngines(t *testing.T) {
	all := exchanges(t, "../testdata/engines/*.jsonl", 4)
	for _, r := range all {
		v := r.judged()
		if v.class.String() != r.Class || v.code != r.Code || r.Source == "" {
			t.Errorf("%s, %s: %v %q, want %s %q (%s)", r.File, r.Name, v.class, v.code, r.Class, r.Code, r.Source)
		}
		if v.class != classDone && v.message == "" {
			t.Errorf("%s, %s: no message", r.File, r.Name)
		}
		if wait := r.Headers["Retry-After"]; (wait != "") != (v.delay > 0) {
			t.Errorf("%s, %s: a delay of %v for Retry-After %q", r.File, r.Name, v.delay, wait)
		}
	}
	t.Logf("%d answers", len(all))
}

// TestReadInPlace: whoever looks into a body leaves it as it is, whatever it holds and wherever it is torn.
func TestReadInPlace(t *testing.T) {
	bodies := []string{aborted, coreDied, `{"error":"x","id":"\u0041\ud800","choices":[1,{"finish_reason":"st\u006fp"}],"usage":{"a":"\n"}} more`,
		`{"max_tokens":5,"n":2,"id":"\xff"}`, "{\"id\":\"\xff\"}", "", "[", "{"}
	for _, r := range recordings(t) {
		bodies = append(bodies, r.Body, r.Request)
	}
	for _, want := range bodies {
		for _, n := range []int{len(want), len(want) * 2 / 3, len(want) / 3} {
			body := []byte(want[:n])
			_, _ = readReply(body) // whether it can be read does not matter here
			readDemand(body)
			if string(body) != want[:n] {
				t.Errorf("%q became %q", want[:n], body)
			}
		}
	}
}

const (
	coreDied  = `{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root cause.","type":"InternalServerError","param":null,"code":500}}`
	stopping  = `{"error":{"message":"cannot schedule new futures after shutdown","type":"InternalServerError","param":null,"code":500}}`
	overload  = `{"error":{"message":"The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.","type":"Service Unavailable","param":null,"code":503}}`
	aborted   = `{"id":"c","choices":[{"index":0,"message":{"content":"par"},"finish_reason":"abort"}],"usage":{"prompt_tokens":1,"completion_tokens":1}}`
	unauthStr = `{"error":"Unauthorized"}`
)

func TestClassify(t *testing.T) {
	tests := []struct {
		name   string
		status int
		body   string
		err    error
		class  class
		code   string
	}{
		{"core died", 500, coreDied, nil, classDead, proto.CodeEngineError},
		{"core stopping", 500, stopping, nil, classUnreached, proto.CodeEngineError},
		{"other 500", 500, `{"error":{"message":"boom","type":"InternalServerError","code":500}}`, nil, classRetry, proto.CodeEngineError},
		{"500 empty", 500, ``, nil, classRetry, proto.CodeEngineError},
		{"500 text", 500, `Internal Server Error`, nil, classRetry, proto.CodeEngineError},
		{"bad gateway", 502, `<html>`, nil, classDead, proto.CodeEngineError},
		{"gateway timeout", 504, `<html>`, nil, classRetry, proto.CodeEngineError},
		{"overload", 503, overload, nil, classBusy, ""},
		{"too many", 429, `{}`, nil, classBusy, ""},
		{"request timeout", 408, ``, nil, classBusy, ""},
		{"conflict", 409, ``, nil, classBusy, ""},
		{"too early", 425, ``, nil, classBusy, ""},
		{"Dynamo overload", 529, ``, nil, classBusy, ""},
		{"llama.cpp loading", 503, `{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}`, nil, classBusy, ""},
		{"unauthorized", 401, unauthStr, nil, classDenied, ""},
		{"forbidden", 403, ``, nil, classDenied, ""},
		{"flat old error", 400, `{"object":"error","message":"This model's maximum context length is 2048 tokens","type":"BadRequestError","param":null,"code":400}`, nil, classPermanent, proto.CodeContextLength},
		{"You passed", 400, `{"error":{"message":"You passed 27905 input tokens and requested 4096 output tokens. However, the model's context length is only 32000 tokens, resulting in …","type":"BadRequestError","param":"input_tokens","code":400}}`, nil, classPermanent, proto.CodeContextLength},
		{"input text", 400, `{"error":{"message":"You passed 900000 input characters","param":"input_text"}}`, nil, classPermanent, proto.CodeContextLength},
		{"llama.cpp context", 400, `{"error":{"code":400,"message":"the request exceeds the available context size","type":"exceed_context_size_error"}}`, nil, classPermanent, proto.CodeContextLength},
		{"unprocessable", 422, `{"detail":[{"loc":["body"],"msg":"x"}]}`, nil, classPermanent, proto.CodeInvalidRequest},
		{"too large", 413, ``, nil, classPermanent, proto.CodeInvalidRequest},
		{"not implemented", 501, `{}`, nil, classPermanent, proto.CodeInvalidRequest},
		{"teapot", 418, ``, nil, classPermanent, proto.CodeInvalidRequest},
		{"old 404 model", 404, `{"object":"error","message":"The model x does not exist.","type":"NotFoundError","param":null,"code":404}`, nil, classNoModel, proto.CodeInvalidRequest},
		{"404 route", 404, `{"detail":"Not Found"}`, nil, classPermanent, proto.CodeInvalidRequest},
		{"404 empty", 404, ``, nil, classPermanent, proto.CodeInvalidRequest},
		{"redirect", 307, ``, nil, classRetry, proto.CodeEngineError},
		{"abort", 200, aborted, nil, classLost, ""},
		{"second choice aborted", 200, `{"choices":[{"text":"","finish_reason":"stop"},{"finish_reason":"abort"}],"usage":{}}`, nil, classLost, ""},
		{"responses cancelled", 200, `{"id":"r","status":"cancelled","output":[]}`, nil, classLost, ""},
		{"responses failed", 200, `{"id":"r","status":"failed","error":{"message":"x"},"output":[]}`, nil, classRetry, proto.CodeBadResponse},
		{"finish error", 200, `{"choices":[{"finish_reason":"error"}],"usage":{}}`, nil, classRetry, proto.CodeBadResponse},
		{"empty", 200, ``, nil, classRetry, proto.CodeBadResponse},
		{"half", 200, `{"id":"c","choices":[{"index":0,"mess`, nil, classRetry, proto.CodeBadResponse},
		{"two documents", 200, `{"choices":[{"text":"","finish_reason":"stop"}]}{}`, nil, classRetry, proto.CodeBadResponse},
		{"no choices", 200, `{"id":"c","usage":{}}`, nil, classRetry, proto.CodeBadResponse},
		{"empty choices", 200, `{"choices":[],"usage":{}}`, nil, classRetry, proto.CodeBadResponse},
		{"choices are no list", 200, `{"choices":7,"usage":{}}`, nil, classRetry, proto.CodeBadResponse},
		{"array", 200, `[]`, nil, classRetry, proto.CodeBadResponse},
		{"html", 200, `<html></html>`, nil, classRetry, proto.CodeBadResponse},
		{"no usage", 200, `{"choices":[{"text":"","finish_reason":"stop"}]}`, nil, classDone, ""},
		{"no finish", 200, `{"choices":[{"text":"","finish_reason":null}],"usage":{"prompt_tokens":1}}`, nil, classDone, ""},
		{"neither", 200, `{"choices":[{"text":"","finish_reason":null}]}`, nil, classRetry, proto.CodeBadResponse},
		{"embeddings", 200, `{"object":"list","data":[{"embedding":[1]}],"usage":{"prompt_tokens":1}}`, nil, classDone, ""},
		{"rerank", 200, `{"id":"r","results":[{"index":0}]}`, nil, classDone, ""},
		{"SGLang overload", 200, `{"error":{"message":"The request queue is full.","code":503}}`, nil, classBusy, ""},
		{"SGLang bad request", 200, `{"error":{"message":"bad","code":400}}`, nil, classPermanent, proto.CodeInvalidRequest},
		{"error without code", 200, `{"error":{"message":"bad"}}`, nil, classRetry, proto.CodeBadResponse},
		{"error null", 200, `{"error":null,"choices":[{"text":"","finish_reason":"stop"}],"usage":{}}`, nil, classDone, ""},
		{"refused", 0, ``, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, classUnreached, proto.CodeTransport},
		{"no such host", 0, ``, &net.DNSError{}, classUnreached, proto.CodeTransport},
		{"reset", 0, ``, &net.OpError{Op: "read", Err: syscall.ECONNRESET}, classBroken, proto.CodeTransport},
		{"end of file", 0, ``, io.EOF, classBroken, proto.CodeTransport},
		{"torn", 200, `{"id"`, io.ErrUnexpectedEOF, classBroken, proto.CodeTransport},
		{"late", 0, ``, context.DeadlineExceeded, classTimeout, proto.CodeRequestTimeout},
		{"late in the body", 200, `{`, fmt.Errorf("read: %w", context.DeadlineExceeded), classTimeout, proto.CodeRequestTimeout},
		{"unknown", 0, ``, errors.New("malformed HTTP response"), classBroken, proto.CodeTransport},
	}
	for _, tt := range tests {
		v := classify("/v1/chat/completions", Answer{Status: tt.status, Body: []byte(tt.body)}, tt.err)
		if v.class != tt.class || v.code != tt.code {
			t.Errorf("%s: %v %q, want %v %q", tt.name, v.class, v.code, tt.class, tt.code)
		}
		if v.class != classDone && v.message == "" {
			t.Errorf("%s: no message", tt.name)
		}
		if (v.same != "") != slices.Contains([]class{classPermanent, classRetry, classNoModel, classBroken}, v.class) {
			t.Errorf("%s: same %q", tt.name, v.same)
		}
	}
}

func TestClassifyTooLarge(t *testing.T) {
	v := classify("", Answer{Status: 200, TooLarge: true}, nil)
	if v.class != classPermanent || v.code != proto.CodeResponseTooLarge {
		t.Errorf("%v %q", v.class, v.code)
	}
}

func TestRetryAfter(t *testing.T) {
	for in, want := range map[string]time.Duration{"": 0, "2": 2 * time.Second, " 0.5 ": 500 * time.Millisecond, "-1": 0, "9999999": 5 * time.Minute, "Fri, 31 Dec 1999 23:59:59 GMT": 0} {
		h := http.Header{"Retry-After": {in}}
		if got := retryAfter(h); got != want {
			t.Errorf("%q: %v, want %v", in, got, want)
		}
	}
}

// TestAlike makes sure that the same mistake in two lines is one mistake, and two mistakes are two.
func TestAlike(t *testing.T) {
	same := func(a, b string) bool {
		v := func(m string) string { return classify("", Answer{Status: 400, Body: []byte(m)}, nil).same }
		return v(a) == v(b)
	}
	if !same(`{"error":{"message":"max_tokens=5000 cannot be greater than max_model_len=2048."}}`, `{"error":{"message":"max_tokens=777 cannot be greater than max_model_len=2048."}}`) {
		t.Error("numbers make a difference")
	}
	if !same("{\"error\":{\"message\":\"'input': 'a'\"}}", "{\"error\":{\"message\":\"'input': 'b'\"}}") {
		t.Error("quoted text makes a difference")
	}
	if same(`{"error":{"message":"temperature must be in range"}}`, `{"error":{"message":"top_p must be in range"}}`) {
		t.Error("two mistakes are one")
	}
}

// FuzzClassify: whatever an engine says to whatever was asked, the verdict is one of ours, says why, and is good only for a
// whole answer.
func FuzzClassify(f *testing.F) {
	for _, r := range append(recordings(f), exchanges(f, "../testdata/engines/*.jsonl", 4)...) {
		f.Add(r.Status, r.Path, []byte(r.Request), []byte(r.Body))
	}
	f.Fuzz(func(t *testing.T, status int, path string, asked, b []byte) {
		r := recorded{Status: status, Path: path, Request: string(asked), Body: string(b)}
		v := r.judged()
		switch {
		case v.class < classDone || v.class > classBroken:
			t.Fatalf("class %d", v.class)
		case v.class != classDone && v.message == "", v.class == classDone && (v.code != "" || v.message != ""):
			t.Errorf("%v %q %q", v.class, v.code, v.message)
		case v.class != classDone:
		case status/100 != 2, !jsontext.Value(b).IsValid(lenient), !utf8.Valid(b), v.parts < readDemand(asked).answers(path), v.usage.Prompt < 0:
			t.Errorf("it is done: HTTP %d %s", status, b)
		}
		load.ReadGauges(b)
	})
}

// TestAlikeWords: what tells two lines with the same mistake apart is not the mistake.
func TestAlikeWords(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"at most 5 tokens", "at most 812 tokens", true},
		{"no tool `f`", "no tool `g`", true},
		{"request 7f3a-bc01 failed", "request c-0-ffee failed", true},
		{"chatcmpl-9f3: no", "chatcmpl-a2e: no", true},
		{"no tool", "no schema", false},
		{"3 tools", "3 schemas", false},
	} {
		if got := alike(c.a) == alike(c.b); got != c.want {
			t.Errorf("%s, %s: alike %v", c.a, c.b, got)
		}
	}
}

// TestPageText: what a body says that is no JSON is one line.
func TestPageText(t *testing.T) {
	for in, want := range map[string]string{
		"<!DOCTYPE HTML>\n<html><head>\n<title>502 Bad\nGateway</title></head><body>x": "502 Bad Gateway",
		"<h1>Oops</h1>":               "a page of HTML",
		" Internal\nServer\tError \n": "Internal Server Error",
	} {
		if got := readError([]byte(in)).message; got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
}
