// Package broker is a NATS server inside the process, or a connection to one outside. It declares what proto
// names, holds leases, and says what is wrong with a broker (doctor).
package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"millrace/proto"
)

// Server is an embedded nats-server with JetStream. Its fields may be set until Start.
type Server struct {
	Dir        string // data folder, made if it is not there; one process at a time
	Addr       string // HOST:PORT to listen on; empty: reachable inside this process only
	SyncAlways bool   // fsync before every acknowledgement, instead of once a second
	Token      string // asked of every client, where not empty
	TLSCert    string // PEM files; both or none
	TLSKey     string
	TLSCA      string // PEM file; where set, clients must show a certificate it signed
	Monitor    string // HOST:PORT of nats-server's own HTTP monitoring; empty: none
	Log        *slog.Logger
	// Broken is called, once, when a stream could not be written, as on a full disk: nats-server refuses that stream
	// from then on, also when there is room again, until it is started anew.
	Broken func(error)

	ns   *server.Server
	lock *Lock
	once sync.Once // guards the call of Broken
}

// Start takes the folder and starts the server. It returns when the server takes connections.
func (s *Server) Start(ctx context.Context) error {
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	opts, err := s.options()
	if err != nil {
		return err
	}
	if s.lock, err = LockDir(s.Dir); err != nil {
		return err
	}
	if err := s.start(ctx, opts); err != nil {
		s.lock.Unlock()
		return err
	}
	return nil
}

func (s *Server) start(ctx context.Context, opts *server.Options) error {
	// A port that is taken is said before what lies on disk is read, which can take minutes.
	if err := free(s.Addr, "--addr"); err != nil {
		return err
	}
	if err := free(s.Monitor, "--monitor-addr"); err != nil {
		return err
	}
	ns, err := server.NewServer(opts)
	if err != nil {
		return fmt.Errorf("start the broker: %w", err)
	}
	log := serverLog{s, make(chan string, 1)}
	ns.SetLoggerV2(log, false, false, false)
	started := make(chan struct{})
	go func() { // it returns when all streams are recovered: nats-server reads about 1 GB/s of them after a kill -9
		defer close(started)
		ns.Start()
	}()
	if err := s.settle(ctx, ns, started, log.fatal); err != nil {
		<-started // nats-server cannot be shut down while it starts: the two race in it
		ns.Shutdown()
		ns.WaitForShutdown()
		return err
	}
	ns.SetLoggerV2(serverLog{s: s}, false, false, false)
	s.ns = ns
	return nil
}

// settle waits until the server takes connections. Where nats-server gives up it only says so, to its log.
func (s *Server) settle(ctx context.Context, ns *server.Server, started <-chan struct{}, fatal <-chan string) error {
	gaveUp := func(why string) error {
		return fmt.Errorf("start the broker in %s: %s; mend that, or choose another --data", s.Dir, why)
	}
	select {
	case <-started:
	case why := <-fatal:
		return gaveUp(why)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for {
		ready := ns.ReadyForConnections(100 * time.Millisecond)
		select {
		case why := <-fatal:
			return gaveUp(why)
		case <-ctx.Done():
			return context.Cause(ctx)
		default:
		}
		if ready && !ns.JetStreamEnabled() {
			return gaveUp("JetStream is off")
		}
		if ready {
			return nil
		}
	}
}

// free says whether an address can be listened on.
func free(addr, flag string) error {
	if addr == "" {
		return nil
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return ListenError(addr, flag, err)
	}
	ln.Close()
	return nil
}

// ListenError says why an address, which a flag gives, cannot be listened on, and what to do.
func ListenError(addr, flag string, err error) error {
	var oe *net.OpError
	if errors.As(err, &oe) {
		err = oe.Err // it is short of the address
	}
	todo := "choose another " + flag
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		err, todo = syscall.EADDRINUSE, todo+" or stop what holds the port"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		err, todo = errors.New("this machine has no such address"), todo+", such as 0.0.0.0 for all that it has"
	case errors.Is(err, syscall.EACCES):
		err, todo = errors.New("this user may not listen there"), todo+" with a port above 1023"
	}
	return fmt.Errorf("listen on %s: %w; %s", addr, err, todo)
}

