package proto

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

const goodBody = `{"model":"m","messages":[{"role":"user","content":"hi"}]}`

func lineWith(body string) string {
	return `{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":` + body + `}`
}

func TestParseLine(t *testing.T) {
	l, err := ParseLine([]byte(` {"extra":[1,{"custom_id":"no"}],"url":"/v1/chat/completions","custom_id":"é\n\ud83d\ude00\uFFFD","body" : ` + goodBody + ` ,"method":"POST"} `))
	if err != nil {
		t.Fatal(err)
	}
	if l.CustomID != "é\n\U0001F600\uFFFD" || l.Model != "m" || string(l.Body) != goodBody || l.URL != "/v1/chat/completions" {
		t.Errorf("%+v", l)
	}
}

func TestParseLineErrors(t *testing.T) {
	deep := strings.Repeat("[", 100000) + strings.Repeat("]", 100000)
	for _, c := range []struct{ name, line, want, id string }{
		{"empty", ``, "ends too early", ""},
		{"torn", lineWith(goodBody)[:60], "ends too early", "a"},
		{"not JSON", `hello`, "malformed JSON", ""},
		{"array", `[]`, "must be a JSON object", ""},
		{"two objects", lineWith(goodBody) + lineWith(goodBody), "after the end", "a"},
		{"comma", `{"custom_id":"a",}`, "malformed JSON", "a"},
		{"array's line", lineWith(goodBody) + " ,\r", "a comma behind the object: the lines are those of a JSON array", "a"},
		{"two commas", lineWith(goodBody) + ",,", "invalid character ','", "a"},
		{"raw NUL", lineWith("{\"model\":\"m\",\"x\":\"\x00\"}"), "malformed JSON", "a"},
		{"not UTF-8", lineWith("{\"model\":\"\xff\"}"), "not UTF-8", ""},
		{"depth", lineWith(`{"model":"m","x":` + deep + `}`), "malformed JSON", "a"},
		{"no id", `{"method":"POST","url":"/v1/completions","body":{}}`, "custom_id is missing", ""},
		{"empty id", `{"custom_id":"","method":"POST","url":"/v1/completions","body":{}}`, "custom_id is empty", ""},
		{"number id", `{"custom_id":7,"method":"POST","url":"/v1/completions","body":{}}`, "custom_id must be a string", ""},
		{"long id", `{"custom_id":"` + strings.Repeat("x", 600) + `","method":"POST","url":"/v1/completions","body":{}}`, "custom_id has 600 bytes", ""},
		{"half a pair", `{"custom_id" : "\uD800","method":"POST","url":"/v1/completions","body":{}}`, "custom_id holds half of a surrogate pair", ""},
		{"two ids", `{"custom_id":"a","custom_id":"b","method":"POST","url":"/v1/completions","body":{}}`, "there twice", ""},
		{"method", `{"custom_id":"a","method":"GET","url":"/v1/completions","body":{}}`, `method is "GET"`, "a"},
		{"url", `{"custom_id":"a","method":"POST","url":"/v1/files","body":{}}`, `url is "/v1/files"`, "a"},
		{"no body", `{"custom_id":"a","method":"POST","url":"/v1/completions"}`, "body is missing", "a"},
		{"body text", lineWith(`"x"`), "body must be a JSON object", "a"},
		{"stream", lineWith(`{"model":"m","stream":true}`), "stream is true", "a"},
		{"background", lineWith(`{"model":"m","background":true}`), "background is true", "a"},
		{"two models", lineWith(`{"model":"m","model":"n"}`), "two \"model\" keys", "a"},
		{"escaped second model", lineWith(`{"model":"m","\u006dodel":"n"}`), "two \"model\" keys", "a"},
		{"model number", lineWith(`{"model":1}`), "model must be a string", "a"},
		{"error before the id", `{"body":{"model":1},"custom_id":"late","method":"POST","url":"/v1/completions"}`, "model must be a string", "late"},
	} {
		_, err := ParseLine([]byte(c.line))
		var le *LineError
		if !errors.As(err, &le) || !strings.Contains(le.Message, c.want) || le.CustomID != c.id {
			t.Errorf("%s: %v (id %q), want %q (id %q)", c.name, err, le.CustomID, c.want, c.id)
		}
	}
}

// TestBodyBytes: what a body holds goes on byte for byte, and an override replaces the model alone.
func TestBodyBytes(t *testing.T) {
	for _, c := range []struct{ body, override, want string }{
		{`{ "model" : "m" ,"n":12345678901234567890, "x":1e400,"s":"\ud800 \u0041","a":1,"a":2 }`, "",
			`{ "model" : "m" ,"n":12345678901234567890, "x":1e400,"s":"\ud800 \u0041","a":1,"a":2 }`},
		{`{"a":1e400,"model": "m" ,"b":12345678901234567890}`, `n"ew`, `{"a":1e400,"model": "n\"ew" ,"b":12345678901234567890}`},
		{`{"model":"m"}`, "m", `{"model":"m"}`},
		{`{ "a":1}`, "n", `{"model":"n", "a":1}`},
		{`{ }`, "n", `{"model":"n" }`},
		{`{"x":{"model":"inner"}}`, "n", `{"model":"n","x":{"model":"inner"}}`},
	} {
		l, err := ParseLine([]byte(lineWith(c.body)))
		if err != nil {
			t.Fatal(err)
		}
		if got := string(l.BodyFor(c.override)); got != c.want {
			t.Errorf("%s with %q: %s, want %s", c.body, c.override, got, c.want)
		}
	}
}

