package broker_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"millrace/broker"
)

// authority signs certificates.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string // its certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a.cert, a.key, a.file, _ = a.issue("ca", a.cert)
	return a
}

// issue makes a certificate and its key; the first one is its own authority's.
func (a *authority) issue(name string, c *x509.Certificate) (cert *x509.Certificate, key *ecdsa.PrivateKey, certFile, keyFile string) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	parent, by := a.cert, a.key
	if by == nil {
		by = key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by)
	if err != nil {
		a.t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		a.t.Fatal(err)
	}
	kb, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	write := func(kind string, b []byte) string {
		path := filepath.Join(a.dir, name+"."+kind)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			a.t.Fatal(err)
		}
		return path
	}
	return cert, key, write("CERTIFICATE", der), write("PRIVATE KEY", kb)
}

// pair makes a certificate for one use, as public authorities do.
func (a *authority) pair(name string, use x509.ExtKeyUsage) (cert, key string) {
	a.t.Helper()
	_, _, cert, key = a.issue(name, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{use}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	})
	return cert, key
}

// works uses a connection as a role does at its start, and looks at what doctor says.
func works(t *testing.T, c *broker.Conn) {
	t.Helper()
	if err := (broker.Declarer{JS: c.JS, Disk: 1 << 30}).Base(t.Context()); err != nil {
		t.Fatal(err)
	}
	seen := false
	for _, f := range broker.Doctor(t.Context(), c) {
		seen = seen || f.Check == "stream RES" && f.Level == broker.LevelOK
		if f.Level == broker.LevelBad {
			t.Errorf("doctor: %+v", f)
		}
	}
	if !seen {
		t.Error("doctor does not see the stream of results")
	}
}

// refused connects, and wants to hear at once that it cannot be, and what to do.
func refused(t *testing.T, a broker.Access, says string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := broker.Connect(ctx, a, "test", quiet())
	if err == nil {
		c.Close()
	}
	if err == nil || errors.Is(err, broker.ErrUnreachable) || !strings.Contains(err.Error(), says) {
		t.Errorf("%+v: %v, want %q", a, err, says)
	}
}

func TestTLS(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	cert, key := ca.pair("server", x509.ExtKeyUsageServerAuth)
	myCert, myKey := ca.pair("client", x509.ExtKeyUsageClientAuth)
	badCert, badKey := other.pair("client", x509.ExtKeyUsageClientAuth)
	for name, mutual := range map[string]string{"server": "", "mutual": ca.file} {
		t.Run(name, func(t *testing.T) {
			srv := &broker.Server{Addr: "127.0.0.1:0", Token: "secret", TLSCert: cert, TLSKey: key, TLSCA: mutual}
			works(t, start(t, srv)) // inside the process
			a := broker.Access{URL: srv.URL(), Token: "secret", TLSCA: ca.file}
			if mutual != "" {
				refused(t, a, "--tls-cert")
				a.TLSCert, a.TLSKey = badCert, badKey
				refused(t, a, "--tls-cert")
				a.TLSCert, a.TLSKey = myCert, myKey
			}
			for _, scheme := range []string{"tls://", "nats://"} { // the broker says that it wants TLS
				b := a
				b.URL = scheme + strings.TrimPrefix(srv.URL(), "tls://")
				c, err := broker.Connect(t.Context(), b, "test", quiet())
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.NC.TLSConnectionState(); err != nil {
					t.Errorf("not over TLS: %v", err)
				}
				works(t, c)
				c.Close()
			}
			stranger, tokenless := a, a
			stranger.TLSCA, tokenless.Token = other.file, ""
			refused(t, stranger, "--tls-ca")
			refused(t, tokenless, "MILLRACE_TOKEN")
			if mutual == "" {
				stranger.TLSCA = "" // the system's authorities do not know it
				refused(t, stranger, "--tls-ca")
			}
		})
	}
}

// TestAlerts: an alert that says nothing of us is waited for, and one that does is not.
func TestAlerts(t *testing.T) {
	ca := newAuthority(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	came := make(chan byte, 10)
	go func() {
		for _, alert := range []byte{80, 90, 40} { // internal error, user canceled, handshake failure
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(nc, `INFO {"server_id":"x","max_payload":1048576,"tls_required":true}`+"\r\n")
			_, _ = nc.Read(make([]byte, 4096)) // the hello
			_, _ = nc.Write([]byte{21, 3, 3, 0, 2, 2, alert})
			_, _ = io.Copy(io.Discard, nc)
			nc.Close()
			came <- alert
		}
	}()
	refused(t, broker.Access{URL: "tls://" + ln.Addr().String(), TLSCA: ca.file}, "--tls-cert")
	for _, want := range []byte{80, 90, 40} {
		if got := <-came; got != want {
			t.Errorf("alert %d, want %d", got, want)
		}
	}
}
