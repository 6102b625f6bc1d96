package main

import (
	"cmp"
	"context"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"millrace/broker"
)

// natsFlags say how to reach the broker.
type natsFlags struct {
	url, token, tokenFile, creds, cert, key, ca string

	usual string // where a broker is that nobody named; empty: defaultNATS
}

const defaultNATS = "nats://127.0.0.1:4222"

func (a *app) natsFlags(cmd *cobra.Command) {
	f, n := cmd.Flags(), &a.nats
	f.StringVar(&n.url, "nats", "", "`URL` of the broker (default: $NATS_URL, else "+defaultNATS+")")
	f.StringVar(&n.token, "token", "", "broker token; better in MILLRACE_TOKEN or --token-file than on the command line")
	f.StringVar(&n.tokenFile, "token-file", "", "`FILE` with the broker token")
	f.StringVar(&n.creds, "creds", "", "NATS credentials `FILE`")
	f.StringVar(&n.cert, "tls-cert", "", "`FILE` with a certificate to show to the broker, PEM")
	f.StringVar(&n.key, "tls-key", "", "`FILE` with the key of --tls-cert, PEM")
	f.StringVar(&n.ca, "tls-ca", "", "`FILE` with the certificates to trust instead of the system's, PEM")
}

// access resolves the flags, and looks into the files that they name. given says that the user named a broker.
func (n *natsFlags) access() (acc broker.Access, given bool, err error) {
	acc = broker.Access{URL: n.url, Token: n.token, Creds: n.creds, TLSCert: n.cert, TLSKey: n.key, TLSCA: n.ca}
	if acc.URL == "" {
		acc.URL = os.Getenv("NATS_URL")
	}
	given = acc.URL != ""
	if !given {
		acc.URL = n.usually()
	}
	if n.tokenFile != "" {
		b, err := broker.ReadFile("--token-file", n.tokenFile, "the file with the broker's token")
		if err != nil {
			return acc, given, err
		}
		acc.Token = strings.TrimSpace(string(b))
	}
	return acc, given, acc.Check()
}

func (n *natsFlags) usually() string { return cmp.Or(n.usual, defaultNATS) }

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
