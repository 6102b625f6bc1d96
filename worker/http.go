package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

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
	key   string // the secret in auth, which nothing shows
	rt    *http.Transport
	about about

	direct *direct // nil: all goes through rt
}

// NewHTTP prepares a client of the engine at a URL such as http://127.0.0.1:8000; a trailing slash or /v1, upper case in
// the host, and the scheme's own port make no difference: String is the same. The key, if there is one, is sent as a
// bearer token. The environment's proxies are not used: engines are near.
func NewHTTP(addr, key string) (*HTTP, error) {
	u, err := parseURL(addr)
	if err != nil {
		return nil, fmt.Errorf("engine URL %q: %w; give it like http://HOST:PORT", withoutUser(addr), err)
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}
	h := &HTTP{rt: newTransport(dialer)}
	switch {
	case key != "":
		h.auth, h.key = "Bearer "+key, key
	case u.User != nil:
		r := http.Request{Header: http.Header{}}
		pass, _ := u.User.Password()
		r.SetBasicAuth(u.User.Username(), pass)
		h.auth, h.key = r.Header.Get("Authorization"), pass
	}
	u.User = nil
	h.base = u.String()
	h.shown = h.base
	h.direct = newDirect(u, h.auth, dialer)
	return h, nil
}

// parseURL reads an engine's URL and writes it as all that mean the same engine are written.
func parseURL(addr string) (*url.URL, error) {
	if !strings.Contains(addr, "://") {
		return nil, errors.New("no http:// or https:// before it")
	}
	u, err := url.Parse(addr)
	switch {
	case err != nil:
		return nil, errors.Unwrap(err)
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("scheme %q is not http or https", u.Scheme)
	case u.Hostname() == "":
		return nil, errors.New("no host")
	case endsInNumber(u.Hostname()) && !isAddress(u.Hostname()): // systems take 10 for 0.0.0.10, and 0x7f.1 for 127.0.0.1
		return nil, fmt.Errorf("host %q is neither a name nor an address with four numbers, such as 10.0.0.8", u.Hostname())
	case !validHost(u.Hostname()):
		return nil, fmt.Errorf("%q is no host", u.Hostname())
	case u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("a query or fragment makes no sense")
	}
	if n, err := strconv.ParseUint(u.Port(), 10, 16); u.Port() != "" && (err != nil || n == 0) {
		return nil, fmt.Errorf("port %s is not between 1 and 65535", u.Port())
	}
	u.Host = strings.TrimSuffix(u.Host, ":")
	if !strings.Contains(u.Host, "%") { // a zone is the name of a device
		u.Host = strings.ToLower(u.Host)
	}
	if own := map[string]string{"http": ":80", "https": ":443"}[u.Scheme]; u.Port() != "" && ":"+u.Port() == own {
		u.Host = strings.TrimSuffix(u.Host, own)
	}
	u.Path = strings.TrimRight(strings.TrimSuffix(strings.TrimRight(u.Path, "/"), "/v1"), "/")
	u.RawPath = ""
	return u, nil
}

func isAddress(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

// endsInNumber says whether the last part of a host is a number as systems read it: then the host cannot be a name.
func endsInNumber(host string) bool {
	host = strings.TrimSuffix(host, ".")
	_, err := strconv.ParseUint(host[strings.LastIndexByte(host, '.')+1:], 0, 64)
	return err == nil || errors.Is(err, strconv.ErrRange)
}

// validHost says whether a host can be one: an address, or a name, which may have letters beyond ASCII.
func validHost(host string) bool {
	if isAddress(host) {
		return true
	}
	for _, l := range strings.Split(strings.TrimSuffix(host, "."), ".") {
		odd := func(r rune) bool {
			return r < utf8.RuneSelf && r != '-' && r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
		}
		if l == "" || strings.ContainsFunc(l, odd) {
			return false
		}
	}
	return true
}

// withoutUser hides a user and a password in what should be a URL.
func withoutUser(addr string) string {
	at := strings.LastIndexByte(addr, '@')
	if at < 0 {
		return addr
	}
	scheme := strings.Index(addr, "://") + len("://")
	if scheme < len("://") || scheme > at {
		scheme = 0
	}
	return addr[:scheme] + "xxxxx" + addr[at:]
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
