package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// asked is what one run of wrk showed.
type asked struct {
	rate float64       // requests per second; 0: there is no wrk
	cpu  time.Duration // of wrk and the server together, for one request
}

// wrkGets runs wrk against a fixed server of its own. Every request has the body of a line, the same one.
func (c *config) wrkGets(ctx context.Context) (a asked, err error) {
	bin, err := exec.LookPath("wrk")
	if err != nil {
		return a, nil
	}
	script := filepath.Join(c.dir, "post.lua")
	text := "wrk.method = \"POST\"\nwrk.headers[\"Content-Type\"] = \"application/json\"\nwrk.body = [==[" + body(0, c.lines) + "]==]\n"
	if err := os.WriteFile(script, []byte(text), 0o644); err != nil {
		return a, fmt.Errorf("write wrk's script: %w", err)
	}
	srv, err := startServer(ctx)
	if err != nil {
		return a, err
	}
	defer srv.kill()
	p, err := start(ctx, "wrk", bin, "-t", "2", "-c", strconv.Itoa(inFlight), "-d", strconv.Itoa(int(c.wrk.Seconds()))+"s",
		"-s", script, srv.url+"/v1/chat/completions")
	if err != nil {
		return a, err
	}
	took, err := p.wait()
	if err != nil {
		return a, err
	}
	served, err := srv.end()
	if err != nil {
		return a, err
	}
	said, _ := p.out.heard()
	rate, n, err := readWrk(said)
	return asked{rate: rate, cpu: (took.cpu + served.cpu) / time.Duration(max(n, 1))}, err
}

var (
	wrkRate  = regexp.MustCompile(`(?m)^Requests/sec:\s+([0-9.]+)`)
	wrkCount = regexp.MustCompile(`(?m)^\s*(\d+) requests in `)
)

// readWrk finds the rate and the number of requests in what wrk prints, and wants every answer to be a good one.
func readWrk(said string) (rate float64, n int64, err error) {
	r, c := wrkRate.FindStringSubmatch(said), wrkCount.FindStringSubmatch(said)
	if r == nil || c == nil || strings.Contains(said, "Non-2xx") || strings.Contains(said, "Socket errors") {
		return 0, 0, fmt.Errorf("wrk did not go well:\n%s", said)
	}
	rate, err = strconv.ParseFloat(r[1], 64)
	if err == nil {
		n, err = strconv.ParseInt(c[1], 10, 64)
	}
	return rate, n, err
}
