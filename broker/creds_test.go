package broker_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nkeys"

	"millrace/broker"
)

// signer is an operator, or an account of one.
type signer struct {
	t   *testing.T
	key nkeys.KeyPair
	pub string
}

func newSigner(t *testing.T, make func() (nkeys.KeyPair, error)) signer {
	t.Helper()
	key, err := make()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	return signer{t, key, pub}
}

// sign makes the JWT of claims.
func (s signer) sign(c interface {
	Encode(nkeys.KeyPair) (string, error)
}) string {
	s.t.Helper()
	token, err := c.Encode(s.key)
	if err != nil {
		s.t.Fatal(err)
	}
	return token
}

// creds writes the credentials file of a user of the account.
func (s signer) creds() string {
	s.t.Helper()
	user := newSigner(s.t, nkeys.CreateUser)
	seed, err := user.key.Seed()
	if err != nil {
		s.t.Fatal(err)
	}
	b, err := jwt.FormatUserConfig(s.sign(jwt.NewUserClaims(user.pub)), seed)
	if err != nil {
		s.t.Fatal(err)
	}
	path := filepath.Join(s.t.TempDir(), "user.creds")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// TestCreds: a nats-server that knows users by the JWTs of their account lets those in that have a file of it.
func TestCreds(t *testing.T) {
	operator, account, system := newSigner(t, nkeys.CreateOperator), newSigner(t, nkeys.CreateAccount), newSigner(t, nkeys.CreateAccount)
	claims := jwt.NewAccountClaims(account.pub)
	claims.Limits.JetStreamLimits = jwt.JetStreamLimits{DiskStorage: 8 << 30, MemoryStorage: 64 << 20, Streams: 100, Consumer: 100}
	accounts := new(server.MemAccResolver)
	if err := errors.Join(
		accounts.Store(account.pub, operator.sign(claims)),
		accounts.Store(system.pub, operator.sign(jwt.NewAccountClaims(system.pub))),
	); err != nil {
		t.Fatal(err)
	}
	ns, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true, JetStream: true, StoreDir: t.TempDir(),
		TrustedOperators: []*jwt.OperatorClaims{jwt.NewOperatorClaims(operator.pub)}, AccountResolver: accounts, SystemAccount: system.pub,
	})
	if err != nil {
		t.Fatal(err)
	}
	ns.Start()
	t.Cleanup(func() { ns.Shutdown(); ns.WaitForShutdown() })
	if !ns.ReadyForConnections(20 * time.Second) {
		t.Fatal("the server does not start")
	}
	c, err := broker.Connect(t.Context(), broker.Access{URL: ns.ClientURL(), Creds: account.creds()}, "test", quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	works(t, c)
	stranger := newSigner(t, nkeys.CreateAccount)
	refused(t, broker.Access{URL: ns.ClientURL(), Creds: stranger.creds()}, "--creds")
	refused(t, broker.Access{URL: ns.ClientURL()}, "--creds")
}
