package worker

import (
	"context"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"millrace/proto"
)

const (
	idleLimit  = 3 * time.Second // uvicorn closes what is idle for 5 s
	directBody = 64 << 10        // longest body that goes this way, in bytes
)

// direct posts requests over plain HTTP/1.1 in the caller's goroutine. net/http's transport has two more for each
// connection, and hands every request and answer over between the three. Heads and bodies of answers are read by
// net/http here too: only the connection is ours. These hold, because the blame for an engine's death rests on them:
//
//   - A request is sent once. It goes to another connection only if not one byte of it was written.
//   - A connection that the engine has closed is noticed before it is used: an engine that died idle refuses the
//     next request, it does not break it.
//   - When the context ends before the answer is whole, the error is the context's cause.
//
// It writes, then reads. A body up to directBody fits the buffers of the two sockets, so an engine that answers
// without reading does not leave both sides waiting; longer ones go through net/http, which does both at once.
type direct struct {
	base   string // URL of the engine
	host   string // as in the Host header
	addr   string // to dial
	auth   string // value of Authorization; empty: none
	dialer *net.Dialer
	last   atomic.Pointer[prefix]

	mu       sync.Mutex
	idle     []*conn   // the one used last comes last
	sweeping bool      // sweep will be called
	live     int       // connections
	engine   time.Time // see Answer.Since
}

// prefix is the head of a request up to its id. Most requests have the same URL.
type prefix struct{ url, text string }

// newDirect returns nil where the engine's URL or key asks for more than is done here.
func newDirect(u *url.URL, auth string, dialer *net.Dialer) *direct {
	host := strings.TrimSuffix(u.Host, ":")
	odd := func(r rune) bool {
		return !strings.ContainsRune(".-_:[]", r) && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}
	if u.Scheme != "http" || strings.ContainsFunc(host, odd) || !clean(auth) { // names beyond ASCII, zones
		return nil
	}
	port := u.Port()
	if port == "" {
		port = "80"
	}
	return &direct{base: u.String(), host: host, addr: net.JoinHostPort(u.Hostname(), port), auth: auth, dialer: dialer}
}

// clean says whether a text can stand in a head.
func clean(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] == 0x7f {
			return false
		}
	}
	return true
}

// prefix returns nil for a request that has to go through net/http.
func (d *direct) prefix(r *proto.Request) *prefix {
	if d == nil || len(r.Body) > directBody || !clean(r.Job) {
		return nil
	}
	if p := d.last.Load(); p != nil && p.url == r.URL {
		return p
	}
	u, err := url.Parse(d.base + r.URL)
	if err != nil || !strings.HasPrefix(r.URL, "/") {
		return nil
	}
	p := &prefix{r.URL, "POST " + u.RequestURI() + " HTTP/1.1\r\nHost: " + d.host + "\r\nUser-Agent: Go-http-client/1.1\r\n"}
	if d.auth != "" {
		p.text += "Authorization: " + d.auth + "\r\n"
	}
	p.text += "Content-Type: application/json\r\nX-Request-Id: "
	d.last.Store(p)
	return p
}

// do sends a request and returns the answer, as Engine.Do does.
func (d *direct) do(ctx context.Context, p *prefix, r *proto.Request) (Answer, error) {
	for {
		c, err := d.open(ctx)
		if err != nil {
			return Answer{}, err
		}
		stop := context.AfterFunc(ctx, c.interrupt)
		a, again, err := c.exchange(p, r)
		switch ended := !stop(); {
		case err == nil:
			a.Since = d.since(c)
			switch {
			case ended:
				d.close(c)
			case c.reusable:
				d.put(c)
			default:
				d.lose(c)
			}
			return a, nil
		case ended:
			d.close(c)
			return a, context.Cause(ctx)
		}
		d.lose(c)
		if !again {
			return a, err
		}
	}
}

// since is when the engine of a connection that has brought an answer may last have become another one: at the latest when it
// was made, since what became of the others may not have been read yet, or during its first request.
func (d *direct) since(c *conn) time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !c.used && d.engine.After(c.engine) {
		c.engine = d.engine
	}
	return c.engine
}

// lose closes a connection that the engine has ended, or said it would: it may be another engine from now on.
func (d *direct) lose(c *conn) {
	d.close(c)
	d.mu.Lock()
	d.engine = time.Now()
	d.mu.Unlock()
}

// close closes a connection that we end.
func (d *direct) close(c *conn) {
	c.Close()
	d.mu.Lock()
	d.live--
	d.mu.Unlock()
}

// open returns an idle connection or a new one.
func (d *direct) open(ctx context.Context) (*conn, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if c := d.take(); c != nil {
		return c, nil
	}
	nc, err := d.dialer.DialContext(ctx, "tcp", d.addr)
	if c := d.dialled(nc, err); c != nil {
		return c, nil
	}
	if t, ok := ctx.Deadline(); ok && !time.Now().Before(t) {
		<-ctx.Done() // the dialer was a moment faster
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return nil, err
}

// dialled takes note of an attempt to connect.
func (d *direct) dialled(nc net.Conn, err error) *conn {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil || d.live == 0 { // nothing tells what was there meanwhile
		d.engine = time.Now()
	}
	if err != nil {
		return nil
	}
	d.live++
	c := newConn(nc)
	c.engine = time.Now()
	return c
}

// take returns the idle connection that was used last, of those that are still good, or nil.
func (d *direct) take() *conn {
	for {
		d.mu.Lock()
		n := len(d.idle) - 1
		if n < 0 {
			d.mu.Unlock()
			return nil
		}
		c := d.idle[n]
		d.idle[n], d.idle = nil, d.idle[:n]
		d.mu.Unlock()
		switch {
		case time.Since(c.since) >= idleLimit:
			d.close(c)
		case c.quiet():
			return c
		default:
			d.lose(c)
		}
	}
}

func (d *direct) put(c *conn) {
	c.used = true
	d.mu.Lock()
	defer d.mu.Unlock()
	c.since = time.Now()
	d.idle = append(d.idle, c)
	if !d.sweeping {
		d.sweeping = true
		time.AfterFunc(idleLimit, d.sweep)
	}
}

// sweep closes connections that were idle for too long, and is called again as long as any is idle.
func (d *direct) sweep() {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := 0
	for old < len(d.idle) && time.Since(d.idle[old].since) >= idleLimit {
		d.idle[old].Close()
		d.live--
		old++
	}
	d.idle = slices.Delete(d.idle, 0, old)
	if d.sweeping = len(d.idle) > 0; d.sweeping {
		time.AfterFunc(idleLimit-time.Since(d.idle[0].since), d.sweep)
	}
}

// closeIdle closes what no request uses.
func (d *direct) closeIdle() {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.idle {
		c.Close()
	}
	d.live -= len(d.idle)
	d.idle = nil
}