func TestPrefixKeyOrders(t *testing.T) {
	key := func(prompt string) uint64 {
		l, err := ParseLine([]byte(lineWith(`{"model":"m","messages":"` + prompt + `"}`)))
		if err != nil {
			t.Fatal(err)
		}
		return l.PrefixKey
	}
	a, b := strings.Repeat("a", 100), strings.Repeat("b", 100)
	if key(a+"1")>>40 != key(a+"2")>>40 || key(a+"1")>>40 == key(b+"1")>>40 {
		t.Error("lines are not grouped by their first 64 bytes")
	}
	long := strings.Repeat("a", 300)
	if key(long+"1")>>20 != key(long+"2")>>20 || key(long+"1") == key(long+"2") {
		t.Error("lines are not grouped by their first 256 bytes")
	}
}

func TestAppendLine(t *testing.T) {
	base := Result{Job: "j", Index: 3, CustomID: `a"b`, OK: true, Status: 200, RequestID: "r", Body: []byte("{\n \"x\": 1e400\r\n}\n")}
	for _, c := range []struct {
		name string
		edit func(*Result)
		want string
	}{
		{"ok", func(*Result) {}, `"custom_id":"a\"b","response":{"status_code":200,"request_id":"r","body":{  "x": 1e400  }},"error":null}`},
		{"the engine's no", func(r *Result) { r.OK, r.Status, r.Body = false, 400, []byte(`{"error":{"message":"no"}}`) },
			`"response":{"status_code":400,"request_id":"r","body":{"error":{"message":"no"}}},"error":null}`},
		{"no with text", func(r *Result) { r.OK, r.Status, r.Body = false, 502, []byte("<html>\xff") },
			`"body":{"error":{"message":"<html>` + "\uFFFD" + `","type":"invalid_body","param":null,"code":502}}},"error":null}`},
		{"no with nothing", func(r *Result) { r.OK, r.Status, r.Body = false, 404, nil }, `"status_code":404`},
		{"no that says 200", func(r *Result) { r.OK, r.Code, r.Message = false, CodeBadResponse, "no choices" },
			`"response":null,"error":{"code":"bad_engine_response","message":"no choices"}}`},
		{"never ran", func(r *Result) { *r = Result{Job: "j", Line: 17, Code: CodeInvalidRequest, Message: "bad"} },
			`"custom_id":null,"line":17,"response":null,"error":{"code":"invalid_request","message":"bad"}}`},
		{"not known", func(r *Result) { *r = Result{Job: "j", Index: 16, Code: CodeCancelled, Message: "cancelled"} },
			`"custom_id":null,"index":16,"response":null,"error":{"code":"batch_cancelled","message":"cancelled"}}`},
		{"attempts", func(r *Result) {
			r.OK, r.Status, r.Code, r.Attempts = false, 0, CodeRequestTimeout, []Attempt{{"w", "engine_error", 500, "x", 1500000}}
		}, `"attempts":[{"worker":"w","code":"engine_error","status_code":500,"message":"x","seconds":1.500}]}`},
	} {
		r := base
		c.edit(&r)
		got := AppendLine(nil, &r)
		if !bytes.Contains(got, []byte(c.want)) || bytes.Count(got, []byte{'\n'}) != 1 || got[len(got)-1] != '\n' {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
		if _, err := ParseOutput(got); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func FuzzParseLine(f *testing.F) {
	f.Add([]byte(lineWith(goodBody)), "n")
	f.Add([]byte(lineWith(`{ "a":1e400,"a":"\ud800"}`)), "")
	f.Add([]byte(`{"custom_id":"a","custom_id":"b"`), "x")
	f.Fuzz(func(t *testing.T, b []byte, model string) {
		l, err := ParseLine(b)
		if err != nil {
			var le *LineError
			if !errors.As(err, &le) {
				t.Fatalf("%T", err)
			}
			return
		}
		if !bytes.Contains(b, l.Body) {
			t.Fatal("the body is not part of the line")
		}
		// A body with another model is still a valid line, with that model.
		if model = strings.ToValidUTF8(model, "?"); model == "" {
			return
		}
		again, err := ParseLine([]byte(lineWith(string(l.BodyFor(model)))))
		if err != nil || again.Model != model {
			t.Fatalf("%s → %s: %q, %v", l.Body, l.BodyFor(model), again.Model, err)
		}
	})
}

// TestReadUsage: what counts below zero does not count.
func TestReadUsage(t *testing.T) {
	for body, want := range map[string]Usage{
		`{"usage":{"prompt_tokens":3,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":2}}}`: {true, 3, 4, 2},
		`{"usage":{"input_tokens":3,"output_tokens":4}}`:                                                  {true, 3, 4, 0},
		`{"usage":{"prompt_tokens":-1,"completion_tokens":4}}`:                                            {},
		`{"usage":null}`:                  {},
		`{"usage":{"prompt_tokens":1e3}}`: {},
	} {
		if got := ReadUsage([]byte(body)); got != want {
			t.Errorf("%s: %+v", body, got)
		}
	}
}
