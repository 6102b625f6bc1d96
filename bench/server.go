package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"
)

const (
	answer = `{"id":"chatcmpl-0","object":"chat.completion","created":1,"model":"` + model + `","choices":[{"index":0,"message":{"role":"assistant","content":"This answer is always the same."},"finish_reason":"stop"}],"usage":{"prompt_tokens":200,"total_tokens":207,"completion_tokens":7}}`
	models = `{"object":"list","data":[{"id":"` + model + `","object":"model","max_model_len":4096}]}`
)

// serve is the fixed trivial server, the same for wrk and for millrace: it reads the body and says the same to
// everything. It prints its address and ends with ctx.
func serve(ctx context.Context) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	fmt.Println("http://" + ln.Addr().String())
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /v1/models", constant(models))
	mux.HandleFunc("POST /v1/chat/completions", constant(answer))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

func constant(text string) http.HandlerFunc {
	out, length := []byte(text), []string{strconv.Itoa(len(text))}
	kind := []string{"application/json"}
	return func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		w.Header()["Content-Type"], w.Header()["Content-Length"] = kind, length
		_, _ = w.Write(out) // who asked sees what is missing
	}
}
