package worker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"millrace/proto"
)

// class is what an answer, or the lack of one, means for its line.
type class int

const (
	classDone      class = iota // the answer is the line's result
	classPermanent              // the line itself is wrong: an error result at once
	classRetry                  // the attempt failed: charged, and tried again
	classTimeout                // the engine took too long: charged, tried once more with twice the time
	classBusy                   // back-pressure: given back, not charged
	classLost                   // the engine gave the work up: given back, not charged
	classNoModel                // the engine does not serve the line's model
	classDenied                 // the engine wants a key
	classUnreached              // the engine never had the line
	classDead                   // the engine died while it had the line
	classBroken                 // no whole answer came: the engine died, or only the connection; its health tells
)

// verdict is what classify makes of an attempt.
type verdict struct {
	class   class
	code    string // of proto; empty where the line does not end by it
	message string
	same    string // equal for errors that are alike, see there
	noRoute bool   // it does not look like the line's fault but as if the engine had no such route
	finish  string
	parts   int           // choices, or items of a list
	limited bool          // all of them ended at a limit of tokens
	cut     bool          // see against
	model   string        // that the engine names
	id      string        // the engine's id of the answer
	delay   time.Duration // how long the engine asks to be left alone
	closed  bool          // of classBroken: maybe only an idle connection was closed
	usage   proto.Usage
}

// classify judges one attempt by what was heard. It looks at nothing else.
//
//	200, whole                                 done
//	200, finish_reason abort                   lost work
//	200, {"error":…} and nothing else          by the code inside, as if it were the status (SGLang)
//	200, anything else                         charged, bad_engine_response
//	404 that names the model                   no such model here
//	401, 403                                   the engine wants a key
//	408, 409, 425, 429, 503, 529               back-pressure
//	499                                        lost work (Ollama)
//	404, 405 that name nothing                 permanent, and likely a route that the engine does not have
//	other 4xx, 501                             permanent
//	500 "EngineCore encountered an issue"      the engine died
//	500 "cannot schedule new futures …"        the engine is stopping and took nothing in
//	502                                        a proxy found the engine dead
//	other 3xx, 5xx                             charged, engine_error
//	no connection                              the engine never had it
//	no whole answer                            broken, or too late
//
// A 200 whose content is null is done where it holds something else, as a tool call. One that holds nothing is what
// vLLM's Rust frontend says to a malformed JSON schema (0.26). A 200 without usage is done too, uncounted; one that has
// neither usage nor a finish_reason is not, since some engines say an abort like that.
func classify(url string, a Answer, err error) verdict {
	var v verdict
	switch {
	case err != nil:
		v = classifyBreak(a, err)
	case a.TooLarge:
		v = verdict{class: classPermanent, code: proto.CodeResponseTooLarge,
			message: fmt.Sprintf("the answer is longer than %d bytes", maxAnswer)}
	case a.Status/100 == 2:
		v = classifyReply(url, a)
	default:
		v = classifyStatus(a, a.Status, readError(a.Body))
	}
	v.message = proto.Truncate(v.message, proto.MaxMessage)
	if v.id == "" && a.Header != nil {
		v.id = a.Header.Get("X-Request-Id")
	}
	switch v.class {
	case classPermanent, classRetry, classNoModel, classBroken: // the last two where it turns out that the engine is up and lists the model
		v.same = strconv.Itoa(a.Status) + " " + v.code + " " + alike(v.message)
	}
	return v
}

// classifyBreak judges an attempt without a whole answer.
func classifyBreak(a Answer, err error) verdict {
	var op *net.OpError
	var dns *net.DNSError
	switch {
	case errors.As(err, &op) && op.Op == "dial", errors.As(err, &dns):
		return verdict{class: classUnreached, code: proto.CodeTransport, message: err.Error()}
	case errors.Is(err, context.DeadlineExceeded):
		return verdict{class: classTimeout, code: proto.CodeRequestTimeout, message: "the engine did not answer in time"}
	case a.Status != 0:
		return verdict{class: classBroken, code: proto.CodeTransport, message: fmt.Sprintf("the connection broke in the middle of an answer with HTTP %d: %s", a.Status, plain(err.Error()))}
	}
	var stale *staleError
	return verdict{class: classBroken, closed: errors.As(err, &stale), code: proto.CodeTransport, message: "the connection broke before an answer: " + plain(err.Error())}
}

