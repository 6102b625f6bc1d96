package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/google/renameio/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"millrace/broker"
)

// brokerFlags are those of the commands that hold a broker.
type brokerFlags struct {
	addr, sync, monitor string
	noToken             bool
	ackWait             time.Duration
}

func (b *brokerFlags) bind(cmd *cobra.Command, a *app) {
	f := cmd.Flags()
	f.StringVar(&b.addr, "addr", "127.0.0.1:4222", "`HOST:PORT` to listen on; no HOST: all addresses of this machine")
	f.StringVar(&b.sync, "sync", "1s", "when the disk is flushed: 1s (power loss costs resending) or always")
	f.StringVar(&b.monitor, "monitor-addr", "", "`HOST:PORT` of nats-server's own monitoring (no authentication there)")
	f.BoolVar(&b.noToken, "insecure-no-token", false, "ask nobody for a token although the broker listens beyond loopback")
	f.DurationVar(&b.ackWait, "ack-wait", 0, "for all queues of this broker: how long a request may go without a heartbeat before another worker gets it (default: as last set, 1m)")
	f.StringVar(&a.nats.tokenFile, "token-file", "", "`FILE` with the token to ask for (default: one is made in --data where the broker listens beyond loopback)")
	f.StringVar(&a.nats.token, "token", "", "token to ask for; better in MILLRACE_TOKEN or --token-file than on the command line")
	f.StringVar(&a.nats.cert, "tls-cert", "", "`FILE` with the broker's certificate, PEM; with it all connections are TLS")
	f.StringVar(&a.nats.key, "tls-key", "", "`FILE` with the key of --tls-cert, PEM")
	f.StringVar(&a.nats.ca, "tls-ca", "", "`FILE` with authorities, PEM: clients must show a certificate that one of them signed")
}

func (a *app) brokerCommand() *cobra.Command {
	var b brokerFlags
	cmd := &cobra.Command{
		Use:   "broker",
		Short: "Hold the queues: NATS with JetStream, streams declared",
		Long: `Hold the queues, in a NATS server inside this process. At its start it prints the variables with which the other
roles and commands find it. Results are gathered by millrace aggregate; millrace serve is both in one process.`,
		Args: wants(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			take, done := a.untilSignal(cmd.Context(), "")
			defer done()
			return a.holdBroker(take, &b, func(ctx context.Context, _ *broker.Server, _ *prometheus.Registry) error {
				ready()
				<-ctx.Done()
				return stopped(ctx)
			})
		},
	}
	b.bind(cmd, a)
	a.metricsFlag(cmd)
	return cmd
}

// holdBroker starts the embedded broker and the metrics, says how to connect, and stops them when do returns. The context
// of do ends also when the broker cannot go on.
func (a *app) holdBroker(ctx context.Context, b *brokerFlags, do func(context.Context, *broker.Server, *prometheus.Registry) error) error {
	tightHeap()
	ctx, broken := context.WithCancelCause(ctx)
	defer broken(nil)
	srv, err := a.startBroker(ctx, b, broken)
	if err != nil {
		return err
	}
	defer srv.Stop()
	reg, stopMetrics, err := a.serveMetrics()
	if err != nil {
		return err
	}
	defer stopMetrics()
	reg.MustRegister(srv.Metrics())
	a.sayConnect(srv)
	return do(ctx, srv, reg)
}

// ready tells systemd, where it started us, that we are.
func ready() {
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // nobody listens outside of systemd
}

// stopped is how a role ends that was asked to: no failure.
func stopped(ctx context.Context) error {
	var s signalled
	if errors.As(context.Cause(ctx), &s) {
		return nil
	}
	return context.Cause(ctx)
}

// startBroker starts the embedded broker, declares what all jobs share, and sets what goes for all queues. broken is
// called when it cannot go on.
func (a *app) startBroker(ctx context.Context, b *brokerFlags, broken func(error)) (*broker.Server, error) {
	if err := b.check(); err != nil {
		return nil, err
	}
	token, err := a.brokerToken(b)
	if err != nil {
		return nil, err
	}
	srv := &broker.Server{
		Dir: filepath.Join(a.data, "broker"), Addr: b.addr, SyncAlways: b.sync == "always", Token: token,
		TLSCert: a.nats.cert, TLSKey: a.nats.key, TLSCA: a.nats.ca, Monitor: b.monitor, Log: a.log, Broken: broken,
	}
	if err := srv.Start(ctx); err != nil {
		return nil, err
	}
	if err := a.declare(ctx, srv, b.ackWait); err != nil {
		srv.Stop()
		return nil, err
	}
	return srv, nil
}

