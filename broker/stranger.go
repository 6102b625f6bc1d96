package broker

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// stranger says what listens at an address, as an error of connecting there tells, if that is no broker: it greets as none
// does, or says nothing and answers HTTP. Empty: it may be one, or nothing is there.
func stranger(ctx context.Context, addr string, err error) string {
	var oe *net.OpError
	greets := errors.Is(err, nats.ErrNoInfoReceived)
	silent := errors.Is(err, io.EOF) || errors.As(err, &oe) && oe.Op == "read" && oe.Timeout()
	what := "what listens at " + redact(addr) + " is no NATS broker"
	switch {
	case (greets || silent) && answersHTTP(ctx, addr):
		return what + "; it is an HTTP server, or a proxy; --engine names engines, --nats the broker"
	case greets:
		return what + "; --nats names the broker"
	}
	return ""
}

// answersHTTP asks.
func answersHTTP(ctx context.Context, addr string) bool {
	if !strings.Contains(addr, "://") {
		addr = "nats://" + addr
	}
	u, err := url.Parse(addr)
	if err != nil || u.Port() == "" || strings.HasPrefix(u.Scheme, "ws") { // a broker speaks HTTP there
		return false
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second) // it is asked also when time is over
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+u.Host+"/", nil)
	if err != nil {
		return false
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return false
	}
	return resp.Body.Close() == nil
}
