package worker

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"
)

// dial makes both ways of a client dial so.
func (h *HTTP) dial(d *net.Dialer) {
	h.rt.DialContext = d.DialContext
	if h.direct != nil {
		h.direct.dialer = d
	}
}

// TestInterrupted ends the context of a request at each stage of it. The error is the cause, on both ways.
func TestInterrupted(t *testing.T) {
	for _, stage := range []string{"before", "dialling", "writing", "waiting", "head", "body", "chunks"} {
		for _, cause := range []error{errCancelled, context.DeadlineExceeded, nil} { // nil: a deadline of the context's own
			for _, way := range []string{"direct", "net/http"} {
				t.Run(stage, func(t *testing.T) {
					for limit := 10 * time.Millisecond; !testInterrupted(t, stage, cause, way, limit); limit *= 2 {
					}
				})
			}
		}
	}
}

// testInterrupted says whether the stage was reached within the limit, which is that of a context with a deadline.
func testInterrupted(t *testing.T, stage string, cause error, way string, limit time.Duration) bool {
	there, over := make(chan time.Time, 1), make(chan struct{})
	e := newRaw(t, true, func(e *raw, nc net.Conn, r *bufio.Reader) {
		if stage == "writing" {
			_, _ = r.ReadByte() // the client has begun, and cannot end
		} else if e.request(r) == nil {
			return
		}
		_, _ = io.WriteString(nc, map[string]string{
			"head":   "HTTP/1.1 200 OK\r\nConte",
			"body":   "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi",
			"chunks": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"}[stage])
		there <- time.Now()
		<-over
	})
	defer close(over)
	h, q := e.clients()[way], request(0)
	switch stage {
	case "writing":
		h.dial(&net.Dialer{Control: setBuffer(syscall.SO_SNDBUF)})
		q.Body = []byte(strings.Repeat("x", directBody))
	case "dialling":
		h.dial(&net.Dialer{ControlContext: func(ctx context.Context, _, _ string, _ syscall.RawConn) error {
			there <- time.Now()
			<-ctx.Done()
			return ctx.Err()
		}})
	case "before":
		there <- time.Now()
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	want := cause
	if cause == nil {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, limit)
		defer stop()
		want = context.DeadlineExceeded
	}
	switch {
	case cause == nil && stage == "before":
		<-ctx.Done()
	case cause == nil:
	case stage == "before":
		cancel(cause)
	default:
		go func() {
			select {
			case <-there:
				cancel(cause)
			case <-over:
			}
		}()
	}
	a, err := h.Do(ctx, q)
	if cause == nil {
		end, _ := ctx.Deadline()
		select {
		case at := <-there:
			if at.After(end) {
				return false
			}
		default:
			return false
		}
	}
	if !errors.Is(err, want) || context.Cause(ctx) != want {
		t.Errorf("%s: HTTP %d, %v, want %v", way, a.Status, err, want)
	}
	if v := classify("", a, err); want == context.DeadlineExceeded && v.class != classTimeout {
		t.Errorf("%s: %v", way, v.class)
	}
	if n := e.conns.Load(); stage == "before" && n != 0 {
		t.Errorf("%s: %d connections", way, n)
	}
	if h.direct != nil {
		h.direct.mu.Lock()
		defer h.direct.mu.Unlock()
		if n := len(h.direct.idle); n != 0 {
			t.Errorf("%s: %d idle connections", way, n)
		}
	}
	return true
}

// TestEarlyAnswer: an engine that answers before it has read, and does not read, is heard.
func TestEarlyAnswer(t *testing.T) {
	const no = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno"
	for _, c := range []struct {
		name   string
		size   int
		narrow bool // the body does not fit the buffers
		shut   bool // the engine closes the connection at once
		early  bool // it does not even read the head
	}{
		{"stays", directBody, false, false, false},
		{"stays, no head", directBody, false, false, true},
		{"closes, narrow", directBody, true, true, false},
		{"large, stays", 4 << 20, false, false, false},
		{"large, narrow, stays", 4 << 20, true, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			over := make(chan struct{})
			e := newRaw(t, c.narrow, func(_ *raw, nc net.Conn, r *bufio.Reader) {
				if !c.early {
					if _, err := http.ReadRequest(r); err != nil {
						return
					}
				}
				_, _ = io.WriteString(nc, no)
				if !c.shut {
					<-over
				}
			})
			defer close(over)
			h := e.direct()
			if c.narrow {
				h.dial(&net.Dialer{Control: setBuffer(syscall.SO_SNDBUF)})
			}
			q := request(0)
			q.Body = []byte(strings.Repeat("x", c.size))
			if h.direct.prefix(q) == nil != (c.size > directBody) {
				t.Error("it goes the other way")
			}
			if a, err := h.Do(t.Context(), q); err != nil || a.Status != 413 || string(a.Body) != "no" {
				t.Errorf("HTTP %d %q, %v", a.Status, a.Body, err)
			}
		})
	}
}
