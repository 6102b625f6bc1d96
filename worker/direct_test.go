package worker

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"millrace/proto"
)

// raw is an engine that does with each connection what a function says.
type raw struct {
	tb    testing.TB
	addr  string
	conns atomic.Int64 // that came
	asked atomic.Int64 // requests that were read whole
}

// newRaw listens. Small makes the buffers of its connections as small as they get.
func newRaw(tb testing.TB, small bool, serve func(*raw, net.Conn, *bufio.Reader)) *raw {
	tb.Helper()
	if t, ok := tb.(*testing.T); ok {
		tb.Cleanup(func() { goleak.VerifyNone(t, goleak.IgnoreCurrent()) })
	}
	var lc net.ListenConfig
	if small {
		lc.Control = setBuffer(syscall.SO_RCVBUF)
	}
	ln, err := lc.Listen(tb.Context(), "tcp", "127.0.0.1:0")
	must(tb, err)
	e := &raw{tb: tb, addr: ln.Addr().String()}
	var all sync.WaitGroup
	end := make(chan struct{})
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			e.conns.Add(1)
			stop := make(chan struct{})
			all.Go(func() {
				defer close(stop)
				defer c.Close()
				serve(e, c, bufio.NewReader(c))
			})
			all.Go(func() {
				select {
				case <-end:
					c.Close()
				case <-stop:
				}
			})
		}
	})
	tb.Cleanup(func() {
		close(end)
		ln.Close()
		all.Wait()
	})
	return e
}

func setBuffer(which int) func(_, _ string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, which, 4096) })
	}
}

// request reads one whole request; nil: there is none.
func (e *raw) request(r *bufio.Reader) *http.Request {
	q, err := http.ReadRequest(r)
	if err != nil {
		return nil
	}
	b, err := io.ReadAll(q.Body)
	if err != nil {
		return nil
	}
	q.Body = io.NopCloser(strings.NewReader(string(b)))
	e.asked.Add(1)
	return q
}

// clients are the two ways of one engine client: our own connections, and net/http's.
func (e *raw) clients() map[string]*HTTP {
	e.tb.Helper()
	out := map[string]*HTTP{"direct": nil, "net/http": nil}
	for name := range out {
		h, err := NewHTTP("http://"+e.addr, "key")
		must(e.tb, err)
		e.tb.Cleanup(h.CloseIdleConnections)
		if h.direct == nil {
			e.tb.Fatal("no direct way")
		}
		if name == "net/http" {
			h.direct = nil
		}
		out[name] = h
	}
	return out
}

func (e *raw) direct() *HTTP { e.tb.Helper(); return e.clients()["direct"] }

const small = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"

