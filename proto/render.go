package proto

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// AppendLine appends r as a line of the output file (ok) or the error file, newline included.
//
//	ok                {"id":…,"custom_id":…,"response":{"status_code":200,"request_id":…,"body":{…}},"error":null}
//	the engine's no   {"id":…,"custom_id":…,"response":{"status_code":400,"request_id":…,"body":{"error":{…}}},"error":null}
//	no answer         {"id":…,"custom_id":…,"response":null,"error":{"code":…,"message":…}}
//
// The error lines carry besides: where custom_id is null "line", which is that of the input from 1, or where it is not known
// "index", which counts from 0 and leaves out blank lines; and "attempts" where there were several.
// Source: https://platform.openai.com/docs/api-reference/batch/request-output.
func AppendLine(dst []byte, r *Result) []byte {
	dst = append(dst, `{"id":"`...)
	dst = append(dst, LineID(r.Job, r.Index)...)
	dst = append(dst, `","custom_id":`...)
	if r.CustomID == "" {
		dst = append(dst, "null"...)
		if r.Line > 0 {
			dst = append(dst, `,"line":`...)
			dst = strconv.AppendInt(dst, r.Line, 10)
		} else {
			dst = append(dst, `,"index":`...)
			dst = strconv.AppendInt(dst, r.Index, 10)
		}
	} else {
		dst = quote(dst, r.CustomID)
	}
	dst = append(dst, `,"response":`...)
	if r.Status == 0 || !r.OK && r.Status/100 == 2 { // a failed 200 would read as a success
		dst = append(dst, `null,"error":{"code":`...)
		dst = quote(dst, r.Code)
		dst = append(dst, `,"message":`...)
		dst = quote(dst, r.Message)
		dst = append(dst, '}')
	} else {
		dst = append(dst, `{"status_code":`...)
		dst = strconv.AppendInt(dst, r.Status, 10)
		dst = append(dst, `,"request_id":`...)
		dst = quote(dst, r.RequestID)
		dst = append(dst, `,"body":`...)
		dst = appendBody(dst, r)
		dst = append(dst, `},"error":null`...)
	}
	if !r.OK && len(r.Attempts) > 0 {
		dst = appendAttempts(dst, r.Attempts)
	}
	return append(dst, '}', '\n')
}

// LineID is the id of a line of an output or error file. It is the same for every result of the line, so that a file
// written twice is the same file, and so that a reader of the files can tell which indexes they hold.
func LineID(job string, index int64) string {
	sum := sha256.Sum256([]byte(job + "/" + strconv.FormatInt(index, 10)))
	return "batch_req_" + hex.EncodeToString(sum[:12])
}

// appendBody appends the engine's body in one line. Line breaks between the tokens of valid JSON become spaces;
// what is not JSON is wrapped in an error object.
func appendBody(dst []byte, r *Result) []byte {
	if r.OK || jsontext.Value(r.Body).IsValid(jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)) {
		body := bytes.TrimSpace(r.Body)
		if bytes.IndexByte(body, '\n') < 0 && bytes.IndexByte(body, '\r') < 0 {
			return append(dst, body...)
		}
		for _, c := range body {
			if c == '\n' || c == '\r' {
				c = ' '
			}
			dst = append(dst, c)
		}
		return dst
	}
	dst = append(dst, `{"error":{"message":`...)
	dst = quote(dst, Truncate(strings.ToValidUTF8(string(r.Body), "\uFFFD"), MaxMessage))
	dst = append(dst, `,"type":"invalid_body","param":null,"code":`...)
	dst = strconv.AppendInt(dst, r.Status, 10)
	return append(dst, "}}"...)
}

func appendAttempts(dst []byte, as []Attempt) []byte {
	dst = append(dst, `,"attempts":[`...)
	for i, a := range as {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(dst, `{"worker":`...)
		dst = quote(dst, a.Worker)
		dst = append(dst, `,"code":`...)
		dst = quote(dst, a.Code)
		dst = append(dst, `,"status_code":`...)
		dst = strconv.AppendInt(dst, a.Status, 10)
		dst = append(dst, `,"message":`...)
		dst = quote(dst, a.Message)
		dst = append(dst, `,"seconds":`...)
		dst = strconv.AppendFloat(dst, float64(a.DurationUS)/1e6, 'f', 3, 64)
		dst = append(dst, '}')
	}
	return append(dst, ']')
}

func quote(dst []byte, s string) []byte {
	out, err := jsontext.AppendQuote(dst, s)
	if err != nil { // invalid UTF-8: what could be kept is
		out, _ = jsontext.AppendQuote(dst, strings.ToValidUTF8(s, "\uFFFD"))
	}
	return out
}

// OutputLine is a line of an output or error file as it is read back.
type OutputLine struct {
	ID       string  `json:"id"`
	CustomID *string `json:"custom_id"`
	Line     int64   `json:"line"`
	Response *struct {
		StatusCode int64          `json:"status_code"`
		RequestID  string         `json:"request_id"`
		Body       jsontext.Value `json:"body"`
	} `json:"response"`
	Error *struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	} `json:"error"`
}

// ParseOutput reads a line that AppendLine wrote.
func ParseOutput(b []byte) (*OutputLine, error) {
	l := new(OutputLine)
	if err := json.Unmarshal(b, l, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)); err != nil {
		return nil, fmt.Errorf("read output line: %w", err)
	}
	return l, nil
}

// ReadUsage finds what the engine counted in an answer's body. Counted is false where it holds no usage.
func ReadUsage(body []byte) Usage {
	var v struct {
		Usage *struct {
			Prompt     int64  `json:"prompt_tokens"`
			Completion int64  `json:"completion_tokens"`
			Input      *int64 `json:"input_tokens"` // /v1/responses
			Output     *int64 `json:"output_tokens"`
			Details    *struct {
				Cached int64 `json:"cached_tokens"`
			} `json:"prompt_tokens_details"`
			InDetails *struct {
				Cached int64 `json:"cached_tokens"`
			} `json:"input_tokens_details"`
		} `json:"usage"`
	}
	if json.Unmarshal(body, &v, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)) != nil || v.Usage == nil {
		return Usage{}
	}
	u := Usage{Counted: true, Prompt: v.Usage.Prompt, Completion: v.Usage.Completion}
	if v.Usage.Input != nil {
		u.Prompt = *v.Usage.Input
	}
	if v.Usage.Output != nil {
		u.Completion = *v.Usage.Output
	}
	switch {
	case v.Usage.Details != nil:
		u.Cached = v.Usage.Details.Cached
	case v.Usage.InDetails != nil:
		u.Cached = v.Usage.InDetails.Cached
	}
	if u.Prompt < 0 || u.Completion < 0 || u.Cached < 0 {
		return Usage{} // who counts so does not count
	}
	return u
}
