package worker

import (
	"bytes"
	"errors"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"millrace/proto"
)

// errorBody is what an engine says of an error, whatever shape it says it in.
type errorBody struct {
	typ, param, code, message string
}

// readError understands all that was seen: {"error":{…}}, {"error":"text"}, the flat form of old versions,
// {"detail":…}, text that is not JSON, and nothing.
func readError(body []byte) errorBody {
	var v struct {
		Error  jsontext.Value `json:"error"`
		Detail jsontext.Value `json:"detail"`
	}
	if json.Unmarshal(body, &v, lenient) != nil {
		return errorBody{message: proto.Truncate(strings.ToValidUTF8(string(bytes.TrimSpace(body)), "\uFFFD"), proto.MaxMessage)}
	}
	switch {
	case v.Error.Kind() == '"':
		return errorBody{message: text(v.Error)}
	case v.Error.Kind() == '{':
		return readErrorObject(v.Error)
	case len(v.Detail) > 0:
		return errorBody{typ: "detail", message: text(v.Detail)}
	}
	return readErrorObject(body)
}

var lenient = json.JoinOptions(jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))

func readErrorObject(b []byte) errorBody {
	var e struct {
		Message jsontext.Value `json:"message"`
		Type    jsontext.Value `json:"type"`
		Param   jsontext.Value `json:"param"`
		Code    jsontext.Value `json:"code"`
	}
	_ = json.Unmarshal(b, &e, lenient) // what is missing stays empty
	return errorBody{typ: text(e.Type), param: text(e.Param), code: text(e.Code), message: text(e.Message)}
}

// text renders a value for people: a string as it reads, null as nothing, the rest as JSON.
func text(v jsontext.Value) string {
	switch v.Kind() {
	case '"':
		s, _ := jsontext.AppendUnquote(nil, v) // what can be read of it is
		return proto.Truncate(strings.ToValidUTF8(string(s), "\uFFFD"), proto.MaxMessage)
	case 'n', 0:
		return ""
	}
	return proto.Truncate(string(v), proto.MaxMessage)
}

// reply is what an answer with HTTP status 200 holds, as far as the worker looks into it.
type reply struct {
	id      string
	choices int    // -1: no choices
	finish  string // of the first choice
	abort   bool   // a choice ended because the engine gave it up
	failed  bool   // a choice or the whole answer ended by an error inside the engine
	later   bool   // the answer is not there yet
	whole   bool   // choices, data, output or results are there
	refusal jsontext.Value
	usage   []byte // {"usage":…}, or nil
}

var errNotJSON = errors.New("not a JSON object")

// readReply goes over an answer once. Its error says that the body is not one whole JSON object.
func readReply(body []byte) (reply, error) {
	r := reply{choices: -1}
	d := jsontext.NewDecoder(bytes.NewBuffer(body), lenient) // from a buffer it reads in place, and writes nothing there
	if d.PeekKind() != '{' {
		return r, errNotJSON
	}
	if _, err := d.ReadToken(); err != nil {
		return r, err
	}
	for d.PeekKind() == '"' {
		name, err := d.ReadToken()
		if err != nil {
			return r, err
		}
		if err := r.member(d, name.String()); err != nil {
			return r, err
		}
	}
	if _, err := d.ReadToken(); err != nil { // the closing bracket
		return r, err
	}
	if _, err := d.ReadToken(); !errors.Is(err, io.EOF) {
		return r, errors.New("more follows the JSON object")
	}
	if !utf8.Valid(body) { // vLLM replaces what is no text itself
		return r, errors.New("not UTF-8")
	}
	return r, nil
}

