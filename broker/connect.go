package broker

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"
)

// Access says how to reach a broker outside this process.
type Access struct {
	URL     string // nats://HOST:PORT, several with commas
	Token   string
	Creds   string // credentials file
	TLSCert string // client certificate and key, PEM
	TLSKey  string
	TLSCA   string // PEM file to trust instead of the system's

	Ends bool // the broker is that of a run, and ends with it: then the connection does not wait for it, but is closed
}

// Conn is a connection to a broker.
type Conn struct {
	NC *nats.Conn
	JS jetstream.JetStream
	// Reconnected gets a value, dropped when one is waiting, each time the connection is back after a break.
	// It has one reader.
	Reconnected <-chan struct{}
	// SyncAlways says that the broker is embedded and fsyncs before it acknowledges.
	SyncAlways bool
	// Ends is that of Access.
	Ends bool

	closed chan struct{} // closed with NC
}

// Close ends the connection after what was sent is on its way.
func (c *Conn) Close() {
	_ = c.NC.FlushTimeout(2 * time.Second) // best effort: the peers live with what is lost here
	c.NC.Close()
}

// Errors of connections.
var (
	ErrUnreachable = errors.New("broker unreachable")                 // no broker answers
	ErrAccess      = errors.New("cannot use")                         // a file of Access cannot be used
	ErrClosed      = errors.New("connection to the broker is closed") // for good
	ErrAway        = errors.New("no connection to the broker")        // at the moment; it mends itself
)

// Plain is err as people are told of it: ErrAway instead of what the client says of calls while the connection is away.
func Plain(err error) error {
	if Away(err) {
		return ErrAway
	}
	return err
}

// Closed says why the connection is closed for good: somebody called Close, or the broker that came back refuses us. It
// is nil as long as the connection is open or mends itself.
func (c *Conn) Closed() error { return closed(c.NC) }

func closed(nc *nats.Conn) error {
	if !nc.IsClosed() {
		return nil
	}
	if err := nc.LastError(); permanent(err) {
		return fmt.Errorf("%w: %w%s", ErrClosed, err, remedy(err))
	}
	return ErrClosed
}

// Away says whether err is only that the connection is not there at the moment.
func Away(err error) bool {
	return errors.Is(err, ErrAway) || errors.Is(err, nats.ErrReconnectBufExceeded) || errors.Is(err, nats.ErrConnectionReconnecting) ||
		errors.Is(err, nats.ErrDisconnected)
}

