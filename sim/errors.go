package sim

import (
	"fmt"
	"net/http"
	"strconv"

	"github.com/go-json-experiment/json/jsontext"
)

// apiError is an answer other than 200, as vLLM writes it.
type apiError struct {
	status  int
	message string
	kind    string // "type" in the body; vLLM spells that of a 400 in two ways
	param   string // "" is null
	raw     string // whole body, for those without the usual form
}

const (
	kindBadBody    = "Bad Request"     // from the validation of the body
	kindBadRequest = "BadRequestError" // from the engine
)

func badRequest(param, format string, args ...any) *apiError {
	return &apiError{status: http.StatusBadRequest, message: fmt.Sprintf(format, args...), kind: kindBadRequest, param: param}
}

func detail(status int, text string) *apiError {
	return &apiError{status: status, raw: `{"detail":"` + text + `"}`}
}

func unauthorized() *apiError {
	return &apiError{status: http.StatusUnauthorized, raw: `{"error":"Unauthorized"}`}
}

func unknownModel(name, aliases string) *apiError {
	return &apiError{
		status:  http.StatusNotFound,
		message: "The model `" + name + "` does not exist. Valid aliases: " + aliases + ".",
		kind:    "NotFoundError", param: "model",
	}
}

func internalError(message string) *apiError {
	return &apiError{status: http.StatusInternalServerError, message: message, kind: "InternalServerError"}
}

func engineDead() *apiError {
	return internalError("EngineCore encountered an issue. See stack trace (above) for the root cause.")
}

func stopping() *apiError {
	return internalError("cannot schedule new futures after shutdown")
}

func busy() *apiError {
	return &apiError{
		status: http.StatusServiceUnavailable,
		message: "The engine is currently busy and cannot accept new requests. " +
			"Please try again later or on a different instance.",
		kind: http.StatusText(http.StatusServiceUnavailable),
	}
}

// injected is the body of an error that was asked for by Faults.Errors.
func (e *Engine) injected(status int) *apiError {
	switch status {
	case http.StatusBadRequest:
		return badRequest("", "injected fault")
	case http.StatusUnauthorized:
		return unauthorized()
	case http.StatusNotFound:
		return unknownModel(e.cfg.Models[0], e.aliases())
	case http.StatusInternalServerError:
		return internalError("Internal server error")
	case http.StatusServiceUnavailable:
		return busy()
	}
	text := http.StatusText(status)
	return &apiError{status: status, message: text, kind: text}
}

func (a *apiError) body() []byte {
	if a.raw != "" {
		return []byte(a.raw)
	}
	b := quote([]byte(`{"error":{"message":`), a.message)
	b = quote(append(b, `,"type":`...), a.kind)
	b = append(b, `,"param":`...)
	if a.param == "" {
		b = append(b, "null"...)
	} else {
		b = quote(b, a.param)
	}
	b = strconv.AppendInt(append(b, `,"code":`...), int64(a.status), 10)
	return append(b, "}}"...)
}

func (a *apiError) write(w http.ResponseWriter) { writeJSON(w, a.status, a.body()) }

// quote appends s as a JSON string. Invalid UTF-8 becomes U+FFFD.
func quote(b []byte, s string) []byte {
	b, _ = jsontext.AppendQuote(b, s) // the error only tells of invalid UTF-8
	return b
}

func writeJSON(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h["Content-Type"] = []string{"application/json"}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	w.Write(body) // a client that left finds out by itself
}
