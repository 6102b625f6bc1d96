package proto

import (
	"strings"
	"testing"
)

// benchRequest and benchResult have the sizes of a line of 1 KB and of a short answer.
func benchRequest() *Request {
	return &Request{Job: "requests-0123456789", Index: 123456, CustomID: "request-00123456", URL: "/v1/chat/completions", Model: "m",
		Body: []byte(`{"model":"m","messages":[{"role":"user","content":"` + strings.Repeat("some words of a prompt, ", 36) + `"}]}`), MaxAttempts: 4, TimeoutMS: 1_800_000}
}

func benchResult() *Result {
	return &Result{Job: "requests-0123456789", Index: 123456, CustomID: "request-00123456", Model: "m", URL: "/v1/chat/completions",
		OK: true, Status: 200, RequestID: "chatcmpl-0123456789abcdef", Finish: "stop", Usage: Usage{Counted: true, Prompt: 200, Completion: 100},
		Body:   []byte(`{"choices":[{"message":{"content":"` + strings.Repeat("some words of an answer, ", 20) + `"}}]}`),
		Worker: "host-0123abcd", StartUS: 123456789, DurationUS: 4567890, LoadUS: 9876543}
}

func BenchmarkEncode(b *testing.B) {
	b.Run("request", func(b *testing.B) { benchEncode(b, benchRequest()) })
	b.Run("result", func(b *testing.B) { benchEncode(b, benchResult()) })
}

func benchEncode(b *testing.B, r interface{ Encode() ([]byte, error) }) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Encode(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	q, err := benchRequest().Encode()
	if err != nil {
		b.Fatal(err)
	}
	r, err := benchResult().Encode()
	if err != nil {
		b.Fatal(err)
	}
	b.Run("request", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := DecodeRequest(q); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("result", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := DecodeResult(r); err != nil {
				b.Fatal(err)
			}
		}
	})
}
