package proto

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/cespare/xxhash/v2"
	"github.com/go-json-experiment/json/jsontext"
)

// URLs lists the endpoints that a line may ask for.
func URLs() []string {
	return []string{"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/score", "/v1/rerank"}
}

// MaxCustomID is the longest custom_id in bytes.
const MaxCustomID = 512

// Line is a line of an OpenAI batch input file.
// Source: https://platform.openai.com/docs/guides/batch, "Preparing your batch file".
type Line struct {
	CustomID string
	URL      string
	Body     []byte // part of the text that was parsed, byte for byte
	Model    string // empty where the body has none

	// PrefixKey orders lines so that those whose prompts begin alike lie together, the more alike the closer:
	// 24 bits of a hash of the prompt's first 64 bytes, 20 of its first 256, 20 of its first 1,024.
	PrefixKey uint64

	modelFrom, modelTo int // the model's value in Body, quotes included; 0, 0: there is none
	modelAt            int // where a member may be inserted in Body
	empty              bool
}

// A LineError says what is wrong with a line. CustomID is set where the line has a usable one all the same.
type LineError struct {
	CustomID string
	Message  string
}

func (e *LineError) Error() string { return e.Message }

// ParseLine reads a line. Its error is a *LineError. Bodies may hold what JSON readers disagree on (big numbers,
// lone surrogates, repeated names) because they go to the engine as they are; only a second "model" is refused,
// since two readers could see two models in it.
func ParseLine(b []byte) (Line, error) {
	var l Line
	if !utf8.Valid(b) {
		return l, &LineError{Message: fmt.Sprintf("not UTF-8 (byte %d); convert the file to UTF-8", invalidAt(b))}
	}
	p := parser{dec: jsontext.NewDecoder(bytes.NewBuffer(b), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)), text: b}
	if err := p.line(&l); err != nil {
		var le *LineError
		if !errors.As(err, &le) {
			le = &LineError{Message: p.explain(err)}
		}
		if p.idOK {
			le.CustomID = l.CustomID
		}
		return l, le
	}
	return l, nil
}

func invalidAt(b []byte) int {
	at := 0
	for at < len(b) {
		r, n := utf8.DecodeRune(b[at:])
		if r == utf8.RuneError && n <= 1 {
			break
		}
		at += n
	}
	return at
}

type parser struct {
	dec  *jsontext.Decoder
	text []byte
	idOK bool
}

// explain turns an error of the JSON reader into a sentence without its package's name.
func (p *parser) explain(err error) string {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "malformed JSON: the line ends too early"
	}
	var se *jsontext.SyntacticError
	if errors.As(err, &se) {
		at := min(max(se.ByteOffset, 0), int64(len(p.text)))
		if string(bytes.TrimSpace(p.text[at:])) == "," && bytes.HasSuffix(bytes.TrimSpace(p.text[:at]), []byte("}")) {
			return fmt.Sprintf("malformed JSON at byte %d: a comma behind the object: the lines are those of a JSON array", se.ByteOffset)
		}
		return fmt.Sprintf("malformed JSON at byte %d: %v", se.ByteOffset, se.Err)
	}
	return "malformed JSON: " + err.Error()
}

func bad(format string, args ...any) error { return &LineError{Message: fmt.Sprintf(format, args...)} }

// line reads the envelope. Every member is read before anything is judged, so that an error line can name its id.
func (p *parser) line(l *Line) error {
	if k := p.dec.PeekKind(); k != '{' {
		if k == 0 {
			_, err := p.dec.ReadToken()
			return err
		}
		return bad("a line must be a JSON object like {\"custom_id\":…,\"method\":\"POST\",\"url\":…,\"body\":{…}}")
	}
	if _, err := p.dec.ReadToken(); err != nil {
		return err
	}
	var seen struct{ id, method, url, body int }
	var method string
	var wrong error // the first thing that is wrong but does not stop reading
	for p.dec.PeekKind() == '"' {
		name, err := p.name()
		if err != nil {
			return err
		}
		var e error
		switch name {
		case "custom_id":
			seen.id++
			l.CustomID, e = p.text1(name)
			p.idOK = e == nil && seen.id == 1 && l.CustomID != "" && len(l.CustomID) <= MaxCustomID
		case "method":
			seen.method++
			method, e = p.text1(name)
		case "url":
			seen.url++
			l.URL, e = p.text1(name)
		case "body":
			seen.body++
			e = p.body(l)
		default:
			e = p.dec.SkipValue()
		}
		var le *LineError
		if e != nil && !errors.As(e, &le) {
			return e
		}
		if wrong == nil {
			wrong = e
		}
	}
	if _, err := p.dec.ReadToken(); err != nil {
		return err
	}
	if _, err := p.dec.ReadToken(); !errors.Is(err, io.EOF) {
		if err != nil {
			return err
		}
		return bad("text after the end of the JSON object; one line is one object")
	}
	switch {
	case seen.id > 1 || seen.method > 1 || seen.url > 1 || seen.body > 1:
		p.idOK = p.idOK && seen.id == 1
		return bad("custom_id, method, url or body is there twice")
	case wrong != nil:
		return wrong
	case seen.id == 0:
		return bad("custom_id is missing")
	case l.CustomID == "":
		return bad("custom_id is empty")
	case len(l.CustomID) > MaxCustomID:
		return bad("custom_id has %d bytes, at most %d are allowed", len(l.CustomID), MaxCustomID)
	case method != "POST":
		return bad("method is %q, must be \"POST\"", method)
	case !slices.Contains(URLs(), l.URL):
		return bad("url is %q, must be one of %v", l.URL, URLs())
	case seen.body == 0:
		return bad("body is missing")
	}
	return nil
}