// TestDirectAnswers: all shapes of answers, whole and torn, mean the same whichever way they come.
func TestDirectAnswers(t *testing.T) {
	const keep, shut, reset = 0, 1, 2
	for _, c := range []struct {
		name   string
		say    string
		end    int
		status int
		body   string
		class  class // classDone: there is no error
		conns  int64 // for two requests
	}{
		{"length", small, keep, 200, "hi", classDone, 1},
		{"empty", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", keep, 200, "", classDone, 1},
		{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n1\r\ni\r\n0\r\n\r\n", keep, 200, "hi", classDone, 1},
		{"trailer", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n2\r\nhi\r\n0\r\nX: y\r\n\r\n", keep, 200, "hi", classDone, 1},
		{"until the end", "HTTP/1.1 200 OK\r\n\r\nhi", shut, 200, "hi", classDone, 2},
		{"close", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi", keep, 200, "hi", classDone, 2},
		{"1.0", "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", shut, 200, "hi", classDone, 2},
		{"1.0 until the end", "HTTP/1.0 200 OK\r\n\r\nhi", shut, 200, "hi", classDone, 2},
		{"1.0 kept", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi", keep, 200, "hi", classDone, 1},
		{"204", "HTTP/1.1 204 No Content\r\n\r\n", keep, 204, "", classDone, 1},
		{"304", "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", keep, 304, "", classDone, 1},
		{"redirect", "HTTP/1.1 307 Temporary Redirect\r\nLocation: /there\r\nContent-Length: 0\r\n\r\n", keep, 307, "", classDone, 1},
		{"continue", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + small, keep, 200, "hi", classDone, 1},
		{"switch", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", keep, 101, "", classDone, 2},
		{"more than asked", small + "HTTP/1.1 200 OK\r\n", keep, 200, "hi", classDone, 2},
		{"too large", fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", maxAnswer+1), keep, 200, "", classDone, 2},
		{"nothing", "", shut, 0, "", classBroken, 2},
		{"nothing, reset", "", reset, 0, "", classBroken, 2},
		{"torn in the status", "HTTP/1.1 2", shut, 0, "", classBroken, 2},
		{"torn in the head", "HTTP/1.1 200 OK\r\nContent-Le", shut, 0, "", classBroken, 2},
		{"torn before the body", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", shut, 200, "", classBroken, 2},
		{"torn in the body", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", shut, 200, "", classBroken, 2},
		{"torn in a chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhi", shut, 200, "", classBroken, 2},
		{"torn between chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n", shut, 200, "", classBroken, 2},
		{"no chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhi\r\n", keep, 200, "", classBroken, 2},
		{"two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi", keep, 0, "", classBroken, 2},
		{"not HTTP", "SSH-2.0-x\r\n\r\n", keep, 0, "", classBroken, 2},
		{"torn after a continue", "HTTP/1.1 100 Continue\r\n\r\n", shut, 0, "", classBroken, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newRaw(t, false, func(e *raw, nc net.Conn, r *bufio.Reader) {
				for e.request(r) != nil {
					_, _ = io.WriteString(nc, c.say) // the client sees what is missing
					switch c.end {
					case reset:
						_ = nc.(*net.TCPConn).SetLinger(0)
						return
					case shut:
						return
					}
				}
			})
			var heads []http.Header
			clients := e.clients()
			if c.name == "more than asked" { // whether net/http sees it in time is a race of its own
				delete(clients, "net/http")
			}
			for name, h := range clients {
				e.conns.Store(0)
				for range 2 {
					a, err := h.Do(t.Context(), request(0))
					got := classDone
					if err != nil {
						got = classify("", a, err).class
						a.Body = nil // what came of it
					}
					if a.Status != c.status || string(a.Body) != c.body || got != c.class || a.TooLarge != (c.name == "too large") {
						t.Fatalf("%s: HTTP %d %q, %v %v", name, a.Status, a.Body, got, err)
					}
					heads = append(heads, a.Header)
				}
				if n := e.conns.Load(); name == "direct" && n != c.conns {
					t.Errorf("%d connections, want %d", n, c.conns)
				}
			}
			for _, h := range heads[1:] {
				if !reflect.DeepEqual(h, heads[0]) {
					t.Errorf("heads %v and %v", heads[0], h)
				}
			}
			if n := int(e.asked.Load()); n != 2*len(clients) {
				t.Errorf("%d requests came, want %d", n, 2*len(clients))
			}
		})
	}
}

// TestDirectLongHead: an engine that never comes to its answer.
func TestDirectLongHead(t *testing.T) {
	for name, say := range map[string]string{"fields": "X: " + strings.Repeat("x", 1000) + "\r\n", "continues": "\r\nHTTP/1.1 100 Continue\r\n"} {
		t.Run(name, func(t *testing.T) {
			e := newRaw(t, false, func(_ *raw, nc net.Conn, _ *bufio.Reader) {
				_, err := io.WriteString(nc, "HTTP/1.1 100 Continue\r\n")
				for err == nil {
					_, err = io.WriteString(nc, say)
				}
			})
			if a, err := e.direct().Do(t.Context(), request(0)); !errors.Is(err, errHead) {
				t.Errorf("HTTP %d, %v", a.Status, err)
			}
		})
	}
}

// TestDirectRequest: an engine is told the same on both ways.
func TestDirectRequest(t *testing.T) {
	came := make(chan *http.Request, 2)
	e := newRaw(t, false, func(e *raw, nc net.Conn, r *bufio.Reader) {
		for q := e.request(r); q != nil; q = e.request(r) {
			came <- q
			_, _ = io.WriteString(nc, small)
		}
	})
	for _, c := range []struct{ engine, key, url, job, addr string }{
		{"http://h", "", "/v1/completions", "j", "h:80"},
		{"http://h:", "", "/v1/completions", "j", "h:80"},
		{"http://h:8000/llm/v1/", "k", "/v1/completions", "j", "h:8000"},
		{"http://H.example:80/a b/%2f", "k", "/v1/x?a=b%20c&d#e", "j", "h.example:80"},
		{"http://u:p@h:1", "", "/v1/ü ü", "a job", "h:1"},
		{"http://u:p@h:1", "k", "//x/../y", "j", "h:1"},
		{"http://[::1]", "", "/v1/completions", "j", "[::1]:80"},
		{"http://[::1]:8000", "", "/v1/completions", "j", "[::1]:8000"},
		{"http://h", "", "v1/x", "j", "h:80"},           // net/http refuses it
		{"http://h", "", "/v1\r\nX: y", "j", "h:80"},    // so it does that
		{"http://h", "", "/v1/x", "j\r\nX: y", "h:80"},  // and that
		{"http://h", "k\r\nX: y", "/v1/x", "j", ""},     // and that
		{"http://h_\u00fc", "", "/v1/x", "j", ""},       // net/http turns such names into ASCII
		{"http://[fe80::1%25lo]:1", "", "/v1", "j", ""}, // and leaves the zone away
		{"https://h", "", "", "", ""},
	} {
		h, err := NewHTTP(c.engine, c.key)
		must(t, err)
		t.Cleanup(h.CloseIdleConnections)
		d := h.direct
		if d == nil != (c.addr == "") || d != nil && d.addr != c.addr {
			t.Errorf("%s: %+v, want to dial %q", c.engine, d, c.addr)
		}
		if c.url == "" {
			continue
		}
		h.rt.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", e.addr)
		}
		q := request(7)
		q.URL, q.Job = c.url, c.job
		h.direct = nil
		_, plain := h.Do(t.Context(), q)
		if h.direct = d; d != nil {
			d.addr = e.addr
		}
		if _, err = h.Do(t.Context(), q); (err == nil) != (plain == nil) {
			t.Errorf("%s%s: %v, by net/http %v", c.engine, c.url, err, plain)
		}
		if err != nil {
			continue
		}
		a, b := <-came, <-came
		if a.RequestURI != b.RequestURI || a.Host != b.Host || a.ContentLength != b.ContentLength || !reflect.DeepEqual(a.Header, b.Header) || !reflect.DeepEqual(a.Body, b.Body) {
			t.Errorf("%s%s:\n%s %s %d %v %v\n%s %s %d %v %v", c.engine, c.url, b.RequestURI, b.Host, b.ContentLength, b.Header, b.Body, a.RequestURI, a.Host, a.ContentLength, a.Header, a.Body)
		}
	}
}

// TestDirectClosed: what the engine does with an idle connection is noticed before that is used.
func TestDirectClosed(t *testing.T) {
	for name, then := range map[string]func(net.Conn){
		"closed": func(net.Conn) {},
		"reset":  func(nc net.Conn) { _ = nc.(*net.TCPConn).SetLinger(0) },
		"talked": func(nc net.Conn) {
			_, _ = io.WriteString(nc, "HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newRaw(t, false, func(e *raw, nc net.Conn, r *bufio.Reader) {
				if e.request(r) != nil {
					_, _ = io.WriteString(nc, small)
					_, _ = r.ReadByte() // until the client asks for more, or the test for this
					then(nc)
				}
			})
			h := e.direct()
			_, err := h.Do(t.Context(), request(0))
			must(t, err)
			c := h.direct.idle[0]
			_, err = c.Write([]byte("x"))
			must(t, err)
			eventually(t, "the engine has done it", func() bool { return !c.quiet() })
			a, err := h.Do(t.Context(), request(1))
			if err != nil || a.Status != 200 || e.conns.Load() != 2 || e.asked.Load() != 2 {
				t.Errorf("HTTP %d, %v; %d connections, %d requests", a.Status, err, e.conns.Load(), e.asked.Load())
			}
		})
	}
}

// TestDirectGone: an engine that died while nothing was in it refuses the next request, and has no part in it.
func TestDirectGone(t *testing.T) {
	f := newFake(t)
	h := f.engine()
	_, err := h.Do(t.Context(), request(0))
	must(t, err)
	f.Close()
	a, err := h.Do(t.Context(), request(1))
	if v := classify("", a, err); v.class != classUnreached {
		t.Errorf("%v: %v", v.class, err)
	}
	h, err = NewHTTP("http://no.such.host.invalid", "")
	must(t, err)
	h.dial(&net.Dialer{Resolver: &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("no resolver")
	}}})
	if a, err := h.Do(t.Context(), request(1)); classify("", a, err).class != classUnreached {
		t.Error(err)
	}
}

// TestDirectOnce: what an engine has begun to read it is not sent again.
func TestDirectOnce(t *testing.T) {
	e := newRaw(t, false, func(e *raw, nc net.Conn, r *bufio.Reader) {
		if e.request(r) != nil {
			_, _ = io.WriteString(nc, small)
			_, _ = r.ReadByte()
		}
		_ = nc.(*net.TCPConn).SetLinger(0)
	})
	h := e.direct()
	_, err := h.Do(t.Context(), request(0))
	must(t, err)
	a, err := h.Do(t.Context(), request(1))
	if v := classify("", a, err); v.class != classBroken || a.Status != 0 || e.conns.Load() != 1 {
		t.Errorf("%v: HTTP %d, %v; %d connections", v.class, a.Status, err, e.conns.Load())
	}
}

// TestDirectUntouched: a connection that took not one byte is replaced.
func TestDirectUntouched(t *testing.T) {
	f := newFake(t)
	h := f.engine()
	_, err := h.Do(t.Context(), request(0))
	must(t, err)
	must(t, h.direct.idle[0].SetWriteDeadline(time.Unix(1, 0)))
	if a, err := h.Do(t.Context(), request(1)); err != nil || a.Status != 200 {
		t.Errorf("HTTP %d, %v", a.Status, err)
	}
	if got := f.enter(2); len(f.came) != 0 {
		t.Errorf("%q came, and more", got)
	}
}

// TestDirectUnwritten: an engine to which not one byte went never had the request, unless it says something.
func TestDirectUnwritten(t *testing.T) {
	for says, want := range map[string]class{"": classUnreached, "HTTP/1.1 200": classUnreached, small: classRetry} {
		e := newRaw(t, false, func(_ *raw, nc net.Conn, r *bufio.Reader) {
			_, _ = r.ReadByte() // until there is nothing to come
			_, _ = io.WriteString(nc, says)
		})
		nc, err := net.Dial("tcp", e.addr)
		must(t, err)
		must(t, nc.(*net.TCPConn).CloseWrite())
		c := newConn(nc)
		a, again, err := c.exchange(e.direct().direct.prefix(request(0)), request(0))
		if v := classify("", a, err); v.class != want || again || (err == nil) != (says == small) {
			t.Errorf("%q: %v: HTTP %d, again %v, %v", says, v.class, a.Status, again, err)
		}
		c.Close()
	}
}

// TestDirectIdle: connections that were idle for too long are closed, and not used before that.
func TestDirectIdle(t *testing.T) {
	gone := make(chan struct{}, 10)
	e := newRaw(t, false, func(e *raw, nc net.Conn, r *bufio.Reader) {
		for e.request(r) != nil {
			_, _ = io.WriteString(nc, small)
		}
		gone <- struct{}{}
	})
	h := e.direct()
	ask := func(conns int64) {
		t.Helper()
		_, err := h.Do(t.Context(), request(0))
		must(t, err)
		if n := e.conns.Load(); n != conns {
			t.Errorf("%d connections, want %d", n, conns)
		}
	}
	old := func() {
		h.direct.mu.Lock()
		defer h.direct.mu.Unlock()
		h.direct.idle[0].since = time.Now().Add(-idleLimit)
	}
	ask(1)
	old()
	ask(2)
	<-gone
	old()
	h.direct.sweep()
	<-gone
	h.direct.mu.Lock()
	n := len(h.direct.idle)
	h.direct.mu.Unlock()
	if n != 0 {
		t.Errorf("%d idle connections", n)
	}
	ask(3)
	h.CloseIdleConnections()
	<-gone
	ask(4)
}

// TestDirectEnd: a worker that ends leaves no connection.
func TestDirectEnd(t *testing.T) {
	r, f := newRig(t), newFake(t)
	h := f.engine()
	r.send(requests(5)...)
	w := r.start(h)
	r.wait(5)
	w.leave()
	w.end(t)
	h.direct.mu.Lock()
	defer h.direct.mu.Unlock()
	if n := len(h.direct.idle); n != 0 {
		t.Errorf("%d idle connections", n)
	}
}

// TestDirectMany: many callers share few connections, and each gets its own answer.
func TestDirectMany(t *testing.T) {
	var conns atomic.Int64
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		_, _ = w.Write(b) // the client sees what is missing
	}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			conns.Add(1)
		}
	}
	srv.Start()
	t.Cleanup(srv.Close)
	h, err := NewHTTP(srv.URL, "")
	must(t, err)
	t.Cleanup(h.CloseIdleConnections)
	const callers, calls = 32, 50
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			for k := range calls {
				q := &proto.Request{Job: "j", URL: "/v1/x", Body: []byte(strings.Repeat(fmt.Sprintf("%d-%d ", i, k), i*k))}
				if a, err := h.Do(t.Context(), q); err != nil || string(a.Body) != string(q.Body) {
					t.Errorf("%d-%d: %d bytes, want %d; %v", i, k, len(a.Body), len(q.Body), err)
				}
			}
		})
	}
	all.Wait()
	if n := conns.Load(); n > callers {
		t.Errorf("%d connections for %d callers", n, callers)
	}
}