// check refuses what cannot be meant.
func (b *brokerFlags) check() error {
	if err := checkSync(b.sync); err != nil {
		return err
	}
	if err := checkAddr("--addr", b.addr); err != nil {
		return err
	}
	if b.monitor != "" {
		if err := checkAddr("--monitor-addr", b.monitor); err != nil {
			return err
		}
	}
	return checkAckWait(b.ackWait)
}

// checkAddr refuses what cannot be listened on. An empty HOST is all addresses of this machine, port 0 any free one.
func checkAddr(flag, addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return usagef("%s is %q, must be HOST:PORT", flag, addr)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return usagef("%s is %q, its port must be a number up to 65535", flag, addr)
	}
	return nil
}

func checkSync(s string) error {
	if s != "1s" && s != "always" {
		return usagef("--sync is %q, must be 1s or always", s)
	}
	return nil
}

func (a *app) declare(ctx context.Context, srv *broker.Server, ackWait time.Duration) error {
	conn, err := srv.Connect(ctx, "declare")
	if err != nil {
		return err
	}
	defer conn.Close()
	free, err := broker.FreeBytes(srv.Dir)
	if err != nil {
		return err
	}
	d := broker.Declarer{JS: conn.JS, Disk: free, AckWait: ackWait}
	if err := d.Base(ctx); err != nil {
		return err
	}
	return d.Queues(ctx)
}

// brokerToken returns the token to ask clients for: the one that was given, or for a broker that listens beyond
// loopback one that is made at the first start.
func (a *app) brokerToken(b *brokerFlags) (string, error) {
	acc, _, err := a.nats.access()
	if err != nil || acc.Token != "" {
		return acc.Token, err
	}
	if b.noToken || loopback(b.addr) {
		return "", nil
	}
	return ensureToken(filepath.Join(a.data, "broker", "token"))
}

func ensureToken(name string) (string, error) {
	if b, err := os.ReadFile(name); err == nil && len(strings.TrimSpace(string(b))) > 0 {
		return strings.TrimSpace(string(b)), nil
	}
	if err := broker.MakeDir(filepath.Dir(name)); err != nil {
		return "", fmt.Errorf("make the broker's folder: %w; choose another --data", err)
	}
	token := newToken() // others will have it before the next start: it must be the same then, though the power fails
	if err := keepSecret(name, token+"\n"); err != nil {
		return "", fmt.Errorf("keep the token: %w", err)
	}
	return token, nil
}

// keepSecret puts a file for its owner alone in place, whole and on disk.
func keepSecret(name, text string) error {
	f, err := renameio.NewPendingFile(name, renameio.WithTempDir(filepath.Dir(name)), renameio.WithPermissions(0o600))
	if err != nil {
		return err
	}
	defer f.Cleanup()
	if _, err := f.WriteString(text); err != nil {
		return err
	}
	if err := f.CloseAtomicallyReplace(); err != nil { // it syncs the file
		return err
	}
	return broker.SyncDir(filepath.Dir(name))
}

func newToken() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: https://pkg.go.dev/crypto/rand#Read
	return hex.EncodeToString(b[:])
}

func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// sayConnect prints how the other roles reach this broker.
func (a *app) sayConnect(srv *broker.Server) {
	fmt.Fprintln(a.std.err, "broker ready; the other roles connect with:")
	u, err := url.Parse(srv.URL())
	if err != nil {
		return
	}
	if ip := net.ParseIP(u.Hostname()); ip != nil && ip.IsUnspecified() {
		if name, err := os.Hostname(); err == nil {
			u.Host = net.JoinHostPort(name, u.Port())
		}
	}
	if srv.Token != "" {
		fmt.Fprintf(a.std.err, "  export NATS_URL=%s MILLRACE_TOKEN=%s\n", u, srv.Token)
		return
	}
	fmt.Fprintf(a.std.err, "  export NATS_URL=%s\n", u)
}
