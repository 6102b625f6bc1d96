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
)

var wrkRate = regexp.MustCompile(`(?m)^Requests/sec:\s+([0-9.]+)`)

// wrkGets runs wrk against a fixed server of its own and returns the requests per second it got; 0: there is no wrk.
// Every request has the body of a line, the same one.
func (c *config) wrkGets(ctx context.Context) (rate float64, err error) {
	bin, err := exec.LookPath("wrk")
	if err != nil {
		return 0, nil
	}
	script := filepath.Join(c.dir, "post.lua")
	text := "wrk.method = \"POST\"\nwrk.headers[\"Content-Type\"] = \"application/json\"\nwrk.body = [==[" + body(0, c.lines) + "]==]\n"
	if err := os.WriteFile(script, []byte(text), 0o644); err != nil {
		return 0, fmt.Errorf("write wrk's script: %w", err)
	}
	srv, err := startServer(ctx)
	if err != nil {
		return 0, err
	}
	defer srv.kill()
	said, err := output(ctx, bin, "-t", "2", "-c", strconv.Itoa(inFlight), "-d", strconv.Itoa(int(c.wrk.Seconds()))+"s",
		"-s", script, srv.url+"/v1/chat/completions")
	if err != nil {
		return 0, err
	}
	return readWrk(said)
}

// readWrk finds the rate in what wrk prints, and wants every answer to be a good one.
func readWrk(said string) (float64, error) {
	m := wrkRate.FindStringSubmatch(said)
	if m == nil || strings.Contains(said, "Non-2xx") || strings.Contains(said, "Socket errors") {
		return 0, fmt.Errorf("wrk did not go well:\n%s", said)
	}
	return strconv.ParseFloat(m[1], 64)
}
