package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// profileAfter is how long after the start of a process its profile begins: from the middle of a job.
const profileAfter = 2 * time.Second

var metricsSaid = regexp.MustCompile(`metrics at (http://\S+)/metrics`)

// role starts the program. Where profiles are wanted, one is taken of it while it runs.
func (c *config) role(ctx context.Context, measurement, name string, args ...string) (*process, error) {
	if c.profile == "" {
		return start(ctx, name, c.bin, args...)
	}
	p, err := start(ctx, name, c.bin, append(args, "--metrics-addr", "127.0.0.1:0", "--pprof")...)
	if err != nil {
		return nil, err
	}
	go func() {
		if err := c.takeProfile(ctx, p, filepath.Join(c.profile, measurement+"-"+name+".pprof")); err != nil {
			say("no profile of %s: %v", name, err)
		}
	}()
	return p, nil
}

func (c *config) takeProfile(ctx context.Context, p *process, to string) error {
	url, err := p.says(ctx, &p.err, metricsSaid)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-p.over:
		return fmt.Errorf("it ended within %s", profileAfter)
	case <-time.After(profileAfter):
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("%s/debug/pprof/profile?seconds=%d", url, int(c.during.Seconds())), nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("it answers %s", resp.Status)
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, resp.Body); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
