package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"millrace/proto"
)

// maxAnswer is the longest body that is read from an engine, in bytes. Longer ones fit no message anyway.
const maxAnswer = 4 * proto.MaxPayload

// HTTP is an engine that speaks OpenAI's API.
//
// No request carries an Idempotency-Key: with it, Go's transport sends a request again by itself when a kept-alive
// connection breaks before the answer. That is what the death of an engine looks like, and the retry would turn it
// into "connection refused", as if the request had never been in the engine. Without it the transport repeats only
// what it has not begun to write. Connections are let go of before uvicorn closes them (after 5 s), so that idle
// ones are not met broken; so nothing needs to be closed either. Most requests do not go through that transport at
// all, but through direct, which keeps the same promises for less.
type HTTP struct {
	base  string // without a trailing slash and without /v1
	shown string // base without user information
	auth  string // value of Authorization; empty: none
	rt    *http.Transport
	about about

	direct *direct // nil: all goes through rt
}

// NewHTTP prepares a client of the engine at a URL such as http://127.0.0.1:8000; a trailing slash or /v1 makes no
// difference, and http:// may be left out. The key, if there is one, is sent as a bearer token. The environment's
// proxies are not used: engines are near.
func NewHTTP(addr, key string) (*HTTP, error) {
	u, err := parseURL(addr)
	if err != nil {
		return nil, fmt.Errorf("engine URL %q: %w; give it like http://HOST:PORT", addr, err)
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}
	h := &HTTP{rt: newTransport(dialer)}
	switch {
	case key != "":
		h.auth = "Bearer " + key
	case u.User != nil:
		r := http.Request{Header: http.Header{}}
		pass, _ := u.User.Password()
		r.SetBasicAuth(u.User.Username(), pass)
		h.auth = r.Header.Get("Authorization")
	}
	u.User = nil
	h.base = u.String()
	h.shown = h.base
	h.direct = newDirect(u, h.auth, dialer)
	return h, nil
}

func parseURL(addr string) (*url.URL, error) {
	if !strings.Contains(addr, "://") {
		addr = "http://" + addr
	}
	u, err := url.Parse(addr)
	switch {
	case err != nil:
		return nil, errors.Unwrap(err)
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("scheme %q is not http or https", u.Scheme)
	case u.Hostname() == "":
		return nil, errors.New("no host")
	case u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("a query or fragment makes no sense")
	}
	u.Path = strings.TrimRight(strings.TrimSuffix(strings.TrimRight(u.Path, "/"), "/v1"), "/")
	u.RawPath = ""
	return u, nil
}

func newTransport(dialer *net.Dialer) *http.Transport {
	return &http.Transport{
		DialContext:         dialer.DialContext,
		TLSHandshakeTimeout: 10 * time.Second,
		MaxIdleConns:        0,
		MaxIdleConnsPerHost: 1 << 14, // at least what may be in flight
		IdleConnTimeout:     idleLimit,
		DisableCompression:  true,
	}
}

func (h *HTTP) String() string { return h.shown }

// CloseIdleConnections closes the connections that no request uses. Those in use are closed when they were idle for
// a few seconds.
func (h *HTTP) CloseIdleConnections() {
	h.rt.CloseIdleConnections()
	h.direct.closeIdle()
}

// Do posts the request's body, byte for byte, to the engine. Redirects are not followed.
func (h *HTTP) Do(ctx context.Context, r *proto.Request) (Answer, error) {
	if p := h.direct.prefix(r); p != nil {
		return h.direct.do(ctx, p, r)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.base+r.URL, bytes.NewReader(r.Body))
	if err != nil {
		return Answer{}, fmt.Errorf("make request: %w", err)
	}
	req.Header["Content-Type"] = []string{"application/json"}
	req.Header["X-Request-Id"] = []string{r.Job + "-" + strconv.FormatInt(r.Index, 10)}
	return h.send(req)
}

func (h *HTTP) send(req *http.Request) (Answer, error) {
	if h.auth != "" {
		req.Header["Authorization"] = []string{h.auth}
	}
	resp, err := h.rt.RoundTrip(req)
	if err != nil {
		return Answer{}, err
	}
	defer resp.Body.Close()
	a := Answer{Status: resp.StatusCode, Header: resp.Header}
	a.Body, a.TooLarge, err = readBody(resp)
	return a, err
}

// readBody reads at most maxAnswer bytes. It says whether there were more.
func readBody(resp *http.Response) ([]byte, bool, error) {
	n := resp.ContentLength
	if n > maxAnswer {
		return nil, true, nil
	}
	if n >= 0 {
		b := make([]byte, n)
		_, err := io.ReadFull(resp.Body, b)
		if errors.Is(err, io.EOF) && n > 0 {
			err = io.ErrUnexpectedEOF
		}
		return b, false, err
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if len(b) > maxAnswer {
		return nil, true, nil
	}
	return b, false, err
}
