package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/spf13/cobra"

	"millrace/broker"
)

// natsFlags say how to reach the broker.
type natsFlags struct {
	url, token, tokenFile, creds, cert, key, ca string
}

const defaultNATS = "nats://127.0.0.1:4222"

func (a *app) natsFlags(cmd *cobra.Command) {
	f, n := cmd.Flags(), &a.nats
	f.StringVar(&n.url, "nats", "", "broker URL (default: $NATS_URL, else "+defaultNATS+")")
	f.StringVar(&n.token, "token", "", "broker token; better in MILLRACE_TOKEN or --token-file than on the command line")
	f.StringVar(&n.tokenFile, "token-file", "", "file with the broker token")
	f.StringVar(&n.creds, "creds", "", "NATS credentials file")
	f.StringVar(&n.cert, "tls-cert", "", "TLS certificate, PEM")
	f.StringVar(&n.key, "tls-key", "", "its key, PEM")
	f.StringVar(&n.ca, "tls-ca", "", "certificates to trust, PEM")
}

// access resolves the flags. given says that the user named a broker.
func (n *natsFlags) access() (acc broker.Access, given bool, err error) {
	acc = broker.Access{URL: n.url, Token: n.token, Creds: n.creds, TLSCert: n.cert, TLSKey: n.key, TLSCA: n.ca}
	if acc.URL == "" {
		acc.URL = os.Getenv("NATS_URL")
	}
	given = acc.URL != ""
	if !given {
		acc.URL = defaultNATS
	}
	if n.tokenFile != "" {
		b, err := os.ReadFile(n.tokenFile)
		if err != nil {
			return acc, given, coded{fmt.Errorf("read token file: %w", err), exitUsage}
		}
		acc.Token = strings.TrimSpace(string(b))
	}
	return acc, given, nil
}

// connect reaches the broker, waiting for it up to wait.
func (a *app) connect(ctx context.Context, role string, wait time.Duration) (*broker.Conn, error) {
	acc, _, err := a.nats.access()
	if err != nil {
		return nil, err
	}
	return a.connectTo(ctx, acc, role, wait)
}

func (a *app) connectTo(ctx context.Context, acc broker.Access, role string, wait time.Duration) (*broker.Conn, error) {
	cctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	conn, err := broker.Connect(cctx, acc, role, a.log)
	if err != nil && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return conn, err
}

// foreverWait is how long a role waits for its broker: until it is told to stop.
const foreverWait = 100 * 365 * 24 * time.Hour

// controlWait is how long a command that a person waits for tries.
const controlWait = 5 * time.Second

// endpoint is how other commands of the same user find the broker inside a `millrace run`.
type endpoint struct {
	URL   string `json:"url"`
	Token string `json:"token"`
	PID   int    `json:"pid"`
}

func endpointFile(dir string) string { return filepath.Join(dir, "endpoint.json") }

func (e endpoint) write(dir string) error {
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("write endpoint: %w", err)
	}
	if err := os.WriteFile(endpointFile(dir), b, 0o600); err != nil {
		return fmt.Errorf("write endpoint: %w", err)
	}
	return nil
}

func readEndpoint(dir string) (endpoint, error) {
	var e endpoint
	b, err := os.ReadFile(endpointFile(dir))
	if err != nil {
		return e, err
	}
	return e, json.Unmarshal(b, &e)
}

// control connects a command that asks or tells. Where no broker was named it looks for a `millrace run` of this
// user: the one of the job, or the only one there is.
func (a *app) control(ctx context.Context, job string) (*broker.Conn, error) {
	acc, given, err := a.nats.access()
	if err != nil {
		return nil, err
	}
	if !given {
		if e, ok := a.localRun(job); ok {
			acc = broker.Access{URL: e.URL, Token: e.Token}
		}
	}
	return a.connectTo(ctx, acc, "control", controlWait)
}

// localRun finds the endpoint of a running `millrace run`.
func (a *app) localRun(job string) (endpoint, bool) {
	pattern := "*"
	if job != "" {
		pattern = job
	}
	dirs, _ := filepath.Glob(filepath.Join(a.data, "run", pattern)) // the pattern is well formed
	var found []endpoint
	for _, d := range dirs {
		l, err := broker.LockDir(d)
		if err == nil { // nobody runs it
			l.Unlock()
			continue
		}
		if e, err := readEndpoint(d); err == nil {
			found = append(found, e)
		}
	}
	if len(found) != 1 {
		return endpoint{}, false
	}
	return found[0], true
}
