package worker

import (
	"bytes"
	"errors"
	"io"
	"regexp"
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
		return errorBody{message: proto.Truncate(strings.ToValidUTF8(pageText(body), "\uFFFD"), proto.MaxMessage)}
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

var pageTitle = regexp.MustCompile(`(?is)<title>(.*?)</title>`)

// pageText is what is said by a body that is no JSON, in one line: of a page of HTML, its title.
func pageText(body []byte) string {
	body = bytes.TrimSpace(body)
	if bytes.HasPrefix(body, []byte("<")) {
		if m := pageTitle.FindSubmatch(body); m != nil {
			body = m[1]
		} else {
			body = []byte("a page of HTML")
		}
	}
	return strings.Join(strings.Fields(string(body)), " ")
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
	model   string // that it is from, as the engine names it
	choices int    // -1: no choices
	items   int    // of data, results or output; -1: none of them is there
	finish  string // of the first choice
	limited int    // choices that ended at a limit of tokens
	abort   bool   // a choice ended because the engine gave it up
	failed  bool   // a choice or the whole answer ended by an error inside the engine
	later   bool   // the answer is not there yet
	partial bool   // the engine itself says that it did not end (/v1/responses)
	stopped bool   // it says that this is for a limit of tokens
	empty   bool   // a choice holds nothing: no text, tool call, reasoning or refusal; or an embedding has no numbers
	refusal jsontext.Value
	usage   []byte // {"usage":…}, or nil
}

// whole says whether there is an answer at all.
func (r *reply) whole() bool { return r.choices > 0 || r.items > 0 || r.items == 0 && r.partial }

var errNotJSON = errors.New("not a JSON object")

// readReply goes over an answer once. Its error says that the body is not one whole JSON object.
func readReply(body []byte) (reply, error) {
	r := reply{choices: -1, items: -1}
	d := jsontext.NewDecoder(bytes.NewBuffer(body), lenient) // from a buffer it reads in place, and writes nothing there
	if d.PeekKind() != '{' {
		return r, errNotJSON
	}
	if err := members(d, func(name string, kind jsontext.Kind) error { return r.member(d, name, kind) }); err != nil {
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

func (r *reply) member(d *jsontext.Decoder, name string, kind jsontext.Kind) error {
	switch name {
	case "choices":
		if kind == '[' {
			return r.readChoices(d)
		}
	case "data", "results", "output":
		if kind == '[' {
			return r.readItems(d, name == "data")
		}
	case "usage":
		if kind == '{' {
			v, err := d.ReadValue()
			r.usage = append(append(append(make([]byte, 0, len(v)+10), `{"usage":`...), v...), '}')
			return err
		}
	case "incomplete_details":
		if kind == '{' {
			return members(d, func(name string, _ jsontext.Kind) error {
				v, err := d.ReadValue()
				r.stopped = r.stopped || name == "reason" && string(v) == `"max_output_tokens"`
				return err
			})
		}
	case "error":
		if kind != 'n' {
			v, err := d.ReadValue()
			r.refusal = v.Clone()
			return err
		}
	case "id", "status", "model":
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
	case name == "model":
		r.model = v
	case v == "cancelled":
		r.abort = true
	case v == "failed":
		r.failed = true
	case v == "queued", v == "in_progress":
		r.later = true
	case v == "incomplete":
		r.partial = true
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
	_, err := d.ReadToken()
	return err
}

func (r *reply) readChoice(d *jsontext.Decoder) error {
	holds := false
	err := members(d, func(name string, kind jsontext.Kind) (err error) {
		switch {
		case name == "finish_reason" && kind == '"':
			t, err := d.ReadToken()
			if err == nil {
				r.ended(t.String())
			}
			return err
		case name == "message" && kind == '{':
			return members(d, func(name string, kind jsontext.Kind) error {
				some, err := holdsSome(d, kind)
				switch name {
				case "content":
					holds = holds || some || kind == '"' // a text may be empty
				case "tool_calls", "function_call", "reasoning", "reasoning_content", "refusal", "audio":
					holds = holds || some
				}
				return err
			})
		case name == "text":
			holds = kind == '"'
		}
		return d.SkipValue()
	})
	r.empty = r.empty || !holds
	return err
}

// members goes over the members of an object, whose values one reads.
func members(d *jsontext.Decoder, one func(name string, kind jsontext.Kind) error) error {
	if _, err := d.ReadToken(); err != nil {
		return err
	}
	for d.PeekKind() == '"' {
		t, err := d.ReadToken()
		if err != nil {
			return err
		}
		if err := one(t.String(), d.PeekKind()); err != nil {
			return err
		}
	}
	_, err := d.ReadToken()
	return err
}

// holdsSome passes a value and says whether it is more than null, or an empty list, object or text.
func holdsSome(d *jsontext.Decoder, kind jsontext.Kind) (bool, error) {
	if kind == 'n' {
		return false, d.SkipValue()
	}
	if kind != '[' && kind != '{' {
		v, err := d.ReadValue()
		return len(v) > len(`""`), err
	}
	if _, err := d.ReadToken(); err != nil {
		return false, err
	}
	n := 0
	for k := d.PeekKind(); k != ']' && k != '}'; k = d.PeekKind() {
		if err := d.SkipValue(); err != nil {
			return false, err
		}
		n++
	}
	_, err := d.ReadToken()
	return n > 0, err
}

// readItems counts a list, and looks for embeddings without numbers.
func (r *reply) readItems(d *jsontext.Decoder, vectors bool) error {
	if _, err := d.ReadToken(); err != nil {
		return err
	}
	r.items = max(r.items, 0)
	for k := d.PeekKind(); k != ']'; k = d.PeekKind() {
		r.items++
		if k != '{' || !vectors {
			if err := d.SkipValue(); err != nil {
				return err
			}
			continue
		}
		err := members(d, func(name string, kind jsontext.Kind) error {
			if name != "embedding" {
				return d.SkipValue()
			}
			some, err := holdsSome(d, kind)
			r.empty = r.empty || !some
			return err
		})
		if err != nil {
			return err
		}
	}
	_, err := d.ReadToken()
	return err
}

func (r *reply) ended(finish string) {
	if r.choices == 0 {
		r.finish = finish
	}
	if finish == "length" {
		r.limited++
	}
	r.abort = r.abort || finish == "abort"
	r.failed = r.failed || finish == "error"
}