// While returns a context that ends with ctx, and with Closed as its cause when the connection is closed for good.
// stop lets go of it.
func (c *Conn) While(ctx context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	over := make(chan struct{})
	go func() {
		defer close(over)
		select {
		case <-c.closed:
			cancel(c.Closed())
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		cancel(nil)
		<-over
	}
}

// Check reads the files as connecting will. What is wrong with them, which is an ErrAccess, does not mend itself.
func (a Access) Check() error {
	if a.Creds != "" {
		b, err := ReadFile("--creds", a.Creds, "a NATS credentials file: a user's JWT and seed")
		if err != nil {
			return err
		}
		if _, err := nkeys.ParseDecoratedNKey(b); err != nil {
			return fmt.Errorf("%w --creds %s: it is no NATS credentials file (%w); give one, with a user's JWT and seed", ErrAccess, a.Creds, err)
		}
	}
	if err := a.checkPair(); err != nil {
		return err
	}
	if a.TLSCA != "" {
		b, err := ReadFile("--tls-ca", a.TLSCA, "the certificates to trust, in PEM")
		if err != nil {
			return err
		}
		if !x509.NewCertPool().AppendCertsFromPEM(b) {
			return fmt.Errorf("%w --tls-ca %s: it holds no certificate; give the certificates to trust, in PEM", ErrAccess, a.TLSCA)
		}
	}
	return nil
}

// checkPair checks the certificate and its key.
func (a Access) checkPair() error {
	switch {
	case a.TLSCert == "" && a.TLSKey == "":
		return nil
	case a.TLSKey == "":
		return fmt.Errorf("%w --tls-cert without --tls-key; give the certificate and its key", ErrAccess)
	case a.TLSCert == "":
		return fmt.Errorf("%w --tls-key without --tls-cert; give the certificate and its key", ErrAccess)
	}
	cert, err := ReadFile("--tls-cert", a.TLSCert, "a certificate in PEM")
	if err != nil {
		return err
	}
	key, err := ReadFile("--tls-key", a.TLSKey, "the certificate's key in PEM")
	if err != nil {
		return err
	}
	if _, err := tls.X509KeyPair(cert, key); err != nil {
		return fmt.Errorf("%w --tls-cert %s with --tls-key %s: %w; they must be a certificate and its key, in PEM", ErrAccess, a.TLSCert, a.TLSKey, err)
	}
	return nil
}

// ReadFile reads a file that a flag names. The error, an ErrAccess, says which and what to give.
func ReadFile(flag, path, want string) ([]byte, error) {
	b, err := os.ReadFile(path)
	why := ""
	switch {
	case errors.Is(err, fs.ErrNotExist):
		why = "no such file"
	case errors.Is(err, syscall.EISDIR):
		why = "it is a folder"
	case errors.Is(err, fs.ErrPermission):
		why = "this user may not read it"
	case err != nil:
		return nil, fmt.Errorf("%w %s: %w; give %s", ErrAccess, flag, err, want)
	case len(bytes.TrimSpace(b)) == 0:
		why = "it is empty"
	default:
		return b, nil
	}
	return nil, fmt.Errorf("%w %s %s: %s; give %s", ErrAccess, flag, path, why, want)
}

// Connect connects to a broker as role (shown in its connection list). It waits for the first connection until
// ctx is done, with ErrUnreachable, but not for a broker that refuses us or that we do not trust. After that the
// connection mends itself for as long as it is open; but a broker that refuses it twice in a row, because it has
// another token now, ends it: see Closed. So does any break where the broker Ends.
func Connect(ctx context.Context, a Access, role string, log *slog.Logger) (*Conn, error) {
	if err := a.Check(); err != nil {
		return nil, err
	}
	opts := []nats.Option{}
	if a.Token != "" {
		opts = append(opts, nats.Token(a.Token))
	}
	if a.Creds != "" {
		opts = append(opts, nats.UserCredentials(a.Creds))
	}
	if a.TLSCert != "" || a.TLSKey != "" {
		opts = append(opts, nats.ClientCert(a.TLSCert, a.TLSKey))
	}
	if a.TLSCA != "" {
		opts = append(opts, nats.RootCAs(a.TLSCA))
	}
	if a.Ends {
		opts = append(opts, nats.NoReconnect())
	}
	c, err := connect(ctx, a.URL, role, log, opts...)
	if err == nil {
		c.Ends = a.Ends
	}
	return c, err
}

// Connect connects to the server without a network, and so without TLS.
func (s *Server) Connect(ctx context.Context, role string) (*Conn, error) {
	opts := []nats.Option{nats.InProcessServer(s.ns)}
	if s.Token != "" {
		opts = append(opts, nats.Token(s.Token))
	}
	c, err := connect(ctx, "nats://in-process", role, s.Log, opts...)
	if err == nil {
		c.SyncAlways = s.SyncAlways
	}
	return c, err
}

func connect(ctx context.Context, addr, role string, log *slog.Logger, opts ...nats.Option) (*Conn, error) {
	back := make(chan struct{}, 1)
	opts = append(opts,
		nats.Name("millrace "+role),
		nats.CustomInboxPrefix("_INBOX_"+role),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(250*time.Millisecond),
		nats.ReconnectJitter(250*time.Millisecond, 250*time.Millisecond),
		nats.ReconnectBufSize(-1), // what cannot be sent now is an error now, and its sender tries again
		nats.Timeout(5*time.Second),
		nats.PingInterval(20*time.Second),
		nats.DisconnectErrHandler(func(nc *nats.Conn, err error) {
			if err != nil && nc.Opts.AllowReconnect {
				log.Warn("broker connection lost, reconnecting", "error", err)
			}
		}),
		nats.ReconnectHandler(func(*nats.Conn) {
			log.Warn("broker connection is back") // whoever was told of the loss is told of this
			select {
			case back <- struct{}{}:
			default:
			}
		}),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			log.Warn("broker connection", "error", err)
		}),
	)
	said := false
	for {
		nc, err := nats.Connect(addr, opts...)
		if err == nil {
			js, err := jetstream.New(nc,
				jetstream.WithPublishAsyncMaxPending(1<<14),
				jetstream.WithPublishAsyncTimeout(30*time.Second),
				jetstream.WithDefaultTimeout(10*time.Second))
			if err != nil {
				nc.Close()
				return nil, fmt.Errorf("open JetStream: %w", err)
			}
			c := &Conn{NC: nc, JS: js, Reconnected: back, closed: make(chan struct{})}
			var once sync.Once
			end := func(*nats.Conn) { once.Do(func() { close(c.closed) }) }
			nc.SetClosedHandler(end)
			if nc.IsClosed() { // before it could be told
				end(nc)
			}
			return c, nil
		}
		if permanent(err) {
			var ue *url.Error
			if errors.As(err, &ue) { // it holds the URL as it is
				err = ue.Err
			}
			return nil, fmt.Errorf("connect to the broker at %s: %w%s", redact(addr), err, remedy(err))
		}
		what := stranger(ctx, addr, err)
		if what == "" {
			what = fmt.Sprintf("no answer at %s: %v; is `millrace broker` or nats-server running there?", redact(addr), err)
		} else {
			err = errors.New(what)
		}
		if !said {
			said = true
			log.Warn("waiting for the broker", "url", redact(addr), "error", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %s", ErrUnreachable, what)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// refused says whether the broker does not know us, or not any more.
func refused(err error) bool {
	return errors.Is(err, nats.ErrAuthorization) || errors.Is(err, nats.ErrAuthExpired) ||
		errors.Is(err, nats.ErrAuthRevoked) || errors.Is(err, nats.ErrAccountAuthExpired)
}

// permanent says whether trying again cannot help.
func permanent(err error) bool {
	var ue *url.Error
	return refused(err) || distrusted(err) || alerted(err) ||
		errors.Is(err, nats.ErrSecureConnRequired) || errors.Is(err, nats.ErrSecureConnWanted) || errors.As(err, &ue)
}

// distrusted says whether the broker's certificate is none that we trust.
func distrusted(err error) bool {
	var ce *tls.CertificateVerificationError
	return errors.As(err, &ce)
}

// alerted says whether the broker ended the TLS handshake because of what we offer it (40 to 49: handshake, certificate
// and authority) or do not (116: certificate): with TLS 1.3 that is heard at the first reading after it. Other alerts
// may be passing. The type of an alert is crypto/tls's own; its text is that of an AlertError.
func alerted(err error) bool {
	var oe *net.OpError
	if !errors.As(err, &oe) || oe.Op != "remote error" {
		return false
	}
	is := func(n tls.AlertError) bool { return oe.Err.Error() == n.Error() }
	for n := tls.AlertError(40); n <= 49; n++ {
		if is(n) {
			return true
		}
	}
	return is(116)
}

// remedy is what to do about such an error.
func remedy(err error) string {
	switch {
	case refused(err):
		return "; give its token with --token-file or MILLRACE_TOKEN (its `millrace broker` prints it at the start), or its --creds"
	case errors.Is(err, nats.ErrSecureConnRequired):
		return "; it wants TLS, name it tls://HOST:PORT, and its authority with --tls-ca"
	case distrusted(err):
		return "; give the certificates to trust with --tls-ca, and name the broker as its certificate does"
	case alerted(err):
		return "; it may want a certificate that it trusts, give one with --tls-cert and --tls-key"
	case errors.Is(err, nats.ErrSecureConnWanted):
		return "; it has no TLS, name it nats://HOST:PORT"
	}
	return ""
}

// Remedy is what to do about an error of Connect. The error says it too, except where it is for the reader to choose.
func Remedy(err error) string {
	if r, ok := strings.CutPrefix(remedy(err), "; "); ok {
		return r
	}
	switch {
	case errors.Is(err, ErrAccess):
		return "mend that file, or name another"
	case errors.Is(err, ErrUnreachable):
		return "start `millrace broker` (or nats-server -js), or name the right one with --nats"
	}
	return "name the broker with --nats nats://HOST:PORT, and give the token or the files that it asks for"
}

// redact hides passwords and tokens inside URLs, also where these make no sense.
func redact(addr string) string {
	all := strings.Split(addr, ",")
	for i, one := range all {
		at := strings.LastIndexByte(one, '@')
		if at < 0 {
			continue
		}
		scheme := strings.Index(one, "://") + len("://")
		if scheme < len("://") || scheme > at {
			scheme = 0
		}
		user, _, named := strings.Cut(one[scheme:at], ":")
		if !named { // a token
			user = ""
		}
		all[i] = one[:scheme] + user + ":xxxxx" + one[at:]
	}
	return strings.Join(all, ",")
}