func (r *reply) member(d *jsontext.Decoder, name string) error {
	kind := d.PeekKind()
	switch name {
	case "choices":
		if kind == '[' {
			return r.readChoices(d)
		}
	case "data", "results", "output":
		r.whole = r.whole || kind == '['
	case "usage":
		if kind == '{' {
			v, err := d.ReadValue()
			r.usage = append(append(append(make([]byte, 0, len(v)+10), `{"usage":`...), v...), '}')
			return err
		}
	case "error":
		if kind != 'n' {
			v, err := d.ReadValue()
			r.refusal = v.Clone()
			return err
		}
	case "id", "status":
		if kind == '"' {
			t, err := d.ReadToken()
			if err == nil {
				r.say(name, t.String())
			}
			return err
		}
	}
	return d.SkipValue()
}

// say takes a text member. The status is that of /v1/responses.
func (r *reply) say(name, v string) {
	switch {
	case name == "id":
		r.id = v
	case v == "cancelled":
		r.abort = true
	case v == "failed":
		r.failed = true
	case v == "queued", v == "in_progress":
		r.later = true
	}
}

func (r *reply) readChoices(d *jsontext.Decoder) error {
	if _, err := d.ReadToken(); err != nil {
		return err
	}
	r.choices = 0
	for k := d.PeekKind(); k != ']'; k = d.PeekKind() {
		if k != '{' {
			if err := d.SkipValue(); err != nil {
				return err
			}
			continue
		}
		if err := r.readChoice(d); err != nil {
			return err
		}
		r.choices++
	}
	r.whole = r.whole || r.choices > 0
	_, err := d.ReadToken()
	return err
}

func (r *reply) readChoice(d *jsontext.Decoder) error {
	if _, err := d.ReadToken(); err != nil {
		return err
	}
	for d.PeekKind() == '"' {
		name, err := d.ReadToken()
		if err != nil {
			return err
		}
		if name.String() != "finish_reason" || d.PeekKind() != '"' {
			if err := d.SkipValue(); err != nil {
				return err
			}
			continue
		}
		v, err := d.ReadToken()
		if err != nil {
			return err
		}
		r.ended(v.String())
	}
	_, err := d.ReadToken()
	return err
}

func (r *reply) ended(finish string) {
	if r.choices == 0 {
		r.finish = finish
	}
	r.abort = r.abort || finish == "abort"
	r.failed = r.failed || finish == "error"
}

const noMaxTokens = 512 // output tokens expected of a body that sets no limit

// wish is what a body asks for. Zero: nobody has looked.
type wish struct {
	most    int // output tokens, over all its sequences
	choices int // sequences: n for each prompt
}

// readWish finds how long an answer a body asks for.
func readWish(body []byte) wish {
	d := jsontext.NewDecoder(bytes.NewBuffer(body), lenient) // in place, see readReply
	if t, err := d.ReadToken(); err != nil || t.Kind() != '{' {
		return wish{noMaxTokens, 1}
	}
	tokens, n, prompts, unused := noMaxTokens, 1, 1, 0
	for d.PeekKind() == '"' {
		name, err := d.ReadToken()
		if err != nil {
			break
		}
		to := &n
		switch name.String() {
		case "max_tokens", "max_completion_tokens", "max_output_tokens":
			to = &tokens
		case "n":
		case "prompt", "input":
			prompts = countPrompts(d)
			continue
		default:
			to = &unused
		}
		v, err := d.ReadValue()
		if err != nil {
			break
		}
		if i, err := strconv.Atoi(string(v)); err == nil && i > 0 {
			*to = min(i, 1<<20)
		}
	}
	sequences := min(n, 128) * prompts
	return wish{tokens * sequences, sequences}
}

// countPrompts reads a value that is one prompt (a text, or an array of tokens) or an array of prompts. Messages of
// the Responses API, which are objects, make one prompt.
func countPrompts(d *jsontext.Decoder) (n int) {
	if d.PeekKind() != '[' {
		_, _ = d.ReadValue() // an error comes again with the next name
		return 1
	}
	_, _ = d.ReadToken()
	for k := d.PeekKind(); k != ']' && k != 0; k = d.PeekKind() {
		if k == '"' || k == '[' {
			n++
		}
		if d.SkipValue() != nil {
			break
		}
	}
	_, _ = d.ReadToken()
	return min(max(n, 1), 1<<10)
}
