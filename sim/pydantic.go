package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// lenient are the rules under which vLLM's Python reads a body: duplicate names
// and lone surrogates pass.
func lenient() json.Options {
	return json.JoinOptions(jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
}

// checks collects what is wrong with the fields of a body, in pydantic's words.
type checks struct {
	loc   string // where the first problem is
	lines []string
}

// mostShown is how many problems vLLM lists before it only counts them.
const mostShown = 10

func (c *checks) add(kind, loc, msg, input, extra string) {
	if len(c.lines) == 0 {
		c.loc = loc
	}
	c.lines = append(c.lines, fmt.Sprintf("  {'type': %s, 'loc': %s, 'msg': %s, 'input': %s%s}",
		pyQuote(kind), pyQuote(loc), pyQuote(msg), pyQuote(input), extra))
}

// failure is the 400 that tells all problems, or nil.
func (c *checks) failure() *apiError {
	n := len(c.lines)
	if n == 0 {
		return nil
	}
	head := "1 validation error:\n"
	if n > 1 {
		head = strconv.Itoa(n) + " validation errors:\n"
	}
	lines := c.lines
	if n > mostShown {
		lines = append(lines[:mostShown:mostShown], fmt.Sprintf("  ...and %d more errors", n-mostShown))
	}
	return &apiError{status: http.StatusBadRequest, message: head + strings.Join(lines, "\n"), kind: kindBadBody, param: c.loc}
}

func missing(loc, input string) *apiError {
	var c checks
	c.add("missing", loc, "Field required", input, "")
	return c.failure()
}

func unsupportedMedia() *apiError {
	return &apiError{
		status:  http.StatusBadRequest,
		message: "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
		kind:    kindBadBody,
	}
}

// int reads a whole number the way pydantic does, which takes "5", 5.0 and true
// for one. ok is false when the field is absent, null or wrong.
func (c *checks) int(name string, v jsontext.Value) (n int, ok bool) {
	loc := "body." + name
	switch kind := v.Kind(); {
	case len(v) == 0 || kind == 'n':
		return 0, false
	case kind == 't':
		return 1, true
	case kind == 'f':
		return 0, true
	case kind == '0' || kind == '"':
		text := unquote(v)
		if n, err := strconv.Atoi(strings.TrimSpace(text)); err == nil {
			return n, true
		}
		f, err := strconv.ParseFloat(text, 64)
		switch {
		case err == nil && f == float64(int(f)):
			return int(f), true
		case kind == '0':
			c.add("int_from_float", loc, "Input should be a valid integer, got a number with a fractional part", text, "")
		default:
			c.add("int_parsing", loc, "Input should be a valid integer, unable to parse string as an integer", text, "")
		}
	default:
		c.add("int_type", loc, "Input should be a valid integer", pyInput(v), "")
	}
	return 0, false
}

// float is int for any number.
func (c *checks) float(name string, v jsontext.Value) (f float64, ok bool) {
	loc := "body." + name
	switch kind := v.Kind(); {
	case len(v) == 0 || kind == 'n':
		return 0, false
	case kind == 't':
		return 1, true
	case kind == 'f':
		return 0, true
	case kind == '0' || kind == '"':
		f, err := strconv.ParseFloat(strings.TrimSpace(unquote(v)), 64)
		if err == nil {
			return f, true
		}
		c.add("float_parsing", loc, "Input should be a valid number, unable to parse string as a number", pyInput(v), "")
	default:
		c.add("float_type", loc, "Input should be a valid number", pyInput(v), "")
	}
	return 0, false
}

func (c *checks) bool(name string, v jsontext.Value) bool {
	loc := "body." + name
	switch kind := v.Kind(); {
	case len(v) == 0 || kind == 'n' || kind == 'f':
	case kind == 't':
		return true
	case kind == '0' || kind == '"':
		switch strings.ToLower(unquote(v)) {
		case "1", "true", "t", "yes", "y", "on":
			return true
		case "0", "false", "f", "no", "n", "off":
		default:
			c.add("bool_parsing", loc, "Input should be a valid boolean, unable to interpret input", pyInput(v), "")
		}
	default:
		c.add("bool_type", loc, "Input should be a valid boolean", pyInput(v), "")
	}
	return false
}

func (c *checks) string(name string, v jsontext.Value) string {
	switch {
	case len(v) == 0 || v.Kind() == 'n':
	case v.Kind() == '"':
		return unquote(v)
	default:
		c.add("string_type", "body."+name, "Input should be a valid string", pyInput(v), "")
	}
	return ""
}

// unquote returns the text of a JSON string, and anything else as it is written.
func unquote(v jsontext.Value) string {
	if v.Kind() != '"' {
		return string(v)
	}
	b, _ := jsontext.AppendUnquote(nil, v) // the error only tells of invalid UTF-8
	return string(b)
}

// pyInput is how vLLM prints an offending value: scalars as Python would,
// containers by their size.
func pyInput(v jsontext.Value) string {
	switch v.Kind() {
	case 'n':
		return "None"
	case 't':
		return "True"
	case 'f':
		return "False"
	case '{':
		return fmt.Sprintf("<dict of %d items>", members(v))
	case '[':
		return fmt.Sprintf("<list of %d items>", elements(v))
	}
	return unquote(v)
}

func members(v jsontext.Value) int {
	var m map[string]jsontext.Value
	if err := json.Unmarshal(v, &m, lenient()); err != nil {
		return 0
	}
	return len(m)
}

func elements(v jsontext.Value) int {
	var l []jsontext.Value
	if err := json.Unmarshal(v, &l, lenient()); err != nil {
		return 0
	}
	return len(l)
}

// pyQuote is Python's repr of a string.
func pyQuote(s string) string {
	mark := "'"
	if strings.Contains(s, "'") && !strings.Contains(s, `"`) {
		mark = `"`
	}
	return mark + strings.NewReplacer(`\`, `\\`, "\n", `\n`, "\t", `\t`, "\r", `\r`, mark, `\`+mark).Replace(s) + mark
}

// pyFloat is Python's repr of a float, for numbers of ordinary size.
func pyFloat(f float64) string {
	s := strconv.FormatFloat(f, 'g', -1, 64)
	if !strings.ContainsAny(s, ".eIN") {
		s += ".0"
	}
	return s
}

// malformed is the 400 for a body that is not JSON: where Python's parser
// stopped, in characters, and what it wanted there.
func malformed(body []byte) *apiError {
	offset, want := jsonFault(body)
	loc := "body." + strconv.Itoa(utf8.RuneCount(body[:offset]))
	var c checks
	c.add("json_invalid", loc, "JSON decode error", "<dict of 0 items>", ", 'ctx': {'error': "+pyQuote(want)+"}")
	return c.failure()
}

func jsonFault(body []byte) (offset int, want string) {
	d := jsontext.NewDecoder(bytes.NewReader(body), lenient())
	for {
		_, err := d.ReadToken()
		if err == nil && d.StackDepth() > 0 {
			continue
		}
		if err == nil {
			rest := bytes.TrimLeft(body[d.InputOffset():], " \t\r\n")
			return len(body) - len(rest), "Extra data"
		}
		return faultAt(d, body, err)
	}
}

// faultAt translates the decoder's complaint into Python's.
func faultAt(d *jsontext.Decoder, body []byte, err error) (offset int, want string) {
	offset = int(d.InputOffset())
	var syntax *jsontext.SyntacticError
	if errors.As(err, &syntax) {
		offset = int(syntax.ByteOffset)
	} else if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		offset = len(body)
	}
	offset = min(offset, len(body))
	kind, length := d.StackIndex(d.StackDepth())
	text := err.Error()
	switch {
	case strings.Contains(text, "after object name"):
		return offset, "Expecting ':' delimiter"
	case strings.Contains(text, "after object value"), strings.Contains(text, "after array element"):
		return offset, "Expecting ',' delimiter"
	case strings.Contains(text, "within string"):
		return offset, "Invalid control character at"
	case kind == '{' && length%2 == 0 && length > 0 && offset == len(body):
		return offset, "Expecting ',' delimiter"
	case kind == '{' && length%2 == 0:
		return offset, "Expecting property name enclosed in double quotes"
	}
	// Python names the beginning of what it could not read as a value.
	const space = " \t\r\n"
	rest := bytes.TrimLeft(body[d.InputOffset():], space)
	if length > 0 && len(rest) > 0 && (rest[0] == ',' || rest[0] == ':') {
		rest = bytes.TrimLeft(rest[1:], space)
	}
	return len(body) - len(rest), "Expecting value"
}
