//go:build vllm && linux

package main

import (
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// recordedFile are answers of an engine of the version that is pinned. How the worker classifies each of them is
// tested there.
const recordedFile = "../../testdata/vllm/vllm-0.32.0-cpu.jsonl"

// replay sends what was recorded again. Errors must be the same to the byte, answers have the same fields: then the
// verdicts on the recordings hold for the engine that runs here.
func replay(t *testing.T, e *realVLLM) {
	e.start(t)
	n := 0
	eachLine(t, recordedFile, func(b []byte) {
		var r struct {
			Name, Method, Path, Request, Body string
			RequestHeaders                    map[string]string `json:"request_headers"`
			Status                            int
		}
		if err := json.Unmarshal(b, &r, json.MatchCaseInsensitiveNames(true)); err != nil {
			t.Fatal(err)
		}
		if r.Method != http.MethodPost || strings.Contains(r.Request, "…[") { // the recording is shortened
			return
		}
		req, err := http.NewRequestWithContext(t.Context(), r.Method, e.url()+r.Path, strings.NewReader(r.Request))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		for k, v := range r.RequestHeaders {
			req.Header.Set(k, v)
		}
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		n++
		switch {
		case err != nil || res.StatusCode != r.Status:
			t.Errorf("%s: HTTP %d, recorded was %d: %v %s", r.Name, res.StatusCode, r.Status, err, body)
		case r.Status != http.StatusOK && string(body) != r.Body:
			t.Errorf("%s: says\n%s\nrecorded was\n%s", r.Name, body, r.Body)
		case r.Status == http.StatusOK && !slices.Equal(fields(body), fields([]byte(r.Body))):
			t.Errorf("%s: has the fields\n%v\nrecorded were\n%v", r.Name, fields(body), fields([]byte(r.Body)))
		}
	})
	t.Logf("%d recorded requests", n)
}

// fields are the names in an answer; none, where it is not one JSON object.
func fields(body []byte) []string {
	var m map[string]jsontext.Value
	if json.Unmarshal(body, &m, jsontext.AllowInvalidUTF8(true)) != nil {
		return nil
	}
	return slices.Sorted(maps.Keys(m))
}