func (p *parser) name() (string, error) {
	t, err := p.dec.ReadToken()
	if err != nil {
		return "", err
	}
	return t.String(), nil
}

// text1 reads a string, which must be text: the reader puts the same sign for each half of a surrogate pair.
func (p *parser) text1(name string) (string, error) {
	if p.dec.PeekKind() != '"' {
		if err := p.dec.SkipValue(); err != nil {
			return "", err
		}
		return "", bad("%s must be a string", name)
	}
	from := p.dec.InputOffset()
	s, err := p.name()
	if err == nil && strings.ContainsRune(s, utf8.RuneError) {
		raw := p.text[from:p.dec.InputOffset()]
		if _, err := jsontext.AppendUnquote(nil, raw[bytes.IndexByte(raw, '"'):]); err != nil {
			return "", bad("%s holds half of a surrogate pair (\\ud800 to \\udfff), which is no text", name)
		}
	}
	return s, err
}

// body walks over the members of the body in the same pass and notes where it begins and ends.
func (p *parser) body(l *Line) error {
	if p.dec.PeekKind() != '{' {
		if err := p.dec.SkipValue(); err != nil {
			return err
		}
		return bad("body must be a JSON object")
	}
	if _, err := p.dec.ReadToken(); err != nil {
		return err
	}
	from := int(p.dec.InputOffset()) - 1
	l.modelAt, l.empty = 1, true
	var wrong error
	note := func(e error) {
		if wrong == nil {
			wrong = e
		}
	}
	models := 0
	for p.dec.PeekKind() == '"' {
		name, err := p.name()
		if err != nil {
			return err
		}
		l.empty = false
		switch name {
		case "model":
			models++
			isText := p.dec.PeekKind() == '"'
			v, err := p.dec.ReadValue()
			if err != nil {
				return err
			}
			if !isText {
				note(bad("body.model must be a string"))
				continue
			}
			l.modelTo = int(p.dec.InputOffset()) - from
			l.modelFrom = l.modelTo - len(v)
			m, err := jsontext.AppendUnquote(nil, v)
			if err != nil {
				return err
			}
			l.Model = string(m)
		case "stream":
			if p.dec.PeekKind() == 't' {
				note(bad("body.stream is true; a batch line cannot stream, remove it"))
			}
			if err := p.dec.SkipValue(); err != nil {
				return err
			}
		case "background":
			if p.dec.PeekKind() == 't' {
				note(bad("body.background is true; a batch line is answered at once, remove it"))
			}
			if err := p.dec.SkipValue(); err != nil {
				return err
			}
		case "messages", "prompt", "input":
			v, err := p.dec.ReadValue()
			if err != nil {
				return err
			}
			l.PrefixKey = prefixKey(v)
		default:
			if err := p.dec.SkipValue(); err != nil {
				return err
			}
		}
	}
	if _, err := p.dec.ReadToken(); err != nil {
		return err
	}
	l.Body = p.text[from:p.dec.InputOffset()]
	if models > 1 {
		return bad("body has two \"model\" keys")
	}
	return wrong
}

func prefixKey(v []byte) uint64 {
	h := func(n int) uint64 { return xxhash.Sum64(v[:min(n, len(v))]) }
	return h(64)>>40<<40 | h(256)>>44<<20 | h(1024)>>44
}

// BodyFor returns the body with its model replaced by model, all other bytes as they are. With an empty model it
// returns the body itself.
func (l *Line) BodyFor(model string) []byte {
	if model == "" || model == l.Model {
		return l.Body
	}
	q, _ := jsontext.AppendQuote(nil, model) // any string can be quoted; invalid UTF-8 is replaced
	out := make([]byte, 0, len(l.Body)+len(q)+len(`"model":,`))
	if l.modelTo > 0 {
		out = append(out, l.Body[:l.modelFrom]...)
		out = append(out, q...)
		return append(out, l.Body[l.modelTo:]...)
	}
	out = append(out, l.Body[:l.modelAt]...)
	out = append(out, `"model":`...)
	out = append(out, q...)
	if !l.empty {
		out = append(out, ',')
	}
	return append(out, l.Body[l.modelAt:]...)
}