func classifyReply(url string, a Answer) verdict {
	r, err := readReply(a.Body)
	bad := func(format string, args ...any) verdict {
		return verdict{class: classRetry, code: proto.CodeBadResponse, message: fmt.Sprintf(format, args...), id: r.id}
	}
	switch {
	case len(a.Body) == 0:
		return bad("HTTP %d without a body", a.Status)
	case err != nil:
		return bad("HTTP %d with a body that is not whole JSON: %v", a.Status, err)
	case r.abort:
		return verdict{class: classLost, message: "the engine gave the request up", id: r.id}
	case r.refusal != nil && !r.whole():
		return classifyInside(a, r)
	case r.failed:
		return bad("the engine ended the answer with an error")
	case r.later:
		return bad("the engine answered before its work was done")
	case !r.whole():
		return bad("HTTP %d without choices, data, output or results, from %s", a.Status, url)
	case r.empty:
		return bad("HTTP %d with an answer that holds nothing: no text, tool call, reasoning or refusal, or a vector without numbers", a.Status)
	case r.choices >= 0 && r.finish == "" && r.usage == nil:
		return bad("HTTP %d without finish_reason and usage", a.Status)
	}
	v := verdict{class: classDone, finish: r.finish, id: r.id, model: r.model, parts: max(r.choices, r.items),
		limited: r.choices > 0 && r.limited == r.choices || r.stopped}
	if r.usage != nil { // the rest of a long answer need not be read twice
		v.usage = proto.ReadUsage(r.usage)
	}
	return v
}

// classifyInside judges a 200 that holds an error instead of an answer.
func classifyInside(a Answer, r reply) verdict {
	e := readError(a.Body)
	if status, err := strconv.Atoi(e.code); err == nil && status >= 400 && status <= 599 {
		return classifyStatus(a, status, e)
	}
	return verdict{class: classRetry, code: proto.CodeBadResponse, message: "HTTP 200 with an error: " + e.message, id: r.id}
}

func classifyStatus(a Answer, status int, e errorBody) verdict {
	v := verdict{message: e.message}
	if v.message == "" {
		v.message = fmt.Sprintf("HTTP %d %s", status, http.StatusText(status))
	}
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden:
		v.class = classDenied
	case http.StatusRequestTimeout, http.StatusConflict, http.StatusTooEarly, http.StatusTooManyRequests, http.StatusServiceUnavailable, 529:
		v.class, v.delay = classBusy, retryAfter(a.Header)
	case 499:
		v.class = classLost
	case http.StatusNotFound, http.StatusMethodNotAllowed:
		v.class, v.code, v.noRoute = classPermanent, proto.CodeInvalidRequest, e.param == ""
		if status == http.StatusNotFound && e.namesModel() {
			v.class, v.noRoute = classNoModel, false
		}
	case http.StatusInternalServerError:
		v.class, v.code = classifyInternal(e.message)
	case http.StatusNotImplemented:
		v.class, v.code = classPermanent, proto.CodeInvalidRequest
	case http.StatusBadGateway:
		v.class, v.code = classDead, proto.CodeEngineError
	default:
		v.class, v.code = classRetry, proto.CodeEngineError
		if status/100 == 4 {
			v.class, v.code = classPermanent, e.permanentCode()
		}
	}
	return v
}

// classifyInternal tells a dying engine from one that failed over one request: the status is 500 for both.
func classifyInternal(message string) (class, string) {
	switch {
	case strings.Contains(message, "EngineCore encountered an issue"), strings.Contains(message, "EngineDeadError"):
		return classDead, proto.CodeEngineError
	case strings.Contains(message, "cannot schedule new futures after"):
		return classUnreached, proto.CodeEngineError
	}
	return classRetry, proto.CodeEngineError
}

// namesModel says whether a 404 is about the model. Its type is NotFoundError (Python), invalid_request_error (Rust),
// not_found_error (Ollama) or not there (Ollama's own routes); an unknown path has no param.
func (e errorBody) namesModel() bool {
	return e.param == "model" || e.code == "model_not_found" || strings.HasPrefix(e.message, "model ") ||
		(e.typ == "NotFoundError" || e.typ == "not_found_error") && strings.Contains(e.message, "model")
}

// permanentCode tells a prompt that is too long from other mistakes.
func (e errorBody) permanentCode() string {
	m := strings.ToLower(e.message)
	switch {
	case e.param == "input_tokens", e.param == "input_text",
		e.code == "context_length_exceeded", e.typ == "exceed_context_size_error",
		strings.Contains(m, "maximum context length"), strings.Contains(m, "context length is only"),
		strings.Contains(m, "longer than the model's context length"),  // SGLang
		strings.Contains(m, "exceeds the available context size"),      // llama.cpp
		strings.Contains(m, "input length exceeds the context length"): // Ollama
		return proto.CodeContextLength
	}
	return proto.CodeInvalidRequest
}

// retryAfter reads a delay in seconds. A date is not followed: it would compare two machines' clocks.
func retryAfter(h http.Header) time.Duration {
	s, err := strconv.ParseFloat(strings.TrimSpace(h.Get("Retry-After")), 64)
	if err != nil || s <= 0 {
		return 0
	}
	return min(time.Duration(s*float64(time.Second)), 5*time.Minute)
}

var ends = regexp.MustCompile(`\b(read|write) (tcp|udp)[46]? \S+->\S+: `)

// plain removes from the text of an error the two ends of its connection: one of them is another each time.
func plain(text string) string { return ends.ReplaceAllString(text, "") }

var varying = regexp.MustCompile("`[^`]*`|'[^']*'|\"[^\"]*\"|[\\w-]*[0-9][\\w-]*")

// alike removes from a message what differs between two lines with the same mistake: quoted text, numbers, and words
// that contain a digit, as a request's id does.
func alike(message string) string { return varying.ReplaceAllString(message, "#") }