func (s *Server) options() (*server.Options, error) {
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the broker's folder: %w; choose another --data", err)
	}
	o := &server.Options{
		ServerName: "millrace",
		DontListen: s.Addr == "",
		NoSigs:     true, // the program owns signals
		NoLog:      true,
		JetStream:  true,
		StoreDir:   filepath.Join(s.Dir, "jetstream"),
		// Streams reserve their MaxBytes against this. The sizes come from the free disk (Declarer); a limit
		// here would only refuse a reservation on a disk that filled since.
		JetStreamMaxStore:     1 << 60,
		JetStreamMaxMemory:    1 << 30,
		SyncInterval:          time.Second, // the default of nats-server is two minutes
		SyncAlways:            s.SyncAlways,
		MaxPayload:            proto.MaxPayload,
		MaxPending:            256 << 20,
		WriteDeadline:         30 * time.Second,
		StreamMaxBufferedSize: 256 << 20,
		Authorization:         s.Token,
	}
	if err := hostPort(s.Addr, &o.Host, &o.Port); err != nil {
		return nil, fmt.Errorf("--addr: %w", err)
	}
	if err := hostPort(s.Monitor, &o.HTTPHost, &o.HTTPPort); err != nil {
		return nil, fmt.Errorf("monitoring address: %w", err)
	}
	if err := (Access{TLSCert: s.TLSCert, TLSKey: s.TLSKey, TLSCA: s.TLSCA}).Check(); err != nil {
		return nil, err
	}
	if s.TLSCA != "" && s.TLSCert == "" {
		return nil, fmt.Errorf("%w --tls-ca without --tls-cert and --tls-key: only a broker with TLS can ask clients for certificates; give the broker's own", ErrAccess)
	}
	if s.TLSCert != "" {
		tc, err := server.GenTLSConfig(&server.TLSConfigOpts{CertFile: s.TLSCert, KeyFile: s.TLSKey, CaFile: s.TLSCA, Verify: s.TLSCA != ""})
		if err != nil {
			return nil, fmt.Errorf("read the TLS files: %w", err)
		}
		o.TLSConfig, o.TLS, o.TLSVerify = tc, true, s.TLSCA != ""
	}
	return o, nil
}

func hostPort(addr string, host *string, port *int) error {
	if addr == "" {
		return nil
	}
	h, p, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q is not HOST:PORT", addr)
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return fmt.Errorf("%q has no valid port", addr)
	}
	*host, *port = h, int(n)
	if n == 0 {
		*port = server.RANDOM_PORT
	}
	return nil
}

// URL is where clients find the server; empty when it listens nowhere.
func (s *Server) URL() string {
	if s.Addr == "" {
		return ""
	}
	return s.ns.ClientURL()
}

// Stop ends the server in order: what it holds is on disk when Stop returns.
func (s *Server) Stop() {
	if s.ns == nil {
		return
	}
	s.ns.Shutdown()
	s.ns.WaitForShutdown()
	s.lock.Unlock()
}

// broken tells that a stream is lost until the next start.
func (s *Server) broken(why string) {
	s.once.Do(func() {
		if s.Broken != nil {
			s.Broken(fmt.Errorf("the broker cannot write to %s: %s; make room or mend the disk and start it again, it continues", s.Dir, why))
		}
	})
}

// serverLog hands nats-server's log to slog. Its notices are details to us.
type serverLog struct {
	s     *Server
	fatal chan string // why the server gave up, while somebody waits for it to start
}

func (l serverLog) Noticef(f string, v ...any) { l.s.Log.Debug("nats: " + fmt.Sprintf(f, v...)) }
func (l serverLog) Warnf(f string, v ...any) {
	text := fmt.Sprintf(f, v...)
	if detail.MatchString(text) {
		l.s.Log.Debug("nats: " + text)
		return
	}
	l.s.Log.Warn("nats: " + text)
}
func (l serverLog) Debugf(f string, v ...any) {}
func (l serverLog) Tracef(f string, v ...any) {}

// detail matches warnings of nats-server that tell nobody what to do: at its start, of indexes that are older than their
// stream, as after each kill, which it makes anew from the messages; and of a machine that was busy for a moment.
var detail = regexp.MustCompile(`^Internal subscription on \S+ took too long|^Filestore \[[^]]*\] (Stream state outdated|Stream state detected prior state|[a-zA-Z ]* state is outdated; attempting to recover|Recovering [a-zA-Z ]* state from index errored: prior state file)`)

// Fatalf gives the reason to Start, which returns it; later there is nobody to say it but the log.
func (l serverLog) Fatalf(f string, v ...any) {
	why := fmt.Sprintf(f, v...)
	select {
	case l.fatal <- why:
	default:
		l.s.Log.Error("nats: " + why)
	}
}

func (l serverLog) Errorf(f string, v ...any) {
	text := fmt.Sprintf(f, v...)
	l.s.Log.Error("nats: " + text)
	if _, why, ok := strings.Cut(text, "ritical write error: "); ok { // with a small or a capital c
		l.s.broken(why)
	}
}
